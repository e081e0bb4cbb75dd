/* Lanes: launching captured graphs and noticing that they are done. The hot path of the data plane; no Python in it.
 *
 * A lane is one stream and a number of slots. A slot is what one request in flight needs: its event and whatever graph is
 * launched for it. Work on a lane completes in the order of its submissions.
 *
 * Completion is an event recorded behind the graph and queried: measured on an H200 with driver 580, an event is seen
 * complete 7 us before a flag that the stream writes into pinned memory after the same graph (7.6 against 14.3 to 15.3 us
 * from the launch), it needs no fresh generation for each replay, and a faulted context answers the query with its error.
 *
 * Who queries: anyone. trtx_lane_poll may be called by an event loop that spins, by a thread that waits, and by the watcher
 * at once; a lane's lock sorts them out. The watcher is one thread that sleeps unless somebody asked to be told.
 *
 * Threads: every function may be called from any thread; what ends an object (destroy, the last release) while no other call
 * on it runs. The CUDA context that was current is restored. Only the functions that create allocate memory (and the first
 * request for the watcher, which starts its thread). Only submit and mark wait for the driver: for the launch itself, and
 * for another thread's launch on the same lane.
 *
 * Fork: in a child everything is inert: nothing touches the driver, calls return CUDA_ERROR_NOT_INITIALIZED or the state as
 * it was, and what is destroyed is leaked.
 */
#ifndef TRTX_LANE_H
#define TRTX_LANE_H

#include <stdbool.h>

#include "cuda_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct trtx_lane trtx_lane;
typedef struct trtx_hub trtx_hub;
typedef struct trtx_watcher trtx_watcher;

/* How eagerly the watcher looks. */
typedef enum trtx_wake_mode {
    TRTX_WAKE_LATENCY = 0,   /* spins while an armed slot is in flight, and 100 us longer: a caller may come back */
    TRTX_WAKE_BALANCED = 1,  /* sleeps until 20 us before a result is due, spins till 50 us after, then ever longer naps */
    TRTX_WAKE_EFFICIENT = 2  /* sleeps until a result is due, then naps: an eighth of the expected time, 20 to 200 us */
} trtx_wake_mode;

typedef enum trtx_slot_state {
    TRTX_SLOT_FREE = 0,
    TRTX_SLOT_HELD = 1,      /* somebody fills it or reads from it */
    TRTX_SLOT_IN_FLIGHT = 2, /* from the beginning of submit, also when given back meanwhile */
    TRTX_SLOT_DONE = 3       /* finished, with a status; held by whoever submitted it */
} trtx_slot_state;

typedef struct trtx_completion {
    uint64_t token;          /* as given to trtx_lane_submit */
    CUresult status;
    uint64_t launched_ns, completed_ns; /* CLOCK_MONOTONIC; when the launch began, when somebody saw that it was done */
} trtx_completion;

/* ---- hubs: where completions go; one for each event loop or foreign caller ----
 *
 * A hub's queue gets the completion of every slot that was submitted with it, armed or not, in order of completion: a loop
 * that spins takes them from there without a system call. Its fd becomes readable only for a slot that is armed, and stays
 * so until the queue is empty. A completion leaves the queue by being taken, or when its slot is released or submitted
 * again: then its token is not heard of any more. The queue is made of the slots themselves; it cannot overflow. */

/* *fd is an eventfd; owned by the hub, and closed with its last reference (slots have one each: see submit). */
CUresult trtx_hub_create(trtx_hub **hub, int *fd);
void trtx_hub_retain(trtx_hub *hub);
void trtx_hub_release(trtx_hub *hub);
/* Take up to `room` completions, oldest first; makes the fd unreadable when none is left. Returns how many. Never blocks. */
size_t trtx_hub_take(trtx_hub *hub, trtx_completion *completions, size_t room);

/* ---- the watcher: one thread, started at the first request for it, asleep while nobody waits ----
 *
 * It may serve any number of lanes, of several devices and drivers. All signals are blocked on its thread. */

CUresult trtx_watcher_create(trtx_watcher **watcher);
/* Stops and joins the thread. Its lanes must have been destroyed. NULL is fine. */
void trtx_watcher_destroy(trtx_watcher *watcher);

/* ---- lanes ---- */

/* `api`, `stream`, `context` and `watcher` are borrowed and must outlive the lane. 1 to 1024 slots. */
CUresult trtx_lane_create(trtx_lane **lane, const trtx_cuda_api *api, CUcontext context, CUstream stream, size_t slots,
                          trtx_watcher *watcher, trtx_wake_mode mode);
/* CUDA_ERROR_NOT_READY while a slot is in flight (it looks first); then nothing happened. NULL is fine. */
CUresult trtx_lane_destroy(trtx_lane *lane);

