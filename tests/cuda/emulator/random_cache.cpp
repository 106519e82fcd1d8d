/* random_cache.cpp: drawing a cache, and what a step has not written yet. The oracle is in
 * random_oracle.cpp. */
#include "random_cache.h"

#include "kv_shared.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

extern "C" void ki_plus_turn_scalar(float *x, unsigned head_dim); /* plus.h, which is C alone */

/* Of float16: no number, and 5; a byte. */
enum { NO_PAGE = 0xffffffff, NO_NUMBER = 0x7e00, ANY_NUMBER = 0x4500, BEHIND = 0xfe };

/* ---- numbers ---- */

uint64_t random_source::u64(void) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
float random_source::uniform(void) { return (float)(u64() >> 40) * 0x1p-24f; }
float random_source::normal(void) { /* of four: deviation 1, and no outliers */
    return (uniform() + uniform() + uniform() + uniform() - 2) * 1.732f;
}

/* ---- memory ---- */

void guarded_bytes::release(void) {
    if (map) munmap(map, map_bytes);
    map = data = nullptr;
}

void guarded_bytes::make(size_t n) {
    release();
    size_t page = (size_t)sysconf(_SC_PAGESIZE), all = (n + 255) / 256 * 256;
    size_t readable = (all + page - 1) / page * page;
    n_bytes = n, map_bytes = readable + page;
    void *m = mmap(NULL, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED || mprotect((uint8_t *)m + readable, page, PROT_NONE)) abort();
    map = (uint8_t *)m;
    data = map + readable - all;
    memset(data + n, BEHIND, all - n);
}
bool guarded_bytes::has(const void *at, size_t n) const {
    const uint8_t *p = (const uint8_t *)at;
    return p >= data && p + n <= data + n_bytes;
}
bool guarded_bytes::is_intact(void) const {
    for (size_t i = n_bytes; i % 256; i++)
        if (data[i] != BEHIND) return false;
    return true;
}

static void fill_normal(uint16_t *p, size_t n, float deviation, random_source &random) {
    for (size_t i = 0; i < n; i++) p[i] = ki_f32_to_f16(random.normal() * deviation);
}

/* ---- drawing ---- */

bool random_cache::draw_layout(const kv_kind &kind, random_source &random) {
    kivi_cache_geometry g = kivi_cache_defaults();
    kivi_error err = {};
    is_long = random.below(8) == 0;
    n_kv_heads = is_long ? 1 : 1 + random.below(2);
    uint32_t heads = is_long ? random.one_of({1, 1, 4}) : random.one_of({1, 1, 2, 4, 4, 5, 8, 12});
    uint32_t rule = random.below(3);
    g.n_layers = CACHE_LAYERS, g.n_kv_heads = n_kv_heads, g.n_heads = n_kv_heads * heads;
    g.head_dim = head_dim, g.n_pages = 1;
    g.kv.k_bits = kind.k_bits, g.kv.v_bits = kind.v_bits, g.kv.group = kind.group;
    g.kv.residual_tokens = kind.group == 32 ? 32 * (1 + random.below(8))
                           : kind.is_plus   ? 128
                                            : kind.group * (1 + random.below(2));
    g.kv.sink_tokens = random.one_of({0, 0, 1, 4, 4, 40, 130, 300});
    if (is_long && random.below(2)) g.kv.sink_tokens = 4096 - random.below(3) * 31;
    g.kv.rule = rule == 0 ? KIVI_RULE_PAPER : rule == 1 ? KIVI_RULE_STREAM : KIVI_RULE_SPAN;
    g.kv.span_tokens = rule == 2 ? 128 : 0;
    if (head_dim % kind.group && !kind.is_plus) return false;
    if (ki_cuda_layout_init(&l, &g, kind.is_plus, &err) != KIVI_OK) return false;
    shared_bytes = random.one_of({232448, 232448, 166912, 101376}); /* of sm_90, 80, 86 */
    ki_decode_choice choice;
    return ki_decode_choose(&choice, &l, shared_bytes, false);
}

