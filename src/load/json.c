#include "load_private.h"

/* jansson recurses to a depth of 2048 and builds whatever it is given. One flat look at the text
 * before it bounds stack and memory; whether the text is JSON at all is left to jansson. */
enum { MAX_DEPTH = 64 };

typedef struct scan {
    const char *text;
    size_t n_bytes, pos;
    size_t depth, n_containers, n_values;
} scan;

/* pos is at the opening quote; leaves it at the closing one, or at the end. */
static void skip_string(scan *s) {
    for (s->pos++; s->pos < s->n_bytes && s->text[s->pos] != '"'; s->pos++)
        if (s->text[s->pos] == '\\') s->pos++;
}

/* Unbalanced brackets are no concern here: jansson finds them at no greater depth. */
static void scan_byte(scan *s) {
    switch (s->text[s->pos]) {
    case '"': skip_string(s); break;
    case '{':
    case '[':
        s->depth++;
        s->n_containers++;
        s->n_values++;
        break;
    case '}':
    case ']': s->depth -= s->depth > 0; break;
    case ',': s->n_values++; break;
    default: break;
    }
}

static kivi_status check_limits(const void *text, size_t n_bytes, ki_json_limits limits,
                                const char *label, kivi_error *err) {
    scan s = {.text = text, .n_bytes = n_bytes};
    for (; s.pos < s.n_bytes; s.pos++) {
        scan_byte(&s);
        if (s.depth > MAX_DEPTH)
            return KI_FAIL(err, FORMAT, "%s: JSON nested deeper than %d at byte %zu", label,
                           (int)MAX_DEPTH, s.pos);
        if (s.n_containers > limits.max_containers || s.n_values > limits.max_values)
            return KI_FAIL(err, FORMAT, "%s: JSON has more values than a model needs, at byte %zu",
                           label, s.pos);
    }
    return KIVI_OK;
}

kivi_status ki_json_load(json_t **out, const void *text, size_t n_bytes, ki_json_limits limits,
                         const char *label, kivi_error *err) {
    json_error_t bad;
    char shown[KI_SHOW_BYTES];
    *out = NULL;
    KI_TRY(check_limits(text, n_bytes, limits, label, err));
    json_t *value = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &bad);
    if (!value && json_error_code(&bad) == json_error_out_of_memory)
        return KI_FAIL(err, NOMEM, "%s: no memory for its JSON of %zu bytes", label, n_bytes);
    if (!value)
        return KI_FAIL(err, FORMAT, "%s: JSON: %s, at byte %d, line %d", label,
                       ki_show(shown, ki_str_of(bad.text)), bad.position, bad.line);
    if (!json_is_object(value)) {
        json_decref(value);
        return KI_FAIL(err, FORMAT, "%s: JSON is no object, expected {...}", label);
    }
    *out = value;
    return KIVI_OK;
}
