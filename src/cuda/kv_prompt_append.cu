/* kv_prompt_append.cu: rows of prompts: rope, float16 rows as attention takes them, codes of what
 * falls behind the line, and the newest rows into the window. */
#include "kv_append.cuh"

/* One head's row [D] as float32 in shared memory, rotated where there is a rope. In step
 * afterwards. */
KI_DEV void load_row(float *out, const append_args &a, const void *x, uint64_t at, uint32_t row,
                     bool rotated) {
    uint32_t half = a.l.head_dim / 2;
    for (uint32_t j = threadIdx.x; j < half; j += blockDim.x) {
        float u = load_element(x, a.type, at + j), w = load_element(x, a.type, at + half + j);
        float cosine = 1, sine = 0;
        bool turn = rotated && a.rope;
        if (turn) {
            float2 r = ((const float2 *)a.rope)[(uint64_t)row * half + j];
            cosine = r.x, sine = r.y;
        }
        out[j] = turn ? __fsub_rn(__fmul_rn(u, cosine), __fmul_rn(w, sine)) : u;
        out[half + j] = turn ? __fadd_rn(__fmul_rn(w, cosine), __fmul_rn(u, sine)) : w;
    }
    __syncthreads();
}

KI_DEV void rotate_queries(float *scratch, const append_args &a, uint32_t row, uint32_t head) {
    uint32_t d = a.l.head_dim;
    if (!a.q) return;
    for (uint32_t h = head * a.l.head_group; h < (head + 1) * a.l.head_group; h++) {
        row_check ignored = {};
        load_row(scratch, a, a.q, (uint64_t)row * a.q_stride + h * d, row, true);
        for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
            a.q_out[((uint64_t)row * a.l.n_heads + h) * d + c] = checked_f16(scratch[c], &ignored);
        __syncthreads();
    }
}

/* Keys and values of one row and head as float16 in shared memory. */
KI_DEV void load_kv_row(uint16_t *k16, uint16_t *v16, float *scratch, const append_args &a,
                        uint32_t row, uint32_t head) {
    uint32_t d = a.l.head_dim;
    row_check check = {};
    load_row(scratch, a, a.k, (uint64_t)row * a.k_stride + head * d, row, true);
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) k16[c] = checked_f16(scratch[c], &check);
    __syncthreads();
    load_row(scratch, a, a.v, (uint64_t)row * a.v_stride + head * d, row, false);
    if (a.l.is_plus) turn_row(scratch, d, threadIdx.x, blockDim.x);
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) v16[c] = checked_f16(scratch[c], &check);
    report_row(a, check, row);
    __syncthreads();
}
KI_DEV void quantize_values(const quant_shared &m, const append_args &a, const range_job &job) {
    uint32_t d = a.l.head_dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (a.l.v_bits == 16) {
        copy_rows(m, a, job, false);
        return;
    }
    uint32_t first = max(job.from, a.l.sink_tokens);
    for (uint32_t base = first / KI_SUB_TOKENS * KI_SUB_TOKENS; base < job.to;
         base += KI_SUB_TOKENS) {
        uint32_t from = max(first, base), to = min(job.to, base + KI_SUB_TOKENS);
        uint8_t *sub =
            job.page + a.l.head_bytes + base % KI_PAGE_TOKENS / KI_SUB_TOKENS * a.l.sub_bytes;
        stage_rows(m.raw, a, job, base, from, to, false);
        __syncthreads();
        for (uint32_t pos = from + warp; pos < to; pos += blockDim.x / 32) {
            uint32_t t = pos - base;
            if (a.l.is_plus) quantize_plus_value(m.codes + t * d, sub, a.l, m.raw + t * d, t, lane);
            else quantize_value(m.codes + t * d, sub, a.l, m.raw + t * d, t, lane);
        }
        __syncthreads();
        uint32_t low = a.l.v_bits == 3 ? 2 : a.l.v_bits;
        pack_block((uint32_t *)(sub + a.l.v_at), m.codes, d, d / 16, low, false, from - base,
                   to - base, 0);
        if (a.l.v_bits == 3)
            pack_block((uint32_t *)(sub + a.l.third_at), m.codes, d, d / 16, 1, false, from - base,
                       to - base, 2);
        __syncthreads();
    }
}
/* Page `part` of both sides, counted from the one where the line stood. False behind the last. */
KI_DEV bool move_lines(const quant_shared &m, const append_args &a, const ki_cuda_seq &s,
                       uint32_t head, uint32_t part) {
    uint32_t n = s.n_tokens, end = n + s.n_rows;
    uint32_t k_from = ki_cuda_k_packed(&a.l, n), v_from = ki_cuda_v_packed(&a.l, n);
    range_job job;
    bool keys = make_job(&job, a, &s, head, k_from / KI_PAGE_TOKENS + part, k_from,
                         ki_cuda_k_packed(&a.l, end));
    if (keys) quantize_keys(m, a, job);
    __syncthreads();
    bool values = make_job(&job, a, &s, head, v_from / KI_PAGE_TOKENS + part, v_from,
                           ki_cuda_v_packed(&a.l, end));
    if (values) quantize_values(m, a, job);
    return keys || values;
}

