/* Small objects: views of device memory, virtual time, stamps, regions. */
#include "python_mock.h"

/* ---- views ---- */

typedef struct view_object {
    PyObject_HEAD
    mock_object *owner;
    trtx_mock_view view;
    Py_ssize_t bytes;
} view_object;

PyObject *view_of(mock_object *self, PyObject *args) {
    unsigned long long pointer;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "Kn:view", &pointer, &bytes))
        return NULL;
    view_object *made = PyObject_New(view_object, &view_type);
    if (!made)
        return NULL;
    made->owner = NULL;
    made->view = (trtx_mock_view){0};
    made->bytes = bytes;
    CUresult code = bytes < 0 ? CUDA_ERROR_INVALID_VALUE : trtx_mock_pin(self->mock, pointer, (size_t)bytes, &made->view);
    if (code) {
        const char *call;
        CUresult reason_code;
        const char *why = bytes < 0 ? "a negative number of bytes" : trtx_mock_reason(&call, &reason_code);
        PyObject *arguments = Py_BuildValue("is", (int)code, why);
        if (arguments)
            PyErr_SetObject(device_fault_error, arguments);
        Py_XDECREF(arguments);
        Py_DECREF(made);
        return NULL;
    }
    made->owner = (mock_object *)Py_NewRef((PyObject *)self);
    return (PyObject *)made;
}

static void view_dealloc(view_object *self) {
    if (self->owner) {
        trtx_mock_unpin(self->owner->mock, &self->view);
        Py_DECREF(self->owner);
    }
    PyObject_Free(self);
}

static int view_buffer(view_object *self, Py_buffer *buffer, int flags) {
    return PyBuffer_FillInfo(buffer, (PyObject *)self, self->view.data, self->bytes, 0, flags);
}

static PyBufferProcs view_procs = {.bf_getbuffer = (getbufferproc)view_buffer};

PyTypeObject view_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "mock_backend._native.View",
    .tp_doc = "Writable bytes of a block of device memory; they stay valid when the block is freed.",
    .tp_basicsize = sizeof(view_object),
    .tp_dealloc = (destructor)view_dealloc,
    .tp_as_buffer = &view_procs,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

/* ---- virtual time ---- */

static PyObject *time_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"start_ns", NULL};
    unsigned long long start = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|K", names, &start))
        return NULL;
    time_object *self = (time_object *)type->tp_alloc(type, 0);
    if (self && !(self->time = trtx_mock_time_create(start))) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void time_dealloc(time_object *self) {
    trtx_mock_time_release(self->time);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *time_now(time_object *self, PyObject *Py_UNUSED(none)) {
    return PyLong_FromUnsignedLongLong(trtx_mock_time_now(self->time));
}

static PyObject *time_advance(time_object *self, PyObject *ns) {
    unsigned long long value = PyLong_AsUnsignedLongLong(ns);
    if (PyErr_Occurred())
        return NULL;
    trtx_mock_time_advance(self->time, value);
    Py_RETURN_NONE;
}

static PyMethodDef time_methods[] = {
    {"now", (PyCFunction)time_now, METH_NOARGS, "Nanoseconds since its start, plus start_ns."},
    {"advance", (PyCFunction)time_advance, METH_O, "Move it forward by so many nanoseconds."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject time_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "mock_backend._native.Time",
    .tp_doc = "Time(start_ns=0): a virtual time line that mocks can share.",
    .tp_basicsize = sizeof(time_object),
    .tp_new = time_new,
    .tp_dealloc = (destructor)time_dealloc,
    .tp_methods = time_methods,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

/* ---- stamps ---- */

static PyObject *stamp_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"value", NULL};
    unsigned long long value = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|K", names, &value))
        return NULL;
    stamp_object *self = (stamp_object *)type->tp_alloc(type, 0);
    if (self && !(self->stamp = trtx_mock_stamp_create(value))) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void stamp_dealloc(stamp_object *self) {
    trtx_mock_stamp_release(self->stamp);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *stamp_get(stamp_object *self, PyObject *Py_UNUSED(none)) {
    return PyLong_FromUnsignedLongLong(trtx_mock_stamp_get(self->stamp));
}

static PyObject *stamp_renew(stamp_object *self, PyObject *value) {
    unsigned long long number = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred())
        return NULL;
    trtx_mock_stamp_renew(self->stamp, number);
    Py_RETURN_NONE;
}

static PyObject *stamp_end(stamp_object *self, PyObject *Py_UNUSED(none)) {
    trtx_mock_stamp_set(self->stamp, TRTX_MOCK_ENDED);
    Py_RETURN_NONE;
}

static PyMethodDef stamp_methods[] = {
    {"get", (PyCFunction)stamp_get, METH_NOARGS, "Its value; 2**64 - 1 once it ended."},
    {"renew", (PyCFunction)stamp_renew, METH_O, "Give it another value, unless it ended."},
    {"end", (PyCFunction)stamp_end, METH_NOARGS, "Its execution context is destroyed."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject stamp_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "mock_backend._native.Stamp",
    .tp_doc = "Stamp(value=0): which settings an execution context has on the device; kernels write and compare it.",
    .tp_basicsize = sizeof(stamp_object),
    .tp_new = stamp_new,
    .tp_dealloc = (destructor)stamp_dealloc,
    .tp_methods = stamp_methods,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

/* ---- regions ---- */

static PyObject *region_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"mock", "address", "nbytes", "user", NULL};
    mock_object *owner;
    unsigned long long address;
    Py_ssize_t bytes;
    const char *user;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!Kns", names, &mock_type, &owner, &address, &bytes, &user))
        return NULL;
    region_object *self = (region_object *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->owner = (mock_object *)Py_NewRef((PyObject *)owner);
    self->region = trtx_mock_region_create(owner->mock, address, (size_t)bytes, user);
    if (!self->region) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void region_dealloc(region_object *self) {
    trtx_mock_region_release(self->region);
    Py_XDECREF((PyObject *)self->owner);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

PyTypeObject region_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "mock_backend._native.Region",
    .tp_doc = "Region(mock, address, nbytes, user): device memory that the kernels of one execution context write.",
    .tp_basicsize = sizeof(region_object),
    .tp_new = region_new,
    .tp_dealloc = (destructor)region_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};
