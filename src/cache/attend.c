/* attend.c: spreads attention over sequences, KV heads and ranges of pages.
 *
 * A sequence's pages are cut into splits of SPLIT_PAGES. A query's states over its splits are
 * merged in order of position, so the cut depends on the positions alone: the same bytes for any
 * number of threads. A single row (decode) makes one task of each split and merges them in a second
 * round; a block of rows (prompt) is one task that goes through its splits and merges as it goes:
 * the same merges in the same order. */
#include "cache.h"

#include <math.h>

/* 1,024 tokens: enough work to be worth handing out, and eight tasks a KV head at 8k. */
enum { SPLIT_PAGES = 8, TARGET_QUERIES = 64 };

typedef struct worker_area {
    void *tile_scratch;
    ki_attn_query *queries; /* [max_queries] */
    float *q, *acc, *total; /* [max_queries][D] each */
    float *total_m, *total_l;
    void *append_scratch;
} worker_area;

struct ki_attn_work {
    worker_area *areas;
    unsigned n_workers;
    uint32_t max_queries, max_sequences, max_splits;
    size_t *task_ends;                    /* [max_sequences]: running sum of tasks */
    float *split_m, *split_l, *split_acc; /* [sequence][Hk][split][group], acc with [D] */
};

static uint32_t splits_for(uint32_t n_tokens) {
    uint32_t split_tokens = SPLIT_PAGES * KI_PAGE_TOKENS;
    return (n_tokens + split_tokens - 1) / split_tokens;
}

/* Rows of a prompt that share an unpacked tile: about 64 queries with the heads of the group. */
static uint32_t rows_per_block(const ki_layout *l) {
    return KI_MAX((uint32_t)TARGET_QUERIES / l->head_group, 1u);
}

static kivi_status area_init(worker_area *a, ki_mem *mem, const ki_layout *l, uint32_t max_queries,
                             kivi_error *err) {
    size_t floats = (size_t)max_queries * l->head_dim * sizeof(float);
    void *p;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_workspace, ki_attn_scratch_bytes(), err));
    a->tile_scratch = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, max_queries, sizeof(ki_attn_query), err));
    a->queries = p;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_workspace, floats, err));
    a->q = p;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_workspace, floats, err));
    a->acc = p;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_workspace, floats, err));
    a->total = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, max_queries, 2 * sizeof(float), err));
    a->total_m = p;
    a->total_l = a->total_m + max_queries;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_workspace, ki_append_scratch_bytes(l), err));
    a->append_scratch = p;
    return KIVI_OK;
}

static kivi_status work_init(ki_attn_work *w, ki_mem *mem, const ki_cache_options *o,
                             const ki_layout *l, unsigned n_threads, kivi_error *err) {
    void *p;
    w->n_workers = n_threads;
    w->max_sequences = o->max_sequences;
    w->max_splits = splits_for(o->max_tokens);
    w->max_queries = rows_per_block(l) * l->head_group;
    size_t n_states = (size_t)w->max_sequences * l->n_kv_heads * w->max_splits * l->head_group;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n_threads, sizeof(worker_area), err));
    w->areas = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, w->max_sequences, sizeof(size_t), err));
    w->task_ends = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n_states, sizeof(float), err));
    w->split_m = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n_states, sizeof(float), err));
    w->split_l = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n_states, l->head_dim * sizeof(float), err));
    w->split_acc = p;
    for (unsigned i = 0; i < n_threads; i++)
        KI_TRY(area_init(&w->areas[i], mem, l, w->max_queries, err));
    return KIVI_OK;
}

kivi_status ki_attn_work_create(ki_attn_work **out, ki_mem *mem, const ki_cache_options *options,
                                const ki_layout *layout, unsigned n_threads, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_workspace, sizeof(ki_attn_work), err));
    ki_attn_work *w = p;
    kivi_status status = work_init(w, mem, options, layout, n_threads, err);
    if (status != KIVI_OK) ki_attn_work_destroy(&w, mem);
    *out = w;
    return status;
}

void ki_attn_work_destroy(ki_attn_work **work, ki_mem *mem) {
    ki_attn_work *w = *work;
    if (!w) return;
    for (unsigned i = 0; w->areas && i < w->n_workers; i++) {
        worker_area *a = &w->areas[i];
        void *parts[] = {a->tile_scratch, a->queries,       a->q, a->acc, a->total,
                         a->total_m,      a->append_scratch};
        for (size_t j = 0; j < sizeof parts / sizeof *parts; j++) ki_free(mem, parts[j]);
    }
    ki_free(mem, w->areas);
    ki_free(mem, w->task_ends);
    ki_free(mem, w->split_m);
    ki_free(mem, w->split_l);
    ki_free(mem, w->split_acc);
    ki_free(mem, w);
    *work = NULL;
}

