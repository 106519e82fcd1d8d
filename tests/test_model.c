/* test_model.c: what families add to the engine: configurations and their errors, old and new forms
 * of config.json, sliding windows whose pages are given back, and exactness with them. */
#include "engine_helpers.h"
#include "model_private.h"

/* ---- configurations, without weights ---- */

static const char *config_folder(const char *text) {
    mkdir(in_temp("c"), 0700);
    write_bytes(in_temp("c/config.json"), text, strlen(text));
    return in_temp("c");
}

static kivi_status read_config(ki_config *out, const char *text) {
    ki_mem mem;
    ki_file *file = NULL;
    ki_mem_init(&mem);
    MUST(ki_file_open_shape(&file, &mem, config_folder(text), &err));
    kivi_status status = ki_config_read(out, file, &err);
    ki_file_close(&file);
    assert_int_equal(atomic_load(&mem.n_blocks), 0);
    return status;
}

#define SIZES                                                                                      \
    "\"hidden_size\": 128, \"intermediate_size\": 192, \"num_hidden_layers\": 4, "                 \
    "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 288, "                \
    "\"max_position_embeddings\": 2048"

static void test_config_errors(void **state) {
    (void)state;
    static const struct {
        const char *text, *words;
        kivi_status status;
    } bad[] = {
        {"{\"model_type\": \"gpt2\"}", "config.json|model_type|gpt2|falcon", KIVI_UNSUPPORTED},
        {"{\"model_type\": 7}", "config.json|model_type|string", KIVI_FORMAT},
        {"{\"model_type\": \"qwen2\"}", "config.json|num_hidden_layers|missing", KIVI_FORMAT},
        {"{\"model_type\": \"qwen2\", \"num_hidden_layers\": 9999}",
         "config.json|num_hidden_layers|9999|1024", KIVI_FORMAT},
        {"{\"model_type\": \"qwen3\", " SIZES ", \"attention_bias\": true}",
         "config.json|attention_bias|true|false", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"gemma3_text\", " SIZES ", \"final_logit_softcapping\": 30.0}",
         "config.json|final_logit_softcapping|none", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"gemma3_text\", " SIZES ", \"layer_types\": [\"full_attention\"]}",
         "config.json|layer_types|1|4", KIVI_FORMAT},
        {"{\"model_type\": \"qwen2\", " SIZES ", \"use_sliding_window\": true, "
         "\"sliding_window\": 64, \"layer_types\": [\"chunked\", \"a\", \"b\", \"c\"]}",
         "config.json|layer_types|chunked|full_attention", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"mistral\", " SIZES ", \"sliding_window\": \"big\"}",
         "config.json|sliding_window|string", KIVI_FORMAT},
        {"{\"model_type\": \"falcon\", " SIZES ", \"alibi\": true}", "config.json|alibi|true|false",
         KIVI_UNSUPPORTED},
        {"{\"model_type\": \"falcon\", " SIZES ", \"parallel_attn\": false}",
         "config.json|parallel_attn|false|true", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"llama\", " SIZES ", \"hidden_act\": \"relu\"}",
         "config.json|hidden_act|relu|silu", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"llama\", " SIZES
         ", \"rope_scaling\": {\"rope_type\": \"longrope\", \"factor\": 4.0}}",
         "config.json|rope_scaling.rope_type|longrope|dynamic, yarn", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"llama\", " SIZES ", \"rope_scaling\": {\"type\": \"linear\"}}",
         "config.json|rope_scaling.factor|missing|linear", KIVI_FORMAT},
        {"{\"model_type\": \"falcon\", " SIZES ", \"rope_scaling\": {\"type\": \"dynamic\"}}",
         "config.json|rope_scaling.factor|missing|dynamic", KIVI_FORMAT},
        {"{\"model_type\": \"llama\", " SIZES ", \"rope_parameters\": {\"rope_type\": \"llama3\"}}",
         "config.json|rope_parameters.factor|missing|llama3", KIVI_FORMAT},
        {"{\"model_type\": \"llama\", " SIZES ", \"rope_scaling\": \"yarn\"}",
         "config.json|rope_scaling|no object|null", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"qwen2\", " SIZES ", \"rope_parameters\": [4.0]}",
         "config.json|rope_parameters|no object|null", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"llama\", " SIZES ", \"partial_rotary_factor\": 0.5}",
         "config.json|partial_rotary_factor below 1|whole heads", KIVI_UNSUPPORTED},
        {"{\"model_type\": \"llama\", " SIZES ", \"head_dim\": 72}",
         "config.json|head size 72|multiple of 16", KIVI_UNSUPPORTED},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ki_config c;
        kivi_status status = read_config(&c, bad[i].text);
        if (status == KIVI_OK) fail_msg("accepted: %s", bad[i].text);
        fails(status, bad[i].status, bad[i].words, __FILE__, (int)i);
    }
}

