/* kv_slow.cuh: where decode attention finds the blocks that it reads straight from memory (window,
 * sinks, what does not fill a unit), and how a warp asks for them before it needs them: at short
 * contexts a step waits for these trips, one behind the other. */
#ifndef KI_KV_SLOW_CUH
#define KI_KV_SLOW_CUH
#include "kv_rows.cuh"
#include "kv_tile.cuh"

/* The step's rows, where attention takes them itself: float32, strides in elements. */
struct own_rows {
    const float *q, *k, *v; /* k NULL: they were appended */
    const float *rope;      /* [rows][D/2][2], or NULL */
    uint32_t q_stride, k_stride, v_stride;
    uint32_t *row_flags;
    ki_cuda_counters *counters;
};

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
    own_rows own;
    uint32_t n_sms; /* thread blocks behind those that find a place at once find all rows there */
    bool few; /* thread blocks: what counts is how long a trip takes, not how many bytes come */
};

struct slow_place {                        /* a block's bytes; null where they are not needed */
    const uint8_t *head, *sub, *k16, *v16; /* head: of the page that has sub */
    bool k_codes, v_codes;
    bool codes_here, keys_here, values_here; /* in the ring */
    uint32_t k_step, v_step;                 /* seen_rows' step of k16 and v16 */
};

/* The 16-bit values of a block that are not in the ring, which a warp asks for before it needs the
 * scores: that is one trip to memory for both. Rows that are too long for the registers, or for
 * those of twelve warps of a multiprocessor, are read when they are needed. */
