/* job.c: from a request's JSON to requests of the scheduler, and from its events to text. */
#include "job.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum {
    MAX_TEXT_BYTES = 256 << 20, /* of one answer, logprobs included */
    MAX_PIECE_BYTES = 512
};

static void hold(job *j) { atomic_fetch_add(&j->n_holders, 1); }

static void free_choice(choice *c) {
    text *const all[] = {&c->tail, &c->ready, &c->tokens, &c->values, &c->tops, &c->offsets};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) text_deinit(all[i]);
}

/* Lets go; the last one writes the log line and frees. */
static void drop(job *j) {
    if (atomic_fetch_sub(&j->n_holders, 1) != 1) return;
    j->log.ended_us = now_us();
    if (j->choices && j->n_choices) j->log.finish = j->choices[0].finish;
    if (j->gone && !j->log.finish) j->log.finish = "abort";
    if (j->log.has_job) log_request(j->s, &j->log);
    for (size_t i = 0; i < j->n_choices; i++) free_choice(&j->choices[i]);
    free(j->choices);
    free(j->runs);
    text_deinit(&j->out);
    params_deinit(&j->p);
    pthread_mutex_destroy(&j->lock);
    free(j);
}

static bool make_choices(job *j) {
    j->n_choices = j->p.n_prompts * j->p.request.n;
    j->choices = calloc(j->n_choices, sizeof *j->choices);
    j->runs = calloc(j->p.n_prompts, sizeof *j->runs);
    if (!j->choices || !j->runs) {
        j->n_choices = 0;
        return false;
    }
    for (size_t i = 0; i < j->n_choices; i++) {
        choice *c = &j->choices[i];
        text *const all[] = {&c->tail, &c->ready, &c->tokens, &c->values, &c->tops, &c->offsets};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) text_init(all[k], MAX_TEXT_BYTES);
        c->state = j->p.constraint ? grammar_first(j->p.constraint) : 0;
    }
    for (size_t i = 0; i < j->p.n_prompts; i++) {
        j->runs[i] = (prompt_run){.job = j, .index = i};
        j->n_prompt += j->p.prompts[i].n;
    }
    return true;
}

job *job_create(server *s, const json_t *body, bool chat, const request_log *log, fault *f) {
    job *j = calloc(1, sizeof *j);
    params_context context = server_context(s);
    if (!j) {
        refuse_with(f, 503, NULL, "out of memory");
        return NULL;
    }
    j->s = s;
    j->socket = -1;
    j->created_s = time(NULL);
    j->log = *log;
    snprintf(j->id, sizeof j->id, "%s-%s", chat ? "chatcmpl" : "cmpl", log->id);
    pthread_mutex_init(&j->lock, NULL);
    text_init(&j->out, MAX_TEXT_BYTES);
    atomic_store(&j->n_holders, 1);
    bool ok = params_read(&j->p, body, chat, &context, f);
    if (ok && !make_choices(j)) ok = refuse_with(f, 503, NULL, "out of memory");
    if (ok) return j;
    drop(j);
    return NULL;
}

/* ---- text ---- */

/* How many bytes at the end of the tail may be the beginning of a stop string. */
static size_t held_back(const params *p, const text *tail) {
    size_t most = 0;
    for (size_t i = 0; i < p->n_stops; i++) {
        size_t n = p->n_stop_bytes[i] - 1 < tail->n_bytes ? p->n_stop_bytes[i] - 1 : tail->n_bytes;
        for (; n > most; n--)
            if (!memcmp(tail->data + tail->n_bytes - n, p->stops[i], n)) most = n;
    }
    return most;
}

/* Moves from the tail to `ready` what no stop string can begin in any more; true: one is there, and
 * the text ends before it (or with it). */
