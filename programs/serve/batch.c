/* batch: answers a file of requests in the format of OpenAI's batches. A line of the input is
 *   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
 * and its answer, in the order in which they are done,
 *   {"id": ..., "custom_id": "a", "response": {"status_code", "request_id", "body"}, "error": null}
 * A run that was stopped is taken up again: what the output has already is not asked again, and
 * half a line at its end is cut off. */
#include "job.h"
#include "hosted.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MAX_LINE_BYTES = 64 << 20,
    JOBS_A_SEQUENCE = 2 /* as many wait as run, so that a free place is filled at once */
};

typedef struct item {
    struct batch *batch;
    struct item *next; /* of those that are done */
    job *job;
    char *custom_id;
} item;

typedef struct batch {
    server *s;
    FILE *in, *out;
    const char *in_path, *out_path;
    json_t *answered; /* custom_id -> true of an earlier run, false of this one */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    item *done;
    size_t n_flying, n_most;
    size_t n_lines, n_skipped, n_ok, n_failed, line_number;
    uint64_t started_us, shown_us, in_bytes;
    int code;
} batch;

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

/* ---- output ---- */

static void put_answer(text *t, const char *id, const char *custom_id, int status,
                       const text *body) {
    text_puts(t, "{\"id\":\"batch_req_");
    text_puts(t, id);
    text_puts(t, "\",\"custom_id\":");
    text_json_string(t, custom_id);
    text_printf(t, ",\"response\":{\"status_code\":%d,\"request_id\":\"%s\",\"body\":", status, id);
    text_put(t, body->data, body->n_bytes);
    text_puts(t, "},\"error\":null}\n");
}

static void write_line(batch *b, const char *id, const char *custom_id, int status,
                       const text *body) {
    text t;
    text_init(&t, SIZE_MAX / 2);
    put_answer(&t, id, custom_id, status, body);
    if (t.failed) b->code = out_of_memory("an answer");
    else if (fwrite(t.data, 1, t.n_bytes, b->out) != t.n_bytes || fflush(b->out)) {
        fprintf(stderr, "kivi: error: %s: %s\n", b->out_path, strerror(errno));
        b->code = EXIT_IO;
    }
    *(status == 200 ? &b->n_ok : &b->n_failed) += 1;
    text_deinit(&t);
}

static void write_fault(batch *b, const char *custom_id, const fault *f) {
    text body;
    char id[32];
    snprintf(id, sizeof id, "line-%zu", b->line_number);
    text_init(&body, 1 << 16);
    answer_fault(&body, f);
    write_line(b, id, custom_id, f->status, &body);
    text_deinit(&body);
}

static void show_progress(batch *b, bool last) {
    uint64_t now = now_us();
    char bar[31] = "";
    if (!isatty(STDERR_FILENO) || (!last && now - b->shown_us < 200000)) return;
    long at = ftell(b->in);
    size_t filled = b->in_bytes && at > 0 ? (size_t)((uint64_t)at * 30 / b->in_bytes) : 0;
    memset(bar, '.', 30);
    memset(bar, '#', filled > 30 ? 30 : filled);
    double seconds = (double)(now - b->started_us) * 1e-6;
    size_t n = b->n_ok + b->n_failed;
    fprintf(stderr, "\r[%s] %zu answered, %zu failed, %zu at work, %.2f/s\033[K%s", bar, b->n_ok,
            b->n_failed, b->n_flying, (double)n / (seconds + 1e-9), last ? "\n" : "");
    b->shown_us = now;
}

/* ---- one request ---- */

static void on_done(void *user) {
    item *it = user;
    batch *b = it->batch;
    pthread_mutex_lock(&b->lock);
    it->next = b->done;
    b->done = it;
    pthread_cond_signal(&b->changed);
    pthread_mutex_unlock(&b->lock);
}

static void finish_item(batch *b, item *it) {
    job *j = it->job;
    pthread_mutex_lock(&j->lock);
    if (j->failure.status) {
        j->out.n_bytes = 0;
        answer_fault(&j->out, &j->failure);
    }
    /* Cut off by Ctrl-C: it is asked again by the next run. */
    if (!interrupted || !j->failure.status)
        write_line(b, j->id, it->custom_id, j->failure.status ? j->failure.status : 200, &j->out);
    pthread_mutex_unlock(&j->lock);
    job_release(j);
    free(it->custom_id);
    free(it);
    b->n_flying--;
}

