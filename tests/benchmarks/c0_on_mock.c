/* For test_benchmarks.py: graphs of the C mock driver, that the loops of c0.c can be run on them. */
#include "mock_driver.h"

#include <stdatomic.h>
#include <stddef.h>

static _Atomic int runs;
static trtx_mock *mock;

static CUresult count_run(void *userdata) {
    (void)userdata;
    atomic_fetch_add(&runs, 1);
    return CUDA_SUCCESS;
}

/* table: launch, record, query, as c0_api wants them. Returns a CUresult. */
int c0_mock_open(void **table) {
    trtx_mock_options options = {sizeof options, (size_t)1 << 20, 1, 9, 0, 0, 0};
    const trtx_cuda_api *api = trtx_mock_api();
    CUcontext context;
    mock = trtx_mock_create(&options);
    if (!mock)
        return CUDA_ERROR_OUT_OF_MEMORY;
    trtx_mock_select(mock);
    table[0] = (void *)api->cuGraphLaunch;
    table[1] = (void *)api->cuEventRecord;
    table[2] = (void *)api->cuEventQuery;
    table[3] = NULL;
    int status = api->cuInit(0);
    if (!status)
        status = api->cuDevicePrimaryCtxRetain(&context, 0);
    return status ? status : api->cuCtxPushCurrent(context);
}

/* A stream, an event, and a graph of one kernel that takes `ns` and is counted. */
int c0_mock_lane(uint64_t ns, CUstream *stream, CUevent *event, CUgraphExec *exec) {
    const trtx_cuda_api *api = trtx_mock_api();
    CUgraph graph;
    int status = api->cuStreamCreate(stream, CU_STREAM_NON_BLOCKING);
    if (!status)
        status = api->cuEventCreate(event, CU_EVENT_DISABLE_TIMING);
    if (!status)
        status = api->cuStreamBeginCapture(*stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    if (!status)
        status = trtx_mock_launch(*stream, ns, count_run, NULL, NULL);
    if (!status)
        status = api->cuStreamEndCapture(*stream, &graph);
    if (!status)
        status = api->cuGraphInstantiate(exec, graph, 0);
    return status ? status : api->cuGraphDestroy(graph);
}

int c0_mock_runs(void) { return atomic_exchange(&runs, 0); }

int c0_mock_lose_device(void) {
    return trtx_mock_inject(mock, "execute", 1, 1, CUDA_ERROR_LAUNCH_FAILED, 0, 1);
}

void c0_mock_close(void) {
    trtx_mock_api()->cuCtxPopCurrent(NULL);
    trtx_mock_destroy(mock);
    trtx_mock_select(NULL);
}
