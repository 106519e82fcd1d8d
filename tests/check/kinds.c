/* Cache kinds: names, defaults, what is refused, and the pages they make. */
#include "world.h"

static void names(void) {
    if (!check_case("kinds/names")) return;
    static const struct {
        const char *name;
        uint32_t k, v, plus, sinks;
        double bits[2]; /* at head size 64, 128 */
    } all[] = {{"f16", 16, 16, 0, 0, {16, 16}},
               {"kivi8", 8, 8, 0, 0, {9, 9}},
               {"kivi4", 4, 4, 0, 0, {5, 5}},
               {"k4v2", 4, 2, 0, 0, {4, 4}},
               {"kivi2", 2, 2, 0, 0, {3, 3}},
               {"kivi2+", 2, 2, KIVI_PLUS_ALL, 4, {2.53125, 2.515625}},
               {"k4v2+", 4, 2, KIVI_PLUS_ALL, 4, {3.25, 3.25}},
               {"k4v3+", 4, 3, KIVI_PLUS_ALL, 4, {3.75, 3.75}}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        for (uint32_t d = 64; d <= 128; d *= 2) {
            kivi_kv_options kv = {.rewind_tokens = 7, .rule = KIVI_RULE_STREAM}, again;
            CHECK_OK(kivi_kv_by_name(&kv, all[i].name, err));
            CHECK(kv.k_bits == all[i].k && kv.v_bits == all[i].v && kv.plus == all[i].plus &&
                      kv.sink_tokens == all[i].sinks,
                  "%s", all[i].name);
            CHECK(kv.rewind_tokens == 7 && kv.rule == KIVI_RULE_STREAM, "the rest is changed");
            CHECK_OK(kivi_kv_resolve(&kv, d, err));
            again = kv;
            CHECK_OK(kivi_kv_resolve(&again, d, err));
            CHECK(!memcmp(&again, &kv, sizeof kv), "%s: resolved twice", all[i].name);
            double bits = kivi_kv_bits(&kv, d);
            CHECK(bits == all[i].bits[d / 128], "%s, D %u: %g bits", all[i].name, d, bits);
        }
    kivi_kv_options kv = {0};
    kivi_error e = {0};
    CHECK(kivi_kv_by_name(&kv, "kivi3+", &e) == KIVI_ARG && strstr(e.text, "k4v3+"), "%s", e.text);
    check_end();
}

/* Bytes of a page: the planes by hand, filled up to whole lines. */
static void pages(void) {
    if (!check_case("kinds/pages")) return;
    static const uint32_t cases[][6] = {
        /* D, key bits, value bits, codes, page, parts if not all */
        {64, 2, 2, 4608, 5184},
        {128, 2, 2, 9216, 10304},
        {64, 4, 2, 6144, 6656},
        {128, 4, 2, 12288, 13312},
        {64, 4, 3, 7168, 7680},
        {128, 4, 3, 14336, 15360},
        {80, 2, 2, 5760, 7424},
        {256, 2, 16, 75776, 76864},
        {16, 16, 3, 4864, 5120},
        {64, 2, 2, 4608, 5952, KIVI_PLUS_ALL | KIVI_PLUS_K32},
        {64, 2, 2, 4608, 5440, (KIVI_PLUS_ALL & ~KIVI_PLUS_STEP) | KIVI_PLUS_ZERO},
        {64, 2, 2, 4608, 5440, KIVI_PLUS_ALL | KIVI_PLUS_V32},
        {64, 2, 2, 4096, 6144, KIVI_PLUS | KIVI_PLUS_ZERO | KIVI_PLUS_K32 | KIVI_PLUS_V32},
        {128, 2, 3, 10240, 12800, KIVI_PLUS | KIVI_PLUS_ZERO | KIVI_PLUS_V32}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        world w = world_small();
        w.geometry.head_dim = cases[i][0];
        w.geometry.kv = (kivi_kv_options){.k_bits = cases[i][1],
                                          .v_bits = cases[i][2],
                                          .plus = cases[i][5] ? cases[i][5] : KIVI_PLUS_ALL,
                                          .sink_tokens = 4};
        ki_layout l;
        CHECK_OK(ki_layout_init(&l, &w.geometry, err));
        CHECK(l.page_bytes == cases[i][4], "case %zu: a page of %zu bytes", i, l.page_bytes);
        CHECK(l.page_bytes - l.page_scale_bytes == cases[i][3], "case %zu: %zu bytes of scales", i,
              l.page_scale_bytes);
        CHECK(l.k_wide_at % 64 == 0 && l.v_codes_at % 64 == 0 && l.v_third_at % 64 == 0,
              "case %zu: a plane of codes begins within a line", i);
    }
    check_end();
}

static void refused(void) {
    if (!check_case("kinds/refused")) return;
    static const struct {
        kivi_kv_options kv;
        const char *says;
    } all[] = {{{.v_bits = 3}, "2, 4, 8 or 16"},
               {{.plus = KIVI_PLUS_ALL, .residual_tokens = 32}, "multiple of the page (128)"},
               {{.plus = KIVI_PLUS_ALL | KIVI_PLUS_K32, .residual_tokens = 32}, "the page (128)"},
               {{.plus = KIVI_PLUS | KIVI_PLUS_K32, .group = 128}, "of 32 by part k32"},
               {{.plus = KIVI_PLUS_ALL | KIVI_PLUS_ZERO}, "no step by least squares"},
               {{.plus = KIVI_PLUS_ALL, .group = 32}, "key groups of a page (128)"},
               {{.plus = KIVI_PLUS_ALL, .k_bits = 8}, "2, 4 or 16"},
               {{.plus = KIVI_PLUS_ALL, .v_bits = 4}, "2, 3 or 16"},
               {{.plus = KIVI_PLUS_TURN}, "unknown parts"},
               {{.plus = 2 * KIVI_PLUS_V32 + 1}, "unknown parts"}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        kivi_kv_options kv = all[i].kv;
        kivi_error e = {0};
        CHECK(kivi_kv_resolve(&kv, 64, &e) == KIVI_ARG && strstr(e.text, all[i].says),
              "case %zu: '%s'", i, e.text);
    }
    check_end();
}

/* What kernels of whole + kinds alone refuse the others by; what bits leave no room for is no lack.
 */
static void not_whole(void) {
    if (!check_case("kinds/not-whole")) return;
    static const struct {
        uint32_t k, v, plus;
        const char *says;
    } all[] = {{2, 2, 0, NULL},
               {2, 2, KIVI_PLUS_ALL, NULL},
               {4, 3, KIVI_PLUS_ALL, NULL},
               {4, 2, KIVI_PLUS_ALL & ~(KIVI_PLUS_WIDE | KIVI_PLUS_FIT), NULL},
               {16, 2, KIVI_PLUS_ALL | KIVI_PLUS_K32, NULL},
               {2, 16, KIVI_PLUS_ALL | KIVI_PLUS_V32, NULL},
               {2, 2, KIVI_PLUS_ALL & ~KIVI_PLUS_WIDE, "wide"},
               {2, 2, KIVI_PLUS_ALL & ~KIVI_PLUS_FIT, "(fit)"},
               {2, 2, KIVI_PLUS_ALL & ~KIVI_PLUS_TURN, "turned"},
               {2, 2, KIVI_PLUS_ALL & ~KIVI_PLUS_STEP, "steps"},
               {2, 2, (KIVI_PLUS_ALL & ~KIVI_PLUS_STEP) | KIVI_PLUS_ZERO, "zero point"},
               {4, 2, KIVI_PLUS_ALL | KIVI_PLUS_K32, "(k32)"},
               {2, 3, KIVI_PLUS_ALL | KIVI_PLUS_V32, "(v32)"}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        kivi_kv_options kv = {.k_bits = all[i].k, .v_bits = all[i].v, .plus = all[i].plus};
        CHECK_OK(kivi_kv_resolve(&kv, 64, err));
        const char *text = ki_plus_not_whole(&kv);
        CHECK(all[i].says ? text && strstr(text, all[i].says) : !text, "case %zu: %s", i,
              text ? text : "whole");
    }
    check_end();
}

/* A cache of 300 rows whose keys' exponents lie far apart, where a range's middle and back would
 * round. */
static kivi_seq *rows_of(kivi_cache **cache, uint32_t plus, uint32_t sinks) {
    enum { N = 300 };
    static float k[N * 1024], v[N * 1024];
    world w = world_small();
    kivi_seq *seq = NULL;
    w.geometry.head_dim = 64, w.geometry.n_layers = 1;
    w.geometry.kv = (kivi_kv_options){
        .k_bits = 2, .v_bits = 2, .plus = plus, .residual_tokens = 128, .sink_tokens = sinks};
    rng r = check_rng();
    for (size_t i = 0; i < (size_t)N * 1024; i++) {
        k[i] = rng_normal(&r) * (rng_below(&r, 3) ? 1e-5f : 3e4f);
        v[i] = rng_normal(&r);
    }
    CHECK_OK(world_create(cache, &w, err));
    CHECK_OK(kivi_seq_create(&seq, *cache, err));
    CHECK((*cache)->layout.n_kv_heads * 64 <= 1024, "more channels than there are numbers for");
    CHECK_OK(kivi_seq_begin(seq, N, err));
    CHECK_OK(kivi_seq_append(seq, 0, k, v, KIVI_F32, err));
    CHECK_OK(kivi_seq_commit(seq, err));
    return seq;
}

/* A + kind without its parts and with all of a plain kind's is kivi2 to the byte, planes too. */
static void no_part_is_plain(uint32_t sinks) {
    if (!check_case("kinds/no-part-is-plain/s%u", sinks)) return;
    kivi_cache *cache[2];
    kivi_seq *seq[2] = {
        rows_of(&cache[0], 0, sinks),
        rows_of(&cache[1], KIVI_PLUS | KIVI_PLUS_ZERO | KIVI_PLUS_K32 | KIVI_PLUS_V32, sinks)};
    size_t n = cache[0]->layout.page_bytes;
    CHECK(n == cache[1]->layout.page_bytes, "another size of page");
    CHECK(seq[0]->n_pages == 3, "%u pages", seq[0]->n_pages);
    for (uint32_t i = 0; i < seq[0]->n_pages && !check_failed(); i++)
        CHECK(!memcmp(ki_seq_page(seq[0], i, 0, 1), ki_seq_page(seq[1], i, 0, 1), n), "page %u", i);
    for (int i = 0; i < 2; i++) kivi_seq_destroy(&seq[i]), kivi_cache_destroy(&cache[i]);
    check_end();
}

void check_kinds(void) {
    not_whole();
    names();
    pages();
    refused();
    for (uint32_t sinks = 0; sinks <= 40; sinks += 20) no_part_is_plain(sinks);
}
