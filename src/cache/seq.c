/* seq.c: a sequence's life: pages, the 16-bit window, prompts, forks and steps back. */
#include "cache.h"

/* ---- where things are ---- */

uint8_t *ki_seq_page(const kivi_seq *seq, uint32_t index, uint32_t layer, uint32_t head) {
    const ki_layout *l = &seq->cache->layout;
    const ki_pool *pool = &seq->cache->pool;
    size_t slot = (size_t)layer * l->n_kv_heads + head;
    return pool->data + seq->pages[index] * pool->id_bytes + slot * l->page_bytes;
}

static bool is_made(const ki_store *s) { return s->k || s->v || s->there; }

const ki_store *ki_seq_store(const kivi_seq *seq) {
    return is_made(&seq->large) ? &seq->large : &seq->window;
}

static size_t block_at(const ki_layout *l, uint32_t layer, uint32_t head, uint32_t n_blocks,
                       uint32_t block) {
    size_t slot = (size_t)layer * l->n_kv_heads + head;
    return (slot * n_blocks + block) * KI_LANES * l->head_dim;
}

const uint16_t *ki_seq_k_block(const kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t block) {
    const ki_layout *l = &seq->cache->layout;
    if (l->kv.k_bits == 16) {
        const uint8_t *page = ki_seq_page(seq, block / KI_TILE_BLOCKS, layer, head);
        return (const uint16_t *)(page + l->k_codes_at) +
               (size_t)(block % KI_TILE_BLOCKS) * KI_LANES * l->head_dim;
    }
    if (block < l->sink_blocks)
        return seq->sinks.k + block_at(l, layer, head, l->sink_blocks, block);
    const ki_store *s = ki_seq_store(seq);
    return s->k + block_at(l, layer, head, s->k_blocks, block % s->k_blocks);
}

const uint16_t *ki_seq_v_block(const kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t block) {
    const ki_layout *l = &seq->cache->layout;
    if (l->kv.v_bits == 16) {
        const uint8_t *page = ki_seq_page(seq, block / KI_TILE_BLOCKS, layer, head);
        return (const uint16_t *)(page + l->v_codes_at) +
               (size_t)(block % KI_TILE_BLOCKS) * KI_LANES * l->head_dim;
    }
    if (block < l->sink_blocks)
        return seq->sinks.v + block_at(l, layer, head, l->sink_blocks, block);
    const ki_store *s = ki_seq_store(seq);
    return s->v + block_at(l, layer, head, s->v_blocks, block % s->v_blocks);
}

void ki_seq_put_row(const kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t pos,
                    const uint16_t *k, const uint16_t *v) {
    uint32_t head_dim = seq->cache->layout.head_dim, lane = pos % KI_LANES;
    uint16_t *kb = (uint16_t *)ki_seq_k_block(seq, layer, head, pos / KI_LANES);
    uint16_t *vb = (uint16_t *)ki_seq_v_block(seq, layer, head, pos / KI_LANES);
    for (uint32_t c = 0; c < head_dim; c++) kb[c * KI_LANES + lane] = k[c];
    memcpy(vb + (size_t)lane * head_dim, v, head_dim * sizeof *v);
}

/* ---- the visibility rule ---- */

static uint32_t generated_k(const ki_layout *l, uint32_t pos) {
    return pos / l->kv.residual_tokens * l->kv.residual_tokens;
}
static uint32_t generated_v(const ki_layout *l, uint32_t pos) {
    return pos > l->kv.residual_tokens ? pos - l->kv.residual_tokens : 0;
}

/* A prompt row: `paper` sees what a generated row at the prompt's start would, and everything
 * since; `span` goes back to its span's start, but never behind what was there in 16 bit when the
 * prompt began. */
static uint32_t rule_line(const kivi_seq *seq, uint32_t pos,
                          uint32_t (*generated)(const ki_layout *, uint32_t)) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t line = generated(l, pos);
    if (seq->run_left == 0 || l->kv.rule == KIVI_RULE_STREAM) return line;
    uint32_t start = generated(l, seq->run_start);
    if (l->kv.rule == KIVI_RULE_PAPER) return KI_MIN(line, start);
    uint32_t span = pos / l->kv.span_tokens * l->kv.span_tokens;
    return KI_MIN(line, KI_MAX(span, start));
}

