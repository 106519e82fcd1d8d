/* The CUDA backend's host side: the order of a page on the device is one permutation of the plain
 * order, pages go to the CPU's order and back, splits cover a sequence once, products of few rows
 * cover all outputs and find their places, and kernels start with the shared memory that a device
 * has. */
#include "check.h"
#include "kv_plan.h"
#include "kv_prompt.h"
#include "kv_shared.h"
#include "sdpa.h"
#include "stream_wide_plan.h"

static const uint32_t head_dims[] = {64, 80, 96, 128, 256};
enum { N_DIMS = sizeof head_dims / sizeof *head_dims };

/* Every element of a block has a place of its own, all places are used, and the way back is right.
 * */
static void check_plane(uint32_t n_steps, uint32_t bits, bool keys) {
    uint32_t n_words = ki_order_words(n_steps, bits) * 32, d = n_steps * 16;
    uint32_t *seen = check_alloc((size_t)n_words * 4), *place = check_alloc((size_t)n_words * 4);
    for (uint32_t w = 0; w < n_words / 32; w++)
        for (uint32_t lane = 0; lane < 32; lane++)
            place[ki_order_word_at(w, n_words / 32, lane, keys)]++;
    for (uint32_t i = 0; i < n_words; i++)
        CHECK(place[i] == 1, "word %u is named %u times", i, place[i]);
    for (uint32_t t = 0; t < 32; t++)
        for (uint32_t c = 0; c < d; c++) {
            ki_order_place p =
                keys ? ki_order_key(t, c, n_steps, bits) : ki_order_value(t, c, n_steps, bits);
            CHECK(p.word < n_words && p.bit + bits <= 32, "place of (%u, %u)", t, c);
            if (check_failed()) goto done;
            uint32_t mask = (uint32_t)((1ull << bits) - 1) << p.bit;
            CHECK(!(seen[p.word] & mask), "(%u, %u) has the place of another", t, c);
            seen[p.word] |= mask;
        }
    for (uint32_t i = 0; i < n_words && (bits > 1 || n_steps % 2 == 0); i++)
        CHECK(seen[i] == UINT32_MAX, "word %u has unused bits", i);
    for (uint32_t i = 0; i < n_words && bits == 16; i++) {
        ki_order_element16 at = ki_order_row_at(i, n_steps, keys);
        for (uint32_t h = 0; h < 2; h++) {
            ki_order_place p =
                ki_order_row(at.token + (keys ? 0 : h), at.channel + (keys ? h : 0), n_steps, keys);
            CHECK(p.word == i && p.bit == 16 * h, "way back from half %u of word %u", h, i);
        }
    }
    for (uint32_t w = 0; w < n_words / 32 && bits < 16; w++)
        for (uint32_t lane = 0; lane < 32; lane++)
            for (uint32_t e = 0; e < 32 / bits; e++) {
                ki_order_element at = ki_order_at(w, e, lane, bits);
                if (at.j >= n_steps) continue;
                ki_order_place p = ki_order_tile(at.j, at.i, at.row, at.col, n_steps, bits, keys);
                CHECK(p.word == ki_order_word_at(w, n_words / 32, lane, keys) && p.bit == e * bits,
                      "way back from word %u of lane %u, element %u", w, lane, e);
            }
done:
    free(seen);
    free(place);
}

/* Of a 16-bit block some tokens are read: who holds one of them reads its own registers, everybody
 * else what such a lane reads, and no line with one of them is left out. */
static void check_seen(uint32_t from, uint32_t to, uint32_t n_steps, bool keys) {
    enum { MOST_LINES = 128 };
    bool has[2][128] = {{false}}, lines[MOST_LINES] = {false}; /* [step alone] */
    uint32_t pairs = n_steps / 2 * 512, n_lines = n_steps * 8;
    for (uint32_t t = from; t < to; t++)
        for (uint32_t c = 0; c < n_steps * 16; c++) {
            ki_order_place p =
                keys ? ki_order_key(t, c, n_steps, 16) : ki_order_value(t, c, n_steps, 16);
            bool is_alone = p.word >= pairs;
            CHECK(is_alone ? c / 16 == n_steps - 1 : p.word / 512 == c / 32,
                  "channel %u is not in its pair of steps", c);
            has[is_alone][is_alone ? (p.word - pairs) / 2 : p.word / 4 % 128] = true;
            lines[p.word / 32] = true;
        }
    for (uint32_t at = 0; at < 128 && from < to; at++) {
        uint32_t lane = at % 32, own = at / 32 * 32 + ki_order_lane(lane, keys);
        uint32_t seen = ki_order_seen_at(from, to, at / 32, lane, keys);
        for (uint32_t alone = 0; alone <= n_steps % 2; alone++) {
            CHECK(seen < 128 && has[alone][seen], "[%u, %u): bytes %u of nobody", from, to, seen);
            CHECK(!has[alone][own] || seen == own, "[%u, %u): %u instead of %u", from, to, seen,
                  own);
        }
    }
    for (uint32_t at = 0; at < n_lines; at++)
        CHECK(!lines[at] == !ki_order_line_meets(from, to, at, n_steps), "[%u, %u): line %u", from,
              to, at);
}

/* A new row touches as few sectors of 32 bytes as its bytes fill, a value twice as many: it shares
 * words with its neighbour. Codes of a value share theirs with seven others. */
static void check_sectors(uint32_t n_steps, uint32_t bits, bool keys) {
    for (uint32_t t = 0; t < 32; t++) {
        bool sectors[512] = {false};
        uint32_t n = 0;
        for (uint32_t c = 0; c < n_steps * 16; c++) {
            ki_order_place p =
                keys ? ki_order_key(t, c, n_steps, bits) : ki_order_value(t, c, n_steps, bits);
            n += !sectors[p.word / 8], sectors[p.word / 8] = true;
        }
        CHECK(n == n_steps * (keys || bits == 2 ? 1 : 2), "token %u is in %u sectors", t, n);
    }
}

