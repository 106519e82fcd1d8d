/* The scheduler over the real engine: what it tells is, byte for byte, what each request gives
 * alone in a session of its own, whatever its neighbours, preemption, forks and prefixes do. Then
 * the same with requests from several threads. */
#include "engine_helpers.h"
#include "serve.h"

#include <pthread.h>

enum { CTX = 384, MAX_PROMPT = 210, MAX_NEW = 170, MAX_N = 3, N_TOP = 3, MAX_JOBS = 96 };

static uint64_t rng;
static uint32_t below(uint32_t n) {
    rng += 0x9e3779b97f4a7c15u;
    uint64_t z = (rng ^ rng >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) % n);
}
static uint32_t between(uint32_t low, uint32_t high) { return low + below(high - low + 1); }
static bool one_in(uint32_t n) { return below(n) == 0; }

typedef struct kind {
    const char *name, *model;
    kivi_kv_options kv;
    bool shares;
} kind;

#define KV(k, v, r, s, rule_, n)                                                                   \
    {.k_bits = (k), .v_bits = (v), .group = 32, .residual_tokens = (r), .sink_tokens = (s),        \
     .rule = KIVI_RULE_##rule_, .span_tokens = (n), .rewind_tokens = 16}
#define PLUS(k, v, s, rule_, n)                                                                    \
    {.k_bits = (k), .v_bits = (v), .plus = KIVI_PLUS_ALL, .sink_tokens = (s),                      \
     .rule = KIVI_RULE_##rule_, .span_tokens = (n), .rewind_tokens = 16}
static const kind kinds[] = {
    {"kivi2 stream", "llama-gqa", KV(2, 2, 32, 0, STREAM, 0), true},
    {"kivi2 stream R 128 4 sinks", "llama", KV(2, 2, 128, 4, STREAM, 0), true},
    {"kivi2 span", "llama-gqa", KV(2, 2, 32, 0, SPAN, 128), true},
    {"k4v2 span R 128 20 sinks", "llama", KV(4, 2, 128, 20, SPAN, 128), true},
    {"kivi2 paper", "llama-gqa", KV(2, 2, 32, 0, PAPER, 0), false},
    {"k16v2 stream", "llama", KV(16, 2, 64, 0, STREAM, 0), true},
    {"f16 paper", "llama-gqa", KV(16, 16, 32, 0, PAPER, 0), true},
    {"kivi2+ stream", "llama-gqa", PLUS(2, 2, 4, STREAM, 0), true},
    {"k4v3+ span", "llama", PLUS(4, 3, 4, SPAN, 128), true},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static kivi_engine *make_engine(const kind *k, uint32_t n_sessions, uint32_t n_pages,
                                unsigned n_threads) {
    kivi_engine_options o = cpu_defaults();
    kivi_memory plan;
    o.model_path = golden(k->model);
    o.kv = k->kv;
    o.n_threads = n_threads;
    o.ctx_tokens = CTX;
    o.max_sessions = n_sessions;
    o.step_rows = 150;
    o.logit_rows = n_sessions + 30;
    kivi_engine *e = open_engine(&o);
    if (!n_pages) return e;
    MUST(kivi_engine_plan(&plan, NULL, e, &o.kv, CTX, &err));
    kivi_engine_destroy(&e);
    o.kv_bytes = (plan.kv_codes + plan.kv_scales) / (CTX / KI_PAGE_TOKENS) * n_pages;
    e = open_engine(&o);
    assert_int_equal(e->cache->pool.n_pages, n_pages);
    return e;
}

/* ---- what a request gives alone ---- */

typedef struct told {
    int32_t token;
    kivi_logprob top[1 + N_TOP];
} told;

typedef struct job {
    kivi_request r;
    int32_t prompt[MAX_PROMPT];
    kivi_request_id id;
    told alone[MAX_N][MAX_NEW];
    uint32_t n_alone[MAX_N], n_told[MAX_N];
    kivi_logprob *prompt_alone;
    uint32_t n_ends, n_done;
    bool is_prompt_told, may_end, verdict_pause;
    kivi_scheduler *s;
} job;

static void note(told *t, const float *logits, uint32_t n_vocab, int32_t token) {
    t->token = token;
    ki_logprobs(t->top, logits, n_vocab, token, N_TOP);
}

static void score_alone(job *j, kivi_session *s, uint32_t n_vocab) {
    uint32_t row = 1 + N_TOP, n = (uint32_t)j->r.n_prompt;
    j->prompt_alone = calloc((size_t)n * row, sizeof *j->prompt_alone);
    assert_non_null(j->prompt_alone);
    MUST(kivi_session_begin_prompt(s, n, &err));
    for (uint32_t i = 0; i < n; i++) {
        MUST(kivi_session_decode(s, j->prompt[i], &err));
        if (i + 1 < n)
            ki_logprobs(j->prompt_alone + (size_t)(i + 1) * row, kivi_session_logits(s, 0), n_vocab,
                        j->prompt[i + 1], N_TOP);
    }
}

static void answer_alone(job *j, kivi_engine *engine, ki_chooser *ch, const ki_machine *m) {
    int32_t ids[MAX_NEW];
    for (uint32_t i = 0; i < j->r.n; i++) {
        ki_request q = {.r = j->r};
        ki_choice c = {.request = &q, .index = i};
        kivi_session *s = open_session(engine);
        if (i == 0 && j->r.prompt_logprobs >= 0) score_alone(j, s, m->n_vocab);
        else MUST(kivi_session_prompt(s, j->prompt, j->r.n_prompt, &err));
        c.generated.data = (uint8_t *)ids;
        for (bool is_end = false; !is_end && j->n_alone[i] < j->r.max_tokens;) {
            const float *logits = kivi_session_logits(s, 0);
            uint32_t n = j->n_alone[i]++;
            MUST(ki_choose(&ids[n], ch, &c, logits, &err));
            note(&j->alone[i][n], logits, m->n_vocab, ids[n]);
            c.generated.n_bytes = (n + 1) * sizeof *ids;
            is_end = ki_is_end(m, &q, ids[n]);
            if (!is_end) MUST(kivi_session_decode(s, ids[n], &err));
        }
        kivi_session_destroy(&s);
    }
}

/* ---- what it is told ---- */

static void check_token(job *j, const kivi_event *e) {
    uint32_t i = j->n_told[e->choice]++;
    if (i >= j->n_alone[e->choice]) fail_msg("request %d: a token too many", (int)e->id);
    const told *t = &j->alone[e->choice][i];
    if (e->token != t->token || e->logprob != t->top[0].logprob)
        fail_msg("request %d, choice %u, token %u: %d (%a), alone %d (%a)", (int)e->id, e->choice,
                 i, e->token, e->logprob, t->token, t->top[0].logprob);
    assert_int_equal(e->n_top, N_TOP);
    for (uint32_t k = 0; k < N_TOP; k++) {
        assert_int_equal(e->top[k].token, t->top[1 + k].token);
        assert_true(e->top[k].logprob == t->top[1 + k].logprob);
    }
}

static void check_prompt(job *j, const kivi_event *e) {
    assert_false(j->is_prompt_told);
    j->is_prompt_told = true;
    if (!j->prompt_alone) return;
    for (size_t i = 1 + N_TOP; i < j->r.n_prompt * (1 + N_TOP); i++)
        if (e->top[i].token != j->prompt_alone[i].token ||
            e->top[i].logprob != j->prompt_alone[i].logprob)
            fail_msg("log-probability %zu of a prompt differs", i);
}

static kivi_verdict on_event(void *user, const kivi_event *e) {
    job *j = user;
    assert_int_equal(j->n_ends, 0);
    if (e->kind == KIVI_EVENT_PROMPT) check_prompt(j, e);
    if (e->kind == KIVI_EVENT_TOKEN) check_token(j, e);
    if (e->kind == KIVI_EVENT_CHOICE) {
        assert_int_equal(j->n_told[e->choice], j->n_alone[e->choice]);
        j->n_done++;
    }
    if (e->kind == KIVI_EVENT_END) {
        if (e->status != KIVI_CANCELLED && e->status != KIVI_OK) fail_msg("%s", e->error);
        assert_true(e->status == KIVI_OK ? j->n_done == j->r.n : j->may_end);
        j->n_ends++;
    }
    return KIVI_GO_ON;
}

/* ---- jobs ---- */

static int32_t topics[3][MAX_PROMPT];

static void write_job(job *j, uint32_t n_vocab) {
    memset(j, 0, sizeof *j);
    j->r = kivi_request_defaults();
    uint32_t n = one_in(2) ? between(1, 140) : between(140, MAX_PROMPT);
    uint32_t own = one_in(5) ? n : between(0, KI_MIN(n, 40u));
    const int32_t *topic = topics[below(3)];
    for (uint32_t i = 0; i < n; i++)
        j->prompt[i] = i + own < n ? topic[i] : (int32_t)below(n_vocab);
    j->r.prompt = j->prompt, j->r.n_prompt = n;
    j->r.n = one_in(4) ? between(2, MAX_N) : 1;
    j->r.max_tokens = one_in(4) ? between(130, MAX_NEW) : between(1, 20);
    j->r.temperature = one_in(2) ? 0 : 0.9f;
    j->r.seed = below(1000);
    j->r.logprobs = N_TOP;
    if (one_in(6)) j->r.prompt_logprobs = N_TOP;
    if (one_in(4)) j->r.repetition_penalty = 1.1f;
    if (j->r.max_tokens > 20 || one_in(4)) j->r.ignore_eos = true;
    j->r.on_event = on_event, j->r.user = j;
}

static void fill_topics(uint32_t n_vocab) {
    for (int t = 0; t < 3; t++)
        for (int i = 0; i < MAX_PROMPT; i++) topics[t][i] = (int32_t)below(n_vocab);
}

/* Jobs and their answers, from an engine with room. */
static job *make_jobs(const kind *k, uint32_t n) {
    kivi_engine *alone = make_engine(k, 1, 0, 1);
    ki_machine m;
    ki_chooser ch;
    job *jobs = calloc(n, sizeof *jobs);
    assert_non_null(jobs);
    ki_machine_of_engine(&m, alone);
    MUST(ki_chooser_init(&ch, &alone->mem, &m, &err));
    fill_topics(m.n_vocab);
    for (uint32_t i = 0; i < n; i++) {
        write_job(&jobs[i], m.n_vocab);
        answer_alone(&jobs[i], alone, &ch, &m);
    }
    ki_chooser_deinit(&ch);
    close_engine(alone);
    return jobs;
}

static void free_jobs(job *jobs, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(jobs[i].n_ends, 1);
        free(jobs[i].prompt_alone);
    }
    free(jobs);
}

static kivi_scheduler *make_scheduler(kivi_engine *e) {
    kivi_scheduler_options o = kivi_scheduler_defaults();
    kivi_scheduler *s;
    o.max_queued = MAX_JOBS;
    o.prefix_bytes = 1 << 26; /* the pool is small, its share would be nothing */
    MUST(kivi_scheduler_create(&s, e, &o, &err));
    return s;
}

static void submit(kivi_scheduler *s, job *j) {
    kivi_error e = {0};
    const char *param;
    j->s = s;
    kivi_status status = kivi_scheduler_submit(&j->id, &param, s, &j->r, &e);
    if (status != KIVI_OK) fail_msg("submit: %s", e.text);
}

/* In few pages choices are preempted, in many prefixes stay to be found. */
static void check_random(const kind *k, bool is_tight, uint64_t seed) {
    rng = seed;
    uint32_t n = is_slow() ? 10 : 40, next = 0;
    job *jobs = make_jobs(k, n);
    kivi_engine *e = make_engine(k, 6, is_tight ? 5 : 24, 2);
    uint64_t before = n_blocks(e);
    kivi_scheduler *s = make_scheduler(e);
    kivi_scheduler_stats st;
    for (;;) {
        bool worked;
        if (next < n && one_in(3)) submit(s, &jobs[next++]);
        if (next && one_in(40)) {
            job *j = &jobs[below(next)];
            j->may_end = true;
            kivi_scheduler_cancel(s, j->id);
        }
        if (next && one_in(30)) kivi_scheduler_pause(s, jobs[below(next)].id);
        for (uint32_t i = 0; i < next; i++)
            if (one_in(20)) kivi_scheduler_resume(s, jobs[i].id);
        MUST(kivi_scheduler_step(&worked, s, &err));
        kivi_scheduler_stats_get(&st, s);
        if (next == n && st.n_ended + st.n_cancelled == n) break;
    }
    print_message("%s: %llu preemptions, %llu of %llu tokens found, %llu evictions\n", k->name,
                  (unsigned long long)st.n_preemptions, (unsigned long long)st.prefix_hits,
                  (unsigned long long)st.prefix_queries, (unsigned long long)st.n_evictions);
    assert_int_equal(st.n_failed, 0);
    if (is_tight && !is_slow()) assert_true(st.n_preemptions > 0);
    if (!is_tight && !is_slow()) assert_int_equal(st.prefix_hits > 0, k->shares);
    assert_int_equal(st.pages_used, st.pages_cached);
    kivi_scheduler_destroy(&s);
    assert_int_equal(n_blocks(e), before);
    close_engine(e);
    free_jobs(jobs, n);
}

static void test_random(void **state) {
    (void)state;
    for (int i = 0; i < N_KINDS; i++)
        if (!is_slow() || i % 2 == 0) {
            check_random(&kinds[i], true, 11 + (uint64_t)i);
            check_random(&kinds[i], false, 31 + (uint64_t)i);
        }
}

/* ---- threads ---- */

typedef struct sender {
    kivi_scheduler *s;
    job *jobs;
    uint32_t n, seed;
} sender;

static void *send_all(void *p) {
    const sender *x = p;
    uint32_t z = x->seed;
    for (uint32_t i = 0; i < x->n; i++) {
        job *j = &x->jobs[i];
        z = z * 1664525 + 1013904223;
        j->may_end = z >> 28 == 0; /* before the owner sees it */
        submit(x->s, j);
        if (z >> 29 == 2) {
            kivi_scheduler_pause(x->s, j->id);
            usleep(z >> 22);
            kivi_scheduler_resume(x->s, j->id);
        }
        if (j->may_end) kivi_scheduler_cancel(x->s, j->id);
        kivi_scheduler_health health;
        kivi_scheduler_health_get(&health, x->s);
        if (!health.accepts || health.stalled) fail_msg("not healthy");
        char text[2000];
        kivi_scheduler_describe(text, sizeof text, x->s);
        usleep(z >> 21 & 1023);
    }
    return NULL;
}

static void *own(void *p) {
    static kivi_error failed;
    return kivi_scheduler_run(p, &failed) == KIVI_OK ? NULL : &failed;
}

static void check_threads(const kind *k) {
    enum { N_SENDERS = 3 };
    uint32_t each = is_slow() ? 5 : 20;
    rng = 99;
    job *jobs = make_jobs(k, N_SENDERS * each);
    kivi_engine *e = make_engine(k, 5, 8, 2);
    kivi_scheduler *s = make_scheduler(e);
    pthread_t owner, threads[N_SENDERS];
    sender senders[N_SENDERS];
    assert_int_equal(pthread_create(&owner, NULL, own, s), 0);
    for (uint32_t i = 0; i < N_SENDERS; i++) {
        senders[i] = (sender){s, jobs + i * each, each, i};
        assert_int_equal(pthread_create(&threads[i], NULL, send_all, &senders[i]), 0);
    }
    for (int i = 0; i < N_SENDERS; i++) pthread_join(threads[i], NULL);
    kivi_scheduler_drain(s);
    void *result;
    pthread_join(owner, &result);
    assert_null(result);
    kivi_request_id id;
    assert_int_equal(kivi_scheduler_submit(&id, NULL, s, &jobs[0].r, &err), KIVI_CANCELLED);
    kivi_scheduler_destroy(&s);
    close_engine(e);
    free_jobs(jobs, N_SENDERS * each);
}

static void test_threads(void **state) {
    (void)state;
    check_threads(&kinds[0]);
    check_threads(&kinds[4]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
