/* save.c: a sequence in a file, the same bytes from every backend.
 *
 *     "KIVISEQ1"  geometry: 10 x u32  n_tokens u32  run_start u32
 *     with a sliding window: "KIVISEQ2"  geometry: 11 x u32 (the window)  n_tokens  run_start
 *     n_gone u32: the first 128 n_gone tokens are behind the window and left out below
 *     a + kind: "KIVISEQ3"  geometry: 12 x u32 (the window, or 0; the parts)  the rest as with a
 *     window
 *     for each layer, for each KV head:
 *         keys     16-bit sinks [min(S, n)][D] f16
 *                  wide channels: for each group with one of the next tokens its list [D / 4] u8
 *                  codes of tokens [S, packed): plain order, D B / 8 bytes a token; of wide
 *                  channels the low two bits, their high ones follow: D / 16 bytes a token
 *                  for each group that has one of them: scale [D] f16, zero [D] f16
 *                  16-bit tail [n - packed][D] f16
 *         values   the same, with scale [D / G] and zero [D / G] for each token; a + kind has no
 *                  zero, and of 3 bits the low two first: D / 4 bytes, then D / 8
 *     FNV-1a of all that, u64
 *
 * Little-endian. A side that is not quantized is all tail. The same code reads and writes, so the
 * two cannot differ. */
#include "save.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- the stream ---- */

void ki_stream_fail(ki_stream *s, kivi_status status, const char *what) {
    if (s->status == KIVI_OK) s->status = ki_fail(s->err, status, "%s: %s", s->path, what);
}

kivi_status ki_stream_open(ki_stream *s, const char *path, bool writing, kivi_error *err) {
    *s = (ki_stream){.path = path, .writing = writing, .err = err, .hash = 0xcbf29ce484222325u};
    int n = writing
                ? snprintf(s->temp_path, sizeof s->temp_path, "%s.%ld.tmp", path, (long)getpid())
                : 0;
    if (n < 0 || (size_t)n >= sizeof s->temp_path)
        return KI_FAIL(err, ARG, "%s: the path is too long", path);
    /* A pipe or device would be replaced by the renamed file; opening a pipe waits. */
    struct stat st;
    if (!stat(path, &st) && !S_ISREG(st.st_mode))
        return KI_FAIL(err, IO, "%s: is no regular file", path);
    s->file = fopen(writing ? s->temp_path : path, writing ? "wb" : "rb");
    if (!s->file) return KI_FAIL(err, IO, "%s: %s", path, strerror(errno));
    return KIVI_OK;
}

void ki_stream_bytes(ki_stream *s, void *bytes, size_t n_bytes) {
    if (s->status != KIVI_OK || n_bytes == 0) return;
    if (s->writing && fwrite(bytes, 1, n_bytes, s->file) != n_bytes) {
        ki_stream_fail(s, KIVI_IO, strerror(errno));
        return;
    }
    if (!s->writing && fread(bytes, 1, n_bytes, s->file) != n_bytes) {
        memset(bytes, 0, n_bytes);
        ki_stream_fail(s, KIVI_FORMAT, "the saved file ends too early");
        return;
    }
    for (size_t i = 0; i < n_bytes; i++)
        s->hash = (s->hash ^ ((const uint8_t *)bytes)[i]) * 0x100000001b3u;
}

static void check_end(ki_stream *s) {
    uint64_t expected = s->hash, found = expected;
    ki_stream_bytes(s, &found, sizeof found);
    if (s->writing || s->status != KIVI_OK) return;
    if (found != expected)
        ki_stream_fail(s, KIVI_FORMAT, "the checksum differs: the saved file is damaged");
    else if (fgetc(s->file) != EOF)
        ki_stream_fail(s, KIVI_FORMAT, "bytes follow the end of the saved file");
}

kivi_status ki_stream_finish(ki_stream *s) {
    check_end(s);
    if (s->writing && s->status == KIVI_OK && (fflush(s->file) || fsync(fileno(s->file))))
        ki_stream_fail(s, KIVI_IO, strerror(errno));
    if (fclose(s->file) && s->writing) ki_stream_fail(s, KIVI_IO, strerror(errno));
    if (s->writing && s->status == KIVI_OK && rename(s->temp_path, s->path))
        ki_stream_fail(s, KIVI_IO, strerror(errno));
    if (s->writing && s->status != KIVI_OK) remove(s->temp_path);
    return s->status;
}

