/* check_step.cuh: what a decode step does beside attention: pages closed at its end, norms. Cases
 * of check-cuda. */
#ifndef KI_CUDA_CHECK_STEP_CUH
#define KI_CUDA_CHECK_STEP_CUH
#include "kv_cuda.h" /* ki_fail is C's */

#include "dense_cuda.h"
#include "harness.cuh"
#include "world.cuh"

#include <math.h>
#include <thread>

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

/* ---- rows that attention takes itself ---- */

/* Float32 rows with rope, and a few numbers that no float16 holds, appended by a kernel of their
 * own or by attention: all bytes of windows, sinks and pages, outputs, counters and flags. One
 * sequence is idle at times. */
static void run_own(world_options o) {
    std::vector<uint8_t> bytes[2];
    std::vector<float> outs[2];
    o.n_seqs = 4, o.n_layers = 2, o.max_tokens = 512, o.pdl = true, o.own = true;
    for (int own = 0; own < 2 && !check_failed(); own++) {
        rng order = {5}, data = {6};
        world w;
        w.make(o, 4 * 160, order);
        uint32_t q = o.n_heads * o.head_dim, width = q + 2 * o.n_kv_heads * o.head_dim;
        w.rope.make((size_t)4 * o.head_dim);
        feed(w, {33, 127, 128, 150}, true, data);
        std::vector<float> rows((size_t)4 * width), rope((size_t)4 * o.head_dim);
        for (uint32_t step = 0; step < 140 && !check_failed(); step++) {
            uint32_t n = 0;
            for (uint32_t i = 0; i < 4; i++) {
                w.state[i].n_rows = i < 3 || step % 3 == 0, w.state[i].first_row = n;
                w.state[i].flags = 0;
                n += w.state[i].n_rows;
            }
            for (float &x : rows) x = data.normal();
            for (size_t i = 0; i < rope.size(); i += 2) {
                float angle = data.normal();
                rope[i] = cosf(angle), rope[i + 1] = sinf(angle);
            }
            rows[data.u64() % rows.size()] = 1e6f;
            if (step % 16 == 5) rows[q + data.u64() % (width - q)] = INFINITY;
            w.own_rows.put(rows.data(), rows.size()), w.rope.put(rope.data(), rope.size());
            w.put_state();
            w.poison(n);
            ki_cuda_attend_call c = w.attend_call(0, n, 1);
            CHECK_OK(ki_cuda_decode_plan(&c, NULL, err));
            for (c.layer = 0; c.layer < o.n_layers; c.layer++) {
                ki_cuda_append_call a = w.own_call(c.layer, n);
                c.append = own ? &a : NULL;
                if (!own) CHECK_OK(ki_cuda_append_rows(&a, NULL, err));
                CHECK_OK(ki_cuda_decode_attend(&c, NULL, err));
            }
            ki_cuda_append_call first = w.own_call(0, n);
            CHECK_OK(ki_cuda_close(&first, o.n_layers, NULL, err));
            w.finish();
            std::vector<float> out = w.out.get(0, (size_t)n * q);
            outs[own].insert(outs[own].end(), out.begin(), out.end());
        }
        auto add = [&](const void *at, size_t n) {
            bytes[own].insert(bytes[own].end(), (const uint8_t *)at, (const uint8_t *)at + n);
        };
        std::vector<uint8_t> pool = w.pool.get(0, w.pool.n), rings = w.rings.get(0, w.rings.n);
        std::vector<uint8_t> sinks = w.sinks.get(0, w.sinks.n);
        std::vector<uint32_t> flags = w.flags.get(0, w.flags.n);
        ki_cuda_counters seen = w.counters.get(0, 1)[0];
        CHECK(seen.n_saturated && seen.n_nonfinite, "nothing was beyond float16");
        add(pool.data(), pool.size()), add(rings.data(), rings.size());
        add(sinks.data(), sinks.size()), add(flags.data(), flags.size() * 4);
        add(&seen, sizeof seen);
    }
    CHECK(bytes[0] == bytes[1], "other bytes of the cache, flags or counters");
    CHECK(outs[0].size() == outs[1].size() &&
              !memcmp(outs[0].data(), outs[1].data(), outs[0].size() * 4),
          "other outputs");
    end_case();
}

