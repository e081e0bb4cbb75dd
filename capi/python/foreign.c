/* What libtrtxpy needs to launch captured graphs by itself: the lanes' functions, and where slots have their graphs and memory.
 *
 * A bucket that was lent is pinned: it counts as in use, so that nobody evicts it, until it is given back. Slots are taken from
 * the lane itself, without a word to the port. */
#include "hot.h"

#include "lane_table.h"

static PyObject *lane_table(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none)) {
    return PyCapsule_New((void *)(uintptr_t)trtx_lane_table_get(), TRTX_LANE_TABLE_NAME, NULL);
}

/* The group of these input shapes; NULL without an exception if there is none. */
static shape_group *find_group(port_object *port, PyObject *shapes) {
    Py_ssize_t count = PyTuple_GET_SIZE(shapes);
    tensor_spec *wanted = PyMem_Calloc((size_t)count + 1, sizeof *wanted);
    if (!wanted) {
        PyErr_NoMemory();
        return NULL;
    }
    shape_group *found = NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        if (trtx_parse_shape(PyTuple_GET_ITEM(shapes, i), &wanted[i]) < 0) goto end;
    for (size_t i = 0; !found && i < port->group_count; i++) {
        shape_group *group = port->groups[i];
        bool same = group->input_count == count;
        for (Py_ssize_t j = 0; same && j < count; j++) same = trtx_same_shape(&group->specs[j], &wanted[j]);
        if (same) found = group;
    }
end:
    PyMem_Free(wanted);
    return found;
}

static PyObject *borrow_buckets(PyObject *Py_UNUSED(module), PyObject *args) {
    port_object *port;
    PyObject *shapes;
    if (!PyArg_ParseTuple(args, "O!O!:borrow_buckets", &trtx_port_type, &port, &PyTuple_Type, &shapes)) return NULL;
    shape_group *group = find_group(port, shapes);
    if (!group && PyErr_Occurred()) return NULL;
    PyObject *result = PyTuple_New(group ? (Py_ssize_t)group->count : 0);
    if (!result) return NULL;
    for (size_t i = 0; group && i < group->count; i++) {
        bucket_object *bucket = group->buckets[i];
        trtx_bucket_hold(bucket);
        PyTuple_SET_ITEM(result, (Py_ssize_t)i, Py_NewRef(bucket));
    }
    return result;
}

static PyObject *return_bucket(PyObject *Py_UNUSED(module), PyObject *argument) {
    if (!PyObject_TypeCheck(argument, &trtx_bucket_type))
        return PyErr_Format(PyExc_TypeError, "return_bucket: expected a Bucket, not %R", argument);
    bucket_object *bucket = (bucket_object *)argument;
    if (!bucket->active) {
        PyErr_SetString(PyExc_RuntimeError, "return_bucket: this Bucket was not borrowed");
        return NULL;
    }
    bucket->active--;
    lane_object *lane = bucket->lane;
    if (lane->lane) {
        /* What was given back in flight still runs, and nobody said of which bucket it is. */
        trtx_lane_view view = trtx_lane_glance(lane->lane);
        if (view.submitted != view.completed) {
            bucket->silent++;
            if (view.submitted > bucket->last) bucket->last = view.submitted;
        }
        trtx_lane_freed(lane, NULL); /* slots may have come free without a word */
    }
    Py_RETURN_NONE;
}

static PyObject *addresses(PyObject *views) {
    Py_ssize_t count = PyTuple_GET_SIZE(views);
    PyObject *result = PyTuple_New(count);
    for (Py_ssize_t i = 0; result && i < count; i++) {
        /* Not by the buffer protocol, which has no bfloat16. */
        PyObject *place = PyObject_GetAttrString(PyTuple_GET_ITEM(views, i), "ctypes");
        PyObject *address = place ? PyObject_GetAttrString(place, "data") : NULL;
        Py_XDECREF(place);
        if (!address) {
            Py_CLEAR(result);
        } else {
            PyTuple_SET_ITEM(result, i, address);
        }
    }
    return result;
}

static PyObject *bucket_table(PyObject *Py_UNUSED(module), PyObject *argument) {
    if (!PyObject_TypeCheck(argument, &trtx_bucket_type))
        return PyErr_Format(PyExc_TypeError, "bucket_table: expected a Bucket, not %R", argument);
    bucket_object *bucket = (bucket_object *)argument;
    if (!bucket->lane || !bucket->lane->lane) {
        PyErr_SetString(PyExc_RuntimeError, "bucket_table: the lane is closed");
        return NULL;
    }
    PyObject *places = PyTuple_New((Py_ssize_t)bucket->place_count);
    Py_ssize_t number = 0;
    for (size_t slot = 0; places && slot < bucket->lane->slots; slot++) {
        place_record *record = bucket->places[slot];
        if (!record) continue;
        PyObject *inputs = addresses(record->inputs), *outputs = inputs ? addresses(record->outputs) : NULL;
        PyObject *row = outputs ? Py_BuildValue("nKNN", (Py_ssize_t)slot, (unsigned long long)(uintptr_t)record->exec, inputs, outputs)
                                : NULL;
        if (!row) {
            if (!outputs) Py_XDECREF(inputs);
            Py_CLEAR(places);
        } else {
            PyTuple_SET_ITEM(places, number++, row);
        }
    }
    return places ? Py_BuildValue("KN", (unsigned long long)(uintptr_t)bucket->lane->lane, places) : NULL;
}

static PyObject *bucket_outputs(PyObject *Py_UNUSED(module), PyObject *argument) {
    if (!PyObject_TypeCheck(argument, &trtx_bucket_type))
        return PyErr_Format(PyExc_TypeError, "bucket_outputs: expected a Bucket, not %R", argument);
    bucket_object *bucket = (bucket_object *)argument;
    for (size_t slot = 0; bucket->lane && slot < bucket->lane->slots; slot++)
        if (bucket->places[slot]) return Py_NewRef(bucket->places[slot]->outputs);
    PyErr_SetString(PyExc_RuntimeError, "bucket_outputs: no slot has a place");
    return NULL;
}

static PyMethodDef functions[] = {
    {"lane_table", lane_table, METH_NOARGS, "The lanes' functions for another shared object: a capsule."},
    {"borrow_buckets", borrow_buckets, METH_VARARGS, "The buckets of a shape on each lane, pinned until they are returned."},
    {"return_bucket", return_bucket, METH_O, "End the pin of a borrowed bucket."},
    {"bucket_outputs", bucket_outputs, METH_O, "The output arrays of one of its slots: for their shapes."},
    {"bucket_table", bucket_table, METH_O, "(lane's address, ((slot, graph, input addresses, output addresses), ...))"},
    {NULL, NULL, 0, NULL},
};

int trtx_foreign_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
