/* kivi.h: run a transformer language model whose key/value cache is kept at 2 bits (arXiv
 * 2402.02750).
 *
 * Two nouns and one verb. An *engine* is a loaded model, its memory and its threads. A *session* is
 * one mutable timeline of tokens with its cache. A *step* evaluates a batch of rows of one or
 * several sessions at once. kivi_cache.h is the cache alone, for programs that have their own
 * model.
 *
 * A complete program (it is compiled and run by the tests):
 *
 *     #include <kivi.h>
 *     #include <stdio.h>
 *
 *     int main(int argc, char **argv) {
 *         kivi_error err = {KIVI_OK, ""};
 *         kivi_engine *engine = NULL;
 *         kivi_session *session = NULL;
 *         kivi_engine_options options = kivi_engine_defaults();
 *         options.model_path = argc > 1 ? argv[1] : "model.gguf";
 *         int32_t prompt[64];
 *         size_t n_prompt = 0;
 *         int failed = 1;
 *         if (kivi_engine_create(&engine, &options, &err)) goto done;
 *         if (kivi_session_create(&session, engine, &err)) goto done;
 *         if (kivi_tokenize(engine, "The capital of France is", 24, KIVI_TEXT_ADD_BOS,
 *                           prompt, 64, &n_prompt, &err)) goto done;
 *         if (kivi_session_prompt(session, prompt, n_prompt, &err)) goto done;
 *         for (int i = 0; i < 8; i++) {
 *             uint32_t n_vocab = kivi_engine_info_get(engine)->n_vocab;
 *             int32_t id = kivi_logits_argmax(kivi_session_logits(session, 0), n_vocab);
 *             char piece[256];
 *             size_t n_bytes = kivi_token_bytes(engine, id, piece, sizeof piece);
 *             fwrite(piece, 1, n_bytes, stdout);
 *             if (kivi_session_decode(session, id, &err)) goto done;
 *         }
 *         puts("");
 *         failed = 0;
 *     done:
 *         if (failed) fprintf(stderr, "%s\n", err.text);
 *         kivi_session_destroy(&session);
 *         kivi_engine_destroy(&engine);
 *         return failed;
 *     }
 *
 * Threads: an engine and its sessions belong to one calling thread at a time; different engines are
 * independent. Nothing here prints, exits or keeps global state. A fallible call returns KIVI_OK or
 * fills the caller's kivi_error (NULL is allowed). Out-parameters come first, sizes stand beside
 * what they measure, the error is last. Dimensions: L layers, T tokens, H query heads, Hk KV heads,
 * D head size, G group, R residual window, V vocabulary.
 */
#ifndef KIVI_H
#define KIVI_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KIVI_VERSION "0.1.0"

#if defined(__GNUC__)
#define KIVI_API __attribute__((visibility("default")))
#else
#define KIVI_API
#endif

/* One list for codes, names and texts. FULL means: no pages now, wait or free some; it is not a
 * fault. */
#define KIVI_STATUS_LIST(X)                                                                        \
    X(OK, "ok")                                                                                    \
    X(ARG, "wrong argument")                                                                       \
    X(NOMEM, "out of memory")                                                                      \
    X(IO, "input/output error")                                                                    \
    X(FORMAT, "malformed file")                                                                    \
    X(UNSUPPORTED, "not supported")                                                                \
    X(DEVICE, "device error")                                                                      \
    X(FULL, "no free pages")                                                                       \
    X(CANCELLED, "cancelled")                                                                      \
    X(NUMERIC, "not a finite number")                                                              \
    X(INTERNAL, "internal error")

typedef enum kivi_status {
#define X(name, text) KIVI_##name,
    KIVI_STATUS_LIST(X)
#undef X
} kivi_status;

typedef struct kivi_error {
    kivi_status status;
    char text[256]; /* one line: what, where, found, expected */
} kivi_error;

/* Every allocation carries one of these tags; the sums below are counts, not estimates. */
#define KIVI_TAG_LIST(X)                                                                           \
    X(weights) X(kv_codes) X(kv_scales) X(kv_residual) X(activations) X(workspace) X(other)

typedef struct kivi_memory {
#define X(name) uint64_t name;
    KIVI_TAG_LIST(X)
#undef X
} kivi_memory; /* bytes held now, by tag */

