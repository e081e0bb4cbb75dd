/* Bad input: a status each, with a text that says something, and nothing happened. */
#include "api_test.h"

#define BAD(expected, call)                                                                                            \
    do {                                                                                                               \
        CHECK_EQ(call, expected);                                                                                      \
        CHECK(strlen(trtxpy_last_error()) > 10);                                                                       \
        CHECK_EQ(trtxpy_last_status(), expected);                                                                      \
    } while (0)
#define WRONG(call) BAD(TRTXPY_INVALID_ARGUMENT, call)
#define UNKNOWN(call) BAD(TRTXPY_INVALID_HANDLE, call)

static doubling d;
static blob *model;

static void every_argument_null_in_turn(void) {
    trtxpy_context context;
    trtxpy_graph graph;
    trtxpy_tensor tensor, tensors[1];
    trtxpy_queue queue;
    trtxpy_results results;
    trtxpy_named_shape shape = {"x", shape_of(2, 1, 4)}, nameless = {NULL, shape_of(2, 1, 4)};
    trtxpy_shape found;
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    trtxpy_binding nameless_binding = {NULL, d.x}, empty = {"x", NULL};
    size_t size = 0;
    int fd;
    WRONG(trtxpy_live_objects(NULL));
    WRONG(trtxpy_context_create(NULL, NULL));
    UNKNOWN(trtxpy_context_describe(NULL, NULL));
    WRONG(trtxpy_context_describe(d.context, NULL));
    UNKNOWN(trtxpy_context_get_statistics(NULL, NULL));
    WRONG(trtxpy_context_get_statistics(d.context, NULL));
    UNKNOWN(trtxpy_graph_from_onnx(NULL, model->data, model->bytes, NULL, 0, NULL, &graph));
    WRONG(trtxpy_graph_from_onnx(d.context, NULL, model->bytes, NULL, 0, NULL, &graph));
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 5, NULL, &graph));
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, NULL, NULL));
    UNKNOWN(trtxpy_graph_from_plan(NULL, "x", 1, NULL, &graph));
    WRONG(trtxpy_graph_from_plan(d.context, NULL, 1, NULL, &graph));
    WRONG(trtxpy_graph_from_plan(d.context, "x", 1, NULL, NULL));
    UNKNOWN(trtxpy_graph_from_file(NULL, "x", NULL, &graph));
    WRONG(trtxpy_graph_from_file(d.context, NULL, NULL, &graph));
    WRONG(trtxpy_graph_from_file(d.context, "x", NULL, NULL));
    UNKNOWN(trtxpy_graph_get_plan(NULL, NULL, &size));
    WRONG(trtxpy_graph_get_plan(d.graph, NULL, NULL));
    UNKNOWN(trtxpy_graph_tensor_count(NULL, TRTXPY_INPUT, &size));
    WRONG(trtxpy_graph_tensor_count(d.graph, TRTXPY_INPUT, NULL));
    WRONG(trtxpy_graph_tensor_count(d.graph, 2, &size));
    UNKNOWN(trtxpy_graph_tensor_info(NULL, TRTXPY_INPUT, 0, NULL));
    WRONG(trtxpy_graph_tensor_info(d.graph, TRTXPY_INPUT, 0, NULL));
    UNKNOWN(trtxpy_graph_prepare(NULL, &shape, 1));
    WRONG(trtxpy_graph_prepare(d.graph, NULL, 1));
    WRONG(trtxpy_graph_prepare(d.graph, NULL, 0));
    WRONG(trtxpy_graph_prepare(d.graph, &nameless, 1));
    UNKNOWN(trtxpy_graph_output_shapes(NULL, &shape, 1, &found, 1));
    WRONG(trtxpy_graph_output_shapes(d.graph, NULL, 1, &found, 1));
    WRONG(trtxpy_graph_output_shapes(d.graph, &shape, 1, NULL, 1));
    BAD(TRTXPY_BUFFER_SIZE, trtxpy_graph_output_shapes(d.graph, &shape, 1, &found, 0));
    UNKNOWN(trtxpy_graph_get_statistics(NULL, NULL));
    WRONG(trtxpy_graph_get_statistics(d.graph, NULL));
    UNKNOWN(trtxpy_tensor_create(NULL, &desc, &tensor));
    WRONG(trtxpy_tensor_create(d.context, NULL, &tensor));
    WRONG(trtxpy_tensor_create(d.context, &desc, NULL));
    UNKNOWN(trtxpy_tensor_resize(NULL, &found));
    WRONG(trtxpy_tensor_resize(d.x, NULL));
    UNKNOWN(trtxpy_tensor_describe(NULL, &desc));
    WRONG(trtxpy_tensor_describe(d.x, NULL));
    UNKNOWN(trtxpy_tensor_bytes(NULL, &size));
    WRONG(trtxpy_tensor_bytes(d.x, NULL));
    UNKNOWN(trtxpy_tensor_write(NULL, model->data, 16));
    WRONG(trtxpy_tensor_write(d.x, NULL, 16));
    UNKNOWN(trtxpy_tensor_read(NULL, model->data, 16));
    WRONG(trtxpy_tensor_read(d.x, NULL, 16));
    UNKNOWN(trtxpy_tensor_data(NULL, (void **)&found));
    WRONG(trtxpy_tensor_data(d.x, NULL));
    UNKNOWN(trtxpy_graph_create_tensors(NULL, &shape, 1, &tensor, 1, tensors, 1));
    WRONG(trtxpy_graph_create_tensors(d.graph, NULL, 1, &tensor, 1, tensors, 1));
    WRONG(trtxpy_graph_create_tensors(d.graph, &shape, 1, NULL, 1, tensors, 1));
    WRONG(trtxpy_graph_create_tensors(d.graph, &shape, 1, &tensor, 1, NULL, 1));
    WRONG(trtxpy_graph_create_tensors(d.graph, &shape, 1, &tensor, 1, tensors, 0));
    UNKNOWN(trtxpy_tensor_to_dlpack(NULL, (struct DLManagedTensor **)&found));
    WRONG(trtxpy_tensor_to_dlpack(d.x, NULL));
    WRONG(trtxpy_tensor_from_dlpack(d.context, NULL, &tensor));
    WRONG(trtxpy_tensor_from_dlpack(d.context, (struct DLManagedTensor *)&found, NULL));
    UNKNOWN(trtxpy_dispatch(NULL, &d.in, 1, &d.out, 1, NULL));
    WRONG(trtxpy_dispatch(d.graph, NULL, 1, &d.out, 1, NULL));
    WRONG(trtxpy_dispatch(d.graph, &d.in, 1, NULL, 1, NULL));
    WRONG(trtxpy_dispatch(d.graph, &d.in, 0, &d.out, 1, NULL));
    WRONG(trtxpy_dispatch(d.graph, &nameless_binding, 1, &d.out, 1, NULL));
    UNKNOWN(trtxpy_dispatch(d.graph, &empty, 1, &d.out, 1, NULL));
    UNKNOWN(trtxpy_submit(NULL, &d.in, 1, &d.out, 1, NULL, NULL));
    WRONG(trtxpy_submit(d.graph, NULL, 1, &d.out, 1, NULL, NULL));
    WRONG(trtxpy_submit(d.graph, &d.in, 1, NULL, 1, NULL, NULL));
    UNKNOWN(trtxpy_request_cancel(NULL));
    UNKNOWN(trtxpy_request_wait(NULL, 0, (trtxpy_status *)&fd));
    WRONG(trtxpy_request_wait(NULL, 0, NULL));
    UNKNOWN(trtxpy_queue_create(NULL, &queue));
    WRONG(trtxpy_queue_create(d.context, NULL));
    UNKNOWN(trtxpy_queue_fd(NULL, &fd));
    WRONG(trtxpy_queue_fd((trtxpy_queue)d.x, NULL));
    UNKNOWN(trtxpy_queue_take(NULL, NULL, 0, &size));
    WRONG(trtxpy_queue_take(NULL, NULL, 0, NULL));
    UNKNOWN(trtxpy_run(NULL, model->data, model->bytes, NULL, 0, NULL, 0, NULL, &results));
    WRONG(trtxpy_run(d.context, NULL, 5, NULL, 0, NULL, 0, NULL, &results));
    WRONG(trtxpy_run(d.context, model->data, model->bytes, NULL, 1, NULL, 0, NULL, &results));
    WRONG(trtxpy_run(d.context, model->data, model->bytes, NULL, 0, NULL, 1, NULL, &results));
    WRONG(trtxpy_run(d.context, model->data, model->bytes, NULL, 0, NULL, 0, NULL, NULL));
    WRONG(trtxpy_run_zeroed(d.context, NULL, 5, NULL, 0, NULL, &results));
    UNKNOWN(trtxpy_results_count(NULL, &size));
    WRONG(trtxpy_results_count(NULL, NULL));
    UNKNOWN(trtxpy_results_get(NULL, 0, NULL));
    /* destroying nothing is fine */
    GOOD(trtxpy_context_destroy(NULL));
    GOOD(trtxpy_graph_destroy(NULL));
    GOOD(trtxpy_tensor_destroy(NULL));
    GOOD(trtxpy_request_destroy(NULL));
    GOOD(trtxpy_queue_destroy(NULL));
    GOOD(trtxpy_results_destroy(NULL));
    (void)context;
    CHECK_EQ(live_objects(), 4);
}

