/* export.c: from a folder to GGUF, the way of weights.c turned round. What llama.cpp's own
 * converter does to a model is done here: q and k rows of Llama pair (2j, 2j + 1), Falcon's fused
 * rows are put in the order q, k, v, Gemma's norms have their 1 added, and Llama 3's stretched
 * frequencies become a tensor of divisors. */
#include "export.h"

#include "model_private.h"

#include <math.h>
#include <stdio.h>

enum { CHUNK_BYTES = 1 << 20 }; /* rows in work at once; a row may be longer */

/* Where row r of a matrix in GGUF stands in the folder. */
typedef enum row_order { ROWS_AS_THEY_ARE, ROWS_PAIRED, ROWS_FUSED } row_order;

typedef struct item {
    char name[128];          /* in GGUF */
    const ki_tensor *tensor; /* NULL: the divisors of the frequencies */
    ki_dtype type;
    uint64_t n_rows, n_cols; /* n_rows 0: a vector */
    row_order order;
    float add, factor; /* of a vector: (x + add) factor */
} item;

struct ki_export {
    ki_mem *mem;
    const ki_file *file;
    ki_config config;
    const char *arch;
    ki_dtype type;
    item *items; /* [n_items] */
    size_t n_items, room;
    uint8_t *used; /* [n_tensors] of the folder */
    float divisors[KI_MAX_HEAD_DIM / 2];
    kivi_error *err; /* while it is made */
};

/* ---- what GGUF cannot say ---- */

static kivi_status refuse(const ki_export *e, const char *what) {
    return KI_FAIL(e->err, UNSUPPORTED, "%s: %s has no key in GGUF for %s", ki_file_label(e->file),
                   what, e->arch);
}

/* Every p-th layer is global: p; 0: no such p. */
static uint32_t window_period(const ki_config *c) {
    uint32_t period = 1;
    while (period <= c->n_layers && c->local[period - 1]) period++;
    for (uint32_t i = 0; i < c->n_layers; i++)
        if (c->local[i] != ((i + 1) % period != 0)) return 0;
    return period;
}

static bool is_llama(const ki_export *e) { return !strcmp(e->arch, "llama"); }
static bool is_gemma(const ki_export *e) { return e->config.post_norms; }

static kivi_status check_windows(const ki_export *e) {
    const ki_config *c = &e->config;
    bool any = false, all = true;
    for (uint32_t i = 0; i < c->n_layers && c->window; i++)
        any = any || c->local[i], all = all && c->local[i];
    if (!any) return KIVI_OK;
    if (is_gemma(e) && !window_period(c)) return refuse(e, "the order of local and global layers");
    if (!is_gemma(e) && !is_llama(e)) return refuse(e, "a sliding window");
    return is_gemma(e) || all ? KIVI_OK : refuse(e, "a window in some layers");
}

static kivi_status check_rope(const ki_export *e) {
    const ki_rope *rope = e->config.rope;
    if (rope->scaling == KI_ROPE_DYNAMIC) return refuse(e, "rope scaling 'dynamic'");
    if (rope->scaling == KI_ROPE_YARN && rope->keep_fractions)
        return refuse(e, "yarn with 'truncate' off");
    if (e->config.n_ropes > 1 && rope[1].scaling != KI_ROPE_NONE)
        return refuse(e, "rope scaling of local layers");
    return KIVI_OK;
}

/* ---- the list ---- */

static kivi_status new_item(item **out, ki_export *e) {
    if (e->n_items == e->room)
        return KI_FAIL(e->err, INTERNAL, "export: more than %zu tensors", e->room);
    *out = &e->items[e->n_items++];
    **out = (item){.factor = 1};
    return KIVI_OK;
}

