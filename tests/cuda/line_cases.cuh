/* line_cases.cuh: cases of check-cuda for decoding at short contexts, with the line between packed
 * and 16-bit values at every place of a page: each step against the CPU's cache. What is copied
 * into the ring beside pages (kv_slow.cuh) differs with the length, so lengths go from nothing to
 * where no room is left. The note of a case has a sum over all bits of the results: equal for two
 * builds that give the same ones. */
#ifndef KI_CUDA_LINE_CASES_CUH
#define KI_CUDA_LINE_CASES_CUH
#include "check_step.cuh"

static void check_lines() {
    static const struct {
        const char *name;
        uint32_t k, v, sinks;
        bool plus;
    } kinds[] = {{"kivi2", 2, 2, 0, false}, {"kivi2-s4", 2, 2, 4, false},
                 {"kivi2+", 2, 2, 4, true}, {"kivi2+-s0", 2, 2, 0, true},
                 {"k4v2+", 4, 2, 4, true},  {"k4v3+", 4, 3, 4, true}};
    static const struct {
        int prompt;
        uint32_t split, window;
        bool late, own, many; /* the kernel for many thread blocks */
    } ways[] = {{0, 4096, 0, false, false},         {130, 4096, 0, true, false},
                {130, 128, 0, false, false},        {600, 4096, 0, true, false},
                {600, 128, 0, false, false},        {600, 4096, 333, true, false},
                {1300, 4096, 0, false, false},      {0, 4096, 0, true, true},
                {130, 128, 0, true, true},          {600, 4096, 333, true, true},
                {0, 4096, 0, true, true, true},     {130, 4096, 0, true, false, true},
                {600, 128, 0, false, false, true},  {600, 4096, 333, true, true, true},
                {1300, 4096, 0, false, false, true}};
    for (const auto &kind : kinds)
        for (uint32_t heads : {1u, 4u})
            for (const auto &way : ways) {
                world_options o = base_options();
                o.k_bits = kind.k, o.v_bits = kind.v, o.sinks = kind.sinks, o.plus = kind.plus;
                o.n_kv_heads = 2, o.n_heads = 2 * heads, o.rule = KIVI_RULE_STREAM;
                o.split_tokens = way.split, o.window = way.window, o.late = way.late;
                o.own = way.own, o.n_sms = way.many ? 1 : 0;
                o.n_layers = 2, o.pdl = true;
                if (open_case(text("line/%s-h%u-n%d-x%u-w%u%s%s", kind.name, heads, way.prompt,
                                   way.split, way.window, way.own ? "-own" : "",
                                   way.many ? "-many" : "")))
                    run_case(o, way.prompt ? std::vector<int>{way.prompt, -140}
                                           : std::vector<int>{-300});
            }
    for (uint32_t heads : {1u, 4u}) {
        world_options o = base_options();
        o.k_bits = o.v_bits = 16, o.n_kv_heads = 2, o.n_heads = 2 * heads, o.n_sms = 1;
        if (open_case(text("line/f16-h%u-many", heads))) run_case(o, {200, -40});
    }
    /* more thread blocks than are few (kv_decode.cu) */
    for (bool own : {false, true})
        for (bool plus : {false, true}) {
            world_options o = base_options();
            o.sinks = plus ? 4 : 0, o.plus = plus, o.rule = KIVI_RULE_STREAM, o.pdl = true;
            o.n_heads = o.n_kv_heads = 48, o.n_layers = 1, o.split_tokens = 4096;
            o.late = o.own = own;
            if (open_case(text("line/%s-many%s", plus ? "kivi2+" : "kivi2", own ? "-own" : "")))
                run_case(o, {130, -140});
        }
    /* a warp has more slow blocks than lanes */
    world_options o = base_options();
    o.sinks = 4096, o.rule = KIVI_RULE_STREAM, o.n_seqs = 1, o.n_heads = 2, o.max_tokens = 8192;
    o.split_tokens = 8192;
    if (open_case("line/4096-sinks")) run_case(o, {4300, -70});
}

#endif
