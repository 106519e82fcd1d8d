/* Neoverse N1, Cortex-A55 and A76, Apple M1 and later: byte products in one instruction. */
#if defined(__aarch64__)
#define KI_SIMD_NEON
#define KI_TABLE ki_kernels_neondot
#define KI_TABLE_ISA KI_ISA_NEONDOT
#include "isa.h"
#else
typedef int ki_isa_neondot_is_for_aarch64;
#endif
