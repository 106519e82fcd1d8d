/* test_pipeline.c: scored vocabularies, tokenizer.json and parts of text, on tiny vocabularies made
 * here. tests/py_vocab.py and tools/compare_tokenizers.py have the real ones. */
#include "pipeline.h"

#include "chat.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

enum { MAX_IDS = 4096 };

static size_t encode(int32_t *ids, const ki_vocab *v, const char *text, size_t n, unsigned flags) {
    size_t n_ids = 0;
    kivi_error err = {0};
    if (ki_vocab_encode(v, text, n, flags, ids, MAX_IDS, &n_ids, &err)) fail_msg("%s", err.text);
    return n_ids;
}

/* Ids written as "1 2 3". */
static void check_ids(const ki_vocab *v, const char *text, unsigned flags, const char *want) {
    int32_t ids[MAX_IDS];
    char have[MAX_IDS] = "";
    size_t n = encode(ids, v, text, strlen(text), flags), at = 0;
    for (size_t i = 0; i < n; i++)
        at += (size_t)snprintf(have + at, sizeof have - at, i ? " %d" : "%d", ids[i]);
    if (strcmp(have, want)) fail_msg("\"%s\": %s, not %s", text, have, want);
}

static void check_bytes(const ki_vocab *v, int32_t id, const char *want) {
    char bytes[64];
    size_t n = ki_vocab_bytes(v, id, bytes, sizeof bytes);
    assert_int_equal(n, strlen(want));
    assert_memory_equal(bytes, want, n);
}

/* ---- scored ---- */

static const struct {
    const char *text;
    int32_t type;
    float score;
} scored[] = {
    {"<unk>", 2, 0},
    {"<s>", 3, 0},
    {"</s>", 3, 0},
    {"\xe2\x96\x81", 1, -5},
    {"a", 1, -6},
    {"b", 1, -7},
    {"ab", 1, -2},
    {"\xe2\x96\x81"
     "a",
     1, -1},
    {"aa", 1, -2},
    {"x\xc3\xa9", 1, -3},
    {"[U]", 4, 0},
    {"s>", 1, -4},
    {"<s", 1, -4},
    {"aaaa", 1, -2},
};
enum { N_SCORED = sizeof scored / sizeof *scored, HEX = N_SCORED };

typedef struct scored_arrays {
    char hex[256][8];
    ki_span tokens[N_SCORED + 256];
    int32_t types[N_SCORED + 256];
    float scores[N_SCORED + 256];
} scored_arrays;

static ki_vocab_spec scored_spec(scored_arrays *a) {
    for (size_t i = 0; i < N_SCORED; i++) {
        a->tokens[i] = (ki_span){scored[i].text, strlen(scored[i].text)};
        a->types[i] = scored[i].type;
        a->scores[i] = scored[i].score;
    }
    for (unsigned b = 0; b < 256; b++) {
        snprintf(a->hex[b], sizeof a->hex[b], "<0x%02X>", b);
        a->tokens[HEX + b] = (ki_span){a->hex[b], 6};
        a->types[HEX + b] = KI_TOKEN_BYTE;
        a->scores[HEX + b] = 0;
    }
    return (ki_vocab_spec){.model = "llama",
                           .pre = "default",
                           .tokens = a->tokens,
                           .types = a->types,
                           .scores = a->scores,
                           .n_tokens = HEX + 256,
                           .bos_id = 1,
                           .eos_id = 2,
                           .unk_id = 0,
                           .add_bos = true,
                           .space_prefix = true};
}

