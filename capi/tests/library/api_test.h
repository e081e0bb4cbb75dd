/* What the tests of the whole library share: a context on the mock, models from files, tensors with values.
 * TRTXPY_TEST_MODELS: the folder that make_models.py wrote. TRTXPY_PYTHON: an environment that has trtx_py. */
#ifndef API_TEST_H
#define API_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "trtxpy.h"

#define CHECK_DETAIL trtxpy_last_error()
#include "../check.h"

#define GOOD(call) CHECK_EQ(call, TRTXPY_OK)
#define MS UINT64_C(1000000)

typedef struct blob {
    char data[1 << 16];
    size_t bytes;
} blob;

static inline const char *model_path(const char *name) {
    static _Thread_local char path[1024];
    const char *folder = getenv("TRTXPY_TEST_MODELS");
    snprintf(path, sizeof path, "%s/%s", folder ? folder : ".", name);
    return path;
}

static inline blob *read_model(const char *name) {
    blob *found = calloc(1, sizeof *found);
    FILE *file = fopen(model_path(name), "rb");
    if (!file || !found) {
        fprintf(stderr, "no model %s: run make_models.py and set TRTXPY_TEST_MODELS\n", model_path(name));
        exit(2);
    }
    found->bytes = fread(found->data, 1, sizeof found->data, file);
    fclose(file);
    return found;
}

static inline trtxpy_context open_context(const char *backend) {
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    options.backend = backend;
    trtxpy_context context = NULL;
    trtxpy_status status = trtxpy_context_create(&options, &context);
    if (status != TRTXPY_OK) {
        fprintf(stderr, "no context %s: %s: %s\n", backend, trtxpy_status_name(status), trtxpy_last_error());
        exit(2);
    }
    return context;
}

static inline trtxpy_graph open_model_with(trtxpy_context context, const char *name, const trtxpy_graph_options *options) {
    blob *model = read_model(name);
    trtxpy_graph graph = NULL;
    GOOD(trtxpy_graph_from_onnx(context, model->data, model->bytes, NULL, 0, options, &graph));
    free(model);
    return graph;
}

static inline trtxpy_graph open_model(trtxpy_context context, const char *name) {
    return open_model_with(context, name, NULL);
}

static inline trtxpy_shape shape_of(int32_t rank, int64_t first, int64_t second) {
    return (trtxpy_shape){rank, 0, {first, second}};
}

static inline trtxpy_tensor make_tensor_at(trtxpy_context context, trtxpy_dtype dtype, trtxpy_shape shape, trtxpy_location location) {
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    desc.dtype = dtype;
    desc.location = location;
    desc.shape = shape;
    trtxpy_tensor tensor = NULL;
    GOOD(trtxpy_tensor_create(context, &desc, &tensor));
    return tensor;
}

static inline trtxpy_tensor make_tensor(trtxpy_context context, trtxpy_dtype dtype, trtxpy_shape shape) {
    return make_tensor_at(context, dtype, shape, TRTXPY_HOST);
}

/* A graph of double.onnx with its two tensors of `rows` by 4. */
typedef struct doubling {
    trtxpy_context context;
    trtxpy_graph graph;
    trtxpy_tensor x, y;
    trtxpy_binding in, out;
    size_t count;
} doubling;

static inline void doubling_tensors(doubling *d, int64_t rows) {
    d->count = (size_t)rows * 4;
    d->x = make_tensor(d->context, TRTXPY_FLOAT32, shape_of(2, rows, 4));
    d->y = make_tensor(d->context, TRTXPY_FLOAT32, shape_of(2, rows, 4));
    d->in = (trtxpy_binding){"x", d->x};
    d->out = (trtxpy_binding){"y", d->y};
}

static inline void doubling_open(doubling *d, const char *backend, int64_t rows) {
    d->context = open_context(backend);
    d->graph = open_model(d->context, "double.onnx");
    doubling_tensors(d, rows);
}

static inline void doubling_fill(const doubling *d, float start) {
    float *values = malloc(d->count * sizeof *values);
    for (size_t i = 0; i < d->count; i++) values[i] = start + (float)i;
    GOOD(trtxpy_tensor_write(d->x, values, d->count * sizeof *values));
    free(values);
}

/* y is twice what doubling_fill wrote. */
static inline bool doubling_right(const doubling *d, float start) {
    float *values = malloc(d->count * sizeof *values);
    GOOD(trtxpy_tensor_read(d->y, values, d->count * sizeof *values));
    bool right = true;
    for (size_t i = 0; i < d->count; i++) right = right && values[i] == 2 * (start + (float)i);
    free(values);
    return right;
}

static inline void doubling_close(doubling *d) {
    GOOD(trtxpy_tensor_destroy(d->x));
    GOOD(trtxpy_tensor_destroy(d->y));
    GOOD(trtxpy_graph_destroy(d->graph));
    GOOD(trtxpy_context_destroy(d->context));
}

/* Counts its calls, and keeps what the last one said. */
typedef struct listener {
    atomic_int calls;
    atomic_int status;
    atomic_ullong token;
    atomic_int captured;
} listener;

static inline void listen_to(trtxpy_status status, const char *message, const trtxpy_result *result, void *userdata) {
    listener *heard = userdata;
    CHECK((status == TRTXPY_OK) == (message == NULL));
    atomic_store(&heard->status, status);
    atomic_store(&heard->token, result->token);
    atomic_store(&heard->captured, result->captured);
    atomic_fetch_add(&heard->calls, 1);
}

static inline bool hears(listener *heard, int calls) {
    for (int i = 0; i < 60000 && atomic_load(&heard->calls) < calls; i++) usleep(1000);
    return atomic_load(&heard->calls) == calls;
}

static inline size_t live_objects(void) {
    size_t count = 0;
    GOOD(trtxpy_live_objects(&count));
    return count;
}

#endif
