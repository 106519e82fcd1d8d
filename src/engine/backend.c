/* backend.c: --device. The CPU is in this library; CUDA is in libkivi-cuda.so, found at run time
 * beside the program or library, in the lib folder next to it, or where the system looks. What was
 * asked for by name and is not there is an error; only `auto` chooses, and says what it chose. */
#include "engine.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#define LIBRARY "libkivi-cuda.so"
enum { MAX_DEVICE = 255 };

void ki_engine_log(const kivi_engine *e, const char *format, ...) {
    char line[512];
    va_list args;
    if (!e->options.log) return;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    e->options.log(e->options.log_user, line);
}

kivi_status ki_device_parse(ki_device_kind *kind, uint32_t *number, const char *name,
                            kivi_error *err) {
    *kind = KI_DEVICE_AUTO;
    *number = 0;
    if (!name || !strcmp(name, "auto")) return KIVI_OK;
    *kind = KI_DEVICE_CPU;
    if (!strcmp(name, "cpu")) return KIVI_OK;
    *kind = KI_DEVICE_CUDA;
    if (!strcmp(name, "cuda")) return KIVI_OK;
    bool ok = !strncmp(name, "cuda:", 5) && name[5] && strlen(name) <= 8;
    for (const char *p = ok ? name + 5 : ""; *p; p++) {
        ok = ok && *p >= '0' && *p <= '9';
        *number = *number * 10 + (uint32_t)(*p - '0');
    }
    if (ok && *number <= MAX_DEVICE) return KIVI_OK;
    return KI_FAIL(err, ARG, "engine: device '%s', expected auto, cpu, cuda or cuda:N", name);
}

/* ---- finding the library ---- */

/* The folder of this library, or of the program it is part of. */
static bool own_folder(char *path, size_t n_bytes) {
    Dl_info info;
    char real[PATH_MAX];
    if (!dladdr((void *)(uintptr_t)own_folder, &info) || !info.dli_fname) return false;
    const char *name = realpath(info.dli_fname, real);
    if (!name && !(name = realpath("/proc/self/exe", real))) return false;
    const char *slash = strrchr(name, '/');
    if (!slash || (size_t)(slash - name) + 1 > n_bytes) return false;
    memcpy(path, name, (size_t)(slash - name));
    path[slash - name] = 0;
    return true;
}

/* Tries one place; why says what the loader found wrong with a file that is there. */
static void *try_open(char *why, size_t n_bytes, const char *path) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle) return handle;
    const char *fault = dlerror();
    if (!strstr(fault, LIBRARY ": cannot open")) snprintf(why, n_bytes, "%s", fault);
    return NULL;
}

static void *open_library(char *why, size_t n_bytes) {
    static const char *const places[] = {"/" LIBRARY, "/../lib/" LIBRARY};
    char folder[PATH_MAX], path[PATH_MAX + 32];
    void *handle = NULL;
    why[0] = 0;
    bool known = own_folder(folder, sizeof folder);
    for (size_t i = 0; known && !handle && i < sizeof places / sizeof *places; i++) {
        snprintf(path, sizeof path, "%s%s", folder, places[i]);
        handle = try_open(why, n_bytes, path);
    }
    if (!handle) handle = try_open(why, n_bytes, LIBRARY);
    if (!handle && !why[0]) snprintf(why, n_bytes, LIBRARY " is not beside this program");
    return handle;
}

/* Whether the system has NVIDIA's driver: without it the library, and cuBLASLt with it, would be
 * loaded for nothing by every program of a machine that has no such GPU. */
static bool has_driver(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (driver) dlclose(driver);
    return driver != NULL;
}

static bool same_build(const ki_library *library) {
    ki_library own = {0};
    ki_library_fill(&own);
    return !memcmp(own.version, library->version, sizeof own.version) &&
           !memcmp(own.n_bytes, library->n_bytes, sizeof own.n_bytes);
}

kivi_status ki_library_open(void **handle, const ki_library **library, const char *asked,
                            kivi_error *err) {
    char why[200];
    ki_library_fn get;
    *handle = open_library(why, sizeof why);
    if (!*handle) return KI_FAIL(err, DEVICE, "device %s: %s", asked, why);
    void *symbol = dlsym(*handle, KI_LIBRARY_SYMBOL);
    memcpy(&get, &symbol, sizeof get); /* POSIX: an object pointer that is a function's */
    if (!symbol || !same_build(get()))
        return KI_FAIL(err, DEVICE, "device %s: " LIBRARY " is not of this version (%s)", asked,
                       KIVI_VERSION);
    *library = get();
    return KIVI_OK;
}

static kivi_status open_cuda(kivi_engine *e, uint32_t number, kivi_error *err) {
    ki_backend_options bo = {.mem = &e->mem,
                             .device = number,
                             .limit_bytes = e->options.gpu_memory_bytes,
                             .frequencies = ki_rope_frequencies,
                             .log = e->options.log,
                             .log_user = e->options.log_user};
    const char *asked = e->options.device ? e->options.device : "auto";
    const char *compute = e->options.compute_type;
    bo.compute = !compute || !strcmp(compute, "f16") ? KI_WEIGHT_F16
                 : !strcmp(compute, "f32")           ? KI_WEIGHT_F32
                                                     : KI_WEIGHT_BF16;
    if (bo.compute == KI_WEIGHT_BF16 && strcmp(compute, "bf16"))
        return KI_FAIL(err, ARG, "engine: compute_type '%s', expected f16, bf16 or f32", compute);
    bo.invariant = e->options.batch_invariant;
    bo.without = ki_parts_disabled(e->options.disable);
    const ki_library *library;
    KI_TRY(ki_library_open(&e->library, &library, asked, err));
    return library->open(&e->backend, &bo, err);
}

