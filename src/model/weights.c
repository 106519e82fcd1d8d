/* weights.c: a file's tensors become matrices in tiles of 16 rows (dense.h). Each tensor is read
 * once, spread over the workers, and its mapped pages are given back. A tensor that the family has
 * no use for is a fault: leaving out a bias would go unnoticed. Dummy weights take the same way,
 * from a generator instead of a file. */
#include "model_private.h"

#include <math.h>
#include <stdio.h>

typedef struct loader {
    ki_model *model;
    const ki_file *file;
    bool is_gguf;
    ki_workers *workers;
    const ki_model_options *options;
    kivi_error *err;
    uint64_t type_bytes[KI_DTYPE_COUNT];
    uint8_t *used; /* [n_tensors] */
    ki_dtype dummy_type;
    uint8_t *dummy_rows; /* [workers][widest row] */
    size_t dummy_row_bytes;
    uint32_t n_dummies;
    uint8_t *staged; /* rows on their way to another device, in the file's form */
    size_t staged_bytes;
    ki_matrix sample; /* what the fingerprint reads of the matrix loaded last: its first tile */
} loader;

ki_weight ki_weight_of(ki_dtype dtype) {
    static const ki_weight map[KI_DTYPE_COUNT] = {
        [KI_F32] = KI_WEIGHT_F32,   [KI_F16] = KI_WEIGHT_F16,   [KI_BF16] = KI_WEIGHT_BF16,
        [KI_Q4_0] = KI_WEIGHT_Q4_0, [KI_Q4_1] = KI_WEIGHT_Q4_1, [KI_Q5_0] = KI_WEIGHT_Q5_0,
        [KI_Q5_1] = KI_WEIGHT_Q5_1, [KI_Q8_0] = KI_WEIGHT_Q8_0, [KI_Q2_K] = KI_WEIGHT_Q2_K,
        [KI_Q3_K] = KI_WEIGHT_Q3_K, [KI_Q4_K] = KI_WEIGHT_Q4_K, [KI_Q5_K] = KI_WEIGHT_Q5_K,
        [KI_Q6_K] = KI_WEIGHT_Q6_K,
    };
    return map[dtype];
}

/* A tensor of this shape, taken note of. */
static kivi_status find(const ki_tensor **out, loader *l, const char *name, uint32_t n_dims,
                        const uint64_t *dims) {
    KI_TRY(ki_file_tensor_shaped(out, l->file, name, n_dims, dims, l->err));
    l->used[*out - ki_file_tensor_at(l->file, 0)] = 1;
    return KIVI_OK;
}

static void name_of(char name[128], const loader *l, enum ki_part part, uint32_t layer,
                    const char *suffix) {
    ki_part_name(name, 128, l->model->config.family, l->is_gguf, part, layer, suffix);
}

/* ---- vectors ---- */

static kivi_status read_vector(float *out, loader *l, const char *name, uint32_t n) {
    const ki_tensor *t;
    uint64_t dims[1] = {n};
    KI_TRY(find(&t, l, name, 1, dims));
    if (ki_dtype_block_elements(t->dtype) != 1)
        return KI_FAIL(l->err, UNSUPPORTED, "%s: tensor %s is %s, expected F32, F16 or BF16",
                       ki_file_path(l->file), name, ki_dtype_name(t->dtype));
    for (uint32_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, t->data + (size_t)i * 2, t->dtype == KI_F32 ? 0 : 2);
        if (t->dtype == KI_F32) memcpy(&out[i], t->data + (size_t)i * 4, 4);
        else out[i] = t->dtype == KI_F16 ? ki_f16_to_f32(half) : ki_bf16_to_f32(half);
    }
    return KIVI_OK;
}

/* Dummy vectors are `dummy` throughout: 1 for a norm, 0 for a bias. */
static kivi_status load_vector(float *out, loader *l, const char *name, uint32_t n, float dummy) {
    l->model->n_params += n;
    if (!l->options->dummy) return read_vector(out, l, name, n);
    for (uint32_t i = 0; i < n; i++) out[i] = dummy;
    return KIVI_OK;
}

