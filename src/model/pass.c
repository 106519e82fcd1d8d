/* pass.c: what all families' passes are made of: the arena, rows and products over the workers,
 * attention with the cache, and the beginning and end of a pass.
 *
 * A batch is rows of several sequences, one after the other. Each row's numbers depend on its own
 * row and its own sequence only, in an order fixed by the kernels, so neighbours, chunks and
 * threads change nothing. */
#include "model_private.h"

#include <math.h>

/* Below this many rows the small steps between products are done by the caller: waking workers
 * costs more. */
enum { ROWS_WORTH_SHARING = 4 };

/* From this many rows on a product is long enough for more tasks than a decode step's. */
enum { MANY_ROWS = 64 };

/* ---- the arena ---- */

static kivi_status take(void *out, ki_arena *a, size_t rows, size_t row_bytes, kivi_error *err) {
    void *p;
    KI_TRY(ki_alloc_array(&p, a->mem, KI_TAG_activations, rows, row_bytes, err));
    memcpy(out, &p, sizeof p);
    return KIVI_OK;
}

static kivi_status arena_init(ki_arena *a, const ki_config *c, kivi_error *err) {
    uint32_t q_dim = c->n_heads * c->head_dim, qkv_dim = q_dim + 2 * c->n_kv_heads * c->head_dim;
    uint32_t widest = KI_MAX(KI_MAX(c->n_embd, c->n_ff), q_dim);
    const struct {
        void *out;
        size_t rows, row_bytes;
    } table[] = {
        {&a->x, a->max_rows, c->n_embd * sizeof(float)},
        {&a->h, a->max_rows, c->n_embd * sizeof(float)},
        {&a->qkv, a->max_rows, qkv_dim * sizeof(float)},
        {&a->attn, a->max_rows, q_dim * sizeof(float)},
        {&a->gate, a->max_rows, c->n_ff * sizeof(float)},
        {&a->up, a->max_rows, c->n_ff * sizeof(float)},
        {&a->delta, a->max_rows, c->n_embd * sizeof(float)},
        {&a->cos, a->max_rows, c->n_ropes * c->head_dim / 2 * sizeof(float)},
        {&a->sin, a->max_rows, c->n_ropes * c->head_dim / 2 * sizeof(float)},
        {&a->high, a->max_rows, widest},
        {&a->low, a->max_rows, widest},
        {&a->scales, a->max_rows, (widest / 32 + 1) * sizeof(float)},
        {&a->sums, a->max_rows, (widest / 16 + 1) * sizeof(int32_t)},
        {&a->offsets, a->max_rows, (widest / 32 + 1) * sizeof(float)},
        {&a->pairs, a->max_rows, widest * sizeof(int16_t)},
        {&a->logits, a->max_logit_rows, ki_logits_stride(c) * sizeof(float)},
        {&a->row_item, a->max_rows, sizeof(uint32_t)},
        {&a->places, a->max_items, sizeof(ki_place)},
        {&a->attend, a->max_items, sizeof(ki_attend_item)},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        KI_TRY(take(table[i].out, a, table[i].rows, table[i].row_bytes, err));
    return KIVI_OK;
}

kivi_status ki_arena_create(ki_arena **out, ki_mem *mem, const ki_config *config, uint32_t n_rows,
                            uint32_t n_logit_rows, uint32_t max_items, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_activations, sizeof(ki_arena), err));
    ki_arena *a = p;
    *a = (ki_arena){
        .mem = mem, .max_rows = n_rows, .max_logit_rows = n_logit_rows, .max_items = max_items};
    kivi_status status = arena_init(a, config, err);
    if (status != KIVI_OK) ki_arena_destroy(&a);
    *out = a;
    return status;
}

const float *ki_arena_logits(const ki_arena *a, const ki_config *config, uint32_t row) {
    return a->logits + row * ki_logits_stride(config);
}

void ki_arena_destroy(ki_arena **arena) {
    ki_arena *a = *arena;
    if (!a) return;
    void *parts[] = {a->x,     a->h,      a->qkv,      a->attn,   a->gate,   a->up,   a->delta,
                     a->cos,   a->sin,    a->high,     a->low,    a->scales, a->sums, a->offsets,
                     a->pairs, a->logits, a->row_item, a->places, a->attend};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) ki_free(a->mem, parts[i]);
    ki_free(a->mem, a);
    *arena = NULL;
}

/* ---- rows ---- */

typedef struct row_call {
    ki_pass *p;
    void (*fn)(ki_pass *p, uint32_t row);
} row_call;

