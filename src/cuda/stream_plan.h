/* stream_plan.h: what a launch of stream.cu decides, by the host: which thread blocks make which
 * outputs, of which columns, through how large a ring, and which of them find room beside which. */
#ifndef KI_STREAM_PLAN_H
#define KI_STREAM_PLAN_H
#include "stream.h"

enum {
    KI_STREAM_WARPS = 8,      /* that multiply; one more fills the ring */
    KI_STREAM_CHUNK = 64,     /* columns of a stage, four steps of 16 */
    KI_STREAM_TILE = 16,      /* rows of weights */
    KI_STREAM_MOST_TILES = 2, /* of a warp */
    KI_STREAM_MOST_STAGES = 16,
    KI_STREAM_LEAST_FOR_TWO = 4, /* stages, to be filled two at a time */
    KI_STREAM_NORM_ROWS = 4,     /* most rows that a block holds */
    /* Thread blocks that share the parts of an output (sm_90), and of one row: boxes of weights are
     * higher then, and each block reads fewer columns of x. */
    KI_STREAM_CLUSTER = 4,
    KI_STREAM_PAIR = 2
};

/* Bytes: of a row of a box; what shared memory of boxes is aligned to; of barriers and norms' sums;
 * what a block takes beside its stages: barriers, alignment, what the system keeps; of a ring, two
 * of which fit into a multiprocessor; most that rows of x take beside it, so that they do not wait
 * for a box each; what the system keeps of each block. */
enum {
    KI_STREAM_BOX_BYTES = 128,
    KI_STREAM_ALIGNMENT = 1024,
    KI_STREAM_BARRIER_BYTES = 1024,
    KI_STREAM_OWN_BYTES = 2560,
    KI_STREAM_RING_BYTES = 104 << 10,
    KI_STREAM_HELD_BYTES = 24 << 10,
    KI_STREAM_SYSTEM_BYTES = 1024
};

/* A tile: 16 outputs, or 8 of a gate and 8 of its up. */
typedef struct ki_stream_plan {
    uint32_t tiles, n_full;       /* of each of the first n_full clusters; others have one less */
    uint32_t parts, here, chunks; /* of the columns: all, a block's; stages of a part */
    uint32_t group_bits;          /* 2^group_bits warps share a part's tiles */
    uint32_t at_once;             /* stages that are filled at once; n_stages is a multiple of it */
    uint32_t n_stages, part_bytes, stage_bytes, ring_bytes, shared_bytes;
    uint32_t held_bytes; /* of a row of x that is held; 0: rows come with the stages */
    uint32_t sums_bytes; /* of sums of held rows, which stand behind them; 0: where the ring was */
    uint32_t pace;       /* cycles from a stage to the next one, before the product begins */
    uint32_t n_blocks, cluster;
} ki_stream_plan;

typedef struct ki_stream_device {
    uint32_t n_sms, most_bytes;   /* of shared memory of a block */
    uint32_t n_clusters, n_pairs; /* that have a multiprocessor for each block */
    float bytes_per_cycle;        /* of its memory, at the multiprocessors' highest clock */
    bool bulk;                    /* what the kernel was compiled for: sm_90's copies */
} ki_stream_device;

/* Parts that the columns are cut into (stream.h). */
static inline uint32_t ki_stream_parts(uint32_t n) { return n <= 2048 ? 8 : n <= 8192 ? 4 : 1; }

