/* kv_prompt.cu: causal attention of a step's rows over codes, the 16-bit store and the step itself.
 *
 * One thread block for 128 rows of one query head (64 at head sizes above 128): four warps of 32
 * rows where all they see are rows of the step, else of 16 rows, one half of the block after the
 * other. Keys and values come in tiles of 64 tokens as float16 in shared memory: rows of the step
 * are copied, codes are turned into values. Which of the two a query reads depends on its position
 * (the visibility rule), so a tile near the line is loaded both ways: of scores one is chosen for
 * each pair, and probabilities go to the values they belong to. */
#include "kv_launch.h"
#include "kv_rows.cuh"
#include "kv_tile.cuh"

struct prompt_args {
    ki_cuda_layout l;
    const uint8_t *pool;
    const uint32_t *tables;
    const ki_cuda_seq *seqs;
    const uint16_t *q, *k_rows, *v_rows;
    void *out;
    uint32_t table_stride, layer, window, out_stride, n_tiles;
    ki_cuda_type out_type;
    bool is_piped; /* there is shared memory for two tiles of each side */
    float factor;  /* scale log2(e) */
};

enum { TILE = 64, PROMPT_WARPS = 4, PROMPT_THREADS = PROMPT_WARPS * 32 };

/* Halves of a row of a tile: 16 bytes more than D, so that eight rows lie in different banks. */
template <int D> struct tile_shape { static constexpr int STRIDE = D + 8, HALVES = TILE * STRIDE; };

