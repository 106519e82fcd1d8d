/* json_rooms.c: normalizers, pre-tokenizers, post-processor and decoders of a tokenizer.json. What
 * is not known is refused by its name: a text encoded almost right is worse than none. */
#include "json_load.h"

typedef kivi_status add_fn(ki_vocab *v, const json_t *node, const char *type, kivi_error *err);

static kivi_status unknown(const char *room, const char *type, kivi_error *err) {
    return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: %s \"%.60s\" is not supported", room, type);
}

static kivi_status keep(ki_span *out, ki_vocab *v, ki_span text, kivi_error *err) {
    void *block;
    KI_TRY(ki_alloc(&block, v->mem, KI_TAG_other, text.n_bytes + 1, err));
    if (text.n_bytes) memcpy(block, text.bytes, text.n_bytes);
    *out = (ki_span){block, text.n_bytes};
    return KIVI_OK;
}

/* Gives a node, or all nodes of a Sequence, to add. A sequence in a sequence is one list. */
static kivi_status walk(ki_vocab *v, const json_t *node, const char *room, const char *list,
                        int depth, add_fn *add, kivi_error *err) {
    if (!node || json_is_null(node)) return KIVI_OK;
    const char *type = json_string_value(json_object_get(node, "type"));
    if (!type) return ki_json_wrong(room, "has no type", err);
    if (strcmp(type, "Sequence")) return add(v, node, type, err);
    const json_t *nodes = json_object_get(node, list);
    if (!json_is_array(nodes) || depth > 3) return ki_json_wrong(room, "is no list", err);
    for (size_t i = 0; i < json_array_size(nodes); i++)
        KI_TRY(walk(v, json_array_get(nodes, i), room, list, depth + 1, add, err));
    return KIVI_OK;
}

/* {"String": text} or {"Regex": text} */
static kivi_status compile(pcre2_code **out, const ki_vocab *v, const json_t *pattern,
                           const char *room, kivi_error *err) {
    ki_span literal = ki_json_text(pattern, "String"), regex = ki_json_text(pattern, "Regex");
    if (!literal.bytes && !regex.bytes) return ki_json_wrong(room, "has no pattern", err);
    bool is_literal = literal.bytes != NULL;
    return ki_regex_compile(out, v->pipeline, is_literal ? literal : regex, is_literal, err);
}

/* ---- normalizers ---- */

static kivi_status fill_norm(ki_vocab *v, ki_norm *norm, const json_t *node, const char *type,
                             kivi_error *err) {
    static const struct {
        const char *type;
        ki_norm_kind kind;
    } kinds[] = {{"Prepend", KI_NORM_PREPEND},
                 {"Replace", KI_NORM_REPLACE},
                 {"NFC", KI_NORM_NFC},
                 {"NFD", KI_NORM_NFD},
                 {"NFKC", KI_NORM_NFKC},
                 {"NFKD", KI_NORM_NFKD},
                 {"Lowercase", KI_NORM_LOWERCASE},
                 {"Strip", KI_NORM_STRIP},
                 {"StripAccents", KI_NORM_STRIP_ACCENTS},
                 {"ByteLevel", KI_NORM_ALPHABET}};
    size_t i = 0, n = sizeof kinds / sizeof *kinds;
    while (i < n && strcmp(kinds[i].type, type)) i++;
    if (i == n) return unknown("normalizer", type, err);
    norm->kind = kinds[i].kind;
    if (norm->kind == KI_NORM_PREPEND)
        return keep(&norm->content, v, ki_json_text(node, "prepend"), err);
    if (norm->kind == KI_NORM_REPLACE) {
        KI_TRY(keep(&norm->content, v, ki_json_text(node, "content"), err));
        return compile(&norm->pattern, v, json_object_get(node, "pattern"), "Replace", err);
    }
    norm->left = ki_json_flag(node, "strip_left", true);
    norm->right = ki_json_flag(node, "strip_right", true);
    if (norm->kind == KI_NORM_ALPHABET) v->pipeline->is_byte_level = true;
    return KIVI_OK;
}

static kivi_status add_norm(ki_vocab *v, const json_t *node, const char *type, kivi_error *err) {
    ki_pipeline *p = v->pipeline;
    if (p->n_norms == KI_MAX_ROOM) return ki_json_wrong("normalizer", "is too long a list", err);
    return fill_norm(v, &p->norms[p->n_norms++], node, type, err);
}

/* ---- pre-tokenizers ---- */

static kivi_status new_cut(ki_cut **out, ki_vocab *v, ki_cut_kind kind, kivi_error *err) {
    ki_pipeline *p = v->pipeline;
    if (p->n_cuts == KI_MAX_ROOM) return ki_json_wrong("pre_tokenizer", "is too long a list", err);
    *out = &p->cuts[p->n_cuts++];
    (*out)->kind = kind;
    return KIVI_OK;
}

static kivi_status add_split(ki_vocab *v, const char *pattern, bool is_literal,
                             ki_behavior behavior, bool inverted, kivi_error *err) {
    ki_cut *cut = NULL;
    KI_TRY(new_cut(&cut, v, KI_CUT_SPLIT, err));
    cut->behavior = behavior;
    cut->inverted = inverted;
    ki_span text = {pattern, strlen(pattern)};
    return ki_regex_compile(&cut->pattern, v->pipeline, text, is_literal, err);
}

