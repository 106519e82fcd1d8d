/* What a sequence promises, in bytes of attention output: rows depend on (token, layer, position)
 * alone, so "as if it had never been" can be checked by replaying. */
#include "world.h"

enum { MAX_TOKENS = 4096 };
static uint32_t tokens_a[MAX_TOKENS],
    tokens_b[MAX_TOKENS]; /* b parts from a where a case says so */

static void make_tokens(uint32_t part) {
    for (uint32_t i = 0; i < MAX_TOKENS; i++) {
        tokens_a[i] = (uint32_t)hash_u64(check_opt.seed, i);
        tokens_b[i] = i < part ? tokens_a[i] : (uint32_t)hash_u64(check_opt.seed + 1, i);
    }
}

static const uint32_t kinds[][5] = {
    /* key bits, value bits, residual, sinks, parts of a + kind */
    {2, 2, 32, 0},
    {2, 2, 128, 0},
    {4, 8, 32, 32},
    {16, 2, 32, 64},
    {2, 16, 128, 32},
    {16, 16, 32, 0},
    {2, 2, 32, 4},
    {4, 2, 128, 20},
    {2, 2, 32, 1},
    {2, 2, 128, 4, KIVI_PLUS_ALL},
    {4, 2, 128, 4, KIVI_PLUS_ALL},
    {4, 3, 128, 130, KIVI_PLUS_ALL},
    {2, 16, 128, 20, KIVI_PLUS_ALL},
    {16, 3, 128, 0, KIVI_PLUS_ALL},
    {2, 3, 256, 1, KIVI_PLUS | KIVI_PLUS_FIT},
    {2, 2, 128, 40, KIVI_PLUS_ALL | KIVI_PLUS_K32},
    {2, 2, 128, 4, (KIVI_PLUS_ALL & ~KIVI_PLUS_STEP) | KIVI_PLUS_ZERO},
    {2, 3, 256, 0, KIVI_PLUS | KIVI_PLUS_ZERO | KIVI_PLUS_K32 | KIVI_PLUS_V32}};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static world world_of(uint32_t kind, kivi_rule rule, uint32_t span) {
    world w = world_small();
    kivi_kv_options *kv = &w.geometry.kv;
    kv->k_bits = kinds[kind][0], kv->v_bits = kinds[kind][1];
    kv->residual_tokens = kinds[kind][2], kv->sink_tokens = kinds[kind][3];
    kv->plus = kinds[kind][4];
    kv->rule = rule, kv->span_tokens = span;
    return w;
}

static const char *kind_name(const world *w) {
    static char name[80];
    const kivi_kv_options *kv = &w->geometry.kv;
    char parts[16] = "";
    if (kv->plus) snprintf(parts, sizeof parts, "+%u", kv->plus);
    snprintf(name, sizeof name, "b%u.%u%s-r%u-s%u-%s", kv->k_bits, kv->v_bits,
             kv->plus == KIVI_PLUS_ALL ? "+" : parts, kv->residual_tokens, kv->sink_tokens,
             world_rule_name(kv));
    return name;
}

/* ---- the pair every case works on ---- */

typedef struct stage {
    kivi_cache *cache;
    kivi_seq *seq;
} stage;

static stage stage_open(const world *w) {
    stage s = {0};
    CHECK_OK(world_create(&s.cache, w, err));
    if (s.cache) CHECK_OK(kivi_seq_create(&s.seq, s.cache, err));
    return s;
}

static void stage_close(stage *s) {
    if (s->cache) CHECK(ki_pool_check(&s->cache->pool), "page pool is inconsistent");
    kivi_seq_destroy(&s->seq);
    if (s->cache)
        CHECK(s->cache->pool.n_free == s->cache->pool.n_pages, "pages are not given back");
    kivi_cache_destroy(&s->cache);
}

/* n rows in steps of chunk; one running hash over (row, layer) outputs, the same however they were
 * cut. */
static uint64_t feed(kivi_seq *seq, const uint32_t *tokens, uint32_t n, uint32_t chunk) {
    const ki_layout *l = &seq->cache->layout;
    size_t row = (size_t)l->n_heads * l->head_dim;
    float *out = check_alloc(world_out_floats(l, chunk) * 4);
    uint64_t h = 0;
    for (uint32_t done = 0; done < n && !check_failed();) {
        uint32_t rows = n - done < chunk ? n - done : chunk;
        CHECK_OK(world_step(seq, tokens, rows, out, err));
        for (uint32_t i = 0; i < rows; i++)
            for (uint32_t layer = 0; layer < l->n_layers; layer++)
                h = hash_u64(h, world_hash(out + ((size_t)layer * rows + i) * row, row * 4));
        done += rows;
        CHECK(ki_pool_check(&seq->cache->pool), "page pool");
    }
    free(out);
    return h;
}

static uint64_t prompt(kivi_seq *seq, const uint32_t *tokens, uint32_t n, uint32_t chunk) {
    CHECK_OK(kivi_seq_begin_prompt(seq, n, err));
    return feed(seq, tokens, n, chunk);
}

/* ---- sinks within a key group ---- */

/* The group's scale, zero and codes are those of its other tokens alone, by the definition; the
 * sinks' codes are 0, of keys and of values, and so are scales of a group that is all sinks. */
