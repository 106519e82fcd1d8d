/* words.c: from a tokenizer.json, a pipeline of the file's own making, to GGUF, where a vocabulary
 * has one of a few known ways. Which one is read off the file's parts, and then tried out. */
#include "words.h"

#include "json_load.h"

#include <stdio.h>

enum { MAX_SIGN_BYTES = 1024, MAX_TEXTS_BYTES = 1 << 30 };

typedef struct ki_vocab_made {
    ki_mem *mem;
    const ki_vocab *vocab;
    json_t *root;
    ki_span *tokens, *merges;
    int32_t *types;
    float *scores;
    ki_buf merge_text, fill_text;
} ki_vocab_made;

/* ---- a room of the pipeline as one line ---- */

typedef struct sign {
    char text[MAX_SIGN_BYTES];
    size_t n;
    bool too_long;
} sign;

static void write_part(sign *s, const char *text) {
    size_t n = strlen(text);
    if (s->n + n + 1 > sizeof s->text) {
        s->too_long = true;
        return;
    }
    memcpy(s->text + s->n, text, n + 1);
    s->n += n;
}

static void write_pattern(sign *s, const json_t *node) {
    const json_t *pattern = json_object_get(node, "pattern");
    const char *regex = json_string_value(json_object_get(pattern, "Regex"));
    const char *plain = json_string_value(json_object_get(pattern, "String"));
    write_part(s, regex ? "/" : "'");
    write_part(s, regex ? regex : plain ? plain : "?");
}

/* "ByteLevel 0 1" and the like: the type, and of its settings those that matter. */
static void write_node(sign *s, const json_t *node) {
    const char *type = json_string_value(json_object_get(node, "type"));
    const char *behavior = json_string_value(json_object_get(node, "behavior"));
    if (s->n) write_part(s, " | ");
    write_part(s, type ? type : "?");
    if (!type) return;
    if (!strcmp(type, "ByteLevel")) {
        write_part(s, ki_json_flag(node, "add_prefix_space", true) ? " prefix" : "");
        write_part(s, ki_json_flag(node, "use_regex", true) ? " words" : "");
    } else if (!strcmp(type, "Digits")) {
        write_part(s, ki_json_flag(node, "individual_digits", false) ? " each" : "");
    } else if (!strcmp(type, "Prepend")) {
        const char *text = json_string_value(json_object_get(node, "prepend"));
        write_part(s, " ");
        write_part(s, text ? text : "?");
    }
    if (behavior) {
        write_part(s, " ");
        write_part(s, behavior);
        write_part(s, ki_json_flag(node, "invert", false) ? " inverted " : " ");
    }
    if (json_object_get(node, "pattern")) write_pattern(s, node);
    const char *content = json_string_value(json_object_get(node, "content"));
    if (content) write_part(s, " to "), write_part(s, content);
}

static void write_room(sign *s, const json_t *node, const char *list) {
    const json_t *nodes = json_object_get(node, list);
    if (!json_is_object(node)) return;
    if (!json_is_array(nodes)) {
        write_node(s, node);
        return;
    }
    for (size_t i = 0; i < json_array_size(nodes); i++) /* ki_rooms_fill bounded the depth */
        write_room(s, json_array_get(nodes, i), list);
}

/* ---- what GGUF calls it ---- */

#define ISOLATED "Split Isolated /"
#define CASELESS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define REST "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define LLAMA3(digits)                                                                             \
    CASELESS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" digits "| ?[^\\s\\p{L}\\p{N}]+" REST
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"

static const struct {
    const char *pre, *sign;
} cuts[] = {
    {"gpt-2", "ByteLevel words"},
    {"smollm", "Digits each | ByteLevel words"},
    {"falcon", "Punctuation Contiguous  | ByteLevel words | Digits | " ISOLATED "[0-9][0-9][0-9]"},
    {"llama-bpe", ISOLATED LLAMA3("{1,3}") " | ByteLevel"},
    {"qwen2", ISOLATED LLAMA3("") " | ByteLevel"},
    {"qwen35", ISOLATED CASELESS "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}"
                                 "| ?[^\\s\\p{L}\\p{M}\\p{N}]+" REST " | ByteLevel"},
    {"tekken", ISOLATED "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+|[^\\r\\n\\p{L}\\p{N}]?" UPPER
                        "+" LOWER "*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+"
                        "|\\s+(?!\\S)|\\s+ | ByteLevel"},
};

