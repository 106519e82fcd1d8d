/* pipeline.c: a tokenizer.json at work: from a stretch of text to ids, and what ids stand for. */
#include "pipeline.h"

/* ---- the model: one word ---- */

/* The token of the model's own vocabulary; added tokens are found by their text only. */
static int32_t find_in_model(const ki_vocab *v, ki_span text) {
    int32_t id = ki_vocab_find(v, text);
    return id >= 0 && v->pipeline->in_model[id] && !ki_vocab_is_control(v, id) ? id : -1;
}

static bool has_bytes(const ki_vocab *v, ki_span character) {
    for (size_t i = 0; i < character.n_bytes; i++)
        if (v->bytes[(unsigned char)character.bytes[i]] < 0) return false;
    return true;
}

/* The symbol of one character of a word; false: it is left out. */
static bool symbol_of(int32_t *out, const ki_vocab *v, uint32_t c) {
    char bytes[4];
    ki_span text = {bytes, ki_character_write(bytes, c)};
    *out = find_in_model(v, text);
    if (*out >= 0) return true;
    *out = ki_symbol_of(c);
    if (v->pipeline->byte_fallback && has_bytes(v, text)) return true;
    *out = v->pipeline->unk_id;
    return *out >= 0;
}

static kivi_status put_symbols(ki_encoder *e, ki_span word, kivi_error *err) {
    const ki_vocab *v = e->vocab;
    int32_t chunk[256], last = -1;
    size_t n = 0;
    for (size_t at = 0; at < word.n_bytes;) {
        uint32_t c = ki_next_character(word, &at);
        bool kept = c < 128 || symbol_of(&chunk[n], v, c);
        if (c < 128) chunk[n] = e->run->ascii[c];
        if (c < 128 && chunk[n] == INT32_MIN) kept = false;
        if (!kept) continue;
        bool is_unk = chunk[n] == v->pipeline->unk_id;
        if (is_unk && last == chunk[n] && v->pipeline->fuses_unk) continue;
        last = chunk[n++];
        if (n < sizeof chunk / sizeof *chunk) continue;
        KI_TRY(ki_encoder_put(e, chunk, n, err));
        n = 0;
    }
    return ki_encoder_put(e, chunk, n, err);
}

kivi_status ki_pipeline_word(ki_encoder *e, ki_span word, kivi_error *err) {
    size_t begin = e->ids.n_bytes;
    if (e->vocab->pipeline->whole_words) {
        int32_t whole = find_in_model(e->vocab, word);
        if (whole >= 0) return ki_encoder_put(e, &whole, 1, err);
    }
    KI_TRY(put_symbols(e, word, err));
    return ki_encoder_merge(e, begin, err);
}

/* ---- a stretch of text ---- */

static kivi_status encode_valid(ki_encoder *e, ki_span text, bool is_first, kivi_error *err) {
    ki_span normal;
    KI_TRY(ki_normalize(&normal, e->vocab->pipeline, e->run, text, err));
    return ki_encoder_split(e, normal, &e->vocab->pipeline->normalized, is_first, ki_cut_text, err);
}

static size_t valid_bytes(ki_span text) {
    size_t at = 0, next = 0;
    while (next < text.n_bytes && ki_next_character(text, &next) < KI_MALFORMED) at = next;
    return at;
}

/* Normalizers and patterns are defined on characters only: a malformed byte stands for itself. */
kivi_status ki_pipeline_encode(ki_encoder *e, ki_span text, bool is_first, kivi_error *err) {
    while (text.n_bytes) {
        size_t n = valid_bytes(text), begin;
        if (n) KI_TRY(encode_valid(e, (ki_span){text.bytes, n}, is_first, err));
        if (n == text.n_bytes) break;
        int32_t symbol = ki_symbol_of((uint32_t)KI_MALFORMED + (unsigned char)text.bytes[n]);
        if (e->vocab->bytes[(unsigned char)text.bytes[n]] < 0) symbol = e->vocab->pipeline->unk_id;
        begin = e->ids.n_bytes;
        KI_TRY(ki_encoder_put(e, &symbol, 1, err));
        KI_TRY(ki_encoder_merge(e, begin, err));
        text = (ki_span){text.bytes + n + 1, text.n_bytes - n - 1};
        is_first = false;
    }
    return KIVI_OK;
}

