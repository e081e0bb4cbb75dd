/* Bucket: one shape on one lane, captured. Place: a slot of it that somebody holds. */
#include "hot.h"

#include <structmember.h>

static int parse_inputs(bucket_object *self, PyObject *inputs) {
    Py_ssize_t count = self->input_count = PyTuple_GET_SIZE(inputs);
    self->specs = PyMem_Calloc((size_t)count + 1, sizeof *self->specs);
    self->input_names = PyTuple_New(count);
    if (!self->specs || !self->input_names) {
        PyErr_NoMemory();
        return -1;
    }
    self->fast = true;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name, *shape;
        const char *format;
        if (!PyTuple_Check(PyTuple_GET_ITEM(inputs, i))) {
            PyErr_Format(PyExc_TypeError, "an input is (name, format or None, shape), not %R", PyTuple_GET_ITEM(inputs, i));
            return -1;
        }
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(inputs, i), "UzO;an input is (name, format or None, shape)", &name, &format,
                              &shape) ||
            trtx_parse_shape(shape, &self->specs[i]) < 0)
            return -1;
        if (format && !(self->specs[i].format = trtx_plain_format(format))) {
            PyErr_Format(PyExc_ValueError, "input %R: format %s is not a native scalar's letter; None keeps it off the fast path",
                         name, format);
            return -1;
        }
        self->fast &= self->specs[i].format != 0;
        Py_INCREF(name);
        PyUnicode_InternInPlace(&name);
        PyTuple_SET_ITEM(self->input_names, i, name);
    }
    return 0;
}

static int bucket_init(bucket_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"lane", "inputs", "outputs", "on_loop", NULL};
    lane_object *lane;
    PyObject *inputs, *outputs;
    int on_loop;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!O!p:Bucket", names, &trtx_lane_type, &lane, &PyTuple_Type, &inputs,
                                     &PyTuple_Type, &outputs, &on_loop))
        return -1;
    if (self->lane) {
        PyErr_SetString(PyExc_RuntimeError, "a Bucket is initialised once");
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(outputs); i++) {
        if (PyUnicode_Check(PyTuple_GET_ITEM(outputs, i))) continue;
        PyErr_Format(PyExc_TypeError, "Bucket: outputs are names, not %R", PyTuple_GET_ITEM(outputs, i));
        return -1;
    }
    self->places = PyMem_Calloc(lane->slots, sizeof *self->places);
    if (!self->places) {
        PyErr_NoMemory();
        return -1;
    }
    self->lane = (lane_object *)Py_NewRef(lane);
    self->words = (lane->slots + 63) / 64;
    self->on_loop = on_loop;
    self->output_count = PyTuple_GET_SIZE(outputs);
    self->output_names = Py_NewRef(outputs);
    return parse_inputs(self, inputs);
}

static int bucket_traverse(bucket_object *self, visitproc visit, void *arg) {
    if (!self->places) return 0;
    for (size_t i = 0; i < self->lane->slots; i++) {
        if (!self->places[i]) continue;
        Py_VISIT(self->places[i]->inputs);
        Py_VISIT(self->places[i]->outputs);
    }
    return 0;
}

static void bucket_dealloc(bucket_object *self) {
    PyObject_GC_UnTrack(self);
    for (size_t i = 0; self->places && i < self->lane->slots; i++) {
        if (!self->places[i]) continue;
        Py_XDECREF(self->places[i]->inputs);
        Py_XDECREF(self->places[i]->outputs);
        PyMem_Free(self->places[i]);
    }
    PyMem_Free(self->places);
    PyMem_Free(self->specs);
    Py_XDECREF(self->lane);
    Py_XDECREF(self->input_names);
    Py_XDECREF(self->output_names);
    Py_TYPE(self)->tp_free(self);
}