void random_cache::draw_lengths(random_source &random) {
    most_tokens = random.below(4) ? 700 : 2200;
    n_seqs = 1 + random.below(2);
    n_sms = random.one_of({1, 1, 64}); /* many thread blocks, and late ones, or few */
    window = random.one_of({0, 0, 0, 1, 100, 333});
    split_tokens = random.one_of({128, 256, 512, 4096, 4096});
    if (is_long) {
        most_tokens = random.below(2) ? 6000 : 12000;
        n_seqs = 1;
        split_tokens = random.below(3) ? 32768 : 2048;
    }
    stride = most_tokens / 128 + 2;
    big_blocks = most_tokens / 32 + 2;
    max_splits = ki_plan_max_splits(most_tokens + 1, split_tokens);
    scale = 1 / sqrtf((float)head_dim);
    pdl = random.below(5) != 0;
    out_type = random.below(4) ? KI_CUDA_F32 : random.below(2) ? KI_CUDA_F16 : KI_CUDA_BF16;
}

/* Keys and values of the size of 1, whatever the bits: the largest code is 0.6 to 2.1, zeros are -1
 * to -0.5. */
void random_cache::fill_page(uint8_t *page, random_source &random) const {
    uint32_t d = head_dim;
    auto fill = [&](uint8_t *at, uint32_t n, float low, float unit) {
        for (uint32_t i = 0; i < n; i++)
            ((uint16_t *)at)[i] = ki_f32_to_f16((low + 0.5f * random.uniform()) * unit);
    };
    auto unit = [](uint32_t bits) { return 3.0f / (float)((1u << bits) - 1); };
    auto keys = [&](uint8_t *base, uint32_t n) {
        fill(base + l.k_scale_at, n, 0.2f, unit(l.k_bits));
        fill(base + l.k_zero_at, n, -1, 1);
    };
    for (uint32_t i = 0; i + 8 <= l.page_bytes; i += 8) {
        uint64_t codes = random.u64();
        memcpy(page + i, &codes, 8);
    }
    for (uint32_t b = 0; b < KI_SUBS; b++) {
        uint8_t *sub = page + l.head_bytes + b * l.sub_bytes;
        if (l.k_bits == 16) fill_normal((uint16_t *)(sub + l.k_at), 32 * d, 1, random);
        if (l.v_bits == 16) fill_normal((uint16_t *)(sub + l.v_at), 32 * d, 1, random);
        if (l.v_bits < 16) fill(sub + l.v_scale_at, d / l.v_group * 32, 0.2f, unit(l.v_bits));
        if (l.v_bits < 16 && !l.is_plus) fill(sub + l.v_zero_at, d / l.v_group * 32, -1, 1);
        if (l.k_bits < 16 && !l.head_bytes) keys(sub, 32 / l.k_group * d);
    }
    if (l.head_bytes) keys(page, 128 / l.k_group * d);
    if (l.is_plus && l.k_bits == 2) /* a wide channel of each four */
        for (uint32_t w = 0; w < d / 4; w++)
            page[l.list_at + w] = (uint8_t)(4 * w + random.below(4));
}

/* Lengths about block and page boundaries, sequences that are given a prompt, that have their
 * pages alone, that have a longer ring, and slots without a row. */
void random_cache::draw_sequence(uint32_t i, random_source &random) {
    ki_cuda_seq &s = seqs[i];
    uint32_t boundary = random.below(most_tokens / 32 + 1) * 32 + random.below(3);
    s = {};
    s.ring = (uint64_t)(rings.data + i * ring_bytes);
    s.sinks = l.sink_blocks ? (uint64_t)(sinks.data + i * l.sink_bytes) : 0;
    s.table = i;
    s.k_blocks = l.k_ring_blocks, s.v_blocks = l.v_ring_blocks;
    s.n_tokens = random.below(3)   ? random.below(most_tokens)
                 : random.below(3) ? random.below(200)
                                   : (boundary ? boundary - 1 : 0) % most_tokens;
    if (is_long) s.n_tokens = most_tokens - 1 - random.below(most_tokens / 3);
    s.n_rows = n_seqs == 1 || random.below(6);
    s.first_row = n_rows;
    n_rows += s.n_rows;
    uint32_t kind = random.below(8);
    if (kind == 0) {
        s.flags = KI_CUDA_PROMPT;
        s.run_start = random.below(2) ? 0 : random.below(s.n_tokens + 1);
        s.k_blocks = s.v_blocks = big_blocks;
    } else if (kind == 1) {
        s.flags = KI_CUDA_PAGES_ONLY;
        if (!s.n_tokens) s.n_tokens = 1;
    } else if (kind == 2) s.k_blocks += random.below(3), s.v_blocks += random.below(3);
}

