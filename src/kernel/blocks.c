/* blocks.c: ggml's blocks of quantized weights, one reader each. Columns as the format numbers
 * them; what the bytes are is drawn beside each reader. */
#include "form.h"

/* codes[i] += (p[i] >> from & (2^bits - 1)) << to, for n bytes, eight at a time: no bit crosses
 * into a neighbour. */
static inline void add_bits(uint8_t *codes, const uint8_t *p, unsigned n, unsigned from,
                            unsigned bits, unsigned to) {
    const uint64_t mask = ((1u << bits) - 1) * 0x0101010101010101u;
    for (unsigned i = 0; i < n; i += 8) {
        uint64_t in, out;
        memcpy(&in, p + i, 8);
        memcpy(&out, codes + i, 8);
        out |= (in >> from & mask) << to;
        memcpy(codes + i, &out, 8);
    }
}

/* d | Q4_1 Q5_1: m | Q5: 32 high bits | 16 bytes: columns i (low half) and 16 + i (high half) */
static void read_32(ki_block *out, const uint8_t *p, const ki_form *form) {
    const uint8_t *high = p + (form->min == KI_MIN_OWN ? 4 : 2);
    memcpy(&out->d, p, 2);
    if (form->min == KI_MIN_OWN) memcpy(&out->m, p + 2, 2);
    p = form->high_bits ? high + 4 : high;
    add_bits(out->codes, p, 16, 0, 4, 0);
    add_bits(out->codes + 16, p, 16, 4, 4, 0);
    for (unsigned i = 0; i < 32 && form->high_bits; i++)
        out->codes[i] |= (uint8_t)((high[i / 8] >> i % 8 & 1) << 4);
}

/* d | 32 signed bytes */
static void read_q8_0(ki_block *out, const uint8_t *p) {
    memcpy(&out->d, p, 2);
    for (unsigned i = 0; i < 32; i++) out->codes[i] = p[2 + i] ^ 128;
}

/* Two bits a column: for each 128 columns 32 bytes; byte i has columns i, 32 + i, 64 + i, 96 + i
 * from its low bits on. */
static void read_two_bits(uint8_t *codes, const uint8_t *p, unsigned to) {
    for (unsigned j = 0; j < 8; j++) add_bits(codes + 32 * j, p + j / 4 * 32, 32, j % 4 * 2, 2, to);
}

/* 32 bytes: bit j of byte i is column 32 j + i. */
static void read_one_bit(uint8_t *codes, const uint8_t *p, unsigned to) {
    for (unsigned j = 0; j < 8; j++) add_bits(codes + 32 * j, p, 32, j, 1, to);
}

/* 16 bytes: scale (low half) and minimum of 16 columns each | 64 bytes of two bits | d | m */
static void read_q2_k(ki_block *out, const uint8_t *p) {
    for (unsigned i = 0; i < 16; i++) {
        out->scales[i] = (int8_t)(p[i] & 15);
        out->minima[i] = p[i] >> 4;
    }
    read_two_bits(out->codes, p + 16, 0);
    memcpy(&out->d, p + 80, 2);
    memcpy(&out->m, p + 82, 2);
}

/* 32 bytes of third bits | 64 bytes of two bits | 12 bytes: 16 scales of 6 bits, + 32: low halves
 * in bytes 0 to 7 (0..7 in their low, 8..15 in their high halves), high two bits in bytes 8 to 11
 * (scale 4 j + i in bits 2 j of byte 8 + i) | d */
static void read_q3_k(ki_block *out, const uint8_t *p) {
    const uint8_t *scales = p + 96;
    read_two_bits(out->codes, p + 32, 0);
    read_one_bit(out->codes, p, 2);
    for (unsigned i = 0; i < 16; i++) {
        int low = scales[i % 8] >> (i / 8 * 4) & 15, high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
        out->scales[i] = (int8_t)((low | high << 4) - 32);
    }
    memcpy(&out->d, p + 108, 2);
}

/* d | m | 12 bytes: 8 scales and 8 minima of 6 bits: bytes 0 to 3 scales, 4 to 7 minima 0..3 in
 * their low 6 bits; bytes 8 to 11 low halves of scales (low) and minima (high) 4..7, whose high two
 * bits are the top ones of bytes 0 to 3 and 4 to 7 | Q5_K: 32 bytes of fifth bits | 128 bytes: for
 * each 64 columns 32, byte i has columns i and 32 + i */
static void read_q45_k(ki_block *out, const uint8_t *p, bool five) {
    const uint8_t *scales = p + 4, *codes = p + (five ? 48 : 16);
    memcpy(&out->d, p, 2);
    memcpy(&out->m, p + 2, 2);
    for (unsigned i = 0; i < 4; i++) {
        out->scales[i] = (int8_t)(scales[i] & 63);
        out->minima[i] = scales[4 + i] & 63;
        out->scales[4 + i] = (int8_t)((scales[8 + i] & 15) | scales[i] >> 6 << 4);
        out->minima[4 + i] = (uint8_t)(scales[8 + i] >> 4 | scales[4 + i] >> 6 << 4);
    }
    for (unsigned j = 0; j < 8; j++)
        add_bits(out->codes + 32 * j, codes + j / 2 * 32, 32, j % 2 * 4, 4, 0);
    if (five) read_one_bit(out->codes, p + 16, 4);
}

/* 128 bytes of low halves: for each 128 columns 64; byte i has columns i and 64 + i | 64 bytes of
 * high two bits | 16 signed scales | d */
static void read_q6_k(ki_block *out, const uint8_t *p) {
    for (unsigned j = 0; j < 8; j++)
        add_bits(out->codes + 32 * j, p + j / 4 * 64 + j % 2 * 32, 32, j % 4 / 2 * 4, 4, 0);
    read_two_bits(out->codes, p + 128, 4);
    memcpy(out->scales, p + 192, 16);
    memcpy(&out->d, p + 208, 2);
}

void ki_block_read(ki_block *out, const uint8_t *p, ki_weight type) {
    const ki_form *form = &ki_forms[type];
    out->m = 0;
    memset(out->codes, 0, form->block_cols);
    switch (type) {
    case KI_WEIGHT_Q8_0: read_q8_0(out, p); return;
    case KI_WEIGHT_Q2_K: read_q2_k(out, p); return;
    case KI_WEIGHT_Q3_K: read_q3_k(out, p); return;
    case KI_WEIGHT_Q4_K: read_q45_k(out, p, false); return;
    case KI_WEIGHT_Q5_K: read_q45_k(out, p, true); return;
    case KI_WEIGHT_Q6_K: read_q6_k(out, p); return;
    default: read_32(out, p, form); return;
    }
}
