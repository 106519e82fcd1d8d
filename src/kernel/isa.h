/* isa.h: makes one table from the templates. An isa_<name>.c defines KI_TABLE and KI_TABLE_ISA,
 * then includes this; the Makefile gives that one file the flags of its instruction set. */
#include "kernel.h"

#include "attn_simd.h"
#include "dense_simd.h"
#include "plus_simd.h"
#include "quant_simd.h"

extern const ki_kernels KI_TABLE;
const ki_kernels KI_TABLE = {
    .isa = KI_TABLE_ISA,
    .quant = {.quantize = quantize_simd, .to_f16 = to_f16_simd},
    .plus = {.close_keys = plus_close_keys_simd,
             .quantize_values = plus_quantize_values_simd,
             .turn = plus_turn_simd},
    .attn = {.tile = attn_tile_simd, .merge = attn_merge_simd, .finish = attn_finish_simd},
    .dense = {.quantize_row = quantize_row_simd,
              .matmul = matmul_simd,
              .rms_norm = rms_norm_simd,
              .rope = rope_simd,
              .silu_mul = silu_mul_simd,
              .gelu_mul = gelu_mul_simd,
              .gelu = gelu_simd,
              .layer_norm = layer_norm_simd,
              .add = add_simd,
              .scale = scale_simd,
              .exp = exp_simd},
};
