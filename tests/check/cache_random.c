/* Thousands of random operations on a few sequences over too few pages; what a step gives is
 * compared with a sequence of another cache that read the same tokens and nothing else. */
#include "world.h"

#include <unistd.h>

enum { MAX_SEQS = 5, MAX_LENGTH = 1200 };

typedef struct model {
    kivi_seq *seq;
    uint32_t tokens[MAX_LENGTH + 300];
    uint32_t n_tokens;
    uint32_t reach_from; /* the longest it has been: rewind_tokens back from here is promised */
    uint32_t prompt_start, prompt_tokens, prompt_left;
} model;

typedef struct play {
    world w;
    kivi_cache *cache, *other; /* other: for replays, with pages enough */
    model models[MAX_SEQS];
    rng r;
    uint32_t n_steps, n_replays, n_full, n_forks, n_rewinds, n_refused, n_aborts, n_saves;
} play;

static void replay(play *p, const model *m, uint32_t n_rows, const float *got) {
    kivi_seq *seq = NULL;
    CHECK_OK(kivi_seq_create(&seq, p->other, err));
    if (!seq) return;
    bool in_prompt = m->prompt_tokens > 0;
    uint32_t plain = in_prompt ? m->prompt_start : m->n_tokens;
    while (seq->n_tokens < plain)
        CHECK_OK(world_step(seq, m->tokens, KI_MIN(plain - seq->n_tokens, 200u), NULL, err));
    if (in_prompt) CHECK_OK(kivi_seq_begin_prompt(seq, m->prompt_tokens, err));
    while (seq->n_tokens < m->n_tokens)
        CHECK_OK(world_step(seq, m->tokens, KI_MIN(m->n_tokens - seq->n_tokens, 70u), NULL, err));
    size_t n = world_out_floats(&p->cache->layout, n_rows);
    float *want = check_alloc(n * 4);
    CHECK_OK(world_step(seq, m->tokens, n_rows, want, err));
    CHECK(!memcmp(want, got, n * 4), "step %u: %u rows after %u (%s) differ from a replay",
          p->n_steps, n_rows, m->n_tokens, in_prompt ? "in a prompt" : "generated");
    p->n_replays++;
    free(want);
    kivi_seq_destroy(&seq);
}

static void give_up_prompt(model *m) {
    kivi_seq_abort(m->seq);
    m->prompt_left = m->prompt_tokens = 0;
}

static void append(play *p, model *m) {
    uint32_t n_rows = rng_below(&p->r, 3) ? 1 : 1 + rng_below(&p->r, 60);
    if (m->n_tokens >= MAX_LENGTH) return;
    if (!m->prompt_left && rng_below(&p->r, 5) == 0) {
        m->prompt_start = m->n_tokens;
        m->prompt_left = m->prompt_tokens = 1 + rng_below(&p->r, 250);
        CHECK_OK(kivi_seq_begin_prompt(m->seq, m->prompt_tokens, err));
    }
    if (m->prompt_left) n_rows = 1 + rng_below(&p->r, KI_MIN(m->prompt_left, 90u));
    for (uint32_t i = 0; i < n_rows; i++) m->tokens[m->n_tokens + i] = (uint32_t)rng_u64(&p->r);
    float *out = check_alloc(world_out_floats(&p->cache->layout, n_rows) * 4);
    kivi_error e = {0};
    kivi_status status = world_step(m->seq, m->tokens, n_rows, out, &e);
    CHECK(status == KIVI_OK || status == KIVI_FULL, "step %u: %s", p->n_steps, e.text);
    if (status == KIVI_FULL) {
        p->n_full++;
        if (m->prompt_left && rng_below(&p->r, 2)) give_up_prompt(m);
    } else {
        if (rng_below(&p->r, 3) == 0) replay(p, m, n_rows, out);
        m->n_tokens += n_rows;
        if (m->prompt_left) m->prompt_left -= n_rows;
        if (!m->prompt_left) m->prompt_tokens = 0;
        m->reach_from = KI_MAX(m->reach_from, m->n_tokens);
    }
    free(out);
}

/* An empty place other than m's; somebody has to go when all are taken. */
static model *free_slot(play *p, const model *m) {
    for (int i = 0; i < MAX_SEQS; i++)
        if (!p->models[i].seq) return &p->models[i];
    uint32_t i = rng_below(&p->r, MAX_SEQS);
    if (&p->models[i] == m) i = (i + 1) % MAX_SEQS;
    kivi_seq_destroy(&p->models[i].seq);
    return &p->models[i];
}

