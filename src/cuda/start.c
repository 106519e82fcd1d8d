/* start.c: all memory of the steps, the choice of products' kernels, and the graphs, made once. */
#include "cuda_private.h"

#include <stdio.h>

/* ---- vectors ---- */

typedef struct vector_copy { /* norms and biases on their way into one block */
    ki_cuda_backend *b;
    size_t at;
    kivi_status status;
    kivi_error *err;
} vector_copy;

static const float *put_vector(vector_copy *v, const float *from, size_t n) {
    float *to = v->b->vectors + v->at;
    const ki_device *d = &v->b->memory.device;
    if (!from || v->status != KIVI_OK) return NULL;
    v->status = d->put(d->context, to, from, n * sizeof *to, v->err);
    v->at += n;
    return to;
}

static ki_cuda_norm put_norm(vector_copy *v, const ki_norm *norm) {
    uint32_t n = v->b->model->config.n_embd;
    return (ki_cuda_norm){.weight = put_vector(v, norm->weight, n),
                          .bias = put_vector(v, norm->bias, n),
                          .eps = v->b->model->config.norm_eps};
}

static kivi_status put_vectors(ki_cuda_backend *b, kivi_error *err) {
    const ki_model *m = b->model;
    const ki_config *c = &m->config;
    vector_copy v = {.b = b, .err = err};
    uint32_t d = c->head_dim;
    for (uint32_t i = 0; i < c->n_layers; i++) {
        const ki_layer *y = &m->layers[i];
        b->norms[i] = (ki_cuda_norms){.attn = put_norm(&v, &y->attn_norm),
                                      .ffn = put_norm(&v, &y->ffn_norm),
                                      .post_attn = put_norm(&v, &y->post_attn_norm),
                                      .post_ffn = put_norm(&v, &y->post_ffn_norm)};
        b->norms[i].heads = (ki_cuda_heads){
            .bias = put_vector(&v, y->qkv_bias, (c->n_heads + 2 * c->n_kv_heads) * (size_t)d),
            .q_weight = put_vector(&v, y->q_norm.weight, d),
            .k_weight = put_vector(&v, y->k_norm.weight, d),
            .n_heads = c->n_heads,
            .n_kv_heads = c->n_kv_heads,
            .head_dim = d,
            .eps = c->norm_eps};
    }
    b->output_norm = put_norm(&v, &m->output_norm);
    b->rope_freq = b->vectors + v.at;
    put_vector(&v, m->rope_freq, (size_t)c->n_ropes * d / 2);
    return v.status;
}

/* ---- memory ---- */

static void place_buffers(ki_cuda_backend *b, const ki_cuda_sizes *s) {
    uint8_t *base = b->arena;
    void *out[] = {&b->buffers.x,      &b->buffers.qkv,    &b->buffers.mlp,   &b->buffers.delta,
                   &b->buffers.logits, &b->buffers.rope,   &b->buffers.h,     &b->buffers.attn,
                   &b->buffers.act,    &b->buffers.last,   &b->buffers.q16,   &b->buffers.k_rows,
                   &b->buffers.v_rows, &b->buffers.upload, &b->buffers.result};
    for (size_t i = 0; i < sizeof out / sizeof *out; i++) {
        uint8_t *p = base + s->offsets[i];
        memcpy(out[i], &p, sizeof p);
    }
    b->buffers.sums = b->workspace + s->gemm_bytes;
    b->buffers.plan[0] = b->buffers.sums + s->stream_bytes;
    b->buffers.plan[1] = b->buffers.plan[0] + s->plan_bytes;
    b->buffers.scratch = b->buffers.plan[1] + s->plan_bytes;
    b->scratch_bytes = s->scratch_bytes;
    b->upload_at = s->upload;
    b->result_at = s->result;
}

static kivi_status take(void *out, const ki_cuda_backend *b, ki_tag tag, size_t n_bytes,
                        kivi_error *err) {
    const ki_device *d = &b->memory.device;
    void *p;
    KI_TRY(d->alloc(&p, d->context, tag, n_bytes, err));
    memcpy(out, &p, sizeof p);
    return KIVI_OK;
}