static void good(ki_config *c, const char *text) { must(read_config(c, text), text, 0); }

/* The same model in the spelling of transformers 4 and of 5. */
static void test_config_forms(void **state) {
    (void)state;
    ki_config a, b;
    good(&a, "{\"model_type\": \"gemma3_text\", " SIZES ", \"rope_theta\": 1000000.0, "
             "\"rope_local_base_freq\": 10000.0, \"rope_scaling\": {\"type\": \"linear\", "
             "\"factor\": 8.0}, \"sliding_window\": 40, \"sliding_window_pattern\": 2}");
    good(&b, "{\"model_type\": \"gemma3_text\", " SIZES ", \"sliding_window\": 40, "
             "\"layer_types\": [\"sliding_attention\", \"full_attention\", "
             "\"sliding_attention\", \"full_attention\"], \"rope_parameters\": "
             "{\"full_attention\": {\"rope_type\": \"linear\", \"rope_theta\": 1000000.0, "
             "\"factor\": 8.0}, \"sliding_attention\": {\"rope_type\": \"default\", "
             "\"rope_theta\": 10000.0}}}");
    assert_memory_equal(&a, &b, sizeof a);
    assert_int_equal(a.head_dim, 256);
    assert_true(a.tied_output && a.local[0] && !a.local[1]);
    assert_int_equal(ki_config_window(&a), 0); /* global layers read everything */
    good(&a, "{\"model_type\": \"falcon\", \"hidden_size\": 128, \"n_layer\": 3, \"n_head\": 4, "
             "\"vocab_size\": 288, \"multi_query\": true}");
    good(&b, "{\"model_type\": \"falcon\", \"hidden_size\": 128, \"num_hidden_layers\": 3, "
             "\"num_attention_heads\": 4, \"num_kv_heads\": 4, \"ffn_hidden_size\": 512, "
             "\"vocab_size\": 288, \"new_decoder_architecture\": false}");
    assert_memory_equal(&a, &b, sizeof a);
    assert_int_equal(a.n_kv_heads, 1);
    assert_true(a.one_norm && a.n_ff == 512);
    good(&a, "{\"model_type\": \"qwen2\", " SIZES ", \"use_sliding_window\": true, "
             "\"sliding_window\": 64, \"max_window_layers\": 3}");
    assert_true(!a.local[2] && a.local[3] && a.window == 64 && a.qkv_bias);
    good(&a, "{\"model_type\": \"qwen2\", " SIZES ", \"sliding_window\": 64}");
    assert_true(!a.local[3]);
    good(&a, "{\"model_type\": \"mistral\", " SIZES ", \"sliding_window\": 64}");
    assert_int_equal(ki_config_window(&a), 64);
    good(&a, "{\"model_type\": \"mistral\", " SIZES ", \"sliding_window\": null}");
    assert_int_equal(ki_config_window(&a), 0);
    good(&a, "{\"model_type\": \"llama\", " SIZES ", \"rope_scaling\": {\"type\": \"yarn\", "
             "\"factor\": 4.0}}");
    assert_int_equal(a.rope[0].scaling, KI_ROPE_YARN);
    assert_true(a.rope[0].attention > 1.138 && a.rope[0].attention < 1.139); /* 0.1 ln 4 + 1 */
}

