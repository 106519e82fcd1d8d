/* kv_decode_shapes.cuh: the kernels of one head size (KI_HEAD_DIM), included by kv_decode_<D>.cu.
 * Shapes named by bits come first; the last ones take whatever is left. */
#include "kv_decode.cuh"

#define KI_PASTE(a, b) a##b
#define KI_TABLE_OF(d) KI_PASTE(ki_decode_table_, d)

#if KI_HEAD_DIM <= 128
constexpr int WIDE_WARPS = 4;
#else
constexpr int WIDE_WARPS = 2; /* twice the registers, twice the bytes of a unit */
#endif

extern const decode_kernel KI_TABLE_OF(KI_HEAD_DIM)[];
const decode_kernel KI_TABLE_OF(KI_HEAD_DIM)[] = {
#if KI_HEAD_DIM == 64 || KI_HEAD_DIM == 128
    /* D, K bits, V bits, K group, V group, blocks of a unit, warps, stages, thread blocks, plus,
     * most heads */
    decode_entry<decode_shape<KI_HEAD_DIM, 2, 2, 32, 32, 4, 4, 2, 2, false, 1>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 2, 2, 32, 32, 4, 4, 2, 2, false, 4>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 2, 2, 32, 32, 4, 4, 2, 2, false>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 16, 16, 0, 0, 1, 4, 2, 1, false>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 2, 2, 128, 64, 4, 4, 2, 2, true, 1>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 2, 2, 128, 64, 4, 4, 2, 2, true>>(),
#endif
    decode_entry<decode_shape<KI_HEAD_DIM, 0, 0, 0, 0, 1, WIDE_WARPS, 2, 1, false>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 0, 0, 0, 0, 4, WIDE_WARPS, 1, 1, false>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 2, 2, 128, 0, 4, WIDE_WARPS, 2, 1, true>>(),
    decode_entry<decode_shape<KI_HEAD_DIM, 4, 0, 128, 0, 4, WIDE_WARPS, 1, 1, true>>(),
    {},
};
