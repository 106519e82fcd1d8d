/* token.h: text to token ids and back. A vocabulary is made from plain arrays, so that this folder
 * does not know GGUF. Byte-level BPE ("gpt2"): text is cut into words by regular expressions, a
 * word's bytes are tokens, and neighbours are merged, lowest rank first. Scored ("llama"): no
 * words, characters are merged, the best score first; one without a token becomes its bytes.
 * tokenizer.json: a pipeline of the file's own making.
 *
 * A vocabulary never changes after its creation; any number of threads may encode with it, as long
 * as its ki_mem outlives it. Text is bytes: malformed UTF-8 is encoded byte for byte, never
 * replaced. */
#ifndef KI_TOKEN_H
#define KI_TOKEN_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes lent by their owner; not terminated, may hold zeros. */
typedef struct ki_span {
    const char *bytes;
    size_t n_bytes;
} ki_span;

/* token_type of GGUF; zero never occurs there and counts as normal. */
typedef enum ki_token_type {
    KI_TOKEN_NORMAL = 1,
    KI_TOKEN_UNKNOWN = 2, /* treated as control */
    KI_TOKEN_CONTROL = 3, /* recognised in text only with KIVI_TEXT_SPECIAL */
    KI_TOKEN_USER = 4,    /* recognised in any text */
    KI_TOKEN_UNUSED = 5,
    KI_TOKEN_BYTE = 6
} ki_token_type;

typedef struct ki_vocab_spec {
    const char *model;     /* "gpt2" or "llama" */
    const char *pre;       /* a name of ki_vocab_pre_names, such as "smollm" */
    const ki_span *tokens; /* [n_tokens]; normal ones in GPT-2's visible alphabet, "\u0120the" */
    size_t n_tokens;       /* at most INT32_MAX */
    const int32_t *types;  /* [n_tokens] ki_token_type; NULL: all normal */
    const ki_span *merges; /* [n_merges] "left right", the earliest is merged first */
    size_t n_merges;
    const float *scores;    /* [n_tokens], "llama" only */
    bool space_prefix;      /* "llama": text begins with a space of our own */
    bool trims_spaces;      /* "llama": spaces at the ends go, and all but one of a run */
    int64_t bos_id, eos_id; /* -1: none */
    int64_t unk_id;         /* checked, never produced: see ki_vocab_encode */
    bool add_bos, add_eos;  /* what KIVI_TEXT_ADD_BOS adds in front and behind */
} ki_vocab_spec;

typedef struct ki_vocab ki_vocab;

/* Copies all it needs; *out is owned by the caller, NULL on failure. Of tokens with the same text
 * the lowest id counts. ARG: a NULL where there must be none. UNSUPPORTED: a model or pre-tokenizer
 * that is not known, with the known ones listed. FORMAT: an id or type outside its range, add_bos
 * without a BOS (EOS alike), a merge without two parts, or with a part or result that is no token,
 * or a control token as result; the text names the index. */
kivi_status ki_vocab_create(ki_vocab **out, ki_mem *mem, const ki_vocab_spec *spec,
                            kivi_error *err);
/* A tokenizer.json (Hugging Face). UNSUPPORTED names the part that is not known. */
kivi_status ki_vocab_create_json(ki_vocab **out, ki_mem *mem, const char *text, size_t n_bytes,
                                 kivi_error *err);
/* What tokenizer_config.json says of such a vocabulary goes before its post-processor: ids of -1
 * are none, add of -1 says nothing. Before the vocabulary is used. */
void ki_vocab_set_ends(ki_vocab *vocab, int64_t bos_id, int add_bos, int64_t eos_id, int add_eos);
/* Whether KIVI_TEXT_ADD_BOS adds something in front. */
bool ki_vocab_has_front(const ki_vocab *vocab);
/* Destroys and nulls; NULL allowed. */
void ki_vocab_destroy(ki_vocab **vocab);
/* What holds for files that do not say whether a BOS is added. */
bool ki_vocab_adds_bos(const char *model, const char *pre);
/* Names of the known pre-tokenizers, comma-separated; static. */
const char *ki_vocab_pre_names(void);

/* Bytes to ids. flags: KIVI_TEXT_ADD_BOS and KIVI_TEXT_SPECIAL. *n_out is the number needed; when
 * it exceeds max_ids nothing is written and ARG is returned (max_ids 0 asks for the number).
 * Special tokens: the leftmost in the text, there the longest. A byte that has no token is left out
 * as llama.cpp does, not replaced by unk_id: that is a control token in many vocabularies, and
 * a user's words must not produce one. ARG: text over 1 GiB, or beyond the limits of matching.
 * NOMEM: scratch (up to 48 bytes a text byte, freed before the return). */
kivi_status ki_vocab_encode(const ki_vocab *vocab, const char *text, size_t n_bytes, unsigned flags,
                            int32_t *ids, size_t max_ids, size_t *n_out, kivi_error *err);
/* The same for a text in parts: it is encoded as if written in one piece, but control tokens are
 * recognised only where they lie within parts that allow it. KIVI_TEXT_SPECIAL has no meaning. */
typedef struct ki_text_part {
    ki_span text;
    bool with_control;
} ki_text_part;
kivi_status ki_vocab_encode_parts(const ki_vocab *vocab, const ki_text_part *parts, size_t n_parts,
                                  unsigned flags, int32_t *ids, size_t max_ids, size_t *n_out,
                                  kivi_error *err);
/* Raw bytes of a token, at most max_bytes; returns their number, 0 for an id outside the range.
 * Control and user tokens come as spelled. max_bytes 0: the number that would be written. */
size_t ki_vocab_bytes(const ki_vocab *vocab, int32_t id, char *out, size_t max_bytes);
bool ki_vocab_is_control(const ki_vocab *vocab, int32_t id); /* false outside the range */
size_t ki_vocab_size(const ki_vocab *vocab);                 /* tokens */
/* The id of a token spelled as in the vocabulary ("\u0120the", "<|im_end|>"); -1: none. */
int32_t ki_vocab_find(const ki_vocab *vocab, ki_span text);

#ifdef __cplusplus
}
#endif
#endif
