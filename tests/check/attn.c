/* Attention against an oracle in doubles that knows nothing of pages, lanes or integers: it
 * quantizes by DESIGN.md 2, or by plus.c's definition (which tests/check/plus.c compares with
 * golden vectors), decides by DESIGN.md 3 what a row sees exactly, and adds up. */
#include "world.h"

typedef struct plan_step {
    uint32_t n_rows, prompt; /* prompt: begins one of so many tokens */
    bool attend;
} plan_step;
enum { MAX_STEPS = 400, MAX_PROBES = 128 };

typedef struct attn_case {
    world w;
    uint32_t n_tokens;
    plan_step steps[MAX_STEPS];
    uint32_t n_steps, n_probes;
    uint32_t probe_pos[MAX_PROBES],
        probe_start[MAX_PROBES]; /* start of its prompt, UINT32_MAX: generated */
} attn_case;

/* ---- the oracle ---- */

typedef struct side {
    float *exact;         /* [T][Hk][D] the float16 rows; values as they are kept, turned or not */
    float *scale, *zero;  /* the same shape, of the element's group */
    uint8_t *code, *wide; /* wide: of a channel with 4 bits in a page of 2-bit keys */
} side;
typedef struct oracle {
    ki_layout l;
    uint32_t n_tokens;
    side k, v;
} oracle;

/* One group at x[0], x[stride], ... */
static void oracle_group(side *s, size_t at, size_t stride, uint32_t group, uint32_t bits) {
    float min = s->exact[at], max = min, levels = (float)((1 << bits) - 1);
    for (uint32_t i = 1; i < group; i++) {
        float x = s->exact[at + i * stride];
        min = x < min ? x : min;
        max = x > max ? x : max;
    }
    float wanted = (max - min) / levels;
    uint16_t h = ki_f32_to_f16(wanted);
    while (ki_f16_to_f32(h) < wanted) h++;
    float scale = ki_f16_to_f32(h);
    for (uint32_t i = 0; i < group; i++) {
        float q = scale > 0 ? nearbyintf((s->exact[at + i * stride] - min) / scale) : 0;
        s->code[at + i * stride] = (uint8_t)(q > levels ? levels : q);
        s->scale[at + i * stride] = scale;
        s->zero[at + i * stride] = min;
    }
}

static void side_init(side *s, size_t n) {
    s->exact = check_alloc(n * 4);
    s->scale = check_alloc(n * 4);
    s->zero = check_alloc(n * 4);
    s->code = check_alloc(n);
    s->wide = check_alloc(n);
}

/* A page of one head's keys, the first token t, by plus.c. */
static void oracle_plus_page(oracle *o, uint32_t t, uint32_t head) {
    const ki_layout *l = &o->l;
    uint32_t d = l->head_dim, row = l->n_kv_heads * d, sinks = l->kv.sink_tokens;
    uint16_t *store = check_alloc((size_t)128 * d * 2), scale[4 * 256], zero[4 * 256];
    uint8_t list[64];
    const uint16_t *blocks[8];
    ki_plus_keys keys = {.bits = l->kv.k_bits, .scale = scale, .zero = zero, .group = l->k_group};
    keys.low = check_alloc((size_t)128 * d);
    uint32_t *wide = check_alloc((size_t)128 * d);
    if (l->kv.plus & KIVI_PLUS_WIDE) keys.wide = wide, keys.list = list;
    for (uint32_t b = 0; b < 8; b++) blocks[b] = store + (size_t)b * 16 * d;
    for (uint32_t i = 0; i < 128 * d; i++) {
        float x = o->k.exact[(size_t)(t + i / d) * row + head * d + i % d];
        store[((size_t)(i / d / 16) * d + i % d) * 16 + i / d % 16] = ki_f32_to_f16(x);
    }
    ki_plus_close_keys_scalar(&keys, blocks, sinks > t ? sinks - t : 0, d,
                              l->kv.plus & KIVI_PLUS_FIT ? KI_PLUS_KEY_STEPS : 1);
    for (uint32_t i = 0; i < 128 * d; i++) {
        size_t at = (size_t)(t + i / d) * row + head * d + i % d;
        o->k.code[at] = (uint8_t)ki_plus_key_code(&keys, i / d, i % d, d);
        o->k.scale[at] = ki_f16_to_f32(scale[i / d / l->k_group * d + i % d]);
        o->k.zero[at] = ki_f16_to_f32(zero[i / d / l->k_group * d + i % d]);
        for (uint32_t w = 0; keys.list && w < d / 4; w++)
            if (list[w] == i % d) o->k.wide[at] = 1;
    }
    free(store), free(keys.low), free(wide);
}

