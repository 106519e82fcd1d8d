/* sdpa_cases.cuh: cases of check-cuda for sdpa.h: cuDNN's attention of whole prompts against our
 * own kernel and a float64 oracle. For check_cuda.cu, behind its helpers. */
#ifndef KI_CUDA_SDPA_CASES_CUH
#define KI_CUDA_SDPA_CASES_CUH
#include "dense_cuda.h"
#include "sdpa.h"

#include <cuda_bf16.h>

/* Scores and sums are float32; a probability and an output are rounded to float16, 2^-12.3 of each
 * on average and independent: sqrt(2) 2^-12.3 = 2.8e-4 of an output, bounded with a factor of three
 * to spare. Our own kernel is within TOLERANCE. bfloat16 adds 2^-9.3. */
static const double SDPA_TOLERANCE = 1e-3, SDPA_BF16_TOLERANCE = 3e-3;

struct sdpa_case {
    uint32_t head_dim, n_heads, n_kv_heads, window;
    bool plus;
    ki_cuda_type type; /* of the output */
};

struct sdpa_world {
    sdpa_case c;
    world w;
    std::vector<uint32_t> lengths;
    device_array<int32_t> records;
    device_array<uint16_t> own, out;
    device_array<uint8_t> room;
    ki_mem mem;
    ki_sdpa *sdpa = NULL;
    uint32_t n_rows = 0, most = 0;

    ~sdpa_world() { ki_sdpa_destroy(&sdpa); }
    size_t width() const { return (size_t)c.n_heads * c.head_dim; }
    size_t kv_width() const { return (size_t)c.n_kv_heads * c.head_dim; }

    /* What cuDNN says against it; not a failure where it is missing. */
    kivi_status open(bool exact, kivi_error *err) {
        ki_sdpa_options o = {};
        int device = 0, major = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        ki_sdpa_destroy(&sdpa);
        o.mem = &mem, o.n_heads = c.n_heads, o.n_kv_heads = c.n_kv_heads, o.head_dim = c.head_dim;
        o.windows[0] = c.window, o.n_windows = 1, o.min_rows = 1, o.max_rows = most;
        o.compute_major = (uint32_t)major, o.workspace_bytes = room.n, o.exact = exact;
        return ki_sdpa_create(&sdpa, &o, err);
    }
    void make(const sdpa_case &which, const std::vector<uint32_t> &all, rng &r) {
        c = which, lengths = all;
        for (uint32_t n : lengths) n_rows += n, most = std::max(most, n);
        world_options o = base_options();
        o.head_dim = c.head_dim, o.n_heads = c.n_heads, o.n_kv_heads = c.n_kv_heads;
        o.window = c.window, o.plus = c.plus, o.n_seqs = (uint32_t)lengths.size();
        o.max_tokens = most;
        if (c.head_dim % 32) o.group = 16;
        ki_mem_init(&mem);
        w.make(o, n_rows + KI_SDPA_TAIL_ROWS, r);
        room.make(32 << 20);
        own.make(n_rows * width()), out.make((n_rows + KI_SDPA_TAIL_ROWS) * width());
        std::vector<uint16_t> k, v, q;
        random_rows(k, v, q, o, n_rows, r);
        w.k_in.put(k.data(), k.size()), w.v_in.put(v.data(), v.size());
        w.q_in.put(q.data(), q.size());
        put_records();
    }
    void put_records() {
        std::vector<int32_t> all(lengths.size() * 16);
        uint32_t at = 0;
        for (size_t i = 0; i < lengths.size(); at += lengths[i++]) {
            ki_sdpa_record(&all[i * 16], lengths[i], c.n_heads, c.n_kv_heads, c.head_dim);
            w.state[i].n_rows = lengths[i], w.state[i].first_row = at;
            w.state[i].flags = KI_CUDA_PROMPT;
        }
        records.make(all.size());
        records.put(all.data(), all.size());
    }
    /* Rows of all sequences as attention takes them, and our own kernel's answer. */
    void attend_own() {
        w.put_state();
        ki_cuda_append_call a = w.append_call(0, n_rows, most);
        ki_cuda_attend_call attend = w.attend_call(0, n_rows, most);
        attend.out = own.data, attend.out_type = c.type;
        CHECK_OK(ki_cuda_prompt_append(&a, NULL, err));
        w.attend_prompt(attend);
        MUST(cudaDeviceSynchronize());
    }
    void attend_one(uint32_t i) {
        const ki_cuda_seq &s = w.state[i];
        ki_sdpa_call call = {};
        call.q = w.q_out.data + s.first_row * width();
        call.k = w.k_rows.data + s.first_row * kv_width();
        call.v = w.v_rows.data + s.first_row * kv_width();
        call.out = out.data + s.first_row * width();
        call.record = records.data + i * 16, call.workspace = room.data;
        call.n_rows = s.n_rows, call.window = c.window, call.scale = 1 / sqrtf((float)c.head_dim);
        CHECK_OK(ki_sdpa_run(sdpa, &call, NULL, err));
        if (c.plus || c.type != KI_CUDA_F16)
            ki_cuda_finish_heads(call.out, c.type, c.plus, s.n_rows, c.n_heads, c.head_dim, NULL);
    }
    /* One sequence after the other, the last one first: nobody may write behind its end. */
    std::vector<uint16_t> attend_sdpa() {
        MUST(cudaMemset(out.data, 0xff, out.n * 2));
        for (size_t i = lengths.size(); i-- > 0;) attend_one((uint32_t)i);
        MUST(cudaDeviceSynchronize());
        MUST(cudaGetLastError());
        return out.get(0, out.n);
    }
    float number(uint16_t h) const {
        return c.type == KI_CUDA_BF16 ? ki_bf16_to_f32(h) : ki_f16_to_f32(h);
    }
};

