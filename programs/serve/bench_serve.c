/* bench-serve: loads a server that speaks OpenAI's protocol and times what comes back, in the terms
 * of vLLM's `bench serve`. Each request is a prompt of random token ids of one length, streamed,
 * with ignore_eos so that all answers have one length. */
#include "../commands.h"
#include "text.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_LINE_BYTES = 1 << 22,
    BUFFER_BYTES = 1 << 16,
    ANSWER_S = 600 /* an answer that takes longer has failed */
};

typedef struct bench {
    const options *o;
    char host[256], port[16], model[256];
    const char *path; /* before /v1 */
    uint32_t n_vocab;
    struct addrinfo *address;
    struct outcome *outcomes; /* [n_requests] */
    double *arrivals;         /* seconds after the start */
    atomic_uint next;
    double start;
} bench;

typedef struct outcome {
    bool ok, has_usage, ended;
    double sent, first, last; /* seconds after the start: first text, last text or end */
    uint32_t n_in, n_out;     /* by the server's usage */
    double *gaps;             /* [n_gaps] between two pieces */
    uint32_t n_gaps, cap_gaps;
} outcome;

/* ---- one connection, one answer ---- */

typedef struct reader {
    int socket;
    char buffer[BUFFER_BYTES];
    size_t at, n;
    bool chunked, body;
    size_t chunk_left;
} reader;

static int read_byte(reader *r) {
    if (r->at == r->n) {
        ssize_t got = recv(r->socket, r->buffer, sizeof r->buffer, 0);
        if (got <= 0) return -1;
        r->at = 0;
        r->n = (size_t)got;
    }
    return (unsigned char)r->buffer[r->at++];
}

static bool raw_line(reader *r, text *line) {
    line->n_bytes = 0;
    for (int c; (c = read_byte(r)) >= 0;) {
        if (c == '\n') {
            if (line->n_bytes && line->data[line->n_bytes - 1] == '\r') line->n_bytes--;
            text_put(line, "", 0);
            return !line->failed;
        }
        text_put(line, (char[1]){(char)c}, 1);
    }
    return false;
}

/* A byte of the body; -1 at its end. */
static int body_byte(reader *r) {
    if (!r->chunked) return read_byte(r);
    if (r->chunk_left == 0) {
        text line;
        text_init(&line, 1024);
        bool ok = raw_line(r, &line);
        if (ok && line.n_bytes == 0) ok = raw_line(r, &line); /* the end of the chunk before */
        r->chunk_left = ok ? strtoul(line.data, NULL, 16) : 0;
        text_deinit(&line);
        if (r->chunk_left == 0) return -1;
    }
    r->chunk_left--;
    return read_byte(r);
}

static bool body_line(reader *r, text *line) {
    line->n_bytes = 0;
    for (int c; (c = body_byte(r)) >= 0;) {
        if (c == '\n') {
            text_put(line, "", 0);
            return !line->failed;
        }
        text_put(line, (char[1]){(char)c}, 1);
    }
    text_put(line, "", 0);
    return line->n_bytes > 0;
}

/* The status of an answer; its head is read, its body not. */
static int read_head(reader *r, text *line) {
    int status = 0;
    if (!raw_line(r, line) || sscanf(line->data, "HTTP/1.%*d %d", &status) != 1) return 0;
    while (raw_line(r, line) && line->n_bytes)
        if (!strncasecmp(line->data, "transfer-encoding: chunked", 26)) r->chunked = true;
    return status;
}

