/* --digest: one number for the bytes of each kernel over a fixed random run and each instruction
 * set, as `digest NAME ISA NUMBER`. Nothing is compared here: tests/aarch64.py asks programs of two
 * architectures, whose every number must be the same. Inputs are finite and come from integers, no
 * library function, so that they are alike everywhere. */
#include "world.h"

static rng digest_rng(const char *name) {
    uint64_t h = 1;
    for (const char *p = name; *p; p++) h = hash_u64(h, (uint64_t)(unsigned char)*p);
    return rng_make(h);
}

static void print_digest(const char *name, ki_isa isa, uint64_t hash) {
    if (strncmp(name, check_opt.prefix, strlen(check_opt.prefix)) != 0) return;
    printf("digest %s %s %016llx\n", name, ki_isa_names[isa], (unsigned long long)hash);
    fflush(stdout);
}

/* Any finite float16: half of them of all exponents down to subnormals, half near 1. */
static uint16_t any_f16(rng *r) {
    uint16_t h = (uint16_t)rng_u64(r);
    return (h & 0x7c00) == 0x7c00 || (h & 1) ? ki_f32_to_f16(rng_normal(r)) : h;
}

static float any_f32(rng *r) {
    uint32_t bits = (uint32_t)rng_u64(r);
    if ((bits & 0x7f800000) == 0x7f800000) return rng_normal(r);
    switch (rng_below(r, 3)) {
    case 0: return ki_f32_from_bits(bits);
    case 1: /* from a quarter of the smallest float16 to beyond the largest */
        return ki_f32_from_bits((bits & 0x807fffff) | (100 + rng_below(r, 45)) << 23);
    default: return ki_f16_to_f32(any_f16(r));
    }
}

static void digest_quant(ki_isa isa) {
    enum { GROUPS = 64, MAX = GROUPS * 128 };
    static uint16_t x[MAX], scale[GROUPS], zero[GROUPS];
    static uint8_t codes[MAX];
    const ki_quant_kernels *k = &ki_kernels_get(isa)->quant;
    for (unsigned bits = 2; bits <= 8; bits *= 2)
        for (unsigned group = 16; group <= 128; group *= 2) {
            char name[64];
            snprintf(name, sizeof name, "quantize/b%u-g%u", bits, group);
            rng r = digest_rng(name);
            for (size_t i = 0; i < GROUPS * group; i++) {
                uint16_t h = any_f16(&r);
                /* every fourth group is subnormal, every fourth near 1 */
                x[i] = i / group % 4 == 1   ? h & 0x83ff
                       : i / group % 4 == 2 ? ki_f32_to_f16(rng_normal(&r))
                                            : h;
            }
            k->quantize(codes, scale, zero, x, GROUPS, group, bits);
            uint64_t h = world_hash(codes, GROUPS * group);
            h = hash_u64(h, world_hash(scale, sizeof scale));
            print_digest(name, isa, hash_u64(h, world_hash(zero, sizeof zero)));
        }
    static float f[4096];
    static uint16_t out[4096];
    rng r = digest_rng("to-f16");
    for (size_t i = 0; i < 4096; i++) f[i] = any_f32(&r);
    uint64_t n_saturated = 0;
    uint64_t h = 0;
    for (size_t i = 0; i < 4096; i += 16) {
        k->to_f16(out + i, &n_saturated, f + i, 16);
        h = hash_u64(h, world_hash(out + i, 32));
    }
    print_digest("to-f16", isa, hash_u64(h, n_saturated));
}

