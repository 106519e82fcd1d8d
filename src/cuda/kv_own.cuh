/* kv_own.cuh: the rows of a step of decoding that attention takes itself, as they come out of a
 * product: its query, and the key and value that it puts into the window (kv_cuda.h's `append`). */
#ifndef KI_KV_OWN_CUH
#define KI_KV_OWN_CUH
#include "kv_row.cuh"
#include "kv_shared.h"
#include "kv_slow.cuh"

/* Queries of the thread block's heads: a warp turns those of every WARPS-th head, and all warps
 * read them in shared memory, [heads][KI_OWN_HALVES(D)] f16; of one head each warp has a copy, and
 * no warp waits for another. */
template <class S> struct own_queries {
    static constexpr uint32_t EACH = S::HEADS > S::WARPS ? 2 : 1; /* on their way at once */
    half_rows<S::D, true> rows[EACH];

    /* Heads first, first + warps, ... of n, which begin at head first_head. */
    __device__ __forceinline__ void load(const own_rows &own, uint32_t row, uint32_t first_head,
                                         uint32_t first, uint32_t n, uint32_t lane) {
        const float *rope = own.rope ? own.rope + (uint64_t)row * S::D : NULL;
#pragma unroll
        for (uint32_t e = 0; e < EACH; e++) {
            uint32_t h = first + e * S::warps();
            if (h < n)
                rows[e].load(own.q, (uint64_t)row * own.q_stride + (first_head + h) * S::D, rope,
                             lane);
        }
    }
    /* What was loaded, and where a block has few warps the heads behind. */
    __device__ __forceinline__ void store(uint16_t *to, const own_rows &own, uint32_t row,
                                          uint32_t first_head, uint32_t first, uint32_t n,
                                          uint32_t lane) {
        row_check ignored = {};
#pragma unroll 1
        for (; first < n; first += EACH * S::warps()) {
#pragma unroll
            for (uint32_t e = 0; e < EACH; e++) {
                uint32_t h = first + e * S::warps();
                if (h >= n) continue;
                rows[e].rotate(KI_CUDA_F32, own.rope, &ignored, lane);
                rows[e].store(lane, [&](uint32_t c, uint32_t two) {
                    *(uint32_t *)(to + h * KI_OWN_HALVES(S::D) + c) = two;
                });
            }
            if (S::HEADS > EACH * S::WARPS || S::IS_FLEXIBLE)
                load(own, row, first_head, first + EACH * S::warps(), n, lane);
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
