/* kv_quant.cuh: the quantizers of quant.h and plus.h on the device, one thread block at a time, to
 * the CPU's bytes: true division, every operation rounded by itself.
 *
 * Rows come as float16 in shared memory, raw [tokens][D] from the first token of a block of 32 on;
 * codes go through shared memory [32][D] and into words from there. */
#ifndef KI_KV_QUANT_CUH
#define KI_KV_QUANT_CUH
#include "kv_rows.cuh"
#include "kv_shared.h"

KI_DEV float f16_value(uint16_t h) { return __half2float(__ushort_as_half(h)); }
KI_DEV uint16_t f16_near(float x) { return __half_as_ushort(__float2half_rn(x)); }
/* The smallest float16 >= a, for a >= 0. */
KI_DEV uint16_t f16_up(float a) {
    uint16_t h = f16_near(a);
    return f16_value(h) < a ? (uint16_t)(h + 1) : h;
}
/* The largest float16 <= a. */
KI_DEV uint16_t f16_down(float a) {
    uint16_t h = f16_near(__fadd_rn(a, 0.0f));
    if (!(f16_value(h) > a)) return h;
    return (h & 0x7fff) == 0 ? 0x8001 : (uint16_t)(h & 0x8000 ? h + 1 : h - 1);
}
/* NaN becomes 0: codes stay within their bits whatever comes. */
KI_DEV float clamp_code(float q, float levels) { return fminf(fmaxf(q, 0.0f), levels); }

/* rint(d / scale + half), divided truly. A product with the reciprocal is within 2^-22 of the
 * quotient, so it rounds to the same integer unless it lies that near to the middle between two;
 * only then is it worth a division. Above 255 any result does: it is clamped. */
KI_DEV float rounded_quotient(float d, float scale, float inverse, float half) {
    float q = __fadd_rn(__fmul_rn(d, inverse), half), k = rintf(q);
    if (fabsf(fabsf(q - k) - 0.5f) > 0x1p-10f) return k;
    return rintf(__fadd_rn(__fdiv_rn(d, scale), half));
}

KI_DEV float code_of(float x, float scale, float zero, float levels) {
    if (scale == 0) return 0;
    return clamp_code(rounded_quotient(__fsub_rn(x, zero), scale, __frcp_rn(scale), 0), levels);
}
/* The same where a reciprocal serves many; inverse is 0 where scale is. */
KI_DEV float code_by(float x, float scale, float inverse, float zero, float levels) {
    if (scale == 0) return 0;
    return clamp_code(rounded_quotient(__fsub_rn(x, zero), scale, inverse, 0), levels);
}
/* zero and scale of a range of values (quant.h). */
KI_DEV void range_scale(uint16_t *scale, uint16_t *zero, float low, float high, float levels) {
    low = __fadd_rn(low, 0.0f); /* -0 becomes +0 */
    *zero = f16_near(low);
    *scale = f16_up(__fdiv_rn(__fadd_rn(__fsub_rn(high, low), 0.0f), levels));
}

/* Words of one plane of a block from codes [32][stride] u8 of tokens [from, to): other tokens' bits
 * stay. shift: how many low bits of a code belong to another plane. */
