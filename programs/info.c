/* info: what a model is, and what each cache kind would take at a context. */
#include "commands.h"

#include <string.h>

static const char plain_kinds[] = "f16,kivi8,kivi4,k4v2,kivi2",
                  all_kinds[] = "f16,kivi8,kivi4,k4v2,kivi2,k4v3+,k4v2+,kivi2+";

typedef struct plan {
    char kv[32];
    kivi_memory bytes, page; /* at the context; of 128 tokens, for bytes a token */
    double bits;
} plan;

static int make_plans(plan *plans, uint32_t *n, const options *o, const kivi_engine *engine,
                      uint32_t ctx) {
    /* bits, groups and windows of plain kinds are more than the others take */
    const char *kinds = o->kv ? o->kv : options_shape_kind(o) ? plain_kinds : all_kinds;
    kivi_error err = {0};
    char name[sizeof plans->kv];
    for (*n = 0; options_list_item(name, sizeof name, kinds, *n); ++*n) {
        if (*n == MAX_LIST) return usage_error("--kv: more than %d cache kinds", MAX_LIST);
        plan *p = &plans[*n];
        memcpy(p->kv, name, sizeof name);
        kivi_kv_options kv;
        int code = options_kv(&kv, o, p->kv);
        if (code) return code;
        if (kivi_engine_plan(&p->bytes, &p->bits, engine, &kv, ctx, &err)) return fail_with(&err);
        if (kivi_engine_plan(&p->page, NULL, engine, &kv, 128, &err)) return fail_with(&err);
    }
    return EXIT_OK;
}

static double bytes_per_token(const plan *p) {
    return (double)(p->page.kv_codes + p->page.kv_scales) / 128.0;
}

/* A name can be any bytes, and cut; JSON must be UTF-8. */
static void print_json_text(const char *text) {
    kivi_utf8 utf8 = {0};
    char whole[3 * (sizeof((kivi_engine_info *)0)->model_name + 8)];
    size_t n = kivi_utf8_push(&utf8, text, strlen(text), whole);
    n += kivi_utf8_push(&utf8, NULL, 0, whole + n);
    whole[n] = 0;
    putchar('"');
    for (const unsigned char *p = (const unsigned char *)whole; *p; p++) {
        if (*p == '"' || *p == '\\') printf("\\%c", *p);
        else if (*p < 32) printf("\\u%04x", *p);
        else putchar(*p);
    }
    putchar('"');
}

static void print_json(const kivi_engine_info *i, const plan *plans, uint32_t n, uint32_t ctx) {
    printf("{\"model\": {\"name\": ");
    print_json_text(i->model_name);
    printf(", \"architecture\": \"%s\", \"weight_type\": \"%s\", \"n_params\": %llu, \"n_layers\": "
           "%u, \"n_embd\": %u, "
           "\"n_heads\": %u, \"n_kv_heads\": %u, \"head_dim\": %u, \"n_vocab\": %u, \"ctx\": "
           "%u},\n \"memory_plan\": [",
           i->architecture, i->weight_type, (unsigned long long)i->n_params, i->n_layers, i->n_embd,
           i->n_heads, i->n_kv_heads, i->head_dim, i->n_vocab, i->ctx_tokens);
    for (uint32_t k = 0; k < n; k++) {
        printf("%s\n  {\"kv\": \"%s\", \"ctx\": %u, \"bits\": %.4g, \"bytes_per_token\": %.10g, "
               "\"bytes\": ",
               k ? "," : "", plans[k].kv, ctx, plans[k].bits, bytes_per_token(&plans[k]));
        print_memory_json(stdout, &plans[k].bytes);
        putchar('}');
    }
    puts("]}");
}

static void print_text(const kivi_engine_info *i, const plan *plans, uint32_t n, uint32_t ctx) {
    kivi_memory columns[MAX_LIST];
    const char *names[MAX_LIST];
    printf("%s: %s, %.1f M parameters, %s\n", i->model_name, i->architecture,
           (double)i->n_params / 1e6, i->weight_type);
    printf("%u layers, width %u, %u heads over %u KV heads of %u, vocabulary %u, context %u "
           "tokens\n",
           i->n_layers, i->n_embd, i->n_heads, i->n_kv_heads, i->head_dim, i->n_vocab,
           i->ctx_tokens);
    printf("kernels %s, %u threads\n\nmemory plan for one sequence of %u tokens\n", i->isa,
           i->n_threads, ctx);
    for (uint32_t k = 0; k < n; k++) columns[k] = plans[k].bytes, names[k] = plans[k].kv;
    print_memory_table(stdout, columns, names, n);
    printf("  %-13s", "bits/element");
    for (uint32_t k = 0; k < n; k++) printf(" %10.2f", plans[k].bits);
    printf("\n  %-13s", "bytes/token");
    for (uint32_t k = 0; k < n; k++) printf(" %10.0f", bytes_per_token(&plans[k]));
    puts("");
}

int command_info(const options *o) {
    kivi_engine *engine = NULL;
    plan plans[MAX_LIST];
    uint32_t n = 0;
    options plain = options_without_kind(o); /* each plan has its own */
    int code = open_engine(&engine, &plain, "f16", NULL, NULL);
    if (code) return code;
    const kivi_engine_info *i = kivi_engine_info_get(engine);
    code = make_plans(plans, &n, o, engine, i->ctx_tokens);
    if (!code) (o->json ? print_json : print_text)(i, plans, n, i->ctx_tokens);
    kivi_engine_destroy(&engine);
    return code;
}
