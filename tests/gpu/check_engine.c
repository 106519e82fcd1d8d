/* check_engine.c: the CUDA engine through kivi.h: batches, forks, steps back, files, and memory
 * that runs out. One line a case, `ok NAME` or `not ok NAME: why`; `skip` without a GPU.
 *
 * usage: check_engine FOLDER_OF_GOLDEN_FILES FOLDER_TO_WRITE_IN */
#include "engine.h"
#include "kivi_cache.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int n_failed;
static kivi_error err;
static char model_path[1024], file_path[1024];

enum { CTX = 512, N_PROMPT = 200, N_MORE = 60, N_BEHIND = 40, MAX_SESSIONS = 8 };

#define FAIL(...) return snprintf(why, sizeof why, __VA_ARGS__), false
#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != KIVI_OK) FAIL("%s: %s", #call, err.text);                                    \
    } while (0)

static char why[1024];

static kivi_engine_options options_of(const char *device) {
    kivi_engine_options o = kivi_engine_defaults();
    o.model_path = model_path;
    o.device = device;
    if (strcmp(device, "cpu")) o.compute_type = "f32"; /* a CUDA device's option */
    o.ctx_tokens = CTX;
    o.max_sessions = MAX_SESSIONS;
    o.kv.residual_tokens = 32;
    o.n_threads = 2;
    return o;
}

static int32_t token_at(uint32_t sequence, uint32_t pos) {
    return (int32_t)((sequence * 7919u + pos * 104729u + pos * pos * 31u) % 288u);
}

static void tokens_of(int32_t *out, uint32_t sequence, uint32_t from, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) out[i] = token_at(sequence, from + i);
}

/* What a session says now. */
typedef struct said {
    float logits[512];
    uint32_t n;
} said;

static bool listen(said *out, const kivi_engine *e, const kivi_session *s) {
    const float *logits = kivi_session_logits(s, 0);
    out->n = kivi_engine_info_get(e)->n_vocab;
    if (!logits) FAIL("no logits");
    memcpy(out->logits, logits, out->n * sizeof *logits);
    return true;
}

/* Two orders of a sum give other last bits, and now and then a code that falls to the other side of
 * a rounding. Of these small random models, whose logits spread over 8 (unrelated ones are 9 apart
 * on average), quantizing moves the logits by 2.5 on average (llama-gqa/cases.json,
 * mean_abs_diff_to_f16): a few codes of many by less than FLIPS = 0.4 of that, the share that
 * py_cuda.py allows. LAST_BITS: where no code was made in between. */
static const double FLIPS = 1.0, LAST_BITS = 0.25;

/* Mean |difference|; the largest of a case is said beside its name. */
static double furthest;
static double apart(const said *a, const said *b) {
    double sum = 0;
    for (uint32_t i = 0; i < a->n; i++) sum += fabs((double)a->logits[i] - (double)b->logits[i]);
    furthest = fmax(furthest, sum / a->n);
    return sum / a->n;
}

static bool is_same(const said *a, const said *b) {
    return a->n == b->n && !memcmp(a->logits, b->logits, a->n * sizeof *a->logits);
}

/* A prompt and more tokens one by one. */
static bool play(kivi_session *s, uint32_t sequence, uint32_t n_more) {
    int32_t prompt[N_PROMPT];
    tokens_of(prompt, sequence, 0, N_PROMPT);
    MUST(kivi_session_prompt(s, prompt, N_PROMPT, &err));
    for (uint32_t i = 0; i < n_more; i++)
        MUST(kivi_session_decode(s, token_at(sequence, N_PROMPT + i), &err));
    return true;
}

/* ---- cases ---- */

