/* kv_prompt.cu: causal attention of a step's rows over what is older and over the step itself.
 *
 * One thread block for 128 rows of one query head (64 at head sizes above 128): 32 rows a warp
 * (16). Keys and values come in tiles of 64 tokens as float16 in shared memory, copied while the
 * tile before is worked on: rows of the step from where they are, older ones from the scratch
 * (kv_prompt.h), where codes are float16 rows, too. Which of the two a query reads depends on its
 * position (the visibility rule), so around the line a tile is worked on once for each way in which
 * some row reads it: keys from codes or in 16 bit, values from codes or in 16 bit; every pair of a
 * row and a token belongs to one of them, and scores of other pairs are -inf.
 *
 * A block is two groups of four warps where the device has the shared memory: each has a state of
 * its own and takes every other tile, and the states are merged at the end. One group a block would
 * leave a device half empty in a step of 512 rows. */
#include "kv_launch.h"
#include "kv_prompt.h"
#include "kv_rows.cuh"
#include "kv_shared.h"

struct prompt_args {
    ki_cuda_layout l;
    const ki_cuda_seq *seqs;
    const uint16_t *q, *k_rows, *v_rows, *scratch;
    void *out;
    ki_prompt_part part;
    uint32_t window, step_window, out_stride, n_tiles;
    ki_cuda_type out_type;
    /* Whether there is shared memory for two tiles of each side and group, or (above 128 channels)
     * for one of both. */
    bool is_piped, is_single;
    float factor; /* scale log2(e) */
};

enum { TILE = 64, GROUP_WARPS = 4, GROUP_THREADS = GROUP_WARPS * 32, MAX_GROUPS = 2 };

template <int D> struct tile_shape {
    static constexpr int STRIDE = D + 8, HALVES = KI_TILE_HALVES(D), SETS = KI_TILE_SETS(D);
    static_assert(HALVES == TILE * STRIDE, "a tile");
    static constexpr uint32_t ROWS = SETS * TILE;
};

/* The warps of a group: they share tiles. */
KI_DEV void group_barrier(uint32_t group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"((int)GROUP_THREADS) : "memory");
}

/* ---- which tiles ---- */

/* What a block of rows sees: positions [first, end); the first row's position and the first
 * position of the last row; where the first and the last row begin to read in 16 bit. */
struct block_view {
    uint32_t first, end, pos0, last_first, k_from, k_to, v_from, v_to, k_sinks, v_sinks;
};

KI_DEV block_view view_block(const prompt_args &a, const ki_cuda_seq &s, uint32_t first_row,
                             uint32_t n_rows) {
    block_view v;
    uint32_t last = s.n_tokens + min(first_row + n_rows, s.n_rows) - 1;
    v.pos0 = s.n_tokens + first_row;
    v.end = last + 1;
    v.first = a.window && v.pos0 + 1 > a.window ? v.pos0 + 1 - a.window : 0;
    v.last_first = a.window && v.end > a.window ? v.end - a.window : 0;
    v.k_from = ki_prompt_k_line(&a.l, &s, v.pos0), v.k_to = ki_prompt_k_line(&a.l, &s, last);
    v.v_from = ki_prompt_v_line(&a.l, &s, v.pos0), v.v_to = ki_prompt_v_line(&a.l, &s, last);
    v.k_sinks = a.l.k_bits == 16 ? 0 : a.l.sink_tokens;
    v.v_sinks = a.l.v_bits == 16 ? 0 : a.l.sink_tokens;
    return v;
}

/* A tile, read in one of four ways. */
struct tile_job {
    uint32_t base;
    bool k_exact, v_exact, is_masked;
};

/* Whether some row reads tokens [from, to) of one side in that way. */
KI_DEV bool is_read(uint32_t from, uint32_t to, bool exact, uint32_t sinks, uint32_t line_from,
                    uint32_t line_to) {
    if (exact) return max(from, line_from) < to || from < min(sinks, to);
    return max(from, sinks) < min(to, line_to);
}
/* Whether all rows read the whole tile in that way. */
KI_DEV bool is_whole(const tile_job &j, bool exact, uint32_t sinks, uint32_t line_from,
                     uint32_t line_to) {
    if (exact) return j.base >= line_to || j.base + TILE <= sinks;
    return j.base >= sinks && j.base + TILE <= line_from;
}

/* Jobs of a block in order: tile by tile, way by way. */
struct job_walk {
    uint32_t base, way;
};