static void check_sink_page(kivi_seq *seq, uint32_t head) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t g = l->kv.group, s = l->kv.sink_tokens, d = l->head_dim, first = s / g * g;
    const uint8_t *page = ki_seq_page(seq, 0, 0, head);
    const uint32_t *words = (const uint32_t *)(page + l->k_codes_at);
    const uint16_t *scale = (const uint16_t *)(page + l->k_scale_at),
                   *zero = (const uint16_t *)(page + l->k_zero_at);
    float *k = check_alloc((size_t)(first + g) * l->n_kv_heads * d * 4);
    world_rows(k, NULL, NULL, l, tokens_a, 0, 0, first + g);
    for (uint32_t c = 0; c < d; c++) {
        uint16_t x[KI_PAGE_TOKENS], want_scale, want_zero;
        uint8_t codes[KI_PAGE_TOKENS];
        for (uint32_t t = 0; t < g; t++) {
            size_t row = KI_MAX(first + t, s); /* the range of the others alone */
            x[t] = ki_f32_to_f16(k[(row * l->n_kv_heads + head) * d + c]);
        }
        ki_quantize_scalar(codes, &want_scale, &want_zero, x, 1, g, l->kv.k_bits);
        size_t at = (size_t)(first / g) * d + c;
        CHECK(scale[at] == want_scale && zero[at] == want_zero, "channel %u: scale or zero", c);
        for (uint32_t t = 0; t < first + g; t++) {
            unsigned want = t < s ? 0 : codes[t - first];
            CHECK(ki_key_code(words, t, c, d, l->kv.k_bits) == want, "key code %u %u", t, c);
        }
        for (uint32_t i = 0; i < first / g; i++)
            CHECK(scale[i * d + c] == 0 && zero[i * d + c] == 0, "scale of sinks alone");
        for (uint32_t t = 0; t < s; t++)
            CHECK(ki_value_code((const uint32_t *)(page + l->v_codes_at), t, c, d, l->kv.v_bits) ==
                      0,
                  "value code %u %u", t, c);
    }
    free(k);
}

static void sinks_in_pages(void) {
    static const uint32_t cases[][3] = {{16, 32, 4},  {16, 32, 1}, {32, 32, 20},
                                        {32, 64, 47}, {64, 64, 4}, {128, 128, 100}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int isa = 0; isa < KI_ISA_COUNT; isa++) {
            if (!check_case_isa((ki_isa)isa, "cache/sinks-in-page/g%u-s%u", cases[i][0],
                                cases[i][2]))
                continue;
            make_tokens(0);
            world w = world_small();
            w.isa = (ki_isa)isa;
            w.geometry.head_dim = 128;
            w.geometry.kv.group = cases[i][0], w.geometry.kv.residual_tokens = cases[i][1];
            w.geometry.kv.sink_tokens = cases[i][2];
            stage s = stage_open(&w);
            memset(s.cache->pool.data, 0xff, s.cache->pool.id_bytes * s.cache->pool.n_pages);
            feed(s.seq, tokens_a, 300, 77);
            for (uint32_t h = 0; h < w.geometry.n_kv_heads; h++) check_sink_page(s.seq, h);
            stage_close(&s);
            check_end();
        }
}

/* ---- chunks, threads, instruction sets, rules ---- */

/* Prompt, decode, second prompt, decode; one hash. */
static uint64_t conversation(const world *w, uint32_t n, uint32_t chunk) {
    stage s = stage_open(w);
    uint64_t h = 0;
    if (s.seq) {
        h = prompt(s.seq, tokens_a, n, chunk);
        h = hash_u64(h, feed(s.seq, tokens_a, 5, 1));
        h = hash_u64(h, prompt(s.seq, tokens_a, n / 2 + 3, chunk));
        h = hash_u64(h, feed(s.seq, tokens_a, 4, 1));
    }
    stage_close(&s);
    return h;
}

static void chunks(const world *w) {
    if (!check_case("cache/chunks/%s", kind_name(w))) return;
    make_tokens(0);
    uint64_t want = conversation(w, 300, 1000);
    static const uint32_t cuts[] = {1, 7, 64};
    for (int i = 0; i < 3; i++)
        CHECK(conversation(w, 300, cuts[i]) == want,
              "chunks of %u give other bytes than one of 300", cuts[i]);
    check_end();
}

static void stream_rows(const world *w) {
    if (!check_case("cache/stream-is-generated/%s", kind_name(w))) return;
    make_tokens(0);
    uint64_t h[3];
    for (int i = 0; i < 3; i++) {
        stage s = stage_open(w);
        h[i] = i == 0 ? prompt(s.seq, tokens_a, 330, 1000)
                      : feed(s.seq, tokens_a, 330, i == 1 ? 1 : 330);
        stage_close(&s);
    }
    CHECK(h[0] == h[1], "a prompt gives other bytes than its rows one by one");
    CHECK(h[0] == h[2], "330 generated rows in one step differ");
    check_end();
}

/* The thread sanitizer is a hundred times slower, and finds in a chunk what it finds in four. */
#ifdef __SANITIZE_THREAD__
enum { THREADED_TOKENS = 900, THREADED_CHUNK = 350 };
#else
enum { THREADED_TOKENS = 2500, THREADED_CHUNK = 700 };
#endif

