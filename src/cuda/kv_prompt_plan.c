/* kv_prompt_plan.c: a step of prompts in parts whose old rows fit into the scratch. */
#include "kv_plan.h"
#include "kv_prompt.h"

/* Nothing is to be done for it here: parts have none of these, whose thread blocks would be empty.
 */
static bool is_idle(const ki_cuda_seq *s) { return !s->n_rows || s->flags & KI_CUDA_ELSEWHERE; }

static uint32_t tokens_of(const ki_prompt_step *step, uint32_t i) {
    const ki_cuda_seq *s = &step->seqs[i];
    ki_prompt_old old = ki_prompt_old_of(step->layout, s, step->window);
    return ki_prompt_tokens(&old);
}

/* Bytes of one row of keys and one of values. */
static uint64_t row_bytes(const ki_cuda_layout *l) { return 2 * (uint64_t)l->head_dim * 2; }

/* Sequences from first on that fit with all their heads; the first one in any case. */
static void take_seqs(ki_prompt_part *part, const ki_prompt_step *step, uint32_t first) {
    const ki_cuda_layout *l = step->layout;
    uint64_t room = step->scratch_bytes / (row_bytes(l) * l->n_kv_heads);
    *part = (ki_prompt_part){.first_seq = first};
    for (uint32_t i = first; i < step->n_seqs && !is_idle(&step->seqs[i]); i++) {
        uint32_t n = tokens_of(step, i);
        if (part->n_seqs && n > room - part->head_tokens) break;
        part->head_tokens += n;
        part->max_tokens = KI_MAX(part->max_tokens, n);
        part->n_seqs++;
        if (part->head_tokens > room) break;
    }
}

/* Heads in groups of one size, as few groups as possible. */
static uint32_t group_heads(const ki_prompt_part *part, const ki_prompt_step *step) {
    const ki_cuda_layout *l = step->layout;
    if (!part->head_tokens) return l->n_kv_heads;
    uint64_t most = step->scratch_bytes / (row_bytes(l) * part->head_tokens);
    if (most >= l->n_kv_heads) return l->n_kv_heads;
    uint32_t each = most ? (uint32_t)most : 1;
    uint32_t n_groups = (l->n_kv_heads + each - 1) / each;
    return (l->n_kv_heads + n_groups - 1) / n_groups;
}

bool ki_prompt_next(ki_prompt_part *part, const ki_prompt_step *step) {
    uint32_t next_head = part->first_head + part->n_heads, n_all = step->layout->n_kv_heads;
    if (part->n_seqs && next_head < n_all) {
        part->first_head = next_head;
        part->n_heads = KI_MIN(part->n_heads, n_all - next_head);
        return true;
    }
    uint32_t first = part->first_seq + part->n_seqs;
    while (first < step->n_seqs && is_idle(&step->seqs[first])) first++;
    if (first >= step->n_seqs) return false;
    take_seqs(part, step, first);
    part->n_heads = group_heads(part, step);
    return true;
}

void ki_prompt_place(ki_cuda_seq *seqs, const ki_prompt_step *step) {
    ki_prompt_part part = {0};
    while (ki_prompt_next(&part, step)) {
        uint32_t at = 0;
        for (uint32_t i = part.first_seq; i < part.first_seq + part.n_seqs; i++) {
            seqs[i].scratch_at = at;
            at += tokens_of(step, i);
        }
    }
}

/* Rows of the longest sequence: each old one once, and again those that are read both ways. */
static uint64_t most_tokens(const ki_cuda_layout *l, uint32_t max_tokens) {
    uint64_t twice = l->residual_tokens;
    bool one_side = (l->k_bits == 16) != (l->v_bits == 16);
    if (l->rule == KIVI_RULE_SPAN) twice += l->span_tokens;
    if (one_side || twice > max_tokens) twice = max_tokens;
    /* each area begins and ends with a page that may hold little */
    return max_tokens + twice + l->sink_tokens + 5 * KI_PAGE_TOKENS;
}

uint64_t ki_prompt_scratch_bytes(const ki_cuda_layout *l, uint32_t max_tokens, uint32_t n_seqs,
                                 uint64_t limit_bytes) {
    uint64_t one = most_tokens(l, max_tokens) * row_bytes(l);
    uint64_t all = one * l->n_kv_heads * n_seqs;
    all = KI_MIN(all, limit_bytes);
    return KI_MAX(one, all);
}
