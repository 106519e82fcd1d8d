#include "hosted.h"

#include <stdlib.h>

enum { DEFAULT_STEP_TOKENS = 512 };

static void adjust(kivi_engine_options *eo, void *user) {
    const options *o = user;
    eo->max_sessions = o->max_seqs;
    /* Running sequences wait for each step's chunks: not what is fastest for a prompt alone. */
    eo->step_rows = o->step_tokens ? o->step_tokens : DEFAULT_STEP_TOKENS;
    if (o->kv_memory_given) eo->kv_bytes = (uint64_t)o->kv_memory_mib << 20;
    /* Prompts share their beginnings, and no prompt holds all its rows in 16 bit; what it costs is
     * in ARCHITECTURE.md. */
    if (!o->rule) eo->kv.rule = KIVI_RULE_STREAM;
    /* Room for logprobs of prompts beside the rows of running sequences. */
    eo->logit_rows = o->max_seqs + 64;
}

static size_t text_bytes(void *user, int32_t id, char *out, size_t max_bytes) {
    const kivi_vocab *vocab = user;
    return kivi_vocab_is_control(vocab, id) ? 0 : kivi_vocab_bytes(vocab, id, out, max_bytes);
}

static int make_tables(server *s) {
    uint32_t n_vocab = kivi_engine_info_get(s->engine)->n_vocab;
    if ((s->vocab = kivi_engine_vocab(s->engine)) == NULL) return EXIT_OK;
    uint32_t n_known = (uint32_t)kivi_vocab_count(s->vocab);
    if (n_known > n_vocab) n_known = n_vocab;
    s->table = token_table_create(n_known, text_bytes, (void *)(uintptr_t)s->vocab);
    s->end_ids = calloc(n_known + 1, sizeof *s->end_ids);
    if (!s->table || !s->end_ids) return out_of_memory("the vocabulary");
    for (uint32_t i = 0; i < n_known; i++)
        if (kivi_vocab_is_end(s->vocab, (int32_t)i)) s->end_ids[s->n_end_ids++] = (int32_t)i;
    return EXIT_OK;
}

int model_load(server *s, const options *o,
               void (*on_step)(void *user, const kivi_step_report *report)) {
    kivi_error err = {0};
    kivi_scheduler *scheduler = NULL;
    int code = open_engine(&s->engine, o, options_kind(o), adjust, (void *)(uintptr_t)o);
    if (!code) code = make_tables(s);
    if (code) return code;
    kivi_scheduler_options so = kivi_scheduler_defaults();
    so.max_running = o->max_seqs;
    so.max_queued = o->max_queued;
    so.max_queued_tokens = o->max_queued_tokens;
    so.no_prefix_cache = o->no_prefix_cache;
    so.on_step = on_step;
    so.on_step_user = s;
    if (kivi_scheduler_create(&scheduler, s->engine, &so, &err)) return fail_with(&err);
    pthread_mutex_lock(&s->lock);
    s->scheduler = scheduler;
    if (atomic_load(&s->draining)) kivi_scheduler_drain(scheduler);
    pthread_mutex_unlock(&s->lock);
    return EXIT_OK;
}

void model_unload(server *s) {
    kivi_scheduler_destroy(&s->scheduler);
    kivi_engine_destroy(&s->engine);
    token_table_destroy(&s->table);
    free(s->end_ids);
    s->end_ids = NULL;
}