uint32_t ki_k_exact(const kivi_seq *seq, uint32_t pos) {
    return seq->cache->layout.kv.k_bits == 16 ? 0 : rule_line(seq, pos, generated_k);
}
uint32_t ki_v_exact(const kivi_seq *seq, uint32_t pos) {
    return seq->cache->layout.kv.v_bits == 16 ? 0 : rule_line(seq, pos, generated_v);
}

/* ---- stores ---- */

/* Bytes of one block of one layer and head. */
static size_t block_bytes(const ki_layout *l) { return (size_t)l->block_tokens * l->head_dim * 2; }

static size_t n_slots(const ki_layout *l) { return (size_t)l->n_layers * l->n_kv_heads; }

/* n_blocks of every layer and head. */
static kivi_status ring_init(void **out, const kivi_cache *cache, uint32_t n_blocks,
                             kivi_error *err) {
    const ki_device *d = cache->device;
    size_t all = n_slots(&cache->layout) * block_bytes(&cache->layout), n_bytes;
    if (!ki_mul(&n_bytes, n_blocks, all))
        return KI_FAIL(err, NOMEM, "cache: %u blocks of %zu bytes overflow", n_blocks, all);
    if (d) return d->alloc(out, d->context, KI_TAG_kv_residual, n_bytes, err);
    return ki_alloc(out, cache->mem, KI_TAG_kv_residual, n_bytes, err);
}

kivi_status ki_store_init(ki_store *s, const kivi_cache *cache, uint32_t k_blocks,
                          uint32_t v_blocks, kivi_error *err) {
    const ki_layout *l = &cache->layout;
    void *p;
    *s = (ki_store){.k_blocks = l->kv.k_bits < 16 ? k_blocks : 0,
                    .v_blocks = l->kv.v_bits < 16 ? v_blocks : 0};
    if (cache->device && s->k_blocks + s->v_blocks)
        return ring_init(&s->there, cache, s->k_blocks + s->v_blocks, err);
    if (s->k_blocks) {
        KI_TRY(ring_init(&p, cache, s->k_blocks, err));
        s->k = p;
    }
    if (s->v_blocks) {
        KI_TRY(ring_init(&p, cache, s->v_blocks, err));
        s->v = p;
    }
    return KIVI_OK;
}

/* On a device a sequence's sinks have blocks for both sides, whichever are in pages. */
kivi_status ki_sinks_init(ki_store *s, const kivi_cache *cache, kivi_error *err) {
    uint32_t n = cache->layout.sink_blocks;
    if (!cache->device) return ki_store_init(s, cache, n, n, err);
    *s = (ki_store){.k_blocks = n, .v_blocks = n};
    return n ? ring_init(&s->there, cache, 2 * n, err) : KIVI_OK;
}

void ki_store_deinit(ki_store *s, const kivi_cache *cache) {
    if (cache->device) cache->device->free(cache->device->context, s->there);
    ki_free(cache->mem, s->k);
    ki_free(cache->mem, s->v);
    *s = (ki_store){0};
}

/* Copies blocks [first, end) (by position) of every layer and head between two rings of one side.
 */
static void copy_blocks(const ki_layout *l, uint16_t *to, uint32_t to_blocks, const uint16_t *from,
                        uint32_t from_blocks, uint32_t first, uint32_t end) {
    for (uint32_t layer = 0; layer < l->n_layers; layer++)
        for (uint32_t head = 0; head < l->n_kv_heads; head++)
            for (uint32_t b = first; b < end; b++)
                memcpy(to + block_at(l, layer, head, to_blocks, b % to_blocks),
                       from + block_at(l, layer, head, from_blocks, b % from_blocks),
                       block_bytes(l));
}

/* The newest rows, as many as both rings hold. */
void ki_store_copy(const kivi_cache *cache, const ki_store *to, const ki_store *from,
                   uint32_t n_tokens) {
    const ki_layout *l = &cache->layout;
    const ki_device *d = cache->device;
    uint32_t end = (n_tokens + l->block_tokens - 1) / l->block_tokens,
             kn = KI_MIN(to->k_blocks, from->k_blocks), vn = KI_MIN(to->v_blocks, from->v_blocks);
    uint32_t k_first = end > kn ? end - kn : 0, v_first = end > vn ? end - vn : 0;
    if (to->k) copy_blocks(l, to->k, to->k_blocks, from->k, from->k_blocks, k_first, end);
    if (to->v) copy_blocks(l, to->v, to->v_blocks, from->v, from->v_blocks, v_first, end);
    if (!to->there) return;
    ki_ring_copy keys = {.to = to->there,
                         .from = from->there,
                         .to_blocks = to->k_blocks,
                         .from_blocks = from->k_blocks,
                         .to_stride = to->k_blocks + to->v_blocks,
                         .from_stride = from->k_blocks + from->v_blocks,
                         .first = k_first,
                         .end = end,
                         .n_slots = n_slots(l),
                         .block_bytes = block_bytes(l)};
    ki_ring_copy values = keys;
    values.to_at = to->k_blocks, values.from_at = from->k_blocks;
    values.to_blocks = to->v_blocks, values.from_blocks = from->v_blocks;
    values.first = v_first;
    if (kn) d->copy_ring(d->context, &keys);
    if (vn) d->copy_ring(d->context, &values);
}

