/* What needs a process of its own: its exit while requests are on their way, and threads that cannot be started. Each runs as
 * this program once more, with the name of what it does; it writes a letter for each completion, and one when it ends. */
#include "api_test.h"

#include <dlfcn.h>
#include <errno.h>
#include <sys/wait.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 }; /* the sanitizer has a pthread_create of its own */
#else
enum { SANITIZED = 0 };

static atomic_bool refuse_watcher;
static atomic_int refused;

/* The data plane's watcher is the only thread that trtx_py._native starts. */
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
    int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    Dl_info where;
    *(void **)&create = dlsym(RTLD_NEXT, "pthread_create");
    if (atomic_load(&refuse_watcher) && dladdr((void *)(uintptr_t)body, &where) && strstr(where.dli_fname, "trtx_py/_native")) {
        atomic_fetch_add(&refused, 1);
        return EAGAIN;
    }
    return create(thread, attributes, body, argument);
}
#endif

static void write_one(char letter) {
    if (write(STDOUT_FILENO, &letter, 1) != 1) _exit(3);
}

static atomic_int completed;

static void write_letter(trtxpy_status status, const char *message, const trtxpy_result *result, void *userdata) {
    (void)message;
    (void)result;
    (void)userdata;
    write_one(status == TRTXPY_OK ? 'o' : status == TRTXPY_CANCELLED ? 'c' : '?');
    atomic_fetch_add(&completed, 1);
}

/* ---- the processes ---- */

enum { MANY = 80 };

static void submit_many(bool captured) {
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    options.no_cuda_graphs = !captured;
    options.slots = 2;
    doubling d = {.context = open_context("mock:duration_s=0.7")};
    d.graph = open_model_with(d.context, "double.onnx", &options);
    doubling_tensors(&d, 1);
    trtxpy_named_shape shape = {"x", shape_of(2, 1, 4)};
    if (captured) GOOD(trtxpy_graph_prepare(d.graph, &shape, 1));
    trtxpy_submit_options how = TRTXPY_SUBMIT_OPTIONS_INIT;
    how.callback = write_letter;
    for (int i = 0; i < MANY; i++) {
        trtxpy_binding out = {"y", make_tensor(d.context, TRTXPY_FLOAT32, shape_of(2, 1, 4))};
        GOOD(trtxpy_submit(d.graph, &d.in, 1, &out, 1, &how, NULL));
    }
    while (!atomic_load(&completed)) usleep(1000); /* others are under way then */
    write_one('e');
}

/* A thread that dispatches until it is refused. It is joined behind the library's end: whoever registered first is called last. */
static pthread_t dispatcher;
static doubling dispatched;

static void join_dispatcher(void) {
    pthread_join(dispatcher, NULL);
}

static void *dispatch_on(void *unused) {
    (void)unused;
    trtxpy_status status;
    do {
        status = trtxpy_dispatch(dispatched.graph, &dispatched.in, 1, &dispatched.out, 1, NULL);
        write_one(status == TRTXPY_OK ? 'o' : status == TRTXPY_CLOSED ? 'c' : '?');
    } while (status == TRTXPY_OK);
    return NULL;
}

static void exit_beside_a_dispatch(trtxpy_location location) {
    doubling *d = &dispatched;
    atexit(join_dispatcher);
    *d = (doubling){.context = open_context("mock:duration_s=0.3")};
    d->graph = open_model(d->context, "double.onnx");
    d->in = (trtxpy_binding){"x", make_tensor_at(d->context, TRTXPY_FLOAT32, shape_of(2, 1, 4), location)};
    d->out = (trtxpy_binding){"y", make_tensor_at(d->context, TRTXPY_FLOAT32, shape_of(2, 1, 4), location)};
    GOOD(trtxpy_dispatch(d->graph, &d->in, 1, &d->out, 1, NULL)); /* what is captured, is */
    pthread_create(&dispatcher, NULL, dispatch_on, NULL);
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    while (statistics.captured + statistics.uncaptured < 2) GOOD(trtxpy_graph_get_statistics(d->graph, &statistics));
}

/* What destructors of static objects do: they come behind the library's end, to what was open then. */
static trtxpy_tensor late_tensors[2];

static void use_late(void) {
    doubling *d = &dispatched;
    CHECK_EQ(trtxpy_dispatch(d->graph, &d->in, 1, &d->out, 1, NULL), TRTXPY_CLOSED);
    CHECK_EQ(trtxpy_submit(d->graph, &d->in, 1, &d->out, 1, NULL, NULL), TRTXPY_CLOSED);
    float values[8] = {0};
    CHECK_EQ(trtxpy_tensor_write(d->x, values, sizeof values), TRTXPY_CLOSED);
    CHECK_EQ(trtxpy_tensor_read(d->y, values, sizeof values), TRTXPY_CLOSED);
    trtxpy_named_shape shape = {"x", shape_of(2, 2, 4)};
    trtxpy_tensor x, y;
    CHECK_EQ(trtxpy_graph_create_tensors(d->graph, &shape, 1, &x, 1, &y, 1), TRTXPY_CLOSED);
    GOOD(trtxpy_tensor_destroy(late_tensors[0]));
    GOOD(trtxpy_tensor_destroy(late_tensors[1])); /* the slot goes back to a lane that is no more */
    GOOD(trtxpy_tensor_destroy(d->x));
    GOOD(trtxpy_tensor_destroy(d->y));
    CHECK_EQ(trtxpy_graph_destroy(d->graph), TRTXPY_CLOSED); /* it is gone all the same */
    CHECK_EQ(trtxpy_context_destroy(d->context), TRTXPY_CLOSED);
    CHECK_EQ(live_objects(), 0);
    write_one(failed_checks ? '?' : 'o');
}

