/* eval: what a cache kind costs in quality, measured by the same engine that serves.
 *
 *     ppl   perplexity of a text under each kind
 *     kld   also the Kullback-Leibler divergence of each kind's next-token distribution from that
 *           of the same engine with a 16-bit cache, paired: the same rows of the same windows
 *
 * Each file is cut into windows of --ctx tokens that begin --stride tokens apart (--ctx: side by
 * side); positions from --skip on are scored. A window is one observation: neighbouring tokens are
 * not independent, so standard errors are taken over the windows' means. */
#include "commands.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_TEXT_BYTES = 1 << 28, STEP_ROWS = 128, MAX_SCORERS = 64 };

typedef struct window {
    const int32_t *tokens; /* [ctx], inside a text's ids */
} window;

typedef struct text {
    int32_t *ids;
    size_t n_ids;
} text;

typedef struct series { /* one number a scored position, and their sums by window */
    double *values;
    size_t n;
    double sum, sum_means, sum_means2;
} series;

typedef struct measure {
    char kv[32];
    double bits;
    series kld, nll, nll_base;
    size_t n_top1, n_positions, n_windows;
} measure;

typedef struct evaluation {
    const options *o;
    uint32_t ctx, stride, skip;
    bool divergence;
    text texts[MAX_FILES];
    uint32_t n_texts;
    window *windows;
    uint32_t n_windows;
    double started;
} evaluation;

/* ---- text to windows ---- */

static int encode(text *t, const kivi_engine *engine, const char *path) {
    char *bytes = NULL;
    size_t n_bytes;
    kivi_error err = {0};
    int code = read_file(&bytes, &n_bytes, path, MAX_TEXT_BYTES);
    if (code) return code;
    kivi_status s =
        kivi_tokenize(engine, bytes, n_bytes, KIVI_TEXT_ADD_BOS, NULL, 0, &t->n_ids, &err);
    if (!s || (s == KIVI_ARG && t->n_ids)) {
        t->ids = malloc((t->n_ids + 1) * sizeof *t->ids);
        if (t->ids)
            s = kivi_tokenize(engine, bytes, n_bytes, KIVI_TEXT_ADD_BOS, t->ids, t->n_ids,
                              &t->n_ids, &err);
        else code = out_of_memory(path);
    }
    free(bytes);
    if (code) return code;
    return s ? fail_with(&err) : EXIT_OK;
}

static int add_windows(evaluation *e, const text *t, const char *path) {
    size_t n = t->n_ids < e->ctx ? 0 : (t->n_ids - e->ctx) / e->stride + 1;
    if (e->o->chunks && n > e->o->chunks) n = e->o->chunks;
    if (n == 0)
        fprintf(stderr, "kivi: %s: %zu tokens, shorter than --ctx %u: left out\n", path, t->n_ids,
                e->ctx);
    window *more = realloc(e->windows, (e->n_windows + n + 1) * sizeof *more);
    if (!more) return out_of_memory(path);
    e->windows = more;
    for (size_t i = 0; i < n; i++) e->windows[e->n_windows++].tokens = t->ids + i * e->stride;
    return EXIT_OK;
}

static int read_texts(evaluation *e, const kivi_engine *engine) {
    for (uint32_t i = 0; i < e->o->n_files; i++) {
        int code = encode(&e->texts[i], engine, e->o->files[i]);
        if (!code) code = add_windows(e, &e->texts[i], e->o->files[i]);
        if (code) return code;
    }
    if (e->n_windows == 0) return usage_error("no text is as long as --ctx %u", e->ctx);
    return EXIT_OK;
}

/* ---- distributions ---- */

/* best: the index of the largest logit */
static double log_sum_exp(const float *logits, int32_t best, uint32_t n) {
    double top = (double)logits[best], sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += exp((double)logits[i] - top);
    return top + log(sum);
}

/* sum p (log p - log q), nats: p = e^(base - lse of base), q likewise. With w = e^(base - top) it
 * is sum w (base - other) / sum w - lse of base + lse of other: one exponential for both sums. */
static double divergence(double *base_lse, const float *base, int32_t best, const float *other,
                         double other_lse, uint32_t n) {
    double top = (double)base[best], sum = 0, apart = 0;
    for (uint32_t i = 0; i < n; i++) {
        double w = exp((double)base[i] - top);
        sum += w;
        apart += w * ((double)base[i] - (double)other[i]);
    }
    *base_lse = top + log(sum);
    return apart / sum - *base_lse + other_lse;
}

static bool series_init(series *s, size_t n) {
    return (s->values = malloc((n + 1) * sizeof(double)));
}

static void series_add(series *s, double value) {
    s->values[s->n++] = value;
    s->sum += value;
}

