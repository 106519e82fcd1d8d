/* sibling.c: small files beside the weights, such as tokenizer.json. */
#include "load_private.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

kivi_status ki_text_read(char **out, size_t *n_bytes, bool *found, ki_mem *mem, const char *folder,
                         const char *name, size_t max_bytes, kivi_error *err) {
    char label[KI_LABEL_BYTES];
    void *text = NULL;
    int at = AT_FDCWD, fd = -1;
    *out = NULL;
    *n_bytes = 0;
    ki_label(label, folder ? folder : name, folder ? name : NULL);
    if (folder) at = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder && at < 0) return KI_FAIL(err, IO, "%s: %s", label, strerror(errno));
    *found = !faccessat(at, name, F_OK, 0);
    kivi_status status = *found ? ki_fd_open(&fd, n_bytes, at, name, label, err) : KIVI_OK;
    if (folder) close(at);
    if (!*found || status != KIVI_OK) return status;
    if (*n_bytes > max_bytes)
        status = KI_FAIL(err, FORMAT, "%s: has %zu bytes, at most %zu", label, *n_bytes, max_bytes);
    if (status == KIVI_OK) status = ki_alloc(&text, mem, KI_TAG_other, *n_bytes, err);
    if (status == KIVI_OK) status = ki_fd_read(text, fd, 0, *n_bytes, label, err);
    close(fd);
    if (status != KIVI_OK) {
        ki_free(mem, text);
        return status;
    }
    *out = text;
    return KIVI_OK;
}
