/* plain.cu: append and attention without any art. Each function follows the definition it is of:
 * the quantizer of src/kernel/quant.h, the order of kv_order.h, the ranges of kv_cuda.h. Pages of +
 * kinds are quantized by kv_quant.cuh, which knows no head sizes. */
extern "C" {
#include "base.h" /* ki_fail is C's */
}
#include "kv_quant.cuh"
#include "kv_launch.h"
#include "plain.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

/* The order of pages is of 32-token blocks, four a page. */
enum { PAGE = KI_SUB_TOKENS * KI_SUBS, THREADS = 128 };

typedef struct place { /* of one sequence in one layer and KV head */
    const ki_cuda_cache *cache;
    const ki_cuda_seq *seq;
    uint32_t layer, head;
} place;

/* ---- where things are ---- */

static __device__ uint8_t *page_of(const place &p, uint32_t pos) {
    const ki_cuda_layout &l = p.cache->layout;
    const uint32_t *table = p.cache->tables + (size_t)p.seq->table * p.cache->table_stride;
    size_t slot = (size_t)p.layer * l.n_kv_heads + p.head;
    return p.cache->pool + table[pos / PAGE] * l.id_bytes + slot * l.page_bytes;
}

static __device__ uint8_t *sub_of(const place &p, uint32_t pos) {
    const ki_cuda_layout &l = p.cache->layout;
    return page_of(p, pos) + l.head_bytes + (size_t)(pos % PAGE / KI_SUB_TOKENS) * l.sub_bytes;
}

/* The 16-bit block that holds pos: of the sinks, or of the ring. */
static __device__ uint16_t *block_of(const place &p, uint32_t pos, bool keys) {
    const ki_cuda_layout &l = p.cache->layout;
    size_t slot = (size_t)p.layer * l.n_kv_heads + p.head, elements = 32 * (size_t)l.head_dim;
    uint32_t b = pos / KI_SUB_TOKENS, k = p.seq->k_blocks, v = p.seq->v_blocks;
    if (b < l.sink_blocks)
        return (uint16_t *)p.seq->sinks +
               (slot * 2 * l.sink_blocks + (keys ? b : l.sink_blocks + b)) * elements;
    return (uint16_t *)p.seq->ring + (slot * (k + v) + (keys ? b % k : k + b % v)) * elements;
}

/* A 16-bit element of position pos: in a page where that side is never quantized. */
static __device__ uint16_t *exact_at(const place &p, uint32_t pos, uint32_t c, bool keys) {
    const ki_cuda_layout &l = p.cache->layout;
    uint32_t steps = l.head_dim / 16, t = pos % KI_SUB_TOKENS;
    bool in_page = (keys ? l.k_bits : l.v_bits) == 16;
    uint16_t *base =
        in_page ? (uint16_t *)(sub_of(p, pos) + (keys ? l.k_at : l.v_at)) : block_of(p, pos, keys);
    ki_order_place at = keys ? ki_order_key(t, c, steps, 16) : ki_order_value(t, c, steps, 16);
    return base + (size_t)at.word * 2 + at.bit / 16;
}

/* The scale of (pos, c); the zero is `zero_at - scale_at` bytes behind it. */
static __device__ uint16_t *scale_of(const place &p, uint32_t pos, uint32_t c, bool keys) {
    const ki_cuda_layout &l = p.cache->layout;
    if (!keys) {
        size_t at = (size_t)(c / l.v_group) * KI_SUB_TOKENS + ki_order_value_scale(pos % 32);
        return (uint16_t *)(sub_of(p, pos) + l.v_scale_at) + at;
    }
    size_t in_group = ki_order_key_scale(c, l.head_dim / 16);
    if (l.head_bytes)
        return (uint16_t *)(page_of(p, pos) + l.k_scale_at) +
               (size_t)(pos % PAGE / l.k_group) * l.head_dim + in_group;
    return (uint16_t *)(sub_of(p, pos) + l.k_scale_at) +
           (size_t)(pos % KI_SUB_TOKENS / l.k_group) * l.head_dim + in_group;
}

