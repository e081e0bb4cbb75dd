// The same as classify.c with trtxpy.hpp: owners instead of handles, exceptions instead of statuses, a future.
//
//     c++ -std=c++11 classify.cpp -o classify $(python -m trtx_py.capi --cflags --libs) -pthread
//     TRTX_BACKEND=mock TRTXPY_PYTHON=$(command -v python) ./classify ../digits/digits.onnx
#include <algorithm>
#include <cstdio>
#include <future>
#include <vector>

#include "trtxpy.hpp"

static std::vector<float> nought() {
    static const char *const drawing[] = {"  .##.  ", " .#####.", " ##  .##", " ##   ##",
                                          " ##   ##", " ##  .##", " .#####.", "  .##.  "};
    std::vector<float> pixels;
    for (const char *row : drawing)
        for (; *row; row++) pixels.push_back(*row == '#' ? 16.0f : *row == '.' ? 6.0f : 0.0f);
    return pixels;
}

int main(int count, char **arguments) {
    if (count != 2) {
        std::fprintf(stderr, "usage: %s digits.onnx\n", arguments[0]);
        return 2;
    }
    try {
        trtxpy::Context context;
        std::printf("backend: %s\n", context.describe().backend.c_str());
        trtxpy::Graph graph = context.graph_from_file(arguments[1]);
        trtxpy::Tensor image = context.tensor(TRTXPY_FLOAT32, {1, 1, 8, 8});
        trtxpy::Tensor probabilities = context.tensor(TRTXPY_FLOAT32, {1, 10});
        image.write(nought());

        std::future<trtxpy_result> done = graph.submit_future({{"image", image}}, {{"probabilities", probabilities}});
        done.get(); // throws what went wrong
        const std::vector<float> values = probabilities.read<float>();
        const auto best = std::max_element(values.begin(), values.end());
        std::printf("future: %d (%.1f%%)\n", static_cast<int>(best - values.begin()), 100.0 * static_cast<double>(*best));
    } catch (const trtxpy::Error &error) {
        std::fprintf(stderr, "%s: %s\n", error.name(), error.what());
        return 1;
    }
    trtxpy::shutdown();
    return 0;
}
