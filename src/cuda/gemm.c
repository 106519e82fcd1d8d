#include "gemm.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <stdio.h>

typedef struct plan {
    ki_gemm_shape shape;
    uint32_t rows;
    cublasLtMatrixLayout_t weight, x, out;
    cublasLtMatmulAlgo_t algo;
} plan;

enum { MAX_PLANS = 4096, STEP_ROWS = KI_GEMM_STEP_ROWS, N_CANDIDATES = 8, N_TIMES = 7 };

struct ki_gemm {
    ki_mem *mem;
    void *workspace;
    cudaDataType_t type;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t op;
    ki_gemm_timing timing; /* scratch NULL: none */
    ki_buf plans;          /* of plan */
};

static kivi_status check(cublasStatus_t code, const char *what, kivi_error *err) {
    if (code == CUBLAS_STATUS_SUCCESS) return KIVI_OK;
    if (code == CUBLAS_STATUS_ALLOC_FAILED)
        return KI_FAIL(err, NOMEM, "cuda: %s: out of device memory", what);
    return KI_FAIL(err, DEVICE, "cuda: %s: %s", what, cublasLtGetStatusString(code));
}

/* Powers of two as graphs have them, then steps of a tile's rows. */
uint32_t ki_gemm_rows(uint32_t m) {
    uint32_t rows = 1;
    if (m > STEP_ROWS) return (m + STEP_ROWS - 1) / STEP_ROWS * STEP_ROWS;
    while (rows < m) rows *= 2;
    return rows;
}

kivi_status ki_gemm_create(ki_gemm **out, ki_mem *mem, void *workspace, ki_gemm_type type,
                           const ki_gemm_timing *timing, kivi_error *err) {
    static const cudaDataType_t types[] = {CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF};
    void *p;
    *out = NULL;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(ki_gemm), err));
    ki_gemm *g = p;
    *g = (ki_gemm){.mem = mem, .workspace = workspace, .type = types[type]};
    if (timing) g->timing = *timing;
    ki_buf_init(&g->plans, mem, MAX_PLANS * sizeof(plan));
    cublasOperation_t turned = CUBLAS_OP_T;
    kivi_status status = check(cublasLtCreate(&g->handle), "cublasLtCreate", err);
    if (status == KIVI_OK)
        status = check(cublasLtMatmulDescCreate(&g->op, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                       "cublasLtMatmulDescCreate", err);
    if (status == KIVI_OK)
        status = check(cublasLtMatmulDescSetAttribute(g->op, CUBLASLT_MATMUL_DESC_TRANSA, &turned,
                                                      sizeof turned),
                       "cublasLtMatmulDescSetAttribute", err);
    if (status != KIVI_OK) ki_gemm_destroy(&g);
    *out = g;
    return status;
}

static plan *plan_at(const ki_gemm *g, size_t i) {
    return (plan *)(void *)g->plans.data + i;
}

static size_t n_plans(const ki_gemm *g) { return g->plans.n_bytes / sizeof(plan); }

void ki_gemm_destroy(ki_gemm **gemm) {
    ki_gemm *g = *gemm;
    if (!g) return;
    for (size_t i = 0; i < n_plans(g); i++) {
        plan *p = plan_at(g, i);
        cublasLtMatrixLayoutDestroy(p->weight);
        cublasLtMatrixLayoutDestroy(p->x);
        cublasLtMatrixLayoutDestroy(p->out);
    }
    ki_buf_deinit(&g->plans);
    if (g->op) cublasLtMatmulDescDestroy(g->op);
    if (g->handle) cublasLtDestroy(g->handle);
    ki_free(g->mem, g);
    *gemm = NULL;
}

static const plan *find(const ki_gemm *g, const ki_gemm_shape *s, uint32_t rows) {
    for (size_t i = 0; i < n_plans(g); i++) {
        const plan *p = plan_at(g, i);
        if (p->rows == rows && p->shape.n == s->n && p->shape.k == s->k &&
            p->shape.out_stride == s->out_stride)
            return p;
    }
    return NULL;
}

