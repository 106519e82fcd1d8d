/* backend.h: where a model runs. The engine has the sessions, the text and the policy of the cache;
 * a backend has the weights, the bytes of pages and 16-bit rows, and the forward pass. There are
 * two: this process (ki_cpu_backend_create), and an NVIDIA GPU by libkivi-cuda.so, which the engine
 * loads when it is asked for and which hands out one table (ki_backend_library).
 *
 * Both see the same structures: ki_model, kivi_cache and kivi_seq are the library's, and a GPU's
 * backend reads them, with pointers to data that mean its device. So the two must be of one build:
 * ki_library_check compares. */
#ifndef KI_BACKEND_H
#define KI_BACKEND_H
#include "kivi_bench.h"
#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ki_backend ki_backend;

typedef struct ki_backend_sizes {
    uint32_t n_rows, n_logit_rows; /* most rows of a step, and of logits */
    uint32_t max_items, max_tokens; /* most sequences of a step; longest sequence */
} ki_backend_sizes;

typedef struct ki_backend_api {
    void (*destroy)(ki_backend *b); /* after its cache and model are gone */
    /* Why this model or cache kind cannot run here. */
    kivi_status (*check)(const ki_backend *b, const ki_config *config, const ki_layout *layout,
                         kivi_error *err);
    /* Bytes that start will take, by tag, and that weights will take as they are loaded. */
    void (*plan)(kivi_memory *out, const ki_backend *b, const ki_config *config,
                 const ki_layout *layout, const ki_backend_sizes *sizes);
    /* Memory of a step, once model and cache are there; both must outlive the steps. */
    kivi_status (*start)(ki_backend *b, const ki_model *model, kivi_cache *cache,
                         const ki_backend_sizes *sizes, kivi_error *err);
    void (*stop)(ki_backend *b); /* gives that back; the end of the steps */
    /* ki_forward of model.h. A fault of the device fails every item that was not done. */
    void (*forward)(ki_backend *b, ki_batch *batch);
    /* float32 [V] of a row of the last pass, in this process's memory, lent until the next one;
     * NULL: the device failed. */
    const float *(*logits)(ki_backend *b, uint32_t row);
    /* One token of a row of the last pass, by draw.h's definition, without its logits leaving the
     * device. *id -1: this row's distribution is one of those it leaves to the caller, who draws
     * from its logits. NULL where logits are here anyway. */
    kivi_status (*draw)(int32_t *id, ki_backend *b, uint32_t row, const ki_draw *draw,
                        kivi_error *err);
    /* The bytes of a whole sequence between the device's and one of the same kind and state in this
     * process's form (ki_seq_take_shape): for files. NULL where they are here already. */
    kivi_status (*exchange)(ki_backend *b, kivi_seq *host, kivi_seq *there, bool to_host,
                            kivi_error *err);
} ki_backend_api;

struct ki_backend {
    const ki_backend_api *api;
    const ki_device *device;                /* where its data is; NULL: this process */
    const ki_matrix_device *matrix_device;  /* how the loader hands matrices over; NULL likewise */
    void (*adapt)(ki_layout *layout);       /* ki_cache_options.adapt */
    char name[96];                          /* "cuda:0 NVIDIA H100 80GB HBM3" */
    uint64_t limit_bytes, free_bytes;       /* of device memory: --gpu-memory (0: none), at start */
};

kivi_status ki_cpu_backend_create(ki_backend **out, ki_mem *mem, kivi_error *err);

/* ---- a backend in a library of its own ---- */

typedef struct ki_backend_options {
    ki_mem *mem;          /* of this process, for the backend's own structures */
    uint32_t device;      /* its number */
    uint64_t limit_bytes; /* most device memory to take; 0: all there is */
    ki_weight compute;    /* what products read: KI_WEIGHT_F32, F16 or BF16 */
    uint32_t without;     /* KI_PART_...: parts that are left out */
    bool invariant;       /* a sequence's bits do not depend on its neighbours */
    void (*frequencies)(float *out, const ki_rope *rope, uint32_t head_dim,
                        uint32_t length); /* ki_rope_frequencies, which is on this side */
    void (*log)(void *user, const char *line); /* NULL: silent */
    void *log_user;
} ki_backend_options;

typedef struct ki_library {
    char version[16];
    uint32_t n_bytes[12]; /* sizes of the structures both sides read: ki_library_fill */
    /* DEVICE: there is no such device, or it is of a kind that is not supported. */
    kivi_status (*open)(ki_backend **out, const ki_backend_options *options, kivi_error *err);
    /* kivi_bench_attention on device `number`; the options are checked. */
    kivi_status (*bench)(const kivi_bench_options *options, uint32_t number, kivi_error *err);
} ki_library;

/* The symbol that a library exports. */
#define KI_LIBRARY_SYMBOL "ki_backend_library"
typedef const ki_library *(*ki_library_fn)(void);

static inline void ki_library_fill(ki_library *out) {
    const uint32_t n_bytes[12] = {sizeof(ki_model),           sizeof(kivi_cache),
                                  sizeof(kivi_seq),           sizeof(ki_layout),
                                  sizeof(ki_batch_item),      sizeof(ki_config),
                                  sizeof(ki_backend_api),     sizeof(ki_device),
                                  sizeof(kivi_bench_options), sizeof(kivi_bench_row),
                                  sizeof(ki_draw),            sizeof(ki_backend_options)};
    memset(out->version, 0, sizeof out->version);
    memcpy(out->version, KIVI_VERSION, sizeof KIVI_VERSION);
    memcpy(out->n_bytes, n_bytes, sizeof n_bytes);
}

#ifdef __cplusplus
}
#endif
#endif