/* ---- the choice ---- */

kivi_status ki_engine_open_backend(kivi_engine *e, kivi_error *err) {
    ki_device_kind kind;
    uint32_t number;
    kivi_error why = {0};
    KI_TRY(ki_device_parse(&kind, &number, e->options.device, err));
    bool no_driver = kind == KI_DEVICE_AUTO && !has_driver();
    if (no_driver) snprintf(why.text, sizeof why.text, "libcuda.so.1 is not on this system");
    if (kind != KI_DEVICE_CPU && !no_driver) {
        kivi_status status = open_cuda(e, number, &why);
        if (status == KIVI_OK) {
            ki_engine_log(e, "device %s", e->backend->name);
            return KIVI_OK;
        }
        if (kind == KI_DEVICE_CUDA || status != KIVI_DEVICE) {
            if (err) *err = why;
            return status;
        }
    }
    ki_engine_close_backend(e);
    if (e->options.compute_type || e->options.gpu_memory_bytes)
        return KI_FAIL(err, ARG, "engine: %s is set, which is for a CUDA device; this is the cpu",
                       e->options.compute_type ? "compute_type" : "gpu_memory_bytes");
    if (kind == KI_DEVICE_AUTO && e->options.device) /* asked for, so answered */
        ki_engine_log(e, "device cpu (%s)", why.text);
    return ki_cpu_backend_create(&e->backend, &e->mem, err);
}

void ki_engine_close_backend(kivi_engine *e) {
    if (e->backend) e->backend->api->destroy(e->backend);
    e->backend = NULL;
    if (e->library) dlclose(e->library);
    e->library = NULL;
}

/* ---- the plan ---- */

/* Prompts that are fed in several steps at a time: as many as a scheduler admits by itself
 * (serve.h's exact_bytes). */
static uint32_t prompts_at_once(const kivi_engine *e, const ki_layout *layout) {
    return layout->kv.rule == KIVI_RULE_PAPER ? 1 : KI_MIN(2u, e->options.max_sessions);
}

/* By tag, to the byte: what is loaded, what the backend will take, pages, and the 16-bit rows of
 * all sessions, with the larger rings of prompts. */
static kivi_status plan_device(kivi_engine *e, const ki_layout *layout, uint32_t n_pages,
                               const ki_backend_sizes *sizes, kivi_error *err) {
    const ki_backend *b = e->backend;
    kivi_memory cache, *all = &e->planned;
    b->api->plan(all, b, &e->model->config, layout, sizes);
    if (!ki_layout_plan(&cache, layout, n_pages, e->options.max_sessions))
        return KI_FAIL(err, ARG, "engine: %u pages are too many", n_pages);
    e->planned_prompt_bytes = ki_layout_prompt_bytes(layout, sizes->n_rows, sizes->max_tokens) *
                              prompts_at_once(e, layout);
    all->weights += ki_mem_report(b->device->mem).weights;
    all->kv_codes = cache.kv_codes;
    all->kv_scales = cache.kv_scales;
    all->kv_residual = cache.kv_residual + e->planned_prompt_bytes;
    return KIVI_OK;
}

/* What a device will hold for this engine, before any of it is taken: refused at once when it
 * cannot be, not somewhere in the middle. Under `paper` a ring for the longest prompt there can be
 * is no such reason: it is as long as the prompt, and whole prompts in one step need none. */
kivi_status ki_engine_check_plan(kivi_engine *e, const ki_layout *layout, uint32_t n_pages,
                                 const ki_backend_sizes *sizes, kivi_error *err) {
    const ki_backend *b = e->backend;
    const kivi_memory *p = &e->planned;
    if (!b->device) return KIVI_OK;
    KI_TRY(plan_device(e, layout, n_pages, sizes, err));
    uint64_t prompt = e->planned_prompt_bytes, all = ki_memory_sum(p);
    uint64_t room = b->limit_bytes ? KI_MIN(b->limit_bytes, b->free_bytes) : b->free_bytes;
    const double mib = 1048576.0, weights = (double)p->weights / mib;
    double pages = (double)(p->kv_codes + p->kv_scales) / mib, rows = (double)prompt / mib;
    double windows = (double)(p->kv_residual - prompt) / mib;
    double rest = (double)(p->activations + p->workspace) / mib;
    ki_engine_log(e,
                  "device memory plan, MiB: weights %.1f, pages %.1f, windows of %u sessions %.1f, "
                  "rows of prompts in several steps %.1f, workspace %.1f, sum %.1f of %.1f",
                  weights, pages, e->options.max_sessions, windows, rows, rest, (double)all / mib,
                  (double)room / mib);
    if (layout->kv.rule == KIVI_RULE_PAPER) all -= prompt, rows = 0;
    if (all <= room) return KIVI_OK;
    return KI_FAIL(err, NOMEM,
                   "device memory: weights %.0f, pages %.0f, windows %.0f, rows of prompts %.0f "
                   "and workspace %.0f MiB exceed %.0f MiB%s; fewer sessions, a shorter context or "
                   "fewer rows a step need less",
                   weights, pages, windows, rows, rest, (double)room / mib,
                   b->limit_bytes && b->limit_bytes <= b->free_bytes ? " (the limit that was set)"
                                                                     : "");
}