KI_DEV void load_matrices(uint32_t (&r)[4], const uint16_t *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
KI_DEV void load_matrices_turned(uint32_t (&r)[4], const uint16_t *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
KI_DEV void copy_16_bytes(uint16_t *to, const uint16_t *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}
KI_DEV void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* ---- tiles ---- */

struct tile_job {
    const ki_cuda_seq *seq;
    uint32_t head, first, end; /* tokens [first, end) of the 64 are needed */
    bool keys;
};

KI_DEV uint16_t f16_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
KI_DEV float f16_at(const uint8_t *p, uint32_t i) {
    return __half2float(__ushort_as_half(((const uint16_t *)p)[i]));
}

/* Scale and zero of an element of a page; keys' page head, or the block. */
struct page_view {
    const ki_cuda_layout *l;
    const uint8_t *page, *sub;
    uint32_t token; /* of the page: the block's first */
};

KI_DEV float element_value(const page_view &v, uint32_t t, uint32_t c, uint32_t code, bool keys) {
    const ki_cuda_layout &l = *v.l;
    if (!keys) {
        uint32_t at = c / l.v_group * KI_SUB_TOKENS + ki_order_value_scale(t);
        float scale = f16_at(v.sub + l.v_scale_at, at);
        if (l.is_plus) return ((float)code - (l.v_bits == 3 ? 3.5f : 1.5f)) * scale;
        return fmaf((float)code, scale, f16_at(v.sub + l.v_zero_at, at));
    }
    const uint8_t *base = l.head_bytes ? v.page : v.sub;
    uint32_t group = l.head_bytes ? (v.token + t) / l.k_group : t / l.k_group;
    uint32_t at = group * l.head_dim + ki_order_key_scale(c, l.head_dim / 16);
    return fmaf((float)code, f16_at(base + l.k_scale_at, at), f16_at(base + l.k_zero_at, at));
}

/* A block's plane of codes into tile rows [32][stride]. */
KI_DEV void spread_codes(uint16_t *tile, uint32_t stride, const page_view &v, bool keys) {
    const ki_cuda_layout &l = *v.l;
    uint32_t bits = keys ? l.k_bits : l.v_bits == 3 ? 2 : l.v_bits, steps = l.head_dim / 16;
    const uint32_t *plane = (const uint32_t *)(v.sub + (keys ? l.k_at : l.v_at));
    uint32_t n = ki_order_words(steps, bits), mask = (1u << bits) - 1;
    for (uint32_t k = threadIdx.x; k < n * 32; k += blockDim.x) {
        uint32_t lane = k % 32, w = k / 32, word = plane[ki_order_word_at(w, n, lane)];
        for (uint32_t e = 0; e < 32 / bits; e++) {
            ki_order_element at = ki_order_at(w, e, lane, bits);
            uint32_t t = at.i * 16 + (keys ? at.row : at.col);
            uint32_t c = at.j * 16 + (keys ? at.col : at.row), code = word >> e * bits & mask;
            if (!keys && l.v_bits == 3) {
                ki_order_place p = ki_order_value(t, c, steps, 1);
                code |= (((const uint32_t *)(v.sub + l.third_at))[p.word] >> p.bit & 1) << 2;
            }
            tile[t * stride + c] = bits == 16 ? (uint16_t)(word >> e * bits)
                                              : f16_bits(element_value(v, t, c, code, keys));
        }
    }
}

/* Wide channels of kivi2+ again, with their upper bits. Behind spread_codes and a barrier. */
KI_DEV void spread_wide(uint16_t *tile, uint32_t stride, const page_view &v) {
    const ki_cuda_layout &l = *v.l;
    uint32_t n_wide = l.head_dim / 4, wide_steps = (n_wide + 15) / 16;
    for (uint32_t k = threadIdx.x; k < KI_SUB_TOKENS * n_wide; k += blockDim.x) {
        uint32_t t = k / n_wide, w = k % n_wide, c = v.page[l.list_at + w];
        ki_order_place low = ki_order_key(t, c, l.head_dim / 16, 2);
        ki_order_place high = ki_order_key(t, w, wide_steps, 2);
        uint32_t code = ((const uint32_t *)(v.sub + l.k_at))[low.word] >> low.bit & 3;
        code |= (((const uint32_t *)(v.sub + l.wide_at))[high.word] >> high.bit & 3) << 2;
        tile[t * stride + c] = f16_bits(element_value(v, t, c, code, true));
    }
}

/* The codes of 64 tokens from position base on. Ends with a barrier. */
template <int D>
KI_DEV void load_coded(uint16_t *tile, const prompt_args &a, const tile_job &job, uint32_t base) {
    constexpr int STRIDE = tile_shape<D>::STRIDE;
    uint64_t id = a.tables[(uint64_t)job.seq->table * a.table_stride + base / KI_PAGE_TOKENS];
    const uint8_t *page = a.pool + id * a.l.id_bytes +
                          ((uint64_t)a.layer * a.l.n_kv_heads + job.head) * a.l.page_bytes;
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t b = 0; b < TILE / KI_SUB_TOKENS; b++) {
            uint32_t token = base % KI_PAGE_TOKENS + b * KI_SUB_TOKENS;
            page_view v = {&a.l, page,
                           page + a.l.head_bytes + token / KI_SUB_TOKENS * a.l.sub_bytes, token};
            uint16_t *rows = tile + b * KI_SUB_TOKENS * STRIDE;
            if (pass) spread_wide(rows, STRIDE, v);
            else spread_codes(rows, STRIDE, v, job.keys);
        }
        __syncthreads();
        if (!job.keys || !a.l.is_plus || a.l.k_bits != 2) return;
    }
}

/* The 16-bit rows of 64 tokens: old ones from the store, new ones from the step, others 0. Ends
 * with a barrier. */
template <int D>
KI_DEV void load_exact(uint16_t *tile, const prompt_args &a, const tile_job &job, uint32_t base) {
    constexpr int STRIDE = tile_shape<D>::STRIDE, FOURS = D / 8;
    const ki_cuda_seq &s = *job.seq;
    const uint16_t *rows = job.keys ? a.k_rows : a.v_rows;
    for (uint32_t k = threadIdx.x; k < TILE * FOURS; k += blockDim.x) {
        uint32_t t = k / FOURS, c = k % FOURS * 8, pos = base + t;
        uint16_t *to = tile + t * STRIDE + c;
        if (pos >= s.n_tokens && pos < s.n_tokens + s.n_rows) {
            uint64_t row = s.first_row + pos - s.n_tokens;
            copy_16_bytes(to, rows + (row * a.l.n_kv_heads + job.head) * D + c);
        } else if (pos >= s.n_tokens || pos < job.first || pos >= job.end ||
                   (job.keys ? a.l.k_bits : a.l.v_bits) == 16)
            *(uint4 *)to = make_uint4(0, 0, 0, 0);
        else {
            const uint16_t *block = (const uint16_t *)exact_block(
                a.l, s, a.layer, job.head, pos / KI_SUB_TOKENS, job.keys ? 0 : 1);
            for (uint32_t e = 0; e < 8; e++) {
                uint32_t t32 = pos % KI_SUB_TOKENS;
                ki_order_place p = job.keys ? ki_order_key(t32, c + e, D / 16, 16)
                                            : ki_order_value(t32, c + e, D / 16, 16);
                to[e] = block[p.word * 2 + p.bit / 16];
            }
        }
    }
    wait_for_copies();
    __syncthreads();
}

