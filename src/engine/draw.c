/* draw.c: model/draw.h's definition in C. */
#include "engine.h"

#include <assert.h>

/* ---- edits ---- */

kivi_status ki_editor_init(ki_editor *e, ki_mem *mem, uint32_t n_vocab, uint32_t max_edits,
                           kivi_error *err) {
    void *p;
    *e = (ki_editor){.mem = mem, .max_edits = KI_MIN(max_edits, n_vocab)};
    KI_TRY(ki_alloc_array(&p, mem, KI_TAG_workspace, n_vocab, sizeof *e->places, err));
    e->places = p;
    KI_TRY(
        ki_alloc_array(&p, mem, KI_TAG_workspace, KI_MAX(e->max_edits, 1u), sizeof *e->edits, err));
    e->edits = p;
    return KIVI_OK;
}

void ki_editor_deinit(ki_editor *e) {
    if (!e->mem) return;
    ki_free(e->mem, e->places);
    ki_free(e->mem, e->edits);
    *e = (ki_editor){0};
}

void ki_editor_clear(ki_editor *e) {
    for (uint32_t i = 0; i < e->n_edits; i++) e->places[e->edits[i].id] = 0;
    e->n_edits = 0;
}

ki_draw_edit *ki_editor_at(ki_editor *e, int32_t id) {
    uint32_t *place = &e->places[id];
    if (!*place) {
        assert(e->n_edits < e->max_edits);
        e->edits[e->n_edits] = (ki_draw_edit){.id = id};
        *place = ++e->n_edits;
    }
    return &e->edits[*place - 1];
}

void ki_draw_edit_logits(float *logits, const ki_draw *d) {
    for (uint32_t i = 0; i < d->n_edits; i++) {
        float *x = &logits[d->edits[i].id];
        *x = ki_draw_edited(*x, &d->edits[i], d->repetition, d->frequency, d->presence);
    }
}

void ki_draw_hide_ends(float *logits, uint32_t n_vocab, const ki_draw *d) {
    uint32_t n_left = 0, n_ends = 0, n_flagged = 0;
    for (uint32_t i = 0; i < d->n_edits; i++) {
        if (!(d->edits[i].what & KI_EDIT_END)) continue;
        n_flagged++;
        n_ends += logits[d->edits[i].id] > -INFINITY;
    }
    if (!n_flagged) return;
    for (uint32_t i = 0; i < n_vocab && n_left <= n_ends; i++) n_left += logits[i] > -INFINITY;
    if (n_left <= n_ends) return;
    for (uint32_t i = 0; i < d->n_edits; i++)
        if (d->edits[i].what & KI_EDIT_END) logits[d->edits[i].id] = -INFINITY;
}

/* ---- candidates ---- */

/* Sixteen maxima side by side, which compilers know how to keep in registers; then where it is. A
 * comparison with what is not a number is false, so it counts only as the first of all. */
int32_t kivi_logits_argmax(const float *logits, uint32_t n_vocab) {
    float best[16], most = logits[0];
    uint32_t n_whole = n_vocab / 16 * 16;
    for (uint32_t j = 0; j < 16; j++) best[j] = most;
    for (uint32_t i = 0; i < n_whole; i += 16)
        for (uint32_t j = 0; j < 16; j++)
            best[j] = logits[i + j] > best[j] ? logits[i + j] : best[j];
    for (uint32_t j = 0; j < 16; j++) most = best[j] > most ? best[j] : most;
    for (uint32_t i = n_whole; i < n_vocab; i++) most = logits[i] > most ? logits[i] : most;
    for (uint32_t i = 0; i < n_vocab; i++)
        if (logits[i] == most) return (int32_t)i;
    return 0;
}

/* A total order, best first, so that there is one outcome. */
static int by_logit(const ki_candidate *x, const ki_candidate *y) {
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

/* Heaps: sign 1 has the worst on top, -1 the best. */
static void sift_down(ki_candidate *heap, uint32_t n, uint32_t i, ki_candidate c, int sign) {
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && sign * by_logit(&heap[child + 1], &heap[child]) > 0) child++;
        if (sign * by_logit(&c, &heap[child]) >= 0) break;
        heap[i] = heap[child];
    }
    heap[i] = c;
}

