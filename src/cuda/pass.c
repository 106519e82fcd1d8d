/* pass.c: a step on the device. The order of a family's layers is that of src/model/llama.c and
 * falcon.c; here each line is one launch.
 *
 * A step of decoding (one row of each sequence) has the shape of its bucket: launches are the same
 * whatever the lengths are, so they are captured in a CUDA graph when the engine is made and
 * replayed; lengths, tables and positions come with the upload. Other steps launch one by one. */
#include "cuda_private.h"
#include "kv_plan.h"

#include <math.h>

static void *at(const ki_cuda_backend *b, size_t offset) { return b->buffers.upload + offset; }

static bool is_held(const ki_cuda_backend *b) { return !(b->without & KI_PART_NORMS); }

/* stream.h's products, but where a batch's size must not show and more rows may come. */
static bool is_few(const ki_cuda_backend *b, const ki_cuda_shape *s, uint32_t m) {
    return m <= ki_cuda_stream_rows(b) && !(s->decode && b->fixed_rows);
}

/* Products of few rows stand in one chain, whatever comes between them; the two behind attention
 * are there while it is at work. */
static void put_in_chain(ki_cuda_backend *b, ki_stream_call *few) {
    static const ki_stream_pace paces[] = {KI_STREAM_BESIDE, KI_STREAM_BEHIND};
    few->part = b->n_streamed++ % 2 ? KI_STREAM_SECOND : KI_STREAM_FIRST;
    if (b->n_behind < 2) few->pace = paces[b->n_behind++];
}

/* Out [m][stride] of the weights' n rows; q, k and v, and gate and up, stand in one block. */
static kivi_status product_to(ki_cuda_backend *b, const ki_cuda_shape *s, float *out, size_t stride,
                              const ki_matrix *weight, uint32_t n, const void *x, uint32_t m,
                              bool add, kivi_error *err) {
    ki_gemm_shape shape = {.n = n, .k = weight->n_cols, .out_stride = stride};
    ki_stream_call few = {.out = out,
                          .out_stride = stride,
                          .weight = weight->tiles,
                          .x = x,
                          .n = n,
                          .k = shape.k,
                          .m = m,
                          .type = b->type,
                          .workspace = b->buffers.sums,
                          .add = add};
    if (is_few(b, s, m)) {
        put_in_chain(b, &few);
        return ki_stream_run(b->few, &few, b->memory.stream, err);
    }
    if (s->decode && b->fixed_rows) m = b->fixed_rows; /* buffers have so many rows */
    return ki_gemm_run(b->gemm, out, weight->tiles, x, &shape, m, add, b->memory.stream, err);
}

typedef struct layer_call {
    ki_cuda_backend *b;
    const ki_cuda_shape *shape;
    const ki_layer *layer;
    const ki_cuda_norms *norms;
    uint32_t index;
    ki_cuda_cache kv;
} layer_call;

/* Of all rows of the pass. */
static kivi_status product(const layer_call *c, float *out, const ki_matrix *weight, uint32_t n,
                           const void *x, bool add, kivi_error *err) {
    return product_to(c->b, c->shape, out, n, weight, n, x, c->shape->n_rows, add, err);
}

/* ---- attention ---- */

static ki_cuda_attend_call attend_of(const layer_call *c, bool local) {
    const ki_cuda_backend *b = c->b;
    const ki_config *config = &b->model->config;
    ki_cuda_attend_call a = {.cache = &c->kv,
                             .layer = c->index,
                             .window = local ? config->window : 0,
                             .scale = 1.0f / sqrtf((float)config->head_dim),
                             .q = b->buffers.q16,
                             .out = b->buffers.attn,
                             .out_stride = config->n_heads * config->head_dim,
                             .out_type = b->type,
                             .n_rows = c->shape->n_rows,
                             .max_rows = c->shape->max_rows,
                             .split_tokens = c->shape->split_tokens,
                             .max_tokens = b->sizes.max_tokens,
                             .is_fixed = b->invariant,
                             .workspace = b->buffers.plan[local],
                             .pdl = true};
    if (!c->shape->decode) a.k_rows = b->buffers.k_rows, a.v_rows = b->buffers.v_rows;
    return a;
}

