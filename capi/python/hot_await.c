/* The Wait type: how a request is awaited by a loop, waited for by a thread, and driven by hand. */
#include "hot.h"

#include <structmember.h>

#define MICROSECOND UINT64_C(1000)

static const uint64_t hot_spin_ns = 7 * MICROSECOND / 2;     /* in one turn of a loop, with the GIL */
static const uint64_t queue_nap_ns = 1000 * MICROSECOND;     /* a thread that is queued looks for slots of dead loops this often */
static const uint64_t signal_nap_ns = 50000 * MICROSECOND;   /* how long Ctrl-C may wait for a thread that blocks */

static PyObject *take(wait_object *wait, hub_object *current) {
    if (wait->state == WAIT_IN_FLIGHT && trtx_wait_is_done(wait)) trtx_wait_settle(wait, current);
    PyObject *outcome = wait->outcome;
    port_object *counted = wait->acquiring ? NULL : wait->port;
    switch (wait->state) {
    case WAIT_READY:
        wait->outcome = NULL;
        wait->state = WAIT_TAKEN;
        if (counted) counted->completed++;
        return outcome;
    case WAIT_FAILED:
        wait->outcome = NULL;
        wait->state = WAIT_TAKEN;
        if (counted) counted->failed++;
        if (!outcome) outcome = trtx_port_error(wait->port, wait->status, wait->call);
        if (outcome) PyErr_SetObject((PyObject *)Py_TYPE(outcome), outcome);
        Py_XDECREF(outcome);
        return NULL;
    case WAIT_CANCELLED: PyErr_SetString(PyExc_RuntimeError, "the wait was cancelled: it has no result"); return NULL;
    case WAIT_TAKEN: PyErr_SetString(PyExc_RuntimeError, "the result was taken already: a wait gives it once"); return NULL;
    default: PyErr_SetString(PyExc_RuntimeError, "the wait is not done: await it, or block() first"); return NULL;
    }
}

static bool is_inert(const wait_object *wait) { return wait->fork_generation != trtx_fork_generation(); }

static PySendResult yield_none(PyObject **result) {
    *result = Py_NewRef(Py_None);
    return PYGEN_NEXT;
}

static PySendResult finish(wait_object *wait, PyObject **result) {
    *result = take(wait, wait->hub);
    return *result ? PYGEN_RETURN : PYGEN_ERROR;
}

static PySendResult sleep_on_future(wait_object *wait, PyObject **result) {
    PyObject *future = wait->future ? Py_NewRef(wait->future) : PyObject_CallNoArgs(wait->hub->make_future);
    if (!future || PyObject_SetAttr(future, trtx_str_blocking, Py_True) < 0) {
        Py_XDECREF(future);
        return PYGEN_ERROR;
    }
    /* To make a future may run other code, a drain among it. */
    if (trtx_wait_is_done(wait) || wait->state == WAIT_SETTLING ||
        (wait->state == WAIT_IN_FLIGHT && trtx_lane_arm(wait->bucket->lane->lane, wait->slot) != CUDA_SUCCESS)) {
        Py_DECREF(future);
        return yield_none(result); /* also without a watcher thread: then each turn of the loop looks */
    }
    if (!wait->future) {
        wait->future = Py_NewRef(future);
        wait->hub->sleepers++;
    }
    *result = future;
    return PYGEN_NEXT;
}

/* Is it done? The oldest hot wait of the hub looks at the GPU for all of them. */
static bool look(wait_object *wait) {
    if (trtx_wait_is_done(wait)) return true;
    hub_object *hub = wait->hub;
    trtx_lane *lane = wait->bucket->lane->lane;
    if (hub->hot_first == wait) {
        trtx_lane_spin(lane, wait->slot, hot_spin_ns, NULL);
        if (hub->sleepers) trtx_hub_drain(hub);
    } else if (!hub->hot_first || hub->hot_first->bucket->lane != wait->bucket->lane) {
        trtx_lane_poll(lane);
    }
    return trtx_wait_is_done(wait);
}