/* A head size that 32 does not divide takes G = 16, or is refused with what would do. */
static void test_group(void **state) {
    (void)state;
    kivi_kv_options kv = {0};
    MUST(kivi_kv_resolve(&kv, 80, &err));
    assert_int_equal(kv.group, 16);
    kv = (kivi_kv_options){.group = 32};
    FAILS(kivi_kv_resolve(&kv, 80, &err), ARG, "group 32|80|16");
    kv = (kivi_kv_options){0};
    FAILS(kivi_kv_resolve(&kv, 72, &err), UNSUPPORTED, "72|multiple of 16");
    kivi_engine_options o = cpu_defaults();
    o.model_path = config_folder("{\"model_type\": \"llama\", \"hidden_size\": 320, "
                                 "\"intermediate_size\": 192, \"num_hidden_layers\": 2, "
                                 "\"num_attention_heads\": 4, \"vocab_size\": 288}");
    o.dummy_weights = true;
    o.n_threads = 1;
    o.ctx_tokens = 384;
    o.all_logits = true;
    kivi_engine *engine = open_engine(&o);
    assert_int_equal(kivi_engine_info_get(engine)->kv.group, 16);
    script s = {.tokens = golden_tokens(), .turns = {{200, 20}}};
    trace t = run_alone(engine, &s, 0);
    for (uint32_t i = 0; i < 288; i++) assert_true(t.rows[219][i] - t.rows[219][i] == 0);
    trace_free(&t);
    close_engine(engine);
    o.kv.group = 64;
    engine = NULL;
    FAILS(kivi_engine_create(&engine, &o, &err), ARG, "group 64|80|16");
}

/* ---- families at work ---- */

static const char *const models[] = {"mistral-swa", "gemma3", "falcon-gqa", "qwen2", "dynamic"};
enum { N_MODELS = sizeof models / sizeof *models };

static kivi_engine_options options_of(const char *model, uint32_t bits, kivi_rule rule) {
    kivi_engine_options o = cpu_defaults();
    o.model_path = golden(model);
    o.kv.k_bits = o.kv.v_bits = bits;
    o.kv.residual_tokens = 32;
    o.kv.rule = rule;
    o.n_threads = 1;
    o.ctx_tokens = 512;
    o.max_sessions = 4;
    o.step_rows = 64;
    o.all_logits = true;
    return o;
}

static const script two_prompts = {.turns = {{150, 10}, {60, 20}}};