static bool batch(kivi_engine *e) {
    kivi_session *s[MAX_SESSIONS] = {NULL};
    kivi_step_item items[MAX_SESSIONS];
    int32_t next[MAX_SESSIONS];
    static said first[MAX_SESSIONS], again, alone;
    for (int round = 0; round < 2; round++) {
        for (uint32_t i = 0; i < MAX_SESSIONS; i++) {
            MUST(kivi_session_create(&s[i], e, &err));
            if (!play(s[i], i, 0)) return false;
        }
        for (uint32_t t = 0; t < N_MORE; t++) {
            uint32_t n = t % 3 ? MAX_SESSIONS : 5; /* not a power of two: idle slots */
            for (uint32_t i = 0; i < n; i++) {
                next[i] = token_at(i, kivi_session_length(s[i]));
                items[i] = (kivi_step_item){.session = s[i], .tokens = &next[i], .n_tokens = 1};
            }
            MUST(kivi_engine_step(e, items, n, &err));
            for (uint32_t i = 0; i < n; i++)
                if (items[i].status) FAIL("item %u: %s", i, items[i].error.text);
        }
        for (uint32_t i = 0; i < 5; i++) {
            if (!listen(round ? &again : &first[i], e, s[i])) return false;
            if (round && !is_same(&again, &first[i])) FAIL("sequence %u is not repeated", i);
        }
        for (uint32_t i = 0; i < MAX_SESSIONS; i++) kivi_session_destroy(&s[i]);
    }
    for (uint32_t i = 0; i < 5; i++) {
        MUST(kivi_session_create(&s[0], e, &err));
        if (!play(s[0], i, N_MORE) || !listen(&alone, e, s[0])) return false;
        /* other kernels for its products, another split */
        if (!(apart(&alone, &first[i]) < FLIPS))
            FAIL("sequence %u: %g", i, apart(&alone, &first[i]));
        kivi_session_destroy(&s[0]);
    }
    return true;
}

/* A row of one session in a step of its own or beside another's prompt, then more tokens, which
 * read the codes that the step made: of the value that left the window, and of keys where their
 * line moves (behind 224 tokens where R is 32; a + page's last row is 255). */
static bool mixed(kivi_engine *e) {
    static const uint32_t more[] = {3, 23, 24, 55};
    static said x[N_BEHIND + 1], y[N_BEHIND + 1];
    for (size_t k = 0; k < sizeof more / sizeof *more; k++) {
        uint32_t n = N_PROMPT + more[k];
        for (int round = 0; round < 2; round++) {
            kivi_session *a = NULL, *b = NULL;
            said *out = round ? y : x;
            int32_t prompt[N_PROMPT], one = token_at(1, n);
            MUST(kivi_session_create(&a, e, &err));
            MUST(kivi_session_create(&b, e, &err));
            if (!play(a, 1, more[k])) return false;
            tokens_of(prompt, 2, 0, N_PROMPT);
            MUST(kivi_session_begin_prompt(b, N_PROMPT, &err));
            kivi_step_item items[2] = {{.session = a, .tokens = &one, .n_tokens = 1},
                                       {.session = b, .tokens = prompt, .n_tokens = N_PROMPT}};
            MUST(kivi_engine_step(e, items, round ? 1 : 2, &err));
            if (!listen(&out[0], e, a)) return false;
            if (round) MUST(kivi_engine_step(e, items + 1, 1, &err));
            if (items[0].status || items[1].status) FAIL("%s", items[0].error.text);
            for (uint32_t i = 0; i < N_BEHIND; i++) {
                MUST(kivi_session_decode(a, token_at(1, n + 1 + i), &err));
                if (!listen(&out[i + 1], e, a)) return false;
            }
            kivi_session_destroy(&a);
            kivi_session_destroy(&b);
        }
        double now = apart(&x[0], &y[0]), sum = 0;
        for (uint32_t i = 0; i < N_BEHIND; i++) sum += apart(&x[i + 1], &y[i + 1]);
        if (!(now < LAST_BITS && sum / N_BEHIND < FLIPS))
            FAIL("behind %u tokens: %g, and later %g", n, now, sum / N_BEHIND);
    }
    return true;
}

/* What the log says of a prompt's attention. */
static char attention[400];
static void keep_line(void *user, const char *line) {
    (void)user;
    if (strstr(line, "attention of prompts")) snprintf(attention, sizeof attention, "%s", line);
}

enum { LONG_PROMPTS = 2, LONG_ROWS = 3000 };
static const uint32_t long_rows[LONG_PROMPTS] = {1100, 1203};

