/* load.h: the tensor directory of a model file. It says what is in a GGUF file or a Hugging Face
 * folder, checks that it is safe to read, and converts nothing.
 *
 * A model file is hostile input: whatever its bytes are, these calls return a status and a line
 * "FILE: what, where (byte offset), found, expected". IO: the system refused to read. FORMAT: the
 * file breaks its own rules or is no model. UNSUPPORTED: a valid file that kivi cannot use (yet).
 * NOMEM: as it says. Stricter than the formats ask: a dimension of 0, more than 4 dimensions, more
 * than 200,000 tensors or keys, nested arrays, and bytes that no tensor claims are refused.
 *
 * A file may be read by many threads at once; open and close belong to one. */
#ifndef KI_LOAD_H
#define KI_LOAD_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- types of tensor elements ---- */

/* Order and names of the table in tensor.c. Q are ggml's blocks of 32, or 256 where a K stands. */
typedef enum ki_dtype {
    KI_F32,
    KI_F16,
    KI_BF16,
    KI_Q4_0,
    KI_Q4_1,
    KI_Q5_0,
    KI_Q5_1,
    KI_Q8_0,
    KI_Q2_K,
    KI_Q3_K,
    KI_Q4_K,
    KI_Q5_K,
    KI_Q6_K,
    KI_DTYPE_COUNT
} ki_dtype;

const char *ki_dtype_name(ki_dtype dtype);           /* "Q4_1"; "?" outside the list */
uint32_t ki_dtype_block_elements(ki_dtype dtype);    /* 1, 32, 256; a row is whole blocks */
uint32_t ki_dtype_block_bytes(ki_dtype dtype);       /* 4, 2, 2, 18, 20, ... */
const char *ki_gguf_type_name(uint32_t type_number); /* ggml's name, "unknown" if there is none */

/* ---- a file ---- */

/* Bytes lent by a file until it is closed; not terminated by a zero. */
typedef struct ki_str {
    const char *bytes;
    size_t n_bytes;
} ki_str;

typedef struct ki_tensor {
    const char *name; /* zero-terminated, 1 to 255 bytes, unique in the file */
    ki_dtype dtype;
    uint32_t n_dims;  /* GGUF 1 to 4; safetensors 0 (one element) to 4 */
    uint64_t dims[4]; /* slowest first: [rows][cols]; each >= 1; dims past n_dims are 1 */
    /* [n_bytes], inside the mapped file; aligned to the file's alignment in GGUF and to NOTHING in
     * safetensors: load elements with memcpy. */
    const uint8_t *data;
    size_t n_bytes;
} ki_tensor;

typedef enum ki_file_kind { KI_FILE_GGUF, KI_FILE_HF } ki_file_kind;
typedef struct ki_file ki_file;

/* Opens a GGUF file of version 2 or 3, or a folder with config.json and model.safetensors. In
 * parts: of a GGUF file the first one, NAME-00001-of-000NN.gguf, is given and the others lie
 * beside it; a folder has model.safetensors.index.json, which may name files of that folder only.
 * Never blocks: a pipe, device or socket is refused. Headers are read and copied; tensor data is
 * mapped read-only (MAP_PRIVATE) and not counted in mem: the caller counts what it keeps. mem
 * must outlive the file; parsed JSON is held by jansson outside of it. On failure *out is NULL
 * and nothing is held. */
kivi_status ki_file_open(ki_file **out, ki_mem *mem, const char *path, kivi_error *err);
/* A folder of which config.json alone is read: it has no tensors. A GGUF file opens as ever. */
kivi_status ki_file_open_shape(ki_file **out, ki_mem *mem, const char *path, kivi_error *err);
/* The same as ki_file_open for a file that is in memory already (tests, fuzzing); the bytes are
 * lent until close, name stands for the path in errors. config NULL: bytes are a GGUF file.
 * Otherwise bytes are a safetensors file and config the [n_config_bytes] of its config.json
 * (copied). */
kivi_status ki_file_open_bytes(ki_file **out, ki_mem *mem, const char *name, const uint8_t *bytes,
                               size_t n_bytes, const char *config, size_t n_config_bytes,
                               kivi_error *err);
/* Unmaps, frees and nulls; NULL allowed. All tensors, strings and arrays of bytes lent end here. */
void ki_file_close(ki_file **file);

ki_file_kind ki_file_kind_get(const ki_file *file);
const char *ki_file_path(const ki_file *file); /* as given to open */
const char *ki_file_label(const ki_file *file); /* the file of the metadata, for errors */

