/* plan.c: who runs, with how many rows, and whose pages go when there are none. */
#include "serve.h"

uint32_t ki_pages(const ki_machine *m, uint32_t n_tokens) {
    return ki_layout_pages(&m->cache->layout, n_tokens, m->step_rows);
}

static uint32_t free_pages(const kivi_scheduler *s) { return s->machine.cache->pool.n_free; }

/* ---- the order, the queue, the running ones ---- */

/* By urgency and arrival; the choices of a request one after the other. */
static bool is_before(const ki_choice *a, const ki_choice *b) {
    const ki_request *x = a->request, *y = b->request;
    if (x->order != y->order) return x->order < y->order;
    if (x->id != y->id) return x->id < y->id;
    return a->index < b->index;
}

void ki_wait(kivi_scheduler *s, ki_choice *c) {
    ki_choice *before = s->last_waiting;
    while (before && is_before(c, before)) before = before->prev;
    c->prev = before;
    c->next = before ? before->next : s->first_waiting;
    *(c->next ? &c->next->prev : &s->last_waiting) = c;
    *(c->prev ? &c->prev->next : &s->first_waiting) = c;
    c->state = KI_WAITING;
    s->counts.n_preempted += c->n_preempted > 0;
}

void ki_unwait(kivi_scheduler *s, ki_choice *c) {
    *(c->next ? &c->next->prev : &s->last_waiting) = c->prev;
    *(c->prev ? &c->prev->next : &s->first_waiting) = c->next;
    c->prev = c->next = NULL;
    c->state = KI_UNBORN;
    s->counts.n_preempted -= c->n_preempted > 0;
}

void ki_join(kivi_scheduler *s, ki_choice *c, kivi_seq *seq) {
    uint32_t i = s->n_running++;
    for (; i && is_before(c, s->running[i - 1]); i--) s->running[i] = s->running[i - 1];
    s->running[i] = c;
    c->seq = seq;
    c->state = KI_RUNNING;
}

static void drop_admission(kivi_scheduler *s, ki_choice *c) {
    s->exact_bytes -= c->exact_bytes;
    c->exact_bytes = 0;
    c->n_promised = 0;
}

/* Out of the step that is planned: a request fails as a whole. */
static void remove_item(kivi_scheduler *s, ki_choice *c) {
    uint32_t i = 0, last = --s->n_items;
    while (s->owners[i] != c) i++;
    s->owners[i] = s->owners[last];
    s->items[i] = s->items[last];
    s->errors[i] = s->errors[last];
    s->items[i].err = &s->errors[i];
    c->has_item = false;
}

void ki_leave(kivi_scheduler *s, ki_choice *c) {
    uint32_t i = 0;
    while (s->running[i] != c) i++;
    if (c->has_item) remove_item(s, c);
    s->n_running--;
    memmove(&s->running[i], &s->running[i + 1], (s->n_running - i) * sizeof *s->running);
    drop_admission(s, c);
    kivi_seq_destroy(&c->seq);
    ki_prefix_release(c->from);
    c->from = NULL;
    c->n_offered = 0;
    c->state = KI_UNBORN;
}

void ki_preempt(kivi_scheduler *s, ki_choice *c) {
    c->n_before = KI_MAX(c->n_before, c->seq->n_tokens);
    c->n_preempted++;
    c->request->timings.n_preemptions++;
    s->counts.n_preemptions++;
    ki_leave(s, c);
    ki_wait(s, c);
    pthread_mutex_lock(&s->mutex);
    c->request->shown_state = 'e';
    pthread_mutex_unlock(&s->mutex);
}

/* ---- pages ---- */

static uint32_t see_pages(kivi_scheduler *s, const uint32_t *pages, uint32_t first, uint32_t end) {
    uint32_t n = 0;
    for (uint32_t i = first; i < end; i++) {
        n += !s->page_seen[pages[i]];
        s->page_seen[pages[i]] = 1;
    }
    return n;
}

