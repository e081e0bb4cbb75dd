/* Requests: binding tensors, a slot, the launch, the results. What a caller waits for and what completes later share this. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

/* How long somebody who waits for a slot sleeps before he looks by himself: Python may have had a slot meanwhile, and tells
 * nobody that it is free again. */
enum { LOOK_NS = 2000000 };

/* ---- errors of the driver ---- */

trtxpy_status trtxpy_cuda_fail(CUresult status, const char *call) {
    static const struct {
        CUresult code;
        const char *name;
    } names[] = {
        {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},     {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"}, {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},   {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},     {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN"},
    };
    const char *name = "a CUresult";
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == status) name = names[i].name;
    return trtxpy_fail(status == CUDA_ERROR_OUT_OF_MEMORY ? TRTXPY_OUT_OF_MEMORY : TRTXPY_CUDA, "%s returned %s (%d)", call, name, status);
}

/* ---- binding ---- */

static trtxpy_status bind_one(trtxpy_job *job, trtxpy_direction direction, const trtxpy_binding *binding, size_t number) {
    trtxpy_graph_object *graph = job->graph;
    const char *kind = direction == TRTXPY_INPUT ? "input" : "output";
    char wanted[TRTXPY_SHAPE_TEXT], found[TRTXPY_SHAPE_TEXT];
    if (!binding->name) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "the name of %s %zu is NULL", kind, number);
    size_t index = trtxpy_graph_find(graph, direction, binding->name, number);
    if (index == (size_t)-1) return trtxpy_fail(TRTXPY_NOT_FOUND, "the graph has no %s '%s'", kind, binding->name);
    trtxpy_port *port = trtxpy_graph_port(graph, direction, index);
    trtxpy_tensor_object **place = &job->tensors[direction == TRTXPY_INPUT ? index : graph->input_count + index];
    if (*place) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s '%s' is given twice", kind, port->name);
    trtxpy_tensor_object *tensor = trtxpy_handle_acquire(binding->tensor, TRTXPY_KIND_TENSOR, binding->name);
    if (!tensor) return TRTXPY_INVALID_HANDLE;
    trtxpy_status status = TRTXPY_OK;
    if (tensor->context != graph->context)
        status = trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s '%s': the tensor is of another context than the graph", kind, port->name);
    else if (tensor->dtype != port->dtype)
        status = trtxpy_fail(TRTXPY_DTYPE, "%s '%s' is %s; expected %s", kind, port->name, trtxpy_dtype_name(tensor->dtype),
                             trtxpy_dtype_name(port->dtype));
    else if (direction == TRTXPY_INPUT ? !trtxpy_tensor_begin_read(tensor) : !trtxpy_tensor_begin_write(tensor))
        status = trtxpy_fail(TRTXPY_BUSY, "%s '%s': the tensor is in use by a request in flight%s", kind, port->name,
                             direction == TRTXPY_OUTPUT ? ", or is an input or another output of this one" : "");
    if (status != TRTXPY_OK) {
        trtxpy_handle_release(&tensor->head);
        return status;
    }
    *place = tensor;
    job->bound++;
    if (trtxpy_tensor_on_device(tensor)) job->device = true;
    if (direction == TRTXPY_OUTPUT) return TRTXPY_OK;
    bool fits = tensor->shape.rank == port->shape.rank;
    for (int32_t axis = 0; fits && axis < port->shape.rank; axis++)
        fits = port->shape.dims[axis] < 0 || port->shape.dims[axis] == tensor->shape.dims[axis];
    if (!fits)
        return trtxpy_fail(TRTXPY_SHAPE, "input '%s' has shape %s; expected %s", port->name, trtxpy_shape_text(&tensor->shape, found),
                           trtxpy_shape_text(&port->shape, wanted));
    return TRTXPY_OK;
}

/* All tensors are one group's, each in its own role. */
static bool is_grouped(const trtxpy_job *job) {
    const trtxpy_graph_object *graph = job->graph;
    trtxpy_group *group = job->bound ? job->tensors[0]->group : NULL;
    for (size_t i = 0; group && i < job->bound; i++) {
        const trtxpy_tensor_object *tensor = job->tensors[i];
        size_t position = tensor->role == TRTXPY_INPUT ? tensor->position : graph->input_count + tensor->position;
        if (tensor->group != group || position != i) return false;
    }
    return group && trtxpy_group_graph(group) == graph;
}

