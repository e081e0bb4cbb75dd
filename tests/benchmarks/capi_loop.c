/* A C caller of libtrtxpy: times of trtxpy_dispatch, one after another. The library's functions come as addresses, so that
 * this is compiled without it. */
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "../../capi/include/trtxpy.h"

typedef trtxpy_status (*dispatch_function)(trtxpy_graph, const trtxpy_binding *, size_t, const trtxpy_binding *, size_t,
                                           const trtxpy_dispatch_options *);

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* `count` dispatches; times_ns gets one number for each. Returns the first status that is not 0. */
int capi_loop(dispatch_function dispatch, trtxpy_graph graph, const trtxpy_binding *inputs, size_t input_count,
              const trtxpy_binding *outputs, size_t output_count, size_t count, uint64_t *times_ns) {
    for (size_t i = 0; i < count; i++) {
        uint64_t begun = now_ns();
        trtxpy_status status = dispatch(graph, inputs, input_count, outputs, output_count, NULL);
        times_ns[i] = now_ns() - begun;
        if (status != TRTXPY_OK) return status;
    }
    return 0;
}
