/* vocab.c: vocabularies from files. */
#include "vocab.h"

#include <stdio.h>
#include <sys/stat.h>

#include <jansson.h>

enum { MAX_JSON_BYTES = 256 << 20, MAX_SETTINGS_BYTES = 32 << 20 };

/* ---- GGUF ---- */

/* What a GGUF file holds of its vocabulary, lent or allocated until it is copied. */
typedef struct vocab_source {
    ki_str *tokens, *merges;
    int32_t *types;
    float *scores;
    size_t n_tokens, n_merges, n_types, n_scores;
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

static kivi_status check_count(const ki_file *file, const char *what, size_t n, size_t n_tokens,
                               kivi_error *err) {
    if (n == n_tokens) return KIVI_OK;
    return KI_FAIL(err, FORMAT, "%s: %zu %s beside %zu tokens", ki_file_path(file), n, what,
                   n_tokens);
}

static kivi_status read_source(vocab_source *v, const ki_file *file, kivi_error *err) {
    bool found;
    KI_TRY(read_name(v->model, sizeof v->model, file, "tokenizer.ggml.model", err));
    KI_TRY(read_name(v->pre, sizeof v->pre, file, "tokenizer.ggml.pre", err));
    if (!v->pre[0]) snprintf(v->pre, sizeof v->pre, "default");
    KI_TRY(ki_file_str_array(&v->tokens, &v->n_tokens, &found, file, "tokenizer.ggml.tokens", err));
    KI_TRY(ki_file_str_array(&v->merges, &v->n_merges, &found, file, "tokenizer.ggml.merges", err));
    KI_TRY(
        ki_file_int_array(&v->types, &v->n_types, &found, file, "tokenizer.ggml.token_type", err));
    if (v->types) KI_TRY(check_count(file, "token types", v->n_types, v->n_tokens, err));
    KI_TRY(ki_file_f32_array(&v->scores, &v->n_scores, &found, file, "tokenizer.ggml.scores", err));
    return v->scores ? check_count(file, "scores", v->n_scores, v->n_tokens, err) : KIVI_OK;
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

/* Files of before these keys mean what their model was then always used with. */
static kivi_status read_flags(ki_vocab_spec *spec, const ki_file *file, kivi_error *err) {
    bool found;
    spec->space_prefix = !strcmp(spec->model, "llama");
    spec->add_bos = ki_vocab_adds_bos(spec->model, spec->pre) && spec->bos_id >= 0;
    KI_TRY(ki_file_bool(&spec->add_bos, &found, file, "tokenizer.ggml.add_bos_token", err));
    KI_TRY(ki_file_bool(&spec->add_eos, &found, file, "tokenizer.ggml.add_eos_token", err));
    KI_TRY(ki_file_bool(&spec->space_prefix, &found, file, "tokenizer.ggml.add_space_prefix", err));
    return ki_file_bool(&spec->trims_spaces, &found, file,
                        "tokenizer.ggml.remove_extra_whitespaces", err);
}

/* ---- the ends of an answer ---- */

static void add_end(kivi_vocab *v, int64_t id) {
    if (id < 0 || id >= (int64_t)ki_vocab_size(v->tables) || v->n_ends == KI_MAX_ENDS) return;
    for (uint32_t i = 0; i < v->n_ends; i++)
        if (v->ends[i] == id) return;
    v->ends[v->n_ends++] = (int32_t)id;
}

/* The model's own end, and what the known chat formats end a turn with: a vocabulary that has such
 * a token was made for that. */
static void add_known_ends(kivi_vocab *v) {
    static const char *const known[] = {"<|im_end|>",     "<|eot_id|>",    "<|end|>",
                                        "<end_of_turn>",  "<|endoftext|>", "<|eom_id|>",
                                        "<|end_of_text|>"};
    add_end(v, v->eos_id);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        add_end(v, ki_vocab_find(v->tables, (ki_span){known[i], strlen(known[i])}));
}

static kivi_status read_ends(kivi_vocab *v, const ki_file *file, kivi_error *err) {
    static const char *const keys[] = {"tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int64_t id = -1;
        KI_TRY(read_id(&id, file, keys[i], ki_vocab_size(v->tables), err));
        add_end(v, id);
    }
    add_known_ends(v);
    return KIVI_OK;
}

static kivi_status make_tables(kivi_vocab *out, const vocab_source *v, const ki_file *file,
                               kivi_error *err) {
    _Static_assert(sizeof(ki_str) == sizeof(ki_span), "both are a pointer and a length");
    ki_vocab_spec spec = {.model = v->model,
                          .pre = v->pre,
                          .n_tokens = v->n_tokens,
                          .types = v->types,
                          .scores = v->scores,
                          .n_merges = v->n_merges};
    spec.tokens = (const ki_span *)(const void *)v->tokens;
    spec.merges = (const ki_span *)(const void *)v->merges;
    KI_TRY(read_id(&spec.bos_id, file, "tokenizer.ggml.bos_token_id", v->n_tokens, err));
    KI_TRY(read_id(&spec.eos_id, file, "tokenizer.ggml.eos_token_id", v->n_tokens, err));
    KI_TRY(read_id(&spec.unk_id, file, "tokenizer.ggml.unknown_token_id", v->n_tokens, err));
    KI_TRY(read_flags(&spec, file, err));
    out->bos_id = spec.bos_id;
    out->eos_id = spec.eos_id;
    out->adds_bos = spec.add_bos;
    KI_TRY(ki_vocab_create(&out->tables, out->mem, &spec, err));
    return read_ends(out, file, err);
}

static kivi_status keep_template(kivi_vocab *v, const char *bytes, size_t n_bytes,
                                 kivi_error *err) {
    void *copy;
    ki_free(v->mem, v->chat_template);
    v->chat_template = NULL;
    KI_TRY(ki_alloc(&copy, v->mem, KI_TAG_other, n_bytes + 1, err)); /* zeroed: terminated */
    if (n_bytes) memcpy(copy, bytes, n_bytes);
    v->chat_template = copy;
    return KIVI_OK;
}

static kivi_status load_gguf(kivi_vocab *out, const ki_file *file, kivi_error *err) {
    vocab_source v = {0};
    ki_str text = {0};
    bool found = false;
    if (ki_file_value_kind(file, "tokenizer.ggml.tokens") == KI_VALUE_NONE)
        return KI_FAIL(err, UNSUPPORTED, "%s: the file has no vocabulary", ki_file_path(file));
    kivi_status status = read_source(&v, file, err);
    if (status == KIVI_OK) status = make_tables(out, &v, file, err);
    if (status == KIVI_OK)
        status = ki_file_str(&text, &found, file, "tokenizer.chat_template", err);
    if (status == KIVI_OK && found) status = keep_template(out, text.bytes, text.n_bytes, err);
    ki_free(out->mem, v.tokens);
    ki_free(out->mem, v.merges);
    ki_free(out->mem, v.types);
    ki_free(out->mem, v.scores);
    return status;
}

/* ---- Hugging Face ---- */

/* Texts of a folder (or of a tokenizer.json alone) until the vocabulary is made. */
typedef struct folder_source {
    ki_folder_texts texts;
    json_t *config, *generation; /* tokenizer_config.json, generation_config.json */
} folder_source;

static kivi_status parse(json_t **out, const char *text, size_t n_bytes, const char *name,
                         kivi_error *err) {
    json_error_t bad;
    if (!n_bytes) return KIVI_OK;
    *out = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &bad);
    if (!*out) return KI_FAIL(err, FORMAT, "%s: %.120s, at byte %d", name, bad.text, bad.position);
    return KIVI_OK;
}

kivi_status ki_folder_read(ki_folder_texts *out, ki_mem *mem, const char *folder, kivi_error *err) {
    bool found;
    KI_TRY(ki_text_read(&out->tokenizer, &out->n_tokenizer, &found, mem, folder, "tokenizer.json",
                        MAX_JSON_BYTES, err));
    if (!found) return KI_FAIL(err, UNSUPPORTED, "%s: the folder has no tokenizer.json", folder);
    KI_TRY(ki_text_read(&out->settings, &out->n_settings, &found, mem, folder,
                        "tokenizer_config.json", MAX_SETTINGS_BYTES, err));
    KI_TRY(ki_text_read(&out->jinja, &out->n_jinja, &found, mem, folder, "chat_template.jinja",
                        MAX_SETTINGS_BYTES, err));
    return ki_text_read(&out->generation, &out->n_generation, &found, mem, folder,
                        "generation_config.json", MAX_SETTINGS_BYTES, err);
}

void ki_folder_free(ki_folder_texts *texts, ki_mem *mem) {
    ki_free(mem, texts->tokenizer);
    ki_free(mem, texts->settings);
    ki_free(mem, texts->jinja);
    ki_free(mem, texts->generation);
    *texts = (ki_folder_texts){0};
}

static kivi_status read_folder(folder_source *s, ki_mem *mem, const char *folder, kivi_error *err) {
    ki_folder_texts *t = &s->texts;
    KI_TRY(ki_folder_read(t, mem, folder, err));
    KI_TRY(parse(&s->config, t->settings, t->n_settings, "tokenizer_config.json", err));
    return parse(&s->generation, t->generation, t->n_generation, "generation_config.json", err);
}

/* "<s>", or {"content": "<s>", ...} */
static const char *token_name(const json_t *config, const char *key) {
    const json_t *token = json_object_get(config, key);
    if (json_is_object(token)) token = json_object_get(token, "content");
    return json_string_value(token);
}

/* The id of a token that tokenizer_config.json names; else config.json's, the first of a list. */
static int64_t find_id(const kivi_vocab *v, const json_t *config, const char *name, const char *key,
                       const ki_file *file) {
    const char *text = token_name(config, name);
    uint64_t value = 0;
    int32_t *list = NULL;
    size_t count = 0;
    bool found = false;
    if (text) return ki_vocab_find(v->tables, (ki_span){text, strlen(text)});
    if (!file) return -1;
    if (ki_file_value_kind(file, key) == KI_VALUE_ARRAY) {
        ki_file_int_array(&list, &count, &found, file, key, NULL);
        value = count ? (uint64_t)list[0] : 0;
        found = count > 0;
        ki_free(v->mem, list);
    } else if (ki_file_value_kind(file, key) == KI_VALUE_INT) {
        ki_file_u64(&value, &found, file, key, 0, INT32_MAX, NULL);
    }
    return found && value < ki_vocab_size(v->tables) ? (int64_t)value : -1;
}

static int flag_of(const json_t *config, const char *key) {
    const json_t *flag = json_object_get(config, key);
    return json_is_boolean(flag) ? json_is_true(flag) : -1;
}

/* chat_template: a string, or a list of {"name", "template"} where "default" counts. */
static kivi_status read_template(kivi_vocab *v, const folder_source *s, kivi_error *err) {
    const json_t *text = json_object_get(s->config, "chat_template");
    if (s->texts.jinja) return keep_template(v, s->texts.jinja, s->texts.n_jinja, err);
    for (size_t i = 0; json_is_array(text) && i < json_array_size(text); i++) {
        const json_t *item = json_array_get(text, i);
        const char *name = json_string_value(json_object_get(item, "name"));
        if (!name || strcmp(name, "default")) continue;
        text = json_object_get(item, "template");
        break;
    }
    if (!json_is_string(text)) return KIVI_OK;
    return keep_template(v, json_string_value(text), json_string_length(text), err);
}

/* A number, or a list of them. */
static void add_json_ends(kivi_vocab *v, const json_t *ids) {
    if (json_is_integer(ids)) add_end(v, json_integer_value(ids));
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        if (json_is_integer(id)) add_end(v, json_integer_value(id));
    }
}

