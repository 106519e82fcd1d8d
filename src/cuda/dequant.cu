/* dequant.cu: GGUF blocks become elements of the type that products read, a kernel for each type of
 * block. Columns as the formats number them; src/kernel/blocks.c draws the bytes. */
#include "dense_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static __device__ __forceinline__ float half_at(const uint8_t *p) {
    return __half2float(__ushort_as_half((unsigned short)(p[0] | p[1] << 8)));
}

/* A block type: its columns and bytes, and the value of column i. */
struct block_q4_0 {
    enum { COLS = 32, BYTES = 18 };
    static __device__ float at(const uint8_t *p, int i) {
        int code = p[2 + i % 16] >> (i / 16 * 4) & 15;
        return half_at(p) * (float)(code - 8);
    }
};

struct block_q4_1 {
    enum { COLS = 32, BYTES = 20 };
    static __device__ float at(const uint8_t *p, int i) {
        int code = p[4 + i % 16] >> (i / 16 * 4) & 15;
        return half_at(p) * (float)code + half_at(p + 2);
    }
};

static __device__ __forceinline__ int five_bits(const uint8_t *high, const uint8_t *low, int i) {
    return (low[i % 16] >> (i / 16 * 4) & 15) | (high[i / 8] >> i % 8 & 1) << 4;
}

struct block_q5_0 {
    enum { COLS = 32, BYTES = 22 };
    static __device__ float at(const uint8_t *p, int i) {
        return half_at(p) * (float)(five_bits(p + 2, p + 6, i) - 16);
    }
};

struct block_q5_1 {
    enum { COLS = 32, BYTES = 24 };
    static __device__ float at(const uint8_t *p, int i) {
        return half_at(p) * (float)five_bits(p + 4, p + 8, i) + half_at(p + 2);
    }
};

struct block_q8_0 {
    enum { COLS = 32, BYTES = 34 };
    static __device__ float at(const uint8_t *p, int i) {
        return half_at(p) * (float)(int8_t)p[2 + i];
    }
};

/* Two bits of column i: for each 128 columns 32 bytes. */
static __device__ __forceinline__ int two_bits(const uint8_t *p, int i) {
    int j = i / 32;
    return p[j / 4 * 32 + i % 32] >> (j % 4 * 2) & 3;
}

/* One bit of column i: bit i / 32 of byte i % 32. */
static __device__ __forceinline__ int one_bit(const uint8_t *p, int i) {
    return p[i % 32] >> (i / 32) & 1;
}

struct block_q2_k {
    enum { COLS = 256, BYTES = 84 };
    static __device__ float at(const uint8_t *p, int i) {
        int scale = p[i / 16] & 15, min = p[i / 16] >> 4;
        return half_at(p + 80) * (float)(scale * two_bits(p + 16, i)) -
               half_at(p + 82) * (float)min;
    }
};

struct block_q3_k {
    enum { COLS = 256, BYTES = 110 };
    static __device__ float at(const uint8_t *p, int i) {
        const uint8_t *s = p + 96;
        int g = i / 16, low = s[g % 8] >> (g / 8 * 4) & 15, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
        int code = two_bits(p + 32, i) | one_bit(p, i) << 2;
        return half_at(p + 108) * (float)(((low | high << 4) - 32) * (code - 4));
    }
};

/* Scale and minimum of 32 columns, of six bits each. */
static __device__ __forceinline__ int2 six_bits(const uint8_t *s, int j) {
    if (j < 4) return make_int2(s[j] & 63, s[4 + j] & 63);
    int i = j - 4;
    return make_int2((s[8 + i] & 15) | s[i] >> 6 << 4, s[8 + i] >> 4 | s[4 + i] >> 6 << 4);
}

struct block_q4_k {
    enum { COLS = 256, BYTES = 144 };
    static __device__ float at(const uint8_t *p, int i) {
        int j = i / 32, code = p[16 + j / 2 * 32 + i % 32] >> (j % 2 * 4) & 15;
        int2 s = six_bits(p + 4, j);
        return half_at(p) * (float)(s.x * code) - half_at(p + 2) * (float)s.y;
    }
};

