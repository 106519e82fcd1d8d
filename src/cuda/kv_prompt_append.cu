/* kv_prompt_append.cu: rows of prompts: rope, float16 rows as attention takes them, codes of what
 * falls behind the line, and the newest rows into the window.
 *
 * All are many small thread blocks: a warp for a row of a KV head; a block for the codes of 32
 * tokens of one side, or of a key group where that is longer; a block for 32 tokens of the window.
 * Rows go through shared memory [tokens][D + 8], where eight of them lie in different banks. */
#include "kv_append.cuh"

enum { ROWS_WARPS = 4 };

/* ---- the step's rows as attention takes them ---- */

KI_DEV float4 load_four(const void *x, ki_cuda_type type, uint64_t at) {
    if (type == KI_CUDA_F32) return *(const float4 *)((const float *)x + at);
    uint2 two = *(const uint2 *)((const uint16_t *)x + at);
    if (type == KI_CUDA_F16)
        return make_float4(low_half(two.x), high_half(two.x), low_half(two.y), high_half(two.y));
    return make_float4(__uint_as_float(two.x << 16), __uint_as_float(two.x & 0xffff0000),
                       __uint_as_float(two.y << 16), __uint_as_float(two.y & 0xffff0000));
}

KI_DEV void put_checked(uint16_t *to, float4 x, row_check *check) {
    uint32_t a = checked_f16(x.x, check), b = checked_f16(x.y, check);
    uint32_t c = checked_f16(x.z, check), d = checked_f16(x.w, check);
    *(uint2 *)to = make_uint2(a | b << 16, c | d << 16);
}

/* Pairs (u, w) of four neighbouring channels of the lower and the upper half; turns: cos, sin of
 * each. */
KI_DEV void rotate_four(float4 *u, float4 *w, const float *turns) {
    float4 a = *(const float4 *)turns, b = *(const float4 *)(turns + 4), x = *u, y = *w;
    u->x = __fsub_rn(__fmul_rn(x.x, a.x), __fmul_rn(y.x, a.y));
    w->x = __fadd_rn(__fmul_rn(y.x, a.x), __fmul_rn(x.x, a.y));
    u->y = __fsub_rn(__fmul_rn(x.y, a.z), __fmul_rn(y.y, a.w));
    w->y = __fadd_rn(__fmul_rn(y.y, a.z), __fmul_rn(x.y, a.w));
    u->z = __fsub_rn(__fmul_rn(x.z, b.x), __fmul_rn(y.z, b.y));
    w->z = __fadd_rn(__fmul_rn(y.z, b.x), __fmul_rn(x.z, b.y));
    u->w = __fsub_rn(__fmul_rn(x.w, b.z), __fmul_rn(y.w, b.w));
    w->w = __fadd_rn(__fmul_rn(y.w, b.z), __fmul_rn(x.w, b.w));
}

/* By one warp: a lane has four channels of either half of one head. turned [D]: values of + kinds
 * on their way. */
KI_DEV void make_row(const append_args &a, uint64_t row, uint32_t head, float *turned) {
    uint32_t d = a.l.head_dim, half = d / 2, lane = threadIdx.x % 32;
    uint32_t n_queries = a.q ? a.l.head_group : 0;
    uint64_t kv = (row * a.l.n_kv_heads + head) * d;
    row_check check = {}, ignored = {};
    for (uint32_t k = lane; k < (n_queries + 2) * (half / 4); k += 32) {
        uint32_t which = k / (half / 4), j = k % (half / 4) * 4, h = head * a.l.head_group + which;
        bool is_query = which < n_queries, is_key = which == n_queries;
        const void *x = is_query ? a.q : is_key ? a.k : a.v;
        uint64_t at = is_query ? row * a.q_stride + h * d
                               : row * (is_key ? a.k_stride : a.v_stride) + head * d;
        float4 u = load_four(x, a.type, at + j), w = load_four(x, a.type, at + half + j);
        if (a.rope && (is_query || is_key)) rotate_four(&u, &w, a.rope + (row * half + j) * 2);
        if (a.l.is_plus && !is_query && !is_key) {
            *(float4 *)(turned + j) = u, *(float4 *)(turned + half + j) = w;
            continue;
        }
        uint16_t *to =
            is_query ? a.q_out + (row * a.l.n_heads + h) * d : (is_key ? a.k_rows : a.v_rows) + kv;
        put_checked(to + j, u, is_query ? &ignored : &check);
        put_checked(to + half + j, w, is_query ? &ignored : &check);
    }
    if (a.l.is_plus) {
        turn_row_by_warp(turned, d, lane);
        for (uint32_t c = lane * 4; c < d; c += 128)
            put_checked(a.v_rows + kv + c, *(const float4 *)(turned + c), &check);
    }
    if (check.n_saturated)
        atomicAdd(&a.counters->n_saturated, (unsigned long long)check.n_saturated);
    if (!__any_sync(~0u, check.is_bad) || lane) return;
    if (a.row_flags) a.row_flags[row] = 1;
    atomicAdd(&a.counters->n_nonfinite, 1ull);
}

