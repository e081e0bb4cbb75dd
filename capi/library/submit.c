/* Requests that complete later: the job lives on the heap until its completion was delivered and its handle destroyed. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

static trtxpy_job *new_job(const trtxpy_submit_options *options) {
    trtxpy_job *job = calloc(1, sizeof *job);
    if (!job) {
        trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for a request");
        return NULL;
    }
    atomic_init(&job->references, 2); /* of the caller, and of the completion */
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&job->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&job->mutex, NULL);
    job->callback = options->callback;
    job->userdata = options->userdata;
    job->resize = options->resize_outputs != 0;
    job->result.struct_size = sizeof job->result;
    job->result.token = options->token;
    job->result.submitted_ns = trtxpy_now_ns();
    return job;
}

void trtxpy_job_unreference(trtxpy_job *job) {
    if (atomic_fetch_sub(&job->references, 1) != 1) return;
    pthread_cond_destroy(&job->changed);
    pthread_mutex_destroy(&job->mutex);
    free(job->message);
    free(job);
}

void trtxpy_job_end(trtxpy_job *job, trtxpy_status status) {
    job->status = status;
    if (status != TRTXPY_OK && !job->message) job->message = strdup(trtxpy_last_error());
    trtxpy_completer_post(job);
}

/* Bound and counted: on its way, one or the other. Nothing fails from here on but by its completion. */
static void start(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    if (!job->device) job->entry = trtxpy_entry_find(graph, (const trtxpy_tensor_object *const *)job->tensors, NULL);
    if (!job->entry || !job->entry->py) { /* Python is needed: not in the caller's thread */
        if (job->entry) trtxpy_entry_release(graph, job->entry);
        job->entry = NULL;
        trtxpy_status status = trtxpy_worker_post(job);
        if (status != TRTXPY_OK) trtxpy_job_end(job, status);
        return;
    }
    trtxpy_status status = trtxpy_job_fit_outputs(job);
    if (status != TRTXPY_OK) {
        trtxpy_job_end(job, status);
        return;
    }
    if (job->grouped && trtxpy_group_entry(job->tensors[0]->group) != job->entry) job->grouped = false;
    bool ready = true;
    pthread_mutex_lock(&graph->mutex);
    if (job->grouped) trtxpy_group_slot(job->tensors[0]->group, &job->lane, &job->slot);
    else ready = !graph->first && trtxpy_job_take_slot(job);
    if (ready) {
        job->phase = TRTXPY_LAUNCHED;
    } else {
        job->phase = TRTXPY_QUEUED;
        trtxpy_graph_enqueue(graph, job);
    }
    pthread_mutex_unlock(&graph->mutex);
    if (!ready) {
        trtxpy_completer_look();
        return;
    }
    status = trtxpy_job_launch(job, trtxpy_completer_hub());
    if (status != TRTXPY_OK) trtxpy_job_end(job, status);
}

trtxpy_status trtxpy_submit_job(trtxpy_graph_object *graph, const trtxpy_binding *inputs, size_t input_count,
                                const trtxpy_binding *outputs, size_t output_count, const trtxpy_submit_options *options,
                                trtxpy_job **made) {
    trtxpy_status status = trtxpy_requests_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_job *job = new_job(options);
    if (!job) {
        trtxpy_requests_leave();
        return TRTXPY_OUT_OF_MEMORY;
    }
    status = trtxpy_job_bind(job, graph, inputs, input_count, outputs, output_count);
    if (status == TRTXPY_OK && options->queue) {
        job->queue = trtxpy_handle_acquire(options->queue, TRTXPY_KIND_QUEUE, "options.queue");
        status = job->queue ? trtxpy_queue_reserve(job->queue) : TRTXPY_INVALID_HANDLE;
        if (status != TRTXPY_OK) {
            if (job->queue) trtxpy_handle_release(trtxpy_queue_head(job->queue));
            trtxpy_job_unbind(job);
        }
    }
    if (status != TRTXPY_OK) {
        trtxpy_job_unreference(job);
        trtxpy_job_unreference(job);
        trtxpy_requests_leave();
        return status;
    }
    trtxpy_handle_keep(&graph->head); /* until it is complete */
    atomic_fetch_add_explicit(&graph->counts.submitted, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&graph->counts.in_flight, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&graph->context->requests, 1, memory_order_relaxed);
    *made = job;
    start(job);
    trtxpy_begin(); /* what went wrong since comes with the completion */
    return TRTXPY_OK;
}

