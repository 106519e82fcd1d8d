/* skinny.h: products of up to 64 rows on tensor cores, whose bits do not depend on how many rows
 * there are or on where among them a row stands: those of the batch-invariant mode.
 *
 * Weights are the tall operand of mma.m16n8k16, rows of x its columns. A thread block makes 16 (of
 * many rows 32) outputs of all rows; its eight warps take every eighth run of 64 columns, and their
 * sums, float32, are added in the order of the warps. A lane loads eight neighbouring columns at a
 * time and deals them out to two instructions, of weights and of x alike, so the order of columns
 * within a run is its own; it is the same for every row and every number of them. */
#ifndef KI_SKINNY_H
#define KI_SKINNY_H
#include "gemv.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KI_SKINNY_ROWS = 64 };

/* A call of gemv.h with m from 1 to 64, without act_out; weights are not asked for ahead. */
kivi_status ki_skinny_run(const ki_gemv_call *call, void *stream, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
