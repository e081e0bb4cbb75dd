/* Lanes, the first half: slots, and getting work onto the stream. */
#define _GNU_SOURCE
#include <stdlib.h>

#include "lane_internal.h"

static void free_lane(trtx_lane *lane, size_t slots) {
    for (size_t i = 0; i < slots; i++) {
        if (lane->slots[i].event) lane->api->cuEventDestroy(lane->slots[i].event);
        pthread_cond_destroy(&lane->slots[i].done);
    }
    pthread_mutex_destroy(&lane->submit);
    pthread_mutex_destroy(&lane->state);
    free(lane->fifo);
    free(lane);
}

CUresult trtx_lane_create(trtx_lane **result, const trtx_cuda_api *api, CUcontext context, CUstream stream, size_t slots,
                          trtx_watcher *watcher, trtx_wake_mode mode) {
    if (!result || !api || !context || !watcher || slots == 0 || slots > TRTX_MAX_SLOTS ||
        (unsigned)mode > TRTX_WAKE_EFFICIENT)
        return CUDA_ERROR_INVALID_VALUE;
    trtx_lane *lane = calloc(1, sizeof *lane + slots * sizeof *lane->slots);
    uint16_t *fifo = calloc(slots, sizeof *fifo);
    if (!lane || !fifo) {
        free(lane);
        free(fifo);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    lane->api = api;
    lane->context = context;
    lane->stream = stream;
    lane->watcher = watcher;
    lane->mode = mode;
    lane->fork_generation = trtx_fork_generation();
    lane->slot_count = lane->free_count = slots;
    lane->fifo = fifo;
    atomic_flag_clear(&lane->looking);
    CUresult status = CUDA_SUCCESS;
    if (trtx_short_mutex(&lane->submit) || trtx_short_mutex(&lane->state)) status = CUDA_ERROR_OPERATING_SYSTEM;
    trtx_scope scope = {0};
    if (status == CUDA_SUCCESS) status = trtx_scope_enter(&scope, api, context);
    size_t made = 0;
    while (status == CUDA_SUCCESS && made < slots) {
        if (trtx_monotonic_condition(&lane->slots[made].done)) {
            status = CUDA_ERROR_OPERATING_SYSTEM;
            break;
        }
        lane->free_slots[made / 64] |= UINT64_C(1) << made % 64;
        status = api->cuEventCreate(&lane->slots[made].event, CU_EVENT_DISABLE_TIMING);
        if (status != CUDA_SUCCESS) lane->slots[made].event = NULL;
        made++;
    }
    if (status != CUDA_SUCCESS)
        free_lane(lane, made);
    else
        *result = lane;
    trtx_scope_leave(&scope);
    return status;
}

CUresult trtx_lane_destroy(trtx_lane *lane) {
    /* In a forked child nothing can be ended: the memory is leaked, the parent's objects are untouched. */
    if (!lane || lane->fork_generation != trtx_fork_generation()) return CUDA_SUCCESS;
    size_t busy = trtx_lane_poll(lane);
    pthread_mutex_lock(&lane->state);
    busy += lane->launching;
    pthread_mutex_unlock(&lane->state);
    if (busy) return CUDA_ERROR_NOT_READY;
    trtx_watcher_forget(lane->watcher, lane);
    pthread_mutex_lock(&lane->state);
    for (size_t i = 0; i < lane->slot_count; i++)
        if (lane->slots[i].state != TRTX_SLOT_FREE) trtx_slot_recycle(lane, &lane->slots[i]);
    pthread_mutex_unlock(&lane->state);
    trtx_scope scope = {0};
    const trtx_cuda_api *api = lane->api;
    trtx_scope_enter(&scope, api, lane->context);
    free_lane(lane, lane->slot_count);
    trtx_scope_leave(&scope);
    return CUDA_SUCCESS;
}

bool trtx_slot_update_watch(trtx_lane *lane, trtx_slot *slot) {
    bool watched = atomic_load_explicit(&slot->state, memory_order_relaxed) == TRTX_SLOT_IN_FLIGHT &&
                   (slot->armed || slot->dropped || slot->waiters > 0);
    if (watched == slot->watched) return false;
    slot->watched = watched;
    if (watched)
        atomic_fetch_add(&lane->watched, 1);
    else
        atomic_fetch_sub(&lane->watched, 1);
    return watched;
}

/* Under lane->state: what the slot last did is history. */
static void forget_completion(trtx_slot *slot) {
    if (slot->hub) {
        trtx_hub_withdraw(slot->hub, &slot->node);
        trtx_hub_release(slot->hub);
        slot->hub = NULL;
    }
    slot->armed = slot->dropped = false;
}

void trtx_slot_recycle(trtx_lane *lane, trtx_slot *slot) {
    size_t index = (size_t)(slot - lane->slots);
    forget_completion(slot);
    atomic_store_explicit(&slot->state, TRTX_SLOT_FREE, memory_order_release);
    lane->free_slots[index / 64] |= UINT64_C(1) << index % 64;
    lane->free_count++;
}

CUresult trtx_lane_acquire_among(trtx_lane *lane, const uint64_t *slots, size_t words, bool look, size_t *result) {
    if (!lane || !result) return CUDA_ERROR_INVALID_VALUE;
    if (words > TRTX_MAX_SLOTS / 64) words = TRTX_MAX_SLOTS / 64;
    if (lane->fork_generation != trtx_fork_generation()) return CUDA_ERROR_NOT_INITIALIZED;
    for (int attempt = 0; attempt < 1 + look; attempt++) {
        if (attempt) trtx_lane_poll(lane); /* a slot given back in flight may have come back */
        pthread_mutex_lock(&lane->state);
        for (size_t word = 0; lane->free_count && word < words; word++) {
            uint64_t wanted = lane->free_slots[word] & (slots ? slots[word] : UINT64_MAX);
            if (!wanted) continue;
            size_t index = word * 64 + (size_t)__builtin_ctzll(wanted);
            lane->free_slots[word] &= ~(wanted & -wanted);
            lane->free_count--;
            atomic_store_explicit(&lane->slots[index].state, TRTX_SLOT_HELD, memory_order_release);
            pthread_mutex_unlock(&lane->state);
            *result = index;
            return CUDA_SUCCESS;
        }
        pthread_mutex_unlock(&lane->state);
    }
    return CUDA_ERROR_NOT_READY;
}

CUresult trtx_lane_acquire(trtx_lane *lane, size_t *result) {
    return trtx_lane_acquire_among(lane, NULL, TRTX_MAX_SLOTS / 64, true, result);
}

CUresult trtx_lane_release(trtx_lane *lane, size_t index) {
    if (!lane || index >= lane->slot_count) return CUDA_ERROR_INVALID_VALUE;
    if (lane->fork_generation != trtx_fork_generation()) return CUDA_ERROR_NOT_INITIALIZED;
    trtx_slot *slot = &lane->slots[index];
    CUresult status = CUDA_SUCCESS;
    bool request = false;
    pthread_mutex_lock(&lane->state);
    int state = atomic_load_explicit(&slot->state, memory_order_relaxed);
    if (state == TRTX_SLOT_FREE || slot->dropped) {
        status = CUDA_ERROR_INVALID_VALUE;
    } else if (state == TRTX_SLOT_IN_FLIGHT) {
        slot->dropped = true;
        slot->armed = false;
        request = trtx_slot_update_watch(lane, slot);
    } else {
        trtx_slot_recycle(lane, slot);
    }
    pthread_mutex_unlock(&lane->state);
    /* Should the watcher's thread not start, the slot comes back with the next poll. */
    if (request) trtx_watcher_request(lane->watcher, lane);
    return status;
}

static unsigned pace_of(trtx_lane *lane, CUgraphExec exec) {
    unsigned index = (unsigned)(((uintptr_t)exec * UINT64_C(0x9e3779b97f4a7c15)) >> 58);
    if (lane->paces[index].exec != exec) lane->paces[index] = (trtx_pace){.exec = exec};
    return index;
}

/* Under lane->state, before the driver is called: from here on the slot counts as in flight, so that a release from another
 * thread drops it instead of handing it out. */
static bool begin(trtx_lane *lane, trtx_slot *slot, CUgraphExec exec, uint64_t token, trtx_hub *hub) {
    int state = atomic_load_explicit(&slot->state, memory_order_relaxed);
    if (state != TRTX_SLOT_HELD && state != TRTX_SLOT_DONE) return false;
    forget_completion(slot);
    atomic_fetch_add_explicit(&slot->turn, 1, memory_order_relaxed);
    atomic_store_explicit(&slot->state, TRTX_SLOT_IN_FLIGHT, memory_order_release);
    if (hub) trtx_hub_retain(hub);
    slot->hub = hub;
    slot->pace = pace_of(lane, exec);
    slot->unmarked = slot->doubt = CUDA_SUCCESS;
    slot->completion = (trtx_completion){.token = token, .launched_ns = trtx_now_ns()};
    lane->launching++;
    return true;
}

/* Under lane->state, after the driver was called. */
static void end(trtx_lane *lane, trtx_slot *slot, CUresult status) {
    lane->launching--;
    lane->statistics.launch_ns_total += trtx_now_ns() - slot->completion.launched_ns;
    if (status == CUDA_SUCCESS) {
        uint64_t tail = atomic_load_explicit(&lane->tail, memory_order_relaxed);
        lane->fifo[tail % lane->slot_count] = (uint16_t)(slot - lane->slots);
        atomic_store_explicit(&lane->tail, tail + 1, memory_order_release);
        lane->statistics.submitted++;
        return;
    }
    bool dropped = slot->dropped;
    forget_completion(slot);
    atomic_store_explicit(&slot->state, TRTX_SLOT_HELD, memory_order_release);
    trtx_slot_update_watch(lane, slot);
    if (slot->waiters) pthread_cond_broadcast(&slot->done);
    if (dropped) trtx_slot_recycle(lane, slot);
}

static CUresult launch(trtx_lane *lane, trtx_slot *slot, CUgraphExec exec, const char **call) {
    *call = "cuGraphLaunch";
    CUresult status = exec ? lane->api->cuGraphLaunch(exec, lane->stream) : CUDA_SUCCESS;
    if (status != CUDA_SUCCESS) return status;
    *call = "cuEventRecord";
    status = lane->api->cuEventRecord(slot->event, lane->stream);
    if (status == CUDA_SUCCESS || trtx_is_sticky(status)) return status;
    /* The work runs and no event will tell its end. Waiting here could wait for somebody who waits for a lock of the
     * caller's: the slot is in flight until the whole stream is idle, and completes with this error. */
    slot->unmarked = status;
    return CUDA_SUCCESS;
}

static CUresult submit(trtx_lane *lane, size_t index, CUgraphExec exec, uint64_t token, trtx_hub *hub, const char **call) {
    *call = "";
    if (!lane || index >= lane->slot_count) return CUDA_ERROR_INVALID_VALUE;
    if (lane->fork_generation != trtx_fork_generation()) return CUDA_ERROR_NOT_INITIALIZED;
    trtx_slot *slot = &lane->slots[index];
    trtx_scope scope = {0};
    pthread_mutex_lock(&lane->submit);
    CUresult status = atomic_load(&lane->dead);
    if (status != CUDA_SUCCESS) {
        *call = "cuGraphLaunch"; /* what it would return */
    } else {
        status = trtx_scope_enter(&scope, lane->api, lane->context);
        if (status != CUDA_SUCCESS) *call = "cuCtxPushCurrent"; /* the only thing in there that can fail */
    }
    if (status == CUDA_SUCCESS) {
        pthread_mutex_lock(&lane->state);
        bool ours = begin(lane, slot, exec, token, hub);
        pthread_mutex_unlock(&lane->state);
        if (ours) {
            status = launch(lane, slot, exec, call);
            pthread_mutex_lock(&lane->state);
            end(lane, slot, status);
            pthread_mutex_unlock(&lane->state);
        } else {
            status = CUDA_ERROR_INVALID_VALUE;
        }
    }
    pthread_mutex_unlock(&lane->submit);
    /* A look that found the device dead during the launch did not find this slot in the fifo. */
    CUresult cause = trtx_is_sticky(status) ? status : atomic_load(&lane->dead);
    if (cause != CUDA_SUCCESS) trtx_lane_die(lane, cause);
    trtx_scope_leave(&scope);
    return status;
}

CUresult trtx_lane_submit_call(trtx_lane *lane, size_t slot, CUgraphExec exec, uint64_t token, trtx_hub *hub,
                               const char **call) {
    *call = "";
    return exec ? submit(lane, slot, exec, token, hub, call) : CUDA_ERROR_INVALID_VALUE;
}

CUresult trtx_lane_submit(trtx_lane *lane, size_t slot, CUgraphExec exec, uint64_t token, trtx_hub *hub) {
    const char *call;
    return trtx_lane_submit_call(lane, slot, exec, token, hub, &call);
}

CUresult trtx_lane_mark(trtx_lane *lane, size_t slot, uint64_t token, trtx_hub *hub) {
    const char *call;
    return submit(lane, slot, NULL, token, hub, &call);
}

trtx_lane_view trtx_lane_glance(const trtx_lane *lane) {
    trtx_lane_view view = {.dead = atomic_load_explicit(&lane->dead, memory_order_relaxed),
                           .expected_ns = atomic_load_explicit(&lane->expected_ns, memory_order_relaxed)};
    /* the head first: it never passes the tail */
    view.completed = atomic_load_explicit(&lane->head, memory_order_acquire);
    view.submitted = atomic_load_explicit(&lane->tail, memory_order_acquire);
    return view;
}

void trtx_lane_get_statistics(trtx_lane *lane, trtx_lane_statistics *statistics) {
    *statistics = (trtx_lane_statistics){0};
    if (lane->fork_generation != trtx_fork_generation()) return;
    pthread_mutex_lock(&lane->state);
    *statistics = lane->statistics;
    statistics->in_flight = (size_t)(atomic_load(&lane->tail) - atomic_load(&lane->head)) + lane->launching;
    statistics->held = lane->slot_count - lane->free_count - statistics->in_flight;
    pthread_mutex_unlock(&lane->state);
    statistics->dead = atomic_load(&lane->dead);
    statistics->expected_ns = atomic_load_explicit(&lane->expected_ns, memory_order_relaxed);
    statistics->polls = atomic_load_explicit(&lane->polls, memory_order_relaxed);
}
