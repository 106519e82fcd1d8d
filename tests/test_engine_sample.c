/* The sampler over logits made by hand: what each option keeps, in numbers; and what is refused. */
#include "engine_helpers.h"

#include <math.h>

enum { V = 288 };
static kivi_engine *engine;
static kivi_session *session;
static float *logits; /* the engine's own of the last step, written over */

static int open_all(void **state) {
    kivi_engine_options o = cpu_defaults();
    (void)state;
    o.model_path = golden("llama");
    o.n_threads = 1;
    o.ctx_tokens = 128;
    engine = open_engine(&o);
    session = open_session(engine);
    return 0;
}
static int close_all(void **state) {
    (void)state;
    kivi_session_destroy(&session);
    close_engine(engine);
    return 0;
}

/* The session's history becomes these ids, and its logits those above: ids 0 to n - 1 have these
 * probabilities, the rest none to speak of. */
static void stage(const int32_t *history, uint32_t n_history, const float *p, uint32_t n) {
    MUST(kivi_session_rewind(session, 0, &err));
    for (uint32_t i = 0; i < n_history; i++) MUST(kivi_session_decode(session, history[i], &err));
    logits = (float *)(uintptr_t)kivi_session_logits(session, 0);
    assert_non_null(logits);
    for (uint32_t i = 0; i < V; i++) logits[i] = i < n ? logf(p[i]) : -1000.0f;
}
static void stage_simple(void) {
    static const float p[] = {0.15f, 0.5f, 0.05f, 0.3f};
    stage((int32_t[]){200}, 1, p, 4);
}

static kivi_sampler_options plain(void) {
    return (kivi_sampler_options){.temperature = 1, .top_p = 1, .repeat_penalty = 1, .seed = 1};
}
static kivi_sampler *make(const kivi_sampler_options *o) {
    kivi_sampler *s = NULL;
    MUST(kivi_sampler_create(&s, engine, o, &err));
    return s;
}
static int32_t next(kivi_sampler *s) {
    int32_t id = -1;
    MUST(kivi_sampler_next(&id, s, session, &err));
    return id;
}
enum { N_DRAWS = 20000 };
/* How often each of the first four ids comes; nothing else may. */
static void count(double *share, const kivi_sampler_options *o) {
    kivi_sampler *s = make(o);
    memset(share, 0, 4 * sizeof *share);
    for (int i = 0; i < N_DRAWS; i++) {
        int32_t id = next(s);
        assert_in_range(id, 0, 3);
        share[id] += 1.0 / N_DRAWS;
    }
    kivi_sampler_destroy(&s);
    assert_null(s);
}
/* Within five standard deviations. */
static void expect(const kivi_sampler_options *o, double p0, double p1, double p2, double p3) {
    double share[4], p[4] = {p0, p1, p2, p3};
    count(share, o);
    for (int i = 0; i < 4; i++) {
        double slack = 5 * sqrt(p[i] * (1 - p[i]) / N_DRAWS) + 1e-9;
        if (fabs(share[i] - p[i]) > slack)
            fail_msg("id %d came %.4f of the time, expected %.4f", i, share[i], p[i]);
    }
}

