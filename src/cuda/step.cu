/* step.cu: the first and the last kernel of a step (step_cuda.h). */
extern "C" {
#include "base.h" /* ki_fail is C's */
}
#include "best.cuh"
#include "kv_launch.h"
#include "kv_splits.cuh"
#include "pdl.cuh"
#include "step_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* ---- tokens ---- */

KI_DEV float4 load_four(const void *in, size_t four, ki_cuda_type type) {
    if (type == KI_CUDA_F32) return ((const float4 *)in)[four];
    uint2 raw = ((const uint2 *)in)[four];
    if (type == KI_CUDA_BF16) {
        float2 a = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.x);
        float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.y);
        return make_float4(a.x, a.y, b.x, b.y);
    }
    float2 a = __half22float2(*(const __half2 *)&raw.x),
           b = __half22float2(*(const __half2 *)&raw.y);
    return make_float4(a.x, a.y, b.x, b.y);
}

/* By all threads of a block. */
KI_DEV void embed_row(const ki_cuda_embed_call &c, uint32_t row) {
    uint32_t n_fours = c.n / 4;
    size_t from = (size_t)c.tokens[row] * n_fours;
    float4 *to = (float4 *)c.x + (size_t)row * n_fours;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < n_fours; i += blockDim.x) {
        float4 v = load_four(c.embedding, from + i, c.type);
        to[i] = make_float4(v.x * c.scale, v.y * c.scale, v.z * c.scale, v.w * c.scale);
    }
}

enum { EMBED_THREADS = 256 };

static __global__ void __launch_bounds__(EMBED_THREADS)
    ki_embed_kernel(const __grid_constant__ ki_cuda_embed_call c) {
    embed_row(c, blockIdx.x);
}

extern "C" kivi_status ki_cuda_embed(const ki_cuda_embed_call *c, void *stream, kivi_error *err) {
    return ki_cuda_check(ki_launch(ki_embed_kernel, c->n_rows, EMBED_THREADS, 0, false, stream, *c),
                         "tokens", err);
}

/* ---- the first kernel of a step of decoding ---- */

/* Thread blocks, in this order: one a plan, one a row of tokens, and the rest copy and clear. */
struct begin_args {
    const uint4 *from;
    uint4 *to, *result;
    ki_cuda_piece pieces[KI_BEGIN_PIECES]; /* in units of 16 bytes */
    uint32_t n_pieces, n_plans, n_clear;
    plan_args plans[KI_BEGIN_PLANS];
    ki_cuda_embed_call embed;
};

KI_DEV void copy_pieces(const begin_args &a, uint32_t thread, uint32_t n_threads) {
    for (uint32_t i = thread; i < a.n_clear; i += n_threads) a.result[i] = make_uint4(0, 0, 0, 0);
    for (uint32_t p = 0; p < a.n_pieces; p++)
        for (size_t i = thread; i < a.pieces[p].n_bytes; i += n_threads)
            a.to[a.pieces[p].at + i] = a.from[a.pieces[p].at + i];
}

static __global__ void __launch_bounds__(PLAN_THREADS)
    ki_begin_kernel(const __grid_constant__ begin_args a) {
    __shared__ uint32_t sums[PLAN_THREADS / 32];
    uint32_t block = blockIdx.x, n_rows = a.embed.n_rows, n_copies = gridDim.x - a.n_plans - n_rows;
    if (block < a.n_plans) {
        make_plan(a.plans[block], sums);
        return;
    }
    block -= a.n_plans;
    if (block < n_rows) embed_row(a.embed, block);
    else copy_pieces(a, (block - n_rows) * PLAN_THREADS + threadIdx.x, n_copies * PLAN_THREADS);
}

