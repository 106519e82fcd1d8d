/* kv_bench.cuh: batches of random pages and their timing, for kv_bench.cu and
 * tests/cuda/tune_cuda.cu. */
#ifndef KI_KV_BENCH_CUH
#define KI_KV_BENCH_CUH
#include "kv_decode_launch.cuh"
#include "kv_launch.h"

#include <algorithm>
#include <functional>
#include <vector>

/* ---- random contents ---- */

KI_DEV uint32_t mix32(uint64_t x) {
    x ^= x >> 31, x *= 0x9e3779b97f4a7c15u, x ^= x >> 29, x *= 0xbf58476d1ce4e5b9u;
    return (uint32_t)(x >> 32);
}
KI_DEV uint32_t random_halves(uint32_t r) { return (r & 0x8fff8fffu) | 0x30003000u; } /* +-1/8..2 */
KI_DEV uint32_t random_scales(uint32_t r) { return (r & 0x07ff07ffu) | 0x30003000u; } /* 1/8..1/2 */
KI_DEV uint32_t random_zeros(uint32_t r) { return (r & 0x03ff03ffu) | 0xb800b800u; }  /* -1..-1/2 */

static __global__ void ki_bench_halves_kernel(uint32_t *to, uint64_t n, uint64_t seed) {
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n;
         i += (uint64_t)gridDim.x * blockDim.x)
        to[i] = random_halves(mix32(i * 0x2545f491u + seed));
}

/* Word `at` of a page: whatever plane it lies in gets something legal. */
KI_DEV uint32_t page_word(const ki_cuda_layout &l, uint32_t at, uint32_t r) {
    if (at < l.head_bytes) {
        if (at < l.k_zero_at) return random_scales(r);
        if (at < l.list_at || !l.is_plus) return random_zeros(r);
        uint32_t w = at - l.list_at; /* ascending channels */
        return 0x0c080400u + (r & 0x03030303u) + 0x01010101u * (4 * w & 0xff);
    }
    at = (at - l.head_bytes) % l.sub_bytes;
    bool keys_here = l.k_bits < 16 && l.k_group <= KI_SUB_TOKENS;
    if (at < l.v_at) return l.k_bits == 16 ? random_halves(r) : r;
    if (at < l.v_scale_at) return l.v_bits == 16 ? random_halves(r) : r;
    if (keys_here && at >= l.k_scale_at)
        return at < l.k_zero_at ? random_scales(r) : random_zeros(r);
    return at < l.v_zero_at ? random_scales(r) : random_zeros(r);
}

static __global__ void ki_bench_pages_kernel(uint32_t *pool,
                                             const __grid_constant__ ki_cuda_layout l,
                                             uint64_t n_words) {
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n_words;
         i += (uint64_t)gridDim.x * blockDim.x)
        pool[i] = page_word(l, (uint32_t)(i % (l.page_bytes / 4)) * 4, mix32(i));
}

/* ---- timing ---- */

/* Median microseconds of one of n_launches captured in a graph, over n_repeats replays. */
static kivi_status time_launches(double *us, uint32_t n_launches, uint32_t n_repeats,
                                 const std::function<kivi_status(uint32_t, cudaStream_t)> &launch,
                                 kivi_error *err) {
    enum { WARM = 6 }; /* clocks rise for some milliseconds after a pause */
    cudaStream_t stream = NULL;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    cudaEvent_t from = NULL, to = NULL;
    cudaError_t ended = cudaSuccess;
    kivi_status status = KIVI_OK;
    std::vector<float> ms(n_repeats);
    KI_TRY_GOTO(ki_cuda_check(cudaStreamCreate(&stream), "stream", err));
    KI_TRY_GOTO(ki_cuda_check(cudaEventCreate(&from), "event", err));
    KI_TRY_GOTO(ki_cuda_check(cudaEventCreate(&to), "event", err));
    KI_TRY_GOTO(launch(0, stream)); /* what fails does so outside of a capture */
    KI_TRY_GOTO(ki_cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                              "capture", err));
    for (uint32_t i = 0; i < n_launches && status == KIVI_OK; i++) status = launch(i, stream);
    ended = cudaStreamEndCapture(stream, &graph);
    if (status != KIVI_OK) { /* what was said then counts */
        (void)cudaGetLastError();
        goto fail;
    }
    KI_TRY_GOTO(ki_cuda_check(ended, "capture", err));
    KI_TRY_GOTO(ki_cuda_check(cudaGraphInstantiate(&exec, graph, 0), "graph", err));
    for (int r = -WARM; r < (int)n_repeats; r++) {
        KI_TRY_GOTO(ki_cuda_check(cudaEventRecord(from, stream), "event", err));
        KI_TRY_GOTO(ki_cuda_check(cudaGraphLaunch(exec, stream), "graph", err));
        KI_TRY_GOTO(ki_cuda_check(cudaEventRecord(to, stream), "event", err));
        KI_TRY_GOTO(ki_cuda_check(cudaEventSynchronize(to), "graph", err));
        if (r >= 0) cudaEventElapsedTime(&ms[r], from, to);
    }
    std::sort(ms.begin(), ms.end());
    *us = ms[n_repeats / 2] * 1e3 / n_launches;