/* The part's tensor of the folder, of that shape, taken note of. */
static kivi_status find(item *t, ki_export *e, enum ki_part part, uint32_t layer,
                        const char *suffix) {
    char name[128];
    uint32_t n_dims = t->n_rows ? 2 : 1;
    uint64_t dims[2] = {t->n_rows ? t->n_rows : t->n_cols, t->n_cols};
    ki_part_name(t->name, sizeof t->name, e->config.family, true, part, layer, suffix);
    ki_part_name(name, sizeof name, e->config.family, false, part, layer, suffix);
    KI_TRY(ki_file_tensor_shaped(&t->tensor, e->file, name, n_dims, dims, e->err));
    e->used[t->tensor - ki_file_tensor_at(e->file, 0)] = 1;
    return KIVI_OK;
}

static kivi_status add_vector(ki_export *e, enum ki_part part, uint32_t layer, const char *suffix,
                              uint32_t n, float add, float factor) {
    item *t = NULL;
    KI_TRY(new_item(&t, e));
    t->type = KI_F32;
    t->n_cols = n;
    t->add = add;
    t->factor = factor;
    return find(t, e, part, layer, suffix);
}

static kivi_status add_norm_of(ki_export *e, enum ki_part part, uint32_t layer, uint32_t n,
                               float factor) {
    const ki_config *c = &e->config;
    KI_TRY(add_vector(e, part, layer, ".weight", n, c->norm_plus_one ? 1 : 0, factor));
    return c->layer_norm ? add_vector(e, part, layer, ".bias", n, 0, 1) : KIVI_OK;
}

static kivi_status add_norm(ki_export *e, enum ki_part part, uint32_t layer) {
    return add_norm_of(e, part, layer, e->config.n_embd, 1);
}

static kivi_status add_matrix(ki_export *e, enum ki_part part, uint32_t layer, uint32_t n_rows,
                              uint32_t n_cols, row_order order) {
    item *t = NULL;
    KI_TRY(new_item(&t, e));
    t->type = e->type;
    /* As in llama.cpp, what makes the logits has more bits. */
    bool makes_logits = part == (e->config.tied_output ? KI_PART_EMBEDDING : KI_PART_OUTPUT);
    if (e->type == KI_Q4_0 && makes_logits) t->type = KI_Q8_0;
    t->n_rows = n_rows;
    t->n_cols = n_cols;
    t->order = order;
    KI_TRY(find(t, e, part, layer, ".weight"));
    if (n_cols % ki_dtype_block_elements(t->type))
        return KI_FAIL(e->err, UNSUPPORTED,
                       "%s: tensor %s: rows of %u elements, %s needs a multiple of %u; take "
                       "--type f16",
                       ki_file_path(e->file), t->tensor->name, n_cols, ki_dtype_name(t->type),
                       ki_dtype_block_elements(t->type));
    return KIVI_OK;
}

static kivi_status add_qkv(ki_export *e, uint32_t layer) {
    const ki_config *c = &e->config;
    uint32_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    row_order paired = is_llama(e) ? ROWS_PAIRED : ROWS_AS_THEY_ARE;
    if (c->fused_qkv) return add_matrix(e, KI_PART_QKV, layer, q + 2 * kv, c->n_embd, ROWS_FUSED);
    KI_TRY(add_matrix(e, KI_PART_Q, layer, q, c->n_embd, paired));
    KI_TRY(add_matrix(e, KI_PART_K, layer, kv, c->n_embd, paired));
    KI_TRY(add_matrix(e, KI_PART_V, layer, kv, c->n_embd, ROWS_AS_THEY_ARE));
    if (!c->qkv_bias) return KIVI_OK;
    KI_TRY(add_vector(e, KI_PART_Q, layer, ".bias", q, 0, 1));
    KI_TRY(add_vector(e, KI_PART_K, layer, ".bias", kv, 0, 1));
    return add_vector(e, KI_PART_V, layer, ".bias", kv, 0, 1);
}

/* Queries are scaled by a number that GGUF fixes for Gemma (llama.c, gemma_query_width); where the
 * folder's is another, the norm of the queries' heads carries the difference. */
