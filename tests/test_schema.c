/* test_schema.c: JSON Schema as a grammar: what it takes and what it does not, masks against the
 * plain definition, and random walks that must end in valid JSON. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "../programs/serve/grammar.c"
#include "../programs/serve/schema.c"

#include <math.h>
#include <time.h>

/* All single bytes, and some longer tokens that cross the borders of JSON's parts. */
static const char *const longer[] = {"true",   "false", "null", "\":",      "\",",      "\"}",
                                     "{\"",    ",\"",   "12",   "abc",      "ab",       "a\"",
                                     "]}",     "\": ",  "}}",   "\xc3\xa9", "\xe2\x82", "name",
                                     "\"name", "00",    "1.",   "e+",       "\\u",      "\\n"};
enum { N_LONGER = sizeof longer / sizeof *longer, N_VOCAB = 256 + N_LONGER + 1 };

static size_t bytes_of(void *user, int32_t id, char *out, size_t max_bytes) {
    (void)user;
    if (id == N_VOCAB - 1) return 0; /* a control token */
    if (id < 256) {
        out[0] = (char)id;
        return 1;
    }
    size_t n = strlen(longer[id - 256]);
    assert_true(n <= max_bytes);
    memcpy(out, longer[id - 256], n);
    return n;
}

static token_table *vocabulary;

static int make_vocabulary(void **unused) {
    (void)unused;
    vocabulary = token_table_create(N_VOCAB, bytes_of, NULL);
    return vocabulary ? 0 : -1;
}

static int free_vocabulary(void **unused) {
    (void)unused;
    token_table_destroy(&vocabulary);
    return 0;
}

static bool takes(grammar *g, const char *text) {
    return grammar_may_end(g, grammar_next(g, grammar_first(g), text, strlen(text)));
}

/* Schema, texts that fit, NULL, texts that do not, NULL. */
static const char *const cases[][24] = {
    {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"string\"}"
     "},"
     "\"required\":[\"a\"],\"additionalProperties\":false}",
     "{\"a\":1}", "{\"a\": -12, \"b\": \"x\"}", "{\n  \"a\": 0,\n  \"b\": \"\"\n}", NULL, "{}",
     "{\"b\":\"x\"}", "{\"a\":1.5}", "{\"a\":01}", "{\"a\":1,\"c\":2}", "{\"a\":1,}",
     "{\"b\":\"x\",\"a\":1}", NULL},
    {"{\"type\":\"object\",\"properties\":{\"ab\":{\"type\":\"null\"},\"a\":{\"type\":\"null\"}},"
     "\"additionalProperties\":{\"type\":\"boolean\"}}",
     "{}", "{\"ab\":null}", "{\"a\":null,\"abc\":true}", "{\"b\":false}", "{\"\":true}", NULL,
     "{\"ab\":true}", "{\"a\":true}", "{\"x\":null}", "{\"\\u0061\":true}", "{\"x\\u0000\":true}",
     NULL},
    {"{\"type\":\"array\",\"items\":{\"type\":\"number\"},\"minItems\":2,\"maxItems\":3}", "[1,2]",
     "[1.5, -2e+10, 0]", "[ 0.25, 1E2 ]", NULL, "[]", "[1]", "[1,2,3,4]", "[1,]", "[1.,2]",
     "[+1,2]", "[.5,1]", NULL},
    {"{\"type\":\"array\",\"prefixItems\":[{\"type\":\"integer\"},{\"type\":\"string\"}],"
     "\"items\":{\"type\":\"boolean\"},\"maxItems\":4}",
     "[1,\"a\"]", "[1,\"a\",true,false]", NULL, "[1]", "[\"a\",1]", "[1,\"a\",true,true,true]",
     NULL},
    {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"ab\"", "\"\xc3\xa9\xe2\x82\xac\"",
     "\"\\n\\u00e9\\\\\"", "\"abc\"", "\"\\u0001\\u0010\\u0100\"", NULL, "\"a\"", "\"abcd\"",
     "\"\\u0000x\"", "\"a\x01\"", "\"\xc3\x28x\"", "\"\xed\xa0\x80x\"", "\"\\ud800x\"", "\"\\x\"",
     NULL},
    {"{\"type\":\"integer\",\"minimum\":-12,\"exclusiveMaximum\":105}", "-12", "-1", "0", "9", "10",
     "99", "100", "104", NULL, "-13", "105", "-0", "200", "1000", "00", "-100", NULL},
    {"{\"type\":\"integer\",\"minimum\":1}", "1", "9999999999999999", NULL, "0", "-1",
     "10000000000000000", NULL},
    {"{\"enum\":[\"red\",\"green\",7,null]}", "\"red\"", "7", "null", NULL, "\"blue\"", "\"re\"",
     "77", NULL},
    {"{\"type\":\"string\",\"enum\":[\"red\",7]}", "\"red\"", NULL, "7", NULL},
    {"{\"const\":{\"a\":[1,true]}}", "{\"a\":[1,true]}", NULL, "{\"a\":[1,false]}", "{}", NULL},
    {"{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"null\"}],\"default\":null}", "\"x\"", "null",
     NULL, "1", "nul", NULL},
    {"{\"type\":[\"integer\",\"null\"]}", "5", "null", NULL, "5.0", "true", NULL},
    {"{\"$ref\":\"#/$defs/tree\",\"$defs\":{\"tree\":{\"type\":\"object\",\"properties\":{"
     "\"v\":{\"type\":\"integer\"},\"kids\":{\"type\":\"array\",\"items\":{\"$ref\":"
     "\"#/$defs/tree\"}}},\"required\":[\"v\",\"kids\"]}}}",
     "{\"v\":1,\"kids\":[]}", "{\"v\":1,\"kids\":[{\"v\":2,\"kids\":[]},{\"v\":3,\"kids\":[]}]}",
     NULL, "{\"v\":1}", "{\"v\":1,\"kids\":[1]}", NULL},
    {"{\"type\":\"string\",\"format\":\"date\"}", "\"2026-02-28\"", "\"1999-12-31\"",
     "\"2000-04-30\"", NULL, "\"2026-02-29\"", "\"2026-04-31\"", "\"2026-13-01\"", "\"2026-00-10\"",
     "\"2026-01-00\"", "\"26-01-01\"", NULL},
    {"{\"type\":\"string\",\"format\":\"date-time\"}", "\"2026-01-31T23:59:59Z\"",
     "\"2026-01-31T00:00:00.25+05:30\"", NULL, "\"2026-01-31T24:00:00Z\"",
     "\"2026-01-31 10:00:00Z\"", "\"2026-01-31T10:00:00\"", NULL},
    {"{\"type\":\"string\",\"format\":\"uuid\"}", "\"0123abcd-ef01-2345-6789-abcdef012345\"", NULL,
     "\"0123abcd\"", "\"0123abcg-ef01-2345-6789-abcdef012345\"", NULL},
    {"{\"allOf\":[{\"type\":\"boolean\"}],\"description\":\"x\"}", "true", "false", NULL, "1",
     NULL},
    {"true", "{\"a\":[1,{\"b\":null}],\"c\":\"d\"}", "[]", "\"\"", "-0.5", NULL, "{a:1}", "[1 2]",
     "tru", "'x'", NULL},
    {"{\"type\":\"object\",\"required\":[\"z\"]}", "{\"z\":[1]}", NULL, "{}", "{\"y\":1}", NULL},
};

