/* Graphs: a model that was built and loaded. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

static void free_graph(trtxpy_graph_object *graph) {
    for (size_t i = 0; graph->ports && i < graph->input_count + graph->output_count; i++) free(graph->ports[i].name);
    free(graph->ports);
    pthread_cond_destroy(&graph->slot_came);
    pthread_mutex_destroy(&graph->mutex);
    free(graph);
}

static void close_graph(trtxpy_graph_object *graph) {
    trtxpy_scope scope;
    if (!graph->py || !trtxpy_scope_begin(&scope)) return;
    PyObject *result;
    if (trtxpy_call(&scope, &result, "close_graph", "O", graph->py) == TRTXPY_OK) scope.py->Py_DecRef(result);
    scope.py->Py_DecRef(graph->py);
    trtxpy_scope_end(&scope);
}

static bool read_ports(trtxpy_reader *ports, trtxpy_graph_object *graph) {
    size_t count = trtxpy_read_count(ports);
    graph->ports = calloc(count ? count : 1, sizeof *graph->ports);
    if (!graph->ports) return false;
    for (size_t i = 0; i < count; i++) {
        trtxpy_reader row = trtxpy_read_tuple(ports, i);
        trtxpy_port *port = &graph->ports[i];
        if (trtxpy_read_int(&row, 0) == TRTXPY_INPUT) graph->input_count++;
        else graph->output_count++; /* outputs come behind the inputs */
        port->name = trtxpy_read_text(&row, 1);
        port->dtype = (trtxpy_dtype)trtxpy_read_int(&row, 2);
        port->engine_dtype = (trtxpy_dtype)trtxpy_read_int(&row, 3);
        trtxpy_read_shape(&row, 4, &port->shape);
        if (row.failed || !trtxpy_dtype_known(port->dtype) || !trtxpy_dtype_known(port->engine_dtype)) return false;
    }
    return !ports->failed;
}

/* What was opened, from its (0, graph, io); takes nothing of the result over. */
static trtxpy_status read_graph(const trtxpy_scope *scope, PyObject *result, trtxpy_graph_object *graph) {
    trtxpy_reader reader = {scope->py, result, false};
    graph->py = trtxpy_read_object(&reader, 1);
    if (graph->py) scope->py->Py_IncRef(graph->py);
    trtxpy_reader ports = trtxpy_read_tuple(&reader, 2);
    if (reader.failed || !read_ports(&ports, graph))
        return trtxpy_fail(TRTXPY_INTERNAL, "the graph that was opened cannot be understood");
    PyObject *limit;
    trtxpy_status status = trtxpy_call(scope, &limit, "max_graphs", "O", graph->py);
    if (status != TRTXPY_OK) return status;
    trtxpy_reader count = {scope->py, limit, false};
    int64_t most = trtxpy_read_int(&count, 1);
    graph->max_entries = most > 0 ? (size_t)most : 1;
    scope->py->Py_DecRef(limit);
    return TRTXPY_OK;
}

typedef enum source { ONNX, PLAN, PATH } source;

static trtxpy_status call_open(const trtxpy_scope *scope, PyObject **result, trtxpy_context_object *context, source from,
                               const void *model, size_t bytes, const void *weights, size_t weights_bytes,
                               const trtxpy_graph_options *options) {
    PyObject *tuple = trtxpy_graph_options_tuple(scope->py, options);
    if (from == ONNX)
        return trtxpy_call(scope, result, "open_onnx", "OyyN", context->py, model, bytes, weights, weights_bytes, tuple);
    if (from == PLAN) return trtxpy_call(scope, result, "open_plan", "OyN", context->py, model, bytes, tuple);
    return trtxpy_call(scope, result, "open_file", "ONN", context->py, scope->py->PyUnicode_DecodeFSDefault(model), tuple);
}

