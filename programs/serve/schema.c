#include "schema.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_NESTING = 64,
    MAX_REFS = 1024,
    MAX_PROPERTIES = 2048,
    MAX_COUNT = 65536, /* of minItems, maxLength and their like */
    MAX_DIGITS = 16,   /* a float64 holds 15 to 17 */
    MAX_INDENT = 32
};

enum shared { SPACE, STRING, CHARACTER, NUMBER, INTEGER, ANY, OBJECT, ARRAY, COMMA, N_SHARED };

typedef struct compiler {
    grammar *g;
    const json_t *root;
    struct {
        const json_t *schema;
        node *forward;
    } refs[MAX_REFS];
    size_t n_refs;
    node *shared[N_SHARED];
    char *error;
    size_t n_error;
    bool failed;
    int depth;
} compiler;

static node *refuse(compiler *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
static node *refuse(compiler *c, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (!c->failed) vsnprintf(c->error, c->n_error, format, args);
    va_end(args);
    c->failed = true;
    return NULL;
}

/* ---- JSON itself ---- */

#define SEQ(g, ...)                                                                                \
    grammar_sequence(g, sizeof((node *[]){__VA_ARGS__}) / sizeof(node *), (node *[]){__VA_ARGS__})
#define ALT(g, ...)                                                                                \
    grammar_choice(g, sizeof((node *[]){__VA_ARGS__}) / sizeof(node *), (node *[]){__VA_ARGS__})

static node *word(grammar *g, const char *text) { return grammar_literal(g, text, strlen(text)); }
static node *optional(grammar *g, node *part) { return grammar_repeat(g, part, 0, 1); }

static node *make_space(grammar *g) {
    node *indent = grammar_repeat(g, grammar_set(g, "  \t\t"), 0, MAX_INDENT);
    return optional(g, ALT(g, word(g, " "), SEQ(g, word(g, "\n"), indent)));
}

/* Well-formed UTF-8 beyond ASCII. */
static node *make_multibyte(grammar *g) {
    node *tail = grammar_range(g, 0x80, 0xbf);
    return ALT(g, SEQ(g, grammar_range(g, 0xc2, 0xdf), tail),
               SEQ(g, grammar_range(g, 0xe0, 0xe0), grammar_range(g, 0xa0, 0xbf), tail),
               SEQ(g, grammar_range(g, 0xe1, 0xec), tail, tail),
               SEQ(g, grammar_range(g, 0xed, 0xed), grammar_range(g, 0x80, 0x9f), tail),
               SEQ(g, grammar_range(g, 0xee, 0xef), tail, tail),
               SEQ(g, grammar_range(g, 0xf0, 0xf0), grammar_range(g, 0x90, 0xbf), tail, tail),
               SEQ(g, grammar_range(g, 0xf1, 0xf3), tail, tail, tail),
               SEQ(g, grammar_range(g, 0xf4, 0xf4), grammar_range(g, 0x80, 0x8f), tail, tail));
}

/* One character of a string. Of escapes by number those of surrogates are left out, for a pair of
 * them would be one character, and that of NUL, which many readers of JSON refuse (jansson in keys,
 * databases anywhere). */
static node *make_character(grammar *g) {
    node *hex = grammar_set(g, "09afAF"), *zero = word(g, "0"), *more = grammar_set(g, "19afAF");
    node *to_ff = ALT(g, SEQ(g, more, hex), SEQ(g, zero, more));
    node *to_fff = ALT(g, SEQ(g, more, hex, hex), SEQ(g, zero, to_ff));
    node *number =
        ALT(g, SEQ(g, grammar_set(g, "19acefACEF"), hex, hex, hex),
            SEQ(g, grammar_set(g, "ddDD"), grammar_set(g, "07"), hex, hex), SEQ(g, zero, to_fff));
    node *escape = ALT(g, grammar_set(g, "\"\"\\\\//bbffnnrrtt"), SEQ(g, word(g, "u"), number));
    return ALT(g, grammar_set(g, " !#[]~"), make_multibyte(g), SEQ(g, word(g, "\\"), escape));
}

static node *make_integer(grammar *g) {
    node *digits = grammar_repeat(g, grammar_set(g, "09"), 0, MAX_DIGITS - 1);
    return SEQ(g, optional(g, word(g, "-")),
               ALT(g, word(g, "0"), SEQ(g, grammar_set(g, "19"), digits)));
}

static node *make_number(grammar *g) {
    node *digit = grammar_set(g, "09");
    node *fraction = SEQ(g, word(g, "."), grammar_repeat(g, digit, 1, MAX_DIGITS));
    node *exponent = SEQ(g, grammar_set(g, "eeEE"), optional(g, grammar_set(g, "++--")),
                         grammar_repeat(g, digit, 1, 2));
    return SEQ(g, make_integer(g), optional(g, fraction), optional(g, exponent));
}

static node *shared(compiler *c, enum shared which);

/* open (item (comma item)*)? close; min and max count items. */
static node *bracketed(compiler *c, const char *open, node *item, uint32_t min, uint32_t max,
                       const char *close) {
    grammar *g = c->g;
    node *space = shared(c, SPACE);
    if (max == 0) return SEQ(g, word(g, open), space, word(g, close));
    uint32_t more = max == GRAMMAR_MANY ? GRAMMAR_MANY : max - 1;
    node *rest = grammar_repeat(g, SEQ(g, shared(c, COMMA), item), min ? min - 1 : 0, more);
    node *items = SEQ(g, item, rest, space);
    return SEQ(g, word(g, open), space, min ? items : optional(g, items), word(g, close));
}

static node *pair(compiler *c, node *key, node *value) {
    return SEQ(c->g, key, word(c->g, ":"), shared(c, SPACE), value);
}

static void make_any(compiler *c) {
    grammar *g = c->g;
    node *any = c->shared[ANY] = grammar_forward(g);
    c->shared[OBJECT] = bracketed(c, "{", pair(c, shared(c, STRING), any), 0, GRAMMAR_MANY, "}");
    c->shared[ARRAY] = bracketed(c, "[", any, 0, GRAMMAR_MANY, "]");
    grammar_resolve(any,
                    ALT(g, c->shared[OBJECT], c->shared[ARRAY], shared(c, STRING),
                        shared(c, NUMBER), word(g, "true"), word(g, "false"), word(g, "null")));
}

static node *make_string(compiler *c, uint32_t min, uint32_t max) {
    return SEQ(c->g, word(c->g, "\""), grammar_repeat(c->g, shared(c, CHARACTER), min, max),
               word(c->g, "\""));
}

static node *shared(compiler *c, enum shared which) {
    if (c->shared[which]) return c->shared[which];
    switch (which) {
    case SPACE: c->shared[SPACE] = make_space(c->g); break;
    case CHARACTER: c->shared[CHARACTER] = make_character(c->g); break;
    case STRING: c->shared[STRING] = make_string(c, 0, GRAMMAR_MANY); break;
    case NUMBER: c->shared[NUMBER] = make_number(c->g); break;
    case INTEGER: c->shared[INTEGER] = make_integer(c->g); break;
    case COMMA:
        c->shared[COMMA] = SEQ(c->g, shared(c, SPACE), word(c->g, ","), shared(c, SPACE));
        break;
    case ANY:
    case OBJECT:
    case ARRAY:
    case N_SHARED: make_any(c); break;
    }
    return c->shared[which];
}

/* ---- integers in a range ---- */

/* Numbers of as many digits as low and high have, from low to high; a side is tight while all
 * digits so far were its own. */
static node *digits_between(grammar *g, const char *low, const char *high, bool tight_low,
                            bool tight_high) {
    size_t n = strlen(low);
    if (n == 0) return grammar_sequence(g, 0, NULL);
    if (!tight_low && !tight_high)
        return grammar_repeat(g, grammar_set(g, "09"), (uint32_t)n, (uint32_t)n);
    int a = tight_low ? *low : '0', b = tight_high ? *high : '9';
    node *parts[3];
    size_t n_parts = 0;
    if (tight_low && tight_high && a == b)
        return SEQ(g, grammar_literal(g, low, 1), digits_between(g, low + 1, high + 1, true, true));
    if (tight_low)
        parts[n_parts++] =
            SEQ(g, grammar_literal(g, low, 1), digits_between(g, low + 1, high + 1, true, false));
    if (tight_high)
        parts[n_parts++] =
            SEQ(g, grammar_literal(g, high, 1), digits_between(g, low + 1, high + 1, false, true));
    a += tight_low;
    b -= tight_high;
    if (a <= b)
        parts[n_parts++] = SEQ(g, grammar_range(g, (unsigned)a, (unsigned)b),
                               digits_between(g, low + 1, high + 1, false, false));
    return grammar_choice(g, n_parts, parts);
}

/* 0 <= low <= high < 10^MAX_DIGITS. */
static node *natural_between(grammar *g, int64_t low, int64_t high) {
    node *parts[MAX_DIGITS];
    size_t n_parts = 0;
    int64_t least = 0, most = 9; /* of as many digits */
    for (int n_digits = 1; n_digits <= MAX_DIGITS; n_digits++) {
        char a[24], b[24];
        int64_t from = low > least ? low : least, to = high < most ? high : most;
        if (from <= to) {
            snprintf(a, sizeof a, "%lld", (long long)from);
            snprintf(b, sizeof b, "%lld", (long long)to);
            parts[n_parts++] = digits_between(g, a, b, true, true);
        }
        least = most + 1;
        most = most * 10 + 9;
    }
    return grammar_choice(g, n_parts, parts);
}

static node *integer_between(grammar *g, int64_t low, int64_t high) {
    node *negative = NULL, *natural = NULL;
    if (low < 0) negative = SEQ(g, word(g, "-"), natural_between(g, high < 0 ? -high : 1, -low));
    if (high >= 0) natural = natural_between(g, low > 0 ? low : 0, high);
    return !negative ? natural : !natural ? negative : ALT(g, negative, natural);
}

/* A bound as an integer; false: it is there and is none. */
static bool read_bound(int64_t *out, const json_t *schema, const char *key, int64_t absent,
                       int64_t shift) {
    const json_t *value = json_object_get(schema, key);
    int64_t most = 1;
    for (int i = 0; i < MAX_DIGITS; i++) most *= 10;
    *out = absent;
    if (!value) return true;
    double real = json_number_value(value);
    if (!json_is_number(value) || real != (double)(int64_t)real || real <= (double)-most ||
        real >= (double)most)
        return false;
    *out = (json_is_integer(value) ? json_integer_value(value) : (int64_t)real) + shift;
    return true;
}

static node *compile_integer(compiler *c, const json_t *schema, const char *path) {
    static const char *const keys[] = {"minimum", "exclusiveMinimum", "maximum",
                                       "exclusiveMaximum"};
    int64_t most = 1, bounds[4];
    bool any = false;
    for (int i = 0; i < MAX_DIGITS; i++) most *= 10;
    most -= 1;
    for (int i = 0; i < 4; i++) {
        any = any || json_object_get(schema, keys[i]);
        if (!read_bound(&bounds[i], schema, keys[i], i < 2 ? -most : most,
                        i == 1   ? 1
                        : i == 3 ? -1
                                 : 0))
            return refuse(c, "%s.%s: expected a whole number of at most %d digits", path, keys[i],
                          MAX_DIGITS);
    }
    if (!any) return shared(c, INTEGER);
    int64_t low = bounds[0] > bounds[1] ? bounds[0] : bounds[1];
    int64_t high = bounds[2] < bounds[3] ? bounds[2] : bounds[3];
    if (low > high) return refuse(c, "%s: no integer lies between its bounds", path);
    return integer_between(c->g, low, high);
}

/* ---- objects ---- */

static node *compile(compiler *c, const json_t *schema, const char *path);

static bool read_count(compiler *c, uint32_t *out, const json_t *schema, const char *key,
                       uint32_t absent, const char *path) {
    const json_t *value = json_object_get(schema, key);
    *out = absent;
    if (!value) return true;
    json_int_t n = json_integer_value(value);
    if (!json_is_integer(value) || n < 0 || n > MAX_COUNT) {
        refuse(c, "%s.%s: expected a number from 0 to %d", path, key, MAX_COUNT);
        return false;
    }
    *out = (uint32_t)n;
    return true;
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Strings that are none of names[n] (sorted; all alike in their first `at` bytes), from there on to
 * the closing quote. Escapes would be second spellings of a name: they may come only once the
 * string differs. */
static node *other_name(compiler *c, const char *const *names, size_t n, size_t at) {
    grammar *g = c->g;
    node *parts[260];
    size_t n_parts = 0, i = 0;
    node *rest = SEQ(g, grammar_repeat(g, shared(c, CHARACTER), 0, GRAMMAR_MANY), word(g, "\""));
    bool is_name = n && !names[0][at], taken[128] = {false};
    if (is_name) i++;
    else parts[n_parts++] = word(g, "\"");
    while (i < n) {
        unsigned char byte = (unsigned char)names[i][at];
        size_t first = i;
        while (i < n && (unsigned char)names[i][at] == byte) i++;
        if (byte >= 128 || byte < ' ' || byte == '"' || byte == '\\') continue;
        taken[byte] = true;
        parts[n_parts++] = SEQ(g, grammar_literal(g, (char *)&byte, 1),
                               other_name(c, names + first, i - first, at + 1));
    }
    for (unsigned byte = ' '; byte < 127; byte++)
        if (!taken[byte] && byte != '"' && byte != '\\')
            parts[n_parts++] = SEQ(g, grammar_range(g, byte, byte), rest);
    return grammar_choice(g, n_parts, parts);
}

typedef struct members {
    node *pairs[MAX_PROPERTIES];
    bool required[MAX_PROPERTIES];
    const char *names[MAX_PROPERTIES];
    size_t n;
    node *further; /* a pair of additionalProperties, or NULL */
} members;

static node *json_literal(compiler *c, const json_t *value) {
    char *dump = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    node *n = dump ? word(c->g, dump) : NULL;
    free(dump);
    return n;
}

static bool is_required(const json_t *required, const char *name) {
    const json_t *item;
    size_t i;
    json_array_foreach(required, i, item) {
        const char *text = json_string_value(item);
        if (text && !strcmp(text, name)) return true;
    }
    return false;
}

static void add_member(compiler *c, members *m, const char *name, const json_t *schema,
                       bool required, const char *path) {
    char where[512];
    if (m->n == MAX_PROPERTIES) {
        refuse(c, "%s.properties: more than %d", path, MAX_PROPERTIES);
        return;
    }
    snprintf(where, sizeof where, "%s.properties.%s", path, name);
    json_t *key = json_string(name);
    node *value = schema ? compile(c, schema, where) : shared(c, ANY);
    m->pairs[m->n] = key ? pair(c, json_literal(c, key), value) : NULL;
    m->names[m->n] = name;
    m->required[m->n++] = required;
    json_decref(key);
}

/* Properties the schema requires without saying what they are. */
static void add_required(compiler *c, members *m, const json_t *schema, const char *path) {
    const json_t *required = json_object_get(schema, "required"), *item;
    const json_t *properties = json_object_get(schema, "properties");
    size_t i;
    if (required && !json_is_array(required)) {
        refuse(c, "%s.required: expected an array of names", path);
        return;
    }
    json_array_foreach(required, i, item) {
        const char *name = json_string_value(item);
        if (!name) {
            refuse(c, "%s.required[%zu]: expected a name", path, i);
            return;
        }
        if (json_object_get(properties, name)) continue;
        if (json_is_false(json_object_get(schema, "additionalProperties"))) {
            refuse(c, "%s.required: '%s' is not among properties", path, name);
            return;
        }
        bool twice = false;
        for (size_t k = 0; k < m->n; k++) twice = twice || !strcmp(m->names[k], name);
        if (!twice) add_member(c, m, name, NULL, true, path);
    }
}

static void add_further(compiler *c, members *m, const json_t *schema, const char *path) {
    const json_t *more = json_object_get(schema, "additionalProperties");
    char where[512];
    /* Said nothing: any, in an object of which nothing else is known; none beside known ones. */
    if (json_is_false(more) || (!more && m->n)) return;
    snprintf(where, sizeof where, "%s.additionalProperties", path);
    node *value = more ? compile(c, more, where) : shared(c, ANY);
    const char **sorted = calloc(m->n + 1, sizeof *sorted);
    if (!sorted) {
        refuse(c, "%s: out of memory", path);
        return;
    }
    memcpy(sorted, m->names, m->n * sizeof *sorted);
    qsort(sorted, m->n, sizeof *sorted, by_name);
    node *key =
        m->n ? SEQ(c->g, word(c->g, "\""), other_name(c, sorted, m->n, 0)) : shared(c, STRING);
    m->further = pair(c, key, value);
    free(sorted);
}

/* From the last member to the first: what may follow when some member is written already, and when
 * none is. */
static node *join_members(compiler *c, const members *m) {
    grammar *g = c->g;
    node *nothing = grammar_sequence(g, 0, NULL), *comma = shared(c, COMMA);
    node *more = m->further ? grammar_repeat(g, SEQ(g, comma, m->further), 0, GRAMMAR_MANY) : NULL;
    node *later = more ? more : nothing;
    node *first = more ? ALT(g, nothing, SEQ(g, m->further, more)) : nothing;
    for (size_t i = m->n; i-- > 0;) {
        node *here = SEQ(g, m->pairs[i], later);
        node *after = SEQ(g, comma, m->pairs[i], later);
        first = m->required[i] ? here : ALT(g, here, first);
        later = m->required[i] ? after : ALT(g, after, later);
    }
    return first;
}

static node *compile_object(compiler *c, const json_t *schema, const char *path) {
    const json_t *properties = json_object_get(schema, "properties"), *value;
    const char *name;
    grammar *g = c->g;
    node *space = shared(c, SPACE);
    if (properties && !json_is_object(properties))
        return refuse(c, "%s.properties: expected an object", path);
    members *m = calloc(1, sizeof *m);
    if (!m) return refuse(c, "%s: out of memory", path);
    json_object_foreach((json_t *)(uintptr_t)properties, name, value) {
        bool required = is_required(json_object_get(schema, "required"), name);
        if (!c->failed) add_member(c, m, name, value, required, path);
    }
    if (!c->failed) add_required(c, m, schema, path);
    if (!c->failed) add_further(c, m, schema, path);
    node *body = c->failed ? NULL : join_members(c, m);
    free(m);
    return c->failed ? NULL : SEQ(g, word(g, "{"), space, body, space, word(g, "}"));
}

/* ---- arrays and strings ---- */

static node *compile_array(compiler *c, const json_t *schema, const char *path) {
    const json_t *items = json_object_get(schema, "items"), *item;
    const json_t *prefix = json_object_get(schema, "prefixItems");
    grammar *g = c->g;
    char where[512];
    uint32_t min, max;
    size_t i;
    if (!read_count(c, &min, schema, "minItems", 0, path)) return NULL;
    if (!read_count(c, &max, schema, "maxItems", GRAMMAR_MANY, path)) return NULL;
    if (min > max) return refuse(c, "%s: minItems %u is above maxItems %u", path, min, max);
    if (prefix && !json_is_array(prefix))
        return refuse(c, "%s.prefixItems: expected an array", path);
    uint32_t n_prefix = (uint32_t)json_array_size(prefix);
    if (n_prefix > max) return refuse(c, "%s: more prefixItems than maxItems", path);
    if (json_is_false(items)) {
        if (min > n_prefix) return refuse(c, "%s: minItems %u, but no items", path, min);
        max = n_prefix;
        items = NULL;
    }
    snprintf(where, sizeof where, "%s.items", path);
    node *each = items ? compile(c, items, where) : shared(c, ANY);
    if (c->failed) return NULL;
    if (n_prefix == 0) return bracketed(c, "[", each, min, max, "]");
    node *all = NULL;
    json_array_foreach(prefix, i, item) {
        snprintf(where, sizeof where, "%s.prefixItems[%zu]", path, i);
        node *one = compile(c, item, where);
        if (c->failed) return NULL;
        all = all ? SEQ(g, all, shared(c, COMMA), one) : one;
    }
    /* Items beyond the prefix only where they are described or asked for. */
    uint32_t more = min > n_prefix ? min - n_prefix : 0;
    uint32_t most = max != GRAMMAR_MANY ? max - n_prefix : items ? GRAMMAR_MANY : more;
    node *rest = grammar_repeat(g, SEQ(g, shared(c, COMMA), each), more, most);
    return SEQ(g, word(g, "["), shared(c, SPACE), all, rest, shared(c, SPACE), word(g, "]"));
}

/* d a digit, h a small hexadecimal one, anything else itself. */
static node *by_picture(grammar *g, const char *picture) {
    node *all = grammar_sequence(g, 0, NULL);
    for (; *picture; picture++) {
        node *one = *picture == 'd'   ? grammar_set(g, "09")
                    : *picture == 'h' ? grammar_set(g, "09af")
                                      : grammar_literal(g, picture, 1);
        all = SEQ(g, all, one);
    }
    return all;
}

/* Days that every year has. */
static node *make_date(grammar *g) {
    node *day28 = ALT(g, SEQ(g, word(g, "0"), grammar_set(g, "19")), by_picture(g, "1d"),
                      SEQ(g, word(g, "2"), grammar_set(g, "08")));
    node *day30 = ALT(g, day28, word(g, "29"), word(g, "30"));
    node *short_month = ALT(g, word(g, "04"), word(g, "06"), word(g, "09"), word(g, "11"));
    node *long_month = ALT(g, word(g, "01"), word(g, "03"), word(g, "05"), word(g, "07"),
                           word(g, "08"), word(g, "10"), word(g, "12"));
    node *month_day =
        ALT(g, SEQ(g, word(g, "02-"), day28), SEQ(g, short_month, word(g, "-"), day30),
            SEQ(g, long_month, word(g, "-"), ALT(g, day30, word(g, "31"))));
    return SEQ(g, by_picture(g, "dddd-"), month_day);
}

static node *make_time(grammar *g) {
    node *hour = ALT(g, SEQ(g, grammar_set(g, "01"), grammar_set(g, "09")),
                     SEQ(g, word(g, "2"), grammar_set(g, "03")));
    node *sixty = SEQ(g, grammar_set(g, "05"), grammar_set(g, "09"));
    node *fraction = SEQ(g, word(g, "."), grammar_repeat(g, grammar_set(g, "09"), 1, 6));
    node *offset = SEQ(g, grammar_set(g, "++--"), hour, word(g, ":"), sixty);
    return SEQ(g, hour, word(g, ":"), sixty, word(g, ":"), sixty, optional(g, fraction),
               ALT(g, word(g, "Z"), offset));
}

static node *compile_format(compiler *c, const json_t *schema, const char *path) {
    const char *format = json_string_value(json_object_get(schema, "format"));
    grammar *g = c->g;
    node *body = NULL;
    if (json_object_get(schema, "minLength") || json_object_get(schema, "maxLength"))
        return refuse(c, "%s: the keyword 'format' is not supported beside a length", path);
    if (format && !strcmp(format, "date")) body = make_date(g);
    else if (format && !strcmp(format, "time")) body = make_time(g);
    else if (format && !strcmp(format, "date-time"))
        body = SEQ(g, make_date(g), word(g, "T"), make_time(g));
    else if (format && !strcmp(format, "uuid"))
        body = by_picture(g, "hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh");
    else
        return refuse(c, "%s: the keyword 'format' is supported for date, time, date-time and uuid",
                      path);
    return SEQ(g, word(g, "\""), body, word(g, "\""));
}

static node *compile_string(compiler *c, const json_t *schema, const char *path) {
    uint32_t min, max;
    if (json_object_get(schema, "format")) return compile_format(c, schema, path);
    if (!read_count(c, &min, schema, "minLength", 0, path)) return NULL;
    if (!read_count(c, &max, schema, "maxLength", GRAMMAR_MANY, path)) return NULL;
    if (min > max) return refuse(c, "%s: minLength %u is above maxLength %u", path, min, max);
    return min == 0 && max == GRAMMAR_MANY ? shared(c, STRING) : make_string(c, min, max);
}

/* ---- any schema ---- */

static bool is_one_of(const char *word_, const char *const *words) {
    for (; *words; words++)
        if (!strcmp(*words, word_)) return true;
    return false;
}

static const char *const annotations[] = {
    "title",      "description", "default",   "examples", "$schema",     "$id", "$comment",
    "deprecated", "readOnly",    "writeOnly", "$defs",    "definitions", NULL};
static const char *const assertions[] = {
    "type",      "properties",  "required", "additionalProperties",
    "items",     "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength",   "minimum",  "exclusiveMinimum",
    "maximum",   "enum",        "const",    "exclusiveMaximum",
    "anyOf",     "allOf",       "$ref",     "format",
    NULL};

/* Refuses what is not understood, and beside `alone` whatever is more than a remark. */
static bool check_keywords(compiler *c, const json_t *schema, const char *alone, const char *path) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)schema, key, value) {
        if (is_one_of(key, annotations)) continue;
        if (!is_one_of(key, assertions)) {
            refuse(c, "%s: the keyword '%s' is not supported", path, key);
            return false;
        }
        if (alone && strcmp(key, alone)) {
            refuse(c, "%s: the keyword '%s' is not supported beside '%s'", path, key, alone);
            return false;
        }
    }
    return true;
}

