/* normalize.c: the normalizers of a tokenizer.json, on valid UTF-8. */
#include "pipeline.h"

#include <stdlib.h>

#include <utf8proc.h>

enum { MAX_DECOMPOSED = 32 }; /* U+FDFA has 18 */

static kivi_status put_character(ki_buf *out, uint32_t c, kivi_error *err) {
    char bytes[4];
    return ki_buf_append(out, bytes, ki_character_write(bytes, c), err);
}

/* ---- white space and words ---- */

bool ki_is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

/* The character that ends at `at`; *begin: where it begins. */
static uint32_t character_before(ki_span text, size_t at, size_t *begin) {
    size_t from = at - 1;
    while (from > 0 && at - from < 4 && ((unsigned char)text.bytes[from] & 0xc0) == 0x80) from--;
    *begin = from;
    uint32_t c = ki_next_character(text, &from);
    if (from == at) return c;
    *begin = at - 1;
    return (uint32_t)KI_MALFORMED;
}

size_t ki_space_before(ki_span text, size_t at) {
    size_t begin;
    while (at > 0 && ki_is_space(character_before(text, at, &begin))) at = begin;
    return at;
}

size_t ki_space_after(ki_span text, size_t at) {
    for (size_t next = at; next < text.n_bytes; at = next)
        if (!ki_is_space(ki_next_character(text, &next))) break;
    return at;
}

/* Rust's \w: letters, marks, decimal digits, connectors, and letter-like numbers and signs. */
static bool is_word(uint32_t c) {
    if (c >= KI_MALFORMED) return false;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default:
        return c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) ||
               (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
               (c >= 0x1f170 && c <= 0x1f189);
    }
}

bool ki_stands_alone(ki_span text, size_t begin, size_t end) {
    size_t at = end, before;
    if (end < text.n_bytes && is_word(ki_next_character(text, &at))) return false;
    return begin == 0 || !is_word(character_before(text, begin, &before));
}

kivi_status ki_write_alphabet(ki_buf *out, ki_span text, kivi_error *err) {
    unsigned char chunk[512];
    for (size_t at = 0; at < text.n_bytes;) {
        size_t n = 0;
        for (; at < text.n_bytes && n + 2 <= sizeof chunk; at++)
            n += ki_alphabet_write(chunk + n, (unsigned char)text.bytes[at]);
        KI_TRY(ki_buf_append(out, chunk, n, err));
    }
    return KIVI_OK;
}

/* ---- Unicode's normal forms ----
 *
 * utf8proc sorts combining marks by exchanging neighbours, which takes the square of a run's
 * length; a run can be the whole text. So only its tables and its composition are used, and the
 * sorting is done here: by counting classes, in the order of their arrival. */

typedef struct marked {
    int32_t character;
    uint32_t order; /* class << 24 | arrival: unique, so that any sort is stable */
} marked;

static int compare_marks(const void *a, const void *b) {
    const marked *x = a, *y = b;
    return x->order < y->order ? -1 : x->order > y->order;
}

static uint32_t class_of(int32_t c) { return (uint32_t)utf8proc_get_property(c)->combining_class; }

/* characters [n] with all marks behind their base: sorts each run of marks. scratch [n]. */
static void order_marks(int32_t *characters, size_t n, marked *scratch) {
    for (size_t at = 0; at < n; at++) {
        size_t end = at;
        while (end < n && class_of(characters[end]) && end - at < 1u << 24) {
            scratch[end - at] =
                (marked){characters[end], class_of(characters[end]) << 24 | (uint32_t)(end - at)};
            end++;
        }
        if (end - at > 1) {
            qsort(scratch, end - at, sizeof *scratch, compare_marks);
            for (size_t i = at; i < end; i++) characters[i] = scratch[i - at].character;
        }
        if (end > at) at = end - 1;
    }
}

static kivi_status decompose(ki_buf *out, ki_span text, bool is_compatible, kivi_error *err) {
    int options = UTF8PROC_DECOMPOSE | UTF8PROC_STABLE | (is_compatible ? UTF8PROC_COMPAT : 0);
    int32_t parts[MAX_DECOMPOSED];
    for (size_t at = 0; at < text.n_bytes;) {
        int32_t c = (int32_t)ki_next_character(text, &at);
        int last = 0;
        utf8proc_ssize_t n =
            utf8proc_decompose_char(c, parts, MAX_DECOMPOSED, (utf8proc_option_t)options, &last);
        if (n < 0 || n > MAX_DECOMPOSED) {
            parts[0] = c;
            n = 1;
        }
        KI_TRY(ki_buf_append(out, parts, (size_t)n * sizeof *parts, err));
    }
    return KIVI_OK;
}

static kivi_status write_form(ki_buf *out, int32_t *characters, size_t n, bool composes,
                              kivi_error *err) {
    int options = UTF8PROC_STABLE | (composes ? UTF8PROC_COMPOSE : 0);
    utf8proc_ssize_t n_left =
        utf8proc_normalize_utf32(characters, (utf8proc_ssize_t)n, (utf8proc_option_t)options);
    for (utf8proc_ssize_t i = 0; i < n_left; i++)
        KI_TRY(put_character(out, (uint32_t)characters[i], err));
    return KIVI_OK;
}