static int fill_place(bucket_object *self, place_record *record, size_t slot) {
    for (Py_ssize_t i = 0; self->fast && i < self->input_count; i++) {
        Py_buffer view;
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(record->inputs, i), &view, PyBUF_ND | PyBUF_FORMAT | PyBUF_WRITABLE) < 0)
            return -1;
        bool matches = trtx_view_matches(&view, &self->specs[i]);
        record->buffers[i].data = view.buf; /* stays where it is while the view lives */
        record->buffers[i].bytes = view.len;
        PyBuffer_Release(&view);
        if (!matches) {
            PyErr_Format(PyExc_ValueError, "slot %zu: the pinned view of input %R is not of the bucket's format and shape: %R", slot,
                         PyTuple_GET_ITEM(self->input_names, i), PyTuple_GET_ITEM(record->inputs, i));
            return -1;
        }
    }
    return 0;
}

static bool is_made(const bucket_object *self) {
    if (!self->lane) PyErr_SetString(PyExc_RuntimeError, "the Bucket was never initialised");
    return self->lane != NULL;
}

static PyObject *bucket_add_place(bucket_object *self, PyObject *args) {
    Py_ssize_t slot;
    unsigned long long exec;
    PyObject *inputs, *outputs;
    if (!is_made(self) || !PyArg_ParseTuple(args, "nKO!O!:add_place", &slot, &exec, &PyTuple_Type, &inputs, &PyTuple_Type,
                                            &outputs))
        return NULL;
    if (slot < 0 || (size_t)slot >= self->lane->slots || self->places[slot] || !exec)
        return PyErr_Format(PyExc_ValueError, "slot %zd with exec %llu: a place is added once for a slot of the lane (it has %zu)",
                            slot, exec, self->lane->slots);
    if (PyTuple_GET_SIZE(inputs) != self->input_count || PyTuple_GET_SIZE(outputs) != self->output_count)
        return PyErr_Format(PyExc_ValueError, "slot %zd: %zd input and %zd output views, the bucket has %zd and %zd", slot,
                            PyTuple_GET_SIZE(inputs), PyTuple_GET_SIZE(outputs), self->input_count, self->output_count);
    place_record *record = PyMem_Calloc(1, sizeof *record + (size_t)self->input_count * sizeof *record->buffers);
    if (!record) return PyErr_NoMemory();
    record->exec = (CUgraphExec)(uintptr_t)exec;
    record->inputs = Py_NewRef(inputs);
    record->outputs = Py_NewRef(outputs);
    if (fill_place(self, record, (size_t)slot) < 0) {
        Py_DECREF(inputs);
        Py_DECREF(outputs);
        PyMem_Free(record);
        return NULL;
    }
    self->places[slot] = record;
    self->mask[slot / 64] |= UINT64_C(1) << slot % 64;
    self->place_count++;
    if (self->port && self->port->queued) trtx_port_pump(self->port, self->lane, NULL);
    Py_RETURN_NONE;
}

void trtx_bucket_hold(bucket_object *bucket) { bucket->active++; }

void trtx_bucket_give_back(bucket_object *bucket, size_t slot, hub_object *current) {
    lane_object *lane = bucket->lane;
    bucket->active--;
    if (!lane->lane) return;
    if (trtx_lane_slot(lane->lane, slot, NULL) == TRTX_SLOT_IN_FLIGHT) bucket->silent++;
    trtx_lane_release(lane->lane, slot);
    trtx_lane_freed(lane, current);
}

static PyObject *bucket_acquire(bucket_object *self, PyObject *Py_UNUSED(none)) {
    size_t slot;
    if (!is_made(self)) return NULL;
    if (!self->lane->lane ||
        trtx_lane_acquire_among(self->lane->lane, self->mask, self->words, true, &slot) != CUDA_SUCCESS)
        Py_RETURN_NONE;
    return (PyObject *)trtx_place_new(self, slot);
}

static PyObject *bucket_busy(bucket_object *self, void *Py_UNUSED(closure)) {
    if (!is_made(self)) return NULL;
    if (self->silent && (!self->lane->lane || (trtx_lane_poll(self->lane->lane),
                                               trtx_lane_glance(self->lane->lane).completed >= self->last)))
        self->silent = 0;
    size_t queued = 0;
    for (size_t i = 0; self->port && i < self->port->group_count; i++)
        for (size_t j = 0; j < self->port->groups[i]->count; j++)
            if (self->port->groups[i]->buckets[j] == self) queued = self->port->groups[i]->queued;
    return PyLong_FromSize_t(self->active + self->silent + queued);
}

