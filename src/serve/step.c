/* step.c: what comes of a step: tokens are chosen and told, choices end. */
#include "serve.h"

/* ---- events ---- */

void ki_set_paused(kivi_scheduler *s, ki_request *q, bool is_paused) {
    if (q->is_paused == is_paused) return;
    q->is_paused = is_paused;
    s->counts.n_paused += is_paused ? 1u : UINT32_MAX; /* one less */
}

static kivi_verdict tell(kivi_scheduler *s, ki_request *q, kivi_event *e) {
    e->id = q->id;
    e->time_us = s->machine.now_us(s->machine.self);
    if (!e->error) e->error = "";
    s->worked = true;
    if (e->kind == KIVI_EVENT_TOKEN) {
        if (!q->timings.first_token_us) q->timings.first_token_us = e->time_us;
        q->timings.last_token_us = e->time_us;
    }
    kivi_verdict verdict = q->r.on_event(q->r.user, e);
    if (e->kind == KIVI_EVENT_END) return verdict;
    if (verdict == KIVI_PAUSE) ki_set_paused(s, q, true);
    if (verdict == KIVI_CANCEL) q->is_cancelled = true;
    return verdict;
}

static void tell_prompt(kivi_scheduler *s, ki_request *q) {
    kivi_event e = {.kind = KIVI_EVENT_PROMPT,
                    .top = q->prompt_logprobs,
                    .n_top = q->prompt_logprobs ? (uint32_t)q->r.prompt_logprobs : 0,
                    .timings = &q->timings};
    q->is_told = true;
    tell(s, q, &e);
}

/* The end of a choice whose callback said that this token is its last. */
static bool tell_token(kivi_scheduler *s, ki_choice *c, int32_t token, const float *logits,
                       bool is_end, bool is_last) {
    ki_request *q = c->request;
    uint32_t n_vocab = s->machine.n_vocab;
    kivi_event e = {.kind = KIVI_EVENT_TOKEN,
                    .choice = c->index,
                    .token = token,
                    .is_end_token = is_end,
                    .is_last = is_last};
    if (q->r.logprobs >= 0) {
        e.n_top = KI_MIN((uint32_t)q->r.logprobs, n_vocab);
        ki_logprobs(s->top, logits, n_vocab, token, e.n_top);
        e.logprob = s->top[0].logprob;
        e.top = s->top + 1;
    }
    return tell(s, q, &e) == KIVI_END_CHOICE;
}

/* ---- ends ---- */

static void unlink_request(kivi_scheduler *s, ki_request *q) {
    ki_request **at = &s->buckets[q->id % KI_REQUEST_BUCKETS];
    while (*at != q) at = &(*at)->next_in_bucket;
    *at = q->next_in_bucket;
    *(q->live_prev ? &q->live_prev->live_next : &s->live) = q->live_next;
    if (q->live_next) q->live_next->live_prev = q->live_prev;
    for (at = &s->touched; *at; at = &(*at)->next_touched)
        if (*at == q) {
            *at = q->next_touched;
            break;
        }
    if (!q->is_admitted) ki_unqueue(s, q);
}

void ki_end_request(kivi_scheduler *s, ki_request *q, kivi_status status, const char *text) {
    if (q->is_over) return;
    q->is_over = true;
    ki_set_paused(s, q, false);
    s->counts.n_running -= q->is_admitted;
    for (uint32_t i = 0; i < q->r.n; i++) {
        ki_choice *c = &q->choices[i];
        if (c->state == KI_RUNNING) ki_leave(s, c);
        if (c->state == KI_WAITING) ki_unwait(s, c);
        c->state = KI_DONE;
    }
    q->timings.ended_us = s->machine.now_us(s->machine.self);
    *(status == KIVI_OK          ? &s->counts.n_ended
      : status == KIVI_CANCELLED ? &s->counts.n_cancelled
                                 : &s->counts.n_failed) += 1;
    pthread_mutex_lock(&s->mutex);
    unlink_request(s, q);
    pthread_mutex_unlock(&s->mutex);
    kivi_event e = {
        .kind = KIVI_EVENT_END, .status = status, .error = text, .timings = &q->timings};
    tell(s, q, &e);
    q->next_dead = s->dead;
    s->dead = q;
}

