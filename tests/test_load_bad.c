/* test_load_bad.c: files broken in every way we could think of. Every failure must be a status with
 * a line that names the file, and leave nothing allocated; crashes and overreads are for the
 * sanitizers to find. */
#include "load_files.h"

/* ---- broken GGUF ---- */

static void test_truncated_gguf(void **state) {
    out o = good_gguf();
    (void)state;
    for (size_t n = 0; n < o.n_bytes; n++) {
        bad_bytes(o.data, n, NULL, KIVI_FORMAT, n < 4 ? "magic" : "");
        bad_path(write_file("cut.gguf", o.data, n), KIVI_FORMAT, "cut.gguf", "");
    }
    put(&o, "xxx", 3); /* the last tensor may be padded up to the alignment, not beyond */
    put(&o, "\0\0\0\0", 4);
    bad_gguf(o, KIVI_FORMAT, "4 tensors end at byte");
}

static void test_preamble(void **state) {
    static const uint64_t counts[] = {0, 1, 2, 3, 5, 200001, UINT32_MAX, 1ull << 32, 1ull << 60,
                                      UINT64_MAX / 37, UINT64_MAX / 37 + 1, UINT64_MAX / 2,
                                      UINT64_MAX / 2 + 1, UINT64_MAX};
    static const uint32_t versions[] = {0, 1, 4, 5, 0x10000, UINT32_MAX, 0x7fffffff};
    out o = good_gguf();
    (void)state;
    for (size_t at = 8; at <= 16; at += 8)
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
            out bad = {0};
            put(&bad, o.data, o.n_bytes);
            memcpy(bad.data + at, &counts[i], 8);
            bad_gguf(bad, counts[i] < 10 ? -1 : KIVI_FORMAT, counts[i] < 10 ? "" : "count at byte");
        }
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
        memcpy(o.data + 4, &versions[i], 4);
        bad_bytes(o.data, o.n_bytes, NULL, KIVI_UNSUPPORTED, "versions 2 and 3 are supported");
    }
    memcpy(o.data + 4, "\0\0\0\3", 4);
    bad_bytes(o.data, o.n_bytes, NULL, KIVI_UNSUPPORTED, "big-endian");
    memcpy(o.data, "gg\nf", 4);
    bad_gguf(o, KIVI_FORMAT, "found \"gg?f\"");
}

static out with_kv_value(const char *key, uint32_t type, const void *bytes, size_t n_bytes) {
    out o = {0};
    head(&o, 3, 1, 1);
    kv(&o, key, type, bytes, n_bytes);
    info(&o, "x", 1, NE(8), 0, 0);
    put_pad(&o, 32);
    put_pattern(&o, 32);
    return o;
}

static void test_alignment(void **state) {
    static const uint32_t bad[] = {0, 1, 2, 3, 4, 7, 12, 33, 1u << 21, 1u << 31, UINT32_MAX};
    static const uint64_t odd[4] = {0, 32, 32, 32};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        bad_gguf(with_kv_value("general.alignment", 4, &bad[i], 4), KIVI_FORMAT,
                 "general.alignment");
    for (uint32_t type = 6; type < 9; type++)
        bad_gguf(with_kv_value("general.alignment", type, odd, type == 7 ? 1 : 8), KIVI_FORMAT,
                 "expected an integer");
    out o = {0};
    head(&o, 3, 1, 1);
    kv_u32(&o, "general.alignment", 4096);
    info(&o, "x", 1, NE(8), 0, 0);
    put_pad(&o, 4096);
    put_pattern(&o, 32);
    close_good(open_good_bytes(&o, NULL));
    drop(&o);
    bad_gguf(one_tensor(1, NE(8), 0, 16, 48), KIVI_FORMAT, "no multiple of the alignment 32");
}

/* A value of every type under one key; p has room for what the reader may expect. */
static out typed_value(uint32_t type, uint32_t item_type) {
    out value = {0};
    if (type == 9) {
        put_u32(&value, item_type);
        put_u64(&value, 1);
    }
    uint32_t scalar = type == 9 ? item_type : type;
    static const size_t sizes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (scalar == 8) put_str(&value, "\1");
    else put(&value, "\1\0\0\0\0\0\0", sizes[scalar]);
    out o = with_kv_value("k", type, value.data, value.n_bytes);
    drop(&value);
    return o;
}

