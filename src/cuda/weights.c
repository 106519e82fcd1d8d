/* weights.c: matrices on a GPU are [n_rows][n_cols] of one type, rows as a file has them. Blocks of
 * a file are copied as they are and dequantized there. */
#include "cuda_private.h"

size_t ki_cuda_element_bytes(ki_cuda_type type) { return type == KI_CUDA_F32 ? 4 : 2; }

static kivi_status group(void *context, size_t n_elements, kivi_error *err) {
    ki_cuda_weights *w = context;
    size_t n_bytes = n_elements * ki_cuda_element_bytes(w->type);
    void *p;
    KI_TRY(w->memory->device.alloc(&p, w->memory, KI_TAG_weights, n_bytes, err));
    w->group = p;
    w->group_bytes = n_bytes;
    return KIVI_OK;
}

static kivi_status place(ki_matrix *out, void *context, ki_dtype dtype, kivi_error *err) {
    ki_cuda_weights *w = context;
    static const ki_weight types[] = {KI_WEIGHT_F32, KI_WEIGHT_F16, KI_WEIGHT_BF16};
    size_t n_bytes = (size_t)out->n_rows * out->n_cols * ki_cuda_element_bytes(w->type);
    (void)dtype; /* whatever it was, it becomes what products read */
    out->type = types[w->type];
    void *p = w->group;
    if (w->group_bytes >= n_bytes) {
        w->group += n_bytes;
        w->group_bytes -= n_bytes;
    } else {
        KI_TRY(w->memory->device.alloc(&p, w->memory, KI_TAG_weights, n_bytes, err));
    }
    out->tiles = p;
    return KIVI_OK;
}

static kivi_status put(const ki_matrix *matrix, void *context, ki_dtype dtype, const uint8_t *rows,
                       size_t row_bytes, uint32_t first_row, uint32_t n_rows, kivi_error *err) {
    ki_cuda_weights *w = context;
    const ki_device *d = &w->memory->device;
    size_t n = (size_t)n_rows * matrix->n_cols, n_bytes = n_rows * row_bytes;
    void *p;
    if (n_bytes > w->staged_bytes) {
        d->free(d->context, w->staged);
        w->staged = NULL, w->staged_bytes = 0;
        KI_TRY(d->alloc(&p, d->context, KI_TAG_workspace, n_bytes, err));
        w->staged = p, w->staged_bytes = n_bytes;
    }
    KI_TRY(d->put(d->context, w->staged, rows, n_bytes, err));
    size_t at = (size_t)first_row * matrix->n_cols * ki_cuda_element_bytes(w->type);
    ki_cuda_dequantize(matrix->tiles + at, w->staged, dtype, n, w->type, w->memory->stream);
    return ki_cuda_check(cudaGetLastError(), "dequantize", err);
}

void ki_cuda_weights_init(ki_cuda_weights *w, ki_cuda_memory *memory, ki_cuda_type type) {
    *w = (ki_cuda_weights){.memory = memory, .type = type};
    w->device = (ki_matrix_device){w, group, place, put};
}

void ki_cuda_weights_done(ki_cuda_weights *w) {
    const ki_device *d = &w->memory->device;
    d->free(d->context, w->staged);
    w->staged = NULL, w->staged_bytes = 0;
}
