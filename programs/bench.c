/* bench: tokens a second, one row for each test. What lies before a test's depth is filled once
 * and not timed: a prompt of random ids for each sequence, so that no two of them share pages (that
 * would flatter the caches). A repetition forks the filled sessions, runs, and drops the forks; the
 * first one warms up and is not counted. Ids are drawn beforehand: nothing is sampled or tokenized.
 *
 * Prompts of a batch share steps where they fit, as generated tokens do.
 *
 * Several numbers of threads are engines one after another. Filling is the long part, and what is
 * in a cache does not depend on threads: the engine of the most of them fills it and saves the
 * sessions, the others load them. */
#include "commands.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_BATCH = 256, MAX_REPEATS = 1000, PAGE_TOKENS = 128, NAME_BYTES = 64 };
enum form { MD, CSV, JSON, JSONL };
static const char *const form_names[] = {"md", "csv", "json", "jsonl"};

/* Either n_prompt or n_gen is 0. */
typedef struct test {
    uint32_t n_prompt, n_gen, n_depth, n_batch;
} test;

typedef struct result {
    double seconds[MAX_REPEATS];
    uint64_t median_step_ns; /* of all generated steps; 0 for a prompt */
    uint64_t kv_bytes;       /* what n_batch sequences take at the end of the test */
    char started[32];        /* ISO 8601, UTC */
} result;

typedef struct bench {
    const options *o;
    enum form form;
    kivi_engine *engine;
    const kivi_engine_info *info;
    uint32_t ctx_tokens, max_batch, max_depth, n_threads, n_rows, n_rows_done;
    int32_t *ids;                     /* sequence i reads ids[i + position] */
    kivi_session *filled[MAX_BATCH];  /* at the depth of the test; none at depth 0 */
    kivi_session *running[MAX_BATCH]; /* of this repetition */
    int saved[MAX_BATCH], n_saved;    /* open files without a name: the filled sessions */
    char kv[32], cpu[128];
    kivi_error err;
} bench;

static uint32_t list_max(const list *l) {
    uint32_t max = 0;
    for (uint32_t i = 0; i < l->n; i++)
        if (l->values[i] > max) max = l->values[i];
    return max;
}

static uint32_t count_positive(const list *l) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < l->n; i++) n += l->values[i] > 0;
    return n;
}

/* "tg128 @ d4096, b8", as llama-bench has it, but for the batch */
static void test_name(char *name, const test *t) {
    size_t n = (size_t)snprintf(name, NAME_BYTES, "%s%u", t->n_prompt ? "pp" : "tg",
                                t->n_prompt ? t->n_prompt : t->n_gen);
    if (t->n_depth) n += (size_t)snprintf(name + n, NAME_BYTES - n, " @ d%u", t->n_depth);
    if (t->n_batch > 1) snprintf(name + n, NAME_BYTES - n, ", b%u", t->n_batch);
}

/* One line on a terminal, overwritten in place and gone before anything else is printed. */
static void clear_progress(void) {
    if (isatty(STDERR_FILENO)) fputs("\r\033[K", stderr);
}

__attribute__((format(printf, 2, 3))) static void progress(const bench *b, const char *format,
                                                           ...) {
    va_list args;
    if (!isatty(STDERR_FILENO)) return;
    clear_progress();
    fprintf(stderr, "%u/%u %s ", b->n_rows_done + 1, b->n_rows, b->kv);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fflush(stderr);
}

static int failed(const bench *b) {
    clear_progress();
    return fail_with(&b->err);
}

/* ---- sessions ---- */

static void drop(kivi_session **sessions) {
    for (uint32_t i = 0; i < MAX_BATCH; i++) kivi_session_destroy(&sessions[i]);
}

static kivi_status fill(bench *b, uint32_t depth) {
    drop(b->filled);
    for (uint32_t i = 0; i < b->max_batch && depth; i++) {
        progress(b, "fill %u of %u to depth %u", i + 1, b->max_batch, depth);
        kivi_status status = kivi_session_create(&b->filled[i], b->engine, &b->err);
        if (!status) status = kivi_session_prompt(b->filled[i], b->ids + i, depth, &b->err);
        if (status) return status;
    }
    return KIVI_OK;
}