static __global__ void __launch_bounds__(ROWS_WARPS * 32)
    ki_rows_kernel(const __grid_constant__ append_args a, uint32_t n_rows) {
    __shared__ __align__(16) float turned[ROWS_WARPS][MAX_DIM];
    uint32_t warp = threadIdx.x / 32, k = blockIdx.x * ROWS_WARPS + warp;
    uint32_t row = k / a.l.n_kv_heads, head = k % a.l.n_kv_heads;
    ki_pdl_wait();
    ki_pdl_launch();
    if (row < n_rows) make_row(a, row, head, turned[warp]);
}

/* ---- blocks of 32 tokens through shared memory ---- */

struct block_job { /* positions [from, to) of one side, from those of the block at base on */
    const ki_cuda_seq *seq;
    uint32_t head, base, from, to;
    bool keys;
};

/* Old ones of the block at base, a word of the store at a time. */
KI_DEV void stage_old(uint16_t *raw, uint32_t stride, const append_args &a, const block_job &job,
                      uint32_t base, uint32_t from, uint32_t to) {
    const uint4 *block = (const uint4 *)exact_block(a.l, *job.seq, a.layer, job.head,
                                                    base / KI_SUB_TOKENS, job.keys ? 0 : 1);
    for (uint32_t k = threadIdx.x; k < a.l.head_dim * 4; k += blockDim.x) {
        uint4 four = block[k];
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            ki_order_element16 at = ki_order_row_at(k * 4 + i, a.l.head_dim / 16, job.keys);
            uint32_t t = at.token;
            uint16_t *to_row = raw + t * stride + at.channel;
            bool is_here = base + t >= from && base + t < to;
            if (is_here) to_row[0] = (uint16_t)words[i];
            if (job.keys ? is_here : base + t + 1 >= from && base + t + 1 < to)
                to_row[job.keys ? 1 : stride] = (uint16_t)(words[i] >> 16);
        }
    }
}

/* The job's rows into raw [..][stride], whose first row is that of job.base: new ones from the
 * step's, older ones from the store. */
KI_DEV void stage_block(uint16_t *raw, uint32_t stride, const append_args &a,
                        const block_job &job) {
    const ki_cuda_seq &s = *job.seq;
    uint32_t d = a.l.head_dim, fours = d / 8, old_to = min(job.to, s.n_tokens);
    uint32_t from = max(job.from, s.n_tokens);
    const uint16_t *rows = job.keys ? a.k_rows : a.v_rows;
    if (from < job.to)
        for (uint32_t k = threadIdx.x; k < (job.to - from) * fours; k += blockDim.x) {
            uint32_t pos = from + k / fours, c = k % fours * 8;
            uint64_t row = s.first_row + pos - s.n_tokens;
            *(uint4 *)(raw + (pos - job.base) * stride + c) =
                *(const uint4 *)(rows + (row * a.l.n_kv_heads + job.head) * d + c);
        }
    for (uint32_t base = job.base; job.from < old_to && base < old_to; base += KI_SUB_TOKENS)
        if (base + KI_SUB_TOKENS > job.from)
            stage_old(raw + (base - job.base) * stride, stride, a, job, base, job.from, old_to);
}

