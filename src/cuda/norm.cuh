/* norm.cuh: the arithmetic of norms of rows that stay in registers, of float4 of a row. Sums are
 * made by 1,024 threads (or by fewer that do the work of several): thread i takes the float4 i and
 * i + 1,024, its sum goes through the tree of a warp, and the warps' through another. */
#ifndef KI_NORM_CUH
#define KI_NORM_CUH
#include <cuda_runtime.h>

/* MOST_FOURS: float4 of a row that a thread holds. */
enum { KI_NORM_THREADS = 1024, KI_NORM_MOST_FOURS = 2 };

/* The sums of a warp's v[i], all trees at once: a step of one waits for the one before. */
template <int N> static __device__ __forceinline__ void ki_warp_sums(float (&v)[N]) {
#pragma unroll
    for (int step = 16; step; step /= 2)
#pragma unroll
        for (int i = 0; i < N; i++) v[i] += __shfl_xor_sync(0xffffffffu, v[i], step);
}
static __device__ __forceinline__ float ki_warp_sum(float v) {
    float one[1] = {v};
    ki_warp_sums(one);
    return one[0];
}
/* sum + the squares of v. */
static __device__ __forceinline__ float ki_add_squares(float sum, float4 v) {
    float here = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, __fmul_rn(v.x, v.x))));
    return __fadd_rn(sum, here);
}
static __device__ __forceinline__ float ki_norm_scale(float squares, uint32_t n, float eps) {
    return 1.0f / sqrtf(__fadd_rn(squares / (float)n, eps));
}
static __device__ __forceinline__ float4 ki_times_weight(float4 v, float scale, float4 w,
                                                         float4 b) {
    return make_float4(fmaf(__fmul_rn(v.x, scale), w.x, b.x), fmaf(__fmul_rn(v.y, scale), w.y, b.y),
                       fmaf(__fmul_rn(v.z, scale), w.z, b.z),
                       fmaf(__fmul_rn(v.w, scale), w.w, b.w));
}

#endif