static PyMethodDef bucket_methods[] = {
    {"add_place", (PyCFunction)bucket_add_place, METH_VARARGS, "The pinned views of a slot and the graph captured for them."},
    {"acquire", (PyCFunction)bucket_acquire, METH_NOARGS, "Take a free slot that has a place here: a Place, or None."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef bucket_members[] = {
    {"lane", T_OBJECT_EX, offsetof(bucket_object, lane), READONLY, "The lane it was captured on."},
    {"places", T_PYSSIZET, offsetof(bucket_object, place_count), READONLY, "How many slots have a place."},
    {"hits", T_ULONGLONG, offsetof(bucket_object, hits), READONLY, "How often it was launched."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef bucket_properties[] = {
    {"busy", (getter)bucket_busy, NULL, "Places held, queued for or in flight; 0: nothing uses its graphs and views.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject trtx_bucket_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Bucket",
    .tp_doc = "One shape on one lane, captured.",
    .tp_basicsize = sizeof(bucket_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)bucket_init,
    .tp_dealloc = (destructor)bucket_dealloc,
    .tp_traverse = (traverseproc)bucket_traverse,
    .tp_methods = bucket_methods,
    .tp_members = bucket_members,
    .tp_getset = bucket_properties,
};

/* ---- places ---- */

place_object *trtx_place_new(bucket_object *bucket, size_t slot) {
    place_object *place = PyObject_GC_New(place_object, &trtx_place_type);
    if (!place) {
        trtx_lane_release(bucket->lane->lane, slot);
        return NULL;
    }
    place->bucket = (bucket_object *)Py_NewRef(bucket);
    place->slot = slot;
    place->wait = NULL;
    place->launched = place->working = false;
    trtx_bucket_hold(bucket);
    PyObject_GC_Track(place);
    return place;
}

static int place_traverse(place_object *self, visitproc visit, void *arg) {
    Py_VISIT(self->bucket);
    return 0;
}

static void give_back(place_object *self) {
    bucket_object *bucket = self->bucket;
    wait_object *wait = self->wait;
    if (!bucket) return;
    self->bucket = NULL;
    self->wait = NULL;
    if (wait) {
        Py_INCREF(wait); /* it holds the place, so this is no finalizer */
        PyObject *error = PyObject_CallFunction(PyExc_RuntimeError, "s",
                                                "the place was given back while its request was in flight");
        if (!error) PyErr_Clear();
        trtx_wait_fail(wait, error, CUDA_ERROR_UNKNOWN, "");
        Py_DECREF(wait);
    }
    trtx_bucket_give_back(bucket, self->slot, NULL);
    Py_DECREF(bucket);
}

static void place_dealloc(place_object *self) {
    PyObject *type, *value, *trace;
    PyObject_GC_UnTrack(self);
    PyErr_Fetch(&type, &value, &trace);
    give_back(self);
    PyErr_Restore(type, value, trace);
    PyObject_GC_Del(self);
}

static place_record *record_of(place_object *self) {
    if (self->bucket) return self->bucket->places[self->slot];
    PyErr_SetString(PyExc_RuntimeError, "the place was given back: acquire another");
    return NULL;
}

bool trtx_place_in_flight(place_object *self) {
    if (!self->bucket || !self->launched || !self->bucket->lane->lane) return false;
    trtx_lane *lane = self->bucket->lane->lane;
    if (trtx_lane_slot(lane, self->slot, NULL) != TRTX_SLOT_IN_FLIGHT) return false;
    trtx_lane_poll(lane);
    return trtx_lane_slot(lane, self->slot, NULL) == TRTX_SLOT_IN_FLIGHT;
}

/* Another bucket whose graph for this slot is to be launched: one over the same pinned memory, of fewer rows. */
static bucket_object *other_bucket(place_object *self, PyObject *argument) {
    if (!PyObject_TypeCheck(argument, &trtx_bucket_type)) {
        PyErr_Format(PyExc_TypeError, "Place.submit: expected a Bucket, not %R", argument);
        return NULL;
    }
    bucket_object *bucket = (bucket_object *)argument;
    if (bucket->lane != self->bucket->lane || !bucket->places[self->slot]) {
        PyErr_Format(PyExc_ValueError, "Place.submit: the bucket has no graph for slot %zu of this lane", self->slot);
        return NULL;
    }
    return bucket;
}

static PyObject *place_submit(place_object *self, PyObject *const *args, Py_ssize_t count) {
    hub_object *hub;
    if (count != 2 && count != 3)
        return PyErr_Format(PyExc_TypeError, "Place.submit(hub, copy, bucket), got %zd arguments", count);
    int copy = PyObject_IsTrue(args[1]);
    if (copy < 0 || trtx_hub_argument(args[0], "Place.submit", &hub) < 0 || !record_of(self)) return NULL;
    bucket_object *bucket = count == 3 ? other_bucket(self, args[2]) : self->bucket;
    if (!bucket) return NULL;
    if (!self->bucket->lane->lane) {
        PyErr_SetString(PyExc_RuntimeError, "the place's lane is closed");
        return NULL;
    }
    if (self->working || trtx_place_in_flight(self) || self->wait)
        return PyErr_Format(PyExc_RuntimeError, "slot %zu is in flight: its result is taken before it is submitted again", self->slot);
    port_object *port = self->bucket->port;
    wait_object *wait = trtx_wait_new(port, hub);
    if (!wait) return NULL;
    if (port) port->hits++;
    const char *call;
    CUresult status = trtx_wait_launch(wait, bucket, self->slot, self, copy, &call);
    if (status == CUDA_SUCCESS) {
        self->bucket->last = wait->number; /* the slot is given back as this bucket's */
        return (PyObject *)wait;
    }
    if (port) port->failed++;
    PyObject *error = trtx_port_error(port, status, call);
    if (error) PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    wait->state = WAIT_TAKEN;
    Py_DECREF(wait);
    return NULL;
}

static PyObject *place_release(place_object *self, PyObject *Py_UNUSED(none)) {
    if (self->working) return PyErr_Format(PyExc_RuntimeError, "slot %zu is at work: stop its ManyRows first", self->slot);
    give_back(self);
    Py_RETURN_NONE;
}

static PyObject *place_inputs(place_object *self, void *Py_UNUSED(closure)) {
    place_record *record = record_of(self);
    return record ? Py_NewRef(record->inputs) : NULL;
}

static PyObject *place_outputs(place_object *self, void *Py_UNUSED(closure)) {
    place_record *record = record_of(self);
    return record ? Py_NewRef(record->outputs) : NULL;
}

static PyObject *place_in_flight(place_object *self, void *Py_UNUSED(closure)) { return PyBool_FromLong(trtx_place_in_flight(self)); }

static PyMethodDef place_methods[] = {
    {"submit", (PyCFunction)(void (*)(void))place_submit, METH_FASTCALL,
     "Launch; copy: the result is new arrays, not the views. bucket: whose graph, if not the place's own."},
    {"release", (PyCFunction)place_release, METH_NOARGS, "Give the slot back; in flight, it comes back when the GPU is done."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef place_members[] = {
    {"slot", T_PYSSIZET, offsetof(place_object, slot), READONLY, "The number of the lane's slot."},
    {"bucket", T_OBJECT, offsetof(place_object, bucket), READONLY, "The bucket it is of; None once it is given back."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef place_properties[] = {
    {"inputs", (getter)place_inputs, NULL, "The pinned views of the inputs.", NULL},
    {"outputs", (getter)place_outputs, NULL, "The pinned views of the outputs.", NULL},
    {"in_flight", (getter)place_in_flight, NULL, "Whether the GPU works on it; looks.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject trtx_place_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Place",
    .tp_doc = "A slot that somebody holds.",
    .tp_basicsize = sizeof(place_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)place_dealloc,
    .tp_traverse = (traverseproc)place_traverse,
    .tp_methods = place_methods,
    .tp_members = place_members,
    .tp_getset = place_properties,
};
