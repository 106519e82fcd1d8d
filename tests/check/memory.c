/* Bytes by tag are counts, not estimates; and every allocation may fail. */
#include "world.h"

#include <unistd.h>

static void feed(kivi_seq *seq, const uint32_t *tokens, uint32_t n) {
    CHECK_OK(world_step(seq, tokens, n, NULL, err));
}

static void plan(const kivi_kv_options *kv) {
    if (!check_case("memory/plan/b%u.%u-s%u-%s", kv->k_bits, kv->v_bits, kv->sink_tokens,
                    world_rule_name(kv)))
        return;
    ki_mem mem;
    ki_mem_init(&mem);
    world w = world_small();
    w.geometry.kv = *kv;
    w.mem = &mem;
    static uint32_t tokens[2000];
    kivi_cache *cache = NULL;
    kivi_seq *seqs[3] = {0};
    CHECK_OK(world_create(&cache, &w, err));
    for (uint64_t n = 0; cache && n <= 3; n++) {
        kivi_memory want, got = kivi_cache_memory(cache);
        CHECK(ki_layout_plan(&want, &cache->layout, w.geometry.n_pages, n), "plan");
        CHECK(got.kv_codes == want.kv_codes && got.kv_scales == want.kv_scales &&
                  got.kv_residual == want.kv_residual,
              "%u sequences: codes %llu scales %llu window %llu, planned %llu %llu %llu",
              (unsigned)n, (unsigned long long)got.kv_codes, (unsigned long long)got.kv_scales,
              (unsigned long long)got.kv_residual, (unsigned long long)want.kv_codes,
              (unsigned long long)want.kv_scales, (unsigned long long)want.kv_residual);
        if (n == 3) break;
        if (n == 2) CHECK_OK(kivi_seq_fork(&seqs[2], seqs[0], err));
        else CHECK_OK(kivi_seq_create(&seqs[n], cache, err));
        CHECK_OK(kivi_seq_begin_prompt(
            seqs[n], 300, err)); /* a prompt borrows a larger window and gives it back */
        for (int i = 0; i < 3; i++) feed(seqs[n], tokens, 100);
        feed(seqs[n], tokens, 20);
        feed(seqs[n], tokens, 1);
    }
    /* bits of an element by the page's own bytes */
    if (cache) {
        const ki_layout *l = &cache->layout;
        double bits = (double)l->page_bytes * 8 / (2.0 * KI_PAGE_TOKENS * l->head_dim);
        CHECK(fabs(bits - kivi_kv_bits(&l->kv, l->head_dim)) < 1e-12, "%g bits an element", bits);
        CHECK(l->page_bytes % 64 == 0, "page of %zu bytes", l->page_bytes);
        uint32_t n_free = 0, n_all = 0;
        kivi_cache_pages(cache, &n_free, &n_all);
        CHECK(n_all == 64 && n_free == cache->pool.n_free, "page counts");
    }
    for (int i = 0; i < 3; i++) kivi_seq_destroy(&seqs[i]);
    if (cache) CHECK(kivi_cache_memory(cache).kv_residual == 0, "windows left");
    kivi_cache_destroy(&cache);
    kivi_memory left = ki_mem_report(&mem);
    CHECK(ki_memory_sum(&left) == 0 && atomic_load(&mem.n_blocks) == 0,
          "%llu bytes in %u blocks left", (unsigned long long)ki_memory_sum(&left),
          (unsigned)mem.n_blocks);
    check_end();
}

/* ---- a prompt's larger ring on a device ---- */

typedef struct counted_device { /* host memory that plays a device's, and the most rows it held */
    ki_device device;
    ki_mem mem;
    uint64_t most_bytes;
} counted_device;