static kivi_status take_host(ki_cuda_backend *b, const ki_cuda_sizes *s, kivi_error *err) {
    size_t logits;
    void *p;
    if (!ki_mul(&logits, s->n_logits, ki_logits_stride(&b->model->config) * sizeof(float)))
        return KI_FAIL(err, NOMEM, "cuda: %u rows of logits overflow", s->n_logits);
    KI_TRY(ki_alloc_array(&p, b->host, KI_TAG_other, b->model->config.n_layers,
                          sizeof(ki_cuda_norms), err));
    b->norms = p;
    KI_TRY(ki_alloc(&p, b->host, KI_TAG_activations, logits, err));
    b->host_logits = p;
    KI_TRY(ki_alloc_array(&p, b->host, KI_TAG_activations, s->n_logits, sizeof(uint64_t), err));
    b->fetched = p;
    KI_TRY(ki_alloc_array(&p, b->host, KI_TAG_other, b->sizes.max_items, sizeof *b->chosen, err));
    b->chosen = p;
    KI_TRY(ki_cuda_check(cudaMallocHost(&p, s->upload.all_bytes), "pinned memory", err));
    memset(p, 0, s->upload.all_bytes);
    b->up = p;
    KI_TRY(ki_cuda_check(cudaMallocHost(&p, s->result.all_bytes), "pinned memory", err));
    memset(p, 0, s->result.all_bytes);
    b->down = p;
    ki_mem_count(b->host, KI_TAG_activations, (int64_t)(s->upload.all_bytes + s->result.all_bytes));
    return KIVI_OK;
}

