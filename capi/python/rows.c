/* Gates and loads: what lets rows into a batch the short way, and what came in. See rows.h. */
#include "rows.h"

#include <structmember.h>

static PyTypeObject load_type, gate_type;

/* ---- loads ---- */

static void load_dealloc(load_object *self) {
    if (self->gate && self->gate->load == self) self->gate->load = NULL;
    Py_XDECREF(self->gate);
    Py_XDECREF(self->views);
    PyMem_Free(self->data);
    PyMem_Free(self->seats); /* all have left: each held this load */
    PyMem_Free(self->arrivals);
    Py_TYPE(self)->tp_free(self);
}

/* A dictionary with copies of the seat's rows. */
static PyObject *cut(const gate_object *gate, PyObject *outputs, const seat_object *seat) {
    PyObject *slice = trtx_seat_slice(seat), *result = slice ? PyDict_New() : NULL;
    for (Py_ssize_t i = 0; result && i < gate->output_count; i++) {
        PyObject *view = PyObject_GetItem(PyTuple_GET_ITEM(outputs, i), slice);
        PyObject *copy = view ? PyObject_CallMethodNoArgs(view, trtx_str_copy) : NULL;
        if (!copy || PyDict_SetItem(result, PyTuple_GET_ITEM(gate->output_names, i), copy) < 0) Py_CLEAR(result);
        Py_XDECREF(view);
        Py_XDECREF(copy);
    }
    Py_XDECREF(slice);
    return result;
}

static PyObject *load_deliver(load_object *self, PyObject *outputs) {
    Py_ssize_t requests = 0, rows = 0;
    if (!PyTuple_Check(outputs) || PyTuple_GET_SIZE(outputs) != self->gate->output_count)
        return PyErr_Format(PyExc_TypeError, "deliver: expected a tuple of %zd arrays", self->gate->output_count);
    for (size_t i = 0; i < self->count; i++) {
        seat_object *seat = self->seats[i];
        if (!seat) continue;
        Py_INCREF(seat);
        PyObject *result = cut(self->gate, outputs, seat);
        if (result) {
            requests++;
            rows += seat->rows;
            trtx_seat_end(seat, SEAT_DONE, result);
        } else { /* no memory: for this one alone */
            PyObject *type, *error, *trace;
            PyErr_Fetch(&type, &error, &trace);
            PyErr_NormalizeException(&type, &error, &trace);
            trtx_seat_end(seat, SEAT_FAILED, error);
            Py_XDECREF(type);
            Py_XDECREF(error);
            Py_XDECREF(trace);
        }
        Py_XDECREF(result);
        Py_DECREF(seat);
    }
    return Py_BuildValue("nn", requests, rows);
}

/* The seats that wait. */
static PyObject *load_seats(load_object *self, PyObject *Py_UNUSED(none)) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < self->count; i++)
        if (self->seats[i] && PyList_Append(list, (PyObject *)self->seats[i]) < 0) Py_CLEAR(list);
    return list;
}

static PyObject *load_arrivals(load_object *self, PyObject *Py_UNUSED(none)) {
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(self->wanted * sizeof(double)));
    if (!bytes) return NULL;
    double *target = (double *)(void *)PyBytes_AS_STRING(bytes);
    for (size_t i = 0; i < self->count; i++)
        if (self->seats[i]) *target++ = self->arrivals[i];
    return bytes;
}

static PyObject *load_oldest(load_object *self, void *Py_UNUSED(closure)) {
    for (size_t i = 0; i < self->count; i++)
        if (self->seats[i]) return PyFloat_FromDouble(self->arrivals[i]);
    return PyFloat_FromDouble(Py_HUGE_VAL);
}

static PyObject *load_end(load_object *self, void *Py_UNUSED(closure)) {
    for (size_t i = self->count; i-- > 0;)
        if (self->seats[i]) return PyLong_FromSsize_t(self->seats[i]->offset + self->seats[i]->rows);
    return PyLong_FromSsize_t(self->start);
}

