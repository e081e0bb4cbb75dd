/* A model or plan from the unit: opened in one of the ways there are, looked at, run, and closed. */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

enum { MOST_PORTS = 24, MOST_BYTES = 1 << 20 };

typedef struct port_facts {
    trtxpy_tensor_info info;
    trtxpy_shape shape; /* without -1 */
    size_t bytes;
} port_facts;

typedef struct opened {
    trtxpy_graph graph;
    size_t counts[2];
    port_facts ports[2][MOST_PORTS];
} opened;

typedef struct choices {
    trtxpy_graph_options options;
    trtxpy_profile_range range;
    bool defaults;
} choices;

static void choose(fuzz_input *control, choices *made, bool plan) {
    static const char *const precisions[] = {NULL, NULL, NULL, NULL, "fp16", "bf16", "int8", "\xff\xfe", "", "fp32"};
    memset(made, 0, sizeof *made);
    made->options = (trtxpy_graph_options)TRTXPY_GRAPH_OPTIONS_INIT;
    uint8_t which = fuzz_byte(control);
    made->defaults = which < 64;
    if (plan && which < 224) which &= 0xE7; /* what belongs to a build is refused for plans: seldom */
    if (which & 1) made->options.lanes = fuzz_byte(control) % 4;
    if (which & 2) made->options.slots = fuzz_byte(control) % 5;
    if (which & 4) made->options.no_cuda_graphs = 1;
    if (which & 8) made->options.precision = precisions[fuzz_byte(control) % (sizeof precisions / sizeof *precisions)];
    if (which & 16) {
        uint8_t bits = fuzz_byte(control);
        made->range.name = bits & 1 ? "x" : "a";
        made->range.min = (trtxpy_shape){2, 0, {1, 4}};
        made->range.opt = (trtxpy_shape){2, 0, {bits >> 4, 4}};
        made->range.max = (trtxpy_shape){2, 0, {8, 4}};
        if (bits & 2) made->range.min.rank = made->range.opt.rank = made->range.max.rank = 1;
        made->options.ranges = &made->range;
        made->options.range_count = 1;
    }
    if (which & 32) made->options.max_graphs = 1 + fuzz_byte(control) % 3;
    if (which == 255) made->options.optimization_level = (int32_t)fuzz_byte(control) - 100;
}

static void look(opened *o, fuzz_input *control) {
    for (trtxpy_direction direction = TRTXPY_INPUT; direction <= TRTXPY_OUTPUT; direction++) {
        MUST(DO(trtxpy_graph_tensor_count(o->graph, direction, &o->counts[direction])) == TRTXPY_OK);
        int64_t extent = fuzz_byte(control) % 6;
        for (size_t i = 0; i < o->counts[direction] && i < MOST_PORTS; i++) {
            port_facts *port = &o->ports[direction][i];
            port->info = (trtxpy_tensor_info)TRTXPY_TENSOR_INFO_INIT;
            MUST(DO(trtxpy_graph_tensor_info(o->graph, direction, i, &port->info)) == TRTXPY_OK);
            MUST(port->info.name && trtxpy_dtype_name(port->info.dtype) && trtxpy_dtype_name(port->info.engine_dtype));
            port->shape = port->info.shape;
            for (int32_t axis = 0; axis < port->shape.rank; axis++)
                if (port->shape.dims[axis] < 0) port->shape.dims[axis] = extent;
            if (DO(trtxpy_dtype_bytes(port->info.dtype, &port->shape, &port->bytes)) != TRTXPY_OK) port->bytes = SIZE_MAX;
        }
    }
}

static bool is_small(const opened *o, trtxpy_direction direction) {
    if (o->counts[direction] > MOST_PORTS) return false;
    for (size_t i = 0; i < o->counts[direction]; i++)
        if (o->ports[direction][i].bytes > MOST_BYTES) return false;
    return true;
}

static bool make_tensors(const opened *o, trtxpy_direction direction, trtxpy_location location, trtxpy_binding *bindings) {
    bool good = true;
    for (size_t i = 0; i < o->counts[direction]; i++) {
        trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
        desc.dtype = o->ports[direction][i].info.dtype;
        desc.shape = o->ports[direction][i].shape;
        desc.location = location;
        bindings[i].name = o->ports[direction][i].info.name;
        trtxpy_status status = DO(trtxpy_tensor_create(fuzz_context, &desc, &bindings[i].tensor));
        MUST((status == TRTXPY_OK) == (bindings[i].tensor != NULL));
        if (status != TRTXPY_OK) good = false;
    }
    return good;
}

static void destroy_tensors(const opened *o, trtxpy_direction direction, trtxpy_binding *bindings) {
    for (size_t i = 0; i < o->counts[direction]; i++) MUST(DO(trtxpy_tensor_destroy(bindings[i].tensor)) == TRTXPY_OK);
}

