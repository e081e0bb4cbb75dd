/* Port: an engine's front door. Finds the bucket and the slot of a request, or queues it. */
#include "hot.h"

#include <structmember.h>

enum { MAX_INPUTS = 256, MAX_LANES = 64 };

static int port_init(port_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"array_type", "input_names", "refuse", "fail", "max_hot_ns", NULL};
    PyObject *array_type, *input_names, *refuse, *fail;
    long long max_hot_ns;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!OOL:Port", names, &PyType_Type, &array_type, &PyTuple_Type,
                                     &input_names, &refuse, &fail, &max_hot_ns))
        return -1;
    if (self->array_type) {
        PyErr_SetString(PyExc_RuntimeError, "a Port is initialised once");
        return -1;
    }
    Py_ssize_t count = PyTuple_GET_SIZE(input_names);
    if (!PyCallable_Check(refuse) || !PyCallable_Check(fail) || max_hot_ns < 0 || count > MAX_INPUTS) {
        PyErr_Format(PyExc_ValueError, "Port: at most %d inputs, refuse and fail callable, max_hot_ns >= 0; got %zd, %R, %R, %lld",
                     (int)MAX_INPUTS, count, refuse, fail, max_hot_ns);
        return -1;
    }
    self->input_names = PyTuple_New(count);
    if (!self->input_names) return -1;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name = PyTuple_GET_ITEM(input_names, i);
        if (!PyUnicode_CheckExact(name)) {
            PyErr_Format(PyExc_TypeError, "Port: input names are strings, not %R", name);
            return -1;
        }
        Py_INCREF(name);
        PyUnicode_InternInPlace(&name);
        PyTuple_SET_ITEM(self->input_names, i, name);
    }
    self->array_type = (PyTypeObject *)Py_NewRef(array_type);
    self->refuse = Py_NewRef(refuse);
    self->fail = Py_NewRef(fail);
    self->max_hot_ns = (uint64_t)max_hot_ns;
    self->fork_generation = trtx_fork_generation();
    self->open = true;
    return 0;
}

static int port_traverse(port_object *self, visitproc visit, void *arg) {
    Py_VISIT(self->refuse);
    Py_VISIT(self->fail);
    Py_VISIT(self->array_type);
    for (size_t i = 0; i < self->group_count; i++)
        for (size_t j = 0; j < self->groups[i]->count; j++) Py_VISIT(self->groups[i]->buckets[j]);
    return 0;
}

static void free_group(shape_group *group) {
    PyMem_Free(group->specs);
    PyMem_Free(group->buckets);
    PyMem_Free(group);
}

/* The bucket leaves the group; what to decref, when the group is no longer looked at. */
static bucket_object *take_bucket(shape_group *group, size_t index) {
    bucket_object *bucket = group->buckets[index];
    memmove(&group->buckets[index], &group->buckets[index + 1], (--group->count - index) * sizeof *group->buckets);
    trtx_lane_remove_port(bucket->lane, bucket->port);
    bucket->port = NULL;
    return bucket;
}

static void drop_empty_groups(port_object *self) {
    if (self->pumping || self->users) return;
    for (size_t i = 0; i < self->group_count;) {
        shape_group *group = self->groups[i];
        if (group->count || group->queued) {
            i++;
            continue;
        }
        memmove(&self->groups[i], &self->groups[i + 1], (--self->group_count - i) * sizeof *self->groups);
        free_group(group);
    }
}

static int port_clear(port_object *self) {
    for (size_t i = 0; i < self->group_count; i++)
        while (self->groups[i]->count) Py_DECREF(take_bucket(self->groups[i], self->groups[i]->count - 1));
    Py_CLEAR(self->refuse);
    Py_CLEAR(self->fail);
    return 0;
}

static void port_dealloc(port_object *self) {
    PyObject_GC_UnTrack(self); /* waits hold a reference: none is queued */
    port_clear(self);
    drop_empty_groups(self);
    PyMem_Free(self->groups);
    for (size_t i = 0; i < self->abandoned_count; i++) Py_DECREF(self->abandoned[i].lane);
    PyMem_Free(self->abandoned);
    Py_XDECREF(self->input_names);
    Py_XDECREF(self->array_type);
    Py_TYPE(self)->tp_free(self);
}

