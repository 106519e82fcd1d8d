/* step_cuda.h: the first and the last kernel of a step. A step of decoding reads what it is told
 * out of the host's pinned memory by itself, and leaves its results there: no copy stands between
 * the host and its kernels. Launchers queue on a stream (a cudaStream_t); pointers mean device
 * memory where nothing else is said. */
#ifndef KI_STEP_CUDA_H
#define KI_STEP_CUDA_H
#include "kv_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a step reads from the host, and gives back; what it draws, and the edits of that, in a copy
 * of their own when there is any. Offsets in bytes, multiples of 256. */
typedef struct ki_cuda_upload {
    size_t number, seqs, tokens, positions, logit_rows, tables, frequencies, records, n_bytes;
    size_t draws, edits, all_bytes;
} ki_cuda_upload;
/* n_done and counters, then row_flags, are what kernels add to: a step clears them. `number` is the
 * host's alone, behind what a copy brings there. */
typedef struct ki_cuda_result {
    size_t counters, n_done, row_flags, finite, best, drawn, n_bytes;
    size_t number, all_bytes;
} ki_cuda_result;

/* x[r][n] = embedding[tokens[r]] * scale; rows that are not used have token 0. n: a multiple of 4;
 * embedding of `type`, a row's four elements aligned. */
typedef struct ki_cuda_embed_call {
    float *x;
    const void *embedding;
    const int32_t *tokens;
    uint32_t n_rows, n;
    float scale;
    ki_cuda_type type;
} ki_cuda_embed_call;
kivi_status ki_cuda_embed(const ki_cuda_embed_call *call, void *stream, kivi_error *err);

typedef struct ki_cuda_piece { /* of the upload, in bytes */
    size_t at, n_bytes;
} ki_cuda_piece;
enum { KI_BEGIN_PIECES = 8, KI_BEGIN_PLANS = 2 };

/* The beginning of a step of decoding, in one kernel that waits for all before it: pieces of the
 * upload are copied, the first clear_bytes of the results cleared (a multiple of 16), plans of
 * attention made and tokens embedded. Plans' caches and the tokens are in the host's memory: none
 * of it waits for the copy. */
typedef struct ki_cuda_begin_call {
    const uint8_t *from; /* the host's pinned memory */
    uint8_t *to;
    ki_cuda_piece pieces[KI_BEGIN_PIECES];
    uint32_t n_pieces, n_plans;
    const ki_cuda_attend_call *plans[KI_BEGIN_PLANS]; /* as for ki_cuda_decode_plan */
    uint8_t *result;
    size_t clear_bytes;
    ki_cuda_embed_call embed;
} ki_cuda_begin_call;
kivi_status ki_cuda_begin_step(const ki_cuda_begin_call *call, void *stream, kivi_error *err);

/* The end of a step, of each row r of its logits: best[r] is where logits [n_logits][stride] are
 * largest among n_vocab, the lowest on a tie, -1 where nothing is larger than minus infinity;
 * finite[r] becomes 0 where x[rows[r]] [n_embd] is not finite, else 1. */
typedef struct ki_cuda_end_call {
    const float *logits, *x;
    size_t stride;
    const uint32_t *rows;
    uint32_t n_logits, n_vocab, n_embd;
    uint8_t *result;
    ki_cuda_result at;
    /* Of decoding: counters, row_flags of n_rows, finite and best are written to the host's pinned
     * memory as well, and when all of them are there, *number to its place. NULL: they are not. */
    uint8_t *host;
    const uint32_t *number;
    uint32_t n_rows;
} ki_cuda_end_call;
kivi_status ki_cuda_end_step(const ki_cuda_end_call *call, void *stream, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
