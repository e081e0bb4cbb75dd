/* The kernel of an engine that computes nothing: it touches all the memory that a real one would, checks it, and leaves
 * zeros. Also the stamps by which kernels find that their execution context was set otherwise meanwhile.
 *
 * Kernels run on streams' threads, or on the launching one; they take no lock but the memory's.
 */
#include "mock_internal.h"

#include <stdio.h>

enum { TOUCHED = 256, SCRATCH_BYTE = 0xEE, POISON_BYTE = 0xCB };

struct trtx_mock_stamp {
    _Atomic int references;
    _Atomic uint64_t value;
};

trtx_mock_stamp *trtx_mock_stamp_create(uint64_t value) {
    trtx_mock_stamp *stamp = calloc(1, sizeof *stamp);
    if (stamp) {
        atomic_store(&stamp->references, 1);
        atomic_store(&stamp->value, value);
    }
    return stamp;
}

trtx_mock_stamp *trtx_mock_stamp_reference(trtx_mock_stamp *stamp) {
    if (stamp)
        atomic_fetch_add(&stamp->references, 1);
    return stamp;
}

void trtx_mock_stamp_release(trtx_mock_stamp *stamp) {
    if (stamp && atomic_fetch_sub(&stamp->references, 1) == 1)
        free(stamp);
}

uint64_t trtx_mock_stamp_get(const trtx_mock_stamp *stamp) {
    return atomic_load(&((trtx_mock_stamp *)(uintptr_t)stamp)->value);
}

void trtx_mock_stamp_set(trtx_mock_stamp *stamp, uint64_t value) { atomic_store(&stamp->value, value); }

void trtx_mock_stamp_renew(trtx_mock_stamp *stamp, uint64_t value) {
    uint64_t found = atomic_load(&stamp->value);
    while (found != TRTX_MOCK_ENDED && !atomic_compare_exchange_weak(&stamp->value, &found, value)) {
    }
}

/* ---- the kernel ---- */

/* One allocation with all it needs: spans and names behind it. */
typedef struct blank {
    trtx_mock *mock;
    trtx_mock_blank what;
    atomic_flag blamed;
    trtx_mock_span spans[];
} blank;

static void release_blank(void *userdata) {
    blank *kernel = userdata;
    trtx_mock_stamp_release(kernel->what.stamp);
    free(kernel);
}

/* Check a span, and fill its first `count` bytes unless `value` is negative. */
static CUresult touch(const blank *kernel, const trtx_mock_span *span, const char *role, int value, size_t count) {
    char why[MOCK_DETAIL] = "", text[MOCK_DETAIL + 256];
    mock_bytes bytes = {0};
    if (span->bytes == 0)
        return CUDA_SUCCESS;
    CUresult code = mock_device_bytes(kernel->mock->memory, span->address, span->bytes, value < 0 ? NULL : &bytes, why);
    if (code == CUDA_SUCCESS) {
        if (value >= 0)
            memset(bytes.data, value, count < span->bytes ? count : span->bytes);
        mock_bytes_release(kernel->mock->memory, &bytes);
        return CUDA_SUCCESS;
    }
    if (*span->name)
        snprintf(text, sizeof text, "kernel of %s, %s '%s': %s", kernel->what.name, role, span->name, why);
    else
        snprintf(text, sizeof text, "kernel of %s, %s: %s", kernel->what.name, role, why);
    trtx_mock_explain(text);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

/* Whether the execution context is still set as it was when this was captured. */
static bool settings_hold(blank *kernel) {
    const trtx_mock_blank *what = &kernel->what;
    if (!what->stamp)
        return true;
    if (!what->captured) {
        trtx_mock_stamp_renew(what->stamp, what->value);
        return true;
    }
    uint64_t found = trtx_mock_stamp_get(what->stamp);
    if (found == what->value)
        return true;
    if (!atomic_flag_test_and_set(&kernel->blamed)) {
        char text[MOCK_DETAIL];
        snprintf(text, sizeof text, "a graph was replayed whose %s was %s after the capture: use one context for each graph",
                 what->name, found == TRTX_MOCK_ENDED ? "destroyed" : "enqueued with other settings");
        trtx_mock_blame(kernel->mock, text);
    }
    return false;
}

static CUresult run_blank(void *userdata) {
    blank *kernel = userdata;
    const trtx_mock_blank *what = &kernel->what;
    CUresult code = touch(kernel, &what->scratch, "activation memory", SCRATCH_BYTE, TOUCHED);
    int value = !code && settings_hold(kernel) ? 0 : POISON_BYTE;
    for (size_t i = 0; i < what->input_count && !code; i++)
        code = touch(kernel, &what->inputs[i], "input", -1, 0);
    for (size_t i = 0; i < what->output_count && !code; i++)
        code = touch(kernel, &what->outputs[i], "output", value, SIZE_MAX);
    return code;
}

CUresult trtx_mock_enqueue_blank(trtx_mock *mock, CUstream stream, uint64_t duration_ns, trtx_mock_region *region,
                                 const trtx_mock_blank *what, trtx_mock_position *position) {
    size_t count = what->input_count + what->output_count, text = strlen(what->name) + 1;
    for (size_t i = 0; i < count; i++)
        text += strlen((i < what->input_count ? what->inputs[i] : what->outputs[i - what->input_count]).name) + 1;
    blank *kernel = calloc(1, sizeof *kernel + count * sizeof kernel->spans[0] + text);
    if (!kernel)
        return CUDA_ERROR_OUT_OF_MEMORY;
    kernel->mock = mock;
    kernel->what = *what;
    kernel->what.inputs = kernel->spans;
    kernel->what.outputs = kernel->spans + what->input_count;
    kernel->what.scratch.name = "";
    trtx_mock_stamp_reference(what->stamp);
    atomic_flag_clear(&kernel->blamed);
    char *end = (char *)(kernel->spans + count);
    kernel->what.name = strcpy(end, what->name);
    for (size_t i = 0; i < count; i++) {
        end += strlen(end) + 1;
        kernel->spans[i] = i < what->input_count ? what->inputs[i] : what->outputs[i - what->input_count];
        kernel->spans[i].name = strcpy(end, kernel->spans[i].name);
    }
    trtx_mock_task task = {.duration_ns = duration_ns, .run = run_blank, .userdata = kernel, .release = release_blank,
                           .region = region};
    return trtx_mock_enqueue(stream, &task, position);
}
