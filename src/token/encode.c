/* encode.c: text to ids. Special tokens cut the text first; what lies between is cut into words;
 * each word's bytes are written as ids at the end of the result and merged there in place. */
#include "token_private.h"

enum { MAX_TEXT_BYTES = 1 << 30, CHUNK = 256, MAX_WHOLE_BYTES = 512 };

typedef struct encoder {
    ki_words words; /* first: emit finds the encoder from it */
    const ki_vocab *vocab;
    ki_buf ids; /* int32_t */
} encoder;

static kivi_status put_ids(encoder *e, const int32_t *ids, size_t n_ids, kivi_error *err) {
    return ki_buf_append(&e->ids, ids, n_ids * sizeof *ids, err);
}

static kivi_status put_bytes(encoder *e, ki_span word, kivi_error *err) {
    int32_t chunk[CHUNK];
    for (size_t at = 0; at < word.n_bytes; at += CHUNK) {
        size_t n = KI_MIN(word.n_bytes - at, (size_t)CHUNK);
        for (size_t i = 0; i < n; i++)
            chunk[i] = e->vocab->bytes[(unsigned char)word.bytes[at + i]];
        KI_TRY(put_ids(e, chunk, n, err));
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
    encoder *e = (encoder *)words;
    int32_t whole = e->vocab->pre.rule->whole_words ? whole_word(e->vocab, word) : -1;
    if (whole >= 0) return put_ids(e, &whole, 1, err);
    size_t begin = e->ids.n_bytes, n = word.n_bytes;
    KI_TRY(put_bytes(e, word, err));
    int32_t *ids = (int32_t *)(void *)(e->ids.data + begin);
    KI_TRY(ki_merge(&e->vocab->pairs, e->vocab->mem, ids, &n, err));
    e->ids.n_bytes = begin + drop_missing(ids, n) * sizeof *ids;
    return KIVI_OK;
}

/* The longest special token that text begins with; NULL: none. */
static const ki_special *special_at(const ki_vocab *vocab, ki_span text, bool with_control) {
    unsigned char first = (unsigned char)text.bytes[0];
    for (uint32_t i = vocab->first_special[first]; i < vocab->first_special[first + 1]; i++) {
        const ki_special *s = &vocab->specials[i];
        if (s->is_control && !with_control) continue;
        if (s->text.n_bytes > text.n_bytes) continue;
        if (!memcmp(s->text.bytes, text.bytes, s->text.n_bytes)) return s;
    }
    return NULL;
}

static kivi_status encode_text(encoder *e, ki_span text, bool with_control, kivi_error *err) {
    size_t plain = 0; /* where the text since the last special token began */
    for (size_t at = 0; at < text.n_bytes;) {
        ki_span rest = {text.bytes + at, text.n_bytes - at};
        const ki_special *special = special_at(e->vocab, rest, with_control);
        if (!special) {
            at++;
            continue;
        }
        KI_TRY(ki_words_split(&e->words, (ki_span){text.bytes + plain, at - plain}, err));
        KI_TRY(put_ids(e, &special->id, 1, err));
        at += special->text.n_bytes;
        plain = at;
    }
    return ki_words_split(&e->words, (ki_span){text.bytes + plain, text.n_bytes - plain}, err);
}

static kivi_status encode_all(encoder *e, ki_span text, unsigned flags, kivi_error *err) {
    bool with_ends = flags & KIVI_TEXT_ADD_BOS;
    int32_t bos = e->vocab->bos_id, eos = e->vocab->eos_id;
    KI_TRY(ki_words_init(&e->words, &e->vocab->pre, emit_word, err));
    if (with_ends && bos >= 0) KI_TRY(put_ids(e, &bos, 1, err));
    KI_TRY(encode_text(e, text, flags & KIVI_TEXT_SPECIAL, err));
    if (with_ends && eos >= 0) KI_TRY(put_ids(e, &eos, 1, err));
    return KIVI_OK;
}

static kivi_status give(const encoder *e, int32_t *ids, size_t max_ids, size_t *n_out,
                        kivi_error *err) {
    *n_out = e->ids.n_bytes / sizeof *ids;
    if (*n_out > max_ids)
        return KI_FAIL(err, ARG, "tokenizer: %zu ids, room for %zu", *n_out, max_ids);
    if (*n_out) memcpy(ids, e->ids.data, e->ids.n_bytes);
    return KIVI_OK;
}

kivi_status ki_vocab_encode(const ki_vocab *vocab, const char *text, size_t n_bytes, unsigned flags,
                            int32_t *ids, size_t max_ids, size_t *n_out, kivi_error *err) {
    *n_out = 0;
    if (n_bytes > MAX_TEXT_BYTES)
        return KI_FAIL(err, ARG, "tokenizer: %zu bytes of text, at most %d", n_bytes,
                       MAX_TEXT_BYTES);
    encoder e = {.vocab = vocab};
    /* A byte gives at most one id; BOS and EOS come on top. */
    ki_buf_init(&e.ids, vocab->mem, (n_bytes + 2) * sizeof *ids);
    kivi_status status = encode_all(&e, (ki_span){text, n_bytes}, flags, err);
    if (status == KIVI_OK) status = give(&e, ids, max_ids, n_out, err);
    ki_words_deinit(&e.words);
    ki_buf_deinit(&e.ids);
    return status;
}
