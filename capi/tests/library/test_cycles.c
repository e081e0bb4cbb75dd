/* Everything made and destroyed, over and over: nothing is left, and the process does not grow.
 * TRTXPY_TEST_CYCLES: how many, 1000 by default; growth is looked at from 1000 on, and not under a sanitizer.
 * TRTXPY_TEST_BRIEF: as many cycles that build, submit and run nothing: a thousand of them are possible under Valgrind. */
#include "api_test.h"

#include <poll.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1, DEFAULT_CYCLES = 100 };
#else
enum { SANITIZED = 0, DEFAULT_CYCLES = 1000 };
#endif
enum { MOST_GROWTH = 4 << 20 };

static long cycles(void) {
    const char *wanted = getenv("TRTXPY_TEST_CYCLES");
    return wanted ? atol(wanted) : DEFAULT_CYCLES;
}

static size_t resident_bytes(void) {
    FILE *file = fopen("/proc/self/statm", "r");
    size_t total = 0, resident = 0;
    CHECK(file && fscanf(file, "%zu %zu", &total, &resident) == 2);
    if (file) fclose(file);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}

static void check_nothing_of(trtxpy_context context) {
    trtxpy_context_statistics found = TRTXPY_CONTEXT_STATISTICS_INIT;
    GOOD(trtxpy_context_get_statistics(context, &found));
    CHECK_EQ(found.device_bytes, 0);
    CHECK_EQ(found.pinned_bytes, 0);
    CHECK_EQ(found.device_allocations, 0);
    CHECK_EQ(found.pinned_allocations, 0);
    CHECK_EQ(found.graphs + found.tensors + found.queues + found.requests, 0);
}

/* What a completed request still has for a moment is free soon. */
static void destroy_queue(trtxpy_queue queue) {
    trtxpy_status status;
    for (int i = 0; i < 60000 && (status = trtxpy_queue_destroy(queue)) == TRTXPY_BORROWED; i++) usleep(1000);
    CHECK_EQ(status, TRTXPY_OK);
}

static void requests(doubling *d) {
    trtxpy_queue queue;
    GOOD(trtxpy_queue_create(d->context, &queue));
    listener heard = {0};
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    options.callback = listen_to;
    options.userdata = &heard;
    trtxpy_request request = NULL;
    trtxpy_status outcome = -1;
    GOOD(trtxpy_submit(d->graph, &d->in, 1, &d->out, 1, &options, &request));
    GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
    CHECK_EQ(outcome, TRTXPY_OK);
    GOOD(trtxpy_request_destroy(request));
    CHECK(hears(&heard, 1));
    options.callback = NULL;
    options.queue = queue;
    GOOD(trtxpy_submit(d->graph, &d->in, 1, &d->out, 1, &options, &request));
    trtxpy_status cancelled = trtxpy_request_cancel(request); /* it may be over already */
    CHECK(cancelled == TRTXPY_OK || cancelled == TRTXPY_NOT_FOUND);
    GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
    CHECK(outcome == TRTXPY_OK || outcome == TRTXPY_CANCELLED);
    GOOD(trtxpy_request_destroy(request));
    int fd;
    GOOD(trtxpy_queue_fd(queue, &fd));
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    CHECK_EQ(poll(&ready, 1, 60000), 1);
    trtxpy_completion completion;
    size_t taken = 0;
    GOOD(trtxpy_queue_take(queue, &completion, 1, &taken));
    CHECK_EQ(taken, 1);
    /* one that nobody takes, and one that fails */
    GOOD(trtxpy_submit(d->graph, &d->in, 1, &d->out, 1, &options, &request));
    GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
    GOOD(trtxpy_request_destroy(request));
    CHECK_EQ(trtxpy_submit(d->graph, &d->in, 1, &d->in, 1, &options, &request), TRTXPY_NOT_FOUND);
    destroy_queue(queue);
}

static void group(doubling *d) {
    trtxpy_named_shape shape = {"x", shape_of(2, 2, 4)};
    trtxpy_tensor x = NULL, y = NULL;
    GOOD(trtxpy_graph_create_tensors(d->graph, &shape, 1, &x, 1, &y, 1));
    trtxpy_binding in = {"x", x}, out = {"y", y};
    GOOD(trtxpy_dispatch(d->graph, &in, 1, &out, 1, NULL));
    GOOD(trtxpy_tensor_destroy(x));
    GOOD(trtxpy_tensor_destroy(y));
}

static void tensors(doubling *d) {
    trtxpy_tensor x = make_tensor_at(d->context, TRTXPY_FLOAT32, shape_of(2, 2, 4), TRTXPY_DEVICE), again;
    trtxpy_tensor y = make_tensor_at(d->context, TRTXPY_FLOAT32, shape_of(2, 2, 4), TRTXPY_DEVICE);
    trtxpy_binding in = {"x", x}, out = {"y", y};
    GOOD(trtxpy_dispatch(d->graph, &in, 1, &out, 1, NULL));
    trtxpy_shape larger = shape_of(2, 3, 4);
    GOOD(trtxpy_tensor_resize(x, &larger));
    GOOD(trtxpy_tensor_destroy(x));
    GOOD(trtxpy_tensor_destroy(y));
    struct DLManagedTensor *managed;
    GOOD(trtxpy_tensor_to_dlpack(d->x, &managed));
    GOOD(trtxpy_tensor_from_dlpack(d->context, managed, &again));
    GOOD(trtxpy_tensor_destroy(again));
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    desc.dtype = 1000;
    CHECK_EQ(trtxpy_tensor_create(d->context, &desc, &again), TRTXPY_INVALID_ARGUMENT);
}

