#include "metrics.h"

#include <stdio.h>
#include <string.h>

static const double first_token[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                     1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
static const double per_token[] = {.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                                   .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
static const double latency[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double tokens[] = {1,    2,    5,    10,    20,    50,    100,    200,   500,
                                1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
static const double choices[] = {1, 2, 5, 10, 20, 50, 100};
static const double iteration[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};

static const struct {
    const char *name, *help;
    const double *bounds;
    size_t n;
} infos[N_HISTOGRAMS] = {
#define X(name, buckets, help) {#name, help, buckets, sizeof buckets / sizeof *buckets},
    HISTOGRAM_LIST(X)
#undef X
};

void metrics_init(metrics *m) {
    *m = (metrics){0};
    pthread_mutex_init(&m->lock, NULL);
}

void metrics_deinit(metrics *m) { pthread_mutex_destroy(&m->lock); }

void metrics_observe(metrics *m, histogram_name name, double value) {
    size_t i = 0;
    while (i < infos[name].n && value > infos[name].bounds[i]) i++;
    pthread_mutex_lock(&m->lock);
    m->histograms[name].counts[i]++;
    m->histograms[name].sum += value;
    pthread_mutex_unlock(&m->lock);
}

void metrics_count(metrics *m, uint64_t *counter) {
    pthread_mutex_lock(&m->lock);
    ++*counter;
    pthread_mutex_unlock(&m->lock);
}

/* ---- text ---- */

static void head(text *out, const char *name, const char *type, const char *help) {
    text_printf(out, "# HELP kivi:%s %s\n# TYPE kivi:%s %s\n", name, help, name, type);
}

/* A label's value: backslash, quote and line end are escaped. */
static void label_value(text *out, const char *value) {
    for (; *value; value++)
        if (*value == '\n') text_puts(out, "\\n");
        else if (*value == '"' || *value == '\\') text_printf(out, "\\%c", *value);
        else text_put(out, value, 1);
}

static void sample(text *out, const char *name, const metrics_context *c, const char *label,
                   const char *label_text, double value) {
    text_printf(out, "kivi:%s{model_name=\"", name);
    label_value(out, c->model_name);
    text_puts(out, "\",engine=\"0\"");
    if (label) text_printf(out, ",%s=\"%s\"", label, label_text);
    text_printf(out, "} %.17g\n", value);
}

static void gauge(text *out, const char *name, const metrics_context *c, double value,
                  const char *help) {
    head(out, name, "gauge", help);
    sample(out, name, c, NULL, NULL, value);
}

static void counter(text *out, const char *name, const metrics_context *c, double value,
                    const char *help) {
    head(out, name, "counter", help);
    sample(out, name, c, NULL, NULL, value);
}

static void write_histogram(text *out, const metrics *m, histogram_name which,
                            const metrics_context *c) {
    const histogram *h = &m->histograms[which];
    const char *name = infos[which].name;
    uint64_t sum = 0;
    char part[96], bound[32];
    head(out, name, "histogram", infos[which].help);
    snprintf(part, sizeof part, "%s_bucket", name);
    for (size_t i = 0; i <= infos[which].n; i++) {
        sum += h->counts[i];
        if (i < infos[which].n) snprintf(bound, sizeof bound, "%g", infos[which].bounds[i]);
        else strcpy(bound, "+Inf");
        sample(out, part, c, "le", bound, (double)sum);
    }
    snprintf(part, sizeof part, "%s_sum", name);
    sample(out, part, c, NULL, NULL, h->sum);
    snprintf(part, sizeof part, "%s_count", name);
    sample(out, part, c, NULL, NULL, (double)sum);
}

static void write_memory(text *out, const metrics_context *c) {
    kivi_memory memory = kivi_engine_memory(c->engine);
    uint64_t n_nonfinite, n_saturated;
    head(out, "memory_bytes", "gauge", "Bytes held now, by kind.");
#define X(tag) sample(out, "memory_bytes", c, "kind", #tag, (double)memory.tag);
    KIVI_TAG_LIST(X)
#undef X
    kivi_engine_counters(c->engine, &n_nonfinite, &n_saturated);
    counter(out, "corrupted_requests_total", c, (double)n_nonfinite,
            "Rows whose keys or values were not finite.");
    counter(out, "kv_saturated_values_total", c, (double)n_saturated,
            "Scales and zeros that left float16.");
    gauge(out, "kv_bytes_per_element", c, kivi_engine_bits(c->engine) / 8,
          "Allocated bytes of a cached element, scales and zeros counted.");
}

/* As vLLM's: always 1, the labels say how the cache is made. Its names where there is one (blocks
 * are pages, on any device), then our own. */
static void write_config(text *out, const metrics_context *c, const kivi_scheduler_stats *s) {
    static const char *const rules[] = {"paper", "stream", "span"};
    const kivi_engine_info *info = kivi_engine_info_get(c->engine);
    const kivi_kv_options *kv = &info->kv;
    head(out, "cache_config_info", "gauge", "How the cache is made; always 1.");
    text_puts(out, "kivi:cache_config_info{model_name=\"");
    label_value(out, c->model_name);
    text_printf(out,
                "\",engine=\"0\",block_size=\"%u\",num_gpu_blocks=\"%u\","
                "kv_cache_size_tokens=\"%llu\",kv_cache_memory_bytes=\"%llu\","
                "cache_dtype=\"k%uv%u\",enable_prefix_caching=\"%s\"",
                s->page_tokens, s->n_pages, (unsigned long long)s->n_pages * s->page_tokens,
                (unsigned long long)s->n_pages * s->page_bytes, kv->k_bits, kv->v_bits,
                s->prefix_bytes_limit ? "True" : "False");
    text_printf(out,
                ",group=\"%u\",residual_tokens=\"%u\",sink_tokens=\"%u\",rule=\"%s\","
                "max_model_len=\"%u\",device=\"",
                kv->group, kv->residual_tokens, kv->sink_tokens, rules[kv->rule], info->ctx_tokens);
    label_value(out, info->device);
    text_puts(out, "\"} 1\n");
}

static void write_queue(text *out, const metrics_context *c, const kivi_scheduler_stats *s) {
    gauge(out, "num_requests_running", c, s->n_running, "Requests begun and not ended.");
    gauge(out, "num_requests_waiting", c, s->n_waiting, "Requests not yet begun.");
    /* vLLM's two reasons, whose sum is the number above. What is deferred waits for something else
     * than room (a grammar, keys from elsewhere): nothing here does. */
    static const char by_reason[] = "num_requests_waiting_by_reason";
    head(out, by_reason, "gauge", "Requests not yet begun, by reason.");
    sample(out, by_reason, c, "reason", "capacity", s->n_waiting);
    sample(out, by_reason, c, "reason", "deferred", 0);
    gauge(out, "num_requests_paused", c, s->n_paused, "Requests whose reader is slow.");
    gauge(out, "num_sequences_running", c, s->n_sequences, "Sequences that hold pages.");
    gauge(out, "num_sequences_preempted", c, s->n_preempted,
          "Sequences that gave their pages up and wait.");
    gauge(out, "num_waiting_tokens", c, (double)s->waiting_tokens,
          "Tokens of prompts not yet begun.");
    gauge(out, "kv_cache_usage_perc", c,
          s->n_pages ? (double)(s->pages_used - s->pages_cached) / s->n_pages : 0,
          "Share of the pages that sequences hold, 0 to 1.");
    head(out, "kv_pages", "gauge", "Pages of the cache, by state.");
    sample(out, "kv_pages", c, "state", "free", s->pages_free);
    sample(out, "kv_pages", c, "state", "used", s->pages_used);
    sample(out, "kv_pages", c, "state", "shared", s->pages_shared);
    sample(out, "kv_pages", c, "state", "cached", s->pages_cached);
    gauge(out, "kv_page_bytes", c, (double)s->page_bytes, "Bytes of a page, all layers.");
    gauge(out, "kv_page_tokens", c, s->page_tokens, "Tokens of a page.");
    gauge(out, "prompt_exact_bytes", c, (double)s->exact_bytes,
          "16-bit rows of prompts being evaluated.");
    gauge(out, "prefix_cache_bytes", c, (double)s->prefix_bytes, "16-bit rows kept for prefixes.");
}

static void write_totals(text *out, const metrics_context *c, const kivi_scheduler_stats *s) {
    counter(out, "prompt_tokens_total", c, (double)s->prompt_tokens, "Prompt tokens admitted.");
    counter(out, "prompt_tokens_cached_total", c, (double)s->prefix_hits,
            "Prompt tokens found in the prefix cache.");
    head(out, "prompt_tokens_by_source_total", "counter",
         "Prompt tokens admitted, by where their keys and values come from.");
    sample(out, "prompt_tokens_by_source_total", c, "source", "local_compute",
           (double)(s->prompt_tokens - s->prefix_hits));
    sample(out, "prompt_tokens_by_source_total", c, "source", "local_cache_hit",
           (double)s->prefix_hits);
    counter(out, "generation_tokens_total", c, (double)s->generated_tokens, "Tokens generated.");
    counter(out, "recomputed_tokens_total", c, (double)s->recomputed_tokens,
            "Rows evaluated again after preemption.");
    counter(out, "num_preemptions_total", c, (double)s->n_preemptions, "Preemptions.");
    counter(out, "prefix_cache_queries_total", c, (double)s->prefix_queries,
            "Tokens looked up in the prefix cache.");
    counter(out, "prefix_cache_hits_total", c, (double)s->prefix_hits,
            "Tokens found in the prefix cache.");
    counter(out, "prefix_cache_evictions_total", c, (double)s->n_evictions, "Prefixes given up.");
    counter(out, "engine_steps_total", c, (double)s->n_steps, "Steps.");
    counter(out, "engine_step_seconds_total", c, (double)s->step_us * 1e-6,
            "Seconds in the engine.");
}

void metrics_write(text *out, metrics *m, const metrics_context *c) {
    static const char *const finishes[] = {"stop", "length", "abort"};
    static const char *const classes[] = {"", "1xx", "2xx", "3xx", "4xx", "5xx"};
    pthread_mutex_lock(&m->lock);
    metrics copy = *m;
    pthread_mutex_unlock(&m->lock);
    if (c->scheduler) {
        kivi_scheduler_stats stats;
        kivi_scheduler_stats_get(&stats, c->scheduler);
        write_config(out, c, &stats);
        write_queue(out, c, &stats);
        write_totals(out, c, &stats);
        write_memory(out, c);
    }
    head(out, "request_success_total", "counter", "Requests that ended, by reason.");
    for (int i = 0; i < 3; i++)
        sample(out, "request_success_total", c, "finished_reason", finishes[i],
               (double)copy.n_success[i]);
    counter(out, "admission_rejections_total", c, (double)copy.n_rejected,
            "Requests refused because the queue was full.");
    counter(out, "clients_left_total", c, (double)copy.n_left,
            "Clients that went away before their answer was complete.");
    counter(out, "slow_clients_dropped_total", c, (double)copy.n_slow_dropped,
            "Clients dropped because they did not read.");
    head(out, "http_responses_total", "counter", "HTTP answers by class of status.");
    for (int i = 2; i < 6; i++)
        sample(out, "http_responses_total", c, "status", classes[i], (double)copy.n_responses[i]);
    gauge(out, "http_connections", c, c->n_connections, "Open connections.");
    for (histogram_name i = 0; i < N_HISTOGRAMS; i++) write_histogram(out, &copy, i, c);
}
