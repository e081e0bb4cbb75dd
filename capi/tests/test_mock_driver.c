/* Devices, contexts, handles, memory, streams and events of the mock driver, one thread at a time. */
#include "mock_test.h"

static void a_call_needs_an_instance_and_init(void) {
    const trtx_cuda_api *api = trtx_mock_api();
    int count = -1, version = 0;
    CUcontext context;
    CUstream stream;
    trtx_mock_select(NULL);
    CHECK_EQ(api->cuInit(0), CUDA_ERROR_NO_DEVICE);
    CHECK_EQ(api->cuDeviceGetCount(&count), CUDA_ERROR_NO_DEVICE);
    CHECK_EQ(api->cuStreamCreate(&stream, 0), CUDA_ERROR_INVALID_CONTEXT);
    OK(api->cuDriverGetVersion(&version));
    CHECK_EQ(version, 12080);
    trtx_mock_options options = {sizeof options, 1 << 20, 2, 8, 6, 0, 0};
    trtx_mock *mock = trtx_mock_create(&options);
    trtx_mock_select(mock);
    CHECK_EQ(api->cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
    CHECK_EQ(api->cuDevicePrimaryCtxRetain(&context, 0), CUDA_ERROR_NOT_INITIALIZED);
    CHECK_EQ(api->cuStreamCreate(&stream, 0), CUDA_ERROR_NOT_INITIALIZED);
    CHECK_EQ(api->cuInit(1), CUDA_ERROR_INVALID_VALUE);
    OK(api->cuInit(0));
    OK(api->cuDeviceGetCount(&count));
    CHECK_EQ(count, 2);
    int major = 0;
    size_t bytes = 0;
    char name[32];
    CUdevice device;
    OK(api->cuDeviceGet(&device, 1));
    CHECK_EQ(device, 1);
    CHECK_EQ(api->cuDeviceGet(&device, 2), CUDA_ERROR_INVALID_DEVICE);
    CHECK_EQ(api->cuDeviceGet(&device, -1), CUDA_ERROR_INVALID_DEVICE);
    OK(api->cuDeviceGetAttribute(&major, 75, 1));
    CHECK_EQ(major, 8);
    CHECK_EQ(api->cuDeviceGetAttribute(&major, 99999, 1), CUDA_ERROR_INVALID_VALUE);
    OK(api->cuDeviceTotalMem(&bytes, 0));
    CHECK_EQ(bytes, 1 << 20);
    OK(api->cuDeviceGetName(name, sizeof name, 1));
    CHECK(strcmp(name, "Mock GPU 1") == 0);
    const char *text;
    OK(api->cuGetErrorName(719, &text));
    CHECK(strcmp(text, "CUDA_ERROR_LAUNCH_FAILED") == 0);
    CHECK_EQ(api->cuGetErrorString(12345, &text), CUDA_ERROR_INVALID_VALUE);
    trtx_mock_destroy(mock);
    CHECK_EQ(api->cuDeviceGetCount(&count), CUDA_ERROR_NO_DEVICE); /* still selected, but gone */
    options.devices = 0;
    mock = trtx_mock_create(&options);
    trtx_mock_select(mock);
    CHECK_EQ(api->cuInit(0), CUDA_ERROR_NO_DEVICE);
    trtx_mock_destroy(mock);
    trtx_mock_select(NULL);
}

static void contexts_are_a_stack_of_each_thread(void) {
    rig r;
    open_rig_with(&r, 2, 1 << 20, 0);
    CUcontext second, again, current;
    OK(r.api->cuDevicePrimaryCtxRetain(&again, 0));
    CHECK(again == r.context);
    OK(r.api->cuDevicePrimaryCtxRelease(0));
    OK(r.api->cuDevicePrimaryCtxRetain(&second, 1));
    CHECK(second != r.context);
    OK(r.api->cuCtxPushCurrent(second));
    OK(r.api->cuCtxGetCurrent(&current));
    CHECK(current == second);
    /* work may only be enqueued while the stream's own device is current */
    CHECK_EQ(r.api->cuEventRecord(NULL, r.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(trtx_mock_launch(r.stream, 0, NULL, NULL, NULL), CUDA_ERROR_INVALID_HANDLE);
    OK(r.api->cuStreamQuery(r.stream)); /* asking is fine */
    OK(r.api->cuCtxPopCurrent(&current));
    CHECK(current == second);
    OK(r.api->cuCtxSetCurrent(second));
    OK(r.api->cuCtxGetCurrent(&current));
    CHECK(current == second);
    OK(r.api->cuCtxSetCurrent(r.context));
    OK(r.api->cuCtxSetCurrent(NULL));
    OK(r.api->cuCtxGetCurrent(&current));
    CHECK(current == NULL);
    CHECK_EQ(r.api->cuCtxPopCurrent(&current), CUDA_ERROR_INVALID_CONTEXT);
    CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_INVALID_CONTEXT);
    OK(r.api->cuDevicePrimaryCtxRelease(1));
    CHECK_EQ(r.api->cuDevicePrimaryCtxRelease(1), CUDA_ERROR_INVALID_CONTEXT);
    CHECK_EQ(r.api->cuCtxPushCurrent(second), CUDA_ERROR_INVALID_CONTEXT);
    CHECK_EQ(r.api->cuCtxPushCurrent((CUcontext)&r), CUDA_ERROR_INVALID_CONTEXT);
    OK(r.api->cuCtxPushCurrent(r.context));
    close_rig(&r);
}

static void a_released_context_ends_everything_in_it(void) {
    rig r;
    _Atomic int runs = 0, released = 0;
    open_rig(&r);
    CUevent event;
    CUdeviceptr memory;
    void *pinned;
    trtx_mock_site("somewhere.py:7");
    OK(r.api->cuEventCreate(&event, 0));
    OK(r.api->cuMemAlloc(&memory, 100));
    OK(r.api->cuMemHostAlloc(&pinned, 100, 0));
    trtx_mock_site(NULL);
    for (int i = 0; i < 10; i++)
        OK(trtx_mock_launch(r.stream, 1000, count_run, &runs, NULL));
    OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
    OK(r.api->cuDevicePrimaryCtxRelease(0));
    CHECK_EQ(runs, 10); /* its streams ended first */
    CHECK_EQ(released, 1);
    CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_INVALID_CONTEXT);
    char text[4000];
    CHECK(trtx_mock_describe(r.mock, text, sizeof text) > 0);
    CHECK(strstr(text, "event") && strstr(text, "stream") && strstr(text, "device block") && strstr(text, "pinned block"));
    CHECK(strstr(text, "somewhere.py:7 (still there when its context ended)"));
    CUcontext again;
    OK(r.api->cuDevicePrimaryCtxRetain(&again, 0));
    CHECK(again == r.context);
    CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuEventQuery(event), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuMemFree(memory), CUDA_ERROR_INVALID_VALUE);
    drop_rig(&r);
}

