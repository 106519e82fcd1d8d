#include "text.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void text_init(text *t, size_t max_bytes) { *t = (text){.max_bytes = max_bytes}; }

void text_deinit(text *t) {
    free(t->data);
    *t = (text){.max_bytes = t->max_bytes};
}

static bool make_room(text *t, size_t n_bytes) {
    if (t->failed || n_bytes > t->max_bytes - t->n_bytes) {
        t->failed = true;
        return false;
    }
    size_t want = t->n_bytes + n_bytes + 1, cap = t->cap_bytes ? t->cap_bytes : 256;
    if (want <= t->cap_bytes) return true;
    while (cap < want) cap *= 2;
    char *bigger = realloc(t->data, cap);
    t->failed = !bigger;
    if (!bigger) return false;
    t->data = bigger;
    t->cap_bytes = cap;
    return true;
}

void text_put(text *t, const char *bytes, size_t n_bytes) {
    if (!make_room(t, n_bytes)) return;
    if (n_bytes) memcpy(t->data + t->n_bytes, bytes, n_bytes);
    t->n_bytes += n_bytes;
    t->data[t->n_bytes] = 0;
}

void text_puts(text *t, const char *string) { text_put(t, string, strlen(string)); }

void text_printf(text *t, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0) t->failed = true;
    else if (make_room(t, (size_t)n)) {
        vsnprintf(t->data + t->n_bytes, (size_t)n + 1, format, again);
        t->n_bytes += (size_t)n;
    }
    va_end(again);
}

void text_drop(text *t, size_t n_bytes) {
    t->n_bytes -= n_bytes;
    if (t->n_bytes) memmove(t->data, t->data + n_bytes, t->n_bytes);
}

size_t utf8_length(const char *bytes, size_t n_bytes) {
    const unsigned char *b = (const unsigned char *)bytes;
    unsigned char low = 0x80, high = 0xbf;
    size_t n;
    if (!n_bytes) return 0;
    if (b[0] < 0x80) return 1;
    if (b[0] < 0xc2 || b[0] > 0xf4) return 0;
    n = b[0] < 0xe0 ? 2 : b[0] < 0xf0 ? 3 : 4;
    if (n > n_bytes) return 0;
    if (b[0] == 0xe0) low = 0xa0;  /* no longer form than needed */
    if (b[0] == 0xed) high = 0x9f; /* no surrogates */
    if (b[0] == 0xf0) low = 0x90;
    if (b[0] == 0xf4) high = 0x8f; /* not beyond U+10FFFF */
    if (b[1] < low || b[1] > high) return 0;
    for (size_t i = 2; i < n; i++)
        if (b[i] < 0x80 || b[i] > 0xbf) return 0;
    return n;
}

size_t utf8_count(const char *bytes, size_t n_bytes) {
    size_t n = 0;
    for (size_t i = 0; i < n_bytes; i++) n += ((unsigned char)bytes[i] & 0xc0) != 0x80;
    return n;
}

static void put_escaped(text *t, unsigned char c) {
    static const char letters[] = "btnvfr"; /* of 8 to 13; JSON has no \v */
    char escape[8];
    if (c == '"' || c == '\\') snprintf(escape, sizeof escape, "\\%c", c);
    else if (c >= 8 && c <= 13 && c != 11) snprintf(escape, sizeof escape, "\\%c", letters[c - 8]);
    else snprintf(escape, sizeof escape, "\\u%04x", c);
    text_puts(t, escape);
}

void text_json(text *t, const char *bytes, size_t n_bytes) {
    text_put(t, "\"", 1);
    for (size_t i = 0; i < n_bytes;) {
        size_t plain = i;
        size_t n = 0;
        while (plain < n_bytes) {
            unsigned char c = (unsigned char)bytes[plain];
            n = utf8_length(bytes + plain, n_bytes - plain);
            if (n == 0 || c < 0x20 || c == '"' || c == '\\' || c == 0x7f) break;
            plain += n;
        }
        text_put(t, bytes + i, plain - i);
        i = plain;
        if (i == n_bytes) break;
        if (n == 0) text_puts(t, "\xef\xbf\xbd");
        else put_escaped(t, (unsigned char)bytes[i]);
        i++;
    }
    text_put(t, "\"", 1);
}

void text_json_string(text *t, const char *string) {
    if (string) text_json(t, string, strlen(string));
    else text_puts(t, "null");
}

void text_json_float(text *t, float x) {
    char digits[40];
    if (!isfinite(x)) {
        text_puts(t, "-9999.0");
        return;
    }
    for (int precision = 6; precision <= 9; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, (double)x);
        if (strtof(digits, NULL) == x) break;
    }
    text_puts(t, digits);
    if (!strpbrk(digits, ".e")) text_puts(t, ".0");
}