static kivi_status read_behavior(ki_behavior *out, const json_t *node, kivi_error *err) {
    static const char *const names[] = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious",
                                        "MergedWithNext"};
    const char *name = json_string_value(json_object_get(node, "behavior"));
    if (!name) name = "Isolated";
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(names[i], name)) {
            *out = (ki_behavior)i;
            return KIVI_OK;
        }
    return unknown("split behavior", name, err);
}

static kivi_status add_pattern(ki_vocab *v, const json_t *node, kivi_error *err) {
    ki_cut *cut = NULL;
    KI_TRY(new_cut(&cut, v, KI_CUT_SPLIT, err));
    KI_TRY(read_behavior(&cut->behavior, node, err));
    cut->inverted = ki_json_flag(node, "invert", false);
    return compile(&cut->pattern, v, json_object_get(node, "pattern"), "Split", err);
}

static kivi_status add_byte_level(ki_vocab *v, const json_t *node, kivi_error *err) {
    ki_cut *cut = NULL;
    v->pipeline->is_byte_level = true;
    if (ki_json_flag(node, "add_prefix_space", true))
        KI_TRY(new_cut(&cut, v, KI_CUT_SPACE_BEFORE, err));
    if (ki_json_flag(node, "use_regex", true))
        KI_TRY(add_split(v, ki_regex_gpt2, false, KI_CUT_ISOLATED, false, err));
    return new_cut(&cut, v, KI_CUT_ALPHABET, err);
}

static kivi_status read_scheme(ki_scheme *out, const json_t *node, kivi_error *err) {
    const char *name = json_string_value(json_object_get(node, "prepend_scheme"));
    /* Files from before prepend_scheme say add_prefix_space. */
    *out = ki_json_flag(node, "add_prefix_space", true) ? KI_PREPEND_ALWAYS : KI_PREPEND_NEVER;
    if (!name) return KIVI_OK;
    if (!strcmp(name, "always")) *out = KI_PREPEND_ALWAYS;
    else if (!strcmp(name, "first")) *out = KI_PREPEND_FIRST;
    else if (!strcmp(name, "never")) *out = KI_PREPEND_NEVER;
    else return unknown("prepend_scheme", name, err);
    return KIVI_OK;
}

static kivi_status add_metaspace(ki_vocab *v, const json_t *node, kivi_error *err) {
    ki_cut *cut = NULL;
    const char *mark = json_string_value(json_object_get(node, "replacement"));
    if (!mark || !*mark) mark = "\xe2\x96\x81";
    KI_TRY(new_cut(&cut, v, KI_CUT_METASPACE, err));
    KI_TRY(keep(&cut->content, v, (ki_span){mark, strlen(mark)}, err));
    KI_TRY(read_scheme(&cut->scheme, node, err));
    if (!ki_json_flag(node, "split", true)) return KIVI_OK;
    return add_split(v, mark, true, KI_CUT_WITH_NEXT, false, err);
}

static kivi_status add_punctuation(ki_vocab *v, const json_t *node, kivi_error *err) {
    ki_behavior behavior;
    KI_TRY(read_behavior(&behavior, node, err));
    return add_split(v, "[\\p{P}$+<=>^`|~]", false, behavior, false, err);
}

static kivi_status add_delimiter(ki_vocab *v, const json_t *node, kivi_error *err) {
    const char *mark = json_string_value(json_object_get(node, "delimiter"));
    if (!mark || !*mark) return ki_json_wrong("CharDelimiterSplit", "has no delimiter", err);
    return add_split(v, mark, true, KI_CUT_REMOVED, false, err);
}

static kivi_status add_cut(ki_vocab *v, const json_t *node, const char *type, kivi_error *err) {
    if (!strcmp(type, "ByteLevel")) return add_byte_level(v, node, err);
    if (!strcmp(type, "Split")) return add_pattern(v, node, err);
    if (!strcmp(type, "Metaspace")) return add_metaspace(v, node, err);
    if (!strcmp(type, "Punctuation")) return add_punctuation(v, node, err);
    if (!strcmp(type, "CharDelimiterSplit")) return add_delimiter(v, node, err);
    if (!strcmp(type, "WhitespaceSplit"))
        return add_split(v, "\\s", false, KI_CUT_REMOVED, false, err);
    if (!strcmp(type, "Whitespace"))
        return add_split(v, ki_regex_word, false, KI_CUT_REMOVED, true, err);
    if (strcmp(type, "Digits")) return unknown("pre_tokenizer", type, err);
    bool alone = ki_json_flag(node, "individual_digits", false);
    return add_split(v, "\\p{N}", false, alone ? KI_CUT_ISOLATED : KI_CUT_CONTIGUOUS, false, err);
}

/* ---- post-processor ---- */

