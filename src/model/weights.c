/* weights.c: a file's tensors become matrices in tiles of 16 rows (dense.h). Each tensor is read
 * once, spread over the workers, and its mapped pages are given back. */
#include "model.h"

#include <math.h>
#include <stdio.h>

typedef struct loader {
    ki_model *model;
    const ki_file *file;
    ki_workers *workers;
    ki_weight rope_type;
    kivi_error *err;
    uint64_t type_bytes[KI_DTYPE_COUNT];
} loader;

static ki_weight weight_of(ki_dtype dtype) {
    static const ki_weight map[KI_DTYPE_COUNT] = {
        [KI_F32] = KI_WEIGHT_F32,   [KI_F16] = KI_WEIGHT_F16,   [KI_BF16] = KI_WEIGHT_BF16,
        [KI_Q4_0] = KI_WEIGHT_Q4_0, [KI_Q4_1] = KI_WEIGHT_Q4_1, [KI_Q8_0] = KI_WEIGHT_Q8_0,
    };
    return map[dtype];
}

/* ---- vectors ---- */

static kivi_status load_vector(float **out, loader *l, const char *name, uint32_t n) {
    const ki_tensor *t;
    uint64_t dims[1] = {n};
    void *p;
    KI_TRY(ki_file_tensor_shaped(&t, l->file, name, 1, dims, l->err));
    if (ki_dtype_block_elements(t->dtype) != 1)
        return KI_FAIL(l->err, UNSUPPORTED, "%s: tensor %s is %s, expected F32, F16 or BF16",
                       ki_file_path(l->file), name, ki_dtype_name(t->dtype));
    KI_TRY(ki_alloc_array(&p, l->model->mem, KI_TAG_weights, n, sizeof(float), l->err));
    *out = p;
    for (uint32_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, t->data + (size_t)i * 2, t->dtype == KI_F32 ? 0 : 2);
        if (t->dtype == KI_F32) memcpy(&(*out)[i], t->data + (size_t)i * 4, 4);
        else (*out)[i] = t->dtype == KI_F16 ? ki_f16_to_f32(half) : ki_bf16_to_f32(half);
    }
    l->model->n_params += n;
    return KIVI_OK;
}

/* ---- matrices ---- */

typedef struct pack_call {
    ki_matrix *matrix;
    const uint8_t *rows;
    size_t row_bytes;
    uint32_t tiles_per_task, n_tiles;
    uint32_t head_dim; /* > 0: rows of a head pair (2j, 2j + 1) in the file and are put apart to (j,
                          j + D/2) */
} pack_call;

static uint32_t source_row(const pack_call *call, uint32_t row) {
    if (!call->head_dim) return row;
    uint32_t head = row / call->head_dim, in_head = row % call->head_dim, half = call->head_dim / 2;
    return head * call->head_dim + in_head % half * 2 + in_head / half;
}

static void pack_task(void *context, size_t index, unsigned worker) {
    const pack_call *call = context;
    (void)worker;
    uint32_t first = (uint32_t)index * call->tiles_per_task * KI_TILE_ROWS;
    uint32_t end = KI_MIN(first + call->tiles_per_task * KI_TILE_ROWS, call->matrix->n_rows);
    for (uint32_t r = first; r < end; r++)
        ki_matrix_pack_row(call->matrix, call->rows + source_row(call, r) * call->row_bytes, r);
}

static kivi_status load_matrix(ki_matrix *out, loader *l, const char *name, uint32_t n_rows,
                               uint32_t n_cols, uint32_t paired_head_dim) {
    const ki_tensor *t;
    uint64_t dims[2] = {n_rows, n_cols};
    size_t n_bytes;
    void *p;
    KI_TRY(ki_file_tensor_shaped(&t, l->file, name, 2, dims, l->err));
    *out = (ki_matrix){.type = weight_of(t->dtype), .n_rows = n_rows, .n_cols = n_cols};
    if (!ki_matrix_bytes(&n_bytes, out->type, n_rows, n_cols))
        return KI_FAIL(l->err, FORMAT, "%s: tensor %s is too large", ki_file_path(l->file), name);
    KI_TRY(ki_alloc(&p, l->model->mem, KI_TAG_weights, n_bytes, l->err));
    out->tiles = p;
    pack_call call = {.matrix = out,
                      .rows = t->data,
                      .row_bytes = t->n_bytes / n_rows,
                      .tiles_per_task = 16,
                      .n_tiles = (n_rows + KI_TILE_ROWS - 1) / KI_TILE_ROWS,
                      .head_dim = paired_head_dim};
    ki_workers_run(l->workers, pack_task, &call,
                   (call.n_tiles + call.tiles_per_task - 1) / call.tiles_per_task);
    ki_file_drop(l->file, t);
    l->type_bytes[t->dtype] += t->n_bytes;
    l->model->n_params += (uint64_t)n_rows * n_cols;
    return KIVI_OK;
}