PyObject *trtx_port_refuse(port_object *port) {
    PyObject *result = port && port->refuse ? PyObject_CallNoArgs(port->refuse) : NULL;
    Py_XDECREF(result);
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "closed, or used in a forked child");
    return NULL;
}

PyObject *trtx_port_error(port_object *port, CUresult status, const char *call) {
    if (!port || !port->fail)
        return PyObject_CallFunction(PyExc_RuntimeError, "N",
                                     PyUnicode_FromFormat("CUDA error %d%s%s", status, *call ? " of " : "", call));
    PyObject *error = PyObject_CallFunction(port->fail, "is", status, call);
    if (!error || PyExceptionInstance_Check(error)) return error;
    PyErr_Format(PyExc_TypeError, "fail(%d, '%s') returned %R, not an exception", status, call, error);
    Py_DECREF(error);
    return NULL;
}

static bool is_inert(const port_object *self) { return self->fork_generation != trtx_fork_generation(); }

static bool same_group(const shape_group *group, const bucket_object *bucket) {
    if (group->on_loop != bucket->on_loop || group->fast != bucket->fast) return false;
    for (Py_ssize_t i = 0; i < group->input_count; i++)
        if (group->specs[i].format != bucket->specs[i].format || !trtx_same_shape(&group->specs[i], &bucket->specs[i]))
            return false;
    return true;
}

static shape_group *group_for(port_object *self, const bucket_object *bucket) {
    for (size_t i = 0; i < self->group_count; i++)
        if (same_group(self->groups[i], bucket)) return self->groups[i];
    shape_group **groups = PyMem_Realloc(self->groups, (self->group_count + 1) * sizeof *groups);
    if (!groups) return NULL;
    self->groups = groups;
    shape_group *group = PyMem_Calloc(1, sizeof *group);
    size_t bytes = ((size_t)bucket->input_count + 1) * sizeof *group->specs;
    if (!group || !(group->specs = PyMem_Malloc(bytes))) {
        PyMem_Free(group);
        return NULL;
    }
    memcpy(group->specs, bucket->specs, bytes);
    group->input_count = bucket->input_count;
    group->on_loop = bucket->on_loop;
    group->fast = bucket->fast;
    return self->groups[self->group_count++] = group;
}

static PyObject *port_add(port_object *self, PyObject *argument) {
    if (!Py_IS_TYPE(argument, &trtx_bucket_type)) return PyErr_Format(PyExc_TypeError, "Port.add takes a Bucket, not %R", argument);
    bucket_object *bucket = (bucket_object *)argument;
    if (bucket->port) return PyErr_Format(PyExc_ValueError, "the bucket is in a port already: remove it there first");
    int same = bucket->input_names ? PyObject_RichCompareBool(bucket->input_names, self->input_names, Py_EQ) : 0;
    if (same < 0) return NULL;
    if (!same)
        return PyErr_Format(PyExc_ValueError, "the bucket's inputs are %R, the port's are %R: same names, same order", bucket->input_names,
                            self->input_names);
    shape_group *group = group_for(self, bucket);
    if (group && group->count == MAX_LANES)
        return PyErr_Format(PyExc_ValueError, "the port has %d buckets of this shape already", (int)MAX_LANES);
    if (group && group->count == group->room) {
        size_t room = group->room ? group->room * 2 : 2;
        bucket_object **buckets = PyMem_Realloc(group->buckets, room * sizeof *buckets);
        if (buckets) {
            group->buckets = buckets;
            group->room = room;
        }
    }
    if (!group || group->count == group->room) return PyErr_NoMemory();
    if (trtx_lane_add_port(bucket->lane, self) < 0) return NULL;
    group->buckets[group->count++] = (bucket_object *)Py_NewRef(bucket);
    bucket->port = self;
    if (self->queued) trtx_port_pump(self, bucket->lane, NULL);
    Py_RETURN_NONE;
}

