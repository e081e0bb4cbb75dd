/* The objects behind the handles, and what the files of the library know of each other.
 *
 * Locks, outermost first: a graph's mutex; the completer's; a job's; a queue's; a tensor's. Python's lock is never taken, nor waited for,
 * under one of them. A call keeps its objects by the users of their handles: an object that is in use is not destroyed. */
#ifndef TRTXPY_CORE_H
#define TRTXPY_CORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "error.h"
#include "host.h"
#include "lane_table.h"
#include "trtxpy.h"

/* ---- handle.c ---- */

typedef enum trtxpy_kind {
    TRTXPY_KIND_CONTEXT = 1,
    TRTXPY_KIND_GRAPH,
    TRTXPY_KIND_TENSOR,
    TRTXPY_KIND_REQUEST,
    TRTXPY_KIND_QUEUE,
    TRTXPY_KIND_RESULTS
} trtxpy_kind;

/* What every object begins with. */
typedef struct trtxpy_head {
    uintptr_t handle;
    atomic_size_t children; /* open objects that this one must outlive */
} trtxpy_head;

/* A handle for `head`, or 0 with the error set. */
uintptr_t trtxpy_handle_make(trtxpy_kind kind, trtxpy_head *head);
/* The object, which stays until trtxpy_handle_release; NULL with TRTXPY_INVALID_HANDLE set. what: the argument's name. */
void *trtxpy_handle_acquire(const void *handle, trtxpy_kind kind, const char *what);
void trtxpy_handle_keep(trtxpy_head *head); /* once more, by somebody who has it already */
void trtxpy_handle_release(trtxpy_head *head);
/* Nobody can acquire it any more, and nobody has it: the object, to be freed. NULL with an error, or for a NULL handle. */
void *trtxpy_handle_retire(const void *handle, trtxpy_kind kind, const char *what, trtxpy_status *status);
size_t trtxpy_handle_count(void);

/* ---- library.c ---- */

/* Begins a function that returns a status: clears the thread's error; TRTXPY_FORKED or TRTXPY_CLOSED where nothing can be done. */
trtxpy_status trtxpy_enter(void);
const trtx_lane_table *trtxpy_lanes(void);
/* After whatever may have loaded shared objects, a CUDA driver or Python's modules: what they registered for the process's exit,
 * destructors say, runs after Python's end and that of the requests, not before it. Cheap where nothing was loaded. */
void trtxpy_end_before_the_loaded(void);
extern _Thread_local bool trtxpy_in_callback;
trtxpy_status trtxpy_refuse_in_callback(const char *function);

/* Copy a struct that begins with struct_size from the caller: as much as he knows, at least `least` bytes. `to` has defaults. */
trtxpy_status trtxpy_read_struct(void *to, size_t size, size_t least, const void *from, const char *name);
/* And to the caller. */
trtxpy_status trtxpy_write_struct(void *to, const void *from, size_t size, size_t least, const char *name);

/* Each struct with struct_size, and its last member in ABI 1.0. When a later version adds a member at its end, the line stays as
 * it is: TRTXPY_SIZE_1_0 is what callers that were built with 1.0 have, and are accepted with. What such a caller lacks has the
 * default of the INIT macro. Then the assertion below, that the two sizes are equal, no longer holds for that struct: move its
 * line to a list of its own, without the assertion. A struct that is new in 1.1 gets TRTXPY_SIZE_1_1, and so on. */
#define TRTXPY_STRUCTS_1_0(X)                                                                                                    \
    X(trtxpy_init_options, python)                                                                                               \
    X(trtxpy_context_options, allow_host_code)                                                                                   \
    X(trtxpy_context_info, device)                                                                                               \
    X(trtxpy_context_statistics, cache_misses)                                                                                   \
    X(trtxpy_graph_options, reserved)                                                                                            \
    X(trtxpy_graph_statistics, slots)                                                                                            \
    X(trtxpy_tensor_info, shape)                                                                                                 \
    X(trtxpy_tensor_desc, shape)                                                                                                 \
    X(trtxpy_dispatch_options, reserved)                                                                                         \
    X(trtxpy_submit_options, reserved)                                                                                           \
    X(trtxpy_array, bytes)
