/* prefix.c: beginnings of sequences that others may go on from.
 *
 * A prefix is named by SHA-256 over its tokens in a chain of pages: the first link takes in what
 * the model, the cache kind and the request's salt are, each other one its predecessor and a page
 * of tokens, and where a prefix ends within a page one more link takes in the rest. So two
 * prefixes of one name hold the same bytes.
 *
 * What is kept is a mark (mark.c): pages by count, and a copy of the 16-bit rows that the next
 * tokens read. Those rows are the larger part at 2 bits, so their sum has a limit of its own, and
 * a long prompt keeps a mark at every n-th page only. */
#include "serve.h"

enum { PAGE = KI_PAGE_TOKENS, SHARE_OF_A_PROMPT = 4 };

typedef uint8_t name[KI_SHA256_BYTES];

static bool same(const name a, const name b) { return !memcmp(a, b, KI_SHA256_BYTES); }

void ki_prefixes_init(ki_prefixes *p, ki_mem *mem, const ki_machine *machine,
                      const kivi_scheduler_options *options) {
    const ki_layout *l = &machine->cache->layout;
    bool is_exact = l->kv.k_bits == 16 && l->kv.v_bits == 16; /* then the rule changes nothing */
    *p = (ki_prefixes){.mem = mem, .machine = machine, .limit_bytes = options->prefix_bytes};
    if (options->no_prefix_cache || machine->no_prefixes) return;
    p->shares_generated = is_exact || l->kv.rule == KIVI_RULE_STREAM;
    if (p->shares_generated) p->unit_tokens = PAGE;
    else if (l->kv.rule == KIVI_RULE_SPAN) p->unit_tokens = l->kv.span_tokens;
}

/* ---- the set of prefixes, by their whole pages, and in the order of their use ---- */

static ki_prefix **bucket_of(ki_prefixes *p, const name parent) {
    uint32_t x;
    memcpy(&x, parent, sizeof x);
    return &p->buckets[x % KI_PREFIX_BUCKETS];
}

static void unlink_use(ki_prefixes *p, ki_prefix *x) {
    *(x->newer ? &x->newer->older : &p->newest) = x->older;
    *(x->older ? &x->older->newer : &p->oldest) = x->newer;
}

static void link_newest(ki_prefixes *p, ki_prefix *x) {
    x->newer = NULL;
    x->older = p->newest;
    *(p->newest ? &p->newest->newer : &p->oldest) = x;
    p->newest = x;
}

static void touch(ki_prefixes *p, ki_prefix *x) {
    unlink_use(p, x);
    link_newest(p, x);
}

static ki_prefix *look_up(ki_prefixes *p, const name parent, const name whole) {
    ki_prefix *x = *bucket_of(p, parent);
    while (x && !(same(x->parent, parent) && same(x->name, whole))) x = x->next_in_bucket;
    return x;
}

static void remove_prefix(ki_prefixes *p, ki_prefix *x) {
    ki_prefix **at = bucket_of(p, x->parent);
    while (*at != x) at = &(*at)->next_in_bucket;
    *at = x->next_in_bucket;
    unlink_use(p, x);
    p->n_bytes -= x->n_bytes;
    p->n--;
    ki_mark_destroy(&x->mark);
    ki_free(p->mem, x);
}

bool ki_prefix_evict(ki_prefixes *p) {
    ki_prefix *x = p->oldest;
    while (x && x->n_in_use) x = x->newer;
    if (!x) return false;
    remove_prefix(p, x);
    p->n_evictions++;
    return true;
}

void ki_prefixes_deinit(ki_prefixes *p) {
    while (p->oldest) remove_prefix(p, p->oldest);
}

/* ---- names ---- */

