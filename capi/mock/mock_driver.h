/* A CUDA driver for machines without a GPU: in-order streams on threads, checked memory, graphs, planned faults.
 *
 * A driver is an instance; several may live in one process, and every handle belongs to one of them (a handle of another
 * instance is CUDA_ERROR_INVALID_HANDLE). trtx_mock_api() gives the table that the data plane uses; since the driver API
 * has no argument for an instance, the table's functions find it through the handle or the thread's current context, and
 * cuInit/cuDeviceGet... through the instance that trtx_mock_select() chose for this thread.
 */
#ifndef TRTX_MOCK_DRIVER_H
#define TRTX_MOCK_DRIVER_H

#include "../src/cuda_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct trtx_mock trtx_mock;

/* A virtual time line, which several instances may share. Thread-safe. */
typedef struct trtx_mock_time trtx_mock_time;
trtx_mock_time *trtx_mock_time_create(uint64_t start_ns); /* NULL: out of memory */
void trtx_mock_time_release(trtx_mock_time *time);
uint64_t trtx_mock_time_now(const trtx_mock_time *time);
void trtx_mock_time_advance(trtx_mock_time *time, uint64_t ns);

/* A clock of the application's own. Its functions are called on any thread and under no lock of the mock. */
typedef struct trtx_mock_clock {
    void *userdata;
    uint64_t (*now)(void *userdata); /* NULL: the machine's, and `sleep` is not used either */
    void (*sleep)(void *userdata, uint64_t ns);
    /* Where set: called around the machine's delays of the threads that make calls, to give up an interpreter's lock. */
    void *(*unlock)(void);
    void (*relock)(void *token);
} trtx_mock_clock;

typedef struct trtx_mock_options {
    size_t struct_size; /* sizeof(trtx_mock_options): grows at the end */
    size_t memory_bytes; /* device memory of each device */
    int devices;
    int compute_capability_major, compute_capability_minor;
    int virtual_time; /* 1: delays advance the clock and do not wait */
    /* 1: a graph whose kernels take no time runs inside cuGraphLaunch if its stream is idle and no fault is planned: an
     * infinitely fast GPU, for measuring what is above the driver. Waking a stream's thread costs 1 to 6 us instead. Finds
     * less: output that is read too early is there already. Kernels' callbacks then run on the launching thread. */
    int instant;
} trtx_mock_options;

/* NULL only when the process is out of memory. Owned by the caller. */
trtx_mock *trtx_mock_create(const trtx_mock_options *options);

/* Right after trtx_mock_create: the time to go by. `time` is referenced, `clock` copied; either may be NULL. */
void trtx_mock_set_time(trtx_mock *mock, trtx_mock_time *time, const trtx_mock_clock *clock);

/* Ends all streams and frees everything. No other thread may use the instance. */
void trtx_mock_destroy(trtx_mock *mock);

/* Lets the streams' threads end after their pending work, and takes the instance's contexts off the calling thread's stack;
 * waits for nothing. Streams take no work from here on. */
void trtx_mock_close(trtx_mock *mock);

/* Some stream has work to do, so that trtx_mock_destroy would wait. */
int trtx_mock_is_busy(trtx_mock *mock);

/* The table, the same for all instances; static. */
const trtx_cuda_api *trtx_mock_api(void);

/* The instance that calls without a handle use in this thread; NULL for none (they return CUDA_ERROR_NO_DEVICE). */
void trtx_mock_select(trtx_mock *mock);

/* What a fake kernel does, on the stream's thread. Returns a CUresult, anything but success makes the context sticky; or
 * TRTX_MOCK_NO_RESULT where the values it found give no result. That is no fault of the device: the stream goes on, and
 * the error is CUDA_ERROR_INVALID_VALUE, told once. It goes to the first event recorded behind the kernel that is queried
 * or waited for, whose every query then repeats it, or else to a synchronization of the stream; cuStreamQuery tells it as
 * long as nobody took it. */
typedef CUresult (*trtx_mock_kernel)(void *userdata);
enum { TRTX_MOCK_NO_RESULT = -1 };

/* Why the kernel had no result whose failure an event told last, in whatever thread: trtx_mock_detail is the asking one's.
 * Returns the bytes needed without the final NUL. */
size_t trtx_mock_told(trtx_mock *mock, char *text, size_t length);

/* From a kernel that is about to fail: why. Copied. */
void trtx_mock_explain(const char *why);

