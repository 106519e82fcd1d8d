/* cut.c: the pre-tokenizers of a tokenizer.json. Each one cuts or rewrites the pieces of the one
 * before; the depth of the recursion is their number. */
#include "pipeline.h"

static kivi_status next_room(ki_encoder *e, size_t room, ki_span text, bool is_first,
                             kivi_error *err);

/* Pieces as a splitter finds them, one at a time: `held` is the one that may still grow. */
typedef struct pieces {
    ki_encoder *e;
    size_t room; /* of the splitter */
    ki_span text;
    bool is_first;
    size_t from, to; /* held */
    bool has_held, after_match;
} pieces;

static kivi_status give(pieces *p, size_t from, size_t to, kivi_error *err) {
    if (from == to) return KIVI_OK;
    return next_room(p->e, p->room + 1, (ki_span){p->text.bytes + from, to - from},
                     p->is_first && from == 0, err);
}

static kivi_status flush(pieces *p, kivi_error *err) {
    bool had = p->has_held;
    p->has_held = false;
    return had ? give(p, p->from, p->to, err) : KIVI_OK;
}

/* The next range, a match or what lies between two. */
static kivi_status take(pieces *p, size_t from, size_t to, bool is_match, kivi_error *err) {
    bool grows = false;
    switch (p->e->vocab->pipeline->cuts[p->room].behavior) {
    case KI_CUT_ISOLATED: return give(p, from, to, err);
    case KI_CUT_REMOVED: return is_match ? KIVI_OK : give(p, from, to, err);
    case KI_CUT_CONTIGUOUS: grows = is_match == p->after_match; break;
    case KI_CUT_WITH_PREVIOUS: grows = is_match && !p->after_match; break;
    case KI_CUT_WITH_NEXT: grows = !is_match && p->after_match; break;
    }
    p->after_match = is_match;
    if (!grows || !p->has_held) {
        KI_TRY(flush(p, err));
        p->from = from;
    }
    p->to = to;
    p->has_held = true;
    return KIVI_OK;
}

static kivi_status split(ki_encoder *e, size_t room, ki_span text, bool is_first, kivi_error *err) {
    const ki_pipeline *pipeline = e->vocab->pipeline;
    const ki_cut *cut = &pipeline->cuts[room];
    pieces p = {.e = e, .room = room, .text = text, .is_first = is_first};
    size_t from = 0, done = 0, begin = 0, end = 0;
    for (bool found = true; from <= text.n_bytes;) {
        KI_TRY(ki_regex_next(&begin, &end, &found, pipeline, e->run->match, cut->pattern, text,
                             from, err));
        if (!found) break;
        if (done < begin) KI_TRY(take(&p, done, begin, cut->inverted, err));
        KI_TRY(take(&p, begin, end, !cut->inverted, err));
        done = from = end;
        if (begin < end) continue;
        if (from < text.n_bytes) (void)ki_next_character(text, &from);
        else from++;
    }
    if (done < text.n_bytes) KI_TRY(take(&p, done, text.n_bytes, cut->inverted, err));
    return flush(&p, err);
}

static bool begins_with(ki_span text, ki_span with) {
    return text.n_bytes >= with.n_bytes && !memcmp(text.bytes, with.bytes, with.n_bytes);
}

static kivi_status metaspace(ki_buf *out, const ki_cut *cut, ki_span text, bool is_first,
                             kivi_error *err) {
    ki_span mark = cut->content;
    bool has_mark = begins_with(text, mark) || begins_with(text, (ki_span){" ", 1});
    bool wanted = cut->scheme == KI_PREPEND_ALWAYS || (cut->scheme == KI_PREPEND_FIRST && is_first);
    if (wanted && !has_mark) KI_TRY(ki_buf_append(out, mark.bytes, mark.n_bytes, err));
    for (size_t at = 0; at < text.n_bytes;) {
        const char *space = memchr(text.bytes + at, ' ', text.n_bytes - at);
        size_t end = space ? (size_t)(space - text.bytes) : text.n_bytes;
        KI_TRY(ki_buf_append(out, text.bytes + at, end - at, err));
        if (space) KI_TRY(ki_buf_append(out, mark.bytes, mark.n_bytes, err));
        at = end + 1;
    }
    return KIVI_OK;
}

static kivi_status rewrite(ki_buf *out, const ki_cut *cut, ki_span text, bool is_first,
                           kivi_error *err) {
    out->n_bytes = 0;
    if (cut->kind == KI_CUT_METASPACE) return metaspace(out, cut, text, is_first, err);
    if (cut->kind == KI_CUT_ALPHABET) return ki_write_alphabet(out, text, err);
    if (text.bytes[0] != ' ') KI_TRY(ki_buf_append(out, " ", 1, err));
    return ki_buf_append(out, text.bytes, text.n_bytes, err);
}

static kivi_status next_room(ki_encoder *e, size_t room, ki_span text, bool is_first,
                             kivi_error *err) {
    const ki_pipeline *p = e->vocab->pipeline;
    if (!text.n_bytes) return KIVI_OK;
    if (room == p->n_cuts) return ki_pipeline_word(e, text, err);
    if (p->cuts[room].kind == KI_CUT_SPLIT) return split(e, room, text, is_first, err);
    ki_buf *out = &e->run->cuts[room];
    KI_TRY(rewrite(out, &p->cuts[room], text, is_first, err));
    return next_room(e, room + 1, (ki_span){(const char *)out->data, out->n_bytes}, is_first, err);
}

kivi_status ki_cut_text(ki_encoder *e, ki_span text, bool is_first, kivi_error *err) {
    return next_room(e, 0, text, is_first, err);
}
