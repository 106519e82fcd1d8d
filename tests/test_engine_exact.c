/* The same bytes of CPU logits whatever the threads, neighbours, chunks and instruction set, and
 * after forks, steps back and files (DESIGN.md 6). Every check compares whole rows with those of
 * one thread that fed the script in whole prompts. */
#include "engine_helpers.h"

typedef struct kind {
    const char *name;
    kivi_kv_options kv;
} kind;

#define KV(k, v, r, s, rule_, n)                                                                   \
    {                                                                                              \
        .k_bits = (k), .v_bits = (v), .group = 32, .residual_tokens = (r), .sink_tokens = (s),     \
        .rule = KIVI_RULE_##rule_, .span_tokens = (n), .rewind_tokens = 16                         \
    }
#define PLUS(k, v, s, rule_, n)                                                                    \
    {                                                                                              \
        .k_bits = (k), .v_bits = (v), .plus = KIVI_PLUS_ALL, .sink_tokens = (s),                   \
        .rule = KIVI_RULE_##rule_, .span_tokens = (n), .rewind_tokens = 16                         \
    }
static const kind kinds[] = {
    {"kivi2 paper", KV(2, 2, 32, 0, PAPER, 0)},
    {"kivi2 paper sinks", KV(2, 2, 32, 32, PAPER, 0)},
    {"kivi2 stream", KV(2, 2, 32, 0, STREAM, 0)},
    {"kivi2 stream sinks", KV(2, 2, 32, 32, STREAM, 0)},
    {"kivi2 span", KV(2, 2, 32, 0, SPAN, 128)},
    {"kivi2 span sinks", KV(2, 2, 32, 64, SPAN, 128)},
    {"k4v2 paper sinks", KV(4, 2, 64, 64, PAPER, 0)},
    {"k4v2 stream", KV(4, 2, 64, 0, STREAM, 0)},
    {"k4v2 span sinks", KV(4, 2, 64, 32, SPAN, 128)},
    {"kivi8 paper", KV(8, 8, 32, 0, PAPER, 0)},
    {"kivi8 stream sinks", KV(8, 8, 32, 32, STREAM, 0)},
    {"k16v2 paper", KV(16, 2, 32, 0, PAPER, 0)},
    {"k16v2 stream sinks", KV(16, 2, 32, 32, STREAM, 0)},
    {"k2v16 span", KV(2, 16, 32, 0, SPAN, 128)},
    {"f16", KV(16, 16, 32, 0, PAPER, 0)},
    {"kivi2 stream 4 sinks", KV(2, 2, 32, 4, STREAM, 0)},
    {"k4v2 paper 1 sink", KV(4, 2, 64, 1, PAPER, 0)},
    {"kivi2 span 20 sinks", KV(2, 2, 32, 20, SPAN, 128)},
    {"kivi2+ paper", PLUS(2, 2, 4, PAPER, 0)},
    {"kivi2+ stream", PLUS(2, 2, 4, STREAM, 0)},
    {"kivi2+ span no sinks", PLUS(2, 2, 0, SPAN, 128)},
    {"k4v2+ stream", PLUS(4, 2, 4, STREAM, 0)},
    {"k4v3+ paper 20 sinks", PLUS(4, 3, 20, PAPER, 0)},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds, N_CASES = 2 * N_KINDS };

/* ---- the cases: each kind on both golden models, and what one thread says ---- */

static script main_script;
static trace references[N_CASES];

static const char *case_name(int i) {
    static char name[64];
    snprintf(name, sizeof name, "%s %s", i % 2 ? "llama-gqa" : "llama", kinds[i / 2].name);
    return name;
}
static const kivi_kv_options *case_kv(int i) { return &kinds[i / 2].kv; }

static kivi_engine_options case_options(int i) {
    kivi_engine_options o = cpu_defaults();
    o.model_path = golden(i % 2 ? "llama-gqa" : "llama");
    o.kv = *case_kv(i);
    o.n_threads = 1;
    o.ctx_tokens = 384;
    o.max_sessions = MAX_ACTORS;
    o.all_logits = true;
    return o;
}

static const trace *reference(int i) {
    if (references[i].rows) return &references[i];
    kivi_engine_options o = case_options(i);
    kivi_engine *engine = open_engine(&o);
    references[i] = run_alone(engine, &main_script, 0);
    close_engine(engine);
    return &references[i];
}

