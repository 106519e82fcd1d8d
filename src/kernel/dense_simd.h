/* dense_simd.h: dense.h over sixteen lanes. Included once by each isa_<name>.c. */
#include "form.h"
#include "simd.h"

#if defined(__AVX512F__)
enum {
    ROW_BLOCK = 8
}; /* activation rows that share an unpacked weight: 8 sums, 8 accumulators, 8 codes in registers */
#else
enum { ROW_BLOCK = 4 };
#endif

#define ACTIVATION_MAX                                                                             \
    16256.0f /* 127 * 128: the largest integer of two signed bytes as used here */

/* Blocks that are quantized together: their sums of 16 columns are the lanes of one vector. */
enum { QUANTIZE_BLOCKS = 8 };

/* Sixteen integers from column `at` of a row on, as products read them. */
KI_INLINE void store_integers(ki_activations *a, size_t at, vi q) {
#ifdef KI_DOT16
    vi_store_integers(a->high + at, a->low + at, a->pairs + at, q);
#else
    vi h = vi_sar(vi_add(q, vi_set(64)), 7);
    vi_store_i8(a->high + at, h);
    vi_store_i8(a->low + at, vi_sub(q, vi_shl(h, 7)));
#endif
}

/* n <= QUANTIZE_BLOCKS blocks from the b-th of all rows' on; false, and nothing done, where a
 * number is not finite. */
KI_INLINE bool quantize_blocks(ki_activations *a, size_t b, unsigned n) {
    const float *x = a->x + b * 32;
    vf rows[16], finite = vf_set(0.0f);
    float scale[16], inverse[16], sums[16];
    for (unsigned i = 0; i < 16; i++) rows[i] = vf_set(0.0f);
    for (unsigned i = 0; i < n; i++) {
        vf lo = vf_load(x + i * 32), hi = vf_load(x + i * 32 + 16);
        rows[i] = vf_max2(vf_abs(lo), vf_abs(hi));
        finite = vf_fma(lo, vf_set(0.0f), vf_fma(hi, vf_set(0.0f), finite));
    }
    if (vf_sum(finite) != 0) return false; /* 0 times such a number is not 0 */
    vf top = vf_maxes(rows, n), most = vf_set(ACTIVATION_MAX);
    vf_store(scale, vf_zero_unless_above(vf_div(top, most), top, 1e-30f));
    vf_store(inverse, vf_zero_unless_above(vf_div(most, top), top, 1e-30f)); /* or not finite */
    for (unsigned i = 0; i < 2 * n; i++) {
        vi q = vf_to_vi(vf_mul(vf_load(x + i * 16), vf_set(inverse[i / 2])));
        store_integers(a, b * 32 + i * 16, q);
        rows[i] = vf_from_vi(q);
    }
    vf_store(sums, vf_sums(rows, 2 * n)); /* whole numbers below 2^24: exact */
    for (unsigned i = 0; i < n; i++) {
        int32_t *to = a->sums + (b + i) * 2;
        to[0] = (int32_t)sums[2 * i], to[1] = (int32_t)sums[2 * i + 1];
        a->scales[b + i] = scale[i];
        a->offsets[b + i] = scale[i] * (sums[2 * i] + sums[2 * i + 1]);
    }
    return true;
}

/* An integer cannot say that a number is not finite; the row's first scale does, so that it reaches
 * every product of the row and is found where keys and values are stored. */
static void poison_row(ki_activations *a, size_t row) {
    size_t n_blocks = a->n_cols / KI_BLOCK_COLS, b = row * n_blocks;
    memset(a->sums + b * 2, 0, n_blocks * 2 * sizeof *a->sums);
    memset(a->scales + b, 0, n_blocks * sizeof *a->scales);
    memset(a->offsets + b, 0, n_blocks * sizeof *a->offsets);
    for (size_t i = 0; i < a->n_cols; i += 16) store_integers(a, row * a->n_cols + i, vi_set(0));
    a->scales[b] = a->offsets[b] = NAN;
}

static void quantize_row_simd(ki_activations *a, size_t row) {
    size_t n_blocks = a->n_cols / KI_BLOCK_COLS, b = 0;
    bool finite = true;
    for (; b + QUANTIZE_BLOCKS <= n_blocks && finite; b += QUANTIZE_BLOCKS)
        finite = quantize_blocks(a, row * n_blocks + b, QUANTIZE_BLOCKS);
    if (b < n_blocks && finite)
        finite = quantize_blocks(a, row * n_blocks + b, (unsigned)(n_blocks - b));
    if (!finite) poison_row(a, row);
}

