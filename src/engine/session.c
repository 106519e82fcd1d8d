/* session.c: one timeline of tokens, and the step that moves several of them. */
#include "engine.h"

/* A history of this many prompts can be evaluated again; a chat of more turns than that does not
 * fit any context. */
enum { MAX_RUNS = 1 << 16 };

kivi_status ki_session_new(kivi_session **out, kivi_engine *engine, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, &engine->mem, KI_TAG_other, sizeof(kivi_session), err));
    kivi_session *s = p;
    s->engine = engine;
    ki_buf_init(&s->runs, &engine->mem, MAX_RUNS * sizeof(ki_run));
    kivi_status status = ki_alloc_array(&p, &engine->mem, KI_TAG_other, engine->options.ctx_tokens,
                                        sizeof(int32_t), err);
    s->history = p;
    if (status != KIVI_OK) kivi_session_destroy(&s);
    *out = s;
    return status;
}

kivi_status kivi_session_create(kivi_session **out, kivi_engine *engine, kivi_error *err) {
    KI_TRY(ki_session_new(out, engine, err));
    kivi_status status = kivi_seq_create(&(*out)->seq, engine->cache, err);
    if (status != KIVI_OK) kivi_session_destroy(out);
    return status;
}

void kivi_session_destroy(kivi_session **session) {
    kivi_session *s = *session;
    if (!s) return;
    kivi_seq_destroy(&s->seq);
    ki_buf_deinit(&s->runs);
    ki_free(&s->engine->mem, s->history);
    ki_free(&s->engine->mem, s);
    *session = NULL;
}

uint32_t kivi_session_length(const kivi_session *session) { return kivi_seq_length(session->seq); }

uint32_t ki_session_runs(const kivi_session *session, const ki_run **runs) {
    *runs = (const ki_run *)(const void *)session->runs.data;
    return (uint32_t)(session->runs.n_bytes / sizeof(ki_run));
}

const float *kivi_session_logits(const kivi_session *session, uint32_t row) {
    ki_backend *b = session->engine->backend;
    if (row >= session->n_logit_rows) return NULL;
    if (session->logits_step != session->engine->n_steps) return NULL; /* others have them now */
    return b->api->logits(b, session->logit_row + row);
}

kivi_status kivi_session_begin_prompt(kivi_session *session, size_t n_tokens, kivi_error *err) {
    uint32_t length = kivi_session_length(session), ctx = session->engine->options.ctx_tokens;
    if (n_tokens == 0) return KI_FAIL(err, ARG, "session: an empty prompt");
    if (n_tokens > ctx - length)
        return KI_FAIL(err, ARG,
                       "session: a prompt of %zu tokens after %u exceeds the context of %u",
                       n_tokens, length, ctx);
    ki_run run = {length, (uint32_t)n_tokens};
    KI_TRY(kivi_seq_begin_prompt(session->seq, (uint32_t)n_tokens, err));
    kivi_status status = ki_buf_append(&session->runs, &run, sizeof run, err);
    if (status != KIVI_OK) session->seq->run_left = 0;
    return status;
}

/* Rows in steps of at most step_rows. */
static kivi_status feed(kivi_session *session, const int32_t *tokens, size_t n_tokens,
                        kivi_error *err) {
    uint32_t step_rows = session->engine->options.step_rows;
    for (size_t done = 0; done < n_tokens;) {
        kivi_step_item item = {.session = session,
                               .tokens = tokens + done,
                               .n_tokens = (uint32_t)KI_MIN(n_tokens - done, (size_t)step_rows)};
        KI_TRY(kivi_engine_step(session->engine, &item, 1, err));
        if (item.status != KIVI_OK) {
            if (err) *err = item.error;
            return item.status;
        }
        done += item.n_tokens;
    }
    return KIVI_OK;
}

