/* dummy.c: random weights, for timing and measuring shapes that no file is at hand for. A row's
 * bytes depend on the seed, the matrix and the row alone, so any number of threads makes the same
 * model. */
#include "model_private.h"

#include <math.h>
#include <stdio.h>

kivi_status ki_dummy_type(ki_dtype *out, const ki_file *file, const char *name, kivi_error *err) {
    static const struct {
        const char *name;
        ki_dtype type;
    } names[] = {{"f16", KI_F16},     {"q8_0", KI_Q8_0},    {"q4_0", KI_Q4_0},
                 {"f32", KI_F32},     {"bf16", KI_BF16},    {"float16", KI_F16},
                 {"float32", KI_F32}, {"bfloat16", KI_BF16}};
    char from_config[32] = "f16";
    static const char *const keys[] = {"dtype", "torch_dtype"};
    for (size_t i = 0; i < 2 && !name; i++) {
        ki_str text;
        bool found = false;
        if (ki_file_kind_get(file) == KI_FILE_GGUF) break;
        KI_TRY(ki_file_str(&text, &found, file, keys[i], err));
        if (!found) continue;
        snprintf(from_config, sizeof from_config, "%.*s", (int)KI_MIN(text.n_bytes, (size_t)31),
                 text.bytes);
        break;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(names[i].name, name ? name : from_config)) {
            *out = names[i].type;
            return KIVI_OK;
        }
    return KI_FAIL(err, ARG, "dummy weights of type '%s', expected f16, q8_0 or q4_0",
                   name ? name : from_config);
}

/* SplitMix64: eight random bytes a call; only the counter ties one call to the next. */
static uint64_t next(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* One of 256 numbers spread evenly over +-unit for each random byte: no conversion an element. */
static void plain_row(uint8_t *out, ki_dtype type, uint32_t n_cols, float unit, uint64_t state) {
    float wide[256];
    uint16_t narrow[256];
    uint64_t bits = 0;
    for (int i = 0; i < 256; i++) {
        wide[i] = ((float)i - 127.5f) / 128 * unit;
        narrow[i] = type == KI_F16 ? ki_f32_to_f16(wide[i]) : ki_f32_to_bf16(wide[i]);
    }
    for (uint32_t c = 0; c < n_cols; c++, bits >>= 8) {
        if (c % 8 == 0) bits = next(&state);
        if (type == KI_F32) memcpy(out + (size_t)c * 4, &wide[bits & 255], 4);
        else memcpy(out + (size_t)c * 2, &narrow[bits & 255], 2);
    }
}

void ki_dummy_row(uint8_t *out, ki_dtype type, uint32_t n_cols, uint64_t seed, uint32_t row) {
    /* a uniform number within +-unit has a mean square of unit^2 / 3 */
    float unit = sqrtf(3.0f / (float)n_cols);
    uint64_t state = seed * 0xd1342543de82ef95u + row;
    state = next(&state);
    if (ki_dtype_block_elements(type) == 1) {
        plain_row(out, type, n_cols, unit, state);
        return;
    }
    uint32_t block_bytes = ki_dtype_block_bytes(type);
    uint16_t d = ki_f32_to_f16(unit / (type == KI_Q8_0 ? 128 : 8));
    for (uint32_t b = 0; b < n_cols / 32; b++, out += block_bytes) {
        memcpy(out, &d, 2);
        for (uint32_t i = 2; i < block_bytes; i += 8) {
            uint64_t bits = next(&state);
            memcpy(out + i, &bits, KI_MIN(8u, block_bytes - i));
        }
    }
}
