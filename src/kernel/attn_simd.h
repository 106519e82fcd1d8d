/* attn_simd.h: the tile kernel of attn.h over sixteen lanes. Included once by each isa_<name>.c. */
#include "attn.h"
#include "simd.h"

enum {
    QUERY_BLOCK = 4,      /* queries that share a loaded vector */
    FOLD_ROWS = 16,       /* (group, query) pairs that are folded together: lanes of one vector */
    ROW = KI_SCRATCH_ROW, /* elements from one row of scratch to the next */
    BYTE_ROW = KI_SCRATCH_BYTE_ROW
};

/* Scratch of a worker:
 *   q           [4][256] f32               queries
 *   p           [4][256] f32               scores, then weights, of 128 tokens
 *   masked      [4][256] f32               weights of queries that read a part of the codes only
 *   x           [16][256] f32              q * s or p * s of the rows being folded
 *   high, low   [16][256] bytes            their integers, in quads (fold_at) */
typedef struct attn_scratch {
    float *q, *p, *masked, *x;
    int8_t *high, *low;
    float step[FOLD_ROWS], bias[FOLD_ROWS];
    const char *next, *next_end; /* of the page that is worked on next: asked for, not read */
} attn_scratch;

static void scratch_carve(attn_scratch *s, void *memory) {
    s->q = memory;
    s->p = s->q + QUERY_BLOCK * ROW;
    s->masked = s->p + QUERY_BLOCK * ROW;
    s->x = s->masked + QUERY_BLOCK * ROW;
    s->high = (int8_t *)(s->x + FOLD_ROWS * ROW);
    s->low = s->high + FOLD_ROWS * BYTE_ROW;
}

/* A function of its own: its loops get the registers that its callers' would take. */
#define KI_APART __attribute__((noinline))

/* ---- folding: x * scale as integers ---- */

/* x s becomes 15 bits in two signed bytes, 128 high + low. One byte, which would save half of the
 * products, was tried and shows in the logits (SPEED.md). */
#define FOLD_LIMIT (127.0f * 128)

/* Where the bytes of quad i (elements 4 i .. 4 i + 3) stand in a row: vb_split15's order. */
KI_INLINE unsigned fold_at(unsigned i) { return i / 16 * 64 + i % 4 * 16 + i % 16 / 4 * 4; }

/* Integers of n values of one row, n a multiple of 64; returns their sum a lane. */
KI_INLINE vi fold_row(int8_t *high, int8_t *low, const float *x, float inverse, size_t n) {
    vi sum = vi_set(0);
    const vp ones = vp_set(0x01010101);
    for (unsigned part = 0; part < KI_PARTS; part++) {
        const size_t lane = part * (16 / KI_PARTS);
        vs high_sum = vs_zero(), low_sum = vs_zero();
        for (size_t c = 0; c < n; c += 64) { /* at most four: KI_NARROW_SUMS */
            vp q[4], h, l;
            for (unsigned k = 0; k < 4; k++)
                q[k] = vh_to_vp(vh_mul(vh_load(x + c + k * 16 + lane), vh_set(inverse)));
            vp_split15(&h, &l, q[0], q[1], q[2], q[3]);
            vp_store(high + c + lane * 4, h);
            vp_store(low + c + lane * 4, l);
            high_sum = vs_dot(high_sum, ones, h);
            low_sum = vs_dot(low_sum, ones, l);
        }
        sum = vi_add_part(vi_add_part128(sum, part, high_sum), part, low_sum);
    }
    return sum;
}

/* One group of nq rows x, n values each: x s to out, x . (z + centre s), and the largest |x s| a
 * lane. Past n come zeros up to a multiple of 64. Without a zero point z is -centre s. Part by part
 * of a vector: sums and maxima of all rows stay in registers. */
