/* sdpa.c: cuDNN's library found, its plans kept, and a sequence's attention queued. */
#include "sdpa.h"

#include "sdpa_graph.h"

#ifdef KI_HAS_CUDNN
#include <dlfcn.h>
#include <stdio.h>

/* Lengths rounded up: 2,048, 8,192, 32,768 (ki_sdpa_rows), for each window. */
enum { N_ROWS = 3, MAX_PLANS = N_ROWS * KI_SDPA_MAX_WINDOWS };

struct ki_sdpa {
    ki_cudnn c;
    ki_sdpa_options o;
    cudnnHandle_t handle;
    cudnnBackendDescriptor_t device; /* described, not there */
    ki_sdpa_plan plans[MAX_PLANS];
    uint32_t n_plans;
    char name[32];
};

/* ---- the library ---- */

static bool find(void *out, void *library, const char *name) {
    void *symbol = dlsym(library, name);
    memcpy(out, &symbol, sizeof symbol); /* POSIX: an object pointer that is a function's */
    return symbol != NULL;
}

/* It stays loaded to the end of the process: NVIDIA's libraries register what runs there. */
static kivi_status load(ki_cudnn *c, kivi_error *err) {
    void *l = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!l) l = dlopen("libcudnn_graph.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!l) return KI_FAIL(err, UNSUPPORTED, "cuda: libcudnn.so.9 is not on this system");
    if (!find(&c->get_version, l, "cudnnGetVersion") ||
        !find(&c->error_string, l, "cudnnGetErrorString") ||
        !find(&c->last_error, l, "cudnnGetLastErrorString") ||
        !find(&c->create, l, "cudnnCreate") || !find(&c->destroy, l, "cudnnDestroy") ||
        !find(&c->set_stream, l, "cudnnSetStream") ||
        !find(&c->make, l, "cudnnBackendCreateDescriptor") ||
        !find(&c->drop, l, "cudnnBackendDestroyDescriptor") ||
        !find(&c->finalize, l, "cudnnBackendFinalize") ||
        !find(&c->set, l, "cudnnBackendSetAttribute") ||
        !find(&c->get, l, "cudnnBackendGetAttribute") ||
        !find(&c->execute, l, "cudnnBackendExecute"))
        return KI_FAIL(err, UNSUPPORTED, "cuda: libcudnn.so.9 lacks calls of cuDNN 9");
    c->version = c->get_version();
    return KIVI_OK;
}

/* 9.6: any length, windows. 9.10.0 and 9.10.1 make wrong results; lengths in device memory (ragged
 * tensors) below compute capability 9.0 came with 9.18.1. All as NVIDIA's own front end has it. */
static kivi_status check_version(const ki_sdpa *s, kivi_error *err) {
    size_t v = s->c.version;
    if (v >= 90600 && v < 100000 && v != 91000 && v != 91001 &&
        (s->o.compute_major >= 9 || s->o.exact || v >= 91801))
        return KIVI_OK;
    return KI_FAIL(
        err, UNSUPPORTED,
        "cuda: %s, expected 9.6 or newer, not 9.10.0 or 9.10.1; below compute capability "
        "9.0 at least 9.18.1",
        s->name);
}

/* ---- making ---- */

static kivi_status check_options(const ki_sdpa_options *o, kivi_error *err) {
    uint64_t most = (uint64_t)o->max_rows * o->n_heads * o->head_dim;
    if (o->n_windows < 1 || o->n_windows > KI_SDPA_MAX_WINDOWS || o->min_rows > o->max_rows ||
        o->max_rows > KI_SDPA_MAX_ROWS)
        return KI_FAIL(err, ARG, "cuda: cuDNN: %u windows, %u to %u rows", o->n_windows,
                       o->min_rows, o->max_rows);
    if (o->head_dim % 8 || o->head_dim > 256 || o->n_heads % o->n_kv_heads || most > INT32_MAX)
        return KI_FAIL(
            err, UNSUPPORTED,
            "cuda: cuDNN: head size %u, %u/%u heads, expected a multiple of 8 up to 256, "
            "and offsets below 2^31",
            o->head_dim, o->n_heads, o->n_kv_heads);
    return KIVI_OK;
}

