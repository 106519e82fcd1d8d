/* The quantizer: golden vectors, the error bound, equality of all instruction sets, guard pages,
 * float16 rows. */
#include "check.h"
#include "golden.h"

#include <ctype.h>

/* ---- golden vectors ---- */

typedef struct npy {
    const uint8_t *data;
    size_t shape[2], n_items;
} npy;

/* Version 1 files as numpy.save writes them: magic, header length, {'descr': '<f2', ..., 'shape':
 * (24, 16), }. */
static bool npy_open(npy *out, golden_file file, const char *descr, size_t item_bytes) {
    size_t n = (size_t)(file.end - file.bytes);
    char header[256] = {0};
    if (n < 10 || memcmp(file.bytes, "\x93NUMPY\x01", 7) != 0) return false;
    size_t header_bytes = file.bytes[8] | (size_t)file.bytes[9] << 8;
    if (header_bytes >= sizeof header || 10 + header_bytes > n) return false;
    memcpy(header, file.bytes + 10, header_bytes);
    const char *p = strstr(header, "'shape': (");
    if (!strstr(header, descr) || !strstr(header, "'fortran_order': False") || !p) return false;
    *out = (npy){.data = file.bytes + 10 + header_bytes, .shape = {1, 1}, .n_items = 1};
    p += 10;
    for (int i = 0; i < 2 && isdigit((unsigned char)*p); i++) {
        char *end;
        out->shape[i] = strtoull(p, &end, 10);
        out->n_items *= out->shape[i];
        p = end + strspn(end, ", ");
    }
    return out->data + out->n_items * item_bytes == file.end;
}

typedef struct golden {
    npy x, code, scale, zero, kind;
    size_t n_groups;
} golden;

static void golden_open(golden *g, const golden_set *set) {
    bool ok = npy_open(&g->x, set->x, "'<f2'", 2) && npy_open(&g->code, set->code, "'|u1'", 1) &&
              npy_open(&g->scale, set->scale, "'<f2'", 2) &&
              npy_open(&g->zero, set->zero, "'<f2'", 2) &&
              npy_open(&g->kind, set->kind, "'|u1'", 1);
    CHECK(ok, "a golden file is not what numpy.save writes");
    g->n_groups = ok ? g->x.shape[0] : 0;
    CHECK(!ok || (g->x.shape[1] == set->group && g->code.n_items == g->x.n_items &&
                  g->scale.n_items == g->n_groups && g->zero.n_items == g->n_groups &&
                  g->kind.n_items == g->n_groups),
          "shapes of the golden files disagree");
}

static void golden_compare(const golden_set *set, const ki_quant_kernels *kernels) {
    golden g;
    golden_open(&g, set);
    size_t n = g.n_groups * set->group;
    uint16_t *x = check_alloc(n * 2), *scale = check_alloc(g.n_groups * 2),
             *zero = check_alloc(g.n_groups * 2);
    uint8_t *codes = check_alloc(n);
    memcpy(x, g.x.data, n * 2);
    kernels->quantize(codes, scale, zero, x, g.n_groups, set->group, set->bits);
    for (size_t i = 0; i < g.n_groups && !check_failed(); i++) {
        uint16_t want[2];
        memcpy(&want[0], g.scale.data + 2 * i, 2);
        memcpy(&want[1], g.zero.data + 2 * i, 2);
        CHECK(scale[i] == want[0] && zero[i] == want[1],
              "group %zu (kind %u): scale %04x zero %04x, expected %04x %04x", i, g.kind.data[i],
              scale[i], zero[i], want[0], want[1]);
        for (size_t j = i * set->group; j < (i + 1) * set->group; j++)
            CHECK(codes[j] == g.code.data[j],
                  "group %zu (kind %u), element %zu: code %u, expected %u", i, g.kind.data[i],
                  j % set->group, codes[j], g.code.data[j]);
    }
    free(x), free(scale), free(zero), free(codes);
}