static kivi_status read_folder_ends(kivi_vocab *v, const folder_source *s, const ki_file *file,
                                    kivi_error *err) {
    static const char *const key = "eos_token_id";
    int32_t *list = NULL;
    uint64_t id = 0;
    size_t n = 0;
    bool found = false;
    add_end(v, v->eos_id);
    add_json_ends(v, json_object_get(s->generation, key));
    if (file && ki_file_value_kind(file, key) == KI_VALUE_ARRAY)
        KI_TRY(ki_file_int_array(&list, &n, &found, file, key, err));
    for (size_t i = 0; i < n; i++) add_end(v, list[i]);
    if (file) ki_file_free(file, list);
    if (file && ki_file_value_kind(file, key) == KI_VALUE_INT)
        KI_TRY(ki_file_u64(&id, &found, file, key, 0, INT32_MAX, err));
    if (found && !n) add_end(v, (int64_t)id);
    add_known_ends(v);
    return KIVI_OK;
}

static kivi_status make_from_json(kivi_vocab *v, const folder_source *s, const ki_file *file,
                                  kivi_error *err) {
    KI_TRY(ki_vocab_create_json(&v->tables, v->mem, s->texts.tokenizer, s->texts.n_tokenizer, err));
    v->bos_id = find_id(v, s->config, "bos_token", "bos_token_id", file);
    v->eos_id = find_id(v, s->config, "eos_token", "eos_token_id", file);
    v->pad_id = find_id(v, s->config, "pad_token", "pad_token_id", file);
    ki_vocab_set_ends(v->tables, v->bos_id, flag_of(s->config, "add_bos_token"), v->eos_id,
                      flag_of(s->config, "add_eos_token"));
    v->adds_bos = ki_vocab_has_front(v->tables);
    KI_TRY(read_folder_ends(v, s, file, err));
    return read_template(v, s, err);
}