KI_DEV bool next_job(tile_job *j, job_walk *w, const block_view &v) {
    for (; w->base < v.end; w->base += TILE, w->way = 0)
        while (w->way < 4) {
            uint32_t from = max(w->base, v.first), to = min(w->base + TILE, v.end);
            j->base = w->base;
            j->k_exact = w->way % 2, j->v_exact = w->way / 2;
            w->way++;
            if (!is_read(from, to, j->k_exact, v.k_sinks, v.k_from, v.k_to) ||
                !is_read(from, to, j->v_exact, v.v_sinks, v.v_from, v.v_to))
                continue;
            /* of two sides with codes keys leave the window first, never values alone */
            if (j->k_exact && !j->v_exact && v.v_to <= v.k_to && v.v_from <= v.k_from &&
                v.v_sinks == v.k_sinks)
                continue;
            j->is_masked = j->base + TILE > v.pos0 + 1 || j->base < v.last_first ||
                           !is_whole(*j, j->k_exact, v.k_sinks, v.k_from, v.k_to) ||
                           !is_whole(*j, j->v_exact, v.v_sinks, v.v_from, v.v_to);
            return true;
        }
    return false;
}
/* Groups take turns: a round is a job of each, but in the last one there may be none for some. */
struct job_round {
    bool is_there, has; /* a job for any group, and for this one */
};
/* The next round, behind `rest` jobs of this one. */
KI_DEV job_round next_round(tile_job *j, job_walk *w, const block_view &v, uint32_t rest,
                            uint32_t group) {
    for (; rest; rest--)
        if (!next_job(j, w, v)) return {false, false};
    if (!next_job(j, w, v)) return {false, false};
    for (; group; group--)
        if (!next_job(j, w, v)) return {true, false};
    return {true, true};
}

/* ---- tiles into shared memory ---- */

/* Where a block's tiles come from. */
struct tile_source {
    ki_cuda_seq seq;
    ki_prompt_old old;
    const uint16_t *scratch[2]; /* of this sequence and KV head; keys, values */
    const uint16_t *rows[2];    /* of the step, from the sequence's first one on */
    uint64_t stride;            /* halves from row to row of the step */
};

/* Begins to copy one side; rows that nobody has are 0. */
template <int D>
KI_DEV void begin_side(uint16_t *tile, const tile_source &x, uint32_t base, bool exact, int side,
                       bool has_store) {
    constexpr int STRIDE = tile_shape<D>::STRIDE, FOURS = D / 8;
    uint32_t thread = threadIdx.x % GROUP_THREADS;
    int64_t at = ki_prompt_row_at(&x.old, base, exact);
    const uint16_t *old = x.scratch[side] + at * D;
    if (!exact) {
#pragma unroll 8
        for (uint32_t k = thread; k < TILE * FOURS; k += GROUP_THREADS)
            ki_copy16(ki_shared(tile + k / FOURS * STRIDE + k % FOURS * 8), old + k * 8, true);
        return;
    }
    uint32_t n_tokens = x.seq.n_tokens, n_rows = x.seq.n_rows;
#pragma unroll 4
    for (uint32_t k = thread; k < TILE * FOURS; k += GROUP_THREADS) {
        uint32_t pos = base + k / FOURS, r = pos - n_tokens, c = k % FOURS * 8;
        bool is_old = pos < n_tokens, is_there = is_old ? has_store && at >= 0 : r < n_rows;
        const uint16_t *from = is_old ? old + k * 8 : x.rows[side] + r * x.stride + c;
        ki_copy16(ki_shared(tile + k / FOURS * STRIDE + c), is_there ? from : x.rows[side],
                  is_there);
    }
}

template <int D>
KI_DEV void begin_tile(uint16_t *k_tile, uint16_t *v_tile, const prompt_args &a,
                       const tile_source &x, const tile_job &j) {
    begin_side<D>(k_tile, x, j.base, j.k_exact, 0, a.l.k_bits < 16);
    if (D <= 128 || !a.is_single) begin_side<D>(v_tile, x, j.base, j.v_exact, 1, a.l.v_bits < 16);
    ki_end_copies();
}

/* Queries of n_rows rows from first_row on to shared memory, by all threads; rows behind the last
 * are 0. */