/* One group of a row of values at element `at`: the zero that makes (code - half) scale. */
static void oracle_plus_values(oracle *o, size_t at) {
    const ki_layout *l = &o->l;
    uint32_t n = l->v_group, bits = l->kv.v_bits;
    uint16_t x[64], scale;
    for (uint32_t c = 0; c < n; c++) x[c] = ki_f32_to_f16(o->v.exact[at + c]);
    ki_plus_quantize_values_scalar(o->v.code + at, &scale, x, n, bits,
                                   l->kv.plus & KIVI_PLUS_STEP ? KI_PLUS_VALUE_STEPS : 1);
    for (uint32_t c = 0; c < n; c++) {
        o->v.scale[at + c] = ki_f16_to_f32(scale);
        o->v.zero[at + c] = -(float)((1u << bits) - 1) / 2 * o->v.scale[at + c];
    }
}

static void oracle_init(oracle *o, const ki_layout *l, const uint32_t *tokens, uint32_t n_tokens) {
    size_t row = (size_t)l->n_kv_heads * l->head_dim, n = row * n_tokens;
    const uint32_t parts = l->kv.plus;
    /* keys that plus.h says nothing of are quant.h's, in groups of a page too */
    bool closes_pages = parts && (l->kv.k_bits == 4 || parts & (KIVI_PLUS_WIDE | KIVI_PLUS_FIT));
    uint32_t group = closes_pages ? 128 : l->k_group;
    *o = (oracle){.l = *l, .n_tokens = n_tokens};
    side_init(&o->k, n);
    side_init(&o->v, n);
    world_rows(o->k.exact, o->v.exact, NULL, l, tokens, 0, 0, n_tokens);
    for (size_t at = 0; ki_is_turned(l) && at < n; at += l->head_dim)
        ki_plus_turn_scalar(o->v.exact + at, l->head_dim);
    for (size_t i = 0; i < n; i++) {
        o->k.exact[i] = ki_f16_to_f32(ki_f32_to_f16(o->k.exact[i]));
        o->v.exact[i] = ki_f16_to_f32(ki_f32_to_f16(o->v.exact[i]));
    }
    for (uint32_t t = 0; l->kv.k_bits < 16 && t + group <= n_tokens;
         t += group) { /* whole groups of tokens; sinks do not count in theirs */
        uint32_t first = KI_MAX(t, KI_MIN(l->kv.sink_tokens, t + group));
        if (first == t + group) continue;
        for (uint32_t head = 0; closes_pages && head < l->n_kv_heads; head++)
            oracle_plus_page(o, t, head);
        for (size_t c = 0; !closes_pages && c < row; c++)
            oracle_group(&o->k, first * row + c, row, t + group - first, l->kv.k_bits);
    }
    for (size_t i = 0; l->kv.v_bits < 16 && i < n; i += l->v_group)
        if (parts && !(parts & KIVI_PLUS_ZERO)) oracle_plus_values(o, i);
        else oracle_group(&o->v, i, 1, l->v_group, l->kv.v_bits);
}

static void oracle_deinit(oracle *o) {
    side *sides[] = {&o->k, &o->v};
    for (int i = 0; i < 2; i++)
        free(sides[i]->exact), free(sides[i]->scale), free(sides[i]->zero), free(sides[i]->code),
            free(sides[i]->wide);
}

/* DESIGN.md 3's table. A later prompt sees what a generated row at its start would, and everything
 * since. */
static uint32_t exact_line(const kivi_kv_options *kv, bool keys, uint32_t p,
                           uint32_t prompt_start) {
    uint32_t r = kv->residual_tokens, generated = keys ? p - p % r : p > r ? p - r : 0;
    if (kv->rule == KIVI_RULE_STREAM || prompt_start == UINT32_MAX) return generated;
    uint32_t start = keys               ? prompt_start - prompt_start % r
                     : prompt_start > r ? prompt_start - r
                                        : 0;
    uint32_t line = start;
    if (kv->rule == KIVI_RULE_SPAN && p - p % kv->span_tokens > start)
        line = p - p % kv->span_tokens;
    return line < generated ? line : generated;
}

