/* Calls into trtx_py.capi._control, by Python's stable ABI. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum { READ_ONLY = 0x100 }; /* PyBUF_READ */

static pthread_key_t thread_key;
static pthread_once_t thread_once = PTHREAD_ONCE_INIT;
static _Thread_local bool known;

/* The thread ends: so does what Python has of it. Not by PyGILState_Release: Python's own key of the thread may be empty already. */
static void leave_thread(void *state) {
    const trtxpy_python *py = trtxpy_host_python();
    if (!py) return; /* Python took it along */
    py->PyEval_RestoreThread(state);
    py->PyThreadState_Clear(state);
    py->PyEval_SaveThread();
    py->PyThreadState_Delete(state);
}

void trtxpy_forget_thread(void) {
    if (!known) return;
    void *state = pthread_getspecific(thread_key);
    known = false;
    if (!state) return; /* Python knew it before we did */
    pthread_setspecific(thread_key, NULL);
    trtxpy_host_keeps_state(false);
    leave_thread(state);
}

static void make_thread_key(void) {
    if (pthread_key_create(&thread_key, leave_thread) != 0) abort(); /* no key is left: nothing of threads works */
}

/* Keep Python's state of a thread that Python does not know until the thread ends. PyGILState_Release alone would end it with each
 * call; pybind11, with which TensorRT's modules are made, remembers it for the thread that imports them and uses it again:
 * measured on an H200, the next call from that thread ended the process. */
static void know_thread(const trtxpy_python *py) {
    if (known) return;
    known = true;
    pthread_once(&thread_once, make_thread_key);
    if (py->PyGILState_GetThisThreadState()) return;
    py->PyGILState_Ensure();
    pthread_setspecific(thread_key, py->PyEval_SaveThread());
    trtxpy_host_keeps_state(true);
}

trtxpy_status trtxpy_say_ended(void) {
    return trtxpy_fail(trtxpy_host_forked() ? TRTXPY_FORKED : TRTXPY_CLOSED, "Python is not there any more: %s",
                       trtxpy_host_forked() ? "this process was forked from the one that started the library"
                                            : "it has ended, and the library with it");
}

bool trtxpy_scope_begin(trtxpy_scope *scope) {
    memset(scope, 0, sizeof *scope);
    const trtxpy_python *py = trtxpy_host_python();
    if (!py) {
        trtxpy_say_ended();
        return false;
    }
    know_thread(py);
    trtxpy_host_call_begins();
    scope->lock = py->PyGILState_Ensure();
    scope->py = py;
    py->PyErr_Fetch(&scope->error[0], &scope->error[1], &scope->error[2]);
    return true;
}

void trtxpy_scope_end(trtxpy_scope *scope) {
    if (!scope->py) return;
    scope->py->PyErr_Restore(scope->error[0], scope->error[1], scope->error[2]);
    scope->py->PyGILState_Release(scope->lock);
    trtxpy_host_call_ends();
    scope->py = NULL;
    trtxpy_end_before_the_loaded();
}

void trtxpy_drop(PyObject *object) {
    trtxpy_scope scope;
    const trtxpy_python *py = object ? trtxpy_host_python() : NULL;
    if (!py) return; /* Python took it along */
    if (!trtxpy_scope_begin(&scope)) return;
    py->Py_DecRef(object);
    trtxpy_scope_end(&scope);
}

