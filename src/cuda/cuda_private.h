/* cuda_private.h: the CUDA backend from the inside: one device, its memory, the matrices on it, and
 * the pass. C on the host; kernels are in .cu files behind dense_cuda.h, kv_cuda.h and plain.h.
 *
 * Everything is queued on one stream, so calls take effect in the order they are made; a step waits
 * for it once, at its end, when the new tokens and what went wrong come back. */
#ifndef KI_CUDA_PRIVATE_H
#define KI_CUDA_PRIVATE_H
#include "backend.h"
#include "dense_cuda.h"
#include "draw_cuda.h"
#include "gemm.h"
#include "kv_append.h"
#include "kv_cuda.h"
#include "kv_prompt.h"
#include "plain.h"
#include "sdpa.h"
#include "step_cuda.h"
#include "stream.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

enum { KI_MAX_BUCKETS = 14 }; /* graphs for 1, 2, 4, ... 8192 sequences; sessions end at 4,096 */

/* The status of a CUDA call: NOMEM or DEVICE with `what` and CUDA's own words. */
kivi_status ki_cuda_check(cudaError_t code, const char *what, kivi_error *err);

/* ---- memory.c ---- */

typedef struct ki_cuda_block {
    struct ki_cuda_block *next;
    void *at;
    size_t n_bytes;
    ki_tag tag;
} ki_cuda_block;

typedef struct ki_cuda_memory {
    ki_device device; /* its context is this */
    ki_mem mem;       /* bytes on the device by tag */
    ki_mem *host;     /* for the list below, and its countdown of failures */
    ki_cuda_block *blocks;
    cudaMemPool_t pool;
    cudaStream_t stream;
    int number; /* of the device: each call makes it the thread's, whose another may be */
    uint64_t limit_bytes, n_bytes; /* 0: no limit; all that is held */
} ki_cuda_memory;

kivi_status ki_cuda_memory_init(ki_cuda_memory *m, int device, ki_mem *host, uint64_t limit_bytes,
                                kivi_error *err);
void ki_cuda_memory_deinit(ki_cuda_memory *m);

/* ---- weights.c ---- */

/* Matrices come one after the other; those of a group share one block, so that one product reads
 * them all. */
typedef struct ki_cuda_weights {
    ki_matrix_device device; /* its context is this */
    ki_cuda_memory *memory;
    ki_cuda_type type;
    uint8_t *group; /* what is left of the group's block */
    size_t group_bytes;
    uint8_t *staged; /* rows in the file's form; given back when loading ends */
    size_t staged_bytes;
} ki_cuda_weights;

void ki_cuda_weights_init(ki_cuda_weights *w, ki_cuda_memory *memory, ki_cuda_type type);
size_t ki_cuda_element_bytes(ki_cuda_type type);
void ki_cuda_weights_done(ki_cuda_weights *w);

/* ---- pass.c: the buffers of a step and what is done in them ---- */

/* The calls on the cache: the fast kernels, or plain.h for head sizes that they are not built for.
 */
typedef struct ki_cuda_kernels {
    const char *name;
    /* The rows of a step of decoding; NULL: attend takes them (ki_cuda_attend_call's append). */
    kivi_status (*append)(const ki_cuda_append_call *, void *stream, kivi_error *);
    /* Closes what appends of all layers left open; NULL: they leave nothing. */
    kivi_status (*close)(const ki_cuda_append_call *, uint32_t n_layers, void *stream,
                         kivi_error *);
    kivi_status (*prompt_append)(const ki_cuda_append_call *, void *stream, kivi_error *);
    kivi_status (*prompt_window)(const ki_cuda_append_call *, void *stream, kivi_error *);
    kivi_status (*plan)(const ki_cuda_attend_call *, void *stream, kivi_error *); /* NULL: none */
    kivi_status (*attend)(const ki_cuda_attend_call *, void *stream, kivi_error *);
    /* One part of a step with prompts; NULL: attend does them all. */
    kivi_status (*prompt_attend)(const ki_cuda_attend_call *, const ki_prompt_part *,
                                 uint32_t step_window, void *stream, kivi_error *);
} ki_cuda_kernels;

typedef struct ki_cuda_norms { /* of a layer; weight NULL: none */
    ki_cuda_norm attn, ffn, post_attn, post_ffn;
    ki_cuda_heads heads;
} ki_cuda_norms;

typedef struct ki_cuda_buffers { /* device memory; rows as padded for products */
    float *x, *qkv, *mlp, *delta, *logits, *rope;
    void *h, *attn, *act, *last;        /* of the backend's type */
    uint16_t *q16, *k_rows, *v_rows;    /* f16 */
    uint8_t *upload, *result, *plan[2]; /* plan[1]: of the layers with a sliding window */
    uint8_t *scratch;                   /* old rows of prompts (kv_prompt.h) */
    uint8_t *sums;                      /* of products (stream.h) */
} ki_cuda_buffers;

/* Of a pass, as launches see it. A step is one, or in the batch-invariant mode several: its logits
 * then stand behind those of the passes before, from first_logit on. */
typedef struct ki_cuda_shape {
    uint32_t n_rows, n_seqs, max_rows, n_logits, first_logit, split_tokens;
    uint32_t n_whole;  /* sequences marked KI_CUDA_ELSEWHERE: cuDNN's, */
    uint32_t n_single; /* and those of one row, which are attended to as in decoding */
    uint32_t own_rows; /* most rows of any other; 0: there is none. For steps with prompts */
    bool decode;
} ki_cuda_shape;

