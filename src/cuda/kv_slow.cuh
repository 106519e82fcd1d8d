/* kv_slow.cuh: where decode attention finds the blocks that it reads straight from memory (window,
 * sinks, what does not fill a unit), and how a warp asks for them before it needs them: at short
 * contexts a step waits for these trips, one behind the other. */
#ifndef KI_KV_SLOW_CUH
#define KI_KV_SLOW_CUH
#include "kv_rows.cuh"
#include "kv_tile.cuh"

struct decode_args {
    ki_cuda_layout l;
    const uint8_t *pool;
    const uint32_t *tables;
    const uint16_t *q;
    void *out;
    const uint32_t *n_items;
    const ki_plan_item *items;
    float *states; /* [items][H][2], then [items][H][D] */
    float *state_acc;
    uint32_t table_stride, layer, out_stride, heads, chunks, unit_bytes;
    ki_cuda_type out_type;
    float factor; /* scale log2(e) */
};

struct slow_place { /* a block's bytes; null where they are not needed */
    const uint8_t *page, *k16, *v16;
    bool k_codes, v_codes;
};

/* The 16-bit values of a block, which a warp asks for before it needs the scores: that is one trip
 * to memory for both. Rows that are too long for the registers are read when they are needed. */
template <class S> struct exact_values {
    static constexpr bool HELD = S::D <= 128;
    uint4 fours[HELD ? 2 * S::NJ : 1];

    __device__ __forceinline__ void load(const uint8_t *v16, ki_plan_rows rows, uint32_t lane) {
        if constexpr (HELD) {
            const uint4 *even =
                (const uint4 *)v16 + ki_order_seen_at(rows.from, rows.to, 0, lane, false);
            const uint4 *odd =
                (const uint4 *)v16 + ki_order_seen_at(rows.from, rows.to, 1, lane, false);
#pragma unroll
            for (int k = 0; k < 2 * S::NJ; k++) {
                uint4 &w = fours[k];
                w = make_uint4(0, 0, 0, 0);
                if (v16) /* volatile: stays where it is */
                    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                                 : "l"((k % 2 ? odd : even) + k / 2 * 64));
            }
        }
    }
    template <class F>
    __device__ __forceinline__ void each(const uint8_t *v16, ki_plan_rows rows, uint32_t lane,
                                         F f) {
        if constexpr (HELD) {
#pragma unroll
            for (int k = 0; k < 2 * S::NJ; k++)
                f(k / 2, k % 2, fours[k].x, fours[k].y, fours[k].z, fours[k].w);
        } else for_seen_frags<S::NJ>(v16, rows, false, lane, f);
    }
};

/* Sinks and lines count where a side has codes. */
KI_DEV uint32_t sinks_of(const ki_cuda_layout &l, uint32_t bits) {
    return bits == 16 ? 0 : l.sink_tokens;
}
KI_DEV ki_plan_rows key_rows(const ki_cuda_layout &l, const ki_plan_item &item, uint32_t block) {
    return ki_plan_rows_of(&item, block, item.k_exact, sinks_of(l, l.k_bits));
}
KI_DEV ki_plan_rows value_rows(const ki_cuda_layout &l, const ki_plan_item &item, uint32_t block) {
    return ki_plan_rows_of(&item, block, item.v_exact, sinks_of(l, l.v_bits));
}

/* Whether visible tokens of a block are read from codes. */
KI_DEV bool reads_codes(const ki_plan_item &item, uint32_t base, uint32_t exact_from,
                        uint32_t sinks) {
    uint32_t from = max(max(item.first, sinks), base);
    return from < min(min(exact_from, item.end), base + KI_SUB_TOKENS);
}

/* A block of 16-bit rows, as exact_block has it, by what the item says. */
KI_DEV const uint8_t *exact_of(const decode_args &a, const ki_plan_item &item, uint32_t head,
                               uint32_t block, uint32_t side) {
    const ki_cuda_layout &l = a.l;
    uint64_t slot = (uint64_t)a.layer * l.n_kv_heads + head, bytes = (uint64_t)l.head_dim * 64;
    uint32_t n = side ? item.v_blocks : item.k_blocks;
    if (block < l.sink_blocks)
        return (const uint8_t *)item.sinks +
               (slot * 2 * l.sink_blocks + side * l.sink_blocks + block) * bytes;
    uint32_t in_ring = ki_plan_ring_at(&item, side ? item.v_at : item.k_at, n, block);
    return (const uint8_t *)item.ring + (slot * (item.k_blocks + item.v_blocks) +
                                         (side ? item.k_blocks : 0) + in_ring) * bytes;
}

KI_DEV slow_place find_slow(const decode_args &a, const ki_plan_item &item, uint32_t head,
                            uint32_t block) {
    const ki_cuda_layout &l = a.l;
    uint32_t base = block * KI_SUB_TOKENS;
    slow_place at = {};
    at.k_codes = reads_codes(item, base, item.k_exact, sinks_of(l, l.k_bits));
    at.v_codes = reads_codes(item, base, item.v_exact, sinks_of(l, l.v_bits));
    if (at.k_codes || at.v_codes) {
        uint32_t j = ki_plan_slow_page(&item, block);
        uint64_t id = j == 0 ? item.pages[0] : item.pages[1];
        if (j == KI_PLAN_NONE)
            id = a.tables[(uint64_t)item.table * a.table_stride + base / KI_PAGE_TOKENS];
        at.page =
            a.pool + id * l.id_bytes + ((uint64_t)a.layer * l.n_kv_heads + head) * l.page_bytes;
    }
    ki_plan_rows keys = key_rows(l, item, block), values = value_rows(l, item, block);
    if (keys.from < keys.to) at.k16 = exact_of(a, item, head, block, 0);
    if (values.from < values.to) at.v16 = exact_of(a, item, head, block, 1);
    return at;
}

/* Brings bytes into the cache that all multiprocessors share: the kernel before this one may still
 * write some of them. */
KI_DEV void bring_near(const uint8_t *at, uint32_t n_bytes, uint32_t lane) {
    for (uint32_t i = lane * 128; at && i < n_bytes; i += 32 * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at + i));
}

/* Of a 16-bit block the lines with rows that are read: a lane's are 32 apart, so all or none. */
template <class S>
KI_DEV void bring_rows(const uint8_t *at, ki_plan_rows rows, bool keys, uint32_t lane) {
    bool is_read = ki_order_line_meets(rows.from, rows.to, lane, keys);
    bring_near(is_read ? at : nullptr, S::D * 2 * KI_SUB_TOKENS, lane);
}

template <class S>
KI_DEV void bring_slow(const decode_args &a, const ki_plan_item &item, const slow_place &at,
                       uint32_t block, uint32_t lane) {
    const uint8_t *sub = at.page + a.l.head_bytes + block % KI_SUBS * a.l.sub_bytes;
    bring_near(at.page ? sub : nullptr, a.l.sub_bytes, lane);
    bring_near(at.page, a.l.head_bytes, lane);
    bring_rows<S>(at.k16, key_rows(a.l, item, block), true, lane);
    bring_rows<S>(at.v16, value_rows(a.l, item, block), false, lane);
}

#endif
