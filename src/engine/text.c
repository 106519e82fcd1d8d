/* text.c: the vocabulary of a model file, and kivi.h's calls on text. */
#include "engine.h"

#include <stdio.h>

/* What a GGUF file holds of its vocabulary, lent or allocated until it is copied. */
typedef struct vocab_source {
    ki_str *tokens, *merges;
    int32_t *types;
    size_t n_tokens, n_merges, n_types;
    char model[32], pre[32];
} vocab_source;

static kivi_status read_name(char *out, size_t n_bytes, const ki_file *file, const char *key,
                             kivi_error *err) {
    ki_str value = {0};
    bool found = false;
    KI_TRY(ki_file_str(&value, &found, file, key, err));
    snprintf(out, n_bytes, "%.*s", (int)KI_MIN(value.n_bytes, n_bytes - 1),
             found ? value.bytes : "");
    return KIVI_OK;
}

static kivi_status read_source(vocab_source *v, const ki_file *file, kivi_error *err) {
    bool found;
    KI_TRY(read_name(v->model, sizeof v->model, file, "tokenizer.ggml.model", err));
    KI_TRY(read_name(v->pre, sizeof v->pre, file, "tokenizer.ggml.pre", err));
    KI_TRY(ki_file_str_array(&v->tokens, &v->n_tokens, &found, file, "tokenizer.ggml.tokens", err));
    KI_TRY(ki_file_str_array(&v->merges, &v->n_merges, &found, file, "tokenizer.ggml.merges", err));
    KI_TRY(
        ki_file_int_array(&v->types, &v->n_types, &found, file, "tokenizer.ggml.token_type", err));
    if (v->types && v->n_types != v->n_tokens)
        return KI_FAIL(err, FORMAT, "%s: %zu token types beside %zu tokens", ki_file_path(file),
                       v->n_types, v->n_tokens);
    return KIVI_OK;
}

static kivi_status read_id(int64_t *out, const ki_file *file, const char *key, size_t n_tokens,
                           kivi_error *err) {
    uint64_t value = 0;
    bool found = false;
    *out = -1;
    if (n_tokens == 0) return KIVI_OK;
    KI_TRY(ki_file_u64(&value, &found, file, key, 0, n_tokens - 1, err));
    if (found) *out = (int64_t)value;
    return KIVI_OK;
}

static kivi_status make_vocab(kivi_engine *e, const vocab_source *v, const ki_file *file,
                              kivi_error *err) {
    bool found;
    _Static_assert(sizeof(ki_str) == sizeof(ki_span), "both are a pointer and a length");
    ki_vocab_spec spec = {.model = v->model,
                          .pre = v->pre[0] ? v->pre : "default",
                          .n_tokens = v->n_tokens,
                          .types = v->types,
                          .n_merges = v->n_merges};
    spec.tokens = (const ki_span *)(const void *)v->tokens;
    spec.merges = (const ki_span *)(const void *)v->merges;
    KI_TRY(read_id(&spec.bos_id, file, "tokenizer.ggml.bos_token_id", v->n_tokens, err));
    KI_TRY(read_id(&spec.eos_id, file, "tokenizer.ggml.eos_token_id", v->n_tokens, err));
    KI_TRY(read_id(&spec.unk_id, file, "tokenizer.ggml.unknown_token_id", v->n_tokens, err));
    KI_TRY(ki_file_bool(&spec.add_bos, &found, file, "tokenizer.ggml.add_bos_token", err));
    KI_TRY(ki_file_bool(&spec.add_eos, &found, file, "tokenizer.ggml.add_eos_token", err));
    if (v->n_tokens != e->model->config.n_vocab)
        return KI_FAIL(err, FORMAT, "%s: %zu tokens in the vocabulary, %u rows in the embedding",
                       ki_file_path(file), v->n_tokens, e->model->config.n_vocab);
    e->info.bos_id = (int32_t)spec.bos_id;
    e->info.eos_id = (int32_t)spec.eos_id;
    e->info.adds_bos = spec.add_bos;
    return ki_vocab_create(&e->vocab, &e->mem, &spec, err);
}

static kivi_status load_gguf_vocab(kivi_engine *e, const ki_file *file, kivi_error *err) {
    vocab_source v = {0};
    kivi_status status = read_source(&v, file, err);
    if (status == KIVI_OK) status = make_vocab(e, &v, file, err);
    ki_free(&e->mem, v.tokens);
    ki_free(&e->mem, v.merges);
    ki_free(&e->mem, v.types);
    return status;
}

/* A vocabulary that is not built yet leaves the model usable by token ids; a broken one refuses the
 * file. */
kivi_status ki_engine_load_vocab(kivi_engine *e, const ki_file *file, kivi_error *err) {
    kivi_error fault = {0};
    e->info.bos_id = e->info.eos_id = -1;
    if (ki_file_kind_get(file) == KI_FILE_HF) {
        snprintf(e->vocab_fault, sizeof e->vocab_fault,
                 "tokenizer.json is not supported yet; use token ids or a GGUF");
        return KIVI_OK;
    }
    if (ki_file_value_kind(file, "tokenizer.ggml.tokens") == KI_VALUE_NONE) {
        snprintf(e->vocab_fault, sizeof e->vocab_fault, "the file has no vocabulary");
        return KIVI_OK;
    }
    kivi_status status = load_gguf_vocab(e, file, &fault);
    if (status == KIVI_UNSUPPORTED) {
        snprintf(e->vocab_fault, sizeof e->vocab_fault, "%.180s", fault.text);
        return KIVI_OK;
    }
    if (status != KIVI_OK && err) *err = fault;
    return status;
}

kivi_status kivi_tokenize(const kivi_engine *engine, const char *text, size_t n_bytes,
                          unsigned flags, int32_t *ids, size_t max_ids, size_t *n_out,
                          kivi_error *err) {
    *n_out = 0;
    if (!engine->vocab) return KI_FAIL(err, UNSUPPORTED, "tokenizer: %s", engine->vocab_fault);
    return ki_vocab_encode(engine->vocab, text, n_bytes, flags, ids, max_ids, n_out, err);
}

size_t kivi_token_bytes(const kivi_engine *engine, int32_t id, char *bytes, size_t max_bytes) {
    return engine->vocab ? ki_vocab_bytes(engine->vocab, id, bytes, max_bytes) : 0;
}

bool kivi_token_is_control(const kivi_engine *engine, int32_t id) {
    return engine->vocab && ki_vocab_is_control(engine->vocab, id);
}
