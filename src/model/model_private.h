/* model_private.h: what the files of src/model share: the reader of configurations, the families'
 * table, and the pass with its arena. Nothing outside this folder includes it. */
#ifndef KI_MODEL_PRIVATE_H
#define KI_MODEL_PRIVATE_H
#include "model.h"

/* ---- config.c: a reader that stops at the first fault, so that lists of keys stay flat ---- */

/* Largest values taken from a file: far above any model, far below what could overflow a product.
 */
enum { KI_MAX_HEADS = 1024, KI_MAX_WIDTH = 1 << 20, KI_MAX_VOCAB = 1 << 24, KI_MAX_CTX = 1 << 28 };

typedef struct ki_reader {
    const ki_file *file;
    bool is_gguf;
    char prefix[32]; /* of GGUF keys: the architecture */
    kivi_error *err;
    kivi_status status;
} ki_reader;

/* Every value has a key in each form: GGUF's without the architecture, and the path in config.json;
 * NULL: that form has none. Missing: the fallback; a number whose fallback is 0 must be there. */
uint32_t ki_read_uint(ki_reader *r, const char *gguf, const char *hf, uint32_t max,
                      uint32_t fallback);
double ki_read_real(ki_reader *r, const char *gguf, const char *hf, double fallback);
bool ki_read_bool(ki_reader *r, const char *gguf, const char *hf, bool fallback);
void ki_read_text(ki_reader *r, char *out, size_t n_bytes, const char *gguf, const char *hf);
ki_value_kind ki_read_kind(ki_reader *r, const char *gguf, const char *hf);
/* The key is there and no 0, which many files write for "none". */
bool ki_read_is_set(const ki_reader *r, const char *gguf, const char *hf);
/* UNSUPPORTED: the key, what it is, what would do. */
void ki_refuse(ki_reader *r, const char *gguf, const char *hf, const char *found,
               const char *expected);
/* Refuses a flag of config.json that is on. */
void ki_refuse_flag(ki_reader *r, const char *hf);

/* Keys of sizes that families do not agree on, in config.json. */
typedef struct ki_size_keys {
    const char *layers, *heads, *kv_heads, *ff, *gguf_eps, *eps;
    double eps_default;
    uint32_t ff_times; /* the MLP's width as a multiple of the model's; 0: it must be given */
} ki_size_keys;
extern const ki_size_keys ki_usual_keys;
void ki_config_sizes(ki_config *c, ki_reader *r, const ki_size_keys *keys);
/* layer_types of config.json: which layers are local. False: the file has none. */
bool ki_config_layer_types(ki_config *c, ki_reader *r);

/* ---- rope.c ---- */

/* hf: the object in config.json ("rope_parameters"), theta: the older key beside it. */
void ki_rope_read(ki_rope *out, ki_reader *r, const ki_config *c, const char *hf, const char *theta,
                  double default_theta);

/* ---- parts and families ---- */

enum ki_part {
    KI_PART_EMBEDDING,
    KI_PART_OUTPUT,
    KI_PART_OUTPUT_NORM,
    KI_PART_ONE_NORM,  /* where attention and MLP share one (config one_norm), */
    KI_PART_ATTN_NORM, /* else these two */
    KI_PART_FFN_NORM,
    KI_PART_POST_ATTN_NORM,
    KI_PART_POST_FFN_NORM,
    KI_PART_Q_NORM,
    KI_PART_K_NORM,
    KI_PART_QKV, /* fused: GGUF q rows, k rows, v rows; Hugging Face one block a KV head */
    KI_PART_Q,
    KI_PART_K,
    KI_PART_V,
    KI_PART_O,
    KI_PART_GATE,
    KI_PART_UP,
    KI_PART_DOWN,
    KI_PART_COUNT
};

typedef struct ki_pass ki_pass;

struct ki_family {
    const char *gguf, *hf; /* general.architecture, model_type; NULL: that form has none */
    void (*read)(ki_config *c, ki_reader *r);
    const char *const (*names)[2]; /* [KI_PART_COUNT]: in GGUF, in a folder, without ".weight" */
    void (*layers)(ki_pass *p);    /* from x = embedding to x = the last layer's output */
};

const ki_family *ki_family_find(bool is_gguf, const char *name); /* NULL: none */
/* "llama, qwen2, ...": for errors. */
void ki_family_list(char *text, size_t n_bytes, bool is_gguf);
/* "blk.3.attn_q" + suffix (".weight", ".bias"). name [n_bytes >= 128] */
void ki_part_name(char *name, size_t n_bytes, const ki_family *family, bool is_gguf,
                  enum ki_part part, uint32_t layer, const char *suffix);

