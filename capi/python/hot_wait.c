/* Wait: the life of one request, from the launch or the queue to its outcome. How it is awaited: hot_await.c. */
#include "hot.h"

static const uint64_t hot_slack_ns = 200000; /* a hot wait lasts twice as long as expected, and this */

#ifdef __SANITIZE_ADDRESS__
enum { FREE_WAITS = 1, USE_FREE_WAITS = 0 }; /* or a use after free would go unseen */
#else
enum { FREE_WAITS = 128, USE_FREE_WAITS = 1 };
#endif
static wait_object *free_waits[FREE_WAITS]; /* under the GIL */
static size_t free_wait_count;

wait_object *trtx_wait_new(port_object *port, hub_object *hub) {
    wait_object *wait;
    if (free_wait_count) {
        wait = (wait_object *)PyObject_Init((PyObject *)free_waits[--free_wait_count], &trtx_wait_type);
    } else if (!(wait = PyObject_GC_New(wait_object, &trtx_wait_type))) {
        return NULL;
    }
    memset((char *)wait + offsetof(wait_object, state), 0, sizeof *wait - offsetof(wait_object, state));
    wait->state = WAIT_TAKEN;
    wait->fork_generation = trtx_fork_generation();
    wait->port = (port_object *)Py_XNewRef(port);
    wait->hub = (hub_object *)Py_XNewRef(hub);
    PyObject_GC_Track(wait);
    return wait;
}

CUresult trtx_wait_launch(wait_object *wait, bucket_object *bucket, size_t slot, place_object *place, bool copy,
                          const char **call) {
    lane_object *lane = bucket->lane;
    uint64_t token = place ? (uint64_t)(uintptr_t)place | TRTX_PLACE_TAG : (uint64_t)(uintptr_t)wait;
    CUresult status = trtx_lane_submit_call(lane->lane, slot, bucket->places[slot]->exec, token,
                                            wait->hub ? wait->hub->hub : NULL, call);
    if (status != CUDA_SUCCESS) return status;
    wait->state = WAIT_IN_FLIGHT;
    wait->copy = copy;
    wait->slot = slot;
    wait->bucket = (bucket_object *)Py_NewRef(bucket);
    if (place) {
        wait->place = (place_object *)Py_NewRef(place);
        place->wait = wait;
        place->launched = true;
    } else {
        trtx_bucket_hold(bucket);
    }
    bucket->hits++;
    trtx_lane_view view = trtx_lane_glance(lane->lane);
    bucket->last = wait->number = view.submitted; /* launches need the GIL: nothing came in between */
    wait->launched_ns = lane->lane->slots[slot].completion.launched_ns; /* written by the launch; saves reading the clock */
    if (wait->port) {
        port_object *port = wait->port;
        port->in_flight++;
        wait->flight_next = port->flight_first;
        if (port->flight_first) port->flight_first->flight_previous = wait;
        port->flight_first = wait;
        uint64_t due = view.expected_ns * (view.submitted > view.completed ? view.submitted - view.completed : 1);
        uint64_t longest = wait->port->max_hot_ns;
        if (lane->mode == TRTX_WAKE_LATENCY && due <= longest) {
            uint64_t hot = 2 * due + hot_slack_ns;
            wait->hot_until_ns = wait->launched_ns + (hot < longest ? hot : longest);
        }
    }
    return CUDA_SUCCESS;
}

bool trtx_wait_is_done(wait_object *wait) {
    if (wait->state == WAIT_IN_FLIGHT) {
        trtx_lane *lane = wait->bucket->lane->lane;
        return !lane || trtx_lane_slot(lane, wait->slot, NULL) == TRTX_SLOT_DONE;
    }
    return wait->state != WAIT_QUEUED && wait->state != WAIT_SETTLING;
}

/* Leave the hub's row of hot waits; the next one spins from now on. */
void trtx_wait_cool(wait_object *wait) {
    if (!wait->hot) return;
    hub_object *hub = wait->hub;
    if (wait->hot_previous)
        wait->hot_previous->hot_next = wait->hot_next;
    else
        hub->hot_first = wait->hot_next;
    if (wait->hot_next)
        wait->hot_next->hot_previous = wait->hot_previous;
    else
        hub->hot_last = wait->hot_previous;
    wait->hot_next = wait->hot_previous = NULL;
    wait->hot = false;
}

void trtx_wait_heat(wait_object *wait) {
    if (wait->hot) return;
    hub_object *hub = wait->hub;
    wait->hot = true;
    wait->hot_previous = hub->hot_last;
    if (hub->hot_last)
        hub->hot_last->hot_next = wait;
    else
        hub->hot_first = wait;
    hub->hot_last = wait;
}

