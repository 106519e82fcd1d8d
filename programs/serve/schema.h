/* schema.h: a JSON Schema as a grammar of the JSON texts that it accepts.
 *
 * Understood: type (one or several), properties, required, additionalProperties, items,
 * prefixItems, minItems, maxItems, minLength, maxLength, minimum, maximum and the exclusive ones
 * (of integers), format (date, time, date-time, uuid), enum, const, anyOf, allOf of one schema,
 * $ref within the document, $defs and definitions, true, and annotations (title, description,
 * default, ...). Any other keyword is refused by name.
 *
 * The grammar accepts a part of what the schema does, never more: properties come in the order they
 * are written, further ones only where additionalProperties says so itself, white space is one
 * blank or one line end with indentation, numbers have at most 16 digits before and after the
 * point, free strings no \u0000. */
#ifndef SERVE_SCHEMA_H
#define SERVE_SCHEMA_H
#include "grammar.h"

#include <jansson.h>

/* False: error says what and where in the schema. */
bool schema_compile(grammar *g, const json_t *schema, char *error, size_t n_bytes);
/* Any JSON object. */
bool schema_any_object(grammar *g);

#endif
