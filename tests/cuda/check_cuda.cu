/* check-cuda: the CUDA kernels of the cache against the CPU's cache, the definition of the
 * quantizer and a float64 oracle. Needs a GPU. check-cuda [--seed=N] [--test=PREFIX] [--golden=DIR]
 * [--small] */
#include "check_step.cuh"

#include <thread>

struct error_sum {
    double difference = 0, reference = 0, largest = 0;
    size_t n_nan = 0;
    void add(double got, double want) {
        if (!(got == got)) n_nan++;
        double e = fabs(got - want);
        difference += e * e;
        reference += want * want;
        if (e > largest) largest = e;
    }
    double relative() const { return sqrt(difference / (reference > 0 ? reference : 1)); }
};

/* q * scale and p * scale are rounded to float16 (2^-11 each at most, 2^-12.3 on average,
 * independent), q itself too: three such errors in a score, one in each term of the output. A score
 * is a sum of D products of size 1 and channels of size 8 times a query of size 1: its error has
 * deviation up to 2^-12.3 sqrt(3 (1 + 64 / 8)) = 0.001, and moves each probability by as much. Four
 * times that bounds what is seen by a factor of about three. */
static const double TOLERANCE = 4e-3;

/* ---- against the CPU's cache ---- */

struct cpu_side {
    kivi_cache *cache = NULL;
    std::vector<kivi_seq *> seqs;
    ~cpu_side() {
        for (kivi_seq *&s : seqs) kivi_seq_destroy(&s);
        kivi_cache_destroy(&cache);
    }
    void make(const world_options &o, uint32_t step_rows) {
        kivi_cache_geometry g = geometry_of(o);
        g.max_step_rows = step_rows;
        g.n_threads = 8;
        CHECK_OK(kivi_cache_create(&cache, &g, err));
        if (check_failed()) return;
        for (uint32_t i = 0; i < o.n_seqs; i++) {
            kivi_seq *s = NULL;
            CHECK_OK(kivi_seq_create(&s, cache, err));
            seqs.push_back(s);
        }
    }
    /* Rows [first, first + n) of the batch into sequence i, all layers; out [n][H][D]. */
    void step(const world_options &o, uint32_t i, uint32_t n, const uint16_t *k, const uint16_t *v,
              const float *q, float *out) {
        CHECK_OK(kivi_seq_begin(seqs[i], n, err));
        if (check_failed()) return;
        for (uint32_t layer = 0; layer < o.n_layers; layer++) {
            CHECK_OK(kivi_seq_append(seqs[i], layer, k, v, KIVI_F16, err));
            CHECK_OK(kivi_seq_attend(seqs[i], layer, q, out, err));
        }
        CHECK_OK(kivi_seq_commit(seqs[i], err));
    }
};

static void compare_pages(world &w, cpu_side &cpu) {
    std::vector<uint8_t> plain(65536 * 4);
    for (uint32_t i = 0; i < w.o.n_seqs && !check_failed(); i++)
        for (uint32_t p = 0; p < cpu.seqs[i]->n_pages; p++)
            for (uint32_t layer = 0; layer < w.o.n_layers; layer++)
                for (uint32_t head = 0; head < w.o.n_kv_heads; head++) {
                    if (cpu.seqs[i]->pages[p] == (uint32_t)KI_NO_PAGE) continue;
                    std::vector<uint8_t> page = w.page(i, p, layer, head);
                    const uint8_t *want = ki_seq_page(cpu.seqs[i], p, layer, head);
                    size_t n = cpu.cache->layout.page_bytes;
                    ki_cuda_page_to_cpu(plain.data(), page.data(), &w.l);
                    for (size_t b = 0; b < n; b++)
                        CHECK(
                            plain[b] == want[b],
                            "sequence %u page %u layer %u head %u byte %zu of %zu: %02x, CPU %02x",
                            i, p, layer, head, b, n, plain[b], want[b]);
                }
}

/* Prompt chunks (positive, rows of the first sequence; others have a few more) and decode steps
 * (negative: how many). */
