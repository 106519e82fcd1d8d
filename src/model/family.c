/* family.c: the table of model families, and what files call their parts. */
#include "model_private.h"

#include <stdio.h>

/* Mistral in GGUF calls itself llama. */
static const ki_family families[] = {
    {"llama", "llama", ki_llama_read, ki_llama_names, ki_llama_layers},
    {NULL, "mistral", ki_mistral_read, ki_llama_names, ki_llama_layers},
    {"qwen2", "qwen2", ki_qwen2_read, ki_llama_names, ki_llama_layers},
    {"qwen3", "qwen3", ki_qwen3_read, ki_llama_names, ki_llama_layers},
    {"gemma3", "gemma3_text", ki_gemma3_read, ki_gemma_names, ki_llama_layers},
    {"falcon", "falcon", ki_falcon_read, ki_falcon_names, ki_falcon_layers},
};
enum { N_FAMILIES = sizeof families / sizeof *families };

static const char *name_of(const ki_family *f, bool is_gguf) { return is_gguf ? f->gguf : f->hf; }

const ki_family *ki_family_find(bool is_gguf, const char *name) {
    for (size_t i = 0; i < N_FAMILIES; i++) {
        const char *own = name_of(&families[i], is_gguf);
        if (own && !strcmp(own, name)) return &families[i];
    }
    return NULL;
}

void ki_family_list(char *text, size_t n_bytes, bool is_gguf) {
    size_t n = 0;
    text[0] = 0;
    for (size_t i = 0; i < N_FAMILIES; i++) {
        const char *own = name_of(&families[i], is_gguf);
        if (!own || n + strlen(own) + 3 > n_bytes) continue;
        n += (size_t)snprintf(text + n, n_bytes - n, "%s%s", n ? ", " : "", own);
    }
}

void ki_part_name(char *name, size_t n_bytes, const ki_family *family, bool is_gguf,
                  enum ki_part part, uint32_t layer, const char *suffix) {
    const char *pattern = family->names[part][!is_gguf];
    const char *number = strstr(pattern, "%u");
    if (!number) snprintf(name, n_bytes, "%s%s", pattern, suffix);
    else
        snprintf(name, n_bytes, "%.*s%u%s%s", (int)(number - pattern), pattern, layer, number + 2,
                 suffix);
}