void ki_bury(kivi_scheduler *s) {
    for (ki_request *q; (q = s->dead);) {
        s->dead = q->next_dead;
        ki_request_destroy(&q, s->mem);
    }
}

static void finish(kivi_scheduler *s, ki_choice *c, kivi_finish why) {
    ki_request *q = c->request;
    kivi_event e = {
        .kind = KIVI_EVENT_CHOICE, .choice = c->index, .finish = why, .timings = &q->timings};
    if (c->state == KI_RUNNING) {
        ki_prefix_offer(&s->prefixes, c, true);
        ki_leave(s, c);
    }
    c->state = KI_DONE;
    *(why == KIVI_FINISH_STOP ? &s->counts.n_stop : &s->counts.n_length) += 1;
    tell(s, q, &e);
    if (--q->n_open == 0) ki_end_request(s, q, KIVI_OK, "");
}

/* ---- the next token ---- */

/* What a row of the last pass says: its logits are fetched when somebody looks at them; the largest
 * is known already where a device has looked, and the next token of the choice whose row it is
 * where a device has drawn (else -1). */
typedef struct outcome {
    uint32_t row;
    int32_t best, drawn;
} outcome;

static kivi_status choose(int32_t *token, const float **logits, kivi_scheduler *s,
                          const ki_choice *c, outcome said, kivi_error *err) {
    *logits = NULL;
    *token = said.best;
    if (said.best >= 0 && ki_takes_best(c) && c->request->r.logprobs < 0) return KIVI_OK;
    *token = said.drawn;
    if (said.drawn >= 0) return KIVI_OK;
    *logits = s->machine.logits(s->machine.self, said.row);
    if (!*logits) return KI_FAIL(err, DEVICE, "the device does not give its logits");
    return ki_choose(token, &s->chooser, c, *logits, err);
}

static void advance(kivi_scheduler *s, ki_choice *c, outcome said) {
    ki_request *q = c->request;
    kivi_error err = {0};
    const float *logits;
    int32_t token;
    kivi_status status = choose(&token, &logits, s, c, said, &err);
    if (status == KIVI_OK) status = ki_buf_append(&c->generated, &token, sizeof token, &err);
    if (status != KIVI_OK) {
        ki_end_request(s, q, status, err.text);
        return;
    }
    q->timings.n_generated++;
    s->counts.generated_tokens++;
    bool is_end = ki_is_end(&s->machine, q, token), is_full = ki_generated(c) >= q->r.max_tokens;
    bool is_stopped = tell_token(s, c, token, logits, is_end, is_end || is_full);
    if (q->is_cancelled) return;
    if (is_end || is_stopped) finish(s, c, KIVI_FINISH_STOP);
    else if (is_full) finish(s, c, KIVI_FINISH_LENGTH);
}

/* Another choice of the same prompt, on its pages if there are enough for what it will write
 * itself; else it waits and evaluates the prompt again. */
static bool try_fork(kivi_scheduler *s, ki_choice *c, const ki_choice *from) {
    const ki_layout *l = &s->machine.cache->layout;
    uint32_t open = ki_first_unwritten(l, from->seq->n_tokens) / KI_PAGE_TOKENS;
    kivi_seq *seq;
    if (s->n_running == s->o.max_running || !ki_free_pages(s, from->seq->n_pages - open))
        return false;
    if (kivi_seq_fork(&seq, from->seq, NULL) != KIVI_OK) return false;
    ki_join(s, c, seq);
    ki_promise_growth(s, c);
    c->n_offered = from->n_offered;
    if ((c->from = from->from)) c->from->n_in_use++;
    return true;
}

/* The prompt is evaluated: its other choices begin, and all choose from the same logits. */
static void begin_choices(kivi_scheduler *s, ki_choice *first, outcome said) {
    ki_request *q = first->request;
    for (uint32_t i = 1; i < q->r.n; i++) {
        ki_choice *c = &q->choices[i];
        if (!try_fork(s, c, first)) ki_wait(s, c);
    }
    for (uint32_t i = 0; i < q->r.n && !q->is_over && !q->is_cancelled; i++)
        if (q->choices[i].state == KI_RUNNING) {
            advance(s, &q->choices[i], said);
            said.drawn = -1; /* it was the first one's; the others draw from the logits */
        }
}

