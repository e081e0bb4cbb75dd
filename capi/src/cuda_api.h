/* The part of the CUDA driver API that the data plane uses, as a table of functions.
 *
 * The table is filled at run time: from libcuda.so.1 on a machine with a driver (trtx_cuda_api_load), or with the mock
 * driver's functions (trtx_mock_api). Types and names are the driver API's own, declared here so that no CUDA toolkit is
 * needed to build. Every function returns a CUresult, 0 for success, as the driver does.
 */
#ifndef TRTX_CUDA_API_H
#define TRTX_CUDA_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef struct CUgraphNode_st *CUgraphNode;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_OPERATING_SYSTEM = 304,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_MERGE = 902,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_CAPTURED_EVENT = 907,
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
    CUDA_ERROR_UNKNOWN = 999
};

enum { CU_STREAM_NON_BLOCKING = 1 };
enum { CU_EVENT_DEFAULT = 0, CU_EVENT_BLOCKING_SYNC = 1, CU_EVENT_DISABLE_TIMING = 2 };
enum { CU_STREAM_CAPTURE_MODE_GLOBAL = 0, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1, CU_STREAM_CAPTURE_MODE_RELAXED = 2 };
enum { CU_STREAM_CAPTURE_STATUS_NONE = 0, CU_STREAM_CAPTURE_STATUS_ACTIVE = 1, CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2 };

/* X(name, symbol in libcuda, parameters) */
#define TRTX_CUDA_FUNCTIONS(X)                                                                                         \
    X(cuInit, "cuInit", (unsigned flags))                                                                              \
    X(cuDriverGetVersion, "cuDriverGetVersion", (int *version))                                                        \
    X(cuDeviceGetCount, "cuDeviceGetCount", (int *count))                                                              \
    X(cuDeviceGet, "cuDeviceGet", (CUdevice * device, int ordinal))                                                    \
    X(cuDeviceGetName, "cuDeviceGetName", (char *name, int length, CUdevice device))                                   \
    X(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t * bytes, CUdevice device))                                      \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, CUdevice device))                      \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext * context, CUdevice device))                    \
    X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CUdevice device))                                    \
    X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext context))                                                    \
    X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext * context))                                                    \
    X(cuCtxGetCurrent, "cuCtxGetCurrent", (CUcontext * context))                                                       \
    X(cuCtxSetCurrent, "cuCtxSetCurrent", (CUcontext context))                                                         \
    X(cuMemGetInfo, "cuMemGetInfo_v2", (size_t * free_bytes, size_t * total_bytes))                                    \
    X(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr * pointer, size_t bytes))                                              \
    X(cuMemFree, "cuMemFree_v2", (CUdeviceptr pointer))                                                                \
    X(cuMemAllocAsync, "cuMemAllocAsync", (CUdeviceptr * pointer, size_t bytes, CUstream stream))                      \
    X(cuMemFreeAsync, "cuMemFreeAsync", (CUdeviceptr pointer, CUstream stream))                                        \
    X(cuMemHostAlloc, "cuMemHostAlloc", (void **pointer, size_t bytes, unsigned flags))                                \
    X(cuMemFreeHost, "cuMemFreeHost", (void *pointer))                                                                 \
    X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CUdeviceptr to, const void *from, size_t bytes, CUstream stream))    \
    X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void *to, CUdeviceptr from, size_t bytes, CUstream stream))          \
    X(cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))    \
    X(cuMemsetD8Async, "cuMemsetD8Async", (CUdeviceptr to, unsigned char value, size_t count, CUstream stream))        \
    X(cuStreamCreate, "cuStreamCreate", (CUstream * stream, unsigned flags))                                           \
    X(cuStreamDestroy, "cuStreamDestroy_v2", (CUstream stream))                                                        \
    X(cuStreamSynchronize, "cuStreamSynchronize", (CUstream stream))                                                   \
    X(cuStreamQuery, "cuStreamQuery", (CUstream stream))                                                               \
    X(cuStreamWaitEvent, "cuStreamWaitEvent", (CUstream stream, CUevent event, unsigned flags))                        \
    X(cuEventCreate, "cuEventCreate", (CUevent * event, unsigned flags))                                               \
    X(cuEventDestroy, "cuEventDestroy_v2", (CUevent event))                                                            \
    X(cuEventRecord, "cuEventRecord", (CUevent event, CUstream stream))                                                \
    X(cuEventQuery, "cuEventQuery", (CUevent event))                                                                   \
    X(cuEventSynchronize, "cuEventSynchronize", (CUevent event))                                                       \
    X(cuEventElapsedTime, "cuEventElapsedTime", (float *milliseconds, CUevent start, CUevent end))                     \
    X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int *mode))                             \
    X(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (CUstream stream, int mode))                                    \
    X(cuStreamEndCapture, "cuStreamEndCapture", (CUstream stream, CUgraph * graph))                                    \
    X(cuStreamIsCapturing, "cuStreamIsCapturing", (CUstream stream, int *status))                                      \
    X(cuGraphInstantiate, "cuGraphInstantiateWithFlags",                                                               \
      (CUgraphExec * exec, CUgraph graph, unsigned long long flags))                                                   \
    X(cuGraphGetNodes, "cuGraphGetNodes", (CUgraph graph, CUgraphNode * nodes, size_t * count))                        \
    X(cuGraphLaunch, "cuGraphLaunch", (CUgraphExec exec, CUstream stream))                                             \
    X(cuGraphExecDestroy, "cuGraphExecDestroy", (CUgraphExec exec))                                                    \
    X(cuGraphDestroy, "cuGraphDestroy", (CUgraph graph))                                                               \
    X(cuGetErrorName, "cuGetErrorName", (CUresult error, const char **name))                                           \
    X(cuGetErrorString, "cuGetErrorString", (CUresult error, const char **text))                                       \
    X(cuDeviceGetUuid, "cuDeviceGetUuid_v2", (unsigned char *uuid, CUdevice device)) /* 16 bytes */

typedef struct trtx_cuda_api {
#define TRTX_MEMBER(name, symbol, parameters) CUresult(*name) parameters;
    TRTX_CUDA_FUNCTIONS(TRTX_MEMBER)
#undef TRTX_MEMBER
} trtx_cuda_api;

/* The table of the real driver, loaded once and kept for the life of the process. NULL if there is none; then *reason
 * points to static text that names what was looked for. Thread-safe. */
const trtx_cuda_api *trtx_cuda_api_load(const char **reason);

#ifdef __cplusplus
}
#endif
#endif
