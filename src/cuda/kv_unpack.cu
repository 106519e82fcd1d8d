/* kv_unpack.cu: what is packed or in the 16-bit store as float16 rows, for attention of prompts.
 *
 * One thread block for a page of one sequence, KV head and side. A thread has eight neighbouring
 * channels, 16 bytes of a row, of the tokens whose codes stand in the same words: four of keys,
 * whose words are those of four lanes, and eight of values, whose words are those of eight. */
#include "kv_launch.h"
#include "kv_prompt.h"
#include "kv_rows.cuh"

struct unpack_args {
    ki_cuda_layout l;
    const uint8_t *pool;
    const uint32_t *tables;
    const ki_cuda_seq *seqs;
    uint16_t *scratch;
    ki_prompt_part part;
    uint32_t table_stride, layer, window, step_window, n_pages;
};

enum { UNPACK_THREADS = 256, NOT_WIDE = 255 };

/* 32 tokens of one side: the planes of a block of a page, or rows in 16 bit (all other planes are
 * not read). Tokens outside of [from, to) become 0. */
struct block_job {
    const uint32_t *plane, *third, *wide;
    const uint16_t *scale, *zero; /* of the block's key group(s), or of its values */
    const uint8_t *number;        /* of wide channels [D], else NOT_WIDE; NULL: no such plane */
    uint16_t *rows;               /* [32][D] */
    uint32_t from, to, k_group;
};

/* The float32 of a code: exact, without a conversion. */
KI_DEV float code_value(uint32_t code) { return __uint_as_float(0x4b000000 | code) - 8388608.0f; }

/* Eight halves of a row, or zeros. */
KI_DEV void put_eight(uint16_t *row, const uint32_t (&x)[4], bool is_of_use) {
    *(uint4 *)row = is_of_use ? make_uint4(x[0], x[1], x[2], x[3]) : make_uint4(0, 0, 0, 0);
}

/* Eight channels of tokens row, row + 8, + 16, + 24. */
template <int D, int BITS> KI_DEV void unpack_keys(const block_job &b, uint32_t unit) {
    constexpr uint32_t MASK = (1u << BITS % 32) - 1, d = D, steps = D / 16;
    uint32_t row = unit / (d / 8), c = unit % (d / 8) * 8;
    uint32_t high[8]; /* upper bits of wide channels, where the codes' own stand */
#pragma unroll
    for (uint32_t e = 0; e < 8; e++) {
        uint32_t w = BITS == 2 && b.number ? b.number[c + e] : (uint32_t)NOT_WIDE;
        high[e] = 0;
        if (w != NOT_WIDE) {
            ki_order_place p = ki_order_key(row, w, (d / 4 + 15) / 16, 2);
            high[e] = __ldg(b.wide + p.word) >> p.bit;
        }
    }
    float scale[8], zero[8];
#pragma unroll(BITS < 8 ? 4 : 1)
    for (uint32_t t = 0; t < KI_SUB_TOKENS; t += 8) {
        uint16_t *to = b.rows + (t + row) * d + c;
        /* groups of 16 tokens: the scales change half way */
        if (BITS < 16 && (t == 0 || (t == 16 && b.k_group == 16)))
#pragma unroll
            for (uint32_t e = 0; e < 8; e += 2) {
                uint32_t at = t / 16 * (b.k_group == 16) * d + ki_order_key_scale(c + e, steps);
                uint32_t s = __ldg((const uint32_t *)(b.scale + at));
                uint32_t z = __ldg((const uint32_t *)(b.zero + at));
                scale[e] = low_half(s), scale[e + 1] = high_half(s);
                zero[e] = low_half(z), zero[e + 1] = high_half(z);
            }
        uint32_t eight[4];
#pragma unroll
        for (uint32_t e = 0; e < 8; e += 2) {
            ki_order_place p = ki_order_key(t + row, c + e, steps, BITS);
            eight[e / 2] = __ldg(b.plane + p.word);
            if constexpr (BITS < 16) {
                float x[2];
#pragma unroll
                for (uint32_t h = 0; h < 2; h++) {
                    uint32_t code = eight[e / 2] >> (p.bit + 16 * h) & MASK;
                    /* from the place of row t = 0 to that of this one */
                    if (BITS == 2) code |= (high[e + h] >> (t / 16 * 8 + t % 16 / 8 * 4) & 3) << 2;
                    x[h] = fmaf(code_value(code), scale[e + h], zero[e + h]);
                }
                eight[e / 2] = pack2(x[0], x[1]);
            }
        }
        put_eight(to, eight, t + row >= b.from && t + row < b.to);
    }
}

