#include "golden.h"

/* The assembler reads each file; paths are relative to the repository root, where make runs. */
#define EMBED(symbol, path)                                                                        \
    extern const uint8_t symbol[], symbol##_end[] __attribute__((visibility("hidden")));           \
    __asm__(".section .rodata\n.balign 64\n" #symbol ":\n.incbin \"tests/golden/quant/" path       \
            ".npy\"\n" #symbol "_end:\n.byte 0\n.previous\n");
#define EMBED_SET(b, g)                                                                            \
    EMBED(b##_##g##_x, #b "-" #g "/x")                                                             \
    EMBED(b##_##g##_code, #b "-" #g "/code")                                                       \
    EMBED(b##_##g##_scale, #b "-" #g "/scale")                                                     \
    EMBED(b##_##g##_zero, #b "-" #g "/zero")                                                       \
    EMBED(b##_##g##_kind, #b "-" #g "/kind")
#define EMBED_BITS(b) EMBED_SET(b, g16) EMBED_SET(b, g32) EMBED_SET(b, g64) EMBED_SET(b, g128)
EMBED_BITS(b2)
EMBED_BITS(b4)
EMBED_BITS(b8)

#define FILE_OF(symbol)                                                                            \
    { symbol, symbol##_end }
#define SET_OF(n_bits, n_group)                                                                    \
    {                                                                                              \
        .bits = (n_bits), .group = (n_group), .x = FILE_OF(b##n_bits##_g##n_group##_x),            \
        .code = FILE_OF(b##n_bits##_g##n_group##_code),                                            \
        .scale = FILE_OF(b##n_bits##_g##n_group##_scale),                                          \
        .zero = FILE_OF(b##n_bits##_g##n_group##_zero),                                            \
        .kind = FILE_OF(b##n_bits##_g##n_group##_kind)                                             \
    }
#define SETS_OF(n_bits)                                                                            \
    SET_OF(n_bits, 16), SET_OF(n_bits, 32), SET_OF(n_bits, 64), SET_OF(n_bits, 128)
const golden_set golden_sets[GOLDEN_SETS] = {SETS_OF(2), SETS_OF(4), SETS_OF(8)};
