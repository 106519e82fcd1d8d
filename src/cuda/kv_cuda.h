/* kv_cuda.h: the contract of the CUDA kernels of the cache. Host code calls these functions with
 * pointers to device memory and a stream; nothing here allocates, synchronises or keeps state.
 *
 * A page on the device has the bytes and the planes of the CPU's page but another order of codes
 * and scales (kv_order.h). It is cut into four blocks ("subs") of 32 tokens:
 *
 *     page   [ head ][ sub 0 ][ sub 1 ][ sub 2 ][ sub 3 ]
 *     head   only where a key group is longer than 32 tokens:
 *            [K scale [128/G][D] f16][K zero [128/G][D] f16][list [D/4] u8, padded to 16 bytes]
 *     sub    [K codes][K wide codes][V codes][V third bits][V scale [D/Gv][32] f16][V zero, the
 * same]
 *            and where a key group is of 16 or 32 tokens  [K scale [32/G][D] f16][K zero, the same]
 *
 * so that kivi2 at D = 128, G = 32 is 4 x 3,072 bytes. A side of 16 bits has its rows as "codes" of
 * 16 bits and no scales. The pool is [n_pages][L][Hk][page_bytes]; page ids serve all layers and
 * heads.
 *
 * 16-bit rows (window, sinks, prompts). A 16-bit block is 32 tokens x D float16 in the order of a
 * 16-bit plane. Block b of a sequence (positions 32 b ..) is block b of the sinks' store where
 * b < sink_blocks, else block b % n of the ring. A side of 16 bits has no ring: it lives in pages.
 *
 *     ring    [L][Hk][k_blocks + v_blocks][32 D] f16        keys' blocks first
 *     sinks   [L][Hk][2 sink_blocks][32 D] f16              keys' blocks first
 *
 * A step of decoding (every sequence has at most one new row) is, for each layer,
 *     ki_cuda_append          rope, rows into the window, codes of what fell behind the line
 *     ki_cuda_decode_attend   fused attention (and the merge of its splits)
 * after one ki_cuda_decode_plan a step for each sliding window the model has. (Or the second alone,
 * which takes the rows itself, and ki_cuda_close after all layers.) All lengths, tables and
 * addresses are read from device memory, so the launches can be captured in a CUDA graph once for
 * each n_seqs (an idle slot has n_rows 0) and replayed.
 *
 * A step with prompt rows is, for each layer,
 *     ki_cuda_prompt_append   rope, float16 rows of the step, codes of what falls behind the line
 *     ki_cuda_prompt_attend   reads codes, the window as it was before the step, and the step's
 *                             rows (kv_prompt.h)
 *     ki_cuda_prompt_window   the step's newest rows into the window
 * (in this order: the window's old rows are read before they are overwritten). Sequences with one
 * generated row can be in the same step. Under the rule `paper` a prompt that is fed in several
 * steps needs a ring that holds it from its start: the caller points `ring` to a larger one for
 * that time and moves the newest rows back with ki_cuda_ring_copy.
 *
 * Pool, rings and sinks are zeroed once when they are made; from then on they hold finite numbers
 * only. Appends and closes with pdl wait for the kernel before them and then begin. Attention with
 * pdl may start to read pages, tables, the plan and 16-bit keys (blocks without the step's own row)
 * while the kernel before it in the stream ends, and if that one lets others begin before it waits,
 * the ones before that: each must wait for its own predecessor, and the plan must have ended before
 * them (any kernel without pdl behind it will do). Nothing else of the step may write the window.
 *
 * Numbers. Codes, scales and zeros are the CPU's byte for byte, given the same float16 rows.
 * Attention rounds q * scale and p * scale to float16 and sums in float32 in an order that depends
 * on the sequence's length, the rule and split_tokens alone, not on its neighbours: bits repeat. */
#ifndef KI_KV_CUDA_H
#define KI_KV_CUDA_H
#include "kv_order.h"

#include <stdarg.h>
#include <string.h>