/* ---- products of one warp ---- */

/* s [8][4]: rows g, g + 8 of the warp's 16, tokens 8 n + 2 t, + 1 of the tile. */
template <int D>
KI_DEV void tile_scores(float (&s)[8][4], const uint16_t *q, const uint16_t *k, uint32_t lane) {
    constexpr int STRIDE = tile_shape<D>::STRIDE;
    const uint16_t *q_at = q + lane % 16 * STRIDE + lane / 16 * 8;
    const uint16_t *k_at = k + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
        uint32_t a[4], b[4];
        load_matrices(a, q_at + j * 16);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            load_matrices(b, k_at + n * 8 * STRIDE + j * 16);
            mma(s[n], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma(s[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

/* acc [D / 8][4] += p v: rows g, g + 8, channels 8 n + 2 t, + 1. */
template <int D>
KI_DEV void tile_values(float (&acc)[D / 8][4], const float (&p)[8][4], const uint16_t *v,
                        uint32_t lane) {
    constexpr int STRIDE = tile_shape<D>::STRIDE;
    const uint16_t *v_at = v + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t a0 = pack2(p[2 * j][0], p[2 * j][1]), a1 = pack2(p[2 * j][2], p[2 * j][3]);
        uint32_t a2 = pack2(p[2 * j + 1][0], p[2 * j + 1][1]),
                 a3 = pack2(p[2 * j + 1][2], p[2 * j + 1][3]);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            load_matrices_turned(b, v_at + j * 16 * STRIDE + n * 8);
            mma(acc[n], a0, a1, a2, a3, b[0], b[1]);
            mma(acc[n + 1], a0, a1, a2, a3, b[2], b[3]);
        }
    }
}

/* ---- the kernel ---- */

/* What two rows of a lane see. */
struct row_view {
    uint32_t first[2], end[2], k_exact[2], v_exact[2];
};

/* A side of 16 bits has its old rows in pages; those of the step are read where they are. */
KI_DEV uint32_t k_line(const ki_cuda_layout &l, const ki_cuda_seq &s, uint32_t pos) {
    return l.k_bits == 16 ? s.n_tokens : ki_cuda_k_exact(&l, &s, pos);
}
KI_DEV uint32_t v_line(const ki_cuda_layout &l, const ki_cuda_seq &s, uint32_t pos) {
    return l.v_bits == 16 ? s.n_tokens : ki_cuda_v_exact(&l, &s, pos);
}

KI_DEV row_view view_rows(const prompt_args &a, const ki_cuda_seq &s, uint32_t row) {
    row_view v;
    for (int i = 0; i < 2; i++) {
        uint32_t r = row + 8 * i, pos = s.n_tokens + r;
        v.end[i] = r < s.n_rows ? pos + 1 : 0;
        v.first[i] = a.window && pos + 1 > a.window ? pos + 1 - a.window : 0;
        v.k_exact[i] = k_line(a.l, s, pos);
        v.v_exact[i] = v_line(a.l, s, pos);
    }
    return v;
}

/* Which tokens of a tile anybody reads from codes or in 16 bit: lines of the block's first and last
 * row bound those of all between. */
struct tile_need {
    bool codes, exact;
};
KI_DEV tile_need need_of(uint32_t base, uint32_t first, uint32_t end, uint32_t sinks,
                         uint32_t line_first, uint32_t line_last) {
    uint32_t from = max(base, first), to = min(base + TILE, end);
    tile_need n;
    n.codes = max(from, sinks) < min(to, line_last);
    n.exact = max(from, line_first) < to || from < min(sinks, to);
    return n;
}

/* Online softmax of a tile; scores in units of log2. */
template <int D>
KI_DEV void tile_soften(float (&s)[8][4], float (&acc)[D / 8][4], float (&m)[2], float (&sum)[2]) {
    float top[2] = {-1e30f, -1e30f};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) top[e / 2] = fmaxf(top[e / 2], s[n][e]);
    if (__any_sync(~0u, top[0] > m[0] || top[1] > m[1])) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
            top[i] = fmaxf(m[i], fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2)));
            float f = exp2_fast(m[i] - top[i]);
            m[i] = top[i];
            sum[i] *= f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) acc[n][2 * i] *= f, acc[n][2 * i + 1] *= f;
        }
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = exp2_fast(s[n][e] - m[e / 2]);
            sum[e / 2] += s[n][e];
        }
}

