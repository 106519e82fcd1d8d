/* kivi_bench.h: measures a CUDA device's kernels of the cache by themselves: random data, no model.
 * `kivi bench attention` prints what comes of it.
 *
 * A figure is the median of event-timed replays of a CUDA graph of launches that take turns on a
 * gigabyte of pages, more than an L2 cache has, or on 256 batches; head size 128. */
#ifndef KIVI_BENCH_H
#define KIVI_BENCH_H
#include "kivi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* READ, COPY  a stream that only reads, and a copy: always measured, all shares are of READ
 * DECODE      decode attention over pages alone, splits chosen for the batch
 * CONSTANT    the same with splits of constant size: no row depends on its neighbours' lengths
 * WINDOW      decode attention with the 16-bit window: R of the kind, and 32 where it may have that
 * LENGTH      WINDOW at 128, 256, ... 131,072 tokens, of the first kind
 * APPEND      one row to each sequence, of one layer of 32: rope, window, by a launch of its own;
 *             and its part of the codes of values, which a step makes at its end
 * WITHIN      the same row of sides that are both packed as an engine appends it, by attention of
 *             256 tokens: what that takes longer, and the part of the codes of values
 * CLOSE       the keys of a page of each sequence in one layer become codes, as once in R rows
 * PROMPT      causal attention of one whole prompt over its own 16-bit rows, batch 1: our own kernel,
 *             and cuDNN's where it is, with the length in device memory (kind "cudnn", which is
 *             what the engine runs) and in the plan ("cudnn-exact") */
#define KIVI_BENCH_LIST(X)                                                                         \
    X(READ, "read")                                                                                \
    X(COPY, "copy")                                                                                \
    X(DECODE, "decode")                                                                            \
    X(CONSTANT, "constant")                                                                        \
    X(WINDOW, "window")                                                                            \
    X(LENGTH, "length")                                                                            \
    X(APPEND, "append")                                                                            \
    X(WITHIN, "within")                                                                            \
    X(CLOSE, "close")                                                                              \
    X(PROMPT, "prompt")

typedef enum kivi_bench_what {
#define X(name, text) KIVI_BENCH_##name,
    KIVI_BENCH_LIST(X)
#undef X
    KIVI_BENCH_N
} kivi_bench_what;

typedef struct kivi_bench_shape {
    uint32_t n_batch, n_heads, n_kv_heads, n_tokens; /* n_tokens: a multiple of 128 */
} kivi_bench_shape;

typedef struct kivi_bench_kind { /* group 32, 64 or 128 */
    const char *name;            /* lent */
    kivi_kv_options kv;
} kivi_bench_kind;

typedef struct kivi_bench_row {
    kivi_bench_what what;
    const char *device; /* "cuda:0 NVIDIA H100 80GB HBM3", lent */
    const char *kind;   /* "" where no cache is read */
    kivi_bench_shape shape;
    uint32_t window_tokens;  /* R; 0: pages alone */
    double us, bytes, flops; /* of one launch; 0 where it does not apply. Bytes: of pages, streams */
    double read_share;       /* bytes / us over the same of the read-only stream; 0 as above */
} kivi_bench_row;

typedef struct kivi_bench_options {
    const char *device; /* "cuda", "cuda:N"; NULL, "auto": the first there is */
    const kivi_bench_kind *kinds;
    size_t n_kinds; /* 1 to 16 */
    /* NULL: for DECODE, CONSTANT, WINDOW batch 32 and 8 with 32 over 32 heads at 4,096 and 32,768
     * tokens, 32 and 8 with 32 over 8 at 8,192 and 32,768, 1 with 32 over 8 at 131,072; for LENGTH
     * batch 1, 8, 32 with 32 over 8; for APPEND, WITHIN, CLOSE batch 1 and 32 with 32 over 32; for
     * PROMPT 32 over 32 at 4,096 and 32,768. Else these; where the length (LENGTH, APPEND, WITHIN,
     * CLOSE) or the batch (PROMPT) says nothing, those that differ only there are measured once. */
    const kivi_bench_shape *shapes;
    size_t n_shapes;
    uint32_t measures;  /* a bit 1 << kivi_bench_what each */
    uint32_t n_repeats; /* replays a median is of, 1 to 1,000 */
    bool plain; /* launches wait for the end of the one before (no programmatic dependent launch) */
    void (*row)(void *user, const kivi_bench_row *row); /* called for each figure as it is there */
    void *user;
} kivi_bench_options;

KIVI_API const char *kivi_bench_name(kivi_bench_what what); /* "decode"; NULL: there is none */
/* Takes some gigabytes of the device, by kind and shape, and gives them back. ARG: the device is a
 * cpu, or an option is wrong. DEVICE: there is no such GPU. NOMEM: it has too little memory. */
KIVI_API kivi_status kivi_bench_attention(const kivi_bench_options *options, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