#define TRTXPY_SIZE_UNTIL(type, member) (offsetof(type, member) + sizeof(((type *)0)->member))
#define TRTXPY_SIZE_1_0(type) ((size_t)type##_size_1_0)
#define TRTXPY_NAME_SIZE(type, last) type##_size_1_0 = TRTXPY_SIZE_UNTIL(type, last),
enum { TRTXPY_STRUCTS_1_0(TRTXPY_NAME_SIZE) };
#undef TRTXPY_NAME_SIZE
#define TRTXPY_CHECK_SIZE(type, last) _Static_assert(type##_size_1_0 == sizeof(type), #type " is what ABI 1.0 has");
TRTXPY_STRUCTS_1_0(TRTXPY_CHECK_SIZE)
#undef TRTXPY_CHECK_SIZE

uint64_t trtxpy_now_ns(void);

/* ---- dtype.c ---- */

bool trtxpy_dtype_known(trtxpy_dtype dtype);
/* Elements of a shape: TRTXPY_INVALID_ARGUMENT as trtxpy_dtype_bytes. what: names the shape in the error. */
trtxpy_status trtxpy_shape_elements(const trtxpy_shape *shape, const char *what, size_t *elements);
trtxpy_status trtxpy_shape_bytes(trtxpy_dtype dtype, const trtxpy_shape *shape, const char *what, size_t *bytes);
bool trtxpy_shape_equal(const trtxpy_shape *a, const trtxpy_shape *b);
/* "(2, 3)" into `text`, which it returns. */
enum { TRTXPY_SHAPE_TEXT = 200 };
char *trtxpy_shape_text(const trtxpy_shape *shape, char text[TRTXPY_SHAPE_TEXT]);
/* Convert `elements` integers; TRTXPY_RANGE names the first that does not fit. Types that are equal are copied. */
trtxpy_status trtxpy_convert(void *to, trtxpy_dtype to_type, const void *from, trtxpy_dtype from_type, size_t elements,
                             const char *name);

/* ---- control.c: calls into trtx_py.capi._control ---- */

/* Python's lock, and the caller's pending exception put aside. */
typedef struct trtxpy_scope {
    const trtxpy_python *py; /* NULL: there is no Python; the error is set */
    int lock;
    PyObject *error[3];
} trtxpy_scope;

/* End what the first trtxpy_scope_begin of this thread began; not within a scope. */
void trtxpy_forget_thread(void);
bool trtxpy_scope_begin(trtxpy_scope *scope);
trtxpy_status trtxpy_say_ended(void); /* there is no Python any more: why */
void trtxpy_scope_end(trtxpy_scope *scope);
/* Call `function` with the arguments of a format, as it says: returns TRTXPY_OK and the tuple (a new reference), or the error.
 * s string or None, y bytes (pointer, size_t; NULL: None), i int64_t, u uint64_t, p address, b bool, O object (borrowed),
 * N object (taken over; NULL makes the call fail). */
trtxpy_status trtxpy_call(const trtxpy_scope *scope, PyObject **result, const char *function, const char *format, ...);
/* Drop a reference that may be NULL; takes Python's lock unless the scope has it. */
void trtxpy_drop(PyObject *object);

/* Parts of a tuple; a wrong type is TRTXPY_INTERNAL, once: check `failed` at the end. */
typedef struct trtxpy_reader {
    const trtxpy_python *py;
    PyObject *tuple; /* borrowed */
    bool failed;
} trtxpy_reader;
size_t trtxpy_read_count(trtxpy_reader *reader);
PyObject *trtxpy_read_object(trtxpy_reader *reader, size_t index); /* borrowed; NULL if failed */
int64_t trtxpy_read_int(trtxpy_reader *reader, size_t index);
uint64_t trtxpy_read_unsigned(trtxpy_reader *reader, size_t index);
char *trtxpy_read_text(trtxpy_reader *reader, size_t index); /* malloc; NULL if failed */
trtxpy_reader trtxpy_read_tuple(trtxpy_reader *reader, size_t index);
void trtxpy_read_shape(trtxpy_reader *reader, size_t index, trtxpy_shape *shape);
PyObject *trtxpy_dims(const trtxpy_python *py, const trtxpy_shape *shape); /* a new tuple of ints */
/* A new tuple of `count` items, which are taken over; NULL if one is NULL. */
PyObject *trtxpy_pack(const trtxpy_python *py, size_t count, PyObject **items);
PyObject *trtxpy_graph_options_tuple(const trtxpy_python *py, const trtxpy_graph_options *options);
trtxpy_status trtxpy_check_graph_options(const trtxpy_graph_options *given, trtxpy_graph_options *options);

