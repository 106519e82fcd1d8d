/* append.c: new rows go into the 16-bit store, and what fell behind the line becomes codes. */
#include "cache.h"

/* Scratch: a value row to be turned, one row of k and v as float16, and one group of keys with its
 * codes. */
typedef struct append_scratch {
    float *turned;           /* [D] */
    uint16_t *k, *v, *group; /* [D], [D], [D][G] f16 */
    uint8_t *codes;          /* [D][G] */
} append_scratch;

size_t ki_append_scratch_bytes(const ki_layout *l) {
    size_t group = (size_t)l->head_dim * l->k_group;
    return (size_t)l->head_dim * 8 + group * 2 + group + 256;
}

static append_scratch carve(void *memory, const ki_layout *l) {
    append_scratch s;
    s.turned = memory;
    s.k = (uint16_t *)(s.turned + l->head_dim);
    s.v = s.k + l->head_dim;
    s.group = s.v + l->head_dim;
    s.codes = (uint8_t *)(s.group + (size_t)l->head_dim * l->k_group);
    return s;
}

/* Sinks from position `first` on. */
static uint32_t sinks_from(const ki_layout *l, uint32_t first) {
    return l->kv.sink_tokens > first ? l->kv.sink_tokens - first : 0;
}

/* The first n_sinks slots of each channel of a group: before quantizing a copy of the next one, so
 * that they do not count in the range; their codes, which nobody reads, are 0. */
static void hide_sinks(const append_scratch *s, const ki_layout *l, uint32_t n_sinks) {
    for (uint32_t c = 0; c < l->head_dim; c++) {
        uint16_t *x = s->group + (size_t)c * l->k_group;
        for (uint32_t i = 0; i < n_sinks; i++) x[i] = x[n_sinks];
    }
}
static void clear_sink_codes(const append_scratch *s, const ki_layout *l, uint32_t n_sinks) {
    for (uint32_t c = 0; n_sinks && c < l->head_dim; c++)
        memset(s->codes + (size_t)c * l->k_group, 0, n_sinks);
}

/* Keys [first, first + G) of one head: gathered channel by channel, quantized, packed. */
static void pack_plain_keys(kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t first,
                            const append_scratch *s) {
    const kivi_cache *cache = seq->cache;
    const ki_layout *l = &cache->layout;
    uint32_t group = l->k_group, in_page = first % KI_PAGE_TOKENS, n_sinks = sinks_from(l, first);
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

/* The page of keys that begins at `first`, by plus.h. */
static void close_key_page(kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t first) {
    const ki_layout *l = &seq->cache->layout;
    ki_plus_keys keys;
    ki_layout_keys(&keys, l, ki_seq_page(seq, first / KI_PAGE_TOKENS, layer, head));
    const uint16_t *blocks[KI_TILE_BLOCKS];
    for (uint32_t b = 0; b < KI_TILE_BLOCKS; b++)
        blocks[b] = ki_seq_k_block(seq, layer, head, first / KI_LANES + b);
    seq->cache->kernels->plus.close_keys(&keys, blocks, sinks_from(l, first), l->head_dim,
                                         l->kv.plus & KIVI_PLUS_FIT ? KI_PLUS_KEY_STEPS : 1);
}

/* Codes of a row of values without a zero point, by plus.h. Groups smaller than its own are rows of
 * that head size. */
static void plus_values(uint8_t *codes, uint16_t *scale, const kivi_cache *cache,
                        const uint16_t *row) {
    const ki_layout *l = &cache->layout;
    uint32_t n_steps = l->kv.plus & KIVI_PLUS_STEP ? KI_PLUS_VALUE_STEPS : 1;
    uint32_t n = l->v_group == ki_plus_value_group(l->head_dim) ? l->head_dim : l->v_group;
    for (uint32_t c = 0; c < l->head_dim; c += n)
        cache->kernels->plus.quantize_values(codes + c, scale + c / l->v_group, row + c, n,
                                             l->kv.v_bits, n_steps);
}

static void pack_value_row(kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t pos,
                           const append_scratch *s) {
    const kivi_cache *cache = seq->cache;
    const ki_layout *l = &cache->layout;
    const uint16_t *row =
        ki_seq_v_block(seq, layer, head, pos / KI_LANES) + (size_t)(pos % KI_LANES) * l->head_dim;
    uint8_t *page = ki_seq_page(seq, pos / KI_PAGE_TOKENS, layer, head);
    uint16_t scale[KI_MAX_HEAD_DIM / 16], zero[KI_MAX_HEAD_DIM / 16],
        *scales = (uint16_t *)(page + l->v_scale_at), *zeros = (uint16_t *)(page + l->v_zero_at);
    uint32_t in_page = pos % KI_PAGE_TOKENS, n_groups = l->head_dim / l->v_group,
             *words = (uint32_t *)(page + l->v_codes_at);
    bool has_zero = ki_has_v_zero(l);
    if (has_zero)
        cache->kernels->quant.quantize(s->codes, scale, zero, row, n_groups, l->v_group,
                                       l->kv.v_bits);
    else plus_values(s->codes, scale, cache, row);
    if (ki_has_third(l))
        ki_plus_pack_values(words, (uint32_t *)(page + l->v_third_at), s->codes, in_page,
                            l->head_dim);
    else ki_pack_values(words, s->codes, in_page, l->head_dim, l->kv.v_bits);
    for (uint32_t g = 0; g < n_groups; g++) {
        scales[g * KI_PAGE_TOKENS + in_page] = scale[g];
        if (has_zero) zeros[g * KI_PAGE_TOKENS + in_page] = zero[g];
    }
}

static void pack_behind_line(kivi_seq *seq, uint32_t layer, uint32_t head,
                             const append_scratch *s) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t from = seq->n_tokens, to = from + seq->step_rows, sinks = l->kv.sink_tokens;
    uint32_t unit = ki_closes_pages(l) ? (uint32_t)KI_PAGE_TOKENS : l->k_group;
    uint32_t k_from = KI_MAX(ki_k_packed(l, from), sinks / unit * unit);
    for (uint32_t p = k_from; p < ki_k_packed(l, to); p += unit)
        if (ki_closes_pages(l)) close_key_page(seq, layer, head, p);
        else pack_plain_keys(seq, layer, head, p, s);
    for (uint32_t p = KI_MAX(ki_v_packed(l, from), sinks); p < ki_v_packed(l, to); p++)
        pack_value_row(seq, layer, head, p, s);
}

kivi_status ki_append_head(kivi_seq *seq, uint32_t layer, uint32_t head, const float *k,
                           const float *v, size_t row_stride, void *scratch, kivi_error *err) {
    kivi_cache *cache = seq->cache;
    const ki_kernels *kernels = cache->kernels;
    const uint32_t d = cache->layout.head_dim;
    append_scratch s = carve(scratch, &cache->layout);
    uint64_t n_saturated = 0;
    for (uint32_t r = 0; r < seq->step_rows; r++) {
        const float *v_row = v + r * row_stride;
        if (ki_is_turned(&cache->layout)) {
            memcpy(s.turned, v_row, d * sizeof *s.turned);
            kernels->plus.turn(s.turned, d);
            v_row = s.turned;
        }
        bool k_ok = kernels->quant.to_f16(s.k, &n_saturated, k + r * row_stride, d);
        bool v_ok = kernels->quant.to_f16(s.v, &n_saturated, v_row, d);
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
