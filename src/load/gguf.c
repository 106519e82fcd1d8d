#include "load_private.h"

#include <stdlib.h>

/* A GGUF file, version 2 or 3 (the same layout; 3 added big-endian files, which are refused):
 *   | "GGUF" | version u32 | n_tensors u64 | n_kvs u64 | kvs | tensor infos | pad | tensor data |
 *   string  | n_bytes u64 | bytes |
 *   kv      | key string | type u32 | value |    array value | item type u32 | count u64 | items |
 *   info    | name string | n_dims u32 | dims u64 each, fastest first | type u32 | offset u64 |
 * Offsets count from the start of the tensor data, which is aligned, and so is every tensor. */

enum {
    FIRST_VERSION = 2,
    LAST_VERSION = 3,
    MIN_KV_BYTES = 8 + 1 + 4 + 1,
    MIN_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8,
    FIRST_HEAD_BYTES = 1024 * 1024,
    DEFAULT_ALIGNMENT = 32,
    MIN_ALIGNMENT = 8,
    MAX_ALIGNMENT = 1 << 20
};

static const struct {
    const char *name;
    uint32_t n_bytes;
} value_types[KI_GGUF_VALUE_COUNT] = {
    {"uint8", 1},   {"int8", 1}, {"uint16", 2}, {"int16", 2}, {"uint32", 4}, {"int32", 4},
    {"float32", 4}, {"bool", 1}, {"string", 0}, {"array", 0}, {"uint64", 8}, {"int64", 8},
    {"float64", 8},
};

const char *ki_gguf_value_name(uint32_t type) {
    return type < KI_GGUF_VALUE_COUNT ? value_types[type].name : "unknown";
}

uint32_t ki_gguf_value_bytes(uint32_t type) {
    return type < KI_GGUF_VALUE_COUNT ? value_types[type].n_bytes : 0;
}

/* The header's length is not known before it is read. `bytes` is the start of the file; when the
 * header turns out to be longer, need_bytes says how much to read for the next attempt. */
typedef struct reader {
    ki_file *file;
    const uint8_t *bytes;
    size_t n_bytes, pos; /* pos <= n_bytes <= file bytes */
    size_t need_bytes;
    kivi_error *err;
} reader;

/* ---- primitive reads ---- */

/* The only place that moves pos: bounded by the file first, for an honest error, then by what of
 * it has been read. `what` is named in errors here and below. */
static kivi_status take(reader *r, const uint8_t **out, uint64_t n_bytes, const char *what) {
    size_t left = r->file->source.n_bytes - r->pos;
    if (n_bytes > left)
        return KI_FAIL(r->err, FORMAT, "%s: %s at byte %zu: needs %llu bytes, %zu are left",
                       r->file->label, what, r->pos, (unsigned long long)n_bytes, left);
    if (n_bytes > r->n_bytes - r->pos) {
        r->need_bytes = r->pos + (size_t)n_bytes;
        return KI_FAIL(r->err, FORMAT, "%s: %s at byte %zu: the header is longer than %d bytes",
                       r->file->label, what, r->pos, (int)KI_MAX_HEAD_BYTES);
    }
    *out = r->bytes + r->pos;
    r->pos += (size_t)n_bytes;
    return KIVI_OK;
}

static kivi_status take_u32(reader *r, uint32_t *out, const char *what) {
    const uint8_t *p = NULL;
    KI_TRY(take(r, &p, 4, what));
    *out = ki_load_u32(p);
    return KIVI_OK;
}

static kivi_status take_u64(reader *r, uint64_t *out, const char *what) {
    const uint8_t *p = NULL;
    KI_TRY(take(r, &p, 8, what));
    *out = ki_load_u64(p);
    return KIVI_OK;
}

static kivi_status take_str(reader *r, ki_str *out, const char *what) {
    uint64_t n_bytes = 0;
    const uint8_t *p = NULL;
    KI_TRY(take_u64(r, &n_bytes, what));
    KI_TRY(take(r, &p, n_bytes, what));
    *out = (ki_str){(const char *)p, (size_t)n_bytes};
    return KIVI_OK;
}

