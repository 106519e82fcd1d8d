/* kv_decode.cuh: fused decode attention, one thread block for each work item (a split of a
 * sequence) and KV head (eight query heads of it at a time).
 *
 * Each warp streams every WARPS-th fast unit of the item through its own ring of stages in shared
 * memory, keeps its own online softmax, and takes every WARPS-th slow block straight from global
 * memory (or from what the ring has room for), in float16 or codes, token by token as the
 * visibility rule says. The warps' states are merged in their order; an item of several splits
 * writes its state, and merge_kernel merges these in order. No atomics: bits repeat. */
#ifndef KI_KV_DECODE_CUH
#define KI_KV_DECODE_CUH
#include "kv_launch.h"
#include "kv_own.cuh"
#include "kv_shared.h"
#include "kv_slow.cuh"
#include "kv_tile.cuh"
#include "pdl.cuh"

/* A kernel's shape. Bits and groups 0: known at run time. NB: blocks of a unit. PLUS: the plus
 * kinds, and no others. HEADS: most query heads of a KV head that it takes; fewer than 8 leave
 * columns of the products for other work (below), of 2-bit codes with groups of 32 and more. */
template <int D_, int KB_, int VB_, int KG_, int VG_, int NB_, int WARPS_, int STAGES_, int BLOCKS_,
          bool PLUS_, int HEADS_ = 8>
struct decode_shape {
    static constexpr int D = D_, NJ = D_ / 16, KB = KB_, VB = VB_, KG = KG_, VG = VG_;
    static constexpr int NB = NB_;
    static constexpr int WARPS = WARPS_, STAGES = STAGES_, BLOCKS = BLOCKS_;
    static constexpr bool IS_FLEXIBLE = KI_DECODE_IS_FLEXIBLE(KB_, VG_); /* WARPS or fewer */
    static constexpr bool PLUS = PLUS_;
    static constexpr int HEADS = HEADS_, COPIES = 8 / HEADS_;
    static_assert(HEADS_ == 8 || (KB_ == 2 && VB_ == 2 && KG_ >= 32 && VG_ >= 16 && NB_ == 4),
                  "copies of heads are for 2-bit pages");
    /* Blocks, and channel groups of values, that copies share out among them. */
    static constexpr int K_COPIES = COPIES < NB_ ? COPIES : NB_;
    static constexpr int V_COPIES = !VG_ ? 1 : COPIES < D_ / VG_ ? COPIES : D_ / VG_;
    /* Codes of slow blocks come through the ring: such shapes have them on both sides, and heads of
     * pages that are written once, when a page closes. */
    static constexpr bool SPARE = KG_ != 0;
    /* With few thread blocks rows in 16 bits do, too; of a shape for many only rows of keys. */
    static constexpr bool NEAR = SPARE && WARPS_ * BLOCKS_ <= 8;
    /* And of sinks, which + kinds have, the first quarter alone; eight heads leave a shape for many
     * no registers for that. */
    static constexpr bool HAS_FIRST = SPARE && PLUS_ && D_ % 32 == 0 && (NEAR || HEADS_ == 1);
    KI_DEV_MEMBER uint32_t warps() { return IS_FLEXIBLE ? blockDim.x / 32 : WARPS; }
    /* Bits and groups: constants where the shape names them. */
    KI_DEV_MEMBER uint32_t k_bits(const ki_cuda_layout &l) { return KB ? KB : l.k_bits; }
    KI_DEV_MEMBER uint32_t v_bits(const ki_cuda_layout &l) {
        return VB ? VB : l.v_bits == 3 ? 2 : l.v_bits; /* of the low plane */
    }
    KI_DEV_MEMBER uint32_t k_group(const ki_cuda_layout &l) { return KG ? KG : l.k_group; }
    KI_DEV_MEMBER uint32_t v_group(const ki_cuda_layout &l) { return VG ? VG : l.v_group; }
    KI_DEV_MEMBER bool quartered(const ki_cuda_layout &l) { return k_bits(l) == 2; }
};

template <class S> struct warp_state {
    queries<S::NJ> q;
    float acc[S::NJ][4];          /* [channel tile] of rows = channels, columns = heads */
    float z[4];                   /* zero sums of channel groups 0 to 7; sums of p */
    float z8[S::D > 128 ? 4 : 1]; /* of groups 8 to 15 */
    float m[2];                   /* largest score of heads 2 t, 2 t + 1 */
    const uint16_t *wide_q;       /* [8][D] f16 in shared memory ([1][D] of one head): queries to
                                   * gather from (plus), in the order of scales */
};

/* ---- a page's planes ---- */

template <class S>
KI_DEV const uint16_t *key_scales(const ki_cuda_layout &l, const uint8_t *head, const uint8_t *sub,
                                  uint32_t token_in_page) {
    if constexpr (S::KG == 32) return (const uint16_t *)(sub + l.k_scale_at);
    uint32_t group = S::k_group(l);
    if (group > KI_SUB_TOKENS)
        return (const uint16_t *)(head + l.k_scale_at) + token_in_page / group * S::D;
    return (const uint16_t *)(sub + l.k_scale_at) + token_in_page % KI_SUB_TOKENS / group * S::D;
}

/* ---- keys of one block ---- */

template <class S> struct scaled_queries {            /* b operands for one key group */
    static constexpr int WIDE = (S::D / 4 + 15) / 16; /* steps of wide channels */
    uint32_t b[2 * S::NJ], wide[S::PLUS ? 2 * WIDE : 1];
};

KI_DEV uint32_t two_halves(const uint8_t *x, uint32_t at0, uint32_t at1) {
    return *(const uint16_t *)(x + at0) | (uint32_t) * (const uint16_t *)(x + at1) << 16;
}

