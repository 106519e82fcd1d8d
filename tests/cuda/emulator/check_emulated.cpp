/* check_emulated.cpp: decode attention as it is in src/cuda, plan, kernels and merge, run without a
 * GPU (emulate.h) over random caches (random_cache.h).
 *
 *   check-emulated [--seed N] [--cases N] [--test PREFIX] [--verbose]
 *
 * One line for each kind of cache and head size, `ok NAME` or `not ok NAME: why`. Of each case: the
 * plan is the host's, nothing is written behind the workspace or the result, what other kernels of
 * the step write is read after the wait alone (until then it is no number), the result is that of
 * float64, and the kernels of sm_80 and sm_90, which copy in other ways, give the same bits; so does
 * attention that takes the step's rows itself. */
#include "emulate.h"
#include "random_cache.h"

#include "kv_decode_launch.cuh"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Error of a sequence's result, RMS over RMS. Operands of all products are float16, and rounding to
 * one is off by 2^-12.3 of it in RMS (a uniform error of up to half a place, over mantissas of 1 to
 * 2). A term of a sum of values has two of them, of p and of p * scale: 2^-11.8. A score is a sum
 * of products with two of them, of q * factor and of that * scale, in random directions: as the
 * scores here are of the size of 1, its exponential is off by about as much again: 2^-11.5 in all,
 * or 0.00034, and that is what is measured. The + kinds take 1.5 or 3.5 times the sum of p from
 * what codes give, which leaves half of it: 0.0007. Twice that may come. A bfloat16 result is
 * rounded to 2^-9 besides. A token of 2,200 that is left out, or counted twice, makes 0.02. */
static double most_error(ki_cuda_type type) {
    return type == KI_CUDA_BF16 ? hypot(0.0015, 0x1p-9) : 0.0015;
}

static const kv_kind kinds[] = {
    {"kivi2", 2, 2, 32, false},  {"kivi2+", 2, 2, 128, true},    {"k4v2+", 4, 2, 128, true},
    {"k4v3+", 4, 3, 128, true},  {"f16", 16, 16, 32, false},     {"k16v2", 16, 2, 32, false},
    {"k2v16", 2, 16, 32, false}, {"k2v16g64", 2, 16, 64, false}, {"kivi4", 4, 4, 32, false},
    {"kivi8", 8, 8, 32, false},  {"k2v2g64", 2, 2, 64, false},   {"k2v2g128", 2, 2, 128, false}};

/* The kernels of 64 and 128 once more as sm_80 has them (Makefile). */
extern const decode_kernel ki_decode_table_64_sm80[], ki_decode_table_128_sm80[];

struct head_size {
    uint32_t head_dim, n_cases; /* cases of each kind: fewer where a case takes longer */
    const decode_kernel *sm80;
};
static const head_size sizes[] = {{64, 48, ki_decode_table_64_sm80},
                                  {128, 32, ki_decode_table_128_sm80},
                                  {256, 16, NULL},
                                  {80, 12, NULL},
                                  {96, 12, NULL}};

static struct {
    uint64_t seed = 1;
    uint32_t n_cases = 0; /* 0: as sizes has it */
    std::string prefix;
    bool is_verbose = false;
    unsigned n_failed = 0;
} run;

/* ---- the world as a kernel sees it ---- */

static random_cache *cache;
static uint64_t merge_launch; /* number of the launch whose states are the kernel's before it */
static std::vector<uint8_t> states; /* taken away from it */

static uint8_t *states_at(void) {
    return cache->workspace.data + ki_plan_states_at(cache->n_seqs, cache->max_splits);
}
static void hide(void) {
    cache->hide();
    if (emulated_counts.n_launches != merge_launch || !states.empty()) return;
    states.assign(states_at(), cache->workspace.data + cache->workspace.n_bytes);
    memset(states_at(), 0xff, states.size());
}
static void show(void) {
    cache->show();
    if (!states.empty()) memcpy(states_at(), states.data(), states.size());
    states.clear();
}
static bool holds(const void *at, size_t n_bytes) { return cache->holds(at, n_bytes); }

