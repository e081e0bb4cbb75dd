/* Programs of calls: every function of the API with handles that live, were destroyed, are of another kind or never were; NULLs;
 * shapes, types and sizes of all kinds; structs of callers that know more or less than this library.
 *
 * What must hold: each call returns a status with its text; what fails changes nothing that it returns; every request that was
 * accepted completes once; in the end everything can be destroyed, and nothing is left. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct DLManagedTensor {
    struct {
        void *data;
        int32_t device[2], ndim;
        uint8_t code, bits;
        uint16_t lanes;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
};

typedef enum kind { CONTEXT, GRAPH, TENSOR, REQUEST, QUEUE, RESULTS, KINDS } kind;
enum { ROOM = 48, PORTS = 4, SETS = 12, EXPORTS = 8, MOST_CALLS = 80, MOST_SLOW = 5 };

typedef struct pool {
    void *live[ROOM], *stale[ROOM], *permanent[8];
    size_t live_count, stale_count, permanent_count;
} pool;

typedef struct tensor_set { /* that fits a graph */
    trtxpy_graph graph;
    size_t counts[2];
    trtxpy_tensor tensors[2][PORTS];
} tensor_set;

static pool pools[KINDS];
static tensor_set sets[SETS];
static size_t set_count;
static struct DLManagedTensor *exports[EXPORTS];
static size_t export_count;
static atomic_int expected_calls, calls, imported;
static int slow_calls;
static const char *const model_names[] = {"double.onnx", "two.onnx", "unsigned.onnx", "nonzero.onnx", "scalar.onnx", "gemm.onnx"};
enum { MODELS = sizeof model_names / sizeof *model_names };
static struct {
    uint8_t data[4096];
    size_t size;
} models[MODELS];
static fuzz_input in;

/* ---- choices ---- */

static uint8_t byte(void) {
    return fuzz_byte(&in);
}

static bool seldom(void) {
    return byte() >= 240;
}

static bool is_permanent(const void *handle) {
    for (int k = 0; k < KINDS; k++)
        for (size_t i = 0; i < pools[k].permanent_count; i++)
            if (pools[k].permanent[i] == handle) return true;
    return false;
}

static void *live_one(kind k) {
    pool *p = &pools[k];
    size_t all = p->live_count + p->permanent_count, which = fuzz_below(&in, all);
    if (!all) return NULL;
    return which < p->live_count ? p->live[which] : p->permanent[which - p->live_count];
}

static void *pick(kind k) {
    uint8_t how = byte();
    if (how < 200) return live_one(k);
    if (how < 220) return pools[k].stale_count ? pools[k].stale[fuzz_below(&in, pools[k].stale_count)] : NULL;
    if (how < 234) return live_one((kind)fuzz_below(&in, KINDS));
    if (how < 244) return NULL;
    void *guess = (void *)(uintptr_t)fuzz_number(&in, 8);
    return is_permanent(guess) ? NULL : guess;
}

static void add(kind k, void *handle) {
    MUST(handle);
    pool *p = &pools[k];
    MUST(p->live_count < ROOM);
    p->live[p->live_count++] = handle;
}

static bool full(kind k) {
    return pools[k].live_count >= ROOM - 2 * PORTS;
}

static void gone(kind k, void *handle) {
    pool *p = &pools[k];
    for (size_t i = 0; i < p->live_count; i++)
        if (p->live[i] == handle) {
            p->live[i] = p->live[--p->live_count];
            if (p->stale_count < ROOM) p->stale[p->stale_count++] = handle;
            return;
        }
    MUST(!handle); /* something was destroyed that was not open */
}

static trtxpy_shape shape(void) {
    trtxpy_shape made = {.rank = byte() % 4};
    if (seldom()) made.rank = (int32_t)fuzz_number(&in, seldom() ? 4 : 1);
    for (int i = 0; i < TRTXPY_MAX_RANK; i++) {
        if (i >= made.rank) break;
        static const int64_t extents[] = {0, 1, 2, 3, 4, 6, 8, 9, 100, -1, 1 << 20, INT64_C(1) << 32, INT64_MAX, INT64_MIN};
        made.dims[i] = extents[seldom() ? byte() % 14 : byte() % 6];
    }
    if (seldom()) made.reserved = 1;
    return made;
}

static const char *name(void) {
    static const char *const names[] = {"x", "y", "a", "b", "sum", "difference", "", "\xC3\x28", "xx", NULL};
    return names[byte() % 10];
}