/* Whatever Python raised, as an error of ours. */
static trtxpy_status raised(const trtxpy_python *py, const char *function) {
    PyObject *type = NULL, *value = NULL, *trace = NULL, *text, *bytes = NULL;
    py->PyErr_Fetch(&type, &value, &trace);
    py->PyErr_NormalizeException(&type, &value, &trace);
    char *message = NULL;
    ptrdiff_t length = 0;
    text = value ? py->PyObject_Str(value) : NULL;
    if (text) bytes = py->PyUnicode_AsUTF8String(text);
    if (!bytes || py->PyBytes_AsStringAndSize(bytes, &message, &length) != 0) message = NULL;
    PyObject *name = type ? py->PyObject_GetAttrString(type, "__name__") : NULL, *name_bytes = NULL;
    char *name_text = NULL;
    if (name) name_bytes = py->PyUnicode_AsUTF8String(name);
    if (!name_bytes || py->PyBytes_AsStringAndSize(name_bytes, &name_text, &length) != 0) name_text = NULL;
    bool memory = name_text && strcmp(name_text, "MemoryError") == 0;
    bool not_text = name_text && strcmp(name_text, "UnicodeDecodeError") == 0; /* of an argument: nothing else raises here */
    trtxpy_status status = not_text ? trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s: a name or another text of the caller's is not UTF-8: %s",
                                                  function, message ? message : "")
                                    : trtxpy_fail(memory ? TRTXPY_OUT_OF_MEMORY : TRTXPY_INTERNAL, "%s: Python raised %s: %s", function,
                                                  name_text ? name_text : "an exception", message ? message : "");
    PyObject *all[] = {type, value, trace, text, bytes, name, name_bytes};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]) py->Py_DecRef(all[i]);
    py->PyErr_Clear();
    return status;
}

static PyObject *none(const trtxpy_python *py) {
    py->Py_IncRef(py->none);
    return py->none;
}

/* One argument by its letter; NULL with Python's exception, or where an N was NULL. */
static PyObject *argument(const trtxpy_python *py, char letter, va_list *values) {
    switch (letter) {
    case 's': {
        const char *text = va_arg(*values, const char *);
        return text ? py->PyUnicode_FromString(text) : none(py);
    }
    case 'y': {
        const void *data = va_arg(*values, const void *);
        size_t bytes = va_arg(*values, size_t);
        /* A view: what keeps the bytes makes a copy of its own. No bytes may have any address. */
        return data ? py->PyMemoryView_FromMemory((char *)(uintptr_t)data, (ptrdiff_t)bytes, READ_ONLY) : none(py);
    }
    case 'i': return py->PyLong_FromLongLong(va_arg(*values, int64_t));
    case 'u': return py->PyLong_FromUnsignedLongLong(va_arg(*values, uint64_t));
    case 'p': return py->PyLong_FromUnsignedLongLong((uintptr_t)va_arg(*values, const void *));
    case 'b': return py->PyBool_FromLong(va_arg(*values, int));
    case 'O': {
        PyObject *object = va_arg(*values, PyObject *);
        if (object) py->Py_IncRef(object);
        return object;
    }
    default: return va_arg(*values, PyObject *);
    }
}

/* (status, message) of a call that failed. */
static trtxpy_status told(const trtxpy_python *py, PyObject *tuple, const char *function) {
    trtxpy_reader reader = {py, tuple, false};
    int64_t status = trtxpy_read_int(&reader, 0);
    if (!reader.failed && status == TRTXPY_OK) return TRTXPY_OK;
    char *text = reader.failed ? NULL : trtxpy_read_text(&reader, 1);
    trtxpy_status result = text ? trtxpy_fail_text((trtxpy_status)status, text)
                                : trtxpy_fail(TRTXPY_INTERNAL, "%s returned something that is no status", function);
    free(text);
    return result;
}

