/* random_oracle.cpp: attention over a random cache by its definition: every element is decoded by
 * itself, all sums are in float64. */
#include "random_cache.h"

#include <math.h>

static uint32_t bits_at(const uint8_t *plane, ki_order_place p, uint32_t bits) {
    uint32_t w;
    memcpy(&w, plane + p.word * 4, 4);
    return w >> p.bit & ((1u << bits) - 1);
}

float random_cache::coded_key(const ki_cuda_seq &s, uint32_t head, uint32_t pos, uint32_t c) const {
    if (l.k_bits == 16) return ki_f16_to_f32(*paged_at(s, head, pos, c, true));
    uint8_t *page = page_at(s, pos, head), *sub = sub_at(page, pos);
    uint32_t d = head_dim, steps = d / 16;
    uint32_t code = bits_at(sub + l.k_at, ki_order_key(pos % 32, c, steps, l.k_bits), l.k_bits);
    if (l.is_plus && l.k_bits == 2) {
        uint32_t w = c / 4; /* fill_page: of channels 4 w .. 4 w + 3 one is wide */
        ki_order_place p = ki_order_key(pos % 32, w, (d / 4 + 15) / 16, 2);
        if (page[l.list_at + w] == c) code |= bits_at(sub + l.wide_at, p, 2) << 2;
    }
    uint32_t group = pos % (l.head_bytes ? 128 : 32) / l.k_group;
    const uint8_t *base = l.head_bytes ? page : sub;
    uint32_t at = group * d + ki_order_key_scale(c, steps);
    return (float)code * ki_f16_to_f32(((const uint16_t *)(base + l.k_scale_at))[at]) +
           ki_f16_to_f32(((const uint16_t *)(base + l.k_zero_at))[at]);
}

float random_cache::coded_value(const ki_cuda_seq &s, uint32_t head, uint32_t pos,
                                uint32_t c) const {
    if (l.v_bits == 16) return ki_f16_to_f32(*paged_at(s, head, pos, c, false));
    const uint8_t *sub = sub_at(page_at(s, pos, head), pos);
    uint32_t steps = head_dim / 16, low = l.v_bits == 3 ? 2 : l.v_bits;
    uint32_t code = bits_at(sub + l.v_at, ki_order_value(pos % 32, c, steps, low), low);
    if (l.v_bits == 3)
        code |= bits_at(sub + l.third_at, ki_order_value(pos % 32, c, steps, 1), 1) << 2;
    uint32_t at = c / l.v_group * 32 + ki_order_value_scale(pos % 32);
    float step = ki_f16_to_f32(((const uint16_t *)(sub + l.v_scale_at))[at]);
    if (l.is_plus) return ((float)code - (l.v_bits == 3 ? 3.5f : 1.5f)) * step;
    return (float)code * step + ki_f16_to_f32(((const uint16_t *)(sub + l.v_zero_at))[at]);
}

float random_cache::element(const ki_cuda_seq &s, const ki_plan_ranges &r, uint32_t head,
                            uint32_t pos, uint32_t c, bool keys) const {
    uint32_t bits = keys ? l.k_bits : l.v_bits, exact = keys ? r.k_exact : r.v_exact;
    if (bits < 16 && (pos < l.sink_tokens || pos >= exact))
        return ki_f16_to_f32(*exact_at(s, head, pos, c, keys));
    return keys ? coded_key(s, head, pos, c) : coded_value(s, head, pos, c);
}

/* Back from the turned channels of + values: a Hadamard matrix of the largest power of two in D. */
static void turn(std::vector<double> &row) {
    size_t d = row.size(), block = d & (0 - d);
    for (size_t h = 1; h < block; h *= 2)
        for (size_t c = 0; c < d; c++) {
            if (c / h % 2) continue;
            double x = row[c], y = row[c + h];
            row[c] = x + y, row[c + h] = x - y;
        }
    for (double &x : row) x /= sqrt((double)block);
}

/* Head h of the row; keys and values [m][D] of the KV head. */
std::vector<double> random_cache::attend(const ki_cuda_seq &s, uint32_t h,
                                         const std::vector<float> &keys,
                                         const std::vector<float> &values) const {
    uint32_t d = head_dim;
    size_t m = keys.size() / d;
    const uint16_t *row = q.p() + ((size_t)s.first_row * l.n_heads + h) * d;
    std::vector<double> score(m), sum(d);
    double most = -INFINITY, all = 0;
    for (size_t t = 0; t < m; t++) {
        for (uint32_t c = 0; c < d; c++)
            score[t] += (double)ki_f16_to_f32(row[c]) * keys[t * d + c];
        score[t] *= scale;
        most = fmax(most, score[t]);
    }
    for (size_t t = 0; t < m; t++) {
        double p = exp(score[t] - most);
        all += p;
        for (uint32_t c = 0; c < d; c++) sum[c] += p * values[t * d + c];
    }
    for (double &x : sum) x /= all;
    if (l.is_plus) turn(sum);
    return sum;
}

float random_cache::out_at(uint64_t i) const {
    if (out_type == KI_CUDA_F32) return ((const float *)out.data)[i];
    uint16_t h = ((const uint16_t *)out.data)[i];
    return out_type == KI_CUDA_F16 ? ki_f16_to_f32(h) : ki_bf16_to_f32(h);
}

double random_cache::error_of(uint32_t i) const {
    const ki_cuda_seq &s = seqs[i];
    if (s.n_rows != 1) return -1;
    ki_plan_ranges r = ki_plan_of(&l, &s, window);
    double off = 0, norm = 0;
    for (uint32_t kv = 0; kv < n_kv_heads; kv++) {
        std::vector<float> keys, values;
        for (uint32_t pos = r.first; pos < r.end; pos++)
            for (uint32_t c = 0; c < head_dim; c++) {
                keys.push_back(element(s, r, kv, pos, c, true));
                values.push_back(element(s, r, kv, pos, c, false));
            }
        for (uint32_t h = kv * l.head_group; h < (kv + 1) * l.head_group; h++) {
            std::vector<double> expected = attend(s, h, keys, values);
            for (uint32_t c = 0; c < head_dim; c++) {
                uint64_t at = ((uint64_t)s.first_row * l.n_heads + h) * head_dim + c;
                double e = out_at(at) - expected[c];
                off += e * e, norm += expected[c] * expected[c];
            }
        }
    }
    return sqrt(off / norm);
}
