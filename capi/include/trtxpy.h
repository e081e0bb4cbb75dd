/* trtxpy: run TensorRT through trtx_py from C, or from anything that can load a shared library.
 *
 * Python is the control plane (build, load, choose, capture). A request for a shape that was captured never takes Python's
 * interpreter lock. In a process that has no Python the library finds and starts one; inside a Python process it uses
 * the interpreter that is there. docs/reference/c-abi.md and docs/how-to/call-from-c.md say more.
 *
 * Ownership. What a create function returns is the caller's until the matching destroy. An object with open children (a
 *   context's graphs, tensors and queues; what a request in flight uses) is not destroyed: TRTXPY_BORROWED, and nothing
 *   happened. Destroying NULL does nothing and succeeds. A handle that was destroyed, or never was one, gives
 *   TRTXPY_INVALID_HANDLE. What the caller passes in is copied before a function returns, unless it says otherwise.
 * Threads. Every function may be called from any thread, at any time, whether or not the thread holds Python's lock. The
 *   CUDA context that was current in the calling thread is current again when a function returns.
 * Errors. Functions return a status; trtxpy_last_error() has the text for the calling thread. On failure nothing was
 *   changed, out parameters of handle type are NULL, other out parameters are as they were unless a function says otherwise.
 * Callbacks run on a thread of the library's, one at a time, without Python's lock. All functions may be called from one, but
 *   those that wait for a request return TRTXPY_IN_CALLBACK.
 * Fork. In a forked child every function that could touch Python or the GPU returns TRTXPY_FORKED. fork and exec is fine.
 * Structs that the caller fills begin with struct_size, set by their INIT macro; they only grow at the end.
 */
#ifndef TRTXPY_H
#define TRTXPY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* major: callers must be rebuilt when it changes; minor: something was added. */
#define TRTXPY_ABI_MAJOR 1
#define TRTXPY_ABI_MINOR 0

#if defined(TRTXPY_BUILDING)
#define TRTXPY_API __attribute__((visibility("default")))
#else
#define TRTXPY_API
#endif

/* ---- statuses ---- */

typedef int32_t trtxpy_status;
enum {
    TRTXPY_OK = 0,
    TRTXPY_INVALID_ARGUMENT = 1, /* NULL where something is needed, a size that overflows, an option that does not exist */
    TRTXPY_INVALID_HANDLE = 2,   /* destroyed, of another kind, or never a handle */
    TRTXPY_BORROWED = 3,         /* something open still uses it; nothing happened */
    TRTXPY_NOT_FOUND = 4,        /* there is no tensor or file of that name */
    TRTXPY_SHAPE = 5,            /* a shape does not fit the graph, its profiles or the tensor */
    TRTXPY_DTYPE = 6,            /* a tensor has another data type than the graph expects */
    TRTXPY_RANGE = 7,            /* a value does not fit the type that it must be converted to */
    TRTXPY_BUFFER_SIZE = 8,      /* a buffer has another size than the tensor */
    TRTXPY_OUT_OF_MEMORY = 9,    /* host, pinned or device memory, or the context's budget for it */
    TRTXPY_UNAVAILABLE = 10,     /* no TensorRT or GPU here can do this; the text says what to install */
    TRTXPY_PYTHON = 11,          /* Python was not found, could not be started, or lacks trtx_py */
    TRTXPY_PARSE = 12,           /* the model is damaged, or has what this TensorRT cannot do */
    TRTXPY_BUILD = 13,           /* TensorRT could not build it */
    TRTXPY_PLAN = 14,            /* the plan is damaged or carries code for the CPU */
    TRTXPY_VERSION_MISMATCH = 15,/* the plan is for another TensorRT or GPU; a struct_size that this library cannot know; or the
                                  * trtx_py that Python imports is of another version than the library */
    TRTXPY_EXECUTION = 16,       /* the request was accepted and failed */
    TRTXPY_CUDA = 17,            /* a call of the CUDA driver failed */
    TRTXPY_CANCELLED = 18,
    TRTXPY_TIMEOUT = 19,
    TRTXPY_BUSY = 20,            /* in use by a request in flight or another call */
    TRTXPY_CLOSED = 21,          /* the library was shut down */
    TRTXPY_IN_CALLBACK = 22,     /* this call would wait, and a callback must not */
    TRTXPY_FORKED = 23,          /* this process was forked from the one that started the library */
    TRTXPY_NOT_READY = 24,       /* still in flight */
    TRTXPY_UNSUPPORTED = 25,     /* this kind of graph or tensor cannot do that */
    TRTXPY_INTERNAL = 26         /* a fault of the library; please report it with the text */
};

