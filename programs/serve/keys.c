#include "server.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

static bool add(key_list *list, const char *key, size_t n_bytes) {
    if (n_bytes == 0 || n_bytes >= KEY_BYTES) return false;
    void *bigger = realloc(list->keys, (list->n + 1) * sizeof *list->keys);
    if (!bigger) return false;
    list->keys = bigger;
    memset(list->keys[list->n], 0, KEY_BYTES);
    memcpy(list->keys[list->n++], key, n_bytes);
    return true;
}

bool keys_add_words(key_list *list, const char *words) {
    for (;;) {
        size_t n = strcspn(words, ",");
        if (!add(list, words, n)) return false;
        if (!words[n]) return true;
        words += n + 1;
    }
}

bool keys_add_lines(key_list *list, const char *lines) {
    while (*lines) {
        size_t n = strcspn(lines, "\n"), end = n;
        while (end && strchr(" \t\r", lines[end - 1])) end--;
        if (end && lines[0] != '#' && !add(list, lines, end)) return false;
        lines += n + (lines[n] == '\n');
    }
    return true;
}

bool keys_allow(const key_list *list, const char *authorization) {
    char given[KEY_BYTES] = {0};
    unsigned found = 0;
    if (list->n == 0) return true;
    if (!authorization || strncasecmp(authorization, "Bearer ", 7)) return false;
    size_t n = strlen(authorization + 7);
    while (n && strchr(" \t", authorization[7 + n - 1])) n--;
    if (n >= KEY_BYTES) return false;
    memcpy(given, authorization + 7, n);
    for (size_t i = 0; i < list->n; i++) {
        volatile unsigned char differs = 0; /* no early way out, for the compiler either */
        for (size_t k = 0; k < KEY_BYTES; k++)
            differs = (unsigned char)(differs | (given[k] ^ list->keys[i][k]));
        found |= differs == 0;
    }
    return found;
}

void keys_deinit(key_list *list) {
    if (list->keys) explicit_bzero(list->keys, list->n * sizeof *list->keys);
    free(list->keys);
    *list = (key_list){0};
}
