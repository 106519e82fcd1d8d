#include "params.h"

#include "schema.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

bool refuse_with(fault *f, int status, const char *param, const char *format, ...) {
    va_list args;
    *f = (fault){.status = status, .param = param};
    va_start(args, format);
    vsnprintf(f->message, sizeof f->message, format, args);
    va_end(args);
    return false;
}

const char *fault_type(int status) {
    switch (status) {
    case 401: return "authentication_error";
    case 404: return "not_found_error";
    case 429: return "rate_limit_error";
    case 501: return "not_supported_error";
    case 503: return "unavailable_error";
    default: return status < 500 ? "invalid_request_error" : "server_error";
    }
}

static bool no_memory(fault *f) { return refuse_with(f, 503, NULL, "out of memory"); }

/* ---- single values; null is as good as absent ---- */

static const json_t *member(const json_t *body, const char *param) {
    const json_t *value = json_object_get(body, param);
    return json_is_null(value) ? NULL : value;
}

bool read_flag(bool *out, const json_t *body, const char *param, bool absent, fault *f) {
    const json_t *value = member(body, param);
    *out = value ? json_is_true(value) : absent;
    if (!value || json_is_boolean(value)) return true;
    return refuse_with(f, 400, param, "%s: expected true or false", param);
}

static bool read_integer(int64_t *out, const json_t *body, const char *param, int64_t absent,
                         int64_t min, int64_t max, fault *f) {
    const json_t *value = member(body, param);
    *out = value ? json_integer_value(value) : absent;
    if (!value) return true;
    if (json_is_integer(value) && *out >= min && *out <= max) return true;
    return refuse_with(f, 400, param, "%s: expected an integer from %lld to %lld", param,
                       (long long)min, (long long)max);
}

static bool read_u32(uint32_t *out, const json_t *body, const char *param, uint32_t absent,
                     uint32_t min, uint32_t max, fault *f) {
    int64_t value;
    if (!read_integer(&value, body, param, absent, min, max, f)) return false;
    *out = (uint32_t)value;
    return true;
}

static bool read_float(float *out, const json_t *body, const char *param, float absent, double min,
                       double max, fault *f) {
    const json_t *value = member(body, param);
    double real = value ? json_number_value(value) : (double)absent;
    *out = (float)real;
    if (!value || (json_is_number(value) && real >= min && real <= max)) return true;
    return refuse_with(f, 400, param, "%s: expected a number from %g to %g", param, min, max);
}

/* ---- what is known and not built: refused, not passed over ---- */

/* An empty list, an empty text, false and the words that mean "as if it were not there". */
static bool means_nothing(const json_t *value) {
    const char *text = json_string_value(value);
    if (json_is_false(value)) return true;
    if (text) return !*text || !strcmp(text, "none") || !strcmp(text, "auto");
    if (json_is_array(value)) return json_array_size(value) == 0;
    return false;
}

static bool check_unbuilt(const json_t *body, fault *f) {
    static const char *const names[] = {"tools",
                                        "functions",
                                        "function_call",
                                        "tool_choice",
                                        "audio",
                                        "suffix",
                                        "prompt_embeds",
                                        "use_beam_search",
                                        "grammar",
                                        "guided_json",
                                        "guided_regex",
                                        "guided_choice",
                                        "guided_grammar",
                                        "prompt_logprobs",
                                        "truncate_prompt_tokens",
                                        "documents",
                                        "chat_template",
                                        "structured_outputs",
                                        "continue_final_message"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const json_t *value = member(body, names[i]);
        if (value && !means_nothing(value))
            return refuse_with(f, 400, names[i], "%s is not supported", names[i]);
    }
    const json_t *best = member(body, "best_of"), *n = member(body, "n");
    if (best && json_integer_value(best) != (n ? json_integer_value(n) : 1))
        return refuse_with(f, 400, "best_of", "best_of other than n is not supported");
    return true;
}

