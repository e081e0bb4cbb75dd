/* ManyRows: one request of many rows, cut into chunks that a thread launches without Python.
 *
 * The thread inside run(), the captain, copies a chunk's rows into a free place's pinned memory, launches the graph, and copies
 * the rows of the outputs to where they belong once the GPU is done. One thread's memcpy is slower than the GPU where rows are
 * large: threads inside help() then copy pieces of the same chunk (many_copy.c), so that it is launched as early as can be. The
 * GIL is held on the way in and out only; what the loop touches is its own, atomic, or memory that the arguments keep alive.
 *
 * Places are borrowed for the time of a call: they are marked, so that nobody gives them back or launches them meanwhile, and
 * their lanes are not closed (lane->users). */
#include "many.h"

#include <structmember.h>

enum { MAX_STATIONS = 256 };

/* Of a copy, what a thread takes at a time: some 40 us of work, so that the last piece is not waited for long. */
static const Py_ssize_t usual_piece_bytes = 1 << 18;

/* ---- arguments ---- */

/* Where an array's bytes are, which must be as many as so many rows have. NULL with an exception. The array keeps them. */
static char *memory_of(PyObject *array, size_t bytes, bool writable) {
    Py_buffer view;
    if (PyObject_GetBuffer(array, &view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) return NULL;
    char *data = view.buf;
    size_t length = (size_t)view.len;
    PyBuffer_Release(&view);
    if (length == bytes) return data;
    PyErr_Format(PyExc_ValueError, "ManyRows: a pinned array has %zu bytes; its rows have %zu", length, bytes);
    return NULL;
}

/* One graph of a station. own: the station's memory is filled in; else it must be the same. */
static int add_graph(const many_object *job, station *at, PyObject *argument, bool own, bool keep) {
    if (!PyObject_TypeCheck(argument, &trtx_bucket_type)) {
        PyErr_Format(PyExc_TypeError, "ManyRows: expected a Bucket, not %R", argument);
        return -1;
    }
    bucket_object *bucket = (bucket_object *)argument;
    place_record *record = bucket->lane == at->place->bucket->lane ? bucket->places[at->slot] : NULL;
    if (!record || bucket->input_count != job->input_count || bucket->output_count != job->output_count ||
        !job->input_count || !bucket->specs[0].dimensions || bucket->specs[0].shape[0] < 1) {
        PyErr_Format(PyExc_ValueError, "ManyRows: the bucket has no graph for slot %zu of this lane, or other tensors", at->slot);
        return -1;
    }
    size_t rows = (size_t)bucket->specs[0].shape[0];
    for (Py_ssize_t i = 0; i < job->input_count + job->output_count; i++) {
        bool input = i < job->input_count;
        PyObject *array = input ? PyTuple_GET_ITEM(record->inputs, i) : PyTuple_GET_ITEM(record->outputs, i - job->input_count);
        if (job->row_bytes[i] > (size_t)PY_SSIZE_T_MAX / rows) return PyErr_NoMemory(), -1;
        char *data = memory_of(array, rows * job->row_bytes[i], input);
        if (!data) return -1;
        if (own) at->data[i] = data;
        if (at->data[i] == data) continue;
        PyErr_SetString(PyExc_ValueError, "ManyRows: a bucket's graph is over other memory than the place's");
        return -1;
    }
    if (!keep) return 0;
    if (at->graph_count && at->graphs[at->graph_count - 1].rows >= rows) {
        PyErr_SetString(PyExc_ValueError, "ManyRows: buckets come in order of their rows");
        return -1;
    }
    at->graphs[at->graph_count++] = (graph){.rows = rows, .exec = record->exec, .bucket = bucket};
    return 0;
}

/* Take one (Place, (Bucket, ...)) over. */
static int add_station(crew *own, PyObject *entry, graph *graphs, char **data) {
    station *at = &own->stations[own->count];
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 2 || !Py_IS_TYPE(PyTuple_GET_ITEM(entry, 0), &trtx_place_type) ||
        !PyTuple_Check(PyTuple_GET_ITEM(entry, 1)) || !PyTuple_GET_SIZE(PyTuple_GET_ITEM(entry, 1))) {
        PyErr_Format(PyExc_TypeError, "ManyRows.run: a place is (Place, (Bucket, ...)), not %R", entry);
        return -1;
    }
    place_object *place = (place_object *)PyTuple_GET_ITEM(entry, 0);
    PyObject *buckets = PyTuple_GET_ITEM(entry, 1);
    if (!place->bucket || !place->bucket->lane->lane || place->working || trtx_place_in_flight(place) || place->wait) {
        PyErr_SetString(PyExc_RuntimeError, "ManyRows.run: a place was given back, is at work, or its lane is closed");
        return -1;
    }
    *at = (station){.place = place, .lane = place->bucket->lane->lane, .slot = place->slot, .graphs = graphs, .data = data};
    if (add_graph(own->job, at, (PyObject *)place->bucket, true, false) < 0) return -1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(buckets); i++)
        if (add_graph(own->job, at, PyTuple_GET_ITEM(buckets, i), false, true) < 0) return -1;
    if (at->graphs[at->graph_count - 1].rows < own->job->batch) {
        PyErr_Format(PyExc_ValueError, "ManyRows.run: the largest graph has %zu rows, a batch has %zu",
                     at->graphs[at->graph_count - 1].rows, own->job->batch);
        return -1;
    }
    place->working = true;
    place->bucket->lane->users++;
    own->count++;
    return 0;
}

