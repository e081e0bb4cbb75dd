/* Lanes, the second half: noticing that work is done, and waiting for it. */
#define _GNU_SOURCE
#include <time.h>

#include "lane_internal.h"

/* Hubs whose fd must be written once the locks are released; the list holds a reference to each. */
typedef struct tells {
    size_t count;
    trtx_hub *hubs[8];
} tells;

static void tell(tells *list, trtx_hub *hub) {
    if (list->count == sizeof list->hubs / sizeof *list->hubs) {
        trtx_hub_signal(hub);
        return;
    }
    trtx_hub_retain(hub);
    list->hubs[list->count++] = hub;
}

static void tell_all(tells *list) {
    for (size_t i = 0; i < list->count; i++) {
        trtx_hub_signal(list->hubs[i]);
        trtx_hub_release(list->hubs[i]);
    }
}

static void learn(uint64_t *average, uint64_t sample) {
    *average = *average ? *average - *average / 8 + sample / 8 : sample;
    if (*average == 0) *average = 1; /* 0 means unknown */
}

static size_t in_flight(trtx_lane *lane) {
    uint64_t head = atomic_load_explicit(&lane->head, memory_order_acquire);
    return (size_t)(atomic_load_explicit(&lane->tail, memory_order_acquire) - head);
}

/* Under lane->state: the oldest in flight is done. first: this look has completed nothing yet. */
static void complete_head(trtx_lane *lane, CUresult status, uint64_t now, bool first, tells *list) {
    uint64_t head = atomic_load_explicit(&lane->head, memory_order_relaxed);
    trtx_slot *slot = &lane->slots[lane->fifo[head % lane->slot_count]];
    uint64_t start = slot->completion.launched_ns;
    if (start < lane->last_completed_ns) start = lane->last_completed_ns;
    if (status == CUDA_SUCCESS && first) {
        /* It ended between the last look that found it unfinished and now. Taking `now` would let a sleeper that wakes too
         * late learn to sleep longer still; the middle makes it wake earlier until it finds the truth. */
        uint64_t unready = atomic_load_explicit(&lane->not_ready_ns, memory_order_relaxed);
        if (unready < start) unready = start;
        uint64_t sample = now > unready ? unready - start + (now - unready) / 2 : now > start ? now - start : 0;
        learn(&lane->paces[slot->pace].expected_ns, sample);
        uint64_t expected = atomic_load_explicit(&lane->expected_ns, memory_order_relaxed);
        learn(&expected, sample);
        atomic_store_explicit(&lane->expected_ns, expected, memory_order_relaxed);
    }
    lane->last_completed_ns = now;
    lane->statistics.completed++;
    if (status != CUDA_SUCCESS) lane->statistics.failed++;
    slot->completion.status = status;
    slot->completion.completed_ns = now;
    atomic_store_explicit(&lane->head, head + 1, memory_order_release);
    atomic_store_explicit(&slot->state, TRTX_SLOT_DONE, memory_order_release);
    trtx_slot_update_watch(lane, slot);
    if (slot->waiters) pthread_cond_broadcast(&slot->done);
    if (slot->dropped) {
        lane->statistics.dropped++;
        trtx_slot_recycle(lane, slot);
    } else if (slot->hub) {
        slot->node.completion = slot->completion;
        if (trtx_hub_post(slot->hub, &slot->node, slot->armed)) tell(list, slot->hub);
    }
}

bool trtx_is_sticky(CUresult error) {
    switch (error) {
    case 46:  /* DEVICE_UNAVAILABLE */
    case 214: /* ECC_UNCORRECTABLE */
    case 220: /* NVLINK_UNCORRECTABLE */
    case 226: /* CONTAINED */
    case 700: /* ILLEGAL_ADDRESS */
    case 702: /* LAUNCH_TIMEOUT */
    case 709: /* CONTEXT_IS_DESTROYED */
    case 710: /* ASSERT */
    case 714: /* HARDWARE_STACK_ERROR */
    case 715: /* ILLEGAL_INSTRUCTION */
    case 716: /* MISALIGNED_ADDRESS */
    case 717: /* INVALID_ADDRESS_SPACE */
    case 718: /* INVALID_PC */
    case 719: /* LAUNCH_FAILED */
    case 721: /* TENSOR_MEMORY_LEAK */
    case 810: /* MPS_CLIENT_TERMINATED */
    case 911: /* EXTERNAL_DEVICE */
    case 999: /* UNKNOWN */
        return true;
    default:
        return false;
    }
}

/* The query was refused because some thread captures a graph: that says nothing about the work. (907 is about the event
 * itself, and final.) */
static bool is_refused_by_capture(CUresult error) {
    return error >= CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED && error <= CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD &&
           error != CUDA_ERROR_CAPTURED_EVENT;
}