/* Follows "#/a/b"; NULL: there is nothing. */
static const json_t *find_ref(const compiler *c, const char *ref) {
    const json_t *at = c->root;
    if (*ref++ != '#') return NULL;
    while (at && *ref == '/') {
        char step[256];
        size_t n = 0;
        for (ref++; *ref && *ref != '/' && n + 1 < sizeof step; ref++) {
            bool escaped = ref[0] == '~' && (ref[1] == '0' || ref[1] == '1');
            step[n++] = (char)(escaped ? (ref[1] == '0' ? '~' : '/') : *ref);
            ref += escaped;
        }
        step[n] = 0;
        at = json_is_array(at) ? json_array_get(at, strtoul(step, NULL, 10))
                               : json_object_get(at, step);
    }
    return *ref ? NULL : at;
}

static node *compile_ref(compiler *c, const json_t *schema, const char *path) {
    const char *ref = json_string_value(json_object_get(schema, "$ref"));
    const json_t *target = ref ? find_ref(c, ref) : NULL;
    if (!check_keywords(c, schema, "$ref", path)) return NULL;
    if (!target) return refuse(c, "%s.$ref: nothing is at '%s'", path, ref ? ref : "");
    for (size_t i = 0; i < c->n_refs; i++)
        if (c->refs[i].schema == target) return c->refs[i].forward;
    if (c->n_refs == MAX_REFS) return refuse(c, "%s: more than %d $ref", path, MAX_REFS);
    node *forward = grammar_forward(c->g);
    c->refs[c->n_refs].schema = target;
    c->refs[c->n_refs++].forward = forward;
    grammar_resolve(forward, compile(c, target, ref));
    return forward;
}

