/* kv_bench.cu: the report of `kivi bench attention --device cuda`. */
#include "kv_bench.h"
#include "kv_bench.cuh"
#include "sdpa.h"

#include <stdio.h>

struct report {
    const ki_cuda_bench_options *o;
    kivi_error *err;
    double read_gbs, copy_gbs;
};

static void say(const report &r, const char *format, ...) {
    char text[300];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    r.o->line(r.o->user, text);
}

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
static kivi_status measure_reads(double *gbs, const uint8_t *data, uint64_t bytes, uint32_t *sink,
                                 kivi_error *err) {
    static const uint32_t threads[] = {256, 512, 1024}, waves[] = {1, 2, 4, 16};
    int device, n_sms;
    KI_TRY(ki_cuda_check(cudaGetDevice(&device), "device", err));
    cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    *gbs = 0;
    for (uint32_t t : threads)
        for (uint32_t w : waves) {
            double us;
            KI_TRY(time_launches(
                &us, 4,
                [&](uint32_t i, cudaStream_t s) {
                    const uint4 *from = (const uint4 *)(data + i % 2 * bytes);
                    ki_read_kernel<8><<<n_sms * w *(1024 / t), t, 0, s>>>(from, bytes / 16, sink);
                    return ki_cuda_check(cudaGetLastError(), "read", err);
                },
                err));
            *gbs = std::max(*gbs, (double)bytes / us * 1e-3);
        }
    return KIVI_OK;
}

static kivi_status measure_streams(report &r) {
    const uint64_t bytes = 1ull << 30;
    bench_batch memory; /* lends its list of blocks */
    uint8_t *data;
    uint32_t *sink;
    double us;
    KI_TRY(memory.take(&data, 2 * bytes, r.err));
    KI_TRY(memory.take(&sink, 1, r.err));
    ki_bench_halves_kernel<<<2048, 256>>>((uint32_t *)data, 2 * bytes / 4, 3);
    KI_TRY(measure_reads(&r.read_gbs, data, bytes, sink, r.err));
    KI_TRY(time_launches(
        &us, 8,
        [&](uint32_t, cudaStream_t s) {
            return ki_cuda_check(
                cudaMemcpyAsync(data, data + bytes, bytes, cudaMemcpyDeviceToDevice, s), "copy",
                r.err);
        },
        r.err));
    r.copy_gbs = 2.0 * (double)bytes / us * 1e-3;
    say(r, "read-only stream %.0f GB/s, copy %.0f GB/s (read and written)", r.read_gbs, r.copy_gbs);
    return KIVI_OK;
}

/* ---- attention ---- */

static const bench_kind kivi2 = {"kivi2", 2, 2, 128, false, true};
static const bench_kind kivi2_window = {"kivi2 R=128", 2, 2, 128, false, false};
static const bench_kind kivi2_window32 = {"kivi2 R=32", 2, 2, 32, false, false};
static const bench_kind plus = {"kivi2+", 2, 2, 128, true, true};
static const bench_kind f16 = {"f16", 16, 16, 128, false, true};

static kivi_status time_kind(report &r, double *us, double *mb, const bench_shape &s,
                             const bench_kind &kind, bool invariant) {
    bench_batch b;
    int device = 0, n_sms = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    KI_TRY(b.ki_make(s, kind, 1ull << 30, 24, r.err));
    uint32_t split = ki_cuda_split_tokens(&b.l, invariant ? 0 : s.batch, s.tokens, (uint32_t)n_sms);
    KI_TRY(b.ki_plan(split, 0, r.o->pdl, r.err));
    *mb = b.packed_bytes() * 1e-6;
    return time_launches(
        us, bench_launches(b, *mb / 2.0),
        [&](uint32_t i, cudaStream_t stream) {
            return ki_cuda_decode_attend(&b.calls[i % b.n_sets], stream, r.err);
        },
        r.err);
}

static kivi_status one_line(report &r, const bench_shape &s, const bench_kind &kind,
                            bool invariant) {
    double us, mb;
    KI_TRY(time_kind(r, &us, &mb, s, kind, invariant));
    say(r, "%-12s B%-3u %2u/%-2u T%-6u %8.1f MB %8.1f us %6.0f GB/s %5.1f%% of the read stream%s",
        kind.name, s.batch, s.n_heads, s.n_kv_heads, s.tokens, mb, us, mb / us * 1e3,
        mb / us * 1e5 / r.read_gbs, invariant ? "  (constant splits)" : "");
    return KIVI_OK;
}

