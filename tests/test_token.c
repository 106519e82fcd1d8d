/* test_token.c: vocabularies, encoding and UTF-8. A tiny vocabulary is always there; the golden ids
 * of SmolLM2 need the model: KIVI_TEST_MODEL=path of the GGUF file. KIVI_TEST_SEED: the seed. */
#include "token_private.h"

#include "load.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>
#include <jansson.h>

/* ---- a tiny vocabulary ---- */

enum { MAX_TOKENS = 512, MAX_MERGES = 128 };

typedef struct maker {
    char text[MAX_TOKENS + MAX_MERGES][64];
    ki_span tokens[MAX_TOKENS], merges[MAX_MERGES];
    int32_t types[MAX_TOKENS];
    size_t n_text;
    ki_vocab_spec spec;
} maker;

static ki_span span(const char *s) { return (ki_span){s, strlen(s)}; }

static ki_span keep(maker *m, const char *bytes) {
    char *text = m->text[m->n_text++];
    snprintf(text, sizeof m->text[0], "%s", bytes);
    return span(text);
}

static int32_t add_token(maker *m, const char *text, int32_t type) {
    m->tokens[m->spec.n_tokens] = keep(m, text);
    m->types[m->spec.n_tokens] = type;
    return (int32_t)m->spec.n_tokens++;
}

static void add_merge(maker *m, const char *text) {
    m->merges[m->spec.n_merges++] = keep(m, text);
}

/* A merge whose result is a new token, both spelled in ASCII. */
static void add_pair(maker *m, const char *left, const char *right) {
    char text[64];
    snprintf(text, sizeof text, "%s%s", left, right);
    add_token(m, text, KI_TOKEN_NORMAL);
    snprintf(text, sizeof text, "%s %s", left, right);
    add_merge(m, text);
}

/* Ids 0 to 255 are the bytes. */
static maker *make_bytes(void) {
    maker *m = calloc(1, sizeof *m);
    assert_non_null(m);
    m->spec = (ki_vocab_spec){.model = "gpt2", .pre = "smollm", .tokens = m->tokens,
                              .types = m->types, .merges = m->merges, .bos_id = -1,
                              .eos_id = -1, .unk_id = -1};
    for (unsigned byte = 0; byte < 256; byte++) {
        unsigned char spelled[3] = {0};
        ki_alphabet_write(spelled, (unsigned char)byte);
        add_token(m, (const char *)spelled, KI_TOKEN_NORMAL);
    }
    return m;
}

enum { BOS = 256, EOS, UNK, USER, USER_LONG, A2, A4, A8, HE, LL, HELL, HELLO, DIGITS, TWIN };

static maker *make_tiny(void) {
    maker *m = make_bytes();
    add_token(m, "<s>", KI_TOKEN_CONTROL);
    add_token(m, "</s>", KI_TOKEN_CONTROL);
    add_token(m, "<unk>", KI_TOKEN_UNKNOWN);
    add_token(m, "[U]", KI_TOKEN_USER);
    add_token(m, "[U]!", KI_TOKEN_USER);
    add_pair(m, "a", "a");
    add_pair(m, "aa", "aa");
    add_pair(m, "aaaa", "aaaa");
    add_pair(m, "h", "e");
    add_pair(m, "l", "l");
    add_pair(m, "he", "ll");
    add_pair(m, "hell", "o");
    add_pair(m, "1", "2");
    add_token(m, "aa", KI_TOKEN_NORMAL);
    m->spec.bos_id = BOS;
    m->spec.eos_id = EOS;
    m->spec.add_bos = true;
    return m;
}

typedef struct fixture {
    ki_mem mem;
    maker *maker;
    ki_vocab *vocab;
} fixture;

static int setup(void **state) {
    fixture *f = calloc(1, sizeof *f);
    kivi_error err = {0};
    ki_mem_init(&f->mem);
    f->maker = make_tiny();
    if (ki_vocab_create(&f->vocab, &f->mem, &f->maker->spec, &err)) fail_msg("%s", err.text);
    *state = f;
    return 0;
}

