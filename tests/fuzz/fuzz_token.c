/* fuzz_token.c: a hostile vocabulary and a hostile text. The first byte picks the flags, the
 * pre-tokenizer, and (its highest bit) whether the vocabulary is scored; then come records (kind,
 * length, bytes) that add tokens and merges to the 256 byte tokens; what is left is the text. Where
 * no special token hides in a text for "gpt2" its bytes must come back; UTF-8 must come out the
 * same in one piece and byte by byte. */
#include "token_private.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum { MAX_TOKENS = 320, MAX_MERGES = 64 };

typedef struct input {
    const char *bytes;
    size_t n_bytes;
} input;

static void require(bool holds) {
    if (!holds) abort();
}

static uint8_t next_byte(input *in) {
    if (!in->n_bytes) return 0;
    in->n_bytes--;
    return (uint8_t)*in->bytes++;
}

static ki_span next_span(input *in, size_t most) {
    size_t wanted = next_byte(in), n = KI_MIN(KI_MIN(wanted, most), in->n_bytes);
    ki_span s = {in->bytes, n};
    in->bytes += n;
    in->n_bytes -= n;
    return s;
}

/* Kinds 0 to 6 are token types (7 is a wrong one), 8 to 11 merges; anything else ends the list. */
static void read_vocabulary(input *in, ki_vocab_spec *spec, ki_span *tokens, int32_t *types,
                            ki_span *merges) {
    for (;;) {
        uint8_t kind = next_byte(in);
        if (kind < 8 && spec->n_tokens < MAX_TOKENS) {
            types[spec->n_tokens] = kind;
            tokens[spec->n_tokens++] = next_span(in, 40);
        } else if (kind >= 8 && kind < 12 && spec->n_merges < MAX_MERGES) {
            merges[spec->n_merges++] = next_span(in, 40);
        } else {
            return;
        }
        if (!in->n_bytes) return;
    }
}

/* A special token stands for its own spelling; merges can lead to one that is spelled in the
 * alphabet, and then its bytes are not those of the text. */
static bool has_special(const ki_vocab *vocab, const int32_t *ids, size_t n_ids) {
    for (size_t i = 0; i < n_ids; i++)
        if (vocab->types[ids[i]] >= KI_TOKEN_UNKNOWN && vocab->types[ids[i]] <= KI_TOKEN_USER)
            return true;
    return false;
}

static void check_round_trip(const ki_vocab *vocab, input text, const int32_t *ids, size_t n_ids) {
    char *back = malloc(text.n_bytes + 64);
    size_t at = 0;
    for (size_t i = 0; i < n_ids; i++) {
        require(ids[i] >= 0 && (size_t)ids[i] < ki_vocab_size(vocab));
        at += ki_vocab_bytes(vocab, ids[i], back + at, text.n_bytes + 64 - at);
        require(at <= text.n_bytes);
    }
    require(at == text.n_bytes && (!at || !memcmp(back, text.bytes, at)));
    free(back);
}

static void check_encode(const ki_vocab *vocab, input text, unsigned flags) {
    size_t room = 8 * text.n_bytes + 16, n = 0, n_again = 0;
    int32_t *ids = malloc(room * sizeof *ids);
    kivi_status status =
        ki_vocab_encode(vocab, text.bytes, text.n_bytes, flags, ids, room, &n, NULL);
    require(status == KIVI_OK && n <= room);
    status = ki_vocab_encode(vocab, text.bytes, text.n_bytes, flags, NULL, 0, &n_again, NULL);
    require(n_again == n && (status == KIVI_OK) == (n == 0));
    bool is_plain = vocab->kind == KI_VOCAB_BYTES && !(flags & KIVI_TEXT_ADD_BOS) &&
                    !has_special(vocab, ids, n);
    if (is_plain) check_round_trip(vocab, text, ids, n);
    free(ids);
}

static void check_utf8(input text) {
    char *whole = malloc(3 * (text.n_bytes + 4)), *pieces = malloc(3 * (text.n_bytes + 4));
    kivi_utf8 a = {0}, b = {0};
    size_t n_whole = text.n_bytes ? kivi_utf8_push(&a, text.bytes, text.n_bytes, whole) : 0;
    size_t n_pieces = 0;
    n_whole += kivi_utf8_push(&a, NULL, 0, whole + n_whole);
    for (size_t i = 0; i < text.n_bytes; i++)
        n_pieces += kivi_utf8_push(&b, text.bytes + i, 1, pieces + n_pieces);
    n_pieces += kivi_utf8_push(&b, NULL, 0, pieces + n_pieces);
    require(n_whole == n_pieces && !memcmp(whole, pieces, n_whole));
    free(whole);
    free(pieces);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    static const char *const pres[] = {"smollm", "gpt-2", "falcon", "default", "llama-bpe",
                                       "qwen2",  "nope"};
    static ki_span tokens[MAX_TOKENS], merges[MAX_MERGES];
    static int32_t types[MAX_TOKENS];
    static unsigned char spelled[256][2];
    input in = {(const char *)data, n_bytes};
    uint8_t first = next_byte(&in);
    for (unsigned byte = 0; byte < 256; byte++) {
        uint32_t n = ki_alphabet_write(spelled[byte], (unsigned char)byte);
        tokens[byte] = (ki_span){(const char *)spelled[byte], n};
        types[byte] = KI_TOKEN_NORMAL;
    }
    ki_vocab_spec spec = {.model = "gpt2", .pre = pres[(first >> 2) % 7], .tokens = tokens,
                          .n_tokens = 256, .types = types, .merges = merges, .bos_id = first % 3,
                          .eos_id = -1, .unk_id = -1, .add_bos = true};
    static float scores[MAX_TOKENS];
    bool is_scored = first & 128;
    for (size_t i = 0; i < MAX_TOKENS; i++) scores[i] = (float)(i * 7 % 11);
    if (is_scored) spec.model = "llama";
    spec.scores = scores;
    spec.space_prefix = first & 64;
    spec.trims_spaces = first & 32;
    read_vocabulary(&in, &spec, tokens, types, merges);
    ki_mem mem;
    ki_vocab *vocab;
    ki_mem_init(&mem);
    if (ki_vocab_create(&vocab, &mem, &spec, NULL) == KIVI_OK) check_encode(vocab, in, first & 3);
    ki_vocab_destroy(&vocab);
    require(atomic_load(&mem.n_blocks) == 0);
    check_utf8(in);
    return 0;
}
