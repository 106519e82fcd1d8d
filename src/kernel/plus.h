/* plus.h: the quantizers of kivi2+, k4v2+ and k4v3+ (DESIGN.md 11) and the planes they fill.
 *
 * Keys, once for a page of 128 tokens; S sinks before the page's first other token count nowhere.
 * A channel's page is one group. To measure what that is worth it can be cut into groups: wide
 * channels are still those of the page, the rest is said of each group; one that is all sinks has
 * scale, zero and codes 0. Arithmetic in float32, every operation rounded by itself:
 *     wide      the D/4 channels of the largest max - min; of equal ones the lower index
 *     4 bits    (wide channels, and all of k4v2+ and k4v3+)  quant.h's definition, G = 128
 *     2 bits    mid = (min + max) / 2; for a = 1, .93, .86, .79, .72:
 *                   lo = mid + (min - mid) a      zero  = largest float16 <= lo
 *                   hi = mid + (max - mid) a      scale = smallest float16 >= (hi - zero) / 3
 *               codes as in quant.h; the a of the least sum of (x - (code scale + zero))^2, added
 *               from token S on, is stored; of equal ones the first
 * Values, once for a row that was turned (below) and then rounded to float16; no zero is stored:
 *     group     64, or the largest power of two that divides D if that is smaller
 *     half = L / 2 (1.5 or 3.5); for c = 1, .95, .90, ..., .35:
 *         scale = smallest float16 >= (max|x| / half) c
 *         code  = clamp(round_half_even(x / scale + half), 0, L)    0 when scale == 0
 *     the c of the least sum of (x - (code - half) scale)^2, in the order of the channels, is
 *     stored; of equal ones the first
 * Turning: by blocks of the largest power of two B that divides D, butterflies (a + b, a - b) at
 * distance 1, 2, 4, ..., B / 2, then a product with the float32 nearest to 1 / sqrt(B). The matrix
 * is its own inverse, so the same function turns the attention's output back. What the butterflies
 * make infinite or NaN from huge float32 is refused where the row is rounded to float16 (to_f16),
 * and what exceeds 65504 saturates and is counted there.
 *
 * Scales and zeros cannot leave float16: |zero| <= max|x| <= 65504, scale <= 2 * 65504 / 3. A
 * channel with one value only has scale 0, codes 0 and its value as zero; a row of zeros has scale
 * 0. A zero point of -0 is stored as +0. Infinities and NaN are the caller's to refuse
 * (ki_f16_all_finite); should one come all the same, codes stay within their bits, the channel list
 * stays ascending and no other memory is touched, but the bytes are not defined.
 *
 * Planes of a page (bytes at D = 64 / 128):
 *     low     2-bit keys: quant.h's key order for 2 bits, code & 3           2048 / 4096
 *             4-bit keys: quant.h's key order for 4 bits                     4096 / 8192
 *     wide    code >> 2 of the wide channels, numbered in ascending order    512 / 1024
 *     list    [D/4] u8, the wide channels, ascending                         16 / 32
 *     scale   [D] f16, zero [D] f16, of each group                           128 + 128 / 256 + 256
 *     values  code & 3 in quant.h's value order for 2 bits                   2048 / 4096
 *     third   3-bit values: code >> 2 in quant.h's value order for 1 bit     1024 / 2048
 *     vscale  [D/G][128] f16                                                 256 / 512
 *
 * The wide plane. Sixteen tokens x four wide channels are a quad: in quant.h's order, one shift
 * and one AND of a vector of 16 words give its 64 bytes, lanes tokens. A page has 8 blocks of 16
 * tokens with D/16 quads each; these D/2 quads stand one after the other, block by block, four to
 * a vector of words. So the code of wide channel number w of token t is in
 *     quad j = (t / 16) (D / 16) + w / 4      word [j / 4][t % 16], bit 8 (w % 4) + 2 (j % 4)
 * which is quant.h's key order for D/4 channels where that is a multiple of 16, and needs no
 * padding where it is not (80: 20 channels, 96: 24): unpacking runs through the plane from its
 * beginning and leaves bytes [t / 16][w / 4][t % 16][w % 4], as it does for the low plane.
 *
 * The third plane. 32 tokens share a word: the bit of token t is at 8 (t % 4) + (t % 32) / 4 of
 * word [t / 32][c]. The low plane's quad k of its row r (tokens 16 r + 4 k on) so becomes bytes by
 *     (low >> 2 k & 0x03030303) | (third >> (4 (r % 2) + k) & 0x01010101) << 2
 *
 * What attention makes of them, of each key group (step: attn.h's fold of a vector of float32 to 15
 * bits):
 *     score = step1 (integers of q s . low) + step2 (integers of 4 q s, wide channels gathered
 *             through the list, . high) + q . z
 *     acc   = step (integers of p s . code) - half sum p s, then turned once a row at the very end
 * The wide sum is the low one's loop over D/4 channels; codes up to 15 stay within the dot product
 * of bytes below 128. */