template <int D> struct prompt_state { float acc[D / 8][4], m[2], sum[2]; };

/* One tile of 64 tokens. Barriers keep tiles apart: all warps call it alike. */
template <int D>
KI_DEV void one_tile(prompt_state<D> &st, uint16_t *shared, const prompt_args &a, tile_job job,
                     const row_view &rows, uint32_t base, tile_need k_need, tile_need v_need) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint16_t *q = shared + warp * 16 * tile_shape<D>::STRIDE,
             *tile = shared + tile_shape<D>::HALVES;
    uint32_t k_sinks = a.l.k_bits == 16 ? 0 : a.l.sink_tokens;
    uint32_t v_sinks = a.l.v_bits == 16 ? 0 : a.l.sink_tokens;
    float s[8][4], other[8][4];
    job.keys = true;
    if (k_need.codes) {
        load_coded<D>(tile, a, job, base);
        tile_scores<D>(s, q, tile, lane);
        __syncthreads();
    }
    if (k_need.exact) {
        load_exact<D>(tile, a, job, base);
        tile_scores<D>(other, q, tile, lane);
        __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t pos = base + n * 8 + lane % 4 * 2 + e % 2;
            bool exact = pos < k_sinks || pos >= rows.k_exact[e / 2];
            bool seen = pos >= rows.first[e / 2] && pos < rows.end[e / 2];
            s[n][e] = seen ? (exact ? other[n][e] : s[n][e]) * a.factor : -INFINITY;
        }
    tile_soften<D>(s, st.acc, st.m, st.sum);
    job.keys = false;
    for (int pass = 0; pass < 2; pass++) {
        if (!(pass ? v_need.exact : v_need.codes)) continue;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t pos = base + n * 8 + lane % 4 * 2 + e % 2;
                bool exact = pos < v_sinks || pos >= rows.v_exact[e / 2];
                other[n][e] = exact == (pass == 1) ? s[n][e] : 0;
            }
        if (pass) load_exact<D>(tile, a, job, base);
        else load_coded<D>(tile, a, job, base);
        tile_values<D>(st.acc, other, tile, lane);
        __syncthreads();
    }
}

/* ---- tiles of the step's own rows: no codes, no store; the next tile is copied meanwhile ---- */

KI_DEV void copy_16_bytes_or_zeros(uint16_t *to, const uint16_t *from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
}

