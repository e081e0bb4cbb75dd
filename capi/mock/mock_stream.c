/* Streams: in-order queues, each with a thread that starts with its first operation and sleeps while there is none.
 *
 * The instance's lock guards the queues. The thread (the "worker") gives it up while work runs. A queue lives until its
 * last reference goes: the handle's, the thread's, recordings', waits', executables'. Destroying a stream only closes the
 * queue: pending work goes on, then the thread ends, and whoever comes by next (mock_queues_reap) joins it.
 */
#include "mock_internal.h"

#include <signal.h>
#include <stdio.h>
#include <time.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

static trtx_mock *mock_of(const mock_queue *queue) { return queue->device->mock; }

CUresult mock_queue_create(mock_device *device, bool blocking, bool null_stream, mock_queue **made) {
    mock_queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        return CUDA_ERROR_OUT_OF_MEMORY;
    queue->slot = mock_slot_take(device->mock, KIND_STREAM, queue);
    if (!queue->slot) {
        free(queue);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    /* goes on counting where the slot's last user stopped, so that a late recording of that one changes nothing */
    queue->enqueued = queue->completed = atomic_load(&queue->slot->latest);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&queue->work, &attributes);
    pthread_cond_init(&queue->moved, NULL);
    pthread_condattr_destroy(&attributes);
    queue->device = device;
    queue->blocking = blocking;
    queue->null_stream = null_stream;
    queue->references = 1; /* the device's list: until the thread has ended or was never started */
    mock_copy_site(queue->site);
    queue->next = device->queues;
    device->queues = queue;
    *made = queue;
    return CUDA_SUCCESS;
}

void mock_queue_reference(mock_queue *queue) { queue->references++; }

void mock_queue_release(mock_queue *queue) {
    if (!queue || --queue->references)
        return;
    mock_failures_clear(queue, UINT64_MAX);
    mock_slot_recycle(mock_of(queue), queue->slot);
    pthread_cond_destroy(&queue->work);
    pthread_cond_destroy(&queue->moved);
    free(queue);
}

/* ---- the worker ---- */

static void give_back_operation(trtx_mock *mock, mock_operation *operation) {
    operation->next = mock->free_operations;
    mock->free_operations = operation;
}

static void advance(mock_queue *queue, uint64_t sequence) {
    queue->completed = sequence;
    atomic_store_explicit(&queue->slot->done, sequence, memory_order_release);
    if (queue->waiters)
        pthread_cond_broadcast(&queue->moved);
}

static bool failed(const mock_device *device) {
    return atomic_load_explicit(&device->fault, memory_order_acquire) != CUDA_SUCCESS;
}

/* Under the lock, since a recording made meanwhile must win. A clock of the application's own is read before the lock is
 * taken: what came before on the stream may have been reached later than that, and an elapsed time is never negative. */
void mock_event_reach(mock_queue *queue, mock_slot *slot, uint64_t number, uint64_t now_ns) {
    if (now_ns < queue->reached_ns)
        now_ns = queue->reached_ns;
    queue->reached_ns = now_ns;
    if (number == atomic_load_explicit(&slot->latest, memory_order_relaxed))
        atomic_store_explicit(&slot->time_ns, now_ns, memory_order_relaxed);
    if (number > atomic_load_explicit(&slot->done, memory_order_relaxed))
        atomic_store_explicit(&slot->done, number, memory_order_release);
}

static void wait_for_other(mock_queue *queue, const mock_work *work) {
    mock_queue *other = work->queue;
    while (other->completed < work->number && !failed(queue->device)) {
        other->waiters++;
        pthread_cond_wait(&other->moved, &mock_of(queue)->lock);
        other->waiters--;
    }
}

/* What an operation owned, once it ran or was dropped. Called without the lock. */
static void finish_owned(mock_work *work) {
    free(work->staged);
    if (work->kind == WORK_KERNEL)
        mock_launch_drop(&work->launch);
}

/* Under the lock: what running an operation came to. */
static void take_outcome(mock_queue *queue, uint64_t sequence, CUresult code, const char *why) {
    if (code == TRTX_MOCK_NO_RESULT)
        mock_failure_add(queue, sequence, why);
    else if (code)
        mock_device_fail(queue->device, code, why);
}

