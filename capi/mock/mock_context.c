/* The way into every call: the thread's selected instance and current context, sticky errors, faults. Devices, contexts.
 *
 * The stack of current contexts, the selected instance, the site and the last reason belong to each thread. They hold
 * handles, not pointers: what outlives its instance is simply invalid.
 */
#include "mock_internal.h"

#include <stdio.h>

static _Thread_local CUcontext contexts[MOCK_CONTEXT_DEPTH];
static _Thread_local int depth;
static _Thread_local void *selected;
static _Thread_local char reason[MOCK_DETAIL + 256];
static _Thread_local const char *reason_call = "";
static _Thread_local CUresult reason_code;
static _Thread_local char site[MOCK_SITE];

void trtx_mock_select(trtx_mock *mock) { selected = mock ? mock_handle(mock->slot) : NULL; }

trtx_mock *mock_selected(void) {
    mock_slot *slot = selected ? mock_slot_find(selected, KIND_MOCK) : NULL;
    return slot ? atomic_load_explicit(&slot->mock, memory_order_acquire) : NULL;
}

const char *trtx_mock_detail(void) {
    static _Thread_local char whole[sizeof reason + 64];
    snprintf(whole, sizeof whole, "%s%s%s", reason_call, *reason_call ? ": " : "", reason);
    return whole;
}

const char *trtx_mock_reason(const char **call, CUresult *code) {
    *call = reason_call;
    *code = reason_code;
    return reason;
}

void trtx_mock_site(const char *where) {
    size_t length = where ? strlen(where) : 0;
    /* the end says more than the beginning: it has the line */
    snprintf(site, sizeof site, "%s%s", length < sizeof site ? "" : "...",
             length < sizeof site ? (where ? where : "") : where + length - (sizeof site - 4));
}

void mock_copy_site(char *to) { snprintf(to, MOCK_SITE, "%s", site[0] ? site : "an unnamed place"); }

CUresult mock_fail(const mock_scope *scope, CUresult code, const char *format, ...) {
    va_list arguments;
    reason_call = mock_call_name(scope->call);
    reason_code = code;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    return code;
}

static mock_device *device_of_context(CUcontext context) {
    mock_slot *slot = mock_slot_find(context, KIND_CONTEXT);
    return slot ? atomic_load_explicit(&slot->object, memory_order_acquire) : NULL;
}

/* Contexts of instances that are gone do not count: nobody can pop them any more. */
mock_device *mock_current_device(void) {
    while (depth) {
        mock_device *device = device_of_context(contexts[depth - 1]);
        if (device)
            return device;
        depth--;
    }
    return NULL;
}

CUcontext mock_top_context(void) { return mock_current_device() ? contexts[depth - 1] : NULL; }

CUresult mock_push_context(CUcontext context) {
    if (depth == MOCK_CONTEXT_DEPTH)
        return CUDA_ERROR_OUT_OF_MEMORY;
    contexts[depth++] = context;
    return CUDA_SUCCESS;
}

void mock_pop_context(void) { depth--; }

void mock_forget_contexts(const trtx_mock *mock) {
    int kept = 0;
    for (int i = 0; i < depth; i++) {
        mock_device *device = device_of_context(contexts[i]);
        if (device && device->mock != mock)
            contexts[kept++] = contexts[i];
    }
    depth = kept;
}

CUresult mock_healthy(mock_scope *scope) {
    CUresult fault = atomic_load_explicit(&scope->device->fault, memory_order_acquire);
    if (!fault)
        return CUDA_SUCCESS;
    char detail[MOCK_DETAIL];
    mock_lock(scope->mock);
    memcpy(detail, scope->device->fault_detail, sizeof detail);
    mock_unlock(scope->mock);
    return mock_fail(scope, fault, "%s; device %d's context is unusable until its primary context is released by all "
                     "owners and retained again", detail, scope->device->ordinal);
}