static bool has_type(const json_t *value, const char *type) {
    if (!strcmp(type, "string")) return json_is_string(value);
    if (!strcmp(type, "integer")) return json_is_integer(value);
    if (!strcmp(type, "number")) return json_is_number(value);
    if (!strcmp(type, "boolean")) return json_is_boolean(value);
    if (!strcmp(type, "null")) return json_is_null(value);
    if (!strcmp(type, "object")) return json_is_object(value);
    return json_is_array(value);
}

/* type says nothing, or one of its names fits. */
static bool type_allows(const json_t *type, const json_t *value) {
    const json_t *item;
    size_t i;
    if (json_is_string(type)) return has_type(value, json_string_value(type));
    json_array_foreach(type, i, item) {
        if (json_is_string(item) && has_type(value, json_string_value(item))) return true;
    }
    return !type;
}

static node *compile_values(compiler *c, const json_t *schema, const json_t *values,
                            const char *path) {
    const json_t *type = json_object_get(schema, "type"), *value;
    size_t i, n = 0;
    const char *key;
    json_t *other;
    json_object_foreach((json_t *)(uintptr_t)schema, key, other) {
        if (!is_one_of(key, annotations) && strcmp(key, "type") && strcmp(key, "enum") &&
            strcmp(key, "const"))
            return refuse(c, "%s: the keyword '%s' is not supported beside enum or const", path,
                          key);
    }
    node **parts = calloc(json_array_size(values) + 1, sizeof(node *));
    if (!parts) return refuse(c, "%s: out of memory", path);
    json_array_foreach(values, i, value) {
        if (type_allows(type, value)) parts[n++] = json_literal(c, value);
    }
    node *choice = n ? grammar_choice(c->g, n, parts) : NULL;
    free(parts);
    return n ? choice : refuse(c, "%s.enum: no value is allowed", path);
}

