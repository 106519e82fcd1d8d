/* Speeds; they decide nothing. --test=PREFIX chooses: plus/D64, attend/D64/kivi2/, matmul/q4_1. */
#include "world.h"

#include <stdarg.h>

/* Times a call: repeats until half a second is over and gives the fastest of five such rounds'
 * means, in ns. */
typedef void (*bench_fn)(void *context);
static double time_ns(bench_fn fn, void *context) {
    double best = 1e30;
    fn(context);
    for (int round = 0; round < 5; round++) {
        uint32_t n = 0;
        double start = check_seconds(), end;
        do {
            fn(context);
            n++;
            end = check_seconds();
        } while (end - start < 0.1);
        double ns = (end - start) * 1e9 / n;
        best = ns < best ? ns : best;
    }
    return best;
}

/* Whether --test asks for it. */
static bool wanted(const char *format, ...) {
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return !strncmp(name, check_opt.prefix, strlen(check_opt.prefix));
}

typedef struct attend_bench {
    kivi_cache *cache;
    ki_attend_item item;
    uint32_t n_layers;
} attend_bench;

static void run_attend(void *context) {
    attend_bench *b = context;
    for (uint32_t layer = 0; layer < b->n_layers; layer++)
        ki_attend_batch(b->cache, &b->item, 1, layer, 0);
}

/* All layers of a model in turn, as in a step: what they read does not stay in a cache. */
static void bench_attend(ki_isa isa, uint32_t d, uint32_t heads, uint32_t kv_heads,
                         uint32_t n_layers, const char *kind) {
    enum { N = 8192 };
    if (!wanted("attend/D%u/%s/", d, kind)) return;
    world w = world_small();
    w.isa = isa;
    w.geometry = (kivi_cache_geometry){.n_layers = n_layers,
                                       .n_heads = heads,
                                       .n_kv_heads = kv_heads,
                                       .head_dim = d,
                                       .n_pages = N / 128 + 1,
                                       .max_step_rows = 512,
                                       .n_threads = 1};
    w.geometry.kv = (kivi_kv_options){.rule = KIVI_RULE_STREAM};
    if (kivi_kv_by_name(&w.geometry.kv, kind, NULL)) return;
    static uint32_t tokens[N + 1];
    attend_bench b = {.n_layers = n_layers};
    kivi_seq *seq = NULL;
    if (world_create(&b.cache, &w, NULL) || kivi_seq_create(&seq, b.cache, NULL)) return;
    for (uint32_t i = 0; i < N; i++) tokens[i] = i;
    for (int i = 0; i < N / 512; i++)
        if (world_step(seq, tokens, 512, NULL, NULL)) return;
    size_t row = (size_t)heads * d;
    float *k = check_alloc(2 * row * 4), *q = check_alloc(row * 4), *out = check_alloc(row * 4);
    world_rows(k, k + row, q, &b.cache->layout, tokens, 0, N, 1);
    if (kivi_seq_begin(seq, 1, NULL)) return;
    for (uint32_t layer = 0; layer < n_layers; layer++)
        if (kivi_seq_append(seq, layer, k, k + row, KIVI_F32, NULL)) return;
    b.item = (ki_attend_item){
        .seq = seq, .n_rows = 1, .q = q, .out = out, .q_stride = row, .out_stride = row};
    double ns = time_ns(run_attend, &b) / n_layers;
    double bytes = (double)b.cache->pool.id_bytes * (N / 128) / n_layers;
    printf("attend  %-10s D %3u  H %2u/%u  %-6s  %d tokens  %9.0f ns  %6.2f GB/s of pages\n",
           ki_isa_names[isa], d, heads, kv_heads, kind, N, ns, bytes / ns);
    fflush(stdout);
    kivi_seq_abort(seq);
    kivi_seq_destroy(&seq);
    kivi_cache_destroy(&b.cache);
    free(k), free(q), free(out);
}

typedef struct matmul_bench {
    const ki_dense_kernels *kernels;
    ki_matrix matrix;
    ki_activations a;
    float *out;
    size_t n_rows;
} matmul_bench;

static void run_matmul(void *context) {
    matmul_bench *b = context;
    for (size_t i = 0; i < b->n_rows; i++) b->kernels->quantize_row(&b->a, i);
    b->kernels->matmul(b->out, b->matrix.n_rows, &b->matrix, 0, b->matrix.n_rows / 16, &b->a,
                       b->n_rows);
}

