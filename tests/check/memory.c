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
    sweep(KIVI_RULE_PAPER);
    sweep(KIVI_RULE_STREAM);
}
