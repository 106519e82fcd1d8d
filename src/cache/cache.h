/* cache.h: the KIVI policy over pages. Implements kivi_cache.h; the engine also uses the batch
 * calls at the end.
 *
 * Where a token's keys and values are:
 *
 *     position   0 ........ S ................ k_packed(n) ........ n
 *                [ sinks    ][ codes in pages  ][ 16-bit store      ]       n = tokens so far
 *
 * S is any number. The 16-bit store of the sinks has whole blocks of 16 tokens; rows behind S in
 * the last one live there instead of in the ring, and are read like the ring's. A key group that
 * begins with sinks is quantized without them: their slots hold a copy of the first other token,
 * so the range is that of the others, and their codes are stored as 0 and never read.
 *
 * k_packed(n) = floor(n / R) R and v_packed(n) = max(0, n - R): the state after n tokens, by
 * DESIGN.md 3. Codes are made as soon as a token falls behind that line; which tokens a *query*
 * reads from the codes is decided by the visibility rule from its position alone, so it cannot
 * depend on how rows were cut into steps.
 *
 * The 16-bit store of a sequence is a ring of 16-token blocks for each layer and KV head: keys
 * [D][16], values [16][D] (attn.h). A prompt needs more rows than the window has; for its duration
 * a larger ring takes the place of the small one and its newest rows go back at the end. */
#ifndef KI_CACHE_H
#define KI_CACHE_H
#include "device.h"
#include "kernel.h"
#include "kivi_cache.h"

/* A cache kind over a geometry: sizes and the offsets of the planes of one page of one layer and KV
 * head. */
typedef struct ki_layout {
    uint32_t window; /* no query reads further back; 0: all is read */
    uint32_t n_layers, n_heads, n_kv_heads, head_dim, head_group; /* head_group = H / Hk */
    kivi_kv_options kv;                                           /* resolved */
    uint32_t k_group, v_group; /* of a key channel, of a value row */
    /* Byte offsets of the planes, in this order; one that the kind has not takes no bytes. */
    size_t k_codes_at, k_wide_at, v_codes_at, v_third_at, k_scale_at, k_zero_at, v_scale_at,
        v_zero_at, k_list_at;
    size_t page_bytes, page_scale_bytes; /* one (layer, KV head); a multiple of 64 */
    uint32_t block_tokens; /* of a block of 16-bit rows: 16, on a device what its kernels want */
    uint32_t k_ring_blocks, v_ring_blocks,
        sink_blocks; /* such blocks of the window, and of the sinks (rounded up) */
} ki_layout;

/* What a kind's pages have. Keys: wide codes and the list of their channels; closed a page at a
 * time, by plus.h, or a group at a time, by quant.h. Values: a third bit, a zero point; turned
 * rows, here and in the 16-bit store. */
static inline bool ki_has_wide(const ki_layout *l) { return l->kv.plus & KIVI_PLUS_WIDE; }
static inline bool ki_has_third(const ki_layout *l) { return l->kv.v_bits == 3; }
static inline bool ki_has_v_zero(const ki_layout *l) {
    return !l->kv.plus || l->kv.plus & KIVI_PLUS_ZERO;
}
static inline bool ki_closes_pages(const ki_layout *l) {
    return l->kv.plus && (l->kv.k_bits == 4 || l->kv.plus & (KIVI_PLUS_WIDE | KIVI_PLUS_FIT));
}
static inline bool ki_is_turned(const ki_layout *l) { return l->kv.plus & KIVI_PLUS_TURN; }

/* The planes of a + kind's keys in a page. */
void ki_layout_keys(ki_plus_keys *out, const ki_layout *layout, uint8_t *page);

/* What a resolved + kind is without, or has of a plain kind: kernels that know whole ones alone
 * refuse it by that. NULL: it is whole, or no + kind. */
const char *ki_plus_not_whole(const kivi_kv_options *kv);

kivi_status ki_layout_init(ki_layout *out, const kivi_cache_geometry *geometry, kivi_error *err);
/* The most pages a sequence of n_tokens holds at once, fed in steps of at most step_rows: with a
 * window those behind it are given back. */
uint32_t ki_layout_pages(const ki_layout *layout, uint32_t n_tokens, uint32_t step_rows);
/* Bytes by tag for n_sequences sequences and n_pages pages: what the allocator will count,
 * computed. */
bool ki_layout_plan(kivi_memory *out, const ki_layout *layout, uint64_t n_pages,
                    uint64_t n_sequences);
/* Blocks of the larger ring of a prompt of n_prompt rows that ends at n_tokens at most and is fed
 * in steps of at most n_rows: room for any of its steps. The window's own where that is enough. */
void ki_layout_prompt_blocks(uint32_t *k_blocks, uint32_t *v_blocks, const ki_layout *layout,
                             uint32_t n_rows, uint32_t n_prompt, uint32_t n_tokens);
/* Its bytes for the longest prompt of n_tokens, which are held beside the window's; 0: no prompt
 * needs one. */
