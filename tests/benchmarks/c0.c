/* The floor that everything else is measured against: loops over driver calls with no Python in them.
 *
 * Each function launches a captured graph (copies included), waits for it as told, and writes nanoseconds by
 * CLOCK_MONOTONIC. They return a CUresult; 702 (CUDA_ERROR_LAUNCH_TIMEOUT) if nothing completed for ten seconds.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

enum { SUCCESS = 0, NOT_FOUND = 500, NOT_READY = 600, TIMEOUT = 702 };
static const uint64_t PATIENCE_NS = 10000000000u;

typedef struct c0_api {
    int (*launch)(void *exec, void *stream);
    int (*record)(void *event, void *stream);
    int (*query)(void *event);
    int (*write)(void *stream, uint64_t address, uint32_t value, unsigned flags); /* NULL: no c0_flag */
} c0_api;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The functions of the driver that is loaded or can be; 500 if one is missing. */
int c0_load(c0_api *api) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!driver)
        return NOT_FOUND;
    *(void **)&api->launch = dlsym(driver, "cuGraphLaunch");
    *(void **)&api->record = dlsym(driver, "cuEventRecord");
    *(void **)&api->query = dlsym(driver, "cuEventQuery");
    *(void **)&api->write = dlsym(driver, "cuStreamWriteValue32_v2");
    if (!api->write)
        *(void **)&api->write = dlsym(driver, "cuStreamWriteValue32");
    return api->launch && api->record && api->query ? SUCCESS : NOT_FOUND;
}

static int until_event(const c0_api *api, void *event) {
    uint64_t deadline = 0;
    for (unsigned turns = 1;; turns++) {
        int status = api->query(event);
        if (status != NOT_READY)
            return status;
        if (turns % 65536 == 0) {
            uint64_t now = now_ns();
            if (!deadline)
                deadline = now + PATIENCE_NS;
            else if (now > deadline)
                return TIMEOUT;
        }
    }
}

static int until_flag(const volatile uint32_t *flag, uint32_t value) {
    uint64_t deadline = 0;
    for (unsigned turns = 1; *flag != value; turns++) {
        if (turns % 1048576 == 0) {
            uint64_t now = now_ns();
            if (!deadline)
                deadline = now + PATIENCE_NS;
            else if (now > deadline)
                return TIMEOUT;
        }
    }
    atomic_thread_fence(memory_order_acquire);
    return SUCCESS;
}

/* Launch, record an event behind it, spin on the event. */
int c0_event(const c0_api *api, void *exec, void *stream, void *event, size_t count, uint64_t *ns) {
    for (size_t i = 0; i < count; i++) {
        uint64_t begun = now_ns();
        int status = api->launch(exec, stream);
        if (!status)
            status = api->record(event, stream);
        if (!status)
            status = until_event(api, event);
        if (status)
            return status;
        ns[i] = now_ns() - begun;
    }
    return SUCCESS;
}

/* Launch, have the stream write a number behind it into pinned memory (`flag`, seen from the device at `address`), spin on
 * that. Numbers go on from what the flag holds. */
int c0_flag(const c0_api *api, void *exec, void *stream, volatile uint32_t *flag, uint64_t address, size_t count,
            uint64_t *ns) {
    if (!api->write)
        return NOT_FOUND;
    uint32_t value = *flag;
    for (size_t i = 0; i < count; i++) {
        value++;
        uint64_t begun = now_ns();
        int status = api->launch(exec, stream);
        if (!status)
            status = api->write(stream, address, value, 0);
        if (!status)
            status = until_flag(flag, value);
        if (status)
            return status;
        ns[i] = now_ns() - begun;
    }
    return SUCCESS;
}

/* How long the launch itself holds its caller, on an idle stream. */
int c0_launch(const c0_api *api, void *exec, void *stream, void *event, size_t count, uint64_t *ns) {
    for (size_t i = 0; i < count; i++) {
        uint64_t begun = now_ns();
        int status = api->launch(exec, stream);
        ns[i] = now_ns() - begun;
        if (!status)
            status = api->record(event, stream);
        if (!status)
            status = until_event(api, event);
        if (status)
            return status;
    }
    return SUCCESS;
}

/* Keep `lanes` streams busy with `depth` graphs each (execs and events: lane by lane) until `requests` were launched and are
 * done: whatever completes is launched again at once. */
int c0_lanes(const c0_api *api, size_t lanes, size_t depth, void *const *execs, void *const *streams, void *const *events,
             size_t requests, uint64_t *elapsed_ns) {
    enum { MOST = 256 };
    unsigned char busy[MOST] = {0};
    size_t places = lanes * depth, launched = 0, done = 0;
    if (places > MOST)
        return 1;
    uint64_t begun = now_ns(), heard = begun;
    for (unsigned turns = 1; done < requests; turns++) {
        for (size_t turn = 0; turn < places; turn++) {
            size_t i = turn % lanes * depth + turn / lanes; /* one of each lane first */
            if (busy[i]) {
                int status = api->query(events[i]);
                if (status == NOT_READY)
                    continue;
                if (status)
                    return status;
                busy[i] = 0;
                done++;
                heard = 0;
            }
            if (launched < requests) {
                int status = api->launch(execs[i], streams[i / depth]);
                if (!status)
                    status = api->record(events[i], streams[i / depth]);
                if (status)
                    return status;
                busy[i] = 1;
                launched++;
            }
        }
        if (turns % 65536 == 0) {
            uint64_t now = now_ns();
            if (!heard)
                heard = now;
            else if (now - heard > PATIENCE_NS)
                return TIMEOUT;
        }
    }
    *elapsed_ns = now_ns() - begun;
    return SUCCESS;
}
