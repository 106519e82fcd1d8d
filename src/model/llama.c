/* llama.c: the Llama family: Llama, Mistral, Qwen2, Qwen3 and Gemma 3. What each has beyond Llama
 * is a flag of its configuration; one pass serves all, read top to bottom (ki_llama_layers).
 *
 *     x = embedding[token]
 *     each layer:  h = norm(x); q, k, v = h W (+ bias)
 *                  (q, k = norm of each head); rope(q), rope(k); append(k, v)
 *                  d = attend(q) Wo; x += d                    Gemma: x += norm(d)
 *                  h = norm(x); d = (act(h Wgate) * h Wup) Wdown; x += d
 *     logits = norm(x) Woutput */
#include "model_private.h"

#include <math.h>
#include <stdio.h>

/* ---- names ---- */

const char *const ki_llama_names[KI_PART_COUNT][2] = {
    [KI_PART_EMBEDDING] = {"token_embd", "model.embed_tokens"},
    [KI_PART_OUTPUT] = {"output", "lm_head"},
    [KI_PART_OUTPUT_NORM] = {"output_norm", "model.norm"},
    [KI_PART_ATTN_NORM] = {"blk.%u.attn_norm", "model.layers.%u.input_layernorm"},
    [KI_PART_FFN_NORM] = {"blk.%u.ffn_norm", "model.layers.%u.post_attention_layernorm"},
    [KI_PART_Q_NORM] = {"blk.%u.attn_q_norm", "model.layers.%u.self_attn.q_norm"},
    [KI_PART_K_NORM] = {"blk.%u.attn_k_norm", "model.layers.%u.self_attn.k_norm"},
    [KI_PART_Q] = {"blk.%u.attn_q", "model.layers.%u.self_attn.q_proj"},
    [KI_PART_K] = {"blk.%u.attn_k", "model.layers.%u.self_attn.k_proj"},
    [KI_PART_V] = {"blk.%u.attn_v", "model.layers.%u.self_attn.v_proj"},
    [KI_PART_O] = {"blk.%u.attn_output", "model.layers.%u.self_attn.o_proj"},
    [KI_PART_GATE] = {"blk.%u.ffn_gate", "model.layers.%u.mlp.gate_proj"},
    [KI_PART_UP] = {"blk.%u.ffn_up", "model.layers.%u.mlp.up_proj"},
    [KI_PART_DOWN] = {"blk.%u.ffn_down", "model.layers.%u.mlp.down_proj"},
};

/* The norm after attention took the name that Llama has for the one before the MLP. */
const char *const ki_gemma_names[KI_PART_COUNT][2] = {
    [KI_PART_EMBEDDING] = {"token_embd", "model.embed_tokens"},
    [KI_PART_OUTPUT] = {"output", "lm_head"},
    [KI_PART_OUTPUT_NORM] = {"output_norm", "model.norm"},
    [KI_PART_ATTN_NORM] = {"blk.%u.attn_norm", "model.layers.%u.input_layernorm"},
    [KI_PART_POST_ATTN_NORM] = {"blk.%u.post_attention_norm",
                                "model.layers.%u.post_attention_layernorm"},
    [KI_PART_FFN_NORM] = {"blk.%u.ffn_norm", "model.layers.%u.pre_feedforward_layernorm"},
    [KI_PART_POST_FFN_NORM] = {"blk.%u.post_ffw_norm",
                               "model.layers.%u.post_feedforward_layernorm"},
    [KI_PART_Q_NORM] = {"blk.%u.attn_q_norm", "model.layers.%u.self_attn.q_norm"},
    [KI_PART_K_NORM] = {"blk.%u.attn_k_norm", "model.layers.%u.self_attn.k_norm"},
    [KI_PART_Q] = {"blk.%u.attn_q", "model.layers.%u.self_attn.q_proj"},
    [KI_PART_K] = {"blk.%u.attn_k", "model.layers.%u.self_attn.k_proj"},
    [KI_PART_V] = {"blk.%u.attn_v", "model.layers.%u.self_attn.v_proj"},
    [KI_PART_O] = {"blk.%u.attn_output", "model.layers.%u.self_attn.o_proj"},
    [KI_PART_GATE] = {"blk.%u.ffn_gate", "model.layers.%u.mlp.gate_proj"},
    [KI_PART_UP] = {"blk.%u.ffn_up", "model.layers.%u.mlp.up_proj"},
    [KI_PART_DOWN] = {"blk.%u.ffn_down", "model.layers.%u.mlp.down_proj"},
};

/* ---- configurations ---- */