static ki_cuda_append_call append_of(const layer_call *c) {
    const ki_cuda_backend *b = c->b;
    const ki_config *config = &b->model->config;
    uint32_t d = config->head_dim, q = config->n_heads * d, kv = config->n_kv_heads * d;
    uint32_t which = config->n_ropes == 2 && config->local[c->index];
    uint32_t stride = q + 2 * kv;
    const float *rows = b->buffers.qkv;
    ki_cuda_append_call a = {.cache = &c->kv,
                             .layer = c->index,
                             .n_rows = c->shape->n_rows,
                             .max_rows = c->shape->max_rows,
                             .q = rows,
                             .k = rows + q,
                             .v = rows + q + kv,
                             .q_stride = stride,
                             .k_stride = stride,
                             .v_stride = stride,
                             .type = KI_CUDA_F32,
                             .rope = b->buffers.rope + (size_t)which * c->shape->n_rows * d,
                             .q_out = b->buffers.q16,
                             .pdl = true};
    a.row_flags = (uint32_t *)(void *)(b->buffers.result + b->result_at.row_flags);
    if (!c->shape->decode) a.k_rows = b->buffers.k_rows, a.v_rows = b->buffers.v_rows;
    return a;
}

/* One whole prompt by cuDNN; what it leaves in float16 becomes what the next product reads. */
static kivi_status attend_whole(const layer_call *c, const ki_cuda_attend_call *a,
                                const ki_cuda_seq *seq, uint32_t number, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    const ki_config *config = &b->model->config;
    size_t q = (size_t)config->n_heads * config->head_dim, at = seq->first_row;
    size_t kv = (size_t)config->n_kv_heads * config->head_dim;
    const ki_sdpa_call call = {.q = a->q + at * q,
                               .k = a->k_rows + at * kv,
                               .v = a->v_rows + at * kv,
                               .out = (uint16_t *)a->out + at * q,
                               .record = b->buffers.upload + b->upload_at.records +
                                         number * KI_SDPA_RECORD_BYTES,
                               .workspace = b->workspace,
                               .n_rows = seq->n_rows,
                               .window = a->window,
                               .scale = a->scale};
    KI_TRY(ki_sdpa_run(b->sdpa, &call, b->memory.stream, err));
    if (b->type != KI_CUDA_F16 || b->layout.is_plus)
        ki_cuda_finish_heads(call.out, b->type, b->layout.is_plus, seq->n_rows, config->n_heads,
                             config->head_dim, b->memory.stream);
    return KIVI_OK;
}

ki_prompt_step ki_cuda_prompt_step(const ki_cuda_backend *b, uint32_t n_seqs) {
    bool has[2];
    ki_cuda_kinds_of(has, &b->model->config);
    return (ki_prompt_step){.layout = &b->layout,
                            .seqs = (const ki_cuda_seq *)(const void *)(b->up + b->upload_at.seqs),
                            .n_seqs = n_seqs,
                            .window = has[0] ? 0 : b->model->config.window,
                            .scratch_bytes = b->scratch_bytes};
}

/* By our own kernels, part by part of what the scratch has room for. */
static kivi_status attend_own(const layer_call *c, const ki_cuda_attend_call *all,
                              kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    ki_cuda_attend_call own = *all;
    if (!b->kernels->prompt_attend) return b->kernels->attend(&own, b->memory.stream, err);
    ki_prompt_step step = ki_cuda_prompt_step(b, c->shape->n_seqs);
    ki_prompt_part part = {0};
    own.max_rows = c->shape->own_rows;
    own.workspace = b->buffers.scratch;
    while (ki_prompt_next(&part, &step))
        KI_TRY(b->kernels->prompt_attend(&own, &part, step.window, b->memory.stream, err));
    return KIVI_OK;
}