static void sizes_that_overflow(void) {
    trtxpy_graph graph = (trtxpy_graph)1;
    trtxpy_results results;
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, SIZE_MAX, NULL, 0, NULL, &graph));
    CHECK(graph == NULL);
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, model->data, SIZE_MAX, NULL, &graph));
    WRONG(trtxpy_graph_from_plan(d.context, model->data, SIZE_MAX, NULL, &graph));
    WRONG(trtxpy_run(d.context, model->data, SIZE_MAX, NULL, 0, NULL, 0, NULL, &results));
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    trtxpy_tensor tensor = (trtxpy_tensor)1;
    const trtxpy_shape bad[] = {{-1, 0, {0}}, {9, 0, {0}}, {INT32_MAX, 0, {0}}, {1, 0, {-1}}, {2, 0, {INT64_MAX, INT64_MAX}},
                                {4, 0, {1 << 20, 1 << 20, 1 << 20, 1 << 20}}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        desc.shape = bad[i];
        WRONG(trtxpy_tensor_create(d.context, &desc, &tensor));
        CHECK(tensor == NULL);
        WRONG(trtxpy_tensor_resize(d.x, &bad[i]));
    }
    desc.shape = shape_of(2, 1 << 20, 1 << 20); /* four terabytes */
    desc.location = TRTXPY_DEVICE;
    BAD(TRTXPY_OUT_OF_MEMORY, trtxpy_tensor_create(d.context, &desc, &tensor));
    desc.shape = shape_of(1, 1, 0);
    desc.location = 7;
    WRONG(trtxpy_tensor_create(d.context, &desc, &tensor));
    desc.location = TRTXPY_HOST;
    desc.dtype = 12;
    WRONG(trtxpy_tensor_create(d.context, &desc, &tensor));
    /* the tensor is as it was */
    size_t bytes;
    GOOD(trtxpy_tensor_bytes(d.x, &bytes));
    CHECK_EQ(bytes, 16);
}

