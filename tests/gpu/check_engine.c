/* check_engine.c: the CUDA engine through kivi.h: batches, forks, steps back, files, and memory
 * that runs out. One line a case, `ok NAME` or `not ok NAME: why`; `skip` without a GPU.
 *
 * usage: check_engine FOLDER_OF_GOLDEN_FILES FOLDER_TO_WRITE_IN */
#include "base.h"
#include "kivi_cache.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int n_failed;
static kivi_error err;
static char model_path[1024], file_path[1024];

enum { CTX = 512, N_PROMPT = 200, N_MORE = 60, MAX_SESSIONS = 8 };

#define FAIL(...) return snprintf(why, sizeof why, __VA_ARGS__), false
#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != KIVI_OK) FAIL("%s: %s", #call, err.text);                                    \
    } while (0)

static char why[1024];

static kivi_engine_options options_of(const char *device) {
    kivi_engine_options o = kivi_engine_defaults();
    o.model_path = model_path;
    o.device = device;
    if (!strcmp(device, "cuda")) o.compute_type = "f32"; /* refused on the cpu */
    o.ctx_tokens = CTX;
    o.max_sessions = MAX_SESSIONS;
    o.kv.residual_tokens = 32;
    o.n_threads = 2;
    return o;
}

static int32_t token_at(uint32_t sequence, uint32_t pos) {
    return (int32_t)((sequence * 7919u + pos * 104729u + pos * pos * 31u) % 288u);
}

static void tokens_of(int32_t *out, uint32_t sequence, uint32_t from, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) out[i] = token_at(sequence, from + i);
}

/* What a session says now. */
typedef struct said {
    float logits[512];
    uint32_t n;
} said;

static bool listen(said *out, const kivi_engine *e, const kivi_session *s) {
    const float *logits = kivi_session_logits(s, 0);
    out->n = kivi_engine_info_get(e)->n_vocab;
    if (!logits) FAIL("no logits");
    memcpy(out->logits, logits, out->n * sizeof *logits);
    return true;
}

static double apart(const said *a, const said *b) {
    double worst = 0;
    for (uint32_t i = 0; i < a->n; i++)
        worst = fmax(worst, fabs((double)a->logits[i] - (double)b->logits[i]));
    return worst;
}

static bool is_same(const said *a, const said *b) {
    return a->n == b->n && !memcmp(a->logits, b->logits, a->n * sizeof *a->logits);
}

/* A prompt and more tokens one by one. */
static bool play(kivi_session *s, uint32_t sequence, uint32_t n_more) {
    int32_t prompt[N_PROMPT];
    tokens_of(prompt, sequence, 0, N_PROMPT);
    MUST(kivi_session_prompt(s, prompt, N_PROMPT, &err));
    for (uint32_t i = 0; i < n_more; i++)
        MUST(kivi_session_decode(s, token_at(sequence, N_PROMPT + i), &err));
    return true;
}

/* ---- cases ---- */

static bool batch(kivi_engine *e) {
    kivi_session *s[MAX_SESSIONS] = {NULL};
    kivi_step_item items[MAX_SESSIONS];
    int32_t next[MAX_SESSIONS];
    static said first[MAX_SESSIONS], again, alone;
    for (int round = 0; round < 2; round++) {
        for (uint32_t i = 0; i < MAX_SESSIONS; i++) {
            MUST(kivi_session_create(&s[i], e, &err));
            if (!play(s[i], i, 0)) return false;
        }
        for (uint32_t t = 0; t < N_MORE; t++) {
            uint32_t n = t % 3 ? MAX_SESSIONS : 5; /* not a power of two: idle slots */
            for (uint32_t i = 0; i < n; i++) {
                next[i] = token_at(i, kivi_session_length(s[i]));
                items[i] = (kivi_step_item){.session = s[i], .tokens = &next[i], .n_tokens = 1};
            }
            MUST(kivi_engine_step(e, items, n, &err));
            for (uint32_t i = 0; i < n; i++)
                if (items[i].status) FAIL("item %u: %s", i, items[i].error.text);
        }
        for (uint32_t i = 0; i < 5; i++) {
            if (!listen(round ? &again : &first[i], e, s[i])) return false;
            if (round && !is_same(&again, &first[i])) FAIL("sequence %u is not repeated", i);
        }
        for (uint32_t i = 0; i < MAX_SESSIONS; i++) kivi_session_destroy(&s[i]);
    }
    for (uint32_t i = 0; i < 5; i++) {
        MUST(kivi_session_create(&s[0], e, &err));
        if (!play(s[0], i, N_MORE) || !listen(&alone, e, s[0])) return false;
        /* other kernels for its products, another split: other sums, and now and then a code */
        if (!(apart(&alone, &first[i]) < 2.0)) FAIL("sequence %u: %g", i, apart(&alone, &first[i]));
        kivi_session_destroy(&s[0]);
    }
    return true;
}

