/* words.h: a tokenizer.json as the tables that a GGUF file has for a vocabulary. */
#ifndef KI_TOKEN_EXPORT_H
#define KI_TOKEN_EXPORT_H
#include "token.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ki_vocab_export {
    ki_vocab_spec spec; /* model and pre are static, the rest is lent for the export's life; ids of
                         * BOS and EOS and what is added are those of the vocabulary's own ends */
    bool drops_nfc;     /* texts are not brought to NFC any more */
    bool adds_more_spaces; /* a space is put in front of a text that begins with one, and behind
                            * control tokens, where the tokenizer.json has none */
    bool joins_spelled;    /* U+2581 in a text is a space; it was an added token's spelling, too */
    struct ki_vocab_made *made;
} ki_vocab_export;

/* vocab: made of that same tokenizer.json (ki_vocab_create_json), and outlives the export. bos_id
 * and eos_id: -1 for none. Tokens are filled up to n_rows. The tables are tried out: every token's
 * text and a list of others must get the same ids from them as from the vocabulary, or they are
 * refused. UNSUPPORTED names what GGUF has no word for. */
kivi_status ki_vocab_export_init(ki_vocab_export *out, ki_mem *mem, const ki_vocab *vocab,
                                 const char *json, size_t n_bytes, int64_t bos_id, int64_t eos_id,
                                 size_t n_rows, kivi_error *err);
void ki_vocab_export_deinit(ki_vocab_export *out);

#ifdef __cplusplus
}
#endif
#endif
