/* kv_bench.h: kivi_bench_attention on the calling thread's device. */
#ifndef KI_KV_BENCH_H
#define KI_KV_BENCH_H
#include "kivi_bench.h"
#include "kv_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* options: checked by the engine. device: its name, for the rows. */
kivi_status ki_cuda_bench_attention(const kivi_bench_options *options, const char *device,
                                    kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
