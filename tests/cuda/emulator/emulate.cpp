/* emulate.cpp: fibers that wait for each other, and what they wait for. */
#include "emulate.h"
#include "cuda.cuh"
#include "fibers.h"

#include <deque>
#include <map>
#include <stdarg.h>
#include <stdio.h>
#include <string>
#include <vector>

emulated_index threadIdx, blockIdx, blockDim, gridDim;
emulated_world emulated;
emulated_tally emulated_counts;
float emulated_halves[65536];
alignas(128) thread_local uint8_t shared[EMULATED_SHARED_BYTES + 4096]; /* and what is beyond */

enum { LANES = 32, MOST_WARPS = MOST_FIBERS / LANES };
enum { NO_NUMBER = 0xff }; /* bytes of it are no number in float16 and float32 */

namespace {

enum waiting { FOR_NOTHING, FOR_WARP, FOR_BLOCK, FOR_BARRIER, FOR_KERNEL };

struct copy {
    uint32_t to, bar;
    std::vector<uint8_t> bytes; /* as they were when the copy began */
};
struct thread {
    waiting wait;
    bool is_done;
    uint64_t turn;                        /* of the warp or the block that it waits for */
    std::deque<std::vector<copy>> groups; /* cp.async: committed, oldest first */
    std::vector<copy> open;               /* not yet committed */
};
struct warp {
    uint32_t n_here;
    emulated_op op;
    uint64_t turn;
    uint64_t in[LANES], out[LANES];
    uint32_t arg[LANES];
    float d[LANES][4];
    uint32_t a[LANES][4], b[LANES][2];
};
struct barrier {
    uint32_t count, pending;
    int64_t n_bytes; /* that are to come in this phase */
    uint64_t phase;
};

thread threads[MOST_FIBERS];
warp warps[MOST_WARPS];
std::map<uint32_t, barrier> barriers;
std::vector<copy> copies; /* bulk copies under way */
uint32_t current, n_threads, n_in_block;
uint64_t block_turn, progress, random_state;
bool kernel_before_ended;
void (*the_kernel)(void *);
void *the_args;
std::string problem;

uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % n;
}

/* ---- waiting ---- */

void wait_for(waiting what, uint64_t turn) {
    threads[current].wait = what;
    threads[current].turn = turn;
    fiber_leave(current);
    threads[current].wait = FOR_NOTHING;
}

bool can_go_on(uint32_t i) {
    const thread &t = threads[i];
    if (t.is_done) return false;
    if (t.wait == FOR_WARP) return warps[i / LANES].turn != t.turn;
    if (t.wait == FOR_BLOCK) return block_turn != t.turn;
    if (t.wait == FOR_KERNEL) return kernel_before_ended;
    return true;
}

void thread_begins(void) {
    the_kernel(the_args);
    threads[current].is_done = true;
    progress++;
    fiber_leave(current);
}

/* ---- what a warp does together ---- */

/* Operands as ptx.cuh has them; sums run over k in order, rounded once a step. */
void multiply(warp &w) {
    float a[16][16], b[16][8];
    for (int l = 0; l < LANES; l++)
        for (int h = 0; h < 2; h++) {
            int g = l / 4, c = l % 4 * 2 + h;
            for (int r = 0; r < 4; r++)
                a[g + r % 2 * 8][c + r / 2 * 8] = emulated_half(w.a[l][r] >> 16 * h);
            for (int r = 0; r < 2; r++) b[c + r * 8][g] = emulated_half(w.b[l][r] >> 16 * h);
        }
    float d[16][8] = {};
    for (int k = 0; k < 16; k++)
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 8; c++) d[r][c] += a[r][k] * b[k][c];
    for (int l = 0; l < LANES; l++)
        for (int e = 0; e < 4; e++) w.d[l][e] += d[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
}