/* A new dictionary: outputs by name, copied, or the pinned views. NULL with an exception. */
static PyObject *make_result(const bucket_object *bucket, size_t slot, bool copy) {
    PyObject *views = bucket->places[slot]->outputs, *result = PyDict_New();
    for (Py_ssize_t i = 0; result && i < bucket->output_count; i++) {
        PyObject *view = PyTuple_GET_ITEM(views, i);
        PyObject *array = copy ? PyObject_CallMethodNoArgs(view, trtx_str_copy) : Py_NewRef(view);
        if (!array || PyDict_SetItem(result, PyTuple_GET_ITEM(bucket->output_names, i), array) < 0) Py_CLEAR(result);
        Py_XDECREF(array);
    }
    return result;
}

/* The slot is the wait's no longer. Returns what keeps it alive until it is given back: the bucket, or NULL if it is the
 * place's. */
static bucket_object *part(wait_object *wait) {
    bucket_object *bucket = wait->bucket;
    wait->bucket = NULL;
    if (wait->port) {
        lane_object *lane = bucket->lane;
        if (lane->lane && trtx_lane_slot(lane->lane, wait->slot, NULL) == TRTX_SLOT_IN_FLIGHT)
            trtx_port_abandon(wait->port, lane, wait->number);
        wait->port->in_flight--;
        if (wait->flight_previous)
            wait->flight_previous->flight_next = wait->flight_next;
        else
            wait->port->flight_first = wait->flight_next;
        if (wait->flight_next) wait->flight_next->flight_previous = wait->flight_previous;
        wait->flight_next = wait->flight_previous = NULL;
    }
    if (!wait->place) return bucket;
    if (wait->place->wait == wait) wait->place->wait = NULL;
    Py_CLEAR(wait->place); /* may give the slot back; the lane lives on in the bucket */
    Py_DECREF(bucket);
    return NULL;
}

void trtx_wait_settle(wait_object *wait, hub_object *current) {
    bucket_object *bucket = (bucket_object *)Py_NewRef(wait->bucket);
    trtx_completion completion = {.status = CUDA_ERROR_INVALID_HANDLE}; /* the lane was closed before anybody took the result */
    if (bucket->lane->lane) trtx_lane_slot(bucket->lane->lane, wait->slot, &completion);
    size_t slot = wait->slot;
    wait->state = WAIT_SETTLING;
    wait->launched_ns = completion.launched_ns;
    wait->completed_ns = completion.completed_ns;
    trtx_wait_cool(wait);
    PyObject *result = NULL, *error = NULL;
    if (completion.status == CUDA_SUCCESS) {
        trtx_lane_freed(bucket->lane, current); /* another slot may be free: the GPU works while we copy */
        result = make_result(bucket, slot, wait->copy);
        if (!result) {
            PyObject *type, *trace;
            PyErr_Fetch(&type, &error, &trace);
            PyErr_NormalizeException(&type, &error, &trace);
            Py_XDECREF(type);
            Py_XDECREF(trace);
        }
    }
    bool wanted = wait->state == WAIT_SETTLING; /* else it was cancelled while the result was made, and parts here all the same */
    if (wanted) {
        wait->state = result ? WAIT_READY : WAIT_FAILED;
        wait->outcome = result ? result : error;
        wait->status = completion.status;
        wait->call = "";
        result = error = NULL;
    }
    bucket_object *own = part(wait);
    if (own) trtx_bucket_give_back(own, slot, current);
    Py_XDECREF(own);
    Py_DECREF(bucket);
    Py_XDECREF(result);
    Py_XDECREF(error);
}

void trtx_wait_wake(wait_object *wait) {
    PyObject *future = wait->future, *waker = wait->waker, *answer;
    wait->future = wait->waker = NULL;
    if (future) {
        wait->hub->sleepers--;
        answer = PyObject_CallMethodOneArg(future, trtx_str_set_result, Py_None);
        if (!answer) {
            /* Cancelled meanwhile: its task has been told already. Anything else is a loop that is closed, or broken. */
            PyObject *type, *value, *trace;
            PyErr_Fetch(&type, &value, &trace);
            PyObject *done = PyObject_CallMethodNoArgs(future, trtx_str_done);
            if (!done) PyErr_Clear();
            PyErr_Restore(type, value, trace);
            if (done == Py_True)
                PyErr_Clear();
            else
                PyErr_WriteUnraisable(future);
            Py_XDECREF(done);
        }
        Py_XDECREF(answer);
        Py_DECREF(future);
    }
    if (waker) {
        wait->hub->sleepers--;
        answer = PyObject_CallNoArgs(waker);
        if (!answer) PyErr_WriteUnraisable(waker);
        Py_XDECREF(answer);
        Py_DECREF(waker);
    }
}

