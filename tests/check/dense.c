/* Matrix products against doubles, and the small steps between them; every instruction set gives
 * the bytes of scalar. */
#include "check.h"

static const char *const weight_names[KI_WEIGHT_COUNT] = {"f32",  "f16",  "bf16", "q4_0", "q4_1",
                                                          "q5_0", "q5_1", "q8_0", "q2_k", "q3_k",
                                                          "q4_k", "q5_k", "q6_k"};

/* Columns and bytes of a block in the file; then where its f16 numbers stand, d and another. */
static const struct block {
    uint32_t cols;
    size_t bytes, d, m;
    double packed_bits; /* a column, in memory */
} blocks[KI_WEIGHT_COUNT] = {
    {1, 4, 0, 0, 32},           {1, 2, 0, 0, 16},        {1, 2, 0, 0, 16},
    {32, 18, 0, 0, 4.5},        {32, 20, 0, 2, 5},       {32, 22, 0, 0, 5.5},
    {32, 24, 0, 2, 6},          {32, 34, 0, 0, 8.5},     {256, 84, 80, 82, 2.625},
    {256, 110, 108, 0, 3.5625}, {256, 144, 0, 2, 4.625}, {256, 176, 0, 2, 5.625},
    {256, 210, 208, 0, 6.5625}};

static uint32_t whole_blocks(ki_weight type, uint32_t n_cols) {
    uint32_t cols = blocks[type].cols;
    return (n_cols + cols - 1) / cols * cols;
}

static size_t file_row_bytes(ki_weight type, uint32_t n_cols) {
    return n_cols / blocks[type].cols * blocks[type].bytes;
}

static uint16_t get_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

/* n bits of a little-endian string of bits, from bit `at` on. */
static int bits(const uint8_t *p, unsigned at, unsigned n) {
    return (p[at / 8] | (at % 8 + n > 8 ? p[at / 8 + 1] << 8 : 0)) >> at % 8 & ((1 << n) - 1);
}

/* Column i of a block of 256 as the format defines it: its code, and the scale and minimum. */
typedef struct k_value {
    int code, scale, min;
} k_value;

/* Two bits: 128 columns in 32 bytes; the quarters of the 128 are the bit pairs of a byte. */
static int two_bits(const uint8_t *p, unsigned i) {
    return bits(p + i / 128 * 32 + i % 32, i / 32 % 4 * 2, 2);
}

static k_value k_value_of(const uint8_t *b, ki_weight type, unsigned i) {
    if (type == KI_WEIGHT_Q2_K)
        return (k_value){two_bits(b + 16, i), bits(b, i / 16 * 8, 4), bits(b, i / 16 * 8 + 4, 4)};
    if (type == KI_WEIGHT_Q3_K) {
        unsigned s = i / 16;
        int low = bits(b + 96 + s % 8, s / 8 * 4, 4), high = bits(b + 104 + s % 4, s / 4 * 2, 2);
        int third = bits(b + i % 32, i / 32, 1);
        return (k_value){two_bits(b + 32, i) - (third ? 0 : 4), low + 16 * high - 32, 0};
    }
    if (type == KI_WEIGHT_Q6_K) {
        int low = bits(b + i / 128 * 64 + i % 64, i / 64 % 2 * 4, 4);
        return (k_value){low + 16 * two_bits(b + 128, i) - 32, (int8_t)b[192 + i / 16], 0};
    }
    const uint8_t *s = b + 4;
    unsigned k = i / 32, j = k % 4;
    k_value v = {0, bits(s + j, 0, 6), bits(s + 4 + j, 0, 6)};
    if (k >= 4) {
        v.scale = bits(s + 8 + j, 0, 4) + 16 * bits(s + j, 6, 2);
        v.min = bits(s + 8 + j, 4, 4) + 16 * bits(s + 4 + j, 6, 2);
    }
    const uint8_t *codes = b + (type == KI_WEIGHT_Q5_K ? 48 : 16);
    v.code = bits(codes + i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4);
    if (type == KI_WEIGHT_Q5_K) v.code += 16 * bits(b + 16 + i % 32, k, 1);
    return v;
}

