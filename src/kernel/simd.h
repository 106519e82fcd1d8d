/* simd.h: sixteen virtual lanes, the same on every machine.
 *
 * Kernels are written once, over vectors of 16 float32, 16 int32 or 64 bytes. Each instruction set
 * maps them to its registers (AVX-512: one; AVX2: two halves; NEON: four quarters, simd_neon.h;
 * scalar: loops), and every operation here gives the same bits on all of them: lanes never mix
 * except in vf_sum and vf_max, whose trees are fixed. So a kernel's result cannot depend on the
 * machine. This header is included once per instruction set by isa_<name>.c and stays inside that
 * file.
 *
 * vf f32 lanes   vi i32 lanes   vb bytes (an i32 lane holds 4 neighbours) */
#ifndef KI_SIMD_H
#define KI_SIMD_H
#include "base.h"

#include <math.h>

/* Kernels depend on inlining for speed; sixteen lanes of loops under a sanitizer would keep the
 * compiler busy for a quarter of an hour, so there the scalar lanes stay functions. */
#if defined(KI_DEBUG) && !defined(__AVX2__) && !defined(KI_SIMD_NEON)
#define KI_INLINE static __attribute__((noinline, unused))
#else
#define KI_INLINE static inline __attribute__((always_inline, unused))
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

KI_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
KI_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
KI_INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
KI_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
KI_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
KI_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
KI_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
KI_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
KI_INLINE vf vf_min2(vf a, vf b) { return _mm512_min_ps(a, b); }
KI_INLINE vf vf_max2(vf a, vf b) { return _mm512_max_ps(a, b); }
KI_INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
KI_INLINE vf vf_rint(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
KI_INLINE vf vf_zero_where_zero(vf value, vf test) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_NEQ_UQ), value);
}
KI_INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
KI_INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* The smallest float16 >= a, for a >= 0. */
KI_INLINE void vf_store_f16_up(uint16_t *p, vf a) {
    __m256i h = _mm512_cvtps_ph(a, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)p, h);
}
KI_INLINE vf vf_load_bf16(const uint16_t *p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
KI_INLINE vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
KI_INLINE vi vf_to_vi(vf a) { return _mm512_cvtps_epi32(a); }
KI_INLINE vf vf_from_bits(vi a) { return _mm512_castsi512_ps(a); }
KI_INLINE vi vf_bits(vf a) { return _mm512_castps_si512(a); }

KI_INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
KI_INLINE vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
KI_INLINE void vi_store(int32_t *p, vi a) { _mm512_storeu_si512(p, a); }
KI_INLINE vi vi_load_i8(const int8_t *p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
KI_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
KI_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
KI_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
KI_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
KI_INLINE vi vi_shl(vi a, unsigned n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128((int)n)); }
KI_INLINE vi vi_shr(vi a, unsigned n) {
    return _mm512_srl_epi32(a, _mm_cvtsi32_si128((int)n));
} /* logical */
KI_INLINE vi vi_sar(vi a, unsigned n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128((int)n)); }
KI_INLINE void vi_store_i8(int8_t *p, vi a) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a));
}

