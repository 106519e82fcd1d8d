#include "token_private.h"

/* The second byte carries what the lead byte cannot say: no overlong forms (E0, F0), no surrogates
 * (ED), nothing above U+10FFFF (F4). All later bytes are 80 to BF. */
static bool second_fits(unsigned char lead, unsigned char byte) {
    unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    return byte >= low && byte <= high;
}

static uint32_t need_from_lead(unsigned char lead) {
    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return 0; /* C0 and C1 could only be overlong */
    return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

uint32_t ki_utf8_need(const unsigned char *bytes, size_t n_bytes) {
    uint32_t need = need_from_lead(bytes[0]);
    if (need > 1 && n_bytes > 1 && !second_fits(bytes[0], bytes[1])) return 0;
    for (size_t i = 2; i < need && i < n_bytes; i++)
        if ((bytes[i] & 0xc0) != 0x80) return 0;
    return need;
}

uint32_t ki_next_character(ki_span text, size_t *at) {
    const unsigned char *s = (const unsigned char *)text.bytes + *at;
    size_t left = text.n_bytes - *at;
    uint32_t need = ki_utf8_need(s, left), c;
    if (!need || need > left) {
        (*at)++;
        return (uint32_t)KI_MALFORMED + s[0];
    }
    *at += need;
    if (need == 1) return s[0];
    c = s[0] & (0xffu >> (need + 1));
    for (uint32_t i = 1; i < need; i++) c = c << 6 | (s[i] & 63);
    return c;
}

size_t ki_character_write(char out[4], uint32_t c) {
    if (c >= KI_MALFORMED) {
        out[0] = (char)(c - KI_MALFORMED);
        return 1;
    }
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    uint32_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (uint32_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 63));
    out[0] = (char)((0xf00u >> n & 0xf0) | c);
    return n;
}

static size_t put(char *out, const void *bytes, size_t n_bytes) {
    memcpy(out, bytes, n_bytes);
    return n_bytes;
}

static size_t put_replacement(char *out) { return put(out, "\xef\xbf\xbd", 3); }

/* WHATWG's practice: the longest run that could have begun a character becomes one U+FFFD, and the
 * byte that broke it starts anew. pending always is such a run. */
static size_t push_byte(kivi_utf8 *state, unsigned char byte, char *out) {
    size_t n_out = 0;
    state->pending[state->n_pending] = byte;
    uint32_t need = ki_utf8_need(state->pending, state->n_pending + 1);
    if (!need && state->n_pending) {
        n_out = put_replacement(out);
        state->pending[0] = byte;
        state->n_pending = 0;
        need = ki_utf8_need(state->pending, 1);
    }
    if (!need) return n_out + put_replacement(out + n_out);
    state->n_pending++;
    if (state->n_pending < need) return n_out;
    state->n_pending = 0;
    return n_out + put(out + n_out, state->pending, need);
}

size_t kivi_utf8_push(kivi_utf8 *state, const char *bytes, size_t n_bytes, char *out) {
    /* A state that was not zeroed must not turn into a write past pending. */
    if (state->n_pending > 3) state->n_pending = 0;
    if (n_bytes == 0) {
        size_t n_out = state->n_pending ? put_replacement(out) : 0;
        state->n_pending = 0;
        return n_out;
    }
    size_t n_out = 0;
    for (size_t i = 0; i < n_bytes; i++)
        n_out += push_byte(state, (unsigned char)bytes[i], out + n_out);
    return n_out;
}
