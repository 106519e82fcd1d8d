/* kv_decode_shapes.cuh: the kernels of one head size (KI_HEAD_DIM), included by kv_decode_<D>.cu,
 * in the order of kv_shared.h's list, which the choice goes by. */
#include "kv_decode_launch.cuh"

#define KI_PASTE(a, b) a##b
#define KI_TABLE_OF(d) KI_PASTE(ki_decode_table_, d)
#define KI_ENTRY(...) decode_entry<decode_shape<KI_HEAD_DIM, __VA_ARGS__>>(),

extern const decode_kernel KI_TABLE_OF(KI_HEAD_DIM)[];
const decode_kernel KI_TABLE_OF(KI_HEAD_DIM)[] = {
#if KI_DECODE_HAS_NAMED(KI_HEAD_DIM)
    KI_DECODE_NAMED(KI_ENTRY)
#endif
        KI_DECODE_OTHER(KI_ENTRY, KI_DECODE_WARPS(KI_HEAD_DIM)){},
};