/* Pages that prefixes nobody runs on hold alone: all of them can be had. */
uint32_t ki_cached_pages(kivi_scheduler *s) {
    const ki_pool *pool = &s->machine.cache->pool;
    uint32_t n_held = 0;
    memset(s->page_seen, 0, pool->n_pages);
    for (uint32_t i = 0; i < s->n_running; i++) {
        const kivi_seq *seq = s->running[i]->seq;
        n_held += see_pages(s, seq->pages, seq->n_gone, seq->n_pages);
    }
    for (const ki_prefix *x = s->prefixes.newest; x; x = x->older)
        if (x->n_in_use) n_held += see_pages(s, x->mark->pages, x->mark->n_gone, x->mark->n_pages);
    return pool->n_pages - pool->n_free - n_held;
}

bool ki_free_pages(kivi_scheduler *s, uint32_t n_pages) {
    if (free_pages(s) >= n_pages) return true;
    if (free_pages(s) + ki_cached_pages(s) < n_pages)
        return false; /* none is given up for nothing */
    while (free_pages(s) < n_pages)
        if (!ki_prefix_evict(&s->prefixes)) return false;
    return true;
}

/* The newest running choice that has no rows in this step, of those that are paused, and that hold
 * 16-bit rows of a prompt, where it says so; NULL: none. */
static ki_choice *newest(const kivi_scheduler *s, bool is_paused, bool is_exact) {
    for (uint32_t i = s->n_running; i-- > 0;) {
        ki_choice *c = s->running[i];
        if (!c->has_item && (!is_paused || c->request->is_paused) && (!is_exact || c->exact_bytes))
            return c;
    }
    return NULL;
}

