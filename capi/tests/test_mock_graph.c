/* Capture, graphs and executables of the mock driver, one thread at a time (but for who may end a capture). */
#include "mock_test.h"

static int status_of(rig *r, CUstream stream) {
    int status = -1;
    OK(r->api->cuStreamIsCapturing(stream, &status));
    return status;
}

static void begin(rig *r) { OK(r->api->cuStreamBeginCapture(r->stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)); }

static void a_capture_records_and_a_replay_runs(void) {
    rig r;
    _Atomic int runs = 0, released = 0;
    uint8_t *in, *out;
    CUdeviceptr a, b;
    open_rig(&r);
    OK(r.api->cuMemHostAlloc((void **)&in, 64, 0));
    OK(r.api->cuMemHostAlloc((void **)&out, 64, 0));
    OK(r.api->cuMemAlloc(&a, 64));
    OK(r.api->cuMemAlloc(&b, 64));
    CHECK_EQ(status_of(&r, r.stream), CU_STREAM_CAPTURE_STATUS_NONE);
    begin(&r);
    CHECK_EQ(status_of(&r, r.stream), CU_STREAM_CAPTURE_STATUS_ACTIVE);
    OK(r.api->cuMemcpyHtoDAsync(a, in, 64, r.stream));
    OK(r.api->cuMemsetD8Async(a, 9, 1, r.stream));
    OK(trtx_mock_launch(r.stream, 0, count_run, &runs, NULL));
    OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
    OK(r.api->cuMemcpyDtoDAsync(b, a, 64, r.stream));
    OK(r.api->cuMemcpyDtoHAsync(out, b, 64, r.stream));
    CUgraph graph;
    CUgraphExec exec, twin;
    OK(r.api->cuStreamEndCapture(r.stream, &graph));
    CHECK_EQ(status_of(&r, r.stream), CU_STREAM_CAPTURE_STATUS_NONE);
    size_t count = 0;
    OK(r.api->cuGraphGetNodes(graph, NULL, &count));
    CHECK_EQ(count, 6);
    CUgraphNode nodes[8] = {(CUgraphNode)&r};
    count = 8;
    OK(r.api->cuGraphGetNodes(graph, nodes, &count));
    CHECK(count == 6 && nodes[0] && nodes[5] && nodes[0] != nodes[5] && !nodes[6]);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(runs, 0); /* nothing ran yet */
    CHECK_EQ(out[0], 0xCD);
    CHECK_EQ(r.api->cuGraphInstantiate(&exec, graph, 1 << 20), CUDA_ERROR_INVALID_VALUE);
    OK(r.api->cuGraphInstantiate(&exec, graph, 0));
    OK(r.api->cuGraphInstantiate(&twin, graph, 0));
    OK(r.api->cuGraphDestroy(graph));
    CHECK_EQ(r.api->cuGraphDestroy(graph), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(r.api->cuGraphInstantiate(&exec, graph, 0), CUDA_ERROR_INVALID_HANDLE);
    for (int i = 0; i < 5; i++) { /* the same pinned address each time, with what is there at that moment */
        memset(in, i, 64);
        OK(r.api->cuGraphLaunch(i % 2 ? twin : exec, r.stream));
        OK(r.api->cuStreamSynchronize(r.stream));
        CHECK(out[0] == 9 && out[1] == i && out[63] == i);
    }
    CHECK_EQ(runs, 5);
    CHECK_EQ(released, 0);
    OK(r.api->cuGraphExecDestroy(exec));
    CHECK_EQ(r.api->cuGraphLaunch(exec, r.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(released, 0); /* the twin still has it */
    OK(r.api->cuGraphExecDestroy(twin));
    CHECK_EQ(released, 1);
    OK(r.api->cuMemFree(a));
    OK(r.api->cuMemFree(b));
    OK(r.api->cuMemFreeHost(in));
    OK(r.api->cuMemFreeHost(out));
    close_rig(&r);
}

static void an_empty_capture_is_an_empty_graph(void) {
    rig r;
    CUgraph graph;
    CUgraphExec exec;
    size_t count = 9;
    open_rig(&r);
    begin(&r);
    OK(r.api->cuStreamEndCapture(r.stream, &graph));
    OK(r.api->cuGraphGetNodes(graph, NULL, &count));
    CHECK_EQ(count, 0);
    OK(r.api->cuGraphInstantiate(&exec, graph, 0));
    OK(r.api->cuGraphLaunch(exec, r.stream)); /* fast, and does nothing: what a canary run is for */
    OK(r.api->cuGraphExecDestroy(exec));
    OK(r.api->cuGraphDestroy(graph));
    close_rig(&r);
}

/* What is illegal while a stream captures; each gets a capture of its own. */
typedef CUresult (*forbidden)(rig *r, CUevent captured, CUevent other, CUdeviceptr memory);

static CUresult query_stream(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c, (void)o, (void)m; return r->api->cuStreamQuery(r->stream); }
static CUresult sync_stream(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c, (void)o, (void)m; return r->api->cuStreamSynchronize(r->stream); }
static CUresult query_captured(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)o, (void)m; return r->api->cuEventQuery(c); }
static CUresult sync_captured(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)o, (void)m; return r->api->cuEventSynchronize(c); }
static CUresult query_other(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c, (void)m; return r->api->cuEventQuery(o); }
static CUresult allocate(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c, (void)o, (void)m; return r->api->cuMemAlloc(&m, 16); }
static CUresult free_memory(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c, (void)o; return r->api->cuMemFree(m); }
static CUresult allocate_pinned(rig *r, CUevent c, CUevent o, CUdeviceptr m) { void *p; (void)c, (void)o, (void)m; return r->api->cuMemHostAlloc(&p, 16, 0); }
static CUresult copy_pageable(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c; return r->api->cuMemcpyHtoDAsync(m, &o, 4, r->stream); }
static CUresult read_pageable(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c; return r->api->cuMemcpyDtoHAsync(&o, m, 4, r->stream); }
static CUresult wait_outside(rig *r, CUevent c, CUevent o, CUdeviceptr m) { (void)c, (void)m; return r->api->cuStreamWaitEvent(r->stream, o, 0); }

static void illegal_calls_invalidate_a_capture(void) {
    static const struct { const char *name; forbidden call; CUresult in_thread, elsewhere; } cases[] = {
        {"cuStreamQuery", query_stream, 900, 900}, {"cuStreamSynchronize", sync_stream, 900, 900},
        {"cuEventQuery, captured", query_captured, 900, 907}, {"cuEventSynchronize, captured", sync_captured, 900, 907},
        {"cuEventQuery", query_other, 900, 0}, {"cuMemAlloc", allocate, 900, 0}, {"cuMemFree", free_memory, 900, 0},
        {"cuMemHostAlloc", allocate_pinned, 900, 0}, {"HtoD, pageable", copy_pageable, 900, 900},
        {"DtoH, pageable", read_pageable, 900, 900}, {"wait for outside", wait_outside, 905, 905},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int relaxed = 0; relaxed < 2; relaxed++) {
            rig r;
            CUevent captured, outside;
            CUdeviceptr memory;
            CUgraph graph = (CUgraph)&r;
            _Atomic int released = 0;
            open_rig(&r);
            OK(r.api->cuEventCreate(&captured, 0));
            OK(r.api->cuEventCreate(&outside, 0));
            OK(r.api->cuMemAlloc(&memory, 64));
            OK(r.api->cuEventRecord(outside, r.stream));
            OK(r.api->cuStreamSynchronize(r.stream));
            /* relaxed stands for "another thread": potentially unsafe calls are allowed, impossible ones are not */
            OK(r.api->cuStreamBeginCapture(r.stream, relaxed ? CU_STREAM_CAPTURE_MODE_RELAXED : CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
            OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
            OK(r.api->cuEventRecord(captured, r.stream));
            CUresult expected = relaxed ? cases[i].elsewhere : cases[i].in_thread, found = cases[i].call(&r, captured, outside, memory);
            if (found != expected)
                fprintf(stderr, "%s, relaxed %d: ", cases[i].name, relaxed);
            CHECK_EQ(found, expected);
            CHECK_EQ(status_of(&r, r.stream), expected ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE);
            if (expected)
                CHECK_EQ(trtx_mock_launch(r.stream, 0, NULL, NULL, NULL), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), expected ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS);
            CHECK((graph == NULL) == (expected != 0));
            CHECK_EQ(released, expected != 0); /* dropped with the capture */
            CHECK_EQ(status_of(&r, r.stream), CU_STREAM_CAPTURE_STATUS_NONE);
            CHECK_EQ(r.api->cuEventQuery(captured), CUDA_ERROR_CAPTURED_EVENT); /* until it is recorded again */
            OK(r.api->cuEventRecord(captured, r.stream));
            OK(r.api->cuEventSynchronize(captured));
            drop_rig(&r);
        }
    }
}

static void capture_misuse_is_refused(void) {
    rig r;
    CUgraph graph;
    CUstream blocking;
    int status;
    open_rig(&r);
    CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), 401);
    CHECK_EQ(r.api->cuStreamBeginCapture(NULL, 1), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    CHECK_EQ(r.api->cuStreamBeginCapture(r.stream, 3), CUDA_ERROR_INVALID_VALUE);
    begin(&r);
    CHECK_EQ(r.api->cuStreamBeginCapture(r.stream, 1), 401);
    OK(r.api->cuStreamEndCapture(r.stream, &graph));
    OK(r.api->cuGraphDestroy(graph));
    OK(r.api->cuStreamCreate(&blocking, 0));
    OK(r.api->cuStreamBeginCapture(blocking, CU_STREAM_CAPTURE_MODE_RELAXED));
    CHECK_EQ(r.api->cuStreamIsCapturing(NULL, &status), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    CHECK_EQ(trtx_mock_launch(NULL, 0, NULL, NULL, NULL), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    CHECK_EQ(r.api->cuStreamEndCapture(blocking, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin(&r); /* a non-blocking one leaves the NULL stream alone */
    OK(trtx_mock_launch(NULL, 0, NULL, NULL, NULL));
    OK(r.api->cuStreamEndCapture(r.stream, &graph));
    OK(r.api->cuGraphDestroy(graph));
    _Atomic int released = 0;
    OK(r.api->cuStreamBeginCapture(blocking, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    OK(trtx_mock_launch(blocking, 0, NULL, &released, count_release));
    OK(r.api->cuStreamDestroy(blocking)); /* takes its capture with it */
    CHECK_EQ(released, 1);
    CUdeviceptr memory;
    OK(r.api->cuMemAlloc(&memory, 1)); /* nothing captures any more */
    OK(r.api->cuMemFree(memory));
    close_rig(&r);
}

static void a_capture_spreads_over_streams_and_must_join(void) {
    for (int joined = 0; joined < 2; joined++) {
        rig r;
        CUstream side;
        CUevent fork, join;
        CUgraph graph = NULL;
        size_t count = 0;
        open_rig(&r);
        OK(r.api->cuStreamCreate(&side, CU_STREAM_NON_BLOCKING));
        OK(r.api->cuEventCreate(&fork, 2));
        OK(r.api->cuEventCreate(&join, 2));
        begin(&r);
        OK(trtx_mock_launch(r.stream, 0, NULL, NULL, NULL));
        OK(r.api->cuEventRecord(fork, r.stream));
        OK(r.api->cuStreamWaitEvent(side, fork, 0));
        CHECK_EQ(status_of(&r, side), CU_STREAM_CAPTURE_STATUS_ACTIVE);
        OK(trtx_mock_launch(side, 0, NULL, NULL, NULL));
        if (joined) {
            OK(r.api->cuEventRecord(join, side));
            OK(r.api->cuStreamWaitEvent(r.stream, join, 0));
        }
        CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), joined ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        CHECK_EQ(status_of(&r, side), CU_STREAM_CAPTURE_STATUS_NONE);
        if (joined) {
            OK(r.api->cuGraphGetNodes(graph, NULL, &count));
            CHECK_EQ(count, 2);
            OK(r.api->cuGraphDestroy(graph));
        }
        /* its events mean nothing to a running stream, and two captures do not mix */
        CHECK_EQ(r.api->cuStreamWaitEvent(side, fork, 0), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        begin(&r);
        OK(r.api->cuEventRecord(fork, r.stream));
        OK(r.api->cuStreamBeginCapture(side, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
        CHECK_EQ(r.api->cuStreamWaitEvent(side, fork, 0), CUDA_ERROR_STREAM_CAPTURE_MERGE);
        CHECK_EQ(r.api->cuStreamEndCapture(side, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        begin(&r);
        OK(r.api->cuEventRecord(fork, r.stream));
        OK(r.api->cuStreamWaitEvent(side, fork, 0));
        CHECK_EQ(r.api->cuStreamEndCapture(side, &graph), CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
        CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        OK(r.api->cuEventDestroy(fork));
        OK(r.api->cuEventDestroy(join));
        OK(r.api->cuStreamDestroy(side));
        close_rig(&r);
    }
}

typedef struct elsewhere {
    rig *r;
    CUevent event;
    CUresult allocation, query, ending;
} elsewhere;

static void *call_elsewhere(void *argument) {
    elsewhere *e = argument;
    CUdeviceptr memory = 0;
    CUgraph graph = NULL;
    OK(e->r->api->cuCtxPushCurrent(e->r->context));
    e->allocation = e->r->api->cuMemAlloc(&memory, 16);
    e->query = e->r->api->cuEventQuery(e->event);
    if (!e->allocation)
        OK(e->r->api->cuMemFree(memory));
    e->ending = e->r->api->cuStreamEndCapture(e->r->stream, &graph);
    if (graph)
        OK(e->r->api->cuGraphDestroy(graph));
    OK(e->r->api->cuCtxPopCurrent(NULL));
    return NULL;
}

static void modes_decide_what_other_threads_may_do(void) {
    static const CUresult expected[3][4] = {{900, 900, 908, 901}, {0, 0, 908, 0}, {0, 0, 0, 401}};
    for (int mode = 0; mode < 3; mode++) {
        rig r;
        pthread_t thread;
        CUgraph graph = NULL;
        elsewhere e = {.r = &r};
        open_rig(&r);
        OK(r.api->cuEventCreate(&e.event, 0));
        OK(r.api->cuStreamBeginCapture(r.stream, mode));
        pthread_create(&thread, NULL, call_elsewhere, &e);
        pthread_join(thread, NULL);
        CHECK_EQ(e.allocation, expected[mode][0]);
        CHECK_EQ(e.query, expected[mode][1]);
        CHECK_EQ(e.ending, expected[mode][2]);
        CHECK_EQ(r.api->cuStreamEndCapture(r.stream, &graph), expected[mode][3]);
        if (graph)
            OK(r.api->cuGraphDestroy(graph));
        OK(r.api->cuEventDestroy(e.event));
        close_rig(&r);
    }
}

static void an_executable_runs_once_at_a_time(void) {
    rig r;
    gate g = GATE;
    CUstream other;
    open_rig(&r);
    OK(r.api->cuStreamCreate(&other, 1));
    begin(&r);
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    CUgraphExec exec = end_capture(&r, r.stream);
    OK(r.api->cuGraphLaunch(exec, r.stream));
    OK(r.api->cuGraphLaunch(exec, other));
    await_entered(&g, 1);
    nap_ms(10);
    pthread_mutex_lock(&g.lock);
    CHECK_EQ(g.entered, 1);
    pthread_mutex_unlock(&g.lock);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(other));
    CHECK_EQ(g.entered, 2);
    OK(r.api->cuGraphExecDestroy(exec));
    OK(r.api->cuStreamDestroy(other));
    close_rig(&r);
}

static void an_executable_destroyed_in_flight_finishes_first(void) {
    rig r;
    gate g = GATE;
    _Atomic int released = 0, runs = 0;
    open_rig(&r);
    begin(&r);
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    OK(trtx_mock_launch(r.stream, 0, count_run, &runs, NULL));
    OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
    CUgraphExec exec = end_capture(&r, r.stream);
    OK(r.api->cuGraphLaunch(exec, r.stream));
    OK(r.api->cuGraphLaunch(exec, r.stream));
    await_entered(&g, 1);
    OK(r.api->cuGraphExecDestroy(exec));
    CHECK_EQ(r.api->cuGraphLaunch(exec, r.stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK_EQ(released, 0);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(released, 1);
    CHECK_EQ(runs, 2);
    close_rig(&r);
}

static void a_replay_sees_freed_memory(void) {
    for (int pinned = 0; pinned < 2; pinned++) {
        rig r;
        CUdeviceptr memory;
        void *host;
        open_rig(&r);
        OK(r.api->cuMemAlloc(&memory, 16));
        OK(r.api->cuMemHostAlloc(&host, 16, 0));
        begin(&r);
        OK(r.api->cuMemcpyDtoHAsync(host, memory, 16, r.stream));
        CUgraphExec exec = end_capture(&r, r.stream);
        OK(r.api->cuGraphLaunch(exec, r.stream));
        OK(r.api->cuStreamSynchronize(r.stream));
        OK(pinned ? r.api->cuMemFreeHost(host) : r.api->cuMemFree(memory));
        OK(r.api->cuGraphLaunch(exec, r.stream));
        CHECK_EQ(r.api->cuStreamSynchronize(r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
        CHECK_EQ(r.api->cuGraphLaunch(exec, r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
        drop_rig(&r);
    }
}

static void what_is_left_open_is_named_and_freed(void) {
    rig r;
    gate g = GATE;
    CUgraph graph;
    CUgraphExec exec;
    char text[2000];
    _Atomic int released = 0;
    trtx_mock_usage usage;
    open_rig(&r);
    begin(&r);
    OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
    OK(r.api->cuStreamEndCapture(r.stream, &graph));
    OK(r.api->cuGraphInstantiate(&exec, graph, 0));
    begin(&r); /* and a capture that nobody ends */
    OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
    trtx_mock_get_usage(r.mock, &usage);
    CHECK(usage.graphs == 1 && usage.execs == 1 && usage.streams == 1 && usage.retained_contexts == 1);
    size_t needed = trtx_mock_describe(r.mock, NULL, 0);
    CHECK_EQ(trtx_mock_describe(r.mock, text, sizeof text), needed);
    CHECK_EQ(strlen(text), needed);
    CHECK(strstr(text, "executable graph") && strstr(text, "\ngraph") && strstr(text, "stream"));
    (void)g;
    OK(r.api->cuCtxPopCurrent(NULL));
    trtx_mock_destroy(r.mock); /* not even released */
    CHECK_EQ(released, 2);
    trtx_mock_select(NULL);
}

static CUresult note_thread(void *userdata) {
    *(pthread_t *)userdata = pthread_self();
    return CUDA_SUCCESS;
}

static void instant_replays_run_in_the_launch_and_keep_order(void) {
    rig r;
    gate g = GATE;
    pthread_t where;
    _Atomic int released = 0;
    open_rig_as(&r, 1, 1 << 20, 0, 1);
    begin(&r);
    OK(trtx_mock_launch(r.stream, 0, note_thread, &where, NULL));
    OK(trtx_mock_launch(r.stream, 0, NULL, &released, count_release));
    CUgraphExec exec = end_capture(&r, r.stream);
    memset(&where, 0, sizeof where);
    OK(r.api->cuGraphLaunch(exec, r.stream));
    OK(r.api->cuStreamQuery(r.stream)); /* done already */
    CHECK(pthread_equal(where, pthread_self()));
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL)); /* a stream that is busy, and the replay behind it */
    memset(&where, 0, sizeof where);
    OK(r.api->cuGraphLaunch(exec, r.stream));
    CHECK_EQ(r.api->cuStreamQuery(r.stream), CUDA_ERROR_NOT_READY);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK(!pthread_equal(where, pthread_self()));
    OK(trtx_mock_inject(r.mock, "execute", 1, 1, CUDA_ERROR_LAUNCH_FAILED, 0, 0)); /* faults strike on the stream */
    OK(r.api->cuGraphLaunch(exec, r.stream));
    CHECK_EQ(r.api->cuStreamSynchronize(r.stream), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ(r.api->cuGraphExecDestroy(exec), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ(released, 1);
    drop_rig(&r);
    open_rig_as(&r, 1, 1 << 20, 0, 1);
    begin(&r);
    OK(trtx_mock_launch(r.stream, 0, crash, NULL, NULL));
    exec = end_capture(&r, r.stream);
    OK(r.api->cuGraphLaunch(exec, r.stream)); /* asynchronous all the same: the next call says it */
    CHECK_EQ(r.api->cuGraphLaunch(exec, r.stream), CUDA_ERROR_LAUNCH_FAILED);
    drop_rig(&r);
}

typedef struct instant_actor {
    rig *r;
    CUgraphExec exec;
} instant_actor;

static void *launch_often(void *argument) {
    instant_actor *a = argument;
    OK(a->r->api->cuCtxPushCurrent(a->r->context));
    for (int i = 0; i < 1000; i++) {
        OK(a->r->api->cuGraphLaunch(a->exec, a->r->stream));
        if (i % 64 == 0)
            OK(a->r->api->cuStreamSynchronize(a->r->stream));
    }
    return NULL;
}

static int plain_runs;

static CUresult count_plainly(void *userdata) {
    (void)userdata;
    plain_runs++; /* no atomic: one executable runs once at a time, wherever it runs */
    return CUDA_SUCCESS;
}

static void instant_replays_from_many_threads_run_one_by_one(void) {
    rig r;
    pthread_t threads[4];
    open_rig_as(&r, 1, 1 << 20, 0, 1);
    begin(&r);
    OK(trtx_mock_launch(r.stream, 0, count_plainly, NULL, NULL));
    instant_actor a = {&r, end_capture(&r, r.stream)};
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, launch_often, &a);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    OK(r.api->cuStreamSynchronize(r.stream));
    CHECK_EQ(plain_runs, 4000);
    OK(r.api->cuGraphExecDestroy(a.exec));
    close_rig(&r);
}

int main(void) {
    RUN(a_capture_records_and_a_replay_runs);
    RUN(an_empty_capture_is_an_empty_graph);
    RUN(illegal_calls_invalidate_a_capture);
    RUN(capture_misuse_is_refused);
    RUN(a_capture_spreads_over_streams_and_must_join);
    RUN(modes_decide_what_other_threads_may_do);
    RUN(an_executable_runs_once_at_a_time);
    RUN(an_executable_destroyed_in_flight_finishes_first);
    RUN(a_replay_sees_freed_memory);
    RUN(instant_replays_run_in_the_launch_and_keep_order);
    RUN(instant_replays_from_many_threads_run_one_by_one);
    RUN(what_is_left_open_is_named_and_freed);
    return report();
}