static PyObject *port_remove(port_object *self, PyObject *argument) {
    for (size_t i = 0; i < self->group_count; i++) {
        for (size_t j = 0; j < self->groups[i]->count; j++) {
            if ((PyObject *)self->groups[i]->buckets[j] != argument) continue;
            bucket_object *bucket = take_bucket(self->groups[i], j);
            drop_empty_groups(self);
            Py_DECREF(bucket);
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "%R is not in this port", argument);
}

/* ---- requests ---- */

static void copy_in(const bucket_object *bucket, size_t slot, const Py_buffer *views) {
    const place_record *record = bucket->places[slot];
    for (Py_ssize_t i = 0; i < bucket->input_count; i++)
        memcpy(record->buffers[i].data, views[i].buf, (size_t)record->buffers[i].bytes);
}

static PyObject *raise(port_object *self, CUresult status, const char *call) {
    PyObject *error = trtx_port_error(self, status, call);
    if (error) PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    return NULL;
}

static PyObject *queue(port_object *self, shape_group *group, hub_object *hub, PyObject *const *arrays) {
    PyObject *kept = NULL;
    if (arrays) {
        if (!(kept = PyTuple_New(group->input_count))) return NULL;
        for (Py_ssize_t i = 0; i < group->input_count; i++) PyTuple_SET_ITEM(kept, i, Py_NewRef(arrays[i]));
    }
    wait_object *wait = trtx_wait_new(self, hub);
    if (!wait) {
        Py_XDECREF(kept);
        return NULL;
    }
    wait->acquiring = arrays == NULL;
    wait->arrays = kept;
    self->hits += !wait->acquiring;
    trtx_port_enqueue(self, wait, group);
    return (PyObject *)wait;
}

/* views and arrays: NULL to acquire. The caller keeps the group from going away. */
static PyObject *start(port_object *self, shape_group *group, hub_object *hub, const Py_buffer *views, PyObject *const *arrays) {
    if (self->queued && !group->queued) trtx_port_pump(self, NULL, hub); /* another shape may wait for the same slots */
    if (group->count == 0) Py_RETURN_NONE;
    size_t slot = 0;
    CUresult dead = CUDA_SUCCESS;
    bucket_object *bucket = group->queued ? NULL : trtx_port_find_slot(group, NULL, true, &slot, &dead);
    if (!bucket && dead != CUDA_SUCCESS) {
        self->hits += views != NULL;
        self->failed += views != NULL;
        return raise(self, dead, "cuGraphLaunch"); /* what it would return */
    }
    if (!bucket) return queue(self, group, hub, arrays);
    wait_object *wait = trtx_wait_new(self, hub);
    if (!wait) {
        trtx_lane_release(bucket->lane->lane, slot);
        return NULL;
    }
    wait->acquiring = views == NULL;
    self->hits += views != NULL;
    if (wait->acquiring) {
        place_object *place = trtx_place_new(bucket, slot);
        wait->state = place ? WAIT_READY : WAIT_TAKEN;
        wait->outcome = (PyObject *)place;
        if (place) return (PyObject *)wait;
        Py_DECREF(wait);
        return NULL;
    }
    copy_in(bucket, slot, views);
    const char *call;
    CUresult status = trtx_wait_launch(wait, bucket, slot, NULL, true, &call);
    if (status == CUDA_SUCCESS) return (PyObject *)wait;
    lane_object *lane = (lane_object *)Py_NewRef(bucket->lane);
    trtx_lane_release(lane->lane, slot);
    self->failed++;
    wait->state = WAIT_TAKEN;
    Py_DECREF(wait);
    trtx_lane_freed(lane, hub);
    Py_DECREF(lane);
    return raise(self, status, call);
}

static shape_group *match_arrays(port_object *self, const Py_buffer *views, Py_ssize_t count) {
    for (size_t g = 0; g < self->group_count; g++) {
        shape_group *group = self->groups[g];
        if (!group->on_loop || !group->fast || group->count == 0) continue;
        Py_ssize_t i = 0;
        while (i < count && trtx_view_matches(&views[i], &group->specs[i])) i++;
        if (i == count) return group;
    }
    return NULL;
}

static PyObject *port_submit(port_object *self, PyObject *const *args, Py_ssize_t nargs) {
    hub_object *hub;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "Port.submit(inputs, hub), got %zd arguments", nargs);
    if (trtx_hub_argument(args[1], "Port.submit", &hub) < 0) return NULL;
    if (!self->open || is_inert(self)) return trtx_port_refuse(self);
    PyObject *inputs = args[0];
    Py_ssize_t count = PyTuple_GET_SIZE(self->input_names), held = 0;
    if (!PyDict_CheckExact(inputs) || PyDict_GET_SIZE(inputs) != count) Py_RETURN_NONE;
    PyObject *arrays[MAX_INPUTS];
    Py_buffer views[MAX_INPUTS + 1]; /* one more: never empty */
    PyObject *result = NULL;
    for (; held < count; held++) {
        arrays[held] = PyDict_GetItemWithError(inputs, PyTuple_GET_ITEM(self->input_names, held));
        if (!arrays[held] || !Py_IS_TYPE(arrays[held], self->array_type) || !trtx_view_input(arrays[held], &views[held])) break;
    }
    shape_group *group = held == count ? match_arrays(self, views, count) : NULL;
    if (group) {
        self->users++;
        result = start(self, group, hub, views, arrays);
        self->users--;
    } else if (!PyErr_Occurred()) {
        result = Py_NewRef(Py_None);
    }
    while (held > 0) PyBuffer_Release(&views[--held]);
    return result;
}