static void buffers_one_byte_short(void) {
    char buffer[64] = {0};
    BAD(TRTXPY_BUFFER_SIZE, trtxpy_tensor_write(d.x, buffer, 15));
    BAD(TRTXPY_BUFFER_SIZE, trtxpy_tensor_write(d.x, buffer, 17));
    BAD(TRTXPY_BUFFER_SIZE, trtxpy_tensor_read(d.x, buffer, 15));
    BAD(TRTXPY_BUFFER_SIZE, trtxpy_tensor_read(d.x, buffer, 0));
    size_t need = 0;
    GOOD(trtxpy_graph_get_plan(d.graph, NULL, &need));
    CHECK(need > 100);
    char *plan = malloc(need);
    size_t room = need - 1;
    BAD(TRTXPY_BUFFER_SIZE, trtxpy_graph_get_plan(d.graph, plan, &room));
    CHECK_EQ(room, need);
    GOOD(trtxpy_graph_get_plan(d.graph, plan, &room));
    trtxpy_graph graph;
    BAD(TRTXPY_PLAN, trtxpy_graph_from_plan(d.context, plan, need - 1, NULL, &graph));
    plan[need / 2] ^= 1;
    BAD(TRTXPY_PLAN, trtxpy_graph_from_plan(d.context, plan, need, NULL, &graph));
    BAD(TRTXPY_PLAN, trtxpy_graph_from_plan(d.context, plan, 0, NULL, &graph));
    free(plan);
    float values[4] = {0};
    trtxpy_array array = TRTXPY_ARRAY_INIT;
    array.name = "x";
    array.shape = shape_of(2, 1, 4);
    array.data = values;
    array.bytes = 15;
    trtxpy_results results;
    BAD(TRTXPY_BUFFER_SIZE, trtxpy_run(d.context, model->data, model->bytes, NULL, 0, &array, 1, NULL, &results));
}

