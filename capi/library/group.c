/* Groups: the tensors of trtxpy_graph_create_tensors, which lie in the pinned memory of one slot that they hold together. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

struct trtxpy_group {
    trtxpy_graph_object *graph;
    trtxpy_entry *entry; /* with a user */
    size_t lane, slot;
    atomic_size_t members;
};

const trtxpy_graph_object *trtxpy_group_graph(const trtxpy_group *group) {
    return group->graph;
}

const trtxpy_entry *trtxpy_group_entry(const trtxpy_group *group) {
    return group->entry;
}

void trtxpy_group_slot(const trtxpy_group *group, size_t *lane, size_t *slot) {
    *lane = group->lane;
    *slot = group->slot;
}

void trtxpy_group_leave(trtxpy_group *group) {
    if (atomic_fetch_sub(&group->members, 1) != 1) return;
    trtxpy_graph_object *graph = group->graph;
    /* Else Python took the lane along: a program may destroy what it has behind the library's end. */
    if (trtxpy_host_python()) trtxpy_lanes()->release(group->entry->lanes[group->lane].lane, group->slot);
    pthread_mutex_lock(&graph->mutex);
    graph->grouped--;
    pthread_mutex_unlock(&graph->mutex);
    trtxpy_entry_release(graph, group->entry);
    trtxpy_graph_pump(graph);
    atomic_fetch_sub(&graph->head.children, 1);
    free(group);
}

/* A slot for the group. One slot is left for requests on other tensors, which would wait for ever. */
static trtxpy_status take_slot(trtxpy_graph_object *graph, trtxpy_entry *entry, trtxpy_group *group) {
    trtxpy_job job = {.graph = graph, .entry = entry};
    trtxpy_status status = TRTXPY_OK;
    pthread_mutex_lock(&graph->mutex);
    if (graph->grouped + 1 < entry->slot_count && trtxpy_job_take_slot(&job)) graph->grouped++;
    else status = TRTXPY_BUSY;
    size_t grouped = graph->grouped;
    pthread_mutex_unlock(&graph->mutex);
    if (status != TRTXPY_OK)
        return trtxpy_fail(TRTXPY_BUSY, "no slot is free: %zu of %zu are out to sets of tensors, and one must be left for other "
                           "requests; destroy some, or open the graph with more slots or lanes", grouped, entry->slot_count);
    group->lane = job.lane;
    group->slot = job.slot;
    return TRTXPY_OK;
}

static trtxpy_status make_tensor(trtxpy_group *group, size_t index, trtxpy_tensor *handle) {
    trtxpy_graph_object *graph = group->graph;
    const trtxpy_port *port = &graph->ports[index];
    trtxpy_tensor_object *tensor = trtxpy_tensor_new(graph->context, port->dtype, TRTXPY_HOST, &group->entry->shapes[index]);
    if (!tensor) return trtxpy_last_status();
    tensor->data = group->entry->lanes[group->lane].places[group->slot].data[index];
    tensor->capacity = tensor->bytes;
    tensor->role = index < graph->input_count ? TRTXPY_INPUT : TRTXPY_OUTPUT;
    tensor->position = index < graph->input_count ? index : index - graph->input_count;
    tensor->group = group;
    atomic_fetch_add(&group->members, 1);
    if (tensor->bytes) memset(tensor->data, 0, tensor->bytes);
    *handle = (trtxpy_tensor)trtxpy_handle_make(TRTXPY_KIND_TENSOR, &tensor->head);
    if (*handle) return TRTXPY_OK;
    trtxpy_status status = trtxpy_last_status();
    trtxpy_tensor_free(tensor);
    return status;
}

static trtxpy_status make_group(trtxpy_graph_object *graph, trtxpy_entry *entry, trtxpy_tensor *inputs, trtxpy_tensor *outputs) {
    for (size_t i = 0; i < graph->input_count + graph->output_count; i++)
        if (graph->ports[i].dtype != graph->ports[i].engine_dtype)
            return trtxpy_fail(TRTXPY_UNSUPPORTED, "'%s' is %s and computed as %s: it must be converted, so its tensor cannot lie in the "
                               "graph's own memory; use trtxpy_tensor_create", graph->ports[i].name,
                               trtxpy_dtype_name(graph->ports[i].dtype), trtxpy_dtype_name(graph->ports[i].engine_dtype));
    trtxpy_group *group = calloc(1, sizeof *group);
    if (!group) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for a set of tensors");
    group->graph = graph;
    group->entry = entry;
    trtxpy_status status = take_slot(graph, entry, group);
    if (status != TRTXPY_OK) {
        free(group);
        return status;
    }
    pthread_mutex_lock(&graph->mutex);
    entry->users++;
    pthread_mutex_unlock(&graph->mutex);
    atomic_fetch_add(&graph->head.children, 1);
    atomic_store(&group->members, 1); /* this call */
    size_t made = 0, count = graph->input_count + graph->output_count;
    while (made < count && status == TRTXPY_OK) {
        trtxpy_tensor *handle = made < graph->input_count ? &inputs[made] : &outputs[made - graph->input_count];
        status = make_tensor(group, made, handle);
        if (status == TRTXPY_OK) made++;
    }
    if (status != TRTXPY_OK) {
        trtxpy_kept_error first = trtxpy_keep_error();
        while (made--) {
            trtxpy_tensor *handle = made < graph->input_count ? &inputs[made] : &outputs[made - graph->input_count];
            trtxpy_tensor_destroy(*handle);
            *handle = NULL;
        }
        trtxpy_restore_error(&first);
    }
    trtxpy_group_leave(group);
    return status;
}

trtxpy_status trtxpy_graph_create_tensors(trtxpy_graph handle, const trtxpy_named_shape *shapes, size_t shape_count,
                                          trtxpy_tensor *inputs, size_t input_count, trtxpy_tensor *outputs,
                                          size_t output_count) {
    for (size_t i = 0; inputs && i < input_count; i++) inputs[i] = NULL;
    for (size_t i = 0; outputs && i < output_count; i++) outputs[i] = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if ((input_count && !inputs) || (output_count && !outputs))
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is NULL; expected where to write the handles", input_count && !inputs ? "inputs" : "outputs");
    if ((status = trtxpy_requests_enter()) != TRTXPY_OK) return status; /* behind the end there are no slots */
    trtxpy_graph_object *graph = trtxpy_handle_acquire(handle, TRTXPY_KIND_GRAPH, "graph");
    if (!graph) {
        trtxpy_requests_leave();
        return TRTXPY_INVALID_HANDLE;
    }
    trtxpy_shape *wanted = calloc(graph->input_count ? graph->input_count : 1, sizeof *wanted);
    trtxpy_entry *entry = NULL;
    if (!wanted)
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for %zu shapes", graph->input_count);
    else if (input_count != graph->input_count || output_count != graph->output_count)
        status = trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "there is room for %zu inputs and %zu outputs; the graph has %zu and %zu",
                             input_count, output_count, graph->input_count, graph->output_count);
    else
        status = trtxpy_graph_shapes(graph, shapes, shape_count, wanted);
    if (status == TRTXPY_OK) status = trtxpy_entry_get(graph, wanted, &entry);
    if (status == TRTXPY_OK && !entry->py)
        status = trtxpy_fail(entry->status, "this shape is not captured: %s", entry->why ? entry->why : "no reason is known");
    if (status == TRTXPY_OK) status = make_group(graph, entry, inputs, outputs);
    if (entry) trtxpy_entry_release(graph, entry);
    free(wanted);
    trtxpy_handle_release(&graph->head);
    trtxpy_requests_leave();
    return status;
}
