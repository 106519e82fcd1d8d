/* engine_helpers.h: what the test_engine*.c share: opening engines, scripts of prompts and decodes,
 * and traces of logits that are compared byte for byte. */
#ifndef KI_ENGINE_HELPERS_H
#define KI_ENGINE_HELPERS_H
#include "engine.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static kivi_error err;

static inline bool is_slow(void) { return getenv("KIVI_TEST_UNDER") != NULL; }

#define MUST(call) must((call), __FILE__, __LINE__)
static inline void must(kivi_status status, const char *file, int line) {
    if (status != KIVI_OK)
        fail_msg("%s:%d: %s: %s", file, line, kivi_status_name(status), err.text);
    memset(&err, 0, sizeof err);
}

/* The call failed with `expected`, and its one line holds all of the words (separated by '|'). */
#define FAILS(call, expected, words) fails((call), KIVI_##expected, (words), __FILE__, __LINE__)
static inline void fails(kivi_status status, kivi_status expected, const char *words,
                         const char *file, int line) {
    if (status != expected)
        fail_msg("%s:%d: %s, expected %s (%s): %s", file, line, kivi_status_name(status),
                 kivi_status_name(expected), words, err.text);
    if (err.status != status) fail_msg("%s:%d: error status differs", file, line);
    for (const char *p = words; *p;) {
        char word[128];
        size_t n = strcspn(p, "|");
        snprintf(word, sizeof word, "%.*s", (int)n, p);
        if (!strstr(err.text, word)) fail_msg("%s:%d: no '%s' in: %s", file, line, word, err.text);
        p += n + (p[n] == '|');
    }
    for (const char *c = err.text; *c; c++) assert_true((unsigned char)*c >= 0x20);
    memset(&err, 0, sizeof err);
}

/* ---- files ---- */

static char temp_folder[64];

static inline int make_temp(void **state) {
    (void)state;
    snprintf(temp_folder, sizeof temp_folder, "/tmp/kivi-test-engine-XXXXXX");
    return mkdtemp(temp_folder) ? 0 : -1;
}
static inline int remove_temp(void **state) {
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -rf '%s'", temp_folder);
    return system(command);
}
static inline const char *in_temp(const char *leaf) {
    static char paths[4][256];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof *paths, "%s/%s", temp_folder, leaf);
    return path;
}
static inline const char *golden(const char *leaf) {
    static char paths[4][256];
    static unsigned next;
    char *path = paths[next++ % 4];
    const char *folder = getenv("KIVI_GOLDEN");
    snprintf(path, sizeof *paths, "%s/%s", folder && *folder ? folder : "tests/golden", leaf);
    return path;
}
/* The SmolLM2 file, or NULL. */
static inline const char *real_model(void) {
    const char *path = getenv("KIVI_TEST_MODEL");
    return path && *path ? path : NULL;
}

typedef struct bytes {
    uint8_t *data;
    size_t n;
} bytes;
static inline bytes read_bytes(const char *path) {
    bytes b = {0};
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s cannot be read", path);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    b.n = (size_t)ftell(f);
    rewind(f);
    b.data = malloc(b.n + 1);
    assert_non_null(b.data);
    assert_int_equal(fread(b.data, 1, b.n, f), b.n);
    b.data[b.n] = 0;
    fclose(f);
    return b;
}
static inline void write_bytes(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f) fail_msg("%s cannot be written", path);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

enum { N_TOKENS = 330 };
/* tokens.json of the golden models: the same 330 ids for both. */
static inline const int32_t *golden_tokens(void) {
    static int32_t ids[N_TOKENS];
    static bool ready;
    if (ready) return ids;
    bytes b = read_bytes(golden("llama/tokens.json"));
    const char *p = (const char *)b.data;
    for (int i = 0; i < N_TOKENS; i++) {
        p += strcspn(p, "0123456789");
        assert_true(*p != 0);
        char *end;
        ids[i] = (int32_t)strtol(p, &end, 10);
        p = end;
    }
    free(b.data);
    ready = true;
    return ids;
}

/* ---- engines ---- */