void turn_matrix(warp &w) {
    uint16_t m[8][8];
    for (int l = 0; l < LANES; l++)
        for (int h = 0; h < 2; h++) m[l / 4][l % 4 * 2 + h] = (uint16_t)(w.in[l] >> 16 * h);
    for (int l = 0; l < LANES; l++)
        w.out[l] = m[l % 4 * 2][l / 4] | (uint32_t)m[l % 4 * 2 + 1][l / 4] << 16;
}

void shuffle(warp &w) {
    for (uint32_t l = 0; l < LANES; l++) {
        uint32_t from = w.op == OP_SHUFFLE ? w.arg[l] : l ^ w.arg[l];
        if (w.op == OP_SHUFFLE_UP) from = l >= w.arg[l] ? l - w.arg[l] : l;
        if (from >= LANES) emulate_fail("a shuffle from lane %u", from);
        w.out[l] = w.in[from];
    }
}

void vote(warp &w) {
    uint64_t any = 0;
    for (uint64_t x : w.in) any |= x;
    for (uint64_t &x : w.out) x = any;
}

void do_together(warp &w) {
    switch (w.op) {
    case OP_SHUFFLE:
    case OP_SHUFFLE_UP:
    case OP_SHUFFLE_XOR: return shuffle(w);
    case OP_ANY: return vote(w);
    case OP_TURN: return turn_matrix(w);
    case OP_MMA: return multiply(w);
    case OP_SYNC: return;
    }
}

/* The last lane to come does it for all. */
void meet(warp &w, emulated_op op) {
    if (w.n_here && w.op != op)
        emulate_fail("lanes of a warp in different instructions, %d and %d", w.op, op);
    w.op = op;
    if (++w.n_here < LANES) return wait_for(FOR_WARP, w.turn);
    do_together(w);
    w.n_here = 0;
    w.turn++;
    progress++;
}

/* ---- shared memory and copies into it ---- */

copy begin_copy(uint32_t to, const void *from, uint32_t n_bytes, uint32_t bar) {
    if (to % 16 || (uintptr_t)from % 16 || n_bytes % 16 || !n_bytes)
        emulate_fail("a copy of %u bytes to %u that is not aligned to 16", n_bytes, to);
    if (to + (uint64_t)n_bytes > sizeof shared) emulate_fail("a copy beyond shared memory");
    auto above = barriers.lower_bound(to);
    if (above != barriers.end() && above->first < to + n_bytes)
        emulate_fail("a copy over the barrier at %u", above->first);
    const uint8_t *bytes = (const uint8_t *)from;
    emulated_counts.n_copies++;
    if (!kernel_before_ended) emulated_counts.n_early_copies++;
    return {to, bar, std::vector<uint8_t>(bytes, bytes + n_bytes)};
}

void no_overlap(const std::vector<copy> &others, const copy &c) {
    for (const copy &o : others)
        if (c.to < o.to + o.bytes.size() && o.to < c.to + c.bytes.size())
            emulate_fail("a copy to %u while another one to %u is under way", c.to, o.to);
}

void arrive_bytes(const copy &c) { memcpy(shared + c.to, c.bytes.data(), c.bytes.size()); }

barrier &barrier_at(uint32_t at) {
    auto found = barriers.find(at);
    if (found == barriers.end()) emulate_fail("a barrier at %u that was not made", at);
    return found->second;
}

void end_phase(barrier &b) {
    if (b.pending || b.n_bytes) return;
    b.phase++;
    b.pending = b.count;
    progress++;
}

void end_copy(const copy &c) {
    barrier &b = barrier_at(c.bar);
    arrive_bytes(c);
    b.n_bytes -= (int64_t)c.bytes.size();
    progress++;
    end_phase(b);
}

void end_copies_of(uint32_t bar) {
    for (size_t i = 0; i < copies.size();) {
        if (copies[i].bar == bar) {
            copy c = copies[i];
            copies.erase(copies.begin() + (ptrdiff_t)i);
            end_copy(c);
        } else i++;
    }
}

/* ---- a thread block ---- */

