/* The scheduler, one promise at a time, over a model without weights (sched_fake.h). */
#include "sched_tale.h"

/* ---- refusals ---- */

static void refused(const kivi_request *r, kivi_status expected, const char *name,
                    const char *words) {
    kivi_request_id id;
    const char *param = "?";
    kivi_status status = kivi_scheduler_submit(&id, &param, s, r, &err);
    if (status != expected) fail_msg("%s: %s", name ? name : "", kivi_status_name(status));
    if (name) assert_string_equal(param, name);
    else assert_null(param);
    for (const char *p = words; *p;) {
        char word[64];
        size_t n = strcspn(p, "|");
        snprintf(word, sizeof word, "%.*s", (int)n, p);
        if (!strstr(err.text, word)) fail_msg("no '%s' in: %s", word, err.text);
        p += n + (p[n] == '|');
    }
}

#define WITH(change, name, words)                                                                  \
    do {                                                                                           \
        kivi_request r = t->r;                                                                     \
        change;                                                                                    \
        refused(&r, KIVI_ARG, name, words);                                                        \
    } while (0)

static void test_refusals(void **state) {
    (void)state;
    fo.n_pages = 6;
    begin();
    tale *t = make(1, 100, 10);
    int32_t bad[] = {3, FAKE_VOCAB}, many[KIVI_MAX_STOP_IDS + 1] = {0};
    kivi_bias bias = {1, 101};
    WITH(r.n_prompt = 0, "prompt", "no tokens");
    WITH((r.prompt = bad, r.n_prompt = 2), "prompt", "24|0 to 23");
    WITH(r.max_tokens = 1000, "max_tokens", "1000|100|1024|924");
    WITH(r.max_tokens = 800, "max_tokens", "100|800|8 pages|6");
    WITH(r.min_tokens = 11, "min_tokens", "11|10");
    WITH(r.n = 0, "n", "0|1 to 128");
    WITH(r.n = 1000000000, "n", "128");
    WITH(r.temperature = -1, "temperature", "-1");
    WITH(r.temperature = 0.0f / 0.0f, "temperature", "nan");
    WITH(r.temperature = 1e30f, "temperature", "100");
    WITH(r.top_p = 0, "top_p", "0");
    WITH(r.top_p = 2, "top_p", "2");
    WITH(r.min_p = 2, "min_p", "2");
    WITH(r.presence_penalty = 3, "presence_penalty", "-2 to 2");
    WITH(r.frequency_penalty = -3, "frequency_penalty", "-2 to 2");
    WITH(r.repetition_penalty = 0, "repetition_penalty", "0");
    WITH((r.biases = &bias, r.n_biases = 1), "logit_bias", "101");
    WITH((r.biases = &bias, r.n_biases = 5000), "logit_bias", "5000|4096");
    WITH((r.stop_ids = bad, r.n_stop_ids = 2), "stop_token_ids", "24");
    WITH((r.stop_ids = many, r.n_stop_ids = KIVI_MAX_STOP_IDS + 1), "stop_token_ids", "65|64");
    WITH(r.logprobs = 1000000, "logprobs", "1000000|64");
    WITH(r.prompt_logprobs = -2, "prompt_logprobs", "-2");
    WITH((r.salt = "x", r.n_salt_bytes = 257), "cache_salt", "257|256");
    WITH(r.on_event = NULL, NULL, "callback");
    assert_int_equal(stats().n_refused, 24);
    assert_int_equal(stats().n_submitted, 0);
    t->r.max_tokens = UINT32_MAX; /* what the context leaves does not fit the pool */
    refused(&t->r, KIVI_ARG, "max_tokens", "924|8 pages|6");
    end();
    free(t);
}

