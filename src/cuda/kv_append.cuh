/* kv_append.cuh: what the kernels that append share, of decoding (kv_append*.cu) and of prompts
 * (kv_prompt_append.cu): their arguments and a page. All are compiled without FMA contraction. */
#ifndef KI_KV_APPEND_CUH
#define KI_KV_APPEND_CUH
#include "kv_append.h"
#include "kv_launch.h"
#include "kv_quant.cuh"
#include "kv_row.cuh"

struct append_args {
    ki_cuda_layout l;
    uint8_t *pool;
    const uint32_t *tables;
    const ki_cuda_seq *seqs;
    ki_cuda_counters *counters;
    const void *q, *k, *v;
    const float *rope;
    uint16_t *q_out, *k_rows, *v_rows;
    uint32_t *row_flags;
    uint32_t table_stride, layer, q_stride, k_stride, v_stride, n_parts;
    ki_cuda_type type;
};

enum { APPEND_THREADS = KI_APPEND_THREADS, CLOSE_THREADS = KI_CLOSE_THREADS, MAX_DIM = 256 };

KI_DEV uint8_t *page_of(const append_args &a, const ki_cuda_seq &s, uint32_t index, uint32_t head) {
    uint64_t id = a.tables[(uint64_t)s.table * a.table_stride + index];
    return a.pool + id * a.l.id_bytes +
           ((uint64_t)a.layer * a.l.n_kv_heads + head) * a.l.page_bytes;
}

static inline append_args args_of(const ki_cuda_append_call *c) {
    append_args a = {};
    a.l = c->cache->layout;
    a.pool = c->cache->pool;
    a.tables = c->cache->tables;
    a.table_stride = c->cache->table_stride;
    a.seqs = c->cache->seqs;
    a.counters = c->cache->counters;
    a.layer = c->layer;
    a.q = c->q, a.k = c->k, a.v = c->v;
    a.q_stride = c->q_stride, a.k_stride = c->k_stride, a.v_stride = c->v_stride;
    a.type = c->type;
    a.rope = c->rope;
    a.q_out = c->q_out;
    a.k_rows = c->k_rows, a.v_rows = c->v_rows;
    a.row_flags = c->row_flags;
    a.n_parts = 1;
    return a;
}

#endif