static kivi_status take(void **out, void *context, ki_tag tag, size_t n_bytes, kivi_error *err) {
    counted_device *d = context;
    KI_TRY(ki_alloc(out, &d->mem, tag, n_bytes, err));
    d->most_bytes = KI_MAX(d->most_bytes, ki_mem_report(&d->mem).kv_residual);
    return KIVI_OK;
}
static void give(void *context, void *block) { ki_free(&((counted_device *)context)->mem, block); }
static void zero(void *context, void *to, size_t n_bytes) {
    (void)context;
    memset(to, 0, n_bytes);
}
static void copy(void *context, void *to, const void *from, size_t n_bytes) {
    (void)context;
    memcpy(to, from, n_bytes);
}
static void copy_ring(void *context, const ki_ring_copy *ring) {
    (void)context, (void)ring; /* rows are nobody's here */
}

static void adapt(ki_layout *l) {
    l->block_tokens = 32;
    l->k_ring_blocks = (l->kv.residual_tokens + l->kv.rewind_tokens + 31 + 31) / 32;
    l->v_ring_blocks = (l->kv.residual_tokens + 1 + l->kv.rewind_tokens + 31 + 31) / 32;
    l->sink_blocks = (l->kv.sink_tokens + 31) / 32;
}

/* Prompts, generated tokens, steps of any size: whatever comes, the device never holds more rows
 * than windows and the ring that is planned, and with whole steps it holds all of that. */
static void prompt_ring(kivi_rule rule, uint32_t back) {
    enum { CTX = 3000, ROWS = 256 };
    if (!check_case("memory/prompt/rule-%d-back-%u", (int)rule, back)) return;
    counted_device d = {.most_bytes = 0};
    ki_mem mem;
    rng r = check_rng();
    ki_mem_init(&mem), ki_mem_init(&d.mem);
    d.device = (ki_device){&d, &d.mem, take, give, zero, copy, copy_ring, NULL, NULL};
    ki_cache_options o = {.geometry = world_small().geometry,
                          .mem = &mem,
                          .device = &d.device,
                          .adapt = adapt,
                          .max_sequences = 1,
                          .max_tokens = CTX};
    o.geometry.n_threads = 1, o.geometry.max_step_rows = ROWS, o.geometry.n_pages = CTX / 128 + 2;
    o.geometry.kv = (kivi_kv_options){.residual_tokens = 64, .rewind_tokens = back, .rule = rule};
    if (rule == KIVI_RULE_SPAN) o.geometry.kv.span_tokens = 384;
    kivi_cache *cache = NULL;
    CHECK_OK(ki_cache_create(&cache, &o, err));
    uint64_t most = 0, planned = 0;
    for (int round = 0; cache && round < 200 && !check_failed(); round++) {
        kivi_seq *seq = NULL;
        kivi_memory window;
        CHECK_OK(kivi_seq_create(&seq, cache, err));
        CHECK(ki_layout_plan(&window, &cache->layout, 1, 1), "plan");
        planned = window.kv_residual + ki_layout_prompt_bytes(&cache->layout, ROWS, CTX);
        bool whole = round % 2;
        for (uint32_t n = 0; n < CTX && !check_failed();) {
            uint32_t left = whole && n == 0 ? CTX : 1 + rng_below(&r, CTX - n);
            CHECK_OK(kivi_seq_begin_prompt(seq, left, err));
            while (left && !check_failed()) {
                uint32_t rows = whole ? ROWS : 1 + rng_below(&r, ROWS);
                rows = KI_MIN(left, rows);
                CHECK_OK(kivi_seq_begin(seq, rows, err));
                CHECK_OK(kivi_seq_commit(seq, err));
                left -= rows, n += rows;
            }
            for (uint32_t k = rng_below(&r, 200); k && n < CTX; k--, n++) {
                CHECK_OK(kivi_seq_begin(seq, 1, err));
                CHECK_OK(kivi_seq_commit(seq, err));
            }
        }
        kivi_seq_destroy(&seq);
        most = KI_MAX(most, d.most_bytes);
    }
    CHECK(most == planned, "%llu bytes of 16-bit rows, planned %llu", (unsigned long long)most,
          (unsigned long long)planned);
    kivi_cache_destroy(&cache);
    CHECK(atomic_load(&d.mem.n_blocks) == 0, "blocks left");
    check_end();
}

/* ---- pages that nobody has ---- */

