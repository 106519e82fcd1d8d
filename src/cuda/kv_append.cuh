/* kv_append.cuh: what the appends of decoding (kv_append.cu) and of prompts (kv_prompt_append.cu) do
 * alike: elements of 16-bit rows, and codes of a range of keys. Both are compiled without FMA
 * contraction. */
#ifndef KI_KV_APPEND_CUH
#define KI_KV_APPEND_CUH
#include "kv_append.h"
#include "kv_launch.h"
#include "kv_quant.cuh"

struct append_args {
    ki_cuda_layout l;
    uint8_t *pool;
    const uint32_t *tables;
    const ki_cuda_seq *seqs;
    ki_cuda_counters *counters;
    const void *q, *k, *v;
    const float *rope;
    uint16_t *q_out, *k_rows, *v_rows;
    uint32_t *row_flags;
    uint32_t table_stride, layer, q_stride, k_stride, v_stride, n_parts;
    ki_cuda_type type;
    bool closes; /* keys, where their line moves */
};

/* CLOSE_THREADS: five candidates of the 96 narrow channels of a + page all at once; four blocks of
 * 32 tokens. */
enum { APPEND_THREADS = 128, CLOSE_THREADS = 512, MAX_DIM = 256 };

/* ---- rows ---- */

KI_DEV float load_element(const void *x, ki_cuda_type type, uint64_t at) {
    if (type == KI_CUDA_F32) return ((const float *)x)[at];
    if (type == KI_CUDA_F16) return __half2float(((const __half *)x)[at]);
    return __bfloat162float(((const __nv_bfloat16 *)x)[at]);
}

struct row_check {
    bool is_bad;
    uint32_t n_saturated;
};

KI_DEV uint16_t checked_f16(float x, row_check *check) {
    bool is_bad = (__float_as_uint(x) & 0x7f800000) == 0x7f800000;
    check->is_bad |= is_bad;
    if (is_bad) return 0; /* the store never holds one: others' products with 0 stay 0 */
    float y = x < -65504.0f ? -65504.0f : x > 65504.0f ? 65504.0f : x;
    check->n_saturated += y != x;
    return f16_near(y);
}
KI_DEV void report_row(const append_args &a, const row_check &check, uint32_t row) {
    if (check.n_saturated)
        atomicAdd(&a.counters->n_saturated, (unsigned long long)check.n_saturated);
    if (!__syncthreads_or(check.is_bad) || threadIdx.x) return;
    if (a.row_flags) a.row_flags[row] = 1;
    atomicAdd(&a.counters->n_nonfinite, 1ull);
}

/* One element of a 16-bit plane. */
KI_DEV uint16_t *exact_element(uint8_t *block, uint32_t t, uint32_t c, uint32_t steps, bool keys) {
    ki_order_place p = keys ? ki_order_key(t, c, steps, 16) : ki_order_value(t, c, steps, 16);
    return (uint16_t *)block + p.word * 2 + p.bit / 16;
}

KI_DEV void put_exact_row(uint8_t *block, const uint16_t *row, uint32_t t, uint32_t d, bool keys) {
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x)
        *exact_element(block, t, c, d / 16, keys) = row[c];
}

KI_DEV uint8_t *page_of(const append_args &a, const ki_cuda_seq &s, uint32_t index, uint32_t head) {
    uint64_t id = a.tables[(uint64_t)s.table * a.table_stride + index];
    return a.pool + id * a.l.id_bytes +
           ((uint64_t)a.layer * a.l.n_kv_heads + head) * a.l.page_bytes;
}

/* ---- codes of a range of tokens of one page ---- */

struct range_job { /* tokens [from, to) of page `index` of one side */
    const ki_cuda_seq *seq;
    uint32_t head, index, from, to;
    uint8_t *page;
};

/* Rows [from, to) of 32 tokens (positions base ..) into raw [32][D]: new ones from the step's rows,
 * older ones from the 16-bit store. */
KI_DEV void stage_rows(uint16_t *raw, const append_args &a, const range_job &job, uint32_t base,
                       uint32_t from, uint32_t to, bool keys) {
    uint32_t d = a.l.head_dim;
    const uint16_t *rows = keys ? a.k_rows : a.v_rows;
    const ki_cuda_seq &s = *job.seq;
    uint8_t *block = NULL;
    if (!rows || from < s.n_tokens)
        block = exact_block(a.l, s, a.layer, job.head, base / KI_SUB_TOKENS, keys ? 0 : 1);
#pragma unroll 4
    for (uint32_t k = (from - base) * d + threadIdx.x; k < (to - base) * d; k += blockDim.x) {
        uint32_t t = k / d, c = k % d, pos = base + t;
        if (rows && pos >= s.n_tokens) {
            uint64_t row = s.first_row + pos - s.n_tokens;
            raw[k] = rows[(row * a.l.n_kv_heads + job.head) * d + c];
        } else raw[k] = *exact_element(block, t, c, d / 16, keys);
    }
}