static void test_refused(void **state) {
    (void)state;
    static const struct { kivi_sampler_options o; const char *words; } bad[] = {
        {{.temperature = -1, .top_p = 1, .repeat_penalty = 1}, "temperature -1|0 to 100"},
        {{.temperature = NAN, .top_p = 1, .repeat_penalty = 1}, "temperature|0 to 100"},
        {{.temperature = 101, .top_p = 1, .repeat_penalty = 1}, "temperature 101"},
        {{.temperature = 1, .top_p = 0, .repeat_penalty = 1}, "top-p 0|at most 1"},
        {{.temperature = 1, .top_p = 1.5f, .repeat_penalty = 1}, "top-p 1.5"},
        {{.temperature = 1, .top_p = NAN, .repeat_penalty = 1}, "top-p"},
        {{.temperature = 1, .top_p = 1, .min_p = -0.1f, .repeat_penalty = 1}, "min-p -0.1|0 to 1"},
        {{.temperature = 1, .top_p = 1, .min_p = 2, .repeat_penalty = 1}, "min-p 2"},
        {{.temperature = 1, .top_p = 1, .repeat_penalty = 0}, "penalty 0|0.01 to 100"},
        {{.temperature = 1, .top_p = 1, .repeat_penalty = INFINITY}, "penalty inf"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kivi_sampler *s = (kivi_sampler *)(uintptr_t)64;
        FAILS(kivi_sampler_create(&s, engine, &bad[i].o, &err), ARG, bad[i].words);
        assert_null(s);
    }
    kivi_sampler_options o = kivi_sampler_defaults();
    assert_true(o.temperature == 0.8f && o.top_k == 40 && o.top_p == 0.95f && o.min_p == 0.05f);
    assert_true(o.repeat_penalty == 1.1f && o.repeat_tokens == 64 && o.seed == 0);
    kivi_sampler *s = make(&o);
    int32_t id;
    MUST(kivi_session_rewind(session, 0, &err));
    FAILS(kivi_sampler_next(&id, s, session, &err), ARG, "no logits");
    kivi_sampler_destroy(&s);
    kivi_sampler_destroy(&s); /* NULL is allowed */
}

static void test_argmax(void **state) {
    (void)state;
    assert_int_equal(kivi_logits_argmax((float[]){1, 3, 2, 3}, 4), 1); /* the lowest on a tie */
    assert_int_equal(kivi_logits_argmax((float[]){-5, -4}, 2), 1);
    assert_int_equal(kivi_logits_argmax((float[]){7}, 1), 0);
    MUST(kivi_session_rewind(session, 0, &err));
    for (int i = 0; i < 12; i++) { /* of the model's own logits */
        MUST(kivi_session_decode(session, golden_tokens()[i], &err));
        int32_t best = kivi_logits_argmax(kivi_session_logits(session, 0), V);
        kivi_sampler_options greedy = plain(), one = plain();
        greedy.temperature = 0;
        one.top_k = 1;
        one.temperature = 5;
        kivi_sampler *a = make(&greedy), *b = make(&one);
        assert_int_equal(next(a), best);
        assert_int_equal(next(b), best);
        kivi_sampler_destroy(&a), kivi_sampler_destroy(&b);
    }
}

static void test_seed(void **state) {
    (void)state;
    enum { N = 200 };
    int32_t ids[3][N];
    stage_simple();
    for (int run = 0; run < 3; run++) {
        kivi_sampler_options o = plain();
        o.seed = run < 2 ? 42 : 43;
        kivi_sampler *s = make(&o);
        for (int i = 0; i < N; i++) ids[run][i] = next(s);
        kivi_sampler_destroy(&s);
    }
    assert_memory_equal(ids[0], ids[1], sizeof ids[0]);
    assert_memory_not_equal(ids[0], ids[2], sizeof ids[0]);
}

static void test_distribution(void **state) {
    (void)state;
    kivi_sampler_options o = plain();
    stage_simple();
    expect(&o, 0.15, 0.5, 0.05, 0.3);
    o.temperature = 0.5f; /* squares */
    expect(&o, 0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365);
}

static void test_cuts(void **state) {
    (void)state;
    stage_simple();
    kivi_sampler_options o = plain();
    o.top_k = 2;
    expect(&o, 0, 0.5 / 0.8, 0, 0.3 / 0.8);
    o.top_k = 3;
    expect(&o, 0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95);
    o.top_k = 1000000;
    expect(&o, 0.15, 0.5, 0.05, 0.3);
    o = plain();
    o.top_p = 0.6f; /* 0.5 is not enough, 0.8 is */
    expect(&o, 0, 0.5 / 0.8, 0, 0.3 / 0.8);
    o.top_p = 0.4f;
    expect(&o, 0, 1, 0, 0);
    o.top_p = 1e-6f;
    expect(&o, 0, 1, 0, 0);
    o = plain();
    o.min_p = 0.25f; /* of the best one's: at least 0.125 */
    expect(&o, 0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95);
    o.min_p = 0.5f;
    expect(&o, 0, 0.5 / 0.8, 0, 0.3 / 0.8);
    o.min_p = 1;
    expect(&o, 0, 1, 0, 0);
    o = plain();
    o.top_k = 3; /* first k, then p of what is left: 0.5 / 0.95 is less than 0.55 */
    o.top_p = 0.55f;
    expect(&o, 0, 0.5 / 0.8, 0, 0.3 / 0.8);
}

/* Many equal logits: every one has its share, none is lost to the order of a heap. */
static void test_ties(void **state) {
    (void)state;
    stage_simple();
    for (int i = 0; i < V; i++) logits[i] = i % 72 == 5 ? 2.0f : 1.0f;
    kivi_sampler_options o = plain();
    o.top_k = 4;
    kivi_sampler *s = make(&o);
    int n[V] = {0};
    for (int i = 0; i < 4000; i++) n[next(s)]++;
    for (int i = 0; i < V; i++) assert_true(i % 72 == 5 ? abs(n[i] - 1000) < 150 : n[i] == 0);
    kivi_sampler_destroy(&s);
    o.top_k = 6; /* two of the lesser ones: the lowest ids */
    s = make(&o);
    memset(n, 0, sizeof n);
    for (int i = 0; i < 4000; i++) n[next(s)]++;
    for (int i = 0; i < V; i++) assert_true((n[i] > 0) == (i % 72 == 5 || i < 2));
    kivi_sampler_destroy(&s);
}

static void test_penalty(void **state) {
    (void)state;
    static const int32_t history[] = {1, 2, 1, 3, 3};
    kivi_sampler_options o = plain();
    o.temperature = 0;
    o.repeat_tokens = 64;
    stage(history, 5, (float[]){1}, 1);
    for (int i = 0; i < V; i++) logits[i] = -50;
    logits[0] = 1.9f, logits[1] = 2.0f; /* 1 was said: 2.0 / 1.1, once however often */
    kivi_sampler *s = make(&o);
    assert_int_equal(next(s), 1);
    kivi_sampler_destroy(&s);
    o.repeat_penalty = 1.04f;
    s = make(&o);
    assert_int_equal(next(s), 1); /* 1.92; twice would be 1.85 */
    kivi_sampler_destroy(&s);
    o.repeat_penalty = 1.1f;
    s = make(&o);
    assert_int_equal(next(s), 0);
    kivi_sampler_destroy(&s);
    o.repeat_tokens = 2; /* 3 and 3: the 1 before is forgotten */
    s = make(&o);
    assert_int_equal(next(s), 1);
    kivi_sampler_destroy(&s);
    o.repeat_tokens = 0;
    s = make(&o);
    assert_int_equal(next(s), 1);
    kivi_sampler_destroy(&s);
    for (int i = 0; i < V; i++) logits[i] = -50; /* below zero it goes down, too */
    logits[0] = -2.1f, logits[1] = -2.0f;
    o.repeat_tokens = 64;
    s = make(&o);
    assert_int_equal(next(s), 0);
    kivi_sampler_destroy(&s);
    o.repeat_penalty = 0.9f; /* less than 1 asks for repetition */
    logits[1] = -2.2f;
    s = make(&o);
    assert_int_equal(next(s), 1);
    kivi_sampler_destroy(&s);
}

/* ---- the definition (model/draw.h) ---- */

static void test_weights(void **state) {
    (void)state;
    assert_int_equal(ki_draw_weight(0), 1ull << 39);
    assert_int_equal(ki_draw_weight(nextafterf(-27, -28)), 0);
    assert_true(ki_draw_weight(-27) >= 1);
    assert_int_equal(ki_draw_weight(NAN), 0);
    assert_int_equal(ki_draw_weight(-INFINITY), 0);
    for (int i = 0; i <= 27000; i++) {
        float x = -(float)i / 1000;
        double want = exp((double)x) * 0x1p39, got = (double)ki_draw_weight(x);
        /* three roundings of float32, and what is cut off to an integer */
        if (fabs(got - want) > want * 2e-7 + 1)
            fail_msg("e^%g: %.17g, expected %.17g", (double)x, got, want);
    }
}

/* The definition once more, by sorting. */
typedef struct sorted {
    float logit;
    int32_t id;
    uint64_t weight;
} sorted;
static int by_order(const void *a, const void *b) {
    const sorted *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}
static int32_t by_sorting(const float *x, uint32_t n, const ki_draw *d) {
    static sorted all[V];
    uint32_t k = d->top_k && d->top_k < n ? d->top_k : n, stay = 0;
    uint64_t sum = 0, kept = 0, below = 0;
    for (uint32_t i = 0; i < n; i++) all[i] = (sorted){.logit = x[i], .id = (int32_t)i};
    qsort(all, n, sizeof *all, by_order);
    for (uint32_t i = 0; i < n; i++)
        all[i].weight = ki_draw_weight((all[i].logit - all[0].logit) / d->temperature);
    for (uint32_t i = 0; i < k; i++) sum += all[i].weight;
    for (; stay < k; kept += all[stay++].weight) {
        if (stay && d->top_p < 1 && (double)kept >= (double)d->top_p * (double)sum) break;
        if (stay && (all[stay].logit - all[0].logit) / d->temperature < d->min_x) break;
    }
    for (uint32_t i = 0; i < stay; i++)
        if ((below += all[i].weight) > (uint64_t)(d->u * (double)kept)) return all[i].id;
    return all[stay - 1].id;
}
static void test_against_sorting(void **state) {
    (void)state;
    static ki_candidate all[V];
    for (uint64_t i = 0; i < 3000; i++) {
        float x[V];
        for (uint64_t j = 0; j < V; j++) {
            x[j] = (float)(ki_sample_draw(i, j) * 12);
            if (i % 3 == 0) x[j] = floorf(x[j]); /* ties */
        }
        ki_draw d = {.temperature = 0.1f + (float)ki_sample_draw(i, 1000),
                     .top_p = i % 2 ? 1 : (float)(ki_sample_draw(i, 1001) * 0.99 + 0.01),
                     .min_x = ki_draw_min_x(i % 4 < 2 ? 0 : (float)ki_sample_draw(i, 1002)),
                     .top_k = i % 5 ? (uint32_t)(ki_sample_draw(i, 1003) * 60) : 0,
                     .u = ki_sample_draw(i, 1004)};
        assert_int_equal(ki_sample(all, x, V, &d), by_sorting(x, V, &d));
    }
}

static void test_edits(void **state) {
    (void)state;
    float x[5] = {2, -2, 1, 3, 0};
    const ki_draw_edit edits[] = {{.id = 0, .what = KI_EDIT_REPEATED},
                                  {.id = 1, .what = KI_EDIT_REPEATED | KI_EDIT_BIAS, .bias = 1},
                                  {.id = 2, .times = 3},
                                  {.id = 3, .what = KI_EDIT_NEVER | KI_EDIT_REPEATED, .times = 1},
                                  {.id = 4, .what = KI_EDIT_END}};
    const ki_draw d = {
        .repetition = 2, .frequency = 0.5f, .presence = 0.25f, .n_edits = 5, .edits = edits};
    const float want[5] = {1, -2, -0.75f, -INFINITY, 0};
    ki_draw_edit_logits(x, &d);
    assert_memory_equal(x, want, sizeof x);
    ki_draw_hide_ends(x, 5, &d);
    assert_true(x[4] == -INFINITY);
    float alone[5] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, 0}; /* nothing else is left */
    ki_draw_hide_ends(alone, 5, &d);
    assert_true(alone[4] == 0);
}

