/* plus_simd.h: the kernels of plus.h over sixteen lanes. Included once by each isa_<name>.c. */
#include "plus.h"
#include "simd.h"

enum { PLUS_BLOCKS = KI_PAGE_TOKENS / KI_LANES, PLUS_MAX_DIM = 256 };

/* ---- keys ---- */

/* Of a page, then of each of its groups: the blocks of n_tokens tokens, of which the first n_sinks,
 * fewer, are sinks. */
typedef struct plus_page {
    const uint16_t *const *blocks;
    unsigned n_sinks, n_tokens, head_dim;
    uint8_t list[PLUS_MAX_DIM];
    float min[PLUS_MAX_DIM], max[PLUS_MAX_DIM], spread[PLUS_MAX_DIM];
} plus_page;

/* One channel's keys, sinks replaced by the first other token: so they change no range. */
KI_INLINE void plus_row(uint16_t *row, const plus_page *p, unsigned c) {
    memcpy(row, p->blocks[0] + (size_t)c * KI_LANES, KI_LANES * sizeof *row);
    for (unsigned b = 1; b < p->n_tokens / KI_LANES; b++)
        memcpy(row + b * KI_LANES, p->blocks[b] + (size_t)c * KI_LANES, KI_LANES * sizeof *row);
    for (unsigned t = 0; t < p->n_sinks; t++) row[t] = row[p->n_sinks];
}

static void plus_ranges(plus_page *p) {
    for (unsigned c = 0; c < p->head_dim; c++) {
        uint16_t row[KI_PAGE_TOKENS];
        plus_row(row, p, c);
        vf low = vf_load_f16(row), high = low;
        for (unsigned t = KI_LANES; t < p->n_tokens; t += KI_LANES) {
            vf x = vf_load_f16(row + t);
            low = vf_min2(x, low);
            high = vf_max2(x, high);
        }
        /* min = -max(-x); + 0 turns -0 into +0 */
        p->min[c] = 0.0f - vf_max(vf_sub(vf_set(0.0f), low)) + 0.0f;
        p->max[c] = vf_max(high) + 0.0f;
        p->spread[c] = p->max[c] - p->min[c];
    }
}

/* out [16] f16, the largest <= a, and the same as float32. */
KI_INLINE vf plus_f16_down(uint16_t *out, vf a) {
    float want[16], got[16];
    vf_store(want, vf_add(a, vf_set(0.0f)));
    vf_store_f16(out, vf_add(a, vf_set(0.0f)));
    vf_store(got, vf_load_f16(out));
    for (int i = 0; i < 16; i++)
        if (got[i] > want[i])
            out[i] = (out[i] & 0x7fff) == 0 ? 0x8001
                                            : (uint16_t)(out[i] & 0x8000 ? out[i] + 1 : out[i] - 1);
    return vf_load_f16(out);
}

KI_INLINE vf plus_clamp(vf q, vf levels) { return vf_min2(vf_max2(q, vf_set(0.0f)), levels); }

/* Codes as whole float32; 0 where the scale is 0. */
KI_INLINE vf plus_code(vf x, vf scale, vf zero, vf levels) {
    vf q = vf_rint(vf_div(vf_sub(x, zero), scale));
    return vf_zero_where_zero(plus_clamp(q, levels), scale);
}

/* zero and scale [steps][16] f16 of sixteen channels whose keys stand in x [tokens][16]: the error
 * of every candidate, the channels in the lanes, so that each sum runs from token to token. */
typedef struct plus_search {
    uint16_t x[KI_PAGE_TOKENS * KI_LANES];
    uint16_t zero[KI_PLUS_KEY_STEPS][KI_LANES], scale[KI_PLUS_KEY_STEPS][KI_LANES];
    float error[KI_PLUS_KEY_STEPS][KI_LANES];
} plus_search;

