/* export.h: a folder's model as the keys and tensors of a GGUF file. What GGUF has no way to say
 * is refused by name. */
#ifndef KI_EXPORT_H
#define KI_EXPORT_H
#include "model.h"
#include "write.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ki_export ki_export;

/* Reads the configuration and finds every tensor; matrices become `type` (F16, Q8_0 or Q4_0; with
 * Q4_0 the matrix that makes the logits is Q8_0), vectors F32. file: a folder, which must outlive
 * the export. */
kivi_status ki_export_create(ki_export **out, ki_mem *mem, const ki_file *file, ki_dtype type,
                             kivi_error *err);
void ki_export_destroy(ki_export **out);
const ki_config *ki_export_config(const ki_export *e);
/* The architecture's and the general keys, and all tensor infos; faults are kept in gguf. */
void ki_export_describe(const ki_export *e, ki_gguf_out *gguf);
/* The data, rows at a time. stop (NULL allowed) is asked between them: true ends it, CANCELLED. */
kivi_status ki_export_write(const ki_export *e, ki_gguf_out *gguf, bool (*stop)(void *user),
                            void *user);

#ifdef __cplusplus
}
#endif
#endif