static void names_and_numbers_that_do_not_exist(void) {
    trtxpy_binding other = {"z", d.x};
    BAD(TRTXPY_NOT_FOUND, trtxpy_dispatch(d.graph, &other, 1, &d.out, 1, NULL));
    CHECK(strstr(trtxpy_last_error(), "'z'") != NULL);
    BAD(TRTXPY_NOT_FOUND, trtxpy_dispatch(d.graph, &d.in, 1, &other, 1, NULL));
    trtxpy_named_shape shape = {"z", shape_of(2, 1, 4)};
    BAD(TRTXPY_NOT_FOUND, trtxpy_graph_prepare(d.graph, &shape, 1));
    trtxpy_tensor_info info = TRTXPY_TENSOR_INFO_INIT;
    BAD(TRTXPY_NOT_FOUND, trtxpy_graph_tensor_info(d.graph, TRTXPY_OUTPUT, 1, &info));
    trtxpy_graph graph;
    BAD(TRTXPY_NOT_FOUND, trtxpy_graph_from_file(d.context, "/no/such/file.onnx", NULL, &graph));
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    trtxpy_context context;
    options.backend = "mock:fast";
    WRONG(trtxpy_context_create(&options, &context));
    options.backend = "triton";
    CHECK(trtxpy_context_create(&options, &context) != TRTXPY_OK);
    options.backend = "mock";
    options.device = 99;
    CHECK(trtxpy_context_create(&options, &context) != TRTXPY_OK);
    options.device = 0;
    options.completion = 3;
    WRONG(trtxpy_context_create(&options, &context));
    CHECK(context == NULL);
    trtxpy_array array = TRTXPY_ARRAY_INIT;
    array.name = "z";
    trtxpy_results results;
    float value = 0;
    array.data = &value;
    array.bytes = 4;
    BAD(TRTXPY_NOT_FOUND, trtxpy_run(d.context, model->data, model->bytes, NULL, 0, &array, 1, NULL, &results));
    WRONG(trtxpy_run(d.context, model->data, model->bytes, NULL, 0, NULL, 0, NULL, &results)); /* x is missing */
}

static void wrong_types_and_shapes(void) {
    trtxpy_tensor half = make_tensor(d.context, TRTXPY_FLOAT16, shape_of(2, 1, 4)), flat = make_tensor(d.context, TRTXPY_FLOAT32, shape_of(1, 4, 0)),
                  wide = make_tensor(d.context, TRTXPY_FLOAT32, shape_of(2, 1, 5));
    trtxpy_binding in = {"x", half}, out = {"y", half};
    BAD(TRTXPY_DTYPE, trtxpy_dispatch(d.graph, &in, 1, &d.out, 1, NULL));
    BAD(TRTXPY_DTYPE, trtxpy_dispatch(d.graph, &d.in, 1, &out, 1, NULL));
    in.tensor = flat;
    BAD(TRTXPY_SHAPE, trtxpy_dispatch(d.graph, &in, 1, &d.out, 1, NULL));
    in.tensor = wide;
    BAD(TRTXPY_SHAPE, trtxpy_dispatch(d.graph, &in, 1, &d.out, 1, NULL));
    out.tensor = wide;
    BAD(TRTXPY_SHAPE, trtxpy_dispatch(d.graph, &d.in, 1, &out, 1, NULL));
    trtxpy_named_shape shape = {"x", shape_of(2, 1000, 4)};
    trtxpy_shape found;
    BAD(TRTXPY_SHAPE, trtxpy_graph_prepare(d.graph, &shape, 1));
    BAD(TRTXPY_SHAPE, trtxpy_graph_output_shapes(d.graph, &shape, 1, &found, 1));
    GOOD(trtxpy_tensor_destroy(half));
    GOOD(trtxpy_tensor_destroy(flat));
    GOOD(trtxpy_tensor_destroy(wide));
    /* of another context */
    doubling other;
    doubling_open(&other, "mock:instant", 1);
    WRONG(trtxpy_dispatch(d.graph, &other.in, 1, &d.out, 1, NULL));
    trtxpy_queue queue;
    GOOD(trtxpy_queue_create(other.context, &queue));
    GOOD(trtxpy_queue_destroy(queue));
    doubling_close(&other);
}