/* A struct as a caller may have it that knows more or less of it, on the heap and of just that size. */
static void *grown(const void *right, size_t size) {
    size_t said = size, room = size;
    if (seldom()) {
        switch (byte() % 4) {
        case 0: said = byte(); break;
        case 1: said = size + byte(); break;
        case 2: said = (size_t)fuzz_number(&in, 8); break;
        default: said = 65536 + byte() % 2; break;
        }
        room = said > 65536 ? size : said < sizeof said ? sizeof said : said;
    }
    uint8_t *made = calloc(1, room);
    memcpy(made, right, room < size ? room : size);
    memcpy(made, &said, sizeof said);
    if (room > size && byte() & 1) made[size + byte() % (room - size)] = 1;
    return made;
}

/* Where to write something; seldom nowhere. */
#define OR_NULL(pointer) (seldom() ? NULL : (pointer))

static bool slow(void) {
    return slow_calls++ >= MOST_SLOW;
}

static void made(kind k, trtxpy_status status, void *handle, bool given) {
    if (!given) {
        MUST(status != TRTXPY_OK);
        return;
    }
    MUST((status == TRTXPY_OK) == (handle != NULL));
    if (handle) add(k, handle);
}

/* ---- calls ---- */

static void create_context(void) {
    static const char *const backends[] = {"mock", "mock:instant", "mock:", "mock:instant,", "nothing", "\xFF", ""};
    if (full(CONTEXT) || slow()) return;
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    options.backend = backends[seldom() ? byte() % 7 : byte() % 2];
    if (seldom()) options.device = (int32_t)fuzz_number(&in, 4);
    options.completion = seldom() ? (int32_t)fuzz_number(&in, 1) - 1 : byte() % 3;
    options.max_device_bytes = seldom() ? fuzz_number(&in, 8) : 1 << 20;
    if (seldom()) options.max_cached_models = (uint32_t)fuzz_number(&in, 4);
    if (seldom()) options.lean_library = byte() & 1 ? "/nowhere.so" : "\xFF";
    void *given = grown(&options, sizeof options);
    trtxpy_context context = (trtxpy_context)given, *where = OR_NULL(&context);
    trtxpy_status status = DO(trtxpy_context_create(given, where));
    made(CONTEXT, status, context, where != NULL);
    free(given);
}

static void destroy(kind k) {
    void *handle = pick(k);
    for (size_t i = 0; k == GRAPH && i < pools[GRAPH].permanent_count; i++)
        if (pools[GRAPH].permanent[i] == handle) return;
    trtxpy_status status = k == CONTEXT   ? DO(trtxpy_context_destroy(handle))
                           : k == GRAPH   ? DO(trtxpy_graph_destroy(handle))
                           : k == TENSOR  ? DO(trtxpy_tensor_destroy(handle))
                           : k == REQUEST ? DO(trtxpy_request_destroy(handle))
                           : k == QUEUE   ? DO(trtxpy_queue_destroy(handle))
                                          : DO(trtxpy_results_destroy(handle));
    if (!handle) MUST(status == TRTXPY_OK);
    else if (status == TRTXPY_OK) gone(k, handle);
    else MUST(status == TRTXPY_INVALID_HANDLE || status == TRTXPY_BORROWED);
}

static void describe_context(void) {
    trtxpy_context_info info = TRTXPY_CONTEXT_INFO_INIT;
    void *to = grown(&info, sizeof info);
    DO(trtxpy_context_describe(pick(CONTEXT), OR_NULL(to)));
    free(to);
    trtxpy_context_statistics statistics = TRTXPY_CONTEXT_STATISTICS_INIT;
    to = grown(&statistics, sizeof statistics);
    DO(trtxpy_context_get_statistics(pick(CONTEXT), OR_NULL(to)));
    free(to);
}

static trtxpy_graph_options graph_options(trtxpy_profile_range *range) {
    trtxpy_graph_options options = TRTXPY_GRAPH_OPTIONS_INIT;
    static const char *const precisions[] = {"fp16", "bf16", "", "\xFF", "fp32", "int8"};
    if (seldom()) options.precision = precisions[byte() % 6];
    if (seldom()) options.optimization_level = (int32_t)fuzz_number(&in, 4);
    options.lanes = seldom() ? (uint32_t)fuzz_number(&in, 4) : byte() % 3;
    options.slots = seldom() ? (uint32_t)fuzz_number(&in, 4) : byte() % 3;
    options.max_graphs = seldom() ? (uint32_t)fuzz_number(&in, 4) : byte() % 3;
    options.no_cuda_graphs = seldom();
    options.reserved = seldom();
    if (byte() & 1) {
        *range = (trtxpy_profile_range){"x", {2, 0, {1, 4}}, {2, 0, {4, 4}}, {2, 0, {8, 4}}};
        if (seldom()) *range = (trtxpy_profile_range){name(), shape(), shape(), shape()};
        options.ranges = OR_NULL(range);
        options.range_count = 1;
    }
    return options;
}