/* Positions before this are overwritten once n_tokens rows have gone through a ring of n_blocks. */
static uint32_t ring_floor(const ki_layout *l, uint32_t n_tokens, uint32_t n_blocks) {
    uint32_t end = (n_tokens + l->block_tokens - 1) / l->block_tokens;
    return end > n_blocks ? (end - n_blocks) * l->block_tokens : 0;
}

static void note_valid(kivi_seq *seq, uint32_t n_tokens) {
    const ki_store *s = ki_seq_store(seq);
    const ki_layout *l = &seq->cache->layout;
    seq->k_valid_from = KI_MAX(seq->k_valid_from, ring_floor(l, n_tokens, s->k_blocks));
    seq->v_valid_from = KI_MAX(seq->v_valid_from, ring_floor(l, n_tokens, s->v_blocks));
}

/* Makes room for positions [k_line, end) and [v_line, end) in 16 bit: the ring, or a larger one for
 * a while. */
static kivi_status ensure_store(kivi_seq *seq, uint32_t k_line, uint32_t v_line, uint32_t end,
                                kivi_error *err) {
    const ki_store *s = ki_seq_store(seq);
    const ki_layout *l = &seq->cache->layout;
    uint32_t unit = l->block_tokens, last = (end + unit - 1) / unit;
    uint32_t k = last - k_line / unit, v = last - v_line / unit;
    bool k_fits = l->kv.k_bits == 16 || k <= s->k_blocks,
         v_fits = l->kv.v_bits == 16 || v <= s->v_blocks;
    if (k_fits && v_fits) return KIVI_OK;
    /* More steps are to come: one ring for all of them, for two would be held at once. */
    uint32_t all = seq->n_tokens + seq->run_left, k_all = 0, v_all = 0;
    uint32_t rows = KI_MIN(seq->run_left, seq->cache->max_step_rows);
    if (end < all) ki_layout_prompt_blocks(&k_all, &v_all, l, rows, all - seq->run_start, all);
    k = KI_MAX(k, k_all), v = KI_MAX(v, v_all);
    ki_store larger;
    kivi_status status =
        ki_store_init(&larger, seq->cache, KI_MAX(k, s->k_blocks), KI_MAX(v, s->v_blocks), err);
    if (status != KIVI_OK) {
        ki_store_deinit(&larger, seq->cache);
        return status;
    }
    ki_store_copy(seq->cache, &larger, s, seq->n_tokens);
    ki_store_deinit(&seq->large, seq->cache);
    seq->large = larger;
    return KIVI_OK;
}

static void drop_large(kivi_seq *seq) {
    if (!is_made(&seq->large)) return;
    ki_store_copy(seq->cache, &seq->window, &seq->large, seq->n_tokens);
    ki_store_deinit(&seq->large, seq->cache);
    note_valid(seq, seq->n_tokens);
}

/* ---- life ---- */

static kivi_status seq_init(kivi_seq *seq, kivi_cache *cache, kivi_error *err) {
    const ki_layout *l = &cache->layout;
    void *p;
    seq->cache = cache;
    seq->max_pages = cache->max_seq_pages;
    KI_TRY(ki_alloc_array(&p, cache->mem, KI_TAG_other, seq->max_pages, sizeof(uint32_t), err));
    seq->pages = p;
    KI_TRY(ki_store_init(&seq->window, cache, l->k_ring_blocks, l->v_ring_blocks, err));
    return ki_sinks_init(&seq->sinks, cache, err);
}

kivi_status kivi_seq_create(kivi_seq **out, kivi_cache *cache, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, cache->mem, KI_TAG_other, sizeof(kivi_seq), err));
    kivi_seq *seq = p;
    kivi_status status = seq_init(seq, cache, err);
    if (status != KIVI_OK) kivi_seq_destroy(&seq);
    *out = seq;
    return status;
}