void *ki_attn_work_scratch(const ki_attn_work *work, unsigned worker) {
    return work->areas[worker].append_scratch;
}

/* ---- one task: some rows of one sequence, one KV head, some splits ---- */

typedef struct attend_call {
    kivi_cache *cache;
    const ki_attend_item *items;
    size_t n_items;
    uint32_t layer, window;
} attend_call;

typedef struct row_block {
    const ki_attend_item *item;
    uint32_t head, first_row, n_rows;
} row_block;

static void fill_tile(ki_attn_tile *t, const attend_call *call, const kivi_seq *seq, uint32_t head,
                      uint32_t page) {
    const ki_layout *l = &call->cache->layout;
    const uint8_t *data = ki_seq_page(seq, page, call->layer, head);
    *t = (ki_attn_tile){.head_dim = l->head_dim,
                        .k_group = l->k_group,
                        .v_group = l->v_group,
                        .k_bits = l->kv.k_bits,
                        .v_bits = l->kv.v_bits};
    t->k_words = (const uint32_t *)(data + l->k_codes_at);
    t->v_words = (const uint32_t *)(data + l->v_codes_at);
    t->k_scale = (const uint16_t *)(data + l->k_scale_at);
    t->k_zero = (const uint16_t *)(data + l->k_zero_at);
    t->v_scale = (const uint16_t *)(data + l->v_scale_at);
    if (ki_has_v_zero(l)) t->v_zero = (const uint16_t *)(data + l->v_zero_at);
    if (ki_has_third(l)) t->v_third = (const uint32_t *)(data + l->v_third_at);
    if (ki_has_wide(l)) {
        t->k_wide = (const uint32_t *)(data + l->k_wide_at);
        t->k_list = data + l->k_list_at;
    }
}

/* Most tiles of a long sequence are codes alone, and need none of these. */
static void fill_blocks(ki_attn_tile *t, const attend_call *call, const kivi_seq *seq,
                        uint32_t head, uint32_t page) {
    for (uint32_t b = 0; b < KI_TILE_BLOCKS; b++) {
        t->k_blocks[b] = ki_seq_k_block(seq, call->layer, head, page * KI_TILE_BLOCKS + b);
        t->v_blocks[b] = ki_seq_v_block(seq, call->layer, head, page * KI_TILE_BLOCKS + b);
    }
}

/* A position relative to a tile, cut to 0..128. */
static uint16_t in_tile(uint32_t pos, uint32_t tile_pos) {
    return (uint16_t)(pos <= tile_pos ? 0 : KI_MIN(pos - tile_pos, (uint32_t)KI_PAGE_TOKENS));
}

/* Which tokens of a tile a row sees, and which of these in 16 bit: the same for all its heads. */
static void set_ranges(ki_attn_query *q, const attend_call *call, const kivi_seq *seq, uint32_t pos,
                       uint32_t tile_pos) {
    uint32_t from = call->window && pos + 1 > call->window ? pos + 1 - call->window : 0;
    q->first = in_tile(from, tile_pos);
    q->end = in_tile(pos + 1, tile_pos);
    q->sink_end = in_tile(call->cache->layout.kv.sink_tokens, tile_pos);
    q->k_exact = in_tile(ki_k_exact(seq, pos), tile_pos);
    q->v_exact = in_tile(ki_v_exact(seq, pos), tile_pos);
}

static void copy_ranges(ki_attn_query *to, const ki_attn_query *from) {
    to->first = from->first, to->end = from->end, to->sink_end = from->sink_end;
    to->k_exact = from->k_exact, to->v_exact = from->v_exact;
}

/* A block that a sink ends in counts, even if the window begins behind the sink. */
static bool reads_exact(const ki_attn_query *q) {
    return q->first < q->end && (q->sink_end || KI_MIN(q->k_exact, q->v_exact) < q->end);
}

static void load_queries(worker_area *a, const attend_call *call, const row_block *block) {
    const ki_layout *l = &call->cache->layout;
    float factor = 1.0f / sqrtf((float)l->head_dim);
    for (uint32_t r = 0; r < block->n_rows; r++)
        for (uint32_t h = 0; h < l->head_group; h++) {
            size_t i = (size_t)r * l->head_group + h;
            const float *q = block->item->q + (block->first_row + r) * block->item->q_stride +
                             (size_t)(block->head * l->head_group + h) * l->head_dim;
            call->cache->kernels->dense.scale(a->q + i * l->head_dim, q, factor, l->head_dim);
            a->queries[i].q = a->q + i * l->head_dim;
        }
}

