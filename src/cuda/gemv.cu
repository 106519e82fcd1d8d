#include "gemv.h"

#include "act.cuh"
#include "ahead.cuh"
#include "kv_launch.h"
#include "pdl.cuh"

/* AHEAD: loads of 16 bytes a lane and row that are under way. MOST_WARPS: about as many as an H100
 * has at once, six blocks a multiprocessor. */
enum { WARPS = 8, AHEAD = 4, MOST_WARPS = 6336 };

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

/* Weights are read once: past the first cache, where rows of x should stay, and the first to leave
 * the second one, where those that the next product asked for should. */
static __device__ __forceinline__ uint64_t leave_first(void) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ uint4 fresh(const uint4 *p, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy));
    return v;
}

/* The rows of weights of a warp: neighbours, or a gate and its up. A row past the end is the last
 * one, and is not written. */
template <int R, bool GATED>
static __device__ __forceinline__ uint32_t row_of(const ki_gemv_call &c, uint32_t warp, int r) {
    uint32_t half = c.n / 2;
    return GATED ? r * half + min(warp, half - 1) : min(warp * R + r, c.n - 1);
}

template <class T, int M, int R, bool GATED>
static __global__ void __launch_bounds__(WARPS * 32)
    gemv(ki_gemv_call c, uint32_t row_ahead) {
    uint32_t lane = threadIdx.x % 32, n8 = c.k / 8;
    uint32_t warp = blockIdx.x * WARPS + threadIdx.x / 32;
    const uint64_t policy = leave_first();
    const uint4 zero = {0, 0, 0, 0}, *w[R], *x = (const uint4 *)c.x;
    uint4 ahead[AHEAD][R];
    float sum[M][R] = {};
#pragma unroll
    for (int r = 0; r < R; r++)
        w[r] = (const uint4 *)c.weight + (size_t)row_of<R, GATED>(c, warp, r) * n8;
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
        for (int r = 0; r < R; r++) {
            uint32_t i = lane + 32 * a;
            ahead[a][r] = i < n8 ? fresh(w[r] + i, policy) : zero;
        }
    if (row_ahead && n8 > 32 * AHEAD) {
        uint32_t n_bytes = min(row_ahead, (n8 - 32 * AHEAD) * 16);
#pragma unroll
        for (int r = 0; r < R; r++)
            if (lane == (uint32_t)r) ki_ask_ahead(w[r] + 32 * AHEAD, n_bytes);
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
                ahead[a][r] = next < n8 ? fresh(w[r] + next, policy) : zero;
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
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int r = 0; r < R; r++)
            for (int step = 16; step; step /= 2)
                sum[m][r] += __shfl_xor_sync(0xffffffffu, sum[m][r], step);
        if (lane) continue;
        if constexpr (GATED) {
            float v = ki_gated(c.act, sum[m][0], sum[m][R - 1]);
            if (warp < c.n / 2) ki_store(c.act_out, (size_t)m * (c.n / 2) + warp, v, c.type);
        } else {
#pragma unroll
            for (int r = 0; r < R; r++) {
                float *to = c.out + m * c.out_stride + warp * R + r;
                if (warp * R + r < c.n) *to = c.add ? *to + sum[m][r] : sum[m][r];
            }
        }
    }
}

template <class T, int M, int R, bool GATED>
static cudaError_t launch(const ki_gemv_call *c, void *stream) {
    uint32_t rows = WARPS * R, n_blocks = (c->n + rows - 1) / rows;
    if (GATED) n_blocks = (c->n / 2 + WARPS - 1) / WARPS;
    uint32_t n_warps = min(n_blocks * WARPS, (uint32_t)MOST_WARPS);
    uint32_t row_ahead = c->ahead_bytes / (n_warps * R) / 256 * 256;
    return ki_launch(gemv<T, M, R, GATED>, n_blocks, WARPS * 32, 0, true, stream, *c, row_ahead);
}

template <class T> static cudaError_t dispatch(const ki_gemv_call *c, void *stream) {
    if (c->act_out) switch (c->m) {
        case 1: return launch<T, 1, 2, true>(c, stream);
        case 2: return launch<T, 2, 2, true>(c, stream);
        case 3: return launch<T, 3, 2, true>(c, stream);
        default: return launch<T, 4, 2, true>(c, stream);
        }
    switch (c->m) {
    case 1: return launch<T, 1, 1, false>(c, stream);
    case 2: return launch<T, 2, 1, false>(c, stream);
    case 3: return launch<T, 3, 2, false>(c, stream);
    default: return launch<T, 4, 2, false>(c, stream);
    }
}

extern "C" kivi_status ki_gemv_run(const ki_gemv_call *c, void *stream, kivi_error *err) {
    return ki_cuda_check(c->type == KI_CUDA_F16 ? dispatch<__half>(c, stream)
                                                : dispatch<__nv_bfloat16>(c, stream),
                         "product of few rows", err);
}
