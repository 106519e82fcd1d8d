/* engine.h: kivi.h from the inside. */
#ifndef KI_ENGINE_H
#define KI_ENGINE_H
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
    ki_arena *arena;
    kivi_engine_options options;
    kivi_engine_info info;
    ki_batch_item *batch;    /* [max_sessions] */
    kivi_step_item **owners; /* [max_sessions]: the caller's item of each batch item */
    uint64_t fingerprint;
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
    const float *logits; /* rows of the last step, NULL when there are none */
    uint32_t n_logit_rows;
    uint64_t logits_step; /* the engine's n_steps when they were made */
};

kivi_status ki_engine_load_vocab(kivi_engine *engine, const ki_file *file, kivi_error *err);
/* A session without a history, for fork and load to fill. */
kivi_status ki_session_new(kivi_session **out, kivi_engine *engine, kivi_error *err);
uint32_t ki_session_runs(const kivi_session *session, const ki_run **runs);

#endif
