#include "stream.h"

#include "act.cuh"
#include "kv_launch.h"
#include "norm.cuh"
#include "pdl.cuh"
#include "stream_plan.h"
#include "stream_ring.cuh"
#include "stream_wide.h"

typedef ki_stream_plan plan;
enum {
    WARPS = KI_STREAM_WARPS,
    MULTIPLIERS = 32 * WARPS,
    THREADS = MULTIPLIERS + 32,
    CHUNK = KI_STREAM_CHUNK,
    TILE = KI_STREAM_TILE,
    BOX_BYTES = KI_STREAM_BOX_BYTES,
    ALIGNMENT = KI_STREAM_ALIGNMENT,
    BARRIER_BYTES = KI_STREAM_BARRIER_BYTES,
    MOST_STAGES = KI_STREAM_MOST_STAGES,
    NORM_ROWS = KI_STREAM_NORM_ROWS,
    CLUSTER = KI_STREAM_CLUSTER
};
/* ROW_REGISTERS: of a block that holds one row; one of decode attention fits beside it then.
 * ROWS_REGISTERS: of one that holds several and their norm's weights. */
enum { ROW_REGISTERS = 80, REGISTERS = 96, ROWS_REGISTERS = 104, MOST_REGISTERS = 224 };

/* How boxes are copied on sm_90: weights of a cluster of `tiles`, and of one with one less. */
typedef struct maps {
    CUtensorMap full, less, rows;
} maps;

static __device__ __forceinline__ uint32_t outputs_of(const plan &p) { return p.tiles * TILE; }

/* A thread block's place, and the addresses of its shared memory: [stages][parts][weights][rows of
 * x], then rows of x that are held, then their sums [row][part][output]. */
typedef struct place {
    uint32_t first; /* output; of gate and up: pair */
    uint32_t tiles, stage_bytes;
    uint32_t rank, first_part;
    uint32_t ring, held, full, empty; /* barriers: 8 bytes each */
    uint32_t of_peers;                /* barrier: the other blocks' sums of the row it has */
} place;

/* ---- the warp that fills the ring ---- */

/* Chunks i to i + n of each part to stages from `to` on; of a row one behind the other, so that
 * memory gives it at once. */
static __device__ __forceinline__ void bring_weights(const ki_stream_call &c, const plan &p,
                                                     const place &at, const ki_boxes &w, uint32_t i,
                                                     uint32_t to, uint32_t n) {
    uint32_t full = at.full + 8 * to, where = at.ring + to * p.stage_bytes;
    uint32_t col = (at.first_part * p.chunks + i) * CHUNK;
#pragma unroll 1
    for (uint32_t e = 0; e < n; e++) ki_begin_stage(full + 8 * e, at.stage_bytes);
#pragma unroll 1
    for (uint32_t q = 0; q < p.here; q++) {
#pragma unroll 1
        for (uint32_t e = 0; e < n; e++)
            ki_bring(where + e * p.stage_bytes, w, at.first, col + e * CHUNK, full + 8 * e);
#pragma unroll 1
        for (uint32_t e = 0; e < n && c.act_out; e++)
            ki_bring(where + e * p.stage_bytes + w.box_rows * BOX_BYTES, w, c.n / 2 + at.first,
                     col + e * CHUNK, full + 8 * e);
        where += p.part_bytes, col += p.chunks * CHUNK;
    }
}

static __device__ __forceinline__ void bring_rows(const plan &p, const place &at, const ki_boxes &x,
                                                  uint32_t i, uint32_t to) {
    uint32_t full = at.full + 8 * to;
    uint32_t where = at.ring + to * p.stage_bytes + outputs_of(p) * BOX_BYTES;
    uint32_t col = (at.first_part * p.chunks + i) * CHUNK;
#pragma unroll 1
    for (uint32_t q = 0; q < p.here && !p.held_bytes; q++) {
        ki_bring(where, x, 0, col, full);
        where += p.part_bytes, col += p.chunks * CHUNK;
    }
    ki_end_stage(full);
}

/* Weights before the kernel before this one has ended, rows of x after that. All wait for this one
 * thread: divisions in its loop cost a tenth of the time. */
