/* config.c: what a file says of its model, in either form, into one ki_config; checked as it is
 * read. */
#include "model.h"

#include <stdio.h>

/* Largest values taken from a file: far above any model, far below what could overflow a product.
 */
enum {
    MAX_LAYERS = 1024,
    MAX_HEADS = 1024,
    MAX_WIDTH = 1 << 20,
    MAX_VOCAB = 1 << 24,
    MAX_CTX = 1 << 28
};

/* A reader that stops at the first fault, so that the lists below stay flat. */
typedef struct reader {
    const ki_file *file;
    kivi_error *err;
    kivi_status status;
} reader;

static const char *path_of(const reader *r) { return ki_file_path(r->file); }

/* A whole number; missing: `fallback`, or a fault when that is 0. */
static uint32_t read_uint(reader *r, const char *key, uint32_t max, uint32_t fallback) {
    uint64_t value = fallback;
    bool found = false;
    if (r->status != KIVI_OK) return 0;
    r->status = ki_file_u64(&value, &found, r->file, key, 1, max, r->err);
    if (r->status == KIVI_OK && !found && !fallback)
        r->status =
            KI_FAIL(r->err, FORMAT, "%s: %s is missing, expected a whole number", path_of(r), key);
    return r->status == KIVI_OK ? (uint32_t)value : 0;
}

static double read_real(reader *r, const char *key, double fallback) {
    double value = fallback;
    bool found = false;
    if (r->status == KIVI_OK)
        r->status = ki_file_f64(&value, &found, r->file, key, 1e-30, 1e30, r->err);
    return value;
}

static bool read_bool(reader *r, const char *key, bool fallback) {
    bool value = fallback, found = false;
    if (r->status == KIVI_OK) r->status = ki_file_bool(&value, &found, r->file, key, r->err);
    return value;
}

/* A short text into out; missing or too long to be known: "". */
static void read_text(reader *r, char *out, size_t n_bytes, const char *key) {
    ki_str value = {0};
    bool found = false;
    out[0] = 0;
    if (r->status == KIVI_OK) r->status = ki_file_str(&value, &found, r->file, key, r->err);
    if (r->status != KIVI_OK || !found) return;
    snprintf(out, n_bytes, "%.*s", (int)KI_MIN(value.n_bytes, n_bytes - 1), value.bytes);
}

static void refuse(reader *r, const char *key, const char *found, const char *expected) {
    if (r->status == KIVI_OK)
        r->status = KI_FAIL(r->err, UNSUPPORTED, "%s: %s is '%s', not built yet; expected %s",
                            path_of(r), key, found, expected);
}

static void check_family(reader *r, const char *key, const char *name) {
    if (strcmp(name, "llama")) refuse(r, key, name, "llama");
}

/* ---- GGUF ---- */

static void gguf_rope(ki_config *c, reader *r) {
    char type[32];
    read_text(r, type, sizeof type, "llama.rope.scaling.type");
    c->rope_theta = read_real(r, "llama.rope.freq_base", 10000.0);
    c->rope_factor = read_real(r, "llama.rope.scaling.factor", 1.0);
    c->rope_interleaved = true;
    if (!strcmp(type, "linear")) c->rope_scaling = KI_ROPE_LINEAR;
    else if (type[0] && strcmp(type, "none"))
        refuse(r, "llama.rope.scaling.type", type, "none or linear");
    uint32_t dims =
        read_uint(r, "llama.rope.dimension_count", MAX_WIDTH, c->head_dim ? c->head_dim : 1);
    if (r->status == KIVI_OK && dims != c->head_dim)
        r->status = KI_FAIL(r->err, UNSUPPORTED,
                            "%s: llama.rope.dimension_count is %u, expected the head size %u",
                            path_of(r), dims, c->head_dim);
}