/* "TRTXPY_SHAPE", say; "TRTXPY_UNKNOWN" for a number that is none. Never NULL; valid for ever. */
TRTXPY_API const char *trtxpy_status_name(trtxpy_status status);

/* What went wrong in the last call by this thread that returned a status: UTF-8, "" after success. Valid until this thread
 * calls another function that returns a status. The errors of requests come with their completion. */
TRTXPY_API const char *trtxpy_last_error(void);
TRTXPY_API trtxpy_status trtxpy_last_status(void);

/* ---- the library ---- */

/* (major << 16) | minor of the library that was loaded. Callers built with another major must not go on. */
TRTXPY_API uint32_t trtxpy_abi_version(void);
/* The version of trtx_py that the library was built with, "0.1.0" say. */
TRTXPY_API const char *trtxpy_version(void);

typedef struct trtxpy_init_options {
    size_t struct_size;
    /* Where Python is, in a process that has none: an interpreter, a virtual environment, an installation's prefix or a
     * libpython. NULL: TRTXPY_PYTHON, else VIRTUAL_ENV, else the environment that the library is installed in, else python3
     * on PATH. */
    const char *python;
} trtxpy_init_options;
#define TRTXPY_INIT_OPTIONS_INIT {sizeof(trtxpy_init_options), NULL}

/* Start the library: find or start Python, import trtx_py. Called by trtxpy_context_create where nobody did; calling it again
 * does nothing. options: NULL for defaults. Takes a second or so the first time. */
TRTXPY_API trtxpy_status trtxpy_init(const trtxpy_init_options *options);

/* TRTXPY_BORROWED while contexts are open. Ends the library's threads, and the interpreter if the library started it: then
 * the library cannot be started again in this process (TRTXPY_CLOSED). At exit this happens by itself, whatever is open: requests
 * that run are awaited, 10 s at most, also what other threads dispatch; those that have not begun complete with TRTXPY_CANCELLED.
 * Call it while no other thread calls the library. */
TRTXPY_API trtxpy_status trtxpy_shutdown(void);

/* How many contexts, graphs, tensors, queues, requests and result sets are open. */
TRTXPY_API trtxpy_status trtxpy_live_objects(size_t *count);

/* ---- types ---- */

/* The WebNN types are 0 to 9. The 4-bit types are packed two to a byte, the first in the low half; an odd number of elements
 * leaves the last high half 0. */
typedef int32_t trtxpy_dtype;
enum {
    TRTXPY_FLOAT32 = 0,
    TRTXPY_FLOAT16 = 1,
    TRTXPY_INT32 = 2,
    TRTXPY_UINT32 = 3,
    TRTXPY_INT64 = 4,
    TRTXPY_UINT64 = 5,
    TRTXPY_INT8 = 6,
    TRTXPY_UINT8 = 7,
    TRTXPY_INT4 = 8,
    TRTXPY_UINT4 = 9,
    TRTXPY_BOOL = 16, /* one byte, 0 or 1 */
    TRTXPY_BFLOAT16 = 17,
    TRTXPY_FLOAT8 = 18 /* E4M3 */
};

/* Name of a type, "float32" say; NULL if there is none of that number. */
TRTXPY_API const char *trtxpy_dtype_name(trtxpy_dtype dtype);

#define TRTXPY_MAX_RANK 8

/* rank 0 is a scalar: one element. In a graph's tensors -1 stands for an axis that is not fixed. */
typedef struct trtxpy_shape {
    int32_t rank;
    int32_t reserved; /* 0 */
    int64_t dims[TRTXPY_MAX_RANK];
} trtxpy_shape;

/* Bytes of a packed tensor of this type and shape. TRTXPY_INVALID_ARGUMENT for axes below 0, more axes than there can be, or
 * a size that does not fit. */
TRTXPY_API trtxpy_status trtxpy_dtype_bytes(trtxpy_dtype dtype, const trtxpy_shape *shape, size_t *bytes);