static void golden_cases(const golden_set *set) {
    if (check_case("quant/golden/b%u-g%u/definition", set->bits, set->group)) {
        ki_quant_kernels definition = {.quantize = ki_quantize_scalar};
        golden_compare(set, &definition);
        check_end();
    }
    for (int i = 0; i < KI_ISA_COUNT; i++)
        if (check_case_isa((ki_isa)i, "quant/golden/b%u-g%u", set->bits, set->group)) {
            golden_compare(set, &ki_kernels_get((ki_isa)i)->quant);
            check_end();
        }
}

/* ---- generated input: the kinds of tests/golden/make_quant.py, then signed zeros and any
 * finite pattern ---- */

enum { N_KINDS = 14, BLOCK_GROUPS = 64 };
static const char *const kind_names[N_KINDS] = {
    "normal",     "outlier",      "constant",   "two values", "subnormal",
    "huge",       "large mean",   "exact ties", "negative",   "tiny range",
    "full range", "signed zeros", "minus zero", "any pattern"};

static float element(unsigned kind, unsigned i, float constant, rng *r) {
    float n = rng_normal(r);
    switch (kind) {
    case 1: return i == 5 ? n * 50 : n;
    case 2: return constant;
    case 3: return rng_below(r, 2) ? -1.25f : 0.375f;
    case 4: return n * 2e-7f;
    case 5: return n * 3e4f;
    case 6: return 1000 + n * 0.3f;
    case 7: return i == 0 ? 0 : i == 1 ? 3 : (float)rng_below(r, 7) * 0.5f;
    case 8: return -fabsf(n) - 1;
    case 9: return 1 + (float)rng_below(r, 3) * 0x1p-10f;
    case 10: return i == 0 ? -65504 : i == 1 ? 65504 : n;
    case 11: return rng_below(r, 2) ? -0.0f : 0.0f;
    case 12: return -0.0f;
    default: return n;
    }
}

static void make_groups(uint16_t *x, unsigned kind, size_t n_groups, unsigned group, rng *r) {
    for (size_t g = 0; g < n_groups; g++) {
        float constant = rng_normal(r);
        for (unsigned i = 0; i < group; i++) {
            float v = element(kind, i, constant, r);
            v = v > 65504 ? 65504 : v < -65504 ? -65504 : v;
            x[g * group + i] = ki_f32_to_f16(v);
            if (kind == 13) do
                    x[g * group + i] = (uint16_t)rng_u64(r);
                while ((x[g * group + i] & 0x7c00) == 0x7c00);
        }
    }
}

typedef struct block {
    uint16_t x[BLOCK_GROUPS * 128], scale[BLOCK_GROUPS], zero[BLOCK_GROUPS];
    uint8_t codes[BLOCK_GROUPS * 128];
} block;

/* |x - (code scale + zero)| <= scale / 2, in doubles, where code scale + zero is exact. The float32
 * arithmetic adds: x - zero and the division round once each, a relative 2^-24 of a quotient of at
 * most L (1 + 2^-22) each, so the code belongs to a quotient moved by at most L 2^-23 and a little;
 * the scale's own division may round down by a relative 2^-24, which moves the largest quotient by
 * no more than L 2^-24. Together below L 2^-22 scales. */
static void check_bound(const block *b, unsigned kind, unsigned group, unsigned bits) {
    double levels = (double)((1u << bits) - 1);
    for (size_t g = 0; g < BLOCK_GROUPS; g++) {
        double scale = (double)ki_f16_to_f32(b->scale[g]), zero = (double)ki_f16_to_f32(b->zero[g]);
        double bound = scale * (0.5 + levels * 0x1p-22), min = 1e9, max = -1e9;
        for (size_t i = g * group; i < (g + 1) * group; i++) {
            double x = (double)ki_f16_to_f32(b->x[i]);
            min = x < min ? x : min;
            max = x > max ? x : max;
            double error = fabs(x - (b->codes[i] * scale + zero));
            if (error > bound || b->codes[i] > levels)
                check_fail(__FILE__, __LINE__, "kind %s: x %g code %u scale %g zero %g",
                           kind_names[kind], x, b->codes[i], scale, zero);
        }
        /* the smallest scale that reaches the maximum, and the zero as written */
        uint16_t s = b->scale[g];
        double below = s ? (double)ki_f16_to_f32((uint16_t)(s - 1)) : 0;
        bool tight = zero == min && !(b->zero[g] == 0x8000) && (s ? s < 0x7c00 : max == min) &&
                     (!s || below * levels < (max - min) * (1 + 0x1p-22));
        CHECK(tight, "kind %s: scale %04x zero %04x for [%g, %g]", kind_names[kind], s, b->zero[g],
              min, max);
    }
}