#ifndef KI_PLUS_H
#define KI_PLUS_H
#include "quant.h"

enum {
    KI_PLUS_KEY_STEPS = 5,    /* candidates for a 2-bit channel */
    KI_PLUS_VALUE_STEPS = 14, /* and for a group of values */
    KI_PLUS_VALUE_GROUP = 64, /* the largest */
    KI_PLUS_MAX_WIDE = 64     /* D/4 at D = 256 */
};

extern const float ki_plus_key_steps[KI_PLUS_KEY_STEPS];
extern const float ki_plus_value_steps[16]; /* the last two repeat the first */

/* The largest power of two that divides D: the block of the Hadamard matrix. */
static inline unsigned ki_plus_block(unsigned head_dim) { return head_dim & (0u - head_dim); }
static inline unsigned ki_plus_value_group(unsigned head_dim) {
    unsigned block = ki_plus_block(head_dim);
    return block < KI_PLUS_VALUE_GROUP ? block : KI_PLUS_VALUE_GROUP;
}

/* Where a page's keys go. All of it is written, whatever stood there. */
typedef struct ki_plus_keys {
    unsigned bits;          /* 2 or 4 */
    uint32_t *low;          /* bits 2: [8][D/16][16]; bits 4: [8][D/8][16] */
    uint32_t *wide;         /* [D/8][16]; NULL at 4 bits, or where no channel is wide */
    uint8_t *list;          /* [D/4]; NULL where wide is */
    uint16_t *scale, *zero; /* [128 / group][D] f16 */
    unsigned group;         /* tokens: 16, 32, 64, 128; 0: 128 */
} ki_plus_keys;

static inline unsigned ki_plus_key_group(const ki_plus_keys *keys) {
    return keys->group ? keys->group : (unsigned)KI_PAGE_TOKENS;
}

typedef struct ki_plus_kernels {
    /* blocks: 8 of [D][16] f16, as the 16-bit store has them; finite from token n_sinks on. n_sinks
     * <= 127. Sinks' codes are those of their group's first other token and never read; their keys
     * are not read. Of the candidates the first n_steps are tried, 1 to KI_PLUS_KEY_STEPS. D a
     * multiple of 16 up to 256. */
    void (*close_keys)(const ki_plus_keys *out, const uint16_t *const *blocks, unsigned n_sinks,
                       unsigned head_dim, unsigned n_steps);
    /* codes [D] u8, scale [D/G] f16 from a turned row x [D] f16, finite. bits 2 or 3; the first
     * n_steps candidates are tried, 1 to KI_PLUS_VALUE_STEPS. */
    void (*quantize_values)(uint8_t *codes, uint16_t *scale, const uint16_t *x, unsigned head_dim,
                            unsigned bits, unsigned n_steps);
    /* x [D] f32 in place. */
    void (*turn)(float *x, unsigned head_dim);
} ki_plus_kernels;

/* The definition, element by element. */
void ki_plus_close_keys_scalar(const ki_plus_keys *out, const uint16_t *const *blocks,
                               unsigned n_sinks, unsigned head_dim, unsigned n_steps);
void ki_plus_quantize_values_scalar(uint8_t *codes, uint16_t *scale, const uint16_t *x,
                                    unsigned head_dim, unsigned bits, unsigned n_steps);
void ki_plus_turn_scalar(float *x, unsigned head_dim);

/* list [D/4]: the wide channels of spread [D] f32, each >= 0. */
void ki_plus_choose(uint8_t *list, const float *spread, unsigned head_dim);

/* Value codes [D] of one token into the low plane and, at 3 bits, the third; other tokens' codes in
 * the same words stay. third is NULL at 2 bits. */
void ki_plus_pack_values(uint32_t *low, uint32_t *third, const uint8_t *codes, unsigned token,
                         unsigned head_dim);
/* One code back, for saving and tests. number: of a wide channel, 0 .. D/4 - 1. */
unsigned ki_plus_wide_code(const uint32_t *wide, unsigned token, unsigned number,
                           unsigned head_dim);
unsigned ki_plus_value_code(const uint32_t *low, const uint32_t *third, unsigned token,
                            unsigned head_dim, unsigned channel);
/* The whole code of a key channel: low and, where list names it, wide. */
unsigned ki_plus_key_code(const ki_plus_keys *keys, unsigned token, unsigned channel,
                          unsigned head_dim);
/* Puts a plain code (0..3, wide channels 0..15) into planes that were zeroed: for loading. */
void ki_plus_put_key_code(const ki_plus_keys *keys, unsigned token, unsigned channel,
                          unsigned head_dim, unsigned code);

#endif