static kivi_status new_vector(float **out, loader *l, uint32_t n) {
    void *p;
    KI_TRY(ki_alloc_array(&p, l->model->mem, KI_TAG_weights, n, sizeof(float), l->err));
    *out = p;
    return KIVI_OK;
}

/* The weights times `factor`, which the rope after a head norm passes on to the scores. */
static kivi_status load_norm_of(ki_norm *out, loader *l, enum ki_part part, uint32_t layer,
                                uint32_t n, float factor) {
    const ki_config *c = &l->model->config;
    bool plus_one = c->norm_plus_one && !l->options->dummy;
    char name[128];
    KI_TRY(new_vector(&out->weight, l, n));
    name_of(name, l, part, layer, ".weight");
    KI_TRY(load_vector(out->weight, l, name, n, 1));
    for (uint32_t i = 0; i < n; i++) out->weight[i] = (out->weight[i] + plus_one) * factor;
    if (!c->layer_norm) return KIVI_OK;
    KI_TRY(new_vector(&out->bias, l, n));
    name_of(name, l, part, layer, ".bias");
    return load_vector(out->bias, l, name, n, 0);
}

static kivi_status load_norm(ki_norm *out, loader *l, enum ki_part part, uint32_t layer) {
    return load_norm_of(out, l, part, layer, l->model->config.n_embd, 1);
}

static kivi_status load_biases(ki_layer *out, loader *l, uint32_t layer) {
    const ki_config *c = &l->model->config;
    uint32_t q_dim = c->n_heads * c->head_dim, kv_dim = c->n_kv_heads * c->head_dim;
    const struct {
        enum ki_part part;
        uint32_t at, n;
    } parts[] = {
        {KI_PART_Q, 0, q_dim}, {KI_PART_K, q_dim, kv_dim}, {KI_PART_V, q_dim + kv_dim, kv_dim}};
    KI_TRY(new_vector(&out->qkv_bias, l, q_dim + 2 * kv_dim));
    for (size_t i = 0; i < 3; i++) {
        char name[128];
        name_of(name, l, parts[i].part, layer, ".bias");
        KI_TRY(load_vector(out->qkv_bias + parts[i].at, l, name, parts[i].n, 0));
    }
    return KIVI_OK;
}

/* ---- matrices ---- */

/* Where a matrix's rows stand in its tensor: row r of head h at first + h * stride + r. Paired rows
 * (2j, 2j + 1) of a head are put apart to (j, j + D/2). A fused tensor has, for each KV head, its
 * query heads, then a key and a value head. */
typedef struct row_map {
    uint32_t n_file_rows; /* of the tensor; 0: those of the matrix */
    uint32_t head_dim;    /* 0: rows as they come */
    bool paired;
    uint32_t first_head, run, stride; /* in heads: runs of neighbours, `stride` from run to run */
} row_map;

typedef struct pack_call {
    loader *l;
    ki_matrix *matrix;
    const ki_tensor *tensor; /* NULL: dummy */
    row_map map;
    size_t row_bytes;
    uint32_t tiles_per_task, n_tiles, number;
} pack_call;

static uint32_t source_row(const row_map *m, uint32_t row) {
    if (!m->head_dim) return row;
    uint32_t head = row / m->head_dim, in_head = row % m->head_dim, half = m->head_dim / 2;
    if (m->paired) in_head = in_head % half * 2 + in_head / half;
    if (m->run) head = m->first_head + head / m->run * m->stride + head % m->run;
    return head * m->head_dim + in_head;
}