static uint64_t threaded(const world *w, uint32_t n_threads) {
    world t = *w;
    t.geometry.n_threads = n_threads;
    stage s = stage_open(&t);
    uint64_t h = prompt(s.seq, tokens_a, THREADED_TOKENS, THREADED_CHUNK);
    h = hash_u64(h, feed(s.seq, tokens_a, 6, 1));
    stage_close(&s);
    return h;
}

static void threads(const world *w) {
    if (!check_case("cache/threads/%s", kind_name(w))) return;
    make_tokens(0);
    uint64_t want = threaded(w, 1);
    for (uint32_t n = 2; n <= 3; n++)
        CHECK(threaded(w, n) == want, "%u threads give other bytes than 1", n);
    check_end();
}

static void isas(const world *w, ki_isa isa) {
    if (!check_case_isa(isa, "cache/isa/%s", kind_name(w))) return;
    make_tokens(0);
    world t = *w;
    t.isa = KI_ISA_SCALAR;
    uint64_t want = conversation(&t, 200, 64);
    t.isa = isa;
    CHECK(conversation(&t, 200, 64) == want, "other bytes than scalar");
    check_end();
}

/* ---- forks ---- */

static uint64_t pages_hash(const kivi_seq *seq) {
    const ki_pool *pool = &seq->cache->pool;
    uint64_t h = 0;
    for (uint32_t i = 0; i < seq->n_pages; i++)
        h = hash_u64(h, world_hash(pool->data + seq->pages[i] * pool->id_bytes, pool->id_bytes));
    return h;
}

/* What a sequence that read tokens' first n and then goes on gives. */
static uint64_t replay(const world *w, const uint32_t *tokens, uint32_t n, uint32_t more) {
    stage s = stage_open(w);
    if (n) prompt(s.seq, tokens, n, 500);
    uint64_t h = feed(s.seq, tokens, more, 1);
    stage_close(&s);
    return h;
}

static void fork_at(const world *w, uint32_t n, uint32_t more) {
    make_tokens(n);
    stage s = stage_open(w);
    kivi_seq *other = NULL;
    if (n) prompt(s.seq, tokens_a, n, 500);
    CHECK_OK(kivi_seq_fork(&other, s.seq, err));
    if (other) {
        CHECK(kivi_seq_length(other) == n, "length");
        uint64_t before = pages_hash(s.seq);
        uint64_t b = feed(other, tokens_b, more, 1);
        CHECK(pages_hash(s.seq) == before, "at %u: the fork wrote into its origin's pages", n);
        before = pages_hash(other);
        uint64_t a = feed(s.seq, tokens_a, more, 1);
        CHECK(pages_hash(other) == before, "at %u: the origin wrote into its fork's pages", n);
        CHECK(a == replay(w, tokens_a, n, more), "at %u: the origin goes on differently", n);
        CHECK(b == replay(w, tokens_b, n, more), "at %u: the fork goes on differently", n);
        CHECK(a != b || more == 0, "both read different tokens");
    }
    kivi_seq_destroy(&other);
    stage_close(&s);
}

static void forks(const world *w) {
    if (!check_case("cache/fork/%s", kind_name(w))) return;
    static const uint32_t lengths[] = {0, 1, 31, 128, 129, 257, 400};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths && !check_failed(); i++)
        fork_at(w, lengths[i], 140);
    /* the origin dies first; forks of forks; a rewound fork writes into shared pages' positions */
    make_tokens(300);
    stage s = stage_open(w);
    kivi_seq *b = NULL, *c = NULL;
    prompt(s.seq, tokens_a, 310, 500);
    CHECK_OK(kivi_seq_fork(&b, s.seq, err));
    CHECK_OK(kivi_seq_rewind(b, 300, err));
    uint64_t before = pages_hash(s.seq);
    uint64_t h = feed(b, tokens_b, 30, 1);
    CHECK(pages_hash(s.seq) == before, "a rewound fork wrote into shared pages");
    CHECK(h == replay(w, tokens_b, 300, 30), "a rewound fork goes on differently");
    kivi_seq_destroy(&s.seq);
    CHECK_OK(kivi_seq_fork(&c, b, err));
    h = feed(c, tokens_b, 30, 3);
    CHECK(h == replay(w, tokens_b, 330, 30), "a fork of a fork whose origin is gone");
    kivi_seq_destroy(&c);
    kivi_seq_destroy(&b);
    stage_close(&s);
    check_end();
}

/* ---- steps back ---- */

static void rewind_to(const world *w, uint32_t from, uint32_t to, bool as_prompt) {
    make_tokens(to);
    stage s = stage_open(w);
    if (as_prompt) prompt(s.seq, tokens_a, from, 100);
    else feed(s.seq, tokens_a, from, 1);
    CHECK_OK(kivi_seq_rewind(s.seq, to, err));
    CHECK(kivi_seq_length(s.seq) == to, "length");
    uint64_t h = feed(s.seq, tokens_b, 70, 1);
    CHECK(h == replay(w, tokens_b, to, 70), "from %u to %u: goes on differently", from, to);
    stage_close(&s);
}