KI_INLINE void fold_group(float *out, vf *bias, vf *largest, const float *x, unsigned nq,
                          const uint16_t *scale, const uint16_t *zero, size_t n, float centre) {
    for (unsigned part = 0; part < KI_PARTS; part++) {
        vh sum[QUERY_BLOCK], top[QUERY_BLOCK];
        for (unsigned i = 0; i < nq; i++) sum[i] = top[i] = vh_set(0.0f);
        for (size_t c = part * (16 / KI_PARTS); c < n; c += 16) {
            vh s = vh_load_f16(scale + c), z = vh_set(0.0f);
            if (zero) z = vh_fma(s, vh_set(centre), vh_load_f16(zero + c));
            for (unsigned i = 0; i < nq; i++) {
                vh v = vh_load(x + i * ROW + c), f = vh_mul(v, s);
                vh_store(out + i * ROW + c, f);
                sum[i] = vh_fma(v, z, sum[i]);
                top[i] = vh_max2(vh_abs(f), top[i]);
            }
        }
        for (unsigned i = 0; i < nq; i++) {
            bias[i] = vf_with_part(bias[i], part, sum[i]);
            largest[i] = vf_with_part(largest[i], part, top[i]);
        }
    }
    for (size_t c = n; c % 64; c += 16)
        for (unsigned i = 0; i < nq; i++) vf_store(out + i * ROW + c, vf_set(0.0f));
}
/* The same with nq known to each loop. */
KI_INLINE void fold_group_n(float *out, vf *bias, vf *largest, const float *x, unsigned nq,
                            const uint16_t *scale, const uint16_t *zero, size_t n, float centre) {
    if (nq == 1) fold_group(out, bias, largest, x, 1, scale, zero, n, centre);
    else if (nq == 2) fold_group(out, bias, largest, x, 2, scale, zero, n, centre);
    else if (nq == 3) fold_group(out, bias, largest, x, 3, scale, zero, n, centre);
    else fold_group(out, bias, largest, x, 4, scale, zero, n, centre);
}

/* 4 x s of the wide channels, from rows x s [n][256]: the high bits' side of fold_group. */
KI_INLINE void fold_wide(float *out, vf *bias, vf *largest, const float *xs, unsigned n,
                         const uint8_t *list, unsigned n_wide, float centre) {
    for (unsigned i = 0; i < n; i++, out += ROW, xs += ROW) {
        vf sum = vf_set(0.0f), top = sum;
        unsigned w = 0;
        for (; w < n_wide; w++) out[w] = 4 * xs[list[w]];
        for (; w % 64; w++) out[w] = 0;
        for (w = 0; w < n_wide; w += 16) {
            vf v = vf_load(out + w);
            sum = vf_fma(v, vf_set(centre), sum);
            top = vf_max2(vf_abs(v), top);
        }
        bias[i] = sum, largest[i] = top;
    }
}

/* n_groups groups of nq rows x [nq][256] of n values, n_groups nq <= 16. Row g nq + i gets
 * integers, a step and a bias so that
 *   sum x (code s + z) = step (integers . codes) + bias  up to the rounding
 * r of x s to integers, which meets codes less their centre:  sum x z + centre sum r, so that an
 * integer rounded to zero still weighs its share. With a list of wide channels as many rows follow,
 * for the high bits of each. */
static KI_APART void fold_rows(attn_scratch *s, const float *x, unsigned nq, const uint16_t *scale,
                               const uint16_t *zero, unsigned n_groups, unsigned n, unsigned bits,
                               const uint8_t *list) {
    const float centre = (float)((1u << bits) - 1) / 2;
    const unsigned n_low = n_groups * nq, n_rows = list ? 2 * n_low : n_low;
    vf bias[FOLD_ROWS], largest[FOLD_ROWS];
    float inverse[FOLD_ROWS];
    for (unsigned r = n_rows; r < FOLD_ROWS; r++) bias[r] = largest[r] = vf_set(0.0f);
    for (unsigned g = 0; g < n_groups; g++)
        fold_group_n(s->x + g * nq * ROW, bias + g * nq, largest + g * nq, x, nq,
                     scale + (size_t)g * n, zero ? zero + (size_t)g * n : NULL, n, centre);
    if (list)
        fold_wide(s->x + n_low * ROW, bias + n_low, largest + n_low, s->x, n_low, list, n / 4,
                  centre);
    vf top = vf_maxes(largest, n_rows), limit = vf_set(FOLD_LIMIT), step = vf_div(top, limit);
    vf_store(s->step, step);
    vf_store(inverse, vf_div(limit, vf_max2(top, vf_set(1e-30f)))); /* finite for a row of 0 */
    for (unsigned r = 0; r < n_rows; r++) {
        vi sum = fold_row(s->high + r * BYTE_ROW, s->low + r * BYTE_ROW, s->x + r * ROW, inverse[r],
                          ((r < n_low ? n : n / 4) + 63) / 64 * 64);
        bias[r] = vf_fma(vf_from_vi(sum), vf_set(-centre * s->step[r]), bias[r]);
    }
    vf_store(s->bias, vf_sums(bias, n_rows));
}

/* ---- codes times those integers ---- */

/* Three lines of the next page, which is what a page has for a word of two vectors at 2 bits in
 * groups of 32: all at once would wait for one another. */
KI_INLINE void ask_ahead(attn_scratch *s) {
    if (s->next >= s->next_end) return;
    for (int i = 0; i < 3; i++) __builtin_prefetch(s->next + i * 64, 0, 2);
    s->next += 3 * 64;
}

/* Bits of a code that stand in the words; the third of three has a plane of its own. */
KI_INLINE unsigned word_bits(unsigned bits) { return bits == 3 ? 2 : bits; }