/* A mapped file that shrinks turns reads past its new end into SIGBUS. IO when size or modification
 * time differ from those at open (a file replaced by rename is fine: the old one stays mapped).
 * Call it before and after reading tensor data; what was read in between may be used only after an
 * OK. A shrink in between still kills the process; ki_file_read has no such gap. */
kivi_status ki_file_check_size(const ki_file *file, kivi_error *err);

/* ---- tensors ---- */

size_t ki_file_n_tensors(const ki_file *file);
/* In the order of the GGUF header; in safetensors in the order of the data. */
const ki_tensor *ki_file_tensor_at(const ki_file *file, size_t index); /* NULL past end */
const ki_tensor *ki_file_tensor(const ki_file *file, const char *name); /* NULL: none */
/* The tensor, with exactly these dims [n_dims], slowest first. FORMAT when it is missing or shaped
 * otherwise: file, tensor, found and expected shape are named. ARG when n_dims > 4. */
kivi_status ki_file_tensor_shaped(const ki_tensor **out, const ki_file *file, const char *name,
                                  uint32_t n_dims, const uint64_t *dims, kivi_error *err);
/* Copies n_bytes of a tensor from offset_bytes on with pread: a file that shrank gives IO, never a
 * signal, and no page of it stays in this process. ARG outside the tensor. */
kivi_status ki_file_read(void *out, const ki_file *file, const ki_tensor *tensor,
                         size_t offset_bytes, size_t n_bytes, kivi_error *err);
/* Gives the pages of a tensor back (MADV_DONTNEED), so that weights repacked elsewhere do not count
 * twice in RSS. Its data stays readable and would be fetched from the file again. */
void ki_file_drop(const ki_file *file, const ki_tensor *tensor);
/* Names of safetensors entries left out because they are I64, I32, U8 or BOOL buffers. */
size_t ki_file_n_skipped(const ki_file *file);
const char *ki_file_skipped_at(const ki_file *file, size_t index); /* NULL past end */

/* ---- metadata ----
 * key: in GGUF a metadata key ("llama.block_count"), in a folder a dotted path into config.json
 * ("rope_parameters.rope_type"). A key that is absent (or null in JSON) is OK with *found false and
 * *out untouched. A wrong type or a value outside min..max is FORMAT, naming file, key, found and
 * expected. An integer may have any of GGUF's integer types; a float is f32 or f64, in JSON any
 * number; NaN and infinity are out of range. */

typedef enum ki_value_kind {
    KI_VALUE_NONE,
    KI_VALUE_INT,
    KI_VALUE_FLOAT,
    KI_VALUE_BOOL,
    KI_VALUE_STR,
    KI_VALUE_ARRAY,
    KI_VALUE_OBJECT
} ki_value_kind;

/* For keys that are a number in one file and an array in another (head_count_kv, eos_token_id). */
ki_value_kind ki_file_value_kind(const ki_file *file, const char *key);
kivi_status ki_file_u64(uint64_t *out, bool *found, const ki_file *file, const char *key,
                        uint64_t min, uint64_t max, kivi_error *err);
kivi_status ki_file_f64(double *out, bool *found, const ki_file *file, const char *key, double min,
                        double max, kivi_error *err);
kivi_status ki_file_bool(bool *out, bool *found, const ki_file *file, const char *key,
                         kivi_error *err);
kivi_status ki_file_str(ki_str *out, bool *found, const ki_file *file, const char *key,
                        kivi_error *err);

/* Arrays. *out is [*count], allocated with tag `other` from the file's mem; the caller frees it
 * with ki_free, or ki_file_free. Absent or failed: *out NULL, *count 0. Element types are exact:
 * string; int32 or
 * uint32 (a value above 2^31-1 is FORMAT); float32. In JSON: strings; integers of 32 bits; numbers.
 * Strings are lent by the file; floats are not checked for NaN. */
kivi_status ki_file_str_array(ki_str **out, size_t *count, bool *found, const ki_file *file,
                              const char *key, kivi_error *err);
kivi_status ki_file_int_array(int32_t **out, size_t *count, bool *found, const ki_file *file,
                              const char *key, kivi_error *err);
kivi_status ki_file_f32_array(float **out, size_t *count, bool *found, const ki_file *file,
                              const char *key, kivi_error *err);

void ki_file_free(const ki_file *file, void *array); /* NULL allowed */
/* ---- a text file beside the weights ---- */

/* A whole file `name` in folder (NULL: name is a path); *out is the caller's to ki_free. A file
 * that is not there is OK with *found false. */
kivi_status ki_text_read(char **out, size_t *n_bytes, bool *found, ki_mem *mem, const char *folder,
                         const char *name, size_t max_bytes, kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