/* Handles. Not addresses: only the library can look behind them. */
typedef struct trtxpy_context_handle *trtxpy_context;
typedef struct trtxpy_graph_handle *trtxpy_graph;
typedef struct trtxpy_tensor_handle *trtxpy_tensor;
typedef struct trtxpy_request_handle *trtxpy_request;
typedef struct trtxpy_queue_handle *trtxpy_queue;
typedef struct trtxpy_results_handle *trtxpy_results;

/* ---- contexts: a device and a TensorRT ---- */

/* How results are waited for; see EngineOptions.completion. */
typedef int32_t trtxpy_completion_mode;
enum {
    TRTXPY_LATENCY = 0,  /* spin up to 2 ms */
    TRTXPY_BALANCED = 1, /* sleep until shortly before the result is due, then spin for 50 us */
    TRTXPY_EFFICIENT = 2 /* sleep */
};

typedef struct trtxpy_context_options {
    size_t struct_size;
    const char *backend;       /* "mock", "mock:instant" (computes nothing), "tensorrt", ...; NULL: TRTX_BACKEND, else the best */
    int32_t device;            /* number of the GPU */
    trtxpy_completion_mode completion;
    uint64_t max_device_bytes; /* budget for device memory; 0: none */
    const char *lean_library;  /* as Runtime(lean_library=...); NULL: TRTX_LEAN_LIBRARY */
    uint32_t max_cached_models;/* how many engines trtxpy_run keeps; 0: 8 */
    uint32_t allow_host_code;  /* not 0: load plans that carry code for the CPU */
} trtxpy_context_options;
#define TRTXPY_CONTEXT_OPTIONS_INIT {sizeof(trtxpy_context_options), NULL, 0, TRTXPY_LATENCY, 0, NULL, 0, 0}

TRTXPY_API trtxpy_status trtxpy_context_create(const trtxpy_context_options *options, trtxpy_context *context);
TRTXPY_API trtxpy_status trtxpy_context_destroy(trtxpy_context context);

/* Pointers are valid until the context is destroyed. */
typedef struct trtxpy_context_info {
    size_t struct_size;
    const char *backend;            /* "mock", say */
    const char *tensorrt_version;   /* that plans must fit */
    const char *device_name;
    const char *compute_capability; /* "9.0" */
    uint64_t device_bytes;          /* of memory in all */
    int32_t is_mock;
    int32_t device;
} trtxpy_context_info;
#define TRTXPY_CONTEXT_INFO_INIT {sizeof(trtxpy_context_info), NULL, NULL, NULL, NULL, 0, 0, 0}
TRTXPY_API trtxpy_status trtxpy_context_describe(trtxpy_context context, trtxpy_context_info *info);

typedef struct trtxpy_context_statistics {
    size_t struct_size;
    uint64_t device_bytes, device_peak_bytes, device_allocations; /* what trtx_py allocated; allocations are those open */
    uint64_t pinned_bytes, pinned_peak_bytes, pinned_allocations;
    uint64_t graphs, tensors, queues, requests;                   /* open */
    uint64_t cached_models, cache_hits, cache_misses;             /* of trtxpy_run */
} trtxpy_context_statistics;
#define TRTXPY_CONTEXT_STATISTICS_INIT {sizeof(trtxpy_context_statistics), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
TRTXPY_API trtxpy_status trtxpy_context_get_statistics(trtxpy_context context, trtxpy_context_statistics *statistics);

/* ---- graphs: a model, built and loaded ---- */

typedef struct trtxpy_profile_range { /* of one input with axes that are not fixed */
    const char *name;
    trtxpy_shape min, opt, max;
} trtxpy_profile_range;

typedef struct trtxpy_graph_options {
    size_t struct_size;
    const trtxpy_profile_range *ranges; /* one profile; NULL: the first axis 1, 8, 32 and others 1, 128, 512. Not for plans */
    size_t range_count;
    const char *precision;      /* as BuilderConfig.precision; NULL: as the model says */
    int32_t optimization_level; /* 0 to 5; -1: TensorRT's own */
    uint32_t lanes;             /* streams with contexts of their own; 0: 1 */
    uint32_t slots;             /* requests in flight on each lane; 0: the default */
    uint32_t max_graphs;        /* shapes kept captured; 0: the default */
    uint32_t no_cuda_graphs;    /* not 0: capture nothing */
    uint32_t reserved;          /* 0 */
} trtxpy_graph_options;
#define TRTXPY_GRAPH_OPTIONS_INIT {sizeof(trtxpy_graph_options), NULL, 0, NULL, -1, 0, 0, 0, 0, 0}

