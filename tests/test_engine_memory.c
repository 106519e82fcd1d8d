/* Memory is counted, not estimated: tags add up to what was handed out, a plan is what the engine
 * makes, a step allocates nothing, every allocation may fail, and 2 bits are as small as said. */
#include "engine_helpers.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define WATCHES_ALLOCATOR 0
#else
#define WATCHES_ALLOCATOR 1
#endif

/* ---- a second count, taken below the first: what the library really asks the system for ---- */

#if WATCHES_ALLOCATOR
static _Atomic int64_t handed_out, handed_blocks;
enum { MAX_WATCHED = 1 << 14 };
static struct {
    void *p;
    size_t n_bytes;
} watched[MAX_WATCHED]; /* by hash of the address, open addressing; one thread allocates */

static size_t slot_of(const void *p) {
    size_t i = ((uintptr_t)p >> 6) * 0x9e3779b9u % MAX_WATCHED;
    while (watched[i].p && watched[i].p != p) i = (i + 1) % MAX_WATCHED;
    return i;
}
static void watch(void *p, size_t n_bytes) {
    size_t i = ((uintptr_t)p >> 6) * 0x9e3779b9u % MAX_WATCHED;
    while (watched[i].p && watched[i].n_bytes) i = (i + 1) % MAX_WATCHED;
    watched[i].p = p;
    watched[i].n_bytes = n_bytes;
    handed_out += (int64_t)n_bytes;
    handed_blocks++;
}
static void unwatch(void *p) {
    size_t i = slot_of(p);
    if (!p || !watched[i].p || !watched[i].n_bytes) return;
    handed_out -= (int64_t)watched[i].n_bytes;
    handed_blocks--;
    watched[i].n_bytes = 0; /* the place stays taken for those behind it */
}

/* These stand before the C library's in a statically linked test. */
static void *system_function(const char *name) {
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) abort();
    return function;
}
void *aligned_alloc(size_t alignment, size_t n_bytes) {
    static void *(*system_alloc)(size_t, size_t);
    if (!system_alloc) *(void **)&system_alloc = system_function("aligned_alloc");
    void *p = system_alloc(alignment, n_bytes);
    if (p) watch(p, n_bytes);
    return p;
}
void free(void *p) {
    static void (*system_free)(void *);
    if (!system_free) *(void **)&system_free = system_function("free");
    unwatch(p);
    system_free(p);
}
void *mmap(void *at, size_t n_bytes, int protection, int flags, int fd, off_t offset) {
    void *p = (void *)syscall(SYS_mmap, at, n_bytes, protection, flags, fd, offset);
    if (p != MAP_FAILED && fd < 0) watch(p, n_bytes);
    return p;
}
int munmap(void *p, size_t n_bytes) {
    unwatch(p);
    return (int)syscall(SYS_munmap, p, n_bytes);
}
#endif

static uint64_t kv_bytes(const kivi_memory *m) {
    return m->kv_codes + m->kv_scales + m->kv_residual;
}
static kivi_engine_options tiny(int kind) {
    static const kivi_kv_options kv[] = {
        {.residual_tokens = 32, .rewind_tokens = 16},
        {.k_bits = 4, .residual_tokens = 64, .sink_tokens = 32, .rule = KIVI_RULE_STREAM},
        {.k_bits = 16, .residual_tokens = 32, .rule = KIVI_RULE_SPAN, .span_tokens = 128},
        {.k_bits = 16, .v_bits = 16},
        {.k_bits = 8, .v_bits = 8, .group = 16, .residual_tokens = 48, .rewind_tokens = 100},
    };
    kivi_engine_options o = cpu_defaults();
    o.model_path = golden(kind % 2 ? "llama-gqa" : "llama");
    o.kv = kv[kind % 5];
    o.n_threads = 2;
    o.ctx_tokens = 384;
    return o;
}
enum { N_KINDS = 5 };

/* ---- tags ---- */

