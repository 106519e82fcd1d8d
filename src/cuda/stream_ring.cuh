/* stream_ring.cuh: stages in shared memory that one warp fills and others read: barriers, copies of
 * boxes of 64 columns of 16 bits, and what reads them. A row of a box is 128 bytes; its piece c of
 * 16 bytes stands at c ^ (row % 8), as the tensor copy's 128-byte swizzle has it. */
#ifndef KI_STREAM_RING_CUH
#define KI_STREAM_RING_CUH
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t ki_shared(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Parts that the columns are cut into (stream.h). */
static inline uint32_t ki_stream_parts(uint32_t n) { return n <= 2048 ? 8 : n <= 8192 ? 4 : 1; }

/* ---- barriers ---- */

static __device__ __forceinline__ void ki_bar_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
static __device__ __forceinline__ void ki_bar_fence(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
static __device__ __forceinline__ void ki_bar_arrive(uint32_t bar) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(bar)
                 : "memory");
}
static __device__ __forceinline__ void ki_bar_wait(uint32_t bar, uint32_t parity) {
    uint32_t done = 0;
    while (!done)
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p; }"
#else
        asm volatile("{ .reg .pred p;\n"
                     "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p; }"
#endif
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
}

/* ---- copies: by one lane on sm_90, by a warp's lanes before ---- */

#if __CUDA_ARCH__ >= 900
enum { KI_FILLERS = 1 }; /* lanes that arrive at a stage's barrier */
#else
enum { KI_FILLERS = 32 };
#endif

/* A matrix [n_rows][n_cols] of 16 bits, n_cols a multiple of 8. */
typedef struct ki_boxes {
    const CUtensorMap *map; /* sm_90: of boxes of box_rows */
    const uint8_t *data;
    uint32_t n_rows, n_cols, box_rows;
    uint64_t policy; /* of the second cache */
} ki_boxes;

static __device__ __forceinline__ uint64_t ki_leave_first(void) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ uint64_t ki_leave_last(void) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* Host: [n_rows][n_cols] of 16 bits in boxes of box_rows; the function is the driver's. */
static inline cudaError_t ki_make_map(CUtensorMap *map, const void *data, uint32_t n_rows,
                                      uint32_t n_cols, uint32_t box_rows) {
    typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                  const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                  const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    const cuuint64_t sizes[] = {n_cols, n_rows}, strides[] = {(cuuint64_t)n_cols * 2};
    const cuuint32_t box[] = {64, box_rows}, steps[] = {1, 1};
    cudaDriverEntryPointQueryResult found;
    void *f = NULL;
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                     cudaEnableDefault, &found);
    if (e != cudaSuccess) return e;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
    CUresult r =
        ((encode_fn)f)(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, (void *)data, sizes, strides, box,
                       steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

/* Before the copies of a stage. */
static __device__ __forceinline__ void ki_begin_stage(uint32_t full, uint32_t n_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(n_bytes)
                 : "memory");
#endif
}
/* After them. */
static __device__ __forceinline__ void ki_end_stage(uint32_t full) {
#if __CUDA_ARCH__ < 900
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
#endif
}
/* A box to `to`, a multiple of 1,024; what lies outside of the matrix is 0. */
static __device__ __forceinline__ void ki_bring(uint32_t to, const ki_boxes &b, uint32_t row,
                                                uint32_t col, uint32_t full) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(b.map), "r"(col), "r"(row), "r"(full), "l"(b.policy)
                 : "memory");
#else
    for (uint32_t i = threadIdx.x % 32; i < b.box_rows * 8; i += 32) {
        uint32_t r = i / 8, c = i % 8;
        bool in = row + r < b.n_rows && col + 8 * c < b.n_cols;
        const uint8_t *from = b.data + (in ? ((size_t)(row + r) * b.n_cols + col + 8 * c) * 2 : 0);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + r * 128 +
                                                                           ((c ^ (r & 7)) * 16)),
                     "l"(from), "r"(in ? 16 : 0)
                     : "memory");
    }
#endif
}

/* ---- what reads a stage ---- */

static __device__ __forceinline__ void ki_read4(uint32_t &r0, uint32_t &r1, uint32_t &r2,
                                                uint32_t &r3, uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(at)
                 : "memory");
}
static __device__ __forceinline__ void ki_read4(uint32_t (&r)[4], uint32_t at) {
    ki_read4(r[0], r[1], r[2], r[3], at);
}
static __device__ __forceinline__ void ki_read2(uint32_t (&r)[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
}

/* d += a b, as kv_mma.cuh's mma has them, by the type of what is multiplied. */
static __device__ __forceinline__ void ki_multiply(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1, __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ void ki_multiply(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- the thread blocks of a cluster ---- */

static __device__ __forceinline__ void ki_cluster_sync(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
#endif
}
/* A float of block `rank`, where this one has it at `at`. */
static __device__ __forceinline__ float ki_read_of(uint32_t at, uint32_t rank) {
    float v;
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %1, %2;\n"
                 "ld.shared::cluster.f32 %0, [there]; }"
                 : "=f"(v)
                 : "r"(at), "r"(rank)
                 : "memory");
#else
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
#endif
    return v;
}

#endif
