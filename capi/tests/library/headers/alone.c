/* The header needs nothing before it, and can be included twice. */
#include "trtxpy.h"
#include "trtxpy.h"

/* What a caller does with it must be as free of warnings as the header. */
trtxpy_status trtxpy_header_test(trtxpy_context *context, const char **name);

trtxpy_status trtxpy_header_test(trtxpy_context *context, const char **name) {
    trtxpy_init_options init = TRTXPY_INIT_OPTIONS_INIT;
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    trtxpy_context_info info = TRTXPY_CONTEXT_INFO_INIT;
    trtxpy_context_statistics context_statistics = TRTXPY_CONTEXT_STATISTICS_INIT;
    trtxpy_graph_options graph = TRTXPY_GRAPH_OPTIONS_INIT;
    trtxpy_tensor_info tensor = TRTXPY_TENSOR_INFO_INIT;
    trtxpy_graph_statistics graph_statistics = TRTXPY_GRAPH_STATISTICS_INIT;
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    trtxpy_dispatch_options dispatch = TRTXPY_DISPATCH_OPTIONS_INIT;
    trtxpy_submit_options submit = TRTXPY_SUBMIT_OPTIONS_INIT;
    trtxpy_array array = TRTXPY_ARRAY_INIT;
    size_t sizes = init.struct_size + options.struct_size + info.struct_size + context_statistics.struct_size +
                   graph.struct_size + tensor.struct_size + graph_statistics.struct_size + desc.struct_size +
                   dispatch.struct_size + submit.struct_size + array.struct_size;
    trtxpy_status status = sizes ? trtxpy_init(&init) : TRTXPY_INTERNAL;
    *name = trtxpy_status_name(status);
    return status == TRTXPY_OK ? trtxpy_context_create(&options, context) : status;
}