static bool release(const params *p, choice *c) {
    text *tail = &c->tail;
    const char *first = NULL;
    size_t n_first = 0, n;
    if (!tail->n_bytes) return false;
    if (p->n_stops == 0 || c->n_tokens <= p->request.min_tokens) {
        text_put(&c->ready, tail->data, tail->n_bytes);
        tail->n_bytes = 0;
        return false;
    }
    for (size_t i = 0; i < p->n_stops; i++) {
        const char *at = memmem(tail->data, tail->n_bytes, p->stops[i], p->n_stop_bytes[i]);
        if (at && (!first || at < first)) {
            first = at;
            n_first = p->n_stop_bytes[i];
        }
    }
    if (first) n = (size_t)(first - tail->data) + (p->include_stop ? n_first : 0);
    else n = tail->n_bytes - held_back(p, tail);
    text_put(&c->ready, tail->data, n);
    text_drop(tail, first ? tail->n_bytes : n);
    return first != NULL;
}

/* Bytes of a token to whole characters in `to`; none of a control token unless asked for. */
static void push_token(const job *j, choice *c, text *to, int32_t token) {
    char piece[MAX_PIECE_BYTES], whole[3 * (MAX_PIECE_BYTES + 4)];
    if (!j->s->vocab) return;
    if (kivi_vocab_is_control(j->s->vocab, token) && !j->p.keep_special) return;
    size_t n = kivi_vocab_bytes(j->s->vocab, token, piece, sizeof piece);
    n = n ? kivi_utf8_push(&c->utf8, piece, n, whole) : 0;
    text_put(to, whole, n);
    c->n_chars += utf8_count(whole, n);
}

static void flush_text(choice *c) {
    char whole[3 * 4];
    size_t n = kivi_utf8_push(&c->utf8, NULL, 0, whole);
    if (c->stopped) return;
    text_put(&c->tail, whole, n);
    text_put(&c->ready, c->tail.data, c->tail.n_bytes);
    c->tail.n_bytes = 0;
}

/* ---- what goes out ---- */

static bool has_news(const choice *c) { return c->ready.n_bytes || c->n_entries; }

static void send_chunk(job *j, size_t which) {
    if (j->out.n_bytes == j->n_sent) j->active_us = now_us();
    answer_chunk(&j->out, j, which);
    http_wake(j);
}

static void complete(job *j) {
    if (j->out.n_bytes == j->n_sent) j->active_us = now_us();
    if (j->p.stream) answer_end(&j->out, j);
    else if (j->failure.status == 0) answer_whole(&j->out, j);
    if (!j->p.stream && j->failure.status == 0 && j->out.failed)
        refuse_with(&j->failure, 500, NULL, "the answer is too large");
    j->done = true;
    if (j->when_done) j->when_done(j->when_done_user);
    http_wake(j);
}

/* ---- events ---- */

static void on_prompt(job *j, const prompt_run *run, const kivi_event *e) {
    const token_list *prompt = &j->p.prompts[run->index];
    uint32_t n = j->p.request.n;
    j->n_cached += e->timings->n_cached;
    for (uint32_t i = 0; i < n; i++) {
        size_t which = run->index * n + i;
        choice *c = &j->choices[which];
        for (size_t t = 0; j->p.echo && t < prompt->n; t++) {
            const kivi_logprob *entry = e->top ? e->top + t * (1 + e->n_top) : NULL;
            if (entry)
                answer_logprob(j, which, prompt->ids[t], t ? entry->logprob : NO_LOGPROB, entry + 1,
                               e->n_top);
            push_token(j, c, &c->ready, prompt->ids[t]);
        }
        if (!j->p.stream) continue;
        if (j->p.chat) {
            if (j->out.n_bytes == j->n_sent) j->active_us = now_us();
            answer_role(&j->out, j, which);
            http_wake(j);
        } else if (has_news(c)) send_chunk(j, which);
    }
}

static void observe_token(job *j, choice *c, const kivi_event *e) {
    metrics *m = &j->s->counts;
    if (c->last_us)
        metrics_observe(m, HISTOGRAM_inter_token_latency_seconds,
                        (double)(e->time_us - c->last_us) * 1e-6);
    c->last_us = e->time_us;
}