static kivi_status no_name(const char *room, const sign *s, kivi_error *err) {
    return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: the %s \"%.120s\"%s has no name in GGUF",
                   room, s->text, s->n > 120 ? "..." : "");
}

static kivi_status name_bytes(ki_vocab_export *out, const sign *norm, const sign *cut,
                              kivi_error *err) {
    out->spec.model = "gpt2";
    out->drops_nfc = !strcmp(norm->text, "NFC");
    if (norm->n && !out->drops_nfc) return no_name("normalizer", norm, err);
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts && !cut->too_long; i++)
        if (!strcmp(cut->text, cuts[i].sign)) {
            out->spec.pre = cuts[i].pre;
            return KIVI_OK;
        }
    return no_name("pre-tokenizer", cut, err);
}

/* Spaces become U+2581, and one is put in front or not. */
static kivi_status name_scored(ki_vocab_export *out, const json_t *root, const sign *norm,
                               const sign *cut, kivi_error *err) {
    static const char *const with_front = "Prepend \xe2\x96\x81 | Replace'  to \xe2\x96\x81";
    static const char *const bare = "Replace'  to \xe2\x96\x81";
    const json_t *model = json_object_get(root, "model");
    const json_t *meta = json_object_get(root, "pre_tokenizer");
    const char *type = json_string_value(json_object_get(meta, "type"));
    const char *scheme = json_string_value(json_object_get(meta, "prepend_scheme"));
    out->spec.model = "llama";
    out->spec.pre = "default";
    if (!ki_json_flag(model, "byte_fallback", false))
        return KI_FAIL(
            err, UNSUPPORTED,
            "tokenizer.json: the model without bytes (byte_fallback) has no name in GGUF");
    if (!norm->n && type && !strcmp(type, "Metaspace")) {
        const char *mark = json_string_value(json_object_get(meta, "replacement"));
        if (mark && strcmp(mark, "\xe2\x96\x81")) return no_name("pre-tokenizer", cut, err);
        bool adds = ki_json_flag(meta, "add_prefix_space", true); /* of before the scheme */
        if (!scheme) scheme = adds ? "always" : "never";
        out->spec.space_prefix = strcmp(scheme, "never") != 0;
        out->adds_more_spaces = out->spec.space_prefix;
        return KIVI_OK;
    }
    out->spec.space_prefix = !strcmp(norm->text, with_front);
    if (!out->spec.space_prefix && strcmp(norm->text, bare))
        return no_name("normalizer", norm, err);
    /* No space is left to cut at. */
    if (cut->n && strcmp(cut->text, "Split MergedWithPrevious ' "))
        return no_name("pre-tokenizer", cut, err);
    return KIVI_OK;
}

static kivi_status name_it(ki_vocab_export *out, ki_vocab_made *m, kivi_error *err) {
    sign norm = {.n = 0}, cut = {.n = 0};
    write_room(&norm, json_object_get(m->root, "normalizer"), "normalizers");
    write_room(&cut, json_object_get(m->root, "pre_tokenizer"), "pretokenizers");
    if (norm.too_long) return no_name("normalizer", &norm, err);
    return m->vocab->pipeline->is_byte_level ? name_bytes(out, &norm, &cut, err)
                                             : name_scored(out, m->root, &norm, &cut, err);
}

/* What is put around a text: nothing, or the one token that GGUF has a key for. */
static kivi_status name_end(bool *adds, const int32_t *ids, size_t n, int64_t id, const char *which,
                            kivi_error *err) {
    *adds = n > 0;
    if (n == 0 || (n == 1 && ids[0] == id)) return KIVI_OK;
    return KI_FAIL(err, UNSUPPORTED,
                   "tokenizer.json: the post_processor adds %zu tokens that are not %s alone; GGUF "
                   "has no key for them",
                   n, which);
}

