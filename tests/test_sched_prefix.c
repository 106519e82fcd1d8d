/* Prefixes that requests share: what is found, what is not, and what goes. */
#include "sched_tale.h"

/* ---- SHA-256: the standard's own examples ---- */

static void check_sha(const char *text, size_t n_times, const char *hex) {
    ki_sha256 h;
    uint8_t digest[KI_SHA256_BYTES];
    char got[65];
    ki_sha256_init(&h);
    for (size_t i = 0; i < n_times; i++) ki_sha256_add(&h, text, strlen(text));
    ki_sha256_end(digest, &h);
    for (int i = 0; i < 32; i++) snprintf(got + 2 * i, 3, "%02x", digest[i]);
    assert_string_equal(got, hex);
}

static void test_sha256(void **state) {
    (void)state;
    check_sha("", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    check_sha("abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    check_sha("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    check_sha("a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

/* ---- names ---- */

enum { PAGE = KI_PAGE_TOKENS, NAMED_PAGES = 3, MAX_NAMES = 64 };

/* All that a name is made of. */
typedef struct named {
    uint64_t fingerprint;
    kivi_kv_options kv;
    const char *salt; /* NULL: none */
    int32_t prompt[NAMED_PAGES * PAGE];
} named;
typedef struct chain {
    uint8_t of_pages[NAMED_PAGES + 1][KI_SHA256_BYTES];
} chain;

static named some_name(void) {
    named n = {.fingerprint = 0x123456789abcdef0u,
               .kv = {.k_bits = 4,
                      .v_bits = 2,
                      .plus = KIVI_PLUS | KIVI_PLUS_TURN,
                      .group = 128,
                      .residual_tokens = 256,
                      .sink_tokens = 16,
                      .rule = KIVI_RULE_SPAN,
                      .span_tokens = 384},
               .salt = "key"};
    for (int i = 0; i < NAMED_PAGES * PAGE; i++) n.prompt[i] = i * 7 + 1;
    return n;
}

/* The names of a prompt's whole pages, as the search for them makes them: only the settings of the
 * cache are looked at, so none needs to be there. */
static chain names_of(const named *n) {
    ki_mem mem;
    ki_mem_init(&mem);
    kivi_cache cache = {.layout.kv = n->kv};
    ki_machine machine = {.cache = &cache, .fingerprint = n->fingerprint};
    ki_prefixes p = {.mem = &mem, .machine = &machine, .unit_tokens = PAGE, .n = 1};
    ki_request q = {.r = {.prompt = n->prompt, .n_prompt = NAMED_PAGES * PAGE, .salt = n->salt}};
    ki_choice c = {.request = &q};
    chain out;
    q.r.n_salt_bytes = n->salt ? strlen(n->salt) : 0;
    assert_null(ki_prefix_find(&p, &c));
    assert_non_null(q.chain);
    memcpy(out.of_pages, q.chain, sizeof out.of_pages);
    ki_free(&mem, q.chain);
    return out;
}

/* Nothing of the chain is that of any before it. */
static void check_new(chain *seen, size_t *n_seen, const char *what, named n) {
    chain c = names_of(&n), again = names_of(&n);
    assert_memory_equal(&c, &again, sizeof c);
    for (size_t i = 0; i < *n_seen; i++)
        for (int page = 0; page <= NAMED_PAGES; page++)
            if (!memcmp(c.of_pages[page], seen[i].of_pages[page], KI_SHA256_BYTES))
                fail_msg("%s: page %d is named as that of chain %zu", what, page, i);
    assert_true(*n_seen < MAX_NAMES);
    seen[(*n_seen)++] = c;
}

/* One prompt under another model, setting of the cache or salt is another prefix from the root
 * on. */
static void test_names_of_settings(void **state) {
    (void)state;
    static chain seen[MAX_NAMES];
    size_t n_seen = 0;
    check_new(seen, &n_seen, "the first", some_name());
#define OTHER(...)                                                                                 \
    do {                                                                                           \
        named n = some_name();                                                                     \
        __VA_ARGS__;                                                                               \
        check_new(seen, &n_seen, #__VA_ARGS__, n);                                                 \
    } while (0)
    OTHER(n.fingerprint++);
    OTHER(n.fingerprint ^= (uint64_t)1 << 63); /* all eight bytes count */
    OTHER(n.kv.k_bits = 2);
    OTHER(n.kv.v_bits = 3);
    OTHER(n.kv.k_bits = 2, n.kv.v_bits = 4); /* k4v2, turned round */
    OTHER(n.kv.k_bits = n.kv.v_bits = 16);
    OTHER(n.kv.plus = 0);
    for (uint32_t part = KIVI_PLUS_WIDE; part <= KIVI_PLUS_V32; part *= 2) OTHER(n.kv.plus ^= part);
    OTHER(n.kv.group = 32);
    OTHER(n.kv.residual_tokens = 128);
    OTHER(n.kv.residual_tokens = 384, n.kv.span_tokens = 256); /* turned round, too */
    OTHER(n.kv.sink_tokens = 0);
    OTHER(n.kv.rule = KIVI_RULE_STREAM);
    OTHER(n.kv.rule = KIVI_RULE_PAPER);
    OTHER(n.kv.span_tokens = 256);
    OTHER(n.salt = NULL);
    OTHER(n.salt = "kez");
    OTHER(n.salt = "ke");
#undef OTHER
    named n = some_name(); /* what a name does not depend on */
    n.kv.rewind_tokens = 77;
    chain c = names_of(&n);
    assert_memory_equal(&c, &seen[0], sizeof c);
}

/* A page has its name from all tokens up to its end. */
static void test_names_of_tokens(void **state) {
    (void)state;
    named n = some_name();
    chain first = names_of(&n);
    for (int changed = 0; changed < NAMED_PAGES * PAGE; changed += PAGE - 1) {
        n = some_name();
        n.prompt[changed] ^= 1 << 20;
        chain c = names_of(&n);
        for (int page = 0; page <= NAMED_PAGES; page++) {
            bool is_same = !memcmp(c.of_pages[page], first.of_pages[page], KI_SHA256_BYTES);
            if (is_same != (page * PAGE <= changed))
                fail_msg("token %d is changed, the name of %d pages is %s", changed, page,
                         is_same ? "not" : "too");
        }
    }
}

/* The root, byte for byte: the words that tell it from other digests, the model, the settings as
 * 32-bit words, the tokens of a page, the salt. */
static void test_name_of_root(void **state) {
    (void)state;
    named n = some_name();
    const uint32_t words[] = {4,   2,  KIVI_PLUS | KIVI_PLUS_TURN, 128, 256, 16, KIVI_RULE_SPAN,
                              384, 128};
    uint8_t text[13 + 8 + sizeof words + 3] = "kivi prefix 1", *at = text + 13;
    memcpy(at, &n.fingerprint, 8), at += 8;
    memcpy(at, words, sizeof words), at += sizeof words;
    memcpy(at, "key", 3);
    uint8_t want[KI_SHA256_BYTES];
    ki_sha256 h;
    ki_sha256_init(&h);
    ki_sha256_add(&h, text, sizeof text);
    ki_sha256_end(want, &h);
    chain c = names_of(&n);
    assert_memory_equal(c.of_pages[0], want, sizeof want);
}

/* ---- prefixes ---- */

static uint32_t cached_of(tale *t) {
    send(t);
    run();
    check_answer(t);
    uint32_t n = t->timings.n_cached;
    free(t);
    return n;
}

static tale *salted(tale *t, const char *salt) {
    t->r.salt = salt, t->r.n_salt_bytes = strlen(salt);
    return t;
}

static void test_prefix_stream(void **state) {
    (void)state;
    begin();
    assert_int_equal(cached_of(make(1, 600, 5)), 0);
    assert_int_equal(cached_of(make(1, 600, 5)), 512);
    assert_int_equal(cached_of(make(1, 500, 5)), 384); /* shorter, on the same pages */
    assert_int_equal(cached_of(make(1, 100, 5)), 0);
    assert_int_equal(cached_of(make(2, 600, 5)), 0);
    tale *t = make(1, 700, 5);
    t->prompt[300] = (t->prompt[300] + 1) % FAKE_VOCAB; /* only the pages before it are the same */
    assert_int_equal(cached_of(t), 256);
    assert_int_equal(cached_of(salted(make(1, 600, 5), "key")), 0);
    assert_int_equal(cached_of(salted(make(1, 600, 5), "key")), 512);
    assert_int_equal(cached_of(salted(make(1, 600, 5), "other")), 0);
    t = make(1, 600, 5);
    t->r.prompt_logprobs = 0; /* each row of the prompt is wanted */
    assert_int_equal(cached_of(t), 0);
    kivi_scheduler_stats st = stats();
    assert_int_equal(st.prefix_hits, 512 + 384 + 256 + 512);
    assert_true(st.pages_cached == st.pages_used && st.n_prefixes > 0);
    end();
}

/* The next turn of a conversation begins with all of the one before it. */
static void test_prefix_turns(void **state) {
    (void)state;
    begin();
    tale *a = send(make(1, 333, 40));
    run();
    check_answer(a);
    tale *b = make(1, 333, 5);
    memcpy(b->prompt + 333, a->tokens[0], 40 * sizeof(int32_t));
    for (int i = 0; i < 27; i++) b->prompt[373 + i] = i % FAKE_VOCAB;
    b->r.n_prompt = 400;
    assert_int_equal(cached_of(b), 333 + 39); /* the last token was told, and not evaluated */
    free(a);
    end();
}

static void test_prefix_span(void **state) {
    (void)state;
    fo.kv.rule = KIVI_RULE_SPAN, fo.kv.span_tokens = 256;
    begin();
    assert_int_equal(cached_of(make(1, 700, 5)), 0);
    assert_int_equal(cached_of(make(1, 700, 5)), 512);
    assert_int_equal(cached_of(make(1, 500, 5)), 256);
    end();
}

static void test_prefix_paper(void **state) {
    (void)state;
    fo.kv.rule = KIVI_RULE_PAPER;
    begin();
    assert_int_equal(cached_of(make(1, 600, 5)), 0);
    assert_int_equal(cached_of(make(1, 600, 5)), 0);
    assert_int_equal(stats().n_prefixes, 0);
    assert_int_equal(stats().prefix_queries, 0);
    end();
    fo.kv.k_bits = fo.kv.v_bits = 16; /* nothing is read from codes: all rules are one */
    begin();
    assert_int_equal(cached_of(make(1, 600, 5)), 0);
    assert_int_equal(cached_of(make(1, 600, 5)), 512);
    end();
}

/* Pages of prefixes go when they are needed, the least recently used first; those that are in use
 * stay. */
static void test_eviction(void **state) {
    (void)state;
    fo.n_pages = 12;
    begin();
    assert_int_equal(cached_of(make(1, 300, 1)), 0);
    assert_int_equal(cached_of(make(2, 300, 1)), 0);
    assert_int_equal(cached_of(make(1, 300, 1)), 256); /* 2 is now the older one */
    assert_int_equal(cached_of(make(3, 900, 1)), 0);
    assert_true(stats().n_evictions > 0);
    assert_int_equal(cached_of(make(1, 300, 1)), 256);
    assert_int_equal(cached_of(make(2, 300, 1)), 0);
    assert_int_equal(cached_of(make(4, 1000, 24)), 0); /* takes nearly all */
    end();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        UNIT(test_sha256),       UNIT(test_names_of_settings), UNIT(test_names_of_tokens),
        UNIT(test_name_of_root), UNIT(test_prefix_stream),     UNIT(test_prefix_turns),
        UNIT(test_prefix_span),  UNIT(test_prefix_paper),      UNIT(test_eviction),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
