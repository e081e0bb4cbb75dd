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

/* Ends all streams and frees everything. No other thread may use the instance. */
void trtx_mock_destroy(trtx_mock *mock);

/* The table, the same for all instances; static. */
const trtx_cuda_api *trtx_mock_api(void);

/* The instance that calls without a handle use in this thread; NULL for none (they return CUDA_ERROR_NO_DEVICE). */
void trtx_mock_select(trtx_mock *mock);

/* What a fake kernel does, on the stream's thread. Returns a CUresult; anything but success makes the context sticky. */
typedef CUresult (*trtx_mock_kernel)(void *userdata);

/* Enqueue a kernel that takes duration_ns and then calls run(userdata) (run may be NULL). During capture it becomes a node
 * of the graph, and runs at every replay. release(userdata) is called exactly once: after the run, or when the graph and
 * all its executables are gone, or when the kernel is dropped, which includes a launch that returns an error. Where no
 * context is current, the stream's own is. Neither callback is called under a lock of the mock. */
CUresult trtx_mock_launch(CUstream stream, uint64_t duration_ns, trtx_mock_kernel run, void *userdata,
                          void (*release)(void *userdata));

/* Checked access to device memory from inside a kernel: CUDA_ERROR_ILLEGAL_ADDRESS unless [pointer, pointer + bytes) lies
 * in one live block of the device. */
CUresult trtx_mock_read(trtx_mock *mock, void *to, CUdeviceptr from, size_t bytes);
CUresult trtx_mock_write(trtx_mock *mock, CUdeviceptr to, const void *from, size_t bytes);

/* The next calls of `call` (a driver function's name, or "execute" for kernels) behave as told: calls number nth to
 * nth + count - 1, counted from now (count 0: all from nth on), wait delay_ns and then return error (0: succeed all the
 * same); lose_device also makes the context sticky with that error. */
CUresult trtx_mock_inject(trtx_mock *mock, const char *call, uint64_t nth, uint64_t count, CUresult error,
                          uint64_t delay_ns, int lose_device);
void trtx_mock_clear_faults(trtx_mock *mock);
uint64_t trtx_mock_calls(trtx_mock *mock, const char *call);

typedef struct trtx_mock_usage {
    size_t device_bytes, device_blocks, pinned_bytes, pinned_blocks;
    size_t streams, events, graphs, execs, retained_contexts;
    size_t damage; /* red zones found overwritten, double frees, use after free: see trtx_mock_describe */
} trtx_mock_usage;

void trtx_mock_get_usage(trtx_mock *mock, trtx_mock_usage *usage);

/* Text of every leak and every damage found so far, one a line; returns the bytes needed without the final NUL. */
size_t trtx_mock_describe(trtx_mock *mock, char *text, size_t length);

/* Nanoseconds of the instance's clock. */
uint64_t trtx_mock_now(trtx_mock *mock);

/* Move a virtual clock forward; does nothing to a real one. */
void trtx_mock_advance(trtx_mock *mock, uint64_t ns);

/* Why this thread's latest failing call failed; owned by the thread, valid until its next failing call. */
const char *trtx_mock_detail(void);

/* Where the caller is (file and line, say): kept with what this thread allocates and creates from now on, for the reports.
 * Copied; NULL for nowhere. */
void trtx_mock_site(const char *site);

#ifdef __cplusplus
}
#endif
#endif
