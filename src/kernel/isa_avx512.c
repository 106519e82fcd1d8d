/* Skylake-SP: one register of sixteen, byte products by pairs. */
#if defined(__x86_64__)
#define KI_TABLE ki_kernels_avx512
#define KI_TABLE_ISA KI_ISA_AVX512
#include "isa.h"
#else
typedef int ki_isa_avx512_is_for_x86;
#endif
