/* One call for everything: models are kept in Python, by content. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

typedef struct results_object {
    trtxpy_head head;
    trtxpy_context_object *context;
    PyObject *py; /* keeps the memory */
    size_t count;
    trtxpy_array *arrays;
} results_object;

static void free_results(results_object *results) {
    for (size_t i = 0; results->arrays && i < results->count; i++) free((char *)results->arrays[i].name);
    free(results->arrays);
    trtxpy_drop(results->py);
    atomic_fetch_sub(&results->context->head.children, 1);
    free(results);
}

static const trtxpy_array *array_at(const trtxpy_array *arrays, size_t index) {
    return (const trtxpy_array *)((const char *)arrays + index * arrays[0].struct_size);
}

static trtxpy_status check_inputs(const trtxpy_array *inputs, size_t count) {
    trtxpy_array first = TRTXPY_ARRAY_INIT;
    trtxpy_status status = trtxpy_read_struct(&first, sizeof first, TRTXPY_SIZE_1_0(trtxpy_array), inputs, "trtxpy_array");
    if (status == TRTXPY_OK && inputs[0].struct_size % _Alignof(trtxpy_array))
        return trtxpy_fail(TRTXPY_VERSION_MISMATCH, "trtxpy_array.struct_size is %zu; expected a multiple of %zu: it is the distance of the "
                           "arrays, too", inputs[0].struct_size, _Alignof(trtxpy_array));
    for (size_t i = 0; i < count && status == TRTXPY_OK; i++) {
        const trtxpy_array *array = array_at(inputs, i);
        size_t bytes;
        if (!array->name) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "the name of input %zu is NULL", i);
        if ((status = trtxpy_shape_bytes(array->dtype, &array->shape, array->name, &bytes)) != TRTXPY_OK) return status;
        if (bytes != array->bytes)
            return trtxpy_fail(TRTXPY_BUFFER_SIZE, "input '%s' has %zu bytes; its type and shape need %zu", array->name, array->bytes, bytes);
        if (bytes && !array->data) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "input '%s': data is NULL; expected %zu bytes", array->name, bytes);
    }
    return status;
}

static PyObject *inputs_tuple(const trtxpy_python *py, const trtxpy_array *inputs, size_t count) {
    static char nothing[1];
    PyObject *tuple = py->PyTuple_New((ptrdiff_t)count);
    for (size_t i = 0; tuple && i < count; i++) {
        const trtxpy_array *array = array_at(inputs, i);
        char *data = array->bytes ? (char *)(uintptr_t)array->data : nothing;
        PyObject *items[] = {py->PyUnicode_FromString(array->name), py->PyLong_FromLongLong(array->dtype), trtxpy_dims(py, &array->shape),
                             py->PyMemoryView_FromMemory(data, (ptrdiff_t)array->bytes, 0x100)};
        PyObject *row = trtxpy_pack(py, 4, items);
        if (!row) {
            py->Py_DecRef(tuple);
            return NULL;
        }
        py->PyTuple_SetItem(tuple, (ptrdiff_t)i, row);
    }
    return tuple;
}

static trtxpy_status read_results(const trtxpy_scope *scope, PyObject *result, results_object *results) {
    trtxpy_reader reader = {scope->py, result, false};
    results->py = trtxpy_read_object(&reader, 1);
    if (results->py) scope->py->Py_IncRef(results->py);
    trtxpy_reader rows = trtxpy_read_tuple(&reader, 2);
    results->count = trtxpy_read_count(&rows);
    results->arrays = calloc(results->count ? results->count : 1, sizeof *results->arrays);
    bool good = results->arrays && !reader.failed && !rows.failed;
    for (size_t i = 0; good && i < results->count; i++) {
        trtxpy_reader row = trtxpy_read_tuple(&rows, i);
        trtxpy_array *array = &results->arrays[i];
        array->struct_size = sizeof *array;
        array->name = trtxpy_read_text(&row, 0);
        array->dtype = (trtxpy_dtype)trtxpy_read_int(&row, 1);
        trtxpy_read_shape(&row, 2, &array->shape);
        array->data = (const void *)(uintptr_t)trtxpy_read_unsigned(&row, 3);
        array->bytes = (size_t)trtxpy_read_unsigned(&row, 4);
        good = !row.failed;
    }
    return good ? TRTXPY_OK : trtxpy_fail(TRTXPY_INTERNAL, "run returned something else than was agreed on");
}