static uint32_t missing_pages(const ki_choice *c, uint32_t n_rows) {
    uint32_t need = (c->seq->n_tokens + n_rows + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS;
    return need > c->seq->n_pages ? need - c->seq->n_pages : 0;
}

/* Pages for the next rows of a running choice, from prefixes, paused choices and newer ones. False:
 * it was the newest itself, and has given up its own. Those planned before are older. */
static bool make_pages(kivi_scheduler *s, ki_choice *c, uint32_t n_rows) {
    while (!ki_free_pages(s, missing_pages(c, n_rows))) {
        ki_choice *victim = newest(s, true, false);
        if (!victim) victim = newest(s, false, false); /* itself, if there is no newer one */
        if (victim == c && c->from) { /* alone with the prefix it began with: that can go, too */
            ki_prefix_release(c->from);
            c->from = NULL;
            continue;
        }
        ki_preempt(s, victim);
        if (victim == c) return false;
    }
    return true;
}

/* ---- rows of a step ---- */

static bool in_prompt(const ki_choice *c) { return c->seq->run_left > 0; }

static bool generates(const ki_choice *c) {
    return !in_prompt(c) && ki_known(c) - c->seq->n_tokens == 1;
}

/* The prompt's rows are wanted one by one, and not yet known. */
static bool is_scored(const ki_choice *c) {
    const ki_request *q = c->request;
    return q->prompt_logprobs && in_prompt(c) && q->n_scored < q->r.n_prompt;
}

/* A prompt's step ends at a page where that costs little, so that pages of a prefix are shared and
 * not copied; and the last one but one does: the rows that a prefix keeps in 16 bit go with the
 * prompt's end. */
static uint32_t cut_at_page(const kivi_scheduler *s, const ki_choice *c, uint32_t n_rows) {
    uint32_t pos = c->seq->n_tokens, end = pos + n_rows;
    if (!s->prefixes.unit_tokens || !in_prompt(c)) return n_rows;
    uint32_t whole = end / KI_PAGE_TOKENS * KI_PAGE_TOKENS;
    if (whole <= pos) return n_rows;
    bool is_last = end == (uint32_t)c->request->r.n_prompt;
    return is_last || whole - pos >= n_rows / 2 ? whole - pos : n_rows;
}

static uint32_t rows_of(const kivi_scheduler *s, const ki_choice *c) {
    uint32_t left = s->rows_left - KI_MIN(s->rows_left, s->rows_kept);
    if (generates(c)) return KI_MIN(s->rows_left, 1u);
    uint32_t n = in_prompt(c) ? c->seq->run_left : ki_known(c) - c->seq->n_tokens;
    n = KI_MIN(n, left);
    if (is_scored(c)) n = KI_MIN(n, s->echo_left + 1);
    return n ? cut_at_page(s, c, n) : 0;
}

static const int32_t *tokens_of(const ki_choice *c) {
    uint32_t pos = c->seq->n_tokens, n_prompt = (uint32_t)c->request->r.n_prompt;
    return pos < n_prompt ? c->request->r.prompt + pos : ki_generated_ids(c) + (pos - n_prompt);
}

/* The draw of the token that follows the item's last row, where that row is the last one known. */
static const ki_draw *draw_for(kivi_scheduler *s, const ki_choice *c, uint32_t n_rows) {
    ki_draw *draw = &s->draws[s->n_items];
    if (!s->draws || c->seq->n_tokens + n_rows < ki_known(c) || !c->request->r.max_tokens)
        return NULL;
    if (!ki_plan_draw(draw, s->edits + s->n_edits, KI_DRAW_EDITS - s->n_edits, &s->chooser, c))
        return NULL;
    s->n_edits += draw->n_edits;
    return draw;
}

/* Puts rows of a running choice into the step. False: it runs no longer. */
static bool add_item(kivi_scheduler *s, ki_choice *c) {
    uint32_t n_rows = rows_of(s, c), i = s->n_items;
    if (n_rows == 0) return true; /* the budget is used up: the next step */
    if (!make_pages(s, c, n_rows)) return false;
    bool one = generates(c), scored = is_scored(c);
    s->errors[i] = (kivi_error){0};
    kivi_status status = kivi_seq_begin(c->seq, n_rows, &s->errors[i]);
    if (status != KIVI_OK) { /* no memory for the 16-bit rows of a prompt */
        ki_end_request(s, c->request, status, s->errors[i].text);
        return false;
    }
    s->items[i] = (ki_batch_item){.seq = c->seq,
                                  .tokens = tokens_of(c),
                                  .n_rows = n_rows,
                                  .all_logits = scored,
                                  .draw = draw_for(s, c, n_rows),
                                  .err = &s->errors[i]};
    s->owners[s->n_items++] = c;
    c->has_item = true;
    s->rows_left -= n_rows;
    s->rows_kept -= one && s->rows_kept;
    if (scored) s->echo_left -= n_rows - 1;
    *(one ? &s->report.n_decode_rows : &s->report.n_prompt_rows) += n_rows;
    return true;
}

/* ---- admission ---- */

uint64_t ki_exact_bytes(const kivi_scheduler *s, uint32_t n_prompt_rows, uint32_t n_rows) {
    const ki_layout *l = &s->machine.cache->layout;
    /* a sequence makes room for the largest step that the cache takes (cache.h) */
    uint64_t step = KI_MIN(n_rows, s->machine.cache->max_step_rows), rows = step;
    if (l->kv.rule == KIVI_RULE_PAPER) rows = KI_MAX(n_prompt_rows, step);
    if (l->kv.rule == KIVI_RULE_SPAN)
        rows = KI_MAX(KI_MIN(n_prompt_rows, l->kv.span_tokens + step), step);
    rows += l->kv.residual_tokens + l->kv.rewind_tokens;
    uint64_t n_blocks = (rows + l->block_tokens - 1) / l->block_tokens + 1,
             n_sides = (uint64_t)(l->kv.k_bits < 16) + (l->kv.v_bits < 16);
    return n_blocks * n_sides * l->n_layers * l->n_kv_heads * l->block_tokens * l->head_dim * 2;
}

static uint64_t exact_bytes_of(const kivi_scheduler *s, const ki_choice *c, const ki_prefix *from) {
    uint32_t begin = from ? from->mark->n_tokens : 0, n_prompt = (uint32_t)c->request->r.n_prompt;
    return ki_exact_bytes(s, n_prompt - KI_MIN(n_prompt, begin), ki_known(c) - begin);
}

/* Choices that will fork from this one when its prompt is done. */
static uint32_t forks_of(const kivi_scheduler *s, const ki_choice *c) {
    const ki_request *q = c->request;
    if (c->index || q->is_told || q->r.max_tokens == 0) return 0;
    return KI_MIN(q->r.n, s->o.max_running) - 1;
}

/* Tokens to generate for a while: a choice that was preempted asks for more each time, so that it
 * does not come and go. */
static uint32_t growth_of(const ki_choice *c) {
    uint32_t left = c->request->r.max_tokens - ki_generated(c);
    return KI_MIN(left, (uint32_t)KI_PAGE_TOKENS << KI_MIN(c->n_preempted, 6u));
}

void ki_promise_growth(const kivi_scheduler *s, ki_choice *c) {
    c->n_promised = ki_pages(&s->machine, ki_known(c) + growth_of(c));
}

/* Pages for all that is known, and to go on, of its forks too; less those of the prefix. */
static uint32_t pages_wanted(const kivi_scheduler *s, const ki_choice *c, const ki_prefix *from) {
    const ki_machine *m = &s->machine;
    uint32_t growth = growth_of(c), n_prompt = (uint32_t)c->request->r.n_prompt;
    uint32_t n = ki_pages(m, ki_known(c) + growth);
    uint32_t open = ki_first_unwritten(&m->cache->layout, n_prompt) / KI_PAGE_TOKENS;
    uint32_t own = (n_prompt + growth + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS - open;
    n = KI_MIN(n + forks_of(s, c) * own, m->cache->pool.n_pages);
    uint32_t shared = from ? from->mark->n_pages - from->mark->n_gone : 0;
    if (from) shared -= KI_MIN(shared, ki_mark_open_pages(from->mark));
    return n > shared ? n - shared : 0;
}

/* Free pages that running choices were promised. */
static uint32_t promised_pages(const kivi_scheduler *s) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->n_running; i++) {
        const ki_choice *c = s->running[i];
        uint32_t held = c->seq->n_pages - c->seq->n_gone;
        n += c->n_promised > held ? c->n_promised - held : 0;
    }
    return n;
}

