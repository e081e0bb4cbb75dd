/* What comes out: types that are converted, tensors on the device, shapes that are not captured, DLPack, one-shot calls. */
#include "api_test.h"

#include <sys/wait.h>

static void types_that_tensorrt_lacks(void) {
    trtxpy_context context = open_context("mock");
    trtxpy_graph graph = open_model(context, "unsigned.onnx");
    trtxpy_tensor_info info = TRTXPY_TENSOR_INFO_INIT;
    GOOD(trtxpy_graph_tensor_info(graph, TRTXPY_INPUT, 0, &info));
    CHECK_EQ(info.dtype, TRTXPY_UINT32);
    CHECK_EQ(info.engine_dtype, TRTXPY_INT64);
    trtxpy_tensor a = make_tensor(context, TRTXPY_UINT32, shape_of(1, 3, 0)), b = make_tensor(context, TRTXPY_UINT32, shape_of(1, 3, 0)),
                  y = make_tensor(context, TRTXPY_UINT32, shape_of(1, 3, 0));
    trtxpy_binding in[] = {{"a", a}, {"b", b}}, out = {"y", y};
    uint32_t first[] = {UINT32_MAX, 7, 100}, second[] = {1, 7, 99}, found[3];
    for (int captured = 0; captured < 2; captured++) {
        GOOD(trtxpy_tensor_write(a, first, sizeof first));
        GOOD(trtxpy_tensor_write(b, second, sizeof second));
        GOOD(trtxpy_dispatch(graph, in, 2, &out, 1, NULL));
        GOOD(trtxpy_tensor_read(y, found, sizeof found));
        CHECK(found[0] == UINT32_MAX - 1 && found[1] == 0 && found[2] == 1);
    }
    GOOD(trtxpy_tensor_write(a, second, sizeof second)); /* 1 - UINT32_MAX fits no uint32: it does not wrap */
    GOOD(trtxpy_tensor_write(b, first, sizeof first));
    CHECK_EQ(trtxpy_dispatch(graph, in, 2, &out, 1, NULL), TRTXPY_RANGE);
    CHECK(strstr(trtxpy_last_error(), "y: element 0 is -4294967294") != NULL);
    /* they cannot lie in the graph's own memory */
    trtxpy_named_shape shapes[] = {{"a", shape_of(1, 3, 0)}, {"b", shape_of(1, 3, 0)}};
    trtxpy_tensor inputs[2], outputs[1];
    CHECK_EQ(trtxpy_graph_create_tensors(graph, shapes, 2, inputs, 2, outputs, 1), TRTXPY_UNSUPPORTED);
    /* the plan keeps what its tensors stand for */
    size_t bytes = 0;
    GOOD(trtxpy_graph_get_plan(graph, NULL, &bytes));
    char *plan = malloc(bytes);
    GOOD(trtxpy_graph_get_plan(graph, plan, &bytes));
    trtxpy_graph again;
    GOOD(trtxpy_graph_from_plan(context, plan, bytes, NULL, &again));
    GOOD(trtxpy_tensor_write(a, first, sizeof first));
    GOOD(trtxpy_tensor_write(b, second, sizeof second));
    GOOD(trtxpy_dispatch(again, in, 2, &out, 1, NULL));
    GOOD(trtxpy_tensor_read(y, found, sizeof found));
    CHECK(found[0] == UINT32_MAX - 1);
    free(plan);
    GOOD(trtxpy_graph_destroy(again));
    GOOD(trtxpy_graph_destroy(graph));
    GOOD(trtxpy_tensor_destroy(a));
    GOOD(trtxpy_tensor_destroy(b));
    GOOD(trtxpy_tensor_destroy(y));
    GOOD(trtxpy_context_destroy(context));
}

static void a_scalar_has_rank_0(void) {
    trtxpy_context context = open_context("mock");
    trtxpy_graph graph = open_model(context, "scalar.onnx");
    trtxpy_tensor x = make_tensor(context, TRTXPY_FLOAT32, shape_of(0, 0, 0)), y = make_tensor(context, TRTXPY_FLOAT32, shape_of(0, 0, 0));
    float value = 21;
    GOOD(trtxpy_tensor_write(x, &value, 4));
    trtxpy_binding in = {"x", x}, out = {"y", y};
    GOOD(trtxpy_dispatch(graph, &in, 1, &out, 1, NULL));
    GOOD(trtxpy_tensor_read(y, &value, 4));
    CHECK(value == 42);
    GOOD(trtxpy_tensor_destroy(x));
    GOOD(trtxpy_tensor_destroy(y));
    GOOD(trtxpy_graph_destroy(graph));
    GOOD(trtxpy_context_destroy(context));
}

