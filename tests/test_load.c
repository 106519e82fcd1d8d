/* test_load.c: the tensor directory of src/load: good files, odd paths, files that change while
 * open, failing allocations and random damage. test_load_bad.c has the files that are wrong on
 * purpose.
 * KIVI_TEST_MODEL: path of SmolLM2-135M as GGUF, for the one test that wants a real file.
 * KIVI_TEST_SEED: seed of the random damage. */
#include "load_files.h"

/* ---- good files ---- */

static void test_dtypes(void **state) {
    static const uint32_t bytes[] = {4, 2, 2, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210};
    static const uint32_t elements[] = {1, 1, 1, 32, 32, 32, 32, 32, 256, 256, 256, 256, 256};
    static const char *const names[] = {"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                        "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"};
    (void)state;
    for (int i = 0; i < KI_DTYPE_COUNT; i++) {
        assert_int_equal(ki_dtype_block_bytes((ki_dtype)i), bytes[i]);
        assert_int_equal(ki_dtype_block_elements((ki_dtype)i), elements[i]);
        assert_string_equal(ki_dtype_name((ki_dtype)i), names[i]);
    }
    assert_string_equal(ki_dtype_name(KI_DTYPE_COUNT), "?");
    assert_string_equal(ki_gguf_type_name(14), "Q6_K");
    assert_string_equal(ki_gguf_type_name(39), "MXFP4");
    assert_string_equal(ki_gguf_type_name(40), "unknown");
}

static void check_good_tensors(const ki_file *file) {
    kivi_error err = {0};
    const ki_tensor *t;
    assert_int_equal(ki_file_n_tensors(file), GOOD_TENSORS);
    assert_null(ki_file_tensor_at(file, GOOD_TENSORS));
    assert_null(ki_file_tensor(file, "absent"));
    assert_string_equal(ki_file_tensor_at(file, 0)->name, "token_embd.weight");
    assert_int_equal(ki_file_tensor_shaped(&t, file, "token_embd.weight", 2, NE(4, 32), &err), 0);
    assert_int_equal(t->dtype, KI_Q8_0);
    assert_int_equal(t->n_bytes, 136);
    assert_int_equal(t->data[0], 1);
    t = ki_file_tensor(file, "half");
    assert_int_equal(t->n_dims, 3);
    assert_int_equal(t->dims[2], 5);
    assert_int_equal(t->dims[3], 1);
    assert_int_equal(t->data[29], (uint8_t)((288 + 29) * 7 + 1));
    assert_int_equal(ki_file_tensor_shaped(&t, file, "norm", 1, NE(9), &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "norm has shape [8], expected [9]"));
    assert_int_equal(ki_file_tensor_shaped(&t, file, "gone", 2, NE(9, 1), &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "gone is missing, expected shape [9][1]"));
    assert_null(t);
    assert_int_equal(ki_file_tensor_shaped(&t, file, "half", 5, NE(1, 1, 1, 1, 1), &err), KIVI_ARG);
}

static void check_good_metadata(const ki_file *file) {
    kivi_error err = {0};
    uint64_t u = 99;
    double f = 0;
    bool found, flag = false;
    ki_str text;
    assert_int_equal(ki_file_u64(&u, &found, file, "llama.block_count", 1, 30, &err), 0);
    assert_true(found && u == 30);
    assert_int_equal(ki_file_u64(&u, &found, file, "absent", 1, 30, &err), 0);
    assert_true(!found && u == 30);
    assert_int_equal(ki_file_u64(&u, &found, file, "llama.block_count", 31, 40, &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "llama.block_count: is 30, expected 31 to 40"));
    assert_int_equal(ki_file_u64(&u, &found, file, "small", 0, UINT64_MAX, &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "is -5, expected 0"));
    assert_int_equal(ki_file_f64(&f, &found, file, "eps", 0, 1, &err), 0);
    assert_true(found && f == 0.5);
    assert_int_equal(ki_file_f64(&f, &found, file, "eps", 0.6, 1, &err), KIVI_FORMAT);
    assert_int_equal(ki_file_bool(&flag, &found, file, "flag", &err), 0);
    assert_true(found && flag);
    assert_int_equal(ki_file_str(&text, &found, file, "general.architecture", &err), 0);
    assert_true(found && text.n_bytes == 5 && !memcmp(text.bytes, "llama", 5));
    assert_int_equal(ki_file_value_kind(file, "tokens"), KI_VALUE_ARRAY);
    assert_int_equal(ki_file_value_kind(file, "absent"), KI_VALUE_NONE);
}

static void check_good_arrays(const ki_file *file) {
    kivi_error err = {0};
    ki_str *strs;
    int32_t *ints;
    float *floats;
    size_t count;
    bool found;
    assert_int_equal(ki_file_str_array(&strs, &count, &found, file, "tokens", &err), 0);
    assert_true(found && count == 3 && strs[1].n_bytes == 0 && !memcmp(strs[2].bytes, "hello", 5));
    ki_free(&good_mem, strs);
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "types", &err), 0);
    assert_true(found && count == 3 && ints[1] == -2);
    ki_free(&good_mem, ints);
    assert_int_equal(ki_file_f32_array(&floats, &count, &found, file, "scores", &err), 0);
    assert_true(found && count == 2 && floats[1] == -2.0f);
    ki_free(&good_mem, floats);
    assert_int_equal(ki_file_f32_array(&floats, &count, &found, file, "types", &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "array of int32, expected items to be numbers (float32)"));
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "absent", &err), 0);
    assert_true(!found && !ints && count == 0);
}