static bool page_is(const ki_pool *pool, uint32_t id, uint8_t byte) {
    const uint8_t *page = pool->data + id * pool->id_bytes;
    for (size_t i = 0; i < pool->id_bytes; i++)
        if (page[i] != byte) return false;
    return true;
}

/* The cache with two sequences of one history, two pages long; NULL: it failed. */
static kivi_cache *two_of_one(kivi_seq **a, kivi_seq **b, ki_mem *mem) {
    static uint32_t tokens[2 * KI_PAGE_TOKENS];
    world w = world_small();
    kivi_cache *cache = NULL;
    ki_mem_init(mem);
    w.mem = mem, w.max_sequences = 2, w.geometry.kv.rule = KIVI_RULE_STREAM;
    for (uint32_t i = 0; i < 2 * KI_PAGE_TOKENS; i++) tokens[i] = i + 1;
    CHECK_OK(world_create(&cache, &w, err));
    if (!cache) return NULL;
    CHECK_OK(kivi_seq_create(a, cache, err));
    for (int i = 0; i < 4 && *a; i++) feed(*a, tokens, KI_PAGE_TOKENS / 2);
    if (*a) CHECK_OK(kivi_seq_fork(b, *a, err));
    return cache;
}

/* Builds with KI_DEBUG (sanitizers) fill a page that is given back, so that whoever still reads it
 * shows: its scales are NaN. One that others have stays as it is. */
static void freed_pages(void) {
    if (!check_case("memory/poisoned")) return;
#ifndef KI_DEBUG
    check_skip("pages are poisoned in builds with KI_DEBUG, and this is none");
#else
    ki_mem mem;
    kivi_seq *a = NULL, *b = NULL;
    kivi_cache *cache = two_of_one(&a, &b, &mem);
    if (cache && a && b) {
        ki_pool *pool = &cache->pool;
        uint32_t ids[2] = {a->pages[0], a->pages[1]};
        CHECK(pool->counts[ids[0]] == 2, "%u have the first page", pool->counts[ids[0]]);
        uint64_t before = world_hash(pool->data + ids[0] * pool->id_bytes, pool->id_bytes);
        kivi_seq_destroy(&a);
        CHECK(!page_is(pool, ids[0], 0xff), "a page is poisoned that a sequence has");
        CHECK(before == world_hash(pool->data + ids[0] * pool->id_bytes, pool->id_bytes),
              "a page changed that a sequence has");
        kivi_seq_destroy(&b);
        for (int i = 0; i < 2; i++)
            CHECK(pool->counts[ids[i]] == 0 && page_is(pool, ids[i], 0xff),
                  "page %u is given back and not poisoned", ids[i]);
        float scale = 0;
        memcpy(&scale, pool->data + ids[0] * pool->id_bytes, sizeof scale);
        CHECK(isnan(scale), "the poison is a number: %g", (double)scale);
    }
    kivi_seq_destroy(&a), kivi_seq_destroy(&b);
    kivi_cache_destroy(&cache);
    check_end();
#endif
}

/* A page that was somebody's comes without his bytes. */
static void taken_pages(void) {
    if (!check_case("memory/taken-again")) return;
    ki_mem mem;
    kivi_seq *a = NULL, *b = NULL;
    kivi_cache *cache = two_of_one(&a, &b, &mem);
    if (cache && a && b) {
        ki_pool *pool = &cache->pool;
        uint32_t id, used = a->pages[0];
        bool found = false;
        CHECK(!page_is(pool, used, 0), "a page of 128 tokens is empty");
        kivi_seq_destroy(&a), kivi_seq_destroy(&b);
        for (uint32_t i = 0; i < pool->n_pages; i++) {
            CHECK(ki_pool_take(pool, &id) && page_is(pool, id, 0), "page %u is not empty", id);
            found |= id == used;
        }
        CHECK(found, "page %u was not taken again", used);
        for (uint32_t i = 0; i < pool->n_pages; i++) ki_pool_unpin(pool, i);
    }
    kivi_seq_destroy(&a), kivi_seq_destroy(&b);
    kivi_cache_destroy(&cache);
    check_end();
}

/* ---- the failing allocation ---- */

