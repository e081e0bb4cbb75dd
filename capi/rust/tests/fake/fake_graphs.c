/* Graphs and tensors. */
#include "fake.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- graphs ---- */

static bool parse(const char *text, object *graph) {
    char type[16], axes[64], flag[16] = "";
    if (sscanf(text, "identity %15s %63s %15s", type, axes, flag) < 2) return false;
    graph->dtype = -1;
    for (trtxpy_dtype dtype = 0; dtype <= TRTXPY_FLOAT8; dtype++) {
        const char *name = trtxpy_dtype_name(dtype);
        if (name && strcmp(name, type) == 0) graph->dtype = dtype;
    }
    if (strcmp(axes, "scalar") != 0)
        for (char *at = strtok(axes, "x"); at; at = strtok(NULL, "x")) graph->shape.dims[graph->shape.rank++] = atoll(at);
    graph->fails = strcmp(flag, "fail") == 0;
    return graph->dtype >= 0;
}

trtxpy_status open_graph(trtxpy_context context, const void *model, size_t bytes, bool plan, trtxpy_graph *graph) {
    begin();
    *graph = NULL;
    pthread_mutex_lock(&mutex);
    object *parent = find(context, CONTEXT);
    char *text = strndup(model, bytes);
    bool is_plan = strncmp(text, "plan ", 5) == 0;
    object parsed = {0};
    if (parent && (is_plan != plan || !parse(text + (plan ? 5 : 0), &parsed)))
        fail(plan ? TRTXPY_PLAN : TRTXPY_PARSE, "%s is no %s", text, plan ? "plan" : "model");
    if (error_status == TRTXPY_OK) {
        object *made;
        *graph = make(GRAPH, parent, &made);
        made->dtype = parsed.dtype;
        made->shape = parsed.shape;
        made->fails = parsed.fails;
        if (asprintf(&made->text, "plan %s", text + (plan ? 5 : 0)) < 0) abort();
    }
    free(text);
    pthread_mutex_unlock(&mutex);
    return error_status;
}

trtxpy_status trtxpy_graph_from_onnx(trtxpy_context context, const void *model, size_t model_bytes, const void *weights,
                                     size_t weights_bytes, const trtxpy_graph_options *options, trtxpy_graph *graph) {
    (void)weights, (void)weights_bytes, (void)options;
    return open_graph(context, model, model_bytes, false, graph);
}
trtxpy_status trtxpy_graph_from_plan(trtxpy_context context, const void *plan, size_t plan_bytes,
                                     const trtxpy_graph_options *options, trtxpy_graph *graph) {
    (void)options;
    return open_graph(context, plan, plan_bytes, true, graph);
}
trtxpy_status trtxpy_graph_from_file(trtxpy_context context, const char *path, const trtxpy_graph_options *options,
                                     trtxpy_graph *graph) {
    char text[256] = "";
    (void)options;
    begin();
    *graph = NULL;
    FILE *file = fopen(path, "rb");
    if (!file) return fail(TRTXPY_NOT_FOUND, "%s: %s", path, strerror(errno));
    size_t bytes = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    return open_graph(context, text, bytes, strncmp(text, "plan ", 5) == 0, graph);
}
trtxpy_status trtxpy_graph_destroy(trtxpy_graph graph) { return destroy(graph, GRAPH); }

trtxpy_status trtxpy_graph_get_plan(trtxpy_graph graph, void *plan, size_t *bytes) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(graph, GRAPH);
    if (found) {
        size_t room = *bytes;
        *bytes = strlen(found->text);
        if (plan && room < *bytes) fail(TRTXPY_BUFFER_SIZE, "%zu", room);
        else if (plan) memcpy(plan, found->text, *bytes);
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}