/* Which positions a query sees in 16 bit; everything older is read back from the codes. p is the
 * query's position. PAPER   a prompt row: its whole prompt. A generated row: keys from
 * floor(p/R)*R, values from max(0, p-R). STREAM  every row as a generated row: the honest rule for
 * scoring a prompt. SPAN    a prompt row: from floor(p/N)*N or from where a generated row would
 * see, whichever is earlier. */
typedef enum kivi_rule { KIVI_RULE_PAPER, KIVI_RULE_STREAM, KIVI_RULE_SPAN } kivi_rule;

/* Parts of a + kind (ARCHITECTURE.md 5). All but the first can be left out, to measure each, and the
 * last three, of a plain kind, put in: these alone have kivi2's codes. */
enum {
    KIVI_PLUS = 1,       /* keys in groups of a page; values in groups of 64, no zero point */
    KIVI_PLUS_WIDE = 2,  /* 2-bit keys: a quarter of the channels of each page has 4 bits */
    KIVI_PLUS_FIT = 4,   /* 2-bit keys: ranges by least squares */
    KIVI_PLUS_TURN = 8,  /* values: turned by a Hadamard matrix */
    KIVI_PLUS_STEP = 16, /* values: steps by least squares */
    KIVI_PLUS_ALL = 31, KIVI_PLUS_ZERO = 32, /* ZERO: values with a zero point, and then no STEP */
    KIVI_PLUS_K32 = 64, KIVI_PLUS_V32 = 128 /* groups of 32: of keys, of values */
};

/* A cache kind; kivi_kv_by_name (kivi_cache.h) knows those that have a name. Zero bits, group or
 * residual mean the default (kivi2: 2, 2, 32, 128). */
typedef struct kivi_kv_options {
    uint32_t k_bits, v_bits;  /* 2, 4, 8, or 16 for not quantized; + kinds: 2, 4, 16 and 2, 3, 16 */
    uint32_t plus;            /* parts of a + kind; 0: a plain kind */
    uint32_t group;           /* G: 16, 32, 64 or 128; divides the head size and R; + kinds: 128 */
    uint32_t residual_tokens; /* R: a multiple of G, at most 4096 */
    uint32_t sink_tokens; /* first positions that stay in 16 bit for good: 0 (default) to 4096 */
    kivi_rule rule;
    uint32_t span_tokens;   /* N of KIVI_RULE_SPAN, a multiple of the page (128) */
    uint32_t rewind_tokens; /* how far a sequence can step back at once: rows of 16 bit it keeps */
} kivi_kv_options;

typedef struct kivi_engine_options {
    const char *model_path; /* GGUF file or Hugging Face folder */
    kivi_kv_options kv;
    uint32_t n_threads;    /* 0: one for each core this process may use */
    uint32_t ctx_tokens;   /* longest session; 0: the model's training context */
    uint32_t max_sessions; /* pages are made for this many sessions of ctx_tokens; 0: one */
    uint64_t kv_bytes;     /* bytes of all pages; 0: as many as those sessions need at most */
    uint32_t step_rows;    /* most rows in one step; 0: 512, and 2,048 on a device unless all_logits
                            * or a shorter ctx_tokens */
    uint32_t logit_rows;   /* most rows of logits in one step; 0: one for each session */
    bool all_logits; /* keep logits of every row of a step, not of the last row of each item */
    const char *rope_type; /* "bf16", "f16": of the rotary frequencies, as a checkpoint converted as
                            * a whole (model.to(dtype)) has them; NULL: float32, as is usual */
    bool dummy_weights; /* random weights of dummy_seed: model_path needs only config.json */
    uint64_t dummy_seed;
    const char *dummy_type; /* "f16", "q8_0", "q4_0"; NULL: as config.json says */
    const char *disable; /* instruction sets not to use ("avx512,avx2"), on a GPU "cudnn"; NULL: none */
    const char *device; /* "cpu", "cuda", "cuda:N"; "auto" and NULL: CUDA where there is one */
    const char *compute_type; /* of products on a CUDA device: "f16" and NULL, "bf16" or "f32" */
    uint64_t gpu_memory_bytes; /* most memory to take of a CUDA device; 0: all there is */
    bool batch_invariant; /* on a CUDA device, too, neighbours change no bit (a CPU is always so) */
    uint64_t fail_after; /* tests: the allocation of this number fails, and all after it; 0: none */
    void (*log)(void *user, const char *line); /* NULL: silent */
    void *log_user;
} kivi_engine_options;

