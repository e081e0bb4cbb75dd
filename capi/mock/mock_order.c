/* The calls for streams and events. Host threads.
 *
 * cuStreamQuery and cuEventQuery take no lock while nothing is wrong: they compare two counters in the handle's slot, which
 * the stream's thread advances after the work they stand for. Everything else holds the instance's lock.
 */
#include "mock_internal.h"

mock_queue *mock_stream_of(const mock_scope *scope, CUstream stream, CUresult *code) {
    if ((uintptr_t)stream <= 1) { /* NULL, CU_STREAM_LEGACY */
        mock_device *device = scope->device;
        if (!device->null_stream && atomic_load(&device->retained) == 0)
            *code = mock_fail(scope, CUDA_ERROR_INVALID_CONTEXT, "the primary context was released");
        else if (!device->null_stream)
            *code = mock_queue_create(device, true, true, &device->null_stream);
        return device->null_stream;
    }
    mock_slot *slot = mock_slot_find(stream, KIND_STREAM);
    if (slot && atomic_load_explicit(&slot->mock, memory_order_relaxed) == scope->mock)
        return atomic_load_explicit(&slot->object, memory_order_relaxed);
    *code = mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "stream %p does not exist or was destroyed", (void *)stream);
    return NULL;
}

mock_queue *mock_own_stream_of(const mock_scope *scope, CUstream stream, CUresult *code) {
    mock_queue *queue = mock_stream_of(scope, stream, code);
    if (!queue || queue->device == scope->device)
        return queue;
    *code = mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "the stream belongs to device %d, but device %d is current",
                      queue->device->ordinal, scope->device->ordinal);
    return NULL;
}

mock_event *mock_event_of(const mock_scope *scope, CUevent event, CUresult *code) {
    mock_slot *slot = mock_slot_find(event, KIND_EVENT);
    if (slot && atomic_load_explicit(&slot->mock, memory_order_relaxed) == scope->mock)
        return atomic_load_explicit(&slot->object, memory_order_relaxed);
    *code = mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "event %p does not exist or was destroyed", (void *)event);
    return NULL;
}

/* The stream is waited for or asked: not while it captures, nor (NULL) while a blocking stream does. */
static CUresult refuse_capture(const mock_scope *scope, mock_queue *queue) {
    if (queue->null_stream) {
        CUresult code = mock_capture_implicit(queue->device);
        return code ? mock_fail(scope, code, "the NULL stream would wait for a stream that is being captured") : code;
    }
    if (!queue->capture)
        return CUDA_SUCCESS;
    return mock_fail(scope, mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
                     "the stream is being captured; the capture is invalid now");
}

/* ---- streams ---- */

CUresult mock_cuStreamCreate(CUstream *stream, unsigned flags) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuStreamCreate, ENTER_SAFE);
    if (code)
        return code;
    if (!stream || flags > 1)
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "flags is %u, and must be 0 or 1 (non-blocking)", flags);
    mock_queue *queue = NULL;
    mock_lock(scope.mock);
    mock_queues_reap(scope.device, false);
    code = mock_queue_create(scope.device, flags == 0, false, &queue);
    if (queue) {
        scope.mock->streams++;
        *stream = (CUstream)mock_handle(queue->slot);
    }
    mock_unlock(scope.mock);
    return code;
}

CUresult mock_cuStreamDestroy(CUstream stream) {
    mock_scope scope;
    mock_trash trash = {0};
    CUresult code = mock_enter(&scope, CALL_cuStreamDestroy, ENTER_SAFE | ENTER_CLEANUP);
    if (code)
        return code;
    if ((uintptr_t)stream <= 1)
        return mock_fail(&scope, CUDA_ERROR_INVALID_HANDLE, "the NULL stream cannot be destroyed");
    mock_lock(scope.mock);
    mock_queue *queue = mock_stream_of(&scope, stream, &code);
    if (queue) {
        mock_capture_abandon(queue, &trash);
        mock_queue_close(queue);
        scope.mock->streams--;
        mock_queues_reap(queue->device, false);
    }
    mock_unlock(scope.mock);
    mock_trash_empty(scope.mock, &trash);
    return scope.sticky ? scope.sticky : code;
}