static void run_case(const world_options &o, const std::vector<int> &steps) {
    rng r = case_rng();
    uint32_t largest = 1, in_prompt = 0;
    for (int s : steps)
        if (s > 0) largest = std::max(largest, (uint32_t)s + 37 * o.n_seqs);
    world w;
    cpu_side cpu;
    uint32_t batch = largest * o.n_seqs;
    w.make(o, batch, r);
    cpu.make(o, largest);
    error_sum prompt_error, decode_error;
    uint64_t bits = 0; /* of all results */
    std::vector<uint16_t> k, v, q;
    std::vector<float> q32, want((size_t)batch * o.n_heads * o.head_dim);
    for (int s : steps)
        if (s > 0) in_prompt++;
    bool first = true;
    for (size_t n = 0; n < steps.size() && !check_failed(); n++)
        for (int repeat = 0; repeat < (steps[n] < 0 ? -steps[n] : 1) && !check_failed(); repeat++) {
            bool prompt = steps[n] > 0;
            uint32_t rows = 0, most = 0;
            size_t row_q = (size_t)o.n_heads * o.head_dim,
                   row_k = (size_t)o.n_kv_heads * o.head_dim;
            for (uint32_t i = 0; i < o.n_seqs; i++) {
                ki_cuda_seq &c = w.state[i];
                c.n_rows = prompt ? (uint32_t)steps[n] + 37 * i : 1;
                if (!prompt && i + 1 == o.n_seqs && repeat % 5 == 2) c.n_rows = 0; /* idle slots */
                c.first_row = rows;
                if (prompt && first) {
                    uint32_t all = 0;
                    for (int s : steps)
                        if (s > 0) all += (uint32_t)s + 37 * i;
                    c.run_start = 0;
                    CHECK_OK(kivi_seq_begin_prompt(cpu.seqs[i], all, err));
                }
                c.flags = prompt ? KI_CUDA_PROMPT : 0;
                rows += c.n_rows;
                most = std::max(most, c.n_rows);
            }
            first = first && !prompt;
            random_rows(k, v, q, o, rows, r);
            w.k_in.put(k.data(), k.size()), w.v_in.put(v.data(), v.size());
            w.q_in.put(q.data(), q.size());
            q32.resize(q.size());
            for (size_t i = 0; i < q.size(); i++) q32[i] = ki_f16_to_f32(q[i]);
            for (uint32_t i = 0; i < o.n_seqs; i++) {
                const ki_cuda_seq &c = w.state[i];
                if (c.n_rows)
                    cpu.step(o, i, c.n_rows, k.data() + c.first_row * row_k,
                             v.data() + c.first_row * row_k, q32.data() + c.first_row * row_q,
                             want.data() + c.first_row * row_q);
            }
            if (prompt) w.prompt(rows, most, true);
            else w.decode(rows);
            std::vector<float> got = w.out.get(0, rows * row_q);
            for (size_t i = 0; i < got.size(); i++) {
                uint32_t word;
                memcpy(&word, &got[i], 4);
                bits = (bits ^ word) * 0x100000001b3u;
                (prompt ? prompt_error : decode_error).add(got[i], want[i]);
            }
        }
    if (!check_failed()) compare_pages(w, cpu);
    CHECK(prompt_error.n_nan + decode_error.n_nan == 0, "%zu NaN",
          prompt_error.n_nan + decode_error.n_nan);
    CHECK(prompt_error.relative() < TOLERANCE && decode_error.relative() < TOLERANCE,
          "error of prompts %.5f, of decoding %.5f, at most %.4f", prompt_error.relative(),
          decode_error.relative(), TOLERANCE);
    end_case(text("prompts %.5f, decoding %.5f of the CPU, bits %016llx", prompt_error.relative(),
                  decode_error.relative(), (unsigned long long)bits));
}

static world_options base_options() {
    world_options o = {};
    o.head_dim = 128, o.n_heads = 8, o.n_kv_heads = 2, o.k_bits = o.v_bits = 2, o.group = 32;
    o.residual = 128, o.rule = KIVI_RULE_PAPER, o.n_seqs = 3, o.max_tokens = 2048;
    o.split_tokens = 512, o.n_layers = 1;
    return o;
}

static void check_kinds() {
    static const struct {
        uint32_t d, h, hk, kb, vb, g, r, s;
        kivi_rule rule;
        uint32_t span, window;
        int steps[5];
        bool large;
    } cases[] = {
        {128, 8, 2, 2, 2, 32, 128, 0, KIVI_RULE_PAPER, 0, 0, {700, -140}, false},
        {128, 4, 4, 2, 2, 32, 32, 0, KIVI_RULE_PAPER, 0, 0, {130, -70}, false},
        {128, 8, 1, 2, 2, 32, 128, 4, KIVI_RULE_STREAM, 0, 0, {300, 400, -30}, false},
        {128, 20, 1, 2, 2, 32, 32, 40, KIVI_RULE_STREAM, 0, 0, {-70, 200}, false},
        {128, 8, 2, 2, 2, 32, 128, 0, KIVI_RULE_PAPER, 0, 0, {300, 300, 111, -30}, true},
        {128, 8, 2, 2, 2, 32, 128, 0, KIVI_RULE_SPAN, 256, 0, {300, 300, 111, -30}, true},
        {128, 8, 2, 2, 2, 32, 128, 0, KIVI_RULE_STREAM, 0, 300, {700, -70}, false},
        {128, 8, 2, 2, 2, 32, 32, 4, KIVI_RULE_PAPER, 0, 100, {250, -70}, false},
        {128, 4, 2, 16, 16, 32, 128, 0, KIVI_RULE_PAPER, 0, 0, {300, 77, -40}, false},
        {128, 4, 2, 16, 2, 32, 128, 4, KIVI_RULE_STREAM, 0, 0, {300, -40}, false},
        {128, 4, 2, 2, 16, 32, 128, 4, KIVI_RULE_STREAM, 0, 0, {300, -40}, false},
        {128, 4, 2, 4, 2, 32, 128, 0, KIVI_RULE_STREAM, 0, 0, {300, -40}, false},
        {128, 4, 2, 8, 4, 64, 64, 0, KIVI_RULE_STREAM, 0, 0, {300, -70}, false},
        {128, 4, 2, 8, 8, 32, 32, 0, KIVI_RULE_STREAM, 0, 0, {300, -70}, false},
        {128, 4, 2, 2, 2, 128, 128, 4, KIVI_RULE_STREAM, 0, 0, {500, -140}, false},
        {128, 4, 2, 2, 8, 16, 16, 0, KIVI_RULE_STREAM, 0, 0, {200, -40}, false},
        {128, 4, 2, 4, 4, 64, 128, 0, KIVI_RULE_PAPER, 0, 0, {500, -140}, false},
        {64, 9, 3, 2, 2, 32, 128, 0, KIVI_RULE_PAPER, 0, 0, {400, -140}, false},
        {64, 4, 2, 2, 2, 64, 64, 0, KIVI_RULE_STREAM, 0, 0, {400, -70}, false},
        {64, 8, 8, 16, 16, 32, 128, 0, KIVI_RULE_PAPER, 0, 0, {200, -40}, false},
        {64, 8, 2, 4, 2, 32, 128, 0, KIVI_RULE_STREAM, 0, 0, {200, -40}, false},
        {80, 4, 4, 2, 2, 16, 32, 0, KIVI_RULE_STREAM, 0, 0, {200, -70}, false},
        {80, 4, 2, 4, 8, 16, 48, 0, KIVI_RULE_PAPER, 0, 0, {200, -70}, false},
        {64, 4, 2, 2, 2, 32, 320, 0, KIVI_RULE_STREAM, 0, 0, {400, -330}, false},
        {96, 6, 3, 2, 2, 32, 128, 0, KIVI_RULE_STREAM, 0, 0, {300, -140}, false},
        {96, 6, 3, 8, 4, 16, 32, 5, KIVI_RULE_STREAM, 0, 0, {150, -40}, false},
        {256, 4, 1, 2, 2, 32, 128, 0, KIVI_RULE_PAPER, 0, 0, {400, -140}, false},
        {256, 4, 1, 8, 8, 128, 128, 0, KIVI_RULE_STREAM, 0, 0, {400, -30}, false},
        {256, 4, 1, 16, 16, 32, 128, 0, KIVI_RULE_STREAM, 0, 200, {300, -30}, false},
        {256, 2, 1, 4, 2, 16, 32, 0, KIVI_RULE_STREAM, 0, 0, {200, -70}, false},
    };
    static const char *rules[] = {"paper", "stream", "span"};
    for (const auto &c : cases) {
        world_options o = base_options();
        o.head_dim = c.d, o.n_heads = c.h, o.n_kv_heads = c.hk, o.k_bits = c.kb, o.v_bits = c.vb;
        o.group = c.g, o.residual = c.r, o.sinks = c.s, o.rule = c.rule, o.span = c.span;
        o.window = c.window, o.large_ring = c.large;
        std::vector<int> steps;
        for (int s : c.steps)
            if (s) steps.push_back(s);
        if (open_case(text("cpu/d%u-h%u-%u-k%uv%u-g%u-r%u-s%u-%s-w%u%s", c.d, c.h, c.hk, c.kb, c.vb,
                           c.g, c.r, c.s, rules[c.rule], c.window, c.large ? "-large" : "")))
            run_case(o, steps);
    }
    world_options o = base_options();
    o.n_layers = 3, o.n_seqs = 40, o.max_tokens = 1700, o.split_tokens = 128, o.pdl = true;
    if (open_case("cpu/three-layers-40-sequences-pdl")) run_case(o, {5, -30});
    o = base_options();
    o.n_seqs = 2;
    if (open_case("cpu/from-nothing")) run_case(o, {-135});
}