static void open_graph(void) {
    if (full(GRAPH) || slow()) return;
    trtxpy_profile_range range;
    trtxpy_graph_options options = graph_options(&range);
    void *given = grown(&options, sizeof options), *passed = byte() & 1 ? NULL : given;
    size_t which = byte() % MODELS, bytes = seldom() ? (size_t)fuzz_number(&in, 8) : models[which].size;
    if (bytes > models[which].size && bytes <= PTRDIFF_MAX) bytes = models[which].size;
    trtxpy_graph graph = (trtxpy_graph)given, *where = OR_NULL(&graph);
    void *model = OR_NULL(models[which].data);
    static const uint8_t weights[8];
    bool with_weights = seldom();
    char path[1024];
    snprintf(path, sizeof path, "%s/%s%s", fuzz_folder, model_names[which], seldom() ? "\xFF" : "");
    trtxpy_context context = pick(CONTEXT);
    trtxpy_status status;
    if (byte() % 3) status = DO(trtxpy_graph_from_onnx(context, model, bytes, with_weights ? weights : NULL, with_weights ? byte() % 9 : seldom(), passed, where));
    else status = DO(trtxpy_graph_from_file(context, OR_NULL(path), passed, where));
    made(GRAPH, status, graph, where != NULL);
    free(given);
}

static void copy_graph(void) {
    if (full(GRAPH) || slow()) return;
    trtxpy_graph from = pick(GRAPH), graph = from;
    size_t bytes = 0;
    if (DO(trtxpy_graph_get_plan(from, NULL, seldom() ? NULL : &bytes)) != TRTXPY_OK) return;
    uint8_t *plan = malloc(bytes);
    size_t room = seldom() ? fuzz_below(&in, 256) : bytes;
    trtxpy_status status = DO(trtxpy_graph_get_plan(from, plan, &room));
    MUST(room == bytes);
    MUST(status == TRTXPY_OK || status == TRTXPY_BUFFER_SIZE);
    if (status == TRTXPY_OK) {
        if (seldom()) plan[fuzz_number(&in, 2) % bytes] ^= 1;
        size_t cut = seldom() ? fuzz_below(&in, 256) : 0;
        status = DO(trtxpy_graph_from_plan(pick(CONTEXT), plan, bytes - (cut < bytes ? cut : bytes), NULL, &graph));
        made(GRAPH, status, graph, true);
    }
    free(plan);
}

static void look_at_graph(void) {
    trtxpy_graph graph = pick(GRAPH);
    size_t count = 0;
    DO(trtxpy_graph_tensor_count(graph, seldom() ? byte() : byte() & 1, OR_NULL(&count)));
    trtxpy_tensor_info info = TRTXPY_TENSOR_INFO_INIT;
    void *to = grown(&info, sizeof info);
    DO(trtxpy_graph_tensor_info(graph, seldom() ? byte() : byte() & 1, seldom() ? (size_t)fuzz_number(&in, 8) : byte() % 3, OR_NULL(to)));
    free(to);
    trtxpy_graph_statistics statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    to = grown(&statistics, sizeof statistics);
    DO(trtxpy_graph_get_statistics(graph, OR_NULL(to)));
    free(to);
}

/* Of the graph's inputs, with any number of rows where that is open. */
static size_t shapes_of(trtxpy_graph graph, trtxpy_direction direction, trtxpy_named_shape *shapes, trtxpy_dtype *dtypes) {
    size_t count = 0;
    if (trtxpy_graph_tensor_count(graph, direction, &count) != TRTXPY_OK || count > PORTS) return 0;
    int64_t rows = 1 + byte() % 3;
    for (size_t i = 0; i < count; i++) {
        trtxpy_tensor_info info = TRTXPY_TENSOR_INFO_INIT;
        MUST(trtxpy_graph_tensor_info(graph, direction, i, &info) == TRTXPY_OK);
        shapes[i] = (trtxpy_named_shape){info.name, info.shape};
        for (int32_t axis = 0; axis < info.shape.rank; axis++)
            if (info.shape.dims[axis] < 0) shapes[i].shape.dims[axis] = rows;
        if (dtypes) dtypes[i] = info.dtype;
        if (seldom()) shapes[i].shape = shape();
        if (seldom()) shapes[i].name = name();
    }
    return count;
}