static void plan(const doubling *d) {
    size_t bytes = 0;
    GOOD(trtxpy_graph_get_plan(d->graph, NULL, &bytes));
    void *content = malloc(bytes);
    GOOD(trtxpy_graph_get_plan(d->graph, content, &bytes));
    trtxpy_graph graph;
    GOOD(trtxpy_graph_from_plan(d->context, content, bytes, NULL, &graph));
    GOOD(trtxpy_graph_destroy(graph));
    CHECK_EQ(trtxpy_graph_from_plan(d->context, content, bytes - 1, NULL, &graph), TRTXPY_PLAN);
    free(content);
}

static void one_shot(const doubling *d, const blob *model) {
    trtxpy_results results;
    GOOD(trtxpy_run_zeroed(d->context, model->data, model->bytes, NULL, 0, NULL, &results));
    GOOD(trtxpy_results_destroy(results));
    const float values[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    trtxpy_array input = TRTXPY_ARRAY_INIT;
    input.name = "x";
    input.dtype = TRTXPY_FLOAT32;
    input.shape = shape_of(2, 2, 4);
    input.data = values;
    input.bytes = sizeof values;
    GOOD(trtxpy_run(d->context, model->data, model->bytes, NULL, 0, &input, 1, NULL, &results));
    GOOD(trtxpy_results_destroy(results));
    input.bytes--;
    CHECK_EQ(trtxpy_run(d->context, model->data, model->bytes, NULL, 0, &input, 1, NULL, &results), TRTXPY_BUFFER_SIZE);
    CHECK_EQ(trtxpy_run_zeroed(d->context, model->data, model->bytes / 2, NULL, 0, NULL, &results), TRTXPY_PARSE);
}

static void cycle(const blob *model) {
    doubling d;
    doubling_open(&d, "mock:instant", 2);
    if (failed_checks) return;
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    requests(&d);
    group(&d);
    tensors(&d);
    plan(&d);
    GOOD(trtxpy_tensor_destroy(d.x));
    GOOD(trtxpy_tensor_destroy(d.y));
    GOOD(trtxpy_graph_destroy(d.graph));
    check_nothing_of(d.context);
    one_shot(&d, model); /* its model stays until the context is destroyed */
    GOOD(trtxpy_context_destroy(d.context));
    CHECK_EQ(live_objects(), 0);
}

/* Of each kind of object one, made and destroyed; `content` is a plan. */
static void brief_cycle(const blob *content) {
    trtxpy_context context = open_context("mock:instant");
    trtxpy_queue queue;
    trtxpy_graph graph;
    if (!context) return;
    GOOD(trtxpy_queue_create(context, &queue));
    GOOD(trtxpy_graph_from_plan(context, content->data, content->bytes, NULL, &graph));
    trtxpy_tensor x = make_tensor_at(context, TRTXPY_FLOAT32, shape_of(2, 2, 4), TRTXPY_HOST);
    trtxpy_shape larger = shape_of(2, 3, 4);
    GOOD(trtxpy_tensor_resize(x, &larger));
    GOOD(trtxpy_tensor_destroy(x));
    GOOD(trtxpy_graph_destroy(graph));
    destroy_queue(queue);
    check_nothing_of(context);
    GOOD(trtxpy_context_destroy(context));
    CHECK_EQ(live_objects(), 0);
}

static blob *plan_of(const blob *model) {
    trtxpy_context context = open_context("mock:instant");
    trtxpy_graph graph;
    size_t bytes = 0;
    GOOD(trtxpy_graph_from_onnx(context, model->data, model->bytes, NULL, 0, NULL, &graph));
    GOOD(trtxpy_graph_get_plan(graph, NULL, &bytes));
    blob *content = malloc(sizeof *content);
    CHECK(bytes <= sizeof content->data);
    content->bytes = bytes;
    if (!failed_checks) GOOD(trtxpy_graph_get_plan(graph, content->data, &bytes));
    GOOD(trtxpy_graph_destroy(graph));
    GOOD(trtxpy_context_destroy(context));
    return content;
}

static void nothing_is_left(void) {
    long count = cycles();
    size_t half = 0;
    blob *model = read_model("double.onnx"), *content = getenv("TRTXPY_TEST_BRIEF") ? plan_of(model) : NULL;
    uint64_t began = real_ns();
    for (long i = 0; i < count && !failed_checks; i++) {
        if (i == count / 2) half = resident_bytes();
        if (content) brief_cycle(content);
        else cycle(model);
    }
    size_t end = resident_bytes();
    free(model);
    free(content);
    printf("%ld cycles, %.2f ms each, resident %.1f MB, %+.2f MB in the second half: ", count,
           (double)(real_ns() - began) / 1e6 / (double)(count ? count : 1), (double)end / 1e6, ((double)end - (double)half) / 1e6);
    if (count >= 1000 && !SANITIZED) CHECK(end < half + MOST_GROWTH);
}

int main(void) {
    RUN(nothing_is_left);
    GOOD(trtxpy_shutdown());
    return report();
}