/* ---- plus kinds: codes against the definition, attention against float64 ---- */

/* The float64 answer for one query over positions [first, n] of one sequence and head. rows16: all
 * keys (values) so far as the window would have them. */
struct oracle {
    const world *w;
    std::vector<double> k, v; /* [n][D] as the query reads them */
    void read(world &world_, uint32_t seq, uint32_t head, uint32_t n,
              const std::vector<uint16_t> &k16, const std::vector<uint16_t> &v16, uint32_t k_exact,
              uint32_t v_exact) {
        w = &world_;
        uint32_t d = w->o.head_dim;
        k.resize((size_t)n * d), v.resize((size_t)n * d);
        std::vector<std::vector<uint8_t>> pages;
        for (uint32_t p = 0; p * 128 < n; p++) pages.push_back(world_.page(seq, p, 0, head));
        auto part = [&](uint32_t from, uint32_t to) {
            for (uint32_t t = from; t < to; t++) {
                page_reader page = {&w->l, pages[t / 128].data()};
                bool sink = t < w->o.sinks;
                for (uint32_t c = 0; c < d; c++) {
                    size_t at = (size_t)t * d + c;
                    bool ke = w->l.k_bits < 16 && (sink || t >= k_exact);
                    bool ve = w->l.v_bits < 16 && (sink || t >= v_exact);
                    k[at] = ke ? ki_f16_to_f32(k16[at]) : page.key(t % 128, c);
                    v[at] = ve ? ki_f16_to_f32(v16[at]) : page.value(t % 128, c);
                }
            }
        };
        std::vector<std::thread> threads;
        for (uint32_t i = 0; i < 16; i++)
            threads.emplace_back(part, (uint32_t)((uint64_t)n * i / 16),
                                 (uint32_t)((uint64_t)n * (i + 1) / 16));
        for (std::thread &t : threads) t.join();
    }
    void attend(double *out, const uint16_t *q, uint32_t n) const {
        uint32_t d = w->o.head_dim;
        std::vector<double> s(n);
        double m = -INFINITY, sum = 0;
        for (uint32_t t = 0; t < n; t++) {
            double dot = 0;
            for (uint32_t c = 0; c < d; c++) dot += ki_f16_to_f32(q[c]) * k[(size_t)t * d + c];
            s[t] = dot / sqrt((double)d);
            m = std::max(m, s[t]);
        }
        for (uint32_t c = 0; c < d; c++) out[c] = 0;
        for (uint32_t t = 0; t < n; t++) {
            double p = exp(s[t] - m);
            sum += p;
            for (uint32_t c = 0; c < d; c++) out[c] += p * v[(size_t)t * d + c];
        }
        for (uint32_t c = 0; c < d; c++) out[c] /= sum;
    }
};