KI_INLINE vb vb_load(const void *p) { return _mm512_loadu_si512(p); }
KI_INLINE void vb_store(void *p, vb a) { _mm512_storeu_si512(p, a); }
KI_INLINE vb vb_xor(vb a, vb b) { return _mm512_xor_si512(a, b); }
KI_INLINE vi dot_pairs_add(vi acc, __m512i pairs) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#if defined(__AVX512VNNI__)
#define KI_WIDE_SUMS 1
KI_INLINE vi vi_dot_u7(vi acc, vb u, vb s) { return _mm512_dpbusd_epi32(acc, u, s); }
KI_INLINE vi vi_dot_u8(vi acc, vb u, vb s) { return _mm512_dpbusd_epi32(acc, u, s); }
#else
KI_INLINE vi vi_dot_u7(vi acc, vb u, vb s) {
    return dot_pairs_add(acc, _mm512_maddubs_epi16(u, s));
}
KI_INLINE vi vi_dot_u8(vi acc, vb u, vb s) {
    __m512i low = _mm512_and_si512(u, _mm512_set1_epi8(0x7f));
    __m512i top = _mm512_and_si512(_mm512_srli_epi16(u, 7), _mm512_set1_epi8(1));
    acc = dot_pairs_add(acc, _mm512_maddubs_epi16(low, s));
    __m512i high = _mm512_madd_epi16(_mm512_maddubs_epi16(top, s), _mm512_set1_epi16(1));
    return _mm512_add_epi32(acc, _mm512_slli_epi32(high, 7));
}
typedef __m512i vs;
KI_INLINE vs vs_zero(void) { return _mm512_setzero_si512(); }
KI_INLINE vs vs_dot(vs acc, vb u, vb s) {
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16(u, s));
}
KI_INLINE vi vi_add_part(vi acc, unsigned part, vs a) { return (void)part, dot_pairs_add(acc, a); }
KI_INLINE vi vi_add_part128(vi acc, unsigned part, vs a) {
    (void)part;
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, _mm512_set1_epi16(128)));
}
#define KI_DOT16 1
KI_INLINE vi vi_dot16(vi acc, vi a, vi b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
KI_INLINE vi vi_sub16(vi a, vi b) { return _mm512_sub_epi16(a, b); }
#endif
KI_INLINE float vf_sum(vf a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
KI_INLINE float vf_max(vf a) {
    __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
KI_INLINE float fma1(float a, float b, float c) {
    return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
}
/* Sum (largest) of each of n <= 16 vectors (those past n are zero), in vf_sum's tree. Halves,
 * quarters, pairs and lanes of two vectors are brought side by side, so one addition serves both;
 * row r ends in lane 4 (r % 4) + r / 4 and a last permutation puts it right. */
#define KI_TREE_512(name, op)                                                                      \
    KI_INLINE vf name(const vf *rows, unsigned n) {                                                \
        vf h[8], q[4], d[2];                                                                       \
        d[1] = _mm512_setzero_ps();                                                                \
        for (unsigned i = 0; i < (n > 8 ? 8 : 4); i++)                                             \
            h[i] = op(_mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0x44),                    \
                      _mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0xee));                   \
        for (unsigned i = 0; i < (n > 8 ? 4 : 2); i++)                                             \
            q[i] = op(_mm512_shuffle_f32x4(h[2 * i], h[2 * i + 1], 0x88),                          \
                      _mm512_shuffle_f32x4(h[2 * i], h[2 * i + 1], 0xdd));                         \
        for (unsigned i = 0; i < (n > 8 ? 2 : 1); i++)                                             \
            d[i] = op(_mm512_shuffle_ps(q[2 * i], q[2 * i + 1], 0x44),                             \
                      _mm512_shuffle_ps(q[2 * i], q[2 * i + 1], 0xee));                            \
        vf r = op(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));       \
        return _mm512_permutexvar_ps(                                                              \
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), r);           \
    }
KI_TREE_512(vf_sums, _mm512_add_ps)
KI_TREE_512(vf_maxes, _mm512_max_ps)
/* Integers of 15 bits, -16256..16256, of four vectors in two bytes: 128 high + low, low >= 0. The
 * quads of lanes 4 j .. 4 j + 3 of a, b, c, d stand next to each other, as one instruction packs
 * them within 128 bits. */
KI_INLINE void vb_split15(vb *high, vb *low, vi a, vi b, vi c, vi d) {
    __m512i ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    __m512i mask = _mm512_set1_epi16(127);
    *high = _mm512_packs_epi16(_mm512_srai_epi16(ab, 7), _mm512_srai_epi16(cd, 7));
    *low = _mm512_packs_epi16(_mm512_and_si512(ab, mask), _mm512_and_si512(cd, mask));
}
KI_INLINE vf vf_zero_unless_above(vf value, vf x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GT_OQ), value);
}
/* Lane i gets lane i ^ n. */
KI_INLINE vf vf_swap1(vf a) { return _mm512_permute_ps(a, 0xb1); }
KI_INLINE vf vf_swap2(vf a) { return _mm512_permute_ps(a, 0x4e); }
KI_INLINE vf vf_swap4(vf a) { return _mm512_shuffle_f32x4(a, a, 0xb1); }
KI_INLINE vf vf_swap8(vf a) { return _mm512_shuffle_f32x4(a, a, 0x4e); }

#elif defined(__AVX2__)
#include <immintrin.h>
typedef struct vf {
    __m256 lo, hi;
} vf;
typedef struct vi {
    __m256i lo, hi;
} vi;
typedef vi vb;
#define VF2(expr_lo, expr_hi) ((vf){(expr_lo), (expr_hi)})
#define VI2(expr_lo, expr_hi) ((vi){(expr_lo), (expr_hi)})