/* Queries of the wide channels, times 4 and their scales: a code's upper bits count four times. The
 * gathered queries lie in the order of the scales. */
template <class S>
KI_DEV void gather_wide(scaled_queries<S> &out, const ki_cuda_layout &l, const uint8_t *head,
                        const uint16_t *wide_q, uint32_t lane) {
    const uint16_t *list = (const uint16_t *)(head + l.list_at) + lane % 4;
    const uint8_t *scales = head + l.k_scale_at, *q = (const uint8_t *)wide_q;
    if (S::HEADS > 1) q += lane / 4 * S::D * 2;
#pragma unroll
    for (int k = 0; k < 2 * scaled_queries<S>::WIDE; k++) {
        uint32_t w = k * 8 + lane % 4 * 2; /* two neighbours of the list */
        bool is_wide = w < S::D / 4;
        uint32_t two = is_wide ? list[k * 4] : 0, c0, c1; /* offsets in bytes */
        if constexpr (S::NJ % 2 == 0) { /* both at once: bits of ki_order_key_scale change places */
            two = (two & 255) | (two & 0xff00) << 8;
            two = (two & 0x00e100e1) << 1 | (two & 0x00060006) << 3 | (two >> 1 & 0x000c000c);
            c0 = two & 0xffff, c1 = two >> 16;
        } else {
            c0 = ki_order_key_scale(two & 255, S::NJ) * 2;
            c1 = ki_order_key_scale(two >> 8, S::NJ) * 2;
        }
        uint32_t x = mul2(two_halves(q, c0, c1), two_halves(scales, c0, c1));
        /* columns 8 to 15 of a tile have a factor 4 already */
        out.wide[k] = is_wide ? mul2(x, k % 2 ? TWO_ONES : TWO_FOURS) : 0;
    }
}

template <class S>
KI_DEV void scale_group(scaled_queries<S> &out, const ki_cuda_layout &l, const uint8_t *head,
                        const uint8_t *sub, uint32_t token_in_page, const warp_state<S> &st,
                        uint32_t lane) {
    if (S::k_bits(l) == 16) {
#pragma unroll
        for (int k = 0; k < 2 * S::NJ; k++) out.b[k] = st.q.q[k];
        return;
    }
    scale_queries<S::NJ>(out.b, st.q.q, key_scales<S>(l, head, sub, token_in_page), lane);
    if constexpr (S::PLUS)
        if (S::k_bits(l) == 2) gather_wide<S>(out, l, head, st.wide_q, lane);
}

/* Products of a block's codes, in code units; tiles i with `which` bit i. */
template <class S>
KI_DEV void code_scores(float (&s)[2][4], const ki_cuda_layout &l, const uint8_t *sub,
                        const scaled_queries<S> &q, uint32_t which, uint32_t lane) {
    for_frags_of<S::NJ, S::KB>(
        S::k_bits(l), sub + l.k_at, true, lane,
        [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
            if (which >> i & 1) mma(s[i], a0, a1, a2, a3, q.b[2 * j], q.b[2 * j + 1]);
        });
    if constexpr (S::PLUS)
        if (S::k_bits(l) == 2)
            for_frags<scaled_queries<S>::WIDE, 2>(
                sub + l.wide_at, true, lane,
                [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
                    mma(s[i], a0, a1, a2, a3, q.wide[2 * j], q.wide[2 * j + 1]);
                });
}

/* Scores of NB blocks of codes, in units of log2: s [2 NB] tiles of 16 tokens. */
template <class S, int NB>
KI_DEV void unit_scores(float (&s)[2 * NB][4], const ki_cuda_layout &l, const uint8_t *head,
                        const uint8_t *subs, uint32_t token_in_page, const warp_state<S> &st,
                        uint32_t lane) {
    uint32_t bits = S::k_bits(l), group = S::k_group(l);
    float zero[4];
    if (bits < 16) { /* row g: the unit's key group g */
        uint32_t n = group < NB * KI_SUB_TOKENS ? NB * KI_SUB_TOKENS / group : 1;
        uint32_t token = token_in_page + lane / 4 % n * group;
        const uint8_t *sub = subs + (token - token_in_page) / KI_SUB_TOKENS * l.sub_bytes;
        const uint16_t *scales = key_scales<S>(l, head, sub, token);
        zero_terms<S::NJ>(zero, st.q.q, S::quartered(l), scales + (l.k_zero_at - l.k_scale_at) / 2,
                          lane);
    }
    float u0 = st.q.unit[0], u1 = st.q.unit[1];
    float low = row_unit(bits), high = row8_unit(bits);
    scaled_queries<S> q;
#pragma unroll
    for (int b = 0; b < NB; b++) {
        float t[2][4] = {};
        const uint8_t *sub = subs + b * l.sub_bytes;
        uint32_t token = token_in_page + b * KI_SUB_TOKENS;
        if (b == 0 || (bits < 16 && b * KI_SUB_TOKENS % group == 0))
            scale_group<S>(q, l, head, sub, token, st, lane);
        bool is_halved = bits < 16 && group < KI_SUB_TOKENS; /* two groups in a block */
        code_scores<S>(t, l, sub, q, is_halved ? 1 : 3, lane);
        if (is_halved) {
            scale_group<S>(q, l, head, sub, token + 16, st, lane);
            code_scores<S>(t, l, sub, q, 2, lane);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float z0 = 0, z1 = 0;
            if (bits < 16) {
                uint32_t g = (b * 2 + i) * 16 / group;
                z0 = __shfl_sync(~0u, zero[0], g * 4 + lane % 4) * u0;
                z1 = __shfl_sync(~0u, zero[1], g * 4 + lane % 4) * u1;
            }
            s[2 * b + i][0] = fmaf(t[i][0], u0 * low, z0);
            s[2 * b + i][1] = fmaf(t[i][1], u1 * low, z1);
            s[2 * b + i][2] = fmaf(t[i][2], u0 * high, z0);
            s[2 * b + i][3] = fmaf(t[i][3], u1 * high, z1);
        }
    }
}