static kivi_status load_part(ki_matrix *out, loader *l, enum ki_part part, uint32_t layer,
                             uint32_t n_rows, uint32_t n_cols, uint32_t paired_head_dim) {
    char name[96];
    ki_part_name(name, sizeof name, ki_file_kind_get(l->file), part, layer);
    return load_matrix(out, l, name, n_rows, n_cols, paired_head_dim);
}

static kivi_status load_norm(float **out, loader *l, enum ki_part part, uint32_t layer) {
    char name[96];
    ki_part_name(name, sizeof name, ki_file_kind_get(l->file), part, layer);
    return load_vector(out, l, name, l->model->config.n_embd);
}

static kivi_status load_layer(ki_layer *out, loader *l, uint32_t i) {
    const ki_config *c = &l->model->config;
    uint32_t q_dim = c->n_heads * c->head_dim, kv_dim = c->n_kv_heads * c->head_dim;
    uint32_t paired = c->rope_interleaved ? c->head_dim : 0;
    KI_TRY(load_norm(&out->attn_norm, l, KI_PART_ATTN_NORM, i));
    KI_TRY(load_norm(&out->ffn_norm, l, KI_PART_FFN_NORM, i));
    KI_TRY(load_part(&out->q, l, KI_PART_Q, i, q_dim, c->n_embd, paired));
    KI_TRY(load_part(&out->k, l, KI_PART_K, i, kv_dim, c->n_embd, paired));
    KI_TRY(load_part(&out->v, l, KI_PART_V, i, kv_dim, c->n_embd, 0));
    KI_TRY(load_part(&out->o, l, KI_PART_O, i, c->n_embd, q_dim, 0));
    KI_TRY(load_part(&out->gate, l, KI_PART_GATE, i, c->n_ff, c->n_embd, 0));
    KI_TRY(load_part(&out->up, l, KI_PART_UP, i, c->n_ff, c->n_embd, 0));
    return load_part(&out->down, l, KI_PART_DOWN, i, c->n_embd, c->n_ff, 0);
}

/* ---- rotary frequencies ---- */

/* Llama 3: long wavelengths are stretched by the factor, short ones stay, between the two a smooth
 * passage. */
static double llama3_freq(const ki_config *c, double freq) {
    double wavelength = 2 * 3.14159265358979323846 / freq;
    if (wavelength < c->rope_original_ctx / c->rope_high) return freq;
    if (wavelength > c->rope_original_ctx / c->rope_low) return freq / c->rope_factor;
    double smooth =
        (c->rope_original_ctx / wavelength - c->rope_low) / (c->rope_high - c->rope_low);
    return (1 - smooth) * freq / c->rope_factor + smooth * freq;
}

static float round_to(float x, ki_weight type) {
    if (type == KI_WEIGHT_F16) return ki_f16_to_f32(ki_f32_to_f16(x));
    if (type == KI_WEIGHT_BF16) return ki_bf16_to_f32(ki_f32_to_bf16(x));
    return x;
}

static kivi_status make_rope(loader *l) {
    ki_model *m = l->model;
    const ki_config *c = &m->config;
    uint32_t half = c->head_dim / 2;
    float *divisors = NULL; /* a GGUF file carries Llama 3's stretch as a tensor */
    void *p;
    if (ki_file_tensor(l->file, "rope_freqs.weight"))
        KI_TRY(load_vector(&divisors, l, "rope_freqs.weight", half));
    kivi_status status = ki_alloc_array(&p, m->mem, KI_TAG_weights, half, sizeof(float), l->err);
    m->rope_freq = p;
    for (uint32_t j = 0; status == KIVI_OK && j < half; j++) {
        double freq = 1.0 / pow(c->rope_theta, 2.0 * j / c->head_dim);
        if (c->rope_scaling == KI_ROPE_LINEAR) freq /= c->rope_factor;
        if (c->rope_scaling == KI_ROPE_LLAMA3) freq = llama3_freq(c, freq);
        m->rope_freq[j] =
            round_to((float)(divisors ? freq / (double)divisors[j] : freq), l->rope_type);
    }
    ki_free(m->mem, divisors);
    return status;
}

