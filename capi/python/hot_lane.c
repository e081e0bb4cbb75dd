/* Watcher and Lane: the native ones, as Python objects. */
#include "hot.h"

#include <structmember.h>

static int watcher_init(watcher_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, ":Watcher", names)) return -1;
    if (self->watcher) {
        PyErr_SetString(PyExc_RuntimeError, "a Watcher is initialised once");
        return -1;
    }
    if (trtx_watcher_create(&self->watcher) == CUDA_SUCCESS) return 0;
    self->watcher = NULL;
    PyErr_NoMemory();
    return -1;
}

static PyObject *watcher_close(watcher_object *self, PyObject *Py_UNUSED(none)) {
    if (self->lanes) {
        return PyErr_Format(PyExc_RuntimeError, "a Watcher with %zu open lanes cannot be closed: close them first",
                            self->lanes);
    }
    trtx_watcher *watcher = self->watcher;
    self->watcher = NULL;
    Py_BEGIN_ALLOW_THREADS
    trtx_watcher_destroy(watcher);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static void watcher_dealloc(watcher_object *self) {
    trtx_watcher_destroy(self->watcher); /* its thread never wants the GIL; lanes hold a reference: there are none */
    Py_TYPE(self)->tp_free(self);
}

static PyMethodDef watcher_methods[] = {
    {"close", (PyCFunction)watcher_close, METH_NOARGS, "Stop the thread. Its lanes must have been closed."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject trtx_watcher_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Watcher",
    .tp_doc = "One thread that looks after the lanes on which somebody sleeps.",
    .tp_basicsize = sizeof(watcher_object),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)watcher_init,
    .tp_dealloc = (destructor)watcher_dealloc,
    .tp_methods = watcher_methods,
};

static int lane_init(lane_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"api", "context", "stream", "slots", "watcher", "mode", NULL};
    PyObject *api;
    unsigned long long context, stream;
    Py_ssize_t slots;
    watcher_object *watcher;
    int mode;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OKKnO!i:Lane", names, &api, &context, &stream, &slots,
                                     &trtx_watcher_type, &watcher, &mode))
        return -1;
    const trtx_cuda_api *table = trtx_api_of(api, "Lane");
    if (!table) return -1;
    if (self->lane || self->watcher) {
        PyErr_SetString(PyExc_RuntimeError, "a Lane is initialised once");
        return -1;
    }
    if (!watcher->watcher) {
        PyErr_SetString(PyExc_RuntimeError, "Lane: its Watcher is closed");
        return -1;
    }
    if (slots < 1 || slots > TRTX_MAX_SLOTS || mode < 0 || mode > TRTX_WAKE_EFFICIENT) {
        PyErr_Format(PyExc_ValueError, "Lane: 1 to %d slots and mode 0 to %d, not %zd and %d", (int)TRTX_MAX_SLOTS,
                     (int)TRTX_WAKE_EFFICIENT, slots, mode);
        return -1;
    }
    CUresult status = trtx_lane_create(&self->lane, table, (CUcontext)(uintptr_t)context, (CUstream)(uintptr_t)stream,
                                       (size_t)slots, watcher->watcher, (trtx_wake_mode)mode);
    if (status != CUDA_SUCCESS) {
        self->lane = NULL;
        PyObject *arguments = Py_BuildValue("(si)", "the lane's events could not be made", (int)status); /* for the caller's type */
        if (arguments) PyErr_SetObject(PyExc_RuntimeError, arguments);
        Py_XDECREF(arguments);
        return -1;
    }
    self->slots = (size_t)slots;
    self->mode = mode;
    self->api = Py_NewRef(api);
    self->watcher = (watcher_object *)Py_NewRef(watcher);
    watcher->lanes++;
    return 0;
}

static void lane_dealloc(lane_object *self) {
    if (self->lane && trtx_lane_destroy(self->lane) != CUDA_SUCCESS) {
        Py_TYPE(self)->tp_free(self); /* the GPU still works for it: what it uses is leaked, rather than freed too soon */
        return;
    }
    if (self->watcher) {
        if (self->lane) self->watcher->lanes--;
        Py_DECREF(self->watcher);
    }
    Py_XDECREF(self->api);
    PyMem_Free(self->ports);
    Py_TYPE(self)->tp_free(self);
}

