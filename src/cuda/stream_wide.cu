#include "stream_wide.h"

#include "act.cuh"
#include "kv_launch.h"
#include "pdl.cuh"
#include "stream_ring.cuh"
#include "stream_wide_plan.h"
#include "wgmma.cuh"

enum {
    CHUNK = KI_STREAM_CHUNK,
    TILE = KI_WIDE_TILE,
    ROW_BYTES = KI_STREAM_BOX_BYTES,
    ALIGNMENT = KI_STREAM_ALIGNMENT
};
typedef ki_wide_plan plan;

typedef struct place {
    uint32_t first, tile, part; /* first output */
    uint32_t ring, full, empty; /* shared addresses; of barriers: 8 bytes each */
} place;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma is sm_90a's: CUDA_ARCHS=90a, not 90"
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/* ---- stages in turn ---- */

typedef struct turn {
    uint32_t number, stage, parity, at;
} turn;

static __device__ __forceinline__ turn first_turn(const place &at) { return {0, 0, 0, at.ring}; }
static __device__ __forceinline__ void next_turn(turn &t, const plan &p, const place &at) {
    t.number++, t.at += p.stage_bytes;
    if (++t.stage == p.n_stages) t.stage = 0, t.parity ^= 1, t.at = at.ring;
}

/* ---- the thread that fills the ring ---- */

/* The first column of a chunk; behind the part's last one that of nothing, which is read as 0. */
static __device__ __forceinline__ uint32_t column(const ki_stream_call &c, const plan &p,
                                                  const place &at, uint32_t chunk) {
    return chunk < p.chunks ? (at.part * p.chunks + chunk) * CHUNK : c.k;
}

template <int PIECES>
static __device__ __forceinline__ void bring_weights(const ki_stream_call &c, const plan &p,
                                                     const place &at, const ki_boxes &w,
                                                     const turn &t) {
    uint32_t full = at.full + 8 * t.stage, to = t.at;
    ki_begin_stage(full, PIECES * p.box_bytes);
#pragma unroll
    for (uint32_t q = 0; q < PIECES; q++, to += p.piece_bytes) {
        uint32_t col = column(c, p, at, t.number * PIECES + q);
        ki_bring(to, w, at.first, col, full);
        if (c.act_out) ki_bring(to + p.room * ROW_BYTES, w, c.n / 2 + at.first, col, full);
    }
}
template <int PIECES>
static __device__ __forceinline__ void bring_rows(const ki_stream_call &c, const plan &p,
                                                  const place &at, const ki_boxes &x,
                                                  const turn &t) {
    uint32_t to = t.at + p.all_room * ROW_BYTES;
#pragma unroll
    for (uint32_t q = 0; q < PIECES; q++, to += p.piece_bytes)
        ki_bring(to, x, 0, column(c, p, at, t.number * PIECES + q), at.full + 8 * t.stage);
}

/* Weights before the kernel before this one has ended, rows of x after that. */
template <int PIECES>
static __device__ __forceinline__ void fill(const ki_stream_call &c, const plan &p, const place &at,
                                            const ki_boxes &w, const ki_boxes &x) {
    turn t = first_turn(at);
    for (; t.number < p.n_stages; next_turn(t, p, at)) bring_weights<PIECES>(c, p, at, w, t);
    ki_pdl_wait();
    t = first_turn(at);
    for (; t.number < p.n_stages; next_turn(t, p, at)) bring_rows<PIECES>(c, p, at, x, t);
    uint32_t come = p.n_stages - p.n_ahead, parity = 0; /* the stage that has to be there by then */
    for (; t.number < p.turns; next_turn(t, p, at)) {
        ki_bar_wait(at.empty + 8 * t.stage, t.parity ^ 1);
        ki_bar_wait(at.full + 8 * come, parity);
        if (++come == p.n_stages) come = 0, parity ^= 1;
        bring_weights<PIECES>(c, p, at, w, t);
        bring_rows<PIECES>(c, p, at, x, t);
    }
}

/* ---- the warps that multiply ---- */

/* acc += what all stages hold; a warpgroup has a tile. Rows of one that the block does not have are
 * whatever stands behind, and never read. */
template <class T, int N, int PIECES>
static __device__ __forceinline__ void multiply(float (&acc)[N / 2], const plan &p,
                                                const place &at) {
    uint32_t tile = threadIdx.x / 128 * TILE * ROW_BYTES;
    for (turn t = first_turn(at); t.number < p.turns; next_turn(t, p, at)) {
        ki_bar_wait(at.full + 8 * t.stage, t.parity);
        __syncwarp();
        ki_wgmma_begin();
#pragma unroll
        for (int q = 0; q < PIECES; q++)
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) {
                uint32_t from = t.at + q * p.piece_bytes + 32 * k;
                ki_wgmma(acc, ki_wgmma_rows(from + tile),
                         ki_wgmma_rows(from + p.all_room * ROW_BYTES), T());
            }
        ki_wgmma_end();
        __syncwarp();
        if (threadIdx.x % 32 == 0) ki_bar_arrive(at.empty + 8 * t.stage);
    }
}

