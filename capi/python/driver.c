/* The CUDA driver for Python: class Driver, one method for each function of a trtx_cuda_api.
 *
 * Handles and pointers are integers. The GIL is released around what may block or take long (whatever enqueues may find the
 * queue full); queries and the context stack take tens of nanoseconds, and giving the GIL away can cost 5 ms. Every call is
 * made on the thread that asked: the driver keeps the context stack and the capture mode for each thread.
 */
#include "native.h"

#include <limits.h>
#include <stdbool.h>
#include <string.h>

typedef struct driver {
    PyObject_HEAD
    const trtx_cuda_api *api; /* borrowed from the capsule */
    PyObject *capsule;
} driver;

enum { DEVICE_NAME_BYTES = 256, DEVICE_UUID_BYTES = 16, PARAMETERS = 4 };

/* ---- arguments ---- */

typedef enum parameter_kind { WORD, UNSIGNED, INTEGER, BYTE } parameter_kind;

typedef struct parameter {
    const char *name;
    parameter_kind kind;
} parameter;

typedef struct values {
    uint64_t word[PARAMETERS];
} values;

static bool out_of_range(const char *call, const parameter *wanted, PyObject *given) {
    static const char *const ranges[] = {"0 to 2**64-1", "0 to 2**32-1", "-2**31 to 2**31-1", "0 to 255"};
    if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_OverflowError, "%s(): %s must be %s, not %S", call, wanted->name, ranges[wanted->kind], given);
    }
    return false;
}

static bool take_integer(const char *call, const parameter *wanted, PyObject *integer, uint64_t *value) {
    if (wanted->kind == INTEGER) {
        long number = PyLong_AsLong(integer);
        if ((number == -1 && PyErr_Occurred()) || number < INT_MIN || number > INT_MAX)
            return out_of_range(call, wanted, integer);
        *value = (uint64_t)number;
        return true;
    }
    unsigned long long number = PyLong_AsUnsignedLongLong(integer);
    if (number == ULLONG_MAX && PyErr_Occurred()) return out_of_range(call, wanted, integer);
    if ((wanted->kind == UNSIGNED && number > UINT_MAX) || (wanted->kind == BYTE && number > UCHAR_MAX))
        return out_of_range(call, wanted, integer);
    *value = number;
    return true;
}

static bool take_any(const char *call, const parameter *wanted, PyObject *given, uint64_t *value) {
    PyObject *integer = PyNumber_Index(given); /* numpy's integers, say */
    if (!integer) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s(): %s must be int, not %.100s", call, wanted->name, Py_TYPE(given)->tp_name);
        }
        return false;
    }
    bool ok = take_integer(call, wanted, integer, value);
    Py_DECREF(integer);
    return ok;
}

/* `wanted` ends with a nameless entry and has `count` others. */
static inline bool take(driver *self, const char *call, const parameter *wanted, Py_ssize_t count, PyObject *const *given,
                        Py_ssize_t given_count, values *into) {
    if (!self->api) {
        PyErr_Format(PyExc_RuntimeError, "%s(): the driver has no function table; Driver.__init__ was not called", call);
        return false;
    }
    if (given_count != count) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, not %zd", call, count, given_count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        bool ok = PyLong_CheckExact(given[i]) ? take_integer(call, &wanted[i], given[i], &into->word[i])
                                              : take_any(call, &wanted[i], given[i], &into->word[i]);
        if (!ok) return false;
    }
    return true;
}

/* ---- errors ---- */

/* Raises what self._error(call, code) returns. Always NULL. */
static PyObject *fail(driver *self, const char *call, CUresult code) {
    PyObject *error = PyObject_CallMethod((PyObject *)self, "_error", "si", call, (int)code);
    if (!error) return NULL;
    if (PyExceptionInstance_Check(error)) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    } else {
        PyErr_Format(PyExc_TypeError, "%s._error() must return an exception, not %.100s", Py_TYPE(self)->tp_name,
                     Py_TYPE(error)->tp_name);
    }
    Py_DECREF(error);
    return NULL;
}

