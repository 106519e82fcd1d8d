/* bench-cuda [--plain] [--short]: the report of `kivi bench attention --device cuda` in a program
 * of its own, to be carried to a machine that has a GPU and nothing else. */
#include "kv_bench.h"

#include <stdio.h>
#include <string.h>

static void print_line(void *, const char *text) {
    puts(text);
    fflush(stdout);
}

int main(int argc, char **argv) {
    ki_cuda_bench_options o = {};
    kivi_error error = {};
    o.pdl = true;
    o.line = print_line;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--plain")) o.pdl = false;
        else if (!strcmp(argv[i], "--short")) o.is_short = true;
        else return fprintf(stderr, "bench-cuda [--plain] [--short]\n"), 2;
    }
    if (ki_cuda_bench_attention(&o, &error) == KIVI_OK) return 0;
    fprintf(stderr, "bench-cuda: %s\n", error.text);
    return 4;
}
