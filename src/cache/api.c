/* api.c: creating a cache, and kivi_cache.h's calls on one sequence over the batch calls of
 * cache.h. */
#include "cache.h"

kivi_cache_geometry kivi_cache_defaults(void) {
    kivi_cache_geometry g = {0};
    g.kv.rewind_tokens = 16;
    return g;
}

static kivi_status cache_init(kivi_cache *c, const ki_cache_options *o, kivi_error *err) {
    c->kernels = ki_kernels_get(o->isa);
    c->max_step_rows = o->geometry.max_step_rows ? o->geometry.max_step_rows : 512;
    c->device = o->device;
    KI_TRY(ki_layout_init(&c->layout, &o->geometry, err));
    if (o->adapt) o->adapt(&c->layout);
    c->workers = o->workers;
    if (!c->workers) {
        unsigned n = o->geometry.n_threads ? o->geometry.n_threads : ki_cpu_count();
        KI_TRY(ki_workers_create(&c->workers, c->mem, n, err));
        c->owns_workers = true;
    }
    c->max_seq_pages = (o->max_tokens + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS;
    if (!c->layout.window) c->max_seq_pages = o->geometry.n_pages;
    KI_TRY(ki_pool_init(&c->pool, c->mem, c->device, &c->layout, o->geometry.n_pages, err));
    if (c->device) return KIVI_OK; /* its own kernels have their own workspace */
    return ki_attn_work_create(&c->work, c->mem, o, &c->layout, ki_workers_count(c->workers), err);
}

kivi_status ki_cache_create(kivi_cache **out, const ki_cache_options *options, kivi_error *err) {
    ki_mem first;
    void *p;
    *out = NULL;
    ki_mem_init(&first);
    ki_mem *mem = options->mem ? options->mem : &first;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(kivi_cache), err));
    kivi_cache *c = p;
    ki_mem_init(&c->own_mem);
    c->mem = options->mem;
    if (!c->mem) { /* its own block is counted where it counts the rest */
        c->mem = &c->own_mem;
        ki_mem_count(c->mem, KI_TAG_other, (int64_t)sizeof(kivi_cache));
        atomic_fetch_add(&c->mem->n_blocks, 1);
    }
    kivi_status status = cache_init(c, options, err);
    if (status != KIVI_OK) kivi_cache_destroy(&c);
    *out = c;
    return status;
}

kivi_status kivi_cache_create(kivi_cache **out, const kivi_cache_geometry *geometry,
                              kivi_error *err) {
    ki_cache_options o = {.geometry = *geometry, .max_sequences = 1};
    *out = NULL;
    if (geometry->n_pages > UINT32_MAX / KI_PAGE_TOKENS)
        return KI_FAIL(err, ARG, "cache: %u pages, expected at most %u", geometry->n_pages,
                       UINT32_MAX / KI_PAGE_TOKENS);
    if (geometry->max_tokens > UINT32_MAX / 4)
        return KI_FAIL(err, ARG, "cache: %u tokens, expected at most %u", geometry->max_tokens,
                       UINT32_MAX / 4);
    o.max_tokens = geometry->max_tokens ? geometry->max_tokens : geometry->n_pages * KI_PAGE_TOKENS;
    KI_TRY(ki_isa_choose(&o.isa, NULL, err));
    return ki_cache_create(out, &o, err);
}

void kivi_cache_destroy(kivi_cache **cache) {
    kivi_cache *c = *cache;
    if (!c) return;
    ki_attn_work_destroy(&c->work, c->mem);
    ki_pool_deinit(&c->pool);
    if (c->owns_workers) ki_workers_destroy(&c->workers);
    ki_mem *mem = c->mem, last;
    if (mem == &c->own_mem) { /* the block cannot count itself out of memory that goes with it */
        ki_mem_init(&last);
        mem = &last;
    }
    ki_free(mem, c);
    *cache = NULL;
}

kivi_memory kivi_cache_memory(const kivi_cache *cache) { return ki_mem_report(cache->mem); }

void kivi_cache_pages(const kivi_cache *cache, uint32_t *n_free, uint32_t *n_all) {
    *n_free = cache->pool.n_free;
    *n_all = cache->pool.n_pages;
}

/* One layer's rows as ki_append_head wants them: float32, a head at a time. */
static kivi_status append_f32(kivi_seq *seq, uint32_t layer, const float *k, const float *v,
                              kivi_error *err) {
    const ki_layout *l = &seq->cache->layout;
    for (uint32_t h = 0; h < l->n_kv_heads; h++)
        KI_TRY(ki_append_head(seq, layer, h, k + (size_t)h * l->head_dim,
                              v + (size_t)h * l->head_dim, (size_t)l->n_kv_heads * l->head_dim,
                              ki_attn_work_scratch(seq->cache->work, 0), err));
    return KIVI_OK;
}

/* float16 rows become float32 and back: exact, and the window's bytes are those that came. */
static kivi_status append_f16(kivi_seq *seq, uint32_t layer, const uint16_t *k, const uint16_t *v,
                              kivi_error *err) {
    const ki_layout *l = &seq->cache->layout;
    size_t n = (size_t)seq->step_rows * l->n_kv_heads * l->head_dim;
    void *p;
    KI_TRY(ki_alloc_array(&p, seq->cache->mem, KI_TAG_activations, n, 2 * sizeof(float), err));
    float *kf = p, *vf = kf + n;
    for (size_t i = 0; i < n; i++) kf[i] = ki_f16_to_f32(k[i]), vf[i] = ki_f16_to_f32(v[i]);
    kivi_status status = append_f32(seq, layer, kf, vf, err);
    ki_free(seq->cache->mem, p);
    return status;
}

static kivi_status check_step(const kivi_seq *seq, uint32_t layer, kivi_error *err) {
    if (!seq->step_rows) return KI_FAIL(err, ARG, "sequence: no step is open");
    if (layer >= seq->cache->layout.n_layers)
        return KI_FAIL(err, ARG, "sequence: layer %u of %u", layer, seq->cache->layout.n_layers);
    return KIVI_OK;
}

kivi_status kivi_seq_append(kivi_seq *seq, uint32_t layer, const void *k, const void *v,
                            kivi_float type, kivi_error *err) {
    KI_TRY(check_step(seq, layer, err));
    ki_fpu fpu = ki_fpu_enter();
    kivi_status status =
        type == KIVI_F32 ? append_f32(seq, layer, k, v, err) : append_f16(seq, layer, k, v, err);
    ki_fpu_leave(fpu);
    return status;
}

kivi_status kivi_seq_attend(kivi_seq *seq, uint32_t layer, const float *q, float *out,
                            kivi_error *err) {
    KI_TRY(check_step(seq, layer, err));
    const ki_layout *l = &seq->cache->layout;
    size_t stride = (size_t)l->n_heads * l->head_dim;
    ki_attend_item item = {.seq = seq,
                           .n_rows = seq->step_rows,
                           .q = q,
                           .out = out,
                           .q_stride = stride,
                           .out_stride = stride};
    ki_fpu fpu = ki_fpu_enter();
    ki_attend_batch(seq->cache, &item, 1, layer, l->window);
    ki_fpu_leave(fpu);
    return KIVI_OK;
}