bool check_model(const json_t *body, const params_context *context, fault *f) {
    const json_t *model = member(body, "model");
    if (!model) return true;
    if (!json_is_string(model)) return refuse_with(f, 400, "model", "model: expected a name");
    if (!strcmp(json_string_value(model), context->model_name)) return true;
    refuse_with(f, 404, "model", "the model '%.120s' is not served here; '%s' is",
                json_string_value(model), context->model_name);
    f->code = "model_not_found";
    return false;
}

/* ---- prompts ---- */

bool read_token_id(int32_t *id, const json_t *array, size_t i, const char *param,
                   const params_context *context, fault *f) {
    const json_t *item = json_array_get(array, i);
    json_int_t value = json_integer_value(item);
    uint32_t n_vocab = kivi_engine_info_get(context->engine)->n_vocab;
    if (!json_is_integer(item) || value < 0 || value >= n_vocab)
        return refuse_with(f, 400, param, "%s: item %zu: expected a token id from 0 to %u", param,
                           i, n_vocab - 1);
    *id = (int32_t)value;
    return true;
}

static bool read_ids(token_list *list, const json_t *array, const char *param,
                     const params_context *context, fault *f) {
    size_t n = json_array_size(array);
    list->ids = malloc((n + 1) * sizeof *list->ids);
    if (!list->ids) return no_memory(f);
    for (list->n = 0; list->n < n; list->n++)
        if (!read_token_id(&list->ids[list->n], array, list->n, param, context, f)) return false;
    return true;
}

/* One token covers so many bytes at most; a text too long for the context is refused before it is
 * taken apart. */
enum { MOST_BYTES_A_TOKEN = 512 };

bool tokenize_text(token_list *list, const char *text, size_t n_bytes, unsigned flags,
                   const params_context *context, fault *f) {
    kivi_error err = {0};
    uint32_t ctx = kivi_engine_info_get(context->engine)->ctx_tokens;
    if (n_bytes / MOST_BYTES_A_TOKEN > ctx)
        return refuse_with(f, 400, "prompt", "the prompt has %zu bytes, more than %u tokens hold",
                           n_bytes, ctx);
    /* A token is at least a byte, but for BOS. */
    size_t room = n_bytes + 2;
    list->ids = malloc(room * sizeof *list->ids);
    if (!list->ids) return no_memory(f);
    if (kivi_tokenize(context->engine, text, n_bytes, flags, list->ids, room, &list->n, &err) ==
        KIVI_OK)
        return true;
    return refuse_with(f, 400, "prompt", "%s", err.text);
}

static bool add_prompt(params *p, const json_t *item, const json_t *body,
                       const params_context *context, fault *f) {
    token_list *list = &p->prompts[p->n_prompts++];
    bool special, add_special;
    if (json_is_array(item)) return read_ids(list, item, "prompt", context, f);
    if (!json_is_string(item))
        return refuse_with(f, 400, "prompt",
                           "prompt: expected a string, strings, token ids, or "
                           "lists of token ids");
    if (!read_flag(&add_special, body, "add_special_tokens", true, f) ||
        !read_flag(&special, body, "parse_special", context->parse_special, f))
        return false;
    unsigned flags = (add_special ? KIVI_TEXT_ADD_BOS : 0u) | (special ? KIVI_TEXT_SPECIAL : 0u);
    return tokenize_text(list, json_string_value(item), json_string_length(item), flags, context,
                         f);
}

static bool read_prompts(params *p, const json_t *body, const params_context *context, fault *f) {
    const json_t *prompt = member(body, "prompt");
    if (!prompt) return refuse_with(f, 400, "prompt", "prompt is missing");
    bool is_one = !json_is_array(prompt) || json_is_integer(json_array_get(prompt, 0));
    size_t n = is_one ? 1 : json_array_size(prompt);
    if (n == 0 || n > MAX_PROMPTS)
        return refuse_with(f, 400, "prompt", "prompt: %zu prompts, expected 1 to %d", n,
                           MAX_PROMPTS);
    p->prompts = calloc(n, sizeof *p->prompts);
    if (!p->prompts) return no_memory(f);
    for (size_t i = 0; i < n; i++) {
        if (!add_prompt(p, is_one ? prompt : json_array_get(prompt, i), body, context, f))
            return false;
        if (p->prompts[i].n == 0)
            return refuse_with(f, 400, "prompt", "prompt: prompt %zu has no tokens", i);
    }
    return true;
}