static void pack_task(void *context, size_t index, unsigned worker) {
    const pack_call *call = context;
    const loader *l = call->l;
    uint32_t first = (uint32_t)index * call->tiles_per_task * KI_TILE_ROWS;
    uint32_t end = KI_MIN(first + call->tiles_per_task * KI_TILE_ROWS, call->matrix->n_rows);
    for (uint32_t r = first; r < end; r++) {
        const uint8_t *row = l->dummy_rows + worker * l->dummy_row_bytes;
        if (call->tensor) row = call->tensor->data + source_row(&call->map, r) * call->row_bytes;
        else
            ki_dummy_row(l->dummy_rows + worker * l->dummy_row_bytes, l->dummy_type,
                         call->matrix->n_cols, l->options->dummy_seed + call->number, r);
        ki_matrix_pack_row(call->matrix, row, r);
    }
}

/* ---- to another device ---- */

enum { STAGED_BYTES = 32 << 20 }; /* long copies, and little beside the weights themselves */

static const uint8_t *row_of(const pack_call *call, uint32_t r, uint8_t *room) {
    const loader *l = call->l;
    if (call->tensor) return call->tensor->data + source_row(&call->map, r) * call->row_bytes;
    ki_dummy_row(room, l->dummy_type, call->matrix->n_cols,
                 l->options->dummy_seed + call->number, r);
    return room;
}

typedef struct stage_call {
    const pack_call *pack;
    uint32_t first_row, n_rows, rows_per_task;
} stage_call;

static void stage_task(void *context, size_t index, unsigned worker) {
    const stage_call *call = context;
    const pack_call *pack = call->pack;
    uint32_t first = (uint32_t)index * call->rows_per_task;
    (void)worker;
    for (uint32_t r = first; r < KI_MIN(first + call->rows_per_task, call->n_rows); r++) {
        uint8_t *to = pack->l->staged + r * pack->row_bytes;
        const uint8_t *from = row_of(pack, call->first_row + r, to);
        if (from != to) memcpy(to, from, pack->row_bytes);
    }
}

/* Room for the first tile in this process's form, whatever the matrix's own is. */
static kivi_status make_sample(loader *l, const pack_call *call, ki_weight type) {
    const ki_matrix *m = call->matrix;
    uint32_t n_rows = KI_MIN(m->n_rows, (uint32_t)KI_TILE_ROWS);
    size_t n_bytes;
    void *p;
    ki_free(l->model->mem, l->sample.tiles);
    l->sample = (ki_matrix){.type = type, .n_rows = n_rows, .n_cols = m->n_cols};
    if (!ki_matrix_bytes(&n_bytes, type, n_rows, m->n_cols))
        return KI_FAIL(l->err, FORMAT, "%s: rows are too long", ki_file_path(l->file));
    KI_TRY(ki_alloc(&p, l->model->mem, KI_TAG_other, n_bytes, l->err));
    l->sample.tiles = p;
    for (uint32_t r = 0; r < n_rows; r++)
        ki_matrix_pack_row(&l->sample, row_of(call, r, l->staged), r);
    return KIVI_OK;
}

/* The next matrices of n_rows rows together are read by one product. */
static kivi_status begin_group(loader *l, uint32_t n_rows, uint32_t n_cols) {
    const ki_matrix_device *d = l->options->matrix_device;
    size_t n;
    if (!l->options->device) return KIVI_OK;
    if (!ki_mul(&n, n_rows, n_cols))
        return KI_FAIL(l->err, FORMAT, "%s: a tensor is too large", ki_file_path(l->file));
    return d->group(d->context, n, l->err);
}

static kivi_status send_matrix(loader *l, pack_call *call, ki_dtype dtype) {
    const ki_matrix_device *d = l->options->matrix_device;
    ki_matrix *m = call->matrix;
    size_t row_bytes = (size_t)m->n_cols / ki_dtype_block_elements(dtype);
    call->row_bytes = row_bytes *= ki_dtype_block_bytes(dtype);
    if (l->staged_bytes < row_bytes) /* no row of a file is longer than its widest matrix's */
        return KI_FAIL(l->err, FORMAT, "%s: rows are too long", ki_file_path(l->file));
    KI_TRY(make_sample(l, call, m->type));
    KI_TRY(d->place(m, d->context, dtype, l->err));
    stage_call stage = {.pack = call, .rows_per_task = 64};
    uint32_t at_once = (uint32_t)KI_MIN(l->staged_bytes / row_bytes, (size_t)m->n_rows);
    for (uint32_t r = 0; r < m->n_rows; r += at_once) {
        stage.first_row = r;
        stage.n_rows = KI_MIN(at_once, m->n_rows - r);
        ki_workers_run(l->workers, stage_task, &stage,
                       (stage.n_rows + stage.rows_per_task - 1) / stage.rows_per_task);
        KI_TRY(d->put(m, d->context, dtype, l->staged, row_bytes, r, stage.n_rows, l->err));
    }
    return KIVI_OK;
}

