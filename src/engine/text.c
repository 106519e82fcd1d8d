/* text.c: the vocabulary of an engine, and kivi.h's calls on text. */
#include "engine.h"

#include <stdio.h>

static kivi_status check_rows(const kivi_engine *e, const ki_file *file, kivi_error *err) {
    size_t n_tokens = kivi_vocab_count(e->vocab), n_rows = e->model->config.n_vocab;
    /* A folder's embedding is often padded. */
    bool fits = ki_file_kind_get(file) == KI_FILE_HF ? n_tokens <= n_rows : n_tokens == n_rows;
    if (fits) return KIVI_OK;
    return KI_FAIL(err, FORMAT, "%s: %zu tokens in the vocabulary, %zu rows in the embedding",
                   ki_file_path(file), n_tokens, n_rows);
}

/* A vocabulary that is not known leaves the model usable by token ids; a broken one refuses the
 * file. */
kivi_status ki_engine_load_vocab(kivi_engine *e, const ki_file *file, kivi_error *err) {
    kivi_error fault = {0};
    e->info.bos_id = e->info.eos_id = -1;
    kivi_status status = ki_vocab_load(&e->vocab, &e->mem, file, &fault);
    if (status == KIVI_UNSUPPORTED) {
        snprintf(e->vocab_fault, sizeof e->vocab_fault, "%.180s", fault.text);
        return KIVI_OK;
    }
    if (status == KIVI_OK) status = check_rows(e, file, &fault);
    if (status != KIVI_OK) {
        if (err) *err = fault;
        return status;
    }
    e->info.bos_id = (int32_t)e->vocab->bos_id;
    e->info.eos_id = (int32_t)e->vocab->eos_id;
    e->info.adds_bos = e->vocab->adds_bos;
    return KIVI_OK;
}

const kivi_vocab *kivi_engine_vocab(const kivi_engine *engine) { return engine->vocab; }

kivi_status kivi_tokenize(const kivi_engine *engine, const char *text, size_t n_bytes,
                          unsigned flags, int32_t *ids, size_t max_ids, size_t *n_out,
                          kivi_error *err) {
    *n_out = 0;
    if (!engine->vocab) return KI_FAIL(err, UNSUPPORTED, "tokenizer: %s", engine->vocab_fault);
    return kivi_vocab_tokenize(engine->vocab, text, n_bytes, flags, ids, max_ids, n_out, err);
}

size_t kivi_token_bytes(const kivi_engine *engine, int32_t id, char *bytes, size_t max_bytes) {
    return engine->vocab ? kivi_vocab_bytes(engine->vocab, id, bytes, max_bytes) : 0;
}

bool kivi_token_is_control(const kivi_engine *engine, int32_t id) {
    return engine->vocab && kivi_vocab_is_control(engine->vocab, id);
}