/* Build and load an ONNX model. weights: NULL, or what tensors with external data refer to, whatever they call the file.
 * May take minutes with TensorRT. Types that TensorRT has not (uint32, uint64, int4, uint4, and arithmetic of int8 and uint8)
 * are computed in wider ones: a result that does not fit its type fails with TRTXPY_RANGE, it does not wrap. Numbers that stay
 * inside the graph are not checked, and do not wrap either: a graph that relies on 250 + 10 being 4 gets 260 there.
 * The ranges of a shape tensor (an input that TensorRT reads on the host) hold its values. */
TRTXPY_API trtxpy_status trtxpy_graph_from_onnx(trtxpy_context context, const void *model, size_t model_bytes,
                                                const void *weights, size_t weights_bytes,
                                                const trtxpy_graph_options *options, trtxpy_graph *graph);
/* Load a plan: what trtx_py saved, or TensorRT's own. */
TRTXPY_API trtxpy_status trtxpy_graph_from_plan(trtxpy_context context, const void *plan, size_t plan_bytes,
                                                const trtxpy_graph_options *options, trtxpy_graph *graph);
/* An ONNX model, its external data beside it, or a plan: told by the content. */
TRTXPY_API trtxpy_status trtxpy_graph_from_file(trtxpy_context context, const char *path, const trtxpy_graph_options *options,
                                                trtxpy_graph *graph);
/* TRTXPY_BORROWED while requests of it are in flight, or tensors of trtxpy_graph_create_tensors are open; then, and with
 * TRTXPY_INVALID_HANDLE or TRTXPY_FORKED, nothing happened. With any other failure the graph is gone all the same: Python could not
 * close something of it, which the text names and which may stay allocated until the process ends. The handle must not be used
 * again. trtxpy_context_destroy does likewise. */
TRTXPY_API trtxpy_status trtxpy_graph_destroy(trtxpy_graph graph);

/* The plan that was built or loaded, for trtxpy_graph_from_plan. *bytes: in, the room in `plan`; out, what is needed.
 * plan NULL: only asks for the size. TRTXPY_BUFFER_SIZE if the room is too small (*bytes is written). */
TRTXPY_API trtxpy_status trtxpy_graph_get_plan(trtxpy_graph graph, void *plan, size_t *bytes);

typedef int32_t trtxpy_direction;
enum { TRTXPY_INPUT = 0, TRTXPY_OUTPUT = 1 };

typedef struct trtxpy_tensor_info {
    size_t struct_size;
    const char *name; /* valid until the graph is destroyed */
    trtxpy_dtype dtype;
    trtxpy_dtype engine_dtype; /* what it is computed in */
    trtxpy_shape shape;        /* -1: not fixed */
} trtxpy_tensor_info;
#define TRTXPY_TENSOR_INFO_INIT {sizeof(trtxpy_tensor_info), NULL, 0, 0, {0, 0, {0, 0, 0, 0, 0, 0, 0, 0}}}

TRTXPY_API trtxpy_status trtxpy_graph_tensor_count(trtxpy_graph graph, trtxpy_direction direction, size_t *count);
TRTXPY_API trtxpy_status trtxpy_graph_tensor_info(trtxpy_graph graph, trtxpy_direction direction, size_t index,
                                                  trtxpy_tensor_info *info);

typedef struct trtxpy_named_shape {
    const char *name;
    trtxpy_shape shape;
} trtxpy_named_shape;

/* Get ready for requests of these input shapes: contexts, memory, captured graphs. Requests do it by themselves at first use.
 * TRTXPY_UNSUPPORTED if the shape cannot be captured (requests of it work, and take Python's lock). */
TRTXPY_API trtxpy_status trtxpy_graph_prepare(trtxpy_graph graph, const trtxpy_named_shape *inputs, size_t input_count);

/* The outputs' shapes for these input shapes, in the order of the graph's outputs; room: of `shapes`. Prepares.
 * TRTXPY_UNSUPPORTED if they depend on data. */