static trtxpy_status run(trtxpy_context handle, const void *model, size_t model_bytes, const void *weights, size_t weights_bytes,
                         const trtxpy_array *inputs, size_t input_count, bool zeroed, const trtxpy_graph_options *given,
                         trtxpy_results *results_handle) {
    if (results_handle) *results_handle = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!results_handle) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "results is NULL; expected where to write the handle");
    if (!model) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "model is NULL; expected the bytes of an ONNX model or a plan");
    if (model_bytes > PTRDIFF_MAX || weights_bytes > PTRDIFF_MAX)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "a size of %zu bytes is more than an address space holds",
                           model_bytes > weights_bytes ? model_bytes : weights_bytes);
    if (!weights && weights_bytes) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "weights is NULL; expected %zu bytes", weights_bytes);
    if (!inputs && input_count) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "inputs is NULL; expected %zu", input_count);
    trtxpy_graph_options options;
    if ((status = trtxpy_check_graph_options(given, &options)) != TRTXPY_OK) return status;
    if (input_count && (status = check_inputs(inputs, input_count)) != TRTXPY_OK) return status;
    trtxpy_context_object *context = trtxpy_handle_acquire(handle, TRTXPY_KIND_CONTEXT, "context");
    if (!context) return TRTXPY_INVALID_HANDLE;
    results_object *results = calloc(1, sizeof *results);
    trtxpy_scope scope;
    if (!results) {
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for results");
    } else {
        results->context = context;
        atomic_fetch_add(&context->head.children, 1);
        if (trtxpy_scope_begin(&scope)) {
            PyObject *rows = NULL, *result;
            if (zeroed) scope.py->Py_IncRef(rows = scope.py->none);
            else rows = inputs_tuple(scope.py, inputs, input_count);
            status = trtxpy_call(&scope, &result, "run", "OyyNN", context->py, model, model_bytes, weights, weights_bytes, rows,
                                 trtxpy_graph_options_tuple(scope.py, &options));
            if (status == TRTXPY_OK) {
                status = read_results(&scope, result, results);
                scope.py->Py_DecRef(result);
            }
            trtxpy_scope_end(&scope);
        } else {
            status = trtxpy_last_status();
        }
        if (status == TRTXPY_OK && !(*results_handle = (trtxpy_results)trtxpy_handle_make(TRTXPY_KIND_RESULTS, &results->head)))
            status = trtxpy_last_status();
        if (status != TRTXPY_OK) free_results(results);
    }
    trtxpy_handle_release(&context->head);
    return status;
}

trtxpy_status trtxpy_run(trtxpy_context context, const void *model, size_t model_bytes, const void *weights, size_t weights_bytes,
                         const trtxpy_array *inputs, size_t input_count, const trtxpy_graph_options *options,
                         trtxpy_results *results) {
    return run(context, model, model_bytes, weights, weights_bytes, inputs, input_count, false, options, results);
}

trtxpy_status trtxpy_run_zeroed(trtxpy_context context, const void *model, size_t model_bytes, const void *weights,
                                size_t weights_bytes, const trtxpy_graph_options *options, trtxpy_results *results) {
    return run(context, model, model_bytes, weights, weights_bytes, NULL, 0, true, options, results);
}

trtxpy_status trtxpy_results_count(trtxpy_results handle, size_t *count) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!count) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "count is NULL; expected where to write it");
    results_object *results = trtxpy_handle_acquire(handle, TRTXPY_KIND_RESULTS, "results");
    if (!results) return TRTXPY_INVALID_HANDLE;
    *count = results->count;
    trtxpy_handle_release(&results->head);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_results_get(trtxpy_results handle, size_t index, trtxpy_array *array) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    results_object *results = trtxpy_handle_acquire(handle, TRTXPY_KIND_RESULTS, "results");
    if (!results) return TRTXPY_INVALID_HANDLE;
    if (index >= results->count)
        status = trtxpy_fail(TRTXPY_NOT_FOUND, "there is no result %zu; there are %zu", index, results->count);
    else
        status = trtxpy_write_struct(array, &results->arrays[index], sizeof *array, TRTXPY_SIZE_1_0(trtxpy_array), "array");
    trtxpy_handle_release(&results->head);
    return status;
}

trtxpy_status trtxpy_results_destroy(trtxpy_results handle) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    results_object *results = trtxpy_handle_retire(handle, TRTXPY_KIND_RESULTS, "results", &status);
    if (results) free_results(results);
    return status;
}
