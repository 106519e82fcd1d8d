/* rope.c: rotary frequencies and their scalings, step by step in float32 as Hugging Face
 * transformers 5 computes them, so that both round alike.
 *
 * Dynamic NTK depends on a sequence's length. Transformers takes the length of each forward pass:
 * the whole prompt's for a prompt row, p + 1 for a generated row at p. Here a prompt is announced
 * before its first row (kivi_session_begin_prompt), so its end is known however it is cut into
 * steps, and frequencies depend on the position and the prompt it belongs to alone. */
#include "model_private.h"

#include <math.h>
#include <stdio.h>

static const double two_pi = 2 * 3.14159265358979323846;

/* ---- from the file ---- */

static bool is_present(const char *text) { return text[0] && strcmp(text, "default"); }

static double yarn_mscale(double scale, double mscale) {
    return scale <= 1 ? 1.0 : 0.1 * mscale * log(scale) + 1.0;
}

/* A factor without a type is linear, as in the files from before there were types, which also had
 * another key for it. */
static void gguf_rope(ki_rope *out, ki_reader *r, const ki_config *c, const char *type) {
    out->factor = ki_read_real(r, "rope.scale_linear", NULL, 1.0);
    out->factor = ki_read_real(r, "rope.scaling.factor", NULL, out->factor);
    if (!type[0] && out->factor != 1.0) type = "linear";
    out->original_ctx =
        ki_read_uint(r, "rope.scaling.original_context_length", NULL, KI_MAX_CTX, c->ctx_tokens);
    if (!strcmp(type, "linear")) out->scaling = KI_ROPE_LINEAR;
    else if (!strcmp(type, "yarn")) {
        out->scaling = KI_ROPE_YARN;
        out->low = ki_read_real(r, "rope.scaling.yarn_beta_slow", NULL, 1.0);
        out->high = ki_read_real(r, "rope.scaling.yarn_beta_fast", NULL, 32.0);
        out->attention =
            ki_read_real(r, "rope.scaling.attn_factor", NULL, 1.0) * yarn_mscale(out->factor, 1.0);
    } else if (is_present(type) && strcmp(type, "none"))
        ki_refuse(r, "rope.scaling.type", NULL, type, "none, linear or yarn");
}

typedef struct hf_object {
    ki_reader *r;
    const char *name; /* of the object in config.json */
} hf_object;

static double hf_real(const hf_object *o, const char *leaf, double fallback) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", o->name, leaf);
    return ki_read_real(o->r, NULL, key, fallback);
}

static void hf_text(const hf_object *o, char *out, size_t n_bytes, const char *leaf) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", o->name, leaf);
    ki_read_text(o->r, out, n_bytes, NULL, key);
}

static void hf_yarn(ki_rope *out, const hf_object *o, const ki_config *c) {
    char key[128];
    out->scaling = KI_ROPE_YARN;
    out->low = hf_real(o, "beta_slow", 1.0);
    out->high = hf_real(o, "beta_fast", 32.0);
    out->factor = hf_real(o, "factor", (double)c->ctx_tokens / out->original_ctx);
    double mscale = hf_real(o, "mscale", 0), all = hf_real(o, "mscale_all_dim", 0);
    double implied = mscale > 0 && all > 0
                         ? yarn_mscale(out->factor, mscale) / yarn_mscale(out->factor, all)
                         : yarn_mscale(out->factor, 1.0);
    out->attention = hf_real(o, "attention_factor", implied);
    snprintf(key, sizeof key, "%s.truncate", o->name);
    out->keep_fractions = !ki_read_bool(o->r, NULL, key, true);
}

static void hf_llama3(ki_rope *out, const hf_object *o) {
    out->scaling = KI_ROPE_LLAMA3;
    out->low = hf_real(o, "low_freq_factor", 1.0);
    out->high = hf_real(o, "high_freq_factor", 4.0);
    if (o->r->status == KIVI_OK && out->high <= out->low)
        o->r->status =
            KI_FAIL(o->r->err, FORMAT,
                    "%s: %s.high_freq_factor is %g, expected more than low_freq_factor %g",
                    ki_file_label(o->r->file), o->name, out->high, out->low);
}

/* Without its factor a scaling would silently be none. */
static void want_factor(const hf_object *o, const char *type) {
    char key[128];
    snprintf(key, sizeof key, "%s.factor", o->name);
    if (o->r->status == KIVI_OK && ki_read_kind(o->r, NULL, key) == KI_VALUE_NONE)
        o->r->status = KI_FAIL(o->r->err, FORMAT, "%s: key %s is missing, rope type %.20s needs it",
                               ki_file_label(o->r->file), key, type);
}