static void check_typed_scalars(const ki_file *file, uint32_t type) {
    uint64_t u;
    double f;
    bool flag, found;
    ki_str s;
    bool is_int = type <= 5 || type == 10 || type == 11;
    kivi_status bad = KIVI_FORMAT;
    assert_int_equal(ki_file_u64(&u, &found, file, "k", 0, 9, NULL), is_int ? 0 : bad);
    if (is_int) assert_int_equal(u, 1);
    assert_int_equal(ki_file_f64(&f, &found, file, "k", 0, 9, NULL),
                     type == 6 || type == 12 ? 0 : bad);
    assert_int_equal(ki_file_bool(&flag, &found, file, "k", NULL), type == 7 ? 0 : bad);
    assert_int_equal(ki_file_str(&s, &found, file, "k", NULL), type == 8 ? 0 : bad);
}

static void check_typed_arrays(const ki_file *file, uint32_t item_type) {
    ki_str *strs;
    int32_t *ints;
    float *floats;
    size_t count;
    bool found;
    kivi_status bad = KIVI_FORMAT;
    assert_int_equal(ki_file_str_array(&strs, &count, &found, file, "k", NULL),
                     item_type == 8 ? 0 : bad);
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "k", NULL),
                     item_type == 4 || item_type == 5 ? 0 : bad);
    assert_int_equal(ki_file_f32_array(&floats, &count, &found, file, "k", NULL),
                     item_type == 6 ? 0 : bad);
    ki_free(&good_mem, strs);
    ki_free(&good_mem, ints);
    ki_free(&good_mem, floats);
}

/* Every getter on every type and on arrays of every type: exact matches only. */
static void test_value_types(void **state) {
    (void)state;
    for (uint32_t type = 0; type < 13; type++)
        for (uint32_t item = 0; item < (type == 9 ? 13u : 1u); item++) {
            out o = typed_value(type, item);
            if (type == 9 && item == 9) {
                bad_gguf(o, KIVI_UNSUPPORTED, "array of arrays");
                continue;
            }
            ki_file *file = open_good_bytes(&o, NULL);
            check_typed_scalars(file, type);
            check_typed_arrays(file, type == 9 ? item : 99);
            close_good(file);
            drop(&o);
        }
    bad_gguf(with_kv_value("k", 13, "", 0), KIVI_FORMAT, "value type at byte");
    bad_gguf(with_kv_value("k", UINT32_MAX, "", 0), KIVI_FORMAT, "expected 0 to 12");
    bad_gguf(with_kv_value("k", 7, "\2", 1), KIVI_FORMAT, "expected 0 or 1");
}

static void test_numbers(void **state) {
    const double not_finite[] = {(double)__builtin_nanf(""), -(double)__builtin_inff()};
    double f;
    bool found;
    (void)state;
    for (int i = 0; i < 2; i++) {
        out o = with_kv_value("k", 12, &not_finite[i], 8);
        ki_file *file = open_good_bytes(&o, NULL);
        assert_int_equal(ki_file_f64(&f, &found, file, "k", -1e308, 1e308, NULL), KIVI_FORMAT);
        close_good(file);
        drop(&o);
    }
    out array = {0};
    put_u32(&array, 4);
    put_u64(&array, 1);
    put_u32(&array, 0x80000000u); /* as uint32 it is no int32 */
    out o = with_kv_value("k", 9, array.data, array.n_bytes);
    ki_file *file = open_good_bytes(&o, NULL);
    int32_t *ints;
    size_t count;
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "k", NULL), KIVI_FORMAT);
    assert_null(ints);
    close_good(file);
    drop(&o);
    drop(&array);
}