/* What this worker reads next, if it is in the same split. */
static void announce_page(ki_attn_tile *t, const attend_call *call, const kivi_seq *seq,
                          uint32_t head, uint32_t page) {
    bool here = page % SPLIT_PAGES && page < seq->n_pages;
    if (!here || seq->pages[page] == (uint32_t)KI_NO_PAGE) return;
    t->next = ki_seq_page(seq, page, call->layer, head);
    t->next_bytes = call->cache->layout.page_bytes;
}

/* The states of all queries of a block over one split. */
static void run_split(worker_area *a, const attend_call *call, const row_block *block,
                      uint32_t split) {
    const ki_layout *l = &call->cache->layout;
    const kivi_seq *seq = block->item->seq;
    uint32_t n_queries = block->n_rows * l->head_group, pos0 = seq->n_tokens + block->first_row;
    uint32_t end = pos0 + block->n_rows, first_page = split * SPLIT_PAGES;
    memset(a->acc, 0, (size_t)n_queries * l->head_dim * sizeof(float));
    for (uint32_t i = 0; i < n_queries; i++) {
        a->queries[i].m = -INFINITY;
        a->queries[i].l = 0;
        a->queries[i].acc = a->acc + (size_t)i * l->head_dim;
    }
    for (uint32_t p = first_page; p < first_page + SPLIT_PAGES && p * KI_PAGE_TOKENS < end; p++) {
        bool visible = false, exact = false;
        for (uint32_t r = 0; r < block->n_rows; r++) {
            ki_attn_query *q = a->queries + (size_t)r * l->head_group;
            set_ranges(q, call, seq, pos0 + r, p * KI_PAGE_TOKENS);
            visible = visible || q->first < q->end;
            exact = exact || reads_exact(q);
            for (uint32_t h = 1; h < l->head_group; h++) copy_ranges(q + h, q);
        }
        if (!visible) continue;
        ki_attn_tile tile;
        fill_tile(&tile, call, seq, block->head, p);
        if (exact) fill_blocks(&tile, call, seq, block->head, p);
        announce_page(&tile, call, seq, block->head, p + 1);
        call->cache->kernels->attn.tile(&tile, a->queries, n_queries, a->tile_scratch);
    }
}

static float *out_of(const ki_layout *l, const row_block *block, uint32_t i) {
    size_t head = (size_t)block->head * l->head_group + i % l->head_group;
    return block->item->out + (block->first_row + i / l->head_group) * block->item->out_stride +
           head * l->head_dim;
}

/* The output of query i of a block; values that were turned are turned back here, once. */
static void finish_head(const attend_call *call, const row_block *block, uint32_t i, float sum,
                        const float *acc) {
    const ki_layout *l = &call->cache->layout;
    const ki_kernels *kernels = call->cache->kernels;
    float *out = out_of(l, block, i);
    kernels->attn.finish(out, sum, acc, l->head_dim);
    if (ki_is_turned(l)) kernels->plus.turn(out, l->head_dim);
}

static void run_row_block(worker_area *a, const attend_call *call, const row_block *block) {
    const ki_layout *l = &call->cache->layout;
    const ki_attn_kernels *attn = &call->cache->kernels->attn;
    uint32_t n_queries = block->n_rows * l->head_group;
    uint32_t end = block->item->seq->n_tokens + block->first_row + block->n_rows;
    load_queries(a, call, block);
    memset(a->total, 0, (size_t)n_queries * l->head_dim * sizeof(float));
    for (uint32_t i = 0; i < n_queries; i++) a->total_m[i] = -INFINITY, a->total_l[i] = 0;
    for (uint32_t s = 0; s < splits_for(end); s++) {
        run_split(a, call, block, s);
        for (uint32_t i = 0; i < n_queries; i++)
            attn->merge(&a->total_m[i], &a->total_l[i], a->total + (size_t)i * l->head_dim,
                        a->queries[i].m, a->queries[i].l, a->queries[i].acc, l->head_dim);
    }
    for (uint32_t i = 0; i < n_queries; i++)
        finish_head(call, block, i, a->total_l[i], a->total + (size_t)i * l->head_dim);
}

/* ---- decode: a task a split, kept, then merged ---- */

