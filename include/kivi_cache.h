/* kivi_cache.h: the 2-bit key/value cache alone, for programs that have their own model.
 *
 * A *cache* is a pool of pages and the threads to read them. A *sequence* is one timeline in it. A
 * step on a sequence is: begin, then for every layer append (its keys and values) and attend, then
 * commit.
 *
 * A complete program (it is compiled and run by the tests):
 *
 *     #include <kivi_cache.h>
 *     #include <stdio.h>
 *
 *     int main(void) {
 *         kivi_error err = {KIVI_OK, ""};
 *         kivi_cache *cache = NULL;
 *         kivi_seq *seq = NULL;
 *         kivi_cache_geometry geometry = kivi_cache_defaults();
 *         geometry.n_layers = 1, geometry.n_heads = 4, geometry.n_kv_heads = 2;
 *         geometry.head_dim = 64, geometry.n_pages = 16;
 *         float k[2 * 64], v[2 * 64], q[4 * 64], out[4 * 64];
 *         int failed = 1;
 *         if (kivi_cache_create(&cache, &geometry, &err)) goto done;
 *         if (kivi_seq_create(&seq, cache, &err)) goto done;
 *         for (int t = 0; t < 500; t++) {
 *             for (int i = 0; i < 2 * 64; i++) k[i] = (float)((i * 7 + t) % 13) - 6;
 *             for (int i = 0; i < 2 * 64; i++) v[i] = (float)((i + t * 5) % 11);
 *             for (int i = 0; i < 4 * 64; i++) q[i] = (float)((i * 3 + t) % 7) - 3;
 *             if (kivi_seq_begin(seq, 1, &err)) goto done;
 *             if (kivi_seq_append(seq, 0, k, v, KIVI_F32, &err)) goto done;
 *             if (kivi_seq_attend(seq, 0, q, out, &err)) goto done;
 *             if (kivi_seq_commit(seq, &err)) goto done;
 *         }
 *         printf("%u tokens, out[0] = %g\n", kivi_seq_length(seq), (double)out[0]);
 *         failed = 0;
 *     done:
 *         if (failed) fprintf(stderr, "%s\n", err.text);
 *         kivi_seq_destroy(&seq);
 *         kivi_cache_destroy(&cache);
 *         return failed;
 *     }
 *
 * Threads, errors and ownership as in kivi.h. Shapes are given slowest dimension first. */
#ifndef KIVI_CACHE_H
#define KIVI_CACHE_H
#include "kivi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kivi_cache_geometry {
    uint32_t n_layers, n_heads, n_kv_heads; /* H, Hk; Hk divides H */
    uint32_t head_dim;                      /* D: a multiple of 16, at most 256; G divides it */
    kivi_kv_options kv;
    uint32_t n_pages;       /* a page holds 128 tokens of all layers and KV heads of one sequence */
    uint32_t max_step_rows; /* most rows of one step of a sequence; 0: 512 */
    uint32_t n_threads;     /* 0: one for each core this process may use */
    uint32_t
        window_tokens;   /* a query at p sees positions > p - window only, and pages wholly behind
                               it are given back; 0: it sees all */
    uint32_t max_tokens; /* longest sequence; 0: as many as n_pages hold */
} kivi_cache_geometry;

typedef struct kivi_cache kivi_cache;
typedef struct kivi_seq kivi_seq;
typedef enum kivi_float { KIVI_F32, KIVI_F16 } kivi_float;

/* Bits, parts and sinks of "f16", "kivi8", "kivi4", "k4v2", "kivi2", "kivi2+", "k4v2+" or "k4v3+"
 * (4 sinks for the last three, 0 for the others); the rest of *kv stays. ARG for another name. */
KIVI_API kivi_status kivi_kv_by_name(kivi_kv_options *kv, const char *name, kivi_error *err);
/* Fills in the defaults of a cache kind and refuses what cannot be, naming what could. */
KIVI_API kivi_status kivi_kv_resolve(kivi_kv_options *kv, uint32_t head_dim, kivi_error *err);
/* Allocated bits a cached element: codes, scales, zeros and what fills a page up to whole lines;
 * window and sinks not. kv must be resolved. */
KIVI_API double kivi_kv_bits(const kivi_kv_options *kv, uint32_t head_dim);

KIVI_API kivi_cache_geometry kivi_cache_defaults(void);
KIVI_API kivi_status kivi_cache_create(kivi_cache **out, const kivi_cache_geometry *geometry,
                                       kivi_error *err);
KIVI_API void kivi_cache_destroy(kivi_cache **cache); /* NULL allowed; its sequences must be gone */
KIVI_API kivi_memory kivi_cache_memory(const kivi_cache *cache);
KIVI_API void kivi_cache_pages(const kivi_cache *cache, uint32_t *n_free, uint32_t *n_all);

KIVI_API kivi_status kivi_seq_create(kivi_seq **out, kivi_cache *cache, kivi_error *err);
KIVI_API void kivi_seq_destroy(kivi_seq **seq);         /* NULL allowed; gives its pages back */
KIVI_API uint32_t kivi_seq_length(const kivi_seq *seq); /* tokens committed */

/* The next n_tokens rows, in any number of steps, are one prompt (the visibility rule asks for it).
 */
KIVI_API kivi_status kivi_seq_begin_prompt(kivi_seq *seq, uint32_t n_tokens, kivi_error *err);
/* Starts a step of n_rows new tokens; FULL when the pool has not enough pages (nothing is changed
 * then). */
KIVI_API kivi_status kivi_seq_begin(kivi_seq *seq, uint32_t n_rows, kivi_error *err);
/* Keys (after the rotary embedding) and values [n_rows][Hk][D] of one layer, float32 or float16.
 * Fails with NUMERIC when one is not finite; float32 beyond +-65504 is saturated and counted. */
KIVI_API kivi_status kivi_seq_append(kivi_seq *seq, uint32_t layer, const void *k, const void *v,
                                     kivi_float type, kivi_error *err);
/* Causal attention of the step's rows over the whole sequence: q and out [n_rows][H][D] float32,
 * scaled by 1/sqrt(D) inside. Query head h reads KV head h / (H / Hk). */
KIVI_API kivi_status kivi_seq_attend(kivi_seq *seq, uint32_t layer, const float *q, float *out,
                                     kivi_error *err);
/* Ends the step: its rows belong to the sequence. */
KIVI_API kivi_status kivi_seq_commit(kivi_seq *seq, kivi_error *err);
/* Gives the step up, and with it the prompt it belongs to: the committed tokens stay. */
KIVI_API void kivi_seq_abort(kivi_seq *seq);

/* A second sequence with the same contents. Full pages are shared; the open page and the window are
 * copied. Not within a step or a prompt. */
KIVI_API kivi_status kivi_seq_fork(kivi_seq **out, const kivi_seq *from, kivi_error *err);
/* Back to n_tokens, as if the rest had never been. ARG when 16-bit rows it needs are gone
 * (kv.rewind_tokens); the text names the earliest length that can be reached. */
KIVI_API kivi_status kivi_seq_rewind(kivi_seq *seq, uint32_t n_tokens, kivi_error *err);
/* One sequence in a file, in the plain order: versioned, checksummed. Loading refuses another
 * geometry or kind. */
KIVI_API kivi_status kivi_seq_save(const kivi_seq *seq, const char *path, kivi_error *err);
KIVI_API kivi_status kivi_seq_load(kivi_seq **out, kivi_cache *cache, const char *path,
                                   kivi_error *err);

#ifdef __cplusplus
}
#endif
#endif