/* ---- context.c ---- */

typedef struct trtxpy_context_object {
    trtxpy_head head;
    PyObject *py;
    trtxpy_completion_mode completion;
    uint64_t spin_ns;
    trtxpy_context_info info;
    atomic_uint_least64_t graphs, tensors, queues, requests;
} trtxpy_context_object;

/* ---- tensor.c ---- */

typedef struct trtxpy_group trtxpy_group;

typedef struct trtxpy_tensor_object {
    trtxpy_head head; /* children: DLPack exports */
    trtxpy_context_object *context;
    trtxpy_dtype dtype;
    trtxpy_location location;
    trtxpy_shape shape;
    size_t elements, bytes, capacity;
    void *data;
    PyObject *buffer;               /* NULL: the group's, or foreign */
    struct DLManagedTensor *foreign;
    trtxpy_group *group;            /* or NULL */
    trtxpy_direction role;          /* in the group */
    size_t position;
    atomic_int use;                 /* -1: written by a request or call; above 0: read by so many */
    pthread_mutex_t mutex; /* who has it for writing changes shape, memory and sizes with this; who has no use reads them with it */
} trtxpy_tensor_object;

bool trtxpy_tensor_begin_read(trtxpy_tensor_object *tensor);
bool trtxpy_tensor_begin_write(trtxpy_tensor_object *tensor);
void trtxpy_tensor_end_use(trtxpy_tensor_object *tensor, bool written);
bool trtxpy_tensor_written(const trtxpy_tensor_object *tensor);
bool trtxpy_tensor_on_device(const trtxpy_tensor_object *tensor);
/* Resize what the caller has for writing. name: for the error. */
trtxpy_status trtxpy_tensor_reshape(trtxpy_tensor_object *tensor, const trtxpy_shape *shape);
/* Memory through Python, synchronous. */
trtxpy_status trtxpy_copy(trtxpy_context_object *context, void *to, bool to_device, const void *from, bool from_device,
                          size_t bytes);
trtxpy_tensor_object *trtxpy_tensor_new(trtxpy_context_object *context, trtxpy_dtype dtype, trtxpy_location location,
                                        const trtxpy_shape *shape);
void trtxpy_tensor_free(trtxpy_tensor_object *tensor); /* what has no handle (any more) */
void trtxpy_dlpack_release(struct DLManagedTensor *managed);

/* ---- graph.c ---- */

typedef struct trtxpy_port { /* one input or output */
    char *name;
    trtxpy_dtype dtype, engine_dtype;
    trtxpy_shape shape;
} trtxpy_port;

typedef struct trtxpy_job trtxpy_job;
typedef struct trtxpy_entry trtxpy_entry;

typedef struct trtxpy_graph_object {
    trtxpy_head head; /* children: groups of tensors; users: calls and requests */
    trtxpy_context_object *context;
    PyObject *py;
    trtxpy_port *ports; /* inputs, then outputs */
    size_t input_count, output_count;
    size_t max_entries;
    pthread_mutex_t mutex;
    pthread_cond_t slot_came; /* for those that wait in their own thread */
    /* under the mutex: */
    trtxpy_entry *entries;      /* latest first */
    size_t entry_count;
    trtxpy_job *first, *last;   /* jobs that wait for a slot */
    size_t queued, grouped;     /* waiting jobs; slots that groups have */
    size_t turn;                /* which lane is asked first */
    struct trtxpy_graph_object *next, *previous; /* of all graphs; under the completer's list lock */
    struct {
        atomic_uint_least64_t submitted, completed, failed, cancelled, captured, uncaptured, zero_copy, in_flight;
    } counts;
} trtxpy_graph_object;