/* Element c of a row as the file format defines it, and the part of it that is the minimum. */
static double file_value(double *min, const uint8_t *row, ki_weight type, uint32_t c) {
    float f;
    *min = 0;
    if (type == KI_WEIGHT_F32) return memcpy(&f, row + (size_t)c * 4, 4), (double)f;
    if (type == KI_WEIGHT_F16) return (double)ki_f16_to_f32(get_u16(row + (size_t)c * 2));
    if (type == KI_WEIGHT_BF16) return (double)ki_bf16_to_f32(get_u16(row + (size_t)c * 2));
    const uint8_t *b = row + c / blocks[type].cols * blocks[type].bytes;
    double d = (double)ki_f16_to_f32(get_u16(b + blocks[type].d));
    double m = blocks[type].m ? (double)ki_f16_to_f32(get_u16(b + blocks[type].m)) : 0;
    unsigned i = c % blocks[type].cols;
    if (type >= KI_WEIGHT_Q2_K) {
        k_value v = k_value_of(b, type, i);
        *min = -m * v.min;
        return d * v.scale * v.code + *min;
    }
    if (type == KI_WEIGHT_Q8_0) return d * (int8_t)b[2 + i];
    b += blocks[type].m ? 4 : 2;
    *min = m;
    if (type == KI_WEIGHT_Q4_0 || type == KI_WEIGHT_Q4_1)
        return d * (bits(b + i % 16, i / 16 * 4, 4) - (type == KI_WEIGHT_Q4_0 ? 8 : 0)) + m;
    int code = bits(b + 4 + i % 16, i / 16 * 4, 4) + 16 * bits(b, i, 1);
    return d * (code - (type == KI_WEIGHT_Q5_0 ? 16 : 0)) + m;
}

static void random_row(uint8_t *row, ki_weight type, uint32_t n_cols, rng *r) {
    size_t n = file_row_bytes(type, n_cols);
    for (uint32_t c = 0; c < n_cols && type < KI_WEIGHT_Q4_0; c++) {
        float x = rng_normal(r);
        uint16_t h = type == KI_WEIGHT_F16 ? ki_f32_to_f16(x) : (uint16_t)(ki_f32_bits(x) >> 16);
        if (type == KI_WEIGHT_F32) memcpy(row + (size_t)c * 4, &x, 4);
        else memcpy(row + (size_t)c * 2, &h, 2);
    }
    if (type < KI_WEIGHT_Q4_0) return;
    for (size_t i = 0; i < n; i++) row[i] = (uint8_t)rng_u64(r);
    for (size_t b = 0; b < n; b += blocks[type].bytes) {
        uint16_t d = ki_f32_to_f16(rng_normal(r) * 0.1f), m = ki_f32_to_f16(rng_normal(r));
        memcpy(row + b + blocks[type].d, &d, 2);
        if (blocks[type].m) memcpy(row + b + blocks[type].m, &m, 2);
    }
}

typedef struct product {
    ki_matrix matrix;
    uint8_t *file; /* [n_rows] file rows */
    size_t row_bytes;
    ki_activations a;
    size_t n; /* activation rows */
    float *x;
} product;

static void product_init(product *p, ki_weight type, uint32_t n_rows, uint32_t n_cols, size_t n,
                         rng *r) {
    size_t n_bytes = 0;
    *p = (product){.matrix = {.type = type, .n_rows = n_rows, .n_cols = n_cols}, .n = n};
    p->row_bytes = file_row_bytes(type, n_cols);
    p->file = check_alloc(p->row_bytes * n_rows);
    for (uint32_t i = 0; i < n_rows; i++) random_row(p->file + i * p->row_bytes, type, n_cols, r);
    CHECK(ki_matrix_bytes(&n_bytes, type, n_rows, n_cols) &&
              (double)n_bytes == (n_rows + 15) / 16 * 16 * n_cols * blocks[type].packed_bits / 8,
          "%zu bytes for %u rows of %u", n_bytes, n_rows, n_cols);
    p->matrix.tiles = check_alloc(n_bytes);
    uint32_t n_tiles = (n_rows + 15) / 16, half = n_tiles / 2;
    ki_matrix_pack(&p->matrix, p->file, half, n_tiles); /* in parts, as worker threads do */
    ki_matrix_pack(&p->matrix, p->file, 0, half);
    p->x = check_alloc(n * n_cols * 4);
    for (size_t i = 0; i < n * n_cols; i++) p->x[i] = rng_normal(r) * (i % 97 == 5 ? 30 : 1);
    for (uint32_t c = 0; c < n_cols && c < 32; c++)
        p->x[c] = n > 2 ? 0 : p->x[c]; /* a block of zeros */
    p->a = (ki_activations){.n_cols = n_cols, .x = p->x};
    p->a.high = check_alloc(n * n_cols);
    p->a.low = check_alloc(n * n_cols);
    p->a.scales = check_alloc(n * (n_cols / 32 + 1) * 4);
    p->a.sums = check_alloc(n * (n_cols / 16 + 1) * 4);
    p->a.offsets = check_alloc(n * (n_cols / 32 + 1) * 4);
    p->a.pairs = check_alloc(n * n_cols * 2);
}

