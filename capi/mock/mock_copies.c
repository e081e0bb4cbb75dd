/* The calls for memory: allocation, copies, fills. Host threads.
 *
 * Pointers are checked when the call is made (CUDA_ERROR_INVALID_VALUE) and again when the stream reaches the operation
 * (CUDA_ERROR_ILLEGAL_ADDRESS, sticky). Pageable memory is staged or waited for, as CUDA does, and refused in a capture.
 */
#include "mock_internal.h"

#include <stdio.h>

CUresult mock_cuMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuMemGetInfo, ENTER_SAFE);
    if (code)
        return code;
    if (!free_bytes || !total_bytes)
        return CUDA_ERROR_INVALID_VALUE;
    size_t used;
    mock_device_info(scope.mock->memory, scope.device->ordinal, &used, total_bytes);
    *free_bytes = *total_bytes - used;
    return CUDA_SUCCESS;
}

CUresult mock_cuMemAlloc(CUdeviceptr *pointer, size_t bytes) {
    mock_scope scope;
    char why[MOCK_DETAIL] = "";
    CUresult code = mock_enter(&scope, CALL_cuMemAlloc, ENTER_UNSAFE);
    if (code)
        return code;
    if (!pointer)
        return CUDA_ERROR_INVALID_VALUE;
    code = mock_device_allocate(scope.mock->memory, scope.device->ordinal, bytes, pointer, why);
    return code ? mock_fail(&scope, code, "%s", why) : CUDA_SUCCESS;
}

CUresult mock_cuMemFree(CUdeviceptr pointer) {
    mock_scope scope;
    char why[MOCK_DETAIL] = "";
    CUresult code = mock_enter(&scope, CALL_cuMemFree, ENTER_UNSAFE | ENTER_CLEANUP);
    if (code || pointer == 0)
        return code ? code : scope.sticky;
    code = mock_device_free(scope.mock->memory, pointer, why);
    if (scope.sticky)
        return scope.sticky;
    return code ? mock_fail(&scope, code, "%s", why) : CUDA_SUCCESS;
}

CUresult mock_cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    mock_scope scope;
    char why[MOCK_DETAIL] = "";
    CUresult code = mock_enter(&scope, CALL_cuMemHostAlloc, ENTER_UNSAFE);
    if (code)
        return code;
    if (!pointer || (flags & ~7u))
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "no place for the result, or unknown flags %#x", flags);
    code = mock_pinned_allocate(scope.mock->memory, scope.device->ordinal, bytes, pointer, why);
    return code ? mock_fail(&scope, code, "%s", why) : CUDA_SUCCESS;
}

CUresult mock_cuMemFreeHost(void *pointer) {
    mock_scope scope;
    char why[MOCK_DETAIL] = "";
    CUresult code = mock_enter(&scope, CALL_cuMemFreeHost, ENTER_UNSAFE | ENTER_CLEANUP);
    if (code)
        return code;
    code = mock_pinned_free(scope.mock->memory, pointer, why);
    if (scope.sticky)
        return scope.sticky;
    return code ? mock_fail(&scope, code, "%s", why) : CUDA_SUCCESS;
}

static CUresult check_device(const mock_scope *scope, CUdeviceptr pointer, size_t bytes) {
    char why[MOCK_DETAIL] = "";
    if (mock_device_check(scope->mock->memory, pointer, bytes, why))
        return mock_fail(scope, CUDA_ERROR_INVALID_VALUE, "%s", why);
    return CUDA_SUCCESS;
}

static CUresult check_host(const mock_scope *scope, const void *pointer, size_t bytes, bool *pinned) {
    char why[MOCK_DETAIL] = "";
    *pinned = false;
    if (bytes == 0)
        return CUDA_SUCCESS;
    if (!pointer)
        return mock_fail(scope, CUDA_ERROR_INVALID_VALUE, "the host pointer is null");
    if (mock_device_of(scope->mock->memory, (CUdeviceptr)(uintptr_t)pointer) >= 0)
        return mock_fail(scope, CUDA_ERROR_INVALID_VALUE, "%p is a device pointer where a host pointer belongs", pointer);
    if (mock_pinned_check(scope->mock->memory, pointer, bytes, pinned, why))
        return mock_fail(scope, CUDA_ERROR_INVALID_VALUE, "%s", why);
    return CUDA_SUCCESS;
}