/* cuBLASLt counts columns first: our rows of out are its columns, and a weight's rows are turned.
 */
static kivi_status make_layouts(ki_gemm *g, plan *p, kivi_error *err) {
    const char *what = "cublasLtMatrixLayoutCreate";
    const ki_gemm_shape *s = &p->shape;
    KI_TRY(check(cublasLtMatrixLayoutCreate(&p->weight, g->type, s->k, s->n, s->k), what, err));
    KI_TRY(check(cublasLtMatrixLayoutCreate(&p->x, g->type, s->k, p->rows, s->k), what, err));
    return check(cublasLtMatrixLayoutCreate(&p->out, CUDA_R_32F, s->n, p->rows,
                                            (int64_t)s->out_stride),
                 what, err);
}

/* ---- the fastest of several kernels ---- */

typedef struct candidate_call { /* a product in scratch memory: [x][out][weights, several] */
    const ki_gemm *g;
    const plan *p;
    uint8_t *x, *out, *weights;
    size_t weight_bytes, n_copies;
    cudaEvent_t from, to;
} candidate_call;

static size_t align(size_t n) { return (n + 255) / 256 * 256; }

/* False: scratch memory is too small for this product. */
static bool place_call(candidate_call *c, const ki_gemm *g, const plan *p) {
    size_t element = g->type == CUDA_R_32F ? 4 : 2;
    size_t x = align((size_t)p->rows * p->shape.k * element);
    size_t out = align(p->rows * p->shape.out_stride * sizeof(float));
    c->g = g, c->p = p;
    c->weight_bytes = align((size_t)p->shape.n * p->shape.k * element);
    if (x + out + c->weight_bytes > g->timing.n_bytes) return false;
    c->x = g->timing.scratch, c->out = c->x + x, c->weights = c->out + out;
    c->n_copies = (g->timing.n_bytes - x - out) / c->weight_bytes;
    return true;
}

/* Least microseconds of one kernel; negative: it does not run. */
static float time_kernel(const candidate_call *c, const cublasLtMatmulAlgo_t *algo) {
    const ki_gemm *g = c->g;
    float one = 1, zero = 0, ms, least = -1;
    for (size_t i = 0; i <= N_TIMES; i++) {
        const uint8_t *weight = c->weights + i % c->n_copies * c->weight_bytes;
        cudaEventRecord(c->from, g->timing.stream);
        cublasStatus_t code = cublasLtMatmul(
            g->handle, g->op, &one, weight, c->p->weight, c->x, c->p->x, &zero, c->out, c->p->out,
            c->out, c->p->out, algo, g->workspace, KI_GEMM_WORKSPACE_BYTES, g->timing.stream);
        cudaEventRecord(c->to, g->timing.stream);
        if (code != CUBLAS_STATUS_SUCCESS || cudaEventSynchronize(c->to) != cudaSuccess ||
            cudaEventElapsedTime(&ms, c->from, c->to) != cudaSuccess)
            return -1;
        if (i && (least < 0 || ms * 1e3f < least)) least = ms * 1e3f; /* the first one loads it */
    }
    return least;
}

