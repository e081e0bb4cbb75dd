/* One request in a batch that came the short way: what its task awaits. See rows.h. */
#include "rows.h"

#include <structmember.h>

static PyObject *context_name; /* ("context",) */

/* Out of its load, which counts it no more. */
static void leave(seat_object *seat) {
    load_object *load = seat->load;
    if (!load) return;
    seat->load = NULL;
    load->seats[seat->index] = NULL;
    load->live -= seat->rows;
    load->wanted--;
    load->filling -= seat->filler != NULL;
    Py_DECREF(load);
}

/* Have its loop run the task that waits. */
static void wake(seat_object *seat) {
    PyObject *callback = seat->callback, *context = seat->context;
    if (!callback) return;
    seat->callback = seat->context = NULL;
    PyObject *arguments[] = {NULL, callback, (PyObject *)seat, context};
    PyObject *handle = PyObject_Vectorcall(((gate_object *)seat->gate)->call_soon, arguments + 1,
                                           2 | PY_VECTORCALL_ARGUMENTS_OFFSET, context ? context_name : NULL);
    if (!handle) PyErr_WriteUnraisable(callback); /* the loop is closed */
    Py_XDECREF(handle);
    Py_DECREF(callback);
    Py_XDECREF(context);
}

void trtx_seat_end(seat_object *seat, seat_state state, PyObject *outcome) {
    if (seat->state != SEAT_WAITING) return;
    Py_INCREF(seat);
    seat->state = state;
    seat->outcome = Py_XNewRef(outcome);
    leave(seat);
    Py_CLEAR(seat->filler);
    wake(seat);
    Py_DECREF(seat);
}

seat_object *trtx_seat_new(gate_object *gate, load_object *load, Py_ssize_t rows, double now) {
    seat_object *seat = PyObject_GC_New(seat_object, &trtx_seat_type);
    if (!seat) return NULL;
    *seat = (seat_object){.ob_base = seat->ob_base, .index = load->count, .offset = load->stop, .rows = rows};
    seat->load = (load_object *)Py_NewRef(load);
    seat->gate = Py_NewRef((PyObject *)gate);
    load->arrivals[load->count] = now;
    load->seats[load->count++] = seat;
    load->stop += rows;
    load->live += rows;
    load->wanted++;
    PyObject_GC_Track(seat);
    return seat;
}

PyObject *trtx_seat_slice(const seat_object *seat) {
    PyObject *first = PyLong_FromSsize_t(seat->offset), *last = PyLong_FromSsize_t(seat->offset + seat->rows);
    PyObject *slice = first && last ? PySlice_New(first, last, NULL) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(last);
    return slice;
}

/* Its rows are written, or never will be. */
static void filled(seat_object *seat) {
    if (seat->load) seat->load->filling -= seat->filler != NULL;
    Py_CLEAR(seat->filler);
}

static int seat_traverse(seat_object *self, visitproc visit, void *arg) {
    Py_VISIT(self->gate);
    Py_VISIT(self->filler);
    Py_VISIT(self->outcome);
    Py_VISIT(self->callback);
    Py_VISIT(self->context);
    return 0;
}

static int seat_clear(seat_object *self) {
    filled(self);
    Py_CLEAR(self->outcome);
    Py_CLEAR(self->callback);
    Py_CLEAR(self->context);
    return 0;
}

static void seat_dealloc(seat_object *self) {
    PyObject_GC_UnTrack(self);
    leave(self);
    seat_clear(self); /* out of its load, which `filled` then leaves alone */
    Py_CLEAR(self->gate);
    PyObject_GC_Del(self);
}

/* What await has: NULL with an exception, or the outcome. */
static PyObject *outcome_of(seat_object *self) {
    switch (self->state) {
    case SEAT_DONE: return Py_NewRef(self->outcome);
    case SEAT_FAILED: PyErr_SetObject((PyObject *)Py_TYPE(self->outcome), self->outcome); return NULL;
    case SEAT_CANCELLED: PyErr_SetNone(((gate_object *)self->gate)->cancelled); return NULL;
    default: PyErr_SetString(PyExc_RuntimeError, "the request is still under way: await it as asyncio does"); return NULL;
    }
}