/* Eight channels of tokens 2 u, 2 u + 1 (u: 0 .. 3) and those 8, 16 and 24 behind. */
template <int D, int BITS>
KI_DEV void unpack_values(const block_job &b, const ki_cuda_layout &l, uint32_t unit) {
    constexpr uint32_t MASK = (1u << BITS % 32) - 1, d = D, steps = D / 16;
    uint32_t u = unit / (d / 8), c = unit % (d / 8) * 8;
    float half = l.v_bits == 3 ? 3.5f : 1.5f;
    uint32_t group_at = c / l.v_group * KI_SUB_TOKENS;
#pragma unroll(BITS < 8 ? 4 : 1)
    for (uint32_t t8 = 0; t8 < KI_SUB_TOKENS; t8 += 8) {
        uint32_t t = t8 + 2 * u, words[8], thirds[8];
        float scale[2] = {}, zero[2] = {};
#pragma unroll
        for (uint32_t e = 0; e < 8; e++) {
            ki_order_place p = ki_order_value(t, c + e, steps, BITS);
            words[e] = __ldg(b.plane + p.word) >> p.bit, thirds[e] = 0;
            if (BITS != 2 || !b.third) continue;
            p = ki_order_value(t, c + e, steps, 1);
            thirds[e] = __ldg(b.third + p.word) >> p.bit;
        }
        if (BITS < 16) {
            uint32_t at = group_at + ki_order_value_scale(t);
            uint32_t s = __ldg((const uint32_t *)(b.scale + at));
            scale[0] = low_half(s), scale[1] = high_half(s);
            if (l.is_plus) { /* (code - half) scale: all of it exact */
                zero[0] = scale[0] * -half, zero[1] = scale[1] * -half;
            } else {
                uint32_t z = __ldg((const uint32_t *)(b.zero + at));
                zero[0] = low_half(z), zero[1] = high_half(z);
            }
        }
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            uint16_t *to = b.rows + (t + h) * d + c;
            uint32_t eight[4];
#pragma unroll
            for (uint32_t e = 0; e < 8; e += 2) {
                uint32_t low = words[e] >> 16 * h & MASK, high = words[e + 1] >> 16 * h & MASK;
                if constexpr (BITS == 16) eight[e / 2] = low | high << 16;
                else {
                    if (BITS == 2) low |= (thirds[e] >> 16 * h & 1) << 2;
                    if (BITS == 2) high |= (thirds[e + 1] >> 16 * h & 1) << 2;
                    eight[e / 2] = pack2(fmaf(code_value(low), scale[h], zero[h]),
                                         fmaf(code_value(high), scale[h], zero[h]));
                }
            }
            put_eight(to, eight, t + h >= b.from && t + h < b.to);
        }
    }
}

template <int D>
KI_DEV void unpack_unit(const block_job &b, const ki_cuda_layout &l, bool keys, uint32_t bits,
                        uint32_t unit) {
    if (keys) {
        if (bits == 2) unpack_keys<D, 2>(b, unit);
        else if (bits == 4) unpack_keys<D, 4>(b, unit);
        else if (bits == 8) unpack_keys<D, 8>(b, unit);
        else unpack_keys<D, 16>(b, unit);
    } else if (bits == 2) unpack_values<D, 2>(b, l, unit);
    else if (bits == 4) unpack_values<D, 4>(b, l, unit);
    else if (bits == 8) unpack_values<D, 8>(b, l, unit);
    else unpack_values<D, 16>(b, l, unit);
}