static void test_scored(void **state) {
    (void)state;
    ki_mem mem;
    ki_vocab *v;
    scored_arrays a;
    kivi_error err = {0};
    ki_vocab_spec spec = scored_spec(&a);
    ki_mem_init(&mem);
    if (ki_vocab_create(&v, &mem, &spec, &err)) fail_msg("%s", err.text);
    check_ids(v, "ab", 0, "7 5"); /* the space of our own takes the a: -1 before -2 */
    check_ids(v, "bab", 0, "3 5 6");
    check_ids(v, "baaaa", 0, "3 5 13");
    check_ids(v, "baaa", 0, "3 5 8 4");     /* equal scores: the leftmost */
    check_ids(v, "bx\xc3\xa9", 0, "3 5 9"); /* neither x nor the other is a token alone */
    check_ids(v, "bx", 0, "3 5 134");       /* but x has a byte: 14 + 120 */
    check_ids(v, "\xff", 0, "3 269");
    check_ids(v, "<s>", 0, "3 12 76"); /* no control token, however it is spelled */
    check_ids(v, "<s>a", KIVI_TEXT_SPECIAL, "1 7");
    check_ids(v, "b[U]b", 0, "3 5 10 3 5"); /* behind a special token a space of our own again */
    check_ids(v, "", KIVI_TEXT_ADD_BOS, "1");
    check_bytes(v, 7, " a");
    check_bytes(v, HEX + 10, "\n");
    check_bytes(v, 10, "[U]");
    ki_vocab_destroy(&v);
    spec.trims_spaces = true;
    assert_int_equal(ki_vocab_create(&v, &mem, &spec, NULL), KIVI_OK);
    check_ids(v, "  b   b  ", 0, "3 5 3 5");
    check_ids(v, "   ", 0, "");
    ki_vocab_destroy(&v);
    spec.trims_spaces = false;
    a.tokens[10] = (ki_span){"<|U|>", 5}; /* a mark, although the file says a user's word */
    assert_int_equal(ki_vocab_create(&v, &mem, &spec, NULL), KIVI_OK);
    check_ids(v, "b<|U|>b", KIVI_TEXT_SPECIAL, "3 5 10 3 5");
    check_ids(v, "b<|U|>b", 0, "3 5 74 138 99 138 76 5");
    ki_vocab_destroy(&v);
    a.scores[5] = (float)strtod("nan", NULL);
    assert_int_equal(ki_vocab_create(&v, &mem, &spec, &err), KIVI_FORMAT);
    spec.scores = NULL;
    assert_int_equal(ki_vocab_create(&v, &mem, &spec, &err), KIVI_FORMAT);
    assert_int_equal(mem.n_blocks, 0);
}

/* ---- tokenizer.json ---- */

#define MODEL_PARTS                                                                                \
    "\"vocab\": {\"<unk>\": 0, \"a\": 1, \"b\": 2, \"ab\": 3, \"\xe2\x96\x81\": 4, \"<0xC3>\": 5," \
    " \"<0xA9>\": 6, \"abab\": 7, \"1\": 8}, \"merges\": [\"a b\", [\"ab\", \"ab\"]]"
#define MODEL                                                                                      \
    "{\"type\": \"BPE\", \"unk_token\": \"<unk>\", \"byte_fallback\": true, " MODEL_PARTS "}"
#define SPECIAL(id, text, more)                                                                    \
    "{\"id\": " #id ", \"content\": \"" text "\", \"special\": true, \"normalized\": false" more "}"

static kivi_status load(ki_vocab **v, ki_mem *mem, const char *text, kivi_error *err) {
    return ki_vocab_create_json(v, mem, text, strlen(text), err);
}

static void check_loaded(ki_vocab **v, ki_mem *mem, const char *text) {
    kivi_error err = {0};
    ki_mem_init(mem);
    if (load(v, mem, text, &err)) fail_msg("%s", err.text);
}

