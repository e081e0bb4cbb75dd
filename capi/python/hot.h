/* The hot path of trtx_py._native: what its files know of each other. Not for anybody else.
 *
 * The GIL protects every object here, and is what makes a Wait's address good as a token: a Wait gives its slot back before
 * its memory goes, and a slot that was given back is not heard of any more. The GIL is held for launches (3 to 26 us; to
 * release it costs more under contention) and let go only where a thread blocks.
 *
 * Any call into Python, and any Py_DECREF of what came from a caller, may run other code of these files: state is changed
 * before such a call, and read again after it. Errors of the driver travel as numbers and become exceptions where they are
 * taken, so that whoever launches another's request runs none of its code.
 */
#ifndef TRTX_HOT_H
#define TRTX_HOT_H

#include "native.h"

#include <stdbool.h>

#include "lane.h"
#include "lane_internal.h"

enum { TRTX_MAX_DIMENSIONS = 8, TRTX_SLOT_WORDS = TRTX_MAX_SLOTS / 64 };

/* Set in a token: it is the address of a Place. Its Wait may end while the slot is still the Place's. */
enum { TRTX_PLACE_TAG = 1 };

typedef struct wait_object wait_object;
typedef struct port_object port_object;
typedef struct place_object place_object;

typedef struct watcher_object {
    PyObject_HEAD
    trtx_watcher *watcher; /* NULL: closed */
    size_t lanes;          /* open ones */
} watcher_object;

typedef struct lane_object {
    PyObject_HEAD
    trtx_lane *lane; /* NULL: closed; then what waits and places have of it is nothing */
    size_t slots;
    int mode;
    PyObject *api;
    watcher_object *watcher;
    size_t users;        /* threads that are inside a call without the GIL */
    struct {
        port_object *port; /* borrowed */
        size_t buckets;    /* that it has here */
    } *ports;
    size_t port_count, port_room;
} lane_object;

typedef struct hub_object {
    PyObject_HEAD
    trtx_hub *hub;
    int fd;
    PyObject *make_future;             /* NULL: this loop has no futures */
    wait_object *hot_first, *hot_last; /* borrowed: hot waits, oldest first; the first one spins for all */
    size_t sleepers;                   /* waits that have a future or a waker: somebody must drain */
    PyObject *pumping;                 /* a set for _loops.py: the ports that a timer of this loop pumps */
    PyObject *weak_references;
} hub_object;

typedef struct tensor_spec {
    char format; /* 0: not for the fast path */
    int dimensions;
    Py_ssize_t shape[TRTX_MAX_DIMENSIONS];
} tensor_spec;

/* What one slot has for one bucket. */
typedef struct place_record {
    CUgraphExec exec;
    PyObject *inputs, *outputs; /* tuples of the pinned views */
    struct {
        void *data;
        Py_ssize_t bytes;
    } buffers[]; /* of the inputs; NULL where the bucket is not for the fast path */
} place_record;

typedef struct bucket_object {
    PyObject_HEAD
    lane_object *lane;
    port_object *port; /* borrowed; NULL: in none */
    Py_ssize_t input_count, output_count;
    PyObject *input_names, *output_names;
    tensor_spec *specs;
    bool on_loop, fast; /* fast: every input has a format */
    place_record **places; /* by slot; NULL where there is none */
    uint64_t mask[TRTX_SLOT_WORDS];
    size_t words, place_count;
    size_t active;        /* slots that places and waits have */
    size_t silent;        /* slots given back in flight, at most; nothing once `last` is done */
    uint64_t last;        /* what trtx_lane_glance said after the latest launch */
    unsigned long long hits;
} bucket_object;

struct place_object {
    PyObject_HEAD
    bucket_object *bucket; /* NULL: given back */
    size_t slot;
    wait_object *wait; /* borrowed: the request that is in flight and wanted */
    bool launched;
    bool working; /* a ManyRows launches it, in a thread without the GIL */
};

