/* bench.c: kivi_bench.h: what can be refused is refused here, then the CUDA library measures. */
#include "engine.h"

#include <dlfcn.h>

enum { MAX_KINDS = 16, MAX_REPEATS = 1000 };
enum { MAX_HEADS = 1024, MAX_BATCH = 4096, MAX_TOKENS = 1 << 24 };

const char *kivi_bench_name(kivi_bench_what what) {
    static const char *const names[] = {
#define X(name, text) text,
        KIVI_BENCH_LIST(X)
#undef X
    };
    return (unsigned)what < KIVI_BENCH_N ? names[what] : NULL;
}

static kivi_status check_shape(const kivi_bench_shape *s, kivi_error *err) {
    if (s->n_batch < 1 || s->n_batch > MAX_BATCH)
        return KI_FAIL(err, ARG, "bench: batch %u, expected 1 to %d", s->n_batch, MAX_BATCH);
    if (s->n_kv_heads < 1 || s->n_heads > MAX_HEADS || s->n_heads < s->n_kv_heads ||
        s->n_heads % s->n_kv_heads)
        return KI_FAIL(err, ARG,
                       "bench: %u heads over %u KV heads, expected a multiple, at most %d",
                       s->n_heads, s->n_kv_heads, MAX_HEADS);
    if (s->n_tokens < KI_PAGE_TOKENS || s->n_tokens % KI_PAGE_TOKENS || s->n_tokens > MAX_TOKENS)
        return KI_FAIL(err, ARG, "bench: %u tokens, expected a multiple of %d, at most %d",
                       s->n_tokens, KI_PAGE_TOKENS, MAX_TOKENS);
    return KIVI_OK;
}

/* The kind with what was left 0 filled in, as a cache of that kind has it. */
static kivi_status resolve_kind(kivi_bench_kind *out, const kivi_bench_kind *kind,
                                kivi_error *err) {
    kivi_cache_geometry g = {
        .n_layers = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 128, .kv = kind->kv};
    ki_layout layout;
    KI_TRY(ki_layout_init(&layout, &g, err));
    *out = (kivi_bench_kind){kind->name, layout.kv};
    const char *not_whole = ki_plus_not_whole(&layout.kv);
    if (not_whole)
        return KI_FAIL(err, UNSUPPORTED, "bench: %s with %s, expected a whole + kind", kind->name,
                       not_whole);
    if (layout.kv.group < 32 || layout.kv.residual_tokens % 32)
        return KI_FAIL(err, UNSUPPORTED,
                       "bench: %s: group %u and residual %u, expected multiples of 32", kind->name,
                       layout.kv.group, layout.kv.residual_tokens);
    return KIVI_OK;
}

static kivi_status check(const kivi_bench_options *o, kivi_error *err) {
    if (o->n_repeats < 1 || o->n_repeats > MAX_REPEATS)
        return KI_FAIL(err, ARG, "bench: %u repetitions, expected 1 to %d", o->n_repeats,
                       MAX_REPEATS);
    if (o->n_kinds < 1 || o->n_kinds > MAX_KINDS)
        return KI_FAIL(err, ARG, "bench: %zu kinds of cache, expected 1 to %d", o->n_kinds,
                       MAX_KINDS);
    if (o->measures >> KIVI_BENCH_N)
        return KI_FAIL(err, ARG, "bench: unknown measures %#x", o->measures);
    if (!o->row) return KI_FAIL(err, ARG, "bench: nobody takes the figures");
    for (size_t i = 0; i < o->n_shapes; i++) KI_TRY(check_shape(&o->shapes[i], err));
    return KIVI_OK;
}

kivi_status kivi_bench_attention(const kivi_bench_options *o, kivi_error *err) {
    ki_device_kind kind;
    uint32_t number;
    void *handle = NULL;
    const ki_library *library;
    kivi_bench_kind kinds[MAX_KINDS];
    KI_TRY(ki_device_parse(&kind, &number, o->device, err));
    KI_TRY(check(o, err));
    kivi_bench_options whole = *o;
    whole.kinds = kinds;
    for (size_t i = 0; i < o->n_kinds; i++) KI_TRY(resolve_kind(&kinds[i], &o->kinds[i], err));
    if (kind == KI_DEVICE_CPU)
        return KI_FAIL(err, ARG, "bench: device 'cpu', expected cuda or cuda:N, a GPU's");
    kivi_status status = ki_library_open(&handle, &library, o->device ? o->device : "auto", err);
    if (status == KIVI_OK) status = library->bench(&whole, number, err);
    if (handle) dlclose(handle);
    return status;
}