/* ---- online softmax ---- */

template <class S> KI_DEV void rescale(warp_state<S> &st, float m0, float m1) {
    /* of the first unit m may be -inf and everything 0 */
    float f0 = exp2_fast(st.m[0] - m0), f1 = exp2_fast(st.m[1] - m1);
#pragma unroll
    for (int j = 0; j < S::NJ; j++)
        st.acc[j][0] *= f0, st.acc[j][1] *= f1, st.acc[j][2] *= f0, st.acc[j][3] *= f1;
    st.z[0] *= f0, st.z[1] *= f1, st.z[2] *= f0, st.z[3] *= f1;
    if constexpr (S::D > 128) st.z8[0] *= f0, st.z8[1] *= f1;
    st.m[0] = m0;
    st.m[1] = m1;
}

/* Scores become probabilities about the largest so far. Rows 8 to 15 of a tile are divided by 4
 * where quarter is 2 (2-bit values want their second operand so), not where it is 0. is_first: all
 * sums are still 0. */
template <class S, int N>
KI_DEV void soften(float (&s)[N][4], warp_state<S> &st, float quarter, bool is_first) {
    float m0 = -INFINITY, m1 = -INFINITY;
#pragma unroll
    for (int i = 0; i < N; i++) {
        m0 = fmaxf(m0, fmaxf(s[i][0], s[i][2]));
        m1 = fmaxf(m1, fmaxf(s[i][1], s[i][3]));
    }
    if (__any_sync(~0u, m0 > st.m[0] || m1 > st.m[1])) {
#pragma unroll
        for (int x = S::HEADS < 2 ? 1 : S::HEADS / 2; x < 32; x *= 2) { /* copies' too */
            m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, x));
            m1 = fmaxf(m1, __shfl_xor_sync(~0u, m1, x));
        }
        if (S::HEADS == 1) m0 = m1 = fmaxf(m0, m1);
        m0 = fmaxf(fmaxf(m0, st.m[0]), -1e30f); /* finite, whatever came */
        m1 = fmaxf(fmaxf(m1, st.m[1]), -1e30f);
        if (is_first) st.m[0] = m0, st.m[1] = m1;
        else rescale<S>(st, m0, m1);
    }
    float q0 = st.m[0] + quarter, q1 = st.m[1] + quarter;
#pragma unroll
    for (int i = 0; i < N; i++) {
        s[i][0] = exp2_fast(s[i][0] - st.m[0]);
        s[i][1] = exp2_fast(s[i][1] - st.m[1]);
        s[i][2] = exp2_fast(s[i][2] - q0);
        s[i][3] = exp2_fast(s[i][3] - q1);
    }
}

/* ---- values of one block ---- */

/* Zero sums (for plus kinds: sums of p * scale) and sums of p. p is not quartered. */
template <class S>
KI_DEV void block_sums(warp_state<S> &st, const ki_cuda_layout &l, const uint8_t *sub,
                       const uint32_t (&p)[4], uint32_t lane) {
    if (S::v_bits(l) == 16) {
        plain_sums(st.z, p, lane);
        return;
    }
    uint32_t n = S::D / S::v_group(l);
    const uint16_t *zeros = (const uint16_t *)(sub + (S::PLUS ? l.v_scale_at : l.v_zero_at));
    uint32_t g = lane / 4;
    zero_sums(st.z, p, zeros + (g < n ? g : 0) * KI_SUB_TOKENS, true, lane);
    if constexpr (S::D > 128) {
        float d[4] = {st.z8[0], st.z8[1], 0, 0};
        if (n > 8) zero_sums(d, p, zeros + (8 + g) * KI_SUB_TOKENS, false, lane);
        st.z8[0] = d[0], st.z8[1] = d[1];
    }
}

/* acc += codes . p', in code units. add(j, i, a0..a3, b0, b1) does the product. */
template <class S, class F>
KI_DEV void code_values(const ki_cuda_layout &l, const uint8_t *sub, const uint32_t (&p)[4],
                        uint32_t lane, F add) {
    uint32_t bits = S::v_bits(l), group = bits == 16 ? S::D : S::v_group(l), scaled[4];
    const uint16_t *scales = (const uint16_t *)(sub + l.v_scale_at);
    if (bits == 16)
        for (int k = 0; k < 4; k++) scaled[k] = p[k];
    auto tile = [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
        if (i == 0 && bits < 16 && j * 16 % group == 0)
            scale_probabilities(scaled, p, scales + j * 16 / group * KI_SUB_TOKENS, lane);
        add(j, i, a0, a1, a2, a3, scaled[2 * i], scaled[2 * i + 1]);
    };
    for_frags_of<S::NJ, S::VB>(bits, sub + l.v_at, false, lane, tile);
    if (!S::PLUS || S::VB != 0 || l.v_bits != 3) return;
    auto third = [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
        if (i == 0 && j * 16 % group == 0)
            scale_probabilities(scaled, p, scales + j * 16 / group * KI_SUB_TOKENS, lane);
        uint32_t b0 = i ? mul2(scaled[2], TWO_QUARTERS) : scaled[0];
        uint32_t b1 = i ? mul2(scaled[3], TWO_HALVES) : mul2(scaled[1], TWO_TWOS);
        add(j, i, a0, a1, a2, a3, b0, b1);
    };
    for_third_frags<S::NJ>(sub + l.third_at, lane, third);
}

/* ---- fast units ---- */