/* The buckets of one shape, and who waits for one of their slots. */
typedef struct shape_group {
    Py_ssize_t input_count;
    tensor_spec *specs;
    bool on_loop, fast;
    bucket_object **buckets;
    size_t count, room, rotation;
    wait_object *first, *last; /* borrowed; first come, first served */
    size_t queued;
    bool stuck; /* no slot found during this pump */
} shape_group;

struct port_object {
    PyObject_HEAD
    PyTypeObject *array_type;
    PyObject *input_names; /* a tuple of interned strings */
    PyObject *refuse, *fail;
    uint64_t max_hot_ns;
    unsigned fork_generation;
    bool open, pumping, pump_again;
    shape_group **groups;
    size_t group_count;
    size_t users; /* calls that remember a group */
    uint64_t arrivals;
    size_t in_flight, queued;
    wait_object *flight_first; /* borrowed; in_flight of them */
    struct abandoned {
        lane_object *lane;
        uint64_t number; /* as a wait's */
    } *abandoned;        /* in flight when nobody wanted them any more; some may be done by now */
    size_t abandoned_count, abandoned_room;
    unsigned long long completed, failed, cancelled, hits;
};

typedef enum wait_state {
    WAIT_QUEUED,
    WAIT_IN_FLIGHT,
    WAIT_SETTLING, /* the result is being built, and other code may run meanwhile */
    WAIT_READY,    /* `outcome` */
    WAIT_FAILED,   /* `outcome` is the exception, or `status` and `call` say what it will be */
    WAIT_CANCELLED,
    WAIT_TAKEN
} wait_state;

/* A thread that sleeps until its queued wait is something else; on that thread's stack. */
typedef struct wait_blocker {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool woken;
} wait_blocker;

struct wait_object {
    PyObject_HEAD
    /* everything from here on is zeroed when a Wait is made */
    wait_state state;
    bool acquiring; /* the result is a Place; not counted as a request */
    bool copy, awaited, stepped, hot;
    unsigned fork_generation;
    size_t slot;
    port_object *port;     /* NULL: its bucket is in none */
    hub_object *hub;       /* NULL: for a thread */
    bucket_object *bucket; /* in flight */
    place_object *place;   /* NULL: the slot is the wait's own */
    shape_group *group;    /* queued */
    wait_object *queue_next, *queue_previous;
    wait_object *flight_next, *flight_previous; /* the port's row of waits in flight */
    wait_object *hot_next, *hot_previous;
    uint64_t arrival, hot_until_ns;
    uint64_t number; /* in flight: done when trtx_lane_glance says that so many are completed */
    uint64_t queued_ns, launched_ns, completed_ns;
    PyObject *arrays; /* queued: tuple of the caller's inputs */
    PyObject *future, *waker;
    PyObject *outcome;
    CUresult status;
    const char *call;
    trtx_hub_node node; /* tells the hub what no slot will tell it */
    wait_blocker *blocker;
};

extern PyTypeObject trtx_watcher_type, trtx_lane_type, trtx_hub_type, trtx_bucket_type, trtx_place_type, trtx_port_type,
    trtx_wait_type;

/* Interned: what is called on every request. */
extern PyObject *trtx_str_copy, *trtx_str_set_result, *trtx_str_done, *trtx_str_blocking;

/* ---- hot.c ---- */

/* An array as a caller gave it: 1 if it is C-contiguous and as `spec` says (`view` is filled), 0 if not, without exception. */
int trtx_view_input(PyObject *array, Py_buffer *view);
bool trtx_view_matches(const Py_buffer *view, const tensor_spec *spec);
int trtx_parse_shape(PyObject *shape, tensor_spec *spec);
bool trtx_same_shape(const tensor_spec *left, const tensor_spec *right);
char trtx_plain_format(const char *format);
int trtx_hub_argument(PyObject *argument, const char *function, hub_object **hub);

