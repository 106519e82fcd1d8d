/* Every way kivi.h's calls can refuse: the status, and a line that says what was wrong and what
 * would be right. After a refusal everything goes on as if nothing had been asked. */
#include "engine_helpers.h"

static kivi_engine_options tiny(const char *model) {
    kivi_engine_options o = cpu_defaults();
    o.model_path = golden(model);
    o.kv.residual_tokens = 32;
    o.n_threads = 1;
    o.ctx_tokens = 256;
    return o;
}

static void create_fails(const kivi_engine_options *o, kivi_status expected, const char *words) {
    kivi_engine *engine = (kivi_engine *)(uintptr_t)64;
    kivi_status status = kivi_engine_create(&engine, o, &err);
    if (status == KIVI_OK) fail_msg("accepted, expected '%s'", words);
    assert_null(engine);
    fails(status, expected, words, __FILE__, __LINE__);
}

/* ---- engine ---- */

static void test_status_names(void **state) {
    (void)state;
    assert_string_equal(kivi_status_name(KIVI_OK), "OK");
    assert_string_equal(kivi_status_text(KIVI_FULL), "no free pages");
    assert_string_equal(kivi_status_name(KIVI_INTERNAL), "INTERNAL");
    assert_string_equal(kivi_status_name((kivi_status)99), "?");
    assert_string_equal(kivi_status_text((kivi_status)-1), "unknown status");
}

static void test_model_paths(void **state) {
    (void)state;
    kivi_engine_options o = tiny("llama");
    o.model_path = NULL;
    create_fails(&o, KIVI_ARG, "model_path");
    o.model_path = in_temp("nothing.gguf");
    create_fails(&o, KIVI_IO, "nothing.gguf|No such file");
    mkdir(in_temp("empty"), 0700);
    o.model_path = in_temp("empty");
    create_fails(&o, KIVI_FORMAT, "empty/config.json|not there");
    write_bytes(in_temp("empty/config.json"), "{}", 2);
    create_fails(&o, KIVI_FORMAT, "empty/model.safetensors|no weights");
    write_bytes(in_temp("text"), "Once upon a time", 16);
    o.model_path = in_temp("text");
    create_fails(&o, KIVI_FORMAT, "text|GGUF");
    o.model_path = "/dev/null";
    create_fails(&o, KIVI_FORMAT, "/dev/null|device");
    kivi_engine *engine = NULL;
    assert_int_equal(kivi_engine_create(&engine, &o, NULL), KIVI_FORMAT); /* no error wanted */
}

static void test_engine_options(void **state) {
    (void)state;
    kivi_engine_options o = tiny("llama");
    o.step_rows = 100000;
    create_fails(&o, KIVI_ARG, "100000 rows|65536");
    o = tiny("llama");
    o.max_sessions = 5000;
    create_fails(&o, KIVI_ARG, "5000 sessions|4096");
    o = tiny("llama");
    o.max_sessions = 4096;
    o.ctx_tokens = 1u << 31;
    create_fails(&o, KIVI_ARG, "4096 sessions|2147483648 tokens");
    o = tiny("llama");
    o.n_threads = 2000;
    create_fails(&o, KIVI_ARG, "threads|2000|1024");
    o = tiny("llama");
    o.rope_type = "f8";
    create_fails(&o, KIVI_ARG, "f8|f32, bf16 or f16");
    o = tiny("llama");
    o.disable = "avx512,sse9";
    create_fails(&o, KIVI_ARG, "sse9|avx2, avx512");
    o.disable = "scalar";
    create_fails(&o, KIVI_ARG, "scalar");
}