/* ---- messages ---- */

/* Content is a text, or parts of which all are text; these are joined into *joined, which the
 * caller frees. */
static bool read_content(kivi_message *message, char **joined, const json_t *content, size_t i,
                         fault *f) {
    const json_t *part;
    size_t k, n = 0;
    if (json_is_string(content)) {
        message->text = json_string_value(content);
        message->n_bytes = json_string_length(content);
        return true;
    }
    json_array_foreach(content, k, part) {
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!type || strcmp(type, "text") || !json_is_string(json_object_get(part, "text")))
            return refuse_with(f, 400, "messages",
                               "messages[%zu].content[%zu]: only parts of type text are supported",
                               i, k);
        n += json_string_length(json_object_get(part, "text"));
    }
    if (!json_is_array(content))
        return refuse_with(f, 400, "messages", "messages[%zu].content: expected a text", i);
    *joined = malloc(n + 1);
    if (!*joined) return no_memory(f);
    message->text = *joined;
    message->n_bytes = n;
    n = 0;
    json_array_foreach(content, k, part) {
        const json_t *text = json_object_get(part, "text");
        memcpy(*joined + n, json_string_value(text), json_string_length(text));
        n += json_string_length(text);
    }
    return true;
}

static bool read_message(kivi_message *message, char **joined, const json_t *item, size_t i,
                         fault *f) {
    static const char *const roles[] = {"system", "user", "assistant"};
    const char *role = json_string_value(json_object_get(item, "role"));
    if (!role) return refuse_with(f, 400, "messages", "messages[%zu]: role is missing", i);
    if (!strcmp(role, "developer")) role = "system"; /* OpenAI's newer name of it */
    message->role = NULL;
    for (size_t k = 0; k < 3; k++)
        if (!strcmp(role, roles[k])) message->role = roles[k];
    if (!message->role)
        return refuse_with(f, 400, "messages",
                           "messages[%zu].role: '%.40s', expected system, user or assistant", i,
                           role);
    if (json_array_size(json_object_get(item, "tool_calls")))
        return refuse_with(f, 400, "messages", "messages[%zu]: tool_calls are not supported", i);
    return read_content(message, joined, json_object_get(item, "content"), i, f);
}

static bool render(token_list *list, const kivi_message *messages, size_t n, unsigned flags,
                   const params_context *context, fault *f) {
    kivi_error err = {0};
    size_t n_bytes = 0;
    for (size_t i = 0; i < n; i++) n_bytes += messages[i].n_bytes;
    uint32_t ctx = kivi_engine_info_get(context->engine)->ctx_tokens;
    if (n_bytes / MOST_BYTES_A_TOKEN > ctx)
        return refuse_with(f, 400, "messages",
                           "the messages have %zu bytes, more than %u tokens hold", n_bytes, ctx);
    kivi_status status = kivi_chat_tokenize(context->vocab, context->chat_format, messages, n,
                                            flags, NULL, 0, &list->n, &err);
    if (status == KIVI_ARG && list->n) {
        list->ids = malloc(list->n * sizeof *list->ids);
        if (!list->ids) return no_memory(f);
        status = kivi_chat_tokenize(context->vocab, context->chat_format, messages, n, flags,
                                    list->ids, list->n, &list->n, &err);
    }
    if (status == KIVI_OK && list->n) return true;
    return refuse_with(f, status == KIVI_NOMEM ? 503 : 400, "messages", "%s",
                       status ? err.text : "the messages have no tokens");
}

