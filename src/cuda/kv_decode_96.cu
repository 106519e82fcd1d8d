/* kv_decode_96.cu: decode attention at head size 96. */
#define KI_HEAD_DIM 96
#include "kv_decode_shapes.cuh"