static void dispatch(opened *o, fuzz_input *control) {
    trtxpy_binding inputs[MOST_PORTS] = {{0}}, outputs[MOST_PORTS] = {{0}};
    trtxpy_named_shape shapes[MOST_PORTS] = {{0}};
    trtxpy_shape results[MOST_PORTS];
    uint8_t how = fuzz_byte(control);
    for (size_t i = 0; i < o->counts[0]; i++) {
        shapes[i].name = o->ports[0][i].info.name;
        shapes[i].shape = o->ports[0][i].shape;
    }
    if (how & 1 && DO(trtxpy_graph_output_shapes(o->graph, shapes, o->counts[0], results, o->counts[1])) == TRTXPY_OK)
        for (size_t i = 0; i < o->counts[1]; i++) {
            o->ports[1][i].shape = results[i];
            MUST(DO(trtxpy_dtype_bytes(o->ports[1][i].info.dtype, &results[i], &o->ports[1][i].bytes)) == TRTXPY_OK);
        }
    if (!is_small(o, TRTXPY_OUTPUT)) return;
    trtxpy_location location = (how & 6) == 6 ? TRTXPY_DEVICE : TRTXPY_HOST;
    trtxpy_dispatch_options options = TRTXPY_DISPATCH_OPTIONS_INIT;
    options.resize_outputs = how & 8 ? 0 : 1;
    bool made = make_tensors(o, TRTXPY_INPUT, location, inputs);
    if (make_tensors(o, TRTXPY_OUTPUT, location, outputs) && made) {
        for (int i = 0; i < (how & 16 ? 2 : 1); i++)
            DO(trtxpy_dispatch(o->graph, inputs, o->counts[0], outputs, o->counts[1], &options));
    }
    destroy_tensors(o, TRTXPY_INPUT, inputs);
    destroy_tensors(o, TRTXPY_OUTPUT, outputs);
    trtxpy_tensor in[MOST_PORTS], out[MOST_PORTS];
    if (how & 32 && DO(trtxpy_graph_create_tensors(o->graph, shapes, o->counts[0], in, o->counts[0], out, o->counts[1])) == TRTXPY_OK) {
        for (size_t i = 0; i < o->counts[0]; i++) inputs[i].tensor = in[i];
        for (size_t i = 0; i < o->counts[1]; i++) outputs[i].tensor = out[i];
        DO(trtxpy_dispatch(o->graph, inputs, o->counts[0], outputs, o->counts[1], &options));
        destroy_tensors(o, TRTXPY_INPUT, inputs);
        destroy_tensors(o, TRTXPY_OUTPUT, outputs);
    }
}

static void use_plan(const opened *o) {
    size_t bytes = 0;
    MUST(DO(trtxpy_graph_get_plan(o->graph, NULL, &bytes)) == TRTXPY_OK);
    unsigned char *plan = malloc(bytes ? bytes : 1);
    size_t little = bytes / 2;
    MUST(bytes == 0 || DO(trtxpy_graph_get_plan(o->graph, plan, &little)) == TRTXPY_BUFFER_SIZE);
    MUST(DO(trtxpy_graph_get_plan(o->graph, plan, &bytes)) == TRTXPY_OK);
    trtxpy_graph again;
    if (DO(trtxpy_graph_from_plan(fuzz_context, plan, bytes, NULL, &again)) == TRTXPY_OK) {
        for (trtxpy_direction direction = TRTXPY_INPUT; direction <= TRTXPY_OUTPUT; direction++)
            for (size_t i = 0; i < o->counts[direction] && i < MOST_PORTS; i++) {
                trtxpy_tensor_info info = TRTXPY_TENSOR_INFO_INIT;
                MUST(DO(trtxpy_graph_tensor_info(again, direction, i, &info)) == TRTXPY_OK);
                MUST(!strcmp(info.name, o->ports[direction][i].info.name) && info.dtype == o->ports[direction][i].info.dtype);
            }
        MUST(DO(trtxpy_graph_destroy(again)) == TRTXPY_OK);
    }
    free(plan);
}

static volatile unsigned char touched;

static void read_results(trtxpy_results results) {
    size_t count;
    MUST(DO(trtxpy_results_count(results, &count)) == TRTXPY_OK);
    for (size_t i = 0; i < count; i++) {
        trtxpy_array array = TRTXPY_ARRAY_INIT;
        size_t bytes;
        MUST(DO(trtxpy_results_get(results, i, &array)) == TRTXPY_OK);
        MUST(DO(trtxpy_dtype_bytes(array.dtype, &array.shape, &bytes)) == TRTXPY_OK && bytes == array.bytes);
        for (size_t j = 0; j < bytes; j += 61) touched ^= ((const unsigned char *)array.data)[j];
        if (bytes) touched ^= ((const unsigned char *)array.data)[bytes - 1];
    }
    MUST(DO(trtxpy_results_get(results, count, &(trtxpy_array)TRTXPY_ARRAY_INIT)) != TRTXPY_OK);
    MUST(DO(trtxpy_results_destroy(results)) == TRTXPY_OK);
}