static void row_task(void *context, size_t index, unsigned worker) {
    row_call *call = context;
    (void)worker;
    call->fn(call->p, (uint32_t)index);
}

void ki_pass_rows(ki_pass *p, uint32_t n_rows, void (*fn)(ki_pass *p, uint32_t row)) {
    row_call call = {p, fn};
    if (n_rows >= ROWS_WORTH_SHARING) {
        ki_workers_run(p->cache->workers, row_task, &call, n_rows);
        return;
    }
    for (uint32_t r = 0; r < n_rows; r++) fn(p, r);
}

void ki_pass_norm(const ki_pass *p, float *out, const float *in, const ki_norm *norm, uint32_t n) {
    float eps = p->m->config.norm_eps;
    if (norm->bias) p->dense->layer_norm(out, in, norm->weight, norm->bias, n, eps);
    else p->dense->rms_norm(out, in, norm->weight, n, eps);
}

void ki_pass_norm_row(ki_pass *p, uint32_t row) {
    uint32_t n = p->m->config.n_embd;
    ki_pass_norm(p, p->a->h + (size_t)row * n, p->a->x + (size_t)row * n, p->norm, n);
    ki_pass_quantize(p, row);
}

/* ---- products ---- */

typedef struct product_call {
    const ki_dense_kernels *dense;
    const ki_product *products;
    size_t n_products, n_rows;
    const ki_activations *x;
    uint32_t n_tiles, tiles_per_task;
} product_call;

static uint32_t tiles_of(const ki_matrix *m) {
    return (m->n_rows + KI_TILE_ROWS - 1) / KI_TILE_ROWS;
}

/* Tiles of all products are numbered in one line; a task is a piece of it. */
static void product_task(void *context, size_t index, unsigned worker) {
    const product_call *call = context;
    (void)worker;
    uint32_t first = (uint32_t)index * call->tiles_per_task,
             end = KI_MIN(first + call->tiles_per_task, call->n_tiles);
    for (size_t i = 0; i < call->n_products && first < end; i++) {
        const ki_product *p = &call->products[i];
        uint32_t n = tiles_of(p->matrix), stop = KI_MIN(end, n);
        if (first < stop)
            call->dense->matmul(p->out, p->out_stride, p->matrix, first, stop, call->x,
                                call->n_rows);
        first = first > n ? first - n : 0;
        end = end > n ? end - n : 0;
    }
}

static ki_activations activations_of(const ki_pass *p) {
    return (ki_activations){.n_cols = p->source_cols,
                            .x = p->source,
                            .high = p->a->high,
                            .low = p->a->low,
                            .scales = p->a->scales,
                            .sums = p->a->sums,
                            .offsets = p->a->offsets,
                            .pairs = p->a->pairs};
}

void ki_pass_multiply(ki_pass *p, uint32_t n_rows, const ki_product *products, size_t n_products) {
    ki_activations x = activations_of(p);
    product_call call = {.dense = p->dense,
                         .products = products,
                         .n_products = n_products,
                         .n_rows = n_rows,
                         .x = &x};
    for (size_t i = 0; i < n_products; i++) call.n_tiles += tiles_of(products[i].matrix);
    /* small enough to even out, large enough to take */
    uint32_t n_tasks = ki_workers_count(p->cache->workers) * (n_rows < MANY_ROWS ? 4 : 16);
    call.tiles_per_task = (call.n_tiles + n_tasks - 1) / n_tasks;
    ki_workers_run(p->cache->workers, product_task, &call,
                   (call.n_tiles + call.tiles_per_task - 1) / call.tiles_per_task);
}

void ki_pass_quantize(ki_pass *p, uint32_t row) {
    if (!p->quantize) return;
    ki_activations x = activations_of(p);
    p->dense->quantize_row(&x, row);
}

void ki_pass_source(ki_pass *p, const float *rows, uint32_t n_cols, const ki_product *products,
                    size_t n_products) {
    p->source = rows;
    p->source_cols = n_cols;
    p->quantize = false;
    for (size_t i = 0; i < n_products; i++)
        p->quantize = p->quantize || ki_weight_is_quantized(products[i].matrix->type);
}

/* ---- attention ---- */

