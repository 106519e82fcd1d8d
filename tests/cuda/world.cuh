/* world.cuh: a cache on the device with several sequences, fed step by step, for check-cuda. */
#ifndef KI_CUDA_WORLD_CUH
#define KI_CUDA_WORLD_CUH
#include "kv_append.h"
#include "kv_cuda.h"
#include "kv_launch.h"
#include "kv_plan.h"
#include "kv_prompt.h"
#include "plain.h"

#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

extern "C" {
#include "cache.h"
}

void check_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
bool check_failed(void);

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) check_fail(__FILE__, __LINE__, __VA_ARGS__);                             \
    } while (0)
#define CHECK_OK(call)                                                                             \
    do {                                                                                           \
        kivi_error check_error = {};                                                               \
        kivi_error *err = &check_error;                                                            \
        if ((call) != KIVI_OK) check_fail(__FILE__, __LINE__, "%s: %s", #call, check_error.text);  \
    } while (0)
/* An error of the runtime ends the program: after it nothing on the device can be trusted. */
#define MUST(call)                                                                                 \
    do {                                                                                           \
        cudaError_t must_error = (call);                                                           \
        if (must_error != cudaSuccess) {                                                           \
            printf("not ok %s:%d: %s: %s\n", __FILE__, __LINE__, #call,                            \
                   cudaGetErrorString(must_error));                                                \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct rng {
    uint64_t state;
    uint64_t u64() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    float normal() { /* sum of four uniforms of 16 bits, deviation 1 */
        uint64_t u = u64();
        uint32_t sum =
            (uint32_t)((u & 0xffff) + (u >> 16 & 0xffff) + (u >> 32 & 0xffff) + (u >> 48));
        return ((float)sum - 131070.0f) * (1.0f / 37837.0f);
    }
};

/* Device memory that is zeroed, and freed at the end of its scope. */
template <class T> struct device_array {
    T *data = NULL;
    size_t n = 0;
    void make(size_t count) {
        release();
        n = count;
        MUST(cudaMalloc((void **)&data, (count ? count : 1) * sizeof(T)));
        MUST(cudaMemset(data, 0, (count ? count : 1) * sizeof(T)));
    }
    void put(const T *from, size_t count) {
        MUST(cudaMemcpy(data, from, count * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get(size_t from, size_t count) const {
        std::vector<T> v(count);
        MUST(cudaMemcpy(v.data(), data + from, count * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
    void release() {
        if (data) cudaFree(data);
        data = NULL;
    }
    ~device_array() { release(); }
    device_array() = default;
    device_array(const device_array &) = delete;
};

struct world_options {
    uint32_t head_dim, n_heads, n_kv_heads, k_bits, v_bits, group, residual, sinks;
    kivi_rule rule;
    uint32_t span, window, n_seqs, max_tokens, split_tokens;
    bool plus, large_ring, pdl;
    bool plain; /* the kernels of plain.h */
    uint32_t n_layers;
    bool late;              /* codes of all layers are made at the end of a step (kv_append.h) */
    bool own;               /* attention takes the rows of a step of decoding itself */
    uint64_t scratch_bytes; /* at most, of prompts; 0: plenty */
    uint32_t shared_bytes;  /* of a thread block, as on another device; 0: what this one has */
    uint32_t n_sms;         /* as on another device; 0: this one's */
};

static inline kivi_cache_geometry geometry_of(const world_options &o) {
    kivi_cache_geometry g = kivi_cache_defaults();
    g.n_layers = o.n_layers, g.n_heads = o.n_heads, g.n_kv_heads = o.n_kv_heads;
    g.head_dim = o.head_dim;
    g.kv.k_bits = o.k_bits, g.kv.v_bits = o.v_bits, g.kv.group = o.group;
    if (o.plus) g.kv.plus = KIVI_PLUS_ALL, g.kv.group = KI_PAGE_TOKENS;
    g.kv.residual_tokens = o.residual, g.kv.sink_tokens = o.sinks;
    g.kv.rule = o.rule, g.kv.span_tokens = o.span;
    g.window_tokens = o.window;
    g.n_pages = (o.max_tokens / KI_PAGE_TOKENS + 2) * o.n_seqs;
    return g;
}

/* ---- rows ---- */

/* Keys with a few channels of large magnitude, as models have them. */
static inline void random_rows(std::vector<uint16_t> &k, std::vector<uint16_t> &v,
                               std::vector<uint16_t> &q, const world_options &o, uint32_t n_rows,
                               rng &r) {
    size_t d = o.head_dim;
    k.resize(n_rows * o.n_kv_heads * d), v.resize(k.size()), q.resize(n_rows * o.n_heads * d);
    for (size_t i = 0; i < k.size(); i++) {
        bool large = i % d % 31 == 7;
        k[i] = ki_f32_to_f16(r.normal() * (large ? 8.0f : 1.0f) + (large ? 5.0f : 0));
        v[i] = ki_f32_to_f16(r.normal());
    }
    for (size_t i = 0; i < q.size(); i++) q[i] = ki_f32_to_f16(r.normal());
}

struct world {
    world_options o;
    ki_cuda_layout l;
    uint32_t table_stride, n_pages, k_blocks, v_blocks, n_parts;
    device_array<uint8_t> pool, rings, sinks, workspace, scratch;
    device_array<uint32_t> tables, flags;
    device_array<ki_cuda_seq> seqs;
    device_array<ki_cuda_counters> counters;
    device_array<uint16_t> q_in, k_in, v_in, q_out, k_rows, v_rows;
    device_array<float> out;
    device_array<float> own_rows, rope; /* [rows][H + 2 Hk][D]; [rows][D/2][2], empty: none */
    std::vector<uint32_t> table;        /* host copy */
    std::vector<ki_cuda_seq> state;     /* host copy */
    uint64_t ring_bytes;
    ki_cuda_cache cache;
    uint32_t max_rows;

    void make(const world_options &options, uint32_t batch_rows, rng &r) {
        o = options;
        kivi_cache_geometry g = geometry_of(o);
        CHECK_OK((o.plain ? ki_cuda_layout_any : ki_cuda_layout_init)(&l, &g, o.plus, err));
        table_stride = o.max_tokens / KI_PAGE_TOKENS + 2;
        n_pages = table_stride * o.n_seqs;
        k_blocks = o.large_ring ? o.max_tokens / 32 + 2 : l.k_ring_blocks;
        v_blocks = o.large_ring ? o.max_tokens / 32 + 2 : l.v_ring_blocks;
        ring_bytes = ki_cuda_ring_bytes(&l, k_blocks, v_blocks);
        pool.make(n_pages * l.id_bytes);
        rings.make(ring_bytes * o.n_seqs + 16);
        sinks.make(l.sink_bytes * o.n_seqs + 16);
        seqs.make(o.n_seqs);
        counters.make(1);
        tables.make((size_t)table_stride * o.n_seqs);
        table.resize((size_t)table_stride * o.n_seqs);
        for (uint32_t i = 0; i < table.size(); i++) table[i] = i;
        for (size_t i = table.size() - 1; i > 0; i--) std::swap(table[i], table[r.u64() % (i + 1)]);
        tables.put(table.data(), table.size());
        size_t d = o.head_dim;
        max_rows = batch_rows;
        q_in.make(batch_rows * o.n_heads * d), q_out.make(batch_rows * o.n_heads * d);
        k_in.make(batch_rows * o.n_kv_heads * d), v_in.make(batch_rows * o.n_kv_heads * d);
        k_rows.make(batch_rows * o.n_kv_heads * d), v_rows.make(batch_rows * o.n_kv_heads * d);
        out.make(batch_rows * o.n_heads * d);
        if (o.own) own_rows.make(batch_rows * (o.n_heads + 2 * o.n_kv_heads) * d);
        flags.make(batch_rows);
        workspace.make(ki_cuda_workspace_bytes(&l, o.n_seqs, o.max_tokens + 1, o.split_tokens));
        scratch.make(ki_prompt_scratch_bytes(&l, o.max_tokens + KI_PAGE_TOKENS, o.n_seqs,
                                             o.scratch_bytes ? o.scratch_bytes : 256u << 20));
        state.assign(o.n_seqs, ki_cuda_seq{});
        for (uint32_t i = 0; i < o.n_seqs; i++) {
            state[i].ring = (uint64_t)(rings.data + i * ring_bytes);
            state[i].sinks = l.sink_blocks ? (uint64_t)(sinks.data + i * l.sink_bytes) : 0;
            state[i].k_blocks = k_blocks, state[i].v_blocks = v_blocks;
            state[i].table = i;
        }
        cache = {l,
                 pool.data,
                 tables.data,
                 table_stride,
                 seqs.data,
                 o.n_seqs,
                 counters.data,
                 o.shared_bytes ? o.shared_bytes : ki_most_shared_bytes(),
                 o.n_sms ? o.n_sms : ki_n_sms()};
    }
    ki_prompt_step prompt_step() const { return {&l, state.data(), o.n_seqs, o.window, scratch.n}; }
    void put_state() {
        ki_prompt_step step = prompt_step();
        ki_prompt_place(state.data(), &step);
        seqs.put(state.data(), state.size());
    }
    /* Rows of prompts, part by part. */
    void attend_prompt(ki_cuda_attend_call c) {
        ki_prompt_step step = prompt_step();
        ki_prompt_part part = {};
        c.workspace = scratch.data;
        for (n_parts = 0; ki_prompt_next(&part, &step); n_parts++)
            CHECK_OK(ki_cuda_prompt_attend(&c, &part, o.window, NULL, err));
    }
    ki_cuda_append_call append_call(uint32_t layer, uint32_t n_rows, uint32_t most) {
        ki_cuda_append_call c = {};
        uint32_t d = o.head_dim;
        c.cache = &cache, c.layer = layer, c.n_rows = n_rows, c.max_rows = most;
        c.q = q_in.data, c.k = k_in.data, c.v = v_in.data;
        c.q_stride = o.n_heads * d, c.k_stride = c.v_stride = o.n_kv_heads * d;
        c.type = KI_CUDA_F16;
        c.q_out = q_out.data, c.k_rows = k_rows.data, c.v_rows = v_rows.data;
        c.row_flags = flags.data, c.pdl = o.pdl;
        return c;
    }
    ki_cuda_attend_call attend_call(uint32_t layer, uint32_t n_rows, uint32_t most) {
        ki_cuda_attend_call c = {};
        c.cache = &cache, c.layer = layer, c.window = o.window;
        c.scale = 1 / sqrtf((float)o.head_dim);
        c.q = q_out.data, c.out = out.data, c.out_stride = o.n_heads * o.head_dim;
        c.out_type = KI_CUDA_F32, c.k_rows = k_rows.data, c.v_rows = v_rows.data;
        c.n_rows = n_rows, c.max_rows = most;
        c.split_tokens = o.split_tokens, c.max_tokens = o.max_tokens + 1;
        c.workspace = workspace.data, c.pdl = o.pdl;
        return c;
    }
    /* The same rows as float32: q, k, v of a row behind each other. */
    void widen(uint32_t n_rows) {
        size_t d = o.head_dim, q = o.n_heads * d, kv = o.n_kv_heads * d, width = q + 2 * kv;
        std::vector<uint16_t> from[3] = {q_in.get(0, n_rows * q), k_in.get(0, n_rows * kv),
                                         v_in.get(0, n_rows * kv)};
        std::vector<float> rows(n_rows * width);
        for (size_t row = 0; row < n_rows; row++)
            for (size_t c = 0; c < width; c++) {
                size_t part = c < q ? 0 : 1 + (c - q) / kv, n = part ? kv : q;
                size_t at = part ? (c - q) % kv : c;
                rows[row * width + c] = ki_f16_to_f32(from[part][row * n + at]);
            }
        own_rows.put(rows.data(), rows.size());
    }
    ki_cuda_append_call own_call(uint32_t layer, uint32_t n_rows) {
        ki_cuda_append_call c = append_call(layer, n_rows, 1);
        uint32_t q = o.n_heads * o.head_dim, kv = o.n_kv_heads * o.head_dim;
        c.q = own_rows.data, c.k = own_rows.data + q, c.v = own_rows.data + q + kv;
        c.q_stride = c.k_stride = c.v_stride = q + 2 * kv;
        c.type = KI_CUDA_F32, c.rope = rope.data;
        return c;
    }
    /* A step of all layers with the same rows in each: state says how many rows each slot has. */
    void decode(uint32_t n_rows) {
        put_state();
        poison(n_rows);
        if (o.own) {
            MUST(cudaMemset(q_out.data, 0xff, q_out.n * sizeof(uint16_t))); /* not read */
            widen(n_rows);
        }
        ki_cuda_attend_call c = attend_call(0, n_rows, 1);
        if (o.plain) return plain_step(n_rows, 1, false);
        CHECK_OK(ki_cuda_decode_plan(&c, NULL, err));
        for (uint32_t layer = 0; layer < o.n_layers; layer++) {
            ki_cuda_append_call a = append_call(layer, n_rows, 1);
            ki_cuda_append_call own = own_call(layer, n_rows);
            c.layer = layer;
            if (o.own) c.append = &own;
            else if (o.late) CHECK_OK(ki_cuda_append_rows(&a, NULL, err));
            else CHECK_OK(ki_cuda_append(&a, NULL, err));
            CHECK_OK(ki_cuda_decode_attend(&c, NULL, err));
        }
        ki_cuda_append_call first = append_call(0, n_rows, 1);
        if (o.late || o.own) CHECK_OK(ki_cuda_close(&first, o.n_layers, NULL, err));
        finish();
    }
    void plain_step(uint32_t n_rows, uint32_t most, bool prompt) {
        for (uint32_t layer = 0; layer < o.n_layers; layer++) {
            ki_cuda_append_call a = append_call(layer, n_rows, most);
            ki_cuda_attend_call c = attend_call(layer, n_rows, most);
            if (!prompt) a.k_rows = a.v_rows = NULL, c.k_rows = c.v_rows = NULL;
            CHECK_OK(ki_plain_append(&a, NULL, err));
            CHECK_OK(ki_plain_attend(&c, NULL, err));
            if (prompt) CHECK_OK(ki_plain_window(&a, NULL, err));
        }
        finish();
    }
    void prompt(uint32_t n_rows, uint32_t most, bool attend) {
        put_state();
        poison(n_rows);
        if (o.plain) return plain_step(n_rows, most, true);
        for (uint32_t layer = 0; layer < o.n_layers; layer++) {
            ki_cuda_append_call a = append_call(layer, n_rows, most);
            ki_cuda_attend_call c = attend_call(layer, n_rows, most);
            CHECK_OK(ki_cuda_prompt_append(&a, NULL, err));
            if (attend) attend_prompt(c);
            CHECK_OK(ki_cuda_prompt_window(&a, NULL, err));
        }
        finish();
    }
    void poison(uint32_t n_rows) {
        MUST(cudaMemset(out.data, 0xff, (size_t)n_rows * o.n_heads * o.head_dim * 4));
    }
    void finish() {
        MUST(cudaDeviceSynchronize());
        for (ki_cuda_seq &s : state) s.n_tokens += s.n_rows;
    }
    std::vector<uint8_t> page(uint32_t seq, uint32_t index, uint32_t layer, uint32_t head) {
        uint64_t id = table[(size_t)seq * table_stride + index];
        uint64_t at = id * l.id_bytes + ((uint64_t)layer * o.n_kv_heads + head) * l.page_bytes;
        return pool.get(at, l.page_bytes);
    }
};

/* ---- a page's elements, by kv_order.h alone ---- */

struct page_reader {
    const ki_cuda_layout *l;
    const uint8_t *page;
    uint32_t bits_at(uint32_t at, ki_order_place p, uint32_t bits) const {
        uint32_t word;
        memcpy(&word, page + at + p.word * 4, 4);
        return word >> p.bit & ((1u << bits) - 1);
    }
    uint32_t sub(uint32_t t) const { return l->head_bytes + t / 32 * l->sub_bytes; }
    float f16(uint32_t at) const {
        uint16_t h;
        memcpy(&h, page + at, 2);
        return ki_f16_to_f32(h);
    }
    int wide_number(uint32_t c) const {
        if (!l->is_plus || l->k_bits != 2) return -1;
        for (uint32_t w = 0; w < l->head_dim / 4; w++)
            if (page[l->list_at + w] == c) return (int)w;
        return -1;
    }
    uint32_t key_code(uint32_t t, uint32_t c) const {
        uint32_t steps = l->head_dim / 16;
        uint32_t code =
            bits_at(sub(t) + l->k_at, ki_order_key(t % 32, c, steps, l->k_bits), l->k_bits);
        int w = wide_number(c);
        if (w < 0) return code;
        uint32_t n = (l->head_dim / 4 + 15) / 16;
        return code | bits_at(sub(t) + l->wide_at, ki_order_key(t % 32, (uint32_t)w, n, 2), 2) << 2;
    }
    uint32_t value_code(uint32_t t, uint32_t c) const {
        uint32_t steps = l->head_dim / 16, low = l->v_bits == 3 ? 2 : l->v_bits;
        uint32_t code = bits_at(sub(t) + l->v_at, ki_order_value(t % 32, c, steps, low), low);
        if (l->v_bits != 3) return code;
        return code | bits_at(sub(t) + l->third_at, ki_order_value(t % 32, c, steps, 1), 1) << 2;
    }
    uint32_t key_scale_at(uint32_t t, uint32_t c) const {
        uint32_t base = l->head_bytes ? 0 : sub(t), g = (l->head_bytes ? t : t % 32) / l->k_group;
        return base + l->k_scale_at +
               (g * l->head_dim + ki_order_key_scale(c, l->head_dim / 16)) * 2;
    }
    uint32_t value_scale_at(uint32_t t, uint32_t c) const {
        return sub(t) + l->v_scale_at + (c / l->v_group * 32 + ki_order_value_scale(t % 32)) * 2;
    }
    double key(uint32_t t, uint32_t c) const {
        if (l->k_bits == 16) return ki_f16_to_f32((uint16_t)key_code16(t, c, true));
        uint32_t at = key_scale_at(t, c);
        return (double)key_code(t, c) * f16(at) + f16(at + l->k_zero_at - l->k_scale_at);
    }
    double value(uint32_t t, uint32_t c) const {
        if (l->v_bits == 16) return ki_f16_to_f32((uint16_t)key_code16(t, c, false));
        uint32_t at = value_scale_at(t, c);
        if (l->is_plus) return ((double)value_code(t, c) - (l->v_bits == 3 ? 3.5 : 1.5)) * f16(at);
        return (double)value_code(t, c) * f16(at) + f16(at + l->v_zero_at - l->v_scale_at);
    }
    uint32_t key_code16(uint32_t t, uint32_t c, bool keys) const {
        uint32_t steps = l->head_dim / 16;
        ki_order_place p =
            keys ? ki_order_key(t % 32, c, steps, 16) : ki_order_value(t % 32, c, steps, 16);
        return bits_at(sub(t) + (keys ? l->k_at : l->v_at), p, 16);
    }
};

#endif
