/* vocab.h: kivi_text.h from the inside. */
#ifndef KI_ENGINE_VOCAB_H
#define KI_ENGINE_VOCAB_H
#include "kivi_text.h"
#include "load.h"
#include "token.h"

struct kivi_vocab {
    ki_mem *mem; /* the engine's, or own */
    ki_mem own;
    ki_vocab *tables;
    char *chat_template; /* NULL: none; terminated */
    int64_t bos_id, eos_id;
    int64_t turn_id; /* end of turn, -1: none */
    bool adds_bos;
    bool owns_mem;
};

/* The vocabulary that comes with an open file. mem must outlive it. *out is NULL on failure. */
kivi_status ki_vocab_load(kivi_vocab **out, ki_mem *mem, const ki_file *file, kivi_error *err);

#endif