/* One call, with inputs as the graph has them, but for what the control spoils. */
static void run(const opened *o, fuzz_input *control, const void *model, size_t bytes, const void *weights, size_t weights_bytes,
                const trtxpy_graph_options *options) {
    trtxpy_array arrays[MOST_PORTS];
    void *data[MOST_PORTS] = {0};
    uint8_t spoil = fuzz_byte(control);
    for (size_t i = 0; i < o->counts[0]; i++) {
        const port_facts *port = &o->ports[0][i];
        data[i] = malloc(port->bytes);
        memset(data[i], spoil & 128 ? 0x5A : 1, port->bytes);
        arrays[i] = (trtxpy_array){sizeof *arrays, port->info.name, port->info.dtype, 0, port->shape, data[i], port->bytes};
    }
    if (o->counts[0]) {
        trtxpy_array *victim = &arrays[spoil % o->counts[0]];
        if ((spoil & 0x70) == 0x10) victim->dtype = (trtxpy_dtype)(fuzz_byte(control) % 20);
        if ((spoil & 0x70) == 0x20) victim->shape.rank = fuzz_byte(control) % 10;
        if ((spoil & 0x70) == 0x30) victim->name = "\xC3\x28";
        if ((spoil & 0x70) == 0x40) victim->bytes ^= 1;
        if ((spoil & 0x70) == 0x60) victim->name = arrays[0].name;
        if ((spoil & 0x70) == 0x10 || (spoil & 0x70) == 0x20) { /* as many bytes as that would be */
            size_t needed;
            if (trtxpy_dtype_bytes(victim->dtype, &victim->shape, &needed) == TRTXPY_OK && needed <= victim->bytes) victim->bytes = needed;
        }
    }
    size_t count = o->counts[0] - ((spoil & 0x70) == 0x50 && o->counts[0] ? 1 : 0);
    trtxpy_results results;
    trtxpy_status status = DO(trtxpy_run(fuzz_context, model, bytes, weights, weights_bytes, arrays, count, options, &results));
    MUST((status == TRTXPY_OK) == (results != NULL));
    if (status == TRTXPY_OK) read_results(results);
    for (size_t i = 0; i < o->counts[0]; i++) free(data[i]);
}

void fuzz_use_model(const uint8_t *unit, size_t size, bool plan) {
    if (size < FUZZ_CONTROL) return;
    size_t before = fuzz_live();
    fuzz_input control = {unit + size - FUZZ_CONTROL, FUZZ_CONTROL};
    uint8_t mode = fuzz_byte(&control);
    size_t bytes = size - FUZZ_CONTROL, weights_bytes = fuzz_byte(&control);
    choices made;
    choose(&control, &made, plan);
    const trtxpy_graph_options *options = made.defaults ? NULL : &made.options;
    /* On the heap and of just this size: reading past the end is seen. */
    if (plan || weights_bytes > bytes) weights_bytes = 0;
    bytes -= weights_bytes;
    uint8_t *model = malloc(bytes ? bytes : 1), *weights = weights_bytes ? malloc(weights_bytes) : NULL;
    memcpy(model, unit, bytes);
    if (weights) memcpy(weights, unit + bytes, weights_bytes);
    if (mode % 4 == 2) {
        trtxpy_results results;
        if (DO(trtxpy_run_zeroed(fuzz_context, model, bytes, weights, weights_bytes, options, &results)) == TRTXPY_OK) read_results(results);
        else MUST(!results);
    } else {
        opened o = {0};
        trtxpy_status status = mode % 4 == 3 ? DO(trtxpy_graph_from_file(fuzz_context, fuzz_write_file(model, bytes), options, &o.graph))
                               : plan        ? DO(trtxpy_graph_from_plan(fuzz_context, model, bytes, options, &o.graph))
                                      : DO(trtxpy_graph_from_onnx(fuzz_context, model, bytes, weights, weights_bytes, options, &o.graph));
        MUST((status == TRTXPY_OK) == (o.graph != NULL));
        if (status == TRTXPY_OK) {
            look(&o, &control);
            if (is_small(&o, TRTXPY_INPUT)) {
                if (mode % 4 == 1) run(&o, &control, model, bytes, weights, weights_bytes, options);
                else dispatch(&o, &control);
            }
            if (mode & 64) use_plan(&o);
            MUST(DO(trtxpy_graph_destroy(o.graph)) == TRTXPY_OK);
        }
    }
    free(model);
    free(weights);
    fuzz_nothing_left(before);
}