static kivi_status put_end(ki_vocab *v, bool is_front, int64_t id, kivi_error *err) {
    ki_pipeline *p = v->pipeline;
    size_t *n = is_front ? &p->n_front : &p->n_back;
    if (*n == KI_MAX_ROOM || id < 0 || id >= (int64_t)v->n_tokens)
        return ki_json_wrong("post_processor", "adds a token that is not there", err);
    (is_front ? p->front : p->back)[(*n)++] = (int32_t)id;
    return KIVI_OK;
}

static kivi_status put_template_token(ki_vocab *v, const json_t *node, const json_t *tokens,
                                      bool is_front, kivi_error *err) {
    const char *name = json_string_value(json_object_get(node, "id"));
    const json_t *ids = json_object_get(name ? json_object_get(tokens, name) : NULL, "ids");
    if (!json_is_array(ids)) return ki_json_wrong("TemplateProcessing", "names no token", err);
    for (size_t i = 0; i < json_array_size(ids); i++)
        KI_TRY(put_end(v, is_front, json_integer_value(json_array_get(ids, i)), err));
    return KIVI_OK;
}

static kivi_status add_template(ki_vocab *v, const json_t *node, kivi_error *err) {
    const json_t *single = json_object_get(node, "single");
    const json_t *tokens = json_object_get(node, "special_tokens");
    bool is_front = true;
    if (!json_is_array(single)) return ki_json_wrong("TemplateProcessing", "has no single", err);
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *piece = json_array_get(single, i);
        const json_t *token = json_object_get(piece, "SpecialToken");
        if (token) KI_TRY(put_template_token(v, token, tokens, is_front, err));
        else is_front = false;
    }
    return KIVI_OK;
}

/* ["</s>", 2] */
static int64_t pair_id(const json_t *node, const char *key) {
    const json_t *pair = json_object_get(node, key), *id = json_array_get(pair, 1);
    return json_is_integer(id) ? json_integer_value(id) : -1;
}

static kivi_status add_post(ki_vocab *v, const json_t *node, const char *type, kivi_error *err) {
    if (!strcmp(type, "ByteLevel")) return KIVI_OK; /* offsets only */
    if (!strcmp(type, "TemplateProcessing")) return add_template(v, node, err);
    if (strcmp(type, "RobertaProcessing") && strcmp(type, "BertProcessing"))
        return unknown("post_processor", type, err);
    KI_TRY(put_end(v, true, pair_id(node, "cls"), err));
    return put_end(v, false, pair_id(node, "sep"), err);
}

/* ---- decoders ---- */

static kivi_status new_decode(ki_decode **out, ki_vocab *v, ki_decode_kind kind, kivi_error *err) {
    ki_pipeline *p = v->pipeline;
    if (p->n_decodes == KI_MAX_ROOM) return ki_json_wrong("decoder", "is too long a list", err);
    *out = &p->decodes[p->n_decodes++];
    (*out)->kind = kind;
    return KIVI_OK;
}

static kivi_status add_replace(ki_vocab *v, ki_span pattern, ki_span content, kivi_error *err) {
    ki_decode *d = NULL;
    KI_TRY(new_decode(&d, v, KI_DECODE_REPLACE, err));
    KI_TRY(keep(&d->pattern, v, pattern, err));
    return keep(&d->content, v, content, err);
}

/* Fuse joins tokens and Strip then takes the space off a whole text's beginning: neither is about a
 * single token, and the bytes of a token are all that is asked here. */
static kivi_status add_decode(ki_vocab *v, const json_t *node, const char *type, kivi_error *err) {
    ki_decode *d = NULL;
    if (!strcmp(type, "Fuse") || !strcmp(type, "Strip")) return KIVI_OK;
    if (!strcmp(type, "ByteLevel")) return new_decode(&d, v, KI_DECODE_ALPHABET, err);
    if (!strcmp(type, "ByteFallback")) return new_decode(&d, v, KI_DECODE_BYTES, err);
    if (!strcmp(type, "Metaspace")) {
        ki_span mark = ki_json_text(node, "replacement");
        if (!mark.n_bytes) mark = (ki_span){"\xe2\x96\x81", 3};
        return add_replace(v, mark, (ki_span){" ", 1}, err);
    }
    if (strcmp(type, "Replace")) return unknown("decoder", type, err);
    ki_span pattern = ki_json_text(json_object_get(node, "pattern"), "String");
    if (!pattern.n_bytes) return unknown("decoder", "Replace with a regular expression", err);
    return add_replace(v, pattern, ki_json_text(node, "content"), err);
}

kivi_status ki_rooms_fill(ki_vocab *vocab, const json_t *root, kivi_error *err) {
    const json_t *norm = json_object_get(root, "normalizer");
    const json_t *cut = json_object_get(root, "pre_tokenizer");
    const json_t *post = json_object_get(root, "post_processor");
    const json_t *decode = json_object_get(root, "decoder");
    KI_TRY(walk(vocab, norm, "normalizer", "normalizers", 0, add_norm, err));
    KI_TRY(walk(vocab, cut, "pre_tokenizer", "pretokenizers", 0, add_cut, err));
    KI_TRY(walk(vocab, post, "post_processor", "processors", 0, add_post, err));
    return walk(vocab, decode, "decoder", "decoders", 0, add_decode, err);
}
