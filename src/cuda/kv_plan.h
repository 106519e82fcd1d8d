/* kv_plan.h: which blocks a decode query reads how, and how a sequence is cut into splits. Host
 * twins of the device's functions.
 *
 * A unit is `unit_subs` neighbouring 32-token blocks. Units whose tokens are all visible and all
 * read from codes, keys and values, are *fast*: they are streamed through shared memory. All other
 * blocks (window, sinks, the edge of a sliding window, what does not fill a unit) are *slow*, one
 * by one:
 *
 *     block  first/32 ......... fast_begin ........................ fast_end ........... end
 *            [ slow: n_lead   ][ fast units                        ][ slow: the tail     ]
 *
 * A split takes a range of the sequence "fast units, then slow blocks", cut into parts of equal
 * weight. Everything depends on the sequence's own length alone. */
#ifndef KI_KV_PLAN_H
#define KI_KV_PLAN_H
#include "kv_cuda.h"

/* flag of ki_cuda_seq: the query sees exactly the n_tokens in pages, not itself and no window. For
 * measurements of the packed part alone. */
enum { KI_CUDA_PAGES_ONLY = 2 };

/* flag of ki_cuda_seq: attention of the step's rows is somebody else's (sdpa.h):
 * ki_cuda_prompt_attend leaves the sequence alone. */
enum { KI_CUDA_ELSEWHERE = 4 };

/* Whether the step's rows see nothing but each other, all in 16 bit: a whole prompt under `paper`,
 * any first step of a float16 cache, and prompts that end before the rule's first line. */
KI_BOTH int ki_plan_is_whole(const ki_cuda_layout *l, const ki_cuda_seq *s) {
    if (s->n_tokens || !s->n_rows) return 0;
    uint32_t last = s->n_rows - 1;
    return (l->k_bits == 16 || ki_cuda_k_exact(l, s, last) == 0) &&
           (l->v_bits == 16 || ki_cuda_v_exact(l, s, last) == 0);
}

/* A slow block has 8 KB of float16 values (and keys, in the last ones) where a fast one has 3 KB.
 * */
enum { KI_SLOW_WEIGHT = 4, KI_MAX_SPLITS = 4096 };

typedef struct ki_plan_ranges {
    uint32_t first, end;           /* visible positions */
    uint32_t k_exact, v_exact;     /* from there on 16 bit outside of pages */
    uint32_t fast_begin, fast_end; /* units */
    uint32_t lead_begin, n_lead;   /* slow blocks before them */
    uint32_t tail_begin, n_slow;   /* slow blocks behind them begin there; all slow blocks */
} ki_plan_ranges;

KI_BOTH ki_plan_ranges ki_plan_of(const ki_cuda_layout *l, const ki_cuda_seq *s, uint32_t window) {
    ki_plan_ranges r;
    uint32_t pos = s->n_tokens, unit = l->unit_subs, unit_tokens = unit * KI_SUB_TOKENS;
    int pages_only = (s->flags & KI_CUDA_PAGES_ONLY) != 0;
    r.end = pages_only ? pos : pos + 1;
    r.first = window && r.end > window ? r.end - window : 0;
    r.k_exact = pages_only ? pos : ki_cuda_k_exact(l, s, pos);
    r.v_exact = pages_only ? pos : ki_cuda_v_exact(l, s, pos);
    uint32_t coded_from = r.first, coded_to = r.k_exact < r.v_exact ? r.k_exact : r.v_exact;
    if (l->k_bits < 16 || l->v_bits < 16)
        coded_from = l->sink_tokens > r.first ? l->sink_tokens : r.first;
    if (coded_to > r.end) coded_to = r.end;
    r.fast_begin = (coded_from + unit_tokens - 1) / unit_tokens;
    r.fast_end = coded_to / unit_tokens;
    if (r.fast_end < r.fast_begin) r.fast_end = r.fast_begin;
    uint32_t end_block = (r.end + KI_SUB_TOKENS - 1) / KI_SUB_TOKENS;
    r.lead_begin = r.first / KI_SUB_TOKENS;
    uint32_t lead_end = r.fast_begin * unit;
    if (lead_end > end_block) lead_end = end_block;
    r.n_lead = lead_end > r.lead_begin ? lead_end - r.lead_begin : 0;
    r.tail_begin = r.fast_end * unit;
    r.n_slow = r.n_lead + (end_block > r.tail_begin ? end_block - r.tail_begin : 0);
    return r;
}