/* Of a step with prompts: whole ones that are long enough by cuDNN, the rest by our own kernel. */
static kivi_status attend_prompts(const layer_call *c, const ki_cuda_attend_call *all,
                                  kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    const ki_cuda_seq *seqs = (const ki_cuda_seq *)(const void *)(b->up + b->upload_at.seqs);
    if (c->shape->own_rows) KI_TRY(attend_own(c, all, err));
    for (uint32_t i = 0, n = 0; n < c->shape->n_whole && i < c->shape->n_seqs; i++)
        if (seqs[i].flags & KI_CUDA_ELSEWHERE && seqs[i].n_rows > 1)
            KI_TRY(attend_whole(c, all, &seqs[i], n++, err));
    return KIVI_OK;
}

/* Behind the attention of all layers of a step of decoding, beside what is left of the last one: on
 * a stream of its own, which the pass waits for at its end. */
static kivi_status close_pages(const layer_call *c, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    if (!b->kernels->close) return KIVI_OK;
    layer_call first = *c;
    first.index = 0;
    ki_cuda_append_call all = append_of(&first);
    all.pdl = false;
    KI_TRY(ki_cuda_check(cudaEventRecord(b->forked, b->memory.stream), "pages", err));
    KI_TRY(ki_cuda_check(cudaStreamWaitEvent(b->side, b->forked, 0), "pages", err));
    KI_TRY(b->kernels->close(&all, b->model->config.n_layers, b->side, err));
    return ki_cuda_check(cudaEventRecord(b->joined, b->side), "pages", err);
}

/* q, k, v of all rows are in qkv: the cache takes keys and values, attention is left in attn. */
static kivi_status attention(const layer_call *c, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    const ki_cuda_kernels *k = b->kernels;
    cudaStream_t stream = b->memory.stream;
    ki_cuda_append_call append = append_of(c);
    ki_cuda_attend_call attend = attend_of(c, b->model->config.local[c->index]);
    if (c->norms->heads.bias || c->norms->heads.q_weight)
        ki_cuda_adjust_heads(b->buffers.qkv, &c->norms->heads, c->shape->n_rows, stream);
    if (c->shape->decode) {
        if (k->append) KI_TRY(k->append(&append, stream, err));
        else attend.append = &append;
        c->b->n_behind = 0;
        KI_TRY(k->attend(&attend, stream, err));
        return c->index + 1 == b->model->config.n_layers ? close_pages(c, err) : KIVI_OK;
    }
    append.pdl = attend.pdl = false;
    KI_TRY(k->prompt_append(&append, stream, err));
    KI_TRY(attend_prompts(c, &attend, err));
    KI_TRY(k->prompt_window(&append, stream, err));
    return c->shape->n_single ? k->attend(&attend, stream, err) : KIVI_OK;
}

/* ---- layers ---- */

static uint32_t qkv_dim(const ki_config *c) {
    return (c->n_heads + 2 * c->n_kv_heads) * c->head_dim;
}

/* h = norm(x). */
static void norm(const layer_call *c, const ki_cuda_norm *to) {
    const ki_cuda_backend *b = c->b;
    ki_cuda_norm_rows(b->buffers.h, b->buffers.x, NULL, to, c->shape->n_rows,
                      b->model->config.n_embd, b->type, is_held(b), b->memory.stream);
}

/* The product of norm(x), which makes the norm by itself where it can. */
typedef struct normed_call {
    const ki_cuda_norm *norm;
    const ki_matrix *weight;
    uint32_t n;
    float *out;        /* [m][n], or */
    size_t out_stride; /* 0: n */
    void *act_out;     /* act(gate) up */
    ki_cuda_act act;
    bool lets_late; /* stream.h */
} normed_call;