template <int BITS>
KI_DEV void pack_plane(uint32_t *plane, const uint8_t *codes, uint32_t stride, uint32_t n_steps,
                       bool keys, uint32_t from, uint32_t to, uint32_t shift) {
    constexpr uint32_t MASK = (1u << BITS) - 1;
    uint32_t n = ki_order_words(n_steps, BITS);
    bool is_whole = from == 0 && to == KI_SUB_TOKENS;
    for (uint32_t k = threadIdx.x; k < n * 32; k += blockDim.x) {
        uint32_t lane = k % 32, w = k / 32, word = 0, keep = 0;
#pragma unroll
        for (uint32_t e = 0; e < 32 / BITS; e++) {
            ki_order_element at = ki_order_at(w, e, lane, BITS);
            uint32_t t = at.i * 16 + (keys ? at.row : at.col);
            uint32_t c = at.j * 16 + (keys ? at.col : at.row);
            bool is_here = is_whole || (t >= from && t < to);
            if (!is_here) keep |= MASK << e * BITS;
            else if (BITS != 1 || at.j < n_steps)
                word |= (codes[t * stride + c] >> shift & MASK) << e * BITS;
        }
        uint32_t *p = plane + ki_order_word_at(w, n, lane, keys);
        if (keep != ~0u) *p = keep ? (*p & keep) | word : word;
    }
}
KI_DEV void pack_block(uint32_t *plane, const uint8_t *codes, uint32_t stride, uint32_t n_steps,
                       uint32_t bits, bool keys, uint32_t from, uint32_t to, uint32_t shift) {
    if (bits == 2) pack_plane<2>(plane, codes, stride, n_steps, keys, from, to, shift);
    else if (bits == 4) pack_plane<4>(plane, codes, stride, n_steps, keys, from, to, shift);
    else if (bits == 8) pack_plane<8>(plane, codes, stride, n_steps, keys, from, to, shift);
    else pack_plane<1>(plane, codes, stride, n_steps, keys, from, to, shift);
}

/* ---- keys ---- */

/* Least and largest of one channel over tokens [from, to) of raw. */
KI_DEV void channel_range(float *low, float *high, const uint16_t *raw, uint32_t d, uint32_t c,
                          uint32_t from, uint32_t to) {
    for (uint32_t t = from; t < to; t++) {
        float x = f16_value(raw[t * d + c]);
        *low = fminf(*low, x);
        *high = fmaxf(*high, x);
    }
}

/* ---- values ---- */

/* One row by one warp: codes [D] u8 and scales into the block's planes at token t. */
KI_DEV void quantize_value(uint8_t *codes, uint8_t *sub, const ki_cuda_layout &l,
                           const uint16_t *row, uint32_t t, uint32_t lane) {
    constexpr int MAX = 256 / 32;
    float low[MAX], high[MAX], levels = (float)((1u << l.v_bits) - 1);
    uint32_t width = min(l.v_group, 32u);
#pragma unroll
    for (int k = 0; k < MAX; k++) {
        uint32_t c = k * 32 + lane;
        low[k] = c < l.head_dim ? f16_value(row[c]) : 0;
        high[k] = low[k];
        if (k * 32 >= (int)l.head_dim) continue;
        for (uint32_t x = 1; x < width; x *= 2) {
            low[k] = fminf(low[k], __shfl_xor_sync(~0u, low[k], x));
            high[k] = fmaxf(high[k], __shfl_xor_sync(~0u, high[k], x));
        }
    }
#pragma unroll
    for (int x = 1; x < 4; x *= 2)
        if (l.v_group >= 64u * x)
#pragma unroll
            for (int k = 0; k < MAX; k++)
                if (!(k & x)) {
                    low[k] = low[k + x] = fminf(low[k], low[k + x]);
                    high[k] = high[k + x] = fmaxf(high[k], high[k + x]);
                }
#pragma unroll
    for (int k = 0; k < MAX; k++) {
        uint32_t c = k * 32 + lane;
        if (c >= l.head_dim) continue;
        uint16_t scale, zero;
        range_scale(&scale, &zero, low[k], high[k], levels);
        codes[c] = (uint8_t)code_of(f16_value(row[c]), f16_value(scale), f16_value(zero), levels);
        if (c % l.v_group) continue;
        uint32_t at = c / l.v_group * KI_SUB_TOKENS + ki_order_value_scale(t);
        ((uint16_t *)(sub + l.v_scale_at))[at] = scale;
        ((uint16_t *)(sub + l.v_zero_at))[at] = zero;
    }
}

/* ---- plus kinds (plus.h) ---- */

KI_DEV float plus_value_step(uint32_t k) { /* 1, .95, .90, ... as the decimal fractions round */
    return __fdiv_rn((float)(20 - k), 20.0f);
}
KI_DEV float plus_key_step(uint32_t k) {
    const float steps[5] = {1, .93f, .86f, .79f, .72f};
    return steps[k];
}

KI_DEV float plus_value_code(float x, float scale, float half) {
    if (scale == 0) return 0;
    return clamp_code(rounded_quotient(x, scale, __frcp_rn(scale), half), 2 * half);
}

