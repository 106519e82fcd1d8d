/* vocab.c: the tables of a vocabulary. Everything it is made from came out of a file. */
#include "pipeline.h"

#include <stdlib.h>

bool ki_vocab_adds_bos(const char *model, const char *pre) {
    static const char *const adding[] = {"llama-bpe", "llama3", "falcon3", "tekken"};
    if (!strcmp(model, "llama")) return true;
    for (size_t i = 0; i < sizeof adding / sizeof *adding; i++)
        if (!strcmp(pre, adding[i])) return true;
    return false;
}

static kivi_status make(void *out, ki_vocab *vocab, size_t count, size_t item_bytes,
                        kivi_error *err) {
    void *block;
    KI_TRY(ki_alloc_array(&block, vocab->mem, KI_TAG_other, count, item_bytes, err));
    memcpy(out, &block, sizeof block); /* any object pointer; they are all alike here */
    return KIVI_OK;
}

ki_span ki_vocab_text(const ki_vocab *vocab, size_t id) {
    size_t begin = vocab->offsets[id];
    return (ki_span){vocab->text + begin, vocab->offsets[id + 1] - begin};
}

/* Plain text must never give one of these, whatever the vocabulary says: not as a byte, not as a
 * merge. */
static bool is_control(const ki_vocab *vocab, size_t id) {
    return vocab->types[id] == KI_TOKEN_CONTROL || vocab->types[id] == KI_TOKEN_UNKNOWN;
}

/* ---- text to id: open addressing, FNV-1a ---- */

static uint64_t hash_more(uint64_t h, ki_span s) {
    for (size_t i = 0; i < s.n_bytes; i++) h = (h ^ (unsigned char)s.bytes[i]) * 0x100000001b3u;
    return h;
}

static bool equals_joined(ki_span s, ki_span left, ki_span right) {
    return s.n_bytes == left.n_bytes + right.n_bytes &&
           (!left.n_bytes || !memcmp(s.bytes, left.bytes, left.n_bytes)) &&
           (!right.n_bytes || !memcmp(s.bytes + left.n_bytes, right.bytes, right.n_bytes));
}

/* The slot of the token spelled left then right, or the free one where it would be. Two parts, so
 * that the result of a merge is looked up without being built. */
static uint32_t *text_slot(const ki_vocab *vocab, ki_span left, ki_span right) {
    uint64_t h = hash_more(hash_more(0xcbf29ce484222325u, left), right);
    size_t at = (size_t)(h ^ h >> 32) & vocab->slot_mask;
    for (; vocab->slots[at]; at = (at + 1) & vocab->slot_mask)
        if (equals_joined(ki_vocab_text(vocab, vocab->slots[at] - 1), left, right)) break;
    return &vocab->slots[at];
}

static int32_t find_joined(const ki_vocab *vocab, ki_span left, ki_span right) {
    return (int32_t)*text_slot(vocab, left, right) - 1;
}

int32_t ki_vocab_find(const ki_vocab *vocab, ki_span text) {
    return find_joined(vocab, text, (ki_span){0});
}

/* ---- creation, in the order in which the parts need each other ---- */

static kivi_status check_id(const ki_vocab_spec *spec, const char *name, int64_t id, bool is_added,
                            kivi_error *err) {
    if (id < -1 || id >= (int64_t)spec->n_tokens)
        return KI_FAIL(err, FORMAT, "vocabulary: %s id %lld, expected 0 to %zu or none", name,
                       (long long)id, spec->n_tokens - 1);
    if (is_added && id < 0)
        return KI_FAIL(err, FORMAT, "vocabulary: %s is to be added but has no id", name);
    return KIVI_OK;
}

