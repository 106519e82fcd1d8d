/* SmolLM2 in 4-bit weights: the same bytes as in test_engine_exact.c, in one shorter round for each
 * kind. About 150 tokens: a prompt, decodes, a second prompt, decodes. */
#include "engine_helpers.h"

static int32_t tokens[256];
static const script main_script = {.tokens = tokens, .turns = {{110, 4}, {30, 4}}};

typedef struct kind {
    const char *name;
    kivi_kv_options kv;
} kind;
#define KV(k, v, r, s, rule_, n)                                                                   \
    {                                                                                              \
        .k_bits = (k), .v_bits = (v), .group = 32, .residual_tokens = (r), .sink_tokens = (s),     \
        .rule = KIVI_RULE_##rule_, .span_tokens = (n), .rewind_tokens = 16                         \
    }
#define PLUS(k, v, rule_, n)                                                                       \
    {                                                                                              \
        .k_bits = (k), .v_bits = (v), .plus = KIVI_PLUS_ALL, .sink_tokens = 4,                     \
        .rule = KIVI_RULE_##rule_, .span_tokens = (n), .rewind_tokens = 16                         \
    }
static const kind kivi2 = {"kivi2", KV(2, 2, 32, 0, PAPER, 0)};
static const kind kivi2_stream = {"kivi2 stream sinks", KV(2, 2, 32, 32, STREAM, 0)};
static const kind kivi2_4 = {"kivi2 stream 4 sinks", KV(2, 2, 32, 4, STREAM, 0)};
static const kind k4v2 = {"k4v2 span", KV(4, 2, 64, 0, SPAN, 128)};
static const kind kivi2_plus = {"kivi2+", PLUS(2, 2, PAPER, 0)};
static const kind kivi2_plus_stream = {"kivi2+ stream", PLUS(2, 2, STREAM, 0)};
static const kind k4v3_plus = {"k4v3+ span", PLUS(4, 3, SPAN, 128)};
static const kind kivi8 = {"kivi8", KV(8, 8, 32, 0, PAPER, 0)};
static const kind k16v2 = {"k16v2", KV(16, 2, 32, 0, PAPER, 0)};
static const kind f16 = {"f16", KV(16, 16, 32, 0, PAPER, 0)};

static kivi_engine *open_kind(const kind *k, unsigned n_threads, const char *disable) {
    kivi_engine_options o = cpu_defaults();
    o.model_path = real_model();
    o.kv = k->kv;
    o.n_threads = n_threads;
    o.disable = disable;
    o.ctx_tokens = 256;
    o.max_sessions = 3;
    return open_engine(&o);
}

/* Alone and in one go, with one thread. */
static trace reference_of(const kind *k) {
    kivi_engine *engine = open_kind(k, 1, NULL);
    trace t = run_alone(engine, &main_script, 0);
    close_engine(engine);
    return t;
}

/* Three threads; two neighbours, one of which ends early; a prompt in pieces. */
static void check_among(const kind *k, const trace *expected) {
    kivi_engine *engine = open_kind(k, 3, NULL);
    script a = {.tokens = tokens + 5, .turns = {{20, 2}}};
    script b = {.tokens = tokens + 9, .turns = {{0, 3}, {64, 1}}};
    trace t = trace_new(engine, script_length(&main_script));
    actor actors[3] = {{.script = &a, .chunk = 64},
                       {.script = &main_script, .chunk = 64, .trace = &t},
                       {.script = &b, .chunk = 50}};
    for (int i = 0; i < 3; i++) actors[i].session = open_session(engine);
    actors_run(actors, 3);
    for (int i = 0; i < 3; i++) kivi_session_destroy(&actors[i].session);
    trace_same(expected, &t, 0, k->name, "3 threads, neighbours, chunks of 64");
    trace_free(&t);
    close_engine(engine);
}

/* Two threads, chunks of 7; then forks, files and steps back from there. */
static void check_history(const kind *k, const trace *expected) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", temp_folder, "smollm2");
    kivi_engine *engine = open_kind(k, 2, NULL);
    uint32_t n = script_length(&main_script);
    trace t = trace_new(engine, n), forked = trace_new(engine, n), loaded = trace_new(engine, n),
          back = trace_new(engine, n), far = trace_new(engine, n);
    kivi_session *s = open_session(engine), *other = NULL;
    go_on(s, &main_script, 112, 7, &t);
    MUST(kivi_session_fork(&other, s, &err));
    MUST(kivi_session_save(s, path, &err));
    go_on(s, &main_script, 0, 7, &t);
    trace_same(expected, &t, 0, k->name, "2 threads, chunks of 7");
    go_on(other, &main_script, 0, 0, &forked);
    trace_same(expected, &forked, 112, k->name, "a fork");
    kivi_session_destroy(&other);
    MUST(kivi_session_load(&other, engine, path, &err));
    go_on(other, &main_script, 0, 0, &loaded);
    trace_same(expected, &loaded, 112, k->name, "loaded");
    MUST(kivi_session_rewind(other, n - 3, &err));
    go_on(other, &main_script, 0, 0, &back);
    trace_same(expected, &back, n - 3, k->name, "a short step back");
    MUST(kivi_session_rewind(other, 111, &err));
    go_on(other, &main_script, 0, 0, &far);
    trace_same(expected, &far, 111, k->name, "a long step back");
    kivi_session_destroy(&other);
    kivi_session_destroy(&s);
    trace_free(&t), trace_free(&forked), trace_free(&loaded), trace_free(&back), trace_free(&far);
    close_engine(engine);
}