static void stale_and_foreign_handles_are_refused(void) {
    rig r, other;
    open_rig(&other);
    OK(other.api->cuCtxPopCurrent(NULL));
    open_rig(&r);
    CUevent event, foreign = NULL;
    OK(r.api->cuEventCreate(&event, 0));
    OK(r.api->cuEventDestroy(event));
    CHECK_EQ(r.api->cuEventDestroy(event), CUDA_ERROR_INVALID_HANDLE);
    CUevent next;
    OK(r.api->cuEventCreate(&next, 0)); /* the same slot, another generation */
    CHECK(next != event);
    CHECK_EQ(r.api->cuEventQuery(event), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuEventRecord(event, r.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuEventSynchronize((CUevent)&r), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuEventQuery(NULL), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuEventQuery((CUevent)r.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuStreamSynchronize((CUstream)0x123450), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuStreamQuery((CUstream)UINTPTR_MAX), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuStreamDestroy(NULL), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuGraphLaunch((CUgraphExec)next, r.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuGraphDestroy((CUgraph)&r), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuGraphExecDestroy(NULL), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuStreamQuery(other.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuStreamDestroy(other.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(trtx_mock_launch(other.stream, 0, NULL, NULL, NULL), CUDA_ERROR_INVALID_HANDLE);
    OK(r.api->cuCtxPushCurrent(other.context));
    OK(r.api->cuEventCreate(&foreign, 0));
    CHECK_EQ(r.api->cuEventRecord(next, other.stream), CUDA_ERROR_INVALID_HANDLE);
    OK(r.api->cuEventRecord(foreign, other.stream));
    CUdeviceptr pointer;
    OK(r.api->cuMemAlloc(&pointer, 16));
    OK(r.api->cuCtxPopCurrent(NULL));
    CHECK_EQ(r.api->cuMemFree(pointer), CUDA_ERROR_INVALID_VALUE); /* of the other instance */
    CHECK_EQ(r.api->cuEventQuery(foreign), CUDA_ERROR_INVALID_HANDLE);
    OK(r.api->cuEventDestroy(next));
    close_rig(&r);
    trtx_mock_select(other.mock);
    OK(other.api->cuCtxPushCurrent(other.context));
    OK(other.api->cuEventDestroy(foreign));
    OK(other.api->cuMemFree(pointer));
    close_rig(&other);
}

static void memory_is_checked(void) {
    rig r;
    open_rig_with(&r, 1, 4096, 0);
    CUdeviceptr a, b;
    size_t free_bytes, total;
    uint8_t bytes[64];
    CHECK_EQ(r.api->cuMemAlloc(&a, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemAlloc(&a, 4097), CUDA_ERROR_OUT_OF_MEMORY);
    CHECK_EQ(r.api->cuMemAlloc(&a, SIZE_MAX - 8), CUDA_ERROR_OUT_OF_MEMORY);
    OK(r.api->cuMemAlloc(&a, 10));
    CHECK_EQ(a % 256, 0);
    OK(r.api->cuMemGetInfo(&free_bytes, &total));
    CHECK_EQ(total, 4096);
    CHECK_EQ(free_bytes, 4096 - 256);
    OK(r.api->cuMemAlloc(&b, 4096 - 256));
    CHECK_EQ(r.api->cuMemAlloc(&b, 1), CUDA_ERROR_OUT_OF_MEMORY);
    OK(r.api->cuMemcpyDtoHAsync(bytes, a, 10, r.stream));
    for (int i = 0; i < 10; i++)
        CHECK_EQ(bytes[i], 0xCB); /* fresh memory is poisoned */
    CHECK_EQ(r.api->cuMemcpyDtoHAsync(bytes, a, 11, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemcpyDtoHAsync(bytes, a + 9, 2, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemcpyDtoHAsync(bytes, 4096, 2, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemcpyDtoHAsync(NULL, a, 2, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemcpyHtoDAsync(a, (void *)(uintptr_t)b, 2, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemsetD8Async(a, 1, 11, r.stream), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemcpyDtoDAsync(a, b, 11, r.stream), CUDA_ERROR_INVALID_VALUE);
    OK(r.api->cuMemcpyHtoDAsync(a, NULL, 0, r.stream));
    CHECK_EQ(trtx_mock_read(r.mock, bytes, a, 11), CUDA_ERROR_ILLEGAL_ADDRESS);
    OK(trtx_mock_write(r.mock, a + 4, "xyz", 3));
    OK(trtx_mock_read(r.mock, bytes, a + 4, 3));
    CHECK(memcmp(bytes, "xyz", 3) == 0);
    CHECK_EQ(r.api->cuMemFree(a + 1), CUDA_ERROR_INVALID_VALUE);
    trtx_mock_usage usage;
    trtx_mock_get_usage(r.mock, &usage);
    CHECK_EQ(usage.damage, 0);
    CHECK_EQ(usage.device_bytes, 4096);
    CHECK_EQ(usage.device_blocks, 2);
    OK(r.api->cuMemFree(0));
    OK(r.api->cuMemFree(b));
    CUdeviceptr c;
    OK(r.api->cuMemAlloc(&c, 10));
    CHECK(c != b); /* addresses are never used twice */
    OK(r.api->cuMemFree(a));
    CHECK_EQ(r.api->cuMemFree(a), CUDA_ERROR_INVALID_VALUE);
    CHECK(strstr(trtx_mock_detail(), "double free") != NULL);
    CHECK_EQ(trtx_mock_read(r.mock, bytes, a, 1), CUDA_ERROR_ILLEGAL_ADDRESS);
    OK(r.api->cuMemFree(c));
    trtx_mock_get_usage(r.mock, &usage);
    CHECK_EQ(usage.damage, 0); /* what a call refused is no damage */
    drop_rig(&r);
}

static void pinned_memory_is_guarded(void) {
    rig r;
    open_rig(&r);
    uint8_t *first, *second;
    CUdeviceptr device;
    OK(r.api->cuMemHostAlloc((void **)&first, 100, 1));
    OK(r.api->cuMemHostAlloc((void **)&second, 100, 0));
    CHECK_EQ(r.api->cuMemHostAlloc((void **)&second, 0, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemHostAlloc((void **)&second, 8, 64), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemHostAlloc((void **)&second, SIZE_MAX / 2 + 9, 0), CUDA_ERROR_OUT_OF_MEMORY);
    CHECK_EQ((uintptr_t)first % 4096, 0);
    CHECK_EQ(first[99], 0xCD);
    OK(r.api->cuMemAlloc(&device, 200));
    CHECK_EQ(r.api->cuMemcpyHtoDAsync(device, first, 101, r.stream), CUDA_ERROR_INVALID_VALUE);
    memset(first, 3, 100);
    OK(r.api->cuMemcpyHtoDAsync(device, first, 100, r.stream));
    OK(r.api->cuMemcpyDtoDAsync(device + 100, device, 100, r.stream));
    OK(r.api->cuMemcpyDtoHAsync(second, device + 100, 100, r.stream));
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK(memcmp(first, second, 100) == 0);
    trtx_mock_usage usage;
    trtx_mock_get_usage(r.mock, &usage);
    CHECK_EQ(usage.pinned_bytes, 200);
    CHECK_EQ(usage.damage, 0);
    first[100] = 0;  /* an overrun */
    second[-1] = 0;  /* and an underrun */
    trtx_mock_get_usage(r.mock, &usage);
    CHECK_EQ(usage.damage, 2);
    first[100] = second[-1] = 0xA5;
    OK(r.api->cuMemFreeHost(second));
    CHECK_EQ(r.api->cuMemFreeHost(second), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuMemcpyHtoDAsync(device, second, 1, r.stream), CUDA_ERROR_INVALID_VALUE); /* use after free */
    second[5] = 1; /* the quarantine keeps it, and sees this */
    char text[2000];
    trtx_mock_describe(r.mock, text, sizeof text);
    CHECK(strstr(text, "written to after it was freed") != NULL);
    OK(r.api->cuMemFreeHost(first));
    CHECK_EQ(r.api->cuMemFreeHost(&r), CUDA_ERROR_INVALID_VALUE);
    for (int i = 0; i < 600; i++) { /* more than the quarantine holds */
        OK(r.api->cuMemHostAlloc((void **)&first, 64, 0));
        OK(r.api->cuMemFreeHost(first));
    }
    trtx_mock_get_usage(r.mock, &usage);
    CHECK_EQ(usage.damage, 1);
    OK(r.api->cuMemFree(device));
    drop_rig(&r);
}

static void pageable_memory_is_staged(void) {
    rig r;
    gate g = GATE;
    uint8_t sent[32], received[32] = {0};
    CUdeviceptr device;
    open_rig(&r);
    OK(r.api->cuMemAlloc(&device, 32));
    memset(sent, 1, 32);
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    OK(r.api->cuMemcpyHtoDAsync(device, sent, 32, r.stream)); /* returns although the stream is held up */
    memset(sent, 2, 32);
    set_gate(&g, true);
    OK(r.api->cuMemcpyDtoHAsync(received, device, 32, r.stream)); /* returns when done */
    CHECK_EQ(received[0], 1);
    OK(r.api->cuMemsetD8Async(device + 8, 7, 8, r.stream));
    OK(r.api->cuMemcpyDtoHAsync(received, device, 32, r.stream));
    CHECK(received[7] == 1 && received[8] == 7 && received[15] == 7 && received[16] == 1);
    OK(r.api->cuMemFree(device));
    close_rig(&r);
}

static void freed_while_queued_is_a_sticky_700(void) {
    for (int pinned = 0; pinned < 2; pinned++) {
        rig r;
        gate g = GATE;
        CUdeviceptr device;
        void *host;
        open_rig(&r);
        OK(r.api->cuMemAlloc(&device, 64));
        OK(r.api->cuMemHostAlloc(&host, 64, 0));
        OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
        OK(r.api->cuMemcpyHtoDAsync(device, host, 64, r.stream));
        OK(pinned ? r.api->cuMemFreeHost(host) : r.api->cuMemFree(device));
        set_gate(&g, true);
        CHECK_EQ(r.api->cuStreamSynchronize(r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
        CHECK_EQ(r.api->cuMemAlloc(&device, 64), CUDA_ERROR_ILLEGAL_ADDRESS);
        CHECK(strstr(trtx_mock_detail(), "use after free") != NULL);
        CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
        trtx_mock_usage usage;
        trtx_mock_get_usage(r.mock, &usage);
        CHECK_EQ(usage.damage, 0); /* the sticky error tells of it */
        OK(r.api->cuCtxPopCurrent(NULL));
        OK(r.api->cuDevicePrimaryCtxRelease(0));
        OK(r.api->cuDevicePrimaryCtxRetain(&r.context, 0)); /* a new context is healthy */
        OK(r.api->cuCtxPushCurrent(r.context));
        OK(r.api->cuMemAlloc(&device, 64));
        drop_rig(&r);
    }
}

static void streams_keep_order_and_say_when_they_are_done(void) {
    rig r;
    gate g = GATE;
    CUevent event;
    open_rig(&r);
    OK(r.api->cuStreamQuery(r.stream));
    OK(r.api->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(r.api->cuEventQuery(event)); /* never recorded: complete */
    OK(r.api->cuEventSynchronize(event));
    OK(r.api->cuStreamWaitEvent(r.stream, event, 0));
    CHECK_EQ(r.api->cuStreamWaitEvent(r.stream, event, 2), CUDA_ERROR_INVALID_VALUE);
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    OK(r.api->cuEventRecord(event, r.stream));
    CHECK_EQ(r.api->cuEventQuery(event), CUDA_ERROR_NOT_READY);
    CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_NOT_READY);
    set_gate(&g, true);
    OK(r.api->cuEventSynchronize(event));
    OK(r.api->cuEventQuery(event));
    OK(r.api->cuStreamQuery(r.stream));
    CHECK_EQ(r.api->cuStreamCreate(&(CUstream){0}, 2), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(r.api->cuEventCreate(&(CUevent){0}, 64), CUDA_ERROR_INVALID_VALUE);
    OK(r.api->cuEventDestroy(event));
    close_rig(&r);
}

static void an_event_orders_two_streams(void) {
    rig r;
    gate g = GATE;
    _Atomic int runs = 0;
    CUstream other, third;
    CUevent event;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    OK(r.api->cuStreamCreate(&third, CU_STREAM_NON_BLOCKING));
    OK(r.api->cuEventCreate(&event, 0));
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    OK(r.api->cuEventRecord(event, r.stream));
    OK(r.api->cuStreamWaitEvent(other, event, 0));
    OK(trtx_mock_launch(other, 0, count_run, &runs, NULL));
    /* the wait keeps the recording that it saw: a new one elsewhere, reached at once, changes nothing for it */
    OK(r.api->cuEventRecord(event, third));
    OK(r.api->cuEventSynchronize(event));
    OK(r.api->cuEventDestroy(event));
    nap_ms(5);
    CHECK_EQ(r.api->cuStreamQuery(other), CUDA_ERROR_NOT_READY);
    CHECK_EQ(runs, 0);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(other));
    CHECK_EQ(runs, 1);
    OK(r.api->cuStreamDestroy(other));
    OK(r.api->cuStreamDestroy(third));
    close_rig(&r);
}

static void a_late_recording_of_a_destroyed_event_changes_nothing(void) {
    rig r;
    gate first = GATE, second = GATE;
    CUevent event, next;
    CUstream other;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&other, 1));
    OK(r.api->cuEventCreate(&event, 0));
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &first, NULL));
    for (int i = 0; i < 5; i++)
        OK(r.api->cuEventRecord(event, r.stream));
    OK(r.api->cuEventDestroy(event));
    OK(r.api->cuEventCreate(&next, 0)); /* in the same slot */
    OK(trtx_mock_launch(other, 0, pass_gate, &second, NULL));
    OK(r.api->cuEventRecord(next, other));
    set_gate(&first, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(r.api->cuEventQuery(next), CUDA_ERROR_NOT_READY);
    set_gate(&second, true);
    OK(r.api->cuEventSynchronize(next));
    OK(r.api->cuEventQuery(next));
    OK(r.api->cuEventDestroy(next));
    OK(r.api->cuStreamDestroy(other));
    close_rig(&r);
}

static void the_latest_recording_counts_in_whatever_order_they_are_reached(void) {
    rig r;
    gate g = GATE;
    CUevent event;
    CUstream fast;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&fast, 1));
    OK(r.api->cuEventCreate(&event, 0));
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    OK(r.api->cuEventRecord(event, r.stream)); /* reached last */
    OK(trtx_mock_launch(fast, 0, NULL, NULL, NULL));
    OK(r.api->cuEventRecord(event, fast));
    OK(r.api->cuEventSynchronize(event));
    OK(r.api->cuEventQuery(event));
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    OK(r.api->cuEventQuery(event));
    /* a stream in the slot of an event whose recordings are still to come */
    set_gate(&g, false);
    CUstream next;
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    for (int i = 0; i < 9; i++)
        OK(r.api->cuEventRecord(event, r.stream));
    OK(r.api->cuEventDestroy(event));
    OK(r.api->cuStreamCreate(&next, 1));
    gate other = GATE;
    OK(trtx_mock_launch(next, 0, pass_gate, &other, NULL));
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(r.api->cuStreamQuery(next), CUDA_ERROR_NOT_READY);
    set_gate(&other, true);
    OK(r.api->cuStreamSynchronize(next));
    OK(r.api->cuStreamDestroy(next));
    OK(r.api->cuStreamDestroy(fast));
    close_rig(&r);
}

static void the_null_stream_and_blocking_streams_wait_for_each_other(void) {
    rig r;
    gate g = GATE;
    _Atomic int runs = 0;
    CUstream blocking, free_stream;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&blocking, 0));
    OK(r.api->cuStreamCreate(&free_stream, CU_STREAM_NON_BLOCKING));
    OK(r.api->cuStreamSynchronize(NULL));
    OK(trtx_mock_launch(blocking, 0, pass_gate, &g, NULL));
    OK(trtx_mock_launch(NULL, 0, count_run, &runs, NULL));
    OK(trtx_mock_launch(free_stream, 0, NULL, NULL, NULL));
    OK(r.api->cuStreamSynchronize(free_stream)); /* non-blocking: waits for nobody */
    nap_ms(5);
    CHECK_EQ(runs, 0);
    CHECK_EQ(r.api->cuStreamQuery(NULL), CUDA_ERROR_NOT_READY);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize((CUstream)1)); /* CU_STREAM_LEGACY */
    CHECK_EQ(runs, 1);
    set_gate(&g, false);
    OK(trtx_mock_launch(NULL, 0, pass_gate, &g, NULL));
    OK(trtx_mock_launch(blocking, 0, count_run, &runs, NULL));
    nap_ms(5);
    CHECK_EQ(runs, 1);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(blocking));
    CHECK_EQ(runs, 2);
    OK(r.api->cuStreamDestroy(blocking));
    OK(r.api->cuStreamDestroy(free_stream));
    close_rig(&r);
}

static void a_destroyed_stream_finishes_its_work(void) {
    rig r;
    gate g = GATE;
    _Atomic int runs = 0;
    CUstream doomed;
    CUevent event;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&doomed, 1));
    OK(r.api->cuEventCreate(&event, 0));
    OK(trtx_mock_launch(doomed, 0, pass_gate, &g, NULL));
    OK(trtx_mock_launch(doomed, 0, count_run, &runs, NULL));
    OK(r.api->cuEventRecord(event, doomed));
    OK(r.api->cuStreamDestroy(doomed));
    CHECK_EQ(r.api->cuStreamQuery(doomed), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuEventQuery(event), CUDA_ERROR_NOT_READY);
    set_gate(&g, true);
    OK(r.api->cuEventSynchronize(event));
    CHECK_EQ(runs, 1);
    OK(r.api->cuEventDestroy(event));
    for (int i = 0; i < 300; i++) { /* threads of destroyed streams are joined on the way */
        OK(r.api->cuStreamCreate(&doomed, 1));
        OK(trtx_mock_launch(doomed, 0, count_run, &runs, NULL));
        OK(r.api->cuStreamDestroy(doomed));
    }
    close_rig(&r);
    CHECK_EQ(runs, 301);
}

static void time_is_measured(void) {
    for (int virtual_time = 0; virtual_time < 2; virtual_time++) {
        rig r;
        float ms = -1;
        gate g = GATE;
        CUevent start, end, silent;
        open_rig_with(&r, 1, 1 << 20, virtual_time);
        OK(r.api->cuEventCreate(&start, 0));
        OK(r.api->cuEventCreate(&end, 0));
        OK(r.api->cuEventCreate(&silent, CU_EVENT_DISABLE_TIMING));
        uint64_t begun = real_ns();
        OK(r.api->cuEventRecord(start, r.stream));
        if (!virtual_time)
            OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
        OK(trtx_mock_launch(r.stream, virtual_time ? 3600000000000u : 5000000u, NULL, NULL, NULL));
        CHECK_EQ(r.api->cuEventElapsedTime(&ms, start, end), CUDA_ERROR_INVALID_HANDLE); /* never recorded */
        OK(r.api->cuEventRecord(end, r.stream));
        if (!virtual_time)
            CHECK_EQ(r.api->cuEventElapsedTime(&ms, start, end), CUDA_ERROR_NOT_READY);
        set_gate(&g, true);
        OK(r.api->cuStreamSynchronize(r.stream));
        double passed_ms = (double)(real_ns() - begun) / 1e6;
        OK(r.api->cuEventElapsedTime(&ms, start, end));
        if (virtual_time) {
            CHECK_EQ(ms, 3600000.0f);
            CHECK_EQ(trtx_mock_now(r.mock), 3600000000000u);
            trtx_mock_advance(r.mock, 5);
            CHECK_EQ(trtx_mock_now(r.mock), 3600000000005u);
            CHECK(real_ns() - begun < 60000000000u);
        } else {
            CHECK(ms >= 5.0f && (double)ms <= passed_ms + 0.01); /* and a float is that coarse */
        }
        OK(r.api->cuEventElapsedTime(&ms, end, start));
        CHECK(ms < 0);
        OK(r.api->cuEventRecord(silent, r.stream));
        OK(r.api->cuEventSynchronize(silent));
        CHECK_EQ(r.api->cuEventElapsedTime(&ms, start, silent), CUDA_ERROR_INVALID_HANDLE);
        OK(r.api->cuEventDestroy(start));
        OK(r.api->cuEventDestroy(end));
        OK(r.api->cuEventDestroy(silent));
        close_rig(&r);
    }
}

int main(void) {
    RUN(a_call_needs_an_instance_and_init);
    RUN(contexts_are_a_stack_of_each_thread);
    RUN(a_released_context_ends_everything_in_it);
    RUN(stale_and_foreign_handles_are_refused);
    RUN(memory_is_checked);
    RUN(pinned_memory_is_guarded);
    RUN(pageable_memory_is_staged);
    RUN(freed_while_queued_is_a_sticky_700);
    RUN(streams_keep_order_and_say_when_they_are_done);
    RUN(an_event_orders_two_streams);
    RUN(a_late_recording_of_a_destroyed_event_changes_nothing);
    RUN(the_latest_recording_counts_in_whatever_order_they_are_reached);
    RUN(the_null_stream_and_blocking_streams_wait_for_each_other);
    RUN(a_destroyed_stream_finishes_its_work);
    RUN(time_is_measured);
    return report();
}
