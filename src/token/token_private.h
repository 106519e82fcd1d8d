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

/* ---- alphabet.c: GPT-2 spells each byte as one visible character, U+0021 to U+0143 ---- */

uint32_t ki_alphabet_write(unsigned char out[2], unsigned char byte); /* returns 1 or 2 */
/* The text in the alphabet back to bytes, at most max_bytes; anything else stays as it is. Returns
 * the bytes of the whole, which may exceed max_bytes. out may be NULL when max_bytes is 0. */
size_t ki_alphabet_read(char *out, size_t max_bytes, ki_span text);

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
    size_t mask;
} ki_pairs;

kivi_status ki_pairs_init(ki_pairs *pairs, ki_mem *mem, size_t n_merges, kivi_error *err);
void ki_pairs_deinit(ki_pairs *pairs, ki_mem *mem);
/* The first of equal pairs stays. At most n_merges calls. */
void ki_pairs_add(ki_pairs *pairs, int32_t left, int32_t right, uint32_t rank, int32_t merged);

/* Merges ids [*n_ids] in place until no pair is left; ids of -1 (bytes without a token) never
 * merge. Long words need scratch: NOMEM. */
kivi_status ki_merge(const ki_pairs *pairs, ki_mem *mem, int32_t *ids, size_t *n_ids,
                     kivi_error *err);

/* ---- vocab.c ---- */

typedef struct ki_special {
    ki_span text; /* lent by the vocabulary */
    int32_t id;
    bool is_control;
} ki_special;

struct ki_vocab {
    ki_mem *mem;
    size_t n_tokens;
    char *text;         /* all tokens, one after the other */
    size_t *offsets;    /* [n_tokens + 1] into text */
    uint8_t *types;     /* [n_tokens] ki_token_type */
    uint32_t *slots;    /* [slot_mask + 1] id + 1 by text, 0 free; a power of two, never full */
    size_t slot_mask;
    int32_t bytes[256]; /* id of each byte, -1 none */
    ki_pairs pairs;
    ki_pre pre;
    ki_special *specials;      /* [n_specials] by first byte, there the longest first */
    size_t n_specials;
    uint32_t first_special[257]; /* specials that start with byte b: from [b] to before [b + 1] */
    int32_t bos_id, eos_id;      /* -1: none is added */
};

#endif
