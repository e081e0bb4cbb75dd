/* Entries: the shapes that are captured, with what is needed to launch them, and those that cannot be.
 *
 * An entry pins its graphs in Python as long as it is here. There are at most so many as the engine keeps captured; the one
 * that was used longest ago goes first. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

/* When memory for a capture was missing, or the GPU failed: it may be there later. */
enum { RETRY_S = 2 };

static bool same(const trtxpy_graph_object *graph, const trtxpy_entry *entry, const trtxpy_tensor_object *const *tensors,
                 const trtxpy_shape *shapes) {
    for (size_t i = 0; i < graph->input_count; i++)
        if (!trtxpy_shape_equal(&entry->shapes[i], tensors ? &tensors[i]->shape : &shapes[i])) return false;
    return true;
}

static void free_entry(trtxpy_entry *entry) {
    for (size_t i = 0; entry->lanes && i < entry->lane_count; i++) {
        trtxpy_entry_lane *lane = &entry->lanes[i];
        for (size_t slot = 0; lane->places && slot < 64 * lane->words; slot++) free(lane->places[slot].data);
        free(lane->places);
    }
    free(entry->lanes);
    free(entry->shapes);
    free(entry->bytes);
    free(entry->why);
    free(entry);
}

static void unpin(trtxpy_entry *entry) {
    trtxpy_scope scope;
    if (entry->py && trtxpy_host_python() && trtxpy_scope_begin(&scope)) {
        PyObject *result;
        if (trtxpy_call(&scope, &result, "release", "O", entry->py) == TRTXPY_OK) scope.py->Py_DecRef(result);
        scope.py->Py_DecRef(entry->py);
        trtxpy_scope_end(&scope);
    }
    free_entry(entry);
}

/* The same, with the thread's error kept. */
static void unpin_quietly(trtxpy_entry *entry) {
    trtxpy_kept_error before = trtxpy_keep_error();
    unpin(entry);
    trtxpy_restore_error(&before);
}

trtxpy_entry *trtxpy_entry_find(trtxpy_graph_object *graph, const trtxpy_tensor_object *const *tensors, const trtxpy_shape *shapes) {
    pthread_mutex_lock(&graph->mutex);
    trtxpy_entry **link = &graph->entries, *entry;
    while ((entry = *link) && !same(graph, entry, tensors, shapes)) link = &entry->next;
    if (entry && !entry->py && entry->retry_ns && trtxpy_now_ns() > entry->retry_ns && entry->users == 0) {
        *link = entry->next; /* worth another try */
        graph->entry_count--;
        pthread_mutex_unlock(&graph->mutex);
        free_entry(entry);
        return NULL;
    }
    if (entry) {
        *link = entry->next; /* latest first */
        entry->next = graph->entries;
        graph->entries = entry;
        entry->users++;
    }
    pthread_mutex_unlock(&graph->mutex);
    return entry;
}

void trtxpy_entry_release(trtxpy_graph_object *graph, trtxpy_entry *entry) {
    pthread_mutex_lock(&graph->mutex);
    bool last = --entry->users == 0 && !entry->listed;
    pthread_mutex_unlock(&graph->mutex);
    if (last) unpin_quietly(entry);
}

/* With the mutex: entries that nobody uses, until there are no more than `most`, taken out of the list; the caller unpins them. */
static trtxpy_entry *take_surplus(trtxpy_graph_object *graph, size_t most) {
    trtxpy_entry *surplus = NULL;
    while (graph->entry_count > most) {
        trtxpy_entry **oldest = NULL;
        for (trtxpy_entry **link = &graph->entries; *link; link = &(*link)->next)
            if ((*link)->users == 0) oldest = link;
        if (!oldest) break; /* all are in use: over the limit for a while */
        trtxpy_entry *entry = *oldest;
        *oldest = entry->next;
        graph->entry_count--;
        entry->listed = false;
        entry->next = surplus;
        surplus = entry;
    }
    return surplus;
}