static void handles_after_destroy(void) {
    doubling other;
    doubling_open(&other, "mock:instant", 1);
    doubling gone = other;
    doubling_close(&other);
    UNKNOWN(trtxpy_dispatch(gone.graph, &gone.in, 1, &gone.out, 1, NULL));
    UNKNOWN(trtxpy_dispatch(d.graph, &gone.in, 1, &d.out, 1, NULL));
    UNKNOWN(trtxpy_submit(gone.graph, &gone.in, 1, &gone.out, 1, NULL, NULL));
    UNKNOWN(trtxpy_tensor_write(gone.x, model->data, 16));
    UNKNOWN(trtxpy_tensor_destroy(gone.x));
    UNKNOWN(trtxpy_graph_destroy(gone.graph));
    UNKNOWN(trtxpy_context_destroy(gone.context));
    /* one kind for another, and what never was a handle */
    UNKNOWN(trtxpy_graph_destroy((trtxpy_graph)d.x));
    UNKNOWN(trtxpy_tensor_destroy((trtxpy_tensor)d.graph));
    UNKNOWN(trtxpy_context_destroy((trtxpy_context)d.graph));
    UNKNOWN(trtxpy_tensor_write((trtxpy_tensor)&gone, model->data, 16));
    UNKNOWN(trtxpy_tensor_write((trtxpy_tensor)(uintptr_t)UINT64_MAX, model->data, 16));
    UNKNOWN(trtxpy_queue_destroy((trtxpy_queue)(uintptr_t)3));
    UNKNOWN(trtxpy_results_destroy((trtxpy_results)d.y));
    UNKNOWN(trtxpy_request_cancel((trtxpy_request)d.context));
    CHECK_EQ(live_objects(), 4);
}

static void models_that_are_none(void) {
    trtxpy_graph graph;
    BAD(TRTXPY_PARSE, trtxpy_graph_from_onnx(d.context, "", 0, NULL, 0, NULL, &graph));
    BAD(TRTXPY_PARSE, trtxpy_graph_from_onnx(d.context, "this is not a model", 19, NULL, 0, NULL, &graph));
    BAD(TRTXPY_PARSE, trtxpy_graph_from_onnx(d.context, model->data, model->bytes - 5, NULL, 0, NULL, &graph));
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, "weights", 7, NULL, &graph)); /* it has none outside */
    blob *outside = read_model("external.onnx"), *weights = read_model("weights.bin");
    BAD(TRTXPY_PARSE, trtxpy_graph_from_onnx(d.context, outside->data, outside->bytes, NULL, 0, NULL, &graph));
    BAD(TRTXPY_PARSE, trtxpy_graph_from_onnx(d.context, outside->data, outside->bytes, weights->data, weights->bytes - 1, NULL, &graph));
    free(outside);
    free(weights);
    CHECK_EQ(live_objects(), 4);
}

static void options_that_are_none(void) {
    trtxpy_graph graph;
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    options.struct_size = 3;
    BAD(TRTXPY_VERSION_MISMATCH, trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph));
    options = (trtxpy_graph_options)TRTXPY_GRAPH_OPTIONS_INIT;
    options.reserved = 1;
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph));
    options = (trtxpy_graph_options)TRTXPY_GRAPH_OPTIONS_INIT;
    options.range_count = 1;
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph));
    trtxpy_profile_range range = {NULL, shape_of(2, 1, 4), shape_of(2, 1, 4), shape_of(2, 1, 4)};
    options.ranges = &range;
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph));
    range.name = "z";
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph));
    range.name = "x";
    range.max = shape_of(2, 0, 4);
    CHECK(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph) != TRTXPY_OK);
    options = (trtxpy_graph_options)TRTXPY_GRAPH_OPTIONS_INIT;
    options.precision = "float17";
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph));
    options = (trtxpy_graph_options)TRTXPY_GRAPH_OPTIONS_INIT;
    options.lanes = 100000;
    WRONG(trtxpy_graph_from_onnx(d.context, model->data, model->bytes, NULL, 0, &options, &graph));
    trtxpy_submit_options how = TRTXPY_SUBMIT_OPTIONS_INIT;
    how.reserved = 1;
    WRONG(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &how, NULL));
    how = (trtxpy_submit_options)TRTXPY_SUBMIT_OPTIONS_INIT;
    how.queue = (trtxpy_queue)d.x;
    UNKNOWN(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &how, NULL));
    how.callback = listen_to;
    WRONG(trtxpy_submit(d.graph, &d.in, 1, &d.out, 1, &how, NULL));
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL)); /* nothing of all this is left behind */
    CHECK_EQ(live_objects(), 4);
}

int main(void) {
    model = read_model("double.onnx");
    doubling_open(&d, "mock", 1);
    RUN(every_argument_null_in_turn);
    RUN(sizes_that_overflow);
    RUN(buffers_one_byte_short);
    RUN(names_and_numbers_that_do_not_exist);
    RUN(wrong_types_and_shapes);
    RUN(handles_after_destroy);
    RUN(models_that_are_none);
    RUN(options_that_are_none);
    doubling_close(&d);
    free(model);
    CHECK_EQ(live_objects(), 0);
    return report();
}
