/* draw.h: one token from a row of logits: the definition. src/engine/draw.c has it in C, src/cuda/
 * draw.cu on a GPU, and the same logits, settings and u give the same token in both: every step
 * below is one rounding of float32, or exact.
 *
 *     edits     what a request does to single logits: bias, penalties, never (ki_draw_edited)
 *     best      the largest logit; NaN is nothing, but as the first of all it spoils the row
 *     x         (logit - best) / temperature
 *     weight    2^39 e^x as an integer, 0 below x = -27: sums of weights are exact in any order
 *     order     the larger logit first, of equal ones the lower id
 *     top-k     the first k in this order; sum: their weights
 *     top-p     of them as many as it takes to get to top_p sum (float64), one at least
 *     min-p     of them those of x >= min_x, the logarithm of min-p; one at least
 *     drawn     the first that brings the weights up to it above u times those of all that stay
 *
 * Temperature 0: the best, the lowest id on a tie. */
#ifndef KI_DRAW_H
#define KI_DRAW_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KI_DRAW_FN static __host__ __device__ __forceinline__
#else
#define KI_DRAW_FN static inline
#endif

enum {
    KI_EDIT_BIAS = 1,     /* bias is added */
    KI_EDIT_NEVER = 2,    /* it becomes minus infinity (before the penalties, which keep that) */
    KI_EDIT_REPEATED = 4, /* the repetition penalty counts */
    KI_EDIT_END = 8       /* minus infinity as long as another kind of token is left */
};

/* Most edits of all draws of a step, 1 MiB: a batch of 32 that penalizes 2,000 ids each. Rows that
 * find no room are drawn from their logits by whoever planned them. */
enum { KI_DRAW_EDITS = 1 << 16 };

typedef struct ki_draw_edit { /* of one id; each id has one at most */
    int32_t id;
    float bias;
    uint32_t times; /* how often it was generated: frequency and presence penalty; 0: neither */
    uint32_t what;
} ki_draw_edit;

typedef struct ki_draw {
    float temperature, top_p, min_x; /* top_p 1, min_x -inf: off */
    uint32_t top_k;                  /* 0: off */
    float repetition, frequency, presence;
    uint32_t n_edits;
    const ki_draw_edit *edits; /* [n_edits] */
    double u;                  /* [0, 1) */
} ki_draw;

/* One rounding each, also where a compiler would like to make one instruction of two. */
KI_DRAW_FN float ki_draw_mul(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
KI_DRAW_FN float ki_draw_add(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}
KI_DRAW_FN float ki_draw_div(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

KI_DRAW_FN float ki_draw_edited(float logit, const ki_draw_edit *e, float repetition,
                                float frequency, float presence) {
    float x = logit;
    if (e->what & KI_EDIT_BIAS) x = ki_draw_add(x, e->bias);
    if (e->what & KI_EDIT_NEVER) x = -INFINITY;
    if (e->what & KI_EDIT_REPEATED)
        x = x > 0 ? ki_draw_div(x, repetition) : ki_draw_mul(x, repetition);
    if (e->times)
        x = ki_draw_add(x, -ki_draw_add(ki_draw_mul(frequency, (float)e->times), presence));
    return x;
}

KI_DRAW_FN float ki_draw_x(float logit, float best, float temperature) {
    return ki_draw_div(ki_draw_add(logit, -best), temperature);
}

enum { KI_DRAW_LOG2_ONE = 39 }; /* weights of 2^24 ids, the most a vocabulary has, fit 64 bits */
#define KI_DRAW_LOWEST (-27.0f) /* 2^39 e^-27 is 1.03: all from there on have a weight */

/* 2^39 e^x, x <= 0: a power of two and a polynomial over half an octave to each side (Cephes'
 * expf), right to some units of the last place of float32. What is not a number has no weight. */
KI_DRAW_FN uint64_t ki_draw_weight(float x) {
    if (!(x >= KI_DRAW_LOWEST)) return 0;
    int32_t n = (int32_t)ki_draw_add(ki_draw_mul(x, 1.44269504f), -0.5f);
    float r = ki_draw_add(x, -ki_draw_mul((float)n, 0.693359375f)); /* few bits: exact */
    r = ki_draw_add(r, ki_draw_mul((float)n, 2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = ki_draw_add(ki_draw_mul(p, r), 1.3981999507e-3f);
    p = ki_draw_add(ki_draw_mul(p, r), 8.3334519073e-3f);
    p = ki_draw_add(ki_draw_mul(p, r), 4.1665795894e-2f);
    p = ki_draw_add(ki_draw_mul(p, r), 1.6666665459e-1f);
    p = ki_draw_add(ki_draw_mul(p, r), 5.0000001201e-1f);
    p = ki_draw_add(ki_draw_mul(ki_draw_mul(p, r), r), ki_draw_add(r, 1.0f));
    uint32_t bits = (uint32_t)(n + KI_DRAW_LOG2_ONE + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return (uint64_t)ki_draw_mul(p, power);
}

#endif
