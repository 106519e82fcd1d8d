/* sizes.c: what a step needs on the device, in bytes, for the plan that is printed and for the
 * memory that is taken: one table serves both. */
#include "cuda_private.h"

uint32_t ki_cuda_bucket(uint32_t n) {
    uint32_t bucket = 1;
    while (bucket < n) bucket *= 2;
    return bucket;
}

uint32_t ki_cuda_split_of(const ki_cuda_backend *b, const ki_cuda_layout *layout, uint32_t n_seqs,
                          uint32_t max_tokens) {
    return ki_cuda_split_tokens(layout, b->invariant ? 0 : n_seqs, max_tokens, b->n_sms);
}

static size_t align(size_t n) { return (n + 255) / 256 * 256; }

/* The next piece of a block: its offset; *at moves behind it. */
static size_t next(size_t *at, size_t count, size_t item_bytes) {
    size_t here = *at;
    *at = align(here + count * item_bytes);
    return here;
}

static bool is_dynamic(const ki_config *c) {
    return c->rope[0].scaling == KI_ROPE_DYNAMIC || c->rope[1].scaling == KI_ROPE_DYNAMIC;
}

static uint32_t table_stride(const ki_backend_sizes *s) {
    return (s->max_tokens + KI_PAGE_TOKENS - 1) / KI_PAGE_TOKENS;
}

/* Below compute capability 9.0 cuBLASLt's are faster above 16 rows; their bits change with them. */
uint32_t ki_cuda_stream_rows(const ki_cuda_backend *b) {
    enum { FASTEST_ROWS = 16 };
    if (b->type == KI_CUDA_F32 || b->without & KI_PART_STREAM) return 0;
    return b->invariant || b->compute_major >= 9 ? KI_STREAM_ROWS : FASTEST_ROWS;
}

/* Below compute capability 9.0 cuDNN's kernel is of the same make as ours, and was not measured. */
bool ki_cuda_wants_sdpa(const ki_cuda_backend *b, const ki_cuda_layout *layout,
                        const ki_backend_sizes *s) {
    return b->compute_major >= 9 && !(b->without & KI_PART_CUDNN) && b->type != KI_CUDA_F32 &&
           s->n_rows >= KI_SDPA_MIN_ROWS && ki_cuda_is_fused(b, layout, NULL);
}

static void place_transfers(ki_cuda_sizes *o, const ki_config *c, const ki_backend_sizes *s,
                            bool sdpa) {
    size_t half = c->head_dim / 2, at = 0;
    o->upload.number = next(&at, 1, sizeof(uint32_t));
    o->upload.seqs = next(&at, o->n_slots, sizeof(ki_cuda_seq));
    o->upload.tokens = next(&at, o->n_rows, sizeof(int32_t));
    o->upload.positions = next(&at, o->n_rows, sizeof(uint32_t));
    o->upload.logit_rows = next(&at, o->n_logits, sizeof(uint32_t));
    o->upload.tables = next(&at, (size_t)o->n_slots * table_stride(s), sizeof(uint32_t));
    o->upload.frequencies = next(&at, is_dynamic(c) ? o->n_rows * half : 0, sizeof(float));
    o->upload.records = next(&at, sdpa ? s->n_rows / KI_SDPA_MIN_ROWS : 0, KI_SDPA_RECORD_BYTES);
    o->upload.n_bytes = at;
    o->upload.draws = next(&at, o->n_slots, sizeof(ki_cuda_draw));
    o->upload.edits = next(&at, KI_DRAW_EDITS, sizeof(ki_draw_edit));
    o->upload.all_bytes = at;
    at = 0;
    o->result.counters = next(&at, 1, sizeof(ki_cuda_counters));
    o->result.n_done = next(&at, 1, sizeof(uint32_t));
    o->result.row_flags = next(&at, o->n_rows, sizeof(uint32_t));
    o->result.finite = next(&at, o->n_logits, sizeof(uint32_t));
    o->result.best = next(&at, o->n_logits, sizeof(int32_t));
    o->result.drawn = next(&at, o->n_slots, sizeof(int32_t));
    o->result.n_bytes = at;
    o->result.number = next(&at, 1, sizeof(uint32_t));
    o->result.all_bytes = at;
}

/* Floats of norms and biases, and of the frequencies. */
static size_t vectors_of(const ki_config *c) {
    size_t norms = 2 + (c->post_norms ? 2 : 0), per_norm = c->layer_norm ? 2 : 1;
    size_t layer = norms * per_norm * c->n_embd;
    if (c->head_norms) layer += 2 * (size_t)c->head_dim;
    if (c->qkv_bias) layer += (size_t)(c->n_heads + 2 * c->n_kv_heads) * c->head_dim;
    return layer * c->n_layers + 2 * (size_t)c->n_embd + c->n_ropes * c->head_dim / 2;
}

