/* What the mock knows beyond CUDA's own rules, for the code that plays TensorRT on it: which points of which streams are
 * ordered, what the application has seen complete, regions of memory that two kernels must not write at once, settings that
 * a captured kernel was made for, and kernels that had no result.
 *
 * A point in a stream is its slot and a number. Slots live as long as the process and their numbers only grow, so a point
 * stays meaningful when its stream is gone. Functions with a scope or a queue want the instance's lock.
 */
#include "mock_internal.h"

#include <stdio.h>

enum { MOCK_FAILURES = 64 };

/* ---- order ---- */

void mock_past_add(mock_past *past, mock_slot *place, uint64_t sequence) {
    unsigned free_entry = past->count;
    for (unsigned i = 0; i < past->count; i++) {
        if (past->at[i].place == place) {
            if (past->at[i].sequence < sequence)
                past->at[i].sequence = sequence;
            return;
        }
        /* what the application has seen complete needs no remembering */
        if (atomic_load(&past->at[i].place->observed) >= past->at[i].sequence)
            free_entry = i;
    }
    if (free_entry == MOCK_PAST)
        return; /* forgotten: at worst an order is not known */
    past->at[free_entry].place = place;
    past->at[free_entry].sequence = sequence;
    past->count += free_entry == past->count;
}

void mock_past_merge(mock_past *past, const mock_past *other) {
    for (unsigned i = 0; i < other->count; i++)
        mock_past_add(past, other->at[i].place, other->at[i].sequence);
}

static bool comes_after(const mock_queue *queue, const mock_slot *place, uint64_t sequence) {
    if (queue->slot == place)
        return true;
    for (unsigned i = 0; i < queue->past.count; i++)
        if (queue->past.at[i].place == place && queue->past.at[i].sequence >= sequence)
            return true;
    return false;
}

bool mock_is_ordered(const mock_queue *queue, const mock_slot *place, uint64_t sequence) {
    return atomic_load_explicit(&place->observed, memory_order_relaxed) >= sequence || comes_after(queue, place, sequence);
}

void mock_observe(mock_slot *place, uint64_t sequence) {
    uint64_t known = atomic_load_explicit(&place->observed, memory_order_relaxed);
    while (known < sequence && !atomic_compare_exchange_weak_explicit(&place->observed, &known, sequence,
                                                                      memory_order_relaxed, memory_order_relaxed)) {
    }
}

static mock_slot *place_of(trtx_mock_position position) { return (mock_slot *)position.place; }

int trtx_mock_is_reached(trtx_mock_position position) {
    return position.sequence == 0 || atomic_load(&place_of(position)->done) >= position.sequence;
}

int trtx_mock_is_observed(trtx_mock_position position) {
    return position.sequence == 0 || atomic_load(&place_of(position)->observed) >= position.sequence;
}

int trtx_mock_is_ordered_after(trtx_mock *mock, CUstream stream, trtx_mock_position position) {
    mock_scope scope = {.call = CALL_execute, .mock = mock, .device = mock_current_device()};
    CUresult code = CUDA_SUCCESS;
    if (trtx_mock_is_reached(position))
        return true;
    if (!scope.device || scope.device->mock != mock)
        return false;
    mock_lock(mock);
    const mock_queue *queue = mock_stream_of(&scope, stream, &code);
    bool ordered = queue && comes_after(queue, place_of(position), position.sequence);
    if (queue && !ordered && queue->blocking) {
        if (!queue->null_stream && queue->device->null_stream)
            ordered = comes_after(queue->device->null_stream, place_of(position), position.sequence);
        for (mock_queue *other = queue->device->queues; queue->null_stream && other && !ordered; other = other->next)
            ordered = other->blocking && comes_after(other, place_of(position), position.sequence);
    }
    mock_unlock(mock);
    return ordered;
}

void trtx_mock_await(trtx_mock *mock, trtx_mock_position position) {
    if (position.sequence == 0)
        return;
    if (!trtx_mock_is_reached(position)) {
        mock_lock(mock);
        /* an operation that is not reached keeps its queue, and with it the slot's object */
        if (!trtx_mock_is_reached(position))
            mock_queue_wait(atomic_load(&place_of(position)->object), position.sequence);
        mock_unlock(mock);
    }
    /* who has waited knows, also where there was nothing left to wait for */
    mock_observe(place_of(position), position.sequence);
}

int trtx_mock_capture_status(CUstream stream) {
    mock_slot *slot = mock_slot_find(stream, KIND_STREAM);
    trtx_mock *mock = slot ? atomic_load(&slot->mock) : NULL;
    int status = CU_STREAM_CAPTURE_STATUS_NONE;
    if (!mock || atomic_load(&slot->state) == 0)
        return status;
    mock_lock(mock);
    const mock_queue *queue = mock_slot_find(stream, KIND_STREAM) == slot ? atomic_load(&slot->object) : NULL;
    if (queue && queue->capture)
        status = queue->capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    mock_unlock(mock);
    return status;
}

/* ---- regions ---- */

struct trtx_mock_region {
    trtx_mock_region *next; /* of the instance */
    trtx_mock *mock;
    _Atomic int references;
    CUdeviceptr address;
    size_t bytes;
    bool shared;   /* overlaps another one */
    bool reported; /* once is enough */
    mock_slot *place; /* of the latest use, NULL before the first */
    uint64_t sequence;
    char user[MOCK_SITE];
};

