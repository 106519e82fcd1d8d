/* kv_bench.cu: the figures of `kivi bench attention`. */
#include "kv_bench.h"
#include "kv_append.h"
#include "kv_bench.cuh"
#include "kv_prompt.h"
#include "sdpa.h"

struct report {
    const kivi_bench_options *o;
    const char *device;
    kivi_error *err;
    uint32_t n_sms;
    double read_gbs;
};

static void tell(const report &r, kivi_bench_row row) {
    row.device = r.device;
    if (!row.kind) row.kind = "";
    if (row.bytes > 0 && row.us > 0) row.read_share = row.bytes / row.us * 1e-3 / r.read_gbs;
    r.o->row(r.o->user, &row);
}

static bool wants(const report &r, kivi_bench_what what) { return r.o->measures >> what & 1; }

/* ---- streams ---- */

/* Reads n 16-byte words, several in flight; writes only what random data never sums to. A thread
 * block takes chunks of DEPTH times its threads. */
template <int DEPTH>
static __global__ void __launch_bounds__(1024)
    ki_read_kernel(const uint4 *from, uint64_t n, uint32_t *to) {
    uint32_t sum = 0;
    uint64_t chunk = (uint64_t)DEPTH * blockDim.x;
    for (uint64_t at = blockIdx.x * chunk; at + chunk <= n; at += gridDim.x * chunk) {
        uint4 x[DEPTH];
#pragma unroll
        for (int k = 0; k < DEPTH; k++) x[k] = __ldcs(from + at + k * blockDim.x + threadIdx.x);
#pragma unroll
        for (int k = 0; k < DEPTH; k++) sum ^= x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
    }
    if (sum == 0x9e3779b9u) *to = sum;
}

/* The fastest of several grids; bytes is a multiple of every chunk. */
static kivi_status measure_reads(report &r, const uint8_t *data, uint64_t bytes, uint32_t *sink) {
    static const uint32_t threads[] = {256, 512, 1024}, waves[] = {1, 2, 4, 16};
    for (uint32_t t : threads)
        for (uint32_t w : waves) {
            double us;
            KI_TRY(time_launches(
                &us, 4, 11,
                [&](uint32_t i, cudaStream_t s) {
                    const uint4 *from = (const uint4 *)(data + i % 2 * bytes);
                    ki_read_kernel<8><<<r.n_sms * w *(1024 / t), t, 0, s>>>(from, bytes / 16, sink);
                    return ki_cuda_check(cudaGetLastError(), "read", r.err);
                },
                r.err));
            r.read_gbs = std::max(r.read_gbs, (double)bytes / us * 1e-3);
        }
    return KIVI_OK;
}

static kivi_status measure_streams(report &r) {
    const uint64_t bytes = 1ull << 30;
    bench_batch memory; /* lends its list of blocks */
    uint8_t *data;
    uint32_t *sink;
    kivi_bench_row row = {};
    KI_TRY(memory.take(&data, 2 * bytes, r.err));
    KI_TRY(memory.take(&sink, 1, r.err));
    ki_bench_halves_kernel<<<2048, 256>>>((uint32_t *)data, 2 * bytes / 4, 3);
    KI_TRY(measure_reads(r, data, bytes, sink));
    row.what = KIVI_BENCH_READ;
    row.bytes = (double)bytes;
    row.us = row.bytes / r.read_gbs * 1e-3;
    tell(r, row);
    KI_TRY(time_launches(
        &row.us, 8, 11,
        [&](uint32_t, cudaStream_t s) {
            return ki_cuda_check(
                cudaMemcpyAsync(data, data + bytes, bytes, cudaMemcpyDeviceToDevice, s), "copy",
                r.err);
        },
        r.err));
    row.what = KIVI_BENCH_COPY;
    row.bytes = 2.0 * (double)bytes; /* read and written */
    tell(r, row);
    return KIVI_OK;
}

/* ---- attention ---- */

