/* simd_neon.h: the sixteen lanes of simd.h in four registers of aarch64; simd.h includes this where
 * KI_SIMD_NEON is defined. Where an arm instruction differs from the definition in a corner, it is
 * not used: minimum and maximum compare and select (fmin and fmax return the NaN), and a float16 is
 * rounded up by way of the nearest one, as in scalar (there is no conversion with a direction).
 *
 * Byte products come in two forms: one instruction where the file is compiled for FEAT_DotProd, and
 * widening multiplies for every aarch64. Integer sums are exact, so both give the same bytes. */
#ifndef KI_SIMD_NEON_H
#define KI_SIMD_NEON_H
#if defined(KI_SIMD_NEON)
#include <arm_neon.h>

/* Lanes 0 to 3, 4 to 7, 8 to 11, 12 to 15. */
typedef struct vf {
    float32x4_t q0, q1, q2, q3;
} vf;
typedef struct vi {
    int32x4_t q0, q1, q2, q3;
} vi;
typedef vi vb;

/* fn of each quarter of one, two or three vectors. */
#define KI_QUADS1(type, fn, x) ((type){fn((x).q0), fn((x).q1), fn((x).q2), fn((x).q3)})
#define KI_QUADS2(type, fn, x, y)                                                                  \
    ((type){fn((x).q0, (y).q0), fn((x).q1, (y).q1), fn((x).q2, (y).q2), fn((x).q3, (y).q3)})
#define KI_QUADS3(type, fn, x, y, z)                                                               \
    ((type){fn((x).q0, (y).q0, (z).q0), fn((x).q1, (y).q1, (z).q1), fn((x).q2, (y).q2, (z).q2),    \
            fn((x).q3, (y).q3, (z).q3)})

/* ---- float32 ---- */

KI_INLINE vf vf_load(const float *p) {
    return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
KI_INLINE void vf_store(float *p, vf a) {
    vst1q_f32(p, a.q0);
    vst1q_f32(p + 4, a.q1);
    vst1q_f32(p + 8, a.q2);
    vst1q_f32(p + 12, a.q3);
}
KI_INLINE vf vf_set(float x) {
    float32x4_t v = vdupq_n_f32(x);
    return (vf){v, v, v, v};
}
KI_INLINE vf vf_add(vf a, vf b) { return KI_QUADS2(vf, vaddq_f32, a, b); }
KI_INLINE vf vf_sub(vf a, vf b) { return KI_QUADS2(vf, vsubq_f32, a, b); }
KI_INLINE vf vf_mul(vf a, vf b) { return KI_QUADS2(vf, vmulq_f32, a, b); }
KI_INLINE vf vf_div(vf a, vf b) { return KI_QUADS2(vf, vdivq_f32, a, b); }
KI_INLINE vf vf_fma(vf a, vf b, vf c) { return KI_QUADS3(vf, vfmaq_f32, c, a, b); }
/* The second operand when they are equal or one is NaN. */
KI_INLINE float32x4_t quad_min(float32x4_t a, float32x4_t b) {
    return vbslq_f32(vcltq_f32(a, b), a, b);
}
KI_INLINE float32x4_t quad_max(float32x4_t a, float32x4_t b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}
KI_INLINE vf vf_min2(vf a, vf b) { return KI_QUADS2(vf, quad_min, a, b); }
KI_INLINE vf vf_max2(vf a, vf b) { return KI_QUADS2(vf, quad_max, a, b); }
KI_INLINE vf vf_abs(vf a) { return KI_QUADS1(vf, vabsq_f32, a); }
KI_INLINE vf vf_rint(vf a) { return KI_QUADS1(vf, vrndnq_f32, a); }
KI_INLINE float32x4_t quad_zero_where_zero(float32x4_t value, float32x4_t test) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vceqzq_f32(test)));
}
KI_INLINE vf vf_zero_where_zero(vf value, vf test) {
    return KI_QUADS2(vf, quad_zero_where_zero, value, test);
}
KI_INLINE float32x4_t quad_zero_unless_above(float32x4_t value, float32x4_t x, float32x4_t limit) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(value), vcgtq_f32(x, limit)));
}
KI_INLINE vf vf_zero_unless_above(vf value, vf x, float limit) {
    vf l = vf_set(limit);
    return KI_QUADS3(vf, quad_zero_unless_above, value, x, l);
}

/* ---- 16 bit ---- */

