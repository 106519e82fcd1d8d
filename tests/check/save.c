/* A sequence in a file: what is loaded goes on as the saved one, and no damaged file is believed.
 */
#include "world.h"

#include <unistd.h>

enum { N_TOKENS = 600 };
static uint32_t tokens[N_TOKENS];
static char path[64];

static uint64_t go_on(kivi_seq *seq) {
    size_t n = world_out_floats(&seq->cache->layout, 1);
    float *out = check_alloc(n * 4);
    uint64_t h = 0;
    for (int i = 0; i < 70 && !check_failed(); i++) {
        CHECK_OK(world_step(seq, tokens, 1, out, err));
        h = hash_u64(h, world_hash(out, n * 4));
    }
    free(out);
    return h;
}

static kivi_seq *fed(kivi_cache *cache, uint32_t n) {
    kivi_seq *seq = NULL;
    CHECK_OK(kivi_seq_create(&seq, cache, err));
    if (n) CHECK_OK(kivi_seq_begin_prompt(seq, n, err));
    if (n) CHECK_OK(world_step(seq, tokens, n, NULL, err));
    return seq;
}

static world world_of(uint32_t k_bits, uint32_t v_bits, uint32_t sinks, uint32_t plus) {
    world w = world_small();
    w.geometry.kv.k_bits = k_bits, w.geometry.kv.v_bits = v_bits, w.geometry.kv.sink_tokens = sinks;
    w.geometry.kv.plus = plus;
    if (plus) w.geometry.kv.residual_tokens = 128;
    return w;
}

static void round_trip(uint32_t k_bits, uint32_t v_bits, uint32_t sinks, uint32_t plus,
                       uint32_t head_dim) {
    if (!check_case("save/continue/d%u-b%u.%u%s-s%u", head_dim, k_bits, v_bits, plus ? "+" : "",
                    sinks))
        return;
    world w = world_of(k_bits, v_bits, sinks, plus);
    w.geometry.head_dim = head_dim;
    kivi_cache *cache = NULL, *other = NULL;
    CHECK_OK(world_create(&cache, &w, err));
    w.geometry.n_pages = 8;
    CHECK_OK(world_create(&other, &w, err)); /* another pool: page ids must not matter */
    static const uint32_t lengths[] = {0, 1, 20, 32, 63, 127, 128, 129, 300};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths && !check_failed(); i++) {
        kivi_seq *seq = fed(cache, lengths[i]), *loaded = NULL;
        uint32_t n = lengths[i];
        if (n > 100) { /* also the state after steps back, before the prompt's start too */
            uint32_t more = 10;
            CHECK_OK(kivi_seq_begin_prompt(seq, more, err));
            CHECK_OK(world_step(seq, tokens, more, NULL, err));
            CHECK_OK(kivi_seq_rewind(seq, n - 3, err));
        }
        CHECK_OK(kivi_seq_save(seq, path, err));
        CHECK_OK(kivi_seq_load(&loaded, other, path, err));
        if (loaded) {
            CHECK(kivi_seq_length(loaded) == kivi_seq_length(seq), "length");
            CHECK(go_on(loaded) == go_on(seq), "%u tokens: goes on differently", n);
        }
        kivi_seq_destroy(&loaded);
        kivi_seq_destroy(&seq);
    }
    CHECK(other->pool.n_free == other->pool.n_pages, "pages left");
    kivi_cache_destroy(&cache);
    kivi_cache_destroy(&other);
    remove(path);
    check_end();
}

/* ---- damage ---- */

static size_t read_file(uint8_t *bytes, size_t max) {
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(bytes, 1, max, f) : 0;
    if (f) fclose(f);
    return n;
}

static void write_file(const uint8_t *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n)
        check_fail(__FILE__, __LINE__, "%s cannot be written", path);
    if (f) fclose(f);
}

static void expect_refused(kivi_cache *cache, const char *what, size_t at) {
    kivi_seq *seq = NULL;
    kivi_error e = {0};
    uint64_t before = atomic_load(&cache->mem->n_blocks);
    kivi_status status = kivi_seq_load(&seq, cache, path, &e);
    CHECK(status != KIVI_OK && !seq, "%s at %zu is believed", what, at);
    CHECK(e.status == status && e.text[0], "%s at %zu: no error text", what, at);
    CHECK(status == KIVI_FORMAT || status == KIVI_ARG || status == KIVI_FULL, "%s at %zu: %s", what,
          at, e.text);
    CHECK(atomic_load(&cache->mem->n_blocks) == before && cache->pool.n_free == cache->pool.n_pages,
          "%s at %zu: a leak", what, at);
    CHECK(ki_pool_check(&cache->pool), "pool");
    kivi_seq_destroy(&seq);
}

