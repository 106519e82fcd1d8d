/* answer.c: answers as JSON, in OpenAI's shapes. */
#include "job.h"

#include <string.h>

enum { MAX_TOKEN_BYTES = 512 };

void answer_fault(text *out, const fault *f) {
    text_puts(out, "{\"error\":{\"message\":");
    text_json_string(out, f->message);
    text_puts(out, ",\"type\":");
    text_json_string(out, fault_type(f->status));
    text_puts(out, ",\"param\":");
    text_json_string(out, f->param);
    text_puts(out, ",\"code\":");
    if (f->code) text_json_string(out, f->code);
    else text_printf(out, "%d", f->status);
    text_puts(out, "}}");
}

/* ---- logprobs ---- */

/* A token as a client sees it: its text, or "bytes:\xNN..." when its bytes are no text by
 * themselves, so that two of them do not look alike. Returns the number of its bytes. */
static size_t token_name(text *name, char bytes[MAX_TOKEN_BYTES], const server *s, int32_t token) {
    size_t n = kivi_vocab_bytes(s->vocab, token, bytes, MAX_TOKEN_BYTES), i = 0;
    while (i < n) {
        size_t length = utf8_length(bytes + i, n - i);
        if (!length) break;
        i += length;
    }
    name->n_bytes = 0;
    if (i == n) text_put(name, bytes, n);
    else {
        text_puts(name, "bytes:");
        for (i = 0; i < n; i++) text_printf(name, "\\x%02x", (unsigned char)bytes[i]);
    }
    return n;
}

static void put_chat_token(text *out, text *name, const server *s, int32_t token, double logprob) {
    char bytes[MAX_TOKEN_BYTES];
    size_t n = token_name(name, bytes, s, token);
    text_puts(out, "{\"token\":");
    text_json(out, name->data, name->n_bytes);
    text_puts(out, ",\"logprob\":");
    text_json_float(out, (float)logprob);
    text_puts(out, ",\"bytes\":[");
    for (size_t i = 0; i < n; i++) text_printf(out, "%s%u", i ? "," : "", (unsigned char)bytes[i]);
    text_puts(out, "]");
}

static void add_chat_entry(choice *c, const server *s, int32_t token, double logprob,
                           const kivi_logprob *top, uint32_t n_top, text *name) {
    text *out = &c->tokens;
    if (c->n_entries) text_puts(out, ",");
    put_chat_token(out, name, s, token, logprob);
    text_puts(out, ",\"top_logprobs\":[");
    for (uint32_t i = 0; i < n_top; i++) {
        if (i) text_puts(out, ",");
        put_chat_token(out, name, s, top[i].token, top[i].logprob);
        text_puts(out, "}");
    }
    text_puts(out, "]}");
}

/* The top list as an object from token to number, with the token itself at its end if it is not
 * among them. Two tokens of one spelling: the likelier stays. */
static void put_top(text *out, const server *s, int32_t token, double logprob,
                    const kivi_logprob *top, uint32_t n_top, text *name) {
    char bytes[MAX_TOKEN_BYTES];
    text seen; /* "name",  once for each: names have no quote unescaped, so this finds whole ones */
    uint32_t n = 0;
    bool has_own = false;
    text_init(&seen, SIZE_MAX / 2);
    text_puts(out, "{");
    for (uint32_t i = 0; i <= n_top; i++) {
        kivi_logprob one = i < n_top ? top[i] : (kivi_logprob){token, logprob};
        if (i == n_top && has_own) break;
        has_own = has_own || one.token == token;
        token_name(name, bytes, s, one.token);
        size_t before = seen.n_bytes;
        text_json(&seen, name->data, name->n_bytes);
        text_put(&seen, "", 1);
        if (before && memmem(seen.data, before, seen.data + before, seen.n_bytes - before)) {
            seen.n_bytes = before;
            continue;
        }
        text_puts(out, n++ ? "," : "");
        text_json(out, name->data, name->n_bytes);
        text_puts(out, ":");
        text_json_float(out, (float)one.logprob);
    }
    text_puts(out, "}");
    text_deinit(&seen);
}

void answer_logprob(job *j, size_t which, int32_t token, double logprob, const kivi_logprob *top,
                    uint32_t n_top) {
    choice *c = &j->choices[which];
    char bytes[MAX_TOKEN_BYTES];
    text name;
    text_init(&name, 8 * MAX_TOKEN_BYTES);
    if (j->p.chat) add_chat_entry(c, j->s, token, logprob, top, n_top, &name);
    else {
        const char *comma = c->n_entries ? "," : "";
        bool unknown = logprob == NO_LOGPROB;
        token_name(&name, bytes, j->s, token);
        text_puts(&c->tokens, comma);
        text_json(&c->tokens, name.data, name.n_bytes);
        text_puts(&c->values, comma);
        text_puts(&c->tops, comma);
        if (unknown) text_puts(&c->values, "null");
        else text_json_float(&c->values, (float)logprob);
        if (unknown) text_puts(&c->tops, "null");
        else put_top(&c->tops, j->s, token, logprob, top, n_top, &name);
        text_printf(&c->offsets, "%s%zu", comma, c->n_chars);
    }
    c->n_entries++;
    text_deinit(&name);
}