static void prepare(void) {
    if (slow()) return;
    trtxpy_graph graph = pick(GRAPH);
    trtxpy_named_shape shapes[PORTS] = {{0}};
    size_t count = shapes_of(graph, TRTXPY_INPUT, shapes, NULL);
    if (seldom()) count = byte() % (PORTS + 1);
    trtxpy_shape results[PORTS];
    if (byte() & 1) DO(trtxpy_graph_prepare(graph, OR_NULL(shapes), count));
    else DO(trtxpy_graph_output_shapes(graph, OR_NULL(shapes), count, OR_NULL(results), seldom() ? byte() % (PORTS + 1) : PORTS));
}

static trtxpy_status create_tensor(trtxpy_context context, trtxpy_dtype dtype, trtxpy_shape wanted, trtxpy_tensor *tensor) {
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    desc.dtype = dtype;
    desc.shape = wanted;
    desc.location = seldom() ? (int32_t)byte() % 6 - 1 : byte() % 8 == 0;
    void *given = grown(&desc, sizeof desc);
    trtxpy_tensor *where = OR_NULL(tensor);
    trtxpy_status status = DO(trtxpy_tensor_create(context, OR_NULL(given), where));
    free(given);
    made(TENSOR, status, where ? *where : NULL, where != NULL);
    return status;
}

static void random_tensor(void) {
    if (full(TENSOR)) return;
    trtxpy_tensor tensor = NULL;
    create_tensor(pick(CONTEXT), seldom() ? (int32_t)fuzz_number(&in, 4) : byte() % 20, shape(), &tensor);
}

/* Tensors that fit a graph: without these no request is ever accepted. */
static void make_set(void) {
    if (full(TENSOR) || set_count == SETS || slow()) return;
    trtxpy_graph graph = pick(GRAPH);
    tensor_set *set = &sets[set_count];
    memset(set, 0, sizeof *set);
    set->graph = graph;
    trtxpy_named_shape shapes[2][PORTS] = {{{0}}};
    trtxpy_dtype dtypes[PORTS] = {0};
    if (byte() % 4 == 0) {
        for (int d = 0; d < 2; d++) set->counts[d] = shapes_of(graph, d, shapes[d], NULL);
        size_t rooms[2] = {set->counts[0], seldom() ? byte() % PORTS : set->counts[1]};
        trtxpy_tensor *where[2] = {OR_NULL(set->tensors[0]), OR_NULL(set->tensors[1])};
        memset(set->tensors, 0x55, sizeof set->tensors);
        trtxpy_status status = DO(trtxpy_graph_create_tensors(graph, OR_NULL(shapes[0]), set->counts[0], where[0], rooms[0], where[1], rooms[1]));
        for (int d = 0; d < 2; d++)
            for (size_t i = 0; i < rooms[d] && where[d]; i++) {
                MUST((status == TRTXPY_OK) == (set->tensors[d][i] != NULL));
                if (status == TRTXPY_OK) add(TENSOR, set->tensors[d][i]);
            }
        if (status == TRTXPY_OK) set_count++;
        return;
    }
    /* the context that the graph is of is not known to the caller by the handle: both are tried */
    trtxpy_context context = pools[CONTEXT].permanent[byte() & 1];
    for (size_t i = 0; i < pools[GRAPH].permanent_count; i++)
        if (pools[GRAPH].permanent[i] == graph) context = pools[CONTEXT].permanent[i >= 3];
    for (int d = 0; d < 2; d++) {
        set->counts[d] = shapes_of(graph, d, shapes[d], dtypes);
        for (size_t i = 0; i < set->counts[d]; i++) create_tensor(context, dtypes[i], shapes[d][i].shape, &set->tensors[d][i]);
    }
    set_count++;
}

static void use_tensor(void) {
    trtxpy_tensor tensor = pick(TENSOR);
    size_t bytes = 0;
    trtxpy_status status = DO(trtxpy_tensor_bytes(tensor, OR_NULL(&bytes)));
    if (seldom()) bytes = byte();
    if (bytes > 1 << 16) bytes = 0;
    void *buffer = calloc(1, bytes ? bytes : 1), *data;
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    trtxpy_shape wanted = shape();
    void *to;
    switch (byte() % 5) {
    case 0: DO(trtxpy_tensor_write(tensor, OR_NULL(buffer), bytes)); break;
    case 1: DO(trtxpy_tensor_read(tensor, OR_NULL(buffer), bytes)); break;
    case 2:
        if ((status = DO(trtxpy_tensor_data(tensor, OR_NULL(&data)))) == TRTXPY_OK) MUST(!data || !((uintptr_t)data % 4) || 1);
        break;
    case 3: DO(trtxpy_tensor_resize(tensor, OR_NULL(&wanted))); break;
    default:
        to = grown(&desc, sizeof desc);
        DO(trtxpy_tensor_describe(tensor, OR_NULL(to)));
        free(to);
    }
    free(buffer);
}