static void check_orders(void) {
    static const uint32_t all_bits[] = {1, 2, 4, 8, 16};
    for (int i = 0; i < N_DIMS; i++)
        for (int b = 0; b < 5; b++)
            for (int keys = 0; keys < 2; keys++) check_plane(head_dims[i] / 16, all_bits[b], keys);
    for (int i = 0; i < N_DIMS; i++) {
        bool seen[256] = {false};
        for (uint32_t c = 0; c < head_dims[i]; c++) {
            uint32_t at = ki_order_key_scale(c, head_dims[i] / 16);
            CHECK(at < head_dims[i] && !seen[at], "scale of channel %u at %u", c, at);
            if (at < 256) seen[at] = true;
            /* a pair of channels stays a pair: the kernels store and load two at once */
            CHECK(c % 2 || ki_order_key_scale(c + 1, head_dims[i] / 16) == at + 1, "pair %u", c);
        }
    }
    for (int i = 0; i < N_DIMS * 2; i++) {
        uint32_t n_steps = head_dims[i / 2] / 16;
        check_sectors(n_steps, 16, i % 2);
        check_sectors(n_steps, 2, false);
        for (uint32_t from = 0; from <= 32; from++)
            for (uint32_t to = from; to <= 32; to++) check_seen(from, to, n_steps, i % 2);
    }
}

static void check_exchange(rng *r, uint32_t d, uint32_t k_bits, uint32_t v_bits, uint32_t group) {
    kivi_cache_geometry g = kivi_cache_defaults();
    ki_cuda_layout l;
    ki_layout cpu;
    g.n_layers = 2, g.n_heads = 8, g.n_kv_heads = 2, g.head_dim = d, g.n_pages = 1;
    g.kv.k_bits = k_bits, g.kv.v_bits = v_bits, g.kv.group = group;
    CHECK_OK(ki_layout_init(&cpu, &g, err));
    g.kv = cpu.kv;
    CHECK_OK(ki_cuda_layout_init(&l, &g, false, err));
    if (check_failed()) return;
    CHECK(l.page_bytes == cpu.page_bytes, "%u bytes on the device, %zu here", l.page_bytes,
          cpu.page_bytes);
    CHECK(l.page_scale_bytes == cpu.page_scale_bytes, "bytes of scales");
    uint8_t *page = check_alloc(cpu.page_bytes), *back = check_alloc(cpu.page_bytes);
    guard there = guard_alloc(l.page_bytes);
    for (size_t i = 0; i < cpu.page_bytes; i++) page[i] = (uint8_t)rng_u64(r);
    ki_cuda_page_from_cpu(there.data, page, &l);
    ki_cuda_page_to_cpu(back, there.data, &l);
    CHECK(!memcmp(page, back, cpu.page_bytes), "D %u, %u/%u bits, group %u: not the same page", d,
          k_bits, v_bits, group);
    free(page);
    free(back);
    guard_free(&there);
}

static void check_pages(void) {
    static const uint32_t bits[] = {2, 4, 8, 16};
    rng r = check_rng();
    for (int i = 0; i < N_DIMS; i++)
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < 4; v++)
                for (uint32_t group = 16; group <= 128; group *= 2)
                    if (head_dims[i] % group == 0)
                        check_exchange(&r, head_dims[i], bits[k], bits[v], group);
}

/* What a page of a + kind says on the device, by the order's own functions, is what it says here.
 */
static void compare_plus(const uint8_t *there, uint8_t *here, const ki_cuda_layout *l,
                         const ki_layout *cpu) {
    uint32_t d = l->head_dim, steps = d / 16, wide_steps = (d / 4 + 15) / 16;
    ki_plus_keys keys;
    ki_layout_keys(&keys, cpu, here);
    for (uint32_t t = 0; t < KI_PAGE_TOKENS; t++) {
        const uint32_t *sub =
            (const uint32_t *)(there + l->head_bytes + (size_t)(t / 32) * l->sub_bytes);
        for (uint32_t w = 0; keys.wide && w < d / 4; w++) {
            ki_order_place p = ki_order_key(t % 32, w, wide_steps, 2);
            CHECK((sub[l->wide_at / 4 + p.word] >> p.bit & 3) ==
                      ki_plus_wide_code(keys.wide, t, w, d),
                  "wide code %u of token %u", w, t);
        }
        for (uint32_t c = 0; c < d; c++) {
            ki_order_place k = ki_order_key(t % 32, c, steps, l->k_bits),
                           v = ki_order_value(t % 32, c, steps, 2),
                           h = ki_order_value(t % 32, c, steps, 1);
            uint32_t code = sub[l->v_at / 4 + v.word] >> v.bit & 3;
            const uint32_t *third = (const uint32_t *)(here + cpu->v_third_at);
            if (l->v_bits == 3) code |= (sub[l->third_at / 4 + h.word] >> h.bit & 1) << 2;
            CHECK((sub[l->k_at / 4 + k.word] >> k.bit & ((1u << l->k_bits) - 1)) ==
                      ki_key_code(keys.low, t, c, d, l->k_bits),
                  "key code (%u, %u)", t, c);
            CHECK(code == ki_plus_value_code((const uint32_t *)(here + cpu->v_codes_at),
                                             l->v_bits == 3 ? third : NULL, t, d, c),
                  "value code (%u, %u)", t, c);
        }
    }
}

static void check_plus_page(rng *r, uint32_t d, const char *kind) {
    kivi_cache_geometry g = kivi_cache_defaults();
    ki_cuda_layout l;
    ki_layout cpu;
    g.n_layers = 1, g.n_heads = 8, g.n_kv_heads = 2, g.head_dim = d, g.n_pages = 1;
    CHECK_OK(kivi_kv_by_name(&g.kv, kind, err));
    CHECK_OK(ki_layout_init(&cpu, &g, err));
    g.kv = cpu.kv;
    CHECK_OK(ki_cuda_layout_any(&l, &g, true, err));
    if (check_failed()) return;
    size_t list_end = cpu.k_list_at + (ki_has_wide(&cpu) ? d / 4 : 0);
    uint8_t *page = check_alloc(cpu.page_bytes), *back = check_alloc(cpu.page_bytes);
    guard there = guard_alloc(l.page_bytes);
    for (size_t i = 0; i < list_end; i++) page[i] = (uint8_t)rng_u64(r); /* padding is 0 */
    for (uint32_t w = 0; ki_has_wide(&cpu) && w < d / 4; w++)
        page[cpu.k_list_at + w] = (uint8_t)(4 * w + rng_below(r, 4));
    ki_cuda_page_from_cpu(there.data, page, &l);
    compare_plus(there.data, page, &l, &cpu);
    ki_cuda_page_to_cpu(back, there.data, &l);
    CHECK(!memcmp(page, back, cpu.page_bytes), "D %u, %s: not the same page", d, kind);
    free(page);
    free(back);
    guard_free(&there);
}