static void test_kv_options(void **state) {
    (void)state;
    static const struct {
        const char *model;
        kivi_kv_options kv;
        const char *words;
    } bad[] = {
        {"llama", {.k_bits = 3}, "3 bits for keys|2, 4, 8 or 16"},
        {"llama", {.v_bits = 1}, "1 bits for values|2, 4, 8 or 16"},
        {"llama", {.group = 48}, "group 48|head size 32|16, 32"},
        {"llama", {.group = 64}, "group 64|head size 32|16, 32"},
        {"llama-gqa", {.group = 128}, "group 128|head size 64|16, 32, 64"},
        {"llama", {.residual_tokens = 100}, "residual 100|multiple of the group (32)|4096"},
        {"llama", {.residual_tokens = 16}, "residual 16|multiple of the group (32)"},
        {"llama", {.residual_tokens = 8192}, "residual 8192|4096"},
        {"llama", {.sink_tokens = 4097}, "4097 sinks|4096"},
        {"llama", {.sink_tokens = 8192}, "8192 sinks|4096"},
        {"llama", {.rewind_tokens = 5000}, "5000|4096"},
        {"llama", {.rule = KIVI_RULE_SPAN}, "span of 0|128"},
        {"llama", {.rule = KIVI_RULE_SPAN, .span_tokens = 100}, "span of 100|page (128)"},
        {"llama", {.rule = (kivi_rule)7}, "rule 7"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kivi_engine_options o = tiny(bad[i].model);
        o.kv = bad[i].kv;
        create_fails(&o, KIVI_ARG, bad[i].words);
    }
    kivi_engine_options o = tiny("llama"); /* and a plan refuses the same way */
    kivi_engine *engine = open_engine(&o);
    kivi_memory plan;
    FAILS(kivi_engine_plan(&plan, NULL, engine, &bad[0].kv, 100, &err), ARG, "2, 4, 8 or 16");
    close_engine(engine);
}

static void test_defaults(void **state) {
    (void)state;
    kivi_engine_options o = cpu_defaults();
    o.model_path = golden("llama-gqa");
    kivi_engine *engine = open_engine(&o);
    const kivi_engine_info *info = kivi_engine_info_get(engine);
    assert_string_equal(info->model_name, "llama-gqa");
    assert_string_equal(info->architecture, "llama");
    assert_string_equal(info->weight_type, "BF16");
    assert_int_equal(info->n_layers, 3);
    assert_int_equal(info->n_embd, 128);
    assert_int_equal(info->n_heads, 4);
    assert_int_equal(info->n_kv_heads, 1);
    assert_int_equal(info->head_dim, 64);
    assert_int_equal(info->n_vocab, 288);
    assert_int_equal(info->ctx_tokens, 8192); /* the model's own */
    assert_int_equal(info->step_rows, 512);
    assert_int_equal(info->n_threads, ki_cpu_count());
    assert_int_equal(info->kv.k_bits, 2);
    assert_int_equal(info->kv.v_bits, 2);
    assert_int_equal(info->kv.group, 32);
    assert_int_equal(info->kv.residual_tokens, 128);
    assert_int_equal(info->kv.sink_tokens, 0);
    assert_int_equal(info->kv.rule, KIVI_RULE_PAPER);
    assert_true(kivi_engine_bits(engine) > 2.999 && kivi_engine_bits(engine) < 3.001);
    /* 1009408 bytes of BF16 in the file, no matrix twice */
    assert_int_equal(info->n_params, 1009408 / 2);
    close_engine(engine);
}

/* ---- sessions ---- */

typedef struct world {
    kivi_engine *engine;
    kivi_session *session;
} world;
static world open_world(void) {
    kivi_engine_options o = tiny("llama");
    o.max_sessions = 2;
    o.step_rows = 64;
    world w = {.engine = open_engine(&o)};
    w.session = open_session(w.engine);
    return w;
}
static void close_world(world *w) {
    kivi_session_destroy(&w->session);
    assert_null(w->session);
    kivi_session_destroy(&w->session); /* NULL is allowed */
    close_engine(w->engine);
}

/* The session's next logits after `script` equal those of a new session. */
static void as_if_nothing(world *w, const script *s, const char *what) {
    trace straight = run_alone(w->engine, s, 0), t = trace_new(w->engine, script_length(s));
    uint32_t from = kivi_session_length(w->session);
    go_on(w->session, s, 0, 0, &t);
    trace_same(&straight, &t, from, "api", what);
    trace_free(&straight), trace_free(&t);
}

static void test_prompts(void **state) {
    (void)state;
    world w = open_world();
    kivi_session *s = w.session, *other = NULL;
    int32_t ids[N_TOKENS];
    memcpy(ids, golden_tokens(), sizeof ids);
    assert_null(kivi_session_logits(s, 0));
    FAILS(kivi_session_prompt(s, ids, 0, &err), ARG, "empty prompt");
    FAILS(kivi_session_prompt(s, ids, 257, &err), ARG, "257 tokens|context of 256");
    FAILS(kivi_session_begin_prompt(s, SIZE_MAX, &err), ARG, "context of 256");
    FAILS(kivi_session_decode(s, -1, &err), ARG, "token -1|0 to 287");
    FAILS(kivi_session_decode(s, 288, &err), ARG, "token 288|0 to 287");
    assert_int_equal(kivi_session_length(s), 0);
    ids[99] = 1000; /* in the second step of it: the first one stays, as a prompt of its own */
    FAILS(kivi_session_prompt(s, ids, 120, &err), ARG, "token 1000|0 to 287");
    assert_int_equal(kivi_session_length(s), 64);
    script cut = {.tokens = golden_tokens(), .turns = {{64, 3}, {40, 2}}};
    as_if_nothing(&w, &cut, "after a bad token in a prompt");
    FAILS(kivi_session_rewind(s, 110, &err), ARG, "110 of 109");
    /* within a prompt */
    MUST(kivi_session_begin_prompt(s, 10, &err));
    FAILS(kivi_session_begin_prompt(s, 5, &err), ARG, "within a prompt");
    FAILS(kivi_session_fork(&other, s, &err), ARG, "within a prompt");
    assert_null(other);
    FAILS(kivi_session_rewind(s, 5, &err), ARG, "within a prompt");
    FAILS(kivi_session_save(s, in_temp("x"), &err), ARG, "within a prompt");
    kivi_step_item item = {.session = s, .tokens = ids, .n_tokens = 11};
    MUST(kivi_engine_step(w.engine, &item, 1, &err));
    assert_int_equal(item.status, KIVI_ARG);
    assert_non_null(strstr(item.error.text, "10 are left"));
    item.n_tokens = 10;
    MUST(kivi_engine_step(w.engine, &item, 1, &err));
    assert_int_equal(item.status, KIVI_OK);
    close_world(&w);
}

static void test_context_full(void **state) {
    (void)state;
    world w = open_world();
    MUST(kivi_session_prompt(w.session, golden_tokens(), 255, &err));
    MUST(kivi_session_decode(w.session, 5, &err));
    FAILS(kivi_session_decode(w.session, 5, &err), ARG, "after 256|context of 256");
    FAILS(kivi_session_prompt(w.session, golden_tokens(), 1, &err), ARG, "after 256");
    assert_int_equal(kivi_session_length(w.session), 256);
    MUST(kivi_session_rewind(w.session, 254, &err));
    script s = {.tokens = golden_tokens(), .turns = {{254, 2}}};
    as_if_nothing(&w, &s, "at the end of the context");
    close_world(&w);
}

static void test_steps(void **state) {
    (void)state;
    world w = open_world();
    const int32_t *ids = golden_tokens();
    kivi_session *b = open_session(w.engine), *c = open_session(w.engine);
    kivi_step_item items[3] = {{.session = w.session, .tokens = ids, .n_tokens = 40},
                               {.session = b, .tokens = ids, .n_tokens = 25},
                               {.session = c, .tokens = ids, .n_tokens = 1}};
    FAILS(kivi_engine_step(w.engine, items, 0, &err), ARG, "0 sessions|1 to 2");
    FAILS(kivi_engine_step(w.engine, items, 3, &err), ARG, "3 sessions|1 to 2");
    FAILS(kivi_engine_step(w.engine, items, 2, &err), ARG, "65 rows|at most 64");
    items[1].n_tokens = 0;
    FAILS(kivi_engine_step(w.engine, items, 2, &err), ARG, "item 1|no tokens");
    items[1].session = NULL;
    FAILS(kivi_engine_step(w.engine, items, 2, &err), ARG, "item 1|no session");
    items[1] = items[0];
    items[0].n_tokens = items[1].n_tokens = 2;
    FAILS(kivi_engine_step(w.engine, items, 2, &err), ARG, "items 0 and 1|same session");
    world foreign = open_world();
    items[1].session = foreign.session;
    FAILS(kivi_engine_step(w.engine, items, 2, &err), ARG, "item 1|of this engine");
    close_world(&foreign);
    assert_int_equal(kivi_session_length(w.session), 0);
    /* one item is refused, its neighbour goes on */
    int32_t bad[] = {1, 2, 999};
    items[0] = (kivi_step_item){.session = b, .tokens = bad, .n_tokens = 3};
    items[1] = (kivi_step_item){.session = w.session, .tokens = ids, .n_tokens = 1};
    MUST(kivi_engine_step(w.engine, items, 2, &err));
    assert_int_equal(items[0].status, KIVI_ARG);
    assert_non_null(strstr(items[0].error.text, "token 999 at 2"));
    assert_null(kivi_session_logits(b, 0));
    assert_int_equal(kivi_session_length(b), 0);
    assert_int_equal(items[1].status, KIVI_OK);
    script s = {.tokens = ids, .turns = {{0, 20}}};
    as_if_nothing(&w, &s, "beside a refused item");
    kivi_session_destroy(&b), kivi_session_destroy(&c);
    close_world(&w);
}

/* An item's rows of logits one by one: those of the same tokens fed one at a time. */
static void test_logits_of_an_item(void **state) {
    (void)state;
    kivi_engine_options o = tiny("llama");
    o.max_sessions = 2;
    o.logit_rows = 9;
    kivi_engine *engine = open_engine(&o);
    uint32_t n_vocab = kivi_engine_info_get(engine)->n_vocab;
    kivi_session *a = open_session(engine), *b = open_session(engine), *c = open_session(engine);
    float *rows = malloc(8 * n_vocab * sizeof *rows);
    assert_non_null(rows);
    for (uint32_t i = 0; i < 8; i++) {
        MUST(kivi_session_decode(c, golden_tokens()[i], &err));
        memcpy(rows + i * n_vocab, kivi_session_logits(c, 0), n_vocab * sizeof *rows);
    }
    kivi_step_item items[2] = {
        {.session = a, .tokens = golden_tokens(), .n_tokens = 8, .all_logits = true},
        {.session = b, .tokens = golden_tokens(), .n_tokens = 8}};
    MUST(kivi_engine_step(engine, items, 2, &err));
    for (uint32_t i = 0; i < 8; i++)
        assert_memory_equal(kivi_session_logits(a, i), rows + i * n_vocab, n_vocab * sizeof *rows);
    assert_null(kivi_session_logits(a, 8));
    assert_memory_equal(kivi_session_logits(b, 0), rows + 7 * n_vocab, n_vocab * sizeof *rows);
    assert_null(kivi_session_logits(b, 1));
    items[1].all_logits = true;
    FAILS(kivi_engine_step(engine, items, 2, &err), ARG, "16 rows of logits|at most 9");
    assert_int_equal(kivi_session_length(a), 8);
    free(rows);
    kivi_session_destroy(&a), kivi_session_destroy(&b), kivi_session_destroy(&c);
    close_engine(engine);
}

/* A pool of any size: less than one page is refused. */
static void test_pool_size(void **state) {
    (void)state;
    kivi_engine_options o = tiny("llama");
    kivi_engine *engine = open_engine(&o);
    uint64_t page = kivi_engine_memory(engine).kv_codes + kivi_engine_memory(engine).kv_scales;
    page /= engine->cache->pool.n_pages;
    close_engine(engine);
    o.kv_bytes = 7 * page + page / 2;
    engine = open_engine(&o);
    assert_int_equal(free_pages(engine), 7);
    close_engine(engine);
    o.kv_bytes = page - 1;
    create_fails(&o, KIVI_ARG, "kv_bytes|a page");
}

/* Logits are lent until the next step: afterwards they are nobody's, or the new item's. */
static void test_logits_of_last_step(void **state) {
    (void)state;
    world w = open_world();
    kivi_session *b = open_session(w.engine);
    MUST(kivi_session_decode(w.session, 3, &err));
    assert_non_null(kivi_session_logits(w.session, 0));
    assert_null(kivi_session_logits(w.session, 1));
    MUST(kivi_session_decode(b, 4, &err));
    assert_null(kivi_session_logits(w.session, 0));
    assert_non_null(kivi_session_logits(b, 0));
    int32_t id;
    kivi_sampler *sampler = NULL;
    kivi_sampler_options so = kivi_sampler_defaults();
    MUST(kivi_sampler_create(&sampler, w.engine, &so, &err));
    FAILS(kivi_sampler_next(&id, sampler, w.session, &err), ARG, "no logits");
    kivi_sampler_destroy(&sampler);
    kivi_session_destroy(&b);
    close_world(&w);
}

static void test_save_paths(void **state) {
    (void)state;
    world w = open_world();
    kivi_session *other = NULL;
    MUST(kivi_session_prompt(w.session, golden_tokens(), 40, &err));
    FAILS(kivi_session_save(w.session, in_temp("no/such/place"), &err), IO, "no/such/place");
    mkdir(in_temp("folder"), 0700);
    write_bytes(in_temp("folder/file"), "x", 1);
    FAILS(kivi_session_save(w.session, in_temp("folder"), &err), IO, "folder");
    FAILS(kivi_session_load(&other, w.engine, in_temp("nothing"), &err), IO, "nothing");
    /* a pipe would wait, and be a file afterwards */
    assert_int_equal(mkfifo(in_temp("pipe"), 0600), 0);
    FAILS(kivi_session_save(w.session, in_temp("pipe"), &err), IO, "pipe|no regular file");
    FAILS(kivi_session_load(&other, w.engine, in_temp("pipe"), &err), IO, "pipe|no regular file");
    FAILS(kivi_session_check(w.engine, in_temp("pipe"), &err), IO, "pipe|no regular file");
    assert_null(other);
    char command[128];
    snprintf(command, sizeof command, "! ls '%s' | grep -q tmp", temp_folder);
    assert_int_equal(system(command), 0); /* no half-written file is left */
    /* a failed save over a good one leaves the good one */
    MUST(kivi_session_save(w.session, in_temp("good"), &err));
    MUST(kivi_session_save(w.session, in_temp("good"), &err));
    MUST(kivi_session_check(w.engine, in_temp("good"), &err));
    MUST(kivi_session_load(&other, w.engine, in_temp("good"), &err));
    kivi_session_destroy(&other);
    if (!access("/dev/full", W_OK)) {
        char path[256];
        snprintf(path, sizeof path, "%s.%ld.tmp", in_temp("device"), (long)getpid());
        if (!symlink("/dev/full", path)) /* the temporary name is a full disk */
            FAILS(kivi_session_save(w.session, in_temp("device"), &err), IO, "device|space");
        assert_int_not_equal(access(in_temp("device"), F_OK), 0);
    }
    close_world(&w);
}

/* ---- no free pages ---- */

static void test_full(void **state) {
    (void)state;
    kivi_engine_options o = tiny("llama"); /* one session of 256: two pages */
    kivi_engine *engine = open_engine(&o);
    const int32_t *ids = golden_tokens();
    script s = {.tokens = ids, .turns = {{200, 40}}};
    script short_s = {.tokens = ids, .turns = {{100, 9}}};
    trace straight = run_alone(engine, &s, 0), straight2 = run_alone(engine, &short_s, 0);
    trace t = trace_new(engine, 240), t2 = trace_new(engine, 109);
    world a = {engine, open_session(engine)}, b = {engine, open_session(engine)};
    go_on(a.session, &s, 200, 0, &t);
    uint64_t before = kivi_engine_memory(engine).kv_residual;
    FAILS(kivi_session_prompt(b.session, ids, 100, &err), FULL, "1 more pages|0 of 2 are free");
    FAILS(kivi_session_decode(b.session, 1, &err), FULL, "0 of 2");
    /* what the prompt held is given back */
    assert_int_equal(kivi_engine_memory(engine).kv_residual, before);
    assert_int_equal(kivi_session_length(b.session), 0);
    go_on(a.session, &s, 0, 0, &t);
    trace_same(&straight, &t, 0, "full", "the first goes on");
    kivi_session *fork = NULL;
    FAILS(kivi_session_fork(&fork, a.session, &err), FULL, "no free page|2");
    assert_null(fork);
    kivi_session_destroy(&a.session);
    assert_int_equal(free_pages(engine), 2);
    go_on(b.session, &short_s, 0, 0, &t2);
    trace_same(&straight2, &t2, 0, "full", "the second, once there were pages");
    kivi_session_destroy(&b.session);
    trace_free(&straight), trace_free(&straight2), trace_free(&t), trace_free(&t2);
    close_engine(engine);
}

/* In one step: the one without a page is FULL, the other one goes on; later both do. */
static void test_full_in_a_step(void **state) {
    (void)state;
    kivi_engine_options o = tiny("llama");
    o.max_sessions = 2; /* four pages */
    kivi_engine *engine = open_engine(&o);
    const int32_t *ids = golden_tokens();
    script s = {.tokens = ids, .turns = {{128, 20}}};
    trace straight = run_alone(engine, &s, 0), t = trace_new(engine, 148);
    kivi_session *a = open_session(engine), *b = open_session(engine), *c = open_session(engine);
    go_on(a, &s, 128, 0, &t);
    go_on(b, &s, 128, 0, NULL);
    MUST(kivi_session_prompt(c, ids, 100, &err));
    kivi_step_item items[2] = {{.session = a, .tokens = ids + 128, .n_tokens = 1},
                               {.session = b, .tokens = ids + 128, .n_tokens = 1}};
    MUST(kivi_engine_step(engine, items, 2, &err));
    assert_int_equal(items[0].status, KIVI_OK);
    assert_int_equal(items[1].status, KIVI_FULL);
    assert_int_equal(items[1].error.status, KIVI_FULL);
    assert_int_equal(kivi_session_length(b), 128);
    kivi_session_destroy(&c);
    trace tb = trace_new(engine, 148);
    go_on(a, &s, 0, 0, &t);
    go_on(b, &s, 0, 0, &tb);
    trace_same(&straight, &t, 0, "full in a step", "the one that went on");
    trace_same(&straight, &tb, 0, "full in a step", "the one that waited");
    kivi_session_destroy(&a), kivi_session_destroy(&b);
    trace_free(&straight), trace_free(&t), trace_free(&tb);
    close_engine(engine);
}

/* A prompt that gets no pages for its rest is given up: all goes on as if it had not been. */
static void abandon(const char *model, kivi_rule rule, uint32_t begun, const char *what) {
    kivi_engine_options o = tiny(model);
    o.max_sessions = 2;
    o.ctx_tokens = 384; /* six pages in all */
    o.kv.rule = rule;
    kivi_engine *engine = open_engine(&o);
    const int32_t *ids = golden_tokens();
    script s = {.tokens = ids, .turns = {{90, 11}, {60, 10}}};
    trace straight = run_alone(engine, &s, 0), t = trace_new(engine, 171);
    kivi_session *a = open_session(engine), *other = open_session(engine);
    MUST(kivi_session_abandon_prompt(a, &err)); /* there is none */
    go_on(a, &s, 101, 0, &t);
    MUST(kivi_session_prompt(other, ids, 300, &err));
    uint32_t n_free = free_pages(engine);
    uint64_t held = kivi_engine_memory(engine).kv_residual;
    MUST(kivi_session_begin_prompt(a, 280, &err));
    for (uint32_t i = 0; i < begun; i += 5) {
        kivi_step_item item = {.session = a, .tokens = ids + 7 + i, .n_tokens = 5};
        MUST(kivi_engine_step(engine, &item, 1, &err));
        assert_int_equal(item.status, KIVI_OK);
    }
    kivi_session *third = NULL; /* takes the pages that are left */
    MUST(kivi_session_create(&third, engine, &err));
    while (free_pages(engine)) MUST(kivi_session_prompt(third, ids, 100, &err));
    kivi_step_item item = {.session = a, .tokens = ids, .n_tokens = 280 - begun};
    for (int i = 0; i < 2; i++) { /* the second time, too: it is not a fault */
        MUST(kivi_engine_step(engine, &item, 1, &err));
        assert_int_equal(item.status, KIVI_FULL);
        assert_int_equal(kivi_session_length(a), 101 + begun);
    }
    kivi_session_destroy(&third);
    MUST(kivi_session_abandon_prompt(a, &err));
    assert_int_equal(kivi_session_length(a), 101);
    assert_null(kivi_session_logits(a, 0));
    assert_int_equal(free_pages(engine), n_free);
    assert_int_equal(kivi_engine_memory(engine).kv_residual, held);
    kivi_session_destroy(&other);
    go_on(a, &s, 0, 0, &t);
    trace_same(&straight, &t, 0, "abandoned", what);
    kivi_session_destroy(&a);
    trace_free(&straight), trace_free(&t);
    close_engine(engine);
}

static void test_abandoned_prompt(void **state) {
    (void)state;
    abandon("llama", KIVI_RULE_PAPER, 0, "paper, at its beginning");
    abandon("llama", KIVI_RULE_PAPER, 20, "paper");
    abandon("llama", KIVI_RULE_STREAM, 20, "stream");
    abandon("llama", KIVI_RULE_STREAM, 110, "stream, far in");
    abandon("mistral-swa", KIVI_RULE_PAPER, 110, "a window");
    abandon("dynamic", KIVI_RULE_PAPER, 25, "dynamic");
    abandon("dynamic", KIVI_RULE_STREAM, 110, "dynamic, stream");
}

/* A long step back has to evaluate again, and finds no pages: what could be had stays. */
static void test_full_in_a_step_back(void **state) {
    (void)state;
    kivi_engine_options o = tiny("llama");
    o.step_rows = 64;
    kivi_engine *engine = open_engine(&o);
    script s = {.tokens = golden_tokens(), .turns = {{120, 20}, {60, 10}}};
    kivi_session *a = open_session(engine), *b = NULL;
    go_on(a, &s, 130, 0, NULL);
    MUST(kivi_session_rewind(a, 128, &err));
    MUST(kivi_session_fork(&b, a, &err)); /* shares the full page, or takes the second one */
    kivi_status status = KIVI_OK;
    for (int32_t i = 0; i < 30 && status == KIVI_OK; i++) status = kivi_session_decode(b, i, &err);
    status = kivi_session_rewind(b, 60, &err);
    if (status != KIVI_OK) assert_int_equal(status, KIVI_FULL);
    assert_true(kivi_session_length(b) <= 60);
    uint32_t length = kivi_session_length(b);
    kivi_session_destroy(&a);
    script rest = script_cut(&s, length);
    script_add(&rest, (turn){30, 2});
    world w = {engine, b};
    as_if_nothing(&w, &rest, "after a step back that failed");
    kivi_session_destroy(&w.session);
    close_engine(engine);
}

/* ---- text ---- */

static void test_text_without_vocabulary(void **state) {
    (void)state;
    world w = open_world();
    int32_t ids[4];
    char piece[8];
    size_t n = 9;
    FAILS(kivi_tokenize(w.engine, "abc", 3, 0, ids, 4, &n, &err), UNSUPPORTED, "tokenizer.json");
    assert_int_equal(n, 0);
    assert_int_equal(kivi_token_bytes(w.engine, 5, piece, sizeof piece), 0);
    assert_false(kivi_token_is_control(w.engine, 1));
    assert_int_equal(kivi_engine_info_get(w.engine)->eos_id, -1);
    close_world(&w);
}

static void test_text(void **state) {
    (void)state;
    if (!real_model()) {
        print_message("KIVI_TEST_MODEL is not set\n");
        skip();
    }
    kivi_engine_options o = cpu_defaults();
    o.model_path = real_model();
    o.ctx_tokens = 128;
    kivi_engine *engine = open_engine(&o);
    static const char text[] = "Grüße, 世界! <|im_end|>";
    int32_t ids[64], plain[64];
    size_t n = 0, n_plain = 0, at = 0;
    char back[128], piece[64];
    MUST(kivi_tokenize(engine, text, strlen(text), 0, plain, 64, &n_plain, &err));
    MUST(kivi_tokenize(engine, text, strlen(text), KIVI_TEXT_SPECIAL, ids, 64, &n, &err));
    assert_true(n < n_plain); /* a user's words never become control tokens */
    assert_true(kivi_token_is_control(engine, ids[n - 1]));
    for (size_t i = 0; i < n_plain; i++) assert_false(kivi_token_is_control(engine, plain[i]));
    kivi_utf8 utf8 = {0};
    for (size_t i = 0; i < n_plain; i++) {
        char whole[3 * (sizeof piece + 4)];
        size_t n_piece = kivi_token_bytes(engine, plain[i], piece, sizeof piece);
        size_t n_whole = kivi_utf8_push(&utf8, piece, n_piece, whole);
        memcpy(back + at, whole, n_whole);
        at += n_whole;
    }
    assert_int_equal(kivi_utf8_push(&utf8, NULL, 0, piece), 0);
    assert_int_equal(at, strlen(text));
    assert_memory_equal(back, text, at);
    FAILS(kivi_tokenize(engine, text, strlen(text), 0, ids, 2, &n, &err), ARG, "");
    assert_int_equal(n, n_plain); /* how many there would be */
    assert_int_equal(kivi_token_bytes(engine, -1, piece, sizeof piece), 0);
    assert_int_equal(kivi_token_bytes(engine, 1 << 20, piece, sizeof piece), 0);
    assert_int_equal(kivi_token_bytes(engine, plain[0], piece, 1), 1);
    close_engine(engine);
}

static void test_utf8(void **state) {
    (void)state;
    kivi_utf8 s = {0};
    char out[64];
    assert_int_equal(kivi_utf8_push(&s, "\xe4\xb8", 2, out), 0);
    assert_int_equal(kivi_utf8_push(&s, "\x96" "a", 2, out), 4);
    assert_memory_equal(out, "\xe4\xb8\x96" "a", 4);
    assert_int_equal(kivi_utf8_push(&s, "\xff", 1, out), 3);
    assert_memory_equal(out, "\xef\xbf\xbd", 3);
    assert_int_equal(kivi_utf8_push(&s, "\xf0\x9f", 2, out), 0);
    assert_int_equal(kivi_utf8_push(&s, NULL, 0, out), 3);
    assert_int_equal(kivi_utf8_push(&s, NULL, 0, out), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status_names),
        cmocka_unit_test(test_model_paths),
        cmocka_unit_test(test_engine_options),
        cmocka_unit_test(test_kv_options),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_prompts),
        cmocka_unit_test(test_context_full),
        cmocka_unit_test(test_steps),
        cmocka_unit_test(test_logits_of_an_item),
        cmocka_unit_test(test_pool_size),
        cmocka_unit_test(test_logits_of_last_step),
        cmocka_unit_test(test_save_paths),
        cmocka_unit_test(test_full),
        cmocka_unit_test(test_full_in_a_step),
        cmocka_unit_test(test_full_in_a_step_back),
        cmocka_unit_test(test_abandoned_prompt),
        cmocka_unit_test(test_text_without_vocabulary),
        cmocka_unit_test(test_text),
        cmocka_unit_test(test_utf8),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