static __device__ __forceinline__ void fill(const ki_stream_call &c, const plan &p, const place &at,
                                            const ki_boxes &w, const ki_boxes &x) {
    long long then = clock64();
    for (uint32_t i = 0; i < p.n_stages; i += p.at_once) {
        bring_weights(c, p, at, w, i, i, p.at_once);
        then += p.at_once * p.pace;
        while (p.pace && clock64() < then) {
        }
    }
    ki_pdl_wait();
    for (uint32_t i = 0; i < p.n_stages; i++) bring_rows(p, at, x, i, i);
    for (uint32_t i = p.n_stages, to = 0, parity = 0; i < p.chunks; i += p.at_once) {
        uint32_t n = min(p.at_once, p.chunks - i);
#pragma unroll 1
        for (uint32_t e = 0; e < n; e++) ki_bar_wait(at.empty + 8 * (to + e), parity);
        bring_weights(c, p, at, w, i, to, n);
#pragma unroll 1
        for (uint32_t e = 0; e < n; e++) bring_rows(p, at, x, i + e, to + e);
        to += n;
        if (to == p.n_stages) to = 0, parity ^= 1;
    }
}

/* ---- rows of x that the thread block makes ---- */

/* The work of KI_NORM_THREADS threads by MULTIPLIERS: a warp does that of every eighth warp. */
enum { SHARE = KI_NORM_THREADS / MULTIPLIERS };

static __device__ __forceinline__ void wait_for_multipliers() {
    asm volatile("bar.sync 1, 256;" ::: "memory");
}

static __device__ __forceinline__ void put4(__half *to, float4 y) {
    __half2 low = __floats2half2_rn(y.x, y.y), high = __floats2half2_rn(y.z, y.w);
    *(uint2 *)to = make_uint2(*(uint32_t *)&low, *(uint32_t *)&high);
}
static __device__ __forceinline__ void put4(__nv_bfloat16 *to, float4 y) {
    __nv_bfloat162 low = __floats2bfloat162_rn(y.x, y.y), high = __floats2bfloat162_rn(y.z, y.w);
    *(uint2 *)to = make_uint2(*(uint32_t *)&low, *(uint32_t *)&high);
}

/* held[m][k] = norm(raw), zeros up to the end of the last part; ROWS >= m, and FOURS float4 of a
 * row for each of KI_NORM_THREADS. */
template <class T, int ROWS, int FOURS>
static __device__ __forceinline__ void hold_norm(const ki_stream_call &c, const plan &p,
                                                 uint8_t *held) {
    enum { TREES = FOURS == 1 ? SHARE : 1 }; /* at once; more leave no registers */
    __shared__ float sums[ROWS][32];
    const float4 zero = {0, 0, 0, 0};
    float4 w[SHARE][FOURS], v[ROWS][SHARE][FOURS];
    uint32_t n_fours = c.k / 4, end = (p.held_bytes - 16) / 8; /* four elements are 8 bytes */
#pragma unroll
    for (int s = 0; s < SHARE; s++)
#pragma unroll
        for (int f = 0; f < FOURS; f++) {
            uint32_t i = threadIdx.x + MULTIPLIERS * s + KI_NORM_THREADS * f;
            w[s][f] = i < n_fours ? ((const float4 *)c.norm.weight)[i] : zero;
        }
    ki_pdl_wait();
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int s = 0; s < SHARE; s++)
#pragma unroll
            for (int f = 0; f < FOURS; f++) {
                uint32_t i = threadIdx.x + MULTIPLIERS * s + KI_NORM_THREADS * f;
                bool in = i < n_fours && (ROWS == 1 || m < (int)c.m);
                v[m][s][f] = in ? ((const float4 *)c.raw)[(size_t)m * n_fours + i] : zero;
            }
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int s = 0; s < SHARE; s += TREES) {
            float sum[TREES] = {};
#pragma unroll
            for (int t = 0; t < TREES; t++)
#pragma unroll
                for (int f = 0; f < FOURS; f++) sum[t] = ki_add_squares(sum[t], v[m][s + t][f]);
            ki_warp_sums(sum);
#pragma unroll
            for (int t = 0; t < TREES; t++)
                if (threadIdx.x % 32 == 0) sums[m][threadIdx.x / 32 + WARPS * (s + t)] = sum[t];
        }
    wait_for_multipliers();
    float squares[ROWS];
#pragma unroll
    for (int m = 0; m < ROWS; m++) squares[m] = sums[m][threadIdx.x % 32];
    ki_warp_sums(squares);
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        float scale = ki_norm_scale(squares[m], c.k, c.norm.eps);
        T *to = (T *)(held + m * p.held_bytes);
#pragma unroll
        for (int s = 0; s < SHARE; s++)