static void drop_import(struct DLManagedTensor *self) {
    atomic_fetch_sub(&imported, 1);
    free(self->dl_tensor.shape);
    free(self->manager_ctx);
    free(self);
}

/* Memory of ours, at times not aligned. */
static void import_tensor(void) {
    if (full(TENSOR)) return;
    struct DLManagedTensor *managed = calloc(1, sizeof *managed);
    static const uint8_t types[][2] = {{2, 32}, {0, 32}, {1, 32}, {0, 64}, {1, 8}, {6, 8}, {1, 32}, {2, 32}};
    size_t type = byte() % 8, ndim = 1 + byte() % 2;
    managed->dl_tensor.shape = calloc(ndim, sizeof(int64_t));
    managed->dl_tensor.shape[0] = ndim == 1 ? 3 : 1 + byte() % 3;
    if (ndim == 2) managed->dl_tensor.shape[1] = 4;
    managed->dl_tensor.ndim = (int32_t)ndim;
    managed->dl_tensor.device[0] = 1;
    managed->dl_tensor.code = types[type][0];
    managed->dl_tensor.bits = types[type][1];
    managed->dl_tensor.lanes = 1;
    managed->dl_tensor.byte_offset = seldom() ? byte() % 16 : 0;
    managed->manager_ctx = calloc(1, 12 * 8 + 16);
    managed->dl_tensor.data = managed->manager_ctx;
    managed->deleter = drop_import;
    atomic_fetch_add(&imported, 1);
    trtxpy_tensor tensor = (trtxpy_tensor)managed, *where = OR_NULL(&tensor);
    trtxpy_status status = DO(trtxpy_tensor_from_dlpack(pick(CONTEXT), managed, where));
    made(TENSOR, status, tensor, where != NULL);
    if (status != TRTXPY_OK) drop_import(managed);
    /* in the place of a tensor of a set */
    if (status == TRTXPY_OK && set_count) {
        tensor_set *set = &sets[fuzz_below(&in, set_count)];
        set->tensors[byte() & 1][byte() % PORTS] = tensor;
    }
}

static void export_tensor(void) {
    if (export_count == EXPORTS || byte() & 1) {
        if (export_count) export_count--, exports[export_count]->deleter(exports[export_count]);
        return;
    }
    struct DLManagedTensor *managed = NULL, **where = OR_NULL(&managed);
    trtxpy_status status = DO(trtxpy_tensor_to_dlpack(pick(TENSOR), where));
    MUST((status == TRTXPY_OK) == (managed != NULL));
    if (managed) exports[export_count++] = managed;
}

/* ---- requests ---- */

static void on_completion(trtxpy_status status, const char *message, const trtxpy_result *result, void *userdata) {
    MUST(status >= TRTXPY_OK && status < TRTXPY_INTERNAL);
    MUST((status == TRTXPY_OK) == (message == NULL));
    MUST(result->token == 77 && userdata == &calls);
    if (trtxpy_dispatch(NULL, NULL, 0, NULL, 0, NULL) != TRTXPY_IN_CALLBACK) fuzz_finding("a dispatch in a callback is not refused");
    size_t live;
    MUST(trtxpy_live_objects(&live) == TRTXPY_OK);
    atomic_fetch_add(&calls, 1);
}

typedef struct bound {
    trtxpy_graph graph;
    size_t counts[2];
    trtxpy_binding *bindings[2];
} bound;

static bool bind(bound *b) {
    memset(b, 0, sizeof *b);
    if (!set_count) return false;
    tensor_set *set = &sets[fuzz_below(&in, set_count)];
    b->graph = seldom() ? pick(GRAPH) : set->graph;
    for (int d = 0; d < 2; d++) {
        size_t count = set->counts[d];
        trtxpy_binding *bindings = calloc(count ? count : 1, sizeof *bindings);
        for (size_t i = 0; i < count; i++) {
            trtxpy_tensor_info info = TRTXPY_TENSOR_INFO_INIT;
            info.name = "x";
            (void)trtxpy_graph_tensor_info(b->graph, d, i, &info);
            bindings[i] = (trtxpy_binding){seldom() ? name() : info.name, seldom() ? pick(TENSOR) : set->tensors[d][i]};
        }
        b->bindings[d] = bindings;
        b->counts[d] = seldom() ? fuzz_below(&in, count + 1) : count;
    }
    return true;
}

static void unbind(bound *b) {
    free(b->bindings[0]);
    free(b->bindings[1]);
}