static int gather(crew *own, PyObject *places) {
    Py_ssize_t count = PyTuple_GET_SIZE(places), graphs = 0, tensors = own->job->input_count + own->job->output_count;
    if (count < 1 || count > MAX_STATIONS) {
        PyErr_Format(PyExc_ValueError, "ManyRows.run: 1 to %d places, not %zd", (int)MAX_STATIONS, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *entry = PyTuple_GET_ITEM(places, i);
        if (PyTuple_Check(entry) && PyTuple_GET_SIZE(entry) == 2 && PyTuple_Check(PyTuple_GET_ITEM(entry, 1)))
            graphs += PyTuple_GET_SIZE(PyTuple_GET_ITEM(entry, 1));
    }
    station *stations = PyMem_Calloc((size_t)count, sizeof *stations);
    graph *all = PyMem_Calloc((size_t)graphs + 1, sizeof *all);
    char **data = PyMem_Calloc((size_t)(count * tensors) + 1, sizeof *data);
    own->stations = stations;
    own->memory[0] = stations;
    own->memory[1] = all;
    own->memory[2] = data;
    if (!stations || !all || !data) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (add_station(own, PyTuple_GET_ITEM(places, i), all, data + i * tensors) < 0) return -1;
        all += stations[i].graph_count;
    }
    return 0;
}

/* Count what was launched, and leave the places to whoever holds them. Returns how many chunks were completed. */
static size_t disband(crew *own) {
    size_t completed = 0;
    for (size_t i = 0; i < own->count; i++) {
        station *at = &own->stations[i];
        bucket_object *host = at->place->bucket;
        port_object *port = host->port;
        size_t launches = 0;
        at->place->working = false;
        host->lane->users--;
        for (size_t j = 0; j < at->graph_count; j++) {
            at->graphs[j].bucket->hits += at->graphs[j].launches;
            launches += at->graphs[j].launches;
        }
        completed += at->completed;
        if (at->launched) {
            at->place->launched = true;
            host->last = trtx_lane_glance(at->lane).submitted; /* the slot is given back as this bucket's */
        }
        if (!port) continue;
        port->hits += launches + at->refused;
        port->completed += at->completed;
        port->failed += at->failed;
        if (!at->flying) continue;
        port->cancelled++;
        trtx_port_abandon(port, host->lane, host->last);
    }
    if (own->culprit) own->job->failed = (bucket_object *)Py_NewRef(own->culprit->place->bucket);
    for (size_t i = 0; i < sizeof own->memory / sizeof *own->memory; i++) PyMem_Free(own->memory[i]);
    return completed;
}

static bool is_made(const many_object *self) {
    if (!self->made) PyErr_SetString(PyExc_RuntimeError, "the ManyRows was never initialised");
    return self->made;
}

