/* gguf_write.c: the layout that gguf.c reads, from the other side. */
#include "write.h"

#include "load_private.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    VERSION = 3,
    ALIGNMENT = 32,              /* GGUF's own, which needs no key */
    FIXED_BYTES = 4 + 4 + 8 + 8, /* magic, version, two counts */
    MAX_INFO_BYTES = 64 * 1024 * 1024,
    MAX_KV_BYTES = KI_MAX_HEAD_BYTES - MAX_INFO_BYTES - 4096 /* what gguf.c reads */
};

void ki_gguf_out_init(ki_gguf_out *out, ki_mem *mem, kivi_error *err) {
    *out = (ki_gguf_out){.mem = mem, .err = err, .fd = -1};
    ki_buf_init(&out->kvs, mem, MAX_KV_BYTES);
    ki_buf_init(&out->infos, mem, MAX_INFO_BYTES);
}

void ki_gguf_out_deinit(ki_gguf_out *out) {
    if (out->fd >= 0) close(out->fd);
    if (out->temp) unlink(out->temp);
    ki_buf_deinit(&out->kvs);
    ki_buf_deinit(&out->infos);
    ki_free(out->mem, out->path);
    ki_free(out->mem, out->temp);
    out->path = out->temp = NULL;
    out->fd = -1;
}

/* ---- keys ---- */

static void put(ki_gguf_out *out, ki_buf *to, const void *bytes, size_t n_bytes) {
    if (out->status == KIVI_OK) out->status = ki_buf_append(to, bytes, n_bytes, out->err);
}

static void put_u32(ki_gguf_out *out, ki_buf *to, uint32_t v) { put(out, to, &v, sizeof v); }
static void put_u64(ki_gguf_out *out, ki_buf *to, uint64_t v) { put(out, to, &v, sizeof v); }

static void put_str(ki_gguf_out *out, ki_buf *to, ki_str text) {
    put_u64(out, to, text.n_bytes);
    put(out, to, text.bytes, text.n_bytes);
}

static void put_key(ki_gguf_out *out, const char *key, uint32_t type) {
    put_str(out, &out->kvs, ki_str_of(key));
    put_u32(out, &out->kvs, type);
    out->n_kvs++;
}

static void put_array(ki_gguf_out *out, const char *key, uint32_t item_type, size_t count) {
    put_key(out, key, KI_GGUF_ARRAY);
    put_u32(out, &out->kvs, item_type);
    put_u64(out, &out->kvs, count);
}

void ki_gguf_u32(ki_gguf_out *out, const char *key, uint32_t value) {
    put_key(out, key, KI_GGUF_U32);
    put_u32(out, &out->kvs, value);
}

void ki_gguf_f32(ki_gguf_out *out, const char *key, float value) {
    put_key(out, key, KI_GGUF_F32);
    put(out, &out->kvs, &value, sizeof value);
}

void ki_gguf_bool(ki_gguf_out *out, const char *key, bool value) {
    uint8_t byte = value;
    put_key(out, key, KI_GGUF_BOOL);
    put(out, &out->kvs, &byte, 1);
}

void ki_gguf_str(ki_gguf_out *out, const char *key, ki_str value) {
    put_key(out, key, KI_GGUF_STR);
    put_str(out, &out->kvs, value);
}

void ki_gguf_strs(ki_gguf_out *out, const char *key, const ki_str *values, size_t count) {
    put_array(out, key, KI_GGUF_STR, count);
    for (size_t i = 0; i < count; i++) put_str(out, &out->kvs, values[i]);
}

void ki_gguf_i32s(ki_gguf_out *out, const char *key, const int32_t *values, size_t count) {
    put_array(out, key, KI_GGUF_I32, count);
    put(out, &out->kvs, values, count * sizeof *values);
}

void ki_gguf_f32s(ki_gguf_out *out, const char *key, const float *values, size_t count) {
    put_array(out, key, KI_GGUF_F32, count);
    put(out, &out->kvs, values, count * sizeof *values);
}

/* ---- tensors ---- */

static uint32_t type_number(ki_dtype dtype) {
    ki_dtype found;
    uint32_t n = 0;
    while (!ki_dtype_from_gguf(&found, n) || found != dtype) n++; /* every type of ours has one */
    return n;
}

void ki_gguf_tensor(ki_gguf_out *out, const char *name, ki_dtype dtype, uint32_t n_dims,
                    const uint64_t *dims) {
    size_t n_elements, n_bytes, padded;
    if (out->status == KIVI_OK)
        out->status = ki_elements(&n_elements, n_dims, dims, name, "GGUF", out->err);
    if (out->status != KIVI_OK) return;
    if (!ki_mul(&n_bytes, n_elements / ki_dtype_block_elements(dtype),
                ki_dtype_block_bytes(dtype)) ||
        !ki_round_up(&padded, n_bytes, ALIGNMENT) || !ki_add(&padded, padded, out->data_bytes)) {
        out->status =
            KI_FAIL(out->err, FORMAT, "tensor %s: the file would exceed 2^64 bytes", name);
        return;
    }
    put_str(out, &out->infos, ki_str_of(name));
    put_u32(out, &out->infos, n_dims);
    for (uint32_t i = n_dims; i-- > 0;) put_u64(out, &out->infos, dims[i]);
    put_u32(out, &out->infos, type_number(dtype));
    put_u64(out, &out->infos, out->data_bytes);
    out->data_bytes = padded;
    out->n_tensors++;
}

