/* kv_tile.cuh: products of one warp with blocks of 32 tokens as they lie in a page (kv_order.h).
 *
 * Keys:    scores [32 tokens][8 heads] = codes [32][D] . q' [D][8]        q' = q * scale
 * Values:  acc [D channels][8 heads] += codes [D][32] . p' [32][8]        p' = p * scale
 *
 * A code is a float16 subnormal: code * 4^field * 2^-24. At 2 bits field 1 marks columns 8 to 15
 * and field 2 rows 8 to 15 of a tile: the first factor, 4, is taken from the other operand's b1,
 * the second, 16, from the sums of rows 8 to 15, both by exact powers of two. At 4 bits rows have
 * 16. */
#ifndef KI_KV_TILE_CUH
#define KI_KV_TILE_CUH
#include "kv_mma.cuh"
#include "kv_plan.h"

constexpr float CODE_UNIT = 16777216.0f; /* 2^24 */
KI_DEV float row_unit(uint32_t bits) { return bits == 16 ? 1.0f : CODE_UNIT; }
KI_DEV float row8_unit(uint32_t bits) {
    return bits == 16 ? 1.0f : bits == 8 ? CODE_UNIT : CODE_UNIT / 16;
}

/* ---- operands out of a plane ---- */

template <class F> KI_DEV void frags_of_word2(uint32_t w, uint32_t j, F &f) {
    f(j, 0, w & 0x00030003u, w & 0x00300030u, w & 0x000c000cu, w & 0x00c000c0u);
    w >>= 8;
    f(j, 1, w & 0x00030003u, w & 0x00300030u, w & 0x000c000cu, w & 0x00c000c0u);
}
template <class F> KI_DEV void frags_of_word4(uint32_t w, uint32_t k, F &f) {
    uint32_t v = w >> 8;
    f(k / 2, k % 2, w & 0x000f000fu, w & 0x00f000f0u, v & 0x000f000fu, v & 0x00f000f0u);
}
template <int BITS, class F> KI_DEV void frags_of_word(uint32_t w, uint32_t k, F &f) {
    if constexpr (BITS == 2) frags_of_word2(w, k, f);
    else frags_of_word4(w, k, f);
}

/* The registers of 16 bits of tiles (j, 0) and (j, 1): x, y of quarter e are low[e], high[e]. */
template <class F>
KI_DEV void row_tiles(uint32_t j, const uint32_t (&low)[4], const uint32_t (&high)[4], bool keys,
                      F &f) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t *x = low + 2 * i, *y = high + 2 * i;
        if (keys) f(j, i, x[0], x[1], y[0], y[1]);
        else f(j, i, x[0], y[0], x[1], y[1]);
    }
}
/* Of all tiles of a block in 16 bits. two_steps(k): a lane's 16 bytes number k = 4 (j / 2) + e,
 * last(e): its 8 bytes of the step that is alone. */
template <int NJ, class L, class T, class F>
KI_DEV void for_row_frags(bool keys, L two_steps, T last, F f) {
#pragma unroll
    for (int j = 0; j + 1 < NJ; j += 2) {
        uint4 w[4];
#pragma unroll
        for (int e = 0; e < 4; e++) w[e] = two_steps(j * 2 + e);
        const uint32_t x0[4] = {w[0].x, w[1].x, w[2].x, w[3].x};
        const uint32_t y0[4] = {w[0].y, w[1].y, w[2].y, w[3].y};
        const uint32_t x1[4] = {w[0].z, w[1].z, w[2].z, w[3].z};
        const uint32_t y1[4] = {w[0].w, w[1].w, w[2].w, w[3].w};
        row_tiles(j, x0, y0, keys, f);
        row_tiles(j + 1, x1, y1, keys, f);
    }
    if constexpr (NJ % 2 == 1) {
        uint32_t x[4], y[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint2 w = last(e);
            x[e] = w.x, y[e] = w.y;
        }
        row_tiles(NJ - 1, x, y, keys, f);
    }
}
/* The step that is alone, behind those that stand in twos. */
template <int NJ> KI_DEV const uint2 *last_step(const uint8_t *block) {
    return (const uint2 *)(block + NJ / 2 * 2048);
}