static void test_lengths(void **state) {
    static const uint64_t lengths[] = {(1ull << 31) - 1, 1ull << 31, 1ull << 32, 1ull << 40,
                                       (1ull << 63) - 1, 1ull << 63, UINT64_MAX - 7, UINT64_MAX};
    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        out key = {0}, name = {0};
        head(&key, 3, 0, 1);
        put_u64(&key, lengths[i]);
        put_pattern(&key, 64);
        bad_gguf(key, KIVI_FORMAT, "metadata key at byte 32: needs");
        head(&name, 3, 1, 0);
        put_u64(&name, lengths[i]);
        put_pattern(&name, 64);
        bad_gguf(name, KIVI_FORMAT, "tensor name at byte 32: needs");
        bad_gguf(with_kv_value("k", 8, &lengths[i], 8), KIVI_FORMAT, "string value at byte");
        for (uint32_t item = 0; item < 13; item++) {
            out value = {0};
            put_u32(&value, item);
            put_u64(&value, lengths[i]);
            bad_gguf(with_kv_value("k", 9, value.data, value.n_bytes),
                     item == 9 ? KIVI_UNSUPPORTED : KIVI_FORMAT, item == 9 ? "array of" : "count");
            drop(&value);
        }
    }
}

static void test_nested_arrays(void **state) {
    out value = {0};
    (void)state;
    for (int i = 0; i < 10000; i++) {
        put_u32(&value, 9);
        put_u64(&value, 1);
    }
    bad_gguf(with_kv_value("k", 9, value.data, value.n_bytes), KIVI_UNSUPPORTED, "array of arrays");
    drop(&value);
}

static void test_names(void **state) {
    char name[300];
    (void)state;
    out o = {0};
    head(&o, 3, 0, 2);
    kv_u32(&o, "same", 1);
    kv_u32(&o, "same", 2);
    bad_gguf(o, KIVI_FORMAT, "key same stands there twice, as numbers 0 and 1");
    o = (out){0};
    head(&o, 3, 2, 0);
    info(&o, "twin", 1, NE(8), 0, 0);
    info(&o, "twin", 1, NE(8), 0, 32);
    put_pad(&o, 32);
    put_pattern(&o, 64);
    bad_gguf(o, KIVI_FORMAT, "tensor twin stands there twice");
    for (size_t n = 0; n <= 256; n += 256) {
        o = (out){0};
        memset(name, 'x', sizeof name);
        name[n] = 0;
        head(&o, 3, 1, 0);
        info(&o, name, 1, NE(8), 0, 0);
        bad_gguf(o, KIVI_FORMAT, "expected 1 to 255");
    }
    o = (out){0};
    head(&o, 3, 1, 0);
    put_u64(&o, 3);
    put(&o, "a\0b", 3);
    put_pattern(&o, 64);
    bad_gguf(o, KIVI_FORMAT, "zero byte");
    bad_gguf(with_kv_value("", 4, "\0\0\0\0", 4), KIVI_FORMAT, "metadata key");
}

static void test_shapes(void **state) {
    (void)state;
    bad_gguf(one_tensor(1, NE(0), 0, 0, 0), KIVI_FORMAT, "the.tensor has a dimension of 0");
    bad_gguf(one_tensor(4, NE(4, 4, 0, 4), 0, 0, 0), KIVI_FORMAT, "[4][0][4][4]");
    bad_gguf(one_tensor(0, NE(1), 0, 0, 4), KIVI_FORMAT, "has 0 dimensions");
    bad_gguf(one_tensor(5, NE(1, 1, 1, 1, 1), 0, 0, 4), KIVI_FORMAT, "has 5 dimensions");
    bad_gguf(one_tensor(2, NE(1ull << 32, 1ull << 32), 0, 0, 4), KIVI_FORMAT, "2^64 elements");
    bad_gguf(one_tensor(2, NE((1ull << 32) + 8, 1ull << 32), 0, 0, 4), KIVI_FORMAT, "the.tensor");
    bad_gguf(one_tensor(3, NE(1ull << 62, 2, 2), 1, 0, 4), KIVI_FORMAT, "2^64 elements");
    bad_gguf(one_tensor(1, NE(UINT64_MAX), 0, 0, 4), KIVI_FORMAT, "exceed 2^64 bytes");
    bad_gguf(one_tensor(1, NE(1ull << 62), 0, 0, 4), KIVI_FORMAT, "exceed 2^64 bytes");
    bad_gguf(one_tensor(1, NE(UINT64_MAX - 31), 2, 0, 4), KIVI_FORMAT, "ends at byte");
    bad_gguf(one_tensor(2, NE(33, 32), 8, 0, 9999), KIVI_FORMAT, "needs a multiple of 32");
    bad_gguf(one_tensor(1, NE(9), 0, 0, 32), KIVI_FORMAT, "ends at byte 132, the file has 128");
    bad_gguf(one_tensor(1, NE(8), 0, 0, 31), KIVI_FORMAT, "ends at byte");
    bad_gguf(one_tensor(1, NE(8), 0, 0, 33), KIVI_FORMAT, "1 tensors end at byte 128");
    out o = one_tensor(1, NE(8), 0, 0, 32);
    close_good(open_good_bytes(&o, NULL));
    drop(&o);
}