static void forget_saved(bench *b) {
    while (b->n_saved) close(b->saved[--b->n_saved]);
}

/* One filled session into a file that ends with us, whatever ends us. */
static int save_one(bench *b, const kivi_session *session) {
    const char *folder = getenv("TMPDIR");
    char path[PATH_MAX];
    int n = snprintf(path, sizeof path, "%s/kivi-bench-%ld", folder && *folder ? folder : "/tmp",
                     (long)getpid());
    if (n < 0 || (size_t)n >= sizeof path) return usage_error("TMPDIR: longer than a path may be");
    if (kivi_session_save(session, path, &b->err)) return failed(b);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        clear_progress();
        fprintf(stderr, "kivi: error: %s: saved, and could not be opened again\n", path);
    }
    unlink(path);
    if (file < 0) return EXIT_IO;
    b->saved[b->n_saved++] = file;
    return EXIT_OK;
}

static int save_filled(bench *b) {
    int code = EXIT_OK;
    for (uint32_t i = 0; i < b->max_batch && !code; i++) code = save_one(b, b->filled[i]);
    return code;
}

static kivi_status load_filled(bench *b) {
    kivi_status status = KIVI_OK;
    drop(b->filled);
    for (int i = 0; i < b->n_saved && !status; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", b->saved[i]);
        status = kivi_session_load(&b->filled[i], b->engine, path, &b->err);
    }
    return status;
}

static kivi_status start(bench *b, const test *t) {
    kivi_status status = KIVI_OK;
    for (uint32_t i = 0; i < t->n_batch && !status; i++)
        status = t->n_depth ? kivi_session_fork(&b->running[i], b->filled[i], &b->err)
                            : kivi_session_create(&b->running[i], b->engine, &b->err);
    return status;
}

/* ---- one repetition ---- */

static kivi_status run_step(bench *b, kivi_step_item *items, uint32_t n) {
    kivi_status status = kivi_engine_step(b->engine, items, n, &b->err);
    for (uint32_t i = 0; i < n && !status; i++)
        if ((status = items[i].status)) b->err = items[i].error;
    return status;
}

/* Whole prompts share a step as long as they fit; one that is longer than a step is cut. */
static kivi_status run_prompts(bench *b, const test *t) {
    kivi_step_item items[MAX_BATCH];
    uint32_t most = b->info->step_rows, at_once = t->n_prompt < most ? most / t->n_prompt : 1;
    kivi_status status = KIVI_OK;
    for (uint32_t first = 0, n; first < t->n_batch && !status; first += n) {
        n = t->n_batch - first < at_once ? t->n_batch - first : at_once;
        for (uint32_t i = 0; i < n && !status; i++)
            status = kivi_session_begin_prompt(b->running[first + i], t->n_prompt, &b->err);
        for (uint32_t done = 0, rows; done < t->n_prompt && !status; done += rows) {
            rows = t->n_prompt - done < most ? t->n_prompt - done : most;
            for (uint32_t i = 0; i < n; i++)
                items[i] = (kivi_step_item){.session = b->running[first + i],
                                            .tokens = b->ids + first + i + t->n_depth + done,
                                            .n_tokens = rows};
            status = run_step(b, items, n);
        }
    }
    return status;
}

static kivi_status generate_step(bench *b, const test *t, uint32_t at) {
    kivi_step_item items[MAX_BATCH];
    for (uint32_t i = 0; i < t->n_batch; i++)
        items[i] = (kivi_step_item){
            .session = b->running[i], .tokens = b->ids + i + t->n_depth + at, .n_tokens = 1};
    return run_step(b, items, t->n_batch);
}

static kivi_status generate(bench *b, const test *t, double *step_seconds) {
    kivi_status status = KIVI_OK;
    double before = now_seconds();
    for (uint32_t at = 0; at < t->n_gen && !status; at++) {
        status = generate_step(b, t, at);
        double after = now_seconds();
        step_seconds[at] = after - before;
        before = after;
    }
    return status;
}