static void test_queue_full(void **state) {
    (void)state;
    so.max_queued = 3;
    so.max_queued_tokens = 500;
    begin();
    tale *a = send(make(1, 200, 1)), *b = send(make(2, 200, 1)), *c = make(3, 200, 1);
    refused(&c->r, KIVI_FULL, NULL, "2 requests of 3|400 tokens of 500");
    tale *d = send(make(4, 10, 1)), *e = make(5, 1, 1);
    refused(&e->r, KIVI_FULL, NULL, "3 requests of 3");
    assert_int_equal(stats().n_waiting, 3);
    assert_int_equal(stats().waiting_tokens, 410);
    run();
    assert_int_equal(stats().n_queue_full, 2);
    send(c); /* there is room again, and for one prompt of any size in an empty queue */
    run();
    kivi_scheduler_drain(s);
    refused(&e->r, KIVI_CANCELLED, NULL, "drains");
    tale *all[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) check_answer(all[i]), free(all[i]);
    free(e);
    end();
}

/* ---- steps ---- */

/* While a long prompt is evaluated everybody who generates gets a token in each step. */
static void test_long_prompt(void **state) {
    (void)state;
    so.step_tokens = 64;
    begin();
    tale *a = send(make(1, 20, 40)), *b = send(make(2, 30, 40));
    while (!a->n_told[0] || !b->n_told[0]) step();
    tale *c = send(make(3, 900, 5));
    uint32_t n_steps = 0;
    while (!c->n_prompts) {
        uint32_t before_a = a->n_told[0], before_b = b->n_told[0];
        step();
        n_steps++;
        assert_int_equal(a->n_told[0], before_a + 1);
        assert_int_equal(b->n_told[0], before_b + 1);
        assert_true(stats().last_step.n_rows <= 64);
        assert_int_equal(stats().last_step.n_decode_rows, 2);
    }
    assert_true(n_steps >= 15 && n_steps <= 16); /* 62 rows for the prompt in each */
    run();
    tale *all[] = {a, b, c};
    for (int i = 0; i < 3; i++) check_answer(all[i]), free(all[i]);
    end();
}

static void test_order(void **state) {
    (void)state;
    so.max_running = 1;
    so.ageing_ms = 1;
    begin();
    tale *a = send(make(1, 20, 3)), *b = make(2, 20, 3), *c = make(3, 20, 3), *d = make(4, 20, 3);
    step();
    b->r.priority = 2, c->r.priority = -1;
    send(b), send(c);
    f.now_us += 3001; /* later than b by more than two steps of priority weigh */
    send(d);
    run();
    assert_true(a->ended_at < c->ended_at && c->ended_at < b->ended_at);
    assert_true(b->ended_at < d->ended_at);
    tale *all[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) check_answer(all[i]), free(all[i]);
    end();
}

/* ---- pages ---- */

static void test_preempts_newest(void **state) {
    (void)state;
    fo.n_pages = 6;
    so.no_prefix_cache = true;
    begin();
    tale *a = send(make(1, 120, 300)), *b = send(make(2, 120, 300)), *c = send(make(3, 120, 300));
    run();
    assert_int_equal(a->timings.n_preemptions, 0);
    assert_true(c->timings.n_preemptions > 0);
    assert_true(a->ended_at < b->ended_at && stats().recomputed_tokens > 0);
    assert_int_equal(stats().pages_free, 6);
    tale *all[] = {a, b, c};
    for (int i = 0; i < 3; i++) check_answer(all[i]), free(all[i]);
    end();
}

static void test_forks(void **state) {
    (void)state;
    so.no_prefix_cache = true;
    begin();
    tale *t = make(1, 700, 20);
    t->r.n = 8;
    t->r.temperature = 1;
    send(t);
    while (t->n_told[7] < 2) step();
    /* 5 pages are full in keys and values, the sixth and the open one are each choice's own */
    assert_int_equal(stats().pages_shared, 4);
    assert_int_equal(stats().pages_used, 4 + 8 * 2);
    run();
    assert_int_equal(t->timings.n_computed, 700 + 8 * 19);
    assert_int_equal(t->timings.n_generated, 8 * 20);
    check_answer(t);
    assert_memory_not_equal(t->tokens[0], t->tokens[1], 20 * sizeof(int32_t));
    free(t);
    end();
}