/* The shapes of all inputs, by name, in the graph's order. */
trtxpy_status trtxpy_graph_shapes(trtxpy_graph_object *graph, const trtxpy_named_shape *given, size_t count,
                                  trtxpy_shape *shapes);
/* Which input or output has this name; hint: where to look first. (size_t)-1 if none. */
size_t trtxpy_graph_find(const trtxpy_graph_object *graph, trtxpy_direction direction, const char *name, size_t hint);
static inline trtxpy_port *trtxpy_graph_port(trtxpy_graph_object *graph, trtxpy_direction direction, size_t index) {
    return &graph->ports[direction == TRTXPY_INPUT ? index : graph->input_count + index];
}

/* ---- shapes.c: what is captured ---- */

typedef struct trtxpy_place { /* one slot's graph and memory */
    CUgraphExec exec;         /* NULL: this slot has none */
    void **data;              /* inputs, then outputs */
} trtxpy_place;

typedef struct trtxpy_entry_lane {
    trtx_lane *lane;
    uint64_t mask[16];
    size_t words, place_count; /* places is by slot, 64 * words of them */
    trtxpy_place *places;
} trtxpy_entry_lane;

struct trtxpy_entry {
    trtxpy_entry *next;
    size_t users;      /* under the graph's mutex */
    bool listed;
    PyObject *py;      /* NULL: this shape is not captured */
    char *why;         /* then: why not */
    trtxpy_status status; /* and the status of that */
    uint64_t retry_ns; /* and when to try again; 0: never */
    trtxpy_shape *shapes; /* inputs, then outputs */
    size_t *bytes;        /* of the engine's types */
    trtxpy_entry_lane *lanes;
    size_t lane_count, slot_count;
};

/* The entry of these input shapes, with a user; NULL if there is none yet. Takes no lock of Python's. */
trtxpy_entry *trtxpy_entry_find(trtxpy_graph_object *graph, const trtxpy_tensor_object *const *inputs, const trtxpy_shape *shapes);
/* The same, made where there is none: captures. An entry of what cannot be captured has no py. */
trtxpy_status trtxpy_entry_get(trtxpy_graph_object *graph, const trtxpy_shape *shapes, trtxpy_entry **entry);
void trtxpy_entry_release(trtxpy_graph_object *graph, trtxpy_entry *entry);
void trtxpy_entry_close_all(trtxpy_graph_object *graph); /* nobody uses one */

/* ---- group.c: tensors in the memory of one slot ---- */

const trtxpy_graph_object *trtxpy_group_graph(const trtxpy_group *group);
const trtxpy_entry *trtxpy_group_entry(const trtxpy_group *group);
void trtxpy_group_slot(const trtxpy_group *group, size_t *lane, size_t *slot);
void trtxpy_group_leave(trtxpy_group *group); /* one of its tensors is gone; the last one gives the slot back */

/* ---- job.c: requests ---- */

typedef enum trtxpy_phase { TRTXPY_PREPARING, TRTXPY_QUEUED, TRTXPY_LAUNCHED } trtxpy_phase;

enum { TRTXPY_FEW_TENSORS = 16 };

struct trtxpy_job {
    trtxpy_head head;
    atomic_int references;
    trtxpy_graph_object *graph;
    trtxpy_tensor_object **tensors; /* inputs, then outputs, in the graph's order; each acquired and in use */
    trtxpy_tensor_object *few[TRTXPY_FEW_TENSORS];
    size_t bound;       /* how many of them are */
    bool resize, device, grouped; /* grouped: on the held slot of one group, nothing to copy */
    bool here;          /* a thread waits in the graph's row for this job's slot, and launches it */
    trtxpy_phase phase; /* under the graph's mutex once others know the job */
    trtxpy_entry *entry;
    size_t lane, slot;
    bool has_slot;
    trtxpy_job *next, *previous; /* in the graph's row, or a thread's */
    atomic_bool cancelled;
    trtxpy_result result;
    trtxpy_status status;
    char *message;
    trtxpy_callback callback;
    void *userdata;
    struct trtxpy_queue_object *queue;
    pthread_mutex_t mutex; /* of what has references: */
    pthread_cond_t changed;
    bool settled; /* how it ends is decided: cancelled no more */
    bool done;
};

