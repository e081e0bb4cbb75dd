/* For the tests of the host: calls into its Python. */
#ifndef TEST_HOST_H
#define TEST_HOST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "host.h"

#define CHECK(condition)                                                                                             \
    do {                                                                                                             \
        if (!(condition)) {                                                                                          \
            fprintf(stderr, "%s:%d: %s (last error: %d %s)\n", __FILE__, __LINE__, #condition, trtxpy_last_status(), \
                    trtxpy_last_error());                                                                            \
            _Exit(1);                                                                                                \
        }                                                                                                            \
    } while (0)

#define CHECK_TEXT(part)                                                                                 \
    do {                                                                                                 \
        if (!strstr(trtxpy_last_error(), part)) {                                                        \
            fprintf(stderr, "%s:%d: no \"%s\" in: %s\n", __FILE__, __LINE__, part, trtxpy_last_error()); \
            _Exit(1);                                                                                    \
        }                                                                                                \
    } while (0)

/* Call a function of the control module. Its result as text, or as a number; -1 if there is no Python. */
static inline long long call_control(const char *name, char *text, size_t room) {
    const trtxpy_python *py = trtxpy_host_python();
    if (!py) return -1;
    int held = py->PyGILState_Ensure();
    PyObject *function = py->PyObject_GetAttrString(trtxpy_host_control(), name);
    CHECK(function);
    PyObject *result = py->PyObject_CallObject(function, NULL);
    CHECK(result);
    long long number = 0;
    if (text) {
        char *bytes;
        ptrdiff_t size;
        PyObject *encoded = py->PyUnicode_AsUTF8String(result);
        CHECK(encoded && py->PyBytes_AsStringAndSize(encoded, &bytes, &size) == 0);
        snprintf(text, room, "%s", bytes);
        py->Py_DecRef(encoded);
    } else if (result != py->none) {
        number = py->PyLong_AsLongLong(result);
    }
    py->Py_DecRef(result);
    py->Py_DecRef(function);
    py->PyGILState_Release(held);
    return number;
}

#endif
