/* Planned faults, call counts and the clock of one instance. Any thread may call anything here.
 *
 * Counting is one atomic addition; the plan is looked at, under its own lock, only while something is planned.
 */
#include "mock_internal.h"

#include <errno.h>
#include <time.h>

typedef struct planned {
    struct planned *next;
    mock_call call;
    uint64_t first, last; /* numbers of the calls it strikes; last UINT64_MAX for all later ones */
    int device;           /* -1: on any; else only calls on this one count, from 1 at the planning */
    uint64_t seen;        /* of those */
    CUresult error;
    uint64_t delay_ns;
    int lose_device; /* TRTX_MOCK_LOSE_PROCESS: all of them */
} planned;

struct mock_faults {
    pthread_mutex_t lock;
    planned *plan; /* in the order of planning */
    _Atomic int any;
    _Atomic uint64_t calls[CALL_COUNT];
};

static const char *const call_names[] = {
#define MOCK_NAME(name, symbol, parameters) #name,
    TRTX_CUDA_FUNCTIONS(MOCK_NAME)
#undef MOCK_NAME
    "trtx_mock_launch", "trtx_mock_reserve", "execute"
};

const char *mock_call_name(mock_call call) { return call_names[call]; }

static bool find_call(const char *name, mock_call *call) {
    for (int i = 0; name && i < CALL_COUNT; i++) {
        if (strcmp(call_names[i], name) == 0) {
            *call = (mock_call)i;
            return true;
        }
    }
    return false;
}

bool mock_is_sticky(CUresult code) {
    switch (code) {
    case 46: case 214: case 220: case 226: case 700: case 702: case 709: case 710: case 714: case 715: case 716: case 717:
    case 718: case 719: case 721: case 810: case 911: case 999:
        return true;
    default:
        return false;
    }
}

mock_faults *mock_faults_create(void) {
    mock_faults *faults = calloc(1, sizeof *faults);
    if (faults)
        pthread_mutex_init(&faults->lock, NULL);
    return faults;
}

static void forget_all(mock_faults *faults) {
    while (faults->plan) {
        planned *fault = faults->plan;
        faults->plan = fault->next;
        free(fault);
    }
    atomic_store(&faults->any, 0);
}

void mock_faults_destroy(mock_faults *faults) {
    if (!faults)
        return;
    forget_all(faults);
    pthread_mutex_destroy(&faults->lock);
    free(faults);
}

bool mock_faults_planned(const mock_faults *faults) { return atomic_load_explicit(&faults->any, memory_order_acquire) != 0; }

mock_outcome mock_faults_enter(mock_faults *faults, mock_call call, int device) {
    /* Sequentially consistent, as is the planning, which says so before it reads the count: a call that it does not count yet
     * is one that sees it. */
    mock_outcome outcome = {.number = atomic_fetch_add(&faults->calls[call], 1) + 1};
    if (!atomic_load(&faults->any))
        return outcome;
    pthread_mutex_lock(&faults->lock);
    for (planned *fault = faults->plan; fault; fault = fault->next) {
        if (fault->call != call || (fault->device >= 0 && fault->device != device))
            continue;
        uint64_t number = fault->device >= 0 ? ++fault->seen : outcome.number;
        if (number < fault->first || number > fault->last)
            continue;
        outcome.delay_ns += fault->delay_ns;
        outcome.lose_device = outcome.lose_device || fault->lose_device;
        outcome.lose_process = outcome.lose_process || fault->lose_device == TRTX_MOCK_LOSE_PROCESS;
        if (!outcome.error)
            outcome.error = fault->error ? fault->error : fault->lose_device ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&faults->lock);
    return outcome;
}

CUresult trtx_mock_inject(trtx_mock *mock, const char *call, uint64_t nth, uint64_t count, CUresult error,
                          uint64_t delay_ns, int lose_device) {
    return trtx_mock_inject_on(mock, -1, call, nth, count, error, delay_ns, lose_device);
}