static kivi_status pack_matrix(loader *l, pack_call *call) {
    ki_matrix *m = call->matrix;
    size_t n_bytes;
    void *p;
    if (!ki_matrix_bytes(&n_bytes, m->type, m->n_rows, m->n_cols))
        return KI_FAIL(l->err, FORMAT, "%s: a tensor is too large", ki_file_path(l->file));
    KI_TRY(ki_alloc(&p, l->model->mem, KI_TAG_weights, n_bytes, l->err));
    m->tiles = p;
    call->n_tiles = (m->n_rows + KI_TILE_ROWS - 1) / KI_TILE_ROWS;
    ki_workers_run(l->workers, pack_task, call,
                   (call->n_tiles + call->tiles_per_task - 1) / call->tiles_per_task);
    return KIVI_OK;
}

static kivi_status load_matrix(ki_matrix *out, loader *l, const char *name, uint32_t n_rows,
                               uint32_t n_cols, row_map map) {
    pack_call call = {.l = l, .matrix = out, .map = map, .tiles_per_task = 16};
    uint32_t n_file_rows = map.n_file_rows ? map.n_file_rows : n_rows;
    uint64_t dims[2] = {n_file_rows, n_cols};
    ki_dtype dtype = l->dummy_type;
    size_t n_bytes;
    if (!l->options->dummy) {
        KI_TRY(find(&call.tensor, l, name, 2, dims));
        dtype = call.tensor->dtype;
        call.row_bytes = call.tensor->n_bytes / n_file_rows;
    }
    if (n_cols % ki_dtype_block_elements(dtype))
        return KI_FAIL(l->err, UNSUPPORTED, "%s: rows of %u elements, %s needs a multiple of %u",
                       name, n_cols, ki_dtype_name(dtype), ki_dtype_block_elements(dtype));
    *out = (ki_matrix){.type = ki_weight_of(dtype), .n_rows = n_rows, .n_cols = n_cols};
    if (!ki_matrix_bytes(&n_bytes, out->type, n_rows, n_cols))
        return KI_FAIL(l->err, FORMAT, "%s: tensor %s is too large", ki_file_path(l->file), name);
    call.number = l->n_dummies++;
    KI_TRY(l->options->device ? send_matrix(l, &call, dtype) : pack_matrix(l, &call));
    if (call.tensor) ki_file_drop(l->file, call.tensor);
    l->type_bytes[dtype] += n_bytes;
    l->model->n_params += (uint64_t)n_rows * n_cols;
    return KIVI_OK;
}