/* Codes of n_vectors vectors of 16 tokens (keys) or channels (values), and the folded rows that
 * meet them, from `row` on, one a query. `words`, `apart` from them those of the next vector,
 * `stride` those of the next word. third: of 3-bit codes, laid out as the words are, two of them to
 * one. first: of a stream (dot_stream). Query i's results go to out[i], or are added to what is
 * there. */
typedef struct code_rows {
    const uint32_t *words, *third;
    size_t apart, stride;
    unsigned n_vectors, n_words, row, first;
    float *out[QUERY_BLOCK];
    bool add;
} code_rows;

/* The bytes of the integers that one pass over the codes multiplies: both, or, where registers are
 * few, one after the other, so that a byte that is broadcast serves two registers of codes. */
enum { HIGH = 1, LOW = 2 };
/* As bits of a code: high bits of wide channels, in a stream of quads. */
enum { STREAM = 0 };

/* Sums of products, of each part of nb vectors with each query's row. */
typedef struct part_dots {
    vs high[2][QUERY_BLOCK], low[2][QUERY_BLOCK];
} part_dots;

KI_INLINE void part_clear(part_dots *p, unsigned nq, unsigned nb) {
    for (unsigned v = 0; v < nb * KI_PARTS; v++)
        for (unsigned i = 0; i < nq; i++) p->high[v][i] = p->low[v][i] = vs_zero();
}
KI_INLINE void part_add(vi sum[2][QUERY_BLOCK], const part_dots *p, unsigned bytes, unsigned nq,
                        unsigned nb) {
    for (unsigned v = 0; v < nb * KI_PARTS; v++)
        for (unsigned i = 0; i < nq; i++) {
            vi *at = &sum[v / KI_PARTS][i];
            if (bytes & HIGH) *at = vi_add_part128(*at, v % KI_PARTS, p->high[v][i]);
            if (bytes & LOW) *at = vi_add_part(*at, v % KI_PARTS, p->low[v][i]);
        }
}

/* A quad of codes of each part of nb vectors times the bytes at `at` of nq rows. */
KI_INLINE void dot_quad(part_dots *p, const attn_scratch *s, size_t at, unsigned bytes, unsigned nq,
                        unsigned nb, const vp *codes) {
    for (unsigned i = 0; i < nq; i++, at += BYTE_ROW) {
        vp x = codes[0], y = x;
        if (bytes & HIGH) x = vp_set_bytes(s->high + at);
        if (bytes & LOW) y = vp_set_bytes(s->low + at);
        for (unsigned v = 0; v < nb * KI_PARTS; v++) {
            if (bytes & HIGH) p->high[v][i] = vs_dot(p->high[v][i], codes[v], x);
            if (bytes & LOW) p->low[v][i] = vs_dot(p->low[v][i], codes[v], y);
        }
    }
}

/* Word w of each of nb vectors from `vector` on times nq rows from byte `at` of the rows on. */
KI_INLINE void dot_word(part_dots *p, const attn_scratch *s, size_t at, unsigned bytes, unsigned nq,
                        unsigned nb, const code_rows *c, unsigned vector, unsigned w,
                        unsigned bits) {
    const unsigned in_word = word_bits(bits), n = nb * KI_PARTS;
    const vp mask = vp_set(in_word == 2 ? 0x03030303 : 0x0f0f0f0f);
    vp word[2], top[2];
    for (unsigned v = 0; v < n; v++) {
        const size_t offset = (vector + v / KI_PARTS) * c->apart;
        word[v] = vp_load(c->words + w * c->stride + offset, v % KI_PARTS);
        if (bits != 3) continue;
        top[v] = vp_load(c->third + w / 2 * c->stride + offset, v % KI_PARTS);
        top[v] = vp_shl(vp_field(top[v], 4 * (w % 2), vp_set(0x0f0f0f0f)), 2);
    }
    for (unsigned k = 0; k < 8 / in_word; k++, at += 16) { /* fold_at */
        vp codes[2];
        for (unsigned v = 0; v < n; v++) {
            codes[v] = vp_field(word[v], in_word * k, mask);
            if (bits == 3) codes[v] = vp_or(codes[v], vp_field(top[v], k, vp_set(0x04040404)));
        }
        dot_quad(p, s, at, bytes, nq, nb, codes);
    }
}

/* All words, of which at most KI_NARROW_SUMS quads are added up before they are widened. Where the
 * first of four words has its bytes is fold_at's; the others' are near. */
