/* mock_backend._native: the module and Mock, one instance of the C mock driver. */
#include "python_mock.h"

#include <pthread.h>
#include <stdbool.h>
#include <unistd.h>

/* ---- making and ending ---- */

static PyObject *mock_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"devices", "memory_bytes", "compute_capability", "virtual_time", "instant", "time", "clock", NULL};
    trtx_mock_options options = {.struct_size = sizeof options, .memory_bytes = (size_t)8 << 30, .devices = 1,
                                 .compute_capability_major = 8, .compute_capability_minor = 9};
    Py_ssize_t memory_bytes = (Py_ssize_t)options.memory_bytes;
    PyObject *time = Py_None, *clock = Py_None;
    trtx_mock_clock made;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|in(ii)ppOO", names, &options.devices, &memory_bytes,
                                     &options.compute_capability_major, &options.compute_capability_minor,
                                     &options.virtual_time, &options.instant, &time, &clock))
        return NULL;
    if (options.devices < 0 || options.devices > 8)
        return PyErr_Format(PyExc_ValueError, "devices is %d; the mock has 0 to 8", options.devices);
    if (memory_bytes <= 0)
        return PyErr_Format(PyExc_ValueError, "memory_bytes is %zd; a device has at least one byte", memory_bytes);
    if (time != Py_None && !PyObject_TypeCheck(time, &time_type))
        return PyErr_Format(PyExc_TypeError, "time is a %s; expected Time or None", Py_TYPE(time)->tp_name);
    options.memory_bytes = (size_t)memory_bytes;
    mock_object *self = (mock_object *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->process = (long)getpid();
    if (!(self->mock = trtx_mock_create(&options))) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    if (clock != Py_None) {
        self->clock = Py_NewRef(clock);
        clock_of_python(clock, &made);
    } else {
        clock_of_machine(&made);
    }
    trtx_mock_set_time(self->mock, time == Py_None ? NULL : ((time_object *)time)->time, &made);
    return (PyObject *)self;
}

typedef struct ending {
    trtx_mock *mock;
    PyObject *clock;
} ending;

static void end_mock(const ending *last) {
    trtx_mock_destroy(last->mock);
    if (last->clock && may_take_gil()) {
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(last->clock);
        PyGILState_Release(state);
    }
}

static void *end_mock_later(void *argument) {
    end_mock(argument);
    PyMem_RawFree(argument);
    return NULL;
}

/* Ending waits for the streams' threads. A callback of one of them must not, and nobody should for work that goes on: then a
 * thread of its own does. Not at all in a forked child, which has none of the threads, nor at the interpreter's end, when
 * they can no longer finish. */
static void mock_dealloc(mock_object *self) {
    ending *last = self->mock && self->process == (long)getpid() && may_take_gil() ? PyMem_RawMalloc(sizeof *last) : NULL;
    if (last) {
        *last = (ending){self->mock, self->clock};
        pthread_t thread;
        if ((in_callback() || trtx_mock_is_busy(self->mock)) && pthread_create(&thread, NULL, end_mock_later, last) == 0) {
            pthread_detach(thread);
        } else {
            Py_BEGIN_ALLOW_THREADS
            end_mock_later(last);
            Py_END_ALLOW_THREADS
        }
    }
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static void drop_api(PyObject *capsule) { Py_XDECREF((PyObject *)PyCapsule_GetContext(capsule)); }

/* The capsule keeps the instance: who holds the table may hold handles. */
static PyObject *mock_api_of(mock_object *self, void *Py_UNUSED(closure)) {
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)trtx_mock_api(), TRTX_API_CAPSULE, drop_api);
    if (capsule && PyCapsule_SetContext(capsule, Py_NewRef((PyObject *)self)) != 0)
        Py_CLEAR(capsule);
    return capsule;
}

static PyObject *mock_select(mock_object *self, PyObject *Py_UNUSED(none)) {
    trtx_mock_select(self->mock);
    Py_RETURN_NONE;
}

static PyObject *mock_close(mock_object *self, PyObject *Py_UNUSED(none)) {
    trtx_mock_close(self->mock);
    Py_RETURN_NONE;
}

/* ---- order ---- */

static int read_position(PyObject *object, trtx_mock_position *position) {
    unsigned long long place, sequence;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "a position is what launch returned");
        return 0;
    }
    if (!PyArg_ParseTuple(object, "KK", &place, &sequence))
        return 0;
    *position = (trtx_mock_position){(uintptr_t)place, sequence};
    return 1;
}

