/* routes.c: what is served where. */
#include "http.h"

#include <stdlib.h>
#include <string.h>

static enum MHD_Result json_text(exchange *e, text *t) {
    return respond(e, 200, "application/json", t);
}

/* The body as an object; NULL: f says why. */
static json_t *parse_body(exchange *e, fault *f) {
    json_error_t where;
    const char *data = e->body.data ? e->body.data : "";
    json_t *body =
        json_loadb(data, e->body.n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &where);
    if (!body)
        refuse_with(f, 400, NULL, "the body is not valid JSON: %s, line %d, column %d", where.text,
                    where.line, where.column);
    else if (!json_is_object(body)) refuse_with(f, 400, NULL, "the body is not a JSON object");
    else return body;
    json_decref(body);
    return NULL;
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
    const char *why = !atomic_load(&e->s->loaded)    ? "the model is being loaded"
                      : atomic_load(&e->s->draining) ? "the server is going down"
                      : atomic_load(&e->s->stalled)  ? "no progress: the engine is stalled"
                                                     : NULL;
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

static bool tokenize(token_list *list, const json_t *body, exchange *e, fault *f) {
    params_context context = server_context(e->s);
    const json_t *prompt = json_object_get(body, "prompt");
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

static enum MHD_Result post_tokenize(exchange *e) {
    fault f = {0};
    token_list list = {0};
    bool with_texts = false;
    json_t *body = parse_body(e, &f);
    bool ok = body && tokenize(&list, body, e, &f) &&
              read_flag(&with_texts, body, "return_token_strs", false, &f);
    text t;
    text_init(&t, SIZE_MAX / 2);
    if (ok) put_tokens(&t, e->s, &list, with_texts);
    json_decref(body);
    free(list.ids);
    return ok ? json_text(e, &t) : respond_fault(e, &f);
}

static bool detokenize(text *out, const json_t *body, exchange *e, fault *f) {
    params_context context = server_context(e->s);
    const json_t *tokens = json_object_get(body, "tokens");
    kivi_utf8 utf8 = {0};
    char piece[512], whole[3 * (512 + 4)];
    if (!check_model(body, &context, f)) return false;
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

static enum MHD_Result post_detokenize(exchange *e) {
    fault f = {0};
    text plain, t;
    json_t *body = parse_body(e, &f);
    text_init(&plain, SIZE_MAX / 2);
    text_init(&t, SIZE_MAX / 2);
    bool ok = body && detokenize(&plain, body, e, &f);
    if (ok) {
        text_puts(&t, "{\"prompt\":");
        text_json(&t, plain.data, plain.n_bytes);
        text_puts(&t, "}");
    }
    json_decref(body);
    text_deinit(&plain);
    return ok ? json_text(e, &t) : respond_fault(e, &f);
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

static enum MHD_Result post_job(exchange *e, bool chat) {
    fault f = {0};
    json_t *body = parse_body(e, &f);
    text_deinit(&e->body);
    if (body) e->work = job_create(e->s, body, chat, &e->log, &f);
    enum MHD_Result result = e->work ? start_job(e) : respond_fault(e, &f);
    json_decref(body); /* submit has copied what it lent */
    return result;
}

static enum MHD_Result post_completions(exchange *e) { return post_job(e, false); }
static enum MHD_Result post_chat(exchange *e) { return post_job(e, true); }

static const route routes[] = {
    {"GET", "/", false, false, false, get_page},
    {"GET", "/health", false, false, false, get_health},
    {"GET", "/ready", false, false, false, get_ready},
    {"GET", "/version", false, false, false, get_version},
    {"GET", "/metrics", false, false, false, get_metrics},
    {"GET", "/v1/models", true, true, false, get_models},
    {"GET", "/v1/models/", true, true, false, get_model},
    {"POST", "/tokenize", true, true, false, post_tokenize},
    {"POST", "/detokenize", true, true, false, post_detokenize},
    {"GET", "/tokenizer_info", true, true, false, get_tokenizer_info},
    {"POST", "/v1/completions", true, true, true, post_completions},
    {"POST", "/v1/chat/completions", true, true, true, post_chat},
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
        *allow = routes[i].method;
    }
    if (*allow) refuse_with(f, 405, NULL, "%s takes %s", path, *allow);
    else refuse_with(f, 404, NULL, "nothing is at '%.200s'", path);
    return NULL;
}
