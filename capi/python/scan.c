/* Looking for the beginnings of executable images in a plan, at memory speed: a plan may have gigabytes. */
#include <stdbool.h>
#include <stdint.h>

#include "native.h"

enum { BLOCK = 4096, MOST = 65536 };

static bool is_elf(const uint8_t *p) { return p[0] == 0x7f && p[1] == 'E' && p[2] == 'L' && p[3] == 'F'; }
static bool is_pe(const uint8_t *p) { return p[0] == 'P' && p[1] == 'E' && p[2] == 0 && p[3] == 0; }

/* Whether any of `count` positions may begin a mark. Without branches, so that the compiler makes vectors of it. */
#ifdef __GNUC__
__attribute__((optimize("O3")))
#endif
static bool may_have(const uint8_t *p, size_t count) {
    uint8_t hit = 0;
    for (size_t i = 0; i < count; i++)
        hit |= (uint8_t)(((p[i + 1] == 'E') & (p[i + 2] == 'L') & (p[i + 3] == 'F')) |
                         ((p[i] == 'P') & (p[i + 1] == 'E') & (p[i + 2] == 0)));
    return hit;
}

/* Up to `room` positions; how many there are. */
static size_t scan(const uint8_t *data, size_t length, size_t *found, size_t room) {
    size_t count = 0;
    if (length < 4) return 0;
    for (size_t at = 0, last = length - 3; at < last; at += BLOCK) {
        size_t here = last - at < BLOCK ? last - at : BLOCK;
        if (!may_have(data + at, here)) continue;
        for (size_t i = at; i < at + here; i++) {
            if (!is_elf(data + i) && !is_pe(data + i)) continue;
            if (count < room) found[count] = i;
            count++;
        }
    }
    return count;
}

static PyObject *find_image_marks(PyObject *Py_UNUSED(module), PyObject *argument) {
    Py_buffer view;
    if (PyObject_GetBuffer(argument, &view, PyBUF_SIMPLE) < 0) return NULL;
    size_t *found = PyMem_Malloc(MOST * sizeof *found), count = 0;
    PyObject *list = NULL;
    if (!found) {
        PyErr_NoMemory();
    } else {
        Py_BEGIN_ALLOW_THREADS
        count = scan(view.buf, (size_t)view.len, found, MOST);
        Py_END_ALLOW_THREADS
        if (count > MOST)
            PyErr_Format(PyExc_ValueError, "%zu marks of executable images; a plan has a few", count);
        else
            list = PyList_New((Py_ssize_t)count);
    }
    for (size_t i = 0; list && i < count; i++) {
        PyObject *position = PyLong_FromSize_t(found[i]);
        if (!position)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, position);
    }
    PyMem_Free(found);
    PyBuffer_Release(&view);
    return list;
}

static PyMethodDef functions[] = {
    {"find_image_marks", find_image_marks, METH_O,
     PyDoc_STR("find_image_marks(buffer) -> list of the positions of b'\\x7fELF' and b'PE\\0\\0'")},
    {NULL, NULL, 0, NULL},
};

int trtx_scan_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
