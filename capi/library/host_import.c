/* What the host does inside Python: import trtx_py, name exceptions, hear of Python's exit. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "host_internal.h"

static const char control_name[] = "trtx_py.capi._control";

/* Functions of the stable ABI that only this file needs. */
typedef struct extras {
    PyObject *(*PySys_GetObject)(const char *); /* borrowed */
    int (*PyList_Append)(PyObject *, PyObject *);
    ptrdiff_t (*PyList_Size)(PyObject *);
    PyObject *(*PyList_GetItem)(PyObject *, ptrdiff_t); /* borrowed */
    int (*PyList_SetSlice)(PyObject *, ptrdiff_t, ptrdiff_t, PyObject *);
} extras;

static bool look_up(void *handle, extras *api) {
    return (*(void **)&api->PySys_GetObject = dlsym(handle, "PySys_GetObject")) &&
           (*(void **)&api->PyList_Append = dlsym(handle, "PyList_Append")) &&
           (*(void **)&api->PyList_Size = dlsym(handle, "PyList_Size")) &&
           (*(void **)&api->PyList_GetItem = dlsym(handle, "PyList_GetItem")) &&
           (*(void **)&api->PyList_SetSlice = dlsym(handle, "PyList_SetSlice"));
}

/* str(object) as UTF-8; "" if it has none. Leaves no exception. */
static void text_of(const trtxpy_python *py, PyObject *object, char *text, size_t room) {
    char *bytes = NULL;
    ptrdiff_t size;
    PyObject *string = object ? py->PyObject_Str(object) : NULL;
    PyObject *encoded = string ? py->PyUnicode_AsUTF8String(string) : NULL;
    bool good = encoded && py->PyBytes_AsStringAndSize(encoded, &bytes, &size) == 0;
    snprintf(text, room, "%s", good ? bytes : "");
    if (encoded) py->Py_DecRef(encoded);
    if (string) py->Py_DecRef(string);
    py->PyErr_Clear();
}

static void attribute_text(const trtxpy_python *py, PyObject *object, const char *name, char *text, size_t room) {
    PyObject *value = object ? py->PyObject_GetAttrString(object, name) : NULL;
    text_of(py, value, text, room);
    if (value) py->Py_DecRef(value);
    py->PyErr_Clear();
}

typedef struct exception {
    char type[128], message[2048];
    char module[128]; /* that was not found; "" if it is no ModuleNotFoundError */
} exception;

static void take_exception(const trtxpy_python *py, exception *raised) {
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    py->PyErr_Fetch(&type, &value, &traceback);
    py->PyErr_NormalizeException(&type, &value, &traceback);
    attribute_text(py, type, "__name__", raised->type, sizeof raised->type);
    text_of(py, value, raised->message, sizeof raised->message);
    raised->module[0] = '\0';
    if (strcmp(raised->type, "ModuleNotFoundError") == 0)
        attribute_text(py, value, "name", raised->module, sizeof raised->module);
    if (type) py->Py_DecRef(type);
    if (value) py->Py_DecRef(value);
    if (traceback) py->Py_DecRef(traceback);
}

/* Else a package that was installed after a first try might not be seen. */
static void forget_folders(const trtxpy_python *py) {
    PyObject *importlib = py->PyImport_ImportModule("importlib"), *result = NULL;
    PyObject *function = importlib ? py->PyObject_GetAttrString(importlib, "invalidate_caches") : NULL;
    if (function) result = py->PyObject_CallObject(function, NULL);
    py->PyErr_Clear();
    PyObject *const owned[] = {importlib, function, result};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        if (owned[i]) py->Py_DecRef(owned[i]);
}

static PyObject *import(const trtxpy_python *py, exception *raised) {
    PyObject *module = py->PyImport_ImportModule(control_name);
    if (!module) take_exception(py, raised);
    return module;
}

/* Once more with the folder of the package that this library came with: what a path set by hand, or another environment,
 * lacks. */
static PyObject *import_from(const trtxpy_python *py, const extras *api, const char *folder, exception *raised) {
    PyObject *path = api->PySys_GetObject("path"), *entry = py->PyUnicode_DecodeFSDefault(folder), *module = NULL;
    if (path && entry && api->PyList_Append(path, entry) == 0) {
        module = import(py, raised);
        ptrdiff_t last = api->PyList_Size(path) - 1;
        if (!module && last >= 0 && api->PyList_GetItem(path, last) == entry)
            api->PyList_SetSlice(path, last, last + 1, NULL);
    }
    py->PyErr_Clear();
    if (entry) py->Py_DecRef(entry);
    return module;
}

static bool of_ours(const char *module) {
    return strcmp(module, "trtx_py") == 0 || strncmp(module, "trtx_py.", 8) == 0;
}

