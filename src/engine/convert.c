/* convert.c: kivi_convert.h implemented: a folder's weights (src/model/export.c) and vocabulary
 * (src/token/words.c) into one GGUF file (src/load/gguf_write.c). */
#include "vocab.h"

#include "device.h"
#include "export.h"
#include "kivi_convert.h"
#include "words.h"

#include <stdio.h>

typedef struct conversion {
    const kivi_convert_options *o;
    ki_mem mem;
    ki_file *file;
    kivi_vocab *vocab;
    ki_export *model;
    ki_folder_texts texts;
    ki_vocab_export words;
    ki_gguf_out out;
    kivi_error *err;
} conversion;

static void note(const conversion *c, const char *line) {
    if (c->o->note) c->o->note(c->o->note_user, line);
}

static kivi_status type_of(ki_dtype *out, const char *name, kivi_error *err) {
    static const struct {
        const char *name;
        ki_dtype type;
    } types[] = {{"f16", KI_F16}, {"q8_0", KI_Q8_0}, {"q4_0", KI_Q4_0}};
    *out = KI_F16;
    for (size_t i = 0; name && i < sizeof types / sizeof *types; i++) {
        if (strcmp(name, types[i].name)) continue;
        *out = types[i].type;
        return KIVI_OK;
    }
    return name ? KI_FAIL(err, ARG, "type '%.40s', expected f16, q8_0 or q4_0", name) : KIVI_OK;
}

/* ---- the vocabulary ---- */

static bool is_spelled(const kivi_vocab *v, int32_t id, const char *text) {
    return ki_vocab_find(v->tables, (ki_span){text, strlen(text)}) == id;
}

/* GGUF has three ends: of a text, of a turn, of a message. Readers know the usual spellings of
 * others; one that is neither is lost, and that is said. */
static void describe_ends(conversion *c) {
    const kivi_vocab *v = c->vocab;
    static const char *const usual[] = {"<|im_end|>",    "<|eot_id|>",    "<|end|>",
                                        "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"};
    bool has_turn = false;
    for (uint32_t i = 0; i < v->n_ends; i++) {
        int32_t id = v->ends[i];
        bool is_usual = id == v->eos_id;
        if (is_usual) continue;
        if (is_spelled(v, id, "<|eom_id|>")) {
            ki_gguf_u32(&c->out, "tokenizer.ggml.eom_token_id", (uint32_t)id);
            continue;
        }
        if (!has_turn) {
            ki_gguf_u32(&c->out, "tokenizer.ggml.eot_token_id", (uint32_t)id);
            has_turn = true;
            continue;
        }
        for (size_t j = 0; j < sizeof usual / sizeof *usual; j++)
            is_usual = is_usual || is_spelled(v, id, usual[j]);
        if (!is_usual)
            note(c, "generation_config.json: eos_token_id lists more ends than GGUF has keys for; "
                    "the file knows the first ones");
    }
}

static void put_id(ki_gguf_out *out, const char *key, int64_t id) {
    if (id >= 0) ki_gguf_u32(out, key, (uint32_t)id);
}