/* Prompts: the step's rows as attention takes them. One thread block a (row, KV head). */
static __global__ void __launch_bounds__(APPEND_THREADS)
    ki_rows_kernel(const __grid_constant__ append_args a) {
    extern __shared__ __align__(16) uint8_t shared[];
    const quant_shared m = carve_append(shared, a.l.head_dim);
    uint32_t row = blockIdx.x / a.l.n_kv_heads, head = blockIdx.x % a.l.n_kv_heads;
    uint32_t d = a.l.head_dim;
    wait_for_previous();
    let_next_begin();
    rotate_queries(m.scratch, a, row, head);
    load_kv_row(m.k16, m.v16, m.scratch, a, row, head);
    uint64_t to = ((uint64_t)row * a.l.n_kv_heads + head) * d;
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
        a.k_rows[to + c] = m.k16[c], a.v_rows[to + c] = m.v16[c];
}

static __global__ void __launch_bounds__(CLOSE_THREADS)
    ki_prompt_codes_kernel(const __grid_constant__ append_args a) {
    extern __shared__ __align__(16) uint8_t shared[];
    uint32_t part = blockIdx.x % a.n_parts, k = blockIdx.x / a.n_parts;
    uint32_t slot = k / a.l.n_kv_heads, head = k % a.l.n_kv_heads;
    wait_for_previous();
    let_next_begin();
    const ki_cuda_seq s = a.seqs[slot];
    if (s.n_rows == 0) return;
    move_lines(carve_append(shared, a.l.head_dim), a, s, head, part);
}

/* The newest rows of a step into the store: what a ring can hold, and the sinks. One thread block a
 * (sequence, KV head, 32 positions). */
static __global__ void __launch_bounds__(APPEND_THREADS)
    ki_prompt_window_kernel(const __grid_constant__ append_args a) {
    uint32_t part = blockIdx.x % a.n_parts, k = blockIdx.x / a.n_parts, d = a.l.head_dim;
    uint32_t slot = k / a.l.n_kv_heads, head = k % a.l.n_kv_heads;
    wait_for_previous();
    let_next_begin();
    const ki_cuda_seq s = a.seqs[slot];
    uint32_t end = s.n_tokens + s.n_rows, block = s.n_tokens / KI_SUB_TOKENS + part;
    uint32_t from = max(s.n_tokens, block * KI_SUB_TOKENS),
             to = min(end, (block + 1) * KI_SUB_TOKENS);
    if (s.n_rows == 0 || from >= to) return;
    uint32_t last = (end - 1) / KI_SUB_TOKENS;
    for (uint32_t side = 0; side < 2; side++) {
        uint32_t n = side ? s.v_blocks : s.k_blocks;
        if ((side ? a.l.v_bits : a.l.k_bits) == 16) continue;
        if (block >= a.l.sink_blocks && last - block >= n) continue;
        uint8_t *to_block = exact_block(a.l, s, a.layer, head, block, side);
        const uint16_t *rows = side ? a.v_rows : a.k_rows;
        for (uint32_t pos = from; pos < to; pos++) {
            uint64_t row = s.first_row + pos - s.n_tokens;
            put_exact_row(to_block, rows + (row * a.l.n_kv_heads + head) * d, pos % KI_SUB_TOKENS,
                          d, side == 0);
        }
    }
}

/* ---- host calls ---- */

kivi_status ki_cuda_prompt_append_prepare(kivi_error *err) {
    ki_cuda_layout most = {};
    most.head_dim = MAX_DIM, most.is_plus = 1;
    return ki_cuda_check(cudaFuncSetAttribute(ki_prompt_codes_kernel,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)shared_bytes(&most)),
                         "shared memory of prompt codes", err);
}

kivi_status ki_cuda_prompt_append(const ki_cuda_append_call *c, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    append_args a = args_of(c);
    uint32_t row_shared = quant_bytes(l->head_dim, quant_width(l->head_dim, APPEND_THREADS));
    /* the shared memory of a + page leaves room for few blocks: larger ones */
    uint32_t n_threads = l->is_plus ? CLOSE_THREADS : APPEND_THREADS;
    KI_TRY(ki_cuda_check(ki_launch(ki_rows_kernel, c->n_rows * l->n_kv_heads, APPEND_THREADS,
                                   row_shared, c->pdl, stream, a),
                         "prompt rows", err));
    /* the lines move over max_rows tokens and what they were behind; one page more for each end */
    a.n_parts = (c->max_rows + l->residual_tokens) / KI_PAGE_TOKENS + 2;
    return ki_cuda_check(ki_launch(ki_prompt_codes_kernel,
                                   c->cache->n_seqs * l->n_kv_heads * a.n_parts, n_threads,
                                   shared_bytes(l), c->pdl, stream, a),
                         "prompt codes", err);
}

kivi_status ki_cuda_prompt_window(const ki_cuda_append_call *c, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    append_args a = args_of(c);
    a.n_parts = c->max_rows / KI_SUB_TOKENS + 2;
    return ki_cuda_check(ki_launch(ki_prompt_window_kernel,
                                   c->cache->n_seqs * l->n_kv_heads * a.n_parts, APPEND_THREADS, 0,
                                   c->pdl, stream, a),
                         "prompt window", err);
}
