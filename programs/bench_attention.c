/* bench attention: a GPU's kernels of the cache by themselves (kivi_bench.h), as a table or as
 * JSON. Rows are printed as they are measured. */
#include "commands.h"

#include "kivi_bench.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_SHAPES = 256, MAX_KINDS = 16, NAME_BYTES = 32 };

typedef struct attention_bench {
    bool is_json;
    uint32_t n_rows;
    kivi_bench_shape shapes[MAX_SHAPES];
    kivi_bench_kind kinds[MAX_KINDS];
    char names[MAX_KINDS][NAME_BYTES];
    kivi_bench_options options;
} attention_bench;

/* ---- rows ---- */

static double per_us(double amount, const kivi_bench_row *row) {
    return row->us > 0 ? amount / row->us : 0;
}

static void print_json(const attention_bench *b, const kivi_bench_row *row) {
    const kivi_bench_shape *s = &row->shape;
    printf("%s  {\"what\": \"%s\", \"device\": \"%s\", \"kv\": \"%s\", \"n_batch\": %u, "
           "\"n_heads\": %u, \"n_kv_heads\": %u, \"n_tokens\": %u, \"residual\": %u, ",
           b->n_rows ? ",\n" : "[\n", kivi_bench_name(row->what), row->device, row->kind,
           s->n_batch, s->n_heads, s->n_kv_heads, s->n_tokens, row->window_tokens);
    printf("\"us\": %.3f, \"bytes\": %.0f, \"gbs\": %.1f, \"tflops\": %.1f, \"read_share\": %.4f}",
           row->us, row->bytes, per_us(row->bytes, row) * 1e-3, per_us(row->flops, row) * 1e-6,
           row->read_share);
}

/* A number, or an empty cell. */
static void put_cell(double value, int width, int digits) {
    if (value > 0) printf(" %*.*f |", width, digits, value);
    else printf(" %*s |", width, "");
}

static void print_md(const attention_bench *b, const kivi_bench_row *row) {
    const kivi_bench_shape *s = &row->shape;
    char heads[NAME_BYTES] = "";
    if (s->n_heads) snprintf(heads, sizeof heads, "%u/%u", s->n_heads, s->n_kv_heads);
    if (!b->n_rows)
        printf("%s, head size 128, %s\n\n"
               "| what     | kv      | batch | heads | tokens |    R |         us |   GB/s | %% of "
               "read | TFLOP/s |\n| :------- | :------ | ----: | ----: | -----: | ---: | "
               "---------: | -----: | --------: | ------: |\n",
               row->device, b->options.plain ? "plain launches" : "programmatic dependent launch");
    printf("| %-8s | %-7s |", kivi_bench_name(row->what), row->kind);
    put_cell(s->n_batch, 5, 0);
    printf(" %5s |", heads);
    put_cell(s->n_tokens, 6, 0);
    put_cell(row->window_tokens, 4, 0);
    put_cell(row->us, 10, 2);
    put_cell(per_us(row->bytes, row) * 1e-3, 6, 0);
    put_cell(row->read_share * 100, 9, 1);
    put_cell(per_us(row->flops, row) * 1e-6, 7, 0);
    putchar('\n');
}

static void print_row(void *user, const kivi_bench_row *row) {
    attention_bench *b = user;
    if (b->is_json) print_json(b, row);
    else print_md(b, row);
    b->n_rows++;
    fflush(stdout); /* a failure shows when main ends */
}

/* ---- what to measure ---- */

static int read_format(attention_bench *b, const options *o) {
    const char *format = o->format ? o->format : "md";
    b->is_json = !strcmp(format, "json");
    if (b->is_json || !strcmp(format, "md")) return EXIT_OK;
    return usage_error("-o: '%s', expected md or json", format);
}

