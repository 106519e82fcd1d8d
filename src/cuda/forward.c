/* forward.c: from a batch of sequences to launches and back: what is uploaded, which graph is
 * replayed, and what the results say about each sequence.
 *
 * A step is one pass over all its rows. In the batch-invariant mode, where a row's bits are those
 * it would have alone, it is one pass over the sequences with one row, whose products and splits
 * are the same for any number of them (pass.c), and one for each other sequence by itself. */
#include "cuda_private.h"
#include "kv_plan.h"

#include <math.h>
#include <stdatomic.h>

/* ---- the upload ---- */

typedef struct batch_state { /* a pass */
    ki_cuda_backend *b;
    ki_batch_item **items;
    size_t n_items;
    uint32_t n_rows, n_logits, n_slots, max_rows, n_whole, own_rows, first_logit;
    uint32_t n_single, n_draws, n_edits;
    bool decode; /* one row of each sequence */
} batch_state;

static void *up(const ki_cuda_backend *b, size_t offset) { return b->up + offset; }

/* The length that dynamic NTK goes by: the end of the prompt, or of this token (rope.c). */
static uint32_t length_at(const kivi_seq *seq, uint32_t pos) {
    return seq->run_left ? seq->n_tokens + seq->run_left : pos + 1;
}

static void put_frequencies(const ki_cuda_backend *b, uint32_t row, const kivi_seq *seq,
                            uint32_t pos) {
    const ki_config *c = &b->model->config;
    const ki_rope *rope = &c->rope[0];
    uint32_t half = c->head_dim / 2, length = length_at(seq, pos);
    float *to = (float *)up(b, b->upload_at.frequencies) + (size_t)row * half;
    if (rope->scaling != KI_ROPE_DYNAMIC) return;
    if (length > rope->original_ctx) b->frequencies(to, rope, c->head_dim, length);
    else memcpy(to, b->model->rope_freq, half * sizeof *to);
}

/* What is to be drawn from a row of logits; false: there is no room for its edits. */
static bool put_draw(batch_state *s, const ki_draw *d, uint32_t logit_row) {
    const ki_cuda_backend *b = s->b;
    if (d->n_edits > KI_DRAW_EDITS - s->n_edits) return false;
    ki_draw_edit *edits = (ki_draw_edit *)up(b, b->upload_at.edits) + s->n_edits;
    if (d->n_edits) memcpy(edits, d->edits, d->n_edits * sizeof *edits);
    ((ki_cuda_draw *)up(b, b->upload_at.draws))[s->n_draws++] =
        (ki_cuda_draw){.u = d->u,
                       .temperature = d->temperature,
                       .top_p = d->top_p,
                       .min_x = d->min_x,
                       .repetition = d->repetition,
                       .frequency = d->frequency,
                       .presence = d->presence,
                       .row = logit_row,
                       .top_k = d->top_k,
                       .first_edit = s->n_edits,
                       .n_edits = d->n_edits};
    s->n_edits += d->n_edits;
    return true;
}

/* Who attends: cuDNN takes prompts that are whole and long enough. */
static void put_attention(batch_state *s, ki_cuda_seq *slot) {
    const ki_cuda_backend *b = s->b;
    const ki_cuda_layout *l = &b->layout;
    uint8_t *records = up(b, b->upload_at.records);
    if (!b->sdpa || slot->n_rows < KI_SDPA_MIN_ROWS || slot->n_rows > KI_SDPA_MAX_ROWS ||
        !ki_plan_is_whole(l, slot)) {
        s->own_rows = KI_MAX(s->own_rows, slot->n_rows);
        return;
    }
    slot->flags |= KI_CUDA_ELSEWHERE;
    ki_sdpa_record((int32_t *)(void *)(records + s->n_whole * KI_SDPA_RECORD_BYTES), slot->n_rows,
                   l->n_heads, l->n_kv_heads, l->head_dim);
    s->n_whole++;
}