/* Old rows of prompts as attention reads them: more would save launches in steps of many long
 * sequences, and no head of Llama-2-7B at 32,768 tokens would have to wait for another. */
static size_t scratch_of(const ki_cuda_backend *b, const ki_cuda_layout *layout,
                         const ki_backend_sizes *s) {
    const uint64_t most_bytes = 512ull << 20;
    if (!ki_cuda_is_fused(b, layout, NULL) || s->n_rows < 2) return 0;
    /* sequences of a pass that have two rows or more; in the batch-invariant mode one */
    uint32_t n_seqs = b->invariant ? 1 : KI_MIN(s->max_items, s->n_rows / 2);
    return align((size_t)ki_prompt_scratch_bytes(layout, s->max_tokens, n_seqs, most_bytes));
}

static size_t plans_of(const ki_cuda_backend *b, const ki_cuda_layout *layout,
                       const ki_cuda_sizes *o, uint32_t max_tokens) {
    size_t most = 0;
    if (!ki_cuda_is_fused(b, layout, NULL)) return 0;
    for (uint32_t n = 1; n <= o->n_slots; n *= 2) {
        uint32_t split = ki_cuda_split_of(b, layout, n, max_tokens);
        size_t n_bytes = (size_t)ki_cuda_workspace_bytes(layout, n, max_tokens, split);
        most = KI_MAX(most, n_bytes);
    }
    return align(most);
}

bool ki_cuda_sizes_of(ki_cuda_sizes *o, const ki_cuda_backend *b, const ki_config *c,
                      const ki_cuda_layout *layout, const ki_backend_sizes *s) {
    size_t q = (size_t)c->n_heads * c->head_dim, kv = (size_t)c->n_kv_heads * c->head_dim, at = 0;
    size_t element = ki_cuda_element_bytes(b->type);
    bool sdpa = ki_cuda_wants_sdpa(b, layout, s);
    *o = (ki_cuda_sizes){.n_slots = ki_cuda_bucket(s->max_items)};
    o->n_rows = KI_MAX(ki_gemm_rows(s->n_rows), o->n_slots);
    o->n_logits = KI_MAX(ki_gemm_rows(s->n_logit_rows), o->n_slots);
    if (b->invariant) o->n_logits += KI_GEMM_STEP_ROWS; /* of a pass whose rows follow others' */
    place_transfers(o, c, s, sdpa);
    size_t read_rows = o->n_rows + (sdpa ? KI_SDPA_TAIL_ROWS : 0);
    const struct {
        size_t rows, row_bytes;
    } table[] = {
        {o->n_rows, c->n_embd * sizeof(float)},                                /* x */
        {o->n_rows, (q + 2 * kv) * sizeof(float)},                             /* qkv */
        {o->n_rows, (c->no_gate ? 1u : 2u) * (size_t)c->n_ff * sizeof(float)}, /* mlp */
        {o->n_rows, c->post_norms ? c->n_embd * sizeof(float) : 0},            /* delta */
        {o->n_logits, ki_logits_stride(c) * sizeof(float)},                    /* logits */
        {o->n_rows, (size_t)c->n_ropes * c->head_dim * sizeof(float)},         /* rope */
        {o->n_rows, (size_t)c->n_embd * element},                              /* h */
        {o->n_rows, q * element},                                              /* attn */
        {o->n_rows, (size_t)c->n_ff * element},                                /* act */
        {o->n_logits, (size_t)c->n_embd * element},                            /* last */
        {read_rows, q * 2},                                                    /* q16 */
        {read_rows, kv * 2},                                                   /* k_rows */
        {read_rows, kv * 2},                                                   /* v_rows */
        {1, o->upload.all_bytes},
        {1, o->result.n_bytes},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        size_t n_bytes;
        if (!ki_mul(&n_bytes, table[i].rows, table[i].row_bytes)) return false;
        o->offsets[i] = next(&at, n_bytes, 1);
    }
    o->arena_bytes = at;
    o->vector_floats = vectors_of(c);
    o->gemm_bytes = KI_GEMM_WORKSPACE_BYTES;
    o->stream_bytes = KI_STREAM_WORKSPACE_BYTES;
    o->plan_bytes = plans_of(b, layout, o, s->max_tokens);
    o->scratch_bytes = scratch_of(b, layout, s);
    return true;
}