typedef struct kivi_engine_info {
    char model_name[64], architecture[32], weight_type[16];
    uint64_t n_params;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_vocab;
    uint32_t ctx_tokens, step_rows, n_threads;
    int32_t bos_id, eos_id; /* -1 when the file names none */
    bool adds_bos;
    const char *isa; /* the kernels in use: scalar, avx2, avx512, avx512vnni, ..., cuda */
    char device[96]; /* "cpu", "cuda:0 NVIDIA H100 80GB HBM3" */
    kivi_kv_options kv;
} kivi_engine_info;

typedef struct kivi_engine kivi_engine;
typedef struct kivi_session kivi_session;

KIVI_API const char *kivi_status_name(kivi_status status); /* "ARG" */
KIVI_API const char *kivi_status_text(kivi_status status); /* "wrong argument" */

/* ---- engine ---- */
KIVI_API kivi_engine_options kivi_engine_defaults(void);
/* Loads a model and makes all memory a step needs. On failure *out is NULL. */
KIVI_API kivi_status kivi_engine_create(kivi_engine **out, const kivi_engine_options *options,
                                        kivi_error *err);
/* Destroys and nulls; NULL is allowed. Sessions must be gone. */
KIVI_API void kivi_engine_destroy(kivi_engine **engine);
/* Lent for the engine's life. */
KIVI_API const kivi_engine_info *kivi_engine_info_get(const kivi_engine *engine);
KIVI_API kivi_memory kivi_engine_memory(const kivi_engine *engine); /* here and on the device */
KIVI_API kivi_memory kivi_engine_device_memory(const kivi_engine *engine); /* there alone */
/* What a plan with these options would hold for one session of ctx_tokens: the allocator's own
 * sums, nothing made. n_bits_out (NULL allowed): cache bits an element, scales and zeros counted,
 * window and sinks not. */
KIVI_API kivi_status kivi_engine_plan(kivi_memory *out, double *n_bits_out,
                                      const kivi_engine *engine, const kivi_kv_options *kv,
                                      uint32_t ctx_tokens, kivi_error *err);
/* Allocated bits of a cached element of the engine's own kind, scales and zeros counted. */
KIVI_API double kivi_engine_bits(const kivi_engine *engine);
/* Rows that failed as a key or value was not finite; values beyond float16 that were saturated. */
KIVI_API void kivi_engine_counters(const kivi_engine *engine, uint64_t *n_nonfinite,
                                   uint64_t *n_saturated);

/* ---- session ---- */
KIVI_API kivi_status kivi_session_create(kivi_session **out, kivi_engine *engine, kivi_error *err);
KIVI_API void kivi_session_destroy(kivi_session **session);
KIVI_API uint32_t kivi_session_length(const kivi_session *session); /* tokens evaluated */
/* Announces that the next n_tokens rows fed are one prompt, in any number of steps. */
KIVI_API kivi_status kivi_session_begin_prompt(kivi_session *session, size_t n_tokens,
                                               kivi_error *err);
/* Gives up a prompt that is not fed to its end (a step was FULL, or somebody stopped it): back to
 * where it began, exactly as if it had not been. Without such a prompt nothing is done. */
KIVI_API kivi_status kivi_session_abandon_prompt(kivi_session *session, kivi_error *err);
/* begin_prompt and the steps for it; logits of the last token are ready afterwards. */
KIVI_API kivi_status kivi_session_prompt(kivi_session *session, const int32_t *tokens,
                                         size_t n_tokens, kivi_error *err);
KIVI_API kivi_status kivi_session_decode(kivi_session *session, int32_t token, kivi_error *err);
/* A second session with the same history. Full pages are shared, window and open page copied. */
KIVI_API kivi_status kivi_session_fork(kivi_session **out, const kivi_session *from,
                                       kivi_error *err);
/* Back to the first n_tokens, exactly as if the rest had never been: at once within rewind_tokens,
 * else the remaining history is evaluated again. No logits until the next step. */