static kivi_status normal_form_of(ki_buf *out, ki_span text, bool is_compatible, bool composes,
                                  kivi_error *err) {
    ki_buf characters;
    void *scratch = NULL;
    ki_buf_init(&characters, out->mem, (size_t)MAX_DECOMPOSED * 4 * text.n_bytes + 64);
    kivi_status status = decompose(&characters, text, is_compatible, err);
    size_t n = characters.n_bytes / sizeof(int32_t);
    int32_t *list = (int32_t *)(void *)characters.data;
    if (status == KIVI_OK)
        status = ki_alloc_array(&scratch, out->mem, KI_TAG_other, n, sizeof(marked), err);
    if (status == KIVI_OK) {
        order_marks(list, n, scratch);
        status = write_form(out, list, n, composes, err);
    }
    ki_free(out->mem, scratch);
    ki_buf_deinit(&characters);
    return status;
}

/* ASCII is in every normal form, and does not change with what stands before it: a text is copied
 * up to the character before the first other one, and from the next ASCII pair on. */
static kivi_status normal_form(ki_buf *out, ki_span text, bool is_compatible, bool composes,
                               kivi_error *err) {
    for (size_t at = 0; at < text.n_bytes;) {
        size_t end = at;
        while (end < text.n_bytes && !((unsigned char)text.bytes[end] & 0x80)) end++;
        size_t n_plain = end == text.n_bytes ? end - at : end - at - (end > at);
        KI_TRY(ki_buf_append(out, text.bytes + at, n_plain, err));
        at += n_plain;
        while (end < text.n_bytes && ((unsigned char)text.bytes[end] & 0x80)) end++;
        if (at == end) continue;
        KI_TRY(normal_form_of(out, (ki_span){text.bytes + at, end - at}, is_compatible, composes,
                              err));
        at = end;
    }
    return KIVI_OK;
}

/* ---- the others ---- */

static kivi_status lowercase(ki_buf *out, ki_span text, kivi_error *err) {
    for (size_t at = 0; at < text.n_bytes;) {
        uint32_t c = ki_next_character(text, &at);
        bool is_dotted = c == 0x130; /* the one capital whose small letter is two characters */
        KI_TRY(put_character(out, is_dotted ? 'i' : (uint32_t)utf8proc_tolower((int32_t)c), err));
        if (is_dotted) KI_TRY(put_character(out, 0x307, err));
    }
    return KIVI_OK;
}

static kivi_status strip_accents(ki_buf *out, ki_span text, kivi_error *err) {
    for (size_t at = 0; at < text.n_bytes;) {
        uint32_t c = ki_next_character(text, &at);
        utf8proc_category_t category = utf8proc_category((int32_t)c);
        if (category >= UTF8PROC_CATEGORY_MN && category <= UTF8PROC_CATEGORY_ME) continue;
        KI_TRY(put_character(out, c, err));
    }
    return KIVI_OK;
}

static kivi_status replace(ki_buf *out, const ki_pipeline *p, const ki_norm *norm, ki_pass *run,
                           ki_span text, kivi_error *err) {
    size_t from = 0, copied = 0, begin = 0, end = 0;
    for (bool found = true; from <= text.n_bytes;) {
        KI_TRY(ki_regex_next(&begin, &end, &found, p, run->match, norm->pattern, text, from, err));
        if (!found) break;
        KI_TRY(ki_buf_append(out, text.bytes + copied, begin - copied, err));
        KI_TRY(ki_buf_append(out, norm->content.bytes, norm->content.n_bytes, err));
        copied = from = end;
        if (begin < end) continue;
        if (from < text.n_bytes) (void)ki_next_character(text, &from);
        else from++;
    }
    return ki_buf_append(out, text.bytes + copied, text.n_bytes - copied, err);
}

static kivi_status apply(ki_buf *out, const ki_pipeline *p, const ki_norm *norm, ki_pass *run,
                         ki_span text, kivi_error *err) {
    size_t from = 0, to = text.n_bytes;
    switch (norm->kind) {
    case KI_NORM_PREPEND:
        KI_TRY(ki_buf_append(out, norm->content.bytes, norm->content.n_bytes, err));
        return ki_buf_append(out, text.bytes, text.n_bytes, err);
    case KI_NORM_REPLACE: return replace(out, p, norm, run, text, err);
    case KI_NORM_NFC: return normal_form(out, text, false, true, err);
    case KI_NORM_NFD: return normal_form(out, text, false, false, err);
    case KI_NORM_NFKC: return normal_form(out, text, true, true, err);
    case KI_NORM_NFKD: return normal_form(out, text, true, false, err);
    case KI_NORM_LOWERCASE: return lowercase(out, text, err);
    case KI_NORM_STRIP_ACCENTS: return strip_accents(out, text, err);
    case KI_NORM_ALPHABET: return ki_write_alphabet(out, text, err);
    case KI_NORM_STRIP: break;
    }
    if (norm->left) from = ki_space_after(text, 0);
    if (norm->right) to = KI_MAX(ki_space_before(text, to), from);
    return ki_buf_append(out, text.bytes + from, to - from, err);
}

kivi_status ki_normalize(ki_span *out, const ki_pipeline *p, ki_pass *run, ki_span text,
                         kivi_error *err) {
    for (size_t i = 0; i < p->n_norms && text.n_bytes; i++) {
        ki_buf *buf = &run->norms[i & 1];
        buf->n_bytes = 0;
        KI_TRY(apply(buf, p, &p->norms[i], run, text, err));
        text = (ki_span){(const char *)buf->data, buf->n_bytes};
    }
    *out = text;
    return KIVI_OK;
}
