/* backend.c: what libkivi-cuda.so hands to the engine (backend.h): opening a device, saying what
 * runs on it and what that takes, and the calls of a running engine. */
#include "cuda_private.h"
#include "kv_bench.h"
#include "kv_shared.h"

#include <stdio.h>

enum { MAX_ROWS = 32768 }; /* a grid's second dimension ends at 65,535 */

static ki_cuda_backend *of(const ki_backend *b) { return (ki_cuda_backend *)(uintptr_t)b; }

/* ---- layouts ---- */

/* The parts of a + kind as the kernels have them: all that its bits leave room for. */
static kivi_status check_parts(const ki_layout *l, kivi_error *err) {
    const char *not_whole = ki_plus_not_whole(&l->kv);
    if (!not_whole) return KIVI_OK;
    return KI_FAIL(err, UNSUPPORTED,
                   "cuda: a + kind of cache with %s, expected a whole one; take --device cpu",
                   not_whole);
}

static kivi_cache_geometry geometry_of(const ki_layout *l) {
    return (kivi_cache_geometry){.n_layers = l->n_layers,
                                 .n_heads = l->n_heads,
                                 .n_kv_heads = l->n_kv_heads,
                                 .head_dim = l->head_dim,
                                 .window_tokens = l->window,
                                 .kv = l->kv};
}

static kivi_status layout_of(ki_cuda_layout *out, const ki_layout *l, kivi_error *err) {
    kivi_cache_geometry g = geometry_of(l);
    KI_TRY(check_parts(l, err));
    return ki_cuda_layout_any(out, &g, l->kv.plus != 0, err);
}

/* The policy needs sizes and the length of a block; planes are the kernels' own business. */
static void adapt(ki_layout *l) {
    ki_cuda_layout own;
    if (layout_of(&own, l, NULL) != KIVI_OK) return; /* check refuses it, with the reason */
    l->k_codes_at = l->v_codes_at = l->k_scale_at = l->k_zero_at = 0;
    l->v_scale_at = l->v_zero_at = 0;
    l->page_bytes = own.page_bytes;
    l->page_scale_bytes = own.page_scale_bytes;
    l->block_tokens = KI_SUB_TOKENS;
    l->k_ring_blocks = own.k_ring_blocks;
    l->v_ring_blocks = own.v_ring_blocks;
    l->sink_blocks = own.sink_blocks;
}

static kivi_status check(const ki_backend *b, const ki_config *config, const ki_layout *layout,
                         kivi_error *err) {
    ki_cuda_layout own;
    (void)b;
    if (config->n_embd % 8 || config->n_ff % 8 || config->head_dim % 8)
        return KI_FAIL(err, UNSUPPORTED, "cuda: width %u and %u, expected multiples of 8",
                       config->n_embd, config->n_ff);
    return layout_of(&own, layout, err);
}

static void plan(kivi_memory *out, const ki_backend *backend, const ki_config *config,
                 const ki_layout *layout, const ki_backend_sizes *sizes) {
    const ki_cuda_backend *b = of(backend);
    ki_cuda_layout own;
    ki_cuda_sizes s;
    *out = (kivi_memory){0};
    if (layout_of(&own, layout, NULL) != KIVI_OK) return;
    if (!ki_cuda_sizes_of(&s, b, config, &own, sizes)) {
        out->activations = UINT64_MAX / 4; /* more than any device has */
        return;
    }
    out->weights = s.vector_floats * sizeof(float);
    out->activations = s.arena_bytes;
    out->workspace = s.gemm_bytes + s.stream_bytes + 2 * s.plan_bytes + s.scratch_bytes;
}

/* ---- which kernels ---- */

static const ki_cuda_kernels plain = {.name = "plain",
                                      .append = ki_plain_append,
                                      .prompt_append = ki_plain_append,
                                      .prompt_window = ki_plain_window,
                                      .attend = ki_plain_attend};

/* Attention of a step of decoding takes the step's rows itself. */
static const ki_cuda_kernels fused = {.name = "fused",
                                      .close = ki_cuda_close,
                                      .prompt_append = ki_cuda_prompt_append,
                                      .prompt_window = ki_cuda_prompt_window,
                                      .plan = ki_cuda_decode_plan,
                                      .attend = ki_cuda_decode_attend,
                                      .prompt_attend = ki_cuda_prompt_attend};

