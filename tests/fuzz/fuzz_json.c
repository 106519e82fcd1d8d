/* fuzz_json.c: a hostile tokenizer.json and a hostile text behind its first zero byte. Whatever is
 * accepted must encode to ids that are there, and give all memory back. */
#include "pipeline.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum { MAX_IDS = 1 << 16 };

static void require(bool holds) {
    if (!holds) abort();
}

static void check_encode(const ki_vocab *vocab, const char *text, size_t n_bytes) {
    static int32_t ids[MAX_IDS];
    for (unsigned flags = 0; flags < 4; flags++) {
        size_t n = 0;
        char bytes[64];
        if (ki_vocab_encode(vocab, text, n_bytes, flags, ids, MAX_IDS, &n, NULL)) continue;
        for (size_t i = 0; i < n; i++) {
            require(ids[i] >= 0 && (size_t)ids[i] < ki_vocab_size(vocab));
            require(ki_vocab_bytes(vocab, ids[i], bytes, sizeof bytes) <= sizeof bytes);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    const char *text = (const char *)data, *zero = n_bytes ? memchr(text, 0, n_bytes) : NULL;
    size_t n_json = zero ? (size_t)(zero - text) : n_bytes, rest = zero ? n_json + 1 : n_bytes;
    ki_mem mem;
    ki_vocab *vocab;
    ki_mem_init(&mem);
    if (ki_vocab_create_json(&vocab, &mem, text, n_json, NULL) == KIVI_OK) {
        pcre2_set_match_limit(vocab->pipeline->limits, 100000); /* slow patterns are no finding */
        check_encode(vocab, text + rest, n_bytes - rest);
    }
    ki_vocab_destroy(&vocab);
    require(atomic_load(&mem.n_blocks) == 0);
    return 0;
}
