/* scheduler.c: kivi_serve.h implemented: what goes between threads, and the owner's loop.
 *
 * One mutex guards the inbox, the table of ids, what requests are asked to do, and the figures that
 * others may look at. It is held for moments, never while rows are evaluated or a callback runs. */
#include "serve.h"

#include <errno.h>
#include <stdio.h>

enum {
    DEFAULT_QUEUED = 1024,
    DEFAULT_QUEUED_TOKENS = 1 << 20,
    DEFAULT_AGEING_MS = 1000,
    DEFAULT_STALL_MS = 10000,
    PREFIX_SHARE = 4,            /* of the pool's bytes */
    MAX_AGEING_MS = 3600 * 1000, /* times any priority it fits 64 bits of microseconds */
    MAX_WAIT_US = 3600u * 1000000u,
};

kivi_scheduler_options kivi_scheduler_defaults(void) { return (kivi_scheduler_options){0}; }

static uint64_t now_us(const kivi_scheduler *s) { return s->machine.now_us(s->machine.self); }

/* ---- create and destroy ---- */

static kivi_status resolve(kivi_scheduler *s, kivi_error *err) {
    kivi_scheduler_options *o = &s->o;
    const ki_machine *m = &s->machine;
    if (!o->step_tokens) o->step_tokens = m->step_rows;
    if (!o->max_running) o->max_running = KI_MIN(m->max_items, o->step_tokens);
    if (o->step_tokens > m->step_rows)
        return KI_FAIL(err, ARG, "scheduler: %u rows a step, the engine takes %u", o->step_tokens,
                       m->step_rows);
    if (o->max_running > m->max_items || o->max_running > o->step_tokens)
        return KI_FAIL(err, ARG,
                       "scheduler: %u sequences at once, the engine takes %u and a step has %u "
                       "rows",
                       o->max_running, m->max_items, o->step_tokens);
    if (o->ageing_ms > MAX_AGEING_MS)
        return KI_FAIL(err, ARG, "scheduler: ageing of %u ms, expected at most %d", o->ageing_ms,
                       MAX_AGEING_MS);
    if (!o->max_queued) o->max_queued = DEFAULT_QUEUED;
    if (!o->max_queued_tokens) o->max_queued_tokens = DEFAULT_QUEUED_TOKENS;
    if (!o->ageing_ms) o->ageing_ms = DEFAULT_AGEING_MS;
    if (!o->stall_ms) o->stall_ms = DEFAULT_STALL_MS;
    if (!o->exact_bytes) {
        bool is_paper = m->cache->layout.kv.rule == KIVI_RULE_PAPER;
        o->exact_bytes = ki_exact_bytes(s, m->ctx_tokens, m->ctx_tokens) * (is_paper ? 1 : 2);
    }
    if (!o->prefix_bytes)
        o->prefix_bytes = m->cache->pool.n_pages * m->cache->pool.id_bytes / PREFIX_SHARE;
    return KIVI_OK;
}

static kivi_status make_arrays(kivi_scheduler *s, kivi_error *err) {
    size_t n = s->o.max_running;
    void *p;
    KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, n, sizeof *s->running, err));
    s->running = p;
    KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, n, sizeof *s->items, err));
    s->items = p;
    KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, n, sizeof *s->owners, err));
    s->owners = p;
    KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, n, sizeof *s->errors, err));
    s->errors = p;
    KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, s->machine.cache->pool.n_pages, 1, err));
    s->page_seen = p;
    KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, s->machine.logit_rows, sizeof *s->rows, err));
    s->rows = p;
    if (s->machine.draws) {
        KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, n, sizeof *s->draws, err));
        s->draws = p;
        KI_TRY(ki_alloc_array(&p, s->mem, KI_TAG_other, KI_DRAW_EDITS, sizeof *s->edits, err));
        s->edits = p;
    }
    return ki_chooser_init(&s->chooser, s->mem, &s->machine, err);
}