TRTXPY_API trtxpy_status trtxpy_graph_output_shapes(trtxpy_graph graph, const trtxpy_named_shape *inputs, size_t input_count,
                                                    trtxpy_shape *shapes, size_t room);

typedef struct trtxpy_graph_statistics {
    size_t struct_size;
    uint64_t submitted, completed, failed, cancelled; /* requests, of any kind; cancelled ones are not in failed */
    uint64_t captured, uncaptured;                    /* of the submitted: through a captured graph; through Python */
    uint64_t zero_copy;                               /* of the captured: on tensors of trtxpy_graph_create_tensors */
    uint64_t in_flight, queued;
    uint64_t shapes, slots;                           /* captured shapes, and slots that the library has for them */
} trtxpy_graph_statistics;
#define TRTXPY_GRAPH_STATISTICS_INIT {sizeof(trtxpy_graph_statistics), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
TRTXPY_API trtxpy_status trtxpy_graph_get_statistics(trtxpy_graph graph, trtxpy_graph_statistics *statistics);

/* ---- tensors ---- */

typedef int32_t trtxpy_location;
enum {
    TRTXPY_HOST = 0,   /* pinned memory of the library's */
    TRTXPY_DEVICE = 1, /* memory of the context's GPU */
    TRTXPY_FOREIGN_HOST = 2, /* somebody else's, through DLPack; not for trtxpy_tensor_create */
    TRTXPY_FOREIGN_DEVICE = 3
};

typedef struct trtxpy_tensor_desc {
    size_t struct_size;
    trtxpy_dtype dtype;
    trtxpy_location location;
    trtxpy_shape shape;
} trtxpy_tensor_desc;
#define TRTXPY_TENSOR_DESC_INIT {sizeof(trtxpy_tensor_desc), TRTXPY_FLOAT32, TRTXPY_HOST, {0, 0, {0, 0, 0, 0, 0, 0, 0, 0}}}

/* Filled with zeros. */
TRTXPY_API trtxpy_status trtxpy_tensor_create(trtxpy_context context, const trtxpy_tensor_desc *desc, trtxpy_tensor *tensor);
/* TRTXPY_BORROWED while a request in flight uses it, or an exported DLPack tensor does. */
TRTXPY_API trtxpy_status trtxpy_tensor_destroy(trtxpy_tensor tensor);

/* Another shape, same type. Keeps the memory where it is large enough; the content is undefined afterwards where the number of
 * bytes changed. TRTXPY_BUSY in flight, TRTXPY_UNSUPPORTED for foreign memory and tensors of trtxpy_graph_create_tensors. */
TRTXPY_API trtxpy_status trtxpy_tensor_resize(trtxpy_tensor tensor, const trtxpy_shape *shape);
/* As it is at this moment: never TRTXPY_BUSY, and no reason for another call or request to be. A request in flight may resize its
 * outputs. */
TRTXPY_API trtxpy_status trtxpy_tensor_describe(trtxpy_tensor tensor, trtxpy_tensor_desc *desc);
TRTXPY_API trtxpy_status trtxpy_tensor_bytes(trtxpy_tensor tensor, size_t *bytes);

/* Whole content in, whole content out; `bytes` must be the tensor's. To write is TRTXPY_BUSY while a request in flight or another
 * call uses the tensor; to read, while one writes it. */
TRTXPY_API trtxpy_status trtxpy_tensor_write(trtxpy_tensor tensor, const void *data, size_t bytes);
TRTXPY_API trtxpy_status trtxpy_tensor_read(trtxpy_tensor tensor, void *data, size_t bytes);

/* The memory itself, host or device; NULL for no bytes. Valid until the tensor is resized or destroyed. The caller keeps away
 * from it while a request in flight uses the tensor. TRTXPY_BUSY while a request in flight or another call writes a tensor that
 * can be resized. Keeps no other call or request from the tensor. */
TRTXPY_API trtxpy_status trtxpy_tensor_data(trtxpy_tensor tensor, void **data);

/* Tensors in the pinned memory that one captured graph reads and writes: a dispatch with just these copies nothing on the
 * host. One for each input and output of the graph, in its order; every input needs a shape. Types are the engine's own:
 * TRTXPY_UNSUPPORTED where they differ from the graph's, or the shape cannot be captured.
 * Takes one of the graph's slots until all of them are destroyed; TRTXPY_BUSY if none is left. */