static int teardown(void **state) {
    fixture *f = *state;
    ki_vocab_destroy(&f->vocab);
    assert_null(f->vocab);
    assert_int_equal(f->mem.n_blocks, 0);
    free(f->maker);
    free(f);
    return 0;
}

/* Ids of a text; the caller frees them. */
static int32_t *encode(const ki_vocab *vocab, const char *text, size_t n_bytes, unsigned flags,
                       size_t *n_out) {
    kivi_error err = {0};
    int32_t *ids = calloc(n_bytes + 2, sizeof *ids);
    if (ki_vocab_encode(vocab, text, n_bytes, flags, ids, n_bytes + 2, n_out, &err))
        fail_msg("%s", err.text);
    return ids;
}

static void check_ids(const ki_vocab *vocab, const char *text, unsigned flags,
                      const int32_t *want, size_t n_want) {
    size_t n;
    int32_t *ids = encode(vocab, text, strlen(text), flags, &n);
    assert_int_equal(n, n_want);
    if (n) assert_memory_equal(ids, want, n * sizeof *ids);
    free(ids);
}
#define CHECK_IDS(vocab, text, flags, ...)                                                         \
    check_ids(vocab, text, flags, (const int32_t[]){__VA_ARGS__},                                  \
              sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

static void check_round_trip(const ki_vocab *vocab, const char *text, size_t n_bytes) {
    size_t n, at = 0;
    int32_t *ids = encode(vocab, text, n_bytes, 0, &n);
    char *back = calloc(n_bytes + 64, 1);
    for (size_t i = 0; i < n; i++) at += ki_vocab_bytes(vocab, ids[i], back + at, 64);
    assert_int_equal(at, n_bytes);
    if (n_bytes) assert_memory_equal(back, text, n_bytes);
    free(back);
    free(ids);
}

/* ---- random numbers: the seed is printed, so that a failure can be had again ---- */

static uint64_t random_state;

static void seed(void) {
    const char *from = getenv("KIVI_TEST_SEED");
    random_state = from ? strtoull(from, NULL, 0) : 0x5eed;
    print_message("KIVI_TEST_SEED=%llu\n", (unsigned long long)random_state);
    random_state = random_state * 2 + 1; /* xorshift must not begin at 0 */
}

static uint32_t below(uint32_t n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32) % n;
}

/* Bytes in which characters, parts of them and plain noise are about equally likely. */
static void random_text(char *out, size_t n_bytes) {
    static const char parts[] = "a 1'<\n\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x80\xed\xa0\x80\xf4\x90";
    for (size_t i = 0; i < n_bytes; i++)
        out[i] = below(3) ? parts[below(sizeof parts - 1)] : (char)below(256);
}

/* ---- encoding ---- */

static void test_merges(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    CHECK_IDS(v, "hello", 0, HELLO);
    CHECK_IDS(v, " hello", 0, ' ', HELLO);
    CHECK_IDS(v, "hella", 0, HELL, 'a');
    CHECK_IDS(v, "aaaaaaa", 0, A4, A2, 'a'); /* leftmost first; TWIN, the later twin, never */
    CHECK_IDS(v, "12", 0, '1', '2');         /* digits are words of their own: no merge */
    check_ids(v, "", 0, NULL, 0);
}

static void test_bytes(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    char all[256], out[4];
    for (int i = 0; i < 256; i++) all[i] = (char)i;
    check_round_trip(v, all, sizeof all);
    for (int32_t i = 0; i < 256; i++) {
        check_round_trip(v, &all[i], 1);
        assert_int_equal(ki_vocab_bytes(v, i, out, 4), 1);
        assert_int_equal((unsigned char)out[0], i);
    }
    check_round_trip(v, "a\0b\0\0", 5);
    check_round_trip(v, "\xff\xfe ab\xc3\xc3\xa9\xe4\xbd\xf0\x9f\x98", 13);
    assert_int_equal(ki_vocab_bytes(v, HELLO, out, 4), 4); /* cut, not written past the end */
    assert_memory_equal(out, "hell", 4);
    assert_int_equal(ki_vocab_bytes(v, HELLO, NULL, 0), 5);
    assert_int_equal(ki_vocab_bytes(v, -1, out, 4), 0);
    assert_int_equal(ki_vocab_bytes(v, INT32_MAX, out, 4), 0);
}