static void test_types(void **state) {
    static const uint32_t refused[] = {4,  5,  9,  15, 16, 24,  28,       29,
                                       31, 34, 39, 40, 41, 255, 1u << 31, UINT32_MAX};
    static const uint32_t taken[] = {0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30};
    static const size_t bytes[] = {1024, 512, 144, 160, 176, 192, 272, 84, 110, 144, 176, 210, 512};
    (void)state;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        bad_gguf(one_tensor(1, NE(32), refused[i], 0, 128), KIVI_UNSUPPORTED, "not supported (F32");
    bad_gguf(one_tensor(1, NE(256), 16, 0, 66), KIVI_UNSUPPORTED,
             "type IQ2_XXS (16) not supported (F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K "
             "Q4_K Q5_K Q6_K)");
    for (size_t i = 7; i < 12; i++) { /* K-quants: whole blocks of 256, even where 32 would do */
        bad_gguf(one_tensor(1, NE(32), taken[i], 0, bytes[i]), KIVI_FORMAT, "a multiple of 256");
        bad_gguf(one_tensor(1, NE(257), taken[i], 0, bytes[i]), KIVI_FORMAT,
                 "the.tensor: rows of 257 elements");
        bad_gguf(one_tensor(1, NE(256), taken[i], 0, bytes[i] - 1), KIVI_FORMAT, "the.tensor");
    }
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) {
        out o = one_tensor(1, NE(256), taken[i], 0, bytes[i]);
        ki_file *file = open_good_bytes(&o, NULL);
        assert_int_equal(ki_file_tensor_at(file, 0)->n_bytes, bytes[i]);
        close_good(file);
        drop(&o);
    }
}

static void test_layout(void **state) {
    static const uint64_t huge[] = {1ull << 31, 1ull << 32, 1ull << 63, UINT64_MAX - 31};
    static const struct {
        uint64_t first, second;
        const char *needle;
    } pairs[] = {{0, 0, "overlaps"}, {0, 64, "a hole"}, {32, 64, "a hole"}, {32, 0, NULL}};
    (void)state;
    for (size_t i = 0; i < sizeof huge / sizeof *huge; i++)
        bad_gguf(one_tensor(1, NE(8), 0, huge[i], 32), KIVI_FORMAT, "the.tensor");
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        out o = {0};
        head(&o, 3, 2, 0);
        info(&o, "one", 1, NE(8), 0, pairs[i].first);
        info(&o, "two", 1, NE(8), 0, pairs[i].second);
        put_pad(&o, 32);
        put_pattern(&o, (size_t)KI_MAX(pairs[i].first, pairs[i].second) + 32);
        if (pairs[i].needle) {
            bad_gguf(o, KIVI_FORMAT, pairs[i].needle);
            continue;
        }
        close_good(open_good_bytes(&o, NULL)); /* any order of names, as long as all is claimed */
        drop(&o);
    }
    out o = {0};
    head(&o, 3, 2, 0);
    info(&o, "one", 1, NE(16), 0, 0);
    info(&o, "two", 1, NE(8), 0, 32);
    put_pad(&o, 32);
    put_pattern(&o, 64);
    bad_gguf(o, KIVI_FORMAT, "tensor two starts at byte");
}

/* ---- broken safetensors ---- */

static void test_truncated_safetensors(void **state) {
    out o = safetensors(good_header, GOOD_DATA);
    (void)state;
    for (size_t n = 0; n < o.n_bytes; n++) bad_bytes(o.data, n, good_config, KIVI_FORMAT, "");
    put(&o, "x", 1);
    bad_bytes(o.data, o.n_bytes, good_config, KIVI_FORMAT, "tensors end at data byte 46");
    drop(&o);
}

