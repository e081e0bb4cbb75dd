/* Requests, queues, one call for everything. */
#include "fake.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* ---- requests ---- */

static object *posted;

/* With the mutex, in the graph's order: input, output. */
static object *bind(trtxpy_graph handle, const trtxpy_binding *inputs, size_t input_count, const trtxpy_binding *outputs,
                    size_t output_count, object **input, object **output) {
    object *graph = find(handle, GRAPH);
    if (!graph) return NULL;
    if (input_count != 1 || output_count != 1) fail(TRTXPY_INVALID_ARGUMENT, "%zu inputs, %zu outputs", input_count, output_count);
    else if (strcmp(inputs[0].name, "x") != 0) fail(TRTXPY_NOT_FOUND, "the graph has no input '%s'", inputs[0].name);
    else if (strcmp(outputs[0].name, "y") != 0) fail(TRTXPY_NOT_FOUND, "the graph has no output '%s'", outputs[0].name);
    else if ((*input = find(inputs[0].tensor, TENSOR)) && (*output = find(outputs[0].tensor, TENSOR))) {
        if ((*input)->parent != graph->parent || (*output)->parent != graph->parent)
            fail(TRTXPY_INVALID_ARGUMENT, "a tensor is of another context");
        else if ((*input)->dtype != graph->dtype || (*output)->dtype != graph->dtype) fail(TRTXPY_DTYPE, "input 'x' has another type");
        else if (!fits(graph, &(*input)->shape)) fail(TRTXPY_SHAPE, "input 'x' has another shape");
        else if ((*input)->use < 0 || (*output)->use || *input == *output) fail(TRTXPY_BUSY, "a tensor is in use");
    }
    if (error_status != TRTXPY_OK) return NULL;
    graph->submitted++;
    graph->in_flight++;
    (*input)->use++;
    (*output)->use = -1;
    graph->children++;
    return graph;
}

/* With the mutex. */
static trtxpy_status run(object *graph, object *input, object *output, bool resize, bool cancelled) {
    begin();
    if (cancelled) fail(TRTXPY_CANCELLED, "the request was cancelled");
    else if (graph->fails) fail(TRTXPY_EXECUTION, "it fails, as it was told");
    else if (output->bytes != input->bytes && !resize) fail(TRTXPY_SHAPE, "output 'y' has another shape");
    else if (output->bytes != input->bytes) reshape(output, &input->shape);
    if (error_status == TRTXPY_OK) memcpy(output->data, input->data, input->bytes);
    input->use--;
    output->use = 0;
    graph->children--;
    graph->in_flight--;
    if (error_status == TRTXPY_OK) graph->completed++;
    else if (cancelled) graph->cancelled++;
    else graph->failed++;
    return error_status;
}

