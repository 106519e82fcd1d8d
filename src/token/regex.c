/* regex.c: the patterns of a tokenizer.json, through PCRE2.
 *
 * They are written for Oniguruma. What it means otherwise is translated: \s and \w have the members
 * that Unicode gives them, \h is a hexadecimal digit, and x{1,3}+ repeats x{1,3} where PCRE2 would
 * take it as possessive. Nested and intersected classes are refused. */
#include "pipeline.h"

/* A pattern of the file may be written badly or on purpose so; a text of 10 MB needs far less. */
#define MATCH_LIMIT UINT32_C(200000000)
#define HEAP_LIMIT_KIB (256 * 1024)
enum { MAX_PATTERN_BYTES = 1 << 16 };

#define SPACES                                                                                     \
    "\\t-\\r\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}" \
    "\\x{3000}"
#define CIRCLED "\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"
#define WORDS "\\p{L}\\p{M}\\p{N}\\p{Pc}" CIRCLED
/* Rust's, behind a named pre-tokenizer. */
#define RUST_WORDS "\\p{L}\\p{M}\\p{Nl}\\p{Nd}\\p{Pc}" CIRCLED "\\x{200c}\\x{200d}"
const char *const ki_regex_gpt2 =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char *const ki_regex_word = "[" RUST_WORDS "]+|[^" RUST_WORDS "\\s]+";

static void *pcre_alloc(PCRE2_SIZE n_bytes, void *mem) {
    void *block;
    return ki_alloc(&block, mem, KI_TAG_other, n_bytes, NULL) == KIVI_OK ? block : NULL;
}

static void pcre_free(void *block, void *mem) { ki_free(mem, block); }

static kivi_status out_of_memory(kivi_error *err) {
    return KI_FAIL(err, NOMEM, "tokenizer.json: no memory for a regular expression");
}

kivi_status ki_regex_init(ki_pipeline *p, ki_mem *mem, kivi_error *err) {
    p->memory = pcre2_general_context_create(pcre_alloc, pcre_free, mem);
    if (!p->memory) return out_of_memory(err);
    p->limits = pcre2_match_context_create(p->memory);
    if (!p->limits) return out_of_memory(err);
    pcre2_set_match_limit(p->limits, MATCH_LIMIT);
    pcre2_set_heap_limit(p->limits, HEAP_LIMIT_KIB);
    return KIVI_OK;
}

void ki_regex_deinit(ki_pipeline *p) {
    pcre2_match_context_free(p->limits);
    pcre2_general_context_free(p->memory);
}

/* ---- translation ---- */

typedef struct translator {
    ki_buf *out;
    ki_span in;
    size_t at;
    bool in_class;
} translator;

static kivi_status put(translator *t, const char *text, kivi_error *err) {
    return ki_buf_append(t->out, text, strlen(text), err);
}

static kivi_status refuse(const translator *t, const char *what, kivi_error *err) {
    return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: the pattern \"%.80s\" has %s at %zu",
                   t->in.bytes, what, t->at);
}

/* A class of characters by its members, inside a class or as one. */
static kivi_status put_members(translator *t, const char *members, bool negated, kivi_error *err) {
    if (t->in_class && negated) return refuse(t, "a negated class in a class", err);
    if (!t->in_class) KI_TRY(put(t, negated ? "[^" : "[", err));
    KI_TRY(put(t, members, err));
    return t->in_class ? KIVI_OK : put(t, "]", err);
}

static kivi_status put_escape(translator *t, kivi_error *err) {
    char c = t->at + 1 < t->in.n_bytes ? t->in.bytes[t->at + 1] : 0;
    size_t begin = t->at;
    t->at += 2;
    switch (c) {
    case 's': return put_members(t, SPACES, false, err);
    case 'S':
        if (t->in_class) return put(t, "\\S", err);
        return put_members(t, SPACES, true, err);
    case 'w': return put_members(t, WORDS, false, err);
    case 'W': return put_members(t, WORDS, true, err);
    case 'h': return put_members(t, "0-9a-fA-F", false, err);
    case 'H': return put_members(t, "0-9a-fA-F", true, err);
    case 'u':
        if (t->at + 4 > t->in.n_bytes) return refuse(t, "an unfinished \\u", err);
        KI_TRY(put(t, "\\x{", err));
        KI_TRY(ki_buf_append(t->out, t->in.bytes + t->at, 4, err));
        t->at += 4;
        return put(t, "}", err);
    case 0: return refuse(t, "an unfinished escape", err);
    default: return ki_buf_append(t->out, t->in.bytes + begin, 2, err);
    }
}

/* At the '}' of x{n,m}, with a '+' behind it: x{1,m}+ is x+, x{0,m}+ is x*. What was written of
 * the braces is taken back. */
static kivi_status put_repeated(translator *t, kivi_error *err) {
    size_t open = t->out->n_bytes;
    while (open > 0 && t->out->data[open - 1] != '{') open--;
    const char *low = (const char *)t->out->data + open;
    bool is_count = open > 0 && open < t->out->n_bytes && (low[0] == '0' || low[0] == '1') &&
                    (open + 1 == t->out->n_bytes || low[1] == ',');
    if (!is_count) return refuse(t, "a repeated count", err);
    char sign = low[0] == '0' ? '*' : '+';
    t->out->n_bytes = open - 1;
    t->at += 2;
    return ki_buf_append(t->out, &sign, 1, err);
}

