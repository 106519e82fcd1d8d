/* Conversions, checked sizes, the counting allocator. */
#include "check.h"

/* ---- float16, against doubles ---- */

/* The value of 16 bits from the format's definition. */
static double slow_f16_value(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double v = exponent == 0    ? ldexp(mantissa, -24)
               : exponent == 31 ? (mantissa ? (double)NAN : (double)INFINITY)
                                : ldexp(1024 + mantissa, exponent - 25);
    return h & 0x8000 ? -v : v;
}

/* Nearest float16 by search: the positive patterns are in the order of their values, 0x7c00
 * standing for 65536. */
static uint16_t slow_f32_to_f16(float x) {
    double a = fabs((double)x);
    uint16_t sign = signbit(x) ? 0x8000 : 0, low = 0, high = 0x7c00;
    if (a >= 65536) return sign | 0x7c00;
    while (high - low > 1) {
        uint16_t mid = (uint16_t)((low + high) / 2);
        if (slow_f16_value(mid) <= a) low = mid;
        else high = mid;
    }
    double below = a - slow_f16_value(low);
    double above = (high == 0x7c00 ? 65536.0 : slow_f16_value(high)) - a;
    if (below == above) return sign | (low & 1 ? high : low);
    return sign | (below < above ? low : high);
}

static void f16_patterns(void) {
    if (!check_case("base/f16/all-patterns")) return;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = ki_f16_to_f32((uint16_t)h);
        double want = slow_f16_value((uint16_t)h);
        bool nan = (h & 0x7c00) == 0x7c00 && (h & 0x3ff);
        CHECK(nan ? isnan(x) : (double)x == want && (signbit(x) != 0) == (h >> 15 != 0),
              "%04x gives %a", h, (double)x);
        uint16_t back = ki_f32_to_f16(x);
        CHECK(nan ? (back & 0x7c00) == 0x7c00 && (back & 0x3ff) : back == h,
              "%04x comes back as %04x", h, back);
    }
    check_end();
}

static float random_f32(rng *r) {
    uint64_t u = rng_u64(r);
    uint32_t sign = (uint32_t)u & 0x80000000u, mantissa = (uint32_t)(u >> 32) & 0x7fffff;
    switch (rng_below(r, 4)) {
    case 0:
        return ki_f32_from_bits(sign | (100 + rng_below(r, 20)) << 23 |
                                mantissa); /* subnormal f16 */
    case 1:
        return ki_f32_from_bits(sign | (108 + rng_below(r, 36)) << 23 |
                                mantissa); /* normal, overflow */
    case 2: {                              /* a tie or its neighbour: the middle of two float16 */
        uint16_t h = (uint16_t)rng_below(r, 0x7c00);
        double high = h + 1 == 0x7c00 ? 65536 : slow_f16_value((uint16_t)(h + 1));
        float middle = (float)((slow_f16_value(h) + high) / 2);
        uint32_t bits = ki_f32_bits(middle) + rng_below(r, 3) - 1;
        return ki_f32_from_bits(sign | (h == 0 && bits > 0x7f000000 ? 0 : bits));
    }
    default: { /* any finite pattern */
        float x = ki_f32_from_bits((uint32_t)(u >> 16));
        return isfinite(x) ? x : 1.0f;
    }
    }
}

static void f16_random(void) {
    if (!check_case("base/f16/random")) return;
    rng r = check_rng();
    for (int i = 0; i < 1000000; i++) {
        float x = random_f32(&r);
        uint16_t got = ki_f32_to_f16(x), want = slow_f32_to_f16(x);
        CHECK(got == want, "%a gives %04x, expected %04x", (double)x, got, want);
    }
    static const float special[] = {0.0f,     -0.0f,        65504,           65519.996f,
                                    65520,    65535,        65536,           1e38f,
                                    0x1p-24f, 0x1p-25f,     0x1.000002p-25f, 0x1.8p-24f,
                                    0x1p-14f, 0x1.ffcp-15f, 0x1.ffep-15f,    0x1p-149f};
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        CHECK(ki_f32_to_f16(special[i]) == slow_f32_to_f16(special[i]), "%a", (double)special[i]);
    CHECK(ki_f32_to_f16(INFINITY) == 0x7c00 && ki_f32_to_f16(-INFINITY) == 0xfc00, "infinity");
    CHECK(ki_f32_to_f16(65519.996f) == 0x7bff && ki_f32_to_f16(65520) == 0x7c00, "overflow's edge");
    for (uint32_t h = 0; h < 65536; h += 7) {
        float x = ki_bf16_to_f32((uint16_t)h);
        CHECK(ki_f32_bits(x) == h << 16, "bf16 %04x", h);
    }
    check_end();
}