template <class S> struct exact_values {
    static constexpr bool HELD = S::D <= 128 && S::WARPS * S::BLOCKS <= 8;
    static constexpr int N_FOURS = S::NJ / 2 * 4;
    uint4 fours[HELD ? N_FOURS : 1];
    uint2 twos[HELD && S::NJ % 2 ? 4 : 1];

    __device__ __forceinline__ void load(const uint8_t *v16, ki_plan_rows rows, uint32_t lane) {
        if constexpr (HELD) {
            seen_rows at(rows, false, WHOLE_STEP, lane);
#pragma unroll
            for (int k = 0; k < N_FOURS; k++) {
                fours[k] = make_uint4(0, 0, 0, 0);
                if (v16) ki_load16(fours[k], at.two_steps(v16, k));
            }
#pragma unroll
            for (int e = 0; S::NJ % 2 && e < 4; e++) {
                twos[e] = make_uint2(0, 0);
                if (v16) ki_load8(twos[e], at.template last<S::NJ>(v16, e));
            }
        }
    }
    template <class F>
    __device__ __forceinline__ void each(const slow_place &at, ki_plan_rows rows, uint32_t lane,
                                         F f) {
        if (!HELD || at.values_here) for_seen_frags<S::NJ>(at.v16, rows, false, at.v_step, lane, f);
        else if constexpr (HELD)
            for_row_frags<S::NJ>(
                false, [&](int k) { return fours[k]; }, [&](int e) { return twos[e]; }, f);
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
    return (const uint8_t *)item.ring +
           (slot * (item.k_blocks + item.v_blocks) + (side ? item.k_blocks : 0) + in_ring) * bytes;
}

KI_DEV const uint8_t *sub_of(const ki_cuda_layout &l, const uint8_t *head, uint32_t block) {
    return head + l.head_bytes + block % KI_SUBS * l.sub_bytes;
}

/* What of a block is read. */
struct slow_need {
    bool k_codes, v_codes;
    ki_plan_rows keys, values;
};

KI_DEV slow_need need_of(const ki_cuda_layout &l, const ki_plan_item &item, uint32_t block) {
    uint32_t base = block * KI_SUB_TOKENS;
    return {reads_codes(item, base, item.k_exact, sinks_of(l, l.k_bits)),
            reads_codes(item, base, item.v_exact, sinks_of(l, l.v_bits)), key_rows(l, item, block),
            value_rows(l, item, block)};
}

KI_DEV slow_place find_slow(const decode_args &a, const ki_plan_item &item, uint32_t head,
                            uint32_t block) {
    const ki_cuda_layout &l = a.l;
    uint32_t base = block * KI_SUB_TOKENS;
    slow_need need = need_of(l, item, block);
    slow_place at = {};
    at.k_codes = need.k_codes, at.v_codes = need.v_codes;
    if (at.k_codes || at.v_codes) {
        uint32_t j = ki_plan_slow_page(&item, block);
        uint64_t id = j == 0 ? item.pages[0] : item.pages[1];
        if (j == KI_PLAN_NONE)
            id = a.tables[(uint64_t)item.table * a.table_stride + base / KI_PAGE_TOKENS];
        at.head =
            a.pool + id * l.id_bytes + ((uint64_t)a.layer * l.n_kv_heads + head) * l.page_bytes;
        at.sub = sub_of(l, at.head, block);
    }
    if (need.keys.from < need.keys.to) at.k16 = exact_of(a, item, head, block, 0);
    if (need.values.from < need.values.to) at.v16 = exact_of(a, item, head, block, 1);
    return at;
}

/* Brings bytes into the cache that all multiprocessors share: the kernel before this one may still
 * write some of them. */
KI_DEV void bring_near(const uint8_t *at, uint32_t n_bytes, uint32_t lane) {
#pragma unroll 1
    for (uint32_t i = lane * 128; i < n_bytes; i += 32 * 128) ki_bring_line(at + i);
}
/* Of a 16-bit block the lines with rows that are read. */
template <class S> KI_DEV void bring_rows(const uint8_t *at, ki_plan_rows rows, uint32_t lane) {
#pragma unroll
    for (uint32_t line = lane; line < (S::D / 2 + 31) / 32 * 32; line += 32)
        if ((S::D % 64 == 0 || line < S::D / 2) &&
            ki_order_line_meets(rows.from, rows.to, line, S::NJ))
            ki_bring_line(at + line * 128);
}

/* ---- a warp's slow blocks ---- */

/* The block of slow number k (ki_plan_slow_block). */
KI_DEV uint32_t slow_block_of(const ki_plan_item &item, uint32_t k) {
    return k < item.n_lead ? item.lead_begin + k : item.tail_begin + (k - item.n_lead);
}

/* Bytes that copies of a block take. Of sinks, whose block has nothing else in 16 bits, the first
 * quarter (kv_order.h) is copied alone, its pieces one behind the other. */
struct copy_sizes {
    uint32_t codes, keys, values;
    bool is_keys_first, is_values_first; /* the first quarter alone */

    __device__ __forceinline__ uint32_t all() const { return codes + keys + values; }
};

template <class S>
KI_DEV copy_sizes copy_sizes_of(const decode_args &a, const ki_plan_item &item, uint32_t block,
                                bool has_codes, bool has_keys, bool has_values) {
    constexpr uint32_t WHOLE = S::D * 2 * KI_SUB_TOKENS, FIRST = WHOLE / 4;
    constexpr bool HAS_FIRST = S::HAS_FIRST;
    bool is_old = ki_plan_is_old(&item, block);
    ki_plan_rows keys = key_rows(a.l, item, block), values = value_rows(a.l, item, block);
    copy_sizes n = {};
    if (has_codes) n.codes = a.l.head_bytes + a.l.sub_bytes;
    n.is_keys_first = HAS_FIRST && is_old && keys.to <= 8;
    n.is_values_first = HAS_FIRST && is_old && values.to <= 8;
    bool is_whole = is_old && keys.to - keys.from == KI_SUB_TOKENS;
    if (has_keys) n.keys = n.is_keys_first ? FIRST : a.few || is_whole ? WHOLE : 0;
    if (has_values) n.values = n.is_values_first ? FIRST : a.few ? WHOLE : 0;
    return n;
}
/* Of slow number k, whatever warp has it. */
template <class S>
KI_DEV uint32_t copy_bytes_of(const decode_args &a, const ki_plan_item &item, uint32_t k) {
    if (k >= item.part.slow_end) return 0;
    uint32_t block = slow_block_of(item, k);
    slow_need need = need_of(a.l, item, block);
    return copy_sizes_of<S>(a, item, block, need.k_codes || need.v_codes,
                            need.keys.from < need.keys.to, need.values.from < need.values.to)
        .all();
}

/* Where 32 of them are, one a lane: addresses are worked out once, side by side.
 *
 * At short contexts a warp has fewer fast units than stages. Then codes of its slow blocks, and
 * whole blocks of 16-bit keys, are copied into the ring behind the units, as units are, instead of
 * being asked for piece by piece when they are needed: first come, first served, while there is
 * room (sm_90, where one instruction of a lane copies all of it). With few thread blocks values
 * come so, too, and blocks of which only some tokens are read; and where nobody has a unit all
 * warps' rings are one room.
 *
 * Nothing is copied before the wait that a kernel of this step may write: codes of the value that
 * leaves the window are in block v_exact / 32, and the row at pos is in the newest block; both are
 * late. But where attention takes the row itself the newest block comes early, and gets the row in
 * its place; values are coded behind attention then, so that with few thread blocks (NEAR) their
 * codes come early, too. */
template <class S> struct slow_list {
    enum {
        K_CODES = 1,
        V_CODES = 2,
        CODES_HERE = 4,
        KEYS_HERE = 8,
        VALUES_HERE = 16,
        KEYS_FIRST = 32,
        VALUES_FIRST = 64
    };
    const uint8_t *sub, *k16, *v16;
    uint8_t *late_codes, *late_keys, *late_values; /* where they are to be */
    uint32_t how;

    __device__ __forceinline__ void find(const decode_args &a, const ki_plan_item &item,
                                         uint32_t head, uint32_t k) {
        slow_place at = {};
        if (k < item.part.slow_end) at = find_slow(a, item, head, slow_block_of(item, k));
        sub = at.sub, k16 = at.k16, v16 = at.v16;
        late_codes = late_keys = late_values = nullptr;
        how = (at.k_codes ? K_CODES : 0) | (at.v_codes ? V_CODES : 0);
    }
    __device__ __forceinline__ void copy_codes(uint8_t *to, const decode_args &a, uint32_t block,
                                               uint32_t bar) {
        uint32_t head = a.l.head_bytes, bytes = a.l.sub_bytes;
        ki_bar_expect_more(bar, head + bytes);
        if (head) ki_bulk_copy(ki_shared(to), sub - block % KI_SUBS * bytes - head, head, bar);
        ki_bulk_copy(ki_shared(to + head), sub, bytes, bar);
        sub = to + head;
        how |= CODES_HERE;
    }
    __device__ __forceinline__ void copy_rows(uint8_t *to, const uint8_t *&from, uint32_t flag,
                                              uint32_t bar) {
        ki_bar_expect_more(bar, S::D * 2 * KI_SUB_TOKENS);
        ki_bulk_copy(ki_shared(to), from, S::D * 2 * KI_SUB_TOKENS, bar);
        from = to;
        how |= flag;
    }
    /* The first quarter: of each two steps 512 bytes. */
    __device__ __forceinline__ void copy_first(uint8_t *to, const uint8_t *&from, uint32_t flags,
                                               uint32_t bar) {
        ki_bar_expect_more(bar, S::NJ / 2 * FIRST_STEP * 16);
#pragma unroll 1
        for (uint32_t j = 0; j < S::NJ / 2; j++)
            ki_bulk_copy(ki_shared(to + j * FIRST_STEP * 16), from + j * WHOLE_STEP * 16,
                         FIRST_STEP * 16, bar);
        from = to;
        how |= flags;
    }
    /* Where the lane's copies begin if those of all lanes stand one behind the other. */
    KI_DEV_MEMBER uint32_t before(uint32_t bytes, uint32_t lane) {
        uint32_t sum = bytes;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            uint32_t y = __shfl_up_sync(~0u, sum, d);
            if (lane >= (uint32_t)d) sum += y;
        }
        return sum - bytes;
    }
    /* Of the lane's block, number k, what has room from `to` to `end`. */
    __device__ __forceinline__ void copy(uint8_t *to, const uint8_t *end, const copy_sizes &n,
                                         const decode_args &a, const ki_plan_item &item, uint32_t k,
                                         uint32_t bar) {
        uint32_t block = slow_block_of(item, k);
        bool is_early = ki_plan_is_old(&item, block) || a.own.k;
        if (n.codes && to + n.codes <= end) {
            if (block == item.v_exact / KI_SUB_TOKENS && !(S::NEAR && a.own.k)) late_codes = to;
            else copy_codes(to, a, block, bar);
        }
        to += n.codes;
        if (n.keys && to + n.keys <= end) {
            if (n.is_keys_first) copy_first(to, k16, KEYS_HERE | KEYS_FIRST, bar);
            else if (is_early) copy_rows(to, k16, KEYS_HERE, bar);
            else late_keys = to;
        }
        to += n.keys;
        if (n.values && to + n.values <= end) {
            if (n.is_values_first) copy_first(to, v16, VALUES_HERE | VALUES_FIRST, bar);
            else if (is_early) copy_rows(to, v16, VALUES_HERE, bar);
            else late_values = to;
        }
    }
    /* All lanes' blocks, number k of each. The room is the warp's, or of all warps, which have up
     * to 32 blocks from number `first` on then. */
    __device__ __forceinline__ void copy_all(uint8_t *room, const uint8_t *end, bool is_common,
                                             const decode_args &a, const ki_plan_item &item,
                                             uint32_t first, uint32_t k, uint32_t bar,
                                             uint32_t lane) {
        copy_sizes n = copy_sizes_of<S>(a, item, slow_block_of(item, k), sub != NULL, k16 != NULL,
                                        v16 != NULL);
        uint32_t at = before(is_common ? copy_bytes_of<S>(a, item, first + lane) : n.all(), lane);
        if (is_common) at = __shfl_sync(~0u, at, (k - first) % 32);
        copy(room + at, end, n, a, item, k, bar);
    }
    /* Behind the wait: what is late, and the end of all copies. */
    __device__ __forceinline__ void end_copies(const decode_args &a, const ki_plan_item &item,
                                               uint32_t k, uint32_t bar, uint32_t lane) {
        if (late_keys) copy_rows(late_keys, k16, KEYS_HERE, bar);
        if (late_values) copy_rows(late_values, v16, VALUES_HERE, bar);
        if (late_codes) copy_codes(late_codes, a, slow_block_of(item, k), bar);
        bool any = __any_sync(~0u, how & (CODES_HERE | KEYS_HERE | VALUES_HERE));
        __syncwarp(); /* all lanes have told */
        if (any && lane == 0) ki_bar_arrive(bar);
    }
    /* Number i of the list, block `block`, for the whole warp. */
    __device__ __forceinline__ slow_place get(const ki_cuda_layout &l, uint32_t i,
                                              uint32_t block) const {
        auto from = [&](const uint8_t *p) {
            return (const uint8_t *)__shfl_sync(~0u, (unsigned long long)p, i);
        };
        uint32_t h = __shfl_sync(~0u, how, i);
        slow_place at = {};
        at.sub = from(sub), at.k16 = from(k16), at.v16 = from(v16);
        at.head = at.sub - l.head_bytes;
        if (!(h & CODES_HERE)) at.head -= block % KI_SUBS * l.sub_bytes;
        at.k_codes = h & K_CODES, at.v_codes = h & V_CODES;
        at.codes_here = h & CODES_HERE, at.keys_here = h & KEYS_HERE;
        at.values_here = h & VALUES_HERE;
        at.k_step = S::HAS_FIRST && h & KEYS_FIRST ? FIRST_STEP : WHOLE_STEP;
        at.v_step = S::HAS_FIRST && h & VALUES_FIRST ? FIRST_STEP : WHOLE_STEP;
        return at;
    }
    /* The first block of the list whose 16-bit values are not copied; i KI_PLAN_NONE, v16 NULL:
     * none, and loading it is nothing. */
    struct apart_values {
        uint32_t i;
        bool is_old;
        const uint8_t *v16;
        ki_plan_rows rows;
    };
    __device__ __forceinline__ apart_values find_apart(const decode_args &a,
                                                       const ki_plan_item &item, uint32_t k,
                                                       uint32_t step, uint32_t lane) const {
        if (!exact_values<S>::HELD) return {KI_PLAN_NONE, true, NULL, {0, 0}};
        uint32_t first = v16 && !(how & VALUES_HERE) && !late_values ? lane : KI_PLAN_NONE;
#pragma unroll
        for (int x = 1; x < 32; x *= 2) first = min(first, __shfl_xor_sync(~0u, first, x));
        if (first == KI_PLAN_NONE) return {first, true, NULL, {0, 0}};
        uint32_t block = slow_block_of(item, k + first * step);
        return {first, (bool)ki_plan_is_old(&item, block), get(a.l, first, block).v16,
                value_rows(a.l, item, block)};
    }
    /* Into the cache what is not copied, of all blocks from number k on, `step` apart. */
    __device__ __forceinline__ void bring(const decode_args &a, const ki_plan_item &item,
                                          uint32_t k, uint32_t step, uint32_t lane) const {
#pragma unroll 1
        for (uint32_t i = 0; i < 32 && k < item.part.slow_end; i++, k += step) {
            uint32_t block = slow_block_of(item, k);
            slow_place at = get(a.l, i, block);
            if (at.sub && !at.codes_here) {
                bring_near(at.sub, a.l.sub_bytes, lane);
                bring_near(at.head, a.l.head_bytes, lane);
            }
            if (at.k16 && !at.keys_here) bring_rows<S>(at.k16, key_rows(a.l, item, block), lane);
            if (at.v16 && !at.values_here)
                bring_rows<S>(at.v16, value_rows(a.l, item, block), lane);
        }
    }
};

#endif
