/* Loading libcuda, and what the rest needs of the operating system. */
#define _GNU_SOURCE
#include "cuda_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "lane_internal.h"

/* RTLD_NOW: a library with holes must fail here, not in the middle of a request. RTLD_LOCAL: every symbol is taken from the
 * handle; RTLD_GLOBAL would put the driver's names in front of those of libraries loaded later (stubs and shims that wrap
 * libcuda rely on their own). RTLD_NODELETE: the driver runs threads, it must never be unmapped. */
bool trtx_cuda_api_open(const char *library, trtx_cuda_api *table, char *reason, size_t room) {
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!handle) {
        const char *error = dlerror();
        snprintf(reason, room, "no CUDA driver: %s", error ? error : library);
        return false;
    }
    void *address;
#define TRTX_LOAD(name, symbol, parameters)                                                                            \
    address = dlsym(handle, symbol);                                                                                   \
    if (!address) {                                                                                                    \
        snprintf(reason, room, "the CUDA driver %s has no symbol %s: it is too old or not a driver", library, symbol); \
        dlclose(handle);                                                                                               \
        return false;                                                                                                  \
    }                                                                                                                  \
    memcpy(&table->name, &address, sizeof address);
    TRTX_CUDA_FUNCTIONS(TRTX_LOAD)
#undef TRTX_LOAD
    return true; /* the handle is kept: the table lives as long as the process */
}

static pthread_once_t load_once = PTHREAD_ONCE_INIT;
static trtx_cuda_api loaded;
static bool is_loaded;
static unsigned loaded_generation;
static char load_reason[512];

static void load(void) {
    loaded_generation = trtx_fork_generation();
    is_loaded = trtx_cuda_api_open("libcuda.so.1", &loaded, load_reason, sizeof load_reason);
}

const trtx_cuda_api *trtx_cuda_api_load(const char **reason) {
    pthread_once(&load_once, load);
    const char *why = NULL;
    if (!is_loaded) {
        why = load_reason;
    } else if (loaded_generation != trtx_fork_generation()) {
        why = "this process was forked from one that had loaded the CUDA driver, which does not work in a child: "
              "start worker processes with spawn or forkserver";
    }
    if (reason) *reason = why;
    return why ? NULL : &loaded;
}

static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static _Atomic unsigned fork_generation;

static void in_child(void) { atomic_fetch_add(&fork_generation, 1); }
static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

unsigned trtx_fork_generation(void) {
    pthread_once(&fork_once, watch_forks);
    return atomic_load_explicit(&fork_generation, memory_order_relaxed);
}

int trtx_short_mutex(pthread_mutex_t *mutex) {
    pthread_mutexattr_t attributes;
    int error = pthread_mutexattr_init(&attributes);
    if (error) return error;
    pthread_mutexattr_settype(&attributes, TRTX_SHORT_MUTEX);
    error = pthread_mutex_init(mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return error;
}

int trtx_monotonic_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);
    if (error) return error;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error = pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
    return error;
}

void trtx_wait_until(pthread_cond_t *condition, pthread_mutex_t *mutex, uint64_t until_ns) {
    if (until_ns == TRTX_NEVER) {
        pthread_cond_wait(condition, mutex);
        return;
    }
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u)};
    pthread_cond_timedwait(condition, mutex, &until);
}

CUresult trtx_scope_enter(trtx_scope *scope, const trtx_cuda_api *api, CUcontext context) {
    if (scope->context == context && scope->api == api) return CUDA_SUCCESS;
    trtx_scope_leave(scope);
    CUcontext current = NULL;
    bool pushed = false;
    if (api->cuCtxGetCurrent(&current) != CUDA_SUCCESS || current != context) {
        CUresult status = api->cuCtxPushCurrent(context);
        if (status != CUDA_SUCCESS) return status;
        pushed = true;
    }
    *scope = (trtx_scope){.api = api, .context = context, .pushed = pushed, .mode = CU_STREAM_CAPTURE_MODE_RELAXED};
    /* should it fail, the context is lost and the next call says so */
    scope->relaxed = api->cuThreadExchangeStreamCaptureMode(&scope->mode) == CUDA_SUCCESS;
    return CUDA_SUCCESS;
}

void trtx_scope_leave(trtx_scope *scope) {
    if (scope->relaxed) scope->api->cuThreadExchangeStreamCaptureMode(&scope->mode);
    if (scope->pushed) {
        CUcontext ours;
        scope->api->cuCtxPopCurrent(&ours);
    }
    *scope = (trtx_scope){0};
}