static kivi_status load_part(ki_matrix *out, loader *l, enum ki_part part, uint32_t layer,
                             uint32_t n_rows, uint32_t n_cols) {
    char name[128];
    name_of(name, l, part, layer, ".weight");
    return load_matrix(out, l, name, n_rows, n_cols, (row_map){0});
}

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i++)
        hash = (hash ^ ((const uint8_t *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

/* The fingerprint grows as the model is read: shapes, a sample of each layer, frequencies. */
static void hash_shape(loader *l) {
    const ki_config *c = &l->model->config;
    uint32_t shape[] = {c->n_layers,   c->n_embd,   c->n_ff,   c->n_heads,
                        c->n_kv_heads, c->head_dim, c->n_vocab};
    l->model->fingerprint = hash_bytes(0xcbf29ce484222325u, shape, sizeof shape);
}

/* A few tiles tell fine-tunes apart. q: the layer's, or where it went, its sample. */
static void hash_layer(loader *l, const ki_matrix *q, const ki_layer *layer) {
    uint64_t *hash = &l->model->fingerprint;
    size_t n_bytes, n_norm = KI_MIN(l->model->config.n_embd, 64u);
    if (ki_matrix_bytes(&n_bytes, q->type, KI_TILE_ROWS, l->model->config.n_embd))
        *hash = hash_bytes(*hash, q->tiles, KI_MIN(n_bytes, (size_t)1024));
    *hash = hash_bytes(*hash, layer->attn_norm.weight, n_norm * sizeof(float));
}

/* Three matrices of three tensors, or of one. */
static kivi_status load_qkv(ki_layer *out, loader *l, uint32_t layer) {
    const ki_config *c = &l->model->config;
    uint32_t group = c->n_heads / c->n_kv_heads, n_all = c->n_heads + 2 * c->n_kv_heads;
    const struct {
        ki_matrix *matrix;
        enum ki_part part;
        uint32_t n_heads, run, first_hf, first_gguf;
    } parts[] = {{&out->q, KI_PART_Q, c->n_heads, group, 0, 0},
                 {&out->k, KI_PART_K, c->n_kv_heads, 1, group, c->n_heads},
                 {&out->v, KI_PART_V, c->n_kv_heads, 1, group + 1, c->n_heads + c->n_kv_heads}};
    KI_TRY(begin_group(l, n_all * c->head_dim, c->n_embd));
    for (size_t i = 0; i < 3; i++) {
        row_map map = {.head_dim = c->head_dim, .paired = c->paired_rows && i < 2};
        char name[128];
        if (c->fused_qkv) {
            map.n_file_rows = n_all * c->head_dim;
            map.run = l->is_gguf ? parts[i].n_heads : parts[i].run;
            map.stride = l->is_gguf ? 0 : group + 2;
            map.first_head = l->is_gguf ? parts[i].first_gguf : parts[i].first_hf;
        }
        name_of(name, l, c->fused_qkv ? KI_PART_QKV : parts[i].part, layer, ".weight");
        KI_TRY(
            load_matrix(parts[i].matrix, l, name, parts[i].n_heads * c->head_dim, c->n_embd, map));
        if (i == 0) hash_layer(l, l->options->device ? &l->sample : &out->q, out);
    }
    return KIVI_OK;
}

static kivi_status load_norms(ki_layer *out, loader *l, uint32_t i) {
    const ki_config *c = &l->model->config;
    KI_TRY(load_norm(&out->attn_norm, l, c->one_norm ? KI_PART_ONE_NORM : KI_PART_ATTN_NORM, i));
    if (!c->one_norm) KI_TRY(load_norm(&out->ffn_norm, l, KI_PART_FFN_NORM, i));
    if (c->post_norms) {
        KI_TRY(load_norm(&out->post_attn_norm, l, KI_PART_POST_ATTN_NORM, i));
        KI_TRY(load_norm(&out->post_ffn_norm, l, KI_PART_POST_FFN_NORM, i));
    }
    if (!c->head_norms) return KIVI_OK;
    KI_TRY(load_norm_of(&out->q_norm, l, KI_PART_Q_NORM, i, c->head_dim, c->query_scale));
    return load_norm_of(&out->k_norm, l, KI_PART_K_NORM, i, c->head_dim, 1);
}

static kivi_status load_layer(ki_layer *out, loader *l, uint32_t i) {
    const ki_config *c = &l->model->config;
    KI_TRY(load_norms(out, l, i));
    KI_TRY(load_qkv(out, l, i));
    if (c->qkv_bias) KI_TRY(load_biases(out, l, i));
    KI_TRY(load_part(&out->o, l, KI_PART_O, i, c->n_embd, c->n_heads * c->head_dim));
    KI_TRY(begin_group(l, c->no_gate ? c->n_ff : 2 * c->n_ff, c->n_embd));
    if (!c->no_gate) KI_TRY(load_part(&out->gate, l, KI_PART_GATE, i, c->n_ff, c->n_embd));
    KI_TRY(load_part(&out->up, l, KI_PART_UP, i, c->n_ff, c->n_embd));
    return load_part(&out->down, l, KI_PART_DOWN, i, c->n_embd, c->n_ff);
}

/* ---- rotary frequencies ---- */

static float round_to(float x, ki_weight type) {
    if (type == KI_WEIGHT_F16) return ki_f16_to_f32(ki_f32_to_f16(x));
    if (type == KI_WEIGHT_BF16) return ki_bf16_to_f32(ki_f32_to_bf16(x));
    return x;
}

static kivi_status make_rope(loader *l) {
    ki_model *m = l->model;
    const ki_config *c = &m->config;
    static const char *const divisors_name = "rope_freqs.weight";
    uint32_t half = c->head_dim / 2;
    float divisors[KI_MAX_HEAD_DIM / 2]; /* a GGUF file carries Llama 3's stretch as a tensor */
    bool divided = !l->options->dummy && ki_file_tensor(l->file, divisors_name);
    if (divided) KI_TRY(read_vector(divisors, l, divisors_name, half));
    KI_TRY(new_vector(&m->rope_freq, l, c->n_ropes * half));
    for (uint32_t i = 0; i < c->n_ropes; i++) {
        float *freq = m->rope_freq + (size_t)i * half;
        ki_rope_frequencies(freq, &c->rope[i], c->head_dim, 0);
        for (uint32_t j = 0; j < half; j++) {
            if (divided && i == 0) freq[j] /= divisors[j];
            freq[j] = round_to(freq[j], l->options->rope_type);
        }
    }
    m->fingerprint =
        hash_bytes(m->fingerprint, m->rope_freq, c->n_ropes * half * sizeof(float));
    return KIVI_OK;
}

/* ---- the whole ---- */

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
    char name[128];
    name_of(name, l, KI_PART_OUTPUT, 0, ".weight");
    if (l->is_gguf) /* absent means tied */
        m->config.tied_output = !ki_file_tensor(l->file, name);
    if (!m->config.tied_output)
        return load_part(&m->output, l, KI_PART_OUTPUT, 0, c->n_vocab, c->n_embd);
    m->output = m->embedding;
    return KIVI_OK;
}

/* Tensors that may stand in a file without a use: the embedding once more, and tables that older
 * programs wrote. */
bool ki_is_known_extra(const char *name) {
    static const char *const extras[] = {"lm_head.weight", "rotary_emb.inv_freq", "attention.bias",
                                         "attention.masked_bias"};
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof extras / sizeof *extras; i++) {
        size_t n_end = strlen(extras[i]);
        if (n >= n_end && !strcmp(name + n - n_end, extras[i])) return true;
    }
    return false;
}

static kivi_status check_used(const loader *l) {
    for (size_t i = 0; i < ki_file_n_tensors(l->file) && !l->options->dummy; i++) {
        const char *name = ki_file_tensor_at(l->file, i)->name;
        if (!l->used[i] && !ki_is_known_extra(name))
            return KI_FAIL(l->err, UNSUPPORTED, "%s: tensor %.80s is not one that %s has",
                           ki_file_path(l->file), name, l->model->config.architecture);
    }
    return KIVI_OK;
}

static kivi_status prepare(loader *l) {
    const ki_config *c = &l->model->config;
    uint32_t widest = KI_MAX(KI_MAX(c->n_embd, c->n_ff), c->n_heads * c->head_dim);
    size_t n_workers = ki_workers_count(l->workers);
    void *p;
    KI_TRY(ki_alloc(&p, l->model->mem, KI_TAG_other, ki_file_n_tensors(l->file), l->err));
    l->used = p;
    if (l->options->device) {
        l->staged_bytes = KI_MAX((size_t)STAGED_BYTES, (size_t)widest * sizeof(float));
        KI_TRY(ki_alloc(&p, l->model->mem, KI_TAG_other, l->staged_bytes, l->err));
        l->staged = p;
    }
    if (!l->options->dummy) return KIVI_OK;
    KI_TRY(ki_dummy_type(&l->dummy_type, l->file, l->options->dummy_type, l->err));
    if (!ki_round_up(&l->dummy_row_bytes, (size_t)widest * sizeof(float), 64))
        return KI_FAIL(l->err, FORMAT, "%s: rows are too long", ki_file_path(l->file));
    KI_TRY(ki_alloc_array(&p, l->model->mem, KI_TAG_other, n_workers, l->dummy_row_bytes, l->err));
    l->dummy_rows = p;
    return KIVI_OK;
}

static kivi_status load_all(loader *l) {
    ki_model *m = l->model;
    void *p;
    KI_TRY(ki_config_read(&m->config, l->file, l->err));
    const ki_config *c = &m->config;
    hash_shape(l);
    KI_TRY(prepare(l));
    KI_TRY(ki_alloc_array(&p, m->mem, KI_TAG_other, c->n_layers, sizeof(ki_layer), l->err));
    m->layers = p;
    KI_TRY(load_part(&m->embedding, l, KI_PART_EMBEDDING, 0, c->n_vocab, c->n_embd));
    KI_TRY(load_output(l));
    KI_TRY(load_norm(&m->output_norm, l, KI_PART_OUTPUT_NORM, 0));
    for (uint32_t i = 0; i < c->n_layers; i++) KI_TRY(load_layer(&m->layers[i], l, i));
    name_weight_type(l);
    KI_TRY(make_rope(l));
    return check_used(l);
}

kivi_status ki_model_load(ki_model **out, ki_mem *mem, const ki_file *file, ki_workers *workers,
                          const ki_model_options *options, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(ki_model), err));
    loader l = {.model = p,
                .file = file,
                .is_gguf = ki_file_kind_get(file) == KI_FILE_GGUF,
                .workers = workers,
                .options = options,
                .err = err};
    l.model->mem = mem;
    l.model->device = options->device;
    kivi_status status = ki_file_check_size(file, err);
    if (status == KIVI_OK) status = load_all(&l);
    if (status == KIVI_OK) status = ki_file_check_size(file, err);
    ki_free(mem, l.used);
    ki_free(mem, l.dummy_rows);
    ki_free(mem, l.staged);
    ki_free(mem, l.sample.tiles);
    if (status != KIVI_OK) ki_model_destroy(&l.model);
    *out = l.model;
    return status;
}