kivi_status ki_pipeline_begin(ki_encoder *e, kivi_error *err) {
    void *block;
    ki_mem *mem = e->vocab->mem;
    KI_TRY(ki_alloc(&block, mem, KI_TAG_other, sizeof(ki_pass), err));
    e->run = block;
    /* The largest growth is that of NFKD, 18 characters of one, spelled in the alphabet. */
    for (size_t i = 0; i < 2; i++) ki_buf_init(&e->run->norms[i], mem, UINT32_MAX);
    for (size_t i = 0; i < KI_MAX_ROOM; i++) ki_buf_init(&e->run->cuts[i], mem, UINT32_MAX);
    for (uint32_t c = 0; c < 128; c++)
        if (!symbol_of(&e->run->ascii[c], e->vocab, c)) e->run->ascii[c] = INT32_MIN;
    e->run->match = pcre2_match_data_create(1, e->vocab->pipeline->memory);
    return e->run->match ? KIVI_OK : KI_FAIL(err, NOMEM, "tokenizer: no memory for matching");
}

void ki_pipeline_end(ki_encoder *e) {
    if (!e->run) return;
    for (size_t i = 0; i < 2; i++) ki_buf_deinit(&e->run->norms[i]);
    for (size_t i = 0; i < KI_MAX_ROOM; i++) ki_buf_deinit(&e->run->cuts[i]);
    pcre2_match_data_free(e->run->match);
    ki_free(e->vocab->mem, e->run);
    e->run = NULL;
}

kivi_status ki_pipeline_ends(ki_encoder *e, bool is_front, kivi_error *err) {
    const ki_pipeline *p = e->vocab->pipeline;
    return ki_encoder_put(e, is_front ? p->front : p->back, is_front ? p->n_front : p->n_back, err);
}

/* ---- merges ---- */

static int32_t end_symbol(const ki_vocab *v, ki_span text, bool is_last) {
    int32_t symbol = -1;
    for (size_t at = 0; at < text.n_bytes;) {
        if (!symbol_of(&symbol, v, ki_next_character(text, &at))) symbol = -1;
        if (!is_last) break;
    }
    return symbol;
}

kivi_status ki_pipeline_add_merge(ki_vocab *vocab, size_t index, ki_span left, ki_span right,
                                  kivi_error *err) {
    char joined[1024];
    if (left.n_bytes + right.n_bytes > sizeof joined)
        return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: merge %zu makes a token of %zu bytes",
                       index, left.n_bytes + right.n_bytes);
    memcpy(joined, left.bytes, left.n_bytes);
    memcpy(joined + left.n_bytes, right.bytes, right.n_bytes);
    int32_t a = ki_vocab_find(vocab, left), b = ki_vocab_find(vocab, right);
    int32_t id = ki_vocab_find(vocab, (ki_span){joined, left.n_bytes + right.n_bytes});
    if (a < 0 || b < 0 || id < 0)
        return KI_FAIL(err, FORMAT, "tokenizer.json: merge %zu: its %s is no token", index,
                       a < 0   ? "left part"
                       : b < 0 ? "right part"
                               : "result");
    if (ki_vocab_is_control(vocab, id)) return KIVI_OK; /* plain text must not lead there */
    KI_TRY(ki_pairs_add(&vocab->pairs, vocab->mem, a, b, (uint32_t)index, id, err));
    ki_joints_add(&vocab->joints, end_symbol(vocab, left, true), end_symbol(vocab, right, false));
    return KIVI_OK;
}

/* ---- ids to bytes ---- */

static kivi_status replace_all(ki_buf *out, ki_span text, const ki_decode *d, kivi_error *err) {
    for (size_t at = 0; at < text.n_bytes;) {
        bool hit = d->pattern.n_bytes && text.n_bytes - at >= d->pattern.n_bytes &&
                   !memcmp(text.bytes + at, d->pattern.bytes, d->pattern.n_bytes);
        ki_span part = hit ? d->content : (ki_span){text.bytes + at, 1};
        KI_TRY(ki_buf_append(out, part.bytes, part.n_bytes, err));
        at += hit ? d->pattern.n_bytes : 1;
    }
    return KIVI_OK;
}

static kivi_status alphabet_read(ki_buf *out, ki_span text, kivi_error *err) {
    char chunk[2048]; /* longer tokens are left as they are spelled */
    size_t n = ki_alphabet_read(chunk, sizeof chunk, text);
    return n <= sizeof chunk ? ki_buf_append(out, chunk, n, err)
                             : ki_buf_append(out, text.bytes, text.n_bytes, err);
}

