/* cuda_bf16.h: bfloat16 has its few functions in cuda.cuh. */
#include <emulator/cuda.cuh>
