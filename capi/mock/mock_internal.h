/* What the parts of the mock driver share. Private: included by the mock alone.
 *
 * Locks, always taken in this order:
 *   trtx_mock.lock   streams, events, captures, graphs, contexts; held briefly, never while work runs or a callback is called
 *   memory lock      one per instance: device blocks and pinned blocks; never held while bytes are copied
 *   fault lock       one per instance: planned faults
 *   handle lock      one per process: giving slots of the handle table to instances
 *
 * Threads: "host" functions run on the caller's thread, "worker" functions on a stream's thread.
 */
#ifndef TRTX_MOCK_INTERNAL_H
#define TRTX_MOCK_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "mock_driver.h"

enum { CUDA_ERROR_ILLEGAL_STATE = 401, MOCK_CAPTURE_STREAMS = 16, MOCK_CONTEXT_DEPTH = 128, MOCK_SITE = 200, MOCK_PAST = 32 };

/* ---- calls: what is counted and what faults are planned on ---- */

typedef enum mock_call {
#define MOCK_CALL(name, symbol, parameters) CALL_##name,
    TRTX_CUDA_FUNCTIONS(MOCK_CALL)
#undef MOCK_CALL
    CALL_trtx_mock_launch,
    CALL_trtx_mock_reserve,
    CALL_execute,
    CALL_COUNT
} mock_call;

const char *mock_call_name(mock_call call);

/* ---- handles: values that name a slot and its generation, never addresses ---- */

typedef enum mock_kind { KIND_MOCK = 1, KIND_CONTEXT, KIND_STREAM, KIND_EVENT, KIND_GRAPH, KIND_EXEC } mock_kind;

/* Slots are never returned to the system, so that a query may look at one without a lock: whoever holds a stale handle
 * sees another tag. Everything is atomic for that reason; all writes happen under the owning instance's lock. */
typedef struct mock_slot {
    _Atomic uint64_t tag;     /* the handle's value while it lives, else 0 */
    _Atomic(void *) mock;     /* the instance that owns this slot's block */
    _Atomic(void *) object;
    _Atomic uint64_t latest;  /* stream: operations enqueued; event: number of the latest recording */
    _Atomic uint64_t done;    /* stream: operations completed; event: highest recording reached */
    _Atomic uint64_t time_ns; /* event: when the latest recording was reached */
    _Atomic int state;        /* event: MOCK_EVENT_*; stream: 1 while it captures */
    _Atomic uint64_t observed;         /* stream: operations that the application knows to be complete */
    _Atomic(struct mock_slot *) place; /* event: the stream of the latest recording, and where in it */
    _Atomic uint64_t position;
    uint32_t generation, index;
    struct mock_slot *next_free;
} mock_slot;

enum { MOCK_EVENT_NEW = 0, MOCK_EVENT_RECORDED = 1, MOCK_EVENT_CAPTURED = 2 };
enum { MOCK_BLOCK_SLOTS = 256, MOCK_BLOCKS = 4096 };

typedef struct mock_block {
    struct mock_block *next;
    mock_slot slots[MOCK_BLOCK_SLOTS];
} mock_block;

/* NULL when no more handles can be made. Under the instance's lock. */
mock_slot *mock_slot_take(trtx_mock *mock, mock_kind kind, void *object);
void mock_slot_close(mock_slot *slot);                    /* the handle is invalid from here on */
void mock_slot_recycle(trtx_mock *mock, mock_slot *slot); /* after close, once nothing writes to it any more */
/* The slot that `handle` names, if it is of this kind and alive; needs no lock. */
mock_slot *mock_slot_find(const void *handle, mock_kind kind);
static inline void *mock_handle(const mock_slot *slot) {
    return (void *)(uintptr_t)atomic_load_explicit(&slot->tag, memory_order_relaxed);
}
void mock_blocks_give_back(trtx_mock *mock);

/* ---- memory ---- */

typedef struct mock_memory mock_memory;

/* Bytes of a block that stay valid, even if the block is freed, until mock_bytes_release. */
typedef struct mock_bytes {
    uint8_t *data;
    void *backing;
} mock_bytes;

/* Reasons in `why` (length MOCK_DETAIL) are for people. */
enum { MOCK_DETAIL = 1024 };