#ifdef __cplusplus
extern "C" { /* the project's own headers are C: their functions too */
#endif
#include "base.h"
#include "kivi_cache.h"
#include "quant.h"

/* ---- layout (host, kv_layout.c) ---- */

typedef struct ki_cuda_layout {
    uint32_t n_layers, n_heads, n_kv_heads, head_dim, head_group; /* head_group = H / Hk */
    uint32_t k_bits, v_bits;   /* 2, 4, 8, 16; of the plus kinds 2 or 4, and 2 or 3 */
    uint32_t k_group, v_group; /* tokens of a key group, channels of a value group */
    uint32_t residual_tokens, sink_tokens, rewind_tokens, rule, span_tokens;
    uint32_t is_plus; /* kivi2+, k4v2+, k4v3+: turned values without a zero */
    /* Bytes. Offsets of V planes and of codes are within a sub; those of key scales and zeros
     * within the page's head where k_group > 32, else within a sub. */
    uint32_t head_bytes, sub_bytes, page_bytes; /* all multiples of 16 */
    uint32_t k_at, wide_at, v_at, third_at, v_scale_at, v_zero_at, k_scale_at, k_zero_at, list_at;
    uint32_t unit_subs;        /* blocks that decode attention takes at once (kv_plan.h) */
    uint32_t page_scale_bytes; /* of page_bytes: scales, zeros and lists (tag kv_scales) */
    uint32_t k_ring_blocks, v_ring_blocks, sink_blocks; /* 32-token blocks; 0 for a 16-bit side */
    uint64_t ring_bytes, sink_bytes; /* of one sequence, all layers and KV heads */
    uint64_t id_bytes;               /* of one page id: L * Hk * page_bytes */
} ki_cuda_layout;

/* From a resolved geometry. plus: the planes of DESIGN.md 11 (bits 2/2, 4/2 or 4/3; group and
 * residual are then 128). UNSUPPORTED where no kernel is built: head sizes other than 64, 80, 96,
 * 128, 256. */
kivi_status ki_cuda_layout_init(ki_cuda_layout *out, const kivi_cache_geometry *geometry, bool plus,
                                kivi_error *err);
/* The same for any head size that the cache takes: for plain.h, which has no sizes of its own. */
kivi_status ki_cuda_layout_any(ki_cuda_layout *out, const kivi_cache_geometry *geometry, bool plus,
                               kivi_error *err);
/* A page in the CPU's order (ki_layout's planes for the same kind) to the device's order and back;
 * host memory. Of a plus kind with all its parts. */
void ki_cuda_page_from_cpu(uint8_t *out, const uint8_t *page, const ki_cuda_layout *layout);
void ki_cuda_page_to_cpu(uint8_t *out, const uint8_t *page, const ki_cuda_layout *layout);
/* Bytes of a ring of that many 32-token blocks a side, all layers and KV heads: for a prompt's
 * larger one. Sides of 16 bits have none. */
uint64_t ki_cuda_ring_bytes(const ki_cuda_layout *layout, uint32_t k_blocks, uint32_t v_blocks);

/* ---- sequences (device memory) ---- */

enum { KI_CUDA_PROMPT = 1 }; /* flag: the step's rows are prompt rows (the visibility rule asks) */

/* One slot of a batch. The caller writes the array before a step (or a kernel of his advances it).
 * */
typedef struct ki_cuda_seq {
    uint64_t ring, sinks;        /* device addresses; sinks 0 where sink_blocks is 0 */
    uint32_t k_blocks, v_blocks; /* of the ring: the layout's, or a larger one's */
    uint32_t table;              /* row of the block tables */
    uint32_t n_tokens;           /* before this step */
    uint32_t n_rows;    /* of this step; 0: the slot is idle and nothing of it is touched */
    uint32_t first_row; /* its first row in q, k, v and out */
    uint32_t run_start; /* KI_CUDA_PROMPT: position of the prompt's first row */
    uint32_t flags;
    uint32_t scratch_at;  /* kv_prompt.h */
    uint32_t reserved[3]; /* 0; makes a slot 64 bytes */
} ki_cuda_seq;

typedef struct ki_cuda_counters {                /* device memory; kernels only add */
    unsigned long long n_saturated, n_nonfinite; /* values beyond float16; rows of a KV head with
                                                  * inf or NaN */
} ki_cuda_counters;

typedef struct ki_cuda_cache {
    ki_cuda_layout layout;
    uint8_t *pool; /* [n_pages][L][Hk][page_bytes], 128-byte aligned */
    const uint32_t
        *tables; /* [rows][table_stride] page ids; KI_NO_PAGE behind a window is not read */
    uint32_t table_stride;
    const ki_cuda_seq *seqs; /* [n_seqs] */
    uint32_t n_seqs;
    ki_cuda_counters *counters;
    uint32_t shared_bytes; /* what a thread block can have (kv_shared.h), and */
    uint32_t n_sms;        /* multiprocessors; for the fused kernels */
} ki_cuda_cache;

typedef enum ki_cuda_type { KI_CUDA_F32, KI_CUDA_F16, KI_CUDA_BF16 } ki_cuda_type;

/* ---- device ---- */

/* Once for each device, before the first launch and outside of graph capture: refuses what is below
 * sm_80 (UNSUPPORTED), raises the shared-memory limits, and says what a thread block can have. The
 * device is the calling thread's. */
kivi_status ki_cuda_kernels_init(uint32_t *shared_bytes, kivi_error *err);

/* ---- quantize and append ---- */

typedef struct ki_cuda_append_call {
    const ki_cuda_cache *cache;
    uint32_t layer,
        n_rows;        /* n_rows: rows of the batch (the arrays' first dimension), an upper bound */
    uint32_t max_rows; /* most rows of any one sequence in this step (prompt calls) */
    /* [n_rows][H][D], [n_rows][Hk][D], [n_rows][Hk][D] of `type`, row strides in elements; they may
     * lie in one matrix. Rows are aligned to two elements. q may be NULL (nothing is rotated then,
     * q_out is not written). */
    const void *q, *k, *v;
    uint32_t q_stride, k_stride, v_stride;
    ki_cuda_type type;
    const float *rope; /* [n_rows][D/2][2]: cos, sin of the row's position; pairs (j, j + D/2) are
                        * rotated in float32, then rounded to float16 once. NULL: no rotation */
    uint16_t *q_out;   /* [n_rows][H][D] f16 */
    /* [n_rows][Hk][D] f16: the step's keys and values as attention and the window take them. Needed
     * by the prompt calls, NULL for ki_cuda_append. */
    uint16_t *k_rows, *v_rows;
    uint32_t *row_flags; /* [n_rows], NULL allowed: set to 1 where a key or value is inf or NaN; the
                          * row's codes are then not defined, no other memory is touched */
    bool pdl; /* launch with programmatic serialization behind the previous kernel of the stream */
} ki_cuda_append_call;

/* Decoding: at most one row a sequence. kv_append.h has it in parts. */
kivi_status ki_cuda_append(const ki_cuda_append_call *call, void *stream, kivi_error *err);
kivi_status ki_cuda_prompt_append(const ki_cuda_append_call *call, void *stream, kivi_error *err);
kivi_status ki_cuda_prompt_window(const ki_cuda_append_call *call, void *stream, kivi_error *err);
/* Rows [from, n_tokens) of one sequence from one ring to another (all layers and heads). Device
 * addresses; each ring [L][Hk][k + v][32 D]. */
kivi_status ki_cuda_ring_copy(const ki_cuda_layout *layout, uint64_t to, uint32_t to_k,
                              uint32_t to_v, uint64_t from, uint32_t from_k, uint32_t from_v,
                              uint32_t first_pos, uint32_t n_tokens, void *stream, kivi_error *err);

/* ---- decode attention ---- */

typedef struct ki_cuda_attend_call {
    const ki_cuda_cache *cache;
    uint32_t layer;
    uint32_t window;   /* a query at p sees positions > p - window; 0: all */
    float scale;       /* of q . k; 1 / sqrt(D) in most models */
    const uint16_t *q; /* [n_rows][H][D] f16, rotated, not scaled */
    /* Decoding, both sides packed: the step's rows, float32 with q, which attention rotates and
     * puts into the window itself, to the bytes of ki_cuda_append_rows, in the place of that
     * launch; q is not read then, nor q_out written. NULL: they were appended before. */
    const ki_cuda_append_call *append;
    void *out;         /* [n_rows][H][D] of out_type, row stride in elements */
    uint32_t out_stride;
    ki_cuda_type out_type;
    const uint16_t *k_rows, *v_rows; /* prompt calls: what ki_cuda_prompt_append wrote */
    uint32_t n_rows, max_rows;       /* as in ki_cuda_append_call */
    /* Decoding: splits of a sequence have about split_tokens tokens each. A constant gives results
     * that do not depend on neighbours; smaller ones fill a device at small batches. See
     * ki_cuda_split_tokens. max_tokens bounds the lengths (n_tokens + 1) of this call, and with it
     * the number of splits; one split (max_tokens <= split_tokens) needs no merge and launches
     * none. */
    uint32_t split_tokens, max_tokens;
    bool is_fixed; /* the kernel is of the layout alone, however many sequences there are: with a
                    * constant split_tokens their number changes no bit */
    void *workspace; /* ki_cuda_workspace_bytes, 256-byte aligned */
    bool pdl;
} ki_cuda_attend_call;

/* Bytes of workspace for n_seqs slots: the plan and the splits' states. */
uint64_t ki_cuda_workspace_bytes(const ki_cuda_layout *layout, uint32_t n_seqs, uint32_t max_tokens,
                                 uint32_t split_tokens);
/* A split size for a batch of n_seqs slots whose longest has max_tokens, on a device with n_sms
 * multiprocessors. n_seqs 0: the size of the batch-invariant mode, a constant. */
uint32_t ki_cuda_split_tokens(const ki_cuda_layout *layout, uint32_t n_seqs, uint32_t max_tokens,
                              uint32_t n_sms);

/* Writes the list of work items from the lengths, with what they need of sequences and tables;
 * reads cache, window, split_tokens, max_tokens and workspace of the call. Once a step (and
 * window), after seqs and tables are written; every ki_cuda_decode_attend of the step with the same
 * workspace uses it. */
kivi_status ki_cuda_decode_plan(const ki_cuda_attend_call *call, void *stream, kivi_error *err);
/* Sequences with n_rows == 1. Others are left alone. */
kivi_status ki_cuda_decode_attend(const ki_cuda_attend_call *call, void *stream, kivi_error *err);

/* ---- what the kernels and the host agree on (kv_plan.h has the splits) ---- */

/* Lines behind which codes exist after n tokens; n itself for a side of 16 bits. */
KI_BOTH uint32_t ki_cuda_k_packed(const ki_cuda_layout *l, uint32_t n) {
    return l->k_bits == 16 ? n : n / l->residual_tokens * l->residual_tokens;
}
KI_BOTH uint32_t ki_cuda_v_packed(const ki_cuda_layout *l, uint32_t n) {
    if (l->v_bits == 16) return n;
    return n < l->residual_tokens ? 0 : n - l->residual_tokens;
}

/* From where on the query at pos reads in 16 bit outside of pages (ARCHITECTURE.md 5): the line of
 * a generated row, moved back for prompt rows by the rule. `line` is that of a generated row at
 * pos, `start` at the prompt's first row. */
KI_BOTH uint32_t ki_cuda_rule_line(const ki_cuda_layout *l, const ki_cuda_seq *s, uint32_t pos,
                                   uint32_t line, uint32_t start) {
    if (!(s->flags & KI_CUDA_PROMPT) || l->rule == KIVI_RULE_STREAM) return line;
    if (l->rule == KIVI_RULE_SPAN) {
        uint32_t span = pos / l->span_tokens * l->span_tokens;
        start = span > start ? span : start;
    }
    return line < start ? line : start;
}
KI_BOTH uint32_t ki_cuda_k_exact(const ki_cuda_layout *l, const ki_cuda_seq *s, uint32_t pos) {
    uint32_t r = l->residual_tokens;
    return l->k_bits == 16 ? pos + 1
                           : ki_cuda_rule_line(l, s, pos, pos / r * r, s->run_start / r * r);
}
KI_BOTH uint32_t ki_cuda_v_exact(const ki_cuda_layout *l, const ki_cuda_seq *s, uint32_t pos) {
    uint32_t r = l->residual_tokens, start = s->run_start > r ? s->run_start - r : 0;
    return l->v_bits == 16 ? pos + 1 : ki_cuda_rule_line(l, s, pos, pos > r ? pos - r : 0, start);
}

#ifdef __cplusplus
}
#endif
#endif