static kivi_status check_spec(const ki_vocab_spec *spec, kivi_error *err) {
    if (!spec->model || !spec->pre || !spec->tokens || (spec->n_merges && !spec->merges))
        return KI_FAIL(err, ARG, "vocabulary: model, pre, tokens or merges is NULL");
    if (strcmp(spec->model, "gpt2") && strcmp(spec->model, "llama"))
        return KI_FAIL(err, UNSUPPORTED, "vocabulary: model \"%.64s\", known: gpt2, llama",
                       spec->model);
    if (!strcmp(spec->model, "llama") && !spec->scores)
        return KI_FAIL(err, FORMAT, "vocabulary: model llama without scores");
    if (spec->n_tokens < 1 || spec->n_tokens > INT32_MAX || spec->n_merges >= KI_NO_RANK)
        return KI_FAIL(err, FORMAT, "vocabulary: %zu tokens, %zu merges, expected 1 to 2^31-1",
                       spec->n_tokens, spec->n_merges);
    KI_TRY(check_id(spec, "bos", spec->bos_id, spec->add_bos, err));
    KI_TRY(check_id(spec, "eos", spec->eos_id, spec->add_eos, err));
    return check_id(spec, "unknown", spec->unk_id, false, err);
}

static kivi_status copy_tokens(ki_vocab *vocab, const ki_vocab_spec *spec, kivi_error *err) {
    size_t total = 0;
    KI_TRY(make(&vocab->offsets, vocab, spec->n_tokens + 1, sizeof *vocab->offsets, err));
    for (size_t i = 0; i < spec->n_tokens; i++) {
        if (!ki_add(&total, total, spec->tokens[i].n_bytes))
            return KI_FAIL(err, FORMAT, "vocabulary: token %zu: the total length overflows", i);
        vocab->offsets[i + 1] = total;
    }
    KI_TRY(make(&vocab->text, vocab, total, 1, err));
    for (size_t i = 0; i < spec->n_tokens; i++)
        if (spec->tokens[i].n_bytes)
            memcpy(vocab->text + vocab->offsets[i], spec->tokens[i].bytes, spec->tokens[i].n_bytes);
    return KIVI_OK;
}

/* Whether an added token marks a turn, or looks as such tokens do. Some files have these as words
 * of the user's, who could then write a turn of another. */
static bool is_mark(ki_span text) {
    static const char *const marks[] = {"<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"};
    if (text.n_bytes > 4 && !memcmp(text.bytes, "<|", 2) &&
        !memcmp(text.bytes + text.n_bytes - 2, "|>", 2))
        return true;
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if (strlen(marks[i]) == text.n_bytes && !memcmp(marks[i], text.bytes, text.n_bytes))
            return true;
    return false;
}

static kivi_status copy_types(ki_vocab *vocab, const ki_vocab_spec *spec, kivi_error *err) {
    KI_TRY(make(&vocab->types, vocab, spec->n_tokens, 1, err));
    for (size_t i = 0; i < spec->n_tokens; i++) {
        int32_t type = spec->types ? spec->types[i] : KI_TOKEN_NORMAL;
        if (type < 0 || type > KI_TOKEN_BYTE)
            return KI_FAIL(err, FORMAT, "vocabulary: token %zu: type %d, expected 0 to 6", i, type);
        if (type == KI_TOKEN_USER && is_mark(ki_vocab_text(vocab, i))) type = KI_TOKEN_CONTROL;
        vocab->types[i] = (uint8_t)type;
    }
    return KIVI_OK;
}

static kivi_status index_texts(ki_vocab *vocab, kivi_error *err) {
    size_t n_slots = 16;
    while (n_slots / 2 <= vocab->n_tokens) n_slots *= 2; /* at most half full: misses are common */
    KI_TRY(make(&vocab->slots, vocab, n_slots, sizeof *vocab->slots, err));
    vocab->slot_mask = n_slots - 1;
    for (size_t i = 0; i < vocab->n_tokens; i++) {
        uint32_t *slot = text_slot(vocab, ki_vocab_text(vocab, i), (ki_span){0});
        if (!*slot) *slot = (uint32_t)(i + 1); /* a second token of this text is never found */
    }
    return KIVI_OK;
}

/* Vocabularies without all 256 bytes exist: SmolLM2 lacks 21. */
static void index_bytes(ki_vocab *vocab) {
    for (unsigned byte = 0; byte < 256; byte++) {
        unsigned char spelled[2];
        uint32_t n = ki_alphabet_write(spelled, (unsigned char)byte);
        int32_t id = ki_vocab_find(vocab, (ki_span){(const char *)spelled, n});
        vocab->bytes[byte] = ki_vocab_is_control(vocab, id) ? -1 : id;
    }
}