static bool mixed(kivi_engine *e) {
    kivi_session *a = NULL, *b = NULL;
    int32_t prompt[N_PROMPT], one;
    static said x, y;
    for (int round = 0; round < 2; round++) {
        MUST(kivi_session_create(&a, e, &err));
        MUST(kivi_session_create(&b, e, &err));
        if (!play(a, 1, 3)) return false;
        tokens_of(prompt, 2, 0, N_PROMPT);
        one = token_at(1, N_PROMPT + 3);
        MUST(kivi_session_begin_prompt(b, N_PROMPT, &err));
        kivi_step_item items[2] = {{.session = a, .tokens = &one, .n_tokens = 1},
                                   {.session = b, .tokens = prompt, .n_tokens = N_PROMPT}};
        if (!round) MUST(kivi_engine_step(e, items, 2, &err));
        else {
            MUST(kivi_engine_step(e, items, 1, &err));
            if (!listen(&y, e, a)) return false;
            MUST(kivi_engine_step(e, items + 1, 1, &err));
        }
        if (items[0].status || items[1].status) FAIL("%s", items[0].error.text);
        if (!round && !listen(&x, e, a)) return false;
        kivi_session_destroy(&a);
        kivi_session_destroy(&b);
    }
    if (!(apart(&x, &y) < 0.5)) FAIL("a decoding session beside a prompt: %g", apart(&x, &y));
    return true;
}

static bool fork_and_rewind(kivi_engine *e) {
    kivi_session *s = NULL, *f = NULL;
    static said x, y, z;
    MUST(kivi_session_create(&s, e, &err));
    if (!play(s, 3, N_MORE)) return false;
    MUST(kivi_session_fork(&f, s, &err));
    MUST(kivi_session_decode(s, 5, &err));
    if (!listen(&x, e, s)) return false;
    MUST(kivi_session_decode(f, 9, &err)); /* its own page and window: the other does not notice */
    MUST(kivi_session_decode(f, 11, &err));
    MUST(kivi_session_rewind(f, N_PROMPT + N_MORE, &err));
    MUST(kivi_session_decode(f, 5, &err));
    if (!listen(&y, e, f)) return false;
    if (!is_same(&x, &y)) FAIL("a fork that went back: %g", apart(&x, &y));
    MUST(kivi_session_rewind(s, N_PROMPT + 10, &err)); /* behind the ring: evaluated again */
    for (uint32_t i = 10; i < N_MORE; i++)
        MUST(kivi_session_decode(s, token_at(3, N_PROMPT + i), &err));
    MUST(kivi_session_decode(s, 5, &err));
    if (!listen(&z, e, s)) return false;
    if (!is_same(&x, &z)) FAIL("a replay: %g", apart(&x, &z));
    kivi_session_destroy(&s);
    kivi_session_destroy(&f);
    return true;
}

/* Saved here, loaded there, and on: as if it had never left. Where the two engines differ, by some
 * codes at most: logits of a spread of 8 that have nothing to do with each other are 30 apart. */