/* More choices than sequences and pages: the others come one after the other. */
static void test_many_choices(void **state) {
    (void)state;
    fo.n_pages = 5, fo.max_items = 3;
    begin();
    tale *t = make(1, 300, 10);
    t->r.n = 20;
    t->r.temperature = 1;
    send(t);
    run();
    check_answer(t);
    free(t);
    end();
}

/* ---- ends ---- */

static void test_cancel(void **state) {
    (void)state;
    so.max_running = 1;
    begin();
    tale *a = send(make(1, 200, 50)), *b = send(make(2, 200, 50));
    while (!a->n_told[0]) step();
    uint32_t told = a->n_told[0];
    kivi_scheduler_cancel(s, a->id);
    kivi_scheduler_cancel(s, b->id);
    kivi_scheduler_cancel(s, 12345); /* nobody */
    step();
    assert_true(a->n_ends == 1 && a->status == KIVI_CANCELLED && a->n_told[0] == told);
    assert_true(b->n_ends == 1 && b->status == KIVI_CANCELLED && b->n_prompts == 0);
    assert_int_equal(b->timings.n_computed, 0); /* it was never begun */
    assert_int_equal(b->timings.admitted_us, 0);
    assert_int_equal(stats().n_sequences, 0);
    kivi_scheduler_cancel(s, a->id);
    assert_int_equal(stats().pages_used, stats().pages_cached);
    run();
    free(a), free(b);
    end();
}

static void test_timeout(void **state) {
    (void)state;
    begin();
    tale *a = make(1, 200, 500), *b = send(make(2, 10, 3));
    a->r.timeout_ms = 5;
    send(a);
    step();
    f.now_us += 5000;
    step();
    assert_true(a->n_ends == 1 && a->status == KIVI_CANCELLED);
    assert_non_null(strstr(a->error, "time"));
    run();
    check_answer(b);
    free(a), free(b);
    end();
}

static kivi_verdict stop_at_3(tale *t, const kivi_event *e) {
    return e->kind == KIVI_EVENT_TOKEN && t->n_told[e->choice] == 3 ? KIVI_END_CHOICE : KIVI_GO_ON;
}
static kivi_verdict cancel_at_3(tale *t, const kivi_event *e) {
    return e->kind == KIVI_EVENT_TOKEN && t->n_told[e->choice] == 3 ? KIVI_CANCEL : KIVI_GO_ON;
}

static void test_verdicts(void **state) {
    (void)state;
    begin();
    tale *a = make(1, 50, 30), *b = make(2, 50, 30);
    a->then = stop_at_3, a->r.n = 2;
    b->then = cancel_at_3;
    send(a), send(b);
    run();
    assert_true(a->status == KIVI_OK && a->n_told[0] == 3 && a->n_told[1] == 3);
    assert_true(a->finish[0] == KIVI_FINISH_STOP && a->n_choices == 2);
    assert_true(b->status == KIVI_CANCELLED && b->n_told[0] == 3 && b->n_choices == 0);
    free(a), free(b);
    end();
}

/* Work from within a callback: the next request, and the end of a neighbour. */
static tale *chained, *neighbour;
static kivi_verdict chain(tale *t, const kivi_event *e) {
    (void)t;
    if (e->kind != KIVI_EVENT_END) return KIVI_GO_ON;
    send(chained);
    kivi_scheduler_cancel(s, neighbour->id);
    kivi_scheduler_cancel(s, e->id);
    return KIVI_CANCEL; /* means nothing at the end */
}