/* Under a sanitizer a few cases of different rules stand for all. */
#define EACH_CASE(i)                                                                               \
    for (int i = 0; i < N_CASES; i++)                                                              \
        if (!is_slow() || i % 7 == 1)

static void same_alone(kivi_engine *engine, int i, uint32_t chunk, const char *what) {
    trace t = run_alone(engine, &main_script, chunk);
    trace_same(reference(i), &t, 0, case_name(i), what);
    trace_free(&t);
}

/* ---- threads, chunks, instruction sets ---- */

static void test_threads(void **state) {
    (void)state;
    EACH_CASE(i) {
        for (unsigned n = 1; n <= 3; n++) {
            kivi_engine_options o = case_options(i);
            o.n_threads = n;
            kivi_engine *engine = open_engine(&o);
            assert_int_equal(kivi_engine_info_get(engine)->n_threads, n);
            same_alone(engine, i, 0, n == 1 ? "1 thread" : n == 2 ? "2 threads" : "3 threads");
            close_engine(engine);
        }
    }
}

static void test_chunks(void **state) {
    (void)state;
    EACH_CASE(i) {
        kivi_engine_options o = case_options(i);
        o.n_threads = i % 5 == 0 ? 2 : 1;
        kivi_engine *engine = open_engine(&o);
        same_alone(engine, i, 1, "chunks of 1");
        same_alone(engine, i, 7, "chunks of 7");
        same_alone(engine, i, 64, "chunks of 64");
        close_engine(engine);
        o.step_rows = 50; /* the call that feeds a whole prompt cuts it itself */
        engine = open_engine(&o);
        kivi_session *s = open_session(engine);
        MUST(kivi_session_prompt(s, main_script.tokens, main_script.turns[0].n_prompt, &err));
        trace t = trace_new(engine, script_length(&main_script));
        go_on(s, &main_script, 0, 0, &t);
        trace_same(reference(i), &t, main_script.turns[0].n_prompt, case_name(i), "own chunks");
        trace_free(&t);
        kivi_session_destroy(&s);
        close_engine(engine);
    }
}

static void check_isa(const char *isa, const char *disable) {
    ki_isa which = KI_ISA_SCALAR;
    while (strcmp(ki_isa_names[which], isa)) which++;
    if (!ki_isa_available(which)) {
        print_message("this machine has no %s\n", isa);
        skip();
    }
    EACH_CASE(i) {
        if (which == KI_ISA_SCALAR && (i / 2 + i) % 2) continue; /* slow: each kind on one model */
        kivi_engine_options o = case_options(i);
        o.disable = disable;
        kivi_engine *engine = open_engine(&o);
        assert_string_equal(kivi_engine_info_get(engine)->isa, isa);
        same_alone(engine, i, which == KI_ISA_SCALAR ? 33 : 0, isa);
        if (which != KI_ISA_SCALAR) same_alone(engine, i, 19, isa);
        close_engine(engine);
    }
}
static void test_isa_scalar(void **state) { (void)state, check_isa("scalar", "avx2,neon"); }
static void test_isa_avx2(void **state) { (void)state, check_isa("avx2", "avx512"); }
static void test_isa_avx512(void **state) { (void)state, check_isa("avx512", "avx512vnni"); }
static void test_isa_avx512vnni(void **state) { (void)state, check_isa("avx512vnni", NULL); }
#if defined(__aarch64__)
static void test_isa_neon(void **state) { (void)state, check_isa("neon", "neondot"); }
static void test_isa_neondot(void **state) { (void)state, check_isa("neondot", NULL); }
#endif

/* ---- neighbours ---- */

/* Others of different prompts, lengths and chunks; some begin later, some end early, some give
 * their pages back while the rest goes on. */