/* Append to a stream, or to the capture it is in; takes over what `work` owns either way. wait: also wait for it. */
static CUresult enter_work(mock_scope *scope, CUstream stream, const mock_work *work, bool pageable, bool wait,
                           trtx_mock_position *position) {
    mock_trash trash = {0};
    CUresult code = CUDA_SUCCESS;
    bool taken = false;
    mock_lock(scope->mock);
    mock_queue *queue = mock_own_stream_of(scope, stream, &code);
    if (queue && queue->null_stream && (code = mock_capture_implicit(queue->device))) {
        queue = NULL;
    } else if (queue && queue->capture) {
        if (pageable)
            code = mock_fail(scope, mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
                             "host memory must be pinned to be captured");
        else
            code = mock_capture_node(queue, work);
        taken = code == CUDA_SUCCESS;
    } else if (queue && !(code = mock_queue_order_null(queue, &trash))) {
        code = mock_queue_push(queue, work, &trash);
        taken = true;
        uint64_t sequence = queue->enqueued;
        if (!code && work->launch.region)
            mock_region_use(work->launch.region, queue, sequence);
        if (!code && position)
            *position = (trtx_mock_position){(uintptr_t)queue->slot, sequence};
        if (!code && wait) {
            mock_queue_wait(queue, sequence);
            mock_observe(queue->slot, sequence);
        }
    }
    mock_unlock(scope->mock);
    mock_trash_empty(scope->mock, &trash);
    if (!taken) {
        free(work->staged);
        if (work->kind == WORK_KERNEL)
            mock_launch_drop(&work->launch);
    }
    return !code && wait ? mock_healthy(scope) : code;
}

/* Staging, like waiting, would make a copy unsafe in a capture: pageable memory is guarded as such. */
static CUresult guard_pageable(const mock_scope *scope) {
    CUresult code = mock_capture_guard(scope->mock);
    return code ? mock_fail(scope, code, "a copy of pageable memory while a capture is under way, which is invalid now") : code;
}

CUresult mock_cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    mock_scope scope;
    mock_work work = {.kind = WORK_H2D, .call = CALL_cuMemcpyHtoDAsync, .to = to, .bytes = bytes, .host = (void *)(uintptr_t)from};
    CUresult code = mock_enter(&scope, work.call, ENTER_SAFE);
    if (!code)
        code = check_host(&scope, from, bytes, &work.pinned);
    if (!code)
        code = check_device(&scope, to, bytes);
    if (code || bytes == 0)
        return code;
    if (!work.pinned) {
        /* pageable memory is staged before the call returns, so the caller may reuse it at once */
        if ((code = guard_pageable(&scope)))
            return code;
        if (!(work.staged = malloc(bytes)))
            return CUDA_ERROR_OUT_OF_MEMORY;
        memcpy(work.staged, from, bytes);
    }
    return enter_work(&scope, stream, &work, !work.pinned, false, NULL);
}

CUresult mock_cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    mock_scope scope;
    mock_work work = {.kind = WORK_D2H, .call = CALL_cuMemcpyDtoHAsync, .from = from, .bytes = bytes, .host = to};
    CUresult code = mock_enter(&scope, work.call, ENTER_SAFE);
    if (!code)
        code = check_host(&scope, to, bytes, &work.pinned);
    if (!code)
        code = check_device(&scope, from, bytes);
    if (code || bytes == 0)
        return code;
    if (!work.pinned && (code = guard_pageable(&scope)))
        return code;
    /* a copy into pageable memory returns only when it is complete */
    return enter_work(&scope, stream, &work, !work.pinned, !work.pinned, NULL);
}

CUresult mock_cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    mock_scope scope;
    mock_work work = {.kind = WORK_D2D, .call = CALL_cuMemcpyDtoDAsync, .to = to, .from = from, .bytes = bytes};
    CUresult code = mock_enter(&scope, work.call, ENTER_SAFE);
    if (!code)
        code = check_device(&scope, to, bytes);
    if (!code)
        code = check_device(&scope, from, bytes);
    return code || bytes == 0 ? code : enter_work(&scope, stream, &work, false, false, NULL);
}

CUresult mock_cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    mock_scope scope;
    mock_work work = {.kind = WORK_SET, .call = CALL_cuMemsetD8Async, .to = to, .value = value, .bytes = count};
    CUresult code = mock_enter(&scope, work.call, ENTER_SAFE);
    if (!code)
        code = check_device(&scope, to, count);
    return code || count == 0 ? code : enter_work(&scope, stream, &work, false, false, NULL);
}

/* ---- kernels ---- */