static void test_good_gguf(void **state) {
    out o = good_gguf();
    const char *path = write_file("good.gguf", o.data, o.n_bytes);
    (void)state;
    for (int from_file = 0; from_file < 2; from_file++) {
        ki_file *file = from_file ? open_good(path) : open_good_bytes(&o, NULL);
        assert_int_equal(ki_file_kind_get(file), KI_FILE_GGUF);
        assert_string_equal(ki_file_path(file), from_file ? path : "good");
        check_good_tensors(file);
        check_good_metadata(file);
        check_good_arrays(file);
        for (size_t i = 0; i < GOOD_TENSORS; i++) {
            const ki_tensor *t = ki_file_tensor_at(file, i);
            uint8_t copy[136], first = t->data[0];
            kivi_error err = {0};
            assert_int_equal(ki_file_read(copy, file, t, 1, t->n_bytes - 1, &err), 0);
            assert_memory_equal(copy, t->data + 1, t->n_bytes - 1);
            assert_int_equal(ki_file_read(copy, file, t, 1, t->n_bytes, &err), KIVI_ARG);
            assert_int_equal(ki_file_read(copy, file, t, SIZE_MAX, 1, &err), KIVI_ARG);
            ki_file_drop(file, t);
            assert_int_equal(t->data[0], first);
        }
        assert_int_equal(ki_file_check_size(file, NULL), KIVI_OK);
        close_good(file);
    }
    ki_file_close(&(ki_file *){NULL});
    ki_file_close(NULL);
    drop(&o);
}

static void check_hf_metadata(const ki_file *file) {
    kivi_error err = {0};
    uint64_t u = 0;
    double f = 0;
    bool found, flag = false;
    ki_str text;
    assert_int_equal(ki_file_u64(&u, &found, file, "n_layer", 1, 100, &err), 0);
    assert_true(found && u == 30);
    assert_int_equal(ki_file_u64(&u, &found, file, "rope.deep.x", 1, 100, &err), 0);
    assert_true(found && u == 7);
    assert_int_equal(ki_file_f64(&f, &found, file, "theta", 1, 1e9, &err), 0);
    assert_true(found && f == 10000);
    assert_int_equal(ki_file_f64(&f, &found, file, "eps", 0, 1, &err), 0);
    assert_true(found && f == 1e-5);
    assert_int_equal(ki_file_bool(&flag, &found, file, "tie", &err), 0);
    assert_true(found && flag);
    assert_int_equal(ki_file_str(&text, &found, file, "rope.type", &err), 0);
    assert_true(found && text.n_bytes == 6);
    static const char *const absent[] = {"none", "gone", "rope.gone", "n_layer.x", "none.x", "",
                                         ".", "rope.", "rope..x"};
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) {
        assert_int_equal(ki_file_u64(&u, &found, file, absent[i], 0, 9, &err), 0);
        assert_false(found);
    }
    assert_int_equal(ki_file_u64(&u, &found, file, "neg", 0, 9, &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "config.json: key neg: is -1, expected 0 to 9"));
    assert_int_equal(ki_file_u64(&u, &found, file, "eps", 0, 9, &err), KIVI_FORMAT);
    assert_int_equal(ki_file_str(&text, &found, file, "rope", &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "is of type object, expected a string"));
    assert_int_equal(ki_file_bool(&flag, &found, file, "n_layer", &err), KIVI_FORMAT);
    assert_int_equal(ki_file_f64(&f, &found, file, "tie", 0, 1, &err), KIVI_FORMAT);
}

