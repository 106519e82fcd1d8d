/* kv_append.cu: codes of keys whose line moved in a step of decoding, by a fixed number of large
 * thread blocks, and copies of rings. */
#include "kv_append.cuh"

/* More than are resident. */
enum { CLOSE_BLOCKS = 512 };

/* ---- codes of a range of tokens of one page ---- */

struct range_job { /* tokens [from, to) of page `index` of one side */
    const ki_cuda_seq *seq;
    uint32_t head, index, from, to;
    uint8_t *page;
};

/* Rows [from, to) of 32 tokens (positions base ..) from the 16-bit store into raw [32][D]. */
KI_DEV void stage_rows(uint16_t *raw, const append_args &a, const range_job &job, uint32_t base,
                       uint32_t from, uint32_t to, bool keys) {
    uint32_t d = a.l.head_dim;
    uint8_t *block =
        exact_block(a.l, *job.seq, a.layer, job.head, base / KI_SUB_TOKENS, keys ? 0 : 1);
#pragma unroll 4
    for (uint32_t k = (from - base) * d + threadIdx.x; k < (to - base) * d; k += blockDim.x)
        raw[k] = *exact_element(block, k / d, k % d, d / 16, keys);
}

/* Shared memory of one thread block, as ki_close_bytes counts it; of + kinds nothing but all of a
 * page's rows, what closing it needs and codes. */
struct quant_shared {
    uint16_t *raw;
    float *low, *high;
    uint16_t *scale, *zero;
    plus_close *plus;
    uint8_t *codes;
};

KI_DEV quant_shared carve(uint8_t *base, const ki_cuda_layout &l) {
    quant_shared m = {};
    uint32_t d = l.head_dim;
    m.raw = (uint16_t *)base;
    if (l.is_plus) {
        m.plus = (plus_close *)(m.raw + KI_PAGE_TOKENS * d);
        m.codes = (uint8_t *)(m.plus + 1);
        return m;
    }
    m.low = (float *)(m.raw + KI_SUB_TOKENS * CLOSE_THREADS);
    m.high = m.low + d;
    m.scale = (uint16_t *)(m.high + d);
    m.zero = m.scale + d;
    m.codes = (uint8_t *)(m.zero + d);
    return m;
}

KI_DEV void put_key_codes(const quant_shared &m, const append_args &a, const range_job &job,
                          uint32_t base, uint32_t from, uint32_t to, uint32_t sinks) {
    uint32_t d = a.l.head_dim;
    float levels = (float)((1u << a.l.k_bits) - 1);
    for (uint32_t k = (from - base) * d + threadIdx.x; k < (to - base) * d; k += blockDim.x) {
        uint32_t c = k % d;
        float x = f16_value(m.raw[k]);
        bool is_sink = base + k / d < sinks;
        m.codes[k] =
            is_sink ? 0 : (uint8_t)code_of(x, f16_value(m.scale[c]), f16_value(m.zero[c]), levels);
    }
    __syncthreads();
    uint8_t *sub =
        job.page + a.l.head_bytes + base % KI_PAGE_TOKENS / KI_SUB_TOKENS * a.l.sub_bytes;
    pack_block((uint32_t *)(sub + a.l.k_at), m.codes, d, d / 16, a.l.k_bits, true, from - base,
               to - base, 0);
    __syncthreads();
}

/* Scales and zeros of the group that begins at `first`, from m.low and m.high. */
KI_DEV void put_key_scales(const quant_shared &m, const append_args &a, const range_job &job,
                           uint32_t first) {
    const ki_cuda_layout &l = a.l;
    uint32_t in_page = first % KI_PAGE_TOKENS, d = l.head_dim;
    uint8_t *base = job.page;
    uint32_t number = in_page / l.k_group;
    if (!l.head_bytes) {
        base += in_page / KI_SUB_TOKENS * l.sub_bytes;
        number = in_page % KI_SUB_TOKENS / l.k_group;
    }
    uint16_t *scales = (uint16_t *)(base + l.k_scale_at) + number * d;
    uint16_t *zeros = (uint16_t *)(base + l.k_zero_at) + number * d;
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        range_scale(&m.scale[c], &m.zero[c], m.low[c], m.high[c], (float)((1u << l.k_bits) - 1));
        scales[ki_order_key_scale(c, d / 16)] = m.scale[c];
        zeros[ki_order_key_scale(c, d / 16)] = m.zero[c];
    }
    __syncthreads();
}