fail:
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
    if (from) cudaEventDestroy(from);
    if (to) cudaEventDestroy(to);
    if (stream) cudaStreamDestroy(stream);
    return status;
}

/* ---- a batch ---- */

struct bench_shape {
    uint32_t batch, n_heads, n_kv_heads, tokens;
};
struct bench_kind {
    const char *name;
    uint32_t k_bits, v_bits, residual;
    bool is_plus, pages_only;
    uint32_t group; /* 0: 32 */
};

/* Several sets of sequences over different pages, so that no launch finds its bytes in the L2
 * cache. */
struct bench_batch {
    ki_cuda_layout l = {};
    bench_shape shape = {};
    uint32_t n_layers = 1, n_sets = 0, table_stride = 0, set_pages = 0;
    std::vector<void *> blocks;
    std::vector<ki_cuda_cache> caches;      /* a set each */
    std::vector<ki_cuda_attend_call> calls; /* a set each */
    uint16_t *q = NULL, *out = NULL;

    ~bench_batch() {
        for (void *p : blocks) cudaFree(p);
    }
    template <class T> kivi_status take(T **p, uint64_t n, kivi_error *err) {
        void *block = NULL;
        KI_TRY(ki_cuda_check(cudaMalloc(&block, n * sizeof(T) + 256), "memory for a measurement",
                             err));
        blocks.push_back(block);
        *p = (T *)block;
        return KIVI_OK;
    }
    /* Bytes of pages that one launch reads, of one layer. */
    double packed_bytes() const {
        return (double)shape.batch * shape.n_kv_heads * shape.tokens * l.page_bytes /
               KI_PAGE_TOKENS;
    }
    kivi_status ki_make(const bench_shape &s, const bench_kind &kind, uint64_t least_bytes,
                        uint32_t most_sets, kivi_error *err);
    kivi_status ki_make_set(const bench_kind &kind, uint32_t set, uint8_t *pool, uint8_t *rings,
                            uint32_t *tables, kivi_error *err);
    kivi_status ki_plan(uint32_t split_tokens, uint32_t window, bool pdl, kivi_error *err);
};

inline kivi_status bench_batch::ki_make(const bench_shape &s, const bench_kind &kind,
                                        uint64_t least_bytes, uint32_t most_sets, kivi_error *err) {
    kivi_cache_geometry g = kivi_cache_defaults();
    g.n_layers = n_layers, g.n_heads = s.n_heads, g.n_kv_heads = s.n_kv_heads, g.head_dim = 128;
    g.kv.k_bits = kind.k_bits, g.kv.v_bits = kind.v_bits, g.kv.group = kind.group ? kind.group : 32;
    g.kv.residual_tokens = kind.residual, g.kv.sink_tokens = kind.is_plus ? 4 : 0;
    KI_TRY(ki_cuda_layout_init(&l, &g, kind.is_plus, err));
    if (kind.pages_only) l.sink_tokens = 0;
    shape = s;
    table_stride = s.tokens / KI_PAGE_TOKENS + 1;
    set_pages = s.batch * table_stride;
    uint64_t set_bytes = set_pages * l.id_bytes;
    n_sets =
        (uint32_t)std::min<uint64_t>(std::max<uint64_t>(least_bytes / set_bytes, 2), most_sets);
    uint8_t *pool, *rings;
    uint32_t *tables;
    KI_TRY(take(&pool, n_sets * set_bytes, err));
    KI_TRY(take(&rings, (uint64_t)n_sets * s.batch * (l.ring_bytes + l.sink_bytes), err));
    KI_TRY(take(&tables, (uint64_t)n_sets * set_pages, err));
    ki_bench_pages_kernel<<<2048, 256>>>((uint32_t *)pool, l, n_sets * set_bytes / 4);
    ki_bench_halves_kernel<<<2048, 256>>>(
        (uint32_t *)rings, (uint64_t)n_sets * s.batch * (l.ring_bytes + l.sink_bytes) / 4, 5);
    uint64_t n_q = (uint64_t)s.batch * s.n_heads * 128;
    KI_TRY(take(&q, n_q, err));
    KI_TRY(take(&out, n_q, err));
    ki_bench_halves_kernel<<<2048, 256>>>((uint32_t *)q, n_q / 2, 7);
    caches.resize(n_sets), calls.resize(n_sets);
    for (uint32_t i = 0; i < n_sets; i++) KI_TRY(ki_make_set(kind, i, pool, rings, tables, err));
    return ki_cuda_check(cudaDeviceSynchronize(), "random pages", err);
}