/* Some rows and heads in float64, from the float16 rows that both kernels read. */
static error_sum sdpa_oracle(const sdpa_world &x, const std::vector<uint16_t> &got, rng &r) {
    const sdpa_case &c = x.c;
    uint32_t d = c.head_dim, group = c.n_heads / c.n_kv_heads;
    std::vector<uint16_t> q = x.w.q_out.get(0, x.n_rows * x.width());
    std::vector<uint16_t> k = x.w.k_rows.get(0, x.n_rows * x.kv_width());
    std::vector<uint16_t> v = x.w.v_rows.get(0, x.n_rows * x.kv_width());
    error_sum error;
    for (size_t i = 0; i < x.lengths.size(); i++) {
        uint32_t n = x.lengths[i], first_row = x.w.state[i].first_row;
        for (uint32_t sample = 0; sample < 24; sample++) {
            uint32_t pos = sample == 0 ? 0 : sample == 1 ? n - 1 : (uint32_t)(r.u64() % n);
            uint32_t head = (uint32_t)(r.u64() % c.n_heads), kv = head / group;
            uint32_t first = c.window && pos + 1 > c.window ? pos + 1 - c.window : 0;
            const uint16_t *query = &q[(first_row + pos) * x.width() + head * d];
            std::vector<double> p(pos + 1 - first), sum(d);
            double top = -1e300, all = 0;
            for (uint32_t t = first; t <= pos; t++) {
                const uint16_t *key = &k[(first_row + t) * x.kv_width() + kv * d];
                double s = 0;
                for (uint32_t e = 0; e < d; e++)
                    s += (double)ki_f16_to_f32(query[e]) * (double)ki_f16_to_f32(key[e]);
                p[t - first] = s / sqrt((double)d);
                top = std::max(top, p[t - first]);
            }
            for (uint32_t t = first; t <= pos; t++) {
                const uint16_t *value = &v[(first_row + t) * x.kv_width() + kv * d];
                double weight = exp(p[t - first] - top);
                all += weight;
                for (uint32_t e = 0; e < d; e++) sum[e] += weight * (double)ki_f16_to_f32(value[e]);
            }
            std::vector<float> want(d);
            for (uint32_t e = 0; e < d; e++) want[e] = (float)(sum[e] / all);
            if (c.plus) ki_plus_turn_scalar(want.data(), d);
            for (uint32_t e = 0; e < d; e++)
                error.add(x.number(got[(first_row + pos) * x.width() + head * d + e]), want[e]);
        }
    }
    return error;
}

/* Values behind the last row of one sequence are not a number: are the sequence's bits the same? */
static bool sdpa_ignores_what_follows(sdpa_world &x, const std::vector<uint16_t> &before) {
    size_t last = x.lengths.size() - 1, n = x.lengths[last] * x.width();
    size_t at = x.w.state[last].first_row * x.width();
    MUST(cudaMemset(x.w.v_rows.data + x.n_rows * x.kv_width(), 0xff,
                    KI_SDPA_TAIL_ROWS * x.kv_width() * 2));
    x.attend_one((uint32_t)last);
    MUST(cudaDeviceSynchronize());
    std::vector<uint16_t> again = x.out.get(at, n);
    return !memcmp(again.data(), before.data() + at, n * 2);
}