#pragma unroll
            for (int f = 0; f < FOURS; f++) {
                uint32_t i = threadIdx.x + MULTIPLIERS * s + KI_NORM_THREADS * f;
                float4 y = ki_times_weight(v[m][s][f], scale, w[s][f], zero);
                if (i < end && (ROWS == 1 || m < (int)c.m)) put4(to + 4 * i, y);
            }
    }
    wait_for_multipliers();
}

/* held[m][columns of the block's parts] = x, zeros behind the last column. */
template <int ROWS>
static __device__ __forceinline__ void hold_rows(const ki_stream_call &c, const plan &p,
                                                 const place &at, uint8_t *held) {
    enum { EACH = 4 }; /* pieces of 16 bytes that a thread has on their way at once */
    uint32_t per_row = p.here * p.chunks * (BOX_BYTES / 16), n = (ROWS == 1 ? 1 : c.m) * per_row;
    uint32_t first = at.first_part * p.chunks * CHUNK;
    ki_pdl_wait();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < n; i += EACH * MULTIPLIERS) {
        uint4 v[EACH];
        uint32_t to[EACH];
#pragma unroll
        for (uint32_t e = 0; e < EACH; e++) {
            uint32_t j = i + e * MULTIPLIERS, m = ROWS == 1 ? 0 : j / per_row;
            uint32_t piece = j - m * per_row, col = first + piece * 8;
            to[e] = m * p.held_bytes + piece * 16;
            v[e] = make_uint4(0, 0, 0, 0);
            if (j < n && col < c.k)
                v[e] = *(const uint4 *)((const uint8_t *)c.x + ((size_t)m * c.k + col) * 2);
        }
#pragma unroll
        for (uint32_t e = 0; e < EACH; e++)
            if (i + e * MULTIPLIERS < n) *(uint4 *)(held + to[e]) = v[e];
    }
    wait_for_multipliers();
}

/* ---- the warps that multiply ---- */

/* A warp's tiles of one part: tile group, and groups further. */
typedef struct share {
    uint32_t part, group, n_groups;
} share;

static __device__ __forceinline__ share share_of(const plan &p) {
    uint32_t warp = threadIdx.x / 32, n_groups = 1u << p.group_bits;
    return {warp >> p.group_bits, warp & (n_groups - 1), n_groups};
}

/* What a step of 16 columns multiplies: lane l reads row l % 16 of a tile (of gate and up: l % 8 of
 * either), piece l / 16; of eight rows of x row l % 8, pieces in turn. */
template <int COLS, int TILES, int ROWS> struct step {
    uint32_t a[TILES][4], b[COLS][2];

    /* from: a stage's part; x: where its rows are. */
    __device__ __forceinline__ void load(const uint32_t (&w_at)[TILES], uint32_t from, uint32_t x,
                                         int k) {
#pragma unroll
        for (int i = 0; i < TILES; i++) ki_read4(a[i], (from + w_at[i]) ^ (32 * k));
        if constexpr (ROWS) {
            ki_read2(b[0], x + 32 * k); /* no swizzle there */
        } else if constexpr (COLS == 1) {
            ki_read2(b[0], x ^ (32 * k));
        } else {
#pragma unroll
            for (int j = 0; j < COLS; j += 2)
                ki_read4(b[j][0], b[j][1], b[j + 1][0], b[j + 1][1],
                         (x + j * 8 * BOX_BYTES) ^ (32 * k));
        }
    }
    template <class T>
    __device__ __forceinline__ void multiply(float (&acc)[TILES][COLS][4], T type) const {
#pragma unroll
        for (int j = 0; j < COLS; j++)
#pragma unroll
            for (int i = 0; i < TILES; i++) ki_multiply(acc[i][j], a[i], b[j][0], b[j][1], type);
    }
};