/* Local layers may have a rope of their own. */
static void rope_row(ki_pass *p, uint32_t row) {
    const ki_config *c = &p->m->config;
    uint32_t half = c->head_dim / 2, n_heads = c->n_heads + c->n_kv_heads,
             which = c->n_ropes == 2 && c->local[p->layer];
    size_t at = ((size_t)row * c->n_ropes + which) * half;
    const ki_layer *layer = &p->m->layers[p->layer];
    float *qk = p->a->qkv + (size_t)row * p->qkv_dim; /* q and k heads are neighbours */
    if (layer->qkv_bias) p->dense->add(qk, layer->qkv_bias, p->qkv_dim);
    for (uint32_t h = 0; h < n_heads; h++) {
        float *head = qk + (size_t)h * c->head_dim;
        const ki_norm *norm = h < c->n_heads ? &layer->q_norm : &layer->k_norm;
        if (norm->weight) p->dense->rms_norm(head, head, norm->weight, c->head_dim, c->norm_eps);
        p->dense->rope(head, p->a->cos + at, p->a->sin + at, c->head_dim);
    }
}

static void append_task(void *context, size_t index, unsigned worker) {
    ki_pass *p = context;
    const ki_config *c = &p->m->config;
    ki_batch_item *item = &p->batch->items[index / c->n_kv_heads];
    uint32_t head = (uint32_t)(index % c->n_kv_heads);
    if (item->status != KIVI_OK) return;
    const float *k = p->a->qkv +
                     (size_t)p->a->places[index / c->n_kv_heads].first_row * p->qkv_dim + p->q_dim +
                     (size_t)head * c->head_dim;
    void *scratch = ki_attn_work_scratch(p->cache->work, worker);
    kivi_error err;
    kivi_status status =
        ki_append_head(item->seq, p->layer, head, k, k + p->kv_dim, p->qkv_dim, scratch, &err);
    if (status == KIVI_OK) return;
    /* several heads may fail at once; the status is what counts, any of the texts is true */
    __atomic_store_n(&p->a->attend[index / c->n_kv_heads].seq, NULL, __ATOMIC_RELAXED);
}

static void append_all(ki_pass *p) {
    size_t n_tasks = p->batch->n_items * p->m->config.n_kv_heads;
    if (p->n_rows >= ROWS_WORTH_SHARING) ki_workers_run(p->cache->workers, append_task, p, n_tasks);
    else
        for (size_t i = 0; i < n_tasks; i++) append_task(p, i, 0);
    for (size_t i = 0; i < p->batch->n_items; i++) {
        ki_batch_item *item = &p->batch->items[i];
        if (item->status == KIVI_OK && !p->a->attend[i].seq)
            item->status = KI_FAIL(
                item->err, NUMERIC,
                "model: a key or value of layer %u within positions %u to %u is infinite or not a "
                "number",
                p->layer, item->seq->n_tokens, item->seq->n_tokens + item->n_rows - 1);
    }
}

void ki_pass_attention(ki_pass *p, const ki_layer *layer) {
    const ki_config *c = &p->m->config;
    ki_arena *a = p->a;
    ki_product out[] = {{a->delta, c->n_embd, &layer->o}};
    ki_pass_rows(p, p->n_rows, rope_row);
    append_all(p);
    ki_attend_batch(p->cache, a->attend, p->batch->n_items, p->layer,
                    c->local[p->layer] ? c->window : 0);
    ki_pass_source(p, a->attn, p->q_dim, out, 1);
    ki_pass_rows(p, p->n_rows, ki_pass_quantize);
    ki_pass_multiply(p, p->n_rows, out, 1);
}

/* ---- beginning and end of a pass ---- */

/* The length that dynamic NTK goes by (rope.c): the end of the prompt, or of this token. */
static uint32_t length_at(const kivi_seq *seq, uint32_t pos) {
    return seq->run_left ? seq->n_tokens + seq->run_left : pos + 1;
}

static void turn_row(ki_pass *p, uint32_t row, const kivi_seq *seq, uint32_t pos) {
    const ki_config *c = &p->m->config;
    uint32_t half = c->head_dim / 2;
    float stretched[KI_MAX_HEAD_DIM / 2];
    for (uint32_t i = 0; i < c->n_ropes; i++) {
        const ki_rope *rope = &c->rope[i];
        const float *freq = p->m->rope_freq + (size_t)i * half;
        float factor = (float)rope->attention;
        size_t at = ((size_t)row * c->n_ropes + i) * half;
        if (rope->scaling == KI_ROPE_DYNAMIC && length_at(seq, pos) > rope->original_ctx) {
            ki_rope_frequencies(stretched, rope, c->head_dim, length_at(seq, pos));
            freq = stretched;
        }
        for (uint32_t j = 0; j < half; j++) { /* the angle in float32, as the models were trained */
            double angle = (double)((float)pos * freq[j]);
            p->a->cos[at + j] = (float)cos(angle) * factor;
            p->a->sin[at + j] = (float)sin(angle) * factor;
        }
    }
}

