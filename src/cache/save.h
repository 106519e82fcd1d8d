/* save.h: a byte stream in a file with a running checksum, and a sequence written to or read from
 * one. */
#ifndef KI_SAVE_H
#define KI_SAVE_H
#include "cache.h"

#include <stdio.h>

/* Reading or writing, the first fault sticks: later calls do nothing, and ki_stream_finish reports
 * it. */
typedef struct ki_stream {
    FILE *file;
    const char *path;
    char temp_path[4096]; /* writing: renamed to path when all is well */
    uint64_t hash;        /* FNV-1a, 64 bits, over all bytes so far */
    bool writing;
    kivi_status status;
    kivi_error *err;
} ki_stream;

kivi_status ki_stream_open(ki_stream *s, const char *path, bool writing, kivi_error *err);
void ki_stream_bytes(ki_stream *s, void *bytes, size_t n_bytes); /* written from, or read into */
void ki_stream_fail(ki_stream *s, kivi_status status, const char *what);
/* Writes or checks the checksum, then renames or checks that nothing follows. Always closes. */
kivi_status ki_stream_finish(ki_stream *s);

/* A sequence in the plain order (quant.h). Reading fills a new, empty sequence; a file of another
 * geometry or kind, or with numbers that are not finite, fails the stream. */
void ki_seq_stream(ki_stream *s, kivi_seq *seq);
/* The same file without a sequence to fill: its cache must be one of this layout; the rest is only
 * read for the checksum. */
void ki_seq_look(ki_stream *s, const ki_layout *layout);
/* A new sequence gets the state of another, perhaps of a cache on another device, and pages for as
 * many tokens; what is in them the caller copies. */
kivi_status ki_seq_take_shape(kivi_seq *to, const kivi_seq *from, kivi_error *err);

#endif