/* `bits` of the operand in every byte. */
KI_INLINE vi plane_operand(const uint8_t *plane, unsigned bits, unsigned k) {
    vi v = vb_load(plane + k % bits * 64);
    if (bits == 8) return v;
    return vi_and(vi_shr(v, bits * (k / bits)), vi_set((int)((0xffu >> (8 - bits)) * 0x01010101u)));
}

/* The eight operands of 32 columns: columns 4k..4k+3 of 16 rows each. */
KI_INLINE void unpack_codes(vb *w, const uint8_t *codes, const ki_form *f) {
    for (unsigned k = 0; k < 8; k++) w[k] = plane_operand(codes, f->low_bits, k);
    if (!f->high_bits) return;
    for (unsigned k = 0; k < 8; k++) {
        vi high = plane_operand(codes + f->low_bits * 64u, f->high_bits, k);
        w[k] = vi_or(w[k], vi_shl(high, f->low_bits));
    }
}

/* Products of quads whose sums 16 bits hold: 2 * 128 * (2^bits - 1) * n < 32768. */
KI_INLINE unsigned narrow_quads(unsigned bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : 2; }

enum { SHARE_ROWS = KI_PARTS }; /* activation rows that share a loaded code */

/* sum[r] = n operands of 16 rows times the activations from `at` on, four an operand, of nr rows,
 * as 128 high + low. */
KI_INLINE void dot_codes(vi *sum, const vb *w, const ki_activations *a, size_t at, unsigned nr,
                         unsigned n, unsigned bits) {
    vs h[SHARE_ROWS][KI_PARTS], l[SHARE_ROWS][KI_PARTS];
    vi lows[SHARE_ROWS];
    for (unsigned r = 0; r < nr; r++) sum[r] = lows[r] = vi_set(0);
#pragma GCC unroll 8
    for (unsigned k = 0; k < n; k++) {
        bool first = k % narrow_quads(bits) == 0, last = (k + 1) % narrow_quads(bits) == 0;
        for (unsigned r = 0; r < nr; r++) {
            vp x = vp_set_bytes(a->high + at + r * a->n_cols + k * 4);
            vp y = vp_set_bytes(a->low + at + r * a->n_cols + k * 4);
            for (unsigned p = 0; p < KI_PARTS; p++) {
                h[r][p] = vs_dot(first ? vs_zero() : h[r][p], vp_of(w[k], p), x);
                l[r][p] = vs_dot(first ? vs_zero() : l[r][p], vp_of(w[k], p), y);
                if (!last && k + 1 < n) continue;
                sum[r] = vi_add_part(sum[r], p, h[r][p]);
                lows[r] = vi_add_part(lows[r], p, l[r][p]);
            }
        }
    }
    for (unsigned r = 0; r < nr; r++) sum[r] = vi_add(vi_shl(sum[r], 7), lows[r]);
}

/* The same for codes of 8 bits. */
#ifdef KI_DOT16
KI_INLINE void dot_whole_bytes(vi *sum, const vb *w, const ki_activations *a, size_t at,
                               unsigned nr, unsigned n) {
    const vi bytes = vi_set(0x00ff00ff);
    const int16_t *x = a->pairs + at;
    for (unsigned r = 0; r < nr; r++) sum[r] = vi_set(0);
#pragma GCC unroll 8
    for (unsigned k = 0; k < n; k++) {
        vi even = vi_and(w[k], bytes), odd = vi_and(vi_shr(w[k], 8), bytes);
        for (unsigned r = 0; r < nr; r++) {
            const int16_t *four = x + r * a->n_cols + k * 4;
            sum[r] = vi_dot16(sum[r], even, vi_set_pair16(four));
            sum[r] = vi_dot16(sum[r], odd, vi_set_pair16(four + 2));
        }
    }
}
#else
KI_INLINE void dot_whole_bytes(vi *sum, const vb *w, const ki_activations *a, size_t at,
                               unsigned nr, unsigned n) {
    for (unsigned r = 0; r < nr; r++, at += a->n_cols) {
        vi h = vi_set(0);
        for (unsigned k = 0; k < n; k++) h = vi_dot_u8(h, w[k], vi_set_bytes(a->high + at + k * 4));
        h = vi_shl(h, 7);
        for (unsigned k = 0; k < n; k++) h = vi_dot_u8(h, w[k], vi_set_bytes(a->low + at + k * 4));
        sum[r] = h;
    }
}
#endif

