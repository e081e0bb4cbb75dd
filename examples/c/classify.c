/* Classifies two handwritten digits through the C ABI: load, create tensors, dispatch, submit with a callback.
 *
 *     cc classify.c -o classify $(python -m trtx_py.capi --cflags --libs) -pthread
 *     TRTX_BACKEND=mock TRTXPY_PYTHON=$(command -v python) ./classify ../digits/digits.onnx
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "trtxpy.h"

enum { SIDE = 8, DIGITS = 10 };

/* Darkness from 0 to 16, as the model was trained with: a nought, and a one. */
static const char *const drawings[2][SIDE] = {
    {"  .##.  ", " .#####.", " ##  .##", " ##   ##", " ##   ##", " ##  .##", " .#####.", "  .##.  "},
    {"   .##  ", "  .###  ", " .####  ", "   ###  ", "   ###  ", "   ###  ", "   ###  ", "  .####."},
};

/* Every call says what went wrong, to the thread that made it. */
#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        trtxpy_status status_ = (call);                                                                                \
        if (status_ != TRTXPY_OK) {                                                                                    \
            fprintf(stderr, "%s: %s: %s\n", #call, trtxpy_status_name(status_), trtxpy_last_error());                  \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static void draw(int which, float pixels[SIDE * SIDE]) {
    for (int y = 0; y < SIDE; y++)
        for (int x = 0; x < SIDE; x++) {
            char ink = drawings[which][y][x];
            pixels[y * SIDE + x] = ink == '#' ? 16.0f : ink == '.' ? 6.0f : 0.0f;
        }
}

static void say(trtxpy_tensor probabilities, const char *how) {
    float values[DIGITS];
    CHECK(trtxpy_tensor_read(probabilities, values, sizeof values));
    int best = 0;
    for (int i = 1; i < DIGITS; i++)
        if (values[i] > values[best]) best = i;
    printf("%s: %d (%.1f%%)\n", how, best, 100.0 * values[best]);
}

/* What the callback tells the thread that waits. */
typedef struct answer {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int done;
    trtxpy_status status;
} answer;

/* On a thread of the library's: short, and nothing that waits for a request. */
static void complete(trtxpy_status status, const char *message, const trtxpy_result *result, void *userdata) {
    answer *given = userdata;
    if (status != TRTXPY_OK)
        fprintf(stderr, "request %d: %s: %s\n", (int)result->token, trtxpy_status_name(status), message);
    pthread_mutex_lock(&given->mutex);
    given->status = status;
    given->done = 1;
    pthread_cond_signal(&given->changed);
    pthread_mutex_unlock(&given->mutex);
}

int main(int count, char **arguments) {
    if (count != 2) {
        fprintf(stderr, "usage: %s digits.onnx\n", arguments[0]);
        return 2;
    }
    if (trtxpy_abi_version() >> 16 != TRTXPY_ABI_MAJOR) {
        fprintf(stderr, "libtrtxpy %s has another ABI than this program\n", trtxpy_version());
        return 1;
    }

    trtxpy_context context;
    trtxpy_context_info info = TRTXPY_CONTEXT_INFO_INIT;
    CHECK(trtxpy_context_create(NULL, &context)); /* finds and starts Python, chooses a backend */
    CHECK(trtxpy_context_describe(context, &info));
    printf("backend: %s\n", info.backend);

    trtxpy_graph graph;
    CHECK(trtxpy_graph_from_file(context, arguments[1], NULL, &graph));

    trtxpy_tensor image, probabilities;
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    desc.shape = (trtxpy_shape){4, 0, {1, 1, SIDE, SIDE}};
    CHECK(trtxpy_tensor_create(context, &desc, &image));
    desc.shape = (trtxpy_shape){2, 0, {1, DIGITS}};
    CHECK(trtxpy_tensor_create(context, &desc, &probabilities));
    trtxpy_binding inputs[] = {{"image", image}}, outputs[] = {{"probabilities", probabilities}};

    /* Run and wait. */
    float pixels[SIDE * SIDE];
    draw(0, pixels);
    CHECK(trtxpy_tensor_write(image, pixels, sizeof pixels));
    CHECK(trtxpy_dispatch(graph, inputs, 1, outputs, 1, NULL));
    say(probabilities, "dispatch");

    /* Run, and be called. */
    answer given = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, TRTXPY_OK};
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    options.callback = complete;
    options.userdata = &given;
    options.token = 1;
    draw(1, pixels);
    CHECK(trtxpy_tensor_write(image, pixels, sizeof pixels));
    CHECK(trtxpy_submit(graph, inputs, 1, outputs, 1, &options, NULL));
    pthread_mutex_lock(&given.mutex);
    while (!given.done) pthread_cond_wait(&given.changed, &given.mutex);
    pthread_mutex_unlock(&given.mutex);
    if (given.status != TRTXPY_OK) return 1;
    say(probabilities, "submit");

    /* Children first: a parent with open children is not destroyed (TRTXPY_BORROWED). */
    CHECK(trtxpy_tensor_destroy(image));
    CHECK(trtxpy_tensor_destroy(probabilities));
    CHECK(trtxpy_graph_destroy(graph));
    CHECK(trtxpy_context_destroy(context));
    CHECK(trtxpy_shutdown());
    return 0;
}
