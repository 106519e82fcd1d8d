/* Sixteen lanes as loops: every machine. */
#define KI_TABLE ki_kernels_scalar
#define KI_TABLE_ISA KI_ISA_SCALAR
#include "isa.h"
