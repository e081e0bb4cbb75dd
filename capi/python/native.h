/* What the parts of the extension module trtx_py._native share, and what other extension modules need to meet it. */
#ifndef TRTX_NATIVE_H
#define TRTX_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cuda_api.h"

/* Name of the capsules that hold a `const trtx_cuda_api *`. The table is borrowed: it must outlive the capsule, and the
 * capsule is kept alive by whatever calls through it. */
#define TRTX_API_CAPSULE "trtx_cuda_api"

/* The table in a capsule. NULL, with TypeError that names `function`, for anything else. */
const trtx_cuda_api *trtx_api_of(PyObject *capsule, const char *function);

/* Add the driver's names to the module, and the hot path's. 0, or -1 with an exception. */
int trtx_driver_register(PyObject *module);
int trtx_dlpack_register(PyObject *module);
int trtx_hot_register(PyObject *module);
int trtx_scan_register(PyObject *module);
int trtx_foreign_register(PyObject *module);
int trtx_rows_register(PyObject *module);
int trtx_many_register(PyObject *module);

#endif
