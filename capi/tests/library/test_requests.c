/* Requests: dispatch, submit, cancel, queues, many threads. */
#include "api_test.h"

#include <dlfcn.h>
#include <poll.h>

/* A request takes so long that a busy machine gets through what is asked meanwhile. One slot: captures take as long. */
static void slow_open(doubling *d) {
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    options.slots = options.lanes = 1;
    *d = (doubling){.context = open_context("mock:duration_s=0.7")};
    d->graph = open_model_with(d->context, "double.onnx", &options);
    doubling_tensors(d, 1);
}

static void names_come_in_any_order(void) {
    trtxpy_context context = open_context("mock");
    trtxpy_graph graph = open_model(context, "two.onnx");
    trtxpy_tensor t[4];
    for (int i = 0; i < 4; i++) t[i] = make_tensor(context, TRTXPY_FLOAT32, shape_of(1, 3, 0));
    const float a[] = {1, 2, 3}, b[] = {10, 20, 30};
    GOOD(trtxpy_tensor_write(t[0], a, sizeof a));
    GOOD(trtxpy_tensor_write(t[1], b, sizeof b));
    trtxpy_binding in[] = {{"b", t[1]}, {"a", t[0]}}, out[] = {{"difference", t[3]}, {"sum", t[2]}};
    GOOD(trtxpy_dispatch(graph, in, 2, out, 2, NULL));
    float sum[3], difference[3];
    GOOD(trtxpy_tensor_read(t[2], sum, sizeof sum));
    GOOD(trtxpy_tensor_read(t[3], difference, sizeof difference));
    CHECK(sum[0] == 11 && sum[2] == 33 && difference[0] == -9 && difference[2] == -27);
    /* one tensor for both inputs */
    in[0].tensor = t[0];
    GOOD(trtxpy_dispatch(graph, in, 2, out, 2, NULL));
    GOOD(trtxpy_tensor_read(t[2], sum, sizeof sum));
    CHECK(sum[2] == 6);
    /* not for both outputs, and not for an input and an output */
    out[0].tensor = t[2];
    CHECK_EQ(trtxpy_dispatch(graph, in, 2, out, 2, NULL), TRTXPY_BUSY);
    out[0].tensor = t[0];
    CHECK_EQ(trtxpy_dispatch(graph, in, 2, out, 2, NULL), TRTXPY_BUSY);
    for (int i = 0; i < 4; i++) GOOD(trtxpy_tensor_destroy(t[i])); /* nothing of them is in use any more */
    GOOD(trtxpy_graph_destroy(graph));
    GOOD(trtxpy_context_destroy(context));
}

static void shapes_follow_each_other(void) {
    doubling d;
    doubling_open(&d, "mock", 1);
    for (int64_t rows = 1; rows <= 32; rows = rows * 2) {
        trtxpy_shape shape = shape_of(2, rows, 4);
        GOOD(trtxpy_tensor_resize(d.x, &shape));
        GOOD(trtxpy_tensor_resize(d.y, &shape));
        d.count = (size_t)rows * 4;
        doubling_fill(&d, (float)rows);
        GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
        CHECK(doubling_right(&d, (float)rows));
    }
    /* an output of another shape */
    trtxpy_shape shape = shape_of(2, 3, 4);
    GOOD(trtxpy_tensor_resize(d.y, &shape));
    CHECK_EQ(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL), TRTXPY_SHAPE);
    trtxpy_dispatch_options options = TRTXPY_DISPATCH_OPTIONS_INIT;
    options.resize_outputs = 1;
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, &options));
    CHECK(doubling_right(&d, 32));
    /* outside of the profile */
    shape = shape_of(2, 1000, 4);
    GOOD(trtxpy_tensor_resize(d.x, &shape));
    CHECK_EQ(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, &options), TRTXPY_SHAPE);
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    GOOD(trtxpy_graph_get_statistics(d.graph, &statistics));
    CHECK_EQ(statistics.completed, 7);
    CHECK_EQ(statistics.failed, 2);
    CHECK_EQ(statistics.in_flight, 0);
    CHECK_EQ(statistics.shapes, 6);
    doubling_close(&d);
}

