/* serve: the OpenAI-compatible server. This file starts it, looks after it and ends it. */
#include "http.h"
#include "hosted.h"

#include <errno.h>
#include <limits.h>
#include <netdb.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_KEY_FILE_BYTES = 1 << 20,
    MAX_PEM_BYTES = 1 << 20,
    KEEPER_MS = 100, /* how often the keeper looks */
    FLUSH_MS = 5000, /* for answers that are complete to reach their clients at the end */
    BACKLOG = 1024
};

/* ---- options ---- */

static int read_log_form(log_form *out, const options *o) {
    const char *name = o->log_format ? o->log_format : "text";
    static const char *const names[] = {"text", "json", "none"};
    for (int i = 0; i < 3; i++)
        if (!strcmp(name, names[i])) {
            *out = (log_form)i;
            return EXIT_OK;
        }
    return usage_error("--log-format: '%s', expected text, json or none", name);
}

static int read_keys(key_list *keys, const options *o) {
    char *lines = NULL;
    size_t n_bytes = 0;
    if (o->api_key && !keys_add_words(keys, o->api_key))
        return usage_error("--api-key: expected keys of 1 to %d bytes", KEY_BYTES - 1);
    if (!o->api_key_file) return EXIT_OK;
    int code = read_file(&lines, &n_bytes, o->api_key_file, MAX_KEY_FILE_BYTES);
    if (!code && (!keys_add_lines(keys, lines) || keys->n == 0))
        code = usage_error("--api-key-file: %s: expected keys of 1 to %d bytes, one a line",
                           o->api_key_file, KEY_BYTES - 1);
    if (lines) explicit_bzero(lines, n_bytes);
    free(lines);
    return code;
}

static int read_pem(const char **out, const char *path) {
    char *pem = NULL;
    size_t n_bytes;
    int code = read_file(&pem, &n_bytes, path, MAX_PEM_BYTES);
    *out = pem;
    return code;
}

static int read_options(server *s, const options *o) {
    s->o = (server_options){.chat_format = o->chat_template,
                            .cors_origin = o->cors,
                            .listener = -1,
                            .parse_special = o->parse_special,
                            .body_bytes = (size_t)o->max_body_kib << 10,
                            .buffer_bytes = (size_t)o->stream_buffer_kib << 10,
                            .stall_ms = o->reader_s * 1000,
                            .header_ms = o->header_s * 1000,
                            .drain_ms = o->drain_s * 1000,
                            .keep_alive_ms = o->keep_alive_s * 1000,
                            .max_connections = o->max_connections,
                            .request_ms = o->request_s * 1000};
    const char *slash = strrchr(o->model, '/');
    s->o.model_name = o->served_name ? o->served_name : slash && slash[1] ? slash + 1 : o->model;
    int code = read_log_form(&s->o.log, o);
    if (!code) code = read_keys(&s->keys, o);
    if (!code && !o->tls_cert != !o->tls_key)
        code = usage_error("--tls-cert and --tls-key: both are needed");
    if (!code && o->tls_cert) code = read_pem(&s->o.tls_cert, o->tls_cert);
    if (!code && o->tls_key) code = read_pem(&s->o.tls_key, o->tls_key);
    return code;
}

/* As many descriptors as the system allows, and no more connections than those are enough for: a
 * server that cannot accept would not say why. */
static void fit_descriptors(server *s) {
    enum { OTHERS = 32, LEAST = 4 }; /* files, epoll, the listener, connections to be told 503 */
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) || getrlimit(RLIMIT_NOFILE, &limit)) return;
    uint64_t room = limit.rlim_cur > OTHERS + LEAST ? limit.rlim_cur - OTHERS : LEAST;
    if (s->o.max_connections <= room) return;
    s->o.max_connections = (unsigned)room;
    log_line(s, "warning", "%llu descriptors allow for %u connections",
             (unsigned long long)limit.rlim_cur, s->o.max_connections);
}

/* ---- the socket ---- */

static int open_listener(server *s, const options *o) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found = NULL;
    char port[16];
    int yes = 1;
    const char *host = o->host ? o->host : "127.0.0.1";
    snprintf(port, sizeof port, "%u", o->port);
    int failed = getaddrinfo(host, port, &hints, &found);
    if (failed) return usage_error("--host: '%s': %s", host, gai_strerror(failed));
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    bool ok =
        fd >= 0 && bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, BACKLOG) == 0;
    freeaddrinfo(found);
    s->o.listener = fd;
    if (ok) return EXIT_OK;
    fprintf(stderr, "kivi: error: --port: %s port %u: %s\n", host, o->port, strerror(errno));
    return EXIT_IO;
}

static void say_where(const server *s) {
    struct sockaddr_storage address;
    socklen_t n_bytes = sizeof address;
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (getsockname(s->o.listener, (struct sockaddr *)&address, &n_bytes) ||
        getnameinfo((struct sockaddr *)&address, n_bytes, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV))
        return;
    bool six = address.ss_family == AF_INET6;
    log_line(s, "info", "listening at http%s://%s%s%s:%s", s->o.tls_cert ? "s" : "", six ? "[" : "",
             host, six ? "]" : "", port);
    bool open = strcmp(host, "127.0.0.1") && strcmp(host, "::1");
    if (open && s->keys.n == 0)
        log_line(s, "warning", "whoever reaches %s may use this server: no --api-key is set", host);
}