/* `ordinal`: the device that is the call's argument; -1: the current one. */
static CUresult enter_on(mock_scope *scope, mock_call call, int needs, int ordinal) {
    mock_device *device = mock_current_device();
    trtx_mock *mock = device && (needs & ENTER_CONTEXT) ? device->mock : mock_selected();
    if (!mock && device)
        mock = device->mock;
    *scope = (mock_scope){.call = call, .mock = mock, .device = device};
    if (!mock)
        return mock_fail(scope, needs & ENTER_CONTEXT ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_NO_DEVICE,
                         "no context is current in this thread, and no mock is selected");
    if (ordinal < 0 && device && device->mock == mock)
        ordinal = device->ordinal;
    mock_outcome outcome = mock_faults_enter(mock->faults, call, ordinal);
    mock_sleep(mock, outcome.delay_ns);
    if ((needs & ENTER_INITIALIZED) && !atomic_load_explicit(&mock->initialized, memory_order_relaxed))
        return mock_fail(scope, CUDA_ERROR_NOT_INITIALIZED, "call cuInit(0) first");
    if (needs & ENTER_CONTEXT) {
        if (!device)
            return mock_fail(scope, CUDA_ERROR_INVALID_CONTEXT, "no context is current in this thread; push one");
        if (atomic_load_explicit(&device->retained, memory_order_acquire) == 0)
            return mock_fail(scope, CUDA_ERROR_INVALID_CONTEXT, "the primary context of device %d was released",
                             device->ordinal);
        scope->sticky = mock_healthy(scope);
        if (scope->sticky && !(needs & ENTER_CLEANUP))
            return scope->sticky;
    }
    if (outcome.error && !scope->sticky) {
        if (device && device->mock == mock && (outcome.lose_device || mock_is_sticky(outcome.error))) {
            char detail[MOCK_DETAIL / 2];
            snprintf(detail, sizeof detail, "fault injected into call %llu of %s", (unsigned long long)outcome.number,
                     mock_call_name(call));
            mock_lock(mock);
            mock_lose(device, outcome.error, detail, outcome.lose_process);
            mock_unlock(mock);
        }
        return mock_fail(scope, outcome.error, "fault injected into call %llu of %s", (unsigned long long)outcome.number,
                         mock_call_name(call));
    }
    if (needs & ENTER_UNPERMITTED) {
        CUresult code = mock_capture_guard(mock);
        if (code)
            return mock_fail(scope, code, "not permitted while a capture is under way, which is invalid now");
    }
    return CUDA_SUCCESS;
}

CUresult mock_enter(mock_scope *scope, mock_call call, int needs) { return enter_on(scope, call, needs, -1); }

CUresult mock_enter_with(mock_scope *scope, mock_call call, const void *handle, mock_kind kind, int needs) {
    mock_slot *slot = mock_slot_find(handle, kind);
    trtx_mock *owner = slot ? atomic_load_explicit(&slot->mock, memory_order_acquire) : NULL;
    mock_device *device = mock_current_device();
    void *before = selected;
    if (kind != KIND_CONTEXT && device)
        selected = mock_handle(device->mock->slot); /* another instance's handle is invalid here */
    else if (owner)
        selected = mock_handle(owner->slot);
    CUresult code = mock_enter(scope, call, needs);
    selected = before;
    return code;
}

/* ---- for the code above the driver ---- */

CUresult trtx_mock_current(trtx_mock *mock, int *ordinal) {
    mock_device *device = mock_current_device();
    mock_scope scope = {.call = CALL_execute, .mock = mock, .device = device};
    *ordinal = -1;
    if (!device || device->mock != mock)
        return mock_fail(&scope, CUDA_ERROR_INVALID_CONTEXT, "no context is current in this thread; call cuCtxPushCurrent");
    if (atomic_load(&device->retained) == 0)
        return mock_fail(&scope, CUDA_ERROR_INVALID_CONTEXT, "the primary context of device %d was released", device->ordinal);
    *ordinal = device->ordinal;
    return mock_healthy(&scope);
}

void mock_lose(mock_device *device, CUresult code, const char *detail, bool process) {
    trtx_mock *mock = device->mock;
    for (int i = 0; i < mock->device_count; i++)
        if (process || &mock->devices[i] == device)
            mock_device_fail(&mock->devices[i], code, detail);
    if (process && !mock->broken)
        mock->broken = code;
}

void trtx_mock_lose(trtx_mock *mock, CUresult error, const char *detail) {
    mock_device *device = mock_current_device();
    if (!device || device->mock != mock)
        return;
    mock_lock(mock);
    mock_device_fail(device, error, detail);
    mock_unlock(mock);
}

/* ---- devices ---- */