/* What the driver calls a status and says about it; for one that it does not know, its number and nothing. */
static void describe(driver *self, int code, char *name, size_t room, const char **detail) {
    const char *found = NULL;
    *detail = NULL;
    if (self->api && self->api->cuGetErrorName((CUresult)code, &found) == CUDA_SUCCESS && found) {
        snprintf(name, room, "%s", found);
        if (self->api->cuGetErrorString((CUresult)code, detail) != CUDA_SUCCESS) *detail = NULL;
    } else {
        snprintf(name, room, "CUresult %d", code);
    }
    if (!*detail) *detail = "";
}

static PyObject *driver_error(PyObject *object, PyObject *args) {
    const char *call, *detail;
    int code;
    char name[128];
    if (!PyArg_ParseTuple(args, "si:_error", &call, &code)) return NULL;
    describe((driver *)object, code, name, sizeof name, &detail);
    PyObject *module = PyImport_ImportModule("trtx_py._errors");
    if (!module) return NULL;
    PyObject *error = PyObject_CallMethod(module, "CudaError", "isss", code, name, call, detail);
    Py_DECREF(module);
    return error;
}

/* ---- the driver's functions ----
 *
 * FUNCTION(call, {parameters}) opens a method; in it `api` is the table, W(i) the i-th argument, `status` what it returns.
 * HOLDING and RELEASING make the call, GIVE ends the method with a value for CUDA_SUCCESS. */

#define FUNCTION(call, ...)                                                                                            \
    static PyObject *driver_##call(PyObject *object, PyObject *const *given, Py_ssize_t count) {                      \
        static const char called[] = #call;                                                                            \
        static const parameter wanted[] = {__VA_ARGS__{NULL, WORD}};                                                   \
        driver *self = (driver *)object;                                                                               \
        values into;                                                                                                   \
        (void)into;                                                                                                    \
        CUresult status;                                                                                               \
        if (!take(self, called, wanted, (Py_ssize_t)(sizeof wanted / sizeof wanted[0]) - 1, given, count, &into))      \
            return NULL;                                                                                               \
        const trtx_cuda_api *api = self->api;
#define HOLDING(expression) status = (expression);
#define RELEASING(expression)                                                                                          \
    Py_BEGIN_ALLOW_THREADS                                                                                             \
    status = (expression);                                                                                             \
    Py_END_ALLOW_THREADS
#define GIVE(value)                                                                                                    \
    if (status != CUDA_SUCCESS) return fail(self, called, status);                                                     \
    return value;                                                                                                      \
    }
#define GIVE_NOTHING GIVE(Py_NewRef(Py_None))
#define GIVE_STATUS                                                                                                    \
    if (status != CUDA_SUCCESS && status != CUDA_ERROR_NOT_READY) return fail(self, called, status);                   \
    return PyLong_FromLong(status);                                                                                    \
    }
#define P(name, kind) {name, kind},
#define W(i) into.word[i]
#define STREAM(i) ((CUstream)(uintptr_t)W(i))
#define EVENT(i) ((CUevent)(uintptr_t)W(i))
#define HOST(i) ((void *)(uintptr_t)W(i))
#define GIVE_HANDLE(handle) GIVE(PyLong_FromUnsignedLongLong((unsigned long long)(uintptr_t)(handle)))

#if PY_VERSION_HEX < 0x030A0000
#error "CPython 3.10 or newer is needed"
#endif

FUNCTION(cuInit, P("flags", UNSIGNED))
    RELEASING(api->cuInit((unsigned)W(0)))
GIVE_NOTHING

FUNCTION(cuDriverGetVersion)
    int version = 0;
    HOLDING(api->cuDriverGetVersion(&version))
GIVE(PyLong_FromLong(version))

FUNCTION(cuDeviceGetCount)
    int number = 0;
    HOLDING(api->cuDeviceGetCount(&number))
GIVE(PyLong_FromLong(number))

FUNCTION(cuDeviceGet, P("ordinal", INTEGER))
    CUdevice device = 0;
    HOLDING(api->cuDeviceGet(&device, (int)W(0)))
GIVE(PyLong_FromLong(device))