static void check_hf_arrays(const ki_file *file) {
    kivi_error err = {0};
    ki_str *strs;
    int32_t *ints;
    float *floats;
    size_t count;
    bool found;
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "eos", &err), 0);
    assert_true(found && count == 2 && ints[1] == 2);
    ki_free(&good_mem, ints);
    assert_int_equal(ki_file_str_array(&strs, &count, &found, file, "arch", &err), 0);
    assert_true(found && count == 2 && !memcmp(strs[0].bytes, "Llama", 5));
    ki_free(&good_mem, strs);
    assert_int_equal(ki_file_f32_array(&floats, &count, &found, file, "eos", &err), 0);
    assert_true(found && floats[0] == 1.0f);
    ki_free(&good_mem, floats);
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "mixed", &err), KIVI_FORMAT);
    assert_non_null(strstr(err.text, "key mixed: item 1 is not integers of 32 bits"));
    assert_int_equal(ki_file_f32_array(&floats, &count, &found, file, "mixed", &err), KIVI_FORMAT);
    assert_int_equal(ki_file_str_array(&strs, &count, &found, file, "mixed", &err), KIVI_FORMAT);
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "big", &err), KIVI_FORMAT);
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "n_layer", &err), KIVI_FORMAT);
}

static void test_good_folder(void **state) {
    const char *path = write_model_folder("good-hf", good_config, good_header, GOOD_DATA);
    out o = safetensors(good_header, GOOD_DATA);
    (void)state;
    for (int from_file = 0; from_file < 2; from_file++) {
        ki_file *file = from_file ? open_good(path) : open_good_bytes(&o, good_config);
        assert_int_equal(ki_file_kind_get(file), KI_FILE_HF);
        assert_int_equal(ki_file_n_tensors(file), 3);
        const ki_tensor *b = ki_file_tensor(file, "b"), *s = ki_file_tensor(file, "s");
        assert_true(b->dtype == KI_F16 && b->n_dims == 2 && b->dims[0] == 2 && b->dims[1] == 3);
        assert_int_equal(b->data[0], (uint8_t)(16 * 7 + 1));
        assert_true(s->dtype == KI_BF16 && s->n_dims == 0 && s->n_bytes == 2 && s->dims[0] == 1);
        assert_int_equal(ki_file_n_skipped(file), 1);
        assert_string_equal(ki_file_skipped_at(file, 0), "pos");
        assert_null(ki_file_skipped_at(file, 1));
        check_hf_metadata(file);
        check_hf_arrays(file);
        close_good(file);
    }
    drop(&o);
}

/* A header longer than the first read of 1 MiB, and one that is cut behind that read. */
static void test_long_header(void **state) {
    enum { N = 150000 };
    out o = {0};
    ki_str *strs;
    size_t count;
    bool found;
    kivi_error err = {0};
    (void)state;
    size_t cap = 64 + (size_t)N * 18;
    o.data = malloc(cap);
    assert_non_null(o.data);
    uint8_t *p = o.data;
    out start = {0};
    head(&start, 3, 1, 1);
    array_head(&start, "tokens", 8, N);
    memcpy(p, start.data, start.n_bytes);
    o.n_bytes = start.n_bytes;
    for (size_t i = 0; i < N; i++) {
        char text[16];
        uint64_t n = (uint64_t)snprintf(text, sizeof text, "t%zu", i);
        memcpy(p + o.n_bytes, &n, 8);
        memcpy(p + o.n_bytes + 8, text, n);
        o.n_bytes += 8 + n;
    }
    drop(&start);
    info(&o, "x", 1, NE(8), 0, 0);
    put_pad(&o, 32);
    put_pattern(&o, 32);
    ki_file *file = open_good(write_file("long.gguf", o.data, o.n_bytes));
    assert_int_equal(ki_file_str_array(&strs, &count, &found, file, "tokens", &err), 0);
    assert_true(count == N && !memcmp(strs[N - 1].bytes, "t149999", 7));
    assert_int_equal(ki_file_tensor(file, "x")->data[31], (uint8_t)(31 * 7 + 1));
    ki_free(&good_mem, strs);
    close_good(file);
    bad_path(write_file("cut.gguf", o.data, 1536 * 1024 + 3), KIVI_FORMAT, "cut.gguf", "at byte");
    drop(&o);
}

/* ---- paths ---- */

