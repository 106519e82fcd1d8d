/* job.h: one completion or chat; see server.h. */
#ifndef SERVE_JOB_H
#define SERVE_JOB_H
#include "server.h"

typedef struct choice {
    kivi_utf8 utf8;
    text tail;  /* whole characters that may be the beginning of a stop string */
    text ready; /* to be sent: of a stream what the last chunk did not have, else all */
    /* Entries for logprobs: the members of the four arrays of a completion, or a chat's objects in
     * `tokens`. */
    text tokens, values, tops, offsets;
    uint32_t n_entries;
    size_t n_chars;     /* characters so far, for text_offset */
    uint32_t n_tokens;  /* generated */
    bool stopped;       /* by a stop string */
    const char *finish; /* NULL: not complete */
    uint64_t last_us;   /* its last token */
    int32_t state;      /* of the constraint, after n_followed tokens */
    uint32_t n_followed;
} choice;

/* One prompt of a job, a request of the scheduler. */
typedef struct prompt_run {
    struct job *job;
    size_t index;
    kivi_request_id id;
    bool submitted, ended;
} prompt_run;

struct job {
    server *s;
    shared_count n_holders;
    pthread_mutex_t lock;
    params p;
    char id[64]; /* chatcmpl-... */
    int64_t created_s;
    choice *choices; /* [n_prompts * n] */
    size_t n_choices;
    prompt_run *runs; /* [n_prompts] */
    size_t n_submitted, n_ended;
    fault failure; /* status 0: none */
    text out;      /* the events of a stream, or the whole answer */
    size_t n_sent; /* of out */
    bool done;     /* out is complete */
    bool gone, paused;
    uint64_t n_prompt, n_generated, n_cached;
    uint64_t active_us; /* when something was taken from out, or put into it when it was empty */
    request_log log;
    /* The connection: */
    struct MHD_Connection *connection; /* NULL: it let go */
    struct peer *peer;                 /* while it is in server.jobs */
    int socket;
    bool suspended;
    /* A job without a connection: called once, on the owner's thread, with the lock held. */
    void (*when_done)(void *user);
    void *when_done_user;
    job *next, *before; /* server.jobs, under server.lock */
};

#endif
