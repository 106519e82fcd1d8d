/* kv_decode_128.cu: decode attention at head size 128. */
#define KI_HEAD_DIM 128
#include "kv_decode_shapes.cuh"
