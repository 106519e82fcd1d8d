/* check_step.cuh: what a decode step does beside attention: pages closed at its end, products of
 * few rows, norms. Cases of check-cuda. */
#ifndef KI_CUDA_CHECK_STEP_CUH
#define KI_CUDA_CHECK_STEP_CUH
#include "gemv.h"
#include "harness.cuh"
#include "world.cuh"

#include <math.h>

/* ---- pages closed at the end of a step ---- */

static void feed(world &w, const std::vector<uint32_t> &n_rows, bool is_prompt, rng &data) {
    std::vector<uint16_t> k, v, q, ks, vs, qs;
    uint32_t at = 0, most = 0;
    for (uint32_t i = 0; i < w.o.n_seqs; i++) {
        random_rows(k, v, q, w.o, n_rows[i], data);
        ks.insert(ks.end(), k.begin(), k.end()), vs.insert(vs.end(), v.begin(), v.end());
        qs.insert(qs.end(), q.begin(), q.end());
        w.state[i].n_rows = n_rows[i], w.state[i].first_row = at;
        w.state[i].flags = is_prompt ? KI_CUDA_PROMPT : 0;
        at += n_rows[i], most = std::max(most, n_rows[i]);
    }
    w.k_in.put(ks.data(), ks.size()), w.v_in.put(vs.data(), vs.size());
    w.q_in.put(qs.data(), qs.size());
    if (is_prompt) w.prompt(at, most, false);
    else w.decode(at);
}

/* Prompts of different lengths, then rows one by one until each sequence has closed a page; one
 * sequence is idle. All bytes of pages, and the last outputs, of both ways. */
static void run_late(world_options o) {
    std::vector<uint8_t> pages[2];
    std::vector<float> outs[2];
    o.n_seqs = 5, o.n_layers = 3, o.max_tokens = 512, o.split_tokens = 256;
    for (int late = 0; late < 2 && !check_failed(); late++) {
        rng order = {5}, data = {6};
        world w;
        o.late = late;
        w.make(o, 5 * 160, order);
        feed(w, {100, 113, 127, 128, 150}, true, data);
        for (uint32_t step = 0; step < 160 && !check_failed(); step++)
            feed(w, {1, 1, 1, step % 3 == 0, 1}, false, data);
        pages[late] = w.pool.get(0, w.pool.n);
        outs[late] = w.out.get(0, (size_t)4 * o.n_heads * o.head_dim);
    }
    CHECK(pages[0] == pages[1], "other bytes of pages");
    CHECK(!memcmp(outs[0].data(), outs[1].data(), outs[0].size() * 4), "other outputs");
    end_case();
}

static void check_late(const world_options &base) {
    static const struct {
        const char *name;
        uint32_t d, h, hk, kb, vb, g, r, s;
        bool plus;
    } cases[] = {{"kivi2", 128, 8, 4, 2, 2, 32, 128, 0, false},
                 {"kivi2-r32", 128, 4, 4, 2, 2, 32, 32, 0, false},
                 {"kivi2-sinks", 64, 4, 2, 2, 2, 32, 64, 40, false},
                 {"kivi4-d256", 256, 4, 2, 4, 4, 32, 128, 0, false},
                 {"kivi8-d96", 96, 4, 2, 8, 8, 32, 128, 0, false},
                 {"k4v2-g64", 128, 4, 2, 4, 2, 64, 128, 0, false},
                 {"kivi2-g128", 128, 4, 2, 2, 2, 128, 128, 0, false},
                 {"k16v2", 128, 4, 2, 16, 2, 32, 128, 0, false},
                 {"kivi2+", 128, 8, 4, 2, 2, 128, 128, 4, true},
                 {"kivi2+-d64", 64, 4, 2, 2, 2, 128, 128, 4, true},
                 {"kivi2+-d256", 256, 2, 2, 2, 2, 128, 128, 0, true},
                 {"k4v3+-d80", 80, 4, 2, 4, 3, 128, 128, 4, true}};
    for (const auto &c : cases)
        for (int pdl = 0; pdl < 2; pdl++) {
            world_options o = base;
            o.head_dim = c.d, o.n_heads = c.h, o.n_kv_heads = c.hk;
            o.k_bits = c.kb, o.v_bits = c.vb, o.group = c.g, o.residual = c.r, o.sinks = c.s;
            o.plus = c.plus, o.rule = KIVI_RULE_STREAM;
            o.pdl = pdl && c.kb < 16 && c.vb < 16;
            if (open_case(text("late/%s%s", c.name, pdl ? "-pdl" : ""))) run_late(o);
        }
}