static kivi_status normed_product(const layer_call *c, const normed_call *p, kivi_error *err) {
    ki_cuda_backend *b = c->b;
    const ki_cuda_buffers *r = &b->buffers;
    uint32_t m = c->shape->n_rows, k = p->weight->n_cols;
    bool few = is_few(b, c->shape, m);
    size_t stride = p->out_stride ? p->out_stride : p->n;
    ki_stream_call call = {.out = p->out,
                           .out_stride = stride,
                           .weight = p->weight->tiles,
                           .x = r->h,
                           .n = p->n,
                           .k = k,
                           .m = m,
                           .type = b->type,
                           .workspace = b->buffers.sums,
                           .act_out = p->act_out,
                           .act = p->act,
                           .lets_late = p->lets_late};
    if (few) put_in_chain(b, &call);
    if (few && is_held(b) && ki_stream_takes_norm(p->norm, m, k)) {
        call.raw = r->x, call.norm = *p->norm;
        return ki_stream_run(b->few, &call, b->memory.stream, err);
    }
    norm(c, p->norm);
    if (few) return ki_stream_run(b->few, &call, b->memory.stream, err);
    float *out = p->act_out ? r->mlp : p->out;
    KI_TRY(product_to(b, c->shape, out, stride, p->weight, p->n, r->h, m, false, err));
    if (p->act_out)
        ki_cuda_activate(p->act_out, out, p->act, m, p->n / 2, b->type, b->memory.stream);
    return KIVI_OK;
}

/* x += rows weight, normalized first where the family does that. */
static kivi_status add_product(const layer_call *c, const ki_matrix *weight, const void *rows,
                               const ki_cuda_norm *post, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    uint32_t n = b->model->config.n_embd, m = c->shape->n_rows;
    if (!post->weight) return product(c, b->buffers.x, weight, n, rows, true, err);
    KI_TRY(product(c, b->buffers.delta, weight, n, rows, false, err));
    ki_cuda_add_norm(b->buffers.x, b->buffers.delta, post, m, n, is_held(b), b->memory.stream);
    return KIVI_OK;
}

static kivi_status llama_layer(const layer_call *c, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    const ki_config *config = &b->model->config;
    const ki_cuda_buffers *r = &b->buffers;
    const ki_layer *y = c->layer;
    const normed_call qkv = {.norm = &c->norms->attn,
                             .weight = &y->q,
                             .n = qkv_dim(config),
                             .out = r->qkv,
                             .lets_late = !b->kernels->append}; /* attention is next */
    const normed_call mlp = {.norm = &c->norms->ffn,
                             .weight = &y->gate,
                             .n = 2 * config->n_ff,
                             .act_out = r->act,
                             .act = config->tanh_gelu ? KI_CUDA_GELU_MUL : KI_CUDA_SILU_MUL};
    KI_TRY(normed_product(c, &qkv, err));
    KI_TRY(attention(c, err));
    KI_TRY(add_product(c, &y->o, r->attn, &c->norms->post_attn, err));
    KI_TRY(normed_product(c, &mlp, err));
    return add_product(c, &y->down, r->act, &c->norms->post_ffn, err);
}

/* Attention and MLP read the same x, and are added to it when both have read it. */
static kivi_status falcon_layer(const layer_call *c, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    const ki_config *config = &b->model->config;
    const ki_cuda_buffers *r = &b->buffers;
    const ki_layer *y = c->layer;
    norm(c, &c->norms->attn);
    KI_TRY(product(c, r->qkv, &y->q, qkv_dim(config), r->h, false, err));
    if (!config->one_norm) norm(c, &c->norms->ffn);
    KI_TRY(product(c, r->mlp, &y->up, config->n_ff, r->h, false, err));
    KI_TRY(attention(c, err));
    KI_TRY(add_product(c, &y->o, r->attn, &c->norms->post_attn, err));
    ki_cuda_activate(r->act, r->mlp, KI_CUDA_GELU, c->shape->n_rows, config->n_ff, b->type,
                     b->memory.stream);
    return add_product(c, &y->down, r->act, &c->norms->post_ffn, err);
}

/* ---- beginning and end ---- */

static void make_ropes(ki_cuda_backend *b, const ki_cuda_shape *s) {
    const ki_config *c = &b->model->config;
    uint32_t half = c->head_dim / 2;
    for (uint32_t i = 0; i < c->n_ropes; i++) {
        bool moves = c->rope[i].scaling == KI_ROPE_DYNAMIC;
        const float *freq = moves ? at(b, b->upload_at.frequencies) : b->rope_freq + i * half;
        ki_cuda_rope_table(b->buffers.rope + (size_t)i * s->n_rows * c->head_dim, freq,
                           moves ? half : 0, at(b, b->upload_at.positions), s->n_rows, half,
                           (float)c->rope[i].attention, i > 0, b->memory.stream);
    }
}

