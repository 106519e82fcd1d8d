/* run: generates text from a prompt. Text goes to standard output, everything else to standard
 * error. */
#include "commands.h"

#include "kivi_text.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_PROMPT_BYTES = 1 << 28 };

static volatile sig_atomic_t interrupted; /* Ctrl-C: stop after this token */

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

typedef struct generation {
    const options *o;
    kivi_engine *engine;
    kivi_session *session;
    kivi_sampler *sampler;
    int32_t *prompt;
    size_t n_prompt, n_fed; /* n_fed < n_prompt: interrupted in the prompt */
    uint32_t n_generated;
    double prompt_seconds, gen_seconds;
    kivi_error err;
} generation;

static int read_prompt(char **text, size_t *n_bytes, const options *o) {
    if (o->prompt && o->file) return usage_error("-p and -f: give one of them");
    if (!o->prompt) return read_file(text, n_bytes, o->file ? o->file : "-", MAX_PROMPT_BYTES);
    *n_bytes = strlen(o->prompt);
    *text = malloc(*n_bytes + 1);
    if (!*text) return out_of_memory("the prompt");
    memcpy(*text, o->prompt, *n_bytes + 1);
    return EXIT_OK;
}

/* The prompt is the caller's own text, so special tokens in it are meant. */
static int tokenize(generation *g, const char *text, size_t n_bytes) {
    unsigned flags = KIVI_TEXT_ADD_BOS | KIVI_TEXT_SPECIAL;
    g->err = (kivi_error){0};
    kivi_status status =
        kivi_tokenize(g->engine, text, n_bytes, flags, NULL, 0, &g->n_prompt, &g->err);
    if (status && !(status == KIVI_ARG && g->n_prompt)) return fail_with(&g->err);
    if (g->n_prompt == 0) return usage_error("the prompt is empty");
    g->prompt = malloc(g->n_prompt * sizeof *g->prompt);
    if (!g->prompt) return out_of_memory("the prompt");
    if (kivi_tokenize(g->engine, text, n_bytes, flags, g->prompt, g->n_prompt, &g->n_prompt,
                      &g->err))
        return fail_with(&g->err);
    return EXIT_OK;
}

static void progress(size_t done, size_t all, double seconds) {
    if (!isatty(STDERR_FILENO)) return;
    if (done == all) fputs("\r\033[K", stderr);
    else
        fprintf(stderr, "\rprompt %zu/%zu tokens, %.0f tokens/s\033[K", done, all,
                (double)done / (seconds + 1e-9));
    fflush(stderr);
}

static int feed_prompt(generation *g) {
    double start = now_seconds();
    uint32_t chunk = kivi_engine_info_get(g->engine)->step_rows;
    if (kivi_session_begin_prompt(g->session, g->n_prompt, &g->err)) return fail_with(&g->err);
    for (size_t done = 0; done < g->n_prompt && !interrupted;) {
        size_t n = g->n_prompt - done < chunk ? g->n_prompt - done : chunk;
        kivi_step_item item = {
            .session = g->session, .tokens = g->prompt + done, .n_tokens = (uint32_t)n};
        progress(done, g->n_prompt, now_seconds() - start);
        if (kivi_engine_step(g->engine, &item, 1, &g->err)) return fail_with(&g->err);
        if (item.status) return fail_with(&item.error);
        done += n;
        g->n_fed = done;
    }
    progress(g->n_prompt, g->n_prompt, 0);
    g->prompt_seconds = now_seconds() - start;
    return EXIT_OK;
}

/* Whole characters only; false when the reader is gone or the disk is full. */
static bool put_text(kivi_utf8 *utf8, const char *bytes, size_t n_bytes) {
    char text[3 * (256 + 4)];
    size_t n = kivi_utf8_push(utf8, bytes, n_bytes, text);
    return fwrite(text, 1, n, stdout) == n && !fflush(stdout);
}

static int write_failed(void) {
    fprintf(stderr, "kivi: error: standard output: %s\n", strerror(errno));
    return EXIT_IO;
}

