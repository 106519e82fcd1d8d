/* kivi_serve.h: many requests at once over one engine: continuous batching, admission by pages,
 * preemption, a cache of prefixes. What an HTTP server or an offline batch is written on.
 *
 * A *request* is a prompt of token ids and settings; it makes one or several *choices*. Requests
 * come from any thread; one thread, the *owner*, runs steps; what happens is told to the request's
 * own callback, on the owner's thread.
 *
 *     kivi_scheduler_options so = kivi_scheduler_defaults();
 *     kivi_scheduler_create(&s, engine, &so, &err);
 *     kivi_request r = kivi_request_defaults();
 *     r.prompt = ids, r.n_prompt = n, r.max_tokens = 100, r.on_event = print, r.user = me;
 *     kivi_scheduler_submit(&id, &param, s, &r, &err);       any thread, before or while it runs
 *     kivi_scheduler_drain(s);                               no more to come
 *     kivi_scheduler_run(s, &err);                           the owner: until all have ended
 *     kivi_scheduler_destroy(&s);
 *
 * What a request answers depends on its prompt, settings and seed alone, not on its neighbours, on
 * preemption (its pages were needed and it was evaluated again), or on the cache of prefixes: on
 * the CPU the same bytes. Choice 0 is what the request would give with n = 1 and the same seed.
 *
 * Threads. submit, cancel, pause, resume, drain, stop, stats, health and describe may be called
 * from any thread at any time between create and destroy, from callbacks too; none of them waits
 * for a step. run, step and destroy belong to the owner, and nobody else touches the engine while
 * the scheduler lives (kivi_engine_info_get, kivi_engine_memory, kivi_tokenize and the calls on a
 * vocabulary are allowed: they change nothing). Callbacks run on the owner's thread between steps,
 * without any lock; what they lend lives until they return. They must not wait. */
#ifndef KIVI_SERVE_H
#define KIVI_SERVE_H
#include "kivi.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KIVI_MAX_CHOICES = 128,
    KIVI_MAX_LOGPROBS = 64,  /* most entries of a top list */
    KIVI_MAX_BIASES = 4096,  /* entries of logit_bias */
    KIVI_MAX_STOP_IDS = 64,
};

typedef struct kivi_scheduler kivi_scheduler;
typedef uint64_t kivi_request_id; /* never 0, never used twice by one scheduler */

/* ---- what a request is told ---- */

/* One token and its natural log-probability: of the model's own distribution, before temperature,
 * penalties, bias and constraint, in double from the float32 logits. The same number whether it
 * stands in a top list or for the token itself. */
typedef struct kivi_logprob {
    int32_t token; /* -1: none (before the first position of a prompt) */
    double logprob;
} kivi_logprob;

typedef enum kivi_event_kind {
    KIVI_EVENT_PROMPT, /* once, before the first token: the prompt is evaluated */
    KIVI_EVENT_TOKEN,  /* one more token of one choice */
    KIVI_EVENT_CHOICE, /* a choice is complete: finish says why. No more tokens of it follow */
    KIVI_EVENT_END     /* exactly once, the last one: the id is free and the callback is not called
                          again. status OK: each choice had its CHOICE. Else error says what went
                          wrong, and choices without a CHOICE are cut off where they are */
} kivi_event_kind;

typedef enum kivi_finish {
    KIVI_FINISH_STOP,   /* an end token, a stop id, or the callback said so */
    KIVI_FINISH_LENGTH, /* max_tokens */
} kivi_finish;

/* Microseconds of CLOCK_MONOTONIC; 0: it did not come to that. */
typedef struct kivi_timings {
    uint64_t submitted_us, admitted_us, first_token_us, last_token_us, ended_us;
    uint32_t n_prompt;      /* tokens of the prompt */
    uint32_t n_cached;      /* of them found in the cache of prefixes at the first admission */
    uint32_t n_generated;   /* tokens of all choices */
    uint32_t n_computed;    /* rows evaluated in all, those of preempted work included */
    uint32_t n_preemptions; /* of all choices */
} kivi_timings;

