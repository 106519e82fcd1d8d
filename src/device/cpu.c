#include "device.h"

#include <sched.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)
/* Leaf 1, ECX bit 29; clang 14 does not know the name in __builtin_cpu_supports. AVX, whose support
 * by the system that asks for as well, is asked for beside it. */
static bool has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

const char *const ki_isa_names[KI_ISA_COUNT] = {"scalar",     "avx2", "avx512",
                                                "avx512vnni", "neon", "neondot"};
#define KNOWN_NAMES "avx2, avx512, avx512vnni, neon or neondot"

/* The set each is built on. */
static const ki_isa isa_base[KI_ISA_COUNT] = {
    [KI_ISA_SCALAR] = KI_ISA_SCALAR, [KI_ISA_AVX2] = KI_ISA_SCALAR,
    [KI_ISA_AVX512] = KI_ISA_AVX2,   [KI_ISA_AVX512VNNI] = KI_ISA_AVX512,
    [KI_ISA_NEON] = KI_ISA_SCALAR,   [KI_ISA_NEONDOT] = KI_ISA_NEON,
};

bool ki_isa_compiled(ki_isa isa) {
#if defined(__x86_64__)
    return isa <= KI_ISA_AVX512VNNI;
#elif defined(__aarch64__)
    return isa == KI_ISA_SCALAR || isa == KI_ISA_NEON || isa == KI_ISA_NEONDOT;
#else
    return isa == KI_ISA_SCALAR;
#endif
}

#if defined(__x86_64__)
static bool machine_has(ki_isa isa) {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
    case KI_ISA_AVX2: return avx2;
    case KI_ISA_AVX512: return avx512;
    case KI_ISA_AVX512VNNI: return avx512 && __builtin_cpu_supports("avx512vnni");
    default: return isa == KI_ISA_SCALAR;
    }
}
#elif defined(__aarch64__)
/* The kernel's names of FEAT_LSE, FEAT_RDM and FEAT_DotProd: isa_neondot.c is compiled for
 * armv8.2-a+dotprod, so the compiler may use all three. */
static bool machine_has(ki_isa isa) {
    const unsigned long dot = HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_ASIMDDP;
    return isa != KI_ISA_NEONDOT || (getauxval(AT_HWCAP) & dot) == dot;
}
#else
static bool machine_has(ki_isa isa) { return isa == KI_ISA_SCALAR; }
#endif

bool ki_isa_available(ki_isa isa) { return ki_isa_compiled(isa) && machine_has(isa); }

static kivi_status isa_by_name(ki_isa *out, const char *name, size_t n_bytes, kivi_error *err) {
    for (int i = 0; i < KI_ISA_COUNT; i++)
        if (strlen(ki_isa_names[i]) == n_bytes && !memcmp(ki_isa_names[i], name, n_bytes)) {
            *out = (ki_isa)i;
            return KIVI_OK;
        }
    return KI_FAIL(err, ARG, "KIVI_DISABLE: unknown instruction set '%.*s', expected " KNOWN_NAMES,
                   (int)KI_MIN(n_bytes, (size_t)64), name);
}

/* In the order of their bits. */
static uint32_t part_by_name(const char *name, size_t n_bytes) {
    static const char *const names[] = {"fused", "stream",  "norms", "close",
                                        "cudnn", "ranking", "append"};
    for (uint32_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strlen(names[i]) == n_bytes && !memcmp(names[i], name, n_bytes)) return 1u << i;
    return 0;
}

uint32_t ki_parts_disabled(const char *disabled) {
    uint32_t parts = 0;
    for (const char *p = disabled; p && *p;) {
        size_t n = strcspn(p, ",");
        parts |= part_by_name(p, n);
        p += n + (p[n] == ',');
    }
    return parts;
}

kivi_status ki_isa_choose(ki_isa *out, const char *disabled, kivi_error *err) {
    bool off[KI_ISA_COUNT] = {false};
    for (const char *p = disabled; p && *p;) {
        size_t n = strcspn(p, ",");
        if (n && !part_by_name(p, n)) {
            ki_isa isa = KI_ISA_SCALAR;
            KI_TRY(isa_by_name(&isa, p, n, err));
            if (isa == KI_ISA_SCALAR)
                return KI_FAIL(err, ARG, "KIVI_DISABLE: scalar cannot be disabled");
            off[isa] = true;
        }
        p += n + (p[n] == ',');
    }
    *out = KI_ISA_SCALAR;
    for (int i = 1; i < KI_ISA_COUNT; i++) { /* a base comes before what is built on it */
        off[i] = off[i] || off[isa_base[i]];
        if (!off[i] && ki_isa_available((ki_isa)i)) *out = (ki_isa)i;
    }
    return KIVI_OK;
}

unsigned ki_cpu_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set)) return 1;
    int n = CPU_COUNT(&set);
    return n > 0 ? (unsigned)n : 1;
}

/* The control register's reset value. x86, MXCSR: round to nearest, subnormals kept, exceptions
 * masked. aarch64, FPCR: the same, IEEE float16, NaNs handed on; all of that is 0. */
#if defined(__x86_64__)
enum { FPU_DEFAULT = 0x1f80 };
static uint32_t fpu_read(void) { return _mm_getcsr(); }
static void fpu_write(uint32_t state) { _mm_setcsr(state); }
#elif defined(__aarch64__)
enum { FPU_DEFAULT = 0 };
static uint32_t fpu_read(void) {
    uint64_t state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state));
    return (uint32_t)state;
}
static void fpu_write(uint32_t state) { __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)state)); }
#else
enum { FPU_DEFAULT = 0 };
static uint32_t fpu_read(void) { return FPU_DEFAULT; }
static void fpu_write(uint32_t state) { (void)state; }
#endif

ki_fpu ki_fpu_enter(void) {
    ki_fpu fpu = {fpu_read()};
    fpu_write(FPU_DEFAULT);
    return fpu;
}

void ki_fpu_leave(ki_fpu fpu) { fpu_write(fpu.saved); }