static void test_odd_paths(void **state) {
    (void)state;
    alarm(60); /* a pipe must not block us */
    bad_path(in_folder("gone.gguf"), KIVI_IO, "gone.gguf", "No such file");
    bad_path("", KIVI_IO, "", "No such file");
    bad_path(write_file("empty.gguf", "", 0), KIVI_FORMAT, "empty.gguf", "is empty");
    bad_path(write_file("one.gguf", "G", 1), KIVI_FORMAT, "one.gguf", "magic at byte 0: needs 4");
    assert_int_equal(mkfifo(in_folder("pipe"), 0600), 0);
    bad_path(in_folder("pipe"), KIVI_FORMAT, "pipe", "is a pipe");
    bad_path("/dev/zero", KIVI_FORMAT, "/dev/zero", "is a device");
    char path[5000];
    snprintf(path, sizeof path, "%s/a\nb.gguf", folder);
    bad_path(path, KIVI_IO, "a?b.gguf", "No such file");
    memset(path, 'd', sizeof path - 1);
    strcpy(path + 4500, "/the-end.gguf");
    bad_path(path, KIVI_IO, "...", "the-end.gguf");
    alarm(0);
}

static void test_odd_folders(void **state) {
    (void)state;
    alarm(60);
    mkdir(in_folder("bare"), 0700);
    bad_path(in_folder("bare"), KIVI_FORMAT, "bare/config.json", "not there");
    write_file("bare/config.json", "{}", 2);
    bad_path(in_folder("bare"), KIVI_FORMAT, "bare/model.safetensors", "not there");
    write_file("bare/model.safetensors.index.json", "{}", 2);
    bad_path(in_folder("bare"), KIVI_FORMAT, "index.json", "weight_map has 0 tensors");
    write_file("bare/model.safetensors", "", 0);
    bad_path(in_folder("bare"), KIVI_FORMAT, "bare/model.safetensors", "is empty");
    write_file("bare/config.json", "", 0);
    bad_path(in_folder("bare"), KIVI_FORMAT, "bare/config.json", "is empty");
    unlink(in_folder("bare/config.json"));
    mkfifo(in_folder("bare/config.json"), 0600);
    bad_path(in_folder("bare"), KIVI_FORMAT, "bare/config.json", "is a pipe");
    unlink(in_folder("bare/config.json"));
    int fd = open(in_folder("bare/config.json"), O_CREAT | O_WRONLY, 0600);
    assert_int_equal(ftruncate(fd, 16 * 1024 * 1024 + 1), 0);
    close(fd);
    bad_path(in_folder("bare"), KIVI_FORMAT, "bare/config.json", "at most 16777216");
    unlink(in_folder("bare/config.json"));
    assert_int_equal(symlink("config.json", in_folder("bare/config.json")), 0);
    bad_path(in_folder("bare"), -1, "bare/config.json", "symbolic links");
    alarm(0);
}

/* Sparse files of 1 TiB: sizes that pass the check against the file must not be allocated. */
static void test_huge_sparse(void **state) {
    static const uint64_t counts[] = {1ull << 30, 1ull << 35};
    (void)state;
    for (size_t i = 0; i < 2; i++)
        for (int which = 0; which < 3; which++) {
            out o = {0};
            head(&o, 3, which == 0 ? counts[i] : 1, which == 1 ? counts[i] : 1);
            put_u64(&o, counts[i]); /* a key of a gigabyte */
            const char *path = write_file("sparse.gguf", o.data, o.n_bytes);
            drop(&o);
            if (truncate(path, 1ll << 40)) skip(); /* a file system without large files */
            bad_path(path, KIVI_FORMAT, "sparse.gguf", "at byte");
            unlink(path);
        }
}

static void test_changed_file(void **state) {
    out o = good_gguf();
    kivi_error err = {0};
    uint8_t copy[136];
    (void)state;
    const char *path = write_file("changing.gguf", o.data, o.n_bytes);
    ki_file *file = open_good(path);
    const ki_tensor *first = ki_file_tensor(file, "token_embd.weight");
    assert_int_equal(ki_file_check_size(file, &err), KIVI_OK);
    struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
    assert_int_equal(ki_file_check_size(file, &err), KIVI_IO);
    assert_non_null(strstr(err.text, "written to while in use"));
    assert_int_equal(truncate(path, 20), 0);
    assert_int_equal(ki_file_check_size(file, &err), KIVI_IO);
    assert_non_null(strstr(err.text, "20 bytes now"));
    assert_int_equal(ki_file_read(copy, file, first, 0, 136, &err), KIVI_IO);
    assert_non_null(strstr(err.text, "changing.gguf: ends at byte"));
    check_good_metadata(file); /* copied at open: still whole */
    check_good_arrays(file);
    close_good(file);
    path = write_file("moved.gguf", o.data, o.n_bytes);
    file = open_good(path);
    assert_int_equal(rename(write_file("new.gguf", "x", 1), in_folder("moved.gguf")), 0);
    assert_int_equal(ki_file_check_size(file, &err), KIVI_OK); /* the old file stays mapped */
    check_good_tensors(file);
    close_good(file);
    drop(&o);
}