mock_memory *mock_memory_create(const trtx_mock_options *options, unsigned serial);
void mock_memory_destroy(mock_memory *memory);
CUresult mock_device_allocate(mock_memory *memory, int device, size_t bytes, CUdeviceptr *pointer, char *why);
CUresult mock_device_free(mock_memory *memory, CUdeviceptr pointer, char *why);
/* Stream-ordered memory: a block is reserved until its stream allocates it; retire says that a free is enqueued (an error if
 * one is already), reap that a stream reached it. */
void mock_device_reserve(mock_memory *memory, CUdeviceptr pointer, bool reserved);
CUresult mock_device_retire(mock_memory *memory, CUdeviceptr pointer, char *why);
void mock_device_reap(mock_memory *memory, CUdeviceptr pointer);
void mock_device_label(mock_memory *memory, CUdeviceptr pointer, const char *label); /* what the block is for, in texts */
int mock_device_of(const mock_memory *memory, CUdeviceptr pointer); /* ordinal, -1 for no device address */
/* CUDA_SUCCESS if [pointer, pointer + bytes) lies in one live block; bytes 0 is always fine. */
CUresult mock_device_check(mock_memory *memory, CUdeviceptr pointer, size_t bytes, char *why);
CUresult mock_device_bytes(mock_memory *memory, CUdeviceptr pointer, size_t bytes, mock_bytes *view, char *why);
void mock_device_info(mock_memory *memory, int device, size_t *used, size_t *total);
CUresult mock_pinned_allocate(mock_memory *memory, int device, size_t bytes, void **pointer, char *why);
CUresult mock_pinned_free(mock_memory *memory, void *pointer, char *why);
/* *pinned: whether the range lies in a live pinned block. Fails for a range of a freed block or one that leaves its block. */
CUresult mock_pinned_check(mock_memory *memory, const void *pointer, size_t bytes, bool *pinned, char *why);
CUresult mock_pinned_bytes(mock_memory *memory, const void *pointer, size_t bytes, mock_bytes *view, char *why);
void mock_bytes_release(mock_memory *memory, mock_bytes *view);

/* Text that grows: one line per finding. */
typedef struct mock_text {
    char *text;
    size_t length, room, lines;
} mock_text;

