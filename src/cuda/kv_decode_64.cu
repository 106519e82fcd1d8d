/* kv_decode_64.cu: decode attention at head size 64. */
#define KI_HEAD_DIM 64
#include "kv_decode_shapes.cuh"
