/* Stream-ordered memory. Host threads, but for what a stream does when it gets there (mock_work.c).
 *
 * The address is known at once; the block may be touched from where the stream allocates it to where a stream frees it. What
 * runs on another stream before that is CUDA_ERROR_ILLEGAL_ADDRESS, and what is enqueued anywhere after the call that frees
 * is CUDA_ERROR_INVALID_VALUE: no order can save it. Captures are refused: nothing here captures allocations.
 */
#include "mock_internal.h"

/* Append the operation, or let it happen now if nothing is ahead of it. */
static CUresult enqueue(mock_scope *scope, CUstream stream, mock_work *work, char *why) {
    mock_trash trash = {0};
    CUresult code = CUDA_SUCCESS;
    mock_lock(scope->mock);
    mock_queue *queue = mock_own_stream_of(scope, stream, &code);
    if (queue && queue->null_stream && (code = mock_capture_implicit(queue->device))) {
        code = mock_fail(scope, code, "the NULL stream would wait for a stream that is being captured");
    } else if (queue && queue->capture) {
        code = mock_fail(scope, mock_capture_invalidate(queue->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
                         "the mock captures no allocations; allocate before the capture");
    } else if (queue && work->kind == WORK_FREE && (code = mock_device_retire(scope->mock->memory, work->to, why))) {
        code = mock_fail(scope, code, "%s", why);
    } else if (queue && !(code = mock_queue_order_null(queue, &trash))) {
        if (mock_queue_idle(queue)) {
            code = mock_work_run(queue, work, why);
            mock_queue_pass(queue);
        } else {
            code = mock_queue_push(queue, work, &trash);
        }
    }
    mock_unlock(scope->mock);
    mock_trash_empty(scope->mock, &trash);
    return code;
}

CUresult mock_cuMemAllocAsync(CUdeviceptr *pointer, size_t bytes, CUstream stream) {
    mock_scope scope;
    char why[MOCK_DETAIL] = "";
    mock_work work = {.kind = WORK_ALLOCATE, .call = CALL_cuMemAllocAsync};
    CUresult code = mock_enter(&scope, work.call, ENTER_SAFE);
    if (code)
        return code;
    if (!pointer)
        return CUDA_ERROR_INVALID_VALUE;
    code = mock_device_allocate(scope.mock->memory, scope.device->ordinal, bytes, &work.to, why);
    if (code)
        return mock_fail(&scope, code, "%s", why);
    mock_device_reserve(scope.mock->memory, work.to, true);
    code = enqueue(&scope, stream, &work, why);
    if (code)
        mock_device_free(scope.mock->memory, work.to, why);
    else
        *pointer = work.to;
    return code;
}

CUresult mock_cuMemFreeAsync(CUdeviceptr pointer, CUstream stream) {
    mock_scope scope;
    char why[MOCK_DETAIL] = "";
    mock_work work = {.kind = WORK_FREE, .call = CALL_cuMemFreeAsync, .to = pointer};
    CUresult code = mock_enter(&scope, work.call, ENTER_SAFE | ENTER_CLEANUP);
    if (code || pointer == 0)
        return code ? code : scope.sticky;
    if (scope.sticky) { /* the stream goes nowhere any more */
        mock_device_free(scope.mock->memory, pointer, why);
        return scope.sticky;
    }
    return enqueue(&scope, stream, &work, why);
}
