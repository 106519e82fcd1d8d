/* engine.c: a model, its memory and its threads, made once. */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>

/* A device is filled by steps of more rows than a CPU; but logits of all rows are large. */
enum { DEFAULT_STEP_ROWS = 512, DEVICE_STEP_ROWS = 2048 };
enum { MAX_STEP_ROWS = 1 << 16, MAX_SESSIONS = 4096, DEFAULT_REWIND = 16 };

kivi_engine_options kivi_engine_defaults(void) {
    kivi_engine_options o = {0};
    o.kv.rewind_tokens = DEFAULT_REWIND;
    return o;
}

static kivi_status check_options(const kivi_engine_options *o, kivi_error *err) {
    if (!o->model_path) return KI_FAIL(err, ARG, "engine: model_path is missing");
    if (o->step_rows > MAX_STEP_ROWS)
        return KI_FAIL(err, ARG, "engine: %u rows a step, expected at most %d", o->step_rows,
                       MAX_STEP_ROWS);
    if (o->max_sessions > MAX_SESSIONS)
        return KI_FAIL(err, ARG, "engine: %u sessions, expected at most %d", o->max_sessions,
                       MAX_SESSIONS);
    return KIVI_OK;
}

static void fill_info(kivi_engine *e, const ki_file *file) {
    const ki_config *c = &e->model->config;
    kivi_engine_info *i = &e->info;
    const char *slash = strrchr(ki_file_path(file), '/');
    ki_str name;
    bool found = false;
    if (ki_file_kind_get(file) == KI_FILE_GGUF)
        ki_file_str(&name, &found, file, "general.name", NULL);
    if (found)
        snprintf(i->model_name, sizeof i->model_name, "%.*s", (int)KI_MIN(name.n_bytes, (size_t)63),
                 name.bytes);
    else
        snprintf(i->model_name, sizeof i->model_name, "%.63s",
                 slash && slash[1] ? slash + 1 : ki_file_path(file));
    snprintf(i->architecture, sizeof i->architecture, "%s", c->architecture);
    snprintf(i->weight_type, sizeof i->weight_type, "%s", e->model->weight_type);
    i->n_params = e->model->n_params;
    i->n_layers = c->n_layers;
    i->n_embd = c->n_embd;
    i->n_heads = c->n_heads;
    i->n_kv_heads = c->n_kv_heads;
    i->head_dim = c->head_dim;
    i->n_vocab = c->n_vocab;
    i->ctx_tokens = e->options.ctx_tokens;
    i->step_rows = e->options.step_rows;
    i->n_threads = ki_workers_count(e->workers);
    i->isa = e->backend->device ? "cuda" : ki_isa_names[e->cache->kernels->isa];
    snprintf(i->device, sizeof i->device, "%s", e->backend->name);
    i->kv = e->cache->layout.kv;
}

static kivi_cache_geometry geometry_of(const ki_config *c, const kivi_kv_options *kv) {
    return (kivi_cache_geometry){.n_layers = c->n_layers,
                                 .n_heads = c->n_heads,
                                 .n_kv_heads = c->n_kv_heads,
                                 .head_dim = c->head_dim,
                                 .window_tokens = ki_config_window(c),
                                 .kv = *kv};
}

static kivi_status layout_of(ki_layout *out, const kivi_engine *e, const kivi_kv_options *kv,
                             kivi_error *err) {
    kivi_cache_geometry g = geometry_of(&e->model->config, kv);
    KI_TRY(ki_layout_init(out, &g, err));
    if (e->backend->adapt) e->backend->adapt(out);
    return KIVI_OK;
}

