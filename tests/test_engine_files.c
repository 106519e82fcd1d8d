/* Model folders that are nearly right: numbers that are not finite, the two forms of rotary
 * settings, tied and untied output, and what is refused by name. */
#include "engine_helpers.h"

#include <math.h>

/* ---- a folder made of a golden one ---- */

/* The golden config.json of llama-gqa, its rotary part and its end left open. */
static const char config_form[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"head_dim\": 64, \"hidden_act\": \"%s\","
    " \"hidden_size\": 128, \"intermediate_size\": 192, \"max_position_embeddings\": 8192,"
    " \"model_type\": \"%s\", \"num_attention_heads\": 4, \"num_hidden_layers\": 3,"
    " \"num_key_value_heads\": 1, \"rms_norm_eps\": 1e-05, \"vocab_size\": 288,"
    " \"tie_word_embeddings\": %s, %s}";
static const char new_llama3[] =
    "\"rope_parameters\": {\"factor\": 8.0, \"high_freq_factor\": 4.0, \"low_freq_factor\": 1.0,"
    " \"original_max_position_embeddings\": 256, \"rope_theta\": 500000.0,"
    " \"rope_type\": \"llama3\"}";

static const char *write_folder(const char *leaf, const char *config, const bytes *weights) {
    static char path[256];
    char file[300];
    snprintf(path, sizeof path, "%s/%s", temp_folder, leaf);
    mkdir(path, 0700);
    snprintf(file, sizeof file, "%s/config.json", path);
    write_bytes(file, config, strlen(config));
    snprintf(file, sizeof file, "%s/model.safetensors", path);
    if (weights) write_bytes(file, weights->data, weights->n);
    else unlink(file);
    return path;
}

static const char *config_text(const char *act, const char *type, const char *tied,
                               const char *rest) {
    static char text[2048];
    snprintf(text, sizeof text, config_form, act, type, tied, rest);
    return text;
}

/* Where a tensor's bytes begin in a safetensors file; its entry: "NAME":{... [begin,end]}. */
static uint8_t *tensor_data(bytes *file, const char *name, size_t *n_bytes) {
    char quoted[128];
    uint64_t n_header;
    memcpy(&n_header, file->data, 8);
    snprintf(quoted, sizeof quoted, "\"%s\":", name);
    const char *entry = strstr((const char *)file->data + 8, quoted);
    if (!entry) fail_msg("no tensor %s", name);
    const char *offsets = strstr(entry, "\"data_offsets\":[");
    assert_non_null(offsets);
    char *comma;
    size_t begin = strtoul(offsets + 16, &comma, 10), end = strtoul(comma + 1, NULL, 10);
    *n_bytes = end - begin;
    return file->data + 8 + n_header + begin;
}
static void set_f32(bytes *file, const char *name, size_t index, float value) {
    size_t n;
    uint8_t *data = tensor_data(file, name, &n);
    assert_true((index + 1) * 4 <= n);
    memcpy(data + index * 4, &value, 4);
}
static void scale_f32(bytes *file, const char *name, float factor) {
    size_t n;
    uint8_t *data = tensor_data(file, name, &n);
    for (size_t i = 0; i < n / 4; i++) {
        float x;
        memcpy(&x, data + i * 4, 4);
        set_f32(file, name, i, x * factor);
    }
}

static kivi_engine_options options_for(const char *path) {
    kivi_engine_options o = cpu_defaults();
    o.model_path = path;
    o.kv.residual_tokens = 32;
    o.n_threads = 2;
    o.ctx_tokens = 256;
    o.max_sessions = 4;
    o.all_logits = true;
    return o;
}

/* ---- numbers that are not finite ---- */

/* The embedding of one token is poisoned, so only who feeds it fails. */
enum { POISON = 77 };
static kivi_engine *open_poisoned(float value) {
    bytes weights = read_bytes(golden("llama/model.safetensors"));
    bytes config = read_bytes(golden("llama/config.json"));
    set_f32(&weights, "model.embed_tokens.weight", POISON * 128 + 5, value);
    const char *path = write_folder("poisoned", (const char *)config.data, &weights);
    kivi_engine_options o = options_for(path);
    kivi_engine *engine = open_engine(&o);
    free(weights.data), free(config.data);
    return engine;
}

static void clean_tokens(int32_t *ids) {
    for (int i = 0; i < N_TOKENS; i++)
        ids[i] = golden_tokens()[i] == POISON ? POISON + 1 : golden_tokens()[i];
}

static void check_counted(const kivi_engine *engine, uint64_t at_least) {
    uint64_t n_nonfinite = 0;
    kivi_engine_counters(engine, &n_nonfinite, NULL);
    if (n_nonfinite < at_least)
        fail_msg("%llu counted, expected %llu", (unsigned long long)n_nonfinite,
                 (unsigned long long)at_least);
}

/* Neighbours before and behind a poisoned item, decodes and prompts: the same bytes as alone. */
static void check_poisoned_item(float value) {
    kivi_engine *engine = open_poisoned(value);
    int32_t ids[N_TOKENS];
    clean_tokens(ids);
    script s = {.tokens = ids, .turns = {{60, 30}}}, s2 = {.tokens = ids + 40, .turns = {{0, 90}}};
    trace alone = run_alone(engine, &s, 0), alone2 = run_alone(engine, &s2, 0);
    trace t = trace_new(engine, 90), t2 = trace_new(engine, 90);
    actor a = {.session = open_session(engine), .script = &s, .trace = &t, .chunk = 16};
    actor b = {.session = open_session(engine), .script = &s2, .trace = &t2};
    kivi_session *bad = open_session(engine);
    for (uint32_t step = 0; kivi_session_length(b.session) < 90; step++) {
        kivi_step_item items[3];
        int32_t row[3] = {ids[0], POISON, ids[1]};
        bool goes = actor_item(&items[0], &a);
        bool poisons = step % 3 == 1;
        assert_true(actor_item(&items[1], &b));
        items[2] = items[1];
        items[1] = (kivi_step_item){.session = bad, .tokens = row, .n_tokens = poisons ? 3 : 1};
        if (!goes) items[0] = items[1], items[1] = items[2];
        MUST(kivi_engine_step(engine, items, goes ? 3 : 2, &err));
        const kivi_step_item *it = &items[goes ? 1 : 0];
        assert_int_equal(it->status, poisons ? KIVI_NUMERIC : KIVI_OK);
        if (poisons) {
            assert_non_null(strstr(it->error.text, "infinite or not a number"));
            assert_non_null(strstr(it->error.text, "layer 0"));
            assert_null(kivi_session_logits(bad, 0));
        }
        if (goes) actor_keep(&a, &items[0]);
        actor_keep(&b, &items[goes ? 2 : 1]);
    }
    trace_same(&alone, &t, 0, "poison", "a neighbour with a prompt");
    trace_same(&alone2, &t2, 0, "poison", "a neighbour that decodes");
    check_counted(engine, 30);
    assert_int_equal(kivi_session_length(bad), 60); /* its good steps */
    kivi_session_destroy(&a.session), kivi_session_destroy(&b.session);
    kivi_session_destroy(&bad);
    trace_free(&alone), trace_free(&alone2), trace_free(&t), trace_free(&t2);
    close_engine(engine);
}
static void test_poisoned_item(void **state) {
    (void)state;
    check_poisoned_item(NAN);
    check_poisoned_item(INFINITY);
    check_poisoned_item(-INFINITY);
}

/* The session itself: what was evaluated stays, and it goes on from there as if nothing had been
 * asked; it can be saved, loaded, forked and stepped back. */
static void goes_on_as(kivi_session *session, const script *s, const char *what) {
    trace straight = run_alone(session->engine, s, 0);
    trace t = trace_new(session->engine, script_length(s));
    uint32_t from = kivi_session_length(session);
    go_on(session, s, 0, 0, &t);
    trace_same(&straight, &t, from, "poison", what);
    trace_free(&straight), trace_free(&t);
}
static void test_poisoned_session(void **state) {
    (void)state;
    kivi_engine *engine = open_poisoned(NAN);
    int32_t ids[N_TOKENS], bad[N_TOKENS];
    char path[256];
    snprintf(path, sizeof path, "%s/after-poison", temp_folder);
    clean_tokens(ids);
    memcpy(bad, ids, sizeof bad);
    bad[100] = POISON;
    kivi_session *s = open_session(engine), *other = NULL;
    /* a prompt that fails in its third chunk of 40: 80 tokens stay */
    MUST(kivi_session_begin_prompt(s, 150, &err));
    for (uint32_t at = 0; at < 120; at += 40) {
        kivi_step_item item = {.session = s, .tokens = bad + at, .n_tokens = 40};
        MUST(kivi_engine_step(engine, &item, 1, &err));
        assert_int_equal(item.status, at == 80 ? KIVI_NUMERIC : KIVI_OK);
    }
    assert_int_equal(kivi_session_length(s), 80);
    script rest = {.tokens = ids, .turns = {{80, 10}, {20, 5}}};
    MUST(kivi_session_save(s, path, &err));
    MUST(kivi_session_fork(&other, s, &err));
    goes_on_as(other, &rest, "a fork after a failure");
    kivi_session_destroy(&other);
    MUST(kivi_session_load(&other, engine, path, &err));
    goes_on_as(other, &rest, "saved after a failure");
    kivi_session_destroy(&other);
    goes_on_as(s, &rest, "after a failure");
    script back = script_cut(&rest, 30);
    script_add(&back, (turn){9, 2});
    MUST(kivi_session_rewind(s, 30, &err));
    goes_on_as(s, &back, "stepped back after a failure");
    /* a decode that fails at a place where codes are made */
    for (uint32_t n = kivi_session_length(s); n < 64; n++)
        MUST(kivi_session_decode(s, ids[n], &err));
    FAILS(kivi_session_decode(s, POISON, &err), NUMERIC, "layer 0|64");
    script decoded = back;
    decoded.turns[1].n_decode += 64 - script_length(&back);
    script_add(&decoded, (turn){0, 12});
    goes_on_as(s, &decoded, "after a failed decode");
    FAILS(kivi_session_prompt(s, bad, 150, &err), NUMERIC, "layer 0");
    script_add(&decoded, (turn){5, 5});
    goes_on_as(s, &decoded, "after a failed prompt in one step");
    kivi_session_destroy(&s);
    close_engine(engine);
}

/* Weights that spoil every row, in a later layer: the text says which. */
static void test_poisoned_weights(void **state) {
    (void)state;
    static const struct { const char *name; float value; const char *layer; } cases[] = {
        {"model.layers.1.self_attn.k_proj.weight", NAN, "layer 1"},
        {"model.layers.2.self_attn.v_proj.weight", INFINITY, "layer 2"},
        {"model.layers.1.mlp.down_proj.weight", -INFINITY, "layer 2"},
        {"model.layers.0.input_layernorm.weight", NAN, "layer 0"},
        {"model.layers.2.self_attn.o_proj.weight", NAN, "result at position"},
        {"model.layers.2.mlp.gate_proj.weight", INFINITY, "result at position"},
    };
    bytes config = read_bytes(golden("llama/config.json"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bytes weights = read_bytes(golden("llama/model.safetensors"));
        set_f32(&weights, cases[i].name, 9, cases[i].value);
        kivi_engine_options o =
            options_for(write_folder("spoiled", (const char *)config.data, &weights));
        kivi_engine *engine = open_engine(&o);
        kivi_session *s = open_session(engine);
        FAILS(kivi_session_prompt(s, golden_tokens(), 50, &err), NUMERIC, cases[i].layer);
        FAILS(kivi_session_decode(s, 1, &err), NUMERIC, cases[i].layer);
        assert_int_equal(kivi_session_length(s), 0);
        check_counted(engine, 2);
        kivi_session_destroy(&s);
        close_engine(engine);
        free(weights.data);
    }
    free(config.data);
}

/* Too large for float16 but finite: saturated, counted, and the session goes on. */
static void test_saturated(void **state) {
    (void)state;
    bytes config = read_bytes(golden("llama/config.json"));
    bytes weights = read_bytes(golden("llama/model.safetensors"));
    scale_f32(&weights, "model.layers.0.self_attn.v_proj.weight", 1e6f);
    kivi_engine_options o =
        options_for(write_folder("large", (const char *)config.data, &weights));
    kivi_engine *engine = open_engine(&o);
    kivi_session *s = open_session(engine);
    uint64_t n_nonfinite, n_saturated;
    MUST(kivi_session_prompt(s, golden_tokens(), 100, &err));
    kivi_engine_counters(engine, &n_nonfinite, &n_saturated);
    assert_int_equal(n_nonfinite, 0);
    assert_true(n_saturated > 100);
    for (uint32_t i = 0; i < 288; i++) assert_true(isfinite(kivi_session_logits(s, 99)[i]));
    kivi_engine_counters(engine, NULL, NULL);
    kivi_session_destroy(&s);
    close_engine(engine);
    free(weights.data), free(config.data);
}

/* The quantized products of a real model meet numbers that are not finite, too. */
static void test_poisoned_real_model(void **state) {
    (void)state;
    if (!real_model()) {
        print_message("KIVI_TEST_MODEL is not set\n");
        skip();
    }
    kivi_engine_options o = options_for(real_model());
    o.all_logits = false;
    kivi_engine *engine = open_engine(&o);
    script s = {.tokens = golden_tokens(), .turns = {{3, 1}}};
    trace before = run_alone(engine, &s, 0);
    kivi_session *session = open_session(engine);
    static const float values[] = {NAN, INFINITY, 3e38f};
    float *norm = &engine->model->layers[5].attn_norm.weight[3], good = *norm;
    for (int i = 0; i < 3; i++) {
        *norm = values[i];
        kivi_status status = kivi_session_prompt(session, golden_tokens(), 3, &err);
        if (status != KIVI_OK || i < 2) fails(status, KIVI_NUMERIC, "layer", __FILE__, __LINE__);
    }
    *norm = good;
    trace after = run_alone(engine, &s, 0);
    trace_same(&before, &after, 0, "smollm2", "after a failure");
    trace_free(&before), trace_free(&after);
    kivi_session_destroy(&session);
    close_engine(engine);
}

/* ---- forms of config.json ---- */

static trace trace_of(const char *config, const bytes *weights) {
    kivi_engine_options o = options_for(write_folder("form", config, weights));
    kivi_engine *engine = open_engine(&o);
    script s = {.tokens = golden_tokens(), .turns = {{120, 5}}};
    trace t = run_alone(engine, &s, 0);
    close_engine(engine);
    return t;
}

static void same_forms(const char *a, const char *b, bool equal) {
    bytes weights = read_bytes(golden("llama-gqa/model.safetensors"));
    trace ta = trace_of(config_text("silu", "llama", "true", a), &weights);
    trace tb = trace_of(config_text("silu", "llama", "true", b), &weights);
    if (equal) trace_same(&ta, &tb, 0, a, b);
    else assert_memory_not_equal(ta.rows[124], tb.rows[124], 288 * sizeof(float));
    trace_free(&ta), trace_free(&tb);
    free(weights.data);
}

static void test_rope_forms(void **state) {
    (void)state;
    static const char theta[] = "\"rope_theta\": 500000.0, \"rope_scaling\": ";
    static const char l3[] = "\"llama3\", \"factor\": 8.0, \"high_freq_factor\": 4.0,"
                             " \"low_freq_factor\": 1.0,"
                             " \"original_max_position_embeddings\": 256}";
    char with_type[512], with_rope_type[512], plain[512];
    snprintf(with_type, sizeof with_type, "%s{\"type\": %s", theta, l3);
    snprintf(with_rope_type, sizeof with_rope_type, "%s{\"rope_type\": %s", theta, l3);
    snprintf(plain, sizeof plain, "%snull", theta);
    same_forms(new_llama3, with_type, true);
    same_forms(new_llama3, with_rope_type, true);
    same_forms(new_llama3, plain, false);
    same_forms(plain, "\"rope_theta\": 500000", true);
    same_forms(plain, "\"rope_parameters\": {\"rope_theta\": 5e5, \"rope_type\": \"default\"}",
               true);
    char linear[512];
    snprintf(linear, sizeof linear, "%s{\"type\": \"linear\", \"factor\": 4.0}", theta);
    same_forms(linear,
               "\"rope_parameters\": {\"rope_theta\": 5e5, \"rope_type\": \"linear\","
               " \"factor\": 4}",
               true);
    same_forms(linear, plain, false);
    same_forms("\"rope_theta\": 10000", "\"pad_token_id\": null", true); /* the default */
    /* and the text above stands for the golden file */
    bytes config = read_bytes(golden("llama-gqa/config.json"));
    bytes weights = read_bytes(golden("llama-gqa/model.safetensors"));
    trace a = trace_of((const char *)config.data, &weights);
    trace b = trace_of(config_text("silu", "llama", "true", new_llama3), &weights);
    trace_same(&a, &b, 0, "golden", "config");
    trace_free(&a), trace_free(&b);
    free(config.data), free(weights.data);
}

/* The same file with one tensor more in front of its list. */
static bytes with_tensor(const bytes *file, const char *name, const char *source) {
    bytes copy = {.data = malloc(file->n + 1), .n = file->n};
    assert_non_null(copy.data);
    memcpy(copy.data, file->data, file->n + 1);
    size_t n;
    const uint8_t *data = tensor_data(&copy, source, &n);
    uint64_t n_header, n_new;
    memcpy(&n_header, file->data, 8);
    size_t n_data = file->n - 8 - n_header;
    char entry[256];
    int n_entry = snprintf(entry, sizeof entry,
                           "{\"%s\":{\"dtype\":\"BF16\",\"shape\":[288,128],"
                           "\"data_offsets\":[%zu,%zu]},",
                           name, n_data, n_data + n);
    n_new = n_header - 1 + (uint64_t)n_entry;
    bytes out = {.data = malloc(8 + n_new + n_data + n + 1)};
    assert_non_null(out.data);
    memcpy(out.data, &n_new, 8);
    memcpy(out.data + 8, entry, (size_t)n_entry);
    memcpy(out.data + 8 + n_entry, file->data + 9, n_header - 1 + n_data);
    memcpy(out.data + 8 + n_new + n_data, data, n);
    out.n = 8 + n_new + n_data + n;
    out.data[out.n] = 0;
    free(copy.data);
    return out;
}

static void test_tied_output(void **state) {
    (void)state;
    bytes weights = read_bytes(golden("llama-gqa/model.safetensors"));
    bytes both = with_tensor(&weights, "lm_head.weight", "model.embed_tokens.weight");
    char tied[2048], untied[2048];
    snprintf(tied, sizeof tied, "%s", config_text("silu", "llama", "true", new_llama3));
    snprintf(untied, sizeof untied, "%s", config_text("silu", "llama", "false", new_llama3));
    trace a = trace_of(tied, &weights), b = trace_of(untied, &both), c = trace_of(tied, &both);
    trace_same(&a, &b, 0, "tied", "an equal output matrix");
    trace_same(&a, &c, 0, "tied", "an output matrix that is not used");
    trace_free(&a), trace_free(&b), trace_free(&c);
    /* its memory: a second matrix, or none */
    kivi_engine_options o = options_for(write_folder("form", tied, &weights));
    kivi_engine *engine = open_engine(&o);
    uint64_t n_tied = kivi_engine_memory(engine).weights;
    close_engine(engine);
    write_folder("form", untied, &both);
    engine = open_engine(&o);
    assert_true(kivi_engine_memory(engine).weights >= n_tied + 288 * 128 * 2);
    close_engine(engine);
    /* another matrix gives other logits */
    size_t n;
    memset(tensor_data(&both, "lm_head.weight", &n) + 1000, 0, 2000);
    a = trace_of(tied, &weights), b = trace_of(untied, &both);
    assert_memory_not_equal(a.rows[3], b.rows[3], 288 * sizeof(float));
    trace_free(&a), trace_free(&b);
    write_folder("form", untied, &weights);
    kivi_engine *none = NULL;
    FAILS(kivi_engine_create(&none, &o, &err), FORMAT, "lm_head.weight|missing");
    assert_null(none);
    free(weights.data), free(both.data);
}

/* ---- refused ---- */

static void refused(const char *config, const bytes *weights, kivi_status expected,
                    const char *words) {
    kivi_engine *engine = NULL;
    kivi_engine_options o = options_for(write_folder("refused", config, weights));
    kivi_status status = kivi_engine_create(&engine, &o, &err);
    if (status == KIVI_OK) fail_msg("accepted, expected '%s'", words);
    assert_null(engine);
    fails(status, expected, words, __FILE__, __LINE__);
}

static void test_unsupported(void **state) {
    (void)state;
    bytes w = read_bytes(golden("llama-gqa/model.safetensors"));
#define REST(text) config_text("silu", "llama", "true", text)
    refused(config_text("silu", "mixtral", "true", new_llama3), &w, KIVI_UNSUPPORTED,
            "config.json|model_type|mixtral|llama, mistral, qwen2, qwen3, gemma3_text, falcon");
    refused(config_text("gelu", "llama", "true", new_llama3), &w, KIVI_UNSUPPORTED,
            "hidden_act|gelu|silu");
    refused(REST("\"rope_scaling\": {\"type\": \"su\", \"factor\": 4.0}"), &w, KIVI_UNSUPPORTED,
            "rope_scaling.type|su|default, linear, dynamic, yarn or llama3");
    refused(REST("\"rope_parameters\": {\"rope_type\": \"longrope\"}"), &w, KIVI_UNSUPPORTED,
            "rope_parameters.rope_type|longrope");
    refused(REST("\"attention_bias\": true"), &w, KIVI_UNSUPPORTED, "attention_bias");
    refused(REST("\"mlp_bias\": true"), &w, KIVI_UNSUPPORTED, "mlp_bias");
    refused(REST("\"sliding_window\": 4096"), &w, KIVI_UNSUPPORTED, "sliding_window");
    refused(REST("\"quantization_config\": {\"bits\": 4}"), &w, KIVI_UNSUPPORTED,
            "quantization_config");
    refused(REST("\"x\": [1, 2"), &w, KIVI_FORMAT, "config.json");
    refused(REST("\"hidden_size\": 64"), &w, KIVI_FORMAT, "config.json|hidden_size");
    char *dtype = strstr((char *)w.data + 8, "\"BF16\"");
    assert_non_null(dtype);
    memcpy(dtype, "\"F64\" ", 6);
    refused(REST(new_llama3), &w, KIVI_UNSUPPORTED, "model.safetensors|F64|F32 F16 BF16");
    free(w.data);
    static const char f8[] =
        "{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[4],\"data_offsets\":[0,4]}}    ";
    bytes small = {.data = calloc(1, 256), .n = 8 + sizeof f8 - 1 + 4};
    assert_non_null(small.data);
    small.data[0] = sizeof f8 - 1;
    memcpy(small.data + 8, f8, sizeof f8 - 1);
    refused(REST(new_llama3), &small, KIVI_UNSUPPORTED, "F8_E4M3|F32 F16 BF16");
    free(small.data);
    char path[256];
    snprintf(path, sizeof path, "%s", write_folder("refused", "{}", NULL));
    char index[300];
    snprintf(index, sizeof index, "%s/model.safetensors.index.json", path);
    write_bytes(index, "{}", 2);
    refused(REST(new_llama3), NULL, KIVI_FORMAT, "index.json|weight_map");
}

/* A config that does not fit the weights, or itself. */
static void test_inconsistent(void **state) {
    (void)state;
    bytes w = read_bytes(golden("llama-gqa/model.safetensors"));
    static const struct { const char *from, *to, *words; kivi_status status; } edits[] = {
        {"\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", "layers.3", KIVI_FORMAT},
        {"\"hidden_size\": 128", "\"hidden_size\": 144", "embed_tokens|288", KIVI_FORMAT},
        {"\"vocab_size\": 288", "\"vocab_size\": 999", "embed_tokens|999", KIVI_FORMAT},
        {"\"num_key_value_heads\": 1", "\"num_key_value_heads\": 3", "4 heads over 3", KIVI_FORMAT},
        {"\"num_key_value_heads\": 1", "\"num_key_value_heads\": 2", "k_proj", KIVI_FORMAT},
        {"\"head_dim\": 64", "\"head_dim\": 40", "head size 40|16", KIVI_UNSUPPORTED},
        {"\"head_dim\": 64", "\"head_dim\": 512", "head size 512|256", KIVI_UNSUPPORTED},
        {"\"num_hidden_layers\": 3", "\"num_hidden_layers\": 0", "num_hidden_layers", KIVI_FORMAT},
        {"\"num_hidden_layers\": 3", "\"num_hidden_layers\": -1", "num_hidden_layers", KIVI_FORMAT},
        {"\"num_hidden_layers\": 3", "\"layers\": 3", "num_hidden_layers is missing", KIVI_FORMAT},
        {"\"vocab_size\": 288", "\"vocab_size\": 1e3", "vocab_size", KIVI_FORMAT},
        {"\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": -1", "rms_norm_eps", KIVI_FORMAT},
        {"\"high_freq_factor\": 4.0", "\"high_freq_factor\": 0.5", "high_freq_factor", KIVI_FORMAT},
        {"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": 1", "tie_word", KIVI_FORMAT},
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        char config[2200];
        const char *good = REST(new_llama3), *at = strstr(good, edits[i].from);
        if (!at) fail_msg("no %s", edits[i].from);
        snprintf(config, sizeof config, "%.*s%s%s", (int)(at - good), good, edits[i].to,
                 at + strlen(edits[i].from));
        refused(config, &w, edits[i].status, edits[i].words);
    }
    free(w.data);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_poisoned_item),
        cmocka_unit_test(test_poisoned_session),
        cmocka_unit_test(test_poisoned_weights),
        cmocka_unit_test(test_saturated),
        cmocka_unit_test(test_poisoned_real_model),
        cmocka_unit_test(test_rope_forms),
        cmocka_unit_test(test_tied_output),
        cmocka_unit_test(test_unsupported),
        cmocka_unit_test(test_inconsistent),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