static void release_pages(kivi_seq *seq, uint32_t keep) {
    while (seq->n_pages > keep) {
        uint32_t id = seq->pages[--seq->n_pages];
        if (id != (uint32_t)KI_NO_PAGE) ki_pool_unpin(&seq->cache->pool, id);
    }
    seq->n_gone = KI_MIN(seq->n_gone, keep);
}

void kivi_seq_destroy(kivi_seq **out) {
    kivi_seq *seq = *out;
    if (!seq) return;
    ki_mem *mem = seq->cache->mem;
    release_pages(seq, 0);
    ki_store_deinit(&seq->window, seq->cache);
    ki_store_deinit(&seq->large, seq->cache);
    ki_store_deinit(&seq->sinks, seq->cache);
    ki_free(mem, seq->pages);
    ki_free(mem, seq);
    *out = NULL;
}

uint32_t kivi_seq_length(const kivi_seq *seq) { return seq->n_tokens; }

static uint32_t pages_for(uint32_t n_tokens) {
    return (n_tokens + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS;
}

uint32_t ki_first_unwritten(const ki_layout *l, uint32_t n) {
    uint32_t k = l->kv.k_bits == 16 ? n : ki_k_packed(l, n),
             v = l->kv.v_bits == 16 ? n : ki_v_packed(l, n);
    return KI_MIN(k, v);
}

uint32_t ki_seq_live_from(const ki_layout *l, uint32_t n) {
    uint32_t seen = n + 1 > l->window ? n + 1 - l->window : 0;
    return l->window ? KI_MIN(seen, ki_first_unwritten(l, n)) : 0;
}

/* Gives back what lies behind the window of all rows to come, and of those that a step back within
 * rewind_tokens would bring again. Positions keep their place in the table. */
static void drop_behind_window(kivi_seq *seq) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t back = seq->n_tokens - KI_MIN(seq->n_tokens, l->kv.rewind_tokens);
    uint32_t live = ki_seq_live_from(l, back) / KI_PAGE_TOKENS;
    while (seq->n_gone < live) {
        ki_pool_unpin(&seq->cache->pool, seq->pages[seq->n_gone]);
        seq->pages[seq->n_gone++] = (uint32_t)KI_NO_PAGE;
    }
}

kivi_status ki_seq_own_page(kivi_seq *seq, uint32_t index, kivi_error *err) {
    ki_pool *pool = &seq->cache->pool;
    uint32_t old = seq->pages[index], fresh;
    if (pool->counts[old] == 1) return KIVI_OK;
    if (!ki_pool_take(pool, &fresh))
        return KI_FAIL(err, FULL, "cache: no free page of %u to copy a shared one into",
                       pool->n_pages);
    ki_pool_copy(pool, fresh, old);
    ki_pool_unpin(pool, old);
    seq->pages[index] = fresh;
    return KIVI_OK;
}

kivi_status ki_seq_reserve(kivi_seq *seq, uint32_t n_tokens, kivi_error *err) {
    ki_pool *pool = &seq->cache->pool;
    uint32_t need = pages_for(n_tokens), had = seq->n_pages;
    if (need > seq->max_pages)
        return KI_FAIL(err, FULL, "cache: %u tokens, a sequence has at most %u", n_tokens,
                       seq->max_pages * KI_PAGE_TOKENS);
    if (need > had && need - had > pool->n_free)
        return KI_FAIL(err, FULL, "cache: %u more pages needed for %u tokens, %u of %u are free",
                       need - had, n_tokens, pool->n_free, pool->n_pages);
    while (seq->n_pages < need) {
        ki_pool_take(pool, &seq->pages[seq->n_pages]);
        seq->n_pages++;
    }
    uint32_t first = ki_first_unwritten(&seq->cache->layout, seq->n_tokens) / KI_PAGE_TOKENS;
    for (uint32_t i = KI_MAX(first, seq->n_gone); i < had; i++) {
        kivi_status status = ki_seq_own_page(seq, i, err);
        if (status == KIVI_OK) continue;
        release_pages(seq, had);
        return status;
    }
    return KIVI_OK;
}

/* ---- steps ---- */

/* Room in 16 bit for rows up to end, and for all that the rows to come, or a step back after giving
 * them up, read. */