static kivi_status check_call(const ki_sdpa *s, cudnnStatus_t code, const char *what,
                              kivi_error *err) {
    char why[160] = "";
    if (code == CUDNN_STATUS_SUCCESS) return KIVI_OK;
    s->c.last_error(why, sizeof why);
    return KI_FAIL(err, DEVICE, "cuda: cuDNN: %s: %s (%s)", what, s->c.error_string(code), why);
}

static kivi_status describe_device(ki_sdpa *s, kivi_error *err) {
    const char *json = s->o.device_json;
    KI_TRY(
        check_call(s, s->c.make(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &s->device), "device", err));
    KI_TRY(check_call(s,
                      s->c.set(s->device, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION,
                               CUDNN_TYPE_CHAR, (int64_t)strlen(json), json),
                      "device", err));
    return check_call(s, s->c.finalize(s->device), "device", err);
}

static kivi_status open_device(ki_sdpa *s, kivi_error *err) {
    if (s->o.device_json) return describe_device(s, err);
    return check_call(s, s->c.create(&s->handle), "cudnnCreate", err);
}

static kivi_status make_plan(ki_sdpa *s, uint32_t window, uint32_t n_rows, kivi_error *err) {
    const ki_sdpa_options *o = &s->o;
    const ki_sdpa_shape shape = {.n_heads = o->n_heads,
                                 .n_kv_heads = o->n_kv_heads,
                                 .head_dim = o->head_dim,
                                 .window = window,
                                 .n_rows = n_rows,
                                 .exact = o->exact};
    KI_TRY(ki_sdpa_plan_make(&s->plans[s->n_plans], &s->c, s->handle, s->device, &shape,
                             o->workspace_bytes, err));
    s->n_plans++;
    return KIVI_OK;
}

static kivi_status make_plans(ki_sdpa *s, kivi_error *err) {
    uint32_t last = ki_sdpa_rows(s->o.max_rows);
    for (uint32_t i = 0; i < s->o.n_windows; i++) {
        if (s->o.exact) {
            KI_TRY(make_plan(s, s->o.windows[i], s->o.max_rows, err));
            continue;
        }
        for (uint32_t rows = ki_sdpa_rows(s->o.min_rows); rows <= last; rows *= 4)
            KI_TRY(make_plan(s, s->o.windows[i], rows, err));
    }
    return KIVI_OK;
}

static kivi_status start(ki_sdpa *s, kivi_error *err) {
    KI_TRY(load(&s->c, err));
    unsigned v = (unsigned)s->c.version;
    snprintf(s->name, sizeof s->name, "cuDNN %u.%u.%u", v / 10000, v / 100 % 100, v % 100);
    KI_TRY(check_version(s, err));
    KI_TRY(open_device(s, err));
    return make_plans(s, err);
}

kivi_status ki_sdpa_create(ki_sdpa **out, const ki_sdpa_options *options, kivi_error *err) {
    void *p;
    *out = NULL;
    KI_TRY(check_options(options, err));
    KI_TRY(ki_alloc(&p, options->mem, KI_TAG_other, sizeof(ki_sdpa), err));
    ki_sdpa *s = p;
    s->o = *options;
    kivi_status status = start(s, err);
    if (status == KIVI_OK) *out = s;
    else ki_sdpa_destroy(&s);
    return status;
}

void ki_sdpa_destroy(ki_sdpa **sdpa) {
    ki_sdpa *s = *sdpa;
    if (!s) return;
    while (s->n_plans) ki_sdpa_plan_drop(&s->plans[--s->n_plans], &s->c);
    if (s->device) s->c.drop(s->device);
    if (s->handle) s->c.destroy(s->handle);
    ki_free(s->o.mem, s);
    *sdpa = NULL;
}

const char *ki_sdpa_name(const ki_sdpa *sdpa) { return sdpa->name; }

uint64_t ki_sdpa_workspace(const ki_sdpa *sdpa) {
    uint64_t most = 0;
    for (uint32_t i = 0; i < sdpa->n_plans; i++)
        most = KI_MAX(most, sdpa->plans[i].workspace_bytes);
    return most;
}

/* ---- running ---- */

typedef struct variant_pack { /* what a run's tensors are */
    int64_t uids[KI_SDPA_UIDS];
    const void *at[KI_SDPA_UIDS];
    int64_t n;
} variant_pack;