/* A name is looked up and printed as a C string, so it has a limit and no zero inside. */
static kivi_status take_name(reader *r, ki_str *out, size_t max_bytes, const char *what) {
    size_t at = r->pos;
    KI_TRY(take_str(r, out, what));
    if (out->n_bytes < 1 || out->n_bytes > max_bytes)
        return KI_FAIL(r->err, FORMAT, "%s: %s at byte %zu: has %zu bytes, expected 1 to %zu",
                       r->file->label, what, at, out->n_bytes, max_bytes);
    if (memchr(out->bytes, 0, out->n_bytes))
        return KI_FAIL(r->err, FORMAT, "%s: %s at byte %zu: has a zero byte in it", r->file->label,
                       what, at);
    return KIVI_OK;
}

/* A count is believed only as far as the bytes left could hold that many items: a lie in the header
 * is found here, before anything is allocated. */
static kivi_status take_count(reader *r, size_t *out, size_t min_item_bytes, const char *what) {
    uint64_t count = 0;
    size_t at = r->pos;
    KI_TRY(take_u64(r, &count, what));
    size_t fit = (r->file->source.n_bytes - r->pos) / min_item_bytes;
    if (count > KI_MIN(fit, (size_t)KI_MAX_ENTRIES))
        return KI_FAIL(r->err, FORMAT, "%s: %s at byte %zu: is %llu, at most %zu fit the file, %d "
                       "are allowed", r->file->label, what, at, (unsigned long long)count, fit,
                       (int)KI_MAX_ENTRIES);
    *out = (size_t)count;
    return KIVI_OK;
}

/* Byte 4 read the other way round gives a small version only if the writer was big-endian. */
static kivi_status check_version(reader *r, uint32_t version) {
    uint32_t swapped = __builtin_bswap32(version);
    if (version >= FIRST_VERSION && version <= LAST_VERSION) return KIVI_OK;
    if (swapped >= 1 && swapped < 0x10000)
        return KI_FAIL(r->err, UNSUPPORTED, "%s: big-endian GGUF (version %u at byte 4), only "
                       "little-endian versions 2 and 3 are supported", r->file->label, swapped);
    return KI_FAIL(r->err, UNSUPPORTED, "%s: GGUF version at byte 4: is %u, only versions 2 and 3 "
                   "are supported", r->file->label, version);
}

static kivi_status read_preamble(reader *r, size_t *n_tensors, size_t *n_kvs) {
    const uint8_t *magic;
    uint32_t version;
    KI_TRY(take(r, &magic, 4, "GGUF magic"));
    if (memcmp(magic, "GGUF", 4) != 0) {
        char shown[KI_SHOW_BYTES];
        return KI_FAIL(r->err, FORMAT, "%s: magic at byte 0: found \"%s\" (0x%08x), expected "
                       "\"GGUF\"; for safetensors give the folder", r->file->label,
                       ki_show(shown, (ki_str){(const char *)magic, 4}),
                       __builtin_bswap32(ki_load_u32(magic)));
    }
    KI_TRY(take_u32(r, &version, "GGUF version"));
    KI_TRY(check_version(r, version));
    KI_TRY(take_count(r, n_tensors, MIN_INFO_BYTES, "tensor count"));
    return take_count(r, n_kvs, MIN_KV_BYTES, "metadata count");
}

/* ---- metadata ---- */

static kivi_status take_type(reader *r, uint32_t *out, ki_str key, const char *what) {
    char shown[KI_SHOW_BYTES];
    size_t at = r->pos;
    KI_TRY(take_u32(r, out, what));
    if (*out < KI_GGUF_VALUE_COUNT) return KIVI_OK;
    return KI_FAIL(r->err, FORMAT, "%s: key %s: %s at byte %zu: is %u, expected 0 to %d",
                   r->file->label, ki_show(shown, key), what, at, *out, KI_GGUF_VALUE_COUNT - 1);
}