/* Calls f(j, i, a0, a1, a2, a3) for every tile of a plane of NJ steps: j ascending, i = 0, 1. */
template <int NJ, int BITS, class F>
KI_DEV void for_frags(const uint8_t *plane, bool keys, uint32_t lane, F f) {
    uint32_t at = ki_order_lane(lane, keys);
    const uint4 *fours = (const uint4 *)plane + at;
    if constexpr (BITS == 8) {
        const uint32_t m = 0x00ff00ffu;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            uint4 w = fours[j * 32];
            f(j, 0, w.x & m, w.x >> 8 & m, w.y & m, w.y >> 8 & m);
            f(j, 1, w.z & m, w.z >> 8 & m, w.w & m, w.w >> 8 & m);
        }
    } else {
        constexpr int N = NJ * BITS / 2;
#pragma unroll
        for (int k = 0; k < N / 4; k++) {
            uint4 w = fours[k * 32];
            frags_of_word<BITS>(w.x, 4 * k, f);
            frags_of_word<BITS>(w.y, 4 * k + 1, f);
            frags_of_word<BITS>(w.z, 4 * k + 2, f);
            frags_of_word<BITS>(w.w, 4 * k + 3, f);
        }
        const uint32_t *rest = (const uint32_t *)plane + N / 4 * 128 + at * (N % 4);
#pragma unroll
        for (int k = 0; k < N % 4; k++) frags_of_word<BITS>(rest[k], N / 4 * 4 + k, f);
    }
}

template <int NJ, class F>
KI_DEV void for_rows(const uint8_t *block, bool keys, uint32_t lane, F f) {
    uint32_t at = ki_order_lane(lane, keys);
    for_row_frags<NJ>(
        keys, [&](int k) { return ((const uint4 *)block)[k * 32 + at]; },
        [&](int e) { return last_step<NJ>(block)[e * 32 + at]; }, f);
}

/* The same with bits that are known at run time only, unless B is not 0. */
template <int NJ, int B, class F>
KI_DEV void for_frags_of(uint32_t bits, const uint8_t *plane, bool keys, uint32_t lane, F f) {
    if constexpr (B == 16) for_rows<NJ>(plane, keys, lane, f);
    else if constexpr (B != 0) for_frags<NJ, B>(plane, keys, lane, f);
    else if (bits == 2) for_frags<NJ, 2>(plane, keys, lane, f);
    else if (bits == 4) for_frags<NJ, 4>(plane, keys, lane, f);
    else if (bits == 8) for_frags<NJ, 8>(plane, keys, lane, f);
    else for_rows<NJ>(plane, keys, lane, f);
}

/* Third bits, of values: the same tiles; a bit stands two places further left than it is stored, so
 * that rows 8 to 15 have the factor 16 of the low plane. Columns 8 to 15 have 2, the unit 4, i = 1
 * another 4. */
template <int NJ, class F> KI_DEV void for_third_frags(const uint8_t *plane, uint32_t lane, F f) {
    constexpr int N = (NJ + 1) / 2;
    const uint32_t *words = (const uint32_t *)plane;
#pragma unroll
    for (int j = 0; j < NJ; j++) {
        uint32_t w = words[ki_order_word_at(j / 2, N, lane, 0)];
        w = j % 2 ? w >> 6 : w << 2;
        f(j, 0, w & 0x00040004u, w & 0x00400040u, w & 0x00080008u, w & 0x00800080u);
        f(j, 1, w & 0x00100010u, w & 0x01000100u, w & 0x00200020u, w & 0x02000200u);
    }
}

/* ---- queries ---- */

/* b operands of the warp's eight heads over NJ steps: q[2 j] b0, q[2 j + 1] b1. |q| < 1: each
 * head's largest is in [1/2, 1) and `unit` (of heads 2 t, 2 t + 1) takes the power of two back, so
 * no product with a scale leaves float16. quartered: b1 is divided by 4, for 2-bit keys. Scores
 * come out in units of log2. */
