/* step_cases.cuh: of check-cuda, the first and the last kernel of a step (step_cuda.h): rows of
 * tokens to the bit, every byte that is copied, cleared or left alone, plans as ki_cuda_decode_plan
 * makes them, the best of rows of logits. */
#include "step_cuda.h"

/* The host's memory that a device writes into. */
struct pinned_bytes {
    uint8_t *data = NULL;
    explicit pinned_bytes(size_t n) { MUST(cudaMallocHost((void **)&data, n)); }
    ~pinned_bytes() { cudaFreeHost(data); }
    pinned_bytes(const pinned_bytes &) = delete;
};

enum { STEP_SEQS = 300, STEP_UNTOUCHED = 0xa5 }; /* more sequences than a plan's thread block has */

/* ---- tokens ---- */

/* Elements of any type as bytes, none of them NaN or infinite. */
static std::vector<uint8_t> random_elements(size_t n, ki_cuda_type type, rng &r) {
    std::vector<uint8_t> bytes(n * (type == KI_CUDA_F32 ? 4 : 2));
    for (size_t i = 0; i < n; i++) {
        float x = r.normal();
        uint16_t half = ki_f32_to_f16(x);
        if (type == KI_CUDA_F32) memcpy(&bytes[i * 4], &x, 4);
        else if (type == KI_CUDA_BF16) memcpy(&bytes[i * 2], (const char *)&x + 2, 2);
        else memcpy(&bytes[i * 2], &half, 2);
    }
    return bytes;
}

static float element(const std::vector<uint8_t> &bytes, size_t i, ki_cuda_type type) {
    uint32_t word = 0;
    float x;
    if (type == KI_CUDA_F32) memcpy(&word, &bytes[i * 4], 4);
    else if (type == KI_CUDA_BF16) memcpy((char *)&word + 2, &bytes[i * 2], 2);
    else {
        uint16_t half;
        memcpy(&half, &bytes[i * 2], 2);
        return ki_f16_to_f32(half);
    }
    memcpy(&x, &word, 4);
    return x;
}

struct token_rows {
    enum { VOCAB = 50 };
    ki_cuda_embed_call c = {};
    std::vector<uint8_t> elements;
    std::vector<int32_t> ids;
    device_array<uint8_t> embedding;
    device_array<int32_t> tokens;
    device_array<float> x;

    void make(uint32_t n_rows, uint32_t n, float scale, ki_cuda_type type, rng &r) {
        elements = random_elements((size_t)VOCAB * n, type, r);
        embedding.make(elements.size()), embedding.put(elements.data(), elements.size());
        for (uint32_t i = 0; i < n_rows; i++) ids.push_back((int32_t)(r.u64() % VOCAB));
        tokens.make(n_rows), tokens.put(ids.data(), n_rows);
        x.make((size_t)n_rows * n);
        c = {x.data, embedding.data, tokens.data, n_rows, n, scale, type};
    }
    void check() const {
        std::vector<float> y = x.get(0, x.n);
        for (size_t i = 0; i < y.size(); i++) {
            size_t from = (size_t)ids[i / c.n] * c.n + i % c.n;
            float want = element(elements, from, c.type) * c.scale;
            CHECK(!memcmp(&y[i], &want, 4), "row %zu, %zu: %a, not %a", i / c.n, i % c.n, y[i],
                  want);
        }
    }
};

/* ---- the first kernel ---- */

/* Sequences of any length, of which some have no row. */
static void random_lengths(world &w, rng &r) {
    for (ki_cuda_seq &s : w.state) {
        s.n_tokens = r.u64() % 4 ? (uint32_t)(r.u64() % w.o.max_tokens) : (uint32_t)(r.u64() % 3);
        s.n_rows = r.u64() % 5 != 0;
    }
    w.put_state();
}