static trtxpy_status open_graph(trtxpy_context handle, source from, const void *model, size_t bytes, const void *weights,
                                size_t weights_bytes, const trtxpy_graph_options *given, trtxpy_graph *graph_handle) {
    if (graph_handle) *graph_handle = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!graph_handle) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "graph is NULL; expected where to write the handle");
    if (!model) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, from == PATH ? "path is NULL" : "the model is NULL; expected its bytes");
    if (bytes > PTRDIFF_MAX || weights_bytes > PTRDIFF_MAX)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "a size of %zu bytes is more than an address space holds",
                           bytes > weights_bytes ? bytes : weights_bytes);
    if (!weights && weights_bytes)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "weights is NULL; expected %zu bytes", weights_bytes);
    trtxpy_graph_options options;
    if ((status = trtxpy_check_graph_options(given, &options)) != TRTXPY_OK) return status;
    trtxpy_context_object *context = trtxpy_handle_acquire(handle, TRTXPY_KIND_CONTEXT, "context");
    if (!context) return TRTXPY_INVALID_HANDLE;
    trtxpy_graph_object *graph = calloc(1, sizeof *graph);
    trtxpy_scope scope;
    if (!graph) {
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for a graph");
    } else {
        graph->context = context;
        pthread_mutex_init(&graph->mutex, NULL);
        pthread_condattr_t monotonic;
        pthread_condattr_init(&monotonic);
        pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
        pthread_cond_init(&graph->slot_came, &monotonic);
        pthread_condattr_destroy(&monotonic);
        if (trtxpy_scope_begin(&scope)) {
            PyObject *result;
            status = call_open(&scope, &result, context, from, model, bytes, weights, weights_bytes, &options);
            if (status == TRTXPY_OK) {
                status = read_graph(&scope, result, graph);
                scope.py->Py_DecRef(result);
            }
            trtxpy_scope_end(&scope);
        } else {
            status = trtxpy_last_status();
        }
        if (status == TRTXPY_OK && !trtxpy_handle_make(TRTXPY_KIND_GRAPH, &graph->head)) status = trtxpy_last_status();
        if (status == TRTXPY_OK) {
            atomic_fetch_add(&context->head.children, 1);
            atomic_fetch_add(&context->graphs, 1);
            trtxpy_graphs_add(graph);
            *graph_handle = (trtxpy_graph)graph->head.handle;
        } else {
            trtxpy_kept_error first = trtxpy_keep_error();
            close_graph(graph);
            free_graph(graph);
            trtxpy_restore_error(&first);
        }
    }
    trtxpy_handle_release(&context->head);
    return status;
}

trtxpy_status trtxpy_graph_from_onnx(trtxpy_context context, const void *model, size_t model_bytes, const void *weights,
                                     size_t weights_bytes, const trtxpy_graph_options *options, trtxpy_graph *graph) {
    return open_graph(context, ONNX, model, model_bytes, weights, weights_bytes, options, graph);
}

trtxpy_status trtxpy_graph_from_plan(trtxpy_context context, const void *plan, size_t plan_bytes,
                                     const trtxpy_graph_options *options, trtxpy_graph *graph) {
    return open_graph(context, PLAN, plan, plan_bytes, NULL, 0, options, graph);
}

trtxpy_status trtxpy_graph_from_file(trtxpy_context context, const char *path, const trtxpy_graph_options *options,
                                     trtxpy_graph *graph) {
    return open_graph(context, PATH, path, 0, NULL, 0, options, graph);
}

trtxpy_status trtxpy_graph_destroy(trtxpy_graph handle) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_graph_object *graph = trtxpy_handle_retire(handle, TRTXPY_KIND_GRAPH, "graph", &status);
    if (!graph) return status;
    trtxpy_context_object *context = graph->context;
    trtxpy_graphs_remove(graph);
    trtxpy_entry_close_all(graph);
    close_graph(graph);
    free_graph(graph);
    atomic_fetch_sub(&context->graphs, 1);
    atomic_fetch_sub(&context->head.children, 1);
    return trtxpy_last_status();
}

