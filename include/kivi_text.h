/* kivi_text.h: vocabularies without a model, and conversations as token ids. kivi.h has the calls
 * for the text of an engine. */
#ifndef KIVI_TEXT_H
#define KIVI_TEXT_H
#include "kivi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- vocabulary ---- */

typedef struct kivi_vocab kivi_vocab;

/* From a GGUF file (one without tensors will do), a Hugging Face folder, or a tokenizer.json. On
 * failure *out is NULL. A vocabulary does not change; several threads may use one. */
KIVI_API kivi_status kivi_vocab_open(kivi_vocab **out, const char *path, kivi_error *err);
/* Destroys and nulls; NULL is allowed. Not for the vocabulary of an engine. */
KIVI_API void kivi_vocab_destroy(kivi_vocab **vocab);
/* The engine's own, lent for its life; NULL: the model has none that is known. */
KIVI_API const kivi_vocab *kivi_engine_vocab(const kivi_engine *engine);
KIVI_API size_t kivi_vocab_count(const kivi_vocab *vocab); /* tokens */
/* As kivi_tokenize, kivi_token_bytes and kivi_token_is_control. */
KIVI_API kivi_status kivi_vocab_tokenize(const kivi_vocab *vocab, const char *text, size_t n_bytes,
                                         unsigned flags, int32_t *ids, size_t max_ids,
                                         size_t *n_out, kivi_error *err);
KIVI_API size_t kivi_vocab_bytes(const kivi_vocab *vocab, int32_t id, char *bytes,
                                 size_t max_bytes);
KIVI_API bool kivi_vocab_is_control(const kivi_vocab *vocab, int32_t id);
/* Generation ends with it: the model's EOS, its end of turn, or the spelling of a known one. */
KIVI_API bool kivi_vocab_is_end(const kivi_vocab *vocab, int32_t id);

/* ---- conversations ---- */

typedef struct kivi_message {
    const char *role; /* "system" (first only), "user" or "assistant", which alternate */
    const char *text;
    size_t n_bytes;
} kivi_message;

enum {
    KIVI_CHAT_ANSWER = 1,   /* end where the assistant is to go on */
    KIVI_CHAT_CONTINUE = 2, /* only what follows the text of the last "assistant" message: for a
                             * session that holds all before */
};

/* Names of the known formats, comma-separated; static. */
KIVI_API const char *kivi_chat_names(void);
/* The format that the model's own template is known as; NULL: it has none, or one not known. */
KIVI_API const char *kivi_chat_detect(const kivi_vocab *vocab);
/* The model's own template as its file has it (Jinja), lent; NULL: it has none. */
KIVI_API const char *kivi_vocab_chat_template(const kivi_vocab *vocab);
/* The messages in a format (NULL: the model's own) as ids, BOS included. Control tokens come from
 * the format only, never from a message's text. *n_out is the number needed; when it exceeds
 * max_ids nothing is written and ARG is returned. UNSUPPORTED: the model's template is not known; ARG: no
 * such format, or roles that the format does not allow. */
KIVI_API kivi_status kivi_chat_tokenize(const kivi_vocab *vocab, const char *format,
                                        const kivi_message *messages, size_t n_messages,
                                        unsigned flags, int32_t *ids, size_t max_ids, size_t *n_out,
                                        kivi_error *err);
/* The same as text; *n_out as above, in bytes. */
KIVI_API kivi_status kivi_chat_text(const kivi_vocab *vocab, const char *format,
                                    const kivi_message *messages, size_t n_messages, unsigned flags,
                                    char *text, size_t max_bytes, size_t *n_out, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
