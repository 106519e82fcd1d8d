/* kv_append_row.cu: decoding, one new row a sequence. Rows and the values that fall behind the line
 * are a warp's work each, in registers: no barriers, no shared memory that would keep the next
 * kernel's thread blocks out.
 *
 * ki_row_kernel, in every layer, does what attention waits for: rope, the turn of plus values, the
 * row into the 16-bit store. ki_values_kernel, once a step for all layers, does what the next step
 * reads first: the value that left the window becomes codes (attention of this step still reads it
 * in 16 bit). */
#include "kv_append.cuh"
#include "kv_row.cuh"
#include "pdl.cuh"

enum { ROW_WARPS = 4, ROW_THREADS = 32 * ROW_WARPS };

/* ---- a new row ---- */

template <int D> KI_DEV const float *rope_of(const append_args &a, uint32_t row) {
    return a.rope ? a.rope + (uint64_t)row * D : NULL;
}

template <int D, bool WIDE>
KI_DEV void rotate_query(const append_args &a, uint32_t row, uint32_t head, uint32_t lane) {
    row_check ignored = {};
    half_rows<D, WIDE> q;
    q.load(a.q, (uint64_t)row * a.q_stride + head * D, rope_of<D>(a, row), lane);
    q.rotate(a.type, a.rope, &ignored, lane);
    uint16_t *to = a.q_out + ((uint64_t)row * a.l.n_heads + head) * D;
    q.store(lane, [&](uint32_t c, uint32_t two) { *(uint32_t *)(to + c) = two; });
}

KI_DEV row_place place_row(const append_args &a, const ki_cuda_seq &s, uint32_t head) {
    const ki_cuda_layout &l = a.l;
    uint32_t pos = s.n_tokens, block = pos / KI_SUB_TOKENS;
    row_place p = {NULL, NULL, pos % KI_SUB_TOKENS};
    if (l.k_bits < 16) p.keys = exact_block(l, s, a.layer, head, block, 0);
    if (l.v_bits < 16) p.values = exact_block(l, s, a.layer, head, block, 1);
    if (p.keys && p.values) return p;
    uint8_t *sub =
        page_of(a, s, pos / KI_PAGE_TOKENS, head) + l.head_bytes + block % KI_SUBS * l.sub_bytes;
    if (!p.keys) p.keys = sub + l.k_at;
    if (!p.values) p.values = sub + l.v_at;
    return p;
}

template <int D, bool WIDE>
KI_DEV void append_kv(const append_args &a, const row_place &place, uint32_t row, uint32_t head,
                      uint32_t lane) {
    kv_row<D, WIDE> kv;
    kv.load(a.k, (uint64_t)row * a.k_stride + head * D, a.v, (uint64_t)row * a.v_stride + head * D,
            rope_of<D>(a, row), lane);
    row_check check = kv.finish(a.type, a.rope, a.l.is_plus, lane);
    kv.put(place, lane);
    report_row(check, a.counters, a.row_flags ? a.row_flags + row : NULL, lane);
}

/* A warp a (sequence, KV head), and a warp a query head behind them. */
template <int D, bool WIDE>
static __global__ void __launch_bounds__(ROW_THREADS)
    ki_row_kernel(const __grid_constant__ append_args a, uint32_t n_seqs, uint32_t n_queries) {
    uint32_t lane = threadIdx.x % 32, index = blockIdx.x * ROW_WARPS + threadIdx.x / 32;
    uint32_t each = a.l.n_kv_heads + n_queries, slot = index / each, head = index % each;
    bool is_kv = head < a.l.n_kv_heads, is_here = slot < n_seqs;
    ki_cuda_seq s = {};
    row_place place = {};
    if (is_here) s = a.seqs[slot];
    is_here = is_here && s.n_rows == 1;
    if (is_here && is_kv) place = place_row(a, s, head);
    ki_pdl_wait();
    ki_pdl_launch();
    if (!is_here) return;
    if (is_kv) append_kv<D, WIDE>(a, place, s.first_row, head, lane);
    else rotate_query<D, WIDE>(a, s.first_row, head - a.l.n_kv_heads, lane);
}

/* ---- the value that leaves the window ---- */

