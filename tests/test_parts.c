/* test_parts.c: models in several files: a folder with an index of safetensors, GGUF in parts, and
 * GGUF of version 2. */
#include "load_files.h"

static void write_shard(const char *leaf, const char *header, size_t data_bytes) {
    out o = safetensors(header, data_bytes);
    write_file(leaf, o.data, o.n_bytes);
    drop(&o);
}

static const char shard_a[] = "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
                              "\"pos\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[16,24]}}";
static const char shard_b[] = "{\"b\":{\"dtype\":\"F16\",\"shape\":[2,3],\"data_offsets\":[0,12]}}";

/* The folder "m" with two shards and this index. */
static const char *model_with(const char *index) {
    mkdir(in_folder("m"), 0700);
    write_file("m/config.json", "{}", 2);
    write_shard("m/one.safetensors", shard_a, 24);
    write_shard("m/two.safetensors", shard_b, 12);
    write_file("m/model.safetensors.index.json", index, strlen(index));
    return in_folder("m");
}

static const char good_index[] =
    "{\"metadata\":{\"total_size\":36},\"weight_map\":{\"a\":\"one.safetensors\","
    "\"pos\":\"one.safetensors\",\"b\":\"two.safetensors\"}}";

static void test_index(void **state) {
    kivi_error err = {0};
    uint8_t copy[12], want[12];
    (void)state;
    ki_file *file = open_good(model_with(good_index));
    assert_int_equal(ki_file_n_tensors(file), 2);
    assert_int_equal(ki_file_n_skipped(file), 1);
    assert_string_equal(ki_file_skipped_at(file, 0), "pos");
    const ki_tensor *a = ki_file_tensor(file, "a"), *b = ki_file_tensor(file, "b");
    assert_non_null(a);
    assert_non_null(b);
    assert_null(ki_file_tensor(file, "pos"));
    assert_int_equal(b->dims[0], 2);
    for (size_t i = 0; i < 12; i++) want[i] = (uint8_t)(i * 7 + 1);
    assert_memory_equal(b->data, want, 12);
    assert_memory_equal(a->data, want, 12);
    assert_int_equal(ki_file_read(copy, file, b, 0, 12, &err), KIVI_OK);
    assert_memory_equal(copy, want, 12);
    ki_file_drop(file, b);
    assert_memory_equal(b->data, want, 12);
    assert_int_equal(ki_file_check_size(file, &err), KIVI_OK);
    struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    assert_int_equal(utimensat(AT_FDCWD, in_folder("m/two.safetensors"), times, 0), 0);
    assert_int_equal(ki_file_check_size(file, &err), KIVI_IO);
    assert_non_null(strstr(err.text, "two.safetensors"));
    close_good(file);
}

/* HAZARDS 14: nothing outside the folder is opened, whatever the index says. */
static void test_index_names(void **state) {
    static const char *const names[] = {"\"../one.safetensors\"",
                                        "\"/etc/passwd\"",
                                        "\"sub/one.safetensors\"",
                                        "\"..\"",
                                        "\".hidden\"",
                                        "\"\"",
                                        "\"a\\u0001b\"",
                                        "7",
                                        "null",
                                        "[\"one.safetensors\"]"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char index[256];
        snprintf(index, sizeof index, "{\"weight_map\":{\"a\":%s}}", names[i]);
        bad_path(model_with(index), KIVI_FORMAT, "index.json", "a file in this folder");
    }
}