trtxpy_status trtxpy_job_bind(trtxpy_job *job, trtxpy_graph_object *graph, const trtxpy_binding *inputs, size_t input_count,
                              const trtxpy_binding *outputs, size_t output_count) {
    size_t count = graph->input_count + graph->output_count;
    job->graph = graph;
    job->bound = 0;
    job->tensors = job->few;
    if ((input_count && !inputs) || (output_count && !outputs))
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is NULL", input_count && !inputs ? "inputs" : "outputs");
    if (input_count != graph->input_count || output_count != graph->output_count)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%zu inputs and %zu outputs were given; the graph has %zu and %zu", input_count,
                           output_count, graph->input_count, graph->output_count);
    if (count > TRTXPY_FEW_TENSORS && !(job->tensors = calloc(count, sizeof *job->tensors))) {
        job->tensors = job->few;
        return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for %zu tensors", count);
    }
    memset(job->few, 0, sizeof job->few);
    trtxpy_status status = TRTXPY_OK;
    for (size_t i = 0; i < input_count && status == TRTXPY_OK; i++) status = bind_one(job, TRTXPY_INPUT, &inputs[i], i);
    for (size_t i = 0; i < output_count && status == TRTXPY_OK; i++) status = bind_one(job, TRTXPY_OUTPUT, &outputs[i], i);
    if (status != TRTXPY_OK) {
        trtxpy_job_unbind(job);
        return status;
    }
    job->grouped = is_grouped(job);
    return TRTXPY_OK;
}

void trtxpy_job_unbind(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    for (size_t i = 0; job->bound && i < graph->input_count + graph->output_count; i++) {
        trtxpy_tensor_object *tensor = job->tensors[i];
        if (!tensor) continue;
        trtxpy_tensor_end_use(tensor, i >= graph->input_count);
        trtxpy_handle_release(&tensor->head);
        job->bound--;
    }
    if (job->tensors != job->few) free(job->tensors);
    job->tensors = job->few;
    memset(job->few, 0, sizeof job->few);
}

static trtxpy_status fit(trtxpy_job *job, size_t output, const trtxpy_shape *shape) {
    trtxpy_graph_object *graph = job->graph;
    trtxpy_tensor_object *tensor = job->tensors[graph->input_count + output];
    char wanted[TRTXPY_SHAPE_TEXT], found[TRTXPY_SHAPE_TEXT];
    if (trtxpy_shape_equal(&tensor->shape, shape)) return TRTXPY_OK;
    if (job->resize) return trtxpy_tensor_reshape(tensor, shape);
    return trtxpy_fail(TRTXPY_SHAPE, "output '%s' has shape %s; these inputs give %s", graph->ports[graph->input_count + output].name,
                       trtxpy_shape_text(&tensor->shape, found), trtxpy_shape_text(shape, wanted));
}

trtxpy_status trtxpy_job_fit_outputs(trtxpy_job *job) {
    trtxpy_status status = TRTXPY_OK;
    for (size_t i = 0; i < job->graph->output_count && status == TRTXPY_OK; i++)
        status = fit(job, i, &job->entry->shapes[job->graph->input_count + i]);
    return status;
}

/* ---- slots ---- */

bool trtxpy_job_take_slot(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    const trtxpy_entry *entry = job->entry;
    size_t first = graph->turn++ % entry->lane_count;
    for (int look = 0; look < 2; look++) /* those that are known to be free first */
        for (size_t i = 0; i < entry->lane_count; i++) {
            size_t lane = (first + i) % entry->lane_count;
            const trtxpy_entry_lane *place = &entry->lanes[lane];
            if (trtxpy_lanes()->acquire_among(place->lane, place->mask, place->words, look != 0, &job->slot) != CUDA_SUCCESS) continue;
            job->lane = lane;
            return job->has_slot = true;
        }
    return false;
}

void trtxpy_graph_enqueue(trtxpy_graph_object *graph, trtxpy_job *job) {
    job->next = NULL;
    job->previous = graph->last;
    if (graph->last) graph->last->next = job;
    else graph->first = job;
    graph->last = job;
    graph->queued++;
}

