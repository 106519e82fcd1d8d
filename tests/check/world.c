#include "world.h"

world world_small(void) {
    world w = {.isa = KI_ISA_SCALAR};
    w.geometry = (kivi_cache_geometry){.n_layers = 2,
                                       .n_heads = 4,
                                       .n_kv_heads = 2,
                                       .head_dim = 32,
                                       .n_pages = 64,
                                       .max_step_rows = 1024,
                                       .n_threads = 1};
    w.geometry.kv = (kivi_kv_options){.residual_tokens = 32, .rewind_tokens = 16};
    if (ki_isa_choose(&w.isa, NULL, NULL) != KIVI_OK) w.isa = KI_ISA_SCALAR;
    return w;
}

kivi_status world_create(kivi_cache **out, const world *w, kivi_error *err) {
    ki_cache_options o = {.geometry = w->geometry, .mem = w->mem, .isa = w->isa};
    o.max_sequences = w->max_sequences ? w->max_sequences : 1;
    o.max_tokens = w->geometry.n_pages * KI_PAGE_TOKENS;
    return ki_cache_create(out, &o, err);
}

const char *world_rule_name(const kivi_kv_options *kv) {
    static char name[32];
    if (kv->rule == KIVI_RULE_SPAN) snprintf(name, sizeof name, "span:%u", kv->span_tokens);
    else snprintf(name, sizeof name, "%s", kv->rule == KIVI_RULE_PAPER ? "paper" : "stream");
    return name;
}

static void random_row(float *row, uint32_t n, uint64_t seed) {
    rng r = rng_make(seed);
    for (uint32_t i = 0; i < n; i++) row[i] = rng_normal(&r);
}

void world_rows(float *k, float *v, float *q, const ki_layout *l, const uint32_t *tokens,
                uint32_t layer, uint32_t pos, uint32_t n) {
    uint32_t kv_floats = l->n_kv_heads * l->head_dim, q_floats = l->n_heads * l->head_dim;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t seed = hash_u64(tokens[pos + i], (uint64_t)layer << 32 | (pos + i));
        float *row = k + (size_t)i * kv_floats;
        if (k) random_row(row, kv_floats, seed);
        for (uint32_t h = 0; k && h < l->n_kv_heads; h++)
            row[h * l->head_dim + l->head_dim / 3] *= 50;
        if (v) random_row(v + (size_t)i * kv_floats, kv_floats, seed + 1);
        if (q) random_row(q + (size_t)i * q_floats, q_floats, seed + 2);
    }
}

size_t world_out_floats(const ki_layout *l, uint32_t n) {
    return (size_t)l->n_layers * n * l->n_heads * l->head_dim;
}

static kivi_status step_layers(kivi_seq *seq, const uint32_t *tokens, uint32_t n, float *out,
                               float *k, kivi_error *err) {
    const ki_layout *l = &seq->cache->layout;
    size_t kv = (size_t)n * l->n_kv_heads * l->head_dim;
    float *v = k + kv, *q = v + kv;
    for (uint32_t layer = 0; layer < l->n_layers; layer++) {
        world_rows(k, v, out ? q : NULL, l, tokens, layer, seq->n_tokens, n);
        KI_TRY(kivi_seq_append(seq, layer, k, v, KIVI_F32, err));
        if (!out) continue;
        KI_TRY(kivi_seq_attend(seq, layer, q, out + (size_t)layer * n * l->n_heads * l->head_dim,
                               err));
    }
    return kivi_seq_commit(seq, err);
}

kivi_status world_step(kivi_seq *seq, const uint32_t *tokens, uint32_t n, float *out,
                       kivi_error *err) {
    const ki_layout *l = &seq->cache->layout;
    KI_TRY(kivi_seq_begin(seq, n, err));
    float *k =
        check_alloc((size_t)n * (2 * l->n_kv_heads + l->n_heads) * l->head_dim * sizeof(float));
    kivi_status status = step_layers(seq, tokens, n, out, k, err);
    free(k);
    if (status != KIVI_OK) kivi_seq_abort(seq);
    return status;
}

uint64_t world_hash(const void *bytes, size_t n_bytes) {
    uint64_t h = 1;
    const uint8_t *p = bytes;
    for (size_t i = 0; i + 8 <= n_bytes; i += 8) {
        uint64_t word;
        memcpy(&word, p + i, 8);
        h = (h ^ word) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return h;
}