static kivi_status make_room(kivi_seq *seq, uint32_t end, kivi_error *err) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t pos = seq->n_tokens, back = pos - KI_MIN(pos, l->kv.rewind_tokens);
    uint32_t k = KI_MIN(ki_k_exact(seq, pos), KI_MAX(ki_k_packed(l, back), seq->k_valid_from));
    uint32_t v = KI_MIN(ki_v_exact(seq, pos), KI_MAX(ki_v_packed(l, back), seq->v_valid_from));
    return ensure_store(seq, k, v, end, err);
}

/* A device's kernels read the rows of a step from where the step put them, and only then write the
 * newest into the ring: a whole prompt in one step needs no larger one. With tokens before it the
 * ring is needed still, so that giving the step up brings nothing but the step to its end. */
static bool is_one_step(const kivi_seq *seq, uint32_t n_rows) {
    return seq->cache->device && seq->n_tokens == 0 && n_rows == seq->run_left &&
           n_rows <= seq->cache->max_step_rows;
}

kivi_status kivi_seq_begin_prompt(kivi_seq *seq, uint32_t n_tokens, kivi_error *err) {
    if (seq->step_rows || seq->run_left)
        return KI_FAIL(err, ARG, "sequence: a prompt cannot begin within %s",
                       seq->step_rows ? "a step" : "a prompt");
    if (n_tokens == 0 || n_tokens > UINT32_MAX / 2 - seq->n_tokens)
        return KI_FAIL(err, ARG, "sequence: a prompt of %u tokens after %u", n_tokens,
                       seq->n_tokens);
    seq->run_start = seq->n_tokens;
    seq->run_left = n_tokens;
    if (seq->cache->layout.kv.rule != KIVI_RULE_PAPER || is_one_step(seq, n_tokens))
        return KIVI_OK; /* the others make room step by step */
    kivi_status status = make_room(seq, seq->run_start + n_tokens, err);
    if (status != KIVI_OK) seq->run_left = 0;
    return status;
}

kivi_status kivi_seq_begin(kivi_seq *seq, uint32_t n_rows, kivi_error *err) {
    if (seq->step_rows) return KI_FAIL(err, ARG, "sequence: a step is open already");
    if (n_rows == 0 || n_rows > seq->cache->max_step_rows)
        return KI_FAIL(err, ARG, "sequence: a step of %u rows, expected 1 to %u", n_rows,
                       seq->cache->max_step_rows);
    if (seq->run_left && n_rows > seq->run_left)
        return KI_FAIL(err, ARG, "sequence: %u rows, but only %u are left of the prompt", n_rows,
                       seq->run_left);
    uint32_t end = seq->n_tokens + n_rows;
    bool is_paper = seq->cache->layout.kv.rule == KIVI_RULE_PAPER;
    if (!is_one_step(seq, n_rows))
        KI_TRY(make_room(seq, is_paper ? seq->n_tokens + KI_MAX(n_rows, seq->run_left) : end, err));
    kivi_status status = ki_seq_reserve(seq, end, err);
    if (status != KIVI_OK) {
        if (!seq->run_left) drop_large(seq);
        return status;
    }
    seq->step_rows = n_rows;
    return KIVI_OK;
}

kivi_status kivi_seq_commit(kivi_seq *seq, kivi_error *err) {
    if (!seq->step_rows) return KI_FAIL(err, ARG, "sequence: no step is open");
    seq->n_tokens += seq->step_rows;
    if (seq->run_left) seq->run_left -= seq->step_rows;
    seq->step_rows = 0;
    note_valid(seq, seq->n_tokens);
    if (!seq->run_left) drop_large(seq);
    drop_behind_window(seq);
#ifdef KI_DEBUG
    if (!ki_pool_check(&seq->cache->pool))
        return KI_FAIL(err, INTERNAL, "cache: free + referenced pages != all pages");
#endif
    return KIVI_OK;
}

void kivi_seq_abort(kivi_seq *seq) {
    if (!seq->step_rows && !seq->run_left) return;
    note_valid(seq, seq->n_tokens + seq->step_rows); /* its rows may have overwritten the oldest */
    seq->step_rows = 0;
    seq->run_left = 0;
    release_pages(seq, pages_for(seq->n_tokens));
    drop_large(seq);
}

/* ---- forks and steps back ---- */