/* Runs that began at or after n_tokens never were; one across it was that much shorter: true. */
static bool cut_runs(kivi_session *session, uint32_t n_tokens) {
    ki_run *runs = (ki_run *)(void *)session->runs.data;
    uint32_t n = (uint32_t)(session->runs.n_bytes / sizeof *runs);
    while (n && runs[n - 1].start >= n_tokens) n--;
    bool is_cut = n && runs[n - 1].start + runs[n - 1].n_tokens > n_tokens;
    if (is_cut) runs[n - 1].n_tokens = n_tokens - runs[n - 1].start;
    session->runs.n_bytes = n * sizeof *runs;
    return is_cut;
}

/* Gives a prompt up that cannot go on: what was evaluated of it stays, as a shorter prompt. */
static void give_up_prompt(kivi_session *session) {
    kivi_seq_abort(session->seq);
    cut_runs(session, kivi_session_length(session));
}

kivi_status kivi_session_prompt(kivi_session *session, const int32_t *tokens, size_t n_tokens,
                                kivi_error *err) {
    KI_TRY(kivi_session_begin_prompt(session, n_tokens, err));
    kivi_status status = feed(session, tokens, n_tokens, err);
    if (status != KIVI_OK) give_up_prompt(session);
    return status;
}

kivi_status kivi_session_decode(kivi_session *session, int32_t token, kivi_error *err) {
    return feed(session, &token, 1, err);
}

/* ---- the step ---- */

static kivi_status check_item(const kivi_engine *e, const kivi_step_item *item, kivi_error *err) {
    const kivi_session *s = item->session;
    uint32_t length = kivi_session_length(s), ctx = e->options.ctx_tokens;
    if (item->n_tokens > ctx - length)
        return KI_FAIL(err, ARG, "session: %u more tokens after %u exceed the context of %u",
                       item->n_tokens, length, ctx);
    for (uint32_t i = 0; i < item->n_tokens; i++)
        if (item->tokens[i] < 0 || (uint32_t)item->tokens[i] >= e->info.n_vocab)
            return KI_FAIL(err, ARG, "session: token %d at %u, expected 0 to %u", item->tokens[i],
                           i, e->info.n_vocab - 1);
    return KIVI_OK;
}

static bool keeps_all(const kivi_engine *e, const kivi_step_item *item) {
    return e->options.all_logits || item->all_logits;
}

static kivi_status check_step(const kivi_engine *e, const kivi_step_item *items, size_t n_items,
                              kivi_error *err) {
    uint64_t n_rows = 0, n_logit_rows = 0;
    if (n_items == 0 || n_items > e->options.max_sessions)
        return KI_FAIL(err, ARG, "step: %zu sessions, expected 1 to %u", n_items,
                       e->options.max_sessions);
    for (size_t i = 0; i < n_items; i++) {
        if (!items[i].session || items[i].session->engine != e || items[i].n_tokens == 0)
            return KI_FAIL(err, ARG, "step: item %zu has no session of this engine or no tokens",
                           i);
        for (size_t j = 0; j < i; j++)
            if (items[j].session == items[i].session)
                return KI_FAIL(err, ARG, "step: items %zu and %zu are the same session", j, i);
        n_rows += items[i].n_tokens;
        n_logit_rows += keeps_all(e, &items[i]) ? items[i].n_tokens : 1;
    }
    if (n_rows > e->options.step_rows)
        return KI_FAIL(err, ARG, "step: %llu rows, expected at most %u", (unsigned long long)n_rows,
                       e->options.step_rows);
    if (n_logit_rows > e->options.logit_rows)
        return KI_FAIL(err, ARG, "step: %llu rows of logits, expected at most %u",
                       (unsigned long long)n_logit_rows, e->options.logit_rows);
    return KIVI_OK;
}

