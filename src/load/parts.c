#include "load_private.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* A model in several files is one directory of tensors: each part is a file of its own, opened and
 * checked as such, and the first one's directory takes their entries over. Names, mappings and
 * descriptors stay with the parts. */

/* ---- joining ---- */

static kivi_status reserve_parts(ki_file *file, size_t n, kivi_error *err) {
    void *block;
    KI_TRY(ki_alloc_array(&block, file->mem, KI_TAG_other, n, sizeof(ki_file *), err));
    file->parts = block;
    return KIVI_OK;
}

/* Opens `leaf` of `folder` as the next part; loads its own directory of tensors. */
static kivi_status open_part(ki_file *file, int folder, const char *leaf,
                             kivi_status (*load)(ki_file *, kivi_error *), kivi_error *err) {
    ki_file *part;
    int fd;
    size_t n_bytes;
    KI_TRY(ki_file_new(&part, file->mem, leaf, err));
    file->parts[file->n_parts++] = part;
    part->kind = file->kind;
    ki_label(part->label, folder == AT_FDCWD ? leaf : file->path, folder == AT_FDCWD ? NULL : leaf);
    memcpy(part->config_label, part->label, sizeof part->label);
    if (faccessat(folder, leaf, F_OK, 0) && errno == ENOENT)
        return KI_FAIL(err, FORMAT, "%s: not there, %s is one of the model's parts", part->label,
                       folder == AT_FDCWD ? "it" : leaf);
    KI_TRY(ki_fd_open(&fd, &n_bytes, folder, leaf, part->label, err));
    KI_TRY(ki_source_map(&part->source, fd, part->label, err));
    return load(part, err);
}

/* All entries in one array and one sorted list of names; a name in two files is a fault. */
static kivi_status join(ki_file *file, kivi_error *err) {
    void *tensors, *names, *skipped;
    size_t n = file->n_tensors, n_skipped = file->n_skipped;
    for (size_t i = 0; i < file->n_parts; i++) {
        n += file->parts[i]->n_tensors;
        n_skipped += file->parts[i]->n_skipped;
    }
    if (n > KI_MAX_ENTRIES)
        return KI_FAIL(err, FORMAT, "%s: %zu tensors in all parts, at most %d", file->label, n,
                       (int)KI_MAX_ENTRIES);
    KI_TRY(ki_alloc_array(&tensors, file->mem, KI_TAG_other, n, sizeof(ki_tensor), err));
    if (file->n_tensors) memcpy(tensors, file->tensors, file->n_tensors * sizeof(ki_tensor));
    ki_free(file->mem, file->tensors);
    file->tensors = tensors;
    for (size_t i = 0; i < file->n_parts; i++) {
        const ki_file *part = file->parts[i];
        memcpy(file->tensors + file->n_tensors, part->tensors, part->n_tensors * sizeof(ki_tensor));
        file->n_tensors += part->n_tensors;
    }
    KI_TRY(ki_alloc_array(&names, file->mem, KI_TAG_other, n, sizeof(ki_name), err));
    ki_free(file->mem, file->tensor_names);
    file->tensor_names = names;
    KI_TRY(ki_alloc_array(&skipped, file->mem, KI_TAG_other, n_skipped, sizeof(char *), err));
    ki_free(file->mem, (void *)file->skipped);
    file->skipped = skipped;
    file->n_skipped = 0;
    for (size_t i = 0; i < file->n_parts; i++)
        for (size_t j = 0; j < file->parts[i]->n_skipped; j++)
            file->skipped[file->n_skipped++] = file->parts[i]->skipped[j];
    return ki_tensors_index(file, err);
}

/* ---- Hugging Face: model.safetensors.index.json ---- */

/* A file of the folder itself: whatever else a path can say leads out of it. */
static bool is_plain_name(const char *name) {
    size_t n = strlen(name);
    if (n < 1 || n > KI_MAX_NAME_BYTES || name[0] == '.') return false;
    for (const char *c = name; *c; c++)
        if (*c == '/' || (unsigned char)*c < 0x20 || *c == 0x7f) return false;
    return true;
}

