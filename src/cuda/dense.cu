/* dense.cu: the small steps of a pass. A row is one block's work; a sum over a row is made by each
 * thread in column order, then by one fixed tree: bits repeat and do not depend on neighbours. */
#include "act.cuh"
#include "dense_cuda.h"

#include "kv_launch.h"
#include "norm.cuh"
#include "pdl.cuh"

/* 1,024 threads: at small batches a step waits for single rows. */
enum { ROW_THREADS = KI_NORM_THREADS, UNIT_THREADS = 256, WARPS = ROW_THREADS / 32 };

/* The sum over a block of ROW_THREADS, in every thread. */
static __device__ float block_sum(float v) {
    __shared__ float part[WARPS];
    v = ki_warp_sum(v);
    __syncthreads(); /* the last call's readers are done */
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    return ki_warp_sum(part[threadIdx.x % 32]);
}

/* ---- into the pass ---- */

/* The angle in float32, as the models were trained; its sine and cosine in float64, as the CPU. */
static __global__ void rope_table(float *out, const float *freq, size_t freq_stride,
                                  const uint32_t *positions, uint32_t half, float factor) {
    ki_pdl_launch();
    ki_pdl_wait();
    uint32_t row = blockIdx.x;
    for (uint32_t j = threadIdx.x; j < half; j += blockDim.x) {
        float angle = __fmul_rn((float)positions[row], freq[row * freq_stride + j]);
        double s, c;
        sincos((double)angle, &s, &c);
        out[((size_t)row * half + j) * 2] = (float)c * factor;
        out[((size_t)row * half + j) * 2 + 1] = (float)s * factor;
    }
}

extern "C" void ki_cuda_rope_table(float *out, const float *freq, size_t freq_stride,
                                   const uint32_t *positions, uint32_t n_rows, uint32_t half,
                                   float factor, bool pdl, void *stream) {
    ki_launch(rope_table, n_rows, 128, 0, pdl, stream, out, freq, freq_stride, positions, half,
              factor);
}

/* ---- norms ---- */

typedef struct moments {
    float mean, scale; /* of the row: (x - mean) scale */
} moments;

static __device__ moments row_moments(const float *x, uint32_t n, const ki_cuda_norm norm) {
    moments m = {0, 0};
    float sum = 0, square = 0;
    if (norm.bias) {
        for (uint32_t i = threadIdx.x; i < n; i += ROW_THREADS) sum += x[i];
        m.mean = block_sum(sum) / (float)n;
    }
    for (uint32_t i = threadIdx.x; i < n; i += ROW_THREADS) {
        float d = x[i] - m.mean;
        square += d * d;
    }
    m.scale = 1.0f / sqrtf(block_sum(square) / (float)n + norm.eps);
    return m;
}

static __device__ __forceinline__ float normed(const float *x, uint32_t i, moments m,
                                               const ki_cuda_norm norm) {
    float v = (x[i] - m.mean) * m.scale * norm.weight[i];
    return norm.bias ? v + norm.bias[i] : v;
}

/* Which row of what is read the block's row is. */
static __device__ __forceinline__ size_t row_of(const uint32_t *rows) {
    return rows ? rows[blockIdx.x] : blockIdx.x;
}

static __global__ void norm_rows(void *h, const float *x, const uint32_t *rows, ki_cuda_norm norm,
                                 uint32_t n, ki_cuda_type type) {
    ki_pdl_launch();
    ki_pdl_wait();
    size_t from = row_of(rows) * n, to = (size_t)blockIdx.x * n;
    moments m = row_moments(x + from, n, norm);
    for (uint32_t i = threadIdx.x; i < n; i += ROW_THREADS)
        ki_store(h, to + i, normed(x + from, i, m, norm), type);
}

static __global__ void add_norm(float *x, const float *delta, ki_cuda_norm norm, uint32_t n) {
    ki_pdl_launch();
    ki_pdl_wait();
    size_t at = (size_t)blockIdx.x * n;
    moments m = row_moments(delta + at, n, norm);
    for (uint32_t i = threadIdx.x; i < n; i += ROW_THREADS)
        x[at + i] += normed(delta + at, i, m, norm);
}

/* The same for rows that fit into a block's registers, FOURS float4 a thread: a row is read once,
 * and weights and bias, which no kernel writes, before the wait for the kernel before this one. */
static __device__ __forceinline__ float4 minus(float4 v, float mean) {
    return make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean);
}