static void hf_rope(ki_rope *out, ki_reader *r, const ki_config *c, const char *name) {
    hf_object o = {r, name};
    char type[32], key[128];
    ki_value_kind kind = ki_read_kind(r, NULL, name);
    if (kind != KI_VALUE_NONE && kind != KI_VALUE_OBJECT)
        ki_refuse(r, NULL, name, "no object", "an object or null");
    hf_text(&o, type, sizeof type, "rope_type");
    snprintf(key, sizeof key, "%s.%s", name, type[0] ? "rope_type" : "type");
    if (!type[0]) hf_text(&o, type, sizeof type, "type"); /* the older spelling */
    out->factor = hf_real(&o, "factor", 1.0);
    out->original_ctx = ki_read_real(r, NULL, "original_max_position_embeddings", c->ctx_tokens);
    out->original_ctx = hf_real(&o, "original_max_position_embeddings", out->original_ctx);
    double turned = ki_read_real(r, NULL, "partial_rotary_factor", 1.0);
    if (r->status == KIVI_OK && hf_real(&o, "partial_rotary_factor", turned) < 1.0)
        ki_refuse(r, NULL, name, "partial_rotary_factor below 1", "whole heads");
    if (!strcmp(type, "linear") || !strcmp(type, "llama3") || !strcmp(type, "dynamic"))
        want_factor(&o, type);
    if (!strcmp(type, "linear")) out->scaling = KI_ROPE_LINEAR;
    else if (!strcmp(type, "llama3")) hf_llama3(out, &o);
    else if (!strcmp(type, "yarn")) hf_yarn(out, &o, c);
    else if (!strcmp(type, "dynamic")) {
        out->scaling = KI_ROPE_DYNAMIC;
        out->original_ctx = c->ctx_tokens; /* the context of config.json, whatever stands beside */
    } else if (is_present(type))
        ki_refuse(r, NULL, key, type, "default, linear, dynamic, yarn or llama3");
}

/* The newer form nests the base with the scaling; the older one has it beside rope_scaling. */
void ki_rope_read(ki_rope *out, ki_reader *r, const ki_config *c, const char *hf, const char *theta,
                  double default_theta) {
    char type[32];
    *out = (ki_rope){.factor = 1.0, .attention = 1.0};
    out->theta = ki_read_real(r, "rope.freq_base", theta, default_theta);
    if (r->is_gguf) {
        ki_read_text(r, type, sizeof type, "rope.scaling.type", NULL);
        gguf_rope(out, r, c, type);
        return;
    }
    hf_object o = {r, hf};
    out->theta = hf_real(&o, "rope_theta", out->theta);
    hf_rope(out, r, c, hf);
}

/* ---- frequencies ---- */

/* base^(2j / D) */
static float period(float base, uint32_t j, uint32_t head_dim) {
    return (float)pow((double)base, (double)((float)(2 * j) / (float)head_dim));
}

/* Long wavelengths are stretched by the factor, short ones stay, between the two a smooth passage.
 */
static float llama3(const ki_rope *rope, float freq) {
    float wavelength = (float)two_pi / freq, factor = (float)rope->factor;
    float stretched = wavelength > (float)(rope->original_ctx / rope->low) ? freq / factor : freq;
    if (wavelength < (float)(rope->original_ctx / rope->high) || stretched != freq)
        return stretched;
    float smooth = ((float)rope->original_ctx / wavelength - (float)rope->low) /
                   (float)(rope->high - rope->low);
    return (1 - smooth) * freq / factor + smooth * freq;
}

/* The dimension that turns n_turns times within the original context. */
static double yarn_dim(const ki_rope *rope, double n_turns, uint32_t head_dim) {
    return head_dim * log(rope->original_ctx / (n_turns * two_pi)) / (2 * log(rope->theta));
}

static void yarn(float *out, const ki_rope *rope, uint32_t head_dim) {
    double low = yarn_dim(rope, rope->high, head_dim), high = yarn_dim(rope, rope->low, head_dim);
    if (!rope->keep_fractions) low = floor(low), high = ceil(high);
    low = fmax(low, 0), high = fmin(high, head_dim - 1.0);
    if (low == high) high += 0.001; /* as the reference: no division by zero */
    for (uint32_t j = 0; j < head_dim / 2; j++) {
        float p = period((float)rope->theta, j, head_dim);
        float ramp = ((float)j - (float)low) / (float)(high - low);
        float keep = 1 - fminf(fmaxf(ramp, 0), 1);
        out[j] = 1.0f / ((float)rope->factor * p) * (1 - keep) + 1.0f / p * keep;
    }
}

static float dynamic_base(const ki_rope *rope, uint32_t head_dim, uint32_t length) {
    if (length <= rope->original_ctx) return (float)rope->theta;
    float stretch = (float)rope->factor * (float)length / (float)rope->original_ctx;
    double exponent = (double)head_dim / (head_dim - 2.0);
    stretch -= (float)(rope->factor - 1);
    return (float)rope->theta * (float)pow((double)stretch, exponent);
}

void ki_rope_frequencies(float *out, const ki_rope *rope, uint32_t head_dim, uint32_t length) {
    float base = (float)rope->theta;
    if (rope->scaling == KI_ROPE_YARN) {
        yarn(out, rope, head_dim);
        return;
    }
    if (rope->scaling == KI_ROPE_DYNAMIC) base = dynamic_base(rope, head_dim, length);
    for (uint32_t j = 0; j < head_dim / 2; j++) {
        float freq = 1.0f / period(base, j, head_dim);
        if (rope->scaling == KI_ROPE_LINEAR) freq /= (float)rope->factor;
        out[j] = rope->scaling == KI_ROPE_LLAMA3 ? llama3(rope, freq) : freq;
    }
}
