/* model.h: a transformer's configuration, its weights by meaning, and the forward pass over a batch
 * of rows of several sequences. A family is a line of the table in family.c: how it reads its
 * configuration, what a file calls its parts, and its pass over the layers. */
#ifndef KI_MODEL_H
#define KI_MODEL_H
#include "cache.h"
#include "draw.h"
#include "kernel.h"
#include "load.h"

enum { KI_MAX_LAYERS = 1024 };

typedef struct ki_family ki_family; /* model_private.h */

typedef enum ki_rope_scaling {
    KI_ROPE_NONE,
    KI_ROPE_LINEAR,
    KI_ROPE_LLAMA3,
    KI_ROPE_YARN,
    KI_ROPE_DYNAMIC /* NTK: the base grows with the length (rope.c) */
} ki_rope_scaling;

typedef struct ki_rope {
    ki_rope_scaling scaling;
    double theta, factor;
    double low, high;    /* llama3: frequency factors; yarn: beta_slow and beta_fast */
    double original_ctx; /* the context before it was stretched */
    double attention;    /* cosines and sines are multiplied by it (yarn), else 1 */
    bool keep_fractions; /* yarn with "truncate": false */
} ki_rope;

/* Radians a position, [head_dim / 2], for a sequence of `length` tokens (dynamic NTK alone asks).
 */
void ki_rope_frequencies(float *out, const ki_rope *rope, uint32_t head_dim, uint32_t length);

typedef struct ki_config {
    char architecture[32];
    const ki_family *family;
    uint32_t n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab;
    uint32_t ctx_tokens; /* the context it was trained for */
    uint32_t window;     /* a local layer's query at p sees positions > p - window; 0: none is */
    bool local[KI_MAX_LAYERS];
    ki_rope rope[2]; /* [1]: the local layers' own, when n_ropes is 2 */
    uint32_t n_ropes;
    float norm_eps, embed_scale;
    float query_scale; /* scores are divided by sqrt(D) and multiplied by this */
    bool paired_rows;  /* the file's q and k rows pair (2j, 2j+1): they are put apart at load */
    bool tied_output;
    bool qkv_bias, head_norms, post_norms; /* parts beyond the Llama ones */
    bool layer_norm;                       /* with a mean and a bias, not the root mean square */
    bool one_norm;                         /* a block's attention and MLP share one */
    bool fused_qkv, no_gate;
    bool norm_plus_one; /* the file's norm weights count from 1 */
    bool tanh_gelu;     /* instead of silu */
} ki_config;

/* From GGUF metadata or config.json. UNSUPPORTED names what is not built yet. */
kivi_status ki_config_read(ki_config *out, const ki_file *file, kivi_error *err);
/* The longest reach of any layer: what lies further back is never read again; 0: all is read. */
uint32_t ki_config_window(const ki_config *config);

typedef struct ki_norm {
    float *weight, *bias; /* bias NULL: root mean square */
} ki_norm;

typedef struct ki_layer {
    ki_norm attn_norm, ffn_norm, post_attn_norm, post_ffn_norm; /* [n_embd]; weight NULL: none */
    ki_norm q_norm, k_norm;                                     /* [D] */
    float *qkv_bias;                                            /* [(H + 2 Hk) D], or NULL */
    ki_matrix q, k, v, o, gate, up, down;                       /* [outputs][inputs] */
} ki_layer;

typedef struct ki_model {
    ki_config config;
    ki_mem *mem;
    ki_matrix embedding, output; /* output.tiles is embedding.tiles when tied */
    ki_norm output_norm;
    float *rope_freq; /* [n_ropes][D / 2]: radians a position */
    ki_layer *layers; /* [n_layers] */
    const ki_device *device; /* tiles of matrices are there, in its form; NULL: here, as dense.h */
    uint64_t n_params, fingerprint;
    char weight_type[16]; /* the type most bytes have */
} ki_model;

/* How rows of a matrix get to another device: group says that the matrices placed next, of
 * n_elements together, are to stand one behind the other; place makes room for out->n_rows rows of
 * a file type
 * and sets type (what the elements become) and tiles; put hands over n_rows rows from first_row on,
 * in the file's form, one after the other. The bytes may be overwritten when put returns. */
typedef struct ki_matrix_device {
    void *context;
    kivi_status (*group)(void *context, size_t n_elements, kivi_error *err);
    kivi_status (*place)(ki_matrix *out, void *context, ki_dtype dtype, kivi_error *err);
    kivi_status (*put)(const ki_matrix *matrix, void *context, ki_dtype dtype, const uint8_t *rows,
                       size_t row_bytes, uint32_t first_row, uint32_t n_rows, kivi_error *err);
} ki_matrix_device;

typedef struct ki_model_options {
    ki_weight rope_type; /* the rotary frequencies are rounded to it (F32: not at all) */
    bool dummy;          /* random weights in place of the file's, of this seed and type */
    uint64_t dummy_seed;
    const char *dummy_type; /* NULL: what config.json says */
    const ki_device *device; /* matrices go there, by matrix_device; NULL: they stay here */
    const ki_matrix_device *matrix_device;
} ki_model_options;

/* Reads and repacks all weights, spread over the workers. */
/* How a tensor's elements stand in a matrix: the type of the same name. */
ki_weight ki_weight_of(ki_dtype dtype);
kivi_status ki_model_load(ki_model **out, ki_mem *mem, const ki_file *file, ki_workers *workers,
                          const ki_model_options *options, kivi_error *err);
void ki_model_destroy(ki_model **model);
/* model->fingerprint: a number that two different models do not share in practice, of shapes and a
 * sample of the weights; the same wherever the matrices went. */

/* Memory of a step of at most n_rows rows and n_logit_rows rows of logits; made once. */
typedef struct ki_arena ki_arena;
kivi_status ki_arena_create(ki_arena **out, ki_mem *mem, const ki_config *config, uint32_t n_rows,
                            uint32_t n_logit_rows, uint32_t max_items, kivi_error *err);
void ki_arena_destroy(ki_arena **arena);

typedef struct ki_batch_item {
    kivi_seq *seq;         /* in a step of n_rows rows (kivi_seq_begin) */
    const int32_t *tokens; /* [n_rows], checked */
    uint32_t n_rows;
    bool all_logits;    /* of every row, not of the last one */
    kivi_status status; /* in and out: only KIVI_OK items are evaluated */
    kivi_error *err;
    const ki_draw *draw; /* of a token from its last row, by a backend that can; NULL: none */
    uint32_t logit_row;  /* out: of its logits, [V], or [n_rows][V] with all_logits */
    int32_t best;        /* out: the largest of its last row, where a device knows it; else -1 */
    int32_t drawn;       /* out: by draw; -1: nobody has drawn, the logits say the rest */
} ki_batch_item;

typedef struct ki_batch {
    ki_batch_item *items;
    size_t n_items;
} ki_batch;

/* Floats between two rows of logits: whole tiles of the output matrix. */
static inline size_t ki_logits_stride(const ki_config *config) {
    return ((size_t)config->n_vocab + KI_TILE_ROWS - 1) / KI_TILE_ROWS * KI_TILE_ROWS;
}
/* Logits of a row of the last pass, [V]; lent until the next one. */
const float *ki_arena_logits(const ki_arena *arena, const ki_config *config, uint32_t row);
/* One pass. An item whose keys or values are not finite gets NUMERIC and drops out; the others do
 * not notice. */
void ki_forward(const ki_model *model, ki_arena *arena, kivi_cache *cache, ki_batch *batch);

#endif
