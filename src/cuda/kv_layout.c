/* kv_layout.c: the device's page, and pages exchanged with the CPU's order. No CUDA in here. */
#include "kv_cuda.h"

#include "cache.h"
#include "kv_plan.h"
#include "kv_shared.h"

static uint32_t align16(uint32_t n) { return (n + 15) / 16 * 16; }

/* Whole pages: a head of scales comes with them once, and a warp has more independent work. One
 * block where 16-bit rows or 8-bit codes are large. */
static uint32_t unit_subs(const ki_cuda_layout *l) {
    return l->head_bytes || l->k_bits + l->v_bits <= 8 ? KI_SUBS : 1;
}

static uint32_t plane_bytes(uint32_t n_steps, uint32_t bits) {
    return ki_order_words(n_steps, bits) * 128;
}

/* Steps of 16 wide channels: D/4 of them, the last step filled up with channels of query 0. */
static uint32_t wide_steps(uint32_t head_dim) { return (head_dim / 4 + 15) / 16; }

static void place_head(ki_cuda_layout *l) {
    if (l->k_bits == 16 || l->k_group <= KI_SUB_TOKENS) return;
    uint32_t meta = KI_PAGE_TOKENS / l->k_group * l->head_dim * 2;
    l->k_scale_at = 0;
    l->k_zero_at = meta;
    l->list_at = 2 * meta;
    l->head_bytes = align16(2 * meta + (l->is_plus && l->k_bits == 2 ? l->head_dim / 4 : 0));
}

static void place_sub(ki_cuda_layout *l) {
    uint32_t steps = l->head_dim / 16, at = 0;
    uint32_t v_meta = l->v_bits == 16 ? 0 : l->head_dim / l->v_group * KI_SUB_TOKENS * 2;
    bool wide = l->is_plus && l->k_bits == 2, third = l->v_bits == 3;
    l->k_at = at, at += plane_bytes(steps, l->k_bits);
    l->wide_at = at, at += wide ? plane_bytes(wide_steps(l->head_dim), 2) : 0;
    l->v_at = at, at += plane_bytes(steps, third ? 2 : l->v_bits);
    l->third_at = at, at += third ? plane_bytes(steps, 1) : 0;
    l->v_scale_at = at, at += v_meta;
    l->v_zero_at = at, at += l->is_plus ? 0 : v_meta;
    uint32_t scales = l->is_plus ? v_meta : 2 * v_meta;
    if (l->k_bits < 16 && l->k_group <= KI_SUB_TOKENS) {
        uint32_t k_meta = KI_SUB_TOKENS / l->k_group * l->head_dim * 2;
        l->k_scale_at = at, at += k_meta;
        l->k_zero_at = at, at += k_meta;
        scales += 2 * k_meta;
    }
    l->sub_bytes = at;
    l->page_bytes = l->head_bytes + KI_SUBS * at;
    l->page_scale_bytes = l->head_bytes + KI_SUBS * scales;
}

/* Blocks of 32 that hold `rows` rows which begin at a multiple of `unit`. */
static uint32_t ring_blocks(uint32_t rows, uint32_t unit) {
    uint32_t lead = unit % KI_SUB_TOKENS == 0 ? 0 : KI_SUB_TOKENS - 1;
    return (lead + rows + KI_SUB_TOKENS - 1) / KI_SUB_TOKENS;
}

static void place_rings(ki_cuda_layout *l) {
    uint32_t r = l->residual_tokens, back = l->rewind_tokens;
    /* keys: [floor(p/R) R, p], R rows; values: [p - R, p] */
    if (l->k_bits < 16) l->k_ring_blocks = ring_blocks(r + back, back ? 1 : r);
    if (l->v_bits < 16) l->v_ring_blocks = ring_blocks(r + 1 + back, 1);
    if (l->k_bits < 16 || l->v_bits < 16)
        l->sink_blocks = (l->sink_tokens + KI_SUB_TOKENS - 1) / KI_SUB_TOKENS;
    uint64_t heads = (uint64_t)l->n_layers * l->n_kv_heads;
    l->ring_bytes = ki_cuda_ring_bytes(l, l->k_ring_blocks, l->v_ring_blocks);
    l->sink_bytes = heads * 2 * l->sink_blocks * KI_SUB_TOKENS * l->head_dim * 2;
    l->id_bytes = heads * l->page_bytes;
}

uint64_t ki_cuda_ring_bytes(const ki_cuda_layout *l, uint32_t k_blocks, uint32_t v_blocks) {
    uint64_t blocks = (l->k_bits < 16 ? k_blocks : 0) + (uint64_t)(l->v_bits < 16 ? v_blocks : 0);
    return (uint64_t)l->n_layers * l->n_kv_heads * blocks * KI_SUB_TOKENS * l->head_dim * 2;
}