void random_cache::make_memory(random_source &random) {
    std::vector<uint32_t> ids(n_seqs * stride);
    for (uint32_t i = 0; i < ids.size(); i++) ids[i] = i;
    for (uint32_t i = (uint32_t)ids.size() - 1; i; i--) std::swap(ids[i], ids[random.below(i + 1)]);
    pool.make(ids.size() * l.id_bytes);
    for (uint64_t i = 0; i < ids.size(); i++)
        for (uint32_t h = 0; h < n_kv_heads; h++)
            fill_page(pool.data + i * l.id_bytes +
                          (CACHE_LAYER * (uint64_t)n_kv_heads + h) * l.page_bytes,
                      random);
    ring_bytes = ki_cuda_ring_bytes(&l, big_blocks, big_blocks);
    rings.make(ring_bytes * n_seqs);
    sinks.make(l.sink_bytes * n_seqs);
    fill_normal((uint16_t *)rings.data, rings.n_bytes / 2, 1, random);
    fill_normal((uint16_t *)sinks.data, sinks.n_bytes / 2, 1, random);
    seqs.make(n_seqs);
    tables.make(ids.size());
    n_rows = 0;
    for (uint32_t i = 0; i < n_seqs; i++) {
        draw_sequence(i, random);
        for (uint32_t p = 0; p < stride; p++)
            tables[i * stride + p] = is_seen(seqs[i], p * 128) ? ids[i * stride + p] : NO_PAGE;
    }
    q.make((size_t)n_rows * l.n_heads * head_dim);
    draw_own_rows(random);
    out.make((size_t)n_rows * l.n_heads * head_dim * (out_type == KI_CUDA_F32 ? 4 : 2));
    memset(out.data, 0xff, out.n_bytes); /* no numbers */
    workspace.make(ki_cuda_workspace_bytes(&l, n_seqs, most_tokens + 1, split_tokens));
    memset(workspace.data, BEHIND, workspace.n_bytes);
}

/* Float32 rows, and the float16 ones that they become: queries, and what stands at pos. */
void random_cache::draw_own_rows(random_source &random) {
    uint32_t d = head_dim, width = (l.n_heads + 2 * n_kv_heads) * d;
    own_rows.make((size_t)n_rows * width), rope.make((size_t)n_rows * d);
    for (size_t i = 0; i < (size_t)n_rows * width; i++)
        own_rows[i] = random.normal() * (i % width < l.n_heads * d ? 0.6f : 1);
    for (size_t i = 0; i < (size_t)n_rows * d; i += 2) {
        float angle = random.uniform() * 6.2832f;
        rope[i] = cosf(angle), rope[i + 1] = sinf(angle);
    }
    auto turned = [&](uint32_t row, uint32_t part, bool has_rope) {
        const float *x = own_rows.p() + (size_t)row * width + part * d, *r = rope.p() + row * d;
        std::vector<float> y(x, x + d);
        for (uint32_t c = 0; has_rope && c < d / 2; c++) {
            y[c] = x[c] * r[2 * c] - x[c + d / 2] * r[2 * c + 1];
            y[c + d / 2] = x[c + d / 2] * r[2 * c] + x[c] * r[2 * c + 1];
        }
        if (!has_rope && l.is_plus) ki_plus_turn_scalar(y.data(), d);
        return y;
    };
    for (uint32_t row = 0; row < n_rows; row++)
        for (uint32_t h = 0; h < l.n_heads; h++) {
            std::vector<float> y = turned(row, h, true);
            for (uint32_t c = 0; c < d; c++)
                q[((size_t)row * l.n_heads + h) * d + c] = ki_f32_to_f16(y[c]);
        }
    if (!is_packed()) return;
    for (uint32_t i = 0; i < n_seqs; i++) {
        const ki_cuda_seq &s = seqs[i];
        if (s.n_rows != 1 || s.flags & KI_CUDA_PAGES_ONLY) continue;
        for (uint32_t h = 0; h < n_kv_heads; h++) {
            std::vector<float> k = turned(s.first_row, l.n_heads + h, true);
            std::vector<float> v = turned(s.first_row, l.n_heads + n_kv_heads + h, false);
            for (uint32_t c = 0; c < d; c++) {
                *exact_at(s, h, s.n_tokens, c, true) = ki_f32_to_f16(k[c]);
                *exact_at(s, h, s.n_tokens, c, false) = ki_f32_to_f16(v[c]);
            }
        }
    }
}

bool random_cache::draw(const kv_kind &kind, uint32_t dim, random_source &random) {
    kind_name = kind.name;
    head_dim = dim;
    if (!draw_layout(kind, random)) return false;
    draw_lengths(random);
    make_memory(random);
    list_hidden();
    plan_on_host();
    return true;
}