KI_INLINE void dot_words(vi sum[2][QUERY_BLOCK], attn_scratch *s, const code_rows *c,
                         unsigned vector, unsigned bytes, unsigned nq, unsigned nb, unsigned bits) {
    const unsigned per_word = 8 / word_bits(bits), at_once = KI_NARROW_SUMS(bits) / per_word;
    for (unsigned w0 = 0; w0 < c->n_words; w0 += at_once) {
        const unsigned end = KI_MIN(w0 + at_once, c->n_words);
        part_dots p;
        part_clear(&p, nq, nb);
        for (unsigned w4 = w0; w4 < end; w4 += 4) {
            const size_t at = (size_t)c->row * BYTE_ROW + fold_at(w4 * per_word);
            for (unsigned j = 0; j < KI_MIN(end - w4, 4u); j++) {
                const unsigned near = per_word == 4 ? j * 4 : j % 2 * 32 + j / 2 * 4;
                if (bytes & HIGH) ask_ahead(s);
                dot_word(&p, s, at + near, bytes, nq, nb, c, vector, w4 + j, bits);
            }
        }
        part_add(sum, &p, bytes, nq, nb);
    }
}

/* The same for codes of 8 bits. */
KI_INLINE void dot_bytes(vi sum[2][QUERY_BLOCK], attn_scratch *s, const code_rows *c,
                         unsigned vector, unsigned nq) {
    vi high[QUERY_BLOCK], low[QUERY_BLOCK];
    for (unsigned i = 0; i < nq; i++) high[i] = low[i] = vi_set(0);
    for (unsigned w = 0; w < c->n_words; w++) {
        vb codes = vi_load((const int32_t *)c->words + w * c->stride + vector * c->apart);
        size_t at = (size_t)c->row * BYTE_ROW + fold_at(w);
        ask_ahead(s);
        for (unsigned i = 0; i < nq; i++, at += BYTE_ROW) {
            high[i] = vi_dot_u8(high[i], codes, vi_set_bytes(s->high + at));
            low[i] = vi_dot_u8(low[i], codes, vi_set_bytes(s->low + at));
        }
    }
    for (unsigned i = 0; i < nq; i++) sum[0][i] = vi_add(vi_shl(high[i], 7), low[i]);
}

/* The same for 2 bits in one stream of quads (plus.h), n_words of them a vector, from quad `first`
 * on; at most KI_NARROW_SUMS(2). */
KI_INLINE void dot_stream(vi sum[2][QUERY_BLOCK], const attn_scratch *s, const code_rows *c,
                          unsigned vector, unsigned bytes, unsigned nq, unsigned nb) {
    part_dots p;
    part_clear(&p, nq, nb);
    for (unsigned i = 0; i < c->n_words; i++) {
        vp codes[2];
        for (unsigned v = 0; v < nb * KI_PARTS; v++) {
            unsigned quad = c->first + (vector + v / KI_PARTS) * c->n_words + i;
            vp word = vp_load(c->words + quad / 4 * c->stride, v % KI_PARTS);
            codes[v] = vp_field(word, 2 * (quad % 4), vp_set(0x03030303));
        }
        dot_quad(&p, s, (size_t)c->row * BYTE_ROW + fold_at(i), bytes, nq, nb, codes);
    }
    part_add(sum, &p, bytes, nq, nb);
}

KI_INLINE void dot_pass(vi sum[2][QUERY_BLOCK], attn_scratch *s, const code_rows *c,
                        unsigned vector, unsigned bytes, unsigned nq, unsigned nb, unsigned bits) {
    if (bits == STREAM) dot_stream(sum, s, c, vector, bytes, nq, nb);
    else dot_words(sum, s, c, vector, bytes, nq, nb, bits);
}

/* step * (integers . codes) + bias of each vector and row. */
KI_INLINE void dot_rows(attn_scratch *s, const code_rows *c, unsigned nq, unsigned nb,
                        unsigned bits) {
    for (unsigned vector = 0; vector < c->n_vectors; vector += nb) {
        vi sum[2][QUERY_BLOCK];
        for (unsigned b = 0; b < nb; b++)
            for (unsigned i = 0; i < nq; i++) sum[b][i] = vi_set(0);
        if (bits == 8) dot_bytes(sum, s, c, vector, nq);
        else if (KI_PARTS == 1) dot_pass(sum, s, c, vector, HIGH | LOW, nq, nb, bits);
        else {
            dot_pass(sum, s, c, vector, HIGH, nq, nb, bits);
            dot_pass(sum, s, c, vector, LOW, nq, nb, bits);
        }
        for (unsigned i = 0; i < nq; i++) {
            vf step = vf_set(s->step[c->row + i]), bias = vf_set(s->bias[c->row + i]);
            for (unsigned b = 0; b < nb; b++) {
                float *out = c->out[i] + (vector + b) * 16;
                vf v = vf_fma(vf_from_vi(sum[b][i]), step, bias);
                vf_store(out, c->add ? vf_add(vf_load(out), v) : v);
            }
        }
    }
}

