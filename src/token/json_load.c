/* json_load.c: a tokenizer.json to a vocabulary. The file may be hostile: its size, depth and
 * number of values are bounded before jansson builds it, and keys may not repeat. */
#include "json_load.h"

enum { MAX_BYTES = 256 << 20, MAX_DEPTH = 32, MAX_VALUES = 12000000, MAX_TOKENS = 1 << 22 };

ki_span ki_json_text(const json_t *object, const char *key) {
    const json_t *text = json_object_get(object, key);
    if (!json_is_string(text)) return (ki_span){0};
    return (ki_span){json_string_value(text), json_string_length(text)};
}

bool ki_json_flag(const json_t *object, const char *key, bool otherwise) {
    const json_t *flag = json_object_get(object, key);
    return json_is_boolean(flag) ? json_is_true(flag) : otherwise;
}

kivi_status ki_json_wrong(const char *where, const char *what, kivi_error *err) {
    return KI_FAIL(err, FORMAT, "tokenizer.json: %s %s", where, what);
}

/* One flat look at the text: jansson recurses, and takes some 100 bytes for each value. */
static kivi_status check_limits(const char *text, size_t n_bytes, kivi_error *err) {
    size_t depth = 0, n_values = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        if (text[i] == '"') {
            for (i++; i < n_bytes && text[i] != '"'; i++) i += text[i] == '\\';
        } else if (text[i] == '{' || text[i] == '[') {
            depth++;
            n_values++;
        } else if (text[i] == '}' || text[i] == ']') {
            depth -= depth > 0;
        } else if (text[i] == ',') {
            n_values++;
        }
        if (depth > MAX_DEPTH || n_values > MAX_VALUES)
            return KI_FAIL(err, FORMAT, "tokenizer.json: %s at byte %zu",
                           depth > MAX_DEPTH ? "nested too deep" : "too many values", i);
    }
    return KIVI_OK;
}

kivi_status ki_json_parse(json_t **out, const char *text, size_t n_bytes, kivi_error *err) {
    json_error_t bad;
    if (n_bytes > MAX_BYTES)
        return KI_FAIL(err, FORMAT, "tokenizer.json: %zu bytes, at most %d", n_bytes, MAX_BYTES);
    KI_TRY(check_limits(text, n_bytes, err));
    *out = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &bad);
    if (!*out && json_error_code(&bad) == json_error_out_of_memory)
        return KI_FAIL(err, NOMEM, "tokenizer.json: no memory for its %zu bytes", n_bytes);
    if (!*out)
        return KI_FAIL(err, FORMAT, "tokenizer.json: %.120s, at byte %d", bad.text, bad.position);
    return KIVI_OK;
}

/* ---- tokens ---- */

typedef struct table {
    ki_span *tokens; /* [n_tokens] lent by the JSON */
    int32_t *types;
    uint8_t *in_model;
    size_t n_tokens;
} table;

static kivi_status token_id(size_t *out, const json_t *value, const char *where, kivi_error *err) {
    json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    if (id < 0 || id >= MAX_TOKENS) return ki_json_wrong(where, "has an id outside its range", err);
    *out = (size_t)id;
    return KIVI_OK;
}

static kivi_status count_tokens(table *t, json_t *model, const json_t *added, kivi_error *err) {
    const char *key;
    json_t *value;
    size_t id = 0;
    json_object_foreach(model, key, value) {
        KI_TRY(token_id(&id, value, "vocab", err));
        t->n_tokens = KI_MAX(t->n_tokens, id + 1);
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *item = json_array_get(added, i);
        KI_TRY(token_id(&id, json_object_get(item, "id"), "added_tokens", err));
        t->n_tokens = KI_MAX(t->n_tokens, id + 1);
    }
    return t->n_tokens ? KIVI_OK : ki_json_wrong("vocab", "is empty", err);
}

