/* dense.c: rows of a file to tiles and back. form.h has the layout. */
#include "form.h"

bool ki_weight_is_quantized(ki_weight type) { return ki_forms[type].block_cols != 1; }

bool ki_matrix_bytes(size_t *out, ki_weight type, uint32_t n_rows, uint32_t n_cols) {
    const ki_form *form = &ki_forms[type];
    size_t rows, row_bytes;
    return ki_round_up(&rows, n_rows, KI_TILE_ROWS) &&
           ki_mul(&row_bytes, n_cols / form->block_cols, ki_form_block_bytes(form)) &&
           ki_mul(out, rows, row_bytes);
}

static uint8_t *tile_of(const ki_matrix *m, uint32_t row) {
    const ki_form *form = &ki_forms[m->type];
    size_t row_bytes = (size_t)m->n_cols / form->block_cols * ki_form_block_bytes(form);
    return m->tiles + row / KI_TILE_ROWS * (row_bytes * KI_TILE_ROWS);
}

static uint32_t load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static uint16_t load_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static uint32_t mask_of(unsigned bits) { return (0xffu >> (8 - bits)) * 0x01010101u; }

/* ---- a row into its tile ---- */

/* `bits` bits of 32 codes, from bit `from` on, as a row's part of a plane; four columns are one
 * word, as in the vectors of the kernels. */
static inline void pack_bits(uint8_t *plane, const uint8_t *codes, unsigned lane, unsigned bits,
                             unsigned from) {
    for (unsigned g = 0; g < bits; g++) {
        uint32_t word = 0;
        for (unsigned t = 0; t < 8 / bits; t++)
            word |= (load_u32(codes + 4 * (g + bits * t)) >> from & mask_of(bits)) << bits * t;
        memcpy(plane + (g * KI_TILE_ROWS + lane) * 4, &word, 4);
    }
}

/* Loading a model is mostly this: `bits` is a constant within each call. */
static void pack_plane(uint8_t *plane, const uint8_t *codes, unsigned lane, unsigned bits,
                       unsigned from) {
    switch (bits) {
    case 1: pack_bits(plane, codes, lane, 1, from); return;
    case 2: pack_bits(plane, codes, lane, 2, from); return;
    case 4: pack_bits(plane, codes, lane, 4, from); return;
    default: pack_bits(plane, codes, lane, 8, from); return;
    }
}

/* Scales, minima and codes of 32 columns, the s-th of the block. */
static uint8_t *pack_32(uint8_t *out, const ki_block *block, unsigned s, unsigned lane,
                        const ki_form *form) {
    unsigned n = form->n_scales;
    for (unsigned i = 0; i < n; i++) {
        unsigned scale = (uint8_t)block->scales[s * n + i], min = block->minima[s * n + i];
        if (form->min == KI_MIN_HALF) scale |= min << 4;
        out[i * KI_TILE_ROWS + lane] = (uint8_t)scale;
        if (form->min == KI_MIN_BYTE) out[(n + i) * KI_TILE_ROWS + lane] = (uint8_t)min;
    }
    out += ki_form_scale_bytes(form) * KI_TILE_ROWS;
    pack_plane(out, block->codes + s * 32, lane, form->low_bits, 0);
    out += form->low_bits * KI_TILE_ROWS * 4;
    if (form->high_bits)
        pack_plane(out, block->codes + s * 32, lane, form->high_bits, form->low_bits);
    return out + form->high_bits * KI_TILE_ROWS * 4;
}

static void pack_block(uint8_t *out, const uint8_t *file_block, unsigned lane, ki_weight type) {
    const ki_form *form = &ki_forms[type];
    ki_block block;
    ki_block_read(&block, file_block, type);
    memcpy(out + lane * 2, &block.d, 2);
    if (form->min != KI_MIN_NONE) memcpy(out + (KI_TILE_ROWS + lane) * 2, &block.m, 2);
    out += ki_form_head_bytes(form) * KI_TILE_ROWS;
    for (unsigned s = 0; s < form->block_cols / 32u; s++) out = pack_32(out, &block, s, lane, form);
}

static void pack_plain_row(uint8_t *tile, const uint8_t *row, unsigned lane, uint32_t n_cols,
                           unsigned item_bytes) {
    for (uint32_t c = 0; c < n_cols; c++)
        memcpy(tile + ((size_t)c * KI_TILE_ROWS + lane) * item_bytes, row + (size_t)c * item_bytes,
               item_bytes);
}