template <int D>
KI_DEV void load_queries(uint16_t *to, const prompt_args &a, const ki_cuda_seq &s,
                         uint32_t first_row, uint32_t head) {
    constexpr int STRIDE = tile_shape<D>::STRIDE, FOURS = D / 8;
    for (uint32_t k = threadIdx.x; k < tile_shape<D>::ROWS * FOURS; k += blockDim.x) {
        uint32_t r = first_row + k / FOURS, c = k % FOURS * 8;
        bool is_there = r < s.n_rows;
        uint64_t row = s.first_row + (is_there ? r : 0);
        ki_copy16(ki_shared(to + k / FOURS * STRIDE + c), a.q + (row * a.l.n_heads + head) * D + c,
                  is_there);
    }
}

/* ---- products of one warp: each operand out of shared memory is used for all sets of rows ---- */

/* s [SETS][8][4]: rows g, g + 8 of each 16 of the warp's, tokens 8 n + 2 t, + 1 of the tile. */
template <int D, int SETS = tile_shape<D>::SETS>
KI_DEV void tile_scores(float (&s)[SETS][8][4], const uint16_t *q, const uint16_t *k,
                        uint32_t lane) {
    constexpr int STRIDE = tile_shape<D>::STRIDE;
    const uint16_t *q_at = q + lane % 16 * STRIDE + lane / 16 * 8;
    const uint16_t *k_at = k + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < SETS; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[i][n][e] = 0;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
        uint32_t x[SETS][4], b[4];
#pragma unroll
        for (int i = 0; i < SETS; i++) ki_read4(x[i], ki_shared(q_at + i * 16 * STRIDE + j * 16));
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            ki_read4(b, ki_shared(k_at + n * 8 * STRIDE + j * 16));
#pragma unroll
            for (int i = 0; i < SETS; i++) {
                mma(s[i][n], x[i][0], x[i][1], x[i][2], x[i][3], b[0], b[1]);
                mma(s[i][n + 1], x[i][0], x[i][1], x[i][2], x[i][3], b[2], b[3]);
            }
        }
    }
}

template <int D> struct prompt_state { float acc[D / 8][4], m[2], sum[2]; };

/* acc [D / 8][4] += p v: rows g, g + 8, channels 8 n + 2 t, + 1. */
template <int D, int SETS = tile_shape<D>::SETS>
KI_DEV void tile_values(prompt_state<D> (&st)[SETS], const float (&p)[SETS][8][4],
                        const uint16_t *v, uint32_t lane) {
    constexpr int STRIDE = tile_shape<D>::STRIDE;
    const uint16_t *v_at = v + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t x[SETS][4];
#pragma unroll
        for (int i = 0; i < SETS; i++) {
            x[i][0] = pack2(p[i][2 * j][0], p[i][2 * j][1]);
            x[i][1] = pack2(p[i][2 * j][2], p[i][2 * j][3]);
            x[i][2] = pack2(p[i][2 * j + 1][0], p[i][2 * j + 1][1]);
            x[i][3] = pack2(p[i][2 * j + 1][2], p[i][2 * j + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            ki_read4_turned(b, ki_shared(v_at + j * 16 * STRIDE + n * 8));
#pragma unroll
            for (int i = 0; i < SETS; i++) {
                mma(st[i].acc[n], x[i][0], x[i][1], x[i][2], x[i][3], b[0], b[1]);
                mma(st[i].acc[n + 1], x[i][0], x[i][1], x[i][2], x[i][3], b[2], b[3]);
            }
        }
    }
}

/* Online softmax of a tile. factor: of scores, to units of log2. */
template <int D> KI_DEV void tile_soften(float (&s)[8][4], prompt_state<D> &st, float factor) {
    float top[2] = {-1e30f, -1e30f};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) top[e / 2] = fmaxf(top[e / 2], s[n][e]);
    if (__any_sync(~0u, top[0] > st.m[0] || top[1] > st.m[1])) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
            top[i] = fmaxf(st.m[i], fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2)));
            float f = exp2_fast((st.m[i] - top[i]) * factor);
            st.m[i] = top[i];
            st.sum[i] *= f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) st.acc[n][2 * i] *= f, st.acc[n][2 * i + 1] *= f;
        }
    }
    float base[2] = {-st.m[0] * factor, -st.m[1] * factor};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = exp2_fast(fmaf(s[n][e], factor, base[e / 2]));
            st.sum[e / 2] += s[n][e];
        }
}

/* Scores of 16 rows: those of pairs that are not this job's become -inf. row: of the step, the
 * lane's first. */