/* ---- the file ---- */

static kivi_status io_failed(const ki_gguf_out *out, const char *what) {
    return KI_FAIL(out->err, IO, "%s: %s: %s", out->path, what, strerrordesc_np(errno));
}

kivi_status ki_gguf_may_write(const char *path, bool force, kivi_error *err) {
    struct stat st;
    if (lstat(path, &st)) return KIVI_OK; /* not there, or what opening it will tell */
    if (S_ISDIR(st.st_mode)) return KI_FAIL(err, ARG, "%s: is a folder, expected a file", path);
    if (!force) return KI_FAIL(err, ARG, "%s: exists; --force replaces it", path);
    return KIVI_OK;
}

static kivi_status keep_names(ki_gguf_out *out, const char *path) {
    size_t n = strlen(path) + 1, n_temp = n + 32;
    void *copy, *temp;
    KI_TRY(ki_alloc(&copy, out->mem, KI_TAG_other, n, out->err));
    out->path = memcpy(copy, path, n);
    KI_TRY(ki_alloc(&temp, out->mem, KI_TAG_other, n_temp, out->err));
    snprintf(temp, n_temp, "%s.%ld.tmp", path, (long)getpid());
    out->fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, 0666);
    if (out->fd >= 0) {
        out->temp = temp;
        return KIVI_OK;
    }
    kivi_status status = io_failed(out, "cannot be made");
    ki_free(out->mem, temp);
    return status;
}

static kivi_status write_all(const ki_gguf_out *out, const void *bytes, size_t n_bytes) {
    for (size_t done = 0; done < n_bytes;) {
        ssize_t n = write(out->fd, (const char *)bytes + done, n_bytes - done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return io_failed(out, "writing");
        done += (size_t)n;
    }
    return KIVI_OK;
}

static kivi_status write_zeros(const ki_gguf_out *out, size_t n_bytes) {
    static const uint8_t zeros[ALIGNMENT];
    return write_all(out, zeros, n_bytes % ALIGNMENT ? ALIGNMENT - n_bytes % ALIGNMENT : 0);
}

/* A file system that cannot reserve tells later. */
static kivi_status reserve(const ki_gguf_out *out, size_t n_head_bytes) {
    size_t all;
    if (!ki_add(&all, n_head_bytes + ALIGNMENT, out->data_bytes) || all > INT64_MAX)
        return KI_FAIL(out->err, FORMAT, "%s: the file would exceed 2^63 bytes", out->path);
    all -= ALIGNMENT;
    if (!fallocate(out->fd, 0, 0, (off_t)all) || errno == EOPNOTSUPP || errno == ENOSYS ||
        errno == EINTR)
        return KIVI_OK;
    return io_failed(out, "room for it");
}

kivi_status ki_gguf_begin(ki_gguf_out *out, const char *path, bool force) {
    uint32_t version = VERSION;
    uint64_t counts[2] = {out->n_tensors, out->n_kvs};
    size_t n_head = FIXED_BYTES + out->kvs.n_bytes + out->infos.n_bytes, n_padded = n_head;
    KI_TRY(out->status);
    out->force = force;
    KI_TRY(ki_gguf_may_write(path, force, out->err));
    KI_TRY(keep_names(out, path));
    if (!ki_round_up(&n_padded, n_head, ALIGNMENT)) n_padded = SIZE_MAX; /* cannot be: bounded */
    KI_TRY(reserve(out, n_padded));
    KI_TRY(write_all(out, "GGUF", 4));
    KI_TRY(write_all(out, &version, sizeof version));
    KI_TRY(write_all(out, counts, sizeof counts));
    KI_TRY(write_all(out, out->kvs.data, out->kvs.n_bytes));
    KI_TRY(write_all(out, out->infos.data, out->infos.n_bytes));
    return write_zeros(out, n_head);
}

kivi_status ki_gguf_write(ki_gguf_out *out, const void *bytes, size_t n_bytes) {
    out->tensor_bytes += n_bytes; /* at most the tensor's own size, which was checked */
    return write_all(out, bytes, n_bytes);
}

kivi_status ki_gguf_end_tensor(ki_gguf_out *out) {
    size_t n = out->tensor_bytes;
    out->tensor_bytes = 0;
    return write_zeros(out, n);
}

/* A file that came to be meanwhile is not replaced either, unless asked. */
static int give_name(const ki_gguf_out *out) {
    if (out->force) return rename(out->temp, out->path);
    if (!renameat2(AT_FDCWD, out->temp, AT_FDCWD, out->path, RENAME_NOREPLACE)) return 0;
    if (errno != EINVAL && errno != ENOSYS) return -1;
    return link(out->temp, out->path) ? -1 : unlink(out->temp);
}

/* The name is on the disk, too; a folder that cannot be opened or synced is no reason to fail. */
static void sync_folder(const ki_gguf_out *out) {
    char *slash = strrchr(out->path, '/');
    if (slash) slash[slash == out->path] = 0;
    int fd = open(slash ? out->path : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    (void)fsync(fd);
    close(fd);
}

kivi_status ki_gguf_finish(ki_gguf_out *out) {
    int fd = out->fd;
    if (fsync(fd)) return io_failed(out, "writing to the disk");
    out->fd = -1;
    if (close(fd)) return io_failed(out, "writing");
    if (give_name(out)) return io_failed(out, "cannot be named so");
    ki_free(out->mem, out->temp);
    out->temp = NULL;
    sync_folder(out);
    return KIVI_OK;
}