/* A lane has channels c and c + 8 of a tile, c = k / 8 * 16 + k % 8, k = lane + 32 m: two that
 * share a word of every plane. */
template <int D> struct value_row {
    static constexpr int N = (D / 2 + 31) / 32;
    /* Shared memory of a warp: groups stand a bank's width apart. */
    static constexpr int SPREAD = D + D / 16 * 4;
    uint16_t x[N][2];
    uint32_t codes[N][2];
    uint32_t words[N]; /* of the code plane, with other tokens' codes */

    KI_DEV_MEMBER uint32_t channel(int m, uint32_t lane) {
        uint32_t k = lane + 32 * m;
        return k / 8 * 16 + k % 8;
    }
    __device__ __forceinline__ void load(const uint8_t *block, uint32_t t, uint32_t lane) {
#pragma unroll
        for (int m = 0; m < N; m++) {
            uint32_t c = channel(m, lane);
            x[m][0] = x[m][1] = 0;
            if (c >= D) continue;
            ki_order_place p = ki_order_value(t, c, D / 16, 16);
            uint2 two = *(const uint2 *)(block + p.word * 4); /* c + 8 is in the next word */
            x[m][0] = (uint16_t)(two.x >> p.bit), x[m][1] = (uint16_t)(two.y >> p.bit);
        }
    }
    /* With the row, not behind it: one trip to memory for both. */
    __device__ __forceinline__ void load_words(const uint8_t *plane, uint32_t bits, uint32_t t,
                                               uint32_t lane) {
#pragma unroll
        for (int m = 0; m < N; m++) {
            uint32_t c = channel(m, lane);
            if (c < D)
                words[m] = ((const uint32_t *)plane)[ki_order_value(t, c, D / 16, bits).word];
        }
    }
    /* Least of each group of the lane's channels (by less) in r[m]. */
    template <class F> __device__ __forceinline__ void reduce(float (&r)[N], uint32_t group, F f) {
#pragma unroll
        for (uint32_t o = 1; o < 32; o *= 2)
            if (o < group / 2)
#pragma unroll
                for (int m = 0; m < N; m++) r[m] = f(r[m], __shfl_xor_sync(~0u, r[m], o));
        if (N > 1 && group > 64)
#pragma unroll
            for (int m = 0; m + 1 < N; m += 2) r[m] = r[m + 1] = f(r[m], r[m + 1]);
    }
};

/* Section 2 of DESIGN.md. */
template <int D>
KI_DEV void quantize_row(value_row<D> &v, const ki_cuda_layout &l, uint8_t *sub, uint32_t t,
                         uint32_t lane) {
    constexpr int N = value_row<D>::N;
    float low[N], high[N], levels = (float)((1u << l.v_bits) - 1);
#pragma unroll
    for (int m = 0; m < N; m++) {
        low[m] = fminf(f16_value(v.x[m][0]), f16_value(v.x[m][1]));
        high[m] = fmaxf(f16_value(v.x[m][0]), f16_value(v.x[m][1]));
    }
    v.reduce(low, l.v_group, [](float a, float b) { return fminf(a, b); });
    v.reduce(high, l.v_group, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int m = 0; m < N; m++) {
        uint32_t c = value_row<D>::channel(m, lane);
        uint16_t scale, zero;
        range_scale(&scale, &zero, low[m], high[m], levels);
        float sf = f16_value(scale), zf = f16_value(zero), inverse = sf == 0 ? 0 : __frcp_rn(sf);
#pragma unroll
        for (int i = 0; i < 2; i++)
            v.codes[m][i] = (uint32_t)code_by(f16_value(v.x[m][i]), sf, inverse, zf, levels);
        if (c >= D || c % l.v_group) continue;
        uint32_t at = c / l.v_group * KI_SUB_TOKENS + ki_order_value_scale(t);
        ((uint16_t *)(sub + l.v_scale_at))[at] = scale;
        ((uint16_t *)(sub + l.v_zero_at))[at] = zero;
    }
}

/* The squared errors of one candidate, from channel to channel. x: a group's in shared memory. */
KI_DEV float plus_error(const float *x, uint32_t group, float scale, float half) {
    float sum = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < group; i++) {
        float code = plus_value_code(x[i], scale, half);
        float e = __fsub_rn(x[i], __fmul_rn(__fsub_rn(code, half), scale));
        sum = __fadd_rn(sum, __fmul_rn(e, e));
    }
    return sum;
}