bool tokenize_messages(token_list *list, const json_t *body, const params_context *context,
                       fault *f) {
    const json_t *array = member(body, "messages");
    size_t n = json_array_size(array), i = 0;
    bool add_answer, ok = true;
    if (!context->vocab) return refuse_with(f, 400, NULL, "the model has no vocabulary");
    if (n == 0 || n > MAX_PROMPTS)
        return refuse_with(f, 400, "messages", "messages: expected 1 to %d messages", MAX_PROMPTS);
    if (!read_flag(&add_answer, body, "add_generation_prompt", true, f)) return false;
    kivi_message *messages = calloc(n, sizeof *messages);
    char **joined = calloc(n, sizeof *joined);
    if (!messages || !joined) ok = no_memory(f);
    for (i = 0; ok && i < n; i++)
        ok = read_message(&messages[i], &joined[i], json_array_get(array, i), i, f);
    if (ok) ok = render(list, messages, n, add_answer ? KIVI_CHAT_ANSWER : 0u, context, f);
    for (i = 0; joined && i < n; i++) free(joined[i]);
    free(joined);
    free(messages);
    return ok;
}

/* ---- sampling and ends ---- */

static bool read_sampling(params *p, const json_t *body, fault *f) {
    kivi_request *r = &p->request;
    int64_t top_k, seed;
    if (!read_float(&r->temperature, body, "temperature", 1, 0, 100, f) ||
        !read_float(&r->top_p, body, "top_p", 1, 1e-6, 1, f) ||
        !read_float(&r->min_p, body, "min_p", 0, 0, 1, f) ||
        !read_integer(&top_k, body, "top_k", 0, -1, INT32_MAX, f) ||
        !read_float(&r->presence_penalty, body, "presence_penalty", 0, -2, 2, f) ||
        !read_float(&r->frequency_penalty, body, "frequency_penalty", 0, -2, 2, f) ||
        !read_float(&r->repetition_penalty, body, "repetition_penalty", 1, 0.01, 100, f) ||
        !read_integer(&seed, body, "seed", 0, INT64_MIN, INT64_MAX, f))
        return false;
    r->top_k = top_k < 0 ? 0 : (uint32_t)top_k;
    r->seed = (uint64_t)seed;
    if (!member(body, "seed") && getrandom(&r->seed, sizeof r->seed, 0) != sizeof r->seed)
        return refuse_with(f, 500, NULL, "no random numbers can be had");
    return read_u32(&r->n, body, "n", 1, 1, KIVI_MAX_CHOICES, f);
}