static PyObject *many_run(many_object *self, PyObject *args) {
    PyObject *places;
    unsigned long long spin_ns, until_ns;
    if (!is_made(self) || !PyArg_ParseTuple(args, "O!KK:run", &PyTuple_Type, &places, &spin_ns, &until_ns)) return NULL;
    if (self->running) {
        PyErr_SetString(PyExc_RuntimeError, "ManyRows.run: another thread is in it");
        return NULL;
    }
    crew own = {.job = self};
    self->running = true;
    trtx_copy_open(&self->copy);
    bool ready = gather(&own, places) == 0;
    Py_BEGIN_ALLOW_THREADS
    if (ready) trtx_many_work(&own, spin_ns, until_ns);
    trtx_copy_close(&self->copy);
    Py_END_ALLOW_THREADS
    self->running = false;
    size_t completed = disband(&own);
    return ready ? PyLong_FromSize_t(completed) : NULL;
}

static PyObject *many_help(many_object *self, PyObject *argument) {
    if (!is_made(self)) return NULL;
    unsigned long long spin_ns = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred()) return NULL;
    size_t copied;
    Py_BEGIN_ALLOW_THREADS
    copied = trtx_copy_help(&self->copy, spin_ns);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(copied);
}

static PyObject *many_tell(many_object *self, PyObject *argument) {
    int abandon = PyObject_IsTrue(argument);
    if (abandon < 0 || !is_made(self)) return NULL;
    int wanted = abandon ? TOLD_TO_ABANDON : TOLD_TO_STOP, before = atomic_load(&self->told);
    while (before < wanted && !atomic_compare_exchange_weak(&self->told, &before, wanted)) {}
    if (!self->running) trtx_copy_close(&self->copy); /* else the captain does, when it is through */
    Py_RETURN_NONE;
}

static PyObject *many_error(many_object *self, PyObject *Py_UNUSED(none)) {
    if (self->running || self->status == CUDA_SUCCESS) Py_RETURN_NONE;
    return trtx_port_error(self->failed ? self->failed->port : NULL, self->status, self->call);
}

/* Doubles of the chunks that are done. */
static PyObject *times(const many_object *self, const double *values) {
    size_t count = 0;
    for (size_t i = 0; i < self->chunks; i++) count += self->gpu_s[i] >= 0;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof *values));
    if (!bytes) return NULL;
    double *target = (double *)(void *)PyBytes_AS_STRING(bytes);
    for (size_t i = 0; i < self->chunks; i++)
        if (self->gpu_s[i] >= 0) *target++ = values[i];
    return bytes;
}

static PyObject *many_times(many_object *self, PyObject *Py_UNUSED(none)) {
    if (!is_made(self)) return NULL;
    if (self->running) {
        PyErr_SetString(PyExc_RuntimeError, "ManyRows.times: a thread is at work");
        return NULL;
    }
    PyObject *queue = times(self, self->queue_s), *gpu = queue ? times(self, self->gpu_s) : NULL;
    if (gpu) return Py_BuildValue("NN", queue, gpu);
    Py_XDECREF(queue);
    return NULL;
}

/* Hold one array's memory. *rows: as many as it has, which must be as many as before. */
static int hold(many_object *self, PyObject *array, bool writable, Py_ssize_t *rows) {
    Py_buffer *view = &self->buffers[self->held];
    if (PyObject_GetBuffer(array, view, PyBUF_ND | (writable ? PyBUF_WRITABLE : 0)) < 0) return -1;
    self->held++;
    if (view->ndim < 1 || view->shape[0] < 1 || (*rows >= 0 && view->shape[0] != *rows)) {
        PyErr_SetString(PyExc_ValueError, "ManyRows: every array has a first axis of as many rows, at least one");
        return -1;
    }
    *rows = view->shape[0];
    self->row_bytes[self->held - 1] = (size_t)(view->len / *rows);
    return 0;
}

