/* kv_decode_80.cu: decode attention at head size 80. */
#define KI_HEAD_DIM 80
#include "kv_decode_shapes.cuh"