static int read_kinds(attention_bench *b, const options *o) {
    const char *kinds = o->kv ? o->kv : "kivi2,kivi2+,k4v2,k4v2+,k4v3+,kivi4,kivi8,f16";
    char name[NAME_BYTES];
    uint32_t n = 0;
    for (; options_list_item(name, sizeof name, kinds, n); n++) {
        if (n == MAX_KINDS) return usage_error("--kv: expected at most %d kinds", MAX_KINDS);
        int code = options_kv(&b->kinds[n].kv, o, name);
        if (code) return code;
        b->kinds[n].name = strcpy(b->names[n], name);
    }
    b->options.kinds = b->kinds;
    b->options.n_kinds = n;
    return EXIT_OK;
}

static int no_such_measure(const char *name) {
    char names[200];
    size_t at = 0;
    for (uint32_t i = KIVI_BENCH_DECODE; i < KIVI_BENCH_N && at < sizeof names; i++)
        at += (size_t)snprintf(names + at, sizeof names - at, "%s%s",
                               i > KIVI_BENCH_DECODE ? ", " : "", kivi_bench_name(i));
    return usage_error("--measure: '%s', expected %s or all", name, names);
}

static int read_measures(attention_bench *b, const options *o) {
    const uint32_t streams = 1u << KIVI_BENCH_READ | 1u << KIVI_BENCH_COPY;
    char name[NAME_BYTES];
    b->options.measures = (1u << KIVI_BENCH_N) - 1;
    if (!o->measures || !strcmp(o->measures, "all")) return EXIT_OK;
    b->options.measures = streams;
    for (uint32_t i = 0; options_list_item(name, sizeof name, o->measures, i); i++) {
        uint32_t what = KIVI_BENCH_DECODE;
        while (what < KIVI_BENCH_N && strcmp(name, kivi_bench_name(what)) != 0) what++;
        if (what == KIVI_BENCH_N) return no_such_measure(name);
        b->options.measures |= 1u << what;
    }
    return EXIT_OK;
}

/* "32/8" */
static bool read_heads(uint32_t *n_heads, uint32_t *n_kv_heads, const char *text) {
    unsigned h, hk;
    int end = 0;
    if (sscanf(text, "%4u/%4u%n", &h, &hk, &end) != 2 || text[end]) return false;
    *n_heads = h, *n_kv_heads = hk;
    return h > 0 && hk > 0 && h % hk == 0;
}

/* All of batch x heads x depth, if any of the three is given. */
static int read_shapes(attention_bench *b, const options *o) {
    const char *heads = o->heads ? o->heads : "32/8";
    list depths = {{4096}, 1};
    char item[NAME_BYTES];
    size_t n = 0;
    if (!o->heads && !o->batch_given && !o->depth_given) return EXIT_OK;
    if (o->depth_given) depths = o->bench_depth;
    for (uint32_t h = 0; options_list_item(item, sizeof item, heads, h); h++)
        for (uint32_t i = 0; i < o->bench_batch.n; i++)
            for (uint32_t d = 0; d < depths.n; d++, n++) {
                if (n == MAX_SHAPES) return usage_error("more than %d shapes", MAX_SHAPES);
                kivi_bench_shape *s = &b->shapes[n];
                s->n_batch = o->bench_batch.values[i];
                s->n_tokens = depths.values[d];
                if (!read_heads(&s->n_heads, &s->n_kv_heads, item))
                    return usage_error("-H: '%s', expected query heads over KV heads, such as 32/8",
                                       item);
            }
    b->options.shapes = b->shapes;
    b->options.n_shapes = n;
    return EXIT_OK;
}

int command_bench_attention(const options *o) {
    attention_bench *b = calloc(1, sizeof *b);
    kivi_error err = {0};
    if (!b) return out_of_memory("bench attention");
    b->options.device = o->device;
    b->options.n_repeats = o->repeats;
    b->options.plain = o->plain_launches;
    b->options.row = print_row;
    b->options.user = b;
    int code = read_format(b, o);
    if (!code) code = read_kinds(b, o);
    if (!code) code = read_measures(b, o);
    if (!code) code = read_shapes(b, o);
    if (!code && kivi_bench_attention(&b->options, &err)) code = fail_with(&err);
    if (b->is_json && b->n_rows) puts("\n]");
    free(b);
    return code;
}
