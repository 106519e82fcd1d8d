/* Cascade Lake, Ice Lake, Zen 4 and later: byte products in one instruction. */
#if defined(__x86_64__)
#define KI_TABLE ki_kernels_avx512vnni
#define KI_TABLE_ISA KI_ISA_AVX512VNNI
#include "isa.h"
#else
typedef int ki_isa_avx512vnni_is_for_x86;
#endif