FUNCTION(cuDeviceGetName, P("device", INTEGER))
    char name[DEVICE_NAME_BYTES] = "";
    HOLDING(api->cuDeviceGetName(name, (int)sizeof name, (CUdevice)W(0)))
GIVE(PyUnicode_DecodeUTF8(name, (Py_ssize_t)strnlen(name, sizeof name), "replace"))

FUNCTION(cuDeviceTotalMem, P("device", INTEGER))
    size_t bytes = 0;
    HOLDING(api->cuDeviceTotalMem(&bytes, (CUdevice)W(0)))
GIVE(PyLong_FromSize_t(bytes))

FUNCTION(cuDeviceGetAttribute, P("attribute", INTEGER) P("device", INTEGER))
    int value = 0;
    HOLDING(api->cuDeviceGetAttribute(&value, (int)W(0), (CUdevice)W(1)))
GIVE(PyLong_FromLong(value))

FUNCTION(cuDeviceGetUuid, P("device", INTEGER))
    unsigned char uuid[DEVICE_UUID_BYTES] = {0};
    HOLDING(api->cuDeviceGetUuid(uuid, (CUdevice)W(0)))
GIVE(PyBytes_FromStringAndSize((const char *)uuid, sizeof uuid))

FUNCTION(cuDevicePrimaryCtxRetain, P("device", INTEGER))
    CUcontext context = NULL;
    RELEASING(api->cuDevicePrimaryCtxRetain(&context, (CUdevice)W(0)))
GIVE_HANDLE(context)

FUNCTION(cuDevicePrimaryCtxRelease, P("device", INTEGER))
    RELEASING(api->cuDevicePrimaryCtxRelease((CUdevice)W(0)))
GIVE_NOTHING

FUNCTION(cuCtxPushCurrent, P("context", WORD))
    HOLDING(api->cuCtxPushCurrent((CUcontext)(uintptr_t)W(0)))
GIVE_NOTHING

FUNCTION(cuCtxPopCurrent)
    CUcontext context = NULL;
    HOLDING(api->cuCtxPopCurrent(&context))
GIVE_HANDLE(context)

FUNCTION(cuCtxGetCurrent)
    CUcontext context = NULL;
    HOLDING(api->cuCtxGetCurrent(&context))
GIVE_HANDLE(context)

FUNCTION(cuMemGetInfo)
    size_t free_bytes = 0, total_bytes = 0;
    RELEASING(api->cuMemGetInfo(&free_bytes, &total_bytes))
GIVE(Py_BuildValue("KK", (unsigned long long)free_bytes, (unsigned long long)total_bytes))

FUNCTION(cuMemAlloc, P("bytesize", WORD))
    CUdeviceptr pointer = 0;
    RELEASING(api->cuMemAlloc(&pointer, (size_t)W(0)))
GIVE_HANDLE(pointer)

FUNCTION(cuMemFree, P("dptr", WORD))
    RELEASING(api->cuMemFree((CUdeviceptr)W(0)))
GIVE_NOTHING

FUNCTION(cuMemAllocAsync, P("bytesize", WORD) P("stream", WORD))
    CUdeviceptr pointer = 0;
    RELEASING(api->cuMemAllocAsync(&pointer, (size_t)W(0), STREAM(1)))
GIVE_HANDLE(pointer)

FUNCTION(cuMemFreeAsync, P("dptr", WORD) P("stream", WORD))
    RELEASING(api->cuMemFreeAsync((CUdeviceptr)W(0), STREAM(1)))
GIVE_NOTHING

FUNCTION(cuMemHostAlloc, P("bytesize", WORD) P("flags", UNSIGNED))
    void *pointer = NULL;
    RELEASING(api->cuMemHostAlloc(&pointer, (size_t)W(0), (unsigned)W(1)))
GIVE_HANDLE(pointer)

FUNCTION(cuMemFreeHost, P("pointer", WORD))
    RELEASING(api->cuMemFreeHost(HOST(0)))
GIVE_NOTHING

FUNCTION(cuMemcpyHtoDAsync, P("dst_device", WORD) P("src_host", WORD) P("byte_count", WORD) P("stream", WORD))
    RELEASING(api->cuMemcpyHtoDAsync((CUdeviceptr)W(0), HOST(1), (size_t)W(2), STREAM(3)))