/* Begins to copy 64 rows of the step from position base on; rows behind the last are 0. */
template <int D>
KI_DEV void begin_tile(uint16_t *tile, const prompt_args &a, const ki_cuda_seq &s,
                       const uint16_t *rows, uint32_t kv_head, uint32_t base) {
    constexpr int STRIDE = tile_shape<D>::STRIDE, FOURS = D / 8;
    uint64_t stride = (uint64_t)a.l.n_kv_heads * D;
    const uint16_t *from = rows + s.first_row * stride + kv_head * D;
#pragma unroll 4
    for (uint32_t k = threadIdx.x; k < TILE * FOURS; k += PROMPT_THREADS) {
        uint32_t r = base - s.n_tokens + k / FOURS, c = k % FOURS * 8;
        bool is_there = r < s.n_rows;
        copy_16_bytes_or_zeros(tile + k / FOURS * STRIDE + c,
                               from + (is_there ? r : 0) * stride + c, is_there);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}
KI_DEV void wait_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

/* Tiles [from, end) of positions of the step. first, pos0: the first row's; a tile before pos0 and
 * behind the last row's window needs no mask. */
template <int D>
KI_DEV void plain_tiles(prompt_state<D> &st, uint16_t *shared, const prompt_args &a,
                        const ki_cuda_seq &s, uint32_t kv_head, const row_view &rows, uint32_t from,
                        uint32_t end, uint32_t pos0, uint32_t last_first) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint16_t *q = shared + warp * 16 * tile_shape<D>::STRIDE;
    uint16_t *k_tile = shared + tile_shape<D>::HALVES, *v_tile = k_tile + 2 * tile_shape<D>::HALVES;
    if (from >= end) return;
    begin_tile<D>(k_tile, a, s, a.k_rows, kv_head, from);
    begin_tile<D>(v_tile, a, s, a.v_rows, kv_head, from);
    for (uint32_t base = from, n = 0; base < end; base += TILE, n++) {
        uint32_t here = n % 2 * tile_shape<D>::HALVES, there = tile_shape<D>::HALVES - here;
        float scores[8][4];
        wait_but_one();
        __syncthreads(); /* keys are here; everybody is done with the tile before */
        begin_tile<D>(k_tile + there, a, s, a.k_rows, kv_head, base + TILE);
        tile_scores<D>(scores, q, k_tile + here, lane);
        bool is_masked = base + TILE > pos0 + 1 || base < last_first;
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t pos = base + i * 8 + lane % 4 * 2 + e % 2;
                bool seen = !is_masked || (pos >= rows.first[e / 2] && pos < rows.end[e / 2]);
                scores[i][e] = seen ? scores[i][e] * a.factor : -INFINITY;
            }
        tile_soften<D>(scores, st.acc, st.m, st.sum);
        wait_but_one();
        __syncthreads(); /* values are here */
        begin_tile<D>(v_tile + there, a, s, a.v_rows, kv_head, base + TILE);
        tile_values<D>(st.acc, scores, v_tile + here, lane);
    }
    wait_for_copies();
    __syncthreads();
}

/* ---- the same with 32 rows a warp: each operand out of shared memory is used twice ---- */