static grammar *compiled(const char *text) {
    char error[256] = "";
    grammar *g = grammar_create(vocabulary);
    json_t *schema = json_loads(text, JSON_DECODE_ANY, NULL);
    assert_non_null(schema);
    if (!schema_compile(g, schema, error, sizeof error)) fail_msg("%s: %s", text, error);
    json_decref(schema);
    return g;
}

static void test_takes(void **unused) {
    (void)unused;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        grammar *g = compiled(cases[i][0]);
        size_t k = 1;
        for (; cases[i][k]; k++)
            if (!takes(g, cases[i][k])) fail_msg("%s refuses %s", cases[i][0], cases[i][k]);
        for (k++; cases[i][k]; k++)
            if (takes(g, cases[i][k])) fail_msg("%s takes %s", cases[i][0], cases[i][k]);
        grammar_destroy(&g);
    }
}

/* What is outside is refused, and the text names the keyword and the place. */
static void test_refuses(void **unused) {
    (void)unused;
    static const char *const bad[][2] = {
        {"{\"type\":\"string\",\"pattern\":\"a*\"}", "'pattern'"},
        {"{\"type\":\"object\",\"properties\":{\"x\":{\"oneOf\":[]}}}",
         "schema.properties.x: the keyword 'oneOf'"},
        {"{\"type\":\"number\",\"minimum\":1}", "'minimum'"},
        {"{\"not\":{}}", "'not'"},
        {"{\"type\":\"string\",\"format\":\"email\"}", "'format'"},
        {"{\"type\":\"integer\",\"multipleOf\":2}", "'multipleOf'"},
        {"{\"type\":\"date\"}", "'date'"},
        {"{\"$ref\":\"#/nowhere\"}", "nowhere"},
        {"{\"$ref\":\"#\"}", "leads to itself"},
        {"{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"}]}", "leads to itself"},
        {"{\"type\":\"integer\",\"minimum\":5,\"maximum\":4}", "no integer"},
        {"{\"type\":\"array\",\"minItems\":3,\"maxItems\":2}", "above maxItems"},
        {"{\"type\":\"string\",\"maxLength\":-1}", "maxLength"},
        {"{\"type\":\"object\",\"required\":[\"a\"],\"additionalProperties\":false}",
         "'a' is not among"},
        {"{\"minimum\":3}", "needs a type"},
        {"[]", "expected a schema"},
        {"{\"allOf\":[{},{}]}", "'allOf'"},
        {"{\"type\":\"object\",\"patternProperties\":{}}", "'patternProperties'"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char error[256] = "";
        grammar *g = grammar_create(vocabulary);
        json_t *schema = json_loads(bad[i][0], JSON_DECODE_ANY, NULL);
        assert_non_null(schema);
        if (schema_compile(g, schema, error, sizeof error)) fail_msg("%s is taken", bad[i][0]);
        if (!strstr(error, bad[i][1])) fail_msg("%s: '%s'", bad[i][0], error);
        json_decref(schema);
        grammar_destroy(&g);
    }
}