void trtxpy_graph_dequeue(trtxpy_graph_object *graph, trtxpy_job *job) {
    if (job->previous) job->previous->next = job->next;
    else graph->first = job->next;
    if (job->next) job->next->previous = job->previous;
    else graph->last = job->previous;
    job->next = job->previous = NULL;
    graph->queued--;
}

/* First come, first served; a job whose lanes are full does not hold up those behind it for long: all share the lanes. */
void trtxpy_graph_pump(trtxpy_graph_object *graph) {
    trtxpy_job *ready = NULL, *last = NULL;
    pthread_mutex_lock(&graph->mutex);
    bool told = false;
    while (graph->first && trtxpy_job_take_slot(graph->first)) {
        trtxpy_job *job = graph->first;
        trtxpy_graph_dequeue(graph, job);
        if (job->here) {
            told = true;
        } else {
            job->phase = TRTXPY_LAUNCHED;
            if (last) last->next = job;
            else ready = job;
            last = job;
        }
    }
    if (told) pthread_cond_broadcast(&graph->slot_came);
    pthread_mutex_unlock(&graph->mutex);
    /* What goes wrong with another's request is no error of this thread's. */
    if (!ready) return;
    trtxpy_kept_error before = trtxpy_keep_error();
    while (ready) {
        trtxpy_job *job = ready;
        ready = job->next;
        job->next = NULL;
        trtxpy_status status = trtxpy_job_launch(job, trtxpy_completer_hub());
        if (status != TRTXPY_OK) trtxpy_job_end(job, status);
    }
    trtxpy_restore_error(&before);
}

void trtxpy_job_give_back(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    if (job->has_slot) {
        trtxpy_lanes()->release(job->entry->lanes[job->lane].lane, job->slot);
        job->has_slot = false;
    }
    if (job->entry) trtxpy_entry_release(graph, job->entry);
    job->entry = NULL;
}

/* ---- launch and results ---- */

static const trtxpy_place *place_of(const trtxpy_job *job) {
    return &job->entry->lanes[job->lane].places[job->slot];
}

trtxpy_status trtxpy_job_launch(trtxpy_job *job, trtx_hub *hub) {
    trtxpy_graph_object *graph = job->graph;
    const trtxpy_place *place = place_of(job);
    trtx_lane *lane = job->entry->lanes[job->lane].lane;
    for (size_t i = 0; !job->grouped && i < graph->input_count; i++) {
        const trtxpy_tensor_object *tensor = job->tensors[i];
        const trtxpy_port *port = &graph->ports[i];
        trtxpy_status status = trtxpy_convert(place->data[i], port->engine_dtype, tensor->data, port->dtype, tensor->elements, port->name);
        if (status != TRTXPY_OK) return status;
    }
    job->result.captured = 1;
    job->result.launched_ns = trtxpy_now_ns();
    /* With a hub the job may be over, and gone, before submit returns; its graph may be, but for whoever calls this. */
    size_t slot = job->slot;
    atomic_fetch_add_explicit(&graph->counts.captured, 1, memory_order_relaxed);
    if (job->grouped) atomic_fetch_add_explicit(&graph->counts.zero_copy, 1, memory_order_relaxed);
    CUresult status = trtxpy_lanes()->submit(lane, slot, place->exec, (uint64_t)(uintptr_t)job, hub);
    if (status != CUDA_SUCCESS) {
        atomic_fetch_sub_explicit(&graph->counts.captured, 1, memory_order_relaxed);
        if (job->grouped) atomic_fetch_sub_explicit(&graph->counts.zero_copy, 1, memory_order_relaxed);
        return trtxpy_cuda_fail(status, "cuGraphLaunch");
    }
    if (!hub) return TRTXPY_OK;
    /* Refused as invalid if it is over already, and then the hub knows. Anything else: the watcher's thread cannot be started.
     * That is no reason to fail what is launched: the completer looks in its stead. */
    status = trtxpy_lanes()->arm(lane, slot);
    if (status != CUDA_SUCCESS && status != CUDA_ERROR_INVALID_VALUE) trtxpy_completer_watch();
    return TRTXPY_OK;
}