/* ---- checked sizes, against 128-bit arithmetic ---- */

static size_t random_size(rng *r) {
    uint64_t u = rng_u64(r) >> rng_below(r, 64);
    switch (rng_below(r, 8)) {
    case 0: return SIZE_MAX - (size_t)(u & 255);
    case 1: return (size_t)(u & 255);
    default: return (size_t)u;
    }
}

static void sizes(void) {
    if (!check_case("base/sizes")) return;
    rng r = check_rng();
    for (int i = 0; i < 1000000; i++) {
        size_t a = random_size(&r), b = random_size(&r), out = 0;
        unsigned __int128 wide = (unsigned __int128)a * b;
        bool fits = ki_mul(&out, a, b);
        CHECK(fits == (wide <= SIZE_MAX) && (!fits || out == (size_t)wide), "%zu * %zu", a, b);
        wide = (unsigned __int128)a + b;
        fits = ki_add(&out, a, b);
        CHECK(fits == (wide <= SIZE_MAX) && (!fits || out == (size_t)wide), "%zu + %zu", a, b);
        if (!b) continue;
        wide = ((unsigned __int128)a + b - 1) / b * b;
        fits = ki_round_up(&out, a, b);
        CHECK(fits == (wide <= SIZE_MAX) && (!fits || out == (size_t)wide), "%zu up to %zu", a, b);
    }
    check_end();
}

/* ---- the allocator ---- */

static void allocator(void) {
    if (!check_case("base/alloc")) return;
    ki_mem mem;
    ki_mem_init(&mem);
    void *blocks[200];
    size_t total = 0;
    rng r = check_rng();
    for (size_t i = 0; i < 200; i++) {
        size_t n = i % 50 == 49 ? 300000 + rng_below(&r, 100000) : rng_below(&r, 5000);
        if (i == 0) n = 0;
        CHECK_OK(ki_alloc(&blocks[i], &mem, (ki_tag)(i % KI_TAG_COUNT), n, err));
        CHECK((uintptr_t)blocks[i] % 64 == 0, "block %zu is not aligned", i);
        const uint8_t *p = blocks[i];
        unsigned any = 0;
        for (size_t j = 0; j < n; j++) any |= p[j];
        volatile uint8_t slack = 0;
        for (size_t j = n; j < n + 64; j++) slack = (uint8_t)(slack + p[j]); /* readable */
        CHECK(!any, "block %zu is not zeroed", i);
        memset(blocks[i], 0xff, n);
        total += n;
    }
    uint64_t counted = 0;
    for (int t = 0; t < KI_TAG_COUNT; t++) counted += atomic_load(&mem.bytes[t]);
    CHECK(counted == total && atomic_load(&mem.n_blocks) == 200, "%zu bytes counted as %llu", total,
          (unsigned long long)counted);
    for (size_t i = 0; i < 200; i++) ki_free(&mem, blocks[i]);
    ki_free(&mem, NULL);
    for (int t = 0; t < KI_TAG_COUNT; t++)
        CHECK(atomic_load(&mem.bytes[t]) == 0, "tag %s", ki_tag_names[t]);
    CHECK(atomic_load(&mem.n_blocks) == 0, "blocks left");
    void *p = &r;
    kivi_error err = {0};
    CHECK(ki_alloc_array(&p, &mem, KI_TAG_other, SIZE_MAX / 2, 3, &err) == KIVI_NOMEM && !p,
          "overflowing array");
    CHECK(ki_alloc(&p, &mem, KI_TAG_other, SIZE_MAX - 10, &err) == KIVI_NOMEM && !p,
          "overflowing block");
    CHECK(err.status == KIVI_NOMEM && err.text[0], "error not filled");
    CHECK(ki_alloc(&p, &mem, KI_TAG_other, SIZE_MAX / 4, NULL) == KIVI_NOMEM,
          "huge block without an error");
    check_end();
}

