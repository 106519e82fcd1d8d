/* kv_own.cuh: the rows of a step of decoding that attention takes itself, as they come out of a
 * product: its query, and the key and value that it puts into the window (kv_cuda.h's `append`). */
#ifndef KI_KV_OWN_CUH
#define KI_KV_OWN_CUH
#include "kv_row.cuh"
#include "kv_slow.cuh"

/* A lane's channels of its head's query, as they are loaded, and cos and sin of each pair. */
template <int NJ> struct own_query {
    float2 x[2 * NJ];
    float4 turn[NJ];

    __device__ __forceinline__ void load(const own_rows &own, uint32_t row, uint32_t head,
                                         bool is_head, uint32_t lane) {
        const float *from = own.q + (uint64_t)row * own.q_stride + head * NJ * 16 + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < 2 * NJ; k++)
            x[k] = is_head ? *(const float2 *)(from + 8 * k) : make_float2(0, 0);
        if (!own.rope) return;
        const float *rope = own.rope + (uint64_t)row * NJ * 16 + lane % 4 * 4;
#pragma unroll
        for (int k = 0; k < NJ; k++) turn[k] = *(const float4 *)(rope + 16 * k);
    }
    __device__ __forceinline__ void halves(uint32_t (&out)[2 * NJ], bool has_rope) {
        row_check ignored = {};
#pragma unroll
        for (int k = 0; k < NJ; k++) { /* pairs (j, j + D/2) */
            if (has_rope) rotate_pairs(x[k], x[k + NJ], turn[k]);
            out[k] = checked_pair(x[k], &ignored);
            out[k + NJ] = checked_pair(x[k + NJ], &ignored);
        }
    }
};

/* The row of the newest block, by the warp that reads this block. */
template <class S> struct own_row {
    kv_row<S::D, true> row;

    __device__ __forceinline__ void load(const decode_args &a, const ki_plan_item &item,
                                         uint32_t head, uint32_t lane) {
        const own_rows &own = a.own;
        row.load(own.k, (uint64_t)item.row * own.k_stride + head * S::D, own.v,
                 (uint64_t)item.row * own.v_stride + head * S::D,
                 own.rope ? own.rope + (uint64_t)item.row * S::D : NULL, lane);
    }
    /* Into the store; the warp's loads from there come behind. tells: of the thread blocks that
     * have the row, this one counts. */
    __device__ __forceinline__ void store(const decode_args &a, const ki_plan_item &item,
                                          uint32_t head, bool tells, uint32_t lane) {
        const own_rows &own = a.own;
        uint32_t block = item.pos / KI_SUB_TOKENS;
        row_check check = row.finish(KI_CUDA_F32, own.rope, S::PLUS, lane);
        row.put({(uint8_t *)exact_of(a, item, head, block, 0),
                 (uint8_t *)exact_of(a, item, head, block, 1), item.pos % KI_SUB_TOKENS},
                lane);
        if (tells)
            report_row(check, own.counters, own.row_flags ? own.row_flags + item.row : NULL, lane);
        ki_settle_warp();
    }
    /* And into copies of the block in the ring. */
    __device__ __forceinline__ void put_here(const ki_plan_item &item, const slow_place &at,
                                             uint32_t lane) const {
        uint32_t t = item.pos % KI_SUB_TOKENS;
        if (at.keys_here) row.put_key((uint8_t *)at.k16, t, lane);
        if (at.values_here) row.put_value((uint8_t *)at.v16, t, lane);
        __syncwarp();
    }
};

#endif
