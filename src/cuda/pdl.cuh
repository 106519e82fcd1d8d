/* pdl.cuh: programmatic dependent launch. A kernel that calls ki_pdl_wait before it reads or writes
 * what others do may be launched while the one before it in the stream still runs; ki_pdl_launch
 * lets the one after it come. Below sm_90 there is no such thing, and both do nothing. */
#ifndef KI_PDL_CUH
#define KI_PDL_CUH

#include <cuda_runtime.h>

/* Host: most shared memory and least cache, as products have it (stream.cu). A multiprocessor is
 * empty before that division changes: kernels that are to begin beside others agree on it. */
template <class K> static cudaError_t ki_share_multiprocessors(K *kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
}

static __device__ __forceinline__ void ki_pdl_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Reads what another kernel of the step wrote, past the cache of the multiprocessor. The wait makes
 * visible what the kernel just before wrote; of what an earlier one changed (x, which each product
 * adds to) there may still be a line that a thread block here read before that. */
template <class T> static __device__ __forceinline__ T ki_fresh(const T *at) { return __ldcg(at); }

static __device__ __forceinline__ void ki_pdl_launch(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