static kivi_status take_all(ki_cuda_backend *b, kivi_error *err) {
    const ki_config *c = &b->model->config;
    ki_cuda_sizes s;
    if (!ki_cuda_sizes_of(&s, b, c, &b->layout, &b->sizes))
        return KI_FAIL(err, NOMEM, "cuda: %u rows a step overflow", b->sizes.n_rows);
    KI_TRY(take(&b->arena, b, KI_TAG_activations, s.arena_bytes, err));
    KI_TRY(take(&b->workspace, b, KI_TAG_workspace,
                s.gemm_bytes + s.stream_bytes + 2 * s.plan_bytes + s.scratch_bytes, err));
    KI_TRY(take(&b->vectors, b, KI_TAG_weights, s.vector_floats * sizeof(float), err));
    KI_TRY(take_host(b, &s, err));
    place_buffers(b, &s);
    b->kv = (ki_cuda_cache){
        .layout = b->layout,
        .pool = b->cache->pool.data,
        .tables = (const uint32_t *)(void *)(b->buffers.upload + s.upload.tables),
        .table_stride = (b->sizes.max_tokens + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS,
        .seqs = (const ki_cuda_seq *)(void *)(b->buffers.upload + s.upload.seqs),
        .counters = (ki_cuda_counters *)(void *)(b->buffers.result + s.result.counters),
        .shared_bytes = b->shared_bytes,
        .n_sms = b->n_sms};
    return KIVI_OK;
}

/* ---- products ---- */

static kivi_status prepare_shapes(ki_cuda_backend *b, const ki_gemm_timing *timing,
                                  kivi_error *err) {
    const ki_config *c = &b->model->config;
    uint32_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    uint32_t ff = c->no_gate ? c->n_ff : 2 * c->n_ff;
    const ki_gemm_shape shapes[] = {
        {q + 2 * kv, c->n_embd, q + 2 * kv}, /* q, k and v */
        {c->n_embd, q, c->n_embd},           /* o */
        {ff, c->n_embd, ff},                 /* gate and up */
        {c->n_embd, c->n_ff, c->n_embd},     /* down */
    };
    const ki_gemm_shape output = {c->n_vocab, c->n_embd, ki_logits_stride(c)};
    uint32_t rows = KI_MAX(b->sizes.n_rows, ki_cuda_bucket(b->sizes.max_items));
    uint32_t logits = KI_MAX(b->sizes.n_logit_rows, ki_cuda_bucket(b->sizes.max_items));
    KI_TRY(ki_gemm_create(&b->gemm, b->host, b->workspace, (ki_gemm_type)b->type, timing, err));
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        KI_TRY(ki_gemm_prepare(b->gemm, &shapes[i], rows, err));
    return ki_gemm_prepare(b->gemm, &output, logits, err);
}

/* Kernels that were measured may be others at the next start: not in the batch-invariant mode,
 * where what a sequence says is to be the same from start to start, too. */
static kivi_status prepare_products(ki_cuda_backend *b, kivi_error *err) {
    enum { SCRATCH_BYTES = 1 << 30 };
    ki_gemm_timing timing = {.n_bytes = SCRATCH_BYTES,
                             .stream = b->memory.stream,
                             .log = b->log,
                             .log_user = b->log_user};
    if (ki_cuda_stream_rows(b)) KI_TRY(ki_stream_create(&b->few, b->host, err));
    if (!(b->without & KI_PART_RANKING) || b->invariant) return prepare_shapes(b, NULL, err);
    KI_TRY(take(&timing.scratch, b, KI_TAG_workspace, timing.n_bytes, err));
    kivi_status status = prepare_shapes(b, &timing, err);
    b->memory.device.free(b->memory.device.context, timing.scratch);
    return status;
}

/* ---- attention of prompts ---- */

static void log_attention(const ki_cuda_backend *b, const char *who, const char *why) {
    char line[400];
    if (!b->log) return;
    snprintf(line, sizeof line, "cuda attention of prompts: %s%s", who, why);
    b->log(b->log_user, line);
}

/* cuDNN's for prompts that are long enough, if it is there and has kernels; else our own, which
 * serves all, and the log says why. */
static kivi_status prepare_sdpa(ki_cuda_backend *b, kivi_error *err) {
    const ki_config *c = &b->model->config;
    kivi_error why = {0};
    ki_sdpa_options o = {.mem = b->host,
                         .n_heads = c->n_heads,
                         .n_kv_heads = c->n_kv_heads,
                         .head_dim = c->head_dim,
                         .min_rows = KI_SDPA_MIN_ROWS,
                         .max_rows = KI_MIN(b->sizes.n_rows, (uint32_t)KI_SDPA_MAX_ROWS),
                         .compute_major = b->compute_major,
                         .workspace_bytes = KI_GEMM_WORKSPACE_BYTES};
    if (!ki_cuda_wants_sdpa(b, &b->layout, &b->sizes)) return KIVI_OK;
    bool has[2];
    ki_cuda_kinds_of(has, c);
    if (has[0]) o.windows[o.n_windows++] = 0;
    if (has[1]) o.windows[o.n_windows++] = c->window;
    kivi_status status = ki_sdpa_create(&b->sdpa, &o, &why);
    if (status == KIVI_OK) log_attention(b, ki_sdpa_name(b->sdpa), "");
    else log_attention(b, "our own, ", why.text);
    if (status == KIVI_OK || status == KIVI_UNSUPPORTED || status == KIVI_DEVICE) return KIVI_OK;
    if (err) *err = why;
    return status;
}

/* ---- graphs ---- */

static kivi_status capture(ki_cuda_backend *b, uint32_t n_seqs, int index, kivi_error *err) {
    ki_cuda_shape shape = {
        .n_rows = n_seqs, .n_seqs = n_seqs, .max_rows = 1, .n_logits = n_seqs, .decode = true};
    cudaStream_t stream = b->memory.stream;
    cudaGraph_t graph = NULL;
    shape.split_tokens = ki_cuda_split_of(b, &b->layout, n_seqs, b->sizes.max_tokens);
    KI_TRY(ki_cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                         "capture", err));
    kivi_status status = ki_cuda_run_pass(b, &shape, err);
    cudaError_t code = cudaStreamEndCapture(stream, &graph);
    if (status == KIVI_OK) status = ki_cuda_check(code, "capture", err);
    if (status == KIVI_OK)
        status = ki_cuda_check(cudaGraphInstantiate(&b->graphs[index], graph, 0), "graph", err);
    if (status == KIVI_OK)
        status = ki_cuda_check(cudaGraphUpload(b->graphs[index], stream), "graph", err);
    if (graph) cudaGraphDestroy(graph);
    return status;
}