/* Fills n tokens of one sequence through prompt steps, then one decode step; compares that row with
 * float64. Rows as the store has them are kept for the oracle. */
static void run_oracle(world_options o, uint32_t n, bool codes_too);

static void check_plus_page(world &w, uint32_t head, uint32_t index,
                            const std::vector<uint16_t> &k16, const std::vector<uint16_t> &v16,
                            uint32_t v_packed) {
    uint32_t d = w.o.head_dim, base = index * 128;
    std::vector<uint16_t> transposed((size_t)128 * d), scale(d), zero(d);
    const uint16_t *blocks[8];
    for (uint32_t b = 0; b < 8; b++) {
        blocks[b] = transposed.data() + (size_t)b * 16 * d;
        for (uint32_t c = 0; c < d; c++)
            for (uint32_t t = 0; t < 16; t++)
                transposed[(size_t)b * 16 * d + c * 16 + t] =
                    k16[(size_t)(base + b * 16 + t) * d + c];
    }
    std::vector<uint32_t> low(16 * d), wide(2 * d);
    std::vector<uint8_t> list(d / 4), codes(d);
    bool narrow = w.l.k_bits == 2;
    ki_plus_keys keys = {
        w.l.k_bits,   low.data(), narrow ? wide.data() : NULL, narrow ? list.data() : NULL,
        scale.data(), zero.data()};
    uint32_t n_sinks = w.o.sinks > base ? w.o.sinks - base : 0;
    ki_plus_close_keys_scalar(&keys, blocks, n_sinks, d, KI_PLUS_KEY_STEPS);
    std::vector<uint8_t> bytes = w.page(0, index, 0, head);
    page_reader page = {&w.l, bytes.data()};
    if (narrow)
        CHECK(memcmp(list.data(), bytes.data() + w.l.list_at, d / 4) == 0, "page %u: wide channels",
              index);
    for (uint32_t c = 0; c < d; c++) {
        uint32_t at = page.key_scale_at(0, c);
        CHECK(memcmp(&scale[c], bytes.data() + at, 2) == 0, "page %u channel %u: scale", index, c);
        CHECK(memcmp(&zero[c], bytes.data() + at + w.l.k_zero_at - w.l.k_scale_at, 2) == 0,
              "page %u channel %u: zero", index, c);
        for (uint32_t t = 0; t < 128; t++) {
            uint32_t want = ki_plus_key_code(&keys, t, c, d), got = page.key_code(t, c);
            CHECK(want == got, "page %u token %u channel %u: key code %u, CPU %u", index, t, c, got,
                  want);
        }
    }
    for (uint32_t t = 0; t < 128 && base + t < v_packed; t++) {
        if (base + t < w.o.sinks) continue;
        ki_plus_quantize_values_scalar(codes.data(), scale.data(),
                                       v16.data() + (size_t)(base + t) * d, d, w.l.v_bits,
                                       KI_PLUS_VALUE_STEPS);
        for (uint32_t c = 0; c < d; c++) {
            CHECK(codes[c] == page.value_code(t, c),
                  "page %u token %u channel %u: value code %u, CPU %u", index, t, c,
                  page.value_code(t, c), codes[c]);
            CHECK(memcmp(&scale[c / w.l.v_group], bytes.data() + page.value_scale_at(t, c), 2) == 0,
                  "page %u token %u channel %u: value scale", index, t, c);
        }
    }
}

static void run_oracle(world_options o, uint32_t n, bool codes_too) {
    rng r = case_rng();
    const uint32_t chunk = 4096;
    world w;
    o.n_seqs = 1, o.max_tokens = n + 2, o.rule = KIVI_RULE_STREAM, o.n_layers = 1;
    w.make(o, std::min(chunk, n + 1), r);
    uint32_t d = o.head_dim;
    std::vector<std::vector<uint16_t>> k16(o.n_kv_heads), v16(o.n_kv_heads);
    std::vector<uint16_t> k, v, q;
    for (uint32_t at = 0; at <= n && !check_failed();) {
        bool last = at == n;
        uint32_t rows = last ? 1 : std::min(chunk, n - at);
        random_rows(k, v, q, o, rows, r);
        w.k_in.put(k.data(), k.size()), w.v_in.put(v.data(), v.size());
        w.q_in.put(q.data(), q.size());
        w.state[0].n_rows = rows, w.state[0].flags = last ? 0 : KI_CUDA_PROMPT;
        if (last) w.decode(1);
        else w.prompt(rows, rows, false);
        for (uint32_t t = 0; t < rows; t++)
            for (uint32_t h = 0; h < o.n_kv_heads; h++) {
                const uint16_t *row = k.data() + ((size_t)t * o.n_kv_heads + h) * d;
                k16[h].insert(k16[h].end(), row, row + d);
                std::vector<float> x(d);
                for (uint32_t c = 0; c < d; c++)
                    x[c] = ki_f16_to_f32(v[((size_t)t * o.n_kv_heads + h) * d + c]);
                if (o.plus) ki_plus_turn_scalar(x.data(), d);
                for (uint32_t c = 0; c < d; c++) v16[h].push_back(ki_f32_to_f16(x[c]));
            }
        at += rows;
    }
    if (codes_too)
        for (uint32_t h = 0; h < o.n_kv_heads; h++)
            for (uint32_t p = 0; (p + 1) * 128 <= ki_cuda_k_packed(&w.l, n + 1); p++)
                check_plus_page(w, h, p, k16[h], v16[h], ki_cuda_v_packed(&w.l, n + 1));
    std::vector<float> got = w.out.get(0, (size_t)o.n_heads * d);
    ki_cuda_seq s = {};
    error_sum error;
    std::vector<double> want(d);
    for (uint32_t h = 0; h < o.n_kv_heads && !check_failed(); h++) {
        oracle check;
        check.read(w, 0, h, n + 1, k16[h], v16[h], ki_cuda_k_exact(&w.l, &s, n),
                   ki_cuda_v_exact(&w.l, &s, n));
        for (uint32_t i = 0; i < w.l.head_group; i++) {
            uint32_t head = h * w.l.head_group + i;
            check.attend(want.data(), q.data() + (size_t)head * d, n + 1);
            std::vector<float> turned(want.begin(), want.end());
            if (o.plus) ki_plus_turn_scalar(turned.data(), d);
            for (uint32_t c = 0; c < d; c++)
                error.add(got[(size_t)head * d + c], o.plus ? turned[c] : want[c]);
        }
    }
    CHECK(error.n_nan == 0, "%zu NaN", error.n_nan);
    CHECK(error.relative() < TOLERANCE, "error %.5f, at most %.4f", error.relative(), TOLERANCE);
    end_case(text("error %.5f, largest %.6f", error.relative(), error.largest));
}