extern "C" kivi_status ki_cuda_begin_step(const ki_cuda_begin_call *c, void *stream,
                                          kivi_error *err) {
    enum { UNIT = sizeof(uint4), MOST_COPIES = 64 };
    begin_args a = {};
    size_t most = c->clear_bytes / UNIT;
    if (c->n_pieces > KI_BEGIN_PIECES || c->n_plans > KI_BEGIN_PLANS)
        return KI_FAIL(err, INTERNAL, "cuda: a step of %u pieces and %u plans", c->n_pieces,
                       c->n_plans);
    a.from = (const uint4 *)c->from;
    a.to = (uint4 *)c->to;
    a.result = (uint4 *)c->result;
    a.n_pieces = c->n_pieces, a.n_plans = c->n_plans, a.n_clear = (uint32_t)most;
    for (uint32_t i = 0; i < c->n_pieces; i++) {
        a.pieces[i] = {c->pieces[i].at / UNIT, (c->pieces[i].n_bytes + UNIT - 1) / UNIT};
        most = most > a.pieces[i].n_bytes ? most : a.pieces[i].n_bytes;
    }
    for (uint32_t i = 0; i < c->n_plans; i++) a.plans[i] = plan_args_of(c->plans[i]);
    a.embed = c->embed;
    size_t wanted = (most + PLAN_THREADS - 1) / PLAN_THREADS;
    uint32_t n_copies = wanted < MOST_COPIES ? (uint32_t)wanted : (uint32_t)MOST_COPIES;
    uint32_t n_blocks = c->n_plans + c->embed.n_rows + (n_copies ? n_copies : 1);
    return ki_cuda_check(ki_launch(ki_begin_kernel, n_blocks, PLAN_THREADS, 0, false, stream, a),
                         "beginning of a step", err);
}

/* ---- the last kernel ---- */

enum { END_THREADS = 1024, END_WARPS = END_THREADS / 32 };

KI_DEV bool is_not_finite(float v) { return (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u; }

KI_DEV const uint32_t *words(const uint8_t *base, size_t at) {
    return (const uint32_t *)(base + at);
}

/* Other thread blocks wrote the words: not by way of the first cache. */
KI_DEV void copy_words(const ki_cuda_end_call &c, size_t at, uint32_t n) {
    for (uint32_t i = threadIdx.x; i < n; i += END_THREADS)
        ((uint32_t *)(c.host + at))[i] = __ldcg(words(c.result, at) + i);
}

static __global__ void __launch_bounds__(END_THREADS)
    ki_end_kernel(const __grid_constant__ ki_cuda_end_call c) {
    __shared__ float values[END_WARPS];
    __shared__ int32_t ids[END_WARPS];
    uint32_t row = blockIdx.x, number = 0;
    if (c.host) number = *c.number;
    const float *x = c.x + (size_t)c.rows[row] * c.n_embd;
    ki_pdl_wait();
    int bad = 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < c.n_embd; i += END_THREADS) bad |= is_not_finite(x[i]);
    float v;
    int32_t id = ki_best_of(&v, c.logits + row * c.stride, c.n_vocab, values, ids);
    bad = __syncthreads_or(bad);
    bool is_last = false;
    if (threadIdx.x == 0) {
        ((int32_t *)(c.result + c.at.best))[row] = id;
        ((uint32_t *)(c.result + c.at.finite))[row] = !bad;
        __threadfence();
        is_last = !c.host || atomicAdd((uint32_t *)(c.result + c.at.n_done), 1u) + 1 == gridDim.x;
    }
    is_last = __syncthreads_or(is_last);
    if (!is_last || !c.host) return;
    copy_words(c, c.at.counters, sizeof(ki_cuda_counters) / sizeof(uint32_t));
    copy_words(c, c.at.row_flags, c.n_rows);
    copy_words(c, c.at.finite, c.n_logits);
    copy_words(c, c.at.best, c.n_logits);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system(); /* of what all threads wrote before they met */
        *(volatile uint32_t *)(c.host + c.at.number) = number;
    }
}

extern "C" kivi_status ki_cuda_end_step(const ki_cuda_end_call *c, void *stream, kivi_error *err) {
    return ki_cuda_check(ki_launch(ki_end_kernel, c->n_logits, END_THREADS, 0, true, stream, *c),
                         "end of a step", err);
}
