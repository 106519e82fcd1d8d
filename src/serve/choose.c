/* choose.c: from logits to a token, and to log-probabilities. Order: bias, penalties (repetition,
 * then frequency and presence), what may not come (end tokens before min_tokens, the constraint),
 * temperature, top-k, top-p, min-p, draw. */
#include "serve.h"

#include <math.h>

kivi_status ki_chooser_init(ki_chooser *ch, ki_mem *mem, const ki_machine *machine,
                            kivi_error *err) {
    size_t n = machine->n_vocab;
    void *p;
    *ch = (ki_chooser){.mem = mem, .machine = machine};
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n, sizeof(ki_candidate), err));
    ch->candidates = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n, sizeof(float), err));
    ch->logits = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n / 32 + 1, sizeof(uint32_t), err));
    ch->allowed = p;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n, sizeof(uint32_t), err));
    ch->counts = p;
    return KIVI_OK;
}

void ki_chooser_deinit(ki_chooser *ch) {
    if (!ch->mem) return;
    ki_free(ch->mem, ch->candidates);
    ki_free(ch->mem, ch->logits);
    ki_free(ch->mem, ch->allowed);
    ki_free(ch->mem, ch->counts);
    *ch = (ki_chooser){0};
}

/* ---- end tokens ---- */

static bool is_among(int32_t token, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] == token) return true;
    return false;
}

bool ki_is_end(const ki_machine *m, const ki_request *q, int32_t token) {
    return (!q->r.ignore_eos && is_among(token, m->ends, m->n_ends)) ||
           is_among(token, q->r.stop_ids, q->r.n_stop_ids);
}

/* ---- the distribution that is drawn from ---- */

/* counts: how often each of ids occurs; each is dealt with once, where its count is taken away. */
static void count(uint32_t *counts, const int32_t *ids, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) counts[ids[i]]++;
}

static void repetition(ki_chooser *ch, float penalty, const int32_t *ids, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        if (!ch->counts[ids[i]]) continue;
        float *x = &ch->logits[ids[i]];
        *x = *x > 0 ? *x / penalty : *x * penalty;
        ch->counts[ids[i]] = 0;
    }
}

static void penalize(ki_chooser *ch, const ki_choice *c) {
    const kivi_request *r = &c->request->r;
    const int32_t *ids = ki_generated_ids(c);
    uint32_t n = ki_generated(c), n_prompt = (uint32_t)r->n_prompt;
    if (r->repetition_penalty != 1) {
        count(ch->counts, r->prompt, n_prompt);
        count(ch->counts, ids, n);
        repetition(ch, r->repetition_penalty, r->prompt, n_prompt);
        repetition(ch, r->repetition_penalty, ids, n);
    }
    if (r->frequency_penalty == 0 && r->presence_penalty == 0) return;
    count(ch->counts, ids, n);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t *times = &ch->counts[ids[i]];
        if (*times)
            ch->logits[ids[i]] -= r->frequency_penalty * (float)*times + r->presence_penalty;
        *times = 0;
    }
}

static kivi_status ask_constraint(ki_chooser *ch, const ki_choice *c, kivi_error *err) {
    const kivi_constraint *k = &c->request->r.constraint;
    uint32_t n_vocab = ch->machine->n_vocab, n_words = (n_vocab + 31) / 32;
    memset(ch->allowed, 0, n_words * sizeof *ch->allowed);
    KI_TRY(k->mask(k->user, c->index, ki_generated_ids(c), ki_generated(c), ch->allowed, err));
    bool any = false;
    for (uint32_t i = 0; i < n_vocab; i++) {
        bool may = ch->allowed[i / 32] >> i % 32 & 1;
        any = any || may;
        if (!may) ch->logits[i] = -INFINITY;
    }
    if (any) return KIVI_OK;
    return KI_FAIL(err, INTERNAL, "constraint: no token may follow the %u generated ones",
                   ki_generated(c));
}

