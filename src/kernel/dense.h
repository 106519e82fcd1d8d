/* dense.h: weights times activations, and the small steps between them.
 *
 * A matrix [n_rows][n_cols] is kept in tiles of 16 rows, so that 16 outputs stand in the lanes of a
 * vector and no sum crosses lanes. Within a tile columns come in order:
 *
 *     F32 F16 BF16   [col][16 rows]
 *     quantized      blocks of the file's columns: d, m [16] f16, and for each 32 columns integer
 *                    scales, then planes of 1, 2, 4 or 8 bits of the codes (form.h)
 *
 * so that 64 bytes are one operand of an integer dot product whose other side is four activations,
 * broadcast. The formats' values are d (c - zero), or that times a scale, and some add a minimum:
 *
 *     Q4_0 d (c - 8)     Q5_0 d (c - 16)    Q4_1 Q5_1 d c + m     Q8_0 d (c - 128)
 *     Q3_K d s (c - 4)   Q6_K d s (c - 32)  Q2_K Q4_K Q5_K d s c - m n
 *
 * with integers s and n for each 16 columns (Q2_K Q3_K Q6_K) or 32. Nothing is rounded in packing.
 * Sizes are those of the file but for 6-bit scales, which become bytes: 0.125 bits a column more in
 * Q3_K, Q4_K and Q5_K.
 *
 * Quantized matrices multiply activations of 15 bits: per 32 columns one float32 scale, largest |x|
 * / 16256, and integers 128 high + low of two signed bytes, each an operand of the dot product.
 * (One byte, as other engines have, costs a 4-bit model a tenth of a nat in its log-probabilities;
 * two cost time only where memory is not the limit.)
 *     acc = fma((float)(integer sum), scale * dx, acc)
 *     acc = fma(minimum, dx * sum of x, acc)           where the type has one
 * for each scale, in column order: each output is one chain, whatever the tile sizes, so results
 * repeat on every machine and batch. */
#ifndef KI_DENSE_H
#define KI_DENSE_H
#include "base.h"

enum { KI_TILE_ROWS = 16, KI_BLOCK_COLS = 32, KI_SUM_COLS = 16 };

typedef enum ki_weight {
    KI_WEIGHT_F32,
    KI_WEIGHT_F16,
    KI_WEIGHT_BF16,
    KI_WEIGHT_Q4_0,
    KI_WEIGHT_Q4_1,
    KI_WEIGHT_Q5_0,
    KI_WEIGHT_Q5_1,
    KI_WEIGHT_Q8_0,
    KI_WEIGHT_Q2_K,
    KI_WEIGHT_Q3_K,
    KI_WEIGHT_Q4_K,
    KI_WEIGHT_Q5_K,
    KI_WEIGHT_Q6_K,
    KI_WEIGHT_COUNT
} ki_weight;

typedef struct ki_matrix {
    ki_weight type;
    uint32_t n_rows, n_cols; /* n_cols % 16 == 0; whole blocks of 32 or 256 */
    uint8_t *tiles;          /* ki_matrix_bytes() bytes; rows past n_rows are zero */
} ki_matrix;

bool ki_weight_is_quantized(ki_weight type);
/* Bytes of a matrix in memory; false on overflow. */
bool ki_matrix_bytes(size_t *out, ki_weight type, uint32_t n_rows, uint32_t n_cols);
/* Fills tiles [first_tile, end_tile) from rows in the file's order (rows one after the other). */
void ki_matrix_pack(ki_matrix *matrix, const uint8_t *file_rows, uint32_t first_tile,
                    uint32_t end_tile);
/* Row r of the matrix from one row in the file's form. Rows of one tile must not be packed at the
 * same time. */
void ki_matrix_pack_row(ki_matrix *matrix, const uint8_t *file_row, uint32_t row);
/* One row as float32 [n_cols]. */
void ki_matrix_row(float *out, const ki_matrix *matrix, uint32_t row);

/* Rows of activations as a matrix product reads them. */
typedef struct ki_activations {
    uint32_t n_cols;
    const float *x;     /* [rows][n_cols] f32 */
    int8_t *high, *low; /* [rows][n_cols] each: the integer is 128 high + low */
    float *scales;      /* [rows][n_cols / 32] */
    int32_t *sums;      /* [rows][n_cols / 16]: of the integers */
    float *offsets;     /* [rows][n_cols / 32]: scale times the sum of 32 integers */
    int16_t *pairs;     /* [rows][n_cols]: the integers once more, where products are of 16 bits */
} ki_activations;

typedef struct ki_dense_kernels {
    /* Row `row` of a from a->x; of one that is not finite, zeros with a NaN for the first scale. */
    void (*quantize_row)(ki_activations *a, size_t row);
    /* out[r][tile rows] for tiles [first_tile, end_tile) and activation rows [0, n_rows): out is
     * [n_rows][out_stride], its columns the matrix rows. Quantized types read a->high, low, scales
     * and sums, the others a->x. */
    void (*matmul)(float *out, size_t out_stride, const ki_matrix *matrix, uint32_t first_tile,
                   uint32_t end_tile, const ki_activations *a, size_t n_rows);
    /* out = x / sqrt(mean(x^2) + eps) * weight; [n], n % 16 == 0 */
    void (*rms_norm)(float *out, const float *x, const float *weight, uint32_t n, float eps);
    /* Rotates pairs (j, j + D/2) of one head x [D] by cos and sin [D/2]; D % 32 == 0 or the last
     * lanes are scalar. */
    void (*rope)(float *x, const float *cos, const float *sin, uint32_t head_dim);
    /* out = silu(gate) * up = gate / (1 + e^-gate) * up; [n] */
    void (*silu_mul)(float *out, const float *gate, const float *up, uint32_t n);
    /* out = gelu(gate) * up, gelu by tanh: gate / (1 + e^-2u), u = sqrt(2 / pi) (gate + 0.044715
     * gate^3) */
    void (*gelu_mul)(float *out, const float *gate, const float *up, uint32_t n);
    /* out = x * (1 + erf(x / sqrt 2)) / 2, erf within 1.5e-7; [n] */
    void (*gelu)(float *out, const float *x, uint32_t n);
    /* out = (x - mean) / sqrt(variance + eps) * weight + bias; [n], n % 16 == 0 */
    void (*layer_norm)(float *out, const float *x, const float *weight, const float *bias,
                       uint32_t n, float eps);
    void (*add)(float *x, const float *y, uint32_t n); /* x += y */
    void (*scale)(float *out, const float *x, float factor, uint32_t n);
    /* out = e^x, [n], n % 16 == 0: for tests of the shared exponential */
    void (*exp)(float *out, const float *x, uint32_t n);
} ki_dense_kernels;

#endif
