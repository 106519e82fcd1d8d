/* merge.c: byte-pair merging of one word.
 *
 * The rule: of all neighbours that form a known pair take the one of lowest rank, the leftmost of
 * several, and put the merged token in their place; repeat until there is none.
 *
 * A short word is done as the rule says: n merges, each a look at n ranks, all in one cache line or
 * two. A long one (a line of 10^6 equal characters is one word) would be quadratic, so its symbols
 * form a linked list, and a heap holds (rank, position of the left one). A merge changes the pairs
 * on both its sides; their old entries stay in the heap and are recognised when they surface: each
 * symbol knows the rank of the pair it begins now, and an entry with another rank is stale. */
#include "token_private.h"

enum { SHORT_WORD = 32 };
#define NOBODY UINT32_MAX

kivi_status ki_pairs_init(ki_pairs *pairs, ki_mem *mem, size_t n_merges, kivi_error *err) {
    size_t n_slots = 16;
    while (n_slots / 4 * 3 <= n_merges) n_slots *= 2; /* at most three quarters full */
    void *slots;
    KI_TRY(ki_alloc_array(&slots, mem, KI_TAG_other, n_slots, sizeof *pairs->slots, err));
    *pairs = (ki_pairs){.slots = slots, .mask = n_slots - 1};
    for (size_t i = 0; i < n_slots; i++) pairs->slots[i].rank = KI_NO_RANK;
    return KIVI_OK;
}

void ki_pairs_deinit(ki_pairs *pairs, ki_mem *mem) {
    ki_free(mem, pairs->slots);
    *pairs = (ki_pairs){0};
}