struct block_q5_k {
    enum { COLS = 256, BYTES = 176 };
    static __device__ float at(const uint8_t *p, int i) {
        int j = i / 32, code = p[48 + j / 2 * 32 + i % 32] >> (j % 2 * 4) & 15;
        int2 s = six_bits(p + 4, j);
        return half_at(p) * (float)(s.x * (code | one_bit(p + 16, i) << 4)) -
               half_at(p + 2) * (float)s.y;
    }
};

struct block_q6_k {
    enum { COLS = 256, BYTES = 210 };
    static __device__ float at(const uint8_t *p, int i) {
        int j = i / 32, low = p[j / 4 * 64 + j % 2 * 32 + i % 32] >> (j % 4 / 2 * 4) & 15;
        int code = (low | two_bits(p + 128, i) << 4) - 32;
        return half_at(p + 208) * (float)((int8_t)p[192 + i / 16] * code);
    }
};

struct block_f32 {
    enum { COLS = 1, BYTES = 4 };
    static __device__ float at(const uint8_t *p, int) {
        return __uint_as_float(p[0] | p[1] << 8 | p[2] << 16 | (unsigned)p[3] << 24);
    }
};

struct block_f16 {
    enum { COLS = 1, BYTES = 2 };
    static __device__ float at(const uint8_t *p, int) { return half_at(p); }
};

struct block_bf16 {
    enum { COLS = 1, BYTES = 2 };
    static __device__ float at(const uint8_t *p, int) {
        return __uint_as_float((unsigned)(p[0] | p[1] << 8) << 16);
    }
};

static __device__ __forceinline__ void store(float *out, float v) { *out = v; }
static __device__ __forceinline__ void store(__half *out, float v) { *out = __float2half_rn(v); }
static __device__ __forceinline__ void store(__nv_bfloat16 *out, float v) {
    *out = __float2bfloat16_rn(v);
}

template <typename B, typename T>
static __global__ void dequantize(T *out, const uint8_t *blocks, size_t n) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < n) store(&out[i], B::at(blocks + i / B::COLS * B::BYTES, (int)(i % B::COLS)));
}

template <typename B>
static void launch(void *out, const uint8_t *blocks, size_t n, ki_cuda_type type, cudaStream_t s) {
    unsigned grid = (unsigned)((n + 255) / 256);
    if (type == KI_CUDA_F16) dequantize<B><<<grid, 256, 0, s>>>((__half *)out, blocks, n);
    else if (type == KI_CUDA_F32) dequantize<B><<<grid, 256, 0, s>>>((float *)out, blocks, n);
    else dequantize<B><<<grid, 256, 0, s>>>((__nv_bfloat16 *)out, blocks, n);
}

extern "C" void ki_cuda_dequantize(void *out, const uint8_t *blocks, ki_dtype dtype, size_t n,
                                   ki_cuda_type type, void *stream) {
    cudaStream_t s = (cudaStream_t)stream;
    switch (dtype) {
    case KI_F32: launch<block_f32>(out, blocks, n, type, s); break;
    case KI_F16: launch<block_f16>(out, blocks, n, type, s); break;
    case KI_BF16: launch<block_bf16>(out, blocks, n, type, s); break;
    case KI_Q4_0: launch<block_q4_0>(out, blocks, n, type, s); break;
    case KI_Q4_1: launch<block_q4_1>(out, blocks, n, type, s); break;
    case KI_Q5_0: launch<block_q5_0>(out, blocks, n, type, s); break;
    case KI_Q5_1: launch<block_q5_1>(out, blocks, n, type, s); break;
    case KI_Q8_0: launch<block_q8_0>(out, blocks, n, type, s); break;
    case KI_Q2_K: launch<block_q2_k>(out, blocks, n, type, s); break;
    case KI_Q3_K: launch<block_q3_k>(out, blocks, n, type, s); break;
    case KI_Q4_K: launch<block_q4_k>(out, blocks, n, type, s); break;
    case KI_Q5_K: launch<block_q5_k>(out, blocks, n, type, s); break;
    case KI_Q6_K: launch<block_q6_k>(out, blocks, n, type, s); break;
    case KI_DTYPE_COUNT: break;
    }
}
