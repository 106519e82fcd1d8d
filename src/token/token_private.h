/* token_private.h: what the files of src/token share. Nobody outside this folder includes it. */
#ifndef KI_TOKEN_PRIVATE_H
#define KI_TOKEN_PRIVATE_H
#include "token.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* ---- utf8.c ---- */

/* Bytes of the character that starts at bytes[0] (1 to 4), even if fewer are there; 0: what is
 * there cannot begin a character. n_bytes >= 1. Surrogates, overlong forms and what is above
 * U+10FFFF are malformed. */
uint32_t ki_utf8_need(const unsigned char *bytes, size_t n_bytes);

/* The next symbol of text at *at, which moves on: a character, or KI_MALFORMED + a byte. */
uint32_t ki_next_character(ki_span text, size_t *at);
/* Back to 1 to 4 bytes, which are returned. */
size_t ki_character_write(char out[4], uint32_t character);
enum { KI_MALFORMED = 0x110000 };

/* ---- alphabet.c: GPT-2 spells each byte as one visible character, U+0021 to U+0143 ---- */

uint32_t ki_alphabet_write(unsigned char out[2], unsigned char byte); /* returns 1 or 2 */
/* The text in the alphabet back to bytes, at most max_bytes; anything else stays as it is. Returns
 * the bytes of the whole, which may exceed max_bytes. out may be NULL when max_bytes is 0. */
size_t ki_alphabet_read(char *out, size_t max_bytes, ki_span text);

/* "<0x0A>", a byte as the other vocabularies spell it; false: text is something else. */
bool ki_hex_read(char *out, ki_span text);

/* ---- pretoken.c: text to words ---- */

enum { KI_PRE_STAGES = 4 };

typedef struct ki_pre_rule {
    const char *name;
    const char *patterns[KI_PRE_STAGES]; /* each cuts the pieces of the one before; NULL ends */
    bool whole_words;                    /* a word that is a token is taken without merging */
} ki_pre_rule;

typedef struct ki_pre {
    const ki_pre_rule *rule;
    pcre2_general_context *memory; /* PCRE2 allocates through ki_mem: counted, and made to fail */
    pcre2_match_context *limits;
    pcre2_code *stages[KI_PRE_STAGES];
    size_t n_stages;
} ki_pre;

/* On failure the half-built pre must still be given to deinit. */
kivi_status ki_pre_init(ki_pre *pre, ki_mem *mem, const char *name, kivi_error *err);
void ki_pre_deinit(ki_pre *pre);

typedef struct ki_words ki_words;
typedef kivi_status ki_word_fn(ki_words *words, ki_span word, kivi_error *err);
/* One walk over a text; the caller sets emit, and finds itself again from the address. */
struct ki_words {
    const ki_pre *pre;
    pcre2_match_data *match;
    ki_word_fn *emit; /* gets every byte of the text once, in order */
};
kivi_status ki_words_init(ki_words *words, const ki_pre *pre, ki_word_fn *emit, kivi_error *err);
void ki_words_deinit(ki_words *words);
kivi_status ki_words_split(ki_words *words, ki_span text, kivi_error *err);

/* ---- merge.c: the words' bytes to tokens ---- */

typedef struct ki_pair {
    uint64_t key;   /* left id << 32 | right id */
    uint32_t rank;  /* KI_NO_RANK: the slot is free */
    int32_t merged; /* id */
} ki_pair;
#define KI_NO_RANK UINT32_MAX

typedef struct ki_pairs {
    ki_pair *slots; /* [mask + 1], a power of two, never full */
    size_t mask, n_pairs;
} ki_pairs;

kivi_status ki_pairs_init(ki_pairs *pairs, ki_mem *mem, size_t n_merges, kivi_error *err);
void ki_pairs_deinit(ki_pairs *pairs, ki_mem *mem);
/* The first of equal pairs stays. The table grows past n_merges pairs. */
kivi_status ki_pairs_add(ki_pairs *pairs, ki_mem *mem, int32_t left, int32_t right, uint32_t rank,
                         int32_t merged, kivi_error *err);

/* Merges ids [*n_ids] in place until no pair is left; ids of -1 (bytes without a token) never
 * merge. Long words need scratch: NOMEM. */
kivi_status ki_merge(const ki_pairs *pairs, ki_mem *mem, int32_t *ids, size_t *n_ids,
                     kivi_error *err);

/* Which neighbours a merge can ever bring together; false positives only cost time. */
typedef struct ki_joints {
    uint8_t *bits;
} ki_joints;
kivi_status ki_joints_init(ki_joints *joints, ki_mem *mem, kivi_error *err);
void ki_joints_deinit(ki_joints *joints, ki_mem *mem);
/* The last symbol of a merge's left part and the first one of its right part. */
void ki_joints_add(ki_joints *joints, int32_t left, int32_t right);
/* ki_merge on each stretch between symbols that are not joined: the same result. */
kivi_status ki_merge_parts(const ki_pairs *pairs, const ki_joints *joints, ki_mem *mem,
                           int32_t *ids, size_t *n_ids, kivi_error *err);

