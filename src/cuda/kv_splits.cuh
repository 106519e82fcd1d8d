/* kv_splits.cuh: the work items of a step of decoding, as a thread block writes them, and where
 * they and the states of splits stand in the workspace. */
#ifndef KI_KV_SPLITS_CUH
#define KI_KV_SPLITS_CUH
#include "kv_cuda.h"
#include "kv_plan.h"
#include "ptx.cuh"

/* ---- the workspace ---- */

typedef struct workspace {
    uint32_t *n_items, max_splits;
    ki_plan_slot *slots;
    ki_plan_item *items;
    float *states, *acc;
} workspace;

static inline workspace workspace_of(const ki_cuda_attend_call *c) {
    uint32_t n_seqs = c->cache->n_seqs;
    uint8_t *base = (uint8_t *)c->workspace;
    workspace w;
    w.max_splits = ki_plan_max_splits(c->max_tokens, c->split_tokens);
    w.n_items = (uint32_t *)base;
    w.slots = (ki_plan_slot *)(base + 256);
    w.items = (ki_plan_item *)(base + ki_plan_items_at(n_seqs));
    w.states = (float *)(base + ki_plan_states_at(n_seqs, w.max_splits));
    /* 4 floats are loaded at once: the pairs before come in a multiple of 256 bytes */
    uint64_t pairs = (uint64_t)n_seqs * w.max_splits * c->cache->layout.n_heads * 2;
    w.acc = w.states + (pairs + 63) / 64 * 64;
    return w;
}

/* ---- the plan: one thread block writes the list of work items ---- */

struct plan_args {
    ki_cuda_layout l;
    const ki_cuda_seq *seqs;
    const uint32_t *tables;
    uint32_t table_stride, n_seqs, window, split_tokens, max_splits;
    uint32_t *n_items;
    ki_plan_slot *slots;
    ki_plan_item *items;
};

static inline plan_args plan_args_of(const ki_cuda_attend_call *c) {
    workspace w = workspace_of(c);
    return {c->cache->layout, c->cache->seqs, c->cache->tables, c->cache->table_stride,
            c->cache->n_seqs, c->window,      c->split_tokens,  w.max_splits,
            w.n_items,        w.slots,        w.items};
}

KI_DEV void write_items(const plan_args &a, const ki_cuda_seq &s, const ki_plan_ranges &r,
                        uint32_t first, uint32_t n) {
    for (uint32_t k = 0; k < n; k++) a.items[first + k] = ki_plan_item_of(&a.l, &s, &r, k, n);
}

/* Page ids of items that the thread block has just written, a thread each. */
KI_DEV void write_pages(const plan_args &a, uint32_t first, uint32_t n, uint32_t n_threads) {
    for (uint32_t k = threadIdx.x; k < n * KI_PLAN_PAGES; k += n_threads) {
        ki_plan_item *item = a.items + first + k / KI_PLAN_PAGES;
        uint32_t j = k % KI_PLAN_PAGES, page = ki_plan_page(item, &a.l, j);
        if (page != KI_PLAN_NONE)
            item->pages[j] = a.tables[(uint64_t)item->table * a.table_stride + page];
    }
}

enum { PLAN_THREADS = 256 };

/* Exclusive sum over the thread block; *all gets the whole. */
KI_DEV uint32_t block_scan(uint32_t x, uint32_t *sums, uint32_t *all) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, run = x;
    for (int d = 1; d < 32; d *= 2) {
        uint32_t y = __shfl_up_sync(~0u, run, d);
        if (lane >= (uint32_t)d) run += y;
    }
    if (lane == 31) sums[warp] = run;
    __syncthreads();
    uint32_t before = 0, sum = 0;
    for (uint32_t w = 0; w < PLAN_THREADS / 32; w++) {
        if (w < warp) before += sums[w];
        sum += sums[w];
    }
    __syncthreads();
    *all = sum;
    return before + run - x;
}

/* By a thread block of PLAN_THREADS. sums: [PLAN_THREADS / 32], shared. */
KI_DEV void make_plan(const plan_args &a, uint32_t *sums) {
    uint32_t done = 0;
    for (uint32_t base = 0; base < a.n_seqs; base += PLAN_THREADS) {
        uint32_t slot = base + threadIdx.x, n = 0, all;
        ki_cuda_seq s = {};
        ki_plan_ranges r = {};
        if (slot < a.n_seqs) s = a.seqs[slot];
        if (s.n_rows == 1) {
            r = ki_plan_of(&a.l, &s, a.window);
            n = ki_plan_splits(&r, a.split_tokens, a.max_splits);
        }
        uint32_t first = done + block_scan(n, sums, &all);
        if (slot < a.n_seqs) {
            a.slots[slot].first_item = first;
            a.slots[slot].n_splits = n;
        }
        write_items(a, s, r, first, n);
        __syncthreads();
        write_pages(a, done, all, PLAN_THREADS);
        done += all;
    }
    if (threadIdx.x == 0) *a.n_items = done;
}

#endif
