/* chat: a conversation. All that was said stays in the cache; of each turn only what is new is
 * evaluated: the end of the last answer, the user's words, and the beginning of the next one. */
#include "commands.h"

#include "kivi_text.h"

#include <errno.h>
#include <histedit.h>
#include <langinfo.h>
#include <locale.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_LINE_BYTES = 1 << 24, HISTORY_LINES = 500, ANSWER_TOKENS = 1024, FEED_ROWS = 128 };

static volatile sig_atomic_t interrupted; /* Ctrl-C: the answer ends, or the line being typed */

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

/* A write that waits for its reader goes on after Ctrl-C, or the program would end for it; while a
 * line is waited for, Ctrl-C is not to be missed. */
static void hear_interrupts(bool restarts) {
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = restarts ? SA_RESTART : 0};
    sigaction(SIGINT, &action, NULL);
}

typedef struct chat {
    const options *o;
    kivi_engine *engine;
    kivi_session *session;
    kivi_sampler *sampler;
    const kivi_vocab *vocab;
    const char *format;
    /* Lines: from an editor on a terminal, else as they come. */
    bool is_terminal;
    EditLine *editor;
    History *history;
    char *line; /* of getline */
    size_t line_room;
    uint64_t n_prompt, n_answer; /* tokens since the beginning */
    double prompt_seconds, answer_seconds;
    kivi_error err;
} chat;

/* ---- lines ---- */

static char *prompt_text(EditLine *editor) {
    (void)editor;
    static char text[] = "> ";
    return text;
}

/* The editor drops what is no character of the locale, which without one is all but ASCII. */
static void take_locale(void) {
    setlocale(LC_CTYPE, "");
    if (MB_CUR_MAX == 1 && !strcmp(nl_langinfo(CODESET), "ANSI_X3.4-1968"))
        setlocale(LC_CTYPE, "C.UTF-8");
}

static int open_editor(chat *c) {
    HistEvent event;
    take_locale();
    c->editor = el_init("kivi", stdin, stderr, stderr);
    c->history = history_init();
    if (!c->editor || !c->history) return EXIT_MEMORY;
    history(c->history, &event, H_SETSIZE, HISTORY_LINES);
    history(c->history, &event, H_SETUNIQUE, 1);
    el_set(c->editor, EL_PROMPT, prompt_text);
    el_set(c->editor, EL_EDITOR, "emacs");
    el_set(c->editor, EL_HIST, history, c->history);
    el_set(c->editor, EL_BIND, "^R", "em-inc-search-prev", NULL);
    /* While a line is typed Ctrl-C is a key, which throws the line away. */
    el_set(c->editor, EL_SETTY, "-d", "intr=", NULL);
    el_set(c->editor, EL_BIND, "^C", "em-kill-line", NULL);
    el_source(c->editor, NULL);
    return EXIT_OK;
}

/* The next line without its end; NULL: there is none. */
static const char *next_line(chat *c, size_t *n_bytes) {
    HistEvent event;
    int n = 0;
    if (!c->is_terminal) {
        ssize_t got = getline(&c->line, &c->line_room, stdin);
        if (got < 0 || got > MAX_LINE_BYTES) return NULL;
        *n_bytes = (size_t)got;
        while (*n_bytes && (c->line[*n_bytes - 1] == '\n' || c->line[*n_bytes - 1] == '\r'))
            --*n_bytes;
        c->line[*n_bytes] = 0;
        return c->line;
    }
    const char *text = el_gets(c->editor, &n);
    if (!text || n <= 0) return NULL;
    *n_bytes = (size_t)n - (text[n - 1] == '\n');
    if (*n_bytes) history(c->history, &event, H_ENTER, text);
    return text;
}

static const char *read_line(chat *c, size_t *n_bytes) {
    hear_interrupts(c->is_terminal); /* there it is a key */
    const char *line = next_line(c, n_bytes);
    hear_interrupts(true);
    return line;
}

/* ---- a turn ---- */

/* What is said now, as ids. After the first turn the words before do not matter: the format alone
 * says how an answer ends. */
static int tokenize_turn(chat *c, int32_t **ids, size_t *n_ids, const char *text, size_t n_bytes) {
    kivi_message messages[3] = {{"user", "", 0}, {"assistant", "", 0}, {"user", text, n_bytes}};
    size_t n_messages = 3, first = 0;
    unsigned flags = KIVI_CHAT_ANSWER | KIVI_CHAT_CONTINUE;
    if (kivi_session_length(c->session) == 0) {
        const char *system = c->o->system;
        flags = KIVI_CHAT_ANSWER;
        first = system ? 1 : 2;
        if (system) messages[1] = (kivi_message){"system", system, strlen(system)};
    }
    const kivi_message *from = messages + first;
    n_messages -= first;
    kivi_status status =
        kivi_chat_tokenize(c->vocab, c->format, from, n_messages, flags, NULL, 0, n_ids, &c->err);
    if (status && !(status == KIVI_ARG && *n_ids)) return fail_with(&c->err);
    *ids = malloc(*n_ids * sizeof **ids);
    if (!*ids) return EXIT_MEMORY;
    if (kivi_chat_tokenize(c->vocab, c->format, from, n_messages, flags, *ids, *n_ids, n_ids,
                           &c->err))
        return fail_with(&c->err);
    return EXIT_OK;
}