KI_DEV void mask_scores(float (&s)[8][4], const prompt_args &a, const ki_cuda_seq &seq,
                        const block_view &v, const tile_job &j, uint32_t row, uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t r = row + 8 * i, pos = seq.n_tokens + r;
        uint32_t end = r < seq.n_rows ? pos + 1 : 0;
        uint32_t first = a.window && pos + 1 > a.window ? pos + 1 - a.window : 0;
        uint32_t k = ki_prompt_k_line(&a.l, &seq, pos), n = ki_prompt_v_line(&a.l, &seq, pos);
#pragma unroll
        for (uint32_t c = 0; c < 16; c++) {
            uint32_t t = j.base + c / 2 * 8 + lane % 4 * 2 + c % 2;
            bool is_here = t >= first && t < end && (t < v.k_sinks || t >= k) == j.k_exact &&
                           (t < v.v_sinks || t >= n) == j.v_exact;
            if (!is_here) s[c / 2][2 * i + c % 2] = -INFINITY;
        }
    }
}

/* ---- what a block leaves ---- */

/* The other group's state into the first one's; shared is free for that. */
template <int D, int SETS = tile_shape<D>::SETS>
KI_DEV void merge_groups(prompt_state<D> (&st)[SETS], float *shared, uint32_t group, float factor) {
    float *mine = shared + threadIdx.x % GROUP_THREADS;
    constexpr uint32_t EACH = (D / 8 * 4 + 4) * GROUP_THREADS;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SETS && group; i++) {
        float *to = mine + i * EACH;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            to[n * GROUP_THREADS] = st[i].m[n];
            to[(2 + n) * GROUP_THREADS] = st[i].sum[n];
        }
#pragma unroll
        for (int n = 0; n < D / 2; n++) to[(4 + n) * GROUP_THREADS] = st[i].acc[n / 4][n % 4];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SETS && !group; i++) {
        const float *from = mine + i * EACH;
        float f[2], g[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float m = from[n * GROUP_THREADS], top = fmaxf(m, st[i].m[n]);
            f[n] = exp2_fast((st[i].m[n] - top) * factor), g[n] = exp2_fast((m - top) * factor);
            st[i].sum[n] = st[i].sum[n] * f[n] + from[(2 + n) * GROUP_THREADS] * g[n];
        }
#pragma unroll
        for (int n = 0; n < D / 2; n++) {
            float *x = &st[i].acc[n / 4][n % 4];
            *x = *x * f[n % 4 / 2] + from[(4 + n) * GROUP_THREADS] * g[n % 4 / 2];
        }
    }
    __syncthreads();
}

/* Rows in shared memory, four floats further apart than they are long. */
template <int D, int SETS = tile_shape<D>::SETS>
KI_DEV void stage_rows(float *rows, const prompt_state<D> (&st)[SETS]) {
    constexpr uint32_t STRIDE = D + 4;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < SETS; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = st[i].sum[h] + __shfl_xor_sync(~0u, st[i].sum[h], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            float f = sum > 0 ? 1 / sum : 0;
            float *to = rows + ((warp * SETS + i) * 16 + lane / 4 + 8 * h) * STRIDE + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(float2 *)(to + n * 8) =
                    make_float2(st[i].acc[n][2 * h] * f, st[i].acc[n][2 * h + 1] * f);
        }
}

/* By all threads. + kinds turn their rows back first. */
template <int D>
KI_DEV void put_rows(float *rows, const prompt_args &a, const ki_cuda_seq &s, uint32_t first_row,
                     uint32_t head) {
    constexpr uint32_t STRIDE = D + 4, FOURS = D / 4;
    uint32_t n = min(tile_shape<D>::ROWS, s.n_rows - first_row);
    if (a.l.is_plus) {
        for (uint32_t r = threadIdx.x / 32; r < n; r += blockDim.x / 32)
            turn_row_by_warp(rows + r * STRIDE, D, threadIdx.x % 32);
        __syncthreads();
    }
    for (uint32_t k = threadIdx.x; k < n * FOURS; k += blockDim.x) {
        uint32_t r = k / FOURS, c = k % FOURS * 4;
        uint64_t at = (uint64_t)(s.first_row + first_row + r) * a.out_stride + head * D + c;
        store_four(a.out, a.out_type, at, *(const float4 *)(rows + r * STRIDE + c));
    }
}

/* ---- the kernel ---- */