CUresult trtx_mock_inject_on(trtx_mock *mock, int device, const char *call, uint64_t nth, uint64_t count, CUresult error,
                             uint64_t delay_ns, int lose_device) {
    planned *fault = calloc(1, sizeof *fault);
    if (!fault)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (nth == 0 || device >= mock->device_count || !find_call(call, &fault->call)) {
        free(fault);
        return CUDA_ERROR_INVALID_VALUE;
    }
    mock_faults *faults = mock->faults;
    fault->error = error;
    fault->delay_ns = delay_ns;
    fault->lose_device = lose_device;
    pthread_mutex_lock(&faults->lock);
    fault->device = device;
    atomic_store(&faults->any, 1);
    fault->first = device < 0 ? atomic_load(&faults->calls[fault->call]) + nth : nth;
    fault->last = count ? fault->first + count - 1 : UINT64_MAX;
    planned **end = &faults->plan;
    while (*end)
        end = &(*end)->next;
    *end = fault;
    pthread_mutex_unlock(&faults->lock);
    return CUDA_SUCCESS;
}

void trtx_mock_clear_faults(trtx_mock *mock) {
    pthread_mutex_lock(&mock->faults->lock);
    forget_all(mock->faults);
    pthread_mutex_unlock(&mock->faults->lock);
}

uint64_t trtx_mock_calls(trtx_mock *mock, const char *call) {
    mock_call found;
    return find_call(call, &found) ? atomic_load(&mock->faults->calls[found]) : 0;
}

const char *trtx_mock_call_name(size_t index) { return index < CALL_COUNT ? call_names[index] : NULL; }

uint64_t mock_now_ns(trtx_mock *mock) {
    if (mock->clock.now)
        return mock->clock.now(mock->clock.userdata);
    if (mock->time)
        return trtx_mock_time_now(mock->time);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t trtx_mock_now(trtx_mock *mock) { return mock_now_ns(mock); }

void mock_sleep(trtx_mock *mock, uint64_t ns) {
    if (ns == 0)
        return;
    if (mock->clock.now) {
        mock->clock.sleep(mock->clock.userdata, ns);
        return;
    }
    if (mock->time) {
        trtx_mock_time_advance(mock->time, ns);
        return;
    }
    void *token = mock->clock.unlock ? mock->clock.unlock() : NULL;
    uint64_t until = mock_now_ns(mock) + ns;
    struct timespec moment = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &moment, NULL) == EINTR) {
    }
    if (token)
        mock->clock.relock(token);
}

/* ---- virtual time ---- */

struct trtx_mock_time {
    _Atomic int references;
    _Atomic uint64_t ns;
};

trtx_mock_time *trtx_mock_time_create(uint64_t start_ns) {
    trtx_mock_time *time = calloc(1, sizeof *time);
    if (time) {
        atomic_store(&time->references, 1);
        atomic_store(&time->ns, start_ns);
    }
    return time;
}

void trtx_mock_time_release(trtx_mock_time *time) {
    if (time && atomic_fetch_sub(&time->references, 1) == 1)
        free(time);
}

uint64_t trtx_mock_time_now(const trtx_mock_time *time) { return atomic_load(&((trtx_mock_time *)(uintptr_t)time)->ns); }

void trtx_mock_time_advance(trtx_mock_time *time, uint64_t ns) { atomic_fetch_add(&time->ns, ns); }

void trtx_mock_set_time(trtx_mock *mock, trtx_mock_time *time, const trtx_mock_clock *clock) {
    if (time) {
        atomic_fetch_add(&time->references, 1);
        trtx_mock_time_release(mock->time);
        mock->time = time;
    }
    if (clock)
        mock->clock = *clock;
}

void trtx_mock_advance(trtx_mock *mock, uint64_t ns) {
    if (mock->time)
        trtx_mock_time_advance(mock->time, ns);
}