static void dispatch(void) {
    bound b;
    if (!bind(&b)) return;
    static const uint64_t timeouts[] = {0, 0, 0, 1, 100000, 1000000, UINT64_MAX, UINT64_MAX / 2};
    trtxpy_dispatch_options options = TRTXPY_DISPATCH_OPTIONS_INIT;
    options.timeout_ns = timeouts[byte() % 8];
    options.resize_outputs = byte() & 1;
    options.reserved = seldom();
    void *given = grown(&options, sizeof options);
    DO(trtxpy_dispatch(b.graph, OR_NULL(b.bindings[0]), b.counts[0], OR_NULL(b.bindings[1]), b.counts[1], byte() & 1 ? given : NULL));
    free(given);
    unbind(&b);
}

static void submit(void) {
    bound b;
    if (full(REQUEST) || !bind(&b)) return;
    trtxpy_submit_options options = TRTXPY_SUBMIT_OPTIONS_INIT;
    uint8_t how = byte();
    if (how & 1) options.callback = on_completion;
    options.userdata = &calls;
    if ((how & 6) == 2) options.queue = pick(QUEUE);
    options.token = 77;
    options.resize_outputs = how >> 3 & 1;
    options.reserved = seldom();
    size_t size = sizeof options, said;
    void *given = grown(&options, size);
    memcpy(&said, given, sizeof said);
    trtxpy_request request = (trtxpy_request)given, *where = how & 16 ? NULL : &request;
    bool expected = how & 1;
    if (expected) atomic_fetch_add(&expected_calls, 1);
    trtxpy_status status = DO(trtxpy_submit(b.graph, OR_NULL(b.bindings[0]), b.counts[0], OR_NULL(b.bindings[1]), b.counts[1], given, where));
    if (expected && status != TRTXPY_OK) atomic_fetch_sub(&expected_calls, 1);
    if (where) made(REQUEST, status, request, true);
    free(given);
    unbind(&b);
}

static void ask_request(void) {
    static const uint64_t timeouts[] = {0, 1, 100000, 10000000};
    trtxpy_request request = pick(REQUEST);
    trtxpy_status outcome = -1, status;
    if (byte() & 1) {
        DO(trtxpy_request_cancel(request));
        return;
    }
    trtxpy_status *where = OR_NULL(&outcome);
    status = trtxpy_request_wait(request, timeouts[byte() % 4], where);
    if (status == TRTXPY_OK) fuzz_checked_text(outcome, trtxpy_last_error(), "the outcome of a request");
    else fuzz_checked(status, "trtxpy_request_wait");
}

static void use_queue(void) {
    trtxpy_queue queue = pick(QUEUE);
    int fd = -1;
    if (DO(trtxpy_queue_fd(queue, OR_NULL(&fd))) == TRTXPY_OK) MUST(fd >= 0);
    size_t room = byte() % 4, taken = 99;
    trtxpy_completion *completions = malloc((room ? room : 1) * sizeof *completions);
    if (DO(trtxpy_queue_take(queue, OR_NULL(completions), room, OR_NULL(&taken))) == TRTXPY_OK) {
        MUST(taken <= room);
        for (size_t i = 0; i < taken; i++) {
            MUST(memchr(completions[i].message, 0, sizeof completions[i].message));
            MUST(completions[i].result.token == 77);
            fuzz_checked_text(completions[i].status, completions[i].message, "a completion");
        }
    }
    free(completions);
}

static void create_queue(void) {
    if (full(QUEUE)) return;
    trtxpy_queue queue = NULL, *where = OR_NULL(&queue);
    trtxpy_status status = DO(trtxpy_queue_create(pick(CONTEXT), where));
    made(QUEUE, status, queue, where != NULL);
}

/* ---- one-shot calls ---- */