trtxpy_status trtxpy_submit(trtxpy_graph handle, const trtxpy_binding *inputs, size_t input_count,
                            const trtxpy_binding *outputs, size_t output_count, const trtxpy_submit_options *given,
                            trtxpy_request *request) {
    if (request) *request = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    status = trtxpy_read_struct(&options, sizeof options, TRTXPY_SIZE_1_0(trtxpy_submit_options), given, "trtxpy_submit_options");
    if (status != TRTXPY_OK) return status;
    if (options.reserved) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "trtxpy_submit_options.reserved is %u; expected 0", options.reserved);
    if (options.callback && options.queue)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "trtxpy_submit_options has a callback and a queue; a completion goes to one of them");
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    /* The handle comes first: what was launched cannot be taken back. */
    trtxpy_job *job;
    uintptr_t made = 0;
    status = trtxpy_submit_job(graph, inputs, input_count, outputs, output_count, &options, &job);
    if (status == TRTXPY_OK) {
        if (request && (made = trtxpy_handle_make(TRTXPY_KIND_REQUEST, &job->head))) *request = (trtxpy_request)made;
        if (!made) trtxpy_job_unreference(job);
        if (request && !made) trtxpy_begin(); /* it goes on, and cannot be waited for: *request is NULL */
    }
    trtxpy_handle_release(&graph->head);
    return status;
}

bool trtxpy_job_cancel(trtxpy_job *job) {
    pthread_mutex_lock(&job->mutex);
    bool done = job->settled;
    trtxpy_graph_object *graph = job->graph;
    if (!done) { /* the completer takes this lock before it settles how the job ends, and lets go of the graph after it */
        atomic_store(&job->cancelled, true);
        trtxpy_handle_keep(&graph->head);
    }
    pthread_mutex_unlock(&job->mutex);
    if (done) return false;
    pthread_mutex_lock(&graph->mutex);
    bool queued = job->phase == TRTXPY_QUEUED;
    if (queued) {
        trtxpy_graph_dequeue(graph, job);
        job->phase = TRTXPY_LAUNCHED;
    }
    pthread_cond_broadcast(&graph->slot_came); /* a worker may wait for one */
    pthread_mutex_unlock(&graph->mutex);
    if (queued) trtxpy_completer_post(job);
    trtxpy_handle_release(&graph->head);
    return true;
}

trtxpy_status trtxpy_job_wait(trtxpy_job *job, uint64_t timeout_ns, trtxpy_status *outcome) {
    void *unlocked = timeout_ns ? trtxpy_host_unlock() : NULL;
    uint64_t now = trtxpy_now_ns(), until = timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
    struct timespec at = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
    pthread_mutex_lock(&job->mutex);
    int expired = 0;
    while (!job->done && timeout_ns && !expired) {
        if (until == UINT64_MAX) pthread_cond_wait(&job->changed, &job->mutex);
        else expired = pthread_cond_timedwait(&job->changed, &job->mutex, &at) != 0;
    }
    bool done = job->done;
    pthread_mutex_unlock(&job->mutex);
    trtxpy_host_relock(unlocked);
    if (!done)
        return timeout_ns ? trtxpy_fail(TRTXPY_TIMEOUT, "no result within %llu ns; the request goes on", (unsigned long long)timeout_ns)
                          : trtxpy_fail(TRTXPY_NOT_READY, "the request is still in flight");
    *outcome = job->status;
    if (job->status != TRTXPY_OK) trtxpy_fail_text(job->status, job->message);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_request_cancel(trtxpy_request handle) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_job *job = trtxpy_handle_acquire(handle, TRTXPY_KIND_REQUEST, "request");
    if (!job) return TRTXPY_INVALID_HANDLE;
    if (!trtxpy_job_cancel(job)) status = trtxpy_fail(TRTXPY_NOT_FOUND, "the request is complete already");
    trtxpy_handle_release(&job->head);
    return status;
}

trtxpy_status trtxpy_request_wait(trtxpy_request handle, uint64_t timeout_ns, trtxpy_status *outcome) {
    trtxpy_status status = trtxpy_enter();
    if (status == TRTXPY_OK && timeout_ns) status = trtxpy_refuse_in_callback("trtxpy_request_wait");
    if (status != TRTXPY_OK) return status;
    if (!outcome) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "outcome is NULL; expected where to write the request's status");
    trtxpy_job *job = trtxpy_handle_acquire(handle, TRTXPY_KIND_REQUEST, "request");
    if (!job) return TRTXPY_INVALID_HANDLE;
    status = trtxpy_job_wait(job, timeout_ns, outcome);
    trtxpy_handle_release(&job->head);
    return status;
}

trtxpy_status trtxpy_request_destroy(trtxpy_request handle) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_job *job = trtxpy_handle_retire(handle, TRTXPY_KIND_REQUEST, "request", &status);
    if (job) trtxpy_job_unreference(job);
    return status;
}
