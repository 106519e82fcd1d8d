#include "grammar.h"

#include <stdlib.h>
#include <string.h>

enum {
    MAX_NODES = 1 << 18,
    MAX_FRAMES = 1 << 22,
    MAX_STATES = 1 << 16, /* with all 256 transitions, 64 MiB */
    MAX_MASKS = 256,      /* then all are made anew; a mask of 50,000 tokens takes 6 KiB */
    MAX_DEPTH = 4096,     /* of the C stack in one expansion */
    MAX_TOKEN_BYTES = 512
};

/* ---- the vocabulary ---- */

typedef struct entry {
    const char *bytes;
    uint32_t n_bytes, n_common; /* with the entry before */
    int32_t id;
} entry;

struct token_table {
    uint32_t n_vocab, n_entries;
    entry *entries; /* sorted */
    char *bytes;
};

static int by_bytes(const void *a, const void *b) {
    const entry *x = a, *y = b;
    uint32_t n = x->n_bytes < y->n_bytes ? x->n_bytes : y->n_bytes;
    int order = memcmp(x->bytes, y->bytes, n);
    if (order) return order;
    return x->n_bytes != y->n_bytes ? (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes)
                                    : (x->id > y->id) - (x->id < y->id);
}

/* Places first as offsets: the block moves while it grows. */
static bool gather(token_table *t, size_t (*bytes_of)(void *, int32_t, char *, size_t),
                   void *user) {
    size_t n = 0, cap = 0;
    char token[MAX_TOKEN_BYTES];
    for (uint32_t id = 0; id < t->n_vocab; id++) {
        size_t length = bytes_of(user, (int32_t)id, token, sizeof token);
        if (!length) continue;
        if (n + length > cap) {
            char *bigger = realloc(t->bytes, cap = 2 * cap + 65536);
            if (!bigger) return false;
            t->bytes = bigger;
        }
        memcpy(t->bytes + n, token, length);
        t->entries[t->n_entries++] = (entry){.n_bytes = (uint32_t)length, .id = (int32_t)id};
        n += length;
    }
    for (uint32_t i = 0, at = 0; i < t->n_entries; at += t->entries[i++].n_bytes)
        t->entries[i].bytes = t->bytes + at;
    return true;
}

token_table *token_table_create(uint32_t n_vocab,
                                size_t (*bytes_of)(void *, int32_t, char *, size_t), void *user) {
    token_table *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->n_vocab = n_vocab;
    t->entries = calloc(n_vocab ? n_vocab : 1, sizeof *t->entries);
    if (!t->entries || !gather(t, bytes_of, user)) {
        token_table_destroy(&t);
        return NULL;
    }
    if (t->n_entries) qsort(t->entries, t->n_entries, sizeof *t->entries, by_bytes);
    for (uint32_t i = 1; i < t->n_entries; i++) {
        entry *e = &t->entries[i], *before = e - 1;
        while (e->n_common < e->n_bytes && e->n_common < before->n_bytes &&
               e->bytes[e->n_common] == before->bytes[e->n_common])
            e->n_common++;
    }
    return t;
}

void token_table_destroy(token_table **table) {
    token_table *t = *table;
    if (!t) return;
    free(t->entries);
    free(t->bytes);
    free(t);
    *table = NULL;
}

/* ---- nodes ---- */

enum kind { SET, LITERAL, SEQUENCE, CHOICE, REPEAT, FORWARD };

struct node {
    enum kind kind;
    uint8_t mark;         /* of the search for left recursion: 0 new, 1 on the path, 2 done */
    bool nullable;        /* can match nothing */
    uint32_t n, min, max; /* n: bytes or parts */
    uint64_t set[4];      /* SET */
    union {
        char *bytes;         /* LITERAL */
        struct node **parts; /* SEQUENCE, CHOICE; REPEAT and FORWARD have one */
    } of;
};

/* A place in a node and what comes after it. Frame 0 is the bottom: the end of the output. */
typedef struct frame {
    const node *node;
    uint32_t at, parent;
} frame;

typedef struct state {
    uint32_t first, n; /* its frames in `members`, ascending */
    int32_t *next;     /* [256] or NULL; UNKNOWN where not asked yet */
    uint32_t *mask;    /* or NULL */
} state;

typedef struct numbers {
    uint32_t *items, n, cap;
} numbers;

