#include "load_private.h"

#include <math.h>
#include <stdio.h>

/* Metadata of both kinds through one view: a found value, then getters that check it. */
typedef struct value {
    ki_value_kind kind;
    const char *type_name; /* as the file's format calls it */
    const ki_kv *kv;       /* GGUF, or */
    const json_t *json;    /* config.json */
    uint64_t u;            /* INT: the value, as two's complement when negative */
    bool negative;
    double f;              /* FLOAT, and INT of JSON */
    ki_str text;
} value;

/* ---- GGUF ---- */

/* A sign apart from the magnitude: int64 and uint64 both fit, and no range check is signed. */
static void set_int(value *v, int64_t i) {
    v->kind = KI_VALUE_INT;
    v->u = (uint64_t)i;
    v->negative = i < 0;
}

static void set_unsigned(value *v, uint64_t u) {
    v->kind = KI_VALUE_INT;
    v->u = u;
}

static void set_float(value *v, double f) {
    v->kind = KI_VALUE_FLOAT;
    v->f = f;
}

static double f64_from_bits(uint64_t bits) {
    double f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Payloads have any alignment: loads go through memcpy. */
static void decode(value *v, const ki_kv *kv) {
    const uint8_t *p = kv->value;
    v->kv = kv;
    v->type_name = ki_gguf_value_name(kv->type);
    switch (kv->type) {
    case KI_GGUF_U8: set_unsigned(v, p[0]); break;
    case KI_GGUF_I8: set_int(v, (int8_t)p[0]); break;
    case KI_GGUF_U16: set_unsigned(v, (uint16_t)(p[0] | p[1] << 8)); break;
    case KI_GGUF_I16: set_int(v, (int16_t)(p[0] | p[1] << 8)); break;
    case KI_GGUF_U32: set_unsigned(v, ki_load_u32(p)); break;
    case KI_GGUF_I32: set_int(v, (int32_t)ki_load_u32(p)); break;
    case KI_GGUF_U64: set_unsigned(v, ki_load_u64(p)); break;
    case KI_GGUF_I64: set_int(v, (int64_t)ki_load_u64(p)); break;
    case KI_GGUF_F32: set_float(v, (double)ki_f32_from_bits(ki_load_u32(p))); break;
    case KI_GGUF_F64: set_float(v, f64_from_bits(ki_load_u64(p))); break;
    case KI_GGUF_BOOL:
        v->kind = KI_VALUE_BOOL;
        v->u = p[0];
        break;
    case KI_GGUF_STR:
        v->kind = KI_VALUE_STR;
        v->text = (ki_str){(const char *)p, kv->count};
        break;
    default: v->kind = KI_VALUE_ARRAY; break;
    }
}

/* ---- JSON ---- */

static void decode_json(value *v, const json_t *json) {
    static const struct {
        ki_value_kind kind;
        const char *name;
    } types[] = {
        [JSON_OBJECT] = {KI_VALUE_OBJECT, "object"}, [JSON_ARRAY] = {KI_VALUE_ARRAY, "array"},
        [JSON_STRING] = {KI_VALUE_STR, "string"},    [JSON_INTEGER] = {KI_VALUE_INT, "integer"},
        [JSON_REAL] = {KI_VALUE_FLOAT, "number"},    [JSON_TRUE] = {KI_VALUE_BOOL, "bool"},
        [JSON_FALSE] = {KI_VALUE_BOOL, "bool"},      [JSON_NULL] = {KI_VALUE_NONE, "null"},
    };
    v->json = json;
    v->kind = types[json_typeof(json)].kind;
    v->type_name = types[json_typeof(json)].name;
    v->f = json_number_value(json);
    if (json_is_integer(json)) set_int(v, json_integer_value(json));
    if (json_is_true(json)) v->u = 1;
    if (json_is_string(json))
        v->text = (ki_str){json_string_value(json), json_string_length(json)};
}

/* Follows a dotted path. What lies below a value that is no object is absent. */
static const json_t *find_json(const json_t *at, const char *key) {
    char part[64];
    while (at) {
        size_t n_bytes = strcspn(key, ".");
        if (n_bytes >= sizeof part) return NULL; /* no key of ours is that long */
        memcpy(part, key, n_bytes);
        part[n_bytes] = 0;
        at = json_object_get(at, part);
        if (!key[n_bytes]) return at;
        key += n_bytes + 1;
    }
    return NULL;
}

/* ---- lookup and errors ---- */

/* kind NONE: absent, or null in JSON. */
static value find(const ki_file *file, const char *key) {
    value v = {.kind = KI_VALUE_NONE};
    if (file->kind == KI_FILE_GGUF) {
        const ki_name *name = ki_names_find(file->kv_names, file->n_kvs, ki_str_of(key));
        if (name) decode(&v, &file->kvs[name->item]);
        return v;
    }
    const json_t *json = find_json(file->config, key);
    if (json) decode_json(&v, json);
    return v;
}

static kivi_status wrong_type(const ki_file *file, const char *key, const value *v,
                              const char *expected, kivi_error *err) {
    return KI_FAIL(err, FORMAT, "%s: key %s: is of type %s, expected %s", file->config_label, key,
                   v->type_name, expected);
}

ki_value_kind ki_file_value_kind(const ki_file *file, const char *key) {
    return find(file, key).kind;
}

/* ---- scalars: *out is written last, so a failure leaves the caller's default alone ---- */

kivi_status ki_file_u64(uint64_t *out, bool *found, const ki_file *file, const char *key,
                        uint64_t min, uint64_t max, kivi_error *err) {
    char text[24];
    value v = find(file, key);
    *found = v.kind != KI_VALUE_NONE;
    if (!*found) return KIVI_OK;
    if (v.kind != KI_VALUE_INT) return wrong_type(file, key, &v, "an integer", err);
    if (!v.negative && v.u >= min && v.u <= max) {
        *out = v.u;
        return KIVI_OK;
    }
    if (v.negative) snprintf(text, sizeof text, "%lld", (long long)v.u);
    else snprintf(text, sizeof text, "%llu", (unsigned long long)v.u);
    return KI_FAIL(err, FORMAT, "%s: key %s: is %s, expected %llu to %llu", file->config_label, key,
                   text, (unsigned long long)min, (unsigned long long)max);
}

kivi_status ki_file_f64(double *out, bool *found, const ki_file *file, const char *key, double min,
                        double max, kivi_error *err) {
    value v = find(file, key);
    *found = v.kind != KI_VALUE_NONE;
    if (!*found) return KIVI_OK;
    bool number = v.kind == KI_VALUE_FLOAT || (v.kind == KI_VALUE_INT && v.json);
    if (!number) return wrong_type(file, key, &v, "a float", err);
    double f = v.kind == KI_VALUE_FLOAT ? v.f : (double)(int64_t)v.u;
    if (!isfinite(f) || f < min || f > max)
        return KI_FAIL(err, FORMAT, "%s: key %s: is %g, expected %g to %g", file->config_label, key,
                       f, min, max);
    *out = f;
    return KIVI_OK;
}

kivi_status ki_file_bool(bool *out, bool *found, const ki_file *file, const char *key,
                         kivi_error *err) {
    value v = find(file, key);
    *found = v.kind != KI_VALUE_NONE;
    if (!*found) return KIVI_OK;
    if (v.kind != KI_VALUE_BOOL) return wrong_type(file, key, &v, "a bool", err);
    *out = v.u != 0;
    return KIVI_OK;
}

kivi_status ki_file_str(ki_str *out, bool *found, const ki_file *file, const char *key,
                        kivi_error *err) {
    value v = find(file, key);
    *found = v.kind != KI_VALUE_NONE;
    if (!*found) return KIVI_OK;
    if (v.kind != KI_VALUE_STR) return wrong_type(file, key, &v, "a string", err);
    *out = v.text;
    return KIVI_OK;
}

/* ---- arrays ---- */

/* One array being copied out. accept: GGUF item types allowed, as bits. */
typedef struct array {
    const ki_file *file;
    const char *key, *expected;
    unsigned accept;
    size_t item_bytes;
    value v;
    size_t count;
    kivi_error *err;
} array;

static kivi_status bad_item(const array *a, size_t index) {
    return KI_FAIL(a->err, FORMAT, "%s: key %s: item %zu is not %s", a->file->config_label, a->key,
                   index, a->expected);
}

/* Finds, checks the type and allocates. *block NULL: absent. The type of the items is exact:
 * reading an array of bytes as an array of floats would run past its end. */
static kivi_status array_open(array *a, void **block, bool *found) {
    a->v = find(a->file, a->key);
    *block = NULL;
    *found = a->v.kind != KI_VALUE_NONE;
    if (!*found) return KIVI_OK;
    if (a->v.kind != KI_VALUE_ARRAY)
        return wrong_type(a->file, a->key, &a->v, "an array", a->err);
    const ki_kv *kv = a->v.kv;
    if (kv && !(a->accept >> kv->item_type & 1))
        return KI_FAIL(a->err, FORMAT, "%s: key %s: is an array of %s, expected items to be %s",
                       a->file->config_label, a->key, ki_gguf_value_name(kv->item_type),
                       a->expected);
    a->count = kv ? kv->count : json_array_size(a->v.json);
    return ki_alloc_array(block, a->file->mem, KI_TAG_other, a->count, a->item_bytes, a->err);
}

/* Hands the block over, or frees it when filling failed. */
static kivi_status array_close(const array *a, void *block, size_t *count, kivi_status status) {
    *count = status == KIVI_OK ? a->count : 0;
    if (status != KIVI_OK) ki_free(a->file->mem, block);
    return status;
}

static kivi_status fill_strs(const array *a, ki_str *out) {
    const uint8_t *p = a->v.kv ? a->v.kv->value : NULL;
    for (size_t i = 0; i < a->count; i++) {
        if (p) { /* lengths were checked when the file was opened */
            size_t n_bytes = (size_t)ki_load_u64(p);
            out[i] = (ki_str){(const char *)p + 8, n_bytes};
            p += 8 + n_bytes;
            continue;
        }
        const json_t *item = json_array_get(a->v.json, i);
        if (!json_is_string(item)) return bad_item(a, i);
        out[i] = (ki_str){json_string_value(item), json_string_length(item)};
    }
    return KIVI_OK;
}

/* uint32 above INT32_MAX would come out negative: refused, as is a JSON integer beyond 32 bits. */
static kivi_status fill_ints(const array *a, int32_t *out) {
    const ki_kv *kv = a->v.kv;
    for (size_t i = 0; i < a->count; i++) {
        const json_t *item = kv ? NULL : json_array_get(a->v.json, i);
        uint32_t raw = kv ? ki_load_u32(kv->value + 4 * i) : 0;
        json_int_t n = item ? json_integer_value(item)
                            : kv->item_type == KI_GGUF_U32 ? (json_int_t)raw : (int32_t)raw;
        if ((item && !json_is_integer(item)) || n < INT32_MIN || n > INT32_MAX)
            return bad_item(a, i);
        out[i] = (int32_t)n;
    }
    return KIVI_OK;
}

static kivi_status fill_floats(const array *a, float *out) {
    const ki_kv *kv = a->v.kv;
    for (size_t i = 0; i < a->count; i++) {
        if (kv) {
            out[i] = ki_f32_from_bits(ki_load_u32(kv->value + 4 * i));
            continue;
        }
        const json_t *item = json_array_get(a->v.json, i);
        if (!json_is_number(item)) return bad_item(a, i);
        out[i] = (float)json_number_value(item);
    }
    return KIVI_OK;
}

kivi_status ki_file_str_array(ki_str **out, size_t *count, bool *found, const ki_file *file,
                              const char *key, kivi_error *err) {
    array a = {.file = file, .key = key, .expected = "strings", .accept = 1u << KI_GGUF_STR,
               .item_bytes = sizeof **out, .err = err};
    void *block;
    kivi_status status = array_open(&a, &block, found);
    if (block) status = fill_strs(&a, block);
    status = array_close(&a, block, count, status);
    *out = status == KIVI_OK ? block : NULL;
    return status;
}

kivi_status ki_file_int_array(int32_t **out, size_t *count, bool *found, const ki_file *file,
                              const char *key, kivi_error *err) {
    array a = {.file = file, .key = key, .expected = "integers of 32 bits (int32, uint32)",
               .accept = 1u << KI_GGUF_I32 | 1u << KI_GGUF_U32, .item_bytes = sizeof **out,
               .err = err};
    void *block;
    kivi_status status = array_open(&a, &block, found);
    if (block) status = fill_ints(&a, block);
    status = array_close(&a, block, count, status);
    *out = status == KIVI_OK ? block : NULL;
    return status;
}

kivi_status ki_file_f32_array(float **out, size_t *count, bool *found, const ki_file *file,
                              const char *key, kivi_error *err) {
    array a = {.file = file, .key = key, .expected = "numbers (float32)",
               .accept = 1u << KI_GGUF_F32, .item_bytes = sizeof **out, .err = err};
    void *block;
    kivi_status status = array_open(&a, &block, found);
    if (block) status = fill_floats(&a, block);
    status = array_close(&a, block, count, status);
    *out = status == KIVI_OK ? block : NULL;
    return status;
}
