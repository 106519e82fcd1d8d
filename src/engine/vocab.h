/* vocab.h: kivi_text.h from the inside. */
#ifndef KI_ENGINE_VOCAB_H
#define KI_ENGINE_VOCAB_H
#include "kivi_text.h"
#include "load.h"
#include "token.h"

enum { KI_MAX_ENDS = 32 };

struct kivi_vocab {
    ki_mem *mem; /* the engine's, or own */
    ki_mem own;
    ki_vocab *tables;
    char *chat_template; /* NULL: none; terminated */
    int64_t bos_id, eos_id, pad_id;
    int32_t ends[KI_MAX_ENDS]; /* generation ends with any of these; eos_id among them */
    uint32_t n_ends;
    bool adds_bos;
    bool owns_mem;
};

/* The texts of a folder that are about its vocabulary; freed with ki_folder_free. */
typedef struct ki_folder_texts {
    char *tokenizer, *settings, *jinja, *generation;
    size_t n_tokenizer, n_settings, n_jinja, n_generation;
} ki_folder_texts;
kivi_status ki_folder_read(ki_folder_texts *out, ki_mem *mem, const char *folder, kivi_error *err);
void ki_folder_free(ki_folder_texts *texts, ki_mem *mem);

/* The vocabulary that comes with an open file. mem must outlive it. *out is NULL on failure. */
kivi_status ki_vocab_load(kivi_vocab **out, ki_mem *mem, const ki_file *file, kivi_error *err);

#endif
