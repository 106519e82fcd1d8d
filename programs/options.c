#include "options.h"

#include "kivi_cache.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum kind { TEXT, FILES, UINT, UINT64, REAL, LIST, FLAG };

typedef struct option {
    const char *name;   /* long, without the dashes; also KIVI_<NAME> */
    const char *shorts; /* other spellings, with their dashes, separated by blanks */
    enum kind kind;
    unsigned commands;
    size_t offset, given; /* into options; given: offset of a bool, 0 for none */
    const char *value, *help;
    double min, max;
} option;

#define AT(field) offsetof(options, field)
static const option table[] = {
    {"prompt", "-p", TEXT, CMD_RUN | CMD_TOKENIZE, AT(prompt), 0, "TEXT", "the prompt", 0, 0},
    {"file", "-f", TEXT, CMD_RUN | CMD_TOKENIZE, AT(file), 0, "FILE", "read the prompt from FILE",
     0, 0},
    {"system", "-sys", TEXT, CMD_CHAT, AT(system), 0, "TEXT", "system message", 0, 0},
    {"chat-template", "", TEXT, CMD_CHAT | CMD_SERVE | CMD_BATCH, AT(chat_template), 0, "NAME",
     "chat format instead of the model's own", 0, 0},
    {"load", "", TEXT, CMD_CHAT, AT(load), 0, "FILE", "go on with a saved conversation", 0, 0},
    {"ids", "", FLAG, CMD_TOKENIZE, AT(only_ids), 0, NULL, "print ids only, on one line", 0, 0},
    {"null", "-0", FLAG, CMD_TOKENIZE, AT(by_zeros), 0, NULL,
     "texts end in zero bytes; a line of ids for each", 0, 0},
    {"special", "", FLAG, CMD_TOKENIZE, AT(special), 0, NULL,
     "control tokens spelled in the text become themselves", 0, 0},
    {"no-bos", "", FLAG, CMD_TOKENIZE, AT(no_bos), 0, NULL, "no BOS in front", 0, 0},
    {"n-predict", "-n --predict --max-tokens", UINT, CMD_RUN | CMD_CHAT, AT(n_predict),
     AT(n_predict_given), "N", "tokens to generate (run 128, chat 1024)", 0, 1e9},
    {"ignore-eos", "", FLAG, CMD_RUN, AT(ignore_eos), 0, NULL, "go on after the end token", 0, 0},
    {"temp", "--temperature", REAL, CMD_RUN | CMD_CHAT, AT(temp), 0, "T",
     "temperature (0.8); 0 is greedy", 0, 100},
    {"top-k", "", UINT, CMD_RUN | CMD_CHAT, AT(top_k), 0, "K",
     "keep the K best tokens (40; 0: all)", 0, 1e9},
    {"top-p", "", REAL, CMD_RUN | CMD_CHAT, AT(top_p), 0, "P",
     "keep the best tokens up to probability P (0.95)", 1e-9, 1},
    {"min-p", "", REAL, CMD_RUN | CMD_CHAT, AT(min_p), 0, "P",
     "drop tokens below P times the best one (0.05)", 0, 1},
    {"repeat-penalty", "", REAL, CMD_RUN | CMD_CHAT, AT(repeat_penalty), 0, "X",
     "weaken recent tokens (1.1; 1: off)", 0.01, 100},
    {"repeat-last-n", "", UINT, CMD_RUN | CMD_CHAT, AT(repeat_tokens), 0, "N",
     "how many recent tokens (64)", 0, 1e9},
    {"seed", "-s", UINT64, CMD_RUN | CMD_CHAT | CMD_BENCH_SERVE, AT(seed), 0, "N",
     "the same seed draws the same text (0)", 0, 1.8e19},
    {"stats", "", TEXT, CMD_RUN, AT(stats), 0, "FORM", "text, json or none (text)", 0, 0},
    {"json", "", FLAG, CMD_INFO, AT(json), 0, NULL, "print JSON", 0, 0},
    {"tokens", "", TEXT, CMD_LOGITS, AT(tokens), 0, "FILE", "JSON array of token ids", 0, 0},
    {"prompt", "", UINT, CMD_LOGITS, AT(n_prompt), AT(n_prompt_given), "N",
     "the first N ids are a prompt (all)", 0, 1e9},
    {"prompt-chunk", "", UINT, CMD_RUN | CMD_CHAT | CMD_LOGITS | CMD_BENCH, AT(prompt_chunk), 0,
     "N", "rows of a prompt step (512, on a GPU 2048; logits 512, chat 128)", 1, 65536},
    {"out", "-o", TEXT, CMD_LOGITS, AT(out), 0, "FILE", "write float32 [T][V] as .npy", 0, 0},
    {"type", "", TEXT, CMD_CONVERT, AT(type), 0, "TYPE", "of matrices: f16, q8_0 or q4_0 (f16)", 0,
     0},
    {"force", "", FLAG, CMD_CONVERT, AT(force), 0, NULL, "replace a file that exists", 0, 0},
    {"n-prompt", "-p", LIST, CMD_BENCH, AT(bench_prompt), 0, "N,..", "prompt lengths to time (512)",
     0, 1e7},
    {"n-gen", "-n", LIST, CMD_BENCH, AT(bench_gen), 0, "N,..", "generated tokens to time (128)", 0,
     1e7},
    {"n-depth", "-d --depth", LIST, CMD_BENCH, AT(bench_depth), 0, "N,..",
     "tokens in the cache before (0)", 0, 1e7},
    {"n-batch", "-b", LIST, CMD_BENCH, AT(bench_batch), 0, "N,..", "sequences at once (1)", 1, 256},
    {"repetitions", "-r", UINT, CMD_BENCH, AT(repeats), 0, "N", "timed repetitions (5)", 1, 1000},
    {"output", "-o", TEXT, CMD_BENCH, AT(format), 0, "FORM", "md, csv, json or jsonl (md)", 0, 0},
    {"n-batch", "-b", LIST, CMD_BENCH_ATTENTION, AT(bench_batch), AT(batch_given), "N,..",
     "sequences at once; with -H and -d instead of the usual shapes (1)", 1, 4096},
    {"heads", "-H", TEXT, CMD_BENCH_ATTENTION, AT(heads), 0, "H/HK,..",
     "query heads over KV heads (32/8)", 0, 0},
    {"n-depth", "-d --depth", LIST, CMD_BENCH_ATTENTION, AT(bench_depth), AT(depth_given), "N,..",
     "tokens in the cache, multiples of 128 (4096)", 128, 1e7},
    {"measure", "", TEXT, CMD_BENCH_ATTENTION, AT(measures), 0, "WHAT,..",
     "decode constant window length append within close prompt (all)", 0, 0},
    {"no-pdl", "", FLAG, CMD_BENCH_ATTENTION, AT(plain_launches), 0, NULL,
     "launches wait for the end of the one before", 0, 0},
    {"repetitions", "-r", UINT, CMD_BENCH_ATTENTION, AT(repeats), 0, "N",
     "replays of a graph that a median is of (5)", 1, 1000},
    {"output", "-o", TEXT, CMD_BENCH_ATTENTION, AT(format), 0, "FORM", "md or json (md)", 0, 0},
    {"kv", "--kv-cache-dtype", TEXT, CMD_BENCH_ATTENTION, AT(kv), 0, "KIND,..",
     "kinds of cache to measure (all that have a name)", 0, 0},
    {"device", "", TEXT, CMD_BENCH_ATTENTION, AT(device), 0, "DEV",
     "cuda or cuda:N (the first there is)", 0, 0},
    {"file", "-f", FILES, CMD_EVAL, AT(files), 0, "FILE", "a text to score; may be given again", 0,
     0},
    {"skip", "", UINT, CMD_EVAL, AT(skip), AT(skip_given), "N", "score positions from N on (128)",
     0, 1e8},
    {"stride", "", UINT, CMD_EVAL, AT(stride), 0, "N",
     "tokens from one window's start to the next one's (--ctx)", 1, 1e8},
    {"chunks", "", UINT, CMD_EVAL, AT(chunks), 0, "N", "windows of each file (all)", 1, 1e8},
    {"output", "-o", TEXT, CMD_EVAL, AT(format), 0, "FORM", "md or json (md)", 0, 0},
    {"host", "", TEXT, CMD_SERVE, AT(host), 0, "ADDR", "address to listen at (127.0.0.1)", 0, 0},
    {"port", "", UINT, CMD_SERVE, AT(port), 0, "P", "port to listen at (8080; 0: a free one)", 0,
     65535},
    {"api-key", "", TEXT, CMD_SERVE | CMD_BENCH_SERVE, AT(api_key), 0, "KEY,..",
     "keys of which clients must have one", 0, 0},
    {"api-key-file", "", TEXT, CMD_SERVE, AT(api_key_file), 0, "FILE", "more keys, one a line", 0,
     0},
    {"served-model-name", "--alias -a", TEXT, CMD_SERVE | CMD_BENCH_SERVE, AT(served_name), 0,
     "NAME", "the model's name for clients (that of its file)", 0, 0},
    {"tls-cert", "--ssl-certfile", TEXT, CMD_SERVE, AT(tls_cert), 0, "FILE",
     "serve HTTPS: certificate chain, PEM", 0, 0},
    {"tls-key", "--ssl-keyfile", TEXT, CMD_SERVE, AT(tls_key), 0, "FILE",
     "private key of --tls-cert, PEM", 0, 0},
    {"cors", "--cors-origin", TEXT, CMD_SERVE, AT(cors), 0, "ORIGIN",
     "web pages of this origin may send requests (none; *: all)", 0, 0},
    {"max-num-seqs", "-np --parallel", UINT, CMD_SERVE | CMD_BATCH, AT(max_seqs), 0, "N",
     "sequences at once (16)", 1, 4096},
    {"max-num-batched-tokens", "", UINT, CMD_SERVE | CMD_BATCH, AT(step_tokens), 0, "N",
     "rows of a step, prompts' chunks included (512)", 1, 65536},
    {"max-num-queued-reqs", "", UINT, CMD_SERVE, AT(max_queued), 0, "N",
     "requests that may wait; more get 429 (1024)", 1, 1e6},
    {"max-num-queued-tokens", "", UINT, CMD_SERVE, AT(max_queued_tokens), 0, "N",
     "prompt tokens that may wait (1048576)", 1, 4e9},
    {"kv-memory", "", UINT, CMD_SERVE | CMD_BATCH, AT(kv_memory_mib), AT(kv_memory_given), "MIB",
     "most memory of cache pages (max-num-seqs contexts)", 1, 1e8},
    {"no-prefix-cache", "", FLAG, CMD_SERVE | CMD_BATCH, AT(no_prefix_cache), 0, NULL,
     "requests share no beginnings of prompts", 0, 0},
    {"parse-special", "", FLAG, CMD_SERVE | CMD_BATCH, AT(parse_special), 0, NULL,
     "control tokens spelled in a completion's prompt become themselves", 0, 0},
    {"log-format", "", TEXT, CMD_SERVE, AT(log_format), 0, "FORM", "text, json or none (text)", 0,
     0},
    {"drain-timeout", "--shutdown-timeout", UINT, CMD_SERVE, AT(drain_s), 0, "S",
     "SIGTERM: seconds for what runs to end (30)", 0, 1e6},
    {"reader-timeout", "", UINT, CMD_SERVE, AT(reader_s), 0, "S",
     "a client that reads nothing so long is dropped (30)", 1, 1e6},
    {"request-timeout", "", UINT, CMD_SERVE, AT(request_s), 0, "S",
     "longest life of a request (0: no limit)", 0, 4e6},
    {"header-timeout", "", UINT, CMD_SERVE, AT(header_s), 0, "S",
     "a request must have come after so long (30)", 1, 1e6},
    {"keep-alive", "--sse-keep-alive-interval", UINT, CMD_SERVE, AT(keep_alive_s), 0, "S",
     "a stream without news gets a comment line (15)", 1, 1e6},
    {"stream-buffer", "", UINT, CMD_SERVE, AT(stream_buffer_kib), 0, "KIB",
     "unread part of a stream before it pauses (256)", 1, 1e6},
    {"max-connections", "", UINT, CMD_SERVE, AT(max_connections), 0, "N", "connections (1024)", 1,
     1e6},
    {"max-body", "", UINT, CMD_SERVE, AT(max_body_kib), 0, "KIB", "longest request body (16384)", 1,
     1e6},
    {"num-prompts", "-n", UINT, CMD_BENCH_SERVE, AT(n_requests), 0, "N", "requests (100)", 1, 1e7},
    {"request-rate", "", REAL, CMD_BENCH_SERVE, AT(request_rate), 0, "R",
     "requests a second, Poisson (0: as fast as concurrency lets)", 0, 1e6},
    {"max-concurrency", "-c", UINT, CMD_BENCH_SERVE, AT(concurrency), 0, "N",
     "requests at once (16)", 1, 4096},
    {"input-len", "--random-input-len", UINT, CMD_BENCH_SERVE, AT(input_len), 0, "N",
     "tokens of a prompt (128)", 1, 1e7},
    {"output-len", "--random-output-len", UINT, CMD_BENCH_SERVE, AT(output_len), 0, "N",
     "tokens to generate (128)", 1, 1e7},
    {"goodput-ttft", "", REAL, CMD_BENCH_SERVE, AT(goodput_ttft_ms), 0, "MS",
     "a good request has its first token by then (0: no matter)", 0, 1e9},
    {"goodput-tpot", "", REAL, CMD_BENCH_SERVE, AT(goodput_tpot_ms), 0, "MS",
     "and at most so much for each further one (0: no matter)", 0, 1e9},
    {"output", "-o", TEXT, CMD_BENCH_SERVE, AT(format), 0, "FORM", "text or json (text)", 0, 0},
    {"kv", "--kv-cache-dtype", TEXT, CMD_ALL, AT(kv), 0, "KIND",
     "cache: f16 kivi8 kivi4 k4v2 kivi2 kivi2+ k4v2+ k4v3+ (" DEFAULT_KIND ")", 0, 0},
    {"k-bits", "--kv-bits-k", UINT, CMD_ALL, AT(k_bits), 0, "B", "bits of keys: 2, 4, 8, 16", 2,
     16},
    {"v-bits", "--kv-bits-v", UINT, CMD_ALL, AT(v_bits), 0, "B",
     "bits of values: 2, 4, 8, 16; 3 in a + kind", 2, 16},
    {"cache-type-k", "-ctk", TEXT, CMD_ALL, AT(type_k), 0, "TYPE",
     "keys as in llama.cpp: f16 q8_0 q4_0 q4_1", 0, 0},
    {"cache-type-v", "-ctv", TEXT, CMD_ALL, AT(type_v), 0, "TYPE", "values as in llama.cpp", 0, 0},
    {"group", "--kv-group", UINT, CMD_ALL, AT(group), 0, "G", "values a scale is shared by (32)", 1,
     4096},
    {"residual", "--kv-residual", UINT, CMD_ALL, AT(residual), 0, "R",
     "newest tokens kept in 16 bit (128)", 1, 1e6},
    {"sinks", "", UINT, CMD_ALL, AT(sinks), AT(sinks_given), "S",
     "first tokens kept in 16 bit (0; + kinds 4)", 0, 1e6},
    {"parts", "", TEXT, CMD_ALL, AT(parts), 0, "LIST",
     "of a + kind, to measure each: wide fit turn step, all or none; a plain kind's: zero k32 v32 "
     "(all)",
     0, 0},
    {"rule", "", TEXT, CMD_ALL, AT(rule), 0, "RULE",
     "paper, stream or span:N (paper; in serve, batch and eval stream)", 0, 0},
    {"threads", "-t", UINT, CMD_ALL & ~CMD_BENCH, AT(threads), 0, "N",
     "threads (one for each core)", 1, 1024},
    {"threads", "-t", LIST, CMD_BENCH, AT(bench_threads), 0, "N,..",
     "threads (one for each core); of several the most fill the cache", 1, 1024},
    {"ctx", "-c --ctx-size --max-model-len", UINT, CMD_ALL, AT(ctx), 0, "N",
     "longest context (the model's)", 1, 1e8},
    {"rope-freq", "", TEXT, CMD_LOGITS, AT(rope_type), 0, "TYPE",
     "round rotary frequencies to f16 or bf16 (f32)", 0, 0},
    {"dummy-weights", "", UINT64, CMD_ALL, AT(dummy_seed), AT(dummy), "SEED",
     "random weights; MODEL needs only config.json", 0, 1.8e19},
    {"dummy-type", "", TEXT, CMD_ALL, AT(dummy_type), 0, "TYPE",
     "of random weights: f16, q8_0 or q4_0 (config.json's)", 0, 0},
    {"device", "", TEXT, CMD_ALL, AT(device), 0, "DEV",
     "auto, cpu, cuda or cuda:N (auto: CUDA where there is one)", 0, 0},
    {"compute", "", TEXT, CMD_ALL, AT(compute), 0, "TYPE",
     "of products on a CUDA device: f16, bf16 or f32 (f16)", 0, 0},
    {"gpu-memory", "", UINT, CMD_ALL, AT(gpu_memory), 0, "MIB",
     "most memory to take of a CUDA device (all)", 1, 1e8},
    {"batch-invariant", "", FLAG, CMD_ALL, AT(batch_invariant), 0, NULL,
     "on a CUDA device, too, others in a batch change no bit of an answer", 0, 0},
};
enum { N_OPTIONS = sizeof table / sizeof *table };