/* Refused further back; the text names a length that works. */
static void rewind_far(const world *w, uint32_t from, uint32_t to) {
    make_tokens(0);
    stage s = stage_open(w);
    prompt(s.seq, tokens_a, from, 100);
    kivi_error e = {0};
    kivi_status status = kivi_seq_rewind(s.seq, to, &e);
    const char *at = strstr(e.text, "are gone, ");
    unsigned earliest = at ? (unsigned)strtoul(at + 10, NULL, 10) : 0;
    const kivi_kv_options *kv = &w->geometry.kv;
    bool all_exact = kv->k_bits == 16 && kv->v_bits == 16;
    CHECK(all_exact ? status == KIVI_OK : status == KIVI_ARG && at, "from %u to %u gives %s: %s",
          from, to, kivi_status_name(status), e.text);
    if (status != KIVI_OK && at) {
        CHECK(kivi_seq_length(s.seq) == from && earliest > to &&
                  earliest <= from - kv->rewind_tokens,
              "%u is named as the earliest length", earliest);
        kivi_error none = {0};
        CHECK(kivi_seq_rewind(s.seq, earliest - 1, &none) == KIVI_ARG, "%u works too",
              earliest - 1);
        status = kivi_seq_rewind(s.seq, earliest, &none);
        CHECK(status == KIVI_OK, "the named length %u is refused: %s", earliest, none.text);
        uint64_t h = feed(s.seq, tokens_a, 40, 1);
        CHECK(h == replay(w, tokens_a, earliest, 40), "after going back to %u", earliest);
    }
    CHECK_OK(kivi_seq_rewind(s.seq, 0, err));
    CHECK(prompt(s.seq, tokens_a, 150, 40) != 0 && s.seq->n_tokens == 150, "after going back to 0");
    uint64_t h = feed(s.seq, tokens_a, 40, 1);
    CHECK(h == replay(w, tokens_a, 150, 40), "after going back to 0");
    CHECK(kivi_seq_rewind(s.seq, 191, &e) == KIVI_ARG, "forwards");
    stage_close(&s);
}

/* A length whose keys are all in codes needs no row of 16 bit; from there on everything must be as
 * usual. */
static void rewind_packed(const world *w) {
    for (uint32_t to = 128; to <= 640 && !check_failed(); to += 128) {
        stage s = stage_open(w);
        make_tokens(to);
        prompt(s.seq, tokens_a, 700, 100);
        if (kivi_seq_rewind(s.seq, to, NULL) == KIVI_OK) {
            feed(s.seq, tokens_b, 45, 1);
            CHECK_OK(kivi_seq_rewind(s.seq, to + 45 - w->geometry.kv.rewind_tokens, err));
            uint64_t want = replay(w, tokens_b, s.seq->n_tokens, 70);
            CHECK(feed(s.seq, tokens_b, 70, 1) == want, "from 700 to %u, on, and back", to);
        }
        stage_close(&s);
    }
}

static void rewinds(const world *w) {
    if (!check_case("cache/rewind/%s", kind_name(w))) return;
    static const uint32_t ends[] = {20, 128, 129, 135, 143, 160, 300, 336};
    for (size_t i = 0; i < sizeof ends / sizeof *ends && !check_failed(); i++)
        for (uint32_t back = 0; back <= 16; back += back < 2 ? 1 : 7)
            rewind_to(w, ends[i], ends[i] - back, i % 2);
    rewind_to(w, 300, 0, true);
    rewind_packed(w);
    rewind_far(w, 700, 350);
    rewind_far(w, 900, 899 - 300);
    check_end();
}

/* ---- full, aborted, not finite ---- */

static void full(const world *w) {
    if (!check_case("cache/full/%s", kind_name(w))) return;
    make_tokens(0);
    world small = *w;
    small.geometry.n_pages = 5;
    stage s = stage_open(&small);
    kivi_seq *other = NULL;
    CHECK_OK(kivi_seq_create(&other, s.cache, err));
    prompt(s.seq, tokens_a, 250, 100);
    prompt(other, tokens_a, 380, 100);
    kivi_error e = {0};
    uint64_t before = pages_hash(s.seq);
    CHECK(kivi_seq_begin(s.seq, 100, &e) == KIVI_FULL && e.text[0], "a sixth page of five");
    kivi_seq *forked = NULL;
    CHECK(kivi_seq_fork(&forked, s.seq, &e) == KIVI_FULL && !forked,
          "a fork without a page to copy into");
    CHECK(pages_hash(s.seq) == before && kivi_seq_length(s.seq) == 250,
          "changed by a step that was refused");
    CHECK(ki_pool_check(&s.cache->pool), "pool");
    uint64_t h = feed(s.seq, tokens_a, 6, 1);
    CHECK(h == replay(w, tokens_a, 250, 6), "goes on differently after FULL");
    CHECK(kivi_seq_begin(s.seq, 1, &e) == KIVI_FULL, "page boundary");
    kivi_seq_destroy(&other);
    CHECK_OK(kivi_seq_fork(&forked, s.seq,
                           err)); /* the window must be the right one after refused steps */
    h = feed(s.seq, tokens_a, 60, 60);
    CHECK(h == replay(w, tokens_a, 256, 60), "goes on differently once pages are free");
    if (forked) kivi_seq_destroy(&forked);
    stage_close(&s);
    check_end();
}