/* Elements of each (bits, group) so that the twelve together see 10^7 (10^8 with --long). */
static size_t blocks_of(unsigned group) {
    size_t elements = check_opt.thorough ? 100000000 / 12 + 1 : 10000000 / 12 + 1;
    return elements / (BLOCK_GROUPS * (size_t)group) / N_KINDS + 1;
}

static void property(unsigned bits, unsigned group) {
    if (!check_case("quant/bound/b%u-g%u", bits, group)) return;
    static block b;
    rng r = check_rng();
    for (size_t n = 0; n < blocks_of(group) && !check_failed(); n++)
        for (unsigned kind = 0; kind < N_KINDS; kind++) {
            make_groups(b.x, kind, BLOCK_GROUPS, group, &r);
            ki_quantize_scalar(b.codes, b.scale, b.zero, b.x, BLOCK_GROUPS, group, bits);
            check_bound(&b, kind, group, bits);
        }
    check_note("%zu elements", blocks_of(group) * N_KINDS * BLOCK_GROUPS * group);
    check_end();
}

static void equal(unsigned bits, unsigned group, ki_isa isa) {
    if (!check_case_isa(isa, "quant/equal/b%u-g%u", bits, group)) return;
    static block want, got;
    rng r = check_rng();
    const ki_quant_kernels *kernels = &ki_kernels_get(isa)->quant;
    for (size_t n = 0; n < blocks_of(group) && !check_failed(); n++)
        for (unsigned kind = 0; kind < N_KINDS; kind++) {
            make_groups(want.x, kind, BLOCK_GROUPS, group, &r);
            ki_quantize_scalar(want.codes, want.scale, want.zero, want.x, BLOCK_GROUPS, group,
                               bits);
            kernels->quantize(got.codes, got.scale, got.zero, want.x, BLOCK_GROUPS, group, bits);
            for (size_t g = 0; g < BLOCK_GROUPS; g++)
                CHECK(got.scale[g] == want.scale[g] && got.zero[g] == want.zero[g],
                      "kind %s: scale %04x zero %04x, expected %04x %04x", kind_names[kind],
                      got.scale[g], got.zero[g], want.scale[g], want.zero[g]);
            CHECK(!memcmp(got.codes, want.codes, BLOCK_GROUPS * group), "kind %s: codes",
                  kind_names[kind]);
        }
    check_end();
}

/* ---- memory past the ends ---- */

static void guarded(ki_isa isa) {
    if (!check_case_isa(isa, "quant/guard")) return;
    const ki_quant_kernels *kernels = &ki_kernels_get(isa)->quant;
    rng r = check_rng();
    for (unsigned group = 16; group <= 128; group *= 2)
        for (size_t n = 1; n <= 5; n++) {
            guard x = guard_alloc(n * group * 2), codes = guard_alloc(n * group);
            guard scale = guard_alloc(n * 2), zero = guard_alloc(n * 2),
                  f32 = guard_alloc(n * group * 4);
            uint8_t *fronts[] = {codes.data - 8, scale.data - 8, zero.data - 8, x.data - 8};
            for (int i = 0; i < 4; i++) memset(fronts[i], 0xa5, 8);
            for (size_t i = 0; i < n * group; i++) ((float *)f32.data)[i] = rng_normal(&r);
            uint64_t n_saturated = 0;
            CHECK(kernels->to_f16((uint16_t *)x.data, &n_saturated, (const float *)f32.data,
                                  n * group),
                  "to_f16");
            for (unsigned bits = 2; bits <= 8; bits *= 2)
                kernels->quantize(codes.data, (uint16_t *)scale.data, (uint16_t *)zero.data,
                                  (const uint16_t *)x.data, n, group, bits);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 8; j++)
                    CHECK(fronts[i][j] == 0xa5, "wrote before buffer %d", i);
            guard_free(&x), guard_free(&codes), guard_free(&scale), guard_free(&zero),
                guard_free(&f32);
        }
    check_end();
}