/* Of a session that decodes and two whole prompts, which this is, n from the first on are in one
 * step; and some tokens more. */
static bool play_long(said out[][2], kivi_engine *e, uint32_t first, uint32_t n) {
    static int32_t prompts[LONG_PROMPTS + 1][LONG_ROWS];
    kivi_session *s[LONG_PROMPTS + 1] = {NULL};
    kivi_step_item items[LONG_PROMPTS + 1];
    for (uint32_t i = 0; i < n; i++) {
        uint32_t who = first + i, n_rows = who ? long_rows[who - 1] : 1;
        MUST(kivi_session_create(&s[i], e, &err));
        if (!who && !play(s[i], 0, 0)) return false;
        tokens_of(prompts[i], who, who ? 0 : N_PROMPT, n_rows);
        if (who) MUST(kivi_session_begin_prompt(s[i], n_rows, &err));
        items[i] = (kivi_step_item){.session = s[i], .tokens = prompts[i], .n_tokens = n_rows};
    }
    MUST(kivi_engine_step(e, items, n, &err));
    for (uint32_t i = 0; i < n; i++) {
        if (items[i].status) FAIL("item %u: %s", i, items[i].error.text);
        if (!listen(&out[i][0], e, s[i])) return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t t = 0; t < 3; t++)
            MUST(kivi_session_decode(s[i], token_at(first + i, kivi_session_length(s[i])), &err));
        if (!listen(&out[i][1], e, s[i])) return false;
        kivi_session_destroy(&s[i]);
    }
    return true;
}

static kivi_engine_options long_options(const char *compute) {
    kivi_engine_options o = options_of("cuda");
    o.compute_type = compute;
    o.ctx_tokens = 2048, o.step_rows = LONG_ROWS, o.max_sessions = LONG_PROMPTS + 1;
    o.log = keep_line;
    attention[0] = 0;
    return o;
}

/* cuDNN's attention of whole prompts and our own: behind a prompt what differs is a float16's last
 * bits, behind generated tokens now and then a code, too. */
static bool whole_prompts(const char *compute) {
    static said with[LONG_PROMPTS + 1][2], without[LONG_PROMPTS + 1][2];
    kivi_engine *e = NULL;
    kivi_engine_options o = long_options(compute);
    MUST(kivi_engine_create(&e, &o, &err));
    if (!play_long(with, e, 0, LONG_PROMPTS + 1)) return false;
    kivi_engine_destroy(&e);
    o.disable = "cudnn", o.log = NULL;
    MUST(kivi_engine_create(&e, &o, &err));
    if (!play_long(without, e, 0, LONG_PROMPTS + 1)) return false;
    kivi_engine_destroy(&e);
    for (uint32_t i = 0; i <= LONG_PROMPTS; i++) {
        double now = apart(&with[i][0], &without[i][0]), then = apart(&with[i][1], &without[i][1]);
        if (!(now < LAST_BITS && then < FLIPS)) FAIL("session %u: %g, and later %g", i, now, then);
    }
    return true;
}

static bool fork_and_rewind(kivi_engine *e) {
    kivi_session *s = NULL, *f = NULL;
    static said x, y, z;
    MUST(kivi_session_create(&s, e, &err));
    if (!play(s, 3, N_MORE)) return false;
    MUST(kivi_session_fork(&f, s, &err));
    MUST(kivi_session_decode(s, 5, &err));
    if (!listen(&x, e, s)) return false;
    MUST(kivi_session_decode(f, 9, &err)); /* its own page and window: the other does not notice */
    MUST(kivi_session_decode(f, 11, &err));
    MUST(kivi_session_rewind(f, N_PROMPT + N_MORE, &err));
    MUST(kivi_session_decode(f, 5, &err));
    if (!listen(&y, e, f)) return false;
    if (!is_same(&x, &y)) FAIL("a fork that went back: %g", apart(&x, &y));
    /* behind the ring: evaluated again, ten tokens in one step, which other kernels do */
    MUST(kivi_session_rewind(s, N_PROMPT + 10, &err));
    for (uint32_t i = 10; i < N_MORE; i++)
        MUST(kivi_session_decode(s, token_at(3, N_PROMPT + i), &err));
    MUST(kivi_session_decode(s, 5, &err));
    if (!listen(&z, e, s)) return false;
    if (!(apart(&x, &z) < FLIPS)) FAIL("a replay: %g", apart(&x, &z));
    kivi_session_destroy(&s);
    kivi_session_destroy(&f);
    return true;
}