/* The number of the fastest; 0, cuBLASLt's own choice, where nothing can be measured. */
static int fastest(const ki_gemm *g, const plan *p, const cublasLtMatmulHeuristicResult_t *found,
                   int n_found) {
    candidate_call c = {0};
    float first = 0, least = -1;
    int best = 0;
    if (!g->timing.scratch || p->rows > KI_GEMM_TIMED_ROWS || !place_call(&c, g, p)) return 0;
    if (cudaEventCreate(&c.from) == cudaSuccess && cudaEventCreate(&c.to) == cudaSuccess)
        for (int i = 0; i < n_found; i++) {
            float us = time_kernel(&c, &found[i].algo);
            if (i == 0) first = us;
            if (us > 0 && (least < 0 || us < least)) least = us, best = i;
        }
    if (c.from) cudaEventDestroy(c.from);
    if (c.to) cudaEventDestroy(c.to);
    if (g->timing.log) {
        char line[160];
        snprintf(line, sizeof line,
                 "products of %u rows, %u by %u: kernel %d of %d, %.1f us, the first %.1f us",
                 p->rows, p->shape.n, p->shape.k, best + 1, n_found, (double)least, (double)first);
        g->timing.log(g->timing.log_user, line);
    }
    return best;
}

static kivi_status choose(ki_gemm *g, plan *p, kivi_error *err) {
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found[N_CANDIDATES];
    size_t n_bytes = KI_GEMM_WORKSPACE_BYTES;
    int n_found = 0, n_asked = g->timing.scratch ? N_CANDIDATES : 1;
    KI_TRY(check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate",
                 err));
    cublasStatus_t code = cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &n_bytes, sizeof n_bytes);
    if (code == CUBLAS_STATUS_SUCCESS)
        code = cublasLtMatmulAlgoGetHeuristic(g->handle, g->op, p->weight, p->x, p->out, p->out,
                                              preference, n_asked, found, &n_found);
    cublasLtMatmulPreferenceDestroy(preference);
    if (code == CUBLAS_STATUS_SUCCESS && n_found == 0) code = CUBLAS_STATUS_NOT_SUPPORTED;
    if (code == CUBLAS_STATUS_SUCCESS) {
        p->algo = found[fastest(g, p, found, n_found)].algo;
        return KIVI_OK;
    }
    return KI_FAIL(err, DEVICE, "cuda: no product of %u rows, %u by %u: %s", p->rows, p->shape.n,
                   p->shape.k, cublasLtGetStatusString(code));
}

static kivi_status prepare_rows(ki_gemm *g, const ki_gemm_shape *shape, uint32_t rows,
                                kivi_error *err) {
    plan p = {.shape = *shape, .rows = rows};
    if (find(g, shape, rows)) return KIVI_OK;
    kivi_status status = make_layouts(g, &p, err);
    if (status == KIVI_OK) status = choose(g, &p, err);
    if (status == KIVI_OK) status = ki_buf_append(&g->plans, &p, sizeof p, err);
    if (status == KIVI_OK) return status;
    if (p.weight) cublasLtMatrixLayoutDestroy(p.weight);
    if (p.x) cublasLtMatrixLayoutDestroy(p.x);
    if (p.out) cublasLtMatrixLayoutDestroy(p.out);
    return status;
}

kivi_status ki_gemm_prepare(ki_gemm *g, const ki_gemm_shape *shape, uint32_t max_rows,
                            kivi_error *err) {
    uint32_t last = ki_gemm_rows(max_rows);
    for (uint32_t rows = 1; rows <= last; rows = ki_gemm_rows(rows + 1))
        KI_TRY(prepare_rows(g, shape, rows, err));
    return KIVI_OK;
}

kivi_status ki_gemm_run(const ki_gemm *g, float *out, const void *weight, const void *x,
                        const ki_gemm_shape *shape, uint32_t m, bool add, void *stream,
                        kivi_error *err) {
    const plan *p = find(g, shape, ki_gemm_rows(m));
    float one = 1, beta = add ? 1 : 0;
    if (!p)
        return KI_FAIL(err, INTERNAL, "cuda: a product of %u rows, %u by %u was not prepared", m,
                       shape->n, shape->k);
    return check(cublasLtMatmul(g->handle, g->op, &one, weight, p->weight, x, p->x, &beta, out,
                                p->out, out, p->out, &p->algo, g->workspace,
                                KI_GEMM_WORKSPACE_BYTES, stream),
                 "cublasLtMatmul", err);
}