static float query_factor(const ki_config *c) {
    double width = c->n_layers == 62 ? (double)c->n_embd / c->n_heads : c->head_dim;
    float fixed = (float)sqrt((double)c->head_dim / width);
    return fixed == c->query_scale ? 1.0f : c->query_scale / fixed;
}

static kivi_status add_norms(ki_export *e, uint32_t i) {
    const ki_config *c = &e->config;
    KI_TRY(add_norm(e, c->one_norm ? KI_PART_ONE_NORM : KI_PART_ATTN_NORM, i));
    if (!c->one_norm) KI_TRY(add_norm(e, KI_PART_FFN_NORM, i));
    if (c->post_norms) {
        KI_TRY(add_norm(e, KI_PART_POST_ATTN_NORM, i));
        KI_TRY(add_norm(e, KI_PART_POST_FFN_NORM, i));
    }
    if (!c->head_norms) return KIVI_OK;
    float factor = is_gemma(e) ? query_factor(c) : 1;
    KI_TRY(add_norm_of(e, KI_PART_Q_NORM, i, c->head_dim, factor));
    return add_norm_of(e, KI_PART_K_NORM, i, c->head_dim, 1);
}

static kivi_status add_layer(ki_export *e, uint32_t i) {
    const ki_config *c = &e->config;
    row_order plain = ROWS_AS_THEY_ARE;
    KI_TRY(add_norms(e, i));
    KI_TRY(add_qkv(e, i));
    KI_TRY(add_matrix(e, KI_PART_O, i, c->n_embd, c->n_heads * c->head_dim, plain));
    if (!c->no_gate) KI_TRY(add_matrix(e, KI_PART_GATE, i, c->n_ff, c->n_embd, plain));
    KI_TRY(add_matrix(e, KI_PART_UP, i, c->n_ff, c->n_embd, plain));
    return add_matrix(e, KI_PART_DOWN, i, c->n_embd, c->n_ff, plain);
}

/* The loader divides the plain frequency by the divisor. Of the float32 numbers around the quotient
 * that one is taken whose division gives the stretched frequency back to the bit, if there is one.
 */
static float divisor_of(float plain, float stretched) {
    float first = plain / stretched, d = first;
    for (int i = 0; i < 2; i++) d = nextafterf(d, 0);
    for (int i = 0; i < 5; i++, d = nextafterf(d, INFINITY))
        if (plain / d == stretched) return d;
    return first;
}

static kivi_status add_divisors(ki_export *e) {
    const ki_config *c = &e->config;
    float plain[KI_MAX_HEAD_DIM / 2], stretched[KI_MAX_HEAD_DIM / 2];
    ki_rope bare = {.theta = c->rope[0].theta, .factor = 1, .attention = 1};
    item *t = NULL;
    if (c->rope[0].scaling != KI_ROPE_LLAMA3) return KIVI_OK;
    ki_rope_frequencies(plain, &bare, c->head_dim, 0);
    ki_rope_frequencies(stretched, &c->rope[0], c->head_dim, 0);
    for (uint32_t j = 0; j < c->head_dim / 2; j++)
        e->divisors[j] = divisor_of(plain[j], stretched[j]);
    KI_TRY(new_item(&t, e));
    snprintf(t->name, sizeof t->name, "rope_freqs.weight");
    t->type = KI_F32;
    t->n_cols = c->head_dim / 2;
    return KIVI_OK;
}

static kivi_status check_used(const ki_export *e) {
    for (size_t i = 0; i < ki_file_n_tensors(e->file); i++) {
        const char *name = ki_file_tensor_at(e->file, i)->name;
        if (!e->used[i] && !ki_is_known_extra(name))
            return KI_FAIL(e->err, UNSUPPORTED, "%s: tensor %.80s is not one that %s has",
                           ki_file_path(e->file), name, e->config.architecture);
    }
    return KIVI_OK;
}

