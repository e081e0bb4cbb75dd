// trtxpy.hpp on the mock: who owns what, in which order things go, what throws. Argument: digits.onnx.
#include <poll.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <thread>

#include "trtxpy.hpp"

static int failures;
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition);               \
            failures++;                                                                                                \
        }                                                                                                              \
    } while (0)

static std::string path;

static std::string model() {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

template <typename Call> static trtxpy_status thrown_by(Call call) {
    try {
        call();
    } catch (const trtxpy::Error &error) {
        CHECK(*error.what() != 0);
        CHECK(error.name() == std::string(trtxpy_status_name(error.status())));
        return error.status();
    }
    return TRTXPY_OK;
}

static const trtxpy::Shape ONE = {1, 1, 8, 8}, ANSWER = {1, 10};

// Children keep their parents, so the order of destruction is nobody's concern.
static void any_order_of_destruction() {
    std::unique_ptr<trtxpy::Context> context(new trtxpy::Context);
    std::unique_ptr<trtxpy::Graph> graph(new trtxpy::Graph(context->graph_from_file(path)));
    std::unique_ptr<trtxpy::Tensor> in(new trtxpy::Tensor(context->tensor(TRTXPY_FLOAT32, ONE)));
    std::unique_ptr<trtxpy::Tensor> out(new trtxpy::Tensor(context->tensor(TRTXPY_FLOAT32, ANSWER)));
    trtxpy::Request request = graph->submit({{"image", *in}}, {{"probabilities", *out}});
    context.reset();
    CHECK(trtxpy::live_objects() == 5);
    in.reset(); // perhaps in flight: given back later
    out.reset();
    graph.reset();
    request.wait();
    trtxpy::detail::sweep();
    CHECK(trtxpy::live_objects() <= 3); // the request, and what it keeps: graph and context
    { trtxpy::Request last = std::move(request); }
    CHECK(trtxpy::live_objects() == 0);
}

static void moves_leave_nothing_behind() {
    trtxpy::Context context;
    trtxpy::Tensor a = context.tensor(TRTXPY_FLOAT32, {2}), b = context.tensor(TRTXPY_INT64, {3});
    CHECK(trtxpy::live_objects() == 3);
    a = std::move(b); // what a had is destroyed
    CHECK(trtxpy::live_objects() == 2);
    CHECK(a.dtype() == TRTXPY_INT64 && a.bytes() == 24);
    CHECK(b.handle() == nullptr);
    CHECK(thrown_by([&] { b.bytes(); }) == TRTXPY_INVALID_HANDLE);
}

static void tensors() {
    trtxpy::Context context;
    trtxpy::Tensor tensor = context.tensor(TRTXPY_FLOAT32, {2, 2});
    CHECK((tensor.read<float>() == std::vector<float>{0, 0, 0, 0}));
    tensor.write(std::vector<float>{1, 2, 3, 4});
    CHECK(static_cast<float *>(tensor.data())[3] == 4);
    tensor.resize({4});
    CHECK((tensor.shape() == trtxpy::Shape{4}));
    CHECK((tensor.read<float>() == std::vector<float>{1, 2, 3, 4}));
    CHECK(thrown_by([&] { tensor.write(std::vector<float>{1}); }) == TRTXPY_BUFFER_SIZE);
    trtxpy::Tensor scalar = context.tensor(TRTXPY_FLOAT16, {});
    CHECK(scalar.shape().empty() && scalar.bytes() == 2);
    CHECK(thrown_by([&] { scalar.read<float>(); }) == TRTXPY_BUFFER_SIZE);
    CHECK(thrown_by([&] { context.tensor(TRTXPY_FLOAT32, trtxpy::Shape(9, 1)); }) == TRTXPY_INVALID_ARGUMENT);
    CHECK(trtxpy::dtype_bytes(TRTXPY_INT4, {3}) == 2);
}

static void graphs() {
    trtxpy::Context context;
    trtxpy::GraphOptions options;
    options.ranges = {{"image", {1, 1, 8, 8}, {2, 1, 8, 8}, {4, 1, 8, 8}}};
    trtxpy::Graph graph = context.graph_from_onnx(model(), options);
    CHECK(graph.inputs().size() == 1 && graph.inputs()[0].name == "image");
    CHECK((graph.inputs()[0].shape == trtxpy::Shape{-1, 1, 8, 8}));
    CHECK(graph.outputs()[0].name == "probabilities");
    graph.prepare({{"image", {2, 1, 8, 8}}});
    CHECK((graph.output_shapes({{"image", {2, 1, 8, 8}}}) == std::vector<trtxpy::Shape>{{2, 10}}));
    CHECK(thrown_by([&] { graph.prepare({{"image", {5, 1, 8, 8}}}); }) == TRTXPY_SHAPE);
    CHECK(thrown_by([&] { graph.prepare({{"picture", {2, 1, 8, 8}}}); }) != TRTXPY_OK);
    trtxpy::Graph again = context.graph_from_plan(graph.plan());
    auto tensors = again.create_tensors({{"image", ONE}});
    again.dispatch({{"image", tensors.first[0]}}, {{"probabilities", tensors.second[0]}});
    CHECK(tensors.second[0].read<float>().size() == 10);
    CHECK(again.statistics().zero_copy == 1);
    CHECK(context.statistics().graphs == 2);
    CHECK(context.describe().is_mock);
    CHECK(thrown_by([&] { context.graph_from_onnx(std::string("no model")); }) != TRTXPY_OK);
}

static void requests() {
    trtxpy::Context context;
    trtxpy::Graph graph = context.graph_from_file(path);
    trtxpy::Tensor in = context.tensor(TRTXPY_FLOAT32, ONE), out = context.tensor(TRTXPY_FLOAT32, {0});
    CHECK(thrown_by([&] { graph.dispatch({{"image", in}}, {{"probabilities", out}}); }) == TRTXPY_SHAPE);
    trtxpy::DispatchOptions resize;
    resize.resize_outputs = true;
    graph.dispatch({{"image", in}}, {{"probabilities", out}}, resize);
    CHECK(out.shape() == ANSWER);

    std::atomic<int> calls{0};
    auto alive = std::make_shared<int>(0);
    std::weak_ptr<int> watched = alive;
    trtxpy::SubmitOptions token;
    token.token = 77;
    graph
        .submit({{"image", in}}, {{"probabilities", out}},
                [alive, &calls](trtxpy_status status, const char *message, const trtxpy_result &result) {
                    CHECK(status == TRTXPY_OK && !message && result.token == 77);
                    calls++;
                },
                token)
        .wait();
    alive.reset();
    for (int i = 0; i < 10000 && !watched.expired(); i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(calls == 1);
    CHECK(watched.expired()); // the function is gone with its call

    alive = std::make_shared<int>(0);
    watched = alive;
    trtxpy::Callback callback = [alive](trtxpy_status, const char *, const trtxpy_result &) {};
    alive.reset();
    CHECK(thrown_by([&] { graph.submit({}, {{"probabilities", out}}, std::move(callback)); }) != TRTXPY_OK);
    callback = nullptr;
    CHECK(watched.expired()); // and with a request that was refused
    CHECK(thrown_by([&] { graph.submit({{"image", in}}, {{"probabilities", out}}, trtxpy::Callback()); }) ==
          TRTXPY_INVALID_ARGUMENT);

    std::future<trtxpy_result> future = graph.submit_future({{"image", in}}, {{"probabilities", out}});
    CHECK(future.get().completed_ns != 0);
    trtxpy::Tensor wrong = context.tensor(TRTXPY_FLOAT32, {1, 9});
    CHECK(thrown_by([&] { graph.submit_future({{"image", in}}, {{"probabilities", wrong}}).get(); }) == TRTXPY_SHAPE);

    trtxpy::Request request = graph.submit({{"image", in}}, {{"probabilities", out}});
    request.wait();
    CHECK(request.wait_for(std::chrono::nanoseconds(0)));
    CHECK(!request.cancel()); // complete already
}

static void queues() {
    trtxpy::Context context;
    trtxpy::Graph graph = context.graph_from_file(path);
    trtxpy::Tensor in = context.tensor(TRTXPY_FLOAT32, ONE), out = context.tensor(TRTXPY_FLOAT32, ANSWER);
    trtxpy::Queue queue = context.queue();
    CHECK(queue.take().empty());
    trtxpy::SubmitOptions token;
    token.token = 5;
    graph.submit({{"image", in}}, {{"probabilities", out}}, queue, token);
    struct pollfd ready = {queue.fd(), POLLIN, 0};
    CHECK(poll(&ready, 1, 30000) == 1);
    std::vector<trtxpy_completion> taken = queue.take();
    CHECK(taken.size() == 1 && taken[0].status == TRTXPY_OK && taken[0].result.token == 5);
}

static void one_call() {
    trtxpy::Context context;
    const std::vector<float> pixels(64, 1.0f);
    trtxpy::Results results = context.run(model(), {{"image", TRTXPY_FLOAT32, ONE, pixels}});
    CHECK(results.size() == 1);
    trtxpy::Output output = results[0];
    CHECK(output.name == "probabilities" && output.shape == ANSWER && output.bytes == 40);
    CHECK(context.run_zeroed(model())[0].bytes == 40);
    CHECK(context.statistics().cache_hits == 1);
    CHECK(thrown_by([&] { results[1]; }) != TRTXPY_OK);
}

int main(int count, char **arguments) {
    if (count != 2) return 2;
    path = arguments[1];
    trtxpy::init();
    void (*const tests[])() = {any_order_of_destruction, moves_leave_nothing_behind, tensors, graphs, requests, queues, one_call};
    for (auto test : tests) {
        try {
            test();
        } catch (const trtxpy::Error &error) {
            std::fprintf(stderr, "%s: %s\n", error.name(), error.what());
            failures++;
        }
        trtxpy::detail::sweep();
        CHECK(trtxpy::live_objects() == 0);
    }
    trtxpy::shutdown();
    CHECK(thrown_by([] { trtxpy::Context context; }) == TRTXPY_CLOSED);
    std::printf("%d failures\n", failures);
    return failures != 0;
}