KIVI_API kivi_status kivi_session_rewind(kivi_session *session, uint32_t n_tokens, kivi_error *err);
/* History and cache in a file, checksummed; load refuses another model's or kind's. check: does it? */
KIVI_API kivi_status kivi_session_save(const kivi_session *session, const char *path, kivi_error *err);
KIVI_API kivi_status kivi_session_load(kivi_session **out, kivi_engine *engine, const char *path,
                                       kivi_error *err);
KIVI_API kivi_status kivi_session_check(kivi_engine *engine, const char *path, kivi_error *err);
/* float32 [V] of a row of the session's item in the last step, lent until the next one. Without
 * all_logits (of engine or item) there is one row, 0: the item's last. NULL: there is none. */
KIVI_API const float *kivi_session_logits(const kivi_session *session, uint32_t row);

/* ---- step ---- */
typedef struct kivi_step_item {
    kivi_session *session;
    const int32_t *tokens; /* [n_tokens], n_tokens >= 1 */
    uint32_t n_tokens;
    bool all_logits; /* logits of each of its rows; the step's rows of logits are at most logit_rows */
    kivi_status status; /* out: this item's own result; a failed item does not touch its neighbours */
    kivi_error error; /* out */
} kivi_step_item;

/* Evaluates the rows of all items, at most step_rows in all, each session at most once. A session's
 * result does not depend on its neighbours, on how its prompt is cut, or on the number of threads:
 * the same bytes. On a CUDA device the last bits do; with batch_invariant only on the prompt's cuts. */
KIVI_API kivi_status kivi_engine_step(kivi_engine *engine, kivi_step_item *items, size_t n_items,
                                      kivi_error *err);

/* ---- text ---- */
enum {
    KIVI_TEXT_ADD_BOS = 1, /* put the model's BOS in front if the model wants one */
    KIVI_TEXT_SPECIAL = 2
}; /* special tokens spelled in the text become themselves; never for a user's words */
/* Bytes to ids. *n_out is the number needed; when it exceeds max_ids nothing is written and ARG is
 * returned. */
KIVI_API kivi_status kivi_tokenize(const kivi_engine *engine, const char *text, size_t n_bytes,
                                   unsigned flags, int32_t *ids, size_t max_ids, size_t *n_out,
                                   kivi_error *err);
/* Raw bytes of one token, which may be part of a UTF-8 character; returns their number, at most
 * max_bytes. */
KIVI_API size_t kivi_token_bytes(const kivi_engine *engine, int32_t id, char *bytes,
                                 size_t max_bytes);
KIVI_API bool kivi_token_is_control(const kivi_engine *engine, int32_t id);

/* Gathers token bytes and hands out whole UTF-8 characters only; a malformed byte comes out as
 * U+FFFD. */
typedef struct kivi_utf8 {
    unsigned char pending[4];
    uint32_t n_pending;
} kivi_utf8;
/* Returns the bytes written to out, at most 3 * (n_bytes + 4). Call with n_bytes 0 to flush at the
 * end. */
KIVI_API size_t kivi_utf8_push(kivi_utf8 *state, const char *bytes, size_t n_bytes, char *out);

/* ---- sampling ---- */
typedef struct kivi_sampler_options {
    float temperature;    /* 0: greedy */
    uint32_t top_k;       /* 0: off */
    float top_p;          /* 1: off */
    float min_p;          /* 0: off */
    float repeat_penalty; /* 1: off; over the last repeat_tokens of history */
    uint32_t repeat_tokens;
    uint64_t seed;
} kivi_sampler_options;

typedef struct kivi_sampler kivi_sampler;
KIVI_API kivi_sampler_options kivi_sampler_defaults(void); /* 0.8, 40, 0.95, 0.05, 1.1 over 64, seed 0 */
KIVI_API kivi_status kivi_sampler_create(kivi_sampler **out, const kivi_engine *engine,
                                         const kivi_sampler_options *options, kivi_error *err);
KIVI_API void kivi_sampler_destroy(kivi_sampler **sampler);
/* One id from the session's last logits and its history. The same seed and history give the same ids,
 * and a CUDA device, where it is drawn there, takes the id that a CPU would from the same logits. */
KIVI_API kivi_status kivi_sampler_next(int32_t *id, kivi_sampler *sampler,
                                       const kivi_session *session, kivi_error *err);
KIVI_API int32_t kivi_logits_argmax(const float *logits, uint32_t n_vocab); /* the lowest id on a tie */

#ifdef __cplusplus
}
#endif
#endif