/* The constraint's state after this token; true: nothing can follow. */
static bool follow(job *j, choice *c, int32_t token) {
    char bytes[MAX_PIECE_BYTES];
    if (!j->p.constraint) return false;
    size_t n = kivi_vocab_bytes(j->s->vocab, token, bytes, sizeof bytes);
    c->state = grammar_next(j->p.constraint, c->state, bytes, n);
    c->n_followed++;
    return grammar_must_end(j->p.constraint, c->state);
}

/* Not by the callback's verdict: that would come into force after the lock is given back, perhaps
 * after the reader has caught up and resumed. */
static void pause_job(job *j) {
    for (size_t i = 0; !j->paused && i < j->n_submitted; i++)
        kivi_scheduler_pause(j->s->scheduler, j->runs[i].id);
    j->paused = true;
}

static kivi_verdict on_token(job *j, const prompt_run *run, const kivi_event *e) {
    size_t which = run->index * j->p.request.n + e->choice;
    choice *c = &j->choices[which];
    bool last = e->is_last;
    observe_token(j, c, e);
    c->n_tokens++;
    j->n_generated++;
    if (j->p.request.logprobs >= 0)
        answer_logprob(j, which, e->token, e->logprob, e->top, e->n_top);
    if (!e->is_end_token) {
        push_token(j, c, &c->tail, e->token);
        c->stopped = release(&j->p, c);
        last = follow(j, c, e->token) || c->stopped || last;
    }
    if (j->p.stream && !last && has_news(c)) send_chunk(j, which);
    if (j->p.stream && j->out.n_bytes - j->n_sent > j->s->o.buffer_bytes) pause_job(j);
    return last && !e->is_last ? KIVI_END_CHOICE : KIVI_GO_ON;
}

static void on_choice(job *j, const prompt_run *run, const kivi_event *e) {
    size_t which = run->index * j->p.request.n + e->choice;
    choice *c = &j->choices[which];
    c->finish = e->finish == KIVI_FINISH_STOP ? "stop" : "length";
    flush_text(c);
    if (j->p.stream) send_chunk(j, which);
}

static void observe_end(const job *j, const prompt_run *run, const kivi_event *e) {
    metrics *m = &j->s->counts;
    const kivi_timings *t = e->timings;
    double scale = 1e-6;
    const kivi_request *r = &j->p.request;
    if (t->admitted_us) {
        metrics_observe(m, HISTOGRAM_request_queue_time_seconds,
                        (double)(t->admitted_us - t->submitted_us) * scale);
        metrics_observe(m, HISTOGRAM_request_inference_time_seconds,
                        (double)(e->time_us - t->admitted_us) * scale);
    }
    metrics_observe(m, HISTOGRAM_e2e_request_latency_seconds,
                    (double)(e->time_us - t->submitted_us) * scale);
    if (t->first_token_us) {
        double decode_s = (double)(t->last_token_us - t->first_token_us) * scale;
        metrics_observe(m, HISTOGRAM_time_to_first_token_seconds,
                        (double)(t->first_token_us - t->submitted_us) * scale);
        metrics_observe(m, HISTOGRAM_request_prefill_time_seconds,
                        (double)(t->first_token_us - t->admitted_us) * scale);
        metrics_observe(m, HISTOGRAM_request_decode_time_seconds, decode_s);
        if (t->n_generated > r->n)
            metrics_observe(m, HISTOGRAM_request_time_per_output_token_seconds,
                            decode_s / ((double)t->n_generated / r->n - 1));
    }
    metrics_observe(m, HISTOGRAM_request_prompt_tokens, t->n_prompt);
    metrics_observe(m, HISTOGRAM_request_generation_tokens, t->n_generated);
    uint32_t n_longest = 0;
    for (uint32_t i = 0; i < r->n; i++)
        if (j->choices[run->index * r->n + i].n_tokens > n_longest)
            n_longest = j->choices[run->index * r->n + i].n_tokens;
    metrics_observe(m, HISTOGRAM_request_max_num_generation_tokens, n_longest);
    metrics_observe(m, HISTOGRAM_request_params_n, r->n);
    if (r->max_tokens != UINT32_MAX)
        metrics_observe(m, HISTOGRAM_request_params_max_tokens, r->max_tokens);
    metrics_observe(m, HISTOGRAM_request_num_preemptions, t->n_preemptions);
    metrics_observe(m, HISTOGRAM_request_prefill_kv_computed_tokens, t->n_prompt - t->n_cached);
}

