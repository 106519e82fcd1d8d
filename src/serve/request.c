/* request.c: what a request may ask for, and its copy. */
#include "serve.h"

#include <math.h>

enum { MAX_SALT_BYTES = 256 };

kivi_request kivi_request_defaults(void) {
    return (kivi_request){.max_tokens = 16,
                          .n = 1,
                          .temperature = 1,
                          .top_p = 1,
                          .repetition_penalty = 1,
                          .logprobs = -1,
                          .prompt_logprobs = -1};
}

/* ---- checks ---- */

/* Where a check stands: the parameter's name goes out with the refusal. */
typedef struct checks {
    const char **param;
    const ki_machine *machine;
    kivi_error *err;
} checks;

#define REFUSE(c, name, ...) (*(c)->param = (name), KI_FAIL((c)->err, ARG, name ": " __VA_ARGS__))

static kivi_status in_range(const checks *c, const char *name, float x, float low, float high) {
    if (x >= low && x <= high) return KIVI_OK; /* not true of a NaN */
    *c->param = name;
    return KI_FAIL(c->err, ARG, "%s: %g, expected %g to %g", name, (double)x, (double)low,
                   (double)high);
}

static kivi_status known_ids(const checks *c, const char *name, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (ids[i] >= 0 && (uint32_t)ids[i] < c->machine->n_vocab) continue;
        *c->param = name;
        return KI_FAIL(c->err, ARG, "%s: token %d, expected 0 to %u", name, ids[i],
                       c->machine->n_vocab - 1);
    }
    return KIVI_OK;
}

static kivi_status check_sampling(const checks *c, const kivi_request *r) {
    KI_TRY(in_range(c, "temperature", r->temperature, 0, 100));
    KI_TRY(in_range(c, "top_p", r->top_p, 1e-9f, 1));
    KI_TRY(in_range(c, "min_p", r->min_p, 0, 1));
    KI_TRY(in_range(c, "presence_penalty", r->presence_penalty, -2, 2));
    KI_TRY(in_range(c, "frequency_penalty", r->frequency_penalty, -2, 2));
    KI_TRY(in_range(c, "repetition_penalty", r->repetition_penalty, 0.01f, 100));
    if (r->n_biases > KIVI_MAX_BIASES)
        return REFUSE(c, "logit_bias", "%zu entries, expected at most %d", r->n_biases,
                      KIVI_MAX_BIASES);
    for (size_t i = 0; i < r->n_biases; i++) {
        KI_TRY(known_ids(c, "logit_bias", &r->biases[i].token, 1));
        KI_TRY(in_range(c, "logit_bias", r->biases[i].bias, -100, 100));
    }
    if (r->n_stop_ids > KIVI_MAX_STOP_IDS)
        return REFUSE(c, "stop_token_ids", "%zu, expected at most %d", r->n_stop_ids,
                      KIVI_MAX_STOP_IDS);
    return known_ids(c, "stop_token_ids", r->stop_ids, r->n_stop_ids);
}

/* Sets max_tokens to what it means. */
static kivi_status check_lengths(const checks *c, kivi_request *r) {
    uint32_t ctx = c->machine->ctx_tokens;
    if (r->n_prompt == 0 || !r->prompt) return REFUSE(c, "prompt", "no tokens");
    if (r->n_prompt > ctx || (r->n_prompt == ctx && r->max_tokens))
        return REFUSE(c, "prompt", "%zu tokens, the context has %u", r->n_prompt, ctx);
    KI_TRY(known_ids(c, "prompt", r->prompt, r->n_prompt));
    uint32_t left = ctx - (uint32_t)r->n_prompt;
    if (r->max_tokens == UINT32_MAX) r->max_tokens = left;
    if (r->max_tokens > left)
        return REFUSE(c, "max_tokens",
                      "%u after a prompt of %zu tokens, the context of %u leaves %u", r->max_tokens,
                      r->n_prompt, ctx, left);
    if (r->min_tokens > r->max_tokens)
        return REFUSE(c, "min_tokens", "%u, but max_tokens is %u", r->min_tokens, r->max_tokens);
    uint32_t n_tokens = (uint32_t)r->n_prompt + r->max_tokens;
    uint32_t n_pages = c->machine->cache->pool.n_pages; /* never changes; how many are free does */
    if (ki_pages(c->machine, n_tokens) > n_pages)
        return REFUSE(c, "max_tokens",
                      "%zu tokens of prompt and %u to generate need %u pages, the cache has %u",
                      r->n_prompt, r->max_tokens, ki_pages(c->machine, n_tokens), n_pages);
    return KIVI_OK;
}