/* A refused step of many rows makes a larger store; a fork and a prompt given up must not mind. */
static void full_then_fork(const world *w) {
    if (!check_case("cache/full-then-fork/%s", kind_name(w))) return;
    make_tokens(0);
    world small = *w;
    small.geometry.n_pages = 6;
    stage s = stage_open(&small);
    kivi_seq *forked = NULL;
    kivi_error e = {0};
    prompt(s.seq, tokens_a, 200, 100);
    CHECK(kivi_seq_begin(s.seq, 700, &e) == KIVI_FULL, "700 more rows in six pages");
    feed(s.seq, tokens_a, 3, 1);
    CHECK(kivi_seq_begin(s.seq, 700, &e) == KIVI_FULL, "700 more rows in six pages");
    CHECK_OK(kivi_seq_fork(&forked, s.seq, err));
    if (forked) CHECK(feed(forked, tokens_a, 40, 1) == replay(w, tokens_a, 203, 40), "the fork");
    kivi_seq_destroy(&forked);
    CHECK_OK(kivi_seq_begin_prompt(s.seq, 700, err));
    feed(s.seq, tokens_a, 100, 100);
    CHECK(kivi_seq_begin(s.seq, 600, &e) == KIVI_FULL, "600 more rows in six pages");
    kivi_seq_abort(s.seq); /* the prompt is given up, its committed rows stay */
    CHECK_OK(kivi_seq_fork(&forked, s.seq, err));
    if (forked)
        CHECK(feed(forked, tokens_a, 40, 1) == replay(w, tokens_a, 303, 40),
              "the fork after a prompt");
    CHECK(feed(s.seq, tokens_a, 40, 1) == replay(w, tokens_a, 303, 40), "the origin");
    kivi_seq_destroy(&forked);
    stage_close(&s);
    check_end();
}

/* Leaves a step open with other rows in every layer, then gives it up. */
static void abort_step(kivi_seq *seq, const uint32_t *tokens, uint32_t n) {
    const ki_layout *l = &seq->cache->layout;
    size_t kv = (size_t)n * l->n_kv_heads * l->head_dim;
    float *k = check_alloc(kv * 8);
    CHECK_OK(kivi_seq_begin(seq, n, err));
    for (uint32_t layer = 0; layer < l->n_layers; layer++) {
        world_rows(k, k + kv, NULL, l, tokens, layer, seq->n_tokens, n);
        CHECK_OK(kivi_seq_append(seq, layer, k, k + kv, KIVI_F32, err));
    }
    kivi_seq_abort(seq);
    kivi_seq_abort(seq);
    free(k);
    CHECK(ki_pool_check(&seq->cache->pool), "pool");
}

static void aborts(const world *w) {
    if (!check_case("cache/abort/%s", kind_name(w))) return;
    static const uint32_t lengths[] = {1, 31, 32, 120, 127, 128, 250};
    static const uint32_t rows[] = {1, 2, 16, 40, 300};
    make_tokens(1);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths && !check_failed(); i++)
        for (size_t j = 0; j < sizeof rows / sizeof *rows; j++) {
            uint32_t n = lengths[i];
            stage s = stage_open(w);
            prompt(s.seq, tokens_a, n, 500);
            abort_step(s.seq, tokens_b, rows[j]);
            CHECK(kivi_seq_length(s.seq) == n && !s.seq->large.k && !s.seq->large.v,
                  "state after an abort");
            uint64_t h = feed(s.seq, tokens_a, 40, 1);
            CHECK(h == replay(w, tokens_a, n, 40), "%u rows given up after %u", rows[j], n);
            stage_close(&s);
        }
    check_end();
}

/* "Never begun" includes how far one can step back afterwards. */
static void abort_rewind(const world *w) {
    if (!check_case("cache/abort-then-rewind/%s", kind_name(w))) return;
    static const uint32_t rows[] = {1, 2, 16, 40, 300};
    make_tokens(1);
    for (size_t j = 0; j < sizeof rows / sizeof *rows && !check_failed(); j++)
        for (uint32_t n = 253; n <= 290; n += 6) {
            stage s = stage_open(w);
            prompt(s.seq, tokens_a, n, 500);
            abort_step(s.seq, tokens_b, rows[j]);
            kivi_error e = {0};
            uint32_t to = n - w->geometry.kv.rewind_tokens;
            kivi_status status = kivi_seq_rewind(s.seq, to, &e);
            CHECK(status == KIVI_OK, "%u rows given up at %u, then back to %u: %s", rows[j], n, to,
                  e.text);
            if (status == KIVI_OK)
                CHECK(feed(s.seq, tokens_a, 40, 1) == replay(w, tokens_a, to, 40),
                      "%u rows given up at %u", rows[j], n);
            stage_close(&s);
        }
    check_end();
}

/* Poisons one value of row `row` of a step of n rows. */
static kivi_status poisoned_step(kivi_seq *seq, uint32_t n, uint32_t row, uint32_t lane, bool key,
                                 float bad, kivi_float type) {
    const ki_layout *l = &seq->cache->layout;
    size_t kv = (size_t)n * l->n_kv_heads * l->head_dim;
    float *k = check_alloc(kv * 8), *v = k + kv;
    uint16_t *half = check_alloc(kv * 4);
    kivi_error e = {0};
    kivi_status status = kivi_seq_begin(seq, n, &e);
    for (uint32_t layer = 0; status == KIVI_OK && layer < l->n_layers; layer++) {
        world_rows(k, v, NULL, l, tokens_b, layer, seq->n_tokens, n);
        if (layer + 1 == l->n_layers)
            (key ? k : v)[(size_t)row * l->n_kv_heads * l->head_dim + lane] = bad;
        for (size_t i = 0; i < 2 * kv; i++) half[i] = ki_f32_to_f16(k[i]);
        if (type == KIVI_F32) status = kivi_seq_append(seq, layer, k, v, type, &e);
        else status = kivi_seq_append(seq, layer, half, half + kv, type, &e);
    }
    CHECK(status != KIVI_NUMERIC || strstr(e.text, key ? "key" : "value"), "%s", e.text);
    kivi_seq_abort(seq);
    free(k), free(half);
    return status;
}

