/* convert: a Hugging Face folder as a GGUF file. */
#include "commands.h"

#include "kivi_convert.h"

#include <signal.h>

static volatile sig_atomic_t interrupted; /* the number of the signal */

static void on_signal(int number) { interrupted = number; }

static bool is_interrupted(void *user) {
    (void)user;
    return interrupted != 0;
}

static void print_note(void *user, const char *line) {
    (void)user;
    fprintf(stderr, "kivi: note: %s\n", line);
}

static void catch_signals(void) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action = {.sa_handler = on_signal}, old;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (sigaction(numbers[i], NULL, &old) || old.sa_handler == SIG_IGN) continue; /* nohup */
        sigaction(numbers[i], &action, NULL);
    }
    signal(SIGXFSZ, SIG_IGN); /* a limit of file size is a write error, reported like any other */
}

int command_convert(const options *o) {
    kivi_error err = {0};
    kivi_convert_options co = {.folder = o->model,
                               .out = o->target,
                               .type = o->type,
                               .force = o->force,
                               .stop = is_interrupted,
                               .note = print_note};
    catch_signals();
    if (!kivi_convert(&co, &err)) return EXIT_OK;
    int code = fail_with(&err);
    if (err.status == KIVI_CANCELLED && interrupted) { /* ends as who sent it expects */
        int number = interrupted;
        signal(number, SIG_DFL);
        raise(number);
    }
    return code;
}