TRTXPY_API trtxpy_status trtxpy_graph_create_tensors(trtxpy_graph graph, const trtxpy_named_shape *shapes, size_t shape_count,
                                                     trtxpy_tensor *inputs, size_t input_count, trtxpy_tensor *outputs,
                                                     size_t output_count);

/* DLPack 0.x and 1.x's unversioned struct; include dlpack.h for its definition. */
struct DLManagedTensor;
/* Takes `managed` over on success: its deleter is called when the tensor is destroyed. Memory of the CPU, pinned memory, or
 * memory of the context's GPU whose work is done; C-contiguous. The producer's stream must have been synchronized. */
TRTXPY_API trtxpy_status trtxpy_tensor_from_dlpack(trtxpy_context context, struct DLManagedTensor *managed,
                                                   trtxpy_tensor *tensor);
/* The tensor's memory, without a copy; the caller calls its deleter, from any thread, until when the tensor is borrowed.
 * TRTXPY_UNSUPPORTED for the 4-bit types and TRTXPY_FLOAT8, which this struct's DLPack has not; TRTXPY_BUSY while a request in
 * flight or another call writes the tensor. */
TRTXPY_API trtxpy_status trtxpy_tensor_to_dlpack(trtxpy_tensor tensor, struct DLManagedTensor **managed);

/* ---- requests ---- */

typedef struct trtxpy_binding {
    const char *name;
    trtxpy_tensor tensor;
} trtxpy_binding;

typedef struct trtxpy_dispatch_options {
    size_t struct_size;
    uint64_t timeout_ns;     /* 0: for ever. At the timeout the request is cancelled: TRTXPY_TIMEOUT */
    uint32_t resize_outputs; /* not 0: outputs of another shape are resized; else they are TRTXPY_SHAPE */
    uint32_t reserved;       /* 0 */
} trtxpy_dispatch_options;
#define TRTXPY_DISPATCH_OPTIONS_INIT {sizeof(trtxpy_dispatch_options), 0, 0, 0}

/* Run the graph and wait. Every input and every output of it, by name, in any order. A tensor may be an input more than once and
 * of several requests at once; an output only once, and of nothing else in flight (TRTXPY_BUSY). Tensors of foreign or
 * device memory, types that are converted, and shapes that were not captured work as well; device tensors and shapes that cannot
 * be captured take Python's lock. After TRTXPY_TIMEOUT the tensors stay in use until the GPU is done. TRTXPY_CLOSED while the
 * library ends. options: NULL for defaults. On failure the outputs' content is undefined. */
TRTXPY_API trtxpy_status trtxpy_dispatch(trtxpy_graph graph, const trtxpy_binding *inputs, size_t input_count,
                                         const trtxpy_binding *outputs, size_t output_count,
                                         const trtxpy_dispatch_options *options);

/* What a request came to. Times are of CLOCK_MONOTONIC; 0 where it did not get that far. */
typedef struct trtxpy_result {
    size_t struct_size;
    uint64_t token; /* as submitted */
    uint64_t submitted_ns, launched_ns, completed_ns;
    int32_t captured; /* not 0: through a captured graph */
    int32_t reserved;
} trtxpy_result;

/* message: NULL for success. Everything is valid during the call only. */
typedef void (*trtxpy_callback)(trtxpy_status status, const char *message, const trtxpy_result *result, void *userdata);

typedef struct trtxpy_submit_options {
    size_t struct_size;
    trtxpy_callback callback; /* exactly once for every request that was accepted; NULL: none */
    void *userdata;
    trtxpy_queue queue;       /* NULL, or gets the completion; not both */
    uint64_t token;           /* the caller's, handed back */
    uint32_t resize_outputs;
    uint32_t reserved;        /* 0 */
} trtxpy_submit_options;
#define TRTXPY_SUBMIT_OPTIONS_INIT {sizeof(trtxpy_submit_options), NULL, NULL, NULL, 0, 0, 0}