static const struct {
    const char *name;
    unsigned command;
    const char *help;
} commands[] = {
    {"run", CMD_RUN, "generate text from a prompt"},
    {"info", CMD_INFO, "what a model is, and the memory each cache kind takes"},
    {"logits", CMD_LOGITS, "logits of given token ids, as a .npy file"},
    {"bench", CMD_BENCH, "tokens per second at depths and batch sizes"},
    {"eval", CMD_EVAL, "perplexity, or divergence from a 16-bit cache: eval ppl|kld MODEL -f TEXT"},
    {"chat", CMD_CHAT, "talk with a model"},
    {"tokenize", CMD_TOKENIZE, "token ids of a text, with any vocabulary"},
    {"convert", CMD_CONVERT, "a Hugging Face folder as a GGUF file"},
    {"serve", CMD_SERVE, "an OpenAI-compatible server, and a page to chat at"},
    {"batch", CMD_BATCH, "answers to a file of requests in OpenAI's batch format"},
    {"bench-attention", CMD_BENCH_ATTENTION,
     "time a GPU's kernels of the cache: bench attention --device cuda"},
    {"bench-serve", CMD_BENCH_SERVE, "load a server and time it: bench serve http://HOST:PORT"},
};
static const char *const later[] = {"study"};

int usage_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("kivi: error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return EXIT_USAGE;
}

