/* The quantizers of kivi2+, k4v2+ and k4v3+: golden vectors, equality of all instruction sets with
 * the definition, the planes as plus.h draws them, and what the definition promises. */
#include "check.h"

/* ---- golden vectors: tests/golden/make_plus.py says what is in a file ---- */

#define EMBED(d)                                                                                   \
    extern const uint8_t plus_d##d[], plus_d##d##_end[] __attribute__((visibility("hidden")));     \
    __asm__(".section .rodata\n.balign 64\nplus_d" #d ":\n.incbin \"tests/golden/plus/d" #d        \
            ".bin\"\nplus_d" #d "_end:\n.byte 0\n.previous\n");
EMBED(64)
EMBED(80)
EMBED(96)
EMBED(128)
EMBED(256)
EMBED(64g32)
EMBED(80g32)
#define SET(d)                                                                                     \
    { d, plus_d##d, plus_d##d##_end, NULL, NULL }
#define SET_G(d)                                                                                   \
    { d, plus_d##d, plus_d##d##_end, plus_d##d##g32, plus_d##d##g32_end }
static const struct {
    unsigned head_dim;
    const uint8_t *bytes, *end;
    const uint8_t *groups, *groups_end; /* its pages with keys in groups of 32; NULL: not made */
} golden_files[] = {SET_G(64), SET_G(80), SET(96), SET(128), SET(256)};

enum { N_GOLDEN = sizeof golden_files / sizeof *golden_files, N_PAGES = 3, N_ROWS = 22 };

typedef struct golden_plus {
    unsigned head_dim, n_groups;
    const uint8_t *sinks, *x, *list, *scale[2], *zero[2], *code[2]; /* 2 bits with wide, 4 bits */
    const uint8_t *rows, *turned, *half, *v_scale[2], *v_code[2];   /* 2 and 3 bits */
} golden_plus;

static const uint8_t *take(const uint8_t **at, size_t n_bytes) {
    const uint8_t *p = *at;
    *at += n_bytes;
    return p;
}

static golden_plus golden_open(int i) {
    unsigned d = golden_files[i].head_dim;
    golden_plus g = {.head_dim = d, .n_groups = d / ki_plus_value_group(d)};
    const uint8_t *at = golden_files[i].bytes;
    g.sinks = take(&at, (size_t)N_PAGES * 4);
    g.x = take(&at, (size_t)N_PAGES * 128 * d * 2);
    g.list = take(&at, (size_t)N_PAGES * d / 4);
    for (int k = 0; k < 2; k++) {
        g.scale[k] = take(&at, (size_t)N_PAGES * d * 2);
        g.zero[k] = take(&at, (size_t)N_PAGES * d * 2);
        g.code[k] = take(&at, (size_t)N_PAGES * 128 * d);
    }
    g.rows = take(&at, (size_t)N_ROWS * d * 4);
    g.turned = take(&at, (size_t)N_ROWS * d * 4);
    g.half = take(&at, (size_t)N_ROWS * d * 2);
    for (int k = 0; k < 2; k++) {
        g.v_scale[k] = take(&at, (size_t)N_ROWS * g.n_groups * 2);
        g.v_code[k] = take(&at, (size_t)N_ROWS * d);
    }
    CHECK(at == golden_files[i].end, "d%u.bin has another size than make_plus.py writes", d);
    return g;
}

/* ---- pages ---- */

typedef struct page {
    unsigned head_dim, n_sinks, group;
    uint16_t *store; /* [8][D][16] */
    const uint16_t *blocks[8];
} page;

static page page_make(unsigned head_dim, unsigned n_sinks) {
    page p = {.head_dim = head_dim, .n_sinks = n_sinks, .group = 128};
    p.store = check_alloc((size_t)128 * head_dim * 2);
    for (unsigned b = 0; b < 8; b++) p.blocks[b] = p.store + (size_t)b * head_dim * 16;
    return p;
}
static uint16_t *page_at(const page *p, unsigned t, unsigned c) {
    return p->store + ((size_t)(t / 16) * p->head_dim + c) * 16 + t % 16;
}
static double key_at(const page *p, unsigned t, unsigned c) {
    return (double)ki_f16_to_f32(*page_at(p, t, c));
}

/* The planes of a closed page, each up to the edge of an unreadable page, and dirty before. */
typedef struct closed {
    guard low, wide, list, scale, zero;
    ki_plus_keys keys;
} closed;

static guard dirty(size_t n_bytes) {
    guard g = guard_alloc(n_bytes);
    memset(g.data, 0xa5, n_bytes);
    return g;
}
/* n_wide: D/4 or, where the wide channels are left out, 0. */
static closed close_page_with(const page *p, unsigned bits, unsigned n_wide, unsigned n_steps,
                              const ki_plus_kernels *kernels) {
    size_t d = p->head_dim;
    closed c = {.low = dirty(16 * d * bits), .wide = dirty(8 * d), .list = dirty(d / 4)};
    c.scale = dirty(128 / p->group * d * 2);
    c.zero = dirty(128 / p->group * d * 2);
    c.keys = (ki_plus_keys){.bits = bits,
                            .low = (uint32_t *)c.low.data,
                            .wide = n_wide ? (uint32_t *)c.wide.data : NULL,
                            .list = n_wide ? c.list.data : NULL,
                            .scale = (uint16_t *)c.scale.data,
                            .zero = (uint16_t *)c.zero.data,
                            .group = p->group};
    kernels->close_keys(&c.keys, p->blocks, p->n_sinks, p->head_dim, n_steps);
    return c;
}
static closed close_page(const page *p, unsigned bits, const ki_plus_kernels *kernels) {
    return close_page_with(p, bits, bits == 2 ? p->head_dim / 4 : 0, KI_PLUS_KEY_STEPS, kernels);
}
static void closed_free(closed *c) {
    guard_free(&c->low), guard_free(&c->wide), guard_free(&c->list);
    guard_free(&c->scale), guard_free(&c->zero);
}

static const ki_plus_kernels definition = {.close_keys = ki_plus_close_keys_scalar,
                                           .quantize_values = ki_plus_quantize_values_scalar,
                                           .turn = ki_plus_turn_scalar};

/* plus.h's drawing, written down again: bytes [t / 16][number / 4][t % 16][number % 4] in one
 * stream, cut into quads of 64 bytes, four of them in the bit pairs of a vector of words. */
static void draw_wide(uint8_t *bytes, const uint32_t *wide, unsigned head_dim) {
    for (size_t i = 0; i < (size_t)32 * head_dim; i++) {
        size_t quad = i / 64, in_quad = i % 64;
        uint32_t word = wide[quad / 4 * 16 + in_quad / 4];
        bytes[i] = (uint8_t)(word >> 8 * (in_quad % 4) >> 2 * (quad % 4) & 3);
    }
}

static page golden_page_open(const golden_plus *g, unsigned index) {
    unsigned d = g->head_dim;
    uint32_t n_sinks;
    memcpy(&n_sinks, g->sinks + (size_t)4 * index, 4);
    page p = page_make(d, n_sinks);
    for (unsigned t = 0; t < 128; t++)
        for (unsigned c = 0; c < d; c++)
            memcpy(page_at(&p, t, c), g->x + (((size_t)index * 128 + t) * d + c) * 2, 2);
    return p;
}

static void golden_page(const golden_plus *g, unsigned index, unsigned bits,
                        const ki_plus_kernels *kernels) {
    unsigned d = g->head_dim, k = bits == 4;
    page p = golden_page_open(g, index);
    closed got = close_page(&p, bits, kernels);
    CHECK(!memcmp(got.keys.scale, g->scale[k] + (size_t)index * d * 2, (size_t)d * 2), "scales");
    CHECK(!memcmp(got.keys.zero, g->zero[k] + (size_t)index * d * 2, (size_t)d * 2), "zeros");
    const uint8_t *list = g->list + (size_t)index * d / 4;
    CHECK(k || !memcmp(got.keys.list, list, d / 4), "page %u: the wide channels", index);
    static uint8_t high[32 * 256];
    if (!k) draw_wide(high, got.keys.wide, d);
    for (unsigned c = 0, w = 0; c < d; c++) {
        bool wide = !k && w < d / 4 && list[w] == c;
        for (unsigned t = 0; t < 128; t++) {
            unsigned code = ki_key_code(got.keys.low, t, c, d, bits);
            if (wide)
                code |= (unsigned)high[((t / 16 * (d / 16) + w / 4) * 16 + t % 16) * 4 + w % 4]
                        << 2;
            unsigned want = g->code[k][((size_t)index * 128 + t) * d + c];
            CHECK(code == want, "page %u token %u channel %u: code %u, expected %u", index, t, c,
                  code, want);
            CHECK(ki_plus_key_code(&got.keys, t, c, d) == want, "ki_plus_key_code");
        }
        w += wide;
    }
    closed_free(&got);
    free(p.store);
}

/* The page again, its keys in groups of 32. */
static void golden_groups(const golden_plus *g, unsigned index, unsigned bits, const uint8_t *at,
                          const uint8_t *end, const ki_plus_kernels *kernels) {
    unsigned d = g->head_dim;
    page p = golden_page_open(g, index);
    p.group = 32;
    const uint8_t *scale[2], *zero[2], *code[2];
    for (int k = 0; k < 2; k++) {
        scale[k] = take(&at, (size_t)N_PAGES * 4 * d * 2);
        zero[k] = take(&at, (size_t)N_PAGES * 4 * d * 2);
        code[k] = take(&at, (size_t)N_PAGES * 128 * d);
    }
    CHECK(at == end, "d%ug32.bin has another size than make_plus.py writes", d);
    unsigned k = bits == 4;
    size_t n = (size_t)4 * d * 2;
    closed got = close_page(&p, bits, kernels);
    CHECK(!memcmp(got.keys.scale, scale[k] + index * n, n), "page %u: scales", index);
    CHECK(!memcmp(got.keys.zero, zero[k] + index * n, n), "page %u: zeros", index);
    CHECK(k || !memcmp(got.keys.list, g->list + (size_t)index * d / 4, d / 4), "wide channels");
    for (unsigned t = 0; t < 128; t++)
        for (unsigned c = 0; c < d; c++) {
            unsigned want = code[k][((size_t)index * 128 + t) * d + c],
                     have = ki_plus_key_code(&got.keys, t, c, d);
            CHECK(have == want, "page %u token %u channel %u: code %u, expected %u", index, t, c,
                  have, want);
        }
    closed_free(&got);
    free(p.store);
}

static void golden_row(const golden_plus *g, unsigned r, const ki_plus_kernels *kernels) {
    unsigned d = g->head_dim;
    guard row = guard_alloc((size_t)d * 4);
    memcpy(row.data, g->rows + (size_t)r * d * 4, (size_t)d * 4);
    kernels->turn((float *)row.data, d);
    CHECK(!memcmp(row.data, g->turned + (size_t)r * d * 4, (size_t)d * 4), "row %u turned", r);
    guard half = guard_alloc((size_t)d * 2);
    uint64_t n_saturated = 0;
    CHECK(ki_to_f16_scalar((uint16_t *)half.data, &n_saturated, (float *)row.data, d), "finite");
    CHECK(!memcmp(half.data, g->half + (size_t)r * d * 2, (size_t)d * 2), "row %u rounded", r);
    for (unsigned k = 0; k < 2; k++) {
        guard codes = dirty(d), scale = dirty((size_t)g->n_groups * 2);
        kernels->quantize_values(codes.data, (uint16_t *)scale.data, (uint16_t *)half.data, d,
                                 k ? 3 : 2, KI_PLUS_VALUE_STEPS);
        size_t n = (size_t)g->n_groups * 2;
        CHECK(!memcmp(scale.data, g->v_scale[k] + r * n, n), "row %u: scales, %u bits", r, 2 + k);
        CHECK(!memcmp(codes.data, g->v_code[k] + (size_t)r * d, d), "row %u: codes, %u bits", r,
              2 + k);
        guard_free(&codes), guard_free(&scale);
    }
    guard_free(&row), guard_free(&half);
}

static void golden_set_of(int i, const ki_plus_kernels *kernels) {
    golden_plus g = golden_open(i);
    for (unsigned index = 0; index < N_PAGES && !check_failed(); index++)
        for (unsigned bits = 2; bits <= 4; bits += 2) {
            golden_page(&g, index, bits, kernels);
            if (golden_files[i].groups)
                golden_groups(&g, index, bits, golden_files[i].groups, golden_files[i].groups_end,
                              kernels);
        }
    for (unsigned r = 0; r < N_ROWS && !check_failed(); r++) golden_row(&g, r, kernels);
    check_end();
}

static void golden_cases(void) {
    for (int i = 0; i < N_GOLDEN; i++) {
        if (check_case("plus/golden/d%u/definition", golden_files[i].head_dim))
            golden_set_of(i, &definition);
        for (int isa = 0; isa < KI_ISA_COUNT; isa++)
            if (check_case_isa((ki_isa)isa, "plus/golden/d%u", golden_files[i].head_dim))
                golden_set_of(i, &ki_kernels_get((ki_isa)isa)->plus);
    }
}

/* ---- generated input ---- */

enum { N_KINDS = 13 };

static float element(unsigned kind, float constant, float mean, rng *r) {
    float n = rng_normal(r);
    switch (kind) {
    case 1: return rng_below(r, 40) ? n : n * 50;
    case 2: return constant;
    case 3: return rng_below(r, 2) ? -1.25f : 0.375f;
    case 4: return n * 2e-7f;
    case 5: return n * 3e4f;
    case 6: return mean + n * 0.3f;
    case 7: return (float)rng_below(r, 7) * 0.5f;
    case 8: return 1 + (float)rng_below(r, 3) * 0x1p-10f;
    case 9: return rng_below(r, 2) ? -0.0f : 0.0f;
    case 10: return rng_below(r, 2) ? -65504.0f : 65504.0f;
    /* pulled in, the lower end is between the smallest float16 below 0 and 0 */
    case 12: return ((float)rng_below(r, 6) - 1) * 0x1p-24f;
    default: return n;
    }
}
static uint16_t finite_pattern(rng *r) {
    uint16_t h;
    do h = (uint16_t)rng_u64(r);
    while ((h & 0x7c00) == 0x7c00);
    return h;
}
static uint16_t number(unsigned kind, float constant, float mean, rng *r) {
    if (kind == 11) return finite_pattern(r);
    float v = element(kind, constant, mean, r);
    return ki_f32_to_f16(v > 65504 ? 65504 : v < -65504 ? -65504 : v);
}

/* A kind for the whole page or one for each channel; sinks any pattern, NaN and infinity too. */
static page random_page(rng *r) {
    unsigned d = 16 * (1 + rng_below(r, 16)), n_sinks = 0;
    switch (rng_below(r, 4)) {
    case 0: n_sinks = 4; break;
    case 1: n_sinks = rng_below(r, 128); break;
    default: break;
    }
    page p = page_make(d, n_sinks);
    bool mixed = rng_below(r, 2);
    unsigned kind = rng_below(r, N_KINDS);
    for (unsigned c = 0; c < d; c++) {
        float constant = rng_normal(r), mean = rng_normal(r) * 1000;
        if (mixed) kind = rng_below(r, N_KINDS);
        for (unsigned t = 0; t < 128; t++)
            *page_at(&p, t, c) =
                t < n_sinks ? (uint16_t)rng_u64(r) : number(kind, constant, mean, r);
    }
    return p;
}

static void same_planes(const closed *a, const closed *b, const page *p, unsigned bits) {
    unsigned d = p->head_dim, n_sinks = p->n_sinks;
    size_t n = (size_t)128 / p->group * d * 2;
    CHECK(!memcmp(a->scale.data, b->scale.data, n), "scales, D %u S %u", d, n_sinks);
    CHECK(!memcmp(a->zero.data, b->zero.data, n), "zeros, D %u S %u", d, n_sinks);
    CHECK(!memcmp(a->list.data, b->list.data, d / 4), "list, D %u S %u", d, n_sinks);
    CHECK(!memcmp(a->low.data, b->low.data, (size_t)16 * d * bits), "low, D %u S %u", d, n_sinks);
    CHECK(!memcmp(a->wide.data, b->wide.data, (size_t)8 * d), "wide, D %u S %u", d, n_sinks);
}

static void keys_isa(ki_isa isa, bool groups) {
    if (!check_case_isa(isa, "plus/keys/%sas-definition", groups ? "groups-" : "")) return;
    rng r = check_rng();
    for (int round = 0; round < (check_opt.thorough ? 2000 : 120) && !check_failed(); round++) {
        page p = random_page(&r);
        if (groups) p.group = 16u << rng_below(&r, 3);
        for (unsigned form = 0; form < 5; form++) { /* 4 bits, then 2 bits with parts left out */
            unsigned bits = form ? 2 : 4, n_wide = form % 2 ? p.head_dim / 4 : 0,
                     n_steps = form < 3 ? KI_PLUS_KEY_STEPS : 1;
            closed want = close_page_with(&p, bits, n_wide, n_steps, &definition),
                   got = close_page_with(&p, bits, n_wide, n_steps, &ki_kernels_get(isa)->plus);
            same_planes(&got, &want, &p, bits);
            closed_free(&want), closed_free(&got);
        }
        free(p.store);
    }
    check_end();
}

/* Numbers that should have been refused: bytes are free, but no fault, and a list in order. */
static void keys_not_finite(ki_isa isa) {
    if (!check_case_isa(isa, "plus/keys/not-finite")) return;
    rng r = check_rng();
    for (int round = 0; round < 40 && !check_failed(); round++) {
        page p = random_page(&r);
        for (size_t i = 0; i < (size_t)128 * p.head_dim; i++)
            if (rng_below(&r, 50) == 0) p.store[i] = (uint16_t)(rng_u64(&r) | 0x7c00);
        closed got = close_page(&p, 2, &ki_kernels_get(isa)->plus);
        for (unsigned w = 0; w < p.head_dim / 4; w++)
            CHECK(got.list.data[w] < p.head_dim &&
                      (w == 0 || got.list.data[w] > got.list.data[w - 1]),
                  "list, entry %u", w);
        closed_free(&got);
        uint16_t x[256], scale[16];
        uint8_t codes[256];
        for (unsigned i = 0; i < 256; i++) x[i] = (uint16_t)(rng_u64(&r) | 0x7c00);
        ki_kernels_get(isa)->plus.quantize_values(codes, scale, x, 256, 3, KI_PLUS_VALUE_STEPS);
        for (unsigned i = 0; i < 256; i++) CHECK(codes[i] < 8, "code %u", codes[i]);
        free(p.store);
    }
    check_end();
}

/* ---- what the definition promises ---- */

/* Sum of (x - value)^2 in doubles under a scale and zero. */
static double error_under(const page *p, unsigned c, double scale, double zero, double levels) {
    double sum = 0;
    for (unsigned t = p->n_sinks; t < 128; t++) {
        double x = key_at(p, t, c), q = scale > 0 ? nearbyint((x - zero) / scale) : 0;
        q = q < 0 ? 0 : q > levels ? levels : q;
        double d = x - (q * scale + zero);
        sum += d * d;
    }
    return sum;
}

static void range_of(const page *p, unsigned c, double *min, double *max) {
    *min = INFINITY;
    *max = -INFINITY;
    for (unsigned t = p->n_sinks; t < 128; t++) {
        *min = fmin(*min, key_at(p, t, c));
        *max = fmax(*max, key_at(p, t, c));
    }
}

/* The kernel compares sums of float32; each term and each addition rounds: 128 additions and a few
 * roundings a term, all of numbers that are not negative, make at most 2^-16 of the sum. x - value
 * itself rounds by 2^-24 of |x| + |value|, squared and over 128 tokens. */
static double error_slack(double sum, double min, double max) {
    double largest = fmax(fabs(min), fabs(max)) + (max - min), ulp = 3 * largest * 0x1p-24;
    return sum * 0x1p-15 + 2 * sqrt(128 * sum) * ulp + 128 * ulp * ulp;
}

static void check_channel(const page *p, const closed *k, unsigned c, bool wide) {
    double scale = (double)ki_f16_to_f32(k->keys.scale[c]),
           zero = (double)ki_f16_to_f32(k->keys.zero[c]), min, max, sum = 0;
    range_of(p, c, &min, &max);
    CHECK(k->keys.zero[c] != 0x8000 && k->keys.scale[c] < 0x7c00, "channel %u: -0 or infinite", c);
    for (unsigned t = p->n_sinks; t < 128; t++) {
        double x = key_at(p, t, c),
               d = fabs(x - (ki_plus_key_code(&k->keys, t, c, p->head_dim) * scale + zero));
        /* as quant.h promises; the quotient's two roundings add 2^-23 of at most 15 steps */
        if (wide)
            CHECK(d <= scale * (0.5 + 15 * 0x1p-23), "token %u channel %u: off by %g", t, c, d);
        sum += d * d;
    }
    unsigned first = ki_plus_key_code(&k->keys, p->n_sinks, c, p->head_dim);
    for (unsigned t = 0; t < p->n_sinks; t++)
        CHECK(ki_plus_key_code(&k->keys, t, c, p->head_dim) == first, "sink %u's code", t);
    if (wide) return;
    /* section 2's pair: zero = min exactly, the scale rounded up */
    float plain_scale = ((float)max - (float)min) / 3;
    uint16_t h = ki_f32_to_f16(plain_scale);
    if (ki_f16_to_f32(h) < plain_scale) h++;
    double plain = error_under(p, c, (double)ki_f16_to_f32(h), min, 3);
    CHECK(sum <= plain + error_slack(plain, min, max),
          "channel %u: squared error %g, the plain range's is %g", c, sum, plain);
}

static void keys_promises(void) {
    if (!check_case("plus/keys/promises")) return;
    rng r = check_rng();
    for (int round = 0; round < 60 && !check_failed(); round++) {
        page p = random_page(&r);
        for (unsigned bits = 2; bits <= 4; bits += 2) {
            closed k = close_page(&p, bits, &definition);
            double least_wide = INFINITY, most_narrow = -1;
            for (unsigned c = 0, w = 0; c < p.head_dim; c++) {
                bool wide = bits == 4 || (w < p.head_dim / 4 && k.keys.list[w] == c);
                double min, max;
                range_of(&p, c, &min, &max);
                if (wide) least_wide = fmin(least_wide, (double)((float)max - (float)min)), w++;
                else most_narrow = fmax(most_narrow, (double)((float)max - (float)min));
                check_channel(&p, &k, c, wide);
            }
            CHECK(least_wide >= most_narrow, "a narrow channel has range %g, a wide one %g",
                  most_narrow, least_wide);
            closed_free(&k);
        }
        free(p.store);
    }
    check_end();
}

/* Many equal ranges: the lower indices win. */
static void choose_ties(void) {
    if (!check_case("plus/choose")) return;
    rng r = check_rng();
    for (int round = 0; round < 400 && !check_failed(); round++) {
        unsigned d = 16 * (1 + rng_below(&r, 16)), different = 1 + rng_below(&r, 6);
        float spread[256];
        uint8_t list[64];
        bool taken[256] = {false};
        for (unsigned c = 0; c < d; c++) spread[c] = (float)rng_below(&r, different) * 0.75f;
        ki_plus_choose(list, spread, d);
        for (unsigned w = 0; w < d / 4; w++) { /* the largest not yet taken, the first of equals */
            unsigned best = d;
            for (unsigned c = 0; c < d; c++)
                if (!taken[c] && (best == d || spread[c] > spread[best])) best = c;
            taken[best] = true;
        }
        for (unsigned c = 0, w = 0; c < d; c++)
            if (taken[c]) CHECK(list[w++] == c, "D %u: channel %u is not wide", d, c);
    }
    check_end();
}

/* ---- values ---- */

static void random_row(uint16_t *x, unsigned d, rng *r) {
    unsigned kind = rng_below(r, N_KINDS);
    float constant = rng_normal(r), mean = rng_normal(r) * 1000;
    for (unsigned i = 0; i < d; i++) x[i] = number(kind, constant, mean, r);
    if (rng_below(r, 8) == 0) memset(x, 0, (size_t)d * 2);
}

static void values_isa(ki_isa isa) {
    if (!check_case_isa(isa, "plus/values/as-definition")) return;
    rng r = check_rng();
    for (int round = 0; round < (check_opt.thorough ? 50000 : 3000) && !check_failed(); round++) {
        unsigned d = 16 * (1 + rng_below(&r, 16)), bits = 2 + rng_below(&r, 2),
                 n = d / ki_plus_value_group(d),
                 n_steps = rng_below(&r, 4) ? KI_PLUS_VALUE_STEPS : 1;
        guard x = guard_alloc((size_t)d * 2), codes = dirty(d), scale = dirty((size_t)n * 2);
        uint8_t want[256];
        uint16_t want_scale[16];
        random_row((uint16_t *)x.data, d, &r);
        definition.quantize_values(want, want_scale, (uint16_t *)x.data, d, bits, n_steps);
        ki_kernels_get(isa)->plus.quantize_values(codes.data, (uint16_t *)scale.data,
                                                  (uint16_t *)x.data, d, bits, n_steps);
        CHECK(!memcmp(scale.data, want_scale, (size_t)n * 2), "D %u, %u bits: scales", d, bits);
        CHECK(!memcmp(codes.data, want, d), "D %u, %u bits: codes", d, bits);
        guard_free(&x), guard_free(&codes), guard_free(&scale);
    }
    check_end();
}

/* The stored step is no worse than the plain one (c = 1), with which nothing is off by more than
 * half a step. Tolerances as for keys: sums of 64 float32 terms. */
static void values_promises(void) {
    if (!check_case("plus/values/promises")) return;
    rng r = check_rng();
    for (int round = 0; round < 3000 && !check_failed(); round++) {
        unsigned d = 16 * (1 + rng_below(&r, 16)), bits = 2 + rng_below(&r, 2),
                 group = ki_plus_value_group(d);
        uint16_t x[256], scale[16];
        uint8_t codes[256];
        random_row(x, d, &r);
        definition.quantize_values(codes, scale, x, d, bits, KI_PLUS_VALUE_STEPS);
        for (unsigned g = 0; g < d / group; g++) {
            double half = bits == 2 ? 1.5 : 3.5, stored = 0, plain = 0, max = 0,
                   s = (double)ki_f16_to_f32(scale[g]);
            for (unsigned i = g * group; i < (g + 1) * group; i++)
                max = fmax(max, fabs((double)ki_f16_to_f32(x[i])));
            float want = (float)max / (float)half;
            uint16_t h = ki_f32_to_f16(want);
            if (ki_f16_to_f32(h) < want) h++;
            double s1 = (double)ki_f16_to_f32(h);
            for (unsigned i = g * group; i < (g + 1) * group; i++) {
                double v = (double)ki_f16_to_f32(x[i]), q = s1 > 0 ? nearbyint(v / s1 + half) : 0;
                double a = v - ((double)codes[i] - half) * s, b = v - (q - half) * s1;
                CHECK(codes[i] < 1u << bits, "code %u", codes[i]);
                CHECK(fabs(b) <= s1 * 0.500001, "the plain step misses by more than its half");
                stored += a * a;
                plain += b * b;
            }
            CHECK(stored <= plain + error_slack(plain, -max, max), "D %u: %g, plain %g", d, stored,
                  plain);
        }
    }
    check_end();
}

static void values_planes(unsigned d) {
    if (!check_case("plus/values/planes-d%u", d)) return;
    rng r = check_rng();
    static uint8_t plain[128 * 256];
    guard low = dirty((size_t)128 * d / 4), third = dirty((size_t)128 * d / 8);
    uint32_t *l = (uint32_t *)low.data, *h = (uint32_t *)third.data;
    for (int pass = 0; pass < 2; pass++) /* twice, in another order: neighbours stay */
        for (unsigned i = 0; i < 128; i++) {
            unsigned t = pass ? i * 37 % 128 : i;
            for (unsigned c = 0; c < d; c++) plain[t * d + c] = (uint8_t)rng_below(&r, 8);
            ki_plus_pack_values(l, h, plain + (size_t)t * d, t, d);
        }
    for (unsigned t = 0; t < 128; t++)
        for (unsigned c = 0; c < d; c++) {
            unsigned want = plain[t * d + c];
            CHECK(ki_plus_value_code(l, h, t, d, c) == want, "token %u channel %u", t, c);
            /* as plus.h unpacks: quad k of row r, the byte of token t % 4 */
            unsigned row = t / 16, k = t % 16 / 4;
            uint32_t bytes = (l[row * d + c] >> 2 * k & 0x03030303) |
                             (h[t / 32 * d + c] >> (4 * (row % 2) + k) & 0x01010101) << 2;
            CHECK((bytes >> 8 * (t % 4) & 0xff) == want, "bytes, token %u channel %u", t, c);
        }
    guard_free(&low), guard_free(&third);
    check_end();
}

/* ---- turning ---- */

/* A stage's additions each round by at most u = 2^-24 of their result and the stage keeps the
 * 2-norm (up to its factor), so log2 B stages and the product with a rounded factor are off by
 * (log2 B + 2) u of the row's norm, and there and back by twice that; higher orders are covered by
 * the 1.01. */
static double turn_tolerance(const float *x, unsigned d, int times) {
    double norm = 0;
    for (unsigned i = 0; i < d; i++) norm += (double)x[i] * (double)x[i];
    return 1.01 * times * (log2(ki_plus_block(d)) + 2) * 0x1p-24 * sqrt(norm);
}

/* Entry (i, j) of the matrix: zero outside the block, the sign by the parity of i & j. */
static double entry(unsigned i, unsigned j, unsigned block) {
    if (i / block != j / block) return 0;
    return (__builtin_popcount(i & j & (block - 1)) % 2 ? -1 : 1) / sqrt(block);
}

static void turn_rows(ki_isa isa) {
    if (!check_case_isa(isa, "plus/turn")) return;
    rng r = check_rng();
    for (int round = 0; round < 200 && !check_failed(); round++) {
        unsigned d = 16 * (1 + rng_below(&r, 16));
        guard row = guard_alloc((size_t)d * 4);
        float x[256] = {0}, want[256], *y = (float *)row.data;
        for (unsigned i = 0; i < d; i++) x[i] = rng_normal(&r) * (rng_below(&r, 9) ? 1.0f : 1e3f);
        memcpy(y, x, (size_t)d * 4);
        memcpy(want, x, (size_t)d * 4);
        ki_kernels_get(isa)->plus.turn(y, d);
        ki_plus_turn_scalar(want, d);
        CHECK(!memcmp(y, want, (size_t)d * 4), "D %u: not the definition's bytes", d);
        for (unsigned i = 0; i < d; i++) {
            double sum = 0;
            for (unsigned j = 0; j < d; j++) sum += entry(i, j, ki_plus_block(d)) * (double)x[j];
            CHECK(fabs(sum - (double)y[i]) <= turn_tolerance(x, d, 1), "D %u, element %u", d, i);
        }
        ki_kernels_get(isa)->plus.turn(y, d);
        for (unsigned i = 0; i < d; i++)
            CHECK(fabs((double)y[i] - (double)x[i]) <= turn_tolerance(x, d, 2),
                  "D %u, element %u: there and back gives %g for %g", d, i, (double)y[i],
                  (double)x[i]);
        guard_free(&row);
    }
    check_end();
}

void check_plus(void) {
    golden_cases();
    choose_ties();
    keys_promises();
    values_promises();
    static const unsigned dims[] = {16, 64, 80, 96, 128, 256};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) values_planes(dims[i]);
    for (int i = 0; i < KI_ISA_COUNT; i++) {
        keys_isa((ki_isa)i, false);
        keys_isa((ki_isa)i, true);
        keys_not_finite((ki_isa)i);
        values_isa((ki_isa)i);
        turn_rows((ki_isa)i);
    }
}
