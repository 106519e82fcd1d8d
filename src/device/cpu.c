#include "device.h"

#include <sched.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* Leaf 1, ECX bit 29; clang 14 does not know the name in __builtin_cpu_supports. AVX, whose support
 * by the system that asks for as well, is asked for beside it. */
static bool has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

const char *const ki_isa_names[KI_ISA_COUNT] = {"scalar", "avx2", "avx512", "avx512vnni"};

bool ki_isa_available(ki_isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
    case KI_ISA_SCALAR: return true;
    case KI_ISA_AVX2: return avx2;
    case KI_ISA_AVX512: return avx512;
    case KI_ISA_AVX512VNNI: return avx512 && __builtin_cpu_supports("avx512vnni");
    default: return false;
    }
#else
    return isa == KI_ISA_SCALAR;
#endif
}

static kivi_status isa_by_name(ki_isa *out, const char *name, size_t n_bytes, kivi_error *err) {
    for (int i = 0; i < KI_ISA_COUNT; i++)
        if (strlen(ki_isa_names[i]) == n_bytes && !memcmp(ki_isa_names[i], name, n_bytes)) {
            *out = (ki_isa)i;
            return KIVI_OK;
        }
    return KI_FAIL(
        err, ARG,
        "KIVI_DISABLE: unknown instruction set '%.*s', expected avx2, avx512 or avx512vnni",
        (int)KI_MIN(n_bytes, (size_t)64), name);
}

kivi_status ki_isa_choose(ki_isa *out, const char *disabled, kivi_error *err) {
    int richest = KI_ISA_COUNT - 1;
    for (const char *p = disabled; p && *p;) {
        size_t n = strcspn(p, ",");
        if (n) {
            ki_isa isa = KI_ISA_SCALAR;
            KI_TRY(isa_by_name(&isa, p, n, err));
            if (isa == KI_ISA_SCALAR)
                return KI_FAIL(err, ARG, "KIVI_DISABLE: scalar cannot be disabled");
            richest = KI_MIN(richest, (int)isa - 1);
        }
        p += n + (p[n] == ',');
    }
    while (!ki_isa_available((ki_isa)richest)) richest--;
    *out = (ki_isa)richest;
    return KIVI_OK;
}

unsigned ki_cpu_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set)) return 1;
    int n = CPU_COUNT(&set);
    return n > 0 ? (unsigned)n : 1;
}

/* MXCSR's reset value: round to nearest, subnormals kept, exceptions masked. */
enum { MXCSR_DEFAULT = 0x1f80 };

ki_fpu ki_fpu_enter(void) {
    ki_fpu fpu = {0};
#if defined(__x86_64__)
    fpu.saved = _mm_getcsr();
    _mm_setcsr(MXCSR_DEFAULT);
#endif
    return fpu;
}

void ki_fpu_leave(ki_fpu fpu) {
#if defined(__x86_64__)
    _mm_setcsr(fpu.saved);
#else
    (void)fpu;
#endif
}