bool ki_cuda_is_fused(const ki_cuda_backend *b, const ki_cuda_layout *l, kivi_error *why) {
    if (!(b->without & KI_PART_FUSED)) return !ki_cuda_kernels_fit(l, b->shared_bytes, why);
    (void)KI_FAIL(why, UNSUPPORTED, "cuda: the fused kernels were left out");
    return false;
}

/* The fused kernels wherever they serve; else the plain ones, and the log says why. */
static kivi_status choose_kernels(ki_cuda_backend *b, kivi_error *err) {
    static const char *const types[] = {"float32", "float16", "bfloat16"};
    kivi_error why = {0};
    char line[400];
    b->kernels = &plain;
    if (ki_cuda_is_fused(b, &b->layout, &why)) {
        KI_TRY(ki_cuda_kernels_init(&b->shared_bytes, err));
        b->own_kernels = fused;
        if (b->without & KI_PART_APPEND || b->layout.k_bits == 16 || b->layout.v_bits == 16)
            b->own_kernels.append = ki_cuda_append_rows;
        if (b->without & KI_PART_CLOSE)
            b->own_kernels.append = ki_cuda_append, b->own_kernels.close = NULL;
        b->kernels = &b->own_kernels;
    }
    if (!b->log) return KIVI_OK;
    snprintf(line, sizeof line, "cuda kernels: %s for head size %u, products in %s%s%s",
             b->kernels->name, b->layout.head_dim, types[b->type], why.text[0] ? "; " : "",
             why.text);
    b->log(b->log_user, line);
    return KIVI_OK;
}

static kivi_status start(ki_backend *backend, const ki_model *model, kivi_cache *cache,
                         const ki_backend_sizes *sizes, kivi_error *err) {
    ki_cuda_backend *b = of(backend);
    if (sizes->n_rows > MAX_ROWS)
        return KI_FAIL(err, ARG, "cuda: %u rows a step, expected at most %d", sizes->n_rows,
                       MAX_ROWS);
    cudaSetDevice(b->number);
    b->model = model;
    b->cache = cache;
    b->sizes = *sizes;
    KI_TRY(layout_of(&b->layout, &cache->layout, err));
    KI_TRY(choose_kernels(b, err));
    return ki_cuda_start(b, err);
}

static void stop(ki_backend *backend) {
    cudaSetDevice(of(backend)->number);
    ki_cuda_stop(of(backend));
}

static void forward(ki_backend *backend, ki_batch *batch) {
    cudaSetDevice(of(backend)->number);
    ki_cuda_forward(of(backend), batch);
}

/* Logits stay on the device until somebody asks: a greedy step needs the best one alone. */
static const float *logits(ki_backend *backend, uint32_t row) {
    ki_cuda_backend *b = of(backend);
    size_t stride = ki_logits_stride(&b->model->config);
    float *to = b->host_logits + row * stride;
    const ki_device *d = &b->memory.device;
    if (b->fetched[row] == b->n_steps) return to;
    kivi_status status = d->get(d->context, to, b->buffers.logits + row * stride,
                                b->model->config.n_vocab * sizeof(float), NULL);
    if (status != KIVI_OK) return NULL;
    b->fetched[row] = b->n_steps;
    return to;
}

static kivi_status draw(int32_t *id, ki_backend *backend, uint32_t row, const ki_draw *d,
                        kivi_error *err) {
    cudaSetDevice(of(backend)->number);
    return ki_cuda_draw_one(id, of(backend), row, d, err);
}

static kivi_status exchange(ki_backend *backend, kivi_seq *host, kivi_seq *there, bool to_host,
                            kivi_error *err) {
    return ki_cuda_exchange(of(backend), host, there, to_host, err);
}

static void destroy(ki_backend *backend) {
    ki_cuda_backend *b = of(backend);
    cudaSetDevice(b->number);
    ki_cuda_weights_done(&b->weights);
    ki_cuda_memory_deinit(&b->memory);
    ki_free(b->host, b);
}