static void no_more_shapes_are_kept_than_was_said(void) {
    trtxpy_context context = open_context("mock:instant");
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    options.max_graphs = 2;
    doubling d = {.context = context, .graph = open_model_with(context, "double.onnx", &options)};
    doubling_tensors(&d, 1);
    for (int64_t rows = 1; rows <= 12; rows++) {
        trtxpy_shape shape = shape_of(2, rows, 4);
        GOOD(trtxpy_tensor_resize(d.x, &shape));
        GOOD(trtxpy_tensor_resize(d.y, &shape));
        GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    }
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    GOOD(trtxpy_graph_get_statistics(d.graph, &statistics));
    CHECK(statistics.shapes <= 2);
    CHECK_EQ(statistics.completed, 12);
    doubling_close(&d);
}

static void a_callback_comes_once(void) {
    doubling d;
    doubling_open(&d, "mock", 2);
    listener heard = {0};
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    options.callback = listen_to;
    options.userdata = &heard;
    for (int round = 1; round <= 20; round++) { /* the first one is captured on the way */
        doubling_fill(&d, (float)round);
        options.token = (uint64_t)round << 40;
        trtxpy_request request = NULL;
        GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &options, &request));
        trtxpy_status outcome = -1;
        GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
        CHECK_EQ(outcome, TRTXPY_OK);
        CHECK(doubling_right(&d, (float)round));
        CHECK_EQ(trtxpy_request_cancel(request), TRTXPY_NOT_FOUND); /* after the completion */
        GOOD(trtxpy_request_destroy(request));
        CHECK_EQ(trtxpy_request_destroy(request), TRTXPY_INVALID_HANDLE);
        CHECK(hears(&heard, round));
        CHECK_EQ(atomic_load(&heard.status), TRTXPY_OK);
        CHECK(atomic_load(&heard.token) == (uint64_t)round << 40);
    }
    GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &options, NULL)); /* without a handle */
    CHECK(hears(&heard, 21));
    doubling_close(&d);
}

typedef struct chain {
    doubling d;
    atomic_int left, calls;
    atomic_bool submitted; /* the first submit has returned: until then it uses the graph */
    trtxpy_status dispatched, waited, shut;
} chain;

static void again(trtxpy_status status, const char *message, const trtxpy_result *result, void *userdata) {
    chain *c = userdata;
    (void)message;
    (void)result;
    CHECK_EQ(status, TRTXPY_OK);
    c->dispatched = trtxpy_dispatch(c->d.graph, &c->d.in, 1, &c->d.out, 1, NULL);
    c->shut = trtxpy_shutdown();
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    options.callback = again;
    options.userdata = c;
    if (atomic_fetch_sub(&c->left, 1) > 1) {
        trtxpy_request request;
        GOOD(trtxpy_submit(c->d.graph, &c->d.in, 1, &c->d.out, 1, &options, &request));
        trtxpy_status outcome;
        c->waited = trtxpy_request_wait(request, 5, &outcome);
        CHECK_EQ(trtxpy_request_wait(request, 0, &outcome), TRTXPY_NOT_READY); /* a look is allowed */
        GOOD(trtxpy_request_destroy(request));
    } else { /* everything may be destroyed here */
        while (!atomic_load(&c->submitted)) usleep(100);
        doubling_close(&c->d);
    }
    atomic_fetch_add(&c->calls, 1);
}

static void calls_from_a_callback(void) {
    chain c = {.left = 10};
    doubling_open(&c.d, "mock", 2);
    GOOD(trtxpy_dispatch(c.d.graph, &c.d.in, 1, &c.d.out, 1, NULL));
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    options.callback = again;
    options.userdata = &c;
    GOOD(trtxpy_submit(c.d.graph, &c.d.in, 1, &c.d.out, 1, &options, NULL));
    atomic_store(&c.submitted, true);
    for (int i = 0; i < 60000 && atomic_load(&c.calls) < 10; i++) usleep(1000);
    CHECK_EQ(atomic_load(&c.calls), 10);
    CHECK_EQ(c.dispatched, TRTXPY_IN_CALLBACK);
    CHECK_EQ(c.waited, TRTXPY_IN_CALLBACK);
    CHECK_EQ(c.shut, TRTXPY_IN_CALLBACK);
    CHECK_EQ(live_objects(), 0);
}

