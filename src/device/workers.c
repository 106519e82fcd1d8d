/* The worker pool. One generation counter starts a round and one counter of busy workers ends it:
 *
 *   caller   publish fn, n_tasks -> generation++ -> wake sleepers -> take tasks -> wait until
 * n_busy is 0 worker   wait for a new generation -> take tasks (next++) until none is left ->
 * n_busy-- (the last one wakes)
 *
 * Both waits look a bounded number of times before they sleep on a futex: a step has a hundred
 * rounds a few microseconds apart, and a sleep and wake-up costs more than such a gap. */
#include "device.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

/* About 10 to 40 microseconds of looking: longer than the gap between two rounds of a decode step,
 * and short enough that a machine with other work loses next to nothing. */
enum { LOOKS_BEFORE_SLEEP = 1500 };

typedef struct worker {
    ki_workers *pool;
    pthread_t thread;
    unsigned index;
} worker;

struct ki_workers {
    ki_mem *mem;
    worker *workers;
    unsigned n_threads, n_started;
    ki_task_fn fn;
    void *context;
    size_t n_tasks;
    bool stopping;
    _Alignas(64) _Atomic size_t next;         /* the next task to take */
    _Alignas(64) _Atomic uint32_t generation; /* rounds started */
    _Alignas(64) _Atomic uint32_t n_busy;     /* workers still in the round */
};

static void look_again(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* Returns when *word is no longer `value`. */
static void wait_change(_Atomic uint32_t *word, uint32_t value) {
    for (int i = 0; i < LOOKS_BEFORE_SLEEP; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return;
        look_again();
    }
    while (atomic_load_explicit(word, memory_order_acquire) == value) sleep_while(word, value);
}

static void take_tasks(ki_workers *w, unsigned index) {
    for (;;) {
        size_t i = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (i >= w->n_tasks) return;
        w->fn(w->context, i, index);
    }
}

static void *worker_main(void *argument) {
    worker *self = argument;
    ki_workers *w = self->pool;
    ki_fpu_enter();
    for (uint32_t seen = 0;; seen++) {
        wait_change(&w->generation, seen);
        if (w->stopping) return NULL;
        take_tasks(w, self->index);
        if (atomic_fetch_sub_explicit(&w->n_busy, 1, memory_order_acq_rel) == 1)
            wake_all(&w->n_busy);
    }
}

static void start_round(ki_workers *w) {
    atomic_store_explicit(&w->next, 0, memory_order_relaxed);
    atomic_store_explicit(&w->n_busy, w->n_started, memory_order_relaxed);
    atomic_fetch_add_explicit(&w->generation, 1, memory_order_release);
    wake_all(&w->generation);
}

void ki_workers_run(ki_workers *w, ki_task_fn fn, void *context, size_t n_tasks) {
    if (n_tasks == 0) return;
    if (w->n_started == 0 || n_tasks == 1) {
        for (size_t i = 0; i < n_tasks; i++) fn(context, i, 0);
        return;
    }
    w->fn = fn;
    w->context = context;
    w->n_tasks = n_tasks;
    start_round(w);
    take_tasks(w, 0);
    for (uint32_t busy; (busy = atomic_load_explicit(&w->n_busy, memory_order_acquire)) != 0;)
        wait_change(&w->n_busy, busy);
}

kivi_status ki_workers_create(ki_workers **out, ki_mem *mem, unsigned n_threads, kivi_error *err) {
    *out = NULL;
    if (n_threads < 1 || n_threads > 1024)
        return KI_FAIL(err, ARG, "threads: %u asked for, expected 1 to 1024", n_threads);
    void *p;
    KI_TRY(ki_alloc(&p, mem, KI_TAG_other, sizeof(ki_workers), err));
    ki_workers *w = p;
    w->mem = mem;
    w->n_threads = n_threads;
    kivi_status status = ki_alloc_array(&p, mem, KI_TAG_other, n_threads, sizeof(worker), err);
    w->workers = p;
    for (unsigned i = 1; status == KIVI_OK && i < n_threads; i++) {
        w->workers[i] = (worker){.pool = w, .index = i};
        if (pthread_create(&w->workers[i].thread, NULL, worker_main, &w->workers[i]))
            status = KI_FAIL(err, NOMEM, "threads: worker %u of %u could not be started", i,
                             n_threads - 1);
        else w->n_started++;
    }
    if (status != KIVI_OK) {
        ki_workers_destroy(&w);
        return status;
    }
    *out = w;
    return KIVI_OK;
}

void ki_workers_destroy(ki_workers **workers) {
    ki_workers *w = *workers;
    if (!w) return;
    w->stopping = true;
    start_round(w);
    for (unsigned i = 1; i <= w->n_started; i++) pthread_join(w->workers[i].thread, NULL);
    ki_free(w->mem, w->workers);
    ki_free(w->mem, w);
    *workers = NULL;
}

unsigned ki_workers_count(const ki_workers *workers) { return workers->n_threads; }