static void free_source(folder_source *s, ki_mem *mem) {
    json_decref(s->config);
    json_decref(s->generation);
    ki_folder_free(&s->texts, mem);
}

static kivi_status load_folder(kivi_vocab *v, const char *folder, const ki_file *file,
                               kivi_error *err) {
    folder_source s = {0};
    kivi_status status = read_folder(&s, v->mem, folder, err);
    if (status == KIVI_OK) status = make_from_json(v, &s, file, err);
    free_source(&s, v->mem);
    return status;
}

static kivi_status load_json(kivi_vocab *v, const char *path, kivi_error *err) {
    folder_source s = {0};
    bool found;
    kivi_status status = ki_text_read(&s.texts.tokenizer, &s.texts.n_tokenizer, &found, v->mem,
                                      NULL, path, MAX_JSON_BYTES, err);
    if (status == KIVI_OK && !found) status = KI_FAIL(err, IO, "%s: not there", path);
    if (status == KIVI_OK) status = make_from_json(v, &s, NULL, err);
    free_source(&s, v->mem);
    return status;
}

/* ---- the door ---- */

static kivi_status vocab_new(kivi_vocab **out, ki_mem *mem, kivi_error *err) {
    ki_mem first;
    void *p;
    *out = NULL;
    ki_mem_init(&first);
    KI_TRY(ki_alloc(&p, mem ? mem : &first, KI_TAG_other, sizeof(kivi_vocab), err));
    kivi_vocab *v = p;
    ki_mem_init(&v->own);
    v->owns_mem = !mem;
    v->mem = mem ? mem : &v->own;
    v->bos_id = v->eos_id = v->pad_id = -1;
    *out = v;
    return KIVI_OK;
}

