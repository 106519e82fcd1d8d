/* check-dense: the CUDA kernels beside the cache. Tokens drawn on the device against the CPU's
 * (engine/draw.c), one by one; products of few rows against float64, that no row's bits depend on
 * the others, and what they read a second. Needs a GPU. check-dense [--seed=N] [--test=PREFIX] */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "harness.cuh"

#include "draw_cuda.h"
#include "stream.h"

extern "C" {
#include "engine.h"
#include "gemm.h"
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static uint32_t below(rng &r, uint32_t n) { return (uint32_t)(r.u64() % n); }
static double uniform(rng &r) { return (double)(r.u64() >> 11) * 0x1p-53; }

/* ---- draws ---- */

enum row_kind { NORMAL, SHARP, TIES, FLAT, HOLES, N_KINDS };

static void random_logits(float *out, uint32_t n, row_kind kind, rng &r) {
    for (uint32_t i = 0; i < n; i++) {
        float x = r.normal();
        if (kind == SHARP) x = x * 6 + (below(r, 1000) == 0 ? 12.0f : 0.0f);
        if (kind == TIES) x = (float)(int)(x * 8) / 4; /* 0 and -0 among them */
        if (kind == FLAT) x = below(r, n) < 1500 ? 1.0f : -40.0f;
        if (kind == HOLES && below(r, 3) == 0) x = -INFINITY;
        out[i] = kind == NORMAL ? x * 2.5f : x;
    }
}

static void random_edits(std::vector<ki_draw_edit> &out, uint32_t n_vocab, uint32_t n, rng &r) {
    std::vector<bool> seen(n_vocab);
    for (uint32_t i = 0; i < n; i++) {
        ki_draw_edit e = {(int32_t)below(r, n_vocab), 4 * r.normal(), below(r, 4), below(r, 16)};
        if (seen[(size_t)e.id]) continue;
        seen[(size_t)e.id] = true;
        out.push_back(e);
    }
}

static ki_draw random_draw(const std::vector<ki_draw_edit> &edits, rng &r) {
    static const uint32_t tops[] = {0, 0, 1, 2, 40, 500, 100000};
    ki_draw d = {};
    d.temperature = below(r, 12) == 0 ? 0 : 0.05f + 2.0f * (float)uniform(r);
    d.top_p = below(r, 2) ? 1 : 0.01f + 0.99f * (float)uniform(r);
    d.min_x = below(r, 2) ? -INFINITY : logf((float)uniform(r) * 0.3f + 1e-6f);
    d.top_k = tops[below(r, 7)];
    d.repetition = 1 + 0.3f * (float)uniform(r);
    d.frequency = (float)uniform(r) - 0.5f;
    d.presence = (float)uniform(r) - 0.5f;
    d.n_edits = (uint32_t)edits.size();
    d.edits = edits.data();
    d.u = below(r, 20) == 0 ? 1 - 0x1p-53 : below(r, 20) == 0 ? 0 : uniform(r);
    return d;
}

/* As src/serve/choose.c does it. */
static int32_t draw_here(const std::vector<float> &logits, const ki_draw &d) {
    std::vector<float> mine = logits;
    std::vector<ki_candidate> all(logits.size());
    ki_draw_edit_logits(mine.data(), &d);
    ki_draw_hide_ends(mine.data(), (uint32_t)mine.size(), &d);
    return ki_sample(all.data(), mine.data(), (uint32_t)mine.size(), &d);
}

static void run_draws(uint32_t n_vocab, row_kind kind) {
    enum { ROWS = 24, ROUNDS = 8 };
    rng r = case_rng();
    size_t stride = (n_vocab + 15) / 16 * 16;
    std::vector<float> all(ROWS * stride);
    std::vector<std::vector<float>> rows(ROWS);
    uint32_t n_left = 0, n_all = 0;
    for (uint32_t round = 0; round < ROUNDS && !check_failed(); round++) {
        std::vector<std::vector<ki_draw_edit>> edits(ROWS);
        std::vector<ki_draw> draws;
        std::vector<ki_cuda_draw> there;
        std::vector<ki_draw_edit> flat;
        for (uint32_t i = 0; i < ROWS; i++) {
            rows[i].resize(n_vocab);
            random_logits(rows[i].data(), n_vocab, kind, r);
            memcpy(&all[i * stride], rows[i].data(), n_vocab * sizeof(float));
            if (below(r, 2)) random_edits(edits[i], n_vocab, below(r, 200), r);
            ki_draw d = random_draw(edits[i], r);
            draws.push_back(d);
            uint32_t first = (uint32_t)flat.size();
            flat.insert(flat.end(), edits[i].begin(), edits[i].end());
            there.push_back({d.u, d.temperature, d.top_p, d.min_x, d.repetition, d.frequency,
                             d.presence, i, d.top_k, first, d.n_edits});
        }
        device_array<float> logits;
        device_array<ki_cuda_draw> specs;
        device_array<ki_draw_edit> list;
        device_array<int32_t> ids;
        logits.make(all.size()), logits.put(all.data(), all.size());
        specs.make(ROWS), specs.put(there.data(), ROWS);
        list.make(flat.size() + 1), list.put(flat.data(), flat.size());
        ids.make(ROWS);
        ki_cuda_draw_rows(ids.data, logits.data, stride, n_vocab, specs.data, list.data, ROWS,
                          NULL);
        MUST(cudaGetLastError());
        MUST(cudaDeviceSynchronize());
        std::vector<int32_t> got(ROWS);
        std::vector<float> after(all.size());
        MUST(cudaMemcpy(got.data(), ids.data, ROWS * sizeof(int32_t), cudaMemcpyDeviceToHost));
        MUST(cudaMemcpy(after.data(), logits.data, all.size() * sizeof(float),
                        cudaMemcpyDeviceToHost));
        CHECK(!memcmp(after.data(), all.data(), all.size() * sizeof(float)),
              "a row is not as it was");
        for (uint32_t i = 0; i < ROWS; i++) {
            int32_t want = draw_here(rows[i], draws[i]);
            n_all++;
            n_left += got[i] < 0 && want >= 0;
            CHECK(got[i] == want || got[i] < 0,
                  "round %u row %u: token %d, the CPU's %d (temperature %g top_k %u top_p %g min_x "
                  "%g u %.17g, %u edits)",
                  round, i, got[i], want, draws[i].temperature, draws[i].top_k, draws[i].top_p,
                  draws[i].min_x, draws[i].u, draws[i].n_edits);
        }
    }
    if (n_vocab > 2 && (kind == NORMAL || kind == SHARP || kind == HOLES))
        CHECK(n_left == 0, "%u of %u rows are left to the CPU", n_left, n_all);
    end_case(text("%u of %u left to the CPU", n_left, n_all));
}

static void check_draws() {
    static const uint32_t sizes[] = {2, 288, 32000, 49152, 128256};
    static const char *const names[] = {"normal", "sharp", "ties", "flat", "holes"};
    for (uint32_t n : sizes)
        for (int kind = 0; kind < N_KINDS; kind++)
            if (open_case(text("draw/%u-%s", n, names[kind]))) run_draws(n, (row_kind)kind);
    if (!open_case("draw/faults")) return;
    std::vector<float> rows(4 * 288, 0.0f);
    for (int i = 0; i < 288; i++) rows[i] = NAN, rows[288 + i] = -INFINITY;
    rows[2 * 288 + 5] = INFINITY;
    rows[3 * 288 + 7] = NAN, rows[3 * 288 + 9] = 50; /* one that is not a number, not in front */
    std::vector<ki_cuda_draw> draws;
    for (uint32_t i = 0; i < 4; i++) draws.push_back({0.5, 1, 1, -INFINITY, 1, 0, 0, i, 0, 0, 0});
    device_array<float> logits;
    device_array<ki_cuda_draw> specs;
    device_array<ki_draw_edit> list;
    device_array<int32_t> ids;
    logits.make(rows.size()), logits.put(rows.data(), rows.size());
    specs.make(4), specs.put(draws.data(), 4);
    list.make(1), ids.make(4);
    ki_cuda_draw_rows(ids.data, logits.data, 288, 288, specs.data, list.data, 4, NULL);
    std::vector<int32_t> got(4);
    MUST(cudaMemcpy(got.data(), ids.data, 16, cudaMemcpyDeviceToHost));
    CHECK(got[0] == -1 && got[1] == -1 && got[2] == -1 && got[3] == 9, "%d %d %d %d", got[0],
          got[1], got[2], got[3]);
    end_case();
}

/* Microseconds of a launch over rows of a vocabulary, for the report: best of a few. */
static void time_draws() {
    static const struct {
        uint32_t n_vocab, n_rows;
    } cases[] = {{49152, 1}, {32000, 1}, {32000, 32}, {128256, 1}, {128256, 32}};
    for (const auto &c : cases) {
        if (!open_case(text("time/draw-%u-of-%u", c.n_rows, c.n_vocab))) continue;
        rng r = case_rng();
        std::vector<float> rows((size_t)c.n_rows * c.n_vocab);
        random_logits(rows.data(), (uint32_t)rows.size(), NORMAL, r);
        std::vector<ki_cuda_draw> draws;
        for (uint32_t i = 0; i < c.n_rows; i++)
            draws.push_back({uniform(r), 0.8f, 0.95f, logf(0.05f), 1, 0, 0, i, 40, 0, 0});
        device_array<float> logits;
        device_array<ki_cuda_draw> specs;
        device_array<ki_draw_edit> list;
        device_array<int32_t> ids;
        logits.make(rows.size()), logits.put(rows.data(), rows.size());
        specs.make(c.n_rows), specs.put(draws.data(), c.n_rows);
        list.make(1), ids.make(c.n_rows);
        cudaEvent_t from, to;
        MUST(cudaEventCreate(&from));
        MUST(cudaEventCreate(&to));
        float best = 1e9f;
        for (int i = 0; i < 12; i++) {
            float ms;
            MUST(cudaEventRecord(from));
            ki_cuda_draw_rows(ids.data, logits.data, c.n_vocab, c.n_vocab, specs.data, list.data,
                              c.n_rows, NULL);
            MUST(cudaEventRecord(to));
            MUST(cudaEventSynchronize(to));
            MUST(cudaEventElapsedTime(&ms, from, to));
            best = std::min(best, ms);
        }
        cudaEventDestroy(from), cudaEventDestroy(to);
        end_case(text("%.1f us", best * 1000));
    }
}

/* ---- products ---- */

static ki_stream *few; /* of this program */

enum { MOST = KI_STREAM_ROWS, BESIDE = 16 }; /* BESIDE: floats behind a row of out */

struct product_case {
    uint32_t n, k, n_calls = 0;
    ki_cuda_type type;
    device_array<uint8_t> workspace;
    device_array<uint16_t> w, x;
    device_array<float> out;
    std::vector<float> w_values, x_values;

    uint16_t bits_of(float v, float *rounded) const {
        uint16_t bits;
        if (type == KI_CUDA_F16) {
            __half h = __float2half_rn(v);
            memcpy(&bits, &h, 2), *rounded = __half2float(h);
        } else {
            __nv_bfloat16 h = __float2bfloat16_rn(v);
            memcpy(&bits, &h, 2), *rounded = __bfloat162float(h);
        }
        return bits;
    }
    void make(uint32_t n_, uint32_t k_, ki_cuda_type type_, rng &r) {
        n = n_, k = k_, type = type_;
        std::vector<uint16_t> bits((size_t)n * k);
        w_values.resize(bits.size());
        for (size_t i = 0; i < bits.size(); i++) bits[i] = bits_of(r.normal(), &w_values[i]);
        w.make(bits.size()), w.put(bits.data(), bits.size());
        bits.resize((size_t)MOST * k), x_values.resize(bits.size());
        for (size_t i = 0; i < bits.size(); i++) bits[i] = bits_of(r.normal(), &x_values[i]);
        x.make(bits.size()), x.put(bits.data(), bits.size());
        out.make((size_t)MOST * (n + BESIDE));
        workspace.make(KI_STREAM_WORKSPACE_BYTES);
        MUST(cudaMemset(workspace.data, 0, KI_STREAM_COUNTER_BYTES));
    }
    ki_stream_call call(uint32_t first_row, uint32_t m) {
        ki_stream_call c = {};
        c.out = out.data, c.out_stride = n + BESIDE, c.weight = w.data;
        c.x = x.data + (size_t)first_row * k, c.n = n, c.k = k, c.m = m, c.type = type;
        c.workspace = workspace.data;
        c.part = (ki_stream_part)(n_calls++ % 3); /* the same bits in any, and at any pace */
        c.pace = n_calls % 2 ? KI_STREAM_BESIDE : KI_STREAM_AT_ONCE;
        return c;
    }
    /* [m][n] of rows from first_row on; add: to what begin says everywhere. */
    std::vector<float> get(ki_stream_call c, float begin) {
        std::vector<float> got((size_t)MOST * (n + BESIDE), begin);
        out.put(got.data(), got.size());
        CHECK_OK(ki_stream_run(few, &c, NULL, err));
        MUST(cudaDeviceSynchronize());
        MUST(cudaMemcpy(got.data(), out.data, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
        for (uint32_t row = 0; row < MOST; row++)
            for (uint32_t i = row < c.m ? n : 0; i < n + BESIDE; i++)
                CHECK(got[(size_t)row * (n + BESIDE) + i] == begin, "written beside: row %u, %u",
                      row, i);
        return got;
    }
};

/* Sums of float32: of k terms off by at most k 2^-24 of the sum of their sizes, and tensor cores
 * cut off what they do not round: 2^-22 a step of 16. */
static void compare_product(const product_case &p, const std::vector<float> &got, uint32_t m,
                            float begin) {
    double factor = p.k * 0x1p-24 + p.k / 16.0 * 0x1p-22 + 0x1p-22;
    for (uint32_t row = 0; row < m && !check_failed(); row++)
        for (uint32_t i = 0; i < p.n; i += 1 + p.n / 97) {
            double sum = begin, size = fabs((double)begin);
            for (uint32_t c = 0; c < p.k; c++) {
                double t = (double)p.w_values[(size_t)i * p.k + c] *
                           (double)p.x_values[(size_t)row * p.k + c];
                sum += t, size += fabs(t);
            }
            double v = got[(size_t)row * (p.n + BESIDE) + i];
            CHECK(fabs(v - sum) <= factor * size, "row %u of %u, output %u: %.9g, expected %.9g",
                  row, m, i, v, sum);
        }
}

/* A gate and its up in one: the bits of the product and the activation one by one. */
static void compare_gated(product_case &p, uint32_t m) {
    device_array<uint16_t> apart, fused;
    device_array<float> rows;
    size_t n_out = (size_t)m * p.n / 2;
    apart.make(n_out), fused.make(n_out), rows.make(2 * n_out);
    for (ki_cuda_act act : {KI_CUDA_SILU_MUL, KI_CUDA_GELU_MUL}) {
        ki_stream_call c = p.call(0, m);
        c.out = rows.data, c.out_stride = p.n;
        CHECK_OK(ki_stream_run(few, &c, NULL, err));
        ki_cuda_activate(apart.data, rows.data, act, m, p.n / 2, p.type, NULL);
        c.out = NULL, c.act_out = fused.data, c.act = act;
        CHECK_OK(ki_stream_run(few, &c, NULL, err));
        CHECK(apart.get(0, n_out) == fused.get(0, n_out), "%u rows, activation %d: other bits", m,
              act);
    }
}

/* Rows that it normalizes by itself: the bits of the norm and the product one by one. */
static void compare_normed(product_case &p, uint32_t m, rng &r) {
    device_array<float> raw, weight;
    std::vector<float> in((size_t)m * p.k), w(p.k);
    for (float &v : in) v = 3 * r.normal();
    for (float &v : w) v = r.normal();
    raw.make(in.size()), raw.put(in.data(), in.size());
    weight.make(w.size()), weight.put(w.data(), w.size());
    ki_stream_call c = p.call(0, m);
    c.norm = {weight.data, NULL, 1e-5f};
    if (!ki_stream_takes_norm(&c.norm, m, p.k)) return;
    ki_cuda_norm_rows(p.x.data, raw.data, NULL, &c.norm, m, p.k, p.type, true, NULL);
    std::vector<float> apart = p.get(c, 7);
    c.raw = raw.data, c.x = NULL;
    CHECK(apart == p.get(c, 7), "%u rows, normalized: other bits", m);
}

static void run_products(uint32_t n, uint32_t k, ki_cuda_type type) {
    rng r = case_rng();
    product_case p;
    p.make(n, k, type, r);
    ki_stream_call c = p.call(0, MOST);
    std::vector<float> all = p.get(c, 0.25f);
    compare_product(p, all, MOST, 0);
    CHECK(all == p.get(c, 0.25f), "other bits the second time");
    c.add = true;
    compare_product(p, p.get(c, 3), MOST, 3);
    uint32_t n_maps = ki_stream_n_maps(few);
    p.get(c, 3);
    CHECK(ki_stream_n_maps(few) == n_maps, "maps of a product were made again");
    static const uint32_t counts[] = {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64};
    for (uint32_t m : counts) {
        uint32_t first = below(r, MOST - m + 1);
        std::vector<float> some = p.get(p.call(first, m), 7);
        for (uint32_t row = 0; row < m; row++)
            CHECK(!memcmp(&some[(size_t)row * (n + BESIDE)],
                          &all[(size_t)(first + row) * (n + BESIDE)], n * sizeof(float)),
                  "row %u has other bits as row %u of %u", first + row, row, m);
        if (n % 2 == 0) compare_gated(p, m);
    }
    for (uint32_t m = 1; m <= 4; m++) compare_normed(p, m, r);
    for (uint8_t b : p.workspace.get(0, KI_STREAM_COUNTER_BYTES))
        CHECK(b == 0, "a counter is not 0 afterwards");
    end_case();
}

static void check_products() {
    static const struct {
        uint32_t n, k;
    } shapes[] = {{1, 8},       {2, 8},       {33, 72},     {100, 64},    {288, 128},
                  {960, 576},   {576, 1536},  {1000, 520},  {2050, 1032}, {4096, 4096},
                  {4100, 4096}, {512, 11008}, {5000, 8192}, {8200, 200},  {12288, 1024},
                  {22016, 136}, {49152, 72},  {6144, 512},  {28672, 264}};
    for (int bf16 = 0; bf16 < 2; bf16++)
        for (const auto &s : shapes)
            if (open_case(text("products/%s-%ux%u", bf16 ? "bf16" : "f16", s.n, s.k)))
                run_products(s.n, s.k, bf16 ? KI_CUDA_BF16 : KI_CUDA_F16);
}

/* ---- products one after the other, as a step has them ---- */

static __global__ void read_all(const uint4 *from, size_t n, uint32_t *to) {
    uint32_t sum = 0;
    for (size_t at = (size_t)blockIdx.x * 8 * blockDim.x; at < n;
         at += (size_t)gridDim.x * 8 * blockDim.x) {
        uint4 x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = __ldcs(from + at + i * blockDim.x + threadIdx.x);
#pragma unroll
        for (int i = 0; i < 8; i++) sum ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    }
    if (sum == 0x9e3779b9u) *to = sum;
}
static __global__ void fill_halves(uint32_t *to, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] = ((uint32_t)i * 2654435761u & 0x83ff83ffu) | 0x28002800u;
}

/* Least microseconds of a graph of what f queues. */
template <class F> static double time_graph(F f) {
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float least = 1e30f, ms;
    MUST(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    MUST(cudaEventCreate(&from));
    MUST(cudaEventCreate(&to));
    MUST(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    f(s);
    MUST(cudaStreamEndCapture(s, &graph));
    MUST(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 8; i++) {
        MUST(cudaEventRecord(from, s));
        MUST(cudaGraphLaunch(exec, s));
        MUST(cudaEventRecord(to, s));
        MUST(cudaStreamSynchronize(s));
        MUST(cudaEventElapsedTime(&ms, from, to));
        least = std::min(least, ms);
    }
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
    cudaEventDestroy(from), cudaEventDestroy(to), cudaStreamDestroy(s);
    return least * 1e3;
}

/* The products of Llama-2-7B, N of each in a row or of the four of a layer, behind each other in a
 * graph: what they read a second, and the share of a stream that only reads; beside cuBLASLt's of
 * the same rows, with the activation behind it. Rows are always the same. */
struct product_chain {
    enum { N = 8, SHAPES = 5, OF_LAYER = 4 };
    struct shape {
        const char *name;
        uint32_t n, k;
        bool normed, gated, add;
    } shapes[SHAPES] = {{"qkv", 12288, 4096, true, false, false},
                        {"o", 4096, 4096, false, false, true},
                        {"gate-up", 22016, 4096, true, true, false},
                        {"down", 4096, 11008, false, false, true},
                        {"output", 32000, 4096, false, false, false}};
    device_array<uint16_t> weights, x, act;
    device_array<float> out, raw, norm_weight;
    device_array<uint8_t> workspace, sums;
    ki_mem mem;
    ki_gemm *gemm = NULL;
    double read_gbs = 0;
    uint32_t n_queued = 0;

    size_t floats_of(int i) const { return (size_t)shapes[i].n * shapes[i].k; }
    ki_gemm_shape gemm_shape(int i) const { return {shapes[i].n, shapes[i].k, shapes[i].n}; }
    void make() {
        size_t all = 0;
        for (int i = 0; i < SHAPES; i++) all += N * floats_of(i);
        weights.make(all), x.make((size_t)MOST * 11008), act.make((size_t)MOST * 11008);
        out.make((size_t)MOST * 32000), raw.make((size_t)MOST * 4096), norm_weight.make(4096);
        fill_halves<<<1024, 256>>>((uint32_t *)weights.data, all / 2);
        fill_halves<<<64, 256>>>((uint32_t *)x.data, x.n / 2);
        MUST(cudaMemset(raw.data, 0, raw.n * 4));
        MUST(cudaMemset(norm_weight.data, 0, norm_weight.n * 4));
        MUST(cudaMemset(out.data, 0, out.n * 4));
        workspace.make(KI_GEMM_WORKSPACE_BYTES), sums.make(KI_STREAM_WORKSPACE_BYTES);
        MUST(cudaMemset(sums.data, 0, KI_STREAM_COUNTER_BYTES));
        ki_mem_init(&mem);
        CHECK_OK(ki_gemm_create(&gemm, &mem, workspace.data, KI_GEMM_F16, NULL, err));
        for (int i = 0; i < SHAPES && !check_failed(); i++) {
            ki_gemm_shape s = gemm_shape(i);
            CHECK_OK(ki_gemm_prepare(gemm, &s, MOST, err));
        }
        size_t words = all / 8 / 65536 * 65536;
        for (uint32_t blocks : {132u, 528u, 2112u}) {
            double us = time_graph([&](cudaStream_t s) {
                read_all<<<blocks, 1024, 0, s>>>((const uint4 *)weights.data, words,
                                                 (uint32_t *)out.data);
            });
            read_gbs = std::max(read_gbs, words * 16.0 / us * 1e-3);
        }
    }
    enum way { PLAIN, NORMS, CUBLAS };
    void queue(int i, uint32_t turn, uint32_t m, way how, cudaStream_t s) {
        const shape &y = shapes[i];
        ki_stream_call c = {};
        size_t at = turn * floats_of(i);
        for (int j = 0; j < i; j++) at += N * floats_of(j);
        c.weight = weights.data + at, c.x = x.data, c.n = y.n, c.k = y.k, c.m = m;
        c.out = out.data, c.out_stride = y.n, c.add = y.add, c.type = KI_CUDA_F16;
        c.workspace = sums.data;
        c.part = n_queued++ % 2 ? KI_STREAM_SECOND : KI_STREAM_FIRST;
        if (how == CUBLAS) {
            ki_gemm_shape g = gemm_shape(i);
            CHECK_OK(ki_gemm_run(gemm, c.out, c.weight, c.x, &g, m, y.add, s, err));
            if (y.gated)
                ki_cuda_activate(act.data, out.data, KI_CUDA_SILU_MUL, m, y.n / 2, c.type, s);
            return;
        }
        if (y.gated) c.act_out = act.data;
        c.norm = {norm_weight.data, NULL, 1e-5f};
        if (how == NORMS && y.normed) {
            if (ki_stream_takes_norm(&c.norm, m, y.k)) c.raw = raw.data;
            else ki_cuda_norm_rows(x.data, raw.data, NULL, &c.norm, m, y.k, c.type, true, s);
        }
        CHECK_OK(ki_stream_run(few, &c, s, err));
    }
    std::string report(double bytes, double us, int n) const {
        double gbs = bytes / us * 1e-3;
        return text("%7.1f us %5.0f GB/s %5.1f%%", us / n, gbs, 100 * gbs / read_gbs);
    }
    void run(uint32_t m, way how) {
        std::string note;
        double all = 0;
        for (int i = 0; i < SHAPES; i++) {
            double bytes = 2.0 * N * (double)floats_of(i);
            all += i < OF_LAYER ? bytes : 0;
            double us = time_graph([&](cudaStream_t s) {
                for (uint32_t t = 0; t < N; t++) queue(i, t, m, how, s);
            });
            note += std::string(shapes[i].name) + " " + report(bytes, us, N) + " | ";
        }
        for (way w : {how, NORMS}) {
            if (w == NORMS && how == CUBLAS) continue;
            double us = time_graph([&](cudaStream_t s) {
                for (uint32_t t = 0; t < N; t++)
                    for (int i = 0; i < OF_LAYER; i++) queue(i, t, m, w, s);
            });
            note += (w == NORMS ? " | with norms " : "all ") + report(all, us, N);
        }
        end_case(note);
    }
};

static void time_products() {
    product_chain chain;
    for (uint32_t m : {1u, 2u, 4u, 8u, 16u, 32u, 64u})
        for (bool cublas : {false, true}) {
            if (!open_case(text("time/%s-%u", cublas ? "products-cublaslt" : "products", m)))
                continue;
            if (!chain.read_gbs) {
                chain.make();
                printf("# a stream that only reads: %.0f GB/s\n", chain.read_gbs);
            }
            chain.run(m, cublas ? product_chain::CUBLAS : product_chain::PLAIN);
        }
    ki_gemm_destroy(&chain.gemm);
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        std::string a = argv[i];
        if (a.compare(0, 7, "--seed=") == 0) run.seed = strtoull(a.c_str() + 7, NULL, 0);
        else if (a.compare(0, 7, "--test=") == 0) run.prefix = a.substr(7);
        else {
            fprintf(stderr, "check-dense [--seed=N] [--test=PREFIX]\n");
            return 2;
        }
    }
    int n_devices = 0;
    cudaError_t found = cudaGetDeviceCount(&n_devices);
    if (found != cudaSuccess || !n_devices) {
        printf("skip check-dense: no CUDA device is there (%s)\n", cudaGetErrorString(found));
        return 0;
    }
    printf("seed %llu\n", (unsigned long long)run.seed);
    ki_mem mem;
    kivi_error err = {};
    ki_mem_init(&mem);
    if (ki_stream_create(&few, &mem, &err) != KIVI_OK) {
        fprintf(stderr, "check-dense: %s\n", err.text);
        return 1;
    }
    check_draws();
    check_products();
    time_draws();
    time_products();
    ki_stream_destroy(&few);
    printf("%u passed, %u failed, 0 skipped\n", run.n_passed, run.n_failed);
    return run.n_failed != 0;
}
