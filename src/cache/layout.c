#include "cache.h"

static bool is_bits(uint32_t bits) { return bits == 2 || bits == 4 || bits == 8 || bits == 16; }
static bool is_group(uint32_t g) { return g == 16 || g == 32 || g == 64 || g == 128; }

enum { MAX_RESIDUAL_TOKENS = 4096, MAX_SPAN_TOKENS = 1 << 20 };

/* "16, 32" : the groups that divide the head size, for the error text. */
static void valid_groups(char *text, size_t n_bytes, uint32_t head_dim) {
    static const struct {
        uint32_t group;
        const char *name;
    } all[] = {{16, "16"}, {32, "32"}, {64, "64"}, {128, "128"}};
    size_t at = 0;
    text[0] = 0;
    for (int i = 0; i < 4; i++) {
        if (head_dim % all[i].group || at + 6 > n_bytes) continue;
        size_t n = strlen(all[i].name);
        if (at) memcpy(text + at, ", ", 2), at += 2;
        memcpy(text + at, all[i].name, n + 1);
        at += n;
    }
}

/* ---- names ---- */

static const struct {
    const char *name;
    uint32_t k_bits, v_bits, plus, sinks;
} kinds[] = {{"f16", 16, 16, 0, 0},
             {"kivi8", 8, 8, 0, 0},
             {"kivi4", 4, 4, 0, 0},
             {"k4v2", 4, 2, 0, 0},
             {"kivi2", 2, 2, 0, 0},
             {"kivi2+", 2, 2, KIVI_PLUS_ALL, 4},
             {"k4v2+", 4, 2, KIVI_PLUS_ALL, 4},
             {"k4v3+", 4, 3, KIVI_PLUS_ALL, 4}};

kivi_status kivi_kv_by_name(kivi_kv_options *kv, const char *name, kivi_error *err) {
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(kinds[i].name, name) != 0) continue;
        kv->k_bits = kinds[i].k_bits;
        kv->v_bits = kinds[i].v_bits;
        kv->plus = kinds[i].plus;
        kv->sink_tokens = kinds[i].sinks;
        return KIVI_OK;
    }
    return KI_FAIL(err, ARG,
                   "kv: '%s', expected f16, kivi8, kivi4, k4v2, kivi2, kivi2+, k4v2+ or k4v3+",
                   name);
}

/* ---- what can be ---- */

static kivi_status resolve_plain(kivi_kv_options *kv, uint32_t head_dim, kivi_error *err) {
    char groups[32];
    valid_groups(groups, sizeof groups, head_dim);
    if (!kv->group)
        kv->group = head_dim % 32 ? 16 : 32; /* 32, unless the head size takes only 16 */
    if (!is_bits(kv->k_bits))
        return KI_FAIL(err, ARG, "kv: %u bits for keys, expected 2, 4, 8 or 16", kv->k_bits);
    if (!is_bits(kv->v_bits))
        return KI_FAIL(err, ARG, "kv: %u bits for values, expected 2, 4, 8 or 16", kv->v_bits);
    if (!is_group(kv->group) || head_dim % kv->group)
        return KI_FAIL(err, ARG, "kv: group %u at head size %u, expected one of %s", kv->group,
                       head_dim, groups);
    return KIVI_OK;
}

/* Parts that the bits leave no room for. */
static uint32_t idle_parts(const kivi_kv_options *kv) {
    uint32_t parts = 0;
    if (kv->k_bits != 2) parts |= KIVI_PLUS_WIDE | KIVI_PLUS_FIT;
    if (kv->k_bits == 16) parts |= KIVI_PLUS_K32;
    if (kv->v_bits == 16) parts |= KIVI_PLUS_TURN | KIVI_PLUS_STEP | KIVI_PLUS_ZERO | KIVI_PLUS_V32;
    return parts;
}

/* A + kind has one key group a page, unless a part says 32, and value groups that the head size
 * gives. */
