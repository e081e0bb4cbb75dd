/* Hubs: a queue of completions made of the slots' own nodes, and an eventfd for those who sleep. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lane_internal.h"

struct trtx_hub {
    _Atomic unsigned references;
    unsigned fork_generation;
    int fd;
    pthread_mutex_t mutex;
    trtx_hub_node queue; /* a ring; this one is the anchor */
    bool wanted;         /* a node that somebody sleeps for came since the queue was last empty */
    bool signalled;      /* the fd is readable */
};

CUresult trtx_hub_create(trtx_hub **result, int *fd) {
    if (!result || !fd) return CUDA_ERROR_INVALID_VALUE;
    trtx_hub *hub = calloc(1, sizeof *hub);
    if (!hub) return CUDA_ERROR_OUT_OF_MEMORY;
    hub->fork_generation = trtx_fork_generation();
    hub->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (hub->fd < 0 || trtx_short_mutex(&hub->mutex) != 0) {
        if (hub->fd >= 0) close(hub->fd);
        free(hub);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    atomic_init(&hub->references, 1);
    hub->queue.next = hub->queue.previous = &hub->queue;
    *result = hub;
    *fd = hub->fd;
    return CUDA_SUCCESS;
}

void trtx_hub_retain(trtx_hub *hub) { atomic_fetch_add_explicit(&hub->references, 1, memory_order_relaxed); }

void trtx_hub_release(trtx_hub *hub) {
    if (!hub || atomic_fetch_sub_explicit(&hub->references, 1, memory_order_acq_rel) != 1) return;
    /* A slot holds a reference for as long as its node may be queued: the queue is empty. */
    close(hub->fd);
    if (hub->fork_generation == trtx_fork_generation()) pthread_mutex_destroy(&hub->mutex);
    free(hub);
}

static void unlink_node(trtx_hub_node *node) {
    node->previous->next = node->next;
    node->next->previous = node->previous;
    node->queued = false;
}

/* Under the mutex: an empty queue leaves nothing to be told. */
static void settle(trtx_hub *hub) {
    if (hub->queue.next != &hub->queue) return;
    hub->wanted = false;
    if (!hub->signalled) return;
    uint64_t count;
    while (read(hub->fd, &count, sizeof count) < 0 && errno == EINTR) {
    }
    hub->signalled = false;
}

size_t trtx_hub_take(trtx_hub *hub, trtx_completion *completions, size_t room) {
    if (!hub || hub->fork_generation != trtx_fork_generation()) return 0;
    size_t taken = 0;
    pthread_mutex_lock(&hub->mutex);
    while (taken < room && hub->queue.next != &hub->queue) {
        trtx_hub_node *node = hub->queue.next;
        completions[taken++] = node->completion;
        unlink_node(node);
    }
    settle(hub);
    pthread_mutex_unlock(&hub->mutex);
    return taken;
}

bool trtx_hub_post(trtx_hub *hub, trtx_hub_node *node, bool wanted) {
    pthread_mutex_lock(&hub->mutex);
    node->previous = hub->queue.previous;
    node->next = &hub->queue;
    node->previous->next = node->next->previous = node;
    node->queued = true;
    bool signal = wanted && !hub->wanted;
    hub->wanted |= wanted;
    pthread_mutex_unlock(&hub->mutex);
    return signal;
}

bool trtx_hub_want(trtx_hub *hub, trtx_hub_node *node) {
    pthread_mutex_lock(&hub->mutex);
    bool signal = node->queued && !hub->wanted;
    hub->wanted |= node->queued;
    pthread_mutex_unlock(&hub->mutex);
    return signal;
}

void trtx_hub_signal(trtx_hub *hub) {
    pthread_mutex_lock(&hub->mutex);
    /* Whoever took the last completion in the meantime is not to be woken for nothing. */
    if (hub->wanted && !hub->signalled) {
        const uint64_t one = 1;
        ssize_t written;
        do written = write(hub->fd, &one, sizeof one);
        while (written < 0 && errno == EINTR);
        hub->signalled = true; /* the counter is 0 before, so the write cannot fail for want of room */
    }
    pthread_mutex_unlock(&hub->mutex);
}

void trtx_hub_withdraw(trtx_hub *hub, trtx_hub_node *node) {
    pthread_mutex_lock(&hub->mutex);
    if (node->queued) {
        unlink_node(node);
        settle(hub);
    }
    pthread_mutex_unlock(&hub->mutex);
}