/* The largest integer of the fold (attn.h). */
static const float fold_limit = 16256.0f;
static double fold_centre(uint32_t bits) { return ((1u << bits) - 1) / 2.0; }

/* The score of one token, and how far the kernel's may be away. Keys of 16 bit: a chain of D fused
 * steps, 2^-24 of sum |q k| each. Packed keys: q s becomes integers of step max |q s| / limit, so
 * each channel is off by up to half a step times its code less the centre; the D roundings are
 * independent, their sum has a deviation of step / sqrt(12) sqrt(sum (code - centre)^2), of which
 * we allow six. With `folded` the oracle rounds q s itself, as documented in attn.h, and only
 * float32 is left: the product q s, the chain for the bias (D / 16 + 1 steps and 4 of the tree),
 * whose parts are as large as centre |q s|, a conversion and a last fused step. Of a wide channel
 * the low two bits are in that row; the high two, with 4 q s, in a second one with its own step. */
typedef struct fold_row {
    float inverse, step; /* of the integers of one row */
} fold_row;

static fold_row row_of(float largest) {
    return (fold_row){largest > 0 ? fold_limit / largest : 0, largest / fold_limit};
}

typedef struct folded_sum {
    double sum, size, squares;
} folded_sum;

/* x code, x = q s in float32, its integer in place of x if `folded`. */
static void add_part(folded_sum *f, float x, double code, double centre, const fold_row *r,
                     bool folded) {
    double exact = (double)x;
    double rounded = folded ? (double)nearbyintf(x * r->inverse) * (double)r->step : exact;
    f->sum += rounded * (code - centre) + exact * centre;
    f->size += fabs(exact) * (code + 2 * centre);
    f->squares += (double)r->step * (double)r->step * (code - centre) * (code - centre);
}

static double score(double *error, const oracle *o, const float *q, uint32_t t, uint32_t kv_head,
                    bool exact, bool folded) {
    uint32_t d = o->l.head_dim;
    size_t at = ((size_t)t * o->l.n_kv_heads + kv_head) * d;
    folded_sum f = {0};
    float largest = 0, largest_wide = 0;
    if (exact) {
        for (uint32_t c = 0; c < d; c++) {
            double x = (double)q[c] * (double)o->k.exact[at + c];
            f.sum += x;
            f.size += fabs(x);
        }
        *error = f.size * 0x1p-24 * (4 * sqrt(d) + 4);
        return f.sum;
    }
    for (uint32_t c = 0; c < d; c++) {
        float x = fabsf(q[c] * o->k.scale[at + c]);
        largest = fmaxf(largest, x);
        if (o->k.wide[at + c]) largest_wide = fmaxf(largest_wide, 4 * x);
    }
    const fold_row low = row_of(largest), high = row_of(largest_wide);
    const double centre = fold_centre(o->l.kv.k_bits);
    for (uint32_t c = 0; c < d; c++) {
        float x = q[c] * o->k.scale[at + c];
        double z = (double)q[c] * (double)o->k.zero[at + c];
        uint32_t code = o->k.code[at + c], is_wide = o->k.wide[at + c];
        add_part(&f, x, is_wide ? code & 3 : code, centre, &low, folded);
        if (is_wide) add_part(&f, 4 * x, code >> 2, centre, &high, folded);
        f.sum += z;
        f.size += fabs(z);
    }
    *error = f.size * 0x1p-24 * (d / 16 + 10) + (folded ? 0 : 6 / sqrt(12) * sqrt(f.squares));
    return f.sum;
}

typedef struct row_state {
    const oracle *o;
    const float *q; /* scaled */
    uint32_t p, kv_head, k_line, v_line;
    double *s, *e; /* [T]: scores, then weights; their errors */
} row_state;

static bool is_exact(const oracle *o, uint32_t bits, uint32_t t, uint32_t line) {
    return bits == 16 || t < o->l.kv.sink_tokens || t >= line;
}