static kivi_status repetition(bench *b, const test *t, double *seconds, double *step_seconds) {
    kivi_status status = start(b, t);
    double before = now_seconds();
    if (!status) status = t->n_prompt ? run_prompts(b, t) : generate(b, t, step_seconds);
    *seconds = now_seconds() - before;
    drop(b->running);
    return status;
}

/* ---- one test ---- */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t n) {
    qsort(values, n, sizeof *values, by_value);
    return n ? (values[(n - 1) / 2] + values[n / 2]) / 2 : 0;
}

static kivi_status cache_bytes(bench *b, uint64_t *bytes, const test *t) {
    kivi_memory m;
    uint32_t n_tokens = t->n_depth + t->n_prompt + t->n_gen;
    kivi_status status = kivi_engine_plan(&m, NULL, b->engine, &b->info->kv, n_tokens, &b->err);
    if (!status) *bytes = t->n_batch * (m.kv_codes + m.kv_scales + m.kv_residual);
    return status;
}

/* steps: [repeats][n_gen] */
static kivi_status measure(bench *b, const test *t, result *r, double *steps) {
    char name[NAME_BYTES];
    double warm_up;
    time_t now = time(NULL);
    struct tm utc;
    strftime(r->started, sizeof r->started, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    test_name(name, t);
    progress(b, "%s, warm-up", name);
    kivi_status status = cache_bytes(b, &r->kv_bytes, t);
    if (!status) status = repetition(b, t, &warm_up, steps);
    for (uint32_t i = 0; i < b->o->repeats && !status; i++) {
        progress(b, "%s, repetition %u of %u", name, i + 1, b->o->repeats);
        status = repetition(b, t, &r->seconds[i], steps + (size_t)i * t->n_gen);
    }
    r->median_step_ns = (uint64_t)(median(steps, (size_t)b->o->repeats * t->n_gen) * 1e9);
    return status;
}

/* ---- results as text ---- */

typedef struct summary {
    double ns, ns_sd, ts, ts_sd;
} summary;

static double rate(const test *t, double seconds) {
    return (double)t->n_batch * (t->n_prompt + t->n_gen) / (seconds > 0 ? seconds : 1e-9);
}

/* Sample standard deviation, 0 for one sample, as llama-bench. */
static summary summarize(const test *t, const result *r, uint32_t n) {
    summary s = {0};
    for (uint32_t i = 0; i < n; i++) {
        s.ns += r->seconds[i] * 1e9 / n;
        s.ts += rate(t, r->seconds[i]) / n;
    }
    for (uint32_t i = 0; i < n; i++) {
        double ns = r->seconds[i] * 1e9 - s.ns, ts = rate(t, r->seconds[i]) - s.ts;
        s.ns_sd += ns * ns / (n > 1 ? n - 1 : 1);
        s.ts_sd += ts * ts / (n > 1 ? n - 1 : 1);
    }
    s.ns_sd = sqrt(s.ns_sd);
    s.ts_sd = sqrt(s.ts_sd);
    return s;
}

/* "llama 135M Q4_1" */
static void model_type(char *text, size_t n_bytes, const kivi_engine_info *i) {
    double n = (double)i->n_params;
    const char *unit = n < 999.5e6 ? "M" : "B";
    double value = n < 999.5e6 ? n / 1e6 : n / 1e9;
    snprintf(text, n_bytes, "%s %.*f%s %s", i->architecture, value < 10, value, unit,
             i->weight_type);
}

static const char *cache_type(char *text, size_t n_bytes, uint32_t bits, bool plus) {
    if (bits == 16) return "f16";
    snprintf(text, n_bytes, "kivi%u%s", bits, plus ? "+" : "");
    return text;
}

static void read_cpu(char *name, size_t n_bytes) {
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(name, n_bytes, "unknown");
    while (file && fgets(line, sizeof line, file)) {
        const char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) || !value) continue;
        value += 1 + strspn(value + 1, " ");
        snprintf(name, n_bytes, "%.*s", (int)strcspn(value, "\n"), value);
        break;
    }
    if (file) fclose(file);
}

