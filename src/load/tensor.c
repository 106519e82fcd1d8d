#include "load_private.h"

#include <stdio.h>

/* A new type is a row here, an enumerator in load.h, and a decoder where weights are repacked. */
static const struct dtype_row {
    const char *name;
    uint32_t block_elements, block_bytes, gguf_type;
} dtypes[KI_DTYPE_COUNT] = {
    [KI_F32] = {"F32", 1, 4, 0},      [KI_F16] = {"F16", 1, 2, 1},
    [KI_BF16] = {"BF16", 1, 2, 30},   [KI_Q4_0] = {"Q4_0", 32, 18, 2},
    [KI_Q4_1] = {"Q4_1", 32, 20, 3},  [KI_Q5_0] = {"Q5_0", 32, 22, 6},
    [KI_Q5_1] = {"Q5_1", 32, 24, 7},  [KI_Q8_0] = {"Q8_0", 32, 34, 8},
    [KI_Q2_K] = {"Q2_K", 256, 84, 10},  [KI_Q3_K] = {"Q3_K", 256, 110, 11},
    [KI_Q4_K] = {"Q4_K", 256, 144, 12}, [KI_Q5_K] = {"Q5_K", 256, 176, 13},
    [KI_Q6_K] = {"Q6_K", 256, 210, 14},
};

/* ggml's numbers, so that a type kivi cannot read is refused by the name people know it by. */
static const char *const gguf_types[] = {
    "F32",      "F16",      "Q4_0",       "Q4_1",       "Q4_2",       "Q4_3",    "Q5_0",
    "Q5_1",     "Q8_0",     "Q8_1",       "Q2_K",       "Q3_K",       "Q4_K",    "Q5_K",
    "Q6_K",     "Q8_K",     "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",    "IQ1_S",   "IQ4_NL",
    "IQ3_S",    "IQ2_S",    "IQ4_XS",     "I8",         "I16",        "I32",     "I64",
    "F64",      "IQ1_M",    "BF16",       "Q4_0_4_4",   "Q4_0_4_8",   "Q4_0_8_8", "TQ1_0",
    "TQ2_0",    "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4",
};

static bool dtype_known(ki_dtype dtype) { return (unsigned)dtype < KI_DTYPE_COUNT; }

const char *ki_dtype_name(ki_dtype dtype) { return dtype_known(dtype) ? dtypes[dtype].name : "?"; }

uint32_t ki_dtype_block_elements(ki_dtype dtype) {
    return dtype_known(dtype) ? dtypes[dtype].block_elements : 1;
}

uint32_t ki_dtype_block_bytes(ki_dtype dtype) {
    return dtype_known(dtype) ? dtypes[dtype].block_bytes : 0;
}

const char *ki_gguf_type_name(uint32_t type_number) {
    bool known = type_number < sizeof gguf_types / sizeof *gguf_types;
    return known ? gguf_types[type_number] : "unknown";
}

bool ki_dtype_from_gguf(ki_dtype *out, uint32_t type_number) {
    for (unsigned i = 0; i < KI_DTYPE_COUNT; i++) {
        if (dtypes[i].gguf_type != type_number) continue;
        *out = (ki_dtype)i;
        return true;
    }
    return false;
}

const char *ki_shape_text(char out[KI_SHOW_BYTES], uint32_t n_dims, const uint64_t *dims) {
    size_t n = 0;
    memcpy(out, "[]", 3); /* a scalar */
    for (uint32_t i = 0; i < n_dims && n < KI_SHOW_BYTES - 1; i++)
        n += (size_t)snprintf(out + n, KI_SHOW_BYTES - n, "[%llu]", (unsigned long long)dims[i]);
    return out;
}

/* size_t, not a signed product: a dimension read as negative is a huge one and overflows. */
kivi_status ki_elements(size_t *out, uint32_t n_dims, const uint64_t *dims, const char *shown,
                        const char *label, kivi_error *err) {
    char shape[KI_SHOW_BYTES];
    *out = 1;
    for (uint32_t i = 0; i < n_dims; i++) {
        if (dims[i] == 0)
            return KI_FAIL(err, FORMAT, "%s: tensor %s has a dimension of 0: %s", label, shown,
                           ki_shape_text(shape, n_dims, dims));
        if (!ki_mul(out, *out, dims[i]))
            return KI_FAIL(err, FORMAT, "%s: tensor %s has more than 2^64 elements: %s", label,
                           shown, ki_shape_text(shape, n_dims, dims));
    }
    return KIVI_OK;
}

/* Each block is in the file before the next is asked for: a failure leaks nothing. */
kivi_status ki_tensors_alloc(ki_file *file, size_t n_tensors, size_t n_text_bytes,
                             kivi_error *err) {
    void *tensors, *names, *text;
    KI_TRY(ki_alloc_array(&tensors, file->mem, KI_TAG_other, n_tensors, sizeof(ki_tensor), err));
    file->tensors = tensors;
    file->n_tensors = n_tensors;
    KI_TRY(ki_alloc_array(&names, file->mem, KI_TAG_other, n_tensors, sizeof(ki_name), err));
    file->tensor_names = names;
    KI_TRY(ki_alloc(&text, file->mem, KI_TAG_other, n_text_bytes, err));
    file->name_text = text;
    return KIVI_OK;
}

kivi_status ki_tensors_index(ki_file *file, kivi_error *err) {
    for (size_t i = 0; i < file->n_tensors; i++)
        file->tensor_names[i] = (ki_name){ki_str_of(file->tensors[i].name), i};
    return ki_names_sort(file->tensor_names, file->n_tensors, "tensor", file->label, err);
}

size_t ki_file_n_tensors(const ki_file *file) { return file->n_tensors; }

const ki_tensor *ki_file_tensor_at(const ki_file *file, size_t index) {
    return index < file->n_tensors ? &file->tensors[index] : NULL;
}

const ki_tensor *ki_file_tensor(const ki_file *file, const char *name) {
    const ki_name *found = ki_names_find(file->tensor_names, file->n_tensors, ki_str_of(name));
    return found ? &file->tensors[found->item] : NULL;
}

kivi_status ki_file_tensor_shaped(const ki_tensor **out, const ki_file *file, const char *name,
                                  uint32_t n_dims, const uint64_t *dims, kivi_error *err) {
    char found[KI_SHOW_BYTES], expected[KI_SHOW_BYTES], shown[KI_SHOW_BYTES];
    *out = NULL;
    ki_show(shown, ki_str_of(name));
    if (n_dims > 4) return KI_FAIL(err, ARG, "tensor %s: %u dimensions, at most 4", shown, n_dims);
    const ki_tensor *tensor = ki_file_tensor(file, name);
    ki_shape_text(expected, n_dims, dims);
    if (!tensor)
        return KI_FAIL(err, FORMAT, "%s: tensor %s is missing, expected shape %s", file->label,
                       shown, expected);
    if (tensor->n_dims != n_dims || memcmp(tensor->dims, dims, n_dims * sizeof *dims) != 0)
        return KI_FAIL(err, FORMAT, "%s: tensor %s has shape %s, expected %s", file->label, shown,
                       ki_shape_text(found, tensor->n_dims, tensor->dims), expected);
    *out = tensor;
    return KIVI_OK;
}

size_t ki_file_n_skipped(const ki_file *file) { return file->n_skipped; }

const char *ki_file_skipped_at(const ki_file *file, size_t index) {
    return index < file->n_skipped ? file->skipped[index] : NULL;
}
