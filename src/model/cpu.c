/* cpu.c: the backend that is this process: the pass of pass.c in its arena, the cache's workers. */
#include "backend.h"

typedef struct cpu_backend {
    ki_backend base;
    ki_mem *mem;
    const ki_model *model;
    kivi_cache *cache;
    ki_arena *arena;
} cpu_backend;

static void destroy(ki_backend *b) {
    cpu_backend *c = (cpu_backend *)b;
    ki_free(c->mem, c);
}

static kivi_status check(const ki_backend *b, const ki_config *config, const ki_layout *layout,
                         kivi_error *err) {
    (void)b, (void)config, (void)layout, (void)err; /* a model that was read can run here */
    return KIVI_OK;
}

/* Nothing of another device's. */
static void plan(kivi_memory *out, const ki_backend *b, const ki_config *config,
                 const ki_layout *layout, const ki_backend_sizes *sizes) {
    (void)b, (void)config, (void)layout, (void)sizes;
    *out = (kivi_memory){0};
}

static kivi_status start(ki_backend *b, const ki_model *model, kivi_cache *cache,
                         const ki_backend_sizes *sizes, kivi_error *err) {
    cpu_backend *c = (cpu_backend *)b;
    c->model = model;
    c->cache = cache;
    return ki_arena_create(&c->arena, c->mem, &model->config, sizes->n_rows, sizes->n_logit_rows,
                           sizes->max_items, err);
}

static void stop(ki_backend *b) { ki_arena_destroy(&((cpu_backend *)b)->arena); }

static void forward(ki_backend *b, ki_batch *batch) {
    const cpu_backend *c = (const cpu_backend *)b;
    ki_forward(c->model, c->arena, c->cache, batch);
}

static const float *logits(ki_backend *b, uint32_t row) {
    const cpu_backend *c = (const cpu_backend *)b;
    return ki_arena_logits(c->arena, &c->model->config, row);
}

static const ki_backend_api api = {.destroy = destroy,
                                   .check = check,
                                   .plan = plan,
                                   .start = start,
                                   .stop = stop,
                                   .forward = forward,
                                   .logits = logits};

kivi_status ki_cpu_backend_create(ki_backend **out, ki_mem *mem, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(cpu_backend), err));
    cpu_backend *c = p;
    c->base.api = &api;
    memcpy(c->base.name, "cpu", 4);
    c->mem = mem;
    *out = &c->base;
    return KIVI_OK;
}