static void check_sums(const kivi_engine *engine, const char *when) {
#if WATCHES_ALLOCATOR
    kivi_memory m = kivi_engine_memory(engine);
    uint64_t blocks = n_blocks(engine), sum = ki_memory_sum(&m);
    if ((uint64_t)handed_blocks != blocks)
        fail_msg("%s: %lld blocks handed out, %llu counted", when, (long long)handed_blocks,
                 (unsigned long long)blocks);
    /* each block has a header, a slack and less than 64 bytes of rounding */
    if ((uint64_t)handed_out < sum + 128 * blocks || (uint64_t)handed_out >= sum + 192 * blocks)
        fail_msg("%s: %lld bytes handed out in %llu blocks, %llu counted", when,
                 (long long)handed_out, (unsigned long long)blocks, (unsigned long long)sum);
#else
    kivi_memory m = kivi_engine_memory(engine);
    if (ki_memory_sum(&m) == 0) fail_msg("%s: nothing is counted", when);
#endif
}

static void test_tags_add_up(void **state) {
    (void)state;
    for (int kind = 0; kind < N_KINDS; kind++) {
        kivi_engine_options o = tiny(kind);
        o.max_sessions = 2;
        kivi_engine *engine = open_engine(&o);
        check_sums(engine, "an engine");
        kivi_session *s = open_session(engine), *fork = NULL;
        check_sums(engine, "a session");
        MUST(kivi_session_prompt(s, golden_tokens(), 100, &err));
        check_sums(engine, "after a prompt");
        MUST(kivi_session_begin_prompt(s, 40, &err));
        check_sums(engine, "within a prompt");
        kivi_step_item item = {.session = s, .tokens = golden_tokens(), .n_tokens = 40};
        MUST(kivi_engine_step(engine, &item, 1, &err));
        MUST(kivi_session_fork(&fork, s, &err));
        check_sums(engine, "a fork");
        kivi_session_destroy(&fork), kivi_session_destroy(&s);
        check_sums(engine, "without sessions");
        close_engine(engine);
#if WATCHES_ALLOCATOR
        assert_int_equal(handed_out, 0);
        assert_int_equal(handed_blocks, 0);
#endif
    }
    if (!WATCHES_ALLOCATOR) skip(); /* a sanitizer has the allocator */
}

/* ---- plans ---- */

static void test_plan(void **state) {
    (void)state;
    for (int kind = 0; kind < N_KINDS; kind++)
        for (uint32_t ctx = 1; ctx < 2000; ctx = ctx * 3 + 100) {
            kivi_engine_options o = tiny(kind);
            o.ctx_tokens = ctx;
            kivi_engine *engine = open_engine(&o);
            kivi_session *s = open_session(engine);
            kivi_memory plan, held = kivi_engine_memory(engine);
            double bits = 0;
            MUST(kivi_engine_plan(&plan, &bits, engine, &o.kv, ctx, &err));
            assert_int_equal(plan.kv_codes, held.kv_codes);
            assert_int_equal(plan.kv_scales, held.kv_scales);
            assert_int_equal(plan.kv_residual, held.kv_residual);
            assert_int_equal(plan.weights, held.weights);
            assert_true(bits == kivi_engine_bits(engine));
            /* codes and scales are bits an element, of whole pages */
            uint64_t pages = (ctx + 127) / 128, heads = kind % 2 ? 3 * 64 : 3 * 4 * 32;
            double expected = bits / 8 * 2 * (double)(pages * 128 * heads);
            assert_int_equal(plan.kv_codes + plan.kv_scales, (uint64_t)(expected + 0.5));
            kivi_session_destroy(&s);
            close_engine(engine);
        }
    kivi_engine_options o = tiny(0);
    kivi_engine *engine = open_engine(&o);
    kivi_memory plan; /* the largest context there can be is no problem for a plan */
    MUST(kivi_engine_plan(&plan, NULL, engine, &o.kv, UINT32_MAX, &err));
    assert_true(plan.kv_codes > (uint64_t)UINT32_MAX * 100);
    close_engine(engine);
}

/* ---- a step allocates nothing ---- */