KI_INLINE vf vf_load_f16(const uint16_t *p) {
    float16x8_t lo = vreinterpretq_f16_u16(vld1q_u16(p)),
                hi = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return (vf){vcvt_f32_f16(vget_low_f16(lo)), vcvt_high_f32_f16(lo),
                vcvt_f32_f16(vget_low_f16(hi)), vcvt_high_f32_f16(hi)};
}
KI_INLINE uint16x8_t octet_f16(float32x4_t lo, float32x4_t hi) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(lo), hi));
}
KI_INLINE void vf_store_f16(uint16_t *p, vf a) {
    vst1q_u16(p, octet_f16(a.q0, a.q1));
    vst1q_u16(p + 8, octet_f16(a.q2, a.q3));
}
/* The next bit pattern, where the nearest float16 is below: its lanes lose a mask of ones. */
KI_INLINE uint16x8_t octet_f16_up(float32x4_t lo, float32x4_t hi) {
    uint16x8_t h = octet_f16(lo, hi);
    float16x8_t near = vreinterpretq_f16_u16(h);
    uint32x4_t low_mask = vcltq_f32(vcvt_f32_f16(vget_low_f16(near)), lo);
    uint32x4_t high_mask = vcltq_f32(vcvt_high_f32_f16(near), hi);
    return vsubq_u16(h, vmovn_high_u32(vmovn_u32(low_mask), high_mask));
}
/* The smallest float16 >= a, for a >= 0. */
KI_INLINE void vf_store_f16_up(uint16_t *p, vf a) {
    vst1q_u16(p, octet_f16_up(a.q0, a.q1));
    vst1q_u16(p + 8, octet_f16_up(a.q2, a.q3));
}
KI_INLINE vf vf_load_bf16(const uint16_t *p) {
    uint16x8_t lo = vld1q_u16(p), hi = vld1q_u16(p + 8);
    return (vf){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(lo), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(lo, 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(hi), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(hi, 16))};
}

/* ---- int32 ---- */

KI_INLINE vf vf_from_vi(vi a) { return KI_QUADS1(vf, vcvtq_f32_s32, a); }
KI_INLINE vi vf_to_vi(vf a) { return KI_QUADS1(vi, vcvtnq_s32_f32, a); }
KI_INLINE vf vf_from_bits(vi a) { return KI_QUADS1(vf, vreinterpretq_f32_s32, a); }
KI_INLINE vi vf_bits(vf a) { return KI_QUADS1(vi, vreinterpretq_s32_f32, a); }
KI_INLINE vi vi_set(int32_t x) {
    int32x4_t v = vdupq_n_s32(x);
    return (vi){v, v, v, v};
}
KI_INLINE vi vi_load(const int32_t *p) {
    return (vi){vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
}
KI_INLINE void vi_store(int32_t *p, vi a) {
    vst1q_s32(p, a.q0);
    vst1q_s32(p + 4, a.q1);
    vst1q_s32(p + 8, a.q2);
    vst1q_s32(p + 12, a.q3);
}
KI_INLINE vi vi_add(vi a, vi b) { return KI_QUADS2(vi, vaddq_s32, a, b); }
KI_INLINE vi vi_sub(vi a, vi b) { return KI_QUADS2(vi, vsubq_s32, a, b); }
KI_INLINE vi vi_and(vi a, vi b) { return KI_QUADS2(vi, vandq_s32, a, b); }
KI_INLINE vi vi_or(vi a, vi b) { return KI_QUADS2(vi, vorrq_s32, a, b); }
/* Operators, so that a constant count becomes an immediate. */
KI_INLINE vi vi_shl(vi a, unsigned n) {
    return (vi){a.q0 << (int)n, a.q1 << (int)n, a.q2 << (int)n, a.q3 << (int)n};
}
KI_INLINE int32x4_t quad_shr(int32x4_t a, unsigned n) {
    return vreinterpretq_s32_u32(vreinterpretq_u32_s32(a) >> n);
}
KI_INLINE vi vi_shr(vi a, unsigned n) { /* logical */
    return (vi){quad_shr(a.q0, n), quad_shr(a.q1, n), quad_shr(a.q2, n), quad_shr(a.q3, n)};
}
KI_INLINE vi vi_sar(vi a, unsigned n) {
    return (vi){a.q0 >> (int)n, a.q1 >> (int)n, a.q2 >> (int)n, a.q3 >> (int)n};
}
KI_INLINE void vi_store_i8(int8_t *p, vi a) {
    int16x8_t lo = vmovn_high_s32(vmovn_s32(a.q0), a.q1),
              hi = vmovn_high_s32(vmovn_s32(a.q2), a.q3);
    vst1q_s8(p, vmovn_high_s16(vmovn_s16(lo), hi));
}
/* Sixteen signed bytes, widened. */
KI_INLINE vi vi_load_i8(const int8_t *p) {
    int8x16_t b = vld1q_s8(p);
    int16x8_t lo = vmovl_s8(vget_low_s8(b)), hi = vmovl_s8(vget_high_s8(b));
    return (vi){vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)),
                vmovl_s16(vget_low_s16(hi)), vmovl_s16(vget_high_s16(hi))};
}
/* Lane i gets lane i ^ n. */
KI_INLINE float32x4_t quad_halves(float32x4_t a) { return vextq_f32(a, a, 2); }
KI_INLINE vf vf_swap1(vf a) { return KI_QUADS1(vf, vrev64q_f32, a); }
KI_INLINE vf vf_swap2(vf a) { return KI_QUADS1(vf, quad_halves, a); }
KI_INLINE vf vf_swap4(vf a) { return (vf){a.q1, a.q0, a.q3, a.q2}; }
KI_INLINE vf vf_swap8(vf a) { return (vf){a.q2, a.q3, a.q0, a.q1}; }