static void note_timings(request_log *log, const kivi_timings *t) {
    log->n_prompt += t->n_prompt;
    log->n_generated += t->n_generated;
    log->n_cached += t->n_cached;
    log->n_preemptions += t->n_preemptions;
    if (t->admitted_us && log->queue_s == 0)
        log->queue_s = (double)(t->admitted_us - t->submitted_us) * 1e-6;
    if (t->first_token_us && log->first_token_s == 0)
        log->first_token_s = (double)(t->first_token_us - t->submitted_us) * 1e-6;
}

static void on_end(job *j, prompt_run *run, const kivi_event *e) {
    metrics *m = &j->s->counts;
    run->ended = true;
    j->n_ended++;
    observe_end(j, run, e);
    note_timings(&j->log, e->timings);
    if (e->status && !j->failure.status)
        refuse_with(&j->failure, e->status == KIVI_CANCELLED ? 503 : 500, NULL, "%s", e->error);
    if (e->status) metrics_count(m, &m->n_success[FINISHED_ABORT]);
    else {
        const char *finish = j->choices[run->index * j->p.request.n].finish;
        metrics_count(
            m,
            &m->n_success[finish && !strcmp(finish, "length") ? FINISHED_LENGTH : FINISHED_STOP]);
    }
    if (j->n_ended == j->n_submitted && !j->done && j->n_submitted == j->p.n_prompts) complete(j);
}

static kivi_verdict on_event(void *user, const kivi_event *e) {
    prompt_run *run = user;
    job *j = run->job;
    kivi_verdict verdict = KIVI_GO_ON;
    pthread_mutex_lock(&j->lock);
    if (e->kind == KIVI_EVENT_END) on_end(j, run, e);
    else if (j->gone) verdict = KIVI_CANCEL;
    else if (e->kind == KIVI_EVENT_PROMPT) on_prompt(j, run, e);
    else if (e->kind == KIVI_EVENT_TOKEN) verdict = on_token(j, run, e);
    else on_choice(j, run, e);
    pthread_mutex_unlock(&j->lock);
    if (e->kind == KIVI_EVENT_END) drop(j);
    return verdict;
}

/* ---- constraint ---- */

static kivi_status mask(void *user, uint32_t which, const int32_t *generated, uint32_t n_generated,
                        uint32_t *allowed, kivi_error *err) {
    prompt_run *run = user;
    job *j = run->job;
    choice *c = &j->choices[run->index * j->p.request.n + which];
    grammar *g = j->p.constraint;
    char bytes[MAX_PIECE_BYTES];
    /* Events follow the tokens already; this walks only where they did not come to us. */
    if (c->n_followed > n_generated) {
        c->state = grammar_first(g);
        c->n_followed = 0;
    }
    for (; c->n_followed < n_generated; c->n_followed++) {
        size_t n = kivi_vocab_bytes(j->s->vocab, generated[c->n_followed], bytes, sizeof bytes);
        c->state = grammar_next(g, c->state, bytes, n);
    }
    const uint32_t *set = grammar_allowed(g, c->state);
    if (!set) {
        if (err) {
            err->status = KIVI_UNSUPPORTED;
            snprintf(err->text, sizeof err->text, "response_format: the grammar is too large");
        }
        return KIVI_UNSUPPORTED;
    }
    uint32_t n_words = (kivi_engine_info_get(j->s->engine)->n_vocab + 31) / 32;
    memcpy(allowed, set, n_words * sizeof *allowed);
    for (size_t i = 0; grammar_may_end(g, c->state) && i < j->s->n_end_ids; i++)
        allowed[j->s->end_ids[i] / 32] |= 1u << j->s->end_ids[i] % 32;
    return KIVI_OK;
}

/* ---- submission ---- */