static bool put_text(kivi_utf8 *utf8, const char *bytes, size_t n_bytes) {
    char text[3 * (256 + 4)];
    size_t n = kivi_utf8_push(utf8, bytes, n_bytes, text);
    return fwrite(text, 1, n, stdout) == n && !fflush(stdout);
}

/* The answer, up to its end, the limit, Ctrl-C or a full context. */
static int answer(chat *c) {
    uint32_t most = c->o->n_predict_given ? c->o->n_predict : ANSWER_TOKENS;
    uint32_t ctx = kivi_engine_info_get(c->engine)->ctx_tokens;
    kivi_utf8 utf8 = {0};
    double start = now_seconds();
    bool written = true;
    for (uint32_t i = 0; i < most && !interrupted && written; i++) {
        int32_t id;
        char piece[256];
        if (kivi_sampler_next(&id, c->sampler, c->session, &c->err)) return fail_with(&c->err);
        if (kivi_vocab_is_end(c->vocab, id)) break;
        if (!kivi_vocab_is_control(c->vocab, id))
            written = put_text(&utf8, piece, kivi_vocab_bytes(c->vocab, id, piece, sizeof piece));
        if (kivi_session_length(c->session) == ctx) {
            fputs("\nkivi: the context is full; /reset begins anew\n", stderr);
            break;
        }
        if (kivi_session_decode(c->session, id, &c->err)) return fail_with(&c->err);
        c->n_answer++;
    }
    c->answer_seconds += now_seconds() - start;
    written = written && put_text(&utf8, NULL, 0) && putchar('\n') != EOF && !fflush(stdout);
    return written ? EXIT_OK : EXIT_IO;
}

/* In steps short enough that Ctrl-C is heard soon; how a prompt is cut changes nothing. */
static int feed_steps(chat *c, const int32_t *ids, size_t n_ids) {
    uint32_t rows = kivi_engine_info_get(c->engine)->step_rows;
    if (rows > FEED_ROWS && !c->o->prompt_chunk) rows = FEED_ROWS;
    if (kivi_session_begin_prompt(c->session, n_ids, &c->err)) return fail_with(&c->err);
    for (size_t done = 0; done < n_ids && !interrupted;) {
        size_t n = n_ids - done < rows ? n_ids - done : rows;
        kivi_step_item item = {
            .session = c->session, .tokens = ids + done, .n_tokens = (uint32_t)n};
        if (kivi_engine_step(c->engine, &item, 1, &c->err)) return fail_with(&c->err);
        if (item.status) return fail_with(&item.error);
        done += n;
    }
    return EXIT_OK;
}

/* Feeds the turn. When that fails, or Ctrl-C stops it, the conversation is what it was before. */
static int feed(chat *c, const int32_t *ids, size_t n_ids) {
    uint32_t before = kivi_session_length(c->session);
    double start = now_seconds();
    int code = feed_steps(c, ids, n_ids);
    c->n_prompt += kivi_session_length(c->session) - before;
    c->prompt_seconds += now_seconds() - start;
    if (!code && kivi_session_length(c->session) == before + n_ids) return EXIT_OK;
    if (kivi_session_abandon_prompt(c->session, &c->err)) return fail_with(&c->err);
    if (!code) fputs("kivi: interrupted; the conversation is as it was before this turn\n", stderr);
    return code;
}

/* A turn that fails (it may not fit the context) leaves the conversation as it was. */
static int say(chat *c, const char *text, size_t n_bytes) {
    int32_t *ids = NULL;
    size_t n_ids = 0;
    interrupted = 0;
    int code = tokenize_turn(c, &ids, &n_ids, text, n_bytes);
    if (!code) code = feed(c, ids, n_ids);
    free(ids);
    if (code || interrupted) return code;
    return answer(c) == EXIT_IO ? EXIT_IO : EXIT_OK;
}

/* ---- commands ---- */

static const char help_text[] =
    "/save FILE   keep the conversation, with its cache\n"
    "/load FILE   go on with a saved one\n"
    "/reset       begin anew\n"
    "/stats       tokens, speed and memory\n"
    "/help        this\n"
    "/quit        end; so does Ctrl-D. Ctrl-C ends an answer, or stops a turn\n";

static int reset(chat *c) {
    kivi_session *fresh = NULL;
    kivi_session_destroy(&c->session); /* first: its pages are needed */
    if (kivi_session_create(&fresh, c->engine, &c->err)) return fail_with(&c->err);
    c->session = fresh;
    return EXIT_OK;
}

/* Looked at first, for the conversation so far has to go before there is room for another. */
static int load(chat *c, const char *path) {
    kivi_session *loaded = NULL;
    if (kivi_session_check(c->engine, path, &c->err)) return fail_with(&c->err);
    kivi_session_destroy(&c->session);
    if (kivi_session_load(&loaded, c->engine, path, &c->err)) {
        int code = fail_with(&c->err), again = reset(c);
        return again ? again : code;
    }
    c->session = loaded;
    fprintf(stderr, "kivi: %u tokens loaded from %s\n", kivi_session_length(c->session), path);
    return EXIT_OK;
}

