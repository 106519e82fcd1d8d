/* load_files.h: what test_load.c and test_load_bad.c share: a writer of GGUF and safetensors files,
 * a temporary folder, and the expectations every opened or refused file has to meet. */
#ifndef KI_LOAD_FILES_H
#define KI_LOAD_FILES_H
#include "load.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- a writer ---- */

typedef struct out {
    uint8_t *data;
    size_t n_bytes;
} out;

static inline void put(out *o, const void *bytes, size_t n_bytes) {
    o->data = realloc(o->data, o->n_bytes + n_bytes + 1);
    assert_non_null(o->data);
    if (n_bytes) memcpy(o->data + o->n_bytes, bytes, n_bytes);
    o->n_bytes += n_bytes;
}
static inline void put_u32(out *o, uint32_t v) { put(o, &v, 4); }
static inline void put_u64(out *o, uint64_t v) { put(o, &v, 8); }
static inline void put_str(out *o, const char *s) {
    put_u64(o, strlen(s));
    put(o, s, strlen(s));
}
static inline void put_pattern(out *o, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i++) put(o, &(uint8_t){(uint8_t)(i * 7 + 1)}, 1);
}
static inline void put_pad(out *o, size_t alignment) {
    while (o->n_bytes % alignment) put(o, "", 1);
}
static inline void drop(out *o) {
    free(o->data);
    *o = (out){0};
}

static inline void head(out *o, uint32_t version, uint64_t n_tensors, uint64_t n_kvs) {
    put(o, "GGUF", 4);
    put_u32(o, version);
    put_u64(o, n_tensors);
    put_u64(o, n_kvs);
}
static inline void kv(out *o, const char *key, uint32_t type, const void *bytes, size_t n_bytes) {
    put_str(o, key);
    put_u32(o, type);
    put(o, bytes, n_bytes);
}
static inline void kv_u32(out *o, const char *key, uint32_t v) { kv(o, key, 4, &v, 4); }
static inline void info(out *o, const char *name, uint32_t n_dims, const uint64_t *ne,
                        uint32_t type, uint64_t offset) {
    put_str(o, name);
    put_u32(o, n_dims);
    put(o, ne, n_dims * sizeof *ne);
    put_u32(o, type);
    put_u64(o, offset);
}
#define NE(...) ((const uint64_t[]){__VA_ARGS__})

static inline void array_head(out *o, const char *key, uint32_t item_type, uint64_t count) {
    put_str(o, key);
    put_u32(o, 9);
    put_u32(o, item_type);
    put_u64(o, count);
}

enum { GOOD_KVS = 9, GOOD_TENSORS = 4 };

static inline void good_kvs(out *o) {
    put_str(o, "general.architecture");
    put_u32(o, 8);
    put_str(o, "llama");
    kv_u32(o, "llama.block_count", 30);
    kv_u32(o, "general.alignment", 32);
    kv(o, "eps", 6, &(float){0.5f}, 4);
    kv(o, "flag", 7, &(uint8_t){1}, 1);
    kv(o, "small", 1, &(int8_t){-5}, 1);
    array_head(o, "tokens", 8, 3);
    put_str(o, "a");
    put_str(o, "");
    put_str(o, "hello");
    array_head(o, "types", 5, 3);
    put(o, (const int32_t[]){1, -2, 3}, 12);
    array_head(o, "scores", 6, 2);
    put(o, (const float[]){1.5f, -2.0f}, 8);
}

/* Data: Q8_0 [4][32] 136 bytes at 0, F32 [8] 32 at 160, Q4_1 [2][64] 80 at 192, F16 30 at 288. */
static inline void good_infos(out *o) {
    info(o, "token_embd.weight", 2, NE(32, 4), 8, 0);
    info(o, "norm", 1, NE(8), 0, 160);
    info(o, "blk.0.w", 2, NE(64, 2), 3, 192);
    info(o, "half", 3, NE(5, 3, 1), 1, 288);
}

static inline out good_gguf(void) {
    out o = {0};
    head(&o, 3, GOOD_TENSORS, GOOD_KVS);
    good_kvs(&o);
    good_infos(&o);
    put_pad(&o, 32);
    put_pattern(&o, 288 + 30);
    return o;
}

/* One tensor, no metadata, everything given: for the many ways to get it wrong. */
static inline out one_tensor(uint32_t n_dims, const uint64_t *ne, uint32_t type, uint64_t offset,
                      size_t data_bytes) {
    out o = {0};
    head(&o, 3, 1, 0);
    info(&o, "the.tensor", n_dims, ne, type, offset);
    put_pad(&o, 32);
    put_pattern(&o, data_bytes);
    return o;
}

static const char good_config[] =
    "{\"n_layer\": 30, \"eps\": 1e-5, \"theta\": 10000, \"tie\": true, \"none\": null,"
    " \"neg\": -1, \"rope\": {\"type\": \"llama3\", \"deep\": {\"x\": 7}}, \"eos\": [1, 2],"
    " \"arch\": [\"Llama\", \"B\"], \"mixed\": [1, \"x\"], \"big\": [4294967296]}";