/* The same of two bits without a code. Values are -1.5, -.5, .5, 1.5 scales, products that a
 * float32 holds, and of the two on its side an x takes the nearer one: at the middle between them
 * errors are the same, and rounding keeps their order. So the lesser error is the code's. Only
 * where x is negative and x / scale + 1.5 rounds to 1.5 does its code lie on the other side: not
 * for is_tiny's. */
KI_DEV float plus_error_of_two_bits(const float *x, uint32_t group, float scale) {
    float sum = 0, near = 0.5f * scale, far = 1.5f * scale;
#pragma unroll 4
    for (uint32_t i = 0; i < group; i += 4) {
        float4 four = *(const float4 *)(x + i);
        const float y[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float e =
                fminf(fabsf(__fsub_rn(fabsf(y[k]), near)), fabsf(__fsub_rn(fabsf(y[k]), far)));
            sum = __fadd_rn(sum, __fmul_rn(e, e));
        }
    }
    return sum;
}

/* No candidate's scale is larger than the group's largest x; 2^-24 of it is half a step at 1.5. */
KI_DEV bool is_tiny(float x, float largest) { return x < 0 && -x <= __fmul_rn(largest, 0x1p-24f); }

struct search_shared { /* of a warp */
    float *x;          /* [groups][G + 4] */
    float *largest;    /* [groups] */
    uint16_t *scale;   /* [groups] */
};

/* Section 11: of each group the best of 14 scales into s.scale, half a warp a group, a lane a
 * scale. */
template <int D>
KI_DEV void search_scales(const search_shared &s, const ki_cuda_layout &l, bool any_tiny,
                          float half, uint32_t lane) {
    uint32_t group = l.v_group, n_groups = D / group, k = lane % 16 < 14 ? lane % 16 : 0;
    for (uint32_t first = 0; first < n_groups; first += 2) {
        uint32_t g = first + lane / 16;
        bool is_here = g < n_groups;
        g = is_here ? g : first;
        uint16_t mine = f16_up(__fmul_rn(__fdiv_rn(s.largest[g], half), plus_value_step(k)));
        float scale = f16_value(mine), least;
        const float *x = s.x + g * (group + 4);
        if (half == 1.5f && !any_tiny) least = plus_error_of_two_bits(x, group, scale);
        else least = plus_error(x, group, scale, half);
        uint32_t best = lane % 16 | (uint32_t)mine << 16;
        if (lane % 16 >= 14) least = INFINITY;
#pragma unroll
        for (int o = 1; o < 16; o *= 2) { /* the first one of equals */
            float other = __shfl_xor_sync(~0u, least, o);
            uint32_t other_best = __shfl_xor_sync(~0u, best, o);
            bool takes = other < least || (other == least && (other_best & 15) < (best & 15));
            if (takes) least = other, best = other_best;
        }
        if (lane % 16 == 0 && is_here) s.scale[g] = (uint16_t)(best >> 16);
    }
    __syncwarp();
}

template <int D>
KI_DEV void quantize_plus_row(value_row<D> &v, const search_shared &s, const ki_cuda_layout &l,
                              uint8_t *sub, uint32_t t, uint32_t lane) {
    constexpr int N = value_row<D>::N;
    uint32_t group = l.v_group;
    float largest[N], half = l.v_bits == 2 ? 1.5f : 3.5f;
    bool any_tiny = false;
#pragma unroll
    for (int m = 0; m < N; m++)
        largest[m] = fmaxf(fabsf(f16_value(v.x[m][0])), fabsf(f16_value(v.x[m][1])));
    v.reduce(largest, group, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int m = 0; m < N; m++) {
        uint32_t c = value_row<D>::channel(m, lane);
        if (c >= D) continue;
        uint32_t at = c / group * (group + 4) + c % group;
        float x = f16_value(v.x[m][0]), y = f16_value(v.x[m][1]);
        s.x[at] = x, s.x[at + 8] = y;
        any_tiny |= is_tiny(x, largest[m]) || is_tiny(y, largest[m]);
        if (c % group == 0) s.largest[c / group] = largest[m];
    }
    any_tiny = __any_sync(~0u, any_tiny);
    __syncwarp();
    search_scales<D>(s, l, any_tiny, half, lane);
#pragma unroll
    for (int m = 0; m < N; m++) {
        uint32_t c = value_row<D>::channel(m, lane);
        v.codes[m][0] = v.codes[m][1] = 0;
        if (c >= D) continue;
        uint16_t scale = s.scale[c / group];
#pragma unroll
        for (int i = 0; i < 2; i++)
            v.codes[m][i] = (uint32_t)plus_value_code(f16_value(v.x[m][i]), f16_value(scale), half);
        if (c % group == 0)
            ((uint16_t *)(sub +
                          l.v_scale_at))[c / group * KI_SUB_TOKENS + ki_order_value_scale(t)] =
                scale;
    }
}

