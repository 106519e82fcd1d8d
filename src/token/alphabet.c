/* alphabet.c: GPT-2's visible bytes. Bytes that print in Latin-1 (21-7E, A1-AC, AE-FF) stand for
 * themselves; the 68 others take U+0100, U+0101, ... in their order: 00-20, 7F-A0, AD. */
#include "token_private.h"

enum { HIDDEN_FROM = 256, LOW_HIDDEN = 33, MID_FIRST = 127, MID_HIDDEN = 34, SOFT_HYPHEN = 173 };

static uint32_t to_character(unsigned char byte) {
    if (byte < LOW_HIDDEN) return HIDDEN_FROM + byte;
    if (byte >= MID_FIRST && byte < MID_FIRST + MID_HIDDEN)
        return (uint32_t)(HIDDEN_FROM + LOW_HIDDEN + byte - MID_FIRST);
    return byte == SOFT_HYPHEN ? HIDDEN_FROM + LOW_HIDDEN + MID_HIDDEN : byte;
}

/* The byte that a character stands for; -1: it is not of the alphabet. */
static int from_character(uint32_t character) {
    if (character < HIDDEN_FROM)
        return to_character((unsigned char)character) == character ? (int)character : -1;
    uint32_t index = character - HIDDEN_FROM;
    if (index < LOW_HIDDEN) return (int)index;
    if (index < LOW_HIDDEN + MID_HIDDEN) return (int)(index - LOW_HIDDEN + MID_FIRST);
    return index == LOW_HIDDEN + MID_HIDDEN ? SOFT_HYPHEN : -1;
}

uint32_t ki_alphabet_write(unsigned char out[2], unsigned char byte) {
    uint32_t character = to_character(byte);
    if (character < 0x80) {
        out[0] = (unsigned char)character;
        return 1;
    }
    out[0] = (unsigned char)(0xc0 | character >> 6);
    out[1] = (unsigned char)(0x80 | (character & 63));
    return 2;
}

/* All characters of the alphabet have one or two bytes; others, and malformed ones, are passed on
 * byte by byte, so that a vocabulary with spaces in its tokens still decodes to something. */
static size_t read_character(unsigned char *out, const unsigned char *s, size_t n_bytes) {
    uint32_t need = ki_utf8_need(s, n_bytes);
    bool is_pair = need == 2 && n_bytes > 1;
    int byte = is_pair     ? from_character((uint32_t)(s[0] & 31) << 6 | (s[1] & 63))
               : need == 1 ? from_character(s[0])
                           : -1;
    *out = byte < 0 ? s[0] : (unsigned char)byte;
    return is_pair && byte >= 0 ? 2 : 1;
}

size_t ki_alphabet_read(char *out, size_t max_bytes, ki_span text) {
    size_t n_out = 0;
    for (size_t at = 0; at < text.n_bytes; n_out++) {
        unsigned char byte;
        at += read_character(&byte, (const unsigned char *)text.bytes + at, text.n_bytes - at);
        if (n_out < max_bytes) out[n_out] = (char)byte;
    }
    return n_out;
}

static int hex_value(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool ki_hex_read(char *out, ki_span text) {
    if (text.n_bytes != 6 || memcmp(text.bytes, "<0x", 3) || text.bytes[5] != '>') return false;
    int high = hex_value(text.bytes[3]), low = hex_value(text.bytes[4]);
    if (high < 0 || low < 0) return false;
    *out = (char)(high << 4 | low);
    return true;
}