/* One key group [first, first + G). Sinks at its beginning count in no range and have codes 0. */
KI_DEV void close_key_group(const quant_shared &m, const append_args &a, const range_job &job,
                            uint32_t first) {
    uint32_t d = a.l.head_dim, end = first + a.l.k_group, sinks = a.l.sink_tokens;
    uint32_t span = min(a.l.k_group, (uint32_t)KI_SUB_TOKENS);
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
        m.low[c] = INFINITY, m.high[c] = -INFINITY;
    for (uint32_t from = first; from < end; from += span) {
        uint32_t base = from / KI_SUB_TOKENS * KI_SUB_TOKENS;
        stage_rows(m.raw, a, job, base, from, from + span, true);
        __syncthreads();
        for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
            channel_range(&m.low[c], &m.high[c], m.raw, d, c,
                          max(from, min(sinks, from + span)) - base, from + span - base);
        __syncthreads();
    }
    put_key_scales(m, a, job, first);
    for (uint32_t from = first; from < end; from += span) {
        uint32_t base = from / KI_SUB_TOKENS * KI_SUB_TOKENS;
        if (span < a.l.k_group) stage_rows(m.raw, a, job, base, from, from + span, true);
        __syncthreads();
        put_key_codes(m, a, job, base, from, from + span, sinks);
    }
}

KI_DEV void close_plus_keys(const append_args &a, const range_job &job, const quant_shared &m) {
    uint32_t d = a.l.head_dim, base = job.index * KI_PAGE_TOKENS;
    for (uint32_t b = 0; b < KI_SUBS; b++)
        stage_rows(m.raw + b * KI_SUB_TOKENS * d, a, job, base + b * 32, base + b * 32,
                   base + b * 32 + 32, true);
    __syncthreads();
    uint32_t sinks = a.l.sink_tokens > base ? a.l.sink_tokens - base : 0;
    if (sinks < KI_PAGE_TOKENS) close_plus_page(job.page, a.l, m.raw, m.codes, *m.plus, sinks);
}

KI_DEV void quantize_keys(const quant_shared &m, const append_args &a, const range_job &job) {
    uint32_t group = a.l.k_group;
    if (a.l.is_plus) close_plus_keys(a, job, m);
    else
        for (uint32_t first = job.from; first < job.to; first += group)
            if (first + group > a.l.sink_tokens) close_key_group(m, a, job, first);
}

/* Tokens [from, to) as far as they are in page `index`. */
KI_DEV bool make_job(range_job *job, const append_args &a, const ki_cuda_seq *s, uint32_t head,
                     uint32_t index, uint32_t from, uint32_t to) {
    job->seq = s;
    job->head = head;
    job->index = index;
    job->from = max(from, index * KI_PAGE_TOKENS);
    job->to = min(to, (index + 1) * KI_PAGE_TOKENS);
    if (job->from >= job->to) return false;
    job->page = page_of(a, *s, index, head);
    return true;
}

/* ---- keys of one sequence and head whose line moved with a row ---- */

/* Groups of 32 keys, as many blocks of 32 tokens at a time as there are threads for their channels:
 * a thread has one channel of one block. */