/* Items that can go become the batch; the others keep their own error. */
static size_t begin_items(kivi_engine *e, kivi_step_item *items, size_t n_items) {
    size_t n = 0;
    for (size_t i = 0; i < n_items; i++) {
        kivi_step_item *item = &items[i];
        item->session->n_logit_rows = 0;
        item->error = (kivi_error){0};
        item->status = check_item(e, item, &item->error);
        if (item->status == KIVI_OK)
            item->status = kivi_seq_begin(item->session->seq, item->n_tokens, &item->error);
        if (item->status != KIVI_OK) continue;
        e->batch[n] = (ki_batch_item){.seq = item->session->seq,
                                      .tokens = item->tokens,
                                      .n_rows = item->n_tokens,
                                      .all_logits = keeps_all(e, item),
                                      .err = &item->error};
        e->owners[n++] = item;
    }
    return n;
}

static void end_item(kivi_engine *e, kivi_step_item *item, const ki_batch_item *result) {
    kivi_session *s = item->session;
    uint32_t length = kivi_session_length(s);
    item->status = result->status;
    if (item->status != KIVI_OK) {
        give_up_prompt(s);
        return;
    }
    item->status = kivi_seq_commit(s->seq, &item->error);
    memmove(s->history + length, item->tokens, item->n_tokens * sizeof *item->tokens);
    s->logit_row = result->logit_row;
    s->best = result->best;
    s->n_logit_rows = keeps_all(e, item) ? item->n_tokens : 1;
    s->logits_step = e->n_steps;
}

kivi_status kivi_engine_step(kivi_engine *engine, kivi_step_item *items, size_t n_items,
                             kivi_error *err) {
    KI_TRY(check_step(engine, items, n_items, err));
    engine->n_steps++;
    ki_batch batch = {.items = engine->batch};
    batch.n_items = begin_items(engine, items, n_items);
    ki_fpu fpu = ki_fpu_enter();
    engine->backend->api->forward(engine->backend, &batch);
    ki_fpu_leave(fpu);
    for (size_t i = 0; i < batch.n_items; i++) end_item(engine, engine->owners[i], &batch.items[i]);
    return KIVI_OK;
}

/* ---- forks and steps back ---- */

static kivi_status copy_history(kivi_session *to, const kivi_session *from, uint32_t n_tokens,
                                kivi_error *err) {
    memcpy(to->history, from->history, n_tokens * sizeof *to->history);
    return ki_buf_append(&to->runs, from->runs.data, from->runs.n_bytes, err);
}

kivi_status kivi_session_fork(kivi_session **out, const kivi_session *from, kivi_error *err) {
    KI_TRY(ki_session_new(out, from->engine, err));
    kivi_status status = copy_history(*out, from, kivi_session_length(from), err);
    if (status == KIVI_OK) status = kivi_seq_fork(&(*out)->seq, from->seq, err);
    if (status != KIVI_OK) kivi_session_destroy(out);
    return status;
}

/* The first n_tokens of the history once more, prompts as prompts. */
static kivi_status replay(kivi_session *session, uint32_t n_tokens, kivi_error *err) {
    const ki_run *runs;
    uint32_t n_runs = ki_session_runs(session, &runs), pos = 0;
    KI_TRY(kivi_seq_rewind(session->seq, 0, err));
    for (uint32_t i = 0; pos < n_tokens; i++) {
        uint32_t start = i < n_runs ? KI_MIN(runs[i].start, n_tokens) : n_tokens;
        KI_TRY(feed(session, session->history + pos, start - pos, err));
        pos = start;
        if (pos == n_tokens) break;
        KI_TRY(kivi_seq_begin_prompt(session->seq, runs[i].n_tokens, err));
        KI_TRY(feed(session, session->history + pos, runs[i].n_tokens, err));
        pos += runs[i].n_tokens;
    }
    return KIVI_OK;
}

