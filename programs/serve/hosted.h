/* hosted.h: the model behind a server or a batch. */
#ifndef SERVE_HOSTED_H
#define SERVE_HOSTED_H
#include "../commands.h"
#include "server.h"

/* Engine, vocabulary and scheduler of s by o; prints what went wrong and returns the exit code. */
int model_load(server *s, const options *o,
               void (*on_step)(void *user, const kivi_step_report *report));
void model_unload(server *s);

#endif