static __device__ uint32_t bits_at(const uint8_t *plane, ki_order_place at, uint32_t bits) {
    return ((const uint32_t *)plane)[at.word] >> at.bit & ((1u << bits) - 1);
}

/* The place of channel c among the wide ones of its page, whose list ascends; -1: it is narrow. */
static __device__ int wide_number(const place &p, uint32_t pos, uint32_t c) {
    const ki_cuda_layout &l = p.cache->layout;
    const uint8_t *list = page_of(p, pos) + l.list_at;
    uint32_t from = 0, to = l.head_dim / 4;
    while (from < to) {
        uint32_t middle = (from + to) / 2;
        if (list[middle] < c) from = middle + 1;
        else to = middle;
    }
    return from < l.head_dim / 4 && list[from] == c ? (int)from : -1;
}

/* Of + kinds (plus.h). */
static __device__ float plus_key_at(const place &p, uint32_t pos, uint32_t c) {
    const ki_cuda_layout &l = p.cache->layout;
    const uint8_t *sub = sub_of(p, pos);
    const uint16_t *scale = scale_of(p, pos, c, true);
    uint32_t d = l.head_dim, t = pos % KI_SUB_TOKENS;
    uint32_t code = bits_at(sub + l.k_at, ki_order_key(t, c, d / 16, l.k_bits), l.k_bits);
    int w = l.k_bits == 2 ? wide_number(p, pos, c) : -1;
    if (w >= 0) code |= bits_at(sub + l.wide_at, ki_order_key(t, w, (d / 4 + 15) / 16, 2), 2) << 2;
    return (float)code * f16_value(*scale) + f16_value(scale[(l.k_zero_at - l.k_scale_at) / 2]);
}
static __device__ float plus_value_at(const place &p, uint32_t pos, uint32_t c) {
    const ki_cuda_layout &l = p.cache->layout;
    const uint8_t *sub = sub_of(p, pos);
    uint32_t steps = l.head_dim / 16, t = pos % KI_SUB_TOKENS;
    uint32_t code = bits_at(sub + l.v_at, ki_order_value(t, c, steps, 2), 2);
    if (l.v_bits == 3) code |= bits_at(sub + l.third_at, ki_order_value(t, c, steps, 1), 1) << 2;
    float half = l.v_bits == 3 ? 3.5f : 1.5f;
    return ((float)code - half) * f16_value(*scale_of(p, pos, c, false));
}

static __device__ ki_order_place code_place(const place &p, uint32_t pos, uint32_t c, bool keys) {
    const ki_cuda_layout &l = p.cache->layout;
    uint32_t steps = l.head_dim / 16, t = pos % KI_SUB_TOKENS;
    return keys ? ki_order_key(t, c, steps, l.k_bits) : ki_order_value(t, c, steps, l.v_bits);
}

static __device__ float coded_value(const place &p, uint32_t pos, uint32_t c, bool keys) {
    const ki_cuda_layout &l = p.cache->layout;
    if (l.is_plus) return keys ? plus_key_at(p, pos, c) : plus_value_at(p, pos, c);
    uint32_t code = bits_at(sub_of(p, pos) + (keys ? l.k_at : l.v_at), code_place(p, pos, c, keys),
                            keys ? l.k_bits : l.v_bits);
    const uint16_t *scale = scale_of(p, pos, c, keys);
    size_t to_zero = (keys ? l.k_zero_at - l.k_scale_at : l.v_zero_at - l.v_scale_at) / 2;
    return (float)code * f16_value(*scale) + f16_value(scale[to_zero]);
}

/* Elements of a word may have several writers: each changes its own bits only. */
static __device__ void put_bits(uint8_t *plane, ki_order_place at, uint32_t bits, uint32_t code) {
    uint32_t *words = (uint32_t *)plane, mask = (1u << bits) - 1;
    atomicAnd(&words[at.word], ~(mask << at.bit));
    atomicOr(&words[at.word], (code & mask) << at.bit);
}
static __device__ void put_code(const place &p, uint32_t pos, uint32_t c, bool keys,
                                uint32_t code) {
    const ki_cuda_layout &l = p.cache->layout;
    put_bits(sub_of(p, pos) + (keys ? l.k_at : l.v_at), code_place(p, pos, c, keys),
             keys ? l.k_bits : l.v_bits, code);
}

