/* http.c: connections, bodies and streams over libmicrohttpd. */
#include "http.h"

#include <arpa/inet.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    BLOCK_BYTES = 32768,       /* of a stream, handed over at once */
    SOCKET_BYTES = 65536,      /* what the system keeps of a stream nobody reads */
    IDLE_MS = 75000,           /* longer than clients keep their own: they close first */
    SLACK_CONNECTIONS = 16,    /* beyond the limit: to be told so */
    INLINE_BYTES = 65536,      /* a body up to here is prepared at once: some milliseconds */
    BODIES_AT_ONCE = 16,       /* so many of the longest bodies are held in all */
    SWALLOW_BYTES = 128 << 20, /* of a body that is too large, so that its sender hears why */
    BODY_BYTES_A_MS = 16,      /* the slowest sender that is waited for */
    HTTP_THREADS = 2
};

/* A connection, from accept to close; the socket is open as long as it is in the list. */
struct peer {
    int socket;
    uint64_t since_us;   /* of the last answer, or of accept */
    uint64_t n_received; /* of the body that is being read */
    bool busy;           /* a request is whole and not answered yet */
    bool reading;        /* a head has come */
    bool used;           /* something was answered */
    bool dropped;        /* its reader is too slow: it is being closed */
    bool late;           /* its request did not come in time: it was told 408 */
    int n_unsent;        /* bytes that the system held for the reader at the last look */
    uint64_t moved_us;   /* when that was something else */
    struct peer *next, *before;
};

uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

params_context server_context(const server *s) {
    return (params_context){s->engine,       s->vocab,         s->table,
                            s->o.model_name, s->o.chat_format, s->o.parse_special};
}

const char *server_unready(const server *s) {
    return !atomic_load(&s->loaded)    ? "the model is being loaded"
           : atomic_load(&s->draining) ? "the server is going down"
           : atomic_load(&s->stalled)  ? "no progress: the engine is stalled"
                                       : NULL;
}

/* ---- connections ---- */

static void on_connection(void *user, struct MHD_Connection *connection, void **context,
                          enum MHD_ConnectionNotificationCode what) {
    server *s = user;
    struct peer *p = *context;
    pthread_mutex_lock(&s->lock);
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        int room = SOCKET_BYTES;
        atomic_fetch_add(&s->n_connections, 1);
        *context = p = calloc(1, sizeof *p);
        if (p) {
            p->socket =
                MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
            p->since_us = now_us();
            setsockopt(p->socket, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
            if ((p->next = s->peers) != NULL) p->next->before = p;
            s->peers = p;
        }
    } else {
        atomic_fetch_sub(&s->n_connections, 1);
        if (p) {
            *(p->before ? &p->before->next : &s->peers) = p->next;
            if (p->next) p->next->before = p->before;
            free(p);
        }
        *context = NULL;
    }
    pthread_mutex_unlock(&s->lock);
}

static struct peer *peer_of(struct MHD_Connection *connection) {
    return MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT)->socket_context;
}

static void name_address(char *out, size_t n_bytes, struct MHD_Connection *connection) {
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
    const struct sockaddr *address = info ? info->client_addr : NULL;
    snprintf(out, n_bytes, "?");
    if (address && address->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)address)->sin_addr, out,
                  (socklen_t)n_bytes);
    if (address && address->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr, out,
                  (socklen_t)n_bytes);
}

/* ---- answers ---- */

static const char *header(const exchange *e, const char *name) {
    return MHD_lookup_connection_value(e->connection, MHD_HEADER_KIND, name);
}

static void add_headers(exchange *e, struct MHD_Response *response, const fault *f) {
    char number[16];
    const char *origin = e->s->o.cors_origin;
    MHD_add_response_header(response, "X-Request-Id", e->log.id);
    MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
    if (origin) {
        MHD_add_response_header(response, "Access-Control-Allow-Origin", origin);
        MHD_add_response_header(response, "Access-Control-Expose-Headers",
                                "X-Request-Id, Retry-After");
        if (strcmp(origin, "*")) MHD_add_response_header(response, "Vary", "Origin");
    }
    if (f && f->retry_s) {
        snprintf(number, sizeof number, "%u", f->retry_s);
        MHD_add_response_header(response, "Retry-After", number);
    }
    if (f && f->status == 401) MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
}

