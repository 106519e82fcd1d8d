/* harness.cuh: cases of check-cuda: opened, failed once at most, closed with a line. */
#ifndef KI_CUDA_HARNESS_CUH
#define KI_CUDA_HARNESS_CUH
#include "world.cuh"

#include <stdarg.h>
#include <string>
#include <time.h>

static struct { /* one program, one file: this is its state */
    uint64_t seed = 1;
    std::string prefix, golden = "tests/golden", name, why;
    bool small = false, failed = false;
    unsigned n_passed = 0, n_failed = 0, n_skipped = 0;
    double started = 0;
} run;

static double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void check_fail(const char *file, int line, const char *format, ...) {
    if (run.failed) return;
    char text[400];
    const char *slash = strrchr(file, '/');
    int n = snprintf(text, sizeof text, "%s:%d: ", slash ? slash + 1 : file, line);
    va_list args;
    va_start(args, format);
    vsnprintf(text + n, sizeof text - (size_t)n, format, args);
    va_end(args);
    run.failed = true;
    run.why = text;
}
bool check_failed(void) { return run.failed; }

static bool open_case(const std::string &name) {
    if (name.compare(0, run.prefix.size(), run.prefix) != 0) return false;
    run.name = name;
    run.failed = false;
    run.started = seconds();
    return true;
}
static void end_case(const std::string &note = "") {
    double took = seconds() - run.started;
    (run.failed ? run.n_failed : run.n_passed)++;
    printf("%s %s%s%s", run.failed ? "not ok" : "ok", run.name.c_str(), run.failed ? ": " : "",
           run.failed ? run.why.c_str() : "");
    if (!run.failed && !note.empty()) printf(" # %s", note.c_str());
    if (took > 1) printf(" # %.1f s", took);
    printf("\n");
    fflush(stdout);
}
static inline void skip_case(const std::string &why) {
    run.n_skipped++;
    printf("skip %s: %s\n", run.name.c_str(), why.c_str());
    fflush(stdout);
}
static rng case_rng() {
    uint64_t h = run.seed;
    for (char c : run.name) h = h * 0x100000001b3u ^ (uint64_t)(unsigned char)c;
    return rng{h};
}
static std::string text(const char *format, ...) {
    char s[200];
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof s, format, args);
    va_end(args);
    return s;
}

#endif