static void plus_try(plus_search *s, vf min, vf max, unsigned n_sinks, unsigned n_tokens) {
    vf scale[KI_PLUS_KEY_STEPS], zero[KI_PLUS_KEY_STEPS], error[KI_PLUS_KEY_STEPS];
    vf mid = vf_div(vf_add(min, max), vf_set(2.0f)), levels = vf_set(3.0f);
    for (int k = 0; k < KI_PLUS_KEY_STEPS; k++) {
        vf a = vf_set(ki_plus_key_steps[k]);
        zero[k] = plus_f16_down(s->zero[k], vf_add(mid, vf_mul(vf_sub(min, mid), a)));
        vf high = vf_add(mid, vf_mul(vf_sub(max, mid), a));
        vf_store_f16_up(s->scale[k], vf_div(vf_sub(high, zero[k]), levels));
        scale[k] = vf_load_f16(s->scale[k]);
        error[k] = vf_set(0.0f);
    }
    for (unsigned t = n_sinks; t < n_tokens; t++) {
        vf x = vf_load_f16(s->x + (size_t)t * KI_LANES);
        for (int k = 0; k < KI_PLUS_KEY_STEPS; k++) {
            vf code = plus_code(x, scale[k], zero[k], levels);
            vf d = vf_sub(x, vf_add(vf_mul(code, scale[k]), zero[k]));
            error[k] = vf_add(error[k], vf_mul(d, d));
        }
    }
    for (int k = 0; k < KI_PLUS_KEY_STEPS; k++) vf_store(s->error[k], error[k]);
}

/* Scale and zero of the n <= 16 channels of list; lanes behind them repeat the last. */
static void plus_search_channels(const ki_plus_keys *out, const plus_page *p, const uint8_t *list,
                                 unsigned n, unsigned n_steps) {
    plus_search s;
    float min[KI_LANES], max[KI_LANES];
    for (unsigned i = 0; i < KI_LANES; i++) {
        unsigned c = list[i < n ? i : n - 1];
        uint16_t row[KI_PAGE_TOKENS];
        plus_row(row, p, c);
        for (unsigned t = 0; t < p->n_tokens; t++) s.x[(size_t)t * KI_LANES + i] = row[t];
        min[i] = p->min[c];
        max[i] = p->max[c];
    }
    plus_try(&s, vf_load(min), vf_load(max), p->n_sinks, p->n_tokens);
    for (unsigned i = 0; i < n; i++) {
        unsigned best = 0;
        for (unsigned k = 1; k < n_steps; k++)
            if (s.error[k][i] < s.error[best][i]) best = k;
        out->scale[list[i]] = s.scale[best][i];
        out->zero[list[i]] = s.zero[best][i];
    }
}

/* Scale and zero of all channels as 4-bit ones. */
static void plus_four_bits(const ki_plus_keys *out, const plus_page *p) {
    for (unsigned c = 0; c < p->head_dim; c += KI_LANES) {
        vf min = vf_load(p->min + c), max = vf_load(p->max + c);
        vf_store_f16(out->zero + c, min); /* exact: a float16 already */
        vf_store_f16_up(out->scale + c, vf_div(vf_sub(max, min), vf_set(15.0f)));
    }
}

/* codes [n_tokens / 16][16] i32 of one channel. */
KI_INLINE void plus_code_channel(vi *codes, const ki_plus_keys *out, const plus_page *p, unsigned c,
                                 float levels) {
    uint16_t row[KI_PAGE_TOKENS];
    plus_row(row, p, c);
    vf scale = vf_set(ki_f16_to_f32(out->scale[c])), zero = vf_set(ki_f16_to_f32(out->zero[c]));
    for (unsigned b = 0; b < p->n_tokens / KI_LANES; b++)
        codes[b] =
            vf_to_vi(plus_code(vf_load_f16(row + b * KI_LANES), scale, zero, vf_set(levels)));
}

KI_INLINE void plus_or(uint32_t *words, vi codes, unsigned bit) {
    vi_store((int32_t *)words, vi_or(vi_load((const int32_t *)words), vi_shl(codes, bit)));
}

/* The high two bits of wide channel number w in n blocks from `first` on: its place moves from
 * block to block. */