/* Saved here, loaded there, and on: as if it had never left, exactly or, on average over the tokens
 * behind the file, within FLIPS. */
static bool files(kivi_engine *from, kivi_engine *to, bool exact) {
    kivi_session *s = NULL, *l = NULL;
    static said x, y;
    MUST(kivi_session_create(&s, from, &err));
    if (!play(s, 4, N_MORE)) return false;
    MUST(kivi_session_save(s, file_path, &err));
    MUST(kivi_session_load(&l, to, file_path, &err));
    double sum = 0;
    for (uint32_t i = 0; i < N_BEHIND; i++) {
        int32_t next = token_at(4, N_PROMPT + N_MORE + i);
        MUST(kivi_session_decode(s, next, &err));
        if (!listen(&x, from, s)) return false;
        MUST(kivi_session_decode(l, next, &err));
        if (!listen(&y, to, l)) return false;
        sum += apart(&x, &y);
        if (exact && !is_same(&x, &y)) FAIL("token %u behind the file: %g", i, apart(&x, &y));
    }
    if (!(sum / N_BEHIND < FLIPS)) FAIL("behind the file: %g", sum / N_BEHIND);
    kivi_session_destroy(&s);
    kivi_session_destroy(&l);
    return true;
}

/* ---- tokens drawn on the device ---- */

/* The token that a CPU draws from a session's logits, as src/engine/sample.c does. */
static int32_t draw_here(const kivi_sampler_options *o, const said *x, const int32_t *history,
                         uint32_t n_history, uint64_t n_drawn) {
    static ki_candidate all[512];
    static float logits[512];
    ki_draw_edit edits[64];
    uint32_t n = KI_MIN(n_history, o->repeat_tokens), n_edits = 0;
    for (uint32_t i = n_history - n; i < n_history && o->repeat_penalty != 1; i++) {
        bool seen = false;
        for (uint32_t j = 0; j < n_edits; j++) seen = seen || edits[j].id == history[i];
        if (!seen) edits[n_edits++] = (ki_draw_edit){.id = history[i], .what = KI_EDIT_REPEATED};
    }
    ki_draw d = {.temperature = o->temperature,
                 .top_p = o->top_p,
                 .min_x = ki_draw_min_x(o->min_p),
                 .top_k = o->top_k,
                 .repetition = o->repeat_penalty,
                 .n_edits = n_edits,
                 .edits = edits,
                 .u = ki_sample_draw(o->seed, n_drawn)};
    memcpy(logits, x->logits, x->n * sizeof *logits);
    ki_draw_edit_logits(logits, &d);
    return ki_sample(all, logits, x->n, &d);
}

static bool draws(kivi_engine *e) {
    static const kivi_sampler_options settings[] = {{0.8f, 40, 0.95f, 0.05f, 1.1f, 64, 7},
                                                    {1.5f, 0, 1, 0, 1, 0, 8},
                                                    {1, 0, 0.7f, 0, 1.3f, 64, 9},
                                                    {0.3f, 5, 1, 0.2f, 1, 0, 10},
                                                    {0, 0, 1, 0, 1.4f, 64, 11},
                                                    {0, 0, 1, 0, 1, 0, 12}};
    static said x, again;
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        const kivi_sampler_options *o = &settings[i];
        kivi_session *s = NULL;
        kivi_sampler *sampler = NULL;
        int32_t history[CTX], id;
        MUST(kivi_session_create(&s, e, &err));
        MUST(kivi_sampler_create(&sampler, e, o, &err));
        tokens_of(history, (uint32_t)i, 0, 40);
        MUST(kivi_session_prompt(s, history, 40, &err));
        for (uint32_t n = 40; n < 140; n++) {
            if (n % 2 && !listen(&x, e, s)) return false; /* before the draw, or after it */
            MUST(kivi_sampler_next(&id, sampler, s, &err));
            if (!listen(&again, e, s)) return false;
            if (n % 2 && !is_same(&x, &again)) FAIL("setting %zu: a draw changed the logits", i);
            int32_t want = draw_here(o, &again, history, n, o->temperature > 0 ? n - 40 : 0);
            if (id != want) FAIL("setting %zu, token %u: %d, the CPU's %d", i, n - 40, id, want);
            history[n] = id;
            MUST(kivi_session_decode(s, id, &err));
        }
        kivi_sampler_destroy(&sampler);
        kivi_session_destroy(&s);
    }
    return true;
}