static void weights(row_state *r, bool folded) {
    double top = -INFINITY, total = 0;
    for (uint32_t t = 0; t <= r->p; t++) {
        bool exact = is_exact(r->o, r->o->l.kv.k_bits, t, r->k_line);
        r->s[t] = score(&r->e[t], r->o, r->q, t, r->kv_head, exact, folded);
        top = r->s[t] > top ? r->s[t] : top;
    }
    for (uint32_t t = 0; t <= r->p; t++) {
        /* the difference to the maximum is rounded, then e^x is good to 4 ulp */
        r->e[t] += (fabs(r->s[t]) + fabs(top)) * 0x1p-24 + 4 * 0x1p-23;
        total += r->s[t] = exp(r->s[t] - top);
    }
    for (uint32_t t = 0; t <= r->p; t++) r->s[t] /= total;
}

/* Largest p s of each tile for the value group of channel c: the step of the weights' integers. */
static double tile_step(const row_state *r, uint32_t tile, size_t channel) {
    double largest = 0;
    size_t row = (size_t)r->o->l.n_kv_heads * r->o->l.head_dim;
    for (uint32_t t = tile; t < tile + 128 && t <= r->p; t++)
        if (!is_exact(r->o, r->o->l.kv.v_bits, t, r->v_line))
            largest = fmax(largest, r->s[t] * (double)r->o->v.scale[t * row + channel]);
    return largest / (double)fold_limit;
}

/* What the rounding of one tile's weights may do to a channel: each is off by its rounding, a
 * weight below half a step by all of itself, and meets its code less the centre. Codes of different
 * tokens are independent here and as often above the centre as below, so the squares add; six
 * deviations. */
typedef struct fold {
    double step, squares;
} fold;

static void fold_add(fold *f, double weight, double from_centre) {
    double off = weight < f->step / 2 ? weight : f->step / sqrt(12);
    f->squares += off * off * from_centre * from_centre;
}

/* out[c] and its tolerance. To first order a score that is off by e moves the output by p e (v -
 * out). Float32: each exact token is one fused step (independent: 4 sqrt(n)), each tile and merge a
 * few, all of at most sum p (|code s| + |z|). */
static void one_channel(double *out, double *tolerance, const row_state *r, uint32_t c) {
    size_t row = (size_t)r->o->l.n_kv_heads * r->o->l.head_dim,
           channel = (size_t)r->kv_head * r->o->l.head_dim + c;
    const side *v = &r->o->v;
    fold f = {0};
    double sum = 0, size = 0, moved = 0, centre = fold_centre(r->o->l.kv.v_bits);
    uint32_t n_exact = 0;
    for (int pass = 0; pass < 2; pass++) /* the second knows the output */
        for (uint32_t t = 0; t <= r->p; t++) {
            size_t at = t * row + channel;
            bool exact = is_exact(r->o, r->o->l.kv.v_bits, t, r->v_line);
            double s = (double)v->scale[at], cs = v->code[at] * s, z = (double)v->zero[at];
            double value = exact ? (double)v->exact[at] : cs + z;
            if (pass == 1) {
                moved += r->s[t] * r->e[t] * fabs(value - sum);
                if (t % 128 == 0) f.step = tile_step(r, t, channel);
                if (!exact) fold_add(&f, r->s[t] * s, v->code[at] - centre);
                continue;
            }
            n_exact += exact;
            sum += r->s[t] * value;
            size += r->s[t] * (exact ? fabs(value) : cs + 2 * centre * s + fabs(z));
        }
    *out = sum;
    *tolerance = 1.2 * moved + 6 * sqrt(f.squares) +
                 (4 * sqrt(n_exact) + 8 * (r->p / 128 + 1) + 16) * 0x1p-24 * size;
}

/* ---- running a plan ---- */

static void add_step(attn_case *a, uint32_t n_rows, uint32_t prompt, bool attend,
                     uint32_t prompt_start) {
    a->steps[a->n_steps++] = (plan_step){n_rows, prompt, attend};
    for (uint32_t i = 0; attend && i < n_rows; i++) {
        a->probe_pos[a->n_probes] = a->n_tokens + i;
        a->probe_start[a->n_probes++] = prompt_start;
    }
    a->n_tokens += n_rows;
}