KI_INLINE vf vf_load(const float *p) { return VF2(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
KI_INLINE void vf_store(float *p, vf a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
KI_INLINE vf vf_set(float x) { return VF2(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
KI_INLINE vf vf_add(vf a, vf b) {
    return VF2(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi));
}
KI_INLINE vf vf_sub(vf a, vf b) {
    return VF2(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi));
}
KI_INLINE vf vf_mul(vf a, vf b) {
    return VF2(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi));
}
KI_INLINE vf vf_div(vf a, vf b) {
    return VF2(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi));
}
KI_INLINE vf vf_fma(vf a, vf b, vf c) {
    return VF2(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}
KI_INLINE vf vf_min2(vf a, vf b) {
    return VF2(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi));
}
KI_INLINE vf vf_max2(vf a, vf b) {
    return VF2(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi));
}
KI_INLINE vf vf_abs(vf a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return VF2(_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi));
}
#define KI_NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
KI_INLINE vf vf_rint(vf a) {
    return VF2(_mm256_round_ps(a.lo, KI_NEAREST), _mm256_round_ps(a.hi, KI_NEAREST));
}
KI_INLINE vf vf_zero_where_zero(vf value, vf test) {
    __m256 z = _mm256_setzero_ps();
    return VF2(_mm256_and_ps(value.lo, _mm256_cmp_ps(test.lo, z, _CMP_NEQ_UQ)),
               _mm256_and_ps(value.hi, _mm256_cmp_ps(test.hi, z, _CMP_NEQ_UQ)));
}
KI_INLINE vf vf_load_f16(const uint16_t *p) {
    return VF2(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
               _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
KI_INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.lo, KI_NEAREST));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.hi, KI_NEAREST));
}
/* The smallest float16 >= a, for a >= 0. */
KI_INLINE void vf_store_f16_up(uint16_t *p, vf a) {
    _mm_storeu_si128((__m128i *)p,
                     _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(p + 8),
                     _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
KI_INLINE vf vf_load_bf16(const uint16_t *p) {
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return VF2(_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
               _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16)));
}
KI_INLINE vf vf_from_vi(vi a) { return VF2(_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)); }
KI_INLINE vi vf_to_vi(vf a) { return VI2(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)); }
KI_INLINE vf vf_from_bits(vi a) {
    return VF2(_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi));
}
KI_INLINE vi vf_bits(vf a) { return VI2(_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)); }

