/* The order of codes in a page: round trips, and the words as quant.h draws them. */
#include "check.h"

/* quant.h's drawing of a word, from the top bits down, for 2, 4 and 8 bits. */
static const uint8_t drawn_2[] = {15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0};
static const uint8_t drawn_4[] = {7, 3, 6, 2, 5, 1, 4, 0};
static const uint8_t drawn_8[] = {3, 2, 1, 0};

static uint32_t draw_word(const uint8_t *codes, unsigned bits) {
    const uint8_t *order = bits == 2 ? drawn_2 : bits == 4 ? drawn_4 : drawn_8;
    uint32_t word = 0;
    for (unsigned i = 0; i < 32 / bits; i++) word = word << bits | codes[order[i]];
    return word;
}

/* plain [128][D] */
static void expect_keys(uint32_t *words, const uint8_t *plain, unsigned head_dim, unsigned bits) {
    unsigned n = 32 / bits;
    for (unsigned t = 0; t < 128; t++)
        for (unsigned c = 0; c < head_dim; c += n)
            words[(t / 16 * (head_dim / n) + c / n) * 16 + t % 16] =
                draw_word(plain + t * head_dim + c, bits);
}

static void expect_values(uint32_t *words, const uint8_t *plain, unsigned head_dim, unsigned bits) {
    unsigned n = 32 / bits;
    for (unsigned t = 0; t < 128; t += n)
        for (unsigned c = 0; c < head_dim; c++) {
            uint8_t codes[16];
            for (unsigned i = 0; i < n; i++) codes[i] = plain[(t + i) * head_dim + c];
            words[t / n * head_dim + c] = draw_word(codes, bits);
        }
}

static void pack_page(uint32_t *keys, uint32_t *values, const uint8_t *plain, unsigned head_dim,
                      unsigned bits, unsigned group) {
    static uint8_t turned[128 * 256];
    for (unsigned first = 0; first < 128; first += group) { /* [D][G], as key groups come */
        for (unsigned c = 0; c < head_dim; c++)
            for (unsigned t = 0; t < group; t++)
                turned[c * group + t] = plain[(first + t) * head_dim + c];
        ki_pack_keys(keys, turned, first, group, head_dim, bits);
    }
    for (unsigned t = 0; t < 128; t++)
        ki_pack_values(values, plain + t * head_dim, t, head_dim, bits);
}

static void pack(unsigned head_dim, unsigned bits) {
    if (!check_case("pack/b%u-d%u", bits, head_dim)) return;
    static uint8_t plain[128 * 256];
    size_t n_words = 128 * head_dim * bits / 32;
    uint32_t *want = check_alloc(n_words * 4);
    guard keys = guard_alloc(n_words * 4), values = guard_alloc(n_words * 4);
    uint32_t *k = (uint32_t *)keys.data, *v = (uint32_t *)values.data;
    rng r = check_rng();
    for (unsigned group = 16; group <= 128; group *= 2) {
        memset(k, 0xff, n_words * 4); /* stale codes of an earlier life must go */
        memset(v, 0xff, n_words * 4);
        for (unsigned i = 0; i < 128 * head_dim; i++) plain[i] = (uint8_t)rng_below(&r, 1u << bits);
        pack_page(k, v, plain, head_dim, bits, group);
        for (unsigned t = 0; t < 128; t++)
            for (unsigned c = 0; c < head_dim; c++) {
                unsigned code = plain[t * head_dim + c];
                CHECK(ki_key_code(k, t, c, head_dim, bits) == code, "key %u of token %u", c, t);
                CHECK(ki_value_code(v, t, c, head_dim, bits) == code, "value %u of token %u", c, t);
            }
        expect_keys(want, plain, head_dim, bits);
        CHECK(!memcmp(k, want, n_words * 4), "key words are not as drawn");
        expect_values(want, plain, head_dim, bits);
        CHECK(!memcmp(v, want, n_words * 4), "value words are not as drawn");
    }
    /* one token again: its neighbours in the word stay */
    unsigned t = 1 + rng_below(&r, 126);
    for (unsigned c = 0; c < head_dim; c++)
        plain[t * head_dim + c] = (uint8_t)rng_below(&r, 1u << bits);
    ki_pack_values(v, plain + t * head_dim, t, head_dim, bits);
    expect_values(want, plain, head_dim, bits);
    CHECK(!memcmp(v, want, n_words * 4), "token %u's neighbours changed", t);
    free(want);
    guard_free(&keys), guard_free(&values);
    check_end();
}

void check_pack(void) {
    static const unsigned dims[] = {32, 64, 80, 96, 128, 256};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        for (unsigned bits = 2; bits <= 8; bits *= 2) pack(dims[i], bits);
}
