#include "kv_shared.h"

/* ---- attention of prompts ---- */

bool ki_prompt_config_of(ki_prompt_config *out, uint32_t head_dim, uint32_t most_bytes) {
    for (uint32_t k = 0; k < 5; k++) {
        ki_prompt_config c = {
            .n_groups = k < 2 ? 2 : 1, .is_piped = k % 2 == 0 && k < 4, .is_single = k == 4};
        uint32_t n_tiles = c.n_groups * (c.is_piped ? 4 : c.is_single ? 1 : 2);
        c.shared_bytes = (KI_TILE_SETS(head_dim) + n_tiles) * KI_TILE_HALVES(head_dim) * 2;
        *out = c;
        if (c.shared_bytes + KI_PROMPT_STATIC_BYTES <= most_bytes) return true;
    }
    return false;
}

/* ---- decode attention ---- */

typedef struct decode_shape {
    uint32_t k_bits, v_bits, k_group, v_group, unit_subs, warps, stages, blocks;
    bool is_plus, is_flexible;
    uint32_t heads;
} decode_shape;

#define SHAPE(kb, vb, kg, vg, nb, warps, stages, blocks, plus, heads)                              \
    {kb, vb, kg, vg, nb, warps, stages, blocks, plus, KI_DECODE_IS_FLEXIBLE(kb, vg), heads},

static const decode_shape with_named[] = {KI_DECODE_NAMED(SHAPE) KI_DECODE_OTHER(SHAPE, 4){0}};
static const decode_shape others[] = {KI_DECODE_OTHER(SHAPE, 4){0}};
static const decode_shape others_256[] = {KI_DECODE_OTHER(SHAPE, 2){0}};

static const decode_shape *list_of(uint32_t head_dim) {
    if (KI_DECODE_HAS_NAMED(head_dim)) return with_named;
    return head_dim == 256 ? others_256 : others;
}

static bool is_for(const decode_shape *s, const ki_cuda_layout *l) {
    return (!s->k_bits || s->k_bits == l->k_bits) && (!s->v_bits || s->v_bits == l->v_bits) &&
           (!s->k_group || s->k_group == l->k_group) && (!s->v_group || s->v_group == l->v_group) &&
           s->is_plus == (l->is_plus != 0) && s->unit_subs == l->unit_subs &&
           (s->heads == 8 || s->heads >= l->head_group);
}

bool ki_decode_is_many(const ki_cuda_layout *l, uint32_t n_seqs, uint32_t n_sms) {
    return (uint64_t)n_seqs * ki_decode_blocks(l) > 2ull * n_sms;
}

bool ki_decode_choose(ki_decode_choice *out, const ki_cuda_layout *l, uint32_t most_bytes,
                      bool is_many) {
    const decode_shape *list = list_of(l->head_dim);
    for (uint32_t i = 0; list[i].warps; i++) {
        const decode_shape *s = &list[i];
        if (!is_for(s, l)) continue;
        if (is_many && is_for(s + 1, l) && s[1].heads == s->heads && s[1].blocks > s->blocks)
            continue;
        for (uint32_t warps = s->warps; warps; warps--) {
            *out = (ki_decode_choice){i, warps, ki_decode_bytes(l, warps, s->stages)};
            if (out->shared_bytes <= most_bytes) return true;
            if (!s->is_flexible) break;
        }
    }
    return false;
}

/* ---- all kernels ---- */

static kivi_status fit(const char *what, uint32_t bytes, const ki_cuda_layout *l,
                       uint32_t most_bytes, kivi_error *err) {
    if (bytes <= most_bytes) return KIVI_OK;
    return KI_FAIL(err, UNSUPPORTED,
                   "cuda: %s at head size %u, %u/%u bits wants %u bytes of shared memory, a thread "
                   "block of this device has %u",
                   what, l->head_dim, l->k_bits, l->v_bits, bytes, most_bytes);
}

bool ki_cuda_is_built(uint32_t d) { return d == 64 || d == 80 || d == 96 || d == 128 || d == 256; }

static kivi_status check_layout(const ki_cuda_layout *l, kivi_error *err) {
    if (!ki_cuda_is_built(l->head_dim))
        return KI_FAIL(err, UNSUPPORTED, "cuda: head size %u, expected 64, 80, 96, 128 or 256",
                       l->head_dim);
    if (l->k_group >= KI_SUB_TOKENS && l->residual_tokens % KI_SUB_TOKENS == 0) return KIVI_OK;
    return KI_FAIL(err, UNSUPPORTED, "cuda: group %u, residual %u, expected multiples of %d",
                   l->k_group, l->residual_tokens, KI_SUB_TOKENS);
}

kivi_status ki_cuda_kernels_fit(const ki_cuda_layout *l, uint32_t most_bytes, kivi_error *err) {
    ki_decode_choice decode = {0};
    ki_prompt_config prompt;
    KI_TRY(check_layout(l, err));
    bool is_there = ki_decode_choose(&decode, l, most_bytes, false);
    if (!is_there && !decode.warps)
        return KI_FAIL(err, UNSUPPORTED, "cuda: no decode attention for head size %u, %u/%u bits",
                       l->head_dim, l->k_bits, l->v_bits);
    KI_TRY(fit("decode attention", decode.shared_bytes, l, most_bytes, err));
    ki_prompt_config_of(&prompt, l->head_dim, most_bytes);
    KI_TRY(fit("attention of prompts", prompt.shared_bytes + KI_PROMPT_STATIC_BYTES, l, most_bytes,
               err));
    KI_TRY(fit("making codes of prompts", ki_codes_bytes(l), l, most_bytes, err));
    return l->k_bits == 16 ? KIVI_OK : fit("closing keys", ki_close_bytes(l), l, most_bytes, err);
}