static void test_steps_allocate_nothing(void **state) {
    (void)state;
    for (int kind = 0; kind < N_KINDS; kind++) {
        kivi_engine_options o = tiny(kind);
        o.max_sessions = 2;
        kivi_engine *engine = open_engine(&o);
        kivi_session *a = open_session(engine), *b = open_session(engine);
        MUST(kivi_session_prompt(a, golden_tokens(), 120, &err));
        kivi_memory before = kivi_engine_memory(engine);
        uint64_t blocks = n_blocks(engine);
        atomic_store(&engine->mem.fail_countdown, 1); /* the next allocation would fail */
        for (int32_t i = 0; i < 100; i++) {
            int32_t ids[2] = {i, 2 * i};
            kivi_step_item items[2] = {{.session = a, .tokens = ids, .n_tokens = 1},
                                       {.session = b, .tokens = ids + 1, .n_tokens = 1}};
            MUST(kivi_engine_step(engine, items, i % 2 ? 2 : 1, &err));
            assert_int_equal(items[0].status, KIVI_OK);
            if (i % 2) assert_int_equal(items[1].status, KIVI_OK);
        }
        kivi_memory after = kivi_engine_memory(engine);
        assert_memory_equal(&before, &after, sizeof before);
        assert_int_equal(n_blocks(engine), blocks);
        kivi_session_destroy(&a), kivi_session_destroy(&b);
        close_engine(engine);
    }
}

/* ---- the n-th allocation fails ---- */

/* A life, up to the first failure. What fails fails with NOMEM and leaves the session good. */
typedef struct life {
    kivi_engine *engine;
    kivi_session *session, *fork, *loaded;
    kivi_sampler *sampler;
    char path[256];
} life;

static kivi_status live(life *l) {
    const int32_t *ids = golden_tokens();
    kivi_sampler_options so = kivi_sampler_defaults();
    int32_t id;
    KI_TRY(kivi_session_create(&l->session, l->engine, &err));
    KI_TRY(kivi_session_prompt(l->session, ids, 150, &err));
    KI_TRY(kivi_session_decode(l->session, 7, &err));
    KI_TRY(kivi_sampler_create(&l->sampler, l->engine, &so, &err));
    KI_TRY(kivi_sampler_next(&id, l->sampler, l->session, &err));
    KI_TRY(kivi_session_prompt(l->session, ids, 30, &err));
    KI_TRY(kivi_session_fork(&l->fork, l->session, &err));
    KI_TRY(kivi_session_rewind(l->session, 178, &err));
    KI_TRY(kivi_session_rewind(l->session, 151, &err));
    KI_TRY(kivi_session_decode(l->session, 8, &err));
    KI_TRY(kivi_session_rewind(l->session, 140, &err));
    KI_TRY(kivi_session_save(l->session, l->path, &err));
    KI_TRY(kivi_session_load(&l->loaded, l->engine, l->path, &err));
    return kivi_session_decode(l->loaded, 9, &err);
}

/* With memory again, the session goes on from wherever it is, and what it did can be replayed. */
static void goes_on(kivi_session *session) {
    if (!session) return;
    uint32_t length = kivi_session_length(session);
    trace t = trace_new(session->engine, length + 12);
    int32_t ids[N_TOKENS + 20];
    memcpy(ids, session->history, length * sizeof *ids);
    memcpy(ids + length, golden_tokens(), 12 * sizeof *ids);
    script s = {.tokens = ids, .turns = {{0, length}, {10, 2}}};
    go_on(session, &s, 0, 0, &t);
    MUST(kivi_session_rewind(session, 0, &err));
    const ki_run *runs = NULL;
    assert_int_equal(ki_session_runs(session, &runs), 0);
    trace_free(&t);
}

static void end(life *l) {
    kivi_session_destroy(&l->session);
    kivi_session_destroy(&l->fork);
    kivi_session_destroy(&l->loaded);
    kivi_sampler_destroy(&l->sampler);
}