/* Rows [from, to) of raw [32][stride] into a block in 16 bit; other tokens' stay. */
KI_DEV void put_block(uint8_t *block, const uint16_t *raw, uint32_t stride, uint32_t d,
                      uint32_t from, uint32_t to, bool keys) {
    bool is_whole = from == 0 && to == KI_SUB_TOKENS;
    for (uint32_t k = threadIdx.x; k < d * 4; k += blockDim.x) {
        uint32_t words[4], t[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            ki_order_element16 at = ki_order_row_at(k * 4 + i, d / 16, keys);
            t[i] = at.token;
            const uint16_t *x = raw + t[i] * stride + at.channel;
            words[i] = x[0] | (uint32_t)x[keys ? 1 : stride] << 16;
        }
        if (is_whole) ((uint4 *)block)[k] = make_uint4(words[0], words[1], words[2], words[3]);
#pragma unroll
        for (uint32_t i = 0; i < 4 && !is_whole; i++) {
            uint16_t *to_word = (uint16_t *)block + k * 8 + i * 2;
            uint32_t second = keys ? t[i] : t[i] + 1;
            if (t[i] >= from && t[i] < to) to_word[0] = (uint16_t)words[i];
            if (second >= from && second < to) to_word[1] = (uint16_t)(words[i] >> 16);
        }
    }
}

/* ---- codes ---- */

KI_DEV uint8_t *sub_of(uint8_t *page, const ki_cuda_layout &l, uint32_t pos) {
    return page + l.head_bytes + pos % KI_PAGE_TOKENS / KI_SUB_TOKENS * l.sub_bytes;
}

/* Scale and zero of one channel of the key group at `first`, and its codes. */
KI_DEV void quantize_channel(const append_args &a, const block_job &job, uint8_t *page,
                             const uint16_t *raw, uint8_t *codes, uint32_t first, uint32_t c) {
    const ki_cuda_layout &l = a.l;
    uint32_t d = l.head_dim, in_page = first % KI_PAGE_TOKENS, stride = ki_raw_stride(&l);
    uint32_t from = max(first, min(l.sink_tokens, first + l.k_group)) - job.base;
    uint32_t begin = first - job.base, end = begin + l.k_group;
    float low = INFINITY, high = -INFINITY, levels = (float)((1u << l.k_bits) - 1);
#pragma unroll 8
    for (uint32_t t = from; t < end; t++) {
        float x = f16_value(raw[t * stride + c]);
        low = fminf(low, x), high = fmaxf(high, x);
    }
    uint16_t scale, zero;
    range_scale(&scale, &zero, low, high, levels);
    uint8_t *base = l.head_bytes ? page : sub_of(page, l, first);
    uint32_t number = (l.head_bytes ? in_page : in_page % KI_SUB_TOKENS) / l.k_group;
    uint32_t at = number * d + ki_order_key_scale(c, d / 16);
    ((uint16_t *)(base + l.k_scale_at))[at] = scale;
    ((uint16_t *)(base + l.k_zero_at))[at] = zero;
    float sf = f16_value(scale), zf = f16_value(zero), inverse = sf == 0 ? 0 : __frcp_rn(sf);
#pragma unroll 8
    for (uint32_t t = begin; t < end; t++) {
        float code =
            t < from ? 0 : code_by(f16_value(raw[t * stride + c]), sf, inverse, zf, levels);
        codes[t * ki_code_stride(&l) + c] = (uint8_t)code;
    }
}

/* Groups of sinks alone have no codes; sinks at the beginning of one count in no range and have
 * codes 0. */
KI_DEV void quantize_keys(const append_args &a, const block_job &job, uint8_t *page,
                          const uint16_t *raw, uint8_t *codes) {
    const ki_cuda_layout &l = a.l;
    uint32_t d = l.head_dim, from = max(job.from, l.sink_tokens / l.k_group * l.k_group);
    for (uint32_t first = from; first < job.to; first += l.k_group)
        for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
            quantize_channel(a, job, page, raw, codes, first, c);
    __syncthreads();
    for (uint32_t base = job.base; base < job.to; base += KI_SUB_TOKENS) {
        uint32_t end = min(job.to, base + KI_SUB_TOKENS), begin = max(from, base);
        if (begin >= end) continue;
        pack_block((uint32_t *)(sub_of(page, l, base) + l.k_at),
                   codes + (base - job.base) * ki_code_stride(&l), ki_code_stride(&l), d / 16,
                   l.k_bits, true, begin - base, end - base, 0);
    }
}