/* Fields go out one by one; the same list makes csv's header, csv and both kinds of JSON. */
typedef struct writer {
    enum form form;
    bool header;
    uint32_t n;
} writer;

static void put_quoted(const char *text, bool csv) {
    putchar('"');
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if (csv && *p == '"') fputs("\"\"", stdout);
        else if (csv) putchar(*p);
        else if (*p == '"' || *p == '\\') printf("\\%c", *p);
        else if (*p < 32) printf("\\u%04x", *p);
        else putchar(*p);
    }
    putchar('"');
}

static void put_name(writer *w, const char *name) {
    if (w->n++) fputs(w->form == CSV ? "," : w->form == JSON ? ",\n    " : ", ", stdout);
    if (w->header) fputs(name, stdout);
    else if (w->form != CSV) printf("\"%s\": ", name);
}

static void put_text(writer *w, const char *name, const char *value) {
    put_name(w, name);
    if (!w->header) put_quoted(value, w->form == CSV);
}

static void put_whole(writer *w, const char *name, uint64_t value) {
    put_name(w, name);
    if (!w->header) printf(w->form == CSV ? "\"%" PRIu64 "\"" : "%" PRIu64, value);
}

static void put_real(writer *w, const char *name, double value) {
    put_name(w, name);
    if (!w->header) printf(w->form == CSV ? "\"%.6f\"" : "%.6f", value);
}

static void put_samples(writer *w, const test *t, const result *r, uint32_t n) {
    if (w->form == CSV) return;
    put_name(w, "samples_ns");
    for (uint32_t i = 0; i < n; i++) printf("%s%.0f", i ? ", " : "[", r->seconds[i] * 1e9);
    putchar(']');
    put_name(w, "samples_ts");
    for (uint32_t i = 0; i < n; i++) printf("%s%.6f", i ? ", " : "[", rate(t, r->seconds[i]));
    putchar(']');
}

/* What one run of the program has in common */
static void put_machine(writer *w, const bench *b) {
    const kivi_engine_info *i = b->info;
    char type[96], k[16], v[16];
    model_type(type, sizeof type, i);
    put_text(w, "build_commit", KIVI_VERSION);
    put_text(w, "cpu_info", b->cpu);
    put_text(w, "isa", i->isa);
    put_text(w, "model_filename", b->o->model);
    put_text(w, "model_type", type);
    put_whole(w, "model_size", kivi_engine_memory(b->engine).weights);
    put_whole(w, "model_n_params", i->n_params);
    put_whole(w, "n_ubatch", i->step_rows);
    put_whole(w, "n_threads", i->n_threads);
    put_text(w, "kv", b->kv);
    put_text(w, "type_k", cache_type(k, sizeof k, i->kv.k_bits, i->kv.plus));
    put_text(w, "type_v", cache_type(v, sizeof v, i->kv.v_bits, i->kv.plus));
}

static void put_result(writer *w, const bench *b, const test *t, const result *r) {
    summary s = summarize(t, r, b->o->repeats);
    put_whole(w, "n_batch", t->n_batch);
    put_whole(w, "n_prompt", t->n_prompt);
    put_whole(w, "n_gen", t->n_gen);
    put_whole(w, "n_depth", t->n_depth);
    put_whole(w, "kv_bytes", r->kv_bytes);
    put_text(w, "test_time", r->started);
    put_whole(w, "avg_ns", (uint64_t)s.ns);
    put_whole(w, "stddev_ns", (uint64_t)s.ns_sd);
    put_real(w, "avg_ts", s.ts);
    put_real(w, "stddev_ts", s.ts_sd);
    put_whole(w, "median_step_ns", r->median_step_ns);
    put_samples(w, t, r, b->o->repeats);
}

