/* fuzz_safetensors.c: any bytes as a folder: | n_config u8 | config.json | model.safetensors |.
 * Built like fuzz_gguf.c. */
#include "load.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void read_all(ki_mem *mem, const ki_file *file) {
    static volatile uint8_t sink; /* keeps the reads */
    uint64_t u;
    bool found;
    ki_str s, *strs;
    size_t count;
    for (size_t i = 0; i < ki_file_n_tensors(file); i++) {
        const ki_tensor *t = ki_file_tensor_at(file, i);
        if (ki_file_tensor(file, t->name) != t) abort();
        for (size_t b = 0; b < t->n_bytes; b++) sink = (uint8_t)(sink + t->data[b]);
    }
    for (size_t i = 0; i < ki_file_n_skipped(file); i++)
        sink = (uint8_t)(sink + (uint8_t)ki_file_skipped_at(file, i)[0]);
    (void)ki_file_u64(&u, &found, file, "a", 0, 9, NULL);
    (void)ki_file_u64(&u, &found, file, "a.b", 0, 9, NULL);
    (void)ki_file_str(&s, &found, file, "a", NULL);
    (void)ki_file_str_array(&strs, &count, &found, file, "a", NULL);
    ki_free(mem, strs);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    ki_mem mem;
    ki_file *file = NULL;
    if (n_bytes < 1) return 0;
    size_t n_config = KI_MIN((size_t)data[0], n_bytes - 1);
    const uint8_t *bytes = data + 1 + n_config;
    ki_mem_init(&mem);
    if (!ki_file_open_bytes(&file, &mem, "fuzz", bytes, n_bytes - 1 - n_config,
                            (const char *)data + 1, n_config, NULL))
        read_all(&mem, file);
    ki_file_close(&file);
    if (atomic_load(&mem.n_blocks)) abort();
    return 0;
}
