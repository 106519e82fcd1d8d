/* kv_mma.cuh: the instructions the kernels are made of, each under a name. */
#ifndef KI_KV_MMA_CUH
#define KI_KV_MMA_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define KI_DEV static __device__ __forceinline__
#define KI_DEV_MEMBER static __device__ __forceinline__

/* d += a b: a [16][16] f16, b [16][8] f16, d [16][8] f32. Lane 4 g + t holds of a rows g, g + 8 and
 * columns 2 t, 2 t + 1 (a0, a1) and 2 t + 8, 2 t + 9 (a2, a3); of b rows (k) 2 t, 2 t + 1 (b0) and
 * 2 t + 8, 2 t + 9 (b1) of column g; of d row g (d0, d1) and row g + 8 (d2, d3), columns 2 t and
 * 2 t + 1. Float16 subnormals are kept. */
KI_DEV void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Two float16 at once, subnormals kept. */
KI_DEV uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
KI_DEV uint32_t pack2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
KI_DEV float low_half(uint32_t a) { return __half2float(__ushort_as_half((uint16_t)a)); }
KI_DEV float high_half(uint32_t a) { return __half2float(__ushort_as_half((uint16_t)(a >> 16))); }
enum { TWO_QUARTERS = 0x34003400, TWO_HALVES = 0x38003800, TWO_ONES = 0x3c003c00 };
enum { TWO_TWOS = 0x40004000, TWO_FOURS = 0x44004400 }; /* pairs of float16 */

KI_DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* An 8 x 8 matrix of float16, a row in four lanes, to its transpose. */
KI_DEV uint32_t transpose8(uint32_t a) {
    uint32_t d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

KI_DEV uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- a launch that begins while the one before ends ---- */

KI_DEV void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
KI_DEV void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- stages of one warp: bulk copies on sm_90, cp.async before ---- */

/* A ring of n_stages buffers in shared memory that one warp fills and reads. Copies complete in
 * order; issue() and wait() are called by the whole warp, once for each unit in turn. */
template <int N_STAGES> struct warp_pipe {
    uint8_t *data;  /* [N_STAGES][unit_bytes], 128-byte aligned */
    uint64_t *full; /* [N_STAGES] barriers (sm_90) */
    uint32_t unit_bytes;

    __device__ __forceinline__ void init(uint32_t lane) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0)
            for (int i = 0; i < N_STAGES; i++)
                asm volatile(
                    "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + i))
                    : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        __syncwarp();
#endif
    }
    /* Fills stage i % N_STAGES with unit i; the stage's last reader is done. */
    __device__ __forceinline__ void issue(uint32_t i, const uint8_t *from, uint32_t lane) {
        uint32_t stage = i % N_STAGES, to = shared_address(data + stage * unit_bytes);
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            uint32_t bar = shared_address(full + stage);
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                         "r"(unit_bytes)
                         : "memory");
            /* read once: the first to leave the cache */
            asm volatile(
                "{ .reg .b64 once;\n createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                "[%0], [%1], %2, [%3], once; }" ::"r"(to),
                "l"(from), "r"(unit_bytes), "r"(bar)
                : "memory");
        }
#else
        for (uint32_t at = lane * 16; at < unit_bytes; at += 512)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at)
                         : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    /* What a warp that has nothing more to issue calls instead: keeps the count of groups. */
    __device__ __forceinline__ void issue_nothing() {
#if __CUDA_ARCH__ < 900
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    /* Unit i is in its stage. N_STAGES issues (of units or nothing) came before unit 0's wait, and
     * one between any two waits. */
    __device__ __forceinline__ const uint8_t *wait(uint32_t i) {
        uint32_t stage = i % N_STAGES;
#if __CUDA_ARCH__ >= 900
        uint32_t bar = shared_address(full + stage), parity = i / N_STAGES & 1, done = 0;
        while (!done)
            asm volatile("{ .reg .pred p;\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(done)
                         : "r"(bar), "r"(parity)
                         : "memory");
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(N_STAGES - 1) : "memory");
        __syncwarp();
#endif
        return data + stage * unit_bytes;
    }
};

#endif
