/* kv_row.cuh: a new row of a sequence, a warp's work in registers: rope, the turn of plus values,
 * float16, its place in the 16-bit store. For the kernel that appends rows and for decode attention
 * that takes them itself: the same bits, every operation rounded by itself in both files. */
#ifndef KI_KV_ROW_CUH
#define KI_KV_ROW_CUH
#include "kv_rows.cuh"

/* ---- float16 of the store ---- */

struct row_check {
    bool is_bad;
    uint32_t n_saturated;
};

KI_DEV uint16_t checked_f16(float x, row_check *check) {
    bool is_bad = (__float_as_uint(x) & 0x7f800000) == 0x7f800000;
    check->is_bad |= is_bad;
    if (is_bad) return 0; /* the store never holds one: others' products with 0 stay 0 */
    float y = x < -65504.0f ? -65504.0f : x > 65504.0f ? 65504.0f : x;
    check->n_saturated += y != x;
    return __half_as_ushort(__float2half_rn(y));
}
KI_DEV uint32_t checked_pair(float2 x, row_check *check) {
    uint32_t low = checked_f16(x.x, check);
    return low | (uint32_t)checked_f16(x.y, check) << 16;
}
/* What a warp saw in the row of a KV head. flag may be NULL. */
KI_DEV void report_row(const row_check &check, ki_cuda_counters *counters, uint32_t *flag,
                       uint32_t lane) {
    if (check.n_saturated) atomicAdd(&counters->n_saturated, (unsigned long long)check.n_saturated);
    if (!__any_sync(~0u, check.is_bad) || lane) return;
    if (flag) *flag = 1;
    atomicAdd(&counters->n_nonfinite, 1ull);
}

/* One element of a 16-bit plane. */
KI_DEV uint16_t *exact_element(uint8_t *block, uint32_t t, uint32_t c, uint32_t steps, bool keys) {
    ki_order_place p = keys ? ki_order_key(t, c, steps, 16) : ki_order_value(t, c, steps, 16);
    return (uint16_t *)block + p.word * 2 + p.bit / 16;
}

/* ---- two channels ---- */

/* Two elements as they are in memory: WIDE float32, else 16 bits. All of a row's are on their way
 * before the first is looked at. */
template <bool WIDE> struct raw_pair {
    uint32_t two[WIDE ? 2 : 1];

    /* at is even, rows are aligned to two elements */
    __device__ __forceinline__ void load(const void *x, uint64_t at) {
        if constexpr (WIDE) {
            uint2 y = *(const uint2 *)((const uint32_t *)x + at);
            two[0] = y.x, two[1] = y.y;
        } else two[0] = *(const uint32_t *)((const uint16_t *)x + at);
    }
    __device__ __forceinline__ float2 value(ki_cuda_type type) const {
        if constexpr (WIDE) return make_float2(__uint_as_float(two[0]), __uint_as_float(two[1]));
        if (type == KI_CUDA_F16) return make_float2(low_half(two[0]), high_half(two[0]));
        return make_float2(__uint_as_float(two[0] << 16), __uint_as_float(two[0] & 0xffff0000));
    }
};

/* Rope of channels c, c + 1 (x) and those D / 2 behind them (y); turn: cos, sin of both pairs. */
KI_DEV void rotate_pairs(float2 &x, float2 &y, float4 turn) {
    float2 p, q;
    p.x = __fsub_rn(__fmul_rn(x.x, turn.x), __fmul_rn(y.x, turn.y));
    p.y = __fsub_rn(__fmul_rn(x.y, turn.z), __fmul_rn(y.y, turn.w));
    q.x = __fadd_rn(__fmul_rn(y.x, turn.x), __fmul_rn(x.x, turn.y));
    q.y = __fadd_rn(__fmul_rn(y.y, turn.z), __fmul_rn(x.y, turn.w));
    x = p, y = q;
}

/* ---- rows ---- */

/* A row [D] with a lane's channels 2 p, 2 p + 1 and those D / 2 behind them, p = lane + 32 m, in
 * low[m] and high[m]. */
template <int D, bool WIDE> struct half_rows {
    static constexpr int N = (D / 4 + 31) / 32;
    raw_pair<WIDE> u[N], w[N];
    float4 turn[N];
    uint32_t low[N], high[N];

    /* rope: [D/2][2] of the row, or NULL */
    __device__ __forceinline__ void load(const void *x, uint64_t at, const float *rope,
                                         uint32_t lane) {
#pragma unroll
        for (int m = 0; m < N; m++) {
            uint32_t c = 2 * (lane + 32 * m);
            if (c >= D / 2) continue;
            u[m].load(x, at + c), w[m].load(x, at + D / 2 + c);
            if (rope) turn[m] = *(const float4 *)(rope + 2 * c);
        }
    }
    __device__ __forceinline__ void rotate(ki_cuda_type type, bool has_rope, row_check *check,
                                           uint32_t lane) {
#pragma unroll
        for (int m = 0; m < N; m++) {
            if (2 * (lane + 32 * m) >= D / 2) continue;
            float2 x = u[m].value(type), y = w[m].value(type);
            if (has_rope) rotate_pairs(x, y, turn[m]);
            low[m] = checked_pair(x, check), high[m] = checked_pair(y, check);
        }
    }
    /* put(c, channels c and c + 1) */
    template <class F> __device__ __forceinline__ void store(uint32_t lane, F put) const {
#pragma unroll
        for (int m = 0; m < N; m++) {
            uint32_t c = 2 * (lane + 32 * m);
            if (c < D / 2) put(c, low[m]), put(D / 2 + c, high[m]);
        }
    }
};