/* Strings are walked one by one here, so that getters may trust every length. Arrays of arrays have
 * no use in a model and would need recursion: refused. */
static kivi_status read_array(reader *r, ki_kv *kv) {
    char shown[KI_SHOW_BYTES];
    uint64_t count = 0;
    size_t at = r->pos;
    KI_TRY(take_type(r, &kv->item_type, kv->key, "array item type"));
    if (kv->item_type == KI_GGUF_ARRAY)
        return KI_FAIL(r->err, UNSUPPORTED, "%s: key %s: array of arrays at byte %zu is not "
                       "supported", r->file->label, ki_show(shown, kv->key), at);
    at = r->pos;
    KI_TRY(take_u64(r, &count, "array count"));
    uint32_t item_bytes = ki_gguf_value_bytes(kv->item_type);
    size_t left = r->file->source.n_bytes - r->pos, n_bytes;
    if (count > left / (item_bytes ? item_bytes : 8)) /* 8: the length of a string */
        return KI_FAIL(r->err, FORMAT, "%s: key %s: array count at byte %zu: is %llu, the file has "
                       "%zu bytes left", r->file->label, ki_show(shown, kv->key), at,
                       (unsigned long long)count, left);
    kv->count = (size_t)count;
    kv->value = r->bytes + r->pos;
    if (!item_bytes) {
        ki_str skipped;
        for (uint64_t i = 0; i < count; i++) KI_TRY(take_str(r, &skipped, "string in an array"));
        return KIVI_OK;
    }
    if (!ki_mul(&n_bytes, kv->count, item_bytes)) n_bytes = SIZE_MAX; /* cannot be: count fits */
    return take(r, &kv->value, n_bytes, "array");
}

/* Any other byte would be undefined behaviour once it is a C bool. */
static kivi_status read_bool(reader *r, ki_kv *kv) {
    char shown[KI_SHOW_BYTES];
    KI_TRY(take(r, &kv->value, 1, "bool"));
    if (*kv->value <= 1) return KIVI_OK;
    return KI_FAIL(r->err, FORMAT, "%s: key %s: bool at byte %zu: is %u, expected 0 or 1",
                   r->file->label, ki_show(shown, kv->key), r->pos - 1, *kv->value);
}

static kivi_status read_kv(reader *r, ki_kv *kv) {
    KI_TRY(take_name(r, &kv->key, KI_MAX_KEY_BYTES, "metadata key"));
    KI_TRY(take_type(r, &kv->type, kv->key, "value type"));
    if (kv->type == KI_GGUF_ARRAY) return read_array(r, kv);
    if (kv->type == KI_GGUF_BOOL) return read_bool(r, kv);
    if (kv->type == KI_GGUF_STR) {
        ki_str text;
        KI_TRY(take_str(r, &text, "string value"));
        kv->count = text.n_bytes;
        kv->value = (const uint8_t *)text.bytes;
        return KIVI_OK;
    }
    return take(r, &kv->value, ki_gguf_value_bytes(kv->type), "value");
}

/* n_kvs is set last: until then lookups find nothing. */
static kivi_status read_kvs(reader *r, size_t n_kvs) {
    ki_file *file = r->file;
    void *kvs, *names;
    KI_TRY(ki_alloc_array(&kvs, file->mem, KI_TAG_other, n_kvs, sizeof(ki_kv), r->err));
    file->kvs = kvs;
    KI_TRY(ki_alloc_array(&names, file->mem, KI_TAG_other, n_kvs, sizeof(ki_name), r->err));
    file->kv_names = names;
    for (size_t i = 0; i < n_kvs; i++) {
        KI_TRY(read_kv(r, &file->kvs[i]));
        file->kv_names[i] = (ki_name){file->kvs[i].key, i};
    }
    file->n_kvs = n_kvs;
    return ki_names_sort(file->kv_names, n_kvs, "key", file->label, r->err);
}

