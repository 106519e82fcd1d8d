/* model.h: a transformer's configuration, its weights by meaning, and the forward pass over a batch
 * of rows of several sequences. Families share one pass here (llama.c); what a file calls its parts
 * is a table (names.c). */
#ifndef KI_MODEL_H
#define KI_MODEL_H
#include "cache.h"
#include "kernel.h"
#include "load.h"

typedef enum ki_rope_scaling { KI_ROPE_NONE, KI_ROPE_LINEAR, KI_ROPE_LLAMA3 } ki_rope_scaling;

typedef struct ki_config {
    char architecture[32];
    uint32_t n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab;
    uint32_t ctx_tokens; /* the context it was trained for */
    float norm_eps;
    double rope_theta, rope_factor, rope_low,
        rope_high; /* low and high: llama3's frequency factors */
    double rope_original_ctx;
    ki_rope_scaling rope_scaling;
    bool rope_interleaved; /* the file's q and k rows pair (2j, 2j+1): they are put apart at load */
    bool tied_output;
} ki_config;

/* From GGUF metadata or config.json. UNSUPPORTED names what is not built yet. */
kivi_status ki_config_read(ki_config *out, const ki_file *file, kivi_error *err);

typedef struct ki_layer {
    float *attn_norm, *ffn_norm;          /* [n_embd] */
    ki_matrix q, k, v, o, gate, up, down; /* [outputs][inputs] */
} ki_layer;

typedef struct ki_model {
    ki_config config;
    ki_mem *mem;
    ki_matrix embedding, output; /* output.tiles is embedding.tiles when tied */
    float *output_norm;
    float *rope_freq; /* [D / 2]: radians a position */
    ki_layer *layers; /* [n_layers] */
    uint64_t n_params;
    char weight_type[16]; /* the type most bytes have */
} ki_model;

/* Reads and repacks all weights, spread over the workers. */
/* rope_type: the rotary frequencies are rounded to it (F32: not at all). */
kivi_status ki_model_load(ki_model **out, ki_mem *mem, const ki_file *file, ki_workers *workers,
                          ki_weight rope_type, kivi_error *err);
void ki_model_destroy(ki_model **model);

/* Memory of a step of at most n_rows rows and n_logit_rows rows of logits; made once. */
typedef struct ki_arena ki_arena;
kivi_status ki_arena_create(ki_arena **out, ki_mem *mem, const ki_config *config, uint32_t n_rows,
                            uint32_t n_logit_rows, uint32_t max_items, kivi_error *err);
void ki_arena_destroy(ki_arena **arena);

typedef struct ki_batch_item {
    kivi_seq *seq;         /* in a step of n_rows rows (kivi_seq_begin) */
    const int32_t *tokens; /* [n_rows], checked */
    uint32_t n_rows;
    kivi_status status; /* in and out: only KIVI_OK items are evaluated */
    kivi_error *err;
    const float
        *logits; /* out: [V], or [n_rows][V] when the batch keeps all; lent until the next pass */
} ki_batch_item;

typedef struct ki_batch {
    ki_batch_item *items;
    size_t n_items;
    bool all_logits;
} ki_batch;

/* Floats between two rows of logits. */
size_t ki_logits_stride(const ki_config *config);
/* A number that two different models do not share in practice: shapes and a sample of the weights.
 */
uint64_t ki_model_fingerprint(const ki_model *model);
/* One pass. An item whose keys or values are not finite gets NUMERIC and drops out; the others do
 * not notice. */
void ki_forward(const ki_model *model, ki_arena *arena, kivi_cache *cache, ki_batch *batch);

/* ---- names.c ---- */
enum ki_part {
    KI_PART_EMBEDDING,
    KI_PART_OUTPUT,
    KI_PART_OUTPUT_NORM,
    KI_PART_ROPE_FREQ,
    KI_PART_ATTN_NORM,
    KI_PART_FFN_NORM,
    KI_PART_Q,
    KI_PART_K,
    KI_PART_V,
    KI_PART_O,
    KI_PART_GATE,
    KI_PART_UP,
    KI_PART_DOWN
};
/* The name a part has in this kind of file: "blk.3.attn_q.weight". name [n_bytes >= 96]. */
void ki_part_name(char *name, size_t n_bytes, ki_file_kind kind, enum ki_part part, uint32_t layer);

#endif
