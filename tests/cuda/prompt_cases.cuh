/* prompt_cases.cuh: cases of check-cuda for prompts behind what is packed: old rows in the scratch
 * element by element, attention of all kinds of caches against float64, and the same bits whatever
 * the scratch has room for. Part of check_cuda.cu: its worlds and its oracle. */
#ifndef KI_CUDA_PROMPT_CASES_CUH
#define KI_CUDA_PROMPT_CASES_CUH
#include "check_step.cuh"

struct prompt_case {
    const char *name;
    uint32_t d, h, hk, kb, vb, g, r, s;
    kivi_rule rule;
    uint32_t span, n_old, n_rows;
    bool plus;
};

struct prompt_world {
    world w;
    std::vector<std::vector<uint16_t>> k16, v16; /* [head][token][D] as the store has them */
    std::vector<uint16_t> q;                     /* of the last step */

    void make(const prompt_case &c, uint64_t scratch_bytes, rng &r) {
        world_options o = base_options();
        o.head_dim = c.d, o.n_heads = c.h, o.n_kv_heads = c.hk, o.k_bits = c.kb, o.v_bits = c.vb;
        o.group = c.g, o.residual = c.r, o.sinks = c.s, o.rule = c.rule, o.span = c.span;
        o.plus = c.plus, o.n_seqs = 1, o.max_tokens = c.n_old + c.n_rows;
        o.large_ring = c.rule != KIVI_RULE_STREAM, o.scratch_bytes = scratch_bytes;
        w.make(o, c.n_old > c.n_rows ? c.n_old : c.n_rows, r);
        k16.resize(c.hk), v16.resize(c.hk);
    }
    void put(uint32_t n_rows, rng &r) {
        std::vector<uint16_t> k, v;
        uint32_t d = w.o.head_dim;
        random_rows(k, v, q, w.o, n_rows, r);
        w.k_in.put(k.data(), k.size()), w.v_in.put(v.data(), v.size());
        w.q_in.put(q.data(), q.size());
        w.state[0].n_rows = n_rows, w.state[0].flags = KI_CUDA_PROMPT;
        std::vector<float> x(d);
        for (size_t at = 0; at < k.size(); at += d) {
            std::vector<uint16_t> &keys = k16[at / d % w.o.n_kv_heads];
            std::vector<uint16_t> &values = v16[at / d % w.o.n_kv_heads];
            keys.insert(keys.end(), &k[at], &k[at] + d);
            for (uint32_t c = 0; c < d; c++) x[c] = ki_f16_to_f32(v[at + c]);
            if (w.o.plus) ki_plus_turn_scalar(x.data(), d);
            for (uint32_t c = 0; c < d; c++) values.push_back(ki_f32_to_f16(x[c]));
        }
    }
    /* All steps but the last one, whose rows are appended. */
    void feed(const prompt_case &c, rng &r) {
        const uint32_t first = c.n_old / 2, steps[] = {first, c.n_old - first};
        for (uint32_t n : steps)
            if (n) put(n, r), w.prompt(n, n, false);
        put(c.n_rows, r);
        w.put_state();
        w.poison(c.n_rows);
        ki_cuda_append_call a = w.append_call(0, c.n_rows, c.n_rows);
        CHECK_OK(ki_cuda_prompt_append(&a, NULL, err));
    }
};

