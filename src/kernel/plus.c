#include "plus.h"

#include <math.h>

const float ki_plus_key_steps[KI_PLUS_KEY_STEPS] = {1, .93f, .86f, .79f, .72f};
const float ki_plus_value_steps[16] = {1,    .95f, .90f, .85f, .80f, .75f, .70f, .65f,
                                       .60f, .55f, .50f, .45f, .40f, .35f, 1,    1};

/* ---- the definition ---- */

/* The smallest float16 >= a, for a >= 0: the next bit pattern is the next number. */
static uint16_t f16_up(float a) {
    uint16_t h = ki_f32_to_f16(a);
    return ki_f16_to_f32(h) < a ? (uint16_t)(h + 1) : h;
}

/* The largest float16 <= a: from 0 the next below is the smallest negative one, from there on the
 * patterns grow downwards. */
static uint16_t f16_down(float a) {
    uint16_t h = ki_f32_to_f16(a + 0.0f);
    if (!(ki_f16_to_f32(h) > a)) return h;
    return (h & 0x7fff) == 0 ? 0x8001 : (uint16_t)(h & 0x8000 ? h + 1 : h - 1);
}

static float clamped(float q, float levels) { return q > 0 ? q < levels ? q : levels : 0; }

static float key_code(float x, float scale, float zero, float levels) {
    return scale == 0 ? 0 : clamped(rintf((x - zero) / scale), levels);
}

static float key_at(const uint16_t *const *blocks, unsigned token, unsigned channel) {
    return ki_f16_to_f32(blocks[token / KI_LANES][channel * KI_LANES + token % KI_LANES]);
}

/* Tokens [from, to) of one channel. */
typedef struct key_run {
    const uint16_t *const *blocks;
    unsigned channel, from, to;
} key_run;

static float squared_error(const key_run *k, float scale, float zero) {
    float sum = 0;
    for (unsigned t = k->from; t < k->to; t++) {
        float x = key_at(k->blocks, t, k->channel);
        float value = key_code(x, scale, zero, 3) * scale + zero, d = x - value;
        sum += d * d;
    }
    return sum;
}

typedef struct key_range {
    float min, max; /* -0 is +0 here */
} key_range;

static key_range range_of(const key_run *k) {
    float first = key_at(k->blocks, k->from, k->channel);
    key_range r = {first, first};
    for (unsigned t = k->from + 1; t < k->to; t++) {
        float x = key_at(k->blocks, t, k->channel);
        r.min = x < r.min ? x : r.min;
        r.max = x > r.max ? x : r.max;
    }
    r.min += 0.0f;
    r.max += 0.0f;
    return r;
}

static void four_bits(uint16_t *scale, uint16_t *zero, const key_run *k) {
    key_range r = range_of(k);
    *zero = ki_f32_to_f16(r.min);
    *scale = f16_up((r.max - r.min) / 15);
}

static void two_bits(uint16_t *scale, uint16_t *zero, const key_run *k, unsigned n_steps) {
    key_range r = range_of(k);
    float mid = (r.min + r.max) / 2, least = 0;
    for (unsigned i = 0; i < n_steps; i++) {
        float a = ki_plus_key_steps[i], lo = mid + (r.min - mid) * a, hi = mid + (r.max - mid) * a;
        uint16_t z = f16_down(lo), s = f16_up((hi - ki_f16_to_f32(z)) / 3);
        float e = squared_error(k, ki_f16_to_f32(s), ki_f16_to_f32(z));
        if (i > 0 && !(e < least)) continue;
        least = e;
        *scale = s;
        *zero = z;
    }
}