static bool overlap(const trtx_mock_region *a, const trtx_mock_region *b) {
    return a->address < b->address + b->bytes && b->address < a->address + a->bytes;
}

static void find_shared(trtx_mock *mock) {
    for (trtx_mock_region *a = mock->regions; a; a = a->next) {
        a->shared = false;
        for (const trtx_mock_region *b = mock->regions; b; b = b->next)
            a->shared = a->shared || (a != b && overlap(a, b));
    }
}

trtx_mock_region *trtx_mock_region_create(trtx_mock *mock, CUdeviceptr address, size_t bytes, const char *user) {
    trtx_mock_region *region = calloc(1, sizeof *region);
    if (!region)
        return NULL;
    region->mock = mock;
    region->address = address;
    region->bytes = bytes;
    atomic_store(&region->references, 1);
    snprintf(region->user, sizeof region->user, "%s", user);
    mock_lock(mock);
    region->next = mock->regions;
    mock->regions = region;
    find_shared(mock);
    mock_unlock(mock);
    return region;
}

void mock_region_reference(trtx_mock_region *region) {
    if (region)
        atomic_fetch_add(&region->references, 1);
}

void trtx_mock_region_release(trtx_mock_region *region) {
    if (!region || atomic_fetch_sub(&region->references, 1) != 1)
        return;
    mock_lock(region->mock);
    trtx_mock_region **link = &region->mock->regions;
    while (*link != region)
        link = &(*link)->next;
    *link = region->next;
    find_shared(region->mock);
    mock_unlock(region->mock);
    free(region);
}

static void check_use(trtx_mock_region *region, trtx_mock_region *other, const mock_queue *queue) {
    if (!other->place || other->reported || mock_is_ordered(queue, other->place, other->sequence))
        return;
    other->reported = true;
    mock_text_add(&region->mock->damage, "%s and %s both write device memory at 0x%llx on streams that nothing orders: give "
                  "each its own memory, or let one stream wait for the other", other->user, region->user,
                  (unsigned long long)(region->address > other->address ? region->address : other->address));
}

void mock_region_use(trtx_mock_region *region, const mock_queue *queue, uint64_t sequence) {
    if (region->shared) {
        for (trtx_mock_region *other = region->mock->regions; other; other = other->next)
            if (overlap(region, other))
                check_use(region, other, queue);
    } else {
        check_use(region, region, queue);
    }
    region->place = queue->slot;
    region->sequence = sequence;
}

void mock_program_use(const mock_program *program, const mock_queue *queue, uint64_t sequence) {
    for (size_t i = 0; i < program->count; i++)
        if (program->nodes[i].launch.region)
            mock_region_use(program->nodes[i].launch.region, queue, sequence);
}

void mock_launch_drop(const mock_launch *launch) {
    if (launch->release)
        launch->release(launch->userdata);
    trtx_mock_region_release(launch->region);
}

/* ---- kernels without a result ---- */

void mock_failure_add(mock_queue *queue, uint64_t sequence, const char *why) {
    mock_failure *failure = calloc(1, sizeof *failure);
    if (!failure)
        return;
    failure->sequence = sequence;
    failure->taken = UINT64_MAX;
    snprintf(failure->why, sizeof failure->why, "%s", why);
    failure->next = queue->failures;
    queue->failures = failure;
    atomic_fetch_add(&queue->device->mock->failures, 1);
    unsigned kept = 0;
    for (mock_failure **link = &queue->failures; *link;) {
        mock_failure *old = *link;
        if (++kept > MOCK_FAILURES || (kept > MOCK_FAILURES / 4 && old->taken != UINT64_MAX)) {
            *link = old->next;
            free(old);
            atomic_fetch_sub(&queue->device->mock->failures, 1);
        } else {
            link = &old->next;
        }
    }
}

void mock_failures_clear(mock_queue *queue, uint64_t sequence) {
    for (mock_failure **link = &queue->failures; *link;) {
        mock_failure *failure = *link;
        if (failure->sequence <= sequence) {
            *link = failure->next;
            free(failure);
            atomic_fetch_sub(&queue->device->mock->failures, 1);
        } else {
            link = &failure->next;
        }
    }
}

CUresult mock_failure_of_event(const mock_scope *scope, const mock_event *event) {
    CUresult code = CUDA_SUCCESS;
    for (mock_failure *failure = event->queue->failures; failure; failure = failure->next) {
        if (failure->sequence > event->sequence || failure->taken < event->sequence)
            continue;
        failure->taken = event->sequence;
        memcpy(scope->mock->told, failure->why, sizeof scope->mock->told);
        code = mock_fail(scope, CUDA_ERROR_INVALID_VALUE, "%s", failure->why);
    }
    return code;
}

size_t trtx_mock_told(trtx_mock *mock, char *text, size_t length) {
    mock_lock(mock);
    size_t needed = strlen(mock->told);
    if (text && length)
        snprintf(text, length, "%s", mock->told);
    mock_unlock(mock);
    return needed;
}

CUresult mock_failure_of_stream(const mock_scope *scope, mock_queue *queue, bool clear) {
    CUresult code = CUDA_SUCCESS;
    for (const mock_failure *failure = queue->failures; failure; failure = failure->next)
        if (failure->taken == UINT64_MAX && failure->sequence <= queue->completed)
            code = mock_fail(scope, CUDA_ERROR_INVALID_VALUE, "%s", failure->why);
    if (clear)
        mock_failures_clear(queue, queue->completed);
    return code;
}