static kivi_status fill(ki_export *e) {
    enum { OF_A_LAYER = 16, OF_THE_MODEL = 8 }; /* most tensors */
    const ki_config *c = &e->config;
    row_order plain = ROWS_AS_THEY_ARE;
    void *p;
    KI_TRY(ki_config_read(&e->config, e->file, e->err));
    e->arch = c->family->gguf ? c->family->gguf : "llama"; /* Mistral */
    KI_TRY(check_windows(e));
    KI_TRY(check_rope(e));
    e->room = OF_THE_MODEL + (size_t)c->n_layers * OF_A_LAYER;
    KI_TRY(ki_alloc_array(&p, e->mem, KI_TAG_other, e->room, sizeof *e->items, e->err));
    e->items = p;
    KI_TRY(ki_alloc(&p, e->mem, KI_TAG_other, ki_file_n_tensors(e->file), e->err));
    e->used = p;
    KI_TRY(add_matrix(e, KI_PART_EMBEDDING, 0, c->n_vocab, c->n_embd, plain));
    if (!c->tied_output) KI_TRY(add_matrix(e, KI_PART_OUTPUT, 0, c->n_vocab, c->n_embd, plain));
    KI_TRY(add_norm(e, KI_PART_OUTPUT_NORM, 0));
    KI_TRY(add_divisors(e));
    for (uint32_t i = 0; i < c->n_layers; i++) KI_TRY(add_layer(e, i));
    return check_used(e);
}

kivi_status ki_export_create(ki_export **out, ki_mem *mem, const ki_file *file, ki_dtype type,
                             kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(ki_export), err));
    ki_export *e = p;
    e->mem = mem;
    e->file = file;
    e->type = type;
    e->err = err;
    kivi_status status = fill(e);
    if (status != KIVI_OK) ki_export_destroy(&e);
    *out = e;
    return status;
}

void ki_export_destroy(ki_export **out) {
    ki_export *e = *out;
    if (!e) return;
    ki_free(e->mem, e->items);
    ki_free(e->mem, e->used);
    ki_free(e->mem, e);
    *out = NULL;
}

const ki_config *ki_export_config(const ki_export *e) { return &e->config; }

/* ---- keys ---- */

typedef struct keys {
    ki_gguf_out *gguf;
    const char *arch;
    char text[96];
} keys;

static const char *key(keys *k, const char *leaf) {
    snprintf(k->text, sizeof k->text, "%s.%s", k->arch, leaf);
    return k->text;
}

static void put_text(ki_gguf_out *gguf, const char *name, const char *text) {
    ki_gguf_str(gguf, name, (ki_str){text, strlen(text)});
}

static void put_uint(keys *k, const char *leaf, uint32_t v) {
    ki_gguf_u32(k->gguf, key(k, leaf), v);
}
static void put_real(keys *k, const char *leaf, double v) {
    ki_gguf_f32(k->gguf, key(k, leaf), (float)v);
}

static void describe_sizes(keys *k, const ki_config *c) {
    put_uint(k, "block_count", c->n_layers);
    put_uint(k, "context_length", c->ctx_tokens);
    put_uint(k, "embedding_length", c->n_embd);
    put_uint(k, "feed_forward_length", c->n_ff);
    put_uint(k, "vocab_size", c->n_vocab);
    put_uint(k, "attention.head_count", c->n_heads);
    put_uint(k, "attention.head_count_kv", c->n_kv_heads);
    put_uint(k, "attention.key_length", c->head_dim);
    put_uint(k, "attention.value_length", c->head_dim);
    put_real(k, c->layer_norm ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon",
             (double)c->norm_eps);
}