/* ---- rows ---- */

static __device__ float element(const void *x, size_t i, ki_cuda_type type) {
    if (type == KI_CUDA_F32) return ((const float *)x)[i];
    if (type == KI_CUDA_F16) return __half2float(((const __half *)x)[i]);
    return __bfloat162float(((const __nv_bfloat16 *)x)[i]);
}

/* float16, saturating; counts what was cut off and what is not a number. */
static __device__ uint16_t narrow(float v, uint32_t *saturated, uint32_t *bad) {
    *bad += (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u;
    float clamped = fminf(fmaxf(v, -65504.0f), 65504.0f);
    *saturated += clamped != v;
    return __half_as_ushort(__float2half_rn(clamped));
}

/* One head of one row, rotated: channel c of x [D], pairs (j, j + D/2). */
static __device__ float turned(const void *x, ki_cuda_type type, uint32_t c, uint32_t d,
                               const float *rope) {
    float own = element(x, c, type);
    if (!rope) return own;
    uint32_t half = d / 2, j = c % half;
    float other = element(x, c < half ? c + half : c - half, type), cs = rope[2 * j],
          sn = rope[2 * j + 1];
    /* as the CPU: two products, then their sum or difference */
    return c < half ? __fsub_rn(__fmul_rn(own, cs), __fmul_rn(other, sn))
                    : __fadd_rn(__fmul_rn(own, cs), __fmul_rn(other, sn));
}

static __device__ const void *row_at(const void *x, size_t row, uint32_t stride, uint32_t head,
                                     uint32_t d, ki_cuda_type type) {
    size_t bytes = type == KI_CUDA_F32 ? 4 : 2;
    return (const char *)x + (row * stride + (size_t)head * d) * bytes;
}

/* A key or value of the step: kept beside the cache for a prompt, in the window for decoding. */
static __device__ void keep(const place &p, const ki_cuda_append_call &a, uint32_t row,
                            uint32_t pos, uint32_t c, bool keys, uint16_t h) {
    const ki_cuda_layout &l = p.cache->layout;
    uint16_t *rows = keys ? a.k_rows : a.v_rows;
    if (rows) rows[((size_t)row * l.n_kv_heads + p.head) * l.head_dim + c] = h;
    if (!rows || (keys ? l.k_bits : l.v_bits) == 16) *exact_at(p, pos, c, keys) = h;
}

static __device__ void count(ki_cuda_counters *counters, uint32_t saturated, uint32_t bad) {
    if (saturated) atomicAdd(&counters->n_saturated, (unsigned long long)saturated);
    if (bad) atomicAdd(&counters->n_nonfinite, 1ull);
}

/* grid: slots, rows of a slot, q heads then KV heads; a thread a channel. */
static __global__ void append_rows(ki_cuda_append_call a, ki_cuda_cache cache) {
    __shared__ float value[256];
    const ki_cuda_seq *s = &cache.seqs[blockIdx.x];
    const ki_cuda_layout &l = cache.layout;
    uint32_t in_seq = blockIdx.y, head = blockIdx.z, d = l.head_dim;
    if (in_seq >= s->n_rows) return;
    uint32_t row = s->first_row + in_seq, pos = s->n_tokens + in_seq;
    const float *rope = a.rope ? a.rope + (size_t)row * d : NULL;
    uint32_t saturated = 0, bad = 0;
    if (head < l.n_heads) {
        if (!a.q) return;
        const void *q = row_at(a.q, row, a.q_stride, head, d, a.type);
        for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
            a.q_out[((size_t)row * l.n_heads + head) * d + c] =
                narrow(turned(q, a.type, c, d, rope), &saturated, &bad);
        return; /* a query that is not finite shows in the result */
    }
    place p = {&cache, s, a.layer, head - l.n_heads};
    const void *k = row_at(a.k, row, a.k_stride, p.head, d, a.type),
               *v = row_at(a.v, row, a.v_stride, p.head, d, a.type);
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        keep(p, a, row, pos, c, true, narrow(turned(k, a.type, c, d, rope), &saturated, &bad));
        value[c] = element(v, c, a.type);
    }
    if (l.is_plus) turn_row(value, d, threadIdx.x, blockDim.x);
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
        keep(p, a, row, pos, c, false, narrow(value[c], &saturated, &bad));
    count(cache.counters, saturated, bad);
    if (bad && a.row_flags) a.row_flags[row] = 1;
}