KI_INLINE vi vi_set(int32_t x) { return VI2(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
KI_INLINE vi vi_load(const int32_t *p) {
    return VI2(_mm256_loadu_si256((const __m256i *)p),
               _mm256_loadu_si256((const __m256i *)(p + 8)));
}
KI_INLINE void vi_store(int32_t *p, vi a) {
    _mm256_storeu_si256((__m256i *)p, a.lo);
    _mm256_storeu_si256((__m256i *)(p + 8), a.hi);
}
KI_INLINE vi vi_load_i8(const int8_t *p) {
    return VI2(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
               _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))));
}
KI_INLINE vi vi_add(vi a, vi b) {
    return VI2(_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi));
}
KI_INLINE vi vi_sub(vi a, vi b) {
    return VI2(_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi));
}
KI_INLINE vi vi_and(vi a, vi b) {
    return VI2(_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi));
}
KI_INLINE vi vi_or(vi a, vi b) {
    return VI2(_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi));
}
KI_INLINE vi vi_shl(vi a, unsigned n) {
    __m128i c = _mm_cvtsi32_si128((int)n);
    return VI2(_mm256_sll_epi32(a.lo, c), _mm256_sll_epi32(a.hi, c));
}
KI_INLINE vi vi_shr(vi a, unsigned n) { /* logical */
    __m128i c = _mm_cvtsi32_si128((int)n);
    return VI2(_mm256_srl_epi32(a.lo, c), _mm256_srl_epi32(a.hi, c));
}
KI_INLINE vi vi_sar(vi a, unsigned n) {
    __m128i c = _mm_cvtsi32_si128((int)n);
    return VI2(_mm256_sra_epi32(a.lo, c), _mm256_sra_epi32(a.hi, c));
}
KI_INLINE void vi_store_i8(int8_t *p, vi a) {
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    _mm_storeu_si128((__m128i *)p,
                     _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
KI_INLINE vb vb_load(const void *p) { return vi_load(p); }
KI_INLINE void vb_store(void *p, vb a) { vi_store(p, a); }
KI_INLINE vb vb_xor(vb a, vb b) {
    return VI2(_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi));
}
KI_INLINE __m256i dot_half_u7(__m256i acc, __m256i u, __m256i s) {
    return _mm256_add_epi32(acc,
                            _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
/* maddubs saturates at int16: bytes of 128 and more go in two parts, 7 bits and the top one. */
KI_INLINE __m256i dot_half_u8(__m256i acc, __m256i u, __m256i s) {
    __m256i top = _mm256_and_si256(_mm256_srli_epi16(u, 7), _mm256_set1_epi8(1));
    __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(top, s), _mm256_set1_epi16(1));
    acc = dot_half_u7(acc, _mm256_and_si256(u, _mm256_set1_epi8(0x7f)), s);
    return _mm256_add_epi32(acc, _mm256_slli_epi32(high, 7));
}
KI_INLINE vi vi_dot_u7(vi acc, vb u, vb s) {
    return VI2(dot_half_u7(acc.lo, u.lo, s.lo), dot_half_u7(acc.hi, u.hi, s.hi));
}
KI_INLINE vi vi_dot_u8(vi acc, vb u, vb s) {
    return VI2(dot_half_u8(acc.lo, u.lo, s.lo), dot_half_u8(acc.hi, u.hi, s.hi));
}
typedef __m256i vp, vs;
typedef __m256 vh;
#define KI_PARTS 2
#define KI_DOT_VECTORS 1 /* sixteen registers */
KI_INLINE vp vp_load(const uint32_t *p, unsigned part) {
    return _mm256_loadu_si256((const __m256i *)(p + part * 8));
}
KI_INLINE vp vp_of(vb a, unsigned part) { return part ? a.hi : a.lo; }
KI_INLINE vp vp_set(uint32_t x) { return _mm256_set1_epi32((int)x); }
KI_INLINE vp vp_field(vp a, unsigned shift, vp mask) {
    return _mm256_and_si256(_mm256_srl_epi32(a, _mm_cvtsi32_si128((int)shift)), mask);
}
KI_INLINE vp vp_shl(vp a, unsigned n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128((int)n)); }
KI_INLINE vp vp_or(vp a, vp b) { return _mm256_or_si256(a, b); }
KI_INLINE void vp_store(int8_t *p, vp a) { _mm256_storeu_si256((__m256i *)p, a); }
KI_INLINE vh vh_load(const float *p) { return _mm256_loadu_ps(p); }
KI_INLINE void vh_store(float *p, vh a) { _mm256_storeu_ps(p, a); }
KI_INLINE vh vh_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
KI_INLINE vh vh_set(float x) { return _mm256_set1_ps(x); }
KI_INLINE vh vh_mul(vh a, vh b) { return _mm256_mul_ps(a, b); }
KI_INLINE vh vh_fma(vh a, vh b, vh c) { return _mm256_fmadd_ps(a, b, c); }
KI_INLINE vh vh_max2(vh a, vh b) { return _mm256_max_ps(a, b); }
KI_INLINE vh vh_abs(vh a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
KI_INLINE vp vh_to_vp(vh a) { return _mm256_cvtps_epi32(a); }
KI_INLINE vf vf_with_part(vf a, unsigned part, vh b) {
    if (part) a.hi = b;
    else a.lo = b;
    return a;
}
KI_INLINE vs vs_zero(void) { return _mm256_setzero_si256(); }
KI_INLINE vs vs_dot(vs acc, vp u, vp s) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, s));
    __asm__("" : "+x"(acc)); /* or the compiler makes all products first and spills them */
    return acc;
}
KI_INLINE vi add_part_times(vi acc, unsigned part, vs a, int16_t times) {
    const __m256i wide = _mm256_madd_epi16(a, _mm256_set1_epi16(times));
    if (part) acc.hi = _mm256_add_epi32(acc.hi, wide);
    else acc.lo = _mm256_add_epi32(acc.lo, wide);
    return acc;
}
KI_INLINE vi vi_add_part(vi acc, unsigned part, vs a) { return add_part_times(acc, part, a, 1); }
KI_INLINE vi vi_add_part128(vi acc, unsigned part, vs a) {
    return add_part_times(acc, part, a, 128);
}
#define KI_DOT16 1
KI_INLINE vi vi_dot16(vi acc, vi a, vi b) {
    acc = VI2(_mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, b.lo)),
              _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, b.hi)));
    __asm__("" : "+x"(acc.lo), "+x"(acc.hi));
    return acc;
}
KI_INLINE vi vi_sub16(vi a, vi b) {
    return VI2(_mm256_sub_epi16(a.lo, b.lo), _mm256_sub_epi16(a.hi, b.hi));
}
KI_INLINE float vf_sum(vf a) {
    __m256 b = _mm256_add_ps(a.lo, a.hi);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
KI_INLINE float vf_max(vf a) {
    __m256 b = _mm256_max_ps(a.lo, a.hi);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
KI_INLINE float fma1(float a, float b, float c) {
    return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
}
/* As KI_TREE_512, of eight rows at a time, whose row r ends in lane r / 2 + 4 (r % 2). */
#define KI_TREE_256(name, op)                                                                      \
    KI_INLINE __m256 name##_8(const vf *rows) {                                                    \
        __m256 h[4], q[2], b[2];                                                                   \
        for (unsigned i = 0; i < 4; i++) {                                                         \
            for (unsigned j = 0; j < 2; j++) b[j] = op(rows[2 * i + j].lo, rows[2 * i + j].hi);    \
            h[i] = op(_mm256_permute2f128_ps(b[0], b[1], 0x20),                                    \
                      _mm256_permute2f128_ps(b[0], b[1], 0x31));                                   \
        }                                                                                          \
        for (unsigned i = 0; i < 2; i++)                                                           \
            q[i] = op(_mm256_shuffle_ps(h[2 * i], h[2 * i + 1], 0x44),                             \
                      _mm256_shuffle_ps(h[2 * i], h[2 * i + 1], 0xee));                            \
        __m256 r = op(_mm256_shuffle_ps(q[0], q[1], 0x88), _mm256_shuffle_ps(q[0], q[1], 0xdd));   \
        return _mm256_permutevar8x32_ps(r, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));             \
    }                                                                                              \
    KI_INLINE vf name(const vf *rows, unsigned n) {                                                \
        return VF2(name##_8(rows), n > 8 ? name##_8(rows + 8) : _mm256_setzero_ps());              \
    }
KI_TREE_256(vf_sums, _mm256_add_ps)
KI_TREE_256(vf_maxes, _mm256_max_ps)
KI_INLINE void split15_half(__m256i *high, __m256i *low, __m256i a, __m256i b, __m256i c,
                            __m256i d) {
    __m256i ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    __m256i mask = _mm256_set1_epi16(127);
    *high = _mm256_packs_epi16(_mm256_srai_epi16(ab, 7), _mm256_srai_epi16(cd, 7));
    *low = _mm256_packs_epi16(_mm256_and_si256(ab, mask), _mm256_and_si256(cd, mask));
}
KI_INLINE void vp_split15(vp *high, vp *low, vp a, vp b, vp c, vp d) {
    split15_half(high, low, a, b, c, d);
}
KI_INLINE void vb_split15(vb *high, vb *low, vi a, vi b, vi c, vi d) {
    split15_half(&high->lo, &low->lo, a.lo, b.lo, c.lo, d.lo);
    split15_half(&high->hi, &low->hi, a.hi, b.hi, c.hi, d.hi);
}
KI_INLINE vf vf_zero_unless_above(vf value, vf x, float limit) {
    __m256 l = _mm256_set1_ps(limit);
    return VF2(_mm256_and_ps(value.lo, _mm256_cmp_ps(x.lo, l, _CMP_GT_OQ)),
               _mm256_and_ps(value.hi, _mm256_cmp_ps(x.hi, l, _CMP_GT_OQ)));
}
/* Lane i gets lane i ^ n. */
KI_INLINE vf vf_swap1(vf a) {
    return VF2(_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1));
}
KI_INLINE vf vf_swap2(vf a) {
    return VF2(_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e));
}
KI_INLINE vf vf_swap4(vf a) {
    return VF2(_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1));
}
KI_INLINE vf vf_swap8(vf a) { return VF2(a.hi, a.lo); }

