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
 *     B = 1    word j / 2            bits 16 h + 8 (j % 2) + 4 (r % 2) + r / 2 + 2 i
 *
 * so that `word & mask` (after at most one shift) is a register of the operand whose halves are
 * float16 subnormals: the code times a power of two, which the other operand and the sums take
 * back (1 bit: the third bits of k4v3+). Words of a lane stand in fours, to be loaded 16 bytes at a
 * time: word w of N (N = D/16 words for 2 bits) of lane l is at
 *
 *     w / 4 < N / 4:  (w / 4 * 32 + p) * 4 + w % 4      else  N / 4 * 128 + p * (N % 4) + w % 4
 *
 * where p is l for keys. Values are coded token by token, and eight lanes have what is of the same
 * tokens: theirs stand beside each other, p = l % 4 * 8 + (l / 4 + l % 4 * 2) % 8, so that a row of
 * 128 touches 8 sectors of memory and not 16.
 *
 * Rows in 16 bits have an order of their own, in which a new one touches few sectors of memory: in
 * a lane's 16 bytes stand registers of the same tokens together, of two steps j, j + 1.
 * Quarter e is tokens 8 e .. 8 e + 7, of two steps 32 lanes' 16 bytes:
 *
 *     keys     e = 2 i + r % 2    word 2 (j % 2) + r / 2    a token: 64 bytes, one behind the other
 *     values   e = 2 i + r / 2    word 2 (j % 2) + r % 2    two tokens: 128 bytes
 *
 * The last one of an odd number of steps stands alone, 8 bytes a lane.
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
/* Where a lane's bytes stand among those of all lanes: of values by pairs of tokens, and eight
 * lanes that read at once in different banks. */
KI_BOTH uint32_t ki_order_lane(uint32_t lane, int keys) {
    return keys ? lane : lane % 4 * 8 + (lane / 4 + lane % 4 * 2) % 8;
}
/* Index (in 32-bit words) of word w of n of a lane. */
KI_BOTH uint32_t ki_order_word_at(uint32_t w, uint32_t n, uint32_t lane, int keys) {
    uint32_t at = ki_order_lane(lane, keys);
    return w / 4 < n / 4 ? (w / 4 * 32 + at) * 4 + w % 4 : n / 4 * 128 + at * (n % 4) + w % 4;
}

typedef struct ki_order_place {
    uint32_t word, bit; /* in a plane of a block */
} ki_order_place;

KI_BOTH ki_order_place ki_order_tile(uint32_t j, uint32_t i, uint32_t row, uint32_t col,
                                     uint32_t n_steps, uint32_t bits, int keys) {
    uint32_t lane = row % 8 * 4 + col % 8 / 2, r = row / 8 + 2 * (col / 8), h = col % 2;
    uint32_t w = 0, bit = 16 * h;
    if (bits == 2) w = j, bit += 8 * i + 2 * (2 * (r % 2) + r / 2);
    else if (bits == 4) w = 2 * j + i, bit += 8 * (r / 2) + 4 * (r % 2);
    else if (bits == 8) w = 4 * j + 2 * i + r / 2, bit += 8 * (r % 2);
    else w = j / 2, bit += 8 * (j % 2) + 4 * (r % 2) + r / 2 + 2 * i;
    ki_order_place p = {ki_order_word_at(w, ki_order_words(n_steps, bits), lane, keys), bit};
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
    else j = 2 * w + low / 8, row8 = low / 4 % 2, i = low / 2 % 2, col8 = low % 2;
    ki_order_element p = {j, i, lane / 4 + 8 * row8, lane % 4 * 2 + h + 8 * col8};
    return p;
}

/* ---- 16 bits ---- */

KI_BOTH ki_order_place ki_order_row(uint32_t token, uint32_t channel, uint32_t n_steps, int keys) {
    uint32_t j = channel / 16, row = keys ? token % 8 : channel % 8;
    uint32_t col = keys ? channel % 8 : token % 8, x = channel % 16 / 8;
    uint32_t at = token / 8 * 32 + ki_order_lane(row * 4 + col / 2, keys);
    ki_order_place p = {n_steps / 2 * 512 + at * 2 + x, col % 2 * 16};
    if (j / 2 < n_steps / 2) p.word = (j / 2 * 128 + at) * 4 + j % 2 * 2 + x;
    return p;
}