static void check_own(const world_options &base) {
    static const struct {
        const char *name;
        uint32_t d, h, hk, kb, vb, g, s, split;
        bool plus;
    } cases[] = {{"kivi2", 128, 8, 4, 2, 2, 32, 0, 512, false},
                 {"kivi2-many", 128, 48, 48, 2, 2, 32, 0, 512, false},
                 {"kivi2+-many", 128, 48, 48, 2, 2, 128, 4, 512, true},
                 {"kivi2-split", 128, 8, 8, 2, 2, 32, 0, 128, false},
                 {"kivi2-sinks", 64, 4, 2, 2, 2, 32, 40, 256, false},
                 {"kivi2-mqa", 64, 20, 1, 2, 2, 32, 0, 256, false},
                 {"kivi4-d256", 256, 4, 2, 4, 4, 32, 0, 512, false},
                 {"kivi8-d96", 96, 4, 2, 8, 8, 32, 0, 512, false},
                 {"kivi2-d80", 80, 4, 4, 2, 2, 16, 0, 512, false},
                 {"kivi2+", 128, 8, 8, 2, 2, 128, 4, 512, true},
                 {"kivi2+-split", 128, 8, 2, 2, 2, 128, 4, 128, true},
                 {"kivi2+-d64", 64, 4, 2, 2, 2, 128, 4, 512, true},
                 {"kivi2+-d256", 256, 2, 2, 2, 2, 128, 0, 512, true},
                 {"k4v3+-d80", 80, 4, 2, 4, 3, 128, 4, 512, true}};
    for (const auto &c : cases) {
        world_options o = base;
        o.head_dim = c.d, o.n_heads = c.h, o.n_kv_heads = c.hk;
        o.k_bits = c.kb, o.v_bits = c.vb, o.group = c.g, o.sinks = c.s, o.split_tokens = c.split;
        o.plus = c.plus, o.rule = KIVI_RULE_STREAM;
        if (open_case(text("own/%s", c.name))) run_own(o);
    }
}

/* ---- the value that leaves the window ---- */

/* Of every size, with zeros of both signs, the smallest negative ones, powers of two and values
 * that are the row's largest but for the sign. */
static void odd_row(uint16_t *x, uint32_t d, rng &r) {
    float scale = exp2f((float)(r.u64() % 30) - 18);
    uint64_t how = r.u64() % 4; /* 3: as models have them */
    for (uint32_t c = 0; c < d; c++) {
        uint64_t u = r.u64();
        float f = fminf(fmaxf(r.normal() * scale, -65000.0f), 65000.0f);
        x[c] = ki_f32_to_f16(f);
        if (how == 3 || u % 8) continue;
        u >>= 3;
        uint16_t sign = u & 1 ? 0x8000 : 0;
        switch (u >> 1 & 3) {
        case 0: x[c] = sign; break;
        case 1: x[c] = (uint16_t)(0x8001 + (u >> 3) % 4); break;
        case 2: x[c] = (uint16_t)(sign | (x[c] & 0x7c00)); break;
        default: x[c] = (uint16_t)(sign | ki_f32_to_f16(2 * scale)); break;
        }
    }
}

struct value_store { /* a world's rings on the host */
    const world &w;
    std::vector<uint16_t> halves;
    explicit value_store(const world &of) : w(of), halves(of.rings.n / 2) {}
    size_t block_at(uint32_t seq, uint32_t layer, uint32_t head, uint32_t block) const {
        uint32_t k = w.o.k_bits < 16 ? w.k_blocks : 0, slot = layer * w.o.n_kv_heads + head;
        size_t in_ring = (size_t)slot * (k + w.v_blocks) + k + block % w.v_blocks;
        return seq * w.ring_bytes / 2 + in_ring * 32 * w.o.head_dim;
    }
    static size_t element(uint32_t t, uint32_t c, uint32_t d) {
        ki_order_place p = ki_order_value(t, c, d / 16, 16);
        return p.word * 2 + p.bit / 16;
    }
    /* The rows that leave the windows of this step. */
    void fill(rng &r) {
        uint32_t d = w.o.head_dim;
        std::vector<uint16_t> row(d);
        for (uint32_t seq = 0; seq < w.o.n_seqs; seq++)
            for (uint32_t k = 0; k < w.o.n_layers * w.o.n_kv_heads; k++) {
                uint32_t pos = w.state[seq].n_tokens - w.l.residual_tokens;
                size_t at = block_at(seq, k / w.o.n_kv_heads, k % w.o.n_kv_heads, pos / 32);
                odd_row(row.data(), d, r);
                for (uint32_t c = 0; c < d; c++) halves[at + element(pos % 32, c, d)] = row[c];
            }
    }
};

/* Codes, scales and zeros of one row that differ from the scalar definition's, and codes of its
 * neighbours that are not what they were. */