static kivi_status check_plus(const ki_cuda_layout *l, kivi_error *err) {
    bool known = l->v_bits == 2 || (l->v_bits == 3 && l->k_bits == 4);
    if ((l->k_bits != 2 && l->k_bits != 4) || !known)
        return KI_FAIL(err, ARG, "cuda: plus kind of %u and %u bits, expected 2/2, 4/2 or 4/3",
                       l->k_bits, l->v_bits);
    if (l->residual_tokens != KI_PAGE_TOKENS)
        return KI_FAIL(err, ARG, "cuda: residual %u of a plus kind, expected %d",
                       l->residual_tokens, KI_PAGE_TOKENS);
    return KIVI_OK;
}

kivi_status ki_cuda_layout_init(ki_cuda_layout *out, const kivi_cache_geometry *g, bool plus,
                                kivi_error *err) {
    if (!ki_cuda_is_built(g->head_dim))
        return KI_FAIL(err, UNSUPPORTED, "cuda: head size %u, expected 64, 80, 96, 128 or 256",
                       g->head_dim);
    return ki_cuda_layout_any(out, g, plus, err);
}

kivi_status ki_cuda_layout_any(ki_cuda_layout *out, const kivi_cache_geometry *g, bool plus,
                               kivi_error *err) {
    const kivi_kv_options *kv = &g->kv;
    *out = (ki_cuda_layout){.n_layers = g->n_layers,
                            .n_heads = g->n_heads,
                            .n_kv_heads = g->n_kv_heads,
                            .head_dim = g->head_dim,
                            .k_bits = kv->k_bits,
                            .v_bits = kv->v_bits,
                            .residual_tokens = kv->residual_tokens,
                            .sink_tokens = kv->sink_tokens,
                            .rewind_tokens = kv->rewind_tokens,
                            .rule = (uint32_t)kv->rule,
                            .span_tokens = kv->span_tokens,
                            .is_plus = plus};
    if (g->n_kv_heads == 0 || g->n_heads % g->n_kv_heads)
        return KI_FAIL(err, ARG, "cuda: %u heads over %u KV heads, expected a multiple", g->n_heads,
                       g->n_kv_heads);
    if (kv->plus && !plus)
        return KI_FAIL(err, ARG, "cuda: parts %u of a + kind, expected none", kv->plus);
    if (plus) KI_TRY(check_plus(out, err));
    else {
        ki_layout cpu; /* the same refusals as the CPU's */
        KI_TRY(ki_layout_init(&cpu, g, err));
    }
    out->head_group = g->n_heads / g->n_kv_heads;
    uint32_t block = g->head_dim & (0u - g->head_dim);
    out->k_group = plus ? KI_PAGE_TOKENS : kv->group;
    out->v_group = plus ? KI_MIN(block, 64u) : kv->group;
    place_head(out);
    place_sub(out);
    out->unit_subs = unit_subs(out);
    place_rings(out);
    return KIVI_OK;
}

uint64_t ki_cuda_workspace_bytes(const ki_cuda_layout *l, uint32_t n_seqs, uint32_t max_tokens,
                                 uint32_t split_tokens) {
    uint32_t max_splits = ki_plan_max_splits(max_tokens, split_tokens);
    uint64_t states = max_splits == 1 ? 0 : (uint64_t)n_seqs * max_splits * l->n_heads;
    return ki_plan_states_at(n_seqs, max_splits) + 256 + states * (l->head_dim + 2) * 4;
}

/* Two thread blocks share a multiprocessor. Where each such slot has much to read, splits of a
 * constant size even out what multiprocessors do at the end; else the splits that fill whole rounds
 * of slots are best. START is what a split costs on top of its tokens, in tokens: its first page
 * arrives late. */
uint32_t ki_cuda_split_tokens(const ki_cuda_layout *l, uint32_t n_seqs, uint32_t max_tokens,
                              uint32_t n_sms) {
    enum { INVARIANT = 2048, SMALLEST = 512, START = 350, PLENTY = 15000 };
    uint64_t rows = (uint64_t)n_seqs * ki_decode_blocks(l), slots = 2ull * n_sms;
    if (!n_seqs || rows * max_tokens >= slots * PLENTY) return INVARIANT;
    uint64_t best = UINT64_MAX, tokens = max_tokens ? max_tokens : 1;
    for (uint64_t n = 1; n == 1 || max_tokens / n >= SMALLEST; n++) {
        uint64_t each = (max_tokens + n - 1) / n;
        uint64_t cost = (rows * n + slots - 1) / slots * (each + START);
        if (cost >= best) continue;
        best = cost;
        tokens = each;
    }
    return (uint32_t)tokens;
}