/* Shared memory of one thread block, by the head size: raw has 32 rows of `width`, which is the
 * head size, or as many blocks of 32 as there are threads for; codes the same and 64 numbered wide
 * channels a token; behind it what plus kinds need. */
struct quant_shared {
    float *scratch, *low, *high;
    uint16_t *scale, *zero, *k16, *v16, *raw;
    uint8_t *codes, *more;
};

KI_BOTH uint32_t quant_width(uint32_t d, uint32_t n_threads) {
    return d > n_threads ? d : n_threads;
}
KI_BOTH uint32_t quant_bytes(uint32_t d, uint32_t width) {
    return 20 * d + KI_SUB_TOKENS * (2 * width + width + 64);
}

KI_DEV quant_shared carve(uint8_t *base, uint32_t d, uint32_t width) {
    quant_shared m;
    m.raw = (uint16_t *)base;
    m.scratch = (float *)(m.raw + KI_SUB_TOKENS * width);
    m.low = m.scratch + d, m.high = m.low + d;
    m.scale = (uint16_t *)(m.high + d);
    m.zero = m.scale + d, m.k16 = m.zero + d, m.v16 = m.k16 + d;
    m.codes = (uint8_t *)(m.v16 + d);
    m.more = base + quant_bytes(d, width);
    return m;
}
KI_DEV quant_shared carve_append(uint8_t *base, uint32_t d) {
    return carve(base, d, quant_width(d, APPEND_THREADS));
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

/* Rows as they are, for a side of 16 bits. */
KI_DEV void copy_rows(const quant_shared &m, const append_args &a, const range_job &job,
                      bool keys) {
    uint32_t d = a.l.head_dim;
    for (uint32_t pos = job.from; pos < job.to; pos++) {
        const uint16_t *rows = keys ? a.k_rows : a.v_rows, *row = keys ? m.k16 : m.v16;
        uint32_t t = pos % KI_PAGE_TOKENS;
        if (rows)
            row =
                rows + ((uint64_t)(job.seq->first_row + pos - job.seq->n_tokens) * a.l.n_kv_heads +
                        job.head) *
                           d;
        uint8_t *sub = job.page + a.l.head_bytes + t / KI_SUB_TOKENS * a.l.sub_bytes;
        put_exact_row(sub + (keys ? a.l.k_at : a.l.v_at), row, t % KI_SUB_TOKENS, d, keys);
    }
}

KI_DEV void close_plus_keys(const append_args &a, const range_job &job, const quant_shared &m) {
    plus_close &p = *(plus_close *)m.more;
    uint16_t *raw = (uint16_t *)(m.more + sizeof(plus_close));
    uint32_t d = a.l.head_dim, base = job.index * KI_PAGE_TOKENS;
    for (uint32_t b = 0; b < KI_SUBS; b++)
        stage_rows(raw + b * KI_SUB_TOKENS * d, a, job, base + b * 32, base + b * 32,
                   base + b * 32 + 32, true);
    __syncthreads();
    uint32_t sinks = a.l.sink_tokens > base ? a.l.sink_tokens - base : 0;
    if (sinks < KI_PAGE_TOKENS) close_plus_page(job.page, a.l, raw, m.codes, p, sinks);
}

KI_DEV void quantize_keys(const quant_shared &m, const append_args &a, const range_job &job) {
    uint32_t group = a.l.k_group;
    if (a.l.k_bits == 16) copy_rows(m, a, job, true);
    else if (a.l.is_plus) close_plus_keys(a, job, m);
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

/* ---- host calls ---- */

static append_args args_of(const ki_cuda_append_call *c) {
    append_args a = {};
    a.l = c->cache->layout;
    a.pool = c->cache->pool;
    a.tables = c->cache->tables;
    a.table_stride = c->cache->table_stride;
    a.seqs = c->cache->seqs;
    a.counters = c->cache->counters;
    a.layer = c->layer;
    a.q = c->q, a.k = c->k, a.v = c->v;
    a.q_stride = c->q_stride, a.k_stride = c->k_stride, a.v_stride = c->v_stride;
    a.type = c->type;
    a.rope = c->rope;
    a.q_out = c->q_out;
    a.k_rows = c->k_rows, a.v_rows = c->v_rows;
    a.row_flags = c->row_flags;
    a.n_parts = 1;
    return a;
}

static uint32_t plus_bytes(const ki_cuda_layout *l) {
    return l->is_plus ? sizeof(plus_close) + KI_PAGE_TOKENS * l->head_dim * 2 : 0;
}
/* Of a block that may close pages, and of one that appends a row and no more. */
static uint32_t shared_bytes(const ki_cuda_layout *l) {
    return quant_bytes(l->head_dim, quant_width(l->head_dim, APPEND_THREADS)) + plus_bytes(l);
}

#endif