/* Of the plane of codes; three-bit ones have a plane of their own for the third. */
KI_DEV uint32_t code_bits(const ki_cuda_layout &l) { return l.v_bits == 3 ? 2 : l.v_bits; }

/* The codes of one token into its words; no other thread has a part in them. */
template <int D>
KI_DEV void put_codes(const value_row<D> &v, const ki_cuda_layout &l, uint8_t *sub, uint32_t t,
                      uint32_t lane) {
    uint32_t bits = code_bits(l), mask = (1u << bits) - 1;
#pragma unroll
    for (int m = 0; m < value_row<D>::N; m++) {
        uint32_t c = value_row<D>::channel(m, lane);
        if (c >= D) continue;
        ki_order_place low = ki_order_value(t, c, D / 16, bits);
        ki_order_place high = ki_order_value(t, c + 8, D / 16, bits);
        uint32_t *word = (uint32_t *)(sub + l.v_at) + low.word;
        uint32_t two = (v.codes[m][0] & mask) << low.bit | (v.codes[m][1] & mask) << high.bit;
        *word = (v.words[m] & ~(mask << low.bit | mask << high.bit)) | two;
    }
    if (l.v_bits != 3) return;
        /* a word of third bits has two tiles of channels: the lane of the first writes both */
#pragma unroll
    for (int m = 0; m < value_row<D>::N; m++) {
        uint32_t c = value_row<D>::channel(m, lane), mine = 0, keep = 0;
        ki_order_place low = ki_order_value(t, c, D / 16, 1);
        ki_order_place high = ki_order_value(t, c + 8, D / 16, 1);
        if (c < D) {
            keep = 1u << low.bit | 1u << high.bit;
            mine = (v.codes[m][0] >> 2) << low.bit | (v.codes[m][1] >> 2) << high.bit;
        }
        mine |= __shfl_xor_sync(~0u, mine, 8), keep |= __shfl_xor_sync(~0u, keep, 8);
        if (c >= D || c / 16 % 2) continue;
        uint32_t *word = (uint32_t *)(sub + l.third_at) + low.word;
        *word = (*word & ~keep) | mine;
    }
}

/* Values of n_layers layers from a.layer on, a warp each. What it reads was written in earlier
 * steps, and yet it waits first: with its work before the wait and the product before it let in
 * early, too, one step in some hundred had other logits (SPEED.md, "Not the same bits"). */
template <int D>
static __global__ void __launch_bounds__(ROW_THREADS)
    ki_values_kernel(const __grid_constant__ append_args args, uint32_t n_seqs, uint32_t n_layers) {
    __shared__ __align__(16) float x[ROW_WARPS][value_row<D>::SPREAD];
    __shared__ float largest[ROW_WARPS][D / 16];
    __shared__ uint16_t scale[ROW_WARPS][D / 16];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t index = blockIdx.x * ROW_WARPS + warp;
    append_args a = args;
    const ki_cuda_layout &l = args.l;
    uint32_t head = index % l.n_kv_heads, rest = index / l.n_kv_heads, slot = rest % n_seqs;
    ki_pdl_wait();
    ki_pdl_launch();
    ki_cuda_seq s = {};
    a.layer = args.layer + rest / n_seqs;
    if (rest / n_seqs < n_layers) s = a.seqs[slot];
    uint32_t pos = s.n_tokens - l.residual_tokens, t = pos % KI_SUB_TOKENS;
    bool is_here = s.n_rows == 1 && s.n_tokens >= l.residual_tokens && pos >= l.sink_tokens;
    if (is_here) {
        uint8_t *sub = page_of(a, s, pos / KI_PAGE_TOKENS, head) + l.head_bytes +
                       pos % KI_PAGE_TOKENS / KI_SUB_TOKENS * l.sub_bytes;
        value_row<D> v;
        v.load(exact_block(l, s, a.layer, head, pos / KI_SUB_TOKENS, 1), t, lane);
        v.load_words(sub + l.v_at, code_bits(l), t, lane);
        const search_shared own = {x[warp], largest[warp], scale[warp]};
        if (l.is_plus) quantize_plus_row<D>(v, own, l, sub, t, lane);
        else quantize_row<D>(v, l, sub, t, lane);
        put_codes<D>(v, l, sub, t, lane);
    }
}