GIVE_NOTHING

FUNCTION(cuMemcpyDtoHAsync, P("dst_host", WORD) P("src_device", WORD) P("byte_count", WORD) P("stream", WORD))
    RELEASING(api->cuMemcpyDtoHAsync(HOST(0), (CUdeviceptr)W(1), (size_t)W(2), STREAM(3)))
GIVE_NOTHING

FUNCTION(cuMemcpyDtoDAsync, P("dst_device", WORD) P("src_device", WORD) P("byte_count", WORD) P("stream", WORD))
    RELEASING(api->cuMemcpyDtoDAsync((CUdeviceptr)W(0), (CUdeviceptr)W(1), (size_t)W(2), STREAM(3)))
GIVE_NOTHING

FUNCTION(cuMemsetD8Async, P("dst_device", WORD) P("value", BYTE) P("count", WORD) P("stream", WORD))
    RELEASING(api->cuMemsetD8Async((CUdeviceptr)W(0), (unsigned char)W(1), (size_t)W(2), STREAM(3)))
GIVE_NOTHING

FUNCTION(cuStreamCreate, P("flags", UNSIGNED))
    CUstream stream = NULL;
    RELEASING(api->cuStreamCreate(&stream, (unsigned)W(0)))
GIVE_HANDLE(stream)

FUNCTION(cuStreamDestroy, P("stream", WORD))
    RELEASING(api->cuStreamDestroy(STREAM(0)))
GIVE_NOTHING

FUNCTION(cuStreamSynchronize, P("stream", WORD))
    RELEASING(api->cuStreamSynchronize(STREAM(0)))
GIVE_NOTHING

FUNCTION(cuStreamQuery, P("stream", WORD))
    HOLDING(api->cuStreamQuery(STREAM(0)))
GIVE_STATUS

FUNCTION(cuStreamWaitEvent, P("stream", WORD) P("event", WORD) P("flags", UNSIGNED))
    RELEASING(api->cuStreamWaitEvent(STREAM(0), EVENT(1), (unsigned)W(2)))
GIVE_NOTHING

FUNCTION(cuEventCreate, P("flags", UNSIGNED))
    CUevent event = NULL;
    RELEASING(api->cuEventCreate(&event, (unsigned)W(0)))
GIVE_HANDLE(event)

FUNCTION(cuEventDestroy, P("event", WORD))
    RELEASING(api->cuEventDestroy(EVENT(0)))
GIVE_NOTHING

FUNCTION(cuEventRecord, P("event", WORD) P("stream", WORD))
    RELEASING(api->cuEventRecord(EVENT(0), STREAM(1)))
GIVE_NOTHING

FUNCTION(cuEventQuery, P("event", WORD))
    HOLDING(api->cuEventQuery(EVENT(0)))
GIVE_STATUS

FUNCTION(cuEventSynchronize, P("event", WORD))
    RELEASING(api->cuEventSynchronize(EVENT(0)))
GIVE_NOTHING

FUNCTION(cuEventElapsedTime, P("start", WORD) P("end", WORD))
    float milliseconds = 0;
    HOLDING(api->cuEventElapsedTime(&milliseconds, EVENT(0), EVENT(1)))
GIVE(PyFloat_FromDouble((double)milliseconds))

FUNCTION(cuThreadExchangeStreamCaptureMode, P("mode", INTEGER))
    int mode = (int)W(0);
    HOLDING(api->cuThreadExchangeStreamCaptureMode(&mode))
GIVE(PyLong_FromLong(mode))

FUNCTION(cuStreamBeginCapture, P("stream", WORD) P("mode", INTEGER))
    RELEASING(api->cuStreamBeginCapture(STREAM(0), (int)W(1)))
GIVE_NOTHING

FUNCTION(cuStreamEndCapture, P("stream", WORD))
    CUgraph graph = NULL;
    RELEASING(api->cuStreamEndCapture(STREAM(0), &graph))
GIVE_HANDLE(graph)

FUNCTION(cuStreamIsCapturing, P("stream", WORD))
    int capturing = 0;
    HOLDING(api->cuStreamIsCapturing(STREAM(0), &capturing))
