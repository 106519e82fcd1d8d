/* blocks.c: ggml's blocks of 32, as its reference quantizers make them:
 *
 *     Q8_0   | d f16 | 32 x int8 |            d = max|x| / 127, q = round(x / d), half away from 0
 *     Q4_0   | d f16 | 16 x (low, high) |     d = m / -8, m the x of the largest |x| (the first),
 *                                             q = trunc(x / d + 8.5), at most 15; byte i holds q[i]
 *                                             and q[i + 16]
 *
 * Division is a product with the float32 reciprocal of the float32 d, which is rounded to float16
 * only when it is stored: so do they, and files are compared by their bytes. */
#include "write.h"

#include <math.h>

enum { BLOCK = 32 };
#define F16_END 65520.0f /* rounds to infinity from here on */

static void put_f16(uint8_t *out, float x) {
    uint16_t half = ki_f32_to_f16(x);
    memcpy(out, &half, sizeof half);
}

/* A d so small that its reciprocal is infinite is stored as 0 and makes every value 0. */
static float reciprocal(float d) {
    float r = d != 0 ? 1.0f / d : 0.0f;
    return isfinite(r) ? r : 0.0f;
}

static float largest(const float *x, size_t n) {
    float most = fabsf(x[0]), at = x[0];
    for (size_t i = 0; i < n; i++)
        if (fabsf(x[i]) > most) most = fabsf(x[i]), at = x[i];
    return at;
}

static void block_q8_0(uint8_t *out, const float *x) {
    float d = fabsf(largest(x, BLOCK)) / 127.0f, r = reciprocal(d);
    put_f16(out, d);
    for (int i = 0; i < BLOCK; i++) {
        float y = x[i] * r, a = fabsf(y), whole = floorf(a);
        whole += floorf(2.0f * (a - whole));
        out[2 + i] = (uint8_t)(int8_t)(y < 0 ? -whole : whole);
    }
}

static uint8_t nibble(float x, float r) {
    float y = x * r;
    y = truncf(y + 8.5f);
    return (uint8_t)KI_MIN(KI_MAX(y, 0.0f), 15.0f);
}

static void block_q4_0(uint8_t *out, const float *x) {
    float d = largest(x, BLOCK) / -8.0f, r = reciprocal(d);
    put_f16(out, d);
    for (int i = 0; i < BLOCK / 2; i++)
        out[2 + i] = (uint8_t)(nibble(x[i], r) | nibble(x[i + BLOCK / 2], r) << 4);
}

void ki_row_to_f32(float *out, const uint8_t *row, ki_dtype dtype, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half = 0;
        if (dtype == KI_F32) {
            memcpy(&out[i], row + i * 4, 4);
            continue;
        }
        memcpy(&half, row + i * 2, 2);
        out[i] = dtype == KI_F16 ? ki_f16_to_f32(half) : ki_bf16_to_f32(half);
    }
}

/* The largest magnitude that a type holds. */
static float end_of(ki_dtype dtype) {
    if (dtype == KI_F16) return F16_END;
    if (dtype == KI_Q8_0) return F16_END * 127;
    return dtype == KI_Q4_0 ? F16_END * 8 : INFINITY;
}

bool ki_row_from_f32(uint8_t *out, ki_dtype dtype, const float *row, size_t n) {
    float end = end_of(dtype);
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(row[i]) < end)) return false;
    for (size_t i = 0; dtype == KI_F32 && i < n; i++) memcpy(out + i * 4, &row[i], 4);
    for (size_t i = 0; dtype == KI_F16 && i < n; i++) put_f16(out + i * 2, row[i]);
    for (size_t i = 0; dtype == KI_Q8_0 && i < n; i += BLOCK)
        block_q8_0(out + i / BLOCK * 34, row + i);
    for (size_t i = 0; dtype == KI_Q4_0 && i < n; i += BLOCK)
        block_q4_0(out + i / BLOCK * 18, row + i);
    return true;
}
