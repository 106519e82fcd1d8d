#include "load_private.h"

#include <stdlib.h>

/* One-line, printable text: errors end up in terminals and logs, and names come from the file. */
const char *ki_show(char out[KI_SHOW_BYTES], ki_str text) {
    size_t room = KI_SHOW_BYTES - 4, n = KI_MIN(text.n_bytes, room);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text.bytes[i];
        out[i] = c < 0x20 || c >= 0x7f ? '?' : text.bytes[i];
    }
    memcpy(out + n, text.n_bytes > room ? "..." : "", text.n_bytes > room ? 4 : 1);
    return out;
}

/* Bytes of UTF-8 in a path stay, the user typed them; controls would break the line. */
static char path_byte(char c) { return (unsigned char)c < 0x20 || c == 0x7f ? '?' : c; }

void ki_label(char out[KI_LABEL_BYTES], const char *folder, const char *leaf) {
    size_t n_folder = strlen(folder), n_leaf = leaf ? strlen(leaf) + 1 : 0;
    size_t room = KI_LABEL_BYTES - 1 - n_leaf, from = 0, n = 0;
    if (n_folder > room) {
        from = n_folder - (room - 3);
        while (((unsigned char)folder[from] & 0xc0) == 0x80) from++; /* not inside a character */
        memcpy(out, "...", 3);
        n = 3;
    }
    while (from < n_folder) out[n++] = path_byte(folder[from++]);
    if (leaf) {
        out[n++] = '/';
        memcpy(out + n, leaf, n_leaf - 1);
        n += n_leaf - 1;
    }
    out[n] = 0;
}

ki_str ki_str_of(const char *text) { return (ki_str){text, strlen(text)}; }

int ki_str_compare(ki_str a, ki_str b) {
    size_t n = KI_MIN(a.n_bytes, b.n_bytes);
    int order = n ? memcmp(a.bytes, b.bytes, n) : 0;
    return order ? order : (a.n_bytes > b.n_bytes) - (a.n_bytes < b.n_bytes);
}

/* For qsort and bsearch. */
static int compare_names(const void *a, const void *b) {
    return ki_str_compare(((const ki_name *)a)->text, ((const ki_name *)b)->text);
}

kivi_status ki_names_sort(ki_name *names, size_t n_names, const char *what, const char *label,
                          kivi_error *err) {
    char shown[KI_SHOW_BYTES];
    if (n_names) qsort(names, n_names, sizeof *names, compare_names);
    for (size_t i = 1; i < n_names; i++)
        if (!compare_names(&names[i - 1], &names[i]))
            return KI_FAIL(err, FORMAT, "%s: %s %s stands there twice, as numbers %zu and %zu",
                           label, what, ki_show(shown, names[i].text),
                           KI_MIN(names[i - 1].item, names[i].item),
                           KI_MAX(names[i - 1].item, names[i].item));
    return KIVI_OK;
}

const ki_name *ki_names_find(const ki_name *names, size_t n_names, ki_str text) {
    ki_name key = {.text = text};
    return n_names ? bsearch(&key, names, n_names, sizeof *names, compare_names) : NULL;
}