static void product_deinit(product *p) {
    free(p->file), free(p->matrix.tiles), free(p->x), free(p->a.high), free(p->a.low),
        free(p->a.scales), free(p->a.sums), free(p->a.offsets), free(p->a.pairs);
}

static void matrix_rows(ki_weight type) {
    if (!check_case("dense/row/%s", weight_names[type])) return;
    rng r = check_rng();
    for (uint32_t n_rows = 1; n_rows <= 53; n_rows += 13) {
        uint32_t n_cols = type < KI_WEIGHT_Q4_0 ? 80 : type < KI_WEIGHT_Q2_K ? 96 : 512;
        product p;
        product_init(&p, type, n_rows, n_cols, 1, &r);
        float out[512];
        for (uint32_t i = 0; i < n_rows; i++) {
            ki_matrix_row(out, &p.matrix, i);
            for (uint32_t c = 0; c < n_cols; c++) {
                double min, want = file_value(&min, p.file + i * p.row_bytes, type, c);
                /* d s c is exact in float32 (11 + 7 + 5 bits at most, or a power of 2 for a
                 * factor); a minimum (11 + 6 bits) is exact, and the sum is rounded once */
                CHECK((double)out[c] == (double)(float)want, "row %u of %u, column %u: %g, not %g",
                      i, n_rows, c, (double)out[c], want);
            }
        }
        product_deinit(&p);
    }
    size_t n_bytes;
    CHECK(ki_weight_is_quantized(type) == (type >= KI_WEIGHT_Q4_0), "is_quantized");
    CHECK(!ki_matrix_bytes(&n_bytes, type, UINT32_MAX, UINT32_MAX / 256 * 256) ||
              n_bytes > SIZE_MAX / 64,
          "overflow");
    check_end();
}

/* The integer of an activation. */
static int32_t activation(const ki_activations *a, size_t i) {
    return 128 * a->high[i] + a->low[i];
}

static void check_activations(const product *p) {
    size_t n_blocks = p->a.n_cols / 32;
    for (size_t b = 0; b < p->n * n_blocks; b++) {
        int32_t sums[2] = {0};
        double scale = (double)p->a.scales[b], largest = 0;
        for (size_t i = b * 32; i < b * 32 + 32; i++) {
            double x = (double)p->x[i];
            int32_t code = activation(&p->a, i);
            sums[i / 16 % 2] += code;
            largest = fabs(x) > largest ? fabs(x) : largest;
            /* x 16256 / largest in three roundings: below 16256 2^-22 of a step beside the half */
            CHECK(fabs(x - code * scale) <= scale * (0.5 + 16256 * 0x1p-22) && abs(code) <= 16256,
                  "activation %g becomes %d x %g", x, code, scale);
        }
        CHECK(!memcmp(sums, p->a.sums + 2 * b, sizeof sums), "sums of block %zu", b);
        CHECK(fabs(scale * 16256 - largest) <= largest * 0x1p-22, "scale of block %zu", b);
    }
}

/* One output and its tolerance. Plain types: one chain of n_cols fused steps, each rounds a partial
 * sum of at most sum |w x| by 2^-24. Quantized types: per scale a conversion, scale dx, dx sum, and
 * one or two fused steps: 5 roundings, twice in 32 columns at most (the integer part is exact), of
 * at most sum |terms|, where the two parts of a value with a minimum count apart. */
static double reference(double *tolerance, const product *p, size_t row, uint32_t matrix_row) {
    const uint8_t *file = p->file + matrix_row * p->row_bytes;
    ki_weight type = p->matrix.type;
    double sum = 0, size = 0;
    for (uint32_t c = 0; c < p->a.n_cols; c++) {
        size_t at = row * p->a.n_cols + c;
        double min, w = file_value(&min, file, type, c), x = (double)p->x[at];
        if (ki_weight_is_quantized(type)) x = activation(&p->a, at) * (double)p->a.scales[at / 32];
        sum += w * x;
        size += fabs(min * x) + fabs((w - min) * x);
    }
    double steps = ki_weight_is_quantized(type) ? p->a.n_cols / 32 * 10.0 : p->a.n_cols;
    *tolerance = (steps + 2) * 0x1p-24 * size + 1e-30;
    return sum;
}