static void describe_rope(keys *k, const ki_config *c) {
    const ki_rope *rope = c->rope;
    put_uint(k, "rope.dimension_count", c->head_dim);
    put_real(k, "rope.freq_base", rope->theta);
    if (c->n_ropes > 1) put_real(k, "rope.freq_base_swa", rope[1].theta);
    if (rope->scaling != KI_ROPE_LINEAR && rope->scaling != KI_ROPE_YARN) return;
    bool is_yarn = rope->scaling == KI_ROPE_YARN;
    put_text(k->gguf, key(k, "rope.scaling.type"), is_yarn ? "yarn" : "linear");
    put_real(k, "rope.scaling.factor", rope->factor);
    if (!is_yarn) return;
    /* A reader multiplies by what the factor implies. */
    double implied = rope->factor <= 1 ? 1.0 : 0.1 * log(rope->factor) + 1.0;
    put_uint(k, "rope.scaling.original_context_length", (uint32_t)rope->original_ctx);
    put_real(k, "rope.scaling.yarn_beta_slow", rope->low);
    put_real(k, "rope.scaling.yarn_beta_fast", rope->high);
    put_real(k, "rope.scaling.attn_factor", rope->attention / implied);
}

static void describe_window(keys *k, const ki_config *c) {
    bool any = false;
    for (uint32_t i = 0; i < c->n_layers && c->window; i++) any = any || c->local[i];
    if (!any) return;
    put_uint(k, "attention.sliding_window", c->window);
    if (c->post_norms) put_uint(k, "attention.sliding_window_pattern", window_period(c));
}

static void describe_file(const ki_export *e, ki_gguf_out *gguf) {
    const char *path = ki_file_path(e->file);
    size_t end = strlen(path), begin;
    while (end > 1 && path[end - 1] == '/') end--;
    for (begin = end; begin > 0 && path[begin - 1] != '/';) begin--;
    put_text(gguf, "general.architecture", e->arch);
    ki_gguf_str(gguf, "general.name", (ki_str){path + begin, end - begin});
    ki_gguf_u32(gguf, "general.file_type", e->type == KI_F16 ? 1 : e->type == KI_Q4_0 ? 2 : 7);
    if (e->type != KI_F16) ki_gguf_u32(gguf, "general.quantization_version", 2);
}

void ki_export_describe(const ki_export *e, ki_gguf_out *gguf) {
    keys k = {.gguf = gguf, .arch = e->arch};
    describe_file(e, gguf);
    describe_sizes(&k, &e->config);
    describe_rope(&k, &e->config);
    describe_window(&k, &e->config);
    if (e->config.fused_qkv) put_text(gguf, key(&k, "tensor_data_layout"), "jploski");
    for (size_t i = 0; i < e->n_items; i++) {
        const item *t = &e->items[i];
        uint64_t dims[2] = {t->n_rows ? t->n_rows : t->n_cols, t->n_cols};
        ki_gguf_tensor(gguf, t->name, t->type, t->n_rows ? 2 : 1, dims);
    }
}

/* ---- data ---- */

typedef struct work {
    const ki_export *e;
    ki_gguf_out *gguf;
    bool (*stop)(void *user);
    void *user;
    uint8_t *in, *out; /* [rows at once] of a row each; this tensor's */
    float *row;
} work;

static uint64_t source_row(const ki_config *c, row_order order, uint64_t row) {
    uint64_t head = row / c->head_dim, in_head = row % c->head_dim;
    uint64_t group = c->n_heads / c->n_kv_heads;
    if (order == ROWS_AS_THEY_ARE) return row;
    if (order == ROWS_PAIRED) /* (2j, 2j + 1) of (j, j + D/2) */
        return head * c->head_dim + in_head % 2 * (c->head_dim / 2) + in_head / 2;
    /* For each KV head its query heads, a key and a value head. */
    if (head < c->n_heads) head = head / group * (group + 2) + head % group;
    else {
        uint64_t of = head - c->n_heads, is_value = of >= c->n_kv_heads;
        head = (of - is_value * c->n_kv_heads) * (group + 2) + group + is_value;
    }
    return head * c->head_dim + in_head;
}

static kivi_status read_rows(const work *w, const item *t, uint64_t first, size_t n_rows,
                             size_t row_bytes) {
    if (t->order == ROWS_AS_THEY_ARE)
        return ki_file_read(w->in, w->e->file, t->tensor, first * row_bytes, n_rows * row_bytes,
                            w->gguf->err);
    for (size_t i = 0; i < n_rows; i++) {
        uint64_t at = source_row(&w->e->config, t->order, first + i);
        KI_TRY(ki_file_read(w->in + i * row_bytes, w->e->file, t->tensor, at * row_bytes, row_bytes,
                            w->gguf->err));
    }
    return KIVI_OK;
}