static kivi_status life(kivi_cache **cache, kivi_seq **a, kivi_seq **b, const world *w,
                        const char *path) {
    static uint32_t tokens[400];
    static float out[40 * 2 * 4 * 32];
    kivi_error e = {0}, *err = &e;
    KI_TRY(world_create(cache, w, err));
    KI_TRY(kivi_seq_create(a, *cache, err));
    KI_TRY(kivi_seq_begin_prompt(*a, 150, err));
    KI_TRY(world_step(*a, tokens, 130, NULL, err));
    KI_TRY(world_step(*a, tokens, 20, out, err));
    for (int i = 0; i < 3; i++) KI_TRY(world_step(*a, tokens, 1, out, err));
    KI_TRY(world_step(*a, tokens, 40, out, err));
    KI_TRY(kivi_seq_fork(b, *a, err));
    KI_TRY(world_step(*b, tokens, 1, out, err));
    KI_TRY(kivi_seq_rewind(*a, 190, err));
    KI_TRY(kivi_seq_save(*a, path, err));
    kivi_seq_destroy(b);
    KI_TRY(kivi_seq_load(b, *cache, path, err));
    static uint16_t half[2 * 64];
    KI_TRY(kivi_seq_begin(*b, 1, err));
    for (uint32_t layer = 0; layer < 2; layer++)
        KI_TRY(kivi_seq_append(*b, layer, half, half, KIVI_F16, err));
    return kivi_seq_commit(*b, err);
}

static void sweep(kivi_rule rule) {
    if (!check_case("memory/failing/%s", rule == KIVI_RULE_PAPER ? "paper" : "stream")) return;
    char path[64];
    snprintf(path, sizeof path, "check-memory-%ld.seq", (long)getpid());
    int64_t n = 1;
    for (bool done = false; !done && n < 1000 && !check_failed(); n++) {
        ki_mem mem;
        ki_mem_init(&mem);
        world w = world_small();
        w.mem = &mem;
        w.geometry.n_threads = 2;
        w.geometry.kv.rule = rule;
        kivi_cache *cache = NULL;
        kivi_seq *a = NULL, *b = NULL;
        atomic_store(&mem.fail_countdown, n);
        kivi_status status = life(&cache, &a, &b, &w, path);
        CHECK(status == KIVI_OK || status == KIVI_NOMEM, "allocation %d: %s", (int)n,
              kivi_status_name(status));
        atomic_store(&mem.fail_countdown, -1);
        if (a && status == KIVI_NOMEM) { /* still usable */
            static uint32_t tokens[500];
            kivi_seq_abort(a);
            CHECK_OK(world_step(a, tokens, 1, NULL, err));
            CHECK(ki_pool_check(&cache->pool), "pool");
        }
        done = status == KIVI_OK;
        kivi_seq_destroy(&a);
        kivi_seq_destroy(&b);
        kivi_cache_destroy(&cache);
        kivi_memory left = ki_mem_report(&mem);
        CHECK(atomic_load(&mem.n_blocks) == 0 && ki_memory_sum(&left) == 0,
              "allocation %d failing: %u blocks left", (int)n, (unsigned)mem.n_blocks);
    }
    remove(path);
    check_note("%d allocations", (int)n - 2);
    check_end();
}

void check_memory(void) {
    static const uint32_t kinds[][3] = {{2, 2, 0},   {2, 2, 32}, {4, 8, 64},
                                        {16, 2, 32}, {2, 16, 0}, {16, 16, 0}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        kivi_kv_options kv = {
            .k_bits = kinds[i][0], .v_bits = kinds[i][1], .sink_tokens = kinds[i][2]};
        kv.rewind_tokens = 16, kv.residual_tokens = 64;
        kv.rule = (kivi_rule)(i % 3), kv.span_tokens = i % 3 == 2 ? 128 : 0;
        plan(&kv);
    }
    for (int rule = 0; rule < 3; rule++)
        for (uint32_t back = 0; back <= 40; back += 40) prompt_ring((kivi_rule)rule, back);
    freed_pages();
    taken_pages();
    sweep(KIVI_RULE_PAPER);
    sweep(KIVI_RULE_STREAM);
}