static bool make_locks(kivi_scheduler *s) {
    pthread_condattr_t attributes;
    if (pthread_mutex_init(&s->mutex, NULL)) return false;
    if (pthread_condattr_init(&attributes)) goto no_cond;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    bool made = !pthread_cond_init(&s->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    if (made) return true;
no_cond:
    pthread_mutex_destroy(&s->mutex);
    return false;
}

static void free_all(kivi_scheduler *s) {
    ki_prefixes_deinit(&s->prefixes);
    ki_chooser_deinit(&s->chooser);
    ki_free(s->mem, s->running);
    ki_free(s->mem, s->items);
    ki_free(s->mem, s->owners);
    ki_free(s->mem, s->errors);
    ki_free(s->mem, s->page_seen);
    ki_free(s->mem, s->rows);
    ki_free(s->mem, s->draws);
    ki_free(s->mem, s->edits);
    ki_free(s->mem, s);
}

static void publish(kivi_scheduler *s);

kivi_status ki_scheduler_create(kivi_scheduler **out, const ki_machine *machine,
                                const kivi_scheduler_options *options, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, machine->cache->mem, KI_TAG_other, sizeof(kivi_scheduler), err));
    kivi_scheduler *s = p;
    s->mem = machine->cache->mem; /* the engine's: its report counts what is held here, too */
    s->machine = *machine;
    s->o = *options;
    s->next_deadline_us = UINT64_MAX;
    kivi_status status = resolve(s, err);
    if (status == KIVI_OK) status = make_arrays(s, err);
    if (status == KIVI_OK && !make_locks(s))
        status = KI_FAIL(err, NOMEM, "scheduler: no mutex could be made");
    if (status != KIVI_OK) {
        free_all(s);
        return status;
    }
    ki_prefixes_init(&s->prefixes, s->mem, &s->machine, &s->o);
    publish(s);
    *out = s;
    return KIVI_OK;
}

void kivi_scheduler_destroy(kivi_scheduler **scheduler) {
    kivi_scheduler *s = *scheduler;
    if (!s) return;
    kivi_scheduler_stop(s);
    for (ki_request *q; (q = s->live);) ki_end_request(s, q, KIVI_CANCELLED, "the server stops");
    ki_bury(s);
    pthread_cond_destroy(&s->wake);
    pthread_mutex_destroy(&s->mutex);
    free_all(s);
    *scheduler = NULL;
}

/* ---- any thread ---- */

/* The stall clock begins where there was nothing to do before. */
static void wake(kivi_scheduler *s) {
    if (!s->has_work) {
        s->has_work = true;
        s->progress_us = now_us(s);
    }
    pthread_cond_signal(&s->wake);
}

static void enqueue(kivi_scheduler *s, ki_request *q) {
    ki_request **bucket;
    q->id = ++s->last_id;
    q->timings.submitted_us = now_us(s);
    q->timings.n_prompt = (uint32_t)q->r.n_prompt;
    q->order = (int64_t)q->timings.submitted_us + (int64_t)q->r.priority * s->o.ageing_ms * 1000;
    if (q->r.timeout_ms)
        q->deadline_us = q->timings.submitted_us + (uint64_t)q->r.timeout_ms * 1000;
    bucket = &s->buckets[q->id % KI_REQUEST_BUCKETS];
    q->next_in_bucket = *bucket;
    *bucket = q;
    q->live_next = s->live;
    if (s->live) s->live->live_prev = q;
    s->live = q;
    *(s->inbox_last ? &s->inbox_last->next_inbox : &s->inbox_first) = q;
    s->inbox_last = q;
    s->shown.n_submitted++;
    s->shown.n_waiting++;
    s->shown.waiting_tokens += q->r.n_prompt;
    wake(s);
}

void ki_unqueue(kivi_scheduler *s, const ki_request *q) {
    s->shown.n_waiting--;
    s->shown.waiting_tokens -= q->r.n_prompt;
}

/* Under the mutex. */
static kivi_status check_queue(kivi_scheduler *s, size_t n_prompt, kivi_error *err) {
    if (s->is_draining || s->is_stopped)
        return KI_FAIL(err, CANCELLED, "the server takes no more requests: it %s",
                       s->is_stopped ? "stops" : "drains");
    bool is_full = s->shown.n_waiting >= s->o.max_queued ||
                   (s->shown.n_waiting && /* one prompt of any size may always wait */
                    s->shown.waiting_tokens + n_prompt > s->o.max_queued_tokens);
    if (!is_full) return KIVI_OK;
    s->shown.n_queue_full++;
    return KI_FAIL(err, FULL, "the queue is full: %u requests of %u, %llu tokens of %llu wait",
                   s->shown.n_waiting, s->o.max_queued, (unsigned long long)s->shown.waiting_tokens,
                   (unsigned long long)s->o.max_queued_tokens);
}