static void test_reentry(void **state) {
    (void)state;
    begin();
    tale *a = make(1, 50, 3);
    neighbour = make(2, 50, 500), chained = make(3, 50, 3);
    a->then = chain;
    send(neighbour), send(a);
    run();
    check_answer(a), check_answer(chained);
    assert_int_equal(neighbour->status, KIVI_CANCELLED);
    free(a), free(neighbour), free(chained);
    end();
}

static void test_destroy_midway(void **state) {
    (void)state;
    so.max_running = 1;
    begin();
    tale *a = send(make(1, 200, 50)), *b = send(make(2, 200, 50)), *c;
    while (!a->n_told[0]) step();
    c = send(make(3, 10, 5)); /* the owner has not seen it yet */
    end();
    assert_true(a->n_ends == 1 && b->n_ends == 1 && c->n_ends == 1);
    assert_int_equal(c->status, KIVI_CANCELLED);
    free(a), free(b), free(c);
}

static void test_prompt_only(void **state) {
    (void)state;
    begin();
    tale *t = make(1, 300, 0);
    t->r.n = 3;
    t->r.prompt_logprobs = 2;
    send(t);
    run();
    assert_true(t->n_prompts == 1 && t->n_choices == 3 && t->n_told[0] == 0);
    assert_int_equal(t->finish[2], KIVI_FINISH_LENGTH);
    check_answer(t);
    free(t);
    end();
}

/* ---- pause ---- */

static void test_pause(void **state) {
    (void)state;
    fo.n_pages = 6;
    so.no_prefix_cache = true;
    begin();
    tale *a = send(make(1, 300, 20)), *b;
    while (!a->n_told[0]) step();
    kivi_scheduler_pause(s, a->id);
    uint32_t told = a->n_told[0];
    assert_false(step());
    assert_int_equal(stats().n_paused, 1);
    assert_int_equal(stats().n_sequences, 1); /* it keeps its pages */
    b = send(make(2, 500, 20));               /* until somebody needs them */
    run();
    check_answer(b);
    assert_int_equal(a->n_told[0], told);
    assert_true(stats().n_preempted == 1 && stats().pages_free == 6);
    kivi_scheduler_resume(s, a->id);
    run();
    assert_int_equal(stats().n_paused, 0);
    check_answer(a);
    free(a), free(b);
    end();
}

/* ---- the paper's exact rows ---- */

/* Two long prompts whose 16-bit rows together exceed the limit come one after the other; short ones
 * go on beside them. */
static void test_exact_rows(void **state) {
    (void)state;
    fo.kv.rule = KIVI_RULE_PAPER;
    fo.step_rows = 64;
    begin();
    uint64_t limit = stats().exact_bytes_limit;
    tale *a = send(make(1, 800, 3)), *b = send(make(2, 800, 3));
    step();
    assert_true(stats().exact_bytes > 0 && stats().exact_bytes <= limit);
    assert_int_equal(stats().n_sequences, 1);
    while (!a->n_prompts) {
        assert_int_equal(stats().n_sequences, 1);
        step();
    }
    run();
    check_answer(a), check_answer(b);
    assert_int_equal(stats().exact_bytes, 0);
    end();
    so.exact_bytes = limit / 2;
    begin();
    refused(&a->r, KIVI_ARG, "prompt", "800 tokens need|at most");
    free(a), free(b);
    end();
}

/* ---- constraints ---- */

static kivi_status allow_nothing(void *user, uint32_t choice, const int32_t *ids, uint32_t n,
                                 uint32_t *allowed, kivi_error *e) {
    (void)user, (void)choice, (void)ids, (void)e;
    allowed[0] = n < 2 ? 1u << 7 : 0;
    return KIVI_OK;
}
static kivi_status fail_at_2(void *user, uint32_t choice, const int32_t *ids, uint32_t n,
                             uint32_t *allowed, kivi_error *e) {
    (void)user, (void)choice, (void)ids;
    allowed[0] = 1u << 7;
    return n < 2 ? KIVI_OK : KI_FAIL(e, UNSUPPORTED, "no such schema");
}

