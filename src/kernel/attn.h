/* attn.h: fused attention over one tile (a page of 128 tokens of one KV head) for a block of
 * queries.
 *
 * score(t) = q . k(t), softmax over the visible t, out = sum_t p(t) v(t), with q already divided by
 * sqrt(D). With x = q and a group of keys, or x = p and a group of values:
 *
 *     sum x (code s + z) = sum (x s) code + sum x z        the second sum is one number a group
 *
 * x s becomes an integer r of 15 bits in units of step = largest |x s| / 16256 of the group, in two
 * signed bytes, 128 high + low; so a product with codes is an exact integer dot product, and does
 * not depend on how many lanes add it up. What rounding took from x s meets the codes' centre
 * (2^bits - 1) / 2 in float32, so that a weight rounded to 0 still counts:
 *
 *     sum x (code s + z) = step sum r code + bias,  bias = sum x (z + centre s) - step centre sum r
 *
 * The error is some hundred times below that of 2-bit codes. Everything else is float32 in a fixed
 * order. Codes are unpacked in registers, once for up to four queries (heads of the group, rows of
 * a prompt). The 16-bit part (window, sinks, or a cache that is not quantized) comes in blocks of
 * 16 tokens:
 *     keys    [D][16] f16   tokens in the lanes      values  [16][D] f16   channels in the lanes
 *
 * An online softmax carries (m, l, acc) from tile to tile: m the largest score so far, l = sum e^(s
 * - m), acc = sum e^(s - m) v. Ranges of tiles are merged by ki_attn_merge in the order of their
 * positions. */
#ifndef KI_ATTN_H
#define KI_ATTN_H
#include "quant.h"

enum { KI_TILE_BLOCKS = KI_PAGE_TOKENS / KI_LANES, KI_MAX_HEAD_DIM = 256 };

/* From one row of scratch to the next, in numbers and in bytes: a cache line more than a power of
 * two, or all rows would lie in the same few sets of level 1. */
enum { KI_SCRATCH_ROW = KI_MAX_HEAD_DIM + 16, KI_SCRATCH_BYTE_ROW = KI_MAX_HEAD_DIM + 64 };

/* Where a tile's keys and values are. Planes of a kind that does not quantize are NULL. */
typedef struct ki_attn_tile {
    unsigned head_dim, k_group, v_group, k_bits, v_bits;
    const uint32_t *k_words;          /* quant.h's order */
    const uint32_t *k_wide;           /* plus.h's wide plane; NULL: no channel is wide */
    const uint8_t *k_list;            /* [D / 4], its channels; NULL where k_wide is */
    const uint16_t *k_scale, *k_zero; /* [128 / k_group][D] f16 */
    const uint32_t *v_words;
    const uint32_t *v_third;          /* plus.h's third plane, of 3-bit values */
    const uint16_t *v_scale, *v_zero; /* [D / v_group][128] f16; zero NULL: it is -scale times half
                                         of the largest code */
    const uint16_t *
        k_blocks[KI_TILE_BLOCKS]; /* each [D][16] f16; read only where a query sees a key exactly */
    const uint16_t *v_blocks[KI_TILE_BLOCKS]; /* each [16][D] f16 */
    /* What comes after this tile: its planes are too short, and too far from this one's, for the
     * hardware to see them coming. Asked for, never read. */
    const void *next;
    size_t next_bytes;
} ki_attn_tile;

/* One query head of one row. Token numbers are relative to the tile, 0..128; tokens [first, end)
 * are visible, of these [first, sink_end) and [k_exact, end) (v_exact for values) are read in 16
 * bit, the rest from the codes. k_exact is a multiple of 16, sink_end any number: the block it lies
 * in is exact up to it only. An empty range leaves the state as it is. */
typedef struct ki_attn_query {
    const float *q; /* [D] f32, scaled */
    uint16_t first, end, sink_end, k_exact, v_exact;
    float m, l; /* state; m = -INFINITY, l = 0 at the start */
    float *acc; /* [D] f32, zeroed at the start */
} ki_attn_query;

/* Scratch of one worker, in bytes. */
size_t ki_attn_scratch_bytes(void);

typedef struct ki_attn_kernels {
    void (*tile)(const ki_attn_tile *tile, ki_attn_query *queries, unsigned n_queries,
                 void *scratch);
    /* (m, l, acc) becomes the state over both ranges; acc and acc2 [D]. */
    void (*merge)(float *m, float *l, float *acc, float m2, float l2, const float *acc2,
                  unsigned head_dim);
    /* out [D] = acc / l; zeros when nothing was visible. */
    void (*finish)(float *out, float l, const float *acc, unsigned head_dim);
} ki_attn_kernels;

#endif
