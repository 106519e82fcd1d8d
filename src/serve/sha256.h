/* sha256.h: SHA-256 (FIPS 180-4), for the names of prefixes. */
#ifndef KI_SHA256_H
#define KI_SHA256_H
#include "base.h"

enum { KI_SHA256_BYTES = 32 };

typedef struct ki_sha256 {
    uint32_t state[8];
    uint64_t n_bytes; /* taken in so far */
    uint8_t block[64];
} ki_sha256;

void ki_sha256_init(ki_sha256 *s);
void ki_sha256_add(ki_sha256 *s, const void *bytes, size_t n_bytes);
void ki_sha256_end(uint8_t digest[KI_SHA256_BYTES], ki_sha256 *s);

#endif