static void alloc_countdown(void) {
    if (!check_case("base/alloc-countdown")) return;
    for (int64_t n = 0; n < 5; n++) {
        ki_mem mem;
        ki_mem_init(&mem);
        atomic_store(&mem.fail_countdown, n);
        int64_t fails_at = n == 0 ? 1 : n;
        for (int64_t i = 1; i < 8; i++) {
            void *p = NULL;
            kivi_status status = ki_alloc(&p, &mem, KI_TAG_other, 10, NULL);
            CHECK((status == KIVI_OK) == (i < fails_at), "countdown %d, allocation %d", (int)n,
                  (int)i);
            ki_free(&mem, p);
        }
        CHECK(atomic_load(&mem.n_blocks) == 0 && atomic_load(&mem.bytes[KI_TAG_other]) == 0,
              "leak");
    }
    check_end();
}

static void buffers(void) {
    if (!check_case("base/buffer")) return;
    ki_mem mem;
    ki_mem_init(&mem);
    ki_buf buf;
    ki_buf_init(&buf, &mem, 1000);
    uint8_t bytes[100];
    for (int round = 0; round < 10; round++) {
        memset(bytes, round, sizeof bytes);
        CHECK_OK(ki_buf_append(&buf, bytes, sizeof bytes, err));
    }
    kivi_error full = {0};
    CHECK(ki_buf_append(&buf, bytes, 1, &full) == KIVI_NOMEM && buf.n_bytes == 1000,
          "went past its maximum");
    CHECK(ki_buf_append(&buf, bytes, SIZE_MAX, &full) == KIVI_NOMEM && buf.n_bytes == 1000,
          "overflow");
    CHECK(ki_buf_append(&buf, NULL, 0, &full) == KIVI_OK, "nothing to append");
    for (size_t i = 0; i < 1000; i++) CHECK(buf.data[i] == i / 100, "byte %zu", i);
    ki_buf_deinit(&buf);
    ki_buf_deinit(&buf);
    ki_buf_init(&buf, &mem, SIZE_MAX);
    atomic_store(&mem.fail_countdown, 2);
    CHECK_OK(ki_buf_append(&buf, bytes, 100, err));
    static uint8_t many[1000];
    CHECK(ki_buf_append(&buf, many, sizeof many, &full) == KIVI_NOMEM && buf.n_bytes == 100,
          "failing growth");
    CHECK(buf.data && buf.data[99] == 9, "contents lost");
    ki_buf_deinit(&buf);
    CHECK(atomic_load(&mem.n_blocks) == 0, "leak");
    check_end();
}

static void errors(void) {
    if (!check_case("base/errors")) return;
    kivi_error err = {0};
    char longer[600];
    memset(longer, 'a', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    CHECK(KI_FAIL(&err, IO, "%s", longer) == KIVI_IO && err.status == KIVI_IO, "status");
    CHECK(strlen(err.text) == sizeof err.text - 1, "text is not cut to its place");
    CHECK(KI_FAIL(NULL, ARG, "x") == KIVI_ARG, "without an error");
    CHECK(!strcmp(kivi_status_name(KIVI_FULL), "FULL") && kivi_status_text(KIVI_FULL)[0], "names");
    CHECK(kivi_status_name((kivi_status)99) && kivi_status_text((kivi_status)-1), "unknown status");
    check_end();
}

void check_base(void) {
    f16_patterns();
    f16_random();
    sizes();
    allocator();
    alloc_countdown();
    buffers();
    errors();
}
