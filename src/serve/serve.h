/* serve.h: the scheduler from the inside.
 *
 * A request has choices; a choice is one sequence of the cache, or waits for one. All choices with
 * a sequence are *running*, in the order in which they came; the others *wait*, in the same order.
 * A step (plan.c, step.c):
 *
 *     take in     new requests, cancels, pauses, timeouts                     scheduler.c
 *     plan        running choices, oldest first: one row each that generates; prompts share what
 *                 is left of the budget. Who finds no free page takes them from prefixes nobody
 *                 uses, then from paused requests, then from the newest choice (maybe its own)
 *     admit       waiting choices, oldest first, while the next one fits
 *     forward     one pass over all rows                                      the machine
 *     tell        tokens are chosen, told, and what is complete is ended
 *
 * No deadlock: the oldest choice that may run can take the pages of all others, and what does not
 * fit a whole pool was refused when it came. No page of a choice is shared while it may be written.
 *
 * Evaluated again after preemption, a choice feeds its prompt as a prompt and what it has generated
 * as generated rows, so every row sees what it saw, and the answer goes on with the same bytes. */
#ifndef KI_SERVE_H
#define KI_SERVE_H
#include "engine.h"
#include "kivi_serve.h"
#include "sha256.h"

#include <pthread.h>

/* ---- what rows are evaluated on: an engine, or in tests a function of the history ---- */

typedef struct ki_machine {
    kivi_cache *cache;
    uint32_t n_vocab, ctx_tokens, step_rows, logit_rows, max_items;
    const int32_t *ends; /* [n_ends] the model's end tokens */
    uint32_t n_ends;
    uint64_t fingerprint;
    bool draws;       /* forward makes the items' draws (model.h) */
    bool no_prefixes; /* keys of a prompt depend on its length (dynamic NTK): nothing can be shared
                       */
    void *self;
    /* items are in an open step; fills status, err, logit_row, best and drawn of each */
    void (*forward)(void *self, ki_batch_item *items, size_t n_items);
    /* [V] of a row of the last pass, lent until the next one; NULL: the device failed */
    const float *(*logits)(void *self, uint32_t row);
    uint64_t (*now_us)(void *self); /* from any thread; never goes back */
} ki_machine;

void ki_machine_of_engine(ki_machine *out, kivi_engine *engine);

/* ---- requests ---- */

typedef struct ki_request ki_request;
typedef struct ki_prefix ki_prefix;

typedef enum ki_choice_state { KI_UNBORN, KI_WAITING, KI_RUNNING, KI_DONE } ki_choice_state;

typedef struct ki_choice {
    ki_request *request;
    struct ki_choice *prev, *next; /* while it waits */
    uint32_t index;
    ki_choice_state state;
    bool has_item;        /* rows in the step that is planned */
    kivi_seq *seq;        /* RUNNING only */
    ki_prefix *from;      /* the prefix seq began with */
    ki_buf generated;     /* of int32_t */
    uint32_t n_promised;  /* pages that nobody else is admitted with */
    uint64_t exact_bytes; /* 16-bit rows of its prompt it was admitted with, until it generates */
    uint32_t n_offered;   /* prefixes up to here were offered to the cache */
    uint32_t n_preempted;
    uint32_t n_before; /* rows it had when it was last preempted: they are evaluated again */
} ki_choice;

struct ki_request {
    kivi_request_id id;
    kivi_request r; /* its pointers lead into `copies` */
    void *copies;
    int64_t order;             /* earlier is smaller; then the id */
    ki_choice *choices;        /* [n] */
    uint32_t n_open;           /* choices not done */
    bool is_admitted, is_told; /* the prompt was */
    bool is_paused, is_cancelled, is_late, is_over;
    uint64_t deadline_us; /* 0: none */
    kivi_timings timings;
    kivi_logprob *prompt_logprobs;     /* [n_prompt][1 + prompt_logprobs]; NULL: not asked for */
    uint32_t n_scored;                 /* positions of it that are filled */
    uint8_t (*chain)[KI_SHA256_BYTES]; /* [n_prompt / page + 1]: names of its beginnings */
    ki_request *next_inbox, *next_touched, *next_in_bucket, *live_prev, *live_next, *next_dead,
        *next_gone;
    /* under the scheduler's mutex */
    bool is_touched, wants_pause, wants_cancel;
    uint32_t shown_rows, shown_generated;
    char shown_state;
};