void ki_store_copy_whole(const kivi_cache *cache, const ki_store *to, const ki_store *from) {
    const ki_device *d = cache->device;
    size_t unit = n_slots(&cache->layout) * block_bytes(&cache->layout);
    if (to->k) memcpy(to->k, from->k, to->k_blocks * unit);
    if (to->v) memcpy(to->v, from->v, to->v_blocks * unit);
    if (to->there)
        d->copy(d->context, to->there, from->there, (to->k_blocks + to->v_blocks) * unit);
}

static kivi_status fork_pages(kivi_seq *seq, const kivi_seq *from, kivi_error *err) {
    ki_pool *pool = &seq->cache->pool;
    for (uint32_t i = 0; i < from->n_pages; i++) {
        if (from->pages[i] != (uint32_t)KI_NO_PAGE) ki_pool_pin(pool, from->pages[i]);
        seq->pages[seq->n_pages++] = from->pages[i];
    }
    seq->n_gone = from->n_gone;
    for (uint32_t i = ki_first_unwritten(&seq->cache->layout, from->n_tokens) / KI_PAGE_TOKENS;
         i < seq->n_pages; i++)
        KI_TRY(ki_seq_own_page(seq, i, err));
    return KIVI_OK;
}

kivi_status kivi_seq_fork(kivi_seq **out, const kivi_seq *from, kivi_error *err) {
    *out = NULL;
    if (from->step_rows || from->run_left)
        return KI_FAIL(err, ARG, "sequence: a fork cannot be made within a %s",
                       from->step_rows ? "step" : "prompt");
    kivi_seq *seq;
    KI_TRY(kivi_seq_create(&seq, from->cache, err));
    seq->n_tokens = from->n_tokens;
    seq->run_start = from->run_start;
    seq->k_valid_from = from->k_valid_from;
    seq->v_valid_from = from->v_valid_from;
    ki_store_copy_whole(from->cache, &seq->window, &from->window);
    ki_store_copy_whole(from->cache, &seq->sinks, &from->sinks);
    kivi_status status = fork_pages(seq, from, err);
    if (status != KIVI_OK) kivi_seq_destroy(&seq);
    *out = seq;
    return status;
}

bool ki_seq_can_stand_at(const kivi_seq *seq, uint32_t n) {
    const ki_layout *l = &seq->cache->layout;
    if (ki_seq_live_from(l, n) / KI_PAGE_TOKENS < seq->n_gone) return false;
    uint32_t sinks = KI_MIN(l->kv.sink_tokens, n); /* these are never lost */
    uint32_t k_line = KI_MAX(ki_k_packed(l, n), sinks), v_line = KI_MAX(ki_v_packed(l, n), sinks);
    bool k = l->kv.k_bits == 16 || k_line >= seq->k_valid_from || k_line == n;
    bool v = l->kv.v_bits == 16 || v_line >= seq->v_valid_from || v_line == n;
    return k && v;
}

kivi_status kivi_seq_rewind(kivi_seq *seq, uint32_t n_tokens, kivi_error *err) {
    if (seq->step_rows || seq->run_left)
        return KI_FAIL(err, ARG, "sequence: no step back within a %s",
                       seq->step_rows ? "step" : "prompt");
    if (n_tokens > seq->n_tokens)
        return KI_FAIL(err, ARG, "sequence: back to %u tokens, but there are only %u", n_tokens,
                       seq->n_tokens);
    if (n_tokens == 0) seq->k_valid_from = seq->v_valid_from = 0;
    else if (!ki_seq_can_stand_at(seq, n_tokens)) {
        uint32_t earliest = n_tokens;
        while (!ki_seq_can_stand_at(seq, earliest)) earliest++;
        return KI_FAIL(
            err, ARG,
            "sequence: the 16-bit rows or pages for %u tokens are gone, %u is the earliest length "
            "left",
            n_tokens, earliest);
    }
    seq->n_tokens = n_tokens;
    seq->run_start = KI_MIN(seq->run_start, n_tokens);
    /* rows from here on will be written again */
    seq->k_valid_from = KI_MIN(seq->k_valid_from, n_tokens);
    seq->v_valid_from = KI_MIN(seq->v_valid_from, n_tokens);
    release_pages(seq, pages_for(n_tokens));
    return KIVI_OK;
}

/* The prompt's larger ring still holds rows that the usual one has lost: first back, then it goes.
 */
kivi_status ki_seq_abandon(kivi_seq *seq, uint32_t n_tokens, kivi_error *err) {
    seq->run_left = 0;
    kivi_status status = kivi_seq_rewind(seq, n_tokens, err);
    drop_large(seq);
    return status;
}