static void check_oracle() {
    static const uint32_t lengths[] = {0, 1, 99, 1000, 4096, 32768, 131072};
    for (uint32_t n : lengths) {
        world_options o = base_options();
        o.split_tokens = 2048;
        if (run.small && n > 5000) continue;
        if (open_case(text("oracle/kivi2-%u", n))) run_oracle(o, n, false);
        o.k_bits = o.v_bits = 16;
        if (open_case(text("oracle/f16-%u", n))) run_oracle(o, n, false);
    }
    static const struct {
        uint32_t d, k, v, n, s;
    } plus[] = {{128, 2, 2, 700, 4}, {128, 2, 2, 8192, 4}, {64, 2, 2, 700, 4},  {80, 2, 2, 400, 0},
                {256, 2, 2, 700, 4}, {128, 4, 2, 700, 4},  {128, 4, 3, 700, 4}, {64, 4, 3, 400, 0},
                {256, 4, 3, 400, 4}, {96, 2, 2, 400, 0},   {80, 4, 3, 400, 4}};
    for (const auto &c : plus) {
        world_options o = base_options();
        o.plus = true, o.head_dim = c.d, o.k_bits = c.k, o.v_bits = c.v, o.sinks = c.s;
        o.group = c.d % 32 ? 16 : 32;
        if (open_case(text("plus/d%u-k%uv%u-%u", c.d, c.k, c.v, c.n))) run_oracle(o, c.n, true);
    }
}

/* ---- the quantizer ---- */

static std::vector<uint8_t> read_npy(const std::string &path, size_t item, size_t *n) {
    std::vector<uint8_t> all;
    FILE *f = fopen(path.c_str(), "rb");
    if (!f) {
        CHECK(false, "%s cannot be opened", path.c_str());
        return all;
    }
    uint8_t head[10];
    CHECK(fread(head, 1, 10, f) == 10, "%s is short", path.c_str());
    fseek(f, 10 + head[8] + 256 * head[9], SEEK_SET);
    uint8_t buffer[4096];
    for (size_t got; (got = fread(buffer, 1, sizeof buffer, f)) > 0;)
        all.insert(all.end(), buffer, buffer + got);
    fclose(f);
    *n = all.size() / item;
    return all;
}

/* The golden groups as values (G channels of a row) and as keys (G tokens of a channel). */
static void run_golden(uint32_t bits, uint32_t group) {
    std::string dir = run.golden + text("/quant/b%u-g%u/", bits, group);
    size_t n_x, n_codes, n_groups;
    std::vector<uint8_t> x = read_npy(dir + "x.npy", 2, &n_x);
    std::vector<uint8_t> codes = read_npy(dir + "code.npy", 1, &n_codes);
    std::vector<uint8_t> scale = read_npy(dir + "scale.npy", 2, &n_groups);
    std::vector<uint8_t> zero = read_npy(dir + "zero.npy", 2, &n_groups);
    if (check_failed()) return end_case();
    CHECK(n_x == n_groups * group && n_codes == n_x && n_groups > 0, "shapes");
    const uint32_t d = 128;
    world_options o = base_options();
    o.k_bits = o.v_bits = bits, o.group = group, o.residual = group, o.n_seqs = 1;
    o.n_heads = o.n_kv_heads = 1;
    uint32_t as_values = (uint32_t)((n_groups + d / group - 1) / (d / group));
    uint32_t as_keys = (uint32_t)((n_groups + d - 1) / d) * group;
    uint32_t rows = std::max(as_values, as_keys) + 2 * group;
    o.max_tokens = rows + 128;
    rng r = case_rng();
    world w;
    w.make(o, rows, r);
    std::vector<uint16_t> k((size_t)rows * d), v((size_t)rows * d);
    const uint16_t *all = (const uint16_t *)x.data();
    for (size_t g = 0; g < n_groups; g++)
        for (uint32_t i = 0; i < group; i++) {
            uint16_t e = all[g * group + i];
            v[g / (d / group) * d + g % (d / group) * group + i] = e;
            k[(g / d * group + i) * d + g % d] = e;
        }
    w.k_in.put(k.data(), k.size()), w.v_in.put(v.data(), v.size());
    w.state[0].n_rows = rows;
    w.prompt(rows, rows, false);
    std::vector<std::vector<uint8_t>> pages;
    for (uint32_t p = 0; p * 128 < rows; p++) pages.push_back(w.page(0, p, 0, 0));
    for (size_t g = 0; g < n_groups; g++)
        for (uint32_t i = 0; i < group; i++) {
            uint32_t t = (uint32_t)(g / (d / group)), c = (uint32_t)(g % (d / group)) * group + i;
            page_reader pv = {&w.l, pages[t / 128].data()};
            CHECK(pv.value_code(t % 128, c) == codes[g * group + i], "value group %zu code %u", g,
                  i);
            CHECK(!memcmp(pv.page + pv.value_scale_at(t % 128, c), &scale[2 * g], 2) &&
                      !memcmp(pv.page + pv.value_scale_at(t % 128, c) + w.l.v_zero_at -
                                  w.l.v_scale_at,
                              &zero[2 * g], 2),
                  "value group %zu scale or zero", g);
            t = (uint32_t)(g / d) * group + i, c = (uint32_t)(g % d);
            page_reader pk = {&w.l, pages[t / 128].data()};
            CHECK(pk.key_code(t % 128, c) == codes[g * group + i], "key group %zu code %u", g, i);
            CHECK(
                !memcmp(pk.page + pk.key_scale_at(t % 128, c), &scale[2 * g], 2) &&
                    !memcmp(pk.page + pk.key_scale_at(t % 128, c) + w.l.k_zero_at - w.l.k_scale_at,
                            &zero[2 * g], 2),
                "key group %zu scale or zero", g);
        }
    end_case(text("%zu groups", n_groups));
}

