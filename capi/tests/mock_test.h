/* What the tests of the mock driver share: checks that count, a rig with one instance and its context, a gate for kernels. */
#ifndef MOCK_TEST_H
#define MOCK_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mock_driver.h"

#define CHECK_DETAIL trtx_mock_detail()
#include "check.h"

static inline void nap_ms(long ms) {
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

/* A kernel that waits until the test opens it, so that "in flight" is a state to look at and not a race. */
typedef struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool open;
    int entered;
} gate;

#define GATE {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, 0}

static inline CUresult pass_gate(void *userdata) {
    gate *g = userdata;
    pthread_mutex_lock(&g->lock);
    g->entered++;
    pthread_cond_broadcast(&g->changed);
    while (!g->open)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
    return CUDA_SUCCESS;
}

static inline void set_gate(gate *g, bool open) {
    pthread_mutex_lock(&g->lock);
    g->open = open;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

static inline void await_entered(gate *g, int times) {
    pthread_mutex_lock(&g->lock);
    while (g->entered < times)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

static inline CUresult count_run(void *userdata) {
    atomic_fetch_add((_Atomic int *)userdata, 1);
    return CUDA_SUCCESS;
}

static inline CUresult crash(void *userdata) {
    (void)userdata;
    return CUDA_ERROR_LAUNCH_FAILED;
}

static inline void count_release(void *userdata) { atomic_fetch_add((_Atomic int *)userdata, 1); }

/* One instance, device 0 retained and current, one non-blocking stream. */
typedef struct rig {
    trtx_mock *mock;
    const trtx_cuda_api *api;
    CUcontext context;
    CUstream stream;
} rig;

static inline void open_rig_as(rig *r, int devices, size_t memory_bytes, int virtual_time, int instant) {
    trtx_mock_options options = {sizeof options, memory_bytes, devices, 9, 0, virtual_time, instant};
    r->mock = trtx_mock_create(&options);
    r->api = trtx_mock_api();
    trtx_mock_select(r->mock);
    OK(r->api->cuInit(0));
    OK(r->api->cuDevicePrimaryCtxRetain(&r->context, 0));
    OK(r->api->cuCtxPushCurrent(r->context));
    OK(r->api->cuStreamCreate(&r->stream, CU_STREAM_NON_BLOCKING));
}

static inline void open_rig_with(rig *r, int devices, size_t memory_bytes, int virtual_time) {
    open_rig_as(r, devices, memory_bytes, virtual_time, 0);
}

static inline void open_rig(rig *r) { open_rig_with(r, 1, (size_t)1 << 26, 0); }

/* Ends a rig whose context was lost, or whose test leaves things open. */
static inline void drop_rig(rig *r) {
    OK(r->api->cuCtxPopCurrent(NULL));
    OK(r->api->cuDevicePrimaryCtxRelease(0));
    trtx_mock_destroy(r->mock);
    trtx_mock_select(NULL);
}

/* Ends a rig that must be clean. */
static inline void close_rig(rig *r) {
    trtx_mock_usage usage;
    char text[4000] = "";
    OK(r->api->cuStreamSynchronize(r->stream));
    OK(r->api->cuStreamDestroy(r->stream));
    trtx_mock_get_usage(r->mock, &usage);
    CHECK_EQ(usage.streams + usage.events + usage.graphs + usage.execs + usage.device_blocks + usage.pinned_blocks, 0);
    OK(r->api->cuCtxPopCurrent(NULL));
    OK(r->api->cuDevicePrimaryCtxRelease(0));
    CHECK_EQ(trtx_mock_describe(r->mock, text, sizeof text), 0);
    if (text[0])
        fprintf(stderr, "%s", text);
    trtx_mock_destroy(r->mock);
    trtx_mock_select(NULL);
}

static inline CUgraphExec end_capture(rig *r, CUstream stream) {
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    OK(r->api->cuStreamEndCapture(stream, &graph));
    OK(r->api->cuGraphInstantiate(&exec, graph, 0));
    OK(r->api->cuGraphDestroy(graph));
    return exec;
}

#endif