static trtxpy_status read_plan(trtxpy_graph_object *graph, void *plan, size_t *bytes) {
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return trtxpy_last_status();
    PyObject *result;
    trtxpy_status status = trtxpy_call(&scope, &result, "graph_plan", "O", graph->py);
    if (status == TRTXPY_OK) {
        trtxpy_reader reader = {scope.py, result, false};
        PyObject *content = trtxpy_read_object(&reader, 1);
        char *data = NULL;
        ptrdiff_t size = 0;
        if (!content || scope.py->PyBytes_AsStringAndSize(content, &data, &size) != 0) {
            scope.py->PyErr_Clear();
            status = trtxpy_fail(TRTXPY_INTERNAL, "graph_plan returned something else than bytes");
        } else {
            size_t room = *bytes;
            *bytes = (size_t)size;
            if (plan && room < (size_t)size)
                status = trtxpy_fail(TRTXPY_BUFFER_SIZE, "the plan has %zd bytes; there is room for %zu", (ssize_t)size, room);
            else if (plan)
                memcpy(plan, data, (size_t)size);
        }
        scope.py->Py_DecRef(result);
    }
    trtxpy_scope_end(&scope);
    return status;
}

trtxpy_status trtxpy_graph_get_plan(trtxpy_graph handle, void *plan, size_t *bytes) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!bytes) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "bytes is NULL; expected the room, and where to write the size");
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    status = read_plan(graph, plan, bytes);
    trtxpy_handle_release(&graph->head);
    return status;
}

static trtxpy_status check_direction(trtxpy_direction direction) {
    if (direction == TRTXPY_INPUT || direction == TRTXPY_OUTPUT) return TRTXPY_OK;
    return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "direction is %d; expected TRTXPY_INPUT or TRTXPY_OUTPUT", (int)direction);
}

trtxpy_status trtxpy_graph_tensor_count(trtxpy_graph handle, trtxpy_direction direction, size_t *count) {
    trtxpy_status status = trtxpy_enter();
    if (status == TRTXPY_OK) status = check_direction(direction);
    if (status != TRTXPY_OK) return status;
    if (!count) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "count is NULL; expected where to write it");
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    *count = direction == TRTXPY_INPUT ? graph->input_count : graph->output_count;
    trtxpy_handle_release(&graph->head);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_graph_tensor_info(trtxpy_graph handle, trtxpy_direction direction, size_t index, trtxpy_tensor_info *info) {
    trtxpy_status status = trtxpy_enter();
    if (status == TRTXPY_OK) status = check_direction(direction);
    if (status != TRTXPY_OK) return status;
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    size_t count = direction == TRTXPY_INPUT ? graph->input_count : graph->output_count;
    if (index >= count) {
        status = trtxpy_fail(TRTXPY_NOT_FOUND, "there is no %s %zu; the graph has %zu", direction == TRTXPY_INPUT ? "input" : "output",
                             index, count);
    } else {
        trtxpy_port *port = trtxpy_graph_port(graph, direction, index);
        trtxpy_tensor_info found = {sizeof found, port->name, port->dtype, port->engine_dtype, port->shape};
        status = trtxpy_write_struct(info, &found, sizeof found, TRTXPY_SIZE_1_0(trtxpy_tensor_info), "info");
    }
    trtxpy_handle_release(&graph->head);
    return status;
}

size_t trtxpy_graph_find(const trtxpy_graph_object *graph, trtxpy_direction direction, const char *name, size_t hint) {
    size_t first = direction == TRTXPY_INPUT ? 0 : graph->input_count;
    size_t count = direction == TRTXPY_INPUT ? graph->input_count : graph->output_count;
    if (hint < count && strcmp(graph->ports[first + hint].name, name) == 0) return hint;
    for (size_t i = 0; i < count; i++)
        if (strcmp(graph->ports[first + i].name, name) == 0) return i;
    return (size_t)-1;
}