template <class S>
KI_DEV void fast_unit(warp_state<S> &st, const ki_cuda_layout &l, const uint8_t *unit,
                      uint32_t token_in_page, uint32_t lane) {
    float s[2 * S::NB][4];
    const uint8_t *subs = S::NB == 4 ? unit + l.head_bytes : unit;
    unit_scores<S, S::NB>(s, l, unit, subs, token_in_page, st, lane);
    bool quarter = S::v_bits(l) == 2;
    soften<S, 2 * S::NB>(s, st, quarter ? 2.0f : 0.0f, false);
#pragma unroll
    for (int b = 0; b < S::NB; b++) {
        const uint8_t *sub = subs + b * l.sub_bytes;
        uint32_t p[4], plain[4];
        probability_operands(p, s[2 * b], s[2 * b + 1]);
        uint32_t back = quarter ? TWO_FOURS : TWO_ONES;
        plain[0] = p[0], plain[1] = mul2(p[1], back), plain[2] = p[2], plain[3] = mul2(p[3], back);
        block_sums<S>(st, l, sub, plain, lane);
        code_values<S>(l, sub, p, lane,
                       [&](int j, int, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) { mma(st.acc[j], a0, a1, a2, a3, b0, b1); });
    }
}

/* ---- fast units with copies of heads ----
 *
 * A product has eight columns. With HEADS < 8 query heads column c is head c % HEADS, copy
 * c / HEADS, and copies are equal but for scales: of keys copy k has those of block k of K_COPIES
 * neighbours, of values those of channel group k of V_COPIES. So operands are scaled once for
 * several blocks or groups; of a block's scores the columns of its copy count alone, and those of
 * K_COPIES blocks go into one pair of tiles, so that there are as many exponentials as scores; and
 * a channel's sum is in the columns of its group's copy. Elsewhere (slow blocks, sums of zeros) all
 * copies are the same. Columns 2 t and 2 t + 1 are lane t's, e is 0 or 1. */

template <class S> KI_DEV uint32_t copy_of(uint32_t lane, uint32_t e) {
    return (lane % 4 * 2 + e) / S::HEADS;
}

/* Scores of a unit: set n of tiles is blocks n K_COPIES .. */
template <class S, int SETS>
KI_DEV void copied_scores(float (&s)[SETS][2][4], const ki_cuda_layout &l, const uint8_t *head,
                          const uint8_t *subs, const warp_state<S> &st, uint32_t lane) {
    constexpr int COPIES = S::K_COPIES;
    constexpr bool PAGE_GROUP = S::KG > KI_SUB_TOKENS;
    constexpr int GROUPS = S::NB * KI_SUB_TOKENS / S::KG; /* row g: the unit's key group g */
    float zero[4], u0 = st.q.unit[0], u1 = st.q.unit[1];
    float low = row_unit(2), high = row8_unit(2);
    auto scales = [&](uint32_t block) {
        return key_scales<S>(l, head, subs + (PAGE_GROUP ? 0 : block * l.sub_bytes),
                             block * KI_SUB_TOKENS);
    };
    zero_terms<S::NJ>(
        zero, st.q.q, true,
        scales(lane / 4 % GROUPS * (S::NB / GROUPS)) + (l.k_zero_at - l.k_scale_at) / 2, lane);
    scaled_queries<S> q;
#pragma unroll
    for (int n = 0; n < SETS; n++) {
        if (n == 0 || n * COPIES * KI_SUB_TOKENS % S::KG == 0) {
            scale_queries<S::NJ>(q.b, st.q.q, scales(n * COPIES + lane / 4 / S::HEADS % COPIES),
                                 lane);
            if constexpr (S::PLUS) gather_wide<S>(q, l, head, st.wide_q, lane);
        }
#pragma unroll
        for (int k = 0; k < COPIES; k++) {
            float t[2][4] = {};
            code_scores<S>(t, l, subs + (n * COPIES + k) * l.sub_bytes, q, 3, lane);
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (k == 0 || copy_of<S>(lane, e % 2) % COPIES == (uint32_t)k)
                        s[n][i][e] = t[i][e];
        }
        uint32_t g0 = (n * COPIES + copy_of<S>(lane, 0) % COPIES) * KI_SUB_TOKENS / S::KG;
        uint32_t g1 = (n * COPIES + copy_of<S>(lane, 1) % COPIES) * KI_SUB_TOKENS / S::KG;
        float z0 = __shfl_sync(~0u, zero[0], g0 * 4 + lane % 4) * u0;
        float z1 = __shfl_sync(~0u, zero[1], g1 * 4 + lane % 4) * u1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s[n][i][0] = fmaf(s[n][i][0], u0 * low, z0),
            s[n][i][1] = fmaf(s[n][i][1], u1 * low, z1);
            s[n][i][2] = fmaf(s[n][i][2], u0 * high, z0);
            s[n][i][3] = fmaf(s[n][i][3], u1 * high, z1);
        }
    }
}

/* acc += codes . p' of one block; p is the same in all copies. */
template <class S>
KI_DEV void copied_values(warp_state<S> &st, const ki_cuda_layout &l, const uint8_t *sub,
                          const uint32_t (&p)[4], uint32_t lane) {
    constexpr int CHANNELS = S::VG * S::V_COPIES; /* that one operand has scales for */
    const uint16_t *scales =
        (const uint16_t *)(sub + l.v_scale_at) + lane / 4 / S::HEADS % S::V_COPIES * KI_SUB_TOKENS;
    uint32_t scaled[4];
    for_frags<S::NJ, 2>(sub + l.v_at, false, lane,
                        [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
                            if (i == 0 && j * 16 % CHANNELS == 0)
                                scale_probabilities(scaled, p,
                                                    scales + j * 16 / S::VG * KI_SUB_TOKENS, lane);
                            mma(st.acc[j], a0, a1, a2, a3, scaled[2 * i], scaled[2 * i + 1]);
                        });
}