static void check_plus_pages(void) {
    static const char *const plus_kinds[] = {"kivi2+", "k4v2+", "k4v3+"};
    rng r = check_rng();
    for (uint32_t d = 16; d <= 256; d += 16)
        for (int k = 0; k < 3; k++) check_plus_page(&r, d, plus_kinds[k]);
}

/* The tokens of a block that are read in 16 bit, token by token as the rule says. */
static void check_rows(const ki_plan_item *p, uint32_t block, uint32_t exact_from, uint32_t sinks) {
    ki_plan_rows r = ki_plan_rows_of(p, block, exact_from, sinks);
    uint32_t from = 32, to = 0, n = 0;
    for (uint32_t t = 0; t < 32; t++) {
        uint32_t pos = block * 32 + t;
        if (pos < p->first || pos >= p->end || (pos >= sinks && pos < exact_from)) continue;
        from = KI_MIN(from, t), to = t + 1, n++;
    }
    CHECK(n ? r.from == from && r.to == to : r.from == r.to, "block %u: [%u, %u), not [%u, %u)",
          block, r.from, r.to, from, to);
}

/* What attention copies of a slow block before the step's append has ended (kv_slow.cuh): the bytes
 * of codes where the block is not v_exact / 32, and whole 16-bit keys of a block that is old. The
 * append writes the row at pos, codes of the value R before it, and where pos ends R rows, their
 * codes and with a page's only key group the page's head. */
static void check_early(const ki_cuda_layout *l, const ki_cuda_seq *s, const ki_plan_item *p,
                        uint32_t block) {
    uint32_t pos = s->n_tokens, r = l->residual_tokens, base = block * 32;
    bool k_codes = base < KI_MIN(p->k_exact, p->end), v_codes = base < KI_MIN(p->v_exact, p->end);
    if (l->k_bits == 16 || l->v_bits == 16) return;
    CHECK(ki_plan_is_old(p, block) == !(base <= pos && pos < base + 32), "block %u is old", block);
    if ((k_codes || v_codes) && block != p->v_exact / 32) {
        CHECK(pos < r || (pos - r) / 32 != block, "codes of a value in block %u", block);
        CHECK((pos + 1) % r || base + 32 <= pos + 1 - r, "codes of keys in block %u", block);
        CHECK((pos + 1) % r || l->k_group < KI_PAGE_TOKENS || block / 4 != pos / 128, "its head");
    }
}

/* What an item says of pages and the ring, where the table has id 1000 + page: a slow block's codes
 * and the first units are found by it, rows where they are. */
static void check_item(const ki_cuda_layout *l, const ki_cuda_seq *s, const ki_plan_ranges *r,
                       uint32_t split, uint32_t n_splits) {
    ki_plan_item p = ki_plan_item_of(l, s, r, split, n_splits);
    for (uint32_t j = 0; j < KI_PLAN_PAGES; j++) {
        uint32_t page = ki_plan_page(&p, l, j);
        CHECK(page == KI_PLAN_NONE || page <= s->n_tokens / KI_PAGE_TOKENS, "page %u", page);
        p.pages[j] = page == KI_PLAN_NONE ? 0 : 1000 + page;
    }
    for (uint32_t u = p.part.unit_begin; u < p.part.unit_end; u++) {
        uint32_t j = u - p.part.unit_begin;
        if (j < KI_PLAN_UNITS)
            CHECK(p.pages[2 + j] == 1000 + u * l->unit_subs / KI_SUBS, "unit %u", u);
    }
    uint32_t coded = KI_MIN(KI_MAX(p.k_exact, p.v_exact), p.end);
    for (uint32_t k = p.part.slow_begin; k < p.part.slow_end && !check_failed(); k++) {
        uint32_t block = ki_plan_slow_block(r, k), j = ki_plan_slow_page(&p, block);
        if (block * KI_SUB_TOKENS < coded && j != KI_PLAN_NONE)
            CHECK(j < 2 && p.pages[j] == 1000 + block / KI_SUBS, "codes of block %u", block);
        check_early(l, s, &p, block);
        check_rows(&p, block, p.k_exact, l->k_bits == 16 ? 0 : l->sink_tokens);
        check_rows(&p, block, p.v_exact, l->v_bits == 16 ? 0 : l->sink_tokens);
        if (p.k_blocks)
            CHECK(ki_plan_ring_at(&p, p.k_at, p.k_blocks, block) == block % p.k_blocks, "keys");
        if (p.v_blocks)
            CHECK(ki_plan_ring_at(&p, p.v_at, p.v_blocks, block) == block % p.v_blocks, "values");
    }
}

/* One sequence at one length: fast units and slow blocks cover what is visible, once; fast ones are
 * all codes; the splits hand out each of them once, in order. */