std::string random_cache::text(void) const {
    char head[200];
    snprintf(head, sizeof head,
             "%s D=%u R=%u sinks=%u rule=%u heads=%u/%u window=%u split=%u shared=%u%s", kind_name,
             head_dim, l.residual_tokens, l.sink_tokens, l.rule, l.n_heads, n_kv_heads, window,
             split_tokens, shared_bytes, pdl ? "" : " no-pdl");
    std::string t = head;
    for (uint32_t i = 0; i < n_seqs; i++)
        t += " pos=" + std::to_string(seqs[i].n_tokens) + (seqs[i].n_rows ? "" : "(idle)") +
             "/flags=" + std::to_string(seqs[i].flags);
    return t;
}

/* ---- places ---- */

/* Whether any position of the page of `pos` is seen by the sequence's row. */
bool random_cache::is_seen(const ki_cuda_seq &s, uint32_t pos) const {
    uint32_t end = s.flags & KI_CUDA_PAGES_ONLY ? s.n_tokens : s.n_tokens + 1;
    uint32_t first = window && end > window ? end - window : 0, page = pos / 128 * 128;
    return page + 127 >= first && page <= s.n_tokens;
}
uint8_t *random_cache::page_at(const ki_cuda_seq &s, uint32_t pos, uint32_t head) const {
    uint64_t id = tables[s.table * stride + pos / 128];
    return pool.data + id * l.id_bytes + (CACHE_LAYER * (uint64_t)n_kv_heads + head) * l.page_bytes;
}
uint8_t *random_cache::sub_at(uint8_t *page, uint32_t pos) const {
    return page + l.head_bytes + pos % 128 / 32 * l.sub_bytes;
}

static uint16_t *half_at(uint8_t *block, uint32_t pos, uint32_t c, uint32_t head_dim, bool keys) {
    ki_order_place p = keys ? ki_order_key(pos % 32, c, head_dim / 16, 16)
                            : ki_order_value(pos % 32, c, head_dim / 16, 16);
    return (uint16_t *)block + p.word * 2 + p.bit / 16;
}

/* A 16-bit element of a side with codes, in ring or sinks. */
uint16_t *random_cache::exact_at(const ki_cuda_seq &s, uint32_t head, uint32_t pos, uint32_t c,
                                 bool keys) const {
    uint64_t slot = CACHE_LAYER * (uint64_t)n_kv_heads + head, bytes = (uint64_t)head_dim * 64;
    uint32_t block = pos / 32;
    if (block < l.sink_blocks) {
        uint64_t at = slot * 2 * l.sink_blocks + (keys ? 0 : l.sink_blocks) + block;
        return half_at((uint8_t *)s.sinks + at * bytes, pos, c, head_dim, keys);
    }
    uint32_t k = l.k_bits < 16 ? s.k_blocks : 0, v = l.v_bits < 16 ? s.v_blocks : 0;
    uint64_t at = slot * (k + v) + (keys ? block % s.k_blocks : k + block % s.v_blocks);
    return half_at((uint8_t *)s.ring + at * bytes, pos, c, head_dim, keys);
}
/* One of a side without codes. */
uint16_t *random_cache::paged_at(const ki_cuda_seq &s, uint32_t head, uint32_t pos, uint32_t c,
                                 bool keys) const {
    uint8_t *sub = sub_at(page_at(s, pos, head), pos);
    return half_at(sub + (keys ? l.k_at : l.v_at), pos, c, head_dim, keys);
}
bool random_cache::holds(const void *at, size_t n) const {
    return pool.has(at, n) || rings.has(at, n) || sinks.has(at, n);
}

/* ---- what the step writes ---- */

void random_cache::hide_value(uint16_t *at) { hidden.push_back({at, *at}); }

/* Codes that the step's append makes: of the value R before pos, and of keys whose groups close. */
void random_cache::hide_codes(const ki_cuda_seq &s, uint32_t head) {
    uint32_t r = l.residual_tokens, pos = s.n_tokens, d = head_dim;
    if (l.v_bits < 16 && pos >= r && pos - r >= l.sink_tokens && is_seen(s, pos - r)) {
        uint16_t *scales = (uint16_t *)(sub_at(page_at(s, pos - r, head), pos - r) + l.v_scale_at);
        for (uint32_t g = 0; g < d / l.v_group; g++)
            hide_value(scales + g * 32 + ki_order_value_scale((pos - r) % 32));
    }
    if (l.k_bits == 16 || (pos + 1) % r) return;
    for (uint32_t t = pos + 1 - r; t <= pos; t += l.k_group) {
        if (!is_seen(s, t)) continue;
        uint8_t *page = page_at(s, t, head), *base = l.head_bytes ? page : sub_at(page, t);
        uint32_t group = t % (l.head_bytes ? 128 : 32) / l.k_group;
        for (uint32_t c = 0; c < d; c++)
            hide_value((uint16_t *)(base + l.k_scale_at) + group * d + c);
    }
}