template <int D>
KI_DEV void wide_scores(float (&s)[2][8][4], const uint16_t *q, const uint16_t *k, uint32_t lane) {
    constexpr int STRIDE = tile_shape<D>::STRIDE;
    const uint16_t *q_at = q + lane % 16 * STRIDE + lane / 16 * 8;
    const uint16_t *k_at = k + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[0][n][e] = s[1][n][e] = 0;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
        uint32_t a[4], c[4], b[4];
        load_matrices(a, q_at + j * 16);
        load_matrices(c, q_at + 16 * STRIDE + j * 16);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            load_matrices(b, k_at + n * 8 * STRIDE + j * 16);
            mma(s[0][n], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma(s[0][n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            mma(s[1][n], c[0], c[1], c[2], c[3], b[0], b[1]);
            mma(s[1][n + 1], c[0], c[1], c[2], c[3], b[2], b[3]);
        }
    }
}

template <int D>
KI_DEV void wide_values(prompt_state<D> (&st)[2], const float (&p)[2][8][4], const uint16_t *v,
                        uint32_t lane) {
    constexpr int STRIDE = tile_shape<D>::STRIDE;
    const uint16_t *v_at = v + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            a[i][0] = pack2(p[i][2 * j][0], p[i][2 * j][1]);
            a[i][1] = pack2(p[i][2 * j][2], p[i][2 * j][3]);
            a[i][2] = pack2(p[i][2 * j + 1][0], p[i][2 * j + 1][1]);
            a[i][3] = pack2(p[i][2 * j + 1][2], p[i][2 * j + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            load_matrices_turned(b, v_at + j * 16 * STRIDE + n * 8);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                mma(st[i].acc[n], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                mma(st[i].acc[n + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
            }
        }
    }
}

/* Queries of n_rows rows from first_row on to shared memory; rows behind the last are 0. */
template <int D>
KI_DEV void load_queries(uint16_t *to, const prompt_args &a, const ki_cuda_seq &s,
                         uint32_t first_row, uint32_t n_rows, uint32_t head) {
    constexpr int STRIDE = tile_shape<D>::STRIDE, FOURS = D / 8;
    for (uint32_t k = threadIdx.x; k < n_rows * FOURS; k += PROMPT_THREADS) {
        uint32_t r = first_row + k / FOURS, c = k % FOURS * 8;
        bool is_there = r < s.n_rows;
        uint64_t row = s.first_row + (is_there ? r : 0);
        copy_16_bytes_or_zeros(to + k / FOURS * STRIDE + c,
                               a.q + (row * a.l.n_heads + head) * D + c, is_there);
    }
}

/* What a block of rows sees: positions [first, end), the first row's position, and the first
 * position of its last row. plain: from here on nothing but rows of the step. */
struct block_view {
    uint32_t first, end, pos0, pos1, last_first, begin, plain;
};

KI_DEV block_view view_block(const prompt_args &a, const ki_cuda_seq &s, uint32_t first_row,
                             uint32_t n_rows) {
    block_view v;
    v.pos0 = s.n_tokens + first_row;
    v.pos1 = s.n_tokens + min(first_row + n_rows, s.n_rows) - 1;
    v.end = v.pos1 + 1;
    v.first = a.window && v.pos0 + 1 > a.window ? v.pos0 + 1 - a.window : 0;
    v.last_first = a.window && v.end > a.window ? v.end - a.window : 0;
    v.begin = v.first / TILE * TILE;
    uint32_t line = max(k_line(a.l, s, v.pos1), v_line(a.l, s, v.pos1));
    v.plain = max(v.begin, (max(s.n_tokens, line) + TILE - 1) / TILE * TILE);
    return v;
}

template <int D>
KI_DEV void put_rows(float *row, const prompt_args &a, const ki_cuda_seq &s,
                     const prompt_state<D> &st, uint32_t first_row, uint32_t warp_rows,
                     uint32_t head) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[2];
    for (int i = 0; i < 2; i++) {
        sum[i] = st.sum[i] + __shfl_xor_sync(~0u, st.sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        sum[i] = sum[i] > 0 ? 1 / sum[i] : 0;
    }
    /* through shared memory, a row at a time of each warp: plus kinds turn it back there */
    for (uint32_t r = 0; r < 16; r++) {
        float *mine = row + warp * D;
        if (lane / 4 == r % 8)
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                uint32_t c = n * 8 + lane % 4 * 2;
                mine[c] = (r < 8 ? st.acc[n][0] : st.acc[n][2]) * sum[r / 8];
                mine[c + 1] = (r < 8 ? st.acc[n][1] : st.acc[n][3]) * sum[r / 8];
            }
        __syncthreads();
        if (a.l.is_plus)
            for (int w = 0; w < PROMPT_WARPS; w++)
                turn_row(row + w * D, D, threadIdx.x, PROMPT_THREADS);
        uint32_t at = first_row + warp * warp_rows + r;
        if (at < s.n_rows)
            for (uint32_t c = lane; c < D; c += 32)
                store_out(a.out, a.out_type,
                          (uint64_t)(s.first_row + at) * a.out_stride + head * D + c, mine[c]);
        __syncthreads();
    }
}

/* 64 rows, 16 a warp, that may see codes and the store. */
template <int D>
KI_DEV void any_rows(uint16_t *tiles, const prompt_args &a, const ki_cuda_seq &s,
                     uint32_t first_row, uint32_t head) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (first_row >= s.n_rows) return;
    load_queries<D>(tiles, a, s, first_row, TILE, head);
    wait_for_copies();
    __syncthreads();
    row_view rows = view_rows(a, s, first_row + warp * 16 + lane / 4);
    block_view v = view_block(a, s, first_row, TILE);
    uint32_t k_sinks = a.l.k_bits == 16 ? 0 : a.l.sink_tokens;
    uint32_t v_sinks = a.l.v_bits == 16 ? 0 : a.l.sink_tokens;
    prompt_state<D> st = {};
    st.m[0] = st.m[1] = -1e30f;
    uint32_t plain = a.is_piped ? min(v.plain, v.end) : v.end;
    for (uint32_t base = v.begin; base < plain; base += TILE) {
        tile_need k =
            need_of(base, v.first, v.end, k_sinks, k_line(a.l, s, v.pos0), k_line(a.l, s, v.pos1));
        tile_need n =
            need_of(base, v.first, v.end, v_sinks, v_line(a.l, s, v.pos0), v_line(a.l, s, v.pos1));
        tile_job job = {&s, head / a.l.head_group, v.first, v.end, true};
        one_tile<D>(st, tiles, a, job, rows, base, k, n);
    }
    plain_tiles<D>(st, tiles, a, s, head / a.l.head_group, rows, plain, v.end, v.pos0,
                   v.last_first);
    put_rows<D>((float *)tiles, a, s, st, first_row, 16, head);
}

/* 128 rows, 32 a warp, that see rows of the step only. */
template <int D>
KI_DEV void wide_rows(uint16_t *tiles, const prompt_args &a, const ki_cuda_seq &s,
                      uint32_t first_row, uint32_t head, const block_view &v) {
    constexpr int HALVES = tile_shape<D>::HALVES, STRIDE = tile_shape<D>::STRIDE;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = head / a.l.head_group;
    uint16_t *k_tile = tiles + 2 * HALVES, *v_tile = k_tile + 2 * HALVES;
    const uint16_t *q = tiles + warp * 32 * STRIDE;
    prompt_state<D> st[2] = {};
    row_view rows[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        rows[i] = view_rows(a, s, first_row + warp * 32 + i * 16 + lane / 4);
        st[i].m[0] = st[i].m[1] = -1e30f;
    }
    load_queries<D>(tiles, a, s, first_row, 2 * TILE, head);
    begin_tile<D>(k_tile, a, s, a.k_rows, kv_head, v.begin);
    begin_tile<D>(v_tile, a, s, a.v_rows, kv_head, v.begin);
    for (uint32_t base = v.begin, n = 0; base < v.end; base += TILE, n++) {
        uint32_t here = n % 2 * HALVES, there = HALVES - here;
        float scores[2][8][4];
        wait_for_copies();
        __syncthreads(); /* this tile is here, and everybody is done with the one before */
        begin_tile<D>(k_tile + there, a, s, a.k_rows, kv_head, base + TILE);
        begin_tile<D>(v_tile + there, a, s, a.v_rows, kv_head, base + TILE);
        wide_scores<D>(scores, q, k_tile + here, lane);
        bool is_masked = base + TILE > v.pos0 + 1 || base < v.last_first;
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int c = 0; c < 8; c++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    uint32_t pos = base + c * 8 + lane % 4 * 2 + e % 2;
                    bool seen =
                        !is_masked || (pos >= rows[i].first[e / 2] && pos < rows[i].end[e / 2]);
                    scores[i][c][e] = seen ? scores[i][c][e] * a.factor : -INFINITY;
                }
            tile_soften<D>(scores[i], st[i].acc, st[i].m, st[i].sum);
        }
        wide_values<D>(st, scores, v_tile + here, lane);
    }
    wait_for_copies();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++)
        put_rows<D>((float *)tiles, a, s, st[i], first_row + i * 16, 32, head);
}

