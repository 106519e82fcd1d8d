/* check-sdpa: cuDNN takes our graph of attention. It makes plans for an H100 and an A100 that are
 * described to it, on any machine that has cuDNN and the fake driver in its way
 * (tests/py_sdpa.py); nothing is run. What the kernels compute is check-cuda's to say. */
#include "sdpa.h"

#include <stdio.h>

typedef struct device {
    const char *name;
    uint32_t major;
    char json[900];
} device;

static int n_failed;

static void describe(device *d, const char *name, uint32_t version, uint32_t n_sms,
                     uint32_t shared) {
    d->name = name;
    d->major = version / 100;
    snprintf(d->json, sizeof d->json,
             "{\"maxGridSize\":[2147483647,65535,65535],\"maxBlockSize\":[1024,1024,64],"
             "\"regsPerBlock\":65536,\"multiProcessorCount\":%u,\"smCountOrigin\":0,"
             "\"smClockRateKHz\":1410000,\"memClockRateKHz\":1593000,\"memoryBusWidth\":5120,"
             "\"l2CacheSize\":41943040,\"warpSize\":32,\"maxSharedMemoryPerBlock\":49152,"
             "\"maxSharedMemoryPerBlockOptin\":%u,\"oversizedSharedMemoryPerBlock\":0,"
             "\"reservedSharedMemoryPerBlock\":1024,\"maxRegistersPerSM\":65536,\"pciDeviceId\":0,"
             "\"maxCtasPerSM\":32,\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":2048,"
             "\"isTccDriver\":0,\"supportCoopLaunch\":1,\"deviceVer\":%u,\"driverVer\":13000,"
             "\"cudaDeviceId\":0,\"totalGlobalMem\":80000000000,\"deviceName\":\"%s\"}",
             n_sms, shared, version, name);
}

static ki_sdpa_options options_of(ki_mem *mem, const device *d, uint32_t head_dim,
                                  uint32_t window) {
    ki_sdpa_options o = {.mem = mem,
                         .n_heads = 32,
                         .n_kv_heads = 8,
                         .head_dim = head_dim,
                         .windows = {window},
                         .n_windows = 1,
                         .min_rows = KI_SDPA_MIN_ROWS,
                         .max_rows = KI_SDPA_MIN_ROWS,
                         .compute_major = d->major,
                         .workspace_bytes = 32 << 20,
                         .device_json = d->json};
    return o;
}

static void say(const char *name, kivi_status status, kivi_status expected,
                const kivi_error *error) {
    if (status == expected) {
        printf("ok %s\n", name);
        return;
    }
    printf("not ok %s: status %d, expected %d: %s\n", name, (int)status, (int)expected,
           error->text);
    n_failed++;
}

static void check_plan(const char *name, const ki_sdpa_options *o, kivi_status expected) {
    ki_sdpa *s = NULL;
    kivi_error error = {0};
    kivi_status status = ki_sdpa_create(&s, o, &error);
    if (status == KIVI_OK && ki_sdpa_workspace(s) > o->workspace_bytes) status = KIVI_INTERNAL;
    if (status == KIVI_OK) { /* plans for a device that is not there do not run */
        ki_sdpa_call call = {.n_rows = o->max_rows, .window = o->windows[0]};
        kivi_error none = {0};
        if (ki_sdpa_run(s, &call, NULL, &none) != KIVI_INTERNAL) status = KIVI_INTERNAL;
    }
    ki_sdpa_destroy(&s);
    if (o->mem->n_blocks) status = KIVI_INTERNAL;
    say(name, status, expected, &error);
}

static void check_device(ki_mem *mem, const device *d, const uint32_t (*cases)[2], size_t n) {
    for (size_t i = 0; i < n; i++) {
        char name[80];
        ki_sdpa_options o = options_of(mem, d, cases[i][0], cases[i][1]);
        snprintf(name, sizeof name, "plan/%s/d%u/window%u", d->name, cases[i][0], cases[i][1]);
        check_plan(name, &o, KIVI_OK);
    }
}

static void check_limits(ki_mem *mem, const device *d) {
    ki_sdpa_options o = options_of(mem, d, 128, 0);
    o.workspace_bytes = 0; /* the H100's own kernel wants some, the older one none */
    check_plan("plan/H100/no-workspace", &o, KIVI_OK);
    o = options_of(mem, d, 100, 0);
    check_plan("refused/head-size", &o, KIVI_UNSUPPORTED);
    o = options_of(mem, d, 256, 0);
    o.n_heads = 512, o.max_rows = 32768;
    check_plan("refused/offsets", &o, KIVI_UNSUPPORTED);
    o = options_of(mem, d, 128, 0);
    o.max_rows = KI_SDPA_MAX_ROWS + 1;
    check_plan("refused/rows", &o, KIVI_ARG);
    o = options_of(mem, d, 128, 0);
    o.device_json = "{}";
    check_plan("refused/device", &o, KIVI_DEVICE);
}

int main(void) {
    static const uint32_t h100[][2] = {{64, 0},  {80, 1000},  {96, 0},
                                       {128, 0}, {128, 4096}, {256, 512}};
    static const uint32_t a100[][2] = {{128, 4096}};
    static device hopper, ampere;
    ki_mem mem;
    ki_sdpa *s = NULL;
    kivi_error error = {0};
    ki_mem_init(&mem);
    describe(&hopper, "H100", 900, 132, 232448);
    describe(&ampere, "A100", 800, 108, 166912);
    ki_sdpa_options o = options_of(&mem, &hopper, 128, 0);
    o.exact = true;
    kivi_status status = ki_sdpa_create(&s, &o, &error);
    if (status == KIVI_UNSUPPORTED ||
        status == KIVI_DEVICE) { /* no library, one that is too old, or
                                                               * one that wants to know more of a
                                                               * device */
        printf("skip plans: %s\n", error.text);
        return 0;
    }
    if (status == KIVI_OK) printf("# %s\n", ki_sdpa_name(s));
    ki_sdpa_destroy(&s);
    say("plan/H100/exact", status, KIVI_OK, &error);
    check_device(&mem, &hopper, h100, sizeof h100 / sizeof *h100);
    o = options_of(&mem, &ampere, a100[0][0], a100[0][1]);
    status = ki_sdpa_create(&s, &o, &error);
    ki_sdpa_destroy(&s);
    if (status == KIVI_UNSUPPORTED && strstr(error.text, "9.18.1"))
        printf("skip plan/A100: %s\n", error.text);
    else check_device(&mem, &ampere, a100, 1);
    check_limits(&mem, &hopper);
    return n_failed != 0;
}
