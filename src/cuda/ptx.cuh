/* ptx.cuh: instructions that C++ has no name for, each in one place: products, pairs of float16,
 * what reads and copies memory, and barriers. A build with KI_EMULATED, which runs kernels on a
 * CPU, has functions of the same names (tests/cuda/emulator). */
#ifndef KI_PTX_CUH
#define KI_PTX_CUH
#include <cuda_runtime.h>
#include <stdint.h>

#define KI_DEV static __device__ __forceinline__

#ifdef KI_EMULATED
#include <emulator/ptx.cuh>
#else

/* ---- products ---- */

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
KI_DEV void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* ---- float16 ---- */

/* Two float16 at once, subnormals kept. */
KI_DEV uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
/* The larger of a and |b|, of each half. */
KI_DEV uint32_t most2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("{ .reg .b32 x; abs.f16x2 x, %2; max.f16x2 %0, %1, x; }" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
KI_DEV uint32_t pack2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
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

/* ---- global memory ---- */

/* 16 bytes, asked for where the call stands. */
KI_DEV void ki_load16(uint4 &w, const uint4 *at) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(at));
}
KI_DEV void ki_load8(uint2 &w, const uint2 *at) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(at));
}
/* A warp's lanes see what they stored before it, ki_load16 too. */
KI_DEV void ki_settle_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
/* The line of `at` into the cache that all multiprocessors share. */
KI_DEV void ki_bring_line(const uint8_t *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

/* ---- shared memory: addresses are 32-bit ---- */

KI_DEV uint32_t ki_shared(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 8 x 8 matrices of 16 bits, four, or two, or four as their transposes; `at`: the lane's row. */
KI_DEV void ki_read4(uint32_t &r0, uint32_t &r1, uint32_t &r2, uint32_t &r3, uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(at)
                 : "memory");
}
KI_DEV void ki_read4(uint32_t (&r)[4], uint32_t at) { ki_read4(r[0], r[1], r[2], r[3], at); }
KI_DEV void ki_read2(uint32_t (&r)[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
}
KI_DEV void ki_read4_turned(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* 16 bytes, or zeros. */
KI_DEV void ki_copy16(uint32_t to, const void *from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(is_there ? 16 : 0)
                 : "memory");
}
KI_DEV void ki_end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
KI_DEV void ki_wait_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
/* All groups but the newest N have come. */
template <int N> KI_DEV void ki_wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* ---- barriers ---- */

KI_DEV void ki_bar_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
KI_DEV void ki_bar_fence(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
KI_DEV void ki_bar_arrive(uint32_t bar) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(bar)
                 : "memory");
}
KI_DEV void ki_bar_wait(uint32_t bar, uint32_t parity) {
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

/* An arrival that waits for bytes of copies too (sm_90). */
KI_DEV void ki_bar_expect(uint32_t bar, uint32_t n_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(n_bytes)
                 : "memory");
#endif
}
/* Bytes more to come before the phase of `bar` ends, without an arrival (sm_90). */
KI_DEV void ki_bar_expect_more(uint32_t bar, uint32_t n_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(n_bytes)
                 : "memory");
#endif
}

/* n_bytes (a multiple of 16, as both addresses are) that `bar` was told of, by one thread (sm_90).
 * They are read once: the first to leave the cache. */
KI_DEV void ki_bulk_copy(uint32_t to, const void *from, uint32_t n_bytes, uint32_t bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 once;\n createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], once; }" ::"r"(to),
                 "l"(from), "r"(n_bytes), "r"(bar)
                 : "memory");
#endif
}

#endif
#endif
