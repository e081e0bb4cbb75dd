/* What hub.c, watcher.c, lane.c and lane_look.c know of each other. Not for anybody else, but for the Python binding: it puts
 * nodes of its own into hubs' queues, asks for the fork generation, and reads when its own slot was launched.
 *
 * Locks, in the order in which they may be nested: lane->submit, lane->state, then watcher->mutex or a hub's mutex. No
 * driver call is made under lane->state, so that no event loop waits for the driver to read a slot's state. lane->looking
 * is only ever tried, never waited for.
 */
#ifndef TRTX_LANE_INTERNAL_H
#define TRTX_LANE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "lane.h"

#ifdef PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP
/* Held for tens of nanoseconds: to spin is cheaper than to sleep. */
#define TRTX_SHORT_MUTEX PTHREAD_MUTEX_ADAPTIVE_NP
#else
#define TRTX_SHORT_MUTEX PTHREAD_MUTEX_DEFAULT
#endif

#define TRTX_NEVER UINT64_MAX

static inline uint64_t trtx_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void trtx_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline uint64_t trtx_clamp(uint64_t value, uint64_t low, uint64_t high) {
    return value < low ? low : value > high ? high : value;
}

int trtx_short_mutex(pthread_mutex_t *mutex);    /* as pthread_mutex_init */
int trtx_monotonic_condition(pthread_cond_t *condition); /* as pthread_cond_init */
/* As pthread_cond_wait, until a time of trtx_now_ns's clock; TRTX_NEVER: no limit. */
void trtx_wait_until(pthread_cond_t *condition, pthread_mutex_t *mutex, uint64_t until_ns);

/* How many forks lie between this process and the one that loaded the library: objects remember it, and are inert in a
 * child, where there is no watcher thread, no usable driver, and perhaps a lock that nobody will ever unlock. */
unsigned trtx_fork_generation(void);

/* Fill `table` from `library`. False: `reason` (of `room` bytes) says what was missing. */
bool trtx_cuda_api_open(const char *library, trtx_cuda_api *table, char *reason, size_t room);

/* ---- making a context current for a while ----
 *
 * Inside, the thread's stream capture mode is RELAXED: a query of ours must not invalidate a capture that another library
 * began in GLOBAL mode on another thread. The driver keeps the mode for each thread; an exchange costs it tens of nanoseconds. */

typedef struct trtx_scope {
    const trtx_cuda_api *api;
    CUcontext context; /* NULL: not entered */
    bool pushed, relaxed;
    int mode; /* the thread's capture mode before, if relaxed */
} trtx_scope;

CUresult trtx_scope_enter(trtx_scope *scope, const trtx_cuda_api *api, CUcontext context);
void trtx_scope_leave(trtx_scope *scope);

/* ---- hubs ---- */

typedef struct trtx_hub_node {
    struct trtx_hub_node *next, *previous;
    bool queued;
    trtx_completion completion;
} trtx_hub_node;

/* Queue node->completion. wanted: somebody sleeps on the fd. True: call trtx_hub_signal soon, outside the lane's locks. */
bool trtx_hub_post(trtx_hub *hub, trtx_hub_node *node, bool wanted);
/* Somebody sleeps on the fd for a node that may be in the queue. Result as trtx_hub_post. */
bool trtx_hub_want(trtx_hub *hub, trtx_hub_node *node);
void trtx_hub_signal(trtx_hub *hub);
/* Nobody shall hear of this node any more. */
void trtx_hub_withdraw(trtx_hub *hub, trtx_hub_node *node);

/* ---- lanes ---- */

typedef struct trtx_slot {
    _Atomic int state; /* trtx_slot_state; written under lane->state */
    _Atomic uint64_t turn; /* how often it was submitted: tells a waiter his submission from the next one; written under
                              lane->state */
    bool armed, dropped, watched;
    unsigned waiters;
    unsigned pace; /* index into lane->paces */
    CUevent event;
    CUresult unmarked; /* not 0: its event could not be recorded, for this reason */
    CUresult doubt;    /* what the last query of its event said instead of an answer */
    trtx_hub *hub; /* a reference, from submit until the slot is released or submitted again */
    trtx_completion completion;
    trtx_hub_node node;
    pthread_cond_t done;
} trtx_slot;

/* How long a graph takes, learned: a lane serves several shapes, and one average over all of them would oversleep. */
typedef struct trtx_pace {
    CUgraphExec exec;
    uint64_t expected_ns;
} trtx_pace;

enum { TRTX_MAX_SLOTS = 1024, TRTX_PACES = 64 };

struct trtx_lane {
    const trtx_cuda_api *api;
    CUcontext context;
    CUstream stream;
    trtx_watcher *watcher;
    trtx_wake_mode mode;
    unsigned fork_generation;
    size_t slot_count;

    pthread_mutex_t submit; /* the order of launches is the order in the fifo */
    pthread_mutex_t state;  /* slots, fifo, statistics, paces */
    atomic_flag looking;    /* held by the one who asks the driver about the fifo's head */

    /* In flight, oldest first: fifo[i % slot_count] for head <= i < tail. Written under `state`. */
    _Atomic uint64_t head, tail;
    uint16_t *fifo;
    uint64_t free_slots[TRTX_MAX_SLOTS / 64]; /* a bit for each */
    size_t free_count, launching;
    trtx_pace paces[TRTX_PACES];
    uint64_t last_completed_ns;
    _Atomic uint64_t not_ready_ns; /* when the head was last seen unfinished */
    _Atomic int dead;
    _Atomic uint64_t expected_ns;          /* written under `state` */
    _Atomic uint64_t polls;
    trtx_lane_statistics statistics;

    /* The watcher's part. */
    _Atomic size_t watched; /* slots in flight that somebody sleeps for */
    _Atomic bool active;    /* on one of the watcher's lists; cleared under the watcher's mutex */
    trtx_lane *next;        /* on that list */
    uint64_t next_look_ns;  /* the watcher thread's own */

    trtx_slot slots[];
};

/* As trtx_lane_submit. On failure *call is the driver's function that failed, or "" if none was called. */
CUresult trtx_lane_submit_call(trtx_lane *lane, size_t slot, CUgraphExec exec, uint64_t token, trtx_hub *hub, const char **call);
/* Look once, inside a scope of the lane's context: complete what is done, `most` at most, tell the hubs. As trtx_lane_poll. */
size_t trtx_lane_look(trtx_lane *lane, size_t most);
/* The device is gone: everything in flight completes with `cause`. */
void trtx_lane_die(trtx_lane *lane, CUresult cause);
bool trtx_is_sticky(CUresult error);
/* Under lane->state: count the slot as watched, or no longer. True: call trtx_watcher_request, outside the lane's locks. */
bool trtx_slot_update_watch(trtx_lane *lane, trtx_slot *slot);
/* Under lane->state. */
void trtx_slot_recycle(trtx_lane *lane, trtx_slot *slot);

/* ---- the watcher ---- */

/* The lane has watched slots: look after it until it has none. */
CUresult trtx_watcher_request(trtx_watcher *watcher, trtx_lane *lane);
/* Returns when the watcher will not touch the lane again. The lane has no watched slots. */
void trtx_watcher_forget(trtx_watcher *watcher, trtx_lane *lane);

#endif