static void what_is_in_flight_is_busy_and_borrowed(void) {
    doubling d;
    slow_open(&d);
    doubling_fill(&d, 1);
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    trtxpy_request request;
    GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &options, &request));
    float value[4];
    trtxpy_shape shape = shape_of(2, 2, 4);
    trtxpy_status outcome;
    CHECK_EQ(trtxpy_request_wait(request, 0, &outcome), TRTXPY_NOT_READY);
    CHECK_EQ(trtxpy_request_wait(request, 1 * MS, &outcome), TRTXPY_TIMEOUT);
    CHECK_EQ(trtxpy_tensor_write(d.x, value, sizeof value), TRTXPY_BUSY);
    GOOD(trtxpy_tensor_read(d.x, value, sizeof value)); /* an input may be read */
    CHECK_EQ(trtxpy_tensor_read(d.y, value, sizeof value), TRTXPY_BUSY);
    CHECK_EQ(trtxpy_tensor_resize(d.x, &shape), TRTXPY_BUSY);
    CHECK_EQ(trtxpy_tensor_destroy(d.x), TRTXPY_BORROWED);
    CHECK_EQ(trtxpy_tensor_destroy(d.y), TRTXPY_BORROWED);
    CHECK_EQ(trtxpy_graph_destroy(d.graph), TRTXPY_BORROWED);
    CHECK_EQ(trtxpy_context_destroy(d.context), TRTXPY_BORROWED);
    CHECK_EQ(trtxpy_shutdown(), TRTXPY_BORROWED);
    CHECK_EQ(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &options, NULL), TRTXPY_BUSY);
    GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
    CHECK_EQ(outcome, TRTXPY_OK);
    CHECK(doubling_right(&d, 1));
    GOOD(trtxpy_request_destroy(request));
    doubling_close(&d);
}

/* Whoever only asks about a tensor keeps nobody from it, and is told while it is in use. */
typedef struct asking {
    trtxpy_tensor tensor;
    atomic_bool stop;
    atomic_int refused, asked;
} asking;

static void *ask(void *argument) {
    asking *a = argument;
    while (!atomic_load(&a->stop)) {
        trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
        size_t bytes = 0;
        if (trtxpy_tensor_describe(a->tensor, &desc) != TRTXPY_OK || desc.shape.rank != 2) atomic_fetch_add(&a->refused, 1);
        if (trtxpy_tensor_bytes(a->tensor, &bytes) != TRTXPY_OK || bytes != (size_t)(16 * desc.shape.dims[0]))
            if (bytes != 16 && bytes != 32) atomic_fetch_add(&a->refused, 1); /* it is resized meanwhile */
        void *data;
        trtxpy_status status = trtxpy_tensor_data(a->tensor, &data);
        if (status != TRTXPY_OK && status != TRTXPY_BUSY) atomic_fetch_add(&a->refused, 1); /* the output is written */
        atomic_fetch_add(&a->asked, 1);
    }
    return NULL;
}

static void asking_does_not_disturb(void) {
    doubling d;
    doubling_open(&d, "mock:instant", 1);
    asking about[4] = {{.tensor = d.y}, {.tensor = d.y}, {.tensor = d.x}, {.tensor = d.y}};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, ask, &about[i]);
    while (!atomic_load(&about[0].asked) || !atomic_load(&about[3].asked)) usleep(100);
    float values[8] = {0};
    for (int i = 0; i < 3000; i++) { /* nobody else uses them: never TRTXPY_BUSY */
        trtxpy_shape shape = shape_of(2, 1 + i / 10 % 2, 4);
        if (i % 10 == 0) {
            GOOD(trtxpy_tensor_resize(d.x, &shape));
            GOOD(trtxpy_tensor_resize(d.y, &shape));
        }
        GOOD(trtxpy_tensor_write(d.x, values, (size_t)shape.dims[0] * 16));
        GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    }
    for (int i = 0; i < 4; i++) {
        atomic_store(&about[i].stop, true);
        pthread_join(threads[i], NULL);
        CHECK_EQ(atomic_load(&about[i].refused), 0);
    }
    doubling_close(&d);
}

static void what_may_be_asked_in_flight(void) {
    doubling d;
    slow_open(&d);
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    trtxpy_request request;
    trtxpy_status outcome;
    GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, NULL, &request));
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    size_t bytes;
    void *data;
    struct DLManagedTensor *managed;
    GOOD(trtxpy_tensor_describe(d.y, &desc)); /* also while the request writes it */
    CHECK_EQ(desc.shape.dims[1], 4);
    GOOD(trtxpy_tensor_bytes(d.y, &bytes));
    CHECK_EQ(bytes, 16);
    CHECK_EQ(trtxpy_tensor_data(d.y, &data), TRTXPY_BUSY); /* the memory may become another's */
    CHECK_EQ(trtxpy_tensor_to_dlpack(d.y, &managed), TRTXPY_BUSY);
    CHECK(managed == NULL);
    GOOD(trtxpy_tensor_data(d.x, &data));
    GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
    GOOD(trtxpy_request_destroy(request));
    GOOD(trtxpy_tensor_data(d.y, &data));
    doubling_close(&d);
}

