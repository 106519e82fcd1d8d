/* kv_append.h: ki_cuda_append in parts. What falls behind a line with a row is read from its codes
 * by later steps alone: those of a whole step, of all layers, can be made at its end, by more
 * threads than one layer has work for, and attention waits for the row alone. */
#ifndef KI_KV_APPEND_H
#define KI_KV_APPEND_H
#include "kv_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ki_cuda_append without codes: those are left to ki_cuda_close. */
kivi_status ki_cuda_append_rows(const ki_cuda_append_call *call, void *stream, kivi_error *err);
/* Codes of what fell behind the lines in this step, of all sequences, in n_layers layers from
 * call->layer on; reads cache, layer and pdl of the call. After the appends of those layers and
 * before the next step's; the sequences are as they were for the appends. Two launches: values, the
 * one that left each window, and keys, R of them once in R steps. */
kivi_status ki_cuda_close(const ki_cuda_append_call *call, uint32_t n_layers, void *stream,
                          kivi_error *err);
kivi_status ki_cuda_code_values(const ki_cuda_append_call *call, uint32_t n_layers, void *stream,
                                kivi_error *err);
kivi_status ki_cuda_close_keys(const ki_cuda_append_call *call, uint32_t n_layers, void *stream,
                               kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