/* ---- codes ---- */

/* A float16 row of this step or from before it. */
static __device__ uint16_t kept_bits(const place &p, const ki_cuda_append_call &a, uint32_t pos,
                                     uint32_t c, bool keys) {
    const ki_cuda_layout &l = p.cache->layout;
    const uint16_t *rows = keys ? a.k_rows : a.v_rows;
    if (!rows || pos < p.seq->n_tokens) return *exact_at(p, pos, c, keys);
    size_t row = p.seq->first_row + (pos - p.seq->n_tokens);
    return rows[(row * l.n_kv_heads + p.head) * l.head_dim + c];
}
static __device__ float kept(const place &p, const ki_cuda_append_call &a, uint32_t pos, uint32_t c,
                             bool keys) {
    return f16_value(kept_bits(p, a, pos, c, keys));
}

/* `n` elements, of positions from pos on (keys) or channels from c on (values); the first `hidden`
 * of them are sinks: they have no part in the range, and codes of 0. */
static __device__ void code_group(const place &p, const ki_cuda_append_call &a, uint32_t pos,
                                  uint32_t c, bool keys, uint32_t n, uint32_t hidden) {
    const ki_cuda_layout &l = p.cache->layout;
    float levels = (float)((1u << (keys ? l.k_bits : l.v_bits)) - 1);
    float low = kept(p, a, pos + (keys ? hidden : 0), c, keys), high = low;
    for (uint32_t i = hidden; i < n; i++) {
        float x = kept(p, a, keys ? pos + i : pos, keys ? c : c + i, keys);
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    low = __fadd_rn(low, 0.0f); /* -0 becomes +0 */
    float range = __fadd_rn(__fsub_rn(high, low), 0.0f);
    uint16_t scale = __half_as_ushort(__float2half_ru(__fdiv_rn(range, levels)));
    uint16_t *to = scale_of(p, pos, c, keys);
    to[0] = scale;
    to[(keys ? l.k_zero_at - l.k_scale_at : l.v_zero_at - l.v_scale_at) / 2] =
        __half_as_ushort(__float2half_rn(low));
    float s = __half2float(__ushort_as_half(scale));
    for (uint32_t i = 0; i < n; i++) {
        float x = kept(p, a, keys ? pos + i : pos, keys ? c : c + i, keys);
        float q = s == 0 || i < hidden ? 0.0f : rintf(__fdiv_rn(__fsub_rn(x, low), s));
        q = q < 0 ? 0.0f : q > levels ? levels : q;
        put_code(p, keys ? pos + i : pos, keys ? c : c + i, keys, (uint32_t)q);
    }
}

/* grid: slots, KV heads, parts; a thread strides over (group, channel) and (token, group). */
static __global__ void append_codes(ki_cuda_append_call a, ki_cuda_cache cache) {
    const ki_cuda_seq *s = &cache.seqs[blockIdx.x];
    const ki_cuda_layout &l = cache.layout;
    if (!s->n_rows) return;
    place p = {&cache, s, a.layer, blockIdx.y};
    uint32_t from = s->n_tokens, to = from + s->n_rows, d = l.head_dim, sinks = l.sink_tokens;
    uint32_t at = blockIdx.z * blockDim.x + threadIdx.x, step = gridDim.z * blockDim.x;
    if (l.k_bits < 16) {
        uint32_t first = sinks / l.k_group * l.k_group, begin = ki_cuda_k_packed(&l, from);
        begin = begin > first ? begin : first;
        uint32_t end = ki_cuda_k_packed(&l, to);
        uint32_t n = end > begin ? (end - begin) / l.k_group * d : 0;
        for (uint32_t i = at; i < n; i += step) {
            uint32_t pos = begin + i / d * l.k_group;
            code_group(p, a, pos, i % d, true, l.k_group, sinks > pos ? sinks - pos : 0);
        }
    }
    if (l.v_bits < 16) {
        uint32_t begin = ki_cuda_v_packed(&l, from), end = ki_cuda_v_packed(&l, to);
        begin = begin > sinks ? begin : sinks;
        uint32_t groups = d / l.v_group, n = end > begin ? (end - begin) * groups : 0;
        for (uint32_t i = at; i < n; i += step)
            code_group(p, a, begin + i / groups, i % groups * l.v_group, false, l.v_group, 0);
    }
}

/* One value row of a + kind by a warp; row and codes [D] are its own. */
static __device__ void code_plus_value(const place &p, const ki_cuda_append_call &a, uint32_t pos,
                                       uint16_t *row, uint8_t *codes) {
    const ki_cuda_layout &l = p.cache->layout;
    uint32_t lane = threadIdx.x % 32, t = pos % KI_SUB_TOKENS, steps = l.head_dim / 16;
    uint8_t *sub = sub_of(p, pos);
    for (uint32_t c = lane; c < l.head_dim; c += 32) row[c] = kept_bits(p, a, pos, c, false);
    __syncwarp();
    quantize_plus_value(codes, sub, l, row, t, lane);
    __syncwarp();
    for (uint32_t c = lane; c < l.head_dim; c += 32) {
        put_bits(sub + l.v_at, ki_order_value(t, c, steps, 2), 2, codes[c]);
        if (l.v_bits == 3)
            put_bits(sub + l.third_at, ki_order_value(t, c, steps, 1), 1, codes[c] >> 2);
    }
    __syncwarp();
}

/* grid: slots, KV heads, parts; a thread block a page of keys, a warp a value. Shared memory: raw
 * [128][D], what closing a page needs, codes (ki_close_bytes). */
static __global__ void __launch_bounds__(THREADS)
    append_plus_codes(ki_cuda_append_call a, ki_cuda_cache cache) {
    extern __shared__ __align__(16) uint8_t shared[];
    const ki_cuda_seq *s = &cache.seqs[blockIdx.x];
    const ki_cuda_layout &l = cache.layout;
    if (!s->n_rows) return;
    place p = {&cache, s, a.layer, blockIdx.y};
    uint32_t from = s->n_tokens, to = from + s->n_rows, d = l.head_dim, sinks = l.sink_tokens;
    uint16_t *raw = (uint16_t *)shared;
    plus_close *close = (plus_close *)(raw + PAGE * d);
    uint8_t *codes = (uint8_t *)(close + 1);
    for (uint32_t page = ki_cuda_k_packed(&l, from) / PAGE + blockIdx.z;
         page < ki_cuda_k_packed(&l, to) / PAGE; page += gridDim.z) {
        uint32_t base = page * PAGE, hidden = sinks > base ? sinks - base : 0;
        if (hidden >= PAGE) continue;
        for (uint32_t k = threadIdx.x; k < PAGE * d; k += blockDim.x)
            raw[k] = kept_bits(p, a, base + k / d, k % d, true);
        __syncthreads();
        close_plus_page(page_of(p, base), l, raw, codes, *close, hidden);
        __syncthreads();
    }
    uint32_t warp = threadIdx.x / 32, n_warps = blockDim.x / 32, end = ki_cuda_v_packed(&l, to);
    uint32_t begin = ki_cuda_v_packed(&l, from);
    begin = begin > sinks ? begin : sinks;
    for (uint32_t pos = begin + blockIdx.z * n_warps + warp; pos < end; pos += gridDim.z * n_warps)
        code_plus_value(p, a, pos, raw + warp * d, codes + warp * d);
}

/* ---- the window after a prompt's step ---- */

/* Rows that the ring will still hold at the end of the step, and those of the sinks' blocks. */
static __global__ void append_window(ki_cuda_append_call a, ki_cuda_cache cache) {
    const ki_cuda_seq *s = &cache.seqs[blockIdx.x];
    const ki_cuda_layout &l = cache.layout;
    uint32_t in_seq = blockIdx.y, d = l.head_dim;
    if (in_seq >= s->n_rows) return;
    uint32_t row = s->first_row + in_seq, pos = s->n_tokens + in_seq;
    uint32_t end = (s->n_tokens + s->n_rows + KI_SUB_TOKENS - 1) / KI_SUB_TOKENS;
    uint32_t block = pos / KI_SUB_TOKENS;
    place p = {&cache, s, a.layer, blockIdx.z};
    for (int keys = 0; keys < 2; keys++) {
        uint32_t n_blocks = keys ? s->k_blocks : s->v_blocks;
        bool held = block < l.sink_blocks || block + n_blocks >= end;
        if ((keys ? l.k_bits : l.v_bits) == 16 || !held) continue;
        const uint16_t *rows = keys ? a.k_rows : a.v_rows;
        for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
            *exact_at(p, pos, c, keys) = rows[((size_t)row * l.n_kv_heads + p.head) * d + c];
    }
}

/* ---- attention ---- */

/* The key or value of position t as the query at pos sees it. */
static __device__ float seen(const place &p, const ki_cuda_attend_call &a, uint32_t t, uint32_t c,
                             uint32_t exact, bool keys) {
    const ki_cuda_layout &l = p.cache->layout;
    bool in_pages = (keys ? l.k_bits : l.v_bits) == 16;
    if (!in_pages && t >= l.sink_tokens && t < exact) return coded_value(p, t, c, keys);
    const uint16_t *rows = keys ? a.k_rows : a.v_rows;
    if (!rows || t < p.seq->n_tokens) return f16_value(*exact_at(p, t, c, keys));
    size_t row = p.seq->first_row + (t - p.seq->n_tokens);
    return f16_value(rows[(row * l.n_kv_heads + p.head) * l.head_dim + c]);
}

static __device__ float block_max(float v, float *part) {
    for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++) v = fmaxf(v, part[i]);
    __syncthreads();
    return v;
}