/* One group of values by half a warp: each of 14 lanes tries one scale. Returns the best. */
KI_DEV uint16_t plus_value_scale(const uint16_t *row, uint32_t group, float half, uint32_t lane) {
    float largest = 0;
    for (uint32_t i = lane; i < group; i += 16) largest = fmaxf(largest, fabsf(f16_value(row[i])));
    for (int x = 8; x; x /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, x));
    float step = plus_value_step(lane < 14 ? lane : 0), sum = 0;
    uint16_t mine = f16_up(__fmul_rn(__fdiv_rn(largest, half), step));
    float scale = f16_value(mine);
#pragma unroll 4
    for (uint32_t i = 0; i < group; i++) {
        float x = f16_value(row[i]);
        float d = __fsub_rn(x, __fmul_rn(__fsub_rn(plus_value_code(x, scale, half), half), scale));
        sum = __fadd_rn(sum, __fmul_rn(d, d));
    }
    uint32_t best = 0;
    float least = __shfl_sync(~0u, sum, 0, 16);
    for (uint32_t k = 1; k < 14; k++) {
        float other = __shfl_sync(~0u, sum, k, 16);
        if (other < least) least = other, best = k;
    }
    return (uint16_t)__shfl_sync(~0u, (uint32_t)mine, best, 16);
}

/* One row by one warp, two groups at a time. */
KI_DEV void quantize_plus_value(uint8_t *codes, uint8_t *sub, const ki_cuda_layout &l,
                                const uint16_t *row, uint32_t t, uint32_t lane) {
    float half = l.v_bits == 2 ? 1.5f : 3.5f;
    uint32_t n_groups = l.head_dim / l.v_group;
    for (uint32_t first = 0; first < n_groups; first += 2) {
        uint32_t g = first + lane / 16;
        bool is_there = g < n_groups;
        const uint16_t *x = row + (is_there ? g : first) * l.v_group;
        uint16_t scale = plus_value_scale(x, l.v_group, half, lane % 16);
        if (!is_there) continue;
        for (uint32_t i = lane % 16; i < l.v_group; i += 16)
            codes[g * l.v_group + i] =
                (uint8_t)plus_value_code(f16_value(x[i]), f16_value(scale), half);
        if (lane % 16 == 0)
            ((uint16_t *)(sub + l.v_scale_at))[g * KI_SUB_TOKENS + ki_order_value_scale(t)] = scale;
    }
}

typedef ki_plus_close plus_close;

KI_DEV void plus_choose(plus_close &p, uint32_t d, bool with_wide) {
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        uint32_t before = 0, mine = __float_as_uint(p.spread[c]);
        for (uint32_t o = 0; o < d; o++) {
            uint32_t other = __float_as_uint(p.spread[o]);
            before += other > mine || (other == mine && o < c);
        }
        p.is_wide[c] = with_wide && before < d / 4;
    }
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        uint32_t n = 0;
        for (uint32_t o = 0; o < c; o++) n += p.is_wide[o];
        p.number[c] = (uint8_t)n;
    }
}

/* Candidate k of a narrow channel, with its error. */
KI_DEV void plus_try(plus_close &p, const uint16_t *raw, uint32_t d, uint32_t c, uint32_t k,
                     uint32_t n_sinks) {
    float low = p.low[c], high = p.high[c], a = plus_key_step(k), sum = 0;
    float mid = __fdiv_rn(__fadd_rn(low, high), 2.0f);
    uint16_t z = f16_down(__fadd_rn(mid, __fmul_rn(__fsub_rn(low, mid), a)));
    float hi = __fadd_rn(mid, __fmul_rn(__fsub_rn(high, mid), a));
    uint16_t s = f16_up(__fdiv_rn(__fsub_rn(hi, f16_value(z)), 3.0f));
    float zero = f16_value(z), scale = f16_value(s), inverse = scale == 0 ? 0 : __frcp_rn(scale);
#pragma unroll 4
    for (uint32_t t = n_sinks; t < KI_PAGE_TOKENS; t++) {
        float x = f16_value(raw[t * d + c]);
        float value = __fadd_rn(__fmul_rn(code_by(x, scale, inverse, zero, 3), scale), zero);
        float e = __fsub_rn(x, value);
        sum = __fadd_rn(sum, __fmul_rn(e, e));
    }
    p.error[k][c] = sum;
    p.scale[k][c] = s;
    p.zero[k][c] = z;
}

