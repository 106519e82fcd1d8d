#include "load_private.h"

#include <stdlib.h>

/* A safetensors file:
 *   | n_header u64 | header: JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data |
 * Offsets count from the start of the data. */

enum { LENGTH_BYTES = 8 };

/* What to do with a dtype. Integer buffers (positions, masks) stand beside the weights of older
 * checkpoints; no model here reads them. */
typedef enum use { USE, SKIP, REFUSE } use;

static const struct st_dtype {
    const char *name;
    uint32_t n_bytes;
    use use;
    ki_dtype dtype;
} st_dtypes[] = {
    {"F32", 4, USE, KI_F32},       {"F16", 2, USE, KI_F16},       {"BF16", 2, USE, KI_BF16},
    {"I64", 8, SKIP, KI_F32},      {"I32", 4, SKIP, KI_F32},      {"U8", 1, SKIP, KI_F32},
    {"BOOL", 1, SKIP, KI_F32},     {"F64", 8, REFUSE, KI_F32},    {"I16", 2, REFUSE, KI_F32},
    {"I8", 1, REFUSE, KI_F32},     {"U16", 2, REFUSE, KI_F32},    {"U32", 4, REFUSE, KI_F32},
    {"U64", 8, REFUSE, KI_F32},    {"C64", 8, REFUSE, KI_F32},    {"F8_E4M3", 1, REFUSE, KI_F32},
    {"F8_E5M2", 1, REFUSE, KI_F32}, {"F8_E8M0", 1, REFUSE, KI_F32}, {"F4", 1, REFUSE, KI_F32},
};

typedef struct entry {
    const char *name; /* lent by the header's JSON */
    const struct st_dtype *dtype;
    uint32_t n_dims;
    uint64_t dims[4];
    size_t begin, end; /* within the data */
} entry;

typedef struct reader {
    ki_file *file;
    size_t data_start;
    entry *entries;
    size_t n_entries, n_skipped, n_text_bytes;
    kivi_error *err;
} reader;

/* ---- one entry ---- */

/* A dtype of the format is UNSUPPORTED, anything else FORMAT. */
static kivi_status read_dtype(reader *r, entry *e, const json_t *value, const char *shown) {
    char name[KI_SHOW_BYTES];
    const char *text = json_string_value(value);
    if (!text)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: no \"dtype\" string", r->file->label, shown);
    for (size_t i = 0; i < sizeof st_dtypes / sizeof *st_dtypes; i++)
        if (!strcmp(st_dtypes[i].name, text)) e->dtype = &st_dtypes[i];
    if (!e->dtype)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: dtype %s is unknown, expected F32 F16 BF16",
                       r->file->label, shown, ki_show(name, ki_str_of(text)));
    if (e->dtype->use == REFUSE)
        return KI_FAIL(r->err, UNSUPPORTED, "%s: tensor %s: dtype %s not supported (F32 F16 BF16)",
                       r->file->label, shown, text);
    return KIVI_OK;
}

/* An array of at most max integers >= 0. */
static kivi_status read_sizes(reader *r, uint64_t *out, size_t *count, size_t max,
                              const json_t *value, const char *what, const char *shown) {
    *count = json_array_size(value); /* 0 for anything else */
    if (!json_is_array(value) || *count > max)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: \"%s\" has %zu items, expected an array of "
                       "at most %zu", r->file->label, shown, what, *count, max);
    for (size_t i = 0; i < *count; i++) {
        const json_t *item = json_array_get(value, i);
        json_int_t n = json_integer_value(item);
        if (!json_is_integer(item) || n < 0)
            return KI_FAIL(r->err, FORMAT, "%s: tensor %s: \"%s\" item %zu is no integer >= 0",
                           r->file->label, shown, what, i);
        out[i] = (uint64_t)n;
    }
    return KIVI_OK;
}

/* An end within the data makes begin <= end safe as well. */
static kivi_status read_offsets(reader *r, entry *e, const json_t *value, const char *shown) {
    uint64_t range[2] = {0};
    size_t count, data_bytes = r->file->source.n_bytes - r->data_start;
    KI_TRY(read_sizes(r, range, &count, 2, value, "data_offsets", shown));
    if (count != 2 || range[0] > range[1])
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: \"data_offsets\" is no [begin, end]",
                       r->file->label, shown);
    if (range[1] > data_bytes)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s ends at data byte %llu, the file has %zu",
                       r->file->label, shown, (unsigned long long)range[1], data_bytes);
    e->begin = (size_t)range[0];
    e->end = (size_t)range[1];
    return KIVI_OK;
}

