/* wgmma.cuh: sm_90a's product of a warpgroup: d[64][N] += a[64][16] b[N][16]^T, a and b in shared
 * memory, sums in float32. Rows of a and b are 128 bytes under the tensor copy's 128-byte swizzle,
 * eights of them at multiples of 1,024; 16 columns on are 32 bytes on.
 *
 * d: lane l of warp w has rows 16 w + l / 4 + 8 (e / 2), columns 8 j + 2 (l % 4) + e % 2 in
 * d[4 j + e]. A sum over steps of 16 columns has the bits that mma.sync's m16n8k16 makes of it on
 * the same device, whatever N is (tests/cuda/check_dense.cu). */
#ifndef KI_WGMMA_CUH
#define KI_WGMMA_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

/* What stands at a shared address, as the instruction is told: rows of 128 bytes, swizzled; the
 * next eight 1,024 bytes on. */
static __device__ __forceinline__ uint64_t ki_wgmma_rows(uint32_t at) {
    return at >> 4 | 1ull << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}
static __device__ __forceinline__ void ki_wgmma_begin(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/* Waits for all that was begun. */
static __device__ __forceinline__ void ki_wgmma_end(void) {
    asm volatile("wgmma.commit_group.sync.aligned;\n"
                 "wgmma.wait_group.sync.aligned 0;" ::
                     : "memory");
}

#define KI_WGMMA(n, element, type, registers, a_at, b_at, ...)                                     \
    static __device__ __forceinline__ void ki_wgmma(float(&d)[n / 2], uint64_t a, uint64_t b,      \
                                                    type) {                                        \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." element "." element         \
                     " {" registers "}, " a_at ", " b_at ", 1, 1, 1, 0, 0;"                        \
                     : __VA_ARGS__                                                                 \
                     : "l"(a), "l"(b));                                                            \
    }
#define KI_WGMMA_OF(n, registers, a_at, b_at, ...)                                                 \
    KI_WGMMA(n, "f16", __half, registers, a_at, b_at, __VA_ARGS__)                                 \
    KI_WGMMA(n, "bf16", __nv_bfloat16, registers, a_at, b_at, __VA_ARGS__)

#define KI_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KI_D8(i) KI_D4(i), KI_D4(i + 4)
#define KI_D16(i) KI_D8(i), KI_D8(i + 8)
#define KI_R4 "%0, %1, %2, %3"
#define KI_R8 KI_R4 ", %4, %5, %6, %7"
#define KI_R16 KI_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define KI_R32                                                                                     \
    KI_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

KI_WGMMA_OF(8, KI_R4, "%4", "%5", KI_D4(0))
KI_WGMMA_OF(16, KI_R8, "%8", "%9", KI_D8(0))
KI_WGMMA_OF(32, KI_R16, "%16", "%17", KI_D16(0))
KI_WGMMA_OF(64, KI_R32, "%32", "%33", KI_D16(0), KI_D16(16))

#endif