/* OpenAI's default of a completion is 16, of a chat what the context leaves. */
static bool read_lengths(params *p, const json_t *body, fault *f) {
    kivi_request *r = &p->request;
    const char *param =
        member(body, "max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
    uint32_t least = p->chat ? 1 : 0;
    p->fits_context = !member(body, param) && !p->chat;
    if (!read_u32(&r->max_tokens, body, param, p->chat ? UINT32_MAX : 16, least, INT32_MAX, f) ||
        !read_u32(&r->min_tokens, body, "min_tokens", 0, 0, INT32_MAX, f) ||
        !read_flag(&r->ignore_eos, body, "ignore_eos", false, f))
        return false;
    if (r->min_tokens > r->max_tokens)
        return refuse_with(f, 400, "min_tokens", "min_tokens: %u is above max_tokens %u",
                           r->min_tokens, r->max_tokens);
    return true;
}

static bool read_logprobs(params *p, const json_t *body, fault *f) {
    kivi_request *r = &p->request;
    int64_t top;
    bool wanted;
    if (!p->chat) {
        if (!read_integer(&top, body, "logprobs", -1, 0, MAX_TOP_LOGPROBS, f) ||
            !read_flag(&p->echo, body, "echo", false, f))
            return false;
        r->logprobs = (int32_t)top;
        r->prompt_logprobs = p->echo ? r->logprobs : -1;
        return true;
    }
    if (!read_flag(&wanted, body, "logprobs", false, f) ||
        !read_integer(&top, body, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS, f))
        return false;
    if (top && !wanted)
        return refuse_with(f, 400, "top_logprobs", "top_logprobs: needs logprobs true");
    if (member(body, "echo") && !json_is_false(member(body, "echo")))
        return refuse_with(f, 400, "echo", "echo is not supported for chats");
    r->logprobs = wanted ? (int32_t)top : -1;
    return true;
}

static bool add_stop(params *p, const json_t *item, fault *f) {
    size_t n = json_string_length(item);
    if (!json_is_string(item) || n == 0 || n > MAX_STOP_BYTES)
        return refuse_with(f, 400, "stop", "stop: expected strings of 1 to %d bytes",
                           MAX_STOP_BYTES);
    char *copy = malloc(n + 1);
    if (!copy) return no_memory(f);
    memcpy(copy, json_string_value(item), n + 1);
    p->stops[p->n_stops] = copy;
    p->n_stop_bytes[p->n_stops++] = n;
    return true;
}

static bool read_stops(params *p, const json_t *body, const params_context *context, fault *f) {
    const json_t *stop = member(body, "stop"), *ids = member(body, "stop_token_ids"), *item;
    kivi_request *r = &p->request;
    size_t i;
    if (json_is_string(stop) && json_string_length(stop) && !add_stop(p, stop, f)) return false;
    if (stop && !json_is_string(stop) && !json_is_array(stop))
        return refuse_with(f, 400, "stop", "stop: expected a string or strings");
    if (json_array_size(stop) > MAX_STOPS)
        return refuse_with(f, 400, "stop", "stop: at most %d strings", MAX_STOPS);
    json_array_foreach(stop, i, item) {
        if (!add_stop(p, item, f)) return false;
    }
    if (ids && (!json_is_array(ids) || json_array_size(ids) > KIVI_MAX_STOP_IDS))
        return refuse_with(f, 400, "stop_token_ids", "stop_token_ids: expected at most %d ids",
                           KIVI_MAX_STOP_IDS);
    r->n_stop_ids = json_array_size(ids);
    r->stop_ids = p->stop_ids;
    for (i = 0; i < r->n_stop_ids; i++)
        if (!read_token_id(&p->stop_ids[i], ids, i, "stop_token_ids", context, f)) return false;
    return read_flag(&p->include_stop, body, "include_stop_str_in_output", false, f);
}

static bool read_bias(params *p, const json_t *body, const params_context *context, fault *f) {
    const json_t *bias = member(body, "logit_bias"), *value;
    uint32_t n_vocab = kivi_engine_info_get(context->engine)->n_vocab;
    const char *key;
    if (!bias) return true;
    if (!json_is_object(bias) || json_object_size(bias) > KIVI_MAX_BIASES)
        return refuse_with(f, 400, "logit_bias",
                           "logit_bias: expected an object of at most %d token ids",
                           KIVI_MAX_BIASES);
    p->biases = calloc(json_object_size(bias) + 1, sizeof *p->biases);
    if (!p->biases) return no_memory(f);
    p->request.biases = p->biases;
    json_object_foreach((json_t *)(uintptr_t)bias, key, value) {
        char *end;
        unsigned long id = strtoul(key, &end, 10);
        double amount = json_number_value(value);
        if (*key < '0' || *key > '9' || *end || id >= n_vocab)
            return refuse_with(f, 400, "logit_bias",
                               "logit_bias: '%.20s', expected a token id from 0 to %u", key,
                               n_vocab - 1);
        if (!json_is_number(value) || !(amount >= -100 && amount <= 100))
            return refuse_with(f, 400, "logit_bias",
                               "logit_bias: token %lu: expected a number from -100 to 100", id);
        p->biases[p->request.n_biases++] = (kivi_bias){(int32_t)id, (float)amount};
    }
    return true;
}

/* ---- form of the answer ---- */

static bool read_stream(params *p, const json_t *body, fault *f) {
    const json_t *options = member(body, "stream_options");
    if (!read_flag(&p->stream, body, "stream", false, f)) return false;
    if (!options) return true;
    if (!json_is_object(options))
        return refuse_with(f, 400, "stream_options", "stream_options: expected an object");
    if (!p->stream)
        return refuse_with(f, 400, "stream_options", "stream_options: only with stream true");
    return read_flag(&p->include_usage, options, "include_usage", false, f) &&
           read_flag(&p->usage_in_chunks, options, "continuous_usage_stats", false, f);
}

static bool compile_format(params *p, const json_t *schema, const params_context *context,
                           fault *f) {
    char why[400] = "out of memory";
    if (!context->table)
        return refuse_with(f, 400, "response_format", "the model has no vocabulary");
    p->constraint = grammar_create(context->table);
    if (!p->constraint) return no_memory(f);
    if (schema ? schema_compile(p->constraint, schema, why, sizeof why)
               : schema_any_object(p->constraint))
        return true;
    return refuse_with(f, 400, "response_format", "response_format: %s", why);
}

static bool read_format(params *p, const json_t *body, const params_context *context, fault *f) {
    const json_t *format = member(body, "response_format");
    const char *type = json_string_value(json_object_get(format, "type"));
    if (!format) return true;
    if (!type)
        return refuse_with(f, 400, "response_format",
                           "response_format: expected an object with a type");
    if (!strcmp(type, "text")) return true;
    if (!strcmp(type, "json_object")) return compile_format(p, NULL, context, f);
    if (strcmp(type, "json_schema"))
        return refuse_with(f, 400, "response_format",
                           "response_format.type: '%.40s', expected text, json_object or "
                           "json_schema",
                           type);
    const json_t *schema = json_object_get(json_object_get(format, "json_schema"), "schema");
    if (!schema)
        return refuse_with(f, 400, "response_format",
                           "response_format.json_schema.schema is "
                           "missing");
    return compile_format(p, schema, context, f);
}

static bool read_priority(params *p, const json_t *body, fault *f) {
    const json_t *salt = member(body, "cache_salt");
    int64_t priority;
    if (!read_integer(&priority, body, "priority", 0, -1000000, 1000000, f)) return false;
    p->request.priority = (int32_t)priority;
    if (!salt) return true;
    if (!json_is_string(salt) || json_string_length(salt) > 256)
        return refuse_with(f, 400, "cache_salt", "cache_salt: expected at most 256 bytes of text");
    p->request.salt = json_string_value(salt); /* lent by the body, copied by submit */
    p->request.n_salt_bytes = json_string_length(salt);
    return true;
}

bool params_read(params *p, const json_t *body, bool chat, const params_context *context,
                 fault *f) {
    bool skip_special;
    *p = (params){.chat = chat, .request = kivi_request_defaults()};
    if (!json_is_object(body)) return refuse_with(f, 400, NULL, "expected a JSON object");
    if (!check_model(body, context, f) || !check_unbuilt(body, f) || !read_sampling(p, body, f) ||
        !read_lengths(p, body, f) || !read_logprobs(p, body, f) ||
        !read_stops(p, body, context, f) || !read_bias(p, body, context, f) ||
        !read_stream(p, body, f) || !read_priority(p, body, f) ||
        !read_flag(&skip_special, body, "skip_special_tokens", true, f) ||
        !read_format(p, body, context, f))
        return false;
    p->keep_special = !skip_special;
    if (chat) {
        p->prompts = calloc(1, sizeof *p->prompts);
        if (!p->prompts) return no_memory(f);
        p->n_prompts = 1;
        return tokenize_messages(p->prompts, body, context, f);
    }
    if (!read_prompts(p, body, context, f)) return false;
    if (p->n_prompts * p->request.n > MAX_CHOICES_ALL)
        return refuse_with(f, 400, "n", "n: %u of %zu prompts, at most %d choices in all",
                           p->request.n, p->n_prompts, MAX_CHOICES_ALL);
    return true;
}

void params_deinit(params *p) {
    for (size_t i = 0; i < p->n_prompts; i++) free(p->prompts[i].ids);
    for (size_t i = 0; i < p->n_stops; i++) free(p->stops[i]);
    free(p->prompts);
    free(p->biases);
    grammar_destroy(&p->constraint);
    *p = (params){0};
}