/* 32 columns of a tile, ready for any number of activation rows. */
typedef struct unpacked {
    vb codes[8];
    vf scale[2], min[2]; /* of each part: of all 32 columns, or of 16; what is added */
} unpacked;

KI_INLINE void unpack_32(unpacked *u, const uint8_t *p, vf d, vf m, const ki_form *f) {
    unsigned n = f->n_scales;
    u->scale[0] = d;
    u->min[0] = m;
    for (unsigned i = 0; i < n; i++) {
        vi scale = vi_load_i8((const int8_t *)p + i * 16), min = scale;
        if (f->min == KI_MIN_HALF) {
            min = vi_and(vi_shr(scale, 4), vi_set(15));
            scale = vi_and(scale, vi_set(15));
        } else if (f->min == KI_MIN_BYTE) min = vi_load_i8((const int8_t *)p + (n + i) * 16);
        u->scale[i] = vf_mul(d, vf_from_vi(scale));
        if (f->min != KI_MIN_NONE) u->min[i] = vf_mul(vf_mul(m, vf_set(-1)), vf_from_vi(min));
    }
    unpack_codes(u->codes, p + ki_form_scale_bytes(f) * 16, f);
}

/* The same at the place that a tile has been read to, with a head where a block of the file begins;
 * returns what follows. */
KI_INLINE const uint8_t *unpack_next(unpacked *u, vf *d, vf *m, const uint8_t *tile, bool head,
                                     const ki_form *f) {
    if (head) {
        *d = vf_load_f16((const uint16_t *)tile);
        if (f->min != KI_MIN_NONE) *m = vf_load_f16((const uint16_t *)tile + 16);
        tile += ki_form_head_bytes(f) * 16;
    }
    unpack_32(u, tile, *d, *m, f);
    return tile + (ki_form_scale_bytes(f) + ki_form_code_bytes(f)) * 16;
}

/* What meets the minimum of a part of 32 columns: the activations' scale times their sum. */
KI_INLINE float offset_of(const ki_activations *a, size_t row, size_t b, unsigned part,
                          unsigned n_parts) {
    size_t at = row * (a->n_cols / 32) + b;
    return n_parts == 1 ? a->offsets[at] : a->scales[at] * (float)a->sums[2 * at + part];
}

/* acc[r] + 32 columns, the b-th, of 16 rows times activation row `row` + r, nr <= SHARE_ROWS. */
KI_INLINE void add_32(vf *acc, const unpacked *u, const ki_activations *a, size_t row, unsigned nr,
                      size_t b, const ki_form *f) {
    const size_t at = row * a->n_cols + b * 32;
    const unsigned n_parts = f->n_scales == 2 ? 2 : 1, n = 8 / n_parts;
    const unsigned bits = f->low_bits + f->high_bits;
    for (unsigned i = 0; i < n_parts; i++) {
        vi sum[SHARE_ROWS];
        if (bits == 8) dot_whole_bytes(sum, u->codes + i * n, a, at + i * 16, nr, n);
        else dot_codes(sum, u->codes + i * n, a, at + i * 16, nr, n, bits);
        for (unsigned r = 0; r < nr; r++) {
            const int32_t *sums = a->sums + (at + r * a->n_cols) / KI_SUM_COLS;
            float dx = a->scales[(row + r) * (a->n_cols / 32) + b];
            int32_t sx = n_parts == 2 ? sums[i] : sums[0] + sums[1];
            if (f->zero) sum[r] = vi_sub(sum[r], vi_set(f->zero * sx));
            acc[r] = vf_fma(vf_from_vi(sum[r]), vf_mul(u->scale[i], vf_set(dx)), acc[r]);
            if (f->min != KI_MIN_NONE)
                acc[r] = vf_fma(u->min[i], vf_set(offset_of(a, row + r, b, i, n_parts)), acc[r]);
        }
    }
}

