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

/* ---- folding: x * scale as integers ---- */

/* x s becomes 15 bits in two signed bytes, 128 high + low. One byte, which would save half of the
 * products, was tried and shows in the logits (SPEED.md). */
#define FOLD_LIMIT (127.0f * 128)

/* Where the bytes of quad i (elements 4 i .. 4 i + 3) stand in a row: vb_split15's order. */
KI_INLINE unsigned fold_at(unsigned i) { return i / 16 * 64 + i % 4 * 16 + i % 16 / 4 * 4; }

/* Integers of n values of one row, n a multiple of 64; returns their sum a lane. */
KI_INLINE vi fold_row(int8_t *high, int8_t *low, const float *x, float inverse, unsigned n) {
    vi high_sum = vi_set(0), low_sum = vi_set(0), ones = vi_set(0x01010101);
    for (unsigned c = 0; c < n; c += 64) {
        vi q[4];
        vb h, l;
        for (unsigned k = 0; k < 4; k++)
            q[k] = vf_to_vi(vf_mul(vf_load(x + c + k * 16), vf_set(inverse)));
        vb_split15(&h, &l, q[0], q[1], q[2], q[3]);
        vb_store(high + c, h);
        vb_store(low + c, l);
        high_sum = vi_dot_u7(high_sum, ones, h);
        low_sum = vi_dot_u7(low_sum, ones, l);
    }
    return vi_add(vi_shl(high_sum, 7), low_sum);
}

/* One group of nq rows x, n values each: x s to out, x . (z + centre s), and the largest |x s| a
 * lane. Past n come zeros up to a multiple of 64. Without a zero point z is -centre s. */
KI_INLINE void fold_group(float *out, vf *bias, vf *largest, const float *x, unsigned nq,
                          const uint16_t *scale, const uint16_t *zero, unsigned n, float centre) {
    vf sum[QUERY_BLOCK], top[QUERY_BLOCK];
    unsigned c = 0;
    for (unsigned i = 0; i < nq; i++) sum[i] = top[i] = vf_set(0.0f);
    for (; c < n; c += 16) {
        vf s = vf_load_f16(scale + c), z = vf_set(0.0f);
        if (zero) z = vf_fma(s, vf_set(centre), vf_load_f16(zero + c));
        for (unsigned i = 0; i < nq; i++) {
            vf v = vf_load(x + i * ROW + c), f = vf_mul(v, s);
            vf_store(out + i * ROW + c, f);
            sum[i] = vf_fma(v, z, sum[i]);
            top[i] = vf_max2(vf_abs(f), top[i]);
        }
    }
    for (; c % 64; c += 16)
        for (unsigned i = 0; i < nq; i++) vf_store(out + i * ROW + c, vf_set(0.0f));
    for (unsigned i = 0; i < nq; i++) bias[i] = sum[i], largest[i] = top[i];
}