/* Every code, scale and activation at its end, so that integer sums are as large as they get: each
 * byte of a row is 0 or 255 (no sums cancel), each activation 1 or, in odd rows, -1. */
static void make_extreme(product *p) {
    const struct block *block = &blocks[p->matrix.type];
    for (uint32_t i = 0; i < p->matrix.n_rows; i++) {
        uint8_t *row = p->file + i * p->row_bytes;
        for (size_t b = 0; b < p->row_bytes; b += block->bytes) {
            uint16_t d, m;
            memcpy(&d, row + b + block->d, 2);
            memcpy(&m, row + b + block->m, 2);
            memset(row + b, i % 2 ? 255 : 0, block->bytes);
            memcpy(row + b + block->d, &d, 2);
            if (block->m) memcpy(row + b + block->m, &m, 2);
        }
    }
    ki_matrix_pack(&p->matrix, p->file, 0, (p->matrix.n_rows + 15) / 16);
    for (size_t i = 0; i < p->n * p->a.n_cols; i++) p->x[i] = i / p->a.n_cols % 2 ? -1 : 1;
}

static void matmul_one(ki_isa isa, ki_weight type, uint32_t n_rows, uint32_t n_cols, size_t n,
                       bool extreme, rng *r) {
    product p;
    product_init(&p, type, n_rows, n_cols, n, r);
    if (extreme) make_extreme(&p);
    uint32_t n_tiles = (n_rows + 15) / 16;
    size_t stride = n_tiles * 16 + 16, n_out = stride * n;
    float *out = check_alloc(n_out * 4), *want = check_alloc(n_out * 4);
    const ki_dense_kernels *kernels = &ki_kernels_get(isa)->dense;
    const ki_dense_kernels *scalar = &ki_kernels_get(KI_ISA_SCALAR)->dense;
    memset(out, 0x7e, n_out * 4);
    memset(want, 0x7e, n_out * 4);
    for (size_t i = 0; ki_weight_is_quantized(type) && i < n; i++) scalar->quantize_row(&p.a, i);
    if (ki_weight_is_quantized(type)) check_activations(&p);
    scalar->matmul(want, stride, &p.matrix, 0, n_tiles, &p.a, n);
    memset(p.a.high, 0, n * n_cols);
    memset(p.a.low, 0, n * n_cols);
    for (size_t i = 0; ki_weight_is_quantized(type) && i < n; i++) kernels->quantize_row(&p.a, i);
    kernels->matmul(out, stride, &p.matrix, n_tiles / 2, n_tiles, &p.a, n);
    kernels->matmul(out, stride, &p.matrix, 0, n_tiles / 2, &p.a, n);
    CHECK(!memcmp(out, want, n_out * 4), "%ux%u by %zu: bytes differ from scalar", n_rows, n_cols,
          n);
    for (size_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n_tiles * 16; j++) {
            double tolerance = 0, expected = j < n_rows ? reference(&tolerance, &p, i, j) : 0;
            double got = (double)out[i * stride + j];
            CHECK(fabs(got - expected) <= tolerance,
                  "%ux%u by %zu: [%zu][%u] is %g, expected %g +- %g", n_rows, n_cols, n, i, j, got,
                  expected, tolerance);
        }
    free(out), free(want);
    product_deinit(&p);
}

static void matmul(ki_isa isa, ki_weight type) {
    if (!check_case_isa(isa, "dense/matmul/%s", weight_names[type])) return;
    static const size_t rows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33};
    rng r = check_rng();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        matmul_one(isa, type, 37, whole_blocks(type, 96), rows[i], false, &r);
        matmul_one(isa, type, 16, whole_blocks(type, 32), rows[i], false, &r);
    }
    matmul_one(isa, type, 1, whole_blocks(type, 320), 1, false, &r);
    matmul_one(isa, type, 50, whole_blocks(type, 576), 2, false, &r);
    matmul_one(isa, type, 20, whole_blocks(type, 640), 11, false, &r);
    if (type >= KI_WEIGHT_Q4_0) matmul_one(isa, type, 16, whole_blocks(type, 64), 9, true, &r);
    if (type < KI_WEIGHT_Q4_0) matmul_one(isa, type, 20, 48, 3, false, &r);
    check_end();
}