/* ---- the end of a block ---- */

/* Sums [part][m][pitch], where the ring was or, of several parts, in the workspace. */
typedef struct sums {
    float *data;
    uint32_t pitch, part_stride;
} sums;

template <int N>
static __device__ __forceinline__ void put_sums(const float (&acc)[N / 2], const sums &to,
                                                const ki_stream_call &c, const plan &p,
                                                uint32_t part) {
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
        uint32_t row = threadIdx.x / 32 * 16 + g + j % 4 / 2 * 8, m = j / 4 * 8 + 2 * t + j % 2;
        if (row < p.all_room && m < c.m)
            to.data[part * to.part_stride + m * to.pitch + row] = acc[j];
    }
}

/* Whether all other parts of the block's outputs have their sums in the workspace. */
static __device__ __forceinline__ bool is_last(const ki_stream_call &c, const plan &p,
                                               const place &at) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) { /* one thread's fences are for all that a barrier has met */
        __threadfence();
        last = atomicInc((uint32_t *)c.workspace + at.tile, p.parts - 1) == p.parts - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

static __device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/* Four sums of every part, `step` apart, and of the parts in their order. From the workspace they
 * are neighbours: loads wait longest there. From shared memory a warp's are: stores coalesce. */
template <int PARTS> struct quad {
    float4 v[PARTS];

    __device__ __forceinline__ void load(const sums &from, uint32_t i, uint32_t step) {
        const float *at = from.data + i;
#pragma unroll
        for (int q = 0; q < PARTS; q++, at += from.part_stride)
            v[q] = PARTS > 1 ? __ldcg((const float4 *)at)
                             : make_float4(at[0], at[step], at[2 * step], at[3 * step]);
    }
    __device__ __forceinline__ float4 total() const {
        float4 sum = v[0];
#pragma unroll
        for (int q = 1; q < PARTS; q++) sum = plus(sum, v[q]);
        return sum;
    }
};

/* Outputs in fours: a thread has EACH of them on their way at once. */
template <int PARTS, int EACH>
static __device__ __forceinline__ void finish(const ki_stream_call &c, const plan &p,
                                              const place &at, const sums &s) {
    uint32_t n_all = c.act_out ? c.n / 2 : c.n, n_here = min(p.rows, n_all - at.first);
    uint32_t per_row = p.room / 4, n_quads = c.m * per_row, step = PARTS > 1 ? 1 : per_row;
    for (uint32_t first = threadIdx.x; first < n_quads; first += EACH * blockDim.x) {
        quad<PARTS> v[EACH];
        float old[EACH][4];
        uint32_t row[EACH], col[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            uint32_t i = min(first + e * blockDim.x, n_quads - 1);
            row[e] = i / per_row, col[e] = i % per_row * (PARTS > 1 ? 4 : 1);
            v[e].load(s, row[e] * s.pitch + col[e], step);
            const float *from = c.out + row[e] * c.out_stride + at.first;
#pragma unroll
            for (int k = 0; k < 4; k++)
                old[e][k] = c.add && col[e] + k * step < n_here ? from[col[e] + k * step] : 0;
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            float4 sum = v[e].total(), up = {};
            if (c.act_out) {
                v[e].load(s, row[e] * s.pitch + p.room + col[e], step);
                up = v[e].total();
            }
            const float y[4] = {sum.x, sum.y, sum.z, sum.w}, u[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                uint32_t i = col[e] + k * step, o = at.first + i;
                if (first + e * blockDim.x >= n_quads || i >= n_here) continue;
                if (c.act_out)
                    ki_store(c.act_out, (size_t)row[e] * n_all + o, ki_gated(c.act, y[k], u[k]),
                             c.type);
                else c.out[row[e] * c.out_stride + o] = c.add ? old[e][k] + y[k] : y[k];
            }
        }
    }
}

#endif

/* N: rows of x, wgmma's columns; GROUPS: warpgroups, a tile each. */
template <class T, int N, int GROUPS, int PIECES>
static __global__ void __launch_bounds__(128 * GROUPS + 32, KI_WIDE_BLOCKS)
    stream_wide(const __grid_constant__ CUtensorMap weights,
                const __grid_constant__ CUtensorMap rows, const __grid_constant__ ki_stream_call c,
                const __grid_constant__ plan p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    enum { MULTIPLIERS = 128 * GROUPS };
    extern __shared__ uint8_t memory[];
    __shared__ uint64_t bars[2][KI_STREAM_MOST_STAGES];
    uint32_t base = ki_shared(memory), skip = (ALIGNMENT - base % ALIGNMENT) % ALIGNMENT;
    place at;
    at.part = blockIdx.x % p.parts, at.tile = blockIdx.x / p.parts;
    at.first = at.tile * p.rows;
    at.ring = base + skip;
    at.full = ki_shared(bars[0]), at.empty = ki_shared(bars[1]);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < p.n_stages; i++) {
            ki_bar_init(at.full + 8 * i, 1);
            ki_bar_init(at.empty + 8 * i, MULTIPLIERS / 32);
        }
        ki_bar_fence();
    }
    __syncthreads();
    if (!c.lets_late) ki_pdl_launch();
    float acc[N / 2] = {};
    if (threadIdx.x == MULTIPLIERS) {
        fill<PIECES>(c, p, at, {&weights, NULL, 0, 0, 0, ki_leave_first()},
                     {&rows, NULL, 0, 0, 0, ki_leave_last()});
    } else if (threadIdx.x < MULTIPLIERS) {
        ki_pdl_wait(); /* asleep: barriers are waited for awake, at the cost of who still works */
        if (c.lets_late) ki_pdl_launch();
        multiply<T, N, PIECES>(acc, p, at);
    }
    ki_pdl_wait();   /* before what others wrote is added to, or written over */
    __syncthreads(); /* the ring was read */
    sums s = {(float *)(memory + skip), p.all_room + 4, 0}; /* neither way meets a bank twice */
    if (p.parts > 1) {
        s.pitch = p.all_room, s.part_stride = N * s.pitch;
        s.data = (float *)((uint8_t *)c.workspace + KI_STREAM_COUNTER_BYTES) +
                 (size_t)at.tile * p.parts * s.part_stride;
    }
    if (threadIdx.x < MULTIPLIERS) put_sums<N>(acc, s, c, p, at.part);
    if (p.parts == 1) {
        __syncthreads();
        finish<1, 2>(c, p, at, s);
    } else if (is_last(c, p, at)) {
        if (p.parts == 4) finish<4, GROUPS == 1 ? 4 : 1>(c, p, at, s);
        else finish<8, GROUPS == 1 ? 2 : 1>(c, p, at, s);
    }
