/* kv_shared.h: how much shared memory the kernels of the cache ask for, and which of their shapes a
 * device takes. A thread block may have 99 KB (compute capability 8.6 and 8.9), 163 KB (8.0) or 227
 * KB (9.0): what is fastest on the largest does not start on the smallest, so kernels have fewer
 * groups, tiles or warps there. No CUDA in here: a test asks for all settings and all three. */
#ifndef KI_KV_SHARED_H
#define KI_KV_SHARED_H
#include "kv_cuda.h"

/* ---- keys closed in decoding (kv_append.cu) ---- */

/* APPEND: threads of a block that appends. CLOSE: five candidates of the 96 narrow channels of a +
 * page all at once; four blocks of 32 tokens. */
enum { KI_APPEND_THREADS = 128, KI_CLOSE_THREADS = 512 };

/* What closing a page of + keys needs besides raw [128][D] and codes. */
typedef struct ki_plus_close {
    float low[256], high[256], spread[256], error[5][256];
    uint16_t scale[5][256], zero[5][256]; /* candidates; the chosen one ends in row 0 */
    uint8_t is_wide[256], number[256];    /* of the wide channel */
} ki_plus_close;

/* Codes [32][D] of a + page and 64 numbered wide channels a token. */
KI_BOTH uint32_t ki_plus_codes_bytes(uint32_t d) { return KI_SUB_TOKENS * (d + 64); }

/* Other kinds: raw rows [32][width] f16 and codes [32][width], where width is as many blocks of 32
 * tokens as there are threads for; low and high [D] f32, scale and zero [D] f16. */
KI_BOTH uint32_t ki_close_bytes(const ki_cuda_layout *l) {
    uint32_t d = l->head_dim;
    if (!l->is_plus) return KI_SUB_TOKENS * KI_CLOSE_THREADS * 3 + 12 * d;
    return KI_PAGE_TOKENS * d * 2 + (uint32_t)sizeof(ki_plus_close) + ki_plus_codes_bytes(d);
}

/* ---- codes of prompts (kv_prompt_append.cu) ---- */

/* Tokens of a thread block's keys. */
KI_BOTH uint32_t ki_code_tokens(const ki_cuda_layout *l) {
    return l->k_bits == 16 || l->k_group < KI_SUB_TOKENS ? (uint32_t)KI_SUB_TOKENS : l->k_group;
}
KI_BOTH uint32_t ki_raw_stride(const ki_cuda_layout *l) { return l->head_dim + 8; }
KI_BOTH uint32_t ki_code_stride(const ki_cuda_layout *l) { return l->head_dim + 4; }

/* Where codes begin behind the raw rows, in bytes, and the end of both; of a page of + keys
 * ki_plus_close is behind them. */
KI_BOTH uint32_t ki_codes_at(const ki_cuda_layout *l) {
    return ki_code_tokens(l) * ki_raw_stride(l) * 2;
}
KI_BOTH uint32_t ki_codes_end(const ki_cuda_layout *l) {
    uint32_t each = l->is_plus ? ki_plus_codes_bytes(l->head_dim) : 0;
    uint32_t n = l->is_plus ? (uint32_t)KI_SUB_TOKENS : ki_code_tokens(l);
    return ki_codes_at(l) + (each > n * ki_code_stride(l) ? each : n * ki_code_stride(l));
}
KI_BOTH uint32_t ki_codes_bytes(const ki_cuda_layout *l) {
    return ki_codes_end(l) + (l->is_plus ? (uint32_t)sizeof(ki_plus_close) : 0);
}

/* ---- attention of prompts (kv_prompt.cu) ---- */

/* Halves of a tile of 64 tokens: a row is 16 bytes longer than D, so that eight rows lie in
 * different banks. Sets of 16 rows that a warp has. */
#define KI_TILE_HALVES(d) (64 * ((d) + 8))
#define KI_TILE_SETS(d) ((d) <= 128 ? 2 : 1)
enum { KI_PROMPT_STATIC_BYTES = 1024 }; /* not less than what the kernel has beside its tiles */

/* Queries, and of each group of warps two tiles of keys and of values (piped), or one of either, or
 * of one group one in all (single). */
typedef struct ki_prompt_config {
    uint32_t n_groups, shared_bytes;
    bool is_piped, is_single;
} ki_prompt_config;

#ifdef __cplusplus
extern "C" {
#endif

/* As much as a thread block of most_bytes has room for; false: not even the last. */
bool ki_prompt_config_of(ki_prompt_config *out, uint32_t head_dim, uint32_t most_bytes);

#ifdef __cplusplus
}
#endif

/* ---- decode attention (kv_decode.cuh) ---- */

