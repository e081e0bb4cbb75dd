/* The hot path's own names in trtx_py._native, and how it looks at what callers hand in. */
#include "hot.h"

PyObject *trtx_str_copy, *trtx_str_set_result, *trtx_str_done, *trtx_str_blocking;

/* The one letter of a native scalar format, 0 for anything else. 8-byte integers have two names each where long is 8 bytes. */
char trtx_plain_format(const char *format) {
    if (!format) return 'B';
    if (*format == '@' || *format == '=') format++;
    if (!*format || format[1]) return 0;
    if (sizeof(long) == 8) {
        if (*format == 'l') return 'q';
        if (*format == 'L') return 'Q';
    }
    return strchr("?bBhHiIlLqQefd", *format) ? *format : 0;
}

int trtx_view_input(PyObject *array, Py_buffer *view) {
    if (PyObject_GetBuffer(array, view, PyBUF_ND | PyBUF_FORMAT) == 0) return 1;
    PyErr_Clear(); /* not contiguous, or of a dtype that the protocol has no word for */
    return 0;
}

bool trtx_view_matches(const Py_buffer *view, const tensor_spec *spec) {
    if (view->ndim != spec->dimensions) return false;
    for (int i = 0; i < view->ndim; i++)
        if (view->shape[i] != spec->shape[i]) return false;
    return spec->format && trtx_plain_format(view->format) == spec->format;
}

bool trtx_same_shape(const tensor_spec *left, const tensor_spec *right) {
    if (left->dimensions != right->dimensions) return false;
    for (int i = 0; i < left->dimensions; i++)
        if (left->shape[i] != right->shape[i]) return false;
    return true;
}

int trtx_parse_shape(PyObject *shape, tensor_spec *spec) {
    if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) > TRTX_MAX_DIMENSIONS) {
        PyErr_Format(PyExc_TypeError, "a shape is a tuple of at most %d integers, not %R", (int)TRTX_MAX_DIMENSIONS, shape);
        return -1;
    }
    spec->dimensions = (int)PyTuple_GET_SIZE(shape);
    for (int i = 0; i < spec->dimensions; i++) {
        spec->shape[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, i));
        if (spec->shape[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

int trtx_hub_argument(PyObject *argument, const char *function, hub_object **hub) {
    *hub = NULL;
    if (argument == Py_None) return 0;
    if (!Py_IS_TYPE(argument, &trtx_hub_type)) {
        PyErr_Format(PyExc_TypeError, "%s: hub is a Hub or None, not %.200s", function, Py_TYPE(argument)->tp_name);
        return -1;
    }
    *hub = (hub_object *)argument;
    return 0;
}

static int intern(PyObject **string, const char *text) {
    if (!*string) *string = PyUnicode_InternFromString(text);
    return *string ? 0 : -1;
}

int trtx_hot_register(PyObject *module) {
    if (intern(&trtx_str_copy, "copy") < 0 || intern(&trtx_str_set_result, "set_result") < 0 ||
        intern(&trtx_str_done, "done") < 0 || intern(&trtx_str_blocking, "_asyncio_future_blocking") < 0)
        return -1;
    PyTypeObject *const types[] = {&trtx_watcher_type, &trtx_lane_type,  &trtx_hub_type, &trtx_bucket_type,
                                   &trtx_place_type,   &trtx_port_type, &trtx_wait_type};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (PyModule_AddType(module, types[i]) < 0) return -1;
    return 0;
}