/* ---- float32 rows to float16 ---- */

static void to_f16_values(ki_isa isa) {
    if (!check_case_isa(isa, "quant/to-f16/values")) return;
    const ki_quant_kernels *kernels = &ki_kernels_get(isa)->quant;
    rng r = check_rng();
    float x[256];
    uint16_t got[256], want[256];
    for (int round = 0; round < 4000; round++) {
        size_t n = 16 * (1 + rng_below(&r, 16));
        unsigned kind = rng_below(&r, 5);
        for (size_t i = 0; i < n; i++) {
            static const float scales[] = {1, 1e-6f, 2e4f, 1e36f, 100};
            x[i] = rng_normal(&r) * scales[kind];
            if (rng_below(&r, 40) == 0) x[i] = rng_below(&r, 2) ? 65504.0f : -65504.0f;
            if (kind == 4 && rng_below(&r, 40) == 0) x[i] = rng_below(&r, 2) ? 65505.0f : -65519.0f;
        }
        uint64_t n_got = 5, n_want = 5, n_counted = 5;
        for (size_t i = 0; i < n; i++) n_counted += fabsf(x[i]) > 65504;
        bool got_ok = kernels->to_f16(got, &n_got, x, n),
             want_ok = ki_to_f16_scalar(want, &n_want, x, n);
        CHECK(got_ok && want_ok, "a finite row is refused");
        CHECK(n_got == n_counted && n_want == n_counted, "%llu values saturated, counted %llu",
              (unsigned long long)n_counted - 5, (unsigned long long)n_got - 5);
        CHECK(!memcmp(got, want, n * 2), "bytes differ from the definition");
        for (size_t i = 0; i < n; i++) {
            float v = x[i] > 65504 ? 65504 : x[i] < -65504 ? -65504 : x[i];
            CHECK(want[i] == ki_f32_to_f16(v), "%a gives %04x", (double)x[i], want[i]);
        }
        CHECK(ki_f16_all_finite(got, n), "saturated rows are finite");
    }
    check_end();
}

static void to_f16_not_finite(ki_isa isa) {
    if (!check_case_isa(isa, "quant/to-f16/not-finite")) return;
    const ki_quant_kernels *kernels = &ki_kernels_get(isa)->quant;
    static const uint32_t patterns[] = {0x7f800000, 0xff800000, 0x7fc00000,
                                        0xffc00000, 0x7f800001, 0xff812345};
    rng r = check_rng();
    float x[64];
    uint16_t out[64];
    for (size_t n = 16; n <= 64; n += 16)
        for (size_t lane = 0; lane < n; lane++)
            for (size_t p = 0; p < 6; p++)
                for (int big = 0; big < 2; big++) {
                    for (size_t i = 0; i < n; i++) x[i] = rng_normal(&r) * (big ? 1e5f : 1.0f);
                    memcpy(&x[lane], &patterns[p], 4);
                    uint64_t n_saturated = 0;
                    CHECK(!kernels->to_f16(out, &n_saturated, x, n),
                          "%08x in lane %zu of %zu is not seen", patterns[p], lane, n);
                    CHECK(!ki_to_f16_scalar(out, &n_saturated, x, n), "the definition misses it");
                    memset(out, 0, sizeof out);
                    out[lane] = (uint16_t)(patterns[p] >> 16 | 0x7c00);
                    CHECK(!ki_f16_all_finite(out, n) && ki_f16_all_finite(out, lane),
                          "ki_f16_all_finite");
                }
    check_end();
}

void check_quant(void) {
    for (size_t i = 0; i < GOLDEN_SETS; i++) golden_cases(&golden_sets[i]);
    for (unsigned bits = 2; bits <= 8; bits *= 2)
        for (unsigned group = 16; group <= 128; group *= 2) {
            property(bits, group);
            for (int i = 0; i < KI_ISA_COUNT; i++) equal(bits, group, (ki_isa)i);
        }
    for (int i = 0; i < KI_ISA_COUNT; i++) {
        guarded((ki_isa)i);
        to_f16_values((ki_isa)i);
        to_f16_not_finite((ki_isa)i);
    }
}
