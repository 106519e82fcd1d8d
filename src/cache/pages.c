#include "cache.h"

kivi_status ki_pool_init(ki_pool *pool, ki_mem *mem, const ki_layout *layout, uint32_t n_pages,
                         kivi_error *err) {
    size_t heads = (size_t)layout->n_layers * layout->n_kv_heads;
    void *p;
    *pool = (ki_pool){
        .mem = mem, .n_pages = n_pages, .n_free = n_pages, .id_bytes = heads * layout->page_bytes};
    if (n_pages == 0) return KI_FAIL(err, ARG, "cache: 0 pages, expected at least 1");
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_other, n_pages, sizeof(uint32_t), err));
    pool->counts = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_other, n_pages, sizeof(uint32_t), err));
    pool->free_list = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_kv_codes, n_pages, pool->id_bytes, err));
    pool->data = p;
    /* One block of memory holds both kinds of planes; the count tells them apart. */
    pool->scale_bytes = (size_t)n_pages * heads * layout->page_scale_bytes;
    ki_mem_count(mem, KI_TAG_kv_codes, -(int64_t)pool->scale_bytes);
    ki_mem_count(mem, KI_TAG_kv_scales, (int64_t)pool->scale_bytes);
    for (uint32_t i = 0; i < n_pages; i++)
        pool->free_list[i] = n_pages - 1 - i; /* page 0 is taken first */
    return KIVI_OK;
}

void ki_pool_deinit(ki_pool *pool) {
    if (!pool->mem) return;
    ki_mem_count(pool->mem, KI_TAG_kv_codes, (int64_t)pool->scale_bytes);
    ki_mem_count(pool->mem, KI_TAG_kv_scales, -(int64_t)pool->scale_bytes);
    ki_free(pool->mem, pool->data);
    ki_free(pool->mem, pool->counts);
    ki_free(pool->mem, pool->free_list);
    *pool = (ki_pool){0};
}

bool ki_pool_take(ki_pool *pool, uint32_t *id) {
    if (pool->n_free == 0) return false;
    *id = pool->free_list[--pool->n_free];
    pool->counts[*id] = 1;
    memset(pool->data + *id * pool->id_bytes, 0, pool->id_bytes);
    return true;
}

void ki_pool_pin(ki_pool *pool, uint32_t id) { pool->n_shared += ++pool->counts[id] == 2; }

void ki_pool_unpin(ki_pool *pool, uint32_t id) {
    if (--pool->counts[id]) {
        pool->n_shared -= pool->counts[id] == 1;
        return;
    }
    pool->free_list[pool->n_free++] = id;
#ifdef KI_DEBUG
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
