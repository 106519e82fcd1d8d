/* config.c: what a file says of its model, in either form, into one ki_config; checked as it is
 * read. */
#include "model_private.h"

#include <stdio.h>

/* ---- the reader ---- */

enum { KEY_BYTES = 128 };

/* The key in this file's form; NULL: it has none. */
static const char *key_of(char key[KEY_BYTES], const ki_reader *r, const char *gguf,
                          const char *hf) {
    if (!r->is_gguf) return hf;
    if (!gguf) return NULL;
    snprintf(key, KEY_BYTES, "%s.%s", r->prefix, gguf);
    return key;
}

uint32_t ki_read_uint(ki_reader *r, const char *gguf, const char *hf, uint32_t max,
                      uint32_t fallback) {
    char buffer[KEY_BYTES];
    const char *key = key_of(buffer, r, gguf, hf);
    uint64_t value = fallback;
    bool found = false;
    if (r->status != KIVI_OK || !key) return fallback;
    r->status = ki_file_u64(&value, &found, r->file, key, 1, max, r->err);
    if (r->status == KIVI_OK && !found && !fallback)
        r->status = KI_FAIL(r->err, FORMAT, "%s: key %s is missing, expected a whole number",
                            ki_file_label(r->file), key);
    return r->status == KIVI_OK ? (uint32_t)value : 0;
}

double ki_read_real(ki_reader *r, const char *gguf, const char *hf, double fallback) {
    char buffer[KEY_BYTES];
    const char *key = key_of(buffer, r, gguf, hf);
    double value = fallback;
    bool found = false;
    if (r->status == KIVI_OK && key)
        r->status = ki_file_f64(&value, &found, r->file, key, 1e-30, 1e30, r->err);
    return value;
}

bool ki_read_is_set(const ki_reader *r, const char *gguf, const char *hf) {
    char buffer[KEY_BYTES];
    const char *key = key_of(buffer, r, gguf, hf);
    kivi_error other = {0};
    uint64_t whole;
    double real;
    bool found = false;
    if (!key) return false;
    if (!ki_file_u64(&whole, &found, r->file, key, 0, 0, &other)) return false; /* missing, or 0 */
    return ki_file_f64(&real, &found, r->file, key, 0, 0, &other) != KIVI_OK;
}

bool ki_read_bool(ki_reader *r, const char *gguf, const char *hf, bool fallback) {
    char buffer[KEY_BYTES];
    const char *key = key_of(buffer, r, gguf, hf);
    bool value = fallback, found = false;
    if (r->status == KIVI_OK && key) r->status = ki_file_bool(&value, &found, r->file, key, r->err);
    return value;
}

/* Missing, or too long to be known: "", or what fits. */
void ki_read_text(ki_reader *r, char *out, size_t n_bytes, const char *gguf, const char *hf) {
    char buffer[KEY_BYTES];
    const char *key = key_of(buffer, r, gguf, hf);
    ki_str value = {0};
    bool found = false;
    out[0] = 0;
    if (r->status == KIVI_OK && key) r->status = ki_file_str(&value, &found, r->file, key, r->err);
    if (r->status != KIVI_OK || !found) return;
    snprintf(out, n_bytes, "%.*s", (int)KI_MIN(value.n_bytes, n_bytes - 1), value.bytes);
}

ki_value_kind ki_read_kind(ki_reader *r, const char *gguf, const char *hf) {
    char buffer[KEY_BYTES];
    const char *key = key_of(buffer, r, gguf, hf);
    return key ? ki_file_value_kind(r->file, key) : KI_VALUE_NONE;
}

void ki_refuse(ki_reader *r, const char *gguf, const char *hf, const char *found,
               const char *expected) {
    char buffer[KEY_BYTES];
    const char *key = key_of(buffer, r, gguf, hf);
    if (r->status == KIVI_OK)
        r->status =
            KI_FAIL(r->err, UNSUPPORTED, "%s: key %s is '%.40s', not built yet; expected %s",
                    ki_file_label(r->file), key ? key : "?", found, expected);
}

void ki_refuse_flag(ki_reader *r, const char *hf) {
    if (ki_read_bool(r, NULL, hf, false)) ki_refuse(r, NULL, hf, "true", "false");
}

/* ---- what most families have ---- */

