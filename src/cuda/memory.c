/* memory.c: memory of a GPU, counted by tag. Blocks come from a pool of the driver's that gives
 * nothing back before the end, in the order of the one stream, so that a prompt's larger ring costs
 * no synchronisation. A list of the blocks says how large each is; it is short: weights, one block
 * of pages, one of a step's buffers, and one or three a sequence. */
#include "cuda_private.h"

kivi_status ki_cuda_check(cudaError_t code, const char *what, kivi_error *err) {
    if (code == cudaSuccess) return KIVI_OK;
    (void)cudaGetLastError(); /* what can be recovered from does not show in the next call too */
    if (code == cudaErrorMemoryAllocation)
        return KI_FAIL(err, NOMEM, "cuda: %s: out of device memory", what);
    return KI_FAIL(err, DEVICE, "cuda: %s: %s", what, cudaGetErrorString(code));
}

static kivi_status no_memory(const ki_cuda_memory *m, ki_tag tag, size_t n_bytes, kivi_error *err) {
    size_t n_free = 0, n_all = 0;
    if (m->limit_bytes && m->n_bytes + n_bytes > m->limit_bytes)
        return KI_FAIL(err, NOMEM,
                       "device memory: %zu bytes for %s could not be had: %llu of the %llu that "
                       "were allowed are taken",
                       n_bytes, ki_tag_names[tag], (unsigned long long)m->n_bytes,
                       (unsigned long long)m->limit_bytes);
    cudaMemGetInfo(&n_free, &n_all);
    return KI_FAIL(err, NOMEM,
                   "device memory: %zu bytes for %s could not be had: %llu are taken, %zu of %zu "
                   "are free",
                   n_bytes, ki_tag_names[tag], (unsigned long long)m->n_bytes, n_free, n_all);
}

static kivi_status take(void **out, void *context, ki_tag tag, size_t n_bytes, kivi_error *err) {
    ki_cuda_memory *m = context;
    void *p, *at = NULL;
    *out = NULL;
    cudaSetDevice(m->number);
    n_bytes = KI_MAX(n_bytes, (size_t)1);
    KI_TRY(ki_alloc(&p, m->host, KI_TAG_other, sizeof(ki_cuda_block), err));
    ki_cuda_block *block = p;
    bool fits = !m->limit_bytes || n_bytes <= m->limit_bytes - KI_MIN(m->n_bytes, m->limit_bytes);
    cudaError_t code = cudaErrorMemoryAllocation;
    if (fits && !ki_mem_must_fail(m->host))
        code = cudaMallocFromPoolAsync(&at, n_bytes, m->pool, m->stream);
    if (code == cudaSuccess) code = cudaMemsetAsync(at, 0, n_bytes, m->stream);
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        if (at) cudaFreeAsync(at, m->stream);
        ki_free(m->host, block);
        if (code == cudaErrorMemoryAllocation) return no_memory(m, tag, n_bytes, err);
        return ki_cuda_check(code, "memory", err);
    }
    *block = (ki_cuda_block){.next = m->blocks, .at = at, .n_bytes = n_bytes, .tag = tag};
    m->blocks = block;
    m->n_bytes += n_bytes;
    ki_mem_count(&m->mem, tag, (int64_t)n_bytes);
    *out = at;
    return KIVI_OK;
}

/* An address that is no block's beginning is a matrix of a group: its block goes with the first. */
static void give(void *context, void *at) {
    ki_cuda_memory *m = context;
    for (ki_cuda_block **link = &m->blocks; *link; link = &(*link)->next) {
        ki_cuda_block *block = *link;
        if (block->at != at) continue;
        *link = block->next;
        cudaSetDevice(m->number);
        m->n_bytes -= block->n_bytes;
        ki_mem_count(&m->mem, block->tag, -(int64_t)block->n_bytes);
        cudaFreeAsync(at, m->stream);
        ki_free(m->host, block);
        return;
    }
}

static void zero(void *context, void *to, size_t n_bytes) {
    const ki_cuda_memory *m = context;
    cudaSetDevice(m->number);
    cudaMemsetAsync(to, 0, n_bytes, m->stream);
}

static void copy(void *context, void *to, const void *from, size_t n_bytes) {
    const ki_cuda_memory *m = context;
    cudaSetDevice(m->number);
    cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToDevice, m->stream);
}

static void copy_ring(void *context, const ki_ring_copy *c) {
    const ki_cuda_memory *m = context;
    cudaSetDevice(m->number);
    ki_cuda_ring_copy_blocks(c, m->stream);
}

static kivi_status put(void *context, void *to, const void *from, size_t n_bytes, kivi_error *err) {
    const ki_cuda_memory *m = context;
    cudaSetDevice(m->number);
    cudaError_t code = cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyHostToDevice, m->stream);
    if (code == cudaSuccess) code = cudaStreamSynchronize(m->stream);
    return ki_cuda_check(code, "copy to the device", err);
}

static kivi_status get(void *context, void *to, const void *from, size_t n_bytes, kivi_error *err) {
    const ki_cuda_memory *m = context;
    cudaSetDevice(m->number);
    cudaError_t code = cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToHost, m->stream);
    if (code == cudaSuccess) code = cudaStreamSynchronize(m->stream);
    return ki_cuda_check(code, "copy from the device", err);
}

kivi_status ki_cuda_memory_init(ki_cuda_memory *m, int device, ki_mem *host, uint64_t limit_bytes,
                                kivi_error *err) {
    struct cudaMemPoolProps props = {.allocType = cudaMemAllocationTypePinned,
                                     .location = {.type = cudaMemLocationTypeDevice, .id = device}};
    uint64_t keep = UINT64_MAX;
    *m = (ki_cuda_memory){.host = host, .number = device, .limit_bytes = limit_bytes};
    ki_mem_init(&m->mem);
    m->device = (ki_device){m, &m->mem, take, give, zero, copy, copy_ring, put, get};
    KI_TRY(ki_cuda_check(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking), "stream",
                         err));
    KI_TRY(ki_cuda_check(cudaMemPoolCreate(&m->pool, &props), "memory pool", err));
    return ki_cuda_check(
        cudaMemPoolSetAttribute(m->pool, cudaMemPoolAttrReleaseThreshold, &keep), "memory pool",
        err);
}

void ki_cuda_memory_deinit(ki_cuda_memory *m) {
    while (m->blocks) give(m, m->blocks->at);
    if (m->stream) cudaStreamSynchronize(m->stream);
    if (m->pool) cudaMemPoolDestroy(m->pool);
    if (m->stream) cudaStreamDestroy(m->stream);
    m->pool = NULL;
    m->stream = NULL;
}
