/* gemv.h: products of one to four rows, which read every weight once and do little else.
 *
 * A warp makes one or two outputs of all rows, sixteen bytes of a weight's row a lane at a time;
 * sums are float32, of each lane's columns in order and then over the lanes by one tree, so a row's
 * bits do not depend on how many rows there are. The first weights are asked for before the kernel
 * before this one has ended (programmatic dependent launch): they depend on nothing. */
#ifndef KI_GEMV_H
#define KI_GEMV_H
#include "kv_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KI_GEMV_ROWS = 4 };

/* out[m][n] (+)= sum over k of x[m][k] weight[n][k]; m 1 to 4, k a multiple of 8; type F16 or
 * BF16. */
typedef struct ki_gemv_call {
    float *out;
    size_t out_stride;
    const void *weight, *x;
    uint32_t n, k, m;
    ki_cuda_type type;
    bool add;
} ki_gemv_call;

kivi_status ki_gemv_run(const ki_gemv_call *call, void *stream, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