/* One channel's group of tokens, the first `first`; sinks among them get the code of k->from. */
static void close_group(const ki_plus_keys *out, const key_run *k, unsigned first,
                        unsigned head_dim, bool is_wide, unsigned n_steps) {
    size_t at = (size_t)(first / ki_plus_key_group(out)) * head_dim + k->channel;
    uint16_t *scale = out->scale + at, *zero = out->zero + at;
    *scale = *zero = 0;
    if (k->from >= k->to) return;
    bool is_four = out->bits == 4 || is_wide;
    if (is_four) four_bits(scale, zero, k);
    else two_bits(scale, zero, k, n_steps);
    for (unsigned t = first; t < k->to; t++) {
        float x = key_at(k->blocks, KI_MAX(t, k->from), k->channel);
        float code = key_code(x, ki_f16_to_f32(*scale), ki_f16_to_f32(*zero), is_four ? 15 : 3);
        ki_plus_put_key_code(out, t, k->channel, head_dim, (unsigned)code);
    }
}

void ki_plus_close_keys_scalar(const ki_plus_keys *out, const uint16_t *const *blocks,
                               unsigned n_sinks, unsigned head_dim, unsigned n_steps) {
    const unsigned group = ki_plus_key_group(out);
    float spread[256];
    bool wide[256] = {false};
    memset(out->low, 0, (size_t)KI_PAGE_TOKENS * head_dim * out->bits / 8);
    for (unsigned c = 0; c < head_dim; c++) {
        key_range r = range_of(&(key_run){blocks, c, n_sinks, KI_PAGE_TOKENS});
        spread[c] = r.max - r.min;
    }
    if (out->list) {
        memset(out->wide, 0, (size_t)KI_PAGE_TOKENS * head_dim / 16);
        ki_plus_choose(out->list, spread, head_dim);
        for (unsigned w = 0; w < head_dim / 4; w++) wide[out->list[w]] = true;
    }
    for (unsigned first = 0; first < KI_PAGE_TOKENS; first += group)
        for (unsigned c = 0; c < head_dim; c++) {
            key_run run = {blocks, c, KI_MAX(first, n_sinks), first + group};
            close_group(out, &run, first, head_dim, wide[c], n_steps);
        }
}

static float value_code(float x, float scale, float half) {
    return scale == 0 ? 0 : clamped(rintf(x / scale + half), 2 * half);
}

static uint16_t value_scale(const uint16_t *x, unsigned group, float half, unsigned n_steps) {
    float max = 0, least = 0;
    uint16_t best = 0;
    for (unsigned i = 0; i < group; i++) {
        float a = fabsf(ki_f16_to_f32(x[i]));
        max = a > max ? a : max;
    }
    for (unsigned k = 0; k < n_steps; k++) {
        uint16_t h = f16_up(max / half * ki_plus_value_steps[k]);
        float scale = ki_f16_to_f32(h), sum = 0;
        for (unsigned i = 0; i < group; i++) {
            float v = ki_f16_to_f32(x[i]), d = v - (value_code(v, scale, half) - half) * scale;
            sum += d * d;
        }
        if (k > 0 && !(sum < least)) continue;
        least = sum;
        best = h;
    }
    return best;
}

void ki_plus_quantize_values_scalar(uint8_t *codes, uint16_t *scale, const uint16_t *x,
                                    unsigned head_dim, unsigned bits, unsigned n_steps) {
    unsigned group = ki_plus_value_group(head_dim);
    float half = bits == 2 ? 1.5f : 3.5f;
    for (unsigned g = 0; g < head_dim / group; g++) {
        scale[g] = value_scale(x + (size_t)g * group, group, half, n_steps);
        for (unsigned i = g * group; i < (g + 1) * group; i++)
            codes[i] = (uint8_t)value_code(ki_f16_to_f32(x[i]), ki_f16_to_f32(scale[g]), half);
    }
}

void ki_plus_turn_scalar(float *x, unsigned head_dim) {
    unsigned block = ki_plus_block(head_dim);
    for (unsigned h = 1; h < block; h *= 2)
        for (unsigned i = 0; i < head_dim; i++)
            if (!(i & h)) {
                float a = x[i], b = x[i + h];
                x[i] = a + b;
                x[i + h] = a - b;
            }
    float factor = (float)(1 / sqrt((double)block));
    for (unsigned i = 0; i < head_dim; i++) x[i] *= factor;
}

/* ---- wide channels ---- */

