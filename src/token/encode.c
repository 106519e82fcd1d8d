/* encode.c: text to ids. Special tokens cut the text first; what lies between is encoded as the
 * kind of vocabulary has it. Ids are written at the end of the result and merged there in place. */
#include "pipeline.h"

enum { MAX_TEXT_BYTES = 1 << 30, CHUNK = 256, MAX_WHOLE_BYTES = 512 };

kivi_status ki_encoder_put(ki_encoder *e, const int32_t *ids, size_t n_ids, kivi_error *err) {
    return ki_buf_append(&e->ids, ids, n_ids * sizeof *ids, err);
}

static int32_t *ids_from(ki_encoder *e, size_t begin) {
    return e->ids.data ? (int32_t *)(void *)(e->ids.data + begin) : NULL; /* before the first id */
}

/* ---- "gpt2" ---- */

static kivi_status put_bytes(ki_encoder *e, ki_span word, kivi_error *err) {
    int32_t chunk[CHUNK];
    for (size_t at = 0; at < word.n_bytes; at += CHUNK) {
        size_t n = KI_MIN(word.n_bytes - at, (size_t)CHUNK);
        for (size_t i = 0; i < n; i++)
            chunk[i] = e->vocab->bytes[(unsigned char)word.bytes[at + i]];
        KI_TRY(ki_encoder_put(e, chunk, n, err));
    }
    return KIVI_OK;
}

static size_t drop_missing(int32_t *ids, size_t n_ids) {
    size_t n_kept = 0;
    for (size_t i = 0; i < n_ids; i++)
        if (ids[i] >= 0) ids[n_kept++] = ids[i];
    return n_kept;
}

/* The token that spells the whole word; -1: none. Longer words than any token are not looked up. A
 * control token is not taken: plain text must not give one, even if it is one word. */
static int32_t whole_word(const ki_vocab *vocab, ki_span word) {
    unsigned char spelled[2 * MAX_WHOLE_BYTES];
    size_t n = 0;
    if (word.n_bytes > MAX_WHOLE_BYTES) return -1;
    for (size_t i = 0; i < word.n_bytes; i++)
        n += ki_alphabet_write(spelled + n, (unsigned char)word.bytes[i]);
    int32_t id = ki_vocab_find(vocab, (ki_span){(const char *)spelled, n});
    return ki_vocab_is_control(vocab, id) ? -1 : id;
}

static kivi_status emit_word(ki_words *words, ki_span word, kivi_error *err) {
    ki_encoder *e = (ki_encoder *)words;
    int32_t whole = e->vocab->pre.rule->whole_words ? whole_word(e->vocab, word) : -1;
    if (whole >= 0) return ki_encoder_put(e, &whole, 1, err);
    size_t begin = e->ids.n_bytes, n = word.n_bytes;
    KI_TRY(put_bytes(e, word, err));
    int32_t *ids = ids_from(e, begin);
    KI_TRY(ki_merge(&e->vocab->pairs, e->vocab->mem, ids, &n, err));
    e->ids.n_bytes = begin + drop_missing(ids, n) * sizeof *ids;
    return KIVI_OK;
}

/* ---- symbols of characters ---- */

/* The bytes of a character without a token as tokens of bytes. */
static size_t spell(const ki_vocab *vocab, int32_t out[4], int32_t symbol) {
    char bytes[4];
    size_t n = ki_character_write(bytes, ki_symbol_character(symbol)), n_out = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = vocab->bytes[(unsigned char)bytes[i]];
        if (id >= 0) out[n_out++] = id;
    }
    return n_out;
}

/* How many ids the symbols will be once none is negative. */
static size_t count_spelled(const ki_vocab *vocab, const int32_t *ids, size_t n) {
    size_t sum = 0;
    int32_t spelled[4];
    for (size_t i = 0; i < n; i++) sum += ids[i] >= 0 ? 1 : spell(vocab, spelled, ids[i]);
    return sum;
}