/* Checks and copies; *param as kivi_scheduler_submit. */
kivi_status ki_request_create(ki_request **out, const char **param, const kivi_request *request,
                              const ki_machine *machine, ki_mem *mem, kivi_error *err);
void ki_request_destroy(ki_request **request, ki_mem *mem);

static inline uint32_t ki_generated(const ki_choice *c) {
    return (uint32_t)(c->generated.n_bytes / sizeof(int32_t));
}
static inline const int32_t *ki_generated_ids(const ki_choice *c) {
    return (const int32_t *)(const void *)c->generated.data;
}
/* Tokens that are known: all of them are evaluated before the next one is chosen. */
static inline uint32_t ki_known(const ki_choice *c) {
    return (uint32_t)c->request->r.n_prompt + ki_generated(c);
}
static inline uint32_t ki_evaluated(const ki_choice *c) { return c->seq ? c->seq->n_tokens : 0; }

/* ---- prefix.c: beginnings of sequences that others may go on from ---- */

struct ki_prefix {
    uint8_t parent[KI_SHA256_BYTES]; /* name of its whole pages */
    uint8_t name[KI_SHA256_BYTES];   /* of all its tokens */
    ki_mark *mark;
    uint64_t n_bytes;  /* of 16-bit rows */
    uint32_t n_in_use; /* choices that run on it */
    ki_prefix *next_in_bucket, *newer, *older;
};

enum { KI_PREFIX_BUCKETS = 1024 };

typedef struct ki_prefixes {
    ki_mem *mem;
    const ki_machine *machine;
    uint32_t unit_tokens;  /* shared at multiples of it; 0: nothing is */
    bool shares_generated; /* generated rows see what prompt rows see, so they are shared too, and
                               at any length */
    uint64_t n_bytes, limit_bytes, n_evictions;
    uint32_t n;
    ki_prefix *buckets[KI_PREFIX_BUCKETS], *newest, *oldest;
} ki_prefixes;

void ki_prefixes_init(ki_prefixes *p, ki_mem *mem, const ki_machine *machine,
                      const kivi_scheduler_options *options);
void ki_prefixes_deinit(ki_prefixes *p); /* nobody uses one any more */
/* The longest known beginning of what a choice knows, less the last token; NULL: none. It is held
 * until ki_prefix_release. */
ki_prefix *ki_prefix_find(ki_prefixes *p, ki_choice *c);
void ki_prefix_release(ki_prefix *prefix); /* NULL allowed */
/* After a step: keeps the beginnings of the choice that are worth it. is_last: its sequence is
 * done with. Where memory or pages are short nothing is kept. */
void ki_prefix_offer(ki_prefixes *p, ki_choice *c, bool is_last);
/* Gives up the one that was used least recently of those nobody uses; false: there is none. */
bool ki_prefix_evict(ki_prefixes *p);

/* ---- choose.c: tokens and log-probabilities ---- */

typedef struct ki_chooser {
    ki_mem *mem;
    const ki_machine *machine;
    ki_candidate *candidates; /* [V] */
    float *logits;            /* [V] */
    uint32_t *allowed;        /* [(V + 31) / 32] */
    ki_editor editor;         /* room for [V] edits */
} ki_chooser;

kivi_status ki_chooser_init(ki_chooser *ch, ki_mem *mem, const ki_machine *machine,
                            kivi_error *err);
void ki_chooser_deinit(ki_chooser *ch);
/* The next token of a choice from a row of logits [V]. */
kivi_status ki_choose(int32_t *id, ki_chooser *ch, const ki_choice *c, const float *logits,
                      kivi_error *err);
/* What a machine that draws needs to know before it evaluates the choice's last row: its edits, to
 * room [n_room]. False: the caller chooses from the row's logits, because of a constraint (host
 * code), because log-probabilities are wanted (the row comes here anyway), or since there is no
 * room for its edits; or the best token is wanted, which needs no draw. */
bool ki_plan_draw(ki_draw *out, ki_draw_edit *room, uint32_t n_room, ki_chooser *ch,
                  const ki_choice *c);