/* v: the row less its mean where there is a bias, afterwards; 0 past its end. Returns the scale. */
template <int FOURS>
static __device__ __forceinline__ float center(float4 (&v)[FOURS], uint32_t n, bool has_mean,
                                               float eps) {
    float sum = 0, square = 0, mean = 0;
    if (has_mean) {
#pragma unroll
        for (int k = 0; k < FOURS; k++) sum += v[k].x + v[k].y + v[k].z + v[k].w;
        mean = block_sum(sum) / (float)n;
    }
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        if (threadIdx.x + k * ROW_THREADS >= n / 4) continue;
        v[k] = minus(v[k], mean);
        square = ki_add_squares(square, v[k]);
    }
    return ki_norm_scale(block_sum(square), n, eps);
}

/* h[r] = norm(from[rows[r]]), or with x instead: x[r] += norm(from[r]). */
template <int FOURS>
static __global__ void __launch_bounds__(ROW_THREADS)
    norm_held(void *h, float *x, const float *from, const uint32_t *rows, ki_cuda_norm norm,
              uint32_t n, ki_cuda_type type) {
    const float4 zero = {0, 0, 0, 0};
    float4 v[FOURS], w[FOURS], b[FOURS], old[FOURS];
    ki_pdl_launch();
    size_t row = (size_t)blockIdx.x * (n / 4), read = row_of(rows) * (n / 4);
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        uint32_t i = threadIdx.x + k * ROW_THREADS;
        w[k] = i < n / 4 ? ((const float4 *)norm.weight)[i] : zero;
        b[k] = i < n / 4 && norm.bias ? ((const float4 *)norm.bias)[i] : zero;
    }
    ki_pdl_wait();
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        uint32_t i = threadIdx.x + k * ROW_THREADS;
        v[k] = i < n / 4 ? ((const float4 *)from)[read + i] : zero;
        old[k] = i < n / 4 && x ? ((const float4 *)x)[row + i] : zero;
    }
    float scale = center(v, n, norm.bias != NULL, norm.eps);
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        uint32_t i = threadIdx.x + k * ROW_THREADS;
        if (i >= n / 4) continue;
        float4 y = ki_times_weight(v[k], scale, w[k], b[k]);
        size_t at = (row + i) * 4;
        if (x) {
            ((float4 *)x)[row + i] =
                make_float4(old[k].x + y.x, old[k].y + y.y, old[k].z + y.z, old[k].w + y.w);
            continue;
        }
        ki_store(h, at, y.x, type), ki_store(h, at + 1, y.y, type);
        ki_store(h, at + 2, y.z, type), ki_store(h, at + 3, y.w, type);
    }
}

/* The same bits of a norm without a mean by a quarter of the threads: beside the blocks of two
 * products a multiprocessor has no registers for more, and the second one would have to wait. */
enum { RMS_THREADS = 256, RMS_SHARE = ROW_THREADS / RMS_THREADS };

template <int FOURS>
static __global__ void __launch_bounds__(RMS_THREADS)
    rms_held(void *h, const float *from, const uint32_t *rows, ki_cuda_norm norm, uint32_t n,
             ki_cuda_type type) {
    __shared__ float sums[WARPS];
    const float4 zero = {0, 0, 0, 0};
    float4 v[RMS_SHARE][FOURS], w[RMS_SHARE][FOURS];
    ki_pdl_launch();
    const float4 *x = (const float4 *)from + row_of(rows) * (n / 4);
#pragma unroll
    for (int s = 0; s < RMS_SHARE; s++)
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            uint32_t i = threadIdx.x + RMS_THREADS * s + ROW_THREADS * k;
            w[s][k] = i < n / 4 ? ((const float4 *)norm.weight)[i] : zero;
        }
    ki_pdl_wait();
#pragma unroll
    for (int s = 0; s < RMS_SHARE; s++)
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            uint32_t i = threadIdx.x + RMS_THREADS * s + ROW_THREADS * k;
            v[s][k] = i < n / 4 ? x[i] : zero;
        }
#pragma unroll
    for (int s = 0; s < RMS_SHARE; s++) {
        float sum = 0;
#pragma unroll
        for (int k = 0; k < FOURS; k++) sum = ki_add_squares(sum, v[s][k]);
        sum = ki_warp_sum(sum);
        if (threadIdx.x % 32 == 0) sums[(threadIdx.x + RMS_THREADS * s) / 32] = sum;
    }
    __syncthreads();
    float scale = ki_norm_scale(ki_warp_sum(sums[threadIdx.x % 32]), n, norm.eps);
#pragma unroll
    for (int s = 0; s < RMS_SHARE; s++)
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            uint32_t i = threadIdx.x + RMS_THREADS * s + ROW_THREADS * k;
            if (i >= n / 4) continue;
            float4 y = ki_times_weight(v[s][k], scale, w[s][k], zero);
            size_t at = (size_t)blockIdx.x * n + 4 * i;
            ki_store(h, at, y.x, type), ki_store(h, at + 1, y.y, type);
            ki_store(h, at + 2, y.z, type), ki_store(h, at + 3, y.w, type);
        }
}