static void sweep(int kind) {
    life l = {0};
    uint64_t n = 1, n_create = 0, step = is_slow() ? 7 : 1;
    snprintf(l.path, sizeof l.path, "%s/sweep", temp_folder);
    for (kivi_status status = KIVI_NOMEM; status != KIVI_OK; n += step) {
        kivi_engine_options o = tiny(kind);
        o.max_sessions = 3;
        o.fail_after = n;
        status = kivi_engine_create(&l.engine, &o, &err);
        if (status != KIVI_OK) {
            assert_null(l.engine);
            fails(status, KIVI_NOMEM, "memory", __FILE__, __LINE__);
            n_create = n;
            continue;
        }
        uint64_t blocks = n_blocks(l.engine);
        status = live(&l);
        if (status != KIVI_OK) fails(status, KIVI_NOMEM, "memory", __FILE__, __LINE__);
        atomic_store(&l.engine->mem.fail_countdown, -1);
        goes_on(l.session);
        goes_on(l.fork);
        end(&l);
        assert_int_equal(n_blocks(l.engine), blocks);
        close_engine(l.engine);
        l.engine = NULL;
        assert_true(n < 5000);
    }
    assert_true(n_create > 50 && n > n_create + 10);
    print_message("kind %d: %llu allocations to the engine, %llu in all\n", kind,
                  (unsigned long long)n_create, (unsigned long long)n - 1);
}
static void test_every_allocation_fails(void **state) {
    (void)state;
    for (int kind = 0; kind < N_KINDS; kind++)
        if (!is_slow() || kind % 2 == 0) sweep(kind);
#if WATCHES_ALLOCATOR
    assert_int_equal(handed_out, 0);
#endif
}

/* ---- 4,096 tokens of SmolLM2 ---- */

typedef struct measured {
    kivi_memory held, plan;
    uint64_t rss_before, rss_made, rss_filled, rss_peak;
    int failed;
} measured;

static uint64_t status_bytes(const char *name) {
    char line[256];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, name, strlen(name))) kib = strtoull(line + strlen(name), NULL, 10);
    if (f) fclose(f);
    return kib * 1024;
}

/* Keys and values go in as the forward pass puts them in; the products that would make them are
 * left out, they take most of a minute and no memory of the cache. */
static kivi_status fill(kivi_engine *engine, kivi_session *session, uint32_t n_tokens) {
    const kivi_engine_info *info = kivi_engine_info_get(engine);
    size_t n = (size_t)info->step_rows * info->n_kv_heads * info->head_dim;
    float *rows = malloc(n * sizeof *rows);
    kivi_status status = rows ? KIVI_OK : KIVI_NOMEM;
    uint32_t x = 7;
    for (size_t i = 0; rows && i < n; i++)
        rows[i] = (float)((x = x * 1103515245 + 12345) >> 8) * 0x1p-23f - 1;
    if (status == KIVI_OK) status = kivi_seq_begin_prompt(session->seq, n_tokens, &err);
    for (uint32_t at = 0; status == KIVI_OK && at < n_tokens; at += info->step_rows) {
        status = kivi_seq_begin(session->seq, KI_MIN(info->step_rows, n_tokens - at), &err);
        for (uint32_t i = 0; status == KIVI_OK && i < info->n_layers; i++)
            status = kivi_seq_append(session->seq, i, rows, rows, KIVI_F32, &err);
        if (status == KIVI_OK) status = kivi_seq_commit(session->seq, &err);
    }
    free(rows);
    return status;
}

enum { CTX = 4096 };
static void measure(measured *m, const kivi_kv_options *kv) {
    kivi_engine_options o = cpu_defaults();
    kivi_engine *engine = NULL;
    kivi_session *s = NULL;
    o.model_path = real_model();
    o.kv = *kv;
    o.n_threads = 2;
    o.ctx_tokens = CTX;
    m->rss_before = status_bytes("VmRSS:");
    m->failed = kivi_engine_create(&engine, &o, &err) || kivi_session_create(&s, engine, &err);
    m->rss_made = status_bytes("VmRSS:");
    if (!m->failed) m->failed = fill(engine, s, CTX - 1) || kivi_session_decode(s, 5, &err);
    if (!m->failed)
        m->failed = kivi_engine_plan(&m->plan, NULL, engine, kv, CTX, &err) ||
                    kivi_session_length(s) != CTX;
    m->rss_filled = status_bytes("VmRSS:");
    m->rss_peak = status_bytes("VmHWM:");
    if (!m->failed) m->held = kivi_engine_memory(engine);
    kivi_session_destroy(&s);
    kivi_engine_destroy(&engine);
}