int exit_code(kivi_status status) {
    switch (status) {
    case KIVI_OK: return EXIT_OK;
    case KIVI_ARG: return EXIT_USAGE;
    case KIVI_FORMAT:
    case KIVI_UNSUPPORTED: return EXIT_MODEL;
    case KIVI_IO: return EXIT_IO;
    default: return EXIT_MEMORY;
    }
}

int fail_with(const kivi_error *err) {
    fprintf(stderr, "kivi: error: %s\n", err->text);
    return exit_code(err->status);
}

/* ---- help ---- */

/* What a command takes beside options. */
static const char *words_of(unsigned command) {
    if (command == CMD_BATCH) return "MODEL IN.jsonl OUT.jsonl";
    if (command == CMD_BENCH_SERVE) return "URL";
    if (command == CMD_BENCH_ATTENTION) return "";
    return command == CMD_CONVERT ? "FOLDER OUT.gguf" : "MODEL";
}

/* The environment name of an option that is not the usual one: of two options with one name that
 * mean different things one has another. NULL: KIVI_ and its name in capitals. */
static const char *env_of(const option *o) {
    return o->commands == CMD_LOGITS && !strcmp(o->name, "prompt") ? "KIVI_LOGITS_PROMPT" : NULL;
}

void options_help(FILE *out, unsigned command) {
    if (!command) {
        fputs("kivi: language models with a 2-bit key/value cache\n\nusage: kivi COMMAND MODEL "
              "[options]\n\n",
              out);
        for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
            fprintf(out, "  %-15s %s\n", commands[i].name, commands[i].help);
        fputs("\nMODEL is a GGUF file, a Hugging Face folder, or smollm2. kivi COMMAND --help "
              "lists options.\n",
              out);
        return;
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (commands[i].command == command)
            fprintf(out, "usage: kivi %s %s%s[options]    %s\n\n", commands[i].name,
                    words_of(command), *words_of(command) ? " " : "", commands[i].help);
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const option *o = &table[i];
        char left[96];
        if (!(o->commands & command)) continue;
        snprintf(left, sizeof left, "--%s%s%s%s%s", o->name, o->value ? " " : "",
                 o->value ? o->value : "", o->shorts[0] ? "  " : "", o->shorts);
        fprintf(out, "  %-44s %s\n", left, o->help);
    }
    fputs("\nEvery option also has an environment name, such as KIVI_THREADS; the command line "
          "wins.\n"
          "KIVI_DISABLE=avx512,avx2 leaves instruction sets out (arm: neon, neondot; gpu: "
          "cudnn).\n",
          out);
}

