/* choose.c: from logits to a token, and to log-probabilities. Order: bias, penalties (repetition,
 * then frequency and presence), what may not come (the constraint, end tokens before min_tokens),
 * and then as model/draw.h says, there or here. */
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
    return ki_editor_init(&ch->editor, mem, machine->n_vocab, machine->n_vocab, err);
}

void ki_chooser_deinit(ki_chooser *ch) {
    if (!ch->mem) return;
    ki_free(ch->mem, ch->candidates);
    ki_free(ch->mem, ch->logits);
    ki_free(ch->mem, ch->allowed);
    ki_editor_deinit(&ch->editor);
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

static void edit_repeated(ki_editor *e, const int32_t *ids, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) ki_editor_at(e, ids[i])->what |= KI_EDIT_REPEATED;
}

/* End tokens, too early; not where nothing else is left. */
static void edit_ends(ki_editor *e, const ki_chooser *ch, const ki_choice *c) {
    const kivi_request *r = &c->request->r;
    if (ki_generated(c) >= r->min_tokens) return;
    for (uint32_t i = 0; !r->ignore_eos && i < ch->machine->n_ends; i++)
        ki_editor_at(e, ch->machine->ends[i])->what |= KI_EDIT_END;
    for (size_t i = 0; i < r->n_stop_ids; i++) ki_editor_at(e, r->stop_ids[i])->what |= KI_EDIT_END;
}

static void edit(ki_chooser *ch, const ki_choice *c) {
    const kivi_request *r = &c->request->r;
    const int32_t *ids = ki_generated_ids(c);
    ki_editor *e = &ch->editor;
    ki_editor_clear(e);
    for (size_t i = 0; i < r->n_biases; i++) {
        ki_draw_edit *at = ki_editor_at(e, r->biases[i].token);
        at->bias += r->biases[i].bias;
        at->what |= r->biases[i].bias <= -100 ? KI_EDIT_NEVER : KI_EDIT_BIAS;
    }
    if (r->repetition_penalty != 1) {
        edit_repeated(e, r->prompt, (uint32_t)r->n_prompt);
        edit_repeated(e, ids, ki_generated(c));
    }
    if (r->frequency_penalty != 0 || r->presence_penalty != 0)
        for (uint32_t i = 0; i < ki_generated(c); i++) ki_editor_at(e, ids[i])->times++;
    edit_ends(e, ch, c);
}

uint64_t ki_choice_seed(uint64_t seed, uint32_t index) {
    uint64_t z = (seed ^ index * 0x9e3779b97f4a7c15u) * 0xd1342543de82ef95u;
    return index ? z ^ z >> 32 : seed;
}

/* Its edits are the chooser's, lent until the next one. */
static ki_draw draw_of(ki_chooser *ch, const ki_choice *c) {
    const kivi_request *r = &c->request->r;
    edit(ch, c);
    return (ki_draw){.temperature = r->temperature,
                     .top_p = r->top_p,
                     .min_x = ki_draw_min_x(r->min_p),
                     .top_k = r->top_k,
                     .repetition = r->repetition_penalty,
                     .frequency = r->frequency_penalty,
                     .presence = r->presence_penalty,
                     .n_edits = ch->editor.n_edits,
                     .edits = ch->editor.edits,
                     .u = ki_sample_draw(ki_choice_seed(r->seed, c->index), ki_generated(c))};
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

static bool is_plain(const ki_choice *c) {
    const kivi_request *r = &c->request->r;
    return r->repetition_penalty == 1 && r->frequency_penalty == 0 && r->presence_penalty == 0 &&
           r->n_biases == 0 && !r->constraint.mask && ki_generated(c) >= r->min_tokens;
}

bool ki_takes_best(const ki_choice *c) { return c->request->r.temperature == 0 && is_plain(c); }

static kivi_status adjust(ki_chooser *ch, const ki_choice *c, const ki_draw *draw,
                          const float *logits, kivi_error *err) {
    memcpy(ch->logits, logits, ch->machine->n_vocab * sizeof *logits);
    ki_draw_edit_logits(ch->logits, draw);
    if (c->request->r.constraint.mask) KI_TRY(ask_constraint(ch, c, err));
    ki_draw_hide_ends(ch->logits, ch->machine->n_vocab, draw);
    return KIVI_OK;
}

kivi_status ki_choose(int32_t *id, ki_chooser *ch, const ki_choice *c, const float *logits,
                      kivi_error *err) {
    uint32_t n_vocab = ch->machine->n_vocab;
    ki_draw draw = draw_of(ch, c);
    if (!is_plain(c)) {
        KI_TRY(adjust(ch, c, &draw, logits, err));
        logits = ch->logits;
    }
    *id = ki_sample(ch->candidates, logits, n_vocab, &draw);
    if (*id >= 0 && logits[*id] > -INFINITY) return KIVI_OK;
    if (logits[kivi_logits_argmax(logits, n_vocab)] == -INFINITY)
        return KI_FAIL(err, INTERNAL, "sampler: bias and constraint leave no token");
    return KI_FAIL(err, NUMERIC, "sampler: the logits are not numbers");
}

bool ki_plan_draw(ki_draw *out, ki_draw_edit *room, uint32_t n_room, ki_chooser *ch,
                  const ki_choice *c) {
    const kivi_request *r = &c->request->r;
    if (r->constraint.mask || r->logprobs >= 0 || ki_takes_best(c)) return false;
    *out = draw_of(ch, c);
    if (out->n_edits > n_room) return false;
    if (out->n_edits) memcpy(room, out->edits, out->n_edits * sizeof *room);
    out->edits = room;
    return true;
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