/* A malformed byte is a word of its own: it does not merge, nor let its neighbours merge. */
static void test_malformed_splits(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    CHECK_IDS(v, "aa\xff" "aa", 0, A2, 0xff, A2);
    CHECK_IDS(v, "a\xc3" "a", 0, 'a', 0xc3, 'a');
}

static void test_special(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    unsigned bos = KIVI_TEXT_ADD_BOS, special = KIVI_TEXT_SPECIAL;
    CHECK_IDS(v, "<s>", 0, '<', 's', '>');
    CHECK_IDS(v, "<s>aa</s>", special, BOS, A2, EOS);
    CHECK_IDS(v, "<unk>", special, UNK);
    CHECK_IDS(v, "x[U]aa[U]!", 0, 'x', USER, A2, USER_LONG); /* the longest, without the flag too */
    CHECK_IDS(v, "[U", special, '[', 'U');
    CHECK_IDS(v, "", bos, BOS); /* add_eos is false: nothing behind */
    CHECK_IDS(v, "<s>", bos | special, BOS, BOS);
    assert_true(ki_vocab_is_control(v, BOS) && ki_vocab_is_control(v, UNK));
    assert_false(ki_vocab_is_control(v, USER) || ki_vocab_is_control(v, HELLO));
    assert_false(ki_vocab_is_control(v, -1) || ki_vocab_is_control(v, INT32_MAX));
    char out[8];
    assert_int_equal(ki_vocab_bytes(v, EOS, out, 8), 4);
    assert_memory_equal(out, "</s>", 4);
}

static void test_find(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    assert_int_equal(ki_vocab_size(v), TWIN + 1);
    assert_int_equal(ki_vocab_find(v, span("aa")), A2);
    assert_int_equal(ki_vocab_find(v, span("</s>")), EOS);
    assert_int_equal(ki_vocab_find(v, span("\xc4\xa0")), ' ');
    assert_int_equal(ki_vocab_find(v, span("nothing")), -1);
    assert_int_equal(ki_vocab_find(v, (ki_span){0}), -1);
}

static void test_room(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    int32_t ids[4] = {-7, -7, -7, -7};
    size_t n;
    kivi_error err = {0};
    assert_int_equal(ki_vocab_encode(v, "hexyz", 5, 0, ids, 3, &n, &err), KIVI_ARG);
    assert_int_equal(n, 4);
    for (int i = 0; i < 4; i++) assert_int_equal(ids[i], -7);
    assert_non_null(strstr(err.text, "4 ids, room for 3"));
    assert_int_equal(ki_vocab_encode(v, "hexyz", 5, 0, NULL, 0, &n, NULL), KIVI_ARG);
    assert_int_equal(n, 4);
    assert_int_equal(ki_vocab_encode(v, "hexyz", 5, 0, ids, 4, &n, NULL), KIVI_OK);
    assert_int_equal(ki_vocab_encode(v, NULL, 0, 0, NULL, 0, &n, NULL), KIVI_OK);
    assert_int_equal(n, 0);
}

/* One word, one run of spaces, one run of line ends, 10^6 words: none may recurse, meet a limit, or
 * take time that grows with the square (minutes would). */
static void test_long(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    enum { N = 1000000 };
    char *text = malloc(N);
    size_t n;
    memset(text, 'a', N);
    int32_t *ids = encode(v, text, N, 0, &n);
    assert_int_equal(n, N / 8);
    for (size_t i = 0; i < n; i++) assert_int_equal(ids[i], A8);
    free(ids);
    for (const char *c = "1 \n\r!'<\xff\xc3\x85"; *c; c++) {
        memset(text, *c, N);
        check_round_trip(v, text, N);
        for (size_t i = 0; i < N; i += 2) text[i] = ' ';
        check_round_trip(v, text, N);
    }
    free(text);
}

