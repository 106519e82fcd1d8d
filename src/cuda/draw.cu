#include "best.cuh"
#include "draw_cuda.h"

#include <cuda_runtime.h>

enum { THREADS = 1024, WARPS = THREADS / 32, BINS = THREADS, LIST = 2048 };

static __device__ __forceinline__ uint64_t shuffle_xor(uint64_t v, int step) {
    return (uint64_t)__shfl_xor_sync(0xffffffffu, (unsigned long long)v, step);
}

/* The sum over the block, in every thread. part: [WARPS], shared. */
static __device__ uint64_t block_sum(uint64_t v, uint64_t *part) {
    for (int step = 16; step; step /= 2) v += shuffle_xor(v, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = part[threadIdx.x % 32];
    for (int step = 16; step; step /= 2) v += shuffle_xor(v, step);
    return v;
}

static __device__ __forceinline__ uint64_t warp_scan(uint64_t v) {
    for (int step = 1; step < 32; step *= 2) {
        uint64_t w = (uint64_t)__shfl_up_sync(0xffffffffu, (unsigned long long)v, step);
        if (threadIdx.x % 32 >= (unsigned)step) v += w;
    }
    return v;
}

/* The sum over this thread and those before it. */
static __device__ uint64_t block_scan(uint64_t v, uint64_t *part) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_scan(v);
    __syncthreads();
    if (lane == 31) part[warp] = v;
    __syncthreads();
    uint64_t all = warp_scan(part[lane]);
    uint64_t before = (uint64_t)__shfl_sync(0xffffffffu, (unsigned long long)all, (warp + 31) % 32);
    return warp ? before + v : v;
}

/* ---- what the threads of a row share ---- */

typedef struct row_state {
    uint64_t part[WARPS], total_weight;
    uint32_t total_count;
    /* of each bin; low and high are halves of the sum of weights, and become the sums before it */
    uint32_t count[BINS];
    union {
        struct {
            uint32_t low[BINS], high[BINS];
        };
        uint64_t before[BINS];
    };
    uint64_t keys[LIST], weights[LIST]; /* tokens of one bin, in any order */
    uint32_t n_listed;
    float best[WARPS];
    int32_t best_id[WARPS];
    /* a place that was found */
    uint32_t bin;
    uint64_t reached; /* weights up to and with the token there */
    int32_t id;
} row_state;

typedef struct row_view {
    float *logits;
    uint32_t n;
    float best, temperature;
} row_view;

/* The order of draw.h as ascending integers: the larger logit first (0 and -0 are one), then the
 * lower id. */
static __device__ __forceinline__ uint64_t key_of(float logit, uint32_t id) {
    uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)~rising << 32 | id;
}

/* x is from the lowest to 0. */
static __device__ __forceinline__ uint32_t bin_of(float x) {
    uint32_t bin = (uint32_t)ki_draw_mul(x, BINS / KI_DRAW_LOWEST);
    return min(bin, (uint32_t)BINS - 1);
}

/* Two sums of 32 bits, since shared memory adds no others at once: whoever makes the low one wrap
 * around carries. */
static __device__ __forceinline__ void add_weight(row_state &s, uint32_t bin, uint64_t weight) {
    uint32_t low = (uint32_t)weight, old = atomicAdd(&s.low[bin], low);
    uint32_t high = (uint32_t)(weight >> 32) + (old + low < old);
    if (high) atomicAdd(&s.high[bin], high);
}

/* ---- passes over a row ---- */

/* Fills the bins; returns the weights of all x >= min_x, in every thread. */
static __device__ uint64_t fill_bins(row_state &s, const row_view &r, float min_x) {
    uint64_t sum = 0;
    s.count[threadIdx.x] = s.low[threadIdx.x] = s.high[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < r.n; i += THREADS) {
        float x = ki_draw_x(r.logits[i], r.best, r.temperature);
        uint64_t weight = ki_draw_weight(x);
        if (!weight) continue;
        uint32_t bin = bin_of(x);
        atomicAdd(&s.count[bin], 1u);
        add_weight(s, bin, weight);
        if (x >= min_x) sum += weight;
    }
    return block_sum(sum, s.part); /* its barriers end the filling, too */
}

/* ---- places ---- */

/* Tokens before a bin or token, and their weights; its own. */
typedef struct range {
    uint32_t count_before, count;
    uint64_t before, weight;
} range;

/* This thread's bin, when all are filled; afterwards s.before has the sums. */
static __device__ range scan_bins(row_state &s) {
    uint32_t bin = threadIdx.x;
    range r = {0, s.count[bin], 0, (uint64_t)s.high[bin] << 32 | s.low[bin]};
    uint64_t weights = block_scan(r.weight, s.part);
    uint64_t counts = block_scan(r.count, s.part);
    r.before = weights - r.weight;
    r.count_before = (uint32_t)counts - r.count;
    __syncthreads(); /* all have read their halves */
    s.before[bin] = r.before;
    s.count[bin] = r.count_before;
    if (bin == BINS - 1) s.total_weight = weights, s.total_count = (uint32_t)counts;
    __syncthreads();
    return r;
}