typedef struct ki_cuda_backend {
    ki_backend base;
    ki_cuda_memory memory;
    ki_cuda_weights weights;
    ki_mem *host;
    void (*frequencies)(float *out, const ki_rope *rope, uint32_t head_dim, uint32_t length);
    int number;
    uint32_t n_sms, compute_major;
    uint32_t shared_bytes; /* what a thread block can have */
    ki_cuda_type type;     /* of weights, and of the rows that products read */
    uint32_t without; /* KI_PART_...; without the fused kernels plain.h serves all head sizes */
    bool invariant;   /* neighbours change nothing (forward.c) */
    void (*log)(void *user, const char *line);
    void *log_user;
    /* between start and stop */
    const ki_model *model;
    kivi_cache *cache;
    ki_backend_sizes sizes;
    ki_cuda_layout layout;
    ki_cuda_cache kv;
    const ki_cuda_kernels *kernels; /* &own_kernels, or the plain ones */
    ki_cuda_kernels own_kernels;
    ki_gemm *gemm;
    ki_stream *few;      /* NULL: products of few rows are gemm's, too */
    uint32_t fixed_rows; /* invariant: rows of all products of decoding; 0: stream.h makes them */
    ki_batch_item **chosen; /* [max_items]: of a pass */
    ki_sdpa *sdpa;          /* NULL: prompts are kv_prompt.cu's; works in the products' workspace */
    ki_cuda_upload upload_at;
    ki_cuda_result result_at;
    ki_cuda_buffers buffers;
    uint8_t *arena;             /* all buffers but these */
    uint8_t *workspace;         /* of products and attention */
    size_t scratch_bytes;       /* of it: buffers.scratch */
    float *vectors, *rope_freq; /* norms and biases; [n_ropes][D / 2] */
    ki_cuda_norms *norms;       /* [n_layers], host */
    ki_cuda_norm output_norm;
    uint32_t n_streamed;        /* products of few rows of this pass so far */
    uint32_t n_behind;          /* of them behind the last attention of decoding, up to 2 */
    uint8_t *up, *down;         /* pinned host memory: upload and result */
    float *host_logits;         /* [logit rows][stride], fetched on demand */
    uint64_t *fetched, n_steps; /* [logit rows]: the step each was fetched of */
    cudaGraphExec_t graphs[KI_MAX_BUCKETS];
    uint32_t n_decoded; /* passes of decoding: the number of the last one (step_cuda.h) */
    /* What closes pages runs beside the last layer's products: from `forked` to `joined`. */
    cudaStream_t side;
    cudaEvent_t forked, joined;
} ki_cuda_backend;

/* Sizes of everything a step needs, for plan and start. */
typedef struct ki_cuda_sizes {
    uint32_t n_rows, n_logits, n_slots; /* as padded */
    ki_cuda_upload upload;
    ki_cuda_result result;
    size_t offsets[16], arena_bytes, vector_floats, gemm_bytes, stream_bytes, plan_bytes;
    size_t scratch_bytes;
} ki_cuda_sizes;
bool ki_cuda_sizes_of(ki_cuda_sizes *out, const ki_cuda_backend *b, const ki_config *config,
                      const ki_cuda_layout *layout, const ki_backend_sizes *sizes);
uint32_t ki_cuda_bucket(uint32_t n); /* the next power of two */
/* Tokens of a split of decode attention: by the batch, or constant in the invariant mode. */
uint32_t ki_cuda_split_of(const ki_cuda_backend *b, const ki_cuda_layout *layout, uint32_t n_seqs,
                          uint32_t max_tokens);
/* Products of up to so many rows are stream.h's; 0: none are. */
uint32_t ki_cuda_stream_rows(const ki_cuda_backend *b);
/* Whether cuDNN is to be asked for the attention of prompts: its kernels are faster on this device,
 * the fused ones leave prompts out for it, steps of that many rows can have one that is long
 * enough, and rows are in 16 bit. */
bool ki_cuda_wants_sdpa(const ki_cuda_backend *b, const ki_cuda_layout *layout,
                        const ki_backend_sizes *sizes);
/* Whether the fused kernels serve a layout here; else the plain ones do, without a workspace. */
bool ki_cuda_is_fused(const ki_cuda_backend *b, const ki_cuda_layout *layout, kivi_error *why);

kivi_status ki_cuda_start(ki_cuda_backend *b, kivi_error *err);
void ki_cuda_stop(ki_cuda_backend *b);
kivi_status ki_cuda_exchange(ki_cuda_backend *b, kivi_seq *host, kivi_seq *there, bool to_host,
                             kivi_error *err); /* exchange.c */
void ki_cuda_forward(ki_cuda_backend *b, ki_batch *batch);
kivi_status ki_cuda_draw_one(int32_t *id, ki_cuda_backend *b, uint32_t row, const ki_draw *draw,
                             kivi_error *err);
/* The sequences of a pass with prompts (host memory) and the scratch, for kv_prompt.h. */
ki_prompt_step ki_cuda_prompt_step(const ki_cuda_backend *b, uint32_t n_seqs);
/* Which of the two kinds of layers the model has: those that see all, and local ones. */
void ki_cuda_kinds_of(bool has[2], const ki_config *config);
/* Queue the copy of what a step with prompts reads, from `up`, and of n_bytes of the results, which
 * begin at `from` there and in `down`. */
kivi_status ki_cuda_put_upload(ki_cuda_backend *b, kivi_error *err);
kivi_status ki_cuda_get_result(ki_cuda_backend *b, size_t from, size_t n_bytes, kivi_error *err);
/* Queues all kernels of a step of this shape; what they read is in the upload. */
kivi_status ki_cuda_run_pass(ki_cuda_backend *b, const ki_cuda_shape *shape, kivi_error *err);

#endif