static void describe_words(conversion *c) {
    _Static_assert(sizeof(ki_str) == sizeof(ki_span), "both are a pointer and a length");
    const ki_vocab_spec *s = &c->words.spec;
    ki_gguf_out *out = &c->out;
    bool is_scored = s->scores != NULL;
    ki_gguf_str(out, "tokenizer.ggml.model", (ki_str){s->model, strlen(s->model)});
    ki_gguf_str(out, "tokenizer.ggml.pre", (ki_str){s->pre, strlen(s->pre)});
    ki_gguf_strs(out, "tokenizer.ggml.tokens", (const ki_str *)(const void *)s->tokens,
                 s->n_tokens);
    ki_gguf_i32s(out, "tokenizer.ggml.token_type", s->types, s->n_tokens);
    if (is_scored) ki_gguf_f32s(out, "tokenizer.ggml.scores", s->scores, s->n_tokens);
    else
        ki_gguf_strs(out, "tokenizer.ggml.merges", (const ki_str *)(const void *)s->merges,
                     s->n_merges);
    put_id(out, "tokenizer.ggml.bos_token_id", s->bos_id);
    put_id(out, "tokenizer.ggml.eos_token_id", s->eos_id);
    put_id(out, "tokenizer.ggml.unknown_token_id", s->unk_id);
    put_id(out, "tokenizer.ggml.padding_token_id", c->vocab->pad_id);
    describe_ends(c);
    ki_gguf_bool(out, "tokenizer.ggml.add_bos_token", s->add_bos);
    ki_gguf_bool(out, "tokenizer.ggml.add_eos_token", s->add_eos);
    if (is_scored) ki_gguf_bool(out, "tokenizer.ggml.add_space_prefix", s->space_prefix);
    if (is_scored) ki_gguf_bool(out, "tokenizer.ggml.remove_extra_whitespaces", false);
    const char *text = c->vocab->chat_template;
    if (text) ki_gguf_str(out, "tokenizer.chat_template", (ki_str){text, strlen(text)});
}

static kivi_status read_words(conversion *c) {
    const kivi_vocab *v = c->vocab;
    const ki_folder_texts *t = &c->texts;
    KI_TRY(ki_folder_read(&c->texts, &c->mem, c->o->folder, c->err));
    KI_TRY(ki_vocab_export_init(&c->words, &c->mem, v->tables, t->tokenizer, t->n_tokenizer,
                                v->bos_id, v->eos_id, ki_export_config(c->model)->n_vocab, c->err));
    if (c->words.drops_nfc)
        note(c,
             "tokenizer.json normalizes texts to NFC, GGUF has no key for it: give it such texts");
    if (c->words.adds_more_spaces)
        note(c,
             "GGUF puts a space in front of a text that begins with one, too, and behind control "
             "tokens; tokenizer.json (Metaspace) does not");
    if (c->words.joins_spelled)
        note(c, "tokenizer.json has added tokens of U+2581; in GGUF that character is a space like "
                "any other");
    return KIVI_OK;
}

/* ---- the whole ---- */

static kivi_status check_folder(const conversion *c) {
    if (ki_file_kind_get(c->file) == KI_FILE_HF) return KIVI_OK;
    return KI_FAIL(c->err, ARG, "%s: is a GGUF file, expected a folder with config.json",
                   c->o->folder);
}

static kivi_status convert(conversion *c) {
    ki_dtype type = KI_F16;
    if (!c->o->folder || !c->o->out) return KI_FAIL(c->err, ARG, "convert: folder or out is NULL");
    KI_TRY(type_of(&type, c->o->type, c->err));
    KI_TRY(ki_gguf_may_write(c->o->out, c->o->force, c->err));
    KI_TRY(ki_file_open(&c->file, &c->mem, c->o->folder, c->err));
    KI_TRY(check_folder(c));
    KI_TRY(ki_export_create(&c->model, &c->mem, c->file, type, c->err));
    KI_TRY(ki_vocab_load(&c->vocab, &c->mem, c->file, c->err));
    KI_TRY(read_words(c));
    ki_export_describe(c->model, &c->out);
    describe_words(c);
    KI_TRY(ki_gguf_begin(&c->out, c->o->out, c->o->force));
    KI_TRY(ki_export_write(c->model, &c->out, c->o->stop, c->o->stop_user));
    return ki_gguf_finish(&c->out);
}

kivi_status kivi_convert(const kivi_convert_options *options, kivi_error *err) {
    conversion c = {.o = options, .err = err};
    ki_fpu fpu = ki_fpu_enter();
    ki_mem_init(&c.mem);
    ki_gguf_out_init(&c.out, &c.mem, err);
    kivi_status status = convert(&c);
    ki_gguf_out_deinit(&c.out);
    ki_vocab_export_deinit(&c.words);
    ki_folder_free(&c.texts, &c.mem);
    ki_export_destroy(&c.model);
    kivi_vocab_destroy(&c.vocab);
    ki_file_close(&c.file);
    ki_fpu_leave(fpu);
    return status;
}
