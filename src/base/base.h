/* base.h: what every folder needs. Status and error helpers, the tagged allocator, checked sizes,
 * bounded buffers, float16 conversion. Nothing here prints, exits or keeps global state. */
#ifndef KI_BASE_H
#define KI_BASE_H
#include "kivi.h"

#include <stdarg.h>
#include <string.h>

/* Counters that several threads add to. C++ only sees their size. */
#ifdef __cplusplus
typedef uint64_t ki_counter;
typedef int64_t ki_countdown;
#else
#include <stdatomic.h>
typedef _Atomic uint64_t ki_counter;
typedef _Atomic int64_t ki_countdown;
#endif

/* ---- errors ---- */

/* Fills err (NULL allowed) with a printf-formatted line and returns status. */
kivi_status ki_fail(kivi_error *err, kivi_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define KI_TRY(call)                                                                               \
    do {                                                                                           \
        kivi_status ki_try_status = (call);                                                        \
        if (ki_try_status != KIVI_OK) return ki_try_status;                                        \
    } while (0)
/* The same inside a function that owns things and ends at `fail:`, with a local `kivi_status
 * status`. */
#define KI_TRY_GOTO(call)                                                                          \
    do {                                                                                           \
        if ((status = (call)) != KIVI_OK) goto fail;                                               \
    } while (0)
#define KI_FAIL(err, code, ...) ki_fail((err), KIVI_##code, __VA_ARGS__)

/* ---- tagged allocation ---- */

typedef enum ki_tag {
#define X(name) KI_TAG_##name,
    KIVI_TAG_LIST(X)
#undef X
        KI_TAG_COUNT
} ki_tag;

extern const char *const ki_tag_names[KI_TAG_COUNT];

/* One per engine or cache pool; blocks remember their tag and size, so the sums always add up. */
typedef struct ki_mem {
    ki_counter bytes[KI_TAG_COUNT];
    ki_counter n_blocks; /* blocks handed out and not yet freed */
    ki_countdown
        fail_countdown; /* tests: the allocation that makes it 0 fails, and all after; < 0: off */
} ki_mem;

void ki_mem_init(ki_mem *mem);
kivi_memory ki_mem_report(const ki_mem *mem);
uint64_t ki_memory_sum(const kivi_memory *memory); /* of all tags */
/* Zeroed memory aligned to 64 bytes, with 64 readable bytes behind it; NULL err allowed. n_bytes 0
 * is legal. */
kivi_status ki_alloc(void **out, ki_mem *mem, ki_tag tag, size_t n_bytes, kivi_error *err);
/* count * item_bytes, checked. */
kivi_status ki_alloc_array(void **out, ki_mem *mem, ki_tag tag, size_t count, size_t item_bytes,
                           kivi_error *err);
void ki_free(ki_mem *mem, void *block); /* NULL allowed */
/* One allocation for another allocator that is swept together with this one: whether it is to fail
 * (fail_countdown). */
bool ki_mem_must_fail(ki_mem *mem);
/* Files that are mapped rather than allocated are counted too, so that `weights` is what the
 * process really holds. */
void ki_mem_count(ki_mem *mem, ki_tag tag, int64_t n_bytes);

/* ---- checked sizes: every product, sum and rounding of a number that came from a file goes
 * through these ---- */

static inline bool ki_mul(size_t *out, size_t a, size_t b) {
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool ki_add(size_t *out, size_t a, size_t b) {
    return !__builtin_add_overflow(a, b, out);
}
/* Rounds n up to a multiple of unit (>= 1). */
static inline bool ki_round_up(size_t *out, size_t n, size_t unit) {
    size_t rest = n % unit;
    return rest ? ki_add(out, n, unit - rest) : (*out = n, true);
}
#define KI_MIN(a, b) ((a) < (b) ? (a) : (b))
#define KI_MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- a growing buffer that states its maximum ---- */

typedef struct ki_buf {
    ki_mem *mem;
    uint8_t *data;
    size_t n_bytes, cap_bytes, max_bytes;
} ki_buf;

void ki_buf_init(ki_buf *buf, ki_mem *mem, size_t max_bytes);
void ki_buf_deinit(ki_buf *buf);
kivi_status ki_buf_append(ki_buf *buf, const void *bytes, size_t n_bytes, kivi_error *err);

/* ---- numbers ---- */

static inline uint32_t ki_f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float ki_f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* float16 bits to float32, exact. */
static inline float ki_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 31) return ki_f32_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24, exact in float32 */
        float x = (float)mantissa * 0x1p-24f;
        return sign ? -x : x;
    }
    return ki_f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* float32 to float16 bits, round half to even; overflow gives infinity, NaN stays NaN (quiet). */
static inline uint16_t ki_f32_to_f16(float x) {
    uint32_t u = ki_f32_bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* 65536 and more */
    if (a < 0x38800000) {                                  /* below 2^-14: subnormal */
        uint32_t shift = 126 - (a >> 23), m = (a & 0x7fffff) | 0x800000;
        if (shift > 24) return (uint16_t)sign;
        uint32_t q = m >> shift, rest = m & ((1u << shift) - 1), half = 1u << (shift - 1);
        return (uint16_t)(sign | (q + (rest > half || (rest == half && (q & 1)))));
    }
    uint32_t q = (a - 0x38000000) >> 13, rest = a & 0x1fff;
    return (uint16_t)(sign | (q + (rest > 0x1000 || (rest == 0x1000 && (q & 1)))));
}

/* Round half to even; not for NaN. */
static inline uint16_t ki_f32_to_bf16(float x) {
    uint32_t u = ki_f32_bits(x);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float ki_bf16_to_f32(uint16_t h) { return ki_f32_from_bits((uint32_t)h << 16); }

#endif
