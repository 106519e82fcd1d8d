/* check.h: the small harness of build/check-kernels. A case is an `if (check_case(...)) { ...;
 * check_end(); }`; inside it CHECK notes the first failure. Every case draws its numbers from the
 * printed seed and its own name, so that --test=NAME --seed=N repeats it alone. */
#ifndef KI_CHECK_H
#define KI_CHECK_H
#include "cache.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct check_options {
    const char *prefix, *isa;
    uint64_t seed;
    bool list, thorough, bench, digest;
} check_options;
extern check_options check_opt;

/* Opens a case unless it is filtered out or only listed. */
bool check_case(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same for an instruction set; its name is appended. Reports `skip` where the machine lacks it.
 */
bool check_case_isa(ki_isa isa, const char *format, ...) __attribute__((format(printf, 2, 3)));
void check_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
bool check_failed(void);
void check_note(const char *format, ...)
    __attribute__((format(printf, 1, 2))); /* shown behind ok */
void check_end(void);
void check_skip(const char *why); /* ends the case, in place of check_end */
/* True when some case of the group may run: lets a group skip costly preparation. */
bool check_wants(const char *group);

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) check_fail(__FILE__, __LINE__, __VA_ARGS__);                             \
    } while (0)
#define CHECK_OK(call)                                                                             \
    do {                                                                                           \
        kivi_error check_error = {0};                                                              \
        kivi_error *err = &check_error;                                                            \
        kivi_status check_status = (call);                                                         \
        if (check_status != KIVI_OK)                                                               \
            check_fail(__FILE__, __LINE__, "%s: %s: %s", #call, kivi_status_name(check_status),    \
                       check_error.text);                                                          \
    } while (0)

/* ---- random numbers ---- */
typedef struct rng {
    uint64_t state;
} rng;
rng rng_make(uint64_t seed);
rng check_rng(void); /* of the open case */
uint64_t rng_u64(rng *r);
uint32_t rng_below(rng *r, uint32_t n);
double rng_unit(rng *r);  /* [0, 1) */
float rng_normal(rng *r); /* mean 0, deviation 1 */
/* A number of its own for each key: token-deterministic contents. */
uint64_t hash_u64(uint64_t a, uint64_t b);

/* ---- memory ---- */
void *check_alloc(size_t n_bytes); /* zeroed, 64-aligned, 64 bytes of slack; never NULL */
/* n_bytes that end where an unreadable page begins; free with guard_free. */
typedef struct guard {
    uint8_t *data, *map;
    size_t map_bytes;
} guard;
guard guard_alloc(size_t n_bytes);
void guard_free(guard *g);

double check_seconds(void); /* monotonic clock */

/* ---- groups ---- */
void check_base(void);
void check_device(void);
void check_quant(void);
void check_pack(void);
void check_plus(void);
void check_dense(void);
void check_kinds(void);
void check_attn(void);
void check_cache(void);
void check_cache_random(void);
void check_memory(void);
void check_save(void);
void check_cuda(void);
void check_bench(void);
void check_digest(void);
#endif