static kivi_status resolve_plus(kivi_kv_options *kv, kivi_error *err) {
    const uint32_t known = KIVI_PLUS_ALL | KIVI_PLUS_ZERO | KIVI_PLUS_K32 | KIVI_PLUS_V32;
    if (!(kv->plus & KIVI_PLUS) || kv->plus & ~known)
        return KI_FAIL(err, ARG, "kv: unknown parts %u of a + kind", kv->plus);
    if (kv->k_bits != 2 && kv->k_bits != 4 && kv->k_bits != 16)
        return KI_FAIL(err, ARG, "kv: %u bits for keys of a + kind, expected 2, 4 or 16",
                       kv->k_bits);
    if (kv->v_bits != 2 && kv->v_bits != 3 && kv->v_bits != 16)
        return KI_FAIL(err, ARG, "kv: %u bits for values of a + kind, expected 2, 3 or 16",
                       kv->v_bits);
    kv->plus &= ~idle_parts(kv);
    if (kv->plus & KIVI_PLUS_ZERO && kv->plus & KIVI_PLUS_STEP)
        return KI_FAIL(err, ARG,
                       "kv: values with a zero point (zero) have no step by least squares (step)");
    const uint32_t group = kv->plus & KIVI_PLUS_K32 ? 32 : KI_PAGE_TOKENS;
    if (!kv->group) kv->group = group;
    if (kv->group != group)
        return KI_FAIL(err, ARG, "kv: group %u, a + kind has key groups of a page (%d)%s",
                       kv->group, KI_PAGE_TOKENS, group == 32 ? ", and of 32 by part k32" : "");
    return KIVI_OK;
}

const char *ki_plus_not_whole(const kivi_kv_options *kv) {
    static const struct {
        uint32_t part;
        const char *without, *with;
    } all[] = {{KIVI_PLUS_WIDE, "no wide channels", NULL},
               {KIVI_PLUS_FIT, "no ranges by least squares (fit)", NULL},
               {KIVI_PLUS_TURN, "no turned values", NULL},
               {KIVI_PLUS_STEP, "no steps by least squares", NULL},
               {KIVI_PLUS_ZERO, NULL, "values with a zero point"},
               {KIVI_PLUS_K32, NULL, "key groups of 32 (k32)"},
               {KIVI_PLUS_V32, NULL, "value groups of 32 (v32)"}};
    for (size_t i = sizeof all / sizeof *all; kv->plus && i--;) {
        bool is_idle = idle_parts(kv) & all[i].part;
        const char *text = kv->plus & all[i].part ? all[i].with : all[i].without;
        if (!is_idle && text) return text;
    }
    return NULL;
}

static kivi_status check_kind(const kivi_kv_options *kv, kivi_error *err) {
    /* keys of a + kind are closed a page at a time, whatever their groups */
    const uint32_t unit = kv->plus ? (uint32_t)KI_PAGE_TOKENS : kv->group;
    if (kv->residual_tokens < unit || kv->residual_tokens % unit ||
        kv->residual_tokens > MAX_RESIDUAL_TOKENS)
        return KI_FAIL(err, ARG, "kv: residual %u, expected a multiple of the %s (%u) up to %d",
                       kv->residual_tokens, kv->plus ? "page" : "group", unit, MAX_RESIDUAL_TOKENS);
    if (kv->sink_tokens > MAX_RESIDUAL_TOKENS)
        return KI_FAIL(err, ARG, "kv: %u sinks, expected up to %d", kv->sink_tokens,
                       MAX_RESIDUAL_TOKENS);
    if (kv->rewind_tokens > MAX_RESIDUAL_TOKENS)
        return KI_FAIL(err, ARG, "kv: rewind of %u tokens, expected up to %d", kv->rewind_tokens,
                       MAX_RESIDUAL_TOKENS);
    if (kv->rule == KIVI_RULE_SPAN && (kv->span_tokens == 0 || kv->span_tokens % KI_PAGE_TOKENS ||
                                       kv->span_tokens > MAX_SPAN_TOKENS))
        return KI_FAIL(err, ARG, "kv: span of %u tokens, expected a multiple of the page (%d)",
                       kv->span_tokens, KI_PAGE_TOKENS);
    if ((unsigned)kv->rule > KIVI_RULE_SPAN)
        return KI_FAIL(err, ARG, "kv: unknown visibility rule %d", kv->rule);
    return KIVI_OK;
}

kivi_status kivi_kv_resolve(kivi_kv_options *kv, uint32_t head_dim, kivi_error *err) {
    if (head_dim == 0 || head_dim % 16 || head_dim > KI_MAX_HEAD_DIM)
        return KI_FAIL(err, UNSUPPORTED, "kv: head size %u, expected a multiple of 16 up to %d",
                       head_dim, KI_MAX_HEAD_DIM);
    if (!kv->k_bits) kv->k_bits = 2;
    if (!kv->v_bits) kv->v_bits = 2;
    KI_TRY(kv->plus ? resolve_plus(kv, err) : resolve_plain(kv, head_dim, err));
    if (!kv->residual_tokens) kv->residual_tokens = 128;
    return check_kind(kv, err);
}

/* ---- planes ---- */

static size_t place(size_t *at, size_t n_bytes) {
    size_t here = *at;
    *at += n_bytes;
    return here;
}