static kivi_status write_rows(const work *w, const item *t, uint64_t first, size_t n_rows,
                              size_t row_bytes, size_t out_bytes) {
    KI_TRY(read_rows(w, t, first, n_rows, row_bytes));
    for (size_t i = 0; i < n_rows; i++) {
        ki_row_to_f32(w->row, w->in + i * row_bytes, t->tensor->dtype, t->n_cols);
        for (size_t j = 0; !t->n_rows && j < t->n_cols; j++)
            w->row[j] = (w->row[j] + t->add) * t->factor;
        if (!ki_row_from_f32(w->out + i * out_bytes, t->type, w->row, t->n_cols))
            return KI_FAIL(w->gguf->err, UNSUPPORTED,
                           "%s: tensor %s, row %llu: a value is not finite, or too large for %s",
                           ki_file_path(w->e->file), t->tensor->name,
                           (unsigned long long)source_row(&w->e->config, t->order, first + i),
                           ki_dtype_name(t->type));
    }
    return ki_gguf_write(w->gguf, w->out, n_rows * out_bytes);
}

static kivi_status alloc_rows(work *w, const item *t, size_t n_at_once, size_t row_bytes,
                              size_t out_bytes) {
    void *p;
    KI_TRY(ki_alloc_array(&p, w->e->mem, KI_TAG_workspace, n_at_once, row_bytes, w->gguf->err));
    w->in = p;
    KI_TRY(ki_alloc_array(&p, w->e->mem, KI_TAG_workspace, n_at_once, out_bytes, w->gguf->err));
    w->out = p;
    KI_TRY(ki_alloc_array(&p, w->e->mem, KI_TAG_workspace, t->n_cols, sizeof(float), w->gguf->err));
    w->row = p;
    return KIVI_OK;
}

static kivi_status write_tensor(work *w, const item *t) {
    size_t n_rows = t->n_rows ? t->n_rows : 1, row_bytes = t->tensor->n_bytes / n_rows;
    size_t out_bytes = t->n_cols / ki_dtype_block_elements(t->type) * ki_dtype_block_bytes(t->type);
    size_t n_at_once = KI_MAX(CHUNK_BYTES / row_bytes, (size_t)1);
    kivi_status status = alloc_rows(w, t, KI_MIN(n_at_once, n_rows), row_bytes, out_bytes);
    for (size_t first = 0; first < n_rows && status == KIVI_OK; first += n_at_once) {
        if (w->stop && w->stop(w->user))
            status = KI_FAIL(w->gguf->err, CANCELLED, "%s: interrupted, nothing was written",
                             w->gguf->path);
        else
            status =
                write_rows(w, t, first, KI_MIN(n_at_once, n_rows - first), row_bytes, out_bytes);
    }
    ki_free(w->e->mem, w->in);
    ki_free(w->e->mem, w->out);
    ki_free(w->e->mem, w->row);
    w->in = w->out = NULL;
    w->row = NULL;
    return status;
}

kivi_status ki_export_write(const ki_export *e, ki_gguf_out *gguf, bool (*stop)(void *user),
                            void *user) {
    work w = {.e = e, .gguf = gguf, .stop = stop, .user = user};
    KI_TRY(ki_file_check_size(e->file, gguf->err));
    for (size_t i = 0; i < e->n_items; i++) {
        const item *t = &e->items[i];
        if (t->tensor) KI_TRY(write_tensor(&w, t));
        else KI_TRY(ki_gguf_write(gguf, e->divisors, t->n_cols * sizeof *e->divisors));
        KI_TRY(ki_gguf_end_tensor(gguf));
    }
    return ki_file_check_size(e->file, gguf->err);
}