GIVE(PyLong_FromLong(capturing))

FUNCTION(cuGraphInstantiate, P("graph", WORD) P("flags", WORD))
    CUgraphExec exec = NULL;
    RELEASING(api->cuGraphInstantiate(&exec, (CUgraph)(uintptr_t)W(0), (unsigned long long)W(1)))
GIVE_HANDLE(exec)

FUNCTION(cuGraphGetNodes, P("graph", WORD))
    size_t nodes = 0;
    HOLDING(api->cuGraphGetNodes((CUgraph)(uintptr_t)W(0), NULL, &nodes))
GIVE(PyLong_FromSize_t(nodes))

FUNCTION(cuGraphLaunch, P("exec", WORD) P("stream", WORD))
    RELEASING(api->cuGraphLaunch((CUgraphExec)(uintptr_t)W(0), STREAM(1)))
GIVE_NOTHING

FUNCTION(cuGraphExecDestroy, P("exec", WORD))
    RELEASING(api->cuGraphExecDestroy((CUgraphExec)(uintptr_t)W(0)))
GIVE_NOTHING

FUNCTION(cuGraphDestroy, P("graph", WORD))
    RELEASING(api->cuGraphDestroy((CUgraph)(uintptr_t)W(0)))
GIVE_NOTHING

/* ---- the class ---- */