static void test_constraint(void **state) {
    (void)state;
    begin();
    tale *a = make(1, 50, 10), *b = make(2, 50, 10), *c = send(make(3, 50, 10));
    a->r.constraint.mask = allow_nothing;
    b->r.constraint.mask = fail_at_2;
    send(a), send(b);
    run();
    assert_true(a->status == KIVI_INTERNAL && a->n_told[0] == 2 && a->tokens[0][1] == 7);
    assert_true(b->status == KIVI_UNSUPPORTED && !strcmp(b->error, "no such schema"));
    check_answer(c);
    assert_int_equal(stats().n_failed, 2);
    free(a), free(b), free(c);
    end();
}

/* End tokens wait for min_tokens, unless nothing else may come. */
static kivi_status allow_end(void *user, uint32_t choice, const int32_t *ids, uint32_t n,
                             uint32_t *allowed, kivi_error *e) {
    (void)user, (void)choice, (void)ids, (void)e;
    allowed[0] = n < 3 ? 1u << 7 | 1u << FAKE_END : 1u << FAKE_END;
    return KIVI_OK;
}

static void test_min_tokens(void **state) {
    (void)state;
    begin();
    tale *t = make(1, 50, 10);
    kivi_bias bias = {FAKE_END, 100};
    t->r.ignore_eos = false;
    t->r.min_tokens = 8;
    t->r.biases = &bias, t->r.n_biases = 1;
    t->r.constraint.mask = allow_end;
    send(t);
    run();
    assert_int_equal(t->n_told[0], 4);
    assert_true(t->tokens[0][2] == 7 && t->tokens[0][3] == FAKE_END);
    assert_int_equal(t->finish[0], KIVI_FINISH_STOP);
    check_answer(t);
    free(t);
    end();
}

/* ---- what others see ---- */

static void test_health(void **state) {
    (void)state;
    kivi_scheduler_health h;
    begin();
    kivi_scheduler_health_get(&h, s);
    assert_true(h.accepts && !h.stalled && h.progress_us == 0);
    f.now_us += 60000000; /* nothing to do for a minute is no stall */
    tale *t = send(make(1, 50, 10));
    kivi_scheduler_health_get(&h, s);
    assert_false(h.stalled);
    f.now_us += 11000000; /* nobody steps */
    kivi_scheduler_health_get(&h, s);
    assert_true(h.stalled && h.progress_us > 10000000);
    char text[600], cut[40];
    size_t n = kivi_scheduler_describe(text, sizeof text, s);
    assert_int_equal(n, strlen(text));
    assert_non_null(strstr(text, "request 1: waiting, 0 rows of a prompt of 50"));
    assert_int_equal(kivi_scheduler_describe(cut, sizeof cut, s), n);
    assert_int_equal(strlen(cut), sizeof cut - 1);
    assert_memory_equal(cut, text, sizeof cut - 1);
    step();
    kivi_scheduler_health_get(&h, s);
    assert_false(h.stalled);
    kivi_scheduler_pause(s, t->id); /* nor is a request that waits for its reader */
    step();
    f.now_us += 60000000;
    kivi_scheduler_health_get(&h, s);
    assert_false(h.stalled);
    kivi_scheduler_drain(s);
    kivi_scheduler_resume(s, t->id);
    MUST(kivi_scheduler_run(s, &err));
    kivi_scheduler_health_get(&h, s);
    assert_true(!h.accepts && !h.stalled);
    check_answer(t);
    free(t);
    end();
}

/* ---- memory ---- */

static void test_options(void **state) {
    (void)state;
    fake_create(&f, &fo);
    so.step_tokens = 1000;
    assert_int_equal(ki_scheduler_create(&s, &f.machine, &so, &err), KIVI_ARG);
    assert_null(s);
    so.step_tokens = 4, so.max_running = 5;
    assert_int_equal(ki_scheduler_create(&s, &f.machine, &so, &err), KIVI_ARG);
    assert_non_null(strstr(err.text, "5 sequences"));
    fake_destroy(&f);
}

