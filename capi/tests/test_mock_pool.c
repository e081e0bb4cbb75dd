/* Stream-ordered memory, and how a thread asks not to disturb captures. */
#include "mock_test.h"

static void an_allocation_is_used_at_once_by_its_stream_and_freed_in_order(void) {
    rig r;
    gate g = GATE;
    CUdeviceptr block;
    trtx_mock_usage usage;
    uint8_t *out;
    open_rig(&r);
    OK(r.api->cuMemHostAlloc((void **)&out, 64, 0));
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    OK(r.api->cuMemAllocAsync(&block, 64, r.stream));
    OK(r.api->cuMemsetD8Async(block, 7, 64, r.stream));
    OK(r.api->cuMemcpyDtoHAsync(out, block, 64, r.stream));
    OK(r.api->cuMemFreeAsync(block, r.stream));
    trtx_mock_get_usage(r.mock, &usage);
    CHECK_EQ(usage.device_blocks, 1); /* the stream is not there yet */
    CHECK_EQ(r.api->cuMemsetD8Async(block, 8, 64, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK(strstr(trtx_mock_detail(), "use after free"));
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK(out[0] == 7 && out[63] == 7);
    trtx_mock_get_usage(r.mock, &usage);
    CHECK_EQ(usage.device_blocks + usage.device_bytes, 0);
    OK(r.api->cuMemFreeHost(out));
    close_rig(&r);
}

static void another_stream_waits_for_an_event(void) {
    for (int waits = 0; waits < 2; waits++) {
        rig r;
        gate g = GATE;
        CUstream other;
        CUevent event;
        CUdeviceptr block;
        open_rig(&r);
        OK(r.api->cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
        OK(r.api->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
        OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
        OK(r.api->cuMemAllocAsync(&block, 64, r.stream));
        OK(r.api->cuEventRecord(event, r.stream));
        if (waits)
            OK(r.api->cuStreamWaitEvent(other, event, 0));
        OK(r.api->cuMemsetD8Async(block, 1, 64, other));
        if (waits) {
            OK(r.api->cuMemFreeAsync(block, other)); /* by another stream than it came from */
            set_gate(&g, true);
            OK(r.api->cuStreamSynchronize(other));
            OK(r.api->cuEventDestroy(event));
            OK(r.api->cuStreamDestroy(other));
            close_rig(&r);
        } else {
            CHECK_EQ(r.api->cuStreamSynchronize(other), CUDA_ERROR_ILLEGAL_ADDRESS);
            CHECK(strstr(trtx_mock_detail(), "before the stream that allocates it got there"));
            set_gate(&g, true);
            CHECK_EQ(r.api->cuMemFreeAsync(block, other), CUDA_ERROR_ILLEGAL_ADDRESS); /* freed all the same */
            trtx_mock_usage usage;
            trtx_mock_get_usage(r.mock, &usage);
            CHECK_EQ(usage.device_blocks, 0);
            drop_rig(&r);
        }
    }
}

static void both_ways_of_freeing_go_together(void) {
    rig r;
    CUdeviceptr block;
    open_rig(&r);
    OK(r.api->cuMemAllocAsync(&block, 64, r.stream));
    OK(r.api->cuMemFree(block));
    OK(r.api->cuMemAlloc(&block, 64));
    OK(r.api->cuMemFreeAsync(block, r.stream));
    OK(r.api->cuMemFreeAsync(0, r.stream));
    close_rig(&r);
}

static void misuse_is_refused(void) {
    rig r;
    gate g = GATE;
    CUdeviceptr block = 77, none = 77;
    open_rig(&r);
    CHECK_EQ(r.api->cuMemAllocAsync(&none, 0, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemAllocAsync(NULL, 8, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemAllocAsync(&none, (size_t)1 << 40, r.stream), CUDA_ERROR_OUT_OF_MEMORY);
    CHECK_EQ(r.api->cuMemAllocAsync(&none, 8, (CUstream)&r), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(none, 77);
    CHECK_EQ(r.api->cuMemFreeAsync(12, r.stream), CUDA_ERROR_INVALID_VALUE);
    OK(r.api->cuMemAllocAsync(&block, 64, r.stream));
    CHECK_EQ(r.api->cuMemFreeAsync(block + 1, r.stream), CUDA_ERROR_INVALID_VALUE);
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    OK(r.api->cuMemFreeAsync(block, r.stream));
    CHECK_EQ(r.api->cuMemFreeAsync(block, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK(strstr(trtx_mock_detail(), "double free"));
    CHECK_EQ(r.api->cuMemFree(block), CUDA_ERROR_INVALID_VALUE);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(r.api->cuMemFreeAsync(block, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK(strstr(trtx_mock_detail(), "double free"));
    drop_rig(&r);
}

static void a_capture_refuses_allocations(void) {
    for (int frees = 0; frees < 2; frees++) {
        rig r;
        CUdeviceptr block;
        CUgraph graph = NULL;
        open_rig(&r);
        OK(r.api->cuMemAllocAsync(&block, 64, r.stream));
        OK(r.api->cuStreamBeginCapture(r.stream, CU_STREAM_CAPTURE_MODE_RELAXED));
        CUdeviceptr other = 0;
        CHECK_EQ(frees ? r.api->cuMemFreeAsync(block, r.stream) : r.api->cuMemAllocAsync(&other, 64, r.stream),
                 CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        OK(r.api->cuMemFreeAsync(block, r.stream));
        close_rig(&r);
    }
}

typedef struct visitor {
    rig *r;
    int mode;
    CUresult allocation, query;
    CUevent event;
} visitor;

static void *visit(void *argument) {
    visitor *v = argument;
    const trtx_cuda_api *api = v->r->api;
    CUdeviceptr block = 0;
    trtx_mock_select(v->r->mock);
    OK(api->cuCtxPushCurrent(v->r->context));
    int mode = v->mode;
    OK(api->cuThreadExchangeStreamCaptureMode(&mode));
    CHECK_EQ(mode, CU_STREAM_CAPTURE_MODE_GLOBAL); /* a thread's first */
    v->query = api->cuEventQuery(v->event);
    v->allocation = api->cuMemAlloc(&block, 16);
    if (!v->allocation)
        OK(api->cuMemFree(block));
    OK(api->cuThreadExchangeStreamCaptureMode(&mode));
    CHECK_EQ(mode, v->mode);
    OK(api->cuCtxPopCurrent(NULL));
    return NULL;
}

static void a_thread_says_how_it_minds_captures(void) {
    for (int captured = 0; captured < 3; captured++) {
        for (int mode = 0; mode < 3; mode++) {
            rig r;
            pthread_t thread;
            CUgraph graph = NULL;
            visitor v = {.r = &r, .mode = mode};
            open_rig(&r);
            OK(r.api->cuEventCreate(&v.event, 0));
            OK(r.api->cuStreamBeginCapture(r.stream, captured));
            pthread_create(&thread, NULL, visit, &v);
            pthread_join(thread, NULL);
            CUresult expected = captured == 0 && mode == 0 ? 900 : 0; /* both GLOBAL */
            CHECK_EQ(v.allocation, expected);
            CHECK_EQ(v.query, expected);
            CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), expected ? 901 : 0);
            if (graph)
                OK(r.api->cuGraphDestroy(graph));
            OK(r.api->cuEventDestroy(v.event));
            close_rig(&r);
        }
    }
}

static void the_capturing_thread_may_relax_too(void) {
    for (int mode = 0; mode < 3; mode++) {
        rig r;
        CUgraph graph = NULL;
        CUdeviceptr block = 0;
        open_rig(&r);
        OK(r.api->cuStreamBeginCapture(r.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
        int before = mode;
        OK(r.api->cuThreadExchangeStreamCaptureMode(&before));
        CUresult expected = mode == CU_STREAM_CAPTURE_MODE_RELAXED ? 0 : 900;
        CHECK_EQ(r.api->cuMemAlloc(&block, 16), expected);
        CHECK_EQ(r.api->cuStreamQuery(r.stream), 900); /* what is captured cannot be asked, in any mode */
        OK(r.api->cuThreadExchangeStreamCaptureMode(&before));
        CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), 901);
        if (block)
            OK(r.api->cuMemFree(block));
        close_rig(&r);
    }
}

static void an_unknown_mode_changes_nothing(void) {
    rig r;
    int mode = 3;
    open_rig(&r);
    CHECK_EQ(r.api->cuThreadExchangeStreamCaptureMode(&mode), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuThreadExchangeStreamCaptureMode(NULL), CUDA_ERROR_INVALID_VALUE);
    mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    OK(r.api->cuThreadExchangeStreamCaptureMode(&mode));
    CHECK_EQ(mode, CU_STREAM_CAPTURE_MODE_GLOBAL);
    close_rig(&r);
}

int main(void) {
    RUN(an_allocation_is_used_at_once_by_its_stream_and_freed_in_order);
    RUN(another_stream_waits_for_an_event);
    RUN(both_ways_of_freeing_go_together);
    RUN(misuse_is_refused);
    RUN(a_capture_refuses_allocations);
    RUN(a_thread_says_how_it_minds_captures);
    RUN(the_capturing_thread_may_relax_too);
    RUN(an_unknown_mode_changes_nothing);
    return report();
}