template <class S>
KI_DEV void copied_unit(warp_state<S> &st, const ki_cuda_layout &l, const uint8_t *unit,
                        uint32_t lane) {
    constexpr int SETS = S::NB / S::K_COPIES;
    const uint8_t *subs = unit + l.head_bytes;
    float s[SETS][2][4];
    copied_scores<S, SETS>(s, l, unit, subs, st, lane);
    soften<S, 2 * SETS>(*(float(*)[2 * SETS][4]) & s, st, 2.0f, false);
#pragma unroll
    for (int n = 0; n < SETS; n++) {
        uint32_t mine[4];
        probability_operands(mine, s[n][0], s[n][1]);
#pragma unroll
        for (int k = 0; k < S::K_COPIES; k++) {
            const uint8_t *sub = subs + (n * S::K_COPIES + k) * l.sub_bytes;
            uint32_t p[4], plain[4], from = (k * S::HEADS + lane / 4 % S::HEADS) * 4 + lane % 4;
#pragma unroll
            for (int x = 0; x < 4; x++) p[x] = __shfl_sync(~0u, mine[x], from);
            plain[0] = p[0], plain[1] = mul2(p[1], TWO_FOURS);
            plain[2] = p[2], plain[3] = mul2(p[3], TWO_FOURS);
            block_sums<S>(st, l, sub, plain, lane);
            copied_values<S>(st, l, sub, p, lane);
        }
    }
}

/* acc between code units (of fast units) and true ones: exact. */
template <class S> KI_DEV void convert_units(warp_state<S> &st, float low, float high) {
#pragma unroll
    for (int j = 0; j < S::NJ; j++)
        st.acc[j][0] *= low, st.acc[j][1] *= low, st.acc[j][2] *= high, st.acc[j][3] *= high;
}

/* ---- slow blocks ---- */

/* Keys: token by token from codes or from 16 bit. Invisible ones get -inf. */
template <class S>
KI_DEV void slow_scores(float (&s)[2][4], const ki_cuda_layout &l, const ki_plan_item &item,
                        uint32_t block, const slow_place &at, const warp_state<S> &st,
                        uint32_t lane) {
    float exact[2][4] = {};
    uint32_t sinks = l.k_bits == 16 ? 0 : l.sink_tokens, base = block * KI_SUB_TOKENS;
    uint32_t in_page = base % KI_PAGE_TOKENS;
    if (at.k_codes) unit_scores<S, 1>(s, l, at.head, at.sub, in_page, st, lane);
    if (at.k16)
        exact_scores<S::NJ>(exact, at.k16, key_rows(l, item, block), at.k_step, st.q.q,
                            S::quartered(l), lane);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t pos = base + i * 16 + lane / 4 + e / 2 * 8;
            if (pos < item.first || pos >= item.end) s[i][e] = -INFINITY;
            else if (at.k16 && (pos < sinks || pos >= item.k_exact))
                s[i][e] = exact[i][e] * st.q.unit[e % 2];
        }
}

template <class S>
KI_DEV void slow_values(warp_state<S> &st, const ki_cuda_layout &l, const ki_plan_item &item,
                        uint32_t block, const slow_place &at, exact_values<S> &values,
                        const float (&s)[2][4], uint32_t lane) {
    float coded[2][4], exact[2][4];
    uint32_t sinks = l.v_bits == 16 ? 0 : l.sink_tokens, base = block * KI_SUB_TOKENS;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t pos = base + i * 16 + lane / 4 + e / 2 * 8;
            bool is_exact = pos < sinks || pos >= item.v_exact;
            exact[i][e] = is_exact ? s[i][e] : 0;
            coded[i][e] = is_exact ? 0 : s[i][e];
        }
    uint32_t p[4];
    if (at.v_codes) {
        uint32_t bits = S::v_bits(l);
        float low = row_unit(bits), high = row8_unit(bits), t[4];
        probability_operands(p, coded[0], coded[1]);
        block_sums<S>(st, l, at.sub, p, lane);
        if (bits == 2) p[1] = mul2(p[1], TWO_QUARTERS), p[3] = mul2(p[3], TWO_QUARTERS);
        code_values<S>(l, at.sub, p, lane,
                       [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
                           if (i == 0) t[0] = t[1] = t[2] = t[3] = 0;
                           mma(t, a0, a1, a2, a3, b0, b1);
                           if (i == 0) return;
                           st.acc[j][0] += t[0] * low, st.acc[j][1] += t[1] * low;
                           st.acc[j][2] += t[2] * high, st.acc[j][3] += t[3] * high;
                       });
    }
    if (at.v16) {
        probability_operands(p, exact[0], exact[1]);
        plain_sums(st.z, p, lane);
        values.each(at, value_rows(l, item, block), lane,
                    [&](int j, int i, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
                        mma(st.acc[j], a0, a1, a2, a3, p[2 * i], p[2 * i + 1]);
                    });
    }
}

template <class S>
KI_DEV void slow_block(warp_state<S> &st, const decode_args &a, const ki_plan_item &item,
                       const slow_place &at, exact_values<S> &values, uint32_t block, bool is_first,
                       uint32_t lane) {
    float s[2][4] = {};
    slow_scores<S>(s, a.l, item, block, at, st, lane);
    soften<S, 2>(s, st, 0, is_first);
    slow_values<S>(st, a.l, item, block, at, values, s, lane);
}

/* ---- merging ---- */