struct grammar {
    const token_table *table;
    node **nodes, *start;
    uint32_t n_nodes, cap_nodes;
    frame *frames;
    uint32_t n_frames, cap_frames;
    state *states;
    uint32_t n_states, cap_states, n_masks;
    numbers frame_slots, state_slots; /* open addressing; 0 is empty, else number + 1 */
    numbers members, building;
    bool failed;
};

enum { UNKNOWN = -2 };

/* Makes room for one more of n items, in steps that double. */
static bool grow(void **items, uint32_t *cap, uint32_t n, size_t item_bytes, uint32_t most) {
    if (n < *cap) return true;
    if (n >= most) return false;
    uint32_t bigger = *cap ? 2 * *cap : 64;
    void *block = realloc(*items, bigger * item_bytes);
    if (!block) return false;
    *items = block;
    *cap = bigger;
    return true;
}

static bool push_number(numbers *list, uint32_t value) {
    void *items = list->items;
    bool ok = grow(&items, &list->cap, list->n, sizeof value, 1u << 28);
    list->items = items;
    if (ok) list->items[list->n++] = value;
    return ok;
}

grammar *grammar_create(const token_table *table) {
    grammar *g = calloc(1, sizeof *g);
    if (!g) return NULL;
    g->table = table;
    void *frames = NULL;
    if (!grow(&frames, &g->cap_frames, 0, sizeof(frame), MAX_FRAMES)) g->failed = true;
    g->frames = frames;
    if (!g->failed) g->frames[g->n_frames++] = (frame){0};
    return g;
}

void grammar_destroy(grammar **grammar_) {
    grammar *g = *grammar_;
    if (!g) return;
    for (uint32_t i = 0; i < g->n_nodes; i++) {
        if (g->nodes[i]->kind == LITERAL) free(g->nodes[i]->of.bytes);
        else if (g->nodes[i]->kind != SET) free(g->nodes[i]->of.parts);
        free(g->nodes[i]);
    }
    for (uint32_t i = 0; i < g->n_states; i++) {
        free(g->states[i].next);
        free(g->states[i].mask);
    }
    free(g->nodes);
    free(g->frames);
    free(g->states);
    free(g->frame_slots.items);
    free(g->state_slots.items);
    free(g->members.items);
    free(g->building.items);
    free(g);
    *grammar_ = NULL;
}

static node *new_node(grammar *g, enum kind kind) {
    void *items = g->nodes;
    node *n = NULL;
    if (!g->failed && grow(&items, &g->cap_nodes, g->n_nodes, sizeof(node *), MAX_NODES))
        n = calloc(1, sizeof *n);
    g->nodes = items;
    if (!n) {
        g->failed = true;
        return NULL;
    }
    n->kind = kind;
    return g->nodes[g->n_nodes++] = n;
}

node *grammar_range(grammar *g, unsigned first, unsigned last) {
    node *n = new_node(g, SET);
    for (unsigned c = first; n && c <= last; c++) n->set[c / 64] |= (uint64_t)1 << c % 64;
    return n;
}

node *grammar_set(grammar *g, const char *ranges) {
    node *n = new_node(g, SET);
    for (const unsigned char *r = (const unsigned char *)ranges; n && r[0]; r += 2)
        for (unsigned c = r[0]; c <= r[1]; c++) n->set[c / 64] |= (uint64_t)1 << c % 64;
    return n;
}

node *grammar_literal(grammar *g, const char *bytes, size_t n_bytes) {
    if (n_bytes == 0) return grammar_sequence(g, 0, NULL);
    node *n = n_bytes < UINT32_MAX ? new_node(g, LITERAL) : NULL;
    if (!n) return NULL;
    n->of.bytes = malloc(n_bytes);
    if (!n->of.bytes) {
        g->failed = true;
        return NULL;
    }
    memcpy(n->of.bytes, bytes, n_bytes);
    n->n = (uint32_t)n_bytes;
    return n;
}

static node *new_parts(grammar *g, enum kind kind, size_t n_parts, node *const *parts) {
    node *n = new_node(g, kind);
    if (!n) return NULL;
    n->of.parts = calloc(n_parts ? n_parts : 1, sizeof *n->of.parts);
    if (!n->of.parts) g->failed = true;
    for (size_t i = 0; i < n_parts && !g->failed; i++) {
        n->of.parts[i] = parts[i];
        if (!parts[i]) g->failed = true;
    }
    n->n = (uint32_t)n_parts;
    return g->failed ? NULL : n;
}