static void place_planes(ki_layout *l) {
    const uint32_t k = l->kv.k_bits, v = l->kv.v_bits, d = l->head_dim;
    const size_t elements = (size_t)KI_PAGE_TOKENS * d;
    l->k_group = l->kv.group;
    l->v_group = l->kv.plus ? ki_plus_value_group(d) : l->kv.group;
    if (l->kv.plus & KIVI_PLUS_V32) l->v_group = KI_MIN(l->v_group, 32u);
    const size_t k_meta = k < 16 ? elements / l->k_group * 2 : 0,
                 v_meta = v < 16 ? elements / l->v_group * 2 : 0;
    const size_t n_wide = ki_has_wide(l) ? d / 4 : 0;
    size_t at = 0;
    l->k_codes_at = place(&at, elements * k / 8);
    l->k_wide_at = place(&at, KI_PAGE_TOKENS * n_wide * 2 / 8);
    l->v_codes_at = place(&at, elements * (ki_has_third(l) ? 2 : v) / 8);
    l->v_third_at = place(&at, ki_has_third(l) ? elements / 8 : 0);
    l->k_scale_at = place(&at, k_meta);
    l->k_zero_at = place(&at, k_meta);
    l->v_scale_at = place(&at, v_meta);
    l->v_zero_at = place(&at, ki_has_v_zero(l) ? v_meta : 0);
    l->k_list_at = place(&at, n_wide);
    l->page_bytes = (at + 63) / 64 * 64;
    l->page_scale_bytes = l->page_bytes - l->k_scale_at;
}

void ki_layout_keys(ki_plus_keys *out, const ki_layout *l, uint8_t *page) {
    *out = (ki_plus_keys){.bits = l->kv.k_bits,
                          .low = (uint32_t *)(page + l->k_codes_at),
                          .scale = (uint16_t *)(page + l->k_scale_at),
                          .zero = (uint16_t *)(page + l->k_zero_at),
                          .group = l->k_group};
    if (!ki_has_wide(l)) return;
    out->wide = (uint32_t *)(page + l->k_wide_at);
    out->list = page + l->k_list_at;
}

double kivi_kv_bits(const kivi_kv_options *kv, uint32_t head_dim) {
    ki_layout l = {.head_dim = head_dim, .kv = *kv};
    place_planes(&l);
    return (double)l.page_bytes * 8 / (2.0 * KI_PAGE_TOKENS * head_dim);
}

/* A ring of whole 16-token blocks must hold `rows` consecutive rows that may begin anywhere in a
 * block. */
static uint32_t blocks_for(uint32_t rows) {
    return (rows + KI_LANES - 1 + KI_LANES - 1) / KI_LANES;
}

kivi_status ki_layout_init(ki_layout *out, const kivi_cache_geometry *g, kivi_error *err) {
    *out = (ki_layout){.n_layers = g->n_layers,
                       .n_heads = g->n_heads,
                       .n_kv_heads = g->n_kv_heads,
                       .head_dim = g->head_dim,
                       .window = g->window_tokens,
                       .block_tokens = KI_LANES,
                       .kv = g->kv};
    if (g->n_layers == 0 || g->n_layers > 1024 || g->n_heads == 0 || g->n_heads > 1024)
        return KI_FAIL(err, ARG, "cache: %u layers and %u heads, expected 1 to 1024 of each",
                       g->n_layers, g->n_heads);
    if (g->n_kv_heads == 0 || g->n_heads % g->n_kv_heads)
        return KI_FAIL(err, ARG, "cache: %u heads over %u KV heads, expected a multiple",
                       g->n_heads, g->n_kv_heads);
    KI_TRY(kivi_kv_resolve(&out->kv, g->head_dim, err));
    out->head_group = g->n_heads / g->n_kv_heads;
    place_planes(out);
    const kivi_kv_options *kv = &out->kv;
    /* keys: [floor(p/R) R, p]; values: [p - R, p]; and as many rows more as one may step back */
    if (kv->k_bits < 16) out->k_ring_blocks = (kv->residual_tokens + kv->rewind_tokens + 15) / 16;
    if (kv->v_bits < 16)
        out->v_ring_blocks = blocks_for(kv->residual_tokens + 1 + kv->rewind_tokens);
    if (kv->k_bits < 16 || kv->v_bits < 16)
        out->sink_blocks = (kv->sink_tokens + KI_LANES - 1) / KI_LANES;
    return KIVI_OK;
}

/* From the page of the first live row to that of the step's last: at most window, residual, rewind
 * and step apart, and a page more because either may begin anywhere in one. */
