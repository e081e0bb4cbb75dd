/* Errors, objects, the library as a whole, contexts. */
#include "fake.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* One lock for everything; `changed` when a request is done or posted. */
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
_Thread_local char error_text[512];
_Thread_local trtxpy_status error_status;
_Thread_local bool in_callback;

trtxpy_status begin(void) {
    error_text[0] = 0;
    return error_status = TRTXPY_OK;
}

trtxpy_status fail(trtxpy_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return error_status = status;
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- objects ---- */

object **table;
size_t table_count;
static size_t live;

void *make(kind kind, object *parent, object **made) {
    object *new = calloc(1, sizeof *new);
    new->kind = kind;
    new->parent = parent;
    if (parent) parent->children++;
    table = realloc(table, (table_count + 1) * sizeof *table);
    table[table_count++] = new;
    live++;
    *made = new;
    return (void *)(uintptr_t)(table_count << 4 | (size_t)kind);
}

/* With the mutex. */
object *find(const void *handle, kind kind) {
    size_t value = (uintptr_t)handle;
    size_t index = value >> 4;
    if ((value & 15) == (size_t)kind && index && index <= table_count && table[index - 1]) return table[index - 1];
    fail(TRTXPY_INVALID_HANDLE, "%p is no open handle of kind %d", handle, kind);
    return NULL;
}

void drop_handle(const void *handle) {
    table[((uintptr_t)handle >> 4) - 1] = NULL;
    live--;
}

void free_object(object *gone) {
    if (gone->parent) gone->parent->children--;
    free(gone->text);
    free(gone->data);
    free(gone->ring);
    free(gone);
}

trtxpy_status destroy(const void *handle, kind kind) {
    begin();
    if (!handle) return TRTXPY_OK;
    pthread_mutex_lock(&mutex);
    object *gone = find(handle, kind);
    trtxpy_status status = gone ? TRTXPY_OK : TRTXPY_INVALID_HANDLE;
    if (gone && kind == REQUEST) {
        drop_handle(handle);
        gone->handle_open = false;
        if (gone->done) free_object(gone);
    } else if (gone && (gone->children || gone->use)) {
        status = fail(TRTXPY_BORROWED, "%zu children, use %d", gone->children, gone->use);
    } else if (gone) {
        drop_handle(handle);
        if (gone->group && --gone->group->groups == 0) gone->group->children--;
        if (kind == QUEUE) close(gone->fd);
        free_object(gone);
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

/* ---- the library ---- */

static const char *const status_names[] = {
    "TRTXPY_OK", "TRTXPY_INVALID_ARGUMENT", "TRTXPY_INVALID_HANDLE", "TRTXPY_BORROWED", "TRTXPY_NOT_FOUND", "TRTXPY_SHAPE",
    "TRTXPY_DTYPE", "TRTXPY_RANGE", "TRTXPY_BUFFER_SIZE", "TRTXPY_OUT_OF_MEMORY", "TRTXPY_UNAVAILABLE", "TRTXPY_PYTHON",
    "TRTXPY_PARSE", "TRTXPY_BUILD", "TRTXPY_PLAN", "TRTXPY_VERSION_MISMATCH", "TRTXPY_EXECUTION", "TRTXPY_CUDA",
    "TRTXPY_CANCELLED", "TRTXPY_TIMEOUT", "TRTXPY_BUSY", "TRTXPY_CLOSED", "TRTXPY_IN_CALLBACK", "TRTXPY_FORKED",
    "TRTXPY_NOT_READY", "TRTXPY_UNSUPPORTED", "TRTXPY_INTERNAL"};

const char *trtxpy_status_name(trtxpy_status status) {
    return status >= 0 && status <= 26 ? status_names[status] : "TRTXPY_UNKNOWN";
}
const char *trtxpy_last_error(void) { return error_text; }
trtxpy_status trtxpy_last_status(void) { return error_status; }
#ifndef FAKE_ABI
#define FAKE_ABI ((uint32_t)TRTXPY_ABI_MAJOR << 16 | TRTXPY_ABI_MINOR)
#endif
uint32_t trtxpy_abi_version(void) { return FAKE_ABI; }
const char *trtxpy_version(void) { return "0.0.0-fake"; }
#ifndef FAKE_INCOMPLETE
trtxpy_status trtxpy_shutdown(void) {
    begin();
    return live ? fail(TRTXPY_BORROWED, "%zu objects are open", live) : TRTXPY_OK;
}
#endif
trtxpy_status trtxpy_live_objects(size_t *count) {
    begin();
    pthread_mutex_lock(&mutex);
    *count = live;
    pthread_mutex_unlock(&mutex);
    return TRTXPY_OK;
}

static void start(void) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, complete, NULL) || pthread_detach(thread)) abort();
}