/* Under the lock, which is given up meanwhile. */
static CUresult await_stream(const mock_scope *scope, mock_queue *queue) {
    uint64_t sequence = queue->enqueued;
    mock_queue_reference(queue);
    mock_queue_wait(queue, sequence);
    mock_observe(queue->slot, sequence);
    CUresult code = mock_failure_of_stream(scope, queue, true);
    mock_queue_release(queue);
    return code;
}

CUresult mock_cuStreamSynchronize(CUstream stream) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuStreamSynchronize, ENTER_UNSAFE);
    if (code)
        return code;
    mock_lock(scope.mock);
    mock_queue *queue = mock_stream_of(&scope, stream, &code);
    if (queue && !(code = refuse_capture(&scope, queue)))
        code = await_stream(&scope, queue);
    mock_unlock(scope.mock);
    CUresult fault = mock_healthy(&scope);
    return fault ? fault : code;
}

static bool slot_reached(const mock_slot *slot) {
    uint64_t latest = atomic_load_explicit(&slot->latest, memory_order_acquire);
    return atomic_load_explicit(&slot->done, memory_order_acquire) >= latest;
}

CUresult mock_cuStreamQuery(CUstream stream) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuStreamQuery, ENTER_UNSAFE);
    if (code)
        return code;
    mock_slot *slot = mock_slot_find(stream, KIND_STREAM);
    bool reached;
    if (slot && atomic_load(&slot->mock) == scope.mock && atomic_load(&slot->state) == 0) {
        uint64_t latest = atomic_load_explicit(&slot->latest, memory_order_acquire);
        reached = atomic_load_explicit(&slot->done, memory_order_acquire) >= latest;
        if (mock_slot_find(stream, KIND_STREAM) == slot && (!reached || atomic_load(&scope.mock->failures) == 0)) {
            if (reached)
                mock_observe(slot, latest);
            return reached ? mock_healthy(&scope) : CUDA_ERROR_NOT_READY;
        }
    }
    mock_lock(scope.mock);
    mock_queue *queue = mock_stream_of(&scope, stream, &code);
    if (queue && !(code = refuse_capture(&scope, queue))) {
        if (queue->completed < queue->enqueued) {
            code = CUDA_ERROR_NOT_READY;
        } else {
            mock_observe(queue->slot, queue->enqueued);
            code = mock_failure_of_stream(&scope, queue, false);
        }
    }
    mock_unlock(scope.mock);
    CUresult fault = code == CUDA_ERROR_NOT_READY ? CUDA_SUCCESS : mock_healthy(&scope);
    return fault ? fault : code;
}

CUresult mock_cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    mock_scope scope;
    mock_trash trash = {0};
    CUresult code = mock_enter(&scope, CALL_cuStreamWaitEvent, ENTER_SAFE);
    if (code)
        return code;
    if (flags > 1)
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "flags is %u, and must be 0", flags);
    mock_lock(scope.mock);
    mock_queue *queue = mock_own_stream_of(&scope, stream, &code);
    mock_event *found = queue ? mock_event_of(&scope, event, &code) : NULL;
    int state = found ? atomic_load(&found->slot->state) : MOCK_EVENT_NEW;
    if (queue && queue->null_stream && (code = mock_capture_implicit(queue->device)))
        state = MOCK_EVENT_NEW;
    if (state == MOCK_EVENT_CAPTURED) {
        code = mock_capture_wait(queue, found);
        if (code)
            mock_fail(&scope, code, "the event belongs to another capture, or to one that is invalid or over");
    } else if (state == MOCK_EVENT_RECORDED && queue->capture) {
        code = mock_fail(&scope, mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION),
                         "the event was recorded outside the capture");
    } else if (state == MOCK_EVENT_RECORDED) { /* CUDA: waiting for an event that was never recorded is no wait */
        code = mock_queue_order_null(queue, &trash);
        if (!code)
            code = mock_queue_after(queue, found->queue, found->sequence, &trash);
        mock_past_merge(&queue->past, &found->past);
    }
    mock_unlock(scope.mock);
    mock_trash_empty(scope.mock, &trash);
    return code;
}

/* ---- events ---- */