uint32_t ki_layout_pages(const ki_layout *l, uint32_t n_tokens, uint32_t step_rows) {
    uint64_t all = ((uint64_t)n_tokens + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS;
    uint64_t rows = (uint64_t)KI_MAX(l->window, l->kv.residual_tokens) + l->kv.rewind_tokens +
                    step_rows + KI_PAGE_TOKENS - 1;
    uint64_t live = (rows + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS + 1;
    return (uint32_t)(l->window ? KI_MIN(all, live) : all);
}

/* As many blocks as `rows` neighbours can lie in, of those that n_tokens have. */
static uint32_t larger_ring(const ki_layout *l, uint64_t rows, uint32_t n_tokens, uint32_t ring) {
    uint64_t unit = l->block_tokens, all = (n_tokens + unit - 1) / unit;
    uint64_t blocks = (rows + 2 * unit - 2) / unit;
    return KI_MAX((uint32_t)KI_MIN(blocks, all), ring);
}

/* Rows of a step and those before it that they read in 16 bit: `before`, what generated ones would,
 * or from the beginning of the span, or of the prompt. */
static uint64_t exact_rows(const ki_layout *l, uint64_t before, uint64_t n_rows,
                           uint64_t n_prompt) {
    uint64_t all = before + n_prompt, some = before + n_rows;
    uint64_t span = (uint64_t)l->kv.span_tokens + n_rows;
    if (l->kv.rule == KIVI_RULE_STREAM) return some;
    return l->kv.rule == KIVI_RULE_PAPER ? all : KI_MAX(some, KI_MIN(span - 1, all));
}

/* Before it are up to R - 1 keys and R values, and as many more as one may step back. */
void ki_layout_prompt_blocks(uint32_t *k, uint32_t *v, const ki_layout *l, uint32_t n_rows,
                             uint32_t n_prompt, uint32_t n_tokens) {
    uint64_t back = (uint64_t)l->kv.residual_tokens + l->kv.rewind_tokens;
    uint64_t k_rows = exact_rows(l, back - 1, n_rows, n_prompt),
             v_rows = exact_rows(l, back, n_rows, n_prompt);
    *k = l->kv.k_bits == 16 ? 0 : larger_ring(l, k_rows, n_tokens, l->k_ring_blocks);
    *v = l->kv.v_bits == 16 ? 0 : larger_ring(l, v_rows, n_tokens, l->v_ring_blocks);
}

uint64_t ki_layout_prompt_bytes(const ki_layout *l, uint32_t n_rows, uint32_t n_tokens) {
    uint32_t k, v;
    ki_layout_prompt_blocks(&k, &v, l, KI_MIN(n_rows, n_tokens), n_tokens, n_tokens);
    if (k == l->k_ring_blocks && v == l->v_ring_blocks) return 0;
    uint64_t blocks = (uint64_t)k + v, heads = (uint64_t)l->n_layers * l->n_kv_heads;
    return heads * blocks * l->block_tokens * l->head_dim * 2;
}

bool ki_layout_plan(kivi_memory *out, const ki_layout *l, uint64_t n_pages, uint64_t n_sequences) {
    size_t heads = (size_t)l->n_layers * l->n_kv_heads,
           block_bytes = (size_t)l->block_tokens * l->head_dim * 2;
    size_t blocks = (size_t)l->k_ring_blocks + l->v_ring_blocks;
    bool both = l->block_tokens != KI_LANES; /* a device's sinks, of whichever side is in pages */
    if (l->kv.k_bits < 16 || both) blocks += l->sink_blocks;
    if (l->kv.v_bits < 16 || both) blocks += l->sink_blocks;
    size_t codes, scales, residual;
    *out = (kivi_memory){0};
    if (!ki_mul(&codes, n_pages, heads * (l->page_bytes - l->page_scale_bytes)) ||
        !ki_mul(&scales, n_pages, heads * l->page_scale_bytes) ||
        !ki_mul(&residual, n_sequences, heads * blocks * block_bytes))
        return false;
    out->kv_codes = codes;
    out->kv_scales = scales;
    out->kv_residual = residual;
    return true;
}

uint32_t ki_k_packed(const ki_layout *l, uint32_t n_tokens) {
    return l->kv.k_bits == 16 ? 0 : n_tokens / l->kv.residual_tokens * l->kv.residual_tokens;
}

uint32_t ki_v_packed(const ki_layout *l, uint32_t n_tokens) {
    if (l->kv.v_bits == 16 || n_tokens < l->kv.residual_tokens) return 0;
    return n_tokens - l->kv.residual_tokens;
}