/* acc += what all stages hold. A step is loaded while the one before it is multiplied. */
template <class T, int COLS, int TILES, int ROWS>
static __device__ __forceinline__ void multiply(float (&acc)[TILES][COLS][4],
                                                const ki_stream_call &c, const plan &p,
                                                const place &at) {
    enum { STEPS = CHUNK / 16 };
    const share s = share_of(p);
    uint32_t lane = threadIdx.x % 32, low = lane & 7, up = lane >> 3 & 1;
    uint32_t w_at[TILES], x_at;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        uint32_t tile = min(s.group + i * s.n_groups, at.tiles - 1);
        uint32_t row = c.act_out ? up * at.tiles * 8 + tile * 8 + low : tile * TILE + up * 8 + low;
        w_at[i] = row * BOX_BYTES + ((lane >> 4) ^ low) * 16;
    }
    if (ROWS)
        x_at = at.held + (ROWS == 1 ? 0 : min(low, c.m - 1) * p.held_bytes) + up * 16 +
               ((c.raw ? at.first_part : 0) + s.part) * p.chunks * BOX_BYTES;
    else
        x_at = outputs_of(p) * BOX_BYTES + ((lane >> 4) * 8 % (COLS * 8) + low) * BOX_BYTES +
               (up ^ low) * 16;
    step<COLS, TILES, ROWS> steps[2];
    uint32_t stage = 0, parity = 0, from = at.ring + s.part * p.part_bytes;
    ki_bar_wait(at.full, 0);
    steps[0].load(w_at, from, ROWS ? x_at : from + x_at, 0);
    for (uint32_t n = 0; n < p.chunks; n++) {
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            if (k < STEPS - 1) {
                steps[(k + 1) % 2].load(w_at, from, ROWS ? x_at : from + x_at, k + 1);
            } else {
                __syncwarp();
                if (lane == 0) ki_bar_arrive(at.empty + 8 * stage);
                from += p.stage_bytes, x_at += ROWS ? BOX_BYTES : 0;
                if (++stage == p.n_stages)
                    stage = 0, parity ^= 1, from -= p.n_stages * p.stage_bytes;
                if (n + 1 < p.chunks) {
                    ki_bar_wait(at.full + 8 * stage, parity);
                    steps[0].load(w_at, from, ROWS ? x_at : from + x_at, 0);
                }
            }
            steps[k % 2].multiply(acc, T());
        }
    }
}

/* ---- the end of a thread block ---- */

/* Sums stand where the ring was: [part][m][pitch], so that neither way meets a bank twice. */
static __device__ __forceinline__ uint32_t pitch_of(const plan &p) { return outputs_of(p) + 4; }

template <int COLS, int TILES>
static __device__ __forceinline__ void put_sums(const float (&acc)[TILES][COLS][4], float *sums,
                                                bool gated, const plan &p, uint32_t tiles) {
    const share s = share_of(p);
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, pitch = pitch_of(p);
    float *to = sums + s.part * COLS * 8 * pitch;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        uint32_t tile = s.group + i * s.n_groups;
        uint32_t at = gated ? tile * 8 + g : tile * TILE + g, next = gated ? tiles * 8 : 8;
        if (tile >= tiles) continue;
#pragma unroll
        for (int j = 0; j < COLS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                to[(8 * j + 2 * t + e % 2) * pitch + at + e / 2 * next] = acc[i][j][e];
    }
}

/* The parts' sums in their order, from the thread blocks that have them. */
static __device__ __forceinline__ float total(const plan &p, uint32_t at, uint32_t part_bytes) {
    float sum = 0;
    for (uint32_t q = 0, rank = 0, slot = 0; q < p.parts; q++) {
        float v = ki_read_of(at + slot * part_bytes, rank);
        sum = q ? sum + v : v;
        if (++slot == p.here) slot = 0, rank++;
    }
    return sum;
}

template <int COLS>
static __device__ __forceinline__ void finish(const ki_stream_call &c, const plan &p,
                                              const place &at) {
    uint32_t n_here = at.tiles * (c.act_out ? TILE / 2 : TILE), pitch = pitch_of(p);
    uint32_t n_all = c.act_out ? c.n / 2 : c.n, part_bytes = COLS * 8 * pitch * 4;
    for (uint32_t o = threadIdx.x + at.rank * THREADS; o < n_here * c.m; o += THREADS * p.cluster) {
        uint32_t m = o / n_here, i = o % n_here, from = at.ring + (m * pitch + i) * 4;
        if (at.first + i >= n_all) continue;
        float v = total(p, from, part_bytes);
        if (c.act_out) {
            float y = ki_gated(c.act, v, total(p, from + n_here * 4, part_bytes));
            ki_store(c.act_out, (size_t)m * n_all + at.first + i, y, c.type);
        } else {
            float *to = c.out + m * c.out_stride + at.first + i;
            *to = c.add ? *to + v : v;
        }
    }
}

static __device__ __forceinline__ void sync_all(const plan &p) {
    if (p.cluster > 1) ki_cluster_sync();
    else __syncthreads();
}

/* ---- the end of rows that are held: what runs once runs cold, so it is short ---- */

static_assert(NORM_ROWS <= CLUSTER, "a thread block of a cluster adds one row up at most");