static PySendResult seat_send(seat_object *self, PyObject *Py_UNUSED(value), PyObject **result) {
    if (self->state == SEAT_WAITING && !self->blocking && !self->callback) {
        self->blocking = true;
        *result = Py_NewRef((PyObject *)self);
        return PYGEN_NEXT;
    }
    *result = outcome_of(self);
    return *result ? PYGEN_RETURN : PYGEN_ERROR;
}

static PyObject *seat_next(seat_object *self) {
    PyObject *result;
    PySendResult way = seat_send(self, NULL, &result);
    if (way != PYGEN_RETURN) return result;
    PyErr_SetObject(PyExc_StopIteration, result); /* a dictionary, which this takes as it is */
    Py_DECREF(result);
    return NULL;
}

static PyObject *seat_send_method(seat_object *self, PyObject *Py_UNUSED(value)) { return seat_next(self); }

static bool cancel(seat_object *self) {
    if (self->state != SEAT_WAITING) return false;
    trtx_seat_end(self, SEAT_CANCELLED, NULL);
    return true;
}

static PyObject *seat_throw(seat_object *self, PyObject *const *args, Py_ssize_t count) {
    if (count < 1 || count > 3) return PyErr_Format(PyExc_TypeError, "throw() takes 1 to 3 arguments, got %zd", count);
    PyObject *type = args[0], *value = count > 1 && args[1] != Py_None ? args[1] : NULL;
    PyObject *trace = count > 2 && args[2] != Py_None ? args[2] : NULL;
    Py_CLEAR(self->callback); /* the task that would be woken is the one that is here */
    Py_CLEAR(self->context);
    cancel(self);
    if (PyExceptionInstance_Check(type)) {
        value = type;
        type = (PyObject *)Py_TYPE(value);
    } else if (!PyExceptionClass_Check(type)) {
        return PyErr_Format(PyExc_TypeError, "throw() takes an exception, not %R", type);
    }
    PyErr_Restore(Py_NewRef(type), Py_XNewRef(value), Py_XNewRef(trace));
    return NULL;
}

static PyObject *seat_close(seat_object *self, PyObject *Py_UNUSED(none)) {
    cancel(self);
    Py_RETURN_NONE;
}

static PyObject *seat_cancel(seat_object *self, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(keywords)) {
    return PyBool_FromLong(cancel(self));
}

static PyObject *seat_done(seat_object *self, PyObject *Py_UNUSED(none)) { return PyBool_FromLong(self->state != SEAT_WAITING); }

static PyObject *seat_cancelled(seat_object *self, PyObject *Py_UNUSED(none)) {
    return PyBool_FromLong(self->state == SEAT_CANCELLED);
}

static PyObject *seat_result(seat_object *self, PyObject *Py_UNUSED(none)) { return outcome_of(self); }

static PyObject *seat_get_loop(seat_object *self, PyObject *Py_UNUSED(none)) { return Py_NewRef(((gate_object *)self->gate)->loop); }

static PyObject *seat_set_result(seat_object *self, PyObject *value) {
    trtx_seat_end(self, SEAT_DONE, value);
    Py_RETURN_NONE;
}

static PyObject *seat_set_exception(seat_object *self, PyObject *error) {
    if (!PyExceptionInstance_Check(error)) return PyErr_Format(PyExc_TypeError, "set_exception() takes an exception, not %R", error);
    trtx_seat_end(self, SEAT_FAILED, error);
    Py_RETURN_NONE;
}

static PyObject *seat_add_done_callback(seat_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"", "context", NULL};
    PyObject *callback, *context = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|$O:add_done_callback", names, &callback, &context)) return NULL;
    if (self->callback) {
        PyErr_SetString(PyExc_RuntimeError, "a seat is awaited by one task");
        return NULL;
    }
    self->callback = Py_NewRef(callback);
    self->context = context == Py_None ? NULL : Py_XNewRef(context);
    if (self->state != SEAT_WAITING) wake(self);
    Py_RETURN_NONE;
}

static PyObject *seat_get_blocking(seat_object *self, void *Py_UNUSED(closure)) { return PyBool_FromLong(self->blocking); }

