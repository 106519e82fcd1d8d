/* kv_mma.cuh: pairs of float16, and the stages of a warp. */
#ifndef KI_KV_MMA_CUH
#define KI_KV_MMA_CUH
#include "pdl.cuh"
#include "ptx.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define KI_DEV_MEMBER static __device__ __forceinline__

KI_DEV float low_half(uint32_t a) { return __half2float(__ushort_as_half((uint16_t)a)); }
KI_DEV float high_half(uint32_t a) { return __half2float(__ushort_as_half((uint16_t)(a >> 16))); }
enum { TWO_QUARTERS = 0x34003400, TWO_HALVES = 0x38003800, TWO_ONES = 0x3c003c00 };
enum { TWO_TWOS = 0x40004000, TWO_FOURS = 0x44004400 }; /* pairs of float16 */

/* ---- stages of one warp: bulk copies on sm_90, cp.async before ---- */

/* A ring of n_stages buffers in shared memory that one warp fills and reads. Copies complete in
 * order; issue() and wait() are called by the whole warp, once for each unit in turn. */
template <int N_STAGES> struct warp_pipe {
    uint8_t *data;  /* [N_STAGES][unit_bytes], 128-byte aligned */
    uint64_t *full; /* [N_STAGES] barriers (sm_90) */
    uint32_t unit_bytes;

    __device__ __forceinline__ void init(uint32_t lane) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0)
            for (int i = 0; i < N_STAGES; i++) ki_bar_init(ki_shared(full + i), 1);
        ki_bar_fence();
        __syncwarp();
#endif
    }
    /* Fills stage i % N_STAGES with unit i; the stage's last reader is done. */
    __device__ __forceinline__ void issue(uint32_t i, const uint8_t *from, uint32_t lane) {
        uint32_t stage = i % N_STAGES, to = ki_shared(data + stage * unit_bytes);
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            uint32_t bar = ki_shared(full + stage);
            ki_bar_expect(bar, unit_bytes);
            ki_bulk_copy(to, from, unit_bytes, bar);
        }
#else
        for (uint32_t at = lane * 16; at < unit_bytes; at += 512)
            ki_copy16(to + at, from + at, true);
        ki_end_copies();
#endif
    }
    /* What a warp that has nothing more to issue calls instead: keeps the count of groups. */
    __device__ __forceinline__ void issue_nothing() {
#if __CUDA_ARCH__ < 900
        ki_end_copies();
#endif
    }
    /* Unit i is in its stage. N_STAGES issues (of units or nothing) came before unit 0's wait, and
     * one between any two waits. */
    __device__ __forceinline__ const uint8_t *wait(uint32_t i) {
        uint32_t stage = i % N_STAGES;
#if __CUDA_ARCH__ >= 900
        ki_bar_wait(ki_shared(full + stage), i / N_STAGES & 1);
#else
        ki_wait_copies<N_STAGES - 1>();
        __syncwarp();
#endif
        return data + stage * unit_bytes;
    }

    /* A warp with fewer units than stages has the ring behind them for whatever else its lanes copy
     * there, each for itself (sm_90): told and copied, then one arrive behind a __syncwarp, then
     * wait_spare, which waits for all of it. */
    __device__ __forceinline__ uint32_t spare_bar() const { return ki_shared(full + N_STAGES - 1); }
    __device__ __forceinline__ void wait_spare() {
#if __CUDA_ARCH__ >= 900
        ki_bar_wait(spare_bar(), 0);
#endif
    }
};

#endif