/* Where a batch's size must not show, and more rows come than stream.h takes (or it has none), all
 * passes of decoding have products of as many rows as the largest. */
static uint32_t fixed_rows_of(const ki_cuda_backend *b) {
    uint32_t most = ki_cuda_bucket(b->sizes.max_items);
    if (!b->invariant || (most <= KI_STREAM_ROWS && ki_cuda_stream_rows(b))) return 0;
    return ki_gemm_rows(most);
}

static kivi_status make_side(ki_cuda_backend *b, kivi_error *err) {
    const unsigned flags = cudaEventDisableTiming;
    KI_TRY(
        ki_cuda_check(cudaStreamCreateWithFlags(&b->side, cudaStreamNonBlocking), "stream", err));
    KI_TRY(ki_cuda_check(cudaEventCreateWithFlags(&b->forked, flags), "event", err));
    return ki_cuda_check(cudaEventCreateWithFlags(&b->joined, flags), "event", err);
}

kivi_status ki_cuda_start(ki_cuda_backend *b, kivi_error *err) {
    b->fixed_rows = fixed_rows_of(b);
    ki_cuda_weights_done(&b->weights);
    KI_TRY(make_side(b, err));
    KI_TRY(take_all(b, err));
    KI_TRY(put_vectors(b, err));
    KI_TRY(prepare_products(b, err));
    KI_TRY(prepare_sdpa(b, err));
    /* Once outside of a graph: kernels are loaded then, and what they lack shows. */
    ki_cuda_shape one = {.n_rows = 1, .n_seqs = 1, .max_rows = 1, .n_logits = 1, .decode = true};
    one.split_tokens = ki_cuda_split_of(b, &b->layout, 1, b->sizes.max_tokens);
    KI_TRY(
        ki_cuda_check(cudaMemsetAsync(b->buffers.upload, 0, b->upload_at.n_bytes, b->memory.stream),
                      "upload", err));
    KI_TRY(ki_cuda_check(
        cudaMemsetAsync(b->buffers.sums, 0, KI_STREAM_COUNTER_BYTES, b->memory.stream),
        "counters of products", err));
    KI_TRY(ki_cuda_run_pass(b, &one, err));
    KI_TRY(ki_cuda_check(cudaStreamSynchronize(b->memory.stream), "first pass", err));
    uint32_t last = ki_cuda_bucket(b->sizes.max_items);
    int i = 0;
    for (uint32_t n = 1; n <= last && i < KI_MAX_BUCKETS; n *= 2, i++)
        KI_TRY(capture(b, n, i, err));
    return ki_cuda_check(cudaStreamSynchronize(b->memory.stream), "start", err);
}

void ki_cuda_stop(ki_cuda_backend *b) {
    const ki_device *d = &b->memory.device;
    if (b->memory.stream) cudaStreamSynchronize(b->memory.stream);
    for (int i = 0; i < KI_MAX_BUCKETS; i++)
        if (b->graphs[i]) cudaGraphExecDestroy(b->graphs[i]);
    memset(b->graphs, 0, sizeof b->graphs);
    if (b->joined) cudaEventDestroy(b->joined);
    if (b->forked) cudaEventDestroy(b->forked);
    if (b->side) cudaStreamDestroy(b->side);
    b->joined = b->forked = NULL, b->side = NULL;
    ki_gemm_destroy(&b->gemm);
    ki_stream_destroy(&b->few);
    ki_sdpa_destroy(&b->sdpa);
    d->free(d->context, b->arena);
    d->free(d->context, b->workspace);
    d->free(d->context, b->vectors);
    b->arena = b->workspace = NULL;
    b->vectors = NULL;
    if (b->down)
        ki_mem_count(b->host, KI_TAG_activations,
                     -(int64_t)(b->upload_at.all_bytes + b->result_at.all_bytes));
    if (b->up) cudaFreeHost(b->up);
    if (b->down) cudaFreeHost(b->down);
    b->up = b->down = NULL;
    ki_free(b->host, b->norms);
    ki_free(b->host, b->host_logits);
    ki_free(b->host, b->fetched);
    ki_free(b->host, b->chosen);
    b->norms = NULL, b->host_logits = NULL, b->fetched = NULL, b->chosen = NULL;
}