/* The block of slow number k. */
KI_BOTH uint32_t ki_plan_slow_block(const ki_plan_ranges *r, uint32_t k) {
    return k < r->n_lead ? r->lead_begin + k : r->tail_begin + (k - r->n_lead);
}

/* Splits of a sequence: at least one, so that an empty range still gets its zeros. */
KI_BOTH uint32_t ki_plan_splits(const ki_plan_ranges *r, uint32_t split_tokens,
                                uint32_t max_splits) {
    uint32_t n = (r->end - r->first + split_tokens - 1) / split_tokens;
    n = n < 1 ? 1 : n;
    return n > max_splits ? max_splits : n;
}

typedef struct ki_plan_part {
    uint32_t unit_begin, unit_end; /* fast units */
    uint32_t slow_begin, slow_end; /* slow numbers */
} ki_plan_part;

/* The number of things of weight w, the first at weight `from`, that begin before weight x. */
KI_BOTH uint32_t ki_plan_before(uint64_t x, uint64_t from, uint32_t w, uint32_t n) {
    if (x <= from) return 0;
    uint64_t k = (x - from + w - 1) / w;
    return k < n ? (uint32_t)k : n;
}

KI_BOTH ki_plan_part ki_plan_split(const ki_plan_ranges *r, uint32_t unit, uint32_t split,
                                   uint32_t n_splits) {
    uint32_t n_fast = r->fast_end - r->fast_begin;
    uint64_t fast = (uint64_t)n_fast * unit, all = fast + (uint64_t)r->n_slow * KI_SLOW_WEIGHT;
    uint64_t from = all * split / n_splits, to = all * (split + 1) / n_splits;
    ki_plan_part p;
    p.unit_begin = r->fast_begin + ki_plan_before(from, 0, unit, n_fast);
    p.unit_end = r->fast_begin + ki_plan_before(to, 0, unit, n_fast);
    p.slow_begin = ki_plan_before(from, fast, KI_SLOW_WEIGHT, r->n_slow);
    p.slow_end = ki_plan_before(to, fast, KI_SLOW_WEIGHT, r->n_slow);
    return p;
}

/* Page ids that an item has: of its slow blocks before and behind the fast units, then of its fast
 * units from part.unit_begin on. */
enum { KI_PLAN_UNITS = 10, KI_PLAN_PAGES = 2 + KI_PLAN_UNITS };

/* One work item, as ki_cuda_decode_plan writes it: what a thread block must know before it asks for
 * rows and codes comes in one trip to memory. */
typedef struct ki_plan_item {
    uint32_t row, table, pos, splits; /* splits: number << 16 | this one */
    ki_plan_part part;
    uint32_t lead_begin, n_lead, tail_begin, first;
    uint32_t k_exact, v_exact, end;
    uint32_t k_at, v_at, k_blocks, v_blocks; /* ring: where block tail_begin is; its blocks */
    uint32_t reserved;
    uint64_t ring, sinks;
    uint32_t pages[KI_PLAN_PAGES];
} ki_plan_item;

KI_BOTH ki_plan_item ki_plan_item_of(const ki_cuda_layout *l, const ki_cuda_seq *s,
                                     const ki_plan_ranges *r, uint32_t split, uint32_t n_splits) {
    ki_plan_item p;
    p.row = s->first_row, p.table = s->table, p.pos = s->n_tokens;
    p.splits = n_splits << 16 | split;
    p.part = ki_plan_split(r, l->unit_subs, split, n_splits);
    p.lead_begin = r->lead_begin, p.n_lead = r->n_lead, p.tail_begin = r->tail_begin;
    p.first = r->first, p.end = r->end;
    p.k_exact = r->k_exact, p.v_exact = r->v_exact;
    p.k_blocks = l->k_bits < 16 ? s->k_blocks : 0;
    p.v_blocks = l->v_bits < 16 ? s->v_blocks : 0;
    p.k_at = p.k_blocks ? r->tail_begin % p.k_blocks : 0;
    p.v_at = p.v_blocks ? r->tail_begin % p.v_blocks : 0;
    p.reserved = 0;
    p.ring = s->ring, p.sinks = s->sinks;
    for (int j = 0; j < KI_PLAN_PAGES; j++) p.pages[j] = 0;
    return p;
}