/* Enqueue a kernel that takes duration_ns and then calls run(userdata) (run may be NULL). During capture it becomes a node
 * of the graph, and runs at every replay. release(userdata) is called exactly once: after the run, or when the graph and
 * all its executables are gone, or when the kernel is dropped, which includes a launch that returns an error. Where no
 * context is current, the stream's own is. Neither callback is called under a lock of the mock. */
CUresult trtx_mock_launch(CUstream stream, uint64_t duration_ns, trtx_mock_kernel run, void *userdata,
                          void (*release)(void *userdata));

/* A point in the order of a stream; stays meaningful after the stream is gone. Sequence 0: nothing, reached at once; so are
 * operations of a capture, which have not happened and never will. */
typedef struct trtx_mock_position {
    uintptr_t place;
    uint64_t sequence;
} trtx_mock_position;

int trtx_mock_is_reached(trtx_mock_position position);
/* The application knows that it is reached: from a synchronization, a query or a copy that waits. */
int trtx_mock_is_observed(trtx_mock_position position);
/* What is enqueued next on `stream` runs after it, whatever the timing. */
int trtx_mock_is_ordered_after(trtx_mock *mock, CUstream stream, trtx_mock_position position);
void trtx_mock_await(trtx_mock *mock, trtx_mock_position position);
/* A CU_STREAM_CAPTURE_STATUS_*, without counting a call; NONE for a stream that does not exist. */
int trtx_mock_capture_status(CUstream stream);

/* Device memory that the kernels of one execution context write. Two kernels that use overlapping regions must be ordered,
 * by their streams or by the application's own waiting; where they are not, that is damage. The caller has one reference,
 * each operation with it another. */
typedef struct trtx_mock_region trtx_mock_region;
trtx_mock_region *trtx_mock_region_create(trtx_mock *mock, CUdeviceptr address, size_t bytes, const char *user);
void trtx_mock_region_release(trtx_mock_region *region);

/* Which settings an execution context has on the device: a number that kernels write and captured kernels compare. Atomic,
 * and referenced. */
typedef struct trtx_mock_stamp trtx_mock_stamp;
trtx_mock_stamp *trtx_mock_stamp_create(uint64_t value);
trtx_mock_stamp *trtx_mock_stamp_reference(trtx_mock_stamp *stamp);
void trtx_mock_stamp_release(trtx_mock_stamp *stamp);
uint64_t trtx_mock_stamp_get(const trtx_mock_stamp *stamp);
void trtx_mock_stamp_set(trtx_mock_stamp *stamp, uint64_t value);
/* Another value, unless it is TRTX_MOCK_ENDED. */
void trtx_mock_stamp_renew(trtx_mock_stamp *stamp, uint64_t value);
#define TRTX_MOCK_ENDED UINT64_MAX /* the execution context is gone */

/* As trtx_mock_launch, with more to say. */
typedef struct trtx_mock_task {
    uint64_t duration_ns;
    trtx_mock_kernel run;
    void *userdata;
    void (*release)(void *userdata);
    trtx_mock_region *region; /* NULL, or what it writes beside its outputs */
    int uncounted;            /* 1: not an "execute" for faults and counts */
} trtx_mock_task;
CUresult trtx_mock_enqueue(CUstream stream, const trtx_mock_task *task, trtx_mock_position *position);

/* The kernel of an engine that computes nothing: checks all its memory, fills the outputs with zeros. */
typedef struct trtx_mock_span {
    CUdeviceptr address;
    size_t bytes;
    const char *name; /* of the tensor; copied, like all of the blank */
} trtx_mock_span;

typedef struct trtx_mock_blank {
    const char *name;       /* of the kernel, for texts */
    trtx_mock_span scratch; /* bytes 0: none */
    const trtx_mock_span *inputs, *outputs;
    size_t input_count, output_count;
    trtx_mock_stamp *stamp;
    uint64_t value; /* not captured: written to the stamp; captured: other values found there are damage, and no output */
    int captured;
} trtx_mock_blank;
CUresult trtx_mock_enqueue_blank(trtx_mock *mock, CUstream stream, uint64_t duration_ns, trtx_mock_region *region,
                                 const trtx_mock_blank *blank, trtx_mock_position *position);