static void run_among(kivi_engine *engine, int i, uint32_t n_others) {
    static const turn others[][2] = {{{90, 60}, {0, 0}}, {{1, 200}, {0, 0}},   {{130, 5}, {40, 0}},
                                     {{20, 3}, {0, 0}},  {{64, 64}, {64, 64}}, {{0, 40}, {100, 9}},
                                     {{200, 1}, {7, 3}}};
    static const uint32_t chunks[] = {64, 1, 50, 7, 64, 33, 60};
    actor actors[MAX_ACTORS] = {0};
    script scripts[MAX_ACTORS];
    trace t = trace_new(engine, script_length(&main_script)), other = {0};
    scripts[0] = main_script;
    actors[0] = (actor){.script = &scripts[0], .trace = &t, .chunk = 16};
    for (uint32_t j = 1; j <= n_others; j++) {
        uint32_t which = (j - 1 + n_others + (uint32_t)i) % 7;
        scripts[j] = (script){.tokens = golden_tokens() + 11 * j};
        scripts[j].turns[0] = others[which][0];
        scripts[j].turns[1] = others[which][1];
        actors[j] = (actor){.script = &scripts[j], .chunk = chunks[which], .rests = 3 * (j % 3)};
    }
    if (n_others) other = trace_new(engine, script_length(&scripts[n_others]));
    actors[n_others].trace = n_others ? &other : &t;
    for (uint32_t j = 0; j <= n_others; j++) actors[j].session = open_session(engine);
    for (size_t step = 0; actors_step(actors, n_others + 1, step); step++)
        if (n_others > 1 && step == 40) { /* somebody leaves in the middle */
            kivi_session_destroy(&actors[1].session);
            actors[1].session = open_session(engine);
            scripts[1].turns[0] = scripts[1].turns[1] = (turn){0, 0};
        }
    for (uint32_t j = 0; j <= n_others; j++) kivi_session_destroy(&actors[j].session);
    trace_same(reference(i), &t, 0, case_name(i), "among others");
    if (n_others > 1) { /* and the last of the others was alone, too */
        trace alone = run_alone(engine, &scripts[n_others], 0);
        trace_same(&alone, &other, 0, case_name(i), "the last neighbour");
        trace_free(&alone);
    }
    trace_free(&t);
    if (n_others) trace_free(&other);
}

static void test_neighbours(void **state) {
    (void)state;
    EACH_CASE(i) {
        kivi_engine_options o = case_options(i);
        o.n_threads = i % 4 == 0 ? 1 + (uint32_t)i / 4 % 3 : 1;
        kivi_engine *engine = open_engine(&o);
        for (uint32_t n = 1; n <= 7; n++) /* all numbers with the first kind, two with the others */
            if (i < 2 || n == 1 + (uint32_t)i % 6 || n == 7) run_among(engine, i, n);
        close_engine(engine);
    }
}

/* ---- stream: a prompt is no more than its tokens ---- */

static void test_stream(void **state) {
    (void)state;
    int n = 0;
    for (int i = 0; i < N_CASES; i++) {
        bool f16 = case_kv(i)->k_bits == 16 && case_kv(i)->v_bits == 16;
        if (case_kv(i)->rule != KIVI_RULE_STREAM && !f16) continue;
        kivi_engine_options o = case_options(i);
        kivi_engine *engine = open_engine(&o);
        script s = {.tokens = main_script.tokens, .turns = {{0, script_length(&main_script)}}};
        trace t = run_alone(engine, &s, 0);
        trace_same(reference(i), &t, 0, case_name(i), "token by token");
        trace_free(&t);
        s.turns[0] = (turn){script_length(&main_script), 0};
        t = run_alone(engine, &s, 0);
        trace_same(reference(i), &t, 0, case_name(i), "one prompt");
        trace_free(&t);
        close_engine(engine);
        n++;
    }
    assert_true(n >= 8);
}

/* Under the others it is more: a case in which the rules did not differ would prove nothing. */
static void test_rules_differ(void **state) {
    (void)state;
    static const int pairs[][2] = {{0, 2}, {0, 4}, {2, 4}, {0, 1}, {2, 3}};
    for (size_t p = 0; p < sizeof pairs / sizeof *pairs; p++)
        for (int model = 0; model < 2; model++) {
            const trace *a = reference(pairs[p][0] * 2 + model);
            const trace *b = reference(pairs[p][1] * 2 + model);
            uint32_t same = 0;
            for (uint32_t i = 0; i < a->n; i++)
                same += !memcmp(a->rows[i], b->rows[i], a->n_vocab * sizeof(float));
            assert_true(same >= 32 && same < a->n); /* the first window is the same for all */
        }
}