static bench_kind kind_of(const kivi_bench_kind &kind, bool pages_only) {
    const kivi_kv_options &kv = kind.kv; /* whole: the engine has filled in what was 0 */
    return {kind.name,    kv.k_bits,  kv.v_bits, kv.residual_tokens,
            kv.plus != 0, pages_only, kv.group};
}

static bool is_quantized(const bench_kind &k) { return k.k_bits < 16 || k.v_bits < 16; }

static kivi_bench_row row_of(kivi_bench_what what, const bench_shape &s, const bench_kind &k) {
    kivi_bench_row row = {};
    row.what = what;
    row.kind = k.name;
    row.shape = {s.batch, s.n_heads, s.n_kv_heads, s.tokens};
    row.window_tokens = k.pages_only || !is_quantized(k) ? 0 : k.residual;
    return row;
}

static kivi_status attention(report &r, kivi_bench_what what, const bench_shape &s,
                             const bench_kind &kind) {
    bench_batch b;
    kivi_bench_row row = row_of(what, s, kind);
    KI_TRY(b.ki_make(s, kind, 1ull << 30, 256, r.err));
    uint32_t n = what == KIVI_BENCH_CONSTANT ? 0 : s.batch;
    uint32_t split = ki_cuda_split_tokens(&b.l, n, s.tokens, r.n_sms);
    KI_TRY(b.ki_plan(split, 0, !r.o->plain, r.err));
    for (ki_cuda_attend_call &c : b.calls) c.is_fixed = what == KIVI_BENCH_CONSTANT;
    double bytes = b.packed_bytes();
    KI_TRY(time_launches(
        &row.us, bench_launches(b, bytes * 1e-6 / 2.0), r.o->n_repeats,
        [&](uint32_t i, cudaStream_t stream) {
            return ki_cuda_decode_attend(&b.calls[i % b.n_sets], stream, r.err);
        },
        r.err));
    if (kind.pages_only) row.bytes = bytes; /* with a window pages are not all that is read */
    tell(r, row);
    return KIVI_OK;
}

static kivi_status decode_shape_of(report &r, const bench_shape &s) {
    for (size_t i = 0; i < r.o->n_kinds; i++) {
        const bench_kind pages = kind_of(r.o->kinds[i], true);
        bench_kind window = kind_of(r.o->kinds[i], false);
        if (wants(r, KIVI_BENCH_DECODE)) KI_TRY(attention(r, KIVI_BENCH_DECODE, s, pages));
        if (wants(r, KIVI_BENCH_CONSTANT)) KI_TRY(attention(r, KIVI_BENCH_CONSTANT, s, pages));
        if (!wants(r, KIVI_BENCH_WINDOW) || !is_quantized(pages)) continue;
        KI_TRY(attention(r, KIVI_BENCH_WINDOW, s, window));
        if (window.is_plus || window.residual == 32 || window.group > 32) continue;
        window.residual = 32;
        KI_TRY(attention(r, KIVI_BENCH_WINDOW, s, window));
    }
    return KIVI_OK;
}

static kivi_status lengths_of(report &r, bench_shape s) {
    bench_kind kind = kind_of(r.o->kinds[0], false);
    kind.pages_only = !is_quantized(kind); /* a window where there is one */
    for (s.tokens = 128; s.tokens <= 131072; s.tokens *= 2)
        KI_TRY(attention(r, KIVI_BENCH_LENGTH, s, kind));
    return KIVI_OK;
}

/* ---- append ---- */

struct append_batch {
    bench_batch b;
    ki_cuda_counters *counters;
    uint16_t *rows; /* and the same number of float32 */
    float *wide_rows;
    float *rope;
    std::vector<ki_cuda_append_call> calls; /* a set each */
};

/* Steps of a model: the launches of all its layers, one after the other. */
enum { APPEND_LAYERS = 32, APPEND_SETS = 4, APPEND_LAUNCHES = APPEND_LAYERS * APPEND_SETS };