static PySendResult step(wait_object *wait, PyObject **result) {
    *result = NULL;
    bool first = !wait->stepped;
    wait->stepped = true;
    if (!wait->hub || !wait->hub->make_future) {
        PyErr_SetString(PyExc_RuntimeError,
                        "this wait has no hub that makes futures, so it cannot be awaited: use set_waker or block");
        return PYGEN_ERROR;
    }
    if (is_inert(wait) && !trtx_wait_is_done(wait)) {
        trtx_port_refuse(wait->port);
        return PYGEN_ERROR;
    }
    /* The first turn always ends here: a caller in a loop must let the others run. */
    if (trtx_wait_is_done(wait)) return first ? yield_none(result) : finish(wait, result);
    if (wait->state == WAIT_IN_FLIGHT) {
        if (wait->hot_until_ns) trtx_wait_heat(wait);
        if (!first && look(wait)) return finish(wait, result);
        if (wait->hot) {
            if (trtx_now_ns() < wait->hot_until_ns) return yield_none(result);
            trtx_wait_cool(wait);
            wait->hot_until_ns = 0;
        }
    }
    if (wait->state == WAIT_SETTLING) return yield_none(result);
    return sleep_on_future(wait, result);
}

/* CPython 3.10 and 3.11 send; from 3.12 on they call next where they have nothing to send. */
static PySendResult wait_send(wait_object *wait, PyObject *Py_UNUSED(value), PyObject **result) { return step(wait, result); }

static PyObject *wait_next(wait_object *wait) {
    PyObject *result;
    PySendResult way = step(wait, &result);
    if (way != PYGEN_RETURN) return result;
    PyErr_SetObject(PyExc_StopIteration, result); /* a dictionary or a Place, which this takes as it is */
    Py_DECREF(result);
    return NULL;
}

static PyObject *wait_await(wait_object *wait) {
    if (wait->awaited) {
        PyErr_SetString(PyExc_RuntimeError, "the wait is awaited already: one request, one awaiter");
        return NULL;
    }
    wait->awaited = true;
    return Py_NewRef((PyObject *)wait);
}

static PyObject *wait_send_method(wait_object *wait, PyObject *Py_UNUSED(value)) { return wait_next(wait); }

static PyObject *wait_throw(wait_object *wait, PyObject *const *args, Py_ssize_t count) {
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    if (count < 1 || count > 3) return PyErr_Format(PyExc_TypeError, "throw() takes 1 to 3 arguments, got %zd", count);
    if (wait->future) { /* nobody sleeps on it any more */
        PyObject *future = wait->future;
        wait->future = NULL;
        wait->hub->sleepers--;
        Py_DECREF(future);
    }
    trtx_wait_cancel(wait);
    type = args[0];
    if (count > 1 && args[1] != Py_None) value = args[1];
    if (count > 2 && args[2] != Py_None) trace = args[2];
    if (PyExceptionInstance_Check(type)) {
        value = type;
        type = (PyObject *)Py_TYPE(value);
    } else if (!PyExceptionClass_Check(type)) {
        return PyErr_Format(PyExc_TypeError, "throw() takes an exception, not %R", type);
    }
    Py_INCREF(type);
    Py_XINCREF(value);
    Py_XINCREF(trace);
    PyErr_Restore(type, value, trace);
    return NULL;
}

static PyObject *wait_cancel(wait_object *wait, PyObject *Py_UNUSED(none)) {
    trtx_wait_cancel(wait);
    Py_RETURN_NONE;
}

static PyObject *wait_result(wait_object *wait, PyObject *Py_UNUSED(none)) { return take(wait, NULL); }

