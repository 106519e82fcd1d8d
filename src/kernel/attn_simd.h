/* attn_simd.h: the tile kernel of attn.h over sixteen lanes. Included once by each isa_<name>.c. */
#include "attn.h"
#include "simd.h"

enum { QUERY_BLOCK = 4 }; /* queries that share a loaded vector: 8 integer sums stay in registers */
#define QUANT_MAX 16256.0f /* 127 * 128: the largest integer of two signed bytes as used here */

/* Scratch of a worker, for nq queries:
 *   codes   [128][D] bytes     the unpacked codes of the keys, then of the values
 *   p       [nq][128] f32      scores, then weights
 *   high, low  [QUERY_BLOCK][max(D, 128)] bytes    a query's (or its weights') integers */
typedef struct attn_scratch {
    uint8_t *codes;
    float *p;
    int8_t *high[QUERY_BLOCK], *low[QUERY_BLOCK];
} attn_scratch;

static attn_scratch scratch_carve(void *memory, unsigned head_dim, unsigned n_queries) {
    attn_scratch s;
    uint8_t *at = memory;
    s.codes = at;
    at += (size_t)KI_PAGE_TOKENS * head_dim;
    s.p = (float *)at;
    at += (size_t)n_queries * KI_PAGE_TOKENS * sizeof(float);
    for (int i = 0; i < QUERY_BLOCK; i++) {
        s.high[i] = (int8_t *)at;
        s.low[i] = (int8_t *)at + KI_MAX_HEAD_DIM;
        at += (size_t)2 * KI_MAX_HEAD_DIM;
    }
    return s;
}

/* n_words vectors of 16 words to 32 / bits / 4 vectors of bytes each; bits is a constant at every
 * call. */
KI_INLINE void unpack_words(uint8_t *out, const uint32_t *words, size_t n_vectors, unsigned bits) {
    unsigned per_word = 8 / bits;
    vi mask = vi_set(bits == 2 ? 0x03030303 : bits == 4 ? 0x0f0f0f0f : -1);
    for (size_t w = 0; w < n_vectors; w++) {
        vi v = vi_load((const int32_t *)words + w * 16);
        for (unsigned k = 0; k < per_word; k++)
            vi_store((int32_t *)out + (w * per_word + k) * 16, vi_and(vi_shr(v, bits * k), mask));
    }
}

static void unpack_any(uint8_t *out, const uint32_t *words, size_t n_vectors, unsigned bits) {
    if (bits == 2) unpack_words(out, words, n_vectors, 2);
    else if (bits == 4) unpack_words(out, words, n_vectors, 4);
    else unpack_words(out, words, n_vectors, 8);
}

/* Bytes of the values must be [t / 4][c][t % 4]; a word vector holds 32 / bits tokens of 16
 * channels, so its k-th part belongs to token quad k of the word, D channels apart. */
KI_INLINE void unpack_value_words(uint8_t *out, const uint32_t *words, unsigned n_rows,
                                  unsigned head_dim, unsigned bits) {
    unsigned per_word = 8 / bits;
    vi mask = vi_set(bits == 2 ? 0x03030303 : bits == 4 ? 0x0f0f0f0f : -1);
    for (unsigned r = 0; r < n_rows; r++)
        for (unsigned c = 0; c < head_dim; c += 16) {
            vi v = vi_load((const int32_t *)words + (size_t)r * head_dim + c);
            for (unsigned k = 0; k < per_word; k++)
                vi_store((int32_t *)out + ((size_t)(r * per_word + k) * head_dim + c),
                         vi_and(vi_shr(v, bits * k), mask));
        }
}

static void unpack_values(uint8_t *out, const uint32_t *words, unsigned n_tokens, unsigned head_dim,
                          unsigned bits) {
    unsigned n = 32 / bits, n_rows = (n_tokens + n - 1) / n;
    if (bits == 2) unpack_value_words(out, words, n_rows, head_dim, 2);
    else if (bits == 4) unpack_value_words(out, words, n_rows, head_dim, 4);
    else unpack_value_words(out, words, n_rows, head_dim, 8);
}

