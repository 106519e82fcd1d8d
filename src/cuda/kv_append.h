/* kv_append.h: ki_cuda_append in two parts. The keys of a page that a row fills are read from their
 * codes by later steps alone, so a whole step's pages can be closed at once, at its end, by more
 * threads than an append has; and the appends, which every step waits for in every layer, need not
 * keep the shared memory that closing takes. */
#ifndef KI_KV_APPEND_H
#define KI_KV_APPEND_H
#include "kv_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ki_cuda_append, but for the codes of keys: those are left to ki_cuda_close_keys. */
kivi_status ki_cuda_append_rows(const ki_cuda_append_call *call, void *stream, kivi_error *err);
/* Codes of the keys whose line moved in this step, of all sequences, in n_layers layers from
 * call->layer on; reads cache, layer and pdl of the call. After the appends of those layers and
 * before the next step's; the sequences are as they were for the appends. One launch. */
kivi_status ki_cuda_close_keys(const ki_cuda_append_call *call, uint32_t n_layers, void *stream,
                               kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