static void fork_one(play *p, const model *m) {
    if (m->prompt_left) return;
    model *to = free_slot(p, m);
    kivi_error e = {0};
    kivi_seq *seq = NULL;
    kivi_status status = kivi_seq_fork(&seq, m->seq, &e);
    CHECK(status == KIVI_OK || status == KIVI_FULL, "fork: %s", e.text);
    if (status == KIVI_OK) *to = *m;
    to->seq = seq;
    p->n_forks += status == KIVI_OK;
}

static void rewind_one(play *p, model *m) {
    if (m->prompt_left) return;
    uint32_t back = rng_below(&p->r, rng_below(&p->r, 8) ? 20 : m->n_tokens + 1);
    uint32_t to = m->n_tokens - KI_MIN(back, m->n_tokens);
    kivi_error e = {0};
    kivi_status status = kivi_seq_rewind(m->seq, to, &e);
    bool promised = to + p->w.geometry.kv.rewind_tokens >= m->reach_from || to == 0;
    CHECK(status == KIVI_OK || (status == KIVI_ARG && !promised),
          "step %u: from %u (longest %u) back to %u: %s", p->n_steps, m->n_tokens, m->reach_from,
          to, e.text);
    if (status != KIVI_OK) {
        const char *at = strstr(e.text, "are gone, ");
        uint32_t earliest = at ? (uint32_t)strtoul(at + 10, NULL, 10) : 0;
        CHECK(at && earliest > to && earliest <= m->n_tokens, "%s", e.text);
        CHECK_OK(kivi_seq_rewind(m->seq, earliest, err));
        m->n_tokens = earliest;
        p->n_refused++;
        return;
    }
    m->n_tokens = to;
    if (to == 0) m->reach_from = 0;
    p->n_rewinds++;
}

static void abort_one(play *p, model *m) {
    uint32_t n_rows = 1 + rng_below(&p->r, rng_below(&p->r, 2) ? 3 : 100);
    if (m->prompt_left) n_rows = KI_MIN(n_rows, m->prompt_left);
    const ki_layout *l = &p->cache->layout;
    size_t kv = (size_t)n_rows * l->n_kv_heads * l->head_dim;
    float *k = check_alloc(kv * 8);
    kivi_error e = {0};
    if (kivi_seq_begin(m->seq, n_rows, &e) == KIVI_OK) {
        for (size_t i = 0; i < 2 * kv; i++) k[i] = rng_normal(&p->r) * 1000;
        if (rng_below(&p->r, 4) == 0) k[rng_below(&p->r, (uint32_t)(2 * kv))] = NAN;
        for (uint32_t layer = 0; layer < l->n_layers; layer++) {
            kivi_status status = kivi_seq_append(m->seq, layer, k, k + kv, KIVI_F32, &e);
            CHECK(status == KIVI_OK || status == KIVI_NUMERIC, "%s", e.text);
        }
        give_up_prompt(m);
        p->n_aborts++;
    } else {
        CHECK(e.status == KIVI_FULL, "%s", e.text);
    }
    free(k);
}

static void save_one(play *p, const model *m) {
    if (m->prompt_left) return;
    model *to = free_slot(p, m);
    char path[64];
    snprintf(path, sizeof path, "check-random-%ld.seq", (long)getpid());
    CHECK_OK(kivi_seq_save(m->seq, path, err));
    kivi_error e = {0};
    kivi_seq *seq = NULL;
    kivi_status status = kivi_seq_load(&seq, p->cache, path, &e);
    CHECK(status == KIVI_OK || (status == KIVI_FULL && !seq), "step %u: load: %s", p->n_steps,
          e.text);
    remove(path);
    if (status != KIVI_OK) return;
    *to = *m;
    to->seq = seq;
    to->reach_from =
        m->n_tokens + p->w.geometry.kv.rewind_tokens; /* older rows are not in the file */
    p->n_saves++;
}

static void check_references(const play *p) {
    uint32_t held = 0, counted = 0;
    for (int i = 0; i < MAX_SEQS; i++)
        if (p->models[i].seq) {
            held += p->models[i].seq->n_pages;
            CHECK(kivi_seq_length(p->models[i].seq) == p->models[i].n_tokens, "step %u: length",
                  p->n_steps);
        }
    for (uint32_t i = 0; i < p->cache->pool.n_pages; i++) counted += p->cache->pool.counts[i];
    CHECK(held == counted && ki_pool_check(&p->cache->pool), "step %u: %u pages held, %u counted",
          p->n_steps, held, counted);
}

static void one_step(play *p) {
    model *m = &p->models[rng_below(&p->r, MAX_SEQS)];
    uint32_t what = rng_below(&p->r, 100);
    p->n_steps++;
    if (!m->seq) {
        *m = (model){0};
        CHECK_OK(kivi_seq_create(&m->seq, p->cache, err));
    } else if (what < 70) append(p, m);
    else if (what < 77) fork_one(p, m);
    else if (what < 86) rewind_one(p, m);
    else if (what < 92) abort_one(p, m);
    else if (what < 96) save_one(p, m);
    else kivi_seq_destroy(&m->seq);
    check_references(p);
}

