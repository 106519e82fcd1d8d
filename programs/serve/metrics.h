/* metrics.h: counters and histograms in Prometheus' text form, with vLLM's names and buckets under
 * the prefix kivi:, so that a dashboard made for it needs another prefix only. */
#ifndef SERVE_METRICS_H
#define SERVE_METRICS_H
#include "kivi_serve.h"
#include "text.h"

#include <pthread.h>

/* name, buckets, help */
#define HISTOGRAM_LIST(X)                                                                          \
    X(time_to_first_token_seconds, first_token,                                                    \
      "Seconds from a request's arrival to its first "                                             \
      "token.")                                                                                    \
    X(inter_token_latency_seconds, per_token, "Seconds between two tokens of a choice.")           \
    X(request_time_per_output_token_seconds, per_token,                                            \
      "Mean seconds a token after the first, by request.")                                         \
    X(e2e_request_latency_seconds, latency, "Seconds from a request's arrival to its end.")        \
    X(request_queue_time_seconds, latency, "Seconds a request waited.")                            \
    X(request_prefill_time_seconds, latency, "Seconds from admission to the first token.")         \
    X(request_decode_time_seconds, latency, "Seconds from the first token to the last.")           \
    X(request_inference_time_seconds, latency, "Seconds from admission to the end.")               \
    X(request_prompt_tokens, tokens, "Prompt tokens of a request.")                                \
    X(request_generation_tokens, tokens, "Generated tokens of a request.")                         \
    X(request_max_num_generation_tokens, tokens,                                                   \
      "Generated tokens of a request's longest choice.")                                           \
    X(request_params_n, choices, "The parameter n of a request.")                                  \
    X(request_params_max_tokens, tokens,                                                           \
      "The parameter max_tokens of a request, where it is set.")                                   \
    X(request_num_preemptions, choices, "Preemptions of a request.")                               \
    X(request_prefill_kv_computed_tokens, tokens,                                                  \
      "Prompt tokens evaluated, cached ones left out.")                                            \
    X(iteration_tokens_total, iteration, "Rows of a step.")

typedef enum histogram_name {
#define X(name, buckets, help) HISTOGRAM_##name,
    HISTOGRAM_LIST(X)
#undef X
        N_HISTOGRAMS
} histogram_name;

enum { MAX_BUCKETS = 24 };

typedef struct histogram {
    uint64_t counts[MAX_BUCKETS + 1]; /* the last: above all bounds */
    double sum;
} histogram;

typedef struct metrics {
    pthread_mutex_t lock;
    histogram histograms[N_HISTOGRAMS];
    uint64_t n_success[3];   /* requests by finish: stop, length, abort */
    uint64_t n_rejected;     /* refused because a queue was full */
    uint64_t n_slow_dropped; /* clients that did not read */
    uint64_t n_left;         /* clients that went away */
    uint64_t n_responses[6]; /* HTTP answers by the first digit of their status */
} metrics;

enum { FINISHED_STOP, FINISHED_LENGTH, FINISHED_ABORT };

void metrics_init(metrics *m);
void metrics_deinit(metrics *m);
void metrics_observe(metrics *m, histogram_name name, double value);
void metrics_count(metrics *m, uint64_t *counter);

/* What stands beside histograms; engine and scheduler NULL while the model is loaded. */
typedef struct metrics_context {
    const char *model_name;
    const kivi_engine *engine;
    kivi_scheduler *scheduler;
    uint32_t n_connections;
} metrics_context;
void metrics_write(text *out, metrics *m, const metrics_context *context);

#endif
