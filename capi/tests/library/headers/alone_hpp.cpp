// The C++ header needs nothing before it, can be included twice.
#include "trtxpy.hpp"
#include "trtxpy.hpp"

#include <type_traits>

static_assert(!std::is_copy_constructible<trtxpy::Context>::value, "owners are moved");
static_assert(!std::is_copy_constructible<trtxpy::Tensor>::value, "owners are moved");
static_assert(std::is_nothrow_move_constructible<trtxpy::Context>::value, "owners are moved");
static_assert(std::is_nothrow_move_constructible<trtxpy::Graph>::value, "owners are moved");
static_assert(std::is_nothrow_move_assignable<trtxpy::Tensor>::value, "owners are moved");
static_assert(std::is_nothrow_move_constructible<trtxpy::Request>::value, "owners are moved");
static_assert(std::is_nothrow_move_constructible<trtxpy::Queue>::value, "owners are moved");
static_assert(std::is_nothrow_move_constructible<trtxpy::Results>::value, "owners are moved");

std::vector<float> header_test(const std::string &model);

std::vector<float> header_test(const std::string &model) {
    trtxpy::Context context;
    trtxpy::Graph graph = context.graph_from_onnx(model);
    trtxpy::Tensor in = context.tensor(TRTXPY_FLOAT32, {1, 2}), out = context.tensor(TRTXPY_FLOAT32, {1, 2});
    in.write(std::vector<float>{1, 2});
    graph.dispatch({{"x", in}}, {{"y", out}});
    trtxpy::SubmitOptions options;
    options.token = 7;
    trtxpy::Queue queue = context.queue();
    trtxpy::Request request = graph.submit({{"x", in}}, {{"y", out}}, queue, options);
    graph.submit({{"x", in}}, {{"y", out}}, [](trtxpy_status, const char *, const trtxpy_result &) {}).wait();
    graph.submit_future({{"x", in}}, {{"y", out}}).get();
    trtxpy::Results results = context.run(model, {{"x", TRTXPY_FLOAT32, {1, 2}, std::vector<float>{1, 2}}});
    return results.size() == 1 ? out.read<float>() : std::vector<float>();
}