/* One tile times n <= ROW_BLOCK rows of activations, from row r0 on. */
KI_INLINE void matmul_tile(float *out, size_t out_stride, const uint8_t *tile, ki_weight type,
                           const ki_activations *a, size_t r0, unsigned n) {
    const ki_form *f = &ki_forms[type];
    size_t n_blocks = a->n_cols / KI_BLOCK_COLS, per_head = f->block_cols / KI_BLOCK_COLS;
    vf acc[ROW_BLOCK], d = vf_set(0.0f), m = vf_set(0.0f);
    for (unsigned i = 0; i < n; i++) acc[i] = vf_set(0.0f);
    for (size_t b = 0; b < n_blocks; b++) {
        unpacked u;
        tile = unpack_next(&u, &d, &m, tile, b % per_head == 0, f);
        for (unsigned i = 0; i < n; i += SHARE_ROWS)
            add_32(acc + i, &u, a, r0 + i, KI_MIN(n - i, (unsigned)SHARE_ROWS), b, f);
    }
    for (unsigned i = 0; i < n; i++) vf_store(out + (r0 + i) * out_stride, acc[i]);
}

/* ---- many rows: codes of 16 bits ----
 *
 * Codes of a tile are unpacked to 16 bits once, some hundred columns at a time, which level 1
 * holds, and all rows go through them, WIDE_ROWS together, sums in registers. A product of two
 * pairs is one instruction with one addition, where bytes take two of each, and nothing needs to be
 * widened. */
#ifdef KI_DOT16
enum {
    WIDE_ROWS = 8 / KI_PARTS, /* their sums and accumulators fill the registers */
    WIDE_MIN_ROWS = 8,        /* fewer do not pay for unpacking */
    WIDE_BLOCKS = 18          /* of 32 columns that are unpacked at a time: 23 KB */
};

typedef struct wide_32 {
    int16_t codes[16]
                 [32]; /* less their zero, of 16 rows: columns 4 k and 4 k + 2, then the odd ones */
    float scale[2][16], min[2][16];
} wide_32;

KI_INLINE void widen_32(wide_32 *w, const unpacked *u, const ki_form *f) {
    const vi bytes = vi_set(0x00ff00ff), zero = vi_set(f->zero * 0x00010001);
    for (unsigned k = 0; k < 8; k++) {
        vi_store((int32_t *)w->codes[2 * k], vi_sub16(vi_and(u->codes[k], bytes), zero));
        vi_store((int32_t *)w->codes[2 * k + 1],
                 vi_sub16(vi_and(vi_shr(u->codes[k], 8), bytes), zero));
    }
    for (unsigned i = 0; i < 2; i++) {
        if (i == 0 || f->n_scales == 2) vf_store(w->scale[i], u->scale[i]);
        if (f->min != KI_MIN_NONE && (i == 0 || f->n_scales == 2)) vf_store(w->min[i], u->min[i]);
    }
}

/* out += n_blocks blocks of 32 columns from the b0-th on times nr rows; block 0 begins. */
KI_INLINE void wide_rows(float *out, size_t out_stride, const wide_32 *w, size_t b0,
                         size_t n_blocks, const ki_activations *a, size_t row, unsigned nr,
                         unsigned n_parts, bool has_min) {
    const unsigned n = 16 / n_parts;
    vf acc[WIDE_ROWS];
    out += row * out_stride;
    for (unsigned r = 0; r < nr; r++) acc[r] = b0 ? vf_load(out + r * out_stride) : vf_set(0.0f);
    for (size_t b = b0; b < b0 + n_blocks; b++, w++)
        for (unsigned i = 0; i < n_parts; i++) {
            const int16_t *x = a->pairs + row * a->n_cols + b * 32 + i * 16;
            vi sum[WIDE_ROWS];
            for (unsigned r = 0; r < nr; r++) sum[r] = vi_set(0);
#pragma GCC unroll 16
            for (unsigned k = 0; k < n; k++) {
                vi codes = vi_load((const int32_t *)w->codes[i * n + k]);
                for (unsigned r = 0; r < nr; r++)
                    sum[r] = vi_dot16(sum[r], codes, vi_set_pair16(x + r * a->n_cols + k * 2));
            }
            for (unsigned r = 0; r < nr; r++) {
                vf scale = vf_mul(vf_load(w->scale[i]),
                                  vf_set(a->scales[(row + r) * (a->n_cols / 32) + b]));
                acc[r] = vf_fma(vf_from_vi(sum[r]), scale, acc[r]);
                if (has_min)
                    acc[r] = vf_fma(vf_load(w->min[i]),
                                    vf_set(offset_of(a, row + r, b, i, n_parts)), acc[r]);
            }
        }
    for (unsigned r = 0; r < nr; r++) vf_store(out + r * out_stride, acc[r]);
}