kivi_status ki_vocab_load(kivi_vocab **out, ki_mem *mem, const ki_file *file, kivi_error *err) {
    KI_TRY(vocab_new(out, mem, err));
    kivi_status status = ki_file_kind_get(file) == KI_FILE_HF
                             ? load_folder(*out, ki_file_path(file), file, err)
                             : load_gguf(*out, file, err);
    if (status != KIVI_OK) kivi_vocab_destroy(out);
    return status;
}

static kivi_status open_gguf(kivi_vocab *v, const char *path, kivi_error *err) {
    ki_file *file = NULL;
    kivi_status status = ki_file_open(&file, v->mem, path, err);
    if (status == KIVI_OK) status = load_gguf(v, file, err);
    ki_file_close(&file);
    return status;
}

kivi_status kivi_vocab_open(kivi_vocab **out, const char *path, kivi_error *err) {
    struct stat info;
    size_t n = strlen(path);
    bool is_json = n > 5 && !strcmp(path + n - 5, ".json");
    bool is_folder = !stat(path, &info) && S_ISDIR(info.st_mode);
    KI_TRY(vocab_new(out, NULL, err));
    kivi_status status = is_folder ? load_folder(*out, path, NULL, err)
                         : is_json ? load_json(*out, path, err)
                                   : open_gguf(*out, path, err);
    if (status != KIVI_OK) kivi_vocab_destroy(out);
    return status;
}

void kivi_vocab_destroy(kivi_vocab **vocab) {
    kivi_vocab *v = *vocab;
    ki_mem last;
    if (!v) return;
    ki_vocab_destroy(&v->tables);
    ki_free(v->mem, v->chat_template);
    ki_mem_init(&last);
    ki_free(v->owns_mem ? &last : v->mem, v);
    *vocab = NULL;
}

size_t kivi_vocab_count(const kivi_vocab *vocab) { return ki_vocab_size(vocab->tables); }

kivi_status kivi_vocab_tokenize(const kivi_vocab *vocab, const char *text, size_t n_bytes,
                                unsigned flags, int32_t *ids, size_t max_ids, size_t *n_out,
                                kivi_error *err) {
    return ki_vocab_encode(vocab->tables, text, n_bytes, flags, ids, max_ids, n_out, err);
}

size_t kivi_vocab_bytes(const kivi_vocab *vocab, int32_t id, char *bytes, size_t max_bytes) {
    return ki_vocab_bytes(vocab->tables, id, bytes, max_bytes);
}

bool kivi_vocab_is_control(const kivi_vocab *vocab, int32_t id) {
    return ki_vocab_is_control(vocab->tables, id);
}

bool kivi_vocab_is_end(const kivi_vocab *vocab, int32_t id) {
    for (uint32_t i = 0; i < vocab->n_ends; i++)
        if (vocab->ends[i] == id) return true;
    return false;
}
