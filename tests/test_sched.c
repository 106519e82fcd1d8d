/* The scheduler over a model without weights: a million random steps for each seed. Requests
 * arrive, fork, are cancelled, paused, preempted and too late; prefixes are found and evicted.
 * Every token told is that of the request alone, every request ends exactly once, work that can be
 * done is done, and at the end no page and no block of memory is missing. */
#include "sched_fake.h"

static kivi_error err;

static bool is_slow(void) { return getenv("KIVI_TEST_UNDER") != NULL; }

/* ---- random numbers ---- */

static uint64_t rng;
static uint64_t next_random(void) {
    rng += 0x9e3779b97f4a7c15u;
    uint64_t z = (rng ^ rng >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
static uint32_t below(uint32_t n) { return (uint32_t)(next_random() % n); }
static uint32_t between(uint32_t low, uint32_t high) { return low + below(high - low + 1); }
static bool one_in(uint32_t n) { return below(n) == 0; }

/* ---- requests under way ---- */

enum { MAX_LIVE = 48, MAX_N = 4, CTX = 640, N_TOPICS = 4 };

typedef struct job {
    kivi_request_id id;
    kivi_request r;
    int32_t prompt[CTX];
    kivi_bias biases[2];
    int32_t stops[2];
    char salt[4];
    kivi_logprob *prompt_logprobs;
    answer answers[MAX_N];
    bool prompt_fails;
    uint32_t n_told[MAX_N];
    bool is_done[MAX_N], is_stopped[MAX_N];
    bool is_live, is_told, may_end, asked_pause, is_paused;
    uint64_t ended_after; /* steps */
} job;

typedef struct world {
    fake f;
    kivi_scheduler *s;
    ki_chooser chooser;
    job jobs[MAX_LIVE];
    int32_t topics[N_TOPICS][CTX]; /* what prompts begin with */
    uint64_t n_ended, n_cancelled, n_failed, n_tokens, n_submitted, n_idle;
    bool calm; /* no more arrivals, pauses and verdicts */
} world;

static world *w;

/* Every second token from a set that turns with the position. */
static kivi_status mask(void *user, uint32_t choice, const int32_t *ids, uint32_t n,
                        uint32_t *allowed, kivi_error *e) {
    (void)user, (void)e;
    uint32_t last = n ? (uint32_t)ids[n - 1] : choice;
    allowed[0] = (last & 1 ? 0x555554u : 0xaaaaaau) | (n > 5);
    return KIVI_OK;
}

static void on_token(job *j, const kivi_event *e) {
    const answer *a = &j->answers[e->choice];
    uint32_t i = j->n_told[e->choice]++;
    if (!j->is_told || j->is_done[e->choice] || j->is_stopped[e->choice])
        fail_msg("request %llu: a token of choice %u out of turn", (unsigned long long)e->id,
                 e->choice);
    if (i >= a->n || e->token != a->tokens[i])
        fail_msg("request %llu, choice %u, token %u: %d, expected %d of %u",
                 (unsigned long long)e->id, e->choice, i, e->token, i < a->n ? a->tokens[i] : -1,
                 a->n);
    bool is_last = i + 1 == a->n && !a->fails;
    assert_int_equal(e->is_last, is_last);
    assert_int_equal(e->is_end_token, is_last && a->is_end);
    if (j->r.logprobs >= 0) {
        assert_int_equal(e->n_top, KI_MIN(j->r.logprobs, FAKE_VOCAB));
        assert_true(e->logprob <= 0);
        for (uint32_t t = 0; t < e->n_top; t++)
            if (e->top[t].token == e->token) assert_true(e->top[t].logprob == e->logprob);
    }
    w->n_tokens++;
}

static void on_choice(job *j, const kivi_event *e) {
    const answer *a = &j->answers[e->choice];
    bool stops = j->is_stopped[e->choice] || a->is_end;
    assert_false(j->is_done[e->choice]);
    assert_int_equal(e->finish, stops ? KIVI_FINISH_STOP : KIVI_FINISH_LENGTH);
    if (!j->is_stopped[e->choice]) assert_int_equal(j->n_told[e->choice], a->n);
    assert_true(j->is_stopped[e->choice] || !a->fails);
    if (one_in(16)) { /* the conversation goes on */
        int32_t *topic = w->topics[below(N_TOPICS)];
        memcpy(topic, j->prompt, j->r.n_prompt * sizeof *topic);
        memcpy(topic + j->r.n_prompt, a->tokens, j->n_told[e->choice] * sizeof *topic);
    }
    j->is_done[e->choice] = true;
}

static void on_end(job *j, const kivi_event *e) {
    bool all = true, fails = j->prompt_fails;
    for (uint32_t i = 0; i < j->r.n; i++) {
        all = all && j->is_done[i];
        fails = fails || (j->answers[i].fails && !j->is_stopped[i]);
        free(j->answers[i].tokens);
    }
    free(j->prompt_logprobs);
    if (e->status == KIVI_OK) {
        assert_true(all && !fails && !*e->error);
        w->n_ended++;
    } else if (e->status == KIVI_CANCELLED) {
        assert_true(j->may_end && *e->error);
        w->n_cancelled++;
    } else {
        if (e->status != KIVI_NUMERIC || !fails)
            fail_msg("request %llu ends: %s", (unsigned long long)e->id, e->error);
        w->n_failed++;
    }
    assert_true(e->timings->ended_us >= e->timings->submitted_us);
    j->is_live = false;
}

static void on_prompt(job *j, const kivi_event *e) {
    assert_false(j->is_told || j->prompt_fails);
    j->is_told = true;
    assert_true(e->timings->n_cached < j->r.n_prompt);
    if (!j->prompt_logprobs) return;
    size_t row = (size_t)(1 + j->r.prompt_logprobs);
    assert_int_equal(e->n_top, row - 1);
    for (size_t i = 0; i < j->r.n_prompt * row; i++) {
        const kivi_logprob *a = &e->top[i], *b = &j->prompt_logprobs[i];
        if (i < row) assert_int_equal(a->token, -1);
        else if (a->token != b->token || a->logprob != b->logprob)
            fail_msg("log-probability %zu of the prompt differs", i);
    }
}

static kivi_verdict on_event(void *user, const kivi_event *e) {
    job *j = user;
    if (!j->is_live) fail_msg("an event of %llu after its end", (unsigned long long)e->id);
    if (e->kind == KIVI_EVENT_PROMPT) on_prompt(j, e);
    if (e->kind == KIVI_EVENT_TOKEN) on_token(j, e);
    if (e->kind == KIVI_EVENT_CHOICE) on_choice(j, e);
    if (e->kind == KIVI_EVENT_END) on_end(j, e);
    if (w->calm || e->kind == KIVI_EVENT_END) return KIVI_GO_ON;
    if (one_in(400)) {
        j->may_end = true;
        return KIVI_CANCEL;
    }
    if (one_in(300)) {
        j->is_paused = true;
        return KIVI_PAUSE;
    }
    if (e->kind == KIVI_EVENT_TOKEN && !e->is_last && one_in(200)) {
        j->is_stopped[e->choice] = true;
        return KIVI_END_CHOICE;
    }
    return KIVI_GO_ON;
}

/* ---- arrivals ---- */

/* The beginning of a topic, and then something of its own, which may be the topic's next turn. */
static void write_prompt(job *j) {
    int32_t *topic = w->topics[below(N_TOPICS)];
    uint32_t n = one_in(3) ? between(1, 40) : between(1, 420);
    uint32_t own = one_in(4) ? n : between(0, KI_MIN(n, 60u));
    for (uint32_t i = 0; i < n; i++)
        j->prompt[i] = i + own < n ? topic[i] : (int32_t)below(FAKE_VOCAB);
    if (one_in(30)) memcpy(topic, j->prompt, n * sizeof *topic);
    j->r.prompt = j->prompt;
    j->r.n_prompt = n;
}

static void choose_sampling(job *j) {
    kivi_request *r = &j->r;
    r->temperature = one_in(2) ? 0 : 0.7f;
    r->seed = next_random();
    if (one_in(4)) r->top_k = between(1, 8);
    if (one_in(4)) r->top_p = 0.8f;
    if (one_in(6)) r->presence_penalty = 0.5f, r->frequency_penalty = 0.25f;
    if (one_in(6)) r->repetition_penalty = 1.2f;
    if (one_in(6)) r->constraint.mask = mask;
    if (one_in(6)) {
        j->biases[0] = (kivi_bias){(int32_t)below(FAKE_VOCAB), 2};
        j->biases[1] = (kivi_bias){(int32_t)below(FAKE_VOCAB), -100};
        r->biases = j->biases, r->n_biases = r->constraint.mask ? 1 : 2;
    }
    if (one_in(5)) {
        j->stops[0] = (int32_t)below(FAKE_VOCAB);
        r->stop_ids = j->stops, r->n_stop_ids = 1;
    }
    r->ignore_eos = one_in(3);
    if (one_in(4)) r->min_tokens = between(0, r->max_tokens);
}

static void write_job(job *j) {
    kivi_request *r = &j->r;
    memset(j, 0, sizeof *j);
    *r = kivi_request_defaults();
    write_prompt(j);
    r->n = one_in(4) ? between(2, MAX_N) : 1;
    r->max_tokens = one_in(12) ? 0 : one_in(3) ? between(1, 150) : between(1, 30);
    choose_sampling(j);
    if (one_in(4)) r->logprobs = (int32_t)between(0, 5);
    if (one_in(8)) r->prompt_logprobs = (int32_t)between(0, 3);
    if (one_in(8)) r->priority = (int32_t)between(0, 6) - 3;
    if (one_in(20)) r->timeout_ms = between(1, 4), j->may_end = true;
    if (one_in(4)) memcpy(j->salt, "key", 4), r->salt = j->salt, r->n_salt_bytes = 3;
    r->on_event = on_event;
    r->user = j;
}

static void answer_alone(job *j) {
    uint64_t hash;
    if (j->r.prompt_logprobs >= 0) {
        size_t n = j->r.n_prompt * (size_t)(1 + j->r.prompt_logprobs);
        j->prompt_logprobs = calloc(n, sizeof(kivi_logprob));
        assert_non_null(j->prompt_logprobs);
    }
    j->prompt_fails = !fake_prompt(&hash, &w->f, &j->r, j->prompt_logprobs);
    for (uint32_t i = 0; i < j->r.n && !j->prompt_fails; i++)
        j->answers[i] = fake_answer(&w->f, &w->chooser, &j->r, i, hash);
}

static void arrive(void) {
    job *j = NULL;
    for (int i = 0; i < MAX_LIVE && !j; i++)
        if (!w->jobs[i].is_live) j = &w->jobs[i];
    if (!j) return;
    write_job(j);
    const char *param;
    j->is_live = true;
    kivi_status status = kivi_scheduler_submit(&j->id, &param, w->s, &j->r, &err);
    if (status == KIVI_OK) {
        answer_alone(j);
        w->n_submitted++;
        return;
    }
    j->is_live = false; /* too long for this pool, or the queue is full */
    if (status == KIVI_ARG) assert_non_null(param);
    else assert_int_equal(status, KIVI_FULL);
}

static void disturb(void) {
    job *j = &w->jobs[below(MAX_LIVE)];
    if (!j->is_live) return;
    switch (below(4)) {
    case 0:
        if (!one_in(4)) break;
        j->may_end = true;
        kivi_scheduler_cancel(w->s, j->id);
        break;
    case 1:
        j->is_paused = true;
        kivi_scheduler_pause(w->s, j->id);
        break;
    default: j->is_paused = false; kivi_scheduler_resume(w->s, j->id);
    }
}

/* ---- the run ---- */

static bool some_can_run(void) {
    for (int i = 0; i < MAX_LIVE; i++)
        if (w->jobs[i].is_live && !w->jobs[i].is_paused) return true;
    return false;
}

/* What is held in 16 bit: a window a sequence, what prompts were admitted with, and prefixes. */
static void check_residual(void) {
    const ki_layout *l = &w->f.cache->layout;
    kivi_memory window, held = ki_mem_report(w->f.cache->mem);
    kivi_scheduler_stats st;
    assert_true(ki_layout_plan(&window, l, 0, 1));
    kivi_scheduler_stats_get(&st, w->s);
    uint64_t limit = window.kv_residual * st.n_sequences + st.exact_bytes + st.prefix_bytes;
    if (held.kv_residual > limit || st.exact_bytes > st.exact_bytes_limit ||
        st.prefix_bytes > st.prefix_bytes_limit)
        fail_msg("%llu bytes of 16-bit rows, expected at most %llu",
                 (unsigned long long)held.kv_residual, (unsigned long long)limit);
}

static void step(void) {
    bool worked, could = some_can_run();
    if (kivi_scheduler_step(&worked, w->s, &err) != KIVI_OK) fail_msg("%s", err.text);
    check_residual();
    if (could && !worked) {
        char text[4096];
        kivi_scheduler_describe(text, sizeof text, w->s);
        fail_msg("a stall: %s", text);
    }
    w->n_idle += !worked;
}

static void make_world(uint64_t seed) {
    static const kivi_rule rules[] = {KIVI_RULE_STREAM, KIVI_RULE_PAPER, KIVI_RULE_SPAN,
                                      KIVI_RULE_STREAM};
    fake_options o = {.ctx_tokens = CTX};
    kivi_scheduler_options so = kivi_scheduler_defaults();
    rng = seed;
    o.kv = (kivi_kv_options){.group = 16,
                             .residual_tokens = 32u << below(3),
                             .rule = rules[seed % 4],
                             .span_tokens = 128,
                             .sink_tokens = one_in(2) ? 4 : 0,
                             .rewind_tokens = one_in(2) ? 16 : 0};
    if (seed % 8 >= 5) o.window = 50u << below(3); /* pages behind it are given back */
    if (seed % 8 == 3) o.kv.k_bits = o.kv.v_bits = 16;
    o.n_pages = between(5, 20);
    o.max_items = between(2, 8);
    o.step_rows = between(o.max_items + 1, 300);
    o.logit_rows = between(o.max_items, o.max_items + 60);
    fake_create(&w->f, &o);
    w->f.fail_one_in = 40000;
    w->f.knows_best = one_in(2);
    w->f.machine.draws = seed % 2;
    so.max_queued = between(4, 40);
    so.max_queued_tokens = 8000;
    so.prefix_bytes = one_in(2) ? 0 : 1u << between(12, 18);
    if (ki_scheduler_create(&w->s, &w->f.machine, &so, &err) != KIVI_OK) fail_msg("%s", err.text);
    assert_int_equal(ki_chooser_init(&w->chooser, w->f.cache->mem, &w->f.machine, &err), KIVI_OK);
    for (int t = 0; t < N_TOPICS; t++)
        for (int i = 0; i < CTX; i++) w->topics[t][i] = (int32_t)below(FAKE_VOCAB);
    print_message("seed %llu: rule %d, R %u, window %u, %u pages, %u sequences, %u rows a step\n",
                  (unsigned long long)seed, o.kv.rule, o.kv.residual_tokens, o.window, o.n_pages,
                  o.max_items, o.step_rows);
}

static void end_world(void) {
    w->calm = true;
    for (int i = 0; i < MAX_LIVE; i++)
        if (w->jobs[i].is_live) {
            w->jobs[i].is_paused = false;
            kivi_scheduler_resume(w->s, w->jobs[i].id);
        }
    uint32_t n = 0;
    while (some_can_run()) {
        step();
        if (++n > 100000) fail_msg("requests do not end");
    }
    kivi_scheduler_stats st;
    kivi_scheduler_stats_get(&st, w->s);
    print_message("  %llu requests: %llu ended, %llu cancelled, %llu failed, %llu queue full; "
                  "%llu tokens, %llu preemptions, %llu hits of %llu tokens, %llu evictions, %llu "
                  "rows checked, %llu idle steps\n",
                  (unsigned long long)w->n_submitted, (unsigned long long)w->n_ended,
                  (unsigned long long)w->n_cancelled, (unsigned long long)w->n_failed,
                  (unsigned long long)st.n_queue_full, (unsigned long long)w->n_tokens,
                  (unsigned long long)st.n_preemptions, (unsigned long long)st.prefix_hits,
                  (unsigned long long)st.prefix_queries, (unsigned long long)st.n_evictions,
                  (unsigned long long)w->f.n_checked, (unsigned long long)w->n_idle);
    assert_int_equal(w->n_ended + w->n_cancelled + w->n_failed, w->n_submitted);
    assert_int_equal(st.n_ended + st.n_cancelled + st.n_failed, st.n_submitted);
    assert_int_equal(st.n_submitted, w->n_submitted);
    assert_int_equal(st.n_running + st.n_waiting + st.n_sequences + st.n_paused, 0);
    assert_int_equal(st.n_preempted + st.waiting_tokens + st.exact_bytes, 0);
    assert_int_equal(st.pages_used, st.pages_cached);
    assert_int_equal(st.generated_tokens, w->n_tokens);
    assert_true(st.n_preemptions > 0);
    assert_true((w->f.n_drawn > 0) == w->f.machine.draws);
    kivi_scheduler_destroy(&w->s);
    ki_chooser_deinit(&w->chooser);
    fake_destroy(&w->f);
}

static void run_seed(uint64_t seed, uint32_t n_steps) {
    w = calloc(1, sizeof *w);
    assert_non_null(w);
    make_world(seed);
    for (uint32_t i = 0; i < n_steps; i++) {
        if (one_in(12)) arrive();
        if (one_in(10)) disturb();
        step();
        if (i % 1024 == 0) assert_true(ki_pool_check(&w->f.cache->pool));
    }
    end_world();
    free(w);
}

/* KIVI_TEST_SEEDS=FIRST:COUNT runs others. */
static void test_random(void **state) {
    (void)state;
    unsigned first = 1, n = 5;
    const char *seeds = getenv("KIVI_TEST_SEEDS");
    if (seeds && sscanf(seeds, "%u:%u", &first, &n) != 2) fail_msg("KIVI_TEST_SEEDS=FIRST:COUNT");
    for (unsigned i = 0; i < n; i++) run_seed(first + i, is_slow() ? 20000 : 1000000);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