/* One side of one head: row(pos) of an area against what it stands for. */
static void check_old_side(prompt_world &x, const uint16_t *rows, const ki_prompt_old &old,
                           uint32_t head, bool keys) {
    world &w = x.w;
    uint32_t d = w.o.head_dim, bits = keys ? w.l.k_bits : w.l.v_bits, n = w.state[0].n_tokens;
    uint32_t line = keys ? old.k_to : old.v_to, exact = keys ? old.k_from : old.v_from;
    uint32_t sinks = bits == 16 ? 0 : w.l.sink_tokens, page_at = ~0u;
    std::vector<uint8_t> bytes;
    for (uint32_t pos = sinks; pos < line; pos++) {
        if (pos / 128 != page_at) bytes = w.page(0, page_at = pos / 128, 0, head);
        page_reader page = {&w.l, bytes.data()};
        const uint16_t *row = rows + ki_prompt_row_at(&old, pos / 64 * 64, 0) * d + pos % 64 * d;
        for (uint32_t c = 0; c < d; c++) {
            double value = keys ? page.key(pos % 128, c) : page.value(pos % 128, c);
            CHECK(row[c] == ki_f32_to_f16((float)value),
                  "head %u %s of %u channel %u: %04x, not %04x", head,
                  keys ? "codes of key" : "codes of value", pos, c, row[c],
                  ki_f32_to_f16((float)value));
        }
    }
    for (uint32_t pos = 0; pos < n && bits < 16; pos++) {
        if (pos >= sinks && pos < exact) continue;
        const uint16_t *row = rows + ki_prompt_row_at(&old, pos / 64 * 64, 1) * d + pos % 64 * d;
        const std::vector<uint16_t> &all = keys ? x.k16[head] : x.v16[head];
        CHECK(!memcmp(row, &all[(size_t)pos * d], d * 2), "head %u %s %u in 16 bit", head,
              keys ? "key" : "value", pos);
    }
}

static void check_old_rows(prompt_world &x) {
    world &w = x.w;
    ki_prompt_step step = w.prompt_step();
    ki_prompt_part part = {};
    ki_cuda_attend_call c = w.attend_call(0, w.state[0].n_rows, w.state[0].n_rows);
    ki_prompt_old old = ki_prompt_old_of(&w.l, &w.state[0], 0);
    c.workspace = w.scratch.data;
    while (ki_prompt_next(&part, &step) && !check_failed()) {
        CHECK_OK(ki_cuda_prompt_unpack(&c, &part, 0, NULL, err));
        MUST(cudaDeviceSynchronize());
        size_t side = (size_t)part.head_tokens * w.o.head_dim;
        CHECK(2 * side * part.n_heads * 2 <= w.scratch.n, "a part that does not fit");
        std::vector<uint8_t> all = w.scratch.get(0, 2 * side * part.n_heads * 2);
        const uint16_t *rows = (const uint16_t *)all.data();
        for (uint32_t h = 0; h < part.n_heads; h++)
            for (uint32_t s = 0; s < 2; s++)
                check_old_side(x, rows + (h * 2 + s) * side, old, part.first_head + h, s == 0);
    }
}

/* Some rows of the step against float64. */
static error_sum check_prompt_rows(prompt_world &x, const std::vector<float> &got) {
    world &w = x.w;
    uint32_t d = w.o.head_dim, n = w.state[0].n_rows;
    error_sum error;
    std::vector<double> want(d);
    for (uint32_t r : {0u, n / 3, n / 2, n - 1})
        for (uint32_t h = 0; h < w.o.n_kv_heads; h++) {
            uint32_t pos = w.state[0].n_tokens + r;
            oracle check;
            check.read(w, 0, h, pos + 1, x.k16[h], x.v16[h],
                       ki_cuda_k_exact(&w.l, &w.state[0], pos),
                       ki_cuda_v_exact(&w.l, &w.state[0], pos));
            for (uint32_t i = 0; i < w.l.head_group; i++) {
                size_t at = ((size_t)r * w.o.n_heads + h * w.l.head_group + i) * d;
                check.attend(want.data(), &x.q[at], pos + 1);
                std::vector<float> turned(want.begin(), want.end());
                if (w.o.plus) ki_plus_turn_scalar(turned.data(), d);
                for (uint32_t c = 0; c < d; c++)
                    error.add(got[at + c], w.o.plus ? turned[c] : want[c]);
            }
        }
    return error;
}

