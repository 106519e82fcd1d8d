/* kv_order.h: where an element of a page stands on the device. One set of index functions for the
 * device and its host twin, so that a test without a GPU proves the permutation and pages can be
 * exchanged with the CPU's.
 *
 * The unit is a block of 32 tokens of one KV head. Its codes stand in the order in which one warp
 * holds the A operands of mma.m16n8k16: keys with rows = tokens and columns = channels, values with
 * rows = channels and columns = tokens. Both are cut into tiles of 16 x 16:
 *
 *     tile (j, i): channels 16 j .. 16 j + 15, tokens 16 i .. 16 i + 15
 *     keys:  row t % 16, col c % 16         values:  row c % 16, col t % 16
 *
 * j = 0 .. D/16 - 1, i = 0, 1. In a tile lane 4 (row % 8) + (col % 8) / 2 holds the element in
 * register (row / 8) + 2 (col / 8), half col % 2. A lane's elements of (j, both i) fill B/2 words
 * (B bits; one word at 2 bits), and element (i, register r, half h) is
 *
 *     B = 2    word 0                bits 16 h + 8 i + 2 f(r)    f: 0, 2, 1, 3 for r = 0, 1, 2, 3
 *     B = 4    word i                bits 16 h + 8 (r / 2) + 4 (r % 2)
 *     B = 8    word 2 i + r / 2      bits 16 h + 8 (r % 2)
 *     B = 16   word 4 i + r          bits 16 h
 *     B = 1    word j / 2            bits 16 h + 8 (j % 2) + 4 (r % 2) + r / 2 + 2 i
 *
 * so that `word & mask` (after at most one shift) is a register of the operand whose halves are
 * float16 subnormals: the code times a power of two, which the other operand and the sums take
 * back (1 bit: the third bits of k4v3+). Words of a lane stand in fours, to be loaded 16 bytes at a
 * time: word w of N (N = D/16 words for 2 bits) of lane l is at
 *
 *     w / 4 < N / 4:  (w / 4 * 32 + l) * 4 + w % 4      else  N / 4 * 128 + l * (N % 4) + w % 4
 *
 * Scales and zeros of keys (one group of tokens, D channels): the lanes of a column pair read the
 * four channels of each tile that their registers hold, two tiles (16 bytes) at a time. Scales and
 * zeros of values (one channel group, 32 tokens): the same with tokens for channels. */
#ifndef KI_KV_ORDER_H
#define KI_KV_ORDER_H
#include <stdint.h>

#ifdef __CUDACC__
#define KI_BOTH static __host__ __device__ __forceinline__
#else
#define KI_BOTH static inline
#endif

enum { KI_SUB_TOKENS = 32, KI_SUBS = 4 }; /* a page of 128 tokens is four blocks */

/* Words a lane holds of one plane of a block; n_steps = D / 16 (wide plane: of D / 4). */
KI_BOTH uint32_t ki_order_words(uint32_t n_steps, uint32_t bits) {
    return bits == 1 ? (n_steps + 1) / 2 : n_steps * bits / 2;
}
/* Index (in 32-bit words) of word w of n of a lane. */
KI_BOTH uint32_t ki_order_word_at(uint32_t w, uint32_t n, uint32_t lane) {
    return w / 4 < n / 4 ? (w / 4 * 32 + lane) * 4 + w % 4 : n / 4 * 128 + lane * (n % 4) + w % 4;
}

typedef struct ki_order_place {
    uint32_t word, bit; /* in a plane of a block */
} ki_order_place;

KI_BOTH ki_order_place ki_order_tile(uint32_t j, uint32_t i, uint32_t row, uint32_t col,
                                     uint32_t n_steps, uint32_t bits) {
    uint32_t lane = row % 8 * 4 + col % 8 / 2, r = row / 8 + 2 * (col / 8), h = col % 2;
    uint32_t w = 0, bit = 16 * h;
    if (bits == 2) w = j, bit += 8 * i + 2 * (2 * (r % 2) + r / 2);
    else if (bits == 4) w = 2 * j + i, bit += 8 * (r / 2) + 4 * (r % 2);
    else if (bits == 8) w = 4 * j + 2 * i + r / 2, bit += 8 * (r % 2);
    else if (bits == 16) w = 8 * j + 4 * i + r;
    else w = j / 2, bit += 8 * (j % 2) + 4 * (r % 2) + r / 2 + 2 * i;
    ki_order_place p = {ki_order_word_at(w, ki_order_words(n_steps, bits), lane), bit};
    return p;
}

