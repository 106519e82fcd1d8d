/* emulate.h: a multiprocessor on a CPU, for kernels that are compiled as C++ (cuda.cuh, ptx.cuh).
 *
 * One thread block runs after the other, each of its threads a fiber with a stack of its own. A
 * fiber runs until it must wait for others: for the lanes of its warp (shuffles, products,
 * __syncwarp), for the block (__syncthreads), for a barrier's copies, for the kernel before
 * (ki_pdl_wait). What a GPU may do late is done as late as it can be: bytes of a copy come when
 * somebody waits for them and until then what is in their place is no number; the kernel before
 * ends when no thread can go on without it.
 *
 * What CUDA leaves undefined ends the launch with a message (emulate_problem): lanes of a warp that
 * meet in different instructions, copies that overlap, are misaligned or are never waited for,
 * barriers used before they are made, threads that wait for each other, addresses outside of what
 * the kernel was given. */
#ifndef KI_EMULATE_H
#define KI_EMULATE_H
#include <stddef.h>
#include <stdint.h>

enum { EMULATED_SHARED_BYTES = 227 * 1024 }; /* of a thread block: the most that sm_90 has */

struct emulated_index {
    uint32_t x, y, z;
};
extern emulated_index threadIdx, blockIdx, blockDim, gridDim;
extern thread_local uint8_t shared[]; /* the kernels' name for it */

/* ---- launches ---- */

/* What the checks know of the world outside of the kernel. hide and show are called before each
 * thread block and when the kernel before it has ended (a kernel without pdl: at once): what that
 * kernel writes is to be seen after the wait only. holds: whether the kernel may read these bytes.
 */
struct emulated_world {
    void (*hide)(void);
    void (*show)(void);
    bool (*holds)(const void *at, size_t n_bytes);
};
extern emulated_world emulated;

void emulate_seed(uint64_t seed); /* of the order in which warps run and copies come */
void emulate_launch(uint32_t n_blocks, uint32_t n_threads, uint32_t shared_bytes, bool pdl,
                    void (*kernel)(void *), void *args);
const char *emulate_problem(void); /* the first of all launches since emulate_clear; NULL: none */
void emulate_clear(void);
[[noreturn]] void emulate_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* How much was emulated: a check that copies nothing checks nothing. */
struct emulated_tally {
    uint64_t n_launches, n_blocks, n_copies, n_early_copies; /* early: before the wait */
};
extern emulated_tally emulated_counts;

/* ---- one thread's instructions ---- */

enum emulated_op {
    OP_SHUFFLE = 1,
    OP_SHUFFLE_UP,
    OP_SHUFFLE_XOR,
    OP_ANY,
    OP_SYNC,
    OP_MMA,
    OP_TURN
};

uint64_t emulate_warp(emulated_op op, uint64_t x, uint32_t arg);
void emulate_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void emulate_sync_block(void);
void emulate_pdl_wait(void);
void emulate_reads(const void *at, size_t n_bytes);

/* Shared memory by its 32-bit address. */
uint32_t emulate_address(const void *in_shared);
void emulate_copy16(uint32_t to, const void *from, bool is_there); /* cp.async */
void emulate_end_copies(void);
void emulate_wait_copies(uint32_t n_newest);
void emulate_bar_init(uint32_t bar, uint32_t count);
void emulate_bar_arrive(uint32_t bar);
void emulate_bar_expect(uint32_t bar, uint32_t n_bytes);
void emulate_bar_wait(uint32_t bar, uint32_t parity);
void emulate_bulk_copy(uint32_t to, const void *from, uint32_t n_bytes, uint32_t bar);

#endif