static void series_end_window(series *s, size_t first) {
    double sum = 0;
    for (size_t i = first; i < s->n; i++) sum += s->values[i];
    double mean = s->n > first ? sum / (double)(s->n - first) : 0;
    s->sum_means += mean;
    s->sum_means2 += mean * mean;
}

static double series_mean(const series *s) { return s->n ? s->sum / (double)s->n : 0; }

static double series_se(const series *s, size_t n_windows) {
    double n = (double)n_windows, mean = s->sum_means / n;
    if (n_windows < 2) return NAN;
    double variance = (s->sum_means2 - n * mean * mean) / (n - 1);
    return sqrt(variance > 0 ? variance / n : 0);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sorts the values: the last thing done with a series. */
static double series_quantile(series *s, double q) {
    if (s->n == 0) return 0;
    qsort(s->values, s->n, sizeof(double), by_value);
    double at = q * (double)(s->n - 1);
    size_t i = (size_t)at;
    double next = s->values[i + 1 < s->n ? i + 1 : i];
    return s->values[i] + (at - (double)i) * (next - s->values[i]);
}

/* ---- windows ---- */

typedef struct side {
    kivi_engine *engine;
    kivi_session *session;
} side;

static int begin_window(side *s, uint32_t ctx) {
    kivi_error err = {0};
    if (!s->engine) return EXIT_OK;
    if (kivi_session_create(&s->session, s->engine, &err)) return fail_with(&err);
    if (kivi_session_begin_prompt(s->session, ctx, &err)) return fail_with(&err);
    return EXIT_OK;
}

static int step(side *s, const int32_t *tokens, uint32_t n) {
    kivi_error err = {0};
    kivi_step_item item = {.session = s->session, .tokens = tokens, .n_tokens = n};
    if (!s->engine) return EXIT_OK;
    if (kivi_engine_step(s->engine, &item, 1, &err)) return fail_with(&err);
    return item.status ? fail_with(&item.error) : EXIT_OK;
}

/* What one position gives; a row at a time, so the same on any number of threads. */
typedef struct row_score {
    double nll, nll_base, kld;
    bool top1;
} row_score;

typedef struct scoring {
    const side *own, *base;
    const int32_t *next; /* the token after each row */
    uint32_t n_vocab, n_next, from, end, n_threads;
    row_score *scores; /* [STEP_ROWS] */
} scoring;

typedef struct scorer {
    const scoring *job;
    uint32_t index;
} scorer;

static void score_row(row_score *out, const scoring *job, uint32_t r) {
    const float *own = kivi_session_logits(job->own->session, r);
    int32_t own_best = kivi_logits_argmax(own, job->n_vocab);
    double own_lse = log_sum_exp(own, own_best, job->n_vocab), base_lse = 0;
    if (r < job->n_next) out->nll = own_lse - (double)own[job->next[r]];
    if (!job->base->engine) return;
    const float *base = kivi_session_logits(job->base->session, r);
    int32_t base_best = kivi_logits_argmax(base, job->n_vocab);
    out->kld = divergence(&base_lse, base, base_best, own, own_lse, job->n_vocab);
    if (r < job->n_next) out->nll_base = base_lse - (double)base[job->next[r]];
    out->top1 = own_best == base_best;
}

static void *score_rows(void *context) {
    const scorer *s = context;
    for (uint32_t r = s->job->from + s->index; r < s->job->end; r += s->job->n_threads)
        score_row(&s->job->scores[r], s->job, r);
    return NULL;
}

/* Spread over threads of their own, as many as the engine has; a thread that cannot be made leaves
 * its rows to the caller. */
static void score_all(const scoring *job) {
    pthread_t threads[MAX_SCORERS];
    scorer scorers[MAX_SCORERS];
    bool made[MAX_SCORERS];
    for (uint32_t i = 0; i < job->n_threads; i++) {
        scorers[i] = (scorer){job, i};
        made[i] = i && !pthread_create(&threads[i], NULL, score_rows, &scorers[i]);
    }
    for (uint32_t i = 0; i < job->n_threads; i++)
        if (!made[i]) score_rows(&scorers[i]);
    for (uint32_t i = 0; i < job->n_threads; i++)
        if (made[i]) pthread_join(threads[i], NULL);
}

/* Scores rows [from, n) of the step at `at` and adds them up in their order. */
static void score_step(const evaluation *e, measure *m, const side *own, const side *base,
                       const window *w, uint32_t at, uint32_t from, uint32_t n) {
    const kivi_engine_info *info = kivi_engine_info_get(own->engine);
    row_score scores[STEP_ROWS] = {0};
    scoring job = {.own = own, .base = base, .next = w->tokens + at + 1, .n_vocab = info->n_vocab};
    job.n_next = e->ctx - 1 - at;
    job.from = from, job.end = n, job.scores = scores;
    job.n_threads = info->n_threads < MAX_SCORERS ? info->n_threads : MAX_SCORERS;
    score_all(&job);
    for (uint32_t r = from; r < n; r++) {
        m->n_positions++;
        if (r < job.n_next) series_add(&m->nll, scores[r].nll);
        if (!base->engine) continue;
        if (r < job.n_next) series_add(&m->nll_base, scores[r].nll_base);
        series_add(&m->kld, scores[r].kld);
        m->n_top1 += scores[r].top1;
    }
}

static int run_window(const evaluation *e, measure *m, side *own, side *base, const window *w) {
    size_t first[3] = {m->kld.n, m->nll.n, m->nll_base.n};
    int code = begin_window(own, e->ctx);
    if (!code) code = begin_window(base, e->ctx);
    for (uint32_t at = 0; !code && at < e->ctx; at += STEP_ROWS) {
        uint32_t n = e->ctx - at < STEP_ROWS ? e->ctx - at : STEP_ROWS;
        code = step(own, w->tokens + at, n);
        if (!code) code = step(base, w->tokens + at, n);
        uint32_t from = at < e->skip ? e->skip - at : 0;
        if (!code && from < n) score_step(e, m, own, base, w, at, from, n);
    }
    kivi_session_destroy(&own->session);
    kivi_session_destroy(&base->session);
    series_end_window(&m->kld, first[0]);
    series_end_window(&m->nll, first[1]);
    series_end_window(&m->nll_base, first[2]);
    m->n_windows++;
    return code;
}

static void progress(const evaluation *e, const char *kv, uint32_t kind, uint32_t n_kinds,
                     uint32_t w) {
    double done = (double)kind * e->n_windows + w, all = (double)n_kinds * e->n_windows;
    if (!isatty(STDERR_FILENO)) return;
    double left = done > 0 ? (now_seconds() - e->started) * (all - done) / done : 0;
    fprintf(stderr, "\r%s: window %u of %u, %.0f s left\033[K", kv, w + 1, e->n_windows, left);
    if (done + 1 >= all) fputs("\r\033[K", stderr);
    fflush(stderr);
}

static void shape_engine(kivi_engine_options *eo, void *user) {
    const evaluation *e = user;
    eo->all_logits = true;
    eo->step_rows = STEP_ROWS;
    eo->ctx_tokens = e->ctx;
    if (!e->o->rule) eo->kv.rule = KIVI_RULE_STREAM; /* the paper's rule would hide the error */
}

/* One engine a side; the base has the 16-bit cache. */
static int run_kind(evaluation *e, measure *m, uint32_t kind, uint32_t n_kinds) {
    side own = {0}, base = {0};
    options plain = options_without_kind(e->o);
    size_t n = (size_t)e->n_windows * (e->ctx - e->skip);
    int code = open_engine(&own.engine, e->o, m->kv, shape_engine, e);
    if (!code && e->divergence) code = open_engine(&base.engine, &plain, "f16", shape_engine, e);
    if (!code &&
        !(series_init(&m->kld, n) && series_init(&m->nll, n) && series_init(&m->nll_base, n)))
        code = out_of_memory("the scores");
    if (!code) m->bits = kivi_engine_bits(own.engine);
    for (uint32_t w = 0; !code && w < e->n_windows; w++) {
        progress(e, m->kv, kind, n_kinds, w);
        code = run_window(e, m, &own, &base, &e->windows[w]);
    }
    kivi_engine_destroy(&own.engine);
    kivi_engine_destroy(&base.engine);
    return code;
}

/* ---- results ---- */

/* JSON has no NaN and no infinity: null. */
static void print_real(const char *key, int n_digits, double value) {
    if (isfinite(value)) printf("\"%s\": %.*g", key, n_digits, value);
    else printf("\"%s\": null", key);
}

static void print_divergence(measure *m) {
    printf(", \"kld\": {");
    print_real("mean", 6, series_mean(&m->kld));
    printf(", "), print_real("se", 4, series_se(&m->kld, m->n_windows));
    printf(", "), print_real("median", 6, series_quantile(&m->kld, 0.5));
    printf(", "), print_real("p99", 6, series_quantile(&m->kld, 0.99));
    printf("}, \"top1\": %.5f", (double)m->n_top1 / (double)m->n_positions);
}

static void print_json(measure *m, uint32_t n, bool with_divergence) {
    printf("[");
    for (uint32_t i = 0; i < n; i++) {
        double nll = series_mean(&m[i].nll), base = series_mean(&m[i].nll_base);
        printf("%s\n {\"kv\": \"%s\", \"bits\": %.4g", i ? "," : "", m[i].kv, m[i].bits);
        if (with_divergence) print_divergence(&m[i]);
        printf(", "), print_real("ppl", 6, exp(nll));
        printf(", "), print_real("ppl_se", 4, exp(nll) * series_se(&m[i].nll, m[i].n_windows));
        if (with_divergence) {
            printf(", "), print_real("ppl_base", 6, exp(base));
            printf(", "), print_real("ppl_ratio", 6, exp(nll - base));
        }
        printf(", \"tokens\": %zu, \"windows\": %zu}", m[i].n_positions, m[i].n_windows);
    }
    puts("\n]");
}

/* A standard error, if it is known. */
static void print_se(int n_places, double se) {
    if (isfinite(se)) printf(" +- %.*f", n_places, se);
}

static void print_table(measure *m, uint32_t n, bool with_divergence) {
    printf("| kv | bits |%s PPL | tokens |\n|---|---|%s---|---|\n",
           with_divergence ? " KLD, nats | median | 99% | top-1 agrees | PPL ratio |" : "",
           with_divergence ? "---|---|---|---|---|" : "");
    for (uint32_t i = 0; i < n; i++) {
        double ppl = exp(series_mean(&m[i].nll)), se = series_se(&m[i].nll, m[i].n_windows);
        printf("| %s | %.2f |", m[i].kv, m[i].bits);
        if (with_divergence) {
            printf(" %.4f", series_mean(&m[i].kld));
            print_se(4, series_se(&m[i].kld, m[i].n_windows));
            printf(" | %.4f | %.4f | %.4f | %.4f |", series_quantile(&m[i].kld, 0.5),
                   series_quantile(&m[i].kld, 0.99), (double)m[i].n_top1 / (double)m[i].n_positions,
                   exp(series_mean(&m[i].nll) - series_mean(&m[i].nll_base)));
        }
        printf(" %.3f", ppl);
        print_se(3, ppl * se);
        printf(" | %zu |\n", m[i].n_positions);
    }
}

/* All kinds of the list, before hours go into the first. */
static int read_kinds(const evaluation *e, measure *m, uint32_t *n) {
    char kv[sizeof m->kv];
    kivi_kv_options kind;
    for (*n = 0; options_list_item(kv, sizeof kv, options_kind(e->o), *n); ++*n) {
        if (*n == MAX_LIST) return usage_error("--kv: more than %d cache kinds", MAX_LIST);
        int code = options_kv(&kind, e->o, kv);
        if (code) return code;
        memcpy(m[*n].kv, kv, sizeof kv);
    }
    return EXIT_OK;
}

static int run_all(evaluation *e, measure *m, uint32_t *n) {
    uint32_t n_kinds = 0;
    kivi_engine *engine = NULL; /* its vocabulary cuts the texts once */
    int code = read_kinds(e, m, &n_kinds);
    if (!code) code = open_engine(&engine, e->o, m[0].kv, shape_engine, e);
    if (!code) code = read_texts(e, engine);
    kivi_engine_destroy(&engine);
    e->started = now_seconds();
    for (*n = 0; !code && *n < n_kinds; ++*n) code = run_kind(e, &m[*n], *n, n_kinds);
    return code;
}

int command_eval(const options *o) {
    evaluation e = {.o = o, .ctx = o->ctx ? o->ctx : 1024, .skip = o->skip_given ? o->skip : 128};
    measure m[MAX_LIST] = {0};
    uint32_t n = 0;
    if (!o->what || (strcmp(o->what, "ppl") && strcmp(o->what, "kld")))
        return usage_error("eval: '%s', expected ppl or kld", o->what ? o->what : "");
    if (!o->n_files) return usage_error("eval needs -f FILE, once or more");
    e.stride = o->stride ? o->stride : e.ctx;
    if (e.skip + 1 >= e.ctx) /* the last position's next token is outside */
        return usage_error("--skip %u leaves no token to score of --ctx %u", e.skip, e.ctx);
    if (e.stride > e.ctx)
        return usage_error("--stride %u would leave out text between windows of --ctx %u", e.stride,
                           e.ctx);
    if (o->format && strcmp(o->format, "json") && strcmp(o->format, "md"))
        return usage_error("-o: '%s', expected md or json", o->format);
    e.divergence = !strcmp(o->what, "kld");
    int code = run_all(&e, m, &n);
    if (!code)
        (o->format && !strcmp(o->format, "json") ? print_json : print_table)(m, n, e.divergence);
    for (uint32_t i = 0; i < MAX_LIST; i++)
        free(m[i].kld.values), free(m[i].nll.values), free(m[i].nll_base.values);
    for (uint32_t i = 0; i < o->n_files; i++) free(e.texts[i].ids);
    free(e.windows);
    return code;
}