/* A kernel that reads where nothing is ends as one that the emulator refuses. */
static void on_fault(int) { emulate_fail("an address where there is no memory"); }
static void catch_faults(void) {
    static uint8_t stack[1 << 16];
    stack_t alternative = {};
    alternative.ss_sp = stack, alternative.ss_size = sizeof stack;
    struct sigaction action = {};
    action.sa_handler = on_fault;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaltstack(&alternative, NULL);
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

/* ---- one case ---- */

static std::string check_plan(const random_cache &c) {
    const uint8_t *w = c.workspace.data;
    if (*(const uint32_t *)w != c.items.size()) return "the plan has another number of items";
    if (memcmp(w + 256, c.slots.data(), c.slots.size() * sizeof(ki_plan_slot)))
        return "slots differ from the host's plan";
    if (memcmp(w + ki_plan_items_at(c.n_seqs), c.items.data(),
               c.items.size() * sizeof(ki_plan_item)))
        return "items differ from the host's plan";
    return "";
}

static std::string check_result(const random_cache &c, double *worst) {
    if (!c.workspace.is_intact()) return "written behind the workspace";
    if (!c.out.is_intact()) return "written behind the result";
    for (uint32_t i = 0; i < c.n_seqs; i++) {
        double e = c.error_of(i);
        if (!(e <= most_error(c.out_type)))
            return "error " + std::to_string(e) + " of sequence " + std::to_string(i);
        *worst = e > *worst ? e : *worst;
    }
    return "";
}

static std::string attend(const ki_cuda_attend_call &call, const decode_kernel *kernel,
                          const ki_decode_choice &choice) {
    kivi_error err = {};
    memset(call.out, 0xff, cache->out.n_bytes);
    merge_launch = emulated_counts.n_launches + 2;
    kivi_status status =
        kernel ? ki_cuda_decode_attend_by(&call, kernel + choice.index, choice.warps, NULL, &err)
               : ki_cuda_decode_attend(&call, NULL, &err);
    merge_launch = 0;
    cache->show();
    if (emulate_problem()) return emulate_problem();
    return status == KIVI_OK ? "" : err.text;
}

static ki_cuda_attend_call call_of(const random_cache &c, const ki_cuda_cache *device) {
    ki_cuda_attend_call call = {};
    call.cache = device;
    call.layer = CACHE_LAYER, call.window = c.window, call.scale = c.scale;
    call.q = c.q.p(), call.out = c.out.data;
    call.out_stride = c.l.n_heads * c.head_dim, call.out_type = c.out_type;
    call.split_tokens = c.split_tokens, call.max_tokens = c.most_tokens + 1;
    call.workspace = c.workspace.data, call.pdl = c.pdl;
    return call;
}

/* Attention that takes the step's rows itself: the same bits, and the rows where they belong. */
static std::string check_own(random_cache &c, ki_cuda_attend_call call, const decode_kernel *sm80,
                             const ki_decode_choice &choice, const std::vector<uint8_t> &bits) {
    uint32_t q = c.l.n_heads * c.head_dim, kv = c.n_kv_heads * c.head_dim;
    ki_cuda_append_call rows = {};
    rows.cache = call.cache, rows.layer = call.layer, rows.type = KI_CUDA_F32;
    rows.q = c.own_rows.p(), rows.k = c.own_rows.p() + q, rows.v = c.own_rows.p() + q + kv;
    rows.q_stride = rows.k_stride = rows.v_stride = q + 2 * kv;
    rows.rope = c.rope.p();
    call.append = &rows;
    c.begin_own();
    for (const decode_kernel *kernel : {(const decode_kernel *)NULL, sm80}) {
        if (kernel == sm80 && !sm80) break;
        std::string why = attend(call, kernel, choice), with = "rows by attention: ";
        if (why.empty()) why = c.end_own();
        if (!why.empty()) return with + why;
        if (memcmp(bits.data(), c.out.data, bits.size())) return with + "other bits";
    }
    return "";
}

/* What is wrong; nothing: "". */
static std::string check_case(random_cache &c, const decode_kernel *sm80, double *worst) {
    ki_cuda_counters counters = {};
    ki_cuda_cache device = {c.l,      c.pool.data, c.tables.p(),   c.stride, c.seqs.p(),
                            c.n_seqs, &counters,   c.shared_bytes, c.n_sms};
    ki_cuda_attend_call call = call_of(c, &device);
    ki_decode_choice choice;
    kivi_error err = {};
    ki_decode_choose(&choice, &c.l, c.shared_bytes, ki_decode_is_many(&c.l, c.n_seqs, c.n_sms));
    if (ki_cuda_decode_plan(&call, NULL, &err) != KIVI_OK) return err.text;
    std::string why = check_plan(c);
    if (why.empty()) why = attend(call, NULL, choice);
    if (why.empty()) why = check_result(c, worst);
    if (!why.empty()) return why;
    std::vector<uint8_t> bits(c.out.data, c.out.data + c.out.n_bytes);
    if (sm80) why = attend(call, sm80, choice);
    if (!why.empty()) return "sm_80: " + why;
    if (memcmp(bits.data(), c.out.data, bits.size())) return "sm_80 gives other bits than sm_90";
    return c.is_packed() ? check_own(c, call, sm80, choice, bits) : "";
}

/* ---- all of them ---- */

static double seconds(void) {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Draws until there are enough: not each device of a draw has a kernel for each kind. */
static void check_kind(const kv_kind &kind, const head_size &size) {
    std::string name = "decode/" + std::to_string(size.head_dim) + "/" + kind.name, why;
    if (name.compare(0, run.prefix.size(), run.prefix) != 0) return;
    uint32_t wanted = run.n_cases ? run.n_cases : size.n_cases, n = 0;
    double worst = 0, began = seconds();
    for (uint32_t k = 0; k < 20 * wanted && n < wanted && why.empty(); k++) {
        random_cache c;
        random_source random = {run.seed * 1000003 + (uint64_t)(&kind - kinds) * 4099 + k * 65537 +
                                size.head_dim};
        if (!c.draw(kind, size.head_dim, random)) continue;
        cache = &c;
        n++;
        emulate_clear();
        emulate_seed(random.u64());
        why = check_case(c, size.sm80, &worst);
        if (!why.empty()) why += "; " + c.text();
        if (run.is_verbose) printf("# %s: %s: %s\n", name.c_str(), c.text().c_str(), why.c_str());
    }
    bool can_be = kind.is_plus || size.head_dim % kind.group == 0;
    if (!n && !can_be) return;
    if (!n) why = "no case was drawn";
    if (why.empty())
        printf("ok %s # %u cases, error %.5f, %.1f s\n", name.c_str(), n, worst, seconds() - began);
    else printf("not ok %s: %s\n", name.c_str(), why.c_str());
    run.n_failed += !why.empty();
    fflush(stdout);
}

static void read_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        std::string option = argv[i];
        if (option == "--verbose") run.is_verbose = true;
        else if (option == "--seed" && i + 1 < argc) run.seed = strtoull(argv[++i], NULL, 10);
        else if (option == "--cases" && i + 1 < argc) run.n_cases = (uint32_t)atoi(argv[++i]);
        else if (option == "--test" && i + 1 < argc) run.prefix = argv[++i];
        else {
            printf("check-emulated [--seed N] [--cases N] [--test PREFIX] [--verbose]\n");
            exit(2);
        }
    }
}

int main(int argc, char **argv) {
    kivi_error err = {};
    read_options(argc, argv);
    emulated = {hide, show, holds};
    catch_faults();
    printf("# seed %llu\n", (unsigned long long)run.seed);
    if (ki_cuda_decode_prepare(&err) != KIVI_OK)
        printf("not ok prepare: %s\n", err.text), run.n_failed++;
    for (const head_size &size : sizes)
        for (const kv_kind &kind : kinds) check_kind(kind, size);
    printf("# %llu thread blocks, %llu copies, %llu of them before the wait\n",
           (unsigned long long)emulated_counts.n_blocks,
           (unsigned long long)emulated_counts.n_copies,
           (unsigned long long)emulated_counts.n_early_copies);
    return run.n_failed ? 1 : 0;
}