static void test_json(void **state) {
    (void)state;
    ki_mem mem;
    ki_vocab *v;
    check_loaded(
        &v, &mem,
        "{\"model\": " MODEL ", \"added_tokens\": [" SPECIAL(0, "<unk>", "") ", " SPECIAL(
            9, "<s>",
            ", \"rstrip\": true") ", " SPECIAL(10, "<x>",
                                               ", \"lstrip\": true") ", {\"id\": 11, \"content\": "
                                                                     "\"B\", \"special\": false, "
                                                                     "\"normalized\": true, "
                                                                     "\"single_word\": true}], "
                                                                     "\"normalizer\": {\"type\": "
                                                                     "\"Lowercase\"}, "
                                                                     "\"decoder\": {\"type\": "
                                                                     "\"Sequence\", \"decoders\": "
                                                                     "[{\"type\": \"Replace\", "
                                                                     "\"pattern\": {\"String\": "
                                                                     "\"\xe2\x96\x81\"}, "
                                                                     "\"content\": \" \"}, "
                                                                     "{\"type\": "
                                                                     "\"ByteFallback\"}, "
                                                                     "{\"type\": \"Fuse\"}]}, "
                                                                     "\"post_processor\": "
                                                                     "{\"type\": "
                                                                     "\"TemplateProcessing\", "
                                                                     "\"single\": "
                                                                     "[{\"SpecialToken\": {\"id\": "
                                                                     "\"<s>\"}},"
                                                                     " {\"Sequence\": {\"id\": "
                                                                     "\"A\"}}, {\"SpecialToken\": "
                                                                     "{\"id\": \"<x>\"}}], "
                                                                     "\"special_tokens\": "
                                                                     "{\"<s>\": {\"ids\": [9]}, "
                                                                     "\"<x>\": {\"ids\": [10]}}}}");
    assert_int_equal(ki_vocab_size(v), 12);
    check_ids(v, "ababab", 0, "7 3");
    check_ids(v, "ABAB", 0, "7");
    check_ids(v,
              "\xc3\xa9"
              "a",
              0, "5 6 1");
    check_ids(v, "\xc3", 0, "5"); /* a byte that is no text, and has a token */
    check_ids(v, "\xff", 0, "0"); /* and one that has none */
    check_ids(v, "cc", 0, "0 0"); /* not fused */
    check_ids(v, "a<s>  b", 0, "1 0 0 0 0 0 11");
    check_ids(v, "a<s>  b", KIVI_TEXT_SPECIAL, "1 9 11"); /* rstrip; b is the added token, a word */
    check_ids(v, "a  <x>b", KIVI_TEXT_SPECIAL, "1 10 11");
    check_ids(v, "ab b", 0, "3 0 11");
    check_ids(v, "a", KIVI_TEXT_ADD_BOS, "9 1 10");
    check_bytes(v, 4, " ");
    check_bytes(v, 5, "\xc3");
    check_bytes(v, 9, "<s>");
    assert_true(ki_vocab_is_control(v, 9) && !ki_vocab_is_control(v, 11));
    ki_vocab_set_ends(v, -1, 0, -1, 0);
    check_ids(v, "a", KIVI_TEXT_ADD_BOS, "1");
    ki_vocab_destroy(&v);
    assert_int_equal(mem.n_blocks, 0);
}

/* Control tokens are found where parts allow them, in a text that is one for all else. */
static void test_parts(void **state) {
    (void)state;
    ki_mem mem;
    ki_vocab *v;
    int32_t ids[16];
    size_t n;
    check_loaded(&v, &mem, "{\"model\": " MODEL ", \"added_tokens\": [" SPECIAL(9, "<s>", "") "]}");
    ki_text_part parts[] = {{{"<s>a", 4}, true}, {{"b<s", 3}, false}, {{">", 1}, true},
                            {{"<", 1}, true},    {{"s>", 2}, true},   {{"<s>", 3}, false}};
    assert_int_equal(ki_vocab_encode_parts(v, parts, 6, 0, ids, 16, &n, NULL), KIVI_OK);
    const int32_t want[] = {9, 3, 0, 0, 0, 9, 0, 0, 0};
    assert_int_equal(n, sizeof want / sizeof *want);
    assert_memory_equal(ids, want, sizeof want);
    assert_int_equal(ki_vocab_encode_parts(v, NULL, 0, 0, ids, 16, &n, NULL), KIVI_OK);
    assert_int_equal(n, 0);
    ki_vocab_destroy(&v);
}

