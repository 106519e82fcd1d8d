/* fibers.h: threads of one thread block, each with its own stack, that hand over by themselves. */
#ifndef KI_EMULATED_FIBERS_H
#define KI_EMULATED_FIBERS_H
#include <stdint.h>

enum { MOST_FIBERS = 512 };

void fiber_make(uint32_t i, void (*entry)(void)); /* entry does not return */
void fiber_enter(uint32_t i);                     /* from outside: until it leaves */
void fiber_leave(uint32_t i);                     /* from fiber i: back outside */

#endif