/* A prompt in chunks, its last five rows looked at. */
static void add_prompt(attn_case *a, uint32_t n, uint32_t chunk) {
    uint32_t start = a->n_tokens, last = n < 5 ? n : 5, announced = n;
    for (uint32_t left = n - last; left;) {
        uint32_t rows = left < chunk ? left : chunk;
        add_step(a, rows, announced, false, start);
        announced = 0;
        left -= rows;
    }
    add_step(a, last, announced, true, start);
}

static void make_plan(attn_case *a, uint32_t n, bool decode_only) {
    if (decode_only) { /* chunks, then one row */
        add_prompt(a, n - 2, 512);
        a->steps[a->n_steps - 1].attend = false;
        a->n_probes = 0;
        add_step(a, 1, 0, true, UINT32_MAX);
        add_step(a, 1, 0, true, UINT32_MAX);
        return;
    }
    uint32_t first = n * 6 / 10 + 1, chunk = n > 500 ? 512 : 37;
    add_prompt(a, first < n ? first : n, chunk);
    if (a->n_tokens + 20 > n) return;
    for (int i = 0; i < 3; i++) add_step(a, 1, 0, true, UINT32_MAX);
    add_step(a, 7, 0, true, UINT32_MAX);
    add_prompt(a, n - a->n_tokens - 2, chunk);
    for (int i = 0; i < 2; i++) add_step(a, 1, 0, true, UINT32_MAX);
}

/* out [n_probes][H][D] */
static void run_plan(float *out, const attn_case *a, ki_isa isa, const uint32_t *tokens) {
    world w = a->w;
    w.isa = isa;
    kivi_cache *cache = NULL;
    kivi_seq *seq = NULL;
    CHECK_OK(world_create(&cache, &w, err));
    if (cache) CHECK_OK(kivi_seq_create(&seq, cache, err));
    size_t row = (size_t)w.geometry.n_heads * w.geometry.head_dim;
    for (uint32_t i = 0; seq && i < a->n_steps && !check_failed(); i++) {
        const plan_step *s = &a->steps[i];
        if (s->prompt) CHECK_OK(kivi_seq_begin_prompt(seq, s->prompt, err));
        CHECK_OK(world_step(seq, tokens, s->n_rows, s->attend ? out : NULL, err));
        if (s->attend) out += s->n_rows * row;
    }
    CHECK(!cache || ki_pool_check(&cache->pool), "page pool");
    kivi_seq_destroy(&seq);
    kivi_cache_destroy(&cache);
}

/* The output as it was before it was turned back, in doubles, and what that turn's float32 may have
 * moved any of it: log2 B stages and a product, 2^-24 of the norm each (tests/check/plus.c). */
static double turn_again(double *out, const float *got, uint32_t d) {
    uint32_t block = ki_plus_block(d);
    double norm = 0;
    for (uint32_t i = 0; i < d; i++) {
        out[i] = 0;
        norm += (double)got[i] * (double)got[i];
        for (uint32_t j = i / block * block; j < (i / block + 1) * block; j++)
            out[i] += (__builtin_popcount(i & j & (block - 1)) % 2 ? -1 : 1) * (double)got[j];
        out[i] /= sqrt(block);
    }
    return 1.01 * (log2(block) + 2) * 0x1p-24 * sqrt(norm);
}

static void compare_head(const float *got, const row_state *r, const char *which, double *worst) {
    double turned[256], moved = 0;
    bool is_turned = ki_is_turned(&r->o->l);
    if (is_turned) moved = turn_again(turned, got, r->o->l.head_dim);
    for (uint32_t c = 0; c < r->o->l.head_dim; c++) {
        double want, tolerance;
        one_channel(&want, &tolerance, r, c);
        tolerance += moved;
        double error = fabs((is_turned ? turned[c] : (double)got[c]) - want);
        CHECK(error <= tolerance,
              "%s oracle: position %u, KV head %u, channel %u is off by %g from %g, allowed %g",
              which, r->p, r->kv_head, c, error, want, tolerance);
        *worst = fmax(*worst, error / tolerance);
    }
}

