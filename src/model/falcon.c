/* falcon.c: Falcon. Attention and MLP read the same x and are added to it together; the norms have
 * a mean and a bias; q, k and v are one matrix in the file.
 *
 *     each layer:  h = norm(x); q, k, v = h Wqkv; rope(q), rope(k); append(k, v); d = attend(q) Wo
 *                  h = the same h (7B) or a second norm(x) (40B and newer)
 *                  x += gelu(h Wup) Wdown + d */
#include "model_private.h"

/* Beware: what the 40B form calls ln_attn is attn_norm_2 in GGUF, and its ln_mlp is attn_norm. */
const char *const ki_falcon_names[KI_PART_COUNT][2] = {
    [KI_PART_EMBEDDING] = {"token_embd", "transformer.word_embeddings"},
    [KI_PART_OUTPUT] = {"output", "lm_head"},
    [KI_PART_OUTPUT_NORM] = {"output_norm", "transformer.ln_f"},
    [KI_PART_ONE_NORM] = {"blk.%u.attn_norm", "transformer.h.%u.input_layernorm"},
    [KI_PART_ATTN_NORM] = {"blk.%u.attn_norm_2", "transformer.h.%u.ln_attn"},
    [KI_PART_FFN_NORM] = {"blk.%u.attn_norm", "transformer.h.%u.ln_mlp"},
    [KI_PART_QKV] = {"blk.%u.attn_qkv", "transformer.h.%u.self_attention.query_key_value"},
    [KI_PART_O] = {"blk.%u.attn_output", "transformer.h.%u.self_attention.dense"},
    [KI_PART_UP] = {"blk.%u.ffn_up", "transformer.h.%u.mlp.dense_h_to_4h"},
    [KI_PART_DOWN] = {"blk.%u.ffn_down", "transformer.h.%u.mlp.dense_4h_to_h"},
};

/* The key that is there: the second is the older spelling. */
static const char *either(ki_reader *r, const char *newer, const char *older) {
    return ki_read_kind(r, NULL, newer) == KI_VALUE_NONE &&
                   ki_read_kind(r, NULL, older) != KI_VALUE_NONE
               ? older
               : newer;
}

static void read_form(ki_config *c, ki_reader *r) {
    char act[32];
    if (r->is_gguf) {
        c->one_norm = !ki_file_tensor(r->file, "blk.0.attn_norm_2.weight");
        return;
    }
    bool newer = ki_read_bool(r, NULL, "new_decoder_architecture", false);
    if (!newer && ki_read_bool(r, NULL, "multi_query", true)) c->n_kv_heads = 1;
    else if (!newer) c->n_kv_heads = c->n_heads;
    uint32_t n_norms = ki_read_uint(r, NULL, "num_ln_in_parallel_attn", 2, newer ? 2 : 1);
    c->one_norm = n_norms == 1;
    ki_refuse_flag(r, "alibi");
    ki_refuse_flag(r, "bias");
    if (!newer && !ki_read_bool(r, NULL, "parallel_attn", true))
        ki_refuse(r, NULL, "parallel_attn", "false", "true");
    ki_read_text(r, act, sizeof act, NULL, "activation");
    if (act[0] && strcmp(act, "gelu")) ki_refuse(r, NULL, "activation", act, "gelu");
}

void ki_falcon_read(ki_config *c, ki_reader *r) {
    ki_size_keys keys = {.layers = either(r, "num_hidden_layers", "n_layer"),
                         .heads = either(r, "num_attention_heads", "n_head"),
                         .kv_heads = either(r, "num_kv_heads", "n_head_kv"),
                         .ff = "ffn_hidden_size",
                         .ff_times = 4,
                         .gguf_eps = "attention.layer_norm_epsilon",
                         .eps = "layer_norm_epsilon",
                         .eps_default = 1e-5};
    bool nested = ki_read_kind(r, NULL, "rope_parameters") != KI_VALUE_NONE;
    ki_config_sizes(c, r, &keys);
    ki_rope_read(&c->rope[0], r, c, nested ? "rope_parameters" : "rope_scaling", "rope_theta",
                 10000.0);
    read_form(c, r);
    c->tied_output = ki_read_bool(r, NULL, "tie_word_embeddings", true);
    c->layer_norm = c->fused_qkv = c->no_gate = true;
}

/* ---- the pass ---- */

static void gelu_row(ki_pass *p, uint32_t row) {
    uint32_t n = p->m->config.n_ff;
    p->dense->gelu(p->a->up + (size_t)row * n, p->a->up + (size_t)row * n, n);
    ki_pass_quantize(p, row);
}

/* The MLP's output stands where h was. */
static void add_row(ki_pass *p, uint32_t row) {
    uint32_t n = p->m->config.n_embd;
    float *mlp = p->a->h + (size_t)row * n;
    p->dense->add(mlp, p->a->delta + (size_t)row * n, n);
    p->dense->add(p->a->x + (size_t)row * n, mlp, n);
}

static void down(ki_pass *p, const ki_layer *layer) {
    const ki_config *c = &p->m->config;
    ki_arena *a = p->a;
    ki_product out[] = {{a->h, c->n_embd, &layer->down}};
    ki_pass_source(p, a->up, c->n_ff, out, 1);
    ki_pass_rows(p, p->n_rows, gelu_row);
    ki_pass_multiply(p, p->n_rows, out, 1);
    ki_pass_rows(p, p->n_rows, add_row);
}

void ki_falcon_layers(ki_pass *p) {
    const ki_config *c = &p->m->config;
    ki_arena *a = p->a;
    for (p->layer = 0; p->layer < c->n_layers; p->layer++) {
        const ki_layer *layer = &p->m->layers[p->layer];
        ki_product in[] = {{a->qkv, p->qkv_dim, &layer->q},
                           {a->qkv + p->q_dim, p->qkv_dim, &layer->k},
                           {a->qkv + p->q_dim + p->kv_dim, p->qkv_dim, &layer->v},
                           {a->up, c->n_ff, &layer->up}};
        size_t n_first = c->one_norm ? 4 : 3; /* one norm: all four read the same rows */
        p->norm = &layer->attn_norm;
        ki_pass_source(p, a->h, c->n_embd, in, n_first);
        ki_pass_rows(p, p->n_rows, ki_pass_norm_row);
        ki_pass_multiply(p, p->n_rows, in, n_first);
        if (!c->one_norm) {
            p->norm = &layer->ffn_norm;
            ki_pass_source(p, a->h, c->n_embd, in + 3, 1);
            ki_pass_rows(p, p->n_rows, ki_pass_norm_row);
            ki_pass_multiply(p, p->n_rows, in + 3, 1);
        }
        ki_pass_attention(p, layer);
        down(p, layer);
    }
}
