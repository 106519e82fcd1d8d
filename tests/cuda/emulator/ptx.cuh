/* ptx.cuh: the instructions of src/cuda/ptx.cuh that decode attention uses, emulated. Included by
 * that file, which says what they do. */
#include "emulate.h"

KI_DEV void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
    emulate_mma(d, {a0, a1, a2, a3}, {b0, b1});
}
KI_DEV uint32_t pack2(float low, float high) {
    return ki_f32_to_f16(low) | (uint32_t)ki_f32_to_f16(high) << 16;
}
KI_DEV uint32_t mul2(uint32_t a, uint32_t b) {
    float low = emulated_half(a) * emulated_half(b);
    return pack2(low, emulated_half(a >> 16) * emulated_half(b >> 16));
}
KI_DEV uint32_t most2(uint32_t a, uint32_t b) {
    float low = fmaxf(emulated_half(a), fabsf(emulated_half(b)));
    return pack2(low, fmaxf(emulated_half(a >> 16), fabsf(emulated_half(b >> 16))));
}
KI_DEV float exp2_fast(float x) { return exp2f(x); }
KI_DEV uint32_t transpose8(uint32_t a) { return (uint32_t)emulate_warp(OP_TURN, a, 0); }

KI_DEV void ki_load16(uint4 &w, const uint4 *at) {
    emulate_reads(at, sizeof w);
    w = *at;
}
KI_DEV void ki_load8(uint2 &w, const uint2 *at) {
    emulate_reads(at, sizeof w);
    w = *at;
}
KI_DEV void ki_settle_warp() { emulate_warp(OP_SYNC, 0, 0); }
KI_DEV void ki_bring_line(const uint8_t *at) { emulate_reads(at, 1); }

KI_DEV uint32_t ki_shared(const void *p) { return emulate_address(p); }
KI_DEV void ki_copy16(uint32_t to, const void *from, bool is_there) {
    emulate_copy16(to, from, is_there);
}
KI_DEV void ki_end_copies() { emulate_end_copies(); }
template <int N> KI_DEV void ki_wait_copies() { emulate_wait_copies(N); }

KI_DEV void ki_bar_init(uint32_t bar, uint32_t count) { emulate_bar_init(bar, count); }
KI_DEV void ki_bar_fence(void) {}
KI_DEV void ki_bar_arrive(uint32_t bar) { emulate_bar_arrive(bar); }
KI_DEV void ki_bar_wait(uint32_t bar, uint32_t parity) { emulate_bar_wait(bar, parity); }
KI_DEV void ki_bar_expect(uint32_t bar, uint32_t n_bytes) {
    emulate_bar_expect(bar, n_bytes);
    emulate_bar_arrive(bar);
}
KI_DEV void ki_bar_expect_more(uint32_t bar, uint32_t n_bytes) { emulate_bar_expect(bar, n_bytes); }
KI_DEV void ki_bulk_copy(uint32_t to, const void *from, uint32_t n_bytes, uint32_t bar) {
    emulate_bulk_copy(to, from, n_bytes, bar);
}