/* grid: slots, rows of a slot, heads. Scores of 128 tokens at a time, a thread a token; then sums,
 * a thread a channel, in the order of the tokens. */
static __global__ void attend(ki_cuda_attend_call a, ki_cuda_cache cache) {
    __shared__ float score[THREADS], part[THREADS / 32], q[256];
    const ki_cuda_seq *s = &cache.seqs[blockIdx.x];
    const ki_cuda_layout &l = cache.layout;
    uint32_t in_seq = blockIdx.y, head = blockIdx.z, d = l.head_dim, tid = threadIdx.x;
    if (in_seq >= s->n_rows) return;
    uint32_t row = s->first_row + in_seq, pos = s->n_tokens + in_seq;
    place p = {&cache, s, a.layer, head / l.head_group};
    uint32_t k_exact = ki_cuda_k_exact(&l, s, pos), v_exact = ki_cuda_v_exact(&l, s, pos);
    uint32_t first = a.window && pos + 1 > a.window ? pos + 1 - a.window : 0;
    for (uint32_t c = tid; c < d; c += THREADS)
        q[c] = f16_value(a.q[((size_t)row * l.n_heads + head) * d + c]) * a.scale;
    __syncthreads();
    float m = -INFINITY, sum = 0, acc[2] = {0, 0};
    for (uint32_t t0 = first; t0 <= pos; t0 += THREADS) {
        uint32_t t = t0 + tid, n = pos + 1 - t0 < THREADS ? pos + 1 - t0 : THREADS;
        float x = -INFINITY;
        if (tid < n) {
            x = 0;
            for (uint32_t c = 0; c < d; c++) x += q[c] * seen(p, a, t, c, k_exact, true);
        }
        float larger = fmaxf(m, block_max(x, part)), factor = expf(m - larger);
        score[tid] = tid < n ? expf(x - larger) : 0.0f;
        __syncthreads();
        sum *= factor, acc[0] *= factor, acc[1] *= factor, m = larger;
        for (uint32_t i = 0; i < n; i++) {
            sum += score[i];
            for (uint32_t j = 0; j < 2; j++)
                if (tid + j * THREADS < d)
                    acc[j] += score[i] * seen(p, a, t0 + i, tid + j * THREADS, v_exact, false);
        }
        __syncthreads();
    }
    for (uint32_t j = 0; j < 2; j++)
        if (tid + j * THREADS < d) q[tid + j * THREADS] = acc[j] / sum;
    if (l.is_plus) turn_row(q, d, tid, THREADS);
    for (uint32_t c = tid; c < d; c += THREADS) {
        size_t to = (size_t)row * a.out_stride + (size_t)head * d + c;
        float out = q[c];
        if (a.out_type == KI_CUDA_F32) ((float *)a.out)[to] = out;
        else if (a.out_type == KI_CUDA_F16) ((__half *)a.out)[to] = __float2half_rn(out);
        else ((__nv_bfloat16 *)a.out)[to] = __float2bfloat16_rn(out);
    }
}

