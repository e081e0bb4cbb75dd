/* mock_backend._native: what its parts share. Private.
 *
 * Everything here runs with the GIL held unless it says otherwise. Callbacks of the C mock come on any thread, with or
 * without the GIL, and never under one of its locks; they take the GIL with PyGILState_Ensure.
 */
#ifndef TRTX_PYTHON_MOCK_H
#define TRTX_PYTHON_MOCK_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../mock/mock_driver.h"

#define TRTX_API_CAPSULE "trtx_cuda_api"

typedef struct mock_object {
    PyObject_HEAD
    trtx_mock *mock;
    PyObject *clock; /* what the mock's delays call, or NULL */
    long process;    /* the one it was made in: a forked child has none of its threads */
} mock_object;

extern PyTypeObject mock_type, view_type, time_type, stamp_type, region_type;

typedef struct time_object {
    PyObject_HEAD
    trtx_mock_time *time;
} time_object;

typedef struct stamp_object {
    PyObject_HEAD
    trtx_mock_stamp *stamp;
} stamp_object;

typedef struct region_object {
    PyObject_HEAD
    mock_object *owner;
    trtx_mock_region *region;
} region_object;

/* Adds the exceptions that kernels raise to say what a GPU would do: DeviceFaultError(code, why) and KernelError(why). */
int kernels_ready(PyObject *module);
extern PyObject *device_fault_error, *kernel_error;
/* The interpreter is there and this thread may wait for its lock. */
int may_take_gil(void);
/* This thread is inside a callback of a stream, so it must not wait for that stream's thread. */
int in_callback(void);

PyObject *launch_python(mock_object *self, PyObject *args, PyObject *keywords);
PyObject *launch_blank(mock_object *self, PyObject *args, PyObject *keywords);
/* Time by a Python object with now_ns() and sleep(seconds). */
void clock_of_python(PyObject *clock, trtx_mock_clock *made);
/* The machine's own time, without the GIL while a call waits. */
void clock_of_machine(trtx_mock_clock *made);
PyObject *view_of(mock_object *self, PyObject *args);

#endif
