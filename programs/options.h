/* options.h: the one table of command-line options. It makes the parser, --help and the KIVI_*
 * environment. */
#ifndef OPTIONS_H
#define OPTIONS_H
#include "kivi.h"

#include <stdio.h>

enum { MAX_LIST = 16, MAX_FILES = 64 };
#define DEFAULT_KIND "kivi2+"

/* Exit codes of every command. */
enum { EXIT_OK = 0, EXIT_USAGE = 2, EXIT_MODEL = 3, EXIT_MEMORY = 4, EXIT_IO = 5 };

/* CMD_ALL: those that run a model. */
enum command {
    CMD_RUN = 1,
    CMD_INFO = 2,
    CMD_LOGITS = 4,
    CMD_BENCH = 8,
    CMD_EVAL = 16,
    CMD_CHAT = 32,
    CMD_TOKENIZE = 64,
    CMD_CONVERT = 128,
    CMD_SERVE = 256,
    CMD_BATCH = 512,
    CMD_BENCH_SERVE = 1024,
    CMD_BENCH_ATTENTION = 2048,
    CMD_ALL =
        CMD_RUN | CMD_INFO | CMD_LOGITS | CMD_BENCH | CMD_EVAL | CMD_CHAT | CMD_SERVE | CMD_BATCH
};

typedef struct list {
    uint32_t values[MAX_LIST];
    uint32_t n;
} list;

typedef struct options {
    enum command command;
    const char *model;
    const char *source; /* batch: the requests */
    const char *target,
        *type; /* convert: the file to make, and its matrices'; batch: the answers */
    const char *prompt, *file, *tokens, *out, *stats, *device, *compute, *format;
    const char *system, *chat_template, *load;
    /* serve and batch */
    const char *host, *api_key, *api_key_file, *served_name, *tls_cert, *tls_key, *cors,
        *log_format;
    uint32_t port, max_seqs, step_tokens, max_queued, max_queued_tokens, kv_memory_mib;
    uint32_t drain_s, reader_s, request_s, header_s, keep_alive_s, stream_buffer_kib;
    uint32_t max_connections, max_body_kib;
    bool no_prefix_cache, parse_special, kv_memory_given, batch_invariant;
    /* bench-serve */
    uint32_t n_requests, concurrency, input_len, output_len;
    double request_rate, goodput_ttft_ms, goodput_tpot_ms;
    const char *kv, *rule, *type_k, *type_v, *rope_type, *dummy_type, *parts;
    uint32_t k_bits, v_bits, group, residual, sinks;
    bool sinks_given;
    uint32_t n_predict, n_prompt, prompt_chunk, threads, ctx, gpu_memory, repeats, top_k;
    uint32_t repeat_tokens;
    bool n_prompt_given, n_predict_given;
    double temp, top_p, min_p, repeat_penalty;
    uint64_t seed, dummy_seed;
    bool dummy;
    const char *what, *files[MAX_FILES]; /* eval: ppl or kld, and its texts */
    uint32_t n_files, skip, stride, chunks;
    bool skip_given;
    list bench_prompt, bench_gen, bench_depth, bench_batch, bench_threads;
    /* bench-attention */
    const char *heads, *measures;
    bool depth_given, batch_given, plain_launches;
    bool force, json, ignore_eos, only_ids, special, no_bos, by_zeros;
} options;

/* argv after the program's name: command, model and options in any order. Returns EXIT_OK to go on,
 * or the exit code (help was printed, or an error). *done is set when there is nothing more to do.
 */
int options_parse(options *o, int argc, char **argv, bool *done);
void options_help(FILE *out, unsigned command);

/* The table itself, for --man and --completion: the i-th option or command; false past the end. */
typedef struct option_info {
    const char *name, *shorts; /* without and with dashes */
    const char *value, *help;  /* value NULL: it takes none */
    const char *env;           /* its environment name if that is not the usual one */
    unsigned commands;
} option_info;
typedef struct command_line {
    const char *name, *help;
    const char *words; /* what it takes beside options */
    unsigned command;
} command_line;
bool options_get(option_info *out, size_t i);
bool options_command(command_line *out, size_t i);
/* manual.c: a man page (command NULL: of kivi itself), and a completion script. */
int manual_page(FILE *out, const char *command);
int manual_completion(FILE *out, const char *shell);

/* One cache kind by its name in tables ("f16", "kivi2", ...) and the finer options over it. */
int options_kv(kivi_kv_options *out, const options *o, const char *name);
/* The kind a command uses: --kv's; without it the default, or kivi2 where bits, group or residual
 * are given, which not every kind takes. */
const char *options_kind(const options *o);
bool options_shape_kind(const options *o); /* bits, group or residual are given */
/* o without what it says of a kind's sizes and parts: for an engine that has the 16-bit cache
 * whatever kinds are asked for. */
options options_without_kind(const options *o);
/* The i-th name of a comma-separated list into name; false past its end. */
bool options_list_item(char *name, size_t n_bytes, const char *text, uint32_t i);

int usage_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
int exit_code(kivi_status status);
/* Prints "kivi: error: ..." and returns the exit code for err. */
int fail_with(const kivi_error *err);

#endif