kivi_status kivi_session_rewind(kivi_session *session, uint32_t n_tokens, kivi_error *err) {
    uint32_t length = kivi_session_length(session);
    if (session->seq->run_left || n_tokens > length)
        return KI_FAIL(err, ARG, "session: back to %u of %u tokens%s", n_tokens, length,
                       session->seq->run_left ? " within a prompt" : "");
    /* under dynamic NTK the keys of a shorter prompt are other keys */
    bool other_keys = cut_runs(session, n_tokens) &&
                      session->engine->model->config.rope[0].scaling == KI_ROPE_DYNAMIC;
    kivi_status status = other_keys ? KIVI_ARG : kivi_seq_rewind(session->seq, n_tokens, NULL);
    if (status == KIVI_ARG) status = replay(session, n_tokens, err);
    if (status != KIVI_OK) give_up_prompt(session); /* the part that could be had stays */
    session->n_logit_rows = 0;
    return status;
}

kivi_status kivi_session_abandon_prompt(kivi_session *session, kivi_error *err) {
    const ki_run *runs;
    uint32_t n_runs = ki_session_runs(session, &runs);
    if (!session->seq->run_left) return KIVI_OK;
    uint32_t start = runs[n_runs - 1].start; /* of the prompt at hand: the last one announced */
    kivi_status status = ki_seq_abandon(session->seq, start, NULL);
    cut_runs(session, start);
    if (status != KIVI_OK) status = replay(session, start, err);
    if (status != KIVI_OK) give_up_prompt(session); /* the part that could be had stays */
    session->n_logit_rows = 0;
    return status;
}

/* ---- files ----
 *     "KIVISES1"  fingerprint u64  n_tokens u32  tokens [n] i32  n_runs u32  runs [n] 2 u32  then
 * the sequence */

static void session_stream(ki_stream *s, kivi_session *session) {
    char magic[8] = "KIVISES1";
    uint64_t fingerprint = session->engine->model->fingerprint;
    uint32_t n_tokens = session->seq ? kivi_session_length(session) : 0, n_runs = 0;
    ki_stream_bytes(s, magic, sizeof magic);
    ki_stream_bytes(s, &fingerprint, sizeof fingerprint);
    ki_stream_bytes(s, &n_tokens, sizeof n_tokens);
    if (memcmp(magic, "KIVISES1", sizeof magic))
        ki_stream_fail(s, KIVI_FORMAT, "not a saved kivi session, version 1");
    if (fingerprint != session->engine->model->fingerprint)
        ki_stream_fail(s, KIVI_ARG, "saved with another model");
    if (n_tokens > session->engine->options.ctx_tokens)
        ki_stream_fail(s, KIVI_ARG, "longer than this context");
    if (s->status != KIVI_OK) return;
    ki_stream_bytes(s, session->history, n_tokens * sizeof *session->history);
    n_runs = (uint32_t)(session->runs.n_bytes / sizeof(ki_run));
    ki_stream_bytes(s, &n_runs, sizeof n_runs);
    if (n_runs > MAX_RUNS) ki_stream_fail(s, KIVI_FORMAT, "more prompts than a session can have");
    for (uint32_t i = 0, end = 0; i < n_runs && s->status == KIVI_OK; i++) {
        ki_run run = {0};
        if (s->writing) memcpy(&run, session->runs.data + i * sizeof run, sizeof run);
        ki_stream_bytes(s, &run, sizeof run);
        if (run.start < end || run.n_tokens == 0 || run.start > n_tokens ||
            run.n_tokens > n_tokens - run.start)
            ki_stream_fail(s, KIVI_FORMAT, "a prompt lies outside the saved history");
        end = run.start + run.n_tokens;
        if (!s->writing && s->status == KIVI_OK)
            s->status = ki_buf_append(&session->runs, &run, sizeof run, s->err);
    }
    for (uint32_t i = 0; i < n_tokens && s->status == KIVI_OK; i++)
        if (session->history[i] < 0 ||
            (uint32_t)session->history[i] >= session->engine->info.n_vocab)
            ki_stream_fail(s, KIVI_FORMAT, "a saved token lies outside the vocabulary");
}

/* A sequence in this process's form beside one on a device, for the way to and from a file. */
typedef struct mirror {
    kivi_cache *cache;
    kivi_seq *seq;
} mirror;