static node *compile_any_of(compiler *c, const json_t *schema, const char *path) {
    const json_t *branches = json_object_get(schema, "anyOf"), *branch;
    size_t i, n = 0;
    char where[512];
    if (!check_keywords(c, schema, "anyOf", path)) return NULL;
    if (json_array_size(branches) == 0)
        return refuse(c, "%s.anyOf: expected an array of schemas", path);
    node **parts = calloc(json_array_size(branches), sizeof(node *));
    if (!parts) return refuse(c, "%s: out of memory", path);
    json_array_foreach(branches, i, branch) {
        snprintf(where, sizeof where, "%s.anyOf[%zu]", path, i);
        if (!c->failed) parts[n++] = compile(c, branch, where);
    }
    node *choice = c->failed ? NULL : grammar_choice(c->g, n, parts);
    free(parts);
    return choice;
}

static node *compile_type(compiler *c, const json_t *schema, const char *type, const char *path) {
    static const char *const of_numbers[] = {"minimum", "maximum", "exclusiveMinimum",
                                             "exclusiveMaximum"};
    if (!strcmp(type, "object")) return compile_object(c, schema, path);
    if (!strcmp(type, "array")) return compile_array(c, schema, path);
    if (!strcmp(type, "string")) return compile_string(c, schema, path);
    if (!strcmp(type, "integer")) return compile_integer(c, schema, path);
    if (!strcmp(type, "boolean")) return ALT(c->g, word(c->g, "true"), word(c->g, "false"));
    if (!strcmp(type, "null")) return word(c->g, "null");
    if (strcmp(type, "number")) return refuse(c, "%s.type: '%s' is no type", path, type);
    for (size_t i = 0; i < sizeof of_numbers / sizeof *of_numbers; i++)
        if (json_object_get(schema, of_numbers[i]))
            return refuse(c, "%s: the keyword '%s' is not supported for type number", path,
                          of_numbers[i]);
    return shared(c, NUMBER);
}

