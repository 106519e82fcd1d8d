/* append.c: new rows go into the 16-bit store, and what fell behind the line becomes codes. */
#include "cache.h"

/* Scratch: one row of k and v as float16, and one group of keys with its codes. */
typedef struct append_scratch {
    uint16_t *k, *v, *group; /* [D], [D], [D][G] f16 */
    uint8_t *codes;          /* [D][G] */
} append_scratch;

size_t ki_append_scratch_bytes(const ki_layout *l) {
    size_t group = (size_t)l->head_dim * l->kv.group;
    return (size_t)l->head_dim * 4 + group * 2 + group + 256;
}

static append_scratch carve(void *memory, const ki_layout *l) {
    append_scratch s;
    s.k = memory;
    s.v = s.k + l->head_dim;
    s.group = s.v + l->head_dim;
    s.codes = (uint8_t *)(s.group + (size_t)l->head_dim * l->kv.group);
    return s;
}

/* The first n_sinks slots of each channel of a group: before quantizing a copy of the next one, so
 * that they do not count in the range; their codes, which nobody reads, are 0. */
static void hide_sinks(const append_scratch *s, const ki_layout *l, uint32_t n_sinks) {
    for (uint32_t c = 0; c < l->head_dim; c++) {
        uint16_t *x = s->group + (size_t)c * l->kv.group;
        for (uint32_t i = 0; i < n_sinks; i++) x[i] = x[n_sinks];
    }
}
static void clear_sink_codes(const append_scratch *s, const ki_layout *l, uint32_t n_sinks) {
    for (uint32_t c = 0; n_sinks && c < l->head_dim; c++)
        memset(s->codes + (size_t)c * l->kv.group, 0, n_sinks);
}

/* Keys [first, first + G) of one head: gathered channel by channel, quantized, packed. */
static void pack_key_group(kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t first,
                           const append_scratch *s) {
    const kivi_cache *cache = seq->cache;
    const ki_layout *l = &cache->layout;
    uint32_t group = l->kv.group, in_page = first % KI_PAGE_TOKENS;
    uint32_t n_sinks = l->kv.sink_tokens > first ? l->kv.sink_tokens - first : 0; /* < G */
    for (uint32_t b = 0; b < group / KI_LANES; b++) {
        const uint16_t *block = ki_seq_k_block(seq, layer, head, first / KI_LANES + b);
        for (uint32_t c = 0; c < l->head_dim; c++)
            memcpy(s->group + (size_t)c * group + b * KI_LANES, block + c * KI_LANES, KI_LANES * 2);
    }
    hide_sinks(s, l, n_sinks);
    uint8_t *page = ki_seq_page(seq, first / KI_PAGE_TOKENS, layer, head);
    size_t at = (size_t)(in_page / group) * l->head_dim;
    cache->kernels->quant.quantize(s->codes, (uint16_t *)(page + l->k_scale_at) + at,
                                   (uint16_t *)(page + l->k_zero_at) + at, s->group, l->head_dim,
                                   group, l->kv.k_bits);
    clear_sink_codes(s, l, n_sinks);
    ki_pack_keys((uint32_t *)(page + l->k_codes_at), s->codes, in_page, group, l->head_dim,
                 l->kv.k_bits);
}

static void pack_value_row(kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t pos,
                           const append_scratch *s) {
    const kivi_cache *cache = seq->cache;
    const ki_layout *l = &cache->layout;
    uint32_t in_page = pos % KI_PAGE_TOKENS, n_groups = l->head_dim / l->kv.group;
    const uint16_t *row =
        ki_seq_v_block(seq, layer, head, pos / KI_LANES) + (size_t)(pos % KI_LANES) * l->head_dim;
    uint8_t *page = ki_seq_page(seq, pos / KI_PAGE_TOKENS, layer, head);
    uint16_t scale[KI_MAX_HEAD_DIM / 16], zero[KI_MAX_HEAD_DIM / 16];
    cache->kernels->quant.quantize(s->codes, scale, zero, row, n_groups, l->kv.group, l->kv.v_bits);
    ki_pack_values((uint32_t *)(page + l->v_codes_at), s->codes, in_page, l->head_dim,
                   l->kv.v_bits);
    for (uint32_t g = 0; g < n_groups; g++) {
        ((uint16_t *)(page + l->v_scale_at))[g * KI_PAGE_TOKENS + in_page] = scale[g];
        ((uint16_t *)(page + l->v_zero_at))[g * KI_PAGE_TOKENS + in_page] = zero[g];
    }
}

static void pack_behind_line(kivi_seq *seq, uint32_t layer, uint32_t head,
                             const append_scratch *s) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t from = seq->n_tokens, to = from + seq->step_rows, sinks = l->kv.sink_tokens;
    uint32_t k_from = KI_MAX(ki_k_packed(l, from), sinks / l->kv.group * l->kv.group);
    for (uint32_t p = k_from; p < ki_k_packed(l, to); p += l->kv.group)
        pack_key_group(seq, layer, head, p, s);
    for (uint32_t p = KI_MAX(ki_v_packed(l, from), sinks); p < ki_v_packed(l, to); p++)
        pack_value_row(seq, layer, head, p, s);
}

kivi_status ki_append_head(kivi_seq *seq, uint32_t layer, uint32_t head, const float *k,
                           const float *v, size_t row_stride, void *scratch, kivi_error *err) {
    kivi_cache *cache = seq->cache;
    append_scratch s = carve(scratch, &cache->layout);
    uint64_t n_saturated = 0;
    for (uint32_t r = 0; r < seq->step_rows; r++) {
        bool k_ok = cache->kernels->quant.to_f16(s.k, &n_saturated, k + r * row_stride,
                                                 cache->layout.head_dim);
        bool v_ok = cache->kernels->quant.to_f16(s.v, &n_saturated, v + r * row_stride,
                                                 cache->layout.head_dim);
        if (!k_ok || !v_ok) {
            atomic_fetch_add(&cache->n_nonfinite, 1);
            return KI_FAIL(
                err, NUMERIC,
                "cache: %s of layer %u, KV head %u, position %u is infinite or not a number",
                k_ok ? "value" : "key", layer, head, seq->n_tokens + r);
        }
        ki_seq_put_row(seq, layer, head, seq->n_tokens + r, s.k, s.v);
    }
    if (n_saturated) atomic_fetch_add(&cache->n_saturated, n_saturated);
    pack_behind_line(seq, layer, head, &s);
    return KIVI_OK;
}