/* The way back: the element in the lower half of a word; that in the upper half is of the next
 * channel (keys) or token (values). */
typedef struct ki_order_element16 {
    uint32_t token, channel;
} ki_order_element16;

KI_BOTH ki_order_element16 ki_order_row_at(uint32_t word, uint32_t n_steps, int keys) {
    uint32_t pairs = n_steps / 2 * 512, at = word / 4 % 128, x = word % 2;
    uint32_t j = word / 512 * 2 + word % 4 / 2, place, t;
    if (word >= pairs) at = (word - pairs) / 2, j = n_steps - 1;
    place = at % 32, t = place / 8;
    ki_order_element16 k = {at / 32 * 8 + place / 4, j * 16 + place % 4 * 2 + x * 8};
    ki_order_element16 v = {at / 32 * 8 + t * 2, j * 16 + (place + 8 - 2 * t) % 8 + x * 8};
    return keys ? k : v;
}

/* ---- all bits ---- */

/* token 0..31 of the block. n_steps: D / 16, or that of the wide plane with the number of the wide
 * channel for `channel`. */
KI_BOTH ki_order_place ki_order_key(uint32_t token, uint32_t channel, uint32_t n_steps,
                                    uint32_t bits) {
    if (bits == 16) return ki_order_row(token, channel, n_steps, 1);
    return ki_order_tile(channel / 16, token / 16, token % 16, channel % 16, n_steps, bits, 1);
}
KI_BOTH ki_order_place ki_order_value(uint32_t token, uint32_t channel, uint32_t n_steps,
                                      uint32_t bits) {
    if (bits == 16) return ki_order_row(token, channel, n_steps, 0);
    return ki_order_tile(channel / 16, token / 16, channel % 16, token % 16, n_steps, bits, 0);
}
/* Index (in float16) of a channel's key scale or zero within its group. */
KI_BOTH uint32_t ki_order_key_scale(uint32_t channel, uint32_t n_steps) {
    uint32_t j = channel / 16, col = channel % 16, e = 2 * (col / 8) + col % 2, t = col % 8 / 2;
    return j / 2 < n_steps / 2 ? j / 2 * 32 + t * 8 + j % 2 * 4 + e : j / 2 * 32 + t * 4 + e;
}
/* Index (in float16) of a token's value scale or zero within its channel group and block. */
KI_BOTH uint32_t ki_order_value_scale(uint32_t token) { return ki_order_key_scale(token, 2); }

/* ---- a part of a 16-bit block: tokens [from, to) are read ---- */

KI_BOTH int ki_order_meets(uint32_t from, uint32_t to, uint32_t t0, uint32_t width) {
    return from < to && t0 + width > from && t0 < to;
}
/* Which bytes of quarters 0 to 3 (32 e + place) a lane reads for its registers of quarter e: its
 * own, or where none of its tokens is read, those of a lane that has token `from`. So nothing comes
 * from memory in vain, and what comes is finite. */
KI_BOTH uint32_t ki_order_seen_at(uint32_t from, uint32_t to, uint32_t e, uint32_t lane, int keys) {
    uint32_t t0 = 8 * e + (keys ? lane / 4 : lane % 4 * 2);
    if (ki_order_meets(from, to, t0, keys ? 1 : 2)) return 32 * e + ki_order_lane(lane, keys);
    uint32_t other = keys ? from % 8 * 4 + lane % 4 : lane / 4 * 4 + from % 8 / 2;
    return from / 8 % 4 * 32 + ki_order_lane(other, keys);
}
/* Whether line `line` of 128 bytes has some of them: it is of two tokens, or of the step that is
 * alone of four. */
KI_BOTH int ki_order_line_meets(uint32_t from, uint32_t to, uint32_t line, uint32_t n_steps) {
    uint32_t pairs = n_steps / 2 * 16;
    if (line < pairs) return ki_order_meets(from, to, line % 16 * 2, 2);
    return ki_order_meets(from, to, (line - pairs) * 4 % 32, 4);
}

#endif