#define WIDE_PRODUCT(name, n_parts, has_min)                                                       \
    static void name(float *out, size_t out_stride, const wide_32 *w, size_t b0, size_t n_blocks,  \
                     const ki_activations *a, size_t n_rows) {                                     \
        size_t r = 0;                                                                              \
        for (; r + WIDE_ROWS <= n_rows; r += WIDE_ROWS)                                            \
            wide_rows(out, out_stride, w, b0, n_blocks, a, r, WIDE_ROWS, n_parts, has_min);        \
        for (; r + 2 <= n_rows; r += 2)                                                            \
            wide_rows(out, out_stride, w, b0, n_blocks, a, r, 2, n_parts, has_min);                \
        for (; r < n_rows; r++)                                                                    \
            wide_rows(out, out_stride, w, b0, n_blocks, a, r, 1, n_parts, has_min);                \
    }
WIDE_PRODUCT(wide_whole, 1, false)
WIDE_PRODUCT(wide_whole_min, 1, true)
WIDE_PRODUCT(wide_halves, 2, false)
WIDE_PRODUCT(wide_halves_min, 2, true)

/* One tile times all rows. */
KI_INLINE void matmul_wide_tile(float *out, size_t out_stride, const uint8_t *tile, ki_weight type,
                                const ki_activations *a, size_t n_rows) {
    const ki_form *f = &ki_forms[type];
    const size_t n_blocks = a->n_cols / 32, per_head = f->block_cols / 32;
    const size_t n_turns = (n_blocks + WIDE_BLOCKS - 1) / WIDE_BLOCKS;
    const size_t at_once = (n_blocks + n_turns - 1) / n_turns;
    _Alignas(64) wide_32 wide[WIDE_BLOCKS];
    vf d = vf_set(0.0f), m = vf_set(0.0f);
    for (size_t b0 = 0, end; b0 < n_blocks; b0 = end) {
        end = KI_MIN(b0 + at_once, n_blocks);
        for (size_t b = b0; b < end; b++) {
            unpacked u;
            tile = unpack_next(&u, &d, &m, tile, b % per_head == 0, f);
            widen_32(&wide[b - b0], &u, f);
        }
        if (f->n_scales == 2 && f->min != KI_MIN_NONE)
            wide_halves_min(out, out_stride, wide, b0, end - b0, a, n_rows);
        else if (f->n_scales == 2) wide_halves(out, out_stride, wide, b0, end - b0, a, n_rows);
        else if (f->min != KI_MIN_NONE)
            wide_whole_min(out, out_stride, wide, b0, end - b0, a, n_rows);
        else wide_whole(out, out_stride, wide, b0, end - b0, a, n_rows);
    }
}
#endif

KI_INLINE vf load_plain(const uint8_t *p, ki_weight type) {
    if (type == KI_WEIGHT_F32) return vf_load((const float *)p);
    if (type == KI_WEIGHT_F16) return vf_load_f16((const uint16_t *)p);
    return vf_load_bf16((const uint16_t *)p);
}

KI_INLINE void matmul_plain_tile(float *out, size_t out_stride, const uint8_t *tile, ki_weight type,
                                 const ki_activations *a, size_t r0, unsigned n) {
    unsigned col_bytes = type == KI_WEIGHT_F32 ? 64 : 32;
    vf acc[ROW_BLOCK];
    for (unsigned i = 0; i < n; i++) acc[i] = vf_set(0.0f);
    for (uint32_t c = 0; c < a->n_cols; c++) {
        vf w = load_plain(tile + (size_t)c * col_bytes, type);
        for (unsigned i = 0; i < n; i++)
            acc[i] = vf_fma(vf_set(a->x[(r0 + i) * a->n_cols + c]), w, acc[i]);
    }
    for (unsigned i = 0; i < n; i++) vf_store(out + (r0 + i) * out_stride, acc[i]);
}

