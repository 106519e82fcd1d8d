/* kernel.h: the door of this folder. One table of functions per instruction set; all give the same
 * bytes. */
#ifndef KI_KERNEL_H
#define KI_KERNEL_H
#include "attn.h"
#include "dense.h"
#include "device.h"
#include "plus.h"
#include "quant.h"

typedef struct ki_kernels {
    ki_isa isa;
    ki_quant_kernels quant;
    ki_plus_kernels plus;
    ki_attn_kernels attn;
    ki_dense_kernels dense;
} ki_kernels;

/* The table of an instruction set this machine has (ki_isa_available); static, never NULL. */
const ki_kernels *ki_kernels_get(ki_isa isa);

#endif