static enum MHD_Result queue(exchange *e, int status, struct MHD_Response *response) {
    if (!response) return MHD_NO;
    enum MHD_Result result = MHD_queue_response(e->connection, (unsigned)status, response);
    MHD_destroy_response(response);
    e->answered = true;
    e->log.status = status;
    if (status >= 200 && status < 600)
        metrics_count(&e->s->counts, &e->s->counts.n_responses[status / 100]);
    if (e->work) {
        pthread_mutex_lock(&e->work->lock);
        e->work->log.status = status;
        pthread_mutex_unlock(&e->work->lock);
    }
    return result;
}

static struct MHD_Response *from_text(text *t, const char *content_type) {
    struct MHD_Response *response = NULL;
    if (!t->failed)
        response = MHD_create_response_from_buffer(t->n_bytes, t->data ? t->data : (char[1]){0},
                                                   t->data ? MHD_RESPMEM_MUST_FREE
                                                           : MHD_RESPMEM_MUST_COPY);
    if (!response) text_deinit(t);
    else {
        MHD_add_response_header(response, "Content-Type", content_type);
        *t = (text){0}; /* the response has its memory */
    }
    return response;
}

enum MHD_Result respond(exchange *e, int status, const char *content_type, text *t) {
    struct MHD_Response *response = from_text(t, content_type);
    if (!response) return MHD_NO; /* no memory: the connection is closed */
    add_headers(e, response, NULL);
    if (!strncmp(content_type, "text/html", 9)) {
        /* The page is one file and talks to this server only. */
        MHD_add_response_header(response, "Content-Security-Policy",
                                "default-src 'none'; style-src 'unsafe-inline'; script-src "
                                "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri "
                                "'none'; form-action 'none'; frame-ancestors 'none'");
        MHD_add_response_header(response, "Cache-Control", "no-cache");
    }
    return queue(e, status, response);
}

enum MHD_Result respond_fault(exchange *e, const fault *f) {
    text t;
    text_init(&t, 1 << 16);
    answer_fault(&t, f);
    struct MHD_Response *response = from_text(&t, "application/json");
    if (!response) return MHD_NO;
    add_headers(e, response, f);
    if (f->status == 405 && e->allow) MHD_add_response_header(response, "Allow", e->allow);
    return queue(e, f->status, response);
}

/* The headers that a page of another origin may send: those it asks for. Clients have some of their
 * own (OpenAI's: X-Stainless-...), none of them means anything here, and "*" would leave out
 * Authorization. */