/* "\p{L}+" ends in a brace too, but not in a count. */
static bool ends_count(const translator *t) {
    size_t i = t->at;
    while (i > 0 &&
           (t->in.bytes[i - 1] == ',' || (t->in.bytes[i - 1] >= '0' && t->in.bytes[i - 1] <= '9')))
        i--;
    return i > 0 && i < t->at && t->in.bytes[i - 1] == '{';
}

static kivi_status put_next(translator *t, kivi_error *err) {
    const char *s = t->in.bytes + t->at;
    char next = t->at + 1 < t->in.n_bytes ? s[1] : 0;
    if (*s == '\\') return put_escape(t, err);
    if (!t->in_class && *s == '}' && next == '+' && ends_count(t)) return put_repeated(t, err);
    if (!t->in_class && *s == '[') {
        t->in_class = true;
        size_t n = next == '^' ? 2 : 1;
        bool brackets = t->at + n < t->in.n_bytes && s[n] == ']'; /* "[]" begins with a member */
        t->at += n + brackets;
        return ki_buf_append(t->out, s, n + brackets, err);
    }
    if (t->in_class && *s == '[' && next != ':') return refuse(t, "a class in a class", err);
    if (t->in_class && *s == '&' && next == '&') return refuse(t, "an intersection", err);
    if (t->in_class && *s == ']') t->in_class = false;
    if (t->in_class && *s == '[') { /* [:alpha:] */
        KI_TRY(ki_buf_append(t->out, s, 2, err));
        for (t->at += 2; t->at < t->in.n_bytes && t->in.bytes[t->at] != ']'; t->at++)
            KI_TRY(ki_buf_append(t->out, t->in.bytes + t->at, 1, err));
        s = t->in.bytes + t->at;
        if (t->at == t->in.n_bytes) return refuse(t, "an open class", err);
    }
    t->at++;
    return ki_buf_append(t->out, s, 1, err);
}

static kivi_status compile(pcre2_code **out, const ki_pipeline *p, ki_span pattern, uint32_t extra,
                           kivi_error *err) {
    int code = 0;
    PCRE2_SIZE offset = 0;
    char why[96] = "";
    pcre2_compile_context *context = pcre2_compile_context_create(p->memory);
    if (!context) return out_of_memory(err);
    *out = pcre2_compile((PCRE2_SPTR)pattern.bytes, pattern.n_bytes, PCRE2_UTF | extra, &code,
                         &offset, context);
    pcre2_compile_context_free(context);
    if (!*out && code == PCRE2_ERROR_HEAP_FAILED) return out_of_memory(err);
    if (!*out) {
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
        return KI_FAIL(err, UNSUPPORTED, "tokenizer.json: the pattern \"%.80s\": %s at %zu",
                       pattern.bytes, why, (size_t)offset);
    }
    (void)pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE);
    return KIVI_OK;
}

kivi_status ki_regex_compile(pcre2_code **out, const ki_pipeline *p, ki_span pattern,
                             bool is_literal, kivi_error *err) {
    ki_buf text;
    ki_mem *mem = p->normalized_text.mem;
    *out = NULL;
    if (pattern.n_bytes > MAX_PATTERN_BYTES)
        return KI_FAIL(err, FORMAT, "tokenizer.json: a pattern of %zu bytes, at most %d",
                       pattern.n_bytes, (int)MAX_PATTERN_BYTES);
    if (is_literal) return compile(out, p, pattern, PCRE2_LITERAL, err);
    ki_buf_init(&text, mem, 64 * (size_t)MAX_PATTERN_BYTES);
    translator t = {.out = &text, .in = pattern};
    kivi_status status = KIVI_OK;
    while (t.at < pattern.n_bytes && status == KIVI_OK) status = put_next(&t, err);
    if (status == KIVI_OK) status = ki_buf_append(&text, "", 1, err); /* for messages */
    if (status == KIVI_OK)
        status =
            compile(out, p, (ki_span){(const char *)text.data, text.n_bytes - 1}, PCRE2_UCP, err);
    ki_buf_deinit(&text);
    return status;
}

/* ---- matching ---- */

static kivi_status match_failed(int code, kivi_error *err) {
    char why[96] = "";
    if (code == PCRE2_ERROR_NOMEMORY) return out_of_memory(err);
    pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
    return KI_FAIL(err, ARG, "tokenizer: the text could not be split: %s (pcre2 %d)", why, code);
}

kivi_status ki_regex_next(size_t *begin, size_t *end, bool *found, const ki_pipeline *p,
                          pcre2_match_data *match, const pcre2_code *code, ki_span text,
                          size_t from, kivi_error *err) {
    int n = pcre2_match(code, (PCRE2_SPTR)text.bytes, text.n_bytes, from, PCRE2_NO_UTF_CHECK, match,
                        p->limits);
    /* Compiled code has a small stack; the interpreter takes the heap. */
    if (n == PCRE2_ERROR_JIT_STACKLIMIT)
        n = pcre2_match(code, (PCRE2_SPTR)text.bytes, text.n_bytes, from,
                        PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, match, p->limits);
    *found = n >= 0;
    if (n == PCRE2_ERROR_NOMATCH) return KIVI_OK;
    if (n < 0) return match_failed(n, err);
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(match);
    *begin = ends[0];
    *end = ends[1];
    /* \K can put the begin past the end, or before where we are. */
    if (*begin < from || *end < *begin)
        return KI_FAIL(err, UNSUPPORTED, "tokenizer: a pattern whose match begins elsewhere");
    return KIVI_OK;
}