static kivi_status check_exact(const kivi_scheduler *s, const ki_request *q, const char **param,
                               kivi_error *err) {
    uint32_t n_prompt = (uint32_t)q->r.n_prompt;
    uint64_t need = ki_exact_bytes(s, n_prompt, n_prompt + q->r.max_tokens);
    if (need <= s->o.exact_bytes) return KIVI_OK;
    *param = "prompt";
    return KI_FAIL(err, ARG,
                   "prompt: %u tokens need %llu bytes of 16-bit rows, at most %llu are allowed",
                   n_prompt, (unsigned long long)need, (unsigned long long)s->o.exact_bytes);
}

kivi_status kivi_scheduler_submit(kivi_request_id *id, const char **param, kivi_scheduler *s,
                                  const kivi_request *request, kivi_error *err) {
    const char *name = NULL;
    ki_request *q = NULL;
    kivi_status status = ki_request_create(&q, &name, request, &s->machine, s->mem, err);
    if (status == KIVI_OK) status = check_exact(s, q, &name, err);
    if (param) *param = name;
    bool is_refused = status == KIVI_ARG || status == KIVI_UNSUPPORTED;
    pthread_mutex_lock(&s->mutex);
    s->shown.n_refused += is_refused;
    if (status == KIVI_OK) status = check_queue(s, request->n_prompt, err);
    if (status == KIVI_OK) {
        enqueue(s, q);
        *id = q->id;
        q = NULL; /* the owner's now: it may be gone already */
    }
    pthread_mutex_unlock(&s->mutex);
    ki_request_destroy(&q, s->mem);
    return status;
}

typedef enum asked { ASK_CANCEL, ASK_PAUSE, ASK_RESUME } asked;

static void ask(kivi_scheduler *s, kivi_request_id id, asked what) {
    pthread_mutex_lock(&s->mutex);
    ki_request *q = s->buckets[id % KI_REQUEST_BUCKETS];
    while (q && q->id != id) q = q->next_in_bucket;
    if (q) {
        if (what == ASK_CANCEL) q->wants_cancel = true;
        else q->wants_pause = what == ASK_PAUSE;
        if (!q->is_touched) {
            q->is_touched = true;
            q->next_touched = s->touched;
            s->touched = q;
        }
        wake(s);
    }
    pthread_mutex_unlock(&s->mutex);
}

void kivi_scheduler_cancel(kivi_scheduler *s, kivi_request_id id) { ask(s, id, ASK_CANCEL); }
void kivi_scheduler_pause(kivi_scheduler *s, kivi_request_id id) { ask(s, id, ASK_PAUSE); }
void kivi_scheduler_resume(kivi_scheduler *s, kivi_request_id id) { ask(s, id, ASK_RESUME); }

void kivi_scheduler_drain(kivi_scheduler *s) {
    pthread_mutex_lock(&s->mutex);
    s->is_draining = true;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->mutex);
}

void kivi_scheduler_stop(kivi_scheduler *s) {
    pthread_mutex_lock(&s->mutex);
    s->is_stopped = true;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->mutex);
}

void kivi_scheduler_stats_get(kivi_scheduler_stats *out, kivi_scheduler *s) {
    pthread_mutex_lock(&s->mutex);
    *out = s->shown;
    pthread_mutex_unlock(&s->mutex);
}

void kivi_scheduler_health_get(kivi_scheduler_health *out, kivi_scheduler *s) {
    uint64_t now = now_us(s);
    pthread_mutex_lock(&s->mutex);
    uint64_t since = s->has_work && now > s->progress_us ? now - s->progress_us : 0;
    *out = (kivi_scheduler_health){.accepts = !s->is_draining && !s->is_stopped,
                                   .stalled = since > (uint64_t)s->o.stall_ms * 1000,
                                   .progress_us = since,
                                   .in_step = s->in_step};
    pthread_mutex_unlock(&s->mutex);
}

/* ---- the state as text ---- */