static void mirror_close(mirror *m) {
    kivi_seq_destroy(&m->seq);
    kivi_cache_destroy(&m->cache);
}

static kivi_status mirror_open(mirror *m, kivi_engine *e, uint32_t n_pages, kivi_error *err) {
    const ki_layout *l = &e->cache->layout;
    ki_cache_options o = {.geometry = {.n_layers = l->n_layers,
                                       .n_heads = l->n_heads,
                                       .n_kv_heads = l->n_kv_heads,
                                       .head_dim = l->head_dim,
                                       .kv = l->kv,
                                       .n_pages = KI_MAX(n_pages, 1u),
                                       .max_step_rows = 1,
                                       .window_tokens = l->window},
                          .mem = &e->mem,
                          .workers = e->workers,
                          .isa = e->cache->kernels->isa,
                          .max_sequences = 1,
                          .max_tokens = e->options.ctx_tokens};
    *m = (mirror){0};
    KI_TRY(ki_cache_create(&m->cache, &o, err));
    kivi_status status = kivi_seq_create(&m->seq, m->cache, err);
    if (status != KIVI_OK) mirror_close(m);
    return status;
}

/* The sequence to or from the stream, by way of this process's form when it is elsewhere. */
static void stream_sequence(ki_stream *s, kivi_session *session) {
    kivi_engine *e = session->engine;
    ki_backend *b = e->backend;
    mirror m;
    if (!b->device) {
        ki_seq_stream(s, session->seq);
        return;
    }
    uint32_t n_pages = s->writing ? session->seq->n_pages : e->cache->max_seq_pages;
    s->status = mirror_open(&m, e, KI_MIN(n_pages, e->cache->pool.n_pages), s->err);
    if (s->status != KIVI_OK) return;
    if (s->writing) {
        s->status = ki_seq_take_shape(m.seq, session->seq, s->err);
        if (s->status == KIVI_OK)
            s->status = b->api->exchange(b, m.seq, session->seq, true, s->err);
    }
    if (s->status == KIVI_OK) ki_seq_stream(s, m.seq);
    if (!s->writing && s->status == KIVI_OK) {
        s->status = ki_seq_take_shape(session->seq, m.seq, s->err);
        if (s->status == KIVI_OK)
            s->status = b->api->exchange(b, m.seq, session->seq, false, s->err);
    }
    mirror_close(&m);
}

kivi_status kivi_session_save(const kivi_session *session, const char *path, kivi_error *err) {
    ki_stream s;
    if (session->seq->run_left) return KI_FAIL(err, ARG, "session: no saving within a prompt");
    KI_TRY(ki_stream_open(&s, path, true, err));
    session_stream(&s, (kivi_session *)session); /* writing changes nothing in it */
    if (s.status == KIVI_OK) stream_sequence(&s, (kivi_session *)session);
    return ki_stream_finish(&s);
}

kivi_status kivi_session_load(kivi_session **out, kivi_engine *engine, const char *path,
                              kivi_error *err) {
    ki_stream s;
    KI_TRY(kivi_session_create(out, engine, err));
    kivi_status status = ki_stream_open(&s, path, false, err);
    if (status == KIVI_OK) {
        session_stream(&s, *out);
        if (s.status == KIVI_OK) stream_sequence(&s, *out);
        status = ki_stream_finish(&s);
    }
    if (status != KIVI_OK) kivi_session_destroy(out);
    return status;
}

kivi_status kivi_session_check(kivi_engine *engine, const char *path, kivi_error *err) {
    kivi_session *session = NULL;
    ki_stream s;
    KI_TRY(ki_session_new(&session, engine, err));
    kivi_status status = ki_stream_open(&s, path, false, err);
    if (status == KIVI_OK) {
        session_stream(&s, session);
        if (s.status == KIVI_OK) ki_seq_look(&s, &engine->cache->layout);
        status = ki_stream_finish(&s);
    }
    kivi_session_destroy(&session);
    return status;
}
