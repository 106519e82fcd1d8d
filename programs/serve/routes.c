/* routes.c: what is served where. */
#include "http.h"

#include <stdlib.h>
#include <string.h>

static enum MHD_Result json_text(exchange *e, text *t) {
    return respond(e, 200, "application/json", t);
}

/* The body as an object into e->parsed; false: e->failure says why. */
static bool parse_body(exchange *e) {
    json_error_t where;
    const char *data = e->body.data ? e->body.data : "";
    e->parsed = json_loadb(data, e->body.n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &where);
    text_deinit(&e->body);
    if (!e->parsed)
        return refuse_with(&e->failure, 400, NULL,
                           "the body is not valid JSON: %s, line %d, column %d", where.text,
                           where.line, where.column);
    return json_is_object(e->parsed) ||
           refuse_with(&e->failure, 400, NULL, "the body is not a JSON object");
}

/* ---- what the server is ---- */

static enum MHD_Result get_page(exchange *e) {
    text t;
    text_init(&t, 1 << 24);
    text_put(&t, page_html, page_html_bytes);
    return respond(e, 200, "text/html; charset=utf-8", &t);
}

static enum MHD_Result get_health(exchange *e) {
    text t;
    text_init(&t, 256);
    text_puts(&t, "{\"status\":\"ok\"}");
    return json_text(e, &t);
}

static enum MHD_Result get_ready(exchange *e) {
    fault f;
    const char *why = server_unready(e->s);
    if (!why) return get_health(e);
    refuse_with(&f, 503, NULL, "%s", why);
    return respond_fault(e, &f);
}

static enum MHD_Result get_version(exchange *e) {
    text t;
    text_init(&t, 256);
    text_puts(&t, "{\"version\":\"" KIVI_VERSION "\"}");
    return json_text(e, &t);
}

static enum MHD_Result get_metrics(exchange *e) {
    server *s = e->s;
    bool loaded = atomic_load(&s->loaded);
    metrics_context c = {s->o.model_name, loaded ? s->engine : NULL, loaded ? s->scheduler : NULL,
                         atomic_load(&s->n_connections)};
    text t;
    text_init(&t, 1 << 22);
    metrics_write(&t, &s->counts, &c);
    return respond(e, 200, "text/plain; version=0.0.4; charset=utf-8", &t);
}

static void put_model(text *t, const server *s) {
    const kivi_engine_info *info = kivi_engine_info_get(s->engine);
    text_puts(t, "{\"id\":");
    text_json_string(t, s->o.model_name);
    text_printf(t, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"kivi\",\"root\":",
                (long long)s->created_s);
    text_json_string(t, info->model_name);
    text_printf(t,
                ",\"parent\":null,\"max_model_len\":%u,\"meta\":{\"architecture\":\"%s\","
                "\"n_params\":%llu,\"n_vocab\":%u,\"kv_k_bits\":%u,\"kv_v_bits\":%u,"
                "\"kv_bits_per_element\":%.4f}}",
                info->ctx_tokens, info->architecture, (unsigned long long)info->n_params,
                info->n_vocab, info->kv.k_bits, info->kv.v_bits, kivi_engine_bits(s->engine));
}

static enum MHD_Result get_models(exchange *e) {
    text t;
    text_init(&t, 1 << 16);
    text_puts(&t, "{\"object\":\"list\",\"data\":[");
    put_model(&t, e->s);
    text_puts(&t, "]}");
    return json_text(e, &t);
}

static enum MHD_Result get_model(exchange *e) {
    text t;
    fault f;
    if (strcmp(e->rest, e->s->o.model_name)) {
        refuse_with(&f, 404, "model", "the model '%.120s' is not served here; '%s' is", e->rest,
                    e->s->o.model_name);
        f.code = "model_not_found";
        return respond_fault(e, &f);
    }
    text_init(&t, 1 << 16);
    put_model(&t, e->s);
    return json_text(e, &t);
}

/* ---- tokens ---- */

static void put_token(text *t, const server *s, int32_t id) {
    char bytes[512];
    text_json(t, bytes, kivi_vocab_bytes(s->vocab, id, bytes, sizeof bytes));
}

static void put_named_token(text *t, const char *name, const server *s, int32_t id) {
    text_printf(t, ",\"%s\":", name);
    if (id < 0) text_puts(t, "null");
    else put_token(t, s, id);
}

static bool tokenize(token_list *list, exchange *e) {
    params_context context = server_context(e->s);
    const json_t *body = e->parsed, *prompt = json_object_get(body, "prompt");
    fault *f = &e->failure;
    bool add, special;
    if (!check_model(body, &context, f)) return false;
    if (json_object_get(body, "messages")) return tokenize_messages(list, body, &context, f);
    if (!json_is_string(prompt))
        return refuse_with(f, 400, "prompt", "prompt: expected a string (or messages)");
    if (!read_flag(&add, body, "add_special_tokens", true, f) ||
        !read_flag(&special, body, "parse_special", context.parse_special, f))
        return false;
    unsigned flags = (add ? KIVI_TEXT_ADD_BOS : 0u) | (special ? KIVI_TEXT_SPECIAL : 0u);
    return tokenize_text(list, json_string_value(prompt), json_string_length(prompt), flags,
                         &context, f);
}