static void run_sdpa(const sdpa_case &c, const std::vector<uint32_t> &lengths, bool exact) {
    rng r = case_rng();
    sdpa_world x;
    kivi_error error = {};
    x.make(c, lengths, r);
    if (check_failed()) return end_case();
    double before = seconds();
    kivi_status status = x.open(exact, &error);
    double took = seconds() - before;
    if (status == KIVI_UNSUPPORTED) return skip_case(error.text);
    CHECK(status == KIVI_OK, "%s", error.text);
    if (check_failed()) return end_case();
    x.attend_own();
    std::vector<uint16_t> own = x.own.get(0, x.own.n), got = x.attend_sdpa();
    if (check_failed()) return end_case();
    for (size_t i = x.n_rows * x.width(); i < got.size(); i++)
        CHECK(got[i] == 0xffff, "row %zu behind the last was written", i / x.width() - x.n_rows);
    error_sum against_own, against_truth = sdpa_oracle(x, got, r);
    for (size_t i = 0; i < own.size(); i++) against_own.add(x.number(got[i]), x.number(own[i]));
    double most = c.type == KI_CUDA_BF16 ? SDPA_BF16_TOLERANCE : SDPA_TOLERANCE;
    CHECK(against_own.n_nan + against_truth.n_nan == 0, "%zu NaN", against_own.n_nan);
    CHECK(against_truth.relative() < most, "error %.6f of the oracle, at most %.4f",
          against_truth.relative(), most);
    CHECK(against_own.relative() < most + TOLERANCE, "%.6f of our own kernel, at most %.4f",
          against_own.relative(), most + TOLERANCE);
    std::vector<uint16_t> again = x.attend_sdpa();
    CHECK(!memcmp(again.data(), got.data(), got.size() * 2), "other bits the second time");
    const char *note = exact                               ? ""
                       : sdpa_ignores_what_follows(x, got) ? ", NaN behind the end changes nothing"
                                                           : ", NaN behind the end is read";
    end_case(text("error %.6f, %.6f of our own; %s, %.0f KB of workspace, plans took %.2f s%s",
                  against_truth.relative(), against_own.relative(), ki_sdpa_name(x.sdpa),
                  (double)ki_sdpa_workspace(x.sdpa) * 1e-3, took, note));
}

/* A marked sequence is left out by our own kernel, others are not. */
static void run_elsewhere() {
    rng r = case_rng();
    sdpa_world x;
    x.make({128, 8, 2, 0, false, KI_CUDA_F16}, {300, 200, 77}, r);
    x.attend_own();
    std::vector<uint16_t> all = x.own.get(0, x.own.n);
    x.w.state[1].flags |= KI_CUDA_ELSEWHERE;
    MUST(cudaMemset(x.own.data, 0xff, x.own.n * 2));
    x.attend_own();
    std::vector<uint16_t> rest = x.own.get(0, x.own.n);
    size_t from = 300 * x.width(), to = 500 * x.width();
    for (size_t i = 0; i < all.size(); i++)
        CHECK(rest[i] == (i >= from && i < to ? 0xffff : all[i]), "row %zu", i / x.width());
    end_case();
}

static void check_sdpa() {
    static const sdpa_case cases[] = {
        {128, 8, 8, 0, false, KI_CUDA_F16},    {128, 8, 2, 300, false, KI_CUDA_F16},
        {128, 8, 1, 4096, false, KI_CUDA_F16}, {64, 8, 2, 0, false, KI_CUDA_F16},
        {80, 4, 2, 100, false, KI_CUDA_F16},   {96, 4, 4, 0, false, KI_CUDA_F16},
        {256, 4, 1, 0, false, KI_CUDA_F16},    {256, 4, 2, 512, false, KI_CUDA_F16},
        {128, 8, 2, 0, true, KI_CUDA_F16},     {64, 4, 2, 0, true, KI_CUDA_BF16},
        {128, 8, 2, 0, false, KI_CUDA_BF16},
    };
    const std::vector<uint32_t> lengths = {1, 5, 64, 127, 129, 1000, 1024, 1025, 1087, 2048};
    if (open_case("sdpa/elsewhere")) run_elsewhere();
    for (const sdpa_case &c : cases)
        if (open_case(text("sdpa/d%u-%u.%u-window%u%s%s", c.head_dim, c.n_heads, c.n_kv_heads,
                           c.window, c.plus ? "-plus" : "", c.type == KI_CUDA_BF16 ? "-bf16" : "")))
            run_sdpa(c, lengths, false);
    const sdpa_case first = cases[0];
    if (open_case("sdpa/exact")) run_sdpa(first, {1088}, true);
    if (!run.small && open_case("sdpa/long")) run_sdpa(first, {2049, 8192, 9001}, false);
}

#endif