node *grammar_sequence(grammar *g, size_t n, node *const *parts) {
    return new_parts(g, SEQUENCE, n, parts);
}

node *grammar_choice(grammar *g, size_t n, node *const *parts) {
    return new_parts(g, CHOICE, n, parts);
}

node *grammar_repeat(grammar *g, node *part, uint32_t min, uint32_t max) {
    node *n = new_parts(g, REPEAT, 1, &part);
    if (n) {
        n->min = min;
        n->max = max;
    }
    return n;
}

node *grammar_forward(grammar *g) {
    node *n = new_node(g, FORWARD);
    if (!n) return NULL;
    n->of.parts = calloc(1, sizeof *n->of.parts);
    if (!n->of.parts) g->failed = true;
    n->n = 1;
    return g->failed ? NULL : n;
}

void grammar_resolve(node *forward, node *target) {
    if (forward) forward->of.parts[0] = target;
}

/* ---- checks before the start ---- */

static bool is_nullable(const node *n) {
    switch (n->kind) {
    case SET:
    case LITERAL: return false;
    case REPEAT: return n->min == 0 || n->of.parts[0]->nullable;
    case FORWARD: return n->of.parts[0]->nullable;
    case CHOICE:
        for (uint32_t i = 0; i < n->n; i++)
            if (n->of.parts[i]->nullable) return true;
        return false;
    case SEQUENCE:
        for (uint32_t i = 0; i < n->n; i++)
            if (!n->of.parts[i]->nullable) return false;
        return true;
    }
    return false;
}

static void find_nullable(grammar *g) {
    for (bool changed = true; changed;) {
        changed = false;
        for (uint32_t i = 0; i < g->n_nodes; i++) {
            node *n = g->nodes[i];
            if (n->nullable || !is_nullable(n)) continue;
            n->nullable = changed = true;
        }
    }
}

/* No node reaches itself without a byte: an expansion would not end. */
static bool is_productive(node *n, uint32_t depth) {
    if (n->kind == SET || n->kind == LITERAL || n->mark == 2) return true;
    if (n->mark == 1 || depth > MAX_DEPTH) return false;
    if (n->kind == REPEAT && n->of.parts[0]->nullable) return false;
    n->mark = 1;
    for (uint32_t i = 0; i < n->n || (i == 0 && n->kind == REPEAT); i++) {
        if (!is_productive(n->of.parts[i], depth + 1)) return false;
        if (n->kind == SEQUENCE && !n->of.parts[i]->nullable) break;
    }
    n->mark = 2;
    return true;
}

bool grammar_start(grammar *g, node *start) {
    if (g->failed || !start) return false;
    for (uint32_t i = 0; i < g->n_nodes; i++)
        if (g->nodes[i]->kind == FORWARD && !g->nodes[i]->of.parts[0]) return false;
    find_nullable(g);
    for (uint32_t i = 0; i < g->n_nodes; i++)
        if (!is_productive(g->nodes[i], 0)) return false;
    g->start = start;
    return true;
}

/* ---- frames and states, each kept once ---- */

static uint64_t mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 29;
}

static uint64_t hash_frame(const frame *f) {
    return mix(mix(mix(1, (uint64_t)(uintptr_t)f->node), f->at), f->parent);
}

static uint64_t hash_list(const uint32_t *items, uint32_t n) {
    uint64_t h = n;
    for (uint32_t i = 0; i < n; i++) h = mix(h, items[i]);
    return h;
}

/* A table of twice the size, filled again by the hash of each number. */
static bool widen(numbers *slots, uint32_t n, uint64_t (*hash)(const grammar *, uint32_t),
                  const grammar *g) {
    if (2 * n < slots->cap) return true;
    uint32_t cap = slots->cap ? 2 * slots->cap : 256;
    uint32_t *items = calloc(cap, sizeof *items);
    if (!items) return false;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = (uint32_t)hash(g, i) & (cap - 1);
        while (items[at]) at = (at + 1) & (cap - 1);
        items[at] = i + 1;
    }
    free(slots->items);
    *slots = (numbers){.items = items, .cap = cap};
    return true;
}

static uint64_t frame_hash(const grammar *g, uint32_t i) { return hash_frame(&g->frames[i]); }
static uint64_t state_hash(const grammar *g, uint32_t i) {
    return hash_list(g->members.items + g->states[i].first, g->states[i].n);
}

