#include "commands.h"

#include <signal.h>

int main(int argc, char **argv) {
    options o;
    bool done;
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is a write error, reported like any other */
    int code = options_parse(&o, argc - 1, argv + 1, &done);
    if (code) return code;
    if (!done) switch (o.command) {
        case CMD_RUN: code = command_run(&o); break;
        case CMD_INFO: code = command_info(&o); break;
        case CMD_LOGITS: code = command_logits(&o); break;
        case CMD_BENCH: code = command_bench(&o); break;
        case CMD_EVAL: code = command_eval(&o); break;
        case CMD_CHAT: code = command_chat(&o); break;
        case CMD_TOKENIZE: code = command_tokenize(&o); break;
        case CMD_CONVERT: code = command_convert(&o); break;
        case CMD_SERVE: code = command_serve(&o); break;
        case CMD_BATCH: code = command_batch(&o); break;
        case CMD_BENCH_SERVE: code = command_bench_serve(&o); break;
        case CMD_BENCH_ATTENTION: code = command_bench_attention(&o); break;
        case CMD_ALL: break;
        }
    if (fflush(stdout) && !code) {
        fputs("kivi: error: standard output: the text could not be written\n", stderr);
        code = EXIT_IO;
    }
    return code;
}