static node *compile_types(compiler *c, const json_t *schema, const char *path) {
    const json_t *type = json_object_get(schema, "type"), *item;
    node *parts[8];
    size_t i;
    if (json_is_string(type)) return compile_type(c, schema, json_string_value(type), path);
    if (json_is_array(type) && json_array_size(type) >= 1 && json_array_size(type) <= 7) {
        json_array_foreach(type, i, item) {
            if (!json_is_string(item)) return refuse(c, "%s.type: expected names", path);
            parts[i] = compile_type(c, schema, json_string_value(item), path);
            if (c->failed) return NULL;
        }
        return grammar_choice(c->g, json_array_size(type), parts);
    }
    if (type) return refuse(c, "%s.type: expected a name or an array of names", path);
    if (json_object_get(schema, "properties") || json_object_get(schema, "required") ||
        json_object_get(schema, "additionalProperties"))
        return compile_object(c, schema, path);
    if (json_object_get(schema, "items") || json_object_get(schema, "prefixItems"))
        return compile_array(c, schema, path);
    for (size_t k = 0; assertions[k]; k++)
        if (json_object_get(schema, assertions[k]))
            return refuse(c, "%s: the keyword '%s' needs a type beside it", path, assertions[k]);
    return shared(c, ANY);
}

static node *compile_keywords(compiler *c, const json_t *schema, const char *path) {
    const json_t *all = json_object_get(schema, "allOf");
    const json_t *value = json_object_get(schema, "const");
    if (json_object_get(schema, "$ref")) return compile_ref(c, schema, path);
    if (!check_keywords(c, schema, all ? "allOf" : NULL, path)) return NULL;
    if (all && json_array_size(all) != 1)
        return refuse(c, "%s: the keyword 'allOf' is supported with one schema only", path);
    if (all) return compile(c, json_array_get(all, 0), path);
    if (json_object_get(schema, "anyOf")) return compile_any_of(c, schema, path);
    if (value) {
        json_t *values = json_pack("[O]", value);
        node *n = compile_values(c, schema, values, path);
        json_decref(values);
        return n;
    }
    if (json_object_get(schema, "enum"))
        return compile_values(c, schema, json_object_get(schema, "enum"), path);
    return compile_types(c, schema, path);
}

