#include "load_private.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* For "is ..., expected a model file". */
static const char *file_type_text(mode_t mode) {
    if (S_ISDIR(mode)) return "a directory";
    if (S_ISFIFO(mode)) return "a pipe";
    if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
    return "not a regular file";
}

/* The check behind every descriptor: only a regular file has a size to bound the reader by. */
static kivi_status stat_regular(struct stat *st, int fd, const char *label, kivi_error *err) {
    if (fstat(fd, st))
        return KI_FAIL(err, IO, "%s: cannot be examined: %s", label, strerrordesc_np(errno));
    if (!S_ISREG(st->st_mode))
        return KI_FAIL(err, FORMAT, "%s: is %s, expected a model file", label,
                       file_type_text(st->st_mode));
    if (st->st_size <= 0)
        return KI_FAIL(err, FORMAT, "%s: is empty (0 bytes), expected a model file", label);
    return KIVI_OK;
}

kivi_status ki_fd_open(int *fd, size_t *n_bytes, int at, const char *path, const char *label,
                       kivi_error *err) {
    /* O_NONBLOCK: opening a pipe that has no writer must not wait for one. */
    *fd = openat(at, path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    if (*fd < 0)
        return KI_FAIL(err, IO, "%s: cannot be opened: %s", label, strerrordesc_np(errno));
    struct stat st;
    kivi_status status = stat_regular(&st, *fd, label, err);
    if (status == KIVI_OK) {
        *n_bytes = (size_t)st.st_size;
        return KIVI_OK;
    }
    close(*fd);
    *fd = -1;
    return status;
}

/* A read of 0 bytes inside the size seen at open: somebody cut the file. */
kivi_status ki_fd_read(void *out, int fd, size_t offset_bytes, size_t n_bytes, const char *label,
                       kivi_error *err) {
    for (size_t done = 0; done < n_bytes;) {
        size_t at = offset_bytes + done;
        ssize_t got = pread(fd, (char *)out + done, n_bytes - done, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return KI_FAIL(err, IO, "%s: reading at byte %zu: %s", label, at,
                           strerrordesc_np(errno));
        if (got == 0)
            return KI_FAIL(err, IO, "%s: ends at byte %zu, it was longer when opened", label, at);
        done += (size_t)got;
    }
    return KIVI_OK;
}

kivi_status ki_source_map(ki_source *out, int fd, const char *label, kivi_error *err) {
    struct stat st;
    *out = (ki_source){.fd = fd}; /* taken over before anything can fail */
    KI_TRY(stat_regular(&st, fd, label, err));
    out->n_bytes = (size_t)st.st_size;
    out->mtime = st.st_mtim;
    void *p = mmap(NULL, out->n_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED)
        return ki_fail(err, errno == ENOMEM ? KIVI_NOMEM : KIVI_IO,
                       "%s: %zu bytes cannot be mapped: %s", label, out->n_bytes,
                       strerrordesc_np(errno));
    out->data = p;
    return KIVI_OK;
}

void ki_source_close(ki_source *source) {
    if (source->fd < 0) return; /* lent bytes */
    if (source->data) munmap((void *)(uintptr_t)source->data, source->n_bytes);
    close(source->fd);
    *source = (ki_source){.fd = -1};
}

/* The descriptor, not the path: the mapping follows the file that was opened. */
static kivi_status check_own_size(const ki_file *file, kivi_error *err) {
    const ki_source *source = &file->source;
    struct stat st;
    if (source->fd < 0) return KIVI_OK;
    if (fstat(source->fd, &st))
        return KI_FAIL(err, IO, "%s: cannot be examined: %s", file->label, strerrordesc_np(errno));
    if (st.st_size < 0 || (size_t)st.st_size != source->n_bytes)
        return KI_FAIL(err, IO, "%s: changed while in use: %lld bytes now, %zu when opened",
                       file->label, (long long)st.st_size, source->n_bytes);
    if (st.st_mtim.tv_sec != source->mtime.tv_sec || st.st_mtim.tv_nsec != source->mtime.tv_nsec)
        return KI_FAIL(err, IO, "%s: was written to while in use, load it again", file->label);
    return KIVI_OK;
}

kivi_status ki_file_check_size(const ki_file *file, kivi_error *err) {
    KI_TRY(check_own_size(file, err));
    for (size_t i = 0; i < file->n_parts; i++) KI_TRY(check_own_size(file->parts[i], err));
    return KIVI_OK;
}

static bool holds(const ki_source *source, const ki_tensor *tensor) {
    return source->data && tensor->data >= source->data &&
           tensor->data < source->data + source->n_bytes;
}

/* The file of a model in parts that a tensor lies in. */
static const ki_file *home_of(const ki_file *file, const ki_tensor *tensor) {
    if (holds(&file->source, tensor)) return file;
    for (size_t i = 0; i < file->n_parts; i++)
        if (holds(&file->parts[i]->source, tensor)) return file->parts[i];
    return file;
}

kivi_status ki_file_read(void *out, const ki_file *file, const ki_tensor *tensor,
                         size_t offset_bytes, size_t n_bytes, kivi_error *err) {
    const ki_file *home = home_of(file, tensor);
    if (offset_bytes > tensor->n_bytes || n_bytes > tensor->n_bytes - offset_bytes)
        return KI_FAIL(err, ARG, "%s: tensor %s: bytes %zu+%zu asked, it has %zu", home->label,
                       tensor->name, offset_bytes, n_bytes, tensor->n_bytes);
    if (home->source.fd < 0) {
        memcpy(out, tensor->data + offset_bytes, n_bytes);
        return KIVI_OK;
    }
    size_t start = (size_t)(tensor->data - home->source.data);
    return ki_fd_read(out, home->source.fd, start + offset_bytes, n_bytes, home->label, err);
}

void ki_file_drop(const ki_file *file, const ki_tensor *tensor) {
    const ki_source *source = &home_of(file, tensor)->source;
    if (source->fd < 0) return; /* lent memory: DONTNEED would wipe it */
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    size_t start = (size_t)(tensor->data - source->data), end = start + tensor->n_bytes;
    start -= start % page_bytes; /* pages shared with a neighbour are only read again */
    void *first = (void *)(uintptr_t)(source->data + start);
    (void)madvise(first, end - start, MADV_DONTNEED); /* advice: RSS is all that can suffer */
}
