/* pretoken.c: text to words, by regular expressions.
 *
 * A pre-tokenizer is a row of a table: a list of patterns. The first cuts the text; what matches is
 * a piece, and so is what lies between matches. Each further pattern cuts those pieces again, and
 * sees a piece as if it were the whole text: "a  5" is cut by digits first, so that the look-ahead
 * of the spaces finds the end of its piece, not the 5.
 *
 * Three things differ from the patterns as published, none in what they match:
 * - Repeats that nothing can make shorter are possessive. Matching then takes constant memory and
 *   never meets a limit, whatever the text; a run of 10^6 letters is one step.
 * - White space is spelled out. PCRE2's \s has U+180E as well, which Unicode took out in 2013.
 * - "\s*[\r\n]+" would walk back over a long run of spaces one by one; it is written as a
 *   repetition of (other space, line ends). */
#include "token_private.h"

#define LINE_ENDS "\\r\\n"
#define OTHER_SPACE                                                                                \
    "\\t\\x{b}\\x{c}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"  \
    "\\x{205f}\\x{3000}"
#define SPACE OTHER_SPACE LINE_ENDS
/* Of a run of spaces the last one goes with the word behind it: all but the last, or all. */
#define SPACES "[" SPACE "]+(?![^" SPACE "])|[" SPACE "]++"
#define GPT2 "'(?:[stmd]|re|ve|ll)| ?\\p{L}++| ?\\p{N}++| ?[^" SPACE "\\p{L}\\p{N}]++|" SPACES
/* Llama 3 and its kin differ in how many digits make a word. */
#define LLAMA3(digits)                                                                             \
    "'(?:[sStTmMdD]|[rRvV][eE]|[lL][lL])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}++|" digits "| ?[^" SPACE     \
    "\\p{L}\\p{N}]++[\\r\\n]*+|(?:[" OTHER_SPACE "]*+[\\r\\n]++)++|" SPACES
/* Marks belong to words. */
#define QWEN35                                                                                     \
    "'(?:[sStTmMdD]|[rRvV][eE]|[lL][lL])|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]++|\\p{N}"            \
    "| ?[^" SPACE "\\p{L}\\p{M}\\p{N}]++[\\r\\n]*+|(?:[" OTHER_SPACE "]*+[\\r\\n]++)++|" SPACES
/* A word is capitals and then small letters; letters without case and marks are both. */
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define TEKKEN                                                                                     \
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "++|[^\\r\\n\\p{L}\\p{N}]?" UPPER "++" LOWER "*+"     \
    "|\\p{N}| ?[^" SPACE "\\p{L}\\p{N}]++[\\r\\n/]*+|(?:[" OTHER_SPACE "]*+[\\r\\n]++)++|" SPACES

static const ki_pre_rule rules[] = {
    {"smollm", {"\\p{N}", GPT2}, false},
    {"gpt-2", {GPT2}, false},
    {"falcon", {"[\\p{P}$+<=>^~|`]++", GPT2, "[0-9]{3}"}, false},
    {"default", {"[\\p{P}$+<=>^~|]++", GPT2, "\\p{N}++", "[0-9]{3}"}, false},
    {"llama-bpe", {LLAMA3("\\p{N}{1,3}+")}, true},
    {"llama3", {LLAMA3("\\p{N}{1,3}+")}, true},
    {"falcon3", {LLAMA3("\\p{N}{1,3}+")}, true},
    {"qwen2", {LLAMA3("\\p{N}")}, false},
    {"qwen35", {QWEN35}, false},
    {"tekken", {TEKKEN}, true},
    {"starcoder", {"\\p{N}", GPT2}, false},
    {"refact", {"\\p{N}", GPT2}, false},
    {"command-r", {"\\p{N}", GPT2}, false},
    {"mpt", {GPT2}, false},
};
static const char rule_names[] = "smollm, gpt-2, falcon, default, llama-bpe, llama3, falcon3, "
                                 "qwen2, qwen35, tekken, starcoder, refact, command-r, mpt";

/* A repetition counts as one step of matching: a text of the largest size (2^30 bytes) stays below
 * 2^31. The patterns are linear; the limits stop one that someone adds without thought. */
#define MATCH_LIMIT (UINT32_C(1) << 31)
#define HEAP_LIMIT_KIB (64 * 1024)

const char *ki_vocab_pre_names(void) { return rule_names; }

static void *pcre_alloc(PCRE2_SIZE n_bytes, void *mem) {
    void *block;
    return ki_alloc(&block, mem, KI_TAG_other, n_bytes, NULL) == KIVI_OK ? block : NULL;
}

static void pcre_free(void *block, void *mem) { ki_free(mem, block); }

static kivi_status find_rule(const ki_pre_rule **out, const char *name, kivi_error *err) {
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        *out = &rules[i];
        if (!strcmp(rules[i].name, name)) return KIVI_OK;
    }
    return KI_FAIL(err, UNSUPPORTED, "vocabulary: pre-tokenizer \"%.64s\", known: %s", name,
                   rule_names);
}

static kivi_status out_of_memory(kivi_error *err) {
    return KI_FAIL(err, NOMEM, "vocabulary: no memory for a regular expression");
}