static void test_random_round_trip(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    char text[300];
    seed();
    for (int i = 0; i < 3000; i++) {
        size_t n_bytes = below(sizeof text);
        random_text(text, n_bytes);
        check_round_trip(v, text, n_bytes);
    }
}

/* All known pre-tokenizers: every byte comes out once, in order, and long runs are no trouble. */
static void test_every_pre(void **state) {
    maker *m = ((fixture *)*state)->maker;
    char names[512], text[300], *rest = NULL;
    enum { N = 300000 };
    char *run = malloc(N);
    seed();
    snprintf(names, sizeof names, "%s", ki_vocab_pre_names());
    for (char *name = strtok_r(names, ", ", &rest); name; name = strtok_r(NULL, ", ", &rest)) {
        ki_vocab *v;
        m->spec.pre = name;
        assert_int_equal(ki_vocab_create(&v, &((fixture *)*state)->mem, &m->spec, NULL), KIVI_OK);
        for (int i = 0; i < 300; i++) {
            random_text(text, sizeof text);
            check_round_trip(v, text, sizeof text);
        }
        for (const char *c = "a1 \n!'\xff"; *c; c++) {
            memset(run, *c, N);
            check_round_trip(v, run, N);
            for (size_t i = 0; i < N; i += 2) run[i] = ' ';
            check_round_trip(v, run, N);
        }
        ki_vocab_destroy(&v);
    }
    free(run);
}

/* What counts as white space: Unicode's property. U+0085, U+00A0, U+2028, U+3000 are of it, U+180E
 * and U+200B are not. Of a run of spaces before a word, all but the last are a word. */
typedef struct counter {
    ki_words words;
    size_t n_words;
} counter;

static kivi_status count_one(ki_words *words, ki_span word, kivi_error *err) {
    (void)err;
    assert_true(word.n_bytes > 0);
    ((counter *)words)->n_words++;
    return KIVI_OK;
}

static void count_words(size_t *n_words, const ki_vocab *v, const char *text) {
    counter c = {0};
    assert_int_equal(ki_words_init(&c.words, &v->pre, count_one, NULL), KIVI_OK);
    assert_int_equal(ki_words_split(&c.words, span(text), NULL), KIVI_OK);
    ki_words_deinit(&c.words);
    *n_words = c.n_words;
}

static void test_white_space(void **state) {
    const ki_vocab *v = ((fixture *)*state)->vocab;
    static const struct {
        const char *text;
        size_t n_words;
    } cases[] = {
        {"\xc2\x85!", 2},         {"\xc2\xa0!", 2},         {"\xe2\x80\xa8!", 2},
        {"\xe3\x80\x80!", 2},     {"\xe1\xa0\x8e!", 1},     {"\xe2\x80\x8b!", 1},
        {"\xc2\x85\xc2\xa0!", 3}, {"   a", 2},              {"   1", 2},
        {"a   ", 2},              {"it's 'twas", 4},        {"a1b22", 5},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n_words;
        count_words(&n_words, v, cases[i].text);
        if (n_words != cases[i].n_words) fail_msg("case %zu: %zu words", i, n_words);
    }
}

/* ---- merging against the rule, written down naively ---- */

static size_t naive_merge(const maker *m, const ki_vocab *v, int32_t *ids, size_t n) {
    for (size_t rank = 0; rank < m->spec.n_merges; rank++) {
        char left[64], right[64], joined[128];
        assert_int_equal(sscanf(m->merges[rank].bytes, "%63s %63s", left, right), 2);
        snprintf(joined, sizeof joined, "%s%s", left, right);
        int32_t a = ki_vocab_find(v, span(left)), b = ki_vocab_find(v, span(right));
        for (size_t i = 0; i + 1 < n; i++) {
            if (ids[i] != a || ids[i + 1] != b) continue;
            ids[i] = ki_vocab_find(v, span(joined));
            memmove(ids + i + 1, ids + i + 2, (n - i - 2) * sizeof *ids);
            return n - 1;
        }
    }
    return n;
}