/* Makes room for n_pages and the bytes beside what is promised; false: not now. */
static bool make_way(kivi_scheduler *s, uint32_t n_pages, uint64_t exact_bytes) {
    for (;;) {
        bool fits = s->exact_bytes + exact_bytes <= s->o.exact_bytes;
        if (fits && ki_free_pages(s, promised_pages(s) + n_pages)) return true;
        ki_choice *paused = newest(s, true, !fits);
        if (!paused) return false;
        ki_preempt(s, paused);
    }
}

static kivi_status start(kivi_scheduler *s, ki_choice *c, ki_prefix *from, kivi_error *err) {
    kivi_seq *seq;
    uint32_t n_prompt = (uint32_t)c->request->r.n_prompt;
    if (from) KI_TRY(ki_mark_open(&seq, from->mark, err));
    else KI_TRY(kivi_seq_create(&seq, s->machine.cache, err));
    kivi_status status = KIVI_OK;
    if (seq->n_tokens < n_prompt)
        status = kivi_seq_begin_prompt(seq, n_prompt - seq->n_tokens, err);
    if (status != KIVI_OK) {
        kivi_seq_destroy(&seq);
        return status;
    }
    ki_unwait(s, c);
    ki_join(s, c, seq);
    c->from = from;
    c->n_offered = from ? from->mark->n_tokens / KI_PAGE_TOKENS * KI_PAGE_TOKENS : 0;
    return KIVI_OK;
}