static PyObject *port_acquire(port_object *self, PyObject *const *args, Py_ssize_t nargs) {
    hub_object *hub;
    tensor_spec specs[MAX_INPUTS + 1];
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "Port.acquire(shapes, hub), got %zd arguments", nargs);
    if (trtx_hub_argument(args[1], "Port.acquire", &hub) < 0) return NULL;
    if (!self->open || is_inert(self)) return trtx_port_refuse(self);
    Py_ssize_t count = PyTuple_GET_SIZE(self->input_names);
    if (!PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) != count)
        return PyErr_Format(PyExc_TypeError, "Port.acquire: a tuple of %zd shapes, not %R", count, args[0]);
    for (Py_ssize_t i = 0; i < count; i++)
        if (trtx_parse_shape(PyTuple_GET_ITEM(args[0], i), &specs[i]) < 0) return NULL;
    for (size_t g = 0; g < self->group_count; g++) {
        shape_group *group = self->groups[g];
        Py_ssize_t i = 0;
        while (i < count && trtx_same_shape(&group->specs[i], &specs[i])) i++;
        if (i < count || group->count == 0) continue;
        self->users++;
        PyObject *result = start(self, group, hub, NULL, NULL);
        self->users--;
        return result;
    }
    Py_RETURN_NONE;
}

static PyObject *port_close(port_object *self, PyObject *Py_UNUSED(none)) {
    self->open = false;
    Py_RETURN_NONE;
}

size_t trtx_port_settle(port_object *port) {
    size_t left = 0;
    Py_INCREF(port);
    for (wait_object *wait = port->flight_first; wait; wait = wait->flight_next)
        if (wait->bucket->lane->lane) trtx_lane_poll(wait->bucket->lane->lane);
    for (wait_object *wait = port->flight_first; wait;) {
        if (!trtx_wait_is_done(wait)) {
            left++;
            wait = wait->flight_next;
            continue;
        }
        Py_INCREF(wait);
        trtx_wait_settle(wait, NULL); /* may run others' code, and change the row */
        trtx_wait_tell(wait);
        Py_DECREF(wait);
        wait = port->flight_first;
        left = 0;
    }
    Py_DECREF(port);
    return left;
}

static PyObject *port_settle(port_object *self, PyObject *Py_UNUSED(none)) {
    return PyLong_FromSize_t(trtx_port_settle(self));
}