/* ---- special.c: tokens that are recognised in the text before it is cut ---- */

typedef struct ki_special {
    ki_span text; /* lent by the vocabulary */
    int32_t id;
    bool is_control;
    bool takes_left, takes_right; /* white space beside it belongs to it */
    bool single_word;             /* only where no word character is beside it */
} ki_special;

typedef struct ki_specials {
    ki_special *items; /* [n_items], sorted by bytes */
    size_t n_items;
    uint32_t first[257]; /* items that start with byte b: from [b] to before [b + 1] */
} ki_specials;

/* Sorts items and fills first. */
void ki_specials_sort(ki_specials *specials);
/* The longest one that text begins with; NULL: none. Control tokens count within the first
 * n_control bytes only. */
const ki_special *ki_specials_at(const ki_specials *specials, ki_span text, size_t n_control);

/* ---- vocab.c ---- */

typedef enum ki_vocab_kind {
    KI_VOCAB_BYTES,   /* "gpt2": words by pre, bytes in the visible alphabet */
    KI_VOCAB_SCORED,  /* "llama": characters, the best score is merged first */
    KI_VOCAB_PIPELINE /* tokenizer.json */
} ki_vocab_kind;

typedef struct ki_pipeline ki_pipeline;

/* A character without a token is a negative symbol, so that merges can still build a token of it;
 * what is left of them in the end is spelled in bytes. */
static inline int32_t ki_symbol_of(uint32_t character) { return -(int32_t)character - 1; }
static inline uint32_t ki_symbol_character(int32_t symbol) { return (uint32_t)(-(symbol + 1)); }

struct ki_vocab {
    ki_mem *mem;
    ki_vocab_kind kind;
    size_t n_tokens;
    char *text;      /* all tokens, one after the other */
    size_t *offsets; /* [n_tokens + 1] into text */
    uint8_t *types;  /* [n_tokens] ki_token_type */
    uint32_t *slots; /* [slot_mask + 1] id + 1 by text, 0 free; a power of two, never full */
    size_t slot_mask;
    int32_t bytes[256]; /* id of each byte, -1 none */
    ki_pairs pairs;
    ki_joints joints;                /* not for KI_VOCAB_BYTES: its words are short */
    ki_pre pre;                      /* KI_VOCAB_BYTES */
    bool space_prefix, trims_spaces; /* KI_VOCAB_SCORED */
    ki_pipeline *pipeline;           /* KI_VOCAB_PIPELINE */
    ki_specials specials;
    int32_t bos_id, eos_id; /* -1: none is added */
};

/* One encoding in progress: what all kinds of vocabulary append their ids to. */
typedef struct ki_encoder {
    ki_words words; /* first: a word finds the encoder from it */
    const ki_vocab *vocab;
    ki_buf ids;                /* int32_t */
    const ki_text_part *parts; /* those that the walk has not reached */
    size_t n_parts, part_end;
    bool in_control;     /* the walk is in parts that allow control tokens, up to part_end */
    struct ki_pass *run; /* KI_VOCAB_PIPELINE: its scratch */
} ki_encoder;

typedef kivi_status ki_plain_fn(ki_encoder *e, ki_span text, bool is_first, kivi_error *err);
/* Puts the special tokens in text and gives plain what lies between; is_first: at the text's own
 * beginning. */
kivi_status ki_encoder_split(ki_encoder *e, ki_span text, const ki_specials *specials,
                             bool is_first, ki_plain_fn *plain, kivi_error *err);
kivi_status ki_encoder_put(ki_encoder *e, const int32_t *ids, size_t n_ids, kivi_error *err);
/* Merges the symbols that were put since byte `begin` of ids, and spells what has no token. */
kivi_status ki_encoder_merge(ki_encoder *e, size_t begin, kivi_error *err);

/* ---- scored.c ---- */

/* Pairs and joints from scores [n_tokens]; FORMAT for a score that is not a number. */
kivi_status ki_scored_index(ki_vocab *vocab, const float *scores, kivi_error *err);
/* A stretch of text between special tokens. */
kivi_status ki_scored_encode(ki_encoder *e, ki_span text, kivi_error *err);
/* The symbol of a character: its token, or the negative one. Never a control token. */
int32_t ki_vocab_symbol(const ki_vocab *vocab, uint32_t character);
/* Tokens, types and the index of texts; the rest is the kind's own. */
kivi_status ki_vocab_fill(ki_vocab *vocab, const ki_vocab_spec *spec, kivi_error *err);
void ki_vocab_index_hex(ki_vocab *vocab);
ki_span ki_vocab_text(const ki_vocab *vocab, size_t id);

#endif
