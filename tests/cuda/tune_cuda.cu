/* tune-cuda: decode attention in other shapes of its kernel than those of kv_shared.h's list, at
 * several split sizes: what the choice rests on. tune-cuda [kivi2|plus|half [GB/s [pdl]]]: of one
 * kind, as shares of that stream, without plain launches. tune-cuda short [batch [heads [KV
 * heads]]]: microseconds at short contexts, window and sinks included, as the library launches
 * them; builds of two commits are compared so. */
#include "kv_bench.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct candidate {
    const char *name;
    decode_kernel kernel;
};

/* blocks of a unit, warps, stages, thread blocks a multiprocessor */
#define KIVI2(nb, w, s, b)                                                                         \
    {                                                                                              \
        "nb" #nb " w" #w " s" #s " b" #b,                                                          \
            decode_entry<decode_shape<128, 2, 2, 32, 32, nb, w, s, b, false>>()                    \
    }
#define PLUS2(w, s, b)                                                                             \
    { "w" #w " s" #s " b" #b, decode_entry<decode_shape<128, 2, 2, 128, 64, 4, w, s, b, true>>() }
/* most heads of a KV head: of 8 every shape takes any number */
#define KIVI2_OF(h)                                                                                \
    { "heads " #h, decode_entry<decode_shape<128, 2, 2, 32, 32, 4, 4, 2, 2, false, h>>() }
#define PLUS2_OF(h)                                                                                \
    { "heads " #h, decode_entry<decode_shape<128, 2, 2, 128, 64, 4, 4, 2, 2, true, h>>() }
#define HALF(w, s, b)                                                                              \
    { "w" #w " s" #s " b" #b, decode_entry<decode_shape<128, 16, 16, 0, 0, 1, w, s, b, false>>() }

static const candidate kivi2_list[] = {
    KIVI2(4, 4, 2, 2), KIVI2_OF(1),       KIVI2_OF(4),       KIVI2(2, 4, 2, 3), KIVI2(4, 3, 2, 3),
    KIVI2(2, 3, 3, 4), KIVI2(1, 4, 4, 4), KIVI2(4, 4, 1, 3), KIVI2(4, 3, 1, 4),
};
static const candidate plus_list[] = {PLUS2(4, 2, 2), PLUS2_OF(1),    PLUS2_OF(4),
                                      PLUS2(2, 2, 5), PLUS2(5, 2, 2), PLUS2(3, 2, 3),
                                      PLUS2(4, 1, 3), PLUS2(3, 1, 4)};
static const candidate half_list[] = {HALF(4, 2, 1), HALF(2, 2, 3)};

static double read_gbs = 3198; /* the stream of this card, for the percentages */
static bool skips_plain;       /* launches without programmatic dependent launch */

static kivi_status tune(const char *kind_name, const bench_kind &kind, const bench_shape &s,
                        const candidate *list, size_t n, kivi_error *err) {
    bench_batch b;
    KI_TRY(b.ki_make(s, kind, 1ull << 30, 24, err));
    double mb = b.packed_bytes() * 1e-6;
    for (size_t i = 0; i < n; i++) {
        const decode_kernel *k = &list[i].kernel;
        if (k->heads < 8 && k->heads < b.l.head_group) continue;
        KI_TRY(ki_cuda_check(k->prepare(), list[i].name, err));
        b.l.unit_subs = k->unit_subs;
        printf("%-7s B%-2u %2u/%-2u T%-6u %-12s", kind_name, s.batch, s.n_heads, s.n_kv_heads,
               s.tokens, list[i].name);
        uint64_t rows = (uint64_t)s.batch * s.n_kv_heads;
        static const uint32_t slots[] = {0, 264, 396, 528, 792, 1056, 2112, 4224};
        uint32_t last = 0;
        for (uint32_t slot : slots) { /* splits that make about so many thread blocks */
            uint32_t splits = (uint32_t)(slot / rows);
            if (splits < 1) splits = 1;
            if (splits == last) continue;
            last = splits;
            uint32_t tokens = (s.tokens + splits - 1) / splits;
            if (tokens < 256) continue;
            for (int pdl = skips_plain; pdl < 2; pdl++) {
                double us = 0;
                KI_TRY(b.ki_plan(tokens, 0, pdl, err));
                kivi_status status = time_launches(
                    &us, bench_launches(b, mb / 2.0), 11,
                    [&](uint32_t launch, cudaStream_t stream) {
                        return ki_cuda_decode_attend_by(&b.calls[launch % b.n_sets], k, k->warps,
                                                        stream, err);
                    },
                    err);
                if (status != KIVI_OK) return status;
                if (pdl == skips_plain) printf("  x%u", splits);
                printf(pdl ? " /%.1f" : " %.1f", mb / us * 1e5 / read_gbs);
            }
        }
        printf("\n");
        fflush(stdout);
    }
    return KIVI_OK;
}

/* A row for each kind: one split a sequence, programmatic dependent launch. */
static kivi_status tune_short(uint32_t batch, uint32_t n_heads, uint32_t n_kv_heads,
                              kivi_error *err) {
    static const bench_kind kinds[] = {
        {"kivi2", 2, 2, 128, false, false}, {"kivi2+", 2, 2, 128, true, false},
        {"k4v2+", 4, 2, 128, true, false},  {"k4v3+", 4, 3, 128, true, false},
        {"f16", 16, 16, 128, false, false}, {"kivi2 R32", 2, 2, 32, false, false}};
    static const uint32_t lengths[] = {128, 160, 200, 256, 300, 384, 450, 512, 1024, 4096};
    printf("B%u %u/%u, us at ", batch, n_heads, n_kv_heads);
    for (uint32_t n : lengths) printf(" %u", n);
    printf(" tokens\n");
    for (const bench_kind &kind : kinds) {
        printf("%-10s", kind.name);
        for (uint32_t n : lengths) {
            bench_batch b;
            double us = 0;
            KI_TRY(b.ki_make({batch, n_heads, n_kv_heads, n}, kind, 1ull << 30, 24, err));
            KI_TRY(b.ki_plan(n + 1, 0, true, err));
            KI_TRY(time_launches(
                &us, bench_launches(b, 50), 21,
                [&](uint32_t launch, cudaStream_t stream) {
                    return ki_cuda_decode_attend(&b.calls[launch % b.n_sets], stream, err);
                },
                err));
            printf(" %7.2f", us);
            fflush(stdout);
        }
        printf("\n");
    }
    return KIVI_OK;
}

static int say(const kivi_error *error) {
    fprintf(stderr, "tune-cuda: %s\n", error->text);
    return 4;
}

static uint32_t number(int argc, char **argv, int i, uint32_t otherwise) {
    return argc > i ? (uint32_t)strtoul(argv[i], NULL, 10) : otherwise;
}

int main(int argc, char **argv) {
    kivi_error error = {}, *err = &error;
    uint32_t shared_bytes;
    static const bench_shape shapes[] = {{32, 32, 32, 4096},
                                         {32, 32, 8, 8192},
                                         {8, 32, 8, 32768},
                                         {1, 32, 8, 131072},
                                         {8, 32, 32, 32768}};
    const bench_kind kivi2 = {"kivi2", 2, 2, 128, false, true},
                     plus = {"kivi2+", 2, 2, 128, true, true};
    const bench_kind half = {"f16", 16, 16, 128, false, true};
    const char *only = argc > 1 ? argv[1] : "";
    if (!strcmp(only, "short")) {
        kivi_status status = ki_cuda_kernels_init(&shared_bytes, err);
        if (status == KIVI_OK)
            status = tune_short(number(argc, argv, 2, 32), number(argc, argv, 3, 32),
                                number(argc, argv, 4, 32), err);
        return status == KIVI_OK ? 0 : say(err);
    }
    if (argc > 2) read_gbs = atof(argv[2]);
    skips_plain = argc > 3;
    printf("percent of %.0f GB/s, plain / with programmatic dependent launch, by splits of a row\n",
           read_gbs);
    for (const bench_shape &s : shapes) {
        kivi_status status = KIVI_OK;
        if (strstr("kivi2", only))
            status =
                tune("kivi2", kivi2, s, kivi2_list, sizeof kivi2_list / sizeof *kivi2_list, err);
        if (status == KIVI_OK && strstr("plus", only))
            status = tune("kivi2+", plus, s, plus_list, sizeof plus_list / sizeof *plus_list, err);
        if (status == KIVI_OK && strstr("half", only) && s.batch * s.n_kv_heads <= 256)
            status = tune("f16", half, s, half_list, sizeof half_list / sizeof *half_list, err);
        if (status != KIVI_OK) return say(err);
    }
    return 0;
}