/* Appending one row to every sequence, lines at random places; all KV heads of one layer. */
static kivi_status append_line(report &r, const bench_shape &s, const bench_kind &kind) {
    bench_batch b;
    double us;
    ki_cuda_counters *counters;
    KI_TRY(b.ki_make(s, kind, 1ull << 40, 128, r.err)); /* a set for each distance from the line */
    KI_TRY(b.take(&counters, 1, r.err));
    cudaMemset(counters, 0, sizeof *counters);
    uint32_t width = (s.n_heads + 2 * s.n_kv_heads) * 128, most = s.n_kv_heads * 128;
    uint16_t *rows;
    float *rope;
    KI_TRY(b.take(&rows, (uint64_t)s.batch * width, r.err));
    KI_TRY(b.take(&rope, (uint64_t)s.batch * 128, r.err));
    ki_bench_halves_kernel<<<256, 256>>>((uint32_t *)rows, (uint64_t)s.batch * width / 2, 9);
    ki_bench_halves_kernel<<<256, 256>>>((uint32_t *)rope, (uint64_t)s.batch * 128, 11);
    std::vector<ki_cuda_append_call> calls(b.n_sets);
    for (uint32_t i = 0; i < b.n_sets; i++) {
        std::vector<ki_cuda_seq> seqs(s.batch);
        cudaMemcpy(seqs.data(), b.caches[i].seqs, s.batch * sizeof seqs[0], cudaMemcpyDeviceToHost);
        for (uint32_t k = 0; k < s.batch; k++)
            seqs[k].n_tokens = s.tokens - 1 - (i * 37 + k * 53) % 128;
        cudaMemcpy((void *)b.caches[i].seqs, seqs.data(), s.batch * sizeof seqs[0],
                   cudaMemcpyHostToDevice);
        b.caches[i].counters = counters;
        ki_cuda_append_call &c = calls[i];
        c = {};
        c.cache = &b.caches[i];
        c.n_rows = s.batch, c.max_rows = 1;
        c.q = rows, c.k = rows + s.n_heads * 128, c.v = rows + s.n_heads * 128 + most;
        c.q_stride = c.k_stride = c.v_stride = width;
        c.type = KI_CUDA_F16, c.rope = rope, c.q_out = b.q, c.pdl = r.o->pdl;
    }
    KI_TRY(time_launches(
        &us, 128,
        [&](uint32_t i, cudaStream_t stream) {
            return ki_cuda_append(&calls[i % b.n_sets], stream, r.err);
        },
        r.err));
    say(r, "append %-12s B%-3u %2u/%-2u %6.2f us a layer", kind.name, s.batch, s.n_heads,
        s.n_kv_heads, us);
    return KIVI_OK;
}

static kivi_status measure_shapes(report &r) {
    static const bench_shape shapes[] = {{32, 32, 32, 4096},
                                         {8, 32, 32, 32768},
                                         {32, 32, 8, 8192},
                                         {8, 32, 8, 32768},
                                         {1, 32, 8, 131072}};
    for (const bench_shape &s : shapes) {
        KI_TRY(one_line(r, s, kivi2, false));
        KI_TRY(one_line(r, s, kivi2, true));
        KI_TRY(one_line(r, s, kivi2_window, false));
        KI_TRY(one_line(r, s, kivi2_window32, false));
        KI_TRY(one_line(r, s, plus, false));
        if ((uint64_t)s.batch * s.n_kv_heads * s.tokens <= 1ull << 22)
            KI_TRY(one_line(r, s, f16, false));
        else if (!r.o->is_short) KI_TRY(one_line(r, s, f16, false));
    }
    for (uint32_t batch = 1; batch <= 32; batch *= 32) {
        const bench_shape s = {batch, 32, 32, 512};
        KI_TRY(append_line(r, s, kivi2_window));
        bench_kind kind = plus;
        kind.pages_only = false;
        KI_TRY(append_line(r, s, kind));
    }
    return KIVI_OK;
}

/* The same by cuDNN; lengths in device memory as an engine has them, or the length in the plan, as
 * torch has it. */