/* The mask of a state says exactly which tokens lead on. */
static void check_mask(grammar *g, int32_t at) {
    const uint32_t *mask = grammar_allowed(g, at);
    assert_non_null(mask);
    for (int32_t id = 0; id < N_VOCAB; id++) {
        char bytes[32];
        size_t n = bytes_of(NULL, id, bytes, sizeof bytes);
        bool fits = n && grammar_next(g, at, bytes, n) >= 0;
        assert_int_equal(mask[id / 32] >> id % 32 & 1, fits);
    }
}

static uint64_t draw(uint64_t *seed) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 33;
}

/* Random tokens of those allowed, until the text may end and chance says so: it is JSON, and what
 * the grammar calls done is done. */
static void test_walks(void **unused) {
    (void)unused;
    const char *given = getenv("KIVI_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    for (unsigned round = 0; round < 300; round++) {
        const char *text = cases[round % (sizeof cases / sizeof *cases)][0];
        grammar *g = compiled(text);
        int32_t at = grammar_first(g);
        char out[1 << 14];
        size_t n = 0;
        for (int step = 0; step < 400; step++) {
            if (grammar_must_end(g, at) || (grammar_may_end(g, at) && draw(&seed) % 4 == 0)) break;
            const uint32_t *mask = grammar_allowed(g, at);
            int32_t ids[N_VOCAB], n_ids = 0;
            if (round % 10 == 0 && step < 40) check_mask(g, at);
            /* Closing ones more often, or most walks would go down for ever. */
            for (int32_t id = 0; id < N_VOCAB - 1; id++) {
                bool closes = id < 256 && strchr("]}\"", id) && id;
                if (mask[id / 32] >> id % 32 & 1 && (n_ids == 0 || closes || draw(&seed) % 3))
                    ids[n_ids++] = id;
                if (closes && mask[id / 32] >> id % 32 & 1 && step > 60) {
                    ids[0] = id;
                    n_ids = 1;
                    break;
                }
            }
            if (n_ids == 0) fail_msg("%s: nothing may follow %.*s", text, (int)n, out);
            char bytes[32];
            int32_t id = ids[draw(&seed) % (uint64_t)n_ids];
            size_t length = bytes_of(NULL, id, bytes, sizeof bytes);
            assert_true(n + length < sizeof out);
            memcpy(out + n, bytes, length);
            n += length;
            at = grammar_next(g, at, bytes, length);
            assert_true(at >= 0);
        }
        if (grammar_may_end(g, at)) {
            json_error_t why;
            json_t *value = json_loadb(out, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, &why);
            if (!value && !strstr(why.text, "overflow"))
                fail_msg("%s made %.*s: %s", text, (int)n, out, why.text);
            json_decref(value);
        }
        grammar_destroy(&g);
    }
}

/* Any object: takes objects only, to any depth, and every state can go on. */
static void test_any_object(void **unused) {
    (void)unused;
    grammar *g = grammar_create(vocabulary);
    char deep[4096] = "";
    assert_true(schema_any_object(g));
    assert_true(takes(g, "{}") && takes(g, "{\"a\": {\"b\": [1, 2, {}]}}"));
    assert_false(takes(g, "[]") || takes(g, "1") || takes(g, "{}}"));
    for (int i = 0; i < 400; i++) strcat(deep, "{\"a\":");
    strcat(deep, "1");
    for (int i = 0; i < 400; i++) strcat(deep, "}");
    assert_true(takes(g, deep));
    grammar_destroy(&g);
}

/* A large schema stays quick: 400 optional properties. */
static void test_large(void **unused) {
    (void)unused;
    char error[256] = "";
    json_t *schema = json_pack("{s:s,s:{}}", "type", "object", "properties");
    for (int i = 0; i < 400; i++) {
        char name[16];
        snprintf(name, sizeof name, "p%d", i);
        json_object_set_new(json_object_get(schema, "properties"), name,
                            json_pack("{s:s,s:i}", "type", "string", "maxLength", 1000));
    }
    grammar *g = grammar_create(vocabulary);
    assert_true(schema_compile(g, schema, error, sizeof error));
    clock_t start = clock();
    int32_t at = grammar_first(g);
    assert_true(at >= 0 && grammar_allowed(g, at));
    at = grammar_next(g, at, "{\"p7\": \"abc", 11);
    assert_true(at >= 0 && grammar_allowed(g, at));
    assert_true(takes(g, "{\"p0\":\"a\",\"p399\":\"b\"}"));
    assert_true((double)(clock() - start) / CLOCKS_PER_SEC < 2); /* takes some milliseconds */
    json_decref(schema);
    grammar_destroy(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_takes), cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_walks), cmocka_unit_test(test_any_object),
        cmocka_unit_test(test_large),
    };
    return cmocka_run_group_tests_name("schema", tests, make_vocabulary, free_vocabulary);
}