static void free_norm(ki_mem *mem, ki_norm *norm) {
    ki_free(mem, norm->weight);
    ki_free(mem, norm->bias);
}

static void free_tiles(const ki_model *m, void *tiles) {
    if (m->device) m->device->free(m->device->context, tiles);
    else ki_free(m->mem, tiles);
}

static void free_layer(const ki_model *m, ki_layer *y) {
    ki_mem *mem = m->mem;
    ki_norm *norms[] = {&y->attn_norm,     &y->ffn_norm, &y->post_attn_norm,
                        &y->post_ffn_norm, &y->q_norm,   &y->k_norm};
    void *parts[] = {y->q.tiles,    y->k.tiles,  y->v.tiles,   y->o.tiles,
                     y->gate.tiles, y->up.tiles, y->down.tiles};
    for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) free_norm(mem, norms[i]);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free_tiles(m, parts[i]);
    ki_free(mem, y->qkv_bias);
}

void ki_model_destroy(ki_model **model) {
    ki_model *m = *model;
    if (!m) return;
    for (uint32_t i = 0; m->layers && i < m->config.n_layers; i++)
        free_layer(m, &m->layers[i]);
    if (m->output.tiles != m->embedding.tiles) free_tiles(m, m->output.tiles);
    free_tiles(m, m->embedding.tiles);
    free_norm(m->mem, &m->output_norm);
    ki_free(m->mem, m->rope_freq);
    ki_free(m->mem, m->layers);
    ki_free(m->mem, m);
    *model = NULL;
}