/* ---- rows ---- */

static void get_row(uint16_t *row, const kivi_seq *seq, bool keys, uint32_t layer, uint32_t head,
                    uint32_t pos) {
    uint32_t d = seq->cache->layout.head_dim, lane = pos % KI_LANES;
    if (keys) {
        const uint16_t *block = ki_seq_k_block(seq, layer, head, pos / KI_LANES);
        for (uint32_t c = 0; c < d; c++) row[c] = block[c * KI_LANES + lane];
    } else {
        memcpy(row, ki_seq_v_block(seq, layer, head, pos / KI_LANES) + (size_t)lane * d,
               d * sizeof *row);
    }
}

static void put_row(const uint16_t *row, kivi_seq *seq, bool keys, uint32_t layer, uint32_t head,
                    uint32_t pos) {
    uint32_t d = seq->cache->layout.head_dim, lane = pos % KI_LANES;
    if (keys) {
        uint16_t *block = (uint16_t *)ki_seq_k_block(seq, layer, head, pos / KI_LANES);
        for (uint32_t c = 0; c < d; c++) block[c * KI_LANES + lane] = row[c];
    } else {
        memcpy((uint16_t *)ki_seq_v_block(seq, layer, head, pos / KI_LANES) + (size_t)lane * d, row,
               d * sizeof *row);
    }
}

static void halves(ki_stream *s, uint16_t *x, size_t n) {
    ki_stream_bytes(s, x, n * sizeof *x);
    if (!s->writing && s->status == KIVI_OK && !ki_f16_all_finite(x, n))
        ki_stream_fail(s, KIVI_FORMAT, "the saved file holds a number that is not finite");
}

static void rows(ki_stream *s, kivi_seq *seq, bool keys, uint32_t layer, uint32_t head,
                 uint32_t from, uint32_t to) {
    uint16_t row[KI_MAX_HEAD_DIM];
    for (uint32_t pos = from; pos < to && s->status == KIVI_OK; pos++) {
        if (s->writing) get_row(row, seq, keys, layer, head, pos);
        halves(s, row, seq->cache->layout.head_dim);
        if (!s->writing && s->status == KIVI_OK) put_row(row, seq, keys, layer, head, pos);
    }
}

/* ---- codes ---- */

/* One token's codes [D] to or from plain bytes, low bits first. */
static void plain_codes(uint8_t *bytes, uint8_t *codes, uint32_t d, uint32_t bits, bool to_bytes) {
    uint32_t mask = (1u << bits) - 1, per_byte = 8 / bits;
    if (to_bytes) memset(bytes, 0, d * bits / 8);
    for (uint32_t c = 0; c < d; c++) {
        uint32_t shift = c % per_byte * bits;
        uint32_t byte = bytes[c / per_byte];
        if (to_bytes) bytes[c / per_byte] = (uint8_t)(byte | (uint32_t)codes[c] << shift);
        else codes[c] = (uint8_t)(byte >> shift & mask);
    }
}

/* A key code in place: packing whole groups needs all their tokens, this needs one. */
static void set_key_code(uint32_t *words, uint32_t token, uint32_t c, uint32_t d, uint32_t bits,
                         uint32_t code) {
    uint32_t n = 32 / bits, bit = ki_code_bit(c % n, bits);
    uint32_t *word =
        words + ((size_t)(token / KI_LANES) * (d / n) + c / n) * KI_LANES + token % KI_LANES;
    *word = (*word & ~(((1u << bits) - 1) << bit)) | code << bit;
}

/* `bits` of n codes, plain. */
static void stream_codes(ki_stream *s, uint8_t *codes, uint32_t n, uint32_t bits) {
    uint8_t bytes[KI_MAX_HEAD_DIM];
    if (s->writing) plain_codes(bytes, codes, n, bits, true);
    ki_stream_bytes(s, bytes, n * bits / 8);
    if (!s->writing) plain_codes(bytes, codes, n, bits, false);
}

