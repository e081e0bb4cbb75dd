/* Programs (the nodes of a graph), captures that write them, graphs and executables. Host threads.
 *
 * A program only grows while it is captured; afterwards graph, executables and replays in flight share it, each with a
 * reference, and the last one to go frees it and releases its kernels, outside all locks.
 *
 * A capture is one sequence over one or more streams. What comes before what is kept as a clock for each stream: how many
 * operations of every other stream it is ordered after. At the end the origin must have seen all of them.
 */
#include "mock_internal.h"

mock_program *mock_program_create(void) {
    mock_program *program = calloc(1, sizeof *program);
    if (program)
        program->references = 1;
    return program;
}

CUresult mock_program_add(mock_program *program, const mock_work *node) {
    if (program->count == program->room) {
        size_t room = program->room ? program->room * 2 : 8;
        mock_work *nodes = realloc(program->nodes, room * sizeof *nodes);
        if (!nodes)
            return CUDA_ERROR_OUT_OF_MEMORY;
        program->nodes = nodes;
        program->room = room;
    }
    program->nodes[program->count++] = *node;
    program->timed = program->timed || node->launch.duration_ns > 0;
    program->writes = program->writes || node->launch.region;
    return CUDA_SUCCESS;
}

void mock_program_release(mock_program *program, mock_trash *trash) {
    if (program && --program->references == 0) {
        program->next = trash->programs;
        trash->programs = program;
    }
}

void mock_program_free(mock_program *program) {
    for (size_t i = 0; i < program->count; i++) {
        if (program->nodes[i].kind == WORK_KERNEL)
            mock_launch_drop(&program->nodes[i].launch);
    }
    free(program->nodes);
    free(program);
}

/* ---- captures ---- */

CUresult mock_capture_invalidate(mock_capture *capture, CUresult code) {
    capture->invalidated = true;
    return code;
}

mock_capture *mock_capture_find(trtx_mock *mock, uint64_t id) {
    for (mock_capture *capture = mock->captures; capture; capture = capture->next)
        if (capture->id == id)
            return capture;
    return NULL;
}

static bool join(mock_capture *capture, mock_queue *queue) {
    if (capture->streams == MOCK_CAPTURE_STREAMS)
        return false;
    queue->capture = capture;
    queue->capture_index = capture->streams;
    capture->members[capture->streams++] = queue;
    atomic_store(&queue->slot->state, 1);
    return true;
}

CUresult mock_capture_node(mock_queue *queue, const mock_work *node) {
    mock_capture *capture = queue->capture;
    if (capture->invalidated)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    CUresult code = mock_program_add(capture->program, node);
    if (code)
        return mock_capture_invalidate(capture, code);
    capture->clocks[queue->capture_index][queue->capture_index]++;
    return CUDA_SUCCESS;
}

void mock_capture_record(mock_queue *queue, mock_event *event) {
    mock_capture *capture = queue->capture;
    mock_queue_release(event->queue);
    event->queue = NULL;
    event->capture_id = capture->id;
    memcpy(event->clock, capture->clocks[queue->capture_index], sizeof event->clock);
    atomic_store(&event->slot->state, MOCK_EVENT_CAPTURED);
}

CUresult mock_capture_wait(mock_queue *queue, mock_event *event) {
    mock_capture *capture = mock_capture_find(queue->device->mock, event->capture_id);
    if (!capture) /* that capture has ended: its event means nothing to a stream that runs */
        return queue->capture ? mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
                              : CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    if (queue->capture && queue->capture != capture) {
        mock_capture_invalidate(capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
        return mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    }
    if (capture->invalidated)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (!queue->capture && !join(capture, queue))
        return mock_capture_invalidate(capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    uint32_t *clock = capture->clocks[queue->capture_index];
    for (unsigned i = 0; i < MOCK_CAPTURE_STREAMS; i++)
        if (event->clock[i] > clock[i])
            clock[i] = event->clock[i];
    return CUDA_SUCCESS;
}

static _Thread_local int thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

CUresult mock_cuThreadExchangeStreamCaptureMode(int *mode) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuThreadExchangeStreamCaptureMode, 0);
    if (code)
        return code;
    if (!mode || *mode < CU_STREAM_CAPTURE_MODE_GLOBAL || *mode > CU_STREAM_CAPTURE_MODE_RELAXED)
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "mode is %d", mode ? *mode : -1);
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}

