/* Planned faults, device loss, and many threads on the mock driver. */
#include "mock_test.h"

static void a_fault_strikes_the_calls_it_was_planned_for(void) {
    rig r;
    CUevent event;
    CUdeviceptr memory;
    open_rig(&r);
    CHECK_EQ(trtx_mock_inject(r.mock, "cuNothing", 1, 1, 304, 0, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_mock_inject(r.mock, "cuMemAlloc", 0, 1, 304, 0, 0), CUDA_ERROR_INVALID_VALUE);
    OK(r.api->cuEventCreate(&event, 0));
    OK(trtx_mock_inject(r.mock, "cuEventRecord", 2, 2, CUDA_ERROR_OPERATING_SYSTEM, 0, 0));
    OK(r.api->cuEventRecord(event, r.stream));
    CHECK_EQ(r.api->cuEventRecord(event, r.stream), CUDA_ERROR_OPERATING_SYSTEM);
    CHECK_EQ(r.api->cuEventRecord(event, r.stream), CUDA_ERROR_OPERATING_SYSTEM);
    OK(r.api->cuEventRecord(event, r.stream));
    CHECK_EQ(trtx_mock_calls(r.mock, "cuEventRecord"), 4);
    OK(trtx_mock_inject(r.mock, "cuMemAlloc", 1, 0, CUDA_ERROR_OUT_OF_MEMORY, 0, 0));
    for (int i = 0; i < 3; i++)
        CHECK_EQ(r.api->cuMemAlloc(&memory, 16), CUDA_ERROR_OUT_OF_MEMORY);
    trtx_mock_clear_faults(r.mock);
    OK(r.api->cuMemAlloc(&memory, 16));
    OK(r.api->cuMemFree(memory));
    OK(trtx_mock_inject(r.mock, "cuStreamQuery", 1, 1, 0, 20000000, 0)); /* slow, and succeeds */
    uint64_t begun = real_ns();
    OK(r.api->cuStreamSynchronize(r.stream));
    OK(r.api->cuStreamQuery(r.stream));
    CHECK(real_ns() - begun >= 20000000);
    OK(r.api->cuEventDestroy(event));
    close_rig(&r);
}

static void a_failed_call_has_no_effect(void) {
    rig r;
    _Atomic int released = 0, runs = 0;
    open_rig(&r);
    OK(trtx_mock_inject(r.mock, "trtx_mock_launch", 1, 1, CUDA_ERROR_OPERATING_SYSTEM, 0, 0));
    CHECK_EQ(trtx_mock_launch(r.stream, 0, count_run, &runs, count_release), CUDA_ERROR_OPERATING_SYSTEM);
    CHECK_EQ(runs, 1); /* the release callback, with the same counter */
    OK(r.api->cuStreamBeginCapture(r.stream, 1));
    OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
    CUgraphExec exec = end_capture(&r, r.stream);
    OK(trtx_mock_inject(r.mock, "cuGraphLaunch", 1, 1, CUDA_ERROR_OPERATING_SYSTEM, 0, 0));
    CHECK_EQ(r.api->cuGraphLaunch(exec, r.stream), CUDA_ERROR_OPERATING_SYSTEM);
    OK(r.api->cuStreamQuery(r.stream));
    OK(trtx_mock_inject(r.mock, "cuGraphExecDestroy", 1, 1, CUDA_ERROR_OPERATING_SYSTEM, 0, 0));
    CHECK_EQ(r.api->cuGraphExecDestroy(exec), CUDA_ERROR_OPERATING_SYSTEM);
    CHECK_EQ(released, 0);
    OK(r.api->cuGraphExecDestroy(exec));
    CHECK_EQ(released, 1);
    close_rig(&r);
}

static void a_kernel_that_fails_makes_its_context_unusable(void) {
    for (int how = 0; how < 3; how++) {
        rig r;
        _Atomic int runs = 0, released = 0;
        CUcontext second, again;
        CUevent event, left;
        CUstream spare;
        open_rig_with(&r, 2, 1 << 20, 0);
        OK(r.api->cuEventCreate(&event, 0));
        OK(r.api->cuEventCreate(&left, 0));
        OK(r.api->cuStreamCreate(&spare, 1));
        if (how == 0) {
            OK(trtx_mock_launch(r.stream, 0, crash, &released, count_release));
        } else {
            OK(trtx_mock_inject(r.mock, how == 1 ? "execute" : "cuEventRecord", 1, 1, how == 1 ? 719 : 0, 0, how == 2));
            if (how == 1)
                OK(trtx_mock_launch(r.stream, 0, count_run, &released, count_release));
        }
        CUresult first = r.api->cuEventRecord(event, r.stream);
        CHECK(first == (how == 2 ? 719 : 0) || first == 719);
        CHECK_EQ(r.api->cuEventSynchronize(event), CUDA_ERROR_LAUNCH_FAILED);
        CHECK_EQ(released, how == 2 ? 0 : 1);
        CHECK_EQ(r.api->cuEventQuery(event), CUDA_ERROR_LAUNCH_FAILED);
        CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_LAUNCH_FAILED);
        CHECK_EQ(trtx_mock_launch(r.stream, 0, count_run, &runs, count_release), CUDA_ERROR_LAUNCH_FAILED);
        CHECK_EQ(runs, 1); /* released, not run */
        CHECK(strstr(trtx_mock_detail(), "context is unusable") != NULL);
        /* what cleans up does so, and says what happened */
        CHECK_EQ(r.api->cuEventDestroy(event), CUDA_ERROR_LAUNCH_FAILED);
        CHECK_EQ(r.api->cuStreamDestroy(spare), CUDA_ERROR_LAUNCH_FAILED);
        trtx_mock_usage usage;
        trtx_mock_get_usage(r.mock, &usage);
        CHECK(usage.events == 1 && usage.streams == 1);
        CHECK_EQ(trtx_mock_describe(r.mock, NULL, 0), 0); /* nothing is held against a faulted context */
        OK(r.api->cuDevicePrimaryCtxRetain(&second, 1)); /* the other device goes on */
        OK(r.api->cuCtxPushCurrent(second));
        CUstream stream;
        OK(r.api->cuStreamCreate(&stream, 0));
        OK(trtx_mock_launch(stream, 0, count_run, &runs, NULL));
        OK(r.api->cuStreamSynchronize(stream));
        OK(r.api->cuStreamDestroy(stream));
        OK(r.api->cuCtxPopCurrent(NULL));
        OK(r.api->cuDevicePrimaryCtxRelease(1));
        OK(r.api->cuDevicePrimaryCtxRelease(0));
        OK(r.api->cuDevicePrimaryCtxRetain(&again, 0));
        OK(r.api->cuStreamCreate(&stream, 0)); /* healthy again */
        CHECK_EQ(r.api->cuEventQuery(left), CUDA_ERROR_INVALID_HANDLE);
        drop_rig(&r);
    }
}