/* A row that is not finite says so in its first scale, and the same rows follow it. */
static void not_finite(ki_isa isa) {
    if (!check_case_isa(isa, "dense/not-finite")) return;
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    const ki_dense_kernels *k = &ki_kernels_get(isa)->dense;
    rng r = check_rng();
    for (uint32_t at = 0; at < 320; at += 17) {
        product p;
        product_init(&p, KI_WEIGHT_Q4_1, 16, 320, 9, &r);
        p.x[320 + at] = bad[at % 3];
        float out[9 * 16];
        for (size_t i = 0; i < 9; i++) k->quantize_row(&p.a, i);
        k->matmul(out, 16, &p.matrix, 0, 1, &p.a, 9);
        for (size_t i = 0; i < 9 * 16; i++)
            CHECK(isnan(out[i]) == (i / 16 == 1), "column %u: row %zu is %g", at, i / 16,
                  (double)out[i]);
        k->matmul(out, 16, &p.matrix, 0, 1, &p.a, 2);
        CHECK(!isnan(out[0]) && isnan(out[16]), "column %u, two rows", at);
        product_deinit(&p);
    }
    check_end();
}

/* ---- small steps ---- */

typedef struct vectors {
    float x[2048], y[2048], z[2048], got[2048], want[2048];
} vectors;
static vectors v;

static void fill(rng *r, float size) {
    for (size_t i = 0; i < 2048; i++) {
        v.x[i] = rng_normal(r) * size;
        v.y[i] = rng_normal(r) * size;
        v.z[i] = rng_normal(r);
    }
}

static void same(const char *what, size_t n) {
    CHECK(!memcmp(v.got, v.want, n * 4), "%s: bytes differ from scalar at n = %zu", what, n);
}

static void norm(ki_isa isa) {
    if (!check_case_isa(isa, "dense/rms-norm")) return;
    const ki_dense_kernels *k = &ki_kernels_get(isa)->dense,
                           *scalar = &ki_kernels_get(KI_ISA_SCALAR)->dense;
    rng r = check_rng();
    for (uint32_t n = 16; n <= 2048; n += n < 128 ? 16 : 480) {
        fill(&r, n % 32 ? 1e-3f : 3);
        k->rms_norm(v.got, v.x, v.y, n, 1e-5f);
        scalar->rms_norm(v.want, v.x, v.y, n, 1e-5f);
        same("rms_norm", n);
        double squares = 0;
        for (uint32_t i = 0; i < n; i++) squares += (double)v.x[i] * (double)v.x[i];
        double factor = 1 / sqrt(squares / n + 1e-5);
        /* a sum of positives of n / 16 + 4 steps (half of it after the root), then about 6
         * roundings */
        double relative = (n / 32 + 10) * 0x1p-24;
        for (uint32_t i = 0; i < n; i++) {
            double want = (double)v.x[i] * factor * (double)v.y[i];
            CHECK(fabs((double)v.got[i] - want) <= fabs(want) * relative, "[%u] of %u: %g, not %g",
                  i, n, (double)v.got[i], want);
        }
        memcpy(v.got, v.x, n * 4); /* in place */
        k->rms_norm(v.got, v.got, v.y, n, 1e-5f);
        same("rms_norm in place", n);
    }
    check_end();
}

static void rope(ki_isa isa) {
    if (!check_case_isa(isa, "dense/rope")) return;
    const ki_dense_kernels *k = &ki_kernels_get(isa)->dense,
                           *scalar = &ki_kernels_get(KI_ISA_SCALAR)->dense;
    static const uint32_t dims[] = {16, 32, 48, 64, 80, 96, 128, 256};
    rng r = check_rng();
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
        uint32_t n = dims[d], half = n / 2;
        fill(&r, 2);
        for (uint32_t j = 0; j < half; j++) {
            float angle = rng_normal(&r) * 100;
            v.y[j] = cosf(angle), v.z[j] = sinf(angle);
        }
        memcpy(v.got, v.x, n * 4);
        memcpy(v.want, v.x, n * 4);
        v.got[n] = v.want[n] = 77;
        k->rope(v.got, v.y, v.z, n);
        scalar->rope(v.want, v.y, v.z, n);
        same("rope", n + 1);
        for (uint32_t j = 0; j < half; j++) { /* three roundings of at most |a| + |b| */
            double a = (double)v.x[j], b = (double)v.x[half + j], c = (double)v.y[j],
                   s = (double)v.z[j];
            double tolerance = 3 * 0x1p-24 * (fabs(a) + fabs(b));
            CHECK(fabs((double)v.got[j] - (a * c - b * s)) <= tolerance, "D = %u, %u", n, j);
            CHECK(fabs((double)v.got[half + j] - (b * c + a * s)) <= tolerance, "D = %u, %u", n,
                  half + j);
        }
    }
    check_end();
}