uint64_t ki_layout_prompt_bytes(const ki_layout *layout, uint32_t n_rows, uint32_t n_tokens);

/* ---- pages.c: the pool ---- */
typedef struct ki_pool {
    ki_mem *mem;
    const ki_device *device; /* where data is; NULL: here */
    uint8_t *data; /* [n_pages][L][Hk][page_bytes] */
    uint32_t *counts, *free_list;
    uint32_t n_pages, n_free, n_shared; /* shared: a count above 1 */
    size_t id_bytes; /* bytes of one page id: L * Hk * page_bytes */
    size_t scale_bytes;
} ki_pool;

kivi_status ki_pool_init(ki_pool *pool, ki_mem *mem, const ki_device *device,
                         const ki_layout *layout, uint32_t n_pages, kivi_error *err);
void ki_pool_deinit(ki_pool *pool);
bool ki_pool_take(ki_pool *pool, uint32_t *id); /* count 1, zeroed; false when none is free */
void ki_pool_pin(ki_pool *pool, uint32_t id);
void ki_pool_unpin(ki_pool *pool, uint32_t id);
/* free + referenced = all, counts and free list agree; called after each step in debug builds. */
bool ki_pool_check(const ki_pool *pool);
void ki_pool_copy(ki_pool *pool, uint32_t to, uint32_t from); /* the bytes of a page */

/* ---- the cache and its sequences ---- */
enum { KI_NO_PAGE = -1 }; /* as uint32_t: stands in a block table where a page was given back */

typedef struct ki_attn_work ki_attn_work;

struct kivi_cache {
    ki_mem own_mem, *mem;    /* the engine passes its own */
    const ki_device *device; /* pages and 16-bit rows are there; NULL: here */
    ki_layout layout;
    ki_pool pool;
    const ki_kernels *kernels;
    ki_workers *workers;
    bool owns_workers;
    uint32_t max_step_rows, max_seq_pages;
    ki_attn_work *work;
    ki_counter n_saturated, n_nonfinite;
};

typedef struct ki_store {
    uint16_t *k, *v; /* [L][Hk][blocks][16 D] f16; NULL where the kind keeps that side in pages */
    /* On a device both sides are one block of memory, [L][Hk][k_blocks + v_blocks][block], its
     * own address, and k and v are NULL; a side in pages has 0 blocks. */
    void *there;
    uint32_t k_blocks, v_blocks; /* ring sizes */
} ki_store;

struct kivi_seq {
    kivi_cache *cache;
    uint32_t *pages; /* ids by position; the first n_gone are KI_NO_PAGE: behind the window */
    uint32_t n_pages, max_pages, n_gone;
    uint32_t n_tokens;  /* committed */
    uint32_t step_rows; /* rows of the open step, 0 when none is open */
    uint32_t run_start,
        run_left; /* the prompt being fed: where it began, how many rows are to come */
    ki_store window,
        large;      /* the ring, and the larger one while a prompt runs (k and v NULL otherwise) */
    ki_store sinks; /* block counts are sink_blocks, no ring */
    uint32_t k_valid_from, v_valid_from; /* oldest position whose 16-bit row is still there */
};

typedef struct ki_cache_options {
    kivi_cache_geometry geometry;
    ki_mem *mem;         /* NULL: the cache counts for itself */
    ki_workers *workers; /* NULL: made here */
    ki_isa isa;
    /* Another device holds pages and 16-bit rows, and appends and attends by kernels of its own:
     * this cache is then the policy alone. NULL: all is done here. */
    const ki_device *device;
    void (*adapt)(ki_layout *layout); /* the device's own order of a page's planes; NULL: ours */
    uint32_t max_sequences; /* most sequences in one ki_attend_batch */
    uint32_t max_tokens;    /* longest sequence, for the split states */
} ki_cache_options;
kivi_status ki_cache_create(kivi_cache **out, const ki_cache_options *options, kivi_error *err);

/* Where the 16-bit rows of a sequence are now: its window, or the larger ring of a prompt. */
const ki_store *ki_seq_store(const kivi_seq *seq);

/* Lines behind which codes exist after n tokens. */
uint32_t ki_k_packed(const ki_layout *layout, uint32_t n_tokens);
uint32_t ki_v_packed(const ki_layout *layout, uint32_t n_tokens);
/* From where on the query at pos reads keys (values) in 16 bit. */
uint32_t ki_k_exact(const kivi_seq *seq, uint32_t pos);
uint32_t ki_v_exact(const kivi_seq *seq, uint32_t pos);

uint8_t *ki_seq_page(const kivi_seq *seq, uint32_t index, uint32_t layer, uint32_t head);
const uint16_t *ki_seq_k_block(const kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t block);
const uint16_t *ki_seq_v_block(const kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t block);
/* One 16-bit row [D] in or out (k may be scattered in its block). */
void ki_seq_put_row(const kivi_seq *seq, uint32_t layer, uint32_t head, uint32_t pos,
                    const uint16_t *k, const uint16_t *v);