/* 4 x s of the wide channels, from rows x s [nq][256]: the high bits' side of fold_group. */
KI_INLINE void fold_wide(float *out, vf *bias, vf *largest, const float *xs, unsigned nq,
                         const uint8_t *list, unsigned n_wide, float centre) {
    for (unsigned i = 0; i < nq; i++, out += ROW, xs += ROW) {
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
 * integer rounded to zero still weighs its share. With a list of wide channels there is one group,
 * and row nq + i is for the high bits of query i. */
KI_INLINE void fold_rows(attn_scratch *s, const float *x, unsigned nq, const uint16_t *scale,
                         const uint16_t *zero, unsigned n_groups, unsigned n, unsigned bits,
                         const uint8_t *list) {
    const float centre = (float)((1u << bits) - 1) / 2;
    const unsigned n_low = n_groups * nq, n_rows = list ? n_low + nq : n_low;
    vf bias[FOLD_ROWS], largest[FOLD_ROWS];
    float inverse[FOLD_ROWS];
    for (unsigned r = n_rows; r < FOLD_ROWS; r++) bias[r] = largest[r] = vf_set(0.0f);
    for (unsigned g = 0; g < n_groups; g++)
        fold_group(s->x + g * nq * ROW, bias + g * nq, largest + g * nq, x, nq,
                   scale + (size_t)g * n, zero ? zero + (size_t)g * n : NULL, n, centre);
    if (list)
        fold_wide(s->x + n_low * ROW, bias + n_low, largest + n_low, s->x, nq, list, n / 4, centre);
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

/* Sums of the codes of nb <= 2 vectors of words times nq rows, a plane each. */
typedef struct dots {
    vi high[2][QUERY_BLOCK], low[2][QUERY_BLOCK];
} dots;

/* Three lines of the next page, which is what a page has for a word of two vectors at 2 bits in
 * groups of 32: all at once would wait for one another. */
KI_INLINE void ask_ahead(attn_scratch *s) {
    if (s->next >= s->next_end) return;
    for (int i = 0; i < 3; i++) __builtin_prefetch(s->next + i * 64, 0, 2);
    s->next += 3 * 64;
}

/* Bits of a code that stand in the words; the third of three has a plane of its own. */
KI_INLINE unsigned word_bits(unsigned bits) { return bits == 3 ? 2 : bits; }

/* Sums of one part of nb vectors times nq rows. */
typedef struct part_dots {
    vs high[2][QUERY_BLOCK], low[2][QUERY_BLOCK];
} part_dots;

KI_INLINE void dots_clear(dots *sum, unsigned nq, unsigned nb) {
    for (unsigned b = 0; b < nb; b++)
        for (unsigned i = 0; i < nq; i++) sum->high[b][i] = sum->low[b][i] = vi_set(0);
}
KI_INLINE void part_clear(part_dots *p, unsigned nq, unsigned nb) {
    for (unsigned b = 0; b < nb; b++)
        for (unsigned i = 0; i < nq; i++) p->high[b][i] = p->low[b][i] = vs_zero();
}
KI_INLINE void dots_add(dots *sum, unsigned part, const part_dots *p, unsigned nq, unsigned nb) {
    for (unsigned b = 0; b < nb; b++)
        for (unsigned i = 0; i < nq; i++) {
            sum->high[b][i] = vi_add_part(sum->high[b][i], part, p->high[b][i]);
            sum->low[b][i] = vi_add_part(sum->low[b][i], part, p->low[b][i]);
        }
}

/* A quad of codes of each of nb vectors times the bytes at `at` of nq rows. */
KI_INLINE void dot_quad(part_dots *p, const attn_scratch *s, size_t at, unsigned nq, unsigned nb,
                        const vp *codes) {
    for (unsigned i = 0; i < nq; i++) {
        const size_t row = at + i * BYTE_ROW;
        vp x = vp_set_bytes(s->high + row), y = vp_set_bytes(s->low + row);
        for (unsigned b = 0; b < nb; b++) {
            p->high[b][i] = vs_dot(p->high[b][i], codes[b], x);
            p->low[b][i] = vs_dot(p->low[b][i], codes[b], y);
        }
    }
}

/* Words of codes: `words`, and `apart` from them those of the next vector, `stride` those of the
 * next word. third: of 3-bit codes, laid out as the words are, two of them to one. */
typedef struct code_plane {
    const uint32_t *words, *third;
    size_t apart, stride;
} code_plane;

/* Part of word w of each of nb vectors times nq rows from byte `at` of the planes on. */
KI_INLINE void dot_word(part_dots *p, const attn_scratch *s, size_t at, unsigned nq, unsigned nb,
                        const code_plane *c, unsigned w, unsigned part, unsigned bits) {
    const unsigned in_word = word_bits(bits);
    const vp mask = vp_set(in_word == 2 ? 0x03030303 : 0x0f0f0f0f);
    vp v[2], top[2];
    for (unsigned b = 0; b < nb; b++) {
        v[b] = vp_load(c->words + w * c->stride + b * c->apart, part);
        if (bits != 3) continue;
        top[b] = vp_load(c->third + w / 2 * c->stride + b * c->apart, part);
        top[b] = vp_shl(vp_field(top[b], 4 * (w % 2), vp_set(0x0f0f0f0f)), 2);
    }
    for (unsigned k = 0; k < 8 / in_word; k++, at += 16) { /* fold_at */
        vp codes[2];
        for (unsigned b = 0; b < nb; b++) {
            codes[b] = vp_field(v[b], in_word * k, mask);
            if (bits == 3) codes[b] = vp_or(codes[b], vp_field(top[b], k, vp_set(0x04040404)));
        }
        dot_quad(p, s, at, nq, nb, codes);
    }
}

/* Rows from `row` on, over n_words words, of which at most KI_NARROW_SUMS quads are added up before
 * they are widened. */
KI_INLINE void dot_words(dots *sum, attn_scratch *s, unsigned row, unsigned nq, unsigned nb,
                         const code_plane *c, unsigned n_words, unsigned bits) {
    const unsigned per_word = 8 / word_bits(bits), at_once = KI_NARROW_SUMS(bits) / per_word;
    const size_t at = (size_t)row * BYTE_ROW;
    dots_clear(sum, nq, nb);
    for (unsigned w0 = 0; w0 < n_words; w0 += at_once)
        for (unsigned part = 0; part < KI_PARTS; part++) {
            part_dots p;
            part_clear(&p, nq, nb);
            for (unsigned w = w0; w < KI_MIN(w0 + at_once, n_words); w++) {
                if (!part) ask_ahead(s);
                dot_word(&p, s, at + fold_at(w * per_word), nq, nb, c, w, part, bits);
            }
            dots_add(sum, part, &p, nq, nb);
        }
}

/* High bits of the wide channels of nb blocks of tokens from `block` on: quads in one stream
 * (plus.h), n_quads = D / 16 <= KI_NARROW_SUMS(2) a block. */
KI_INLINE void dot_wide(dots *sum, const attn_scratch *s, unsigned row, unsigned nq, unsigned nb,
                        const uint32_t *wide, unsigned block, unsigned n_quads) {
    dots_clear(sum, nq, nb);
    for (unsigned part = 0; part < KI_PARTS; part++) {
        part_dots p;
        part_clear(&p, nq, nb);
        for (unsigned i = 0; i < n_quads; i++) {
            vp codes[2];
            for (unsigned b = 0; b < nb; b++) {
                unsigned quad = (block + b) * n_quads + i;
                vp v = vp_load(wide + (size_t)(quad / 4) * 16, part);
                codes[b] = vp_field(v, 2 * (quad % 4), vp_set(0x03030303));
            }
            dot_quad(&p, s, (size_t)row * BYTE_ROW + fold_at(i), nq, nb, codes);
        }
        dots_add(sum, part, &p, nq, nb);
    }
}

/* The same for codes of 8 bits, one vector at a time. */
KI_INLINE void dot_bytes(dots *sum, attn_scratch *s, unsigned row, unsigned nq,
                         const uint32_t *words, size_t stride, unsigned n_words) {
    for (unsigned i = 0; i < nq; i++) sum->high[0][i] = sum->low[0][i] = vi_set(0);
    for (unsigned w = 0; w < n_words; w++, words += stride) {
        vb codes = vi_load((const int32_t *)words);
        size_t at = (size_t)row * BYTE_ROW + fold_at(w);
        ask_ahead(s);
        for (unsigned i = 0; i < nq; i++, at += BYTE_ROW) {
            sum->high[0][i] = vi_dot_u8(sum->high[0][i], codes, vi_set_bytes(s->high + at));
            sum->low[0][i] = vi_dot_u8(sum->low[0][i], codes, vi_set_bytes(s->low + at));
        }
    }
}

/* step * (integers . codes) + bias of row r, its i-th of dot_words for vector b. */
KI_INLINE vf fold_result(const attn_scratch *s, unsigned r, const dots *sum, unsigned b,
                         unsigned i) {
    vi all = vi_add(vi_shl(sum->high[b][i], 7), sum->low[b][i]);
    return vf_fma(vf_from_vi(all), vf_set(s->step[r]), vf_set(s->bias[r]));
}

/* f(..., nq, nb, bits) with constants: every case becomes its own loop. */
#define FOLD_NQ(f, nq, nb, bits, ...)                                                              \
    ((nq) == 1   ? f(__VA_ARGS__, 1, nb, bits)                                                     \
     : (nq) == 2 ? f(__VA_ARGS__, 2, nb, bits)                                                     \
     : (nq) == 3 ? f(__VA_ARGS__, 3, nb, bits)                                                     \
                 : f(__VA_ARGS__, 4, nb, bits))
#define FOLD_DISPATCH(f, nq, group, bits, ...)                                                     \
    ((bits) == 8    ? FOLD_NQ(f, nq, 1, 8, __VA_ARGS__)                                            \
     : (bits) == 4  ? FOLD_NQ(f, nq, 1, 4, __VA_ARGS__)                                            \
     : (group) % 32 ? FOLD_NQ(f, nq, 1, 2, __VA_ARGS__)                                            \
                    : FOLD_NQ(f, nq, KI_DOT_VECTORS, 2, __VA_ARGS__))

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

/* The high bits' share of the scores of nb blocks of tokens; its rows follow the low bits'. */
KI_INLINE void add_wide(const ki_attn_tile *t, const attn_scratch *s, unsigned token, unsigned nq,
                        unsigned nb) {
    dots sum;
    dot_wide(&sum, s, nq, nq, nb, t->k_wide, token / 16, t->head_dim / 16);
    for (unsigned i = 0; i < nq; i++)
        for (unsigned b = 0; b < nb; b++) {
            float *at = s->p + i * ROW + token + b * 16;
            vf_store(at, vf_add(vf_load(at), fold_result(s, nq + i, &sum, b, i)));
        }
}

/* All packed keys of nq queries, blocks [from / 16, to / 16): as many groups are folded at a time
 * as there are rows for. */
KI_INLINE void score_packed(const ki_attn_tile *t, attn_scratch *s, unsigned from, unsigned to,
                            unsigned nq, unsigned nb, unsigned bits) {
    const unsigned n = t->head_dim, n_words = n * bits / 32, at_once = FOLD_ROWS / nq;
    const unsigned end = (to + t->k_group - 1) / t->k_group;
    for (unsigned g0 = from / t->k_group; g0 < end; g0 += at_once) {
        unsigned n_groups = KI_MIN(end - g0, at_once);
        fold_rows(s, s->q, nq, t->k_scale + (size_t)g0 * n, t->k_zero + (size_t)g0 * n, n_groups, n,
                  bits, t->k_list);
        for (unsigned g = 0; g < n_groups; g++) {
            unsigned token = (g0 + g) * t->k_group, stop = KI_MIN(token + t->k_group, to);
            for (; token < stop; token += nb * 16) {
                const uint32_t *words = t->k_words + (size_t)token * n_words;
                dots sum;
                const code_plane c = {words, NULL, (size_t)n_words * 16, 16};
                if (bits == 8) dot_bytes(&sum, s, g * nq, nq, words, 16, n_words);
                else dot_words(&sum, s, g * nq, nq, nb, &c, n_words, bits);
                for (unsigned i = 0; i < nq; i++)
                    for (unsigned b = 0; b < nb; b++)
                        vf_store(s->p + i * ROW + token + b * 16,
                                 fold_result(s, g * nq + i, &sum, b, i));
                if (bits == 2 && t->k_wide) add_wide(t, s, token, nq, nb);
            }
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
    if (from < to) FOLD_DISPATCH(score_packed, nq, t->k_group, t->k_bits, t, s, from, to);
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
KI_INLINE void add_packed(const ki_attn_tile *t, attn_scratch *s, const float *p, float *const *acc,
                          unsigned to, unsigned nq, unsigned nb, unsigned bits) {
    const unsigned n = KI_PAGE_TOKENS, at_once = FOLD_ROWS / nq, end = t->head_dim / t->v_group;
    const unsigned n_words = (to * word_bits(bits) + 31) / 32;
    for (unsigned g0 = 0; g0 < end; g0 += at_once) {
        unsigned n_groups = KI_MIN(end - g0, at_once);
        fold_rows(s, p, nq, t->v_scale + (size_t)g0 * n,
                  t->v_zero ? t->v_zero + (size_t)g0 * n : NULL, n_groups, n, bits, NULL);
        for (unsigned g = 0; g < n_groups; g++) {
            unsigned c = (g0 + g) * t->v_group, stop = c + t->v_group;
            for (; c < stop; c += nb * 16) {
                dots sum;
                const code_plane plane = {t->v_words + c, bits == 3 ? t->v_third + c : NULL, 16,
                                          t->head_dim};
                if (bits == 8) dot_bytes(&sum, s, g * nq, nq, plane.words, t->head_dim, n_words);
                else dot_words(&sum, s, g * nq, nq, nb, &plane, n_words, bits);
                for (unsigned i = 0; i < nq; i++)
                    for (unsigned b = 0; b < nb; b++) {
                        float *at = acc[i] + c + b * 16;
                        vf v = fold_result(s, g * nq + i, &sum, b, i);
                        vf_store(at, vf_add(vf_load(at), v));
                    }
            }
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
    if (t->v_bits != 3) FOLD_DISPATCH(add_packed, nq, t->v_group, t->v_bits, t, s, p, acc, to);
    else if (t->v_group % 32) FOLD_NQ(add_packed, nq, 1, 3, t, s, p, acc, to);
    else FOLD_NQ(add_packed, nq, KI_DOT_VECTORS, 3, t, s, p, acc, to);
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
        score_exact_blocks(t, &s, qs, n);
        for (unsigned i = 0; i < n; i++)
            if (qs[i].first < qs[i].end) softmax_update(&qs[i], s.p + i * ROW, t->head_dim);
        add_packed_values(t, &s, qs, n);
        add_exact_values(t, &s, qs, n);
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
