/* chat.h: messages to text in one of the formats that models were trained with. */
#ifndef KI_CHAT_H
#define KI_CHAT_H
#include "token.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ki_turn {
    const char *role;
    ki_span text;
} ki_turn;

typedef struct ki_chat_frame {
    const char *format;        /* a name of ki_chat_names */
    const char *chat_template; /* the file's own or NULL: some formats differ in what it adds */
    ki_span bos, eos;          /* their spellings; empty: none */
    bool adds_bos;             /* begin with BOS even if the format does not */
    bool adds_answer;          /* end where the assistant goes on */
    bool continues;            /* only what follows the last answer */
} ki_chat_frame;

const char *ki_chat_names(void); /* comma-separated, static */
/* The name of the format that a template is, by its marks; NULL: not known. */
const char *ki_chat_detect(const char *chat_template);
/* Appends ki_text_parts to out, all lent by frame, turns or static; format parts may hold control
 * tokens, messages may not. ARG: an unknown format, or roles that do not alternate. */
kivi_status ki_chat_render(ki_buf *out, const ki_chat_frame *frame, const ki_turn *turns,
                           size_t n_turns, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