static void random_play(const world *w, uint32_t n_steps) {
    char kind[80];
    const kivi_kv_options *kv = &w->geometry.kv;
    snprintf(kind, sizeof kind, "b%u.%u%s-r%u-s%u-w%u-%s", kv->k_bits, kv->v_bits,
             kv->plus ? "+" : "", kv->residual_tokens, kv->sink_tokens, kv->rewind_tokens,
             world_rule_name(kv));
    if (!check_case("cache-random/%s", kind)) return;
    static play p;
    world other = *w;
    p = (play){.w = *w, .r = check_rng()};
    other.geometry.n_pages = 16;
    CHECK_OK(world_create(&p.cache, w, err));
    CHECK_OK(world_create(&p.other, &other, err));
    memset(p.cache->pool.data, 0xff,
           p.cache->pool.id_bytes * p.cache->pool.n_pages); /* what a fresh page never shows */
    while (p.n_steps < n_steps && !check_failed()) one_step(&p);
    for (int i = 0; i < MAX_SEQS; i++) kivi_seq_destroy(&p.models[i].seq);
    CHECK(p.cache->pool.n_free == p.cache->pool.n_pages, "pages left");
    CHECK(p.cache->mem->bytes[KI_TAG_kv_residual] == 0, "window bytes left");
    kivi_cache_destroy(&p.cache);
    kivi_cache_destroy(&p.other);
    check_note(
        "%u steps: %u replays, %u full, %u forks, %u rewinds, %u refused, %u aborts, %u saves",
        p.n_steps, p.n_replays, p.n_full, p.n_forks, p.n_rewinds, p.n_refused, p.n_aborts,
        p.n_saves);
    check_end();
}

void check_cache_random(void) {
    static const struct {
        uint32_t k, v, group, residual, sinks, back;
        kivi_rule rule;
        uint32_t span, plus;
    } kinds[] = {{2, 2, 32, 32, 0, 16, KIVI_RULE_PAPER, 0, 0},
                 {2, 2, 32, 128, 32, 16, KIVI_RULE_STREAM, 0, 0},
                 {2, 2, 32, 32, 4, 16, KIVI_RULE_STREAM, 0, 0},
                 {4, 8, 16, 32, 20, 16, KIVI_RULE_PAPER, 0, 0},
                 {2, 4, 32, 64, 1, 40, KIVI_RULE_SPAN, 128, 0},
                 {8, 2, 32, 32, 75, 16, KIVI_RULE_STREAM, 0, 0},
                 {4, 2, 16, 32, 16, 0, KIVI_RULE_SPAN, 128, 0},
                 {2, 16, 32, 64, 0, 16, KIVI_RULE_PAPER, 0, 0},
                 {16, 8, 32, 32, 0, 33, KIVI_RULE_SPAN, 256, 0},
                 {16, 16, 32, 128, 0, 16, KIVI_RULE_PAPER, 0, 0},
                 {2, 2, 128, 128, 4, 16, KIVI_RULE_STREAM, 0, KIVI_PLUS_ALL},
                 {4, 3, 128, 128, 130, 40, KIVI_RULE_PAPER, 0, KIVI_PLUS_ALL},
                 {2, 2, 128, 128, 1, 0, KIVI_RULE_SPAN, 256, KIVI_PLUS_ALL},
                 {2, 2, 32, 128, 75, 16, KIVI_RULE_STREAM, 0, KIVI_PLUS_ALL | KIVI_PLUS_K32},
                 {2, 3, 128, 128, 0, 16, KIVI_RULE_PAPER, 0,
                  KIVI_PLUS | KIVI_PLUS_WIDE | KIVI_PLUS_TURN | KIVI_PLUS_ZERO | KIVI_PLUS_V32}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        world w = world_small();
        w.geometry.n_heads = 2, w.geometry.n_kv_heads = 1, w.geometry.n_layers = 1,
        w.geometry.n_pages = 13;
        w.geometry.kv = (kivi_kv_options){.k_bits = kinds[i].k,
                                          .v_bits = kinds[i].v,
                                          .plus = kinds[i].plus,
                                          .group = kinds[i].group,
                                          .residual_tokens = kinds[i].residual,
                                          .sink_tokens = kinds[i].sinks,
                                          .rule = kinds[i].rule,
                                          .span_tokens = kinds[i].span,
                                          .rewind_tokens = kinds[i].back};
        random_play(&w, check_opt.thorough ? 20000 : 2500);
    }
}