static void numeric(const world *w) {
    if (!check_case("cache/not-finite/%s", kind_name(w))) return;
    static const uint32_t bad[] = {0x7f800000, 0xff800000, 0x7fc00000, 0xff800001};
    make_tokens(1);
    stage s = stage_open(w);
    uint32_t lanes = w->geometry.n_kv_heads * w->geometry.head_dim, n = 130;
    prompt(s.seq, tokens_a, n, 500);
    for (uint32_t lane = 0; lane < lanes && !check_failed(); lane++)
        for (uint32_t i = 0; i < 8; i++) {
            uint32_t rows = i % 4 == 3 ? 40 : 1;
            kivi_status status =
                poisoned_step(s.seq, rows, rows / 2, lane, i & 1, ki_f32_from_bits(bad[i / 2]),
                              (kivi_float)(lane % 2));
            CHECK(status == KIVI_NUMERIC, "%08x in lane %u gives %s", bad[i / 2], lane,
                  kivi_status_name(status));
        }
    CHECK(atomic_load(&s.cache->n_nonfinite) == lanes * 8, "counter");
    uint64_t h = feed(s.seq, tokens_a, 60, 1);
    CHECK(h == replay(w, tokens_a, n, 60), "goes on differently");
    stage_close(&s);
    check_end();
}

/* ---- lengths around every boundary ---- */

static void boundaries(const world *w) {
    if (!check_case("cache/lengths/%s", kind_name(w))) return;
    uint32_t marks[] = {32, w->geometry.kv.residual_tokens, 128, 256,
                        w->geometry.kv.residual_tokens + 128};
    make_tokens(0);
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        for (uint32_t n = marks[i] - 1; n <= marks[i] + 1 && !check_failed(); n++) {
            uint64_t want = replay(w, tokens_a, n, 3);
            stage s = stage_open(w);
            feed(s.seq, tokens_a, n, 1);
            CHECK(feed(s.seq, tokens_a, 3, 1) == want, "%u rows one by one", n);
            CHECK_OK(kivi_seq_rewind(s.seq, n, err));
            CHECK(feed(s.seq, tokens_a, 3, 1) == want, "back to %u", n);
            stage_close(&s);
        }
    check_end();
}

/* ---- float16 rows, misuse ---- */

static void half_rows(void) {
    if (!check_case("cache/float16-rows")) return;
    world w = world_of(2, KIVI_RULE_PAPER, 0);
    make_tokens(0);
    stage a = stage_open(&w), b = stage_open(&w);
    const ki_layout *l = &a.cache->layout;
    enum { N = 90 };
    size_t kv = (size_t)N * l->n_kv_heads * l->head_dim,
           n_out = (size_t)N * l->n_heads * l->head_dim;
    float *k = check_alloc(kv * 8), *q = check_alloc(n_out * 4), *out = check_alloc(n_out * 8);
    uint16_t *half = check_alloc(kv * 4);
    CHECK_OK(kivi_seq_begin(a.seq, N, err));
    CHECK_OK(kivi_seq_begin(b.seq, N, err));
    for (uint32_t layer = 0; layer < l->n_layers; layer++) {
        world_rows(k, k + kv, q, l, tokens_a, layer, 0, N);
        for (size_t i = 0; i < 2 * kv; i++) half[i] = ki_f32_to_f16(k[i]);
        CHECK_OK(kivi_seq_append(a.seq, layer, k, k + kv, KIVI_F32, err));
        CHECK_OK(kivi_seq_append(b.seq, layer, half, half + kv, KIVI_F16, err));
        CHECK_OK(kivi_seq_attend(a.seq, layer, q, out, err));
        CHECK_OK(kivi_seq_attend(b.seq, layer, q, out + n_out, err));
        CHECK(!memcmp(out, out + n_out, n_out * 4), "layer %u: other bytes", layer);
    }
    CHECK_OK(kivi_seq_commit(a.seq, err));
    kivi_seq_abort(b.seq);
    k[3] = 7e4f, k[kv + 5] = -1e38f;
    CHECK_OK(kivi_seq_begin(a.seq, 1, err));
    CHECK_OK(kivi_seq_append(a.seq, 0, k, k + kv, KIVI_F32, err));
    CHECK(atomic_load(&a.cache->n_saturated) == 2, "%u saturated values",
          (unsigned)a.cache->n_saturated);
    kivi_seq_abort(a.seq);
    free(k), free(q), free(out), free(half);
    stage_close(&a), stage_close(&b);
    check_end();
}