static void key_codes(ki_stream *s, const kivi_seq *seq, uint32_t layer, uint32_t head,
                      uint32_t pos) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t bits = l->kv.k_bits, d = l->head_dim, t = pos % KI_PAGE_TOKENS;
    uint8_t codes[KI_MAX_HEAD_DIM];
    ki_plus_keys keys;
    ki_layout_keys(&keys, l, ki_seq_page(seq, pos / KI_PAGE_TOKENS, layer, head));
    for (uint32_t c = 0; s->writing && c < d; c++)
        codes[c] = (uint8_t)ki_key_code(keys.low, t, c, d, bits);
    stream_codes(s, codes, d, bits);
    for (uint32_t c = 0; !s->writing && s->status == KIVI_OK && c < d; c++)
        set_key_code(keys.low, t, c, d, bits, codes[c]);
    if (!keys.wide) return;
    for (uint32_t w = 0; s->writing && w < d / 4; w++)
        codes[w] = (uint8_t)ki_plus_wide_code(keys.wide, t, w, d);
    stream_codes(s, codes, d / 4, 2);
    for (uint32_t w = 0; !s->writing && s->status == KIVI_OK && w < d / 4; w++)
        ki_plus_put_key_code(&keys, t, keys.list[w], d, (unsigned)codes[w] << 2);
}

static void value_codes(ki_stream *s, const kivi_seq *seq, uint32_t layer, uint32_t head,
                        uint32_t pos) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t d = l->head_dim, t = pos % KI_PAGE_TOKENS;
    uint8_t codes[KI_MAX_HEAD_DIM];
    uint8_t *page = ki_seq_page(seq, pos / KI_PAGE_TOKENS, layer, head);
    struct {
        uint32_t *words, bits;
    } planes[2] = {{(uint32_t *)(page + l->v_codes_at), l->kv.v_bits == 3 ? 2 : l->kv.v_bits},
                   {(uint32_t *)(page + l->v_third_at), 1}};
    for (int i = 0; i < (ki_has_third(l) ? 2 : 1); i++) {
        for (uint32_t c = 0; s->writing && c < d; c++)
            codes[c] = (uint8_t)ki_value_code(planes[i].words, t, c, d, planes[i].bits);
        stream_codes(s, codes, d, planes[i].bits);
        if (!s->writing && s->status == KIVI_OK)
            ki_pack_values(planes[i].words, codes, t, d, planes[i].bits);
    }
}

/* Which channels of the page of pos are wide: ascending, or nothing that follows makes sense. */
static void key_list(ki_stream *s, const kivi_seq *seq, uint32_t layer, uint32_t head,
                     uint32_t pos) {
    const ki_layout *l = &seq->cache->layout;
    uint8_t *list = ki_seq_page(seq, pos / KI_PAGE_TOKENS, layer, head) + l->k_list_at;
    uint32_t n = l->head_dim / 4;
    ki_stream_bytes(s, list, n);
    for (uint32_t w = 0; w < n; w++)
        if (list[w] >= l->head_dim || (w && list[w] <= list[w - 1]))
            ki_stream_fail(s, KIVI_FORMAT, "the saved file names wide channels out of order");
}

static void key_group_scales(ki_stream *s, const kivi_seq *seq, uint32_t layer, uint32_t head,
                             uint32_t pos) {
    const ki_layout *l = &seq->cache->layout;
    uint8_t *page = ki_seq_page(seq, pos / KI_PAGE_TOKENS, layer, head);
    size_t at = (size_t)(pos % KI_PAGE_TOKENS / l->k_group) * l->head_dim;
    halves(s, (uint16_t *)(page + l->k_scale_at) + at, l->head_dim);
    halves(s, (uint16_t *)(page + l->k_zero_at) + at, l->head_dim);
}

static void value_token_scales(ki_stream *s, const kivi_seq *seq, uint32_t layer, uint32_t head,
                               uint32_t pos) {
    const ki_layout *l = &seq->cache->layout;
    uint8_t *page = ki_seq_page(seq, pos / KI_PAGE_TOKENS, layer, head);
    uint32_t t = pos % KI_PAGE_TOKENS, n = l->head_dim / l->v_group;
    for (int plane = 0; plane < (ki_has_v_zero(l) ? 2 : 1); plane++) {
        uint16_t *at = (uint16_t *)(page + (plane ? l->v_zero_at : l->v_scale_at)),
                 numbers[KI_MAX_HEAD_DIM / 16];
        for (uint32_t g = 0; g < n; g++) numbers[g] = at[g * KI_PAGE_TOKENS + t];
        halves(s, numbers, n);
        for (uint32_t g = 0; g < n && !s->writing; g++) at[g * KI_PAGE_TOKENS + t] = numbers[g];
    }
}

