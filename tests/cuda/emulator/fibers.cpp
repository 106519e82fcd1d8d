/* fibers.cpp: on x86-64 a switch is a dozen instructions of our own, because a check makes hundreds
 * of millions; elsewhere it is swapcontext, which asks the system for the signal mask each time. */
#include "fibers.h"

#include <stdlib.h>

enum { STACK_BYTES = 1 << 17 };
static uint8_t *stacks[MOST_FIBERS];

static uint8_t *stack_of(uint32_t i) {
    if (!stacks[i]) stacks[i] = (uint8_t *)aligned_alloc(64, STACK_BYTES);
    if (!stacks[i]) abort();
    return stacks[i];
}

#ifdef __x86_64__

/* Saves what a call keeps on this stack, its place in *save, and goes on with stack `to`. */
extern "C" void emulated_switch(void **save, void *to);
asm(".text\n"
    ".globl emulated_switch\n"
    ".type emulated_switch, @function\n"
    "emulated_switch:\n"
    "  push %rbx\n  push %rbp\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbp\n  pop %rbx\n"
    "  ret\n"
    ".size emulated_switch, . - emulated_switch\n");

static void *places[MOST_FIBERS], *outside;

void fiber_make(uint32_t i, void (*entry)(void)) {
    void **sp = (void **)(stack_of(i) + STACK_BYTES);
    *--sp = NULL; /* no return address: 8 bytes from a multiple of 16, as at a function's begin */
    *--sp = (void *)entry;
    for (int saved = 0; saved < 6; saved++) *--sp = NULL;
    places[i] = sp;
}
void fiber_enter(uint32_t i) { emulated_switch(&outside, places[i]); }
void fiber_leave(uint32_t i) { emulated_switch(&places[i], outside); }

#else
#include <ucontext.h>

static ucontext_t places[MOST_FIBERS], outside;

void fiber_make(uint32_t i, void (*entry)(void)) {
    getcontext(&places[i]);
    places[i].uc_stack.ss_sp = stack_of(i);
    places[i].uc_stack.ss_size = STACK_BYTES;
    places[i].uc_link = NULL;
    makecontext(&places[i], entry, 0);
}
void fiber_enter(uint32_t i) { swapcontext(&outside, &places[i]); }
void fiber_leave(uint32_t i) { swapcontext(&places[i], &outside); }

#endif
