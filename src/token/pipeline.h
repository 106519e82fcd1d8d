/* pipeline.h: tokenizer.json from the inside. A text goes through four rooms:
 *
 *     special tokens -> normalizers -> special tokens of normalized text -> cuts -> model
 *     (encode.c)        normalize.c    (encode.c again)                     cut.c   pipeline.c
 *
 * json_load.c fills the rooms from the file; what it does not know it refuses by name. */
#ifndef KI_PIPELINE_H
#define KI_PIPELINE_H
#include "token_private.h"

enum { KI_MAX_ROOM = 16 }; /* normalizers, cuts or decoders of one file */

typedef enum ki_norm_kind {
    KI_NORM_PREPEND,
    KI_NORM_REPLACE,
    KI_NORM_NFC,
    KI_NORM_NFD,
    KI_NORM_NFKC,
    KI_NORM_NFKD,
    KI_NORM_LOWERCASE,
    KI_NORM_STRIP,
    KI_NORM_STRIP_ACCENTS,
    KI_NORM_ALPHABET
} ki_norm_kind;

typedef struct ki_norm {
    ki_norm_kind kind;
    pcre2_code *pattern; /* REPLACE */
    ki_span content;     /* PREPEND, REPLACE; owned */
    bool left, right;    /* STRIP */
} ki_norm;

typedef enum ki_behavior {
    KI_CUT_ISOLATED,
    KI_CUT_REMOVED,
    KI_CUT_CONTIGUOUS,
    KI_CUT_WITH_PREVIOUS,
    KI_CUT_WITH_NEXT
} ki_behavior;

typedef enum ki_cut_kind {
    KI_CUT_SPLIT,
    KI_CUT_SPACE_BEFORE,
    KI_CUT_METASPACE,
    KI_CUT_ALPHABET
} ki_cut_kind;
typedef enum ki_scheme { KI_PREPEND_ALWAYS, KI_PREPEND_FIRST, KI_PREPEND_NEVER } ki_scheme;

typedef struct ki_cut {
    ki_cut_kind kind;
    pcre2_code *pattern; /* SPLIT */
    ki_behavior behavior;
    bool inverted;
    ki_span content; /* METASPACE: what a space becomes; owned */
    ki_scheme scheme;
} ki_cut;

typedef enum ki_decode_kind {
    KI_DECODE_ALPHABET,
    KI_DECODE_REPLACE,
    KI_DECODE_BYTES /* "<0x0A>" */
} ki_decode_kind;

typedef struct ki_decode {
    ki_decode_kind kind;
    ki_span pattern, content; /* REPLACE; owned */
} ki_decode;

struct ki_pipeline {
    ki_norm norms[KI_MAX_ROOM];
    ki_cut cuts[KI_MAX_ROOM];
    ki_decode decodes[KI_MAX_ROOM];
    size_t n_norms, n_cuts, n_decodes;
    ki_specials normalized; /* added tokens looked for after the normalizers */
    ki_buf normalized_text; /* their spellings */
    uint8_t *in_model;      /* [n_tokens]: of the model's own vocabulary, not only an added token */
    char *plain;            /* what each token stands for */
    size_t *plain_offsets;  /* [n_tokens + 1] */
    int32_t front[KI_MAX_ROOM], back[KI_MAX_ROOM]; /* ids that the post-processor adds */
    size_t n_front, n_back;
    int32_t unk_id; /* -1: a character without a token is left out */
    bool fuses_unk, byte_fallback, whole_words, is_byte_level;
    pcre2_general_context *memory;
    pcre2_match_context *limits;
};

/* Scratch of one encoding. */
typedef struct ki_pass {
    pcre2_match_data *match;
    ki_buf norms[2], cuts[KI_MAX_ROOM];
    int32_t ascii[128]; /* symbols */
} ki_pass;

/* ---- regular expressions (regex.c) ---- */

/* A pattern as tokenizer.json has it (Oniguruma's) or a literal text, compiled; err names where. */
kivi_status ki_regex_compile(pcre2_code **out, const ki_pipeline *p, ki_span pattern,
                             bool is_literal, kivi_error *err);
/* The next match in [from, n_bytes) of valid UTF-8, maybe an empty one; *found false: none. */
kivi_status ki_regex_next(size_t *begin, size_t *end, bool *found, const ki_pipeline *p,
                          pcre2_match_data *match, const pcre2_code *code, ki_span text,
                          size_t from, kivi_error *err);
kivi_status ki_regex_init(ki_pipeline *p, ki_mem *mem, kivi_error *err);
void ki_regex_deinit(ki_pipeline *p);
/* The patterns behind named pre-tokenizers. */
extern const char *const ki_regex_gpt2, *const ki_regex_word;

/* ---- normalize.c ---- */

/* Valid UTF-8 through all normalizers; *out is text itself or lent by run. */
kivi_status ki_normalize(ki_span *out, const ki_pipeline *p, ki_pass *run, ki_span text,
                         kivi_error *err);
/* Rust's and Unicode's White_Space. */
bool ki_is_space(uint32_t character);
/* White space directly before `at` begins, directly behind it ends. */
size_t ki_space_before(ki_span text, size_t at);
size_t ki_space_after(ki_span text, size_t at);
/* No word character on either side of [begin, end). */
bool ki_stands_alone(ki_span text, size_t begin, size_t end);
kivi_status ki_write_alphabet(ki_buf *out, ki_span text, kivi_error *err);

/* ---- cut.c ---- */

/* Cuts normalized text into words and gives each to the model. */
kivi_status ki_cut_text(ki_encoder *e, ki_span text, bool is_first, kivi_error *err);

/* ---- pipeline.c ---- */

kivi_status ki_pipeline_begin(ki_encoder *e, kivi_error *err);
void ki_pipeline_end(ki_encoder *e);
kivi_status ki_pipeline_encode(ki_encoder *e, ki_span text, bool is_first, kivi_error *err);
kivi_status ki_pipeline_ends(ki_encoder *e, bool is_front, kivi_error *err);
kivi_status ki_pipeline_word(ki_encoder *e, ki_span word, kivi_error *err);
/* Merges of (left, right) texts, the earliest first. */
kivi_status ki_pipeline_add_merge(ki_vocab *vocab, size_t index, ki_span left, ki_span right,
                                  kivi_error *err);
/* What a token stands for. */
ki_span ki_pipeline_text(const ki_vocab *vocab, size_t id);
kivi_status ki_pipeline_decode_all(ki_vocab *vocab, kivi_error *err);
void ki_pipeline_destroy(ki_vocab *vocab);

#endif
