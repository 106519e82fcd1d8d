/* quant_simd.h: the quantizer over sixteen lanes. Included once by each isa_<name>.c. */
#include "quant.h"
#include "simd.h"

static void quantize_lanes(uint8_t *codes, uint16_t *scale, uint16_t *zero, const uint16_t *x,
                           unsigned group, vf levels) {
    vf low = vf_load_f16(x), high = low;
    for (unsigned i = 16; i < group; i += 16) {
        vf v = vf_load_f16(x + i);
        low = vf_min2(v, low);
        high = vf_max2(v, high);
    }
    /* min = -max(-x); 0 - x and + 0 also turn -0 into +0 */
    float min = 0.0f - vf_max(vf_sub(vf_set(0.0f), low)) + 0.0f, max = vf_max(high);
    *zero = ki_f32_to_f16(min);
    uint16_t up[16];
    vf_store_f16_up(up, vf_div(vf_set(max - min + 0.0f), levels));
    *scale = up[0];
    float s = ki_f16_to_f32(*scale);
    if (s == 0) {
        memset(codes, 0, group);
        return;
    }
    for (unsigned i = 0; i < group; i += 16) {
        vf q = vf_rint(vf_div(vf_sub(vf_load_f16(x + i), vf_set(min)), vf_set(s)));
        /* codes reach 255: kept within int8 by a bias of 128, which the XOR takes back */
        vi biased = vi_sub(vf_to_vi(vf_min2(vf_max2(q, vf_set(0.0f)), levels)), vi_set(128));
        int8_t bytes[16];
        vi_store_i8(bytes, biased);
        for (unsigned j = 0; j < 16; j++) codes[i + j] = (uint8_t)(bytes[j] ^ -128);
    }
}

static void quantize_simd(uint8_t *codes, uint16_t *scale, uint16_t *zero, const uint16_t *x,
                          size_t n_groups, unsigned group, unsigned bits) {
    vf levels = vf_set((float)((1u << bits) - 1));
    for (size_t g = 0; g < n_groups; g++)
        quantize_lanes(codes + g * group, scale + g, zero + g, x + g * group, group, levels);
}

static bool to_f16_simd(uint16_t *out, uint64_t *n_saturated, const float *x, size_t n) {
    vf largest = vf_set(0.0f), not_finite = vf_set(0.0f);
    for (size_t i = 0; i < n; i += 16) {
        vf v = vf_load(x + i);
        largest = vf_max2(vf_abs(v), largest);
        not_finite = vf_add(not_finite, vf_sub(v, v)); /* 0, or NaN from then on */
        vf_store_f16(out + i, v);
    }
    float sum = vf_sum(not_finite);
    if (sum == 0 && vf_max(largest) <= 65504.0f) return true;
    return ki_to_f16_scalar(out, n_saturated, x, n); /* the rare case, counted element by element */
}