void random_cache::list_hidden(void) {
    hidden.clear();
    is_hidden = is_own = false;
    for (uint32_t i = 0; i < n_seqs; i++) {
        const ki_cuda_seq &s = seqs[i];
        if (s.n_rows != 1 || s.flags & KI_CUDA_PAGES_ONLY) continue;
        for (uint32_t h = 0; h < n_kv_heads; h++) {
            for (uint32_t c = 0; c < head_dim; c++)
                for (bool keys : {false, true}) {
                    uint32_t bits = keys ? l.k_bits : l.v_bits;
                    hide_value(bits == 16 ? paged_at(s, h, s.n_tokens, c, keys)
                                          : exact_at(s, h, s.n_tokens, c, keys));
                }
            hide_codes(s, h);
        }
    }
    for (size_t i = 0; i < q.n_bytes / 2; i++) hide_value(&q[i]);
}

void random_cache::hide(void) {
    if (is_own && !is_hidden) {
        for (own_element &e : own_elements) {
            e.was_written |= *e.at == e.truth;
            *e.at = NO_NUMBER;
        }
        own_rows_hidden.assign(own_rows.p(), own_rows.p() + own_rows.n_bytes / 4);
        memset(own_rows.data, 0xff, own_rows.n_bytes);
    }
    if (!is_hidden)
        for (auto &h : hidden) *h.first = NO_NUMBER;
    is_hidden = true;
}
void random_cache::show(void) {
    if (is_own && is_hidden) memcpy(own_rows.data, own_rows_hidden.data(), own_rows.n_bytes);
    if (is_hidden)
        for (auto &h : hidden) *h.first = h.second;
    is_hidden = false;
}

void random_cache::begin_own(void) {
    show();
    is_own = true;
    auto is_own_element = [&](const std::pair<uint16_t *, uint16_t> &h) {
        return (h.first >= (uint16_t *)rings.data &&
                h.first < (uint16_t *)(rings.data + rings.n_bytes)) ||
               (h.first >= (uint16_t *)sinks.data &&
                h.first < (uint16_t *)(sinks.data + sinks.n_bytes));
    };
    for (auto &h : hidden) {
        bool is_own_row = is_own_element(h);
        if (is_own_row) own_elements.push_back({h.first, h.second, false});
        /* codes of this step are made behind attention, in place of any number; q is not read */
        *h.first = is_own_row || q.has(h.first, 2) ? NO_NUMBER : ANY_NUMBER;
    }
    hidden.clear();
    for (size_t i = 0; i < q.n_bytes / 2; i++) q[i] = NO_NUMBER;
}

std::string random_cache::end_own(void) {
    size_t n_missing = 0;
    for (own_element &e : own_elements) {
        n_missing += !e.was_written && *e.at != e.truth;
        e.was_written = false, *e.at = NO_NUMBER;
    }
    return n_missing ? std::to_string(n_missing) + " elements of the step's rows are not written"
                     : "";
}

/* ---- the plan ---- */

void random_cache::plan_on_host(void) {
    items.clear();
    slots.assign(n_seqs, {});
    for (uint32_t i = 0; i < n_seqs; i++) {
        ki_plan_ranges r = ki_plan_of(&l, &seqs[i], window);
        uint32_t n = seqs[i].n_rows == 1 ? ki_plan_splits(&r, split_tokens, max_splits) : 0;
        slots[i] = {(uint32_t)items.size(), n};
        for (uint32_t k = 0; k < n; k++) {
            ki_plan_item item = ki_plan_item_of(&l, &seqs[i], &r, k, n);
            for (uint32_t j = 0; j < KI_PLAN_PAGES; j++) {
                uint32_t page = ki_plan_page(&item, &l, j);
                if (page != KI_PLAN_NONE) item.pages[j] = tables[item.table * stride + page];
            }
            items.push_back(item);
        }
    }
}