/* Takes what is done, waiting until fewer than most are under way. */
static void collect(batch *b, size_t most) {
    for (;;) {
        pthread_mutex_lock(&b->lock);
        while (!b->done && b->n_flying > most) pthread_cond_wait(&b->changed, &b->lock);
        item *it = b->done;
        if (it) b->done = it->next;
        pthread_mutex_unlock(&b->lock);
        if (!it) return;
        finish_item(b, it);
        show_progress(b, false);
    }
}

static bool submit(batch *b, const char *custom_id, const json_t *body, bool chat, fault *f) {
    request_log log = {0};
    item *it = calloc(1, sizeof *it);
    snprintf(log.id, sizeof log.id, "batch-%zu", b->line_number);
    if (!it || !(it->custom_id = malloc(strlen(custom_id) + 1))) {
        free(it);
        return refuse_with(f, 503, NULL, "out of memory");
    }
    memcpy(it->custom_id, custom_id, strlen(custom_id) + 1);
    it->batch = b;
    it->job = job_create(b->s, body, chat, &log, f);
    if (it->job && it->job->p.stream) refuse_with(f, 400, "stream", "stream: not in a batch");
    if (it->job && !f->status) {
        it->job->when_done = on_done;
        it->job->when_done_user = it;
        b->n_flying++; /* before it can be done */
        if (job_submit(it->job, f)) return true;
        b->n_flying--;
    }
    if (it->job) job_release(it->job);
    free(it->custom_id);
    free(it);
    return false;
}

static bool read_request(batch *b, const json_t *line, const char *custom_id, fault *f) {
    const char *url = json_string_value(json_object_get(line, "url"));
    const char *method = json_string_value(json_object_get(line, "method"));
    const json_t *body = json_object_get(line, "body");
    bool chat = url && !strcmp(url, "/v1/chat/completions");
    if (method && strcmp(method, "POST"))
        return refuse_with(f, 405, "method", "method: expected POST");
    if (!chat && (!url || strcmp(url, "/v1/completions")))
        return refuse_with(f, 404, "url", "url: expected /v1/completions or /v1/chat/completions");
    while (!submit(b, custom_id, body, chat, f)) {
        if (f->status != 429 || b->n_flying == 0) return false;
        collect(b, b->n_flying - 1); /* the queue is full: one of those must end first */
        *f = (fault){0};
    }
    return true;
}

static void take_line(batch *b, const char *line, size_t n_bytes) {
    json_error_t where;
    fault f = {0};
    json_t *request = json_loadb(line, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &where);
    const char *custom_id = json_string_value(json_object_get(request, "custom_id"));
    char number[32];
    snprintf(number, sizeof number, "line-%zu", b->line_number);
    const json_t *before = custom_id ? json_object_get(b->answered, custom_id) : NULL;
    if (json_is_false(before)) {
        refuse_with(&f, 400, "custom_id", "line %zu: the custom_id was used before",
                    b->line_number);
        write_fault(b, number, &f);
    } else if (before) {
        b->n_skipped++;
    } else if (!request) {
        refuse_with(&f, 400, NULL, "line %zu is not valid JSON: %s", b->line_number, where.text);
        write_fault(b, number, &f);
    } else if (!custom_id) {
        refuse_with(&f, 400, "custom_id", "line %zu: custom_id is missing", b->line_number);
        write_fault(b, number, &f);
    } else if (!read_request(b, request, custom_id, &f)) write_fault(b, custom_id, &f);
    if (custom_id && !before) json_object_set_new(b->answered, custom_id, json_false());
    json_decref(request);
}

/* ---- files ---- */