trtxpy_status trtxpy_job_collect(trtxpy_job *job, CUresult cuda) {
    trtxpy_graph_object *graph = job->graph;
    if (cuda != CUDA_SUCCESS) return trtxpy_cuda_fail(cuda, "the replay of a captured graph");
    const trtxpy_place *place = place_of(job);
    for (size_t i = graph->input_count; !job->grouped && i < graph->input_count + graph->output_count; i++) {
        trtxpy_tensor_object *tensor = job->tensors[i];
        const trtxpy_port *port = &graph->ports[i];
        trtxpy_status status = trtxpy_convert(tensor->data, port->dtype, place->data[i], port->engine_dtype, tensor->elements, port->name);
        if (status != TRTXPY_OK) return status;
    }
    return TRTXPY_OK;
}

void trtxpy_graph_count_end(trtxpy_graph_object *graph, trtxpy_status status) {
    atomic_uint_least64_t *count = status == TRTXPY_OK ? &graph->counts.completed
                                   : status == TRTXPY_CANCELLED || status == TRTXPY_TIMEOUT ? &graph->counts.cancelled : &graph->counts.failed;
    atomic_fetch_add_explicit(count, 1, memory_order_relaxed);
    atomic_fetch_sub_explicit(&graph->counts.in_flight, 1, memory_order_relaxed);
}

/* ---- a caller that waits in its own thread ---- */

static void sleep_for_slot(trtxpy_graph_object *graph) {
    struct timespec until;
    uint64_t at = trtxpy_now_ns() + LOOK_NS;
    until.tv_sec = (time_t)(at / 1000000000u);
    until.tv_nsec = (long)(at % 1000000000u);
    pthread_cond_timedwait(&graph->slot_came, &graph->mutex, &until);
}

/* False if it was cancelled meanwhile; only a worker's job can be. */
static bool wait_for_slot(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    bool cancelled = false;
    pthread_mutex_lock(&graph->mutex);
    if (graph->first || !trtxpy_job_take_slot(job)) { /* nobody is overtaken */
        job->here = true;
        trtxpy_graph_enqueue(graph, job);
        while (!job->has_slot) {
            sleep_for_slot(graph);
            if (job->has_slot) break;
            if ((cancelled = atomic_load(&job->cancelled))) {
                trtxpy_graph_dequeue(graph, job);
                break;
            }
            pthread_mutex_unlock(&graph->mutex);
            trtxpy_graph_pump(graph);
            pthread_mutex_lock(&graph->mutex);
        }
    }
    pthread_mutex_unlock(&graph->mutex);
    return !cancelled;
}

static trtxpy_status say_cancelled(void) {
    return trtxpy_fail(TRTXPY_CANCELLED, "the request was cancelled");
}

/* Also for jobs that a worker runs. */
static trtxpy_status run_captured(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    trtxpy_status status = trtxpy_job_fit_outputs(job);
    if (status != TRTXPY_OK) return status;
    void *unlocked = NULL;
    if (job->grouped && trtxpy_group_entry(job->tensors[0]->group) != job->entry) job->grouped = false;
    if (job->grouped) {
        trtxpy_group_slot(job->tensors[0]->group, &job->lane, &job->slot);
    } else {
        unlocked = trtxpy_host_unlock();
        bool granted = wait_for_slot(job);
        trtxpy_host_relock(unlocked);
        if (!granted) return say_cancelled();
    }
    status = atomic_load(&job->cancelled) ? say_cancelled() : trtxpy_job_launch(job, NULL);
    if (status == TRTXPY_OK) {
        /* Whoever computes may want Python's lock: the mock does. */
        unlocked = trtxpy_host_unlock();
        trtx_completion completion;
        trtxpy_lanes()->wait(job->entry->lanes[job->lane].lane, job->slot, graph->context->spin_ns, 0, &completion);
        trtxpy_host_relock(unlocked);
        status = trtxpy_job_collect(job, completion.status);
    }
    trtxpy_job_give_back(job);
    bool others;
    pthread_mutex_lock(&graph->mutex);
    others = graph->first != NULL;
    pthread_mutex_unlock(&graph->mutex);
    if (others) trtxpy_graph_pump(graph);
    return status;
}