/* Every instruction set this machine has; the scalar one on a few tokens. */
static void check_isas(const kind *k, const trace *expected) {
    static const char *const disable[KI_ISA_COUNT] = {
        [KI_ISA_AVX2] = "avx512", [KI_ISA_AVX512] = "avx512vnni", [KI_ISA_NEON] = "neondot"};
    script most = script_cut(&main_script, main_script.turns[0].n_prompt + 1);
    for (int isa = KI_ISA_AVX2; isa < KI_ISA_COUNT; isa++) {
        if (!ki_isa_available((ki_isa)isa)) continue;
        kivi_engine *engine = open_kind(k, 2, disable[isa]);
        assert_string_equal(kivi_engine_info_get(engine)->isa, ki_isa_names[isa]);
        trace t = run_alone(engine, &most, 0);
        trace_same(expected, &t, 0, k->name, ki_isa_names[isa]);
        trace_free(&t);
        close_engine(engine);
    }
    script few = {.tokens = tokens, .turns = {{6, 1}}};
    kivi_engine *scalar = open_kind(k, 2, "avx2,neon"), *best = open_kind(k, 1, NULL);
    trace a = run_alone(scalar, &few, 0), b = run_alone(best, &few, 0);
    trace_same(&a, &b, 0, k->name, "scalar");
    trace_free(&a), trace_free(&b);
    close_engine(scalar);
    close_engine(best);
}

static void check_kind(const kind *k) {
    if (!real_model()) {
        print_message("KIVI_TEST_MODEL is not set\n");
        skip();
    }
    if (is_slow()) skip(); /* the golden models go the same ways */
    trace expected = reference_of(k);
    check_among(k, &expected);
    check_history(k, &expected);
    check_isas(k, &expected);
    if (k->kv.rule == KIVI_RULE_STREAM) {
        script one = {.tokens = tokens, .turns = {{130, script_length(&main_script) - 130}}};
        kivi_engine *engine = open_kind(k, 2, NULL);
        trace t = run_alone(engine, &one, 0);
        trace_same(&expected, &t, 129, k->name, "token by token");
        trace_free(&t);
        close_engine(engine);
    }
    trace_free(&expected);
}

static void test_kivi2(void **state) { (void)state, check_kind(&kivi2); }
static void test_kivi2_stream(void **state) { (void)state, check_kind(&kivi2_stream); }
static void test_kivi2_4(void **state) { (void)state, check_kind(&kivi2_4); }
static void test_kivi2_plus(void **state) { (void)state, check_kind(&kivi2_plus); }
static void test_kivi2_plus_stream(void **state) { (void)state, check_kind(&kivi2_plus_stream); }
static void test_k4v3_plus_span(void **state) { (void)state, check_kind(&k4v3_plus); }
static void test_k4v2_span(void **state) { (void)state, check_kind(&k4v2); }
static void test_kivi8(void **state) { (void)state, check_kind(&kivi8); }
static void test_k16v2(void **state) { (void)state, check_kind(&k16v2); }
static void test_f16(void **state) { (void)state, check_kind(&f16); }

static int prepare(void **state) {
    uint32_t x = 1;
    for (int i = 0; i < 256; i++) tokens[i] = (int32_t)((x = x * 1103515245 + 12345) >> 16) % 49152;
    return make_temp(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kivi2),
        cmocka_unit_test(test_kivi2_stream),
        cmocka_unit_test(test_kivi2_4),
        cmocka_unit_test(test_kivi2_plus),
        cmocka_unit_test(test_kivi2_plus_stream),
        cmocka_unit_test(test_k4v3_plus_span),
        cmocka_unit_test(test_k4v2_span),
        cmocka_unit_test(test_kivi8),
        cmocka_unit_test(test_k16v2),
        cmocka_unit_test(test_f16),
    };
    return cmocka_run_group_tests(tests, prepare, remove_temp);
}