static void exit_with_all_open(void) {
    atexit(use_late);
    doubling_open(&dispatched, "mock", 2);
    GOOD(trtxpy_dispatch(dispatched.graph, &dispatched.in, 1, &dispatched.out, 1, NULL));
    trtxpy_named_shape shape = {"x", shape_of(2, 2, 4)};
    GOOD(trtxpy_graph_create_tensors(dispatched.graph, &shape, 1, &late_tensors[0], 1, &late_tensors[1], 1));
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static void submit_unwatched(void) {
    doubling d;
    doubling_open(&d, "mock:duration_s=0.05", 1);
    trtxpy_named_shape shape = {"x", shape_of(2, 1, 4)};
    GOOD(trtxpy_graph_prepare(d.graph, &shape, 1));
    atomic_store(&refuse_watcher, true);
    trtxpy_submit_options how = TRTXPY_SUBMIT_OPTIONS_INIT;
    how.callback = write_letter;
    for (int i = 0; i < 3; i++) {
        doubling_fill(&d, (float)i);
        trtxpy_request request;
        trtxpy_status outcome = -1;
        GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &how, &request));
        CHECK_EQ(trtxpy_request_wait(request, 60000 * MS, &outcome), TRTXPY_OK);
        CHECK_EQ(outcome, TRTXPY_OK);
        if (outcome != TRTXPY_OK) _exit(4); /* it hangs */
        GOOD(trtxpy_request_destroy(request));
        CHECK(doubling_right(&d, (float)i));
    }
    CHECK(atomic_load(&refused) > 0); /* else this tests nothing */
    atomic_store(&refuse_watcher, false);
    GOOD(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &how, NULL)); /* and the next one may be watched again */
    while (trtxpy_tensor_read(d.y, (float[4]){0}, 16) == TRTXPY_BUSY) usleep(1000);
    doubling_close(&d);
}
#endif

static int be(const char *what) {
    if (strcmp(what, "backlog") == 0) submit_many(false);
    else if (strcmp(what, "row") == 0) submit_many(true);
    else if (strcmp(what, "dispatch") == 0) exit_beside_a_dispatch(TRTXPY_HOST);
    else if (strcmp(what, "late") == 0) exit_with_all_open();
    else if (strcmp(what, "device") == 0) exit_beside_a_dispatch(TRTXPY_DEVICE);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    else if (strcmp(what, "unwatched") == 0) submit_unwatched();
#endif
    else return 2;
    return failed_checks ? 1 : 0;
}

/* ---- what is expected of them ---- */

typedef struct outcome {
    int good, cancelled, other;
    int late;       /* of the good ones: heard of behind its 'e' */
    double seconds; /* from that to its end */
} outcome;

static outcome run_process(const char *what) {
    outcome found = {0};
    int ends[2], status = -1;
    CHECK_EQ(pipe(ends), 0);
    uint64_t ending = 0;
    pid_t child = fork(); /* nothing of the library has started here */
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        execl("/proc/self/exe", "test_processes", what, (char *)NULL);
        _exit(5);
    }
    close(ends[1]);
    char letter;
    while (read(ends[0], &letter, 1) == 1) {
        if (letter == 'e' && !ending) {
            ending = real_ns();
            continue;
        }
        found.good += letter == 'o';
        found.late += letter == 'o' && ending;
        found.cancelled += letter == 'c';
        found.other += letter != 'o' && letter != 'c';
    }
    close(ends[0]);
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
    if (ending) found.seconds = (double)(real_ns() - ending) / 1e9;
    return found;
}

/* Of 80 requests of 0.7 s each four or two run; to run all of them would take 14 s or 28 s. */
static void check_exit(const char *what, int most) {
    outcome found = run_process(what);
    CHECK_EQ(found.good + found.cancelled, MANY);
    CHECK_EQ(found.other, 0);
    CHECK(found.good >= 1 && found.late <= most);
    CHECK(found.cancelled >= 1); /* else it had run all of them before */
    CHECK(found.seconds < 10);
}

static void an_exit_does_not_wait_for_what_has_not_begun(void) {
    check_exit("backlog", 8);
}

static void an_exit_does_not_wait_for_what_waits_for_a_slot(void) {
    check_exit("row", 6);
}

/* Graphs, and the memory that they and the waiting thread use, would go under them otherwise. */
static void an_exit_waits_for_what_another_thread_dispatched(void) {
    const char *const places[] = {"dispatch", "device"};
    for (int i = 0; i < 2; i++) {
        outcome found = run_process(places[i]);
        CHECK(found.good >= 1);
        CHECK_EQ(found.cancelled, 1); /* the next one is refused */
        CHECK_EQ(found.other, 0);
    }
}

static void what_comes_behind_the_end_touches_nothing_of_python(void) {
    outcome found = run_process("late");
    CHECK_EQ(found.good, 1);
    CHECK_EQ(found.other, 0);
}

static void without_a_watcher_requests_complete_all_the_same(void) {
    if (SANITIZED) return;
    outcome found = run_process("unwatched");
    CHECK_EQ(found.good, 4);
    CHECK_EQ(found.cancelled + found.other, 0);
}

int main(int count, char **arguments) {
    if (count > 1) return be(arguments[1]);
    RUN(an_exit_does_not_wait_for_what_has_not_begun);
    RUN(an_exit_does_not_wait_for_what_waits_for_a_slot);
    RUN(an_exit_waits_for_what_another_thread_dispatched);
    RUN(what_comes_behind_the_end_touches_nothing_of_python);
    RUN(without_a_watcher_requests_complete_all_the_same);
    return report();
}