static void check_against_naive(const maker *m, const ki_vocab *v, size_t n_bytes) {
    char text[200];
    int32_t want[200];
    for (size_t i = 0; i < n_bytes; i++) text[i] = (char)('a' + below(2));
    for (size_t i = 0; i < n_bytes; i++) want[i] = text[i];
    size_t n_want = n_bytes, n, before;
    do {
        before = n_want;
        n_want = naive_merge(m, v, want, n_want);
    } while (n_want < before);
    int32_t *ids = encode(v, text, n_bytes, 0, &n);
    assert_int_equal(n, n_want);
    if (n) assert_memory_equal(ids, want, n * sizeof *ids);
    free(ids);
}

static void random_merges(maker *m) {
    for (int tries = 0; tries < 25; tries++) {
        size_t made = m->spec.n_tokens - 256;
        uint32_t i = below((uint32_t)made + 2), j = below((uint32_t)made + 2);
        const char *left = i < 2 ? (i ? "b" : "a") : m->tokens[254 + i].bytes;
        const char *right = j < 2 ? (j ? "b" : "a") : m->tokens[254 + j].bytes;
        if (strlen(left) + strlen(right) < 20) add_pair(m, left, right);
    }
}

static void test_merge_rule(void **state) {
    (void)state;
    seed();
    for (int round = 0; round < 40; round++) {
        maker *m = make_bytes();
        ki_mem mem;
        ki_vocab *v;
        ki_mem_init(&mem);
        random_merges(m);
        assert_int_equal(ki_vocab_create(&v, &mem, &m->spec, NULL), KIVI_OK);
        for (size_t n = 0; n < 80; n++) check_against_naive(m, v, n);
        check_against_naive(m, v, 200);
        ki_vocab_destroy(&v);
        free(m);
    }
}

/* ---- refusals ---- */