static void run_prompt(const prompt_case &c) {
    std::vector<float> outs[2];
    error_sum error;
    for (int few = 0; few < 2 && !check_failed(); few++) { /* room for all heads, for one */
        rng r = case_rng();
        prompt_world x;
        x.make(c, few ? 1 : 0, r);
        x.feed(c, r);
        check_old_rows(x);
        x.w.attend_prompt(x.w.attend_call(0, c.n_rows, c.n_rows));
        MUST(cudaDeviceSynchronize());
        CHECK(!few || x.w.n_parts >= 1, "%u parts", x.w.n_parts);
        outs[few] = x.w.out.get(0, (size_t)c.n_rows * c.h * c.d);
        if (!few) error = check_prompt_rows(x, outs[0]);
    }
    CHECK(!check_failed() && !memcmp(outs[0].data(), outs[1].data(), outs[0].size() * 4),
          "other bits with less scratch");
    CHECK(error.n_nan == 0 && error.relative() < TOLERANCE, "error %.5f, at most %.4f, %zu NaN",
          error.relative(), TOLERANCE, error.n_nan);
    end_case(text("error %.5f", error.relative()));
}

static void check_prompts() {
    const kivi_rule paper = KIVI_RULE_PAPER, stream = KIVI_RULE_STREAM, span = KIVI_RULE_SPAN;
    static const prompt_case cases[] = {
        {"kivi2", 128, 8, 8, 2, 2, 32, 128, 0, stream, 0, 700, 300, false},
        {"kivi2-aligned", 128, 4, 2, 2, 2, 32, 128, 0, stream, 0, 1024, 512, false},
        {"kivi2-from-0", 128, 4, 2, 2, 2, 32, 128, 0, stream, 0, 0, 900, false},
        {"kivi2-paper", 128, 8, 8, 2, 2, 32, 128, 0, paper, 0, 700, 300, false},
        {"kivi2-span", 128, 4, 2, 2, 2, 32, 128, 4, span, 256, 700, 300, false},
        {"kivi2-few-rows", 128, 8, 2, 2, 2, 32, 128, 0, stream, 0, 1500, 3, false},
        {"kivi2-r32-sinks", 128, 4, 2, 2, 2, 32, 32, 40, stream, 0, 333, 170, false},
        {"g16", 64, 4, 2, 2, 4, 16, 48, 0, stream, 0, 400, 150, false},
        {"g64", 64, 4, 2, 4, 2, 64, 64, 0, stream, 0, 400, 150, false},
        {"g128-sinks", 256, 2, 1, 2, 8, 128, 128, 4, stream, 0, 400, 150, false},
        {"k8", 96, 4, 2, 8, 8, 32, 64, 0, stream, 0, 400, 150, false},
        {"f16", 128, 4, 2, 16, 16, 32, 128, 0, stream, 0, 400, 150, false},
        {"k16v2-paper", 128, 4, 2, 16, 2, 32, 128, 4, paper, 0, 400, 150, false},
        {"k2v16", 80, 4, 2, 2, 16, 16, 32, 5, stream, 0, 400, 150, false},
        {"kivi2+", 128, 8, 8, 2, 2, 32, 128, 4, stream, 0, 700, 300, true},
        {"kivi2+paper", 128, 4, 2, 2, 2, 32, 128, 4, paper, 0, 700, 300, true},
        {"kivi2+64", 64, 4, 2, 2, 2, 32, 128, 4, stream, 0, 400, 150, true},
        {"kivi2+80", 80, 4, 2, 2, 2, 16, 128, 0, stream, 0, 400, 150, true},
        {"k4v2+96", 96, 4, 2, 4, 2, 32, 128, 4, stream, 0, 400, 150, true},
        {"k4v3+", 128, 4, 2, 4, 3, 32, 128, 4, stream, 0, 400, 150, true},
        {"k4v3+256", 256, 2, 1, 4, 3, 32, 128, 4, stream, 0, 400, 150, true},
    };
    for (const prompt_case &c : cases)
        if (open_case(text("prompt/%s", c.name))) run_prompt(c);
}

#endif