trtxpy_status trtxpy_graph_tensor_count(trtxpy_graph graph, trtxpy_direction direction, size_t *count) {
    begin();
    pthread_mutex_lock(&mutex);
    if (find(graph, GRAPH)) *count = direction == TRTXPY_INPUT || direction == TRTXPY_OUTPUT;
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_graph_tensor_info(trtxpy_graph graph, trtxpy_direction direction, size_t index, trtxpy_tensor_info *info) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(graph, GRAPH);
    if (found && index) fail(TRTXPY_NOT_FOUND, "%zu", index);
    else if (found) {
        info->name = direction == TRTXPY_INPUT ? "x" : "y";
        info->dtype = info->engine_dtype = found->dtype;
        info->shape = found->shape;
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}

bool fits(const object *graph, const trtxpy_shape *shape) {
    if (graph->shape.rank != shape->rank) return false;
    for (int i = 0; i < shape->rank; i++)
        if (graph->shape.dims[i] >= 0 && graph->shape.dims[i] != shape->dims[i]) return false;
    return true;
}

object *check_shapes(trtxpy_graph graph, const trtxpy_named_shape *inputs, size_t count) {
    object *found = find(graph, GRAPH);
    if (!found) return NULL;
    if (count != 1) fail(TRTXPY_INVALID_ARGUMENT, "%zu shapes", count);
    else if (strcmp(inputs[0].name, "x") != 0) fail(TRTXPY_NOT_FOUND, "no input '%s'", inputs[0].name);
    else if (!fits(found, &inputs[0].shape)) fail(TRTXPY_SHAPE, "input 'x' has another shape");
    return error_status == TRTXPY_OK ? found : NULL;
}
trtxpy_status trtxpy_graph_prepare(trtxpy_graph graph, const trtxpy_named_shape *inputs, size_t count) {
    begin();
    pthread_mutex_lock(&mutex);
    check_shapes(graph, inputs, count);
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_graph_output_shapes(trtxpy_graph graph, const trtxpy_named_shape *inputs, size_t count, trtxpy_shape *shapes,
                                         size_t room) {
    begin();
    pthread_mutex_lock(&mutex);
    if (check_shapes(graph, inputs, count) && room) shapes[0] = inputs[0].shape;
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_graph_get_statistics(trtxpy_graph graph, trtxpy_graph_statistics *statistics) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(graph, GRAPH);
    if (found) {
        statistics->submitted = statistics->captured = found->submitted;
        statistics->completed = found->completed;
        statistics->failed = found->failed;
        statistics->cancelled = found->cancelled;
        statistics->in_flight = found->in_flight;
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}

/* ---- tensors ---- */

static void *new_tensor(object *context, trtxpy_dtype dtype, trtxpy_location location, const trtxpy_shape *shape, object **made) {
    size_t bytes;
    if (trtxpy_dtype_bytes(dtype, shape, &bytes) != TRTXPY_OK) return NULL;
    void *handle = make(TENSOR, context, made);
    (*made)->dtype = dtype;
    (*made)->location = location;
    (*made)->shape = *shape;
    (*made)->bytes = bytes;
    (*made)->data = calloc(1, bytes ? bytes : 1);
    return handle;
}
trtxpy_status trtxpy_tensor_create(trtxpy_context context, const trtxpy_tensor_desc *desc, trtxpy_tensor *tensor) {
    begin();
    *tensor = NULL;
    pthread_mutex_lock(&mutex);
    object *parent = find(context, CONTEXT), *made;
    if (parent && desc->location > TRTXPY_DEVICE) fail(TRTXPY_INVALID_ARGUMENT, "location %d", desc->location);
    else if (parent) *tensor = new_tensor(parent, desc->dtype, desc->location, &desc->shape, &made);
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_tensor_destroy(trtxpy_tensor tensor) { return destroy(tensor, TENSOR); }

void reshape(object *tensor, const trtxpy_shape *shape) {
    size_t bytes;
    if (tensor->group) fail(TRTXPY_UNSUPPORTED, "a captured graph's");
    else if (trtxpy_dtype_bytes(tensor->dtype, shape, &bytes) == TRTXPY_OK) {
        if (bytes > tensor->bytes) {
            free(tensor->data);
            tensor->data = calloc(1, bytes);
        }
        tensor->bytes = bytes;
        tensor->shape = *shape;
    }
}
/* An open tensor; write: that nobody uses; else: that nobody writes. */
static object *usable(trtxpy_tensor tensor, bool write) {
    object *found = find(tensor, TENSOR);
    if (found && (write ? found->use != 0 : found->use < 0)) {
        fail(TRTXPY_BUSY, "a request in flight uses this tensor");
        return NULL;
    }
    return found;
}
trtxpy_status trtxpy_tensor_resize(trtxpy_tensor tensor, const trtxpy_shape *shape) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = usable(tensor, true);
    if (found) reshape(found, shape);
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_tensor_describe(trtxpy_tensor tensor, trtxpy_tensor_desc *desc) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(tensor, TENSOR); /* whoever only asks is never refused */
    if (found) {
        desc->dtype = found->dtype;
        desc->location = found->location;
        desc->shape = found->shape;
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_tensor_bytes(trtxpy_tensor tensor, size_t *bytes) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(tensor, TENSOR);
    if (found) *bytes = found->bytes;
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_tensor_write(trtxpy_tensor tensor, const void *data, size_t bytes) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = usable(tensor, true);
    if (found && bytes != found->bytes) fail(TRTXPY_BUFFER_SIZE, "%zu bytes; the tensor has %zu", bytes, found->bytes);
    else if (found) memcpy(found->data, data, bytes);
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_tensor_read(trtxpy_tensor tensor, void *data, size_t bytes) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = usable(tensor, false);
    if (found && bytes != found->bytes) fail(TRTXPY_BUFFER_SIZE, "%zu bytes; the tensor has %zu", bytes, found->bytes);
    else if (found) memcpy(data, found->data, bytes);
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_tensor_data(trtxpy_tensor tensor, void **data) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = usable(tensor, false);
    if (found) *data = found->bytes ? found->data : NULL;
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_graph_create_tensors(trtxpy_graph graph, const trtxpy_named_shape *shapes, size_t shape_count,
                                          trtxpy_tensor *inputs, size_t input_count, trtxpy_tensor *outputs, size_t output_count) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = check_shapes(graph, shapes, shape_count), *made;
    if (found && found->groups) fail(TRTXPY_BUSY, "no slot is left");
    else if (found && input_count == 1 && output_count == 1) {
        inputs[0] = new_tensor(found->parent, found->dtype, TRTXPY_HOST, &shapes[0].shape, &made);
        made->group = found;
        outputs[0] = new_tensor(found->parent, found->dtype, TRTXPY_HOST, &shapes[0].shape, &made);
        made->group = found;
        found->groups = 2;
        found->children++;
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}
/* The tensor itself stands for the exported one: given back by giving it in again. */
trtxpy_status trtxpy_tensor_to_dlpack(trtxpy_tensor tensor, struct DLManagedTensor **managed) {
    begin();
    pthread_mutex_lock(&mutex);
    object *found = find(tensor, TENSOR);
    if (found) {
        found->children++;
        *managed = (struct DLManagedTensor *)found;
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}
trtxpy_status trtxpy_tensor_from_dlpack(trtxpy_context context, struct DLManagedTensor *managed, trtxpy_tensor *tensor) {
    begin();
    *tensor = NULL;
    pthread_mutex_lock(&mutex);
    object *parent = find(context, CONTEXT), *from = (object *)managed, *made;
    if (parent) {
        *tensor = new_tensor(parent, from->dtype, TRTXPY_FOREIGN_HOST, &from->shape, &made);
        memcpy(made->data, from->data, from->bytes);
        from->children--;
    }
    pthread_mutex_unlock(&mutex);
    return error_status;
}