/* Through the typed getter: a wrong type is an error like any other (llama.cpp asserted here). */
static kivi_status read_alignment(reader *r, size_t *out) {
    uint64_t alignment = DEFAULT_ALIGNMENT;
    bool found;
    KI_TRY(ki_file_u64(&alignment, &found, r->file, "general.alignment", MIN_ALIGNMENT,
                       MAX_ALIGNMENT, r->err));
    if (alignment & (alignment - 1))
        return KI_FAIL(r->err, FORMAT, "%s: key general.alignment: %llu, expected a power of two",
                       r->file->label, (unsigned long long)alignment);
    *out = (size_t)alignment;
    return KIVI_OK;
}

/* ---- tensors ---- */

typedef struct info {
    ki_str name;
    uint32_t n_dims, type;
    uint64_t dims[4]; /* slowest first, unlike the file */
    uint64_t offset;
    size_t at; /* byte of the file where it stands, for errors */
} info;

static kivi_status take_info(reader *r, info *t) {
    char shown[KI_SHOW_BYTES];
    *t = (info){.dims = {1, 1, 1, 1}, .at = r->pos};
    KI_TRY(take_name(r, &t->name, KI_MAX_NAME_BYTES, "tensor name"));
    KI_TRY(take_u32(r, &t->n_dims, "tensor dimensions"));
    if (t->n_dims < 1 || t->n_dims > 4)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s at byte %zu: has %u dimensions, expected 1 "
                       "to 4", r->file->label, ki_show(shown, t->name), t->at, t->n_dims);
    for (uint32_t i = t->n_dims; i-- > 0;) KI_TRY(take_u64(r, &t->dims[i], "tensor dimension"));
    KI_TRY(take_u32(r, &t->type, "tensor type"));
    return take_u64(r, &t->offset, "tensor offset");
}

/* All infos once, to know where the data starts and how much room the names need. */
static kivi_status measure_infos(reader *r, size_t n_tensors, size_t *n_text_bytes) {
    info t;
    *n_text_bytes = 0;
    for (size_t i = 0; i < n_tensors; i++) {
        KI_TRY(take_info(r, &t));
        *n_text_bytes += t.name.n_bytes + 1; /* at most 200,000 times 256 */
    }
    return KIVI_OK;
}

/* Names the types that would do, so that the user knows what to convert to. */
static kivi_status refuse_type(reader *r, const info *t, const char *shown) {
    char list[128] = ""; /* all of them: 13 names of at most 5 bytes */
    size_t n = 0;
    for (unsigned i = 0; i < KI_DTYPE_COUNT; i++) {
        const char *name = ki_dtype_name((ki_dtype)i);
        size_t n_name = strlen(name);
        if (n + n_name + 2 > sizeof list) break;
        if (n) list[n++] = ' ';
        memcpy(list + n, name, n_name + 1);
        n += n_name;
    }
    return KI_FAIL(r->err, UNSUPPORTED, "%s: tensor %s: type %s (%u) not supported (%s)",
                   r->file->label, shown, ki_gguf_type_name(t->type), t->type, list);
}

/* Blocks run along a row; a row that ends inside a block has no meaning. */
static kivi_status tensor_bytes(reader *r, ki_tensor *tensor, const char *shown) {
    size_t n_elements, n_blocks;
    uint64_t row_elements = tensor->dims[tensor->n_dims - 1];
    uint32_t block_elements = ki_dtype_block_elements(tensor->dtype);
    const char *label = r->file->label;
    KI_TRY(ki_elements(&n_elements, tensor->n_dims, tensor->dims, shown, label, r->err));
    if (row_elements % block_elements)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: rows of %llu elements, %s needs a multiple "
                       "of %u", label, shown, (unsigned long long)row_elements,
                       ki_dtype_name(tensor->dtype), block_elements);
    n_blocks = n_elements / block_elements;
    if (!ki_mul(&tensor->n_bytes, n_blocks, ki_dtype_block_bytes(tensor->dtype)))
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: %zu elements of %s exceed 2^64 bytes", label,
                       shown, n_elements, ki_dtype_name(tensor->dtype));
    return KIVI_OK;
}

