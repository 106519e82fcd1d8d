/* load_private.h: what the files of src/load share. Nothing outside this folder includes it. */
#ifndef KI_LOAD_PRIVATE_H
#define KI_LOAD_PRIVATE_H
#include "load.h"

#include <jansson.h>
#include <time.h>

/* Caps on what a file may make us hold, far above any real model. */
enum {
    KI_MAX_ENTRIES = 200000, /* tensors, or metadata keys */
    KI_MAX_NAME_BYTES = 255,
    KI_MAX_KEY_BYTES = 65535,                /* GGUF's own limit */
    KI_MAX_HEAD_BYTES = 256 * 1024 * 1024,   /* GGUF header with its vocabulary */
    KI_MAX_ST_HEAD_BYTES = 100 * 1000 * 1000, /* the limit of the reference safetensors */
    KI_MAX_CONFIG_BYTES = 16 * 1024 * 1024,
    KI_MAX_PARTS = 4096,     /* files of one model */
    KI_LABEL_BYTES = 96, /* an error line has 256 bytes: the path may not use them up */
    KI_SHOW_BYTES = 68
};

/* The bytes behind a file: mapped with its descriptor kept, or lent by the caller (fd -1). */
typedef struct ki_source {
    int fd;
    const uint8_t *data;
    size_t n_bytes;
    struct timespec mtime;
} ki_source;

/* Sorted names, not a hash table: no input makes it slow, and duplicates become neighbours. */
typedef struct ki_name {
    ki_str text;
    size_t item; /* index of what is named */
} ki_name;

/* One GGUF metadata entry, validated: value points at its payload, all of which is in the head. */
typedef struct ki_kv {
    ki_str key;
    uint32_t type, item_type; /* GGUF value types; item_type is set for arrays */
    size_t count;             /* items of an array, bytes of a string */
    const uint8_t *value;
} ki_kv;

struct ki_file {
    ki_mem *mem;
    ki_file_kind kind;
    char *path;
    char label[KI_LABEL_BYTES];        /* the file that holds the tensors, as errors name it */
    char config_label[KI_LABEL_BYTES]; /* the file that holds the metadata */
    ki_source source;
    uint8_t *head; /* copy of the GGUF header; NULL when the source is in memory */
    ki_tensor *tensors;
    size_t n_tensors;
    ki_name *tensor_names; /* [n_tensors] sorted */
    char *name_text;       /* all names, each with its zero */
    const char **skipped;
    size_t n_skipped;
    ki_kv *kvs;
    size_t n_kvs;
    ki_name *kv_names; /* [n_kvs] sorted */
    json_t *config;
    ki_file **parts; /* [n_parts]: further files whose tensors stand in the directory above */
    size_t n_parts;
};

/* GGUF value types. */
enum {
    KI_GGUF_U8,
    KI_GGUF_I8,
    KI_GGUF_U16,
    KI_GGUF_I16,
    KI_GGUF_U32,
    KI_GGUF_I32,
    KI_GGUF_F32,
    KI_GGUF_BOOL,
    KI_GGUF_STR,
    KI_GGUF_ARRAY,
    KI_GGUF_U64,
    KI_GGUF_I64,
    KI_GGUF_F64,
    KI_GGUF_VALUE_COUNT
};

/* ---- names.c ---- */

/* A printable copy of bytes from a file, cut to fit an error line. Returns out. */
const char *ki_show(char out[KI_SHOW_BYTES], ki_str text);
/* Writes folder/leaf (leaf NULL: folder) for use in errors; of a long path the end is kept. */
void ki_label(char out[KI_LABEL_BYTES], const char *folder, const char *leaf);
ki_str ki_str_of(const char *text);
int ki_str_compare(ki_str a, ki_str b); /* bytes, then length */



/* Sorts; FORMAT naming `what` ("tensor", "key") when two are equal. */
kivi_status ki_names_sort(ki_name *names, size_t n_names, const char *what, const char *label,
                          kivi_error *err);
const ki_name *ki_names_find(const ki_name *names, size_t n_names, ki_str text); /* NULL: none */

/* ---- tensor.c ---- */

bool ki_dtype_from_gguf(ki_dtype *out, uint32_t type_number);
/* "[2][576]" */
const char *ki_shape_text(char out[KI_SHOW_BYTES], uint32_t n_dims, const uint64_t *dims);
/* Product of dims; FORMAT for a zero or an overflow. shown: the tensor's printable name. */
kivi_status ki_elements(size_t *out, uint32_t n_dims, const uint64_t *dims, const char *shown,
                        const char *label, kivi_error *err);
/* Makes room for n_tensors, their sorted names and n_text_bytes of names; the file owns it. */
kivi_status ki_tensors_alloc(ki_file *file, size_t n_tensors, size_t n_text_bytes, kivi_error *err);
/* Sorts the names once all tensors are filled in. */
kivi_status ki_tensors_index(ki_file *file, kivi_error *err);

/* ---- source.c ---- */

/* Opens a regular, non-empty file without blocking; *fd is the caller's. at: AT_FDCWD or a
 * folder. */
kivi_status ki_fd_open(int *fd, size_t *n_bytes, int at, const char *path, const char *label,
                       kivi_error *err);
kivi_status ki_fd_read(void *out, int fd, size_t offset_bytes, size_t n_bytes, const char *label,
                       kivi_error *err);
/* Maps the file and takes fd over, on failure too. */
kivi_status ki_source_map(ki_source *out, int fd, const char *label, kivi_error *err);
void ki_source_close(ki_source *source);

/* ---- file.c ---- */

/* A file without contents yet; ki_file_close undoes whatever is built from here on. */
kivi_status ki_file_new(ki_file **out, ki_mem *mem, const char *path, kivi_error *err);

/* ---- parts.c: models in several files ---- */

/* The tensors of model.safetensors.index.json's parts. folder: its descriptor. */
kivi_status ki_parts_load_index(ki_file *file, int folder, kivi_error *err);
/* The other parts of a GGUF file whose first one is loaded; nothing when it is whole. */
kivi_status ki_parts_load_gguf(ki_file *file, kivi_error *err);

/* ---- json.c ---- */

typedef struct ki_json_limits {
    size_t max_containers, max_values; /* jansson takes some 200 bytes for a container */
} ki_json_limits;
/* Parses one object; *out is the caller's to json_decref. Depth <= 64, no duplicate keys. */
kivi_status ki_json_load(json_t **out, const void *text, size_t n_bytes, ki_json_limits limits,
                         const char *label, kivi_error *err);

/* ---- gguf.c, safetensors.c: fill tensors and metadata of a file whose source is ready ---- */

kivi_status ki_gguf_load(ki_file *file, kivi_error *err);
kivi_status ki_safetensors_load(ki_file *file, kivi_error *err);
const char *ki_gguf_value_name(uint32_t type);  /* "uint32"; "unknown" */
uint32_t ki_gguf_value_bytes(uint32_t type);    /* 0: string, array, unknown */

/* Little-endian loads from any address. GGUF and safetensors are little-endian, and so are all
 * machines kivi runs on. */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "big-endian machines are not supported"
#endif
static inline uint32_t ki_load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline uint64_t ki_load_u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

#endif