/* The number of a frame; 0 (which no caller asks for) when there is no room. */
static uint32_t frame_number(grammar *g, const node *n, uint32_t at, uint32_t parent) {
    frame f = {n, at, parent};
    if (!widen(&g->frame_slots, g->n_frames, frame_hash, g)) g->failed = true;
    if (g->failed) return 0;
    uint32_t mask = g->frame_slots.cap - 1, slot = (uint32_t)hash_frame(&f) & mask;
    for (uint32_t i; (i = g->frame_slots.items[slot]) != 0; slot = (slot + 1) & mask) {
        const frame *other = &g->frames[i - 1];
        if (other->node == n && other->at == at && other->parent == parent) return i - 1;
    }
    void *frames = g->frames;
    if (!grow(&frames, &g->cap_frames, g->n_frames, sizeof f, MAX_FRAMES)) g->failed = true;
    g->frames = frames;
    if (g->failed) return 0;
    g->frames[g->n_frames++] = f;
    g->frame_slots.items[slot] = g->n_frames;
    return g->n_frames - 1;
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* The state of the frames that were gathered; GRAMMAR_DEAD: none, or no room. */
static int32_t state_number(grammar *g) {
    numbers *b = &g->building;
    uint32_t n = 0;
    if (g->failed || !b->n) return GRAMMAR_DEAD;
    qsort(b->items, b->n, sizeof *b->items, by_value);
    for (uint32_t i = 0; i < b->n; i++)
        if (!i || b->items[i] != b->items[i - 1]) b->items[n++] = b->items[i];
    if (!widen(&g->state_slots, g->n_states, state_hash, g)) g->failed = true;
    if (g->failed) return GRAMMAR_DEAD;
    uint32_t mask = g->state_slots.cap - 1, slot = (uint32_t)hash_list(b->items, n) & mask;
    for (uint32_t i; (i = g->state_slots.items[slot]) != 0; slot = (slot + 1) & mask) {
        const state *s = &g->states[i - 1];
        if (s->n == n && !memcmp(g->members.items + s->first, b->items, n * sizeof *b->items))
            return (int32_t)i - 1;
    }
    void *states = g->states;
    if (!grow(&states, &g->cap_states, g->n_states, sizeof(state), MAX_STATES)) g->failed = true;
    g->states = states;
    uint32_t first = g->members.n;
    for (uint32_t i = 0; i < n && !g->failed; i++)
        if (!push_number(&g->members, b->items[i])) g->failed = true;
    if (g->failed) return GRAMMAR_DEAD;
    g->states[g->n_states++] = (state){.first = first, .n = n};
    g->state_slots.items[slot] = g->n_states;
    return (int32_t)g->n_states - 1;
}

/* ---- the machine ---- */

static void expand(grammar *g, const node *n, uint32_t after, uint32_t depth);

static void consume(grammar *g, const node *n, uint32_t at, uint32_t after) {
    uint32_t f = frame_number(g, n, at, after);
    if (!g->failed && !push_number(&g->building, f)) g->failed = true;
}

/* count repetitions are done. An unbounded repetition counts to its minimum only, so that it has
 * few states. */
static void expand_repeat(grammar *g, const node *n, uint32_t count, uint32_t after,
                          uint32_t depth);

/* What was on top is matched; goes on with the frame below. */
static void go_on(grammar *g, uint32_t f, uint32_t depth) {
    if (f == 0) {
        if (!push_number(&g->building, 0)) g->failed = true;
        return;
    }
    frame top = g->frames[f];
    if (top.node->kind == REPEAT) {
        expand_repeat(g, top.node, top.at, top.parent, depth + 1);
        return;
    }
    bool is_last = top.at + 1 == top.node->n;
    expand(g, top.node->of.parts[top.at],
           is_last ? top.parent : frame_number(g, top.node, top.at + 1, top.parent), depth + 1);
}

static void expand_repeat(grammar *g, const node *n, uint32_t count, uint32_t after,
                          uint32_t depth) {
    if (count >= n->min) go_on(g, after, depth + 1);
    if (count >= n->max) return;
    uint32_t done = n->max == GRAMMAR_MANY && count >= n->min ? count : count + 1;
    expand(g, n->of.parts[0], frame_number(g, n, done, after), depth + 1);
}

/* Adds the places where the next byte is read when n begins and `after` follows it. */
static void expand(grammar *g, const node *n, uint32_t after, uint32_t depth) {
    if (depth > MAX_DEPTH) g->failed = true;
    if (g->failed) return;
    switch (n->kind) {
    case SET:
    case LITERAL: consume(g, n, 0, after); break;
    case FORWARD: expand(g, n->of.parts[0], after, depth + 1); break;
    case REPEAT: expand_repeat(g, n, 0, after, depth + 1); break;
    case CHOICE:
        for (uint32_t i = 0; i < n->n; i++) expand(g, n->of.parts[i], after, depth + 1);
        break;
    case SEQUENCE:
        if (n->n == 0) go_on(g, after, depth + 1);
        else if (n->n == 1) expand(g, n->of.parts[0], after, depth + 1);
        else expand(g, n->of.parts[0], frame_number(g, n, 1, after), depth + 1);
        break;
    }
}

int32_t grammar_first(grammar *g) {
    g->building.n = 0;
    if (!g->start) return GRAMMAR_DEAD;
    expand(g, g->start, 0, 0);
    return state_number(g);
}

static int32_t compute_next(grammar *g, int32_t from, unsigned char byte) {
    uint32_t first = g->states[from].first, n = g->states[from].n;
    g->building.n = 0;
    for (uint32_t i = 0; i < n && !g->failed; i++) {
        uint32_t number = g->members.items[first + i];
        frame f = g->frames[number];
        if (number == 0) continue;
        if (f.node->kind == SET) {
            if (f.node->set[byte / 64] >> byte % 64 & 1) go_on(g, f.parent, 0);
        } else if ((unsigned char)f.node->of.bytes[f.at] == byte) {
            if (f.at + 1 == f.node->n) go_on(g, f.parent, 0);
            else consume(g, f.node, f.at + 1, f.parent);
        }
    }
    return state_number(g);
}

static int32_t next_state(grammar *g, int32_t from, unsigned char byte) {
    if (from < 0) return GRAMMAR_DEAD;
    int32_t *next = g->states[from].next;
    if (!next) {
        if (!(next = malloc(256 * sizeof *next))) {
            g->failed = true;
            return GRAMMAR_DEAD;
        }
        for (uint32_t i = 0; i < 256; i++) next[i] = UNKNOWN;
        g->states[from].next = next;
    }
    /* The block stays where it is while states are added. */
    if (next[byte] == UNKNOWN) next[byte] = compute_next(g, from, byte);
    return next[byte];
}

int32_t grammar_next(grammar *g, int32_t at, const char *bytes, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes && at >= 0; i++) at = next_state(g, at, (unsigned char)bytes[i]);
    return at;
}