/* This warp's state to shared memory: [heads][2 + D] of it. */
template <class S>
KI_DEV void put_state(float *to, const warp_state<S> &st, const ki_cuda_layout &l, uint32_t n_heads,
                      uint32_t lane) {
    uint32_t group = S::v_bits(l) == 16 ? S::D : S::v_group(l), h = lane % 4 * 2;
    bool turned = S::PLUS;
    float half = turned ? (l.v_bits == 3 ? -3.5f : -1.5f) : S::v_bits(l) == 16 ? 0.0f : 1.0f;
    uint32_t h0 = h % S::HEADS, h1 = (h + 1) % S::HEADS;
    float *row0 = to + h0 * (S::D + 2), *row1 = to + h1 * (S::D + 2);
    float z0 = 0, z1 = 0;
#pragma unroll
    for (int j = 0; j < S::NJ; j++) {
        uint32_t g = j * 16 / group, from = g % 8 * 4 + lane % 4, copy = g % S::V_COPIES;
        if (j * 16 % group == 0) { /* the next group of channels */
            if (S::D > 128 && g >= 8) {
                z0 = __shfl_sync(~0u, st.z8[0], from);
                z1 = __shfl_sync(~0u, st.z8[S::D > 128], from);
            } else z0 = __shfl_sync(~0u, st.z[0], from), z1 = __shfl_sync(~0u, st.z[1], from);
        }
        uint32_t c = 2 + j * 16 + lane / 4;
        if (h0 < n_heads && copy_of<S>(lane, 0) == copy)
            row0[c] = st.acc[j][0] + z0 * half, row0[c + 8] = st.acc[j][2] + z0 * half;
        if (h1 < n_heads && copy_of<S>(lane, 1) == copy)
            row1[c] = st.acc[j][1] + z1 * half, row1[c + 8] = st.acc[j][3] + z1 * half;
    }
    if (lane < 4 && h < n_heads) row0[0] = st.m[0], row0[1] = st.z[2];
    if (lane < 4 && h + 1 < n_heads) row1[0] = st.m[1], row1[1] = st.z[3]; /* of copy 0 */
}

/* Of the warps' states of one head, in their order: channels first + 32 k of their sum to x, the
 * sum of weights to *sum; returns the maximum that both are relative to. */
template <class S, int N>
KI_DEV float add_states(float (&x)[N], float *sum, const float *state, uint32_t n_heads,
                        uint32_t first) {
    uint32_t stride = n_heads * (S::D + 2);
    float m = -1e30f;
#pragma unroll
    for (uint32_t w = 0; w < S::warps(); w++) m = fmaxf(m, state[w * stride]);
#pragma unroll
    for (uint32_t w = 0; w < S::warps(); w++) {
        const float *s = state + w * stride;
        float f = exp2_fast(s[0] - m);
        *sum += s[1] * f;
#pragma unroll
        for (int k = 0; k < N; k++) x[k] += s[2 + first + 32 * k] * f;
    }
    return m;
}

/* The warps' states of turned heads into the result: a warp a head, no barrier. */
template <class S>
KI_DEV void merge_turned(const float *states, const decode_args &a, const ki_plan_item &item,
                         uint32_t first_head, uint32_t n_heads) {
    constexpr uint32_t STRIDE = S::D + 2;
    constexpr int N = S::D / 32;
    uint32_t lane = threadIdx.x % 32;
    uint64_t row = (uint64_t)item.row * a.out_stride;
    for (uint32_t h = threadIdx.x / 32; h < n_heads; h += S::warps()) {
        float sum = 0, x[N] = {};
        add_states<S>(x, &sum, states + h * STRIDE, n_heads, lane);
        float f = sum > 0 ? 1 / sum : 0;
#pragma unroll
        for (int k = 0; k < N; k++) x[k] *= f;
        turn_in_registers<S::D, S::NEAR ? 5 : 3>(x, lane); /* all at once spills in the others */
#pragma unroll
        for (int k = 0; k < N; k++)
            store_out(a.out, a.out_type, row + (first_head + h) * S::D + lane + 32 * k, x[k]);
    }
}

/* The warps' states into the result or the item's state. */
template <class S>
KI_DEV void merge_warps(float *states, const decode_args &a, const ki_plan_item &item,
                        uint32_t item_index, uint32_t first_head, uint32_t n_heads) {
    constexpr uint32_t STRIDE = S::D + 2;
    const uint32_t N = S::warps() * 32;
    constexpr bool ONE_BLOCK = (S::D & (S::D - 1)) == 0, turned = S::PLUS;
    if constexpr (turned && ONE_BLOCK)
        if ((item.splits >> 16) == 1) return merge_turned<S>(states, a, item, first_head, n_heads);
    for (uint32_t k = threadIdx.x; k < n_heads * S::D; k += N) {
        uint32_t h = k / S::D, c = k % S::D;
        float sum = 0, all[1] = {}, m = add_states<S>(all, &sum, states + h * STRIDE, n_heads, c);
        float value = all[0];
        if ((item.splits >> 16) > 1) {
            uint64_t at = (uint64_t)item_index * a.l.n_heads + first_head + h;
            a.state_acc[at * S::D + c] = value;
            if (c == 0) a.states[2 * at] = m, a.states[2 * at + 1] = sum;
            continue;
        }
        value = sum > 0 ? value / sum : 0;
        if (turned)
            states[h * STRIDE + 2 + c] = value; /* warp 0's slot; read above by this thread only */
        else
            store_out(a.out, a.out_type,
                      (uint64_t)item.row * a.out_stride + (first_head + h) * S::D + c, value);
    }
    if (!turned || ONE_BLOCK || (item.splits >> 16) > 1) return;
    /* All heads at once: barriers cost more than what is between them. */
    turn_rows(states + 2, n_heads, STRIDE, S::D, threadIdx.x, N);
    for (uint32_t k = threadIdx.x; k < n_heads * S::D; k += N) {
        uint32_t h = k / S::D, c = k % S::D;
        store_out(a.out, a.out_type,
                  (uint64_t)item.row * a.out_stride + (first_head + h) * S::D + c,
                  states[h * STRIDE + 2 + c]);
    }
}

