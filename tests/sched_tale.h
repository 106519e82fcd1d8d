/* sched_tale.h: a scheduler over the model of sched_fake.h, and requests that note what they are
 * told. */
#ifndef KI_SCHED_TALE_H
#define KI_SCHED_TALE_H
#include "sched_fake.h"

static kivi_error err;

enum { CTX = 1024, MAX_TOLD = 512 };

#define MUST(call) must((call), __FILE__, __LINE__)
static inline void must(kivi_status status, const char *file, int line) {
    if (status != KIVI_OK)
        fail_msg("%s:%d: %s: %s", file, line, kivi_status_name(status), err.text);
}

/* ---- a scheduler and what a request of it was told ---- */

static fake f;
static kivi_scheduler *s;
static kivi_scheduler_options so;
static fake_options fo;

static inline int set_defaults(void **state) {
    (void)state;
    so = kivi_scheduler_defaults();
    fo = (fake_options){.kv = {.group = 16, .residual_tokens = 128, .rule = KIVI_RULE_STREAM},
                        .n_pages = 32,
                        .ctx_tokens = CTX,
                        .step_rows = 256,
                        .logit_rows = 64,
                        .max_items = 8};
    so.prefix_bytes = 1 << 20;
    return 0;
}
static inline void begin(void) {
    fake_create(&f, &fo);
    MUST(ki_scheduler_create(&s, &f.machine, &so, &err));
}
static inline void end(void) {
    kivi_scheduler_destroy(&s);
    fake_destroy(&f);
}
static inline kivi_scheduler_stats stats(void) {
    kivi_scheduler_stats st;
    kivi_scheduler_stats_get(&st, s);
    return st;
}

typedef struct tale {
    kivi_request r;
    int32_t prompt[CTX];
    kivi_request_id id;
    int32_t tokens[KIVI_MAX_CHOICES][MAX_TOLD];
    uint32_t n_told[KIVI_MAX_CHOICES];
    uint32_t n_prompts, n_choices, n_ends;
    uint64_t ended_at; /* counts ends of all */
    kivi_finish finish[KIVI_MAX_CHOICES];
    kivi_status status;
    char error[256];
    kivi_timings timings;
    kivi_verdict (*then)(struct tale *t, const kivi_event *e);
} tale;

static uint64_t n_ends_of_all;

static inline kivi_verdict on_event(void *user, const kivi_event *e) {
    tale *t = user;
    assert_int_equal(t->n_ends, 0);
    if (e->timings) t->timings = *e->timings;
    if (e->kind == KIVI_EVENT_PROMPT) t->n_prompts++;
    if (e->kind == KIVI_EVENT_TOKEN)
        t->tokens[e->choice][t->n_told[e->choice]++ % MAX_TOLD] = e->token;
    if (e->kind == KIVI_EVENT_CHOICE) t->finish[e->choice] = e->finish, t->n_choices++;
    if (e->kind == KIVI_EVENT_END) {
        t->n_ends++;
        t->ended_at = ++n_ends_of_all;
        t->status = e->status;
        snprintf(t->error, sizeof t->error, "%s", e->error);
    }
    return t->then ? t->then(t, e) : KIVI_GO_ON;
}

/* A prompt of n tokens that are a function of the topic and the position; ends never come. */
static inline tale *make(uint32_t topic, uint32_t n_prompt, uint32_t max_tokens) {
    tale *t = calloc(1, sizeof *t);
    assert_non_null(t);
    t->r = kivi_request_defaults();
    for (uint32_t i = 0; i < n_prompt; i++)
        t->prompt[i] = (int32_t)(fake_mix(topic, i + 1) % FAKE_VOCAB);
    t->r.prompt = t->prompt, t->r.n_prompt = n_prompt;
    t->r.max_tokens = max_tokens;
    t->r.temperature = 0;
    t->r.ignore_eos = true;
    t->r.on_event = on_event, t->r.user = t;
    return t;
}
static inline tale *send(tale *t) {
    const char *param;
    MUST(kivi_scheduler_submit(&t->id, &param, s, &t->r, &err));
    assert_null(param);
    return t;
}
static inline bool step(void) {
    bool worked;
    MUST(kivi_scheduler_step(&worked, s, &err));
    assert_true(ki_pool_check(&f.cache->pool));
    return worked;
}
static inline void run(void) {
    for (uint32_t n = 0; step(); n++)
        if (n > 100000) fail_msg("it does not end");
}
/* Ended well, with the answer of the request alone. */
static inline void check_answer(tale *t) {
    ki_chooser ch;
    uint64_t hash;
    assert_int_equal(t->n_ends, 1);
    if (t->status != KIVI_OK) fail_msg("%s", t->error);
    assert_int_equal(t->n_choices, t->r.n);
    MUST(ki_chooser_init(&ch, f.cache->mem, &f.machine, &err));
    assert_true(fake_prompt(&hash, &f, &t->r, NULL));
    for (uint32_t i = 0; i < t->r.n; i++) {
        answer a = fake_answer(&f, &ch, &t->r, i, hash);
        assert_int_equal(t->n_told[i], a.n);
        assert_memory_equal(t->tokens[i], a.tokens, KI_MIN(a.n, MAX_TOLD) * sizeof *a.tokens);
        free(a.tokens);
    }
    ki_chooser_deinit(&ch);
}

#define UNIT(name) cmocka_unit_test_setup(name, set_defaults)

#endif