#define METHOD(call, signature)                                                                                        \
    {#call, (PyCFunction)(void (*)(void))driver_##call, METH_FASTCALL, #call "($self" signature ", /)\n--\n\n"}

static PyMethodDef methods[] = {
    METHOD(cuInit, ", flags"),
    METHOD(cuDriverGetVersion, ""),
    METHOD(cuDeviceGetCount, ""),
    METHOD(cuDeviceGet, ", ordinal"),
    METHOD(cuDeviceGetName, ", device"),
    METHOD(cuDeviceTotalMem, ", device"),
    METHOD(cuDeviceGetAttribute, ", attribute, device"),
    METHOD(cuDeviceGetUuid, ", device"),
    METHOD(cuDevicePrimaryCtxRetain, ", device"),
    METHOD(cuDevicePrimaryCtxRelease, ", device"),
    METHOD(cuCtxPushCurrent, ", context"),
    METHOD(cuCtxPopCurrent, ""),
    METHOD(cuCtxGetCurrent, ""),
    METHOD(cuMemGetInfo, ""),
    METHOD(cuMemAlloc, ", bytesize"),
    METHOD(cuMemFree, ", dptr"),
    METHOD(cuMemAllocAsync, ", bytesize, stream"),
    METHOD(cuMemFreeAsync, ", dptr, stream"),
    METHOD(cuMemHostAlloc, ", bytesize, flags"),
    METHOD(cuMemFreeHost, ", pointer"),
    METHOD(cuMemcpyHtoDAsync, ", dst_device, src_host, byte_count, stream"),
    METHOD(cuMemcpyDtoHAsync, ", dst_host, src_device, byte_count, stream"),
    METHOD(cuMemcpyDtoDAsync, ", dst_device, src_device, byte_count, stream"),
    METHOD(cuMemsetD8Async, ", dst_device, value, count, stream"),
    METHOD(cuStreamCreate, ", flags"),
    METHOD(cuStreamDestroy, ", stream"),
    METHOD(cuStreamSynchronize, ", stream"),
    METHOD(cuStreamQuery, ", stream"),
    METHOD(cuStreamWaitEvent, ", stream, event, flags"),
    METHOD(cuEventCreate, ", flags"),
    METHOD(cuEventDestroy, ", event"),
    METHOD(cuEventRecord, ", event, stream"),
    METHOD(cuEventQuery, ", event"),
    METHOD(cuEventSynchronize, ", event"),
    METHOD(cuEventElapsedTime, ", start, end"),
    METHOD(cuThreadExchangeStreamCaptureMode, ", mode"),
    METHOD(cuStreamBeginCapture, ", stream, mode"),
    METHOD(cuStreamEndCapture, ", stream"),
    METHOD(cuStreamIsCapturing, ", stream"),
    METHOD(cuGraphInstantiate, ", graph, flags"),
    METHOD(cuGraphGetNodes, ", graph"),
    METHOD(cuGraphLaunch, ", exec, stream"),
    METHOD(cuGraphExecDestroy, ", exec"),
    METHOD(cuGraphDestroy, ", graph"),
    {"_error", driver_error, METH_VARARGS,
     "_error($self, call, code, /)\n--\n\nThe exception for a status that `call` returned; subclasses override it."},
    {0},
};

static int driver_init(PyObject *object, PyObject *args, PyObject *names) {
    static char *keywords[] = {"api", NULL};
    driver *self = (driver *)object;
    PyObject *capsule;
    if (!PyArg_ParseTupleAndKeywords(args, names, "O:Driver", keywords, &capsule)) return -1;
    if (self->api) {
        PyErr_SetString(PyExc_RuntimeError, "Driver.__init__() was called twice; a table may be in use");
        return -1;
    }
    const trtx_cuda_api *api = trtx_api_of(capsule, "Driver");
    if (!api) return -1;
    self->api = api;
    self->capsule = Py_NewRef(capsule);
    return 0;
}

static void driver_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    Py_CLEAR(((driver *)object)->capsule);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *driver_api(PyObject *object, void *unused) {
    (void)unused;
    PyObject *capsule = ((driver *)object)->capsule;
    if (capsule) return Py_NewRef(capsule);
    PyErr_SetString(PyExc_RuntimeError, "the driver has no function table; Driver.__init__ was not called");
    return NULL;
}

static PyGetSetDef properties[] = {
    {"api", driver_api, NULL, "Capsule \"" TRTX_API_CAPSULE "\" with the driver's function table.", NULL},
    {0},
};

PyDoc_STRVAR(driver_doc, "Driver(api)\n--\n\n"
                         "The CUDA driver API over a function table. Handles and pointers are integers.\n\n"
                         "A status other than CUDA_SUCCESS is raised as what ``self._error(call, code)`` returns, except that\n"
                         "the two queries return CUDA_ERROR_NOT_READY. Calls act on the calling thread's context.");

static PyType_Slot driver_slots[] = {
    {Py_tp_doc, (void *)driver_doc},  {Py_tp_init, driver_init},     {Py_tp_dealloc, driver_dealloc},
    {Py_tp_methods, methods},         {Py_tp_getset, properties},    {0, NULL},
};

static PyType_Spec driver_spec = {
    .name = "trtx_py._native.Driver",
    .basicsize = sizeof(driver),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = driver_slots,
};

/* ---- the module ---- */

const trtx_cuda_api *trtx_api_of(PyObject *capsule, const char *function) {
    if (PyCapsule_IsValid(capsule, TRTX_API_CAPSULE)) return PyCapsule_GetPointer(capsule, TRTX_API_CAPSULE);
    PyErr_Format(PyExc_TypeError, "%s(): api must be a capsule \"" TRTX_API_CAPSULE "\", not %R", function, capsule);
    return NULL;
}

static PyObject *load_driver_api(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *reason = NULL;
    const trtx_cuda_api *api;
    Py_BEGIN_ALLOW_THREADS /* libcuda is large, and its constructors run */
    api = trtx_cuda_api_load(&reason);
    Py_END_ALLOW_THREADS
    if (!api) {
        PyErr_SetString(PyExc_OSError, reason);
        return NULL;
    }
    return PyCapsule_New((void *)api, TRTX_API_CAPSULE, NULL); /* never freed: the table is the process's */
}

static PyMethodDef functions[] = {
    {"load_driver_api", load_driver_api, METH_NOARGS,
     "load_driver_api($module, /)\n--\n\n"
     "The function table of libcuda.so.1, loaded at the first call. OSError says what is wrong with it."},
    {0},
};

int trtx_driver_register(PyObject *module) {
    if (PyModule_AddFunctions(module, functions) < 0) return -1;
    PyObject *type = PyType_FromModuleAndSpec(module, &driver_spec, NULL);
    if (!type) return -1;
    int added = PyModule_AddObjectRef(module, "Driver", type);
    Py_DECREF(type);
    return added;
}
