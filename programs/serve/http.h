/* http.h: one HTTP request, for http.c, which moves bytes, and routes.c, which answers. */
#ifndef SERVE_HTTP_H
#define SERVE_HTTP_H
#include "job.h"

typedef struct route route;

/* One request of a connection, from its head on. */
typedef struct exchange {
    server *s;
    struct MHD_Connection *connection;
    const route *to;
    const char *rest;  /* of the path, behind a route that ends in a slash */
    const char *allow; /* of 405: the methods there are */
    text body;
    json_t *parsed; /* of the body */
    text reply;     /* what a preparation leaves to be sent, unless it leaves a job or a failure */
    enum { READING, PREPARING, PREPARED } stage;
    struct exchange *next; /* in the queue of preparations */
    fault failure;         /* found in the head; told once the body has come */
    job *work;
    request_log log;
    char path[128];                /* for the log */
    size_t n_swallowed, n_counted; /* bytes of the body; of them in server.body_bytes */
    bool answered;
} exchange;

struct route {
    const char *method, *path; /* a path that ends in a slash stands for all below it */
    bool needs_key, needs_model, is_work;
    /* One of the two. A preparation may take long (a text to be taken apart): a large body is
     * prepared by a thread of its own, so that streams go on. It does not touch the connection. */
    enum MHD_Result (*answer)(exchange *e);
    void (*prepare)(exchange *e);
};

/* The route; NULL: f says why (404 or 405), and *allow names the methods there are. */
const route *route_find(const char **rest, const char **allow, const char *method, const char *path,
                        fault *f);

/* Sends text as it is; takes its memory. */
enum MHD_Result respond(exchange *e, int status, const char *content_type, text *t);
enum MHD_Result respond_fault(exchange *e, const fault *f);
/* A job that was submitted: its answer or its stream, when it is there. */
enum MHD_Result respond_job(exchange *e);

extern const char page_html[];
extern const unsigned page_html_bytes;

#endif