static const char *allowed_headers(const exchange *e) {
    enum { MAX_BYTES = 2048 };
    static const char names[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_, ";
    const char *asked = header(e, "Access-Control-Request-Headers");
    bool ok = asked && *asked && strlen(asked) <= MAX_BYTES && !asked[strspn(asked, names)];
    return ok ? asked : "Authorization, Content-Type, X-Request-Id";
}

/* What a browser asks before it sends a request of another origin. */
static enum MHD_Result respond_preflight(exchange *e) {
    struct MHD_Response *response =
        MHD_create_response_from_buffer(0, (char[1]){0}, MHD_RESPMEM_MUST_COPY);
    if (!response) return MHD_NO;
    add_headers(e, response, NULL);
    MHD_add_response_header(response, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
    MHD_add_response_header(response, "Access-Control-Allow-Headers", allowed_headers(e));
    MHD_add_response_header(response, "Access-Control-Max-Age", "600");
    return queue(e, 204, response);
}

/* ---- jobs ---- */

void http_wake(job *j) {
    if (!j->suspended || !j->connection) return;
    j->suspended = false;
    MHD_resume_connection(j->connection);
}

static void suspend(job *j) {
    j->suspended = true;
    MHD_suspend_connection(j->connection);
}

/* The reader has caught up: what was paused goes on. */
static void resume_runs(job *j) {
    j->paused = false;
    for (size_t i = 0; i < j->n_submitted; i++)
        if (!j->runs[i].ended) kivi_scheduler_resume(j->s->scheduler, j->runs[i].id);
}

static ssize_t take(job *j, char *buffer, size_t max_bytes) {
    size_t n = j->out.n_bytes - j->n_sent;
    if (j->gone || j->out.failed) return MHD_CONTENT_READER_END_WITH_ERROR;
    if (n == 0 && j->done) return MHD_CONTENT_READER_END_OF_STREAM;
    if (n == 0) {
        suspend(j);
        return 0;
    }
    if (n > max_bytes) n = max_bytes;
    memcpy(buffer, j->out.data + j->n_sent, n);
    j->n_sent += n;
    j->active_us = now_us();
    if (j->n_sent == j->out.n_bytes) j->out.n_bytes = j->n_sent = 0;
    else if (j->n_sent > j->out.n_bytes / 2) {
        text_drop(&j->out, j->n_sent);
        j->n_sent = 0;
    }
    if (j->paused && j->out.n_bytes - j->n_sent < j->s->o.buffer_bytes / 2) resume_runs(j);
    return (ssize_t)n;
}

static ssize_t read_stream(void *user, uint64_t pos, char *buffer, size_t max_bytes) {
    job *j = user;
    (void)pos;
    pthread_mutex_lock(&j->lock);
    ssize_t n = take(j, buffer, max_bytes);
    pthread_mutex_unlock(&j->lock);
    return n;
}

static enum MHD_Result respond_stream(exchange *e) {
    struct MHD_Response *response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, BLOCK_BYTES,
                                                                      read_stream, e->work, NULL);
    if (!response) return MHD_NO;
    add_headers(e, response, NULL);
    MHD_add_response_header(response, "Content-Type", "text/event-stream; charset=utf-8");
    MHD_add_response_header(response, "Cache-Control", "no-cache");
    MHD_add_response_header(response, "X-Accel-Buffering", "no"); /* proxies must not gather it */
    return queue(e, 200, response);
}

enum MHD_Result respond_job(exchange *e) {
    job *j = e->work;
    text t;
    if (j->p.stream) return respond_stream(e);
    pthread_mutex_lock(&j->lock);
    if (!j->done && !j->gone) {
        suspend(j);
        pthread_mutex_unlock(&j->lock);
        return MHD_YES;
    }
    bool gone = j->gone;
    fault f = j->failure;
    t = j->out;
    j->out = (text){.max_bytes = t.max_bytes};
    pthread_mutex_unlock(&j->lock);
    if (!gone && !f.status) return respond(e, 200, "application/json", &t);
    text_deinit(&t);
    return gone ? MHD_NO : respond_fault(e, &f);
}

static void link_job(server *s, job *j) {
    pthread_mutex_lock(&s->lock);
    if ((j->next = s->jobs) != NULL) j->next->before = j;
    s->jobs = j;
    pthread_mutex_unlock(&s->lock);
}

static void unlink_job(server *s, job *j) {
    pthread_mutex_lock(&s->lock);
    *(j->before ? &j->before->next : &s->jobs) = j->next;
    if (j->next) j->next->before = j->before;
    pthread_mutex_unlock(&s->lock);
}

/* Takes e->work into the list and submits it. */
static enum MHD_Result start_job(exchange *e) {
    job *j = e->work;
    struct peer *p = peer_of(e->connection);
    fault f = {0};
    j->connection = e->connection;
    j->socket = p ? p->socket : -1;
    j->peer = p;
    j->log.has_job = true;
    j->log.streamed = j->p.stream;
    link_job(e->s, j);
    if (!job_submit(j, &f)) return respond_fault(e, &f);
    return respond_job(e);
}

/* ---- requests ---- */

static bool is_json(const char *content_type) {
    size_t n = content_type ? strcspn(content_type, "; \t") : 0;
    return n == 16 && !strncasecmp(content_type, "application/json", 16);
}

static void make_id(char *id, size_t n_bytes, const char *given) {
    unsigned char random[12] = {0};
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    size_t n = given ? strlen(given) : 0;
    if (n >= 1 && n <= 40 && strspn(given, allowed) == n) {
        snprintf(id, n_bytes, "%s", given);
        return;
    }
    if (getrandom(random, sizeof random, 0) < 0) memset(random, 0, sizeof random);
    for (size_t i = 0; i < sizeof random; i++) snprintf(id + 2 * i, 3, "%02x", random[i]);
}

/* What the head alone tells; true: go on. */
static bool check_head(exchange *e, const char *method, const char *path) {
    server *s = e->s;
    fault *f = &e->failure;
    const char *length = header(e, "Content-Length");
    if (atomic_load(&s->n_connections) > s->o.max_connections) {
        refuse_with(f, 503, NULL, "more than %u connections", s->o.max_connections);
        f->retry_s = 1;
        return false;
    }
    e->to = route_find(&e->rest, &e->allow, method, path, f);
    if (!e->to) return false;
    if (e->to->needs_key && !keys_allow(&s->keys, header(e, "Authorization"))) {
        refuse_with(f, 401, NULL, "no valid API key was given (Authorization: Bearer KEY)");
        f->code = "invalid_api_key";
        return false;
    }
    const char *why = server_unready(s);
    if (why && (e->to->is_work || (e->to->needs_model && !atomic_load(&s->loaded)))) {
        refuse_with(f, 503, NULL, "%s", why);
        f->retry_s = 1;
        return false;
    }
    if (e->to->needs_model && !s->vocab)
        return refuse_with(f, 501, NULL, "the model has no vocabulary: text is not understood");
    if (strcmp(e->to->method, "POST")) return true;
    if (!is_json(header(e, "Content-Type")))
        return refuse_with(f, 415, NULL, "Content-Type: expected application/json");
    if (length && strtoull(length, NULL, 10) > s->o.body_bytes)
        return refuse_with(f, 413, NULL, "the body has %s bytes, at most %zu are taken", length,
                           s->o.body_bytes);
    return true;
}

static enum MHD_Result begin(exchange **out, server *s, struct MHD_Connection *connection,
                             const char *method, const char *path) {
    exchange *e = calloc(1, sizeof *e);
    struct peer *p = peer_of(connection);
    if (!e) return MHD_NO;
    *out = e;
    e->s = s;
    e->connection = connection;
    text_init(&e->body, s->o.body_bytes);
    text_init(&e->reply, SIZE_MAX / 2);
    snprintf(e->path, sizeof e->path, "%s", path);
    e->log.method = "?";
    static const char *const methods[] = {"GET",   "POST",   "HEAD",    "PUT",
                                          "PATCH", "DELETE", "OPTIONS", "TRACE"};
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (!strcmp(method, methods[i])) e->log.method = methods[i];
    e->log.started_us = now_us();
    make_id(e->log.id, sizeof e->log.id, header(e, "X-Request-Id"));
    name_address(e->log.address, sizeof e->log.address, connection);
    if (p) {
        pthread_mutex_lock(&s->lock);
        p->reading = true;
        p->since_us = e->log.started_us;
        p->n_received = 0;
        pthread_mutex_unlock(&s->lock);
    }
    if (!strcmp(method, "OPTIONS") && s->o.cors_origin) return MHD_YES;
    if (!check_head(e, method, path) && !e->failure.status)
        refuse_with(&e->failure, 500, NULL, "internal error");
    e->log.path = e->to ? e->to->path : "?"; /* what clients write is not logged */
    return MHD_YES;
}

/* Bytes held for bodies are bounded in all; false: no more now. */
static bool count_body(exchange *e, size_t n_bytes) {
    size_t all = atomic_fetch_add(&e->s->body_bytes, n_bytes) + n_bytes;
    e->n_counted += n_bytes;
    return all <= BODIES_AT_ONCE * e->s->o.body_bytes;
}

/* More of the body. What is refused already is swallowed, so that the sender reads why. */
static enum MHD_Result receive(exchange *e, const char *data, size_t n_bytes) {
    struct peer *p = peer_of(e->connection);
    if (p) {
        pthread_mutex_lock(&e->s->lock);
        p->n_received += n_bytes;
        pthread_mutex_unlock(&e->s->lock);
    }
    if (!e->failure.status && e->body.n_bytes + n_bytes > e->s->o.body_bytes)
        refuse_with(&e->failure, 413, NULL, "the body has more than %zu bytes", e->s->o.body_bytes);
    if (!e->failure.status && !count_body(e, n_bytes)) {
        refuse_with(&e->failure, 503, NULL, "too many large requests at once");
        e->failure.retry_s = 1;
    }
    if (!e->failure.status) {
        text_put(&e->body, data, n_bytes);
        if (e->body.failed) refuse_with(&e->failure, 503, NULL, "out of memory");
        return MHD_YES;
    }
    text_deinit(&e->body);
    e->n_swallowed += n_bytes;
    return e->n_swallowed > SWALLOW_BYTES ? MHD_NO : MHD_YES;
}

/* ---- preparations ---- */

/* What a preparation has left goes out. */
static enum MHD_Result conclude(exchange *e) {
    e->stage = PREPARED;
    enum MHD_Result result = e->work             ? start_job(e)
                             : e->failure.status ? respond_fault(e, &e->failure)
                                                 : respond(e, 200, "application/json", &e->reply);
    json_decref(e->parsed); /* submit has copied what it lent */
    e->parsed = NULL;
    return result;
}

static enum MHD_Result prepare_later(exchange *e) {
    server *s = e->s;
    MHD_suspend_connection(e->connection);
    pthread_mutex_lock(&s->prepare_lock);
    *s->prepare_last = e;
    s->prepare_last = &e->next;
    pthread_cond_signal(&s->prepare_more);
    pthread_mutex_unlock(&s->prepare_lock);
    return MHD_YES;
}

static void *prepare(void *user) {
    server *s = user;
    pthread_mutex_lock(&s->prepare_lock);
    for (;;) {
        exchange *e = s->prepare_first;
        if (!e && s->prepare_ends) break;
        if (!e) {
            pthread_cond_wait(&s->prepare_more, &s->prepare_lock);
            continue;
        }
        if ((s->prepare_first = e->next) == NULL) s->prepare_last = &s->prepare_first;
        e->next = NULL;
        pthread_mutex_unlock(&s->prepare_lock);
        e->to->prepare(e);
        MHD_resume_connection(e->connection); /* e may be gone from here on */
        pthread_mutex_lock(&s->prepare_lock);
    }
    pthread_mutex_unlock(&s->prepare_lock);
    return NULL;
}

static bool start_preparers(server *s) {
    enum { N = sizeof s->preparers / sizeof *s->preparers };
    pthread_mutex_init(&s->prepare_lock, NULL);
    pthread_cond_init(&s->prepare_more, NULL);
    s->prepare_last = &s->prepare_first;
    while (s->n_preparers < N &&
           pthread_create(&s->preparers[s->n_preparers], NULL, prepare, s) == 0)
        s->n_preparers++;
    return s->n_preparers == N;
}

/* Whatever waits is prepared first, so that no connection stays suspended. */
static void stop_preparers(server *s) {
    pthread_mutex_lock(&s->prepare_lock);
    s->prepare_ends = true;
    pthread_cond_broadcast(&s->prepare_more);
    pthread_mutex_unlock(&s->prepare_lock);
    while (s->n_preparers) pthread_join(s->preparers[--s->n_preparers], NULL);
}

static enum MHD_Result handle(void *user, struct MHD_Connection *connection, const char *path,
                              const char *method, const char *version, const char *data,
                              size_t *n_bytes, void **context) {
    server *s = user;
    exchange *e = *context;
    (void)version;
    if (!e) {
        enum MHD_Result begun = begin(&e, s, connection, method, path);
        *context = e;
        return begun;
    }
    if (*n_bytes) {
        enum MHD_Result went_on = receive(e, data, *n_bytes);
        *n_bytes = 0;
        return went_on;
    }
    if (e->work && e->stage == PREPARED) return respond_job(e);
    if (e->stage == PREPARING) return conclude(e);
    struct peer *p = peer_of(connection);
    if (p) {
        pthread_mutex_lock(&s->lock);
        p->busy = true;
        pthread_mutex_unlock(&s->lock);
    }
    if (e->failure.status) return respond_fault(e, &e->failure);
    if (!e->to) return respond_preflight(e);
    if (e->to->answer) return e->to->answer(e);
    e->stage = PREPARING;
    if (e->body.n_bytes > INLINE_BYTES) return prepare_later(e);
    e->to->prepare(e);
    return conclude(e);
}

static void on_completed(void *user, struct MHD_Connection *connection, void **context,
                         enum MHD_RequestTerminationCode how) {
    server *s = user;
    exchange *e = *context;
    struct peer *p = peer_of(connection);
    bool dropped = false, late = false;
    *context = NULL;
    if (p) {
        pthread_mutex_lock(&s->lock);
        dropped = p->dropped;
        late = p->late;
        p->busy = p->reading = false;
        p->used = true;
        p->n_unsent = 0;
        p->since_us = now_us();
        pthread_mutex_unlock(&s->lock);
    }
    if (!e) return;
    if (e->work && e->stage == PREPARING) job_release(e->work); /* it was never started */
    else if (e->work) {
        unlink_job(s, e->work);
        if (how != MHD_REQUEST_TERMINATED_COMPLETED_OK)
            job_abandon(e->work, dropped ? NULL : &s->counts.n_left);
        job_release(e->work);
    } else if (e->to || e->failure.status) {
        e->log.ended_us = now_us();
        if (late) e->log.status = 408;
        if (!e->log.path) e->log.path = "?";
        log_request(s, &e->log);
    }
    atomic_fetch_sub(&s->body_bytes, e->n_counted);
    text_deinit(&e->body);
    text_deinit(&e->reply);
    json_decref(e->parsed);
    free(e);
}

/* ---- looking after connections ---- */

/* Half of a connection closed by the client counts as leaving: it will not be told from a client
 * that is gone. */
static void find_leavers(server *s, struct pollfd *polls, job **jobs, size_t n) {
    if (n == 0 || poll(polls, n, 0) <= 0) return;
    for (size_t i = 0; i < n; i++)
        if (polls[i].revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))
            job_abandon(jobs[i], &s->counts.n_left);
}