void mock_text_add(mock_text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
void mock_text_free(mock_text *text);

/* End of a context: frees its blocks, pinned ones too; what was still there goes to `lost` unless that is NULL. */
void mock_device_reset(mock_memory *memory, int device, mock_text *lost);
void mock_memory_leaks(mock_memory *memory, int device, mock_text *leaks);
void mock_memory_damage(mock_memory *memory, mock_text *damage);
void mock_memory_usage(mock_memory *memory, trtx_mock_usage *usage);

/* ---- faults and time ---- */

typedef struct mock_faults mock_faults;

typedef struct mock_outcome {
    CUresult error; /* 0: the call goes on */
    bool lose_device, lose_process;
    uint64_t delay_ns, number;
} mock_outcome;

mock_faults *mock_faults_create(void);
void mock_faults_destroy(mock_faults *faults);
bool mock_faults_planned(const mock_faults *faults);
/* Count one call on a device (-1: on none); what the plan has for it. Does not wait. */
mock_outcome mock_faults_enter(mock_faults *faults, mock_call call, int device);
uint64_t mock_now_ns(trtx_mock *mock);
/* Host: let time pass. */
void mock_sleep(trtx_mock *mock, uint64_t ns);
bool mock_is_sticky(CUresult code);

/* ---- streams ---- */

typedef struct mock_queue mock_queue;
typedef struct mock_program mock_program;

/* A fake kernel with its userdata; owned by the operation or the program that holds it. */
typedef struct mock_launch {
    uint64_t duration_ns;
    trtx_mock_kernel run;
    void *userdata;
    void (*release)(void *userdata);
    trtx_mock_region *region; /* a reference, or NULL */
    bool uncounted;
} mock_launch;

/* No lock held: calls its release, and gives back its region. */
void mock_launch_drop(const mock_launch *launch);

typedef enum mock_work_kind {
    WORK_H2D, WORK_D2H, WORK_D2D, WORK_SET, WORK_KERNEL, /* these can be nodes of a graph */
    WORK_EVENT, WORK_WAIT, WORK_GRAPH,
    WORK_ALLOCATE, WORK_FREE /* stream-ordered memory; `to` is the block */
} mock_work_kind;

typedef struct mock_work {
    mock_work_kind kind;
    mock_call call;
    CUdeviceptr to, from;
    void *host;
    bool pinned;
    uint8_t value;
    uint8_t *staged;        /* H2D from pageable memory: a copy of the bytes, owned */
    size_t bytes;
    mock_launch launch;
    mock_slot *event;       /* WORK_EVENT */
    uint64_t number;        /* WORK_EVENT: the recording; WORK_WAIT: the sequence of `queue` waited for */
    mock_queue *queue;      /* WORK_WAIT, a reference */
    mock_program *program;  /* WORK_GRAPH, a reference */
} mock_work;

typedef struct mock_operation {
    struct mock_operation *next;
    uint64_t sequence;
    mock_work work;
} mock_operation;

typedef struct mock_capture mock_capture;
typedef struct mock_device mock_device;

/* What a point in a stream's order comes after, by stream: the operations of others that it waited for. */
typedef struct mock_past {
    unsigned count;
    struct {
        mock_slot *place;
        uint64_t sequence;
    } at[MOCK_PAST];
} mock_past;

void mock_past_add(mock_past *past, mock_slot *place, uint64_t sequence);
void mock_past_merge(mock_past *past, const mock_past *other);

/* A kernel that had no result, until it was told. */
typedef struct mock_failure {
    struct mock_failure *next;
    uint64_t sequence; /* of the operation */
    uint64_t taken;    /* of the recording whose event told it first in the stream's order; UINT64_MAX: nobody */
    char why[MOCK_DETAIL];
} mock_failure;

/* One in-order queue and its thread. Referenced by its handle, its thread, recordings, waits and executables; fields are
 * guarded by the instance's lock. */
struct mock_queue {
    mock_device *device;
    mock_slot *slot;
    mock_queue *next; /* of the device */
    unsigned references;
    bool blocking, null_stream, closing, started, sleeping, ended;
    bool stopping; /* by trtx_mock_close: the thread ends, the handle stays */
    bool borrowed; /* a launching thread runs an operation in place of the worker, which waits for it */
    pthread_t thread;
    pthread_cond_t work, moved; /* something to do; something was done */
    unsigned waiters;
    mock_operation *head, *tail;
    uint64_t enqueued, completed;
    uint64_t reached_ns;   /* when the latest event on it was */
    mock_capture *capture; /* while this stream captures */
    unsigned capture_index;
    mock_past past;         /* of the next operation */
    mock_failure *failures; /* the latest first */
    char site[MOCK_SITE];
};

typedef struct mock_event {
    mock_slot *slot;
    mock_device *device;
    bool timing;
    mock_queue *queue; /* of the latest recording, a reference */
    uint64_t sequence;
    mock_past past;
    uint64_t capture_id; /* MOCK_EVENT_CAPTURED: which capture, and how much of each of its streams came before */
    uint32_t clock[MOCK_CAPTURE_STREAMS];
    char site[MOCK_SITE];
} mock_event;

/* What must be freed or called back once no lock is held. */
typedef struct mock_trash {
    mock_program *programs;
    mock_operation *operations;
} mock_trash;

CUresult mock_queue_create(mock_device *device, bool blocking, bool null_stream, mock_queue **queue);
void mock_queue_reference(mock_queue *queue);
void mock_queue_release(mock_queue *queue); /* one reference less; under the lock */
/* Append work; takes over what `work` owns, also on failure. Under the lock; wakes the thread. */
CUresult mock_queue_push(mock_queue *queue, const mock_work *work, mock_trash *trash);
/* Nothing is pending, so that what is enqueued now is reached now. */
static inline bool mock_queue_idle(const mock_queue *queue) {
    return queue->completed == queue->enqueued && !queue->borrowed;
}
/* On an idle queue: the next operation's sequence, and it is done. */
uint64_t mock_queue_pass(mock_queue *queue);
/* On an idle queue: run a replay on the calling thread. Gives up the lock meanwhile; takes over the program's reference. */
void mock_queue_run_here(mock_queue *queue, mock_work *work, mock_trash *trash);
/* Order the next operation of `queue` behind `sequence` of `other`. */
CUresult mock_queue_after(mock_queue *queue, mock_queue *other, uint64_t sequence, mock_trash *trash);
/* The NULL stream and the blocking streams wait for each other; called before work enters `queue`. */
CUresult mock_queue_order_null(mock_queue *queue, mock_trash *trash);
/* Host: block until `sequence` is done; the lock is given up meanwhile. */
void mock_queue_wait(mock_queue *queue, uint64_t sequence);
void mock_queue_close(mock_queue *queue); /* pending work goes on, then the thread ends */
/* Host, under the lock, which is given up meanwhile: join threads that ended, or with `all` wait for every closing one. */
void mock_queues_reap(mock_device *device, bool all);
/* An event's recording is reached. */
void mock_event_reach(mock_queue *queue, mock_slot *slot, uint64_t number, uint64_t now_ns);
/* The application knows that this much of a stream is done. Needs no lock. */
void mock_observe(mock_slot *place, uint64_t sequence);
/* The next operation of `queue` comes after it; mock_queue_order_null was called. Under the lock. */
bool mock_is_ordered(const mock_queue *queue, const mock_slot *place, uint64_t sequence);
/* Under the lock, when operation `sequence` of `queue`, which writes the region, enters it. */
void mock_region_reference(trtx_mock_region *region);
void mock_region_use(trtx_mock_region *region, const mock_queue *queue, uint64_t sequence);
/* Failures of kernels, under the lock. */
void mock_failure_add(mock_queue *queue, uint64_t sequence, const char *why);
void mock_failures_clear(mock_queue *queue, uint64_t sequence);
CUresult mock_work_run(mock_queue *queue, mock_work *work, char *why); /* no lock held */
void mock_device_fail(mock_device *device, CUresult code, const char *detail); /* takes no lock: call under it */
/* Under the lock: this device's context is unusable, or with `process` every one, and none can be had any more. */
void mock_lose(mock_device *device, CUresult code, const char *detail, bool process);
void mock_trash_empty(trtx_mock *mock, mock_trash *trash); /* no lock held */

/* ---- programs, graphs, captures ---- */

/* The nodes of a graph; grows during capture, never changes afterwards, shared by graph, executables and replays. */
struct mock_program {
    mock_program *next; /* in the trash */
    unsigned references;
    bool timed; /* a kernel takes time */
    bool writes; /* a kernel has a region */
    size_t count, room;
    mock_work *nodes;
};

/* The regions that its kernels write are used by operation `sequence`. */
void mock_program_use(const mock_program *program, const mock_queue *queue, uint64_t sequence);
mock_program *mock_program_create(void);
CUresult mock_program_add(mock_program *program, const mock_work *node); /* takes over only on success */
void mock_program_release(mock_program *program, mock_trash *trash);    /* under the lock */
void mock_program_free(mock_program *program);                          /* no lock held */

typedef struct mock_graph {
    mock_slot *slot;
    mock_device *device;
    mock_program *program;
    char site[MOCK_SITE];
} mock_graph;

typedef struct mock_exec {
    mock_slot *slot;
    mock_device *device;
    mock_program *program;
    mock_queue *queue; /* of the last launch, a reference, or NULL */
    uint64_t sequence;
    char site[MOCK_SITE];
} mock_exec;

struct mock_capture {
    mock_capture *next; /* of the instance */
    uint64_t id;
    int mode;
    bool invalidated;
    pthread_t thread;
    mock_queue *origin;
    mock_program *program;
    unsigned streams;
    mock_queue *members[MOCK_CAPTURE_STREAMS];
    /* clocks[i][j]: how many operations of stream j come before the next one of stream i */
    uint32_t clocks[MOCK_CAPTURE_STREAMS][MOCK_CAPTURE_STREAMS];
};

CUresult mock_capture_node(mock_queue *queue, const mock_work *node);
void mock_capture_record(mock_queue *queue, mock_event *event);
/* An event of a capture is waited for by `queue`, which joins the capture if it does not capture yet. */
CUresult mock_capture_wait(mock_queue *queue, mock_event *event);
CUresult mock_capture_invalidate(mock_capture *capture, CUresult code);
mock_capture *mock_capture_find(trtx_mock *mock, uint64_t id);
/* A potentially unsafe call: 900 and an invalidated capture if one that is under way forbids it to this thread. */
CUresult mock_capture_guard(trtx_mock *mock);
/* The NULL stream is used: 906 if a blocking stream of the device captures. */
CUresult mock_capture_implicit(mock_device *device);
/* The stream goes away, or its context ends. */
void mock_capture_abandon(mock_queue *queue, mock_trash *trash);
void mock_graph_drop(trtx_mock *mock, mock_graph *graph, mock_trash *trash); /* the handle and its object; under the lock */
void mock_exec_drop(trtx_mock *mock, mock_exec *exec, mock_trash *trash);
void mock_event_drop(trtx_mock *mock, mock_event *event);

/* ---- devices and instances ---- */

struct mock_device {
    trtx_mock *mock;
    int ordinal;
    mock_slot *slot;          /* of the primary context */
    _Atomic int retained;
    _Atomic CUresult fault;   /* the first device-side failure since the context was made */
    char fault_detail[MOCK_DETAIL];
    mock_queue *queues;       /* all whose thread may still run, destroyed streams included */
    mock_queue *null_stream;  /* made at first use */
};

struct trtx_mock {
    pthread_mutex_t lock;
    mock_slot *slot;
    mock_block *blocks;
    mock_slot *free_slots;
    unsigned serial;
    trtx_mock_options options;
    _Atomic int initialized;
    CUresult broken; /* no context can be retained any more, under the lock */
    mock_memory *memory;
    mock_faults *faults;
    mock_operation *free_operations;
    mock_capture *captures;
    _Atomic int capturing; /* number of captures */
    uint64_t next_capture;
    size_t streams, events, graphs, execs;
    mock_text lost;   /* what contexts left open when they ended */
    mock_text damage; /* beside that of the memory */
    trtx_mock_region *regions;
    _Atomic int failures; /* of kernels, in all streams */
    char told[MOCK_DETAIL]; /* the latest of them that an event told */
    trtx_mock_time *time; /* NULL: real time */
    trtx_mock_clock clock;
    int device_count;
    mock_device *devices;
};

/* What a call works with, filled by mock_enter. */
typedef struct mock_scope {
    mock_call call;
    trtx_mock *mock;
    mock_device *device; /* whose context is current; NULL for calls that need none */
    CUresult sticky;     /* for ENTER_CLEANUP: what the call returns once it has cleaned up */
} mock_scope;

enum {
    ENTER_CONTEXT = 1,
    ENTER_INITIALIZED = 2,
    ENTER_UNPERMITTED = 4, /* forbidden while a capture is under way */
    ENTER_CLEANUP = 8,     /* a faulted context does not keep it from its work, but is still what it returns */
    ENTER_SAFE = ENTER_CONTEXT | ENTER_INITIALIZED,
    ENTER_UNSAFE = ENTER_SAFE | ENTER_UNPERMITTED
};

/* What every call passes through: counting and delays, initialization, current context, sticky errors, faults, capture. */
CUresult mock_enter(mock_scope *scope, mock_call call, int needs);
/* For calls that need no current context: the instance is the handle's, unless a context of another one is current. */
CUresult mock_enter_with(mock_scope *scope, mock_call call, const void *handle, mock_kind kind, int needs);
CUresult mock_failure_of_event(const mock_scope *scope, const mock_event *event);
CUresult mock_failure_of_stream(const mock_scope *scope, mock_queue *queue, bool clear);
CUresult mock_healthy(mock_scope *scope); /* the sticky error of the current context, or 0 */
/* Keep a reason for trtx_mock_detail and return `code`. */
CUresult mock_fail(const mock_scope *scope, CUresult code, const char *format, ...) __attribute__((format(printf, 3, 4)));
void mock_copy_site(char *site); /* the thread's site (trtx_mock_site) into MOCK_SITE bytes */
mock_device *mock_current_device(void);
void mock_forget_contexts(const trtx_mock *mock); /* those on this thread's stack */
trtx_mock *mock_selected(void);
/* This thread's stack, without a call. */
CUresult mock_push_context(CUcontext context);
void mock_pop_context(void);
CUcontext mock_top_context(void);
/* Handles of the current instance, under its lock; NULL with *code set. `stream` may be NULL or CU_STREAM_LEGACY. */
mock_queue *mock_stream_of(const mock_scope *scope, CUstream stream, CUresult *code);
mock_event *mock_event_of(const mock_scope *scope, CUevent event, CUresult *code);
/* As mock_stream_of, and the stream must belong to the current context. */
mock_queue *mock_own_stream_of(const mock_scope *scope, CUstream stream, CUresult *code);
void mock_device_end(mock_device *device, mock_text *lost); /* end of the primary context; no lock held */

static inline void mock_lock(trtx_mock *mock) { pthread_mutex_lock(&mock->lock); }
static inline void mock_unlock(trtx_mock *mock) { pthread_mutex_unlock(&mock->lock); }

/* Every function of the table. */
#define MOCK_DECLARE(name, symbol, parameters) CUresult mock_##name parameters;
TRTX_CUDA_FUNCTIONS(MOCK_DECLARE)
#undef MOCK_DECLARE

#endif