static void put_item(batch_state *s, ki_batch_item *item) {
    const ki_cuda_backend *b = s->b;
    const kivi_seq *seq = item->seq;
    const ki_store *store = ki_seq_store(seq);
    size_t stride = b->kv.table_stride;
    ki_cuda_seq *slot = (ki_cuda_seq *)up(b, b->upload_at.seqs) + s->n_slots;
    *slot = (ki_cuda_seq){.ring = (uint64_t)(uintptr_t)store->there,
                          .sinks = (uint64_t)(uintptr_t)seq->sinks.there,
                          .k_blocks = store->k_blocks,
                          .v_blocks = store->v_blocks,
                          .table = s->n_slots,
                          .n_tokens = seq->n_tokens,
                          .n_rows = item->n_rows,
                          .first_row = s->n_rows,
                          .run_start = seq->run_start,
                          .flags = seq->run_left ? KI_CUDA_PROMPT : 0};
    put_attention(s, slot);
    memcpy((uint32_t *)up(b, b->upload_at.tables) + s->n_slots * stride, seq->pages,
           KI_MIN((size_t)seq->n_pages, stride) * sizeof(uint32_t));
    for (uint32_t r = 0; r < item->n_rows; r++) {
        uint32_t row = s->n_rows + r, pos = seq->n_tokens + r;
        ((int32_t *)up(b, b->upload_at.tokens))[row] = item->tokens[r];
        ((uint32_t *)up(b, b->upload_at.positions))[row] = pos;
        put_frequencies(b, row, seq, pos);
    }
    item->logit_row = s->first_logit + s->n_logits;
    for (uint32_t r = item->all_logits ? 0 : item->n_rows - 1; r < item->n_rows; r++)
        ((uint32_t *)up(b, b->upload_at.logit_rows))[s->n_logits++] = s->n_rows + r;
    item->drawn = -1;
    if (item->draw && put_draw(s, item->draw, s->first_logit + s->n_logits - 1))
        item->drawn = (int32_t)s->n_draws - 1; /* where the result will be */
    s->n_rows += item->n_rows;
    s->n_slots++;
    s->max_rows = KI_MAX(s->max_rows, item->n_rows);
}

/* Slots and rows up to a bucket's size: idle ones, of token 0 at position 0. */
static void fill_bucket(batch_state *s, uint32_t bucket) {
    const ki_cuda_backend *b = s->b;
    for (; s->n_slots < bucket; s->n_slots++, s->n_rows++, s->n_logits++) {
        ((ki_cuda_seq *)up(b, b->upload_at.seqs))[s->n_slots] = (ki_cuda_seq){0};
        ((int32_t *)up(b, b->upload_at.tokens))[s->n_rows] = 0;
        ((uint32_t *)up(b, b->upload_at.positions))[s->n_rows] = 0;
        ((uint32_t *)up(b, b->upload_at.logit_rows))[s->n_logits] = s->n_rows;
        if (b->model->config.rope[0].scaling == KI_ROPE_DYNAMIC)
            memset((float *)up(b, b->upload_at.frequencies) +
                       (size_t)s->n_rows * (b->model->config.head_dim / 2),
                   0, b->model->config.head_dim / 2 * sizeof(float));
    }
}

/* Of a pass with prompts: rows of sequences that have one are attended to as in decoding, by work
 * items that fill the device, when they are in the window; old rows of the others get places. */
static void part_prompts(batch_state *s) {
    const ki_cuda_backend *b = s->b;
    ki_cuda_seq *seqs = (ki_cuda_seq *)up(b, b->upload_at.seqs);
    if (!b->kernels->prompt_attend) return;
    for (uint32_t i = 0; i < s->n_slots; i++)
        if (seqs[i].n_rows == 1) seqs[i].flags |= KI_CUDA_ELSEWHERE, s->n_single++;
    if (s->own_rows == 1) s->own_rows = 0;
    ki_prompt_step step = ki_cuda_prompt_step(b, s->n_slots);
    ki_prompt_place(seqs, &step);
}

static void put_batch(batch_state *s) {
    s->decode = true;
    for (size_t i = 0; i < s->n_items; i++) {
        s->decode = s->decode && s->items[i]->n_rows == 1;
        put_item(s, s->items[i]);
    }
    if (!s->decode) {
        part_prompts(s);
        return;
    }
    *(uint32_t *)up(s->b, s->b->upload_at.number) = ++s->b->n_decoded;
    fill_bucket(s, ki_cuda_bucket(s->n_slots));
}