static void look_for_leavers(server *s) {
    enum { AT_ONCE = 256 };
    struct pollfd polls[AT_ONCE];
    job *jobs[AT_ONCE];
    size_t n = 0;
    for (job *j = s->jobs; j; j = j->next) {
        jobs[n] = j;
        polls[n++] = (struct pollfd){.fd = j->socket, .events = POLLRDHUP};
        if (n < AT_ONCE) continue;
        find_leavers(s, polls, jobs, n);
        n = 0;
    }
    find_leavers(s, polls, jobs, n);
}

/* A stream that nobody reads is dropped; one that has nothing to say shows that it lives. */
static void look_at_stream(server *s, job *j, uint64_t now) {
    pthread_mutex_lock(&j->lock);
    bool waits = j->out.n_bytes > j->n_sent;
    uint64_t idle_ms = now > j->active_us ? (now - j->active_us) / 1000 : 0;
    bool is_dropped = !j->peer || j->peer->dropped;
    bool drop = waits && !j->gone && !is_dropped && idle_ms > s->o.stall_ms;
    if (!waits && !j->done && !j->gone && idle_ms > s->o.keep_alive_ms) {
        text_puts(&j->out, ": keep-alive\n\n");
        j->active_us = now;
        http_wake(j);
    }
    pthread_mutex_unlock(&j->lock);
    if (!drop) return;
    job_abandon(j, &s->counts.n_slow_dropped);
    j->peer->dropped = true;
    shutdown(j->socket, SHUT_RDWR); /* it waits for room to write; this wakes it */
}

