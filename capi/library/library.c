/* The library as a whole: start, end, versions, structs of callers that were built with another version. */
#define _GNU_SOURCE
#include <link.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core.h"

#ifndef TRTXPY_VERSION
#error "TRTXPY_VERSION: the version of trtx_py, as a string"
#endif

_Thread_local bool trtxpy_in_callback;

static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
static atomic_bool ready;
static _Atomic(const trtx_lane_table *) lanes;

uint32_t trtxpy_abi_version(void) {
    return (uint32_t)TRTXPY_ABI_MAJOR << 16 | TRTXPY_ABI_MINOR;
}

const char *trtxpy_version(void) {
    return TRTXPY_VERSION;
}

uint64_t trtxpy_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

const trtx_lane_table *trtxpy_lanes(void) {
    return atomic_load_explicit(&lanes, memory_order_acquire);
}

static trtxpy_status refuse_fork(void) {
    return trtxpy_fail(TRTXPY_FORKED, "this process was forked from the one that started the library; start it after the fork, "
                                      "or call exec");
}

trtxpy_status trtxpy_enter(void) {
    trtxpy_begin();
    return trtxpy_host_forked() ? refuse_fork() : TRTXPY_OK;
}

trtxpy_status trtxpy_refuse_in_callback(const char *function) {
    if (!trtxpy_in_callback) return TRTXPY_OK;
    return trtxpy_fail(TRTXPY_IN_CALLBACK, "%s waits, and a callback must not: no other request could complete meanwhile", function);
}