static void compare_oracle(const float *got, const attn_case *a, const oracle *o,
                           const uint32_t *tokens) {
    uint32_t d = o->l.head_dim, h_all = o->l.n_heads;
    float *q = check_alloc((size_t)h_all * d * 4), factor = 1.0f / sqrtf((float)d);
    double worst[2] = {0, 0};
    row_state r = {.o = o, .s = check_alloc(a->n_tokens * 8), .e = check_alloc(a->n_tokens * 8)};
    for (uint32_t i = 0; i < a->n_probes && !check_failed(); i++) {
        r.p = a->probe_pos[i];
        r.k_line = exact_line(&o->l.kv, true, r.p, a->probe_start[i]);
        r.v_line = exact_line(&o->l.kv, false, r.p, a->probe_start[i]);
        world_rows(NULL, NULL, q, &o->l, tokens, 0, r.p, 1);
        for (uint32_t j = 0; j < h_all * d; j++) q[j] *= factor;
        for (uint32_t h = 0; h < h_all; h++)
            for (int folded = 0; folded < 2; folded++) {
                r.q = q + (size_t)h * d;
                r.kv_head = h / o->l.head_group;
                weights(&r, folded);
                compare_head(got + ((size_t)i * h_all + h) * d, &r, folded ? "folded" : "true",
                             &worst[folded]);
            }
    }
    check_note("error / tolerance %.2f true, %.2f folded", worst[0], worst[1]);
    free(q), free(r.s), free(r.e);
}

/* Every instruction set gives scalar's bytes; scalar's are compared with the oracle. */
static void attn_cases(attn_case *a, const char *name) {
    size_t n = (size_t)a->n_probes * a->w.geometry.n_heads * a->w.geometry.head_dim;
    float *want = check_alloc(n * 4), *got = check_alloc(n * 4);
    uint32_t *tokens = check_alloc(a->n_tokens * 4);
    for (uint32_t i = 0; i < a->n_tokens; i++) tokens[i] = (uint32_t)hash_u64(check_opt.seed, i);
    bool have_scalar = false;
    for (int isa = 0; isa < KI_ISA_COUNT; isa++) {
        if (!check_case_isa((ki_isa)isa, "attn/%s", name)) continue;
        if (!have_scalar) run_plan(want, a, KI_ISA_SCALAR, tokens);
        have_scalar = true;
        if (isa == KI_ISA_SCALAR) {
            ki_layout l;
            oracle o;
            CHECK_OK(ki_layout_init(&l, &a->w.geometry, err));
            oracle_init(&o, &l, tokens, a->n_tokens);
            compare_oracle(want, a, &o, tokens);
            oracle_deinit(&o);
        } else {
            run_plan(got, a, (ki_isa)isa, tokens);
            for (size_t i = 0; i < n; i++)
                CHECK(!memcmp(&got[i], &want[i], 4), "probe %zu (position %u): %a, scalar %a",
                      i / (n / a->n_probes), a->probe_pos[i / (n / a->n_probes)], (double)got[i],
                      (double)want[i]);
        }
        check_end();
    }
    free(want), free(got), free(tokens);
}

/* ---- which ---- */

static const struct { uint32_t h, hk; } head_sets[] = {{4, 4}, {6, 2}, {4, 1}};
static const uint32_t bit_sets[][2] = {{2, 2}, {4, 2},   {2, 4},  {4, 4},
                                       {8, 8}, {16, 16}, {16, 2}, {2, 16}};

static void one_kind(uint32_t d, uint32_t heads, const kivi_kv_options *kv, uint32_t rule,
                     uint32_t n, bool decode_only) {
    static attn_case a;
    char name[120];
    a = (attn_case){.w = world_small()};
    kivi_cache_geometry *g = &a.w.geometry;
    g->n_layers = 1, g->head_dim = d, g->n_heads = head_sets[heads].h,
    g->n_kv_heads = head_sets[heads].hk;
    if (decode_only) g->n_heads = g->n_kv_heads = 1;
    g->n_pages = n / 128 + 2;
    g->kv = *kv;
    g->kv.rule = rule == 0 ? KIVI_RULE_PAPER : rule == 1 ? KIVI_RULE_STREAM : KIVI_RULE_SPAN;
    g->kv.span_tokens = rule < 2 ? 0 : rule == 2 ? 128 : 256;
    make_plan(&a, n, decode_only);
    snprintf(name, sizeof name, "d%u-h%u.%u-b%u.%u-%c%u-r%u-s%u-%s-n%u", d, g->n_heads,
             g->n_kv_heads, kv->k_bits, kv->v_bits, kv->plus ? 'p' : 'g',
             kv->plus ? kv->plus : kv->group, kv->residual_tokens, kv->sink_tokens,
             world_rule_name(&g->kv), n);
    attn_cases(&a, name);
}