static bool files(kivi_engine *from, kivi_engine *to, double tolerance) {
    kivi_session *s = NULL, *l = NULL;
    static said x, y;
    MUST(kivi_session_create(&s, from, &err));
    if (!play(s, 4, N_MORE)) return false;
    MUST(kivi_session_save(s, file_path, &err));
    MUST(kivi_session_load(&l, to, file_path, &err));
    for (uint32_t i = 0; i < 40; i++) {
        int32_t next = token_at(4, N_PROMPT + N_MORE + i);
        MUST(kivi_session_decode(s, next, &err));
        if (!listen(&x, from, s)) return false;
        MUST(kivi_session_decode(l, next, &err));
        if (!listen(&y, to, l)) return false;
        if (tolerance == 0 ? !is_same(&x, &y) : !(apart(&x, &y) <= tolerance))
            FAIL("token %u behind the file: %g", i, apart(&x, &y));
    }
    kivi_session_destroy(&s);
    kivi_session_destroy(&l);
    return true;
}

static bool failing_allocations(void) {
    uint32_t n_failures = 0;
    for (uint64_t n = 1; n < 4000; n++) {
        kivi_engine *e = NULL;
        kivi_session *s = NULL;
        kivi_engine_options o = options_of("cuda");
        int32_t prompt[40];
        o.max_sessions = 2;
        o.fail_after = n;
        tokens_of(prompt, 0, 0, 40);
        kivi_status status = kivi_engine_create(&e, &o, &err);
        if (status == KIVI_OK) status = kivi_session_create(&s, e, &err);
        if (status == KIVI_OK) status = kivi_session_prompt(s, prompt, 40, &err);
        if (status == KIVI_OK) status = kivi_session_decode(s, 1, &err);
        kivi_session_destroy(&s);
        kivi_engine_destroy(&e);
        if (status == KIVI_OK) {
            if (n_failures < 30) FAIL("only %u allocations failed", n_failures);
            return true;
        }
        if (status != KIVI_NOMEM) FAIL("allocation %llu: %s", (unsigned long long)n, err.text);
        n_failures++;
        n += n > 40 ? 6 : 0; /* each creates a context's worth of work: all early ones, then some */
    }
    FAIL("it never succeeds");
}

/* Room for one session's window more than is planned for is not there; the engine goes on. */
static bool out_of_memory(void) {
    kivi_engine *e = NULL;
    kivi_session *s[64] = {NULL};
    kivi_engine_options o = options_of("cuda");
    o.max_sessions = 2;
    MUST(kivi_engine_create(&e, &o, &err));
    kivi_memory m = kivi_engine_device_memory(e);
    uint64_t sum = ki_memory_sum(&m);
    kivi_engine_destroy(&e);
    o.gpu_memory_bytes = sum / 2;
    if (kivi_engine_create(&e, &o, &err) != KIVI_NOMEM) FAIL("half of the memory is enough");
    o.gpu_memory_bytes = sum + (600 << 10);
    MUST(kivi_engine_create(&e, &o, &err));
    uint32_t n = 0;
    kivi_status status = KIVI_OK;
    while (n < 64 && (status = kivi_session_create(&s[n], e, &err)) == KIVI_OK) n++;
    if (status != KIVI_NOMEM || n < 2) FAIL("%u sessions: %s", n, err.text);
    if (!play(s[0], 1, 20) || !play(s[1], 2, 20)) return false;
    for (uint32_t i = 0; i < n; i++) kivi_session_destroy(&s[i]);
    MUST(kivi_session_create(&s[0], e, &err));
    if (!play(s[0], 1, 5)) return false;
    kivi_session_destroy(&s[0]);
    kivi_engine_destroy(&e);
    return true;
}

static bool counts(kivi_engine *e) {
    kivi_memory before = kivi_engine_device_memory(e);
    kivi_session *s = NULL;
    MUST(kivi_session_create(&s, e, &err));
    if (!play(s, 1, 1)) return false;
    kivi_memory during = kivi_engine_device_memory(e);
    for (uint32_t i = 0; i < 100; i++) MUST(kivi_session_decode(s, 3, &err));
    kivi_memory after = kivi_engine_device_memory(e);
    if (memcmp(&during, &after, sizeof after)) FAIL("steps of decoding took memory");
    if (after.kv_residual <= before.kv_residual) FAIL("a window is not counted");
    kivi_session_destroy(&s);
    after = kivi_engine_device_memory(e);
    if (memcmp(&before, &after, sizeof after)) FAIL("a session's memory is not given back");
    return true;
}

