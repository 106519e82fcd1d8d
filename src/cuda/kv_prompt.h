/* kv_prompt.h: what attention of prompts reads, and from where.
 *
 * Rows of the step lie in k_rows and v_rows. What is older is in the order of fragments
 * (kv_order.h), packed or in 16 bit, and 128 rows of each query head would turn it into rows again
 * and again: one kernel does it once a layer, into a scratch of float16 rows. It has room for a
 * bounded number of them, so a step is attended to in parts: neighbouring sequences, all KV heads;
 * or one sequence, some KV heads. Of each (KV head, side) of a part the scratch has head_tokens
 * rows [D], and of a sequence, from its scratch_at on, three areas of whole pages:
 *
 *     [ sinks: 0 .. ][ codes: coded_begin .. coded_end ][ 16 bit: exact_begin .. exact_end ]
 *
 * (positions). Around the line one can be in two areas: some rows of the step read its codes,
 * others its 16-bit row. */
#ifndef KI_KV_PROMPT_H
#define KI_KV_PROMPT_H
#include "kv_cuda.h"

/* Old tokens that the rows of a step see; all but the lines in whole pages. */
typedef struct ki_prompt_old {
    uint32_t first;        /* the first position that any row sees */
    uint32_t k_from, k_to; /* from where the first and the last row read keys in 16 bit */
    uint32_t v_from, v_to; /* the same of values */
    uint32_t sink_end, coded_begin, coded_end, exact_begin, exact_end;
} ki_prompt_old;

KI_BOTH uint32_t ki_prompt_floor(uint32_t n) { return n / KI_PAGE_TOKENS * KI_PAGE_TOKENS; }
KI_BOTH uint32_t ki_prompt_ceil(uint32_t n) { return ki_prompt_floor(n + KI_PAGE_TOKENS - 1); }

/* From where on the row at pos reads in 16 bit outside of pages; a side of 16 bits has its old rows
 * in pages. */
KI_BOTH uint32_t ki_prompt_k_line(const ki_cuda_layout *l, const ki_cuda_seq *s, uint32_t pos) {
    return l->k_bits == 16 ? s->n_tokens : ki_cuda_k_exact(l, s, pos);
}
KI_BOTH uint32_t ki_prompt_v_line(const ki_cuda_layout *l, const ki_cuda_seq *s, uint32_t pos) {
    return l->v_bits == 16 ? s->n_tokens : ki_cuda_v_exact(l, s, pos);
}

/* window: 0, or what the rows see. n_rows > 0. */
KI_BOTH ki_prompt_old ki_prompt_old_of(const ki_cuda_layout *l, const ki_cuda_seq *s,
                                       uint32_t window) {
    ki_prompt_old o;
    uint32_t n = s->n_tokens, last = n + s->n_rows - 1;
    o.first = window && n + 1 > window ? n + 1 - window : 0;
    o.k_from = ki_prompt_k_line(l, s, n), o.k_to = ki_prompt_k_line(l, s, last);
    o.v_from = ki_prompt_v_line(l, s, n), o.v_to = ki_prompt_v_line(l, s, last);
    uint32_t coded = o.k_to > o.v_to ? o.k_to : o.v_to, exact = n;
    if (l->k_bits < 16 && o.k_from < exact) exact = o.k_from;
    if (l->v_bits < 16 && o.v_from < exact) exact = o.v_from;
    if (exact < o.first) exact = o.first;
    o.coded_begin = o.coded_end = o.exact_begin = o.exact_end = o.sink_end = 0;
    if (coded > o.first)
        o.coded_begin = ki_prompt_floor(o.first), o.coded_end = ki_prompt_ceil(coded);
    if (exact < n) o.exact_begin = ki_prompt_floor(exact), o.exact_end = ki_prompt_ceil(n);
    uint32_t sinks = l->sink_tokens < n ? l->sink_tokens : n;
    int is_apart = o.exact_begin > 0 || o.exact_end == 0; /* from the other rows in 16 bit */
    if ((l->k_bits < 16 || l->v_bits < 16) && o.first < sinks && is_apart)
        o.sink_end = ki_prompt_ceil(sinks);
    return o;
}

KI_BOTH uint32_t ki_prompt_tokens(const ki_prompt_old *o) {
    return o->sink_end + (o->coded_end - o->coded_begin) + (o->exact_end - o->exact_begin);
}

/* The row of a sequence's scratch where the tile of tokens from base on begins, of codes or of rows
 * in 16 bit. -1: there is none. */
KI_BOTH int64_t ki_prompt_row_at(const ki_prompt_old *o, uint32_t base, int exact) {
    uint32_t coded = o->coded_end - o->coded_begin;
    if (!exact) return (int64_t)o->sink_end + base - o->coded_begin;
    if (base >= o->exact_begin && base < o->exact_end)
        return (int64_t)o->sink_end + coded + base - o->exact_begin;
    return base < o->sink_end ? (int64_t)base : -1;
}

#ifdef __cplusplus
extern "C" {
#endif

/* ---- parts (host, kv_prompt_plan.c) ---- */

typedef struct ki_prompt_part {
    uint32_t first_seq, n_seqs, first_head, n_heads; /* KV heads */
    uint32_t head_tokens; /* rows of scratch of one KV head and side, all sequences of the part */
    uint32_t max_tokens;  /* most of one sequence; 0: there is nothing to unpack */
} ki_prompt_part;

/* A step's sequences (host memory) and the scratch. window: 0, or what rows of all layers see at
 * most. */
typedef struct ki_prompt_step {
    const ki_cuda_layout *layout;
    const ki_cuda_seq *seqs;
    uint32_t n_seqs, window;
    uint64_t scratch_bytes; /* at least ki_prompt_scratch_bytes(.., 0) of the longest sequence */
} ki_prompt_step;

/* The part behind *part, which is all 0 at first; false: that was the last. Sequences without rows,
 * and those that are marked KI_CUDA_ELSEWHERE, are in none. */
bool ki_prompt_next(ki_prompt_part *part, const ki_prompt_step *step);
/* Sets scratch_at of seqs, which are the step's. */
void ki_prompt_place(ki_cuda_seq *seqs, const ki_prompt_step *step);
/* Bytes of scratch for n_seqs sequences of at most max_tokens, rows of the step included, but not
 * more than limit_bytes; at least what one KV head of the longest needs. */
uint64_t ki_prompt_scratch_bytes(const ki_cuda_layout *layout, uint32_t max_tokens, uint32_t n_seqs,
                                 uint64_t limit_bytes);

/* ---- device ---- */

/* Sequences with any number of rows, causal, by the visibility rule; not those that kv_plan.h's
 * KI_CUDA_ELSEWHERE marks. One part: what is packed or in the store into the scratch (workspace of
 * the call), then attention. The call's cache has all sequences of the step; window is the layer's,
 * step_window that of ki_prompt_step. */
kivi_status ki_cuda_prompt_attend(const ki_cuda_attend_call *call, const ki_prompt_part *part,
                                  uint32_t step_window, void *stream, kivi_error *err);
/* The first half of that. */
kivi_status ki_cuda_prompt_unpack(const ki_cuda_attend_call *call, const ki_prompt_part *part,
                                  uint32_t step_window, void *stream, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
