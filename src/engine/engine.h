/* engine.h: kivi.h from the inside. */
#ifndef KI_ENGINE_H
#define KI_ENGINE_H
#include "backend.h"
#include "cache.h"
#include "model.h"
#include "save.h"
#include "vocab.h"

struct kivi_engine {
    ki_mem mem;
    ki_workers *workers;
    ki_model *model;
    kivi_vocab *vocab;     /* NULL: the file has none that is known; token ids still work */
    char vocab_fault[200]; /* why */
    kivi_cache *cache;
    kivi_memory planned; /* of a device: all that it will hold, */
    uint64_t planned_prompt_bytes; /* and of it the larger rings of prompts */
    void *library;       /* libkivi-cuda.so, open as long as the backend; NULL: the CPU's */
    ki_backend *backend; /* where model and cache have their data and steps run */
    kivi_engine_options options;
    kivi_engine_info info;
    ki_batch_item *batch;    /* [max_sessions] */
    kivi_step_item **owners; /* [max_sessions]: the caller's item of each batch item */
    uint64_t n_steps; /* logits are those of the last one */
};

/* A prompt that was fed: needed to evaluate a history again exactly as it was. */
typedef struct ki_run {
    uint32_t start, n_tokens;
} ki_run;

struct kivi_session {
    kivi_engine *engine;
    kivi_seq *seq;
    int32_t *history;    /* [ctx_tokens] */
    ki_buf runs;         /* of ki_run */
    uint32_t logit_row, n_logit_rows; /* rows of the last step; none: n_logit_rows 0 */
    int32_t best;                     /* the largest of the last row, -1: nobody has looked */
    uint64_t logits_step; /* the engine's n_steps when they were made */
};

/* ---- backend.c ---- */
typedef enum ki_device_kind { KI_DEVICE_AUTO, KI_DEVICE_CPU, KI_DEVICE_CUDA } ki_device_kind;
kivi_status ki_device_parse(ki_device_kind *kind, uint32_t *number, const char *name,
                            kivi_error *err);
/* libkivi-cuda.so of this build; *handle is set also where that fails, for the caller to dlclose
 * if it is not NULL. asked: the device's name, for the error. */
kivi_status ki_library_open(void **handle, const ki_library **library, const char *asked,
                            kivi_error *err);
kivi_status ki_engine_open_backend(kivi_engine *engine, kivi_error *err);
void ki_engine_close_backend(kivi_engine *engine);
kivi_status ki_engine_check_plan(kivi_engine *engine, const ki_layout *layout, uint32_t n_pages,
                                 const ki_backend_sizes *sizes, kivi_error *err);
void ki_engine_log(const kivi_engine *engine, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

kivi_status ki_engine_load_vocab(kivi_engine *engine, const ki_file *file, kivi_error *err);
/* A session without a history, for fork and load to fill. */
kivi_status ki_session_new(kivi_session **out, kivi_engine *engine, kivi_error *err);
/* ---- draw.c: draw.h's definition on logits in this process's memory ---- */
typedef struct ki_candidate {
    uint64_t weight;
    float logit;
    int32_t id;
} ki_candidate;
/* The id that draw->u falls on, or -1 where the logits are not numbers. The draw's edits must have
 * been made. all: scratch [V]. */
int32_t ki_sample(ki_candidate *all, const float *logits, uint32_t n_vocab, const ki_draw *draw);
/* In [0, 1): SplitMix64, one multiply-xor chain, the same everywhere. */
double ki_sample_draw(uint64_t seed, uint64_t index);
float ki_draw_min_x(float min_p); /* of ki_draw */
/* All edits but that of ends; then that, when everything else that takes logits away is done. */
void ki_draw_edit_logits(float *logits, const ki_draw *draw);
void ki_draw_hide_ends(float *logits, uint32_t n_vocab, const ki_draw *draw);

/* Gathers a draw's edits: one for each id. */
typedef struct ki_editor {
    ki_mem *mem;
    ki_draw_edit *edits; /* [max_edits] */
    uint32_t *places;    /* [V]: number of its edit + 1; 0: it has none */
    uint32_t n_edits, max_edits;
} ki_editor;
kivi_status ki_editor_init(ki_editor *e, ki_mem *mem, uint32_t n_vocab, uint32_t max_edits,
                           kivi_error *err);
void ki_editor_deinit(ki_editor *e);
void ki_editor_clear(ki_editor *e);
/* The edit of id, lent until the next call. At most max_edits different ones are asked for. */
ki_draw_edit *ki_editor_at(ki_editor *e, int32_t id);

/* ---- sample.c ---- */
kivi_status ki_sampler_check(const kivi_sampler_options *options, kivi_error *err);

uint32_t ki_session_runs(const kivi_session *session, const ki_run **runs);

#endif