typedef struct kivi_event {
    kivi_event_kind kind;
    kivi_request_id id;
    uint64_t time_us;
    uint32_t choice; /* TOKEN, CHOICE */
    /* TOKEN: an end token or stop id that ends the choice is told too (is_last is true then), so
     * that its log-probability is there; it belongs to the usage but not to the text. */
    int32_t token;
    bool is_last;      /* a CHOICE follows at once */
    bool is_end_token; /* this token ends the choice and is no text */
    double logprob;    /* of token; when the request asks for logprobs */
    /* TOKEN: [n_top] the most likely tokens, falling, the lower id first on a tie. PROMPT, when
     * prompt_logprobs is set: [n_prompt][1 + n_top]: of each position the token that stands there,
     * then its top list; those of position 0 have token -1. */
    const kivi_logprob *top;
    uint32_t n_top;
    kivi_finish finish;      /* CHOICE */
    kivi_status status;      /* END: OK, CANCELLED (cancelled, stopped, too late), or a fault */
    const char *error;       /* END: one line; "" when status is OK */
    const kivi_timings *timings; /* PROMPT, CHOICE, END */
} kivi_event;

typedef enum kivi_verdict {
    KIVI_GO_ON,
    KIVI_END_CHOICE, /* TOKEN: this token is the choice's last: finish is STOP (a stop string) */
    KIVI_PAUSE,      /* as kivi_scheduler_pause: no step evaluates it until resume */
    KIVI_CANCEL      /* as kivi_scheduler_cancel */
} kivi_verdict;

/* ---- a request ---- */

/* Restricts what may come next, for JSON and the like. allowed: bits [(V + 31) / 32], all 0 when it
 * is called; sets those of the tokens that may follow generated [n_generated] of this choice, end
 * tokens among them where it may end. Called on the owner's thread once before each token of each
 * choice; the choices of a request ask one after the other. A status other than OK, or no bit at
 * all, fails the request with that error. */
typedef struct kivi_constraint {
    kivi_status (*mask)(void *user, uint32_t choice, const int32_t *generated, uint32_t n_generated,
                        uint32_t *allowed, kivi_error *err);
    void *user; /* NULL mask: no constraint */
} kivi_constraint;

typedef struct kivi_bias {
    int32_t token;
    float bias; /* added to the logit; -100 and below: never */
} kivi_bias;

/* Everything that pointers lead to is copied by submit, except user data and what callbacks use. */
typedef struct kivi_request {
    const int32_t *prompt; /* [n_prompt], at least one; nothing is put in front */
    size_t n_prompt;
    uint32_t max_tokens; /* of each choice; 0: the prompt only; UINT32_MAX: what the context leaves */
    uint32_t min_tokens; /* before these no end token and no stop id */
    uint32_t n;          /* choices; they share the prompt's pages */
    uint64_t seed;       /* choice i draws from (seed, i) */
    float temperature;   /* 0: greedy */
    float top_p;         /* 1: off */
    float min_p;         /* 0: off */
    uint32_t top_k;      /* 0: off */
    float presence_penalty, frequency_penalty; /* -2 to 2, over the generated tokens; 0: off */
    float repetition_penalty;                  /* over prompt and generated tokens; 1: off */
    const kivi_bias *biases;
    size_t n_biases;
    const int32_t *stop_ids; /* besides the model's own end tokens */
    size_t n_stop_ids;
    bool ignore_eos;      /* the model's end tokens are tokens like others; stop ids still stop */
    int32_t logprobs;     /* entries of the top list of each generated token; 0: the token's own only;
                             -1: none */
    int32_t prompt_logprobs; /* the same for the prompt (echo). The prompt is evaluated whole then */
    kivi_constraint constraint;
    int32_t priority;    /* lower is earlier, as in vLLM: a step of 1 weighs as much as ageing_ms of
                            waiting, so nothing waits for ever */
    uint32_t timeout_ms; /* from submit on; then it ends as CANCELLED; 0: none */
    const void *salt;    /* prefixes are shared among requests of the same salt only (a tenant) */
    size_t n_salt_bytes; /* at most 256 */
    kivi_verdict (*on_event)(void *user, const kivi_event *event); /* required */
    void *user;
} kivi_request;

