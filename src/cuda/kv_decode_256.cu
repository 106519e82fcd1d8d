/* kv_decode_256.cu: decode attention at head size 256. */
#define KI_HEAD_DIM 256
#include "kv_decode_shapes.cuh"
