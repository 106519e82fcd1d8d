/* stream_wide.h: stream.h's products of more than 4 rows on sm_90a.
 *
 * A block has the outputs of up to 128 rows of weights, of one of stream.h's parts of the columns.
 * One thread brings boxes of 64 columns, of weights and of x, into a ring in shared memory; one or
 * two warpgroups multiply straight from there (wgmma.cuh), weights as the tall operand.
 *
 * Two blocks are on each multiprocessor, all of a launch at once: when one ends, one of the next
 * product takes its place and fills its ring while others still work. (One block of each of two
 * products beside each other: the second ring is full long before it is needed, and where a kernel
 * between them is in the way some multiprocessors get two blocks, others none. One block alone:
 * memory idles at every end.) Boxes are brought in pairs: 256 bytes of a row of weights at once.
 *
 * Sums of several parts go to the workspace; the block that ends last, of those with the same
 * outputs, adds them in the order of the parts. The bits are those of stream.cu. */
#ifndef KI_STREAM_WIDE_H
#define KI_STREAM_WIDE_H
#include "stream.h"

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_runtime.h>

/* What a launch has from stream.cu. */
typedef struct ki_wide_launch {
    ki_stream *of;
    uint32_t *ready; /* a bit for each kernel whose attributes were set */
    uint32_t n_sms;
    void *stream;
} ki_wide_launch;

cudaError_t ki_stream_wide(const ki_stream_call &call, const ki_wide_launch &launch);

/* The map of a matrix [n_rows][n_cols] of 16 bits in boxes of 64 columns, made or kept. */
cudaError_t ki_stream_map(CUtensorMap *out, ki_stream *of, const void *data, uint32_t n_rows,
                          uint32_t n_cols, uint32_t box_rows);
#endif
#endif
