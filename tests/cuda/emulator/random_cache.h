/* random_cache.h: one step of decoding over a cache of random contents, and what attention over it
 * must give, in float64. All that a kernel may read ends at a page that nobody may read. */
#ifndef KI_RANDOM_CACHE_H
#define KI_RANDOM_CACHE_H
#include "kv_cuda.h"
#include "kv_plan.h"

#include <string>
#include <utility>
#include <vector>

struct random_source {
    uint64_t state;
    uint64_t u64(void);
    uint32_t below(uint32_t n) { return (uint32_t)(u64() % n); }
    template <size_t N> uint32_t one_of(const uint32_t (&list)[N]) { return list[below(N)]; }
    float uniform(void);
    float normal(void);
};

/* Memory whose end is at most 255 bytes before an unreadable page; 256-byte aligned. What is
 * between its end and that page is known. */
class guarded_bytes {
  public:
    ~guarded_bytes() { release(); }
    void make(size_t n_bytes);
    bool has(const void *at, size_t n) const;
    bool is_intact(void) const; /* nothing was written behind the end */
    uint8_t *data = nullptr;
    size_t n_bytes = 0;

  private:
    void release(void);
    uint8_t *map = nullptr;
    size_t map_bytes = 0;
};
template <class T> struct guarded : guarded_bytes {
    void make(size_t n) { guarded_bytes::make(n * sizeof(T)); }
    T *p(void) const { return (T *)data; }
    T &operator[](size_t i) const { return p()[i]; }
};

struct kv_kind {
    const char *name;
    uint32_t k_bits, v_bits, group;
    bool is_plus;
};

/* Layers: attention is of the last one. */
enum { CACHE_LAYERS = 2, CACHE_LAYER = 1 };

class random_cache {
  public:
    /* False: there is no such kind at this head size, or no kernel for it on the drawn device. */
    bool draw(const kv_kind &kind, uint32_t head_dim, random_source &random);
    void plan_on_host(void); /* items: what ki_cuda_decode_plan must write */
    /* Takes away what kernels of the same step write before attention (rows at pos, queries, scales
     * of codes that this step makes), and gives it back. */
    void hide(void);
    void show(void);
    /* From here on rows at pos are not written before attention, but by it, from own_rows: what it
     * puts there is taken away again before each thread block. Only with both sides packed. */
    void begin_own(void);
    std::string end_own(void); /* what is wrong with the rows; nothing: "" */
    bool is_packed(void) const { return l.k_bits < 16 && l.v_bits < 16; }
    bool holds(const void *at, size_t n) const;
    /* RMS of the error over RMS of the result, of one sequence; -1: it has no row. */
    double error_of(uint32_t i) const;
    std::string text(void) const;

    ki_cuda_layout l;
    uint32_t head_dim, n_kv_heads, n_seqs, n_rows, stride, most_tokens, window, split_tokens,
        shared_bytes, n_sms, max_splits;
    float scale;
    ki_cuda_type out_type;
    bool pdl;
    guarded<uint8_t> pool, rings, sinks, out, workspace;
    guarded<uint32_t> tables;
    guarded<uint16_t> q;
    guarded<float> own_rows, rope; /* [n_rows][H + 2 Hk][D], [n_rows][D/2][2]: q is made of them */
    guarded<ki_cuda_seq> seqs;
    std::vector<ki_plan_item> items;
    std::vector<ki_plan_slot> slots;

  private:
    bool draw_layout(const kv_kind &kind, random_source &random);
    void draw_lengths(random_source &random);
    void draw_sequence(uint32_t i, random_source &random);
    void make_memory(random_source &random);
    void fill_page(uint8_t *page, random_source &random) const;
    void draw_own_rows(random_source &random);
    void list_hidden(void);
    void hide_codes(const ki_cuda_seq &s, uint32_t head);
    void hide_value(uint16_t *at);
    bool is_seen(const ki_cuda_seq &s, uint32_t pos) const;
    uint8_t *page_at(const ki_cuda_seq &s, uint32_t pos, uint32_t head) const;
    uint8_t *sub_at(uint8_t *page, uint32_t pos) const;
    uint16_t *exact_at(const ki_cuda_seq &s, uint32_t head, uint32_t pos, uint32_t c,
                       bool keys) const;
    uint16_t *paged_at(const ki_cuda_seq &s, uint32_t head, uint32_t pos, uint32_t c,
                       bool keys) const;
    float coded_key(const ki_cuda_seq &s, uint32_t head, uint32_t pos, uint32_t c) const;
    float coded_value(const ki_cuda_seq &s, uint32_t head, uint32_t pos, uint32_t c) const;
    float element(const ki_cuda_seq &s, const ki_plan_ranges &r, uint32_t head, uint32_t pos,
                  uint32_t c, bool keys) const;
    std::vector<double> attend(const ki_cuda_seq &s, uint32_t h, const std::vector<float> &keys,
                               const std::vector<float> &values) const;
    float out_at(uint64_t i) const;

    bool is_long; /* few heads, thousands of tokens */
    const char *kind_name;
    uint32_t big_blocks; /* of a ring that holds a prompt from its start */
    uint64_t ring_bytes;
    bool is_hidden, is_own;
    std::vector<std::pair<uint16_t *, uint16_t>> hidden; /* where, and what belongs there */
    struct own_element {
        uint16_t *at, truth;
        bool was_written;
    };
    std::vector<own_element> own_elements; /* of rows at pos */
    std::vector<float> own_rows_hidden;
};

#endif
