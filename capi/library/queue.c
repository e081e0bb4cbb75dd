/* Queues: completions for callers that have an event loop. A ring that grows when a request is submitted, so that delivering
 * never needs memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core.h"

struct trtxpy_queue_object {
    trtxpy_head head;
    trtxpy_context_object *context;
    pthread_mutex_t mutex;
    trtxpy_completion *ring;
    size_t room, first, count, reserved; /* reserved: of requests in flight */
    int fd;
};

trtxpy_head *trtxpy_queue_head(trtxpy_queue_object *queue) {
    return &queue->head;
}

trtxpy_status trtxpy_queue_create(trtxpy_context handle, trtxpy_queue *queue_handle) {
    if (queue_handle) *queue_handle = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!queue_handle) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "queue is NULL; expected where to write the handle");
    trtxpy_context_object *context = trtxpy_handle_acquire(handle, TRTXPY_KIND_CONTEXT, "context");
    if (!context) return TRTXPY_INVALID_HANDLE;
    trtxpy_queue_object *queue = calloc(1, sizeof *queue);
    int fd = queue ? eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) : -1;
    if (fd < 0) {
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no queue: %s", queue ? strerror(errno) : "no memory");
        free(queue);
    } else {
        queue->context = context;
        queue->fd = fd;
        pthread_mutex_init(&queue->mutex, NULL);
        *queue_handle = (trtxpy_queue)trtxpy_handle_make(TRTXPY_KIND_QUEUE, &queue->head);
        if (*queue_handle) {
            atomic_fetch_add(&context->head.children, 1);
            atomic_fetch_add(&context->queues, 1);
        } else {
            status = trtxpy_last_status();
            pthread_mutex_destroy(&queue->mutex);
            close(fd);
            free(queue);
        }
    }
    trtxpy_handle_release(&context->head);
    return status;
}

trtxpy_status trtxpy_queue_destroy(trtxpy_queue handle) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_queue_object *queue = trtxpy_handle_retire(handle, TRTXPY_KIND_QUEUE, "queue", &status);
    if (!queue) return status;
    trtxpy_context_object *context = queue->context;
    pthread_mutex_lock(&queue->mutex); /* whoever delivered the last completion lets go of it */
    pthread_mutex_unlock(&queue->mutex);
    close(queue->fd);
    pthread_mutex_destroy(&queue->mutex);
    free(queue->ring);
    free(queue);
    atomic_fetch_sub(&context->queues, 1);
    atomic_fetch_sub(&context->head.children, 1);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_queue_fd(trtxpy_queue handle, int *fd) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!fd) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "fd is NULL; expected where to write it");
    trtxpy_queue_object *queue = trtxpy_handle_acquire(handle, TRTXPY_KIND_QUEUE, "queue");
    if (!queue) return TRTXPY_INVALID_HANDLE;
    *fd = queue->fd;
    trtxpy_handle_release(&queue->head);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_queue_reserve(trtxpy_queue_object *queue) {
    trtxpy_status status = TRTXPY_OK;
    pthread_mutex_lock(&queue->mutex);
    if (queue->count + queue->reserved == queue->room) {
        size_t room = queue->room ? 2 * queue->room : 16;
        trtxpy_completion *ring = malloc(room * sizeof *ring);
        if (ring) {
            for (size_t i = 0; i < queue->count; i++) ring[i] = queue->ring[(queue->first + i) % queue->room];
            free(queue->ring);
            queue->ring = ring;
            queue->room = room;
            queue->first = 0;
        } else {
            status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for %zu completions", room);
        }
    }
    if (status == TRTXPY_OK) queue->reserved++;
    pthread_mutex_unlock(&queue->mutex);
    return status;
}

void trtxpy_queue_push(trtxpy_queue_object *queue, const trtxpy_job *job) {
    pthread_mutex_lock(&queue->mutex);
    trtxpy_completion *completion = &queue->ring[(queue->first + queue->count) % queue->room];
    memset(completion, 0, sizeof *completion);
    completion->status = job->status;
    completion->result = job->result;
    if (job->status != TRTXPY_OK) {
        const char *text = job->message ? job->message : trtxpy_status_name(job->status);
        size_t length = strlen(text);
        if (length >= sizeof completion->message)
            for (length = sizeof completion->message - 1; length && ((unsigned char)text[length] & 0xC0) == 0x80;) length--;
        memcpy(completion->message, text, length);
    }
    queue->count++;
    queue->reserved--;
    if (queue->count == 1) {
        uint64_t one = 1;
        ssize_t written;
        do written = write(queue->fd, &one, sizeof one);
        while (written < 0 && errno == EINTR);
    }
    trtxpy_handle_release(&queue->head); /* before anybody can take it, who may then destroy the queue */
    pthread_mutex_unlock(&queue->mutex);
}

trtxpy_status trtxpy_queue_take(trtxpy_queue handle, trtxpy_completion *completions, size_t room, size_t *taken) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!taken || (room && !completions))
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is NULL", taken ? "completions" : "taken");
    trtxpy_queue_object *queue = trtxpy_handle_acquire(handle, TRTXPY_KIND_QUEUE, "queue");
    if (!queue) return TRTXPY_INVALID_HANDLE;
    pthread_mutex_lock(&queue->mutex);
    size_t count = 0;
    while (count < room && queue->count) {
        completions[count++] = queue->ring[queue->first];
        queue->first = (queue->first + 1) % queue->room;
        queue->count--;
    }
    if (count && !queue->count) {
        uint64_t value;
        ssize_t got = read(queue->fd, &value, sizeof value); /* not blocking: no longer readable */
        (void)got;
    }
    pthread_mutex_unlock(&queue->mutex);
    *taken = count;
    trtxpy_handle_release(&queue->head);
    return TRTXPY_OK;
}