/* One token through the decoders; buffers take turns. *out is lent by text or a buffer. */
static kivi_status decode(ki_span *out, const ki_vocab *v, size_t id, ki_buf bufs[2],
                          kivi_error *err) {
    const ki_pipeline *p = v->pipeline;
    ki_span text = ki_vocab_text(v, id);
    bool is_added = v->types[id] != KI_TOKEN_NORMAL;
    char byte;
    *out = text;
    if (ki_vocab_is_control(v, (int32_t)id)) return KIVI_OK; /* as spelled */
    for (size_t i = 0; i < p->n_decodes; i++) {
        const ki_decode *d = &p->decodes[i];
        ki_buf *buf = &bufs[i & 1];
        if (d->kind != KI_DECODE_REPLACE && is_added) continue;
        if (d->kind == KI_DECODE_BYTES && !ki_hex_read(&byte, text)) continue;
        buf->n_bytes = 0;
        if (d->kind == KI_DECODE_BYTES) KI_TRY(ki_buf_append(buf, &byte, 1, err));
        else if (d->kind == KI_DECODE_ALPHABET) KI_TRY(alphabet_read(buf, text, err));
        else KI_TRY(replace_all(buf, text, d, err));
        text = (ki_span){(const char *)buf->data, buf->n_bytes};
    }
    *out = text;
    return KIVI_OK;
}

static kivi_status decode_into(ki_vocab *vocab, ki_buf *all, ki_buf bufs[2], kivi_error *err) {
    ki_pipeline *p = vocab->pipeline;
    ki_span text;
    void *block;
    for (size_t i = 0; i < vocab->n_tokens; i++) {
        KI_TRY(decode(&text, vocab, i, bufs, err));
        KI_TRY(ki_buf_append(all, text.bytes, text.n_bytes, err));
        p->plain_offsets[i + 1] = all->n_bytes;
    }
    KI_TRY(ki_alloc(&block, vocab->mem, KI_TAG_other, all->n_bytes, err));
    p->plain = block;
    if (all->n_bytes) memcpy(p->plain, all->data, all->n_bytes);
    return KIVI_OK;
}

kivi_status ki_pipeline_decode_all(ki_vocab *vocab, kivi_error *err) {
    ki_buf all, bufs[2];
    void *block;
    KI_TRY(
        ki_alloc_array(&block, vocab->mem, KI_TAG_other, vocab->n_tokens + 1, sizeof(size_t), err));
    vocab->pipeline->plain_offsets = block;
    ki_buf_init(&all, vocab->mem, UINT32_MAX);
    for (size_t i = 0; i < 2; i++) ki_buf_init(&bufs[i], vocab->mem, 1 << 24);
    kivi_status status = decode_into(vocab, &all, bufs, err);
    for (size_t i = 0; i < 2; i++) ki_buf_deinit(&bufs[i]);
    ki_buf_deinit(&all);
    return status;
}

ki_span ki_pipeline_text(const ki_vocab *vocab, size_t id) {
    const ki_pipeline *p = vocab->pipeline;
    size_t begin = p->plain_offsets[id];
    return (ki_span){p->plain + begin, p->plain_offsets[id + 1] - begin};
}

/* ---- the end ---- */

static void free_span(ki_mem *mem, ki_span *span) {
    ki_free(mem, (void *)(uintptr_t)span->bytes);
    *span = (ki_span){0};
}

void ki_pipeline_destroy(ki_vocab *vocab) {
    ki_pipeline *p = vocab->pipeline;
    ki_mem *mem = vocab->mem;
    if (!p) return;
    for (size_t i = 0; i < KI_MAX_ROOM; i++) {
        pcre2_code_free(p->norms[i].pattern);
        pcre2_code_free(p->cuts[i].pattern);
        free_span(mem, &p->norms[i].content);
        free_span(mem, &p->cuts[i].content);
        free_span(mem, &p->decodes[i].pattern);
        free_span(mem, &p->decodes[i].content);
    }
    ki_regex_deinit(p);
    ki_buf_deinit(&p->normalized_text);
    ki_free(mem, p->normalized.items);
    ki_free(mem, p->in_model);
    ki_free(mem, p->plain);
    ki_free(mem, p->plain_offsets);
    ki_free(mem, p);
    vocab->pipeline = NULL;
}