/* Look at the GPU or the queue, once. */
static bool poll_once(wait_object *wait) {
    if (wait->state == WAIT_IN_FLIGHT && !trtx_wait_is_done(wait)) trtx_lane_poll(wait->bucket->lane->lane);
    if (wait->state == WAIT_QUEUED) trtx_port_pump(wait->port, NULL, NULL);
    return trtx_wait_is_done(wait);
}

static PyObject *wait_done(wait_object *wait, void *Py_UNUSED(closure)) { return PyBool_FromLong(poll_once(wait)); }

static PyObject *wait_set_waker(wait_object *wait, PyObject *waker) {
    if (waker != Py_None && !PyCallable_Check(waker)) return PyErr_Format(PyExc_TypeError, "a waker is callable, not %R", waker);
    if (!wait->hub) {
        PyErr_SetString(PyExc_RuntimeError, "this wait has no hub that would call a waker: submit it with one, or use block");
        return NULL;
    }
    PyObject *before = wait->waker;
    wait->waker = NULL;
    wait->hub->sleepers -= before != NULL;
    Py_XDECREF(before);
    if (waker == Py_None) Py_RETURN_NONE;
    wait->waker = Py_NewRef(waker);
    wait->hub->sleepers++;
    if (wait->state == WAIT_IN_FLIGHT && !trtx_wait_is_done(wait)) {
        CUresult status = trtx_lane_arm(wait->bucket->lane->lane, wait->slot);
        if (status != CUDA_SUCCESS && !trtx_wait_is_done(wait)) {
            wait->hub->sleepers--;
            Py_CLEAR(wait->waker);
            if (is_inert(wait)) return trtx_port_refuse(wait->port);
            return PyErr_Format(PyExc_RuntimeError,
                                "nobody can watch for the result: status %d, a thread could not be started", status);
        }
    }
    if (trtx_wait_is_done(wait)) trtx_wait_wake(wait);
    Py_RETURN_NONE;
}

/* ---- threads ---- */

static bool sleep_in_queue(wait_object *wait, uint64_t until) {
    wait_blocker blocker = {.woken = false};
    if (wait->blocker) {
        PyErr_SetString(PyExc_RuntimeError, "another thread blocks on this wait already");
        return false;
    }
    if (pthread_mutex_init(&blocker.mutex, NULL) || trtx_monotonic_condition(&blocker.changed)) {
        PyErr_NoMemory();
        return false;
    }
    wait->blocker = &blocker;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&blocker.mutex);
    while (!blocker.woken && trtx_now_ns() < until) trtx_wait_until(&blocker.changed, &blocker.mutex, until);
    pthread_mutex_unlock(&blocker.mutex);
    Py_END_ALLOW_THREADS
    wait->blocker = NULL;
    pthread_cond_destroy(&blocker.changed);
    pthread_mutex_destroy(&blocker.mutex);
    if (wait->state == WAIT_QUEUED) poll_once(wait);
    return true;
}

static void sleep_in_flight(wait_object *wait, uint64_t spin_ns, uint64_t nap) {
    lane_object *lane = (lane_object *)Py_NewRef(wait->bucket->lane);
    size_t slot = wait->slot;
    lane->users++; /* nobody closes it meanwhile */
    Py_BEGIN_ALLOW_THREADS
    trtx_lane_wait(lane->lane, slot, spin_ns, nap, NULL);
    Py_END_ALLOW_THREADS
    lane->users--;
    Py_DECREF(lane);
}