/* max_tokens 16, n 1, temperature 1, top_p 1, repetition_penalty 1, logprobs and prompt_logprobs
 * -1; all else off. */
KIVI_API kivi_request kivi_request_defaults(void);

/* ---- the scheduler ---- */

/* What was done in a step, for histograms. */
typedef struct kivi_step_report {
    uint32_t n_rows, n_prompt_rows, n_decode_rows, n_sequences;
    uint64_t step_us; /* in the engine */
} kivi_step_report;

typedef struct kivi_scheduler_options {
    uint32_t step_tokens;        /* most rows of a step; 0: the engine's step_rows */
    uint32_t max_running;        /* most sequences (choices) with pages; 0: the engine's max_sessions */
    uint32_t max_queued;         /* requests that may wait; 0: 1,024 */
    uint64_t max_queued_tokens;  /* tokens of prompts that may wait; 0: 1,048,576 */
    uint32_t ageing_ms;          /* what one step of priority weighs; 0: 1,000 */
    uint64_t exact_bytes;        /* most bytes of 16-bit rows of prompts being evaluated (under `paper`
                                    all rows of the prompt); 0: what one prompt of the engine's ctx_tokens
                                    needs, or two under the other rules */
    bool no_prefix_cache;        /* under `paper` there is none (unless the kind is 16 bit) */
    uint64_t prefix_bytes;       /* most bytes of 16-bit rows kept for prefixes; their pages come from the
                                    common pool and are given up first; 0: a quarter of the pool's bytes */
    uint32_t stall_ms;           /* work that can run and no progress for so long: stalled; 0: 10,000 */
    void (*on_step)(void *user, const kivi_step_report *report); /* owner's thread; NULL: none */
    void *on_step_user;
} kivi_scheduler_options;

KIVI_API kivi_scheduler_options kivi_scheduler_defaults(void);
/* The engine must have no sessions of others that run steps meanwhile, and should be made with
 * max_sessions = sequences at once, kv_bytes = the page pool's size, logit_rows > max_sessions when
 * prompt_logprobs is to be fast, and a rule by kivi_engine_options.kv.rule (ARCHITECTURE.md gives
 * the server's default and why). */
KIVI_API kivi_status kivi_scheduler_create(kivi_scheduler **out, kivi_engine *engine,
                                           const kivi_scheduler_options *options, kivi_error *err);
/* Requests that have not ended get their END (CANCELLED) first. NULL is allowed. */
KIVI_API void kivi_scheduler_destroy(kivi_scheduler **scheduler);

/* Any thread. OK: *id is set and exactly one END will come; it may come before this returns.
 * Otherwise nothing is kept and no event comes:
 *   ARG, UNSUPPORTED  the request is wrong, or can never fit: the text has both numbers (HTTP 400)
 *   FULL              the queue is full: try later (429); kivi_scheduler_stats says how full
 *   CANCELLED         the scheduler drains or was stopped (503)
 *   NOMEM             (503)
 * *param (NULL allowed) names the parameter at fault as OpenAI spells it ("max_tokens"), or is
 * NULL; static. */
KIVI_API kivi_status kivi_scheduler_submit(kivi_request_id *id, const char **param,
                                           kivi_scheduler *scheduler, const kivi_request *request,
                                           kivi_error *err);
/* Any thread; an id that has ended is no fault. The request leaves before the next step, its pages
 * are free with that, and its END comes from the owner. */
KIVI_API void kivi_scheduler_cancel(kivi_scheduler *scheduler, kivi_request_id id);
/* Any thread. A paused request keeps its place and its answer; it is not evaluated, so at most the
 * tokens of the step under way still come. When pages are needed it is the first to give up its own,
 * and is evaluated again after resume. Its timeout goes on. */