typedef struct text {
    char *at;
    size_t n_bytes, max_bytes;
} text;

__attribute__((format(printf, 2, 3))) static void add(text *t, const char *format, ...) {
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int made = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    size_t n = made < 0 ? 0 : KI_MIN((size_t)made, sizeof line - 1);
    for (size_t i = 0; i < n && t->n_bytes + i + 1 < t->max_bytes; i++)
        t->at[t->n_bytes + i] = line[i];
    t->n_bytes += n;
}

static const char *state_name(char state) {
    return state == 'r'   ? "running"
           : state == 'p' ? "paused"
           : state == 'e' ? "preempted"
                          : "waiting";
}

size_t kivi_scheduler_describe(char *out, size_t max_bytes, kivi_scheduler *s) {
    text t = {out, 0, max_bytes};
    uint64_t now = now_us(s);
    pthread_mutex_lock(&s->mutex);
    const kivi_scheduler_stats *n = &s->shown;
    add(&t,
        "waiting %u (%llu tokens), running %u, sequences %u, preempted %u, paused %u, "
        "pages free %u of %u, cached %u, steps %llu, %s\n",
        n->n_waiting, (unsigned long long)n->waiting_tokens, n->n_running, n->n_sequences,
        n->n_preempted, n->n_paused, n->pages_free, n->n_pages, n->pages_cached,
        (unsigned long long)n->n_steps, s->in_step ? "in a step" : "between steps");
    for (const ki_request *q = s->live; q; q = q->live_next)
        add(&t, "request %llu: %s, %u rows of a prompt of %zu, %u generated, %llu ms old\n",
            (unsigned long long)q->id, state_name(q->shown_state), q->shown_rows, q->r.n_prompt,
            q->shown_generated, (unsigned long long)((now - q->timings.submitted_us) / 1000));
    pthread_mutex_unlock(&s->mutex);
    if (max_bytes) out[KI_MIN(t.n_bytes, max_bytes - 1)] = 0;
    return t.n_bytes;
}

/* ---- the owner: what came in, what goes out ---- */

/* Does what requests were asked to, and adds those that are to go to the list. Under the mutex. */
static void take_asked(kivi_scheduler *s, ki_request **gone) {
    for (ki_request *q; (q = s->touched);) {
        s->touched = q->next_touched;
        q->is_touched = false;
        ki_set_paused(s, q, q->wants_pause);
        if (!q->wants_cancel) continue;
        q->next_gone = *gone;
        *gone = q;
    }
}

/* Adds those whose time is over. Under the mutex. */
static void take_late(kivi_scheduler *s, ki_request **gone) {
    uint64_t now = now_us(s);
    if (now < s->next_deadline_us) return;
    s->next_deadline_us = UINT64_MAX;
    for (ki_request *q = s->live; q; q = q->live_next) {
        if (!q->deadline_us || q->wants_cancel) continue; /* asked to go: it is in the list */
        if (q->deadline_us > now) {
            s->next_deadline_us = KI_MIN(s->next_deadline_us, q->deadline_us);
            continue;
        }
        q->is_late = true;
        q->next_gone = *gone;
        *gone = q;
    }
}

static void take_in(kivi_scheduler *s) {
    ki_request *gone = NULL;
    pthread_mutex_lock(&s->mutex);
    ki_request *fresh = s->inbox_first;
    s->inbox_first = s->inbox_last = NULL;
    for (ki_request *q = fresh; q; q = q->next_inbox)
        if (q->deadline_us) s->next_deadline_us = KI_MIN(s->next_deadline_us, q->deadline_us);
    take_asked(s, &gone);
    take_late(s, &gone);
    pthread_mutex_unlock(&s->mutex);
    for (ki_request *q = fresh; q; q = q->next_inbox) ki_wait(s, &q->choices[0]);
    for (ki_request *q = gone, *next; q; q = next) {
        next = q->next_gone;
        ki_end_request(s, q, KIVI_CANCELLED, q->is_late ? "its time is over" : "cancelled");
    }
}

static void show_requests(kivi_scheduler *s) {
    for (uint32_t i = 0; i < s->n_running; i++) {
        const ki_choice *c = s->running[i];
        c->request->shown_state = c->request->is_paused ? 'p' : 'r';
        c->request->shown_rows = c->seq->n_tokens;
        c->request->shown_generated = c->request->timings.n_generated;
    }
}