static void side(ki_stream *s, kivi_seq *seq, bool keys, uint32_t layer, uint32_t head) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t n = seq->n_tokens,
             sinks = (keys ? l->kv.k_bits : l->kv.v_bits) == 16 ? 0 : KI_MIN(l->kv.sink_tokens, n);
    uint32_t from = KI_MAX(seq->n_gone * KI_PAGE_TOKENS, sinks);
    uint32_t line = keys ? ki_k_packed(l, n) : ki_v_packed(l, n), packed = KI_MAX(line, from);
    uint32_t groups_from = from / l->k_group * l->k_group; /* it may begin with sinks */
    uint32_t groups_end = keys && from < line ? line : 0;
    rows(s, seq, keys, layer, head, 0, sinks);
    uint32_t pages_from = from / KI_PAGE_TOKENS * KI_PAGE_TOKENS;
    for (uint32_t p = pages_from; ki_has_wide(l) && p < groups_end && s->status == KIVI_OK;
         p += KI_PAGE_TOKENS)
        key_list(s, seq, layer, head, p);
    for (uint32_t p = from; p < packed && s->status == KIVI_OK; p++)
        (keys ? key_codes : value_codes)(s, seq, layer, head, p);
    for (uint32_t p = groups_from; p < groups_end && s->status == KIVI_OK; p += l->k_group)
        key_group_scales(s, seq, layer, head, p);
    for (uint32_t p = from; !keys && p < packed && s->status == KIVI_OK; p++)
        value_token_scales(s, seq, layer, head, p);
    rows(s, seq, keys, layer, head, packed, n);
}

/* ---- the whole ---- */

static void expect_u32(ki_stream *s, uint32_t value, const char *name) {
    uint32_t found = value;
    ki_stream_bytes(s, &found, sizeof found);
    if (s->status == KIVI_OK && found != value)
        s->status = ki_fail(s->err, KIVI_ARG, "%s: saved with %s %u, this cache has %u", s->path,
                            name, found, value);
}

/* What the last byte of the first eight says of the cache a file is for. */
static const char *const versions[] = {"a plain kind and no sliding window",
                                       "a plain kind and a sliding window", "a + kind"};