/* Memory for TensorRT itself, on the current device: counts as no call, and no fault strikes it. */
CUresult trtx_mock_reserve(size_t bytes, const char *label, CUdeviceptr *pointer);
/* Gives it back, unless the end of its context did so already. */
void trtx_mock_unreserve(trtx_mock *mock, CUdeviceptr pointer);

/* The ordinal of the device that is current and usable in this thread. */
CUresult trtx_mock_current(trtx_mock *mock, int *device);
/* The context that is current in this thread becomes unusable. */
void trtx_mock_lose(trtx_mock *mock, CUresult error, const char *detail);
int trtx_mock_is_device_address(trtx_mock *mock, CUdeviceptr pointer);

/* Checked access to device memory from inside a kernel: CUDA_ERROR_ILLEGAL_ADDRESS unless [pointer, pointer + bytes) lies
 * in one live block of the device. */
CUresult trtx_mock_read(trtx_mock *mock, void *to, CUdeviceptr from, size_t bytes);
CUresult trtx_mock_write(trtx_mock *mock, CUdeviceptr to, const void *from, size_t bytes);

/* The same without copying: bytes that stay valid, even if the block is freed, until they are unpinned. */
typedef struct trtx_mock_view {
    uint8_t *data;
    void *backing;
} trtx_mock_view;
CUresult trtx_mock_pin(trtx_mock *mock, CUdeviceptr pointer, size_t bytes, trtx_mock_view *view);
void trtx_mock_unpin(trtx_mock *mock, trtx_mock_view *view);

/* The next calls of `call` (a driver function's name, or "execute" for kernels) behave as told: calls number nth to
 * nth + count - 1, counted from now (count 0: all from nth on), wait delay_ns and then return error (0: succeed all the
 * same); lose_device also makes the context sticky with that error, TRTX_MOCK_LOSE_PROCESS those of all devices, after
 * which none can be retained again: what a faulting kernel does to a process. */
enum { TRTX_MOCK_LOSE_DEVICE = 1, TRTX_MOCK_LOSE_PROCESS = 2 };
CUresult trtx_mock_inject(trtx_mock *mock, const char *call, uint64_t nth, uint64_t count, CUresult error,
                          uint64_t delay_ns, int lose_device);
/* The same for the calls on one device alone: with its context current, or with the device as argument. */
CUresult trtx_mock_inject_on(trtx_mock *mock, int device, const char *call, uint64_t nth, uint64_t count, CUresult error,
                             uint64_t delay_ns, int lose_device);
void trtx_mock_clear_faults(trtx_mock *mock);
uint64_t trtx_mock_calls(trtx_mock *mock, const char *call);
const char *trtx_mock_call_name(size_t index); /* of all that are counted; NULL after the last */

typedef struct trtx_mock_usage {
    size_t device_bytes, device_blocks, pinned_bytes, pinned_blocks;
    size_t streams, events, graphs, execs, retained_contexts;
    size_t damage; /* number of lines of trtx_mock_damage */
} trtx_mock_usage;

void trtx_mock_get_usage(trtx_mock *mock, trtx_mock_usage *usage);

/* What is open or allocated, and what contexts left so when they ended, one a line; nothing of a context that a fault took.
 * Returns the bytes needed without the final NUL. */
size_t trtx_mock_leaks(trtx_mock *mock, char *text, size_t length);
/* What no error tells of: overwritten red zones, writes to freed pinned memory, kernels that overwrite each other. */
size_t trtx_mock_damage(trtx_mock *mock, char *text, size_t length);
/* Both. */
size_t trtx_mock_describe(trtx_mock *mock, char *text, size_t length);
/* Keep a damage that the code above the driver found. */
void trtx_mock_blame(trtx_mock *mock, const char *text);

/* Nanoseconds of the instance's clock. */
uint64_t trtx_mock_now(trtx_mock *mock);

/* Move a virtual clock forward; does nothing to a real one. */
void trtx_mock_advance(trtx_mock *mock, uint64_t ns);

/* Why this thread's latest failing call failed; owned by the thread, valid until its next failing call. */
const char *trtx_mock_detail(void);
/* The same in parts: the call's name (static), the code, and the reason without the name. */
const char *trtx_mock_reason(const char **call, CUresult *code);

/* Where the caller is (file and line, say): kept with what this thread allocates and creates from now on, for the reports.
 * Copied; NULL for nowhere. */
void trtx_mock_site(const char *site);

#ifdef __cplusplus
}
#endif
#endif
