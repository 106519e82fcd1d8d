/* kv_decode_launch.cuh: how a kernel of decode attention is launched, and an entry of the table of
 * them that the choice (kv_shared.h) is an index of. */
#ifndef KI_KV_DECODE_LAUNCH_CUH
#define KI_KV_DECODE_LAUNCH_CUH
#include "kv_decode.cuh"

/* One entry of the table of kernels. */
struct decode_kernel {
    uint32_t head_dim, unit_subs, heads, warps; /* heads 8: any number */
    cudaError_t (*launch)(const decode_args *args, uint32_t n_blocks, uint32_t warps, bool pdl,
                          cudaStream_t stream);
    cudaError_t (*prepare)(void); /* raises the limit of shared memory */
};

/* As much shared memory as a thread block can have. */
template <class S> static cudaError_t decode_prepare(void) {
    cudaError_t e =
        cudaFuncSetAttribute(ki_decode_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)ki_most_shared_bytes());
    return e == cudaSuccess ? ki_share_multiprocessors(ki_decode_kernel<S>) : e;
}

kivi_status ki_cuda_decode_attend_by(const ki_cuda_attend_call *call, const decode_kernel *kernel,
                                     uint32_t warps, void *stream, kivi_error *err);

template <class S>
static cudaError_t decode_launch(const decode_args *args, uint32_t n_blocks, uint32_t warps,
                                 bool pdl, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    config.gridDim = n_blocks;
    config.blockDim = warps * 32;
    config.dynamicSmemBytes = ki_decode_bytes(&args->l, warps, S::STAGES);
    config.stream = stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = pdl;
    config.attrs = &attribute;
    config.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&config, ki_decode_kernel<S>, *args);
}

template <class S> static constexpr decode_kernel decode_entry() {
    return {S::D, S::NB, S::HEADS, S::WARPS, decode_launch<S>, decode_prepare<S>};
}

#endif
