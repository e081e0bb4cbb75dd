/* The watcher: one thread that looks after the lanes on which somebody sleeps. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>

#include "lane_internal.h"

#define MICROSECOND UINT64_C(1000)

static const uint64_t balanced_margin_ns = 20 * MICROSECOND; /* awake this long before a result is due */
static const uint64_t balanced_spin_ns = 50 * MICROSECOND;   /* and no longer than this after it */
static const uint64_t latency_linger_ns = 100 * MICROSECOND; /* a caller that was just served may come back at once */
static const uint64_t shortest_sleep_ns = 3 * MICROSECOND;   /* less than this costs more to sleep than to spin */

struct trtx_watcher {
    unsigned fork_generation;
    pthread_mutex_t mutex;
    pthread_cond_t wake, dropped;
    pthread_t thread;
    bool started, stop;
    trtx_lane *incoming;
    _Atomic uint64_t requests;     /* counts what the thread must take note of */
    _Atomic uint64_t wake_at_ns;   /* 0: the thread is awake */
    _Atomic uint64_t overshoot_ns; /* how late it wakes, learned */
};

/* When the watcher should look at a lane that it just looked at. */
static uint64_t next_look(const trtx_watcher *watcher, trtx_lane *lane, uint64_t now) {
    if (lane->mode == TRTX_WAKE_LATENCY) return now;
    uint64_t start = now, expected = 0;
    pthread_mutex_lock(&lane->state);
    uint64_t head = atomic_load_explicit(&lane->head, memory_order_relaxed);
    if (head != atomic_load_explicit(&lane->tail, memory_order_relaxed)) {
        const trtx_slot *slot = &lane->slots[lane->fifo[head % lane->slot_count]];
        start = slot->completion.launched_ns;
        if (start < lane->last_completed_ns) start = lane->last_completed_ns;
        expected = lane->paces[slot->pace].expected_ns;
    }
    pthread_mutex_unlock(&lane->state);
    uint64_t elapsed = now > start ? now - start : 0;
    uint64_t due = start + expected;
    if (lane->mode == TRTX_WAKE_EFFICIENT) {
        if (now < due) return due; /* not before: a look too many costs more than a look too late */
        return now + trtx_clamp((expected ? expected : elapsed) / 8, 20 * MICROSECOND, 200 * MICROSECOND);
    }
    uint64_t early = balanced_margin_ns + atomic_load_explicit(&watcher->overshoot_ns, memory_order_relaxed);
    if (now + early < due) return due - early;
    if (now < due + balanced_spin_ns) return now;
    return now + trtx_clamp(elapsed / 8, 10 * MICROSECOND, 1000 * MICROSECOND);
}

/* Under the mutex. */
static void rouse(trtx_watcher *watcher) {
    atomic_fetch_add(&watcher->requests, 1);
    if (atomic_exchange(&watcher->wake_at_ns, 0) != 0) pthread_cond_signal(&watcher->wake);
}

static void take_incoming(trtx_watcher *watcher, trtx_lane **lanes, bool *stop) {
    pthread_mutex_lock(&watcher->mutex);
    while (watcher->incoming) {
        trtx_lane *lane = watcher->incoming;
        watcher->incoming = lane->next;
        lane->next = *lanes;
        lane->next_look_ns = 0;
        *lanes = lane;
    }
    *stop = watcher->stop;
    pthread_mutex_unlock(&watcher->mutex);
}

/* Let go of the lanes that nobody sleeps for. `active` is cleared before `watched` is read, a request counts `watched`
 * before it reads `active`: at least one of the two sees the other. */
static void drop_idle(trtx_watcher *watcher, trtx_lane **lanes) {
    pthread_mutex_lock(&watcher->mutex);
    for (trtx_lane **link = lanes; *link;) {
        trtx_lane *lane = *link;
        if (atomic_load(&lane->watched) == 0) {
            atomic_store(&lane->active, false);
            if (atomic_load(&lane->watched) == 0) {
                *link = lane->next;
                continue;
            }
            atomic_store(&lane->active, true);
        }
        link = &lane->next;
    }
    pthread_cond_broadcast(&watcher->dropped);
    pthread_mutex_unlock(&watcher->mutex);
}

static void sleep_until(trtx_watcher *watcher, uint64_t until, uint64_t seen) {
    pthread_mutex_lock(&watcher->mutex);
    atomic_store(&watcher->wake_at_ns, until);
    if (atomic_load(&watcher->requests) == seen) {
        uint64_t now = 0;
        while (atomic_load(&watcher->wake_at_ns) != 0 && (until == TRTX_NEVER || (now = trtx_now_ns()) < until))
            trtx_wait_until(&watcher->wake, &watcher->mutex, until);
        if (atomic_load(&watcher->wake_at_ns) != 0) { /* not roused: the clock did it, how late? */
            uint64_t late = trtx_clamp(now - until, 0, 100 * MICROSECOND);
            uint64_t before = atomic_load_explicit(&watcher->overshoot_ns, memory_order_relaxed);
            atomic_store_explicit(&watcher->overshoot_ns, before - before / 8 + late / 8, memory_order_relaxed);
        }
    }
    atomic_store(&watcher->wake_at_ns, 0);
    pthread_mutex_unlock(&watcher->mutex);
}