/* Take a free slot, lowest number first. CUDA_ERROR_NOT_READY if none is free (it polls before it says so). */
CUresult trtx_lane_acquire(trtx_lane *lane, size_t *slot);
/* As acquire, among the slots whose bits are set: bit i % 64 of slots[i / 64], for `words` words; NULL: any.
 * look: poll if none is free. */
CUresult trtx_lane_acquire_among(trtx_lane *lane, const uint64_t *slots, size_t words, bool look, size_t *slot);
/* Give a held or done slot back. A slot that is in flight comes back by itself when it completes, its result dropped and its
 * hub not told; the watcher sees to that. CUDA_ERROR_INVALID_VALUE if it was given back already. */
CUresult trtx_lane_release(trtx_lane *lane, size_t slot);

/* Launch `exec` for a held or done slot and record the slot's event. On failure the slot is held as before and nothing is
 * in flight for it. Should the graph run but its event not be recorded, the slot is in flight until the stream is idle, and
 * then done with that error. A sticky error, here or
 * at completion, makes the lane dead: everything in flight completes with it, and every later submit returns it.
 * hub: NULL, or gets the completion; kept alive until the slot is released or submitted again. */
CUresult trtx_lane_submit(trtx_lane *lane, size_t slot, CUgraphExec exec, uint64_t token, trtx_hub *hub);

/* As submit, for work that the caller enqueued on the stream itself: only records the event. */
CUresult trtx_lane_mark(trtx_lane *lane, size_t slot, uint64_t token, trtx_hub *hub);

/* Look at everything in flight on this lane, in order, and complete what is done; returns how many are still in flight.
 * Never blocks: if another thread is looking, that one completes what is done, and this call just returns. */
size_t trtx_lane_poll(trtx_lane *lane);

/* State of one slot, without looking at the GPU; takes no lock. completion (may be NULL) is written if the slot is done. */
trtx_slot_state trtx_lane_slot(trtx_lane *lane, size_t slot, trtx_completion *completion);

/* Poll until the slot is no longer in flight (or was submitted again) or spin_ns have passed; 0 looks once. Returns the slot's state: done or in
 * flight, or what else it was when nothing was submitted for it. */
trtx_slot_state trtx_lane_spin(trtx_lane *lane, size_t slot, uint64_t spin_ns, trtx_completion *completion);

/* Block until what was submitted for the slot is no longer in flight: spins for spin_ns, then sleeps with the watcher's help.
 * timeout_ns 0 waits for ever. Returns as trtx_lane_spin. If another thread has submitted the slot again meanwhile, the awaited
 * submission is over and its completion is gone: the state is that of the slot as it is then, TRTX_SLOT_IN_FLIGHT as a rule,
 * and *completion is left as it was. */
trtx_slot_state trtx_lane_wait(trtx_lane *lane, size_t slot, uint64_t spin_ns, uint64_t timeout_ns,
                               trtx_completion *completion);

/* From now on the watcher polls for this slot, and its completion makes the hub's fd readable; at once if it is done and
 * still in the hub's queue. Needed only where nobody spins for it. CUDA_ERROR_INVALID_VALUE if the slot is neither in flight nor
 * done. Completion and arming may race: one of the two makes the fd readable. */
CUresult trtx_lane_arm(trtx_lane *lane, size_t slot);

/* What callers want to know at every request; takes no lock. Work completes in order: what was submitted when this said
 * `submitted` = n is done when it says `completed` >= n. */
typedef struct trtx_lane_view {
    uint64_t submitted, completed; /* the difference is in flight */
    uint64_t expected_ns;          /* as in the statistics */
    CUresult dead;
} trtx_lane_view;

trtx_lane_view trtx_lane_glance(const trtx_lane *lane);

typedef struct trtx_lane_statistics {
    uint64_t submitted;        /* launches that succeeded */
    uint64_t completed;        /* of these: no longer in flight */
    uint64_t failed, dropped;  /* of the completed: with an error; given back before they were done */
    size_t in_flight, held;    /* slots; held counts the done ones too */
    CUresult dead;             /* the sticky error that ended the lane, 0 while it lives */
    uint64_t expected_ns;      /* moving average of one request's time on the stream: from its launch, or from the completion
                                  before it where that was later, to its completion; the watcher keeps one for each graph */
    uint64_t launch_ns_total;  /* spent inside cuGraphLaunch and cuEventRecord */
    uint64_t polls;            /* times that somebody asked the driver */
} trtx_lane_statistics;

void trtx_lane_get_statistics(trtx_lane *lane, trtx_lane_statistics *statistics);

#ifdef __cplusplus
}
#endif
#endif