/* Rows of a thread block. */
template <int D> struct block_shape {
    static constexpr uint32_t ROWS = D <= 128 ? 2 * TILE : TILE;
};

template <int D>
static __global__ void __launch_bounds__(PROMPT_THREADS, D <= 128 ? 2 : 1)
    ki_prompt_kernel(const __grid_constant__ prompt_args a) {
    extern __shared__ __align__(16) uint16_t tiles[];
    constexpr uint32_t ROWS = block_shape<D>::ROWS;
    /* the last rows see the most: they go first */
    uint32_t per_tile = gridDim.x / a.n_tiles, rest = blockIdx.x % per_tile;
    uint32_t first_row = (a.n_tiles - 1 - blockIdx.x / per_tile) * ROWS;
    uint32_t head = rest % a.l.n_heads, slot = rest / a.l.n_heads;
    wait_for_previous();
    let_next_begin();
    const ki_cuda_seq s = a.seqs[slot];
    if (first_row >= s.n_rows || s.flags & KI_CUDA_ELSEWHERE) return;
    if constexpr (D <= 128) {
        block_view v = view_block(a, s, first_row, ROWS);
        if (v.plain == v.begin) {
            wide_rows<D>(tiles, a, s, first_row, head, v);
            return;
        }
    }
    for (uint32_t r = 0; r < ROWS; r += TILE) any_rows<D>(tiles, a, s, first_row + r, head);
}

