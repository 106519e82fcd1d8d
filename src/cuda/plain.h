/* plain.h: the calls of kv_cuda.h once more, as plain as they can be: an element at a time, any
 * head size, no plan and no workspace. They are what the tests compare the fused kernels with on
 * the device, and what serves what those are not built for. Same layout, same arguments. */
#ifndef KI_PLAIN_H
#define KI_PLAIN_H
#include "kv_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Decoding and prompts alike: max_rows says which. Where k_rows is NULL rows go into the window. */
kivi_status ki_plain_append(const ki_cuda_append_call *call, void *stream, kivi_error *err);
kivi_status ki_plain_window(const ki_cuda_append_call *call, void *stream, kivi_error *err);
kivi_status ki_plain_attend(const ki_cuda_attend_call *call, void *stream, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