trtxpy_status trtxpy_read_struct(void *to, size_t size, size_t least, const void *from, const char *name) {
    if (!from) return TRTXPY_OK;
    size_t given;
    memcpy(&given, from, sizeof given);
    if (given < least || given > 65536)
        return trtxpy_fail(TRTXPY_VERSION_MISMATCH, "%s.struct_size is %zu; expected at least %zu: set it with the INIT macro", name,
                           given, least);
    /* A newer caller may ask for nothing that this library does not know. */
    for (size_t i = size; i < given; i++)
        if (((const unsigned char *)from)[i])
            return trtxpy_fail(TRTXPY_VERSION_MISMATCH, "%s has members that this library (ABI %d.%d) does not know, and they are not 0",
                               name, TRTXPY_ABI_MAJOR, TRTXPY_ABI_MINOR);
    memcpy(to, from, given < size ? given : size);
    memcpy(to, &size, sizeof size);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_write_struct(void *to, const void *from, size_t size, size_t least, const char *name) {
    if (!to) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is NULL; expected where to write it", name);
    size_t given;
    memcpy(&given, to, sizeof given);
    if (given < least || given > 65536)
        return trtxpy_fail(TRTXPY_VERSION_MISMATCH, "%s.struct_size is %zu; expected at least %zu: set it with the INIT macro", name,
                           given, least);
    if (given > size) memset((char *)to + size, 0, given - size);
    memcpy((char *)to + sizeof given, (const char *)from + sizeof given, (given < size ? given : size) - sizeof given);
    return TRTXPY_OK;
}

/* Python ends, and takes everything with it: threads of ours must be gone by then. */
static void before_python_ends(void) {
    atomic_store(&ready, false);
    trtxpy_threads_stop();
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return;
    PyObject *result;
    if (trtxpy_call(&scope, &result, "stop", "") == TRTXPY_OK) scope.py->Py_DecRef(result);
    trtxpy_scope_end(&scope);
}

static int read_loads(struct dl_phdr_info *info, size_t size, void *loads) {
    (void)size;
    *(unsigned long long *)loads = info->dlpi_adds; /* of all objects, so far */
    return 1;
}

void trtxpy_end_before_the_loaded(void) {
    static _Atomic unsigned long long known;
    unsigned long long loads = 0;
    dl_iterate_phdr(read_loads, &loads);
    if (atomic_exchange(&known, loads) != loads) trtxpy_host_at_exit(before_python_ends);
}

/* An attribute of the trtx_py that was imported, as text; "" if it is none. Leaves no exception. */
static void package_text(const trtxpy_python *py, const char *name, char *text, size_t room) {
    PyObject *package = py->PyImport_ImportModule("trtx_py");
    PyObject *value = package ? py->PyObject_GetAttrString(package, name) : NULL;
    PyObject *encoded = value ? py->PyUnicode_AsUTF8String(value) : NULL;
    char *bytes = NULL;
    ptrdiff_t size;
    bool good = encoded && py->PyBytes_AsStringAndSize(encoded, &bytes, &size) == 0;
    snprintf(text, room, "%s", good ? bytes : "");
    py->PyErr_Clear();
    PyObject *const owned[] = {encoded, value, package};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        if (owned[i]) py->Py_DecRef(owned[i]);
}

/* The two call each other's private functions: only what was built together fits together. */
static trtxpy_status check_package(const trtxpy_python *py) {
    char version[64], file[1024];
    package_text(py, "__version__", version, sizeof version);
    if (strcmp(version, TRTXPY_VERSION) == 0) return TRTXPY_OK;
    package_text(py, "__file__", file, sizeof file);
    return trtxpy_fail(TRTXPY_VERSION_MISMATCH, "this is libtrtxpy %s, and the trtx_py that Python imports is %s (%s); both must be of one "
                       "version: load the library that `python -m trtx_py.capi --path` names, name another environment with "
                       "TRTXPY_PYTHON, or in a checkout run scripts/build-native", TRTXPY_VERSION,
                       *version ? version : "of no known version", *file ? file : "from no file");
}

static trtxpy_status start_control(void) {
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return trtxpy_last_status();
    PyObject *result;
    trtxpy_status status = check_package(scope.py);
    if (status == TRTXPY_OK) status = trtxpy_call(&scope, &result, "start", "");
    if (status == TRTXPY_OK) {
        trtxpy_reader reader = {scope.py, result, false};
        PyObject *capsule = trtxpy_read_object(&reader, 1);
        const trtx_lane_table *table = capsule ? scope.py->PyCapsule_GetPointer(capsule, TRTX_LANE_TABLE_NAME) : NULL;
        scope.py->PyErr_Clear();
        if (!table || table->version != TRTX_LANE_TABLE_VERSION || table->struct_size < sizeof *table)
            status = trtxpy_fail(TRTXPY_VERSION_MISMATCH, "trtx_py's native lanes are not those that libtrtxpy %s was built with; install "
                                 "both from one wheel", TRTXPY_VERSION);
        else
            atomic_store_explicit(&lanes, table, memory_order_release); /* _native stays loaded for the life of the process */
        scope.py->Py_DecRef(result);
    }
    trtxpy_scope_end(&scope);
    return status;
}

trtxpy_status trtxpy_init(const trtxpy_init_options *given) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_init_options options = TRTXPY_INIT_OPTIONS_INIT;
    status = trtxpy_read_struct(&options, sizeof options, TRTXPY_SIZE_1_0(trtxpy_init_options), given, "trtxpy_init_options");
    if (status != TRTXPY_OK) return status;
    if (atomic_load_explicit(&ready, memory_order_acquire) && trtxpy_host_python()) return TRTXPY_OK;
    /* Somebody shuts down, and waits for the callback that this is. */
    if ((status = trtxpy_refuse_in_callback("trtxpy_init")) != TRTXPY_OK) return status;
    /* Whoever waits for the start must not have Python's lock, which the start needs. */
    void *unlocked = trtxpy_host_unlock();
    pthread_mutex_lock(&starting);
    if (!atomic_load(&ready) || !trtxpy_host_python()) {
        status = trtxpy_host_start(options.python);
        if (status == TRTXPY_OK) {
            trtxpy_host_at_exit(before_python_ends);
            status = start_control();
        }
        if (status == TRTXPY_OK) status = trtxpy_threads_start();
        if (status == TRTXPY_OK) atomic_store_explicit(&ready, true, memory_order_release);
    }
    pthread_mutex_unlock(&starting);
    trtxpy_host_relock(unlocked);
    return status;
}

trtxpy_status trtxpy_shutdown(void) {
    trtxpy_status status = trtxpy_enter();
    if (status == TRTXPY_OK) status = trtxpy_refuse_in_callback("trtxpy_shutdown");
    if (status != TRTXPY_OK) return status;
    size_t live = trtxpy_handle_count();
    if (live)
        return trtxpy_fail(TRTXPY_BORROWED, "trtxpy_shutdown: %zu objects are open; destroy them first", live);
    void *unlocked = trtxpy_host_unlock();
    pthread_mutex_lock(&starting);
    if (atomic_load(&ready)) {
        before_python_ends();
        trtxpy_forget_thread();
        status = trtxpy_host_stop();
    }
    pthread_mutex_unlock(&starting);
    trtxpy_host_relock(unlocked);
    return status;
}

trtxpy_status trtxpy_live_objects(size_t *count) {
    trtxpy_begin();
    if (!count) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "count is NULL; expected where to write it");
    *count = trtxpy_handle_count();
    return TRTXPY_OK;
}
