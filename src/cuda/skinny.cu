#include "skinny.h"

#include "fresh.cuh"
#include "kv_launch.h"
#include "kv_mma.cuh"
#include "pdl.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* UNITS: of 16 bytes in a run of columns. PITCH: floats between rows of x in shared memory, so that
 * a warp's stores meet no bank twice. */
enum { WARPS = 8, THREADS = 32 * WARPS, UNITS = 8, TILE = 16, PITCH = 20 };

/* kv_mma.cuh's product, by the type of what is multiplied. */
static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint32_t b0, uint32_t b1, __half) {
    mma(c, a0, a1, a2, a3, b0, b1);
}
static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* A lane's part of a run of weights: rows lane / 4 and 8 further of each tile, units lane % 4 and 4
 * further. */
template <int TILES> struct weights {
    uint4 at[TILES][2][2]; /* [tile][row][unit] */
    __device__ __forceinline__ void load(const uint4 *const (&rows)[TILES][2], uint32_t unit,
                                         uint32_t n_units) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int b = 0; b < 2; b++)
                    at[i][h][b] = unit + 4 * b < n_units ? ki_fresh(rows[i][h] + unit + 4 * b)
                                                         : make_uint4(0, 0, 0, 0);
    }
};

/* acc += a run of weights times that of x. unit: of x, as of the weights. */
template <class T, int COLS, int TILES>
static __device__ __forceinline__ void multiply(float (&acc)[TILES][COLS][4],
                                                const weights<TILES> &w, const ki_gemv_call &c,
                                                uint32_t unit, uint32_t n_units) {
    uint32_t row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int b = 0; b < 2; b++) {
        uint4 x[COLS];
#pragma unroll
        for (int j = 0; j < COLS; j++) {
            uint32_t m = 8 * j + row, u = unit + 4 * b;
            x[j] = m < c.m && u < n_units ? ((const uint4 *)c.x)[(size_t)m * n_units + u]
                                          : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++) {
                const uint4 &p = w.at[i][0][b], &q = w.at[i][1][b];
                mma(acc[i][j], p.x, q.x, p.y, q.y, x[j].x, x[j].y, T());
                mma(acc[i][j], p.z, q.z, p.w, q.w, x[j].z, x[j].w, T());
            }
    }
}

/* COLS: eights of rows of x; TILES: sixteens of outputs. */
template <class T, int COLS, int TILES>
static __global__ void __launch_bounds__(THREADS) skinny(ki_gemv_call c) {
    __shared__ float part[WARPS][COLS * 8][PITCH];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint32_t n_units = c.k / 8, first = blockIdx.x * TILE * TILES;
    const uint4 *rows[TILES][2];
    weights<TILES> even, odd;
    float acc[TILES][COLS][4] = {};
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) /* rows past the end read the last one, and are not written */
            rows[i][h] = (const uint4 *)c.weight +
                         (size_t)min(first + TILE * i + 8 * h + g, c.n - 1) * n_units;
    const uint32_t step = WARPS * UNITS;
    even.load(rows, warp * UNITS + t, n_units);
    odd.load(rows, warp * UNITS + t + step, n_units);
    ki_pdl_launch();
    ki_pdl_wait();
    for (uint32_t unit = warp * UNITS; unit < n_units; unit += 2 * step) {
        multiply<T, COLS, TILES>(acc, even, c, unit + t, n_units);
        even.load(rows, unit + t + 2 * step, n_units);
        if (unit + step >= n_units) break;
        multiply<T, COLS, TILES>(acc, odd, c, unit + step + t, n_units);
        odd.load(rows, unit + t + 3 * step, n_units);
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        if (i) __syncthreads(); /* the last tile was added up */
#pragma unroll
        for (int j = 0; j < COLS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                part[warp][8 * j + 2 * t + e % 2][g + e / 2 * 8] = acc[i][j][e];
        __syncthreads();
        for (uint32_t o = threadIdx.x; o < TILE * 8 * COLS; o += THREADS) {
            uint32_t m = o / TILE, n = first + TILE * i + o % TILE;
            if (m >= c.m || n >= c.n) continue;
            float sum = part[0][m][o % TILE], *to = c.out + m * c.out_stride + n;
#pragma unroll
            for (int w = 1; w < WARPS; w++) sum += part[w][m][o % TILE];
            *to = c.add ? *to + sum : sum;
        }
    }
}

template <class T, int COLS, int TILES>
static cudaError_t launch(const ki_gemv_call *c, void *stream) {
    uint32_t n_blocks = (c->n + TILE * TILES - 1) / (TILE * TILES);
    return ki_launch(skinny<T, COLS, TILES>, n_blocks, THREADS, 0, true, stream, *c);
}

/* Of many rows a block makes twice the outputs: x is read half as often then. */
template <class T> static cudaError_t dispatch(const ki_gemv_call *c, void *stream) {
    if (c->m <= 8) return launch<T, 1, 1>(c, stream);
    if (c->m <= 16) return launch<T, 2, 1>(c, stream);
    if (c->m <= 32) return launch<T, 4, 2>(c, stream);
    return launch<T, 8, 2>(c, stream);
}

extern "C" kivi_status ki_skinny_run(const ki_gemv_call *c, void *stream, kivi_error *err) {
    return ki_cuda_check(c->type == KI_CUDA_F16 ? dispatch<__half>(c, stream)
                                                : dispatch<__nv_bfloat16>(c, stream),
                         "product of some rows", err);
}