/* Random float16 of every size against the scalar definition. */
static void run_random_codes(uint32_t bits, uint32_t group, uint32_t n_rows) {
    const uint32_t d = 128, heads = 8, chunk = 8192;
    world_options o = base_options();
    o.k_bits = o.v_bits = bits, o.group = group, o.residual = 128, o.n_seqs = 1;
    o.n_heads = o.n_kv_heads = heads, o.max_tokens = n_rows + 128;
    rng r = case_rng();
    world w;
    w.make(o, chunk, r);
    size_t n = (size_t)n_rows * heads * d;
    std::vector<uint16_t> k(n), v(n);
    auto fill = [&](size_t part) {
        rng mine = {run.seed * 977 + part};
        for (size_t i = n * part / 16; i < n * (part + 1) / 16; i++) {
            uint64_t u = mine.u64();
            float scale = exp2f((float)(i / 4096 % 24) - 14);
            k[i] = ki_f32_to_f16(((float)(u & 0xffff) - 32768) * (1.0f / 16384) * scale);
            v[i] = ki_f32_to_f16(((float)(u >> 16 & 0xffff) - 20000) * (1.0f / 16384) * scale);
        }
    };
    auto in_parallel = [](auto f) {
        std::vector<std::thread> threads;
        for (size_t i = 0; i < 16; i++) threads.emplace_back(f, i);
        for (std::thread &t : threads) t.join();
    };
    in_parallel(fill);
    for (uint32_t at = 0; at < n_rows; at += chunk) {
        uint32_t rows = std::min(chunk, n_rows - at);
        w.k_in.put(k.data() + (size_t)at * heads * d, (size_t)rows * heads * d);
        w.v_in.put(v.data() + (size_t)at * heads * d, (size_t)rows * heads * d);
        w.state[0].n_rows = rows;
        w.prompt(rows, rows, false);
    }
    std::vector<uint8_t> pool = w.pool.get(0, w.pool.n);
    uint32_t n_pages = ki_cuda_v_packed(&w.l, n_rows) / 128;
    std::vector<size_t> wrong(16);
    in_parallel([&](size_t part) {
        std::vector<uint16_t> x(group);
        std::vector<uint8_t> codes(group);
        for (uint32_t p = (uint32_t)(n_pages * part / 16); p < n_pages * (part + 1) / 16; p++)
            for (uint32_t h = 0; h < heads; h++) {
                page_reader page = {&w.l,
                                    pool.data() + w.table[p] * w.l.id_bytes + h * w.l.page_bytes};
                for (uint32_t g = 0; g < 128 / group; g++)
                    for (uint32_t c = 0; c < d; c++) {
                        uint16_t s, z;
                        for (uint32_t i = 0; i < group; i++)
                            x[i] = k[((size_t)(p * 128 + g * group + i) * heads + h) * d + c];
                        ki_quantize_scalar(codes.data(), &s, &z, x.data(), 1, group, bits);
                        uint32_t at = page.key_scale_at(g * group, c);
                        wrong[part] += memcmp(page.page + at, &s, 2) != 0;
                        wrong[part] +=
                            memcmp(page.page + at + w.l.k_zero_at - w.l.k_scale_at, &z, 2) != 0;
                        for (uint32_t i = 0; i < group; i++)
                            wrong[part] += page.key_code(g * group + i, c) != codes[i];
                    }
                for (uint32_t t = 0; t < 128; t++)
                    for (uint32_t g = 0; g < d / group; g++) {
                        uint16_t s, z;
                        const uint16_t *row =
                            &v[((size_t)(p * 128 + t) * heads + h) * d + g * group];
                        ki_quantize_scalar(codes.data(), &s, &z, row, 1, group, bits);
                        uint32_t at = page.value_scale_at(t, g * group);
                        wrong[part] += memcmp(page.page + at, &s, 2) != 0;
                        wrong[part] +=
                            memcmp(page.page + at + w.l.v_zero_at - w.l.v_scale_at, &z, 2) != 0;
                        for (uint32_t i = 0; i < group; i++)
                            wrong[part] += page.value_code(t, g * group + i) != codes[i];
                    }
            }
    });
    size_t all = 0;
    for (size_t x : wrong) all += x;
    CHECK(all == 0, "%zu codes, scales or zeros differ", all);
    end_case(text("%.3g elements", 2.0 * n_pages * 128 * heads * d));
}

