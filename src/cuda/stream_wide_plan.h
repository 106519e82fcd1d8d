/* stream_wide_plan.h: what a launch of stream_wide.cu decides, by the host: which thread blocks
 * make which outputs, of which columns, and through how large a ring. */
#ifndef KI_STREAM_WIDE_PLAN_H
#define KI_STREAM_WIDE_PLAN_H
#include "stream_plan.h"

/* TILE: rows of weights that a warpgroup has. BLOCKS: of a multiprocessor. BLOCK_BYTES: of one of
 * two. AHEAD_BYTES: of a block that are on their way at once, when all have begun: with more of
 * them memory gives nothing more, and what is asked for beside them waits longer. */
enum {
    KI_WIDE_TILE = 64,
    KI_WIDE_MOST_TILES = 2,
    KI_WIDE_BLOCKS = 2,
    KI_WIDE_BLOCK_BYTES = 110 << 10,
    KI_WIDE_AHEAD_BYTES = 80 << 10,
    KI_WIDE_LEAST_STAGES = 3
};

/* A block has `rows` outputs, or pairs of a gate and its up, of a part of the columns; in a box
 * their place is `room`, a multiple of 8. A stage has `pieces` chunks: [room for weights, the ups
 * behind the gates][x_rows of x] each. */
typedef struct ki_wide_plan {
    uint32_t rows, room, all_room;
    uint32_t parts, chunks, turns; /* chunks and stages of a part */
    uint32_t n_stages, n_ahead, box_bytes, piece_bytes, stage_bytes, shared_bytes, n_blocks;
    uint32_t pieces;
} ki_wide_plan;

/* The shapes of a block of p->rows, and the stages that fit. */
static inline void ki_wide_fit(ki_wide_plan *p, const ki_stream_call *c, uint32_t x_rows,
                               uint32_t pieces) {
    uint32_t twice = c->act_out ? 2 : 1;
    p->pieces = pieces;
    p->room = ki_stream_over(p->rows, 8) * 8, p->all_room = p->room * twice;
    p->box_bytes = (p->rows * twice + x_rows) * KI_STREAM_BOX_BYTES;
    p->piece_bytes = (p->all_room + x_rows) * KI_STREAM_BOX_BYTES;
    p->stage_bytes = pieces * p->piece_bytes;
    p->turns = ki_stream_over(p->chunks, pieces);
    /* rows of the last tile */
    uint32_t behind = ki_stream_over(p->all_room, KI_WIDE_TILE) * KI_WIDE_TILE - p->all_room;
    uint32_t spare = KI_STREAM_ALIGNMENT;
    if (behind > x_rows) spare += (behind - x_rows) * KI_STREAM_BOX_BYTES;
    uint32_t most = (KI_WIDE_BLOCK_BYTES - spare) / p->stage_bytes;
    p->n_stages = KI_MIN(p->turns, KI_MIN(most, (uint32_t)KI_STREAM_MOST_STAGES));
    p->n_ahead = KI_MIN(p->n_stages, KI_WIDE_AHEAD_BYTES / p->stage_bytes);
    if (!p->n_ahead) p->n_ahead = 1;
    uint32_t sums = x_rows * (p->all_room + 4) * 4;
    p->shared_bytes = KI_MAX(p->n_stages * p->stage_bytes, sums) + spare;
}

/* All blocks at once, two on a multiprocessor; of long columns and many outputs several times. Two
 * chunks a stage, 256 bytes of a row of weights at once, unless three stages would not fit. x_rows:
 * 8, 16, 32 or 64, wgmma's columns. */
static inline ki_wide_plan ki_wide_plan_of(const ki_stream_call *c, uint32_t x_rows,
                                           uint32_t n_sms) {
    uint32_t twice = c->act_out ? 2 : 1, n_all = c->n / twice, rounds = 0;
    ki_wide_plan p = {0};
    p.parts = ki_stream_parts(c->n);
    p.chunks = ki_stream_over(ki_stream_over(c->k, KI_STREAM_CHUNK), p.parts);
    uint32_t places = KI_MAX(1u, n_sms * KI_WIDE_BLOCKS / p.parts);
    do {
        p.rows = ki_stream_over(n_all, places * ++rounds);
    } while (ki_stream_over(p.rows, 8) * 8 * twice > KI_WIDE_MOST_TILES * KI_WIDE_TILE);
    ki_wide_fit(&p, c, x_rows, 2);
    if (p.n_stages < KI_MIN(p.turns, (uint32_t)KI_WIDE_LEAST_STAGES)) ki_wide_fit(&p, c, x_rows, 1);
    p.n_blocks = ki_stream_over(n_all, p.rows) * p.parts;
    return p;
}

/* Whether the workspace has room for a launch's sums: it is made for more multiprocessors than a
 * Hopper has. */
static inline bool ki_wide_has_room(const ki_wide_plan *p, uint32_t x_rows) {
    uint64_t tiles = p->n_blocks / p->parts, sums = (uint64_t)p->n_blocks * x_rows * p->all_room;
    return p->parts == 1 || (tiles * 4 <= KI_STREAM_COUNTER_BYTES &&
                             sums * 4 <= KI_STREAM_WORKSPACE_BYTES - KI_STREAM_COUNTER_BYTES);
}

#endif
