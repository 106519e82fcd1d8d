/* device.h: what the processor can do, and the worker threads that a step is spread over. */
#ifndef KI_DEVICE_H
#define KI_DEVICE_H
#include "base.h"

/* Instruction sets kernels are compiled for, of each architecture the poorest first. A machine
 * offers a set only with all that it needs: avx2 means AVX2 + FMA + F16C, avx512 means F + BW + VL
 * + DQ, avx512vnni adds VNNI; neon is every aarch64, neondot adds DotProd on an Armv8.2. */
typedef enum ki_isa {
    KI_ISA_SCALAR,
    KI_ISA_AVX2,
    KI_ISA_AVX512,
    KI_ISA_AVX512VNNI,
    KI_ISA_NEON,
    KI_ISA_NEONDOT,
    KI_ISA_COUNT
} ki_isa;
extern const char *const ki_isa_names[KI_ISA_COUNT];

bool ki_isa_compiled(ki_isa isa); /* belongs to the architecture this program is compiled for */
bool ki_isa_available(ki_isa isa);
/* The richest available set that `disabled` does not name ("avx512,avx2", NULL allowed; a disabled
 * set disables the richer ones built on it; sets of other architectures may be named). ARG names an
 * unknown word. */
kivi_status ki_isa_choose(ki_isa *out, const char *disabled, kivi_error *err);
/* Parts of the CUDA engine that the same list may name, to measure what each is worth. Without
 * fused  the plain kernels of the cache instead of the fast ones
 * stream  cuBLASLt's products of few rows, too, and activations by a kernel of their own
 * norms  a norm reads its row again and again, by a kernel of its own
 * close  a page of keys is closed by the append of its last row, not at the end of the step
 * append  rows of a step by a kernel of their own, not by attention
 * cudnn  our own attention for all prompts
 * ranking  cuBLASLt's order of its kernels for up to 64 rows: the fastest is measured at start (not
 *          in the batch-invariant mode) */
enum {
    KI_PART_FUSED = 1,
    KI_PART_STREAM = 2,
    KI_PART_NORMS = 4,
    KI_PART_CLOSE = 8,
    KI_PART_CUDNN = 16,
    KI_PART_RANKING = 32,
    KI_PART_APPEND = 64
};
uint32_t ki_parts_disabled(const char *disabled); /* of those */

/* A pool of n_threads - 1 workers; the caller is the last one. Idle workers sleep in the kernel:
 * they look for new work a few microseconds long and then wait on a futex, so a busy machine loses
 * no core to waiting. */
typedef struct ki_workers ki_workers;
/* One task: index in [0, n_tasks), worker in [0, n_threads). Tasks may run in any order and on any
 * worker, so a result must depend on its index alone. */
typedef void (*ki_task_fn)(void *context, size_t index, unsigned worker);

kivi_status ki_workers_create(ki_workers **out, ki_mem *mem, unsigned n_threads, kivi_error *err);
void ki_workers_destroy(ki_workers **workers);
unsigned ki_workers_count(const ki_workers *workers);
/* Runs all tasks and returns when the last is done. Not reentrant. */
void ki_workers_run(ki_workers *workers, ki_task_fn fn, void *context, size_t n_tasks);

unsigned ki_cpu_count(void); /* processors this process may run on, at least 1 */

/* ---- memory of another device ---- */

/* Blocks [first, end) of n_slots rings: block b of slot s goes from block s * from_stride + from_at
 * + b % from_blocks to block s * to_stride + to_at + b % to_blocks, of block_bytes each. */
typedef struct ki_ring_copy {
    void *to;
    const void *from;
    uint32_t to_blocks, to_stride, to_at, from_blocks, from_stride, from_at, first, end;
    size_t n_slots, block_bytes;
} ki_ring_copy;

/* What holds data on another device asks this table: the cache for its pages and rows of 16 bit,
 * the loader for weights. NULL in its place: the memory of this process. Calls take effect in the
 * order they are made; zero and the copies between places of the device may still be under way
 * when they return. Whoever reads a fault of theirs is the next call with a status. */
typedef struct ki_device {
    void *context;
    ki_mem *mem; /* its blocks by tag; host memory is not in it */
    /* Zeroed memory, aligned to 256 bytes. NOMEM names what was asked for and what there is. */
    kivi_status (*alloc)(void **out, void *context, ki_tag tag, size_t n_bytes, kivi_error *err);
    void (*free)(void *context, void *block); /* NULL allowed */
    void (*zero)(void *context, void *to, size_t n_bytes);
    void (*copy)(void *context, void *to, const void *from, size_t n_bytes);
    void (*copy_ring)(void *context, const ki_ring_copy *copy);
    kivi_status (*put)(void *context, void *to, const void *from_host, size_t n_bytes,
                       kivi_error *err);
    kivi_status (*get)(void *context, void *to_host, const void *from, size_t n_bytes,
                       kivi_error *err);
} ki_device;

/* Floating point must round to nearest and keep subnormals whatever the caller has set: bytes
 * depend on it. */
typedef struct ki_fpu {
    uint32_t saved;
} ki_fpu;
ki_fpu ki_fpu_enter(void);
void ki_fpu_leave(ki_fpu fpu);

#endif