/* ---- tables ---- */

static kivi_status make(void *out, ki_mem *mem, size_t count, size_t item_bytes, kivi_error *err) {
    void *block;
    KI_TRY(ki_alloc_array(&block, mem, KI_TAG_other, count, item_bytes, err));
    memcpy(out, &block, sizeof block);
    return KIVI_OK;
}

/* Rows of the embedding that no token has; and holes. */
static kivi_status fill_rows(ki_vocab_made *m, size_t n_tokens, size_t n_rows, kivi_error *err) {
    enum { ROOM = 32 };
    ki_buf_init(&m->fill_text, m->mem, MAX_TEXTS_BYTES);
    for (size_t i = 0; i < n_rows; i++) {
        char text[ROOM] = {0};
        if (i < n_tokens && m->tokens[i].n_bytes) continue;
        snprintf(text, sizeof text, "[PAD%zu]", i);
        KI_TRY(ki_buf_append(&m->fill_text, text, sizeof text, err));
    }
    for (size_t i = 0, at = 0; i < n_rows; i++) {
        if (i < n_tokens && m->tokens[i].n_bytes) continue;
        const char *text = (const char *)m->fill_text.data + at;
        m->tokens[i] = (ki_span){text, strlen(text)};
        m->types[i] = KI_TOKEN_UNUSED;
        at += ROOM;
    }
    return KIVI_OK;
}

static bool is_byte(ki_span text) {
    char byte;
    return ki_hex_read(&byte, text);
}

static kivi_status fill_tokens(ki_vocab_export *out, ki_vocab_made *m, size_t n_rows,
                               kivi_error *err) {
    const ki_vocab *v = m->vocab;
    bool is_scored = !v->pipeline->is_byte_level;
    KI_TRY(make(&m->tokens, m->mem, n_rows, sizeof *m->tokens, err));
    KI_TRY(make(&m->types, m->mem, n_rows, sizeof *m->types, err));
    for (size_t i = 0; i < v->n_tokens; i++) {
        m->tokens[i] = ki_vocab_text(v, i);
        m->types[i] = v->types[i];
        if (!is_scored) continue;
        if (v->types[i] == KI_TOKEN_NORMAL && is_byte(m->tokens[i])) m->types[i] = KI_TOKEN_BYTE;
        if ((int32_t)i == v->pipeline->unk_id) m->types[i] = KI_TOKEN_UNKNOWN;
    }
    KI_TRY(fill_rows(m, v->n_tokens, n_rows, err));
    out->spec.tokens = m->tokens;
    out->spec.types = m->types;
    out->spec.n_tokens = n_rows;
    out->spec.unk_id = v->pipeline->unk_id;
    return KIVI_OK;
}

static void parts_of(ki_span part[2], const json_t *merge) {
    const json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
    if (json_is_array(merge)) {
        part[0] = (ki_span){json_string_value(a), json_string_length(a)};
        part[1] = (ki_span){json_string_value(b), json_string_length(b)};
        return;
    }
    ki_span all = {json_string_value(merge), json_string_length(merge)};
    size_t n = (size_t)((const char *)memchr(all.bytes, ' ', all.n_bytes) - all.bytes);
    part[0] = (ki_span){all.bytes, n};
    part[1] = (ki_span){all.bytes + n + 1, all.n_bytes - n - 1};
}