static void gguf_config(ki_config *c, reader *r) {
    read_text(r, c->architecture, sizeof c->architecture, "general.architecture");
    check_family(r, "general.architecture", c->architecture);
    c->n_layers = read_uint(r, "llama.block_count", MAX_LAYERS, 0);
    c->n_embd = read_uint(r, "llama.embedding_length", MAX_WIDTH, 0);
    c->n_ff = read_uint(r, "llama.feed_forward_length", MAX_WIDTH, 0);
    c->n_heads = read_uint(r, "llama.attention.head_count", MAX_HEADS, 0);
    c->n_kv_heads = read_uint(r, "llama.attention.head_count_kv", MAX_HEADS, c->n_heads);
    c->ctx_tokens = read_uint(r, "llama.context_length", MAX_CTX, 0);
    c->norm_eps = (float)read_real(r, "llama.attention.layer_norm_rms_epsilon", 1e-5);
    if (r->status == KIVI_OK)
        c->head_dim = read_uint(r, "llama.attention.key_length", MAX_WIDTH,
                                KI_MAX(c->n_embd / c->n_heads, 1u));
    uint32_t v_dim =
        read_uint(r, "llama.attention.value_length", MAX_WIDTH, c->head_dim ? c->head_dim : 1);
    if (r->status == KIVI_OK && v_dim != c->head_dim)
        r->status = KI_FAIL(r->err, UNSUPPORTED,
                            "%s: value heads of %u beside key heads of %u are not supported",
                            path_of(r), v_dim, c->head_dim);
    gguf_rope(c, r);
    const ki_tensor *embedding = ki_file_tensor(r->file, "token_embd.weight");
    if (r->status == KIVI_OK && !embedding)
        r->status = KI_FAIL(r->err, FORMAT, "%s: tensor token_embd.weight is missing", path_of(r));
    if (r->status == KIVI_OK && (embedding->dims[0] > MAX_VOCAB || embedding->n_dims != 2))
        r->status = KI_FAIL(
            r->err, FORMAT,
            "%s: token_embd.weight has %u dimensions and %llu rows, expected 2 and at "
            "most %d",
            path_of(r), embedding->n_dims, (unsigned long long)embedding->dims[0], MAX_VOCAB);
    if (r->status == KIVI_OK) c->n_vocab = (uint32_t)embedding->dims[0];
}

/* ---- Hugging Face ---- */

static void hf_rope_llama3(ki_config *c, reader *r, const char *prefix) {
    char key[96];
    c->rope_scaling = KI_ROPE_LLAMA3;
    snprintf(key, sizeof key, "%s.low_freq_factor", prefix);
    c->rope_low = read_real(r, key, 1.0);
    snprintf(key, sizeof key, "%s.high_freq_factor", prefix);
    c->rope_high = read_real(r, key, 4.0);
    snprintf(key, sizeof key, "%s.original_max_position_embeddings", prefix);
    c->rope_original_ctx = read_real(r, key, 8192.0);
    if (r->status == KIVI_OK && c->rope_high <= c->rope_low)
        r->status = KI_FAIL(r->err, FORMAT,
                            "%s: %s has high_freq_factor %g, expected more than low_freq_factor %g",
                            path_of(r), prefix, c->rope_high, c->rope_low);
}

/* The newer form nests everything in rope_parameters; the older one has rope_theta beside
 * rope_scaling, whose type was called `type` at first. */
static void hf_rope(ki_config *c, reader *r) {
    bool nested = ki_file_value_kind(r->file, "rope_parameters") == KI_VALUE_OBJECT;
    const char *prefix = nested ? "rope_parameters" : "rope_scaling";
    char type[32], key[96];
    snprintf(key, sizeof key, "%s.rope_type", prefix);
    read_text(r, type, sizeof type, key);
    if (!type[0]) {
        snprintf(key, sizeof key, "%s.type", prefix);
        read_text(r, type, sizeof type, key);
    }
    c->rope_theta = read_real(r, nested ? "rope_parameters.rope_theta" : "rope_theta", 10000.0);
    char factor[96];
    snprintf(factor, sizeof factor, "%s.factor", prefix);
    c->rope_factor = read_real(r, factor, 1.0);
    if (!strcmp(type, "linear")) c->rope_scaling = KI_ROPE_LINEAR;
    else if (!strcmp(type, "llama3")) hf_rope_llama3(c, r, prefix);
    else if (type[0] && strcmp(type, "default")) refuse(r, key, type, "default, linear or llama3");
}