/* Every (type, rows) pair becomes its own loop: both are constants here. */
KI_INLINE void matmul_rows(float *out, size_t out_stride, const uint8_t *tile, ki_weight type,
                           bool plain, const ki_activations *a, size_t n_rows) {
    size_t r = 0;
#ifdef KI_DOT16
    if (!plain && n_rows >= WIDE_MIN_ROWS) {
        matmul_wide_tile(out, out_stride, tile, type, a, n_rows);
        return;
    }
#endif
    for (; r + ROW_BLOCK <= n_rows; r += ROW_BLOCK)
        plain ? matmul_plain_tile(out, out_stride, tile, type, a, r, ROW_BLOCK)
              : matmul_tile(out, out_stride, tile, type, a, r, ROW_BLOCK);
    for (; r + 2 <= n_rows; r += 2)
        plain ? matmul_plain_tile(out, out_stride, tile, type, a, r, 2)
              : matmul_tile(out, out_stride, tile, type, a, r, 2);
    for (; r < n_rows; r++)
        plain ? matmul_plain_tile(out, out_stride, tile, type, a, r, 1)
              : matmul_tile(out, out_stride, tile, type, a, r, 1);
}

#define MATMUL_TYPE(name, type, plain)                                                             \
    static void matmul_##name(float *out, size_t stride, const uint8_t *tile,                      \
                              const ki_activations *a, size_t n) {                                 \
        matmul_rows(out, stride, tile, type, plain, a, n);                                         \
    }
MATMUL_TYPE(f32, KI_WEIGHT_F32, true)
MATMUL_TYPE(f16, KI_WEIGHT_F16, true)
MATMUL_TYPE(bf16, KI_WEIGHT_BF16, true)
MATMUL_TYPE(q4_0, KI_WEIGHT_Q4_0, false)
MATMUL_TYPE(q4_1, KI_WEIGHT_Q4_1, false)
MATMUL_TYPE(q5_0, KI_WEIGHT_Q5_0, false)
MATMUL_TYPE(q5_1, KI_WEIGHT_Q5_1, false)
MATMUL_TYPE(q8_0, KI_WEIGHT_Q8_0, false)
MATMUL_TYPE(q2_k, KI_WEIGHT_Q2_K, false)
MATMUL_TYPE(q3_k, KI_WEIGHT_Q3_K, false)
MATMUL_TYPE(q4_k, KI_WEIGHT_Q4_K, false)
MATMUL_TYPE(q5_k, KI_WEIGHT_Q5_K, false)
MATMUL_TYPE(q6_k, KI_WEIGHT_Q6_K, false)

static void matmul_simd(float *out, size_t out_stride, const ki_matrix *matrix, uint32_t first_tile,
                        uint32_t end_tile, const ki_activations *a, size_t n_rows) {
    static void (*const of_type[KI_WEIGHT_COUNT])(float *, size_t, const uint8_t *,
                                                  const ki_activations *, size_t) = {
        [KI_WEIGHT_F32] = matmul_f32,   [KI_WEIGHT_F16] = matmul_f16,
        [KI_WEIGHT_BF16] = matmul_bf16, [KI_WEIGHT_Q4_0] = matmul_q4_0,
        [KI_WEIGHT_Q4_1] = matmul_q4_1, [KI_WEIGHT_Q5_0] = matmul_q5_0,
        [KI_WEIGHT_Q5_1] = matmul_q5_1, [KI_WEIGHT_Q8_0] = matmul_q8_0,
        [KI_WEIGHT_Q2_K] = matmul_q2_k, [KI_WEIGHT_Q3_K] = matmul_q3_k,
        [KI_WEIGHT_Q4_K] = matmul_q4_k, [KI_WEIGHT_Q5_K] = matmul_q5_k,
        [KI_WEIGHT_Q6_K] = matmul_q6_k,
    };
    size_t all_bytes = 0;
    ki_matrix_bytes(&all_bytes, matrix->type, KI_TILE_ROWS, matrix->n_cols);
    for (uint32_t t = first_tile; t < end_tile; t++)
        of_type[matrix->type](out + (size_t)t * KI_TILE_ROWS, out_stride,
                              matrix->tiles + t * all_bytes, a, n_rows);
}

static void rms_norm_simd(float *out, const float *x, const float *weight, uint32_t n, float eps) {
    vf squares = vf_set(0.0f);
    for (uint32_t i = 0; i < n; i += 16) squares = vf_fma(vf_load(x + i), vf_load(x + i), squares);
    vf factor = vf_set(1.0f / sqrtf(vf_sum(squares) / (float)n + eps));
    for (uint32_t i = 0; i < n; i += 16)
        vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), factor), vf_load(weight + i)));
}