static void one(uint32_t d, uint32_t heads, uint32_t bits, uint32_t group, uint32_t residual,
                uint32_t sinks, uint32_t rule, uint32_t n, bool decode_only) {
    const kivi_kv_options kv = {.k_bits = bit_sets[bits][0],
                                .v_bits = bit_sets[bits][1],
                                .group = group,
                                .residual_tokens = residual,
                                .sink_tokens = sinks};
    one_kind(d, heads, &kv, rule, n, decode_only);
}

/* bits: of keys, of values, and the parts. */
static void one_plus(uint32_t d, uint32_t heads, const uint32_t bits[3], uint32_t residual,
                     uint32_t sinks, uint32_t rule, uint32_t n, bool decode_only) {
    const kivi_kv_options kv = {.k_bits = bits[0],
                                .v_bits = bits[1],
                                .plus = bits[2],
                                .residual_tokens = residual,
                                .sink_tokens = sinks};
    one_kind(d, heads, &kv, rule, n, decode_only);
}

/* The + kinds: every head size, every pair of bits and parts left out, rules and sinks in turn. */
static void plus_kinds(void) {
    static const uint32_t dims[] = {16, 32, 48, 64, 80, 96, 128, 256};
    static const uint32_t bits[][3] = {{2, 2, KIVI_PLUS_ALL},
                                       {4, 2, KIVI_PLUS_ALL},
                                       {4, 3, KIVI_PLUS_ALL},
                                       {2, 3, KIVI_PLUS_ALL},
                                       {2, 16, KIVI_PLUS_ALL},
                                       {16, 3, KIVI_PLUS_ALL},
                                       {2, 2, KIVI_PLUS},
                                       {2, 2, KIVI_PLUS | KIVI_PLUS_WIDE | KIVI_PLUS_STEP},
                                       {2, 3, KIVI_PLUS | KIVI_PLUS_FIT | KIVI_PLUS_TURN}};
    static const uint32_t sinks[] = {4, 0, 20, 1, 130, 100};
    enum { N = sizeof bits / sizeof *bits };
    for (uint32_t i = 0; i < 8; i++)
        for (uint32_t b = 0; b < N; b++) {
            uint32_t turn = i * N + b;
            one_plus(dims[i], turn % 3, bits[b], turn % 5 ? 128 : 256, sinks[turn % 6], turn % 4,
                     turn % 7 ? 450 : 150, false);
        }
    for (uint32_t b = 0; b < 4; b++) {
        one_plus(64, 1, bits[b], 128, 4, 1, 1500, false);
        one_plus(128, 0, bits[b], 128, 4, 0, 8192, true);
    }
}

/* What + kinds leave out, alone and beside their parts. */
static void plain_parts(void) {
    static const uint32_t dims[] = {64, 128, 80, 96, 32, 256};
    static const uint32_t bits[][3] = {
        {2, 2, KIVI_PLUS_ALL | KIVI_PLUS_K32},
        {2, 2, (KIVI_PLUS_ALL & ~KIVI_PLUS_STEP) | KIVI_PLUS_ZERO},
        {4, 3, KIVI_PLUS_ALL | KIVI_PLUS_K32 | KIVI_PLUS_V32},
        {2, 3, KIVI_PLUS | KIVI_PLUS_FIT | KIVI_PLUS_TURN | KIVI_PLUS_ZERO | KIVI_PLUS_K32},
        {2, 2, KIVI_PLUS | KIVI_PLUS_WIDE | KIVI_PLUS_ZERO | KIVI_PLUS_V32},
        {2, 2, KIVI_PLUS | KIVI_PLUS_K32 | KIVI_PLUS_STEP | KIVI_PLUS_V32},
        {2, 2, KIVI_PLUS | KIVI_PLUS_ZERO | KIVI_PLUS_K32 | KIVI_PLUS_V32}};
    static const uint32_t sinks[] = {4, 40, 0, 20, 130};
    enum { N = sizeof bits / sizeof *bits };
    for (uint32_t i = 0; i < 6; i++)
        for (uint32_t b = 0; b < N; b++) {
            uint32_t turn = i * N + b;
            one_plus(dims[i], turn % 3, bits[b], (i + b) % 4 == 3 ? 256 : 128, sinks[turn % 5],
                     turn % 4, (i + 2 * b) % 5 == 4 ? 150 : 450, false);
        }
}