static size_t find_part(const ki_file *file, const char *leaf) {
    size_t i = 0;
    while (i < file->n_parts && strcmp(file->parts[i]->path, leaf)) i++;
    return i;
}

static kivi_status open_mapped(ki_file *file, int folder, const json_t *map, kivi_error *err) {
    const char *tensor;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)map, tensor, value) {
        char shown[KI_SHOW_BYTES], name[KI_SHOW_BYTES];
        const char *leaf = json_string_value(value);
        ki_show(shown, ki_str_of(tensor));
        if (!leaf || !is_plain_name(leaf))
            return KI_FAIL(err, FORMAT,
                           "%s: tensor %s is in \"%s\", expected the name of a file in "
                           "this folder",
                           file->label, shown,
                           leaf ? ki_show(name, ki_str_of(leaf)) : "(no string)");
        if (find_part(file, leaf) < file->n_parts) continue;
        if (file->n_parts == KI_MAX_PARTS)
            return KI_FAIL(err, FORMAT, "%s: more than %d parts", file->label, (int)KI_MAX_PARTS);
        KI_TRY(open_part(file, folder, leaf, ki_safetensors_load, err));
    }
    return KIVI_OK;
}

static bool is_skipped(const ki_file *part, const char *name) {
    for (size_t i = 0; i < part->n_skipped; i++)
        if (!strcmp(part->skipped[i], name)) return true;
    return false;
}

/* Every tensor of the map is in the part it names. */
static kivi_status check_map(const ki_file *file, const json_t *map, kivi_error *err) {
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)map, name, value) {
        char shown[KI_SHOW_BYTES];
        const ki_file *part = file->parts[find_part(file, json_string_value(value))];
        if (!ki_file_tensor(part, name) && !is_skipped(part, name))
            return KI_FAIL(err, FORMAT, "%s: tensor %s is not there, the index says it is",
                           part->label, ki_show(shown, ki_str_of(name)));
    }
    return KIVI_OK;
}

/* And every tensor of a part is in the map: with the check for doubles, exactly once. */
static kivi_status check_parts(const ki_file *file, const json_t *map, kivi_error *err) {
    for (size_t i = 0; i < file->n_tensors; i++)
        if (!json_object_get(map, file->tensors[i].name)) {
            char shown[KI_SHOW_BYTES];
            return KI_FAIL(err, FORMAT, "%s: tensor %s of a part is not in the index", file->label,
                           ki_show(shown, ki_str_of(file->tensors[i].name)));
        }
    return KIVI_OK;
}

static kivi_status load_map(ki_file *file, int folder, const json_t *map, kivi_error *err) {
    size_t n = json_object_size(map);
    if (!json_is_object(map) || n == 0 || n > KI_MAX_ENTRIES)
        return KI_FAIL(err, FORMAT, "%s: weight_map has %zu tensors, expected 1 to %d", file->label,
                       n, (int)KI_MAX_ENTRIES);
    KI_TRY(reserve_parts(file, KI_MIN(n, (size_t)KI_MAX_PARTS), err));
    KI_TRY(open_mapped(file, folder, map, err));
    KI_TRY(check_map(file, map, err));
    KI_TRY(join(file, err));
    return check_parts(file, map, err);
}

kivi_status ki_parts_load_index(ki_file *file, int folder, kivi_error *err) {
    static const char *const leaf = "model.safetensors.index.json";
    const ki_json_limits limits = {1000, 2 * KI_MAX_ENTRIES};
    json_t *index = NULL;
    void *text;
    int fd;
    size_t n_bytes;
    ki_label(file->label, file->path, leaf);
    KI_TRY(ki_fd_open(&fd, &n_bytes, folder, leaf, file->label, err));
    kivi_status status = n_bytes > KI_MAX_ST_HEAD_BYTES
                             ? KI_FAIL(err, FORMAT, "%s: has %zu bytes, at most %d", file->label,
                                       n_bytes, (int)KI_MAX_ST_HEAD_BYTES)
                             : ki_alloc(&text, file->mem, KI_TAG_other, n_bytes, err);
    if (status == KIVI_OK) {
        status = ki_fd_read(text, fd, 0, n_bytes, file->label, err);
        if (status == KIVI_OK)
            status = ki_json_load(&index, text, n_bytes, limits, file->label, err);
        ki_free(file->mem, text);
    }
    close(fd);
    if (status == KIVI_OK)
        status = load_map(file, folder, json_object_get(index, "weight_map"), err);
    json_decref(index);
    return status;
}

