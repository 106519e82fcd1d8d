/* world.h: caches filled with rows that depend on (token, layer, position) alone, so that any
 * history can be replayed. */
#ifndef KI_WORLD_H
#define KI_WORLD_H
#include "check.h"

typedef struct world {
    kivi_cache_geometry geometry; /* head sizes, kind, pages, rows, threads */
    ki_isa isa;
    ki_mem *mem;            /* NULL: the cache counts for itself */
    uint32_t max_sequences; /* 0: 1 */
} world;

/* Four query heads over two KV heads of 32, kivi2 with residual 32, two layers, 64 pages, one
 * thread. */
world world_small(void);
kivi_status world_create(kivi_cache **out, const world *w, kivi_error *err);
const char *world_rule_name(const kivi_kv_options *kv); /* lent until the next call */

/* Rows of positions [pos, pos + n): k, v [n][Hk][D], q [n][H][D]; NULL parts are skipped. One
 * channel of k has 50 times the others' deviation. */
void world_rows(float *k, float *v, float *q, const ki_layout *l, const uint32_t *tokens,
                uint32_t layer, uint32_t pos, uint32_t n);
/* begin, append and attend for each layer, commit; tokens is indexed by position. out [L][n][H][D],
 * NULL: no attend. A failing step is aborted. */
kivi_status world_step(kivi_seq *seq, const uint32_t *tokens, uint32_t n, float *out,
                       kivi_error *err);
size_t world_out_floats(const ki_layout *l, uint32_t n);
uint64_t world_hash(const void *bytes, size_t n_bytes); /* of outputs, to compare them later */
#endif