CUresult mock_cuEventCreate(CUevent *event, unsigned flags) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuEventCreate, ENTER_SAFE);
    if (code)
        return code;
    if (!event || (flags & ~7u))
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "no place for the result, or unknown flags %#x", flags);
    mock_event *made = calloc(1, sizeof *made);
    if (!made)
        return CUDA_ERROR_OUT_OF_MEMORY;
    made->device = scope.device;
    made->timing = !(flags & CU_EVENT_DISABLE_TIMING);
    mock_copy_site(made->site);
    mock_lock(scope.mock);
    made->slot = mock_slot_take(scope.mock, KIND_EVENT, made);
    if (made->slot) {
        scope.mock->events++;
        *event = (CUevent)mock_handle(made->slot);
    } else {
        free(made);
        code = CUDA_ERROR_OUT_OF_MEMORY;
    }
    mock_unlock(scope.mock);
    return code;
}

void mock_event_drop(trtx_mock *mock, mock_event *event) {
    mock_slot_close(event->slot);
    mock_slot_recycle(mock, event->slot);
    mock_queue_release(event->queue);
    mock->events--;
    free(event);
}

CUresult mock_cuEventDestroy(CUevent event) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuEventDestroy, ENTER_SAFE | ENTER_CLEANUP);
    if (code)
        return code;
    mock_lock(scope.mock);
    mock_event *found = mock_event_of(&scope, event, &code);
    if (found)
        mock_event_drop(scope.mock, found);
    mock_unlock(scope.mock);
    return scope.sticky ? scope.sticky : code;
}

static CUresult record(mock_scope *scope, mock_event *event, mock_queue *queue, uint64_t now_ns, mock_trash *trash) {
    if (event->device != queue->device)
        return mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "event and stream belong to different devices");
    if (queue->capture) {
        if (queue->capture->invalidated)
            return mock_fail(scope, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture is invalid");
        mock_capture_record(queue, event); /* orders other streams behind this one; as with CUDA no node, never reached */
        return CUDA_SUCCESS;
    }
    CUresult code = queue->null_stream ? mock_capture_implicit(queue->device) : CUDA_SUCCESS;
    if (!code)
        code = mock_queue_order_null(queue, trash);
    mock_slot *slot = event->slot;
    uint64_t number = atomic_load_explicit(&slot->latest, memory_order_relaxed) + 1;
    mock_work work = {.kind = WORK_EVENT, .call = scope->call, .event = slot, .number = number};
    bool idle = !code && mock_queue_idle(queue);
    if (!code && !idle)
        code = mock_queue_push(queue, &work, trash);
    if (code)
        return code;
    atomic_store_explicit(&slot->latest, number, memory_order_release);
    if (idle) { /* everything before it is done: no need to wake the stream's thread for it */
        mock_queue_pass(queue);
        mock_event_reach(queue, slot, number, now_ns ? now_ns : mock_now_ns(scope->mock));
    }
    atomic_store_explicit(&slot->position, queue->enqueued, memory_order_relaxed);
    atomic_store_explicit(&slot->place, queue->slot, memory_order_release);
    atomic_store_explicit(&slot->state, MOCK_EVENT_RECORDED, memory_order_release);
    if (event->queue != queue) {
        mock_queue_release(event->queue);
        mock_queue_reference(queue);
        event->queue = queue;
    }
    event->sequence = queue->enqueued;
    event->past.count = 0;
    mock_past_merge(&event->past, &queue->past);
    return CUDA_SUCCESS;
}

CUresult mock_cuEventRecord(CUevent event, CUstream stream) {
    mock_scope scope;
    mock_trash trash = {0};
    CUresult code = mock_enter(&scope, CALL_cuEventRecord, ENTER_SAFE);
    if (code)
        return code;
    uint64_t now_ns = scope.mock->clock.now ? mock_now_ns(scope.mock) : 0; /* such a clock is not read under the lock */
    mock_lock(scope.mock);
    mock_event *found = mock_event_of(&scope, event, &code);
    mock_queue *queue = found ? mock_own_stream_of(&scope, stream, &code) : NULL;
    if (queue)
        code = record(&scope, found, queue, now_ns, &trash);
    mock_unlock(scope.mock);
    mock_trash_empty(scope.mock, &trash);
    return code;
}

/* Under the lock: what a question to a captured event gets, which also ends that capture. */
static CUresult refuse_captured(const mock_scope *scope, const mock_event *event) {
    if (atomic_load(&event->slot->state) != MOCK_EVENT_CAPTURED)
        return CUDA_SUCCESS;
    mock_capture *capture = mock_capture_find(scope->mock, event->capture_id);
    if (capture)
        mock_capture_invalidate(capture, CUDA_ERROR_CAPTURED_EVENT);
    return mock_fail(scope, CUDA_ERROR_CAPTURED_EVENT, "the event was last recorded in a capture");
}