void ki_matrix_pack_row(ki_matrix *m, const uint8_t *row, uint32_t r) {
    const ki_form *form = &ki_forms[m->type];
    uint8_t *tile = tile_of(m, r);
    unsigned lane = r % KI_TILE_ROWS, n_bytes = ki_form_block_bytes(form);
    if (!ki_weight_is_quantized(m->type)) {
        pack_plain_row(tile, row, lane, m->n_cols, n_bytes);
        return;
    }
    for (uint32_t b = 0; b < m->n_cols / form->block_cols; b++)
        pack_block(tile + (size_t)b * n_bytes * KI_TILE_ROWS, row + (size_t)b * form->file_bytes,
                   lane, m->type);
}

void ki_matrix_pack(ki_matrix *matrix, const uint8_t *file_rows, uint32_t first_tile,
                    uint32_t end_tile) {
    const ki_form *form = &ki_forms[matrix->type];
    size_t row_bytes = (size_t)matrix->n_cols / form->block_cols * form->file_bytes;
    uint32_t end = KI_MIN(end_tile * KI_TILE_ROWS, matrix->n_rows);
    for (uint32_t r = first_tile * KI_TILE_ROWS; r < end; r++)
        ki_matrix_pack_row(matrix, file_rows + r * row_bytes, r);
}

/* ---- a row out of its tile ---- */

static void plain_row(float *out, const ki_matrix *m, const uint8_t *tile, unsigned lane) {
    for (uint32_t c = 0; c < m->n_cols; c++) {
        const uint8_t *p = tile + ((size_t)c * KI_TILE_ROWS + lane) * ki_forms[m->type].file_bytes;
        if (m->type == KI_WEIGHT_F32) memcpy(&out[c], p, 4);
        else
            out[c] =
                m->type == KI_WEIGHT_F16 ? ki_f16_to_f32(load_u16(p)) : ki_bf16_to_f32(load_u16(p));
    }
}

static void unpack_plane(uint8_t *codes, const uint8_t *plane, unsigned lane, unsigned bits,
                         unsigned to) {
    for (unsigned k = 0; k < 8; k++) {
        uint32_t word = load_u32(plane + (k % bits * KI_TILE_ROWS + lane) * 4);
        word = load_u32(codes + 4 * k) | (word >> bits * (k / bits) & mask_of(bits)) << to;
        memcpy(codes + 4 * k, &word, 4);
    }
}

/* d times a scale has at most 19 bits and their product with a code at most 24, so a value is
 * rounded once, where its minimum is added. */
static const uint8_t *row_32(float *out, const uint8_t *p, unsigned lane, float d, float m,
                             const ki_form *form) {
    uint8_t codes[32] = {0};
    const uint8_t *scales = p + lane, *minima = scales + form->n_scales * KI_TILE_ROWS;
    unsigned per_scale = form->n_scales == 2 ? 16 : 32;
    p += ki_form_scale_bytes(form) * KI_TILE_ROWS;
    unpack_plane(codes, p, lane, form->low_bits, 0);
    p += form->low_bits * KI_TILE_ROWS * 4;
    if (form->high_bits) unpack_plane(codes, p, lane, form->high_bits, form->low_bits);
    for (unsigned i = 0; i < 32; i++) {
        unsigned at = i / per_scale * KI_TILE_ROWS;
        float scale = d, min = m;
        if (form->min == KI_MIN_HALF) {
            scale = d * (float)(scales[at] & 15);
            min = -(m * (float)(scales[at] >> 4));
        } else if (form->n_scales) scale = d * (float)(int8_t)scales[at];
        if (form->min == KI_MIN_BYTE) min = -(m * (float)minima[at]);
        out[i] = scale * (float)(codes[i] - form->zero) + min;
    }
    return p + form->high_bits * KI_TILE_ROWS * 4;
}

static void block_row(float *out, const uint8_t *p, unsigned lane, const ki_form *form) {
    bool has_min = form->min != KI_MIN_NONE;
    float d = ki_f16_to_f32(load_u16(p + lane * 2));
    float m = has_min ? ki_f16_to_f32(load_u16(p + (KI_TILE_ROWS + lane) * 2)) : 0;
    p += ki_form_head_bytes(form) * KI_TILE_ROWS;
    for (unsigned c = 0; c < form->block_cols; c += 32) p = row_32(out + c, p, lane, d, m, form);
}

void ki_matrix_row(float *out, const ki_matrix *matrix, uint32_t row) {
    const ki_form *form = &ki_forms[matrix->type];
    const uint8_t *tile = tile_of(matrix, row);
    unsigned lane = row % KI_TILE_ROWS;
    if (!ki_weight_is_quantized(matrix->type)) {
        plain_row(out, matrix, tile, lane);
        return;
    }
    size_t block_bytes = (size_t)ki_form_block_bytes(form) * KI_TILE_ROWS;
    for (uint32_t b = 0; b < matrix->n_cols / form->block_cols; b++)
        block_row(out + (size_t)b * form->block_cols, tile + b * block_bytes, lane, form);
}
