/* chat.c: conversations in the format of a vocabulary's model. */
#include "vocab.h"

#include "chat.h"

enum { MAX_PARTS_BYTES = 1 << 28, MAX_NAME = 64 };

const char *kivi_chat_names(void) { return ki_chat_names(); }

const char *kivi_chat_detect(const kivi_vocab *vocab) {
    return ki_chat_detect(vocab->chat_template);
}

const char *kivi_vocab_chat_template(const kivi_vocab *vocab) { return vocab->chat_template; }

static ki_span spelling(const kivi_vocab *vocab, int64_t id, char name[MAX_NAME]) {
    if (id < 0) return (ki_span){0};
    return (ki_span){name, ki_vocab_bytes(vocab->tables, (int32_t)id, name, MAX_NAME)};
}

static kivi_status pick_format(const char **out, const kivi_vocab *vocab, const char *format,
                               kivi_error *err) {
    *out = format ? format : kivi_chat_detect(vocab);
    if (*out) return KIVI_OK;
    return KI_FAIL(err, UNSUPPORTED, "chat: %s; choose a format with --chat-template NAME: %s",
                   vocab->chat_template ? "the model's template is not known"
                                        : "the model has no template",
                   kivi_chat_names());
}

static kivi_status copy_turns(ki_turn **out, ki_mem *mem, const kivi_message *messages,
                              size_t n_messages, kivi_error *err) {
    void *block;
    KI_TRY(ki_alloc_array(&block, mem, KI_TAG_other, n_messages, sizeof(ki_turn), err));
    *out = block;
    for (size_t i = 0; i < n_messages; i++)
        (*out)[i] = (ki_turn){messages[i].role, {messages[i].text, messages[i].n_bytes}};
    return KIVI_OK;
}

/* What is done with the parts: ids or text. */
typedef struct request {
    const kivi_vocab *vocab;
    const char *format;
    const kivi_message *messages;
    size_t n_messages;
    unsigned flags;
    int32_t *ids;
    char *text;
    size_t room, *n_out;
} request;

static kivi_status write_text(const request *r, const ki_text_part *parts, size_t n_parts,
                              kivi_error *err) {
    size_t n = 0;
    for (size_t i = 0; i < n_parts; i++) n += parts[i].text.n_bytes;
    *r->n_out = n;
    if (n > r->room) return KI_FAIL(err, ARG, "chat: %zu bytes, room for %zu", n, r->room);
    char *to = r->text;
    for (size_t i = 0; i < n_parts; i++) {
        memcpy(to, parts[i].text.bytes, parts[i].text.n_bytes);
        to += parts[i].text.n_bytes;
    }
    return KIVI_OK;
}

static kivi_status use(const request *r, const ki_buf *buf, kivi_error *err) {
    const ki_text_part *parts = (const ki_text_part *)(const void *)buf->data;
    size_t n_parts = buf->n_bytes / sizeof *parts;
    if (!r->ids) return write_text(r, parts, n_parts, err);
    return ki_vocab_encode_parts(r->vocab->tables, parts, n_parts, 0, r->ids, r->room, r->n_out,
                                 err);
}

static kivi_status render(const request *r, kivi_error *err) {
    char bos[MAX_NAME], eos[MAX_NAME];
    ki_mem mem;
    ki_buf parts;
    ki_turn *turns = NULL;
    ki_chat_frame frame = {.chat_template = r->vocab->chat_template,
                           .bos = spelling(r->vocab, r->vocab->bos_id, bos),
                           .eos = spelling(r->vocab, r->vocab->eos_id, eos),
                           .adds_bos = r->vocab->adds_bos,
                           .adds_answer = r->flags & KIVI_CHAT_ANSWER,
                           .continues = r->flags & KIVI_CHAT_CONTINUE};
    *r->n_out = 0;
    KI_TRY(pick_format(&frame.format, r->vocab, r->format, err));
    ki_mem_init(&mem);
    KI_TRY(copy_turns(&turns, &mem, r->messages, r->n_messages, err));
    ki_buf_init(&parts, &mem, MAX_PARTS_BYTES);
    kivi_status status = ki_chat_render(&parts, &frame, turns, r->n_messages, err);
    if (status == KIVI_OK) status = use(r, &parts, err);
    ki_buf_deinit(&parts);
    ki_free(&mem, turns);
    return status;
}

kivi_status kivi_chat_tokenize(const kivi_vocab *vocab, const char *format,
                               const kivi_message *messages, size_t n_messages, unsigned flags,
                               int32_t *ids, size_t max_ids, size_t *n_out, kivi_error *err) {
    int32_t none;
    request r = {.vocab = vocab,
                 .format = format,
                 .messages = messages,
                 .n_messages = n_messages,
                 .flags = flags,
                 .ids = ids ? ids : &none,
                 .room = ids ? max_ids : 0,
                 .n_out = n_out};
    return render(&r, err);
}

kivi_status kivi_chat_text(const kivi_vocab *vocab, const char *format,
                           const kivi_message *messages, size_t n_messages, unsigned flags,
                           char *text, size_t max_bytes, size_t *n_out, kivi_error *err) {
    request r = {.vocab = vocab,
                 .format = format,
                 .messages = messages,
                 .n_messages = n_messages,
                 .flags = flags,
                 .text = text,
                 .room = max_bytes,
                 .n_out = n_out};
    return render(&r, err);
}