KI_DEV void close_blocks_of_32(const quant_shared &m, const append_args &a, const ki_cuda_seq &s,
                               uint32_t head, uint32_t from, uint32_t to) {
    const ki_cuda_layout &l = a.l;
    uint32_t d = l.head_dim, steps = d / 16, n_parts = blockDim.x / d;
    uint32_t part = threadIdx.x / d, c = threadIdx.x % d, fours = d * 4; /* 16-byte words a block */
    float levels = (float)((1u << l.k_bits) - 1);
    for (; from < to; from += n_parts * KI_SUB_TOKENS) {
        uint32_t n = min(n_parts, (to - from) / KI_SUB_TOKENS);
        for (uint32_t k = threadIdx.x; k < n * fours; k += blockDim.x)
            ((uint4 *)m.raw)[k] = ((const uint4 *)exact_block(
                l, s, a.layer, head, from / KI_SUB_TOKENS + k / fours, 0))[k % fours];
        __syncthreads();
        uint32_t base = from + part * KI_SUB_TOKENS;
        uint8_t *codes = m.codes + part * KI_SUB_TOKENS * d;
        uint32_t sinks = l.sink_tokens > base ? l.sink_tokens - base : 0;
        bool is_mine = part < n && sinks < KI_SUB_TOKENS;
        if (is_mine) {
            uint8_t *sub = page_of(a, s, base / KI_PAGE_TOKENS, head) +
                           base % KI_PAGE_TOKENS / KI_SUB_TOKENS * l.sub_bytes;
            uint8_t *raw = (uint8_t *)m.raw + part * fours * 16;
            float low = INFINITY, high = -INFINITY;
#pragma unroll 8
            for (uint32_t t = sinks; t < KI_SUB_TOKENS; t++) {
                float x = f16_value(*exact_element(raw, t, c, steps, true));
                low = fminf(low, x), high = fmaxf(high, x);
            }
            uint16_t scale, zero;
            range_scale(&scale, &zero, low, high, levels);
            ((uint16_t *)(sub + l.k_scale_at))[ki_order_key_scale(c, steps)] = scale;
            ((uint16_t *)(sub + l.k_zero_at))[ki_order_key_scale(c, steps)] = zero;
            float sf = f16_value(scale), zf = f16_value(zero),
                  inverse = sf == 0 ? 0 : __frcp_rn(sf);
#pragma unroll 8
            for (uint32_t t = 0; t < KI_SUB_TOKENS; t++) {
                float x = f16_value(*exact_element(raw, t, c, steps, true));
                codes[t * d + c] = t < sinks ? 0 : (uint8_t)code_by(x, sf, inverse, zf, levels);
            }
        }
        __syncthreads();
        for (uint32_t k = 0; k < n; k++) {
            uint32_t at = from + k * KI_SUB_TOKENS;
            if (l.sink_tokens >= at + KI_SUB_TOKENS) continue;
            uint8_t *plane = page_of(a, s, at / KI_PAGE_TOKENS, head) + l.k_at +
                             at % KI_PAGE_TOKENS / KI_SUB_TOKENS * l.sub_bytes;
            pack_block((uint32_t *)plane, m.codes + k * KI_SUB_TOKENS * d, d, steps, l.k_bits, true,
                       0, KI_SUB_TOKENS, 0);
        }
        __syncthreads();
    }
}

/* Keys whose line moved with this row: R of them, once in R steps. */
KI_DEV void close_keys(const quant_shared &m, const append_args &a, const ki_cuda_seq &s,
                       uint32_t head) {
    uint32_t from = ki_cuda_k_packed(&a.l, s.n_tokens), to = ki_cuda_k_packed(&a.l, s.n_tokens + 1);
    if (from == to) return;
    if (a.l.k_group == KI_SUB_TOKENS && a.l.head_dim <= blockDim.x) {
        close_blocks_of_32(m, a, s, head, from, to);
        return;
    }
    range_job job;
    for (uint32_t page = from / KI_PAGE_TOKENS; make_job(&job, a, &s, head, page, from, to);
         page++) {
        quantize_keys(m, a, job);
        __syncthreads();
    }
}

KI_DEV bool moves_key_line(const ki_cuda_layout &l, const ki_cuda_seq &s) {
    return l.k_bits < 16 &&
           ki_cuda_k_packed(&l, s.n_tokens + 1) != ki_cuda_k_packed(&l, s.n_tokens);
}

/* ---- the kernels ---- */

/* Closes of n_layers layers from a.layer on. All pages of the step, sequence by sequence, are
 * numbered, and dealt out to the thread blocks; every warp finds the same ones. */
static __global__ void __launch_bounds__(CLOSE_THREADS, 2)
    ki_close_kernel(const __grid_constant__ append_args args, uint32_t n_seqs, uint32_t n_layers) {
    extern __shared__ __align__(16) uint8_t shared[];
    append_args a = args;
    const quant_shared m = carve(shared, args.l);
    uint32_t lane = threadIdx.x % 32, each = n_layers * a.l.n_kv_heads, n_before = 0;
    ki_pdl_wait();
    ki_pdl_launch();
    for (uint32_t base = 0; base < n_seqs; base += 32) {
        uint32_t slot = base + lane;
        bool moves = slot < n_seqs && a.seqs[slot].n_rows == 1 && moves_key_line(a.l, a.seqs[slot]);
        for (uint32_t left = __ballot_sync(~0u, moves); left; left &= left - 1) {
            const ki_cuda_seq s = a.seqs[base + __ffs(left) - 1];
            uint32_t first = (blockIdx.x + gridDim.x - n_before % gridDim.x) % gridDim.x;
            for (uint32_t k = first; k < each; k += gridDim.x) {
                a.layer = args.layer + k / a.l.n_kv_heads;
                close_keys(m, a, s, k % a.l.n_kv_heads);
                __syncthreads();
            }
            n_before += each;
        }
    }
}