/* Who still fills rows. */
static PyObject *load_fillers(load_object *self, PyObject *Py_UNUSED(none)) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < self->count; i++) {
        seat_object *seat = self->seats[i];
        if (seat && seat->filler && PyList_Append(list, seat->filler) < 0) Py_CLEAR(list);
    }
    return list;
}

static PyMethodDef load_methods[] = {
    {"fillers", (PyCFunction)load_fillers, METH_NOARGS, "What was given to place() for those rows that are not filled yet."},
    {"deliver", (PyCFunction)load_deliver, METH_O, "Give each request its rows of these outputs: (requests, rows)."},
    {"seats", (PyCFunction)load_seats, METH_NOARGS, "The requests that wait."},
    {"arrivals", (PyCFunction)load_arrivals, METH_NOARGS, "When each of them came: doubles."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef load_members[] = {
    {"start", T_PYSSIZET, offsetof(load_object, start), READONLY, "The first row."},
    {"stop", T_PYSSIZET, offsetof(load_object, stop), READONLY, "Behind the last row that was written."},
    {"capacity", T_PYSSIZET, offsetof(load_object, capacity), READONLY, "Rows of the memory."},
    {"live", T_PYSSIZET, offsetof(load_object, live), READONLY, "Rows of requests that wait."},
    {"wanted", T_PYSSIZET, offsetof(load_object, wanted), READONLY, "Requests that wait."},
    {"count", T_PYSSIZET, offsetof(load_object, count), READONLY, "Requests that came."},
    {"filling", T_PYSSIZET, offsetof(load_object, filling), READONLY, "Requests whose rows are not filled yet."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef load_properties[] = {
    {"oldest", (getter)load_oldest, NULL, "When the first that waits came; infinity: nobody waits.", NULL},
    {"end", (getter)load_end, NULL, "Behind the last row that somebody waits for.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject load_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Load",
    .tp_doc = "What came through a RowGate into one batch.",
    .tp_basicsize = sizeof(load_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)load_dealloc,
    .tp_methods = load_methods,
    .tp_members = load_members,
    .tp_getset = load_properties,
};

/* ---- gates ---- */

static int parse_rows(gate_object *self, PyObject *inputs) {
    Py_ssize_t count = self->input_count = PyTuple_GET_SIZE(inputs);
    self->rows = PyMem_Calloc((size_t)count + 1, sizeof *self->rows);
    self->row_bytes = PyMem_Calloc((size_t)count + 1, sizeof *self->row_bytes);
    self->input_names = PyTuple_New(count);
    if (!self->rows || !self->row_bytes || !self->input_names) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name, *shape;
        const char *format;
        Py_ssize_t itemsize;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(inputs, i), "UsnO;an input is (name, format, bytes of an element, shape of a row)",
                              &name, &format, &itemsize, &shape) ||
            trtx_parse_shape(shape, &self->rows[i]) < 0)
            return -1;
        if (!(self->rows[i].format = trtx_plain_format(format)) || self->rows[i].dimensions + 1 > TRTX_MAX_DIMENSIONS) {
            PyErr_Format(PyExc_ValueError, "input %R: format %s and shape %R are not for the short way", name, format, shape);
            return -1;
        }
        self->row_bytes[i] = itemsize;
        for (int j = 0; j < self->rows[i].dimensions; j++) self->row_bytes[i] *= self->rows[i].shape[j];
        self->total_bytes += self->row_bytes[i];
        Py_INCREF(name);
        PyUnicode_InternInPlace(&name);
        PyTuple_SET_ITEM(self->input_names, i, name);
    }
    return 0;
}

static int gate_init(gate_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"inputs", "outputs", "loop", "cancelled", "max_bytes", NULL};
    PyObject *inputs, *outputs, *loop, *cancelled;
    Py_ssize_t max_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!OOn:RowGate", names, &PyTuple_Type, &inputs, &PyTuple_Type, &outputs,
                                     &loop, &cancelled, &max_bytes))
        return -1;
    if (self->loop) {
        PyErr_SetString(PyExc_RuntimeError, "a RowGate is initialised once");
        return -1;
    }
    if (parse_rows(self, inputs) < 0 || !(self->call_soon = PyObject_GetAttrString(loop, "call_soon"))) return -1;
    self->output_names = Py_NewRef(outputs);
    self->output_count = PyTuple_GET_SIZE(outputs);
    self->cancelled = Py_NewRef(cancelled);
    self->loop = Py_NewRef(loop);
    self->max_bytes = max_bytes;
    return 0;
}

