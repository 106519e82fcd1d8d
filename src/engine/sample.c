/* sample.c: from logits to one token. Order: repetition penalty, temperature, top-k, top-p, min-p,
 * draw. */
#include "engine.h"

#include <math.h>

struct kivi_sampler {
    ki_mem *mem;
    kivi_sampler_options options;
    uint64_t n_drawn;
    ki_candidate *candidates; /* [V] */
    float *logits;            /* [V] */
    uint32_t n_vocab;
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
    if (status != KIVI_OK) kivi_sampler_destroy(&s);
    *out = s;
    return status;
}

void kivi_sampler_destroy(kivi_sampler **sampler) {
    kivi_sampler *s = *sampler;
    if (!s) return;
    ki_free(s->mem, s->candidates);
    ki_free(s->mem, s->logits);
    ki_free(s->mem, s);
    *sampler = NULL;
}

/* Sixteen maxima side by side, which compilers know how to keep in registers; then where it is. A
 * comparison with what is not a number is false, so it counts only as the first of all. */
int32_t kivi_logits_argmax(const float *logits, uint32_t n_vocab) {
    float best[16], most = logits[0];
    uint32_t n_whole = n_vocab / 16 * 16;
    for (uint32_t j = 0; j < 16; j++) best[j] = most;
    for (uint32_t i = 0; i < n_whole; i += 16)
        for (uint32_t j = 0; j < 16; j++)
            best[j] = logits[i + j] > best[j] ? logits[i + j] : best[j];
    for (uint32_t j = 0; j < 16; j++) most = best[j] > most ? best[j] : most;
    for (uint32_t i = n_whole; i < n_vocab; i++) most = logits[i] > most ? logits[i] : most;
    for (uint32_t i = 0; i < n_vocab; i++)
        if (logits[i] == most) return (int32_t)i;
    return 0;
}

double ki_sample_draw(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

/* Each token of the recent history once, however often it occurs. */
static void penalize(kivi_sampler *s, const kivi_session *session) {
    uint32_t length = kivi_session_length(session), n = KI_MIN(length, s->options.repeat_tokens);
    const int32_t *recent = session->history + length - n;
    for (uint32_t i = 0; i < n; i++) {
        bool seen = false;
        for (uint32_t j = 0; j < i && !seen; j++) seen = recent[j] == recent[i];
        float *logit = &s->logits[recent[i]];
        if (!seen)
            *logit = *logit > 0 ? *logit / s->options.repeat_penalty
                                : *logit * s->options.repeat_penalty;
    }
}

/* A total order, best first, so that there is one outcome. */
static int by_logit(const ki_candidate *x, const ki_candidate *y) {
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

/* Heaps: sign 1 has the worst on top, -1 the best. */
static void sift_down(ki_candidate *heap, uint32_t n, uint32_t i, ki_candidate c, int sign) {
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && sign * by_logit(&heap[child + 1], &heap[child]) > 0) child++;
        if (sign * by_logit(&c, &heap[child]) >= 0) break;
        heap[i] = heap[child];
    }
    heap[i] = c;
}

static void make_heap(ki_candidate *all, uint32_t n, int sign) {
    for (uint32_t i = n / 2; i-- > 0;) sift_down(all, n, i, all[i], sign);
}

/* Candidates best first, as far as they are asked for: a heap whose best moves behind it. Sorting a
 * whole vocabulary would take longer than a small model's step. */
typedef struct ranking {
    ki_candidate *all;
    uint32_t n, n_heap;
    double sum; /* of all weights */
} ranking;

static const ki_candidate *ranked(ranking *r, uint32_t index) {
    while (r->n - r->n_heap <= index) {
        ki_candidate best = r->all[0];
        r->n_heap--;
        sift_down(r->all, r->n_heap, 0, r->all[r->n_heap], -1);
        r->all[r->n_heap] = best;
    }
    return &r->all[r->n - 1 - index];
}

/* The top-k, or all whose weight is not zero in float32 anyway, with weights relative to the best
 * one's. */
static ranking gather(ki_candidate *all, const float *logits, uint32_t n_vocab,
                      const kivi_sampler_options *o) {
    uint32_t k = o->top_k ? KI_MIN(o->top_k, n_vocab) : n_vocab, n = 0;
    float best = logits[kivi_logits_argmax(logits, n_vocab)];
    float floor = best - 104.0f * o->temperature; /* e^-104 is below the smallest float32 */
    for (uint32_t i = 0; i < n_vocab; i++) {
        ki_candidate c = {.logit = logits[i], .id = (int32_t)i};
        if (!(c.logit >= floor)) continue;
        if (n == k) {
            if (by_logit(&c, &all[0]) < 0) sift_down(all, n, 0, c, 1);
            continue;
        }
        all[n++] = c;
        if (n == k && k < n_vocab) make_heap(all, n, 1);
    }
    ranking r = {.all = all, .n = n, .n_heap = n};
    for (uint32_t i = 0; i < n; i++) {
        all[i].p = expf((all[i].logit - best) / o->temperature);
        r.sum += (double)all[i].p;
    }
    make_heap(all, n, -1);
    return r;
}

/* How many candidates stay; their weights in *kept. */
static uint32_t cut(double *kept, ranking *r, const kivi_sampler_options *o) {
    *kept = r->sum;
    if (o->top_p >= 1 && o->min_p == 0) return r->n;
    *kept = 0;
    for (uint32_t i = 0; i < r->n; i++) {
        float p = ranked(r, i)->p;
        if (i && (*kept >= (double)o->top_p * r->sum || p < o->min_p)) return i;
        *kept += (double)p;
    }
    return r->n;
}

int32_t ki_sample(ki_candidate *all, const float *logits, uint32_t n_vocab,
                  const kivi_sampler_options *o, double u) {
    if (o->temperature == 0) {
        int32_t id = kivi_logits_argmax(logits, n_vocab);
        return isnan(logits[id]) ? -1 : id;
    }
    ranking r = gather(all, logits, n_vocab, o);
    if (r.n == 0) return -1;
    double kept;
    uint32_t n = cut(&kept, &r, o);
    double left = u * kept;
    for (uint32_t i = 0; i + 1 < n; i++) {
        const ki_candidate *c = ranked(&r, i);
        if ((left -= (double)c->p) < 0) return c->id;
    }
    return ranked(&r, n - 1)->id;
}

kivi_status kivi_sampler_next(int32_t *id, kivi_sampler *s, const kivi_session *session,
                              kivi_error *err) {
    uint32_t last = session->n_logit_rows ? session->n_logit_rows - 1 : 0;
    bool plain = s->options.temperature == 0 && s->options.repeat_penalty == 1;
    if (plain && session->n_logit_rows && session->best >= 0 &&
        session->logits_step == session->engine->n_steps) { /* a device has looked already */
        *id = session->best;
        return KIVI_OK;
    }
    const float *logits = kivi_session_logits(session, last);
    if (!logits) return KI_FAIL(err, ARG, "sampler: the session has no logits yet");
    memcpy(s->logits, logits, s->n_vocab * sizeof *logits);
    if (s->options.repeat_penalty != 1) penalize(s, session);
    double u = ki_sample_draw(s->options.seed, s->n_drawn);
    *id = ki_sample(s->candidates, s->logits, s->n_vocab, &s->options, u);
    if (*id < 0) return KI_FAIL(err, NUMERIC, "sampler: the logits are not numbers");
    s->n_drawn += s->options.temperature > 0;
    return KIVI_OK;
}