/* ---- products of few rows ---- */

struct product_case {
    uint32_t n, k, m;
    ki_cuda_type type;
};

static float of_type(uint16_t bits, ki_cuda_type type) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return type == KI_CUDA_BF16 ? x : ki_f16_to_f32(bits);
}
static std::vector<uint16_t> random_matrix(size_t n, ki_cuda_type type, rng &r) {
    std::vector<uint16_t> out(n);
    for (uint16_t &x : out) {
        float v = (float)((double)(r.u64() >> 40) / (1 << 23) - 1);
        uint32_t bits;
        memcpy(&bits, &v, 4);
        x = type == KI_CUDA_BF16 ? (uint16_t)(bits >> 16) : ki_f32_to_f16(v);
    }
    return out;
}

/* Against float64: k products and sums in float32, each 2^-24 of what is summed; the order adds no
 * more than log2 k of them to a number. With weights asked for ahead, and added to what is there:
 * the same bits. A gate and its up: the bits of the product and the activation one by one. */
static void run_product(const product_case &c) {
    rng r = case_rng();
    std::vector<uint16_t> w = random_matrix((size_t)c.n * c.k, c.type, r);
    std::vector<uint16_t> x = random_matrix((size_t)c.m * c.k, c.type, r);
    device_array<uint16_t> weight, rows, act, fused;
    device_array<float> out;
    size_t n_out = (size_t)c.m * c.n;
    weight.make(w.size()), rows.make(x.size()), out.make(n_out);
    act.make(n_out / 2), fused.make(n_out / 2);
    weight.put(w.data(), w.size()), rows.put(x.data(), x.size());
    ki_gemv_call call = {};
    call.out = out.data, call.out_stride = c.n, call.weight = weight.data, call.x = rows.data;
    call.n = c.n, call.k = c.k, call.m = c.m, call.type = c.type;
    CHECK_OK(ki_gemv_run(&call, NULL, err));
    std::vector<float> got = out.get(0, n_out);
    for (uint32_t m = 0; m < c.m && !check_failed(); m++)
        for (uint32_t n = 0; n < c.n && !check_failed(); n++) {
            double want = 0, size = 0;
            for (uint32_t k = 0; k < c.k; k++) {
                double p = (double)of_type(w[(size_t)n * c.k + k], c.type) *
                           of_type(x[(size_t)m * c.k + k], c.type);
                want += p, size += fabs(p);
            }
            double error = fabs(got[(size_t)m * c.n + n] - want);
            CHECK(error <= size * 0x1p-24 * (c.k / 32 + 8), "row %u output %u: %g, expected %g", m,
                  n, got[(size_t)m * c.n + n], want);
        }
    call.ahead_bytes = KI_GEMV_AHEAD_BYTES;
    CHECK_OK(ki_gemv_run(&call, NULL, err));
    std::vector<float> ahead = out.get(0, n_out);
    CHECK(!memcmp(got.data(), ahead.data(), n_out * 4), "ahead: other bits");
    call.add = true;
    CHECK_OK(ki_gemv_run(&call, NULL, err));
    std::vector<float> twice = out.get(0, n_out);
    for (size_t i = 0; i < n_out; i++) CHECK(twice[i] == got[i] + got[i], "added: %zu", i);
    out.put(got.data(), n_out);
    for (ki_cuda_act how : {KI_CUDA_SILU_MUL, KI_CUDA_GELU_MUL}) {
        const ki_cuda_ahead ahead = {weight.data, c.n, c.k * 2, c.k * 2};
        ki_cuda_activate(act.data, out.data, how, c.m, c.n / 2, c.type, &ahead, NULL);
        call.add = false, call.act_out = fused.data, call.act = how, call.out = NULL;
        CHECK_OK(ki_gemv_run(&call, NULL, err));
        CHECK(act.get(0, n_out / 2) == fused.get(0, n_out / 2), "activation %d: other bits", how);
    }
    end_case();
}