/* ---- turns: one long script of several prompts, cut in different ways in each turn ---- */

static void test_turns(void **state) {
    (void)state;
    EACH_CASE(i) {
        kivi_engine_options o = case_options(i);
        kivi_engine *engine = open_engine(&o);
        script s = {.tokens = golden_tokens(), .turns = {{40, 30}, {1, 1}, {100, 40}, {33, 20}}};
        trace whole = run_alone(engine, &s, 0);
        static const uint32_t chunks[][4] = {{7, 1, 64, 1}, {1, 1, 9, 32}, {39, 1, 99, 5}};
        for (size_t c = 0; c < 3; c++) {
            trace t = trace_new(engine, script_length(&s));
            kivi_session *session = open_session(engine);
            uint32_t until = 0;
            for (int k = 0; k < 4; k++) {
                until += s.turns[k].n_prompt + s.turns[k].n_decode;
                go_on(session, &s, until, chunks[c][k], &t);
            }
            trace_same(&whole, &t, 0, case_name(i), "turns cut differently");
            kivi_session_destroy(&session);
            trace_free(&t);
        }
        trace_free(&whole);
        close_engine(engine);
    }
}

/* The script's tokens up to `at`, then others. */
enum { N_AWAY = 384 };
static void go_away(int32_t *tokens, uint32_t at, int32_t factor) {
    for (uint32_t p = 0; p < N_AWAY; p++) {
        int32_t id = main_script.tokens[p % N_TOKENS];
        tokens[p] = p < at ? id : (id * factor + 3) % 288;
    }
}

/* ---- forks ---- */

/* Original, fork and fork of the fork take steps in turn; the two forks follow the script, the
 * original goes elsewhere. */
static void check_fork(kivi_engine *engine, int i, uint32_t at) {
    script away = script_cut(&main_script, at);
    int32_t tokens[N_AWAY];
    go_away(tokens, at, 7);
    away.tokens = tokens;
    script_add(&away, (turn){70, 20});
    trace t[2] = {trace_new(engine, script_length(&main_script)),
                  trace_new(engine, script_length(&main_script))};
    trace elsewhere = trace_new(engine, script_length(&away));
    actor actors[3] = {{.script = &away, .chunk = 13, .trace = &elsewhere},
                       {.script = &main_script, .chunk = 5, .trace = &t[0]},
                       {.script = &main_script, .chunk = 64, .trace = &t[1]}};
    actors[0].session = open_session(engine);
    if (at) go_on(actors[0].session, &main_script, at, 0, NULL);
    uint32_t before = free_pages(engine);
    MUST(kivi_session_fork(&actors[1].session, actors[0].session, &err));
    MUST(kivi_session_fork(&actors[2].session, actors[1].session, &err));
    assert_true(before - free_pages(engine) <= 4); /* at most the open page of each side, twice */
    assert_int_equal(kivi_session_length(actors[2].session), at);
    assert_null(kivi_session_logits(actors[2].session, 0));
    actors_run(actors, 3);
    trace_same(reference(i), &t[0], at, case_name(i), "a fork");
    trace_same(reference(i), &t[1], at, case_name(i), "a fork of a fork");
    trace replay = run_alone(engine, &away, 0);
    trace_same(&replay, &elsewhere, at, case_name(i), "the forked session");
    trace_free(&replay);
    trace_free(&elsewhere);
    for (int k = 0; k < 2; k++) trace_free(&t[k]);
    for (int k = 0; k < 3; k++) kivi_session_destroy(&actors[k].session);
    assert_int_equal(free_pages(engine), engine->cache->pool.n_pages);
}

static void test_fork(void **state) {
    (void)state;
    static const uint32_t places[] = {150, 165, 180, 240, 255, 151, 179, 256};
    EACH_CASE(i) {
        kivi_engine_options o = case_options(i);
        kivi_engine *engine = open_engine(&o);
        check_fork(engine, i, places[i % 8]);
        check_fork(engine, i, places[(i + 3) % 8]);
        if (i % 10 == 0) check_fork(engine, i, 0);
        close_engine(engine);
    }
}

/* ---- steps back ---- */