/* Row r of the sums of a block is row r of all where it is alone, else that of its rank. */
template <int ROWS>
static __device__ __forceinline__ uint32_t row_of(const plan &p, const place &at, uint32_t r) {
    return ROWS == 1 ? 0 : p.cluster == 1 ? r : at.rank;
}

/* An output of each of the first threads of a block that has a row; false: none of this one. */
static __device__ __forceinline__ bool has_output(const ki_stream_call &c, const plan &p,
                                                  const place &at) {
    uint32_t n_here = at.tiles * (c.act_out ? TILE / 2 : TILE);
    uint32_t n_all = c.act_out ? c.n / 2 : c.n;
    return at.rank < c.m && threadIdx.x < n_here && at.first + threadIdx.x < n_all;
}

static __device__ __forceinline__ void put_sum(float *to, float v, uint32_t rank, const place &at) {
    if (rank == at.rank) *to = v;
    else ki_send(ki_shared(to), v, at.of_peers, rank);
}

/* Sums stand [row][part][output], of one row all columns of acc are the same. Blocks send to the
 * one that has the row, so that nobody waits but who adds. */
template <int TILES, int ROWS>
static __device__ __forceinline__ void put_row_sums(const float (&acc)[TILES][1][4],
                                                    const ki_stream_call &c, const plan &p,
                                                    const place &at, float *sums) {
    const share s = share_of(p);
    uint32_t g = threadIdx.x % 32 / 4, first = 2 * (threadIdx.x % 4);
    uint32_t from = (at.first_part + s.part) * outputs_of(p) + g;
    uint32_t next = c.act_out ? at.tiles * 8 : 8;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        uint32_t tile = s.group + i * s.n_groups;
        if (tile >= at.tiles) continue;
#pragma unroll
        for (int e = 0; e < (ROWS == 1 ? 1 : 2); e++) {
            uint32_t m = first + e, rank = p.cluster == 1 ? 0 : m;
            if (m >= (ROWS == 1 ? 1 : c.m)) continue;
            float *to = sums + from + tile * (c.act_out ? 8 : TILE);
            if (ROWS > 1 && p.cluster == 1) to += m * p.parts * outputs_of(p);
            put_sum(to, acc[i][0][e], rank, at);
            put_sum(to + next, acc[i][0][2 + e], rank, at);
        }
    }
}

/* rest: what the first row's sum is added to. */
template <int ROWS>
static __device__ __forceinline__ void finish_rows(const ki_stream_call &c, const plan &p,
                                                   const place &at, const float *sums, float rest) {
    if (!has_output(c, p, at)) return;
    if (p.cluster > 1) ki_bar_wait(at.of_peers, 0);
    uint32_t i = threadIdx.x, up = at.tiles * 8, n_rows = ROWS > 1 && p.cluster == 1 ? c.m : 1;
#pragma unroll 1
    for (uint32_t r = 0; r < n_rows; r++) {
        float v = sums[i], w = c.act_out ? sums[i + up] : 0;
#pragma unroll 1
        for (uint32_t q = 1; q < p.parts; q++) {
            sums += outputs_of(p), v += sums[i];
            if (c.act_out) w += sums[i + up];
        }
        sums += outputs_of(p);
        size_t m = row_of<ROWS>(p, at, r);
        float *to = c.out + m * c.out_stride + at.first + i;
        if (c.act_out)
            ki_store(c.act_out, m * (c.n / 2) + at.first + i, ki_gated(c.act, v, w), c.type);
        else if (!c.add) *to = v;
        else *to = (r ? *to : rest) + v;
    }
}

/* COLS: eights of rows of x; TILES: most tiles of a warp; ROWS: most rows of x that are held, 0:
 * they come with the stages. */