typedef enum place_kind { RANK, SHARE, TARGET } place_kind;

typedef struct place {
    place_kind kind;
    uint32_t rank;   /* RANK: the token of this number */
    double share;    /* SHARE: the first with which weights reach it; more than 0 */
    uint64_t target; /* TARGET: the first with which weights exceed it */
} place;

static __device__ __forceinline__ bool is_in(const place &p, const range &r) {
    uint64_t after = r.before + r.weight;
    if (p.kind == RANK) return r.count_before <= p.rank && p.rank < r.count_before + r.count;
    if (p.kind == SHARE) return (double)r.before < p.share && (double)after >= p.share;
    return r.before <= p.target && p.target < after;
}

static __device__ void list_bin(row_state &s, const row_view &r, uint32_t bin) {
    if (threadIdx.x == 0) s.n_listed = 0;
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < r.n; i += THREADS) {
        float logit = r.logits[i], x = ki_draw_x(logit, r.best, r.temperature);
        uint64_t weight = ki_draw_weight(x);
        if (!weight || bin_of(x) != bin) continue;
        uint32_t at = atomicAdd(&s.n_listed, 1u);
        if (at >= LIST) continue;
        s.keys[at] = key_of(logit, i);
        s.weights[at] = weight;
    }
    __syncthreads();
}

/* Finds the token at p, which there is: s.reached and s.id. mine: this thread's bin; *listed: the
 * bin that is listed. False: its bin has too many tokens. The same in every thread. */
static __device__ bool find_place(row_state &s, uint32_t *listed, const row_view &r,
                                  const range &mine, const place &p) {
    if (is_in(p, mine)) s.bin = threadIdx.x;
    __syncthreads();
    uint32_t bin = s.bin;
    if (bin != *listed) list_bin(s, r, bin);
    *listed = bin;
    uint32_t n = s.n_listed;
    if (n > LIST) return false;
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        uint64_t key = s.keys[i];
        range own = {s.count[bin], 1, s.before[bin], s.weights[i]};
        for (uint32_t k = 0; k < n; k++)
            if (s.keys[k] < key) own.count_before++, own.before += s.weights[k];
        if (is_in(p, own)) s.reached = own.before + own.weight, s.id = (int32_t)(uint32_t)key;
    }
    __syncthreads();
    return true;
}

/* ---- a row ---- */

static __device__ int32_t draw_row(row_state &s, row_view &r, const ki_cuda_draw &d) {
    if (isnan(r.logits[0])) return -1;
    int32_t best = ki_best_of(&r.best, r.logits, r.n, s.best, s.best_id);
    if (best < 0 || isinf(r.best)) return -1;
    if (d.temperature == 0) return best;
    uint64_t above = fill_bins(s, r, d.min_x);
    const range mine = scan_bins(s);
    uint64_t sum = s.total_weight;
    uint32_t listed = BINS; /* none */
    if (d.top_k && d.top_k < s.total_count) {
        const place last = {RANK, d.top_k - 1, 0, 0};
        if (!find_place(s, &listed, r, mine, last)) return -1;
        sum = s.reached;
    }
    uint64_t kept = min(sum, above);
    if (d.top_p < 1) {
        const place enough = {SHARE, 0, (double)d.top_p * (double)sum, 0};
        if (!find_place(s, &listed, r, mine, enough)) return -1;
        kept = min(kept, s.reached);
    }
    const place drawn = {TARGET, 0, 0, min((uint64_t)(d.u * (double)kept), kept - 1)};
    return find_place(s, &listed, r, mine, drawn) ? s.id : -1;
}

static __global__ void __launch_bounds__(THREADS)
    draw_rows(int32_t *out, float *logits, size_t stride, uint32_t n_vocab,
              const ki_cuda_draw *draws, ki_draw_edit *edits) {
    __shared__ row_state s;
    const ki_cuda_draw d = draws[blockIdx.x];
    row_view r = {logits + d.row * stride, n_vocab, 0, d.temperature};
    ki_draw_edit *own = edits + d.first_edit;
    for (uint32_t i = threadIdx.x; i < d.n_edits; i += THREADS) {
        const ki_draw_edit e = own[i];
        float *at = &r.logits[e.id], was = *at;
        *at = e.what & KI_EDIT_END ? -INFINITY
                                   : ki_draw_edited(was, &e, d.repetition, d.frequency, d.presence);
        own[i].bias = was;
    }
    __syncthreads();
    int32_t id = draw_row(s, r, d);
    __syncthreads(); /* nobody reads the row any more */
    for (uint32_t i = threadIdx.x; i < d.n_edits; i += THREADS) r.logits[own[i].id] = own[i].bias;
    if (threadIdx.x == 0) out[blockIdx.x] = id;
}

extern "C" void ki_cuda_draw_rows(int32_t *out, float *logits, size_t stride, uint32_t n_vocab,
                                  const ki_cuda_draw *draws, ki_draw_edit *edits, uint32_t n,
                                  void *stream) {
    if (n)
        draw_rows<<<n, THREADS, 0, (cudaStream_t)stream>>>(out, logits, stride, n_vocab, draws,
                                                           edits);
}
