/* cuda.cuh: as much of CUDA C++ and its runtime as decode attention uses, as C++17: one header for
 * all of NVIDIA's. A kernel is a function of one thread; what lanes do together is emulate.h's.
 *
 * KI_EMULATED is the architecture, as 800 or 900. */
#ifndef KI_EMULATED_CUDA_CUH
#define KI_EMULATED_CUDA_CUH
#include "emulate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

extern "C" {
#include "base.h"
}

/* ---- the language ---- */

#define __CUDACC__ 1
#define __CUDA_ARCH__ KI_EMULATED
#define __device__
#define __host__
#define __global__
#define __shared__ thread_local /* static in functions, and so one for a thread block */
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
using std::max;
using std::min;

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

/* ---- lanes of a warp: all 32 ---- */

static inline void __syncthreads() { emulate_sync_block(); }
static inline void __syncwarp() { emulate_warp(OP_SYNC, 0, 0); }

template <class T>
static inline T emulated_shuffle(emulated_op op, uint32_t mask, T x, uint32_t arg) {
    uint64_t bits = 0;
    if (mask != ~0u) emulate_fail("a shuffle of some lanes");
    memcpy(&bits, &x, sizeof x);
    bits = emulate_warp(op, bits, arg);
    memcpy(&x, &bits, sizeof x);
    return x;
}
template <class T> static inline T __shfl_sync(uint32_t mask, T x, uint32_t lane) {
    return emulated_shuffle(OP_SHUFFLE, mask, x, lane);
}
template <class T> static inline T __shfl_up_sync(uint32_t mask, T x, uint32_t by) {
    return emulated_shuffle(OP_SHUFFLE_UP, mask, x, by);
}
template <class T> static inline T __shfl_xor_sync(uint32_t mask, T x, uint32_t with) {
    return emulated_shuffle(OP_SHUFFLE_XOR, mask, x, with);
}
static inline int __any_sync(uint32_t mask, int x) {
    return emulated_shuffle(OP_ANY, mask, (int)(x != 0), 0);
}

static inline void atomicAdd(unsigned long long *at, unsigned long long x) { *at += x; }

/* ---- numbers: the compiler contracts nothing (-ffp-contract=off) ---- */

static inline uint32_t __float_as_uint(float x) { return ki_f32_bits(x); }
static inline float __uint_as_float(uint32_t x) { return ki_f32_from_bits(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __frsqrt_rn(float x) { return (float)(1 / std::sqrt((double)x)); }

/* A table: the kernels' products are made of these. */
extern float emulated_halves[65536];
static inline float emulated_half(uint32_t h) { return emulated_halves[h & 0xffff]; }

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    uint16_t low, high;
};
static inline __half __ushort_as_half(uint16_t h) { return {h}; }
static inline float __half2float(__half h) { return emulated_half(h.bits); }
static inline uint16_t __half_as_ushort(__half h) { return h.bits; }
static inline __half __float2half(float x) { return {ki_f32_to_f16(x)}; }
static inline __half __float2half_rn(float x) { return __float2half(x); }
static inline __nv_bfloat16 __float2bfloat16(float x) { /* half to even */
    uint32_t u = ki_f32_bits(x);
    return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16(low).bits, __float2bfloat16(high).bits};
}

/* ---- the runtime ---- */

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout,
    cudaLaunchAttributeProgrammaticStreamSerialization,
    cudaSharedmemCarveoutMaxShared
};
struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    uint32_t gridDim, blockDim, dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    int numAttrs;
};
static inline const char *cudaGetErrorString(cudaError_t) { return emulate_problem(); }
static inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    *value = what == cudaDevAttrMultiProcessorCount ? 1 : EMULATED_SHARED_BYTES;
    return cudaSuccess;
}
template <class K> static cudaError_t cudaFuncSetAttribute(K, int, int) { return cudaSuccess; }

/* A kernel has one argument, a struct. It has run when this returns. */
template <class A>
static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(A),
                                      std::remove_const_t<A> args) {
    struct call {
        void (*kernel)(A);
        std::remove_const_t<A> *args;
    } c = {kernel, &args};
    emulate_launch(
        config->gridDim, config->blockDim, config->dynamicSmemBytes, config->numAttrs != 0,
        [](void *p) { ((call *)p)->kernel(*((call *)p)->args); }, &c);
    return emulate_problem() ? 1 : cudaSuccess;
}

#endif
