/* ahead.cuh: weights into the L2 cache before a product's turn. A hint: nothing depends on it. */
#ifndef KI_AHEAD_CUH
#define KI_AHEAD_CUH
#include "dense_cuda.h"

/* Asks for n_bytes at p, both multiples of 16; one thread's work. Below sm_90 nothing is done. */
static __device__ __forceinline__ void ki_ask_ahead(const void *p, uint32_t n_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
                 "r"(n_bytes)
                 : "memory");
#endif
}

/* One of n_all threads that share the rows. */
static __device__ __forceinline__ void ki_ask_rows(const ki_cuda_ahead &a, uint32_t thread,
                                                   uint32_t n_all) {
    for (uint32_t i = thread; i < a.n_rows; i += n_all)
        ki_ask_ahead((const uint8_t *)a.weights + (size_t)i * a.row_bytes, a.slice_bytes);
}

#endif