template <class T, int COLS, int TILES, int ROWS>
static __global__ void __maxnreg__(COLS *TILES > 8 ? MOST_REGISTERS
                                   : ROWS == 1     ? ROW_REGISTERS
                                   : ROWS          ? ROWS_REGISTERS
                                                   : REGISTERS)
    stream(const __grid_constant__ maps by, const __grid_constant__ ki_stream_call c,
           const __grid_constant__ plan p) {
    extern __shared__ uint8_t memory[];
    __shared__ uint64_t bars[2][MOST_STAGES], of_peers;
    uint32_t base = ki_shared(memory), skip = (ALIGNMENT - base % ALIGNMENT) % ALIGNMENT;
    place at;
    at.rank = blockIdx.x % p.cluster;
    uint32_t number = blockIdx.x / p.cluster, n_full = min(number, p.n_full);
    bool is_full = number < p.n_full;
    at.tiles = is_full ? p.tiles : p.tiles - 1;
    at.first = (number * (p.tiles - 1) + n_full) * (c.act_out ? TILE / 2 : TILE);
    at.stage_bytes = p.stage_bytes - p.here * (p.tiles - at.tiles) * TILE * BOX_BYTES;
    at.first_part = at.rank * p.here;
    at.ring = base + skip, at.held = at.ring + p.ring_bytes;
    at.full = ki_shared(bars[0]), at.empty = ki_shared(bars[1]), at.of_peers = ki_shared(&of_peers);
    bool sends = ROWS && p.cluster > 1;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < p.n_stages; i++) {
            ki_bar_init(at.full + 8 * i, KI_FILLERS);
            ki_bar_init(at.empty + 8 * i, WARPS);
        }
        if (sends) ki_bar_init(at.of_peers, 1);
        ki_bar_fence();
        if (sends) ki_bar_expect(at.of_peers, (p.parts - p.here) * at.tiles * TILE * 4);
    }
    __syncthreads();
    if (sends) ki_cluster_arrive(); /* that those who add are there */
    if (!c.lets_late) ki_pdl_launch();
    float acc[TILES][COLS][4] = {}, rest = 0;
    if (threadIdx.x >= MULTIPLIERS) {
        const ki_boxes w = {
            is_full ? &by.full : &by.less,         (const uint8_t *)c.weight, c.n, c.k,
            at.tiles * TILE / (c.act_out ? 2 : 1), ki_leave_first()};
        const ki_boxes x = {&by.rows, (const uint8_t *)c.x, c.m, c.k, COLS * 8, ki_leave_last()};
        if (threadIdx.x - MULTIPLIERS < KI_FILLERS) fill(c, p, at, w, x);
    } else {
        if constexpr (ROWS > 0) {
            uint8_t *held = memory + skip + p.ring_bytes;
            if (sends) ki_cluster_wait();
            if (!c.raw) hold_rows<ROWS>(c, p, at, held);
            else if (ROWS == 1 && c.k > 4 * KI_NORM_THREADS)
                hold_norm<T, ROWS, KI_NORM_MOST_FOURS>(c, p, held);
            else hold_norm<T, ROWS, 1>(c, p, held);
        }
        ki_pdl_wait(); /* asleep: barriers are waited for awake, at the cost of who still works */
        if (c.lets_late) ki_pdl_launch();
        if (ROWS && c.add && has_output(c, p, at))
            rest = c.out[row_of<ROWS>(p, at, 0) * c.out_stride + at.first + threadIdx.x];
        multiply<T, COLS, TILES, ROWS>(acc, c, p, at);
    }
    if constexpr (ROWS > 0) {
        if (threadIdx.x >= MULTIPLIERS) return;
        float *sums = (float *)(memory + skip + p.ring_bytes + c.m * p.held_bytes);
        put_row_sums<TILES, ROWS>(acc, c, p, at, sums);
        wait_for_multipliers();
        finish_rows<ROWS>(c, p, at, sums, rest);
        return;
    }
    ki_pdl_wait();   /* before what others wrote is added to, or written over */
    __syncthreads(); /* the ring was read */
    if (threadIdx.x < MULTIPLIERS)
        put_sums<COLS, TILES>(acc, (float *)(memory + skip), c.act_out != NULL, p, at.tiles);
    sync_all(p);
    finish<COLS>(c, p, at);
    if (p.cluster > 1) ki_cluster_sync(); /* a block stays until its sums were read */
}

/* ---- what launches have in common ---- */

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* A map says where a matrix is and how it is cut, so that one of these four never grows old. */
typedef struct kept_map {
    CUtensorMap map;
    const void *data;
    uint32_t n_rows, n_cols, box_rows;
} kept_map;

/* Llama-2-7B has 129 matrices; rows of x are few buffers of up to 64 rows. One that meets another
 * takes its place. */
enum { N_MAPS = 1024 };

struct ki_stream {
    kept_map maps[N_MAPS];
    ki_mem *mem;
    encode_fn encode; /* the driver's; NULL where the kernels copy by themselves */
    ki_stream_device about;
    uint32_t n_encoded;
    uint32_t ready, wide_ready; /* a bit for each kernel whose attributes were set */
};

static cudaError_t find_encode(encode_fn *out) {
    cudaDriverEntryPointQueryResult found;
    void *f = NULL;
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                     cudaEnableDefault, &found);
    if (e != cudaSuccess) return e;
    *out = (encode_fn)f;
    return found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorSymbolNotFound;
}