static void shapes_that_cannot_be_captured(void) {
    trtxpy_context context = open_context("mock");
    trtxpy_graph graph = open_model(context, "nonzero.onnx");
    trtxpy_tensor x = make_tensor(context, TRTXPY_FLOAT32, shape_of(1, 6, 0)), y = make_tensor(context, TRTXPY_INT64, shape_of(2, 1, 1));
    const float values[] = {0, 1, 0, 2, 3, 0};
    GOOD(trtxpy_tensor_write(x, values, sizeof values));
    trtxpy_binding in = {"x", x}, out = {"y", y};
    CHECK_EQ(trtxpy_dispatch(graph, &in, 1, &out, 1, NULL), TRTXPY_SHAPE);
    trtxpy_dispatch_options options = TRTXPY_DISPATCH_OPTIONS_INIT;
    options.resize_outputs = 1;
    GOOD(trtxpy_dispatch(graph, &in, 1, &out, 1, &options));
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    GOOD(trtxpy_tensor_describe(y, &desc));
    CHECK_EQ(desc.shape.rank, 2);
    CHECK_EQ(desc.shape.dims[1], 3);
    int64_t found[3];
    GOOD(trtxpy_tensor_read(y, found, sizeof found));
    CHECK(found[0] == 1 && found[1] == 3 && found[2] == 4);
    trtxpy_named_shape shape = {"x", shape_of(1, 6, 0)};
    trtxpy_tensor inputs[1], outputs[1];
    CHECK_EQ(trtxpy_graph_prepare(graph, &shape, 1), TRTXPY_UNSUPPORTED);
    CHECK_EQ(trtxpy_graph_create_tensors(graph, &shape, 1, inputs, 1, outputs, 1), TRTXPY_UNSUPPORTED);
    /* submitted, on a worker */
    listener heard = {0};
    trtxpy_submit_options how = TRTXPY_SUBMIT_OPTIONS_INIT;
    how.callback = listen_to;
    how.userdata = &heard;
    GOOD(trtxpy_submit(graph, &in, 1, &out, 1, &how, NULL));
    CHECK(hears(&heard, 1));
    CHECK_EQ(atomic_load(&heard.status), TRTXPY_OK);
    CHECK_EQ(atomic_load(&heard.captured), 0);
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    GOOD(trtxpy_graph_get_statistics(graph, &statistics));
    CHECK_EQ(statistics.captured, 0);
    CHECK_EQ(statistics.uncaptured, 3);
    GOOD(trtxpy_tensor_destroy(x));
    GOOD(trtxpy_tensor_destroy(y));
    GOOD(trtxpy_graph_destroy(graph));
    GOOD(trtxpy_context_destroy(context));
}

static void nothing_is_captured_where_nothing_shall_be(void) {
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    options.no_cuda_graphs = 1;
    trtxpy_context context = open_context("mock");
    doubling d = {.context = context, .graph = open_model_with(context, "double.onnx", &options)};
    doubling_tensors(&d, 2);
    for (int i = 0; i < 5; i++) {
        doubling_fill(&d, (float)i);
        GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
        CHECK(doubling_right(&d, (float)i));
    }
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    GOOD(trtxpy_graph_get_statistics(d.graph, &statistics));
    CHECK_EQ(statistics.uncaptured, 5);
    doubling_close(&d);
}