static void run_begin(world_options o, uint32_t n_plans, uint32_t n_rows) {
    enum { UPLOAD = 1 << 18, RESULT = 1 << 14, CLEAR = 1 << 12 };
    rng r = case_rng();
    world worlds[KI_BEGIN_PLANS];
    token_rows rows;
    pinned_bytes from(UPLOAD);
    device_array<uint8_t> to, result;
    ki_cuda_attend_call calls[KI_BEGIN_PLANS];
    std::vector<uint8_t> plans[KI_BEGIN_PLANS];
    ki_cuda_begin_call c = {};
    for (uint32_t i = 0; i < n_plans; i++) {
        o.window = i ? 300 : 0;
        worlds[i].make(o, 1, r);
        random_lengths(worlds[i], r);
        calls[i] = worlds[i].attend_call(0, o.n_seqs, 1);
        CHECK_OK(ki_cuda_decode_plan(&calls[i], NULL, err));
        plans[i] = worlds[i].workspace.get(0, worlds[i].workspace.n);
        MUST(cudaMemset(worlds[i].workspace.data, 0, worlds[i].workspace.n));
        c.plans[i] = &calls[i];
    }
    rows.make(n_rows, 260, 1.7f, KI_CUDA_F16, r);
    for (size_t i = 0; i < UPLOAD; i++) from.data[i] = (uint8_t)r.u64();
    to.make(UPLOAD), result.make(RESULT);
    MUST(cudaMemset(to.data, STEP_UNTOUCHED, UPLOAD));
    MUST(cudaMemset(result.data, STEP_UNTOUCHED, RESULT));
    std::vector<uint8_t> want(UPLOAD, STEP_UNTOUCHED);
    c.from = from.data, c.to = to.data, c.result = result.data, c.clear_bytes = CLEAR;
    c.n_plans = n_plans, c.embed = rows.c;
    for (size_t at = 0; c.n_pieces < KI_BEGIN_PIECES; c.n_pieces++) {
        size_t n = r.u64() % (UPLOAD / KI_BEGIN_PIECES - 512);
        size_t whole = (n + 15) / 16 * 16; /* it is copied in units of 16 bytes */
        c.pieces[c.n_pieces] = {at, n};
        memcpy(&want[at], from.data + at, whole);
        at += (whole + 255) / 256 * 256 + 256;
    }
    CHECK_OK(ki_cuda_begin_step(&c, NULL, err));
    MUST(cudaDeviceSynchronize());
    CHECK(to.get(0, UPLOAD) == want, "other bytes of the upload");
    std::vector<uint8_t> left(RESULT, STEP_UNTOUCHED);
    memset(left.data(), 0, CLEAR);
    CHECK(result.get(0, RESULT) == left, "other bytes of the results");
    rows.check();
    for (uint32_t i = 0; i < n_plans; i++)
        CHECK(worlds[i].workspace.get(0, worlds[i].workspace.n) == plans[i], "plan %u", i);
    end_case();
}

/* ---- the last kernel ---- */

enum logit_kind { LOGITS_ANY, LOGITS_TIES, LOGITS_HOLES, LOGITS_NONE, N_LOGIT_KINDS };

static float random_logit(logit_kind kind, rng &r) {
    if (kind == LOGITS_NONE) return r.u64() % 2 ? -INFINITY : NAN;
    if (kind == LOGITS_HOLES && r.u64() % 2) return r.u64() % 2 ? -INFINITY : NAN;
    float x = r.normal() * 3;
    return kind == LOGITS_TIES ? (float)(int)x : x;
}

static int32_t best_here(const float *logits, uint32_t n) {
    int32_t best = -1;
    for (uint32_t i = 0; i < n; i++)
        if (logits[i] > (best < 0 ? -INFINITY : logits[best])) best = (int32_t)i;
    return best;
}

/* What the last kernel is given, and what it has to leave in the results. */
struct step_end {
    enum { ROWS = 48 }; /* of x */
    ki_cuda_end_call c = {};
    std::vector<uint8_t> want;
    device_array<float> logits, x;
    device_array<uint32_t> rows, number;
    device_array<uint8_t> result;

    void put_at(size_t at, const void *from, size_t n) { memcpy(&want[at], from, n); }