template <int NJ> struct queries {
    uint32_t q[2 * NJ];
    float unit[2];

    __device__ __forceinline__ void load(const uint16_t *head_rows, bool is_head, uint32_t lane) {
        const uint32_t *row = (const uint32_t *)head_rows + lane % 4;
#pragma unroll
        for (int k = 0; k < 2 * NJ; k++) q[k] = is_head ? row[4 * k] : 0;
    }
    /* From float16 as they are in memory. */
    __device__ __forceinline__ void scale(float factor, bool quartered, uint32_t lane) {
        uint32_t most = 0;
#pragma unroll
        for (int k = 0; k < 2 * NJ; k++) most = most2(most, q[k]);
        float largest = fmaxf(low_half(most), high_half(most));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)) * fabsf(factor);
        int e = (int)(__float_as_uint(largest) >> 23 & 255) - 126; /* 2^(e - 1) <= largest < 2^e */
        e = e < -100 ? -100 : e > 100 ? 100 : e;
        float down = factor * __uint_as_float((uint32_t)(127 - e) << 23);
#pragma unroll
        for (int k = 0; k < 2 * NJ; k++) {
            float f = k % 2 && quartered ? down * 0.25f : down;
            q[k] = pack2(low_half(q[k]) * f, high_half(q[k]) * f);
        }
        float up = __uint_as_float((uint32_t)(127 + e) << 23);
        unit[0] = __shfl_sync(~0u, up, lane % 4 * 8);
        unit[1] = __shfl_sync(~0u, up, lane % 4 * 8 + 4);
    }
};

/* ---- keys ---- */

/* A lane's scales of one key group as b operands: out[k] = q[k] * scale. */
template <int NJ>
KI_DEV void scale_queries(uint32_t (&out)[2 * NJ], const uint32_t (&q)[2 * NJ],
                          const uint16_t *scales, uint32_t lane) {
#pragma unroll
    for (int k = 0; k < NJ / 2; k++) {
        uint4 s = *(const uint4 *)(scales + k * 32 + lane % 4 * 8);
        out[4 * k] = mul2(q[4 * k], s.x);
        out[4 * k + 1] = mul2(q[4 * k + 1], s.y);
        out[4 * k + 2] = mul2(q[4 * k + 2], s.z);
        out[4 * k + 3] = mul2(q[4 * k + 3], s.w);
    }
    if constexpr (NJ % 2 == 1) {
        uint2 s = *(const uint2 *)(scales + NJ / 2 * 32 + lane % 4 * 4);
        out[2 * NJ - 2] = mul2(q[2 * NJ - 2], s.x);
        out[2 * NJ - 1] = mul2(q[2 * NJ - 1], s.y);
    }
}

/* d[0], d[1] of lane 4 g + t: the zero terms of group g for heads 2 t and 2 t + 1; zeros are those
 * of the lane's own group. They are operands as they lie there: columns 8 to 15 of a tile of
 * channels as rows 8 to 15, multiplied apart, so that no register has to be moved, and neither
 * quarter taken back from q. Rows that meet the other's queries are left. */
template <int NJ>
KI_DEV void zero_terms(float (&d)[4], const uint32_t (&q)[2 * NJ], bool quartered,
                       const uint16_t *zeros, uint32_t lane) {
    float low[4] = {}, high[4] = {}, back = quartered ? 4.0f : 1.0f;
#pragma unroll
    for (int k = 0; k < NJ / 2; k++) {
        uint4 z = *(const uint4 *)(zeros + k * 32 + lane % 4 * 8);
        mma(low, z.x, z.y, z.z, z.w, q[4 * k], q[4 * k + 2]);
        mma(high, z.x, z.y, z.z, z.w, q[4 * k + 1], q[4 * k + 3]);
    }
    if constexpr (NJ % 2 == 1) {
        uint2 z = *(const uint2 *)(zeros + NJ / 2 * 32 + lane % 4 * 4);
        mma(low, z.x, z.y, 0, 0, q[2 * NJ - 2], 0);
        mma(high, z.x, z.y, 0, 0, q[2 * NJ - 1], 0);
    }
    d[0] = fmaf(high[2], back, low[0]), d[1] = fmaf(high[3], back, low[1]);
}