/* ---- pages in the CPU's order ---- */

static uint32_t read_bits(const uint8_t *plane, ki_order_place p, uint32_t bits) {
    uint32_t word;
    memcpy(&word, plane + (size_t)p.word * 4, 4);
    return word >> p.bit & ((1u << bits) - 1);
}

static void or_bits(uint8_t *plane, ki_order_place p, uint32_t value) {
    uint32_t word;
    memcpy(&word, plane + (size_t)p.word * 4, 4);
    word |= value << p.bit;
    memcpy(plane + (size_t)p.word * 4, &word, 4);
}

typedef struct exchange { /* one page in both orders, and the way */
    const ki_cuda_layout *l;
    ki_layout cpu;
    uint8_t *device, *host;
    bool to_host;
} exchange;

/* A 16-bit row's element in the CPU's page: blocks of 16 tokens, keys [D][16], values [16][D]. */
static uint8_t *host_f16(const exchange *x, uint32_t t, uint32_t c, bool keys) {
    uint32_t d = x->l->head_dim;
    size_t at = (size_t)(t / KI_LANES) * KI_LANES * d;
    at += keys ? (size_t)c * KI_LANES + t % KI_LANES : (size_t)(t % KI_LANES) * d + c;
    return x->host + (keys ? x->cpu.k_codes_at : x->cpu.v_codes_at) + at * 2;
}

/* A plane of codes in both orders. */
typedef struct plane {
    size_t host_at; /* in the CPU's page */
    uint32_t at;    /* in a sub of the device's */
    uint32_t bits;
    bool keys;
} plane;

static ki_order_place host_code_at(const plane *p, uint32_t t, uint32_t c, uint32_t d) {
    uint32_t n = 32 / p->bits;
    size_t word = p->keys ? ((size_t)(t / KI_LANES) * (d / n) + c / n) * KI_LANES + t % KI_LANES
                          : (size_t)(t / n) * d + c;
    return (ki_order_place){(uint32_t)word, ki_code_bit((p->keys ? c : t) % n, p->bits)};
}

/* Of wide channel number w: plus.h draws the plane. */
static ki_order_place host_wide_at(uint32_t t, uint32_t w, uint32_t d) {
    uint32_t quad = t / KI_LANES * (d / 16) + w / 4;
    return (ki_order_place){quad / 4 * KI_LANES + t % KI_LANES, 8 * (w % 4) + 2 * (quad % 4)};
}

static void move_bits(const exchange *x, uint8_t *device, ki_order_place there, uint8_t *host,
                      ki_order_place here, uint32_t bits) {
    if (x->to_host) or_bits(host, here, read_bits(device, there, bits));
    else or_bits(device, there, read_bits(host, here, bits));
}

static void exchange_plane(const exchange *x, const plane *p) {
    uint32_t d = x->l->head_dim, steps = d / 16;
    for (uint32_t t = 0; t < KI_PAGE_TOKENS; t++) {
        uint8_t *sub = x->device + x->l->head_bytes + (size_t)(t / 32) * x->l->sub_bytes + p->at;
        for (uint32_t c = 0; c < d; c++) {
            ki_order_place there = p->keys ? ki_order_key(t % 32, c, steps, p->bits)
                                           : ki_order_value(t % 32, c, steps, p->bits);
            uint8_t *half = sub + (size_t)there.word * 4 + there.bit / 8;
            if (p->bits == 16 && x->to_host) memcpy(host_f16(x, t, c, p->keys), half, 2);
            else if (p->bits == 16) memcpy(half, host_f16(x, t, c, p->keys), 2);
            else move_bits(x, sub, there, x->host + p->host_at, host_code_at(p, t, c, d), p->bits);
        }
    }
}

/* The high bits of the wide channels, in the order of their numbers, and which they are. */
static void exchange_wide(const exchange *x) {
    uint32_t d = x->l->head_dim, n_wide = d / 4;
    for (uint32_t t = 0; t < KI_PAGE_TOKENS; t++) {
        uint8_t *sub =
            x->device + x->l->head_bytes + (size_t)(t / 32) * x->l->sub_bytes + x->l->wide_at;
        for (uint32_t w = 0; w < n_wide; w++)
            move_bits(x, sub, ki_order_key(t % 32, w, wide_steps(d), 2), x->host + x->cpu.k_wide_at,
                      host_wide_at(t, w, d), 2);
    }
    uint8_t *there = x->device + x->l->list_at, *here = x->host + x->cpu.k_list_at;
    memcpy(x->to_host ? here : there, x->to_host ? there : here, n_wide);
}