/* A number, or in GGUF an array with one for each layer: all must be alike. */
static uint32_t read_kv_heads(ki_reader *r, const ki_config *c, const char *hf) {
    static const char *const gguf = "attention.head_count_kv";
    char key[KEY_BYTES];
    int32_t *each = NULL;
    size_t n = 0;
    bool found;
    if (!r->is_gguf || ki_read_kind(r, gguf, hf) != KI_VALUE_ARRAY)
        return ki_read_uint(r, gguf, hf, KI_MAX_HEADS, c->n_heads);
    if (r->status == KIVI_OK)
        r->status = ki_file_int_array(&each, &n, &found, r->file, key_of(key, r, gguf, hf), r->err);
    uint32_t first = n && each[0] > 0 ? (uint32_t)each[0] : 0;
    bool alike = n >= 1 && first >= 1 && first <= KI_MAX_HEADS;
    for (size_t i = 1; i < n; i++) alike = alike && each[i] == each[0];
    ki_file_free(r->file, each);
    if (!alike) ki_refuse(r, gguf, hf, "an array of different numbers", "the same in every layer");
    return first;
}

static void read_vocab_size(ki_config *c, ki_reader *r) {
    if (!r->is_gguf) {
        c->n_vocab = ki_read_uint(r, NULL, "vocab_size", KI_MAX_VOCAB, 0);
        return;
    }
    const ki_tensor *t = ki_file_tensor(r->file, "token_embd.weight");
    if (r->status != KIVI_OK) return;
    if (!t)
        r->status = KI_FAIL(r->err, FORMAT, "%s: tensor token_embd.weight is missing",
                            ki_file_label(r->file));
    else if (t->dims[0] > KI_MAX_VOCAB || t->n_dims != 2)
        r->status = KI_FAIL(r->err, FORMAT,
                            "%s: token_embd.weight has %u dimensions and %llu rows, expected 2 and "
                            "at most %d",
                            ki_file_label(r->file), t->n_dims, (unsigned long long)t->dims[0],
                            KI_MAX_VOCAB);
    else c->n_vocab = (uint32_t)t->dims[0];
}

static void read_head_dim(ki_config *c, ki_reader *r) {
    if (r->status != KIVI_OK) return;
    c->head_dim = ki_read_uint(r, "attention.key_length", "head_dim", KI_MAX_WIDTH,
                               KI_MAX(c->n_embd / c->n_heads, 1u));
    uint32_t v_dim = ki_read_uint(r, "attention.value_length", NULL, KI_MAX_WIDTH, c->head_dim);
    uint32_t turned = ki_read_uint(r, "rope.dimension_count", NULL, KI_MAX_WIDTH, c->head_dim);
    if (r->status == KIVI_OK && v_dim != c->head_dim)
        r->status = KI_FAIL(r->err, UNSUPPORTED,
                            "%s: value heads of %u beside key heads of %u are not supported",
                            ki_file_label(r->file), v_dim, c->head_dim);
    if (r->status == KIVI_OK && turned != c->head_dim)
        r->status = KI_FAIL(r->err, UNSUPPORTED,
                            "%s: key %s.rope.dimension_count is %u, expected the head size %u",
                            ki_file_label(r->file), r->prefix, turned, c->head_dim);
}

/* What a GGUF file may ask for of any architecture and no pass here does. A value that changes
 * nothing is none: 0, or 1 for a factor. */
static void refuse_beyond(ki_reader *r) {
    static const char *const factors[] = {"logit_scale", "residual_scale", "embedding_scale"},
                             *const others[] = {"attention.scale", "attn_logit_softcapping",
                                                "final_logit_softcapping",
                                                "attention.max_alibi_bias", "attention.clamp_kqv"};
    for (size_t i = 0; i < sizeof factors / sizeof *factors; i++)
        if (ki_read_is_set(r, factors[i], NULL) && ki_read_real(r, factors[i], NULL, 1) != 1)
            ki_refuse(r, factors[i], NULL, "set", "1");
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (ki_read_is_set(r, others[i], NULL)) ki_refuse(r, others[i], NULL, "set", "0");
    if (!ki_read_bool(r, "attention.causal", NULL, true))
        ki_refuse(r, "attention.causal", NULL, "false", "true");
}

void ki_config_sizes(ki_config *c, ki_reader *r, const ki_size_keys *keys) {
    refuse_beyond(r);
    c->n_layers = ki_read_uint(r, "block_count", keys->layers, KI_MAX_LAYERS, 0);
    c->n_embd = ki_read_uint(r, "embedding_length", "hidden_size", KI_MAX_WIDTH, 0);
    c->n_ff =
        ki_read_uint(r, "feed_forward_length", keys->ff, KI_MAX_WIDTH, keys->ff_times * c->n_embd);
    c->n_heads = ki_read_uint(r, "attention.head_count", keys->heads, KI_MAX_HEADS, 0);
    c->n_kv_heads = read_kv_heads(r, c, keys->kv_heads);
    c->ctx_tokens = ki_read_uint(r, "context_length", "max_position_embeddings", KI_MAX_CTX,
                                 r->is_gguf ? 0 : 2048);
    c->norm_eps =
        (float)ki_read_real(r, keys->gguf_eps, keys->eps, r->is_gguf ? 1e-5 : keys->eps_default);
    read_vocab_size(c, r);
    read_head_dim(c, r);
}

