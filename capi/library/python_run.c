/* Requests through Python: tensors on the device, and shapes that are not captured. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

/* An input as the engine takes it: the tensor's own memory, or a converted copy (*staged, to be freed). */
static trtxpy_status engine_input(trtxpy_job *job, size_t index, const void **data, bool *on_device, void **staged) {
    trtxpy_tensor_object *tensor = job->tensors[index];
    const trtxpy_port *port = &job->graph->ports[index];
    *on_device = trtxpy_tensor_on_device(tensor);
    *data = tensor->data;
    *staged = NULL;
    if (port->engine_dtype == port->dtype) return TRTXPY_OK;
    size_t wide;
    trtxpy_status status = trtxpy_shape_bytes(port->engine_dtype, &tensor->shape, port->name, &wide);
    if (status != TRTXPY_OK) return status;
    void *copy = NULL;
    const void *narrow = tensor->data;
    if (*on_device) {
        narrow = copy = malloc(tensor->bytes ? tensor->bytes : 1);
        if (!copy) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "input '%s': no memory for %zu bytes", port->name, tensor->bytes);
        status = trtxpy_copy(tensor->context, copy, false, tensor->data, true, tensor->bytes);
    }
    if (status == TRTXPY_OK && !(*staged = malloc(wide ? wide : 1)))
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "input '%s': no memory for %zu bytes", port->name, wide);
    if (status == TRTXPY_OK)
        status = trtxpy_convert(*staged, port->engine_dtype, narrow, port->dtype, tensor->elements, port->name);
    free(copy);
    *data = *staged;
    *on_device = false;
    return status;
}

static trtxpy_status deliver(trtxpy_job *job, size_t output, const void *data, size_t bytes, const trtxpy_shape *shape, bool on_device) {
    trtxpy_graph_object *graph = job->graph;
    trtxpy_tensor_object *tensor = job->tensors[graph->input_count + output];
    const trtxpy_port *port = &graph->ports[graph->input_count + output];
    char wanted[TRTXPY_SHAPE_TEXT], found[TRTXPY_SHAPE_TEXT];
    if (!trtxpy_shape_equal(&tensor->shape, shape)) {
        if (!job->resize)
            return trtxpy_fail(TRTXPY_SHAPE, "output '%s' has shape %s; these inputs give %s", port->name,
                               trtxpy_shape_text(&tensor->shape, found), trtxpy_shape_text(shape, wanted));
        trtxpy_status status = trtxpy_tensor_reshape(tensor, shape);
        if (status != TRTXPY_OK) return status;
    }
    bool to_device = trtxpy_tensor_on_device(tensor);
    if (port->engine_dtype == port->dtype) return trtxpy_copy(tensor->context, tensor->data, to_device, data, on_device, tensor->bytes);
    void *wide = NULL, *narrow = malloc(tensor->bytes ? tensor->bytes : 1);
    trtxpy_status status = TRTXPY_OK;
    if (on_device && (wide = malloc(bytes ? bytes : 1))) status = trtxpy_copy(tensor->context, wide, false, data, true, bytes);
    if (!narrow || (on_device && !wide))
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "output '%s': no memory for %zu bytes", port->name, bytes);
    if (status == TRTXPY_OK)
        status = trtxpy_convert(narrow, port->dtype, on_device ? wide : data, port->engine_dtype, tensor->elements, port->name);
    if (status == TRTXPY_OK) status = trtxpy_copy(tensor->context, tensor->data, to_device, narrow, false, tensor->bytes);
    free(wide);
    free(narrow);
    return status;
}

static PyObject *input_tuple(const trtxpy_python *py, const void *data, const trtxpy_shape *shape, bool on_device) {
    PyObject *items[] = {py->PyLong_FromUnsignedLongLong((uintptr_t)data), trtxpy_dims(py, shape), py->PyBool_FromLong(on_device)};
    return trtxpy_pack(py, 3, items);
}