extern const char *const ki_llama_names[KI_PART_COUNT][2],
    *const ki_gemma_names[KI_PART_COUNT][2], *const ki_falcon_names[KI_PART_COUNT][2];
void ki_llama_read(ki_config *c, ki_reader *r);
void ki_mistral_read(ki_config *c, ki_reader *r);
void ki_qwen2_read(ki_config *c, ki_reader *r);
void ki_qwen3_read(ki_config *c, ki_reader *r);
void ki_gemma3_read(ki_config *c, ki_reader *r);
void ki_falcon_read(ki_config *c, ki_reader *r);
void ki_llama_layers(ki_pass *p);
void ki_falcon_layers(ki_pass *p);

/* ---- weights.c ---- */

/* A tensor that may stand in a file without a use. */
bool ki_is_known_extra(const char *name);

/* ---- dummy.c ---- */

/* The type of dummy matrices; ARG when the name is none. */
kivi_status ki_dummy_type(ki_dtype *out, const ki_file *file, const char *name, kivi_error *err);
/* A row in the file's form: values spread evenly, their squares summing to about 1. */
void ki_dummy_row(uint8_t *out, ki_dtype type, uint32_t n_cols, uint64_t seed, uint32_t row);

/* ---- pass.c: a step over all rows of a batch ---- */

typedef struct ki_place {
    uint32_t first_row, n_rows;
} ki_place;

struct ki_arena {
    ki_mem *mem;
    uint32_t max_rows, max_logit_rows, max_items;
    float *x, *h;           /* [rows][n_embd]: the residual stream, its norm */
    float *qkv;             /* [rows][(H + 2 Hk) D]: q, then k, then v */
    float *attn;            /* [rows][H D] */
    float *gate, *up;       /* [rows][n_ff] */
    float *delta;           /* [rows][n_embd]: what a block adds to x */
    float *cos, *sin;       /* [rows][n_ropes][D / 2] */
    int8_t *high, *low;     /* [rows][widest] each */
    float *scales;          /* [rows][widest / 32] */
    int32_t *sums;          /* [rows][widest / 16] */
    float *offsets;         /* [rows][widest / 32] */
    int16_t *pairs;         /* [rows][widest] */
    float *logits;          /* [logit rows][V to a multiple of 16] */
    uint32_t *row_item;     /* [rows] */
    ki_place *places;       /* [max_items] */
    ki_attend_item *attend; /* [max_items] */
};

struct ki_pass {
    const ki_model *m;
    ki_arena *a;
    kivi_cache *cache;
    ki_batch *batch;
    const ki_dense_kernels *dense;
    uint32_t n_rows, layer;
    uint32_t q_dim, kv_dim, qkv_dim;
    const ki_norm *norm, *post_norm; /* for the row functions */
    const float *source;             /* rows the next product reads */
    uint32_t source_cols;
    bool quantize; /* whether that product reads 15-bit activations */
};

typedef struct ki_product {
    float *out;
    size_t out_stride;
    const ki_matrix *matrix;
} ki_product;

/* Calls fn(pass, row) for every row, over the workers when it is worth it. */
void ki_pass_rows(ki_pass *p, uint32_t n_rows, void (*fn)(ki_pass *p, uint32_t row));
/* The rows that `products` will read; they are quantized row by row (ki_pass_quantize) when one of
 * the matrices asks for it. */
void ki_pass_source(ki_pass *p, const float *rows, uint32_t n_cols, const ki_product *products,
                    size_t n_products);
void ki_pass_quantize(ki_pass *p, uint32_t row);
void ki_pass_multiply(ki_pass *p, uint32_t n_rows, const ki_product *products, size_t n_products);
/* out = norm(in), one row [n]; in place is allowed. */
void ki_pass_norm(const ki_pass *p, float *out, const float *in, const ki_norm *norm, uint32_t n);
/* h = norm(x), ready for the products that ki_pass_source named. */
void ki_pass_norm_row(ki_pass *p, uint32_t row);
/* q, k, v of all rows are in a->qkv: biases, head norms, rope, cache, attention, output product
 * into a->delta. */
void ki_pass_attention(ki_pass *p, const ki_layer *layer);

#endif