/* x [n] to 15-bit integers in two bytes: x = step (128 high + low). Returns the step; n % 16 == 0.
 */
KI_INLINE float quantize_15(int8_t *high, int8_t *low, const float *x, unsigned n) {
    vf largest = vf_set(0.0f);
    for (unsigned i = 0; i < n; i += 16) largest = vf_max2(vf_abs(vf_load(x + i)), largest);
    float max = vf_max(largest);
    if (!(max > 1e-30f)) { /* below that 1 / step would overflow; it weighs nothing */
        memset(high, 0, n);
        memset(low, 0, n);
        return 0.0f;
    }
    vf inverse = vf_set(QUANT_MAX / max);
    for (unsigned i = 0; i < n; i += 16) {
        vi q = vf_to_vi(vf_mul(vf_load(x + i), inverse));
        vi h = vi_sar(vi_add(q, vi_set(64)), 7);
        vi_store_i8(high + i, h);
        vi_store_i8(low + i, vi_sub(q, vi_shl(h, 7)));
    }
    return max / QUANT_MAX;
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

/* The same for a block of packed keys of one group: integers first, then step * sum + q.z. */
KI_INLINE void packed_scores(float *const *p, const attn_scratch *s, const float *step,
                             const float *qz, unsigned nq, const uint8_t *codes, unsigned head_dim,
                             bool wide) {
    vi high[QUERY_BLOCK], low[QUERY_BLOCK];
    for (unsigned i = 0; i < nq; i++) high[i] = low[i] = vi_set(0);
    for (unsigned c = 0; c < head_dim; c += 4) {
        vb k = vb_load(codes + (size_t)c * 16);
        for (unsigned i = 0; i < nq; i++) {
            vb h = vi_set_bytes(s->high[i] + c), l = vi_set_bytes(s->low[i] + c);
            high[i] = wide ? vi_dot_u8(high[i], k, h) : vi_dot_u7(high[i], k, h);
            low[i] = wide ? vi_dot_u8(low[i], k, l) : vi_dot_u7(low[i], k, l);
        }
    }
    for (unsigned i = 0; i < nq; i++) {
        vf sum = vf_from_vi(vi_add(vi_shl(high[i], 7), low[i]));
        vf_store(p[i], vf_fma(sum, vf_set(step[i]), vf_set(qz[i])));
    }
}

static void packed_scores_n(float *const *p, const attn_scratch *s, const float *step,
                            const float *qz, unsigned nq, const uint8_t *codes, unsigned head_dim,
                            unsigned bits) {
    if (bits == 8) {
        if (nq == 1) packed_scores(p, s, step, qz, 1, codes, head_dim, true);
        else if (nq == 2) packed_scores(p, s, step, qz, 2, codes, head_dim, true);
        else if (nq == 3) packed_scores(p, s, step, qz, 3, codes, head_dim, true);
        else packed_scores(p, s, step, qz, 4, codes, head_dim, true);
    } else {
        if (nq == 1) packed_scores(p, s, step, qz, 1, codes, head_dim, false);
        else if (nq == 2) packed_scores(p, s, step, qz, 2, codes, head_dim, false);
        else if (nq == 3) packed_scores(p, s, step, qz, 3, codes, head_dim, false);
        else packed_scores(p, s, step, qz, 4, codes, head_dim, false);
    }
}

/* q * s as integers, its step, and q . z, for one key group. */
static void fold_key_group(float *step, float *qz, int8_t *high, int8_t *low, const float *q,
                           const uint16_t *scale, const uint16_t *zero, unsigned head_dim) {
    float folded[KI_MAX_HEAD_DIM];
    vf z = vf_set(0.0f);
    for (unsigned c = 0; c < head_dim; c += 16) {
        vf v = vf_load(q + c);
        vf_store(folded + c, vf_mul(v, vf_load_f16(scale + c)));
        z = vf_fma(v, vf_load_f16(zero + c), z);
    }
    *step = quantize_15(high, low, folded, head_dim);
    *qz = vf_sum(z);
}

/* Tokens whose keys a query reads from the codes: [sink_end or first, k_exact or end), never
 * empty-checked twice. */
static unsigned packed_from(const ki_attn_query *q) {
    return q->sink_end > q->first ? q->sink_end : q->first;
}
static unsigned packed_to(const ki_attn_query *q, unsigned exact) {
    return exact < q->end ? exact : q->end;
}

static void score_packed_blocks(const ki_attn_tile *t, const attn_scratch *s, ki_attn_query *qs,
                                unsigned nq, unsigned q0) {
    unsigned from = KI_PAGE_TOKENS, to = 0;
    for (unsigned i = 0; i < nq; i++) {
        unsigned a = packed_from(&qs[i]), b = packed_to(&qs[i], qs[i].k_exact);
        if (a < b) from = KI_MIN(from, a), to = KI_MAX(to, b);
    }
    for (unsigned g = from / t->group; g * t->group < to; g++) {
        float step[QUERY_BLOCK], qz[QUERY_BLOCK], *p[QUERY_BLOCK];
        for (unsigned i = 0; i < nq; i++)
            fold_key_group(&step[i], &qz[i], s->high[i], s->low[i], qs[i].q,
                           t->k_scale + (size_t)g * t->head_dim,
                           t->k_zero + (size_t)g * t->head_dim, t->head_dim);
        for (unsigned b = g * t->group / 16; b * 16 < KI_MIN((g + 1) * t->group, to); b++) {
            for (unsigned i = 0; i < nq; i++)
                p[i] = s->p + (size_t)(q0 + i) * KI_PAGE_TOKENS + b * 16;
            packed_scores_n(p, s, step, qz, nq, s->codes + (size_t)b * 16 * t->head_dim,
                            t->head_dim, t->k_bits);
        }
    }
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
                               unsigned nq, unsigned q0) {
    for (unsigned b = 0; b < KI_TILE_BLOCKS; b++) {
        float *p[QUERY_BLOCK];
        const float *q[QUERY_BLOCK];
        unsigned n = 0;
        for (unsigned i = 0; i < nq; i++) {
            bool visible = b * 16 < qs[i].end && (b + 1) * 16 > qs[i].first;
            if (!visible || (b * 16 >= qs[i].sink_end && (b + 1) * 16 <= qs[i].k_exact)) continue;
            p[n] = s->p + (size_t)(q0 + i) * KI_PAGE_TOKENS + b * 16;
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
        vf w = vf_exp(vf_add(vf_load(p + t), minus_m));
        vf_store(p + t, w);
        sum = vf_add(sum, w);
    }
    float shrink = exp1(q->m - m);
    q->l = fma1(q->l, shrink, vf_sum(sum));
    q->m = m;
    for (unsigned c = 0; c < head_dim; c += 16)
        vf_store(q->acc + c, vf_mul(vf_load(q->acc + c), vf_set(shrink)));
}

/* ---- values ---- */

/* Weights of the packed values times the group's scales as integers, and sum p z. Tokens [from, to)
 * only. */
static float fold_value_group(float *pz, int8_t *high, int8_t *low, const float *p,
                              const uint16_t *scale, const uint16_t *zero, unsigned from,
                              unsigned to) {
    float masked[KI_PAGE_TOKENS], folded[KI_PAGE_TOKENS];
    memset(masked, 0, sizeof masked);
    memcpy(masked + from, p + from, (to - from) * sizeof(float));
    vf z = vf_set(0.0f);
    for (unsigned t = 0; t < KI_PAGE_TOKENS; t += 16) {
        vf w = vf_load(masked + t);
        vf_store(folded + t, vf_mul(w, vf_load_f16(scale + t)));
        z = vf_fma(w, vf_load_f16(zero + t), z);
    }
    *pz = vf_sum(z);
    return quantize_15(high, low, folded, KI_PAGE_TOKENS);
}

/* acc[c..c+15] of nq queries += step * (integers . codes) + pz, over n_quads quads of tokens. */
KI_INLINE void packed_values(float *const *acc, const attn_scratch *s, const float *step,
                             const float *pz, unsigned nq, const uint8_t *codes, unsigned n_quads,
                             unsigned head_dim, bool wide) {
    vi high[QUERY_BLOCK], low[QUERY_BLOCK];
    for (unsigned i = 0; i < nq; i++) high[i] = low[i] = vi_set(0);
    for (unsigned k = 0; k < n_quads; k++) {
        vb v = vb_load(codes + (size_t)k * head_dim * 4);
        for (unsigned i = 0; i < nq; i++) {
            vb h = vi_set_bytes(s->high[i] + 4 * k), l = vi_set_bytes(s->low[i] + 4 * k);
            high[i] = wide ? vi_dot_u8(high[i], v, h) : vi_dot_u7(high[i], v, h);
            low[i] = wide ? vi_dot_u8(low[i], v, l) : vi_dot_u7(low[i], v, l);
        }
    }
    for (unsigned i = 0; i < nq; i++) {
        vf sum = vf_from_vi(vi_add(vi_shl(high[i], 7), low[i]));
        vf_store(acc[i], vf_fma(sum, vf_set(step[i]), vf_add(vf_load(acc[i]), vf_set(pz[i]))));
    }
}

static void packed_values_n(float *const *acc, const attn_scratch *s, const float *step,
                            const float *pz, unsigned nq, const uint8_t *codes, unsigned n_quads,
                            unsigned head_dim, unsigned bits) {
    if (bits == 8) {
        if (nq == 1) packed_values(acc, s, step, pz, 1, codes, n_quads, head_dim, true);
        else if (nq == 2) packed_values(acc, s, step, pz, 2, codes, n_quads, head_dim, true);
        else if (nq == 3) packed_values(acc, s, step, pz, 3, codes, n_quads, head_dim, true);
        else packed_values(acc, s, step, pz, 4, codes, n_quads, head_dim, true);
    } else {
        if (nq == 1) packed_values(acc, s, step, pz, 1, codes, n_quads, head_dim, false);
        else if (nq == 2) packed_values(acc, s, step, pz, 2, codes, n_quads, head_dim, false);
        else if (nq == 3) packed_values(acc, s, step, pz, 3, codes, n_quads, head_dim, false);
        else packed_values(acc, s, step, pz, 4, codes, n_quads, head_dim, false);
    }
}

/* All packed values of nq queries that read some. */
static void add_packed_values(const ki_attn_tile *t, const attn_scratch *s,
                              ki_attn_query *const *qs, const float *const *p, unsigned nq) {
    unsigned to = 0;
    for (unsigned i = 0; i < nq; i++) to = KI_MAX(to, packed_to(qs[i], qs[i]->v_exact));
    for (unsigned g = 0; g * t->group < t->head_dim; g++) {
        float step[QUERY_BLOCK], pz[QUERY_BLOCK], *acc[QUERY_BLOCK];
        for (unsigned i = 0; i < nq; i++)
            step[i] = fold_value_group(&pz[i], s->high[i], s->low[i], p[i],
                                       t->v_scale + (size_t)g * KI_PAGE_TOKENS,
                                       t->v_zero + (size_t)g * KI_PAGE_TOKENS, packed_from(qs[i]),
                                       packed_to(qs[i], qs[i]->v_exact));
        for (unsigned c = g * t->group; c < (g + 1) * t->group; c += 16) {
            for (unsigned i = 0; i < nq; i++) acc[i] = qs[i]->acc + c;
            packed_values_n(acc, s, step, pz, nq, s->codes + (size_t)c * 4, (to + 3) / 4,
                            t->head_dim, t->v_bits);
        }
    }
}

/* acc[c..] += p[t] v[t][c..] for tokens [from, to) in their order, over n_vectors vectors of
 * channels: so many chains run side by side, each the same however wide the block is. */
KI_INLINE void exact_values(const ki_attn_tile *t, float *acc, const float *p, unsigned c,
                            unsigned from, unsigned to, unsigned n_vectors) {
    vf sum[4];
    for (unsigned j = 0; j < n_vectors; j++) sum[j] = vf_load(acc + c + j * 16);
    for (unsigned i = from; i < to; i++) {
        const uint16_t *row = t->v_blocks[i / 16] + (size_t)(i % 16) * t->head_dim + c;
        vf w = vf_set(p[i]);
        for (unsigned j = 0; j < n_vectors; j++)
            sum[j] = vf_fma(w, vf_load_f16(row + j * 16), sum[j]);
    }
    for (unsigned j = 0; j < n_vectors; j++) vf_store(acc + c + j * 16, sum[j]);
}

static void add_exact_range(const ki_attn_tile *t, float *acc, const float *p, unsigned from,
                            unsigned to) {
    unsigned c = 0;
    if (from >= to) return;
    for (; c + 64 <= t->head_dim; c += 64) exact_values(t, acc, p, c, from, to, 4);
    for (; c < t->head_dim; c += 16) exact_values(t, acc, p, c, from, to, 1);
}

static void add_exact_values(const ki_attn_tile *t, ki_attn_query *q, const float *p) {
    unsigned sink_to = KI_MIN(KI_MAX(q->sink_end, q->first), q->end);
    unsigned tail_from = KI_MAX(KI_MAX(q->v_exact, sink_to), q->first);
    add_exact_range(t, q->acc, p, q->first, sink_to);
    add_exact_range(t, q->acc, p, tail_from, q->end);
}

/* ---- the tile ---- */

static bool reads_packed(const ki_attn_query *q, unsigned exact) {
    return packed_from(q) < packed_to(q, exact);
}

static unsigned packed_end(const ki_attn_query *qs, unsigned nq, bool keys) {
    unsigned end = 0;
    for (unsigned i = 0; i < nq; i++) {
        unsigned exact = keys ? qs[i].k_exact : qs[i].v_exact;
        if (reads_packed(&qs[i], exact)) end = KI_MAX(end, packed_to(&qs[i], exact));
    }
    return end;
}

static void scores_of_tile(const ki_attn_tile *t, const attn_scratch *s, ki_attn_query *qs,
                           unsigned nq) {
    unsigned end = packed_end(qs, nq, true);
    if (end)
        unpack_any(s->codes, t->k_words, (size_t)((end + 15) / 16) * t->head_dim * t->k_bits / 32,
                   t->k_bits);
    for (unsigned q0 = 0; q0 < nq; q0 += QUERY_BLOCK) {
        unsigned n = KI_MIN(nq - q0, (unsigned)QUERY_BLOCK);
        if (end) score_packed_blocks(t, s, qs + q0, n, q0);
        score_exact_blocks(t, s, qs + q0, n, q0);
    }
}

static void values_of_tile(const ki_attn_tile *t, const attn_scratch *s, ki_attn_query *qs,
                           unsigned nq) {
    unsigned end = packed_end(qs, nq, false), n = 0;
    if (end) unpack_values(s->codes, t->v_words, end, t->head_dim, t->v_bits);
    ki_attn_query *block[QUERY_BLOCK];
    const float *p[QUERY_BLOCK];
    for (unsigned i = 0; i < nq; i++) {
        if (reads_packed(&qs[i], qs[i].v_exact)) {
            block[n] = &qs[i];
            p[n++] = s->p + (size_t)i * KI_PAGE_TOKENS;
        }
        if (n == QUERY_BLOCK || (n && i + 1 == nq)) {
            add_packed_values(t, s, block, p, n);
            n = 0;
        }
    }
    for (unsigned i = 0; i < nq; i++)
        if (qs[i].first < qs[i].end) add_exact_values(t, &qs[i], s->p + (size_t)i * KI_PAGE_TOKENS);
}

static void attn_tile_simd(const ki_attn_tile *t, ki_attn_query *queries, unsigned n_queries,
                           void *scratch) {
    attn_scratch s = scratch_carve(scratch, t->head_dim, n_queries);
    scores_of_tile(t, &s, queries, n_queries);
    for (unsigned i = 0; i < n_queries; i++)
        if (queries[i].first < queries[i].end)
            softmax_update(&queries[i], s.p + (size_t)i * KI_PAGE_TOKENS, t->head_dim);
    values_of_tile(t, &s, queries, n_queries);
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