static const ki_backend_api api = {destroy, check,  plan, start,   stop,
                                   forward, logits, draw, exchange};

/* ---- opening ---- */

static kivi_status find_device(struct cudaDeviceProp *out, uint32_t number, kivi_error *err) {
    int n = 0;
    cudaError_t code = cudaGetDeviceCount(&n);
    if (code != cudaSuccess || n == 0) {
        (void)cudaGetLastError();
        return KI_FAIL(err, DEVICE, "device cuda:%u: no CUDA device is there (%s)", number,
                       code != cudaSuccess ? cudaGetErrorString(code) : "the driver lists none");
    }
    if (number >= (uint32_t)n)
        return KI_FAIL(err, DEVICE, "device cuda:%u: there are %d, numbered from 0", number, n);
    code = cudaGetDeviceProperties(out, (int)number);
    if (code != cudaSuccess)
        return KI_FAIL(err, DEVICE, "device cuda:%u: %s", number, cudaGetErrorString(code));
    if (out->major == 8 || (out->major == 9 && out->minor == 0)) return KIVI_OK;
    return KI_FAIL(err, DEVICE,
                   "device cuda:%u: %s has compute capability %d.%d, expected 8.x or 9.0", number,
                   out->name, out->major, out->minor);
}

static kivi_status init(ki_cuda_backend *b, const ki_backend_options *o, kivi_error *err) {
    size_t n_free = 0, n_all = 0;
    KI_TRY(ki_cuda_check(cudaSetDevice(b->number), "device", err));
    KI_TRY(ki_cuda_memory_init(&b->memory, b->number, o->mem, o->limit_bytes, err));
    KI_TRY(ki_cuda_check(cudaMemGetInfo(&n_free, &n_all), "device memory", err));
    b->base.free_bytes = n_free;
    ki_cuda_weights_init(&b->weights, &b->memory, b->type);
    return KIVI_OK;
}

static kivi_status open(ki_backend **out, const ki_backend_options *o, kivi_error *err) {
    struct cudaDeviceProp found;
    void *p;
    *out = NULL;
    KI_TRY(find_device(&found, o->device, err));
    KI_TRY(ki_alloc(&p, o->mem, KI_TAG_other, sizeof(ki_cuda_backend), err));
    ki_cuda_backend *b = p;
    *b = (ki_cuda_backend){.host = o->mem,
                           .frequencies = o->frequencies,
                           .number = (int)o->device,
                           .n_sms = (uint32_t)found.multiProcessorCount,
                           .compute_major = (uint32_t)found.major,
                           .shared_bytes = (uint32_t)found.sharedMemPerBlockOptin,
                           .type = (ki_cuda_type)o->compute, /* both begin F32, F16, BF16 */
                           .without = o->without,
                           .invariant = o->invariant,
                           .log = o->log,
                           .log_user = o->log_user};
    b->base = (ki_backend){.api = &api,
                           .device = &b->memory.device,
                           .matrix_device = &b->weights.device,
                           .adapt = adapt,
                           .limit_bytes = o->limit_bytes};
    snprintf(b->base.name, sizeof b->base.name, "cuda:%u %.64s", o->device, found.name);
    kivi_status status = init(b, o, err);
    if (status != KIVI_OK) {
        ki_cuda_memory_deinit(&b->memory);
        ki_free(o->mem, b);
        return status;
    }
    *out = &b->base;
    return KIVI_OK;
}

static kivi_status bench(const kivi_bench_options *o, uint32_t number, kivi_error *err) {
    struct cudaDeviceProp found;
    char name[96];
    KI_TRY(find_device(&found, number, err));
    KI_TRY(ki_cuda_check(cudaSetDevice((int)number), "device", err));
    snprintf(name, sizeof name, "cuda:%u %.64s", number, found.name);
    return ki_cuda_bench_attention(o, name, err);
}

KIVI_API const ki_library *ki_backend_library(void);
KIVI_API const ki_library *ki_backend_library(void) {
    static ki_library library;
    ki_library_fill(&library);
    library.open = open;
    library.bench = bench;
    return &library;
}