/* These tests are about the CPU, also on a machine with a GPU (tests/gpu). */
static inline kivi_engine_options cpu_defaults(void) {
    kivi_engine_options options = kivi_engine_defaults();
    options.device = "cpu";
    return options;
}
static inline kivi_engine *open_engine(const kivi_engine_options *options) {
    kivi_engine *engine = NULL;
    MUST(kivi_engine_create(&engine, options, &err));
    return engine;
}
static inline kivi_session *open_session(kivi_engine *engine) {
    kivi_session *session = NULL;
    MUST(kivi_session_create(&session, engine, &err));
    return session;
}
static inline uint32_t free_pages(const kivi_engine *engine) {
    uint32_t n_free, n_all;
    kivi_cache_pages(engine->cache, &n_free, &n_all);
    return n_free;
}
static inline uint64_t n_blocks(const kivi_engine *engine) {
    return atomic_load(&engine->mem.n_blocks);
}
/* All sessions are gone: nothing of them is left. */
static inline void close_engine(kivi_engine *engine) {
    uint32_t n_free, n_all;
    kivi_cache_pages(engine->cache, &n_free, &n_all);
    assert_int_equal(n_free, n_all);
    assert_true(ki_pool_check(&engine->cache->pool));
    kivi_engine_destroy(&engine);
    assert_null(engine);
}

/* ---- scripts: what a session is fed ---- */

typedef struct turn {
    uint32_t n_prompt, n_decode;
} turn;
enum { MAX_TURNS = 8 };
typedef struct script {
    const int32_t *tokens;
    turn turns[MAX_TURNS];
} script;

static inline uint32_t script_length(const script *s) {
    uint32_t n = 0;
    for (int i = 0; i < MAX_TURNS; i++) n += s->turns[i].n_prompt + s->turns[i].n_decode;
    return n;
}

/* Rows that may be fed at pos in one step: what is left of the prompt there, 1 for a decode, 0 at
 * the end. *n_prompt: the size of the prompt that begins there, else 0. */
static inline uint32_t script_at(const script *s, uint32_t pos, uint32_t *n_prompt) {
    *n_prompt = 0;
    for (int i = 0; i < MAX_TURNS; i++) {
        const turn *t = &s->turns[i];
        if (pos == 0 && t->n_prompt) *n_prompt = t->n_prompt;
        if (pos < t->n_prompt) return t->n_prompt - pos;
        pos -= t->n_prompt;
        if (pos < t->n_decode) return 1;
        pos -= t->n_decode;
    }
    return 0;
}

/* The first n tokens of a script: turns after are gone, the one across is that much shorter. */
static inline script script_cut(const script *s, uint32_t n) {
    script cut = {.tokens = s->tokens};
    for (int i = 0; i < MAX_TURNS; i++) {
        cut.turns[i].n_prompt = KI_MIN(n, s->turns[i].n_prompt);
        n -= cut.turns[i].n_prompt;
        cut.turns[i].n_decode = KI_MIN(n, s->turns[i].n_decode);
        n -= cut.turns[i].n_decode;
    }
    return cut;
}
static inline void script_add(script *s, turn t) {
    int i = MAX_TURNS;
    while (i && !s->turns[i - 1].n_prompt && !s->turns[i - 1].n_decode) i--;
    assert_true(i < MAX_TURNS);
    s->turns[i] = t;
}

/* ---- traces: logits by position ---- */

typedef struct trace {
    float **rows; /* [n]; NULL where no logits were kept */
    uint32_t n, n_vocab;
} trace;

static inline trace trace_new(const kivi_engine *engine, uint32_t n) {
    trace t = {calloc(n, sizeof(float *)), n, kivi_engine_info_get(engine)->n_vocab};
    assert_non_null(t.rows);
    return t;
}
static inline void trace_free(trace *t) {
    for (uint32_t i = 0; i < t->n; i++) free(t->rows[i]);
    free(t->rows);
    *t = (trace){0};
}
static inline void trace_put(trace *t, uint32_t pos, const float *row) {
    size_t n_bytes = t->n_vocab * sizeof *row;
    assert_non_null(row);
    assert_true(pos < t->n);
    if (!t->rows[pos]) t->rows[pos] = malloc(n_bytes);
    assert_non_null(t->rows[pos]);
    memcpy(t->rows[pos], row, n_bytes);
}
/* Every row that both have from `from` on; at least one. */
static inline void trace_same(const trace *a, const trace *b, uint32_t from, const char *kind,
                              const char *what) {
    uint32_t n = 0;
    for (uint32_t i = from; i < a->n && i < b->n; i++) {
        if (!a->rows[i] || !b->rows[i]) continue;
        n++;
        if (!memcmp(a->rows[i], b->rows[i], a->n_vocab * sizeof(float))) continue;
        uint32_t j = 0;
        while (!memcmp(&a->rows[i][j], &b->rows[i][j], sizeof(float))) j++;
        fail_msg("%s: %s: logits of position %u differ, first at id %u: %a and %a", kind, what, i,
                 j, (double)a->rows[i][j], (double)b->rows[i][j]);
    }
    if (n == 0) fail_msg("%s: %s: nothing to compare from %u on", kind, what, from);
}