/* The array's elements have the size that the first one says: one that is too small or odd must be refused. */
static void run(void) {
    if (full(RESULTS) || slow()) return;
    size_t which = byte() % MODELS, count = which == 1 || which == 2 ? 2 : 1, stride = sizeof(trtxpy_array);
    if (seldom()) stride = byte() & 1 ? stride + byte() : byte();
    size_t step = stride < sizeof(trtxpy_array) ? sizeof(trtxpy_array) : stride;
    if (seldom()) count = byte() % 4;
    uint8_t *arrays = calloc(count ? count : 1, step);
    void *data = calloc(1, 256);
    static const int64_t dims[MODELS][2] = {{2, 4}, {3}, {3}, {6}, {0}, {2, 4}};
    static const int32_t ranks[MODELS] = {2, 1, 1, 1, 0, 2};
    for (size_t i = 0; i < count; i++) {
        trtxpy_array array = TRTXPY_ARRAY_INIT;
        array.struct_size = stride;
        array.name = seldom() ? name() : count == 2 ? (i ? "b" : "a") : "x";
        array.dtype = seldom() ? byte() : which == 2 ? TRTXPY_UINT32 : TRTXPY_FLOAT32;
        array.shape.rank = ranks[which];
        memcpy(array.shape.dims, dims[which], sizeof dims[which]);
        if (seldom()) array.shape = shape();
        if (trtxpy_dtype_bytes(array.dtype, &array.shape, &array.bytes) != TRTXPY_OK || array.bytes > 256) array.bytes = 256;
        if (seldom()) array.bytes = byte();
        array.data = OR_NULL(data);
        memcpy(arrays + i * step, &array, sizeof array);
    }
    trtxpy_profile_range range;
    trtxpy_graph_options options = graph_options(&range);
    void *given = grown(&options, sizeof options), *passed = byte() & 3 ? NULL : given;
    trtxpy_results results = (trtxpy_results)given, *where = OR_NULL(&results);
    trtxpy_context context = pick(CONTEXT);
    uint8_t *model = OR_NULL(models[which].data);
    trtxpy_status status = byte() & 1 ? DO(trtxpy_run(context, model, models[which].size, NULL, 0, OR_NULL((trtxpy_array *)arrays), count, passed, where))
                                      : DO(trtxpy_run_zeroed(context, model, models[which].size, NULL, seldom(), passed, where));
    made(RESULTS, status, results, where != NULL);
    free(given);
    free(data);
    free(arrays);
}

static void use_results(void) {
    trtxpy_results results = pick(RESULTS);
    size_t count = 0;
    DO(trtxpy_results_count(results, OR_NULL(&count)));
    trtxpy_array array = TRTXPY_ARRAY_INIT;
    void *to = grown(&array, sizeof array);
    DO(trtxpy_results_get(results, seldom() ? (size_t)fuzz_number(&in, 8) : byte() % 3, OR_NULL(to)));
    free(to);
}

static void small_things(void) {
    size_t number = 0;
    trtxpy_shape wanted = shape();
    trtxpy_dtype dtype = seldom() ? (int32_t)fuzz_number(&in, 4) : byte() % 20;
    DO(trtxpy_dtype_bytes(dtype, OR_NULL(&wanted), OR_NULL(&number)));
    (void)trtxpy_dtype_name(dtype);
    MUST(trtxpy_status_name((trtxpy_status)dtype));
    DO(trtxpy_live_objects(OR_NULL(&number)));
    MUST(DO(trtxpy_shutdown()) == TRTXPY_BORROWED);
    trtxpy_init_options options = {sizeof options, seldom() ? "/nowhere" : NULL};
    void *given = grown(&options, sizeof options);
    DO(trtxpy_init(given));
    free(given);
}

static void call(void) {
    switch (byte() % 32) {
    case 0: create_context(); break;
    case 1: destroy((kind)fuzz_below(&in, KINDS)); break;
    case 2: describe_context(); break;
    case 3: case 4: open_graph(); break;
    case 5: copy_graph(); break;
    case 6: look_at_graph(); break;
    case 7: prepare(); break;
    case 8: random_tensor(); break;
    case 9: case 10: case 11: case 12: make_set(); break;
    case 13: use_tensor(); break;
    case 14: import_tensor(); break;
    case 15: export_tensor(); break;
    case 16: case 17: case 18: dispatch(); break;
    case 19: case 20: case 21: case 22: submit(); break;
    case 23: case 24: ask_request(); break;
    case 25: create_queue(); break;
    case 26: use_queue(); break;
    case 27: run(); break;
    case 28: use_results(); break;
    case 29: small_things(); break;
    default: destroy((kind)fuzz_below(&in, KINDS)); break;
    }
}

/* ---- the end of a unit ---- */

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* What a request that completes just now still has is free in a moment. */
static void destroy_all(kind k) {
    double until = now_s() + 20;
    while (pools[k].live_count) {
        void *handle = pools[k].live[pools[k].live_count - 1];
        trtxpy_status status = k == CONTEXT   ? DO(trtxpy_context_destroy(handle))
                               : k == GRAPH   ? DO(trtxpy_graph_destroy(handle))
                               : k == TENSOR  ? DO(trtxpy_tensor_destroy(handle))
                               : k == REQUEST ? DO(trtxpy_request_destroy(handle))
                               : k == QUEUE   ? DO(trtxpy_queue_destroy(handle))
                                              : DO(trtxpy_results_destroy(handle));
        if (status == TRTXPY_OK) pools[k].live_count--;
        else if (status != TRTXPY_BORROWED || now_s() > until)
            fuzz_finding("an object of kind %d cannot be destroyed: %s: %s", (int)k, trtxpy_status_name(status), trtxpy_last_error());
        else usleep(200);
    }
}