static void check_refused(maker *m, kivi_status want, const char *words) {
    ki_mem mem;
    ki_vocab *v = (ki_vocab *)m;
    kivi_error err = {0};
    ki_mem_init(&mem);
    assert_int_equal(ki_vocab_create(&v, &mem, &m->spec, &err), want);
    assert_null(v);
    assert_int_equal(mem.n_blocks, 0);
    if (!strstr(err.text, words)) fail_msg("\"%s\" is not in \"%s\"", words, err.text);
    free(m);
}
#define CHECK_REFUSED(want, words, change)                                                         \
    do {                                                                                           \
        maker *m = make_tiny();                                                                    \
        change;                                                                                    \
        check_refused(m, KIVI_##want, words);                                                      \
    } while (0)

static void test_refused(void **state) {
    (void)state;
    CHECK_REFUSED(UNSUPPORTED, "\"bert\", known: gpt2, llama", m->spec.model = "bert");
    CHECK_REFUSED(UNSUPPORTED, "\"bloom\", known: smollm", m->spec.pre = "bloom");
    CHECK_REFUSED(UNSUPPORTED, "\"\", known", m->spec.pre = "");
    CHECK_REFUSED(ARG, "NULL", m->spec.pre = NULL);
    CHECK_REFUSED(ARG, "NULL", m->spec.tokens = NULL);
    CHECK_REFUSED(FORMAT, "0 tokens", m->spec.n_tokens = 0);
    CHECK_REFUSED(FORMAT, "bos id 270", m->spec.bos_id = TWIN + 1);
    CHECK_REFUSED(FORMAT, "eos id -2", m->spec.eos_id = -2);
    CHECK_REFUSED(FORMAT, "unknown id 4294967296", m->spec.unk_id = 1ll << 32);
    CHECK_REFUSED(FORMAT, "bos is to be added", m->spec.bos_id = -1);
    CHECK_REFUSED(FORMAT, "token 3: type 7", m->types[3] = 7);
    CHECK_REFUSED(FORMAT, "token 3: type -1", m->types[3] = -1);
    CHECK_REFUSED(FORMAT, "merge 8: its left part", add_merge(m, "zz a"));
    CHECK_REFUSED(FORMAT, "merge 8: its right part", add_merge(m, "a zz"));
    CHECK_REFUSED(FORMAT, "merge 8: its result", add_merge(m, "a z"));
    CHECK_REFUSED(FORMAT, "merge 4: its result is a control", m->types[LL] = KI_TOKEN_CONTROL);
    CHECK_REFUSED(FORMAT, "merge 8 is not two", add_merge(m, "az"));
    CHECK_REFUSED(FORMAT, "merge 8 is not two", add_merge(m, "a "));
    CHECK_REFUSED(FORMAT, "merge 8 is not two", add_merge(m, " a"));
    CHECK_REFUSED(FORMAT, "merge 8 is not two", add_merge(m, ""));
    CHECK_REFUSED(FORMAT, "merge 8: its right part", add_merge(m, "a a a"));
}

/* Llama 3 takes a word that is a token whole; a control token that looks like a word stays out. */
static void test_whole_words(void **state) {
    (void)state;
    maker *m = make_tiny();
    ki_mem mem;
    ki_vocab *v;
    ki_mem_init(&mem);
    int32_t whole = add_token(m, "xyz", KI_TOKEN_NORMAL);
    int32_t stop = add_token(m, "stop", KI_TOKEN_CONTROL);
    m->spec.pre = "llama-bpe";
    assert_int_equal(ki_vocab_create(&v, &mem, &m->spec, NULL), KIVI_OK);
    CHECK_IDS(v, "xyz", 0, whole);
    CHECK_IDS(v, "stop", 0, 's', 't', 'o', 'p');
    CHECK_IDS(v, "stop", KIVI_TEXT_SPECIAL, stop);
    ki_vocab_destroy(&v);
    free(m);
}

/* Bytes that no token spells are left out, and nothing merges across the gap. */
static void test_missing_byte(void **state) {
    (void)state;
    maker *m = make_tiny();
    ki_mem mem;
    ki_vocab *v;
    ki_mem_init(&mem);
    m->tokens['!'] = span("gone");
    m->spec.unk_id = UNK;
    assert_int_equal(ki_vocab_create(&v, &mem, &m->spec, NULL), KIVI_OK);
    check_ids(v, "!", 0, NULL, 0);
    CHECK_IDS(v, "a!a?!?", 0, 'a', 'a', '?', '?');
    ki_vocab_destroy(&v);
    free(m);
}

static void test_match_limit(void **state) {
    fixture *f = *state;
    uint64_t n_blocks = f->mem.n_blocks;
    kivi_error err = {0};
    size_t n;
    pcre2_set_match_limit(f->vocab->pre.limits, 0);
    assert_int_equal(ki_vocab_encode(f->vocab, "hello 1", 7, 0, NULL, 0, &n, &err), KIVI_ARG);
    assert_non_null(strstr(err.text, "pre-tokenizer smollm could not split the text: match limit"));
    assert_int_equal(f->mem.n_blocks, n_blocks);
}

/* ---- no memory ---- */

static kivi_status create_and_encode(ki_mem *mem, const maker *m, const char *text, size_t n_bytes,
                                     int32_t *ids, kivi_error *err) {
    ki_vocab *v;
    size_t n = 0;
    kivi_status status = ki_vocab_create(&v, mem, &m->spec, err);
    assert_true((status == KIVI_OK) == (v != NULL));
    if (v) status = ki_vocab_encode(v, text, n_bytes, 0, ids, n_bytes, &n, err);
    ki_vocab_destroy(&v);
    return status;
}

static void test_no_memory(void **state) {
    const maker *m = ((fixture *)*state)->maker;
    char text[600];
    int32_t ids[600];
    memset(text, 'a', sizeof text); /* a long word: the merging scratch is in the sweep */
    memcpy(text + 300, " 12 \xff hello", 11);
    kivi_status status = KIVI_NOMEM;
    int64_t n_failed = 0;
    for (int64_t nth = 1; status != KIVI_OK; nth++) {
        ki_mem mem;
        kivi_error err = {0};
        ki_mem_init(&mem);
        mem.fail_countdown = nth;
        status = create_and_encode(&mem, m, text, sizeof text, ids, &err);
        if (status != KIVI_OK) assert_int_equal(status, KIVI_NOMEM);
        if (status != KIVI_OK) assert_true(err.status == KIVI_NOMEM && err.text[0]);
        assert_int_equal(mem.n_blocks, 0);
        n_failed += status != KIVI_OK;
    }
    print_message("%lld allocations, each made to fail\n", (long long)n_failed);
    assert_true(n_failed > 10);
}

/* ---- UTF-8 ---- */

/* Pushes in pieces of 1 to most bytes and flushes; each push must give whole characters. */
static size_t push_pieces(const char *bytes, size_t n_bytes, uint32_t most, char *out) {
    kivi_utf8 state = {0};
    size_t n_out = 0;
    for (size_t at = 0; at < n_bytes;) {
        size_t wanted = 1 + below(most), n = KI_MIN(wanted, n_bytes - at);
        size_t n_new = kivi_utf8_push(&state, bytes + at, n, out + n_out);
        assert_true(n_new <= 3 * (n + 4));
        for (size_t i = 0; i < n_new;) {
            uint32_t need = ki_utf8_need((unsigned char *)out + n_out + i, n_new - i);
            assert_true(need && need <= n_new - i);
            i += need;
        }
        at += n;
        n_out += n_new;
    }
    n_out += kivi_utf8_push(&state, NULL, 0, out + n_out);
    assert_int_equal(state.n_pending, 0);
    return n_out;
}

static void test_utf8_splits(void **state) {
    (void)state;
    seed();
    for (int i = 0; i < 20000; i++) {
        char bytes[60], whole[256], pieces[256];
        size_t n_bytes = below(sizeof bytes);
        random_text(bytes, n_bytes);
        kivi_utf8 once = {0};
        size_t n_whole = n_bytes ? kivi_utf8_push(&once, bytes, n_bytes, whole) : 0;
        n_whole += kivi_utf8_push(&once, NULL, 0, whole + n_whole);
        size_t n_pieces = push_pieces(bytes, n_bytes, i % 2 ? 1 : 7, pieces);
        assert_int_equal(n_pieces, n_whole);
        assert_memory_equal(pieces, whole, n_whole);
    }
}

#define R "\xef\xbf\xbd"
static void test_utf8_known(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"a\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x80", "a\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x80"},
        /* the Unicode Standard, tables 3-8 to 3-11 */
        {"\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41", R R R R R R R R "A"},
        {"\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41", R R R R R R R R "A"},
        {"\xf4\x91\x92\x93\xff\x41\x80\xbf\x42", R R R R R "A" R R "B"},
        {"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41", R R R R "A"},
        {"\xf4\x8f\xbf\xbf\xf4\x90", "\xf4\x8f\xbf\xbf" R R},
        {"\xf0\x9f\x98", R}, /* cut by the end: one, at the flush */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char out[128];
        size_t n = push_pieces(cases[i][0], strlen(cases[i][0]), 1, out);
        assert_int_equal(n, strlen(cases[i][1]));
        assert_memory_equal(out, cases[i][1], n);
    }
}