trtxpy_status trtxpy_call(const trtxpy_scope *scope, PyObject **result, const char *function, const char *format, ...) {
    const trtxpy_python *py = scope->py;
    size_t count = strlen(format);
    PyObject *arguments = py->PyTuple_New((ptrdiff_t)count), *callable = NULL;
    bool complete = arguments != NULL;
    va_list values;
    va_start(values, format);
    for (size_t i = 0; i < count; i++) { /* to the end, so that each N is taken over */
        PyObject *item = argument(py, format[i], &values);
        if (!item) complete = false;
        if (item && arguments) py->PyTuple_SetItem(arguments, (ptrdiff_t)i, item);
        else if (item) py->Py_DecRef(item);
    }
    va_end(values);
    trtxpy_status status = TRTXPY_OK;
    *result = NULL;
    PyObject *control = trtxpy_host_control();
    if (complete && control) callable = py->PyObject_GetAttrString(control, function);
    if (callable) *result = py->PyObject_CallObject(callable, arguments);
    if (!*result)
        status = py->PyErr_Occurred() ? raised(py, function)
                                      : trtxpy_fail(control ? TRTXPY_INTERNAL : TRTXPY_CLOSED, "%s could not be called", function);
    else if ((status = told(py, *result, function)) != TRTXPY_OK) {
        py->Py_DecRef(*result);
        *result = NULL;
    }
    py->PyErr_Clear();
    if (callable) py->Py_DecRef(callable);
    if (arguments) py->Py_DecRef(arguments);
    return status;
}

size_t trtxpy_read_count(trtxpy_reader *reader) {
    ptrdiff_t count = reader->failed || !reader->tuple ? -1 : reader->py->PyTuple_Size(reader->tuple);
    if (count < 0) {
        reader->failed = true;
        reader->py->PyErr_Clear();
    }
    return count < 0 ? 0 : (size_t)count;
}

PyObject *trtxpy_read_object(trtxpy_reader *reader, size_t index) {
    if (index >= trtxpy_read_count(reader)) {
        reader->failed = true;
        return NULL;
    }
    return reader->py->PyTuple_GetItem(reader->tuple, (ptrdiff_t)index);
}

static void check(trtxpy_reader *reader) {
    if (!reader->py->PyErr_Occurred()) return;
    reader->py->PyErr_Clear();
    reader->failed = true;
}

int64_t trtxpy_read_int(trtxpy_reader *reader, size_t index) {
    PyObject *item = trtxpy_read_object(reader, index);
    if (!item) return 0;
    int64_t value = reader->py->PyLong_AsLongLong(item);
    check(reader);
    return value;
}

uint64_t trtxpy_read_unsigned(trtxpy_reader *reader, size_t index) {
    PyObject *item = trtxpy_read_object(reader, index);
    if (!item) return 0;
    uint64_t value = reader->py->PyLong_AsUnsignedLongLong(item);
    check(reader);
    return value;
}

char *trtxpy_read_text(trtxpy_reader *reader, size_t index) {
    PyObject *item = trtxpy_read_object(reader, index), *bytes = NULL;
    char *text = NULL, *copy = NULL;
    ptrdiff_t length = 0;
    if (item) bytes = reader->py->PyUnicode_AsUTF8String(item);
    if (bytes && reader->py->PyBytes_AsStringAndSize(bytes, &text, &length) == 0 && (copy = malloc((size_t)length + 1))) {
        memcpy(copy, text, (size_t)length);
        copy[length] = '\0';
    }
    if (bytes) reader->py->Py_DecRef(bytes);
    reader->py->PyErr_Clear();
    if (!copy) reader->failed = true;
    return copy;
}

trtxpy_reader trtxpy_read_tuple(trtxpy_reader *reader, size_t index) {
    trtxpy_reader inner = {reader->py, trtxpy_read_object(reader, index), reader->failed};
    trtxpy_read_count(&inner);
    if (inner.failed) reader->failed = true;
    return inner;
}

void trtxpy_read_shape(trtxpy_reader *reader, size_t index, trtxpy_shape *shape) {
    trtxpy_reader dims = trtxpy_read_tuple(reader, index);
    memset(shape, 0, sizeof *shape);
    size_t rank = trtxpy_read_count(&dims);
    if (rank > TRTXPY_MAX_RANK) reader->failed = true;
    for (size_t axis = 0; axis < rank && axis < TRTXPY_MAX_RANK; axis++) shape->dims[axis] = trtxpy_read_int(&dims, axis);
    shape->rank = (int32_t)rank;
    if (dims.failed) reader->failed = true;
}