static void tensors_on_the_device(void) {
    trtxpy_context context = open_context("mock");
    doubling d = {.context = context, .graph = open_model(context, "double.onnx"), .count = 8};
    for (int places = 0; places < 4; places++) { /* each of them here or there */
        d.x = make_tensor_at(context, TRTXPY_FLOAT32, shape_of(2, 2, 4), places & 1 ? TRTXPY_DEVICE : TRTXPY_HOST);
        d.y = make_tensor_at(context, TRTXPY_FLOAT32, shape_of(2, 2, 4), places & 2 ? TRTXPY_DEVICE : TRTXPY_HOST);
        d.in = (trtxpy_binding){"x", d.x};
        d.out = (trtxpy_binding){"y", d.y};
        CHECK(!doubling_right(&d, 1)); /* zeros at first */
        doubling_fill(&d, (float)places + 1);
        GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
        CHECK(doubling_right(&d, (float)places + 1));
        trtxpy_shape bigger = shape_of(2, 3, 4);
        trtxpy_dispatch_options options = TRTXPY_DISPATCH_OPTIONS_INIT;
        options.resize_outputs = 1;
        GOOD(trtxpy_tensor_resize(d.x, &bigger));
        d.count = 12;
        doubling_fill(&d, 5);
        GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, &options));
        CHECK(doubling_right(&d, 5));
        d.count = 8;
        GOOD(trtxpy_tensor_destroy(d.x));
        GOOD(trtxpy_tensor_destroy(d.y));
    }
    GOOD(trtxpy_graph_destroy(d.graph));
    GOOD(trtxpy_context_destroy(context));
}

static void weights_in_a_blob_of_their_own(void) {
    trtxpy_context context = open_context("mock");
    blob *model = read_model("external.onnx"), *weights = read_model("weights.bin");
    trtxpy_graph graph;
    GOOD(trtxpy_graph_from_onnx(context, model->data, model->bytes, weights->data, weights->bytes, NULL, &graph));
    doubling d = {.context = context, .graph = graph};
    doubling_tensors(&d, 2);
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    float found[8];
    GOOD(trtxpy_tensor_read(d.y, found, sizeof found));
    for (int i = 0; i < 8; i++) CHECK(found[i] == (float)(i % 4));
    GOOD(trtxpy_graph_destroy(d.graph));
    GOOD(trtxpy_graph_from_file(context, model_path("external.onnx"), NULL, &d.graph)); /* beside it, by its name */
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    GOOD(trtxpy_tensor_read(d.y, found, sizeof found));
    CHECK(found[7] == 3);
    free(model);
    free(weights);
    doubling_close(&d);
}

/* DLPack, as a consumer and producer of another library would have it. */
typedef struct managed_tensor {
    struct {
        void *data;
        struct {
            int32_t type, id;
        } device;
        int32_t ndim;
        struct {
            uint8_t code, bits;
            uint16_t lanes;
        } dtype;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } tensor;
    void *context;
    void (*deleter)(struct managed_tensor *self);
} managed_tensor;

static atomic_int deleted;

static void count_deletion(managed_tensor *self) {
    (void)self;
    atomic_fetch_add(&deleted, 1);
}