/* From `from` back to `to`, then another way: as a session that went there at once. */
static void check_rewind(kivi_engine *engine, int i, uint32_t from, uint32_t to) {
    char what[64];
    int32_t tokens[N_AWAY];
    snprintf(what, sizeof what, "from %u back to %u", from, to);
    go_away(tokens, to, 5);
    script s = script_cut(&main_script, to);
    s.tokens = tokens;
    script_add(&s, (turn){40, 15});
    trace straight = run_alone(engine, &s, 0), t = trace_new(engine, script_length(&s));
    kivi_session *session = open_session(engine);
    go_on(session, &main_script, from, 0, NULL);
    MUST(kivi_session_rewind(session, to, &err));
    assert_int_equal(kivi_session_length(session), to);
    assert_null(kivi_session_logits(session, 0));
    go_on(session, &s, 0, 11, &t);
    trace_same(&straight, &t, to, case_name(i), what);
    /* and once more, far back from there */
    uint32_t again = to / 2;
    script s2 = script_cut(&main_script, again);
    script_add(&s2, (turn){30, 4});
    trace straight2 = run_alone(engine, &s2, 0), t2 = trace_new(engine, script_length(&s2));
    MUST(kivi_session_rewind(session, again, &err));
    go_on(session, &s2, 0, 0, &t2);
    trace_same(&straight2, &t2, again, case_name(i), "a second step back");
    kivi_session_destroy(&session);
    trace_free(&straight), trace_free(&straight2), trace_free(&t), trace_free(&t2);
}

static void test_rewind(void **state) {
    (void)state;
    static const struct {
        uint32_t from, to;
    } ways[] = {
        {270, 262}, {270, 254}, {270, 253}, {270, 245}, {270, 240}, {270, 210}, {241, 239},
        {185, 179}, {270, 180}, {270, 165}, {160, 149}, {270, 128}, {270, 70},  {150, 135},
        {150, 134}, {270, 1},   {270, 0},   {2, 1},     {33, 32},   {40, 31},
    };
    enum { N_WAYS = sizeof ways / sizeof *ways };
    EACH_CASE(i) {
        kivi_engine_options o = case_options(i);
        kivi_engine *engine = open_engine(&o);
        for (int w = 0; w < N_WAYS; w++) {
            bool in_prompt = ways[w].from < 150 || (ways[w].from > 180 && ways[w].from < 240);
            if (!in_prompt && (i < 2 || w % 9 == i % 9))
                check_rewind(engine, i, ways[w].from, ways[w].to);
        }
        close_engine(engine);
    }
}

/* Away and back, then the script: within the window (12 decodes) and beyond it (60 of a prompt). */
static void test_rewind_and_replay(void **state) {
    (void)state;
    EACH_CASE(i) {
        kivi_engine_options o = case_options(i);
        kivi_engine *engine = open_engine(&o);
        static const uint32_t places[] = {150, 172, 180, 240, 250};
        uint32_t at = places[i % 5];
        trace t = trace_new(engine, script_length(&main_script));
        kivi_session *session = open_session(engine);
        go_on(session, &main_script, at, 0, NULL);
        for (int32_t k = 0; k < 12; k++) MUST(kivi_session_decode(session, 17 * k, &err));
        MUST(kivi_session_rewind(session, at, &err));
        MUST(kivi_session_prompt(session, golden_tokens() + 200, 60, &err));
        MUST(kivi_session_rewind(session, at, &err));
        go_on(session, &main_script, 0, 0, &t);
        trace_same(reference(i), &t, at, case_name(i), "back and replay");
        kivi_session_destroy(&session);
        trace_free(&t);
        close_engine(engine);
    }
}

/* ---- files ---- */

static void goes_on(kivi_engine *engine, int i, const char *path, uint32_t at, const char *what) {
    kivi_session *session = NULL;
    MUST(kivi_session_load(&session, engine, path, &err));
    assert_int_equal(kivi_session_length(session), at);
    trace t = trace_new(engine, script_length(&main_script));
    go_on(session, &main_script, 0, 9, &t);
    trace_same(reference(i), &t, at, case_name(i), what);
    trace_free(&t);
    kivi_session_destroy(&session);
}