static void check_quant() {
    for (uint32_t bits = 2; bits <= 8; bits *= 2)
        for (uint32_t group = 16; group <= 128; group *= 2)
            if (open_case(text("golden/b%u-g%u", bits, group))) run_golden(bits, group);
    uint32_t rows = run.small ? 2048 : 49408;
    if (open_case("random/b2-g32")) run_random_codes(2, 32, rows);
    if (open_case("random/b4-g64")) run_random_codes(4, 64, rows / 8);
    if (open_case("random/b8-g128")) run_random_codes(8, 128, rows / 8);
}

/* ---- rope, 64-bit offsets, repeatability ---- */

static void run_rope() {
    rng r = case_rng();
    world_options o = base_options();
    o.n_seqs = 1, o.k_bits = o.v_bits = 16;
    world w;
    w.make(o, 4, r);
    uint32_t d = o.head_dim, half = d / 2, rows = 3;
    device_array<float> x, rope;
    size_t width = (size_t)(o.n_heads + 2 * o.n_kv_heads) * d;
    std::vector<float> in(rows * width), turns(rows * d);
    for (float &e : in) e = r.normal() * 3;
    in[o.n_heads * d] = 1e6f; /* saturates */
    for (uint32_t i = 0; i < rows * half; i++) {
        float angle = r.normal() * 3;
        turns[2 * i] = cosf(angle), turns[2 * i + 1] = sinf(angle);
    }
    for (uint32_t j = 0; j < 2; j++) turns[2 * j] = 1, turns[2 * j + 1] = 0;
    x.make(in.size()), x.put(in.data(), in.size());
    rope.make(turns.size()), rope.put(turns.data(), turns.size());
    ki_cuda_append_call c = w.append_call(0, rows, rows);
    c.q = x.data, c.k = x.data + o.n_heads * d, c.v = x.data + (o.n_heads + o.n_kv_heads) * d;
    c.q_stride = c.k_stride = c.v_stride = (uint32_t)width;
    c.type = KI_CUDA_F32, c.rope = rope.data;
    w.state[0].n_rows = rows;
    w.put_state();
    CHECK_OK(ki_cuda_prompt_append(&c, NULL, err));
    MUST(cudaDeviceSynchronize());
    std::vector<uint16_t> q = w.q_out.get(0, rows * o.n_heads * d);
    std::vector<uint16_t> k = w.k_rows.get(0, rows * o.n_kv_heads * d);
    std::vector<uint16_t> v = w.v_rows.get(0, rows * o.n_kv_heads * d);
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t h = 0; h < o.n_heads + 2 * o.n_kv_heads; h++)
            for (uint32_t j = 0; j < half; j++) {
                const float *head = in.data() + row * width + h * d;
                float co = turns[2 * (row * half + j)], si = turns[2 * (row * half + j) + 1];
                bool value = h >= o.n_heads + o.n_kv_heads;
                volatile float ac = head[j] * co, bs = head[half + j] * si;
                volatile float bc = head[half + j] * co, as = head[j] * si;
                float a = value ? head[j] : ac - bs, b = value ? head[half + j] : bc + as;
                uint16_t want[2];
                a = a > 65504 ? 65504 : a;
                want[0] = ki_f32_to_f16(a), want[1] = ki_f32_to_f16(b);
                uint32_t n = h < o.n_heads ? o.n_heads : o.n_kv_heads, local = h;
                if (h >= o.n_heads) local = (h - o.n_heads) % o.n_kv_heads;
                const uint16_t *got = (h < o.n_heads ? q
                                       : value       ? v
                                                     : k)
                                          .data() +
                                      ((size_t)row * n + local) * d;
                CHECK(got[j] == want[0] && got[half + j] == want[1], "row %u head %u pair %u", row,
                      h, j);
            }
    ki_cuda_counters counters = w.counters.get(0, 1)[0];
    CHECK(counters.n_saturated == 1 && counters.n_nonfinite == 0, "counters %llu %llu",
          counters.n_saturated, counters.n_nonfinite);
    end_case();
}

/* The same pages far behind 2^32 bytes: the same bits. */
static void run_far_pages() {
    rng r = case_rng();
    world_options o = base_options();
    o.n_seqs = 1, o.max_tokens = 1024;
    world w;
    w.make(o, 800, r);
    std::vector<uint16_t> k, v, q;
    random_rows(k, v, q, o, 800, r);
    w.k_in.put(k.data(), k.size()), w.v_in.put(v.data(), v.size()), w.q_in.put(q.data(), q.size());
    w.state[0].n_rows = 800, w.state[0].flags = KI_CUDA_PROMPT;
    w.prompt(800, 800, false);
    w.state[0].n_rows = 1, w.state[0].flags = 0;
    w.decode(1);
    std::vector<float> near = w.out.get(0, (size_t)o.n_heads * o.head_dim);
    uint8_t *far = NULL;
    uint64_t far_id = 5ull * 1024 * 1024 * 1024 / w.l.id_bytes;
    size_t bytes = (far_id + w.n_pages) * w.l.id_bytes;
    MUST(cudaMalloc((void **)&far, bytes));
    MUST(cudaMemset(far, 0xff, bytes));
    MUST(cudaMemcpy(far + far_id * w.l.id_bytes, w.pool.data, w.n_pages * w.l.id_bytes,
                    cudaMemcpyDeviceToDevice));
    std::vector<uint32_t> moved = w.table;
    for (uint32_t &id : moved) id += (uint32_t)far_id;
    w.tables.put(moved.data(), moved.size());
    w.cache.pool = far;
    w.state[0].n_tokens--;
    w.decode(1);
    std::vector<float> got = w.out.get(0, near.size());
    CHECK(!memcmp(got.data(), near.data(), near.size() * 4), "other bits behind 2^32 bytes");
    cudaFree(far);
    end_case(text("pages at byte %.3g", (double)far_id * (double)w.l.id_bytes));
}