/* False: the row is too long, or its float4 would not be aligned. */
static bool launch_held(void *h, float *x, const float *from, const uint32_t *rows,
                        const ki_cuda_norm *norm, uint32_t n_rows, uint32_t n, ki_cuda_type type,
                        void *stream) {
    uintptr_t ends =
        (uintptr_t)from | (uintptr_t)x | (uintptr_t)norm->weight | (uintptr_t)norm->bias;
    if (n % 4 || n > KI_NORM_MOST_FOURS * 4 * ROW_THREADS || ends % sizeof(float4)) return false;
    if (h && !norm->bias) {
        auto rms = n <= 4 * ROW_THREADS ? rms_held<1> : rms_held<KI_NORM_MOST_FOURS>;
        ki_share_multiprocessors(rms);
        ki_launch(rms, n_rows, RMS_THREADS, 0, true, stream, h, from, rows, *norm, n, type);
        return true;
    }
    auto kernel = n <= 4 * ROW_THREADS ? norm_held<1> : norm_held<KI_NORM_MOST_FOURS>;
    ki_share_multiprocessors(kernel);
    ki_launch(kernel, n_rows, ROW_THREADS, 0, true, stream, h, x, from, rows, *norm, n, type);
    return true;
}

extern "C" void ki_cuda_norm_rows(void *h, const float *x, const uint32_t *rows,
                                  const ki_cuda_norm *norm, uint32_t n_rows, uint32_t n,
                                  ki_cuda_type type, bool held, void *stream) {
    if (held && launch_held(h, NULL, x, rows, norm, n_rows, n, type, stream)) return;
    ki_launch(norm_rows, n_rows, ROW_THREADS, 0, true, stream, h, x, rows, *norm, n, type);
}

extern "C" void ki_cuda_add_norm(float *x, const float *delta, const ki_cuda_norm *norm,
                                 uint32_t n_rows, uint32_t n, bool held, void *stream) {
    if (held && launch_held(NULL, x, delta, NULL, norm, n_rows, n, KI_CUDA_F32, stream)) return;
    ki_launch(add_norm, n_rows, ROW_THREADS, 0, true, stream, x, delta, *norm, n);
}

/* One warp a head: q heads, k heads, then v heads, which have a bias at most. */
static __global__ void adjust_heads(float *qkv, ki_cuda_heads h, uint32_t n_rows) {
    ki_pdl_launch();
    ki_pdl_wait();
    uint32_t n_all = h.n_heads + 2 * h.n_kv_heads;
    uint32_t unit = (blockIdx.x * UNIT_THREADS + threadIdx.x) / 32;
    uint32_t row = unit / n_all, head = unit % n_all, lane = threadIdx.x % 32;
    if (row >= n_rows) return;
    float *x = qkv + ((size_t)row * n_all + head) * h.head_dim, square = 0;
    const float *weight = head < h.n_heads                  ? h.q_weight
                          : head < h.n_heads + h.n_kv_heads ? h.k_weight
                                                            : NULL;
    for (uint32_t i = lane; i < h.head_dim; i += 32) {
        float v = x[i] + (h.bias ? h.bias[head * h.head_dim + i] : 0.0f);
        x[i] = v;
        square += v * v;
    }
    if (!weight) return;
    float scale = 1.0f / sqrtf(ki_warp_sum(square) / (float)h.head_dim + h.eps);
    for (uint32_t i = lane; i < h.head_dim; i += 32) x[i] = x[i] * scale * weight[i];
}

extern "C" void ki_cuda_adjust_heads(float *qkv, const ki_cuda_heads *heads, uint32_t n_rows,
                                     void *stream) {
    uint32_t n = n_rows * (heads->n_heads + 2 * heads->n_kv_heads);
    uint32_t per_block = UNIT_THREADS / 32;
    ki_launch(adjust_heads, (n + per_block - 1) / per_block, UNIT_THREADS, 0, true, stream, qkv,
              *heads, n_rows);
}

/* ---- what cuDNN's attention left ---- */

enum { MAX_HEAD_PARTS = 8 }; /* elements of a lane: 256 / 32 */

/* One warp for each head of a row; lane l has elements l, l + 32, ... The butterfly is turn_row's
 * (kv_rows.cuh), its partners in another lane or in this one. */