static int generate(generation *g) {
    const kivi_engine_info *info = kivi_engine_info_get(g->engine);
    const kivi_vocab *vocab = kivi_engine_vocab(g->engine);
    kivi_utf8 utf8 = {0};
    double start = now_seconds();
    while (g->n_generated < g->o->n_predict && !interrupted) {
        int32_t id;
        char piece[256];
        if (kivi_sampler_next(&id, g->sampler, g->session, &g->err)) return fail_with(&g->err);
        if (vocab && kivi_vocab_is_end(vocab, id) && !g->o->ignore_eos) break;
        size_t n = kivi_token_is_control(g->engine, id)
                       ? 0
                       : kivi_token_bytes(g->engine, id, piece, sizeof piece);
        if (n && !put_text(&utf8, piece, n)) return write_failed();
        g->n_generated++;
        if (kivi_session_length(g->session) == info->ctx_tokens) break; /* the context is full */
        if (kivi_session_decode(g->session, id, &g->err)) return fail_with(&g->err);
    }
    g->gen_seconds = now_seconds() - start;
    return put_text(&utf8, NULL, 0) && fputc('\n', stdout) != EOF && !fflush(stdout)
               ? EXIT_OK
               : write_failed();
}

static double rate(double n, double seconds) { return seconds > 0 ? n / seconds : 0; }

static void print_stats_text(const generation *g, const kivi_memory *memory) {
    kivi_memory columns[2] = {*memory};
    const char *names[2] = {options_kind(g->o), "f16"};
    kivi_kv_options f16 = {.k_bits = 16, .v_bits = 16};
    const kivi_engine_info *i = kivi_engine_info_get(g->engine);
    double bits[2] = {kivi_engine_bits(g->engine)};
    fprintf(stderr, "\nprompt     %6zu tokens %9.1f tokens/s\n", g->n_fed,
            rate((double)g->n_fed, g->prompt_seconds));
    fprintf(stderr, "generation %6u tokens %9.1f tokens/s    %s, %u threads, %s\n\n",
            g->n_generated, rate(g->n_generated, g->gen_seconds), i->model_name, i->n_threads,
            i->isa);
    uint32_t n =
        kivi_engine_plan(&columns[1], &bits[1], g->engine, &f16, i->ctx_tokens, NULL) ? 1 : 2;
    print_memory_table(stderr, columns, names, n);
    fprintf(stderr,
            "  for a context of %u tokens; the cache takes %.2f bits an element, f16 takes 16\n",
            i->ctx_tokens, bits[0]);
}

static void print_stats_json(const generation *g, const kivi_memory *memory) {
    fprintf(stderr,
            "{\"prompt_tokens\": %zu, \"prompt_tps\": %.2f, \"gen_tokens\": %u, \"gen_tps\": %.2f, "
            "\"bytes\": ",
            g->n_fed, rate((double)g->n_fed, g->prompt_seconds), g->n_generated,
            rate(g->n_generated, g->gen_seconds));
    print_memory_json(stderr, memory);
    fprintf(stderr, ", \"peak_rss_bytes\": %llu}\n", (unsigned long long)peak_rss_bytes());
}

static void print_stats(const generation *g) {
    const char *form = g->o->stats ? g->o->stats : "text";
    kivi_memory memory = kivi_engine_memory(g->engine);
    if (!strcmp(form, "text")) print_stats_text(g, &memory);
    if (!strcmp(form, "json")) print_stats_json(g, &memory);
}

static int prepare(generation *g) {
    kivi_sampler_options so = sampler_options(g->o);
    if (kivi_session_create(&g->session, g->engine, &g->err)) return fail_with(&g->err);
    if (kivi_sampler_create(&g->sampler, g->engine, &so, &g->err)) return fail_with(&g->err);
    return EXIT_OK;
}

int command_run(const options *o) {
    generation g = {.o = o};
    char *text = NULL;
    size_t n_bytes = 0;
    struct sigaction action = {.sa_handler = on_interrupt,
                               /* A second one kills; a write that waits for its reader goes on. */
                               .sa_flags = (int)SA_RESETHAND | SA_RESTART};
    int code = read_prompt(&text, &n_bytes, o);
    if (!code) code = open_engine(&g.engine, o, options_kind(o), NULL, NULL);
    if (!code) code = tokenize(&g, text, n_bytes);
    if (!code) code = prepare(&g);
    sigaction(SIGINT, &action, NULL);
    if (!code) code = feed_prompt(&g);
    if (!code && !interrupted) code = generate(&g);
    if (!code) print_stats(&g);
    kivi_sampler_destroy(&g.sampler);
    kivi_session_destroy(&g.session);
    kivi_engine_destroy(&g.engine);
    free(g.prompt);
    free(text);
    return code;
}