static bool read_place(trtxpy_reader *row, trtxpy_graph_object *graph, trtxpy_place *place) {
    size_t tensors = graph->input_count + graph->output_count;
    place->data = calloc(tensors ? tensors : 1, sizeof *place->data);
    if (!place->data) return false;
    trtxpy_reader inputs = trtxpy_read_tuple(row, 2), outputs = trtxpy_read_tuple(row, 3);
    for (size_t i = 0; i < graph->input_count; i++) place->data[i] = (void *)(uintptr_t)trtxpy_read_unsigned(&inputs, i);
    for (size_t i = 0; i < graph->output_count; i++)
        place->data[graph->input_count + i] = (void *)(uintptr_t)trtxpy_read_unsigned(&outputs, i);
    place->exec = (CUgraphExec)(uintptr_t)trtxpy_read_unsigned(row, 1);
    return !row->failed && !inputs.failed && !outputs.failed;
}

static bool read_lane(trtxpy_reader *bucket, trtxpy_graph_object *graph, trtxpy_entry_lane *lane) {
    lane->lane = (trtx_lane *)(uintptr_t)trtxpy_read_unsigned(bucket, 0);
    trtxpy_reader slots = trtxpy_read_tuple(bucket, 1);
    lane->place_count = trtxpy_read_count(&slots);
    size_t most = 0;
    for (size_t i = 0; i < lane->place_count; i++) {
        trtxpy_reader row = trtxpy_read_tuple(&slots, i);
        size_t slot = (size_t)trtxpy_read_unsigned(&row, 0);
        if (slot >= 64 * sizeof lane->mask / sizeof *lane->mask) return false;
        if (slot > most) most = slot;
    }
    lane->words = most / 64 + 1;
    lane->places = calloc(64 * lane->words, sizeof *lane->places);
    if (!lane->places) return false;
    for (size_t i = 0; i < lane->place_count; i++) {
        trtxpy_reader row = trtxpy_read_tuple(&slots, i);
        size_t slot = (size_t)trtxpy_read_unsigned(&row, 0);
        if (!read_place(&row, graph, &lane->places[slot])) return false;
        lane->mask[slot / 64] |= UINT64_C(1) << slot % 64;
    }
    return !bucket->failed && !slots.failed && lane->lane;
}

static trtxpy_status read_entry(const trtxpy_scope *scope, PyObject *result, trtxpy_graph_object *graph, trtxpy_entry *entry) {
    trtxpy_reader reader = {scope->py, result, false};
    entry->py = trtxpy_read_object(&reader, 1);
    if (entry->py) scope->py->Py_IncRef(entry->py);
    trtxpy_reader outputs = trtxpy_read_tuple(&reader, 2), buckets = trtxpy_read_tuple(&reader, 3);
    for (size_t i = 0; i < graph->output_count; i++) trtxpy_read_shape(&outputs, i, &entry->shapes[graph->input_count + i]);
    entry->lane_count = trtxpy_read_count(&buckets);
    entry->lanes = calloc(entry->lane_count ? entry->lane_count : 1, sizeof *entry->lanes);
    bool good = entry->lanes && entry->lane_count && !reader.failed && !outputs.failed;
    for (size_t i = 0; good && i < entry->lane_count; i++) {
        trtxpy_reader bucket = trtxpy_read_tuple(&buckets, i);
        good = read_lane(&bucket, graph, &entry->lanes[i]);
        entry->slot_count += entry->lanes[i].place_count;
    }
    for (size_t i = 0; good && i < graph->input_count + graph->output_count; i++)
        good = trtxpy_shape_bytes(graph->ports[i].engine_dtype, &entry->shapes[i], graph->ports[i].name, &entry->bytes[i]) == TRTXPY_OK;
    return good && entry->slot_count ? TRTXPY_OK : trtxpy_fail(TRTXPY_INTERNAL, "what was captured cannot be understood");
}

