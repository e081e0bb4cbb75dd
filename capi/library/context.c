#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

/* As EngineOptions.completion has it: how long a thread that waits may spin. */
static uint64_t spin_of(trtxpy_completion_mode mode) {
    return mode == TRTXPY_LATENCY ? 2000000 : mode == TRTXPY_BALANCED ? 20000 : 0;
}

static void free_context(trtxpy_context_object *context) {
    free((char *)context->info.backend);
    free((char *)context->info.tensorrt_version);
    free((char *)context->info.device_name);
    free((char *)context->info.compute_capability);
    free(context);
}

static trtxpy_status open_context(const trtxpy_context_options *options, trtxpy_context_object *context) {
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return trtxpy_last_status();
    PyObject *result;
    trtxpy_status status = trtxpy_call(&scope, &result, "create_context", "siiusib", options->backend, (int64_t)options->device,
                                       (int64_t)options->completion, options->max_device_bytes, options->lean_library,
                                       (int64_t)options->max_cached_models, options->allow_host_code != 0);
    if (status == TRTXPY_OK) {
        trtxpy_reader reader = {scope.py, result, false};
        trtxpy_reader info = trtxpy_read_tuple(&reader, 2);
        context->py = trtxpy_read_object(&reader, 1);
        if (context->py) scope.py->Py_IncRef(context->py);
        context->info.backend = trtxpy_read_text(&info, 0);
        context->info.tensorrt_version = trtxpy_read_text(&info, 1);
        context->info.device_name = trtxpy_read_text(&info, 2);
        context->info.compute_capability = trtxpy_read_text(&info, 3);
        context->info.device_bytes = trtxpy_read_unsigned(&info, 4);
        context->info.is_mock = trtxpy_read_int(&info, 5) != 0;
        context->info.device = options->device;
        if (reader.failed || info.failed)
            status = trtxpy_fail(TRTXPY_INTERNAL, "create_context returned something else than was agreed on");
        scope.py->Py_DecRef(result);
    }
    trtxpy_scope_end(&scope);
    return status;
}

static void close_context(trtxpy_context_object *context) {
    trtxpy_scope scope;
    if (!context->py || !trtxpy_scope_begin(&scope)) return;
    PyObject *result;
    if (trtxpy_call(&scope, &result, "destroy_context", "O", context->py) == TRTXPY_OK) scope.py->Py_DecRef(result);
    scope.py->Py_DecRef(context->py);
    trtxpy_scope_end(&scope);
}

trtxpy_status trtxpy_context_create(const trtxpy_context_options *given, trtxpy_context *handle) {
    if (handle) *handle = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!handle) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "context is NULL; expected where to write the handle");
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    status = trtxpy_read_struct(&options, sizeof options, TRTXPY_SIZE_1_0(trtxpy_context_options), given, "trtxpy_context_options");
    if (status != TRTXPY_OK) return status;
    if (options.completion < TRTXPY_LATENCY || options.completion > TRTXPY_EFFICIENT)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "options.completion is %d; expected 0 to 2", (int)options.completion);
    if (options.max_cached_models == 0) options.max_cached_models = 8;
    if ((status = trtxpy_init(NULL)) != TRTXPY_OK) return status;
    trtxpy_context_object *context = calloc(1, sizeof *context);
    if (!context) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for a context");
    context->completion = options.completion;
    context->spin_ns = spin_of(options.completion);
    status = open_context(&options, context);
    if (status == TRTXPY_OK) {
        uintptr_t made = trtxpy_handle_make(TRTXPY_KIND_CONTEXT, &context->head);
        if (made) {
            *handle = (trtxpy_context)made;
            return TRTXPY_OK;
        }
        status = trtxpy_last_status();
    }
    trtxpy_kept_error first = trtxpy_keep_error();
    close_context(context);
    free_context(context);
    trtxpy_restore_error(&first);
    return status;
}

trtxpy_status trtxpy_context_destroy(trtxpy_context handle) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_context_object *context = trtxpy_handle_retire(handle, TRTXPY_KIND_CONTEXT, "context", &status);
    if (context) {
        close_context(context);
        free_context(context);
    }
    return context ? trtxpy_last_status() : status;
}

trtxpy_status trtxpy_context_describe(trtxpy_context handle, trtxpy_context_info *info) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_context_object *context = trtxpy_handle_acquire(handle, TRTXPY_KIND_CONTEXT, "context");
    if (!context) return TRTXPY_INVALID_HANDLE;
    status = trtxpy_write_struct(info, &context->info, sizeof *info, TRTXPY_SIZE_1_0(trtxpy_context_info), "info");
    trtxpy_handle_release(&context->head);
    return status;
}

static trtxpy_status read_statistics(trtxpy_context_object *context, trtxpy_context_statistics *found) {
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return trtxpy_last_status();
    PyObject *result;
    trtxpy_status status = trtxpy_call(&scope, &result, "context_statistics", "O", context->py);
    if (status == TRTXPY_OK) {
        trtxpy_reader reader = {scope.py, result, false};
        uint64_t *const counts[] = {&found->device_bytes, &found->device_peak_bytes, &found->device_allocations,
                                    &found->pinned_bytes, &found->pinned_peak_bytes, &found->pinned_allocations,
                                    &found->cached_models, &found->cache_hits, &found->cache_misses};
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) *counts[i] = trtxpy_read_unsigned(&reader, i + 1);
        if (reader.failed) status = trtxpy_fail(TRTXPY_INTERNAL, "context_statistics returned something else than was agreed on");
        scope.py->Py_DecRef(result);
    }
    trtxpy_scope_end(&scope);
    return status;
}

trtxpy_status trtxpy_context_get_statistics(trtxpy_context handle, trtxpy_context_statistics *statistics) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_context_object *context = trtxpy_handle_acquire(handle, TRTXPY_KIND_CONTEXT, "context");
    if (!context) return TRTXPY_INVALID_HANDLE;
    trtxpy_context_statistics found = {0};
    status = read_statistics(context, &found);
    found.graphs = atomic_load(&context->graphs);
    found.tensors = atomic_load(&context->tensors);
    found.queues = atomic_load(&context->queues);
    found.requests = atomic_load(&context->requests);
    if (status == TRTXPY_OK)
        status = trtxpy_write_struct(statistics, &found, sizeof found, TRTXPY_SIZE_1_0(trtxpy_context_statistics), "statistics");
    trtxpy_handle_release(&context->head);
    return status;
}
