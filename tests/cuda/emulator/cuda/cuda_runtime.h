/* cuda_runtime.h: what a kernel file gets for it when it is compiled for the emulator. */
#include <emulator/cuda.cuh>
