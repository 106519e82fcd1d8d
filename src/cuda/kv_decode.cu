/* kv_decode.cu: the plan of a step, the merge of splits, and the choice of a kernel. */
#include "kv_decode_launch.cuh"
#include "kv_launch.h"
#include "kv_splits.cuh"
#include "pdl.cuh"

/* ---- the plan ---- */

static __global__ void __launch_bounds__(PLAN_THREADS) ki_plan_kernel(const plan_args a) {
    __shared__ uint32_t sums[PLAN_THREADS / 32];
    make_plan(a, sums);
}

/* ---- the merge of a row's splits ---- */

struct merge_args {
    const ki_plan_slot *slots;
    const ki_plan_item *items;
    const float2 *states; /* [items][H]: largest score, sum */
    const float4 *acc;    /* [items][H][D / 4] */
    void *out;
    uint32_t n_rows, n_heads, head_dim, out_stride; /* n_rows: slots * H */
    ki_cuda_type out_type;
    bool is_turned;
};

/* A thread block of the merge has the registers of one of attention: what comes behind may have all
 * other places of the device while it is at work. BATCH: splits whose states a warp loads at once,
 * before it uses the first. */
enum { MERGE_THREADS = 512, MERGE_WARPS = MERGE_THREADS / 32, MERGE_WIDTH = 8, MERGE_BATCH = 4 };

/* A lane's part of a row: four channels, and four more above 128. */
template <int FOURS> struct merge_state {
    float m, sum;
    float4 acc[FOURS];
};

template <int FOURS>
KI_DEV void merge_into(merge_state<FOURS> &a, float m, float sum, const float4 (&acc)[FOURS]) {
    float top = fmaxf(a.m, m), f = exp2_fast(a.m - top), g = exp2_fast(m - top);
    a.m = top;
    a.sum = a.sum * f + sum * g;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        a.acc[i].x = a.acc[i].x * f + acc[i].x * g;
        a.acc[i].y = a.acc[i].y * f + acc[i].y * g;
        a.acc[i].z = a.acc[i].z * f + acc[i].z * g;
        a.acc[i].w = a.acc[i].w * f + acc[i].w * g;
    }
}

/* Splits from, from + step, ... below n of one row, in this order. */
template <int FOURS>
KI_DEV merge_state<FOURS> merge_splits(const merge_args &a, uint64_t first, uint32_t head,
                                       uint32_t from, uint32_t step, uint32_t n, uint32_t lane) {
    uint32_t n_fours = a.head_dim / 4;
    merge_state<FOURS> state = {-1e30f, 0, {}};
    for (uint32_t s = from; s < n; s += step * MERGE_BATCH) {
        float2 ml[MERGE_BATCH];
        float4 acc[MERGE_BATCH][FOURS];
#pragma unroll
        for (int k = 0; k < MERGE_BATCH; k++) {
            uint64_t at = (first + s + k * step) * a.n_heads + head;
            bool here = s + k * step < n;
            ml[k] = here ? a.states[at] : make_float2(-1e30f, 0);
#pragma unroll
            for (uint32_t i = 0; i < FOURS; i++)
                acc[k][i] = here && lane + i * 32 < n_fours ? a.acc[at * n_fours + lane + i * 32]
                                                            : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < MERGE_BATCH; k++) merge_into(state, ml[k].x, ml[k].y, acc[k]);
    }
    return state;
}

template <int FOURS>
KI_DEV void put_merged(float *row, const merge_state<FOURS> &s, uint32_t head_dim, uint32_t lane) {
    float f = s.sum > 0 ? 1 / s.sum : 0;
    for (uint32_t i = 0; i < FOURS; i++) {
        uint32_t c = (lane + i * 32) * 4;
        if (c >= head_dim) continue;
        row[c] = s.acc[i].x * f, row[c + 1] = s.acc[i].y * f;
        row[c + 2] = s.acc[i].z * f, row[c + 3] = s.acc[i].w * f;
    }
}

/* The same bits either way; a warp that knows the head size needs no memory between the steps. */
KI_DEV void turn_merged(float *row, uint32_t head_dim, uint32_t lane) {
    if (head_dim != 128) {
        turn_row_by_warp(row, head_dim, lane);
        return;
    }
    float x[4];
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 4; m++) x[m] = row[lane + 32 * m];
    turn_in_registers<128>(x, lane);