/* "<0x0A>" and its like, the bytes of characters that have no token. */
void ki_vocab_index_hex(ki_vocab *vocab) {
    static const char digits[] = "0123456789ABCDEF";
    for (unsigned byte = 0; byte < 256; byte++) {
        char spelled[6] = {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
        int32_t id = ki_vocab_find(vocab, (ki_span){spelled, sizeof spelled});
        vocab->bytes[byte] = ki_vocab_is_control(vocab, id) ? -1 : id;
    }
}

static kivi_status add_merge(ki_vocab *vocab, size_t index, ki_span merge, kivi_error *err) {
    /* From the second byte on: a left part is not empty, and could itself be a space. */
    const char *space = merge.n_bytes > 2 ? memchr(merge.bytes + 1, ' ', merge.n_bytes - 2) : NULL;
    if (!space)
        return KI_FAIL(err, FORMAT, "vocabulary: merge %zu is not two parts and a space", index);
    size_t n_left = (size_t)(space - merge.bytes);
    ki_span left = {merge.bytes, n_left}, right = {space + 1, merge.n_bytes - n_left - 1};
    int32_t left_id = ki_vocab_find(vocab, left), right_id = ki_vocab_find(vocab, right);
    int32_t merged_id = find_joined(vocab, left, right);
    const char *missing = left_id < 0     ? "left part"
                          : right_id < 0  ? "right part"
                          : merged_id < 0 ? "result"
                                          : NULL;
    if (missing)
        return KI_FAIL(err, FORMAT, "vocabulary: merge %zu: its %s is no token", index, missing);
    if (is_control(vocab, (size_t)merged_id))
        return KI_FAIL(err, FORMAT, "vocabulary: merge %zu: its result is a control token", index);
    return ki_pairs_add(&vocab->pairs, vocab->mem, left_id, right_id, (uint32_t)index, merged_id,
                        err);
}

static kivi_status index_merges(ki_vocab *vocab, const ki_vocab_spec *spec, kivi_error *err) {
    KI_TRY(ki_pairs_init(&vocab->pairs, vocab->mem, spec->n_merges, err));
    for (size_t i = 0; i < spec->n_merges; i++) KI_TRY(add_merge(vocab, i, spec->merges[i], err));
    return KIVI_OK;
}

/* ---- special tokens ---- */

static bool is_special(const ki_vocab *vocab, size_t id) {
    bool has_text = ki_vocab_text(vocab, id).n_bytes > 0; /* an empty one would match everywhere */
    return has_text && (is_control(vocab, id) || vocab->types[id] == KI_TOKEN_USER);
}

static kivi_status index_specials(ki_vocab *vocab, kivi_error *err) {
    size_t n = 0;
    ki_specials *s = &vocab->specials;
    for (size_t i = 0; i < vocab->n_tokens; i++) n += is_special(vocab, i);
    KI_TRY(make(&s->items, vocab, n, sizeof *s->items, err));
    for (size_t i = 0; i < vocab->n_tokens; i++)
        if (is_special(vocab, i))
            s->items[s->n_items++] = (ki_special){.text = ki_vocab_text(vocab, i),
                                                  .id = (int32_t)i,
                                                  .is_control = is_control(vocab, i)};
    ki_specials_sort(s);
    return KIVI_OK;
}

/* ---- the door ---- */

kivi_status ki_vocab_fill(ki_vocab *vocab, const ki_vocab_spec *spec, kivi_error *err) {
    KI_TRY(copy_tokens(vocab, spec, err));
    KI_TRY(copy_types(vocab, spec, err));
    return index_texts(vocab, err);
}

static kivi_status fill(ki_vocab *vocab, const ki_vocab_spec *spec, kivi_error *err) {
    bool is_scored = !strcmp(spec->model, "llama");
    vocab->kind = is_scored ? KI_VOCAB_SCORED : KI_VOCAB_BYTES;
    if (!is_scored) KI_TRY(ki_pre_init(&vocab->pre, vocab->mem, spec->pre, err));
    KI_TRY(ki_vocab_fill(vocab, spec, err));
    vocab->space_prefix = spec->space_prefix;
    vocab->trims_spaces = spec->trims_spaces;
    if (is_scored) ki_vocab_index_hex(vocab);
    else index_bytes(vocab);
    KI_TRY(is_scored ? ki_scored_index(vocab, spec->scores, err) : index_merges(vocab, spec, err));
    return index_specials(vocab, err);
}

kivi_status ki_vocab_create(ki_vocab **out, ki_mem *mem, const ki_vocab_spec *spec,
                            kivi_error *err) {
    *out = NULL;
    KI_TRY(check_spec(spec, err));
    void *block;
    KI_TRY(ki_alloc(&block, mem, KI_TAG_other, sizeof(ki_vocab), err));
    ki_vocab *vocab = block;
    vocab->mem = mem;
    vocab->n_tokens = spec->n_tokens;
    vocab->bos_id = spec->add_bos ? (int32_t)spec->bos_id : -1;
    vocab->eos_id = spec->add_eos ? (int32_t)spec->eos_id : -1;
    kivi_status status = fill(vocab, spec, err);
    if (status != KIVI_OK) ki_vocab_destroy(&vocab);
    *out = vocab;
    return status;
}

void ki_vocab_destroy(ki_vocab **vocab) {
    if (!*vocab) return;
    ki_mem *mem = (*vocab)->mem;
    ki_pipeline_destroy(*vocab);
    ki_pre_deinit(&(*vocab)->pre);
    ki_pairs_deinit(&(*vocab)->pairs, mem);
    ki_joints_deinit(&(*vocab)->joints, mem);
    ki_free(mem, (*vocab)->specials.items);
    ki_free(mem, (*vocab)->slots);
    ki_free(mem, (*vocab)->types);
    ki_free(mem, (*vocab)->text);
    ki_free(mem, (*vocab)->offsets);
    ki_free(mem, *vocab);
    *vocab = NULL;
}

size_t ki_vocab_size(const ki_vocab *vocab) { return vocab->n_tokens; }

static bool id_known(const ki_vocab *vocab, int32_t id) {
    return id >= 0 && (size_t)id < vocab->n_tokens;
}

bool ki_vocab_is_control(const ki_vocab *vocab, int32_t id) {
    return id_known(vocab, id) && is_control(vocab, (size_t)id);
}

/* The text of a scored token: U+2581 is a space, a byte token its byte. */
static size_t read_scored(char *out, size_t max_bytes, ki_span text, bool is_byte) {
    size_t n_out = 0;
    char byte;
    if (is_byte && ki_hex_read(&byte, text)) {
        if (max_bytes) out[0] = byte;
        return 1;
    }
    for (size_t at = 0; at < text.n_bytes; n_out++) {
        bool is_space = text.n_bytes - at >= 3 && !memcmp(text.bytes + at, "\xe2\x96\x81", 3);
        if (n_out < max_bytes) out[n_out] = is_space ? ' ' : text.bytes[at];
        at += is_space ? 3 : 1;
    }
    return n_out;
}

static size_t copy(char *out, size_t max_bytes, ki_span text) {
    size_t n = KI_MIN(text.n_bytes, max_bytes);
    if (n) memcpy(out, text.bytes, n);
    return text.n_bytes;
}

size_t ki_vocab_bytes(const ki_vocab *vocab, int32_t id, char *out, size_t max_bytes) {
    if (!id_known(vocab, id)) return 0;
    ki_span text = ki_vocab_text(vocab, (size_t)id);
    bool is_byte = vocab->types[id] == KI_TOKEN_BYTE;
    size_t n_bytes;
    if (vocab->kind == KI_VOCAB_PIPELINE)
        n_bytes = copy(out, max_bytes, ki_pipeline_text(vocab, (size_t)id));
    else if (is_special(vocab, (size_t)id)) n_bytes = copy(out, max_bytes, text);
    else if (vocab->kind == KI_VOCAB_SCORED) n_bytes = read_scored(out, max_bytes, text, is_byte);
    else n_bytes = ki_alphabet_read(out, max_bytes, text);
    return max_bytes ? KI_MIN(n_bytes, max_bytes) : n_bytes;
}