/* As dispatch, without waiting. request: NULL, or gets a handle to wait for or cancel it, to be destroyed at any time (the
 * request goes on); NULL after success if there is no memory for a handle. The completion may come before this returns, and before
 * *request is written: a callback must not read it, and finds what it needs by `token` or `userdata`. Until the completion the
 * tensors are in use. A failure that is returned makes no completion. TRTXPY_BUSY if a tensor is in use in a way that excludes
 * this one; TRTXPY_CLOSED while the library ends. */
TRTXPY_API trtxpy_status trtxpy_submit(trtxpy_graph graph, const trtxpy_binding *inputs, size_t input_count,
                                       const trtxpy_binding *outputs, size_t output_count,
                                       const trtxpy_submit_options *options, trtxpy_request *request);

/* Not launched yet: it never will be. Launched: its result is dropped, and the completion comes when the GPU is done with the
 * tensors. Either way it completes with TRTXPY_CANCELLED. TRTXPY_NOT_FOUND if it is complete already. */
TRTXPY_API trtxpy_status trtxpy_request_cancel(trtxpy_request request);
/* Wait until it is complete (its callback may still be running). timeout_ns 0 only looks: TRTXPY_NOT_READY; UINT64_MAX waits for
 * ever. TRTXPY_TIMEOUT: nothing happened to the request. *outcome: the request's own status, whose text is then this
 * thread's last error. */
TRTXPY_API trtxpy_status trtxpy_request_wait(trtxpy_request request, uint64_t timeout_ns, trtxpy_status *outcome);
TRTXPY_API trtxpy_status trtxpy_request_destroy(trtxpy_request request);

/* Completions for callers with an event loop of their own. Its layout, and that of trtxpy_result in it, is the same for a whole
 * major version. */
typedef struct trtxpy_completion {
    trtxpy_status status;
    int32_t reserved;
    trtxpy_result result;
    char message[512]; /* "" for success; cut at a character's end */
} trtxpy_completion;

TRTXPY_API trtxpy_status trtxpy_queue_create(trtxpy_context context, trtxpy_queue *queue);
/* TRTXPY_BORROWED while requests in flight have it. Completions that nobody took are dropped. */
TRTXPY_API trtxpy_status trtxpy_queue_destroy(trtxpy_queue queue);
/* Readable while there is something to take; level-triggered. The queue's own: only poll it. */
TRTXPY_API trtxpy_status trtxpy_queue_fd(trtxpy_queue queue, int *fd);
/* Up to `room` completions, oldest first. Never waits; *taken may be 0. */
TRTXPY_API trtxpy_status trtxpy_queue_take(trtxpy_queue queue, trtxpy_completion *completions, size_t room, size_t *taken);

/* ---- one call for everything, for executors that hold nothing ---- */

typedef struct trtxpy_array {
    size_t struct_size;
    const char *name;
    trtxpy_dtype dtype;
    int32_t reserved;
    trtxpy_shape shape;
    const void *data;
    size_t bytes;
} trtxpy_array;
#define TRTXPY_ARRAY_INIT {sizeof(trtxpy_array), NULL, 0, 0, {0, 0, {0, 0, 0, 0, 0, 0, 0, 0}}, NULL, 0}

/* Run an ONNX model, or a plan, on these inputs. The engine is kept by content (and options): a second call does not build.
 * Inputs are an array of trtxpy_array, whose first element's struct_size counts for all. */
TRTXPY_API trtxpy_status trtxpy_run(trtxpy_context context, const void *model, size_t model_bytes, const void *weights,
                                    size_t weights_bytes, const trtxpy_array *inputs, size_t input_count,
                                    const trtxpy_graph_options *options, trtxpy_results *results);
/* The same on zeros: at the model's own shapes, 1 for every axis that is not fixed. */
TRTXPY_API trtxpy_status trtxpy_run_zeroed(trtxpy_context context, const void *model, size_t model_bytes, const void *weights,
                                           size_t weights_bytes, const trtxpy_graph_options *options,
                                           trtxpy_results *results);
TRTXPY_API trtxpy_status trtxpy_results_count(trtxpy_results results, size_t *count);
/* Each output with its own type; pointers are valid until the results are destroyed. */
TRTXPY_API trtxpy_status trtxpy_results_get(trtxpy_results results, size_t index, trtxpy_array *array);
TRTXPY_API trtxpy_status trtxpy_results_destroy(trtxpy_results results);

#ifdef __cplusplus
}
#endif
#endif