static int gate_traverse(gate_object *self, visitproc visit, void *arg) {
    Py_VISIT(self->loop);
    Py_VISIT(self->call_soon);
    Py_VISIT(self->cancelled);
    return 0;
}

static void gate_dealloc(gate_object *self) {
    PyObject_GC_UnTrack(self); /* no load refers to it: each holds its gate */
    PyMem_Free(self->rows);
    PyMem_Free(self->row_bytes);
    Py_XDECREF(self->input_names);
    Py_XDECREF(self->output_names);
    Py_XDECREF(self->loop);
    Py_XDECREF(self->call_soon);
    Py_XDECREF(self->cancelled);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *gate_open(gate_object *self, PyObject *args) {
    PyObject *views;
    Py_ssize_t start, capacity;
    if (!PyArg_ParseTuple(args, "O!nn:open", &PyTuple_Type, &views, &start, &capacity)) return NULL;
    if (!self->loop || self->load || PyTuple_GET_SIZE(views) != self->input_count || start < 0 || capacity < start)
        return PyErr_Format(PyExc_ValueError, "open: the gate is open already, or the memory is not for it");
    load_object *load = PyObject_New(load_object, &load_type);
    if (!load) return NULL;
    memset((char *)load + sizeof(PyObject), 0, sizeof *load - sizeof(PyObject));
    load->room = (size_t)(capacity - start) + 1;
    load->data = PyMem_Calloc((size_t)self->input_count + 1, sizeof *load->data);
    load->seats = PyMem_Calloc(load->room, sizeof *load->seats);
    load->arrivals = PyMem_Calloc(load->room, sizeof *load->arrivals);
    load->start = load->stop = start;
    load->capacity = capacity;
    load->views = Py_NewRef(views);
    if (!load->data || !load->seats || !load->arrivals) {
        Py_DECREF(load);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < self->input_count; i++) {
        Py_buffer view;
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(views, i), &view, PyBUF_ND | PyBUF_WRITABLE) < 0) {
            Py_DECREF(load);
            return NULL;
        }
        bool fits = view.len >= capacity * self->row_bytes[i];
        load->data[i] = view.buf; /* stays where it is while the view lives */
        PyBuffer_Release(&view);
        if (!fits) {
            Py_DECREF(load);
            return PyErr_Format(PyExc_ValueError, "open: view %zd is too small for %zd rows", i, capacity);
        }
    }
    load->gate = (gate_object *)Py_NewRef(self);
    self->load = load;
    return (PyObject *)load;
}

static PyObject *gate_shut(gate_object *self, PyObject *Py_UNUSED(none)) {
    self->load = NULL;
    Py_RETURN_NONE;
}

/* The rows of one array, or 0 if it is not of the form that goes this way. */
static Py_ssize_t rows_of(const tensor_spec *row, const Py_buffer *view) {
    if (view->ndim != row->dimensions + 1 || trtx_plain_format(view->format) != row->format) return 0;
    for (int i = 0; i < row->dimensions; i++)
        if (view->shape[i + 1] != row->shape[i]) return 0;
    return view->shape[0];
}