/* ---- the batch-invariant mode ---- */

enum { N_DECODED = 24, N_SECOND = 30, MOST = 32 };

/* Decodes beside n others; what is said at each step is kept, or compared. Others come and go at
 * other places in the batch, and one of them feeds a prompt at two of the steps. */
static bool among(kivi_engine *e, uint32_t n, said *kept, bool compare) {
    kivi_session *s[MOST] = {NULL};
    kivi_step_item items[MOST];
    int32_t prompts[2][N_PROMPT], next[MOST], second[N_SECOND];
    static said now;
    for (uint32_t i = 0; i <= n; i++) MUST(kivi_session_create(&s[i], e, &err));
    for (uint32_t i = 1; i < n; i++)
        if (!play(s[i], i, i % 3)) return false;
    for (uint32_t i = 0; i < 2; i++) tokens_of(prompts[i], i ? n : 0, 0, N_PROMPT);
    MUST(kivi_session_begin_prompt(s[0], N_PROMPT, &err));
    if (n) MUST(kivi_session_begin_prompt(s[n], N_PROMPT, &err));
    items[n ? 1 : 0] =
        (kivi_step_item){.session = s[0], .tokens = prompts[0], .n_tokens = N_PROMPT};
    if (n) items[0] = (kivi_step_item){.session = s[n], .tokens = prompts[1], .n_tokens = N_PROMPT};
    MUST(kivi_engine_step(e, items, n ? 2 : 1, &err));
    for (uint32_t t = 0; t <= N_DECODED; t++) {
        if (!listen(&now, e, s[0])) return false;
        if (!compare) kept[t] = now;
        else if (!is_same(&now, &kept[t]))
            FAIL("%u neighbours, step %u: %g", n, t, apart(&now, &kept[t]));
        if (t == N_DECODED) break;
        uint32_t n_now = t % 4 == 3 ? n / 2 : n, mine = t % (n_now + 1);
        for (uint32_t i = 0; i <= n_now; i++) {
            uint32_t who = i == mine ? 0 : i < mine ? i + 1 : i;
            next[i] = token_at(who, kivi_session_length(s[who]));
            items[i] = (kivi_step_item){.session = s[who], .tokens = &next[i], .n_tokens = 1};
            if (who == 0 || who != n_now || t % 12 != 5) continue;
            tokens_of(second, who, t, N_SECOND);
            MUST(kivi_session_begin_prompt(s[who], N_SECOND, &err));
            items[i].tokens = second, items[i].n_tokens = N_SECOND;
        }
        MUST(kivi_engine_step(e, items, n_now + 1, &err));
        for (uint32_t i = 0; i <= n_now; i++)
            if (items[i].status) FAIL("item %u: %s", i, items[i].error.text);
    }
    for (uint32_t i = 0; i <= n; i++) kivi_session_destroy(&s[i]);
    return true;
}

static bool invariant(const char *compute, uint32_t max_sessions, const char *kind) {
    static const uint32_t counts[] = {1, 3, 7, 31};
    static said kept[N_DECODED + 1];
    kivi_engine *e = NULL;
    kivi_engine_options o = options_of("cuda");
    o.compute_type = compute;
    o.batch_invariant = true;
    o.max_sessions = max_sessions;
    if (kind) MUST(kivi_kv_by_name(&o.kv, kind, &err));
    if (kind) o.kv.residual_tokens = 0;
    MUST(kivi_engine_create(&e, &o, &err));
    if (!among(e, 0, kept, false) || !among(e, 0, kept, true)) return false;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (!among(e, counts[i], kept, true)) return false;
    kivi_engine_destroy(&e);
    return true;
}