/* A + kind without its parts and with all of a plain kind's is kivi2: the same output. */
static void no_part_is_plain(void) {
    static attn_case a;
    for (uint32_t d = 32; d <= 128; d *= 2)
        for (uint32_t sinks = 0; sinks <= 40; sinks += 20) {
            if (!check_case("attn/no-part-is-plain/d%u-s%u", d, sinks)) continue;
            uint32_t tokens[450];
            float *out[2];
            for (uint32_t i = 0; i < 450; i++) tokens[i] = (uint32_t)hash_u64(check_opt.seed, i);
            for (int plus = 0; plus < 2; plus++) {
                a = (attn_case){.w = world_small()};
                a.w.geometry.head_dim = d, a.w.geometry.n_layers = 1, a.w.geometry.n_pages = 6;
                a.w.geometry.kv = (kivi_kv_options){
                    .k_bits = 2, .v_bits = 2, .residual_tokens = 128, .sink_tokens = sinks};
                if (plus)
                    a.w.geometry.kv.plus =
                        KIVI_PLUS | KIVI_PLUS_ZERO | KIVI_PLUS_K32 | KIVI_PLUS_V32;
                make_plan(&a, 450, false);
                out[plus] = check_alloc((size_t)a.n_probes * a.w.geometry.n_heads * d * 4);
                run_plan(out[plus], &a, KI_ISA_SCALAR, tokens);
            }
            CHECK(!memcmp(out[0], out[1], (size_t)a.n_probes * a.w.geometry.n_heads * d * 4),
                  "another output");
            free(out[0]), free(out[1]);
            check_end();
        }
}

/* Groups that divide the head size, in turn. */
static uint32_t group_for(uint32_t d, uint32_t i) {
    uint32_t groups[4], n = 0;
    for (uint32_t g = 16; g <= 128; g *= 2)
        if (d % g == 0) groups[n++] = g;
    return groups[i % n];
}

void check_attn(void) {
    static const uint32_t dims[] = {32, 64, 80, 96, 128, 256};
    if (!check_wants("attn/")) return;
    for (uint32_t i = 0; i < 6; i++)
        for (uint32_t b = 0; b < 8;
             b++) { /* each head size with each pair of bits; the rest in turn */
            uint32_t turn = i * 8 + b, group = group_for(dims[i], b + i);
            uint32_t residual = turn % 2 && group <= 32 ? 32 : 128,
                     sinks = turn / 2 % 2 ? KI_MAX(32u, group) : 0;
            one(dims[i], turn % 3, b, group, residual, sinks, turn % 4, turn % 5 ? 337 : 100,
                false);
        }
    for (uint32_t b = 0; b < 8; b++)
        for (uint32_t rule = 0; rule < 4; rule++)
            one(64, 1, b, 32, 32, rule % 2 ? 32 : 0, rule, 290, false);
    for (uint32_t i = 0; i < 12; i++) { /* sinks that end within a block, a group, a page */
        static const uint32_t sinks[] = {1, 4, 20, 47, 100, 128};
        uint32_t group = 32u << i % 3, residual = i % 2 ? 128 : group;
        one(128, i % 3, i % 5, group, residual, sinks[i % 6], i % 4, 337, false);
        one(64, 1, i % 8, 16, 32, sinks[i % 6], (i + 1) % 4, 150, false);
    }
    one(64, 0, 0, 32, 128, 0, 0, 1, false);
    one(128, 2, 1, 64, 128, 64, 1, 1, false);
    static const uint32_t longer[] = {1000, 4000};
    for (uint32_t i = 0; i < 2; i++)
        for (uint32_t rule = 0; rule < 4; rule++)
            one(64, 2, rule, 32, 128, rule % 2 ? 32 : 0, rule, longer[i], false);
    one(128, 2, 0, 32, 128, 0, 0, 1000, false);
    one(64, 0, 0, 32, 128, 0, 1, 32768, true);
    one(128, 0, 3, 128, 128, 128, 1, 32768, true);
    plus_kinds();
    plain_parts();
    no_part_is_plain();
}