/* "left right", one after the other; the vocabulary's loader has seen that each is two parts. */
static kivi_status fill_merges(ki_vocab_export *out, ki_vocab_made *m, kivi_error *err) {
    const json_t *merges = json_object_get(json_object_get(m->root, "model"), "merges");
    size_t n = json_array_size(merges);
    KI_TRY(make(&m->merges, m->mem, n, sizeof *m->merges, err));
    ki_buf_init(&m->merge_text, m->mem, MAX_TEXTS_BYTES);
    for (size_t i = 0; i < n; i++) {
        ki_span part[2];
        parts_of(part, json_array_get(merges, i));
        if (memchr(part[0].bytes, ' ', part[0].n_bytes) ||
            memchr(part[1].bytes, ' ', part[1].n_bytes))
            return KI_FAIL(err, UNSUPPORTED,
                           "tokenizer.json: merge %zu has a space in a part; GGUF cannot write it",
                           i);
        KI_TRY(ki_buf_append(&m->merge_text, part[0].bytes, part[0].n_bytes, err));
        KI_TRY(ki_buf_append(&m->merge_text, " ", 1, err));
        KI_TRY(ki_buf_append(&m->merge_text, part[1].bytes, part[1].n_bytes, err));
        m->merges[i].n_bytes = part[0].n_bytes + 1 + part[1].n_bytes;
    }
    const char *text = (const char *)m->merge_text.data;
    for (size_t i = 0; i < n; text += m->merges[i++].n_bytes) m->merges[i].bytes = text;
    out->spec.merges = m->merges;
    out->spec.n_merges = n;
    return KIVI_OK;
}

/* The id of two parts together; -1: none. */
static int32_t find_both(ki_vocab_made *m, const ki_span part[2], kivi_error *err) {
    m->merge_text.n_bytes = 0;
    for (int i = 0; i < 2; i++)
        if (ki_buf_append(&m->merge_text, part[i].bytes, part[i].n_bytes, err) != KIVI_OK)
            return -1;
    return ki_vocab_find(m->vocab,
                         (ki_span){(const char *)m->merge_text.data, m->merge_text.n_bytes});
}

/* A token's score is the rank of the first merge that makes it: where such a file was made of
 * scores, all merges of a token stand together. A token that merges make and whose spaces are
 * spelled is a normal one, whatever it was added as: as a token of its own it would be looked for
 * with that spelling in a text, and read so in an answer. */
static kivi_status fill_scores(ki_vocab_export *out, ki_vocab_made *m, kivi_error *err) {
    const json_t *merges = json_object_get(json_object_get(m->root, "model"), "merges");
    size_t n = json_array_size(merges), n_rows = out->spec.n_tokens;
    KI_TRY(make(&m->scores, m->mem, n_rows, sizeof *m->scores, err));
    ki_buf_init(&m->merge_text, m->mem, MAX_TEXTS_BYTES);
    for (size_t i = 0; i < n_rows; i++)
        m->scores[i] = m->types[i] == KI_TOKEN_NORMAL ? -(float)n : 0;
    for (size_t i = n; i-- > 0;) {
        ki_span part[2];
        parts_of(part, json_array_get(merges, i));
        int32_t id = find_both(m, part, err);
        if (id < 0) return ki_json_wrong("merges", "has one whose result is no token", err);
        m->scores[id] = -(float)i;
        bool has_space = m->tokens[id].n_bytes >= 3 &&
                         memmem(m->tokens[id].bytes, m->tokens[id].n_bytes, "\xe2\x96\x81", 3);
        if (m->types[id] != KI_TOKEN_USER || !has_space) continue;
        m->types[id] = KI_TOKEN_NORMAL;
        out->joins_spelled = true;
    }
    out->spec.scores = m->scores;
    return KIVI_OK;
}

/* Added tokens with wishes that GGUF does not know. */
static kivi_status check_added(const ki_vocab_made *m, kivi_error *err) {
    static const char *const wishes[] = {"lstrip", "rstrip", "single_word"};
    const json_t *added = json_object_get(m->root, "added_tokens");
    for (size_t i = 0; i < json_array_size(added); i++)
        for (size_t w = 0; w < sizeof wishes / sizeof *wishes; w++) {
            const json_t *item = json_array_get(added, i);
            if (!ki_json_flag(item, wishes[w], false)) continue;
            ki_span text = ki_json_text(item, "content");
            return KI_FAIL(err, UNSUPPORTED,
                           "tokenizer.json: added token \"%.*s\" has %s, which has no key in GGUF",
                           (int)KI_MIN(text.n_bytes, (size_t)40), text.bytes, wishes[w]);
        }
    return KIVI_OK;
}

/* ---- trying out ---- */