static kivi_status fill_table(table *t, json_t *model, const json_t *added, kivi_error *err) {
    json_t *value;
    for (size_t i = 0; i < t->n_tokens; i++) t->types[i] = KI_TOKEN_UNUSED;
    for (void *it = json_object_iter(model); it; it = json_object_iter_next(model, it)) {
        value = json_object_iter_value(it);
        size_t id = (size_t)json_integer_value(value);
        if (t->in_model[id]) return KI_FAIL(err, FORMAT, "tokenizer.json: id %zu twice", id);
        t->tokens[id] = (ki_span){json_object_iter_key(it), json_object_iter_key_len(it)};
        t->types[id] = KI_TOKEN_NORMAL;
        t->in_model[id] = 1;
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *item = json_array_get(added, i);
        ki_span text = ki_json_text(item, "content");
        const json_t *known = text.bytes ? json_object_getn(model, text.bytes, text.n_bytes) : NULL;
        const json_t *place = known ? known : json_object_get(item, "id");
        size_t id = (size_t)json_integer_value(place);
        if (!text.n_bytes) return ki_json_wrong("added_tokens", "has one without content", err);
        if (t->types[id] != KI_TOKEN_UNUSED && !known) /* the model's, or one added before */
            return KI_FAIL(err, FORMAT, "tokenizer.json: added token %zu has another's id", id);
        t->tokens[id] = text;
        t->types[id] = ki_json_flag(item, "special", false) ? KI_TOKEN_CONTROL : KI_TOKEN_USER;
    }
    return KIVI_OK;
}

static kivi_status alloc(void *out, ki_mem *mem, size_t count, size_t item_bytes, kivi_error *err) {
    void *block;
    KI_TRY(ki_alloc_array(&block, mem, KI_TAG_other, count, item_bytes, err));
    memcpy(out, &block, sizeof block);
    return KIVI_OK;
}

static kivi_status make_table(table *t, ki_vocab *v, const json_t *root, kivi_error *err) {
    json_t *model = json_object_get(json_object_get(root, "model"), "vocab");
    const json_t *added = json_object_get(root, "added_tokens");
    if (!json_is_object(model)) return ki_json_wrong("model", "has no vocab", err);
    KI_TRY(count_tokens(t, model, added, err));
    KI_TRY(alloc(&t->tokens, v->mem, t->n_tokens, sizeof *t->tokens, err));
    KI_TRY(alloc(&t->types, v->mem, t->n_tokens, sizeof *t->types, err));
    KI_TRY(alloc(&t->in_model, v->mem, t->n_tokens, 1, err));
    KI_TRY(fill_table(t, model, added, err));
    v->n_tokens = t->n_tokens;
    ki_vocab_spec spec = {.tokens = t->tokens, .n_tokens = t->n_tokens, .types = t->types};
    KI_TRY(ki_vocab_fill(v, &spec, err));
    v->pipeline->in_model = t->in_model;
    t->in_model = NULL; /* the pipeline's now */
    return KIVI_OK;
}

/* ---- model ---- */

static kivi_status check_model(const json_t *model, kivi_error *err) {
    const char *type = json_string_value(json_object_get(model, "type"));
    static const char *const odd[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    if (!json_is_object(model)) return ki_json_wrong("model", "is not there", err);
    /* Files from before the type was written are told by their merges. */
    if (!type) type = json_object_get(model, "merges") ? "BPE" : "(none)";
    if (strcmp(type, "BPE"))
        return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: model \"%.60s\" is not supported", type);
    for (size_t i = 0; i < 2; i++)
        if (ki_json_text(model, odd[i]).n_bytes)
            return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: %s is not supported", odd[i]);
    const json_t *dropout = json_object_get(model, "dropout");
    if (dropout && !json_is_null(dropout) && json_number_value(dropout) > 0)
        return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: dropout is not supported");
    return KIVI_OK;
}

