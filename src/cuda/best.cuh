/* best.cuh: the best token of a row of logits, over the threads of a block. */
#ifndef KI_BEST_CUH
#define KI_BEST_CUH
#include <cuda_runtime.h>
#include <stdint.h>

/* The better of two candidates: the larger, of equals the lower. id -1: none yet. */
static __device__ __forceinline__ void ki_take_better(float *v, int32_t *id, float w,
                                                      int32_t other) {
    if (other >= 0 && (*id < 0 || w > *v || (w == *v && other < *id))) *v = w, *id = other;
}

static __device__ __forceinline__ void ki_take_logit(float *v, int32_t *id, float w, int32_t own) {
    if (w > -INFINITY) ki_take_better(v, id, w, own);
}

/* The id of the best of logits [n], in every thread, and its logit; -1: none is above minus
 * infinity. values, ids: [blockDim.x / 32], shared. */
static __device__ __forceinline__ int32_t ki_best_of(float *best, const float *logits, uint32_t n,
                                                     float *values, int32_t *ids) {
    enum { FOURS = 8 };
    const float4 none = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    float v = 0;
    int32_t id = -1;
    uint32_t n_fours = (uintptr_t)logits % sizeof(float4) ? 0 : n / 4;
    for (uint32_t i = threadIdx.x; i < n_fours; i += FOURS * blockDim.x) {
        float4 four[FOURS]; /* all asked for before the first is looked at */
#pragma unroll
        for (uint32_t k = 0; k < FOURS; k++) {
            uint32_t at = i + k * blockDim.x;
            four[k] = at < n_fours ? ((const float4 *)logits)[at] : none;
        }
#pragma unroll
        for (uint32_t k = 0; k < FOURS; k++) {
            int32_t at = (int32_t)(i + k * blockDim.x) * 4;
            ki_take_logit(&v, &id, four[k].x, at), ki_take_logit(&v, &id, four[k].y, at + 1);
            ki_take_logit(&v, &id, four[k].z, at + 2), ki_take_logit(&v, &id, four[k].w, at + 3);
        }
    }
    for (uint32_t i = n_fours * 4 + threadIdx.x; i < n; i += blockDim.x)
        ki_take_logit(&v, &id, logits[i], (int32_t)i);
    for (int step = 16; step; step /= 2) {
        float w = __shfl_xor_sync(0xffffffffu, v, step);
        int32_t other = __shfl_xor_sync(0xffffffffu, id, step);
        ki_take_better(&v, &id, w, other);
    }
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = v, ids[threadIdx.x / 32] = id;
    __syncthreads();
    v = values[0], id = ids[0];
    for (uint32_t w = 1; w < blockDim.x / 32; w++) ki_take_better(&v, &id, values[w], ids[w]);
    *best = v;
    return id;
}
#endif