trtxpy_status trtxpy_dispatch(trtxpy_graph handle, const trtxpy_binding *inputs, size_t input_count, const trtxpy_binding *outputs,
                              size_t output_count, const trtxpy_dispatch_options *options) {
    begin();
    if (in_callback) return fail(TRTXPY_IN_CALLBACK, "trtxpy_dispatch waits");
    if (options && options->timeout_ns) return fail(TRTXPY_INTERNAL, "the fake has no timeouts");
    pthread_mutex_lock(&mutex);
    object *input, *output, *graph = bind(handle, inputs, input_count, outputs, output_count, &input, &output);
    if (graph) {
        uint64_t duration_ns = graph->parent->duration_ns;
        pthread_mutex_unlock(&mutex);
        if (duration_ns) usleep((useconds_t)(duration_ns / 1000));
        pthread_mutex_lock(&mutex);
        run(graph, input, output, options && options->resize_outputs, false);
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}

trtxpy_status trtxpy_submit(trtxpy_graph handle, const trtxpy_binding *inputs, size_t input_count, const trtxpy_binding *outputs,
                            size_t output_count, const trtxpy_submit_options *options, trtxpy_request *request) {
    begin();
    if (request) *request = NULL;
    pthread_mutex_lock(&mutex);
    object *queue = options->queue ? find(options->queue, QUEUE) : NULL, *input, *output, *made;
    object *graph = error_status == TRTXPY_OK ? bind(handle, inputs, input_count, outputs, output_count, &input, &output) : NULL;
    if (graph) {
        void *new = make(REQUEST, NULL, &made);
        made->graph = graph;
        made->input = input;
        made->output = output;
        made->queue = queue;
        made->callback = options->callback;
        made->userdata = options->userdata;
        made->resize = options->resize_outputs;
        made->result = (trtxpy_result){sizeof made->result, options->token, now_ns(), now_ns(), 0, 1, 0};
        made->due_ns = now_ns() + graph->parent->duration_ns;
        made->handle_open = request != NULL;
        if (queue) queue->children++;
        if (request) *request = new;
        else drop_handle(new);
        object **last = &posted;
        while (*last) last = &(*last)->next;
        *last = made;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}

static void push(object *queue, const object *request) {
    queue->ring = realloc(queue->ring, (queue->count + 1) * sizeof *queue->ring);
    trtxpy_completion *completion = &queue->ring[queue->count++];
    memset(completion, 0, sizeof *completion);
    completion->status = request->status;
    completion->result = request->result;
    strcpy(completion->message, request->message);
    queue->children--;
    uint64_t one = 1;
    if (write(queue->fd, &one, sizeof one) < 0) abort();
}

static _Noreturn void complete_forever(void) {
    pthread_mutex_lock(&mutex);
    for (;;) {
        object **at = &posted;
        uint64_t now = now_ns(), due = now + 20000000;
        while (*at && (*at)->due_ns > now) {
            if ((*at)->due_ns < due) due = (*at)->due_ns;
            at = &(*at)->next;
        }
        object *request = *at;
        if (!request) {
            struct timespec until;
            clock_gettime(CLOCK_REALTIME, &until);
            uint64_t ns = (uint64_t)until.tv_nsec + (due - now);
            until.tv_sec += (time_t)(ns / 1000000000u);
            until.tv_nsec = (long)(ns % 1000000000u);
            if (posted) pthread_cond_timedwait(&changed, &mutex, &until);
            else pthread_cond_wait(&changed, &mutex);
            continue;
        }
        *at = request->next;
        request->status = run(request->graph, request->input, request->output, request->resize, request->is_cancelled);
        strncpy(request->message, error_text, sizeof request->message - 1);
        request->result.completed_ns = now_ns();
        request->done = true;
        if (request->queue) push(request->queue, request);
        object shown = *request;
        if (!request->handle_open) free_object(request);
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&mutex);
        if (shown.callback) {
            in_callback = true;
            shown.callback(shown.status, shown.status == TRTXPY_OK ? NULL : shown.message, &shown.result, shown.userdata);
            in_callback = false;
        }
        pthread_mutex_lock(&mutex);
    }
}

void *complete(void *unused) {
    (void)unused;
    complete_forever();
}

trtxpy_status trtxpy_request_cancel(trtxpy_request handle) {
    begin();
    pthread_mutex_lock(&mutex);
    object *request = find(handle, REQUEST);
    if (request && request->done) fail(TRTXPY_NOT_FOUND, "the request is complete already");
    else if (request) request->is_cancelled = true; /* launched: it completes when it is due */
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_request_wait(trtxpy_request handle, uint64_t timeout_ns, trtxpy_status *outcome) {
    begin();
    if (in_callback && timeout_ns) return fail(TRTXPY_IN_CALLBACK, "trtxpy_request_wait waits");
    uint64_t now = now_ns(), until_ns = timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
    pthread_mutex_lock(&mutex);
    object *request = find(handle, REQUEST);
    while (request && !request->done && now_ns() < until_ns) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 1000000;
        if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
        pthread_cond_timedwait(&changed, &mutex, &until);
        request = find(handle, REQUEST);
    }
    if (request && !request->done) fail(timeout_ns ? TRTXPY_TIMEOUT : TRTXPY_NOT_READY, "still in flight");
    else if (request) {
        *outcome = request->status;
        fail(request->status, "%s", request->message);
        error_status = TRTXPY_OK;
    }
    trtxpy_status status = request ? error_status : TRTXPY_INVALID_HANDLE;
    pthread_mutex_unlock(&mutex);
    return status;
}
trtxpy_status trtxpy_request_destroy(trtxpy_request request) { return destroy(request, REQUEST); }

/* ---- queues ---- */

trtxpy_status trtxpy_queue_create(trtxpy_context context, trtxpy_queue *queue) {
    begin();
    *queue = NULL;
    pthread_mutex_lock(&mutex);
    object *parent = find(context, CONTEXT), *made;
    if (parent) {
        *queue = make(QUEUE, parent, &made);
        made->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_queue_destroy(trtxpy_queue queue) { return destroy(queue, QUEUE); }
trtxpy_status trtxpy_queue_fd(trtxpy_queue queue, int *fd) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(queue, QUEUE);
    if (found) *fd = found->fd;
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_queue_take(trtxpy_queue queue, trtxpy_completion *completions, size_t room, size_t *taken) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(queue, QUEUE);
    if (found) {
        *taken = found->count < room ? found->count : room;
        if (*taken) {
            memcpy(completions, found->ring, *taken * sizeof *completions);
            memmove(found->ring, found->ring + *taken, (found->count - *taken) * sizeof *completions);
            found->count -= *taken;
        }
        uint64_t value;
        if (!found->count && read(found->fd, &value, sizeof value) < 0 && errno != EAGAIN) abort();
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}

/* ---- one call for everything ---- */

static trtxpy_status run_once(trtxpy_context context, const void *model, size_t model_bytes, const trtxpy_array *input,
                              trtxpy_results *results) {
    trtxpy_graph graph;
    *results = NULL;
    char text[256] = "";
    memcpy(text, model, model_bytes < 255 ? model_bytes : 255);
    if (open_graph(context, model, model_bytes, strncmp(text, "plan ", 5) == 0, &graph) != TRTXPY_OK) return error_status;
    pthread_mutex_lock(&mutex);
    object *opened = find(graph, GRAPH), *made;
    trtxpy_shape shape = opened->shape;
    for (int i = 0; i < shape.rank; i++)
        if (shape.dims[i] < 0) shape.dims[i] = 1;
    if (input) shape = input->shape;
    size_t bytes = 0;
    trtxpy_dtype_bytes(opened->dtype, &shape, &bytes);
    if (error_status != TRTXPY_OK) ;
    else if (opened->fails) fail(TRTXPY_EXECUTION, "it fails, as it was told");
    else if (input && strcmp(input->name, "x") != 0) fail(TRTXPY_NOT_FOUND, "the model has no input '%s'", input->name);
    else if (input && input->dtype != opened->dtype) fail(TRTXPY_DTYPE, "input 'x' has another type");
    else if (!fits(opened, &shape)) fail(TRTXPY_SHAPE, "input 'x' has another shape");
    else if (input && input->bytes != bytes) fail(TRTXPY_BUFFER_SIZE, "%zu bytes; expected %zu", input->bytes, bytes);
    else {
        *results = make(RESULTS, opened->parent, &made);
        made->data = calloc(1, bytes ? bytes : 1);
        if (input) memcpy(made->data, input->data, bytes);
        made->array = (trtxpy_array){sizeof made->array, "y", opened->dtype, 0, shape, bytes ? made->data : NULL, bytes};
    }
    trtxpy_status status = error_status;
    char kept[sizeof error_text];
    strcpy(kept, error_text);
    pthread_mutex_unlock(&mutex);
    trtxpy_graph_destroy(graph);
    return status == TRTXPY_OK ? begin() : fail(status, "%s", kept);
}
trtxpy_status trtxpy_run(trtxpy_context context, const void *model, size_t model_bytes, const void *weights, size_t weights_bytes,
                         const trtxpy_array *inputs, size_t input_count, const trtxpy_graph_options *options,
                         trtxpy_results *results) {
    (void)weights, (void)weights_bytes, (void)options;
    *results = NULL;
    if (input_count != 1) return fail(TRTXPY_INVALID_ARGUMENT, "%zu inputs; expected 1", input_count);
    return run_once(context, model, model_bytes, inputs, results);
}
trtxpy_status trtxpy_run_zeroed(trtxpy_context context, const void *model, size_t model_bytes, const void *weights,
                                size_t weights_bytes, const trtxpy_graph_options *options, trtxpy_results *results) {
    (void)weights, (void)weights_bytes, (void)options;
    return run_once(context, model, model_bytes, NULL, results);
}
trtxpy_status trtxpy_results_count(trtxpy_results results, size_t *count) {
    begin();
    pthread_mutex_lock(&mutex);
    if (find(results, RESULTS)) *count = 1;
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_results_get(trtxpy_results results, size_t index, trtxpy_array *array) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(results, RESULTS);
    if (found && index) fail(TRTXPY_NOT_FOUND, "%zu", index);
    else if (found) *array = found->array;
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_results_destroy(trtxpy_results results) { return destroy(results, RESULTS); }