static kivi_status check_rest(const checks *c, const kivi_request *r) {
    if (!r->on_event) return KI_FAIL(c->err, ARG, "request: no callback");
    if (r->n == 0 || r->n > KIVI_MAX_CHOICES)
        return REFUSE(c, "n", "%u, expected 1 to %d", r->n, KIVI_MAX_CHOICES);
    if (r->logprobs < -1 || r->logprobs > KIVI_MAX_LOGPROBS)
        return REFUSE(c, "logprobs", "%d, expected 0 to %d", r->logprobs, KIVI_MAX_LOGPROBS);
    if (r->prompt_logprobs < -1 || r->prompt_logprobs > KIVI_MAX_LOGPROBS)
        return REFUSE(c, "prompt_logprobs", "%d, expected 0 to %d", r->prompt_logprobs,
                      KIVI_MAX_LOGPROBS);
    if (r->n_salt_bytes > MAX_SALT_BYTES)
        return REFUSE(c, "cache_salt", "%zu bytes, expected at most %d", r->n_salt_bytes,
                      MAX_SALT_BYTES);
    return KIVI_OK;
}

/* ---- the copy ---- */

static void *put(uint8_t **at, const void *bytes, size_t n_bytes) {
    void *here = *at;
    if (n_bytes) memcpy(here, bytes, n_bytes);
    *at += (n_bytes + 7) / 8 * 8;
    return here;
}

static kivi_status copy_parts(ki_request *q, ki_mem *mem, kivi_error *err) {
    kivi_request *r = &q->r;
    size_t prompt = r->n_prompt * sizeof *r->prompt, biases = r->n_biases * sizeof *r->biases,
           stops = r->n_stop_ids * sizeof *r->stop_ids;
    KI_TRY(ki_alloc(&q->copies, mem, KI_TAG_other, prompt + biases + stops + r->n_salt_bytes + 32,
                    err));
    uint8_t *at = q->copies;
    r->prompt = put(&at, r->prompt, prompt);
    r->biases = put(&at, r->biases, biases);
    r->stop_ids = put(&at, r->stop_ids, stops);
    r->salt = put(&at, r->salt, r->n_salt_bytes);
    return KIVI_OK;
}

static kivi_status make_parts(ki_request *q, const ki_machine *m, ki_mem *mem, kivi_error *err) {
    void *p;
    KI_TRY(copy_parts(q, mem, err));
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_other, q->r.n, sizeof(ki_choice), err));
    q->choices = p;
    for (uint32_t i = 0; i < q->r.n; i++) {
        q->choices[i] = (ki_choice){.request = q, .index = i};
        ki_buf_init(&q->choices[i].generated, mem, m->ctx_tokens * sizeof(int32_t));
    }
    if (q->r.prompt_logprobs < 0) return KIVI_OK;
    size_t row = 1 + (size_t)q->r.prompt_logprobs;
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_other, q->r.n_prompt, row * sizeof(kivi_logprob), err));
    q->prompt_logprobs = p;
    for (size_t i = 0; i < row; i++) q->prompt_logprobs[i] = (kivi_logprob){-1, 0};
    q->n_scored = 1; /* nothing comes before the first position */
    return KIVI_OK;
}

kivi_status ki_request_create(ki_request **out, const char **param, const kivi_request *request,
                              const ki_machine *machine, ki_mem *mem, kivi_error *err) {
    checks c = {param, machine, err};
    kivi_request r = *request;
    void *p;
    *out = NULL;
    *param = NULL;
    KI_TRY(check_rest(&c, &r));
    KI_TRY(check_lengths(&c, &r));
    KI_TRY(check_sampling(&c, &r));
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(ki_request), err));
    ki_request *q = p;
    *q = (ki_request){.r = r, .n_open = r.n, .shown_state = 'w'};
    kivi_status status = make_parts(q, machine, mem, err);
    if (status != KIVI_OK) ki_request_destroy(&q, mem);
    *out = q;
    return status;
}

void ki_request_destroy(ki_request **request, ki_mem *mem) {
    ki_request *q = *request;
    if (!q) return;
    for (uint32_t i = 0; q->choices && i < q->r.n; i++) ki_buf_deinit(&q->choices[i].generated);
    ki_free(mem, q->choices);
    ki_free(mem, q->prompt_logprobs);
    ki_free(mem, q->chain);
    ki_free(mem, q->copies);
    ki_free(mem, q);
    *request = NULL;
}