bool options_get(option_info *out, size_t i) {
    if (i >= N_OPTIONS) return false;
    const option *o = &table[i];
    *out = (option_info){o->name, o->shorts, o->value, o->help, env_of(o), o->commands};
    return true;
}

bool options_command(command_line *out, size_t i) {
    if (i >= sizeof commands / sizeof *commands) return false;
    unsigned command = commands[i].command;
    *out = (command_line){commands[i].name, commands[i].help, words_of(command), command};
    return true;
}

/* ---- values ---- */

static bool read_real(double *out, const char *text) {
    char *end;
    errno = 0;
    *out = strtod(text, &end);
    return end != text && !*end && !errno && isfinite(*out);
}

static bool read_uint(uint64_t *out, const char *text, double min, double max) {
    char *end;
    errno = 0;
    if (text[0] < '0' || text[0] > '9') return false;
    *out = strtoull(text, &end, 10);
    return !*end && !errno && (double)*out >= min && (double)*out <= max;
}

static bool read_list(list *out, const char *text, double min, double max) {
    char item[32];
    out->n = 0;
    for (uint32_t i = 0; options_list_item(item, sizeof item, text, i); i++) {
        uint64_t value;
        if (i == MAX_LIST || !read_uint(&value, item, min, max)) return false;
        out->values[out->n++] = (uint32_t)value;
    }
    return out->n > 0;
}

