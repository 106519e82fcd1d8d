/* sched_fake.h: a model without weights for the scheduler's tests: the next token is a hash of the
 * history, and the history is read back from where the cache keeps it. A real cache of one layer
 * holds it: the tokens stand in the pages' key codes and, bit for bit, in the 16-bit rows. So a
 * page that was mixed up, given back too early or written while others read it changes what
 * comes out, and a 16-bit row that is not there when the visibility rule says so is found. */
#ifndef KI_SCHED_FAKE_H
#define KI_SCHED_FAKE_H
#include "serve.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

enum { FAKE_VOCAB = 24, FAKE_END = 0, FAKE_HEAD = 16 };

static inline uint64_t fake_mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 29;
}

typedef struct fake {
    kivi_cache *cache;
    float *logits; /* [logit_rows][FAKE_VOCAB] */
    uint64_t now_us, n_checked, n_drawn;
    uint64_t
        fail_one_in; /* a row whose history's hash is a multiple of it is not finite; 0: none */
    uint32_t window; /* only so many tokens count; 0: all */
    bool knows_best; /* as a device does */
    int32_t ends[1];
    ki_machine machine;
} fake;

/* What follows a history of this hash. */
static inline void fake_row(float *logits, uint64_t hash) {
    for (uint64_t i = 0; i < FAKE_VOCAB; i++) {
        uint64_t z = fake_mix(hash, i + 1);
        logits[i] = (float)((z ^ z >> 31) & 0xffff) * 0x1p-13f;
    }
}
static inline bool fake_fails(const fake *f, uint64_t hash) {
    return f->fail_one_in && (hash >> 7) % f->fail_one_in == 0;
}

static inline uint32_t *fake_slot(const kivi_seq *seq, uint32_t pos) {
    uint8_t *page = ki_seq_page(seq, pos / KI_PAGE_TOKENS, 0, 0);
    return (uint32_t *)(void *)page + pos % KI_PAGE_TOKENS;
}

static inline void fake_check_rows(fake *f, const kivi_seq *seq, uint32_t pos, uint64_t hash) {
    const ki_layout *l = &f->cache->layout;
    uint32_t first = f->window && pos + 1 > f->window ? pos + 1 - f->window : 0;
    uint32_t k = KI_MAX(ki_k_exact(seq, pos), first), v = KI_MAX(ki_v_exact(seq, pos), first);
    uint32_t at[] = {v, v + (uint32_t)(hash % (pos - v + 1)), k,
                     k + (uint32_t)(hash % (pos - k + 1))};
    for (int i = 0; i < 4; i++) {
        uint32_t p = at[i], lane = p % KI_LANES, want = *fake_slot(seq, p), got;
        if (i < 2 && l->kv.v_bits < 16)
            got = ki_seq_v_block(seq, 0, 0, p / KI_LANES)[lane * FAKE_HEAD];
        else if (i >= 2 && l->kv.k_bits < 16) got = ki_seq_k_block(seq, 0, 0, p / KI_LANES)[lane];
        else continue;
        f->n_checked++;
        if (got != (uint16_t)want)
            fail_msg("position %u reads %s of %u in 16 bit: token %u, expected %u", pos,
                     i < 2 ? "the value" : "the key", p, got, want);
    }
}

static inline void fake_put(fake *f, const kivi_seq *seq, uint32_t pos, int32_t token) {
    const ki_layout *l = &f->cache->layout;
    uint16_t row[FAKE_HEAD] = {(uint16_t)token};
    uint32_t id = seq->pages[pos / KI_PAGE_TOKENS];
    if (f->cache->pool.counts[id] != 1)
        fail_msg("position %u is written to a page of %u users", pos, f->cache->pool.counts[id]);
    *fake_slot(seq, pos) = (uint32_t)token;
    if (l->kv.k_bits < 16) ki_seq_put_row(seq, 0, 0, pos, row, row);
}