void ki_cuda_kinds_of(bool has[2], const ki_config *c) {
    has[0] = has[1] = false;
    for (uint32_t i = 0; i < c->n_layers; i++) has[c->local[i]] = true;
}

/* The calls whose plans a pass needs: n of them. */
static uint32_t plans_of(ki_cuda_attend_call out[2], const layer_call *c) {
    const ki_cuda_backend *b = c->b;
    uint32_t n = 0;
    bool has[2];
    ki_cuda_kinds_of(has, &b->model->config);
    if (!b->kernels->plan || !(c->shape->decode || c->shape->n_single)) return 0;
    for (int local = 0; local < 2; local++) {
        if (!has[local]) continue;
        out[n] = attend_of(c, local);
        out[n++].pdl = false; /* kernels of the attention begin to read plans early */
    }
    return n;
}

static ki_cuda_embed_call embed_of(const ki_cuda_backend *b, const ki_cuda_shape *s,
                                   const void *tokens) {
    const ki_config *c = &b->model->config;
    return (ki_cuda_embed_call){.x = b->buffers.x,
                                .embedding = b->model->embedding.tiles,
                                .tokens = tokens,
                                .n_rows = s->n_rows,
                                .n = c->n_embd,
                                .scale = c->embed_scale,
                                .type = b->type};
}

/* One kernel, which reads the host's memory itself. */
static kivi_status begin_decoding(const layer_call *c, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    const ki_config *config = &b->model->config;
    const ki_cuda_upload *u = &b->upload_at;
    uint32_t n = c->shape->n_seqs;
    bool moves = config->rope[0].scaling == KI_ROPE_DYNAMIC;
    ki_cuda_attend_call plans[2];
    layer_call there = *c;
    there.kv.seqs = (const ki_cuda_seq *)(const void *)(b->up + u->seqs);
    there.kv.tables = (const uint32_t *)(const void *)(b->up + u->tables);
    ki_cuda_begin_call call = {
        .from = b->up,
        .to = b->buffers.upload,
        .pieces = {{u->number, sizeof(uint32_t)},
                   {u->seqs, n * sizeof(ki_cuda_seq)},
                   {u->positions, n * sizeof(uint32_t)},
                   {u->logit_rows, n * sizeof(uint32_t)},
                   {u->tables, (size_t)n * c->kv.table_stride * sizeof(uint32_t)},
                   {u->frequencies, moves ? (size_t)n * config->head_dim / 2 * sizeof(float) : 0}},
        .n_pieces = 6,
        .n_plans = plans_of(plans, &there),
        .plans = {&plans[0], &plans[1]},
        .result = b->buffers.result,
        .clear_bytes = b->result_at.row_flags + (n * sizeof(uint32_t) + 255) / 256 * 256,
        .embed = embed_of(b, c->shape, b->up + u->tokens)};
    return ki_cuda_begin_step(&call, b->memory.stream, err);
}

static kivi_status begin_prompts(const layer_call *c, kivi_error *err) {
    const ki_cuda_backend *b = c->b;
    cudaStream_t stream = b->memory.stream;
    ki_cuda_attend_call plans[2];
    KI_TRY(ki_cuda_check(cudaMemsetAsync(b->buffers.result, 0, b->result_at.n_bytes, stream),
                         "results", err));
    for (uint32_t i = 0, n = plans_of(plans, c); i < n; i++)
        KI_TRY(b->kernels->plan(&plans[i], stream, err));
    const ki_cuda_embed_call embed = embed_of(b, c->shape, at(b, b->upload_at.tokens));
    return ki_cuda_embed(&embed, stream, err);
}

/* cuDNN reads values behind a sequence's last row with weight 0: those behind the step's last row
 * may be anything that an earlier step left, an infinity too. */