/* One page of a sequence's scratch. */
struct page_job {
    uint32_t head, pos;      /* pos: of the first token */
    uint32_t bits, from, to; /* tokens [from, to) of the page are of use */
    bool keys, is_coded;
};

KI_DEV block_job coded_block(const unpack_args &a, const page_job &job, const uint8_t *page,
                             const uint8_t *number, uint32_t block) {
    const ki_cuda_layout &l = a.l;
    const uint8_t *sub = page + l.head_bytes + block * l.sub_bytes;
    block_job b = {};
    b.plane = (const uint32_t *)(sub + (job.keys ? l.k_at : l.v_at));
    b.k_group = l.k_group;
    if (job.keys) {
        const uint8_t *base = l.head_bytes ? page : sub;
        uint32_t group = l.head_bytes ? block * KI_SUB_TOKENS / l.k_group : 0;
        b.scale = (const uint16_t *)(base + l.k_scale_at) + group * l.head_dim;
        b.zero = (const uint16_t *)(base + l.k_zero_at) + group * l.head_dim;
        b.wide = (const uint32_t *)(sub + l.wide_at);
        b.number = number;
    } else {
        b.scale = (const uint16_t *)(sub + l.v_scale_at);
        b.zero = (const uint16_t *)(sub + l.v_zero_at);
        b.third = l.v_bits == 3 ? (const uint32_t *)(sub + l.third_at) : NULL;
    }
    return b;
}

/* What the threads of a block share: in shared memory, which leaves them registers for words. */
struct page_shared {
    ki_cuda_seq seq;
    page_job job;
    block_job blocks[KI_SUBS];
    uint8_t numbers[256];
};

/* Numbers of wide channels of a page of keys. */
KI_DEV void list_wide(page_shared &m, const ki_cuda_layout &l, const uint8_t *page) {
    for (uint32_t c = threadIdx.x; c < l.head_dim; c += UNPACK_THREADS) m.numbers[c] = NOT_WIDE;
    __syncthreads();
    for (uint32_t w = threadIdx.x; w < l.head_dim / 4; w += UNPACK_THREADS)
        m.numbers[page[l.list_at + w]] = (uint8_t)w;
}

template <int D> KI_DEV void unpack_page(page_shared &m, const unpack_args &a, uint16_t *rows) {
    const ki_cuda_layout &l = a.l;
    const page_job &job = m.job;
    const uint8_t *page = NULL;
    constexpr uint32_t d = D;
    uint32_t units = job.keys ? d : d / 2, block = threadIdx.x;
    bool is_wide = job.is_coded && job.keys && l.is_plus && l.k_bits == 2;
    if (job.is_coded) {
        uint64_t id = a.tables[(uint64_t)m.seq.table * a.table_stride + job.pos / KI_PAGE_TOKENS];
        page =
            a.pool + id * l.id_bytes + ((uint64_t)a.layer * l.n_kv_heads + job.head) * l.page_bytes;
    }
    if (is_wide) list_wide(m, l, page);
    if (block < KI_SUBS) {
        uint32_t at = block * KI_SUB_TOKENS;
        block_job b = {};
        if (job.is_coded) b = coded_block(a, job, page, is_wide ? m.numbers : NULL, block);
        else
            b.plane = (const uint32_t *)exact_block(l, m.seq, a.layer, job.head,
                                                    job.pos / KI_SUB_TOKENS + block, !job.keys);
        b.rows = rows + at * d;
        b.from = job.from > at ? job.from - at : 0;
        b.to = job.to > at ? job.to - at : 0;
        m.blocks[block] = b;
    }
    __syncthreads();
    for (uint32_t k = threadIdx.x; k < KI_SUBS * units; k += UNPACK_THREADS)
        unpack_unit<D>(m.blocks[k / units], l, job.keys, job.bits, k % units);
}