static void rope_simd(float *x, const float *cosine, const float *sine, uint32_t head_dim) {
    uint32_t half = head_dim / 2, j = 0;
    for (; j + 16 <= half; j += 16) {
        vf a = vf_load(x + j), b = vf_load(x + half + j), c = vf_load(cosine + j),
           s = vf_load(sine + j);
        vf_store(x + j, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(x + half + j, vf_add(vf_mul(b, c), vf_mul(a, s)));
    }
    for (; j < half; j++) {
        float a = x[j], b = x[half + j];
        x[j] = a * cosine[j] - b * sine[j];
        x[half + j] = b * cosine[j] + a * sine[j];
    }
}

static void silu_mul_simd(float *out, const float *gate, const float *up, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 16) {
        vf g = vf_load(gate + i), e = vf_exp(vf_sub(vf_set(0.0f), g));
        vf_store(out + i, vf_mul(vf_div(g, vf_add(vf_set(1.0f), e)), vf_load(up + i)));
    }
}

static void gelu_mul_simd(float *out, const float *gate, const float *up, uint32_t n) {
    const vf a = vf_set(-2 * 0.7978845608f), b = vf_set(-2 * 0.7978845608f * 0.044715f);
    for (uint32_t i = 0; i < n; i += 16) {
        vf g = vf_load(gate + i), e = vf_exp(vf_mul(g, vf_fma(b, vf_mul(g, g), a)));
        vf_store(out + i, vf_mul(vf_div(g, vf_add(vf_set(1.0f), e)), vf_load(up + i)));
    }
}

/* erfc(z) = poly(t) e^(-z^2), t = 1 / (1 + 0.3275911 z), z >= 0 (Abramowitz and Stegun 7.1.26);
 * then x (1 + erf(x / sqrt 2)) / 2 = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2. */
static void gelu_simd(float *out, const float *in, uint32_t n) {
    const vf zero = vf_set(0.0f), one = vf_set(1.0f);
    for (uint32_t i = 0; i < n; i += 16) {
        vf x = vf_load(in + i), size = vf_max2(x, vf_sub(zero, x));
        vf z = vf_mul(size, vf_set(0.70710678f));
        vf t = vf_div(one, vf_fma(vf_set(0.3275911f), z, one));
        vf p = vf_fma(vf_set(1.061405429f), t, vf_set(-1.453152027f));
        p = vf_fma(p, t, vf_set(1.421413741f));
        p = vf_fma(p, t, vf_set(-0.284496736f));
        p = vf_mul(vf_fma(p, t, vf_set(0.254829592f)), t);
        vf erfc = vf_mul(p, vf_exp(vf_sub(zero, vf_mul(z, z))));
        vf half = vf_mul(vf_mul(size, vf_set(0.5f)), erfc);
        vf_store(out + i, vf_sub(vf_max2(x, zero), half));
    }
}

static void layer_norm_simd(float *out, const float *x, const float *weight, const float *bias,
                            uint32_t n, float eps) {
    vf sum = vf_set(0.0f), squares = vf_set(0.0f);
    for (uint32_t i = 0; i < n; i += 16) sum = vf_add(sum, vf_load(x + i));
    vf mean = vf_set(vf_sum(sum) / (float)n);
    for (uint32_t i = 0; i < n; i += 16) {
        vf d = vf_sub(vf_load(x + i), mean);
        squares = vf_fma(d, d, squares);
    }
    vf factor = vf_set(1.0f / sqrtf(vf_sum(squares) / (float)n + eps));
    for (uint32_t i = 0; i < n; i += 16) {
        vf d = vf_mul(vf_sub(vf_load(x + i), mean), factor);
        vf_store(out + i, vf_fma(d, vf_load(weight + i), vf_load(bias + i)));
    }
}

static void add_simd(float *x, const float *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 16) vf_store(x + i, vf_add(vf_load(x + i), vf_load(y + i)));
}

static void scale_simd(float *out, const float *x, float factor, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 16) vf_store(out + i, vf_mul(vf_load(x + i), vf_set(factor)));
}

static void exp_simd(float *out, const float *x, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 16) vf_store(out + i, vf_exp(vf_load(x + i)));
}