/* A file whose checksum is right but whose first list of wide channels is not. */
static void other_list(kivi_cache *cache, const uint8_t *good, size_t n) {
    enum { HEAD = 8 + 12 * 4 + 3 * 4 }; /* then 4 sinks of 32 channels, then the list */
    static const uint8_t wrong[] = {0, 31, 32, 255};
    static uint8_t bad[1 << 20];
    size_t at = HEAD + 4 * 32 * 2, n_wide = 8;
    for (size_t i = 0; i < sizeof wrong; i++) {
        memcpy(bad, good, n);
        bad[at + (i == 0 ? n_wide - 1 : i == 1 ? 0 : n_wide - 1)] = wrong[i];
        uint64_t h = 0xcbf29ce484222325u;
        for (size_t b = 0; b < n - 8; b++) h = (h ^ bad[b]) * 0x100000001b3u;
        memcpy(bad + n - 8, &h, 8);
        write_file(bad, n);
        expect_refused(cache, "a wide channel out of order", at);
    }
}

static void damage(bool plus) {
    if (!check_case("save/damage%s", plus ? "/b2.2+" : "")) return;
    world w = plus ? world_of(2, 2, 4, KIVI_PLUS_ALL) : world_of(2, 4, 32, 0);
    w.geometry.n_pages = 8;
    kivi_cache *cache = NULL;
    CHECK_OK(world_create(&cache, &w, err));
    kivi_seq *seq = fed(cache, 200), *loaded = NULL;
    CHECK_OK(kivi_seq_save(seq, path, err));
    kivi_seq_destroy(&seq);
    static uint8_t good[1 << 20], bad[1 << 20];
    size_t n = read_file(good, sizeof good - 1);
    CHECK(n > 1000 && n < sizeof good - 1, "a file of %zu bytes", n);
    rng r = check_rng();
    for (size_t i = 0; i < 160 && !check_failed(); i++) { /* every length of the head, then some */
        size_t cut = i < 100 ? i : i < 120 ? n - 1 - (i - 100) : rng_below(&r, (uint32_t)n);
        write_file(good, cut);
        expect_refused(cache, "truncation", cut);
    }
    for (size_t i = 0; i < 640 && !check_failed(); i++) {
        size_t at = i < 480 ? i / 8 : rng_below(&r, (uint32_t)n),
               bit = i < 480 ? i % 8 : rng_below(&r, 8);
        memcpy(bad, good, n);
        bad[at] = (uint8_t)(bad[at] ^ 1u << bit);
        write_file(bad, n);
        expect_refused(cache, "a flipped bit", at);
    }
    if (plus) other_list(cache, good, n);
    good[n] = 0;
    write_file(good, n + 1);
    expect_refused(cache, "a byte too many", n);
    write_file(good, n);
    CHECK_OK(kivi_seq_load(&loaded, cache, path, err)); /* and the good file is good */
    kivi_seq_destroy(&loaded);
    remove(path);
    kivi_error e = {0};
    CHECK(kivi_seq_load(&loaded, cache, path, &e) == KIVI_IO && e.text[0] && !loaded, "no file");
    kivi_cache_destroy(&cache);
    check_end();
}

static void other_kinds(void) {
    if (!check_case("save/other-geometry")) return;
    world good = world_of(2, 2, 0, 0);
    kivi_cache *cache = NULL;
    CHECK_OK(world_create(&cache, &good, err));
    kivi_seq *seq = fed(cache, 200);
    CHECK_OK(kivi_seq_save(seq, path, err));
    for (int i = 0; i < 10; i++) {
        world w = good;
        if (i == 9) w = world_of(2, 2, 0, KIVI_PLUS_ALL);
        if (i == 0) w.geometry.n_layers = 3;
        if (i == 1) w.geometry.n_kv_heads = 4;
        if (i == 2) w.geometry.head_dim = 64;
        if (i == 3) w.geometry.kv.k_bits = 4;
        if (i == 4) w.geometry.kv.v_bits = 16;
        if (i == 5) w.geometry.kv.group = 16;
        if (i == 6) w.geometry.kv.residual_tokens = 64;
        if (i == 7) w.geometry.kv.sink_tokens = 32;
        if (i == 8) w.geometry.n_pages = 1;
        kivi_cache *other = NULL;
        kivi_seq *loaded = NULL;
        kivi_error e = {0};
        CHECK_OK(world_create(&other, &w, err));
        kivi_status status = kivi_seq_load(&loaded, other, path, &e);
        CHECK((status == KIVI_ARG || (i == 8 && status == KIVI_FULL)) && !loaded && e.text[0],
              "case %d gives %s: %s", i, kivi_status_name(status), e.text);
        CHECK(other->pool.n_free == other->pool.n_pages, "pages left");
        kivi_cache_destroy(&other);
    }
    kivi_error e = {0};
    CHECK(kivi_seq_save(seq, "/nonexistent-folder/x", &e) == KIVI_IO && e.text[0], "no folder");
    CHECK_OK(kivi_seq_begin(seq, 1, err));
    CHECK(kivi_seq_save(seq, path, &e) == KIVI_ARG, "within a step");
    kivi_seq_abort(seq);
    kivi_seq_destroy(&seq);
    kivi_cache_destroy(&cache);
    remove(path);
    check_end();
}