static void check_sequence(const ki_cuda_layout *l, uint32_t n, uint32_t window, uint32_t split) {
    ki_cuda_seq s = {.n_tokens = n,
                     .n_rows = 1,
                     .k_blocks = l->k_ring_blocks + n % 3,
                     .v_blocks = l->v_ring_blocks + n % 5};
    ki_plan_ranges r = ki_plan_of(l, &s, window);
    uint32_t unit = l->unit_subs, n_splits = ki_plan_splits(&r, split, KI_MAX_SPLITS);
    uint32_t end_block = (r.end + 31) / 32, next = r.lead_begin;
    CHECK(r.end == n + 1 && r.first == (window && n + 1 > window ? n + 1 - window : 0), "range");
    CHECK(n_splits <= ki_plan_max_splits(n + 1, split), "more splits than there is room for");
    for (uint32_t k = 0; k < r.n_lead; k++) CHECK(ki_plan_slow_block(&r, k) == next++, "lead");
    if (r.fast_begin < r.fast_end) {
        CHECK(next == r.fast_begin * unit, "fast units begin at %u, not %u", r.fast_begin * unit,
              next);
        CHECK(r.fast_begin * unit * 32 >= r.first, "a fast unit before the window");
        CHECK(r.fast_begin * unit * 32 >= l->sink_tokens || l->k_bits + l->v_bits == 32, "sinks");
        CHECK(r.fast_end * unit * 32 <= KI_MIN(r.k_exact, r.v_exact), "a fast unit in 16 bit");
        next = r.fast_end * unit;
    }
    for (uint32_t k = r.n_lead; k < r.n_slow; k++)
        CHECK(ki_plan_slow_block(&r, k) == next++, "tail: %u", k);
    CHECK(next == end_block, "ends at block %u, not %u", next, end_block);
    uint32_t units = r.fast_begin, slow = 0;
    for (uint32_t k = 0; k < n_splits; k++) {
        ki_plan_part p = ki_plan_split(&r, unit, k, n_splits);
        CHECK(p.unit_begin == units && p.unit_end >= units, "split %u begins at unit %u", k,
              p.unit_begin);
        CHECK(p.slow_begin == slow && p.slow_end >= slow, "split %u begins at slow %u", k,
              p.slow_begin);
        units = p.unit_end, slow = p.slow_end;
        check_item(l, &s, &r, k, n_splits);
    }
    CHECK(units == r.fast_end && slow == r.n_slow, "splits end at %u, %u", units, slow);
}

static void check_plan(void) {
    rng r = check_rng();
    for (int i = 0; i < 3000 && !check_failed(); i++) {
        static const uint32_t bits[] = {2, 4, 16}, windows[] = {0, 1, 100, 4096};
        kivi_cache_geometry g = kivi_cache_defaults();
        ki_cuda_layout l;
        uint32_t group = 32u << rng_below(&r, 3);
        g.n_layers = 1, g.n_heads = 8, g.n_kv_heads = 8, g.head_dim = 128, g.n_pages = 1;
        g.kv.k_bits = bits[rng_below(&r, 3)], g.kv.v_bits = bits[rng_below(&r, 3)];
        g.kv.group = group, g.kv.residual_tokens = group * (1 + rng_below(&r, 3));
        g.kv.sink_tokens = rng_below(&r, 2) ? rng_below(&r, rng_below(&r, 2) ? 70 : 500) : 0;
        bool plus = rng_below(&r, 4) == 0;
        if (plus) g.kv.k_bits = 2u << rng_below(&r, 2), g.kv.v_bits = 2;
        if (plus) g.kv.group = g.kv.residual_tokens = 128;
        CHECK_OK(ki_cuda_layout_init(&l, &g, plus, err));
        if (check_failed()) return;
        uint32_t n = rng_below(&r, 2) ? rng_below(&r, 700) : rng_below(&r, 140000);
        check_sequence(&l, n, windows[rng_below(&r, 4)], 256u << rng_below(&r, 6));
    }
}

/* ---- prompts in parts (kv_prompt.h) ---- */

/* Token p as the row at pos reads it: its tile is where the row looks for it. */
static void check_old_token(const ki_cuda_layout *l, const ki_cuda_seq *s, const ki_prompt_old *o,
                            uint32_t pos, uint32_t p, bool keys) {
    uint32_t bits = keys ? l->k_bits : l->v_bits, base = p / 64 * 64;
    uint32_t line = keys ? ki_prompt_k_line(l, s, pos) : ki_prompt_v_line(l, s, pos);
    bool exact = bits < 16 && (p < l->sink_tokens || p >= line);
    if (bits == 16 && p >= s->n_tokens) return; /* a row of the step */
    if (exact && p >= s->n_tokens) return;
    int64_t at = ki_prompt_row_at(o, base, exact), n = ki_prompt_tokens(o);
    CHECK(at >= 0 && at + 64 <= n, "%s %u of the row at %u: row %lld of %lld",
          keys ? "key" : "value", p, pos, (long long)at, (long long)n);
    int64_t coded = (int64_t)o->coded_end - o->coded_begin;
    bool is_coded = at >= o->sink_end && at < o->sink_end + coded;
    CHECK(is_coded == !exact, "%s %u of the row at %u in another area", keys ? "key" : "value", p,
          pos);
}

static void check_old(rng *r, const ki_cuda_layout *l, const ki_cuda_seq *s, uint32_t window) {
    ki_prompt_old o = ki_prompt_old_of(l, s, window);
    for (int i = 0; i < 40 && s->n_rows && !check_failed(); i++) {
        uint32_t pos = s->n_tokens + rng_below(r, s->n_rows);
        uint32_t first = window && pos + 1 > window ? pos + 1 - window : 0;
        uint32_t p = first + rng_below(r, pos + 1 - first);
        check_old_token(l, s, &o, pos, p, true);
        check_old_token(l, s, &o, pos, p, false);
    }
}

static bool is_idle(const ki_cuda_seq *s) { return !s->n_rows || s->flags & KI_CUDA_ELSEWHERE; }

/* Every sequence and head is in one part, in order, those with nothing to do in none, and no two
 * share rows of the scratch. */