/* Copy the rows of all inputs in. How many they are, or 0: not for this way, or no room. */
static Py_ssize_t take_rows(gate_object *self, load_object *load, PyObject *inputs) {
    Py_ssize_t rows = 0;
    for (Py_ssize_t i = 0; i < self->input_count; i++) {
        Py_buffer view;
        PyObject *array = PyDict_GetItem(inputs, PyTuple_GET_ITEM(self->input_names, i));
        if (!array || !trtx_view_input(array, &view)) return 0;
        Py_ssize_t found = rows_of(&self->rows[i], &view);
        bool taken = found > 0 && (i == 0 || found == rows) && found <= load->capacity - load->stop &&
                     found * self->total_bytes <= self->max_bytes && load->count < load->room;
        /* What is written behind `stop` counts for nothing until all inputs are. */
        if (taken) memcpy(load->data[i] + load->stop * self->row_bytes[i], view.buf, (size_t)(found * self->row_bytes[i]));
        PyBuffer_Release(&view);
        if (!taken || self->load != load) return 0;
        rows = found;
    }
    return rows;
}

static PyObject *gate_submit(gate_object *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "submit(inputs, now), got %zd arguments", count);
    load_object *load = self->load;
    if (!load || !PyDict_CheckExact(args[0]) || PyDict_GET_SIZE(args[0]) != self->input_count) Py_RETURN_NONE;
    double now = PyFloat_AsDouble(args[1]);
    if (now == -1 && PyErr_Occurred()) return NULL;
    Py_INCREF(load);
    Py_ssize_t rows = take_rows(self, load, args[0]);
    seat_object *seat = rows ? trtx_seat_new(self, load, rows, now) : NULL;
    Py_DECREF(load);
    if (seat || PyErr_Occurred()) return (PyObject *)seat;
    Py_RETURN_NONE;
}

static PyObject *gate_place(gate_object *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 3) return PyErr_Format(PyExc_TypeError, "place(rows, now, filler), got %zd arguments", count);
    load_object *load = self->load;
    Py_ssize_t rows = PyLong_AsSsize_t(args[0]);
    double now = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred()) return NULL;
    if (rows < 1) return PyErr_Format(PyExc_ValueError, "place: %zd rows", rows);
    if (!load || rows > load->capacity - load->stop || load->count >= load->room) Py_RETURN_NONE;
    seat_object *seat = trtx_seat_new(self, load, rows, now);
    if (!seat) return NULL;
    seat->filler = Py_NewRef(args[2]);
    load->filling++;
    return (PyObject *)seat;
}

static PyObject *gate_current(gate_object *self, void *Py_UNUSED(closure)) {
    return Py_NewRef(self->load ? (PyObject *)self->load : Py_None);
}

static PyMethodDef gate_methods[] = {
    {"open", (PyCFunction)gate_open, METH_VARARGS, "open(views, start, capacity): a Load that takes rows from now on."},
    {"shut", (PyCFunction)gate_shut, METH_NOARGS, "No more rows for the load that takes them now."},
    {"submit", (PyCFunction)(void (*)(void))gate_submit, METH_FASTCALL,
     "submit(inputs, now): a Seat to await, or None: not this way, or no room."},
    {"place", (PyCFunction)(void (*)(void))gate_place, METH_FASTCALL,
     "place(rows, now, filler): a Seat whose rows the caller fills, or None: shut, or no room."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef gate_properties[] = {
    {"load", (getter)gate_current, NULL, "The load that takes rows, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject gate_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.RowGate",
    .tp_doc = "The short way into a batch, of one batcher and one shape of rows.",
    .tp_basicsize = sizeof(gate_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)gate_init,
    .tp_dealloc = (destructor)gate_dealloc,
    .tp_traverse = (traverseproc)gate_traverse,
    .tp_methods = gate_methods,
    .tp_getset = gate_properties,
};

int trtx_rows_register(PyObject *module) {
    if (trtx_seat_register() < 0) return -1;
    if (PyModule_AddType(module, &gate_type) < 0 || PyModule_AddType(module, &load_type) < 0) return -1;
    return PyModule_AddType(module, &trtx_seat_type);
}