/* dot_rows with constants: each case is a function with its own loop. */
typedef void dot_fn(attn_scratch *s, const code_rows *c);
#define DOT_KERNEL(bits, nb, nq)                                                                   \
    static KI_APART void dot_##bits##_##nb##_##nq(attn_scratch *s, const code_rows *c) {           \
        dot_rows(s, c, nq, nb, bits);                                                              \
    }
#define DOT_KERNELS(bits, nb)                                                                      \
    DOT_KERNEL(bits, nb, 1)                                                                        \
    DOT_KERNEL(bits, nb, 2)                                                                        \
    DOT_KERNEL(bits, nb, 3)                                                                        \
    DOT_KERNEL(bits, nb, 4)                                                                        \
    static dot_fn *const dot_##bits##_##nb[QUERY_BLOCK] = {                                        \
        dot_##bits##_##nb##_1, dot_##bits##_##nb##_2, dot_##bits##_##nb##_3,                       \
        dot_##bits##_##nb##_4};
DOT_KERNELS(2, 1)
DOT_KERNELS(3, 1)
DOT_KERNELS(4, 1)
DOT_KERNELS(8, 1)
DOT_KERNELS(STREAM, 1)
#if KI_DOT_VECTORS == 2
DOT_KERNELS(2, 2)
DOT_KERNELS(3, 2)
DOT_KERNELS(STREAM, 2)
#endif

/* Vectors that a kernel takes at once, of groups of `group` tokens or channels. */
static unsigned vectors_at_once(unsigned bits, unsigned group) {
    return bits <= 3 && group % 32 == 0 ? KI_DOT_VECTORS : 1;
}
static dot_fn *dot_kernel(unsigned bits, unsigned nb, unsigned nq) {
#if KI_DOT_VECTORS == 2
    if (nb == 2) return (bits == 2 ? dot_2_2 : bits == 3 ? dot_3_2 : dot_STREAM_2)[nq - 1];
#else
    (void)nb;
#endif
    return (bits == 2   ? dot_2_1
            : bits == 3 ? dot_3_1
            : bits == 4 ? dot_4_1
            : bits == 8 ? dot_8_1
                        : dot_STREAM_1)[nq - 1];
}

/* ---- scores ---- */

/* p[t] for one 16-token block of exact keys and nq <= QUERY_BLOCK queries: one chain of fused
 * multiply-adds over the channels, so the order is the same however many queries share the loads.
 */
KI_INLINE void exact_scores(float *const *p, const float *const *q, unsigned nq,
                            const uint16_t *block, unsigned head_dim) {
    vf sum[QUERY_BLOCK];
    for (unsigned i = 0; i < nq; i++) sum[i] = vf_set(0.0f);
    for (unsigned c = 0; c < head_dim; c++) {
        vf k = vf_load_f16(block + (size_t)c * 16);
        for (unsigned i = 0; i < nq; i++) sum[i] = vf_fma(vf_set(q[i][c]), k, sum[i]);
    }
    for (unsigned i = 0; i < nq; i++) vf_store(p[i], sum[i]);
}

static void exact_scores_n(float *const *p, const float *const *q, unsigned nq,
                           const uint16_t *block, unsigned head_dim) {
    if (nq == 1) exact_scores(p, q, 1, block, head_dim);
    else if (nq == 2) exact_scores(p, q, 2, block, head_dim);
    else if (nq == 3) exact_scores(p, q, 3, block, head_dim);
    else exact_scores(p, q, 4, block, head_dim);
}

/* Tokens whose keys a query reads from the codes: [sink_end or first, k_exact or end), never
 * empty-checked twice. */
static unsigned packed_from(const ki_attn_query *q) {
    return q->sink_end > q->first ? q->sink_end : q->first;
}
static unsigned packed_to(const ki_attn_query *q, unsigned exact) {
    return exact < q->end ? exact : q->end;
}

/* All packed keys of nq queries, blocks [from / 16, to / 16): as many groups are folded at a time
 * as there are rows for. The high bits of wide channels have rows of their own, behind the others'.
 */