/* Where page number `page` of a sequence's scratch comes from; false: nobody reads it. */
KI_DEV bool find_page(page_job *job, const unpack_args &a, const ki_cuda_seq &s, uint32_t page) {
    const ki_cuda_layout &l = a.l;
    ki_prompt_old old = ki_prompt_old_of(&l, &s, a.step_window);
    uint32_t at = page * KI_PAGE_TOKENS, coded = old.coded_end - old.coded_begin;
    uint32_t side = job->keys ? l.k_bits : l.v_bits, line = job->keys ? old.k_to : old.v_to;
    if (at >= ki_prompt_tokens(&old)) return false;
    job->is_coded = at >= old.sink_end && at < old.sink_end + coded;
    if (at < old.sink_end) job->pos = at;
    else if (job->is_coded) job->pos = old.coded_begin + at - old.sink_end;
    else job->pos = old.exact_begin + at - old.sink_end - coded;
    job->bits = job->is_coded && side != 3 ? side : job->is_coded ? 2 : 16;
    job->from = 0, job->to = KI_PAGE_TOKENS;
    uint32_t window = a.window, n = s.n_tokens;
    if (window && job->pos + KI_PAGE_TOKENS + window <= n + 1) return false; /* the layer's own */
    if (!job->is_coded) return side < 16;
    uint32_t sinks = side == 16 ? 0 : l.sink_tokens;
    job->from = sinks > job->pos ? sinks - job->pos : 0;
    job->to = line > job->pos ? line - job->pos : 0;
    return job->from < job->to && job->from < KI_PAGE_TOKENS;
}

template <int D>
static __global__ void __launch_bounds__(UNPACK_THREADS, 3)
    ki_unpack_kernel(const __grid_constant__ unpack_args a) {
    __shared__ page_shared m;
    uint32_t page = blockIdx.x % a.n_pages, rest = blockIdx.x / a.n_pages;
    uint32_t side = rest % 2, number = rest / 2 % a.part.n_heads, slot = rest / 2 / a.part.n_heads;
    bool is_read = false;
    ki_pdl_wait();
    ki_pdl_launch();
    if (threadIdx.x == 0) {
        m.seq = a.seqs[a.part.first_seq + slot];
        m.job.head = a.part.first_head + number, m.job.keys = side == 0;
        if (m.seq.n_rows && !(m.seq.flags & KI_CUDA_ELSEWHERE))
            is_read = find_page(&m.job, a, m.seq, page);
    }
    if (!__syncthreads_or(is_read)) return;
    uint64_t at = ((uint64_t)number * 2 + side) * a.part.head_tokens + m.seq.scratch_at +
                  page * KI_PAGE_TOKENS;
    unpack_page<D>(m, a, a.scratch + at * a.l.head_dim);
}

kivi_status ki_cuda_prompt_unpack(const ki_cuda_attend_call *c, const ki_prompt_part *part,
                                  uint32_t step_window, void *stream, kivi_error *err) {
    unpack_args a = {};
    if (!part->max_tokens) return KIVI_OK;
    a.l = c->cache->layout;
    a.pool = c->cache->pool;
    a.tables = c->cache->tables, a.table_stride = c->cache->table_stride;
    a.seqs = c->cache->seqs;
    a.scratch = (uint16_t *)c->workspace;
    a.part = *part;
    a.layer = c->layer, a.window = c->window, a.step_window = step_window;
    a.n_pages = part->max_tokens / KI_PAGE_TOKENS;
    uint32_t n_blocks = part->n_seqs * part->n_heads * 2 * a.n_pages;
    auto kernel = ki_unpack_kernel<128>;
    switch (a.l.head_dim) {
    case 64: kernel = ki_unpack_kernel<64>; break;
    case 80: kernel = ki_unpack_kernel<80>; break;
    case 96: kernel = ki_unpack_kernel<96>; break;
    case 256: kernel = ki_unpack_kernel<256>; break;
    }
    return ki_cuda_check(ki_launch(kernel, n_blocks, UNPACK_THREADS, 0, c->pdl, stream, a),
                         "rows of old tokens", err);
}