trtxpy_status trtxpy_init(const trtxpy_init_options *options) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    begin();
    if (options && options->python && strcmp(options->python, "/nowhere") == 0) return fail(TRTXPY_PYTHON, "there is no /nowhere");
    pthread_once(&once, start);
    return TRTXPY_OK;
}

static const struct {
    const char *name;
    trtxpy_dtype dtype;
    unsigned bits;
} types[] = {{"float32", 0, 32}, {"float16", 1, 16}, {"int32", 2, 32}, {"uint32", 3, 32}, {"int64", 4, 64}, {"uint64", 5, 64},
             {"int8", 6, 8}, {"uint8", 7, 8}, {"int4", 8, 4}, {"uint4", 9, 4}, {"bool", 16, 8}, {"bfloat16", 17, 16}, {"float8", 18, 8}};
enum { TYPES = sizeof types / sizeof *types };

const char *trtxpy_dtype_name(trtxpy_dtype dtype) {
    for (int i = 0; i < TYPES; i++)
        if (types[i].dtype == dtype) return types[i].name;
    return NULL;
}

trtxpy_status trtxpy_dtype_bytes(trtxpy_dtype dtype, const trtxpy_shape *shape, size_t *bytes) {
    begin();
    size_t elements = 1;
    if (shape->rank < 0 || shape->rank > TRTXPY_MAX_RANK) return fail(TRTXPY_INVALID_ARGUMENT, "rank %d", shape->rank);
    for (int i = 0; i < shape->rank; i++) {
        if (shape->dims[i] < 0 || shape->dims[i] > 1 << 20) return fail(TRTXPY_INVALID_ARGUMENT, "axis %lld", (long long)shape->dims[i]);
        elements *= (size_t)shape->dims[i];
    }
    for (int i = 0; i < TYPES; i++)
        if (types[i].dtype == dtype) {
            *bytes = (elements * types[i].bits + 7) / 8;
            return TRTXPY_OK;
        }
    return fail(TRTXPY_INVALID_ARGUMENT, "there is no type %d", dtype);
}

/* ---- contexts ---- */

trtxpy_status trtxpy_context_create(const trtxpy_context_options *options, trtxpy_context *context) {
    begin();
    *context = NULL;
    trtxpy_init(NULL);
    if (options->struct_size != sizeof *options) return fail(TRTXPY_VERSION_MISMATCH, "struct_size %zu", options->struct_size);
    const char *backend = options->backend;
    double seconds = 0;
    bool mock = backend && strncmp(backend, "mock", 4) == 0;
    if (!backend) {
        backend = getenv("TRTX_BACKEND");
        mock = backend && strcmp(backend, "mock") == 0;
    }
    if (!backend) return fail(TRTXPY_UNAVAILABLE, "no TensorRT here");
    if (!mock && strcmp(backend, "tensorrt") != 0) return fail(TRTXPY_INVALID_ARGUMENT, "there is no backend %s", backend);
    sscanf(backend, "mock:duration_s=%lf", &seconds);
    pthread_mutex_lock(&mutex);
    object *made;
    *context = make(CONTEXT, NULL, &made);
    made->duration_ns = (uint64_t)(seconds * 1e9);
    made->mock = mock;
    made->shape.rank = options->completion; /* to be read again */
    pthread_mutex_unlock(&mutex);
    return TRTXPY_OK;
}
trtxpy_status trtxpy_context_destroy(trtxpy_context context) { return destroy(context, CONTEXT); }

trtxpy_status trtxpy_context_describe(trtxpy_context context, trtxpy_context_info *info) {
    static const char *const modes[] = {"latency", "balanced", "efficient"};
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(context, CONTEXT);
    if (found) {
        info->backend = found->mock ? "mock" : "tensorrt";
        info->tensorrt_version = "0.0";
        info->device_name = modes[found->shape.rank];
        info->compute_capability = "0.0";
        info->device_bytes = 1 << 20;
        info->is_mock = found->mock;
        info->device = 0;
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}

trtxpy_status trtxpy_context_get_statistics(trtxpy_context context, trtxpy_context_statistics *statistics) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(context, CONTEXT);
    if (found)
        for (size_t i = 0; i < table_count; i++) {
            if (!table[i] || table[i]->parent != found) continue;
            statistics->graphs += table[i]->kind == GRAPH;
            statistics->tensors += table[i]->kind == TENSOR;
            statistics->queues += table[i]->kind == QUEUE;
        }
    pthread_mutex_unlock(&mutex);
    return error_status;
}