trtxpy_status trtxpy_graph_shapes(trtxpy_graph_object *graph, const trtxpy_named_shape *given, size_t count,
                                  trtxpy_shape *shapes) {
    if (count && !given) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "the shapes are NULL; expected %zu", count);
    if (count != graph->input_count)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%zu shapes were given; the graph has %zu inputs", count, graph->input_count);
    for (size_t i = 0; i < graph->input_count; i++) shapes[i].rank = -1;
    for (size_t i = 0; i < count; i++) {
        size_t elements;
        if (!given[i].name) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "the name of shape %zu is NULL", i);
        size_t index = trtxpy_graph_find(graph, TRTXPY_INPUT, given[i].name, i);
        if (index == (size_t)-1) return trtxpy_fail(TRTXPY_NOT_FOUND, "the graph has no input '%s'", given[i].name);
        if (shapes[index].rank >= 0) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "input '%s' is given twice", given[i].name);
        trtxpy_status status = trtxpy_shape_elements(&given[i].shape, given[i].name, &elements);
        if (status != TRTXPY_OK) return status;
        shapes[index] = given[i].shape;
    }
    return TRTXPY_OK;
}

/* An entry with a user for named shapes; TRTXPY_UNSUPPORTED if they are not captured. */
static trtxpy_status prepared(trtxpy_graph_object *graph, const trtxpy_named_shape *inputs, size_t count, trtxpy_entry **entry) {
    trtxpy_shape *shapes = calloc(graph->input_count ? graph->input_count : 1, sizeof *shapes);
    if (!shapes) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for %zu shapes", graph->input_count);
    trtxpy_status status = trtxpy_graph_shapes(graph, inputs, count, shapes);
    if (status == TRTXPY_OK) status = trtxpy_entry_get(graph, shapes, entry);
    free(shapes);
    if (status != TRTXPY_OK || (*entry)->py) return status;
    status = trtxpy_fail((*entry)->status, "this shape is not captured: %s", (*entry)->why ? (*entry)->why : "no reason is known");
    trtxpy_entry_release(graph, *entry);
    return status;
}

trtxpy_status trtxpy_graph_prepare(trtxpy_graph handle, const trtxpy_named_shape *inputs, size_t input_count) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    trtxpy_entry *entry;
    status = prepared(graph, inputs, input_count, &entry);
    if (status == TRTXPY_OK) trtxpy_entry_release(graph, entry);
    trtxpy_handle_release(&graph->head);
    return status;
}

trtxpy_status trtxpy_graph_output_shapes(trtxpy_graph handle, const trtxpy_named_shape *inputs, size_t input_count,
                                         trtxpy_shape *shapes, size_t room) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    trtxpy_entry *entry;
    if (!shapes && room)
        status = trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "shapes is NULL; expected room for %zu", room);
    else if (room < graph->output_count)
        status = trtxpy_fail(TRTXPY_BUFFER_SIZE, "there is room for %zu shapes; the graph has %zu outputs", room, graph->output_count);
    else if ((status = prepared(graph, inputs, input_count, &entry)) == TRTXPY_OK) {
        for (size_t i = 0; i < graph->output_count; i++) shapes[i] = entry->shapes[graph->input_count + i];
        trtxpy_entry_release(graph, entry);
    }
    trtxpy_handle_release(&graph->head);
    return status;
}

trtxpy_status trtxpy_graph_get_statistics(trtxpy_graph handle, trtxpy_graph_statistics *statistics) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) return TRTXPY_INVALID_HANDLE;
    trtxpy_graph_statistics found = {
        .struct_size = sizeof found,
        .submitted = atomic_load(&graph->counts.submitted),
        .completed = atomic_load(&graph->counts.completed),
        .failed = atomic_load(&graph->counts.failed),
        .cancelled = atomic_load(&graph->counts.cancelled),
        .captured = atomic_load(&graph->counts.captured),
        .uncaptured = atomic_load(&graph->counts.uncaptured),
        .zero_copy = atomic_load(&graph->counts.zero_copy),
        .in_flight = atomic_load(&graph->counts.in_flight),
    };
    pthread_mutex_lock(&graph->mutex);
    found.queued = graph->queued;
    for (trtxpy_entry *entry = graph->entries; entry; entry = entry->next) {
        if (!entry->py) continue;
        found.shapes++;
        if (entry->slot_count > found.slots) found.slots = entry->slot_count;
    }
    pthread_mutex_unlock(&graph->mutex);
    status = trtxpy_write_struct(statistics, &found, sizeof found, TRTXPY_SIZE_1_0(trtxpy_graph_statistics), "statistics");
    trtxpy_handle_release(&graph->head);
    return status;
}