    void make(uint32_t n_logits, uint32_t n_vocab, uint32_t n_embd, rng &r) {
        c.n_logits = n_logits, c.n_vocab = n_vocab, c.n_embd = n_embd, c.n_rows = ROWS;
        c.stride = n_vocab + r.u64() % 9;
        c.at = {0, 256, 512, 1024, 1280, 1536, 1792, 1792, 2048};
        std::vector<float> l(n_logits * c.stride), rows_x((size_t)ROWS * n_embd);
        std::vector<uint32_t> of(n_logits), finite(n_logits);
        std::vector<int32_t> best(n_logits);
        std::vector<bool> bad(ROWS);
        for (float &v : rows_x) v = r.normal();
        for (uint32_t i = 0; i < ROWS; i++) {
            float odd = i % 3 == 1 ? INFINITY : i % 3 == 2 ? -NAN : 0x1.fffffep127f;
            if (r.u64() % 2) rows_x[(size_t)i * n_embd + r.u64() % n_embd] = odd, bad[i] = i % 3;
        }
        for (uint32_t i = 0; i < n_logits; i++) {
            float *row = &l[i * c.stride];
            logit_kind kind = (logit_kind)(r.u64() % N_LOGIT_KINDS);
            for (uint32_t k = 0; k < n_vocab; k++) row[k] = random_logit(kind, r);
            for (size_t k = n_vocab; k < c.stride; k++) row[k] = 1000; /* not to be looked at */
            of[i] = (uint32_t)(r.u64() % ROWS);
            finite[i] = !bad[of[i]], best[i] = best_here(row, n_vocab);
        }
        logits.make(l.size()), logits.put(l.data(), l.size());
        x.make(rows_x.size()), x.put(rows_x.data(), rows_x.size());
        rows.make(n_logits), rows.put(of.data(), n_logits);
        c.logits = logits.data, c.x = x.data, c.rows = rows.data;
        want.resize(c.at.n_bytes);
        for (uint8_t &b : want) b = (uint8_t)r.u64();
        memset(&want[c.at.n_done], 0, 4);
        result.make(want.size()), result.put(want.data(), want.size());
        c.result = result.data;
        put_at(c.at.finite, finite.data(), n_logits * 4);
        put_at(c.at.best, best.data(), n_logits * 4);
    }
};

static void run_end(uint32_t n_logits, uint32_t n_vocab, uint32_t n_embd, bool told) {
    rng r = case_rng();
    step_end s;
    s.make(n_logits, n_vocab, n_embd, r);
    const ki_cuda_result &at = s.c.at;
    pinned_bytes host(at.all_bytes);
    std::vector<uint8_t> here(at.all_bytes, STEP_UNTOUCHED);
    memset(host.data, STEP_UNTOUCHED, at.all_bytes);
    uint32_t number = 0x12345678;
    if (told) {
        s.number.make(1), s.number.put(&number, 1);
        s.c.host = host.data, s.c.number = s.number.data;
        s.put_at(at.n_done, &n_logits, 4);
        memcpy(&here[at.counters], &s.want[at.counters], sizeof(ki_cuda_counters));
        memcpy(&here[at.row_flags], &s.want[at.row_flags], s.c.n_rows * 4);
        memcpy(&here[at.finite], &s.want[at.finite], n_logits * 4);
        memcpy(&here[at.best], &s.want[at.best], n_logits * 4);
        memcpy(&here[at.number], &number, 4);
    }
    CHECK_OK(ki_cuda_end_step(&s.c, NULL, err));
    MUST(cudaDeviceSynchronize());
    CHECK(s.result.get(0, s.want.size()) == s.want, "other results");
    CHECK(!memcmp(host.data, here.data(), here.size()), "other bytes in the host's memory");
    end_case();
}

static void check_step_ends(void) {
    static const struct {
        ki_cuda_type type;
        const char *name;
    } types[] = {{KI_CUDA_F32, "f32"}, {KI_CUDA_F16, "f16"}, {KI_CUDA_BF16, "bf16"}};
    for (const auto &t : types)
        for (uint32_t n : {4u, 260u, 4096u}) {
            if (!open_case(text("step/embed-%s-%u", t.name, n))) continue;
            rng r = case_rng();
            token_rows rows;
            rows.make(37, n, n == 4 ? 1.0f : 0.37f, t.type, r);
            CHECK_OK(ki_cuda_embed(&rows.c, NULL, err));
            MUST(cudaDeviceSynchronize());
            rows.check();
            end_case();
        }
    for (bool plus : {false, true})
        for (uint32_t n_plans : {1u, 2u}) {
            world_options o = base_options();
            o.n_seqs = STEP_SEQS, o.max_tokens = 700, o.split_tokens = 128, o.plus = plus;
            if (open_case(text("step/begin-%s-%u", plus ? "kivi2+" : "kivi2", n_plans)))
                run_begin(o, n_plans, n_plans == 1 ? 3 : STEP_SEQS);
        }
    for (bool told : {false, true})
        for (uint32_t n_vocab : {1u, 30u, 1001u, 32000u})
            if (open_case(text("step/end-%u%s", n_vocab, told ? "-told" : "")))
                run_end(n_vocab == 30 ? 1 : 40, n_vocab, n_vocab == 1 ? 4 : 1536, told);
}
