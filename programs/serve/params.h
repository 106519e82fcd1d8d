/* params.h: a request's JSON as settings, every one checked. */
#ifndef SERVE_PARAMS_H
#define SERVE_PARAMS_H
#include "grammar.h"
#include "kivi_serve.h"
#include "kivi_text.h"

#include <jansson.h>

/* Why a request is refused: an HTTP status and OpenAI's error object. */
typedef struct fault {
    int status;        /* 0: none */
    const char *param; /* static, or NULL */
    const char *code;  /* a word for programs, static, or NULL */
    unsigned retry_s;  /* of 429 and 503: Retry-After; 0: none */
    char message[480];
} fault;

/* Fills f and returns false, so that a check can return it. */
bool refuse_with(fault *f, int status, const char *param, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* OpenAI's type of an HTTP status. */
const char *fault_type(int status);

/* What requests are checked against; all lent. */
typedef struct params_context {
    const kivi_engine *engine;
    const kivi_vocab *vocab;
    const token_table *table;
    const char *model_name;  /* the one served */
    const char *chat_format; /* NULL: the model's own */
    bool parse_special;      /* control tokens spelled in a completion's prompt are meant */
} params_context;

enum {
    MAX_PROMPTS = 2048,
    MAX_CHOICES_ALL = 4096, /* prompts * n */
    MAX_STOPS = 32,
    MAX_STOP_BYTES = 1024,
    MAX_TOP_LOGPROBS = 20,
};

typedef struct token_list {
    int32_t *ids;
    size_t n;
} token_list;

typedef struct params {
    bool chat, stream, include_usage, usage_in_chunks, echo, include_stop, keep_special;
    token_list *prompts; /* [n_prompts] */
    size_t n_prompts;
    bool fits_context;      /* max_tokens was not given: less if the context leaves less */
    char *stops[MAX_STOPS]; /* not empty */
    size_t n_stop_bytes[MAX_STOPS];
    size_t n_stops;
    grammar *constraint;  /* NULL: none */
    kivi_request request; /* prompt, callbacks and constraint are filled in by the caller */
    kivi_bias *biases;
    int32_t stop_ids[KIVI_MAX_STOP_IDS];
} params;

/* Fills *p, which the caller ends with params_deinit in any case. */
bool params_read(params *p, const json_t *body, bool chat, const params_context *context, fault *f);
void params_deinit(params *p);

/* The text or the messages of a body as token ids; the caller frees list->ids. */
bool tokenize_text(token_list *list, const char *text, size_t n_bytes, unsigned flags,
                   const params_context *context, fault *f);
bool tokenize_messages(token_list *list, const json_t *body, const params_context *context,
                       fault *f);
/* The i-th member of an array of ids into *id, checked. */
bool read_token_id(int32_t *id, const json_t *array, size_t i, const char *param,
                   const params_context *context, fault *f);
/* A member that is true or false; absent and null are `absent`. */
bool read_flag(bool *out, const json_t *body, const char *param, bool absent, fault *f);
/* The body's "model", if it has one, is the one served. */
bool check_model(const json_t *body, const params_context *context, fault *f);

#endif
