/* stream.h: products of up to 64 rows, for which time is what reading the weights once takes.
 *
 * Shapes. weight [n][k] and rows x [m][k] of `type`; out [m][n] float32. On sm_90a those of more
 * than 4 rows are stream_wide.h's. What is left, and all on sm_80, is stream.cu's: a thread block
 * makes 16 to 256 outputs of all rows: one producer warp brings weights and rows into a ring of
 * stages in shared memory, 64 columns a stage (tensor copies on sm_90, cp.async before), eight
 * warps multiply them with mma.m16n8k16, weights as the tall operand. Weights depend on nothing:
 * the ring is filled before the kernel before this one has ended (programmatic dependent launch),
 * and leaves room for the ring of the one behind it, so that memory is never idle between two
 * products.
 *
 * Places. Each multiprocessor should have one thread block of a product: one with two takes longer
 * than the others, and all wait for it. But blocks are placed where there is room, and there is
 * room for two as soon as it is not taken by the product before. So products behind each other
 * take turns, FIRST and SECOND, and one of the two fills more than half of a multiprocessor. Where
 * a block of that is there is room for one of the other, and the other way round. Of several rows
 * FIRST is the large one, 5 to 3. Of one row SECOND is, by little: what comes behind attention
 * finds empty multiprocessors and has one block on each, and a block of attention fits beside
 * either.
 *
 * Ends. On sm_90 thread blocks that share the parts of an output are a cluster. Of up to 4 rows
 * each row is added up by one of them: the others send it their sums (st.async) and are done.
 *
 * Pace. A ring asks for more than memory gives in five microseconds, and whatever is asked for
 * behind that waits, instructions too. A product that comes while attention of one row is at work
 * asks in measured steps.
 *
 * Order of sums. Columns are cut into 1, 4 or 8 parts, by n alone; each part is one float32 chain
 * over steps of 16 columns, in their order; the parts are added in theirs. It depends on neither m
 * nor a row's place nor the device's size: a row has the same bits in every batch of up to 64. */
#ifndef KI_STREAM_H
#define KI_STREAM_H
#include "kv_cuda.h" /* ki_fail is C's */

#include "dense_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KI_STREAM_ROWS = 64 };

/* Device memory of the products of one CUDA stream: counters, 0 before the first one (each leaves
 * them so), then sums. */
enum { KI_STREAM_COUNTER_BYTES = 4096, KI_STREAM_WORKSPACE_BYTES = 12 << 20 };

/* Its place in a chain. ALONE: rings of half a multiprocessor, two blocks of any product. */
typedef enum ki_stream_part { KI_STREAM_ALONE, KI_STREAM_FIRST, KI_STREAM_SECOND } ki_stream_part;

/* At what share of the memory's rate a ring is filled before its product begins, in 16ths; 0: at
 * once. BESIDE what attends, and the one BEHIND that. */
typedef enum ki_stream_pace {
    KI_STREAM_AT_ONCE = 0,
    KI_STREAM_BESIDE = 11,
    KI_STREAM_BEHIND = 3
} ki_stream_pace;

/* out[m][n] (+)= sum over k of x[m][k] weight[n][k]; m 1 to 64, k a multiple of 8; type F16 or
 * BF16; weight and x 16-byte aligned. With act_out instead of out: gate and up are the first and
 * the second half of the n rows, and act_out[m][n / 2] of `type` is act(gate) up, the bits that
 * ki_cuda_activate makes of out. */
typedef struct ki_stream_call {
    float *out;
    size_t out_stride;
    const void *weight, *x;
    uint32_t n, k, m;
    ki_cuda_type type;
    bool add;
    void *workspace; /* KI_STREAM_WORKSPACE_BYTES */
    ki_stream_part part;
    ki_stream_pace pace; /* of one row on sm_90 */
    void *act_out;   /* NULL: out */
    ki_cuda_act act; /* SILU_MUL or GELU_MUL */
    /* The kernel behind may begin when the one before has ended, not at once: for one that would
     * only take places from this one, or from the one before. */
    bool lets_late;
    /* Instead of x, where ki_stream_takes_norm: x is norm(raw), raw [m][k] float32, the bits that
     * ki_cuda_norm_rows makes of it. */
    const float *raw;
    ki_cuda_norm norm;
} ki_stream_call;

/* What launches need and none changes: numbers of the device, and the maps of tensor copies. One
 * for each engine, and one thread at a time. */
typedef struct ki_stream ki_stream;

/* Of the calling thread's device; host memory of mem, which is lent. */
kivi_status ki_stream_create(ki_stream **out, ki_mem *mem, kivi_error *err);
void ki_stream_destroy(ki_stream **stream);
uint32_t ki_stream_n_maps(const ki_stream *stream); /* encoded since it was created */

kivi_status ki_stream_run(ki_stream *of, const ki_stream_call *call, void *stream, kivi_error *err);
/* Of few rows each thread block normalizes them by itself: one kernel less in the way. */
bool ki_stream_takes_norm(const ki_cuda_norm *norm, uint32_t m, uint32_t k);

#ifdef __cplusplus
}
#endif
#endif