/* The way back: which element of its block stands at bit e * B of word w of a lane. */
typedef struct ki_order_element {
    uint32_t j, i, row, col;
} ki_order_element;

KI_BOTH ki_order_element ki_order_at(uint32_t w, uint32_t e, uint32_t lane, uint32_t bits) {
    uint32_t bit = e * bits, h = bit / 16, low = bit % 16, j, i, row8, col8;
    if (bits == 2) j = w, i = low / 8, col8 = low / 2 % 2, row8 = low / 4 % 2;
    else if (bits == 4) j = w / 2, i = w % 2, col8 = low / 8, row8 = low / 4 % 2;
    else if (bits == 8) j = w / 4, i = w / 2 % 2, col8 = w % 2, row8 = low / 8;
    else if (bits == 16) j = w / 8, i = w / 4 % 2, row8 = w % 2, col8 = w / 2 % 2;
    else j = 2 * w + low / 8, row8 = low / 4 % 2, i = low / 2 % 2, col8 = low % 2;
    ki_order_element p = {j, i, lane / 4 + 8 * row8, lane % 4 * 2 + h + 8 * col8};
    return p;
}

/* token 0..31 of the block. n_steps: D / 16, or that of the wide plane with the number of the wide
 * channel for `channel`. */
KI_BOTH ki_order_place ki_order_key(uint32_t token, uint32_t channel, uint32_t n_steps,
                                    uint32_t bits) {
    return ki_order_tile(channel / 16, token / 16, token % 16, channel % 16, n_steps, bits);
}
KI_BOTH ki_order_place ki_order_value(uint32_t token, uint32_t channel, uint32_t n_steps,
                                      uint32_t bits) {
    return ki_order_tile(channel / 16, token / 16, channel % 16, token % 16, n_steps, bits);
}
/* Index (in float16) of a channel's key scale or zero within its group. */
KI_BOTH uint32_t ki_order_key_scale(uint32_t channel, uint32_t n_steps) {
    uint32_t j = channel / 16, col = channel % 16, e = 2 * (col / 8) + col % 2, t = col % 8 / 2;
    return j / 2 < n_steps / 2 ? j / 2 * 32 + t * 8 + j % 2 * 4 + e : j / 2 * 32 + t * 4 + e;
}
/* Index (in float16) of a token's value scale or zero within its channel group and block. */
KI_BOTH uint32_t ki_order_value_scale(uint32_t token) { return ki_order_key_scale(token, 2); }

/* Of a 16-bit block, tokens [from, to) are read. Registers hold tokens in pairs 8 apart: whether
 * some of t0 .. t0 + width - 1, or of those 8 further on, are among them. */
KI_BOTH int ki_order_meets(uint32_t from, uint32_t to, uint32_t t0, uint32_t width) {
    return from < to &&
           ((t0 + width > from && t0 < to) || (t0 + 8 + width > from && t0 + 8 < to));
}
/* Which 16 bytes (of the 64 of tiles (j, 0) and (j, 1)) a lane reads for its registers of (j, i):
 * its own, or where none of its tokens is read, those of a lane that has token `from`. So nothing
 * comes from memory in vain, and what comes is finite. */
KI_BOTH uint32_t ki_order_seen_at(uint32_t from, uint32_t to, uint32_t i, uint32_t lane, int keys) {
    uint32_t t0 = 16 * i + (keys ? lane / 4 : lane % 4 * 2);
    if (ki_order_meets(from, to, t0, keys ? 1 : 2)) return 32 * i + lane;
    return from / 16 * 32 + (keys ? from % 8 * 4 + lane % 4 : lane / 4 * 4 + from % 8 / 2);
}
/* Whether some of them are in line `line` of 128 bytes: a quarter of a tile, of keys eight lanes'
 * tokens. The same for all lines that are 8 apart. */
KI_BOTH int ki_order_line_meets(uint32_t from, uint32_t to, uint32_t line, int keys) {
    return ki_order_meets(from, to, line / 4 % 2 * 16 + (keys ? line % 4 * 2 : 0), keys ? 2 : 8);
}

#endif
