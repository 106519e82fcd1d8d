/* special.c: tokens that are recognised as they are spelled. Vocabularies have thousands of them
 * with one first byte ("<unused17>"), and a hostile text may be that byte over and over; so they
 * are sorted, and a look at each further byte of the text narrows the range of candidates. */
#include "token_private.h"

#include <stdlib.h>

static int compare(const void *a, const void *b) {
    const ki_special *x = a, *y = b;
    int order = memcmp(x->text.bytes, y->text.bytes, KI_MIN(x->text.n_bytes, y->text.n_bytes));
    if (order) return order;
    if (x->text.n_bytes != y->text.n_bytes) return x->text.n_bytes < y->text.n_bytes ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

void ki_specials_sort(ki_specials *specials) {
    if (!specials->n_items) return;
    qsort(specials->items, specials->n_items, sizeof *specials->items, compare);
    for (size_t i = 0; i < specials->n_items; i++)
        specials->first[(unsigned char)specials->items[i].text.bytes[0] + 1]++;
    for (size_t b = 0; b < 256; b++) specials->first[b + 1] += specials->first[b];
}

/* The byte at `depth`; items that end before come first. */
static int byte_at(const ki_special *item, size_t depth) {
    return depth < item->text.n_bytes ? (unsigned char)item->text.bytes[depth] : -1;
}

/* The first of items [from, to) whose byte at depth is at least `byte`. */
static size_t bound(const ki_specials *s, size_t from, size_t to, size_t depth, int byte) {
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (byte_at(&s->items[middle], depth) < byte) from = middle + 1;
        else to = middle;
    }
    return from;
}

const ki_special *ki_specials_at(const ki_specials *specials, ki_span text, size_t n_control) {
    unsigned char first = (unsigned char)text.bytes[0];
    const ki_special *found = NULL;
    size_t from = specials->first[first], to = specials->first[first + 1];
    for (size_t depth = 1; from < to; depth++) {
        /* Those that end here are the first ones of the range. */
        for (; from < to && specials->items[from].text.n_bytes == depth; from++)
            if (!specials->items[from].is_control || depth <= n_control) {
                if (!found || found->text.n_bytes < depth) found = &specials->items[from];
            }
        if (depth == text.n_bytes) break;
        int byte = (unsigned char)text.bytes[depth];
        from = bound(specials, from, to, depth, byte);
        to = bound(specials, from, to, depth, byte + 1);
    }
    return found;
}