CUresult mock_capture_guard(trtx_mock *mock) {
    if (atomic_load_explicit(&mock->capturing, memory_order_acquire) == 0 || thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_SUCCESS;
    bool forbidden = false;
    mock_lock(mock);
    for (mock_capture *capture = mock->captures; capture; capture = capture->next) {
        bool own = pthread_equal(capture->thread, pthread_self()) && capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
        if (own || (capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL)) {
            mock_capture_invalidate(capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            forbidden = true;
        }
    }
    mock_unlock(mock);
    return forbidden ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult mock_capture_implicit(mock_device *device) {
    CUresult code = CUDA_SUCCESS;
    for (mock_queue *queue = device->queues; queue; queue = queue->next)
        if (queue->blocking && queue->capture)
            code = mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    return code;
}

/* Take the capture off its streams and free it; the program stays with the caller. */
static mock_program *end_capture(trtx_mock *mock, mock_capture *capture) {
    mock_program *program = capture->program;
    for (unsigned i = 0; i < capture->streams; i++) {
        if (capture->members[i]) {
            capture->members[i]->capture = NULL;
            atomic_store(&capture->members[i]->slot->state, 0);
        }
    }
    mock_capture **link = &mock->captures;
    while (*link != capture)
        link = &(*link)->next;
    *link = capture->next;
    atomic_fetch_sub(&mock->capturing, 1);
    free(capture);
    return program;
}

void mock_capture_abandon(mock_queue *queue, mock_trash *trash) {
    mock_capture *capture = queue->capture;
    if (!capture)
        return;
    if (capture->origin == queue) {
        mock_program_release(end_capture(queue->device->mock, capture), trash);
    } else {
        capture->members[queue->capture_index] = NULL;
        queue->capture = NULL;
        mock_capture_invalidate(capture, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    }
}

static CUresult begin(mock_scope *scope, mock_queue *queue, int mode) {
    trtx_mock *mock = scope->mock;
    if (queue->null_stream)
        return mock_fail(scope, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the NULL stream cannot be captured");
    if (queue->capture)
        return mock_fail(scope, CUDA_ERROR_ILLEGAL_STATE, "the stream is being captured already");
    mock_capture *capture = calloc(1, sizeof *capture);
    mock_program *program = mock_program_create();
    if (!capture || !program) {
        free(capture);
        free(program);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    capture->id = ++mock->next_capture;
    capture->mode = mode;
    capture->thread = pthread_self();
    capture->origin = queue;
    capture->program = program;
    join(capture, queue);
    capture->next = mock->captures;
    mock->captures = capture;
    atomic_fetch_add(&mock->capturing, 1);
    return CUDA_SUCCESS;
}

CUresult mock_cuStreamBeginCapture(CUstream stream, int mode) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuStreamBeginCapture, ENTER_SAFE);
    if (code)
        return code;
    if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED)
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "mode is %d", mode);
    mock_lock(scope.mock);
    mock_queue *queue = mock_own_stream_of(&scope, stream, &code);
    if (queue)
        code = begin(&scope, queue, mode);
    mock_unlock(scope.mock);
    return code;
}

static bool all_joined(const mock_capture *capture) {
    for (unsigned i = 1; i < capture->streams; i++)
        if (capture->clocks[0][i] < capture->clocks[i][i])
            return false;
    return true;
}

static CUresult finish(mock_scope *scope, mock_queue *queue, CUgraph *graph, mock_trash *trash) {
    mock_capture *capture = queue->capture;
    if (!capture)
        return mock_fail(scope, CUDA_ERROR_ILLEGAL_STATE, "the stream is not being captured");
    if (capture->origin != queue)
        return mock_fail(scope, mock_capture_invalidate(capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED),
                         "the capture began on another stream");
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return mock_fail(scope, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "the capture began in another thread");
    CUresult code = capture->invalidated ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                    : all_joined(capture) ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    mock_program *program = end_capture(scope->mock, capture);
    mock_graph *made = code ? NULL : calloc(1, sizeof *made);
    if (made && (made->slot = mock_slot_take(scope->mock, KIND_GRAPH, made))) {
        made->device = scope->device;
        made->program = program;
        mock_copy_site(made->site);
        scope->mock->graphs++;
        *graph = (CUgraph)mock_handle(made->slot);
        return CUDA_SUCCESS;
    }
    free(made);
    mock_program_release(program, trash);
    return code ? mock_fail(scope, code, "the capture failed before it was ended") : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult mock_cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    mock_scope scope;
    mock_trash trash = {0};
    CUresult code = mock_enter(&scope, CALL_cuStreamEndCapture, ENTER_SAFE);
    if (code)
        return code;
    if (!graph)
        return CUDA_ERROR_INVALID_VALUE;
    *graph = NULL;
    mock_lock(scope.mock);
    mock_queue *queue = mock_own_stream_of(&scope, stream, &code);
    if (queue)
        code = finish(&scope, queue, graph, &trash);
    mock_unlock(scope.mock);
    mock_trash_empty(scope.mock, &trash);
    return code;
}

CUresult mock_cuStreamIsCapturing(CUstream stream, int *status) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuStreamIsCapturing, ENTER_SAFE);
    if (code)
        return code;
    if (!status)
        return CUDA_ERROR_INVALID_VALUE;
    mock_lock(scope.mock);
    mock_queue *queue = mock_stream_of(&scope, stream, &code);
    if (queue && queue->null_stream && (code = mock_capture_implicit(queue->device)))
        queue = NULL;
    if (queue)
        *status = !queue->capture ? CU_STREAM_CAPTURE_STATUS_NONE
                  : queue->capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    mock_unlock(scope.mock);
    return code;
}