/* Whole prompts, by cuDNN where it is, in one step with each other and a session that decodes. */
static bool invariant_prompts(const char *compute) {
    static said alone[LONG_PROMPTS + 1][2], among_them[LONG_PROMPTS + 1][2];
    kivi_engine *e = NULL;
    kivi_engine_options o = long_options(compute);
    o.batch_invariant = true;
    MUST(kivi_engine_create(&e, &o, &err));
    if (!play_long(among_them, e, 0, LONG_PROMPTS + 1)) return false;
    for (uint32_t i = 0; i <= LONG_PROMPTS; i++)
        if (!play_long(&alone[i], e, i, 1)) return false;
    kivi_engine_destroy(&e);
    for (uint32_t i = 0; i <= LONG_PROMPTS; i++)
        for (uint32_t t = 0; t < 2; t++)
            if (!is_same(&alone[i][t], &among_them[i][t]))
                FAIL("session %u, %u: %g", i, t, apart(&alone[i][t], &among_them[i][t]));
    return true;
}

static bool failing_allocations(void) {
    uint32_t n_failures = 0;
    for (uint64_t n = 1; n < 4000; n++) {
        kivi_engine *e = NULL;
        kivi_session *s = NULL;
        kivi_engine_options o = options_of("cuda");
        int32_t prompt[40];
        o.max_sessions = 2;
        o.fail_after = n;
        tokens_of(prompt, 0, 0, 40);
        kivi_status status = kivi_engine_create(&e, &o, &err);
        if (status == KIVI_OK) status = kivi_session_create(&s, e, &err);
        if (status == KIVI_OK) status = kivi_session_prompt(s, prompt, 40, &err);
        if (status == KIVI_OK) status = kivi_session_decode(s, 1, &err);
        kivi_session_destroy(&s);
        kivi_engine_destroy(&e);
        if (status == KIVI_OK) {
            if (n_failures < 30) FAIL("only %u allocations failed", n_failures);
            return true;
        }
        if (status != KIVI_NOMEM) FAIL("allocation %llu: %s", (unsigned long long)n, err.text);
        n_failures++;
        n += n > 40 ? 6 : 0; /* each creates a context's worth of work: all early ones, then some */
    }
    FAIL("it never succeeds");
}

/* Room for one session's window more than is planned for is not there; the engine goes on. */
static bool out_of_memory(void) {
    kivi_engine *e = NULL;
    kivi_session *s[64] = {NULL};
    kivi_engine_options o = options_of("cuda");
    o.max_sessions = 2;
    MUST(kivi_engine_create(&e, &o, &err));
    kivi_memory m = kivi_engine_device_memory(e);
    uint64_t sum = ki_memory_sum(&m);
    kivi_engine_destroy(&e);
    o.gpu_memory_bytes = sum / 2;
    if (kivi_engine_create(&e, &o, &err) != KIVI_NOMEM) FAIL("half of the memory is enough");
    o.gpu_memory_bytes = sum + (600 << 10);
    MUST(kivi_engine_create(&e, &o, &err));
    uint32_t n = 0;
    kivi_status status = KIVI_OK;
    while (n < 64 && (status = kivi_session_create(&s[n], e, &err)) == KIVI_OK) n++;
    if (status != KIVI_NOMEM || n < 2) FAIL("%u sessions: %s", n, err.text);
    if (!play(s[0], 1, 20) || !play(s[1], 2, 20)) return false;
    for (uint32_t i = 0; i < n; i++) kivi_session_destroy(&s[i]);
    MUST(kivi_session_create(&s[0], e, &err));
    if (!play(s[0], 1, 5)) return false;
    kivi_session_destroy(&s[0]);
    kivi_engine_destroy(&e);
    return true;
}