static uint64_t pair_key(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* The slot of the pair, or the free one where it would be. */
static ki_pair *pair_slot(const ki_pairs *pairs, int32_t left, int32_t right) {
    uint64_t key = pair_key(left, right), h = key * 0x9e3779b97f4a7c15u;
    size_t at = (size_t)(h ^ h >> 32) & pairs->mask;
    while (pairs->slots[at].rank != KI_NO_RANK && pairs->slots[at].key != key)
        at = (at + 1) & pairs->mask;
    return &pairs->slots[at];
}

/* Twice the slots; the pairs move over. */
static kivi_status grow(ki_pairs *pairs, ki_mem *mem, kivi_error *err) {
    ki_pairs bigger;
    KI_TRY(ki_pairs_init(&bigger, mem, (pairs->mask + 1) / 4 * 5, err));
    for (size_t i = 0; i <= pairs->mask; i++) {
        ki_pair p = pairs->slots[i];
        if (p.rank != KI_NO_RANK)
            *pair_slot(&bigger, (int32_t)(p.key >> 32), (int32_t)(uint32_t)p.key) = p;
    }
    bigger.n_pairs = pairs->n_pairs;
    ki_pairs_deinit(pairs, mem);
    *pairs = bigger;
    return KIVI_OK;
}

kivi_status ki_pairs_add(ki_pairs *pairs, ki_mem *mem, int32_t left, int32_t right, uint32_t rank,
                         int32_t merged, kivi_error *err) {
    if (pairs->n_pairs >= pairs->mask / 4 * 3) KI_TRY(grow(pairs, mem, err));
    ki_pair *slot = pair_slot(pairs, left, right);
    if (slot->rank != KI_NO_RANK) return KIVI_OK;
    *slot = (ki_pair){pair_key(left, right), rank, merged};
    pairs->n_pairs++;
    return KIVI_OK;
}

static uint32_t pair_rank(const ki_pairs *pairs, int32_t left, int32_t right) {
    return pair_slot(pairs, left, right)->rank;
}

/* ---- short words ---- */

static size_t lowest(const uint32_t *ranks, size_t n_pairs) {
    size_t best = 0;
    for (size_t i = 1; i < n_pairs; i++)
        if (ranks[i] < ranks[best]) best = i;
    return best;
}

static size_t merge_short(const ki_pairs *pairs, int32_t *ids, size_t n) {
    uint32_t ranks[SHORT_WORD]; /* ranks[i]: of ids[i] and ids[i + 1] */
    for (size_t i = 0; i + 1 < n; i++) ranks[i] = pair_rank(pairs, ids[i], ids[i + 1]);
    while (n > 1) {
        size_t at = lowest(ranks, n - 1);
        if (ranks[at] == KI_NO_RANK) break;
        ids[at] = pair_slot(pairs, ids[at], ids[at + 1])->merged;
        memmove(ids + at + 1, ids + at + 2, (n - at - 2) * sizeof *ids);
        memmove(ranks + at, ranks + at + 1, (n - at - 2) * sizeof *ranks);
        n--;
        if (at + 1 < n) ranks[at] = pair_rank(pairs, ids[at], ids[at + 1]);
        if (at > 0) ranks[at - 1] = pair_rank(pairs, ids[at - 1], ids[at]);
    }
    return n;
}

/* ---- long words ---- */

typedef struct symbol {
    int32_t id;
    uint32_t rank;       /* of the pair it begins; KI_NO_RANK: none, or it was merged away */
    uint32_t prev, next; /* NOBODY at the ends */
} symbol;

typedef struct merger {
    const ki_pairs *pairs;
    symbol *symbols; /* [n] */
    uint64_t *heap;  /* [2n] rank << 32 | position, the smallest first */
    size_t n_heap;   /* n - 1 pairs at first; a merge takes one and adds two: below 2n */
} merger;

static void heap_push(merger *m, uint64_t entry) {
    size_t at = m->n_heap++;
    for (; at > 0 && m->heap[(at - 1) / 2] > entry; at = (at - 1) / 2)
        m->heap[at] = m->heap[(at - 1) / 2];
    m->heap[at] = entry;
}

static uint64_t heap_pop(merger *m) {
    uint64_t top = m->heap[0], last = m->heap[--m->n_heap];
    size_t at = 0;
    for (size_t child = 1; child < m->n_heap; child = 2 * at + 1) {
        if (child + 1 < m->n_heap && m->heap[child + 1] < m->heap[child]) child++;
        if (m->heap[child] >= last) break;
        m->heap[at] = m->heap[child];
        at = child;
    }
    m->heap[at] = last;
    return top;
}

/* Looks up the pair that the symbol begins and queues it. */
static void renew(merger *m, uint32_t at) {
    symbol *s = &m->symbols[at];
    s->rank = KI_NO_RANK;
    if (s->next == NOBODY) return;
    s->rank = pair_rank(m->pairs, s->id, m->symbols[s->next].id);
    if (s->rank != KI_NO_RANK) heap_push(m, (uint64_t)s->rank << 32 | at);
}

static void merge_at(merger *m, uint32_t at) {
    symbol *left = &m->symbols[at], *right = &m->symbols[left->next];
    left->id = pair_slot(m->pairs, left->id, right->id)->merged;
    left->next = right->next;
    right->rank = KI_NO_RANK;
    if (left->next != NOBODY) m->symbols[left->next].prev = at;
    renew(m, at);
    if (left->prev != NOBODY) renew(m, left->prev);
}

static void start(merger *m, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        m->symbols[i] = (symbol){ids[i], KI_NO_RANK, i ? (uint32_t)(i - 1) : NOBODY,
                                 i + 1 < n ? (uint32_t)(i + 1) : NOBODY};
    for (size_t i = 0; i < n; i++) renew(m, (uint32_t)i);
}

static size_t merge_long(merger *m, int32_t *ids, size_t n) {
    start(m, ids, n);
    while (m->n_heap) {
        uint64_t entry = heap_pop(m);
        if (m->symbols[(uint32_t)entry].rank == entry >> 32) merge_at(m, (uint32_t)entry);
    }
    size_t n_out = 0; /* the first symbol is never merged away: it is a left one */
    for (uint32_t at = 0; at != NOBODY; at = m->symbols[at].next) ids[n_out++] = m->symbols[at].id;
    return n_out;
}

kivi_status ki_merge(const ki_pairs *pairs, ki_mem *mem, int32_t *ids, size_t *n_ids,
                     kivi_error *err) {
    size_t n = *n_ids, heap_count;
    if (n <= SHORT_WORD) {
        *n_ids = merge_short(pairs, ids, n);
        return KIVI_OK;
    }
    if (n >= NOBODY || !ki_mul(&heap_count, n, 2))
        return KI_FAIL(err, ARG, "tokenizer: a word of %zu bytes", n);
    void *symbols, *heap = NULL;
    KI_TRY(ki_alloc_array(&symbols, mem, KI_TAG_other, n, sizeof(symbol), err));
    kivi_status status = ki_alloc_array(&heap, mem, KI_TAG_other, heap_count, 8, err);
    if (status == KIVI_OK) {
        merger m = {.pairs = pairs, .symbols = symbols, .heap = heap};
        *n_ids = merge_long(&m, ids, n);
    }
    ki_free(mem, heap);
    ki_free(mem, symbols);
    return status;
}

/* ---- whole texts ----
 *
 * Where spaces do not cut a text into words (scored vocabularies), it would be one word of millions
 * of symbols. But a merge can only cross from one symbol to the next if some merge has them as its
 * inner ends; between all others the text falls apart, and each part is merged alone. */

enum { JOINT_BITS = 22 }; /* 512 KiB; with 10^6 joints one cut in five is missed, never one made */

kivi_status ki_joints_init(ki_joints *joints, ki_mem *mem, kivi_error *err) {
    void *bits;
    KI_TRY(ki_alloc(&bits, mem, KI_TAG_other, (size_t)1 << (JOINT_BITS - 3), err));
    joints->bits = bits;
    return KIVI_OK;
}

void ki_joints_deinit(ki_joints *joints, ki_mem *mem) {
    ki_free(mem, joints->bits);
    *joints = (ki_joints){0};
}

static uint32_t joint_hash(int32_t left, int32_t right) {
    return (uint32_t)(pair_key(left, right) * 0x9e3779b97f4a7c15u >> (64 - JOINT_BITS));
}

void ki_joints_add(ki_joints *joints, int32_t left, int32_t right) {
    uint32_t h = joint_hash(left, right);
    joints->bits[h >> 3] |= (uint8_t)(1u << (h & 7));
}

static bool joined(const ki_joints *joints, int32_t left, int32_t right) {
    uint32_t h = joint_hash(left, right);
    return joints->bits[h >> 3] >> (h & 7) & 1;
}

kivi_status ki_merge_parts(const ki_pairs *pairs, const ki_joints *joints, ki_mem *mem,
                           int32_t *ids, size_t *n_ids, kivi_error *err) {
    size_t n_out = 0;
    for (size_t from = 0, to; from < *n_ids; from = to) {
        for (to = from + 1; to < *n_ids && joined(joints, ids[to - 1], ids[to]);) to++;
        size_t n = to - from;
        KI_TRY(ki_merge(pairs, mem, ids + from, &n, err));
        memmove(ids + n_out, ids + from, n * sizeof *ids);
        n_out += n;
    }
    *n_ids = n_out;
    return KIVI_OK;
}
