/* The worker pool. One 64-bit word, `state`, holds the round and how many tasks of it are left:
 *
 *   caller   publish fn, context, n_tasks -> state = (round + 1, n_tasks) -> wake sleepers
 *            -> take tasks -> wait until n_done is n_tasks
 *   worker   wait for a new round -> take tasks: state (r, n) becomes (r, n - 1) in one exchange
 *            -> n_done++ after each (the last one wakes the caller)
 *
 * A round ends with its last task, not with its last worker: one that the system has not run yet
 * finds no task of its round left, whatever round it is by then, and holds nobody up. What a task
 * reads (fn, context) is stable while one is taken and not done, and is read only then.
 *
 * Both waits look a bounded number of times before they sleep on a futex: a step has a hundred
 * rounds a few microseconds apart, and a sleep and wake-up costs more than such a gap. Whoever
 * sleeps says so first, so that nobody makes a system call to wake nobody. */
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
    _Atomic uint32_t n_tasks;
    _Atomic bool stopping;
    _Alignas(64) _Atomic uint64_t state;  /* round << 32 | tasks left */
    _Alignas(64) _Atomic uint32_t round;  /* what workers sleep on */
    _Atomic uint32_t n_sleeping;          /* workers that sleep or are about to */
    _Alignas(64) _Atomic uint32_t n_done; /* what the caller sleeps on */
    _Atomic uint32_t caller_sleeps;
};

static void look_again(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* a pause of some ten nanoseconds; `yield` does nothing on most */
#endif
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* Returns the word when it is no longer `value`. `asleep` counts those whom a change must wake. */
static uint32_t wait_change(_Atomic uint32_t *word, uint32_t value, _Atomic uint32_t *asleep) {
    uint32_t now;
    for (int i = 0; i < LOOKS_BEFORE_SLEEP; i++) {
        if ((now = atomic_load_explicit(word, memory_order_acquire)) != value) return now;
        look_again();
    }
    atomic_fetch_add(asleep, 1); /* before the last look: the other side changes, then asks */
    while ((now = atomic_load(word)) == value) sleep_while(word, value);
    atomic_fetch_sub(asleep, 1);
    return now;
}

/* The next task of `round`, if there is one. n_tasks is read only once a task is ours: until that
 * is done it cannot change, before that it may already be the next round's. */
static bool take_task(ki_workers *w, uint32_t round, uint32_t *index) {
    uint64_t state = atomic_load_explicit(&w->state, memory_order_acquire);
    for (;;) {
        uint32_t left = (uint32_t)state;
        if (state >> 32 != round || left == 0) return false;
        if (atomic_compare_exchange_weak_explicit(&w->state, &state, state - 1,
                                                  memory_order_acq_rel, memory_order_acquire)) {
            *index = atomic_load_explicit(&w->n_tasks, memory_order_relaxed) - left;
            return true;
        }
    }
}

static void do_tasks(ki_workers *w, uint32_t round, unsigned worker_index) {
    for (uint32_t index; take_task(w, round, &index);) {
        uint32_t n_tasks = atomic_load_explicit(&w->n_tasks, memory_order_relaxed);
        w->fn(w->context, index, worker_index);
        if (atomic_fetch_add(&w->n_done, 1) + 1 == n_tasks && atomic_load(&w->caller_sleeps))
            wake_all(&w->n_done);
    }
}

static void *worker_main(void *argument) {
    worker *self = argument;
    ki_workers *w = self->pool;
    ki_fpu_enter();
    for (uint32_t seen = 0;;) {
        seen = wait_change(&w->round, seen, &w->n_sleeping);
        if (atomic_load(&w->stopping)) return NULL;
        do_tasks(w, seen, self->index);
    }
}

static uint32_t start_round(ki_workers *w, uint32_t n_tasks) {
    uint32_t round = atomic_load_explicit(&w->round, memory_order_relaxed) + 1;
    atomic_store_explicit(&w->n_tasks, n_tasks, memory_order_relaxed);
    atomic_store_explicit(&w->n_done, 0, memory_order_relaxed);
    atomic_store_explicit(&w->state, (uint64_t)round << 32 | n_tasks, memory_order_release);
    atomic_store(&w->round, round);
    if (atomic_load(&w->n_sleeping)) wake_all(&w->round);
    return round;
}

static void run_round(ki_workers *w, ki_task_fn fn, void *context, uint32_t n_tasks) {
    w->fn = fn;
    w->context = context;
    uint32_t round = start_round(w, n_tasks);
    do_tasks(w, round, 0);
    for (uint32_t done = atomic_load(&w->n_done); done != n_tasks;)
        done = wait_change(&w->n_done, done, &w->caller_sleeps);
}

/* The index of a task within its round has 31 bits; more tasks than that go in several rounds. */
typedef struct shifted {
    ki_task_fn fn;
    void *context;
    size_t first;
} shifted;

static void shifted_task(void *context, size_t index, unsigned worker_index) {
    const shifted *s = context;
    s->fn(s->context, s->first + index, worker_index);
}

void ki_workers_run(ki_workers *w, ki_task_fn fn, void *context, size_t n_tasks) {
    if (w->n_started == 0 || n_tasks <= 1) {
        for (size_t i = 0; i < n_tasks; i++) fn(context, i, 0);
        return;
    }
    shifted s = {fn, context, 0};
    for (; n_tasks - s.first > INT32_MAX; s.first += INT32_MAX)
        run_round(w, shifted_task, &s, INT32_MAX);
    if (s.first) run_round(w, shifted_task, &s, (uint32_t)(n_tasks - s.first));
    else run_round(w, fn, context, (uint32_t)n_tasks);
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
    atomic_store(&w->stopping, true);
    start_round(w, 0);
    for (unsigned i = 1; i <= w->n_started; i++) pthread_join(w->workers[i].thread, NULL);
    ki_free(w->mem, w->workers);
    ki_free(w->mem, w);
    *workers = NULL;
}

unsigned ki_workers_count(const ki_workers *workers) { return workers->n_threads; }