#elif defined(KI_SIMD_NEON)
#include "simd_neon.h"

#else /* scalar: the definition */
typedef struct vf {
    float v[16];
} vf;
typedef struct vi {
    int32_t v[16];
} vi;
typedef vi vb;
#define KI_LANES(type, expression)                                                                 \
    type r;                                                                                        \
    for (int i = 0; i < 16; i++) r.v[i] = (expression);                                            \
    return r

KI_INLINE vf vf_load(const float *p) { KI_LANES(vf, p[i]); }
KI_INLINE void vf_store(float *p, vf a) { memcpy(p, a.v, 64); }
KI_INLINE vf vf_set(float x) { KI_LANES(vf, x); }
KI_INLINE vf vf_add(vf a, vf b) { KI_LANES(vf, a.v[i] + b.v[i]); }
KI_INLINE vf vf_sub(vf a, vf b) { KI_LANES(vf, a.v[i] - b.v[i]); }
KI_INLINE vf vf_mul(vf a, vf b) { KI_LANES(vf, a.v[i] * b.v[i]); }
KI_INLINE vf vf_div(vf a, vf b) { KI_LANES(vf, a.v[i] / b.v[i]); }
KI_INLINE vf vf_fma(vf a, vf b, vf c) { KI_LANES(vf, fmaf(a.v[i], b.v[i], c.v[i])); }
/* As the x86 instructions: the second operand when they are equal or one is NaN. */
KI_INLINE vf vf_min2(vf a, vf b) { KI_LANES(vf, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
KI_INLINE vf vf_max2(vf a, vf b) { KI_LANES(vf, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
KI_INLINE vf vf_abs(vf a) { KI_LANES(vf, fabsf(a.v[i])); }
/* Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds half to even; |a| < 2^22
 * here or integer. */
KI_INLINE float rint1(float x) {
    if (!(fabsf(x) < 4194304.0f)) return rintf(x);
    volatile float shifted = x + 12582912.0f;
    return copysignf(shifted - 12582912.0f, x);
}
KI_INLINE vf vf_rint(vf a) { KI_LANES(vf, rint1(a.v[i])); }
KI_INLINE vf vf_zero_where_zero(vf value, vf test) {
    KI_LANES(vf, test.v[i] != 0 ? value.v[i] : 0.0f);
}
KI_INLINE vf vf_load_f16(const uint16_t *p) { KI_LANES(vf, ki_f16_to_f32(p[i])); }
KI_INLINE void vf_store_f16(uint16_t *p, vf a) {
    for (int i = 0; i < 16; i++) p[i] = ki_f32_to_f16(a.v[i]);
}
/* The smallest float16 >= a, for a >= 0: the next bit pattern is the next number. */
KI_INLINE void vf_store_f16_up(uint16_t *p, vf a) {
    for (int i = 0; i < 16; i++) {
        uint16_t h = ki_f32_to_f16(a.v[i]);
        p[i] = ki_f16_to_f32(h) < a.v[i] ? (uint16_t)(h + 1) : h;
    }
}
KI_INLINE vf vf_load_bf16(const uint16_t *p) { KI_LANES(vf, ki_bf16_to_f32(p[i])); }
KI_INLINE vf vf_from_vi(vi a) { KI_LANES(vf, (float)a.v[i]); }
KI_INLINE vi vf_to_vi(vf a) { KI_LANES(vi, (int32_t)rint1(a.v[i])); }
KI_INLINE vf vf_from_bits(vi a) {
    vf r;
    memcpy(&r, &a, 64);
    return r;
}
KI_INLINE vi vf_bits(vf a) {
    vi r;
    memcpy(&r, &a, 64);
    return r;
}
KI_INLINE vi vi_set(int32_t x) { KI_LANES(vi, x); }
KI_INLINE vi vi_load(const int32_t *p) {
    vi r;
    memcpy(&r, p, 64);
    return r;
}
KI_INLINE void vi_store(int32_t *p, vi a) { memcpy(p, &a, 64); }
KI_INLINE vi vi_load_i8(const int8_t *p) { KI_LANES(vi, p[i]); }
KI_INLINE vi vi_add(vi a, vi b) { KI_LANES(vi, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
KI_INLINE vi vi_sub(vi a, vi b) { KI_LANES(vi, (int32_t)((uint32_t)a.v[i] - (uint32_t)b.v[i])); }
KI_INLINE vi vi_and(vi a, vi b) { KI_LANES(vi, a.v[i] & b.v[i]); }
KI_INLINE vi vi_or(vi a, vi b) { KI_LANES(vi, a.v[i] | b.v[i]); }
KI_INLINE vi vi_shl(vi a, unsigned n) { KI_LANES(vi, (int32_t)((uint32_t)a.v[i] << n)); }
KI_INLINE vi vi_shr(vi a, unsigned n) {
    KI_LANES(vi, (int32_t)((uint32_t)a.v[i] >> n));
} /* logical */
KI_INLINE vi vi_sar(vi a, unsigned n) { KI_LANES(vi, a.v[i] >> n); }
KI_INLINE void vi_store_i8(int8_t *p, vi a) {
    for (int i = 0; i < 16; i++) p[i] = (int8_t)a.v[i];
}
KI_INLINE vb vb_load(const void *p) { return vi_load(p); }
KI_INLINE void vb_store(void *p, vb a) { vi_store(p, a); }
KI_INLINE vb vb_xor(vb a, vb b) { KI_LANES(vi, a.v[i] ^ b.v[i]); }
KI_INLINE vi vi_dot_u8(vi acc, vb u, vb s) {
    uint8_t ub[64];
    int8_t sb[64];
    memcpy(ub, &u, 64);
    memcpy(sb, &s, 64);
    for (int i = 0; i < 16; i++)
        acc.v[i] += ub[4 * i] * sb[4 * i] + ub[4 * i + 1] * sb[4 * i + 1] +
                    ub[4 * i + 2] * sb[4 * i + 2] + ub[4 * i + 3] * sb[4 * i + 3];
    return acc;
}
KI_INLINE vi vi_dot_u7(vi acc, vb u, vb s) { return vi_dot_u8(acc, u, s); }
#define KI_WIDE_SUMS 1
KI_INLINE float vf_sum(vf a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
    return a.v[0];
}
KI_INLINE float vf_max(vf a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    return a.v[0];
}
KI_INLINE float fma1(float a, float b, float c) { return fmaf(a, b, c); }
KI_INLINE void vb_split15(vb *high, vb *low, vi a, vi b, vi c, vi d) {
    int8_t h[64], l[64];
    const vi *all[4] = {&a, &b, &c, &d};
    for (int j = 0; j < 4; j++)
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 4; i++) {
                h[16 * j + 4 * k + i] = (int8_t)(all[k]->v[4 * j + i] >> 7);
                l[16 * j + 4 * k + i] = (int8_t)(all[k]->v[4 * j + i] & 127);
            }
    memcpy(high, h, 64);
    memcpy(low, l, 64);
}
KI_INLINE vf vf_zero_unless_above(vf value, vf x, float limit) {
    KI_LANES(vf, x.v[i] > limit ? value.v[i] : 0.0f);
}
/* Lane i gets lane i ^ n. */
KI_INLINE vf vf_swap1(vf a) { KI_LANES(vf, a.v[i ^ 1]); }
KI_INLINE vf vf_swap2(vf a) { KI_LANES(vf, a.v[i ^ 2]); }
KI_INLINE vf vf_swap4(vf a) { KI_LANES(vf, a.v[i ^ 4]); }
KI_INLINE vf vf_swap8(vf a) { KI_LANES(vf, a.v[i ^ 8]); }
#endif

/* ---- built from the above, so alike everywhere ---- */
#if !defined(__AVX2__)
KI_INLINE vf vf_sums(const vf *rows, unsigned n) {
    float lanes[16] = {0};
    for (unsigned i = 0; i < n; i++) lanes[i] = vf_sum(rows[i]);
    return vf_load(lanes);
}
KI_INLINE vf vf_maxes(const vf *rows, unsigned n) {
    float lanes[16] = {0};
    for (unsigned i = 0; i < n; i++) lanes[i] = vf_max(rows[i]);
    return vf_load(lanes);
}
#endif

KI_INLINE vi vi_set_bytes(const int8_t *four) {
    int32_t w;
    memcpy(&w, four, 4);
    return vi_set(w);
}

#ifndef KI_DOT_VECTORS
#define KI_DOT_VECTORS 2 /* vectors of codes that share a loaded integer: thirty-two registers */
#endif
/* Parts of a vector whose sums fit the registers: vp of words, vh of float32. vp_load(p, part),
 * vp_of(a, part), vp_field(a, shift, mask) = a >> shift & mask, vp_set the same word in all lanes.
 */
#ifndef KI_PARTS
#define KI_PARTS 1
typedef vb vp;
KI_INLINE vp vp_load(const uint32_t *p, unsigned part) {
    return vi_load((const int32_t *)p + part * 16);
}
KI_INLINE vp vp_of(vb a, unsigned part) { return (void)part, a; }
KI_INLINE vp vp_set(uint32_t x) { return vi_set((int32_t)x); }
KI_INLINE vp vp_field(vp a, unsigned shift, vp mask) { return vi_and(vi_shr(a, shift), mask); }
KI_INLINE vp vp_shl(vp a, unsigned n) { return vi_shl(a, n); }
KI_INLINE vp vp_or(vp a, vp b) { return vi_or(a, b); }
KI_INLINE void vp_store(int8_t *p, vp a) { vb_store(p, a); }
KI_INLINE void vp_split15(vp *high, vp *low, vp a, vp b, vp c, vp d) {
    vb_split15(high, low, a, b, c, d);
}
typedef vf vh;
KI_INLINE vh vh_load(const float *p) { return vf_load(p); }
KI_INLINE void vh_store(float *p, vh a) { vf_store(p, a); }
KI_INLINE vh vh_load_f16(const uint16_t *p) { return vf_load_f16(p); }
KI_INLINE vh vh_set(float x) { return vf_set(x); }
KI_INLINE vh vh_mul(vh a, vh b) { return vf_mul(a, b); }
KI_INLINE vh vh_fma(vh a, vh b, vh c) { return vf_fma(a, b, c); }
KI_INLINE vh vh_max2(vh a, vh b) { return vf_max2(a, b); }
KI_INLINE vh vh_abs(vh a) { return vf_abs(a); }
KI_INLINE vp vh_to_vp(vh a) { return vf_to_vi(a); }
KI_INLINE vf vf_with_part(vf a, unsigned part, vh b) { return (void)a, (void)part, b; }
#endif
/* Sums of vi_dot_u7's products for u below 64, which may be held in 16 bit until vi_add_part widens
 * them: 2 * 128 * (2^bits - 1) a quad, so 32 quads of 2 bits, 16 of 3, 8 of 4. */
#define KI_NARROW_SUMS(bits) ((bits) == 2 ? 32u : (bits) == 3 ? 16u : 8u)
#ifdef KI_WIDE_SUMS
typedef vi vs;
KI_INLINE vs vs_zero(void) { return vi_set(0); }
KI_INLINE vs vs_dot(vs acc, vp u, vp s) { return vi_dot_u7(acc, u, s); }
KI_INLINE vi vi_add_part(vi acc, unsigned part, vs a) { return (void)part, vi_add(acc, a); }
KI_INLINE vi vi_add_part128(vi acc, unsigned part, vs a) {
    return (void)part, vi_add(acc, vi_shl(a, 7));
}
#endif
/* Without sums of byte products in 32 bit (KI_DOT16), numbers of 16 bits are multiplied where there
 * are rows enough: vi_dot16(acc, a, b) adds the two products of signed 16-bit numbers of each lane,
 * vi_sub16 takes them apart from one another; sixteen numbers are stored in order 0 2 1 3 of each
 * four, in which the even and the odd bytes of a lane meet them, and as bytes, 128 high + low. */
#ifdef KI_DOT16
KI_INLINE void vi_store_integers(int8_t *high, int8_t *low, int16_t *pairs, vi a) {
#if defined(__AVX512F__)
    __m256i w = _mm512_cvtepi32_epi16(a);
#else
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
#endif
    __m256i h = _mm256_srai_epi16(_mm256_add_epi16(w, _mm256_set1_epi16(64)), 7);
    __m256i l = _mm256_sub_epi16(w, _mm256_slli_epi16(h, 7));
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(h, l), 0xd8);
    _mm_storeu_si128((__m128i *)high, _mm256_castsi256_si128(bytes));
    _mm_storeu_si128((__m128i *)low, _mm256_extracti128_si256(bytes, 1));
    w = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(w, 0xd8), 0xd8);
    _mm256_storeu_si256((__m256i *)pairs, w);
}
KI_INLINE vi vi_set_pair16(const int16_t *two) {
    int32_t w;
    memcpy(&w, two, 4);
    return vi_set(w);
}
#endif
KI_INLINE vp vp_set_bytes(const int8_t *four) {
    uint32_t w;
    memcpy(&w, four, 4);
    return vp_set(w);
}

/* e^x for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2, a degree 6 polynomial for e^r (Taylor
 * coefficients; remainder r^7/5040 < 1.2e-7 relative), n added to its exponent. Adding 1.5 * 2^23
 * rounds to the integer n and leaves it in the low bits. At -87 and below it gives 0, so that a
 * masked score of -inf weighs nothing. */
KI_INLINE vf vf_exp_negative(vf x) {
    vf c = vf_max2(x, vf_set(-87.0f)), shift = vf_set(12582912.0f);
    vf t = vf_fma(c, vf_set(1.44269504f), shift), n = vf_sub(t, shift);
    vf r = vf_fma(n, vf_set(-0.693359375f), c); /* ln 2 in two parts: the first has few bits, */
    r = vf_fma(n, vf_set(2.12194440e-4f), r);   /* so n times it is exact */
    vf p = vf_set(1.0f / 720);
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    vf e = vf_from_bits(vi_add(vf_bits(p), vi_shl(vf_bits(t), 23)));
    return vf_zero_unless_above(e, x, -87.0f);
}
/* The same for moderate x > 0, too; above 88 it stops at e^88. */
KI_INLINE vf vf_exp(vf x) { return vf_exp_negative(vf_min2(x, vf_set(88.0f))); }
KI_INLINE float exp1(float x) {
    float lanes[16];
    vf_store(lanes, vf_exp(vf_set(x)));
    return lanes[0];
}

#endif