/* Chunks, threads, a neighbour, a fork, a rewind, a file: the same bytes. */
static void same_however(const char *model, uint32_t bits, kivi_rule rule) {
    script s = two_prompts;
    s.tokens = golden_tokens();
    kivi_engine_options o = options_of(model, bits, rule);
    kivi_engine *engine = open_engine(&o);
    trace reference = run_alone(engine, &s, 0);
    static const uint32_t chunks[] = {1, 7, 33};
    for (size_t i = 0; i < 3; i++) {
        trace t = run_alone(engine, &s, chunks[i]);
        trace_same(&reference, &t, 0, model, "chunks");
        trace_free(&t);
    }
    kivi_session *session = open_session(engine), *other = NULL;
    go_on(session, &s, 160, 0, NULL);
    MUST(kivi_session_fork(&other, session, &err));
    trace t = trace_new(engine, script_length(&s));
    go_on(other, &s, 0, 9, &t);
    trace_same(&reference, &t, 160, model, "fork");
    MUST(kivi_session_save(session, in_temp("s"), &err));
    kivi_session_destroy(&other);
    MUST(kivi_session_load(&other, engine, in_temp("s"), &err));
    trace_free(&t), t = trace_new(engine, script_length(&s));
    go_on(other, &s, 0, 0, &t);
    trace_same(&reference, &t, 160, model, "file");
    static const uint32_t backs[] = {235, 155, 20}; /* near, far, behind every window */
    for (size_t i = 0; i < 3; i++) {
        MUST(kivi_session_rewind(other, backs[i], &err));
        if (backs[i] == 20) { /* a prompt cut short is another prompt */
            script cut = script_cut(&s, 20);
            script_add(&cut, (turn){0, 30});
            trace want = run_alone(engine, &cut, 0);
            trace_free(&t), t = trace_new(engine, 50);
            go_on(other, &cut, 0, 0, &t);
            trace_same(&want, &t, 20, model, "rewind");
            trace_free(&want);
        } else {
            trace_free(&t), t = trace_new(engine, script_length(&s));
            go_on(other, &s, 0, 0, &t);
            trace_same(&reference, &t, backs[i], model, "rewind");
        }
    }
    trace_free(&t);
    kivi_session_destroy(&other);
    kivi_session_destroy(&session);
    close_engine(engine);
    o.n_threads = 3;
    engine = open_engine(&o);
    t = run_alone(engine, &s, 0);
    trace_same(&reference, &t, 0, model, "threads");
    trace_free(&t);
    trace_free(&reference);
    close_engine(engine);
}

static void test_same_bytes(void **state) {
    (void)state;
    for (int i = 0; i < N_MODELS; i++) {
        if (is_slow() && i > 1) continue;
        same_however(models[i], 2, KIVI_RULE_PAPER);
        same_however(models[i], 2, KIVI_RULE_STREAM);
        same_however(models[i], 16, KIVI_RULE_PAPER);
    }
}

/* Pages behind the window go back to the pool, and the engine makes no more than it needs. */
static void window_pages(uint32_t bits) {
    kivi_engine_options o = options_of("mistral-swa", bits, KIVI_RULE_PAPER);
    o.ctx_tokens = 2048;
    o.max_sessions = 1;
    o.all_logits = false;
    kivi_engine *engine = open_engine(&o);
    uint32_t n_all = engine->cache->pool.n_pages; /* (72 + 16 + 64 + 127) / 128 + 1 more, not 16 */
    assert_int_equal(n_all, 4);
    kivi_memory plan;
    MUST(kivi_engine_plan(&plan, NULL, engine, &o.kv, 2048, &err));
    assert_int_equal(plan.kv_codes, kivi_engine_memory(engine).kv_codes);
    kivi_session *session = open_session(engine);
    int32_t tokens[2000];
    for (int i = 0; i < 2000; i++) tokens[i] = golden_tokens()[i % N_TOKENS];
    MUST(kivi_session_prompt(session, tokens, 1500, &err));
    /* rows from 1500 - 16 + 1 - 72 = 1413 on may be read: page 11 of 0..11 */
    assert_int_equal(session->seq->n_pages, 12);
    assert_int_equal(session->seq->n_gone, 11);
    assert_int_equal(free_pages(engine), n_all - 1);
    for (uint32_t i = 0; i < 11; i++) assert_int_equal(session->seq->pages[i], UINT32_MAX);
    assert_true(ki_pool_check(&engine->cache->pool));
    for (int i = 1500; i < 1560; i++) MUST(kivi_session_decode(session, tokens[i], &err));
    assert_true(ki_pool_check(&engine->cache->pool));
    if (bits == 16) { /* nothing but its pages holds it back */
        FAILS(kivi_seq_rewind(session->seq, 1400, &err), ARG, "1400|earliest length left");
        MUST(kivi_seq_rewind(session->seq, 1550, &err));
    }
    kivi_session_destroy(&session);
    close_engine(engine);
    o.ctx_tokens = 100; /* short sessions need no more pages than before */
    engine = open_engine(&o);
    assert_int_equal(engine->cache->pool.n_pages, 1);
    close_engine(engine);
}