/* All strings of three bytes, and all pairs of first bytes of a character of four. */
static void test_utf8_all(void **state) {
    (void)state;
    size_t n_three = 0, n_four = 0;
    for (uint32_t i = 0; i < 1u << 24; i++) {
        unsigned char s[4] = {i >> 16 & 255, i >> 8 & 255, i & 255, 0x80};
        n_three += ki_utf8_need(s, 3) == 3;
        n_four += ki_utf8_need(s, 4) == 4;
    }
    assert_int_equal(n_three, 0x10000 - 0x800 - 0x800); /* U+0800 to U+FFFF, no surrogates */
    assert_int_equal(n_four, 0x100000 / 64);            /* U+10000 to U+10FFFF by their first 3 */
}

/* ---- SmolLM2 ---- */

static const char *model_path(void) {
    const char *path = getenv("KIVI_TEST_MODEL");
    if (path && *path) return path;
    print_message("skipped: KIVI_TEST_MODEL is not set\n");
    skip();
    return NULL;
}

static ki_span *spans_of(const ki_file *file, const char *key, size_t *n, ki_mem *mem) {
    ki_str *strings;
    bool found;
    kivi_error err = {0};
    if (ki_file_str_array(&strings, n, &found, file, key, &err)) fail_msg("%s", err.text);
    assert_true(found);
    ki_span *spans = calloc(*n, sizeof *spans);
    for (size_t i = 0; i < *n; i++) spans[i] = (ki_span){strings[i].bytes, strings[i].n_bytes};
    ki_free(mem, strings);
    return spans;
}