static bool counts(kivi_engine *e) {
    kivi_memory before = kivi_engine_device_memory(e);
    kivi_session *s = NULL;
    MUST(kivi_session_create(&s, e, &err));
    if (!play(s, 1, 1)) return false;
    kivi_memory during = kivi_engine_device_memory(e);
    for (uint32_t i = 0; i < 100; i++) MUST(kivi_session_decode(s, 3, &err));
    kivi_memory after = kivi_engine_device_memory(e);
    if (memcmp(&during, &after, sizeof after)) FAIL("steps of decoding took memory");
    if (after.kv_residual <= before.kv_residual) FAIL("a window is not counted");
    kivi_session_destroy(&s);
    after = kivi_engine_device_memory(e);
    if (memcmp(&before, &after, sizeof after)) FAIL("a session's memory is not given back");
    return true;
}

/* What was planned before anything was taken is what is there, by tag and to the byte, when all
 * sessions are and prompts are fed to them in several steps. */
static bool planned(kivi_rule rule, const char *disable) {
    enum { ROWS = 64 };
    static int32_t prompt[CTX];
    kivi_engine *e = NULL;
    kivi_session *s[2] = {NULL};
    kivi_engine_options o = options_of("cuda");
    o.max_sessions = 2, o.step_rows = ROWS, o.disable = disable;
    o.kv.rule = rule, o.kv.span_tokens = rule == KIVI_RULE_SPAN ? 128 : 0;
    MUST(kivi_engine_create(&e, &o, &err));
    kivi_memory want = e->planned, got = kivi_engine_device_memory(e);
    uint64_t rows = want.kv_residual;
    want.kv_residual = 0;
    if (memcmp(&want, &got, sizeof got))
        FAIL("rule %d: %llu bytes of workspace, %llu of activations, planned %llu, %llu", (int)rule,
             (unsigned long long)got.workspace, (unsigned long long)got.activations,
             (unsigned long long)want.workspace, (unsigned long long)want.activations);
    for (int i = 0; i < 2; i++) MUST(kivi_session_create(&s[i], e, &err));
    tokens_of(prompt, 1, 0, CTX);
    int n = rule == KIVI_RULE_PAPER ? 1 : 2; /* prompts at once */
    for (int i = 0; i < n; i++) MUST(kivi_session_begin_prompt(s[i], CTX, &err));
    uint64_t most = 0;
    for (uint32_t k = 0; k < CTX / ROWS * (uint32_t)n; k++) {
        kivi_step_item item = {.session = s[k % (uint32_t)n],
                               .tokens = prompt + k / (uint32_t)n * ROWS,
                               .n_tokens = ROWS};
        MUST(kivi_engine_step(e, &item, 1, &err));
        MUST(item.status);
        got = kivi_engine_device_memory(e);
        most = KI_MAX(most, got.kv_residual);
        want.kv_residual = got.kv_residual;
        if (memcmp(&want, &got, sizeof got))
            FAIL("rule %d: a prompt took more than rows", (int)rule);
    }
    if (most != rows)
        FAIL("rule %d: %llu bytes of rows, planned %llu", (int)rule, (unsigned long long)most,
             (unsigned long long)rows);
    for (int i = 0; i < 2; i++) kivi_session_destroy(&s[i]);
    kivi_engine_destroy(&e);
    return true;
}

static void report(const char *family, const char *name, bool ok) {
    if (!ok) printf("not ok %s/%s: %s\n", family, name, why);
    else if (furthest > 0) printf("ok %s/%s # %.2g apart\n", family, name, furthest);
    else printf("ok %s/%s\n", family, name);
    furthest = 0;
    fflush(stdout);
    n_failed += !ok;
}

/* Nothing is compared where cuDNN has no part in it: no cuDNN, or the plain kernels' head sizes. */
static void report_whole(const char *family, const char *name, bool ok) {
    if (ok && !strstr(attention, "prompts: cuDNN"))
        printf("skip %s/%s: %s\n", family, name, *attention ? attention : "not for this head size");
    else report(family, name, ok);
}

static kivi_engine *open_engine(const char *device) {
    kivi_engine *e = NULL;
    kivi_engine_options o = options_of(device);
    return kivi_engine_create(&e, &o, &err) == KIVI_OK ? e : NULL;
}

/* Forks, steps back and files of the kinds with planes of their own: a page is closed and another
 * begun by the prompt's 200 rows, and the second one closes among the rows behind it. */