static PyObject *port_pump(port_object *self, PyObject *Py_UNUSED(none)) {
    if (self->queued) trtx_port_settle(self); /* a loop that has stopped must not keep its slots from others */
    for (size_t g = 0; self->queued && g < self->group_count; g++)
        for (size_t i = 0; i < self->groups[g]->count; i++)
            if (self->groups[g]->buckets[i]->lane->lane) trtx_lane_poll(self->groups[g]->buckets[i]->lane->lane);
    if (self->queued) trtx_port_pump(self, NULL, NULL);
    return PyLong_FromSize_t(self->queued);
}

static PyObject *fail_waits(port_object *self, PyObject *error, bool orphans_only) {
    if (!PyExceptionInstance_Check(error)) return PyErr_Format(PyExc_TypeError, "expected an exception, not %R", error);
    for (size_t g = 0; g < self->group_count; g++) {
        wait_object *wait;
        while (g < self->group_count && !(orphans_only && self->groups[g]->count) && (wait = self->groups[g]->first)) {
            Py_INCREF(wait);
            trtx_port_dequeue(wait);
            trtx_wait_fail(wait, Py_NewRef(error), CUDA_ERROR_UNKNOWN, "");
            Py_DECREF(wait);
        }
    }
    drop_empty_groups(self);
    Py_RETURN_NONE;
}

static PyObject *port_fail_queued(port_object *self, PyObject *error) { return fail_waits(self, error, false); }

static PyObject *port_fail_orphans(port_object *self, PyObject *error) { return fail_waits(self, error, true); }

static PyObject *port_running(port_object *self, void *Py_UNUSED(closure)) {
    return PyLong_FromSize_t(self->in_flight + trtx_port_abandoned(self));
}

static PyGetSetDef port_properties[] = {
    {"running", (getter)port_running, NULL, "Requests that the GPU works on or has done, wanted or not; looks.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef port_methods[] = {
    {"add", (PyCFunction)port_add, METH_O, "Take requests for a bucket."},
    {"remove", (PyCFunction)port_remove, METH_O, "Take none for it any more; what is queued waits for other buckets of its shape."},
    {"submit", (PyCFunction)(void (*)(void))port_submit, METH_FASTCALL, "Launch or queue a request; None: not one for the fast path."},
    {"acquire", (PyCFunction)(void (*)(void))port_acquire, METH_FASTCALL, "As submit, for a Place; None: no bucket has these shapes."},
    {"close", (PyCFunction)port_close, METH_NOARGS, "From now on submit and acquire refuse."},
    {"pump", (PyCFunction)port_pump, METH_NOARGS, "Look at the lanes, serve the queue; returns how many are still queued."},
    {"settle", (PyCFunction)port_settle, METH_NOARGS, "Bring what is finished into its waits; returns how many are on the GPU."},
    {"fail_queued", (PyCFunction)port_fail_queued, METH_O, "End every queued wait with an exception."},
    {"fail_orphans", (PyCFunction)port_fail_orphans, METH_O, "As fail_queued, for shapes that have no bucket any more."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef port_members[] = {
    {"open", T_BOOL, offsetof(port_object, open), READONLY, "Whether it takes requests."},
    {"in_flight", T_PYSSIZET, offsetof(port_object, in_flight), READONLY, "Requests launched whose results are still wanted."},
    {"queued", T_PYSSIZET, offsetof(port_object, queued), READONLY, "Waits for a slot."},
    {"hits", T_ULONGLONG, offsetof(port_object, hits), READONLY, "Requests so far; each ends completed, failed or cancelled."},
    {"completed", T_ULONGLONG, offsetof(port_object, completed), READONLY, "Requests whose results were taken."},
    {"failed", T_ULONGLONG, offsetof(port_object, failed), READONLY, "Requests that raised."},
    {"cancelled", T_ULONGLONG, offsetof(port_object, cancelled), READONLY, "Requests whose outcome nobody took."},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject trtx_port_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Port",
    .tp_doc = "An engine's front door.",
    .tp_basicsize = sizeof(port_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)port_init,
    .tp_dealloc = (destructor)port_dealloc,
    .tp_traverse = (traverseproc)port_traverse,
    .tp_clear = (inquiry)port_clear,
    .tp_methods = port_methods,
    .tp_members = port_members,
    .tp_getset = port_properties,
};