/* The hash of the first n tokens, or of the last ones of them, as the cache has them. */
static inline uint64_t fake_history(const fake *f, const kivi_seq *seq, uint32_t n) {
    uint64_t hash = 0;
    for (uint32_t pos = f->window && n > f->window ? n - f->window : 0; pos < n; pos++)
        hash = fake_mix(hash, *fake_slot(seq, pos));
    return hash;
}

/* As a device does: some rows are left to the host. */
static inline int32_t fake_draw(const float *logits, const ki_draw *draw, uint64_t hash) {
    ki_candidate all[FAKE_VOCAB];
    float mine[FAKE_VOCAB];
    if (hash % 8 == 0) return -1;
    memcpy(mine, logits, sizeof mine);
    ki_draw_edit_logits(mine, draw);
    ki_draw_hide_ends(mine, FAKE_VOCAB, draw);
    return ki_sample(all, mine, FAKE_VOCAB, draw);
}

static inline void fake_item(fake *f, ki_batch_item *item, float **logits) {
    const kivi_seq *seq = item->seq;
    uint64_t hash = f->window ? 0 : fake_history(f, seq, seq->n_tokens);
    item->logit_row = (uint32_t)((*logits - f->logits) / FAKE_VOCAB);
    item->best = item->drawn = -1;
    for (uint32_t r = 0; r < item->n_rows; r++) {
        uint32_t pos = seq->n_tokens + r;
        fake_put(f, seq, pos, item->tokens[r]);
        if (f->window) hash = fake_history(f, seq, pos + 1);
        else hash = fake_mix(hash, (uint64_t)item->tokens[r]);
        fake_check_rows(f, seq, pos, hash);
        if (fake_fails(f, hash) && item->status == KIVI_OK)
            item->status = KI_FAIL(item->err, NUMERIC, "fake: row %u is not finite", pos);
        if (!item->all_logits && r + 1 < item->n_rows) continue;
        fake_row(*logits, hash);
        if (f->knows_best) item->best = kivi_logits_argmax(*logits, FAKE_VOCAB);
        *logits += FAKE_VOCAB;
    }
    f->n_drawn += item->draw != NULL;
    if (item->draw) item->drawn = fake_draw(*logits - FAKE_VOCAB, item->draw, hash);
}

static inline void fake_forward(void *self, ki_batch_item *items, size_t n_items) {
    fake *f = self;
    float *logits = f->logits;
    uint32_t n_rows = 0;
    for (size_t i = 0; i < n_items; i++) {
        n_rows += items[i].n_rows;
        fake_item(f, &items[i], &logits);
    }
    assert_true(n_rows <= f->machine.step_rows && n_items <= f->machine.max_items);
    assert_true(logits <= f->logits + (size_t)f->machine.logit_rows * FAKE_VOCAB);
}

static inline const float *fake_logits(void *self, uint32_t row) {
    return ((fake *)self)->logits + (size_t)row * FAKE_VOCAB;
}

static inline uint64_t fake_now(void *self) { return ++((fake *)self)->now_us; }

typedef struct fake_options {
    kivi_kv_options kv;
    uint32_t n_pages, ctx_tokens, step_rows, logit_rows, max_items, window;
} fake_options;

static inline void fake_create(fake *f, const fake_options *o) {
    kivi_error err = {0};
    ki_cache_options co = {.max_sequences = o->max_items, .max_tokens = o->ctx_tokens};
    co.geometry = (kivi_cache_geometry){.n_layers = 1,
                                        .n_heads = 1,
                                        .n_kv_heads = 1,
                                        .head_dim = FAKE_HEAD,
                                        .kv = o->kv,
                                        .n_pages = o->n_pages,
                                        .max_step_rows = o->step_rows,
                                        .window_tokens = o->window,
                                        .n_threads = 1};
    *f = (fake){.ends = {FAKE_END}, .window = o->window};
    if (ki_cache_create(&f->cache, &co, &err) != KIVI_OK) fail_msg("%s", err.text);
    f->logits = malloc((size_t)o->logit_rows * FAKE_VOCAB * sizeof(float));
    assert_non_null(f->logits);
    f->machine = (ki_machine){.cache = f->cache,
                              .n_vocab = FAKE_VOCAB,
                              .ctx_tokens = o->ctx_tokens,
                              .step_rows = o->step_rows,
                              .logit_rows = o->logit_rows,
                              .max_items = o->max_items,
                              .ends = f->ends,
                              .n_ends = 1,
                              .fingerprint = 1,
                              .self = f,
                              .forward = fake_forward,
                              .logits = fake_logits,
                              .now_us = fake_now};
}

