/* fuzz_gguf.c: any bytes as a GGUF file. What is accepted is read in full, every key by every
 * getter. Build: clang -fsanitize=fuzzer,address,undefined with this file, src/base and src/load.
 * Abort, overread and leak are findings. */
#include "load.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static const char *const keys[] = {"general.architecture", "general.alignment",
                                   "llama.block_count", "tokenizer.ggml.tokens",
                                   "tokenizer.ggml.scores", "tokenizer.ggml.token_type"};

static void read_key(ki_mem *mem, const ki_file *file, const char *key) {
    uint64_t u;
    double f;
    bool flag, found;
    ki_str s, *strs;
    int32_t *ints;
    float *floats;
    size_t count;
    (void)ki_file_u64(&u, &found, file, key, 0, UINT64_MAX, NULL);
    (void)ki_file_f64(&f, &found, file, key, -1, 1, NULL);
    (void)ki_file_bool(&flag, &found, file, key, NULL);
    (void)ki_file_str(&s, &found, file, key, NULL);
    (void)ki_file_int_array(&ints, &count, &found, file, key, NULL);
    ki_free(mem, ints);
    (void)ki_file_f32_array(&floats, &count, &found, file, key, NULL);
    ki_free(mem, floats);
    (void)ki_file_str_array(&strs, &count, &found, file, key, NULL);
    ki_free(mem, strs);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    static volatile uint8_t sink; /* keeps the reads */
    ki_mem mem;
    ki_file *file = NULL;
    ki_mem_init(&mem);
    if (!ki_file_open_bytes(&file, &mem, "fuzz", data, n_bytes, NULL, 0, NULL)) {
        for (size_t i = 0; i < ki_file_n_tensors(file); i++) {
            const ki_tensor *t = ki_file_tensor_at(file, i);
            if (ki_file_tensor(file, t->name) != t) abort();
            for (size_t b = 0; b < t->n_bytes; b++) sink = (uint8_t)(sink + t->data[b]);
        }
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) read_key(&mem, file, keys[i]);
    }
    ki_file_close(&file);
    if (atomic_load(&mem.n_blocks)) abort();
    return 0;
}