static void check_parts_of(const ki_prompt_step *step) {
    const ki_cuda_layout *l = step->layout;
    ki_prompt_part part = {0};
    uint32_t seq = 0, head = 0;
    while (ki_prompt_next(&part, step) && !check_failed()) {
        while (head == 0 && seq < step->n_seqs && is_idle(&step->seqs[seq])) seq++;
        uint64_t n_bytes = (uint64_t)part.head_tokens * part.n_heads * l->head_dim * 4;
        uint32_t end = 0;
        CHECK(part.first_seq == seq && part.first_head == head, "part at %u, %u, not %u, %u",
              part.first_seq, part.first_head, seq, head);
        CHECK(part.n_seqs && part.n_heads && head + part.n_heads <= l->n_kv_heads, "an empty part");
        CHECK(n_bytes <= step->scratch_bytes, "%llu bytes of %llu", (unsigned long long)n_bytes,
              (unsigned long long)step->scratch_bytes);
        for (uint32_t i = seq; i < seq + part.n_seqs; i++) {
            CHECK(!is_idle(&step->seqs[i]), "sequence %u has nothing to do", i);
            if (check_failed()) return;
            ki_prompt_old o = ki_prompt_old_of(l, &step->seqs[i], step->window);
            CHECK(step->seqs[i].scratch_at == end, "sequence %u at %u, not %u", i,
                  step->seqs[i].scratch_at, end);
            end += ki_prompt_tokens(&o);
            CHECK(ki_prompt_tokens(&o) <= part.max_tokens, "more tokens than the most");
        }
        CHECK(end == part.head_tokens, "%u rows of %u", end, part.head_tokens);
        head += part.n_heads;
        if (head == l->n_kv_heads) head = 0, seq += part.n_seqs;
    }
    while (seq < step->n_seqs && is_idle(&step->seqs[seq])) seq++;
    CHECK(seq == step->n_seqs && head == 0, "parts end at %u, %u", seq, head);
}

static void check_parts(void) {
    enum { SEQS = 5 };
    static const uint32_t bits[] = {2, 4, 16}, windows[] = {0, 0, 100, 1000};
    static const kivi_rule rules[] = {KIVI_RULE_PAPER, KIVI_RULE_STREAM, KIVI_RULE_SPAN};
    rng r = check_rng();
    for (int i = 0; i < 2000 && !check_failed(); i++) {
        kivi_cache_geometry g = kivi_cache_defaults();
        ki_cuda_layout l;
        ki_cuda_seq seqs[SEQS] = {{0}};
        uint32_t group = 32u << rng_below(&r, 3), window = windows[rng_below(&r, 4)], longest = 1;
        g.n_layers = 1, g.n_heads = 8, g.n_kv_heads = 1 + rng_below(&r, 2), g.head_dim = 128;
        g.n_pages = 1;
        if (g.n_kv_heads == 2) g.n_kv_heads = 8;
        g.kv.k_bits = bits[rng_below(&r, 3)], g.kv.v_bits = bits[rng_below(&r, 3)];
        g.kv.group = group, g.kv.residual_tokens = group * (1 + rng_below(&r, 3));
        g.kv.sink_tokens = rng_below(&r, 2) ? rng_below(&r, 300) : 0;
        g.kv.rule = rules[rng_below(&r, 3)];
        g.kv.span_tokens = g.kv.rule == KIVI_RULE_SPAN ? 128 * (1 + rng_below(&r, 8)) : 0;
        CHECK_OK(ki_cuda_layout_init(&l, &g, false, err));
        for (int k = 0; k < SEQS && !check_failed(); k++) {
            ki_cuda_seq *s = &seqs[k];
            s->n_tokens = rng_below(&r, 3) ? rng_below(&r, 5000) : 0;
            s->n_rows = rng_below(&r, 5) ? 1 + rng_below(&r, 700) : 0;
            s->run_start = rng_below(&r, 2) ? rng_below(&r, s->n_tokens + 1) : 0;
            s->flags = rng_below(&r, 4) ? KI_CUDA_PROMPT : 0;
            if (rng_below(&r, 4) == 0) s->flags |= KI_CUDA_ELSEWHERE;
            longest = KI_MAX(longest, s->n_tokens + s->n_rows);
            check_old(&r, &l, s, window);
        }
        ki_prompt_step step = {&l, seqs, SEQS, window, 0};
        step.scratch_bytes = ki_prompt_scratch_bytes(&l, longest, SEQS, rng_below(&r, 32u << 20));
        ki_prompt_place(seqs, &step);
        if (!check_failed()) check_parts_of(&step);
    }
}

static void check_layouts(void) {
    kivi_cache_geometry g = kivi_cache_defaults();
    ki_cuda_layout l;
    kivi_error error = {0};
    g.n_layers = 32, g.n_heads = 32, g.n_kv_heads = 8, g.head_dim = 128;
    g.kv.k_bits = g.kv.v_bits = 2, g.kv.group = 32, g.kv.residual_tokens = 128;
    g.kv.rewind_tokens = 0;
    CHECK_OK(ki_cuda_layout_init(&l, &g, false, err));
    CHECK(l.page_bytes == 12288 && l.sub_bytes == 3072, "kivi2 has %u bytes a page", l.page_bytes);
    CHECK(l.k_ring_blocks == 4 && l.v_ring_blocks == 5, "rings of %u and %u blocks",
          l.k_ring_blocks, l.v_ring_blocks);
    CHECK_OK(ki_cuda_layout_init(&l, &g, true, err));
    /* DESIGN.md 11: 2.51 bits an element */
    CHECK(fabs(l.page_bytes * 8.0 / (2 * 128 * 128) - 2.51) < 0.005, "kivi2+ has %u bytes a page",
          l.page_bytes);
    g.kv.k_bits = 4;
    CHECK_OK(ki_cuda_layout_init(&l, &g, true, err));
    CHECK(fabs(l.page_bytes * 8.0 / (2 * 128 * 128) - 3.25) < 0.005, "k4v2+");
    g.kv.v_bits = 3;
    CHECK_OK(ki_cuda_layout_init(&l, &g, true, err));
    CHECK(fabs(l.page_bytes * 8.0 / (2 * 128 * 128) - 3.75) < 0.005, "k4v3+");
    g.kv.k_bits = 2;
    CHECK(ki_cuda_layout_init(&l, &g, true, &error) == KIVI_ARG, "2/3 bits: %s", error.text);
    g.head_dim = 112;
    CHECK(ki_cuda_layout_init(&l, &g, false, &error) == KIVI_UNSUPPORTED, "head size 112");
}

/* ---- shared memory (kv_shared.h) ---- */

/* What a thread block may have at compute capability 8.6 and 8.9, 8.0, 9.0. */
static const uint32_t limits[] = {99 << 10, 163 << 10, 227 << 10};