struct ring_args {
    uint64_t to, from;
    uint32_t to_k, to_v, from_k, from_v, block_bytes, first_block, n_blocks;
};

/* One thread block a (layer, KV head, side, block of 32). */
static __global__ void __launch_bounds__(APPEND_THREADS) ki_ring_kernel(const ring_args a) {
    uint32_t b = a.first_block + blockIdx.x % a.n_blocks, rest = blockIdx.x / a.n_blocks;
    uint32_t side = rest % 2, slot = rest / 2;
    uint32_t to_n = side ? a.to_v : a.to_k, from_n = side ? a.from_v : a.from_k;
    uint32_t last = a.first_block + a.n_blocks - 1;
    ki_pdl_wait();
    ki_pdl_launch();
    if (!to_n || last - b >= to_n || last - b >= from_n) return;
    uint64_t to_at = (uint64_t)slot * (a.to_k + a.to_v) + (side ? a.to_k : 0) + b % to_n;
    uint64_t from_at = (uint64_t)slot * (a.from_k + a.from_v) + (side ? a.from_k : 0) + b % from_n;
    const uint4 *x = (const uint4 *)(a.from + from_at * a.block_bytes);
    uint4 *y = (uint4 *)(a.to + to_at * a.block_bytes);
    for (uint32_t i = threadIdx.x; i < a.block_bytes / 16; i += blockDim.x) y[i] = x[i];
}

/* ---- host calls ---- */

kivi_status ki_cuda_append_prepare(kivi_error *err) {
    ki_cuda_layout most = {};
    most.head_dim = MAX_DIM, most.is_plus = 1;
    int bytes = (int)ki_close_bytes(&most);
    cudaFuncAttribute limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    KI_TRY(ki_cuda_check(cudaFuncSetAttribute(ki_close_kernel, limit, bytes),
                         "shared memory of closing", err));
    return ki_cuda_check(ki_share_multiprocessors(ki_close_kernel), "shared memory of closing",
                         err);
}

kivi_status ki_cuda_close_keys(const ki_cuda_append_call *c, uint32_t n_layers, void *stream,
                               kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    append_args a = args_of(c);
    uint64_t most = (uint64_t)c->cache->n_seqs * n_layers * l->n_kv_heads;
    if (l->k_bits == 16) return KIVI_OK;
    uint32_t n_blocks = most < CLOSE_BLOCKS ? (uint32_t)most : (uint32_t)CLOSE_BLOCKS;
    return ki_cuda_check(ki_launch(ki_close_kernel, n_blocks, CLOSE_THREADS, ki_close_bytes(l),
                                   c->pdl, stream, a, c->cache->n_seqs, n_layers),
                         "closing pages", err);
}

kivi_status ki_cuda_ring_copy(const ki_cuda_layout *l, uint64_t to, uint32_t to_k, uint32_t to_v,
                              uint64_t from, uint32_t from_k, uint32_t from_v, uint32_t first_pos,
                              uint32_t n_tokens, void *stream, kivi_error *err) {
    if (first_pos >= n_tokens) return KIVI_OK;
    ring_args a = {};
    a.to = to, a.from = from;
    a.to_k = l->k_bits < 16 ? to_k : 0, a.to_v = l->v_bits < 16 ? to_v : 0;
    a.from_k = l->k_bits < 16 ? from_k : 0, a.from_v = l->v_bits < 16 ? from_v : 0;
    a.block_bytes = KI_SUB_TOKENS * l->head_dim * 2;
    a.first_block = first_pos / KI_SUB_TOKENS;
    a.n_blocks = (n_tokens - 1) / KI_SUB_TOKENS - a.first_block + 1;
    uint32_t n = l->n_layers * l->n_kv_heads * 2 * a.n_blocks;
    return ki_cuda_check(ki_launch(ki_ring_kernel, n, APPEND_THREADS, 0, false, stream, a),
                         "ring copy", err);
}