static void root_name(name out, const ki_machine *m, const ki_request *q) {
    const kivi_kv_options *kv = &m->cache->layout.kv;
    uint32_t kind[] = {kv->k_bits,         kv->v_bits,          kv->plus,
                       kv->group,          kv->residual_tokens, kv->sink_tokens,
                       (uint32_t)kv->rule, kv->span_tokens,     PAGE};
    ki_sha256 s;
    ki_sha256_init(&s);
    ki_sha256_add(&s, "kivi prefix 1", 13);
    ki_sha256_add(&s, &m->fingerprint, sizeof m->fingerprint);
    ki_sha256_add(&s, kind, sizeof kind);
    ki_sha256_add(&s, q->r.salt, q->r.n_salt_bytes);
    ki_sha256_end(out, &s);
}

static int32_t token_at(const ki_choice *c, uint32_t pos) {
    uint32_t n_prompt = (uint32_t)c->request->r.n_prompt;
    return pos < n_prompt ? c->request->r.prompt[pos] : ki_generated_ids(c)[pos - n_prompt];
}

/* The next link: tokens [first, end) of what a choice knows. Lengths differ within a page only, and
 * a whole page and a part of one differ in the number of tokens. */
static void next_name(name out, const name parent, const ki_choice *c, uint32_t first,
                      uint32_t end) {
    int32_t ids[PAGE];
    ki_sha256 s;
    for (uint32_t i = first; i < end; i++) ids[i - first] = token_at(c, i);
    ki_sha256_init(&s);
    ki_sha256_add(&s, parent, KI_SHA256_BYTES);
    ki_sha256_add(&s, ids, (end - first) * sizeof *ids);
    ki_sha256_end(out, &s);
}

/* Names of the prompt's whole pages are made once; false: no memory for them. */
static bool make_chain(ki_prefixes *p, ki_choice *c) {
    ki_request *q = c->request;
    size_t n = q->r.n_prompt / PAGE + 1;
    void *memory;
    if (q->chain) return true;
    if (ki_alloc_array(&memory, p->mem, KI_TAG_other, n, KI_SHA256_BYTES, NULL) != KIVI_OK)
        return false;
    q->chain = memory;
    root_name(q->chain[0], p->machine, q);
    for (uint32_t i = 1; i < n; i++)
        next_name(q->chain[i], q->chain[i - 1], c, (i - 1) * PAGE, i * PAGE);
    return true;
}

/* The name of the first n_pages whole pages, those with generated tokens among them. */
static void page_name(name out, const ki_choice *c, uint32_t n_pages) {
    const ki_request *q = c->request;
    uint32_t known = KI_MIN((uint32_t)q->r.n_prompt / PAGE, n_pages);
    memcpy(out, q->chain[known], KI_SHA256_BYTES);
    for (uint32_t i = known; i < n_pages; i++) next_name(out, out, c, i * PAGE, (i + 1) * PAGE);
}

/* ---- finding ---- */

/* The longest prefix with these whole pages and at most `limit` tokens. */
static ki_prefix *longest_of(ki_prefixes *p, const name parent, const ki_choice *c,
                             uint32_t n_pages, uint32_t limit) {
    ki_prefix *best = NULL;
    for (ki_prefix *x = *bucket_of(p, parent); x; x = x->next_in_bucket) {
        uint32_t n = x->mark->n_tokens;
        name whole;
        if (!same(x->parent, parent) || n > limit || (best && n <= best->mark->n_tokens)) continue;
        if (n % PAGE) next_name(whole, parent, c, n_pages * PAGE, n);
        else memcpy(whole, parent, sizeof whole);
        if (same(whole, x->name)) best = x;
    }
    return best;
}

ki_prefix *ki_prefix_find(ki_prefixes *p, ki_choice *c) {
    uint32_t limit = ki_known(c) - 1; /* the last token's logits are wanted */
    ki_prefix *best = NULL;
    name at;
    if (!p->unit_tokens || p->n == 0 || !make_chain(p, c)) return NULL;
    if (!p->shares_generated) limit = KI_MIN(limit, (uint32_t)c->request->r.n_prompt);
    for (uint32_t n = limit / PAGE + 1; n-- > 0 && !best;) {
        page_name(at, c, n);
        best = longest_of(p, at, c, n, limit);
    }
    if (!best) return NULL;
    touch(p, best);
    best->n_in_use++;
    return best;
}