/* ---- bytes ---- */

/* 15-bit integers of four vectors as 128 high + low, low >= 0: the quads of lanes 4 j .. 4 j + 3 of
 * a, b, c, d side by side. */
KI_INLINE void quad_split15(int32x4_t *high, int32x4_t *low, int32x4_t a, int32x4_t b, int32x4_t c,
                            int32x4_t d) {
    int16x8_t ab = vmovn_high_s32(vmovn_s32(a), b), cd = vmovn_high_s32(vmovn_s32(c), d);
    int16x8_t mask = vdupq_n_s16(127);
    *high = vreinterpretq_s32_s8(
        vmovn_high_s16(vmovn_s16(vshrq_n_s16(ab, 7)), vshrq_n_s16(cd, 7)));
    *low = vreinterpretq_s32_s8(
        vmovn_high_s16(vmovn_s16(vandq_s16(ab, mask)), vandq_s16(cd, mask)));
}
KI_INLINE void vb_split15(vb *high, vb *low, vi a, vi b, vi c, vi d) {
    quad_split15(&high->q0, &low->q0, a.q0, b.q0, c.q0, d.q0);
    quad_split15(&high->q1, &low->q1, a.q1, b.q1, c.q1, d.q1);
    quad_split15(&high->q2, &low->q2, a.q2, b.q2, c.q2, d.q2);
    quad_split15(&high->q3, &low->q3, a.q3, b.q3, c.q3, d.q3);
}

KI_INLINE vb vb_load(const void *p) { return vi_load(p); }
KI_INLINE void vb_store(void *p, vb a) { vi_store(p, a); }
KI_INLINE vb vb_xor(vb a, vb b) { return KI_QUADS2(vi, veorq_s32, a, b); }

/* Unsigned bytes less 128, as signed ones. */
KI_INLINE int8x16_t quad_less_128(int32x4_t u) {
    return vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(u), vdupq_n_u8(0x80)));
}
#if defined(__ARM_FEATURE_DOTPROD)
KI_INLINE int32x4_t quad_dot_u7(int32x4_t acc, int32x4_t u, int32x4_t s) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(u), vreinterpretq_s8_s32(s));
}
/* u s = (u - 128) s - (-128) s; where s is one broadcast for four quarters, so is its part. */
KI_INLINE int32x4_t quad_dot_u8(int32x4_t acc, int32x4_t u, int32x4_t s) {
    int8x16_t bytes = vreinterpretq_s8_s32(s);
    int32x4_t excess = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), bytes);
    return vsubq_s32(vdotq_s32(acc, quad_less_128(u), bytes), excess);
}
#else
/* Two products of 7 and 8 bits still fit an int16: 2 * 127 * 128 < 2^15. */
KI_INLINE int32x4_t quad_dot_u7(int32x4_t acc, int32x4_t u, int32x4_t s) {
    int8x16_t x = vreinterpretq_s8_s32(u), y = vreinterpretq_s8_s32(s);
    int16x8_t lo = vmull_s8(vget_low_s8(x), vget_low_s8(y)), hi = vmull_high_s8(x, y);
    return vpadalq_s16(acc, vpaddq_s16(lo, hi));
}
/* u s = (u - 128) s + 128 s, and (-128)(-128) twice does not fit: pairs are added as int32. */
KI_INLINE int32x4_t quad_dot_u8(int32x4_t acc, int32x4_t u, int32x4_t s) {
    int8x16_t x = quad_less_128(u), y = vreinterpretq_s8_s32(s);
    int16x8_t lo = vmull_s8(vget_low_s8(x), vget_low_s8(y)), hi = vmull_high_s8(x, y);
    int32x4_t sum = vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi));
    int32x4_t excess = vshlq_n_s32(vpaddlq_s16(vpaddlq_s8(y)), 7);
    return vaddq_s32(vaddq_s32(acc, sum), excess);
}
#endif
KI_INLINE vi vi_dot_u7(vi acc, vb u, vb s) { return KI_QUADS3(vi, quad_dot_u7, acc, u, s); }
KI_INLINE vi vi_dot_u8(vi acc, vb u, vb s) { return KI_QUADS3(vi, quad_dot_u8, acc, u, s); }
#define KI_WIDE_SUMS 1

/* ---- across lanes: i + 8, then i + 4, i + 2, i + 1 ---- */

KI_INLINE float vf_sum(vf a) {
    float32x4_t v = vaddq_f32(vaddq_f32(a.q0, a.q2), vaddq_f32(a.q1, a.q3));
    float32x2_t w = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(w, 0) + vget_lane_f32(w, 1);
}
KI_INLINE float vf_max(vf a) {
    float32x4_t v = quad_max(quad_max(a.q0, a.q2), quad_max(a.q1, a.q3));
    v = quad_max(v, vextq_f32(v, v, 2));
    float x = vgetq_lane_f32(v, 0), y = vgetq_lane_f32(v, 1);
    return x > y ? x : y;
}
KI_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif
#endif