static void dlpack_both_ways(void) {
    doubling d;
    doubling_open(&d, "mock", 2);
    float memory[9];
    for (int i = 0; i < 9; i++) memory[i] = (float)i - 1;
    int64_t dims[] = {2, 4}, strides[] = {4, 1}, wrong[] = {1, 2};
    managed_tensor given = {.deleter = count_deletion};
    given.tensor.data = memory;
    given.tensor.byte_offset = 4;
    given.tensor.device.type = 1;
    given.tensor.ndim = 2;
    given.tensor.dtype.code = 2;
    given.tensor.dtype.bits = 32;
    given.tensor.dtype.lanes = 1;
    given.tensor.shape = dims;
    given.tensor.strides = strides;
    trtxpy_tensor x;
    GOOD(trtxpy_tensor_from_dlpack(d.context, (struct DLManagedTensor *)&given, &x));
    trtxpy_binding in = {"x", x};
    GOOD(trtxpy_dispatch(d.graph, &in, 1, &d.out, 1, NULL));
    CHECK(doubling_right(&d, 0));
    trtxpy_shape shape = shape_of(2, 1, 4);
    CHECK_EQ(trtxpy_tensor_resize(x, &shape), TRTXPY_UNSUPPORTED);
    CHECK_EQ(atomic_load(&deleted), 0);
    GOOD(trtxpy_tensor_destroy(x));
    CHECK_EQ(atomic_load(&deleted), 1);
    /* what cannot be taken stays the caller's */
    given.tensor.strides = wrong;
    CHECK_EQ(trtxpy_tensor_from_dlpack(d.context, (struct DLManagedTensor *)&given, &x), TRTXPY_UNSUPPORTED);
    given.tensor.strides = NULL;
    given.tensor.dtype.bits = 64;
    CHECK_EQ(trtxpy_tensor_from_dlpack(d.context, (struct DLManagedTensor *)&given, &x), TRTXPY_UNSUPPORTED);
    given.tensor.dtype.bits = 32;
    given.tensor.device.type = 4;
    CHECK_EQ(trtxpy_tensor_from_dlpack(d.context, (struct DLManagedTensor *)&given, &x), TRTXPY_UNSUPPORTED);
    given.tensor.device.type = 2;
    given.tensor.device.id = 3;
    CHECK_EQ(trtxpy_tensor_from_dlpack(d.context, (struct DLManagedTensor *)&given, &x), TRTXPY_INVALID_ARGUMENT);
    given.tensor.device.type = 1;
    given.tensor.ndim = 9;
    CHECK_EQ(trtxpy_tensor_from_dlpack(d.context, (struct DLManagedTensor *)&given, &x), TRTXPY_INVALID_ARGUMENT);
    CHECK(x == NULL);
    CHECK_EQ(atomic_load(&deleted), 1);
    /* out */
    struct DLManagedTensor *out;
    GOOD(trtxpy_tensor_to_dlpack(d.y, &out));
    managed_tensor *seen = (managed_tensor *)out;
    CHECK_EQ(seen->tensor.ndim, 2);
    CHECK_EQ(seen->tensor.shape[1], 4);
    CHECK_EQ(seen->tensor.device.type, 3); /* pinned memory */
    CHECK(((float *)seen->tensor.data)[3] == 6);
    CHECK_EQ(trtxpy_tensor_destroy(d.y), TRTXPY_BORROWED);
    CHECK_EQ(trtxpy_tensor_resize(d.y, &shape), TRTXPY_BORROWED);
    seen->deleter(seen);
    doubling_close(&d);
}

static void one_call_for_everything(void) {
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    options.backend = "mock";
    options.max_cached_models = 1;
    trtxpy_context context;
    GOOD(trtxpy_context_create(&options, &context));
    blob *model = read_model("unsigned.onnx"), *other = read_model("double.onnx"), *outside = read_model("external.onnx"),
         *weights = read_model("weights.bin");
    uint32_t a[] = {5, 6, 7}, b[] = {1, 2, 3};
    trtxpy_array inputs[] = {TRTXPY_ARRAY_INIT, TRTXPY_ARRAY_INIT}, found = TRTXPY_ARRAY_INIT;
    inputs[0].name = "b";
    inputs[0].data = b;
    inputs[1].name = "a";
    inputs[1].data = a;
    for (int i = 0; i < 2; i++) {
        inputs[i].dtype = TRTXPY_UINT32;
        inputs[i].shape = shape_of(1, 3, 0);
        inputs[i].bytes = 12;
    }
    trtxpy_context_statistics statistics = TRTXPY_CONTEXT_STATISTICS_INIT;
    for (int round = 0; round < 3; round++) {
        trtxpy_results results;
        size_t count;
        GOOD(trtxpy_run(context, model->data, model->bytes, NULL, 0, inputs, 2, NULL, &results));
        GOOD(trtxpy_results_count(results, &count));
        CHECK_EQ(count, 1);
        GOOD(trtxpy_results_get(results, 0, &found));
        CHECK(strcmp(found.name, "y") == 0);
        CHECK_EQ(found.dtype, TRTXPY_UINT32);
        CHECK_EQ(found.bytes, 12);
        CHECK(((const uint32_t *)found.data)[2] == 4);
        CHECK_EQ(trtxpy_results_get(results, 1, &found), TRTXPY_NOT_FOUND);
        CHECK_EQ(trtxpy_context_destroy(context), TRTXPY_BORROWED);
        GOOD(trtxpy_results_destroy(results));
    }
    GOOD(trtxpy_context_get_statistics(context, &statistics));
    CHECK_EQ(statistics.cache_misses, 1); /* built once */
    CHECK_EQ(statistics.cache_hits, 2);
    trtxpy_results results;
    GOOD(trtxpy_run_zeroed(context, other->data, other->bytes, NULL, 0, NULL, &results));
    GOOD(trtxpy_results_get(results, 0, &found));
    CHECK_EQ(found.dtype, TRTXPY_FLOAT32);
    CHECK_EQ(found.shape.dims[0], 1);
    CHECK_EQ(found.bytes, 16);
    GOOD(trtxpy_results_destroy(results));
    GOOD(trtxpy_context_get_statistics(context, &statistics));
    CHECK_EQ(statistics.cached_models, 1); /* the first one made room */
    GOOD(trtxpy_run_zeroed(context, outside->data, outside->bytes, weights->data, weights->bytes, NULL, &results));
    GOOD(trtxpy_results_get(results, 0, &found));
    CHECK(((const float *)found.data)[3] == 3);
    GOOD(trtxpy_results_destroy(results));
    /* a type that is not the model's */
    inputs[0].dtype = TRTXPY_INT32;
    CHECK_EQ(trtxpy_run(context, model->data, model->bytes, NULL, 0, inputs, 2, NULL, &results), TRTXPY_DTYPE);
    free(model);
    free(other);
    free(outside);
    free(weights);
    GOOD(trtxpy_context_destroy(context));
}

