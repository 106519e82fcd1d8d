/* pdl.cuh: programmatic dependent launch. A kernel that calls ki_pdl_wait before it reads or writes
 * what others do may be launched while the one before it in the stream still runs; ki_pdl_launch
 * lets the one after it come. Below sm_90 there is no such thing, and both do nothing. A build with
 * KI_EMULATED has its own of both (tests/cuda/emulator). */
#ifndef KI_PDL_CUH
#define KI_PDL_CUH

#include <cuda_runtime.h>

/* Host: most shared memory and least cache, as products have it (stream.cu). A multiprocessor is
 * empty before that division changes: kernels that are to begin beside others agree on it. */
template <class K> static cudaError_t ki_share_multiprocessors(K *kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
}

#ifdef KI_EMULATED
#include <emulator/pdl.cuh>
#else

static __device__ __forceinline__ void ki_pdl_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void ki_pdl_launch(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
#endif