static int open_socket(const bench *b) {
    int yes = 1, fd = socket(b->address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval limit = {ANSWER_S, 0};
    if (fd < 0) return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (connect(fd, b->address->ai_addr, b->address->ai_addrlen) == 0) return fd;
    close(fd);
    return -1;
}

static bool send_request(const bench *b, int fd, const char *method, const char *path,
                         const text *body) {
    text t;
    text_init(&t, SIZE_MAX / 2);
    text_printf(&t, "%s %s%s HTTP/1.1\r\nHost: %s:%s\r\nConnection: close\r\n", method, b->path,
                path, b->host, b->port);
    if (b->o->api_key) text_printf(&t, "Authorization: Bearer %s\r\n", b->o->api_key);
    if (body)
        text_printf(&t, "Content-Type: application/json\r\nContent-Length: %zu\r\n", body->n_bytes);
    text_puts(&t, "\r\n");
    if (body) text_put(&t, body->data, body->n_bytes);
    bool ok = !t.failed;
    for (size_t at = 0; ok && at < t.n_bytes;) {
        ssize_t n = send(fd, t.data + at, t.n_bytes - at, MSG_NOSIGNAL);
        ok = n > 0;
        at += ok ? (size_t)n : 0;
    }
    text_deinit(&t);
    return ok;
}

/* ---- a request ---- */

static uint64_t draw(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void make_body(text *t, const bench *b, uint32_t index) {
    uint64_t state = b->o->seed * 0x10001u + index;
    text_puts(t, "{\"model\":");
    text_json_string(t, b->model);
    text_printf(t,
                ",\"stream\":true,\"stream_options\":{\"include_usage\":true},\"ignore_eos\":true,"
                "\"temperature\":0,\"max_tokens\":%u,\"prompt\":[",
                b->o->output_len);
    for (uint32_t i = 0; i < b->o->input_len; i++)
        text_printf(t, "%s%u", i ? "," : "", (unsigned)(draw(&state) % b->n_vocab));
    text_puts(t, "]}");
}

static void note_piece(outcome *r, double now) {
    if (r->first == 0) r->first = now;
    else {
        if (r->n_gaps == r->cap_gaps) {
            double *bigger =
                realloc(r->gaps, (r->cap_gaps = 2 * r->cap_gaps + 64) * sizeof *r->gaps);
            if (!bigger) abort(); /* a measuring program without memory has nothing to say */
            r->gaps = bigger;
        }
        r->gaps[r->n_gaps++] = now - r->last;
    }
    r->last = now;
}

/* One event of the stream; true: it was the last. */
static bool take_event(const bench *b, outcome *r, const char *data) {
    if (!strcmp(data, "[DONE]")) return true;
    double now = now_seconds() - b->start;
    json_t *event = json_loads(data, 0, NULL);
    const json_t *usage = json_object_get(event, "usage");
    const json_t *choice = json_array_get(json_object_get(event, "choices"), 0);
    if (json_is_object(usage)) {
        r->has_usage = true;
        r->n_in = (uint32_t)json_integer_value(json_object_get(usage, "prompt_tokens"));
        r->n_out = (uint32_t)json_integer_value(json_object_get(usage, "completion_tokens"));
    }
    /* Tokens may have no text (half a character, a control token) and then no event of their own:
     * how many there were is the usage's to say, and the end of the answer is that of the last. */
    bool ends = json_is_string(json_object_get(choice, "finish_reason"));
    if (json_string_length(json_object_get(choice, "text")) || (ends && r->first == 0))
        note_piece(r, now);
    if (ends) {
        r->ended = true;
        r->last = now;
    }
    json_decref(event);
    return false;
}

static void ask(const bench *b, outcome *r, uint32_t index) {
    reader in = {.socket = open_socket(b)};
    text body, line;
    text_init(&body, SIZE_MAX / 2);
    text_init(&line, MAX_LINE_BYTES);
    make_body(&body, b, index);
    r->sent = now_seconds() - b->start;
    bool done = false;
    if (in.socket >= 0 && send_request(b, in.socket, "POST", "/v1/completions", &body) &&
        read_head(&in, &line) == 200)
        while (!done && body_line(&in, &line))
            if (!strncmp(line.data, "data: ", 6)) done = take_event(b, r, line.data + 6);
    r->ok = done && r->ended; /* not if an error ended it */
    if (in.socket >= 0) close(in.socket);
    text_deinit(&body);
    text_deinit(&line);
}

static void *work(void *user) {
    bench *b = user;
    for (uint32_t i; (i = atomic_fetch_add(&b->next, 1)) < b->o->n_requests;) {
        double wait = b->arrivals[i] - (now_seconds() - b->start);
        if (wait > 0) usleep((useconds_t)(wait * 1e6));
        ask(b, &b->outcomes[i], i);
    }
    return NULL;
}

/* ---- what is measured ---- */

typedef struct series {
    const char *name;
    double *values;
    size_t n;
} series;

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Linear between neighbours, as numpy's default. */
static double percentile(const series *s, double p) {
    double at = p / 100 * ((double)s->n - 1);
    size_t i = (size_t)at;
    if (s->n == 0) return NAN;
    if (i + 1 >= s->n) return s->values[s->n - 1];
    return s->values[i] + (at - (double)i) * (s->values[i + 1] - s->values[i]);
}

/* NAN: it is not known, which is null, and no zero. */
static void put_number(const char *name, double value, bool json, bool first) {
    if (json) printf("%s\"%s\": ", first ? "{" : ", ", name);
    if (json && isnan(value)) printf("null");
    else if (json) printf("%.6g", value);
    else if (isnan(value)) printf("%-28s %12s\n", name, "-");
    else printf("%-28s %12.2f\n", name, value);
}

static void put_series(series *s, bool json) {
    char name[64];
    double sum = 0, squares = 0;
    qsort(s->values, s->n, sizeof *s->values, by_value);
    for (size_t i = 0; i < s->n; i++) sum += s->values[i];
    double mean = s->n ? sum / (double)s->n : NAN;
    for (size_t i = 0; i < s->n; i++) squares += (s->values[i] - mean) * (s->values[i] - mean);
    const struct {
        const char *name;
        double value;
    } figures[] = {{"mean", mean},
                   {"median", percentile(s, 50)},
                   {"std", s->n ? sqrt(squares / (double)s->n) : NAN},
                   {"p90", percentile(s, 90)},
                   {"p99", percentile(s, 99)}};
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        snprintf(name, sizeof name, "%s_%s_ms", figures[i].name, s->name);
        put_number(name, figures[i].value, json, false);
    }
}

static bool is_good(const bench *b, double ttft_ms, double tpot_ms) {
    return (b->o->goodput_ttft_ms == 0 || ttft_ms <= b->o->goodput_ttft_ms) &&
           (b->o->goodput_tpot_ms == 0 || tpot_ms <= b->o->goodput_tpot_ms);
}

/* Milliseconds a token after the first, as vLLM and aiperf have it: (end - first) / (tokens - 1).
 * False: not known, or there is none: one token, no usage, or all text came with the end. */
static bool token_ms(double *ms, const outcome *r) {
    if (!r->has_usage || r->n_out < 2 || r->last <= r->first) return false;
    *ms = (r->last - r->first) * 1e3 / (r->n_out - 1);
    return true;
}

/* The most that it can be, for the goal: as if the first token had come at once. */
static double token_ms_limit(const outcome *r) {
    double ms;
    if (token_ms(&ms, r)) return ms;
    if (r->has_usage && r->n_out < 2) return 0; /* no token after the first */
    return r->has_usage ? (r->last - r->sent) * 1e3 / (r->n_out - 1) : INFINITY;
}

/* Returns how many requests failed. */
static uint32_t report(const bench *b, double seconds, bool json) {
    enum { TTFT, TPOT, ITL, E2EL, N_SERIES };
    uint32_t n = b->o->n_requests, n_ok = 0, n_good = 0, n_uncounted = 0;
    uint64_t n_in = 0, n_out = 0;
    size_t n_gaps = 0;
    for (uint32_t i = 0; i < n; i++) n_gaps += b->outcomes[i].n_gaps;
    series all[N_SERIES] = {{.name = "ttft"}, {.name = "tpot"}, {.name = "itl"}, {.name = "e2el"}};
    for (int i = 0; i < N_SERIES; i++)
        if (!(all[i].values = calloc(n + n_gaps + 1, sizeof(double)))) return n;
    for (uint32_t i = 0; i < n; i++) {
        const outcome *r = &b->outcomes[i];
        if (!r->ok) continue;
        double ttft = (r->first - r->sent) * 1e3;
        all[TTFT].values[all[TTFT].n++] = ttft;
        if (token_ms(&all[TPOT].values[all[TPOT].n], r)) all[TPOT].n++;
        for (uint32_t k = 0; k < r->n_gaps; k++) all[ITL].values[all[ITL].n++] = r->gaps[k] * 1e3;
        all[E2EL].values[all[E2EL].n++] = (r->last - r->sent) * 1e3;
        n_ok++;
        n_good += is_good(b, ttft, token_ms_limit(r));
        n_uncounted += !r->has_usage;
        n_in += r->n_in;
        n_out += r->n_out;
    }
    put_number("duration", seconds, json, true);
    put_number("completed", n_ok, json, false);
    put_number("failed", n - n_ok, json, false);
    /* Sums over answers without a usage would look like few tokens. */
    double in = n_uncounted ? NAN : (double)n_in, out = n_uncounted ? NAN : (double)n_out;
    put_number("total_input_tokens", in, json, false);
    put_number("total_output_tokens", out, json, false);
    put_number("request_throughput", n_ok / seconds, json, false);
    put_number("request_goodput", n_good / seconds, json, false);
    put_number("output_throughput", out / seconds, json, false);
    put_number("total_token_throughput", (in + out) / seconds, json, false);
    put_number("without_usage", n_uncounted, json, false);
    put_number("without_tpot", (double)(n_ok - all[TPOT].n), json, false);
    for (int i = 0; i < N_SERIES; i++) {
        put_series(&all[i], json);
        free(all[i].values);
    }
    if (json) puts("}");
    return n - n_ok;
}

/* ---- the server ---- */

static int read_url(bench *b, const char *url) {
    if (strncmp(url, "http://", 7)) return usage_error("'%s': expected http://HOST:PORT", url);
    const char *host = url + 7;
    size_t n = strcspn(host, ":/");
    if (n == 0 || n >= sizeof b->host) return usage_error("'%s': no host", url);
    snprintf(b->host, sizeof b->host, "%.*s", (int)n, host);
    snprintf(b->port, sizeof b->port, "80");
    if (host[n] == ':') {
        size_t digits = strspn(host + n + 1, "0123456789");
        snprintf(b->port, sizeof b->port, "%.*s", (int)digits, host + n + 1);
        n += 1 + digits;
    }
    b->path = host[n] == '/' && host[n + 1] ? host + n : "";
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    int failed = getaddrinfo(b->host, b->port, &hints, &b->address);
    return failed ? usage_error("'%s': %s", url, gai_strerror(failed)) : EXIT_OK;
}

/* The name to ask for and the size of the vocabulary (kivi says it; elsewhere small ids do). */
static int ask_model(bench *b) {
    enum { SAFE_IDS = 1000 };
    reader in = {.socket = open_socket(b)};
    text line, body;
    text_init(&line, MAX_LINE_BYTES);
    text_init(&body, MAX_LINE_BYTES);
    int status = 0;
    if (in.socket >= 0 && send_request(b, in.socket, "GET", "/v1/models", NULL))
        status = read_head(&in, &line);
    for (int c; status == 200 && (c = body_byte(&in)) >= 0;) text_put(&body, (char[1]){(char)c}, 1);
    json_t *models = json_loadb(body.data ? body.data : "", body.n_bytes, 0, NULL);
    const json_t *model = json_array_get(json_object_get(models, "data"), 0);
    const char *name =
        b->o->served_name ? b->o->served_name : json_string_value(json_object_get(model, "id"));
    json_int_t n = json_integer_value(json_object_get(json_object_get(model, "meta"), "n_vocab"));
    snprintf(b->model, sizeof b->model, "%s", name ? name : "");
    b->n_vocab = n > 0 && n <= INT32_MAX ? (uint32_t)n : SAFE_IDS;
    json_decref(models);
    if (in.socket >= 0) close(in.socket);
    text_deinit(&line);
    text_deinit(&body);
    if (name) return EXIT_OK;
    fprintf(stderr, "kivi: error: %s: no answer to /v1/models (status %d)\n", b->o->model, status);
    return EXIT_IO;
}

static void make_arrivals(bench *b) {
    uint64_t state = b->o->seed ^ 0x5eed;
    double at = 0;
    for (uint32_t i = 0; i < b->o->n_requests; i++) {
        b->arrivals[i] = at;
        double u = ((double)(draw(&state) >> 11) + 1) * 0x1p-53;
        if (b->o->request_rate > 0) at -= log(u) / b->o->request_rate;
    }
}

static int run(bench *b, bool json) {
    uint32_t n_threads =
                 b->o->concurrency < b->o->n_requests ? b->o->concurrency : b->o->n_requests,
             n = 0;
    pthread_t *threads = calloc(n_threads, sizeof *threads);
    if (!threads) return out_of_memory("threads");
    b->start = now_seconds();
    while (n < n_threads && pthread_create(&threads[n], NULL, work, b) == 0) n++;
    bool all = n == n_threads;
    while (n--) pthread_join(threads[n], NULL);
    free(threads);
    if (!all) return out_of_memory("threads");
    uint32_t n_failed = report(b, now_seconds() - b->start, json);
    if (n_failed) fprintf(stderr, "kivi: error: %u requests failed\n", n_failed);
    return n_failed ? EXIT_IO : EXIT_OK;
}

int command_bench_serve(const options *o) {
    bench b = {.o = o};
    bool json = o->format && !strcmp(o->format, "json");
    if (o->format && !json && strcmp(o->format, "text"))
        return usage_error("--output: '%s', expected text or json", o->format);
    int code = read_url(&b, o->model);
    if (!code) code = ask_model(&b);
    b.outcomes = calloc(o->n_requests, sizeof *b.outcomes);
    b.arrivals = calloc(o->n_requests, sizeof *b.arrivals);
    if (!code && (!b.outcomes || !b.arrivals)) code = out_of_memory("the requests");
    if (!code) {
        make_arrivals(&b);
        code = run(&b, json);
    }
    for (uint32_t i = 0; b.outcomes && i < o->n_requests; i++) free(b.outcomes[i].gaps);
    free(b.outcomes);
    free(b.arrivals);
    if (b.address) freeaddrinfo(b.address);
    return code;
}
