/* Choosing an instruction set, worker threads, the floating-point state of the caller. */
#include "check.h"

#include <fenv.h>
#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
/* FTZ and DAZ; compared without the flags that computing sets. */
enum { HOSTILE = 0x8040, MODE_BITS = 0xffc0 };
static uint32_t fpu_read(void) { return _mm_getcsr(); }
static void fpu_write(uint32_t state) { _mm_setcsr(state); }
#elif defined(__aarch64__)
/* FZ16, FZ, DN, and AHP, which gives float16 another meaning. */
enum { HOSTILE = 1 << 19 | 1 << 24 | 1 << 25 | 1 << 26, MODE_BITS = HOSTILE | 3 << 22 };
static uint32_t fpu_read(void) {
    uint64_t state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state));
    return (uint32_t)state;
}
static void fpu_write(uint32_t state) { __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)state)); }
#endif

/* The first of a list, richest first, that this machine has. */
static ki_isa first_available(const int *list) {
    while (!ki_isa_available((ki_isa)*list)) list++;
    return (ki_isa)*list;
}

static void choose(void) {
    if (!check_case("cpu/choose")) return;
    enum {
        NONE = KI_ISA_SCALAR,
        A2 = KI_ISA_AVX2,
        A512 = KI_ISA_AVX512,
        VNNI = KI_ISA_AVX512VNNI,
        NEON = KI_ISA_NEON,
        DOT = KI_ISA_NEONDOT
    };
    /* what may be chosen, richest first; a machine has one architecture's at most */
    static const struct {
        const char *disabled;
        int left[KI_ISA_COUNT];
    } good[] = {{NULL, {DOT, NEON, VNNI, A512, A2}},
                {"", {DOT, NEON, VNNI, A512, A2}},
                {"avx512vnni", {DOT, NEON, A512, A2}},
                {"avx512", {DOT, NEON, A2}},
                {"avx2", {DOT, NEON}},
                {"avx512,avx2", {DOT, NEON}},
                {"avx2,avx512vnni", {DOT, NEON}},
                {"avx512vnni,", {DOT, NEON, A512, A2}},
                {",avx512", {DOT, NEON, A2}},
                {",,", {DOT, NEON, VNNI, A512, A2}},
                {"neon", {VNNI, A512, A2}},
                {"neondot", {NEON, VNNI, A512, A2}},
                {"neondot,neon", {VNNI, A512, A2}},
                {"neon,avx512", {A2}},
                {"avx512vnni,neondot", {NEON, A512, A2}},
                {"avx2,neon", {NONE}},
                {"stream,norms,close,fused", {DOT, NEON, VNNI, A512, A2}},
                {"cudnn,avx512,neon", {A2}}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        ki_isa isa = KI_ISA_COUNT;
        CHECK_OK(ki_isa_choose(&isa, good[i].disabled, err));
        CHECK(isa == first_available(good[i].left), "'%s' gives %d", good[i].disabled, (int)isa);
    }
    static const char *const bad[] = {"avx",   "avx5122",         "AVX2",   "avx2;avx512",
                                      " avx2", "avx512,nonsense", "scalar", "neond",
                                      "strea", "fused2"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ki_isa isa;
        kivi_error err = {0};
        CHECK(ki_isa_choose(&isa, bad[i], &err) == KIVI_ARG && err.text[0], "'%s' is accepted",
              bad[i]);
    }
    static const struct {
        const char *disabled;
        uint32_t parts;
    } parts[] = {{NULL, 0},
                 {"avx2", 0},
                 {"fused", KI_PART_FUSED},
                 {"stream,avx2,norms", KI_PART_STREAM | KI_PART_NORMS},
                 {",cudnn,,close", KI_PART_CUDNN | KI_PART_CLOSE},
                 {"ranking,append", KI_PART_RANKING | KI_PART_APPEND}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        CHECK(ki_parts_disabled(parts[i].disabled) == parts[i].parts, "'%s' leaves out %u",
              parts[i].disabled, ki_parts_disabled(parts[i].disabled));
    for (int i = 0; i < KI_ISA_COUNT; i++)
        if (ki_isa_available((ki_isa)i))
            CHECK(ki_isa_compiled((ki_isa)i) && ki_kernels_get((ki_isa)i)->isa == (ki_isa)i,
                  "table %d", i);
    CHECK(ki_isa_available(KI_ISA_SCALAR) && !ki_isa_available(KI_ISA_COUNT), "availability");
    CHECK(ki_cpu_count() >= 1, "no processor");
    check_end();
}

/* ---- workers ---- */

enum { MAX_TASKS = 600 };
typedef struct tally {
    _Atomic unsigned counts[MAX_TASKS], bad_workers;
    unsigned n_threads;
} tally;

static void count_task(void *context, size_t index, unsigned worker) {
    tally *t = context;
    atomic_fetch_add(&t->counts[index], 1);
    if (worker >= t->n_threads) atomic_fetch_add(&t->bad_workers, 1);
}

static void workers(unsigned n_threads) {
    if (!check_case("workers/run/%u", n_threads)) return;
    ki_mem mem;
    ki_mem_init(&mem);
    ki_workers *w = NULL;
    CHECK_OK(ki_workers_create(&w, &mem, n_threads, err));
    rng r = check_rng();
    static tally t;
    memset(&t, 0, sizeof t);
    t.n_threads = n_threads;
    unsigned want[MAX_TASKS] = {0};
    if (w) CHECK(ki_workers_count(w) == n_threads, "count");
    for (int round = 0; w && round < 3000; round++) {
        uint32_t n = round % 100 == 99 ? MAX_TASKS : rng_below(&r, 12);
        ki_workers_run(w, count_task, &t, n);
        for (uint32_t i = 0; i < n; i++) want[i]++;
        if (round % 500 == 0) { /* long enough for the others to fall asleep */
            double until = check_seconds() + 0.003;
            while (check_seconds() < until) {
            }
        }
        for (uint32_t i = 0; i < MAX_TASKS && round % 50 == 0; i++)
            CHECK(atomic_load(&t.counts[i]) == want[i], "round %d: task %u ran %u times, not %u",
                  round, i, atomic_load(&t.counts[i]), want[i]);
    }
    for (uint32_t i = 0; i < MAX_TASKS; i++)
        CHECK(atomic_load(&t.counts[i]) == want[i], "task %u", i);
    CHECK(!atomic_load(&t.bad_workers), "worker index");
    ki_workers_destroy(&w);
    ki_workers_destroy(&w);
    CHECK(!w && atomic_load(&mem.n_blocks) == 0, "leak");
    check_end();
}

static void workers_bad(void) {
    if (!check_case("workers/errors")) return;
    ki_mem mem;
    ki_mem_init(&mem);
    ki_workers *w = NULL;
    CHECK(ki_workers_create(&w, &mem, 0, NULL) == KIVI_ARG && !w, "0 threads");
    CHECK(ki_workers_create(&w, &mem, 100000, NULL) == KIVI_ARG && !w, "100,000 threads");
    for (int64_t n = 1; n <= 2; n++) {
        atomic_store(&mem.fail_countdown, n);
        CHECK(ki_workers_create(&w, &mem, 3, NULL) == KIVI_NOMEM && !w, "allocation %d", (int)n);
        CHECK(atomic_load(&mem.n_blocks) == 0, "leak after failing allocation %d", (int)n);
    }
    atomic_store(&mem.fail_countdown, -1);
    for (int i = 0; i < 50; i++) { /* ends at once */
        CHECK_OK(ki_workers_create(&w, &mem, 4, err));
        ki_workers_destroy(&w);
    }
    CHECK(atomic_load(&mem.n_blocks) == 0, "leak");
    check_end();
}

/* ---- the caller's floating-point state ---- */

typedef struct quant_out {
    uint8_t codes[64 * 32];
    uint16_t scale[64], zero[64];
} quant_out;

static void quantize_all(quant_out *out, const uint16_t *x, const ki_quant_kernels *kernels) {
    for (unsigned bits = 2, i = 0; bits <= 8; bits *= 2, i++) {
        size_t first = i * 16, n = 16;
        kernels->quantize(out->codes + first * 32, out->scale + first, out->zero + first,
                          x + first * 32, n, 32, bits);
    }
}

static void hostile_fpu(ki_isa isa) {
    if (!check_case_isa(isa, "cpu/fpu-mode")) return;
#if defined(__x86_64__) || defined(__aarch64__)
    const ki_quant_kernels *kernels = &ki_kernels_get(isa)->quant;
    const ki_dense_kernels *dense = &ki_kernels_get(isa)->dense;
    rng r = check_rng();
    uint16_t x[64 * 32];
    float y[256], e_want[256], e_got[256], e_other[256];
    for (size_t i = 0; i < 256; i++) y[i] = rng_normal(&r);
    for (size_t i = 0; i < 64 * 32; i++) {
        float scale = i / 32 % 2 ? 2e-7f : 1.0f; /* every second group is subnormal in float16 */
        x[i] = ki_f32_to_f16(rng_normal(&r) * scale);
    }
    static quant_out want, got;
    memset(&want, 0, sizeof want);
    memset(&got, 0, sizeof got);
    quantize_all(&want, x, kernels);
    dense->exp(e_want, y, 256);
    static const int modes[] = {FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
    for (size_t m = 0; m < 3; m++) {
        uint32_t before = fpu_read();
        fesetround(modes[m]);
        fpu_write(fpu_read() | HOSTILE);
        uint32_t hostile = fpu_read();
        dense->exp(e_other, y, 256); /* so that the mode is known to matter */
        ki_fpu fpu = ki_fpu_enter();
        quantize_all(&got, x, kernels);
        dense->exp(e_got, y, 256);
        ki_fpu_leave(fpu);
        uint32_t after = fpu_read();
        fesetround(FE_TONEAREST);
        fpu_write(before);
        CHECK((hostile & MODE_BITS) != (before & MODE_BITS), "mode %zu cannot be set", m);
        CHECK((after & MODE_BITS) == (hostile & MODE_BITS), "the caller's state is not given back");
        CHECK(!memcmp(&want, &got, sizeof want) && !memcmp(e_want, e_got, sizeof e_want),
              "bytes differ under rounding mode %zu", m);
        CHECK(memcmp(e_want, e_other, sizeof e_want), "mode %zu makes no difference", m);
    }
#endif
    check_end();
}

/* Scalar code may use x87 or the library's rounding: rintf and the conversions must not see the
 * caller's mode. */
static void hostile_scalar(void) {
    if (!check_case("cpu/fpu-mode/definition")) return;
    static quant_out want, got;
    ki_quant_kernels kernels = {.quantize = ki_quantize_scalar};
    rng r = check_rng();
    uint16_t x[64 * 32];
    for (size_t i = 0; i < 64 * 32; i++) x[i] = ki_f32_to_f16(rng_normal(&r));
    quantize_all(&want, x, &kernels);
    fesetround(FE_DOWNWARD);
    ki_fpu fpu = ki_fpu_enter();
    quantize_all(&got, x, &kernels);
    ki_fpu_leave(fpu);
    fesetround(FE_TONEAREST);
    CHECK(!memcmp(&want, &got, sizeof want), "bytes differ under FE_DOWNWARD");
    check_end();
}

void check_device(void) {
    choose();
    static const unsigned counts[] = {1, 2, 3, 8};
    for (size_t i = 0; i < 4; i++) workers(counts[i]);
    workers_bad();
    for (int i = 0; i < KI_ISA_COUNT; i++) hostile_fpu((ki_isa)i);
    hostile_scalar();
}