static kivi_status add_stage(ki_pre *pre, const char *pattern, kivi_error *err) {
    int code = 0;
    PCRE2_SIZE offset = 0;
    pcre2_compile_context *context = pcre2_compile_context_create(pre->memory);
    if (!context) return out_of_memory(err);
    pcre2_code *stage =
        pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                      PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &code, &offset, context);
    pcre2_compile_context_free(context);
    if (!stage && code == PCRE2_ERROR_HEAP_FAILED) return out_of_memory(err);
    if (!stage)
        return KI_FAIL(err, INTERNAL, "vocabulary: pattern %zu of %s, pcre2 error %d at %zu",
                       pre->n_stages, pre->rule->name, code, (size_t)offset);
    /* Without compiled code the interpreter does the same, slower: a failure here is none. */
    (void)pcre2_jit_compile(stage, PCRE2_JIT_COMPLETE);
    pre->stages[pre->n_stages++] = stage;
    return KIVI_OK;
}

kivi_status ki_pre_init(ki_pre *pre, ki_mem *mem, const char *name, kivi_error *err) {
    *pre = (ki_pre){0};
    KI_TRY(find_rule(&pre->rule, name, err));
    pre->memory = pcre2_general_context_create(pcre_alloc, pcre_free, mem);
    if (!pre->memory) return out_of_memory(err);
    pre->limits = pcre2_match_context_create(pre->memory);
    if (!pre->limits) return out_of_memory(err);
    pcre2_set_match_limit(pre->limits, MATCH_LIMIT);
    pcre2_set_heap_limit(pre->limits, HEAP_LIMIT_KIB);
    for (size_t i = 0; i < KI_PRE_STAGES && pre->rule->patterns[i]; i++)
        KI_TRY(add_stage(pre, pre->rule->patterns[i], err));
    return KIVI_OK;
}

void ki_pre_deinit(ki_pre *pre) {
    for (size_t i = 0; i < pre->n_stages; i++) pcre2_code_free(pre->stages[i]);
    pcre2_match_context_free(pre->limits);
    pcre2_general_context_free(pre->memory);
    *pre = (ki_pre){0};
}

kivi_status ki_words_init(ki_words *words, const ki_pre *pre, ki_word_fn *emit, kivi_error *err) {
    *words = (ki_words){.pre = pre, .emit = emit};
    words->match = pcre2_match_data_create(1, pre->memory);
    return words->match ? KIVI_OK : out_of_memory(err);
}

void ki_words_deinit(ki_words *words) {
    pcre2_match_data_free(words->match);
    words->match = NULL;
}

static kivi_status match_failed(const ki_pre *pre, int code, kivi_error *err) {
    char why[96] = "";
    if (code == PCRE2_ERROR_NOMEMORY) return out_of_memory(err);
    pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
    return KI_FAIL(err, ARG, "tokenizer: pre-tokenizer %s could not split the text: %s (pcre2 %d)",
                   pre->rule->name, why, code);
}

/* The next match in [from, n_bytes); *begin = *end = n_bytes when there is none. The text is known
 * to be valid: a check by PCRE2 in every call would make a long text quadratic. */
static kivi_status next_match(ki_words *words, size_t stage, ki_span text, size_t from,
                              size_t *begin, size_t *end, kivi_error *err) {
    int code = pcre2_match(words->pre->stages[stage], (PCRE2_SPTR)text.bytes, text.n_bytes, from,
                           PCRE2_NO_UTF_CHECK, words->match, words->pre->limits);
    *begin = *end = text.n_bytes;
    if (code == PCRE2_ERROR_NOMATCH) return KIVI_OK;
    if (code < 0) return match_failed(words->pre, code, err);
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(words->match);
    *begin = ends[0];
    *end = ends[1];
    if (*end <= from) return KI_FAIL(err, INTERNAL, "tokenizer: a pattern matched nothing");
    return KIVI_OK;
}

/* Cuts a piece by one stage and hands the parts to the next; the depth is the number of stages. */
static kivi_status cut(ki_words *words, size_t stage, ki_span text, kivi_error *err) {
    if (!text.n_bytes) return KIVI_OK;
    if (stage == words->pre->n_stages) return words->emit(words, text, err);
    for (size_t from = 0, begin, end; from < text.n_bytes; from = end) {
        KI_TRY(next_match(words, stage, text, from, &begin, &end, err));
        KI_TRY(cut(words, stage + 1, (ki_span){text.bytes + from, begin - from}, err));
        KI_TRY(cut(words, stage + 1, (ki_span){text.bytes + begin, end - begin}, err));
    }
    return KIVI_OK;
}

/* Bytes of valid UTF-8 at the start of text. */
static size_t valid_bytes(ki_span text) {
    size_t at = 0;
    while (at < text.n_bytes) {
        size_t left = text.n_bytes - at;
        uint32_t need = ki_utf8_need((const unsigned char *)text.bytes + at, left);
        if (!need || need > left) break;
        at += need;
    }
    return at;
}

/* Patterns are defined on characters only: a malformed byte is a word of its own, and what is on
 * either side of it is a text of its own. */
kivi_status ki_words_split(ki_words *words, ki_span text, kivi_error *err) {
    while (text.n_bytes) {
        size_t n_valid = valid_bytes(text);
        KI_TRY(cut(words, 0, (ki_span){text.bytes, n_valid}, err));
        if (n_valid == text.n_bytes) break;
        KI_TRY(words->emit(words, (ki_span){text.bytes + n_valid, 1}, err));
        text = (ki_span){text.bytes + n_valid + 1, text.n_bytes - n_valid - 1};
    }
    return KIVI_OK;
}