static const char good_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"b\":{\"dtype\":\"F16\",\"shape\":[2,3],\"data_offsets\":[16,28]},"
    "\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
    "\"pos\":{\"dtype\":\"I64\",\"shape\":[1,2],\"data_offsets\":[28,44]},"
    "\"s\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[44,46]}}   ";
enum { GOOD_DATA = 46 };

static inline out safetensors(const char *header, size_t data_bytes) {
    out o = {0};
    put_str(&o, header);
    put_pattern(&o, data_bytes);
    return o;
}

/* ---- temporary files ---- */

static char folder[64];

static inline const char *in_folder(const char *leaf) {
    static char paths[4][256];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof *paths, "%s/%s", folder, leaf);
    return path;
}

static inline const char *write_file(const char *leaf, const void *bytes, size_t n_bytes) {
    const char *path = in_folder(leaf);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    if (n_bytes) assert_int_equal(fwrite(bytes, 1, n_bytes, f), n_bytes);
    assert_int_equal(fclose(f), 0);
    return path;
}

static inline const char *write_model_folder(const char *leaf, const char *config,
                                             const char *header, size_t data_bytes) {
    char name[128];
    out o = safetensors(header, data_bytes);
    mkdir(in_folder(leaf), 0700);
    snprintf(name, sizeof name, "%s/model.safetensors", leaf);
    write_file(name, o.data, o.n_bytes);
    snprintf(name, sizeof name, "%s/config.json", leaf);
    write_file(name, config, strlen(config));
    drop(&o);
    return in_folder(leaf);
}

static inline int make_folder(void **state) {
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/kivi-test-load-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static inline int remove_folder(void **state) {
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

/* ---- expectations ---- */

static inline void check_empty(ki_mem *mem) {
    kivi_memory held = ki_mem_report(mem);
    assert_int_equal(atomic_load(&mem->n_blocks), 0);
    assert_int_equal(held.other, 0);
    assert_int_equal(held.weights, 0);
}

/* status < 0: any failure. The line must name the file and contain `needle`. */
static inline void check_failed(ki_mem *mem, ki_file *file, kivi_status got, int status,
                         const kivi_error *err, const char *file_name, const char *needle) {
    if (got == KIVI_OK) fail_msg("accepted, expected an error with \"%s\"", needle);
    if (status >= 0 && (int)got != status) fail_msg("wrong status %d: %s", (int)got, err->text);
    assert_null(file);
    assert_int_equal(err->status, got);
    if (!strstr(err->text, file_name)) fail_msg("no \"%s\" in: %s", file_name, err->text);
    if (!strstr(err->text, needle)) fail_msg("no \"%s\" in: %s", needle, err->text);
    for (const char *c = err->text; *c; c++) assert_true((unsigned char)*c >= 0x20);
    check_empty(mem);
}

/* The bytes go into a block of exactly their size: the sanitizer sees the first overread. */
static inline void bad_bytes(const void *bytes, size_t n_bytes, const char *config, int status,
                      const char *needle) {
    ki_mem mem;
    kivi_error err = {0};
    ki_file *file = NULL;
    ki_mem_init(&mem);
    uint8_t *exact = malloc(n_bytes ? n_bytes : 1);
    assert_non_null(exact);
    if (n_bytes) memcpy(exact, bytes, n_bytes);
    kivi_status got = ki_file_open_bytes(&file, &mem, "bad.model", exact, n_bytes, config,
                                         config ? strlen(config) : 0, &err);
    check_failed(&mem, file, got, status, &err, "bad.model", needle);
    free(exact);
}
static inline void bad_gguf(out o, int status, const char *needle) {
    bad_bytes(o.data, o.n_bytes, NULL, status, needle);
    drop(&o);
}
static inline void bad_header(const char *header, size_t data_bytes, int status,
                              const char *needle) {
    out o = safetensors(header, data_bytes);
    bad_bytes(o.data, o.n_bytes, "{}", status, needle);
    drop(&o);
}
static inline void bad_path(const char *path, int status, const char *file_name,
                            const char *needle) {
    ki_mem mem;
    kivi_error err = {0};
    ki_file *file = NULL;
    ki_mem_init(&mem);
    kivi_status got = ki_file_open(&file, &mem, path, &err);
    check_failed(&mem, file, got, status, &err, file_name, needle);
}

static ki_mem good_mem;
static inline ki_file *open_good(const char *path) {
    kivi_error err = {0};
    ki_file *file = NULL;
    ki_mem_init(&good_mem);
    if (ki_file_open(&file, &good_mem, path, &err)) fail_msg("%s", err.text);
    return file;
}
static inline ki_file *open_good_bytes(const out *o, const char *config) {
    kivi_error err = {0};
    ki_file *file = NULL;
    ki_mem_init(&good_mem);
    if (ki_file_open_bytes(&file, &good_mem, "good", o->data, o->n_bytes, config,
                           config ? strlen(config) : 0, &err))
        fail_msg("%s", err.text);
    return file;
}
static inline void close_good(ki_file *file) {
    ki_file_close(&file);
    assert_null(file);
    check_empty(&good_mem);
}

#endif