static void cancelled_and_timed_out(void) {
    doubling d;
    slow_open(&d);
    doubling_fill(&d, 1);
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    listener heard = {0};
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    options.callback = listen_to;
    options.userdata = &heard;
    trtxpy_request request;
    GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &options, &request));
    GOOD(trtxpy_request_cancel(request));
    GOOD(trtxpy_request_cancel(request)); /* again */
    trtxpy_status outcome;
    GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
    CHECK_EQ(outcome, TRTXPY_CANCELLED);
    CHECK(strstr(trtxpy_last_error(), "cancelled") != NULL);
    GOOD(trtxpy_request_destroy(request));
    CHECK(hears(&heard, 1));
    CHECK_EQ(atomic_load(&heard.status), TRTXPY_CANCELLED);
    /* before the launch: more requests than there are slots */
    enum { MANY = 60 };
    trtxpy_request requests[MANY];
    trtxpy_tensor outputs[MANY];
    for (int i = 0; i < MANY; i++) {
        outputs[i] = make_tensor(d.context, TRTXPY_FLOAT32, shape_of(2, 1, 4));
        trtxpy_binding out = {"y", outputs[i]};
        GOOD(trtxpy_submit(d.graph, &d.in, 1, &out, 1, &options, &requests[i]));
    }
    for (int i = 0; i < MANY; i++) GOOD(trtxpy_request_cancel(requests[i]));
    for (int i = 0; i < MANY; i++) {
        GOOD(trtxpy_request_wait(requests[i], UINT64_MAX, &outcome));
        CHECK_EQ(outcome, TRTXPY_CANCELLED);
        GOOD(trtxpy_request_destroy(requests[i]));
        GOOD(trtxpy_tensor_destroy(outputs[i]));
    }
    CHECK(hears(&heard, 1 + MANY));
    /* a dispatch that gives up */
    trtxpy_dispatch_options brief = TRTXPY_DISPATCH_OPTIONS_INIT;
    brief.timeout_ns = 10 * MS;
    CHECK_EQ(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, &brief), TRTXPY_TIMEOUT);
    CHECK_EQ(trtxpy_tensor_destroy(d.y), TRTXPY_BORROWED); /* until the GPU is done */
    for (int i = 0; i < 60000 && trtxpy_tensor_read(d.y, (float[4]){0}, 16) == TRTXPY_BUSY; i++) usleep(1000);
    brief.timeout_ns = 60000 * MS;
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, &brief));
    CHECK(doubling_right(&d, 1));
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    GOOD(trtxpy_graph_get_statistics(d.graph, &statistics));
    CHECK_EQ(statistics.cancelled, 2 + MANY);
    CHECK_EQ(statistics.completed, 2);
    CHECK_EQ(statistics.queued, 0);
    doubling_close(&d);
}

/* What cancel says and how the request ends agree, whenever it comes. */
static void a_cancel_that_succeeds_is_kept(void) {
    doubling d;
    doubling_open(&d, "mock:instant", 1);
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    int cancelled = 0, complete = 0;
    for (int i = 0; i < 2000; i++) {
        trtxpy_request request;
        trtxpy_status outcome;
        GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &options, &request));
        for (volatile int pause = 0; pause < i % 200 * 100; pause++) {}
        trtxpy_status said = trtxpy_request_cancel(request);
        GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
        CHECK_EQ(outcome, said == TRTXPY_OK ? TRTXPY_CANCELLED : TRTXPY_OK);
        cancelled += said == TRTXPY_OK;
        complete += said == TRTXPY_NOT_FOUND;
        GOOD(trtxpy_request_destroy(request));
    }
    CHECK_EQ(cancelled + complete, 2000);
    doubling_close(&d);
}