static void check_refused(const char *text, kivi_status want, const char *words) {
    ki_mem mem;
    ki_vocab *v = (ki_vocab *)&mem;
    kivi_error err = {0};
    ki_mem_init(&mem);
    kivi_status status = load(&v, &mem, text, &err);
    if (status != want || !strstr(err.text, words))
        fail_msg("%.60s: %d \"%s\", not %d \"%s\"", text, status, err.text, want, words);
    assert_null(v);
    assert_int_equal(mem.n_blocks, 0);
}
#define REFUSED(want, words, rest)                                                                 \
    check_refused("{\"model\": " MODEL ", " rest "}", KIVI_##want, words)
#define PRE(node) "\"pre_tokenizer\": " node
#define SPLIT(pattern) PRE("{\"type\": \"Split\", \"pattern\": {\"Regex\": \"" pattern "\"}}")

static void test_refused(void **state) {
    (void)state;
    check_refused("", KIVI_FORMAT, "tokenizer.json");
    check_refused("{}", KIVI_FORMAT, "model is not there");
    check_refused("{\"model\": {\"type\": \"Unigram\"}}", KIVI_UNSUPPORTED, "model \"Unigram\"");
    check_refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {}}}", KIVI_FORMAT, "vocab is empty");
    check_refused("{\"model\": {\"vocab\": {\"a\": -1}, \"merges\": []}}", KIVI_FORMAT,
                  "id outside");
    check_refused("{\"model\": {\"vocab\": {\"a\": 99999999}, \"merges\": []}}", KIVI_FORMAT,
                  "id outside");
    check_refused("{\"model\": {\"vocab\": {\"a\": 0, \"b\": 0}, \"merges\": []}}", KIVI_FORMAT,
                  "twice");
    check_refused("{\"model\": {\"vocab\": {\"a\": 0, \"a\": 1}, \"merges\": []}}", KIVI_FORMAT,
                  "duplicate");
    check_refused("{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]}}", KIVI_FORMAT,
                  "right part");
    check_refused("{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [\"a a\"]}}", KIVI_FORMAT,
                  "its result");
    check_refused("{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [\"a\"]}}", KIVI_FORMAT,
                  "two parts");
    check_refused("{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [7]}}", KIVI_FORMAT,
                  "two parts");
    check_refused("[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", KIVI_FORMAT, "nested too deep");
    REFUSED(UNSUPPORTED, "normalizer \"Nmt\"", "\"normalizer\": {\"type\": \"Nmt\"}");
    REFUSED(UNSUPPORTED, "pre_tokenizer \"Odd\"", PRE("{\"type\": \"Odd\"}"));
    REFUSED(UNSUPPORTED, "decoder \"CTC\"", "\"decoder\": {\"type\": \"CTC\"}");
    REFUSED(UNSUPPORTED, "post_processor \"Odd\"", "\"post_processor\": {\"type\": \"Odd\"}");
    REFUSED(UNSUPPORTED, "split behavior \"Odd\"",
            PRE("{\"type\": \"Punctuation\", \"behavior\": \"Odd\"}"));
    REFUSED(FORMAT, "has no type", PRE("{}"));
    REFUSED(FORMAT, "is no list", PRE("{\"type\": \"Sequence\"}"));
    REFUSED(FORMAT, "no pattern", PRE("{\"type\": \"Split\"}"));
    REFUSED(UNSUPPORTED, "an intersection", SPLIT("[a-z&&b]"));
    REFUSED(UNSUPPORTED, "a class in a class", SPLIT("[a[b]]"));
    REFUSED(UNSUPPORTED, "a repeated count", SPLIT("a{2,3}+"));
    REFUSED(UNSUPPORTED, "the pattern", SPLIT("(("));
    REFUSED(UNSUPPORTED, "the pattern", SPLIT("[a"));
    REFUSED(UNSUPPORTED, "unfinished", SPLIT("a\\\\"));
    REFUSED(FORMAT, "without content", "\"added_tokens\": [{\"id\": 9}]");
    REFUSED(FORMAT, "another's id", "\"added_tokens\": [" SPECIAL(1, "new", "") "]");
    REFUSED(FORMAT, "another's id",
            "\"added_tokens\": [" SPECIAL(9, "x", "") ", " SPECIAL(9, "y", "") "]");
    REFUSED(FORMAT, "names no token",
            "\"post_processor\": {\"type\": \"TemplateProcessing\", "
            "\"single\": [{\"SpecialToken\": {\"id\": \"q\"}}]}");
    REFUSED(FORMAT, "not there", "\"post_processor\": {\"type\": \"BertProcessing\"}");
}

/* A pattern that takes for ever is stopped, not waited for. */
static void test_bad_pattern(void **state) {
    (void)state;
    ki_mem mem;
    ki_vocab *v;
    kivi_error err = {0};
    char text[64];
    size_t n;
    int32_t ids[64];
    memset(text, 'a', sizeof text);
    check_loaded(&v, &mem, "{\"model\": " MODEL ", " SPLIT("(?:a|aa)*[cd]") "}");
    pcre2_set_match_limit(v->pipeline->limits, 10000);
    kivi_status status = ki_vocab_encode(v, text, sizeof text, 0, ids, 64, &n, &err);
    assert_int_equal(status, KIVI_ARG);
    ki_vocab_destroy(&v);
    assert_int_equal(mem.n_blocks, 0);
}