/* ---- GGUF: NAME-00001-of-000NN.gguf ---- */

static kivi_status read_split(const ki_file *file, const char *key, uint64_t max, uint64_t *out,
                              kivi_error *err) {
    bool found;
    *out = 0;
    return ki_file_u64(out, &found, file, key, 0, max, err);
}

/* The digits of the part's number in a path that ends as parts do; NULL: it does not. */
static char *part_number(char *path, uint64_t n_parts) {
    enum { END_BYTES = 20 }; /* 00001-of-00002.gguf */
    char end[32];
    size_t n = strlen(path);
    int n_end = snprintf(end, sizeof end, "00001-of-%05u.gguf", (unsigned)n_parts);
    if (n_end < 0 || n_end >= END_BYTES || n <= (size_t)n_end) return NULL;
    return strcmp(path + n - (size_t)n_end, end) ? NULL : path + n - (size_t)n_end;
}

static kivi_status open_gguf_parts(ki_file *file, char *path, uint64_t n_parts, kivi_error *err) {
    char *number = part_number(path, n_parts), digits[8];
    if (!number)
        return KI_FAIL(err, FORMAT,
                       "%s: is part 1 of %llu by split.count, expected a name that ends "
                       "with -00001-of-%05u.gguf",
                       file->label, (unsigned long long)n_parts, (unsigned)n_parts);
    KI_TRY(reserve_parts(file, (size_t)n_parts - 1, err));
    for (uint64_t i = 1; i < n_parts; i++) {
        uint64_t no, count;
        snprintf(digits, sizeof digits, "%05u", (unsigned)(i + 1) % 100000);
        memcpy(number, digits, 5);
        KI_TRY(open_part(file, AT_FDCWD, path, ki_gguf_load, err));
        const ki_file *part = file->parts[file->n_parts - 1];
        KI_TRY(read_split(part, "split.no", KI_MAX_PARTS, &no, err));
        KI_TRY(read_split(part, "split.count", KI_MAX_PARTS, &count, err));
        if (no != i || count != n_parts)
            return KI_FAIL(err, FORMAT,
                           "%s: key split.no %llu of split.count %llu, expected %llu of "
                           "%llu",
                           part->label, (unsigned long long)no, (unsigned long long)count,
                           (unsigned long long)i, (unsigned long long)n_parts);
    }
    return KIVI_OK;
}

kivi_status ki_parts_load_gguf(ki_file *file, kivi_error *err) {
    uint64_t no, count, n_tensors;
    void *path;
    KI_TRY(read_split(file, "split.no", KI_MAX_PARTS, &no, err));
    KI_TRY(read_split(file, "split.count", KI_MAX_PARTS, &count, err));
    KI_TRY(read_split(file, "split.tensors.count", KI_MAX_ENTRIES, &n_tensors, err));
    if (count < 2) return KIVI_OK;
    if (no != 0)
        return KI_FAIL(err, FORMAT, "%s: is part %llu of %llu, give the first one", file->label,
                       (unsigned long long)no + 1, (unsigned long long)count);
    size_t n_bytes = strlen(file->path) + 1;
    KI_TRY(ki_alloc(&path, file->mem, KI_TAG_other, n_bytes, err));
    kivi_status status = open_gguf_parts(file, memcpy(path, file->path, n_bytes), count, err);
    ki_free(file->mem, path);
    if (status == KIVI_OK) status = join(file, err);
    if (status == KIVI_OK && n_tensors && n_tensors != file->n_tensors)
        return KI_FAIL(err, FORMAT, "%s: the parts have %zu tensors, split.tensors.count is %llu",
                       file->label, file->n_tensors, (unsigned long long)n_tensors);
    return status;
}