/* ---- sweeps ---- */

static void sweep(const char *path) {
    bool done = false;
    for (int64_t n = 1; !done; n++) {
        ki_mem mem;
        ki_file *file = NULL;
        kivi_error err = {0};
        assert_true(n < 100);
        ki_mem_init(&mem);
        atomic_store(&mem.fail_countdown, n);
        kivi_status status = ki_file_open(&file, &mem, path, &err);
        done = status == KIVI_OK;
        if (!done) {
            assert_int_equal(status, KIVI_NOMEM);
            assert_true(err.text[0] != 0);
            assert_null(file);
        }
        ki_file_close(&file);
        check_empty(&mem);
        assert_true(done || n < 20);
    }
}

static void test_allocation_failures(void **state) {
    out o = good_gguf();
    int32_t *ints;
    size_t count;
    bool found;
    (void)state;
    sweep(write_file("sweep.gguf", o.data, o.n_bytes));
    sweep(write_model_folder("sweep-hf", good_config, good_header, GOOD_DATA));
    ki_file *file = open_good(in_folder("sweep.gguf"));
    atomic_store(&good_mem.fail_countdown, 1);
    assert_int_equal(ki_file_int_array(&ints, &count, &found, file, "types", NULL), KIVI_NOMEM);
    assert_null(ints);
    close_good(file);
    drop(&o);
}

/* Reads everything a damaged file that was accepted offers. */
static void use_all(ki_mem *mem, const ki_file *file, const char *const *keys, size_t n_keys) {
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < ki_file_n_tensors(file); i++) {
        const ki_tensor *t = ki_file_tensor_at(file, i);
        assert_ptr_equal(ki_file_tensor(file, t->name), t);
        for (size_t b = 0; b < t->n_bytes; b++) sum = (uint8_t)(sum + t->data[b]);
    }
    for (size_t i = 0; i < n_keys; i++) {
        uint64_t u;
        double f;
        bool flag, found;
        ki_str s, *strs;
        int32_t *ints;
        float *floats;
        size_t count;
        (void)ki_file_u64(&u, &found, file, keys[i], 0, UINT64_MAX, NULL);
        (void)ki_file_f64(&f, &found, file, keys[i], -1, 1, NULL);
        (void)ki_file_bool(&flag, &found, file, keys[i], NULL);
        if (!ki_file_str(&s, &found, file, keys[i], NULL) && found)
            for (size_t b = 0; b < s.n_bytes; b++) sum = (uint8_t)(sum + (uint8_t)s.bytes[b]);
        (void)ki_file_int_array(&ints, &count, &found, file, keys[i], NULL);
        (void)ki_file_f32_array(&floats, &count, &found, file, keys[i], NULL);
        (void)ki_file_str_array(&strs, &count, &found, file, keys[i], NULL);
        for (size_t k = 0; k < count; k++)
            if (strs[k].n_bytes) sum = (uint8_t)(sum + (uint8_t)strs[k].bytes[strs[k].n_bytes - 1]);
        ki_free(mem, ints);
        ki_free(mem, floats);
        ki_free(mem, strs);
    }
}