/* Offsets and shape say the same number of bytes, or one of them lies. */
static kivi_status check_entry_bytes(reader *r, const entry *e, const char *shown) {
    char shape[KI_SHOW_BYTES];
    size_t n_elements, n_bytes;
    KI_TRY(ki_elements(&n_elements, e->n_dims, e->dims, shown, r->file->label, r->err));
    if (!ki_mul(&n_bytes, n_elements, e->dtype->n_bytes) || n_bytes != e->end - e->begin)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: has %zu bytes, not those of %s %s",
                       r->file->label, shown, e->end - e->begin, e->dtype->name,
                       ki_shape_text(shape, e->n_dims, e->dims));
    return KIVI_OK;
}

static kivi_status read_entry(reader *r, const char *name, const json_t *value) {
    char shown[KI_SHOW_BYTES];
    entry *e = &r->entries[r->n_entries++];
    size_t n_dims, n_name_bytes = strlen(name);
    *e = (entry){.name = name, .dims = {1, 1, 1, 1}};
    ki_show(shown, ki_str_of(name));
    if (n_name_bytes < 1 || n_name_bytes > KI_MAX_NAME_BYTES)
        return KI_FAIL(r->err, FORMAT, "%s: tensor name %s has %zu bytes, expected 1 to %d",
                       r->file->label, shown, n_name_bytes, (int)KI_MAX_NAME_BYTES);
    if (!json_is_object(value))
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s is no JSON object", r->file->label, shown);
    KI_TRY(read_dtype(r, e, json_object_get(value, "dtype"), shown));
    KI_TRY(read_sizes(r, e->dims, &n_dims, 4, json_object_get(value, "shape"), "shape", shown));
    e->n_dims = (uint32_t)n_dims;
    KI_TRY(read_offsets(r, e, json_object_get(value, "data_offsets"), shown));
    r->n_skipped += e->dtype->use == SKIP;
    r->n_text_bytes += n_name_bytes + 1;
    return check_entry_bytes(r, e, shown);
}

/* Not used, but a reader that does use it must not see another file than we do. */
static kivi_status check_metadata(reader *r, const json_t *value) {
    const char *key;
    json_t *item;
    if (!json_is_object(value))
        return KI_FAIL(r->err, FORMAT, "%s: __metadata__ is no JSON object", r->file->label);
    json_object_foreach((json_t *)(uintptr_t)value, key, item)
        if (!json_is_string(item))
            return KI_FAIL(r->err, FORMAT, "%s: __metadata__ has a value that is no string",
                           r->file->label);
    return KIVI_OK;
}

/* Keys beyond dtype, shape and data_offsets are ignored, as the reference does. */
static kivi_status read_entries(reader *r, json_t *header) {
    const char *name;
    json_t *value;
    void *block;
    size_t n_keys = json_object_size(header);
    if (n_keys > KI_MAX_ENTRIES)
        return KI_FAIL(r->err, FORMAT, "%s: header has %zu entries, at most %d", r->file->label,
                       n_keys, (int)KI_MAX_ENTRIES);
    KI_TRY(ki_alloc_array(&block, r->file->mem, KI_TAG_other, n_keys, sizeof(entry), r->err));
    r->entries = block;
    json_object_foreach(header, name, value) {
        if (!strcmp(name, "__metadata__")) KI_TRY(check_metadata(r, value));
        else KI_TRY(read_entry(r, name, value));
    }
    return KIVI_OK;
}

/* ---- all entries ---- */