static ki_vocab *load_smollm(ki_mem *mem, const char *path) {
    ki_file *file;
    ki_vocab *v;
    kivi_error err = {0};
    int32_t *types;
    size_t n_types;
    bool found;
    if (ki_file_open(&file, mem, path, &err)) fail_msg("%s", err.text);
    ki_vocab_spec spec = {.model = "gpt2", .pre = "smollm", .bos_id = 1, .eos_id = 2, .unk_id = 0};
    ki_span *tokens = spans_of(file, "tokenizer.ggml.tokens", &spec.n_tokens, mem);
    ki_span *merges = spans_of(file, "tokenizer.ggml.merges", &spec.n_merges, mem);
    if (ki_file_int_array(&types, &n_types, &found, file, "tokenizer.ggml.token_type", &err))
        fail_msg("%s", err.text);
    assert_int_equal(n_types, spec.n_tokens);
    spec.tokens = tokens;
    spec.merges = merges;
    spec.types = types;
    if (ki_vocab_create(&v, mem, &spec, &err)) fail_msg("%s", err.text);
    ki_free(mem, types);
    free(tokens);
    free(merges);
    ki_file_close(&file);
    return v;
}

static void check_prompt(const ki_vocab *v, const json_t *prompt) {
    const json_t *text = json_object_get(prompt, "text"), *want = json_object_get(prompt, "ids");
    size_t n;
    int32_t *ids = encode(v, json_string_value(text), json_string_length(text), KIVI_TEXT_SPECIAL,
                          &n);
    assert_int_equal(n, json_array_size(want));
    for (size_t i = 0; i < n; i++)
        assert_int_equal(ids[i], json_integer_value(json_array_get(want, i)));
    free(ids);
}

static void test_golden(void **state) {
    (void)state;
    const char *path = model_path();
    ki_mem mem;
    ki_mem_init(&mem);
    ki_vocab *v = load_smollm(&mem, path);
    json_error_t error;
    json_t *golden = json_load_file("tests/golden/smollm2.json", 0, &error);
    if (!golden) fail_msg("tests/golden/smollm2.json: %s", error.text);
    const json_t *prompts = json_object_get(golden, "prompts");
    for (size_t i = 0; i < json_array_size(prompts); i++)
        check_prompt(v, json_array_get(prompts, i));
    print_message("%zu prompts\n", json_array_size(prompts));
    assert_true(json_array_size(prompts) > 0);
    json_decref(golden);
    ki_vocab_destroy(&v);
    assert_int_equal(mem.n_blocks, 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_merges),          TEST(test_bytes),
        TEST(test_malformed_splits), TEST(test_special),
        TEST(test_find),            TEST(test_room),
        TEST(test_long),            TEST(test_random_round_trip),
        TEST(test_every_pre),       TEST(test_white_space),
        TEST(test_match_limit),     TEST(test_no_memory),
        cmocka_unit_test(test_merge_rule),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_whole_words),
        cmocka_unit_test(test_missing_byte),
        cmocka_unit_test(test_utf8_splits),
        cmocka_unit_test(test_utf8_known),
        cmocka_unit_test(test_utf8_all),
        cmocka_unit_test(test_golden),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
