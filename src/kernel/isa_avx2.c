/* Haswell, Zen 1 and later: two registers of eight. */
#if defined(__x86_64__)
#define KI_TABLE ki_kernels_avx2
#define KI_TABLE_ISA KI_ISA_AVX2
#include "isa.h"
#else
typedef int ki_isa_avx2_is_for_x86;
#endif