/* ---- host calls ---- */

/* Queries, and two tiles of keys and of values; or one tile of either where that is too much for
 * the device (head size 256 below sm_90). */
template <int D> static constexpr uint32_t prompt_shared_bytes(bool is_piped) {
    return (block_shape<D>::ROWS / TILE + (is_piped ? 4 : 1)) * tile_shape<D>::HALVES * 2;
}

static uint32_t shared_limit() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return (uint32_t)bytes;
}

template <int D> static cudaError_t prompt_prepare(void) {
    bool is_piped = prompt_shared_bytes<D>(true) <= shared_limit();
    return cudaFuncSetAttribute(ki_prompt_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                prompt_shared_bytes<D>(is_piped));
}

template <int D>
static cudaError_t prompt_launch(prompt_args a, uint32_t n_blocks, bool pdl, void *stream) {
    a.is_piped = prompt_shared_bytes<D>(true) <= shared_limit();
    return ki_launch(ki_prompt_kernel<D>, n_blocks, PROMPT_THREADS,
                     prompt_shared_bytes<D>(a.is_piped), pdl, stream, a);
}

kivi_status ki_cuda_prompt_prepare(kivi_error *err) {
    cudaError_t all[] = {prompt_prepare<64>(), prompt_prepare<80>(), prompt_prepare<96>(),
                         prompt_prepare<128>(), prompt_prepare<256>()};
    for (cudaError_t e : all) KI_TRY(ki_cuda_check(e, "shared memory of prompt attention", err));
    return KIVI_OK;
}

kivi_status ki_cuda_prompt_attend(const ki_cuda_attend_call *c, void *stream, kivi_error *err) {
    const ki_cuda_layout *l = &c->cache->layout;
    prompt_args a = {};
    a.l = *l;
    a.pool = c->cache->pool;
    a.tables = c->cache->tables;
    a.table_stride = c->cache->table_stride;
    a.seqs = c->cache->seqs;
    a.q = c->q, a.k_rows = c->k_rows, a.v_rows = c->v_rows;
    a.out = c->out, a.out_stride = c->out_stride, a.out_type = c->out_type;
    a.layer = c->layer, a.window = c->window;
    a.factor = c->scale * 1.44269504088896340736f;
    uint32_t block_rows = l->head_dim <= 128 ? 2 * TILE : TILE;
    a.n_tiles = (c->max_rows + block_rows - 1) / block_rows;
    uint32_t n = c->cache->n_seqs * l->n_heads * a.n_tiles;
    cudaError_t e = cudaErrorInvalidValue;
    switch (l->head_dim) {
    case 64: e = prompt_launch<64>(a, n, c->pdl, stream); break;
    case 80: e = prompt_launch<80>(a, n, c->pdl, stream); break;
    case 96: e = prompt_launch<96>(a, n, c->pdl, stream); break;
    case 128: e = prompt_launch<128>(a, n, c->pdl, stream); break;
    case 256: e = prompt_launch<256>(a, n, c->pdl, stream); break;
    }
    return ki_cuda_check(e, "prompt attention", err);
}