static void plain_rope(ki_config *c, ki_reader *r) {
    bool nested = ki_read_kind(r, NULL, "rope_parameters") != KI_VALUE_NONE;
    ki_rope_read(&c->rope[0], r, c, nested ? "rope_parameters" : "rope_scaling", "rope_theta",
                 10000.0);
}

static void want_activation(ki_reader *r, const char *hf, const char *name) {
    char act[32];
    ki_read_text(r, act, sizeof act, NULL, hf);
    if (act[0] && strcmp(act, name)) ki_refuse(r, NULL, hf, act, name);
}

static void read_window(ki_config *c, ki_reader *r) {
    static const char gguf[] = "attention.sliding_window", hf[] = "sliding_window";
    if (ki_read_is_set(r, gguf, hf)) c->window = ki_read_uint(r, gguf, hf, KI_MAX_CTX, KI_MAX_CTX);
}

static void llama_like(ki_config *c, ki_reader *r) {
    ki_config_sizes(c, r, &ki_usual_keys);
    plain_rope(c, r);
    c->tied_output = ki_read_bool(r, NULL, "tie_word_embeddings", false);
    want_activation(r, "hidden_act", "silu");
    ki_refuse_flag(r, "mlp_bias");
}

static void all_local(ki_config *c, ki_reader *r) {
    read_window(c, r);
    for (uint32_t i = 0; i < c->n_layers; i++) c->local[i] = c->window > 0;
}

/* The q and k rows of Llama and Mistral are permuted in GGUF, for a rope of neighbouring pairs. */
void ki_llama_read(ki_config *c, ki_reader *r) {
    llama_like(c, r);
    ki_refuse_flag(r, "attention_bias");
    c->paired_rows = r->is_gguf;
    if (r->is_gguf) all_local(c, r); /* a Mistral calls itself llama there */
    else if (ki_read_is_set(r, NULL, "sliding_window"))
        ki_refuse(r, NULL, "sliding_window", "set", "none");
    if (ki_read_is_set(r, "expert_count", "num_local_experts"))
        ki_refuse(r, "expert_count", "num_local_experts", "set", "a model without experts");
}

/* Every layer has the window, if there is one. */
void ki_mistral_read(ki_config *c, ki_reader *r) {
    llama_like(c, r);
    ki_refuse_flag(r, "attention_bias");
    all_local(c, r);
}

/* Qwen: a window only where use_sliding_window is on, in the layers from max_window_layers on. */
static void qwen_window(ki_config *c, ki_reader *r) {
    if (r->is_gguf || !ki_read_bool(r, NULL, "use_sliding_window", false)) return;
    read_window(c, r);
    if (ki_config_layer_types(c, r)) return;
    uint32_t first = ki_read_uint(r, NULL, "max_window_layers", KI_MAX_LAYERS, 28);
    for (uint32_t i = first; i < c->n_layers; i++) c->local[i] = c->window > 0;
}

void ki_qwen2_read(ki_config *c, ki_reader *r) {
    llama_like(c, r);
    qwen_window(c, r);
    c->qkv_bias = true;
}

void ki_qwen3_read(ki_config *c, ki_reader *r) {
    llama_like(c, r);
    qwen_window(c, r);
    ki_refuse_flag(r, "attention_bias");
    c->head_norms = true;
}

/* Global layers have their own base, and in the larger models a linear factor; local ones neither.
 */
static void gemma_ropes(ki_config *c, ki_reader *r) {
    bool nested = ki_read_kind(r, NULL, "rope_parameters.full_attention") == KI_VALUE_OBJECT ||
                  ki_read_kind(r, NULL, "rope_parameters.sliding_attention") == KI_VALUE_OBJECT;
    c->n_ropes = 2;
    ki_rope_read(&c->rope[0], r, c, nested ? "rope_parameters.full_attention" : "rope_scaling",
                 "rope_theta", 1e6);
    if (!r->is_gguf) {
        ki_rope_read(&c->rope[1], r, c, "rope_parameters.sliding_attention", "rope_local_base_freq",
                     1e4);
        return;
    }
    c->rope[1] = (ki_rope){.factor = 1.0, .attention = 1.0};
    c->rope[1].theta = ki_read_real(r, "rope.freq_base_swa", NULL, 1e4);
}

static void gemma_layers(ki_config *c, ki_reader *r) {
    static const char *const hf = "sliding_window_pattern"; /* older folders */
    read_window(c, r);
    if (ki_config_layer_types(c, r)) return;
    if (ki_read_kind(r, "attention.sliding_window_pattern", hf) == KI_VALUE_ARRAY) {
        ki_refuse(r, "attention.sliding_window_pattern", hf, "an array", "a whole number");
        return;
    }
    uint32_t every = ki_read_uint(r, "attention.sliding_window_pattern", hf, KI_MAX_LAYERS, 6);
    for (uint32_t i = 0; i < c->n_layers && every; i++) c->local[i] = (i + 1) % every != 0;
}