/* out [1 + n_top]: the token's own log-probability, then the top list, from a row of logits. */
void ki_logprobs(kivi_logprob *out, const float *logits, uint32_t n_vocab, int32_t token,
                 uint32_t n_top);
/* It takes the most likely token, whatever the others are. */
bool ki_takes_best(const ki_choice *c);
bool ki_is_end(const ki_machine *machine, const ki_request *r, int32_t token);
uint64_t ki_choice_seed(uint64_t seed, uint32_t index);

/* ---- the scheduler ---- */

enum { KI_REQUEST_BUCKETS = 4096 };

struct kivi_scheduler {
    ki_mem *mem; /* the cache's */
    ki_machine machine;
    kivi_scheduler_options o; /* resolved */
    ki_prefixes prefixes;
    ki_chooser chooser;
    /* the owner's */
    ki_choice *first_waiting, *last_waiting;
    ki_choice **running; /* [max_running], oldest first */
    uint32_t n_running;
    ki_batch_item *items;                              /* [max_running] */
    ki_choice **owners;                                /* [max_running] */
    kivi_error *errors;                                /* [max_running] */
    ki_draw *draws;                                    /* [max_running]; NULL: nobody draws */
    ki_draw_edit *edits;                               /* [KI_DRAW_EDITS]: of all draws */
    uint32_t n_edits;
    uint32_t n_items, rows_left, rows_kept, echo_left; /* of the step that is planned */
    kivi_step_report report;
    uint8_t *page_seen; /* [n_pages] */
    const float **rows; /* [logit_rows]: of a prompt whose log-probabilities are wanted */
    kivi_logprob top[1 + KIVI_MAX_LOGPROBS];
    ki_request *dead; /* ended in this step */
    uint64_t next_deadline_us, exact_bytes;
    bool worked;
    kivi_scheduler_stats counts; /* the counters; the owner's copy */
    /* between threads */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    ki_request *inbox_first, *inbox_last, *touched, *live;
    ki_request *buckets[KI_REQUEST_BUCKETS];
    kivi_request_id last_id;
    bool is_draining, is_stopped, has_work, in_step;
    uint64_t progress_us;
    kivi_scheduler_stats shown; /* what concerns the queue is counted here, the rest copied */
};

kivi_status ki_scheduler_create(kivi_scheduler **out, const ki_machine *machine,
                                const kivi_scheduler_options *options, kivi_error *err);

/* plan.c */
void ki_wait(kivi_scheduler *s, ki_choice *c);                /* into the queue */
void ki_unwait(kivi_scheduler *s, ki_choice *c);              /* out of it */
void ki_leave(kivi_scheduler *s, ki_choice *c);               /* running: gives everything back */
void ki_join(kivi_scheduler *s, ki_choice *c, kivi_seq *seq); /* running from now on */
void ki_preempt(kivi_scheduler *s, ki_choice *c);
/* Pages to generate for a while are its own from now on. */
void ki_promise_growth(const kivi_scheduler *s, ki_choice *c);
/* By giving up prefixes, none if that is not enough. */
bool ki_free_pages(kivi_scheduler *s, uint32_t n_pages);
uint32_t ki_cached_pages(kivi_scheduler *s);
void ki_plan(kivi_scheduler *s);
bool ki_can_work(const kivi_scheduler *s); /* something may run */
/* Bytes of 16-bit rows, the usual window's among them, that n_rows rows may need, the first
 * n_prompt_rows of them a prompt (seq.c, make_room). */
uint64_t ki_exact_bytes(const kivi_scheduler *s, uint32_t n_prompt_rows, uint32_t n_rows);
uint32_t ki_pages(const ki_machine *m, uint32_t n_tokens);

/* step.c */
void ki_tell_results(kivi_scheduler *s);
/* END, once; the request is freed with the step. */
void ki_end_request(kivi_scheduler *s, ki_request *r, kivi_status status, const char *text);
void ki_bury(kivi_scheduler *s);
void ki_set_paused(kivi_scheduler *s, ki_request *q, bool is_paused);
/* scheduler.c: it waits no longer to begin; under the mutex. */
void ki_unqueue(kivi_scheduler *s, const ki_request *q);

#endif
