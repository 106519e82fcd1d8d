#include "kernel.h"

extern const ki_kernels ki_kernels_scalar;
#if defined(__x86_64__)
extern const ki_kernels ki_kernels_avx2, ki_kernels_avx512, ki_kernels_avx512vnni;
#elif defined(__aarch64__)
extern const ki_kernels ki_kernels_neon, ki_kernels_neondot;
#endif

const ki_kernels *ki_kernels_get(ki_isa isa) {
#if defined(__x86_64__)
    switch (isa) {
    case KI_ISA_AVX2: return &ki_kernels_avx2;
    case KI_ISA_AVX512: return &ki_kernels_avx512;
    case KI_ISA_AVX512VNNI: return &ki_kernels_avx512vnni;
    default: break;
    }
#elif defined(__aarch64__)
    if (isa == KI_ISA_NEON) return &ki_kernels_neon;
    if (isa == KI_ISA_NEONDOT) return &ki_kernels_neondot;
#endif
    (void)isa;
    return &ki_kernels_scalar;
}

/* Must cover scratch_carve in attn_simd.h: three times four rows and sixteen folded ones of floats,
 * sixteen of two planes of bytes. */
size_t ki_attn_scratch_bytes(void) {
    return (3 * 4 + 16) * KI_SCRATCH_ROW * sizeof(float) + 16 * 2 * KI_SCRATCH_BYTE_ROW;
}
