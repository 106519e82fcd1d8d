/* server.h: what the files of the server share.
 *
 * Threads. HTTP threads (libmicrohttpd's) read requests, check them, submit them and send what is
 * ready. The owner (the main thread) runs the scheduler; its callbacks turn tokens into JSON and
 * put it into the job's buffer. The keeper looks after deadlines, stalls and signals.
 *
 * A *job* is one completion or chat: the prompts of one HTTP request and their choices. It is held
 * by its connection and by each scheduler request that has not ended; whoever lets go last frees
 * it. While there is nothing to send the connection is suspended; whoever adds something wakes it.
 * Order of locks: server.lock, then job.lock. */
#ifndef SERVE_SERVER_H
#define SERVE_SERVER_H
#include "metrics.h"
#include "params.h"
#include "text.h"

#include <microhttpd.h>
#include <pthread.h>

/* Shared by threads without a lock. C++ only sees their size. */
#ifdef __cplusplus
typedef bool shared_flag;
typedef unsigned shared_count;
typedef size_t shared_size;
#else
#include <stdatomic.h>
typedef atomic_bool shared_flag;
typedef atomic_uint shared_count;
typedef _Atomic size_t shared_size;
#endif

typedef struct server server;
typedef struct job job;

typedef enum log_form { LOG_TEXT, LOG_JSON, LOG_NONE } log_form;

typedef struct server_options {
    const char *model_name, *chat_format, *cors_origin;
    const char *host;
    uint16_t port;
    const char *tls_cert, *tls_key; /* contents of the files, or NULL */
    int listener;                   /* the socket */
    log_form log;
    bool parse_special;
    size_t body_bytes;      /* longest body of a request */
    size_t buffer_bytes;    /* unread bytes of a stream before its request is paused */
    unsigned stall_ms;      /* a reader that takes nothing for so long is dropped */
    unsigned header_ms;     /* a request's head and body must be there after so long */
    unsigned drain_ms;      /* SIGTERM: what runs may take so long to end */
    unsigned keep_alive_ms; /* a stream without news gets a comment line */
    unsigned max_connections;
    unsigned request_ms; /* longest life of a request; 0: no limit */
} server_options;

/* ---- keys.c ---- */
enum { KEY_BYTES = 128 };
typedef struct key_list {
    char (*keys)[KEY_BYTES]; /* [n], padded with zeros: a comparison looks at all bytes of all */
    size_t n;
} key_list;
/* Keys separated by commas; false: one is empty or too long, or no memory. */
bool keys_add_words(key_list *list, const char *words);
/* One a line; empty lines and those that begin with # are passed over. */
bool keys_add_lines(key_list *list, const char *lines);
/* The value of an Authorization header; without keys everything is allowed. */
bool keys_allow(const key_list *list, const char *authorization);
void keys_deinit(key_list *list);

struct server {
    server_options o;
    kivi_engine *engine; /* NULL while it is loaded */
    const kivi_vocab *vocab;
    kivi_scheduler *scheduler;
    token_table *table;
    int32_t *end_ids; /* tokens that end a text, for constraints */
    size_t n_end_ids;
    key_list keys;
    metrics counts;
    struct MHD_Daemon *daemon;
    shared_flag loaded, draining, stalled;
    struct log_writer *log_writer; /* NULL: lines are written at once */
    shared_count n_connections;
    int64_t created_s;
    pthread_mutex_t lock;   /* of the lists */
    job *jobs;              /* those with a connection */
    struct peer *peers;     /* connections */
    shared_size body_bytes; /* of all requests being read */
    /* Large bodies wait here for a thread that prepares them. */
    pthread_mutex_t prepare_lock;
    pthread_cond_t prepare_more;
    struct exchange *prepare_first, **prepare_last;
    pthread_t preparers[2];
    unsigned n_preparers;
    bool prepare_ends;
};

uint64_t now_us(void);
params_context server_context(const server *s);
/* Why no new work is taken now: loading, draining or stalled; NULL: it is. */
const char *server_unready(const server *s);

/* ---- log.c: one line an event to standard error ----
 * Between start and stop a thread of its own writes them, and a reader that stops delays nobody:
 * what does not fit into 1 MiB is dropped and counted. stop waits two seconds for the rest. */
bool log_start(server *s);
void log_stop(server *s);
typedef struct request_log {
    char id[48];
    const char *method, *path;
    char address[64];
    int status;
    uint64_t started_us, ended_us;
    const char *finish; /* of choice 0, or NULL */
    uint32_t n_prompt, n_generated, n_cached, n_preemptions;
    double queue_s, first_token_s;
    bool has_job, streamed;
} request_log;
void log_request(const server *s, const request_log *r);
void log_line(const server *s, const char *level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- job.c ---- */
/* A job for the body; NULL: f says why. Its connection holds it. */
job *job_create(server *s, const json_t *body, bool chat, const request_log *log, fault *f);
/* Submits all prompts. False: none runs on. */
bool job_submit(job *j, fault *f);
/* The connection lets go. */
void job_release(job *j);
/* The client is gone or given up: cancels, and lets a suspended connection go on to its end. The
 * counter (NULL: none) goes up if the answer was not complete. */
void job_abandon(job *j, uint64_t *counter);
/* The server's time is over: what runs ends with an error that says so. */
void job_expire(job *j);

/* ---- answer.c: JSON of answers; the caller holds the job's lock ---- */
void answer_whole(text *out, const job *j);               /* not streamed */
void answer_chunk(text *out, job *j, size_t choice);      /* takes what is ready */
void answer_role(text *out, const job *j, size_t choice); /* a chat's first chunk */
void answer_end(text *out, const job *j);                 /* usage and [DONE] */
void answer_fault(text *out, const fault *f);             /* {"error": ...} */
/* One token's entry for logprobs; top as in kivi_event. NO_LOGPROB: nothing stands before it. */
#define NO_LOGPROB 1.0
void answer_logprob(job *j, size_t choice, int32_t token, double logprob, const kivi_logprob *top,
                    uint32_t n_top);

/* ---- http.c ---- */
bool http_start(server *s);
void http_stop(server *s);
/* Looks after clients that left, that do not read, that do not write, and streams that are silent;
 * `quick`: only those that left (each step). */
void http_look_after(server *s, bool quick);
bool http_idle(server *s); /* no answer is under way */
/* The caller holds j's lock: a suspended connection goes on. */
void http_wake(job *j);

#endif