/* Pieces of 16 bytes of two steps of a 16-bit block, and of a copy of its first quarter. */
enum { WHOLE_STEP = 128, FIRST_STEP = 32 };

/* Where a lane finds its registers of a 16-bit block whose tokens [from, to) are read. */
struct seen_rows {
    uint32_t step, at[4]; /* of each quarter */

    __device__ __forceinline__ seen_rows(ki_plan_rows rows, bool keys, uint32_t step, uint32_t lane)
        : step(step) {
#pragma unroll
        for (int e = 0; e < 4; e++) at[e] = ki_order_seen_at(rows.from, rows.to, e, lane, keys);
    }
    __device__ __forceinline__ const uint4 *two_steps(const uint8_t *block, int k) const {
        return (const uint4 *)block + k / 4 * step + at[k % 4];
    }
    template <int NJ>
    __device__ __forceinline__ const uint2 *last(const uint8_t *block, int e) const {
        return last_step<NJ>(block) + at[e];
    }
};

/* Calls f(j, i, a0, a1, a2, a3) for every tile of a 16-bit block whose tokens [from, to) are read;
 * of others finite numbers come. */
template <int NJ, class F>
KI_DEV void for_seen_frags(const uint8_t *block, ki_plan_rows rows, bool keys, uint32_t step,
                           uint32_t lane, F f) {
    seen_rows at(rows, keys, step, lane);
    for_row_frags<NJ>(
        keys, [&](int k) { return *at.two_steps(block, k); },
        [&](int e) { return *at.last<NJ>(block, e); }, f);
}

/* Products of the 16-bit keys of a block. */
template <int NJ>
KI_DEV void exact_scores(float (&s)[2][4], const uint8_t *block, ki_plan_rows rows, uint32_t step,
                         const uint32_t (&q)[2 * NJ], bool quartered, uint32_t lane) {
    uint32_t back = quartered ? TWO_FOURS : TWO_ONES;
    for_seen_frags<NJ>(block, rows, true, step, lane,
                       [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
                           mma(s[i], a0, a1, a2, a3, q[2 * j], mul2(q[2 * j + 1], back));
                       });
}

/* ---- values ---- */

/* b operands of the probabilities of a block: p[2 i] b0, p[2 i + 1] b1 of tokens 16 i .. 16 i + 15,
 * from scores' registers. */
KI_DEV void probability_operands(uint32_t (&p)[4], const float (&s0)[4], const float (&s1)[4]) {
    p[0] = transpose8(pack2(s0[0], s0[1]));
    p[1] = transpose8(pack2(s0[2], s0[3]));
    p[2] = transpose8(pack2(s1[0], s1[1]));
    p[3] = transpose8(pack2(s1[2], s1[3]));
}

/* out[k] = p[k] * scale: the scales of one channel group. */
KI_DEV void scale_probabilities(uint32_t (&out)[4], const uint32_t (&p)[4], const uint16_t *scales,
                                uint32_t lane) {
    uint4 s = *(const uint4 *)(scales + lane % 4 * 8);
    out[0] = mul2(p[0], s.x);
    out[1] = mul2(p[1], s.y);
    out[2] = mul2(p[2], s.z);
    out[3] = mul2(p[3], s.w);
}

/* d += zeros . p in rows 0 to 7 (row g: the lane's own channel group's zeros) and the sum of p in
 * row 8: d[2], d[3] of lanes 0 to 3. p is not quartered. */
KI_DEV void zero_sums(float (&d)[4], const uint32_t (&p)[4], const uint16_t *zeros, bool ones,
                      uint32_t lane) {
    uint4 z = *(const uint4 *)(zeros + lane % 4 * 8);
    uint32_t one = ones && lane < 4 ? TWO_ONES : 0;
    mma(d, z.x, one, z.y, one, p[0], p[1]);
    mma(d, z.z, one, z.w, one, p[2], p[3]);
}
KI_DEV void plain_sums(float (&d)[4], const uint32_t (&p)[4], uint32_t lane) {
    uint32_t one = lane < 4 ? TWO_ONES : 0;
    mma(d, 0, one, 0, one, p[0], p[1]);
    mma(d, 0, one, 0, one, p[2], p[3]);
}

#endif
