#include "load_private.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static const ki_json_limits config_limits = {.max_containers = 50000, .max_values = 500000};

kivi_status ki_file_new(ki_file **out, ki_mem *mem, const char *path, kivi_error *err) {
    void *block, *copy;
    size_t n_bytes = strlen(path) + 1;
    KI_TRY(ki_alloc(&block, mem, KI_TAG_other, sizeof(ki_file), err));
    ki_file *file = block;
    *file = (ki_file){.mem = mem, .source = {.fd = -1}};
    kivi_status status = ki_alloc(&copy, mem, KI_TAG_other, n_bytes, err);
    if (status != KIVI_OK) {
        ki_free(mem, file);
        return status;
    }
    file->path = memcpy(copy, path, n_bytes);
    *out = file;
    return KIVI_OK;
}

/* Errors name the file inside the folder, not the folder. */
static void set_labels(ki_file *file, ki_file_kind kind) {
    file->kind = kind;
    ki_label(file->label, file->path, kind == KI_FILE_HF ? "model.safetensors" : NULL);
    ki_label(file->config_label, file->path, kind == KI_FILE_HF ? "config.json" : NULL);
}

/* ---- a Hugging Face folder ---- */

/* The size at open is the limit: a config.json that grows is read up to there. */
static kivi_status read_config_fd(ki_file *file, int fd, size_t n_bytes, kivi_error *err) {
    void *text;
    if (n_bytes > KI_MAX_CONFIG_BYTES)
        return KI_FAIL(err, FORMAT, "%s: has %zu bytes, at most %d", file->config_label, n_bytes,
                       (int)KI_MAX_CONFIG_BYTES);
    KI_TRY(ki_alloc(&text, file->mem, KI_TAG_other, n_bytes, err));
    kivi_status status = ki_fd_read(text, fd, 0, n_bytes, file->config_label, err);
    if (status == KIVI_OK)
        status = ki_json_load(&file->config, text, n_bytes, config_limits, file->config_label, err);
    ki_free(file->mem, text);
    return status;
}

static bool has_entry(int folder, const char *name) { return !faccessat(folder, name, F_OK, 0); }

/* Only a name that does not exist is "not there"; a loop of links or a folder without permission
 * goes on and fails as what it is. */
static kivi_status open_config(ki_file *file, int folder, kivi_error *err) {
    int fd;
    size_t n_bytes;
    if (!has_entry(folder, "config.json") && errno == ENOENT)
        return KI_FAIL(err, FORMAT, "%s: not there; a model folder has it, or give a GGUF file",
                       file->config_label);
    KI_TRY(ki_fd_open(&fd, &n_bytes, folder, "config.json", file->config_label, err));
    kivi_status status = read_config_fd(file, fd, n_bytes, err);
    close(fd);
    return status;
}

static kivi_status open_weights(ki_file *file, int folder, kivi_error *err) {
    int fd;
    size_t n_bytes;
    if (!has_entry(folder, "model.safetensors") && errno == ENOENT) {
        if (has_entry(folder, "model.safetensors.index.json"))
            return ki_parts_load_index(file, folder, err);
        return KI_FAIL(err, FORMAT, "%s: not there, the folder has no weights", file->label);
    }
    KI_TRY(ki_fd_open(&fd, &n_bytes, folder, "model.safetensors", file->label, err));
    KI_TRY(ki_source_map(&file->source, fd, file->label, err));
    return ki_safetensors_load(file, err);
}

/* ---- open ---- */

static kivi_status open_folder(ki_file *file, int folder, bool weights, kivi_error *err) {
    set_labels(file, KI_FILE_HF);
    KI_TRY(open_config(file, folder, err));
    return weights ? open_weights(file, folder, err) : KIVI_OK;
}

static kivi_status open_gguf(ki_file *file, kivi_error *err) {
    int fd;
    size_t n_bytes;
    KI_TRY(ki_fd_open(&fd, &n_bytes, AT_FDCWD, file->path, file->label, err));
    KI_TRY(ki_source_map(&file->source, fd, file->label, err));
    KI_TRY(ki_gguf_load(file, err));
    return ki_parts_load_gguf(file, err);
}

/* A folder is opened as a folder first, so that what lies in it is found relative to it even when
 * the path comes to mean something else meanwhile. */
static kivi_status open_path(ki_file *file, bool weights, kivi_error *err) {
    set_labels(file, KI_FILE_GGUF);
    int folder = open(file->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return open_gguf(file, err); /* reports a path that cannot be opened at all */
    kivi_status status = open_folder(file, folder, weights, err);
    close(folder);
    return status;
}

static kivi_status open_any(ki_file **out, ki_mem *mem, const char *path, bool weights,
                            kivi_error *err) {
    *out = NULL;
    KI_TRY(ki_file_new(out, mem, path, err));
    kivi_status status = open_path(*out, weights, err);
    if (status != KIVI_OK) ki_file_close(out);
    return status;
}

kivi_status ki_file_open(ki_file **out, ki_mem *mem, const char *path, kivi_error *err) {
    return open_any(out, mem, path, true, err);
}

kivi_status ki_file_open_shape(ki_file **out, ki_mem *mem, const char *path, kivi_error *err) {
    return open_any(out, mem, path, false, err);
}

static kivi_status open_bytes(ki_file *file, const char *config, size_t n_config_bytes,
                              kivi_error *err) {
    set_labels(file, config ? KI_FILE_HF : KI_FILE_GGUF);
    if (!config) return ki_gguf_load(file, err);
    KI_TRY(ki_json_load(&file->config, config, n_config_bytes, config_limits, file->config_label,
                        err));
    return ki_safetensors_load(file, err);
}

kivi_status ki_file_open_bytes(ki_file **out, ki_mem *mem, const char *name, const uint8_t *bytes,
                               size_t n_bytes, const char *config, size_t n_config_bytes,
                               kivi_error *err) {
    *out = NULL;
    KI_TRY(ki_file_new(out, mem, name, err));
    (*out)->source = (ki_source){.fd = -1, .data = bytes, .n_bytes = n_bytes};
    kivi_status status = open_bytes(*out, config, n_config_bytes, err);
    if (status != KIVI_OK) ki_file_close(out);
    return status;
}

void ki_file_close(ki_file **file) {
    ki_file *f = file ? *file : NULL;
    if (!f) return;
    void *const blocks[] = {f->path,      f->head, f->tensors,  f->tensor_names,
                            f->name_text, f->kvs,  f->kv_names, (void *)f->skipped};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) ki_free(f->mem, blocks[i]);
    json_decref(f->config);
    ki_source_close(&f->source);
    for (size_t i = 0; i < f->n_parts; i++) ki_file_close(&f->parts[i]);
    ki_free(f->mem, f->parts);
    ki_free(f->mem, f);
    *file = NULL;
}

ki_file_kind ki_file_kind_get(const ki_file *file) { return file->kind; }

const char *ki_file_path(const ki_file *file) { return file->path; }

const char *ki_file_label(const ki_file *file) { return file->config_label; }

void ki_file_free(const ki_file *file, void *array) { ki_free(file->mem, array); }