bool grammar_may_end(const grammar *g, int32_t at) {
    return at >= 0 && g->members.items[g->states[at].first] == 0; /* ascending: 0 comes first */
}

bool grammar_must_end(const grammar *g, int32_t at) {
    return grammar_may_end(g, at) && g->states[at].n == 1;
}

/* The vocabulary is walked in order; path[d] is the state after the first d bytes of the entry, so
 * what two neighbours share is not walked again, and what follows a dead prefix is skipped. */
static void fill_mask(grammar *g, int32_t at, uint32_t *mask) {
    int32_t path[MAX_TOKEN_BYTES + 1] = {at};
    uint32_t n_alive = 0; /* bytes of the entry before that the grammar took */
    for (uint32_t i = 0; i < g->table->n_entries && !g->failed; i++) {
        const entry *e = &g->table->entries[i];
        uint32_t d = e->n_common < n_alive ? e->n_common : n_alive;
        if (e->n_common <= n_alive)
            while (d < e->n_bytes &&
                   (path[d + 1] = next_state(g, path[d], (unsigned char)e->bytes[d])) >= 0)
                d++;
        n_alive = d;
        if (d == e->n_bytes) mask[e->id / 32] |= 1u << e->id % 32;
    }
}

static void forget_masks(grammar *g) {
    for (uint32_t i = 0; i < g->n_states; i++) {
        free(g->states[i].mask);
        g->states[i].mask = NULL;
    }
    g->n_masks = 0;
}

const uint32_t *grammar_allowed(grammar *g, int32_t at) {
    if (at < 0) return NULL;
    if (g->states[at].mask) return g->states[at].mask;
    if (g->n_masks == MAX_MASKS) forget_masks(g);
    uint32_t *mask = calloc((g->table->n_vocab + 31) / 32, sizeof *mask);
    if (!mask) return NULL;
    fill_mask(g, at, mask);
    if (g->failed) {
        free(mask);
        return NULL;
    }
    g->n_masks++;
    return g->states[at].mask = mask;
}
