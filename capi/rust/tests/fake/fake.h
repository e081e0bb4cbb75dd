/* A libtrtxpy that the crate's tests can drive: handles, borrowing, requests in flight, completions, errors; no Python.
 *
 * A model is text: "identity DTYPE AXES [fail]", say "identity float32 -1x4": output y is input x. "plan " before it makes a
 * plan of it. The context's backend "mock:duration_s=0.05" says how long a request takes. */
#ifndef FAKE_H
#define FAKE_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>

#define TRTXPY_BUILDING
#include "trtxpy.h"

/* One lock for everything; `changed` when a request is done or posted. */
extern pthread_mutex_t mutex;
extern pthread_cond_t changed;
extern _Thread_local char error_text[512];
extern _Thread_local trtxpy_status error_status;
extern _Thread_local bool in_callback;

trtxpy_status begin(void);
__attribute__((format(printf, 2, 3))) trtxpy_status fail(trtxpy_status status, const char *format, ...);
uint64_t now_ns(void);

/* ---- objects: entries of a table that only grows, so that a handle is never valid again ---- */

typedef enum { NONE, CONTEXT, GRAPH, TENSOR, REQUEST, QUEUE, RESULTS } kind;

typedef struct object {
    kind kind;
    struct object *parent;
    size_t children; /* open ones, and requests in flight */
    uint64_t duration_ns;
    bool mock;
    /* graph, tensor */
    trtxpy_dtype dtype;
    trtxpy_shape shape;
    bool fails, plan;
    char *text;
    uint64_t submitted, completed, failed, cancelled, in_flight;
    size_t groups;
    /* tensor */
    trtxpy_location location;
    unsigned char *data;
    size_t bytes;
    int use;
    struct object *group;
    /* request */
    struct object *graph, *input, *output, *queue, *next;
    trtxpy_callback callback;
    void *userdata;
    trtxpy_result result;
    trtxpy_status status;
    char message[64];
    uint64_t due_ns;
    bool is_cancelled, done, handle_open, resize;
    /* queue */
    int fd;
    trtxpy_completion *ring;
    size_t count;
    /* results */
    trtxpy_array array;
} object;

extern object **table;
extern size_t table_count;
void *make(kind kind, object *parent, object **made);
object *find(const void *handle, kind kind); /* with the mutex */
void drop_handle(const void *handle);
void free_object(object *gone);
trtxpy_status destroy(const void *handle, kind kind);

/* ---- with the mutex, but for open_graph ---- */

trtxpy_status open_graph(trtxpy_context context, const void *model, size_t bytes, bool plan, trtxpy_graph *graph);
bool fits(const object *graph, const trtxpy_shape *shape);
object *check_shapes(trtxpy_graph graph, const trtxpy_named_shape *inputs, size_t count);
void reshape(object *tensor, const trtxpy_shape *shape);

/* The thread that completes requests. */
void *complete(void *unused);

#endif