/* ---- launches ---- */

static kivi_status launched(const char *kernel, kivi_error *err) {
    cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess) return KIVI_OK;
    return KI_FAIL(err, DEVICE, "cuda: %s: %s", kernel, cudaGetErrorString(e));
}

static uint32_t rows_of(const ki_cuda_append_call *c) { return c->max_rows ? c->max_rows : 1; }

static cudaError_t launch_plus(const ki_cuda_append_call *c, dim3 grid, cudaStream_t stream) {
    uint32_t bytes = ki_close_bytes(&c->cache->layout); /* 89,600 at most: every device has them */
    cudaError_t e = cudaFuncSetAttribute(append_plus_codes,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (e == cudaSuccess) append_plus_codes<<<grid, THREADS, bytes, stream>>>(*c, *c->cache);
    return e;
}

extern "C" kivi_status ki_plain_append(const ki_cuda_append_call *call, void *stream,
                                       kivi_error *err) {
    const ki_cuda_layout *l = &call->cache->layout;
    cudaStream_t s = (cudaStream_t)stream;
    dim3 rows(call->cache->n_seqs, rows_of(call), l->n_heads + l->n_kv_heads);
    uint32_t parts = (rows_of(call) + 31) / 32 + 1;
    dim3 codes(call->cache->n_seqs, l->n_kv_heads, parts < 64 ? parts : 64);
    append_rows<<<rows, THREADS, 0, s>>>(*call, *call->cache);
    if (l->is_plus) KI_TRY(ki_cuda_check(launch_plus(call, codes, s), "plain + append", err));
    else if (l->k_bits < 16 || l->v_bits < 16)
        append_codes<<<codes, THREADS, 0, s>>>(*call, *call->cache);
    return launched("plain append", err);
}

extern "C" kivi_status ki_plain_window(const ki_cuda_append_call *call, void *stream,
                                       kivi_error *err) {
    const ki_cuda_layout *l = &call->cache->layout;
    dim3 rows(call->cache->n_seqs, rows_of(call), l->n_kv_heads);
    if (l->k_bits < 16 || l->v_bits < 16)
        append_window<<<rows, THREADS, 0, (cudaStream_t)stream>>>(*call, *call->cache);
    return launched("plain window", err);
}

extern "C" kivi_status ki_plain_attend(const ki_cuda_attend_call *call, void *stream,
                                       kivi_error *err) {
    dim3 grid(call->cache->n_seqs, call->max_rows ? call->max_rows : 1,
              call->cache->layout.n_heads);
    attend<<<grid, THREADS, 0, (cudaStream_t)stream>>>(*call, *call->cache);
    return launched("plain attention", err);
}