static void bench_matmul(ki_isa isa, ki_weight type, const char *name, size_t n_rows) {
    if (!wanted("matmul/%s", name)) return;
    matmul_bench b = {.kernels = &ki_kernels_get(isa)->dense, .n_rows = n_rows};
    uint32_t n_cols = type < KI_WEIGHT_Q2_K ? 576 : 768; /* K-quants: a multiple of 256 */
    b.matrix = (ki_matrix){.type = type, .n_rows = 1536, .n_cols = n_cols};
    size_t n_bytes;
    if (!ki_matrix_bytes(&n_bytes, type, 1536, n_cols)) return;
    b.matrix.tiles = check_alloc(n_bytes);
    for (size_t i = 0; i < n_bytes; i++)
        b.matrix.tiles[i] = (uint8_t)(i * 7 % 59); /* small float16 numbers */
    float *x = check_alloc(n_rows * n_cols * 4);
    for (size_t i = 0; i < n_rows * n_cols; i++) x[i] = (float)(i % 17) - 8;
    b.a = (ki_activations){.n_cols = n_cols,
                           .x = x,
                           .high = check_alloc(n_rows * n_cols),
                           .low = check_alloc(n_rows * n_cols),
                           .scales = check_alloc(n_rows * n_cols / 32 * 4),
                           .sums = check_alloc(n_rows * n_cols / KI_SUM_COLS * 4),
                           .offsets = check_alloc(n_rows * n_cols / 32 * 4),
                           .pairs = check_alloc(n_rows * n_cols * 2)};
    b.out = check_alloc(n_rows * 1536 * 4);
    double ns = time_ns(run_matmul, &b);
    printf("matmul  %-10s %s 1536x%u by %3zu rows  %9.0f ns  %6.2f GB/s of weights  %6.1f GMAC/s\n",
           ki_isa_names[isa], name, n_cols, n_rows, ns, (double)n_bytes / ns,
           1536.0 * n_cols * (double)n_rows / ns);
    fflush(stdout);
    free(b.matrix.tiles), free(x), free(b.a.high), free(b.a.low), free(b.a.scales), free(b.a.sums),
        free(b.a.offsets), free(b.a.pairs), free(b.out);
}

typedef struct plus_bench {
    const ki_plus_kernels *kernels;
    const uint16_t *blocks[8];
    ki_plus_keys keys;
    unsigned head_dim;
    uint8_t codes[256];
    uint16_t scale[16];
    float row[256];
} plus_bench;

static void run_close(void *context) {
    plus_bench *b = context;
    b->kernels->close_keys(&b->keys, b->blocks, 0, b->head_dim, KI_PLUS_KEY_STEPS);
}
static void run_values(void *context) {
    plus_bench *b = context;
    b->kernels->quantize_values(b->codes, b->scale, b->blocks[0], b->head_dim, 2,
                                KI_PLUS_VALUE_STEPS);
}
static void run_turn(void *context) {
    plus_bench *b = context;
    b->kernels->turn(b->row, b->head_dim);
}

/* What kivi2+ costs beside attention, for one KV head: a page of keys, a row of values. */
static void bench_plus(ki_isa isa, unsigned d) {
    if (!wanted("plus/D%u", d)) return;
    plus_bench b = {.kernels = &ki_kernels_get(isa)->plus, .head_dim = d};
    uint16_t *x = check_alloc((size_t)128 * d * 2);
    rng r = rng_make(1);
    for (size_t i = 0; i < (size_t)128 * d; i++) x[i] = ki_f32_to_f16(rng_normal(&r));
    for (unsigned i = 0; i < 8; i++) b.blocks[i] = x + (size_t)i * d * 16;
    uint32_t *planes = check_alloc((size_t)128 * d * 2);
    b.keys = (ki_plus_keys){.bits = 2,
                            .low = planes,
                            .wide = planes + 8 * d,
                            .list = check_alloc(d),
                            .scale = check_alloc(d * 2),
                            .zero = check_alloc(d * 2)};
    double wide = time_ns(run_close, &b), values = time_ns(run_values, &b);
    double turn = time_ns(run_turn, &b);
    ki_plus_keys keys = b.keys;
    b.keys.list = NULL;
    b.keys.wide = NULL;
    b.keys.bits = 4;
    double four = time_ns(run_close, &b);
    printf("plus    %-10s D %3u  page of keys %6.0f ns, of 4 bits %6.0f ns  values %5.0f ns a row, "
           "turned %4.0f ns\n",
           ki_isa_names[isa], d, wide, four, values, turn);
    free(x), free(planes), free(keys.list), free(keys.scale), free(keys.zero);
}

void check_bench(void) {
    for (int i = 0; i < KI_ISA_COUNT; i++) {
        ki_isa isa = (ki_isa)i;
        if (!ki_isa_available(isa) ||
            (check_opt.isa && strcmp(check_opt.isa, ki_isa_names[i]) != 0))
            continue;
        bench_plus(isa, 64);
        bench_plus(isa, 128);
        static const char *const kinds[] = {"kivi2", "kivi2+", "k4v2", "k4v2+",
                                            "k4v3+", "kivi4",  "f16"};
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
            bench_attend(isa, 64, 9, 3, 30, kinds[k]);
            bench_attend(isa, 128, 32, 8, 4, kinds[k]);
        }
        bench_matmul(isa, KI_WEIGHT_Q4_1, "q4_1", 1);
        bench_matmul(isa, KI_WEIGHT_Q4_1, "q4_1", 16);
        bench_matmul(isa, KI_WEIGHT_Q4_1, "q4_1", 256);
        bench_matmul(isa, KI_WEIGHT_F16, "f16", 1);
        bench_matmul(isa, KI_WEIGHT_Q4_K, "q4_k", 1);
        bench_matmul(isa, KI_WEIGHT_Q4_K, "q4_k", 16);
        bench_matmul(isa, KI_WEIGHT_Q6_K, "q6_k", 1);
        bench_matmul(isa, KI_WEIGHT_Q6_K, "q6_k", 16);
    }
}