PyObject *trtxpy_dims(const trtxpy_python *py, const trtxpy_shape *shape) {
    PyObject *tuple = py->PyTuple_New(shape->rank);
    for (int32_t axis = 0; tuple && axis < shape->rank; axis++) {
        PyObject *extent = py->PyLong_FromLongLong(shape->dims[axis]);
        if (!extent) {
            py->Py_DecRef(tuple);
            return NULL;
        }
        py->PyTuple_SetItem(tuple, axis, extent);
    }
    return tuple;
}

PyObject *trtxpy_pack(const trtxpy_python *py, size_t count, PyObject **items) {
    PyObject *tuple = py->PyTuple_New((ptrdiff_t)count);
    bool complete = tuple != NULL;
    for (size_t i = 0; i < count; i++) {
        if (!items[i]) complete = false;
        else if (tuple) py->PyTuple_SetItem(tuple, (ptrdiff_t)i, items[i]);
        else py->Py_DecRef(items[i]);
    }
    if (complete) return tuple;
    if (tuple) py->Py_DecRef(tuple);
    return NULL;
}

trtxpy_status trtxpy_check_graph_options(const trtxpy_graph_options *given, trtxpy_graph_options *options) {
    *options = (trtxpy_graph_options)TRTXPY_GRAPH_OPTIONS_INIT;
    trtxpy_status status = trtxpy_read_struct(options, sizeof *options, TRTXPY_SIZE_1_0(trtxpy_graph_options), given, "trtxpy_graph_options");
    if (status != TRTXPY_OK) return status;
    if (options->reserved) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "trtxpy_graph_options.reserved is %u; expected 0", options->reserved);
    if (options->range_count && !options->ranges)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "options.ranges is NULL; expected %zu ranges", options->range_count);
    for (size_t i = 0; i < options->range_count; i++) {
        const trtxpy_profile_range *range = &options->ranges[i];
        const trtxpy_shape *shapes[] = {&range->min, &range->opt, &range->max};
        if (!range->name) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "options.ranges[%zu].name is NULL", i);
        for (size_t j = 0; j < 3; j++) /* extents are for Python: of an input that is read as a shape they are values, -1 too */
            if (shapes[j]->rank < 0 || shapes[j]->rank > TRTXPY_MAX_RANK)
                return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s has rank %d; expected 0 to %d", range->name, (int)shapes[j]->rank,
                                   TRTXPY_MAX_RANK);
    }
    return TRTXPY_OK;
}

PyObject *trtxpy_graph_options_tuple(const trtxpy_python *py, const trtxpy_graph_options *options) {
    PyObject *ranges = options->ranges ? py->PyTuple_New((ptrdiff_t)options->range_count) : none(py);
    for (size_t i = 0; ranges && options->ranges && i < options->range_count; i++) {
        const trtxpy_profile_range *range = &options->ranges[i];
        PyObject *items[] = {py->PyUnicode_FromString(range->name), trtxpy_dims(py, &range->min), trtxpy_dims(py, &range->opt),
                             trtxpy_dims(py, &range->max)};
        PyObject *row = trtxpy_pack(py, 4, items);
        if (!row) {
            py->Py_DecRef(ranges);
            ranges = NULL;
        } else {
            py->PyTuple_SetItem(ranges, (ptrdiff_t)i, row);
        }
    }
    PyObject *items[] = {ranges,
                         options->precision ? py->PyUnicode_FromString(options->precision) : none(py),
                         py->PyLong_FromLongLong(options->optimization_level),
                         py->PyLong_FromLongLong(options->lanes),
                         py->PyLong_FromLongLong(options->slots),
                         py->PyLong_FromLongLong(options->max_graphs),
                         py->PyBool_FromLong(options->no_cuda_graphs != 0)};
    return trtxpy_pack(py, 7, items);
}
