/* Every aarch64: four registers of four, byte products by widening multiplies. */
#if defined(__aarch64__)
#define KI_SIMD_NEON
#define KI_TABLE ki_kernels_neon
#define KI_TABLE_ISA KI_ISA_NEON
#include "isa.h"
#else
typedef int ki_isa_neon_is_for_aarch64;
#endif
