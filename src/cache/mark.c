/* mark.c: the state of a sequence after n tokens, kept without the sequence, for prefixes that
 * several prompts begin with. Going on from a mark gives the bytes of going on from the sequence:
 * the pages are the same ones, and all rows that are still read in 16 bit are copied. */
#include "cache.h"

static uint32_t page_of(uint32_t n_tokens) {
    return (n_tokens + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS;
}

typedef struct tail_size {
    uint32_t k_line, v_line, k_blocks, v_blocks;
} tail_size;

/* The rows behind the lines, in whole blocks; none where the last token is behind the line, too. */
static tail_size tail_of(const ki_layout *l, uint32_t n) {
    tail_size t = {.k_line = KI_MAX(ki_k_packed(l, n), KI_MIN(l->kv.sink_tokens, n)),
                   .v_line = KI_MAX(ki_v_packed(l, n), KI_MIN(l->kv.sink_tokens, n))};
    uint32_t unit = l->block_tokens, end = (n + unit - 1) / unit;
    if (l->kv.k_bits < 16 && t.k_line < n) t.k_blocks = end - t.k_line / unit;
    if (l->kv.v_bits < 16 && t.v_line < n) t.v_blocks = end - t.v_line / unit;
    return t;
}

uint64_t ki_mark_bytes(const ki_layout *l, uint32_t n_tokens) {
    tail_size t = tail_of(l, n_tokens);
    uint64_t blocks = (uint64_t)t.k_blocks + t.v_blocks;
    if (l->kv.k_bits < 16) blocks += l->sink_blocks;
    if (l->kv.v_bits < 16) blocks += l->sink_blocks;
    return blocks * l->n_layers * l->n_kv_heads * l->block_tokens * l->head_dim * 2;
}

/* The first page that a sequence of n_tokens may still write. */
static uint32_t open_page(const ki_layout *l, uint32_t n_tokens) {
    return ki_first_unwritten(l, n_tokens) / KI_PAGE_TOKENS;
}

uint32_t ki_mark_create_pages(const kivi_seq *seq, uint32_t n_tokens, bool is_last) {
    uint32_t open = open_page(&seq->cache->layout, seq->n_tokens), n_pages = page_of(n_tokens);
    return is_last || n_pages <= open ? 0 : n_pages - open;
}

uint32_t ki_mark_open_pages(const ki_mark *mark) {
    uint32_t open = open_page(&mark->cache->layout, mark->n_tokens);
    return mark->n_pages <= open ? 0 : mark->n_pages - open;
}

void ki_mark_destroy(ki_mark **out) {
    ki_mark *m = *out;
    if (!m) return;
    ki_mem *mem = m->cache->mem;
    for (uint32_t i = m->n_gone; i < m->n_pages; i++) ki_pool_unpin(&m->cache->pool, m->pages[i]);
    ki_store_deinit(&m->tail, m->cache);
    ki_store_deinit(&m->sinks, m->cache);
    ki_free(mem, m->pages);
    ki_free(mem, m);
    *out = NULL;
}

/* Shared as far as the sequence will not write; what it will is copied. */
static kivi_status take_pages(ki_mark *m, const kivi_seq *seq, uint32_t n_pages, bool is_last,
                              kivi_error *err) {
    ki_pool *pool = &m->cache->pool;
    uint32_t open = is_last ? n_pages : open_page(&m->cache->layout, seq->n_tokens), id;
    for (uint32_t i = 0; i < m->n_gone; i++) m->pages[i] = (uint32_t)KI_NO_PAGE;
    m->n_pages = m->n_gone;
    for (uint32_t i = m->n_gone; i < n_pages; i++) {
        id = seq->pages[i];
        if (i < open) ki_pool_pin(pool, id);
        else {
            if (!ki_pool_take(pool, &id))
                return KI_FAIL(err, FULL, "cache: no free page of %u for a mark", pool->n_pages);
            ki_pool_copy(pool, id, seq->pages[i]);
        }
        m->pages[m->n_pages++] = id;
    }
    return KIVI_OK;
}

static kivi_status fill(ki_mark *m, const kivi_seq *seq, bool is_last, kivi_error *err) {
    const ki_layout *l = &m->cache->layout;
    tail_size t = tail_of(l, m->n_tokens);
    uint32_t n_pages = page_of(m->n_tokens);
    void *p;
    KI_TRY(ki_alloc_array(&p, m->cache->mem, KI_TAG_other, KI_MAX(n_pages, 1u), sizeof(uint32_t),
                          err));
    m->pages = p;
    m->n_gone = KI_MIN(seq->n_gone, n_pages);
    KI_TRY(ki_store_init(&m->tail, m->cache, t.k_blocks, t.v_blocks, err));
    KI_TRY(ki_sinks_init(&m->sinks, m->cache, err));
    ki_store_copy(m->cache, &m->tail, ki_seq_store(seq), m->n_tokens);
    ki_store_copy_whole(m->cache, &m->sinks, &seq->sinks);
    return take_pages(m, seq, n_pages, is_last, err);
}

kivi_status ki_mark_create(ki_mark **out, const kivi_seq *seq, uint32_t n_tokens, bool is_last,
                           kivi_error *err) {
    void *p;
    *out = NULL;
    if (seq->step_rows || n_tokens > seq->n_tokens || !ki_seq_can_stand_at(seq, n_tokens))
        return KI_FAIL(err, ARG, "cache: no mark at %u of %u tokens", n_tokens, seq->n_tokens);
    KI_TRY(ki_alloc(&p, seq->cache->mem, KI_TAG_other, sizeof(ki_mark), err));
    ki_mark *m = p;
    *m = (ki_mark){.cache = seq->cache, .n_tokens = n_tokens};
    kivi_status status = fill(m, seq, is_last, err);
    if (status != KIVI_OK) ki_mark_destroy(&m);
    *out = m;
    return status;
}

kivi_status ki_mark_open(kivi_seq **out, const ki_mark *mark, kivi_error *err) {
    const ki_layout *l = &mark->cache->layout;
    tail_size t = tail_of(l, mark->n_tokens);
    kivi_seq *seq;
    *out = NULL;
    KI_TRY(kivi_seq_create(&seq, mark->cache, err));
    seq->n_tokens = seq->run_start = mark->n_tokens;
    seq->k_valid_from = t.k_line;
    seq->v_valid_from = t.v_line;
    ki_store_copy(mark->cache, &seq->window, &mark->tail, mark->n_tokens);
    ki_store_copy_whole(mark->cache, &seq->sinks, &mark->sinks);
    for (uint32_t i = 0; i < mark->n_pages; i++) {
        seq->pages[seq->n_pages++] = mark->pages[i];
        if (i >= mark->n_gone) ki_pool_pin(&mark->cache->pool, mark->pages[i]);
    }
    seq->n_gone = mark->n_gone;
    kivi_status status = KIVI_OK;
    uint32_t first = KI_MAX(open_page(l, mark->n_tokens), mark->n_gone);
    for (uint32_t i = first; i < seq->n_pages && status == KIVI_OK; i++)
        status = ki_seq_own_page(seq, i, err);
    if (status != KIVI_OK) kivi_seq_destroy(&seq);
    *out = seq;
    return status;
}
