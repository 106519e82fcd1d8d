/* machine.c: an engine as what the scheduler runs on. */
#include "serve.h"

#include <time.h>

static void forward(void *self, ki_batch_item *items, size_t n_items) {
    kivi_engine *e = self;
    ki_batch batch = {.items = items, .n_items = n_items};
    ki_fpu fpu = ki_fpu_enter();
    e->n_steps++; /* logits of any session are overwritten */
    e->backend->api->forward(e->backend, &batch);
    ki_fpu_leave(fpu);
}

static const float *logits(void *self, uint32_t row) {
    kivi_engine *e = self;
    return e->backend->api->logits(e->backend, row);
}

static uint64_t now_us(void *self) {
    struct timespec t;
    (void)self;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

void ki_machine_of_engine(ki_machine *out, kivi_engine *e) {
    const kivi_engine_options *o = &e->options;
    *out = (ki_machine){.cache = e->cache,
                        .n_vocab = e->info.n_vocab,
                        .ctx_tokens = o->ctx_tokens,
                        .step_rows = o->step_rows,
                        .logit_rows = o->logit_rows,
                        .max_items = o->max_sessions,
                        .fingerprint = e->model->fingerprint,
                        .draws = e->backend->api->draw != NULL,
                        .no_prefixes = e->model->config.rope[0].scaling == KI_ROPE_DYNAMIC,
                        .self = e,
                        .forward = forward,
                        .logits = logits,
                        .now_us = now_us};
    if (!e->vocab) return;
    out->ends = e->vocab->ends;
    out->n_ends = e->vocab->n_ends;
}

kivi_status kivi_scheduler_create(kivi_scheduler **out, kivi_engine *engine,
                                  const kivi_scheduler_options *options, kivi_error *err) {
    ki_machine machine;
    ki_machine_of_engine(&machine, engine);
    return ki_scheduler_create(out, &machine, options, err);
}