static void put_tokens(text *t, const server *s, const token_list *list, bool with_texts) {
    text_printf(t, "{\"count\":%zu,\"max_model_len\":%u,\"tokens\":[", list->n,
                kivi_engine_info_get(s->engine)->ctx_tokens);
    for (size_t i = 0; i < list->n; i++) text_printf(t, "%s%d", i ? "," : "", list->ids[i]);
    text_puts(t, "],\"token_strs\":");
    if (with_texts) {
        text_puts(t, "[");
        for (size_t i = 0; i < list->n; i++) {
            if (i) text_puts(t, ",");
            put_token(t, s, list->ids[i]);
        }
        text_puts(t, "]}");
    } else text_puts(t, "null}");
}

static void prepare_tokenize(exchange *e) {
    token_list list = {0};
    bool with_texts = false;
    if (parse_body(e) && tokenize(&list, e) &&
        read_flag(&with_texts, e->parsed, "return_token_strs", false, &e->failure))
        put_tokens(&e->reply, e->s, &list, with_texts);
    free(list.ids);
}

static bool detokenize(text *out, exchange *e) {
    params_context context = server_context(e->s);
    const json_t *tokens = json_object_get(e->parsed, "tokens");
    fault *f = &e->failure;
    kivi_utf8 utf8 = {0};
    char piece[512], whole[3 * (512 + 4)];
    if (!check_model(e->parsed, &context, f)) return false;
    if (!json_is_array(tokens))
        return refuse_with(f, 400, "tokens", "tokens: expected an array of token ids");
    for (size_t i = 0; i < json_array_size(tokens); i++) {
        int32_t id;
        if (!read_token_id(&id, tokens, i, "tokens", &context, f)) return false;
        size_t n = kivi_vocab_bytes(e->s->vocab, id, piece, sizeof piece);
        if (n) text_put(out, whole, kivi_utf8_push(&utf8, piece, n, whole));
    }
    text_put(out, whole, kivi_utf8_push(&utf8, NULL, 0, whole));
    return true;
}

static void prepare_detokenize(exchange *e) {
    text plain;
    text_init(&plain, SIZE_MAX / 2);
    if (parse_body(e) && detokenize(&plain, e)) {
        text_puts(&e->reply, "{\"prompt\":");
        text_json(&e->reply, plain.data, plain.n_bytes);
        text_puts(&e->reply, "}");
    }
    text_deinit(&plain);
}

static enum MHD_Result get_tokenizer_info(exchange *e) {
    const kivi_engine_info *info = kivi_engine_info_get(e->s->engine);
    text t;
    text_init(&t, 1 << 22);
    text_puts(&t, "{\"tokenizer_class\":\"kivi\"");
    put_named_token(&t, "bos_token", e->s, info->bos_id);
    put_named_token(&t, "eos_token", e->s, info->eos_id);
    put_named_token(&t, "pad_token", e->s, info->eos_id);
    text_printf(&t, ",\"add_bos_token\":%s,\"model_max_length\":%u,\"chat_template\":",
                info->adds_bos ? "true" : "false", info->ctx_tokens);
    text_json_string(&t, kivi_vocab_chat_template(e->s->vocab));
    text_puts(&t, "}");
    return json_text(e, &t);
}

/* ---- work ---- */

static void prepare_completion(exchange *e) {
    if (parse_body(e)) e->work = job_create(e->s, e->parsed, false, &e->log, &e->failure);
}

static void prepare_chat(exchange *e) {
    if (parse_body(e)) e->work = job_create(e->s, e->parsed, true, &e->log, &e->failure);
}

static const route routes[] = {
    {"GET", "/", false, false, false, get_page, NULL},
    {"GET", "/health", false, false, false, get_health, NULL},
    {"GET", "/ready", false, false, false, get_ready, NULL},
    {"GET", "/version", false, false, false, get_version, NULL},
    {"GET", "/metrics", false, false, false, get_metrics, NULL},
    {"GET", "/v1/models", true, true, false, get_models, NULL},
    {"GET", "/v1/models/", true, true, false, get_model, NULL},
    {"POST", "/tokenize", true, true, false, NULL, prepare_tokenize},
    {"POST", "/detokenize", true, true, false, NULL, prepare_detokenize},
    {"GET", "/tokenizer_info", true, true, false, get_tokenizer_info, NULL},
    {"POST", "/v1/completions", true, true, true, NULL, prepare_completion},
    {"POST", "/v1/chat/completions", true, true, true, NULL, prepare_chat},
};

static bool path_fits(const route *r, const char *path) {
    size_t n = strlen(r->path);
    if (n > 1 && r->path[n - 1] == '/') return !strncmp(path, r->path, n) && path[n];
    return !strcmp(path, r->path);
}

const route *route_find(const char **rest, const char **allow, const char *method, const char *path,
                        fault *f) {
    if (!strcmp(method, "HEAD")) method = "GET";
    *allow = NULL;
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        if (!path_fits(&routes[i], path)) continue;
        *rest = path + strlen(routes[i].path);
        if (!strcmp(routes[i].method, method)) return &routes[i];
        *allow = strcmp(routes[i].method, "GET") ? routes[i].method : "GET, HEAD";
    }
    if (*allow) refuse_with(f, 405, NULL, "%s takes %s", path, *allow);
    else refuse_with(f, 404, NULL, "nothing is at '%.200s'", path);
    return NULL;
}
