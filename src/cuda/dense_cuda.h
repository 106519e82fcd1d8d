/* dense_cuda.h: the small steps of a pass on a GPU, and weights out of a file's blocks. Launchers
 * queue their kernel on a stream (a cudaStream_t) and return; a launch that is refused shows in
 * cudaGetLastError. Pointers mean device memory. Sums are float32 in a fixed order.
 *
 * Weights and the rows that products read are of `type`; the residual stream x, what products put
 * out, norms' weights and biases are float32. */
#ifndef KI_DENSE_CUDA_H
#define KI_DENSE_CUDA_H
#include "device.h"
#include "kv_cuda.h"
#include "load.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out [n] of `type` from n / block_elements blocks of a file's type. n: whole blocks. */
void ki_cuda_dequantize(void *out, const uint8_t *blocks, ki_dtype dtype, size_t n,
                        ki_cuda_type type, void *stream);

/* cos and sin of each row's position [n_rows][D / 2][2], times `factor`. freq: [D / 2] radians a
 * position, of row r at freq + r * freq_stride (0: the same for all). pdl: it may be launched
 * before the kernel before it has ended. */
void ki_cuda_rope_table(float *out, const float *freq, size_t freq_stride,
                        const uint32_t *positions, uint32_t n_rows, uint32_t half, float factor,
                        bool pdl, void *stream);

/* h[r] = norm(x[r]), both [n]. bias NULL: root mean square; else with a mean. */
typedef struct ki_cuda_norm {
    const float *weight, *bias;
    float eps;
} ki_cuda_norm;

/* Of rows[r] instead of r, where rows is not NULL: no kernel before this one may still write it.
 * held: a row stays in registers where it fits (n a multiple of 4 up to 8,192). */
void ki_cuda_norm_rows(void *h, const float *x, const uint32_t *rows, const ki_cuda_norm *norm,
                       uint32_t n_rows, uint32_t n, ki_cuda_type type, bool held, void *stream);
/* x[r] += norm(delta[r]). */
void ki_cuda_add_norm(float *x, const float *delta, const ki_cuda_norm *norm, uint32_t n_rows,
                      uint32_t n, bool held, void *stream);

/* q, k, v rows [n_rows][stride]: bias [(H + 2 Hk) D] (NULL: none) is added, then each head of q
 * and k divided by its root mean square (weights [D], NULL: none). */
typedef struct ki_cuda_heads {
    const float *bias, *q_weight, *k_weight;
    uint32_t n_heads, n_kv_heads, head_dim;
    float eps;
} ki_cuda_heads;
void ki_cuda_adjust_heads(float *qkv, const ki_cuda_heads *heads, uint32_t n_rows, void *stream);

/* Rows [n_rows][H][D] of float16 where they are: turned as plus.h turns values, if `turned`, and of
 * `type` then, F16 or BF16. D at most 256. */
void ki_cuda_finish_heads(void *rows, ki_cuda_type type, bool turned, uint32_t n_rows,
                          uint32_t n_heads, uint32_t head_dim, void *stream);

/* out[r][n] = act(gate) * up of rows [gate n][up n] (stride 2 n), or act alone of rows [n]. */
typedef enum ki_cuda_act { KI_CUDA_SILU_MUL, KI_CUDA_GELU_MUL, KI_CUDA_GELU } ki_cuda_act;
void ki_cuda_activate(void *out, const float *in, ki_cuda_act act, uint32_t n_rows, uint32_t n,
                      ki_cuda_type type, void *stream);

void ki_cuda_ring_copy_blocks(const ki_ring_copy *copy, void *stream);

#ifdef __cplusplus
}
#endif
#endif