static bool refused(fault *f, kivi_status status, const char *param, const kivi_error *err) {
    switch (status) {
    case KIVI_FULL:
        refuse_with(f, 429, NULL, "%s", err->text);
        f->code = "queue_full";
        f->retry_s = 1;
        return false;
    case KIVI_CANCELLED: refuse_with(f, 503, NULL, "the server is going down"); break;
    case KIVI_NOMEM: refuse_with(f, 503, NULL, "%s", err->text); break;
    case KIVI_ARG:
    case KIVI_UNSUPPORTED: refuse_with(f, 400, param, "%s", err->text); return false;
    default: refuse_with(f, 500, NULL, "%s", err->text); return false;
    }
    f->retry_s = 1;
    return false;
}

/* How long a queue as full as it is takes, by what was computed so far. */
static unsigned retry_after(server *s) {
    kivi_scheduler_stats stats;
    kivi_scheduler_stats_get(&stats, s->scheduler);
    double rows = (double)(stats.computed_prompt_tokens + stats.generated_tokens);
    double wait = rows > 0 ? (double)stats.waiting_tokens * (double)stats.step_us * 1e-6 / rows : 1;
    return wait < 1 ? 1 : wait > 60 ? 60 : (unsigned)wait;
}

bool job_submit(job *j, fault *f) {
    bool ok = true;
    pthread_mutex_lock(&j->lock);
    j->active_us = now_us();
    for (size_t i = 0; ok && i < j->p.n_prompts; i++) {
        kivi_request r = j->p.request;
        prompt_run *run = &j->runs[i];
        const char *param = NULL;
        kivi_error err = {0};
        r.prompt = j->p.prompts[i].ids;
        r.n_prompt = j->p.prompts[i].n;
        uint32_t ctx = kivi_engine_info_get(j->s->engine)->ctx_tokens;
        if (j->p.fits_context && r.n_prompt < ctx && ctx - r.n_prompt < r.max_tokens)
            r.max_tokens = ctx - (uint32_t)r.n_prompt;
        r.on_event = on_event;
        r.user = run;
        r.timeout_ms = j->s->o.request_ms;
        if (j->p.constraint) r.constraint = (kivi_constraint){mask, run};
        hold(j);
        kivi_status status = kivi_scheduler_submit(&run->id, &param, j->s->scheduler, &r, &err);
        if (status) {
            ok = refused(f, status, param, &err);
            if (status == KIVI_FULL) {
                f->retry_s = retry_after(j->s);
                metrics_count(&j->s->counts, &j->s->counts.n_rejected);
            }
            atomic_fetch_sub(&j->n_holders, 1); /* the connection still holds it */
        } else {
            run->submitted = true;
            j->n_submitted++;
        }
    }
    if (!ok) j->gone = true;
    for (size_t i = 0; !ok && i < j->p.n_prompts; i++)
        if (j->runs[i].submitted) kivi_scheduler_cancel(j->s->scheduler, j->runs[i].id);
    pthread_mutex_unlock(&j->lock);
    return ok;
}

void job_abandon(job *j, uint64_t *counter) {
    pthread_mutex_lock(&j->lock);
    if (!j->gone) {
        if (counter && !j->done) metrics_count(&j->s->counts, counter);
        j->gone = true;
        for (size_t i = 0; i < j->p.n_prompts; i++)
            if (j->runs[i].submitted && !j->runs[i].ended)
                kivi_scheduler_cancel(j->s->scheduler, j->runs[i].id);
        http_wake(j);
    }
    pthread_mutex_unlock(&j->lock);
}

void job_expire(job *j) {
    pthread_mutex_lock(&j->lock);
    if (!j->done && !j->failure.status) {
        refuse_with(&j->failure, 503, NULL, "the server went down before the answer was complete");
        for (size_t i = 0; i < j->n_submitted; i++)
            if (!j->runs[i].ended) kivi_scheduler_cancel(j->s->scheduler, j->runs[i].id);
    }
    pthread_mutex_unlock(&j->lock);
}

void job_release(job *j) {
    pthread_mutex_lock(&j->lock);
    j->connection = NULL;
    j->suspended = false;
    pthread_mutex_unlock(&j->lock);
    drop(j);
}