/* The shapes of one head size, those named by bits first; the last ones take whatever is left. X(K
 * bits, V bits, K group, V group, blocks of a unit, warps, stages, thread blocks of a
 * multiprocessor, plus, most heads): bits and groups 0 are any. Those that are not named by both
 * bits and both groups run with fewer warps where memory is short. Of two that differ in warps,
 * stages and thread blocks alone the second is for many thread blocks. */
#define KI_DECODE_NAMED(X)                                                                         \
    X(2, 2, 32, 32, 4, 4, 2, 2, false, 1)                                                          \
    X(2, 2, 32, 32, 4, 3, 1, 4, false, 1)                                                          \
    X(2, 2, 32, 32, 4, 4, 2, 2, false, 4)                                                          \
    X(2, 2, 32, 32, 4, 3, 1, 4, false, 4)                                                          \
    X(2, 2, 32, 32, 4, 4, 2, 2, false, 8)                                                          \
    X(16, 16, 0, 0, 1, 4, 2, 1, false, 8)                                                          \
    X(16, 16, 0, 0, 1, 2, 2, 3, false, 8)                                                          \
    X(2, 2, 128, 64, 4, 4, 2, 2, true, 1)                                                          \
    X(2, 2, 128, 64, 4, 3, 1, 4, true, 1)                                                          \
    X(2, 2, 128, 64, 4, 4, 2, 2, true, 8)                                                          \
    X(2, 2, 128, 64, 4, 3, 1, 4, true, 8)
#define KI_DECODE_OTHER(X, WARPS)                                                                  \
    X(0, 0, 0, 0, 1, WARPS, 2, 1, false, 8)                                                        \
    X(0, 0, 0, 0, 4, WARPS, 1, 1, false, 8)                                                        \
    X(2, 2, 128, 0, 4, WARPS, 2, 1, true, 8)                                                       \
    X(4, 0, 128, 0, 4, WARPS, 1, 1, true, 8)
#define KI_DECODE_WARPS(d) ((d) <= 128 ? 4 : 2) /* above: twice the registers and bytes of a unit */
#define KI_DECODE_IS_FLEXIBLE(kb, vg) ((kb) != 16 && (vg) == 0)
#define KI_DECODE_HAS_NAMED(d) ((d) == 64 || (d) == 128)

/* Thread blocks of a work item: query heads of a KV head are taken eight at a time. */
KI_BOTH uint32_t ki_decode_blocks(const ki_cuda_layout *l) {
    return l->n_kv_heads * ((l->head_group + 7) / 8);
}

/* Halves of a query that attention turns by itself: eight rows lie in different banks. */
#define KI_OWN_HALVES(d) ((d) + 8)

/* Stages and their barriers, queries [8] of the step's own rows (and [8][D] f16 to gather from), or
 * the warps' states. */
KI_BOTH uint32_t ki_decode_bytes(const ki_cuda_layout *l, uint32_t warps, uint32_t stages) {
    uint32_t d = l->head_dim, n_heads = l->head_group < 8 ? l->head_group : 8;
    uint32_t unit = l->head_bytes ? l->page_bytes : l->unit_subs * l->sub_bytes;
    uint32_t bytes = warps * stages * (unit + 8) + (l->is_plus ? 8 * d * 2 : 0);
    if (l->k_bits < 16 && l->v_bits < 16) bytes += 8 * KI_OWN_HALVES(d) * 2;
    uint32_t states = warps * n_heads * (d + 2) * 4;
    return bytes > states ? bytes : states;
}

typedef struct ki_decode_choice {
    uint32_t index, warps, shared_bytes; /* index: in the list of the head size */
} ki_decode_choice;

#ifdef __cplusplus
extern "C" {
#endif

/* Whether a batch has more thread blocks than find a place at once, two a multiprocessor, even if
 * nothing is split. Most of their time at short contexts is trips to memory one behind the other,
 * and twice as many with fewer warps each are faster; below, more warps for each are. */
bool ki_decode_is_many(const ki_cuda_layout *layout, uint32_t n_seqs, uint32_t n_sms);

/* The first shape of the list that is for this layout and fits, or of two the one for many thread
 * blocks; false: none does. */
bool ki_decode_choose(ki_decode_choice *out, const ki_cuda_layout *layout, uint32_t most_bytes,
                      bool is_many);

/* Whether the fused kernels serve this layout where a thread block has most_bytes: they are built
 * for some head sizes, for groups of 32 tokens and more, and for lines between codes and window on
 * blocks of 32. UNSUPPORTED says what is not so, or which kernel wants how much. */
bool ki_cuda_is_built(uint32_t head_dim);
kivi_status ki_cuda_kernels_fit(const ki_cuda_layout *layout, uint32_t most_bytes, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