KI_DEV void quantize_values(const append_args &a, const block_job &job, uint8_t *page,
                            const uint16_t *raw, uint8_t *codes) {
    const ki_cuda_layout &l = a.l;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = ki_code_stride(&l);
    uint8_t *sub = sub_of(page, l, job.base);
    for (uint32_t pos = job.from + warp; pos < job.to; pos += blockDim.x / 32) {
        uint32_t t = pos - job.base;
        const uint16_t *row = raw + t * ki_raw_stride(&l);
        if (l.is_plus) quantize_plus_value(codes + t * stride, sub, l, row, t, lane);
        else quantize_value(codes + t * stride, sub, l, row, t, lane);
    }
    __syncthreads();
    uint32_t low = l.v_bits == 3 ? 2 : l.v_bits, from = job.from - job.base, to = job.to - job.base;
    pack_block((uint32_t *)(sub + l.v_at), codes, stride, l.head_dim / 16, low, false, from, to, 0);
    if (l.v_bits == 3)
        pack_block((uint32_t *)(sub + l.third_at), codes, stride, l.head_dim / 16, 1, false, from,
                   to, 2);
}

/* Unit number `part` of one side, counted from where its line stood. False behind the last. */
KI_DEV bool find_block(block_job *job, const append_args &a, uint32_t part, uint32_t tokens) {
    const ki_cuda_seq &s = *job->seq;
    uint32_t n = s.n_tokens, end = n + s.n_rows;
    uint32_t from = job->keys ? ki_cuda_k_packed(&a.l, n) : ki_cuda_v_packed(&a.l, n);
    uint32_t to = job->keys ? ki_cuda_k_packed(&a.l, end) : ki_cuda_v_packed(&a.l, end);
    if (!job->keys && a.l.v_bits < 16) from = max(from, a.l.sink_tokens);
    job->base = (from / tokens + part) * tokens;
    job->from = max(from, job->base), job->to = min(to, job->base + tokens);
    return job->from < job->to;
}

static __global__ void __launch_bounds__(CLOSE_THREADS)
    ki_prompt_codes_kernel(const __grid_constant__ append_args a, uint32_t key_parts) {
    extern __shared__ __align__(16) uint8_t shared[];
    const ki_cuda_layout &l = a.l;
    uint16_t *raw = (uint16_t *)shared;
    uint8_t *codes = shared + ki_codes_at(&l);
    uint32_t part = blockIdx.x % a.n_parts, k = blockIdx.x / a.n_parts;
    ki_pdl_wait();
    ki_pdl_launch();
    const ki_cuda_seq s = a.seqs[k / l.n_kv_heads];
    block_job job = {&s, k % l.n_kv_heads, 0, 0, 0, part < key_parts};
    uint32_t bits = job.keys ? l.k_bits : l.v_bits;
    uint32_t tokens = job.keys ? ki_code_tokens(&l) : (uint32_t)KI_SUB_TOKENS;
    if (s.n_rows == 0 || !find_block(&job, a, job.keys ? part : part - key_parts, tokens)) return;
    uint8_t *page = page_of(a, s, job.base / KI_PAGE_TOKENS, job.head);
    bool is_plus_page = job.keys && l.is_plus;
    stage_block(raw, is_plus_page ? l.head_dim : ki_raw_stride(&l), a, job);
    __syncthreads();
    if (bits == 16)
        put_block(sub_of(page, l, job.base) + (job.keys ? l.k_at : l.v_at), raw, ki_raw_stride(&l),
                  l.head_dim, job.from - job.base, job.to - job.base, job.keys);
    else if (is_plus_page) {
        uint32_t sinks = l.sink_tokens > job.base ? l.sink_tokens - job.base : 0;
        if (sinks < KI_PAGE_TOKENS)
            close_plus_page(page, l, raw, codes, *(plus_close *)(shared + ki_codes_end(&l)), sinks);
    } else if (job.keys) quantize_keys(a, job, page, raw, codes);
    else quantize_values(a, job, page, raw, codes);
}

