/* check-kernels: tests of src/base, src/device, src/kernel and src/cache in one program without
 * libraries. */
#include "check.h"

#include <stdarg.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

check_options check_opt = {.prefix = "", .seed = 1};

static struct {
    char name[160], why[400], note[200];
    bool open, failed;
    unsigned n_passed, n_failed, n_skipped;
    double started;
} state;

double check_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static bool open_case(void) {
    if (strncmp(state.name, check_opt.prefix, strlen(check_opt.prefix)) != 0) return false;
    if (check_opt.list) {
        puts(state.name);
        return false;
    }
    state.failed = false;
    state.open = true;
    state.why[0] = state.note[0] = 0;
    state.started = check_seconds();
    return true;
}

bool check_case(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(state.name, sizeof state.name, format, args);
    va_end(args);
    return open_case();
}

void check_skip(const char *why) {
    printf("skip %s: %s\n", state.name, why);
    state.n_skipped++;
    state.open = false;
}

bool check_case_isa(ki_isa isa, const char *format, ...) {
    char base[128];
    va_list args;
    va_start(args, format);
    vsnprintf(base, sizeof base, format, args);
    va_end(args);
    snprintf(state.name, sizeof state.name, "%s/%s", base, ki_isa_names[isa]);
    if (check_opt.isa && strcmp(check_opt.isa, ki_isa_names[isa]) != 0) return false;
    if (!ki_isa_compiled(isa)) return false; /* another architecture's: its own program has it */
    if (!open_case()) return false;
    if (ki_isa_available(isa)) return true;
    char why[64];
    snprintf(why, sizeof why, "this machine has no %s", ki_isa_names[isa]);
    check_skip(why);
    return false;
}

void check_fail(const char *file, int line, const char *format, ...) {
    if (state.failed) return; /* the first reason is the one to read */
    const char *slash = strrchr(file, '/');
    int n = snprintf(state.why, sizeof state.why, "%s:%d: ", slash ? slash + 1 : file, line);
    va_list args;
    va_start(args, format);
    vsnprintf(state.why + n, sizeof state.why - (size_t)n, format, args);
    va_end(args);
    state.failed = true;
}

bool check_failed(void) { return state.failed; }

void check_note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(state.note, sizeof state.note, format, args);
    va_end(args);
}

void check_end(void) {
    double took = check_seconds() - state.started;
    state.open = false;
    if (state.failed) {
        printf("not ok %s: %s\n", state.name, state.why);
        state.n_failed++;
    } else {
        printf("ok %s%s%s", state.name, state.note[0] ? " # " : "", state.note);
        if (took > 1) printf(" # %.1f s", took);
        putchar('\n');
        state.n_passed++;
    }
    fflush(stdout);
}

bool check_wants(const char *group) {
    size_t n = strlen(group), m = strlen(check_opt.prefix);
    return strncmp(group, check_opt.prefix, n < m ? n : m) == 0;
}

/* ---- random numbers: splitmix64 ---- */

rng rng_make(uint64_t seed) { return (rng){seed}; }

uint64_t rng_u64(rng *r) {
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint64_t hash_u64(uint64_t a, uint64_t b) {
    rng r = {a * 0x9e3779b97f4a7c15u ^ b};
    rng_u64(&r);
    return rng_u64(&r) ^ a;
}

rng check_rng(void) {
    uint64_t h = check_opt.seed;
    for (const char *p = state.name; *p; p++) h = hash_u64(h, (uint64_t)(unsigned char)*p);
    return rng_make(h);
}

uint32_t rng_below(rng *r, uint32_t n) { return (uint32_t)((rng_u64(r) >> 32) * n >> 32); }

double rng_unit(rng *r) { return (double)(rng_u64(r) >> 11) * 0x1p-53; }

/* Sum of four uniforms of 16 bits, scaled to deviation 1: near enough to normal, cheap, and the
 * same everywhere. */
float rng_normal(rng *r) {
    uint64_t u = rng_u64(r);
    uint32_t sum = (uint32_t)((u & 0xffff) + (u >> 16 & 0xffff) + (u >> 32 & 0xffff) + (u >> 48));
    return ((float)sum - 131070.0f) * (1.0f / 37837.0f);
}

/* ---- memory ---- */

void *check_alloc(size_t n_bytes) {
    size_t total = (n_bytes + 64 + 63) / 64 * 64;
    void *p = aligned_alloc(64, total);
    if (!p) {
        fprintf(stderr, "check-kernels: no memory for %zu bytes\n", n_bytes);
        exit(2);
    }
    return memset(p, 0, total);
}

guard guard_alloc(size_t n_bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (n_bytes + page - 1) / page * page;
    guard g = {.map_bytes = body + 2 * page};
    g.map = mmap(NULL, g.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect(g.map + page, body, PROT_READ | PROT_WRITE)) {
        fprintf(stderr, "check-kernels: no guarded memory for %zu bytes\n", n_bytes);
        exit(2);
    }
    g.data = g.map + page + body - n_bytes;
    return g;
}

void guard_free(guard *g) { munmap(g->map, g->map_bytes); }

/* ---- the program ---- */

static bool option(const char *arg, const char *name, const char **value) {
    size_t n = strlen(name);
    if (strncmp(arg, name, n) != 0 || arg[n] != '=') return false;
    *value = arg + n + 1;
    return true;
}

static int usage(void) {
    fputs("check-kernels [--list] [--test=PREFIX] [--seed=N] [--isa=NAME] [--long] [--bench] "
          "[--digest]\n",
          stderr);
    return 2;
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *value = NULL;
        if (!strcmp(argv[i], "--list")) check_opt.list = true;
        else if (!strcmp(argv[i], "--long")) check_opt.thorough = true;
        else if (!strcmp(argv[i], "--bench")) check_opt.bench = true;
        else if (!strcmp(argv[i], "--digest")) check_opt.digest = true;
        else if (option(argv[i], "--test", &value)) check_opt.prefix = value;
        else if (option(argv[i], "--isa", &value)) check_opt.isa = value;
        else if (option(argv[i], "--seed", &value)) check_opt.seed = strtoull(value, NULL, 0);
        else return usage();
    }
    if (check_opt.bench || check_opt.digest) {
        check_opt.bench ? check_bench() : check_digest();
        return 0;
    }
    if (!check_opt.list) printf("seed %llu\n", (unsigned long long)check_opt.seed);
    check_base();
    check_device();
    check_quant();
    check_pack();
    check_plus();
    check_dense();
    check_kinds();
    check_attn();
    check_cache();
    check_cache_random();
    check_memory();
    check_save();
    check_cuda();
    if (check_opt.list) return 0;
    printf("%u passed, %u failed, %u skipped\n", state.n_passed, state.n_failed, state.n_skipped);
    return state.n_failed != 0;
}