/* ---- the whole ---- */

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i++)
        hash = (hash ^ ((const uint8_t *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

uint64_t ki_model_fingerprint(const ki_model *m) {
    const ki_config *c = &m->config;
    uint32_t shape[] = {c->n_layers,   c->n_embd,   c->n_ff,   c->n_heads,
                        c->n_kv_heads, c->head_dim, c->n_vocab};
    uint64_t hash = hash_bytes(0xcbf29ce484222325u, shape, sizeof shape);
    for (uint32_t i = 0; i < c->n_layers;
         i++) { /* a few tiles of each layer tell fine-tunes apart */
        size_t n_bytes;
        if (ki_matrix_bytes(&n_bytes, m->layers[i].q.type, KI_TILE_ROWS, c->n_embd))
            hash = hash_bytes(hash, m->layers[i].q.tiles, KI_MIN(n_bytes, (size_t)1024));
        hash = hash_bytes(hash, m->layers[i].attn_norm, KI_MIN(c->n_embd, 64u) * sizeof(float));
    }
    return hash_bytes(hash, m->rope_freq, c->head_dim / 2 * sizeof(float));
}

static void name_weight_type(loader *l) {
    int most = 0;
    for (int i = 1; i < KI_DTYPE_COUNT; i++)
        if (l->type_bytes[i] > l->type_bytes[most]) most = i;
    snprintf(l->model->weight_type, sizeof l->model->weight_type, "%s",
             ki_dtype_name((ki_dtype)most));
}

static kivi_status load_output(loader *l) {
    ki_model *m = l->model;
    const ki_config *c = &m->config;
    char name[96];
    ki_part_name(name, sizeof name, ki_file_kind_get(l->file), KI_PART_OUTPUT, 0);
    bool present = ki_file_tensor(l->file, name) != NULL;
    if (ki_file_kind_get(l->file) == KI_FILE_GGUF)
        m->config.tied_output = !present; /* absent means tied */
    if (!m->config.tied_output) return load_matrix(&m->output, l, name, c->n_vocab, c->n_embd, 0);
    m->output = m->embedding;
    return KIVI_OK;
}

static kivi_status load_all(loader *l) {
    ki_model *m = l->model;
    void *p;
    KI_TRY(ki_config_read(&m->config, l->file, l->err));
    const ki_config *c = &m->config;
    KI_TRY(ki_alloc_array(&p, m->mem, KI_TAG_other, c->n_layers, sizeof(ki_layer), l->err));
    m->layers = p;
    KI_TRY(load_part(&m->embedding, l, KI_PART_EMBEDDING, 0, c->n_vocab, c->n_embd, 0));
    KI_TRY(load_output(l));
    KI_TRY(load_norm(&m->output_norm, l, KI_PART_OUTPUT_NORM, 0));
    for (uint32_t i = 0; i < c->n_layers; i++) KI_TRY(load_layer(&m->layers[i], l, i));
    name_weight_type(l);
    return make_rope(l);
}

kivi_status ki_model_load(ki_model **out, ki_mem *mem, const ki_file *file, ki_workers *workers,
                          ki_weight rope_type, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(ki_model), err));
    loader l = {.model = p, .file = file, .workers = workers, .rope_type = rope_type, .err = err};
    l.model->mem = mem;
    kivi_status status = ki_file_check_size(file, err);
    if (status == KIVI_OK) status = load_all(&l);
    if (status == KIVI_OK) status = ki_file_check_size(file, err);
    if (status != KIVI_OK) ki_model_destroy(&l.model);
    *out = l.model;
    return status;
}

void ki_model_destroy(ki_model **model) {
    ki_model *m = *model;
    if (!m) return;
    for (uint32_t i = 0; m->layers && i < m->config.n_layers; i++) {
        ki_layer *y = &m->layers[i];
        void *parts[] = {y->attn_norm, y->ffn_norm,   y->q.tiles,  y->k.tiles,   y->v.tiles,
                         y->o.tiles,   y->gate.tiles, y->up.tiles, y->down.tiles};
        for (size_t j = 0; j < sizeof parts / sizeof *parts; j++) ki_free(m->mem, parts[j]);
    }
    if (m->output.tiles != m->embedding.tiles) ki_free(m->mem, m->output.tiles);
    ki_free(m->mem, m->embedding.tiles);
    ki_free(m->mem, m->output_norm);
    ki_free(m->mem, m->rope_freq);
    ki_free(m->mem, m->layers);
    ki_free(m->mem, m);
    *model = NULL;
}
