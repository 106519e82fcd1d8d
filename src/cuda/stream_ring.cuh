/* stream_ring.cuh: stages in shared memory that one warp fills and others read: copies of
 * boxes of 64 columns of 16 bits, and what reads them. A row of a box is 128 bytes; its piece c of
 * 16 bytes stands at c ^ (row % 8), as the tensor copy's 128-byte swizzle has it. */
#ifndef KI_STREAM_RING_CUH
#define KI_STREAM_RING_CUH
#include "ptx.cuh"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

/* Before the copies of a stage. */
static __device__ __forceinline__ void ki_begin_stage(uint32_t full, uint32_t n_bytes) {
    ki_bar_expect(full, n_bytes);
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
        ki_copy16(to + r * 128 + ((c ^ (r & 7)) * 16), from, in);
    }
#endif
}

/* ---- what reads a stage ---- */

/* d += a b, by the type of what is multiplied. */
static __device__ __forceinline__ void ki_multiply(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1, __half) {
    mma(d, a[0], a[1], a[2], a[3], b0, b1);
}
static __device__ __forceinline__ void ki_multiply(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1, __nv_bfloat16) {
    mma_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
}

/* ---- the thread blocks of a cluster ---- */

static __device__ __forceinline__ void ki_cluster_sync(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
#endif
}
/* The first half of such a meeting, without what was written before it; and the other half. */
static __device__ __forceinline__ void ki_cluster_arrive(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
static __device__ __forceinline__ void ki_cluster_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
/* v to `to` of block `rank`, whose barrier `bar` was told of 4 bytes more. */
static __device__ __forceinline__ void ki_send(uint32_t to, float v, uint32_t bar, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .b32 there, its;\n"
        "mapa.shared::cluster.u32 there, %0, %3;\n"
        "mapa.shared::cluster.u32 its, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [its]; }" ::"r"(to),
        "r"(__float_as_uint(v)), "r"(bar), "r"(rank)
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