static kivi_status add_merge(ki_vocab *v, size_t index, const json_t *merge, kivi_error *err) {
    if (json_is_array(merge) && json_array_size(merge) == 2) {
        const json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
        if (json_is_string(a) && json_is_string(b))
            return ki_pipeline_add_merge(
                v, index, (ki_span){json_string_value(a), json_string_length(a)},
                (ki_span){json_string_value(b), json_string_length(b)}, err);
    }
    ki_span text = {json_string_value(merge), json_string_length(merge)};
    const char *space = text.bytes ? memchr(text.bytes, ' ', text.n_bytes) : NULL;
    if (!space || memchr(space + 1, ' ', (size_t)(text.bytes + text.n_bytes - space - 1)))
        return KI_FAIL(err, FORMAT, "tokenizer.json: merge %zu is not two parts", index);
    size_t n_left = (size_t)(space - text.bytes);
    return ki_pipeline_add_merge(v, index, (ki_span){text.bytes, n_left},
                                 (ki_span){space + 1, text.n_bytes - n_left - 1}, err);
}

static void index_bytes(ki_vocab *v) {
    if (!v->pipeline->is_byte_level) {
        ki_vocab_index_hex(v);
        return;
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        unsigned char spelled[2];
        uint32_t n = ki_alphabet_write(spelled, (unsigned char)byte);
        int32_t id = ki_vocab_find(v, (ki_span){(const char *)spelled, n});
        v->bytes[byte] = ki_vocab_is_control(v, id) ? -1 : id;
    }
}

static kivi_status make_model(ki_vocab *v, const json_t *model, kivi_error *err) {
    const json_t *merges = json_object_get(model, "merges");
    ki_span unk = ki_json_text(model, "unk_token");
    ki_pipeline *p = v->pipeline;
    p->fuses_unk = ki_json_flag(model, "fuse_unk", false);
    p->byte_fallback = ki_json_flag(model, "byte_fallback", false);
    p->whole_words = ki_json_flag(model, "ignore_merges", false);
    p->unk_id = unk.bytes ? ki_vocab_find(v, unk) : -1;
    if (unk.bytes && p->unk_id < 0) return ki_json_wrong("unk_token", "is no token", err);
    index_bytes(v);
    KI_TRY(ki_pairs_init(&v->pairs, v->mem, json_array_size(merges), err));
    KI_TRY(ki_joints_init(&v->joints, v->mem, err));
    for (size_t i = 0; i < json_array_size(merges); i++)
        KI_TRY(add_merge(v, i, json_array_get(merges, i), err));
    return KIVI_OK;
}

/* ---- added tokens ---- */

/* Control tokens are always looked for in the text as it came: only there is it known what is a
 * template's and what a user's. The others may ask for normalized text. */
static bool is_late(const json_t *item, bool is_control) {
    return !is_control && ki_json_flag(item, "normalized", true);
}

/* The text that a late token is looked for as: its spelling, normalized. */
static kivi_status late_text(ki_span *out, ki_vocab *v, ki_pass *run, ki_span text,
                             kivi_error *err) {
    ki_span normal;
    ki_buf *all = &v->pipeline->normalized_text;
    KI_TRY(ki_normalize(&normal, v->pipeline, run, text, err));
    size_t begin = all->n_bytes;
    KI_TRY(ki_buf_append(all, normal.bytes, normal.n_bytes, err));
    /* An offset for now: the buffer moves while it grows. */
    *out = (ki_span){(const char *)(uintptr_t)begin, normal.n_bytes};
    return KIVI_OK;
}

