#include "quant.h"

#include <math.h>

/* The smallest float16 >= a, for a >= 0: the next bit pattern is the next number. */
static uint16_t f16_up(float a) {
    uint16_t h = ki_f32_to_f16(a);
    return ki_f16_to_f32(h) < a ? (uint16_t)(h + 1) : h;
}

static void quantize_group(uint8_t *codes, uint16_t *scale, uint16_t *zero, const uint16_t *x,
                           unsigned group, float levels) {
    float min = ki_f16_to_f32(x[0]), max = min;
    for (unsigned i = 1; i < group; i++) {
        float v = ki_f16_to_f32(x[i]);
        min = v < min ? v : min;
        max = v > max ? v : max;
    }
    min += 0.0f; /* -0 becomes +0 */
    *zero = ki_f32_to_f16(min);
    *scale = f16_up((max - min + 0.0f) / levels); /* and a maximum of -0 gives no scale of -0 */
    float s = ki_f16_to_f32(*scale);
    for (unsigned i = 0; i < group; i++) {
        float q = s == 0 ? 0 : rintf((ki_f16_to_f32(x[i]) - min) / s);
        codes[i] = (uint8_t)(q < 0 ? 0 : q > levels ? levels : q);
    }
}

void ki_quantize_scalar(uint8_t *codes, uint16_t *scale, uint16_t *zero, const uint16_t *x,
                        size_t n_groups, unsigned group, unsigned bits) {
    float levels = (float)((1u << bits) - 1);
    for (size_t g = 0; g < n_groups; g++)
        quantize_group(codes + g * group, scale + g, zero + g, x + g * group, group, levels);
}

bool ki_to_f16_scalar(uint16_t *out, uint64_t *n_saturated, const float *x, size_t n) {
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        float v = x[i];
        finite = finite && (ki_f32_bits(v) & 0x7f800000) != 0x7f800000;
        float clamped = v < -65504.0f ? -65504.0f : v > 65504.0f ? 65504.0f : v;
        *n_saturated += clamped != v;
        out[i] = ki_f32_to_f16(clamped);
    }
    return finite;
}

bool ki_f16_all_finite(const uint16_t *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if ((x[i] & 0x7c00) == 0x7c00) return false;
    return true;
}

void ki_pack_keys(uint32_t *words, const uint8_t *codes, unsigned first_token, unsigned n_tokens,
                  unsigned head_dim, unsigned bits) {
    unsigned n = 32 / bits, n_words = head_dim / n;
    for (unsigned t = 0; t < n_tokens; t++) {
        unsigned token = first_token + t;
        uint32_t *lane = words + (size_t)(token / KI_LANES) * n_words * KI_LANES + token % KI_LANES;
        for (unsigned w = 0; w < n_words; w++) {
            uint32_t word = 0;
            for (unsigned i = 0; i < n; i++)
                word |= (uint32_t)codes[(size_t)(w * n + i) * n_tokens + t] << ki_code_bit(i, bits);
            lane[(size_t)w * KI_LANES] = word;
        }
    }
}

void ki_pack_values(uint32_t *words, const uint8_t *codes, unsigned token, unsigned head_dim,
                    unsigned bits) {
    unsigned n = 32 / bits, bit = ki_code_bit(token % n, bits);
    uint32_t *row = words + (size_t)(token / n) * head_dim, keep = ~(((1u << bits) - 1) << bit);
    for (unsigned c = 0; c < head_dim; c++) row[c] = (row[c] & keep) | (uint32_t)codes[c] << bit;
}

unsigned ki_key_code(const uint32_t *words, unsigned token, unsigned channel, unsigned head_dim,
                     unsigned bits) {
    unsigned n = 32 / bits, n_words = head_dim / n;
    size_t w = ((size_t)(token / KI_LANES) * n_words + channel / n) * KI_LANES + token % KI_LANES;
    return words[w] >> ki_code_bit(channel % n, bits) & ((1u << bits) - 1);
}

unsigned ki_value_code(const uint32_t *words, unsigned token, unsigned channel, unsigned head_dim,
                       unsigned bits) {
    unsigned n = 32 / bits;
    return words[(size_t)(token / n) * head_dim + channel] >> ki_code_bit(token % n, bits) &
           ((1u << bits) - 1);
}