/* ---- norms ---- */

static void run_norm(uint32_t n, bool has_bias) {
    const uint32_t n_rows = 3;
    rng r = case_rng();
    device_array<float> x, weight, bias, h, sum;
    std::vector<float> in(n_rows * n), w(n), b(n);
    for (std::vector<float> *v : {&in, &w, &b})
        for (float &e : *v) e = (float)((double)(r.u64() >> 40) / (1 << 22) - 1.5);
    x.make(in.size()), h.make(in.size()), sum.make(in.size()), weight.make(n), bias.make(n);
    x.put(in.data(), in.size()), weight.put(w.data(), n), bias.put(b.data(), n);
    ki_cuda_norm norm = {weight.data, has_bias ? bias.data : NULL, 1e-5f};
    for (int held = 0; held < 2 && !check_failed(); held++) {
        sum.put(in.data(), in.size());
        MUST(cudaMemset(h.data, 0xff, in.size() * 4));
        /* rows of x in the place of weights: what is asked for is there */
        const ki_cuda_ahead ahead = {x.data, n_rows, n * 4, n * 4 / 16 * 16};
        ki_cuda_norm_rows(h.data, x.data, &norm, n_rows, n, KI_CUDA_F32, held,
                          n % 4 ? NULL : &ahead, NULL);
        ki_cuda_add_norm(sum.data, x.data, &norm, n_rows, n, held, NULL);
        std::vector<float> got = h.get(0, in.size()), added = sum.get(0, in.size());
        for (uint32_t row = 0; row < n_rows && !check_failed(); row++) {
            double mean = 0, square = 0;
            const float *v = in.data() + (size_t)row * n;
            for (uint32_t i = 0; i < n && has_bias; i++) mean += v[i] / (double)n;
            for (uint32_t i = 0; i < n; i++) square += (v[i] - mean) * (v[i] - mean) / n;
            for (uint32_t i = 0; i < n; i++) {
                double want = (v[i] - mean) / sqrt(square + 1e-5) * w[i] + (has_bias ? b[i] : 0);
                double near = 4e-6 * (fabs(want) + 4); /* a dozen roundings of numbers up to 4 */
                size_t at = (size_t)row * n + i;
                CHECK(fabs(got[at] - want) <= near, "held %d row %u, %u: %g, expected %g", held,
                      row, i, got[at], want);
                CHECK(fabs(added[at] - (v[i] + want)) <= near, "held %d row %u, %u: sum %g", held,
                      row, i, added[at]);
            }
        }
    }
    end_case();
}

static void check_step(const world_options &base) {
    static const product_case products[] = {{1000, 4096, 1, KI_CUDA_F16},
                                            {1002, 4096, 2, KI_CUDA_F16},
                                            {1002, 1536, 3, KI_CUDA_BF16},
                                            {514, 11008, 4, KI_CUDA_F16},
                                            {514, 11008, 1, KI_CUDA_BF16},
                                            {2, 8, 1, KI_CUDA_F16},
                                            {38, 200, 3, KI_CUDA_F16},
                                            {30, 1032, 4, KI_CUDA_BF16}};
    check_late(base);
    for (const product_case &c : products)
        if (open_case(text("product/%ux%u-m%u%s", c.n, c.k, c.m,
                           c.type == KI_CUDA_BF16 ? "-bf16" : "")))
            run_product(c);
    for (uint32_t n : {64u, 576u, 4096u, 4100u, 8192u, 8200u, 30u})
        for (int has_bias = 0; has_bias < 2; has_bias++)
            if (open_case(text("norm/%u%s", n, has_bias ? "-bias" : ""))) run_norm(n, has_bias);
}

#endif