KI_DEV tile_source source_of(const prompt_args &a, const ki_cuda_seq &s, uint32_t kv_head) {
    tile_source x;
    uint32_t d = a.l.head_dim, number = kv_head - a.part.first_head;
    x.seq = s;
    x.old = ki_prompt_old_of(&a.l, &s, a.step_window);
    x.stride = (uint64_t)a.l.n_kv_heads * d;
    for (uint32_t side = 0; side < 2; side++) {
        x.scratch[side] =
            a.scratch + (((uint64_t)number * 2 + side) * a.part.head_tokens + s.scratch_at) * d;
        x.rows[side] = (side ? a.v_rows : a.k_rows) + s.first_row * x.stride + kv_head * d;
    }
    return x;
}

/* Values in the place of keys, when all warps are done with those. */
template <int D>
KI_DEV void load_values(uint16_t *tile, const prompt_args &a, const tile_source &x,
                        const tile_job &j, uint32_t group) {
    group_barrier(group);
    begin_side<D>(tile, x, j.base, j.v_exact, 1, a.l.v_bits < 16);
    ki_wait_all_copies();
    group_barrier(group);
}

/* A group's share of the tiles; all groups meet as often. tiles: two stages of keys, two of values;
 * one of each; or one. */
template <int D, int SETS = tile_shape<D>::SETS>
KI_DEV void attend_tiles(prompt_state<D> (&st)[SETS], uint16_t *tiles, const uint16_t *q,
                         const prompt_args &a, const tile_source &x, const block_view &v,
                         uint32_t first_row) {
    constexpr int HALVES = tile_shape<D>::HALVES;
    uint32_t group = threadIdx.x / GROUP_THREADS, rest = blockDim.x / GROUP_THREADS - 1 - group;
    uint32_t warp = threadIdx.x / 32 % GROUP_WARPS, lane = threadIdx.x % 32;
    uint32_t row = first_row + warp * SETS * 16 + lane / 4;
    uint16_t *k_tile = tiles, *v_tile = tiles + (a.is_piped ? 2 : a.is_single ? 0 : 1) * HALVES;
    job_walk walk = {v.first / TILE * TILE, 0};
    tile_job job, next;
    job_round here = next_round(&job, &walk, v, 0, group), then;
    if (here.has) begin_tile<D>(k_tile, v_tile, a, x, job);
    ki_wait_all_copies();
    __syncthreads(); /* queries are here, too */
    for (uint32_t n = 0; here.is_there; n++, job = next, here = then) {
        uint32_t stage = a.is_piped ? n % 2 * HALVES : 0;
        if (!a.is_piped && n) {
            group_barrier(group);
            if (here.has) begin_tile<D>(k_tile, v_tile, a, x, job);
        }
        ki_wait_all_copies();
        group_barrier(group); /* this tile is here, and everybody is done with the one before */
        if (!here.has) break;
        then = next_round(&next, &walk, v, rest, group);
        if (a.is_piped && then.has)
            begin_tile<D>(k_tile + HALVES - stage, v_tile + HALVES - stage, a, x, next);
        float scores[SETS][8][4];
        tile_scores<D>(scores, q + warp * SETS * 16 * tile_shape<D>::STRIDE, k_tile + stage, lane);
#pragma unroll
        for (int i = 0; i < SETS; i++) {
            if (job.is_masked) mask_scores(scores[i], a, x.seq, v, job, row + 16 * i, lane);
            tile_soften<D>(scores[i], st[i], a.factor);
        }
        if (D > 128 && a.is_single) load_values<D>(v_tile, a, x, job, group);
        tile_values<D>(st, scores, v_tile + stage, lane);
    }
}