static void print_md(const bench *b, const test *t, const result *r) {
    const kivi_engine_info *i = b->info;
    char type[96], name[NAME_BYTES], speed[64], size[32], params[32];
    summary s = summarize(t, r, b->o->repeats);
    double bytes = (double)kivi_engine_memory(b->engine).weights, n = (double)i->n_params;
    model_type(type, sizeof type, i);
    test_name(name, t);
    bool gib = bytes >= 0x1p30, billions = n >= 1e9;
    snprintf(size, sizeof size, "%.2f %s", bytes / (gib ? 0x1p30 : 0x1p20), gib ? "GiB" : "MiB");
    snprintf(params, sizeof params, "%.2f %s", n / (billions ? 1e9 : 1e6), billions ? "B" : "M");
    snprintf(speed, sizeof speed, "%.2f \u00b1 %.2f", s.ts, s.ts_sd);
    if (!b->n_rows_done)
        printf("| %-24s | %10s | %9s | %7s | %-6s | %20s | %18s |\n"
               "| :----------------------- | ---------: | --------: | ------: | :----- |"
               " -------------------: | -----------------: |\n",
               "model", "size", "params", "threads", "kv", "test", "t/s");
    printf("| %-24s | %10s | %9s | %7u | %-6s | %20s | %19s |\n", type, size, params, i->n_threads,
           b->kv, name, speed); /* the sign before the deviation is two bytes wide */
}

static void print_csv(const bench *b, const test *t, const result *r) {
    for (int header = !b->n_rows_done; header >= 0; header--) {
        writer w = {.form = CSV, .header = header};
        put_machine(&w, b);
        put_result(&w, b, t, r);
        putchar('\n');
    }
}

static void print_json(const bench *b, const test *t, const result *r) {
    writer w = {.form = b->form};
    if (b->form == JSON) fputs(b->n_rows_done ? ",\n  {\n    " : "[\n  {\n    ", stdout);
    else putchar('{');
    put_machine(&w, b);
    put_result(&w, b, t, r);
    fputs(b->form == JSON ? "\n  }" : "}\n", stdout);
}

/* ---- all tests ---- */

static int run_test(bench *b, const test *t) {
    size_t n_steps = (size_t)(t->n_gen ? t->n_gen : 1) * b->o->repeats;
    double *steps = calloc(n_steps, sizeof *steps);
    result r = {0};
    if (!steps) {
        fprintf(stderr, "kivi: error: no memory for the times of %zu steps\n", n_steps);
        return EXIT_MEMORY;
    }
    kivi_status status = measure(b, t, &r, steps);
    free(steps);
    if (status) return failed(b);
    clear_progress();
    if (b->form == MD) print_md(b, t, &r);
    else if (b->form == CSV) print_csv(b, t, &r);
    else print_json(b, t, &r);
    b->n_rows_done++;
    if (!fflush(stdout)) return EXIT_OK;
    fputs("kivi: error: standard output: the row could not be written\n", stderr);
    return EXIT_IO;
}

static int run_depth(bench *b, uint32_t depth) {
    const options *o = b->o;
    int code = EXIT_OK;
    if (b->n_saved ? load_filled(b) : fill(b, depth)) return failed(b);
    for (uint32_t i = 0; i < o->bench_batch.n && !code; i++) {
        test t = {.n_depth = depth, .n_batch = o->bench_batch.values[i]};
        for (uint32_t p = 0; p < o->bench_prompt.n && !code; p++)
            if ((t.n_prompt = o->bench_prompt.values[p])) code = run_test(b, &t);
        t.n_prompt = 0;
        for (uint32_t n = 0; n < o->bench_gen.n && !code; n++)
            if ((t.n_gen = o->bench_gen.values[n])) code = run_test(b, &t);
    }
    return code;
}

/* Filled sessions and their forks are there at the same time. */
static void size_engine(kivi_engine_options *eo, void *user) {
    const bench *b = user;
    eo->n_threads = b->n_threads;
    eo->ctx_tokens = b->ctx_tokens;
    eo->max_sessions = b->max_batch * (b->max_depth ? 2 : 1);
}

