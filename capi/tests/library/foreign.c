/* A program with no Python of its own: loads a model or plan, runs 10,000 requests from 8 threads, checks that equal inputs give
 * equal outputs, and leaves nothing behind.
 *   foreign BACKEND FILE ROWS     every input gets ROWS as its first axis where that is free, 8 for others
 * Exit code 0: all is well. */
#include "api_test.h"

enum { WORKERS = 8, REQUESTS = 1250, MOST = 8 };

static trtxpy_context context;
static trtxpy_graph graph;
static size_t input_count, output_count;
static trtxpy_shape input_shapes[MOST], output_shapes[MOST];
static trtxpy_tensor_info inputs[MOST], outputs[MOST];
static unsigned char *expected[MOST];
static size_t sizes[MOST];

static trtxpy_status fill(trtxpy_tensor tensor, trtxpy_dtype dtype) {
    size_t bytes;
    trtxpy_status status = trtxpy_tensor_bytes(tensor, &bytes);
    unsigned char *data = calloc(bytes ? bytes : 1, 1);
    if (dtype == TRTXPY_FLOAT32)
        for (size_t i = 0; i < bytes / 4; i++) ((float *)(void *)data)[i] = (float)(i % 13) / 7 - 1;
    if (status == TRTXPY_OK) status = trtxpy_tensor_write(tensor, data, bytes);
    free(data);
    return status;
}

/* Tensors for all inputs and outputs, bound by name. */
static void make(trtxpy_binding *in, trtxpy_binding *out) {
    for (size_t i = 0; i < input_count; i++) {
        in[i] = (trtxpy_binding){inputs[i].name, make_tensor(context, inputs[i].dtype, input_shapes[i])};
        GOOD(fill(in[i].tensor, inputs[i].dtype));
    }
    for (size_t i = 0; i < output_count; i++)
        out[i] = (trtxpy_binding){outputs[i].name, make_tensor(context, outputs[i].dtype, output_shapes[i])};
}

static void unmake(trtxpy_binding *in, trtxpy_binding *out) {
    for (size_t i = 0; i < input_count; i++) GOOD(trtxpy_tensor_destroy(in[i].tensor));
    for (size_t i = 0; i < output_count; i++) GOOD(trtxpy_tensor_destroy(out[i].tensor));
}

static void *work(void *unused) {
    (void)unused;
    trtxpy_binding in[MOST], out[MOST];
    make(in, out);
    for (int i = 0; i < REQUESTS && !failed_checks; i++) GOOD(trtxpy_dispatch(graph, in, input_count, out, output_count, NULL));
    for (size_t i = 0; i < output_count; i++) {
        unsigned char *found = malloc(sizes[i] ? sizes[i] : 1);
        GOOD(trtxpy_tensor_read(out[i].tensor, found, sizes[i]));
        CHECK(memcmp(found, expected[i], sizes[i]) == 0);
        free(found);
    }
    unmake(in, out);
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    context = open_context(arguments[1]);
    GOOD(trtxpy_graph_from_file(context, arguments[2], NULL, &graph));
    if (!graph) return 1;
    GOOD(trtxpy_graph_tensor_count(graph, TRTXPY_INPUT, &input_count));
    GOOD(trtxpy_graph_tensor_count(graph, TRTXPY_OUTPUT, &output_count));
    trtxpy_named_shape shapes[MOST];
    for (size_t i = 0; i < input_count; i++) {
        inputs[i] = (trtxpy_tensor_info)TRTXPY_TENSOR_INFO_INIT;
        GOOD(trtxpy_graph_tensor_info(graph, TRTXPY_INPUT, i, &inputs[i]));
        input_shapes[i] = inputs[i].shape;
        for (int32_t axis = 0; axis < input_shapes[i].rank; axis++)
            if (input_shapes[i].dims[axis] < 0) input_shapes[i].dims[axis] = axis ? 8 : atoi(arguments[3]);
        shapes[i] = (trtxpy_named_shape){inputs[i].name, input_shapes[i]};
    }
    for (size_t i = 0; i < output_count; i++) {
        outputs[i] = (trtxpy_tensor_info)TRTXPY_TENSOR_INFO_INIT;
        GOOD(trtxpy_graph_tensor_info(graph, TRTXPY_OUTPUT, i, &outputs[i]));
    }
    GOOD(trtxpy_graph_output_shapes(graph, shapes, input_count, output_shapes, MOST));
    trtxpy_binding in[MOST], out[MOST];
    make(in, out);
    GOOD(trtxpy_dispatch(graph, in, input_count, out, output_count, NULL));
    for (size_t i = 0; i < output_count; i++) {
        GOOD(trtxpy_tensor_bytes(out[i].tensor, &sizes[i]));
        expected[i] = malloc(sizes[i] ? sizes[i] : 1);
        GOOD(trtxpy_tensor_read(out[i].tensor, expected[i], sizes[i]));
    }
    unmake(in, out);
    pthread_t threads[WORKERS];
    for (int i = 0; i < WORKERS; i++) pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < WORKERS; i++) pthread_join(threads[i], NULL);
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    GOOD(trtxpy_graph_get_statistics(graph, &statistics));
    CHECK_EQ(statistics.completed, WORKERS * REQUESTS + 1);
    CHECK_EQ(statistics.captured, WORKERS * REQUESTS + 1);
    for (size_t i = 0; i < output_count; i++) free(expected[i]);
    GOOD(trtxpy_graph_destroy(graph));
    trtxpy_context_statistics left = TRTXPY_CONTEXT_STATISTICS_INIT;
    GOOD(trtxpy_context_get_statistics(context, &left));
    CHECK_EQ(left.device_bytes, 0);
    CHECK_EQ(left.pinned_bytes, 0);
    GOOD(trtxpy_context_destroy(context));
    CHECK_EQ(live_objects(), 0);
    printf("%d requests, %d checks failed\n", WORKERS * REQUESTS, failed_checks);
    return failed_checks != 0; /* without trtxpy_shutdown: the library ends with the process */
}