static void a_budget_for_device_memory(void) {
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    options.backend = "mock";
    options.max_device_bytes = 1 << 20;
    trtxpy_context context;
    GOOD(trtxpy_context_create(&options, &context));
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    desc.location = TRTXPY_DEVICE;
    desc.shape = shape_of(1, 1 << 19, 0);
    trtxpy_tensor tensor;
    CHECK_EQ(trtxpy_tensor_create(context, &desc, &tensor), TRTXPY_OUT_OF_MEMORY);
    desc.shape = shape_of(1, 1 << 17, 0);
    GOOD(trtxpy_tensor_create(context, &desc, &tensor));
    trtxpy_context_statistics statistics = TRTXPY_CONTEXT_STATISTICS_INIT;
    GOOD(trtxpy_context_get_statistics(context, &statistics));
    CHECK_EQ(statistics.device_bytes, 1 << 19);
    CHECK_EQ(statistics.device_allocations, 1);
    CHECK_EQ(statistics.tensors, 1);
    trtxpy_shape bigger = shape_of(1, 1 << 19, 0);
    CHECK_EQ(trtxpy_tensor_resize(tensor, &bigger), TRTXPY_OUT_OF_MEMORY);
    size_t bytes;
    GOOD(trtxpy_tensor_bytes(tensor, &bytes));
    CHECK_EQ(bytes, 1 << 19); /* as it was */
    GOOD(trtxpy_tensor_destroy(tensor));
    GOOD(trtxpy_context_get_statistics(context, &statistics));
    CHECK_EQ(statistics.device_bytes, 0);
    GOOD(trtxpy_context_destroy(context));
}

static void a_forked_child(void) {
    doubling d;
    doubling_open(&d, "mock", 1);
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL));
    pid_t child = fork();
    if (child == 0) {
        trtxpy_context context;
        bool refused = trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL) == TRTXPY_FORKED &&
                       trtxpy_context_create(NULL, &context) == TRTXPY_FORKED && trtxpy_graph_destroy(d.graph) == TRTXPY_FORKED &&
                       trtxpy_shutdown() == TRTXPY_FORKED && strlen(trtxpy_last_error()) > 10;
        _exit(refused ? 17 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 17);
    child = fork();
    if (child == 0) {
        execl("/bin/true", "true", (char *)NULL);
        _exit(1);
    }
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    doubling_fill(&d, 3);
    GOOD(trtxpy_dispatch(d.graph, &d.in, 1, &d.out, 1, NULL)); /* the parent goes on */
    CHECK(doubling_right(&d, 3));
    doubling_close(&d);
}

int main(void) {
    RUN(types_that_tensorrt_lacks);
    RUN(a_scalar_has_rank_0);
    RUN(shapes_that_cannot_be_captured);
    RUN(nothing_is_captured_where_nothing_shall_be);
    RUN(tensors_on_the_device);
    RUN(weights_in_a_blob_of_their_own);
    RUN(dlpack_both_ways);
    RUN(one_call_for_everything);
    RUN(a_budget_for_device_memory);
    RUN(a_forked_child);
    CHECK_EQ(live_objects(), 0);
    return report(); /* the library ends by itself */
}