/* A sequence alone, and among others of other lengths, twice; the same bits. In a graph as well. */
static void run_repeat(world_options o) {
    rng r = case_rng();
    const uint32_t n = 9, rows = 300;
    std::vector<uint16_t> k, v, q;
    std::vector<float> first;
    for (uint32_t round = 0; round < 3 && !check_failed(); round++) {
        rng data = {77}, other = {(uint64_t)round + 5};
        o.n_seqs = round == 0 ? 1 : n, o.max_tokens = 2500, o.split_tokens = 512;
        world w;
        w.make(o, n * rows, r);
        uint32_t mine = round == 0 ? 0 : 4;
        for (uint32_t step = 0; step < 8; step++) {
            std::vector<uint16_t> ks, vs, qs;
            uint32_t at = 0, most = 0;
            bool last = step == 7;
            for (uint32_t i = 0; i < o.n_seqs; i++) {
                uint32_t m = last ? 1 : i == mine ? rows : 40 + 25 * i;
                random_rows(k, v, q, o, m, i == mine ? data : other);
                ks.insert(ks.end(), k.begin(), k.end()), vs.insert(vs.end(), v.begin(), v.end());
                qs.insert(qs.end(), q.begin(), q.end());
                w.state[i].n_rows = m, w.state[i].first_row = at, w.state[i].flags = !last;
                at += m, most = std::max(most, m);
            }
            w.k_in.put(ks.data(), ks.size()), w.v_in.put(vs.data(), vs.size());
            w.q_in.put(qs.data(), qs.size());
            if (!last) w.prompt(at, most, false);
            else w.decode(at);
        }
        size_t row = (size_t)o.n_heads * o.head_dim;
        std::vector<float> got = w.out.get(w.state[mine].first_row * row, row);
        if (round == 0) first = got;
        CHECK(!memcmp(first.data(), got.data(), row * 4), "round %u: other bits", round);
        if (round < 2) continue;
        /* the same launches out of a graph */
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        for (ki_cuda_seq &s : w.state) s.n_tokens--;
        w.put_state();
        w.poison(n);
        MUST(cudaStreamCreate(&stream));
        MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        ki_cuda_append_call a = w.append_call(0, n, 1);
        ki_cuda_attend_call c = w.attend_call(0, n, 1);
        CHECK_OK(ki_cuda_decode_plan(&c, stream, err));
        a.pdl = false;
        CHECK_OK(ki_cuda_append(&a, stream, err));
        c.pdl = true;
        CHECK_OK(ki_cuda_decode_attend(&c, stream, err));
        MUST(cudaStreamEndCapture(stream, &graph));
        MUST(cudaGraphInstantiate(&exec, graph, 0));
        for (int i = 0; i < 3; i++) MUST(cudaGraphLaunch(exec, stream));
        MUST(cudaStreamSynchronize(stream));
        got = w.out.get(w.state[mine].first_row * row, row);
        CHECK(!memcmp(first.data(), got.data(), row * 4), "graph: other bits");
        cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
    }
    end_case();
}

static void check_rest() {
    if (open_case("rope")) run_rope();
    if (!run.small && open_case("far-pages")) run_far_pages();
    if (open_case("repeat/kivi2")) run_repeat(base_options());
    world_options o = base_options();
    o.k_bits = o.v_bits = 16;
    if (open_case("repeat/f16")) run_repeat(o);
    o = base_options();
    o.plus = true, o.sinks = 4;
    if (open_case("repeat/kivi2+")) run_repeat(o);
    check_step(base_options());
}

#include "prompt_cases.cuh"
#include "sdpa_cases.cuh"
#include "small_cases.cuh"
#include "line_cases.cuh"
#include "step_cases.cuh"

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        std::string a = argv[i];
        if (a.compare(0, 7, "--seed=") == 0) run.seed = strtoull(a.c_str() + 7, NULL, 0);
        else if (a.compare(0, 7, "--test=") == 0) run.prefix = a.substr(7);
        else if (a.compare(0, 9, "--golden=") == 0) run.golden = a.substr(9);
        else if (a == "--small") run.small = true;
        else {
            fprintf(stderr, "check-cuda [--seed=N] [--test=PREFIX] [--golden=DIR] [--small]\n");
            return 2;
        }
    }
    kivi_error error = {};
    uint32_t shared_bytes;
    if (ki_cuda_kernels_init(&shared_bytes, &error) != KIVI_OK) {
        printf("skip check-cuda: %s\n", error.text);
        return 0;
    }
    printf("seed %llu\n", (unsigned long long)run.seed);
    check_rest();
    check_quant();
    check_kinds();
    check_oracle();
    check_prompts();
    check_sdpa();
    check_small();
    check_plain();
    check_lines();
    check_step_ends();
    printf("%u passed, %u failed, %u skipped\n", run.n_passed, run.n_failed, run.n_skipped);
    return run.n_failed != 0;
}