static trtxpy_status capture(trtxpy_graph_object *graph, const trtxpy_shape *shapes, trtxpy_entry *entry) {
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return trtxpy_last_status();
    const trtxpy_python *py = scope.py;
    PyObject *dims = py->PyTuple_New((ptrdiff_t)graph->input_count), *result;
    for (size_t i = 0; dims && i < graph->input_count; i++) {
        PyObject *item = trtxpy_dims(py, &shapes[i]);
        if (item) {
            py->PyTuple_SetItem(dims, (ptrdiff_t)i, item);
        } else {
            py->Py_DecRef(dims);
            dims = NULL;
        }
    }
    trtxpy_status status = trtxpy_call(&scope, &result, "capture", "ON", graph->py, dims);
    if (status == TRTXPY_OK) {
        status = read_entry(&scope, result, graph, entry);
        py->Py_DecRef(result);
    }
    trtxpy_scope_end(&scope);
    return status;
}

static void unpin_all(trtxpy_entry *surplus) {
    while (surplus) {
        trtxpy_entry *next = surplus->next;
        unpin_quietly(surplus);
        surplus = next;
    }
}

/* Before a capture: a plan may let one context at a time have its profile, and memory may be short. */
static bool make_room(trtxpy_graph_object *graph, size_t most) {
    pthread_mutex_lock(&graph->mutex);
    trtxpy_entry *surplus = take_surplus(graph, most);
    pthread_mutex_unlock(&graph->mutex);
    unpin_all(surplus);
    return surplus != NULL;
}

trtxpy_status trtxpy_entry_get(trtxpy_graph_object *graph, const trtxpy_shape *shapes, trtxpy_entry **found) {
    if ((*found = trtxpy_entry_find(graph, NULL, shapes))) return TRTXPY_OK;
    size_t tensors = graph->input_count + graph->output_count;
    trtxpy_entry *entry = calloc(1, sizeof *entry), *surplus, *other;
    if (entry) {
        entry->shapes = calloc(tensors ? tensors : 1, sizeof *entry->shapes);
        entry->bytes = calloc(tensors ? tensors : 1, sizeof *entry->bytes);
    }
    if (!entry || !entry->shapes || !entry->bytes) {
        if (entry) free_entry(entry);
        return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for a captured shape");
    }
    if (graph->input_count) memcpy(entry->shapes, shapes, graph->input_count * sizeof *shapes);
    make_room(graph, graph->max_entries - 1);
    trtxpy_status status = capture(graph, shapes, entry);
    if (status == TRTXPY_OUT_OF_MEMORY && make_room(graph, 0)) status = capture(graph, shapes, entry);
    /* CUDA: what was tried out may have been values that cannot be computed, as a division by 0, and a request's can be. */
    if (status == TRTXPY_UNSUPPORTED || status == TRTXPY_OUT_OF_MEMORY || status == TRTXPY_CUDA) {
        entry->why = strdup(trtxpy_last_error());
        entry->status = status;
        if (status != TRTXPY_UNSUPPORTED) entry->retry_ns = trtxpy_now_ns() + RETRY_S * UINT64_C(1000000000);
        trtxpy_begin();
    } else if (status != TRTXPY_OK) {
        unpin_quietly(entry);
        return status;
    }
    pthread_mutex_lock(&graph->mutex);
    for (other = graph->entries; other && !same(graph, other, NULL, shapes); other = other->next) {}
    if (other) { /* another thread was faster */
        other->users++;
        *found = other;
        surplus = entry;
        entry->next = NULL;
    } else {
        entry->users = 1;
        entry->listed = true;
        entry->next = graph->entries;
        graph->entries = entry;
        graph->entry_count++;
        *found = entry;
        surplus = take_surplus(graph, graph->max_entries);
    }
    pthread_mutex_unlock(&graph->mutex);
    unpin_all(surplus);
    return TRTXPY_OK;
}

void trtxpy_entry_close_all(trtxpy_graph_object *graph) {
    while (graph->entries) {
        trtxpy_entry *entry = graph->entries;
        graph->entries = entry->next;
        unpin_quietly(entry);
    }
}