static void test_window_pages(void **state) {
    (void)state;
    window_pages(2);
    window_pages(16);
}

/* Only what a window can read matters: another beginning, the same bytes. */
static void test_window_forgets(void **state) {
    (void)state;
    kivi_engine_options o = options_of("mistral-swa", 16, KIVI_RULE_STREAM);
    kivi_engine *engine = open_engine(&o);
    int32_t tokens[N_TOKENS];
    memcpy(tokens, golden_tokens(), sizeof tokens);
    script s = {.tokens = golden_tokens(), .turns = {{300, 30}}},
           changed = {.tokens = tokens, .turns = {{300, 30}}};
    for (int i = 0; i < 20; i++) tokens[i] = 5; /* 3 layers reach back 3 (72 - 1) = 213 */
    trace a = run_alone(engine, &s, 0), b = run_alone(engine, &changed, 0);
    trace_same(&a, &b, 19 + 214, "mistral-swa", "window");
    assert_memory_not_equal(a.rows[150], b.rows[150], 288 * sizeof(float));
    trace_free(&a), trace_free(&b);
    close_engine(engine);
}

/* A file of a cache with a window is not one without. */
static void test_window_files(void **state) {
    (void)state;
    kivi_cache_geometry g = kivi_cache_defaults();
    g.n_layers = 1, g.n_heads = g.n_kv_heads = 2, g.head_dim = 32, g.n_pages = 8;
    g.kv.residual_tokens = 32, g.max_tokens = 4096, g.n_threads = 1;
    kivi_cache *caches[2];
    kivi_seq *seq, *bad;
    float rows[2 * 32] = {1, 2, 3}, out[2 * 32];
    for (int i = 0; i < 2; i++) {
        g.window_tokens = i ? 100 : 0;
        MUST(kivi_cache_create(&caches[i], &g, &err));
        MUST(kivi_seq_create(&seq, caches[i], &err));
        for (int t = 0; t < (i ? 3000 : 300); t++) { /* longer than the pool's 1,024 tokens */
            MUST(kivi_seq_begin(seq, 1, &err));
            MUST(kivi_seq_append(seq, 0, rows, rows, KIVI_F32, &err));
            MUST(kivi_seq_attend(seq, 0, rows, out, &err));
            MUST(kivi_seq_commit(seq, &err));
        }
        MUST(kivi_seq_save(seq, in_temp(i ? "with" : "without"), &err));
        kivi_seq_destroy(&seq);
    }
    FAILS(kivi_seq_load(&bad, caches[0], in_temp("with"), &err), ARG, "and a sliding window, this");
    FAILS(kivi_seq_load(&bad, caches[1], in_temp("without"), &err), ARG,
          "and no sliding window, this");
    MUST(kivi_seq_load(&seq, caches[1], in_temp("with"), &err));
    assert_int_equal(kivi_seq_length(seq), 3000);
    kivi_seq_destroy(&seq);
    bytes b = read_bytes(in_temp("with"));
    b.data[8 + 11 * 4 + 8] = 30; /* pages gone: more than the window allows */
    write_bytes(in_temp("with"), b.data, b.n);
    FAILS(kivi_seq_load(&bad, caches[1], in_temp("with"), &err), FORMAT, "within the window");
    free(b.data);
    for (int i = 0; i < 2; i++) kivi_cache_destroy(&caches[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_config_errors), cmocka_unit_test(test_config_forms),
        cmocka_unit_test(test_group),         cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_window_pages),  cmocka_unit_test(test_window_forgets),
        cmocka_unit_test(test_window_files),
    };
    return cmocka_run_group_tests_name("model", tests, make_temp, remove_temp);
}
