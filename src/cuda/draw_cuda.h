/* draw_cuda.h: tokens from rows of logits on a GPU, by model/draw.h's definition: the same token as
 * src/engine/draw.c from the same logits, draw and u. Only the ids leave the device.
 *
 * A row is one thread block's work, which reads the row three to six times:
 *
 *     edits     are made in place; at the end the row is as it was
 *     best      one pass
 *     bins      one pass: counts and sums of weights in 1,024 equal ranges of x, which ascend with
 *               the order of draw.h; their running sums say in which bin a place is (the k-th
 *               token, where top-p is reached, where u falls)
 *     a place   one pass that lists the bin's tokens; each finds its rank and the weights before it
 *               by comparing itself with all others
 *
 * Weights are integers, so the order in which threads add does not matter. A row whose bin has more
 * than 2,048 tokens, none that is larger than minus infinity, an infinite one or a NaN in front is
 * left to the caller: -1. */
#ifndef KI_DRAW_CUDA_H
#define KI_DRAW_CUDA_H
#include "draw.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ki_cuda_draw { /* ki_draw on the device */
    double u;
    float temperature, top_p, min_x, repetition, frequency, presence;
    uint32_t row, top_k;
    uint32_t first_edit, n_edits;
} ki_cuda_draw;

/* out[i] of draws[n] from logits [rows][stride] of n_vocab; no two draws are of one row. Edits lose
 * their bias. A launch that is refused shows in cudaGetLastError. */
void ki_cuda_draw_rows(int32_t *out, float *logits, size_t stride, uint32_t n_vocab,
                       const ki_cuda_draw *draws, ki_draw_edit *edits, uint32_t n, void *stream);

#ifdef __cplusplus
}
#endif
#endif