static void make_heap(ki_candidate *all, uint32_t n, int sign) {
    for (uint32_t i = n / 2; i-- > 0;) sift_down(all, n, i, all[i], sign);
}

/* Candidates best first, as far as they are asked for: a heap whose best moves behind it. Sorting a
 * whole vocabulary would take longer than a small model's step. */
typedef struct ranking {
    ki_candidate *all;
    uint32_t n, n_heap;
    float best;   /* logit */
    uint64_t sum; /* of all weights */
} ranking;

static const ki_candidate *ranked(ranking *r, uint32_t index) {
    while (r->n - r->n_heap <= index) {
        ki_candidate best = r->all[0];
        r->n_heap--;
        sift_down(r->all, r->n_heap, 0, r->all[r->n_heap], -1);
        r->all[r->n_heap] = best;
    }
    return &r->all[r->n - 1 - index];
}

/* The top-k, or all that may have a weight. */
static ranking gather(ki_candidate *all, const float *logits, uint32_t n_vocab, const ki_draw *d) {
    uint32_t k = d->top_k ? KI_MIN(d->top_k, n_vocab) : n_vocab, n = 0;
    float best = logits[kivi_logits_argmax(logits, n_vocab)];
    float floor = best + (KI_DRAW_LOWEST - 1) * d->temperature; /* well below the lowest x */
    for (uint32_t i = 0; i < n_vocab; i++) {
        ki_candidate c = {.logit = logits[i], .id = (int32_t)i};
        if (!(c.logit >= floor)) continue;
        if (n == k) {
            if (by_logit(&c, &all[0]) < 0) sift_down(all, n, 0, c, 1);
            continue;
        }
        all[n++] = c;
        if (n == k && k < n_vocab) make_heap(all, n, 1);
    }
    ranking r = {.all = all, .n = n, .n_heap = n, .best = best};
    for (uint32_t i = 0; i < n; i++) {
        all[i].weight = ki_draw_weight(ki_draw_x(all[i].logit, best, d->temperature));
        r.sum += all[i].weight;
    }
    make_heap(all, n, -1);
    return r;
}

/* The weights of the candidates that stay. */
static uint64_t cut(ranking *r, const ki_draw *d) {
    uint64_t kept = 0;
    if (d->top_p >= 1 && d->min_x == -INFINITY) return r->sum;
    for (uint32_t i = 0; i < r->n && kept < r->sum; i++) {
        const ki_candidate *c = ranked(r, i);
        bool enough = d->top_p < 1 && (double)kept >= (double)d->top_p * (double)r->sum;
        if (i && (enough || ki_draw_x(c->logit, r->best, d->temperature) < d->min_x)) break;
        kept += c->weight;
    }
    return kept;
}

int32_t ki_sample(ki_candidate *all, const float *logits, uint32_t n_vocab, const ki_draw *d) {
    if (d->temperature == 0) {
        int32_t id = kivi_logits_argmax(logits, n_vocab);
        return isnan(logits[id]) ? -1 : id;
    }
    ranking r = gather(all, logits, n_vocab, d);
    if (r.n == 0 || r.sum == 0) return -1;
    uint64_t kept = cut(&r, d), target = (uint64_t)(d->u * (double)kept), sum = 0;
    target = KI_MIN(target, kept - 1); /* u < 1, but the product is rounded */
    for (uint32_t i = 0; i < r.n; i++) {
        const ki_candidate *c = ranked(&r, i);
        if ((sum += c->weight) > target) return c->id;
    }
    return -1; /* not reached: all weights together exceed the target */
}

double ki_sample_draw(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

float ki_draw_min_x(float min_p) { return min_p > 0 ? logf(min_p) : -INFINITY; }