/* Where each sequence of a set stands. All distances from a page's end, as often each over the
 * sets; or all sequences at the row that closes a page. */
static kivi_status place_sequences(append_batch &a, uint32_t set, bool closing, kivi_error *err) {
    uint32_t n = a.b.shape.batch, bytes = n * (uint32_t)sizeof(ki_cuda_seq);
    std::vector<ki_cuda_seq> seqs(n);
    void *there = (void *)a.b.caches[set].seqs;
    KI_TRY(ki_cuda_check(cudaMemcpy(seqs.data(), there, bytes, cudaMemcpyDeviceToHost), "sequences",
                         err));
    for (uint32_t k = 0; k < n; k++)
        seqs[k].n_tokens =
            closing ? a.b.shape.tokens - 1 : a.b.shape.tokens - 1 - (set * 37 + k * 53) % 128;
    return ki_cuda_check(cudaMemcpy(there, seqs.data(), bytes, cudaMemcpyHostToDevice), "sequences",
                         err);
}

static kivi_status make_append(append_batch &a, const bench_shape &s, const bench_kind &kind,
                               bool closing, bool plain, kivi_error *err) {
    bench_batch &b = a.b;
    uint32_t q = s.n_heads * 128, kv = s.n_kv_heads * 128, width = q + 2 * kv;
    b.n_layers = APPEND_LAYERS;
    KI_TRY(b.ki_make(s, kind, 1ull << 40, APPEND_SETS, err));
    KI_TRY(b.take(&a.counters, 1, err));
    KI_TRY(b.take(&a.rows, (uint64_t)s.batch * width, err));
    KI_TRY(b.take(&a.wide_rows, (uint64_t)s.batch * width, err));
    KI_TRY(b.take(&a.rope, (uint64_t)s.batch * 128, err));
    KI_TRY(ki_cuda_check(cudaMemset(a.counters, 0, sizeof *a.counters), "counters", err));
    ki_bench_halves_kernel<<<256, 256>>>((uint32_t *)a.rows, (uint64_t)s.batch * width / 2, 9);
    /* two halves are a float32 below 2 */
    ki_bench_halves_kernel<<<256, 256>>>((uint32_t *)a.wide_rows, (uint64_t)s.batch * width, 9);
    ki_bench_halves_kernel<<<256, 256>>>((uint32_t *)a.rope, (uint64_t)s.batch * 128, 11);
    a.calls.resize(b.n_sets);
    for (uint32_t i = 0; i < b.n_sets; i++) {
        KI_TRY(place_sequences(a, i, closing, err));
        b.caches[i].counters = a.counters;
        ki_cuda_append_call &c = a.calls[i];
        c = {};
        c.cache = &b.caches[i];
        c.n_rows = s.batch, c.max_rows = 1;
        c.q = a.rows, c.k = a.rows + q, c.v = a.rows + q + kv;
        c.q_stride = c.k_stride = c.v_stride = width;
        c.type = KI_CUDA_F16, c.rope = a.rope, c.q_out = b.q, c.pdl = !plain;
    }
    return ki_cuda_check(cudaDeviceSynchronize(), "rows to append", err);
}

/* Of one set, with rows as an engine has them. */
static ki_cuda_append_call wide_call(const append_batch &a, uint32_t set) {
    ki_cuda_append_call c = a.calls[set];
    uint32_t q = a.b.shape.n_heads * 128, kv = a.b.shape.n_kv_heads * 128;
    c.q = a.wide_rows, c.k = a.wide_rows + q, c.v = a.wide_rows + q + kv;
    c.type = KI_CUDA_F32;
    return c;
}