static int set_value(options *o, const option *opt, const char *text, const char *where) {
    char *at = (char *)o + opt->offset;
    uint64_t whole;
    double real;
    bool ok = true;
    switch (opt->kind) {
    case FILES:
        if (o->n_files == MAX_FILES) return usage_error("%s: more than %d files", where, MAX_FILES);
        o->files[o->n_files++] = text;
        break;
    case TEXT: memcpy(at, &text, sizeof text); break;
    case FLAG:
        *(bool *)at = strcmp(text, "0") && strcmp(text, "off") && strcmp(text, "false");
        break;
    case UINT:
        if ((ok = read_uint(&whole, text, opt->min, opt->max)))
            *(uint32_t *)(void *)at = (uint32_t)whole;
        break;
    case UINT64:
        if ((ok = read_uint(&whole, text, opt->min, opt->max))) memcpy(at, &whole, sizeof whole);
        break;
    case REAL:
        if ((ok = read_real(&real, text) && real >= opt->min && real <= opt->max))
            memcpy(at, &real, sizeof real);
        break;
    case LIST: ok = read_list((list *)(void *)at, text, opt->min, opt->max); break;
    }
    if (!ok)
        return usage_error("%s: '%s', expected a number from %g to %g%s", where, text, opt->min,
                           opt->max, opt->kind == LIST ? " or a list of them" : "");
    if (opt->given) *((bool *)o + opt->given) = true;
    return EXIT_OK;
}