static PyObject *wait_block(wait_object *wait, PyObject *argument) {
    long long timeout = PyLong_AsLongLong(argument);
    if (timeout == -1 && PyErr_Occurred()) return NULL;
    if (timeout < 0) return PyErr_Format(PyExc_ValueError, "block: timeout_ns is 0 (for ever) or more, not %lld", timeout);
    uint64_t now = trtx_now_ns(), until = timeout ? now + (uint64_t)timeout : TRTX_NEVER;
    for (;;) {
        if (poll_once(wait)) Py_RETURN_TRUE;
        if (is_inert(wait)) return trtx_port_refuse(wait->port);
        now = trtx_now_ns();
        if (now >= until) Py_RETURN_FALSE;
        if (wait->state == WAIT_IN_FLIGHT) {
            uint64_t nap = until - now < signal_nap_ns ? until - now : signal_nap_ns;
            sleep_in_flight(wait, wait->hot_until_ns > now ? wait->hot_until_ns - now : 0, nap);
        } else if (wait->state == WAIT_QUEUED) {
            if (!sleep_in_queue(wait, until - now < queue_nap_ns ? until : now + queue_nap_ns)) return NULL;
        } else { /* another thread copies the result */
            const struct timespec nap = {.tv_nsec = 20000};
            Py_BEGIN_ALLOW_THREADS
            nanosleep(&nap, NULL);
            Py_END_ALLOW_THREADS
        }
        if (PyErr_CheckSignals() < 0) return NULL;
    }
}

static PyObject *wait_queued(wait_object *wait, void *Py_UNUSED(closure)) { return PyBool_FromLong(wait->state == WAIT_QUEUED); }

static PyObject *wait_awaitable(wait_object *wait, void *Py_UNUSED(closure)) {
    return PyBool_FromLong(wait->hub && wait->hub->make_future);
}

static PyMethodDef wait_methods[] = {
    {"result", (PyCFunction)wait_result, METH_NOARGS, "The outcome of a wait that is done, or its exception; once."},
    {"set_waker", (PyCFunction)wait_set_waker, METH_O, "Called once when the wait is done; at once if it is. None: take it back."},
    {"block", (PyCFunction)wait_block, METH_O, "block(timeout_ns): wait without the GIL; 0: for ever. False at the timeout."},
    {"cancel", (PyCFunction)wait_cancel, METH_NOARGS, "Queued: nothing ran. In flight: the result is dropped."},
    {"close", (PyCFunction)wait_cancel, METH_NOARGS, "As cancel."},
    {"send", (PyCFunction)wait_send_method, METH_O, "One step of await."},
    {"throw", (PyCFunction)(void (*)(void))wait_throw, METH_FASTCALL, "Cancel, and raise."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef wait_members[] = {
    {"hub", T_OBJECT, offsetof(wait_object, hub), READONLY, "The hub that it was submitted with, or None."},
    {"port", T_OBJECT, offsetof(wait_object, port), READONLY, "The port that it went through, or None."},
    {"launched_ns", T_ULONGLONG, offsetof(wait_object, launched_ns), READONLY, "CLOCK_MONOTONIC when the launch began; 0: not yet."},
    {"completed_ns", T_ULONGLONG, offsetof(wait_object, completed_ns), READONLY, "When somebody saw that it was done; 0: not taken."},
    {"queued_ns", T_ULONGLONG, offsetof(wait_object, queued_ns), READONLY, "When it was queued; 0: it never was."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef wait_properties[] = {
    {"done", (getter)wait_done, NULL, "Whether result() has something to say; looks once.", NULL},
    {"queued", (getter)wait_queued, NULL, "Whether it waits for a slot.", NULL},
    {"awaitable", (getter)wait_awaitable, NULL, "Whether its hub makes futures, so that await works.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyAsyncMethods wait_async = {.am_await = (unaryfunc)wait_await, .am_send = (sendfunc)wait_send};

PyTypeObject trtx_wait_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "trtx_py._native.Wait",
    .tp_doc = "A request that was launched or queued.",
    .tp_basicsize = sizeof(wait_object),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)trtx_wait_dealloc,
    .tp_traverse = (traverseproc)trtx_wait_traverse,
    .tp_clear = (inquiry)trtx_wait_clear,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)wait_next,
    .tp_as_async = &wait_async,
    .tp_methods = wait_methods,
    .tp_members = wait_members,
    .tp_getset = wait_properties,
};