/* Nothing of the scheduler is left. */
static inline void fake_destroy(fake *f) {
    assert_int_equal(f->cache->pool.n_free, f->cache->pool.n_pages);
    assert_true(ki_pool_check(&f->cache->pool));
    kivi_cache_destroy(&f->cache);
    free(f->logits);
}

/* ---- what a request answers alone: the history and the chooser, no scheduler and no cache ---- */

typedef struct answer {
    int32_t *tokens;
    uint32_t n;
    bool fails;  /* after these tokens */
    bool is_end; /* the last one ends the choice */
} answer;

/* The hash of n tokens of prompt and answer, from that of one less. */
static inline uint64_t fake_next(const fake *f, uint64_t hash, const kivi_request *r,
                                 const int32_t *ids, uint32_t n) {
    uint32_t n_prompt = (uint32_t)r->n_prompt, first = n - 1;
    if (f->window) first = n > f->window ? n - f->window : 0, hash = 0;
    for (uint32_t i = first; i < n; i++)
        hash = fake_mix(hash, (uint64_t)(i < n_prompt ? r->prompt[i] : ids[i - n_prompt]));
    return hash;
}

/* prompt_logprobs: [n_prompt][1 + n_top], NULL: not wanted. False: a row of the prompt fails. */
static inline bool fake_prompt(uint64_t *hash, const fake *f, const kivi_request *r,
                               kivi_logprob *prompt_logprobs) {
    float logits[FAKE_VOCAB];
    size_t row = (size_t)(1 + (r->prompt_logprobs > 0 ? r->prompt_logprobs : 0));
    *hash = 0;
    for (size_t i = 0; i < r->n_prompt; i++) {
        if (prompt_logprobs && i) {
            fake_row(logits, *hash);
            ki_logprobs(prompt_logprobs + i * row, logits, FAKE_VOCAB, r->prompt[i],
                        (uint32_t)row - 1);
        }
        *hash = fake_next(f, *hash, r, NULL, (uint32_t)i + 1);
        if (fake_fails(f, *hash)) return false;
    }
    return true;
}

/* max_tokens must be a number, not UINT32_MAX. */
static inline answer fake_answer(const fake *f, ki_chooser *ch, const kivi_request *r,
                                 uint32_t choice, uint64_t hash) {
    float logits[FAKE_VOCAB];
    ki_request q = {.r = *r};
    ki_choice c = {.request = &q, .index = choice};
    answer a = {.tokens = calloc(r->max_tokens + 1, sizeof(int32_t))};
    kivi_error err;
    assert_non_null(a.tokens);
    c.generated.data = (uint8_t *)a.tokens;
    while (a.n < r->max_tokens && !a.is_end) {
        fake_row(logits, hash);
        int32_t token;
        if (ki_choose(&token, ch, &c, logits, &err) != KIVI_OK) fail_msg("oracle: %s", err.text);
        a.tokens[a.n++] = token;
        c.generated.n_bytes = a.n * sizeof(int32_t);
        a.is_end = ki_is_end(&f->machine, &q, token);
        hash = fake_next(f, hash, r, a.tokens, (uint32_t)r->n_prompt + a.n);
        /* the last token is never evaluated */
        if (!a.is_end && a.n < r->max_tokens && fake_fails(f, hash)) {
            a.fails = true;
            break;
        }
    }
    return a;
}

#endif