static void plus_put_wide(uint32_t *wide, const vi *codes, unsigned w, unsigned first, unsigned n,
                          unsigned head_dim) {
    for (unsigned b = 0; b < n; b++) {
        unsigned quad = (first + b) * (head_dim / 16) + w / 4;
        plus_or(wide + (size_t)(quad / 4) * KI_LANES, vi_shr(codes[b], 2),
                8 * (w % 4) + 2 * (quad % 4));
    }
}

/* All codes of a group, the tokens in the lanes, as the words have them, into planes that were
 * zeroed; its first block is the page's block number `first`. n_wide channels of the list are wide.
 */
static void plus_write_codes(const ki_plus_keys *out, const plus_page *p, unsigned first,
                             unsigned n_wide) {
    unsigned bits = out->bits, n = 32 / bits, n_words = p->head_dim / n, w = 0;
    unsigned n_blocks = p->n_tokens / KI_LANES;
    uint32_t *low = out->low + (size_t)first * n_words * KI_LANES;
    for (unsigned c = 0; c < p->head_dim; c++) {
        bool wide = w < n_wide && p->list[w] == c;
        vi codes[PLUS_BLOCKS], mask = vi_set((1 << bits) - 1);
        plus_code_channel(codes, out, p, c, wide || bits == 4 ? 15.0f : 3.0f);
        for (unsigned b = 0; b < n_blocks; b++)
            plus_or(low + ((size_t)b * n_words + c / n) * KI_LANES, vi_and(codes[b], mask),
                    ki_code_bit(c % n, bits));
        if (wide) plus_put_wide(out->wide, codes, w++, first, n_blocks, p->head_dim);
    }
}

/* A group whose ranges are known. */
static void plus_close_group(const ki_plus_keys *out, const plus_page *p, unsigned first,
                             unsigned n_wide, unsigned n_steps) {
    plus_four_bits(out, p);
    if (out->bits == 2) {
        uint8_t narrow[PLUS_MAX_DIM];
        unsigned n_narrow = 0;
        for (unsigned c = 0, w = 0; c < p->head_dim; c++)
            if (w < n_wide && p->list[w] == c) w++;
            else narrow[n_narrow++] = (uint8_t)c;
        for (unsigned i = 0; i < n_narrow; i += KI_LANES)
            plus_search_channels(out, p, narrow + i, KI_MIN(n_narrow - i, (unsigned)KI_LANES),
                                 n_steps);
    }
    plus_write_codes(out, p, first, n_wide);
}

static void plus_close_keys_simd(const ki_plus_keys *out, const uint16_t *const *blocks,
                                 unsigned n_sinks, unsigned head_dim, unsigned n_steps) {
    plus_page p = {
        .blocks = blocks, .n_sinks = n_sinks, .n_tokens = KI_PAGE_TOKENS, .head_dim = head_dim};
    unsigned n_wide = out->list ? head_dim / 4 : 0, group = ki_plus_key_group(out);
    memset(out->low, 0, (size_t)KI_PAGE_TOKENS * head_dim * out->bits / 8);
    plus_ranges(&p);
    if (out->list) {
        memset(out->wide, 0, (size_t)KI_PAGE_TOKENS * head_dim / 16);
        ki_plus_choose(p.list, p.spread, head_dim);
        memcpy(out->list, p.list, n_wide);
    }
    if (group == KI_PAGE_TOKENS) {
        plus_close_group(out, &p, 0, n_wide, n_steps);
        return;
    }
    p.n_tokens = group;
    ki_plus_keys part = *out;
    for (unsigned t = 0; t < KI_PAGE_TOKENS; t += group) {
        p.blocks = blocks + t / KI_LANES;
        p.n_sinks = n_sinks > t ? n_sinks - t : 0;
        memset(part.scale, 0, head_dim * sizeof *part.scale);
        memset(part.zero, 0, head_dim * sizeof *part.zero);
        if (p.n_sinks < group) {
            plus_ranges(&p);
            plus_close_group(&part, &p, t / KI_LANES, n_wide, n_steps);
        }
        part.scale += head_dim;
        part.zero += head_dim;
    }
}