/* In a process of its own: what another engine left in the heap does not count. */
static measured measure_apart(const kivi_kv_options *kv) {
    measured *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(shared != MAP_FAILED);
    shared->failed = 1;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        measure(shared, kv);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    measured m = *shared;
    munmap(shared, sizeof *shared);
    assert_int_equal(status, 0);
    assert_int_equal(m.failed, 0);
    return m;
}

static void check_close(const char *what, double got, double expected, double slack) {
    if (got < expected - slack || got > expected + slack)
        fail_msg("%s: %.0f, expected %.0f within %.0f", what, got, expected, slack);
}

static void test_smollm2_memory(void **state) {
    (void)state;
    if (!real_model()) {
        print_message("KIVI_TEST_MODEL is not set\n");
        skip();
    }
    if (is_slow()) skip(); /* a sanitizer's memory is not the program's */
    const kivi_kv_options kivi2 = {.residual_tokens = 128,
                                   .rule = KIVI_RULE_STREAM,
                                   .rewind_tokens = 16},
                          f16 = {.k_bits = 16, .v_bits = 16};
    measured two = measure_apart(&kivi2), half = measure_apart(&f16);
    double kv2 = (double)kv_bytes(&two.held), kv16 = (double)kv_bytes(&half.held);
    print_message("cache at %d tokens: f16 %.2f MiB, kivi2 %.2f MiB, %.2f times smaller\n", CTX,
                  kv16 / 1048576, kv2 / 1048576, kv16 / kv2);
    print_message("RSS grew by %.2f and %.2f MiB while filling, peaks %.2f and %.2f MiB\n",
                  (double)(half.rss_filled - half.rss_made) / 1048576,
                  (double)(two.rss_filled - two.rss_made) / 1048576,
                  (double)(half.rss_peak - half.rss_before) / 1048576,
                  (double)(two.rss_peak - two.rss_before) / 1048576);
    assert_true(kv16 >= 4.3 * kv2);
    assert_int_equal(kv_bytes(&two.plan), kv_bytes(&two.held));
    assert_int_equal(kv_bytes(&half.plan), kv_bytes(&half.held));
    /* by hand: 30 layers, 3 KV heads of 64; 3 bits an element, and a window of R + 1 and 16 to step
     * back in blocks of 16 */
    double elements = 2.0 * 30 * 3 * 64;
    check_close("kivi2", kv2, elements * (CTX * 3.0 / 8 + (128 + 1 + 16) * 2.0), 0.01 * kv2);
    check_close("f16", kv16, elements * CTX * 2.0, 0);
    /* What the process holds moves with it. Filling touches the pages; the window and everything
     * else was there. Slack: 5% and 4 MiB of other first touches. */
    double grew2 = (double)two.rss_filled - (double)two.rss_made,
           grew16 = (double)half.rss_filled - (double)half.rss_made, other = 4 << 20;
    check_close("RSS under kivi2", grew2, kv2, 0.05 * kv2 + other);
    check_close("RSS under f16", grew16, kv16, 0.05 * kv16 + other);
    /* and so does the peak: also the larger window of a prompt's step is given back */
    double peak2 = (double)two.rss_peak - (double)two.rss_before,
           peak16 = (double)half.rss_peak - (double)half.rss_before;
    check_close("peaks", peak16 - peak2, kv16 - kv2, 0.2 * (kv16 - kv2) + other);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tags_add_up),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_steps_allocate_nothing),
        cmocka_unit_test(test_every_allocation_fails),
        cmocka_unit_test(test_smollm2_memory),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