static inline uint32_t ki_stream_over(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

/* Of one row, what stages have less than half of a multiprocessor. A block of SECOND is filled up
 * to half and has 1.3 KB besides; one of FIRST has 2.4 KB besides and fits beside it. */
enum { KI_STREAM_FIRST_LESS = 4096, KI_STREAM_SECOND_LESS = 1536 };

/* What the stages may take: a multiprocessor has room for one FIRST and one SECOND, but not for two
 * of the larger. */
static inline uint32_t ki_stream_budget(const ki_stream_call *c, const ki_stream_device *d,
                                        uint32_t rounds) {
    uint32_t all = d->most_bytes + KI_STREAM_SYSTEM_BYTES, small = all * 3 / 8;
    if (!d->bulk || rounds > 1 || c->part == KI_STREAM_ALONE) return KI_STREAM_RING_BYTES;
    if (c->m == 1)
        return all / 2 -
               (c->part == KI_STREAM_FIRST ? KI_STREAM_FIRST_LESS : KI_STREAM_SECOND_LESS);
    return c->part == KI_STREAM_SECOND ? small : all - small - 2 * KI_STREAM_OWN_BYTES;
}

/* Of the rows that a block has: all of a norm, of x what its parts want, where it is little. */
static inline uint32_t ki_stream_held(const ki_stream_call *c, const ki_stream_plan *p,
                                      const ki_stream_device *d) {
    uint32_t part = p->chunks * KI_STREAM_BOX_BYTES, mine = p->here * part + 16;
    if (c->raw) return p->parts * part + 16;
    return d->bulk && c->m <= KI_STREAM_NORM_ROWS && c->m * mine <= KI_STREAM_HELD_BYTES ? mine : 0;
}

/* Eights of rows of x, as the kernels have them. */
static inline uint32_t ki_stream_eights(uint32_t m) {
    return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8;
}

static inline ki_stream_plan ki_stream_plan_of(const ki_stream_call *c, const ki_stream_device *d) {
    enum { TILE = KI_STREAM_TILE, UNIT = KI_STREAM_ALIGNMENT };
    uint32_t cols = ki_stream_eights(c->m);
    ki_stream_plan p;
    memset(&p, 0, sizeof p);
    uint32_t n_tiles = c->act_out ? ki_stream_over(c->n / 2, TILE / 2) : ki_stream_over(c->n, TILE);
    uint32_t cluster = c->m == 1 ? KI_STREAM_PAIR : KI_STREAM_CLUSTER;
    p.parts = ki_stream_parts(c->n);
    p.chunks = ki_stream_over(ki_stream_over(c->k, KI_STREAM_CHUNK), p.parts);
    p.cluster = d->bulk && p.parts > 1 ? cluster : 1;
    p.here = p.parts / p.cluster;
    while (p.here << (p.group_bits + 1) <= KI_STREAM_WARPS) p.group_bits++;
    uint32_t share = KI_STREAM_MOST_TILES * (KI_STREAM_WARPS / p.here); /* most of a cluster */
    uint32_t places = p.cluster == 1 ? d->n_sms : c->m == 1 ? d->n_pairs : d->n_clusters;
    uint32_t rounds = ki_stream_over(n_tiles, places * share);
    uint32_t n_clusters = KI_MIN(n_tiles, places * rounds);
    p.tiles = ki_stream_over(n_tiles, n_clusters);
    p.n_full = n_tiles - n_clusters * (p.tiles - 1);
    p.n_blocks = n_clusters * p.cluster;
    p.held_bytes = ki_stream_held(c, &p, d);
    p.part_bytes = (p.tiles * TILE + (p.held_bytes ? 0 : cols * 8)) * (uint32_t)KI_STREAM_BOX_BYTES;
    p.stage_bytes = p.here * p.part_bytes;
    if (p.held_bytes)
        p.sums_bytes = (p.cluster > 1 ? 1 : c->m) * p.parts * p.tiles * (uint32_t)TILE * 4;
    uint32_t beside = c->m * p.held_bytes + p.sums_bytes;
    uint32_t fit = (ki_stream_budget(c, d, rounds) - beside) / p.stage_bytes;
    uint32_t most = (d->most_bytes - beside - UNIT - KI_STREAM_BARRIER_BYTES) / p.stage_bytes;
    fit = KI_MIN(fit, (uint32_t)KI_STREAM_MOST_STAGES);
    p.n_stages = KI_MIN(p.chunks, KI_MIN(KI_MAX(2u, fit), KI_MAX(1u, most)));
    p.at_once = d->bulk && p.n_stages >= KI_STREAM_LEAST_FOR_TWO ? 2 : 1;
    p.n_stages -= p.n_stages % p.at_once;
    uint32_t sums = p.sums_bytes ? 0 : p.here * cols * 8 * (p.tiles * TILE + 4) * 4;
    p.ring_bytes = KI_MAX(p.n_stages * p.stage_bytes, ki_stream_over(sums, UNIT) * UNIT);
    p.shared_bytes = p.ring_bytes + beside + UNIT;
    if (d->bulk && rounds == 1 && c->part == (c->m == 1 ? KI_STREAM_SECOND : KI_STREAM_FIRST))
        p.shared_bytes =
            KI_MAX(p.shared_bytes, (d->most_bytes + (uint32_t)KI_STREAM_SYSTEM_BYTES) / 2);
    if (d->bulk && c->m == 1 && c->pace && d->bytes_per_cycle > 0)
        p.pace = (uint32_t)(16.0f / (float)c->pace * (float)p.stage_bytes * (float)p.n_blocks /
                            d->bytes_per_cycle);
    return p;
}

#endif