static kivi_status add_tokens(ki_vocab *v, ki_pass *run, const json_t *added, kivi_error *err) {
    ki_specials *late = &v->pipeline->normalized, *early = &v->specials;
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *item = json_array_get(added, i);
        ki_span text = ki_json_text(item, "content");
        int32_t id = ki_vocab_find(v, text);
        if (id < 0) return ki_json_wrong("added_tokens", "has one that is not there", err);
        ki_special s = {.id = id,
                        .text = ki_vocab_text(v, (size_t)id),
                        .is_control = ki_vocab_is_control(v, id),
                        .takes_left = ki_json_flag(item, "lstrip", false),
                        .takes_right = ki_json_flag(item, "rstrip", false),
                        .single_word = ki_json_flag(item, "single_word", false)};
        bool late_one = is_late(item, s.is_control);
        if (late_one) KI_TRY(late_text(&s.text, v, run, s.text, err));
        ki_specials *to = late_one ? late : early;
        if (s.text.n_bytes) to->items[to->n_items++] = s;
    }
    for (size_t i = 0; i < late->n_items; i++)
        late->items[i].text.bytes =
            (const char *)v->pipeline->normalized_text.data + (uintptr_t)late->items[i].text.bytes;
    ki_specials_sort(late);
    ki_specials_sort(early);
    return KIVI_OK;
}

static kivi_status make_added(ki_vocab *v, const json_t *root, kivi_error *err) {
    const json_t *added = json_object_get(root, "added_tokens");
    size_t n = json_array_size(added);
    KI_TRY(alloc(&v->specials.items, v->mem, n, sizeof(ki_special), err));
    KI_TRY(alloc(&v->pipeline->normalized.items, v->mem, n, sizeof(ki_special), err));
    ki_encoder e = {.vocab = v};
    kivi_status status = ki_pipeline_begin(&e, err);
    if (status == KIVI_OK) status = add_tokens(v, e.run, added, err);
    ki_pipeline_end(&e);
    return status;
}

/* ---- the door ---- */

static void set_end(int32_t *ids, size_t *n, int64_t id, int adds) {
    if (adds < 0) return;
    if (!adds || id < 0) *n = 0;
    else if (!*n) ids[(*n)++] = (int32_t)id;
}

void ki_vocab_set_ends(ki_vocab *vocab, int64_t bos_id, int add_bos, int64_t eos_id, int add_eos) {
    ki_pipeline *p = vocab->pipeline;
    set_end(p->front, &p->n_front, bos_id, add_bos);
    set_end(p->back, &p->n_back, eos_id, add_eos);
}

static kivi_status fill(ki_vocab *v, table *t, const json_t *root, kivi_error *err) {
    void *block;
    const json_t *model = json_object_get(root, "model");
    KI_TRY(check_model(model, err));
    KI_TRY(ki_alloc(&block, v->mem, KI_TAG_other, sizeof(ki_pipeline), err));
    v->pipeline = block;
    ki_buf_init(&v->pipeline->normalized_text, v->mem, UINT32_MAX);
    v->pipeline->unk_id = -1;
    KI_TRY(ki_regex_init(v->pipeline, v->mem, err));
    KI_TRY(make_table(t, v, root, err));
    KI_TRY(ki_rooms_fill(v, root, err));
    KI_TRY(make_model(v, model, err));
    KI_TRY(make_added(v, root, err));
    return ki_pipeline_decode_all(v, err);
}

kivi_status ki_vocab_create_json(ki_vocab **out, ki_mem *mem, const char *text, size_t n_bytes,
                                 kivi_error *err) {
    json_t *root = NULL;
    void *block;
    table t = {0};
    *out = NULL;
    KI_TRY(ki_alloc(&block, mem, KI_TAG_other, sizeof(ki_vocab), err));
    ki_vocab *vocab = block;
    vocab->mem = mem;
    vocab->kind = KI_VOCAB_PIPELINE;
    vocab->bos_id = vocab->eos_id = -1;
    kivi_status status = ki_json_parse(&root, text, n_bytes, err);
    if (status == KIVI_OK) status = fill(vocab, &t, root, err);
    json_decref(root);
    ki_free(mem, t.tokens);
    ki_free(mem, t.types);
    ki_free(mem, t.in_model);
    if (status != KIVI_OK) ki_vocab_destroy(&vocab);
    *out = vocab;
    return status;
}

bool ki_vocab_has_front(const ki_vocab *vocab) {
    return vocab->kind == KI_VOCAB_PIPELINE ? vocab->pipeline->n_front > 0 : vocab->bos_id >= 0;
}