/* The first position that may still be read or written once no step goes back behind n tokens. */
uint32_t ki_seq_live_from(const ki_layout *layout, uint32_t n_tokens);
/* Gives up the prompt that is being fed, and goes back to n_tokens; ARG as kivi_seq_rewind, the
 * prompt is given up then too. Not within a step. */
kivi_status ki_seq_abandon(kivi_seq *seq, uint32_t n_tokens, kivi_error *err);
/* Gives pages until the table covers n_tokens; FULL leaves everything as it was. */
kivi_status ki_seq_reserve(kivi_seq *seq, uint32_t n_tokens, kivi_error *err);


/* Stores of 16-bit rows: blocks are zeroed; 0 blocks, or a side that the kind keeps in pages: NULL.
 */
kivi_status ki_store_init(ki_store *store, const kivi_cache *cache, uint32_t k_blocks,
                          uint32_t v_blocks, kivi_error *err);
/* On a device a sequence's sinks have blocks for both sides, whichever are in pages. */
kivi_status ki_sinks_init(ki_store *store, const kivi_cache *cache, kivi_error *err);
void ki_store_deinit(ki_store *store, const kivi_cache *cache);
/* The newest rows of n_tokens, as many as both rings hold. */
void ki_store_copy(const kivi_cache *cache, const ki_store *to, const ki_store *from,
                   uint32_t n_tokens);
void ki_store_copy_whole(const kivi_cache *cache, const ki_store *to, const ki_store *from);
/* The first position whose bytes in a page may still change at length n. */
uint32_t ki_first_unwritten(const ki_layout *layout, uint32_t n_tokens);
/* Whether the pages and the 16-bit rows that the state after n tokens needs are all still there. */
bool ki_seq_can_stand_at(const kivi_seq *seq, uint32_t n_tokens);
/* A page that others read too is copied before it is written; FULL. */
kivi_status ki_seq_own_page(kivi_seq *seq, uint32_t index, kivi_error *err);

/* ---- mark.c: the state of a sequence after n tokens, kept without the sequence ---- */

/* Pages are shared by count; the 16-bit rows are the mark's own. */
typedef struct ki_mark {
    kivi_cache *cache;
    uint32_t *pages;
    uint32_t n_tokens, n_pages, n_gone;
    ki_store tail, sinks; /* tail: rows behind the lines of n_tokens, no more */
} ki_mark;

/* What the mark will hold in 16 bit. */
uint64_t ki_mark_bytes(const ki_layout *layout, uint32_t n_tokens);
/* The state after n_tokens of a sequence that can stand there (else ARG), not within a step; within
 * a prompt it is the caller's matter that the rule allows it. Pages that the sequence may still
 * write are copied (FULL), unless is_last says that it will not be used again. */
kivi_status ki_mark_create(ki_mark **out, const kivi_seq *seq, uint32_t n_tokens, bool is_last,
                           kivi_error *err);
void ki_mark_destroy(ki_mark **mark); /* NULL allowed */
/* A new sequence in that state. FULL: no pages for those that it will write. */
kivi_status ki_mark_open(kivi_seq **out, const ki_mark *mark, kivi_error *err);
/* Free pages that ki_mark_create, and ki_mark_open, take. */
uint32_t ki_mark_create_pages(const kivi_seq *seq, uint32_t n_tokens, bool is_last);
uint32_t ki_mark_open_pages(const ki_mark *mark);

/* Rows [n_rows][Hk][D] f32 with row strides (in floats) of one KV head: to float16, into the store,
 * codes where the line moved. Different heads may run at the same time. scratch:
 * ki_append_scratch_bytes(). */
kivi_status ki_append_head(kivi_seq *seq, uint32_t layer, uint32_t head, const float *k,
                           const float *v, size_t row_stride, void *scratch, kivi_error *err);
size_t ki_append_scratch_bytes(const ki_layout *layout);

typedef struct ki_attend_item {
    const kivi_seq *seq; /* in a step of n_rows rows; NULL: skipped */
    uint32_t n_rows;
    const float *q; /* [n_rows][H][D] f32, row stride q_stride floats, unscaled */
    float *out;     /* [n_rows][H][D] f32, row stride out_stride floats */
    size_t q_stride, out_stride;
} ki_attend_item;

/* Attention of one layer for all items, over the cache's workers. window: a query at p sees
 * positions > p - window only; 0: all. At most max_sequences items. */
void ki_attend_batch(kivi_cache *cache, const ki_attend_item *items, size_t n_items, uint32_t layer,
                     uint32_t window);

kivi_status ki_attn_work_create(ki_attn_work **out, ki_mem *mem, const ki_cache_options *options,
                                const ki_layout *layout, unsigned n_threads, kivi_error *err);
void ki_attn_work_destroy(ki_attn_work **work, ki_mem *mem);
void *ki_attn_work_scratch(const ki_attn_work *work,
                           unsigned worker); /* for ki_append_head outside an attend */

#endif