static kivi_status make_cache(kivi_engine *e, const ki_backend_sizes *sizes, kivi_error *err) {
    kivi_engine_options *o = &e->options;
    ki_layout layout;
    ki_cache_options co = {.mem = &e->mem,
                           .workers = e->workers,
                           .device = e->backend->device,
                           .adapt = e->backend->adapt,
                           .max_sequences = o->max_sessions,
                           .max_tokens = o->ctx_tokens};
    co.geometry = geometry_of(&e->model->config, &o->kv);
    KI_TRY(layout_of(&layout, e, &o->kv, err));
    size_t page_bytes = (size_t)layout.n_layers * layout.n_kv_heads * layout.page_bytes;
    uint64_t n_pages =
        (uint64_t)o->max_sessions * ki_layout_pages(&layout, o->ctx_tokens, o->step_rows);
    if (o->kv_bytes) n_pages = o->kv_bytes / page_bytes;
    if (n_pages == 0)
        return KI_FAIL(err, ARG, "engine: kv_bytes %llu, expected at least those of a page, %zu",
                       (unsigned long long)o->kv_bytes, page_bytes);
    if (n_pages > UINT32_MAX / KI_PAGE_TOKENS)
        return KI_FAIL(err, ARG, "engine: %u sessions of %u tokens are too many", o->max_sessions,
                       o->ctx_tokens);
    KI_TRY(e->backend->api->check(e->backend, &e->model->config, &layout, err));
    KI_TRY(ki_engine_check_plan(e, &layout, (uint32_t)n_pages, sizes, err));
    co.geometry.n_pages = (uint32_t)n_pages;
    co.geometry.max_step_rows = o->step_rows;
    KI_TRY(ki_isa_choose(&co.isa, o->disable, err));
    return ki_cache_create(&e->cache, &co, err);
}

static kivi_status make_memory(kivi_engine *e, kivi_error *err) {
    const kivi_engine_options *o = &e->options;
    ki_backend_sizes sizes = {.n_rows = o->step_rows,
                              .n_logit_rows = o->logit_rows,
                              .max_items = o->max_sessions,
                              .max_tokens = o->ctx_tokens};
    void *p;
    KI_TRY(make_cache(e, &sizes, err));
    KI_TRY(e->backend->api->start(e->backend, e->model, e->cache, &sizes, err));
    KI_TRY(ki_alloc_array(&p, &e->mem, KI_TAG_other, o->max_sessions, sizeof(ki_batch_item), err));
    e->batch = p;
    KI_TRY(
        ki_alloc_array(&p, &e->mem, KI_TAG_other, o->max_sessions, sizeof(kivi_step_item *), err));
    e->owners = p;
    return KIVI_OK;
}

static uint32_t default_step_rows(const kivi_engine *e) {
    const kivi_engine_options *o = &e->options;
    if (!e->backend->device || o->all_logits || o->ctx_tokens < DEFAULT_STEP_ROWS)
        return DEFAULT_STEP_ROWS;
    return KI_MIN(o->ctx_tokens, (uint32_t)DEVICE_STEP_ROWS);
}

static void fill_defaults(kivi_engine *e) {
    kivi_engine_options *o = &e->options;
    const ki_config *c = &e->model->config;
    if (!o->ctx_tokens) o->ctx_tokens = c->ctx_tokens;
    if (!o->max_sessions) o->max_sessions = 1;
    if (!o->step_rows) o->step_rows = default_step_rows(e);
    if (o->all_logits) o->logit_rows = o->step_rows;
    o->logit_rows = KI_MAX(o->logit_rows, o->max_sessions);
}

static kivi_status rope_type_of(ki_weight *out, const char *name, kivi_error *err) {
    *out = KI_WEIGHT_F32;
    if (!name || !strcmp(name, "f32")) return KIVI_OK;
    *out = !strcmp(name, "f16") ? KI_WEIGHT_F16 : KI_WEIGHT_BF16;
    if (*out == KI_WEIGHT_F16 || !strcmp(name, "bf16")) return KIVI_OK;
    return KI_FAIL(err, ARG, "engine: rope_type '%s', expected f32, bf16 or f16", name);
}

static kivi_status engine_init(kivi_engine *e, const ki_file *file, kivi_error *err) {
    unsigned n_threads = e->options.n_threads ? e->options.n_threads : ki_cpu_count();
    ki_model_options mo = {.dummy = e->options.dummy_weights,
                           .dummy_seed = e->options.dummy_seed,
                           .dummy_type = e->options.dummy_type};
    KI_TRY(ki_engine_open_backend(e, err));
    mo.device = e->backend->device;
    mo.matrix_device = e->backend->matrix_device;
    KI_TRY(rope_type_of(&mo.rope_type, e->options.rope_type, err));
    KI_TRY(ki_workers_create(&e->workers, &e->mem, n_threads, err));
    KI_TRY(ki_model_load(&e->model, &e->mem, file, e->workers, &mo, err));
    fill_defaults(e);
    KI_TRY(ki_engine_load_vocab(e, file, err));
    KI_TRY(make_memory(e, err));
    fill_info(e, file);
    return KIVI_OK;
}

