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
        UNIT(test_sha256),      UNIT(test_prefix_stream), UNIT(test_prefix_turns),
        UNIT(test_prefix_span), UNIT(test_prefix_paper),  UNIT(test_eviction),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