/* ---- the kernel ---- */

/* The queries that wide channels are gathered from, [8][D] f16 or, as own_queries, one for each
 * warp. */
template <class S>
KI_DEV void share_wide(warp_state<S> &st, uint8_t *to, bool quartered, uint32_t warp,
                       uint32_t lane) {
    constexpr uint32_t ROW = S::HEADS == 1 ? 0 : S::D;
    uint32_t *wide = (uint32_t *)to + (S::HEADS == 1 ? warp * S::D / 2 : 0);
    st.wide_q = (const uint16_t *)wide;
    if (S::HEADS == 1 || warp == 0)
#pragma unroll
        for (int k = 0; k < 2 * S::NJ; k++) { /* a pair of channels stays a pair */
            uint32_t at = ki_order_key_scale(k * 8 + lane % 4 * 2, S::NJ);
            wide[(lane / 4 * ROW + at) / 2] =
                k % 2 && quartered ? mul2(st.q.q[k], TWO_FOURS) : st.q.q[k];
        }
    if (S::HEADS == 1) __syncwarp();
    else __syncthreads();
}

/* The addresses of a warp's units. Ids of the first ones come with the item, all others from the
 * block table, 32 at a time. */
template <class S> struct unit_stream {
    uint32_t n, first, ids; /* units of this warp, the first one, page ids of 32, one a lane */

    __device__ __forceinline__ void fetch(const decode_args &a, const ki_plan_item &item,
                                          uint32_t i, uint32_t lane) {
        const uint32_t *row = a.tables + (uint64_t)item.table * a.table_stride;
        uint32_t mine = i + lane;
        ids = mine < n ? row[(first + mine * S::warps()) / (KI_SUBS / S::NB)] : 0;
    }
    __device__ __forceinline__ const uint8_t *place(const decode_args &a, uint32_t i, uint64_t id,
                                                    uint32_t head) const {
        uint32_t u = (first + i * S::warps()) % (KI_SUBS / S::NB);
        return a.pool + id * a.l.id_bytes +
               ((uint64_t)a.layer * a.l.n_kv_heads + head) * a.l.page_bytes +
               (uint64_t)u * a.unit_bytes;
    }
    __device__ __forceinline__ const uint8_t *at(const decode_args &a, const ki_plan_item &item,
                                                 uint32_t i, uint32_t head, uint32_t lane) {
        if (i % 32 == 0) fetch(a, item, i, lane);
        return place(a, i, __shfl_sync(~0u, ids, i % 32), head);
    }
};

