/* scored.c: SentencePiece-like vocabularies. Spaces are written as U+2581, the text is not cut into
 * words, and of all neighbours that together spell a token those with the best score are merged.
 *
 * That is the rule of merge.c with other numbers: the rank of a pair is that of its score among all
 * scores, equal scores having equal ranks, so that the leftmost comes first. The pairs are all ways
 * to cut a token in two such that each part is a token or a single character. */
#include "token_private.h"

#include <math.h>
#include <stdlib.h>

enum { VISIBLE_SPACE = 0x2581 };

int32_t ki_vocab_symbol(const ki_vocab *vocab, uint32_t character) {
    char spelled[4];
    if (character >= KI_MALFORMED) return ki_symbol_of(character);
    ki_span text = {spelled, ki_character_write(spelled, character)};
    int32_t id = ki_vocab_find(vocab, text);
    return id < 0 || ki_vocab_is_control(vocab, id) ? ki_symbol_of(character) : id;
}

/* ---- creation ---- */

static int descending(const void *a, const void *b) {
    float x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return x > y ? -1 : x < y;
}

/* Scores [n] to their ranks among all different ones, the best first. */
static uint32_t rank_of(const float *sorted, size_t n, float score) {
    size_t from = 0, to = n;
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (sorted[middle] > score) from = middle + 1;
        else to = middle;
    }
    return (uint32_t)from;
}

/* What a token may be built of: no control tokens, and bytes only when the text has no other. */
static bool can_merge(const ki_vocab *vocab, int32_t id) {
    return id >= 0 && !ki_vocab_is_control(vocab, id) && vocab->types[id] != KI_TOKEN_BYTE;
}

/* The symbol that a part of a token has when it comes to be merged; false: it never comes up. */
static bool part_symbol(int32_t *out, const ki_vocab *vocab, ki_span part) {
    size_t at = 0;
    uint32_t c = ki_next_character(part, &at);
    *out = at == part.n_bytes ? ki_vocab_symbol(vocab, c) : ki_vocab_find(vocab, part);
    return at == part.n_bytes || can_merge(vocab, *out);
}

static kivi_status add_splits(ki_vocab *vocab, int32_t id, uint32_t rank, kivi_error *err) {
    ki_span text = ki_vocab_text(vocab, (size_t)id);
    size_t at = 0;
    uint32_t last = text.n_bytes ? ki_next_character(text, &at) : 0;
    while (at < text.n_bytes) {
        ki_span left = {text.bytes, at}, right = {text.bytes + at, text.n_bytes - at};
        uint32_t next = ki_next_character(text, &at);
        int32_t a, b;
        if (part_symbol(&a, vocab, left) && part_symbol(&b, vocab, right)) {
            KI_TRY(ki_pairs_add(&vocab->pairs, vocab->mem, a, b, rank, id, err));
            ki_joints_add(&vocab->joints, ki_vocab_symbol(vocab, last),
                          ki_vocab_symbol(vocab, next));
        }
        last = next;
    }
    return KIVI_OK;
}

static kivi_status add_all(ki_vocab *vocab, const float *scores, const float *sorted,
                           kivi_error *err) {
    for (size_t i = 0; i < vocab->n_tokens; i++) {
        int32_t id = (int32_t)i;
        if (!can_merge(vocab, id) || ki_vocab_find(vocab, ki_vocab_text(vocab, i)) != id) continue;
        KI_TRY(add_splits(vocab, id, rank_of(sorted, vocab->n_tokens, scores[i]), err));
    }
    return KIVI_OK;
}

kivi_status ki_scored_index(ki_vocab *vocab, const float *scores, kivi_error *err) {
    void *sorted;
    for (size_t i = 0; i < vocab->n_tokens; i++)
        if (isnan(scores[i]))
            return KI_FAIL(err, FORMAT, "vocabulary: token %zu: its score is no number", i);
    KI_TRY(ki_pairs_init(&vocab->pairs, vocab->mem, vocab->n_tokens, err));
    KI_TRY(ki_joints_init(&vocab->joints, vocab->mem, err));
    KI_TRY(ki_alloc_array(&sorted, vocab->mem, KI_TAG_other, vocab->n_tokens, sizeof *scores, err));
    memcpy(sorted, scores, vocab->n_tokens * sizeof *scores);
    qsort(sorted, vocab->n_tokens, sizeof *scores, descending);
    kivi_status status = add_all(vocab, scores, sorted, err);
    ki_free(vocab->mem, sorted);
    return status;
}

/* ---- encoding ---- */

/* All but one space of a run, and those at the ends, left out. */
typedef struct trimmer {
    ki_span text;
    size_t at;
    bool is_on, after_space;
} trimmer;

static bool only_spaces(ki_span text, size_t at) {
    while (at < text.n_bytes && text.bytes[at] == ' ') at++;
    return at == text.n_bytes;
}

static bool next_kept(trimmer *t, uint32_t *character) {
    while (t->at < t->text.n_bytes) {
        size_t begin = t->at;
        *character = ki_next_character(t->text, &t->at);
        bool is_space = *character == ' ';
        if (t->is_on && is_space && (t->after_space || only_spaces(t->text, begin))) {
            if (!t->after_space) break; /* only spaces are left */
            continue;
        }
        t->after_space = is_space;
        return true;
    }
    return false;
}

/* Symbols of 256 characters at a time; ASCII is most of most texts and has its own table. */
typedef struct symbols {
    int32_t ascii[128], chunk[256];
    size_t n;
} symbols;

static kivi_status put_symbol(ki_encoder *e, symbols *s, uint32_t character, kivi_error *err) {
    if (s->n == sizeof s->chunk / sizeof *s->chunk) {
        KI_TRY(ki_encoder_put(e, s->chunk, s->n, err));
        s->n = 0;
    }
    s->chunk[s->n++] = character < 128 ? s->ascii[character] : ki_vocab_symbol(e->vocab, character);
    return KIVI_OK;
}

kivi_status ki_scored_encode(ki_encoder *e, ki_span text, kivi_error *err) {
    const ki_vocab *v = e->vocab;
    size_t begin = e->ids.n_bytes;
    trimmer t = {.text = text, .is_on = v->trims_spaces, .after_space = true};
    symbols s = {.n = 0};
    uint32_t character;
    for (uint32_t c = 0; c < 128; c++) s.ascii[c] = ki_vocab_symbol(v, c);
    s.ascii[' '] = ki_vocab_symbol(v, VISIBLE_SPACE);
    bool is_first = true;
    while (next_kept(&t, &character)) {
        if (is_first && v->space_prefix) KI_TRY(put_symbol(e, &s, ' ', err));
        is_first = false;
        KI_TRY(put_symbol(e, &s, character, err));
    }
    KI_TRY(ki_encoder_put(e, s.chunk, s.n, err));
    return ki_encoder_merge(e, begin, err);
}
