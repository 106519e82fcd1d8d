/* kv_bench.h: measures the kernels of the cache: `kivi bench attention --device cuda`. */
#ifndef KI_KV_BENCH_H
#define KI_KV_BENCH_H
#include "kv_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ki_cuda_bench_options {
    bool pdl;      /* consecutive launches overlap (programmatic dependent launch) */
    bool is_short; /* the five shapes and no tables */
    void (*line)(void *user, const char *text); /* gets the report, a line at a time */
    void *user;
} ki_cuda_bench_options;

/* A read-only stream, a copy, and decode attention of kivi2, kivi2+ and float16 at fixed shapes,
 * all in this process; buffers beyond the L2 cache, random data, medians over event-timed replays
 * of CUDA graphs. Allocates up to about 9 GB on the current device and frees it. */
kivi_status ki_cuda_bench_attention(const ki_cuda_bench_options *options, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
