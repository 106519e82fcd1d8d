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

/* Must cover scratch_carve in attn_simd.h: codes, weights, and four pairs of integer rows. */
size_t ki_attn_scratch_bytes(unsigned head_dim, unsigned n_queries) {
    size_t codes = (size_t)KI_PAGE_TOKENS * head_dim,
           weights = (size_t)n_queries * KI_PAGE_TOKENS * sizeof(float);
    return codes + weights + (size_t)4 * 2 * KI_MAX_HEAD_DIM;
}