/* Slots run short while requests without handles complete: nobody touches one that is over. */
static void *submit_without_handles(void *argument) {
    doubling *d = argument;
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    for (int i = 0; i < 2000; i++)
        while (trtxpy_submit(d->graph, &d->in, 1, &d->out, 1, &options, NULL) == TRTXPY_BUSY) sched_yield();
    while (trtxpy_tensor_read(d->y, (float[4]){0}, 16) == TRTXPY_BUSY) sched_yield();
    return NULL;
}

static void *dispatch_beside(void *argument) {
    doubling *d = argument;
    for (int i = 0; i < 2000; i++) GOOD(trtxpy_dispatch(d->graph, &d->in, 1, &d->out, 1, NULL));
    return NULL;
}

static void slots_run_short(void) {
    trtxpy_context context = open_context("mock:instant");
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    options.slots = 2;
    trtxpy_graph graph = open_model_with(context, "double.onnx", &options);
    doubling sets[8];
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) {
        sets[i] = (doubling){.context = context, .graph = graph};
        doubling_tensors(&sets[i], 1);
    }
    for (int i = 0; i < 8; i++) pthread_create(&threads[i], NULL, i % 2 ? submit_without_handles : dispatch_beside, &sets[i]);
    for (int i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 8; i++) {
        GOOD(trtxpy_tensor_destroy(sets[i].x));
        GOOD(trtxpy_tensor_destroy(sets[i].y));
    }
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    for (int i = 0; i < 60000; i++) {
        GOOD(trtxpy_graph_get_statistics(graph, &statistics));
        if (statistics.in_flight == 0) break;
        usleep(1000);
    }
    CHECK_EQ(statistics.completed, 16000);
    while (trtxpy_graph_destroy(graph) == TRTXPY_BORROWED) usleep(1000);
    GOOD(trtxpy_context_destroy(context));
}

static void a_queue_for_an_event_loop(void) {
    doubling d;
    doubling_open(&d, "mock", 1);
    enum { MANY = 100 };
    trtxpy_queue queue;
    int fd = -1;
    GOOD(trtxpy_queue_create(d.context, &queue));
    GOOD(trtxpy_queue_fd(queue, &fd));
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    trtxpy_tensor outputs[MANY];
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    CHECK_EQ(poll(&readable, 1, 0), 0);
    for (int i = 0; i < MANY; i++) {
        outputs[i] = make_tensor(d.context, TRTXPY_FLOAT32, shape_of(2, 1, 4));
        trtxpy_binding out = {"y", outputs[i]};
        options.token = (uint64_t)i;
        GOOD(trtxpy_submit(d.graph, &d.in, 1, &out, 1, &options, NULL));
    }
    bool seen[MANY] = {false};
    size_t total = 0, taken;
    trtxpy_completion completions[7];
    while (total < MANY && poll(&readable, 1, 60000) == 1) {
        GOOD(trtxpy_queue_take(queue, completions, 7, &taken));
        for (size_t i = 0; i < taken; i++) {
            CHECK_EQ(completions[i].status, TRTXPY_OK);
            CHECK(completions[i].message[0] == '\0');
            CHECK(completions[i].result.token < MANY && !seen[completions[i].result.token]);
            CHECK(completions[i].result.completed_ns >= completions[i].result.submitted_ns);
            seen[completions[i].result.token] = true;
        }
        total += taken;
    }
    CHECK_EQ(total, MANY);
    CHECK_EQ(poll(&readable, 1, 0), 0);
    GOOD(trtxpy_queue_take(queue, completions, 7, &taken));
    CHECK_EQ(taken, 0);
    for (int i = 0; i < MANY; i++) GOOD(trtxpy_tensor_destroy(outputs[i]));
    /* what fails says why: too many rows for the profile */
    trtxpy_tensor big = make_tensor(d.context, TRTXPY_FLOAT32, shape_of(2, 1000, 4));
    trtxpy_binding in = {"x", big};
    GOOD(trtxpy_submit(d.graph, &in, 1, &d.out, 1, &options, NULL));
    CHECK_EQ(poll(&readable, 1, 60000), 1);
    GOOD(trtxpy_queue_take(queue, completions, 7, &taken));
    CHECK_EQ(taken, 1);
    CHECK_EQ(completions[0].status, TRTXPY_SHAPE);
    CHECK(strstr(completions[0].message, "x") != NULL);
    GOOD(trtxpy_tensor_destroy(big));
    CHECK_EQ(trtxpy_context_destroy(d.context), TRTXPY_BORROWED);
    GOOD(trtxpy_queue_destroy(queue));
    CHECK_EQ(trtxpy_queue_fd(queue, &fd), TRTXPY_INVALID_HANDLE);
    doubling_close(&d);
}

