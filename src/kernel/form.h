/* form.h: how each weight type stands in a file and in a tile. dense.h has the outline.
 *
 * A tile is 16 rows. A block of it, of as many columns as the file's, is
 *
 *     d [16] f16, then m [16] f16 where the type has a minimum,
 *     and for each 32 columns: scales [n_scales][16] bytes, minima [n_scales][16] bytes,
 *                              plane of low bits, plane of high bits
 *
 * A plane of b bits is b vectors [16 rows][4 bytes]. The eight operands of a dot product, k = 0..7,
 * are columns 4k..4k+3 of 16 rows; a plane of b bits has operand k in vector k % b, shifted left
 * by b (k / b), so unpacking is a shift and a mask. One rule for 1, 2, 4 and 8 bits. */
#ifndef KI_FORM_H
#define KI_FORM_H
#include "dense.h"

/* Where the minimum of a block comes from: nowhere, m itself, m times a byte of its own, or m times
 * the high half of the scale's byte. The last two are subtracted. */
typedef enum ki_min { KI_MIN_NONE, KI_MIN_OWN, KI_MIN_BYTE, KI_MIN_HALF } ki_min;

typedef struct ki_form {
    uint16_t block_cols, file_bytes; /* of a block; 1 column: numbers as they are */
    uint8_t low_bits, high_bits;     /* of a code, low plane and high plane */
    uint8_t zero;                    /* the code that stands for 0 */
    uint8_t n_scales;                /* integer scales for 32 columns; 0: d is the scale */
    ki_min min;
} ki_form;

static const ki_form ki_forms[KI_WEIGHT_COUNT] = {
    [KI_WEIGHT_F32] = {.block_cols = 1, .file_bytes = 4},
    [KI_WEIGHT_F16] = {.block_cols = 1, .file_bytes = 2},
    [KI_WEIGHT_BF16] = {.block_cols = 1, .file_bytes = 2},
    [KI_WEIGHT_Q4_0] = {32, 18, 4, 0, 8, 0, KI_MIN_NONE},
    [KI_WEIGHT_Q4_1] = {32, 20, 4, 0, 0, 0, KI_MIN_OWN},
    [KI_WEIGHT_Q5_0] = {32, 22, 4, 1, 16, 0, KI_MIN_NONE},
    [KI_WEIGHT_Q5_1] = {32, 24, 4, 1, 0, 0, KI_MIN_OWN},
    [KI_WEIGHT_Q8_0] = {32, 34, 8, 0, 128, 0, KI_MIN_NONE},
    [KI_WEIGHT_Q2_K] = {256, 84, 2, 0, 0, 2, KI_MIN_HALF},
    [KI_WEIGHT_Q3_K] = {256, 110, 2, 1, 4, 2, KI_MIN_NONE},
    [KI_WEIGHT_Q4_K] = {256, 144, 4, 0, 0, 1, KI_MIN_BYTE},
    [KI_WEIGHT_Q5_K] = {256, 176, 4, 1, 0, 1, KI_MIN_BYTE},
    [KI_WEIGHT_Q6_K] = {256, 210, 4, 2, 32, 2, KI_MIN_NONE},
};

/* Bytes of a row, within a tile: of a block's head, of 32 columns' scales and of their codes. */
static inline unsigned ki_form_head_bytes(const ki_form *f) {
    return f->min == KI_MIN_NONE ? 2 : 4;
}
static inline unsigned ki_form_scale_bytes(const ki_form *f) {
    return f->min == KI_MIN_BYTE ? 2u * f->n_scales : f->n_scales;
}
static inline unsigned ki_form_code_bytes(const ki_form *f) {
    return 4u * f->low_bits + 4u * f->high_bits;
}
static inline unsigned ki_form_block_bytes(const ki_form *f) {
    if (f->block_cols == 1) return f->file_bytes;
    return ki_form_head_bytes(f) +
           f->block_cols / 32u * (ki_form_scale_bytes(f) + ki_form_code_bytes(f));
}

/* One block of one row, taken out of a file: value = d scale (code - zero), plus or minus the
 * minimum. Scales and minima that the type does not have are 1. */
typedef struct ki_block {
    uint16_t d, m; /* f16 */
    int8_t scales[16];
    uint8_t minima[16]; /* [32 columns][n_scales], as the scales */
    uint8_t codes[256]; /* [block_cols], in the order of the columns */
} ki_block;

void ki_block_read(ki_block *out, const uint8_t *file_block, ki_weight type);

#endif
