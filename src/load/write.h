/* write.h: a GGUF file (version 3) written front to back: keys and tensor infos first, then each
 * tensor's data in the same order. The file stands under a temporary name beside its own until it
 * is whole and on the disk; whatever goes wrong before that leaves nothing.
 *
 * Keys and infos keep the first fault in `status`, so that lists of them stay flat; begin returns
 * it. */
#ifndef KI_WRITE_H
#define KI_WRITE_H
#include "load.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ki_gguf_out {
    ki_mem *mem;
    kivi_error *err;
    kivi_status status;
    ki_buf kvs, infos;
    uint64_t n_kvs, n_tensors;
    size_t data_bytes;   /* of all tensors so far, each padded */
    size_t tensor_bytes; /* written of the tensor at hand */
    char *path, *temp;   /* temp NULL: no file is there yet, or it has its own name by now */
    int fd;
    bool force; /* an existing file is replaced */
} ki_gguf_out;

void ki_gguf_out_init(ki_gguf_out *out, ki_mem *mem, kivi_error *err);
/* Closes; a file that ki_gguf_finish has not named is removed. */
void ki_gguf_out_deinit(ki_gguf_out *out);

void ki_gguf_u32(ki_gguf_out *out, const char *key, uint32_t value);
void ki_gguf_f32(ki_gguf_out *out, const char *key, float value);
void ki_gguf_bool(ki_gguf_out *out, const char *key, bool value);
void ki_gguf_str(ki_gguf_out *out, const char *key, ki_str value);
void ki_gguf_strs(ki_gguf_out *out, const char *key, const ki_str *values, size_t count);
void ki_gguf_i32s(ki_gguf_out *out, const char *key, const int32_t *values, size_t count);
void ki_gguf_f32s(ki_gguf_out *out, const char *key, const float *values, size_t count);
/* The next tensor; dims slowest first, each >= 1, the last a multiple of the type's block. */
void ki_gguf_tensor(ki_gguf_out *out, const char *name, ki_dtype dtype, uint32_t n_dims,
                    const uint64_t *dims);

/* Whether path may be written: ARG when it exists (and not force) or is a folder. */
kivi_status ki_gguf_may_write(const char *path, bool force, kivi_error *err);
/* Makes the file, as large as it will be (a full disk is found here), and writes the header. */
kivi_status ki_gguf_begin(ki_gguf_out *out, const char *path, bool force);
kivi_status ki_gguf_write(ki_gguf_out *out, const void *bytes, size_t n_bytes);
kivi_status ki_gguf_end_tensor(ki_gguf_out *out); /* zeros up to the next one */
/* To the disk, and under its own name. */
kivi_status ki_gguf_finish(ki_gguf_out *out);

/* ---- blocks.c: rows of numbers to the types that files have ---- */

/* n elements of F32, F16 or BF16 to float32, exact. */
void ki_row_to_f32(float *out, const uint8_t *row, ki_dtype dtype, size_t n);
/* n elements, whole blocks, to F32, F16, Q8_0 or Q4_0: the bytes that ggml's reference quantizers
 * give. False: one is not finite, or beyond what the type's 16-bit numbers hold. */
bool ki_row_from_f32(uint8_t *out, ki_dtype dtype, const float *row, size_t n);

#ifdef __cplusplus
}
#endif
#endif
