/* gguf_rows.c: gguf_rows FILE.gguf OUT prints the rows of all matrices of a file, in the order of
 * its tensors, as float32 to OUT, the way a model takes them: packed into tiles and read back. For
 * tests/py_gguf_rows.py. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>

static void write_matrix(FILE *out, const ki_tensor *t) {
    uint32_t n_rows = (uint32_t)t->dims[0], n_cols = (uint32_t)t->dims[1];
    ki_matrix m = {.type = ki_weight_of(t->dtype), .n_rows = n_rows, .n_cols = n_cols};
    size_t n_bytes;
    if (!ki_matrix_bytes(&n_bytes, m.type, n_rows, n_cols)) abort();
    m.tiles = calloc(1, n_bytes);
    float *row = malloc(n_cols * sizeof(float));
    if (!m.tiles || !row) abort();
    for (uint32_t r = 0; r < n_rows; r++)
        ki_matrix_pack_row(&m, t->data + r * (t->n_bytes / n_rows), r);
    for (uint32_t r = 0; r < n_rows; r++) {
        ki_matrix_row(row, &m, r);
        fwrite(row, sizeof(float), n_cols, out);
    }
    free(row);
    free(m.tiles);
}

int main(int argc, char **argv) {
    ki_mem mem;
    ki_file *file;
    kivi_error err = {0};
    ki_mem_init(&mem);
    if (argc != 3) return fputs("gguf_rows FILE.gguf OUT\n", stderr), 2;
    if (ki_file_open(&file, &mem, argv[1], &err) != KIVI_OK)
        return fprintf(stderr, "%s\n", err.text), 3;
    FILE *out = fopen(argv[2], "wb");
    if (!out) return perror(argv[2]), 5;
    for (size_t i = 0; i < ki_file_n_tensors(file); i++) {
        const ki_tensor *t = ki_file_tensor_at(file, i);
        if (t->n_dims == 2) write_matrix(out, t);
    }
    ki_file_close(&file);
    return fclose(out) ? 5 : 0;
}