void trtx_lane_die(trtx_lane *lane, CUresult cause) {
    tells list = {0};
    int alive = 0;
    atomic_compare_exchange_strong(&lane->dead, &alive, cause);
    uint64_t now = trtx_now_ns();
    pthread_mutex_lock(&lane->state);
    while (in_flight(lane)) complete_head(lane, atomic_load(&lane->dead), now, false, &list);
    pthread_mutex_unlock(&lane->state);
    tell_all(&list);
}

/* Under lane->looking: is the slot's work over, and how did it end? Never says that it is over when that is not known. */
static CUresult ask(trtx_lane *lane, trtx_slot *slot) {
    if (slot->unmarked != CUDA_SUCCESS) {
        CUresult idle = lane->api->cuStreamQuery(lane->stream);
        return idle == CUDA_SUCCESS ? slot->unmarked : trtx_is_sticky(idle) ? idle : CUDA_ERROR_NOT_READY;
    }
    CUresult status = lane->api->cuEventQuery(slot->event);
    if (status == CUDA_SUCCESS || status == CUDA_ERROR_NOT_READY || trtx_is_sticky(status) || is_refused_by_capture(status))
        return status;
    /* A query that failed says nothing about the work. An event that gives the same answer again means it, if it is one about
     * values; anything else must wait until the stream is idle. */
    if (slot->doubt != status) {
        slot->doubt = status;
        return CUDA_ERROR_NOT_READY;
    }
    if (status == CUDA_ERROR_INVALID_VALUE) return status;
    CUresult idle = lane->api->cuStreamQuery(lane->stream);
    return idle == CUDA_ERROR_NOT_READY || is_refused_by_capture(idle) ? CUDA_ERROR_NOT_READY : trtx_is_sticky(idle) ? idle : status;
}

size_t trtx_lane_look(trtx_lane *lane, size_t most) {
    size_t left = in_flight(lane);
    if (left == 0) return 0;
    /* Somebody else looks: what is done will be seen by him, or by the next look of whoever still waits. */
    if (atomic_flag_test_and_set_explicit(&lane->looking, memory_order_acquire)) return left;
    atomic_fetch_add_explicit(&lane->polls, 1, memory_order_relaxed);
    tells list = {0};
    CUresult cause = CUDA_SUCCESS;
    for (size_t done = 0; done < most && in_flight(lane); done++) {
        bool first = done == 0;
        uint64_t head = atomic_load_explicit(&lane->head, memory_order_acquire);
        CUresult status = ask(lane, &lane->slots[lane->fifo[head % lane->slot_count]]);
        uint64_t now = trtx_now_ns();
        if (status == CUDA_ERROR_NOT_READY || is_refused_by_capture(status)) {
            atomic_store_explicit(&lane->not_ready_ns, now, memory_order_relaxed);
            break;
        }
        if (trtx_is_sticky(status)) {
            cause = status;
            break;
        }
        pthread_mutex_lock(&lane->state);
        /* Unless a submit has met the end of the device meanwhile, and completed it. */
        if (head == atomic_load_explicit(&lane->head, memory_order_relaxed))
            complete_head(lane, status, now, first, &list);
        pthread_mutex_unlock(&lane->state);
    }
    atomic_flag_clear_explicit(&lane->looking, memory_order_release);
    if (cause != CUDA_SUCCESS) trtx_lane_die(lane, cause);
    tell_all(&list);
    return in_flight(lane);
}

/* A spin may be an event loop's: a query of each of many finished slots would hold it. The others are seen by the next. */
enum { looks_at_once = 12 };

static bool inert(const trtx_lane *lane) { return lane->fork_generation != trtx_fork_generation(); }

size_t trtx_lane_poll(trtx_lane *lane) {
    size_t left = in_flight(lane);
    if (left == 0 || inert(lane)) return left;
    trtx_scope scope = {0};
    trtx_scope_enter(&scope, lane->api, lane->context); /* if it cannot, the query says what is wrong */
    left = trtx_lane_look(lane, SIZE_MAX);
    trtx_scope_leave(&scope);
    return left;
}

trtx_slot_state trtx_lane_slot(trtx_lane *lane, size_t index, trtx_completion *completion) {
    if (index >= lane->slot_count) return TRTX_SLOT_FREE;
    trtx_slot *slot = &lane->slots[index];
    trtx_slot_state state = (trtx_slot_state)atomic_load_explicit(&slot->state, memory_order_acquire);
    /* Once it is done nobody writes it until the slot is submitted again, which is the caller's own to do. */
    if (state == TRTX_SLOT_DONE && completion) *completion = slot->completion;
    return state;
}

static uint64_t after(uint64_t now, uint64_t duration) {
    return duration < TRTX_NEVER - now ? now + duration : TRTX_NEVER;
}

/* Whether the submission that made `turn` is still in flight: the next one of the same slot is none of the waiter's. */
static bool under_way(const trtx_slot *slot, uint64_t turn) {
    return atomic_load_explicit(&slot->state, memory_order_acquire) == TRTX_SLOT_IN_FLIGHT &&
           atomic_load_explicit(&slot->turn, memory_order_relaxed) == turn;
}

