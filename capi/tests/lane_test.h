/* A rig for the lanes' tests: one mock device, its primary context, a stream for each lane, kernels that wait at a gate. */
#ifndef TRTX_LANE_TEST_H
#define TRTX_LANE_TEST_H

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../mock/mock_driver.h"
#include "../src/lane.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

#define MS UINT64_C(1000000)
#define US UINT64_C(1000)
#define PATIENCE (30000 * MS) /* what a busy machine may take for anything */

static int tests_passed, tests_failed;
static _Atomic int checks_failed;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            atomic_fetch_add(&checks_failed, 1);                                                                       \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition);                    \
        }                                                                                                              \
    } while (0)
#define CHECK_EQ(left, right)                                                                                          \
    do {                                                                                                               \
        long long left_ = (long long)(left), right_ = (long long)(right);                                              \
        if (left_ != right_) {                                                                                         \
            atomic_fetch_add(&checks_failed, 1);                                                                       \
            fprintf(stderr, "%s:%d: %s: %s is %lld, expected %s = %lld\n", __FILE__, __LINE__, __func__, #left, left_, \
                    #right, right_);                                                                                   \
        }                                                                                                              \
    } while (0)
#define OK(call) CHECK_EQ(call, CUDA_SUCCESS)

static inline void run_test(const char *name, void (*test)(void)) {
    int before = atomic_load(&checks_failed);
    alarm(300); /* a lost completion is a hang: end it */
    test();
    if (atomic_load(&checks_failed) == before) {
        tests_passed++;
    } else {
        tests_failed++;
        fprintf(stderr, "FAILED %s\n", name);
    }
}
#define TEST(name) run_test(#name, name)

static inline int report(void) {
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_failed != 0;
}

static inline uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t cpu_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void nap_us(unsigned microseconds) {
    struct timespec time = {.tv_sec = microseconds / 1000000, .tv_nsec = (long)(microseconds % 1000000) * 1000};
    nanosleep(&time, NULL);
}

static inline bool readable(int fd, int timeout_ms) {
    struct pollfd entry = {.fd = fd, .events = POLLIN};
    return poll(&entry, 1, timeout_ms) == 1;
}

enum { RIG_LANES = 8 };

typedef struct rig {
    trtx_mock *mock;
    const trtx_cuda_api *api;
    CUcontext context;
    trtx_watcher *watcher;
    trtx_hub *hub;
    int fd;
    size_t lane_count;
    CUstream streams[RIG_LANES];
    trtx_lane *lanes[RIG_LANES];
    CUgraphExec instant; /* a graph that takes no time */
    CUgraphExec gated;   /* a graph that ends when the gate is open */
    _Atomic bool open;
} rig;

static inline CUresult wait_at_gate(void *userdata) {
    rig *r = userdata;
    while (!atomic_load(&r->open)) nap_us(50);
    return CUDA_SUCCESS;
}

/* A driver whose launches stop on their way in until they may go on: "being launched" is a state to look at then.
 * For one lane at a time. */
static trtx_cuda_api held_driver;
static _Atomic bool launches_held;

static inline CUresult launch_when_let_go(CUgraphExec exec, CUstream stream) {
    while (atomic_load(&launches_held)) nap_us(50);
    return trtx_mock_api()->cuGraphLaunch(exec, stream);
}

static inline const trtx_cuda_api *driver_that_holds_launches(void) {
    held_driver = *trtx_mock_api();
    held_driver.cuGraphLaunch = launch_when_let_go;
    return &held_driver;
}

static inline CUgraphExec make_graph(rig *r, uint64_t duration_ns, trtx_mock_kernel kernel, void *userdata) {
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    CUstream stream = NULL;
    OK(r->api->cuCtxPushCurrent(r->context));
    OK(r->api->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(r->api->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    OK(trtx_mock_launch(stream, duration_ns, kernel, userdata, NULL));
    OK(r->api->cuStreamEndCapture(stream, &graph));
    OK(r->api->cuGraphInstantiate(&exec, graph, 0));
    OK(r->api->cuGraphDestroy(graph));
    OK(r->api->cuStreamDestroy(stream));
    CUcontext ours;
    OK(r->api->cuCtxPopCurrent(&ours));
    return exec;
}

static inline void free_graph(rig *r, CUgraphExec exec) {
    CUcontext ours;
    OK(r->api->cuCtxPushCurrent(r->context));
    r->api->cuGraphExecDestroy(exec); /* fails on a lost device: then the mock frees it */
    OK(r->api->cuCtxPopCurrent(&ours));
}

static inline void rig_open(rig *r, size_t lanes, size_t slots, trtx_wake_mode mode) {
    memset(r, 0, sizeof *r);
    trtx_mock_options options = {.struct_size = sizeof options,
                                 .memory_bytes = 1 << 24,
                                 .devices = 1,
                                 .compute_capability_major = 9,
                                 .compute_capability_minor = 0};
    r->mock = trtx_mock_create(&options);
    r->api = trtx_mock_api();
    trtx_mock_select(r->mock);
    OK(r->api->cuInit(0));
    CUdevice device;
    OK(r->api->cuDeviceGet(&device, 0));
    OK(r->api->cuDevicePrimaryCtxRetain(&r->context, device));
    OK(trtx_watcher_create(&r->watcher));
    OK(trtx_hub_create(&r->hub, &r->fd));
    r->lane_count = lanes;
    for (size_t i = 0; i < lanes; i++) {
        OK(r->api->cuCtxPushCurrent(r->context));
        OK(r->api->cuStreamCreate(&r->streams[i], CU_STREAM_NON_BLOCKING));
        CUcontext ours;
        OK(r->api->cuCtxPopCurrent(&ours));
        OK(trtx_lane_create(&r->lanes[i], r->api, r->context, r->streams[i], slots, r->watcher, mode));
    }
    r->instant = make_graph(r, 0, NULL, NULL);
    r->gated = make_graph(r, 0, wait_at_gate, r);
}

static inline void rig_close(rig *r) {
    atomic_store(&r->open, true);
    bool lost = false;
    for (size_t i = 0; i < r->lane_count; i++) {
        trtx_lane_statistics statistics;
        trtx_lane_get_statistics(r->lanes[i], &statistics);
        lost |= statistics.dead != 0;
        uint64_t until = now_ns() + PATIENCE;
        while (trtx_lane_poll(r->lanes[i]) && now_ns() < until) nap_us(50);
        OK(trtx_lane_destroy(r->lanes[i]));
    }
    trtx_watcher_destroy(r->watcher);
    trtx_hub_release(r->hub);
    trtx_mock_select(r->mock);
    free_graph(r, r->instant);
    free_graph(r, r->gated);
    OK(r->api->cuCtxPushCurrent(r->context));
    for (size_t i = 0; i < r->lane_count; i++) r->api->cuStreamDestroy(r->streams[i]);
    CUcontext ours;
    r->api->cuCtxPopCurrent(&ours);
    trtx_mock_usage usage;
    trtx_mock_get_usage(r->mock, &usage);
    CHECK_EQ(usage.damage, 0);
    if (!lost) CHECK_EQ(usage.events, 0);
    r->api->cuDevicePrimaryCtxRelease(0);
    trtx_mock_select(NULL);
    trtx_mock_destroy(r->mock);
}

#endif