/* An answer that is complete, or is no stream, and that nobody reads would hold its connection and
 * memory for ever. That its reader takes something shows in what the system keeps for it. */
static void look_at_reader(server *s, struct peer *p, uint64_t now) {
    int n_unsent = 0;
    if (p->dropped || ioctl(p->socket, SIOCOUTQ, &n_unsent)) return;
    if (n_unsent == 0 || n_unsent != p->n_unsent) {
        p->n_unsent = n_unsent;
        p->moved_us = now;
    } else if ((now - p->moved_us) / 1000 > s->o.stall_ms) {
        p->dropped = true;
        metrics_count(&s->counts, &s->counts.n_slow_dropped);
        shutdown(p->socket, SHUT_RDWR);
    }
}

/* Past libmicrohttpd, which has no answer for what is not a request yet. */
static void tell_late(server *s, struct peer *p) {
    text head, body;
    fault f;
    refuse_with(&f, 408, NULL, "the request did not come in time");
    text_init(&head, 1 << 12);
    text_init(&body, 1 << 12);
    answer_fault(&body, &f);
    text_printf(&head,
                "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n"
                "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                body.n_bytes);
    text_put(&head, body.data, body.n_bytes);
    if (!head.failed && !body.failed &&
        send(p->socket, head.data, head.n_bytes, MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
        metrics_count(&s->counts, &s->counts.n_responses[4]);
        p->late = true;
    }
    text_deinit(&head);
    text_deinit(&body);
}

static void look_at_peer(server *s, struct peer *p, uint64_t now) {
    bool idle = p->used && !p->reading;
    uint64_t limit_ms = idle ? IDLE_MS : s->o.header_ms + p->n_received / BODY_BYTES_A_MS;
    if (now < p->since_us || (now - p->since_us) / 1000 <= limit_ms) return;
    /* Nothing else is written to a connection whose request is not whole. */
    if (!idle && !s->o.tls_cert) tell_late(s, p);
    shutdown(p->socket, SHUT_RDWR);
}

void http_look_after(server *s, bool quick) {
    uint64_t now = now_us();
    pthread_mutex_lock(&s->lock);
    look_for_leavers(s);
    if (!quick) {
        for (job *j = s->jobs; j; j = j->next)
            if (j->p.stream) look_at_stream(s, j, now);
        for (struct peer *p = s->peers; p; p = p->next) {
            if (p->busy) look_at_reader(s, p, now);
            else look_at_peer(s, p, now);
        }
    }
    pthread_mutex_unlock(&s->lock);
}

bool http_idle(server *s) {
    bool idle = true;
    pthread_mutex_lock(&s->lock);
    for (const struct peer *p = s->peers; p; p = p->next) idle = idle && !p->busy;
    pthread_mutex_unlock(&s->lock);
    return idle;
}

/* ---- start and stop ---- */

bool http_start(server *s) {
    if (!start_preparers(s)) return false;
    unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME;
    /* RFC 8996: nothing older than TLS 1.2. */
    static char versions[] = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2";
    struct MHD_OptionItem tls[4] = {{MHD_OPTION_END, 0, NULL}};
    if (s->o.tls_cert) {
        flags |= MHD_USE_TLS;
        tls[0] =
            (struct MHD_OptionItem){MHD_OPTION_HTTPS_MEM_KEY, 0, (void *)(uintptr_t)s->o.tls_key};
        tls[1] =
            (struct MHD_OptionItem){MHD_OPTION_HTTPS_MEM_CERT, 0, (void *)(uintptr_t)s->o.tls_cert};
        tls[2] = (struct MHD_OptionItem){MHD_OPTION_HTTPS_PRIORITIES, 0, versions};
        tls[3] = (struct MHD_OptionItem){MHD_OPTION_END, 0, NULL};
    }
    s->daemon = MHD_start_daemon(
        flags, 0, NULL, NULL, handle, s, MHD_OPTION_LISTEN_SOCKET, s->o.listener,
        MHD_OPTION_NOTIFY_COMPLETED, on_completed, s, MHD_OPTION_NOTIFY_CONNECTION, on_connection,
        s, MHD_OPTION_CONNECTION_LIMIT, s->o.max_connections + SLACK_CONNECTIONS,
        MHD_OPTION_THREAD_POOL_SIZE, (unsigned)HTTP_THREADS, MHD_OPTION_STRICT_FOR_CLIENT, 1,
        MHD_OPTION_ARRAY, tls, MHD_OPTION_END);
    return s->daemon != NULL;
}

/* All who wait are let go first: libmicrohttpd stops only without suspended connections. */
void http_stop(server *s) {
    if (!s->daemon) return;
    MHD_quiesce_daemon(s->daemon);
    stop_preparers(s);
    pthread_mutex_lock(&s->lock);
    for (job *j = s->jobs; j; j = j->next) job_abandon(j, NULL);
    pthread_mutex_unlock(&s->lock);
    MHD_stop_daemon(s->daemon);
    s->daemon = NULL;
}