/* ---- hot_lane.c ---- */

int trtx_lane_add_port(lane_object *lane, port_object *port);
void trtx_lane_remove_port(lane_object *lane, port_object *port);
/* A slot may have come free: queued waits get it. current: the hub whose loop runs this, or NULL. */
void trtx_lane_freed(lane_object *lane, hub_object *current);
bool trtx_lane_wanted(const lane_object *lane); /* somebody is queued for one of its slots */

/* ---- hot_hub.c ---- */

int trtx_hub_drain(hub_object *hub); /* never fails: what wakers and futures raise is reported as unraisable */

/* ---- hot_bucket.c ---- */

place_object *trtx_place_new(bucket_object *bucket, size_t slot); /* takes over the slot that the caller acquired */
bool trtx_place_in_flight(place_object *place); /* looks */
/* Bookkeeping of a slot that a wait or place has taken, and gives back. */
void trtx_bucket_hold(bucket_object *bucket);
void trtx_bucket_give_back(bucket_object *bucket, size_t slot, hub_object *current);

/* ---- hot_port.c ---- */

PyObject *trtx_port_refuse(port_object *port); /* NULL, with an exception */
PyObject *trtx_port_error(port_object *port, CUresult status, const char *call); /* a new exception; NULL with another */

/* ---- hot_queue.c ---- */

/* A slot of the group, held, on the lane with the fewest requests in flight. only: NULL, or the lane to look at. look: poll
 * where none is free. dead: the error of a dead lane, if there is none but those. */
bucket_object *trtx_port_find_slot(shape_group *group, lane_object *only, bool look, size_t *slot, CUresult *dead);
void trtx_port_enqueue(port_object *port, wait_object *wait, shape_group *group);
/* Serve the queue with the free slots: of one lane, or of all. */
void trtx_port_pump(port_object *port, lane_object *only, hub_object *current);
void trtx_port_dequeue(wait_object *wait);
/* The GPU works for a request of this port on the lane, and nobody wants it any more. */
void trtx_port_abandon(port_object *port, lane_object *lane, uint64_t number);
/* How many of those there still are; looks. */
size_t trtx_port_abandoned(port_object *port);
/* Bring what is finished into its wait, whoever's it is, and tell who sleeps for it. How many are still on the GPU. */
size_t trtx_port_settle(port_object *port);

/* ---- hot_wait.c ---- */

wait_object *trtx_wait_new(port_object *port, hub_object *hub);
/* Launch for a slot that the caller has acquired; `place` may be NULL. On failure nothing was changed, and *call is what
 * failed. */
CUresult trtx_wait_launch(wait_object *wait, bucket_object *bucket, size_t slot, place_object *place, bool copy,
                          const char **call);
bool trtx_wait_is_done(wait_object *wait); /* without looking at the GPU */
void trtx_wait_settle(wait_object *wait, hub_object *current);
void trtx_wait_cancel(wait_object *wait);
/* It is over, for a reason that no slot will tell: the exception (a new reference, or NULL for status and call). */
void trtx_wait_fail(wait_object *wait, PyObject *error, CUresult status, const char *call);
/* Whoever sleeps for it wakes when its hub is drained. */
void trtx_wait_tell(wait_object *wait);
/* Wake what sleeps, now and in this thread. */
void trtx_wait_wake(wait_object *wait);
/* A queued wait has been launched or granted: see that whoever sleeps for it hears of the end. */
void trtx_wait_moved_on(wait_object *wait, hub_object *current);
/* Join and leave the hub's row of hot waits. */
void trtx_wait_heat(wait_object *wait);
void trtx_wait_cool(wait_object *wait);
int trtx_wait_traverse(wait_object *wait, visitproc visit, void *arg);
int trtx_wait_clear(wait_object *wait);
void trtx_wait_dealloc(wait_object *wait);

#endif