/* A page closed with 2 and 4 bits, rows turned and quantized with 2 and 3. */
static void digest_plus(ki_isa isa, uint32_t d) {
    enum { ROWS = 16, MAX = 256 };
    static uint16_t x[128 * MAX], scale[MAX], zero[MAX];
    static uint32_t low[16 * MAX], wide[2 * MAX];
    static uint8_t list[MAX / 4], codes[MAX];
    const ki_plus_kernels *k = &ki_kernels_get(isa)->plus;
    const uint16_t *blocks[8];
    char name[64];
    snprintf(name, sizeof name, "plus/d%u", d);
    rng r = digest_rng(name);
    uint64_t h = 0;
    for (size_t i = 0; i < (size_t)128 * d; i++) x[i] = any_f16(&r);
    for (uint32_t b = 0; b < 8; b++) blocks[b] = x + (size_t)b * 16 * d;
    for (unsigned bits = 2; bits <= 4; bits += 2) {
        ki_plus_keys keys = {.bits = bits,
                             .low = low,
                             .wide = bits == 2 ? wide : NULL,
                             .list = bits == 2 ? list : NULL,
                             .scale = scale,
                             .zero = zero};
        k->close_keys(&keys, blocks, 4, d, KI_PLUS_KEY_STEPS);
        h = hash_u64(h, world_hash(low, (size_t)16 * d * bits));
        if (bits == 2) h = hash_u64(h, world_hash(wide, (size_t)8 * d));
        for (uint32_t w = 0; w < d / 4; w++) h = hash_u64(h, list[w]);
        h = hash_u64(h, world_hash(scale, (size_t)d * 2));
        h = hash_u64(h, world_hash(zero, (size_t)d * 2));
    }
    for (uint32_t i = 0; i < ROWS; i++) {
        float row[MAX];
        for (uint32_t c = 0; c < d; c++) row[c] = rng_normal(&r) * (i % 3 ? 1.0f : 1000.0f);
        k->turn(row, d);
        h = hash_u64(h, world_hash(row, (size_t)d * 4));
        k->quantize_values(codes, scale, x + (size_t)i * d, d, 2 + i % 2, KI_PLUS_VALUE_STEPS);
        h = hash_u64(h, world_hash(codes, d));
        for (uint32_t g = 0; g < d / ki_plus_value_group(d); g++) h = hash_u64(h, scale[g]);
    }
    print_digest(name, isa, h);
}

/* Tiles of random bytes. Without the bits 0x40 no number in them, of whatever format, has all
 * exponent bits set: nothing is infinite, and every type, also one added later, is covered. */
static void digest_matmul(ki_isa isa, ki_weight type) {
    enum { ROWS = 48, COLS = 512, N = 7 };
    static float x[N * COLS], out[N * ROWS], scales[N * COLS / 32];
    static int8_t high[N * COLS], low[N * COLS];
    static int32_t sums[N * COLS / KI_SUM_COLS];
    static float offsets[N * COLS / 32];
    static int16_t pairs[N * COLS];
    const ki_dense_kernels *k = &ki_kernels_get(isa)->dense;
    char name[64];
    snprintf(name, sizeof name, "matmul/type%d", (int)type);
    rng r = digest_rng(name);
    ki_matrix m = {.type = type, .n_rows = ROWS, .n_cols = COLS};
    size_t n_bytes = 0;
    if (!ki_matrix_bytes(&n_bytes, type, ROWS, COLS)) return;
    m.tiles = check_alloc(n_bytes);
    for (size_t i = 0; i < n_bytes; i++) m.tiles[i] = (uint8_t)(rng_u64(&r) & 0xbf);
    for (size_t i = 0; i < N * COLS; i++) x[i] = rng_normal(&r) * (i % 97 == 5 ? 30.0f : 1.0f);
    ki_activations a = {.n_cols = COLS,
                        .x = x,
                        .high = high,
                        .low = low,
                        .scales = scales,
                        .sums = sums,
                        .offsets = offsets,
                        .pairs = pairs};
    for (size_t i = 0; i < N; i++) k->quantize_row(&a, i);
    k->matmul(out, ROWS, &m, 0, ROWS / 16, &a, N);
    uint64_t h = world_hash(out, sizeof out);
    h = hash_u64(h, world_hash(high, sizeof high));
    h = hash_u64(h, world_hash(low, sizeof low));
    h = hash_u64(h, world_hash(scales, sizeof scales));
    print_digest(name, isa, hash_u64(h, world_hash(sums, sizeof sums)));
    free(m.tiles);
}

static void digest_steps(ki_isa isa) {
    enum { N = 1024 };
    static float x[N], y[N], z[N], out[N];
    const ki_dense_kernels *k = &ki_kernels_get(isa)->dense;
    rng r = digest_rng("steps");
    for (size_t i = 0; i < N; i++) {
        x[i] = rng_normal(&r) * (i % 3 ? 1.0f : 12.0f);
        y[i] = rng_normal(&r);
        z[i] = rng_normal(&r);
    }
    x[0] = -200, x[1] = 200, x[2] = 0, x[3] = -0.0f, x[4] = -88, x[5] = 1e-40f;
#define STEP(name, call) (call, print_digest(name, isa, world_hash(out, sizeof out)))
    STEP("exp", k->exp(out, x, N));
    STEP("rms-norm", k->rms_norm(out, x, y, N, 1e-5f));
    STEP("layer-norm", k->layer_norm(out, x, y, z, N, 1e-5f));
    STEP("silu-mul", k->silu_mul(out, x, y, N));
    STEP("gelu-mul", k->gelu_mul(out, x, y, N));
    STEP("gelu", k->gelu(out, x, N));
    STEP("scale", k->scale(out, x, 0.3f, N));
    STEP("add", k->add(out, y, N));
    STEP("rope", k->rope(out, y, z, 80));
#undef STEP
}

