/* kv_rows.cuh: rows of float16 and of results, for the kernels that write them. */
#ifndef KI_KV_ROWS_CUH
#define KI_KV_ROWS_CUH
#include "kv_mma.cuh"
#include "kv_plan.h"

/* A block of 16-bit rows in the ring or with the sinks; side 0 keys, 1 values. */
KI_DEV uint8_t *exact_block(const ki_cuda_layout &l, const ki_cuda_seq &s, uint32_t layer,
                            uint32_t head, uint32_t block, uint32_t side) {
    uint64_t slot = (uint64_t)layer * l.n_kv_heads + head, bytes = (uint64_t)l.head_dim * 64;
    if (block < l.sink_blocks)
        return (uint8_t *)s.sinks +
               (slot * 2 * l.sink_blocks + side * l.sink_blocks + block) * bytes;
    uint32_t k = l.k_bits < 16 ? s.k_blocks : 0, v = l.v_bits < 16 ? s.v_blocks : 0;
    uint32_t in_ring = side ? k + block % s.v_blocks : block % s.k_blocks;
    return (uint8_t *)s.ring + (slot * (k + v) + in_ring) * bytes;
}

KI_DEV void store_out(void *out, ki_cuda_type type, uint64_t at, float x) {
    if (type == KI_CUDA_F32) ((float *)out)[at] = x;
    else if (type == KI_CUDA_F16)
        ((__half *)out)[at] = __float2half(fminf(fmaxf(x, -65504.0f), 65504.0f));
    else ((__nv_bfloat16 *)out)[at] = __float2bfloat16(x);
}

/* Four neighbours; `at` is a multiple of 4. */
KI_DEV void store_four(void *out, ki_cuda_type type, uint64_t at, float4 x) {
    if (type == KI_CUDA_F32) {
        *(float4 *)((float *)out + at) = x;
        return;
    }
    uint2 two;
    if (type == KI_CUDA_F16) {
        float y[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 4; e++) y[e] = fminf(fmaxf(y[e], -65504.0f), 65504.0f);
        two = make_uint2(pack2(y[0], y[1]), pack2(y[2], y[3]));
    } else {
        __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y),
                       high = __floats2bfloat162_rn(x.z, x.w);
        two = make_uint2(*(uint32_t *)&low, *(uint32_t *)&high);
    }
    *(uint2 *)((uint16_t *)out + at) = two;
}

/* Turns n_rows rows [D], `stride` floats apart, in shared memory (plus.h), there and back alike, by
 * n_threads threads that in_step keeps together. All of them call it, in step with whoever wrote
 * the rows. */
template <class InStep>
KI_DEV void turn_rows_by(float *rows, uint32_t n_rows, uint32_t stride, uint32_t head_dim,
                         uint32_t thread, uint32_t n_threads, InStep in_step) {
    uint32_t block = head_dim & (0u - head_dim), pairs = head_dim / 2;
    for (uint32_t h = 1; h < block; h *= 2) {
        in_step();
        for (uint32_t k = thread; k < n_rows * pairs; k += n_threads) {
            uint32_t p = k % pairs, i = k / pairs * stride + p / h * 2 * h + p % h;
            float x = rows[i], y = rows[i + h];
            rows[i] = __fadd_rn(x, y);
            rows[i + h] = __fsub_rn(x, y);
        }
    }
    in_step();
    float f = __frsqrt_rn((float)block);
    for (uint32_t k = thread; k < n_rows * head_dim; k += n_threads) {
        uint32_t i = k / head_dim * stride + k % head_dim;
        rows[i] = __fmul_rn(rows[i], f);
    }
    in_step();
}

/* By a thread block, and one row by one warp. */
KI_DEV void turn_rows(float *rows, uint32_t n_rows, uint32_t stride, uint32_t head_dim,
                      uint32_t thread, uint32_t n_threads) {
    turn_rows_by(rows, n_rows, stride, head_dim, thread, n_threads, [] { __syncthreads(); });
}
KI_DEV void turn_row(float *row, uint32_t head_dim, uint32_t thread, uint32_t n_threads) {
    turn_rows(row, 1, head_dim, head_dim, thread, n_threads);
}
KI_DEV void turn_row_by_warp(float *row, uint32_t head_dim, uint32_t lane) {
    turn_rows_by(row, 1, head_dim, head_dim, lane, 32, [] { __syncwarp(); });
}

/* The same of one row whose D, a power of two, is one block, in a warp's registers: x[m] is channel
 * lane + 32 m. The same sums of the same pairs. UNROLLED: of the five steps between lanes. */
template <int D, int UNROLLED = 5>
KI_DEV void turn_in_registers(float (&x)[D / 32], uint32_t lane) {
    static_assert(D >= 32 && (D & (D - 1)) == 0, "one block");
#pragma unroll UNROLLED
    for (uint32_t h = 1; h < 32; h *= 2)
#pragma unroll
        for (int m = 0; m < D / 32; m++) {
            float y = __shfl_xor_sync(~0u, x[m], h);
            x[m] = lane & h ? __fsub_rn(y, x[m]) : __fadd_rn(x[m], y);
        }
#pragma unroll
    for (int h = 1; h < D / 32; h *= 2)
#pragma unroll
        for (int m = 0; m < D / 32; m++) {
            if (m & h) continue;
            float y = x[m], z = x[m + h];
            x[m] = __fadd_rn(y, z), x[m + h] = __fsub_rn(y, z);
        }
    float f = __frsqrt_rn((float)D);
#pragma unroll
    for (int m = 0; m < D / 32; m++) x[m] = __fmul_rn(x[m], f);
}

#endif