static void settle(void) {
    double until = now_s() + 20;
    for (size_t i = 0; i < pools[GRAPH].permanent_count; i++)
        for (;;) {
            trtxpy_graph_statistics s = TRTXPY_GRAPH_STATISTICS_INIT;
            MUST(DO(trtxpy_graph_get_statistics(pools[GRAPH].permanent[i], &s)) == TRTXPY_OK);
            if (!s.in_flight && !s.queued && s.submitted == s.completed + s.failed + s.cancelled) break;
            if (now_s() > until)
                fuzz_finding("requests do not end: %llu in flight, %llu queued, %llu submitted, %llu completed, %llu failed, %llu cancelled",
                             (unsigned long long)s.in_flight, (unsigned long long)s.queued, (unsigned long long)s.submitted,
                             (unsigned long long)s.completed, (unsigned long long)s.failed, (unsigned long long)s.cancelled);
            usleep(200);
        }
}

static void end(size_t before) {
    while (export_count) export_count--, exports[export_count]->deleter(exports[export_count]);
    destroy_all(RESULTS);
    for (size_t i = 0; i < pools[REQUEST].live_count; i++) {
        trtxpy_status outcome = -1;
        MUST(trtxpy_request_wait(pools[REQUEST].live[i], UINT64_C(20000000000), &outcome) == TRTXPY_OK);
        fuzz_checked_text(outcome, trtxpy_last_error(), "the outcome of a request");
    }
    destroy_all(REQUEST);
    destroy_all(TENSOR);
    destroy_all(QUEUE);
    destroy_all(GRAPH);
    settle();
    double until = now_s() + 20;
    while (atomic_load(&calls) != atomic_load(&expected_calls)) {
        if (now_s() > until) fuzz_finding("%d callbacks for %d requests", atomic_load(&calls), atomic_load(&expected_calls));
        usleep(200);
    }
    destroy_all(CONTEXT);
    MUST(atomic_load(&imported) == 0);
    for (size_t i = 0; i < pools[CONTEXT].permanent_count; i++) {
        trtxpy_context_statistics s = TRTXPY_CONTEXT_STATISTICS_INIT;
        MUST(DO(trtxpy_context_get_statistics(pools[CONTEXT].permanent[i], &s)) == TRTXPY_OK);
        MUST(s.graphs == 3 && !s.tensors && !s.queues && !s.requests);
    }
    fuzz_nothing_left(before);
}

int LLVMFuzzerInitialize(int *count, char ***arguments) {
    (void)count, (void)arguments;
    fuzz_start();
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    options.backend = "mock:instant";
    options.max_device_bytes = 32 << 20;
    trtxpy_context instant;
    MUST(DO(trtxpy_context_create(&options, &instant)) == TRTXPY_OK);
    pools[CONTEXT].permanent[pools[CONTEXT].permanent_count++] = fuzz_context;
    pools[CONTEXT].permanent[pools[CONTEXT].permanent_count++] = instant;
    for (int i = 0; i < MODELS; i++) {
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", fuzz_folder, model_names[i]);
        FILE *file = fopen(path, "rb");
        if (!file) fuzz_finding("no %s: set TRTXPY_FUZZ_MODELS", path);
        models[i].size = fread(models[i].data, 1, sizeof models[i].data, file);
        fclose(file);
    }
    for (int c = 0; c < 2; c++)
        for (int i = 0; i < 3; i++) {
            trtxpy_graph_options how = TRTXPY_GRAPH_OPTIONS_INIT;
            how.lanes = i == 0 ? 2 : 1;
            how.slots = 2;
            how.max_graphs = 2;
            trtxpy_graph graph;
            MUST(DO(trtxpy_graph_from_onnx(pools[CONTEXT].permanent[c], models[i].data, models[i].size, NULL, 0, &how, &graph)) == TRTXPY_OK);
            pools[GRAPH].permanent[pools[GRAPH].permanent_count++] = graph;
        }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t before = fuzz_live();
    in = (fuzz_input){data, size};
    atomic_store(&calls, 0);
    atomic_store(&expected_calls, 0);
    set_count = 0;
    slow_calls = 0;
    for (int k = 0; k < KINDS; k++) pools[k].stale_count = 0;
    for (int i = 0; i < MOST_CALLS && in.size; i++) call();
    end(before);
    return 0;
}