/* Start and end within the file, by checked sums. */
static kivi_status place(reader *r, ki_tensor *tensor, const info *t, size_t data_start,
                         size_t alignment, const char *shown) {
    const ki_source *source = &r->file->source;
    size_t start, end;
    if (t->offset % alignment)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: offset %llu is no multiple of the alignment "
                       "%zu", r->file->label, shown, (unsigned long long)t->offset, alignment);
    if (!ki_add(&start, data_start, t->offset) || !ki_add(&end, start, tensor->n_bytes))
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s: offset %llu + %zu bytes exceed 2^64",
                       r->file->label, shown, (unsigned long long)t->offset, tensor->n_bytes);
    if (end > source->n_bytes)
        return KI_FAIL(r->err, FORMAT, "%s: tensor %s ends at byte %zu, the file has %zu",
                       r->file->label, shown, end, source->n_bytes);
    tensor->data = source->data + start;
    return KIVI_OK;
}

/* Second look at an info. *text: where its name goes, moved behind it. */
static kivi_status fill_tensor(reader *r, ki_tensor *tensor, char **text, size_t data_start,
                               size_t alignment) {
    char shown[KI_SHOW_BYTES];
    info t;
    KI_TRY(take_info(r, &t));
    ki_show(shown, t.name);
    memcpy(*text, t.name.bytes, t.name.n_bytes);
    (*text)[t.name.n_bytes] = 0;
    *tensor = (ki_tensor){.name = *text, .n_dims = t.n_dims};
    *text += t.name.n_bytes + 1;
    memcpy(tensor->dims, t.dims, sizeof t.dims);
    if (!ki_dtype_from_gguf(&tensor->dtype, t.type)) return refuse_type(r, &t, shown);
    KI_TRY(tensor_bytes(r, tensor, shown));
    return place(r, tensor, &t, data_start, alignment, shown);
}

static int compare_data(const void *a, const void *b) {
    const ki_tensor *x = *(const ki_tensor *const *)a, *y = *(const ki_tensor *const *)b;
    return (x->data > y->data) - (x->data < y->data);
}

/* Walks the tensors by position: each starts where the one before ends, rounded up, and the file
 * ends with the last. Bytes that nobody claims mean a wrong count or shape: the weights would be
 * read from the wrong place without a word. (llama.cpp demands the same order.) */
static kivi_status check_layout(reader *r, const ki_tensor **sorted, size_t data_start,
                                size_t alignment) {
    const ki_file *file = r->file;
    char shown[KI_SHOW_BYTES];
    size_t expected = data_start;
    for (size_t i = 0; i < file->n_tensors; i++) {
        size_t start = (size_t)(sorted[i]->data - file->source.data);
        if (start != expected)
            return KI_FAIL(r->err, FORMAT, "%s: tensor %s starts at byte %zu, expected %zu: %s",
                           file->label, ki_show(shown, ki_str_of(sorted[i]->name)), start, expected,
                           start < expected ? "it overlaps the one before" : "a hole before it");
        if (!ki_round_up(&expected, start + sorted[i]->n_bytes, alignment)) expected = SIZE_MAX;
    }
    if (file->source.n_bytes > expected)
        return KI_FAIL(r->err, FORMAT, "%s: %zu tensors end at byte %zu, the file has %zu",
                       file->label, file->n_tensors, expected, file->source.n_bytes);
    return KIVI_OK;
}

