/* Lanes beside another library's capture: looking at our events must not invalidate it, and leaves the thread as it was. */
#define _GNU_SOURCE
#include "lane_test.h"

#include "../src/lane_internal.h"

static int thread_mode(rig *r) {
    int mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    OK(r->api->cuThreadExchangeStreamCaptureMode(&mode));
    int found = mode;
    OK(r->api->cuThreadExchangeStreamCaptureMode(&mode));
    return found;
}

static void a_scope_relaxes_and_restores(void) {
    rig r;
    rig_open(&r, 1, 1, TRTX_WAKE_EFFICIENT);
    for (int mode = 0; mode < 3; mode++) {
        trtx_scope scope = {0};
        int before = mode;
        OK(r.api->cuThreadExchangeStreamCaptureMode(&before));
        OK(trtx_scope_enter(&scope, r.api, r.context));
        CHECK_EQ(thread_mode(&r), CU_STREAM_CAPTURE_MODE_RELAXED);
        OK(trtx_scope_enter(&scope, r.api, r.context)); /* the same again */
        trtx_scope_leave(&scope);
        CHECK_EQ(thread_mode(&r), mode);
        trtx_scope_leave(&scope);
        CHECK_EQ(thread_mode(&r), mode);
        OK(r.api->cuThreadExchangeStreamCaptureMode(&before));
    }
    rig_close(&r);
}

static void a_failed_scope_leaves_the_thread_alone(void) {
    rig r;
    trtx_scope scope = {0};
    rig_open(&r, 1, 1, TRTX_WAKE_EFFICIENT);
    CHECK_EQ(trtx_scope_enter(&scope, r.api, (CUcontext)&r), CUDA_ERROR_INVALID_CONTEXT);
    trtx_scope_leave(&scope);
    CHECK_EQ(thread_mode(&r), CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(trtx_mock_inject(r.mock, "cuThreadExchangeStreamCaptureMode", 1, 1, CUDA_ERROR_UNKNOWN, 0, 0));
    OK(trtx_scope_enter(&scope, r.api, r.context));
    trtx_scope_leave(&scope);
    trtx_mock_clear_faults(r.mock);
    CHECK_EQ(thread_mode(&r), CU_STREAM_CAPTURE_MODE_GLOBAL);
    rig_close(&r);
}

typedef struct stranger {
    rig *r;
    _Atomic int stage; /* 1: captures; 2: may end */
    CUresult ended;
} stranger;

static void *capture(void *argument) {
    stranger *s = argument;
    const trtx_cuda_api *api = s->r->api;
    CUstream stream;
    CUgraph graph = NULL;
    CUcontext ours;
    OK(api->cuCtxPushCurrent(s->r->context));
    OK(api->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(api->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    atomic_store(&s->stage, 1);
    while (atomic_load(&s->stage) < 2) nap_us(50);
    s->ended = api->cuStreamEndCapture(stream, &graph);
    if (graph) OK(api->cuGraphDestroy(graph));
    OK(api->cuStreamDestroy(stream));
    OK(api->cuCtxPopCurrent(&ours));
    return NULL;
}

static void a_request_runs_through_a_global_capture(trtx_wake_mode mode, bool watched) {
    rig r;
    rig_open(&r, 1, 2, mode);
    stranger s = {.r = &r};
    pthread_t thread;
    size_t slot;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    CHECK_EQ(pthread_create(&thread, NULL, capture, &s), 0);
    while (atomic_load(&s.stage) < 1) nap_us(50);
    OK(trtx_lane_submit(r.lanes[0], slot, r.gated, 1, r.hub));
    CHECK_EQ(trtx_lane_poll(r.lanes[0]), 1);
    if (watched) {
        OK(trtx_lane_arm(r.lanes[0], slot));
        nap_us(2000);
    }
    atomic_store(&r.open, true);
    if (watched) {
        CHECK(readable(r.fd, 30000));
    } else {
        trtx_completion completion = {0};
        CHECK_EQ(trtx_lane_wait(r.lanes[0], slot, 0, PATIENCE, &completion), TRTX_SLOT_DONE);
        OK(completion.status);
    }
    atomic_store(&s.stage, 2);
    pthread_join(thread, NULL);
    OK(s.ended);
    OK(trtx_lane_release(r.lanes[0], slot));
    rig_close(&r);
}

static void polling_leaves_a_global_capture_alone(void) {
    a_request_runs_through_a_global_capture(TRTX_WAKE_LATENCY, false);
}

static void watching_leaves_a_global_capture_alone(void) {
    a_request_runs_through_a_global_capture(TRTX_WAKE_BALANCED, true);
}

int main(void) {
    TEST(a_scope_relaxes_and_restores);
    TEST(a_failed_scope_leaves_the_thread_alone);
    TEST(polling_leaves_a_global_capture_alone);
    TEST(watching_leaves_a_global_capture_alone);
    return report();
}