static void header(ki_stream *s, const ki_layout *l) {
    const int version = l->kv.plus ? 2 : l->window ? 1 : 0;
    const char expected[9] = {'K', 'I', 'V', 'I', 'S', 'E', 'Q', (char)('1' + version)};
    char magic[8], what[128];
    memcpy(magic, expected, sizeof magic);
    ki_stream_bytes(s, magic, sizeof magic);
    int found = magic[7] - '1';
    if (!memcmp(magic, expected, 7) && found != version && found >= 0 && found <= 2) {
        snprintf(what, sizeof what, "saved with %s, this cache has %s", versions[found],
                 versions[version]);
        ki_stream_fail(s, KIVI_ARG, what);
    } else if (memcmp(magic, expected, sizeof magic)) {
        snprintf(what, sizeof what, "not a saved kivi sequence, version %d", version + 1);
        ki_stream_fail(s, KIVI_FORMAT, what);
    }
    const struct {
        uint32_t value;
        const char *name;
    } fields[] = {
        {l->n_layers, "layers"},
        {l->n_kv_heads, "KV heads"},
        {l->head_dim, "head size"},
        {l->kv.k_bits, "key bits"},
        {l->kv.v_bits, "value bits"},
        {l->kv.group, "group"},
        {l->kv.residual_tokens, "residual"},
        {l->kv.sink_tokens, "sinks"},
        {l->kv.rule, "visibility rule"},
        {l->kv.span_tokens, "span"},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        expect_u32(s, fields[i].value, fields[i].name);
    if (l->window || l->kv.plus) expect_u32(s, l->window, "window");
    if (l->kv.plus) expect_u32(s, l->kv.plus, "parts of a + kind");
}

/* The table of a sequence that is read: n_gone marks, then pages. */
static void make_room(ki_stream *s, kivi_seq *seq, uint32_t n_tokens, uint32_t run_start,
                      uint32_t n_gone) {
    const ki_layout *l = &seq->cache->layout;
    if (run_start > n_tokens || n_tokens > (uint64_t)seq->max_pages * KI_PAGE_TOKENS) {
        ki_stream_fail(s, KIVI_ARG, "more tokens saved than this cache has pages for");
        return;
    }
    if (n_gone > ki_seq_live_from(l, n_tokens) / KI_PAGE_TOKENS) {
        ki_stream_fail(s, KIVI_FORMAT, "tokens within the window are missing");
        return;
    }
    for (uint32_t i = 0; i < n_gone; i++) seq->pages[i] = (uint32_t)KI_NO_PAGE;
    seq->n_pages = seq->n_gone = n_gone;
    s->status = ki_seq_reserve(seq, n_tokens, s->err);
    if (s->status != KIVI_OK) return;
    seq->n_tokens = n_tokens;
    seq->run_start = run_start;
    seq->k_valid_from = ki_k_packed(l, n_tokens);
    seq->v_valid_from = ki_v_packed(l, n_tokens);
}

kivi_status ki_seq_take_shape(kivi_seq *to, const kivi_seq *from, kivi_error *err) {
    const ki_layout *l = &from->cache->layout;
    if (from->n_tokens > (uint64_t)to->max_pages * KI_PAGE_TOKENS)
        return KI_FAIL(err, ARG, "sequence: %u tokens, this cache takes %u", from->n_tokens,
                       to->max_pages * KI_PAGE_TOKENS);
    for (uint32_t i = 0; i < from->n_gone; i++) to->pages[i] = (uint32_t)KI_NO_PAGE;
    to->n_pages = to->n_gone = from->n_gone;
    KI_TRY(ki_seq_reserve(to, from->n_tokens, err));
    to->n_tokens = from->n_tokens;
    to->run_start = from->run_start;
    to->k_valid_from = ki_k_packed(l, from->n_tokens);
    to->v_valid_from = ki_v_packed(l, from->n_tokens);
    return KIVI_OK;
}

void ki_seq_stream(ki_stream *s, kivi_seq *seq) {
    const ki_layout *l = &seq->cache->layout;
    uint32_t n_tokens = seq->n_tokens, run_start = seq->run_start, n_gone = seq->n_gone;
    if (seq->cache->device) {
        ki_stream_fail(s, KIVI_UNSUPPORTED, "a cache on another device cannot be saved or loaded");
        return;
    }
    header(s, l);
    ki_stream_bytes(s, &n_tokens, sizeof n_tokens);
    ki_stream_bytes(s, &run_start, sizeof run_start);
    if (l->window || l->kv.plus) ki_stream_bytes(s, &n_gone, sizeof n_gone);
    if (s->status != KIVI_OK) return;
    if (!s->writing) make_room(s, seq, n_tokens, run_start, n_gone);
    for (uint32_t layer = 0; layer < l->n_layers; layer++)
        for (uint32_t head = 0; head < l->n_kv_heads && s->status == KIVI_OK; head++) {
            side(s, seq, true, layer, head);
            side(s, seq, false, layer, head);
        }
}

void ki_seq_look(ki_stream *s, const ki_layout *layout) {
    uint8_t bytes[4096];
    struct stat st;
    header(s, layout);
    if (s->status == KIVI_OK && fstat(fileno(s->file), &st))
        ki_stream_fail(s, KIVI_IO, strerror(errno));
    if (s->status != KIVI_OK) return;
    off_t left = st.st_size - ftello(s->file) - (off_t)sizeof s->hash;
    for (; left > 0 && s->status == KIVI_OK; left -= (off_t)sizeof bytes)
        ki_stream_bytes(s, bytes, KI_MIN((size_t)left, sizeof bytes));
}

kivi_status kivi_seq_save(const kivi_seq *seq, const char *path, kivi_error *err) {
    ki_stream s;
    if (seq->step_rows || seq->run_left)
        return KI_FAIL(err, ARG, "sequence: no saving within a %s",
                       seq->step_rows ? "step" : "prompt");
    KI_TRY(ki_stream_open(&s, path, true, err));
    ki_seq_stream(&s, (kivi_seq *)seq); /* writing changes nothing in it */
    return ki_stream_finish(&s);
}

kivi_status kivi_seq_load(kivi_seq **out, kivi_cache *cache, const char *path, kivi_error *err) {
    ki_stream s;
    *out = NULL;
    KI_TRY(ki_stream_open(&s, path, false, err));
    kivi_seq *seq = NULL;
    s.status = kivi_seq_create(&seq, cache, err);
    if (s.status == KIVI_OK) ki_seq_stream(&s, seq);
    kivi_status status = ki_stream_finish(&s);
    if (status != KIVI_OK) kivi_seq_destroy(&seq);
    *out = seq;
    return status;
}