static void score_packed(const ki_attn_tile *t, attn_scratch *s, unsigned from, unsigned to,
                         unsigned nq) {
    const bool wide = t->k_bits == 2 && t->k_wide;
    const unsigned n = t->head_dim, bits = t->k_bits, at_once = FOLD_ROWS / nq / (wide ? 2 : 1);
    const unsigned end = (to + t->k_group - 1) / t->k_group;
    const unsigned nb = vectors_at_once(bits, t->k_group), n_quads = n / 16;
    dot_fn *dot = dot_kernel(bits, nb, nq), *dot_wide = dot_kernel(STREAM, nb, nq);
    code_rows c = {.n_words = n * bits / 32, .stride = 16};
    code_rows w = {.words = t->k_wide, .n_words = n_quads, .stride = 16, .add = true};
    c.apart = (size_t)c.n_words * 16;
    for (unsigned g0 = from / t->k_group; g0 < end; g0 += at_once) {
        unsigned n_groups = KI_MIN(end - g0, at_once);
        fold_rows(s, s->q, nq, t->k_scale + (size_t)g0 * n, t->k_zero + (size_t)g0 * n, n_groups, n,
                  bits, t->k_list);
        for (unsigned g = 0; g < n_groups; g++) {
            unsigned token = (g0 + g) * t->k_group, stop = KI_MIN(token + t->k_group, to);
            for (unsigned i = 0; i < nq; i++) w.out[i] = c.out[i] = s->p + i * ROW + token;
            c.row = g * nq;
            w.row = (n_groups + g) * nq;
            c.words = t->k_words + (size_t)token * c.n_words;
            w.first = token / 16 * n_quads;
            w.n_vectors = c.n_vectors = (stop - token + 15) / 16;
            dot(s, &c);
            if (wide) dot_wide(s, &w);
        }
    }
}

static void score_packed_blocks(const ki_attn_tile *t, attn_scratch *s, ki_attn_query *qs,
                                unsigned nq) {
    unsigned from = KI_PAGE_TOKENS, to = 0;
    for (unsigned i = 0; i < nq; i++) {
        unsigned a = packed_from(&qs[i]), b = packed_to(&qs[i], qs[i].k_exact);
        if (a < b) from = KI_MIN(from, a), to = KI_MAX(to, b);
        memcpy(s->q + i * ROW, qs[i].q, t->head_dim * sizeof(float));
    }
    if (from < to) score_packed(t, s, from, to, nq);
}

/* A block whose first tokens are sinks and whose others a query reads from the codes: only the
 * sinks' scores are replaced. */
static void score_sink_lanes(const ki_attn_tile *t, float *p, const ki_attn_query *q, unsigned b) {
    float scores[16], *out = scores;
    exact_scores(&out, &q->q, 1, t->k_blocks[b], t->head_dim);
    memcpy(p, scores, (q->sink_end - b * 16) * sizeof *p);
}

/* After the packed blocks: a query's exact blocks overwrite what the neighbours' packed range left
 * there. */
static void score_exact_blocks(const ki_attn_tile *t, const attn_scratch *s, ki_attn_query *qs,
                               unsigned nq) {
    for (unsigned b = 0; b < KI_TILE_BLOCKS; b++) {
        float *p[QUERY_BLOCK];
        const float *q[QUERY_BLOCK];
        unsigned n = 0;
        for (unsigned i = 0; i < nq; i++) {
            bool visible = b * 16 < qs[i].end && (b + 1) * 16 > qs[i].first;
            if (!visible || (b * 16 >= qs[i].sink_end && (b + 1) * 16 <= qs[i].k_exact)) continue;
            p[n] = s->p + i * ROW + b * 16;
            if ((b + 1) * 16 > qs[i].sink_end && (b + 1) * 16 <= qs[i].k_exact)
                score_sink_lanes(t, p[n], &qs[i], b);
            else q[n++] = qs[i].q;
        }
        if (n) exact_scores_n(p, q, n, t->k_blocks[b], t->head_dim);
    }
}

/* Scores to weights: hides what is not visible, moves the state to the new maximum. */
static void softmax_update(ki_attn_query *q, float *p, unsigned head_dim) {
    for (unsigned t = 0; t < q->first; t++) p[t] = -INFINITY;
    for (unsigned t = q->end; t < KI_PAGE_TOKENS; t++) p[t] = -INFINITY;
    vf largest = vf_load(p);
    for (unsigned t = 16; t < KI_PAGE_TOKENS; t += 16) largest = vf_max2(vf_load(p + t), largest);
    float m = vf_max(largest);
    m = m > q->m ? m : q->m;
    vf sum = vf_set(0.0f), minus_m = vf_set(-m);
    for (unsigned t = 0; t < KI_PAGE_TOKENS; t += 16) {
        vf w = vf_exp_negative(vf_add(vf_load(p + t), minus_m));
        vf_store(p + t, w);
        sum = vf_add(sum, w);
    }
    float shrink = m > q->m ? exp1(q->m - m) : 1.0f;
    q->l = fma1(q->l, shrink, vf_sum(sum));
    q->m = m;
    if (shrink == 1.0f) return;
    for (unsigned c = 0; c < head_dim; c += 16)
        vf_store(q->acc + c, vf_mul(vf_load(q->acc + c), vf_set(shrink)));
}