static kivi_status check_order(reader *r, size_t data_start, size_t alignment) {
    ki_file *file = r->file;
    void *block;
    KI_TRY(ki_alloc_array(&block, file->mem, KI_TAG_other, file->n_tensors, sizeof(ki_tensor *),
                          r->err));
    const ki_tensor **sorted = block;
    for (size_t i = 0; i < file->n_tensors; i++) sorted[i] = &file->tensors[i];
    if (file->n_tensors) qsort(sorted, file->n_tensors, sizeof *sorted, compare_data);
    kivi_status status = check_layout(r, sorted, data_start, alignment);
    ki_free(file->mem, block);
    return status;
}

/* Data offsets need data_start, which follows the last info: hence two passes over the infos. */
static kivi_status read_tensors(reader *r, size_t n_tensors, size_t alignment) {
    size_t infos = r->pos, n_text_bytes, data_start;
    KI_TRY(measure_infos(r, n_tensors, &n_text_bytes));
    if (!ki_round_up(&data_start, r->pos, alignment)) data_start = SIZE_MAX;
    KI_TRY(ki_tensors_alloc(r->file, n_tensors, n_text_bytes, r->err));
    char *text = r->file->name_text;
    r->pos = infos;
    for (size_t i = 0; i < n_tensors; i++)
        KI_TRY(fill_tensor(r, &r->file->tensors[i], &text, data_start, alignment));
    KI_TRY(ki_tensors_index(r->file, r->err)); /* first: a duplicate usually overlaps as well */
    return check_order(r, data_start, alignment);
}

/* ---- the whole header ---- */

static kivi_status parse(reader *r) {
    size_t n_tensors = 0, n_kvs = 0, alignment = DEFAULT_ALIGNMENT;
    KI_TRY(read_preamble(r, &n_tensors, &n_kvs));
    KI_TRY(read_kvs(r, n_kvs));
    KI_TRY(read_alignment(r, &alignment));
    return read_tensors(r, n_tensors, alignment);
}

/* Back to before the attempt; close would free the same. */
static void forget(ki_file *file) {
    void **const blocks[] = {(void **)&file->head, (void **)&file->kvs, (void **)&file->kv_names,
                             (void **)&file->tensors, (void **)&file->tensor_names,
                             (void **)&file->name_text};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        ki_free(file->mem, *blocks[i]);
        *blocks[i] = NULL;
    }
    file->n_kvs = file->n_tensors = 0;
}

/* One attempt with the first n_bytes of the file. Reading it, instead of using the mapping, keeps
 * keys and vocabulary valid whatever happens to the file later. */
static kivi_status attempt(reader *r, size_t n_bytes) {
    ki_file *file = r->file;
    void *head;
    KI_TRY(ki_alloc(&head, file->mem, KI_TAG_other, n_bytes, r->err));
    file->head = head;
    r->bytes = head;
    r->n_bytes = n_bytes;
    r->pos = r->need_bytes = 0;
    KI_TRY(ki_fd_read(head, file->source.fd, 0, n_bytes, file->label, r->err));
    return parse(r);
}

/* Grows the head until the header fits: each attempt at least doubles it, so all together read at
 * most four times the header. */
kivi_status ki_gguf_load(ki_file *file, kivi_error *err) {
    kivi_error last = {0}; /* a failed attempt is nothing the caller should see */
    kivi_status status;
    reader r = {.file = file, .bytes = file->source.data, .n_bytes = file->source.n_bytes,
                .err = &last};
    if (file->source.fd < 0) {
        r.err = err;
        return parse(&r);
    }
    size_t n_bytes = KI_MIN(file->source.n_bytes, (size_t)FIRST_HEAD_BYTES);
    while ((status = attempt(&r, n_bytes)) != KIVI_OK && r.need_bytes > n_bytes &&
           r.need_bytes <= KI_MAX_HEAD_BYTES) {
        forget(file);
        n_bytes = KI_MIN(KI_MAX(r.need_bytes, 2 * n_bytes), file->source.n_bytes);
    }
    if (status != KIVI_OK && err) *err = last;
    return status;
}
