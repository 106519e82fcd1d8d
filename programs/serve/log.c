#include "server.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- the writer: whoever reads the log and stops must not stop the steps ----
 * Lines wait in a ring of bytes for a thread that writes them; where there is no room they are
 * dropped, counted, and the count is a line as soon as there is. */

enum { RING_BYTES = 1 << 20, CHUNK_BYTES = 1 << 16, FLUSH_S = 2 };

struct log_writer {
    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
    pthread_t thread;
    bool ends, is_writing;
    uint64_t n_dropped;
    size_t first, n_bytes; /* of the ring */
    char ring[RING_BYTES], chunk[CHUNK_BYTES];
};

static void write_all(const char *data, size_t n_bytes) {
    while (n_bytes) {
        ssize_t n = write(STDERR_FILENO, data, n_bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return; /* nobody reads any more */
        data += n;
        n_bytes -= (size_t)n;
    }
}

/* Under the lock. False: there is no room. */
static bool enqueue(struct log_writer *w, const char *data, size_t n_bytes) {
    if (n_bytes > RING_BYTES - w->n_bytes) return false;
    for (size_t i = 0; i < n_bytes; i++)
        w->ring[(w->first + w->n_bytes + i) % RING_BYTES] = data[i];
    w->n_bytes += n_bytes;
    return true;
}

static size_t dequeue(struct log_writer *w) {
    size_t n = w->n_bytes < CHUNK_BYTES ? w->n_bytes : CHUNK_BYTES;
    for (size_t i = 0; i < n; i++) w->chunk[i] = w->ring[(w->first + i) % RING_BYTES];
    w->first = (w->first + n) % RING_BYTES;
    w->n_bytes -= n;
    return n;
}

static void *write_lines(void *user) {
    const server *s = user;
    struct log_writer *w = s->log_writer;
    pthread_mutex_lock(&w->lock);
    while (w->n_bytes || !w->ends) {
        if (!w->n_bytes) {
            pthread_cond_wait(&w->filled, &w->lock);
            continue;
        }
        size_t n = dequeue(w);
        uint64_t n_dropped = w->n_dropped;
        w->n_dropped = 0;
        w->is_writing = true;
        pthread_mutex_unlock(&w->lock);
        write_all(w->chunk, n);
        if (n_dropped)
            log_line(s, "warning", "%llu lines of the log were dropped: its reader is slow",
                     (unsigned long long)n_dropped);
        pthread_mutex_lock(&w->lock);
        w->is_writing = false;
        pthread_cond_signal(&w->emptied);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

bool log_start(server *s) {
    struct log_writer *w = calloc(1, sizeof *w);
    if (!w) return false;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->filled, NULL);
    pthread_cond_init(&w->emptied, NULL);
    s->log_writer = w;
    if (!pthread_create(&w->thread, NULL, write_lines, s)) return true;
    s->log_writer = NULL;
    free(w);
    return false;
}

void log_stop(server *s) {
    struct log_writer *w = s->log_writer;
    struct timespec end;
    if (!w) return;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += FLUSH_S;
    pthread_mutex_lock(&w->lock);
    w->ends = true;
    pthread_cond_signal(&w->filled);
    int code = 0;
    while ((w->n_bytes || w->is_writing) && !code)
        code = pthread_cond_timedwait(&w->emptied, &w->lock, &end);
    pthread_mutex_unlock(&w->lock);
    if (code) pthread_cancel(w->thread); /* within write(2): its reader has stopped */
    pthread_join(w->thread, NULL);
    s->log_writer = NULL;
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->filled);
    pthread_cond_destroy(&w->emptied);
    free(w);
}

/* ---- lines ---- */

static void put_time(text *t) {
    struct timespec now;
    struct tm parts;
    char day[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &parts);
    strftime(day, sizeof day, "%Y-%m-%dT%H:%M:%S", &parts);
    text_printf(t, "%s.%03ldZ", day, now.tv_nsec / 1000000);
}

/* A line is whole, so that lines of several threads do not mix. */
static void put_line(const server *s, text *t) {
    struct log_writer *w = s->log_writer;
    text_puts(t, "\n");
    if (!w && !t->failed) write_all(t->data, t->n_bytes);
    if (w && !t->failed) {
        pthread_mutex_lock(&w->lock);
        if (!enqueue(w, t->data, t->n_bytes)) w->n_dropped++;
        pthread_cond_signal(&w->filled);
        pthread_mutex_unlock(&w->lock);
    }
    text_deinit(t);
}

void log_line(const server *s, const char *level, const char *format, ...) {
    char line[1024];
    text t;
    va_list args;
    if (s->o.log == LOG_NONE) return;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    text_init(&t, 1 << 16);
    if (s->o.log == LOG_TEXT) text_printf(&t, "kivi: %s%s", *level == 'i' ? "" : "warning: ", line);
    else {
        text_puts(&t, "{\"time\":\"");
        put_time(&t);
        text_printf(&t, "\",\"level\":\"%s\",\"message\":", level);
        text_json_string(&t, line);
        text_puts(&t, "}");
    }
    put_line(s, &t);
}

static void put_text(text *t, const request_log *r, double seconds, double rate) {
    put_time(t);
    text_printf(t, " %s %s %s %d %.3fs %s", r->address, r->method, r->path, r->status, seconds,
                r->id);
    if (!r->has_job) return;
    text_printf(t,
                " prompt=%u cached=%u generated=%u queue=%.3fs first=%.3fs rate=%.1f/s finish=%s"
                "%s preempted=%u",
                r->n_prompt, r->n_cached, r->n_generated, r->queue_s, r->first_token_s, rate,
                r->finish ? r->finish : "none", r->streamed ? " stream" : "", r->n_preemptions);
}

static void put_json(text *t, const request_log *r, double seconds, double rate) {
    text_puts(t, "{\"time\":\"");
    put_time(t);
    text_printf(t, "\",\"level\":\"info\",\"message\":\"request\",\"client\":");
    text_json_string(t, r->address);
    text_puts(t, ",\"method\":");
    text_json_string(t, r->method);
    text_puts(t, ",\"path\":");
    text_json_string(t, r->path);
    text_printf(t, ",\"status\":%d,\"seconds\":%.6f,\"id\":", r->status, seconds);
    text_json_string(t, r->id);
    if (r->has_job) {
        text_printf(t,
                    ",\"prompt_tokens\":%u,\"cached_tokens\":%u,\"completion_tokens\":%u,"
                    "\"queue_s\":%.6f,\"first_token_s\":%.6f,\"tokens_per_s\":%.2f,\"stream\":%s,"
                    "\"preemptions\":%u,\"finish_reason\":",
                    r->n_prompt, r->n_cached, r->n_generated, r->queue_s, r->first_token_s, rate,
                    r->streamed ? "true" : "false", r->n_preemptions);
        text_json_string(t, r->finish);
    }
    text_puts(t, "}");
}

void log_request(const server *s, const request_log *r) {
    double seconds = (double)(r->ended_us - r->started_us) * 1e-6;
    double generating = seconds - r->first_token_s;
    double rate = generating > 0 && r->n_generated > 1 ? (r->n_generated - 1) / generating : 0;
    text t;
    if (s->o.log == LOG_NONE) return;
    text_init(&t, 1 << 16);
    (s->o.log == LOG_JSON ? put_json : put_text)(&t, r, seconds, rate);
    put_line(s, &t);
}