/* ---- values ---- */

/* acc += the packed values of tokens [0, to) times p, which is 0 where a query does not read codes;
 * folded over all 128 tokens, as many groups of channels at a time as there are rows for. */
static void add_packed(const ki_attn_tile *t, attn_scratch *s, const float *p, float *const *acc,
                       unsigned to, unsigned nq) {
    const unsigned n = KI_PAGE_TOKENS, bits = t->v_bits, at_once = FOLD_ROWS / nq;
    const unsigned end = t->head_dim / t->v_group, nb = vectors_at_once(bits, t->v_group);
    dot_fn *dot = dot_kernel(bits, nb, nq);
    code_rows c = {.apart = 16, .stride = t->head_dim, .n_vectors = t->v_group / 16, .add = true};
    c.n_words = (to * word_bits(bits) + 31) / 32;
    for (unsigned g0 = 0; g0 < end; g0 += at_once) {
        unsigned n_groups = KI_MIN(end - g0, at_once);
        fold_rows(s, p, nq, t->v_scale + (size_t)g0 * n,
                  t->v_zero ? t->v_zero + (size_t)g0 * n : NULL, n_groups, n, bits, NULL);
        for (unsigned g = 0; g < n_groups; g++) {
            const unsigned at = (g0 + g) * t->v_group;
            for (unsigned i = 0; i < nq; i++) c.out[i] = acc[i] + at;
            c.row = g * nq;
            c.words = t->v_words + at;
            if (bits == 3) c.third = t->v_third + at;
            dot(s, &c);
        }
    }
}

/* Values of nq queries of which some read codes; weights of tokens not read are left out. */
static void add_packed_values(const ki_attn_tile *t, attn_scratch *s, const ki_attn_query *qs,
                              unsigned nq) {
    unsigned to = 0;
    bool whole = true;
    float *acc[QUERY_BLOCK];
    for (unsigned i = 0; i < nq; i++) {
        unsigned first = packed_from(&qs[i]), end = packed_to(&qs[i], qs[i].v_exact);
        acc[i] = qs[i].acc;
        if (first < end) to = KI_MAX(to, end);
        whole = whole && first == 0 && end == KI_PAGE_TOKENS;
    }
    if (!to) return;
    for (unsigned i = 0; !whole && i < nq; i++) {
        unsigned first = packed_from(&qs[i]), end = packed_to(&qs[i], qs[i].v_exact);
        memset(s->masked + i * ROW, 0, KI_PAGE_TOKENS * sizeof(float));
        if (first < end)
            memcpy(s->masked + i * ROW + first, s->p + i * ROW + first,
                   (end - first) * sizeof(float));
    }
    const float *p = whole ? s->p : s->masked;
    add_packed(t, s, p, acc, to, nq);
}

/* acc[c..] += p[t] v[t][c..] for tokens [from, to) in their order, for nq queries and n_vectors
 * vectors of channels: chains that run side by side, each the same however many share a load. */
KI_INLINE void exact_values(const ki_attn_tile *t, float *const *acc, const float *const *p,
                            unsigned c, unsigned from, unsigned to, unsigned nq,
                            unsigned n_vectors) {
    vf sum[4][QUERY_BLOCK];
    for (unsigned i = 0; i < nq; i++)
        for (unsigned j = 0; j < n_vectors; j++) sum[j][i] = vf_load(acc[i] + c + j * 16);
    for (unsigned at = from; at < to; at++) {
        const uint16_t *row = t->v_blocks[at / 16] + (size_t)(at % 16) * t->head_dim + c;
        for (unsigned j = 0; j < n_vectors; j++) {
            vf v = vf_load_f16(row + j * 16);
            for (unsigned i = 0; i < nq; i++) sum[j][i] = vf_fma(vf_set(p[i][at]), v, sum[j][i]);
        }
    }
    for (unsigned i = 0; i < nq; i++)
        for (unsigned j = 0; j < n_vectors; j++) vf_store(acc[i] + c + j * 16, sum[j][i]);
}

/* 64 channels, as many at a time as there are registers for. */
KI_INLINE void exact_values_64(const ki_attn_tile *t, float *const *acc, const float *const *p,
                               unsigned c, unsigned from, unsigned to, unsigned nq) {
    const unsigned n = KI_PARTS == 1 || nq == 1 ? 4 : nq == 2 ? 2 : 1;
    for (unsigned j = 0; j < 4; j += n) exact_values(t, acc, p, c + j * 16, from, to, nq, n);
}