const ki_size_keys ki_usual_keys = {.layers = "num_hidden_layers",
                                    .heads = "num_attention_heads",
                                    .kv_heads = "num_key_value_heads",
                                    .ff = "intermediate_size",
                                    .gguf_eps = "attention.layer_norm_rms_epsilon",
                                    .eps = "rms_norm_eps",
                                    .eps_default = 1e-6};

bool ki_config_layer_types(ki_config *c, ki_reader *r) {
    ki_str *types = NULL;
    size_t n = 0;
    bool found = false;
    if (r->status == KIVI_OK && !r->is_gguf)
        r->status = ki_file_str_array(&types, &n, &found, r->file, "layer_types", r->err);
    if (r->status == KIVI_OK && found && n != c->n_layers)
        r->status = KI_FAIL(r->err, FORMAT, "%s: key layer_types has %zu items, expected %u",
                            ki_file_label(r->file), n, c->n_layers);
    for (size_t i = 0; i < n && r->status == KIVI_OK; i++) {
        static const char local[] = "sliding_attention", full[] = "full_attention";
        char shown[32];
        c->local[i] = types[i].n_bytes == sizeof local - 1 &&
                      !memcmp(types[i].bytes, local, sizeof local - 1);
        snprintf(shown, sizeof shown, "%.*s", (int)KI_MIN(types[i].n_bytes, (size_t)31),
                 types[i].bytes);
        if (!c->local[i] && strcmp(shown, full))
            ki_refuse(r, NULL, "layer_types", shown, "full_attention or sliding_attention");
    }
    ki_file_free(r->file, types);
    return found;
}

uint32_t ki_config_window(const ki_config *c) {
    for (uint32_t i = 0; i < c->n_layers; i++)
        if (!c->local[i]) return 0;
    return c->window;
}

/* ---- the whole ---- */

static kivi_status check(const ki_config *c, const ki_file *file, kivi_error *err) {
    const char *label = ki_file_label(file);
    if (c->n_heads % c->n_kv_heads)
        return KI_FAIL(err, FORMAT, "%s: %u heads over %u KV heads, expected a multiple", label,
                       c->n_heads, c->n_kv_heads);
    if (c->head_dim % 16 || c->head_dim > KI_MAX_HEAD_DIM)
        return KI_FAIL(err, UNSUPPORTED, "%s: head size %u, expected a multiple of 16 up to %d",
                       label, c->head_dim, KI_MAX_HEAD_DIM);
    if (c->n_embd % 16 || c->n_ff % 16)
        return KI_FAIL(err, UNSUPPORTED, "%s: widths %u and %u, expected multiples of 16", label,
                       c->n_embd, c->n_ff);
    return KIVI_OK;
}

static const ki_family *read_family(ki_config *c, ki_reader *r) {
    static const char *const gguf_key = "general.architecture", *const hf_key = "model_type";
    const char *key = r->is_gguf ? gguf_key : hf_key;
    char list[96];
    ki_str name = {0};
    bool found = false;
    r->status = ki_file_str(&name, &found, r->file, key, r->err);
    if (r->status != KIVI_OK) return NULL;
    snprintf(c->architecture, sizeof c->architecture, "%.*s",
             (int)KI_MIN(name.n_bytes, sizeof c->architecture - 1), found ? name.bytes : "");
    snprintf(r->prefix, sizeof r->prefix, "%s", c->architecture);
    const ki_family *family = ki_family_find(r->is_gguf, c->architecture);
    if (family) return family;
    ki_family_list(list, sizeof list, r->is_gguf);
    r->status =
        KI_FAIL(r->err, UNSUPPORTED, "%s: key %s is '%s', not built yet; expected one of %s",
                ki_file_label(r->file), key, c->architecture, list);
    return NULL;
}

kivi_status ki_config_read(ki_config *out, const ki_file *file, kivi_error *err) {
    ki_reader r = {.file = file, .is_gguf = ki_file_kind_get(file) == KI_FILE_GGUF, .err = err};
    *out = (ki_config){.embed_scale = 1, .query_scale = 1, .n_ropes = 1};
    out->family = read_family(out, &r);
    if (out->family) out->family->read(out, &r);
    if (r.status == KIVI_OK && ki_read_kind(&r, NULL, "quantization_config") == KI_VALUE_OBJECT)
        ki_refuse(&r, NULL, "quantization_config", "set", "none");
    if (r.status != KIVI_OK) return r.status;
    return check(out, file, err);
}
