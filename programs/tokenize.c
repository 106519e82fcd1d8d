/* tokenize: the ids of a text and what each stands for, by a vocabulary alone: a file without
 * weights, or a tokenizer.json, will do. */
#include "commands.h"

#include "kivi_text.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TEXT_BYTES = 1 << 30 };

/* The bytes of a token as a JSON string; what is no text is escaped as it would be in Latin-1. */
static void print_piece(const char *bytes, size_t n) {
    putchar('"');
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c == '"' || c == '\\') printf("\\%c", c);
        else if (c < ' ' || c == 127) printf("\\u%04x", c);
        else putchar(c);
    }
    putchar('"');
}

static void print_rows(const kivi_vocab *vocab, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) {
        char bytes[1024];
        size_t n_bytes = kivi_vocab_bytes(vocab, ids[i], bytes, sizeof bytes);
        printf("%7d  ", ids[i]);
        print_piece(bytes, n_bytes);
        puts(kivi_vocab_is_control(vocab, ids[i]) ? "  control" : "");
    }
}

static void print_line(const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) printf(i ? " %d" : "%d", ids[i]);
    putchar('\n');
}

/* A text of n bytes has rarely more than n + 2 ids; where it has, the answer says how many. */
static int encode(int32_t **ids, size_t *n_ids, const kivi_vocab *vocab, const options *o,
                  const char *text, size_t n_bytes) {
    kivi_error err = {0};
    unsigned flags =
        (o->no_bos ? 0 : KIVI_TEXT_ADD_BOS) | (o->special ? (unsigned)KIVI_TEXT_SPECIAL : 0);
    size_t room = n_bytes + 16;
    for (;;) {
        *ids = malloc(room * sizeof **ids);
        if (!*ids) return EXIT_MEMORY;
        kivi_status status =
            kivi_vocab_tokenize(vocab, text, n_bytes, flags, *ids, room, n_ids, &err);
        if (status == KIVI_OK) return EXIT_OK;
        free(*ids);
        *ids = NULL;
        if (status != KIVI_ARG || *n_ids <= room) return fail_with(&err);
        room = *n_ids;
    }
}

static int print_text(const kivi_vocab *vocab, const options *o, const char *text, size_t n_bytes) {
    int32_t *ids = NULL;
    size_t n = 0;
    int code = encode(&ids, &n, vocab, o, text, n_bytes);
    if (!code && (o->only_ids || o->by_zeros)) print_line(ids, n);
    else if (!code) print_rows(vocab, ids, n);
    free(ids);
    return code;
}

static int print_texts(const kivi_vocab *vocab, const options *o, const char *text,
                       size_t n_bytes) {
    int code = EXIT_OK;
    for (size_t at = 0; at < n_bytes && !code;) {
        const char *end = memchr(text + at, 0, n_bytes - at);
        size_t n = end ? (size_t)(end - text) - at : n_bytes - at;
        code = print_text(vocab, o, text + at, n);
        at += n + 1;
    }
    return code;
}

int command_tokenize(const options *o) {
    kivi_vocab *vocab = NULL;
    kivi_error err = {0};
    char path[PATH_MAX], *text = NULL;
    size_t n_bytes = o->prompt ? strlen(o->prompt) : 0;
    int code = model_path(path, sizeof path, o->model);
    if (!code && o->prompt && o->file) code = usage_error("-p and -f: give one of them");
    if (!code && !o->prompt)
        code = read_file(&text, &n_bytes, o->file ? o->file : "-", MAX_TEXT_BYTES);
    if (!code && kivi_vocab_open(&vocab, path, &err)) code = fail_with(&err);
    if (!code)
        code = (o->by_zeros ? print_texts : print_text)(vocab, o, text ? text : o->prompt, n_bytes);
    kivi_vocab_destroy(&vocab);
    free(text);
    return code;
}
