#include "base.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static const char *const status_names[] = {
#define X(name, text) #name,
    KIVI_STATUS_LIST(X)
#undef X
};
static const char *const status_texts[] = {
#define X(name, text) text,
    KIVI_STATUS_LIST(X)
#undef X
};
const char *const ki_tag_names[KI_TAG_COUNT] = {
#define X(name) #name,
    KIVI_TAG_LIST(X)
#undef X
};

static bool status_known(kivi_status status) {
    return (unsigned)status < sizeof status_names / sizeof *status_names;
}

const char *kivi_status_name(kivi_status status) {
    return status_known(status) ? status_names[status] : "?";
}

const char *kivi_status_text(kivi_status status) {
    return status_known(status) ? status_texts[status] : "unknown status";
}

kivi_status ki_fail(kivi_error *err, kivi_status status, const char *format, ...) {
    if (!err) return status;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    err->status = status;
    return status;
}

/* A block is  | header 64 bytes | n_bytes | 64 bytes of slack |  so that vector loads may run past
 * the end. Large blocks are mapped: their zeros cost no memory until they are touched, and freeing
 * gives it back at once. */
typedef struct block_header {
    size_t n_bytes, mapped_bytes; /* mapped_bytes 0: from the heap */
    ki_tag tag;
} block_header;
enum {
    HEADER_BYTES = 64,
    SLACK_BYTES = 64,
    MAP_FROM_BYTES = 256 * 1024,
    HUGE_FROM_BYTES = 8 << 20
};

static char *raw_alloc(size_t total_bytes) {
    if (total_bytes >= MAP_FROM_BYTES) {
        void *p =
            mmap(NULL, total_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) return NULL;
        /* Pages of a cache are read at a stride that misses the TLB of small pages. Advice only. */
        if (total_bytes >= HUGE_FROM_BYTES) madvise(p, total_bytes, MADV_HUGEPAGE);
        return p;
    }
    char *p = aligned_alloc(64, total_bytes);
    if (p) memset(p, 0, total_bytes);
    return p;
}

void ki_mem_init(ki_mem *mem) {
    for (int i = 0; i < KI_TAG_COUNT; i++) atomic_init(&mem->bytes[i], 0);
    atomic_init(&mem->n_blocks, 0);
    atomic_init(&mem->fail_countdown, -1);
}

kivi_memory ki_mem_report(const ki_mem *mem) {
    kivi_memory m;
#define X(name) m.name = atomic_load(&mem->bytes[KI_TAG_##name]);
    KIVI_TAG_LIST(X)
#undef X
    return m;
}

uint64_t ki_memory_sum(const kivi_memory *memory) {
    uint64_t sum = 0;
#define X(name) sum += memory->name;
    KIVI_TAG_LIST(X)
#undef X
    return sum;
}

void ki_mem_count(ki_mem *mem, ki_tag tag, int64_t n_bytes) {
    atomic_fetch_add(&mem->bytes[tag], (uint64_t)n_bytes);
}

bool ki_mem_must_fail(ki_mem *mem) {
    int64_t left = atomic_load(&mem->fail_countdown);
    if (left < 0) return false;
    if (left > 0) atomic_store(&mem->fail_countdown, left - 1);
    return left <= 1;
}

kivi_status ki_alloc(void **out, ki_mem *mem, ki_tag tag, size_t n_bytes, kivi_error *err) {
    *out = NULL;
    size_t total;
    bool fits =
        ki_add(&total, n_bytes, HEADER_BYTES + SLACK_BYTES) && ki_round_up(&total, total, 64);
    char *base = fits && !ki_mem_must_fail(mem) ? raw_alloc(total) : NULL;
    if (!base)
        return KI_FAIL(err, NOMEM, "memory: %zu bytes for %s could not be had", n_bytes,
                       ki_tag_names[tag]);
    size_t mapped_bytes = total >= MAP_FROM_BYTES ? total : 0;
    *(block_header *)base =
        (block_header){.n_bytes = n_bytes, .mapped_bytes = mapped_bytes, .tag = tag};
    ki_mem_count(mem, tag, (int64_t)n_bytes);
    atomic_fetch_add(&mem->n_blocks, 1);
    *out = base + HEADER_BYTES;
    return KIVI_OK;
}

kivi_status ki_alloc_array(void **out, ki_mem *mem, ki_tag tag, size_t count, size_t item_bytes,
                           kivi_error *err) {
    size_t n_bytes;
    *out = NULL;
    if (!ki_mul(&n_bytes, count, item_bytes))
        return KI_FAIL(err, NOMEM, "memory: %zu items of %zu bytes for %s overflow", count,
                       item_bytes, ki_tag_names[tag]);
    return ki_alloc(out, mem, tag, n_bytes, err);
}

void ki_free(ki_mem *mem, void *block) {
    if (!block) return;
    char *base = (char *)block - HEADER_BYTES;
    const block_header *header = (const block_header *)base;
    ki_mem_count(mem, header->tag, -(int64_t)header->n_bytes);
    atomic_fetch_sub(&mem->n_blocks, 1);
    if (header->mapped_bytes) munmap(base, header->mapped_bytes);
    else free(base);
}

void ki_buf_init(ki_buf *buf, ki_mem *mem, size_t max_bytes) {
    *buf = (ki_buf){.mem = mem, .max_bytes = max_bytes};
}

void ki_buf_deinit(ki_buf *buf) {
    ki_free(buf->mem, buf->data);
    *buf = (ki_buf){.mem = buf->mem, .max_bytes = buf->max_bytes};
}

kivi_status ki_buf_append(ki_buf *buf, const void *bytes, size_t n_bytes, kivi_error *err) {
    size_t need;
    if (!ki_add(&need, buf->n_bytes, n_bytes) || need > buf->max_bytes)
        return KI_FAIL(err, NOMEM, "buffer: %zu bytes more exceed its limit of %zu", n_bytes,
                       buf->max_bytes);
    if (need > buf->cap_bytes) {
        size_t cap = KI_MIN(KI_MAX(need, KI_MAX(buf->cap_bytes * 2, (size_t)256)), buf->max_bytes);
        void *bigger;
        KI_TRY(ki_alloc(&bigger, buf->mem, KI_TAG_other, cap, err));
        if (buf->n_bytes) memcpy(bigger, buf->data, buf->n_bytes);
        ki_free(buf->mem, buf->data);
        buf->data = bigger;
        buf->cap_bytes = cap;
    }
    if (n_bytes) memcpy(buf->data + buf->n_bytes, bytes, n_bytes);
    buf->n_bytes = need;
    return KIVI_OK;
}