kivi_status kivi_engine_create(kivi_engine **out, const kivi_engine_options *options,
                               kivi_error *err) {
    ki_mem first;
    void *p;
    *out = NULL;
    KI_TRY(check_options(options, err));
    ki_mem_init(&first);
    KI_TRY(ki_alloc(&p, &first, KI_TAG_other, sizeof(kivi_engine), err));
    kivi_engine *e = p;
    ki_mem_init(&e->mem);
    ki_mem_count(&e->mem, KI_TAG_other, (int64_t)sizeof(kivi_engine)); /* its own block, too */
    atomic_fetch_add(&e->mem.n_blocks, 1);
    if (options->fail_after) atomic_store(&e->mem.fail_countdown, (int64_t)options->fail_after);
    e->options = *options;
    ki_file *file = NULL;
    ki_fpu fpu = ki_fpu_enter();
    kivi_status status = options->dummy_weights
                             ? ki_file_open_shape(&file, &e->mem, options->model_path, err)
                             : ki_file_open(&file, &e->mem, options->model_path, err);
    if (status == KIVI_OK) status = engine_init(e, file, err);
    ki_file_close(&file);
    ki_fpu_leave(fpu);
    e->options.model_path = NULL; /* the caller's string need not outlive this call */
    e->options.disable = e->options.rope_type = e->options.dummy_type = NULL;
    e->options.device = e->options.compute_type = NULL;
    if (status != KIVI_OK) kivi_engine_destroy(&e);
    *out = e;
    return status;
}

void kivi_engine_destroy(kivi_engine **engine) {
    kivi_engine *e = *engine;
    ki_mem last;
    if (!e) return;
    ki_free(&e->mem, e->batch);
    ki_free(&e->mem, e->owners);
    if (e->backend) e->backend->api->stop(e->backend);
    kivi_cache_destroy(&e->cache);
    kivi_vocab_destroy(&e->vocab);
    ki_model_destroy(&e->model);
    ki_engine_close_backend(e);
    ki_workers_destroy(&e->workers);
    ki_mem_init(&last); /* the engine's own block cannot be counted out of itself */
    ki_free(&last, e);
    *engine = NULL;
}

const kivi_engine_info *kivi_engine_info_get(const kivi_engine *engine) { return &engine->info; }

kivi_memory kivi_engine_memory(const kivi_engine *engine) {
    kivi_memory sum = ki_mem_report(&engine->mem), there = kivi_engine_device_memory(engine);
#define X(name) sum.name += there.name;
    KIVI_TAG_LIST(X)
#undef X
    return sum;
}

kivi_memory kivi_engine_device_memory(const kivi_engine *engine) {
    const ki_device *device = engine->backend->device;
    return device ? ki_mem_report(device->mem) : (kivi_memory){0};
}

double kivi_engine_bits(const kivi_engine *engine) {
    return kivi_kv_bits(&engine->info.kv, engine->info.head_dim);
}

void kivi_engine_counters(const kivi_engine *engine, uint64_t *n_nonfinite, uint64_t *n_saturated) {
    if (n_nonfinite) *n_nonfinite = atomic_load(&engine->cache->n_nonfinite);
    if (n_saturated) *n_saturated = atomic_load(&engine->cache->n_saturated);
}

kivi_status kivi_engine_plan(kivi_memory *out, double *n_bits_out, const kivi_engine *engine,
                             const kivi_kv_options *kv, uint32_t ctx_tokens, kivi_error *err) {
    ki_layout layout;
    KI_TRY(layout_of(&layout, engine, kv, err));
    uint32_t n_pages = ki_layout_pages(&layout, ctx_tokens, engine->options.step_rows);
    if (!ki_layout_plan(out, &layout, n_pages, 1))
        return KI_FAIL(err, ARG, "plan: %u tokens are too many", ctx_tokens);
    kivi_memory held = kivi_engine_memory(engine);
    out->weights = held.weights;
    out->activations = held.activations;
    out->workspace = held.workspace;
    out->other = held.other;
    if (n_bits_out) *n_bits_out = kivi_kv_bits(&layout.kv, layout.head_dim);
    return KIVI_OK;
}
