/* golden.h: the reference vectors of tests/golden/quant, carried inside the program. */
#ifndef KI_GOLDEN_H
#define KI_GOLDEN_H
#include <stddef.h>
#include <stdint.h>

typedef struct golden_file {
    const uint8_t *bytes, *end;
} golden_file;
typedef struct golden_set {
    unsigned bits, group;
    golden_file x, code, scale, zero, kind;
} golden_set;

enum { GOLDEN_SETS = 12 };
extern const golden_set golden_sets[GOLDEN_SETS];

#endif