static uint64_t turn_of(const trtx_slot *slot) { return atomic_load_explicit(&slot->turn, memory_order_relaxed); }

/* In flight, as the caller has seen. */
static void spin(trtx_lane *lane, const trtx_slot *slot, uint64_t turn, uint64_t spin_ns) {
    trtx_scope scope = {0};
    trtx_scope_enter(&scope, lane->api, lane->context);
    uint64_t until = spin_ns ? after(trtx_now_ns(), spin_ns) : 0;
    for (;;) {
        trtx_lane_look(lane, looks_at_once);
        if (!under_way(slot, turn) || until == 0 || trtx_now_ns() >= until) break;
        trtx_pause();
    }
    trtx_scope_leave(&scope);
}

trtx_slot_state trtx_lane_spin(trtx_lane *lane, size_t index, uint64_t spin_ns, trtx_completion *completion) {
    trtx_slot_state state = trtx_lane_slot(lane, index, completion);
    if (state != TRTX_SLOT_IN_FLIGHT || inert(lane)) return state;
    spin(lane, &lane->slots[index], turn_of(&lane->slots[index]), spin_ns);
    return trtx_lane_slot(lane, index, completion);
}

/* Wait without a watcher, because its thread could not be started. */
static void look_and_sleep(trtx_lane *lane, const trtx_slot *slot, uint64_t turn, uint64_t until) {
    const struct timespec nap = {.tv_nsec = 50000};
    while (trtx_lane_poll(lane), under_way(slot, turn) && trtx_now_ns() < until) nanosleep(&nap, NULL);
}

/* Sleep with the watcher's help. */
static void sleep_until_done(trtx_lane *lane, trtx_slot *slot, uint64_t turn, uint64_t until) {
    pthread_mutex_lock(&lane->state);
    slot->waiters++;
    bool request = trtx_slot_update_watch(lane, slot);
    pthread_mutex_unlock(&lane->state);
    if (request && trtx_watcher_request(lane->watcher, lane) != CUDA_SUCCESS) look_and_sleep(lane, slot, turn, until);
    pthread_mutex_lock(&lane->state);
    while (under_way(slot, turn) && trtx_now_ns() < until) trtx_wait_until(&slot->done, &lane->state, until);
    slot->waiters--;
    trtx_slot_update_watch(lane, slot);
    pthread_mutex_unlock(&lane->state);
}

trtx_slot_state trtx_lane_wait(trtx_lane *lane, size_t index, uint64_t spin_ns, uint64_t timeout_ns,
                               trtx_completion *completion) {
    trtx_slot_state state = trtx_lane_slot(lane, index, NULL);
    if (index >= lane->slot_count || inert(lane)) return trtx_lane_slot(lane, index, completion);
    trtx_slot *slot = &lane->slots[index];
    uint64_t turn = turn_of(slot); /* after the state: not older than the submission that was seen there */
    uint64_t until = timeout_ns ? after(trtx_now_ns(), timeout_ns) : TRTX_NEVER;
    if (timeout_ns && spin_ns > timeout_ns) spin_ns = timeout_ns;
    if (state == TRTX_SLOT_IN_FLIGHT) spin(lane, slot, turn, spin_ns);
    if (under_way(slot, turn)) sleep_until_done(lane, slot, turn, until);
    /* Under the lock: whoever submits the slot again at this moment writes the completion. */
    pthread_mutex_lock(&lane->state);
    bool gone = turn_of(slot) != turn;
    state = trtx_lane_slot(lane, index, gone ? NULL : completion);
    pthread_mutex_unlock(&lane->state);
    return state;
}

CUresult trtx_lane_arm(trtx_lane *lane, size_t index) {
    if (index >= lane->slot_count) return CUDA_ERROR_INVALID_VALUE;
    if (inert(lane)) return CUDA_ERROR_NOT_INITIALIZED;
    trtx_slot *slot = &lane->slots[index];
    tells list = {0};
    bool request = false;
    CUresult status = CUDA_SUCCESS;
    pthread_mutex_lock(&lane->state);
    int state = atomic_load_explicit(&slot->state, memory_order_relaxed);
    if (state == TRTX_SLOT_IN_FLIGHT && !slot->dropped) {
        slot->armed = true; /* completing takes the same lock: it sees this, or we see that it is done */
        request = trtx_slot_update_watch(lane, slot);
    } else if (state == TRTX_SLOT_DONE) {
        if (slot->hub && trtx_hub_want(slot->hub, &slot->node)) tell(&list, slot->hub);
    } else {
        status = CUDA_ERROR_INVALID_VALUE;
    }
    pthread_mutex_unlock(&lane->state);
    tell_all(&list);
    return request ? trtx_watcher_request(lane->watcher, lane) : status;
}