static mock_device *device_at(const mock_scope *scope, int ordinal, CUresult *code) {
    if (ordinal >= 0 && ordinal < scope->mock->device_count)
        return &scope->mock->devices[ordinal];
    *code = mock_fail(scope, CUDA_ERROR_INVALID_DEVICE, "device %d; there are %d", ordinal, scope->mock->device_count);
    return NULL;
}

CUresult mock_cuInit(unsigned flags) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuInit, 0);
    if (code)
        return code;
    if (flags)
        return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "flags is %u, and must be 0", flags);
    if (scope.mock->device_count == 0)
        return mock_fail(&scope, CUDA_ERROR_NO_DEVICE, "this mock was made with devices=0");
    atomic_store(&scope.mock->initialized, 1);
    return CUDA_SUCCESS;
}

CUresult mock_cuDriverGetVersion(int *version) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuDriverGetVersion, 0);
    if (code && scope.mock)
        return code;
    if (!version)
        return CUDA_ERROR_INVALID_VALUE;
    *version = 12080;
    return CUDA_SUCCESS;
}

CUresult mock_cuDeviceGetCount(int *count) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuDeviceGetCount, ENTER_INITIALIZED);
    if (code)
        return code;
    if (!count)
        return CUDA_ERROR_INVALID_VALUE;
    *count = scope.mock->device_count;
    return CUDA_SUCCESS;
}

CUresult mock_cuDeviceGet(CUdevice *device, int ordinal) {
    mock_scope scope;
    CUresult code = mock_enter(&scope, CALL_cuDeviceGet, ENTER_INITIALIZED);
    if (code)
        return code;
    if (!device)
        return CUDA_ERROR_INVALID_VALUE;
    if (device_at(&scope, ordinal, &code))
        *device = ordinal;
    return code;
}

CUresult mock_cuDeviceGetName(char *name, int length, CUdevice device) {
    mock_scope scope;
    CUresult code = enter_on(&scope, CALL_cuDeviceGetName, ENTER_INITIALIZED, device);
    if (code)
        return code;
    if (!name || length <= 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (device_at(&scope, device, &code))
        snprintf(name, (size_t)length, "Mock GPU %d", device);
    return code;
}

CUresult mock_cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    mock_scope scope;
    CUresult code = enter_on(&scope, CALL_cuDeviceTotalMem, ENTER_INITIALIZED, device);
    if (code)
        return code;
    if (!bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (device_at(&scope, device, &code))
        *bytes = scope.mock->options.memory_bytes;
    return code;
}

/* "Mock", and the ordinal at its end. */
CUresult mock_cuDeviceGetUuid(unsigned char *uuid, CUdevice device) {
    mock_scope scope;
    CUresult code = enter_on(&scope, CALL_cuDeviceGetUuid, ENTER_INITIALIZED, device);
    if (code)
        return code;
    if (!uuid)
        return CUDA_ERROR_INVALID_VALUE;
    if (device_at(&scope, device, &code)) {
        memset(uuid, 0, 16);
        memcpy(uuid, "Mock", 4);
        uuid[15] = (unsigned char)device;
    }
    return code;
}

CUresult mock_cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    static const int known[][2] = {{1, 1024}, {10, 32}, {16, 64}, {31, 1}, {34, 0}, {40, 2}, {41, 1}, {50, 0}, {115, 1}, {134, -1}};
    mock_scope scope;
    CUresult code = enter_on(&scope, CALL_cuDeviceGetAttribute, ENTER_INITIALIZED, device);
    if (code)
        return code;
    if (!value)
        return CUDA_ERROR_INVALID_VALUE;
    if (!device_at(&scope, device, &code))
        return code;
    if (attribute == 75 || attribute == 76) {
        const trtx_mock_options *options = &scope.mock->options;
        *value = attribute == 75 ? options->compute_capability_major : options->compute_capability_minor;
        return CUDA_SUCCESS;
    }
    if (attribute == 33) { /* PCI bus; 34 and 50, device and domain, are 0 */
        *value = device + 1;
        return CUDA_SUCCESS;
    }
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (known[i][0] == attribute) {
            *value = known[i][1];
            return CUDA_SUCCESS;
        }
    }
    return mock_fail(&scope, CUDA_ERROR_INVALID_VALUE, "the mock does not know attribute %d", attribute);
}

/* ---- contexts ---- */