static void test_index_lies(void **state) {
    (void)state;
    bad_path(model_with("{\"weight_map\":{\"a\":\"three.safetensors\"}}"), KIVI_FORMAT,
             "three.safetensors", "not there");
    bad_path(model_with("{\"weight_map\":{\"c\":\"one.safetensors\"}}"), KIVI_FORMAT,
             "one.safetensors", "tensor c is not there");
    bad_path(model_with("{\"weight_map\":{\"a\":\"two.safetensors\"}}"), KIVI_FORMAT,
             "two.safetensors", "tensor a is not there");
    bad_path(model_with("{\"weight_map\":{\"pos\":\"one.safetensors\"}}"), KIVI_FORMAT,
             "index.json", "tensor a of a part is not in the index");
    bad_path(model_with("{\"weight_map\":[]}"), KIVI_FORMAT, "index.json", "weight_map");
    bad_path(model_with("{\"weight_map\":"), KIVI_FORMAT, "index.json", "JSON");
    bad_path(model_with("{\"weight_map\":{\"a\":\"one.safetensors\",\"a\":\"two.safetensors\"}}"),
             KIVI_FORMAT, "index.json", "duplicate");
    model_with(good_index);
    write_shard("m/two.safetensors", /* a once more */
                "{\"a\":{\"dtype\":\"F16\",\"shape\":[6],\"data_offsets\":[0,12]},"
                "\"b\":{\"dtype\":\"F16\",\"shape\":[2,3],\"data_offsets\":[12,24]}}",
                24);
    bad_path(in_folder("m"), KIVI_FORMAT, "index.json", "tensor a stands there twice");
    write_shard("m/two.safetensors",
                "{\"b\":{\"dtype\":\"F8_E4M3\",\"shape\":[12],\"data_offsets\":[0,12]}}", 12);
    bad_path(in_folder("m"), KIVI_UNSUPPORTED, "two.safetensors", "F8_E4M3 not supported");
    unlink(in_folder("m/two.safetensors"));
    mkfifo(in_folder("m/two.safetensors"), 0600);
    bad_path(in_folder("m"), KIVI_FORMAT, "two.safetensors", "is a pipe");
    unlink(in_folder("m/two.safetensors"));
}

/* config.json alone is enough for a shape. */
static void test_shape(void **state) {
    kivi_error err = {0};
    ki_file *file = NULL;
    uint64_t layers = 0;
    bool found;
    (void)state;
    mkdir(in_folder("shape"), 0700);
    write_file("shape/config.json", "{\"n\": 3}", 8);
    ki_mem_init(&good_mem);
    assert_int_equal(ki_file_open_shape(&file, &good_mem, in_folder("shape"), &err), KIVI_OK);
    assert_int_equal(ki_file_n_tensors(file), 0);
    assert_null(ki_file_tensor(file, "a"));
    assert_int_equal(ki_file_u64(&layers, &found, file, "n", 1, 9, &err), KIVI_OK);
    assert_int_equal(layers, 3);
    assert_int_equal(ki_file_check_size(file, &err), KIVI_OK);
    close_good(file);
}

/* ---- GGUF ---- */

typedef struct split {
    int no, count, n_tensors; /* -1: no such key */
    const char *name;         /* of its one tensor; NULL: none */
} split;

static void put_split(out *o, const char *key, int value) {
    if (value >= 0) kv(o, key, 2, &(uint16_t){(uint16_t)value}, 2);
}

static void write_part(const char *leaf, uint32_t version, split s) {
    out o = {0};
    head(&o, version, s.name != NULL,
         (uint64_t)(s.no >= 0) + (uint64_t)(s.count >= 0) + (uint64_t)(s.n_tensors >= 0));
    put_split(&o, "split.no", s.no);
    put_split(&o, "split.count", s.count);
    put_split(&o, "split.tensors.count", s.n_tensors);
    if (s.name) info(&o, s.name, 1, NE(8), 0, 0);
    put_pad(&o, 32);
    if (s.name) put_pattern(&o, 32);
    write_file(leaf, o.data, o.n_bytes);
    drop(&o);
}

static const char first_part[] = "m-00001-of-00003.gguf";

static void write_parts(void) {
    write_part(first_part, 3, (split){0, 3, 3, "a"});
    write_part("m-00002-of-00003.gguf", 3, (split){1, 3, 3, "b"});
    write_part("m-00003-of-00003.gguf", 3, (split){2, 3, 3, "c"});
}

