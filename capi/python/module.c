/* The extension module trtx_py._native. */
#include "native.h"

static int exec_module(PyObject *module) {
    if (trtx_driver_register(module) < 0) return -1;
    if (trtx_dlpack_register(module) < 0) return -1;
    if (trtx_hot_register(module) < 0) return -1;
    if (trtx_scan_register(module) < 0) return -1;
    if (trtx_foreign_register(module) < 0) return -1;
    if (trtx_rows_register(module) < 0) return -1;
    if (trtx_many_register(module) < 0) return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)exec_module},
#ifdef Py_mod_multiple_interpreters
    /* numpy, which everything here hands out, lives in one interpreter only */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "trtx_py._native",
    .m_doc = "The CUDA driver, and lanes that launch captured graphs and notice that they are done.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