CUresult mock_cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice ordinal) {
    mock_scope scope;
    CUresult code = enter_on(&scope, CALL_cuDevicePrimaryCtxRetain, ENTER_INITIALIZED, ordinal);
    if (code)
        return code;
    mock_device *device = device_at(&scope, ordinal, &code);
    if (!device || !context)
        return device ? CUDA_ERROR_INVALID_VALUE : code;
    mock_lock(scope.mock);
    if (scope.mock->broken) {
        mock_unlock(scope.mock);
        return mock_fail(&scope, scope.mock->broken, "a kernel broke this process's work on all devices; start a new process");
    }
    if (atomic_load(&device->retained) == 0) {
        atomic_store(&device->fault, CUDA_SUCCESS);
        device->fault_detail[0] = 0;
    }
    atomic_fetch_add(&device->retained, 1);
    *context = (CUcontext)mock_handle(device->slot);
    mock_unlock(scope.mock);
    return CUDA_SUCCESS;
}

CUresult mock_cuDevicePrimaryCtxRelease(CUdevice ordinal) {
    mock_scope scope;
    CUresult code = enter_on(&scope, CALL_cuDevicePrimaryCtxRelease, ENTER_INITIALIZED, ordinal);
    if (code)
        return code;
    mock_device *device = device_at(&scope, ordinal, &code);
    if (!device)
        return code;
    mock_lock(scope.mock);
    int retained = atomic_load(&device->retained);
    if (retained)
        atomic_store(&device->retained, retained - 1);
    mock_unlock(scope.mock);
    if (retained == 0)
        return mock_fail(&scope, CUDA_ERROR_INVALID_CONTEXT, "device %d is not retained", ordinal);
    if (retained == 1)
        mock_device_end(device, &scope.mock->lost);
    return CUDA_SUCCESS;
}

static CUresult check_context(const mock_scope *scope, CUcontext context) {
    mock_device *device = device_of_context(context);
    if (device && atomic_load(&device->retained))
        return CUDA_SUCCESS;
    return mock_fail(scope, CUDA_ERROR_INVALID_CONTEXT, "%p is no live context; retain a primary context first",
                     (void *)context);
}

static CUresult enter_with(mock_scope *scope, mock_call call, CUcontext context) {
    CUresult code = mock_enter_with(scope, call, context, KIND_CONTEXT, ENTER_INITIALIZED);
    return code == CUDA_ERROR_NO_DEVICE && !scope->mock ? CUDA_ERROR_INVALID_CONTEXT : code;
}

CUresult mock_cuCtxPushCurrent(CUcontext context) {
    mock_scope scope;
    CUresult code = enter_with(&scope, CALL_cuCtxPushCurrent, context);
    if (!code)
        code = check_context(&scope, context);
    if (code)
        return code;
    if (depth == MOCK_CONTEXT_DEPTH)
        return mock_fail(&scope, CUDA_ERROR_OUT_OF_MEMORY, "%d contexts are pushed already", depth);
    contexts[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult mock_cuCtxPopCurrent(CUcontext *context) {
    mock_scope scope;
    CUresult code = enter_with(&scope, CALL_cuCtxPopCurrent, mock_top_context());
    if (code)
        return code;
    if (depth == 0)
        return mock_fail(&scope, CUDA_ERROR_INVALID_CONTEXT, "no context is current in this thread");
    depth--;
    if (context)
        *context = contexts[depth];
    return CUDA_SUCCESS;
}

CUresult mock_cuCtxGetCurrent(CUcontext *context) {
    mock_scope scope;
    CUresult code = enter_with(&scope, CALL_cuCtxGetCurrent, mock_top_context());
    if (code && scope.mock)
        return code;
    if (!context)
        return CUDA_ERROR_INVALID_VALUE;
    *context = mock_top_context();
    return CUDA_SUCCESS;
}

CUresult mock_cuCtxSetCurrent(CUcontext context) {
    mock_scope scope;
    CUresult code = enter_with(&scope, CALL_cuCtxSetCurrent, context ? context : mock_top_context());
    if (code && (scope.mock || context))
        return code;
    if (!context) {
        depth -= depth > 0;
        return CUDA_SUCCESS;
    }
    code = check_context(&scope, context);
    if (code)
        return code;
    contexts[depth ? depth - 1 : depth++] = context;
    return CUDA_SUCCESS;
}