static void *watch(void *argument) {
    trtx_watcher *watcher = argument;
    pthread_setname_np(pthread_self(), "trtx-watcher");
    prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul); /* else the kernel adds 50 us to every sleep */
    trtx_lane *lanes = NULL;
    trtx_scope scope = {0};
    uint64_t seen = 0, linger_until = 0;
    for (bool stop = false;;) {
        uint64_t requests = atomic_load(&watcher->requests), now = trtx_now_ns(), next = TRTX_NEVER;
        bool asked = requests != seen, idle = false;
        if (asked) {
            seen = requests;
            take_incoming(watcher, &lanes, &stop);
            if (stop) break;
        }
        for (trtx_lane *lane = lanes; lane; lane = lane->next) {
            if (atomic_load_explicit(&lane->watched, memory_order_acquire) == 0) {
                idle = true;
                continue;
            }
            if (asked && lane->next_look_ns > now) { /* what is first in line may have changed */
                uint64_t planned = next_look(watcher, lane, now);
                if (planned < lane->next_look_ns) lane->next_look_ns = planned;
            }
            if (lane->next_look_ns <= now) {
                trtx_scope_enter(&scope, lane->api, lane->context); /* if it cannot, the query says what is wrong */
                trtx_lane_look(lane, SIZE_MAX);
                now = trtx_now_ns();
                lane->next_look_ns = next_look(watcher, lane, now);
                if (lane->mode == TRTX_WAKE_LATENCY) linger_until = now + latency_linger_ns;
            }
            if (lane->next_look_ns < next) next = lane->next_look_ns;
        }
        if (idle) {
            trtx_scope_leave(&scope); /* the context may end with the lane */
            drop_idle(watcher, &lanes);
            continue;
        }
        if (next <= now + shortest_sleep_ns || now < linger_until) {
            trtx_pause();
            continue;
        }
        if (!lanes) trtx_scope_leave(&scope);
        sleep_until(watcher, next, seen);
    }
    trtx_scope_leave(&scope);
    return NULL;
}

CUresult trtx_watcher_create(trtx_watcher **result) {
    if (!result) return CUDA_ERROR_INVALID_VALUE;
    trtx_watcher *watcher = calloc(1, sizeof *watcher);
    if (!watcher) return CUDA_ERROR_OUT_OF_MEMORY;
    watcher->fork_generation = trtx_fork_generation();
    if (trtx_short_mutex(&watcher->mutex) || trtx_monotonic_condition(&watcher->wake) ||
        trtx_monotonic_condition(&watcher->dropped)) {
        free(watcher);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    *result = watcher;
    return CUDA_SUCCESS;
}

void trtx_watcher_destroy(trtx_watcher *watcher) {
    if (!watcher || watcher->fork_generation != trtx_fork_generation()) return; /* the parent's; leaked in the child */
    pthread_mutex_lock(&watcher->mutex);
    bool started = watcher->started;
    watcher->stop = true;
    rouse(watcher);
    pthread_mutex_unlock(&watcher->mutex);
    if (started) pthread_join(watcher->thread, NULL);
    pthread_cond_destroy(&watcher->wake);
    pthread_cond_destroy(&watcher->dropped);
    pthread_mutex_destroy(&watcher->mutex);
    free(watcher);
}

/* Under the mutex. */
static CUresult start(trtx_watcher *watcher) {
    if (watcher->started) return CUDA_SUCCESS;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: no signal of the application's lands on this thread */
    int error = pthread_create(&watcher->thread, NULL, watch, watcher);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) return CUDA_ERROR_OPERATING_SYSTEM;
    watcher->started = true;
    return CUDA_SUCCESS;
}

CUresult trtx_watcher_request(trtx_watcher *watcher, trtx_lane *lane) {
    if (atomic_load(&lane->active)) {
        /* The thread writes wake_at_ns and then reads `requests`; here it is the other way round. */
        atomic_fetch_add(&watcher->requests, 1);
        uint64_t wake_at = atomic_load(&watcher->wake_at_ns);
        if (wake_at == 0) return CUDA_SUCCESS;
        if (wake_at != TRTX_NEVER && next_look(watcher, lane, trtx_now_ns()) >= wake_at) return CUDA_SUCCESS;
    }
    pthread_mutex_lock(&watcher->mutex);
    CUresult status = start(watcher);
    if (status == CUDA_SUCCESS) {
        if (!atomic_load(&lane->active)) {
            atomic_store(&lane->active, true);
            lane->next = watcher->incoming;
            watcher->incoming = lane;
        }
        rouse(watcher);
    }
    pthread_mutex_unlock(&watcher->mutex);
    return status;
}

void trtx_watcher_forget(trtx_watcher *watcher, trtx_lane *lane) {
    pthread_mutex_lock(&watcher->mutex);
    if (atomic_load(&lane->active)) rouse(watcher);
    while (atomic_load(&lane->active)) trtx_wait_until(&watcher->dropped, &watcher->mutex, TRTX_NEVER);
    pthread_mutex_unlock(&watcher->mutex);
}