static void test_gguf_parts(void **state) {
    kivi_error err = {0};
    uint8_t copy[32];
    (void)state;
    write_parts();
    ki_file *file = open_good(in_folder(first_part));
    assert_int_equal(ki_file_n_tensors(file), 3);
    for (const char *name = "a\0b\0c\0"; *name; name += 2) {
        const ki_tensor *t = ki_file_tensor(file, name);
        assert_non_null(t);
        assert_int_equal(t->n_bytes, 32);
        assert_int_equal(ki_file_read(copy, file, t, 0, 32, &err), KIVI_OK);
        assert_memory_equal(copy, t->data, 32);
        ki_file_drop(file, t);
    }
    assert_int_equal(ki_file_check_size(file, &err), KIVI_OK);
    close_good(file);
    write_part(first_part, 3, (split){0, 3, 2, NULL}); /* metadata alone, as gguf-split can do */
    file = open_good(in_folder(first_part));
    assert_int_equal(ki_file_n_tensors(file), 2);
    close_good(file);
}

static void test_gguf_parts_bad(void **state) {
    (void)state;
    write_parts();
    bad_path(in_folder("m-00002-of-00003.gguf"), KIVI_FORMAT, "m-00002", "give the first one");
    write_part("m-00002-of-00003.gguf", 3, (split){2, 3, 3, "b"});
    bad_path(in_folder(first_part), KIVI_FORMAT, "m-00002", "split.no 2 of split.count 3");
    write_part("m-00002-of-00003.gguf", 3, (split){1, 4, 3, "b"});
    bad_path(in_folder(first_part), KIVI_FORMAT, "m-00002", "split.count 4");
    write_part("m-00002-of-00003.gguf", 3, (split){1, 3, 3, "a"});
    bad_path(in_folder(first_part), KIVI_FORMAT, "m-00001", "tensor a stands there twice");
    unlink(in_folder("m-00002-of-00003.gguf"));
    bad_path(in_folder(first_part), KIVI_FORMAT, "m-00002", "not there");
    write_parts();
    write_part(first_part, 3, (split){0, 3, 5, "a"});
    bad_path(in_folder(first_part), KIVI_FORMAT, "m-00001", "split.tensors.count is 5");
    write_part("odd.gguf", 3, (split){0, 3, 3, "a"});
    bad_path(in_folder("odd.gguf"), KIVI_FORMAT, "odd.gguf", "-00001-of-00003.gguf");
    write_part(first_part, 3, (split){0, 5000, 3, "a"});
    bad_path(in_folder(first_part), KIVI_FORMAT, "m-00001", "split.count");
}

static void test_version_2(void **state) {
    (void)state;
    write_part("two.gguf", 2, (split){-1, -1, -1, "a"});
    ki_file *file = open_good(in_folder("two.gguf"));
    assert_int_equal(ki_file_n_tensors(file), 1);
    close_good(file);
}

/* Every allocation of both forms fails once: an error, and nothing held. */
static void test_allocation_failures(void **state) {
    (void)state;
    write_parts();
    model_with(good_index);
    for (int form = 0; form < 2; form++)
        for (int64_t n = 1;; n++) {
            kivi_error err = {0};
            ki_file *file = NULL;
            ki_mem mem;
            ki_mem_init(&mem);
            atomic_store(&mem.fail_countdown, n);
            kivi_status status =
                ki_file_open(&file, &mem, in_folder(form ? "m" : first_part), &err);
            ki_file_close(&file);
            check_empty(&mem);
            if (status == KIVI_OK) break;
            assert_int_equal(status, KIVI_NOMEM);
            assert_true(n < 200);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_index),      cmocka_unit_test(test_index_names),
        cmocka_unit_test(test_index_lies), cmocka_unit_test(test_shape),
        cmocka_unit_test(test_gguf_parts), cmocka_unit_test(test_gguf_parts_bad),
        cmocka_unit_test(test_version_2),  cmocka_unit_test(test_allocation_failures),
    };
    return cmocka_run_group_tests_name("parts", tests, make_folder, remove_folder);
}
