/* logits: feeds token ids, the first as a prompt and the rest one by one, and writes what the model
 * says of each. */
#include "commands.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_TOKENS_BYTES = 256 << 20 };

static int read_tokens(int32_t **out, size_t *n, const char *path) {
    char *text = NULL;
    size_t n_bytes;
    json_error_t fault;
    int code = read_file(&text, &n_bytes, path, MAX_TOKENS_BYTES);
    if (code) return code;
    json_t *array = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &fault);
    free(text);
    /* A fault of the text is described, a lack of memory is not. */
    if (!array && !fault.text[0]) return out_of_memory(path);
    *n = json_array_size(array);
    *out = malloc((*n + 1) * sizeof **out);
    if (!*out) {
        json_decref(array);
        return out_of_memory(path);
    }
    bool ok = *n > 0;
    for (size_t i = 0; ok && i < *n; i++) {
        const json_t *item = json_array_get(array, i);
        json_int_t value = json_integer_value(item);
        ok = json_is_integer(item) && value >= 0 && value <= INT32_MAX;
        (*out)[i] = (int32_t)value;
    }
    json_decref(array);
    return ok ? EXIT_OK : usage_error("%s: expected a JSON array of token ids", path);
}

typedef struct job {
    kivi_engine *engine;
    kivi_session *session;
    FILE *file;
    const char *path;
    kivi_error err;
} job;

static int write_failed(const job *j) {
    fprintf(stderr, "kivi: error: %s: %s\n", j->path, strerror(errno));
    return EXIT_IO;
}

static bool is_regular(FILE *file) {
    struct stat st;
    return fstat(fileno(file), &st) == 0 && S_ISREG(st.st_mode);
}

/* The .npy header of version 1.0 is 128 bytes here: magic, length, a Python dictionary padded with
 * blanks. */
static int write_header(const job *j, size_t n_rows) {
    uint32_t n_vocab = kivi_engine_info_get(j->engine)->n_vocab;
    char header[129];
    memset(header, ' ', 128);
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10);
    int n =
        snprintf(header + 10, 118, "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %u), }",
                 n_rows, n_vocab);
    header[10 + n] = ' ';
    header[127] = '\n';
    return fwrite(header, 1, 128, j->file) == 128 ? EXIT_OK : write_failed(j);
}

/* One step, and its rows written. */
static int step(job *j, const int32_t *tokens, uint32_t n) {
    kivi_step_item item = {.session = j->session, .tokens = tokens, .n_tokens = n};
    uint32_t n_vocab = kivi_engine_info_get(j->engine)->n_vocab;
    if (kivi_engine_step(j->engine, &item, 1, &j->err)) return fail_with(&j->err);
    if (item.status) return fail_with(&item.error);
    for (uint32_t r = 0; r < n; r++)
        if (fwrite(kivi_session_logits(j->session, r), sizeof(float), n_vocab, j->file) != n_vocab)
            return write_failed(j);
    return EXIT_OK;
}

static int feed(job *j, const options *o, const int32_t *tokens, size_t n_tokens) {
    size_t n_prompt = o->n_prompt_given ? o->n_prompt : n_tokens, at = 0;
    uint32_t chunk = kivi_engine_info_get(j->engine)->step_rows;
    if (n_prompt > n_tokens)
        return usage_error("--prompt %zu, but %s holds %zu ids", n_prompt, o->tokens, n_tokens);
    if (kivi_session_create(&j->session, j->engine, &j->err)) return fail_with(&j->err);
    if (n_prompt && kivi_session_begin_prompt(j->session, n_prompt, &j->err))
        return fail_with(&j->err);
    while (at < n_tokens) {
        size_t left = at < n_prompt ? n_prompt - at : 1;
        uint32_t n = (uint32_t)(left < chunk ? left : chunk);
        int code = step(j, tokens + at, n);
        if (code) return code;
        at += n;
    }
    return EXIT_OK;
}

static void keep_all(kivi_engine_options *eo, void *user) {
    (void)user;
    eo->all_logits = true;
}

int command_logits(const options *o) {
    job j = {.path = o->out};
    int32_t *tokens = NULL;
    size_t n_tokens = 0;
    if (!o->tokens || !o->out)
        return usage_error("logits needs --tokens FILE.json and --out FILE.npy");
    int code = read_tokens(&tokens, &n_tokens, o->tokens);
    if (!code) code = open_engine(&j.engine, o, options_kind(o), keep_all, (void *)o);
    if (!code && !(j.file = fopen(o->out, "wb"))) code = write_failed(&j);
    if (!code) code = write_header(&j, n_tokens);
    if (!code) code = feed(&j, o, tokens, n_tokens);
    bool own = j.file && is_regular(j.file); /* not a device or a pipe, which are not ours */
    if (j.file && fclose(j.file) && !code) code = write_failed(&j);
    if (own && code) remove(o->out); /* never half a file */
    kivi_session_destroy(&j.session);
    kivi_engine_destroy(&j.engine);
    free(tokens);
    return code;
}