void ki_prefix_release(ki_prefix *prefix) {
    if (prefix) prefix->n_in_use--;
}

/* ---- keeping ---- */

/* Room for a prefix of n_tokens, at the cost of those used less recently; false: all are in use. */
static bool make_space(ki_prefixes *p, const ki_choice *c, uint32_t n_tokens, bool is_last) {
    uint64_t n_bytes = ki_mark_bytes(&p->machine->cache->layout, n_tokens);
    if (n_bytes > p->limit_bytes) return false;
    while (p->n_bytes + n_bytes > p->limit_bytes)
        if (!ki_prefix_evict(p)) return false;
    const ki_pool *pool = &p->machine->cache->pool;
    uint32_t n_copies = ki_mark_create_pages(c->seq, n_tokens, is_last);
    while (pool->n_free < n_copies)
        if (!ki_prefix_evict(p)) return false;
    return true;
}

static void keep(ki_prefixes *p, ki_choice *c, uint32_t n_tokens, bool is_last) {
    name parent, whole;
    void *memory;
    page_name(parent, c, n_tokens / PAGE);
    memcpy(whole, parent, sizeof whole);
    if (n_tokens % PAGE) next_name(whole, parent, c, n_tokens / PAGE * PAGE, n_tokens);
    ki_prefix *x = look_up(p, parent, whole);
    if (x) {
        touch(p, x);
        return;
    }
    if (!make_space(p, c, n_tokens, is_last)) return;
    if (ki_alloc(&memory, p->mem, KI_TAG_other, sizeof *x, NULL) != KIVI_OK) return;
    x = memory;
    *x = (ki_prefix){.n_bytes = ki_mark_bytes(&p->machine->cache->layout, n_tokens)};
    if (ki_mark_create(&x->mark, c->seq, n_tokens, is_last, NULL) != KIVI_OK) {
        ki_free(p->mem, x);
        return;
    }
    memcpy(x->parent, parent, sizeof parent);
    memcpy(x->name, whole, sizeof whole);
    ki_prefix **bucket = bucket_of(p, parent);
    x->next_in_bucket = *bucket;
    *bucket = x;
    link_newest(p, x);
    p->n_bytes += x->n_bytes;
    p->n++;
}

/* So many units lie between two marks of a prompt that all of them take a part of the limit only.
 */
static uint32_t stride_of(const ki_prefixes *p, uint32_t n_prompt) {
    uint64_t n = n_prompt / p->unit_tokens,
             bytes = ki_mark_bytes(&p->machine->cache->layout, p->unit_tokens);
    uint64_t part = KI_MAX(p->limit_bytes / SHARE_OF_A_PROMPT, 1u);
    return (uint32_t)KI_MAX((n * bytes + part - 1) / part, 1u) * p->unit_tokens;
}

void ki_prefix_offer(ki_prefixes *p, ki_choice *c, bool is_last) {
    uint32_t n_prompt = (uint32_t)c->request->r.n_prompt, length = c->seq->n_tokens;
    if (!p->unit_tokens || !make_chain(p, c)) return;
    uint32_t last = n_prompt / p->unit_tokens * p->unit_tokens, stride = stride_of(p, n_prompt);
    for (uint32_t n; (n = c->n_offered + p->unit_tokens) <= KI_MIN(length, n_prompt);) {
        /* a page that is still written would have to be copied: after the next step it need not */
        if (n == length && n != last && ki_mark_create_pages(c->seq, n, is_last)) break;
        if ((n == last || n % stride == 0) && ki_seq_can_stand_at(c->seq, n))
            keep(p, c, n, is_last);
        c->n_offered = n;
    }
    if (is_last && p->shares_generated && length > n_prompt) keep(p, c, length, true);
}
