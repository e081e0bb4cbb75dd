/* What the calls of the mock driver cost: microseconds a call, medians and p99 over samples; one caller thread. Not a test. */
#include "mock_test.h"

enum { SAMPLES = 20000 };

static uint32_t samples[SAMPLES];

static int by_value(const void *a, const void *b) {
    uint32_t first = *(const uint32_t *)a, second = *(const uint32_t *)b;
    return (first > second) - (first < second);
}

static void show(const char *what) {
    qsort(samples, SAMPLES, sizeof *samples, by_value);
    printf("%-46s p50 %7.3f us  p99 %7.3f us\n", what, samples[SAMPLES / 2] / 1e3, samples[SAMPLES / 100 * 99] / 1e3);
}

#define TIME(what, call, after)                                                                                        \
    do {                                                                                                               \
        for (int i_ = 0; i_ < SAMPLES; i_++) {                                                                         \
            uint64_t begun_ = real_ns();                                                                               \
            call;                                                                                                      \
            samples[i_] = (uint32_t)(real_ns() - begun_);                                                              \
            after;                                                                                                     \
        }                                                                                                              \
        show(what);                                                                                                    \
    } while (0)

static void measure(int instant) {
    rig r;
    CUevent event, idle;
    CUdeviceptr device;
    void *in, *out;
    _Atomic int runs = 0;
    printf("%s\n", instant ? "-- instant" : "-- on streams' threads");
    open_rig_as(&r, 1, (size_t)1 << 26, 0, instant);
    OK(r.api->cuEventCreate(&event, 2));
    OK(r.api->cuEventCreate(&idle, 2));
    OK(r.api->cuMemAlloc(&device, 4096));
    OK(r.api->cuMemHostAlloc(&in, 4096, 0));
    OK(r.api->cuMemHostAlloc(&out, 4096, 0));
    OK(r.api->cuStreamBeginCapture(r.stream, 1));
    OK(r.api->cuMemcpyHtoDAsync(device, in, 4096, r.stream));
    OK(trtx_mock_launch(r.stream, 0, count_run, &runs, NULL));
    OK(r.api->cuMemcpyDtoHAsync(out, device, 4096, r.stream));
    CUgraphExec exec = end_capture(&r, r.stream);
    OK(r.api->cuEventRecord(idle, r.stream));
    OK(r.api->cuStreamSynchronize(r.stream));
    TIME("(the clock itself)", (void)0, (void)0);
    TIME("cuEventQuery", r.api->cuEventQuery(idle), (void)0);
    TIME("cuStreamQuery", r.api->cuStreamQuery(r.stream), (void)0);
    TIME("cuGraphLaunch, stream asleep", r.api->cuGraphLaunch(exec, r.stream), {
        r.api->cuStreamSynchronize(r.stream);
        uint64_t until = real_ns() + 20000;
        while (real_ns() < until) {}
    });
    TIME("cuEventRecord, stream asleep", r.api->cuEventRecord(event, r.stream), {
        r.api->cuStreamSynchronize(r.stream);
        uint64_t until = real_ns() + 20000;
        while (real_ns() < until) {}
    });
    gate g = GATE;
    OK(trtx_mock_launch(r.stream, 0, pass_gate, &g, NULL));
    await_entered(&g, 1);
    TIME("cuGraphLaunch, stream busy", r.api->cuGraphLaunch(exec, r.stream), (void)0);
    TIME("cuEventRecord, stream busy", r.api->cuEventRecord(event, r.stream), (void)0);
    set_gate(&g, true);
    OK(r.api->cuStreamSynchronize(r.stream));
    TIME("launch, record, spin on cuEventQuery", {
        r.api->cuGraphLaunch(exec, r.stream);
        r.api->cuEventRecord(event, r.stream);
        while (r.api->cuEventQuery(event)) {}
    }, (void)0);
    TIME("launch, record, cuEventSynchronize", {
        r.api->cuGraphLaunch(exec, r.stream);
        r.api->cuEventRecord(event, r.stream);
        r.api->cuEventSynchronize(event);
    }, (void)0);
    uint64_t begun = real_ns();
    for (int i = 0; i < SAMPLES; i++) {
        r.api->cuGraphLaunch(exec, r.stream);
        r.api->cuEventRecord(event, r.stream);
        if (i % 16 == 15)
            r.api->cuEventSynchronize(event);
    }
    OK(r.api->cuStreamSynchronize(r.stream));
    printf("16 in flight: %.0f replays a second\n", SAMPLES / ((double)(real_ns() - begun) / 1e9));
    drop_rig(&r);
}

int main(void) {
    measure(0);
    measure(1);
    return 0;
}