static uint64_t random_state;
static uint64_t random_next(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void damage(uint8_t *bytes, size_t n_bytes) {
    static const uint64_t values[] = {0, 1, 2, 31, 32, 33, 255, UINT32_MAX, 1ull << 31, 1ull << 32,
                                      1ull << 63, UINT64_MAX, UINT64_MAX - 1, UINT64_MAX / 2};
    size_t n_changes = 1 + random_next() % 4;
    for (size_t i = 0; i < n_changes && n_bytes; i++) {
        size_t at = random_next() % n_bytes;
        uint64_t value = values[random_next() % (sizeof values / sizeof *values)];
        switch (random_next() % 3) {
        case 0: bytes[at] ^= (uint8_t)(1u << random_next() % 8); break;
        case 1: bytes[at] = (uint8_t)random_next(); break;
        default: memcpy(bytes + at, &value, KI_MIN(n_bytes - at, (size_t)8)); break;
        }
    }
}

/* kind 0: GGUF; 1: safetensors; 2: config.json */
static bool try_damaged(int kind, const out *model, const char *config, const char *const *keys,
                        size_t n_keys) {
    ki_mem mem;
    ki_file *file = NULL;
    kivi_error err = {0};
    ki_mem_init(&mem);
    size_t n_config = config ? strlen(config) : 0, n_bytes = model->n_bytes;
    uint8_t *bytes = malloc(n_bytes);
    char *text = malloc(n_config + 1);
    assert_true(bytes && text);
    memcpy(bytes, model->data, n_bytes);
    if (config) memcpy(text, config, n_config);
    if (kind < 2) damage(bytes, n_bytes);
    else damage((uint8_t *)text, n_config);
    if (random_next() % 8 == 0) n_bytes = random_next() % (n_bytes + 1);
    kivi_status status = ki_file_open_bytes(&file, &mem, "hurt.model", bytes, n_bytes,
                                            config ? text : NULL, n_config, &err);
    if (status == KIVI_OK) use_all(&mem, file, keys, n_keys);
    else if (!strstr(err.text, "hurt.model")) fail_msg("no file name in: %s", err.text);
    ki_file_close(&file);
    check_empty(&mem);
    free(bytes);
    free(text);
    return status == KIVI_OK;
}

static void test_random_damage(void **state) {
    static const char *const keys[] = {"general.architecture", "llama.block_count", "eps", "flag",
                                       "small", "tokens", "types", "scores", "n_layer", "rope",
                                       "rope.deep.x", "eos", "arch", "mixed", "big", "tie"};
    const char *seed = getenv("KIVI_TEST_SEED");
    out gguf = good_gguf(), st = safetensors(good_header, GOOD_DATA);
    int n_accepted[3] = {0};
    (void)state;
    random_state = seed ? strtoull(seed, NULL, 0) : 20240202;
    print_message("random damage, KIVI_TEST_SEED=%llu\n", (unsigned long long)random_state);
    for (int i = 0; i < 30000; i++) {
        int kind = i % 3;
        n_accepted[kind] += try_damaged(kind, kind ? &st : &gguf, kind ? good_config : NULL, keys,
                                        sizeof keys / sizeof *keys);
    }
    print_message("of 10000 each still accepted: GGUF %d, safetensors %d, config %d\n",
                  n_accepted[0], n_accepted[1], n_accepted[2]);
    drop(&gguf);
    drop(&st);
}

/* ---- a real model ---- */

static void test_real_model(void **state) {
    const char *path = getenv("KIVI_TEST_MODEL");
    kivi_error err = {0};
    uint64_t n_layers = 0;
    ki_str *tokens;
    size_t count;
    bool found;
    const ki_tensor *t;
    (void)state;
    if (!path) {
        print_message("KIVI_TEST_MODEL is not set: the real model is not checked\n");
        skip();
    }
    ki_file *file = open_good(path);
    assert_int_equal(ki_file_n_tensors(file), 272);
    assert_int_equal(ki_file_u64(&n_layers, &found, file, "llama.block_count", 1, 999, &err), 0);
    assert_int_equal(n_layers, 30);
    assert_int_equal(ki_file_str_array(&tokens, &count, &found, file, "tokenizer.ggml.tokens",
                                       &err), 0);
    assert_int_equal(count, 49152);
    ki_free(&good_mem, tokens);
    if (ki_file_tensor_shaped(&t, file, "token_embd.weight", 2, NE(49152, 576), &err))
        fail_msg("%s", err.text);
    ki_file_drop(file, t);
    assert_int_equal(ki_file_check_size(file, &err), 0);
    close_good(file);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_good_gguf),
        cmocka_unit_test(test_good_folder),
        cmocka_unit_test(test_long_header),
        cmocka_unit_test(test_odd_paths),
        cmocka_unit_test(test_odd_folders),
        cmocka_unit_test(test_huge_sparse),
        cmocka_unit_test(test_changed_file),
        cmocka_unit_test(test_allocation_failures),
        cmocka_unit_test(test_random_damage),
        cmocka_unit_test(test_real_model),
    };
    return cmocka_run_group_tests_name("load", tests, make_folder, remove_folder);
}