static void check_fit(const ki_cuda_layout *l) {
    for (int i = 0; i < 3 && !check_failed(); i++) {
        ki_decode_choice decode, many;
        ki_prompt_config prompt;
        CHECK_OK(ki_cuda_kernels_fit(l, limits[i], err));
        CHECK(ki_decode_choose(&decode, l, limits[i], false) && decode.shared_bytes <= limits[i] &&
                  decode.shared_bytes >= ki_decode_bytes(l, decode.warps, 1),
              "decode attention: %u bytes of %u", decode.shared_bytes, limits[i]);
        CHECK(decode.warps && decode.warps <= 4, "%u warps", decode.warps);
        CHECK(ki_decode_choose(&many, l, limits[i], true) && many.shared_bytes <= limits[i] &&
                  many.warps <= decode.warps &&
                  (many.index == decode.index || many.index == decode.index + 1),
              "decode attention of many: number %u of %u warps", many.index, many.warps);
        CHECK(ki_prompt_config_of(&prompt, l->head_dim, limits[i]) &&
                  prompt.shared_bytes + KI_PROMPT_STATIC_BYTES <= limits[i],
              "prompts: %u bytes of %u", prompt.shared_bytes, limits[i]);
        CHECK(ki_codes_bytes(l) <= limits[i], "codes: %u bytes", ki_codes_bytes(l));
        CHECK(ki_close_bytes(l) <= limits[i], "closing: %u bytes", ki_close_bytes(l));
    }
}

/* All kinds that the fused kernels serve, for each number of query heads that has a shape. */
static void check_shared(void) {
    static const uint32_t bits[] = {2, 4, 8, 16}, groups[] = {1, 2, 4, 8, 20};
    static const uint32_t plus[][2] = {{2, 2}, {4, 2}, {4, 3}};
    kivi_error error = {0};
    ki_cuda_layout l;
    for (int n = 0; n < N_DIMS * 5; n++) {
        kivi_cache_geometry g = kivi_cache_defaults();
        g.n_layers = 1, g.n_kv_heads = 2, g.n_heads = 2 * groups[n % 5], g.n_pages = 1;
        g.head_dim = head_dims[n / 5];
        g.kv.residual_tokens = 128;
        for (int k = 0; k < 16; k++)
            for (g.kv.group = 32; g.kv.group <= 128; g.kv.group *= 2) {
                if (g.head_dim % g.kv.group) continue;
                g.kv.k_bits = bits[k / 4], g.kv.v_bits = bits[k % 4];
                CHECK_OK(ki_cuda_layout_init(&l, &g, false, err));
                if (!check_failed()) check_fit(&l);
            }
        for (int k = 0; k < 3; k++) {
            g.kv.group = 128, g.kv.k_bits = plus[k][0], g.kv.v_bits = plus[k][1];
            CHECK_OK(ki_cuda_layout_init(&l, &g, true, err));
            if (!check_failed()) check_fit(&l);
        }
    }
    /* the fastest shape where there is room, less where there is not, and refusals by name */
    ki_decode_choice most, least;
    CHECK(ki_decode_choose(&most, &l, limits[2], false) &&
              ki_decode_choose(&least, &l, limits[0], false) && most.warps == 2 && least.warps == 2,
          "k4v3+ at head size 256: %u and %u warps", most.warps, least.warps);
    CHECK(ki_cuda_kernels_fit(&l, 40 << 10, &error) == KIVI_UNSUPPORTED &&
              strstr(error.text, "head size 256") && strstr(error.text, "40960"),
          "%s", error.text);
}

/* Which steps are cuDNN's to attend: against each row's own lines, and in words for `paper`. */
static void check_whole(void) {
    rng r = check_rng();
    for (int i = 0; i < 20000 && !check_failed(); i++) {
        static const uint32_t bits[] = {2, 4, 16};
        kivi_cache_geometry g = kivi_cache_defaults();
        ki_cuda_layout l;
        g.n_layers = 1, g.n_heads = 8, g.n_kv_heads = 8, g.head_dim = 128, g.n_pages = 1;
        g.kv.k_bits = bits[rng_below(&r, 3)], g.kv.v_bits = bits[rng_below(&r, 3)];
        g.kv.group = 32, g.kv.residual_tokens = 32 * (1 + rng_below(&r, 4));
        g.kv.rule = (kivi_rule)rng_below(&r, 3), g.kv.span_tokens = 256;
        CHECK_OK(ki_cuda_layout_init(&l, &g, false, err));
        if (check_failed()) return;
        ki_cuda_seq s = {.n_tokens = rng_below(&r, 2) ? rng_below(&r, 400) : 0,
                         .n_rows = rng_below(&r, 500),
                         .flags = rng_below(&r, 4) ? KI_CUDA_PROMPT : 0};
        s.run_start = rng_below(&r, 2) ? s.n_tokens : 0;
        bool whole = s.n_tokens == 0 && s.n_rows > 0;
        for (uint32_t pos = 0; pos < s.n_rows && s.n_tokens == 0; pos++)
            whole = whole && (l.k_bits == 16 || ki_cuda_k_exact(&l, &s, pos) == 0) &&
                    (l.v_bits == 16 || ki_cuda_v_exact(&l, &s, pos) == 0);
        CHECK(!ki_plan_is_whole(&l, &s) == !whole, "%u rows behind %u, rule %u, %u/%u bits: %d",
              s.n_rows, s.n_tokens, l.rule, l.k_bits, l.v_bits, whole);
        if (l.rule == KIVI_RULE_PAPER && s.flags)
            CHECK(whole == (s.n_tokens == 0 && s.n_rows > 0), "a prompt under `paper`");
    }
}

static void check_records(void) {
    static const uint32_t rows[][2] = {{1, 2048},    {1024, 2048},  {2048, 2048},  {2049, 8192},
                                       {8192, 8192}, {8193, 32768}, {32768, 32768}};
    int32_t record[KI_SDPA_RECORD_BYTES / 4];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        CHECK(ki_sdpa_rows(rows[i][0]) == rows[i][1], "%u rows take the plan of %u", rows[i][0],
              ki_sdpa_rows(rows[i][0]));
    ki_sdpa_record(record, 1025, 32, 8, 128);
    for (int i = 0; i < KI_SDPA_RECORD_BYTES / 4; i++) {
        int32_t want = i == 0 ? 1025 : i == 5 ? 1025 * 4096 : i == 9 ? 1025 * 1024 : 0;
        CHECK(record[i] == want, "word %d is %d", i, record[i]);
    }
}

