/* quant.h: the quantizer (DESIGN.md 2) and the order of codes in a page.
 *
 * One group x of G float16 values, B bits, L = 2^B - 1, arithmetic in float32:
 *     zero  = min(x)      (already a float16, so rounding it down changes nothing)
 *     scale = smallest float16 >= (max(x) - zero) / L   0 when max(x) == zero
 *     code  = clamp(round_half_even((x - zero) / scale), 0, L)    0 when scale == 0
 *     value = code * scale + zero                      |x - value| <= scale / 2
 * True division, no contraction: every instruction set gives the same bytes. A zero point of -0 is
 * stored as +0.
 *
 * Order of codes. The plain order (saved files, tests, other backends) is tokens slowest, channels
 * fastest, low bits first. In memory codes stand in 32-bit words whose four bytes are four
 * neighbours, so that one shift and one AND of a whole vector give bytes in the order of an integer
 * dot product. A word holds n = 32/B codes; the code of index i stands at bit 8 (i % 4) + B (i /
 * 4):
 *
 *     bits 31......24 23......16 15.......8 7........0        B = 2, n = 16
 *          15 11 7 3  14 10 6 2  13  9 5 1  12  8 4 0
 *
 *     keys    word [t / 16][c / n][t % 16], i = c % n    sixteen tokens in the lanes of a vector
 *     values  word [t / n][c],              i = t % n    channels in the lanes of a vector */
#ifndef KI_QUANT_H
#define KI_QUANT_H
#include "base.h"

enum { KI_PAGE_TOKENS = 128, KI_LANES = 16 };

/* Place of code i in its word. */
static inline unsigned ki_code_bit(unsigned i, unsigned bits) {
    return 8 * (i % 4) + bits * (i / 4);
}

typedef struct ki_quant_kernels {
    /* codes [n_groups][G] u8, scale and zero [n_groups] f16, x [n_groups][G] f16, all finite. G 16,
     * 32, 64, 128. */
    void (*quantize)(uint8_t *codes, uint16_t *scale, uint16_t *zero, const uint16_t *x,
                     size_t n_groups, unsigned group, unsigned bits);
    /* out [n] f16 from x [n] f32, round half to even, saturating at +-65504. Returns false when a
     * value is not finite (out is then not to be used); adds the number of saturated values to
     * *n_saturated. n % 16 == 0. */
    bool (*to_f16)(uint16_t *out, uint64_t *n_saturated, const float *x, size_t n);
} ki_quant_kernels;

/* The definition, element by element. */
void ki_quantize_scalar(uint8_t *codes, uint16_t *scale, uint16_t *zero, const uint16_t *x,
                        size_t n_groups, unsigned group, unsigned bits);
bool ki_to_f16_scalar(uint16_t *out, uint64_t *n_saturated, const float *x, size_t n);

/* Whether any of n float16 values is infinite or NaN, by its exponent bits. */
bool ki_f16_all_finite(const uint16_t *x, size_t n);

/* Key codes [D][n_tokens] (channel slowest, as the key groups come) into the words of a page,
 * tokens first_token on. first_token and n_tokens are multiples of 16. */
void ki_pack_keys(uint32_t *words, const uint8_t *codes, unsigned first_token, unsigned n_tokens,
                  unsigned head_dim, unsigned bits);
/* Value codes [D] of one token; other tokens' codes in the same words stay. */
void ki_pack_values(uint32_t *words, const uint8_t *codes, unsigned token, unsigned head_dim,
                    unsigned bits);
/* One code back, for saving and tests. */
unsigned ki_key_code(const uint32_t *words, unsigned token, unsigned channel, unsigned head_dim,
                     unsigned bits);
unsigned ki_value_code(const uint32_t *words, unsigned token, unsigned channel, unsigned head_dim,
                       unsigned bits);

#endif