/* All outputs stay on the device where a tensor on the device wants one. */
static bool wants_device(const trtxpy_job *job) {
    for (size_t i = job->graph->input_count; i < job->graph->input_count + job->graph->output_count; i++)
        if (trtxpy_tensor_on_device(job->tensors[i]) && job->graph->ports[i].dtype == job->graph->ports[i].engine_dtype) return true;
    return false;
}

static trtxpy_status read_results(trtxpy_job *job, const trtxpy_scope *scope, PyObject *result, bool on_device) {
    trtxpy_reader reader = {scope->py, result, false};
    trtxpy_reader outputs = trtxpy_read_tuple(&reader, 2);
    trtxpy_status status = TRTXPY_OK;
    for (size_t i = 0; i < job->graph->output_count && status == TRTXPY_OK; i++) {
        trtxpy_reader row = trtxpy_read_tuple(&outputs, i);
        trtxpy_shape shape;
        const void *data = (const void *)(uintptr_t)trtxpy_read_unsigned(&row, 0);
        size_t bytes = (size_t)trtxpy_read_unsigned(&row, 1);
        trtxpy_read_shape(&row, 2, &shape);
        status = row.failed ? trtxpy_fail(TRTXPY_INTERNAL, "infer returned something else than was agreed on")
                            : deliver(job, i, data, bytes, &shape, on_device);
    }
    return status;
}

/* Memory of the device that the results have: a budget counts it as long as it is there. */
static trtxpy_status drop_results(const trtxpy_scope *scope, PyObject *result, trtxpy_status status) {
    trtxpy_reader reader = {scope->py, result, false};
    PyObject *nothing;
    trtxpy_status dropped = trtxpy_call(scope, &nothing, "drop", "O", trtxpy_read_object(&reader, 1));
    if (dropped == TRTXPY_OK) scope->py->Py_DecRef(nothing);
    return dropped == TRTXPY_OK ? status : dropped;
}

trtxpy_status trtxpy_job_run_in_python(trtxpy_job *job) {
    trtxpy_graph_object *graph = job->graph;
    size_t count = graph->input_count;
    void **staged = calloc(count ? count : 1, sizeof *staged);
    if (!staged) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for %zu inputs", count);
    atomic_fetch_add_explicit(&graph->counts.uncaptured, 1, memory_order_relaxed);
    trtxpy_scope scope;
    trtxpy_status status = TRTXPY_OK;
    if (!trtxpy_scope_begin(&scope)) {
        free(staged);
        return trtxpy_last_status();
    }
    const trtxpy_python *py = scope.py;
    PyObject *inputs = py->PyTuple_New((ptrdiff_t)count);
    if (!inputs) status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for %zu inputs", count);
    for (size_t i = 0; i < count && status == TRTXPY_OK; i++) {
        const void *data;
        bool on_device;
        status = engine_input(job, i, &data, &on_device, &staged[i]);
        PyObject *row = status == TRTXPY_OK ? input_tuple(py, data, &job->tensors[i]->shape, on_device) : NULL;
        if (row) py->PyTuple_SetItem(inputs, (ptrdiff_t)i, row);
        else if (status == TRTXPY_OK) status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for input %zu", i);
    }
    if (status == TRTXPY_OK) {
        bool on_device = wants_device(job);
        PyObject *result;
        job->result.launched_ns = trtxpy_now_ns();
        status = trtxpy_call(&scope, &result, "infer", "OOb", graph->py, inputs, on_device);
        if (status == TRTXPY_OK) {
            status = read_results(job, &scope, result, on_device);
            if (on_device) status = drop_results(&scope, result, status);
            py->Py_DecRef(result);
        }
    }
    py->PyErr_Clear();
    if (inputs) py->Py_DecRef(inputs);
    trtxpy_scope_end(&scope);
    for (size_t i = 0; i < count; i++) free(staged[i]);
    free(staged);
    return status;
}