static trtxpy_status say(const trtxpy_python *py, const extras *api, const trtxpy_environment *environment,
                         const char *version, const exception *raised) {
    char executable[1024], prefix[1024], which[2400], how[2200] = "";
    text_of(py, api->PySys_GetObject("executable"), executable, sizeof executable);
    text_of(py, api->PySys_GetObject("prefix"), prefix, sizeof prefix);
    bool named = *executable && strcmp(executable, "None") != 0;
    snprintf(which, sizeof which, "Python %s of %s (%s)", version, named ? executable : prefix,
             environment ? environment->source : "which this process runs");
    if (of_ours(raised->module))
        snprintf(how, sizeof how, ". Install trtx_py there: %s -m pip install trtx-py%s", named ? executable : "python",
                 environment ? "; or name another environment with TRTXPY_PYTHON, and start the program again" : "");
    return trtxpy_fail(TRTXPY_PYTHON, "%s cannot import %s: %s%s%s%s", which, control_name, raised->type,
                       *raised->message ? ": " : "", raised->message, how);
}

trtxpy_status trtxpy_import_control(const trtxpy_python *python, const trtxpy_environment *environment, void *handle,
                                    PyObject **control) {
    extras api;
    exception raised;
    trtxpy_python_version version;
    char folder[PATH_MAX];
    *control = NULL;
    trtxpy_python_version_of(handle, &version);
    if (!look_up(handle, &api)) return trtxpy_fail(TRTXPY_PYTHON, "Python %s is no complete CPython", version.text);
    if (environment) forget_folders(python);
    *control = import(python, &raised);
    if (!*control && of_ours(raised.module)) {
        trtxpy_package_parent(folder);
        if (*folder) *control = import_from(python, &api, folder, &raised);
    }
    return *control ? TRTXPY_OK : say(python, &api, environment, version.text, &raised);
}

/* ---- signals ---- */

void trtxpy_keep_sigint(const trtxpy_python *python, const struct sigaction *before) {
    struct sigaction after;
    PyObject *module = python->PyImport_ImportModule("_signal"), *function = NULL, *arguments = NULL, *result = NULL;
    sigaction(SIGINT, NULL, &after);
    if (module && after.sa_handler != before->sa_handler && before->sa_handler == SIG_DFL) {
        /* Python must know, or it sets SIGINT to its default at its end, whatever the program has made of it by then */
        function = python->PyObject_GetAttrString(module, "signal");
        arguments = python->PyTuple_New(2);
        if (arguments) {
            python->PyTuple_SetItem(arguments, 0, python->PyLong_FromLongLong(SIGINT));
            python->PyTuple_SetItem(arguments, 1, python->PyLong_FromLongLong(0)); /* SIG_DFL */
        }
        if (function && arguments) result = python->PyObject_CallObject(function, arguments);
        sigaction(SIGINT, before, NULL);
    }
    python->PyErr_Clear();
    PyObject *const owned[] = {module, function, arguments, result};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        if (owned[i]) python->Py_DecRef(owned[i]);
}

/* ---- Python's exit ---- */

typedef struct method_definition { /* PyMethodDef of the stable ABI */
    const char *name;
    PyObject *(*function)(PyObject *, PyObject *);
    int flags;
    const char *doc;
} method_definition;

static const trtxpy_python *exiting_python;
static void (*exit_function)(void);

static PyObject *run_exit_function(PyObject *self, PyObject *nothing) {
    (void)self;
    (void)nothing;
    exit_function();
    exiting_python->Py_IncRef(exiting_python->none);
    return exiting_python->none;
}

static method_definition exit_method = {"trtxpy_python_ends", run_exit_function, 4 /* METH_NOARGS */, NULL};

trtxpy_status trtxpy_call_at_python_exit(const trtxpy_python *python, void *handle, void (*function)(void)) {
    PyObject *(*PyCFunction_NewEx)(method_definition *, PyObject *, PyObject *);
    *(void **)&PyCFunction_NewEx = dlsym(handle, "PyCFunction_NewEx");
    exiting_python = python;
    exit_function = function;
    PyObject *atexit = python->PyImport_ImportModule("atexit"), *method = NULL, *arguments = NULL, *result = NULL;
    PyObject *callback = PyCFunction_NewEx ? PyCFunction_NewEx(&exit_method, NULL, NULL) : NULL;
    if (atexit) method = python->PyObject_GetAttrString(atexit, "register");
    if (callback && method) arguments = python->PyTuple_New(1);
    if (arguments) {
        python->Py_IncRef(callback); /* PyTuple_SetItem takes it */
        python->PyTuple_SetItem(arguments, 0, callback);
        result = python->PyObject_CallObject(method, arguments);
    }
    trtxpy_status status = TRTXPY_OK;
    if (!result) {
        exception raised = {0};
        if (python->PyErr_Occurred()) take_exception(python, &raised);
        status = trtxpy_fail(TRTXPY_PYTHON, "atexit.register failed: %s: %s", raised.type, raised.message);
    }
    PyObject *const owned[] = {atexit, method, callback, arguments, result};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        if (owned[i]) python->Py_DecRef(owned[i]);
    return status;
}