/* ---- actors: sessions that follow scripts, alone or together ---- */

typedef struct actor {
    kivi_session *session;
    const script *script;
    trace *trace;    /* NULL: not kept */
    uint32_t chunk;  /* most rows of a prompt in one step; 0: all that fit */
    uint32_t until;  /* stop at this length; 0: at the script's end */
    uint32_t rests;  /* steps to sit out before the first */
} actor;

/* The item of the actor's next step; false when it is done. */
static inline bool actor_item(kivi_step_item *item, const actor *a) {
    uint32_t pos = kivi_session_length(a->session), n_prompt;
    uint32_t n = script_at(a->script, pos, &n_prompt);
    if (n == 0 || (a->until && pos >= a->until)) return false;
    if (n_prompt) MUST(kivi_session_begin_prompt(a->session, n_prompt, &err));
    if (a->chunk) n = KI_MIN(n, a->chunk);
    if (a->until) n = KI_MIN(n, a->until - pos);
    n = KI_MIN(n, a->session->engine->options.step_rows);
    *item = (kivi_step_item){
        .session = a->session, .tokens = a->script->tokens + pos, .n_tokens = n};
    return true;
}

static inline void actor_keep(const actor *a, const kivi_step_item *item) {
    if (item->status != KIVI_OK) fail_msg("item: %s", item->error.text);
    uint32_t end = kivi_session_length(a->session), n = item->n_tokens;
    if (!a->trace) return;
    if (!a->session->engine->options.all_logits)
        trace_put(a->trace, end - 1, kivi_session_logits(a->session, 0));
    else
        for (uint32_t r = 0; r < n; r++)
            trace_put(a->trace, end - n + r, kivi_session_logits(a->session, r));
    assert_null(kivi_session_logits(a->session, n));
}

enum { MAX_ACTORS = 8 };
/* One step of all that still go; their order in it turns with every step. False: all are done. */
static inline bool actors_step(actor *actors, size_t n, size_t step) {
    kivi_step_item items[MAX_ACTORS];
    const actor *who[MAX_ACTORS];
    size_t n_items = 0, n_resting = 0;
    for (size_t i = 0; i < n; i++) {
        actor *a = &actors[(i + step) % n];
        if (a->rests) {
            a->rests--;
            n_resting++;
            continue;
        }
        if (!actor_item(&items[n_items], a)) continue;
        who[n_items++] = a;
    }
    if (n_items == 0) return n_resting > 0;
    MUST(kivi_engine_step(actors[0].session->engine, items, n_items, &err));
    for (size_t i = 0; i < n_items; i++) actor_keep(who[i], &items[i]);
    return true;
}
static inline void actors_run(actor *actors, size_t n) {
    for (size_t step = 0; actors_step(actors, n, step); step++) continue;
}

/* A session goes on along the script from where it is. */
static inline void go_on(kivi_session *session, const script *s, uint32_t until, uint32_t chunk,
                         trace *t) {
    actor a = {.session = session, .script = s, .trace = t, .chunk = chunk, .until = until};
    actors_run(&a, 1);
}
/* A new session along the whole script. */
static inline trace run_alone(kivi_engine *engine, const script *s, uint32_t chunk) {
    kivi_session *session = open_session(engine);
    trace t = trace_new(engine, script_length(s));
    go_on(session, s, 0, chunk, &t);
    kivi_session_destroy(&session);
    return t;
}

#endif