static void check_save(kivi_engine *engine, kivi_engine *second, int i, uint32_t at) {
    char path[256];
    snprintf(path, sizeof path, "%s/saved", temp_folder);
    trace t = trace_new(engine, script_length(&main_script));
    kivi_session *session = open_session(engine);
    go_on(session, &main_script, at, 0, NULL);
    MUST(kivi_session_save(session, path, &err));
    goes_on(engine, i, path, at, "loaded");
    goes_on(second, i, path, at, "loaded elsewhere");
    go_on(session, &main_script, 0, 0, &t);
    trace_same(reference(i), &t, at, case_name(i), "after saving");
    trace_free(&t);
    /* what is saved after a step back is as good, and a loaded session can step back itself */
    MUST(kivi_session_rewind(session, at, &err));
    MUST(kivi_session_save(session, path, &err));
    goes_on(second, i, path, at, "saved after a step back");
    kivi_session_destroy(&session);
    MUST(kivi_session_load(&session, second, path, &err));
    MUST(kivi_session_rewind(session, at / 2, &err));
    script s = script_cut(&main_script, at / 2);
    script_add(&s, (turn){20, 4});
    trace straight = run_alone(engine, &s, 0), back = trace_new(engine, script_length(&s));
    go_on(session, &s, 0, 0, &back);
    trace_same(&straight, &back, at / 2, case_name(i), "loaded, then a step back");
    trace_free(&straight), trace_free(&back);
    kivi_session_destroy(&session);
}

static void test_save(void **state) {
    (void)state;
    static const uint32_t places[] = {150, 163, 180, 240, 255, 269, 152};
    EACH_CASE(i) {
        kivi_engine_options o = case_options(i);
        kivi_engine *engine = open_engine(&o);
        o.n_threads = i < 3 ? 2 : 1;
        o.ctx_tokens = 300;
        o.max_sessions = 2;
        o.kv.rewind_tokens = 0;
        o.disable = "avx512";
        kivi_engine *second = open_engine(&o);
        check_save(engine, second, i, places[i % 7]);
        check_save(engine, second, i, places[(i + 3) % 7]);
        close_engine(engine);
        close_engine(second);
    }
}

/* A second prompt was evaluated, then stepped over backwards: its place is not in the file. */
static void test_save_before_last_prompt(void **state) {
    (void)state;
    kivi_engine_options o = case_options(0);
    kivi_engine *engine = open_engine(&o);
    const int32_t *tokens = golden_tokens();
    char path[256];
    snprintf(path, sizeof path, "%s/stepped", temp_folder);
    kivi_session *session = open_session(engine), *loaded = NULL;
    go_on(session, &main_script, 150, 0, NULL);
    MUST(kivi_session_prompt(session, tokens + 150, 8, &err));
    MUST(kivi_session_rewind(session, 148, &err));
    MUST(kivi_session_save(session, path, &err));
    MUST(kivi_session_check(engine, path, &err));
    MUST(kivi_session_load(&loaded, engine, path, &err));
    assert_int_equal(kivi_session_length(loaded), 148);
    kivi_session_destroy(&loaded);
    kivi_session_destroy(&session);
    close_engine(engine);
}

static void load_fails(kivi_engine *engine, const char *path, kivi_status expected,
                       const char *words) {
    uint64_t blocks = n_blocks(engine);
    kivi_memory before = kivi_engine_memory(engine), after;
    uint32_t pages = free_pages(engine);
    kivi_session *session = (kivi_session *)(void *)&before;
    kivi_status checked = kivi_session_check(engine, path, &err);
    kivi_status status = kivi_session_load(&session, engine, path, &err);
    assert_null(session);
    assert_int_equal(checked, status);
    after = kivi_engine_memory(engine);
    assert_int_equal(n_blocks(engine), blocks);
    assert_memory_equal(&before, &after, sizeof before);
    assert_int_equal(free_pages(engine), pages);
    if (status == KIVI_OK) fail_msg("accepted, expected '%s'", words);
    fails(status, expected ? expected : status, words, __FILE__, __LINE__);
}

