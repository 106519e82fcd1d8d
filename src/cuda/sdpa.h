/* sdpa.h: attention of whole prompts by cuDNN (its scaled-dot-product attention), where that is
 * faster than kv_prompt.cu: a sequence whose rows of the step see nothing but rows of the step, all
 * of them in 16 bit (ki_plan_is_whole). Queries, keys and values are read where
 * ki_cuda_prompt_append left them, the output is written where ki_cuda_prompt_attend would, in
 * float16 (finish.h turns and converts it).
 *
 * cuDNN is optional twice: these files are compiled to a refusal where its headers are not, and its
 * library is looked for when a ki_sdpa is made (libcudnn.so.9), not when ours is loaded.
 *
 * A plan is a kernel that cuDNN compiles for one shape, which takes it most of a second; so plans
 * are made at create, for lengths rounded up to 2,048, 8,192 and 32,768 rows, and take the length
 * itself from device memory: a record of 64 bytes a sequence,
 *
 *     byte 0              16                32                 48
 *          length, i32    0, n H D, i32     0, n Hk D, i32     0, 0
 *
 * (offsets of the sequence's begin and end, in elements, as cuDNN's "ragged" tensors want them: it
 * then writes no row behind the last). Keys and values are read in tiles of 128 rows, queries of
 * 256: what is up to KI_SDPA_TAIL_ROWS behind a sequence's last row is read, and must be memory.
 * Values there must be finite: their weights are 0.
 *
 * Numbers: float32 scores and sums, probabilities and results in float16; the same call gives the
 * same bits. A query row reads exactly what kv_prompt.cu's does; the order of sums is another. */
#ifndef KI_SDPA_H
#define KI_SDPA_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KI_SDPA_MIN_ROWS = 1024,  /* shorter ones: kv_prompt.cu takes less time than the difference */
    KI_SDPA_MAX_ROWS = 32768, /* the backend's most rows a step */
    KI_SDPA_TAIL_ROWS = 256,
    KI_SDPA_RECORD_BYTES = 64,
    KI_SDPA_MAX_WINDOWS = 2 /* layers with a sliding window, and those without */
};

typedef struct ki_sdpa ki_sdpa;

typedef struct ki_sdpa_options {
    ki_mem *mem; /* of the host; lent */
    uint32_t n_heads, n_kv_heads, head_dim;
    uint32_t windows[KI_SDPA_MAX_WINDOWS]; /* a query at p sees positions > p - window; 0: all */
    uint32_t n_windows;
    uint32_t min_rows, max_rows; /* lengths to make plans for: those between are run */
    uint32_t compute_major;      /* of the device: 8 or 9 */
    uint64_t workspace_bytes;    /* what run's workspace has: a plan that wants more is refused */
    bool exact; /* measurements: plans without lengths in device memory, for max_rows alone */
    const char *device_json; /* tests: plans for the device described, which need not be there, and
                              * cannot be run; NULL: the calling thread's device */
} ki_sdpa_options;

/* One sequence, all heads. Device memory, 16-byte aligned, first the sequence's first row. */
typedef struct ki_sdpa_call {
    const uint16_t *q, *k, *v; /* [n_rows][H][D], [n_rows][Hk][D], [n_rows][Hk][D] f16 */
    uint16_t *out;             /* [n_rows][H][D] f16 */
    const void *record;        /* ki_sdpa_record, in device memory */
    void *workspace;           /* overwritten */
    uint32_t n_rows, window;   /* within what plans were made for */
    float scale;               /* of q . k */
} ki_sdpa_call;

/* UNSUPPORTED, with the reason, where cuDNN is missing, too old or has no kernel for these shapes.
 * Takes seconds: cuDNN compiles. */
kivi_status ki_sdpa_create(ki_sdpa **out, const ki_sdpa_options *options, kivi_error *err);
void ki_sdpa_destroy(ki_sdpa **sdpa);
const char *ki_sdpa_name(const ki_sdpa *sdpa);   /* "cuDNN 9.19.0"; lives as long as sdpa */
uint64_t ki_sdpa_workspace(const ki_sdpa *sdpa); /* bytes that the most wanting plan takes */
/* Queues it on a stream (a cudaStream_t) of the device that plans were made for; allocates no
 * device memory. */
kivi_status ki_sdpa_run(ki_sdpa *sdpa, const ki_sdpa_call *call, void *stream, kivi_error *err);

/* ---- what needs no cuDNN ---- */

/* The rows of the plan that a sequence of n rows takes. */
static inline uint32_t ki_sdpa_rows(uint32_t n) {
    uint32_t rows = 2 * KI_SDPA_MIN_ROWS;
    while (rows < n) rows *= 4;
    return rows;
}

static inline void ki_sdpa_record(int32_t out[KI_SDPA_RECORD_BYTES / 4], uint32_t n_rows,
                                  uint32_t n_heads, uint32_t n_kv_heads, uint32_t head_dim) {
    memset(out, 0, KI_SDPA_RECORD_BYTES);
    out[0] = (int32_t)n_rows;
    out[5] = (int32_t)(n_rows * n_heads * head_dim);
    out[9] = (int32_t)(n_rows * n_kv_heads * head_dim);
}

#ifdef __cplusplus
}
#endif
#endif
