/* The Python that the library uses: the one this process has, or one that the library finds and starts.
 *
 * Nothing here links libpython or uses Python.h: functions of the stable ABI are looked up at run time, in the process where
 * it has Python, else in the libpython that was loaded. */
#ifndef TRTXPY_HOST_H
#define TRTXPY_HOST_H

#include <stdbool.h>
#include <stddef.h>

#include "trtxpy.h"

typedef struct _object PyObject;

/* X(return type, name, parameters): functions of the stable ABI that the library uses once Python runs. */
#define TRTXPY_PYTHON_FUNCTIONS(X)                                                                                     \
    X(int, PyGILState_Ensure, (void))                                                                                  \
    X(void, PyGILState_Release, (int))                                                                                 \
    X(void *, PyGILState_GetThisThreadState, (void))                                                                   \
    X(void, PyThreadState_Clear, (void *))                                                                             \
    X(void, PyThreadState_Delete, (void *))                                                                            \
    X(void *, PyEval_SaveThread, (void))                                                                               \
    X(void, PyEval_RestoreThread, (void *))                                                                            \
    X(int, Py_IsInitialized, (void))                                                                                   \
    X(void, Py_IncRef, (PyObject *))                                                                                   \
    X(void, Py_DecRef, (PyObject *))                                                                                   \
    X(PyObject *, PyImport_ImportModule, (const char *))                                                               \
    X(PyObject *, PyObject_GetAttrString, (PyObject *, const char *))                                                  \
    X(PyObject *, PyObject_CallObject, (PyObject *, PyObject *))                                                       \
    X(PyObject *, PyObject_Str, (PyObject *))                                                                          \
    X(PyObject *, PyTuple_New, (ptrdiff_t))                                                                            \
    X(ptrdiff_t, PyTuple_Size, (PyObject *))                                                                           \
    X(PyObject *, PyTuple_GetItem, (PyObject *, ptrdiff_t))                                                            \
    X(int, PyTuple_SetItem, (PyObject *, ptrdiff_t, PyObject *))                                                       \
    X(PyObject *, PyLong_FromLongLong, (long long))                                                                    \
    X(PyObject *, PyLong_FromUnsignedLongLong, (unsigned long long))                                                   \
    X(long long, PyLong_AsLongLong, (PyObject *))                                                                      \
    X(unsigned long long, PyLong_AsUnsignedLongLong, (PyObject *))                                                     \
    X(PyObject *, PyBool_FromLong, (long))                                                                             \
    X(PyObject *, PyUnicode_FromString, (const char *))                                                                \
    X(PyObject *, PyUnicode_AsUTF8String, (PyObject *))                                                                \
    X(PyObject *, PyUnicode_DecodeFSDefault, (const char *))                                                           \
    X(PyObject *, PyBytes_FromStringAndSize, (const char *, ptrdiff_t))                                                \
    X(int, PyBytes_AsStringAndSize, (PyObject *, char **, ptrdiff_t *))                                                \
    X(PyObject *, PyMemoryView_FromMemory, (char *, ptrdiff_t, int))                                                   \
    X(void *, PyCapsule_GetPointer, (PyObject *, const char *))                                                        \
    X(PyObject *, PyErr_Occurred, (void))                                                                              \
    X(void, PyErr_Fetch, (PyObject **, PyObject **, PyObject **))                                                      \
    X(void, PyErr_NormalizeException, (PyObject **, PyObject **, PyObject **))                                         \
    X(void, PyErr_Restore, (PyObject *, PyObject *, PyObject *))                                                       \
    X(void, PyErr_Clear, (void))

typedef struct trtxpy_python {
#define TRTXPY_PYTHON_MEMBER(type, name, parameters) type(*name) parameters;
    TRTXPY_PYTHON_FUNCTIONS(TRTXPY_PYTHON_MEMBER)
#undef TRTXPY_PYTHON_MEMBER
    int (*PyGILState_Check)(void); /* not of the stable ABI, and there in every version; NULL if not */
    PyObject *none;                /* Py_None, borrowed */
} trtxpy_python;

/* Find or start Python, once; import trtx_py.capi._control. Thread-safe: others wait for the one that starts. Sets the error
 * of the thread. hint: what trtxpy_init was given, or NULL. A failure may be tried again, unless CPython itself failed
 * to start. TRTXPY_CLOSED after trtxpy_host_stop of an own interpreter and once Python has ended, TRTXPY_FORKED in a
 * child. */
trtxpy_status trtxpy_host_start(const char *hint);

/* The functions, once it has started; NULL before, after stop, once Python has ended, and in a forked child. A load and a
 * short call: fit for the hot path. */
const trtxpy_python *trtxpy_host_python(void);
/* trtx_py.capi._control, borrowed; NULL as above. */
PyObject *trtxpy_host_control(void);
/* This is a child, forked from the process that started the library. */
bool trtxpy_host_forked(void);

/* End the interpreter that the library started, on its thread; where Python was there already only lets go of it, and it can
 * be started again. Called with no object open and no other thread in the library; the caller does not hold Python's lock
 * (or it is let go meanwhile). TRTXPY_BUSY if Python code of the interpreter that would end is below in the stack. */
trtxpy_status trtxpy_host_stop(void);

/* Have a function called before Python ends by itself: at the process's exit, where the interpreter is the library's (then
 * on the interpreter's thread, and the exit waits 10 s at most), or at Python's own exit. Without Python's lock, which it
 * may take. Not called by trtxpy_host_stop. Handlers of exit run last in, first out: call it again once libraries are loaded
 * that have handlers of their own (CUDA's driver), so that Python ends before them. */
void trtxpy_host_at_exit(void (*before_end)(void));
/* This thread is one that `before_end` waits for: an exit called in it does not wait for Python's end. */
void trtxpy_host_mark_thread(void);

/* This thread has a state of Python's because the library keeps one for it: an exit called in it waits for Python's end all the
 * same, unless it is called by Python code, between the beginning and the end of a call. */
void trtxpy_host_keeps_state(bool keeps);
void trtxpy_host_call_begins(void);
void trtxpy_host_call_ends(void);

/* Let go of Python's lock if this thread holds it, and take it back: around everything that blocks. */
void *trtxpy_host_unlock(void);
void trtxpy_host_relock(void *state);

#endif