static trtxpy_context shared_context;
static trtxpy_graph shared_graph;

static void *call_twice(void *unused) {
    (void)unused;
    void *(*state_of_thread)(void) = NULL;
    *(void **)&state_of_thread = dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
    CHECK(state_of_thread != NULL);
    trtxpy_context_statistics statistics = TRTXPY_CONTEXT_STATISTICS_INIT;
    CHECK(state_of_thread() == NULL); /* Python does not know this thread yet */
    GOOD(trtxpy_context_get_statistics(shared_context, &statistics));
    void *state = state_of_thread();
    CHECK(state != NULL);
    GOOD(trtxpy_context_get_statistics(shared_context, &statistics));
    CHECK(state_of_thread() == state); /* what extension modules remember of it is still there */
    return NULL;
}

static void python_knows_a_thread_until_it_ends(void) {
    shared_context = open_context("mock:instant");
    for (int i = 0; i < 50; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, call_twice, NULL);
        pthread_join(thread, NULL);
    }
    GOOD(trtxpy_context_destroy(shared_context));
}

enum { THREADS = 8, ROUNDS = 300 };
static void *dispatch_many(void *argument) {
    float base = (float)(uintptr_t)argument * 1000;
    doubling d = {.context = shared_context, .graph = shared_graph};
    doubling_tensors(&d, 1 + (int64_t)(uintptr_t)argument % 3);
    for (int i = 0; i < ROUNDS; i++) {
        doubling_fill(&d, base + (float)i);
        if (i % 3) {
            GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
        } else {
            trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
            trtxpy_request request;
            trtxpy_status outcome;
            GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &options, &request));
            GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
            CHECK_EQ(outcome, TRTXPY_OK);
            GOOD(trtxpy_request_destroy(request));
        }
        CHECK(doubling_right(&d, base + (float)i));
    }
    GOOD(trtxpy_tensor_destroy(d.x));
    GOOD(trtxpy_tensor_destroy(d.y));
    return NULL;
}

static void eight_threads_on_one_graph(void) {
    for (uint32_t slots = 1; slots <= 4; slots += 3) { /* with one slot they wait for each other */
        shared_context = open_context("mock");
        trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
        options.slots = slots;
        options.lanes = slots == 1 ? 1 : 2;
        shared_graph = open_model_with(shared_context, "double.onnx", &options);
        pthread_t threads[THREADS];
        for (uintptr_t i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, dispatch_many, (void *)i);
        for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
        trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
        GOOD(trtxpy_graph_get_statistics(shared_graph, &statistics));
        CHECK_EQ(statistics.completed, THREADS * ROUNDS);
        CHECK_EQ(statistics.in_flight, 0);
        GOOD(trtxpy_graph_destroy(shared_graph));
        GOOD(trtxpy_context_destroy(shared_context));
    }
}

static atomic_int destroyed, refused;

static void *destroy_shared(void *unused) {
    (void)unused;
    for (;;) {
        trtxpy_status status = trtxpy_graph_destroy(shared_graph);
        if (status == TRTXPY_BORROWED) continue;
        atomic_fetch_add(status == TRTXPY_OK ? &destroyed : &refused, 1);
        CHECK(status == TRTXPY_OK || status == TRTXPY_INVALID_HANDLE);
        return NULL;
    }
}

static void sixty_four_threads_destroy_one_graph(void) {
    shared_context = open_context("mock:instant");
    for (int round = 0; round < 3; round++) {
        doubling d = {.context = shared_context, .graph = open_model(shared_context, "double.onnx")};
        doubling_tensors(&d, 1);
        GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
        shared_graph = d.graph;
        atomic_store(&destroyed, 0);
        atomic_store(&refused, 0);
        pthread_t threads[64];
        for (int i = 0; i < 64; i++) pthread_create(&threads[i], NULL, destroy_shared, NULL);
        for (int i = 0; i < 64; i++) pthread_join(threads[i], NULL);
        CHECK_EQ(atomic_load(&destroyed), 1);
        CHECK_EQ(atomic_load(&refused), 63);
        GOOD(trtxpy_tensor_destroy(d.x));
        GOOD(trtxpy_tensor_destroy(d.y));
    }
    GOOD(trtxpy_context_destroy(shared_context));
}