/* ---- the command line ---- */

static bool spelled(const option *o, const char *word, size_t n) {
    if (n > 2 && !strncmp(word, "--", 2) && strlen(o->name) == n - 2 &&
        !memcmp(o->name, word + 2, n - 2))
        return true;
    for (const char *p = o->shorts; *p;) {
        size_t length = strcspn(p, " ");
        if (length == n && !memcmp(p, word, n)) return true;
        p += length + (p[length] == ' ');
    }
    return false;
}

static const option *find_option(unsigned command, const char *word, size_t n) {
    for (size_t i = 0; i < N_OPTIONS; i++)
        if ((table[i].commands & command) && spelled(&table[i], word, n)) return &table[i];
    return NULL;
}

static int from_environment(options *o) {
    for (size_t i = 0; i < N_OPTIONS; i++) {
        char name[64] = "KIVI_";
        size_t n = 5;
        for (const char *p = table[i].name; *p && n + 1 < sizeof name; p++)
            name[n++] = (char)(*p == '-' ? '_' : *p >= 'a' && *p <= 'z' ? *p - 32 : *p);
        name[n] = 0;
        if (env_of(&table[i])) snprintf(name, sizeof name, "%s", env_of(&table[i]));
        const char *value = (table[i].commands & o->command) ? getenv(name) : NULL;
        if (!value || !*value) continue;
        int code = set_value(o, &table[i], value, name);
        if (code) return code;
    }
    return EXIT_OK;
}

/* A word that is no option: MODEL, and what a command has beside it. */
static int take_word(options *o, const char *word) {
    if (o->command == CMD_EVAL && !o->what) {
        o->what = word;
        return EXIT_OK;
    }
    if (o->command == CMD_BATCH && o->model && !o->source) {
        o->source = word;
        return EXIT_OK;
    }
    if ((o->command == CMD_CONVERT || o->command == CMD_BATCH) && o->model && !o->target) {
        o->target = word;
        return EXIT_OK;
    }
    if ((o->command == CMD_CONVERT || o->command == CMD_BATCH) && o->model)
        return usage_error("'%s': all files are given already", word);
    if (o->model && strcmp(word, o->model))
        return usage_error("'%s': the model is '%s' already", word, o->model);
    o->model = word;
    return EXIT_OK;
}

/* on_line [N_OPTIONS]: the options that are there. */
static int parse_words(options *o, bool *on_line, int argc, char **argv, bool *done) {
    for (int i = 0; i < argc; i++) {
        const char *word = argv[i];
        if (!strcmp(word, "--help") || !strcmp(word, "-h")) {
            options_help(stdout, o->command);
            *done = true;
            return EXIT_OK;
        }
        if (word[0] != '-' || !word[1]) {
            int refused = take_word(o, word);
            if (refused) return refused;
            continue;
        }
        if (!strcmp(word, "-m") || !strcmp(word, "--model")) {
            if (++i == argc) return usage_error("%s needs a value", word);
            o->model = argv[i];
            continue;
        }
        size_t n = strcspn(word, "=");
        const option *opt = find_option(o->command, word, n);
        if (!opt)
            return usage_error("unknown option '%.*s'; kivi COMMAND --help lists them", (int)n,
                               word);
        const char *value = word[n] == '='      ? word + n + 1
                            : opt->kind == FLAG ? "1"
                            : i + 1 < argc      ? argv[++i]
                                                : NULL;
        if (!value) return usage_error("%s needs a value: %s", word, opt->help);
        int code = set_value(o, opt, value, word);
        if (code) return code;
        on_line[opt - table] = true;
    }
    return EXIT_OK;
}

static bool is_there(const bool *on_line, const char *name) {
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (on_line[i] && !strcmp(table[i].name, name)) return true;
    return false;
}

