#include "dense.h"

/* Bytes per element or per 32-column block, in the file. */
typedef struct weight_traits {
    unsigned block_cols, block_bytes;
} weight_traits;
static const weight_traits traits[KI_WEIGHT_COUNT] = {
    [KI_WEIGHT_F32] = {1, 4},    [KI_WEIGHT_F16] = {1, 2},    [KI_WEIGHT_BF16] = {1, 2},
    [KI_WEIGHT_Q4_0] = {32, 18}, [KI_WEIGHT_Q4_1] = {32, 20}, [KI_WEIGHT_Q8_0] = {32, 34},
};

bool ki_weight_is_quantized(ki_weight type) { return traits[type].block_cols == 32; }

bool ki_matrix_bytes(size_t *out, ki_weight type, uint32_t n_rows, uint32_t n_cols) {
    size_t rows, row_bytes;
    return ki_round_up(&rows, n_rows, KI_TILE_ROWS) &&
           ki_mul(&row_bytes, n_cols / traits[type].block_cols, traits[type].block_bytes) &&
           ki_mul(out, rows, row_bytes);
}

static size_t tile_bytes(const ki_matrix *m) {
    return (size_t)m->n_cols / traits[m->type].block_cols * traits[m->type].block_bytes *
           KI_TILE_ROWS;
}

static void pack_plain_row(uint8_t *tile, const uint8_t *row, unsigned lane, uint32_t n_cols,
                           unsigned item_bytes) {
    for (uint32_t c = 0; c < n_cols; c++)
        memcpy(tile + ((size_t)c * KI_TILE_ROWS + lane) * item_bytes, row + (size_t)c * item_bytes,
               item_bytes);
}

/* One 32-column block of one row. The file's nibble byte i holds columns i (low) and i + 16 (high):
 * already the two columns that share a byte in the tile. */
static void pack_block(uint8_t *block, const uint8_t *source, unsigned lane, ki_weight type) {
    unsigned n_heads = type == KI_WEIGHT_Q4_1 ? 2 : 1; /* d, or d and m */
    for (unsigned h = 0; h < n_heads; h++)
        memcpy(block + (h * KI_TILE_ROWS + lane) * 2, source + 2 * h, 2);
    uint8_t *codes = block + n_heads * KI_TILE_ROWS * 2;
    source += 2 * n_heads;
    unsigned n_bytes = type == KI_WEIGHT_Q8_0 ? 32 : 16, bias = type == KI_WEIGHT_Q8_0 ? 128 : 0;
    for (unsigned i = 0; i < n_bytes; i++)
        codes[(i / 4 * KI_TILE_ROWS + lane) * 4 + i % 4] = (uint8_t)(source[i] ^ bias);
}

void ki_matrix_pack_row(ki_matrix *m, const uint8_t *row, uint32_t r) {
    uint8_t *tile = m->tiles + r / KI_TILE_ROWS * tile_bytes(m);
    unsigned lane = r % KI_TILE_ROWS, n_bytes = traits[m->type].block_bytes;
    if (!ki_weight_is_quantized(m->type)) {
        pack_plain_row(tile, row, lane, m->n_cols, n_bytes);
        return;
    }
    for (uint32_t b = 0; b < m->n_cols / KI_BLOCK_COLS; b++)
        pack_block(tile + (size_t)b * n_bytes * KI_TILE_ROWS, row + (size_t)b * n_bytes, lane,
                   m->type);
}

void ki_matrix_pack(ki_matrix *matrix, const uint8_t *file_rows, uint32_t first_tile,
                    uint32_t end_tile) {
    size_t row_bytes = tile_bytes(matrix) / KI_TILE_ROWS;
    uint32_t end = KI_MIN(end_tile * KI_TILE_ROWS, matrix->n_rows);
    for (uint32_t r = first_tile * KI_TILE_ROWS; r < end; r++)
        ki_matrix_pack_row(matrix, file_rows + r * row_bytes, r);
}

static uint16_t load_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static void plain_row(float *out, const ki_matrix *m, const uint8_t *tile, unsigned lane) {
    for (uint32_t c = 0; c < m->n_cols; c++) {
        const uint8_t *p = tile + ((size_t)c * KI_TILE_ROWS + lane) * traits[m->type].block_bytes;
        if (m->type == KI_WEIGHT_F32) memcpy(&out[c], p, 4);
        else
            out[c] =
                m->type == KI_WEIGHT_F16 ? ki_f16_to_f32(load_u16(p)) : ki_bf16_to_f32(load_u16(p));
    }
}

static void block_row(float *out, const uint8_t *block, unsigned lane, ki_weight type) {
    float d = ki_f16_to_f32(load_u16(block + lane * 2)), m = 0;
    const uint8_t *codes = block + KI_TILE_ROWS * 2;
    if (type == KI_WEIGHT_Q4_1) {
        m = ki_f16_to_f32(load_u16(codes + lane * 2));
        codes += KI_TILE_ROWS * 2;
    }
    for (unsigned i = 0; i < KI_BLOCK_COLS; i++) {
        unsigned j = type == KI_WEIGHT_Q8_0 ? i : i % 16,
                 byte = codes[(j / 4 * KI_TILE_ROWS + lane) * 4 + j % 4];
        if (type == KI_WEIGHT_Q8_0) out[i] = d * (float)((int)byte - 128);
        else
            out[i] = d * (float)((int)(i < 16 ? byte & 15 : byte >> 4) -
                                 (type == KI_WEIGHT_Q4_0 ? 8 : 0)) +
                     m;
    }
}

void ki_matrix_row(float *out, const ki_matrix *matrix, uint32_t row) {
    const uint8_t *tile = matrix->tiles + row / KI_TILE_ROWS * tile_bytes(matrix);
    unsigned lane = row % KI_TILE_ROWS;
    if (!ki_weight_is_quantized(matrix->type)) {
        plain_row(out, matrix, tile, lane);
        return;
    }
    size_t block_bytes = (size_t)traits[matrix->type].block_bytes * KI_TILE_ROWS;
    for (uint32_t b = 0; b < matrix->n_cols / KI_BLOCK_COLS; b++)
        block_row(out + b * KI_BLOCK_COLS, tile + b * block_bytes, lane, matrix->type);
}
