#include "gemv.h"

#include "fresh.cuh"
#include "kv_launch.h"
#include "pdl.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

enum { WARPS = 8, AHEAD = 4 }; /* AHEAD: loads of 16 bytes a lane and row that are under way */

static __device__ __forceinline__ float2 pair(uint32_t bits, __half) {
    return __half22float2(*(const __half2 *)&bits);
}
static __device__ __forceinline__ float2 pair(uint32_t bits, __nv_bfloat16) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

/* sum += eight products, in order. */
template <class T>
static __device__ __forceinline__ float dot8(float sum, const uint4 &w, const uint4 &x) {
    const uint32_t *a = &w.x, *b = &x.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 p = pair(a[i], T()), q = pair(b[i], T());
        sum = fmaf(p.x, q.x, sum);
        sum = fmaf(p.y, q.y, sum);
    }
    return sum;
}

template <class T, int M, int R>
static __global__ void __launch_bounds__(WARPS * 32) gemv(ki_gemv_call c) {
    uint32_t lane = threadIdx.x % 32, n8 = c.k / 8;
    uint32_t first = (blockIdx.x * WARPS + threadIdx.x / 32) * R;
    const uint4 zero = {0, 0, 0, 0}, *w[R], *x = (const uint4 *)c.x;
    uint4 ahead[AHEAD][R];
    float sum[M][R] = {};
#pragma unroll
    for (int r = 0; r < R; r++) /* rows past the end read the last one, and are not written */
        w[r] = (const uint4 *)c.weight + (size_t)min(first + r, c.n - 1) * n8;
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
        for (int r = 0; r < R; r++) {
            uint32_t i = lane + 32 * a;
            ahead[a][r] = i < n8 ? ki_fresh(w[r] + i) : zero;
        }
    ki_pdl_launch();
    ki_pdl_wait();
    for (uint32_t base = lane; base < n8; base += 32 * AHEAD) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            uint32_t i = base + 32 * a, next = i + 32 * AHEAD;
            uint4 now[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                now[r] = ahead[a][r];
                ahead[a][r] = next < n8 ? ki_fresh(w[r] + next) : zero;
            }
            if (i >= n8) continue;
#pragma unroll
            for (int m = 0; m < M; m++) {
                uint4 v = x[(size_t)m * n8 + i];
#pragma unroll
                for (int r = 0; r < R; r++) sum[m][r] = dot8<T>(sum[m][r], now[r], v);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < R; r++) {
            float s = sum[m][r];
            for (int step = 16; step; step /= 2) s += __shfl_xor_sync(0xffffffffu, s, step);
            float *to = c.out + m * c.out_stride + first + r;
            if (lane == 0 && first + r < c.n) *to = c.add ? *to + s : s;
        }
}

template <class T, int M, int R>
static cudaError_t launch(const ki_gemv_call *c, void *stream) {
    uint32_t rows = WARPS * R, n_blocks = (c->n + rows - 1) / rows;
    return ki_launch(gemv<T, M, R>, n_blocks, WARPS * 32, 0, true, stream, *c);
}

template <class T> static cudaError_t dispatch(const ki_gemv_call *c, void *stream) {
    switch (c->m) {
    case 1: return launch<T, 1, 1>(c, stream);
    case 2: return launch<T, 2, 1>(c, stream);
    case 3: return launch<T, 3, 2>(c, stream);
    default: return launch<T, 4, 2>(c, stream);
    }
}

extern "C" kivi_status ki_gemv_run(const ki_gemv_call *c, void *stream, kivi_error *err) {
    return ki_cuda_check(c->type == KI_CUDA_F16 ? dispatch<__half>(c, stream)
                                                : dispatch<__nv_bfloat16>(c, stream),
                         "product of few rows", err);
}