/* ---- the results ---- */

static bool any(const uint32_t *flags, uint32_t n, uint32_t value) {
    for (uint32_t i = 0; i < n; i++)
        if (flags[i] == value) return true;
    return false;
}

static void read_item(batch_state *s, ki_batch_item *item, uint32_t first_row) {
    const ki_cuda_backend *b = s->b;
    const uint8_t *down = b->down;
    const uint32_t *row_flags = (const uint32_t *)(const void *)(down + b->result_at.row_flags);
    const uint32_t *finite = (const uint32_t *)(const void *)(down + b->result_at.finite);
    const int32_t *best = (const int32_t *)(const void *)(down + b->result_at.best);
    const int32_t *drawn = (const int32_t *)(const void *)(down + b->result_at.drawn);
    uint32_t n_logits = item->all_logits ? item->n_rows : 1;
    uint32_t first_logit = item->logit_row - s->first_logit;
    uint32_t first = item->seq->n_tokens, last = first + item->n_rows - 1;
    item->best = best[first_logit + n_logits - 1];
    if (item->drawn >= 0) item->drawn = drawn[item->drawn];
    if (any(row_flags + first_row, item->n_rows, 1))
        item->status = KI_FAIL(item->err, NUMERIC,
                               "model: a key or value within positions %u to %u is infinite or not "
                               "a number",
                               first, last);
    else if (any(finite + first_logit, n_logits, 0))
        item->status = KI_FAIL(
            item->err, NUMERIC,
            "model: the result within positions %u to %u is infinite or not a number", first, last);
    if (item->status != KIVI_OK) atomic_fetch_add(&b->cache->n_nonfinite, 1);
}

static void read_results(batch_state *s) {
    const ki_cuda_counters *counters =
        (const ki_cuda_counters *)(const void *)(s->b->down + s->b->result_at.counters);
    uint32_t row = 0;
    atomic_fetch_add(&s->b->cache->n_saturated, counters->n_saturated);
    for (size_t i = 0; i < s->n_items; i++) {
        read_item(s, s->items[i], row);
        row += s->items[i]->n_rows;
    }
}

/* ---- a pass ---- */

static int bucket_index(uint32_t n) {
    int i = 0;
    while ((1u << i) < n) i++;
    return i;
}

static ki_cuda_shape shape_of(const ki_cuda_backend *b, const batch_state *s) {
    ki_cuda_shape shape = {.n_rows = s->n_rows,
                           .n_seqs = s->n_slots,
                           .max_rows = s->max_rows,
                           .n_logits = s->n_logits,
                           .first_logit = s->first_logit,
                           .n_whole = s->n_whole,
                           .n_single = s->n_single,
                           .own_rows = s->own_rows,
                           .decode = s->decode};
    shape.split_tokens =
        ki_cuda_split_of(b, &b->layout, ki_cuda_bucket(s->n_slots), b->sizes.max_tokens);
    return shape;
}

/* Queues the draws of rows of logits that are, or are being made, on the device. */
static kivi_status queue_draws(const batch_state *s, kivi_error *err) {
    const ki_cuda_backend *b = s->b;
    const ki_config *c = &b->model->config;
    size_t from = b->upload_at.draws,
           n_bytes = b->upload_at.edits + s->n_edits * sizeof(ki_draw_edit) - from;
    if (!s->n_draws) return KIVI_OK;
    KI_TRY(ki_cuda_check(cudaMemcpyAsync(b->buffers.upload + from, b->up + from, n_bytes,
                                         cudaMemcpyHostToDevice, b->memory.stream),
                         "upload of draws", err));
    ki_cuda_draw_rows((int32_t *)(void *)(b->buffers.result + b->result_at.drawn),
                      b->buffers.logits, ki_logits_stride(c), c->n_vocab,
                      (const ki_cuda_draw *)(const void *)(b->buffers.upload + from),
                      (ki_draw_edit *)(void *)(b->buffers.upload + b->upload_at.edits), s->n_draws,
                      b->memory.stream);
    return ki_cuda_check(cudaGetLastError(), "draws", err);
}