int trtx_lane_add_port(lane_object *lane, port_object *port) {
    for (size_t i = 0; i < lane->port_count; i++) {
        if (lane->ports[i].port != port) continue;
        lane->ports[i].buckets++;
        return 0;
    }
    if (lane->port_count == lane->port_room) {
        size_t room = lane->port_room ? lane->port_room * 2 : 4;
        void *ports = PyMem_Realloc(lane->ports, room * sizeof *lane->ports);
        if (!ports) {
            PyErr_NoMemory();
            return -1;
        }
        lane->ports = ports;
        lane->port_room = room;
    }
    lane->ports[lane->port_count].port = port;
    lane->ports[lane->port_count++].buckets = 1;
    return 0;
}

void trtx_lane_remove_port(lane_object *lane, port_object *port) {
    for (size_t i = 0; i < lane->port_count; i++) {
        if (lane->ports[i].port != port) continue;
        if (--lane->ports[i].buckets == 0) lane->ports[i] = lane->ports[--lane->port_count];
        return;
    }
}

bool trtx_lane_wanted(const lane_object *lane) {
    for (size_t i = 0; i < lane->port_count; i++)
        if (lane->ports[i].port->queued) return true;
    return false;
}

void trtx_lane_freed(lane_object *lane, hub_object *current) {
    if (!trtx_lane_wanted(lane)) return;
    Py_INCREF(lane);
    for (size_t i = 0; i < lane->port_count; i++)
        if (lane->ports[i].port->queued) trtx_port_pump(lane->ports[i].port, lane, current);
    Py_DECREF(lane);
}

static trtx_lane *open_lane(lane_object *self) {
    if (!self->lane) PyErr_SetString(PyExc_RuntimeError, "the Lane is closed");
    return self->lane;
}

static int slot_argument(lane_object *self, PyObject *argument, size_t *slot) {
    *slot = PyLong_AsSize_t(argument);
    if (*slot == (size_t)-1 && PyErr_Occurred()) return -1;
    return open_lane(self) ? 0 : -1;
}

static PyObject *lane_acquire(lane_object *self, PyObject *Py_UNUSED(none)) {
    size_t slot;
    if (!open_lane(self)) return NULL;
    return PyLong_FromLong(trtx_lane_acquire(self->lane, &slot) == CUDA_SUCCESS ? (long)slot : -1);
}

static PyObject *lane_release(lane_object *self, PyObject *argument) {
    size_t slot;
    if (slot_argument(self, argument, &slot) < 0) return NULL;
    if (trtx_lane_release(self->lane, slot) == CUDA_ERROR_INVALID_VALUE)
        return PyErr_Format(PyExc_ValueError, "slot %zu is not held: the lane has %zu slots, and each is given back once",
                            slot, self->slots);
    trtx_lane_freed(self, NULL);
    Py_RETURN_NONE;
}