static void bind(variant_pack *p, ki_sdpa_uid uid, const void *at) {
    p->uids[p->n] = (int64_t)uid;
    p->at[p->n++] = at;
}

static void bind_record(variant_pack *p, const void *record) {
    const uint8_t *r = record;
    bind(p, KI_SDPA_Q_LENGTH, r);
    bind(p, KI_SDPA_K_LENGTH, r);
    bind(p, KI_SDPA_Q_OFFSETS, r + 16);
    bind(p, KI_SDPA_K_OFFSETS, r + 32);
    bind(p, KI_SDPA_V_OFFSETS, r + 32);
    bind(p, KI_SDPA_OUT_OFFSETS, r + 16);
}

static cudnnStatus_t execute(const ki_sdpa *s, const ki_sdpa_plan *plan, const variant_pack *p,
                             void *workspace) {
    const ki_cudnn *c = &s->c;
    cudnnBackendDescriptor_t d;
    cudnnStatus_t code = c->make(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &d);
    if (code != CUDNN_STATUS_SUCCESS) return code;
    code = c->set(d, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, p->n, p->uids);
    if (code == CUDNN_STATUS_SUCCESS)
        code = c->set(d, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, p->n, p->at);
    if (code == CUDNN_STATUS_SUCCESS)
        code = c->set(d, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    if (code == CUDNN_STATUS_SUCCESS) code = c->finalize(d);
    if (code == CUDNN_STATUS_SUCCESS) code = c->execute(s->handle, plan->plan, d);
    c->drop(d);
    return code;
}

static const ki_sdpa_plan *plan_of(const ki_sdpa *s, uint32_t window, uint32_t n_rows) {
    uint32_t rows = s->o.exact ? n_rows : ki_sdpa_rows(n_rows);
    for (uint32_t i = 0; i < s->n_plans; i++)
        if (s->plans[i].shape.window == window && s->plans[i].shape.n_rows == rows)
            return &s->plans[i];
    return NULL;
}

kivi_status ki_sdpa_run(ki_sdpa *s, const ki_sdpa_call *call, void *stream, kivi_error *err) {
    const ki_sdpa_plan *plan = plan_of(s, call->window, call->n_rows);
    float lowest = ki_sdpa_lowest(&s->c), window = (float)call->window;
    variant_pack p = {.n = 0};
    if (!plan || !s->handle)
        return KI_FAIL(err, INTERNAL, "cuda: cuDNN: no plan for %u rows, window %u", call->n_rows,
                       call->window);
    bind(&p, KI_SDPA_Q, call->q);
    bind(&p, KI_SDPA_K, call->k);
    bind(&p, KI_SDPA_V, call->v);
    bind(&p, KI_SDPA_OUT, call->out);
    bind(&p, KI_SDPA_SCALE, &call->scale);
    bind(&p, KI_SDPA_CAUSAL_LOW, &lowest);
    if (call->window) {
        bind(&p, KI_SDPA_WINDOW_LOW, &lowest);
        bind(&p, KI_SDPA_WINDOW, &window);
    }
    if (!s->o.exact) {
        bind(&p, KI_SDPA_LENGTH_LOW, &lowest);
        bind_record(&p, call->record);
    }
    KI_TRY(check_call(s, s->c.set_stream(s->handle, stream), "cudnnSetStream", err));
    return check_call(s, execute(s, plan, &p, call->workspace), "attention", err);
}

#else

struct ki_sdpa {
    char name[1];
};

kivi_status ki_sdpa_create(ki_sdpa **out, const ki_sdpa_options *options, kivi_error *err) {
    (void)options;
    *out = NULL;
    return KI_FAIL(err, UNSUPPORTED, "cuda: this build was made without cuDNN's headers (9.8)");
}
void ki_sdpa_destroy(ki_sdpa **sdpa) { *sdpa = NULL; }
const char *ki_sdpa_name(const ki_sdpa *sdpa) { return sdpa->name; }
uint64_t ki_sdpa_workspace(const ki_sdpa *sdpa) {
    (void)sdpa;
    return 0;
}
kivi_status ki_sdpa_run(ki_sdpa *sdpa, const ki_sdpa_call *call, void *stream, kivi_error *err) {
    (void)sdpa;
    (void)stream;
    (void)call;
    return KI_FAIL(err, INTERNAL, "cuda: this build was made without cuDNN's headers (9.8)");
}

#endif
