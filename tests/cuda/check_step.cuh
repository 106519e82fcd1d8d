/* check_step.cuh: what a decode step does beside attention: pages closed at its end, norms. Cases
 * of check-cuda. */
#ifndef KI_CUDA_CHECK_STEP_CUH
#define KI_CUDA_CHECK_STEP_CUH
#include "kv_cuda.h" /* ki_fail is C's */

#include "dense_cuda.h"
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
        ki_cuda_norm_rows(h.data, x.data, &norm, n_rows, n, KI_CUDA_F32, held, NULL);
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
    check_late(base);
    for (uint32_t n : {64u, 576u, 4096u, 4100u, 8192u, 8200u, 30u})
        for (int has_bias = 0; has_bias < 2; has_bias++)
            if (open_case(text("norm/%u%s", n, has_bias ? "-bias" : ""))) run_norm(n, has_bias);
}

#endif