static size_t wrong_values(const value_store &store, const std::vector<uint8_t> &before,
                           const std::vector<uint8_t> &after, uint32_t seq, uint32_t layer,
                           uint32_t head) {
    const world &w = store.w;
    const ki_cuda_layout &l = w.l;
    uint32_t d = w.o.head_dim, pos = w.state[seq].n_tokens - l.residual_tokens, t = pos % 128;
    uint64_t id = w.table[(size_t)seq * w.table_stride + pos / 128];
    uint64_t page = id * l.id_bytes + ((uint64_t)layer * w.o.n_kv_heads + head) * l.page_bytes;
    page_reader was = {&l, before.data() + page}, is = {&l, after.data() + page};
    std::vector<uint16_t> x(d), scale(d), zero(d);
    std::vector<uint8_t> codes(d);
    size_t at = store.block_at(seq, layer, head, pos / 32), n = 0;
    for (uint32_t c = 0; c < d; c++) x[c] = store.halves[at + value_store::element(pos % 32, c, d)];
    if (w.o.plus)
        ki_plus_quantize_values_scalar(codes.data(), scale.data(), x.data(), d, l.v_bits,
                                       KI_PLUS_VALUE_STEPS);
    else
        for (uint32_t g = 0; g < d / l.v_group; g++)
            ki_quantize_scalar(codes.data() + g * l.v_group, &scale[g], &zero[g],
                               x.data() + g * l.v_group, 1, l.v_group, l.v_bits);
    for (uint32_t c = 0; c < d; c++) {
        n += is.value_code(t, c) != codes[c];
        for (uint32_t other : {t ^ 1, t ^ 8, t ^ 16})
            n += is.value_code(other, c) != was.value_code(other, c);
        uint32_t g = c / l.v_group, scale_at = is.value_scale_at(t, c);
        n += memcmp(is.page + scale_at, &scale[g], 2) != 0;
        if (!w.o.plus)
            n += memcmp(is.page + scale_at + l.v_zero_at - l.v_scale_at, &zero[g], 2) != 0;
    }
    return n;
}

static void run_values(world_options o) {
    const uint32_t n_rounds = run.small ? 2 : 48, n_threads = 16;
    rng r = case_rng();
    o.n_seqs = 16, o.n_layers = 3, o.max_tokens = 640, o.split_tokens = 256;
    world w;
    w.make(o, o.n_seqs, r);
    value_store store(w);
    std::vector<size_t> wrong(n_threads);
    for (uint32_t round = 0; round < n_rounds; round++) {
        for (ki_cuda_seq &s : w.state)
            s.n_tokens = o.residual + 64 + (uint32_t)(r.u64() % 400), s.n_rows = 1;
        w.put_state();
        store.fill(r);
        w.rings.put((const uint8_t *)store.halves.data(), store.halves.size() * 2);
        std::vector<uint8_t> before = w.pool.get(0, w.pool.n);
        ki_cuda_append_call c = w.append_call(0, o.n_seqs, 1);
        CHECK_OK(ki_cuda_code_values(&c, o.n_layers, NULL, err));
        MUST(cudaDeviceSynchronize());
        std::vector<uint8_t> after = w.pool.get(0, w.pool.n);
        std::vector<std::thread> threads;
        for (uint32_t i = 0; i < n_threads; i++)
            threads.emplace_back([&, i] {
                for (uint32_t seq = i; seq < o.n_seqs; seq += n_threads)
                    for (uint32_t k = 0; k < o.n_layers * o.n_kv_heads; k++)
                        wrong[i] += wrong_values(store, before, after, seq, k / o.n_kv_heads,
                                                 k % o.n_kv_heads);
            });
        for (std::thread &t : threads) t.join();
    }
    size_t all = 0;
    for (size_t x : wrong) all += x;
    CHECK(all == 0, "%zu codes, scales or zeros differ", all);
    end_case(text("%.3g elements",
                  (double)n_rounds * o.n_seqs * o.n_layers * o.n_kv_heads * o.head_dim));
}

static void check_values(const world_options &base) {
    static const struct {
        uint32_t d, vb, g, s;
        bool plus;
    } cases[] = {{128, 2, 32, 0, false}, {128, 2, 128, 0, false}, {128, 4, 64, 0, false},
                 {128, 8, 16, 0, false}, {80, 2, 16, 0, false},   {256, 2, 128, 0, false},
                 {128, 2, 128, 4, true}, {64, 2, 128, 4, true},   {256, 2, 128, 0, true},
                 {96, 2, 128, 4, true},  {128, 3, 128, 4, true},  {80, 3, 128, 4, true}};
    for (const auto &c : cases) {
        world_options o = base;
        o.head_dim = c.d, o.n_heads = o.n_kv_heads = 8, o.residual = 128, o.sinks = c.s;
        o.k_bits = c.vb == 3 ? 4 : 2, o.v_bits = c.vb, o.group = c.g, o.plus = c.plus;
        if (open_case(text("values/d%u-v%u-g%u%s", c.d, c.vb, c.g, c.plus ? "+" : "")))
            run_values(o);
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
        ki_cuda_norm_rows(h.data, x.data, NULL, &norm, n_rows, n, KI_CUDA_F32, held, NULL);
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
    check_own(base);
    check_values(base);
    for (uint32_t n : {64u, 576u, 4096u, 4100u, 8192u, 8200u, 30u})
        for (int has_bias = 0; has_bias < 2; has_bias++)
            if (open_case(text("norm/%u%s", n, has_bias ? "-bias" : ""))) run_norm(n, has_bias);
}

#endif