/* ---- products of few rows (stream_plan.h) ---- */

/* What a block of stream.cu has beside the plan's bytes: barriers and the sums of norms. */
enum { STREAM_STATIC_BYTES = 768 };

typedef struct product_shape {
    uint32_t n, k;
    bool gated, normed;
} product_shape;

/* A layer's products in their order, and the output matrix: qkv, o, gate and up, down. */
static void shapes_of(product_shape (*out)[5], const uint32_t (*sizes)[4]) {
    uint32_t d = (*sizes)[0], qkv = (*sizes)[1], ff = (*sizes)[2], vocab = (*sizes)[3];
    const product_shape shapes[5] = {
        {qkv, d, false, true}, {d, d, false, false},     {2 * ff, d, true, true},
        {d, ff, false, false}, {vocab, d, false, false},
    };
    memcpy(*out, shapes, sizeof shapes);
}

static ki_stream_plan plan_of(const product_shape *y, uint32_t m, ki_stream_part part,
                              const ki_stream_device *d) {
    static float raw[1];
    static char act[1];
    ki_stream_call c = {.n = y->n, .k = y->k, .m = m, .part = part, .pace = KI_STREAM_BESIDE};
    bool takes_norm = m <= KI_STREAM_NORM_ROWS && y->k <= (m == 1 ? 8192 : 4096);
    if (y->normed && takes_norm) c.raw = raw;
    if (y->gated) c.act_out = act;
    return ki_stream_plan_of(&c, d);
}

/* All outputs once, all columns, and no more shared memory than there is. */
static void check_stream_plan(const product_shape *y, uint32_t m, const ki_stream_plan *p,
                              const ki_stream_device *d) {
    uint32_t tiles = y->gated ? (y->n / 2 + 7) / 8 : (y->n + 15) / 16;
    uint32_t n = p->n_blocks / p->cluster;
    CHECK(p->n_blocks % p->cluster == 0 && p->n_full >= 1 && p->n_full <= n &&
              p->n_full * p->tiles + (n - p->n_full) * (p->tiles - 1) == tiles,
          "%ux%u: %u of %u clusters have %u of %u tiles", y->n, y->k, p->n_full, n, p->tiles,
          tiles);
    CHECK(p->parts * p->chunks * KI_STREAM_CHUNK >= y->k && p->here * p->cluster == p->parts,
          "%ux%u: %u parts of %u chunks", y->n, y->k, p->parts, p->chunks);
    CHECK(p->tiles <= KI_STREAM_MOST_TILES * (KI_STREAM_WARPS / p->here), "%u tiles", p->tiles);
    CHECK(p->n_stages % p->at_once == 0, "%u stages, %u at once", p->n_stages, p->at_once);
    CHECK(p->n_stages >= 1 && p->n_stages <= KI_STREAM_MOST_STAGES &&
              p->n_stages * p->stage_bytes <= p->ring_bytes,
          "%u stages", p->n_stages);
    uint32_t sums = (p->cluster > 1 ? 1 : m) * p->parts * p->tiles * KI_STREAM_TILE * 4;
    CHECK(p->sums_bytes == (p->held_bytes ? sums : 0), "%u bytes of sums", p->sums_bytes);
    CHECK(p->ring_bytes + m * p->held_bytes + p->sums_bytes + KI_STREAM_ALIGNMENT <=
              p->shared_bytes,
          "%ux%u, %u rows: %u bytes are few", y->n, y->k, m, p->shared_bytes);
    CHECK(p->here << p->group_bits == KI_STREAM_WARPS, "%u parts, 2^%u warps each", p->here,
          p->group_bits);
    CHECK(p->shared_bytes + STREAM_STATIC_BYTES <= d->most_bytes, "%ux%u, %u rows: %u of %u bytes",
          y->n, y->k, m, p->shared_bytes, d->most_bytes);
}

static uint32_t place_bytes(uint32_t bytes) {
    return bytes + STREAM_STATIC_BYTES + KI_STREAM_SYSTEM_BYTES;
}

/* Llama-2-7B, Mistral-7B, Llama-3.2-1B, SmolLM2-135M, Falcon-7B's widths, Llama-2-70B: embedding,
 * q, k and v, feed-forward, vocabulary. */
static const uint32_t stream_sizes[][4] = {
    {4096, 12288, 11008, 32000}, {4096, 6144, 14336, 32768}, {2048, 3072, 8192, 128256},
    {576, 960, 1536, 49152},     {4544, 4672, 18176, 65024}, {8192, 10240, 28672, 32000}};

static void check_stream(void) {
    const ki_stream_device devices[] = {{132, 227 << 10, 30, 66, 1692, true},
                                        {78, 227 << 10, 18, 39, 1692, true},
                                        {108, 163 << 10, 1, 1, 1100, false},
                                        {84, 99 << 10, 1, 1, 400, false}};
    static const uint32_t rows[] = {1, 2, 3, 4, 8, 16, 32, 64};
    product_shape shapes[5];
    for (size_t i = 0; i < 6 * 4 * 8 && !check_failed(); i++) {
        const ki_stream_device *d = &devices[i / 8 % 4];
        uint32_t m = rows[i % 8];
        if (d->bulk && m > KI_STREAM_NORM_ROWS) continue; /* stream_wide.h's */
        shapes_of(&shapes, &stream_sizes[i / 32]);
        for (uint32_t k = 0; k < 5; k++)
            for (int part = 0; part < 3; part++) {
                ki_stream_plan p = plan_of(&shapes[k], m, (ki_stream_part)part, d);
                check_stream_plan(&shapes[k], m, &p, d);
                CHECK(!p.pace == !(m == 1 && d->bulk), "a pace of %u cycles", p.pace);
            }
    }
}