static void note_admission(kivi_scheduler *s, ki_choice *c) {
    ki_request *q = c->request;
    s->worked = true;
    if (q->is_admitted) return;
    pthread_mutex_lock(&s->mutex);
    ki_unqueue(s, q);
    pthread_mutex_unlock(&s->mutex);
    q->is_admitted = true;
    s->counts.n_running++;
    q->timings.admitted_us = s->machine.now_us(s->machine.self);
    q->timings.n_cached = KI_MIN(c->seq->n_tokens, (uint32_t)q->r.n_prompt);
    s->counts.prompt_tokens += q->r.n_prompt;
    if (!s->prefixes.unit_tokens) return;
    s->counts.prefix_queries += q->r.n_prompt;
    s->counts.prefix_hits += q->timings.n_cached;
}

/* False: it must wait, and all behind it. */
static bool try_admit(kivi_scheduler *s, ki_choice *c) {
    const ki_request *q = c->request;
    bool whole = q->prompt_logprobs && !q->is_told; /* each row of the prompt is wanted */
    ki_prefix *from = whole ? NULL : ki_prefix_find(&s->prefixes, c);
    uint64_t exact = exact_bytes_of(s, c, from);
    uint32_t n_pages = pages_wanted(s, c, from);
    bool fits = make_way(s, n_pages, exact);
    if (!fits && from && s->n_running == 0) { /* even the prefix is in its way */
        ki_prefix_release(from);
        from = NULL;
        exact = exact_bytes_of(s, c, NULL);
        n_pages = pages_wanted(s, c, NULL);
        fits = make_way(s, n_pages, exact);
    }
    if (!fits) {
        ki_prefix_release(from);
        return false;
    }
    kivi_error err = {0};
    kivi_status status = start(s, c, from, &err);
    if (status != KIVI_OK) {
        ki_prefix_release(from);
        if (status != KIVI_FULL) ki_end_request(s, c->request, status, err.text);
        return status != KIVI_FULL;
    }
    c->n_promised = n_pages + (from ? from->mark->n_pages - ki_mark_open_pages(from->mark) : 0);
    c->exact_bytes = exact;
    s->exact_bytes += exact;
    note_admission(s, c);
    return true;
}

static ki_choice *first_to_admit(const kivi_scheduler *s) {
    ki_choice *c = s->first_waiting;
    while (c && c->request->is_paused) c = c->next;
    return c;
}

static void admit(kivi_scheduler *s) {
    for (ki_choice *c; s->rows_left && (c = first_to_admit(s));) {
        if (s->n_running == s->o.max_running) {
            ki_choice *paused = newest(s, true, false);
            if (!paused) return;
            ki_preempt(s, paused);
        }
        if (!try_admit(s, c)) return;
        if (c->state == KI_RUNNING) add_item(s, c);
    }
}

/* ---- a step ---- */

bool ki_can_work(const kivi_scheduler *s) {
    for (uint32_t i = 0; i < s->n_running; i++)
        if (!s->running[i]->request->is_paused) return true;
    return first_to_admit(s) != NULL;
}

void ki_plan(kivi_scheduler *s) {
    uint32_t n_generating = 0;
    s->report = (kivi_step_report){0};
    s->n_edits = 0;
    s->echo_left = s->machine.logit_rows - s->o.max_running;
    for (uint32_t i = 0; i < s->n_running; i++)
        n_generating += !s->running[i]->request->is_paused && generates(s->running[i]);
    s->rows_left = s->o.step_tokens;
    s->rows_kept = n_generating; /* so many of them are not for prompts */
    for (uint32_t i = 0; i < s->n_running;) {
        ki_choice *c = s->running[i];
        if (c->request->is_paused || c->has_item || add_item(s, c)) {
            while (s->running[i] != c) i--; /* paused ones before it may have gone */
            i++;
        } else i = 0; /* it has gone, and maybe others of its request */
    }
    s->rows_kept = 0;
    admit(s);
}