static void end_prompt(kivi_scheduler *s, ki_choice *c, outcome said) {
    ki_request *q = c->request;
    tell_prompt(s, q);
    if (q->is_cancelled) return;
    if (q->r.max_tokens) {
        begin_choices(s, c, said);
        return;
    }
    for (uint32_t i = 0; i < q->r.n && !q->is_cancelled; i++)
        finish(s, &q->choices[i], KIVI_FINISH_LENGTH);
}

/* ---- log-probabilities of a prompt ---- */

typedef struct score_call {
    ki_request *q;
    const float **rows; /* of positions from first on */
    uint32_t n_vocab, first;
} score_call;

static void score_task(void *context, size_t index, unsigned worker) {
    const score_call *call = context;
    ki_request *q = call->q;
    uint32_t pos = call->first + (uint32_t)index + 1, n_top = (uint32_t)q->r.prompt_logprobs;
    (void)worker;
    ki_logprobs(q->prompt_logprobs + (size_t)pos * (1 + n_top), call->rows[index], call->n_vocab,
                q->r.prompt[pos], n_top);
}

/* The logits of a row speak about the next position; those of the prompt's last row about the first
 * generated token. False: the device does not give them. */
static bool score_prompt(kivi_scheduler *s, ki_request *q, const ki_batch_item *item,
                         uint32_t first) {
    uint32_t end = KI_MIN(first + item->n_rows, (uint32_t)q->r.n_prompt - 1);
    score_call call = {q, s->rows, s->machine.n_vocab, first};
    for (uint32_t i = 0; first + i < end; i++) {
        s->rows[i] = s->machine.logits(s->machine.self, item->logit_row + i);
        if (!s->rows[i]) return false;
    }
    if (end > first) ki_workers_run(s->machine.cache->workers, score_task, &call, end - first);
    q->n_scored = KI_MAX(q->n_scored, end + 1);
    return true;
}

/* ---- the results of a step ---- */

static void count_rows(kivi_scheduler *s, ki_choice *c, uint32_t first, uint32_t n_rows) {
    uint32_t n_again = c->n_before > first ? KI_MIN(c->n_before - first, n_rows) : 0,
             n_prompt = (uint32_t)c->request->r.n_prompt;
    s->counts.recomputed_tokens += n_again;
    if (first < n_prompt) s->counts.computed_prompt_tokens += n_rows;
    c->request->timings.n_computed += n_rows;
}

static void use_result(kivi_scheduler *s, ki_choice *c, const ki_batch_item *item,
                       const kivi_error *err) {
    ki_request *q = c->request;
    uint32_t length = c->seq->n_tokens, first = length - item->n_rows;
    if (item->status != KIVI_OK) {
        ki_end_request(s, q, item->status, err->text);
        return;
    }
    count_rows(s, c, first, item->n_rows);
    if (item->all_logits && !score_prompt(s, q, item, first)) {
        ki_end_request(s, q, KIVI_DEVICE, "the device does not give its logits");
        return;
    }
    if (first < q->r.n_prompt) ki_prefix_offer(&s->prefixes, c, false);
    if (length < ki_known(c)) return;
    s->exact_bytes -= c->exact_bytes; /* the prompt's 16-bit rows are gone, and it has begun */
    c->exact_bytes = 0;
    if (!q->is_told) ki_promise_growth(s, c); /* its forks have promises of their own */
    outcome said = {item->logit_row + (item->all_logits ? item->n_rows - 1 : 0), item->best,
                    item->drawn};
    if (q->is_told) advance(s, c, said);
    else end_prompt(s, c, said);
}

void ki_tell_results(kivi_scheduler *s) {
    uint32_t n = s->n_items;
    s->n_items = 0;
    for (uint32_t i = 0; i < n; i++) { /* first all of the cache, then what callbacks may change */
        ki_choice *c = s->owners[i];
        c->has_item = false;
        if (s->items[i].status == KIVI_OK)
            s->items[i].status = kivi_seq_commit(c->seq, &s->errors[i]);
        else kivi_seq_abort(c->seq);
    }
    for (uint32_t i = 0; i < n; i++) {
        ki_choice *c = s->owners[i];
        if (c->request->is_over || c->request->is_cancelled) continue;
        use_result(s, c, &s->items[i], &s->errors[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        ki_request *q = s->owners[i]->request;
        if (q->is_cancelled) ki_end_request(s, q, KIVI_CANCELLED, "cancelled by its callback");
    }
    s->worked = s->worked || n;
}