KI_DEV void plus_scales(plus_close &p, const uint16_t *raw, uint32_t d, uint32_t bits,
                        uint32_t n_sinks) {
    for (uint32_t k = threadIdx.x; k < 5 * d; k += blockDim.x)
        if (bits == 2 && !p.is_wide[k % d]) plus_try(p, raw, d, k % d, k / d, n_sinks);
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        if (bits == 4 || p.is_wide[c]) {
            p.zero[0][c] = f16_near(p.low[c]);
            p.scale[0][c] = f16_up(__fdiv_rn(__fsub_rn(p.high[c], p.low[c]), 15.0f));
            continue;
        }
        uint32_t best = 0;
        for (uint32_t k = 1; k < 5; k++)
            if (p.error[k][c] < p.error[best][c]) best = k;
        p.zero[0][c] = p.zero[best][c];
        p.scale[0][c] = p.scale[best][c];
    }
}

/* A page of keys: raw [128][D]; codes [32][D] is scratch. All threads of the block. */
KI_DEV void close_plus_page(uint8_t *page, const ki_cuda_layout &l, const uint16_t *raw,
                            uint8_t *codes, plus_close &p, uint32_t n_sinks) {
    uint32_t d = l.head_dim, bits = l.k_bits, steps = d / 16, n_wide = d / 4;
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        float low = f16_value(raw[n_sinks * d + c]), high = low;
        channel_range(&low, &high, raw, d, c, n_sinks, KI_PAGE_TOKENS);
        p.low[c] = __fadd_rn(low, 0.0f);
        p.high[c] = __fadd_rn(high, 0.0f);
        p.spread[c] = __fsub_rn(p.high[c], p.low[c]);
    }
    __syncthreads();
    plus_choose(p, d, bits == 2);
    __syncthreads();
    plus_scales(p, raw, d, bits, n_sinks);
    __syncthreads();
    uint16_t *scales = (uint16_t *)(page + l.k_scale_at), *zeros = (uint16_t *)(page + l.k_zero_at);
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        scales[ki_order_key_scale(c, steps)] = p.scale[0][c];
        zeros[ki_order_key_scale(c, steps)] = p.zero[0][c];
        if (p.is_wide[c]) page[l.list_at + p.number[c]] = (uint8_t)c;
    }
    for (uint32_t b = 0; b < KI_SUBS; b++) {
        uint8_t *sub = page + l.head_bytes + b * l.sub_bytes;
        for (uint32_t k = threadIdx.x; k < KI_SUB_TOKENS * d; k += blockDim.x) {
            uint32_t t = max(b * KI_SUB_TOKENS + k / d, n_sinks), c = k % d;
            float levels = bits == 4 || p.is_wide[c] ? 15.0f : 3.0f;
            codes[k] = (uint8_t)code_of(f16_value(raw[t * d + c]), f16_value(p.scale[0][c]),
                                        f16_value(p.zero[0][c]), levels);
        }
        __syncthreads();
        pack_block((uint32_t *)(sub + l.k_at), codes, d, steps, bits, true, 0, 32, 0);
        if (bits == 2) {
            /* wide codes, numbered: a token's first D/4 bytes from its own row, read before written
             * */
            uint8_t *wide = codes + KI_SUB_TOKENS * d;
            for (uint32_t k = threadIdx.x; k < KI_SUB_TOKENS * d; k += blockDim.x)
                if (p.is_wide[k % d]) wide[k / d * 64 + p.number[k % d]] = codes[k];
            for (uint32_t k = threadIdx.x; k < KI_SUB_TOKENS * 64; k += blockDim.x)
                if (k % 64 >= n_wide) wide[k] = 0;
            __syncthreads();
            pack_block((uint32_t *)(sub + l.wide_at), wide, 64, (n_wide + 15) / 16, 2, true, 0, 32,
                       2);
        }
        __syncthreads();
    }
}

#endif