#pragma unroll
    for (int m = 0; m < 4; m++) row[lane + 32 * m] = x[m];
}

struct merge_row {
    uint64_t first, row;   /* item, row of the result */
    uint32_t head, splits; /* 1: there is nothing to do, or it was written already */
};

KI_DEV merge_row merge_row_of(const merge_args &a, uint32_t index) {
    merge_row r = {0, 0, index % a.n_heads, 0};
    if (index >= a.n_rows) return r;
    const ki_plan_slot &slot = a.slots[index / a.n_heads];
    r.splits = slot.n_splits, r.first = slot.first_item;
    if (r.splits > 1) r.row = a.items[r.first].row;
    return r;
}

/* WARPS of a row: each takes every WARPSth split. A head's channels are FOURS float4 of a lane. */
template <int WARPS, int FOURS>
static __global__ void __launch_bounds__(MERGE_THREADS, 2) ki_merge_kernel(const merge_args a) {
    constexpr uint32_t ROWS = MERGE_WARPS / WARPS;
    __shared__ __align__(16) float rows[ROWS][FOURS * 128];
    __shared__ merge_state<FOURS> parts[WARPS > 1 ? MERGE_WARPS : 1][32];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp / WARPS;
    ki_pdl_launch(); /* it waits for this kernel, and so for the one before */
    merge_row r = merge_row_of(a, blockIdx.x * ROWS + own);
    ki_pdl_wait();
    merge_state<FOURS> state = {};
    bool is_here = r.splits > 1;
    if (is_here)
        state = merge_splits<FOURS>(a, r.first, r.head, warp % WARPS, WARPS, r.splits, lane);
    if (WARPS > 1) {
        parts[warp][lane] = state;
        __syncthreads();
        is_here = is_here && warp % WARPS == 0;
        for (uint32_t w = 1; w < WARPS && is_here; w++) {
            const merge_state<FOURS> &other = parts[warp + w][lane];
            merge_into(state, other.m, other.sum, other.acc);
        }
    }
    if (!is_here) return;
    put_merged(rows[own], state, a.head_dim, lane);
    if (a.is_turned) turn_merged(rows[own], a.head_dim, lane);
    __syncwarp();
    for (uint32_t c = lane; c < a.head_dim; c += 32)
        store_out(a.out, a.out_type, r.row * a.out_stride + r.head * a.head_dim + c, rows[own][c]);
}

/* ---- the table of kernels ---- */

extern const decode_kernel ki_decode_table_64[], ki_decode_table_80[], ki_decode_table_96[];
extern const decode_kernel ki_decode_table_128[], ki_decode_table_256[];

static const decode_kernel *table_of(uint32_t head_dim) {
    switch (head_dim) {
    case 64: return ki_decode_table_64;
    case 80: return ki_decode_table_80;
    case 96: return ki_decode_table_96;
    case 128: return ki_decode_table_128;
    case 256: return ki_decode_table_256;
    default: return NULL;
    }
}

static auto merge_kernel(bool is_wide, bool is_large) -> void (*)(merge_args) {
    if (is_large) return is_wide ? ki_merge_kernel<MERGE_WIDTH, 2> : ki_merge_kernel<1, 2>;
    return is_wide ? ki_merge_kernel<MERGE_WIDTH, 1> : ki_merge_kernel<1, 1>;
}

kivi_status ki_cuda_decode_prepare(kivi_error *err) {
    static const uint32_t dims[] = {64, 80, 96, 128, 256};
    for (int large = 0; large < 2; large++)
        for (int wide = 0; wide < 2; wide++)
            KI_TRY(ki_cuda_check(ki_share_multiprocessors(merge_kernel(wide, large)),
                                 "shared memory of the merge", err));
    for (uint32_t d : dims)
        for (const decode_kernel *k = table_of(d); k->head_dim; k++)
            KI_TRY(ki_cuda_check(k->prepare(), "shared memory of a decode kernel", err));
    return KIVI_OK;
}

/* ---- host calls ---- */

