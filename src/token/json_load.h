/* json_load.h: what json_load.c and json_rooms.c share: reading a tokenizer.json that may hold
 * anything. */
#ifndef KI_JSON_LOAD_H
#define KI_JSON_LOAD_H
#include "pipeline.h"

#include <jansson.h>

/* A whole tokenizer.json within its limits; *out is the caller's to json_decref. */
kivi_status ki_json_parse(json_t **out, const char *text, size_t n_bytes, kivi_error *err);
/* Text of a member; {NULL, 0}: none. Lent by the JSON. */
ki_span ki_json_text(const json_t *object, const char *key);
bool ki_json_flag(const json_t *object, const char *key, bool otherwise);
/* FORMAT naming what is wrong where. */
kivi_status ki_json_wrong(const char *where, const char *what, kivi_error *err);
/* An id of an added token by its text: -1: none. */
kivi_status ki_rooms_fill(ki_vocab *vocab, const json_t *root, kivi_error *err);

#endif