/* The result may be longer than the symbols: they move to the end of the room first. */
static kivi_status spell_rest(ki_encoder *e, size_t begin, size_t n, kivi_error *err) {
    static const int32_t zeros[CHUNK];
    size_t n_spelled = count_spelled(e->vocab, ids_from(e, begin), n), room = KI_MAX(n, n_spelled);
    for (size_t have = n; have < room; have += CHUNK)
        KI_TRY(ki_encoder_put(e, zeros, KI_MIN((size_t)CHUNK, room - have), err));
    int32_t *ids = ids_from(e, begin), *from = ids + (room - n);
    memmove(from, ids, n * sizeof *ids);
    for (size_t i = 0; i < n; i++) {
        int32_t symbol = from[i], spelled[4];
        size_t k = symbol >= 0 ? 1 : spell(e->vocab, spelled, symbol);
        if (symbol >= 0) spelled[0] = symbol;
        memcpy(ids, spelled, k * sizeof *ids);
        ids += k;
    }
    e->ids.n_bytes = begin + n_spelled * sizeof *ids;
    return KIVI_OK;
}

kivi_status ki_encoder_merge(ki_encoder *e, size_t begin, kivi_error *err) {
    const ki_vocab *v = e->vocab;
    size_t n = (e->ids.n_bytes - begin) / sizeof(int32_t);
    bool all_known = true;
    KI_TRY(ki_merge_parts(&v->pairs, &v->joints, v->mem, ids_from(e, begin), &n, err));
    e->ids.n_bytes = begin + n * sizeof(int32_t);
    for (size_t i = 0; i < n && all_known; i++) all_known = ids_from(e, begin)[i] >= 0;
    return all_known ? KIVI_OK : spell_rest(e, begin, n, err);
}

/* ---- special tokens ---- */

static kivi_status put_plain(ki_encoder *e, ki_span text, bool is_first, kivi_error *err) {
    if (!text.n_bytes) return KIVI_OK;
    switch (e->vocab->kind) {
    case KI_VOCAB_SCORED: return ki_scored_encode(e, text, err);
    case KI_VOCAB_PIPELINE: return ki_pipeline_encode(e, text, is_first, err);
    case KI_VOCAB_BYTES: break;
    }
    return ki_words_split(&e->words, text, err);
}

/* Bytes from `at` on in which a control token may lie: to the end of the parts that allow it. */
static size_t control_room(ki_encoder *e, size_t at) {
    while (e->part_end <= at && e->n_parts) {
        bool with_control = e->parts->with_control;
        do {
            e->part_end += e->parts->text.n_bytes;
            e->parts++;
            e->n_parts--;
        } while (e->n_parts && e->parts->with_control == with_control);
        e->in_control = with_control;
    }
    return e->in_control && at < e->part_end ? e->part_end - at : 0;
}

kivi_status ki_encoder_split(ki_encoder *e, ki_span text, const ki_specials *specials,
                             bool is_first, ki_plain_fn *plain, kivi_error *err) {
    size_t from = 0; /* where the text since the last special token began */
    for (size_t at = 0; at < text.n_bytes;) {
        unsigned char first = (unsigned char)text.bytes[at];
        if (specials->first[first] == specials->first[first + 1]) {
            at++;
            continue;
        }
        ki_span rest = {text.bytes + at, text.n_bytes - at};
        size_t room = specials == &e->vocab->specials ? control_room(e, at) : 0;
        const ki_special *s = ki_specials_at(specials, rest, room);
        size_t begin = at, end = at + (s ? s->text.n_bytes : 0);
        if (s && s->single_word && !ki_stands_alone(text, begin, end)) {
            at = end;
            continue;
        }
        if (!s) {
            at++;
            continue;
        }
        at = end;
        if (s->takes_left) begin = KI_MAX(ki_space_before(text, begin), from);
        if (s->takes_right) end = ki_space_after(text, end);
        if (from < begin)
            KI_TRY(plain(e, (ki_span){text.bytes + from, begin - from}, is_first && !from, err));
        KI_TRY(ki_encoder_put(e, &s->id, 1, err));
        from = end;
    }
    if (from >= text.n_bytes) return KIVI_OK;
    return plain(e, (ki_span){text.bytes + from, text.n_bytes - from}, is_first && !from, err);
}

