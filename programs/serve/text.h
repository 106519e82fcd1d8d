/* text.h: a growing text with a maximum, and JSON written into it. */
#ifndef SERVE_TEXT_H
#define SERVE_TEXT_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Writes after a failure do nothing; whoever uses the text looks at `failed` once, at the end. */
typedef struct text {
    char *data; /* [n_bytes], and a zero behind them */
    size_t n_bytes, cap_bytes, max_bytes;
    bool failed; /* no memory, or max_bytes reached */
} text;

void text_init(text *t, size_t max_bytes);
void text_deinit(text *t);
void text_put(text *t, const char *bytes, size_t n_bytes);
void text_puts(text *t, const char *string);
void text_printf(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Drops the first n_bytes. */
void text_drop(text *t, size_t n_bytes);

/* A JSON string, quotes included. Bytes that are not UTF-8 become U+FFFD each, so the result is
 * valid whatever comes. */
void text_json(text *t, const char *bytes, size_t n_bytes);
void text_json_string(text *t, const char *string); /* NULL: null */
/* The shortest decimal that reads back as the same float; -inf and NaN are -9999.0, as clients
 * expect of log-probabilities. */
void text_json_float(text *t, float x);

/* Length of the well-formed UTF-8 character at bytes, 0 when there is none. */
size_t utf8_length(const char *bytes, size_t n_bytes);
/* Characters of well-formed UTF-8. */
size_t utf8_count(const char *bytes, size_t n_bytes);

#endif