/* Logits are lent: sampling leaves them as they are. */
static void test_logits_stay(void **state) {
    (void)state;
    static const int32_t history[] = {1, 2, 3};
    static const float p[] = {0.25f, 0.25f, 0.25f, 0.25f};
    float before[V];
    stage(history, 3, p, 4);
    memcpy(before, logits, sizeof before);
    kivi_sampler_options o = kivi_sampler_defaults();
    kivi_sampler *s = make(&o);
    for (int i = 0; i < 10; i++) next(s);
    assert_memory_equal(before, logits, sizeof before);
    kivi_sampler_destroy(&s);
}

static void test_not_numbers(void **state) {
    (void)state;
    kivi_sampler_options o = plain();
    int32_t id;
    stage_simple();
    kivi_sampler *s = make(&o);
    for (int i = 0; i < V; i++) logits[i] = NAN;
    FAILS(kivi_sampler_next(&id, s, session, &err), NUMERIC, "not numbers");
    kivi_sampler_destroy(&s);
    o.temperature = 0;
    s = make(&o);
    FAILS(kivi_sampler_next(&id, s, session, &err), NUMERIC, "not numbers");
    kivi_sampler_destroy(&s);
}

/* A whole generation repeats, and another seed gives another one. */
static void test_generation_repeats(void **state) {
    (void)state;
    int32_t ids[3][40];
    for (int run = 0; run < 3; run++) {
        kivi_sampler_options o = kivi_sampler_defaults();
        o.seed = run < 2 ? 7 : 8;
        kivi_sampler *s = make(&o);
        MUST(kivi_session_rewind(session, 0, &err));
        MUST(kivi_session_prompt(session, golden_tokens(), 20, &err));
        for (int i = 0; i < 40; i++) {
            ids[run][i] = next(s);
            MUST(kivi_session_decode(session, ids[run][i], &err));
        }
        kivi_sampler_destroy(&s);
    }
    assert_memory_equal(ids[0], ids[1], sizeof ids[0]);
    assert_memory_not_equal(ids[0], ids[2], sizeof ids[0]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused),      cmocka_unit_test(test_argmax),
        cmocka_unit_test(test_seed),         cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_cuts),         cmocka_unit_test(test_ties),
        cmocka_unit_test(test_penalty),      cmocka_unit_test(test_logits_stay),
        cmocka_unit_test(test_weights),      cmocka_unit_test(test_against_sorting),
        cmocka_unit_test(test_edits),
        cmocka_unit_test(test_not_numbers),  cmocka_unit_test(test_generation_repeats),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