/* ---- graphs ---- */

static mock_graph *graph_of(const mock_scope *scope, CUgraph graph, CUresult *code) {
    mock_slot *slot = mock_slot_find(graph, KIND_GRAPH);
    if (slot && atomic_load(&slot->mock) == scope->mock)
        return atomic_load(&slot->object);
    *code = mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "graph %p does not exist or was destroyed", (void *)graph);
    return NULL;
}

static mock_exec *exec_of(const mock_scope *scope, CUgraphExec exec, CUresult *code) {
    mock_slot *slot = mock_slot_find(exec, KIND_EXEC);
    if (slot && atomic_load(&slot->mock) == scope->mock)
        return atomic_load(&slot->object);
    *code = mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "executable graph %p does not exist or was destroyed", (void *)exec);
    return NULL;
}

void mock_graph_drop(trtx_mock *mock, mock_graph *graph, mock_trash *trash) {
    mock_slot_close(graph->slot);
    mock_slot_recycle(mock, graph->slot);
    mock_program_release(graph->program, trash);
    mock->graphs--;
    free(graph);
}

void mock_exec_drop(trtx_mock *mock, mock_exec *exec, mock_trash *trash) {
    mock_slot_close(exec->slot);
    mock_slot_recycle(mock, exec->slot);
    mock_program_release(exec->program, trash); /* a replay in flight has its own reference */
    mock_queue_release(exec->queue);
    mock->execs--;
    free(exec);
}

CUresult mock_cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *count) {
    mock_scope scope;
    CUresult code = mock_enter_with(&scope, CALL_cuGraphGetNodes, graph, KIND_GRAPH, ENTER_INITIALIZED);
    if (code)
        return scope.mock ? code : CUDA_ERROR_INVALID_HANDLE;
    if (!count)
        return CUDA_ERROR_INVALID_VALUE;
    mock_lock(scope.mock);
    mock_graph *found = graph_of(&scope, graph, &code);
    if (found) {
        size_t room = nodes ? *count : 0, held = found->program->count;
        for (size_t i = 0; i < room; i++) /* values to compare, not to use: the table has no functions for nodes */
            nodes[i] = i < held ? (CUgraphNode)(uintptr_t)(0x5E0000000000000u + (uintptr_t)found->slot->index * 4096 + i) : NULL;
        *count = nodes && room < held ? room : held;
    }
    mock_unlock(scope.mock);
    return code;
}

