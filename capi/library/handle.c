/* Handles: numbers that name an entry of a table and one life of it. A handle that was destroyed names a life that is over.
 *
 * An entry's state is one word: the generation, a bit that it is being retired, and how many calls have its object. Calls on
 * any thread only change that word; the mutex is for making and freeing. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>

#include "core.h"

enum { CHUNK = 1024, CHUNKS = 1024 };

#define RETIRING (UINT64_C(1) << 31)
#define USERS (RETIRING - 1)
#define generation_of(state) ((state) >> 32)

typedef struct entry {
    _Atomic uint64_t state;
    trtxpy_head *object;
    trtxpy_kind kind;
    uint32_t next_free;
} entry;

static _Atomic(entry *) chunks[CHUNKS];
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
static uint32_t made, first_free = UINT32_MAX;
static atomic_size_t live;

/* generation 32, index 27, kind 4, 1: odd, so that no address is a handle. */
static uintptr_t encode(uint64_t generation, uint32_t index, trtxpy_kind kind) {
    return (uintptr_t)(generation << 32 | (uint64_t)index << 5 | (uint64_t)kind << 1 | 1);
}

static entry *find(uintptr_t handle, trtxpy_kind kind) {
    uint64_t value = handle;
    uint32_t index = (uint32_t)value >> 5;
    /* Generations that live are odd: retiring one makes it even, making the next one odd again. */
    if (!(value & 1) || !(value >> 32 & 1) || (trtxpy_kind)(value >> 1 & 15) != kind || index >= (uint32_t)CHUNK * CHUNKS)
        return NULL;
    entry *chunk = atomic_load_explicit(&chunks[index / CHUNK], memory_order_acquire);
    return chunk ? &chunk[index % CHUNK] : NULL;
}

static const char *kind_name(trtxpy_kind kind) {
    static const char *const names[] = {"", "context", "graph", "tensor", "request", "queue", "results"};
    return names[kind];
}

static void refuse(const void *handle, trtxpy_kind kind, const char *what) {
    if (!handle)
        trtxpy_fail(TRTXPY_INVALID_HANDLE, "%s is NULL; expected a %s", what, kind_name(kind));
    else
        trtxpy_fail(TRTXPY_INVALID_HANDLE, "%s (%p) is no open %s: it was destroyed, or is something else", what, handle,
                    kind_name(kind));
}

uintptr_t trtxpy_handle_make(trtxpy_kind kind, trtxpy_head *head) {
    pthread_mutex_lock(&making);
    uint32_t index = first_free;
    entry *slot = NULL;
    if (index != UINT32_MAX) {
        slot = &atomic_load(&chunks[index / CHUNK])[index % CHUNK];
        first_free = slot->next_free;
    } else if (made < (uint32_t)CHUNK * CHUNKS) {
        index = made;
        entry *chunk = atomic_load(&chunks[index / CHUNK]);
        if (!chunk && (chunk = calloc(CHUNK, sizeof *chunk))) atomic_store_explicit(&chunks[index / CHUNK], chunk, memory_order_release);
        if (chunk) slot = &chunk[index % CHUNK], made++;
    }
    uintptr_t handle = 0;
    if (slot) {
        uint64_t generation = (generation_of(atomic_load(&slot->state)) + 1) & UINT32_MAX;
        slot->object = head;
        slot->kind = kind;
        head->handle = handle = encode(generation, index, kind);
        atomic_fetch_add(&live, 1);
        atomic_store_explicit(&slot->state, generation << 32, memory_order_release);
    }
    pthread_mutex_unlock(&making);
    if (!handle) trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no %s: %zu handles are open and there is no room for more", kind_name(kind),
                             atomic_load(&live));
    return handle;
}

void *trtxpy_handle_acquire(const void *handle, trtxpy_kind kind, const char *what) {
    entry *slot = find((uintptr_t)handle, kind);
    while (slot) {
        uint64_t state = atomic_load_explicit(&slot->state, memory_order_acquire);
        if (generation_of(state) != (uint64_t)(uintptr_t)handle >> 32) break;
        if (state & RETIRING) { /* decided in a moment, for or against */
            sched_yield();
            continue;
        }
        if (!atomic_compare_exchange_weak_explicit(&slot->state, &state, state + 1, memory_order_acquire, memory_order_relaxed))
            continue;
        if (slot->kind == kind) return slot->object;
        atomic_fetch_sub_explicit(&slot->state, 1, memory_order_release);
        break;
    }
    refuse(handle, kind, what);
    return NULL;
}

static entry *own(const trtxpy_head *head) {
    uint32_t index = (uint32_t)head->handle >> 5;
    return &atomic_load_explicit(&chunks[index / CHUNK], memory_order_acquire)[index % CHUNK];
}

void trtxpy_handle_keep(trtxpy_head *head) {
    atomic_fetch_add_explicit(&own(head)->state, 1, memory_order_relaxed);
}

void trtxpy_handle_release(trtxpy_head *head) {
    atomic_fetch_sub_explicit(&own(head)->state, 1, memory_order_release);
}

void *trtxpy_handle_retire(const void *handle, trtxpy_kind kind, const char *what, trtxpy_status *status) {
    *status = TRTXPY_OK;
    if (!handle) return NULL;
    entry *slot = find((uintptr_t)handle, kind);
    while (slot) {
        uint64_t state = atomic_load_explicit(&slot->state, memory_order_acquire);
        if (generation_of(state) != (uint64_t)(uintptr_t)handle >> 32 || slot->kind != kind) break;
        if (state & RETIRING) {
            sched_yield();
            continue;
        }
        if (state & USERS) {
            *status = trtxpy_fail(TRTXPY_BORROWED, "%s: %llu calls or requests in flight use this %s; wait for them", what,
                                  (unsigned long long)(state & USERS), kind_name(kind));
            return NULL;
        }
        if (!atomic_compare_exchange_weak_explicit(&slot->state, &state, state | RETIRING, memory_order_acq_rel,
                                                   memory_order_relaxed))
            continue;
        trtxpy_head *head = slot->object;
        size_t children = atomic_load(&head->children);
        if (children) {
            atomic_store_explicit(&slot->state, state, memory_order_release);
            *status = trtxpy_fail(TRTXPY_BORROWED, "%s: this %s has %zu open children; destroy them first", what, kind_name(kind),
                                  children);
            return NULL;
        }
        pthread_mutex_lock(&making);
        slot->object = NULL;
        slot->next_free = first_free;
        first_free = (uint32_t)(uintptr_t)handle >> 5;
        atomic_fetch_sub(&live, 1);
        /* Nobody's generation until it is made again. */
        atomic_store_explicit(&slot->state, ((generation_of(state) + 1) & UINT32_MAX) << 32, memory_order_release);
        pthread_mutex_unlock(&making);
        return head;
    }
    refuse(handle, kind, what);
    *status = TRTXPY_INVALID_HANDLE;
    return NULL;
}

size_t trtxpy_handle_count(void) {
    return atomic_load(&live);
}
