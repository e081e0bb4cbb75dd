/* Kernels: a Python callable on a stream's thread, and the native one that computes nothing; clocks written in Python. */
#include "python_mock.h"

#include <time.h>

PyObject *device_fault_error, *kernel_error;
static _Thread_local int callbacks;

int in_callback(void) { return callbacks > 0; }

int may_take_gil(void) {
    if (!Py_IsInitialized())
        return 0;
#if PY_VERSION_HEX >= 0x030D0000
    return !Py_IsFinalizing();
#else
    return !_Py_IsFinalizing();
#endif
}

static PyObject *take_exception(void) {
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return value;
#endif
}

static void explain(PyObject *text) {
    const char *bytes = text ? PyUnicode_AsUTF8(text) : NULL;
    trtx_mock_explain(bytes ? bytes : "a kernel failed, and its error has no text");
    PyErr_Clear();
}

/* What a GPU would do where the callable raised. */
static CUresult outcome_of(PyObject *error) {
    PyObject *arguments = NULL, *text;
    CUresult code = CUDA_ERROR_LAUNCH_FAILED;
    if (PyErr_GivenExceptionMatches(error, device_fault_error)) {
        arguments = PyObject_GetAttrString(error, "args");
        if (arguments && PyTuple_Check(arguments) && PyTuple_GET_SIZE(arguments) == 2) {
            long given = PyLong_AsLong(PyTuple_GET_ITEM(arguments, 0));
            code = given > 0 && given < 100000 ? (CUresult)given : code;
            text = PyObject_Str(PyTuple_GET_ITEM(arguments, 1));
        } else {
            text = PyObject_Str(error);
        }
    } else if (PyErr_GivenExceptionMatches(error, kernel_error)) {
        code = TRTX_MOCK_NO_RESULT;
        text = PyObject_Str(error);
    } else {
        text = PyUnicode_FromFormat("%s: %S", Py_TYPE(error)->tp_name, error); /* a kernel that raises has crashed */
    }
    PyErr_Clear();
    explain(text);
    Py_XDECREF(text);
    Py_XDECREF(arguments);
    return code;
}

static CUresult run_callable(void *userdata) {
    if (!may_take_gil())
        return CUDA_ERROR_LAUNCH_FAILED;
    CUresult code = CUDA_SUCCESS;
    callbacks++;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *result = PyObject_CallNoArgs(userdata);
    if (!result) {
        PyObject *error = take_exception();
        code = error ? outcome_of(error) : CUDA_ERROR_LAUNCH_FAILED;
        Py_XDECREF(error);
    }
    Py_XDECREF(result);
    PyGILState_Release(state);
    callbacks--;
    return code;
}

static void release_callable(void *userdata) {
    if (!may_take_gil())
        return; /* the interpreter is going, and its objects with it */
    callbacks++;
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF((PyObject *)userdata);
    PyGILState_Release(state);
    callbacks--;
}

static PyObject *position_or_error(CUresult code, trtx_mock_position position) {
    return code ? Py_BuildValue("iN", code, Py_NewRef(Py_None))
                : Py_BuildValue("i(KK)", 0, (unsigned long long)position.place, (unsigned long long)position.sequence);
}

static int read_region(PyObject *object, trtx_mock_region **region) {
    if (object == Py_None) {
        *region = NULL;
        return 1;
    }
    if (!PyObject_TypeCheck(object, &region_type)) {
        PyErr_Format(PyExc_TypeError, "region is a %s; expected Region or None", Py_TYPE(object)->tp_name);
        return 0;
    }
    *region = ((region_object *)object)->region;
    return 1;
}

PyObject *launch_python(mock_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"stream", "duration_ns", "kernel", "counted", "region", NULL};
    unsigned long long stream, duration_ns = 0;
    PyObject *callable = Py_None, *region = Py_None;
    int counted = 1;
    trtx_mock_task task = {0};
    trtx_mock_position position;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "K|KO$pO", names, &stream, &duration_ns, &callable, &counted, &region))
        return NULL;
    if (!read_region(region, &task.region))
        return NULL;
    if (callable != Py_None && !PyCallable_Check(callable)) {
        PyErr_Format(PyExc_TypeError, "kernel is a %s; expected a callable or None", Py_TYPE(callable)->tp_name);
        return NULL;
    }
    task.duration_ns = duration_ns;
    task.uncounted = !counted;
    if (callable != Py_None) {
        task.run = run_callable;
        task.release = release_callable;
        task.userdata = Py_NewRef(callable);
    }
    trtx_mock_select(self->mock);
    CUresult code = trtx_mock_enqueue((CUstream)(uintptr_t)stream, &task, &position);
    return position_or_error(code, position);
}