CUresult mock_cuGraphInstantiate(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuGraphInstantiate, ENTER_SAFE);
    if (code)
        return code;
    if (!exec || (flags & ~0xBull))
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "no place for the result, or unknown flags %#llx", flags);
    mock_exec *made = calloc(1, sizeof *made);
    if (!made)
        return CUDA_ERROR_OUT_OF_MEMORY;
    mock_copy_site(made->site);
    mock_lock(scope.mock);
    mock_graph *found = graph_of(&scope, graph, &code);
    if (found && !(made->slot = mock_slot_take(scope.mock, KIND_EXEC, made)))
        code = CUDA_ERROR_OUT_OF_MEMORY;
    if (made->slot) {
        made->device = found->device;
        made->program = found->program;
        made->program->references++;
        scope.mock->execs++;
        *exec = (CUgraphExec)mock_handle(made->slot);
        made = NULL;
    }
    mock_unlock(scope.mock);
    free(made);
    return code;
}

static CUresult launch(mock_scope *scope, mock_exec *exec, mock_queue *queue, mock_trash *trash) {
    if (exec->device != queue->device)
        return mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "executable graph and stream belong to different devices");
    if (queue->capture)
        return mock_fail(scope, mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
                         "the mock captures no graph launches");
    CUresult code = queue->null_stream ? mock_capture_implicit(queue->device) : CUDA_SUCCESS;
    if (!code)
        code = mock_queue_order_null(queue, trash);
    if (!code) /* one executable runs once at a time */
        code = mock_queue_after(queue, exec->queue, exec->sequence, trash);
    if (code)
        return code;
    trtx_mock *mock = scope->mock;
    mock_work work = {.kind = WORK_GRAPH, .call = scope->call, .program = exec->program};
    bool here = mock->options.instant && !exec->program->timed && mock_queue_idle(queue) && !mock_faults_planned(mock->faults);
    exec->program->references++;
    if (!here && (code = mock_queue_push(queue, &work, trash)))
        return code;
    if (exec->queue != queue) {
        mock_queue_release(exec->queue);
        mock_queue_reference(queue);
        exec->queue = queue;
    }
    exec->sequence = queue->enqueued + here;
    if (exec->program->writes)
        mock_program_use(exec->program, queue, exec->sequence);
    if (here)
        mock_queue_run_here(queue, &work, trash);
    return CUDA_SUCCESS;
}

CUresult mock_cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    mock_scope scope;
    mock_trash trash = {0};
    CUresult code = mock_enter(&scope, CALL_cuGraphLaunch, ENTER_SAFE);
    if (code)
        return code;
    mock_lock(scope.mock);
    mock_exec *found = exec_of(&scope, exec, &code);
    mock_queue *queue = found ? mock_own_stream_of(&scope, stream, &code) : NULL;
    if (queue)
        code = launch(&scope, found, queue, &trash);
    mock_unlock(scope.mock);
    mock_trash_empty(scope.mock, &trash);
    return code;
}

CUresult mock_cuGraphExecDestroy(CUgraphExec exec) {
    mock_scope scope;
    mock_trash trash = {0};
    CUresult code = mock_enter_with(&scope, CALL_cuGraphExecDestroy, exec, KIND_EXEC, ENTER_INITIALIZED);
    if (code)
        return scope.mock ? code : CUDA_ERROR_INVALID_HANDLE;
    mock_lock(scope.mock);
    mock_exec *found = exec_of(&scope, exec, &code);
    if (found) {
        code = atomic_load(&found->device->fault); /* a faulted context is cleaned up, but still what is returned */
        mock_exec_drop(scope.mock, found, &trash);
    }
    mock_unlock(scope.mock);
    mock_trash_empty(scope.mock, &trash);
    return code;
}

CUresult mock_cuGraphDestroy(CUgraph graph) {
    mock_scope scope;
    mock_trash trash = {0};
    CUresult code = mock_enter_with(&scope, CALL_cuGraphDestroy, graph, KIND_GRAPH, ENTER_INITIALIZED);
    if (code)
        return scope.mock ? code : CUDA_ERROR_INVALID_HANDLE;
    mock_lock(scope.mock);
    mock_graph *found = graph_of(&scope, graph, &code);
    if (found) {
        code = atomic_load(&found->device->fault); /* a faulted context is cleaned up, but still what is returned */
        mock_graph_drop(scope.mock, found, &trash);
    }
    mock_unlock(scope.mock);
    mock_trash_empty(scope.mock, &trash);
    return code;
}
