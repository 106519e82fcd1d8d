/* act.cuh: the activations of an MLP, and rows of the type that products read. */
#ifndef KI_ACT_CUH
#define KI_ACT_CUH
#include "dense_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static __device__ __forceinline__ float ki_gelu_tanh(float x) {
    const float root = 0.7978845608f; /* sqrt(2 / pi) */
    return x / (1.0f + expf(-2.0f * root * (x + 0.044715f * x * x * x)));
}

/* act(gate) up; SILU_MUL or GELU_MUL. */
static __device__ __forceinline__ float ki_gated(ki_cuda_act act, float gate, float up) {
    return (act == KI_CUDA_SILU_MUL ? gate / (1.0f + expf(-gate)) : ki_gelu_tanh(gate)) * up;
}

static __device__ __forceinline__ void ki_store(void *out, size_t i, float v, ki_cuda_type type) {
    if (type == KI_CUDA_F16) ((__half *)out)[i] = __float2half_rn(v);
    else if (type == KI_CUDA_BF16) ((__nv_bfloat16 *)out)[i] = __float2bfloat16_rn(v);
    else ((float *)out)[i] = v;
}

#endif