static bool plus_kinds(const char *family) {
    static const char *const kinds[] = {"kivi2+", "k4v2+", "k4v3+"};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        kivi_engine *e[2] = {NULL};
        char name[64];
        for (int cpu = 0; cpu < 2; cpu++) {
            kivi_engine_options o = options_of(cpu ? "cpu" : "cuda");
            o.kv.residual_tokens = 0;
            MUST(kivi_kv_by_name(&o.kv, kinds[i], &err));
            kivi_status status = kivi_engine_create(&e[cpu], &o, &err);
            if (status != KIVI_OK) FAIL("%s", err.text);
        }
        snprintf(name, sizeof name, "%s/mixed", kinds[i]);
        report(family, name, mixed(e[0]));
        snprintf(name, sizeof name, "%s/fork-and-rewind", kinds[i]);
        report(family, name, fork_and_rewind(e[0]));
        snprintf(name, sizeof name, "%s/file-to-cuda", kinds[i]);
        report(family, name, files(e[0], e[0], true));
        snprintf(name, sizeof name, "%s/file-to-cpu", kinds[i]);
        report(family, name, files(e[0], e[1], false));
        snprintf(name, sizeof name, "%s/file-from-cpu", kinds[i]);
        report(family, name, files(e[1], e[0], false));
        kivi_engine_destroy(&e[0]);
        kivi_engine_destroy(&e[1]);
    }
    return true;
}

int main(int argc, char **argv) {
    static const char *const families[] = {"llama-gqa", "mistral-swa", "gemma3"};
    if (argc != 3) return 2;
    snprintf(file_path, sizeof file_path, "%s/session", argv[2]);
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        snprintf(model_path, sizeof model_path, "%s/%s", argv[1], families[i]);
        kivi_engine *gpu = open_engine("cuda"), *cpu = open_engine("cpu");
        if (!gpu) {
            printf("%s cuda: %s\n", err.status == KIVI_DEVICE ? "skip" : "not ok", err.text);
            kivi_engine_destroy(&cpu);
            return err.status != KIVI_DEVICE;
        }
        const char *f = families[i];
        report(f, "batch", batch(gpu));
        report(f, "mixed", mixed(gpu));
        report(f, "fork-and-rewind", fork_and_rewind(gpu));
        report(f, "file-to-cuda", files(gpu, gpu, true));
        report(f, "file-to-cpu", files(gpu, cpu, false));
        report(f, "file-from-cpu", files(cpu, gpu, false));
        report(f, "counts", counts(gpu));
        report(f, "draws", draws(gpu));
        kivi_engine_destroy(&gpu);
        kivi_engine_destroy(&cpu);
        report_whole(f, "whole-prompts-f16", whole_prompts("f16"));
        report_whole(f, "whole-prompts-bf16", whole_prompts("bf16"));
        report(f, "plus-kinds", plus_kinds(f));
        report(f, "invariant/f16", invariant("f16", MOST, NULL));
        report(f, "invariant/whole-prompts-f16", invariant_prompts("f16"));
        report(f, "invariant/whole-prompts-bf16", invariant_prompts("bf16"));
    }
    snprintf(model_path, sizeof model_path, "%s/llama-gqa", argv[1]);
    report("invariant", "bf16", invariant("bf16", MOST, NULL));
    report("invariant", "f32", invariant("f32", MOST, NULL));
    report("invariant", "f16-100-sessions", invariant("f16", 100, NULL));
    report("invariant", "kivi2+", invariant("f16", MOST, "kivi2+"));
    report("invariant", "f16-cache", invariant("f16", MOST, "f16"));
    report("memory", "planned-paper", planned(KIVI_RULE_PAPER, NULL));
    report("memory", "planned-stream", planned(KIVI_RULE_STREAM, NULL));
    report("memory", "planned-span", planned(KIVI_RULE_SPAN, NULL));
    report("memory", "planned-plain", planned(KIVI_RULE_STREAM, "fused"));
    report("memory", "runs-out", out_of_memory());
    report("memory", "failing-allocations", failing_allocations());
    return n_failed != 0;
}
