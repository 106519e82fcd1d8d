/* sample.c: the next token of a session, drawn where its logits are (model/draw.h). */
#include "engine.h"

struct kivi_sampler {
    ki_mem *mem;
    kivi_sampler_options options;
    uint64_t n_drawn;
    ki_candidate *candidates; /* [V] */
    float *logits;            /* [V] */
    uint32_t n_vocab;
    ki_editor editor;
};

kivi_sampler_options kivi_sampler_defaults(void) {
    return (kivi_sampler_options){.temperature = 0.8f,
                                  .top_k = 40,
                                  .top_p = 0.95f,
                                  .min_p = 0.05f,
                                  .repeat_penalty = 1.1f,
                                  .repeat_tokens = 64};
}

kivi_status ki_sampler_check(const kivi_sampler_options *o, kivi_error *err) {
    if (!(o->temperature >= 0 && o->temperature <= 100))
        return KI_FAIL(err, ARG, "sampler: temperature %g, expected 0 to 100",
                       (double)o->temperature);
    if (!(o->top_p > 0 && o->top_p <= 1))
        return KI_FAIL(err, ARG, "sampler: top-p %g, expected more than 0 and at most 1",
                       (double)o->top_p);
    if (!(o->min_p >= 0 && o->min_p <= 1))
        return KI_FAIL(err, ARG, "sampler: min-p %g, expected 0 to 1", (double)o->min_p);
    if (!(o->repeat_penalty >= 0.01f && o->repeat_penalty <= 100))
        return KI_FAIL(err, ARG, "sampler: repetition penalty %g, expected 0.01 to 100",
                       (double)o->repeat_penalty);
    return KIVI_OK;
}

kivi_status kivi_sampler_create(kivi_sampler **out, const kivi_engine *engine,
                                const kivi_sampler_options *options, kivi_error *err) {
    ki_mem *mem = &((kivi_engine *)engine)->mem; /* counting is all that is done to it */
    void *p;
    *out = NULL;
    KI_TRY(ki_sampler_check(options, err));
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(kivi_sampler), err));
    kivi_sampler *s = p;
    *s = (kivi_sampler){.mem = mem, .options = *options, .n_vocab = engine->info.n_vocab};
    kivi_status status =
        ki_alloc_array(&p, mem, KI_TAG_workspace, s->n_vocab, sizeof(ki_candidate), err);
    s->candidates = p;
    if (status == KIVI_OK)
        status = ki_alloc_array(&p, mem, KI_TAG_workspace, s->n_vocab, sizeof(float), err);
    if (status == KIVI_OK) s->logits = p;
    if (status == KIVI_OK)
        status = ki_editor_init(&s->editor, mem, s->n_vocab, options->repeat_tokens, err);
    if (status != KIVI_OK) kivi_sampler_destroy(&s);
    *out = s;
    return status;
}

void kivi_sampler_destroy(kivi_sampler **sampler) {
    kivi_sampler *s = *sampler;
    if (!s) return;
    ki_free(s->mem, s->candidates);
    ki_free(s->mem, s->logits);
    ki_editor_deinit(&s->editor);
    ki_free(s->mem, s);
    *sampler = NULL;
}

/* What this sampler does with the session's last row. Each token of the recent history is edited
 * once, however often it occurs. */
static ki_draw draw_of(kivi_sampler *s, const kivi_session *session) {
    const kivi_sampler_options *o = &s->options;
    uint32_t length = kivi_session_length(session), n = KI_MIN(length, o->repeat_tokens);
    const int32_t *recent = session->history + length - n;
    ki_editor_clear(&s->editor);
    for (uint32_t i = 0; i < n && o->repeat_penalty != 1; i++)
        ki_editor_at(&s->editor, recent[i])->what = KI_EDIT_REPEATED;
    return (ki_draw){.temperature = o->temperature,
                     .top_p = o->top_p,
                     .min_x = ki_draw_min_x(o->min_p),
                     .top_k = o->top_k,
                     .repetition = o->repeat_penalty,
                     .n_edits = s->editor.n_edits,
                     .edits = s->editor.edits,
                     .u = ki_sample_draw(o->seed, s->n_drawn)};
}

/* From logits in this process's memory. */
static kivi_status draw_here(int32_t *id, kivi_sampler *s, const kivi_session *session,
                             uint32_t row, const ki_draw *draw, kivi_error *err) {
    const float *logits = kivi_session_logits(session, row);
    if (!logits) return KI_FAIL(err, DEVICE, "sampler: the device does not give its logits");
    memcpy(s->logits, logits, s->n_vocab * sizeof *logits);
    ki_draw_edit_logits(s->logits, draw);
    *id = ki_sample(s->candidates, s->logits, s->n_vocab, draw);
    if (*id < 0) return KI_FAIL(err, NUMERIC, "sampler: the logits are not numbers");
    return KIVI_OK;
}

kivi_status kivi_sampler_next(int32_t *id, kivi_sampler *s, const kivi_session *session,
                              kivi_error *err) {
    ki_backend *b = session->engine->backend;
    if (!session->n_logit_rows || session->logits_step != session->engine->n_steps)
        return KI_FAIL(err, ARG, "sampler: the session has no logits yet");
    bool plain = s->options.temperature == 0 && s->options.repeat_penalty == 1;
    *id = session->best;
    if (plain && *id >= 0) return KIVI_OK; /* a device has looked already */
    uint32_t row = session->n_logit_rows - 1;
    ki_draw draw = draw_of(s, session);
    *id = -1;
    if (b->api->draw) KI_TRY(b->api->draw(id, b, session->logit_row + row, &draw, err));
    if (*id < 0) KI_TRY(draw_here(id, s, session, row, &draw, err));
    s->n_drawn += s->options.temperature > 0;
    return KIVI_OK;
}