kivi_status ki_cuda_decode_plan(const ki_cuda_attend_call *c, void *stream, kivi_error *err) {
    return ki_cuda_check(
        ki_launch(ki_plan_kernel, 1, PLAN_THREADS, 0, false, stream, plan_args_of(c)), "plan", err);
}

/* Up to so many thread blocks at short contexts wait for trips to memory, not for bytes. The
 * emulator's small batches have both. */
#ifndef KI_EMULATED
enum { FEW_BLOCKS = 128 };
#else
enum { FEW_BLOCKS = 2 };
#endif

/* Up to this many splits, two batches, one warp a row. */
enum { NARROW_SPLITS = 8 };

static kivi_status launch_merge(const ki_cuda_attend_call *c, const workspace &w, void *stream,
                                kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    uint32_t n_rows = c->cache->n_seqs * l->n_heads;
    bool is_wide = w.max_splits > NARROW_SPLITS;
    merge_args a = {w.slots,
                    w.items,
                    (const float2 *)w.states,
                    (const float4 *)w.acc,
                    c->out,
                    n_rows,
                    l->n_heads,
                    l->head_dim,
                    c->out_stride,
                    c->out_type,
                    l->is_plus != 0};
    uint32_t rows = MERGE_WARPS / (is_wide ? MERGE_WIDTH : 1);
    uint32_t n_blocks = (n_rows + rows - 1) / rows;
    cudaError_t e = ki_launch(merge_kernel(is_wide, l->head_dim > 128), n_blocks, MERGE_THREADS, 0,
                              c->pdl, stream, a);
    return ki_cuda_check(e, "merge", err);
}

kivi_status ki_cuda_decode_attend(const ki_cuda_attend_call *c, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    const decode_kernel *table = table_of(l->head_dim);
    ki_decode_choice choice;
    bool is_many = !c->is_fixed && ki_decode_is_many(l, c->cache->n_seqs, c->cache->n_sms);
    if (!table || !ki_decode_choose(&choice, l, c->cache->shared_bytes, is_many))
        return KI_FAIL(err, UNSUPPORTED, "cuda: no decode kernel for head size %u, %u/%u bits",
                       l->head_dim, l->k_bits, l->v_bits);
    return ki_cuda_decode_attend_by(c, table + choice.index, choice.warps, stream, err);
}

kivi_status ki_cuda_decode_attend_by(const ki_cuda_attend_call *c, const decode_kernel *kernel,
                                     uint32_t warps, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    workspace w = workspace_of(c);
    decode_args a = {};
    a.l = *l;
    a.pool = c->cache->pool;
    a.tables = c->cache->tables;
    a.table_stride = c->cache->table_stride;
    a.q = c->q;
    a.out = c->out;
    a.out_stride = c->out_stride;
    a.out_type = c->out_type;
    a.n_items = w.n_items;
    a.items = w.items;
    a.states = w.states;
    a.state_acc = w.acc;
    a.layer = c->layer;
    a.chunks = (l->head_group + 7) / 8;
    a.heads = ki_decode_blocks(l);
    a.unit_bytes = l->head_bytes ? l->page_bytes : l->unit_subs * l->sub_bytes;
    a.factor = c->scale * 1.44269504088896340736f;
    a.n_sms = c->cache->n_sms;
    a.few = c->cache->n_seqs * a.heads <= FEW_BLOCKS;
    if (c->append) {
        const ki_cuda_append_call *own = c->append;
        if (l->k_bits == 16 || l->v_bits == 16 || own->type != KI_CUDA_F32 || !own->q)
            return KI_FAIL(err, INTERNAL, "cuda: attention takes float32 rows of packed sides");
        const float *rows[3] = {(const float *)own->q, (const float *)own->k,
                                (const float *)own->v};
        a.own = {rows[0],       rows[1],       rows[2],        own->rope,         own->q_stride,
                 own->k_stride, own->v_stride, own->row_flags, c->cache->counters};
    }
    uint32_t n_blocks = c->cache->n_seqs * w.max_splits * a.heads;
    KI_TRY(ki_cuda_check(kernel->launch(&a, n_blocks, warps, c->pdl, (cudaStream_t)stream),
                         "decode attention", err));
    return w.max_splits == 1 ? KIVI_OK : launch_merge(c, w, stream, err);
}