/* Takes back what the environment said. */
static void forget(options *o, const bool *on_line, const char *name) {
    for (size_t i = 0; i < N_OPTIONS; i++) {
        char *at = (char *)o + table[i].offset;
        bool is_meant = !strcmp(table[i].name, name) && (table[i].commands & o->command);
        if (on_line[i] || !is_meant) continue;
        if (table[i].kind == UINT) memset(at, 0, sizeof(uint32_t));
        if (table[i].kind == TEXT) memset(at, 0, sizeof o->kv);
        if (table[i].given) *((bool *)o + table[i].given) = false;
    }
}

/* A cache kind on the command line is meant as a whole, not mixed with finer settings of the
 * environment; and so is one side's type. */
static void hide_environment(options *o, const bool *on_line) {
    static const char *const of_a_kind[] = {"k-bits", "v-bits",   "cache-type-k", "cache-type-v",
                                            "group",  "residual", "sinks",        "parts"};
    for (size_t i = 0; i < sizeof of_a_kind / sizeof *of_a_kind; i++)
        if (is_there(on_line, "kv")) forget(o, on_line, of_a_kind[i]);
    if (is_there(on_line, "cache-type-k")) forget(o, on_line, "k-bits");
    if (is_there(on_line, "cache-type-v")) forget(o, on_line, "v-bits");
}

static int find_command(options *o, const char *name) {
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(commands[i].name, name)) {
            o->command = commands[i].command;
            return EXIT_OK;
        }
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        if (!strcmp(later[i], name)) return usage_error("the command '%s' is not built yet", name);
    return usage_error("unknown command '%s'; kivi --help lists them", name);
}

static int check(const options *o) {
    if (o->command == CMD_CONVERT && (!o->model || !o->target))
        return usage_error("convert needs a folder and the name of the file to make");
    if (o->command == CMD_BENCH_SERVE && !o->model)
        return usage_error("no URL given: http://HOST:PORT");
    if (o->command == CMD_BENCH_ATTENTION)
        return o->model ? usage_error("'%s': bench attention has no model", o->model) : EXIT_OK;
    if (o->command == CMD_BATCH && (!o->model || !o->target))
        return usage_error("batch needs MODEL, a file of requests and the file of answers");
    if (!o->model)
        return usage_error("no MODEL given: a GGUF file, a Hugging Face folder, or smollm2");
    if (o->stats && strcmp(o->stats, "text") && strcmp(o->stats, "json") &&
        strcmp(o->stats, "none"))
        return usage_error("--stats: '%s', expected text, json or none", o->stats);
    return EXIT_OK;
}

int options_parse(options *o, int argc, char **argv, bool *done) {
    *o = (options){.n_predict = 128,
                   .temp = 0.8,
                   .top_k = 40,
                   .top_p = 0.95,
                   .min_p = 0.05,
                   .repeat_penalty = 1.1,
                   .repeat_tokens = 64,
                   .repeats = 5,
                   .bench_prompt = {{512}, 1},
                   .bench_gen = {{128}, 1},
                   .bench_depth = {{0}, 1},
                   .bench_batch = {{1}, 1},
                   .bench_threads = {{0}, 1},
                   .port = 8080,
                   .max_seqs = 16,
                   .drain_s = 30,
                   .reader_s = 30,
                   .header_s = 30,
                   .keep_alive_s = 15,
                   .stream_buffer_kib = 256,
                   .max_connections = 1024,
                   .max_body_kib = 16384,
                   .n_requests = 100,
                   .concurrency = 16,
                   .input_len = 128,
                   .output_len = 128};
    bool on_line[N_OPTIONS] = {false};
    *done = false;
    if (argc == 0 || !strcmp(argv[0], "--help") || !strcmp(argv[0], "-h") ||
        !strcmp(argv[0], "help")) {
        options_help(argc ? stdout : stderr, 0);
        *done = true;
        return argc ? EXIT_OK : EXIT_USAGE;
    }
    if (!strcmp(argv[0], "--version")) {
        puts("kivi " KIVI_VERSION);
        *done = true;
        return EXIT_OK;
    }
    bool is_man = !strcmp(argv[0], "--man");
    if (is_man || !strcmp(argv[0], "--completion")) {
        *done = true;
        return (is_man ? manual_page : manual_completion)(stdout, argc > 1 ? argv[1] : NULL);
    }
    const char *second = argc > 1 && !strcmp(argv[0], "bench") ? argv[1] : "";
    const char *name = !strcmp(second, "serve")       ? "bench-serve"
                       : !strcmp(second, "attention") ? "bench-attention"
                                                      : argv[0];
    bool two_words = name != argv[0];
    int code = find_command(o, name);
    if (!code) code = from_environment(o);
    const char *prompt = o->prompt, *file = o->file; /* of the environment */
    if (!code) code = parse_words(o, on_line, argc - 1 - two_words, argv + 1 + two_words, done);
    hide_environment(o, on_line);
    /* Two ways to say one thing: the command line's hides the environment's other one. */
    if (o->prompt != prompt && o->file == file) o->file = NULL;
    else if (o->file != file && o->prompt == prompt) o->prompt = NULL;
    return code || *done ? code : check(o);
}

