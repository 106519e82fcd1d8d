#include "cache.h"

static kivi_status take_data(ki_pool *pool, kivi_error *err) {
    const ki_device *d = pool->device;
    size_t n_bytes;
    void *p;
    if (!ki_mul(&n_bytes, pool->n_pages, pool->id_bytes))
        return KI_FAIL(err, NOMEM, "cache: %u pages of %zu bytes overflow", pool->n_pages,
                       pool->id_bytes);
    if (d) KI_TRY(d->alloc(&p, d->context, KI_TAG_kv_codes, n_bytes, err));
    else KI_TRY(ki_alloc(&p, pool->mem, KI_TAG_kv_codes, n_bytes, err));
    pool->data = p;
    return KIVI_OK;
}

/* One block of memory holds both kinds of planes; the count tells them apart. */
static void count_scales(ki_pool *pool, int64_t sign) {
    ki_mem *mem = pool->device ? pool->device->mem : pool->mem;
    ki_mem_count(mem, KI_TAG_kv_codes, -sign * (int64_t)pool->scale_bytes);
    ki_mem_count(mem, KI_TAG_kv_scales, sign * (int64_t)pool->scale_bytes);
}

kivi_status ki_pool_init(ki_pool *pool, ki_mem *mem, const ki_device *device,
                         const ki_layout *layout, uint32_t n_pages, kivi_error *err) {
    size_t heads = (size_t)layout->n_layers * layout->n_kv_heads;
    void *p;
    *pool = (ki_pool){.mem = mem,
                      .device = device,
                      .n_pages = n_pages,
                      .n_free = n_pages,
                      .id_bytes = heads * layout->page_bytes};
    if (n_pages == 0) return KI_FAIL(err, ARG, "cache: 0 pages, expected at least 1");
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_other, n_pages, sizeof(uint32_t), err));
    pool->counts = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_other, n_pages, sizeof(uint32_t), err));
    pool->free_list = p;
    KI_TRY(take_data(pool, err));
    pool->scale_bytes = (size_t)n_pages * heads * layout->page_scale_bytes;
    count_scales(pool, 1);
    for (uint32_t i = 0; i < n_pages; i++)
        pool->free_list[i] = n_pages - 1 - i; /* page 0 is taken first */
    return KIVI_OK;
}

void ki_pool_deinit(ki_pool *pool) {
    if (!pool->mem) return;
    count_scales(pool, -1);
    if (pool->device) pool->device->free(pool->device->context, pool->data);
    else ki_free(pool->mem, pool->data);
    ki_free(pool->mem, pool->counts);
    ki_free(pool->mem, pool->free_list);
    *pool = (ki_pool){0};
}

bool ki_pool_take(ki_pool *pool, uint32_t *id) {
    if (pool->n_free == 0) return false;
    *id = pool->free_list[--pool->n_free];
    pool->counts[*id] = 1;
    uint8_t *page = pool->data + *id * pool->id_bytes;
    if (pool->device) pool->device->zero(pool->device->context, page, pool->id_bytes);
    else memset(page, 0, pool->id_bytes);
    return true;
}

void ki_pool_copy(ki_pool *pool, uint32_t to, uint32_t from) {
    const ki_device *d = pool->device;
    uint8_t *target = pool->data + to * pool->id_bytes;
    const uint8_t *source = pool->data + from * pool->id_bytes;
    if (d) d->copy(d->context, target, source, pool->id_bytes);
    else memcpy(target, source, pool->id_bytes);
}

void ki_pool_pin(ki_pool *pool, uint32_t id) { pool->n_shared += ++pool->counts[id] == 2; }

void ki_pool_unpin(ki_pool *pool, uint32_t id) {
    if (--pool->counts[id]) {
        pool->n_shared -= pool->counts[id] == 1;
        return;
    }
    pool->free_list[pool->n_free++] = id;
#ifdef KI_DEBUG
    if (pool->device) return;
    memset(pool->data + id * pool->id_bytes, 0xff,
           pool->id_bytes); /* NaN scales: whoever reads it will show */
#endif
}

bool ki_pool_check(const ki_pool *pool) {
    uint32_t n_referenced = 0, n_shared = 0;
    for (uint32_t i = 0; i < pool->n_pages; i++) {
        n_referenced += pool->counts[i] > 0;
        n_shared += pool->counts[i] > 1;
    }
    if (n_referenced + pool->n_free != pool->n_pages || n_shared != pool->n_shared) return false;
    for (uint32_t i = 0; i < pool->n_free; i++)
        if (pool->free_list[i] >= pool->n_pages || pool->counts[pool->free_list[i]]) return false;
    return true;
}