static __global__ void finish_heads(uint16_t *rows, uint32_t n, uint32_t head_dim, bool turned,
                                    bool is_bf16) {
    uint32_t number = blockIdx.x * (UNIT_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (number >= n) return;
    uint16_t *row = rows + (size_t)number * head_dim;
    uint32_t block = head_dim & (0u - head_dim);
    float x[MAX_HEAD_PARTS];
#pragma unroll
    for (int e = 0; e < MAX_HEAD_PARTS; e++) {
        uint32_t i = e * 32 + lane;
        x[e] = i < head_dim ? __half2float(__ushort_as_half(row[i])) : 0.0f;
    }
    if (turned) {
        for (uint32_t h = 1; h < 32 && h < block; h *= 2)
#pragma unroll
            for (int e = 0; e < MAX_HEAD_PARTS; e++) {
                float other = __shfl_xor_sync(0xffffffffu, x[e], h);
                x[e] = lane & h ? other - x[e] : x[e] + other;
            }
#pragma unroll
        for (int h = 1; h < MAX_HEAD_PARTS; h *= 2) /* of 32 elements each */
#pragma unroll
            for (int e = 0; e < MAX_HEAD_PARTS; e++)
                if (!(e & h) && (uint32_t)h * 32 < block) {
                    float low = x[e], high = x[e + h];
                    x[e] = low + high;
                    x[e + h] = low - high;
                }
        float f = __frsqrt_rn((float)block);
#pragma unroll
        for (int e = 0; e < MAX_HEAD_PARTS; e++) x[e] *= f;
    }
#pragma unroll
    for (int e = 0; e < MAX_HEAD_PARTS; e++) {
        uint32_t i = e * 32 + lane;
        float v = fminf(fmaxf(x[e], -65504.0f), 65504.0f); /* of NaN -65504: its row was flagged */
        if (i < head_dim)
            row[i] = is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x[e]))
                             : __half_as_ushort(__float2half_rn(v));
    }
}

extern "C" void ki_cuda_finish_heads(void *rows, ki_cuda_type type, bool turned, uint32_t n_rows,
                                     uint32_t n_heads, uint32_t head_dim, void *stream) {
    uint32_t n = n_rows * n_heads, per_block = UNIT_THREADS / 32;
    finish_heads<<<(n + per_block - 1) / per_block, UNIT_THREADS, 0, (cudaStream_t)stream>>>(
        (uint16_t *)rows, n, head_dim, turned, type == KI_CUDA_BF16);
}

/* ---- the MLP ---- */

static __global__ void activate(void *out, const float *in, ki_cuda_act act, uint32_t n,
                                ki_cuda_type type) {
    uint32_t per_row = (n + UNIT_THREADS - 1) / UNIT_THREADS;
    ki_pdl_launch();
    ki_pdl_wait();
    size_t row = blockIdx.x / per_row;
    uint32_t i = blockIdx.x % per_row * UNIT_THREADS + threadIdx.x;
    if (i >= n) return;
    float v;
    if (act == KI_CUDA_GELU) {
        float x = in[row * n + i];
        v = x * (1.0f + erff(x * 0.7071067812f)) * 0.5f;
    } else {
        v = ki_gated(act, in[row * 2 * n + i], in[row * 2 * n + n + i]);
    }
    ki_store(out, row * n + i, v, type);
}

extern "C" void ki_cuda_activate(void *out, const float *in, ki_cuda_act act, uint32_t n_rows,
                                 uint32_t n, ki_cuda_type type, void *stream) {
    uint32_t per_row = (n + UNIT_THREADS - 1) / UNIT_THREADS;
    ki_launch(activate, n_rows * per_row, UNIT_THREADS, 0, true, stream, out, in, act, n, type);
}

/* ---- rings ---- */

/* Blocks are multiples of 16 bytes: 32 rows of at least 16 channels. */
static __global__ void ring_copy(ki_ring_copy c) {
    uint32_t block = c.first + blockIdx.y;
    size_t slot = blockIdx.x, n = c.block_bytes / sizeof(uint4);
    size_t from = slot * c.from_stride + c.from_at + block % c.from_blocks;
    size_t to = slot * c.to_stride + c.to_at + block % c.to_blocks;
    const uint4 *source = (const uint4 *)c.from + from * n;
    uint4 *target = (uint4 *)c.to + to * n;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) target[i] = source[i];
}

extern "C" void ki_cuda_ring_copy_blocks(const ki_ring_copy *copy, void *stream) {
    if (copy->end <= copy->first || !copy->n_slots) return;
    dim3 grid((unsigned)copy->n_slots, copy->end - copy->first);
    ring_copy<<<grid, 128, 0, (cudaStream_t)stream>>>(*copy);
}