/* ---- the window ---- */

/* The newest rows of a step into the store: what a ring can hold, and the sinks. One thread block a
 * (sequence, KV head, side, 32 positions). */
static __global__ void __launch_bounds__(APPEND_THREADS)
    ki_prompt_window_kernel(const __grid_constant__ append_args a) {
    extern __shared__ __align__(16) uint8_t shared[];
    uint32_t part = blockIdx.x % a.n_parts, k = blockIdx.x / a.n_parts, side = k % 2;
    uint16_t *raw = (uint16_t *)shared;
    ki_pdl_wait();
    ki_pdl_launch();
    const ki_cuda_seq s = a.seqs[k / 2 / a.l.n_kv_heads];
    block_job job = {&s, k / 2 % a.l.n_kv_heads, 0, 0, 0, side == 0};
    uint32_t end = s.n_tokens + s.n_rows, block = s.n_tokens / KI_SUB_TOKENS + part;
    job.base = block * KI_SUB_TOKENS;
    job.from = max(s.n_tokens, job.base), job.to = min(end, job.base + KI_SUB_TOKENS);
    if (s.n_rows == 0 || job.from >= job.to || (side ? a.l.v_bits : a.l.k_bits) == 16) return;
    uint32_t last = (end - 1) / KI_SUB_TOKENS, n = side ? s.v_blocks : s.k_blocks;
    if (block >= a.l.sink_blocks && last - block >= n) return;
    stage_block(raw, ki_raw_stride(&a.l), a, job);
    __syncthreads();
    put_block(exact_block(a.l, s, a.layer, job.head, block, side), raw, ki_raw_stride(&a.l),
              a.l.head_dim, job.from - job.base, job.to - job.base, job.keys);
}

/* ---- host calls ---- */

kivi_status ki_cuda_prompt_append_prepare(kivi_error *err) {
    ki_cuda_layout most = {};
    most.head_dim = MAX_DIM, most.k_group = KI_PAGE_TOKENS;
    uint32_t bytes = ki_codes_bytes(&most);
    most.is_plus = 1;
    if (ki_codes_bytes(&most) > bytes) bytes = ki_codes_bytes(&most);
    return ki_cuda_check(cudaFuncSetAttribute(ki_prompt_codes_kernel,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)bytes),
                         "shared memory of prompt codes", err);
}

kivi_status ki_cuda_prompt_append(const ki_cuda_append_call *c, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    append_args a = args_of(c);
    uint32_t n = c->n_rows * l->n_kv_heads, n_heads = c->cache->n_seqs * l->n_kv_heads;
    KI_TRY(ki_cuda_check(ki_launch(ki_rows_kernel, (n + ROWS_WARPS - 1) / ROWS_WARPS,
                                   ROWS_WARPS * 32, 0, c->pdl, stream, a, c->n_rows),
                         "prompt rows", err));
    /* the lines move over max_rows tokens, that of keys over what they were behind, too; one unit
     * more for each end */
    uint32_t key_parts = (c->max_rows + l->residual_tokens) / ki_code_tokens(l) + 2;
    a.n_parts = key_parts + c->max_rows / KI_SUB_TOKENS + 2;
    return ki_cuda_check(ki_launch(ki_prompt_codes_kernel, n_heads * a.n_parts,
                                   l->is_plus ? CLOSE_THREADS : APPEND_THREADS, ki_codes_bytes(l),
                                   c->pdl, stream, a, key_parts),
                         "prompt codes", err);
}

kivi_status ki_cuda_prompt_window(const ki_cuda_append_call *c, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    append_args a = args_of(c);
    a.n_parts = c->max_rows / KI_SUB_TOKENS + 2;
    return ki_cuda_check(ki_launch(ki_prompt_window_kernel,
                                   c->cache->n_seqs * l->n_kv_heads * 2 * a.n_parts, APPEND_THREADS,
                                   KI_SUB_TOKENS * ki_raw_stride(l) * 2, c->pdl, stream, a),
                         "prompt window", err);
}