trtxpy_status trtxpy_job_run(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    if (job->device) return trtxpy_job_run_in_python(job);
    job->entry = trtxpy_entry_find(graph, (const trtxpy_tensor_object *const *)job->tensors, NULL);
    if (!job->entry) {
        trtxpy_shape *shapes = calloc(graph->input_count ? graph->input_count : 1, sizeof *shapes);
        if (!shapes) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for %zu shapes", graph->input_count);
        for (size_t i = 0; i < graph->input_count; i++) shapes[i] = job->tensors[i]->shape;
        trtxpy_status status = trtxpy_entry_get(graph, shapes, &job->entry);
        free(shapes);
        if (status != TRTXPY_OK) return status;
    }
    if (atomic_load(&job->cancelled)) { /* while it was captured */
        trtxpy_job_give_back(job);
        return say_cancelled();
    }
    if (job->entry->py) {
        trtxpy_status status = run_captured(job);
        trtxpy_job_give_back(job);
        return status;
    }
    trtxpy_job_give_back(job);
    return trtxpy_job_run_in_python(job);
}

static trtxpy_status dispatch(trtxpy_graph_object *graph, const trtxpy_binding *inputs, size_t input_count,
                              const trtxpy_binding *outputs, size_t output_count, const trtxpy_dispatch_options *options) {
    trtxpy_job job;
    memset(&job, 0, offsetof(trtxpy_job, mutex));
    job.resize = options->resize_outputs != 0;
    /* A process that ends waits for this thread, too: the graph and the slot's memory go with Python. */
    trtxpy_status status = trtxpy_requests_enter();
    if (status != TRTXPY_OK) return status;
    status = trtxpy_job_bind(&job, graph, inputs, input_count, outputs, output_count);
    if (status == TRTXPY_OK) {
        atomic_fetch_add_explicit(&graph->counts.submitted, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&graph->counts.in_flight, 1, memory_order_relaxed);
        status = trtxpy_job_run(&job);
        trtxpy_job_unbind(&job);
        trtxpy_graph_count_end(graph, status);
    }
    trtxpy_requests_leave();
    return status;
}

/* What may end before the GPU does must outlive this call. */
static trtxpy_status dispatch_until(trtxpy_graph_object *graph, const trtxpy_binding *inputs, size_t input_count,
                                    const trtxpy_binding *outputs, size_t output_count, const trtxpy_dispatch_options *options) {
    trtxpy_submit_options how = TRTXPY_SUBMIT_OPTIONS_INIT;
    how.resize_outputs = options->resize_outputs;
    trtxpy_job *job;
    trtxpy_status status = trtxpy_submit_job(graph, inputs, input_count, outputs, output_count, &how, &job), outcome;
    if (status != TRTXPY_OK) return status;
    status = trtxpy_job_wait(job, options->timeout_ns, &outcome);
    if (status == TRTXPY_TIMEOUT) {
        if (trtxpy_job_cancel(job)) {
            status = trtxpy_fail(TRTXPY_TIMEOUT, "no result within %llu ns; the request was cancelled", (unsigned long long)options->timeout_ns);
        } else { /* it was complete in that moment */
            trtxpy_begin();
            status = trtxpy_job_wait(job, UINT64_MAX, &outcome);
        }
    }
    trtxpy_job_unreference(job);
    return status == TRTXPY_OK ? outcome : status;
}

trtxpy_status trtxpy_dispatch(trtxpy_graph handle, const trtxpy_binding *inputs, size_t input_count,
                              const trtxpy_binding *outputs, size_t output_count, const trtxpy_dispatch_options *given) {
    trtxpy_status status = trtxpy_enter();
    if (status == TRTXPY_OK) status = trtxpy_refuse_in_callback("trtxpy_dispatch");
    if (status != TRTXPY_OK) return status;
    trtxpy_dispatch_options options = TRTXPY_DISPATCH_OPTIONS_INIT;
    status = trtxpy_read_struct(&options, sizeof options, TRTXPY_SIZE_1_0(trtxpy_dispatch_options), given, "trtxpy_dispatch_options");
    if (status == TRTXPY_OK && options.reserved)
        status = trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "trtxpy_dispatch_options.reserved is %u; expected 0", options.reserved);
    if (status != TRTXPY_OK) return status;
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    status = options.timeout_ns ? dispatch_until(graph, inputs, input_count, outputs, output_count, &options)
                                : dispatch(graph, inputs, input_count, outputs, output_count, &options);
    trtxpy_handle_release(&graph->head);
    return status;
}
