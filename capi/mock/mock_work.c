/* What operations do when a stream reaches them: copies, fills, fake kernels, replays of graphs. Worker threads, but
 * for replays on an instance with the option `instant`.
 *
 * Nothing here holds the instance's lock while bytes move or a callback runs. Memory is checked again at this moment: what
 * was freed since the call is CUDA_ERROR_ILLEGAL_ADDRESS, and the caller makes that the context's sticky error.
 */
#include "mock_internal.h"

#include <stdio.h>
#include <time.h>

static CUresult copy_in(mock_memory *memory, const mock_work *work, char *why) {
    mock_bytes to, from = {0};
    CUresult code = mock_device_bytes(memory, work->to, work->bytes, &to, why);
    if (code)
        return code;
    const uint8_t *source = work->staged;
    if (!source) {
        code = mock_pinned_bytes(memory, work->host, work->bytes, &from, why);
        source = from.data;
    }
    if (!code)
        memcpy(to.data, source, work->bytes);
    mock_bytes_release(memory, &from);
    mock_bytes_release(memory, &to);
    return code;
}

static CUresult copy_out(mock_memory *memory, const mock_work *work, char *why) {
    mock_bytes from, to = {0};
    CUresult code = mock_device_bytes(memory, work->from, work->bytes, &from, why);
    if (code)
        return code;
    uint8_t *target = work->host; /* pageable: the caller waits in its call */
    if (work->pinned) {
        code = mock_pinned_bytes(memory, work->host, work->bytes, &to, why);
        target = to.data;
    }
    if (!code)
        memcpy(target, from.data, work->bytes);
    mock_bytes_release(memory, &to);
    mock_bytes_release(memory, &from);
    return code;
}

static CUresult copy_across(mock_memory *memory, const mock_work *work, char *why) {
    mock_bytes from, to;
    CUresult code = mock_device_bytes(memory, work->from, work->bytes, &from, why);
    if (code)
        return code;
    code = mock_device_bytes(memory, work->to, work->bytes, &to, why);
    if (!code)
        memmove(to.data, from.data, work->bytes);
    mock_bytes_release(memory, &to);
    mock_bytes_release(memory, &from);
    return code;
}

static CUresult fill(mock_memory *memory, const mock_work *work, char *why) {
    mock_bytes to;
    CUresult code = mock_device_bytes(memory, work->to, work->bytes, &to, why);
    if (!code)
        memset(to.data, work->value, work->bytes);
    mock_bytes_release(memory, &to);
    return code;
}

/* Let a kernel's time pass; ends early when the context faults. */
static void pass_time(mock_queue *queue, uint64_t ns) {
    trtx_mock *mock = queue->device->mock;
    if (ns == 0)
        return;
    if (mock->clock.now || mock->time) {
        mock_sleep(mock, ns);
        return;
    }
    uint64_t until = mock_now_ns(mock) + ns;
    struct timespec moment = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
    mock_lock(mock);
    while (!atomic_load(&queue->device->fault) && mock_now_ns(mock) < until)
        pthread_cond_timedwait(&queue->work, &mock->lock, &moment);
    mock_unlock(mock);
}

static _Thread_local char explained[MOCK_DETAIL];

void trtx_mock_explain(const char *why) { snprintf(explained, sizeof explained, "%s", why); }

static CUresult run_kernel(mock_queue *queue, const mock_launch *launch, char *why) {
    mock_device *device = queue->device;
    mock_outcome outcome = {0};
    if (!launch->uncounted)
        outcome = mock_faults_enter(device->mock->faults, CALL_execute, device->ordinal);
    pass_time(queue, outcome.delay_ns + launch->duration_ns);
    if (atomic_load(&device->fault))
        return CUDA_SUCCESS; /* dropped: something else ended the context meanwhile */
    if (outcome.error) {
        snprintf(why, MOCK_DETAIL, "fault injected into call %llu of execute", (unsigned long long)outcome.number);
        if (outcome.lose_process) {
            mock_lock(device->mock);
            mock_lose(device, outcome.error, why, true);
            mock_unlock(device->mock);
        }
        return outcome.error;
    }
    explained[0] = 0;
    CUresult code = launch->run ? launch->run(launch->userdata) : CUDA_SUCCESS;
    if (code && explained[0])
        snprintf(why, MOCK_DETAIL, "%s", explained);
    else if (code)
        snprintf(why, MOCK_DETAIL, "a kernel failed with %d", code);
    return code;
}

static CUresult run_node(mock_queue *queue, const mock_work *work, char *why) {
    mock_memory *memory = queue->device->mock->memory;
    char reason[MOCK_DETAIL / 2 + MOCK_DETAIL / 4] = "";
    char detail[MOCK_DETAIL] = "";
    CUresult code;
    switch (work->kind) {
    case WORK_H2D:
        code = copy_in(memory, work, detail);
        break;
    case WORK_D2H:
        code = copy_out(memory, work, detail);
        break;
    case WORK_D2D:
        code = copy_across(memory, work, detail);
        break;
    case WORK_SET:
        code = fill(memory, work, detail);
        break;
    case WORK_ALLOCATE:
        mock_device_reserve(memory, work->to, false);
        code = CUDA_SUCCESS;
        break;
    case WORK_FREE:
        mock_device_reap(memory, work->to);
        code = CUDA_SUCCESS;
        break;
    default:
        return run_kernel(queue, &work->launch, why);
    }
    if (code) {
        memcpy(reason, detail, sizeof reason - 1);
        snprintf(why, MOCK_DETAIL, "%s: %s", mock_call_name(work->call), reason);
    }
    return code;
}

CUresult mock_work_run(mock_queue *queue, mock_work *work, char *why) {
    if (work->kind != WORK_GRAPH)
        return run_node(queue, work, why);
    CUresult code = CUDA_SUCCESS;
    for (size_t i = 0; i < work->program->count && !atomic_load(&queue->device->fault); i++) {
        char reason[MOCK_DETAIL] = "";
        CUresult outcome = run_node(queue, &work->program->nodes[i], reason);
        if (outcome)
            memcpy(why, reason, sizeof reason);
        if (outcome && outcome != TRTX_MOCK_NO_RESULT)
            return outcome;
        code = outcome ? outcome : code; /* a kernel without a result: the replay goes on */
    }
    return code;
}