/* A sequence of (address, bytes, name) into spans whose names stay valid while `fast` does. */
static int read_spans(PyObject *fast, trtx_mock_span *spans) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); i++) {
        unsigned long long address;
        Py_ssize_t bytes;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(fast, i), "Kns", &address, &bytes, &spans[i].name))
            return 0;
        spans[i].address = address;
        spans[i].bytes = (size_t)bytes;
    }
    return 1;
}

PyObject *launch_blank(mock_object *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"stream", "duration_ns", "name", "scratch", "inputs", "outputs", "region", "stamp", "value",
                            "captured", NULL};
    unsigned long long stream, duration_ns, scratch, value;
    Py_ssize_t scratch_bytes;
    PyObject *inputs, *outputs, *region, *result = NULL;
    stamp_object *stamp;
    trtx_mock_blank blank = {0};
    trtx_mock_region *written;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "KKs(Kn)OOOO!Kp", names, &stream, &duration_ns, &blank.name, &scratch,
                                     &scratch_bytes, &inputs, &outputs, &region, &stamp_type, &stamp, &value, &blank.captured))
        return NULL;
    if (!read_region(region, &written))
        return NULL;
    inputs = PySequence_Fast(inputs, "inputs is no sequence");
    outputs = inputs ? PySequence_Fast(outputs, "outputs is no sequence") : NULL;
    if (outputs) {
        blank.input_count = (size_t)PySequence_Fast_GET_SIZE(inputs);
        blank.output_count = (size_t)PySequence_Fast_GET_SIZE(outputs);
        trtx_mock_span *spans = PyMem_New(trtx_mock_span, blank.input_count + blank.output_count + 1);
        if (!spans) {
            PyErr_NoMemory();
        } else if (read_spans(inputs, spans) && read_spans(outputs, spans + blank.input_count)) {
            trtx_mock_position position = {0, 0};
            blank.scratch = (trtx_mock_span){scratch, (size_t)scratch_bytes, ""};
            blank.inputs = spans;
            blank.outputs = spans + blank.input_count;
            blank.stamp = stamp->stamp;
            blank.value = value;
            trtx_mock_select(self->mock);
            CUresult code = trtx_mock_enqueue_blank(self->mock, (CUstream)(uintptr_t)stream, duration_ns, written, &blank,
                                                    &position);
            result = position_or_error(code, position);
        }
        PyMem_Free(spans);
    }
    Py_XDECREF(inputs);
    Py_XDECREF(outputs);
    return result;
}

/* ---- clocks ---- */

static uint64_t machine_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t python_now(void *userdata) {
    if (!may_take_gil())
        return machine_now();
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *now = PyObject_CallMethod(userdata, "now_ns", NULL);
    uint64_t ns = now ? PyLong_AsUnsignedLongLong(now) : 0;
    if (PyErr_Occurred()) {
        PyErr_WriteUnraisable(userdata);
        ns = machine_now();
    }
    Py_XDECREF(now);
    PyGILState_Release(state);
    return ns;
}

static void python_sleep(void *userdata, uint64_t ns) {
    if (!may_take_gil())
        return;
    callbacks++;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *done = PyObject_CallMethod(userdata, "sleep", "d", (double)ns / 1e9);
    if (!done)
        PyErr_WriteUnraisable(userdata);
    Py_XDECREF(done);
    PyGILState_Release(state);
    callbacks--;
}

void clock_of_python(PyObject *clock, trtx_mock_clock *made) {
    *made = (trtx_mock_clock){.userdata = clock, .now = python_now, .sleep = python_sleep};
}

static void *give_up_gil(void) { return may_take_gil() && PyGILState_Check() ? PyEval_SaveThread() : NULL; }

static void take_gil_again(void *token) { PyEval_RestoreThread(token); }

void clock_of_machine(trtx_mock_clock *made) {
    *made = (trtx_mock_clock){.unlock = give_up_gil, .relock = take_gil_again};
}

int kernels_ready(PyObject *module) {
    device_fault_error = PyErr_NewExceptionWithDoc(
        "mock_backend._native.DeviceFaultError",
        "DeviceFaultError(code, why): a kernel failed on the device; the context is unusable from here on.", NULL, NULL);
    kernel_error = PyErr_NewExceptionWithDoc(
        "mock_backend._native.KernelError",
        "A kernel cannot compute its outputs from the values it was given; stream and context stay usable.", NULL, NULL);
    return device_fault_error && kernel_error && PyModule_AddObjectRef(module, "DeviceFaultError", device_fault_error) == 0 &&
           PyModule_AddObjectRef(module, "KernelError", kernel_error) == 0;
}
