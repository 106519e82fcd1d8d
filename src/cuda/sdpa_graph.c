/* sdpa_graph.c: attention as a graph of cuDNN's small operations. cuDNN's one operation for it
 * (SDPA_FWD) knows masks from 9.21 on only; the graph is what all of 9 take. cuDNN looks for one
 * pattern in it and makes one kernel, so neither an operation nor its order is ours to choose:
 *
 *     scores   = Q K^T scale                                    [1][H][S][S] f32
 *     lengths  : scores where row < length and column < length, else the lowest number
 *     causal   : scores where row >= column
 *     window   : scores where column + window > row
 *     softmax  = e / sum e,  e = exp(scores - max);  log(sum) + max is never read, but without it
 *                no kernel is found
 *     out      = softmax V                                      softmax in float16
 *
 * Everything between Q, K, V and out is virtual: it has a shape and no memory. */
#include "sdpa_graph.h"

#ifdef KI_HAS_CUDNN
#include <float.h>
#include <math.h>

typedef cudnnBackendDescriptor_t descriptor;

enum { MAX_OPS = 32, MAX_CONFIGS = 8, FIRST_VIRTUAL = 100 };

/* Steps after the first that failed do nothing. */
typedef struct builder {
    const ki_cudnn *c;
    ki_sdpa_plan *out;
    descriptor ops[MAX_OPS];
    uint32_t n_ops;
    int64_t uid; /* of the next virtual tensor */
    kivi_status status;
    kivi_error *err;
} builder;

typedef struct extent { /* slowest dimension first; strides in elements */
    int64_t dims[4], strides[4];
} extent;

/* ---- descriptors ---- */

static void check(builder *b, cudnnStatus_t code, const char *what) {
    char why[160] = "";
    if (code == CUDNN_STATUS_SUCCESS || b->status != KIVI_OK) return;
    b->c->last_error(why, sizeof why);
    b->status = KI_FAIL(b->err, UNSUPPORTED, "cuda: cuDNN: %s: %s (%s)", what,
                        b->c->error_string(code), why);
}

static descriptor make(builder *b, cudnnBackendDescriptorType_t type) {
    descriptor d = NULL;
    ki_sdpa_plan *p = b->out;
    if (b->status != KIVI_OK) return NULL;
    if (p->n_all == KI_SDPA_MAX_DESCRIPTORS) {
        b->status = KI_FAIL(b->err, INTERNAL, "cuda: cuDNN: more than %u descriptors", p->n_all);
        return NULL;
    }
    check(b, b->c->make(type, &d), "descriptor");
    if (d) p->all[p->n_all++] = d;
    return d;
}

static void set(builder *b, descriptor d, cudnnBackendAttributeName_t name,
                cudnnBackendAttributeType_t type, int64_t n, const void *value) {
    if (b->status == KIVI_OK) check(b, b->c->set(d, name, type, n, value), "attribute");
}