/* Each allocation fails once, and all after it: nothing is lost, every request that was taken ends,
 * and afterwards the next one succeeds. */
static void sweep_allocations(uint32_t n_pages, uint32_t max_tokens, int64_t expected) {
    fo.n_pages = n_pages;
    fake_create(&f, &fo);
    uint64_t before = atomic_load(&f.cache->mem->n_blocks);
    bool went_through = false;
    int64_t n = 0;
    while (!went_through) {
        tale *a = make(1, 400, max_tokens), *b = make(1, 300, 5);
        a->r.n = 3, b->r.prompt_logprobs = 1;
        atomic_store(&f.cache->mem->fail_countdown, ++n);
        bool made = ki_scheduler_create(&s, &f.machine, &so, &err) == KIVI_OK;
        bool sent_a = made && kivi_scheduler_submit(&a->id, NULL, s, &a->r, &err) == KIVI_OK;
        bool sent_b = made && kivi_scheduler_submit(&b->id, NULL, s, &b->r, &err) == KIVI_OK;
        if (made) run();
        assert_int_equal(a->n_ends, sent_a);
        assert_int_equal(b->n_ends, sent_b);
        went_through = atomic_load(&f.cache->mem->fail_countdown) > 0;
        atomic_store(&f.cache->mem->fail_countdown, -1);
        if (sent_a && a->status == KIVI_OK) check_answer(a);
        if (made) {
            tale *c = send(make(2, 200, 3));
            run();
            check_answer(c);
            free(c);
            kivi_scheduler_destroy(&s);
        }
        assert_int_equal(atomic_load(&f.cache->mem->n_blocks), before);
        assert_int_equal(f.cache->pool.n_free, f.cache->pool.n_pages);
        free(a), free(b);
    }
    print_message("%lld allocations\n", (long long)n);
    assert_true(n > expected);
    fake_destroy(&f);
}

/* A choice fails while another one of its request has rows in the step that is planned. */
static void test_sibling_fails(void **state) {
    (void)state;
    bool failed = false, went_through = false;
    so.no_prefix_cache = true;
    for (int64_t n = 1; !went_through; n++) {
        begin();
        tale *t = make(1, 400, 300), *other = send(make(2, 30, 40));
        t->r.n = 2;
        send(t);
        while (t->n_told[1] < 3) step();
        ki_choice *second = s->running[s->n_running - 1];
        assert_int_equal(second->index, 1);
        ki_preempt(s, second);
        atomic_store(&f.cache->mem->fail_countdown, n);
        step();
        went_through = atomic_load(&f.cache->mem->fail_countdown) > 0;
        atomic_store(&f.cache->mem->fail_countdown, -1);
        failed = failed || t->status == KIVI_NOMEM;
        run();
        if (t->status != KIVI_NOMEM) check_answer(t);
        check_answer(other);
        free(t), free(other);
        end();
    }
    assert_true(failed);
}

static void test_allocations(void **state) {
    (void)state;
    sweep_allocations(32, 20, 50);
    sweep_allocations(8, 200, 70); /* choices are preempted, too */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        UNIT(test_refusals),     UNIT(test_queue_full),      UNIT(test_long_prompt),
        UNIT(test_order),        UNIT(test_preempts_newest), UNIT(test_forks),
        UNIT(test_many_choices), UNIT(test_cancel),          UNIT(test_timeout),
        UNIT(test_verdicts),     UNIT(test_reentry),         UNIT(test_destroy_midway),
        UNIT(test_prompt_only),  UNIT(test_pause),           UNIT(test_exact_rows),
        UNIT(test_constraint),   UNIT(test_min_tokens),      UNIT(test_health),
        UNIT(test_options),      UNIT(test_sibling_fails),   UNIT(test_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