static void add_exact_range(const ki_attn_tile *t, float *const *acc, const float *const *p,
                            unsigned nq, unsigned from, unsigned to) {
    unsigned c = 0;
    if (from >= to) return;
    for (; c + 64 <= t->head_dim; c += 64) {
        if (nq == 4) exact_values_64(t, acc, p, c, from, to, 4);
        else if (nq == 3) exact_values_64(t, acc, p, c, from, to, 3);
        else if (nq == 2) exact_values_64(t, acc, p, c, from, to, 2);
        else exact_values_64(t, acc, p, c, from, to, 1);
    }
    for (; c < t->head_dim; c += 16)
        for (unsigned i = 0; i < nq; i++) exact_values(t, acc + i, p + i, c, from, to, 1, 1);
}

static unsigned exact_sinks_end(const ki_attn_query *q) {
    return KI_MIN(KI_MAX(q->sink_end, q->first), q->end);
}
static unsigned exact_tail(const ki_attn_query *q) {
    return KI_MAX(KI_MAX(q->v_exact, exact_sinks_end(q)), q->first);
}

/* Exact values of nq queries: sinks, then the tail. Of the tail all share the tokens that all read;
 * what is before and after goes query by query, so each adds its tokens in their order. */
static void add_exact_values(const ki_attn_tile *t, const attn_scratch *s, ki_attn_query *qs,
                             unsigned nq) {
    float *acc[QUERY_BLOCK];
    const float *p[QUERY_BLOCK];
    unsigned from = 0, to = KI_PAGE_TOKENS;
    for (unsigned i = 0; i < nq; i++) {
        acc[i] = qs[i].acc;
        p[i] = s->p + i * ROW;
        from = KI_MAX(from, exact_tail(&qs[i]));
        to = KI_MIN(to, (unsigned)qs[i].end);
    }
    to = KI_MAX(from, to);
    for (unsigned i = 0; i < nq; i++) {
        if (qs[i].first >= qs[i].end) continue;
        add_exact_range(t, acc + i, p + i, 1, qs[i].first, exact_sinks_end(&qs[i]));
        add_exact_range(t, acc + i, p + i, 1, exact_tail(&qs[i]), KI_MIN(from, qs[i].end));
    }
    add_exact_range(t, acc, p, nq, from, to);
    for (unsigned i = 0; i < nq; i++)
        if (qs[i].first < qs[i].end)
            add_exact_range(t, acc + i, p + i, 1, KI_MAX(to, exact_tail(&qs[i])), qs[i].end);
}

/* ---- the tile ---- */

/* Whether each query reads all keys, or values, that it sees of the tile from codes, as it does in
 * most of a long cache. */
static bool all_packed(const ki_attn_query *qs, unsigned nq, bool keys) {
    bool all = true;
    for (unsigned i = 0; i < nq; i++)
        all = all && !qs[i].sink_end && (keys ? qs[i].k_exact : qs[i].v_exact) >= KI_PAGE_TOKENS;
    return all;
}

static void attn_tile_simd(const ki_attn_tile *t, ki_attn_query *queries, unsigned n_queries,
                           void *memory) {
    attn_scratch s;
    scratch_carve(&s, memory);
    s.next = t->next;
    s.next_end = s.next + t->next_bytes;
    for (unsigned q0 = 0; q0 < n_queries; q0 += QUERY_BLOCK) {
        unsigned n = KI_MIN(n_queries - q0, (unsigned)QUERY_BLOCK);
        ki_attn_query *qs = queries + q0;
        score_packed_blocks(t, &s, qs, n);
        if (!all_packed(qs, n, true)) score_exact_blocks(t, &s, qs, n);
        for (unsigned i = 0; i < n; i++)
            if (qs[i].first < qs[i].end) softmax_update(&qs[i], s.p + i * ROW, t->head_dim);
        add_packed_values(t, &s, qs, n);
        if (!all_packed(qs, n, false)) add_exact_values(t, &s, qs, n);
    }
}

static void attn_merge_simd(float *m, float *l, float *acc, float m2, float l2, const float *acc2,
                            unsigned head_dim) {
    float top = *m > m2 ? *m : m2;
    if (top == -INFINITY) return; /* nothing visible in either range */
    float w1 = exp1(*m - top), w2 = exp1(m2 - top);
    *l = fma1(*l, w1, l2 * w2);
    *m = top;
    for (unsigned c = 0; c < head_dim; c += 16)
        vf_store(acc + c,
                 vf_fma(vf_load(acc + c), vf_set(w1), vf_mul(vf_load(acc2 + c), vf_set(w2))));
}

static void attn_finish_simd(float *out, float l, const float *acc, unsigned head_dim) {
    vf inverse = vf_set(l > 0 ? 1.0f / l : 0.0f);
    for (unsigned c = 0; c < head_dim; c += 16)
        vf_store(out + c, vf_mul(vf_load(acc + c), inverse));
}