static void test_load_refused(void **state) {
    (void)state;
    char path[256];
    snprintf(path, sizeof path, "%s/refused", temp_folder);
    kivi_engine_options o = case_options(0);
    kivi_engine *engine = open_engine(&o);
    kivi_session *session = open_session(engine);
    go_on(session, &main_script, 170, 0, NULL);
    MUST(kivi_session_save(session, path, &err));
    kivi_session_destroy(&session);
    load_fails(engine, in_temp("absent"), KIVI_IO, "absent");
    load_fails(engine, golden("llama/model.safetensors"), KIVI_FORMAT, "model.safetensors|kivi");
    load_fails(engine, temp_folder, KIVI_OK, temp_folder);
    static const struct {
        int other;
        const char *words;
    } others[] = {{1, "another model"},
                  {2, "sinks 0|has 32"},
                  {4, "visibility rule"},
                  {18, "key bits 2|has 8"},
                  {12, "key bits 2|has 4"},
                  {28, "key bits 2|has 16"},
                  {36, "a plain kind|has a + kind"}};
    for (size_t k = 0; k < sizeof others / sizeof *others; k++) {
        kivi_engine_options other = case_options(others[k].other);
        kivi_engine *e = open_engine(&other);
        load_fails(e, path, KIVI_ARG, others[k].words);
        close_engine(e);
    }
    kivi_engine_options other = case_options(0);
    other.ctx_tokens = 128;
    kivi_engine *e = open_engine(&other);
    load_fails(e, path, KIVI_ARG, "context");
    close_engine(e);
    other = case_options(0);
    other.kv.residual_tokens = 64;
    e = open_engine(&other);
    load_fails(e, path, KIVI_ARG, "residual 32|has 64");
    close_engine(e);
    close_engine(engine);
}

static void test_load_damaged(void **state) {
    (void)state;
    char path[256], damaged[256];
    snprintf(path, sizeof path, "%s/whole", temp_folder);
    snprintf(damaged, sizeof damaged, "%s/damaged", temp_folder);
    kivi_engine_options o = case_options(3);
    kivi_engine *engine = open_engine(&o);
    kivi_session *session = open_session(engine);
    go_on(session, &main_script, 170, 0, NULL);
    MUST(kivi_session_save(session, path, &err));
    kivi_session_destroy(&session);
    bytes b = read_bytes(path);
    size_t step = is_slow() ? b.n / 20 : b.n / 200;
    for (size_t n = 0; n < b.n; n += n < 64 ? 1 : step) {
        write_bytes(damaged, b.data, n);
        load_fails(engine, damaged, KIVI_FORMAT, "damaged");
    }
    for (size_t at = 0; at < b.n; at += at < 160 && !is_slow() ? 1 : step) {
        b.data[at] ^= (uint8_t)(1u << at % 8);
        write_bytes(damaged, b.data, b.n);
        load_fails(engine, damaged, KIVI_OK, "damaged");
        b.data[at] ^= (uint8_t)(1u << at % 8);
    }
    for (size_t at = b.n - 8; at < b.n; at++) {
        b.data[at] ^= 0x40;
        write_bytes(damaged, b.data, b.n);
        load_fails(engine, damaged, KIVI_FORMAT, "checksum");
        b.data[at] ^= 0x40;
    }
    b.data[b.n] = 0;
    write_bytes(damaged, b.data, b.n + 1);
    load_fails(engine, damaged, KIVI_FORMAT, "follow");
    free(b.data);
    close_engine(engine);
}

static int prepare(void **state) {
    main_script = (script){.tokens = golden_tokens(), .turns = {{150, 30}, {60, 30}}};
    return make_temp(state);
}
static int clean_up(void **state) {
    for (int i = 0; i < N_CASES; i++) trace_free(&references[i]);
    return remove_temp(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_isa_scalar),
        cmocka_unit_test(test_isa_avx2),
        cmocka_unit_test(test_isa_avx512),
        cmocka_unit_test(test_isa_avx512vnni),
#if defined(__aarch64__)
        cmocka_unit_test(test_isa_neon),
        cmocka_unit_test(test_isa_neondot),
#endif
        cmocka_unit_test(test_neighbours),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_rules_differ),
        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_fork),
        cmocka_unit_test(test_rewind),
        cmocka_unit_test(test_rewind_and_replay),
        cmocka_unit_test(test_save),
        cmocka_unit_test(test_save_before_last_prompt),
        cmocka_unit_test(test_load_refused),
        cmocka_unit_test(test_load_damaged),
    };
    return cmocka_run_group_tests(tests, prepare, clean_up);
}
