/* fresh.cuh: weights are read once: past the caches that rows of x should stay in. */
#ifndef KI_FRESH_CUH
#define KI_FRESH_CUH
#include <stdint.h>

static __device__ __forceinline__ uint4 ki_fresh(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

#endif