/* ---- the door ---- */

static kivi_status put_ends(ki_encoder *e, bool is_front, kivi_error *err) {
    const ki_vocab *v = e->vocab;
    if (v->kind == KI_VOCAB_PIPELINE) return ki_pipeline_ends(e, is_front, err);
    int32_t id = is_front ? v->bos_id : v->eos_id;
    return id >= 0 ? ki_encoder_put(e, &id, 1, err) : KIVI_OK;
}

static kivi_status encode_all(ki_encoder *e, ki_span text, unsigned flags, kivi_error *err) {
    const ki_vocab *v = e->vocab;
    if (v->kind == KI_VOCAB_BYTES) KI_TRY(ki_words_init(&e->words, &v->pre, emit_word, err));
    if (v->kind == KI_VOCAB_PIPELINE) KI_TRY(ki_pipeline_begin(e, err));
    if (flags & KIVI_TEXT_ADD_BOS) KI_TRY(put_ends(e, true, err));
    KI_TRY(ki_encoder_split(e, text, &v->specials, true, put_plain, err));
    return flags & KIVI_TEXT_ADD_BOS ? put_ends(e, false, err) : KIVI_OK;
}

static kivi_status give(const ki_encoder *e, int32_t *ids, size_t max_ids, size_t *n_out,
                        kivi_error *err) {
    *n_out = e->ids.n_bytes / sizeof *ids;
    if (*n_out > max_ids)
        return KI_FAIL(err, ARG, "tokenizer: %zu ids, room for %zu", *n_out, max_ids);
    if (*n_out) memcpy(ids, e->ids.data, e->ids.n_bytes);
    return KIVI_OK;
}

/* One text of all parts; a single part is lent. */
static kivi_status join(ki_buf *joined, ki_span *text, const ki_text_part *parts, size_t n_parts,
                        kivi_error *err) {
    size_t n_bytes = 0;
    for (size_t i = 0; i < n_parts; i++)
        if (!ki_add(&n_bytes, n_bytes, parts[i].text.n_bytes) || n_bytes > MAX_TEXT_BYTES)
            return KI_FAIL(err, ARG, "tokenizer: %zu bytes of text, at most %d", n_bytes,
                           MAX_TEXT_BYTES);
    *text = n_parts ? parts[0].text : (ki_span){0};
    if (n_parts < 2) return KIVI_OK;
    for (size_t i = 0; i < n_parts; i++)
        KI_TRY(ki_buf_append(joined, parts[i].text.bytes, parts[i].text.n_bytes, err));
    *text = (ki_span){(const char *)joined->data, n_bytes};
    return KIVI_OK;
}

kivi_status ki_vocab_encode_parts(const ki_vocab *vocab, const ki_text_part *parts, size_t n_parts,
                                  unsigned flags, int32_t *ids, size_t max_ids, size_t *n_out,
                                  kivi_error *err) {
    ki_encoder e = {.vocab = vocab, .parts = parts, .n_parts = n_parts};
    ki_buf joined;
    ki_span text;
    *n_out = 0;
    ki_buf_init(&joined, vocab->mem, MAX_TEXT_BYTES);
    ki_buf_init(&e.ids, vocab->mem, (size_t)INT32_MAX * sizeof *ids);
    kivi_status status = join(&joined, &text, parts, n_parts, err);
    if (status == KIVI_OK) status = encode_all(&e, text, flags, err);
    if (status == KIVI_OK) status = give(&e, ids, max_ids, n_out, err);
    ki_words_deinit(&e.words);
    ki_pipeline_end(&e);
    ki_buf_deinit(&e.ids);
    ki_buf_deinit(&joined);
    return status;
}

kivi_status ki_vocab_encode(const ki_vocab *vocab, const char *text, size_t n_bytes, unsigned flags,
                            int32_t *ids, size_t max_ids, size_t *n_out, kivi_error *err) {
    ki_text_part part = {{text, n_bytes}, flags & KIVI_TEXT_SPECIAL};
    return ki_vocab_encode_parts(vocab, &part, 1, flags, ids, max_ids, n_out, err);
}