static void put_logprobs(text *out, const job *j, const choice *c) {
    if (j->p.request.logprobs < 0 || !c->n_entries) {
        text_puts(out, "null");
        return;
    }
    const struct {
        const char *name;
        const text *items;
    } arrays[] = {{"tokens", &c->tokens},
                  {"token_logprobs", &c->values},
                  {"top_logprobs", &c->tops},
                  {"text_offset", &c->offsets}};
    if (j->p.chat) {
        text_puts(out, "{\"content\":[");
        text_put(out, c->tokens.data, c->tokens.n_bytes);
        text_puts(out, "]}");
        return;
    }
    for (size_t i = 0; i < 4; i++) {
        text_printf(out, "%s\"%s\":[", i ? "," : "{", arrays[i].name);
        text_put(out, arrays[i].items->data, arrays[i].items->n_bytes);
        text_puts(out, "]");
    }
    text_puts(out, "}");
}

/* ---- answers ---- */

static void put_head(text *out, const job *j, const char *object) {
    text_printf(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", j->id, object,
                (long long)j->created_s);
    text_json_string(out, j->s->o.model_name);
    text_puts(out, ",\"choices\":[");
}

static void put_usage(text *out, const job *j) {
    text_printf(out,
                ",\"usage\":{\"prompt_tokens\":%llu,\"completion_tokens\":%llu,"
                "\"total_tokens\":%llu,\"prompt_tokens_details\":{\"cached_tokens\":%llu}}",
                (unsigned long long)j->n_prompt, (unsigned long long)j->n_generated,
                (unsigned long long)(j->n_prompt + j->n_generated),
                (unsigned long long)j->n_cached);
}

/* The end of a chunk of a stream; usage: nothing, null, or the sum so far, as asked. */
static void end_chunk(text *out, const job *j) {
    text_puts(out, "]");
    if (j->p.usage_in_chunks) put_usage(out, j);
    else if (j->p.include_usage) text_puts(out, ",\"usage\":null");
    text_puts(out, "}\n\n");
}

void answer_role(text *out, const job *j, size_t which) {
    text_puts(out, "data: ");
    put_head(out, j, "chat.completion.chunk");
    text_printf(out,
                "{\"index\":%zu,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
                "\"logprobs\":null,\"finish_reason\":null}",
                which);
    end_chunk(out, j);
}

static void put_finish(text *out, const choice *c) {
    text_puts(out, ",\"finish_reason\":");
    text_json_string(out, c->finish);
}

void answer_chunk(text *out, job *j, size_t which) {
    choice *c = &j->choices[which];
    text_puts(out, "data: ");
    put_head(out, j, j->p.chat ? "chat.completion.chunk" : "text_completion");
    text_printf(out, "{\"index\":%zu,", which);
    if (!j->p.chat) text_puts(out, "\"text\":");
    else text_puts(out, c->ready.n_bytes ? "\"delta\":{\"content\":" : "\"delta\":{");
    if (!j->p.chat || c->ready.n_bytes) text_json(out, c->ready.data, c->ready.n_bytes);
    if (j->p.chat) text_puts(out, "}");
    text_puts(out, ",\"logprobs\":");
    put_logprobs(out, j, c);
    put_finish(out, c);
    text_puts(out, "}");
    end_chunk(out, j);
    c->ready.n_bytes = c->tokens.n_bytes = c->values.n_bytes = 0;
    c->tops.n_bytes = c->offsets.n_bytes = 0;
    c->n_entries = 0;
}

void answer_end(text *out, const job *j) {
    if (j->failure.status) {
        text_puts(out, "data: ");
        answer_fault(out, &j->failure);
        text_puts(out, "\n\n");
    } else if (j->p.include_usage) {
        text_puts(out, "data: ");
        put_head(out, j, j->p.chat ? "chat.completion.chunk" : "text_completion");
        text_puts(out, "]");
        put_usage(out, j);
        text_puts(out, "}\n\n");
    }
    text_puts(out, "data: [DONE]\n\n");
}

void answer_whole(text *out, const job *j) {
    put_head(out, j, j->p.chat ? "chat.completion" : "text_completion");
    for (size_t i = 0; i < j->n_choices; i++) {
        const choice *c = &j->choices[i];
        text_printf(out, "%s{\"index\":%zu,", i ? "," : "", i);
        text_puts(out,
                  j->p.chat ? "\"message\":{\"role\":\"assistant\",\"content\":" : "\"text\":");
        text_json(out, c->ready.data, c->ready.n_bytes);
        if (j->p.chat) text_puts(out, ",\"refusal\":null}");
        text_puts(out, ",\"logprobs\":");
        put_logprobs(out, j, c);
        put_finish(out, c);
        text_puts(out, "}");
    }
    text_puts(out, "]");
    put_usage(out, j);
    text_puts(out, "}");
}