/* An exponent of up to 88 is off by its own rounding, some 100 ulp of e^x; of erf-gelu it is the
 * error of erf, 1.5e-7 |x| / 2, and some roundings. */
static void gelus(const ki_dense_kernels *k, const ki_dense_kernels *scalar, uint32_t n) {
    k->gelu_mul(v.got, v.x, v.z, n);
    scalar->gelu_mul(v.want, v.x, v.z, n);
    same("gelu_mul", n);
    for (uint32_t i = 0; i < n; i++) {
        double g = (double)v.x[i], u = sqrt(2 / acos(-1)) * (g + 0.044715 * g * g * g);
        double want = g / (1 + exp(-2 * u)) * (double)v.z[i];
        CHECK(fabs((double)v.got[i] - want) <= fabs(want) * 200 * 0x1p-23 + 1e-34,
              "gelu_mul(%g) %g, not %g", g, (double)v.got[i], want);
    }
    k->gelu(v.got, v.x, n);
    scalar->gelu(v.want, v.x, n);
    same("gelu", n);
    for (uint32_t i = 0; i < n; i++) {
        double x = (double)v.x[i], want = x * (1 + erf(x / sqrt(2))) / 2;
        CHECK(fabs((double)v.got[i] - want) <= fabs(x) * 3e-7 + 1e-34, "gelu(%g) %g, not %g", x,
              (double)v.got[i], want);
    }
    k->layer_norm(v.got, v.x, v.y, v.z, n, 1e-5f);
    scalar->layer_norm(v.want, v.x, v.y, v.z, n, 1e-5f);
    same("layer_norm", n);
    double mean = 0, square = 0;
    for (uint32_t i = 0; i < n; i++) mean += (double)v.x[i] / n;
    for (uint32_t i = 0; i < n; i++)
        square += ((double)v.x[i] - mean) * ((double)v.x[i] - mean) / n;
    for (uint32_t i = 0; i < n; i++) { /* float32 mean of values up to 100, then three roundings */
        double want =
            ((double)v.x[i] - mean) / sqrt(square + 1e-5) * (double)v.y[i] + (double)v.z[i];
        CHECK(fabs((double)v.got[i] - want) <=
                  1e-5 * (fabs((double)v.y[i]) + fabs((double)v.z[i])) + 1e-5,
              "layer_norm %g, not %g", (double)v.got[i], want);
    }
}

static void elementwise(ki_isa isa) {
    if (!check_case_isa(isa, "dense/elementwise")) return;
    const ki_dense_kernels *k = &ki_kernels_get(isa)->dense,
                           *scalar = &ki_kernels_get(KI_ISA_SCALAR)->dense;
    rng r = check_rng();
    for (uint32_t n = 16; n <= 2048; n += n < 64 ? 16 : 496) {
        fill(&r, 8);
        v.x[0] = -100, v.x[1] = 100, v.x[2] = 0, v.x[3] = -88.5f;
        k->silu_mul(v.got, v.x, v.z, n);
        scalar->silu_mul(v.want, v.x, v.z, n);
        same("silu_mul", n);
        for (uint32_t i = 0; i < n; i++) { /* e^-x to 4 ulp, then a sum, a quotient, a product */
            double g = (double)v.x[i], want = g / (1 + exp(-g)) * (double)v.z[i];
            CHECK(fabs((double)v.got[i] - want) <= fabs(want) * 8 * 0x1p-23 + 1e-35,
                  "silu(%g) %g, not %g", g, (double)v.got[i], want);
        }
        gelus(k, scalar, n);
        memcpy(v.got, v.x, n * 4);
        k->add(v.got, v.y, n);
        for (uint32_t i = 0; i < n; i++) v.want[i] = v.x[i] + v.y[i];
        same("add", n);
        k->scale(v.got, v.x, 0.3f, n);
        for (uint32_t i = 0; i < n; i++) v.want[i] = v.x[i] * 0.3f;
        same("scale", n);
    }
    check_end();
}