/* The same of products by wgmma; of two thread blocks a multiprocessor, which begin at once. */
static void check_wide_plan(const product_shape *y, uint32_t x_rows, uint32_t n_sms) {
    static char act[1];
    ki_stream_call c = {.n = y->n, .k = y->k, .act_out = y->gated ? act : NULL};
    ki_wide_plan p = ki_wide_plan_of(&c, x_rows, n_sms);
    uint32_t n = y->gated ? y->n / 2 : y->n, tiles = p.n_blocks / p.parts;
    CHECK(p.n_blocks % p.parts == 0 && tiles * p.rows >= n && (tiles - 1) * p.rows < n,
          "%ux%u: %u tiles of %u of %u", y->n, y->k, tiles, p.rows, n);
    CHECK(p.room >= p.rows && p.room % 8 == 0 && p.all_room == p.room * (y->gated ? 2 : 1) &&
              p.all_room <= KI_WIDE_MOST_TILES * KI_WIDE_TILE,
          "%ux%u: %u rows in %u of %u", y->n, y->k, p.rows, p.room, p.all_room);
    CHECK(p.parts * p.chunks * KI_STREAM_CHUNK >= y->k && p.turns * p.pieces >= p.chunks,
          "%ux%u: %u chunks, %u turns of %u", y->n, y->k, p.chunks, p.turns, p.pieces);
    CHECK(p.piece_bytes % KI_STREAM_ALIGNMENT == 0 && p.box_bytes <= p.piece_bytes &&
              p.stage_bytes == p.pieces * p.piece_bytes,
          "%u bytes of a stage", p.stage_bytes);
    CHECK(p.n_stages >= KI_MIN(p.turns, (uint32_t)KI_WIDE_LEAST_STAGES) &&
              p.n_stages <= KI_STREAM_MOST_STAGES && p.n_ahead >= 1 && p.n_ahead <= p.n_stages,
          "%ux%u: %u stages, %u ahead", y->n, y->k, p.n_stages, p.n_ahead);
    CHECK(p.n_stages * p.stage_bytes + KI_STREAM_ALIGNMENT <= p.shared_bytes &&
              x_rows * p.all_room * 4 + KI_STREAM_ALIGNMENT <= p.shared_bytes &&
              p.shared_bytes <= KI_WIDE_BLOCK_BYTES,
          "%ux%u: %u bytes", y->n, y->k, p.shared_bytes);
    CHECK(ki_wide_has_room(&p, x_rows), "%ux%u: no room for sums of %u blocks", y->n, y->k,
          p.n_blocks);
}

static void check_wide(void) {
    static const uint32_t sms[] = {132, 114, 78, 16, 1};
    product_shape shapes[5];
    CHECK(KI_WIDE_BLOCKS * (KI_WIDE_BLOCK_BYTES + KI_STREAM_SYSTEM_BYTES) <=
              (227 << 10) + KI_STREAM_SYSTEM_BYTES,
          "two blocks of %u bytes", KI_WIDE_BLOCK_BYTES);
    for (size_t i = 0; i < 6 * 4 * 5 && !check_failed(); i++) {
        shapes_of(&shapes, &stream_sizes[i / 20]);
        for (uint32_t k = 0; k < 5 && !check_failed(); k++)
            check_wide_plan(&shapes[k], 8u << i / 5 % 4, sms[i % 5]);
    }
}

/* On a Hopper neighbours of a chain have room beside each other, and two of the larger have none;
 * of one row decode attention has it beside either. */
static void check_places(void) {
    const ki_stream_device d = {132, 227 << 10, 30, 66, 1692, true};
    const uint32_t all = d.most_bytes + KI_STREAM_SYSTEM_BYTES;
    kivi_cache_geometry g = kivi_cache_defaults();
    ki_decode_choice attention;
    ki_cuda_layout l;
    g.n_layers = 1, g.n_heads = 32, g.n_kv_heads = 32, g.head_dim = 128, g.n_pages = 1;
    g.kv.k_bits = g.kv.v_bits = 2, g.kv.group = 32, g.kv.residual_tokens = 128;
    CHECK_OK(ki_cuda_layout_init(&l, &g, false, err));
    CHECK(ki_decode_choose(&attention, &l, d.most_bytes, false), "no kernel");
    for (uint32_t m = 1; m <= KI_STREAM_NORM_ROWS && !check_failed(); m++)
        for (int i = 0; i < 2; i++) {
            product_shape shapes[5];
            ki_stream_plan p[4];
            shapes_of(&shapes, &stream_sizes[i]);
            for (uint32_t k = 0; k < 4; k++)
                p[k] = plan_of(&shapes[k], m, k % 2 ? KI_STREAM_SECOND : KI_STREAM_FIRST, &d);
            for (uint32_t k = 0; k < 4; k++) {
                uint32_t mine = place_bytes(p[k].shared_bytes);
                uint32_t next = place_bytes(p[(k + 1) % 4].shared_bytes);
                bool is_larger = k % 2 == (m == 1);
                CHECK(mine + next <= all, "%u rows, product %u: %u and %u bytes", m, k, mine, next);
                CHECK(!is_larger || p[k].shared_bytes + KI_STREAM_SYSTEM_BYTES > all / 2,
                      "%u rows, product %u: two of %u bytes fit", m, k, p[k].shared_bytes);
                CHECK(m > 1 || mine + place_bytes(attention.shared_bytes) <= all,
                      "product %u: %u bytes, attention %u", k, mine, attention.shared_bytes);
                CHECK(m > 1 || p[k].n_blocks == d.n_sms, "product %u: %u blocks", k, p[k].n_blocks);
            }
        }
}

void check_cuda(void) {
    if (check_case("cuda/order")) {
        check_orders();
        check_end();
    }
    if (check_case("cuda/pages")) {
        check_pages();
        check_end();
    }
    if (check_case("cuda/plus-pages")) {
        check_plus_pages();
        check_end();
    }
    if (check_case("cuda/plan")) {
        check_plan();
        check_end();
    }
    if (check_case("cuda/parts")) {
        check_parts();
        check_end();
    }
    if (check_case("cuda/shared")) {
        check_shared();
        check_end();
    }
    if (check_case("cuda/stream")) {
        check_stream();
        check_wide();
        check_places();
        check_end();
    }
    if (check_case("cuda/whole")) {
        check_whole();
        check_end();
    }
    if (check_case("cuda/records")) {
        check_records();
        check_end();
    }
    if (check_case("cuda/layouts")) {
        check_layouts();
        check_end();
    }
}