static void hf_refusals(reader *r) {
    char act[32];
    read_text(r, act, sizeof act, "hidden_act");
    if (act[0] && strcmp(act, "silu")) refuse(r, "hidden_act", act, "silu");
    if (read_bool(r, "attention_bias", false)) refuse(r, "attention_bias", "true", "false");
    if (read_bool(r, "mlp_bias", false)) refuse(r, "mlp_bias", "true", "false");
    if (ki_file_value_kind(r->file, "sliding_window") == KI_VALUE_INT)
        refuse(r, "sliding_window", "set", "none");
    if (ki_file_value_kind(r->file, "quantization_config") == KI_VALUE_OBJECT)
        refuse(r, "quantization_config", "set", "none");
}

static void hf_config(ki_config *c, reader *r) {
    read_text(r, c->architecture, sizeof c->architecture, "model_type");
    check_family(r, "model_type", c->architecture);
    c->n_layers = read_uint(r, "num_hidden_layers", MAX_LAYERS, 0);
    c->n_embd = read_uint(r, "hidden_size", MAX_WIDTH, 0);
    c->n_ff = read_uint(r, "intermediate_size", MAX_WIDTH, 0);
    c->n_heads = read_uint(r, "num_attention_heads", MAX_HEADS, 0);
    c->n_kv_heads = read_uint(r, "num_key_value_heads", MAX_HEADS, c->n_heads);
    c->ctx_tokens = read_uint(r, "max_position_embeddings", MAX_CTX, 2048);
    c->n_vocab = read_uint(r, "vocab_size", MAX_VOCAB, 0);
    c->norm_eps = (float)read_real(r, "rms_norm_eps", 1e-6);
    if (r->status == KIVI_OK)
        c->head_dim = read_uint(r, "head_dim", MAX_WIDTH, KI_MAX(c->n_embd / c->n_heads, 1u));
    c->tied_output = read_bool(r, "tie_word_embeddings", false);
    hf_rope(c, r);
    hf_refusals(r);
}

/* ---- both ---- */

static kivi_status check(const ki_config *c, const ki_file *file, kivi_error *err) {
    const char *path = ki_file_path(file);
    if (c->n_heads % c->n_kv_heads)
        return KI_FAIL(err, FORMAT, "%s: %u heads over %u KV heads, expected a multiple", path,
                       c->n_heads, c->n_kv_heads);
    if (c->head_dim % 16 || c->head_dim > KI_MAX_HEAD_DIM)
        return KI_FAIL(err, UNSUPPORTED, "%s: head size %u, expected a multiple of 16 up to %d",
                       path, c->head_dim, KI_MAX_HEAD_DIM);
    if (c->n_embd % 16 || c->n_ff % 16)
        return KI_FAIL(err, UNSUPPORTED, "%s: widths %u and %u, expected multiples of 16", path,
                       c->n_embd, c->n_ff);
    return KIVI_OK;
}

kivi_status ki_config_read(ki_config *out, const ki_file *file, kivi_error *err) {
    reader r = {.file = file, .err = err, .status = KIVI_OK};
    *out = (ki_config){.rope_factor = 1.0};
    if (ki_file_kind_get(file) == KI_FILE_GGUF) gguf_config(out, &r);
    else hf_config(out, &r);
    if (r.status != KIVI_OK) return r.status;
    return check(out, file, err);
}