static kivi_status append(report &r, kivi_bench_what what, bench_shape s, const bench_kind &kind) {
    append_batch a;
    s.tokens = 256; /* what is appended to lies within two pages */
    kivi_bench_row row = row_of(what, s, kind);
    KI_TRY(make_append(a, s, kind, what == KIVI_BENCH_CLOSE, r.o->plain, r.err));
    KI_TRY(time_launches(
        &row.us, APPEND_LAUNCHES, r.o->n_repeats,
        [&](uint32_t i, cudaStream_t stream) {
            ki_cuda_append_call c = a.calls[i / APPEND_LAYERS % a.b.n_sets];
            c.layer = i % APPEND_LAYERS;
            if (what == KIVI_BENCH_CLOSE) return ki_cuda_close_keys(&c, 1, stream, r.err);
            KI_TRY(ki_cuda_append_rows(&c, stream, r.err));
            if (i % APPEND_LAYERS < APPEND_LAYERS - 1) return KIVI_OK;
            c.layer = 0;
            return ki_cuda_code_values(&c, APPEND_LAYERS, stream, r.err);
        },
        r.err));
    tell(r, row);
    return KIVI_OK;
}

/* Decode attention of all layers that takes the rows itself, less the same with rows that are there
 * already; and the codes of values. */
static kivi_status within(report &r, bench_shape s, const bench_kind &kind) {
    append_batch a;
    s.tokens = 256;
    kivi_bench_row row = row_of(KIVI_BENCH_WITHIN, s, kind);
    KI_TRY(make_append(a, s, kind, false, r.o->plain, r.err));
    KI_TRY(a.b.ki_plan(ki_cuda_split_tokens(&a.b.l, s.batch, s.tokens, r.n_sms), 0, !r.o->plain,
                       r.err));
    double us[2];
    for (int takes = 0; takes < 2; takes++)
        KI_TRY(time_launches(
            &us[takes], APPEND_LAUNCHES, r.o->n_repeats,
            [&](uint32_t i, cudaStream_t stream) {
                ki_cuda_append_call c = wide_call(a, i / APPEND_LAYERS % a.b.n_sets);
                ki_cuda_attend_call attend = a.b.calls[i / APPEND_LAYERS % a.b.n_sets];
                c.layer = attend.layer = i % APPEND_LAYERS;
                attend.append = takes ? &c : NULL;
                KI_TRY(ki_cuda_decode_attend(&attend, stream, r.err));
                if (!takes || i % APPEND_LAYERS < APPEND_LAYERS - 1) return KIVI_OK;
                c.layer = 0;
                return ki_cuda_code_values(&c, APPEND_LAYERS, stream, r.err);
            },
            r.err));
    row.us = us[1] - us[0];
    tell(r, row);
    return KIVI_OK;
}

static kivi_status appends_of(report &r, const bench_shape &s) {
    for (size_t i = 0; i < r.o->n_kinds; i++) {
        const bench_kind kind = kind_of(r.o->kinds[i], false);
        if (wants(r, KIVI_BENCH_APPEND)) KI_TRY(append(r, KIVI_BENCH_APPEND, s, kind));
        if (wants(r, KIVI_BENCH_WITHIN) && kind.k_bits < 16 && kind.v_bits < 16)
            KI_TRY(within(r, s, kind));
        if (wants(r, KIVI_BENCH_CLOSE) && is_quantized(kind))
            KI_TRY(append(r, KIVI_BENCH_CLOSE, s, kind));
    }
    return KIVI_OK;
}

/* ---- prompts ---- */

/* A prompt by cuDNN; lengths in device memory as an engine has them, or the length in the plan, as
 * torch has it. */
