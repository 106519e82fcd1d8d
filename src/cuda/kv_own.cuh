/* kv_own.cuh: the rows of a step of decoding that attention takes itself, as they come out of a
 * product: its query, and the key and value that it puts into the window (kv_cuda.h's `append`). */
#ifndef KI_KV_OWN_CUH
#define KI_KV_OWN_CUH
#include "kv_row.cuh"
#include "kv_slow.cuh"

/* Queries of a thread block's heads, [heads][D] f16 in shared memory: each warp rotates every
 * WARPS-th for all. The first is asked for apart from what is done with it. */
template <class S> struct own_query {
    half_rows<S::D, true> row;

    __device__ __forceinline__ void load(const own_rows &own, uint32_t number, uint32_t head,
                                         uint32_t lane) {
        row.load(own.q, (uint64_t)number * own.q_stride + head * S::D,
                 own.rope ? own.rope + (uint64_t)number * S::D : NULL, lane);
    }
    __device__ __forceinline__ void put(uint16_t *to, bool has_rope, uint32_t lane) {
        row_check ignored = {};
        row.rotate(KI_CUDA_F32, has_rope, &ignored, lane);
        row.store(lane, [&](uint32_t c, uint32_t two) { *(uint32_t *)(to + c) = two; });
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