/* The recording is reached, and the application is told so: what it knows now, and what kernels before it failed with. */
static CUresult tell_reached(const mock_scope *scope, const mock_event *event) {
    if (!event->queue)
        return CUDA_SUCCESS;
    mock_observe(event->queue->slot, event->sequence);
    return mock_failure_of_event(scope, event);
}

CUresult mock_cuEventQuery(CUevent event) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuEventQuery, ENTER_UNSAFE);
    if (code)
        return code;
    mock_slot *slot = mock_slot_find(event, KIND_EVENT);
    if (slot && atomic_load_explicit(&slot->mock, memory_order_relaxed) == scope.mock) {
        int state = atomic_load_explicit(&slot->state, memory_order_acquire);
        mock_slot *place = atomic_load_explicit(&slot->place, memory_order_acquire);
        uint64_t position = atomic_load_explicit(&slot->position, memory_order_relaxed);
        bool reached = state == MOCK_EVENT_NEW || slot_reached(slot);
        if (state != MOCK_EVENT_CAPTURED && mock_slot_find(event, KIND_EVENT) == slot) {
            if (!reached)
                return CUDA_ERROR_NOT_READY;
            if (atomic_load_explicit(&scope.mock->failures, memory_order_relaxed) == 0) {
                if (state != MOCK_EVENT_NEW && place)
                    mock_observe(place, position);
                return mock_healthy(&scope);
            }
        }
    }
    mock_lock(scope.mock);
    mock_event *found = mock_event_of(&scope, event, &code);
    if (found && !(code = refuse_captured(&scope, found)))
        code = slot_reached(found->slot) ? tell_reached(&scope, found) : CUDA_ERROR_NOT_READY;
    mock_unlock(scope.mock);
    CUresult fault = code == CUDA_ERROR_NOT_READY ? CUDA_SUCCESS : mock_healthy(&scope);
    return fault ? fault : code;
}

CUresult mock_cuEventSynchronize(CUevent event) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuEventSynchronize, ENTER_UNSAFE);
    if (code)
        return code;
    mock_lock(scope.mock);
    mock_event *found = mock_event_of(&scope, event, &code);
    if (found && !(code = refuse_captured(&scope, found)) && found->queue) {
        mock_event recording = *found; /* that of now: the event may be recorded again, or destroyed, while this waits */
        mock_queue_reference(recording.queue);
        mock_queue_wait(recording.queue, recording.sequence);
        code = tell_reached(&scope, &recording);
        mock_queue_release(recording.queue);
    }
    mock_unlock(scope.mock);
    CUresult fault = mock_healthy(&scope);
    return fault ? fault : code;
}

static CUresult check_timed(const mock_scope *scope, const mock_event *event, const char *role) {
    CUresult code = refuse_captured(scope, event);
    if (!code && !event->timing)
        code = mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "the %s event was created with CU_EVENT_DISABLE_TIMING", role);
    if (!code && atomic_load(&event->slot->state) == MOCK_EVENT_NEW)
        code = mock_fail(scope, CUDA_ERROR_INVALID_HANDLE, "the %s event was never recorded", role);
    return code;
}

CUresult mock_cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuEventElapsedTime, ENTER_SAFE);
    if (code)
        return code;
    if (!milliseconds)
        return CUDA_ERROR_INVALID_VALUE;
    mock_lock(scope.mock);
    mock_event *first = mock_event_of(&scope, start, &code);
    mock_event *last = first ? mock_event_of(&scope, end, &code) : NULL;
    if (last && !(code = check_timed(&scope, first, "start")) && !(code = check_timed(&scope, last, "end"))) {
        if (!slot_reached(first->slot) || !slot_reached(last->slot))
            code = mock_fail(&scope, CUDA_ERROR_NOT_READY, "an event is not complete yet; synchronize it first");
        else
            *milliseconds = (float)((double)(int64_t)(atomic_load(&last->slot->time_ns) - atomic_load(&first->slot->time_ns)) / 1e6);
    }
    mock_unlock(scope.mock);
    return code;
}