static void unblock(wait_object *wait) {
    wait_blocker *blocker = wait->blocker;
    if (!blocker) return;
    pthread_mutex_lock(&blocker->mutex);
    blocker->woken = true;
    pthread_cond_signal(&blocker->changed);
    pthread_mutex_unlock(&blocker->mutex);
}

/* Whoever sleeps for it wakes when its hub is drained: from any thread, and runs nobody's code. */
void trtx_wait_tell(wait_object *wait) {
    unblock(wait);
    if (!wait->hub || !(wait->future || wait->waker) || wait->node.queued) return;
    wait->node.completion.token = (uint64_t)(uintptr_t)wait;
    if (trtx_hub_post(wait->hub->hub, &wait->node, true)) trtx_hub_signal(wait->hub->hub);
}

void trtx_wait_moved_on(wait_object *wait, hub_object *current) {
    unblock(wait);
    if (!wait->future && !wait->waker) return;
    if (wait->state == WAIT_IN_FLIGHT) {
        /* In its own loop's turn it goes hot: cheaper than to have the watcher spin and write the eventfd. */
        if (wait->future && current && wait->hub == current && wait->hot_until_ns)
            trtx_wait_wake(wait);
        else if (trtx_lane_arm(wait->bucket->lane->lane, wait->slot) != CUDA_SUCCESS)
            trtx_wait_tell(wait);
    } else if (current && wait->hub == current) {
        trtx_wait_wake(wait);
    } else {
        trtx_wait_tell(wait);
    }
}

void trtx_wait_fail(wait_object *wait, PyObject *error, CUresult status, const char *call) {
    bucket_object *own = NULL;
    PyObject *arrays = wait->arrays;
    size_t slot = wait->slot;
    wait->arrays = NULL;
    trtx_wait_cool(wait);
    if (wait->state == WAIT_IN_FLIGHT) own = part(wait);
    wait->state = WAIT_FAILED;
    wait->outcome = error;
    wait->status = status;
    wait->call = call;
    trtx_wait_tell(wait);
    if (own) trtx_bucket_give_back(own, slot, NULL);
    Py_XDECREF(own);
    Py_XDECREF(arrays);
}

void trtx_wait_cancel(wait_object *wait) {
    bucket_object *own = NULL;
    PyObject *arrays = wait->arrays, *outcome = wait->outcome;
    size_t slot = wait->slot;
    switch (wait->state) {
    case WAIT_QUEUED: trtx_port_dequeue(wait); break;
    case WAIT_IN_FLIGHT: break;
    case WAIT_SETTLING:
    case WAIT_READY:
    case WAIT_FAILED: break;
    default: return;
    }
    wait->arrays = wait->outcome = NULL;
    trtx_wait_cool(wait);
    bool in_flight = wait->state == WAIT_IN_FLIGHT;
    wait->state = WAIT_CANCELLED;
    if (wait->port && !wait->acquiring) wait->port->cancelled++;
    trtx_wait_tell(wait);
    if (in_flight) own = part(wait);
    if (own) trtx_bucket_give_back(own, slot, NULL);
    Py_XDECREF(own);
    Py_XDECREF(arrays);
    Py_XDECREF(outcome);
}

int trtx_wait_traverse(wait_object *wait, visitproc visit, void *arg) {
    Py_VISIT(wait->port);
    Py_VISIT(wait->hub);
    Py_VISIT(wait->bucket);
    Py_VISIT(wait->place);
    Py_VISIT(wait->arrays);
    Py_VISIT(wait->future);
    Py_VISIT(wait->waker);
    Py_VISIT(wait->outcome);
    return 0;
}

int trtx_wait_clear(wait_object *wait) {
    if (wait->hub) wait->hub->sleepers -= (wait->future != NULL) + (wait->waker != NULL);
    Py_CLEAR(wait->future);
    Py_CLEAR(wait->waker);
    trtx_wait_cancel(wait);
    return 0;
}

void trtx_wait_dealloc(wait_object *wait) {
    PyObject *type, *value, *trace;
    PyObject_GC_UnTrack(wait);
    PyErr_Fetch(&type, &value, &trace);
    trtx_wait_clear(wait);
    if (wait->hub && wait->node.queued) trtx_hub_withdraw(wait->hub->hub, &wait->node);
    Py_XDECREF(wait->hub);
    Py_XDECREF(wait->port);
    PyErr_Restore(type, value, trace);
    if (USE_FREE_WAITS && free_wait_count < FREE_WAITS)
        free_waits[free_wait_count++] = wait;
    else
        PyObject_GC_Del(wait);
}
