/* commands.h: one function a command, and what they share. Each returns an exit code. */
#ifndef COMMANDS_H
#define COMMANDS_H
#include "options.h"

int command_run(const options *o);
int command_info(const options *o);
int command_logits(const options *o);
int command_bench(const options *o);
int command_eval(const options *o);
int command_chat(const options *o);
int command_tokenize(const options *o);
int command_convert(const options *o);
int command_serve(const options *o);
int command_batch(const options *o);
int command_bench_serve(const options *o);
int command_bench_attention(const options *o);

/* MODEL to a path: a name that is packaged is fetched (tools/fetch_model.sh), anything else is
 * taken as it stands. */
int model_path(char *path, size_t n_bytes, const char *model);
/* An engine for o with its cache kind `kv`; adjust may be NULL. Prints what went wrong. */
int open_engine(kivi_engine **engine, const options *o, const char *kv,
                void (*adjust)(kivi_engine_options *, void *), void *user);
/* The sampler that o asks for. */
kivi_sampler_options sampler_options(const options *o);
/* A whole file, at most max_bytes; the caller frees *out. */
int read_file(char **out, size_t *n_bytes, const char *path, size_t max_bytes);
/* Prints that there is no memory for `what`; returns the exit code. */
int out_of_memory(const char *what);
double now_seconds(void);
uint64_t peak_rss_bytes(void);
/* {"weights": N, ...} */
void print_memory_json(FILE *out, const kivi_memory *m);
/* One line a tag, each kind a column. */
void print_memory_table(FILE *out, const kivi_memory *columns, const char *const *names,
                        uint32_t n_columns);

#endif