/* An end token too early; not where nothing else is left. */
static void hide_ends(ki_chooser *ch, const ki_choice *c) {
    const ki_request *q = c->request;
    uint32_t n_left = 0;
    for (uint32_t i = 0; i < ch->machine->n_vocab && !n_left; i++)
        n_left += ch->logits[i] > -INFINITY && !ki_is_end(ch->machine, q, (int32_t)i);
    if (!n_left) return;
    for (uint32_t i = 0; !q->r.ignore_eos && i < ch->machine->n_ends; i++)
        ch->logits[ch->machine->ends[i]] = -INFINITY;
    for (size_t i = 0; i < q->r.n_stop_ids; i++) ch->logits[q->r.stop_ids[i]] = -INFINITY;
}

static bool is_plain(const ki_choice *c) {
    const kivi_request *r = &c->request->r;
    return r->repetition_penalty == 1 && r->frequency_penalty == 0 && r->presence_penalty == 0 &&
           r->n_biases == 0 && !r->constraint.mask && ki_generated(c) >= r->min_tokens;
}

bool ki_takes_best(const ki_choice *c) { return c->request->r.temperature == 0 && is_plain(c); }

static kivi_status adjust(ki_chooser *ch, const ki_choice *c, const float *logits,
                          kivi_error *err) {
    const kivi_request *r = &c->request->r;
    memcpy(ch->logits, logits, ch->machine->n_vocab * sizeof *logits);
    for (size_t i = 0; i < r->n_biases; i++) {
        float *x = &ch->logits[r->biases[i].token];
        *x = r->biases[i].bias <= -100 ? -INFINITY : *x + r->biases[i].bias;
    }
    penalize(ch, c);
    if (r->constraint.mask) KI_TRY(ask_constraint(ch, c, err));
    if (ki_generated(c) < r->min_tokens) hide_ends(ch, c);
    return KIVI_OK;
}

uint64_t ki_choice_seed(uint64_t seed, uint32_t index) {
    uint64_t z = (seed ^ index * 0x9e3779b97f4a7c15u) * 0xd1342543de82ef95u;
    return index ? z ^ z >> 32 : seed;
}

kivi_status ki_choose(int32_t *id, ki_chooser *ch, const ki_choice *c, const float *logits,
                      kivi_error *err) {
    const kivi_request *r = &c->request->r;
    kivi_sampler_options o = {
        .temperature = r->temperature, .top_k = r->top_k, .top_p = r->top_p, .min_p = r->min_p};
    if (!is_plain(c)) {
        KI_TRY(adjust(ch, c, logits, err));
        logits = ch->logits;
    }
    double u = ki_sample_draw(ki_choice_seed(r->seed, c->index), ki_generated(c));
    *id = ki_sample(ch->candidates, logits, ch->machine->n_vocab, &o, u);
    if (*id < 0) return KI_FAIL(err, NUMERIC, "sampler: the logits are not numbers");
    if (logits[*id] > -INFINITY) return KIVI_OK;
    return KI_FAIL(err, INTERNAL, "sampler: bias and constraint leave no token");
}

/* ---- log-probabilities ---- */

static double log_sum(const float *logits, uint32_t n) {
    double best = (double)logits[kivi_logits_argmax(logits, n)], sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += exp((double)logits[i] - best);
    return best + log(sum);
}

/* Sorted as it grows: a lower id stays in front of an equal one behind it. */
static void insert(kivi_logprob *top, uint32_t *n, uint32_t n_top, kivi_logprob x) {
    if (*n == n_top && !(x.logprob > top[n_top - 1].logprob)) return;
    uint32_t i = *n < n_top ? (*n)++ : n_top - 1;
    for (; i && x.logprob > top[i - 1].logprob; i--) top[i] = top[i - 1];
    top[i] = x;
}

void ki_logprobs(kivi_logprob *out, const float *logits, uint32_t n_vocab, int32_t token,
                 uint32_t n_top) {
    double sum = log_sum(logits, n_vocab);
    uint32_t n = 0;
    n_top = KI_MIN(n_top, n_vocab);
    out[0] = (kivi_logprob){token, (double)logits[token] - sum};
    for (uint32_t i = 0; n_top && i < n_vocab; i++)
        insert(out + 1, &n, n_top, (kivi_logprob){(int32_t)i, (double)logits[i]});
    for (uint32_t i = 1; i <= n; i++) out[i].logprob -= sum;
}