static PyObject *lane_submit(lane_object *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2 && count != 3) return PyErr_Format(PyExc_TypeError, "Lane.submit(slot, exec, token=0), got %zd arguments", count);
    size_t slot;
    unsigned long long exec = PyLong_AsUnsignedLongLong(args[1]);
    if (exec == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    unsigned long long token = count == 3 ? PyLong_AsUnsignedLongLong(args[2]) : 0;
    if (token == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    if (slot_argument(self, args[0], &slot) < 0) return NULL;
    return PyLong_FromLong(trtx_lane_submit(self->lane, slot, (CUgraphExec)(uintptr_t)exec, token, NULL));
}

static PyObject *lane_mark(lane_object *self, PyObject *argument) {
    size_t slot;
    if (slot_argument(self, argument, &slot) < 0) return NULL;
    return PyLong_FromLong(trtx_lane_mark(self->lane, slot, 0, NULL));
}

static PyObject *lane_wait(lane_object *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 3) return PyErr_Format(PyExc_TypeError, "Lane.wait(slot, spin_ns, timeout_ns), got %zd arguments", count);
    size_t slot;
    unsigned long long spin = PyLong_AsUnsignedLongLong(args[1]);
    if (spin == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    unsigned long long timeout = PyLong_AsUnsignedLongLong(args[2]);
    if (timeout == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    if (slot_argument(self, args[0], &slot) < 0) return NULL;
    if (slot >= self->slots) return PyErr_Format(PyExc_ValueError, "slot %zu: the lane has %zu", slot, self->slots);
    trtx_completion completion = {0};
    trtx_slot_state state;
    self->users++; /* nobody closes the lane meanwhile */
    Py_BEGIN_ALLOW_THREADS
    state = trtx_lane_wait(self->lane, slot, spin, timeout, &completion);
    Py_END_ALLOW_THREADS
    self->users--;
    return Py_BuildValue("iiKK", (int)state, completion.status, (unsigned long long)completion.launched_ns,
                         (unsigned long long)completion.completed_ns);
}

static PyObject *lane_poll(lane_object *self, PyObject *Py_UNUSED(none)) {
    return open_lane(self) ? PyLong_FromSize_t(trtx_lane_poll(self->lane)) : NULL;
}

static PyObject *lane_statistics(lane_object *self, PyObject *Py_UNUSED(none)) {
    if (!open_lane(self)) return NULL;
    trtx_lane_statistics s;
    trtx_lane_get_statistics(self->lane, &s);
    return Py_BuildValue("{sKsKsKsKsnsnsisKsKsK}", "submitted", (unsigned long long)s.submitted, "completed",
                         (unsigned long long)s.completed, "failed", (unsigned long long)s.failed, "dropped",
                         (unsigned long long)s.dropped, "in_flight", (Py_ssize_t)s.in_flight, "held", (Py_ssize_t)s.held,
                         "dead", s.dead, "expected_ns", (unsigned long long)s.expected_ns, "launch_ns_total",
                         (unsigned long long)s.launch_ns_total, "polls", (unsigned long long)s.polls);
}

static PyObject *lane_close(lane_object *self, PyObject *Py_UNUSED(none)) {
    if (!self->lane) Py_RETURN_TRUE;
    if (self->users) Py_RETURN_FALSE;
    trtx_lane *lane = self->lane;
    CUresult status;
    self->lane = NULL; /* while the GIL is free nobody shall find it */
    Py_BEGIN_ALLOW_THREADS
    status = trtx_lane_destroy(lane);
    Py_END_ALLOW_THREADS
    if (status != CUDA_SUCCESS) {
        self->lane = lane;
        Py_RETURN_FALSE;
    }
    self->watcher->lanes--;
    Py_RETURN_TRUE;
}

static PyObject *lane_dead(lane_object *self, void *Py_UNUSED(closure)) {
    return PyLong_FromLong(self->lane ? trtx_lane_glance(self->lane).dead : 0);
}

static PyMethodDef lane_methods[] = {
    {"acquire", (PyCFunction)lane_acquire, METH_NOARGS, "Take a free slot; -1 if there is none."},
    {"release", (PyCFunction)lane_release, METH_O, "Give a slot back; in flight, it comes back when the GPU is done."},
    {"submit", (PyCFunction)(void (*)(void))lane_submit, METH_FASTCALL, "Launch a graph for a held slot. Returns a CUresult."},
    {"mark", (PyCFunction)lane_mark, METH_O, "As submit, for work that was enqueued on the stream. Returns a CUresult."},
    {"wait", (PyCFunction)(void (*)(void))lane_wait, METH_FASTCALL, "Block until a slot is not in flight; timeout_ns 0: for ever."},
    {"poll", (PyCFunction)lane_poll, METH_NOARGS, "Look what is done; returns how many are in flight."},
    {"statistics", (PyCFunction)lane_statistics, METH_NOARGS, "Counters, by name."},
    {"close", (PyCFunction)lane_close, METH_NOARGS, "End the lane. False while something is in flight or looked at."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef lane_members[] = {
    {"slots", T_PYSSIZET, offsetof(lane_object, slots), READONLY, "How many slots it has."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef lane_properties[] = {
    {"dead", (getter)lane_dead, NULL, "The sticky CUresult that ended the lane, 0 while it lives.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject trtx_lane_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Lane",
    .tp_doc = "One stream, and slots for what is in flight on it.",
    .tp_basicsize = sizeof(lane_object),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)lane_init,
    .tp_dealloc = (destructor)lane_dealloc,
    .tp_methods = lane_methods,
    .tp_members = lane_members,
    .tp_getset = lane_properties,
};
