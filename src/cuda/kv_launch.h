/* kv_launch.h: host side of a launch, for the .cu files of this folder. */
#ifndef KI_KV_LAUNCH_H
#define KI_KV_LAUNCH_H
#include "kv_cuda.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

static inline kivi_status ki_cuda_check(cudaError_t e, const char *what, kivi_error *err) {
    if (e == cudaSuccess) return KIVI_OK;
    return KI_FAIL(err, DEVICE, "cuda: %s: %s", what, cudaGetErrorString(e));
}

/* Of the thread's device; 0: it cannot be asked. */
static inline uint32_t ki_device_has(enum cudaDeviceAttr what) {
    int device = 0, n = 0;
    if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&n, what, device);
    return (uint32_t)n;
}
/* What a thread block can have. */
static inline uint32_t ki_most_shared_bytes(void) {
    return ki_device_has(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
static inline uint32_t ki_n_sms(void) { return ki_device_has(cudaDevAttrMultiProcessorCount); }

/* pdl: the kernel may begin while the one before it ends; it waits by itself (pdl.cuh). */
template <class... P, class... A>
static cudaError_t ki_launch(void (*kernel)(P...), uint32_t n_blocks, uint32_t n_threads,
                             uint32_t shared_bytes, bool pdl, void *stream, A... args) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    config.gridDim = n_blocks;
    config.blockDim = n_threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = pdl;
    config.attrs = &attribute;
    config.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

/* Limits of shared memory of each file's kernels. */
kivi_status ki_cuda_decode_prepare(kivi_error *err);
kivi_status ki_cuda_append_prepare(kivi_error *err);
kivi_status ki_cuda_prompt_append_prepare(kivi_error *err);
kivi_status ki_cuda_prompt_prepare(uint32_t most_bytes, kivi_error *err);

#endif
#endif