/* A row [D] with a lane's channels 2 p, 2 p + 1, p = lane + 32 m, in x[m]. */
template <int D, bool WIDE> struct whole_row {
    static constexpr int N = (D / 2 + 31) / 32;
    raw_pair<WIDE> raw[N];
    float2 x[N];

    __device__ __forceinline__ void load(const void *from, uint64_t at, uint32_t lane) {
#pragma unroll
        for (int m = 0; m < N; m++) {
            uint32_t c = 2 * (lane + 32 * m);
            if (c < D) raw[m].load(from, at + c);
        }
    }
    __device__ __forceinline__ void widen(ki_cuda_type type, uint32_t lane) {
#pragma unroll
        for (int m = 0; m < N; m++)
            x[m] = 2 * (lane + 32 * m) < D ? raw[m].value(type) : make_float2(0, 0);
    }
    /* plus.h's order: partners 1, 2, 4, ... channels apart. Those of a lane, of another lane of the
     * same m, of another m. */
    __device__ __forceinline__ void turn(uint32_t lane) {
        constexpr int BLOCK = D & -D;
#pragma unroll
        for (int m = 0; m < N; m++)
            x[m] = make_float2(__fadd_rn(x[m].x, x[m].y), __fsub_rn(x[m].x, x[m].y));
#pragma unroll
        for (int h = 2; h < BLOCK && h < 64; h *= 2)
#pragma unroll
            for (int m = 0; m < N; m++) {
                float other_x = __shfl_xor_sync(~0u, x[m].x, h / 2);
                float other_y = __shfl_xor_sync(~0u, x[m].y, h / 2);
                bool is_high = lane & h / 2;
                x[m].x = __fadd_rn(other_x, is_high ? -x[m].x : x[m].x);
                x[m].y = __fadd_rn(other_y, is_high ? -x[m].y : x[m].y);
            }
#pragma unroll
        for (int h = 64; h < BLOCK; h *= 2)
#pragma unroll
            for (int m = 0; m < N; m++) {
                if (m & h / 64) continue;
                float2 u = x[m], w = x[m + h / 64];
                x[m] = make_float2(__fadd_rn(u.x, w.x), __fadd_rn(u.y, w.y));
                x[m + h / 64] = make_float2(__fsub_rn(u.x, w.x), __fsub_rn(u.y, w.y));
            }
        float f = __frsqrt_rn((float)BLOCK);
#pragma unroll
        for (int m = 0; m < N; m++) x[m] = make_float2(__fmul_rn(x[m].x, f), __fmul_rn(x[m].y, f));
    }
};

/* Where a token goes: blocks of the 16-bit store, or of the page of a side of 16 bits. */
struct row_place {
    uint8_t *keys, *values;
    uint32_t t; /* in its block of 32 */
};

/* The key and the value of one KV head. */
template <int D, bool WIDE> struct kv_row {
    half_rows<D, WIDE> k;
    whole_row<D, WIDE> v;
    uint32_t v16[whole_row<D, WIDE>::N]; /* pairs of channels */

    __device__ __forceinline__ void load(const void *keys, uint64_t k_at, const void *values,
                                         uint64_t v_at, const float *rope, uint32_t lane) {
        v.load(values, v_at, lane);
        k.load(keys, k_at, rope, lane);
    }
    /* As they are kept. */
    __device__ __forceinline__ row_check finish(ki_cuda_type type, bool has_rope, bool is_plus,
                                                uint32_t lane) {
        row_check check = {};
        k.rotate(type, has_rope, &check, lane);
        v.widen(type, lane);
        if (is_plus) v.turn(lane);
#pragma unroll
        for (int m = 0; m < whole_row<D, WIDE>::N; m++)
            if (2 * (lane + 32 * m) < D) v16[m] = checked_pair(v.x[m], &check);
        return check;
    }
    __device__ __forceinline__ void put_key(uint8_t *block, uint32_t t, uint32_t lane) const {
        k.store(lane, [&](uint32_t c, uint32_t two) { /* a pair of channels is a word */
                                                      *(uint32_t *)exact_element(
                                                          block, t, c, D / 16, true) = two;
        });
    }
    __device__ __forceinline__ void put_value(uint8_t *block, uint32_t t, uint32_t lane) const {
#pragma unroll
        for (int m = 0; m < whole_row<D, WIDE>::N; m++) {
            uint32_t c = 2 * (lane + 32 * m);
            if (c >= D) continue;
            *exact_element(block, t, c, D / 16, false) = (uint16_t)v16[m];
            *exact_element(block, t, c + 1, D / 16, false) = (uint16_t)(v16[m] >> 16);
        }
    }
    __device__ __forceinline__ void put(const row_place &place, uint32_t lane) const {
        put_key(place.keys, place.t, lane);
        put_value(place.values, place.t, lane);
    }
};

#endif