static size_t state_index(const ki_attn_work *w, const ki_layout *l, size_t item, uint32_t head,
                          uint32_t split) {
    return ((item * l->n_kv_heads + head) * w->max_splits + split) * l->head_group;
}

static void run_decode_split(worker_area *a, const attend_call *call, size_t item,
                             const row_block *block, uint32_t split) {
    const ki_layout *l = &call->cache->layout;
    ki_attn_work *w = call->cache->work;
    load_queries(a, call, block);
    run_split(a, call, block, split);
    size_t at = state_index(w, l, item, block->head, split);
    for (uint32_t h = 0; h < l->head_group; h++) {
        w->split_m[at + h] = a->queries[h].m;
        w->split_l[at + h] = a->queries[h].l;
    }
    memcpy(w->split_acc + at * l->head_dim, a->acc,
           (size_t)l->head_group * l->head_dim * sizeof(float));
}

static void merge_decode_head(worker_area *a, const attend_call *call, size_t item,
                              const row_block *block) {
    const ki_layout *l = &call->cache->layout;
    const ki_attn_kernels *attn = &call->cache->kernels->attn;
    ki_attn_work *w = call->cache->work;
    uint32_t n_splits = splits_for(block->item->seq->n_tokens + 1);
    for (uint32_t h = 0; h < l->head_group; h++) {
        float m = -INFINITY, sum = 0;
        memset(a->total, 0, l->head_dim * sizeof(float));
        for (uint32_t s = 0; s < n_splits; s++) {
            size_t at = state_index(w, l, item, block->head, s) + h;
            attn->merge(&m, &sum, a->total, w->split_m[at], w->split_l[at],
                        w->split_acc + at * l->head_dim, l->head_dim);
        }
        finish_head(call, block, h, sum, a->total);
    }
}

/* ---- handing out ---- */

static size_t tasks_of(const ki_layout *l, const ki_attend_item *item) {
    if (!item->seq) return 0;
    if (item->n_rows == 1) return (size_t)l->n_kv_heads * splits_for(item->seq->n_tokens + 1);
    uint32_t rows = rows_per_block(l);
    return (size_t)l->n_kv_heads * ((item->n_rows + rows - 1) / rows);
}

static void attend_task(void *context, size_t index, unsigned worker) {
    const attend_call *call = context;
    const ki_layout *l = &call->cache->layout;
    ki_attn_work *w = call->cache->work;
    size_t item = 0;
    while (index >= w->task_ends[item]) item++;
    if (item) index -= w->task_ends[item - 1];
    row_block block = {
        .item = &call->items[item], .head = (uint32_t)(index % l->n_kv_heads), .n_rows = 1};
    uint32_t part = (uint32_t)(index / l->n_kv_heads), rows = rows_per_block(l);
    if (block.item->n_rows == 1) {
        run_decode_split(&w->areas[worker], call, item, &block, part);
        return;
    }
    /* the last rows see the most: hand them out first */
    uint32_t n_blocks = (block.item->n_rows + rows - 1) / rows;
    block.first_row = (n_blocks - 1 - part) * rows;
    block.n_rows = KI_MIN(rows, block.item->n_rows - block.first_row);
    run_row_block(&w->areas[worker], call, &block);
}

static void merge_task(void *context, size_t index, unsigned worker) {
    const attend_call *call = context;
    const ki_layout *l = &call->cache->layout;
    size_t item = index / l->n_kv_heads;
    row_block block = {
        .item = &call->items[item], .head = (uint32_t)(index % l->n_kv_heads), .n_rows = 1};
    if (block.item->seq && block.item->n_rows == 1)
        merge_decode_head(&call->cache->work->areas[worker], call, item, &block);
}

void ki_attend_batch(kivi_cache *cache, const ki_attend_item *items, size_t n_items, uint32_t layer,
                     uint32_t window) {
    attend_call call = {
        .cache = cache, .items = items, .n_items = n_items, .layer = layer, .window = window};
    size_t n_tasks = 0, n_decode = 0;
    for (size_t i = 0; i < n_items; i++) {
        n_tasks += tasks_of(&cache->layout, &items[i]);
        n_decode += items[i].seq && items[i].n_rows == 1;
        cache->work->task_ends[i] = n_tasks;
    }
    ki_workers_run(cache->workers, attend_task, &call, n_tasks);
    if (n_decode == 1) /* too little to wake anybody for */
        for (size_t i = 0; i < n_items * cache->layout.n_kv_heads; i++) merge_task(&call, i, 0);
    else if (n_decode)
        ki_workers_run(cache->workers, merge_task, &call, n_items * cache->layout.n_kv_heads);
}