/* Under the lock, which is given up for a clock of the application's own. */
static uint64_t read_clock(trtx_mock *mock) {
    if (!mock->clock.now)
        return mock_now_ns(mock);
    mock_unlock(mock);
    uint64_t now = mock_now_ns(mock);
    mock_lock(mock);
    return now;
}

static void *worker(void *argument) {
    mock_queue *queue = argument;
    trtx_mock *mock = mock_of(queue);
#ifdef PR_SET_TIMERSLACK
    prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL); /* kernel durations are microseconds: the default slack is 50 */
#endif
    mock_lock(mock);
    for (;;) {
        while (queue->borrowed || (!queue->head && !queue->closing && !queue->stopping)) {
            queue->sleeping = true;
            pthread_cond_wait(&queue->work, &mock->lock);
        }
        queue->sleeping = false;
        mock_operation *operation = queue->head;
        if (!operation)
            break;
        queue->head = operation->next;
        if (!queue->head)
            queue->tail = NULL;
        mock_work *work = &operation->work;
        if (work->kind == WORK_EVENT) {
            mock_event_reach(queue, work->event, work->number, read_clock(mock));
        } else if (work->kind == WORK_WAIT) {
            wait_for_other(queue, work);
            mock_queue_release(work->queue);
        } else {
            char why[MOCK_DETAIL] = "";
            mock_trash trash = {0};
            mock_unlock(mock);
            CUresult code = failed(queue->device) ? CUDA_SUCCESS : mock_work_run(queue, work, why);
            finish_owned(work);
            mock_lock(mock);
            take_outcome(queue, operation->sequence, code, why);
            if (work->kind == WORK_GRAPH)
                mock_program_release(work->program, &trash);
            if (trash.programs) {
                /* the executable was destroyed in flight: its kernels go before anyone sees the replay complete */
                mock_unlock(mock);
                mock_trash_empty(mock, &trash);
                mock_lock(mock);
            }
        }
        uint64_t sequence = operation->sequence;
        give_back_operation(mock, operation);
        advance(queue, sequence);
    }
    queue->ended = true;
    mock_unlock(mock);
    return NULL;
}

/* ---- entering work ---- */

/* Drop what was never enqueued. Under the lock: callbacks go to the trash. */
static void drop_work(trtx_mock *mock, const mock_work *work, mock_trash *trash, mock_operation *carrier) {
    if (work->kind == WORK_WAIT)
        mock_queue_release(work->queue);
    else if (work->kind == WORK_GRAPH)
        mock_program_release(work->program, trash);
    if (carrier) {
        carrier->work = *work;
        carrier->next = trash->operations;
        trash->operations = carrier;
    } else {
        (void)mock;
        free(work->staged);
    }
}

/* One signal for each sleep: a second one would cost a system call and change nothing. */
static void wake(mock_queue *queue) {
    if (queue->sleeping) {
        queue->sleeping = false;
        pthread_cond_signal(&queue->work);
    }
}