/* What an earlier run answered. *n_whole: bytes of whole lines. */
static int read_answers(batch *b, off_t *n_whole) {
    FILE *file = fopen(b->out_path, "rb");
    char *line = NULL;
    size_t room = 0;
    *n_whole = 0;
    if (!file)
        return errno == ENOENT ? EXIT_OK : usage_error("%s: %s", b->out_path, strerror(errno));
    for (ssize_t n; (n = getline(&line, &room, file)) > 0 && line[n - 1] == '\n'; *n_whole += n) {
        json_t *answer = json_loadb(line, (size_t)n, 0, NULL);
        const char *id = json_string_value(json_object_get(answer, "custom_id"));
        if (!id) {
            json_decref(answer);
            free(line);
            fclose(file);
            return usage_error("%s: is there and has lines that are no answers", b->out_path);
        }
        json_object_set_new(b->answered, id, json_true());
        json_decref(answer);
    }
    free(line);
    fclose(file);
    return EXIT_OK;
}

static int open_files(batch *b) {
    struct stat st;
    off_t n_whole;
    b->in = fopen(b->in_path, "rb");
    if (!b->in || fstat(fileno(b->in), &st)) {
        fprintf(stderr, "kivi: error: %s: %s\n", b->in_path, strerror(errno));
        return EXIT_IO;
    }
    b->in_bytes = (uint64_t)st.st_size;
    int code = read_answers(b, &n_whole);
    if (code) return code;
    b->out = fopen(b->out_path, "ab");
    if (b->out && ftruncate(fileno(b->out), n_whole) == 0) return EXIT_OK;
    fprintf(stderr, "kivi: error: %s: %s\n", b->out_path, strerror(errno));
    return EXIT_IO;
}

/* Reads, submits and writes, while the main thread runs the scheduler. */
static void *feed(void *user) {
    batch *b = user;
    char *line = NULL;
    size_t room = 0;
    for (ssize_t n; !interrupted && !b->code && (n = getline(&line, &room, b->in)) > 0;) {
        b->line_number++;
        while (n && strchr(" \t\r\n", line[n - 1])) n--;
        if (n == 0) continue;
        b->n_lines++;
        if (n > MAX_LINE_BYTES) {
            b->code = usage_error("%s: line %zu is too long", b->in_path, b->line_number);
            break;
        }
        take_line(b, line, (size_t)n);
        collect(b, b->n_most - 1);
        show_progress(b, false);
    }
    /* Ctrl-C: what is under way still ends; its answers are kept. */
    collect(b, 0);
    free(line);
    kivi_scheduler_drain(b->s->scheduler);
    return NULL;
}

static int run(batch *b) {
    pthread_t thread;
    kivi_error err = {0};
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    b->started_us = now_us();
    if (pthread_create(&thread, NULL, feed, b)) return out_of_memory("a thread");
    int code = kivi_scheduler_run(b->s->scheduler, &err) ? fail_with(&err) : EXIT_OK;
    pthread_join(thread, NULL);
    show_progress(b, true);
    fprintf(stderr,
            "kivi: %zu requests: %zu answered, %zu refused or failed, %zu had been before\n",
            b->n_lines, b->n_ok, b->n_failed, b->n_skipped);
    return code ? code : b->code;
}

int command_batch(const options *o) {
    server *s = calloc(1, sizeof *s);
    batch b = {.s = s, .in_path = o->source, .out_path = o->target, .answered = json_object()};
    if (!s || !b.answered) return out_of_memory("the batch");
    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&b.lock, NULL);
    pthread_cond_init(&b.changed, NULL);
    metrics_init(&s->counts);
    const char *slash = strrchr(o->model, '/');
    s->o = (server_options){.model_name = slash && slash[1] ? slash + 1 : o->model,
                            .chat_format = o->chat_template,
                            .parse_special = o->parse_special,
                            .log = LOG_NONE};
    b.n_most = (size_t)o->max_seqs * JOBS_A_SEQUENCE;
    int code = open_files(&b);
    if (!code) code = model_load(s, o, NULL);
    if (!code) code = run(&b);
    if (b.in) fclose(b.in);
    if (b.out && fclose(b.out) && !code) {
        fprintf(stderr, "kivi: error: %s: %s\n", b.out_path, strerror(errno));
        code = EXIT_IO;
    }
    model_unload(s);
    json_decref(b.answered);
    metrics_deinit(&s->counts);
    pthread_mutex_destroy(&s->lock);
    free(s);
    return code;
}