/* ---- values ---- */

KI_INLINE vf plus_value_code(vf x, vf scale, vf half, vf levels) {
    vf q = vf_rint(vf_add(vf_div(x, scale), half));
    return vf_zero_where_zero(plus_clamp(q, levels), scale);
}

/* One group: the candidates in the lanes, so that each sum runs from channel to channel. */
static void plus_value_group(uint8_t *codes, uint16_t *scale, const uint16_t *x, unsigned group,
                             float half1, unsigned n_steps) {
    vf half = vf_set(half1), levels = vf_set(2 * half1), largest = vf_set(0.0f);
    float values[KI_PLUS_VALUE_GROUP], error[KI_LANES];
    uint16_t up[KI_LANES];
    for (unsigned i = 0; i < group; i += KI_LANES) {
        vf v = vf_load_f16(x + i);
        largest = vf_max2(vf_abs(v), largest);
        vf_store(values + i, v);
    }
    vf base = vf_div(vf_set(vf_max(largest)), half);
    vf_store_f16_up(up, vf_mul(base, vf_load(ki_plus_value_steps)));
    vf s = vf_load_f16(up), sum = vf_set(0.0f);
    for (unsigned i = 0; i < group; i++) {
        vf v = vf_set(values[i]);
        vf d = vf_sub(v, vf_mul(vf_sub(plus_value_code(v, s, half, levels), half), s));
        sum = vf_add(sum, vf_mul(d, d));
    }
    vf_store(error, sum);
    unsigned best = 0;
    for (unsigned k = 1; k < n_steps; k++)
        if (error[k] < error[best]) best = k;
    *scale = up[best];
    vf chosen = vf_set(ki_f16_to_f32(up[best]));
    for (unsigned i = 0; i < group; i += KI_LANES)
        vi_store_i8((int8_t *)codes + i,
                    vf_to_vi(plus_value_code(vf_load(values + i), chosen, half, levels)));
}

static void plus_quantize_values_simd(uint8_t *codes, uint16_t *scale, const uint16_t *x,
                                      unsigned head_dim, unsigned bits, unsigned n_steps) {
    unsigned group = ki_plus_value_group(head_dim);
    for (unsigned g = 0; g < head_dim / group; g++)
        plus_value_group(codes + (size_t)g * group, scale + g, x + (size_t)g * group, group,
                         bits == 2 ? 1.5f : 3.5f, n_steps);
}

/* ---- turning ---- */

/* Butterflies of neighbours inside a vector: lane i is a[i ^ n] + a[i], and where i has bit n
 * a[i ^ n] - a[i]; the product with 1 or -1 is exact. */
KI_INLINE vf plus_turn_lanes(vf a) {
    static const float sign[4][16] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                      {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                      {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                      {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
    a = vf_add(vf_swap1(a), vf_mul(a, vf_load(sign[0])));
    a = vf_add(vf_swap2(a), vf_mul(a, vf_load(sign[1])));
    a = vf_add(vf_swap4(a), vf_mul(a, vf_load(sign[2])));
    return vf_add(vf_swap8(a), vf_mul(a, vf_load(sign[3])));
}

static void plus_turn_simd(float *x, unsigned head_dim) {
    unsigned block = ki_plus_block(head_dim);
    vf factor = vf_set((float)(1 / sqrt((double)block)));
    for (unsigned i = 0; i < head_dim; i += 16) vf_store(x + i, plus_turn_lanes(vf_load(x + i)));
    for (unsigned h = 16; h < block; h *= 2)
        for (unsigned i = 0; i < head_dim; i += 16)
            if (!(i & h)) {
                vf a = vf_load(x + i), b = vf_load(x + i + h);
                vf_store(x + i, vf_add(a, b));
                vf_store(x + i + h, vf_sub(a, b));
            }
    for (unsigned i = 0; i < head_dim; i += 16) vf_store(x + i, vf_mul(vf_load(x + i), factor));
}