static void test_header_length(void **state) {
    static const uint64_t lengths[] = {0, 1, 100000001, 1ull << 31, 1ull << 32, 1ull << 63,
                                       UINT64_MAX, UINT64_MAX - 7};
    out o = safetensors(good_header, GOOD_DATA);
    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        memcpy(o.data, &lengths[i], 8);
        bad_bytes(o.data, o.n_bytes, "{}", KIVI_FORMAT, "header length at byte 0");
    }
    drop(&o);
    bad_header("[]", 0, KIVI_FORMAT, "starts with 0x5b");
    bad_header(" {}", 0, KIVI_FORMAT, "starts with 0x20");
    bad_header("{} {}", 0, KIVI_FORMAT, "JSON");
    bad_header("{\"a\"}", 0, KIVI_FORMAT, "JSON");
    bad_header("{\"\xff\": 1}", 0, KIVI_FORMAT, "JSON");
    bad_header("{\"a\\u0000\": 1}", 0, KIVI_FORMAT, "JSON");
    bad_header("{\"__metadata__\": {\"a\": 1}}", 0, KIVI_FORMAT, "__metadata__");
    bad_header("{\"__metadata__\": []}", 0, KIVI_FORMAT, "__metadata__");
}

#define ENTRY(dtype, shape, offsets)                                                               \
    "{\"w\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void test_entries(void **state) {
    static const struct {
        const char *header;
        const char *needle;
    } cases[] = {
        {"{\"w\":1}", "is no JSON object"},
        {"{\"w\":{}}", "no \"dtype\""},
        {"{\"\":{}}", "expected 1 to 255"},
        {ENTRY("7", "[1]", "[0,4]"), "no \"dtype\""},
        {ENTRY("\"X\\n9\"", "[1]", "[0,4]"), "X?9 is unknown"},
        {ENTRY("\"F32\"", "1", "[0,4]"), "\"shape\""},
        {ENTRY("\"F32\"", "[1,1,1,1,1]", "[0,4]"), "\"shape\" has 5"},
        {ENTRY("\"F32\"", "[-1]", "[0,4]"), "item 0 is no integer"},
        {ENTRY("\"F32\"", "[1.0]", "[0,4]"), "item 0 is no integer"},
        {ENTRY("\"F32\"", "[0]", "[0,0]"), "dimension of 0"},
        {ENTRY("\"I64\"", "[0]", "[0,0]"), "dimension of 0"},
        {ENTRY("\"F32\"", "[9223372036854775808]", "[0,4]"), "JSON"},
        {ENTRY("\"F32\"", "[4294967296,4294967296]", "[0,4]"), "2^64 elements"},
        {ENTRY("\"F32\"", "[4611686018427387905]", "[0,4]"), "not those of F32"},
        {ENTRY("\"F32\"", "[2]", "[0,4]"), "has 4 bytes, not those of F32 [2]"},
        {ENTRY("\"F16\"", "[1]", "[0,4]"), "not those of F16 [1]"},
        {ENTRY("\"F32\"", "[1]", "[0]"), "no [begin, end]"},
        {ENTRY("\"F32\"", "[1]", "[0,4,8]"), "data_offsets"},
        {ENTRY("\"F32\"", "[1]", "[4,0]"), "no [begin, end]"},
        {ENTRY("\"F32\"", "[1]", "[0,8]"), "ends at data byte 8, the file has 4"},
        {ENTRY("\"F32\"", "[1]", "[-4,0]"), "is no integer"},
        {ENTRY("\"F32\"", "[1]", "[\"0\",4]"), "is no integer"},
        {ENTRY("\"F32\"", "[1]", "[0,9223372036854775807]"), "ends at data byte"},
        {"{\"w\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
         "duplicate"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        bad_header(cases[i].header, 4, KIVI_FORMAT, cases[i].needle);
    bad_header(ENTRY("\"F8_E4M3\"", "[4]", "[0,4]"), 4, KIVI_UNSUPPORTED,
               "tensor w: dtype F8_E4M3 not supported (F32 F16 BF16)");
    bad_header(ENTRY("\"F64\"", "[1]", "[0,8]"), 8, KIVI_UNSUPPORTED, "F64");
    char header[512], name[300] = {0};
    memset(name, 'n', 256);
    snprintf(header, sizeof header, "{\"%s\":{}}", name);
    bad_header(header, 0, KIVI_FORMAT, "expected 1 to 255");
}

static void test_too_many_entries(void **state) {
    enum { N = 200001, ITEM_BYTES = 13 };
    char *header = malloc((size_t)N * ITEM_BYTES + 3);
    (void)state;
    assert_non_null(header);
    char *p = header;
    *p++ = '{';
    for (int i = 0; i < N; i++) p += sprintf(p, "\"a%06d\":{}%s", i, i < N - 1 ? "," : "}");
    bad_header(header, 0, KIVI_FORMAT, "header has 200001 entries, at most 200000");
    free(header);
}

#define TWO(a, b)                                                                                  \
    "{\"one\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":" a "},"                           \
    "\"two\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":" b "}}"