static const char *const probes[] = {
    "Hello, world! I'm here; we'll see. DON'T THEY'RE 's 'Re",
    "1 12 123 1234 12345678 3.14 1,000,000 x1y22z333 0xFF 2\xc2\xb2 \xe2\x85\xa7",
    " leading",
    "trailing ",
    "two  three   four    spaces",
    "tab\tand\nline\n\nlines\r\nends \n x",
    "camelCase HTTPServer foo_bar a-b a--b ... !!! (x){y}[z] $1 <=> ^~`| #tag @me 50%",
    "na\xc3\xafve \xc3\x9c"
    "bermut \xc4\xb0stanbul \xd0\x9f\xd1\x80\xd0\xb8\xd0\xb2\xd0\xb5\xd1\x82",
    "\xe4\xbd\xa0\xe5\xa5\xbd\xe4\xb8\x96\xe7\x95\x8c \xe3\x81\x93\xe3\x82\x93 \xed\x95\x9c",
    "\xe0\xa4\xa8\xe0\xa4\xae\xe0\xa4\xb8\xe0\xa5\x8d\xe0\xa4\xa4\xe0\xa5\x87 \xd8\xb3\xd9\x84",
    "\xf0\x9f\xa4\x97 \xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x91\xa7 "
    "\xe2\x82\xac\xc2\xa0x\xe3\x80\x80y",
    "int main(void) { return x / 2 // half\n    && !y; }\n",
    "http://a.b/c?d=e&f #\n/\n//\r\n",
};

static bool is_valid(ki_span text) {
    for (size_t at = 0; at < text.n_bytes;)
        if (ki_next_character(text, &at) >= KI_MALFORMED) return false;
    return true;
}

typedef struct trial {
    const ki_vocab *theirs, *made;
    const ki_vocab_export *out;
    ki_encoder run;     /* for normalizing */
    bool skips_spelled; /* texts with U+2581 itself, which were that added token */
    int32_t *ids[2];
    size_t room;
} trial;

/* Whether NFC leaves a text alone: only then are both to agree. */
static kivi_status is_normal(bool *out, trial *t, ki_span text, kivi_error *err) {
    ki_span normal = text;
    if (t->out->drops_nfc)
        KI_TRY(ki_normalize(&normal, t->theirs->pipeline, t->run.run, text, err));
    *out = normal.n_bytes == text.n_bytes && !memcmp(normal.bytes, text.bytes, text.n_bytes);
    return KIVI_OK;
}

static bool begins_with_space(ki_span text) {
    return *text.bytes == ' ' || (text.n_bytes >= 3 && !memcmp(text.bytes, "\xe2\x96\x81", 3));
}

static kivi_status try_text(trial *t, ki_span text, kivi_error *err) {
    const ki_vocab *both[2] = {t->theirs, t->made};
    size_t n[2] = {0};
    bool counts = text.n_bytes > 0 && text.n_bytes <= t->room / 2 && is_valid(text);
    if (t->out->adds_more_spaces && counts && begins_with_space(text)) counts = false; /* known */
    if (t->skips_spelled && counts && memmem(text.bytes, text.n_bytes, "\xe2\x96\x81", 3))
        counts = false;
    if (counts) KI_TRY(is_normal(&counts, t, text, err));
    if (!counts) return KIVI_OK;
    for (int i = 0; i < 2; i++)
        KI_TRY(
            ki_vocab_encode(both[i], text.bytes, text.n_bytes, 0, t->ids[i], t->room, &n[i], err));
    if (n[0] == n[1] && !memcmp(t->ids[0], t->ids[1], n[0] * sizeof *t->ids[0])) return KIVI_OK;
    size_t at = 0;
    while (at < n[0] && at < n[1] && t->ids[0][at] == t->ids[1][at]) at++;
    return KI_FAIL(
        err, UNSUPPORTED,
        "tokenizer.json: in GGUF (%s, %s) \"%.*s\" would be other tokens, from the %zuth "
        "on; it has no name there",
        t->out->spec.model, t->out->spec.pre, (int)KI_MIN(text.n_bytes, (size_t)60), text.bytes,
        at + 1);
}