static kivi_status time_sdpa(double *us, bench_batch &b, const ki_cuda_attend_call &c,
                             const bench_shape &s, bool exact, ki_mem *mem, kivi_error *err) {
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
        us, c.n_rows > 8192 ? 2 : 8,
        [&](uint32_t, cudaStream_t stream) { return ki_sdpa_run(sdpa, &call, stream, err); }, err);
    ki_sdpa_destroy(&sdpa);
    return status;
}

static void sdpa_line(report &r, bench_batch &b, const ki_cuda_attend_call &c, const bench_shape &s,
                      double flops, bool exact) {
    double us = 0;
    ki_mem mem;
    kivi_error error = {};
    const char *how = exact ? "cuDNN, length in the plan" : "cuDNN, length in device memory";
    ki_mem_init(&mem);
    if (time_sdpa(&us, b, c, s, exact, &mem, &error) == KIVI_OK)
        say(r, "prompt B1 32/32 T%-6u %10.1f us  %4.0f TFLOP/s  (%s)", c.n_rows, us,
            flops / us * 1e-6, how);
    else say(r, "prompt B1 32/32 T%-6u not measured (%s): %s", c.n_rows, how, error.text);
}

/* A whole prompt under the rule `paper`: causal attention over its own rows. */
static kivi_status prompt_line(report &r, uint32_t tokens) {
    const bench_shape s = {1, 32, 32, 128};
    const uint64_t n = (uint64_t)tokens * s.n_heads * 128;
    bench_batch b;
    uint16_t *q, *k, *v, *out;
    double us;
    KI_TRY(b.ki_make(s, kivi2_window, 1, 2, r.err));
    for (uint16_t **p : {&q, &k, &v, &out}) { /* cuDNN reads behind the last row */
        KI_TRY(b.take(p, n + KI_SDPA_TAIL_ROWS * s.n_heads * 128, r.err));
        ki_bench_halves_kernel<<<2048, 256>>>((uint32_t *)*p, n / 2, (uint64_t)(p == &q) + 13);
    }
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
    KI_TRY(time_launches(
        &us, tokens > 8192 ? 2 : 8,
        [&](uint32_t, cudaStream_t stream) { return ki_cuda_prompt_attend(&c, stream, r.err); },
        r.err));
    double flops = 2.0 * tokens * tokens * 128 * s.n_heads; /* two products, half of them masked */
    say(r, "prompt B1 32/32 T%-6u %10.1f us  %4.0f TFLOP/s", tokens, us, flops / us * 1e-6);
    sdpa_line(r, b, c, s, flops, false);
    sdpa_line(r, b, c, s, flops, true);
    return KIVI_OK;
}

static kivi_status measure_lengths(report &r) {
    say(r, "time against length: us of kivi2 with R = 128, 32/8 heads");
    for (uint32_t tokens = 128; tokens <= 131072; tokens *= 2) {
        double us[3] = {}, mb;
        for (uint32_t i = 0; i < 3; i++) {
            const bench_shape s = {i == 0 ? 1u : i == 1 ? 8u : 32u, 32, 8, tokens};
            KI_TRY(time_kind(r, &us[i], &mb, s, kivi2_window, false));
        }
        say(r, "T %6u   B1 %8.1f   B8 %8.1f   B32 %8.1f", tokens, us[0], us[1], us[2]);
    }
    return KIVI_OK;
}

kivi_status ki_cuda_bench_attention(const ki_cuda_bench_options *options, kivi_error *err) {
    report r = {options, err};
    cudaDeviceProp p;
    int device = 0;
    KI_TRY(ki_cuda_kernels_init(err));
    KI_TRY(ki_cuda_check(cudaGetDevice(&device), "device", err));
    KI_TRY(ki_cuda_check(cudaGetDeviceProperties(&p, device), "device", err));
    say(r, "%s, %d multiprocessors, L2 %d MB, head size 128, G=32, %s", p.name,
        p.multiProcessorCount, p.l2CacheSize >> 20,
        options->pdl ? "programmatic dependent launch" : "plain launches");
    KI_TRY(measure_streams(r));
    KI_TRY(measure_shapes(r));
    KI_TRY(prompt_line(r, 4096));
    KI_TRY(prompt_line(r, 32768));
    return options->is_short ? KIVI_OK : measure_lengths(r);
}