static void test_ranges(void **state) {
    (void)state;
    bad_header(TWO("[0,4]", "[0,4]"), 8, KIVI_FORMAT, "overlaps");
    bad_header(TWO("[0,4]", "[2,6]"), 8, KIVI_FORMAT, "overlaps");
    bad_header(TWO("[0,4]", "[8,12]"), 12, KIVI_FORMAT, "a hole");
    bad_header(TWO("[4,8]", "[8,12]"), 12, KIVI_FORMAT, "a hole");
    bad_header(TWO("[0,4]", "[4,8]"), 9, KIVI_FORMAT, "the file has 9");
    bad_header("{\"one\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
               "\"one\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
               8, KIVI_FORMAT, "duplicate");
    out o = safetensors(TWO("[4,8]", "[0,4]"), 8);
    close_good(open_good_bytes(&o, "{}"));
    drop(&o);
}

static char *repeated(const char *before, const char *item, size_t count, const char *after) {
    size_t n = strlen(item);
    char *text = malloc(strlen(before) + n * count + strlen(after) + 1);
    assert_non_null(text);
    char *p = stpcpy(text, before);
    for (size_t i = 0; i < count; i++, p += n) memcpy(p, item, n);
    strcpy(p, after);
    return text;
}

static void bad_config(char *config, const char *needle) {
    out o = safetensors(good_header, GOOD_DATA);
    bad_bytes(o.data, o.n_bytes, config, KIVI_FORMAT, needle);
    drop(&o);
    free(config);
}

static void test_config(void **state) {
    static const char *const bad[] = {"", "x", "[]", "7", "{\"a\":1,\"a\":2}", "{\"a\":1e999}",
                                      "{\"a\":99999999999999999999}", "\xef\xbb\xbf{}", "{}x",
                                      "{\"a\":\"\xff\"}", "{\"a\":NaN}", "{\"a", "{\"a\\"};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        bad_config(repeated(bad[i], "", 0, ""), "bad.model/config.json");
    bad_config(repeated("{\"a\":", "[", 10, ""), "JSON");
    bad_config(repeated("{\"a\":", "[", 100, ""), "nested deeper than 64 at byte 68");
    bad_config(repeated("{\"a\":", "[", 1000, ""), "nested deeper");
    bad_config(repeated("", "{\"a\":", 100000, ""), "nested deeper");
    bad_config(repeated("{\"a\":[", "{},", 60000, "{}]}"), "more values");
    bad_config(repeated("{\"a\":[", "1,", 600000, "1]}"), "more values");
    /* brackets inside strings are not depth */
    out o = safetensors(good_header, GOOD_DATA);
    char *deep_text = repeated("{\"a\":\"\\\"", "[", 1000, "\"}");
    close_good(open_good_bytes(&o, deep_text));
    free(deep_text);
    drop(&o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_truncated_gguf),
        cmocka_unit_test(test_preamble),
        cmocka_unit_test(test_alignment),
        cmocka_unit_test(test_value_types),
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_nested_arrays),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_truncated_safetensors),
        cmocka_unit_test(test_header_length),
        cmocka_unit_test(test_entries),
        cmocka_unit_test(test_too_many_entries),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_config),
    };
    return cmocka_run_group_tests_name("load bad", tests, make_folder, remove_folder);
}
