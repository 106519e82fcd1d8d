#include "server.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

static void put_time(text *t) {
    struct timespec now;
    struct tm parts;
    char day[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &parts);
    strftime(day, sizeof day, "%Y-%m-%dT%H:%M:%S", &parts);
    text_printf(t, "%s.%03ldZ", day, now.tv_nsec / 1000000);
}

/* One write a line, so that lines of several threads do not mix. */
static void put_line(text *t) {
    text_puts(t, "\n");
    if (!t->failed) fwrite(t->data, 1, t->n_bytes, stderr);
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
    put_line(&t);
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
    put_line(&t);
}