/* The page of the block table whose id is pages[j], or KI_PLAN_NONE where no code is read. */
#define KI_PLAN_NONE UINT32_MAX
KI_BOTH uint32_t ki_plan_page(const ki_plan_item *p, const ki_cuda_layout *l, uint32_t j) {
    uint32_t unit = p->part.unit_begin + j - 2, block = unit * l->unit_subs;
    uint32_t coded = p->k_exact > p->v_exact ? p->k_exact : p->v_exact;
    if (j == 0 && !p->n_lead) return KI_PLAN_NONE;
    if (j >= 2 && unit >= p->part.unit_end) return KI_PLAN_NONE;
    if (j == 0) block = p->lead_begin + p->n_lead - 1;
    if (j == 1) block = p->tail_begin;
    uint32_t page = block / KI_SUBS;
    return page * KI_PAGE_TOKENS < coded && page * KI_PAGE_TOKENS < p->end ? page : KI_PLAN_NONE;
}

/* Which of pages[] has the id of slow block `block`; KI_PLAN_NONE: none, the table has it. */
KI_BOTH uint32_t ki_plan_slow_page(const ki_plan_item *p, uint32_t block) {
    int is_lead = block - p->lead_begin < p->n_lead;
    uint32_t known = is_lead ? p->lead_begin + p->n_lead - 1 : p->tail_begin;
    return block / KI_SUBS == known / KI_SUBS ? (is_lead ? 0u : 1u) : KI_PLAN_NONE;
}

/* Block b of the sequence in a ring of n blocks that has block tail_begin at `at`. */
KI_BOTH uint32_t ki_plan_ring_at(const ki_plan_item *p, uint32_t at, uint32_t n, uint32_t block) {
    uint32_t x = block < p->tail_begin ? block : at + (block - p->tail_begin);
    x = x >= n ? x - n : x;
    x = x >= n ? x - n : x;
    return x >= n ? x % n : x;
}

/* Tokens [from, to) of a block that are read in 16 bit, as numbers in the block, and what is
 * between sinks and the line where a block has both; from == to: none. */
typedef struct ki_plan_rows {
    uint32_t from, to;
} ki_plan_rows;

KI_BOTH ki_plan_rows ki_plan_rows_of(const ki_plan_item *p, uint32_t block, uint32_t exact_from,
                                     uint32_t sinks) {
    uint32_t base = block * KI_SUB_TOKENS, from = p->first > base ? p->first : base;
    uint32_t to = p->end < base + KI_SUB_TOKENS ? p->end : base + KI_SUB_TOKENS;
    uint32_t line = exact_from > from ? exact_from : from, sink_end = sinks < to ? sinks : to;
    ki_plan_rows r = {0, 0};
    if (line < to) r.from = line - base, r.to = to - base;
    if (from >= sink_end) return r;
    r.from = from - base;
    if (line >= to) r.to = sink_end - base;
    return r;
}

/* Whether no row of the block is written in the query's own step. */
KI_BOTH int ki_plan_is_old(const ki_plan_item *p, uint32_t block) {
    return block != p->pos / KI_SUB_TOKENS;
}

/* The workspace: header, one record a slot, the items, the states. */
typedef struct ki_plan_slot {
    uint32_t first_item, n_splits;
} ki_plan_slot;

KI_BOTH uint32_t ki_plan_max_splits(uint32_t max_tokens, uint32_t split_tokens) {
    uint32_t n = (max_tokens + split_tokens - 1) / split_tokens;
    return n < 1 ? 1 : n > KI_MAX_SPLITS ? (uint32_t)KI_MAX_SPLITS : n;
}
KI_BOTH uint64_t ki_plan_items_at(uint32_t n_seqs) {
    return (256 + (uint64_t)n_seqs * sizeof(ki_plan_slot) + 255) / 256 * 256;
}
/* States [items][H][2 + D] f32: largest score, sum, accumulator. */
KI_BOTH uint64_t ki_plan_states_at(uint32_t n_seqs, uint32_t max_splits) {
    uint64_t bytes = (uint64_t)n_seqs * max_splits * sizeof(ki_plan_item);
    return ki_plan_items_at(n_seqs) + (bytes + 255) / 256 * 256;
}

#endif