static int seat_set_blocking(seat_object *self, PyObject *value, void *Py_UNUSED(closure)) {
    int blocking = value ? PyObject_IsTrue(value) : 0;
    if (blocking < 0) return -1;
    self->blocking = blocking;
    return 0;
}

static PyObject *seat_self(PyObject *self) { return Py_NewRef(self); }

static PyObject *seat_filled(seat_object *self, PyObject *Py_UNUSED(none)) {
    filled(self);
    return Py_NewRef(self->load ? (PyObject *)self->load : Py_None);
}

/* Its rows of each input, in the batch's memory. */
static PyObject *seat_inputs(seat_object *self, PyObject *Py_UNUSED(none)) {
    gate_object *gate = (gate_object *)self->gate;
    load_object *load = self->load;
    if (!load) return PyErr_Format(PyExc_RuntimeError, "the request has ended: its rows are not its own any more");
    PyObject *slice = trtx_seat_slice(self), *result = slice ? PyDict_New() : NULL;
    Py_INCREF(load);
    for (Py_ssize_t i = 0; result && i < gate->input_count; i++) {
        PyObject *view = PyObject_GetItem(PyTuple_GET_ITEM(load->views, i), slice);
        if (!view || PyDict_SetItem(result, PyTuple_GET_ITEM(gate->input_names, i), view) < 0) Py_CLEAR(result);
        Py_XDECREF(view);
    }
    Py_DECREF(load);
    Py_XDECREF(slice);
    return result;
}

static PyMethodDef seat_methods[] = {
    {"inputs", (PyCFunction)seat_inputs, METH_NOARGS, "Its rows of each input, to be filled: a new dict by name."},
    {"filled", (PyCFunction)seat_filled, METH_NOARGS, "Its rows are filled, the batch need not wait for them: its Load, or None."},
    {"send", (PyCFunction)seat_send_method, METH_O, "One step of await."},
    {"throw", (PyCFunction)(void (*)(void))seat_throw, METH_FASTCALL, "Take the request out, and raise."},
    {"close", (PyCFunction)seat_close, METH_NOARGS, "Take the request out."},
    {"cancel", (PyCFunction)(void (*)(void))seat_cancel, METH_VARARGS | METH_KEYWORDS, "As asyncio.Future.cancel."},
    {"done", (PyCFunction)seat_done, METH_NOARGS, "It has ended."},
    {"cancelled", (PyCFunction)seat_cancelled, METH_NOARGS, "It was taken out."},
    {"result", (PyCFunction)seat_result, METH_NOARGS, "The outputs, or the exception."},
    {"get_loop", (PyCFunction)seat_get_loop, METH_NOARGS, "The event loop."},
    {"set_result", (PyCFunction)seat_set_result, METH_O, "End it, unless it has ended."},
    {"set_exception", (PyCFunction)seat_set_exception, METH_O, "End it, unless it has ended."},
    {"add_done_callback", (PyCFunction)(void (*)(void))seat_add_done_callback, METH_VARARGS | METH_KEYWORDS,
     "For the one task that waits."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef seat_members[] = {
    {"offset", T_PYSSIZET, offsetof(seat_object, offset), READONLY, "Its first row in the batch."},
    {"rows", T_PYSSIZET, offsetof(seat_object, rows), READONLY, "How many rows it has."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef seat_properties[] = {
    {"_asyncio_future_blocking", (getter)seat_get_blocking, (setter)seat_set_blocking, "asyncio's own mark.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyAsyncMethods seat_async = {.am_await = seat_self, .am_send = (sendfunc)seat_send};

PyTypeObject trtx_seat_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Seat",
    .tp_doc = "One request in a batch: awaited by one asyncio task.",
    .tp_basicsize = sizeof(seat_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)seat_dealloc,
    .tp_traverse = (traverseproc)seat_traverse,
    .tp_clear = (inquiry)seat_clear,
    .tp_iter = seat_self,
    .tp_iternext = (iternextfunc)seat_next,
    .tp_as_async = &seat_async,
    .tp_methods = seat_methods,
    .tp_members = seat_members,
    .tp_getset = seat_properties,
};

int trtx_seat_register(void) {
    return context_name || (context_name = Py_BuildValue("(s)", "context")) ? 0 : -1;
}