static kivi_status time_sdpa(double *us, bench_batch &b, const ki_cuda_attend_call &c,
                             const bench_shape &s, bool exact, uint32_t n_repeats, ki_mem *mem,
                             kivi_error *err) {
    const uint64_t room = 32 << 20;
    int device = 0, major = 0;
    int32_t record[KI_SDPA_RECORD_BYTES / 4], *there;
    uint8_t *workspace;
    ki_sdpa_options o = {};
    ki_sdpa *sdpa = NULL;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    o.mem = mem, o.n_heads = s.n_heads, o.n_kv_heads = s.n_kv_heads, o.head_dim = 128;
    o.n_windows = 1, o.min_rows = o.max_rows = c.n_rows, o.exact = exact;
    o.compute_major = (uint32_t)major, o.workspace_bytes = room;
    KI_TRY(b.take(&there, KI_SDPA_RECORD_BYTES / 4, err));
    KI_TRY(b.take(&workspace, room, err));
    ki_sdpa_record(record, c.n_rows, s.n_heads, s.n_kv_heads, 128);
    KI_TRY(ki_cuda_check(cudaMemcpy(there, record, sizeof record, cudaMemcpyHostToDevice), "record",
                         err));
    ki_sdpa_call call = {};
    call.q = c.q, call.k = c.k_rows, call.v = c.v_rows, call.out = (uint16_t *)c.out;
    call.record = there, call.workspace = workspace;
    call.n_rows = c.n_rows, call.scale = c.scale;
    KI_TRY(ki_sdpa_create(&sdpa, &o, err));
    kivi_status status = time_launches(
        us, c.n_rows > 8192 ? 2 : 8, n_repeats,
        [&](uint32_t, cudaStream_t stream) { return ki_sdpa_run(sdpa, &call, stream, err); }, err);
    ki_sdpa_destroy(&sdpa);
    return status;
}

/* A row only where cuDNN has a kernel; without it there is nothing to measure. */
static kivi_status sdpa_of(report &r, bench_batch &b, const ki_cuda_attend_call &c,
                           const bench_shape &s, kivi_bench_row row, bool exact) {
    ki_mem mem;
    ki_mem_init(&mem);
    row.kind = exact ? "cudnn-exact" : "cudnn";
    kivi_error error = {};
    kivi_status status = time_sdpa(&row.us, b, c, s, exact, r.o->n_repeats, &mem, &error);
    if (status == KIVI_OK) tell(r, row);
    if (status == KIVI_OK || status == KIVI_UNSUPPORTED || status == KIVI_DEVICE) return KIVI_OK;
    *r.err = error;
    return status;
}

/* A whole prompt under the rule `paper`: causal attention over its own rows. No page is read, so
 * any quantized kind does. */
static kivi_status prompt_of(report &r, bench_shape s) {
    uint32_t tokens = s.tokens;
    const uint64_t n_q = (uint64_t)tokens * s.n_heads * 128, n_kv = n_q / s.n_heads * s.n_kv_heads;
    bench_batch b;
    const bench_kind kind = {NULL, 2, 2, 128, false, true, 32};
    uint16_t *q, *k, *v, *out;
    kivi_bench_row row = row_of(KIVI_BENCH_PROMPT, s, kind);
    const uint64_t tail = KI_SDPA_TAIL_ROWS * 128; /* cuDNN reads behind the last row */
    s.tokens = 128;
    KI_TRY(b.ki_make(s, kind, 1, 2, r.err));
    KI_TRY(b.take(&q, n_q + tail * s.n_heads, r.err));
    KI_TRY(b.take(&out, n_q + tail * s.n_heads, r.err));
    KI_TRY(b.take(&k, n_kv + tail * s.n_kv_heads, r.err));
    KI_TRY(b.take(&v, n_kv + tail * s.n_kv_heads, r.err));
    ki_bench_halves_kernel<<<2048, 256>>>((uint32_t *)q, (n_q + tail * s.n_heads) / 2, 13);
    ki_bench_halves_kernel<<<2048, 256>>>((uint32_t *)k, (n_kv + tail * s.n_kv_heads) / 2, 14);
    ki_bench_halves_kernel<<<2048, 256>>>((uint32_t *)v, (n_kv + tail * s.n_kv_heads) / 2, 15);
    ki_cuda_seq seq = {};
    seq.n_rows = tokens, seq.flags = KI_CUDA_PROMPT;
    KI_TRY(ki_cuda_check(
        cudaMemcpy((void *)b.caches[0].seqs, &seq, sizeof seq, cudaMemcpyHostToDevice), "sequence",
        r.err));
    ki_cuda_attend_call c = {};
    c.cache = &b.caches[0];
    c.scale = 0.08838834764f;
    c.q = q, c.k_rows = k, c.v_rows = v, c.out = out;
    c.out_stride = s.n_heads * 128, c.out_type = KI_CUDA_F16;
    c.n_rows = c.max_rows = tokens;
    ki_prompt_part part = {}; /* nothing is old */
    part.n_seqs = 1, part.n_heads = s.n_kv_heads;
    KI_TRY(ki_cuda_check(cudaDeviceSynchronize(), "rows of a prompt", r.err));
    KI_TRY(time_launches(
        &row.us, tokens > 8192 ? 2 : 8, r.o->n_repeats,
        [&](uint32_t, cudaStream_t stream) {
            return ki_cuda_prompt_attend(&c, &part, 0, stream, r.err);
        },
        r.err));
    row.flops = 2.0 * tokens * tokens * 128 * s.n_heads; /* two products, half of them masked */
    tell(r, row);
    KI_TRY(sdpa_of(r, b, c, s, row, false));
    KI_TRY(sdpa_of(r, b, c, s, row, true));
    return KIVI_OK;
}

