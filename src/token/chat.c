/* chat.c: the formats of chat templates that are known.
 *
 * A template is a program; these are the texts it makes. A format says what stands before and
 * behind a message of each role; what cannot be said so (where a system message goes, what is
 * trimmed) are flags. Templates are told by marks that no other known one has; a template that has
 * a known one's marks but does more is none of them, and is left out by name below. */
#include "chat.h"

typedef enum system_place { AS_TURN, IN_FIRST, IN_LAST } system_place;

typedef struct format {
    const char *name;
    /* Before and behind a system, user and assistant message; "$" stands for EOS, "^" for BOS. */
    const char *before[3], *behind[3];
    const char *answer; /* before an answer that is to come */
    system_place place; /* system text: a turn of its own, or in front of a user's */
    bool has_bos;       /* at the very beginning */
    bool trims, trims_answers;
    bool trims_both;  /* llama2: system and user text as one */
    bool joins_lines; /* falcon: \r\n is \n, two \n are one */
    bool bare_last;   /* falcon3: no line end behind an answer that is the last message */
} format;

#define LLAMA3(role) "<|start_header_id|>" role "<|end_header_id|>\n\n"
#define LLAMA31_DATES "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

static const format formats[] = {
    {.name = "chatml",
     .before = {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},
     .behind = {"<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n"},
     .answer = "<|im_start|>assistant\n"},
    {.name = "llama2",
     .before = {"<<SYS>>\n", "^[INST] ", " "},
     .behind = {"\n<</SYS>>\n\n", " [/INST]", " $"},
     .answer = "",
     .place = IN_FIRST,
     .trims = true,
     .trims_both = true,
     .trims_answers = true},
    {.name = "llama3",
     .before = {LLAMA3("system"), LLAMA3("user"), LLAMA3("assistant")},
     .behind = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .answer = LLAMA3("assistant"),
     .has_bos = true,
     .trims = true,
     .trims_answers = true},
    {.name = "llama3.1",
     .before = {LLAMA3("system") LLAMA31_DATES, LLAMA3("user"), LLAMA3("assistant")},
     .behind = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .answer = LLAMA3("assistant"),
     .has_bos = true,
     .trims = true,
     .trims_answers = true},
    {.name = "mistral-v0",
     .before = {"", "[INST] ", ""},
     .behind = {"\n\n", " [/INST]", "$"},
     .answer = "",
     .place = IN_FIRST,
     .has_bos = true},
    {.name = "mistral-v1",
     .before = {"", " [INST] ", " "},
     .behind = {"\n\n", " [/INST]", "$"},
     .answer = "",
     .place = IN_FIRST,
     .has_bos = true},
    {.name = "mistral-v3",
     .before = {"", "[INST] ", " "},
     .behind = {"\n\n", "[/INST]", "$"},
     .answer = "",
     .place = IN_LAST,
     .has_bos = true,
     .trims_answers = true},
    {.name = "mistral-v3-tekken",
     .before = {"", "[INST]", ""},
     .behind = {"\n\n", "[/INST]", "$"},
     .answer = "",
     .place = IN_LAST,
     .has_bos = true},
    {.name = "gemma",
     .before = {"", "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .behind = {"\n\n", "<end_of_turn>\n", "<end_of_turn>\n"},
     .answer = "<start_of_turn>model\n",
     .place = IN_FIRST,
     .has_bos = true,
     .trims = true,
     .trims_answers = true},
    {.name = "zephyr",
     .before = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .behind = {"$\n", "$\n", "$\n"},
     .answer = "<|assistant|>\n"},
    {.name = "phi3",
     .before = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .behind = {"<|end|>\n", "<|end|>\n", "<|end|>\n"},
     .answer = "<|assistant|>\n"},
    {.name = "falcon",
     .before = {"", "\n\nUser: ", "\n\nAssistant: "},
     .behind = {"", "", ""},
     .answer = "\n\nAssistant:",
     .trims = true,
     .trims_answers = true,
     .joins_lines = true},
    {.name = "falcon3",
     .before = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .behind = {"\n", "\n", "$\n"},
     .answer = "<|assistant|>\n",
     .bare_last = true},
};
enum { N_FORMATS = sizeof formats / sizeof *formats, SYSTEM = 0, USER, ASSISTANT };
static const char names[] = "chatml, llama2, llama3, llama3.1, mistral-v0, mistral-v1, mistral-v3, "
                            "mistral-v3-tekken, gemma, zephyr, phi3, falcon, falcon3";

const char *ki_chat_names(void) { return names; }

/* ---- recognition ---- */

/* Formats in the order in which they are asked; the marks of `with` must be there, those of
 * `without` not. */
typedef struct marks {
    const char *name;
    const char *with[3], *without[9];
} marks;

static const marks known[] = {
    {"chatml",
     {"<|im_start|>", "<|im_end|>"},
     {"<|im_sep|>", "<end_of_utterance>", "strftime_now", "reasoning_mode", "enable_thinking %}",
      "<|tool_list_start|>", "assistant\\n<think>", "'<think>\\n'", "function calling AI model"}},
    {"mistral-v1", {"' [INST] '"}, {"[SYSTEM_PROMPT]"}},
    {"mistral-v3", {"\"[INST] \"", "[AVAILABLE_TOOLS]"}, {"[SYSTEM_PROMPT]"}},
    {"mistral-v3-tekken", {"\"[INST]\"", "[AVAILABLE_TOOLS]"}, {"[SYSTEM_PROMPT]"}},
    {"llama2", {"'[INST] '", "<<SYS>>", ".strip()"}, {"Vigogne"}},
    {"mistral-v0", {"'[INST] ' + message['content'] + ' [/INST]'"}, {"<<SYS>>"}},
    {"phi3",
     {"<|assistant|>", "<|end|>", "<|user|>"},
     {"<|tool|>", "<|im_start|>", "<|start|>", "[BEGIN FINAL RESPONSE]"}},
    {"zephyr", {"'<|user|>\\n' + message['content'] + eos_token", "<|assistant|>"}, {NULL}},
    {"zephyr", {"'<|user|>\n' + message['content'] + eos_token", "<|assistant|>"}, {NULL}},
    {"falcon3", {"'<|user|>\\n' + message['content'] + '\\n'", "<|assistant|>\\n"}, {"<|end|>"}},
    {"falcon3", {"'<|user|>\n' + message['content'] + '\n'", "<|assistant|>\n"}, {"<|end|>"}},
    {"gemma", {"<start_of_turn>", "<end_of_turn>"}, {NULL}},
    {"llama3.1", {"<|start_header_id|>", "Cutting Knowledge Date: December 2023"}, {"<function="}},
    {"llama3",
     {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
     {"Cutting Knowledge", "functions", "tools"}},
    {"falcon", {"'\\n\\nUser: '", "'\\n\\nAssistant:"}, {NULL}},
    {"falcon", {"'\n\nUser: '", "'\n\nAssistant:"}, {NULL}},
};

static bool has_marks(const marks *m, const char *text) {
    for (size_t i = 0; i < 3 && m->with[i]; i++)
        if (!strstr(text, m->with[i])) return false;
    for (size_t i = 0; i < 9 && m->without[i]; i++)
        if (strstr(text, m->without[i])) return false;
    return true;
}

const char *ki_chat_detect(const char *chat_template) {
    for (size_t i = 0; i < sizeof known / sizeof *known && chat_template; i++)
        if (has_marks(&known[i], chat_template)) return known[i].name;
    return NULL;
}

static const format *find_format(const char *name) {
    for (size_t i = 0; i < N_FORMATS; i++)
        if (!strcmp(formats[i].name, name)) return &formats[i];
    return NULL;
}

/* A chatml template may speak for the system where nobody else does, between these two: */
static ki_span default_system(const char *chat_template) {
    static const char open[] = "<|im_start|>system", close[] = "<|im_end|>";
    for (const char *p = chat_template; p && (p = strstr(p, open)); p++) {
        const char *text = p + sizeof open - 1;
        if (*text == '\n') text++;
        else if (!strncmp(text, "\\n", 2)) text += 2;
        else continue;
        const char *end = strstr(text, close);
        if (end && end > text && !memchr(text, '\'', (size_t)(end - text)) &&
            !memchr(text, '"', (size_t)(end - text)) && !memchr(text, '{', (size_t)(end - text)))
            return (ki_span){text, (size_t)(end - text)};
    }
    return (ki_span){0};
}

/* ---- rendering ---- */

typedef struct renderer {
    ki_buf *out;
    const ki_chat_frame *frame;
    const format *format;
    size_t mark; /* where `out` ended behind the last answer's text */
} renderer;

static kivi_status put(renderer *r, ki_span text, bool is_format, kivi_error *err) {
    ki_text_part part = {text, is_format};
    return text.n_bytes ? ki_buf_append(r->out, &part, sizeof part, err) : KIVI_OK;
}

/* Format text; signs for BOS and EOS are their spellings. A BOS that begins all is put once. */
static kivi_status put_format(renderer *r, const char *text, bool bare, kivi_error *err) {
    while (*text) {
        size_t n = strcspn(text, "^$");
        KI_TRY(put(r, (ki_span){text, n}, true, err));
        text += n;
        if (*text == '$') {
            KI_TRY(put(r, r->frame->eos, true, err));
            if (bare) return KIVI_OK;
        }
        if (*text == '^') KI_TRY(put(r, r->frame->bos, true, err));
        text += *text != 0;
    }
    return KIVI_OK;
}

static bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

static ki_span trimmed(ki_span text, bool left, bool right) {
    while (right && text.n_bytes && is_blank(text.bytes[text.n_bytes - 1])) text.n_bytes--;
    for (; left && text.n_bytes && is_blank(*text.bytes); text.n_bytes--) text.bytes++;
    return text;
}

/* The text without each \r before a \n and without each second \n, as spans between them. */
static kivi_status put_joined(renderer *r, ki_span text, kivi_error *err) {
    size_t from = 0;
    bool after_line = false;
    for (size_t i = 0; i < text.n_bytes; i++) {
        bool is_line = text.bytes[i] == '\n';
        bool is_return = text.bytes[i] == '\r' && i + 1 < text.n_bytes && text.bytes[i + 1] == '\n';
        if (is_return || (is_line && after_line)) {
            KI_TRY(put(r, (ki_span){text.bytes + from, i - from}, false, err));
            from = i + 1;
        }
        if (!is_return) after_line = is_line && !after_line;
    }
    return put(r, (ki_span){text.bytes + from, text.n_bytes - from}, false, err);
}

static kivi_status put_message(renderer *r, ki_span text, kivi_error *err) {
    return r->format->joins_lines ? put_joined(r, text, err) : put(r, text, false, err);
}

static kivi_status put_system(renderer *r, ki_span text, kivi_error *err) {
    bool trims = r->format->trims && r->format->place == AS_TURN;
    KI_TRY(put_format(r, r->format->before[SYSTEM], false, err));
    KI_TRY(put_message(r, trimmed(text, trims, trims), err));
    return put_format(r, r->format->behind[SYSTEM], false, err);
}

static kivi_status put_turn(renderer *r, int role, ki_span text, const ki_span *system,
                            bool is_last, kivi_error *err) {
    const format *f = r->format;
    KI_TRY(put_format(r, f->before[role], false, err));
    if (system) KI_TRY(put_system(r, *system, err));
    bool trims = role == ASSISTANT ? f->trims_answers : f->trims;
    KI_TRY(put_message(r, trimmed(text, trims && !(system && f->trims_both), trims), err));
    if (role == ASSISTANT) r->mark = r->out->n_bytes;
    return put_format(r, f->behind[role], f->bare_last && is_last, err);
}

static int role_of(const char *name) {
    static const char *const roles[] = {"system", "user", "assistant"};
    for (int i = 0; i < 3; i++)
        if (name && !strcmp(name, roles[i])) return i;
    return -1;
}

static kivi_status check_roles(const ki_turn *turns, size_t n_turns, kivi_error *err) {
    size_t first = n_turns && role_of(turns[0].role) == SYSTEM;
    for (size_t i = 0; i < n_turns; i++) {
        int expected = i < first ? SYSTEM : (i - first) % 2 ? ASSISTANT : USER;
        if (role_of(turns[i].role) != expected)
            return KI_FAIL(err, ARG,
                           "chat: message %zu has the role '%.20s'; a system message may come "
                           "first, then user and assistant alternate",
                           i, turns[i].role ? turns[i].role : "(null)");
    }
    return n_turns > first ? KIVI_OK : KI_FAIL(err, ARG, "chat: no message of a user");
}

/* Turns behind the system message, in which the system text may have its place. */
static kivi_status put_turns(renderer *r, const ki_turn *turns, size_t n, const ki_span *system,
                             kivi_error *err) {
    size_t last_user = (n - 1) / 2 * 2;
    for (size_t i = 0; i < n; i++) {
        bool in_first = r->format->place == IN_FIRST && i == 0;
        bool in_last = r->format->place == IN_LAST && i == last_user;
        KI_TRY(put_turn(r, role_of(turns[i].role), turns[i].text,
                        in_first || in_last ? system : NULL, i + 1 == n, err));
    }
    return KIVI_OK;
}

/* Of two templates of one format one may have it and the other not. */
static bool begins_with_bos(const renderer *r) {
    const char *own = ki_chat_detect(r->frame->chat_template);
    if (!own || strcmp(own, r->format->name)) return r->format->has_bos;
    return strstr(r->frame->chat_template, "bos_token") != NULL;
}

static kivi_status put_all(renderer *r, const ki_turn *turns, size_t n_turns, kivi_error *err) {
    const format *f = r->format;
    bool has_system = role_of(turns[0].role) == SYSTEM;
    ki_span none = {"", 0}, system = has_system ? turns[0].text : none;
    bool is_chatml = !strcmp(f->name, "chatml"), is_dated = !strcmp(f->name, "llama3.1");
    if (is_chatml && !has_system) system = default_system(r->frame->chat_template);
    bool wants_bos = r->frame->adds_bos || begins_with_bos(r);
    if (wants_bos && f->before[USER][0] != '^') KI_TRY(put(r, r->frame->bos, true, err));
    bool speaks = has_system || system.n_bytes || is_dated;
    if (f->place == AS_TURN && speaks) KI_TRY(put_system(r, system, err));
    KI_TRY(put_turns(r, turns + has_system, n_turns - has_system, speaks ? &system : NULL, err));
    return r->frame->adds_answer ? put_format(r, f->answer, false, err) : KIVI_OK;
}

/* Parts that begin behind the last answer's text. */
static void cut_front(renderer *r, size_t begin) {
    size_t mark = KI_MAX(r->mark, begin), n = r->out->n_bytes - mark;
    if (!r->mark) return;
    memmove(r->out->data + begin, r->out->data + mark, n);
    r->out->n_bytes = begin + n;
}

kivi_status ki_chat_render(ki_buf *out, const ki_chat_frame *frame, const ki_turn *turns,
                           size_t n_turns, kivi_error *err) {
    renderer r = {.out = out, .frame = frame, .format = find_format(frame->format)};
    if (!r.format)
        return KI_FAIL(err, ARG, "chat: format '%.40s', known: %s", frame->format, names);
    KI_TRY(check_roles(turns, n_turns, err));
    size_t begin = out->n_bytes;
    KI_TRY(put_all(&r, turns, n_turns, err));
    if (frame->continues) cut_front(&r, begin);
    return KIVI_OK;
}