static void report(const char *family, const char *name, bool ok) {
    if (ok) printf("ok %s/%s\n", family, name);
    else printf("not ok %s/%s: %s\n", family, name, why);
    fflush(stdout);
    n_failed += !ok;
}

static kivi_engine *open_engine(const char *device) {
    kivi_engine *e = NULL;
    kivi_engine_options o = options_of(device);
    return kivi_engine_create(&e, &o, &err) == KIVI_OK ? e : NULL;
}

/* Forks, steps back and files of the kinds with planes of their own: a page is closed and another
 * begun by the prompt's 200 rows, and the second one closes among the rows behind it. */
static bool plus_kinds(const char *family) {
    static const char *const kinds[] = {"kivi2+", "k4v2+", "k4v3+"};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        kivi_engine *e[2] = {NULL};
        char name[64];
        for (int cpu = 0; cpu < 2; cpu++) {
            kivi_engine_options o = options_of(cpu ? "cpu" : "cuda");
            o.kv.residual_tokens = 0;
            MUST(kivi_kv_by_name(&o.kv, kinds[i], &err));
            kivi_status status = kivi_engine_create(&e[cpu], &o, &err);
            if (status == KIVI_UNSUPPORTED && !cpu) { /* heads without a fused kernel */
                printf("skip %s/%s: %s\n", family, kinds[i], err.text);
                return true;
            }
            if (status != KIVI_OK) FAIL("%s", err.text);
        }
        snprintf(name, sizeof name, "%s/fork-and-rewind", kinds[i]);
        report(family, name, fork_and_rewind(e[0]));
        snprintf(name, sizeof name, "%s/file-to-cuda", kinds[i]);
        report(family, name, files(e[0], e[0], 0));
        snprintf(name, sizeof name, "%s/file-to-cpu", kinds[i]);
        report(family, name, files(e[0], e[1], 2.5));
        snprintf(name, sizeof name, "%s/file-from-cpu", kinds[i]);
        report(family, name, files(e[1], e[0], 2.5));
        kivi_engine_destroy(&e[0]);
        kivi_engine_destroy(&e[1]);
    }
    return true;
}

int main(int argc, char **argv) {
    static const char *const families[] = {"llama-gqa", "mistral-swa", "gemma3"};
    if (argc != 3) return 2;
    snprintf(file_path, sizeof file_path, "%s/session", argv[2]);
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        snprintf(model_path, sizeof model_path, "%s/%s", argv[1], families[i]);
        kivi_engine *gpu = open_engine("cuda"), *cpu = open_engine("cpu");
        if (!gpu) {
            printf("%s cuda: %s\n", err.status == KIVI_DEVICE ? "skip" : "not ok", err.text);
            kivi_engine_destroy(&cpu);
            return err.status != KIVI_DEVICE;
        }
        const char *f = families[i];
        report(f, "batch", batch(gpu));
        report(f, "mixed", mixed(gpu));
        report(f, "fork-and-rewind", fork_and_rewind(gpu));
        report(f, "file-to-cuda", files(gpu, gpu, 0));
        report(f, "file-to-cpu", files(gpu, cpu, 2.5));
        report(f, "file-from-cpu", files(cpu, gpu, 2.5));
        report(f, "counts", counts(gpu));
        kivi_engine_destroy(&gpu);
        kivi_engine_destroy(&cpu);
        report(f, "plus-kinds", plus_kinds(f));
    }
    snprintf(model_path, sizeof model_path, "%s/llama-gqa", argv[1]);
    report("memory", "runs-out", out_of_memory());
    report("memory", "failing-allocations", failing_allocations());
    return n_failed != 0;
}
