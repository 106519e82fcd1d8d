/* kivi_convert.h: a Hugging Face folder as one GGUF file, which llama.cpp reads too. */
#ifndef KIVI_CONVERT_H
#define KIVI_CONVERT_H
#include "kivi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kivi_convert_options {
    const char *folder; /* config.json, safetensors in one file or in shards, tokenizer.json */
    const char *out;    /* the file to make */
    const char *type;   /* of matrices: "f16", "q8_0", "q4_0"; NULL: f16. Vectors are float32 */
    bool force;         /* an existing file is replaced */
    bool (*stop)(void *user); /* asked many times a second: true ends it; NULL: never */
    void *stop_user;
    void (*note)(void *user, const char *line); /* what GGUF keeps otherwise; NULL: silent */
    void *note_user;
} kivi_convert_options;

/* Writes beside `out` under a temporary name and gives the name when all is on the disk: after a
 * failure nothing is there that was not before. Some megabytes and the vocabulary are held, never a
 * whole tensor. ARG: `out` exists, or an option is wrong. UNSUPPORTED: the model or its tokenizer
 * has a part that GGUF has no name for; the line says which. IO: a full disk among others.
 * CANCELLED: stop said so. */
KIVI_API kivi_status kivi_convert(const kivi_convert_options *options, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