/* SplitMix64 from a fixed seed, as tools/compare_llama.py has it. */
static int draw_ids(bench *b) {
    size_t n = (size_t)b->ctx_tokens + b->max_batch;
    uint64_t state = 0;
    if (!(b->ids = malloc(n * sizeof *b->ids))) {
        fprintf(stderr, "kivi: error: no memory for %zu token ids\n", n);
        return EXIT_MEMORY;
    }
    for (size_t i = 0; i < n; i++) {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        b->ids[i] = (int32_t)((z ^ z >> 31) % b->info->n_vocab);
    }
    return EXIT_OK;
}

static int open_with(bench *b, uint32_t n_threads) {
    b->n_threads = n_threads;
    progress(b, "load");
    int code = open_engine(&b->engine, b->o, b->kv, size_engine, b);
    clear_progress();
    if (code) return code;
    b->info = kivi_engine_info_get(b->engine);
    return b->ids ? EXIT_OK : draw_ids(b);
}

static void close_engine(bench *b) {
    drop(b->filled);
    kivi_engine_destroy(&b->engine);
}

/* The sessions of one depth, by the engine that is fastest at it. */
static int fill_for_all(bench *b, uint32_t depth) {
    forget_saved(b);
    if (!depth) return EXIT_OK;
    int code = open_with(b, list_max(&b->o->bench_threads));
    if (!code && fill(b, depth)) code = failed(b);
    if (!code) code = save_filled(b);
    close_engine(b);
    return code;
}

static int run_kind(bench *b) {
    const list *depths = &b->o->bench_depth, *threads = &b->o->bench_threads;
    bool many = threads->n > 1;
    int code = many ? EXIT_OK : open_with(b, threads->values[0]);
    for (uint32_t i = 0; i < depths->n && !code; i++) {
        if (many) code = fill_for_all(b, depths->values[i]);
        for (uint32_t k = 0; k < threads->n && !code; k++) {
            if (many) code = open_with(b, threads->values[k]);
            if (!code) code = run_depth(b, depths->values[i]);
            if (many) close_engine(b);
        }
    }
    close_engine(b);
    forget_saved(b);
    free(b->ids);
    b->ids = NULL;
    return code;
}

/* Everything that can be refused is refused before the first test runs. */
static int check_options(bench *b, const char *kinds) {
    const options *o = b->o;
    const char *format = o->format ? o->format : "md";
    uint32_t n_tests = count_positive(&o->bench_prompt) + count_positive(&o->bench_gen);
    uint32_t n_kinds = 0;
    kivi_kv_options kv;
    while (b->form <= JSONL && strcmp(form_names[b->form], format)) b->form++;
    if (b->form > JSONL) return usage_error("-o: '%s', expected md, csv, json or jsonl", format);
    if (!n_tests) return usage_error("nothing to time: -p and -n are both 0");
    for (; options_list_item(b->kv, sizeof b->kv, kinds, n_kinds); n_kinds++) {
        int code = options_kv(&kv, o, b->kv);
        if (code) return code;
    }
    b->n_rows = n_kinds * n_tests * o->bench_depth.n * o->bench_batch.n * o->bench_threads.n;
    b->max_batch = list_max(&o->bench_batch);
    b->max_depth = list_max(&o->bench_depth);
    uint32_t p = list_max(&o->bench_prompt), n = list_max(&o->bench_gen);
    b->ctx_tokens = (b->max_depth + (p > n ? p : n) + PAGE_TOKENS) / PAGE_TOKENS * PAGE_TOKENS;
    if (o->ctx && o->ctx < b->ctx_tokens)
        return usage_error("--ctx: %u, these tests take %u", o->ctx, b->ctx_tokens);
    if (o->ctx) b->ctx_tokens = o->ctx;
    return EXIT_OK;
}

int command_bench(const options *o) {
    const char *kinds = options_kind(o);
    bench b = {.o = o};
    int code = check_options(&b, kinds);
    if (code) return code;
    read_cpu(b.cpu, sizeof b.cpu);
    for (uint32_t i = 0; options_list_item(b.kv, sizeof b.kv, kinds, i) && !code; i++)
        code = run_kind(&b);
    if (b.form == JSON && b.n_rows_done) puts("\n]");
    if (b.form == MD && b.n_rows_done) printf("\nkivi %s, %s\n", KIVI_VERSION, b.cpu);
    return code;
}