static void embed_row(ki_pass *p, uint32_t row) {
    const ki_config *c = &p->m->config;
    ki_arena *a = p->a;
    uint32_t i = a->row_item[row], in_item = row - a->places[i].first_row;
    const ki_batch_item *item = &p->batch->items[i];
    float *x = a->x + (size_t)row * c->n_embd;
    ki_matrix_row(x, &p->m->embedding, (uint32_t)item->tokens[in_item]);
    if (c->embed_scale != 1) p->dense->scale(x, x, c->embed_scale, c->n_embd);
    turn_row(p, row, item->seq, item->seq->n_tokens + in_item);
}

static void place_items(ki_pass *p) {
    ki_arena *a = p->a;
    for (size_t i = 0; i < p->batch->n_items; i++) {
        const ki_batch_item *item = &p->batch->items[i];
        uint32_t n = item->status == KIVI_OK ? item->n_rows : 0;
        a->places[i] = (ki_place){p->n_rows, n};
        a->attend[i] = (ki_attend_item){.seq = n ? item->seq : NULL,
                                        .n_rows = n,
                                        .q = a->qkv + (size_t)p->n_rows * p->qkv_dim,
                                        .q_stride = p->qkv_dim,
                                        .out = a->attn + (size_t)p->n_rows * p->q_dim,
                                        .out_stride = p->q_dim};
        for (uint32_t r = 0; r < n; r++) a->row_item[p->n_rows++] = (uint32_t)i;
    }
}

static void final_norm_row(ki_pass *p, uint32_t row) {
    uint32_t n = p->m->config.n_embd;
    float *h = p->a->h + (size_t)row * n;
    ki_pass_norm(p, h, h, &p->m->output_norm, n);
    ki_pass_quantize(p, row);
}

/* n is a multiple of 16. */
static bool is_finite_row(const float *x, uint32_t n) {
    uint32_t largest[16] = {0}, worst = 0;
    for (uint32_t i = 0; i < n; i += 16)
        for (uint32_t j = 0; j < 16; j++)
            largest[j] = KI_MAX(largest[j], ki_f32_bits(x[i + j]) & 0x7fffffff);
    for (uint32_t j = 0; j < 16; j++) worst = KI_MAX(worst, largest[j]);
    return worst < 0x7f800000;
}

/* What went wrong behind the last keys and values shows only here. */
static void fail_result(ki_pass *p, ki_batch_item *item, uint32_t row) {
    atomic_fetch_add(&p->cache->n_nonfinite, 1);
    item->status =
        KI_FAIL(item->err, NUMERIC, "model: the result at position %u is infinite or not a number",
                item->seq->n_tokens + row);
}

/* The rows that asked are gathered in h, then one product. */
static void make_logits(ki_pass *p) {
    const ki_config *c = &p->m->config;
    ki_arena *a = p->a;
    uint32_t n = 0;
    for (size_t i = 0; i < p->batch->n_items; i++) {
        ki_batch_item *item = &p->batch->items[i];
        uint32_t rows = a->places[i].n_rows, first = item->all_logits || !rows ? 0 : rows - 1;
        item->logit_row = n;
        item->best = item->drawn = -1;
        for (uint32_t r = first; r < rows; r++, n++) {
            const float *x = a->x + (size_t)(a->places[i].first_row + r) * c->n_embd;
            memcpy(a->h + (size_t)n * c->n_embd, x, c->n_embd * sizeof(float));
            if (item->status == KIVI_OK && !is_finite_row(x, c->n_embd)) fail_result(p, item, r);
        }
    }
    ki_product out[] = {{a->logits, ki_logits_stride(c), &p->m->output}};
    ki_pass_source(p, a->h, c->n_embd, out, 1);
    ki_pass_rows(p, n, final_norm_row);
    ki_pass_multiply(p, n, out, 1);
}

void ki_forward(const ki_model *model, ki_arena *arena, kivi_cache *cache, ki_batch *batch) {
    const ki_config *c = &model->config;
    ki_pass p = {.m = model,
                 .a = arena,
                 .cache = cache,
                 .batch = batch,
                 .dense = &cache->kernels->dense,
                 .q_dim = c->n_heads * c->head_dim,
                 .kv_dim = c->n_kv_heads * c->head_dim};
    p.qkv_dim = p.q_dim + 2 * p.kv_dim;
    place_items(&p);
    if (p.n_rows == 0) return;
    ki_pass_rows(&p, p.n_rows, embed_row);
    c->family->layers(&p);
    make_logits(&p);
}