static void misuse(void) {
    if (!check_case("cache/misuse")) return;
    world w = world_small();
    make_tokens(0);
    stage s = stage_open(&w);
    kivi_seq *other = NULL, *seq = s.seq;
    kivi_error e = {0};
    float x[128] = {0};
    CHECK(kivi_seq_commit(seq, &e) == KIVI_ARG, "commit without a step");
    CHECK(kivi_seq_append(seq, 0, x, x, KIVI_F32, &e) == KIVI_ARG, "append without a step");
    CHECK(kivi_seq_attend(seq, 0, x, x, &e) == KIVI_ARG, "attend without a step");
    CHECK(kivi_seq_begin(seq, 0, &e) == KIVI_ARG, "no rows");
    CHECK(kivi_seq_begin(seq, 1025, &e) == KIVI_ARG, "more than max_step_rows");
    CHECK(kivi_seq_begin_prompt(seq, 0, &e) == KIVI_ARG, "an empty prompt");
    CHECK(kivi_seq_begin_prompt(seq, UINT32_MAX, &e) != KIVI_OK, "an endless prompt");
    CHECK_OK(kivi_seq_begin_prompt(seq, 50, err));
    CHECK(kivi_seq_begin_prompt(seq, 5, &e) == KIVI_ARG, "a prompt within a prompt");
    CHECK(kivi_seq_begin(seq, 51, &e) == KIVI_ARG, "more rows than the prompt");
    CHECK_OK(kivi_seq_begin(seq, 20, err));
    CHECK(kivi_seq_begin(seq, 1, &e) == KIVI_ARG, "a step within a step");
    CHECK(kivi_seq_append(seq, 2, x, x, KIVI_F32, &e) == KIVI_ARG, "a layer too many");
    CHECK(kivi_seq_fork(&other, seq, &e) == KIVI_ARG && !other, "a fork within a step");
    CHECK(kivi_seq_rewind(seq, 0, &e) == KIVI_ARG, "a step back within a step");
    kivi_seq_abort(seq);
    CHECK(seq->n_tokens == 0 && seq->n_pages == 0, "nothing is left");
    CHECK(kivi_seq_commit(seq, NULL) == KIVI_ARG, "without an error");
    kivi_seq_destroy(&other);
    stage_close(&s);
    kivi_cache *cache = &(kivi_cache){0};
    kivi_cache_geometry good = world_small().geometry, g = good;
    g.n_heads = 3;
    CHECK(kivi_cache_create(&cache, &g, &e) == KIVI_ARG && !cache, "3 heads over 2");
    g = good, g.head_dim = 40;
    CHECK(kivi_cache_create(&cache, &g, &e) != KIVI_OK, "head size 40");
    g = good, g.kv.group = 64;
    CHECK(kivi_cache_create(&cache, &g, &e) == KIVI_ARG && strstr(e.text, "16, 32"),
          "group 64 of 32: %s", e.text);
    g = good, g.n_pages = 0;
    CHECK(kivi_cache_create(&cache, &g, &e) == KIVI_ARG, "no pages");
    g = good, g.n_pages = UINT32_MAX;
    CHECK(kivi_cache_create(&cache, &g, &e) != KIVI_OK && !cache, "2^32 pages");
    g = good, g.kv.rule = KIVI_RULE_SPAN, g.kv.span_tokens = 100;
    CHECK(kivi_cache_create(&cache, &g, &e) == KIVI_ARG, "span 100");
    g = good, g.kv.residual_tokens = 48;
    CHECK(kivi_cache_create(&cache, &g, &e) == KIVI_ARG, "residual 48");
    g = good, g.kv.sink_tokens = 4097;
    CHECK(kivi_cache_create(&cache, &g, &e) == KIVI_ARG, "4097 sinks");
    g = good, g.kv.k_bits = 3;
    CHECK(kivi_cache_create(&cache, &g, &e) == KIVI_ARG, "3 bits");
    kivi_cache_destroy(&cache);
    check_end();
}

/* ---- batches and windows ---- */

/* Rows of several sequences in one call give the bytes each gives alone. */
static void batch(const world *w, uint32_t n_threads) {
    if (!check_case("cache/batch/%u/%s", n_threads, kind_name(w))) return;
    enum { N = 5 };
    static const uint32_t lengths[N] = {1100, 3, 300, 128, 2100}, rows[N] = {1, 9, 1, 40, 1};
    world t = *w;
    t.geometry.n_threads = n_threads;
    t.max_sequences = N;
    make_tokens(0);
    stage s = stage_open(&t);
    const ki_layout *l = &s.cache->layout;
    size_t row = (size_t)l->n_heads * l->head_dim, stride = row + 32;
    kivi_seq *seqs[N] = {0};
    ki_attend_item items[N];
    float *q = check_alloc(64 * stride * 4), *got = check_alloc(N * 64 * stride * 4),
          *alone = check_alloc(64 * stride * 4);
    float *k = check_alloc(64 * row * 8);
    rng r = check_rng();
    for (size_t i = 0; i < 64 * stride; i++) q[i] = rng_normal(&r);
    for (uint32_t i = 0; i < N; i++) {
        CHECK_OK(kivi_seq_create(&seqs[i], s.cache, err));
        prompt(seqs[i], tokens_a, lengths[i], 1024);
        CHECK_OK(kivi_seq_begin(seqs[i], rows[i], err));
        world_rows(k, k + 64 * row, NULL, l, tokens_a, 0, lengths[i], rows[i]);
        CHECK_OK(kivi_seq_append(seqs[i], 0, k, k + 64 * row, KIVI_F32, err));
        items[i] = (ki_attend_item){.seq = seqs[i],
                                    .n_rows = rows[i],
                                    .q = q + i,
                                    .out = got + i * 64 * stride,
                                    .q_stride = stride,
                                    .out_stride = stride};
    }
    for (uint32_t window = 0; window <= 200; window += 100) {
        ki_attend_batch(s.cache, items, N, 0, window);
        for (uint32_t i = 0; i < N; i++) {
            ki_attend_item one = items[i];
            one.out = alone;
            ki_attend_batch(s.cache, &one, 1, 0, window);
            for (uint32_t j = 0; j < rows[i]; j++)
                CHECK(!memcmp(alone + j * stride, items[i].out + j * stride, row * 4),
                      "window %u, item %u, row %u", window, i, j);
        }
    }
    for (uint32_t i = 0; i < N; i++) kivi_seq_abort(seqs[i]), kivi_seq_destroy(&seqs[i]);
    free(q), free(got), free(alone), free(k);
    stage_close(&s);
    check_end();
}

