/* gemm.h: products of rows with weights of one type, by cuBLASLt, sums and results in float32.
 *
 * out[m][n] = sum over k of x[m][k] weight[n][k] (+ out[m][n]). Which of cuBLASLt's kernels makes a
 * product is chosen once, at prepare, for the number of rows rounded up (ki_gemm_rows); rows that
 * are only there for the rounding are computed from whatever their memory holds and never read. So
 * a row's bits depend on the rounded number, and the same batch gives the same bits. */
#ifndef KI_GEMM_H
#define KI_GEMM_H
#include "base.h"

typedef struct ki_gemm ki_gemm;

/* Of weights and rows; in the order of ki_cuda_type. F32 is for comparisons: no tensor cores. */
typedef enum ki_gemm_type { KI_GEMM_F32, KI_GEMM_F16, KI_GEMM_BF16 } ki_gemm_type;

typedef struct ki_gemm_shape {
    uint32_t n, k;     /* outputs and inputs */
    size_t out_stride; /* floats between rows of out */
} ki_gemm_shape;

enum { KI_GEMM_WORKSPACE_BYTES = 32 << 20 }; /* what NVIDIA recommends for Hopper */
enum { KI_GEMM_STEP_ROWS = 64 };             /* rows are rounded up by less than that */

/* The rows a product of m rows is computed with: what buffers must have room for. */
uint32_t ki_gemm_rows(uint32_t m);

/* Instead of cuBLASLt's own ranking, the fastest of its first kernels for products of up to
 * KI_GEMM_TIMED_ROWS rows, measured at prepare. Which that is can differ from start to start, and
 * with it the order of sums; within an engine bits repeat as ever. */
typedef struct ki_gemm_timing {
    uint8_t *scratch; /* device memory, 256-byte aligned, lent until prepare is done */
    size_t n_bytes;   /* several times the weights of a product, so that none are in a cache */
    void *stream;
    void (*log)(void *user, const char *line); /* NULL: silent */
    void *log_user;
} ki_gemm_timing;
enum { KI_GEMM_TIMED_ROWS = 64 };

/* timing NULL: cuBLASLt's ranking. */
kivi_status ki_gemm_create(ki_gemm **out, ki_mem *mem, void *workspace, ki_gemm_type type,
                           const ki_gemm_timing *timing, kivi_error *err);
void ki_gemm_destroy(ki_gemm **gemm);
/* Chooses kernels for this shape and all numbers of rows up to max_rows. */
kivi_status ki_gemm_prepare(ki_gemm *gemm, const ki_gemm_shape *shape, uint32_t max_rows,
                            kivi_error *err);
/* add: out is added to, else overwritten. The shape must have been prepared. */
kivi_status ki_gemm_run(const ki_gemm *gemm, float *out, const void *weight, const void *x,
                        const ki_gemm_shape *shape, uint32_t m, bool add, void *stream,
                        kivi_error *err);

#endif