static void save(chat *c, const char *path) {
    if (kivi_session_save(c->session, path, &c->err)) fail_with(&c->err);
    else fprintf(stderr, "kivi: %u tokens saved in %s\n", kivi_session_length(c->session), path);
}

static double rate(uint64_t n, double seconds) { return seconds > 0 ? (double)n / seconds : 0; }

static void print_stats(const chat *c) {
    kivi_memory memory = kivi_engine_memory(c->engine);
    const char *name = options_kind(c->o);
    fprintf(stderr, "%u of %u tokens, format %s\n", kivi_session_length(c->session),
            kivi_engine_info_get(c->engine)->ctx_tokens, c->format);
    fprintf(stderr, "prompts %8llu tokens %9.1f tokens/s\nanswers %8llu tokens %9.1f tokens/s\n",
            (unsigned long long)c->n_prompt, rate(c->n_prompt, c->prompt_seconds),
            (unsigned long long)c->n_answer, rate(c->n_answer, c->answer_seconds));
    print_memory_table(stderr, &memory, &name, 1);
}

/* A word of a command and what follows it; false: another word. */
static bool is_command(const char *line, const char *word, const char **rest) {
    size_t n = strlen(word);
    if (strncmp(line, word, n) || (line[n] && line[n] != ' ')) return false;
    *rest = line + n + strspn(line + n, " ");
    return true;
}

/* *quit is set by /quit. A command that fails says so and changes nothing, if it can. */
static int do_command(chat *c, const char *line, bool *quit) {
    const char *rest = "";
    if (is_command(line, "/quit", &rest) || is_command(line, "/exit", &rest)) *quit = true;
    else if (is_command(line, "/help", &rest)) fputs(help_text, stderr);
    else if (is_command(line, "/stats", &rest)) print_stats(c);
    else if (is_command(line, "/reset", &rest)) return reset(c);
    else if (is_command(line, "/save", &rest) && *rest) save(c, rest);
    else if (is_command(line, "/load", &rest) && *rest) {
        load(c, rest);
        return c->session ? EXIT_OK : EXIT_MEMORY;
    } else fprintf(stderr, "kivi: '%s': /help lists commands\n", line);
    return EXIT_OK;
}

static int converse(chat *c) {
    bool quit = false;
    int code = EXIT_OK;
    while (!quit) {
        size_t n_bytes = 0;
        const char *line = read_line(c, &n_bytes);
        if (!line) break;
        if (n_bytes == 0) continue;
        if (line[0] != '/') {
            int status = say(c, line, n_bytes);
            if (status == EXIT_IO) return status;
            if (!c->is_terminal && status) code = status; /* a script is told */
            continue;
        }
        char *copy = strndup(line, n_bytes);
        if (!copy) return EXIT_MEMORY;
        int status = do_command(c, copy, &quit);
        free(copy);
        if (status) return status;
    }
    if (c->is_terminal) fputs("\n", stderr);
    return code;
}

/* ---- the door ---- */

static int prepare(chat *c) {
    kivi_sampler_options so = sampler_options(c->o);
    int32_t none;
    size_t n = 0;
    kivi_message probe = {"user", "", 0};
    c->vocab = kivi_engine_vocab(c->engine);
    if (!c->vocab) {
        fputs("kivi: error: chat needs the model's vocabulary, and it is not known\n", stderr);
        return EXIT_MODEL;
    }
    c->format = c->o->chat_template ? c->o->chat_template : kivi_chat_detect(c->vocab);
    kivi_status status =
        kivi_chat_tokenize(c->vocab, c->format, &probe, 1, 0, &none, 0, &n, &c->err);
    if (status && !n) return fail_with(&c->err);
    if (kivi_session_create(&c->session, c->engine, &c->err)) return fail_with(&c->err);
    if (kivi_sampler_create(&c->sampler, c->engine, &so, &c->err)) return fail_with(&c->err);
    c->is_terminal = isatty(STDIN_FILENO);
    if (c->o->load) {
        int code = load(c, c->o->load);
        if (code) return code;
    }
    return c->is_terminal ? open_editor(c) : EXIT_OK;
}

int command_chat(const options *o) {
    chat c = {.o = o};
    int code = open_engine(&c.engine, o, options_kind(o), NULL, NULL);
    if (!code) code = prepare(&c);
    hear_interrupts(true);
    if (!code && c.is_terminal)
        fprintf(stderr, "%s, %s; /help lists commands\n",
                kivi_engine_info_get(c.engine)->model_name, c.format);
    if (!code) code = converse(&c);
    if (code == EXIT_IO) fprintf(stderr, "kivi: error: standard output: %s\n", strerror(errno));
    if (c.editor) el_end(c.editor);
    if (c.history) history_end(c.history);
    free(c.line);
    kivi_sampler_destroy(&c.sampler);
    kivi_session_destroy(&c.session);
    kivi_engine_destroy(&c.engine);
    return code;
}