inline kivi_status bench_batch::ki_make_set(const bench_kind &kind, uint32_t set, uint8_t *pool,
                                            uint8_t *rings, uint32_t *tables, kivi_error *err) {
    std::vector<uint32_t> ids(set_pages);
    std::vector<ki_cuda_seq> seqs(shape.batch);
    uint64_t seed = 0x1234567 + set, slot_bytes = l.ring_bytes + l.sink_bytes;
    ki_cuda_seq *device_seqs;
    for (uint32_t i = 0; i < set_pages; i++) ids[i] = set * set_pages + i;
    for (uint32_t i = set_pages - 1; i > 0; i--) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        std::swap(ids[i], ids[(seed >> 33) % (i + 1)]);
    }
    for (uint32_t i = 0; i < shape.batch; i++) {
        ki_cuda_seq &s = seqs[i];
        s.ring = (uint64_t)(rings + ((uint64_t)set * shape.batch + i) * slot_bytes);
        s.sinks = s.ring + l.ring_bytes;
        s.k_blocks = l.k_ring_blocks, s.v_blocks = l.v_ring_blocks;
        s.table = i;
        /* a query that has R rows in 16 bit, or none at all */
        s.n_tokens = kind.pages_only ? shape.tokens : shape.tokens - 1;
        s.n_rows = 1, s.first_row = i;
        s.flags = kind.pages_only ? KI_CUDA_PAGES_ONLY : 0;
    }
    KI_TRY(take(&device_seqs, shape.batch, err));
    KI_TRY(ki_cuda_check(cudaMemcpy(tables + (uint64_t)set * set_pages, ids.data(), set_pages * 4,
                                    cudaMemcpyHostToDevice),
                         "tables", err));
    KI_TRY(ki_cuda_check(cudaMemcpy(device_seqs, seqs.data(), shape.batch * sizeof(ki_cuda_seq),
                                    cudaMemcpyHostToDevice),
                         "sequences", err));
    caches[set] = {l,
                   pool,
                   tables + (uint64_t)set * set_pages,
                   table_stride,
                   device_seqs,
                   shape.batch,
                   NULL,
                   ki_most_shared_bytes(),
                   ki_n_sms()};
    return KIVI_OK;
}

inline kivi_status bench_batch::ki_plan(uint32_t split_tokens, uint32_t window, bool pdl,
                                        kivi_error *err) {
    for (uint32_t i = 0; i < n_sets; i++) {
        ki_cuda_attend_call &c = calls[i];
        void *workspace = c.workspace;
        c = {};
        caches[i].layout = l;
        c.cache = &caches[i];
        c.window = window;
        c.scale = 0.08838834764f;
        c.q = q, c.out = out, c.out_stride = shape.n_heads * 128, c.out_type = KI_CUDA_F16;
        c.n_rows = shape.batch, c.max_rows = 1;
        c.split_tokens = split_tokens, c.max_tokens = shape.tokens + 1;
        c.pdl = pdl;
        if (shape.tokens % split_tokens == 0) c.max_tokens = shape.tokens;
        if (!workspace)
            KI_TRY(take((uint8_t **)&workspace, /* for the smallest split there is */
                        ki_cuda_workspace_bytes(&l, shape.batch, shape.tokens + 1, 256), err));
        c.workspace = workspace;
        KI_TRY(ki_cuda_decode_plan(&c, NULL, err));
    }
    return ki_cuda_check(cudaDeviceSynchronize(), "plans", err);
}

/* Launches in a graph: about five milliseconds, every set as often. */
static inline uint32_t bench_launches(const bench_batch &b, double us) {
    uint32_t n = (uint32_t)(5000 / us) + 1;
    n = std::min(std::max(n, 8u), 200u);
    return (n + b.n_sets - 1) / b.n_sets * b.n_sets;
}

#endif