static void a_sticky_code_is_sticky_however_it_is_planned(void) {
    rig r;
    open_rig(&r);
    OK(trtx_mock_inject(r.mock, "cuStreamQuery", 1, 1, CUDA_ERROR_ILLEGAL_ADDRESS, 0, 0));
    CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    drop_rig(&r);
}

static void a_lost_device_ends_everything_in_flight(void) {
    rig r;
    _Atomic int released = 0, runs = 0;
    CUstream other, bystander;
    CUevent event;
    open_rig_with(&r, 1, 1 << 20, 0);
    OK(r.api->cuStreamCreate(&other, 1));
    OK(r.api->cuStreamCreate(&bystander, 1));
    OK(r.api->cuEventCreate(&event, 0));
    uint64_t begun = real_ns();
    for (int i = 0; i < 50; i++) /* hours of work on two streams, one of which waits for the other */
        OK(trtx_mock_launch(r.stream, 3600000000000u, count_run, &runs, NULL));
    OK(r.api->cuEventRecord(event, r.stream));
    OK(r.api->cuStreamWaitEvent(other, event, 0));
    for (int i = 0; i < 50; i++)
        OK(trtx_mock_launch(other, 0, NULL, &released, count_release));
    OK(r.api->cuStreamDestroy(other)); /* still to finish */
    nap_ms(2);
    CHECK_EQ(r.api->cuEventQuery(event), CUDA_ERROR_NOT_READY);
    OK(trtx_mock_launch(bystander, 0, crash, NULL, NULL));
    CHECK_EQ(r.api->cuEventSynchronize(event), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ(r.api->cuStreamSynchronize(r.stream), CUDA_ERROR_LAUNCH_FAILED);
    drop_rig(&r);
    CHECK(real_ns() - begun < 20000000000u);
    CHECK_EQ(released, 50);
    CHECK_EQ(runs, 0);
}

/* ---- many threads ---- */

enum { THREADS = 8, ROUNDS = 200 };

typedef struct actor {
    rig *r;
    int number;
    pthread_t thread;
} actor;

static void *use_everything(void *argument) {
    actor *a = argument;
    const trtx_cuda_api *api = a->r->api;
    _Atomic int runs = 0, released = 0;
    CUstream stream, side;
    CUevent event, joined;
    CUdeviceptr device;
    uint8_t *in, *out;
    OK(api->cuCtxPushCurrent(a->r->context));
    OK(api->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(api->cuStreamCreate(&side, a->number % 2 ? CU_STREAM_NON_BLOCKING : 0));
    OK(api->cuEventCreate(&event, 0));
    OK(api->cuEventCreate(&joined, CU_EVENT_DISABLE_TIMING));
    OK(api->cuMemHostAlloc((void **)&in, 256, 0));
    OK(api->cuMemHostAlloc((void **)&out, 256, 0));
    OK(api->cuMemAlloc(&device, 256));
    OK(api->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    OK(api->cuMemcpyHtoDAsync(device, in, 256, stream));
    OK(trtx_mock_launch(stream, 1000, count_run, &runs, NULL));
    OK(trtx_mock_launch(stream, 0, NULL, &released, count_release));
    OK(api->cuMemcpyDtoHAsync(out, device, 256, stream));
    CUgraphExec exec = end_capture(a->r, stream);
    for (int i = 0; i < ROUNDS; i++) {
        CUdeviceptr scratch;
        CUstream brief;
        memset(in, i + a->number, 256);
        OK(api->cuGraphLaunch(exec, stream));
        OK(api->cuEventRecord(event, stream));
        OK(api->cuStreamWaitEvent(side, event, 0));
        OK(api->cuMemAlloc(&scratch, 100));
        OK(api->cuMemsetD8Async(scratch, 1, 100, side));
        OK(api->cuEventRecord(joined, side));
        if (i % 16 == 0) {
            OK(trtx_mock_launch(NULL, 0, NULL, NULL, NULL));
            OK(api->cuStreamCreate(&brief, 0));
            OK(api->cuStreamWaitEvent(brief, joined, 0));
            OK(api->cuStreamDestroy(brief));
        }
        CUresult found;
        while ((found = i % 2 ? api->cuEventQuery(event) : api->cuStreamQuery(stream)) == CUDA_ERROR_NOT_READY)
            sched_yield();
        OK(found);
        CHECK_EQ(out[255], (uint8_t)(i + a->number));
        OK(api->cuEventSynchronize(joined));
        OK(api->cuMemFree(scratch));
    }
    CHECK_EQ(runs, ROUNDS);
    OK(api->cuGraphExecDestroy(exec));
    CHECK_EQ(released, 1);
    OK(api->cuStreamDestroy(stream));
    OK(api->cuStreamDestroy(side));
    OK(api->cuEventDestroy(event));
    OK(api->cuEventDestroy(joined));
    OK(api->cuMemFree(device));
    OK(api->cuMemFreeHost(in));
    OK(api->cuMemFreeHost(out));
    OK(api->cuCtxPopCurrent(NULL));
    return NULL;
}

static void many_threads_share_one_instance(void) {
    rig r;
    actor actors[THREADS];
    open_rig(&r);
    for (int i = 0; i < THREADS; i++) {
        actors[i] = (actor){.r = &r, .number = i};
        pthread_create(&actors[i].thread, NULL, use_everything, &actors[i]);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(actors[i].thread, NULL);
    close_rig(&r);
}

static void *own_instance(void *argument) {
    rig r;
    open_rig(&r);
    actor a = {.r = &r, .number = (int)(intptr_t)argument};
    use_everything(&a);
    close_rig(&r);
    return NULL;
}

static void many_instances_live_beside_each_other(void) {
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, own_instance, (void *)(intptr_t)i);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

typedef struct shared_event {
    rig *r;
    _Atomic(CUevent) event;
    _Atomic bool stop;
} shared_event;

static void *query_it(void *argument) {
    shared_event *s = argument;
    OK(s->r->api->cuCtxPushCurrent(s->r->context));
    while (!atomic_load(&s->stop)) {
        CUresult found = s->r->api->cuEventQuery(atomic_load(&s->event));
        CHECK(found == CUDA_SUCCESS || found == CUDA_ERROR_NOT_READY || found == CUDA_ERROR_INVALID_HANDLE);
    }
    return NULL;
}

static void a_query_may_race_with_a_destroy(void) {
    rig r;
    pthread_t threads[3];
    shared_event s = {.r = &r};
    open_rig(&r);
    for (int i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, query_it, &s);
    for (int i = 0; i < 3000; i++) {
        CUevent event;
        OK(r.api->cuEventCreate(&event, 0));
        atomic_store(&s.event, event);
        OK(r.api->cuEventRecord(event, r.stream));
        OK(r.api->cuEventDestroy(event));
    }
    atomic_store(&s.stop, true);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    close_rig(&r);
}

typedef struct caller {
    rig *r;
    _Atomic uint64_t struck;
    _Atomic bool stop;
} caller;

static void *call_on(void *argument) {
    caller *c = argument;
    OK(c->r->api->cuCtxPushCurrent(c->r->context));
    while (!atomic_load(&c->stop)) {
        if (c->r->api->cuStreamQuery(c->r->stream) == CUDA_ERROR_INVALID_VALUE)
            atomic_fetch_add(&c->struck, 1);
    }
    return NULL;
}

/* The next call, whichever that is, also when it is made while the fault is planned. */
static void a_fault_is_not_missed_by_who_calls_meanwhile(void) {
    rig r;
    caller c = {.r = &r};
    pthread_t thread;
    open_rig(&r);
    pthread_create(&thread, NULL, call_on, &c);
    for (uint64_t planned = 1; planned <= 5000; planned++) {
        OK(trtx_mock_inject(r.mock, "cuStreamQuery", 1, 1, CUDA_ERROR_INVALID_VALUE, 0, 0));
        uint64_t until = trtx_mock_calls(r.mock, "cuStreamQuery") + 1000;
        while (atomic_load(&c.struck) < planned && trtx_mock_calls(r.mock, "cuStreamQuery") < until) {
        }
        CHECK_EQ(atomic_load(&c.struck), planned);
        trtx_mock_clear_faults(r.mock);
        if (atomic_load(&c.struck) != planned)
            break;
    }
    atomic_store(&c.stop, true);
    pthread_join(thread, NULL);
    close_rig(&r);
}

static void ten_thousand_replays_keep_nothing(void) {
    rig r;
    _Atomic int runs = 0;
    uint32_t *in, *out;
    CUdeviceptr device;
    CUevent event;
    trtx_mock_usage before, after;
    open_rig(&r);
    OK(r.api->cuMemHostAlloc((void **)&in, 64, 0));
    OK(r.api->cuMemHostAlloc((void **)&out, 64, 0));
    OK(r.api->cuMemAlloc(&device, 64));
    OK(r.api->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(r.api->cuStreamBeginCapture(r.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    OK(r.api->cuMemcpyHtoDAsync(device, in, 64, r.stream));
    OK(trtx_mock_launch(r.stream, 0, count_run, &runs, NULL));
    OK(r.api->cuMemcpyDtoHAsync(out, device, 64, r.stream));
    CUgraphExec exec = end_capture(&r, r.stream);
    trtx_mock_get_usage(r.mock, &before);
    for (uint32_t i = 0; i < 10000; i++) {
        in[0] = in[15] = i;
        OK(r.api->cuGraphLaunch(exec, r.stream));
        OK(r.api->cuEventRecord(event, r.stream));
        OK(r.api->cuEventSynchronize(event));
        OK(r.api->cuEventQuery(event));
        CHECK(out[0] == i && out[15] == i);
    }
    CHECK_EQ(runs, 10000);
    trtx_mock_get_usage(r.mock, &after);
    CHECK(memcmp(&before, &after, sizeof before) == 0);
    OK(r.api->cuGraphExecDestroy(exec));
    OK(r.api->cuEventDestroy(event));
    OK(r.api->cuMemFree(device));
    OK(r.api->cuMemFreeHost(in));
    OK(r.api->cuMemFreeHost(out));
    close_rig(&r);
}

int main(void) {
    RUN(a_fault_strikes_the_calls_it_was_planned_for);
    RUN(a_failed_call_has_no_effect);
    RUN(a_kernel_that_fails_makes_its_context_unusable);
    RUN(a_sticky_code_is_sticky_however_it_is_planned);
    RUN(a_lost_device_ends_everything_in_flight);
    RUN(many_threads_share_one_instance);
    RUN(many_instances_live_beside_each_other);
    RUN(a_query_may_race_with_a_destroy);
    RUN(a_fault_is_not_missed_by_who_calls_meanwhile);
    RUN(ten_thousand_replays_keep_nothing);
    return report();
}