static int many_init(many_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"inputs", "outputs", "start", "stop", "batch", "piece", NULL};
    PyObject *inputs, *outputs;
    Py_ssize_t start, stop, batch, piece = usual_piece_bytes, rows = -1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!nnn|n:ManyRows", names, &PyTuple_Type, &inputs, &PyTuple_Type,
                                     &outputs, &start, &stop, &batch, &piece))
        return -1;
    if (self->buffers) {
        PyErr_SetString(PyExc_RuntimeError, "a ManyRows is initialised once");
        return -1;
    }
    Py_ssize_t input_count = PyTuple_GET_SIZE(inputs), output_count = PyTuple_GET_SIZE(outputs);
    self->buffers = PyMem_Calloc((size_t)(input_count + output_count) + 1, sizeof *self->buffers);
    self->row_bytes = PyMem_Calloc((size_t)(input_count + output_count) + 1, sizeof *self->row_bytes);
    self->parts = PyMem_Calloc((size_t)Py_MAX(input_count, output_count) + 1, sizeof *self->parts);
    if (!self->buffers || !self->row_bytes || !self->parts) {
        PyErr_NoMemory();
        return -1;
    }
    self->input_count = input_count;
    self->output_count = output_count;
    for (Py_ssize_t i = 0; i < input_count; i++)
        if (hold(self, PyTuple_GET_ITEM(inputs, i), false, &rows) < 0) return -1;
    for (Py_ssize_t i = 0; i < output_count; i++)
        if (hold(self, PyTuple_GET_ITEM(outputs, i), true, &rows) < 0) return -1;
    if (input_count < 1 || start < 0 || stop < start || stop > rows || batch < 1 || piece < 1) {
        PyErr_Format(PyExc_ValueError, "ManyRows: rows %zd to %zd of %zd in batches of %zd, pieces of %zd bytes", start, stop, rows,
                     batch, piece);
        return -1;
    }
    self->start = (size_t)start;
    self->stop = (size_t)stop;
    self->batch = (size_t)batch;
    self->chunks = (self->stop - self->start) / self->batch + 1;
    self->queue_s = PyMem_Malloc(self->chunks * sizeof *self->queue_s);
    self->gpu_s = PyMem_Malloc(self->chunks * sizeof *self->gpu_s);
    self->copying = self->queue_s && self->gpu_s && trtx_copy_init(&self->copy, (size_t)piece);
    if (!self->copying) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < self->chunks; i++) self->gpu_s[i] = -1;
    atomic_store(&self->next, self->start);
    self->made = true;
    return 0;
}

static void many_dealloc(many_object *self) {
    for (Py_ssize_t i = 0; i < self->held; i++) PyBuffer_Release(&self->buffers[i]);
    PyMem_Free(self->buffers);
    if (self->copying) trtx_copy_destroy(&self->copy);
    PyMem_Free(self->row_bytes);
    PyMem_Free(self->parts);
    PyMem_Free(self->queue_s);
    PyMem_Free(self->gpu_s);
    Py_XDECREF(self->failed);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *many_next(many_object *self, void *Py_UNUSED(closure)) { return PyLong_FromSize_t(atomic_load(&self->next)); }

static PyObject *many_done(many_object *self, void *Py_UNUSED(closure)) { return PyLong_FromSize_t(atomic_load(&self->done)); }

static PyObject *many_batches(many_object *self, void *Py_UNUSED(closure)) { return PyLong_FromSize_t(atomic_load(&self->batches)); }

static PyObject *many_padding(many_object *self, void *Py_UNUSED(closure)) { return PyLong_FromSize_t(atomic_load(&self->padding)); }

static PyMethodDef many_methods[] = {
    {"run", (PyCFunction)many_run, METH_VARARGS, "run(places, spin_ns, until_ns): launch chunks until there are no more."},
    {"help", (PyCFunction)many_help, METH_O, "help(spin_ns): copy pieces of the chunks of whoever is in run(), until that ends."},
    {"tell", (PyCFunction)many_tell, METH_O, "Take no more chunks; True: do not even wait for what is in flight."},
    {"error", (PyCFunction)many_error, METH_NOARGS, "The first error as an exception, or None. Nobody is in run()."},
    {"times", (PyCFunction)many_times, METH_NOARGS, "Seconds of each chunk that is done: taken to launched, launched to done."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef many_properties[] = {
    {"next", (getter)many_next, NULL, "The first row that nobody has taken.", NULL},
    {"done", (getter)many_done, NULL, "Rows whose outputs are there.", NULL},
    {"batches", (getter)many_batches, NULL, "Launches.", NULL},
    {"padding", (getter)many_padding, NULL, "Rows that were launched for nobody.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject many_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.ManyRows",
    .tp_doc = "Many rows of one request, launched chunk by chunk without Python.",
    .tp_basicsize = sizeof(many_object),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)many_init,
    .tp_dealloc = (destructor)many_dealloc,
    .tp_methods = many_methods,
    .tp_getset = many_properties,
};

int trtx_many_register(PyObject *module) { return PyModule_AddType(module, &many_type); }
