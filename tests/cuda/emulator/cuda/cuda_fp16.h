/* cuda_fp16.h: float16 has its few functions in cuda.cuh. */
#include <emulator/cuda.cuh>
