/* small_cases.cuh: kernels as they run on devices whose thread blocks have less shared memory
 * (kv_shared.h): 99 KB, as at compute capability 8.6 and 8.9; and those of plain.h, which serve
 * what the fused ones are not built for. Cases of check-cuda. */
#ifndef KI_CUDA_SMALL_CASES_CUH
#define KI_CUDA_SMALL_CASES_CUH
#include "check_step.cuh"

enum { SMALL_BYTES = 99 << 10 };

static void check_small() {
    static const struct {
        uint32_t d, h, hk, kb, vb, g, s;
        bool plus;
    } cases[] = {{128, 8, 2, 2, 2, 32, 0, false},   {128, 4, 2, 16, 16, 32, 0, false},
                 {256, 4, 2, 16, 16, 32, 0, false}, {128, 4, 2, 16, 8, 32, 4, false},
                 {128, 4, 2, 8, 8, 64, 0, false},   {128, 4, 2, 8, 4, 64, 0, false},
                 {128, 4, 2, 8, 16, 64, 0, false},  {64, 4, 2, 8, 16, 64, 0, false},
                 {256, 4, 2, 8, 16, 64, 4, false},  {256, 4, 2, 8, 8, 128, 0, false},
                 {256, 4, 2, 2, 2, 128, 4, true},   {256, 4, 2, 4, 3, 128, 0, true},
                 {128, 8, 2, 2, 2, 128, 4, true}};
    for (const auto &c : cases) {
        world_options o = base_options();
        o.head_dim = c.d, o.n_heads = c.h, o.n_kv_heads = c.hk, o.k_bits = c.kb, o.v_bits = c.vb;
        o.group = c.g, o.sinks = c.s, o.plus = c.plus, o.rule = KIVI_RULE_STREAM;
        o.shared_bytes = SMALL_BYTES;
        if (!open_case(text("small/d%u-k%uv%u-g%u%s", c.d, c.kb, c.vb, c.g, c.plus ? "+" : "")))
            continue;
        if (c.plus) run_oracle(o, 767, true); /* the last row closes a page */
        else run_case(o, {300, 77, -140});
    }
}

/* All bytes of pages, and the results, of + kinds at other head sizes: against the CPU's cache. */
static void check_plain() {
    static const uint32_t dims[] = {16, 32, 48, 112, 160, 192, 128, 256};
    static const uint32_t bits[][2] = {{2, 2}, {4, 2}, {4, 3}};
    for (uint32_t d : dims)
        for (const auto &b : bits)
            for (uint32_t sinks : {0u, 4u}) {
                world_options o = base_options();
                o.head_dim = d, o.n_heads = 4, o.k_bits = b[0], o.v_bits = b[1], o.sinks = sinks;
                o.plus = o.plain = true, o.rule = sinks ? KIVI_RULE_STREAM : KIVI_RULE_PAPER;
                if (open_case(text("plain/d%u-k%uv%u-s%u+", d, b[0], b[1], sinks)))
                    run_case(o, {sinks ? 300 : 377, sinks ? 77 : -1, -140});
            }
    world_options o = base_options();
    o.plain = true, o.head_dim = 48, o.group = 16, o.sinks = 4, o.rule = KIVI_RULE_STREAM;
    if (open_case("plain/d48-kivi2")) run_case(o, {300, 77, -140});
}

#endif
