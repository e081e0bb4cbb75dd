/* What a lane adds to bare driver calls, on a real driver: one small graph (256 bytes to the device and back), launched and
 * waited for, outputs compared every time. Prints medians and 99th percentiles in microseconds. Needs a GPU; build with
 *     gcc -std=gnu11 -O2 -Icapi/src capi/tests/bench_driver.c capi/src/[a-z]*.c -o bench_driver -pthread -ldl
 */
#include "lane.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 5000, WARM_UP = 200, BYTES = 256, OUTPUT = 4096 };

#define MUST(call)                                                                                                     \
    do {                                                                                                               \
        CUresult result_ = (call);                                                                                     \
        if (result_) {                                                                                                 \
            fprintf(stderr, "%s:%d: %s returned %d\n", __FILE__, __LINE__, #call, result_);                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static const trtx_cuda_api *cuda;
static CUstream stream;
static CUgraphExec graph;
static CUevent event;
static unsigned char *host; /* input at 0, output at OUTPUT */
static double samples[ROUNDS];

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(const char *name, void (*once)(void *), void *argument) {
    for (int i = -WARM_UP; i < ROUNDS; i++) {
        memset(host, i & 255, BYTES);
        double before = now_us();
        once(argument);
        double after = now_us();
        if (host[OUTPUT] != (i & 255) || host[OUTPUT + BYTES - 1] != (i & 255)) {
            fprintf(stderr, "%s: stale output in round %d\n", name, i);
            exit(1);
        }
        if (i >= 0)
            samples[i] = after - before;
    }
    qsort(samples, ROUNDS, sizeof samples[0], by_value);
    printf("%-28s p50 %6.2f  p99 %6.2f us\n", name, samples[ROUNDS / 2], samples[ROUNDS * 99 / 100]);
}

static void bare(void *unused) {
    (void)unused;
    MUST(cuda->cuGraphLaunch(graph, stream));
    MUST(cuda->cuEventRecord(event, stream));
    while (cuda->cuEventQuery(event) == CUDA_ERROR_NOT_READY) {
    }
}

typedef struct {
    trtx_lane *lane;
    size_t slot;
} place;

static void spin(void *argument) {
    place *at = argument;
    trtx_completion done;
    MUST(trtx_lane_submit(at->lane, at->slot, graph, 1, NULL));
    while (trtx_lane_spin(at->lane, at->slot, 1000000, &done) != TRTX_SLOT_DONE) {
    }
    MUST(done.status);
}

static void wait_for(void *argument) {
    place *at = argument;
    trtx_completion done;
    MUST(trtx_lane_submit(at->lane, at->slot, graph, 1, NULL));
    while (trtx_lane_wait(at->lane, at->slot, 0, 0, &done) != TRTX_SLOT_DONE) {
    }
    MUST(done.status);
}

int main(void) {
    const char *reason = NULL;
    cuda = trtx_cuda_api_load(&reason);
    if (!cuda) {
        fprintf(stderr, "%s\n", reason);
        return 77; /* skipped */
    }
    CUdevice device;
    CUcontext context;
    CUdeviceptr memory;
    CUgraph captured;
    MUST(cuda->cuInit(0));
    MUST(cuda->cuDeviceGet(&device, 0));
    MUST(cuda->cuDevicePrimaryCtxRetain(&context, device));
    MUST(cuda->cuCtxPushCurrent(context));
    MUST(cuda->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    MUST(cuda->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    MUST(cuda->cuMemAlloc(&memory, BYTES));
    MUST(cuda->cuMemHostAlloc((void **)&host, OUTPUT + BYTES, 1));
    MUST(cuda->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    MUST(cuda->cuMemcpyHtoDAsync(memory, host, BYTES, stream));
    MUST(cuda->cuMemcpyDtoHAsync(host + OUTPUT, memory, BYTES, stream));
    MUST(cuda->cuStreamEndCapture(stream, &captured));
    MUST(cuda->cuGraphInstantiate(&graph, captured, 0));

    static const char *modes[] = {"latency", "balanced", "efficient"};
    for (int repeat = 0; repeat < 2; repeat++) {
        measure("bare driver calls", bare, NULL);
        for (int mode = 0; mode < 3; mode++) {
            trtx_watcher *watcher;
            place at;
            char name[64];
            MUST(trtx_watcher_create(&watcher));
            MUST(trtx_lane_create(&at.lane, cuda, context, stream, 1, watcher, (trtx_wake_mode)mode));
            MUST(trtx_lane_acquire(at.lane, &at.slot));
            snprintf(name, sizeof name, "%s: submit, spin", modes[mode]);
            measure(name, spin, &at);
            snprintf(name, sizeof name, "%s: submit, wait", modes[mode]);
            measure(name, wait_for, &at);
            MUST(trtx_lane_release(at.lane, at.slot));
            MUST(trtx_lane_destroy(at.lane));
            trtx_watcher_destroy(watcher);
        }
    }
    return 0;
}