/* ---- cache kinds ---- */

bool options_list_item(char *name, size_t n_bytes, const char *text, uint32_t i) {
    while (i--) {
        text += strcspn(text, ",");
        if (!*text) return false;
        text++;
    }
    size_t n = strcspn(text, ",");
    if (n >= n_bytes) n = n_bytes - 1;
    memcpy(name, text, n);
    name[n] = 0;
    return true;
}

static int parts_by_name(uint32_t *parts, const char *text) {
    static const struct {
        const char *name;
        uint32_t part;
    } all[] = {{"wide", KIVI_PLUS_WIDE}, {"fit", KIVI_PLUS_FIT},   {"turn", KIVI_PLUS_TURN},
               {"step", KIVI_PLUS_STEP}, {"zero", KIVI_PLUS_ZERO}, {"k32", KIVI_PLUS_K32},
               {"v32", KIVI_PLUS_V32},   {"all", KIVI_PLUS_ALL},   {"none", 0}};
    enum { N = sizeof all / sizeof *all };
    char name[16];
    *parts = KIVI_PLUS;
    for (uint32_t k = 0; options_list_item(name, sizeof name, text, k); k++) {
        uint32_t i = 0;
        while (i < N && strcmp(all[i].name, name) != 0) i++;
        if (i == N)
            return usage_error("--parts: '%s', expected wide, fit, turn, step, zero, k32, v32, all "
                               "or none",
                               name);
        *parts |= all[i].part;
    }
    return EXIT_OK;
}

bool options_shape_kind(const options *o) {
    return o->k_bits || o->v_bits || o->type_k || o->type_v || o->group || o->residual;
}

options options_without_kind(const options *o) {
    options plain = *o;
    plain.k_bits = plain.v_bits = plain.group = plain.residual = plain.sinks = 0;
    plain.type_k = plain.type_v = plain.parts = NULL;
    plain.sinks_given = false;
    return plain;
}

const char *options_kind(const options *o) {
    return o->kv ? o->kv : options_shape_kind(o) ? "kivi2" : DEFAULT_KIND;
}

static int bits_by_type(uint32_t *bits, const char *name, const char *where) {
    static const struct {
        const char *name;
        uint32_t bits;
    } types[] = {{"f16", 16}, {"q8_0", 8}, {"q4_0", 4}, {"q4_1", 4}, {"iq4_nl", 4}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strcmp(types[i].name, name)) {
            *bits = types[i].bits;
            return EXIT_OK;
        }
    return usage_error("%s: '%s', expected f16, q8_0, q4_0, q4_1 or iq4_nl (kept in kivi's layout "
                       "of as many bits)",
                       where, name);
}

static int rule_by_name(kivi_kv_options *out, const char *text) {
    uint64_t span;
    if (!strcmp(text, "paper")) out->rule = KIVI_RULE_PAPER;
    else if (!strcmp(text, "stream")) out->rule = KIVI_RULE_STREAM;
    else if (!strncmp(text, "span:", 5) && read_uint(&span, text + 5, 1, 1e6)) {
        out->rule = KIVI_RULE_SPAN;
        out->span_tokens = (uint32_t)span;
    } else return usage_error("--rule: '%s', expected paper, stream or span:N", text);
    return EXIT_OK;
}

int options_kv(kivi_kv_options *out, const options *o, const char *name) {
    *out = kivi_engine_defaults().kv;
    kivi_error err = {0};
    int code = EXIT_OK;
    if (kivi_kv_by_name(out, name, &err)) code = usage_error("--%s", err.text);
    if (!code && o->type_k) code = bits_by_type(&out->k_bits, o->type_k, "-ctk");
    if (!code && o->type_v) code = bits_by_type(&out->v_bits, o->type_v, "-ctv");
    if (o->k_bits) out->k_bits = o->k_bits;
    if (o->v_bits) out->v_bits = o->v_bits;
    out->group = o->group;
    out->residual_tokens = o->residual;
    if (o->sinks_given) out->sink_tokens = o->sinks;
    if (!code && o->parts && !out->plus)
        code = usage_error("--parts: %s is no + kind, it has none", name);
    if (!code && o->parts) code = parts_by_name(&out->plus, o->parts);
    if (!code && o->rule) code = rule_by_name(out, o->rule);
    return code;
}