static CUcontext context_of_stream(CUstream stream) {
    mock_slot *slot = mock_slot_find(stream, KIND_STREAM);
    trtx_mock *mock = slot ? atomic_load(&slot->mock) : NULL;
    CUcontext context = NULL;
    if (!mock)
        return NULL;
    mock_lock(mock);
    if (mock_slot_find(stream, KIND_STREAM) == slot)
        context = (CUcontext)mock_handle(((mock_queue *)atomic_load(&slot->object))->device->slot);
    mock_unlock(mock);
    return context;
}

CUresult trtx_mock_enqueue(CUstream stream, const trtx_mock_task *task, trtx_mock_position *position) {
    mock_scope scope;
    mock_work work = {.kind = WORK_KERNEL, .call = CALL_trtx_mock_launch,
                      .launch = {task->duration_ns, task->run, task->userdata, task->release, task->region, task->uncounted != 0}};
    if (position)
        *position = (trtx_mock_position){0, 0};
    mock_region_reference(task->region);
    /* a tool for tests more than a driver call: where no context is current, the stream's own is */
    CUcontext lent = mock_current_device() ? NULL : context_of_stream(stream);
    if (lent && mock_push_context(lent) != CUDA_SUCCESS)
        lent = NULL;
    CUresult code = mock_enter(&scope, work.call, ENTER_SAFE);
    if (!code)
        code = enter_work(&scope, stream, &work, false, false, position);
    else
        mock_launch_drop(&work.launch);
    if (lent)
        mock_pop_context();
    return code;
}

CUresult trtx_mock_launch(CUstream stream, uint64_t duration_ns, trtx_mock_kernel run, void *userdata,
                          void (*release)(void *userdata)) {
    trtx_mock_task task = {.duration_ns = duration_ns, .run = run, .userdata = userdata, .release = release};
    return trtx_mock_enqueue(stream, &task, NULL);
}

static CUresult access_bytes(trtx_mock *mock, CUdeviceptr pointer, size_t bytes, void *to, const void *from) {
    static const mock_scope scope = {.call = CALL_execute};
    char why[MOCK_DETAIL] = "";
    mock_bytes view;
    if (bytes == 0)
        return CUDA_SUCCESS;
    if (mock_device_bytes(mock->memory, pointer, bytes, &view, why))
        return mock_fail(&scope, CUDA_ERROR_ILLEGAL_ADDRESS, "%s", why);
    if (to)
        memcpy(to, view.data, bytes);
    else
        memcpy(view.data, from, bytes);
    mock_bytes_release(mock->memory, &view);
    return CUDA_SUCCESS;
}

CUresult trtx_mock_read(trtx_mock *mock, void *to, CUdeviceptr from, size_t bytes) {
    return access_bytes(mock, from, bytes, to, NULL);
}

CUresult trtx_mock_write(trtx_mock *mock, CUdeviceptr to, const void *from, size_t bytes) {
    return access_bytes(mock, to, bytes, NULL, from);
}

CUresult trtx_mock_pin(trtx_mock *mock, CUdeviceptr pointer, size_t bytes, trtx_mock_view *view) {
    static const mock_scope scope = {.call = CALL_execute};
    char why[MOCK_DETAIL] = "";
    mock_bytes found;
    if (mock_device_bytes(mock->memory, pointer, bytes, &found, why))
        return mock_fail(&scope, CUDA_ERROR_ILLEGAL_ADDRESS, "%s", why);
    *view = (trtx_mock_view){found.data, found.backing};
    return CUDA_SUCCESS;
}

void trtx_mock_unpin(trtx_mock *mock, trtx_mock_view *view) {
    mock_bytes bytes = {view->data, view->backing};
    mock_bytes_release(mock->memory, &bytes);
    *view = (trtx_mock_view){0};
}

/* ---- memory of TensorRT itself ---- */

CUresult trtx_mock_reserve(size_t bytes, const char *label, CUdeviceptr *pointer) {
    mock_scope scope;
    char why[MOCK_DETAIL] = "";
    CUresult code = mock_enter(&scope, CALL_trtx_mock_reserve, ENTER_UNSAFE);
    if (!code && (code = mock_device_allocate(scope.mock->memory, scope.device->ordinal, bytes, pointer, why)))
        mock_fail(&scope, code, "%s", why);
    if (!code)
        mock_device_label(scope.mock->memory, *pointer, label);
    return code;
}

void trtx_mock_unreserve(trtx_mock *mock, CUdeviceptr pointer) {
    char why[MOCK_DETAIL];
    mock_device_free(mock->memory, pointer, why);
}

int trtx_mock_is_device_address(trtx_mock *mock, CUdeviceptr pointer) { return mock_device_of(mock->memory, pointer) >= 0; }
