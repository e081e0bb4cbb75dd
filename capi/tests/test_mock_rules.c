/* What the mock knows beyond CUDA's rules: order, observation, regions, kernels without a result, blank kernels, clocks. */
#include "mock_test.h"

static CUresult no_result(void *userdata) {
    trtx_mock_explain(userdata);
    return TRTX_MOCK_NO_RESULT;
}

static size_t damage_of(rig *r) {
    trtx_mock_usage usage;
    trtx_mock_get_usage(r->mock, &usage);
    return usage.damage;
}

static void a_kernel_without_a_result_is_told_to_the_one_who_asked(void) {
    rig r;
    CUevent first, second;
    char text[200];
    open_rig(&r);
    OK(r.api->cuEventCreate(&first, CU_EVENT_DISABLE_TIMING));
    OK(r.api->cuEventCreate(&second, CU_EVENT_DISABLE_TIMING));
    for (int graph = 0; graph < 2; graph++) {
        CUgraphExec exec = NULL;
        if (graph) {
            OK(r.api->cuStreamBeginCapture(r.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
            OK(trtx_mock_launch(r.stream, 0, no_result, "index 99", NULL));
            exec = end_capture(&r, r.stream);
            OK(r.api->cuGraphLaunch(exec, r.stream));
        } else {
            OK(trtx_mock_launch(r.stream, 0, no_result, "index 99", NULL));
        }
        OK(r.api->cuEventRecord(first, r.stream));
        OK(r.api->cuEventRecord(second, r.stream)); /* the next request's */
        while (r.api->cuEventQuery(first) == CUDA_ERROR_NOT_READY) {
        }
        for (int i = 0; i < 2; i++)
            CHECK_EQ(r.api->cuEventQuery(first), CUDA_ERROR_INVALID_VALUE);
        CHECK(strstr(trtx_mock_detail(), "index 99") != NULL);
        trtx_mock_told(r.mock, text, sizeof text);
        CHECK(strcmp(text, "index 99") == 0);
        OK(r.api->cuEventSynchronize(second));
        OK(r.api->cuStreamQuery(r.stream));
        OK(r.api->cuStreamSynchronize(r.stream));
        OK(r.api->cuEventRecord(first, r.stream));
        OK(r.api->cuEventSynchronize(first));
        if (exec)
            OK(r.api->cuGraphExecDestroy(exec));
    }
    OK(trtx_mock_launch(r.stream, 0, no_result, "nobody's event", NULL));
    CHECK_EQ(r.api->cuStreamSynchronize(r.stream), CUDA_ERROR_INVALID_VALUE);
    OK(r.api->cuStreamSynchronize(r.stream)); /* once */
    OK(r.api->cuEventDestroy(first));
    OK(r.api->cuEventDestroy(second));
    close_rig(&r);
}

static trtx_mock_position enqueue(CUstream stream, trtx_mock_kernel run, void *userdata, trtx_mock_region *region) {
    trtx_mock_task task = {.run = run, .userdata = userdata, .region = region, .uncounted = 1};
    trtx_mock_position position;
    OK(trtx_mock_enqueue(stream, &task, &position));
    return position;
}

static void order_is_known_whatever_the_timing(void) {
    rig r;
    gate g = GATE;
    CUstream other, third;
    CUevent event;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    OK(r.api->cuStreamCreate(&third, CU_STREAM_NON_BLOCKING));
    OK(r.api->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    trtx_mock_position at = enqueue(r.stream, pass_gate, &g, NULL);
    CHECK(!trtx_mock_is_reached(at) && !trtx_mock_is_observed(at));
    CHECK(trtx_mock_is_ordered_after(r.mock, r.stream, at));
    CHECK(!trtx_mock_is_ordered_after(r.mock, other, at));
    OK(r.api->cuEventRecord(event, r.stream));
    OK(r.api->cuStreamWaitEvent(other, event, 0));
    CHECK(trtx_mock_is_ordered_after(r.mock, other, at));
    OK(r.api->cuEventRecord(event, other)); /* and through another stream */
    OK(r.api->cuStreamWaitEvent(third, event, 0));
    CHECK(trtx_mock_is_ordered_after(r.mock, third, at));
    set_gate(&g, true);
    trtx_mock_await(r.mock, at);
    CHECK(trtx_mock_is_reached(at) && trtx_mock_is_observed(at));
    at = enqueue(r.stream, NULL, NULL, NULL);
    OK(r.api->cuEventRecord(event, r.stream));
    while (r.api->cuEventQuery(event) == CUDA_ERROR_NOT_READY) {
    }
    CHECK(trtx_mock_is_observed(at));
    at = enqueue(r.stream, NULL, NULL, NULL);
    while (!trtx_mock_is_reached(at)) {
    }
    CHECK(!trtx_mock_is_observed(at)); /* it has happened, and nobody knows */
    trtx_mock_await(r.mock, at);       /* although there is nothing to wait for */
    CHECK(trtx_mock_is_observed(at));
    OK(r.api->cuStreamBeginCapture(r.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    CHECK_EQ(trtx_mock_capture_status(r.stream), CU_STREAM_CAPTURE_STATUS_ACTIVE);
    CHECK_EQ(trtx_mock_capture_status(other), CU_STREAM_CAPTURE_STATUS_NONE);
    at = enqueue(r.stream, NULL, NULL, NULL); /* has not happened */
    CHECK(at.sequence == 0 && trtx_mock_is_reached(at));
    OK(r.api->cuGraphExecDestroy(end_capture(&r, r.stream)));
    OK(r.api->cuEventDestroy(event));
    OK(r.api->cuStreamSynchronize(other));
    OK(r.api->cuStreamDestroy(other));
    OK(r.api->cuStreamDestroy(third));
    close_rig(&r);
}

static void two_kernels_on_one_region_must_be_ordered(void) {
    rig r;
    CUstream other;
    CUevent event;
    CUdeviceptr memory;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    OK(r.api->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(r.api->cuMemAlloc(&memory, 1024));
    trtx_mock_region *a = trtx_mock_region_create(r.mock, memory, 512, "context A");
    trtx_mock_region *b = trtx_mock_region_create(r.mock, memory + 256, 512, "context B");
    trtx_mock_region *c = trtx_mock_region_create(r.mock, memory + 768, 256, "context C");
    enqueue(r.stream, NULL, NULL, a);
    enqueue(other, NULL, NULL, c); /* elsewhere */
    OK(r.api->cuEventRecord(event, r.stream));
    OK(r.api->cuStreamWaitEvent(other, event, 0));
    enqueue(other, NULL, NULL, b); /* ordered by the event */
    OK(r.api->cuStreamSynchronize(other));
    enqueue(r.stream, NULL, NULL, a); /* ordered by the host */
    CHECK_EQ(damage_of(&r), 0);
    OK(r.api->cuStreamBeginCapture(other, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    enqueue(other, NULL, NULL, b);
    CUgraphExec exec = end_capture(&r, other);
    CHECK_EQ(damage_of(&r), 0); /* nothing ran */
    OK(r.api->cuGraphLaunch(exec, other));
    CHECK_EQ(damage_of(&r), 1);
    char text[600];
    trtx_mock_damage(r.mock, text, sizeof text);
    CHECK(strstr(text, "context A and context B") != NULL);
    OK(r.api->cuGraphExecDestroy(exec));
    OK(r.api->cuStreamSynchronize(other));
    trtx_mock_region_release(a);
    trtx_mock_region_release(b);
    trtx_mock_region_release(c);
    drop_rig(&r);
}

static void a_blank_kernel_checks_its_memory_and_its_settings(void) {
    rig r;
    CUdeviceptr memory;
    uint8_t found[64];
    open_rig_as(&r, 1, (size_t)1 << 20, 0, 1);
    OK(r.api->cuMemAlloc(&memory, 1024));
    trtx_mock_stamp *stamp = trtx_mock_stamp_create(0);
    trtx_mock_span input = {memory + 256, 64, "x"}, output = {memory + 512, 64, "y"};
    trtx_mock_blank blank = {.name = "a context", .scratch = {memory, 256, ""}, .inputs = &input, .outputs = &output,
                             .input_count = 1, .output_count = 1, .stamp = stamp, .value = 7};
    OK(trtx_mock_enqueue_blank(r.mock, r.stream, 0, NULL, &blank, NULL));
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(trtx_mock_stamp_get(stamp), 7);
    OK(trtx_mock_read(r.mock, found, output.address, 64));
    CHECK(found[0] == 0 && found[63] == 0);
    OK(r.api->cuStreamBeginCapture(r.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    blank.captured = 1;
    OK(trtx_mock_enqueue_blank(r.mock, r.stream, 0, NULL, &blank, NULL));
    CUgraphExec exec = end_capture(&r, r.stream);
    OK(trtx_mock_write(r.mock, output.address, "lots of bytes that are no zeros", 32));
    OK(r.api->cuGraphLaunch(exec, r.stream));
    OK(trtx_mock_read(r.mock, found, output.address, 64)); /* instant: it is there already */
    CHECK(found[0] == 0 && found[63] == 0);
    CHECK_EQ(damage_of(&r), 0);
    trtx_mock_stamp_renew(stamp, 8); /* the context was enqueued otherwise */
    for (int i = 0; i < 2; i++)
        OK(r.api->cuGraphLaunch(exec, r.stream));
    OK(r.api->cuStreamSynchronize(r.stream));
    OK(trtx_mock_read(r.mock, found, output.address, 64));
    CHECK(found[0] == 0xCB && found[63] == 0xCB);
    CHECK_EQ(damage_of(&r), 1);
    OK(r.api->cuGraphExecDestroy(exec));
    trtx_mock_stamp_set(stamp, TRTX_MOCK_ENDED);
    trtx_mock_stamp_renew(stamp, 9);
    CHECK(trtx_mock_stamp_get(stamp) == TRTX_MOCK_ENDED);
    output.bytes = 1024;
    blank.captured = 0;
    OK(trtx_mock_enqueue_blank(r.mock, r.stream, 0, NULL, &blank, NULL));
    CHECK_EQ(r.api->cuStreamSynchronize(r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(strstr(trtx_mock_detail(), "output 'y'") != NULL);
    trtx_mock_stamp_release(stamp);
    drop_rig(&r);
}

static void memory_of_tensorrt_is_no_call(void) {
    rig r;
    CUdeviceptr pointer;
    char text[600];
    open_rig(&r);
    OK(trtx_mock_inject(r.mock, "cuMemAlloc", 1, 1, CUDA_ERROR_OUT_OF_MEMORY, 0, 0));
    OK(trtx_mock_reserve(100, "weights of 'm'", &pointer));
    CHECK_EQ(trtx_mock_calls(r.mock, "cuMemAlloc"), 0);
    trtx_mock_leaks(r.mock, text, sizeof text);
    CHECK(strstr(text, "of 100 bytes (weights of 'm')") != NULL);
    CHECK(trtx_mock_is_device_address(r.mock, pointer));
    trtx_mock_unreserve(r.mock, pointer);
    trtx_mock_unreserve(r.mock, pointer); /* its context may have been first */
    close_rig(&r);
}

static void time_can_be_shared(void) {
    rig r;
    trtx_mock_time *time = trtx_mock_time_create(5);
    open_rig(&r);
    trtx_mock_set_time(r.mock, time, NULL);
    OK(trtx_mock_launch(r.stream, 1000, NULL, NULL, NULL));
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(trtx_mock_time_now(time), 1005);
    trtx_mock_advance(r.mock, 5);
    CHECK_EQ(trtx_mock_now(r.mock), 1010);
    trtx_mock_time_release(time);
    close_rig(&r);
}

static void a_closed_instance_takes_no_work_and_keeps_its_handles(void) {
    rig r;
    CUstream other;
    open_rig(&r);
    OK(trtx_mock_launch(r.stream, 0, NULL, NULL, NULL));
    OK(r.api->cuStreamSynchronize(r.stream));
    trtx_mock_close(r.mock);
    int device;
    CHECK_EQ(trtx_mock_current(r.mock, &device), CUDA_ERROR_INVALID_CONTEXT); /* off this thread's stack */
    OK(r.api->cuCtxPushCurrent(r.context));
    OK(trtx_mock_current(r.mock, &device));
    CHECK_EQ(trtx_mock_launch(r.stream, 0, NULL, NULL, NULL), CUDA_ERROR_INVALID_CONTEXT);
    OK(r.api->cuStreamCreate(&other, CU_STREAM_NON_BLOCKING)); /* comes by those that have ended */
    OK(r.api->cuStreamDestroy(other));
    OK(r.api->cuStreamSynchronize(r.stream));
    close_rig(&r);
}

int main(void) {
    RUN(a_kernel_without_a_result_is_told_to_the_one_who_asked);
    RUN(order_is_known_whatever_the_timing);
    RUN(two_kernels_on_one_region_must_be_ordered);
    RUN(a_blank_kernel_checks_its_memory_and_its_settings);
    RUN(memory_of_tensorrt_is_no_call);
    RUN(time_can_be_shared);
    RUN(a_closed_instance_takes_no_work_and_keeps_its_handles);
    return report();
}