static const char everything[] = "{\"model\": " MODEL ", \"added_tokens\": [" SPECIAL(
    9, "<s>",
    "") ", {\"id\": 10, \"content\": "
        "\"Q\", \"special\": false}], \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": ["
        "{\"type\": \"NFKC\"}, {\"type\": \"StripAccents\"}, {\"type\": \"Lowercase\"}, {\"type\": "
        "\"Prepend\", \"prepend\": \"a\"}, {\"type\": \"Replace\", \"pattern\": {\"Regex\": "
        "\"\\\\s+\"}, "
        "\"content\": \"b\"}]}, \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": ["
        "{\"type\": \"Metaspace\"}, {\"type\": \"Digits\"}, {\"type\": \"Split\", \"pattern\": "
        "{\"Regex\":"
        " \"\\\\p{N}{1,3}+|[^\\\\s\\\\w]\"}, \"behavior\": \"MergedWithNext\"}]}, \"decoder\": "
        "{\"type\": "
        "\"Metaspace\"}}";

static void test_no_memory(void **state) {
    (void)state;
    static const char text[] =
        "a b1 \xc3\xa9\xcc\x81 \xef\xac\x81 Q<s>\xff ababababababababababababababababab";
    kivi_status status = KIVI_NOMEM;
    int64_t n_failed = 0;
    for (int64_t nth = 1; status != KIVI_OK; nth++) {
        ki_mem mem;
        ki_vocab *v;
        int32_t ids[128];
        size_t n;
        ki_mem_init(&mem);
        mem.fail_countdown = nth;
        status = load(&v, &mem, everything, NULL);
        if (v) status = ki_vocab_encode(v, text, sizeof text - 1, 3, ids, 128, &n, NULL);
        ki_vocab_destroy(&v);
        assert_int_equal(mem.n_blocks, 0);
        if (status != KIVI_OK) assert_int_equal(status, KIVI_NOMEM);
        n_failed += status != KIVI_OK;
    }
    print_message("%lld allocations, each made to fail\n", (long long)n_failed);
    assert_true(n_failed > 20);
}

/* Bytes of every kind, at random: no fault, and ids that are there. */
static void test_random(void **state) {
    (void)state;
    static const char *const bits[] = {"a",
                                       "b",
                                       "1",
                                       " ",
                                       "\n",
                                       "\xcc\x81",
                                       "\xcc\x96",
                                       "\xff",
                                       "<s>",
                                       "\xe4\xbd\xa0",
                                       "\xe1\x84\x80",
                                       "\xe1\x85\xa1",
                                       "\xef\xb7\xba",
                                       "Q",
                                       "\xc3",
                                       "!",
                                       "<",
                                       "0"};
    ki_mem mem;
    ki_vocab *v;
    uint64_t random = 1;
    check_loaded(&v, &mem, everything);
    for (int round = 0; round < 3000; round++) {
        char text[256];
        int32_t ids[MAX_IDS];
        size_t n = 0;
        for (int i = 0; i < 40; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            const char *bit = bits[(random >> 33) % (sizeof bits / sizeof *bits)];
            memcpy(text + n, bit, strlen(bit));
            n += strlen(bit);
        }
        size_t n_ids = encode(ids, v, text, n, (unsigned)round % 4);
        for (size_t i = 0; i < n_ids; i++) assert_true(ids[i] >= 0 && ids[i] < 11);
    }
    ki_vocab_destroy(&v);
    assert_int_equal(mem.n_blocks, 0);
}

/* Many special tokens with one beginning, and a text of only that. */
static void test_specials(void **state) {
    (void)state;
    enum { N = 3000 };
    static char texts[N][16];
    static ki_special items[N];
    for (int i = 0; i < N; i++) {
        snprintf(texts[i], sizeof texts[i], "<u%d>", i);
        items[i] = (ki_special){.text = {texts[i], strlen(texts[i])}, .id = i, .is_control = i % 2};
    }
    ki_specials s = {.items = items, .n_items = N};
    ki_specials_sort(&s);
    for (int i = 0; i < N; i++) {
        char text[20];
        snprintf(text, sizeof text, "<u%d>x", i);
        ki_span span = {text, strlen(text)};
        const ki_special *all = ki_specials_at(&s, span, SIZE_MAX);
        const ki_special *user = ki_specials_at(&s, span, 0);
        assert_true(all && all->id == i);
        assert_true(i % 2 ? !user : user == all);
        assert_null(ki_specials_at(&s, (ki_span){text, span.n_bytes - 2}, SIZE_MAX));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scored),      cmocka_unit_test(test_json),
        cmocka_unit_test(test_parts),       cmocka_unit_test(test_refused),
        cmocka_unit_test(test_bad_pattern), cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_random),      cmocka_unit_test(test_specials),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