static kivi_status try_all(trial *t, kivi_error *err) {
    for (size_t i = 0; i < sizeof probes / sizeof *probes; i++)
        KI_TRY(try_text(t, (ki_span){probes[i], strlen(probes[i])}, err));
    for (size_t i = 0; i < t->theirs->n_tokens; i++) {
        ki_span text = ki_pipeline_text(t->theirs, i);
        KI_TRY(try_text(t, text, err));
        if (text.n_bytes < 2 || *text.bytes != ' ') continue; /* the space may come by itself */
        KI_TRY(try_text(t, (ki_span){text.bytes + 1, text.n_bytes - 1}, err));
    }
    return KIVI_OK;
}

static kivi_status try_out(const ki_vocab_export *out, const ki_vocab_made *m, kivi_error *err) {
    enum { ROOM = 1 << 14 };
    ki_vocab *made = NULL;
    trial t = {.theirs = m->vocab,
               .out = out,
               .run = {.vocab = m->vocab},
               .room = ROOM,
               .skips_spelled = out->joins_spelled};
    KI_TRY(ki_vocab_create(&made, m->mem, &out->spec, err));
    t.made = made;
    kivi_status status = ki_pipeline_begin(&t.run, err);
    for (int i = 0; i < 2 && status == KIVI_OK; i++)
        status = make(&t.ids[i], m->mem, ROOM, sizeof *t.ids[i], err);
    if (status == KIVI_OK) status = try_all(&t, err);
    ki_pipeline_end(&t.run);
    for (int i = 0; i < 2; i++) ki_free(m->mem, t.ids[i]);
    ki_vocab_destroy(&made);
    return status;
}

/* ---- the door ---- */

static kivi_status fill(ki_vocab_export *out, ki_vocab_made *m, size_t n_rows, kivi_error *err) {
    const ki_pipeline *p = m->vocab->pipeline;
    ki_vocab_spec *spec = &out->spec;
    KI_TRY(name_it(out, m, err));
    KI_TRY(check_added(m, err));
    KI_TRY(name_end(&spec->add_bos, p->front, p->n_front, spec->bos_id, "BOS", err));
    KI_TRY(name_end(&spec->add_eos, p->back, p->n_back, spec->eos_id, "EOS", err));
    if (m->vocab->n_tokens > n_rows)
        return KI_FAIL(err, FORMAT, "tokenizer.json: %zu tokens, %zu rows in the embedding",
                       m->vocab->n_tokens, n_rows);
    KI_TRY(fill_tokens(out, m, n_rows, err));
    KI_TRY(p->is_byte_level ? fill_merges(out, m, err) : fill_scores(out, m, err));
    return try_out(out, m, err);
}

kivi_status ki_vocab_export_init(ki_vocab_export *out, ki_mem *mem, const ki_vocab *vocab,
                                 const char *json, size_t n_bytes, int64_t bos_id, int64_t eos_id,
                                 size_t n_rows, kivi_error *err) {
    *out = (ki_vocab_export){.spec = {.bos_id = bos_id, .eos_id = eos_id, .unk_id = -1}};
    KI_TRY(make(&out->made, mem, 1, sizeof(ki_vocab_made), err));
    ki_vocab_made *m = out->made;
    m->mem = mem;
    m->vocab = vocab;
    kivi_status status = ki_json_parse(&m->root, json, n_bytes, err);
    if (status == KIVI_OK) status = fill(out, m, n_rows, err);
    if (status != KIVI_OK) ki_vocab_export_deinit(out);
    return status;
}

void ki_vocab_export_deinit(ki_vocab_export *out) {
    ki_vocab_made *m = out->made;
    if (!m) return;
    json_decref(m->root);
    ki_free(m->mem, m->tokens);
    ki_free(m->mem, m->merges);
    ki_free(m->mem, m->types);
    ki_free(m->mem, m->scores);
    ki_buf *texts[] = {&m->merge_text, &m->fill_text};
    for (size_t i = 0; i < 2; i++)
        if (texts[i]->mem) ki_buf_deinit(texts[i]);
    ki_free(m->mem, m);
    *out = (ki_vocab_export){.made = NULL};
}