#endif
}

/* ---- launches ---- */

static constexpr uint32_t number_of(__half) { return 0; }
static constexpr uint32_t number_of(__nv_bfloat16) { return 1; }

template <class T, int N, int GROUPS, int PIECES>
static cudaError_t launch(const ki_stream_call &c, const plan &p, const ki_wide_launch &l) {
    constexpr uint32_t SIZE = N == 8 ? 0 : N == 16 ? 1 : N == 32 ? 2 : 3;
    auto kernel = stream_wide<T, N, GROUPS, PIECES>;
    uint32_t bit = 1u << (number_of(T()) * 16 + SIZE * 4 + (GROUPS - 1) * 2 + PIECES - 1);
    CUtensorMap weights = {}, rows = {};
    cudaError_t e = cudaSuccess;
    if (!(*l.ready & bit)) {
        e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)KI_WIDE_BLOCK_BYTES);
        if (e == cudaSuccess) e = ki_share_multiprocessors(kernel);
        if (e == cudaSuccess) *l.ready |= bit;
    }
    if (e == cudaSuccess) e = ki_stream_map(&weights, l.of, c.weight, c.n, c.k, p.rows);
    if (e == cudaSuccess) e = ki_stream_map(&rows, l.of, c.x, c.m, c.k, N);
    if (e != cudaSuccess) return e;
    return ki_launch(kernel, p.n_blocks, 128 * GROUPS + 32, p.shared_bytes, true, l.stream, weights,
                     rows, c, p);
}

template <class T, int N>
static cudaError_t plan_and_launch(const ki_stream_call &c, const ki_wide_launch &l) {
    plan p = ki_wide_plan_of(&c, N, l.n_sms);
    if (!ki_wide_has_room(&p, N) || (p.parts > 1 && !c.workspace)) return cudaErrorInvalidValue;
    if (p.all_room > TILE)
        return p.pieces == 2 ? launch<T, N, 2, 2>(c, p, l) : launch<T, N, 2, 1>(c, p, l);
    return p.pieces == 2 ? launch<T, N, 1, 2>(c, p, l) : launch<T, N, 1, 1>(c, p, l);
}

template <class T> static cudaError_t dispatch(const ki_stream_call &c, const ki_wide_launch &l) {
    if (c.m <= 8) return plan_and_launch<T, 8>(c, l);
    if (c.m <= 16) return plan_and_launch<T, 16>(c, l);
    if (c.m <= 32) return plan_and_launch<T, 32>(c, l);
    return plan_and_launch<T, 64>(c, l);
}

cudaError_t ki_stream_wide(const ki_stream_call &c, const ki_wide_launch &l) {
    return c.type == KI_CUDA_F16 ? dispatch<__half>(c, l) : dispatch<__nv_bfloat16>(c, l);
}