static kivi_status get_drawn(const batch_state *s, kivi_error *err) {
    return ki_cuda_get_result(s->b, s->b->result_at.drawn, s->n_draws * sizeof(int32_t), err);
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Until the pass of this number has left its results in `down`: the device writes the number
 * behind them. It is asked now and then whether it still works at all. */
static kivi_status wait_for_number(const ki_cuda_backend *b, uint32_t number, kivi_error *err) {
    enum { LOOKS = 10000 }; /* between two questions: about half a millisecond */
    const _Atomic uint32_t *there =
        (const _Atomic uint32_t *)(const void *)(b->down + b->result_at.number);
    for (cudaError_t code = cudaErrorNotReady;; code = cudaStreamQuery(b->memory.stream)) {
        for (int i = 0; i < LOOKS; i++, relax())
            if (atomic_load_explicit(there, memory_order_acquire) == number) return KIVI_OK;
        if (code == cudaErrorNotReady) continue;
        KI_TRY(ki_cuda_check(code, "step", err));
        return KI_FAIL(err, DEVICE, "cuda: a step ended without its results");
    }
}

static kivi_status launch(const batch_state *s, kivi_error *err) {
    ki_cuda_backend *b = s->b;
    ki_cuda_shape shape = shape_of(b, s);
    int bucket = bucket_index(s->n_slots);
    if (!s->decode) KI_TRY(ki_cuda_put_upload(b, err));
    if (s->decode && bucket < KI_MAX_BUCKETS && b->graphs[bucket])
        return ki_cuda_check(cudaGraphLaunch(b->graphs[bucket], b->memory.stream), "graph", err);
    return ki_cuda_run_pass(b, &shape, err);
}

static kivi_status run(batch_state *s, kivi_error *err) {
    ki_cuda_backend *b = s->b;
    KI_TRY(launch(s, err));
    if (s->decode && !s->n_draws) return wait_for_number(b, b->n_decoded, err);
    KI_TRY(queue_draws(s, err));
    /* of decoding everything else is there already */
    KI_TRY(s->decode ? get_drawn(s, err) : ki_cuda_get_result(b, 0, b->result_at.n_bytes, err));
    return ki_cuda_check(cudaStreamSynchronize(b->memory.stream), "step", err);
}

static void pass(ki_cuda_backend *b, size_t n_items, uint32_t *first_logit) {
    batch_state s = {.b = b, .items = b->chosen, .n_items = n_items, .first_logit = *first_logit};
    kivi_error err = {0};
    if (!n_items) return;
    put_batch(&s);
    kivi_status status = run(&s, &err);
    if (status == KIVI_OK) read_results(&s);
    for (size_t i = 0; i < n_items; i++) {
        ki_batch_item *item = s.items[i];
        *first_logit += item->all_logits ? item->n_rows : 1;
        if (status == KIVI_OK) continue;
        item->status = status;
        if (item->err) *item->err = err;
    }
}

/* ---- a step ---- */

void ki_cuda_forward(ki_cuda_backend *b, ki_batch *batch) {
    uint32_t first_logit = 0;
    size_t n = 0;
    b->n_steps++;
    for (size_t i = 0; i < batch->n_items; i++) {
        ki_batch_item *item = &batch->items[i];
        if (item->status == KIVI_OK && (!b->invariant || item->n_rows == 1)) b->chosen[n++] = item;
    }
    pass(b, n, &first_logit);
    for (size_t i = 0; i < batch->n_items && b->invariant; i++) {
        b->chosen[0] = &batch->items[i];
        if (b->chosen[0]->status == KIVI_OK && b->chosen[0]->n_rows > 1) pass(b, 1, &first_logit);
    }
}

kivi_status ki_cuda_draw_one(int32_t *id, ki_cuda_backend *b, uint32_t row, const ki_draw *draw,
                             kivi_error *err) {
    batch_state s = {.b = b};
    *id = -1;
    if (!put_draw(&s, draw, row)) return KIVI_OK;
    KI_TRY(queue_draws(&s, err));
    KI_TRY(get_drawn(&s, err));
    KI_TRY(ki_cuda_check(cudaStreamSynchronize(b->memory.stream), "draw", err));
    memcpy(id, b->down + b->result_at.drawn, sizeof *id);
    return KIVI_OK;
}