/* Prompts, single rows and their attention over packed pages, window and sinks; then the pages. */
static void digest_cache(ki_isa isa, uint32_t head_dim, const kivi_kv_options *kv) {
    enum { N = 219 };
    static uint32_t tokens[N];
    char name[96];
    snprintf(name, sizeof name, "cache/d%u-b%u.%u%s-g%u-r%u-s%u-%s", head_dim, kv->k_bits,
             kv->v_bits, kv->plus ? "+" : "", kv->group, kv->residual_tokens, kv->sink_tokens,
             world_rule_name(kv));
    world w = world_small();
    w.isa = isa;
    w.geometry.head_dim = head_dim;
    w.geometry.n_layers = 1;
    w.geometry.kv = *kv;
    for (uint32_t i = 0; i < N; i++) tokens[i] = i * 7919 % 1000;
    kivi_cache *cache = NULL;
    kivi_seq *seq = NULL;
    uint64_t h = 0;
    if (world_create(&cache, &w, NULL) || kivi_seq_create(&seq, cache, NULL)) {
        printf("not ok %s: no cache\n", name);
        return;
    }
    float *out = check_alloc(world_out_floats(&cache->layout, N) * 4);
    static const uint32_t steps[] = {150, 1, 1, 1, 40, 1, 25};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        if (steps[i] > 1) kivi_seq_begin_prompt(seq, steps[i], NULL);
        if (world_step(seq, tokens, steps[i], out, NULL)) printf("not ok %s: step\n", name);
        h = hash_u64(h, world_hash(out, world_out_floats(&cache->layout, steps[i]) * 4));
    }
    for (uint32_t i = 0; i < seq->n_pages; i++)
        h = hash_u64(h, world_hash(cache->pool.data + seq->pages[i] * cache->pool.id_bytes,
                                   cache->pool.id_bytes));
    print_digest(name, isa, h);
    free(out);
    kivi_seq_destroy(&seq);
    kivi_cache_destroy(&cache);
}

static void digest_caches(ki_isa isa) {
    static const uint32_t dims[] = {32, 64, 80, 96, 128, 256};
    static const uint32_t bits[][2] = {{2, 2}, {4, 2}, {2, 4}, {8, 8}, {16, 16}, {16, 2}, {2, 16}};
    static const uint32_t plus[][2] = {{2, 2}, {4, 2}, {4, 3}, {2, 3}};
    for (uint32_t i = 0; i < 6; i++)
        for (uint32_t b = 0; b < 4; b++) {
            kivi_kv_options kv = {.k_bits = plus[b][0],
                                  .v_bits = plus[b][1],
                                  .plus = KIVI_PLUS_ALL,
                                  .residual_tokens = 128,
                                  .sink_tokens = (i + b) % 3 ? 4 : 20,
                                  .rule = (i + b) % 2 ? KIVI_RULE_STREAM : KIVI_RULE_PAPER};
            digest_cache(isa, dims[i], &kv);
        }
    for (uint32_t i = 0; i < 6; i++)
        for (uint32_t b = 0; b < 7; b++) {
            uint32_t turn = i + b;
            kivi_kv_options kv = {.k_bits = bits[b][0],
                                  .v_bits = bits[b][1],
                                  .group = dims[i] % 32 || turn % 2 ? 16 : 32,
                                  .residual_tokens = turn % 3 ? 32 : 128,
                                  .sink_tokens = turn % 4 == 3 ? 32 : 0,
                                  .rule = turn % 2 ? KIVI_RULE_STREAM : KIVI_RULE_PAPER};
            digest_cache(isa, dims[i], &kv);
        }
}

void check_digest(void) {
    for (int i = 0; i < KI_ISA_COUNT; i++) {
        ki_isa isa = (ki_isa)i;
        if (!ki_isa_available(isa) || (check_opt.isa && strcmp(check_opt.isa, ki_isa_names[i])))
            continue;
        digest_quant(isa);
        static const uint32_t dims[] = {16, 64, 80, 96, 128, 256};
        for (int d = 0; d < 6; d++) digest_plus(isa, dims[d]);
        for (int t = 0; t < KI_WEIGHT_COUNT; t++) digest_matmul(isa, (ki_weight)t);
        digest_steps(isa);
        digest_caches(isa);
    }
}