/* ---- the keeper: deadlines, stalls, signals ---- */

typedef struct keeper {
    server *s;
    sigset_t signals;
    atomic_bool ends;
    uint64_t draining_us; /* since when; 0: not */
    bool told_stall;
} keeper;

static void start_drain(keeper *k, int signal_number) {
    server *s = k->s;
    k->draining_us = now_us();
    atomic_store(&s->draining, true);
    log_line(s, "info", "%s: no new requests; a second one ends at once", strsignal(signal_number));
    pthread_mutex_lock(&s->lock);
    if (s->scheduler) kivi_scheduler_drain(s->scheduler);
    pthread_mutex_unlock(&s->lock);
}

static void on_signal(keeper *k, int signal_number) {
    if (!k->draining_us) {
        start_drain(k, signal_number);
        return;
    }
    sigset_t none;
    sigemptyset(&none);
    sigaddset(&none, signal_number);
    signal(signal_number, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &none, NULL);
    raise(signal_number);
}

static void look_at_engine(keeper *k) {
    server *s = k->s;
    kivi_scheduler_health health;
    if (!atomic_load(&s->loaded)) return;
    kivi_scheduler_health_get(&health, s->scheduler);
    atomic_store(&s->stalled, health.stalled);
    if (health.stalled && !k->told_stall) {
        char state[4096];
        kivi_scheduler_describe(state, sizeof state, s->scheduler);
        log_line(s, "warning", "stalled: no progress for %.1f s",
                 (double)health.progress_us * 1e-6);
        for (char *line = strtok(state, "\n"); line; line = strtok(NULL, "\n"))
            log_line(s, "warning", "  %s", line);
    }
    k->told_stall = health.stalled;
    if (!k->draining_us || now_us() - k->draining_us <= (uint64_t)s->o.drain_ms * 1000) return;
    pthread_mutex_lock(&s->lock);
    for (job *j = s->jobs; j; j = j->next) job_expire(j);
    pthread_mutex_unlock(&s->lock);
}

static void *keep(void *user) {
    keeper *k = user;
    const struct timespec pause = {0, KEEPER_MS * 1000000L};
    while (!atomic_load(&k->ends)) {
        int signal_number = sigtimedwait(&k->signals, NULL, &pause);
        if (signal_number > 0) on_signal(k, signal_number);
        http_look_after(k->s, false);
        look_at_engine(k);
    }
    return NULL;
}

static void on_step(void *user, const kivi_step_report *report) {
    server *s = user;
    if (report->n_rows)
        metrics_observe(&s->counts, HISTOGRAM_iteration_tokens_total, report->n_rows);
    http_look_after(s, true);
}

static int load(server *s, const options *o) {
    int code = model_load(s, o, on_step);
    if (code) return code;
    const kivi_engine_info *info = kivi_engine_info_get(s->engine);
    log_line(s, "info",
             "serving %s: %s, %u tokens of context, %.2f cache bits an element, %u "
             "threads",
             s->o.model_name, info->model_name, info->ctx_tokens, kivi_engine_bits(s->engine),
             info->n_threads);
    atomic_store(&s->loaded, true);
    return EXIT_OK;
}

/* ---- all together ---- */

static int run(server *s, const options *o) {
    kivi_error err = {0};
    keeper k = {.s = s};
    pthread_t thread;
    sigemptyset(&k.signals);
    sigaddset(&k.signals, SIGTERM);
    sigaddset(&k.signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &k.signals, NULL); /* before any thread is made: they inherit it */
    if (!log_start(s)) return out_of_memory("the log");
    if (!http_start(s)) {
        fputs("kivi: error: the HTTP server could not be started (are certificate and key a "
              "pair?)\n",
              stderr);
        return EXIT_IO;
    }
    if (pthread_create(&thread, NULL, keep, &k)) return out_of_memory("a thread");
    say_where(s);
    int code = load(s, o);
    if (!code && kivi_scheduler_run(s->scheduler, &err)) code = fail_with(&err);
    /* What is complete is sent; then nobody uses the scheduler any more. */
    atomic_store(&s->draining, true);
    for (uint64_t end = now_us() + FLUSH_MS * 1000; !http_idle(s) && now_us() < end;) usleep(10000);
    http_stop(s);
    atomic_store(&k.ends, true);
    pthread_join(thread, NULL);
    if (!code) log_line(s, "info", "ended");
    return code;
}

int command_serve(const options *o) {
    server *s = calloc(1, sizeof *s);
    if (!s) return out_of_memory("the server");
    s->created_s = time(NULL);
    pthread_mutex_init(&s->lock, NULL);
    metrics_init(&s->counts);
    int code = read_options(s, o);
    if (!code) fit_descriptors(s);
    if (!code) code = open_listener(s, o);
    if (!code) code = run(s, o);
    log_stop(s);
    model_unload(s);
    keys_deinit(&s->keys);
    metrics_deinit(&s->counts);
    if (s->o.listener >= 0) close(s->o.listener);
    if (s->o.tls_key) explicit_bzero((char *)(uintptr_t)s->o.tls_key, strlen(s->o.tls_key));
    free((char *)(uintptr_t)s->o.tls_key);
    free((char *)(uintptr_t)s->o.tls_cert);
    pthread_mutex_destroy(&s->lock);
    free(s);
    return code;
}