/* ---- host calls ---- */

static kivi_status no_kernel(const ki_cuda_layout *l, kivi_error *err) {
    return KI_FAIL(err, UNSUPPORTED, "cuda: no append kernel for head size %u", l->head_dim);
}

kivi_status ki_cuda_append_rows(const ki_cuda_append_call *c, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    append_args a = args_of(c);
    uint32_t n_seqs = c->cache->n_seqs, n_queries = c->q ? l->n_heads : 0;
    bool is_wide = c->type == KI_CUDA_F32;
    auto launch = [&](void (*kernel)(append_args, uint32_t, uint32_t)) {
        uint32_t n = n_seqs * (l->n_kv_heads + n_queries);
        KI_TRY(ki_cuda_check(ki_share_multiprocessors(kernel), "append", err));
        return ki_cuda_check(ki_launch(kernel, (n + ROW_WARPS - 1) / ROW_WARPS, ROW_THREADS, 0,
                                       c->pdl, stream, a, n_seqs, n_queries),
                             "append", err);
    };
    switch (l->head_dim) {
    case 64: return launch(is_wide ? ki_row_kernel<64, true> : ki_row_kernel<64, false>);
    case 80: return launch(is_wide ? ki_row_kernel<80, true> : ki_row_kernel<80, false>);
    case 96: return launch(is_wide ? ki_row_kernel<96, true> : ki_row_kernel<96, false>);
    case 128: return launch(is_wide ? ki_row_kernel<128, true> : ki_row_kernel<128, false>);
    case 256: return launch(is_wide ? ki_row_kernel<256, true> : ki_row_kernel<256, false>);
    default: return no_kernel(l, err);
    }
}

kivi_status ki_cuda_code_values(const ki_cuda_append_call *c, uint32_t n_layers, void *stream,
                                kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    append_args a = args_of(c);
    uint32_t n_seqs = c->cache->n_seqs;
    if (l->v_bits == 16) return KIVI_OK;
    auto launch = [&](void (*kernel)(append_args, uint32_t, uint32_t)) {
        uint32_t n = n_seqs * n_layers * l->n_kv_heads;
        KI_TRY(ki_cuda_check(ki_share_multiprocessors(kernel), "codes of values", err));
        return ki_cuda_check(ki_launch(kernel, (n + ROW_WARPS - 1) / ROW_WARPS, ROW_THREADS, 0,
                                       c->pdl, stream, a, n_seqs, n_layers),
                             "codes of values", err);
    };
    switch (l->head_dim) {
    case 64: return launch(ki_values_kernel<64>);
    case 80: return launch(ki_values_kernel<80>);
    case 96: return launch(ki_values_kernel<96>);
    case 128: return launch(ki_values_kernel<128>);
    case 256: return launch(ki_values_kernel<256>);
    default: return no_kernel(l, err);
    }
}

kivi_status ki_cuda_close(const ki_cuda_append_call *c, uint32_t n_layers, void *stream,
                          kivi_error *err) {
    KI_TRY(ki_cuda_code_values(c, n_layers, stream, err));
    return ki_cuda_close_keys(c, n_layers, stream, err);
}

kivi_status ki_cuda_append(const ki_cuda_append_call *c, void *stream, kivi_error *err) {
    KI_TRY(ki_cuda_append_rows(c, stream, err));
    return ki_cuda_close(c, 1, stream, err);
}
