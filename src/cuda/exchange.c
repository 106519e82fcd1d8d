/* exchange.c: a sequence between the device's form and this process's, for files. Pages go through
 * the permutation of kv_layout.c; 16-bit rows stand in the order of a 16-bit plane there, and in
 * blocks of 16 tokens here. Nobody waits for it: rows are moved one by one. */
#include "cuda_private.h"

typedef struct exchange {
    ki_cuda_backend *b;
    kivi_seq *host, *there;
    bool to_host;
    uint8_t *room; /* the device's bytes: a page id's, or a ring's */
    kivi_error *err;
} exchange;

static kivi_status move(const exchange *x, void *at, size_t n_bytes, bool to_host) {
    const ki_device *d = &x->b->memory.device;
    if (to_host) return d->get(d->context, x->room, at, n_bytes, x->err);
    return d->put(d->context, at, x->room, n_bytes, x->err);
}

/* ---- pages ---- */

static kivi_status exchange_page(const exchange *x, uint32_t index) {
    const ki_cuda_layout *l = &x->b->layout;
    size_t slots = (size_t)l->n_layers * l->n_kv_heads;
    uint8_t *at = x->b->cache->pool.data + x->there->pages[index] * x->b->cache->pool.id_bytes;
    if (x->to_host) KI_TRY(move(x, at, slots * l->page_bytes, true));
    for (size_t i = 0; i < slots; i++) {
        uint8_t *own = x->room + i * l->page_bytes;
        uint8_t *host = ki_seq_page(x->host, index, (uint32_t)(i / l->n_kv_heads),
                                    (uint32_t)(i % l->n_kv_heads));
        if (x->to_host) ki_cuda_page_to_cpu(host, own, l);
        else ki_cuda_page_from_cpu(own, host, l);
    }
    return x->to_host ? KIVI_OK : move(x, at, slots * l->page_bytes, false);
}

/* ---- rows ---- */

/* One side's row of a 16-bit store: block `block` of n in each slot's first_block + n_blocks. */
static void exchange_row(const exchange *x, bool keys, uint32_t slot, size_t block, uint32_t pos) {
    const ki_cuda_layout *l = &x->b->layout;
    uint32_t d = l->head_dim, layer = slot / l->n_kv_heads, head = slot % l->n_kv_heads;
    uint32_t lane = pos % KI_LANES, steps = d / 16, t = pos % KI_SUB_TOKENS;
    uint16_t *own = (uint16_t *)(void *)x->room + block * KI_SUB_TOKENS * d;
    const uint16_t *found = keys ? ki_seq_k_block(x->host, layer, head, pos / KI_LANES)
                                 : ki_seq_v_block(x->host, layer, head, pos / KI_LANES);
    uint16_t *host = (uint16_t *)(uintptr_t)found; /* a sequence of our own */
    for (uint32_t c = 0; c < d; c++) {
        ki_order_place p = keys ? ki_order_key(t, c, steps, 16) : ki_order_value(t, c, steps, 16);
        uint16_t *a = own + (size_t)p.word * 2 + p.bit / 16;
        uint16_t *b = host + (keys ? c * KI_LANES + lane : lane * d + c);
        if (x->to_host) *b = *a;
        else *a = *b;
    }
}

/* Positions [from, to) of one side, in a store of k + v blocks a slot. */
static void exchange_rows(const exchange *x, bool keys, const ki_store *store, uint32_t from,
                          uint32_t to) {
    const ki_cuda_layout *l = &x->b->layout;
    size_t stride = store->k_blocks + store->v_blocks;
    uint32_t n = keys ? store->k_blocks : store->v_blocks, first = keys ? 0 : store->k_blocks;
    for (uint32_t slot = 0; slot < l->n_layers * l->n_kv_heads; slot++)
        for (uint32_t pos = from; pos < to; pos++) {
            uint32_t b = pos / KI_SUB_TOKENS;
            exchange_row(x, keys, slot, slot * stride + first + b % n, pos);
        }
}

static kivi_status exchange_store(const exchange *x, const ki_store *store, bool sinks) {
    const ki_cuda_layout *l = &x->b->layout;
    uint32_t n = x->there->n_tokens, in_sinks = KI_MIN(n, l->sink_blocks * KI_SUB_TOKENS);
    size_t slots = (size_t)l->n_layers * l->n_kv_heads;
    size_t n_bytes =
        slots * (store->k_blocks + store->v_blocks) * KI_SUB_TOKENS * l->head_dim * 2;
    if (!store->there || !n) return KIVI_OK;
    KI_TRY(move(x, store->there, n_bytes, true)); /* for the rows that are not touched, too */
    for (int keys = 0; keys < 2; keys++) {
        if ((keys ? l->k_bits : l->v_bits) == 16) continue;
        uint32_t line = keys ? ki_cuda_k_packed(l, n) : ki_cuda_v_packed(l, n);
        if (sinks) exchange_rows(x, keys, store, 0, KI_MIN(n, l->sink_tokens));
        exchange_rows(x, keys, store, sinks ? KI_MIN(KI_MAX(line, l->sink_tokens), in_sinks)
                                            : KI_MAX(line, in_sinks),
                      sinks ? in_sinks : n);
    }
    return x->to_host ? KIVI_OK : move(x, store->there, n_bytes, false);
}

kivi_status ki_cuda_exchange(ki_cuda_backend *b, kivi_seq *host, kivi_seq *there, bool to_host,
                             kivi_error *err) {
    exchange x = {.b = b, .host = host, .there = there, .to_host = to_host, .err = err};
    const ki_cuda_layout *l = &b->layout;
    size_t n_bytes = KI_MAX(l->id_bytes, KI_MAX(l->ring_bytes, l->sink_bytes));
    void *p;
    KI_TRY(ki_alloc(&p, b->host, KI_TAG_other, n_bytes, err));
    x.room = p;
    kivi_status status = KIVI_OK;
    for (uint32_t i = there->n_gone; i < there->n_pages && status == KIVI_OK; i++)
        status = exchange_page(&x, i);
    if (status == KIVI_OK) status = exchange_store(&x, &there->window, false);
    if (status == KIVI_OK) status = exchange_store(&x, &there->sinks, true);
    ki_free(b->host, p);
    return status;
}
