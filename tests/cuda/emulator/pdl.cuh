/* pdl.cuh: dependent launch, emulated: the kernel before ends when no thread can go on without. */
#include "emulate.h"

static inline void ki_pdl_wait(void) { emulate_pdl_wait(); }
static inline void ki_pdl_launch(void) {}