static void set_one(builder *b, descriptor d, cudnnBackendAttributeName_t name, descriptor value) {
    if (value) set(b, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static void set_type(builder *b, descriptor d, cudnnBackendAttributeName_t name,
                     cudnnDataType_t type) {
    set(b, d, name, CUDNN_TYPE_DATA_TYPE, 1, &type);
}

static void finalize(builder *b, descriptor d, const char *what) {
    if (b->status == KIVI_OK) check(b, b->c->finalize(d), what);
}

/* ---- tensors ---- */

typedef enum place { IN_MEMORY, BY_VALUE, VIRTUAL } place;

static descriptor tensor(builder *b, int64_t uid, cudnnDataType_t type, const extent *e, place at,
                         descriptor offsets) {
    descriptor d = make(b, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    int64_t alignment = 16;
    bool yes = true;
    set_type(b, d, CUDNN_ATTR_TENSOR_DATA_TYPE, type);
    set(b, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, e->dims);
    set(b, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, e->strides);
    set(b, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid);
    set(b, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    if (at == VIRTUAL) set(b, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes);
    if (at == BY_VALUE) set(b, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes);
    set_one(b, d, CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, offsets);
    finalize(b, d, "tensor");
    return d;
}

static descriptor number(builder *b, ki_sdpa_uid uid) {
    const extent one = {{1, 1, 1, 1}, {1, 1, 1, 1}};
    return tensor(b, (int64_t)uid, CUDNN_DATA_FLOAT, &one, BY_VALUE, NULL);
}

static descriptor integers(builder *b, ki_sdpa_uid uid, int64_t n) {
    const extent e = {{n, 1, 1, 1}, {1, 1, 1, 1}};
    return tensor(b, (int64_t)uid, CUDNN_DATA_INT32, &e, IN_MEMORY, NULL);
}

/* [1][H][S][S], and a number a row. */
static descriptor square(builder *b, cudnnDataType_t type) {
    int64_t h = b->out->shape.n_heads, s = b->out->shape.n_rows;
    const extent e = {{1, h, s, s}, {h * s * s, s * s, s, 1}};
    return tensor(b, b->uid++, type, &e, VIRTUAL, NULL);
}
static descriptor column(builder *b) {
    int64_t h = b->out->shape.n_heads, s = b->out->shape.n_rows;
    const extent e = {{1, h, s, 1}, {h * s, s, 1, 1}};
    return tensor(b, b->uid++, CUDNN_DATA_FLOAT, &e, VIRTUAL, NULL);
}

/* Rows [S][heads][D], as [1][heads][S][D]. */
static descriptor rows(builder *b, ki_sdpa_uid uid, uint32_t n_heads, ki_sdpa_uid offsets) {
    const ki_sdpa_shape *shape = &b->out->shape;
    int64_t h = n_heads, s = shape->n_rows, d = shape->head_dim;
    extent e = {{1, h, s, d}, {s * h * d, d, h * d, 1}};
    descriptor at = shape->exact ? NULL : integers(b, offsets, 2);
    if (uid == KI_SDPA_K) { /* the product's second factor is K^T */
        e.dims[2] = d, e.dims[3] = s;
        e.strides[2] = 1, e.strides[3] = h * d;
    }
    return tensor(b, (int64_t)uid, CUDNN_DATA_HALF, &e, IN_MEMORY, at);
}

/* ---- operations ---- */

static void operation(builder *b, descriptor op) {
    finalize(b, op, "operation");
    if (b->status != KIVI_OK) return;
    if (b->n_ops == MAX_OPS)
        b->status = KI_FAIL(b->err, INTERNAL, "cuda: cuDNN: more than %d operations", MAX_OPS);
    else b->ops[b->n_ops++] = op;
}

/* y = mode(x, a, t); a and t where the mode has them. In the arithmetic of `prec`. Returns y. */
typedef struct pointwise_call {
    cudnnPointwiseMode_t mode;
    cudnnDataType_t prec;
    descriptor x, a, t, y;
    int64_t axis; /* of GEN_INDEX */
} pointwise_call;

static descriptor pointwise(builder *b, const pointwise_call *call) {
    descriptor how = make(b, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    set(b, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &call->mode);
    set_type(b, how, CUDNN_ATTR_POINTWISE_MATH_PREC, call->prec);
    if (call->mode == CUDNN_POINTWISE_GEN_INDEX)
        set(b, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &call->axis);
    finalize(b, how, "pointwise");
    descriptor op = make(b, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    set_one(b, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
    set_one(b, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, call->x);
    set_one(b, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, call->a);
    set_one(b, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, call->t);
    set_one(b, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, call->y);
    operation(b, op);
    return call->y;
}

/* In float32. */
static descriptor compute(builder *b, cudnnPointwiseMode_t mode, descriptor x, descriptor a,
                          descriptor y) {
    const pointwise_call call = {.mode = mode, .prec = CUDNN_DATA_FLOAT, .x = x, .a = a, .y = y};
    return pointwise(b, &call);
}

static descriptor compare(builder *b, cudnnPointwiseMode_t mode, descriptor x, descriptor a) {
    const pointwise_call call = {.mode = mode,
                                 .prec = CUDNN_DATA_BOOLEAN,
                                 .x = x,
                                 .a = a,
                                 .y = square(b, CUDNN_DATA_BOOLEAN)};
    return pointwise(b, &call);
}

/* The row (axis 2) or the column (axis 3) of each score. */
static descriptor indices(builder *b, descriptor scores, int64_t axis, cudnnDataType_t prec) {
    const pointwise_call call = {.mode = CUDNN_POINTWISE_GEN_INDEX,
                                 .prec = prec,
                                 .x = scores,
                                 .y = square(b, CUDNN_DATA_INT32),
                                 .axis = axis};
    return pointwise(b, &call);
}

/* scores where mask is true, else the lowest number. */
static descriptor select_by(builder *b, descriptor scores, descriptor mask, ki_sdpa_uid lowest) {
    const pointwise_call call = {.mode = CUDNN_POINTWISE_BINARY_SELECT,
                                 .prec = CUDNN_DATA_FLOAT,
                                 .x = scores,
                                 .a = number(b, lowest),
                                 .t = mask,
                                 .y = square(b, CUDNN_DATA_FLOAT)};
    return pointwise(b, &call);
}

static descriptor reduce(builder *b, cudnnReduceTensorOp_t what, descriptor x) {
    descriptor y = column(b), how = make(b, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    set_type(b, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT);
    set(b, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &what);
    finalize(b, how, "reduction");
    descriptor op = make(b, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    set_one(b, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how);
    set_one(b, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    set_one(b, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    operation(b, op);
    return y;
}

/* out = x a. Lengths (NULL: as the tensors say) of the rows, the columns and the sums. */
typedef struct product_call {
    descriptor x, a, out, m, n, k;
} product_call;

static void product(builder *b, const product_call *call) {
    descriptor how = make(b, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    set_type(b, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT);
    finalize(b, how, "product");
    descriptor op = make(b, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    set_one(b, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, how);
    set_one(b, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, call->x);
    set_one(b, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, call->a);
    set_one(b, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, call->out);
    set_one(b, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, call->m);
    set_one(b, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, call->n);
    set_one(b, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, call->k);
    operation(b, op);
}

/* ---- the graph ---- */

static descriptor mask_lengths(builder *b, descriptor scores, descriptor q, descriptor k) {
    descriptor row = indices(b, scores, 2, CUDNN_DATA_INT32);
    descriptor col = indices(b, scores, 3, CUDNN_DATA_INT32);
    row = compare(b, CUDNN_POINTWISE_CMP_LT, row, q);
    col = compare(b, CUDNN_POINTWISE_CMP_LT, col, k);
    descriptor both = compare(b, CUDNN_POINTWISE_LOGICAL_AND, row, col);
    return select_by(b, scores, both, KI_SDPA_LENGTH_LOW);
}

static descriptor mask_causal(builder *b, descriptor scores) {
    descriptor row = indices(b, scores, 2, CUDNN_DATA_FLOAT);
    descriptor col = indices(b, scores, 3, CUDNN_DATA_FLOAT);
    return select_by(b, scores, compare(b, CUDNN_POINTWISE_CMP_GE, row, col), KI_SDPA_CAUSAL_LOW);
}

static descriptor mask_window(builder *b, descriptor scores) {
    descriptor row = indices(b, scores, 2, CUDNN_DATA_FLOAT);
    descriptor col = indices(b, scores, 3, CUDNN_DATA_FLOAT);
    descriptor window = number(b, KI_SDPA_WINDOW);
    col = compute(b, CUDNN_POINTWISE_ADD, col, window, square(b, CUDNN_DATA_FLOAT));
    return select_by(b, scores, compare(b, CUDNN_POINTWISE_CMP_GT, col, row), KI_SDPA_WINDOW_LOW);
}

static descriptor soften(builder *b, descriptor scores) {
    descriptor most = reduce(b, CUDNN_REDUCE_TENSOR_MAX, scores);
    descriptor e = compute(b, CUDNN_POINTWISE_SUB, scores, most, square(b, CUDNN_DATA_FLOAT));
    e = compute(b, CUDNN_POINTWISE_EXP, e, NULL, square(b, CUDNN_DATA_FLOAT));
    descriptor sum = reduce(b, CUDNN_REDUCE_TENSOR_ADD, e);
    descriptor log_sum = compute(b, CUDNN_POINTWISE_LOG, sum, NULL, column(b));
    compute(b, CUDNN_POINTWISE_ADD, most, log_sum, column(b));
    return compute(b, CUDNN_POINTWISE_DIV, e, sum, square(b, CUDNN_DATA_HALF));
}

static descriptor make_graph(builder *b) {
    const ki_sdpa_shape *s = &b->out->shape;
    descriptor q_length = s->exact ? NULL : integers(b, KI_SDPA_Q_LENGTH, 1);
    descriptor k_length = s->exact ? NULL : integers(b, KI_SDPA_K_LENGTH, 1);
    product_call first = {.x = rows(b, KI_SDPA_Q, s->n_heads, KI_SDPA_Q_OFFSETS),
                          .a = rows(b, KI_SDPA_K, s->n_kv_heads, KI_SDPA_K_OFFSETS),
                          .out = square(b, CUDNN_DATA_FLOAT),
                          .m = q_length,
                          .n = k_length};
    product(b, &first);
    descriptor scores = compute(b, CUDNN_POINTWISE_MUL, first.out, number(b, KI_SDPA_SCALE),
                                square(b, CUDNN_DATA_FLOAT));
    if (!s->exact) scores = mask_lengths(b, scores, q_length, k_length);
    scores = mask_causal(b, scores);
    if (s->window) scores = mask_window(b, scores);
    product_call second = {.x = soften(b, scores),
                           .a = rows(b, KI_SDPA_V, s->n_kv_heads, KI_SDPA_V_OFFSETS),
                           .out = rows(b, KI_SDPA_OUT, s->n_heads, KI_SDPA_OUT_OFFSETS),
                           .m = q_length,
                           .k = k_length};
    product(b, &second);
    return make(b, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
}

/* ---- the plan ---- */

/* Engines with their settings, the one that cuDNN expects to be fastest first. */
static uint32_t find_configs(builder *b, descriptor configs[MAX_CONFIGS], descriptor graph,
                             descriptor device, cudnnBackendHeurMode_t mode) {
    descriptor guess = make(b, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    int64_t n_found = 0;
    set_one(b, guess, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
    set(b, guess, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    set_one(b, guess, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, device);
    finalize(b, guess, "heuristics");
    for (int i = 0; i < MAX_CONFIGS; i++) configs[i] = make(b, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    if (b->status != KIVI_OK) return 0;
    check(b,
          b->c->get(guess, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                    MAX_CONFIGS, &n_found, configs),
          "heuristics");
    return b->status == KIVI_OK ? (uint32_t)KI_MIN(n_found, (int64_t)MAX_CONFIGS) : 0;
}

/* Compiles a configuration; what it wants of workspace. */
static void try_config(builder *b, descriptor config, cudnnHandle_t handle, descriptor device) {
    descriptor plan = make(b, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
    int64_t n_bytes = 0, n_found = 0;
    set_one(b, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config);
    set_one(b, plan, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, device);
    if (handle) set(b, plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    finalize(b, plan, "plan");
    if (b->status != KIVI_OK) return;
    check(b,
          b->c->get(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n_found,
                    &n_bytes),
          "workspace");
    b->out->plan = plan;
    b->out->workspace_bytes = n_bytes > 0 ? (uint64_t)n_bytes : 0;
}

/* The first configuration that can be compiled and has room. */
static void choose(builder *b, descriptor graph, cudnnHandle_t handle, descriptor device,
                   uint64_t workspace_bytes) {
    descriptor configs[MAX_CONFIGS];
    uint32_t n = find_configs(b, configs, graph, device, CUDNN_HEUR_MODE_A);
    if (b->status != KIVI_OK) return;
    b->status = KI_FAIL(b->err, UNSUPPORTED, "cuda: cuDNN has no kernel for head size %u",
                        b->out->shape.head_dim);
    for (uint32_t i = 0; i < n && b->status != KIVI_OK; i++) {
        b->status = KIVI_OK;
        try_config(b, configs[i], handle, device);
        if (b->status == KIVI_OK && b->out->workspace_bytes > workspace_bytes)
            b->status = KI_FAIL(
                b->err, UNSUPPORTED, "cuda: cuDNN wants %llu bytes of workspace, there are %llu",
                (unsigned long long)b->out->workspace_bytes, (unsigned long long)workspace_bytes);
    }
}

float ki_sdpa_lowest(const ki_cudnn *cudnn) {
    return cudnn->version < 91000 ? -FLT_MAX : -INFINITY;
}

kivi_status ki_sdpa_plan_make(ki_sdpa_plan *out, const ki_cudnn *cudnn, cudnnHandle_t handle,
                              cudnnBackendDescriptor_t device, const ki_sdpa_shape *shape,
                              uint64_t workspace_bytes, kivi_error *err) {
    builder b = {.c = cudnn, .out = out, .uid = FIRST_VIRTUAL, .err = err};
    *out = (ki_sdpa_plan){.shape = *shape};
    descriptor graph = make_graph(&b);
    set(&b, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, b.n_ops, b.ops);
    if (handle) set(&b, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    finalize(&b, graph, "graph");
    choose(&b, graph, handle, device, workspace_bytes);
    if (b.status != KIVI_OK) ki_sdpa_plan_drop(out, cudnn);
    return b.status;
}

/* Last made, first dropped. */
void ki_sdpa_plan_drop(ki_sdpa_plan *plan, const ki_cudnn *cudnn) {
    while (plan->n_all) cudnn->drop(plan->all[--plan->n_all]);
    plan->plan = NULL;
}

#endif