template <class S>
__global__ void __launch_bounds__(S::WARPS * 32, S::BLOCKS)
    ki_decode_kernel(const __grid_constant__ decode_args a) {
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t index = blockIdx.x / a.heads, part = blockIdx.x % a.heads;
#if __CUDA_ARCH__ >= 900
    constexpr bool HAS_SPARE = S::SPARE;
#else
    constexpr bool HAS_SPARE = false;
#endif
    constexpr bool IS_KNOWN = S::WARPS * S::STAGES <= KI_PLAN_UNITS;
    /* One trip: a place without an item is read too, and what comes left alone. */
    const uint32_t n_items = *a.n_items;
    const ki_plan_item *there = a.items + index;
    const ki_plan_item item = *there;
    uint32_t known = IS_KNOWN && lane < KI_PLAN_UNITS ? there->pages[2 + lane] : 0;
    if (index >= n_items) {
        ki_pdl_wait();
        ki_pdl_launch();
        return;
    }
    uint32_t head = part / a.chunks, first_in_group = part % a.chunks * 8;
    uint32_t n_heads = min(8u, a.l.head_group - first_in_group);
    uint32_t first_head = head * a.l.head_group + first_in_group;

    warp_pipe<S::STAGES> pipe = {shared + warp * S::STAGES * a.unit_bytes,
                                 (uint64_t *)(shared + S::warps() * S::STAGES * a.unit_bytes) +
                                     warp * S::STAGES,
                                 a.unit_bytes};
    unit_stream<S> stream = {};
    /* units go to warps from the first one that has a slow block less than those before it */
    uint32_t n_units = item.part.unit_end - item.part.unit_begin, w = S::warps();
    uint32_t rank = (warp + w - (item.part.slow_end - item.part.slow_begin) % w) % w;
    stream.n = n_units > rank ? (n_units - rank + w - 1) / w : 0;
    stream.first = item.part.unit_begin + rank;
    pipe.init(lane);
    if constexpr (!IS_KNOWN) stream.fetch(a, item, 0, lane);
    /* Fast units are older than anything the kernels of this step write, and fetched before
     * waiting; but where a side has 16 bits the last one may hold this step's own row. */
    if (n_units && item.part.unit_end * S::NB * KI_SUB_TOKENS > item.pos) ki_pdl_wait();
#pragma unroll
    for (uint32_t i = 0; i < S::STAGES; i++) {
        if (i < stream.n) {
            uint64_t id = IS_KNOWN ? __shfl_sync(~0u, known, rank + i * S::warps())
                                   : __shfl_sync(~0u, stream.ids, i);
            pipe.issue(i, stream.place(a, i, id, head), lane);
        } else pipe.issue_nothing();
    }
    if (IS_KNOWN && stream.n > S::STAGES) stream.fetch(a, item, 0, lane);
    const uint32_t slow_first = item.part.slow_begin + warp, slow_end = item.part.slow_end;
    const uint32_t slow_mine = slow_first + lane * S::warps();
    const bool takes_row = a.own.k;
    const uint32_t newest = slow_end - 1; /* the sequence's last slow block has the row */
    const bool has_row = takes_row && item.part.slow_begin < slow_end &&
                         !ki_plan_is_old(&item, slow_block_of(item, newest)) &&
                         (newest - item.part.slow_begin) % S::warps() == warp;
    own_queries<S> queries;
    own_row<S> row;
    const uint32_t own_first = S::HEADS == 1 ? 0 : warp; /* each warp turns the one head */
    auto ask_own = [&] {
        queries.load(a.own, item.row, first_head, own_first, n_heads, lane);
        if (has_row) row.load(a, item, head, lane);
    };
    const bool is_late = takes_row && blockIdx.x >= a.n_sms * S::BLOCKS;
    if (is_late) { /* what it waits for is there: the first trip is that of the step's rows */
        ki_pdl_wait();
        ask_own();
    }
    slow_list<S> slow;
    slow.find(a, item, head, slow_mine);
    if (HAS_SPARE && stream.n < S::STAGES) {
        const uint32_t first = item.part.slow_begin, ring = S::STAGES * a.unit_bytes;
        const bool is_common = S::NEAR && a.few && !n_units && slow_end - first <= 32;
        uint8_t *room = is_common ? shared : pipe.data + stream.n * a.unit_bytes;
        const uint8_t *end = is_common ? shared + S::warps() * ring : pipe.data + ring;
        slow.copy_all(room, end, is_common, a, item, first, slow_mine, pipe.spare_bar(), lane);
    }
    slow.bring(a, item, slow_first, S::warps(), lane);
    exact_values<S> values; /* at first those of the first block that has them in memory */
    const typename slow_list<S>::apart_values apart =
        slow.find_apart(a, item, slow_first, S::warps(), lane);
    if (apart.is_old) values.load(apart.v16, apart.rows, lane);
    ki_pdl_wait();
    if (!takes_row) ki_pdl_launch();
    if (HAS_SPARE) slow.end_copies(a, item, slow_mine, pipe.spare_bar(), lane);
    warp_state<S> st = {};
    st.m[0] = st.m[1] = -INFINITY;
    uint32_t g = lane / 4, q_head = first_head + g % S::HEADS;
    bool is_head = g % S::HEADS < n_heads;
    if (takes_row && !is_late) ask_own();
    if (!apart.is_old && !takes_row) values.load(apart.v16, apart.rows, lane);
    const uint16_t *q_row = a.q + ((uint64_t)item.row * a.l.n_heads + q_head) * S::D;
    if (takes_row) {
        uint16_t *own = (uint16_t *)(shared + S::warps() * S::STAGES * (a.unit_bytes + 8));
        if (S::HEADS == 1) own += warp * KI_OWN_HALVES(S::D);
        queries.store(own, a.own, item.row, first_head, own_first, n_heads, lane);
        if (S::HEADS == 1) __syncwarp();
        else __syncthreads();
        q_row = own + g % S::HEADS * KI_OWN_HALVES(S::D);
    }
    st.q.load(q_row, is_head, lane);
    st.q.scale(a.factor, S::quartered(a.l), lane);
    if (takes_row) ki_pdl_launch(); /* the next kernel asks for more than memory gives at once */
    if (has_row) row.store(a, item, head, first_in_group == 0, lane);
    if (!apart.is_old && takes_row) values.load(apart.v16, apart.rows, lane);
    if constexpr (S::PLUS)
        share_wide<S>(
            st, shared + S::warps() * S::STAGES * (a.unit_bytes + 8) + 8 * KI_OWN_HALVES(S::D) * 2,
            S::quartered(a.l), warp, lane);
    for (uint32_t k = slow_first, i = 0; k < slow_end; k += S::warps(), i++) {
        uint32_t block = slow_block_of(item, k);
        if (i % 32 == 0 && i) slow.find(a, item, head, k + lane * S::warps());
        slow_place at = slow.get(a.l, i % 32, block);
        if (at.v16 && !at.values_here && i != apart.i)
            values.load(at.v16, value_rows(a.l, item, block), lane);
        if (HAS_SPARE && (at.codes_here || at.keys_here || at.values_here)) {
            pipe.wait_spare();
            if (has_row && k == newest) row.put_here(item, at, lane);
        }
        slow_block<S>(st, a, item, at, values, block, S::NEAR && i == 0, lane);
    }
    uint32_t v_bits = S::v_bits(a.l);
    if (!S::NEAR || stream.n) convert_units<S>(st, 1 / row_unit(v_bits), 1 / row8_unit(v_bits));
    for (uint32_t i = 0; i < stream.n; i++) {
        uint32_t u = stream.first + i * S::warps();
        if constexpr (S::HEADS < 8) copied_unit<S>(st, a.l, pipe.wait(i), lane);
        else
            fast_unit<S>(st, a.l, pipe.wait(i), u % (KI_SUBS / S::NB) * S::NB * KI_SUB_TOKENS,
                         lane);
        __syncwarp();
        uint32_t later = i + S::STAGES;
        if (later < stream.n) pipe.issue(later, stream.at(a, item, later, head, lane), lane);
        else pipe.issue_nothing();
    }
    if (!S::NEAR || stream.n) convert_units<S>(st, row_unit(v_bits), row8_unit(v_bits));
    __syncthreads(); /* the stages become the place where warps meet */
    float *states = (float *)shared;
    put_state<S>(states + warp * n_heads * (S::D + 2), st, a.l, n_heads, lane);
    __syncthreads();
    merge_warps<S>(states, a, item, index, first_head, n_heads);
}

#endif