template <int D>
static __global__ void __launch_bounds__(MAX_GROUPS *GROUP_THREADS, 1)
    ki_prompt_kernel(const __grid_constant__ prompt_args a) {
    extern __shared__ __align__(16) uint16_t shared[];
    __shared__ block_view v;
    __shared__ tile_source x;
    constexpr int SETS = tile_shape<D>::SETS, HALVES = tile_shape<D>::HALVES;
    /* the last rows see the most: they go first */
    uint32_t per_tile = gridDim.x / a.n_tiles, rest = blockIdx.x % per_tile;
    uint32_t first_row = (a.n_tiles - 1 - blockIdx.x / per_tile) * tile_shape<D>::ROWS;
    uint32_t n_heads = a.part.n_heads * a.l.head_group, slot = a.part.first_seq + rest / n_heads;
    uint32_t head = a.part.first_head * a.l.head_group + rest % n_heads;
    uint32_t group = threadIdx.x / GROUP_THREADS;
    ki_pdl_wait();
    ki_pdl_launch();
    const ki_cuda_seq s = a.seqs[slot];
    if (first_row >= s.n_rows || s.flags & KI_CUDA_ELSEWHERE) return;
    if (threadIdx.x == 0) {
        v = view_block(a, s, first_row, tile_shape<D>::ROWS);
        x = source_of(a, s, head / a.l.head_group);
    }
    prompt_state<D> st[SETS] = {};
#pragma unroll
    for (int i = 0; i < SETS; i++) st[i].m[0] = st[i].m[1] = -1e30f;
    load_queries<D>(shared, a, s, first_row, head);
    __syncthreads(); /* v and x are there */
    attend_tiles<D>(st, shared + SETS * HALVES + group * (a.is_piped ? 4 : 2) * HALVES, shared, a,
                    x, v, first_row);
    if (blockDim.x > GROUP_THREADS) merge_groups<D>(st, (float *)shared, group, a.factor);
    else __syncthreads();
    if (!group) stage_rows<D>((float *)shared, st);
    __syncthreads();
    put_rows<D>((float *)shared, a, x.seq, first_row, head);
}

/* ---- host calls ---- */

static_assert(sizeof(block_view) + sizeof(tile_source) <= KI_PROMPT_STATIC_BYTES, "shared memory");

template <int D> static cudaError_t prompt_prepare(uint32_t most_bytes) {
    ki_prompt_config config;
    if (!ki_prompt_config_of(&config, D, most_bytes)) return cudaErrorInvalidValue;
    return cudaFuncSetAttribute(ki_prompt_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)config.shared_bytes);
}

template <int D>
static cudaError_t prompt_launch(prompt_args a, const ki_cuda_attend_call *c, void *stream) {
    ki_prompt_config config;
    if (!ki_prompt_config_of(&config, D, c->cache->shared_bytes)) return cudaErrorInvalidValue;
    a.is_piped = config.is_piped, a.is_single = config.is_single;
    a.n_tiles = (c->max_rows + tile_shape<D>::ROWS - 1) / tile_shape<D>::ROWS;
    uint32_t n = a.part.n_seqs * a.part.n_heads * a.l.head_group * a.n_tiles;
    return ki_launch(ki_prompt_kernel<D>, n, config.n_groups * GROUP_THREADS, config.shared_bytes,
                     c->pdl, stream, a);
}

kivi_status ki_cuda_prompt_prepare(uint32_t most_bytes, kivi_error *err) {
    cudaError_t all[] = {prompt_prepare<64>(most_bytes), prompt_prepare<80>(most_bytes),
                         prompt_prepare<96>(most_bytes), prompt_prepare<128>(most_bytes),
                         prompt_prepare<256>(most_bytes)};
    for (cudaError_t e : all) KI_TRY(ki_cuda_check(e, "shared memory of prompt attention", err));
    return KIVI_OK;
}

kivi_status ki_cuda_prompt_attend(const ki_cuda_attend_call *c, const ki_prompt_part *part,
                                  uint32_t step_window, void *stream, kivi_error *err) {
    prompt_args a = {};
    KI_TRY(ki_cuda_prompt_unpack(c, part, step_window, stream, err));
    a.l = c->cache->layout;
    a.seqs = c->cache->seqs;
    a.q = c->q, a.k_rows = c->k_rows, a.v_rows = c->v_rows;
    a.scratch = (const uint16_t *)c->workspace;
    a.out = c->out, a.out_stride = c->out_stride, a.out_type = c->out_type;
    a.part = *part;
    a.window = c->window, a.step_window = step_window;
    a.factor = c->scale * 1.44269504088896340736f;
    cudaError_t e = cudaErrorInvalidValue;
    switch (a.l.head_dim) {
    case 64: e = prompt_launch<64>(a, c, stream); break;
    case 80: e = prompt_launch<80>(a, c, stream); break;
    case 96: e = prompt_launch<96>(a, c, stream); break;
    case 128: e = prompt_launch<128>(a, c, stream); break;
    case 256: e = prompt_launch<256>(a, c, stream); break;
    }
    return ki_cuda_check(e, "prompt attention", err);
}