/* In GGUF only the 27B model, of 62 layers, scales its queries by another number than its head
 * size; the file does not say so. */
static double gemma_query_width(const ki_config *c, ki_reader *r) {
    if (!r->is_gguf) return ki_read_real(r, NULL, "query_pre_attn_scalar", 256.0);
    return c->n_layers == 62 && c->n_heads ? (double)c->n_embd / c->n_heads : c->head_dim;
}

void ki_gemma3_read(ki_config *c, ki_reader *r) {
    static const char *const caps[] = {"final_logit_softcapping", "attn_logit_softcapping"};
    ki_config_sizes(c, r, &ki_usual_keys);
    if (!r->is_gguf) c->head_dim = ki_read_uint(r, NULL, "head_dim", KI_MAX_WIDTH, 256);
    gemma_ropes(c, r);
    gemma_layers(c, r);
    c->tied_output = ki_read_bool(r, NULL, "tie_word_embeddings", true);
    want_activation(r, "hidden_activation", "gelu_pytorch_tanh");
    ki_refuse_flag(r, "attention_bias");
    ki_refuse_flag(r, "use_bidirectional_attention");
    for (size_t i = 0; i < sizeof caps / sizeof *caps; i++)
        if (ki_read_kind(r, NULL, caps[i]) != KI_VALUE_NONE) /* GGUF's: ki_config_sizes */
            ki_refuse(r, NULL, caps[i], "set", "none");
    c->head_norms = c->post_norms = c->tanh_gelu = true;
    c->norm_plus_one = !r->is_gguf;
    c->embed_scale = sqrtf((float)c->n_embd);
    c->query_scale = (float)sqrt((double)c->head_dim / gemma_query_width(c, r));
}

/* ---- the pass ---- */

/* x += what the last block made, normalized first where the family does that; then h = norm(x). */
static void add_row(ki_pass *p, uint32_t row) {
    uint32_t n = p->m->config.n_embd;
    float *delta = p->a->delta + (size_t)row * n;
    if (p->post_norm && p->post_norm->weight) ki_pass_norm(p, delta, delta, p->post_norm, n);
    p->dense->add(p->a->x + (size_t)row * n, delta, n);
    if (p->norm) ki_pass_norm_row(p, row);
}

static void gate_row(ki_pass *p, uint32_t row) {
    const ki_config *c = &p->m->config;
    float *gate = p->a->gate + (size_t)row * c->n_ff, *up = p->a->up + (size_t)row * c->n_ff;
    if (c->tanh_gelu) p->dense->gelu_mul(gate, gate, up, c->n_ff);
    else p->dense->silu_mul(gate, gate, up, c->n_ff);
    ki_pass_quantize(p, row);
}

static void mlp(ki_pass *p, const ki_layer *layer) {
    const ki_config *c = &p->m->config;
    ki_arena *a = p->a;
    ki_product in[] = {{a->gate, c->n_ff, &layer->gate}, {a->up, c->n_ff, &layer->up}};
    ki_product out[] = {{a->delta, c->n_embd, &layer->down}};
    p->norm = &layer->ffn_norm;
    p->post_norm = &layer->post_attn_norm;
    ki_pass_source(p, a->h, c->n_embd, in, 2);
    ki_pass_rows(p, p->n_rows, add_row);
    ki_pass_multiply(p, p->n_rows, in, 2);
    ki_pass_source(p, a->gate, c->n_ff, out, 1);
    ki_pass_rows(p, p->n_rows, gate_row);
    ki_pass_multiply(p, p->n_rows, out, 1);
    p->post_norm = &layer->post_ffn_norm;
}

void ki_llama_layers(ki_pass *p) {
    const ki_model *m = p->m;
    ki_arena *a = p->a;
    for (p->layer = 0; p->layer < m->config.n_layers; p->layer++) {
        const ki_layer *layer = &m->layers[p->layer];
        ki_product qkv[] = {{a->qkv, p->qkv_dim, &layer->q},
                            {a->qkv + p->q_dim, p->qkv_dim, &layer->k},
                            {a->qkv + p->q_dim + p->kv_dim, p->qkv_dim, &layer->v}};
        p->norm = &layer->attn_norm;
        ki_pass_source(p, a->h, m->config.n_embd, qkv, 3);
        ki_pass_rows(p, p->n_rows, p->layer ? add_row : ki_pass_norm_row);
        ki_pass_multiply(p, p->n_rows, qkv, 3);
        ki_pass_attention(p, layer);
        mlp(p, layer);
    }
    p->norm = NULL;
    ki_pass_rows(p, p->n_rows, add_row);
}