trtxpy_status trtxpy_job_bind(trtxpy_job *job, trtxpy_graph_object *graph, const trtxpy_binding *inputs, size_t input_count,
                              const trtxpy_binding *outputs, size_t output_count);
void trtxpy_job_unbind(trtxpy_job *job);
/* Outputs have the shape that the graph gives, or get it. */
trtxpy_status trtxpy_job_fit_outputs(trtxpy_job *job);
/* With the graph's mutex: a slot for the job, if one is free. */
bool trtxpy_job_take_slot(trtxpy_job *job);
/* Fill the slot and launch. hub: NULL, or gets the completion, and somebody is woken. On failure the slot is still the job's. */
trtxpy_status trtxpy_job_launch(trtxpy_job *job, trtx_hub *hub);
/* The slot's results into the tensors. */
trtxpy_status trtxpy_job_collect(trtxpy_job *job, CUresult status);
void trtxpy_job_give_back(trtxpy_job *job); /* slot and entry; others that wait for a slot get it */
/* Through Python: shapes that are not captured, and device tensors. */
trtxpy_status trtxpy_job_run_in_python(trtxpy_job *job);
/* Jobs that wait and for which there is a slot now. */
void trtxpy_graph_pump(trtxpy_graph_object *graph);
/* With the graph's mutex: into the row of those that wait for a slot, and out of it. */
void trtxpy_graph_enqueue(trtxpy_graph_object *graph, trtxpy_job *job);
void trtxpy_graph_dequeue(trtxpy_graph_object *graph, trtxpy_job *job);
/* The whole request in this thread. */
trtxpy_status trtxpy_job_run(trtxpy_job *job);
void trtxpy_graph_count_end(trtxpy_graph_object *graph, trtxpy_status status);
trtxpy_status trtxpy_cuda_fail(CUresult status, const char *call);

/* ---- submit.c ---- */

trtxpy_status trtxpy_submit_job(trtxpy_graph_object *graph, const trtxpy_binding *inputs, size_t input_count,
                                const trtxpy_binding *outputs, size_t output_count, const trtxpy_submit_options *options,
                                trtxpy_job **job);
/* Keep the calling thread's error for the job and hand it to the completer. */
void trtxpy_job_end(trtxpy_job *job, trtxpy_status status);
void trtxpy_job_unreference(trtxpy_job *job);
trtxpy_status trtxpy_job_wait(trtxpy_job *job, uint64_t timeout_ns, trtxpy_status *outcome);
bool trtxpy_job_cancel(trtxpy_job *job);

/* ---- threads.c: the completer, and workers for what needs Python ---- */

trtxpy_status trtxpy_threads_start(void); /* once */
/* Joins them. What runs is awaited, for a while; what has not begun completes with TRTXPY_CANCELLED. */
void trtxpy_threads_stop(void);
trtxpy_status trtxpy_requests_enter(void); /* one more is on its way; TRTXPY_CLOSED: none may, the threads end */
void trtxpy_requests_leave(void);          /* and its completion was delivered, or there is none */
trtx_hub *trtxpy_completer_hub(void);
void trtxpy_completer_post(trtxpy_job *job); /* finished, in whatever way */
void trtxpy_completer_look(void);            /* a job waits for a slot: look now and then */
void trtxpy_completer_watch(void);           /* and nobody else looks whether the GPU is done */
trtxpy_status trtxpy_worker_post(trtxpy_job *job);
void trtxpy_graphs_add(trtxpy_graph_object *graph);
void trtxpy_graphs_remove(trtxpy_graph_object *graph);

/* ---- queue.c ---- */

typedef struct trtxpy_queue_object trtxpy_queue_object;
/* Room for one completion more is made by _reserve, so that _push cannot fail. */
trtxpy_status trtxpy_queue_reserve(trtxpy_queue_object *queue);
void trtxpy_queue_push(trtxpy_queue_object *queue, const trtxpy_job *job);
trtxpy_head *trtxpy_queue_head(trtxpy_queue_object *queue);

#endif