/* ---- the shared exponential ---- */

/* Units in the last place of want that got is away. */
static double ulps(float got, double want) {
    int exponent;
    frexp(want, &exponent);
    return fabs((double)got - want) / ldexp(1, exponent - 24);
}

/* Taylor's rest r^7 / 5040 at r = -ln 2 / 2 is 1.2e-7 of 0.707: 2 ulp; the steps near the end of
 * Horner's rule and r's own rounding add below 1.5. */
#define EXP_ULPS 3.5

static void expect_exp(const float *x, const float *e, double *worst) {
    for (int i = 0; i < 16; i++) {
        double u = ulps(e[i], exp((double)x[i]));
        *worst = u > *worst ? u : *worst;
        CHECK(u <= EXP_ULPS, "e^%a: %a, %.2f ulp away", (double)x[i], (double)e[i], u);
    }
}

static void exponential(ki_isa isa) {
    if (!check_case_isa(isa, "dense/exp")) return;
    const ki_dense_kernels *k = &ki_kernels_get(isa)->dense,
                           *scalar = &ki_kernels_get(KI_ISA_SCALAR)->dense;
    rng r = check_rng();
    float x[16], got[16], want[16];
    double worst = 0;
    for (int round = 0; round < (check_opt.thorough ? 2000000 : 50000); round++) {
        for (int i = 0; i < 16; i++) {
            x[i] = (float)(rng_unit(&r) * 175 - 87);
            if (round % 4 == 1) x[i] = rng_normal(&r);
            if (round % 4 == 2) x[i] = ldexpf(rng_normal(&r), -(int)rng_below(&r, 40));
            if (round % 4 == 3) x[i] = ((float)i - 8 + 0.5f * (float)rng_below(&r, 3)) * 0.6931472f;
            if (x[i] <= -87 || x[i] > 88) x[i] = 1;
        }
        k->exp(got, x, 16);
        scalar->exp(want, x, 16);
        CHECK(!memcmp(got, want, sizeof got), "bytes differ from scalar");
        expect_exp(x, got, &worst);
    }
    static const float edges[16] = {0,        -0.0f,  -INFINITY, -87,     -87.0001f, -88,
                                    -1000,    -1e30f, -3e38f,    88,      89,        1e30f,
                                    INFINITY, 1,      -1,        -86.999f};
    k->exp(got, edges, 16);
    scalar->exp(want, edges, 16);
    CHECK(!memcmp(got, want, sizeof got), "edges differ from scalar");
    CHECK(got[0] == 1 && got[1] == 1, "e^0 is %a and %a", (double)got[0], (double)got[1]);
    for (int i = 2; i <= 8; i++)
        CHECK(got[i] == 0 && !signbit(got[i]), "e^%g is %g", (double)edges[i], (double)got[i]);
    CHECK(got[10] == got[9] && got[11] == got[9] && got[12] == got[9] && isfinite(got[9]),
          "above 88");
    /* monotone over runs of neighbours on both sides of 0 */
    for (int side = 0; side < 2; side++)
        for (int e = -30; e <= -1; e++) {
            uint32_t bits = ki_f32_bits(ldexpf(side ? -1 : 1, e));
            float last = side ? 2.0f : 0.0f;
            for (uint32_t i = 0; i < 512; i++) {
                for (uint32_t j = 0; j < 16; j++) x[j] = ki_f32_from_bits(bits + i * 16 + j);
                k->exp(got, x, 16);
                for (int j = 0; j < 16; j++) {
                    CHECK(side ? got[j] <= last : got[j] >= last, "not monotone at %a",
                          (double)x[j]);
                    last = got[j];
                }
            }
        }
    check_note("worst %.2f ulp", worst);
    check_end();
}

void check_dense(void) {
    for (int t = 0; t < KI_WEIGHT_COUNT; t++) {
        matrix_rows((ki_weight)t);
        for (int i = 0; i < KI_ISA_COUNT; i++) matmul((ki_isa)i, (ki_weight)t);
    }
    for (int i = 0; i < KI_ISA_COUNT; i++) {
        not_finite((ki_isa)i);
        norm((ki_isa)i);
        rope((ki_isa)i);
        elementwise((ki_isa)i);
        exponential((ki_isa)i);
    }
}