static node *compile(compiler *c, const json_t *schema, const char *path) {
    if (c->failed) return NULL;
    if (json_is_true(schema)) return shared(c, ANY);
    if (!json_is_object(schema)) return refuse(c, "%s: expected a schema, an object", path);
    if (c->depth == MAX_NESTING) return refuse(c, "%s: nested too deep", path);
    c->depth++;
    node *n = compile_keywords(c, schema, path);
    c->depth--;
    return n;
}

bool schema_compile(grammar *g, const json_t *schema, char *error, size_t n_bytes) {
    compiler *c = calloc(1, sizeof *c);
    if (!c) {
        snprintf(error, n_bytes, "schema: out of memory");
        return false;
    }
    *c = (compiler){.g = g, .root = schema, .error = error, .n_error = n_bytes};
    node *start = compile(c, schema, "schema");
    bool failed = c->failed;
    free(c);
    if (failed) return false;
    if (grammar_start(g, start)) return true;
    snprintf(error, n_bytes, "schema: too large, or a $ref leads to itself");
    return false;
}

bool schema_any_object(grammar *g) {
    compiler *c = calloc(1, sizeof *c);
    if (!c) return false;
    c->g = g;
    node *object = shared(c, OBJECT);
    free(c);
    return grammar_start(g, object);
}
