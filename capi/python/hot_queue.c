/* A Port's queue: which slot a request gets, and who gets the slots that come free. */
#include "hot.h"

bucket_object *trtx_port_find_slot(shape_group *group, lane_object *only, bool look, size_t *slot, CUresult *dead) {
    uint64_t refused = 0; /* a bit for each bucket */
    size_t count = group->count, start = count ? group->rotation++ % count : 0, alive = 0;
    CUresult cause = CUDA_SUCCESS;
    for (size_t attempt = 0; attempt < count; attempt++) {
        size_t best = count;
        uint64_t fewest = UINT64_MAX;
        for (size_t i = 0; i < count; i++) {
            size_t index = start + i < count ? start + i : start + i - count;
            const bucket_object *bucket = group->buckets[index];
            if (refused >> index & 1 || !bucket->lane->lane) continue;
            trtx_lane_view view = trtx_lane_glance(bucket->lane->lane);
            if (view.dead) {
                cause = view.dead;
                continue;
            }
            alive++;
            if (only && bucket->lane != only) continue;
            if (view.submitted - view.completed >= fewest) continue;
            fewest = view.submitted - view.completed;
            best = index;
        }
        if (best == count) break;
        bucket_object *bucket = group->buckets[best];
        if (trtx_lane_acquire_among(bucket->lane->lane, bucket->mask, bucket->words, look, slot) == CUDA_SUCCESS) return bucket;
        refused |= UINT64_C(1) << best;
    }
    if (alive == 0) *dead = cause;
    return NULL;
}

void trtx_port_enqueue(port_object *self, wait_object *wait, shape_group *group) {
    wait->state = WAIT_QUEUED;
    wait->group = group;
    wait->queued_ns = trtx_now_ns();
    wait->arrival = self->arrivals++;
    wait->queue_previous = group->last;
    if (group->last)
        group->last->queue_next = wait;
    else
        group->first = wait;
    group->last = wait;
    group->queued++;
    self->queued++;
}

void trtx_port_dequeue(wait_object *wait) {
    shape_group *group = wait->group;
    if (wait->queue_previous)
        wait->queue_previous->queue_next = wait->queue_next;
    else
        group->first = wait->queue_next;
    if (wait->queue_next)
        wait->queue_next->queue_previous = wait->queue_previous;
    else
        group->last = wait->queue_previous;
    wait->queue_next = wait->queue_previous = NULL;
    wait->group = NULL;
    group->queued--;
    wait->port->queued--;
}

void trtx_port_abandon(port_object *self, lane_object *lane, uint64_t number) {
    if (self->abandoned_count == self->abandoned_room) trtx_port_abandoned(self); /* those that are done go */
    if (self->abandoned_count == self->abandoned_room) {
        size_t room = self->abandoned_room ? self->abandoned_room * 2 : 8; /* never more than slots, but for their size */
        struct abandoned *more = PyMem_Realloc(self->abandoned, room * sizeof *more);
        if (!more) return; /* it is only counted */
        self->abandoned = more;
        self->abandoned_room = room;
    }
    self->abandoned[self->abandoned_count++] = (struct abandoned){(lane_object *)Py_NewRef(lane), number};
}

size_t trtx_port_abandoned(port_object *self) {
    size_t left = 0, count = self->abandoned_count;
    struct abandoned *all = self->abandoned;
    for (size_t i = 0; i < count; i++)
        if (all[i].lane->lane) trtx_lane_poll(all[i].lane->lane);
    for (size_t i = 0; i < count; i++) {
        trtx_lane *lane = all[i].lane->lane;
        if (lane && trtx_lane_glance(lane).completed < all[i].number)
            all[left++] = all[i];
        else
            Py_DECREF(all[i].lane); /* its bucket, or the site that closed it, has it too: runs no code of others */
    }
    return self->abandoned_count = left;
}

/* Copy a queued request's arrays into its slot; they must still be what they were when they were queued. */
static bool copy_in_again(const bucket_object *bucket, size_t slot, PyObject *arrays) {
    for (Py_ssize_t i = 0; i < bucket->input_count; i++) {
        Py_buffer view;
        if (!trtx_view_input(PyTuple_GET_ITEM(arrays, i), &view)) return false;
        bool matches = trtx_view_matches(&view, &bucket->specs[i]);
        if (matches) memcpy(bucket->places[slot]->buffers[i].data, view.buf, (size_t)bucket->places[slot]->buffers[i].bytes);
        PyBuffer_Release(&view);
        if (!matches) return false;
    }
    return true;
}

/* The wait has left the queue, for this slot. */
static void serve(wait_object *wait, bucket_object *bucket, size_t slot, hub_object *current) {
    Py_INCREF(bucket);
    if (wait->acquiring) {
        place_object *place = trtx_place_new(bucket, slot);
        if (!place) PyErr_Clear();
        if (place) {
            wait->state = WAIT_READY;
            wait->outcome = (PyObject *)place;
            trtx_wait_moved_on(wait, current);
        } else {
            trtx_wait_fail(wait, NULL, CUDA_ERROR_OUT_OF_MEMORY, "");
        }
    } else {
        PyObject *arrays = wait->arrays;
        wait->arrays = NULL;
        CUresult status = CUDA_ERROR_INVALID_VALUE;
        const char *call = "";
        bool same = copy_in_again(bucket, slot, arrays);
        if (same) status = trtx_wait_launch(wait, bucket, slot, NULL, true, &call);
        if (status == CUDA_SUCCESS) {
            trtx_wait_moved_on(wait, current);
        } else {
            trtx_lane_release(bucket->lane->lane, slot);
            PyObject *error = NULL;
            if (!same)
                error = PyObject_CallFunction(PyExc_ValueError, "s",
                                              "an input array was changed in place (shape, dtype or size) while its request "
                                              "was queued");
            if (!same && !error) PyErr_Clear();
            trtx_wait_fail(wait, error, status, call);
        }
        Py_DECREF(arrays);
    }
    Py_DECREF(bucket);
}

/* The oldest queued wait of a group that is not stuck. */
static wait_object *next_in_line(port_object *self) {
    wait_object *next = NULL;
    for (size_t i = 0; i < self->group_count; i++) {
        wait_object *wait = self->groups[i]->stuck ? NULL : self->groups[i]->first;
        if (wait && (!next || wait->arrival < next->arrival)) next = wait;
    }
    return next;
}

void trtx_port_pump(port_object *self, lane_object *only, hub_object *current) {
    if (self->pumping) { /* from something that a pump runs: that pump goes round once more */
        self->pump_again = true;
        return;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_INCREF(self);
    self->pumping = true;
    do {
        self->pump_again = false;
        for (size_t i = 0; i < self->group_count; i++) self->groups[i]->stuck = false;
        for (wait_object *wait; (wait = next_in_line(self));) {
            size_t slot;
            CUresult dead = CUDA_SUCCESS;
            bucket_object *bucket = trtx_port_find_slot(wait->group, only, only == NULL, &slot, &dead);
            if (!bucket && dead == CUDA_SUCCESS) {
                wait->group->stuck = true;
                continue;
            }
            Py_INCREF(wait);
            trtx_port_dequeue(wait);
            if (bucket)
                serve(wait, bucket, slot, current);
            else
                trtx_wait_fail(wait, NULL, dead, "cuGraphLaunch"); /* what it would return */
            Py_DECREF(wait);
        }
        only = NULL;
    } while (self->pump_again);
    self->pumping = false;
    Py_DECREF(self);
    PyErr_Restore(type, value, trace);
}