static void tensors_in_the_graphs_own_memory(void) {
    trtxpy_context context = open_context("mock");
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    options.slots = 4;
    trtxpy_graph graph = open_model_with(context, "double.onnx", &options);
    trtxpy_named_shape shape = {"x", shape_of(2, 2, 4)};
    doubling sets[4] = {{.count = 0}};
    for (int i = 0; i < 3; i++) {
        sets[i] = (doubling){.context = context, .graph = graph, .count = 8};
        GOOD(trtxpy_graph_create_tensors(graph, &shape, 1, &sets[i].x, 1, &sets[i].y, 1));
        sets[i].in = (trtxpy_binding){"x", sets[i].x};
        sets[i].out = (trtxpy_binding){"y", sets[i].y};
    }
    CHECK_EQ(trtxpy_graph_create_tensors(graph, &shape, 1, &sets[3].x, 1, &sets[3].y, 1), TRTXPY_BUSY);
    CHECK(sets[3].x == NULL && sets[3].y == NULL);
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 3; i++) {
            void *data;
            GOOD(trtxpy_tensor_data(sets[i].x, &data));
            for (int j = 0; j < 8; j++) ((float *)data)[j] = (float)(round + i + j);
            GOOD(trtxpy_dispatch(graph, &sets[i].in, 1, &sets[i].out, 1, NULL));
            CHECK(doubling_right(&sets[i], (float)(round + i)));
        }
    }
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    GOOD(trtxpy_graph_get_statistics(graph, &statistics));
    CHECK_EQ(statistics.zero_copy, 150);
    /* of two sets: works, with copies */
    doubling_fill(&sets[0], 5);
    GOOD(trtxpy_dispatch(graph, &sets[0].in, 1, &sets[1].out, 1, NULL));
    CHECK(doubling_right(&sets[1], 5));
    GOOD(trtxpy_graph_get_statistics(graph, &statistics));
    CHECK_EQ(statistics.zero_copy, 150);
    /* submitted */
    trtxpy_submit_options how = TRTXPY_SUBMIT_OPTIONS_INIT;
    trtxpy_request request;
    trtxpy_status outcome;
    doubling_fill(&sets[2], 9);
    GOOD(trtxpy_submit(graph, &sets[2].in, 1, &sets[2].out, 1, &how, &request));
    GOOD(trtxpy_request_wait(request, UINT64_MAX, &outcome));
    GOOD(trtxpy_request_destroy(request));
    CHECK(doubling_right(&sets[2], 9));
    trtxpy_shape other = shape_of(2, 1, 4);
    CHECK_EQ(trtxpy_tensor_resize(sets[0].x, &other), TRTXPY_UNSUPPORTED);
    CHECK_EQ(trtxpy_graph_destroy(graph), TRTXPY_BORROWED);
    for (int i = 0; i < 3; i++) {
        GOOD(trtxpy_tensor_destroy(sets[i].x));
        GOOD(trtxpy_tensor_destroy(sets[i].y));
    }
    GOOD(trtxpy_graph_create_tensors(graph, &shape, 1, &sets[3].x, 1, &sets[3].y, 1)); /* the slot is free again */
    GOOD(trtxpy_tensor_destroy(sets[3].x));
    GOOD(trtxpy_tensor_destroy(sets[3].y));
    GOOD(trtxpy_graph_destroy(graph));
    GOOD(trtxpy_context_destroy(context));
}

int main(void) {
    RUN(names_come_in_any_order);
    RUN(shapes_follow_each_other);
    RUN(no_more_shapes_are_kept_than_was_said);
    RUN(a_callback_comes_once);
    RUN(calls_from_a_callback);
    RUN(what_is_in_flight_is_busy_and_borrowed);
    RUN(asking_does_not_disturb);
    RUN(what_may_be_asked_in_flight);
    RUN(cancelled_and_timed_out);
    RUN(a_cancel_that_succeeds_is_kept);
    RUN(slots_run_short);
    RUN(a_queue_for_an_event_loop);
    RUN(python_knows_a_thread_until_it_ends);
    RUN(eight_threads_on_one_graph);
    RUN(sixty_four_threads_destroy_one_graph);
    RUN(tensors_in_the_graphs_own_memory);
    CHECK_EQ(live_objects(), 0);
    GOOD(trtxpy_shutdown());
    CHECK_EQ(trtxpy_init(NULL), TRTXPY_CLOSED);
    return report();
}