/* A window hides what is older: the weights are those of the visible tokens alone. Values are 1 or
 * -1 by the token, so the output shows the weights; not turned, which would not keep them 2 bits
 * apart. */
static void sliding(const world *w, uint32_t n, uint32_t rows) {
    if (!check_case("cache/window/%u-%u/%s", n, rows, kind_name(w))) return;
    world t = *w;
    t.geometry.kv.plus &= ~(uint32_t)KIVI_PLUS_TURN;
    stage s = stage_open(&t);
    make_tokens(0);
    const ki_layout *l = &s.cache->layout;
    size_t row = (size_t)l->n_heads * l->head_dim, kv = (size_t)l->n_kv_heads * l->head_dim;
    float *k = check_alloc((n + rows) * kv * 4), *v = check_alloc((n + rows) * kv * 4),
          *q = check_alloc(rows * row * 4);
    float *out = check_alloc(rows * row * 4);
    for (uint32_t p = 0; p < n + rows; p++) /* all keys alike: equal weights */
        for (size_t c = 0; c < kv; c++) k[p * kv + c] = 0.25f, v[p * kv + c] = p % 2 ? 1.0f : -1.0f;
    for (size_t i = 0; i < rows * row; i++) q[i] = 1;
    for (uint32_t p = 0; p < n; p += 100) {
        uint32_t m = n - p < 100 ? n - p : 100;
        CHECK_OK(kivi_seq_begin(s.seq, m, err));
        for (uint32_t layer = 0; layer < 2; layer++)
            CHECK_OK(kivi_seq_append(s.seq, layer, k + p * kv, v + p * kv, KIVI_F32, err));
        CHECK_OK(kivi_seq_commit(s.seq, err));
    }
    CHECK_OK(kivi_seq_begin(s.seq, rows, err));
    CHECK_OK(kivi_seq_append(s.seq, 0, k + n * kv, v + n * kv, KIVI_F32, err));
    static const uint32_t windows[] = {1, 2, 15, 16, 17, 33, 100, 129, 255, 5000};
    for (size_t i = 0; i < sizeof windows / sizeof *windows; i++) {
        ki_attend_item item = {
            .seq = s.seq, .n_rows = rows, .q = q, .out = out, .q_stride = row, .out_stride = row};
        ki_attend_batch(s.cache, &item, 1, 0, windows[i]);
        for (uint32_t j = 0; j < rows; j++) {
            uint32_t p = n + j, from = p + 1 > windows[i] ? p + 1 - windows[i] : 0, odd = 0;
            for (uint32_t i_p = from; i_p <= p; i_p++) odd += i_p % 2;
            double want = 2.0 * odd / (p + 1 - from) - 1;
            for (size_t c = 0; c < row; c++)
                CHECK(fabs((double)out[j * row + c] - want) < 1e-3,
                      "window %u, position %u: %g, not %g", windows[i], p, (double)out[j * row + c],
                      want);
        }
    }
    kivi_seq_abort(s.seq);
    free(k), free(v), free(q), free(out);
    stage_close(&s);
    check_end();
}

void check_cache(void) {
    if (!check_wants("cache/")) return;
    static const struct {
        kivi_rule rule;
        uint32_t span;
    } rules[] = {{KIVI_RULE_PAPER, 0}, {KIVI_RULE_STREAM, 0}, {KIVI_RULE_SPAN, 128}};
    sinks_in_pages();
    half_rows();
    misuse();
    for (uint32_t kind = 0; kind < N_KINDS; kind++) {
        for (int r = 0; r < 3; r++) {
            world w = world_of(kind, rules[r].rule, rules[r].span);
            chunks(&w);
        }
        world stream = world_of(kind, KIVI_RULE_STREAM, 0);
        world w = world_of(kind, rules[kind % 3].rule, rules[kind % 3].span);
        stream_rows(&stream);
        threads(&w);
        for (int i = 0; i < KI_ISA_COUNT; i++) isas(&w, (ki_isa)i);
        forks(&w);
        rewinds(&w);
        full(&w);
        full_then_fork(&w);
        aborts(&w);
        abort_rewind(&w);
        numeric(&w);
        boundaries(&w);
        for (uint32_t n = 1; n <= 3; n += 2) batch(&w, n);
        sliding(&w, 300, 1);
        sliding(&w, 300, 70);
    }
}