/* Spreads are not negative, so their bit patterns grow with them, and any pattern at all has a
 * place. Looks for the largest pattern that at least D/4 channels reach, bit by bit; the channels
 * above it are wide, and of those that equal it the first ones. */
void ki_plus_choose(uint8_t *list, const float *spread, unsigned head_dim) {
    uint32_t bits[256], limit = 0;
    unsigned n_wide = head_dim / 4, n_above = 0, n = 0;
    memcpy(bits, spread, head_dim * sizeof *bits);
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        unsigned reach = 0;
        for (unsigned c = 0; c < head_dim; c++) reach += bits[c] >= (limit | bit);
        if (reach >= n_wide) limit |= bit;
    }
    for (unsigned c = 0; c < head_dim; c++) n_above += bits[c] > limit;
    unsigned n_equal = n_wide - n_above;
    for (unsigned c = 0; c < head_dim; c++) {
        bool equal = bits[c] == limit && n_equal;
        if (!equal && !(bits[c] > limit)) continue;
        n_equal -= equal;
        list[n++] = (uint8_t)c;
    }
}

/* ---- planes ---- */

typedef struct place {
    size_t word;
    unsigned bit;
} place;

static place wide_place(unsigned token, unsigned number, unsigned head_dim) {
    unsigned quad = token / KI_LANES * (head_dim / 16) + number / 4;
    return (place){(size_t)(quad / 4) * KI_LANES + token % KI_LANES,
                   8 * (number % 4) + 2 * (quad % 4)};
}

unsigned ki_plus_wide_code(const uint32_t *wide, unsigned token, unsigned number,
                           unsigned head_dim) {
    place p = wide_place(token, number, head_dim);
    return wide[p.word] >> p.bit & 3;
}

/* Number of a wide channel, or D/4 for one that is not. */
static unsigned number_of(const uint8_t *list, unsigned channel, unsigned head_dim) {
    unsigned w = 0;
    while (w < head_dim / 4 && list[w] != channel) w++;
    return w;
}

unsigned ki_plus_key_code(const ki_plus_keys *keys, unsigned token, unsigned channel,
                          unsigned head_dim) {
    if (!keys->list) return ki_key_code(keys->low, token, channel, head_dim, keys->bits);
    unsigned w = number_of(keys->list, channel, head_dim);
    unsigned high = w < head_dim / 4 ? ki_plus_wide_code(keys->wide, token, w, head_dim) : 0;
    return ki_key_code(keys->low, token, channel, head_dim, 2) | high << 2;
}

void ki_plus_put_key_code(const ki_plus_keys *keys, unsigned token, unsigned channel,
                          unsigned head_dim, unsigned code) {
    unsigned bits = keys->bits, n = 32 / bits;
    size_t at =
        ((size_t)(token / KI_LANES) * (head_dim / n) + channel / n) * KI_LANES + token % KI_LANES;
    keys->low[at] |= (code & ((1u << bits) - 1)) << ki_code_bit(channel % n, bits);
    if (!keys->list || code < 4) return;
    place p = wide_place(token, number_of(keys->list, channel, head_dim), head_dim);
    keys->wide[p.word] |= code >> 2 << p.bit;
}

void ki_plus_pack_values(uint32_t *low, uint32_t *third, const uint8_t *codes, unsigned token,
                         unsigned head_dim) {
    uint8_t part[256] = {0};
    for (unsigned c = 0; c < head_dim; c++) part[c] = codes[c] & 3;
    ki_pack_values(low, part, token, head_dim, 2);
    if (!third) return;
    for (unsigned c = 0; c < head_dim; c++) part[c] = codes[c] >> 2;
    ki_pack_values(third, part, token, head_dim, 1);
}

unsigned ki_plus_value_code(const uint32_t *low, const uint32_t *third, unsigned token,
                            unsigned head_dim, unsigned channel) {
    unsigned code = ki_value_code(low, token, channel, head_dim, 2);
    return third ? code | ki_value_code(third, token, channel, head_dim, 1) << 2 : code;
}