static void exchange_codes(const exchange *x) {
    const ki_cuda_layout *l = x->l;
    const plane keys = {x->cpu.k_codes_at, l->k_at, l->k_bits, true};
    const plane values = {x->cpu.v_codes_at, l->v_at, l->v_bits == 3 ? 2 : l->v_bits, false};
    const plane third = {x->cpu.v_third_at, l->third_at, 1, false};
    exchange_plane(x, &keys);
    exchange_plane(x, &values);
    if (l->v_bits == 3) exchange_plane(x, &third);
    if (l->is_plus && l->k_bits == 2) exchange_wide(x);
}

/* Place of the scale of (token, channel) on the device; the zero is zero_at - scale_at behind it.
 * */
static size_t device_scale_at(const ki_cuda_layout *l, uint32_t t, uint32_t c, bool keys) {
    size_t sub = l->head_bytes + (size_t)(t / 32) * l->sub_bytes;
    if (!keys)
        return sub + l->v_scale_at +
               ((size_t)(c / l->v_group) * 32 + ki_order_value_scale(t % 32)) * 2;
    size_t in_group = ki_order_key_scale(c, l->head_dim / 16);
    if (l->head_bytes)
        return l->k_scale_at + ((size_t)(t / l->k_group) * l->head_dim + in_group) * 2;
    return sub + l->k_scale_at + ((size_t)(t % 32 / l->k_group) * l->head_dim + in_group) * 2;
}

static void exchange_half(const exchange *x, size_t device, size_t host) {
    uint8_t *there = x->device + device, *here = x->host + host;
    memcpy(x->to_host ? here : there, x->to_host ? there : here, 2);
}

static void exchange_scales(const exchange *x, bool keys) {
    const ki_cuda_layout *l = x->l;
    uint32_t g = keys ? l->k_group : l->v_group;
    uint32_t zero = keys ? l->k_zero_at - l->k_scale_at : l->v_zero_at - l->v_scale_at;
    size_t host_zero =
        keys ? x->cpu.k_zero_at - x->cpu.k_scale_at : x->cpu.v_zero_at - x->cpu.v_scale_at;
    for (uint32_t t = 0; t < KI_PAGE_TOKENS; t += keys ? g : 1)
        for (uint32_t c = 0; c < l->head_dim; c += keys ? 1 : g) {
            size_t host = keys ? x->cpu.k_scale_at + ((size_t)(t / g) * l->head_dim + c) * 2
                               : x->cpu.v_scale_at + ((size_t)(c / g) * KI_PAGE_TOKENS + t) * 2;
            size_t device = device_scale_at(l, t, c, keys);
            exchange_half(x, device, host);
            if (keys || !l->is_plus) exchange_half(x, device + zero, host + host_zero);
        }
}

static void exchange_page(exchange *x) {
    const ki_cuda_layout *l = x->l;
    kivi_cache_geometry g = {.n_layers = l->n_layers,
                             .n_heads = l->n_heads,
                             .n_kv_heads = l->n_kv_heads,
                             .head_dim = l->head_dim,
                             .kv = {.k_bits = l->k_bits,
                                    .v_bits = l->v_bits,
                                    .plus = l->is_plus ? KIVI_PLUS_ALL : 0,
                                    .group = l->k_group,
                                    .residual_tokens = l->residual_tokens,
                                    .sink_tokens = l->sink_tokens,
                                    .rewind_tokens = l->rewind_tokens,
                                    .rule = (kivi_rule)l->rule,
                                    .span_tokens = l->span_tokens}};
    if (ki_layout_init(&x->cpu, &g, NULL) != KIVI_OK) return; /* was accepted by layout_init */
    memset(x->to_host ? x->host : x->device, 0, x->to_host ? x->cpu.page_bytes : l->page_bytes);
    exchange_codes(x);
    if (l->k_bits < 16) exchange_scales(x, true);
    if (l->v_bits < 16) exchange_scales(x, false);
}

void ki_cuda_page_from_cpu(uint8_t *out, const uint8_t *page, const ki_cuda_layout *layout) {
    exchange x = {.l = layout, .device = out, .host = (uint8_t *)(uintptr_t)page};
    exchange_page(&x);
}

void ki_cuda_page_to_cpu(uint8_t *out, const uint8_t *page, const ki_cuda_layout *layout) {
    exchange x = {.l = layout, .device = (uint8_t *)(uintptr_t)page, .host = out, .to_host = true};
    exchange_page(&x);
}