static cudaLaunchAttribute cluster_of(uint32_t n_blocks) {
    cudaLaunchAttribute a = {};
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = n_blocks, a.val.clusterDim.y = a.val.clusterDim.z = 1;
    return a;
}

/* How many clusters find multiprocessors of their own: their blocks lie in one part of the chip,
 * whose number of multiprocessors is not always a multiple of four. */
static cudaError_t count_clusters(uint32_t *out, uint32_t n_blocks, const ki_stream_device *d) {
    auto kernel = stream<__half, 1, 1, 0>;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = cluster_of(n_blocks);
    int n = 0;
    config.gridDim = n_blocks;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = d->most_bytes - BARRIER_BYTES;
    config.attrs = &attribute, config.numAttrs = 1;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)config.dynamicSmemBytes);
    if (e == cudaSuccess) e = cudaOccupancyMaxActiveClusters(&n, kernel, &config);
    *out = n < 1 ? 1 : (uint32_t)n;
    return e;
}

/* What memory can give in a cycle of the highest clock; of both the system tells kHz. */
static cudaError_t ask_rate(float *out, int number) {
    int clock = 0, memory = 0, bits = 0;
    cudaError_t e = cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, number);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&memory, cudaDevAttrMemoryClockRate, number);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, number);
    *out = 2.0f * (float)memory * (float)bits / 8 / (float)max(clock, 1); /* two a cycle */
    return e;
}

static cudaError_t ask_device(ki_stream *s) {
    cudaFuncAttributes kernel;
    int number = 0, n_sms = 0, most_bytes = 0;
    float rate = 0;
    ki_stream_device *d = &s->about;
    cudaError_t e = cudaFuncGetAttributes(&kernel, stream<__half, 1, 1, 0>);
    if (e == cudaSuccess) e = cudaGetDevice(&number);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, number);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
    if (e == cudaSuccess) e = ask_rate(&rate, number);
    if (e != cudaSuccess) return e;
    *d = (ki_stream_device){(uint32_t)n_sms,        (uint32_t)most_bytes, 1, 1, rate,
                            kernel.ptxVersion >= 90};
    if (!d->bulk) return cudaSuccess;
    e = find_encode(&s->encode);
    if (e == cudaSuccess) e = count_clusters(&d->n_clusters, CLUSTER, d);
    return e == cudaSuccess ? count_clusters(&d->n_pairs, KI_STREAM_PAIR, d) : e;
}

extern "C" kivi_status ki_stream_create(ki_stream **out, ki_mem *mem, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(ki_stream), err));
    ki_stream *s = (ki_stream *)p;
    s->mem = mem;
    kivi_status status = ki_cuda_check(ask_device(s), "products of few rows", err);
    if (status == KIVI_OK) *out = s;
    else ki_free(mem, s);
    return status;
}

extern "C" void ki_stream_destroy(ki_stream **stream) {
    if (*stream) ki_free((*stream)->mem, *stream);
    *stream = NULL;
}

extern "C" uint32_t ki_stream_n_maps(const ki_stream *s) { return s->n_encoded; }

/* [n_rows][n_cols] of 16 bits in boxes of box_rows. */
static cudaError_t encode_map(const ki_stream *s, kept_map *k) {
    const cuuint64_t sizes[] = {k->n_cols, k->n_rows}, strides[] = {(cuuint64_t)k->n_cols * 2};
    const cuuint32_t box[] = {CHUNK, k->box_rows}, steps[] = {1, 1};
    CUresult r =
        s->encode(&k->map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, (void *)k->data, sizes, strides, box,
                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t ki_stream_map(CUtensorMap *out, ki_stream *s, const void *data, uint32_t n_rows,
                          uint32_t n_cols, uint32_t box_rows) {
    uint64_t mix =
        ((uint64_t)(uintptr_t)data >> 4 ^ (uint64_t)n_rows << 32 ^ box_rows) * 0x9e3779b97f4a7c15u;
    kept_map *k = &s->maps[mix >> 54];
    if (k->data != data || k->n_rows != n_rows || k->n_cols != n_cols || k->box_rows != box_rows) {
        k->data = data, k->n_rows = n_rows, k->n_cols = n_cols, k->box_rows = box_rows;
        cudaError_t e = encode_map(s, k);
        if (e != cudaSuccess) k->data = NULL;
        if (e != cudaSuccess) return e;
        s->n_encoded++;
    }
    *out = k->map;
    return cudaSuccess;
}

static constexpr uint32_t number_of(__half) { return 0; }
static constexpr uint32_t number_of(__nv_bfloat16) { return 1; }

/* Once for each kernel. The same in all engines: another's thread may be between this and its
 * launch. */
template <class T, int COLS, int TILES, int ROWS> static cudaError_t make_ready(ki_stream *s) {
    constexpr uint32_t SHAPE = ROWS ? 4 + (ROWS > 1) : COLS == 8 ? 3 : COLS / 2;
    auto kernel = stream<T, COLS, TILES, ROWS>;
    uint32_t bit = 1u << (SHAPE * 4 + (TILES - 1) * 2 + number_of(T()));
    if (s->ready & bit) return cudaSuccess;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)(s->about.most_bytes - BARRIER_BYTES));
    if (e == cudaSuccess) e = ki_share_multiprocessors(kernel);
    if (e == cudaSuccess) s->ready |= bit;
    return e;
}

