/* What a lane costs on top of its driver: round trips of a kernel that takes no time, on the mock. Usage: bench_lane [n] */
#define _GNU_SOURCE
#include "lane_test.h"

static int by_value(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static void print(const char *what, uint64_t *samples, size_t count, uint64_t total_ns) {
    qsort(samples, count, sizeof *samples, by_value);
    printf("%-44s %9.0f /s   p50 %7.2f us   p99 %7.2f us\n", what, (double)count * 1e9 / (double)total_ns,
           (double)samples[count / 2] / 1e3, (double)samples[count * 99 / 100] / 1e3);
}

typedef enum way { BARE, SPIN, WAIT, ARM } way;

static void measure(const char *what, way how, trtx_wake_mode mode, size_t count, uint64_t *samples) {
    rig r;
    rig_open(&r, 1, 4, mode);
    OK(r.api->cuCtxSetCurrent(r.context)); /* as it is in an application's thread */
    size_t slot;
    CUevent event;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    OK(r.api->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    uint64_t begin = 0;
    for (size_t i = 0; i < count + 1000; i++) {
        if (i == 1000) begin = now_ns();
        uint64_t before = now_ns();
        trtx_completion completion;
        if (how == BARE) {
            r.api->cuGraphLaunch(r.instant, r.streams[0]);
            r.api->cuEventRecord(event, r.streams[0]);
            while (r.api->cuEventQuery(event) == CUDA_ERROR_NOT_READY) {
            }
        } else {
            trtx_lane_submit(r.lanes[0], slot, r.instant, i, r.hub);
            if (how == SPIN) trtx_lane_spin(r.lanes[0], slot, 1000 * MS, &completion);
            if (how == WAIT) trtx_lane_wait(r.lanes[0], slot, 0, 1000 * MS, &completion);
            if (how == ARM) {
                trtx_lane_arm(r.lanes[0], slot);
                readable(r.fd, 1000);
            }
            trtx_hub_take(r.hub, &completion, 1);
        }
        if (i >= 1000) samples[i - 1000] = now_ns() - before;
    }
    print(what, samples, count, now_ns() - begin);
    OK(r.api->cuEventDestroy(event));
    OK(r.api->cuCtxSetCurrent(NULL));
    rig_close(&r);
}

/* Our own share: a driver whose functions do nothing and whose events are done at once. */
static CUresult done(void) { return CUDA_SUCCESS; }
static CUresult stub_launch(CUgraphExec exec, CUstream stream) { return (void)exec, (void)stream, done(); }
static CUresult stub_record(CUevent event, CUstream stream) { return (void)event, (void)stream, done(); }
static CUresult stub_query(CUevent event) { return (void)event, done(); }
static CUresult stub_create(CUevent *event, unsigned flags) { return *event = (CUevent)(uintptr_t)64, (void)flags, done(); }
static CUresult stub_current(CUcontext *context) { return *context = (CUcontext)(uintptr_t)8, done(); }
static CUresult stub_exchange(int *mode) { return *mode = CU_STREAM_CAPTURE_MODE_GLOBAL, done(); }

static void measure_own_share(size_t count) {
    trtx_cuda_api api = {.cuGraphLaunch = stub_launch,
                         .cuEventRecord = stub_record,
                         .cuEventQuery = stub_query,
                         .cuEventCreate = stub_create,
                         .cuEventDestroy = stub_query,
                         .cuCtxGetCurrent = stub_current,
                         .cuThreadExchangeStreamCaptureMode = stub_exchange};
    trtx_watcher *watcher;
    trtx_lane *lane;
    trtx_hub *hub;
    int fd;
    size_t slot;
    OK(trtx_watcher_create(&watcher));
    OK(trtx_hub_create(&hub, &fd));
    OK(trtx_lane_create(&lane, &api, (CUcontext)(uintptr_t)8, (CUstream)(uintptr_t)16, 8, watcher, TRTX_WAKE_LATENCY));
    uint64_t begin = now_ns();
    for (size_t i = 0; i < count * 10; i++) {
        trtx_completion completion;
        trtx_lane_acquire(lane, &slot);
        trtx_lane_submit(lane, slot, (CUgraphExec)(uintptr_t)32, i, hub);
        trtx_lane_spin(lane, slot, 1000, &completion);
        trtx_hub_take(hub, &completion, 1);
        trtx_lane_release(lane, slot);
    }
    double each = (double)(now_ns() - begin) / (double)(count * 10);
    printf("own share (acquire submit spin take release) %9.0f ns a request\n", each);
    OK(trtx_lane_destroy(lane));
    trtx_watcher_destroy(watcher);
    trtx_hub_release(hub);
}

int main(int argc, char **argv) {
    size_t count = argc > 1 ? (size_t)atol(argv[1]) : 20000;
    uint64_t *samples = malloc(count * sizeof *samples);
    if (!samples || count == 0) return 2;
    measure_own_share(count);
    measure("bare driver calls, spinning", BARE, TRTX_WAKE_LATENCY, count, samples);
    measure("submit, spin", SPIN, TRTX_WAKE_LATENCY, count, samples);
    measure("submit, wait (watcher latency)", WAIT, TRTX_WAKE_LATENCY, count, samples);
    measure("submit, wait (watcher balanced)", WAIT, TRTX_WAKE_BALANCED, count, samples);
    measure("submit, arm, poll(fd) (watcher latency)", ARM, TRTX_WAKE_LATENCY, count, samples);
    measure("submit, arm, poll(fd) (watcher balanced)", ARM, TRTX_WAKE_BALANCED, count, samples);
    measure("submit, arm, poll(fd) (watcher efficient)", ARM, TRTX_WAKE_EFFICIENT, count / 4 + 1, samples);
    free(samples);
    return atomic_load(&checks_failed) != 0;
}