CUresult mock_queue_push(mock_queue *queue, const mock_work *work, mock_trash *trash) {
    trtx_mock *mock = mock_of(queue);
    mock_operation *operation = mock->free_operations;
    if (queue->stopping) {
        operation = calloc(1, sizeof *operation);
        drop_work(mock, work, trash, operation);
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (operation)
        mock->free_operations = operation->next;
    else if (!(operation = malloc(sizeof *operation))) {
        drop_work(mock, work, trash, NULL);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (!queue->started) {
        /* pthread_create inherits the signal mask: a stream's thread takes no signals of the application */
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        queue->started = pthread_create(&queue->thread, NULL, worker, queue) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (!queue->started) {
            drop_work(mock, work, trash, operation);
            return CUDA_ERROR_OPERATING_SYSTEM;
        }
    }
    operation->work = *work;
    operation->next = NULL;
    operation->sequence = ++queue->enqueued;
    atomic_store_explicit(&queue->slot->latest, queue->enqueued, memory_order_release);
    if (queue->tail)
        queue->tail->next = operation;
    else
        queue->head = operation;
    queue->tail = operation;
    wake(queue);
    return CUDA_SUCCESS;
}

uint64_t mock_queue_pass(mock_queue *queue) {
    uint64_t sequence = ++queue->enqueued;
    queue->completed = sequence;
    /* `done` first: a query in between must not see work that is not there */
    atomic_store_explicit(&queue->slot->done, sequence, memory_order_release);
    atomic_store_explicit(&queue->slot->latest, sequence, memory_order_release);
    return sequence;
}

void mock_queue_run_here(mock_queue *queue, mock_work *work, mock_trash *trash) {
    trtx_mock *mock = mock_of(queue);
    char why[MOCK_DETAIL] = "";
    uint64_t sequence = ++queue->enqueued;
    atomic_store_explicit(&queue->slot->latest, sequence, memory_order_release);
    queue->borrowed = true;
    mock_queue_reference(queue);
    mock_unlock(mock);
    CUresult code = mock_work_run(queue, work, why);
    mock_lock(mock);
    take_outcome(queue, sequence, code, why);
    mock_program_release(work->program, trash);
    queue->borrowed = false;
    advance(queue, sequence);
    if (queue->head || queue->closing || queue->stopping)
        wake(queue);
    mock_queue_release(queue);
}

CUresult mock_queue_after(mock_queue *queue, mock_queue *other, uint64_t sequence, mock_trash *trash) {
    if (!other || other == queue)
        return CUDA_SUCCESS;
    mock_past_add(&queue->past, other->slot, sequence);
    if (other->completed >= sequence)
        return CUDA_SUCCESS;
    mock_queue_reference(other);
    mock_work wait = {.kind = WORK_WAIT, .queue = other, .number = sequence};
    return mock_queue_push(queue, &wait, trash);
}

CUresult mock_queue_order_null(mock_queue *queue, mock_trash *trash) {
    mock_device *device = queue->device;
    CUresult code = CUDA_SUCCESS;
    if (!queue->blocking || (!device->null_stream && !queue->null_stream))
        return CUDA_SUCCESS;
    if (!queue->null_stream) {
        mock_past_merge(&queue->past, &device->null_stream->past);
        return mock_queue_after(queue, device->null_stream, device->null_stream->enqueued, trash);
    }
    for (mock_queue *other = device->queues; other && !code; other = other->next) {
        if (other->blocking) {
            mock_past_merge(&queue->past, &other->past);
            code = mock_queue_after(queue, other, other->enqueued, trash);
        }
    }
    return code;
}

/* ---- waiting and ending ---- */

void mock_queue_wait(mock_queue *queue, uint64_t sequence) {
    trtx_mock *mock = mock_of(queue);
    mock_queue_reference(queue);
    while (queue->completed < sequence) {
        queue->waiters++;
        pthread_cond_wait(&queue->moved, &mock->lock);
        queue->waiters--;
    }
    mock_queue_release(queue);
}

void mock_queue_close(mock_queue *queue) {
    mock_slot_close(queue->slot);
    queue->closing = true;
    pthread_cond_broadcast(&queue->work);
}

void mock_queues_reap(mock_device *device, bool all) {
    trtx_mock *mock = device->mock;
    mock_queue **link = &device->queues, *found = NULL;
    while (*link) {
        mock_queue *queue = *link;
        if (queue->closing && (all || queue->ended || !queue->started)) {
            *link = queue->next;
            queue->next = found;
            found = queue;
        } else {
            link = &queue->next;
        }
    }
    while (found) {
        mock_queue *queue = found;
        found = queue->next;
        if (queue->started) {
            mock_unlock(mock);
            pthread_join(queue->thread, NULL);
            mock_lock(mock);
        }
        mock_queue_release(queue);
    }
}

void mock_device_fail(mock_device *device, CUresult code, const char *detail) {
    if (failed(device))
        return; /* only the first fault counts */
    snprintf(device->fault_detail, sizeof device->fault_detail, "%s", detail);
    atomic_store_explicit(&device->fault, code, memory_order_release);
    for (int i = 0; i < device->mock->device_count; i++) {
        for (mock_queue *queue = device->mock->devices[i].queues; queue; queue = queue->next) {
            pthread_cond_broadcast(&queue->work);  /* those in the middle of a kernel's duration */
            pthread_cond_broadcast(&queue->moved); /* those that wait for another stream */
        }
    }
}

void mock_trash_empty(trtx_mock *mock, mock_trash *trash) {
    while (trash->programs) {
        mock_program *program = trash->programs;
        trash->programs = program->next;
        mock_program_free(program);
    }
    while (trash->operations) {
        mock_operation *operation = trash->operations;
        trash->operations = operation->next;
        finish_owned(&operation->work);
        free(operation);
    }
    (void)mock;
}