/* ---- launches ---- */

static cudaError_t make_maps(maps *by, ki_stream *s, const ki_stream_call &c, const plan &p,
                             uint32_t cols) {
    uint32_t rows = TILE / (c.act_out ? 2 : 1), n_clusters = p.n_blocks / p.cluster;
    cudaError_t e = ki_stream_map(&by->full, s, c.weight, c.n, c.k, p.tiles * rows);
    if (e == cudaSuccess && p.n_full < n_clusters)
        e = ki_stream_map(&by->less, s, c.weight, c.n, c.k, (p.tiles - 1) * rows);
    if (e == cudaSuccess && !p.held_bytes) e = ki_stream_map(&by->rows, s, c.x, c.m, c.k, cols * 8);
    return e;
}

template <class T, int COLS, int TILES, int ROWS>
static cudaError_t launch(ki_stream *s, const ki_stream_call &c, const plan &p, void *stream_) {
    maps by = {};
    cudaError_t e = make_ready<T, COLS, TILES, ROWS>(s);
    if (s->encode && e == cudaSuccess) e = make_maps(&by, s, c, p, COLS);
    if (e != cudaSuccess) return e;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {{}, cluster_of(p.cluster)};
    config.gridDim = p.n_blocks;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = p.shared_bytes;
    config.stream = (cudaStream_t)stream_;
    config.attrs = attributes;
    config.numAttrs = p.cluster > 1 ? 2 : 1;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    return cudaLaunchKernelEx(&config, stream<T, COLS, TILES, ROWS>, by, c, p);
}

template <class T, int COLS, int ROWS>
static cudaError_t launch_tiles(ki_stream *s, const ki_stream_call &c, const plan &p,
                                void *stream_) {
    return p.tiles > WARPS / p.here ? launch<T, COLS, 2, ROWS>(s, c, p, stream_)
                                    : launch<T, COLS, 1, ROWS>(s, c, p, stream_);
}

template <class T>
static cudaError_t dispatch(ki_stream *s, const ki_stream_call &c, void *stream_) {
    if (s->encode && c.m > NORM_ROWS)
        return ki_stream_wide(c, {s, &s->wide_ready, s->about.n_sms, stream_});
    plan p = ki_stream_plan_of(&c, &s->about);
    if (p.held_bytes && c.m == 1) return launch_tiles<T, 1, 1>(s, c, p, stream_);
    if (p.held_bytes) return launch_tiles<T, 1, NORM_ROWS>(s, c, p, stream_);
    switch (ki_stream_eights(c.m)) {
    case 1: return launch_tiles<T, 1, 0>(s, c, p, stream_);
    case 2: return launch_tiles<T, 2, 0>(s, c, p, stream_);
    case 4: return launch_tiles<T, 4, 0>(s, c, p, stream_);
    default: return launch_tiles<T, 8, 0>(s, c, p, stream_);
    }
}

extern "C" bool ki_stream_takes_norm(const ki_cuda_norm *norm, uint32_t m, uint32_t k) {
    return m <= NORM_ROWS && !norm->bias && (uintptr_t)norm->weight % sizeof(float4) == 0 &&
           k % 8 == 0 && k <= 4 * KI_NORM_THREADS * (m == 1 ? KI_NORM_MOST_FOURS : 1);
}

extern "C" kivi_status ki_stream_run(ki_stream *of, const ki_stream_call *c, void *stream_,
                                     kivi_error *err) {
    return ki_cuda_check(c->type == KI_CUDA_F16 ? dispatch<__half>(of, *c, stream_)
                                                : dispatch<__nv_bfloat16>(of, *c, stream_),
                         "product of few rows", err);
}
