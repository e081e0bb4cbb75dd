/* Hub: where the completions of one event loop come in. */
#include "hot.h"

#include <structmember.h>

/* More at once than any loop has in flight as a rule; the rest comes in the next round. */
enum { BATCH = 64 };

static int hub_init(hub_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"make_future", NULL};
    PyObject *make_future;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:Hub", names, &make_future)) return -1;
    if (make_future != Py_None && !PyCallable_Check(make_future)) {
        PyErr_Format(PyExc_TypeError, "Hub: make_future is a loop's create_future, or None, not %R", make_future);
        return -1;
    }
    if (self->hub) {
        PyErr_SetString(PyExc_RuntimeError, "a Hub is initialised once");
        return -1;
    }
    CUresult status = trtx_hub_create(&self->hub, &self->fd);
    if (status != CUDA_SUCCESS) {
        self->hub = NULL;
        PyErr_Format(PyExc_OSError, "no eventfd for a Hub: status %d; the process may be out of file descriptors", status);
        return -1;
    }
    if (!(self->pumping = PySet_New(NULL))) return -1;
    if (make_future != Py_None) self->make_future = Py_NewRef(make_future);
    return 0;
}

static int hub_traverse(hub_object *self, visitproc visit, void *arg) {
    Py_VISIT(self->make_future);
    Py_VISIT(self->pumping);
    return 0;
}

static int hub_clear(hub_object *self) {
    Py_CLEAR(self->make_future);
    Py_CLEAR(self->pumping);
    return 0;
}

static void hub_dealloc(hub_object *self) {
    PyObject_GC_UnTrack(self);
    if (self->weak_references) PyObject_ClearWeakRefs((PyObject *)self);
    hub_clear(self);
    trtx_hub_release(self->hub);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *find(uint64_t token) {
    if (!(token & TRTX_PLACE_TAG)) return (PyObject *)(uintptr_t)token;
    return (PyObject *)((place_object *)(uintptr_t)(token & ~(uint64_t)TRTX_PLACE_TAG))->wait;
}

int trtx_hub_drain(hub_object *hub) {
    trtx_completion completions[BATCH];
    PyObject *waits[BATCH];
    size_t taken;
    Py_INCREF(hub);
    do {
        taken = trtx_hub_take(hub->hub, completions, BATCH);
        size_t count = 0;
        /* All of them are held before the first one's waker runs: that may end another. */
        for (size_t i = 0; i < taken; i++) {
            PyObject *wait = find(completions[i].token);
            if (wait) waits[count++] = Py_NewRef(wait);
        }
        for (size_t i = 0; i < count; i++) {
            wait_object *wait = (wait_object *)waits[i];
            /* Its slot is wanted: do not hold it until the waiter has its turn. */
            if (wait->state == WAIT_IN_FLIGHT && wait->port && wait->port->queued && trtx_wait_is_done(wait))
                trtx_wait_settle(wait, hub);
            trtx_wait_wake(wait);
            Py_DECREF(wait);
        }
    } while (taken == BATCH);
    Py_DECREF(hub);
    return 0;
}

static PyObject *hub_drain(hub_object *self, PyObject *Py_UNUSED(none)) {
    if (self->hub) trtx_hub_drain(self);
    Py_RETURN_NONE;
}

static PyMethodDef hub_methods[] = {
    {"drain", (PyCFunction)hub_drain, METH_NOARGS, "Take the completions that came in, and wake what sleeps on them."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef hub_members[] = {
    {"fd", T_INT, offsetof(hub_object, fd), READONLY, "Readable while there is something to drain. The Hub closes it."},
    {"pumping", T_OBJECT, offsetof(hub_object, pumping), READONLY, "A set for the loop's own use: the ports that it pumps."},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject trtx_hub_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Hub",
    .tp_doc = "Where the completions of one event loop come in.",
    .tp_basicsize = sizeof(hub_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)hub_init,
    .tp_dealloc = (destructor)hub_dealloc,
    .tp_traverse = (traverseproc)hub_traverse,
    .tp_clear = (inquiry)hub_clear,
    .tp_weaklistoffset = offsetof(hub_object, weak_references),
    .tp_methods = hub_methods,
    .tp_members = hub_members,
};