static int compare_entries(const void *a, const void *b) {
    const entry *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* The data is fully claimed: no overlap, no hole, nothing behind. Anything else lets two readers
 * of one file see different things. */
static kivi_status check_ranges(reader *r) {
    char shown[KI_SHOW_BYTES];
    size_t expected = 0, data_bytes = r->file->source.n_bytes - r->data_start;
    if (r->n_entries) qsort(r->entries, r->n_entries, sizeof *r->entries, compare_entries);
    for (size_t i = 0; i < r->n_entries; i++) {
        const entry *e = &r->entries[i];
        if (e->begin != expected)
            return KI_FAIL(r->err, FORMAT,
                           "%s: tensor %s starts at data byte %zu, expected %zu: %s",
                           r->file->label, ki_show(shown, ki_str_of(e->name)), e->begin, expected,
                           e->begin < expected ? "it overlaps another" : "a hole before it");
        expected = e->end;
    }
    if (expected != data_bytes)
        return KI_FAIL(r->err, FORMAT, "%s: tensors end at data byte %zu, the file has %zu",
                       r->file->label, expected, data_bytes);
    return KIVI_OK;
}

static const char *copy_name(char **text, const char *name) {
    char *copy = *text;
    size_t n_bytes = strlen(name) + 1;
    memcpy(copy, name, n_bytes);
    *text += n_bytes;
    return copy;
}

/* From entries in the order of the data to tensors; names are copied, the JSON goes away. */
static kivi_status fill(reader *r) {
    ki_file *file = r->file;
    void *skipped;
    KI_TRY(ki_tensors_alloc(file, r->n_entries - r->n_skipped, r->n_text_bytes, r->err));
    KI_TRY(ki_alloc_array(&skipped, file->mem, KI_TAG_other, r->n_skipped, sizeof(char *), r->err));
    file->skipped = skipped;
    char *text = file->name_text;
    ki_tensor *tensor = file->tensors;
    for (size_t i = 0; i < r->n_entries; i++) {
        const entry *e = &r->entries[i];
        const char *name = copy_name(&text, e->name);
        if (e->dtype->use == SKIP) {
            file->skipped[file->n_skipped++] = name;
            continue;
        }
        *tensor = (ki_tensor){.name = name, .dtype = e->dtype->dtype, .n_dims = e->n_dims,
                              .data = file->source.data + r->data_start + e->begin,
                              .n_bytes = e->end - e->begin};
        memcpy(tensor->dims, e->dims, sizeof e->dims);
        tensor++;
    }
    return ki_tensors_index(file, r->err);
}

/* text: [n_bytes], the header alone. */
static kivi_status load_header(ki_file *file, const uint8_t *text, size_t n_bytes,
                               kivi_error *err) {
    /* An entry is an object, two arrays and some ten values; a folded __metadata__ is small. */
    const ki_json_limits limits = {3 * KI_MAX_ENTRIES + 16, 12 * KI_MAX_ENTRIES};
    reader r = {.file = file, .data_start = LENGTH_BYTES + n_bytes, .err = err};
    json_t *header;
    if (text[0] != '{')
        return KI_FAIL(err, FORMAT, "%s: header at byte 8: starts with 0x%02x, expected '{'",
                       file->label, text[0]);
    KI_TRY(ki_json_load(&header, text, n_bytes, limits, file->label, err));
    kivi_status status = read_entries(&r, header);
    if (status == KIVI_OK) status = check_ranges(&r);
    if (status == KIVI_OK) status = fill(&r);
    ki_free(file->mem, r.entries);
    json_decref(header);
    return status;
}

static kivi_status header_length(size_t *out, const ki_file *file, kivi_error *err) {
    size_t file_bytes = file->source.n_bytes;
    uint8_t raw[LENGTH_BYTES];
    if (file_bytes < LENGTH_BYTES)
        return KI_FAIL(err, FORMAT, "%s: has %zu bytes, a safetensors file has at least %d",
                       file->label, file_bytes, (int)LENGTH_BYTES + 2);
    if (file->source.fd < 0) memcpy(raw, file->source.data, sizeof raw);
    else KI_TRY(ki_fd_read(raw, file->source.fd, 0, sizeof raw, file->label, err));
    uint64_t n_bytes = ki_load_u64(raw);
    if (n_bytes < 2 || n_bytes > KI_MAX_ST_HEAD_BYTES || n_bytes > file_bytes - LENGTH_BYTES)
        return KI_FAIL(err, FORMAT, "%s: header length at byte 0: is %llu, expected 2 to %zu",
                       file->label, (unsigned long long)n_bytes,
                       KI_MIN(file_bytes - LENGTH_BYTES, (size_t)KI_MAX_ST_HEAD_BYTES));
    *out = (size_t)n_bytes;
    return KIVI_OK;
}

/* The header is read rather than used where it is mapped: a file that shrinks meanwhile is an
 * error and no signal. */
kivi_status ki_safetensors_load(ki_file *file, kivi_error *err) {
    size_t n_bytes = 0;
    void *text;
    KI_TRY(header_length(&n_bytes, file, err));
    if (file->source.fd < 0)
        return load_header(file, file->source.data + LENGTH_BYTES, n_bytes, err);
    KI_TRY(ki_alloc(&text, file->mem, KI_TAG_other, n_bytes, err));
    kivi_status status = ki_fd_read(text, file->source.fd, LENGTH_BYTES, n_bytes, file->label, err);
    if (status == KIVI_OK) status = load_header(file, text, n_bytes, err);
    ki_free(file->mem, text);
    return status;
}