static kivi_status clear_tail(const ki_cuda_backend *b, const ki_cuda_shape *s, kivi_error *err) {
    size_t kv = (size_t)b->model->config.n_kv_heads * b->model->config.head_dim;
    if (!s->n_whole) return KIVI_OK;
    return ki_cuda_check(cudaMemsetAsync(b->buffers.v_rows + s->n_rows * kv, 0,
                                         KI_SDPA_TAIL_ROWS * kv * sizeof(uint16_t),
                                         b->memory.stream),
                         "rows behind a prompt", err);
}

/* The norm in the product where it can be, as in the layers. */
static kivi_status make_logits(ki_cuda_backend *b, const ki_cuda_shape *s, kivi_error *err) {
    const ki_config *c = &b->model->config;
    const ki_cuda_buffers *r = &b->buffers;
    cudaStream_t stream = b->memory.stream;
    size_t stride = ki_logits_stride(c);
    const uint32_t *rows = at(b, b->upload_at.logit_rows);
    float *logits = r->logits + s->first_logit * stride;
    const ki_matrix *output = &b->model->output;
    /* rows of decoding are in their places */
    const normed_call call = {.norm = &b->output_norm,
                              .weight = output,
                              .n = c->n_vocab,
                              .out = logits,
                              .out_stride = stride};
    layer_call last = {.b = b, .shape = s};
    if (s->decode) {
        KI_TRY(normed_product(&last, &call, err));
    } else {
        ki_cuda_norm_rows(r->last, r->x, rows, &b->output_norm, s->n_logits, c->n_embd, b->type,
                          is_held(b), stream);
        KI_TRY(
            product_to(b, s, logits, stride, output, c->n_vocab, r->last, s->n_logits, false, err));
    }
    const ki_cuda_end_call end = {.logits = logits,
                                  .x = r->x,
                                  .stride = stride,
                                  .rows = rows,
                                  .n_logits = s->n_logits,
                                  .n_vocab = c->n_vocab,
                                  .n_embd = c->n_embd,
                                  .result = r->result,
                                  .at = b->result_at,
                                  .host = s->decode ? b->down : NULL,
                                  .number = at(b, b->upload_at.number),
                                  .n_rows = s->n_rows};
    return ki_cuda_end_step(&end, stream, err);
}

/* ---- between host and device ---- */

kivi_status ki_cuda_put_upload(ki_cuda_backend *b, kivi_error *err) {
    return ki_cuda_check(cudaMemcpyAsync(b->buffers.upload, b->up, b->upload_at.n_bytes,
                                         cudaMemcpyHostToDevice, b->memory.stream),
                         "upload", err);
}

kivi_status ki_cuda_get_result(ki_cuda_backend *b, size_t from, size_t n_bytes, kivi_error *err) {
    return ki_cuda_check(cudaMemcpyAsync(b->down + from, b->buffers.result + from, n_bytes,
                                         cudaMemcpyDeviceToHost, b->memory.stream),
                         "download", err);
}

/* ---- a pass ---- */

kivi_status ki_cuda_run_pass(ki_cuda_backend *b, const ki_cuda_shape *s, kivi_error *err) {
    const ki_config *c = &b->model->config;
    cudaStream_t stream = b->memory.stream;
    layer_call call = {.b = b, .shape = s, .kv = b->kv};
    b->n_streamed = 0, b->n_behind = 2;
    call.kv.n_seqs = s->n_seqs;
    KI_TRY(s->decode ? begin_decoding(&call, err) : begin_prompts(&call, err));
    /* Attention reads plans before it waits: a kernel that begins when all before it have ended
     * stands between. */
    make_ropes(b, s);
    KI_TRY(clear_tail(b, s, err));
    for (call.index = 0; call.index < c->n_layers; call.index++) {
        call.layer = &b->model->layers[call.index];
        call.norms = &b->norms[call.index];
        KI_TRY(c->fused_qkv ? falcon_layer(&call, err) : llama_layer(&call, err));
    }
    KI_TRY(make_logits(b, s, err));
    if (s->decode && b->kernels->close)
        KI_TRY(ki_cuda_check(cudaStreamWaitEvent(stream, b->joined, 0), "pages", err));
    return ki_cuda_check(cudaGetLastError(), "a launch of the pass", err);
}