static PyObject *mock_is_reached(mock_object *Py_UNUSED(self), PyObject *object) {
    trtx_mock_position position;
    return read_position(object, &position) ? PyBool_FromLong(trtx_mock_is_reached(position)) : NULL;
}

static PyObject *mock_is_observed(mock_object *Py_UNUSED(self), PyObject *object) {
    trtx_mock_position position;
    return read_position(object, &position) ? PyBool_FromLong(trtx_mock_is_observed(position)) : NULL;
}

static PyObject *mock_is_ordered_after(mock_object *self, PyObject *args) {
    trtx_mock_position position;
    unsigned long long stream;
    PyObject *object;
    if (!PyArg_ParseTuple(args, "KO", &stream, &object) || !read_position(object, &position))
        return NULL;
    return PyBool_FromLong(trtx_mock_is_ordered_after(self->mock, (CUstream)(uintptr_t)stream, position));
}

static PyObject *mock_wait(mock_object *self, PyObject *object) {
    trtx_mock_position position;
    if (!read_position(object, &position))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    trtx_mock_await(self->mock, position);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *mock_capture_status(mock_object *Py_UNUSED(self), PyObject *stream) {
    unsigned long long handle = PyLong_AsUnsignedLongLong(stream);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(trtx_mock_capture_status((CUstream)(uintptr_t)handle));
}

/* ---- memory and devices ---- */

static PyObject *mock_reserve(mock_object *self, PyObject *args) {
    Py_ssize_t bytes;
    const char *label;
    CUdeviceptr pointer = 0;
    if (!PyArg_ParseTuple(args, "ns", &bytes, &label))
        return NULL;
    trtx_mock_select(self->mock);
    CUresult code = trtx_mock_reserve((size_t)bytes, label, &pointer);
    return Py_BuildValue("iK", (int)code, pointer);
}

static PyObject *mock_unreserve(mock_object *self, PyObject *pointer) {
    unsigned long long address = PyLong_AsUnsignedLongLong(pointer);
    if (PyErr_Occurred())
        return NULL;
    trtx_mock_unreserve(self->mock, address);
    Py_RETURN_NONE;
}

static PyObject *mock_is_device_address(mock_object *self, PyObject *pointer) {
    unsigned long long address = PyLong_AsUnsignedLongLong(pointer);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(trtx_mock_is_device_address(self->mock, address));
}

static PyObject *mock_current(mock_object *self, PyObject *Py_UNUSED(none)) {
    int device;
    CUresult code = trtx_mock_current(self->mock, &device);
    return Py_BuildValue("ii", (int)code, device);
}

static PyObject *mock_lose(mock_object *self, PyObject *args) {
    int code;
    const char *detail;
    if (!PyArg_ParseTuple(args, "is", &code, &detail))
        return NULL;
    trtx_mock_lose(self->mock, code, detail);
    Py_RETURN_NONE;
}

/* ---- faults, counts, time ---- */

static PyObject *mock_inject(mock_object *self, PyObject *args) {
    const char *call;
    unsigned long long nth, count, delay_ns;
    int error, lose_device, device = -1;
    if (!PyArg_ParseTuple(args, "sKKiKi|i", &call, &nth, &count, &error, &delay_ns, &lose_device, &device))
        return NULL;
    CUresult code = trtx_mock_inject_on(self->mock, device, call, nth, count, error, delay_ns, lose_device);
    if (code)
        return PyErr_Format(PyExc_ValueError, "no fault can be planned for call %llu of %s", nth, call);
    Py_RETURN_NONE;
}

static PyObject *mock_clear_faults(mock_object *self, PyObject *Py_UNUSED(none)) {
    trtx_mock_clear_faults(self->mock);
    Py_RETURN_NONE;
}

static PyObject *mock_calls(mock_object *self, PyObject *Py_UNUSED(none)) {
    PyObject *calls = PyDict_New();
    const char *name;
    for (size_t i = 0; calls && (name = trtx_mock_call_name(i)); i++) {
        uint64_t count = trtx_mock_calls(self->mock, name);
        PyObject *number = count ? PyLong_FromUnsignedLongLong(count) : NULL;
        if (count && (!number || PyDict_SetItemString(calls, name, number) != 0))
            Py_CLEAR(calls);
        Py_XDECREF(number);
    }
    return calls;
}

static PyObject *mock_now(mock_object *self, PyObject *Py_UNUSED(none)) {
    return PyLong_FromUnsignedLongLong(trtx_mock_now(self->mock));
}

static PyObject *mock_advance(mock_object *self, PyObject *ns) {
    unsigned long long value = PyLong_AsUnsignedLongLong(ns);
    if (PyErr_Occurred())
        return NULL;
    trtx_mock_advance(self->mock, value);
    Py_RETURN_NONE;
}

/* ---- reports ---- */

static PyObject *lines_of(mock_object *self, size_t (*report)(trtx_mock *, char *, size_t)) {
    for (size_t room = 4096;;) {
        char *text = PyMem_Malloc(room + 1);
        if (!text)
            return PyErr_NoMemory();
        size_t needed = report(self->mock, text, room + 1);
        if (needed <= room) {
            PyObject *whole = PyUnicode_DecodeUTF8(text, needed ? (Py_ssize_t)strlen(text) : 0, "replace");
            PyObject *lines = whole ? PyUnicode_Splitlines(whole, 0) : NULL;
            Py_XDECREF(whole);
            PyMem_Free(text);
            return lines;
        }
        PyMem_Free(text);
        room = needed * 2; /* other threads may add to it meanwhile */
    }
}

static PyObject *mock_leaks(mock_object *self, PyObject *Py_UNUSED(none)) { return lines_of(self, trtx_mock_leaks); }

static PyObject *mock_damage(mock_object *self, PyObject *Py_UNUSED(none)) { return lines_of(self, trtx_mock_damage); }

static PyObject *mock_told(mock_object *self, PyObject *Py_UNUSED(none)) {
    char text[2048];
    trtx_mock_told(self->mock, text, sizeof text);
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

static PyObject *mock_blame(mock_object *self, PyObject *args) {
    const char *text;
    if (!PyArg_ParseTuple(args, "s", &text))
        return NULL;
    trtx_mock_blame(self->mock, text);
    Py_RETURN_NONE;
}

static PyObject *mock_usage(mock_object *self, PyObject *Py_UNUSED(none)) {
    trtx_mock_usage usage;
    trtx_mock_get_usage(self->mock, &usage);
    return Py_BuildValue("{sn sn sn sn sn sn sn sn sn sn}", "device_bytes", usage.device_bytes, "device_blocks",
                         usage.device_blocks, "pinned_bytes", usage.pinned_bytes, "pinned_blocks", usage.pinned_blocks,
                         "streams", usage.streams, "events", usage.events, "graphs", usage.graphs, "execs", usage.execs,
                         "retained_contexts", usage.retained_contexts, "damage", usage.damage);
}

#define METHOD(name, flags, doc) {#name, (PyCFunction)(void (*)(void))mock_##name, flags, doc}
static PyMethodDef mock_methods[] = {
    METHOD(select, METH_NOARGS, "Calls of this thread that name no handle go to this instance."),
    METHOD(close, METH_NOARGS, "End the streams' threads once their work is done; waits for nothing."),
    {"launch", (PyCFunction)(void (*)(void))launch_python, METH_VARARGS | METH_KEYWORDS,
     "launch(stream, duration_ns=0, kernel=None, *, counted=True, region=None) -> (code, position): enqueue a kernel."},
    {"launch_blank", (PyCFunction)(void (*)(void))launch_blank, METH_VARARGS | METH_KEYWORDS,
     "Enqueue a kernel that checks all its memory and leaves zeros -> (code, position)."},
    {"view", (PyCFunction)view_of, METH_VARARGS, "view(address, nbytes): bytes of a live block. Raises DeviceFaultError."},
    METHOD(is_reached, METH_O, "True if everything up to the position is done."),
    METHOD(is_observed, METH_O, "True if the application knows that it is done."),
    METHOD(is_ordered_after, METH_VARARGS, "is_ordered_after(stream, position): what comes next on it runs later."),
    METHOD(wait, METH_O, "Wait until the position is reached."),
    METHOD(capture_status, METH_O, "0: the stream runs what it is given, 1: it is captured, 2: its capture is invalid."),
    METHOD(reserve, METH_VARARGS, "reserve(nbytes, label) -> (code, pointer): memory for TensorRT itself."),
    METHOD(unreserve, METH_O, "Give back what reserve returned, unless its context did so already."),
    METHOD(is_device_address, METH_O, "True for an address of a device, allocated or not."),
    METHOD(current, METH_NOARGS, "-> (code, ordinal): the device that is current and usable in this thread."),
    METHOD(lose, METH_VARARGS, "lose(code, why): the context that is current in this thread becomes unusable."),
    METHOD(inject, METH_VARARGS, "inject(call, nth, count, error, delay_ns, lose_device, device=-1); count 0: for ever."),
    METHOD(clear_faults, METH_NOARGS, "Forget all planned faults."),
    METHOD(calls, METH_NOARGS, "How often each driver function was called, and \"execute\" for kernels."),
    METHOD(now, METH_NOARGS, "Nanoseconds of its clock."),
    METHOD(advance, METH_O, "Move a virtual clock forward by so many nanoseconds."),
    METHOD(leaks, METH_NOARGS, "What is open or allocated, one text each."),
    METHOD(damage, METH_NOARGS, "What no error tells of, one text each."),
    METHOD(told, METH_NOARGS, "Why the kernel had no result whose failure an event told last."),
    METHOD(blame, METH_VARARGS, "Keep a damage that the code above the driver found."),
    METHOD(usage, METH_NOARGS, "Counts and bytes of what is open and allocated."),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef mock_properties[] = {
    {"api", (getter)mock_api_of, NULL, "A capsule with the table of driver functions; keeps the instance alive.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject mock_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "mock_backend._native.Mock",
    .tp_doc = "Mock(devices=1, memory_bytes=8 << 30, compute_capability=(8, 9), virtual_time=False, instant=False, time=None, "
              "clock=None): one instance of the C mock driver.",
    .tp_basicsize = sizeof(mock_object),
    .tp_new = mock_new,
    .tp_dealloc = (destructor)mock_dealloc,
    .tp_methods = mock_methods,
    .tp_getset = mock_properties,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

/* ---- the module ---- */

static PyObject *set_site(PyObject *Py_UNUSED(module), PyObject *args) {
    const char *where;
    if (!PyArg_ParseTuple(args, "z", &where))
        return NULL;
    trtx_mock_site(where);
    Py_RETURN_NONE;
}

/* The reason must be that of the failure asked for: some have none, and the latest may be an older one's. */
static PyObject *get_reason(PyObject *Py_UNUSED(module), PyObject *args) {
    const char *call, *failed;
    int code;
    CUresult failed_code;
    if (!PyArg_ParseTuple(args, "si", &call, &code))
        return NULL;
    const char *why = trtx_mock_reason(&failed, &failed_code);
    if (failed_code != code || (*call && strcmp(call, failed) != 0))
        why = "";
    return PyUnicode_DecodeUTF8(why, (Py_ssize_t)strlen(why), "replace");
}

static PyMethodDef functions[] = {
    {"site", set_site, METH_VARARGS, "Where the caller is: kept with what this thread allocates and creates from now on."},
    {"reason", get_reason, METH_VARARGS, "reason(call, code): why this thread's latest failing call failed; call \"\": any."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "mock_backend._native", .m_size = -1, .m_methods = functions,
    .m_doc = "The C mock driver.",
};

PyMODINIT_FUNC PyInit__native(void) {
    static const struct {
        const char *name;
        PyTypeObject *type;
    } types[] = {{"Mock", &mock_type}, {"View", &view_type}, {"Time", &time_type}, {"Stamp", &stamp_type}, {"Region", &region_type}};
    PyObject *module = PyModule_Create(&definition);
    bool ready = module && kernels_ready(module);
    for (size_t i = 0; ready && i < sizeof types / sizeof types[0]; i++)
        ready = PyType_Ready(types[i].type) == 0 && PyModule_AddObjectRef(module, types[i].name, (PyObject *)types[i].type) == 0;
    PyObject *names = ready ? PyList_New(0) : NULL;
    const char *name;
    for (size_t i = 0; names && (name = trtx_mock_call_name(i)); i++) {
        PyObject *text = PyUnicode_FromString(name);
        if (!text || PyList_Append(names, text) != 0)
            Py_CLEAR(names);
        Py_XDECREF(text);
    }
    ready = names && PyModule_AddObjectRef(module, "CALLS", names) == 0;
    Py_XDECREF(names);
    if (!ready)
        Py_CLEAR(module);
    return module;
}
