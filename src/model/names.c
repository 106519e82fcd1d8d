#include "model.h"

#include <stdio.h>

/* One line a part: its name in GGUF and in a Hugging Face folder; %u is the layer. */
static const char *const part_names[][2] = {
    [KI_PART_EMBEDDING] = {"token_embd.weight", "model.embed_tokens.weight"},
    [KI_PART_OUTPUT] = {"output.weight", "lm_head.weight"},
    [KI_PART_OUTPUT_NORM] = {"output_norm.weight", "model.norm.weight"},
    [KI_PART_ROPE_FREQ] = {"rope_freqs.weight", "rope_freqs.weight"},
    [KI_PART_ATTN_NORM] = {"blk.%u.attn_norm.weight", "model.layers.%u.input_layernorm.weight"},
    [KI_PART_FFN_NORM] = {"blk.%u.ffn_norm.weight",
                          "model.layers.%u.post_attention_layernorm.weight"},
    [KI_PART_Q] = {"blk.%u.attn_q.weight", "model.layers.%u.self_attn.q_proj.weight"},
    [KI_PART_K] = {"blk.%u.attn_k.weight", "model.layers.%u.self_attn.k_proj.weight"},
    [KI_PART_V] = {"blk.%u.attn_v.weight", "model.layers.%u.self_attn.v_proj.weight"},
    [KI_PART_O] = {"blk.%u.attn_output.weight", "model.layers.%u.self_attn.o_proj.weight"},
    [KI_PART_GATE] = {"blk.%u.ffn_gate.weight", "model.layers.%u.mlp.gate_proj.weight"},
    [KI_PART_UP] = {"blk.%u.ffn_up.weight", "model.layers.%u.mlp.up_proj.weight"},
    [KI_PART_DOWN] = {"blk.%u.ffn_down.weight", "model.layers.%u.mlp.down_proj.weight"},
};

void ki_part_name(char *name, size_t n_bytes, ki_file_kind kind, enum ki_part part,
                  uint32_t layer) {
    const char *pattern = part_names[part][kind == KI_FILE_HF];
    const char *number = strstr(pattern, "%u");
    if (!number) {
        snprintf(name, n_bytes, "%s", pattern);
        return;
    }
    snprintf(name, n_bytes, "%.*s%u%s", (int)(number - pattern), pattern, layer, number + 2);
}