void begin_block(uint32_t n) {
    n_threads = n, n_in_block = 0;
    barriers.clear(), copies.clear();
    for (warp &w : warps) w.n_here = 0;
    for (uint32_t i = 0; i < n; i++) {
        threads[i] = {};
        fiber_make(i, thread_begins);
    }
    memset(shared, NO_NUMBER, sizeof shared);
}

/* Every thread that can go on goes on once; false: none could. */
bool round_of_threads(void) {
    bool any = false;
    uint32_t first = random_below(n_threads / LANES) * LANES;
    for (uint32_t x = 0; x < n_threads && problem.empty(); x++) {
        uint32_t i = (x + first) % n_threads;
        if (!can_go_on(i)) continue;
        current = i, threadIdx = {i, 0, 0};
        any = true;
        fiber_enter(i);
    }
    return any;
}

void show_world(void) {
    kernel_before_ended = true;
    if (emulated.show) emulated.show();
}

const char *name_of(waiting w) {
    static const char *names[] = {"running", "for its warp", "for the block", "at a barrier",
                                  "for the kernel before"};
    return names[w];
}

/* Nobody can go on: what waits for the kernel before may, else it is the end. */
void go_on_or_fail(void) {
    bool is_waiting = false;
    uint32_t stuck = 0;
    for (uint32_t i = 0; i < n_threads; i++) {
        if (threads[i].is_done) continue;
        is_waiting = is_waiting || threads[i].wait == FOR_KERNEL;
        stuck = i;
    }
    if (is_waiting && !kernel_before_ended) show_world();
    else if (problem.empty())
        problem = "threads wait for ever: " + std::to_string(stuck) + " waits " +
                  name_of(threads[stuck].wait);
}

bool all_done(void) {
    for (uint32_t i = 0; i < n_threads; i++)
        if (!threads[i].is_done) return false;
    return true;
}

/* What a block must leave in order. */
const char *what_is_left(uint32_t shared_bytes, bool pdl) {
    if (!copies.empty()) return "a copy that nobody waited for";
    for (uint32_t i = 0; i < n_threads; i++)
        for (const auto &g : threads[i].groups)
            if (!g.empty()) return "a group of copies that nobody waited for";
    for (const auto &b : barriers)
        if (b.second.n_bytes) return "a barrier that waits for bytes";
    for (size_t i = shared_bytes; i < sizeof shared; i++)
        if (shared[i] != NO_NUMBER) return "written behind the block's shared memory";
    return pdl && !kernel_before_ended ? "no wait for the kernel before" : NULL;
}

void run_block(uint32_t n, uint32_t shared_bytes, bool pdl) {
    begin_block(n);
    kernel_before_ended = false;
    if (emulated.hide) emulated.hide();
    if (!pdl) show_world();
    while (problem.empty() && !all_done()) {
        uint64_t before = progress;
        /* threads at a barrier look again each round: without progress that is no going on */
        if (!round_of_threads() || progress == before) go_on_or_fail();
    }
    const char *left = problem.empty() ? what_is_left(shared_bytes, pdl) : NULL;
    if (left) problem = left;
    if (!kernel_before_ended) show_world();
}

} // namespace

/* ---- launches ---- */

void emulate_seed(uint64_t seed) {
    random_state = seed;
    for (uint32_t h = 0; h < 65536; h++) emulated_halves[h] = ki_f16_to_f32((uint16_t)h);
}

void emulate_launch(uint32_t n_blocks, uint32_t n, uint32_t shared_bytes, bool pdl,
                    void (*kernel)(void *), void *args) {
    blockDim = {n, 1, 1}, gridDim = {n_blocks, 1, 1};
    the_kernel = kernel, the_args = args;
    emulated_counts.n_launches++;
    if (n > MOST_FIBERS || n % LANES) problem = "a thread block of a size that is not emulated";
    if (shared_bytes > EMULATED_SHARED_BYTES) problem = "more shared memory than there is";
    for (uint32_t b = 0; b < n_blocks && problem.empty(); b++) {
        blockIdx = {b, 0, 0};
        emulated_counts.n_blocks++;
        run_block(n, shared_bytes, pdl);
    }
}

