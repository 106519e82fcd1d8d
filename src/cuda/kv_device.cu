/* kv_device.cu: what has to be done once for a device. */
#include "kv_launch.h"

kivi_status ki_cuda_kernels_init(uint32_t *shared_bytes, kivi_error *err) {
    int device = 0;
    cudaDeviceProp p;
    KI_TRY(ki_cuda_check(cudaGetDevice(&device), "device", err));
    KI_TRY(ki_cuda_check(cudaGetDeviceProperties(&p, device), "device", err));
    if (p.major < 8)
        return KI_FAIL(err, UNSUPPORTED,
                       "cuda: %s has compute capability %d.%d, expected 8.0 or more", p.name,
                       p.major, p.minor);
    *shared_bytes = ki_most_shared_bytes();
    KI_TRY(ki_cuda_decode_prepare(err));
    KI_TRY(ki_cuda_append_prepare(err));
    KI_TRY(ki_cuda_prompt_append_prepare(err));
    return ki_cuda_prompt_prepare(*shared_bytes, err);
}