/* ---- all of it ---- */

typedef std::vector<bench_shape> shape_list;

/* The caller's shapes, or these; those that differ only in what does not count are one. */
static shape_list shapes_of(const report &r, const shape_list &usual, bool any_batch,
                            bool any_tokens) {
    shape_list out;
    for (size_t i = 0; i < r.o->n_shapes; i++) {
        const kivi_bench_shape &s = r.o->shapes[i];
        bench_shape x = {any_batch ? 1 : s.n_batch, s.n_heads, s.n_kv_heads,
                         any_tokens ? 0 : s.n_tokens};
        bool is_there = false;
        for (const bench_shape &y : out)
            is_there |= y.batch == x.batch && y.n_heads == x.n_heads &&
                        y.n_kv_heads == x.n_kv_heads && y.tokens == x.tokens;
        if (!is_there) out.push_back(x);
    }
    return r.o->n_shapes ? out : usual;
}

static kivi_status measure_all(report &r) {
    static const shape_list decode = {{32, 32, 32, 4096},
                                      {8, 32, 32, 32768},
                                      {32, 32, 8, 8192},
                                      {8, 32, 8, 32768},
                                      {1, 32, 8, 131072}},
                            length = {{1, 32, 8, 0}, {8, 32, 8, 0}, {32, 32, 8, 0}},
                            rows = {{1, 32, 32, 0}, {32, 32, 32, 0}},
                            prompts = {{1, 32, 32, 4096}, {1, 32, 32, 32768}};
    KI_TRY(measure_streams(r));
    for (const bench_shape &s : shapes_of(r, decode, false, false)) KI_TRY(decode_shape_of(r, s));
    if (wants(r, KIVI_BENCH_APPEND) || wants(r, KIVI_BENCH_WITHIN) || wants(r, KIVI_BENCH_CLOSE))
        for (const bench_shape &s : shapes_of(r, rows, false, true)) KI_TRY(appends_of(r, s));
    if (wants(r, KIVI_BENCH_PROMPT))
        for (const bench_shape &s : shapes_of(r, prompts, true, false)) KI_TRY(prompt_of(r, s));
    if (wants(r, KIVI_BENCH_LENGTH))
        for (const bench_shape &s : shapes_of(r, length, false, true)) KI_TRY(lengths_of(r, s));
    return KIVI_OK;
}

kivi_status ki_cuda_bench_attention(const kivi_bench_options *options, const char *device,
                                    kivi_error *err) {
    report r = {options, device, err, 0, 0};
    uint32_t shared_bytes;
    KI_TRY(ki_cuda_kernels_init(&shared_bytes, err));
    r.n_sms = ki_n_sms();
    return measure_all(r);
}