/* What others may look at, once a step. */
static void publish(kivi_scheduler *s) {
    const ki_pool *pool = &s->machine.cache->pool;
    kivi_scheduler_stats *n = &s->counts;
    n->n_sequences = s->n_running;
    n->n_pages = pool->n_pages;
    n->pages_free = pool->n_free;
    n->pages_used = pool->n_pages - pool->n_free;
    n->pages_shared = pool->n_shared;
    n->pages_cached = ki_cached_pages(s);
    n->page_tokens = KI_PAGE_TOKENS;
    n->page_bytes = pool->id_bytes;
    n->exact_bytes = s->exact_bytes;
    n->exact_bytes_limit = s->o.exact_bytes;
    n->prefix_bytes = s->prefixes.n_bytes;
    n->prefix_bytes_limit = s->prefixes.unit_tokens ? s->prefixes.limit_bytes : 0;
    n->n_prefixes = s->prefixes.n;
    n->n_evictions = s->prefixes.n_evictions;
    bool can_work = ki_can_work(s);
    pthread_mutex_lock(&s->mutex);
    n->n_waiting = s->shown.n_waiting;
    n->waiting_tokens = s->shown.waiting_tokens;
    n->n_submitted = s->shown.n_submitted;
    n->n_refused = s->shown.n_refused;
    n->n_queue_full = s->shown.n_queue_full;
    s->shown = *n;
    show_requests(s);
    s->has_work = can_work || s->inbox_first || s->touched;
    if (s->worked || !s->has_work) s->progress_us = now_us(s);
    pthread_mutex_unlock(&s->mutex);
}

static void set_in_step(kivi_scheduler *s, bool in_step) {
    pthread_mutex_lock(&s->mutex);
    s->in_step = in_step;
    pthread_mutex_unlock(&s->mutex);
}

static void evaluate(kivi_scheduler *s) {
    kivi_step_report *r = &s->report;
    set_in_step(s, true);
    uint64_t begin = now_us(s);
    s->machine.forward(s->machine.self, s->items, s->n_items);
    r->step_us = now_us(s) - begin;
    set_in_step(s, false);
    r->n_rows = r->n_prompt_rows + r->n_decode_rows;
    r->n_sequences = s->n_items;
    s->counts.n_steps++;
    s->counts.step_us += r->step_us;
    s->counts.last_step = *r;
}

kivi_status kivi_scheduler_step(bool *worked, kivi_scheduler *s, kivi_error *err) {
    s->worked = false;
    take_in(s);
    ki_plan(s);
    if (s->n_items) {
        evaluate(s);
        ki_tell_results(s);
        if (s->o.on_step) s->o.on_step(s->o.on_step_user, &s->counts.last_step);
    }
    publish(s);
    ki_bury(s);
    *worked = s->worked;
#ifdef KI_DEBUG
    if (!ki_pool_check(&s->machine.cache->pool))
        return KI_FAIL(err, INTERNAL, "scheduler: free + referenced pages != all pages");
#endif
    (void)err; /* a fault of a request is told to it alone */
    return KIVI_OK;
}

/* Sleeps until something comes in or the next deadline. True: it is over. */
static bool rest(kivi_scheduler *s, bool worked) {
    pthread_mutex_lock(&s->mutex);
    bool is_over = false;
    for (;;) {
        is_over = s->is_stopped || (s->is_draining && !s->live);
        if (is_over || worked || s->inbox_first || s->touched) break;
        uint64_t now = now_us(s), until = KI_MIN(s->next_deadline_us, now + MAX_WAIT_US);
        struct timespec t = {(time_t)(until / 1000000), (long)(until % 1000000 * 1000)};
        if (pthread_cond_timedwait(&s->wake, &s->mutex, &t) == ETIMEDOUT) break;
    }
    pthread_mutex_unlock(&s->mutex);
    return is_over;
}

kivi_status kivi_scheduler_run(kivi_scheduler *s, kivi_error *err) {
    for (;;) {
        bool worked;
        KI_TRY(kivi_scheduler_step(&worked, s, err));
        if (rest(s, worked)) return KIVI_OK;
    }
}