/* One + kind is not another: bits, and each part left out. */
static void other_parts(void) {
    if (!check_case("save/other-parts")) return;
    world good = world_of(2, 2, 4, KIVI_PLUS_ALL);
    kivi_cache *cache = NULL;
    CHECK_OK(world_create(&cache, &good, err));
    kivi_seq *seq = fed(cache, 300);
    CHECK_OK(kivi_seq_save(seq, path, err));
    for (int i = 0; i < 10; i++) {
        world w = good;
        if (i == 7) w.geometry.kv.plus |= KIVI_PLUS_K32;
        else if (i == 8) w.geometry.kv.plus |= KIVI_PLUS_V32;
        else if (i == 9) w.geometry.kv.plus ^= KIVI_PLUS_STEP | KIVI_PLUS_ZERO;
        else if (i == 0) w.geometry.kv.k_bits = 4;
        else if (i == 1) w.geometry.kv.v_bits = 3;
        else if (i == 2) w = world_of(2, 2, 4, 0);
        else w.geometry.kv.plus &= ~(1u << (i - 2));
        kivi_cache *other = NULL;
        kivi_seq *loaded = NULL;
        kivi_error e = {0};
        CHECK_OK(world_create(&other, &w, err));
        kivi_status status = kivi_seq_load(&loaded, other, path, &e);
        CHECK(status == KIVI_ARG && !loaded && e.text[0], "case %d gives %s: %s", i,
              kivi_status_name(status), e.text);
        CHECK(other->pool.n_free == other->pool.n_pages, "pages left");
        kivi_cache_destroy(&other);
    }
    kivi_seq_destroy(&seq);
    kivi_cache_destroy(&cache);
    remove(path);
    check_end();
}

void check_save(void) {
    if (!check_wants("save/")) return;
    for (uint32_t i = 0; i < N_TOKENS; i++) tokens[i] = (uint32_t)hash_u64(check_opt.seed, i);
    snprintf(path, sizeof path, "check-save-%ld.seq", (long)getpid());
    static const uint32_t kinds[][3] = {{2, 2, 0},  {2, 2, 32},  {4, 8, 64}, {16, 2, 32},
                                        {2, 16, 0}, {16, 16, 0}, {8, 4, 0},  {2, 2, 4},
                                        {4, 2, 20}, {2, 16, 1},  {2, 2, 40}};
    static const uint32_t plus[][3] = {{2, 2, 4}, {4, 2, 0}, {4, 3, 130}, {2, 16, 20}, {16, 3, 1}};
    static const uint32_t dims[] = {32, 64, 80, 16, 128};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        round_trip(kinds[i][0], kinds[i][1], kinds[i][2], 0, 32);
    for (size_t i = 0; i < sizeof plus / sizeof *plus; i++)
        round_trip(plus[i][0], plus[i][1], plus[i][2], KIVI_PLUS_ALL, dims[i]);
    round_trip(2, 3, 4, KIVI_PLUS | KIVI_PLUS_TURN, 80);
    round_trip(2, 2, 40, KIVI_PLUS_ALL | KIVI_PLUS_K32, 64);
    round_trip(2, 3, 33, KIVI_PLUS | KIVI_PLUS_WIDE | KIVI_PLUS_ZERO | KIVI_PLUS_V32, 128);
    round_trip(2, 2, 35, KIVI_PLUS | KIVI_PLUS_ZERO | KIVI_PLUS_K32 | KIVI_PLUS_V32, 64);
    damage(false);
    damage(true);
    other_kinds();
    other_parts();
}