KIVI_API void kivi_scheduler_pause(kivi_scheduler *scheduler, kivi_request_id id);
KIVI_API void kivi_scheduler_resume(kivi_scheduler *scheduler, kivi_request_id id);

/* Owner. One step: takes in what came, ends what is over, admits, evaluates, tells. *worked: rows
 * were evaluated or something was told; false: nothing can be done now. An error is the engine's
 * own and concerns all; a fault of one request is told to it alone. */
KIVI_API kivi_status kivi_scheduler_step(bool *worked, kivi_scheduler *scheduler, kivi_error *err);
/* Owner. Steps, and sleeps while there is nothing to do, until stop, or until everything has ended
 * after drain. */
KIVI_API kivi_status kivi_scheduler_run(kivi_scheduler *scheduler, kivi_error *err);
KIVI_API void kivi_scheduler_drain(kivi_scheduler *scheduler); /* any thread: refuse new ones */
/* Any thread: run returns after the step under way. What has not ended stays until destroy. Safe in
 * no signal handler: write to a pipe or use a thread of your own. */
KIVI_API void kivi_scheduler_stop(kivi_scheduler *scheduler);

/* ---- what goes on ---- */

typedef struct kivi_scheduler_stats {
    /* now */
    uint32_t n_waiting;  /* requests not yet begun */
    uint32_t n_running;  /* requests begun and not ended; those preempted or paused among them */
    uint32_t n_preempted, n_paused; /* sequences without pages that wait again; requests */
    uint32_t n_sequences;           /* with pages */
    uint64_t waiting_tokens;        /* of prompts not yet begun */
    uint32_t n_pages, pages_free, pages_used; /* used: by sequences or prefixes */
    uint32_t pages_shared;          /* used by more than one */
    uint32_t pages_cached;          /* used by prefixes only: given up when needed */
    uint32_t page_tokens;           /* tokens of a page */
    uint64_t page_bytes;            /* bytes of a page, all layers */
    uint64_t exact_bytes, exact_bytes_limit;   /* 16-bit rows of prompts being evaluated */
    uint64_t prefix_bytes, prefix_bytes_limit; /* 16-bit rows kept for prefixes */
    uint32_t n_prefixes;
    /* since create */
    uint64_t n_steps, step_us;                  /* steps and time in the engine */
    uint64_t n_submitted, n_refused, n_queue_full; /* refused: wrong or too large */
    uint64_t n_stop, n_length;                  /* choices by finish */
    uint64_t n_ended, n_cancelled, n_failed;    /* requests: with OK, CANCELLED, a fault */
    uint64_t n_preemptions, n_evictions;
    uint64_t prompt_tokens, generated_tokens;   /* of admitted requests; told */
    uint64_t computed_prompt_tokens, recomputed_tokens; /* rows; of preempted work, again */
    uint64_t prefix_queries, prefix_hits;       /* tokens asked for, and found (as vLLM counts) */
    kivi_step_report last_step;
} kivi_scheduler_stats;

/* As of the end of the last step, queue figures as of now. */
KIVI_API void kivi_scheduler_stats_get(kivi_scheduler_stats *out, kivi_scheduler *scheduler);

typedef struct kivi_scheduler_health {
    bool accepts;          /* neither draining nor stopped */
    bool stalled;          /* work that can run, and no progress for stall_ms: /ready says 503 */
    uint64_t progress_us;  /* since the last progress, or 0 when there is nothing to do */
    bool in_step;          /* the engine is at work on a step now */
} kivi_scheduler_health;
KIVI_API void kivi_scheduler_health_get(kivi_scheduler_health *out, kivi_scheduler *scheduler);
/* The state as text for a log: a line of totals and a line a request, without prompts. Returns the
 * bytes needed, less the 0 at the end; writes at most max_bytes, always terminated. */
KIVI_API size_t kivi_scheduler_describe(char *text, size_t max_bytes, kivi_scheduler *scheduler);

#ifdef __cplusplus
}
#endif
#endif