const char *emulate_problem(void) { return problem.empty() ? NULL : problem.c_str(); }
void emulate_clear(void) { problem.clear(); }

void emulate_fail(const char *format, ...) {
    char text[300], where[60];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    snprintf(where, sizeof where, " (thread %u of block %u)", current, blockIdx.x);
    problem = std::string(text) + where;
    for (;;) fiber_leave(current); /* and never comes back */
}

/* ---- one thread's instructions ---- */

uint64_t emulate_warp(emulated_op op, uint64_t x, uint32_t arg) {
    warp &w = warps[current / LANES];
    uint32_t lane = current % LANES;
    w.in[lane] = x, w.arg[lane] = arg;
    meet(w, op);
    return w.out[lane];
}

void emulate_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    warp &w = warps[current / LANES];
    uint32_t lane = current % LANES;
    memcpy(w.d[lane], d, sizeof d);
    memcpy(w.a[lane], a, sizeof a);
    memcpy(w.b[lane], b, sizeof b);
    meet(w, OP_MMA);
    memcpy(d, w.d[lane], sizeof d);
}

void emulate_sync_block(void) {
    if (++n_in_block < n_threads) return wait_for(FOR_BLOCK, block_turn);
    n_in_block = 0;
    block_turn++;
    progress++;
}

void emulate_pdl_wait(void) {
    if (!kernel_before_ended) wait_for(FOR_KERNEL, 0);
}

void emulate_reads(const void *at, size_t n_bytes) {
    if (emulated.holds && !emulated.holds(at, n_bytes))
        emulate_fail("%zu bytes read outside of the cache", n_bytes);
}

uint32_t emulate_address(const void *in_shared) {
    size_t at = (size_t)((const uint8_t *)in_shared - shared);
    if (at >= sizeof shared) emulate_fail("an address that is not in shared memory");
    return (uint32_t)at;
}

void emulate_copy16(uint32_t to, const void *from, bool is_there) {
    alignas(16) static const uint8_t zeros[16] = {};
    if (is_there) emulate_reads(from, 16);
    copy c = begin_copy(to, is_there ? from : zeros, 16, 0);
    thread &t = threads[current];
    no_overlap(t.open, c);
    for (const auto &g : t.groups) no_overlap(g, c);
    memset(shared + to, NO_NUMBER, 16);
    t.open.push_back(c);
}
void emulate_end_copies(void) {
    thread &t = threads[current];
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}
void emulate_wait_copies(uint32_t n_newest) {
    thread &t = threads[current];
    for (; t.groups.size() > n_newest; t.groups.pop_front())
        for (const copy &c : t.groups.front()) arrive_bytes(c);
}

void emulate_bar_init(uint32_t bar, uint32_t count) {
    if (bar % 8) emulate_fail("a barrier at %u", bar);
    barriers[bar] = {count, count, 0, 0};
}
void emulate_bar_arrive(uint32_t bar) {
    barrier &b = barrier_at(bar);
    if (!b.pending) emulate_fail("more arrivals at a barrier than it expects");
    b.pending--;
    end_phase(b);
}
void emulate_bar_expect(uint32_t bar, uint32_t n_bytes) { barrier_at(bar).n_bytes += n_bytes; }
void emulate_bar_wait(uint32_t bar, uint32_t parity) {
    while ((barrier_at(bar).phase & 1) == parity) {
        end_copies_of(bar);
        if ((barrier_at(bar).phase & 1) == parity) wait_for(FOR_BARRIER, 0);
    }
}

/* Half of them come at once: neither order may matter. */
void emulate_bulk_copy(uint32_t to, const void *from, uint32_t n_bytes, uint32_t bar) {
    emulate_reads(from, n_bytes);
    copy c = begin_copy(to, from, n_bytes, bar);
    no_overlap(copies, c);
    memset(shared + to, NO_NUMBER, n_bytes);
    if (random_below(2)) copies.push_back(c);
    else end_copy(c);
}
