/* gemv.h: products of one to four rows, which read every weight once and do little else.
 *
 * A warp makes one or two outputs of all rows, sixteen bytes of a weight's row a lane at a time;
 * sums are float32, of each lane's columns in order and then over the lanes by one tree, so a row's
 * bits do not depend on how many rows there are. Weights depend on nothing: the first of a warp are
 * loaded, and more are asked for into the L2 cache, before the kernel before this one has ended
 * (programmatic dependent launch). While a norm, an append or attention waits for its few bytes,
 * memory reads the weights of the product behind it. */
#ifndef KI_GEMV_H
#define KI_GEMV_H
#include "kv_cuda.h" /* ki_fail is C's */

#include "dense_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KI_GEMV_ROWS = 4 };

/* out[m][n] (+)= sum over k of x[m][k] weight[n][k]; m 1 to 4, k a multiple of 8; type F16 or
 * BF16. With act_out instead: gate and up are the first and the second half of the n rows, and
 * act_out[m][n / 2] of `type` is act(gate) up, the bits that ki_cuda_activate makes of out. */
typedef struct ki_gemv_call {
    float *out;
    size_t out_stride;
    const void *weight, *x;
    uint32_t n, k, m;
    ki_cuda_type type;
    bool add;
    void *act_out; /* NULL: out */
    ki_cuda_act act; /* SILU_MUL or GELU_MUL */
    /* Bytes of weights that the resident blocks together ask for into the L2 cache before the
     * kernel before this one has ended, about; 0: none. */
    uint32_t ahead_bytes;
} ki_gemv_call;

enum { KI_GEMV_AHEAD_BYTES = 24 << 20 }; /* half of an H100's L2 cache */

kivi_status ki_gemv_run(const ki_gemv_call *call, void *stream, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
