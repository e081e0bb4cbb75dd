/* DLPack at the Python boundary: capsules around memory of ours, and capsules of others taken over.
 *
 * The structures are those of DLPack 1.1 (dlpack.h), declared here because nothing else of it is needed. Both kinds of
 * capsule are made and taken: "dltensor", which every consumer knows, and "dltensor_versioned".
 */
#include "native.h"

#include <structmember.h>

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum { DLPACK_MAJOR = 1, DLPACK_MINOR = 1, MOST_DIMENSIONS = 64 };

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *manager;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

typedef struct dl_versioned {
    uint32_t major, minor;
    void *manager;
    void (*deleter)(struct dl_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_versioned;

static const char plain_name[] = "dltensor", plain_used[] = "used_dltensor";
static const char versioned_name[] = "dltensor_versioned", versioned_used[] = "used_dltensor_versioned";

/* ---- what we export ---- */

typedef struct {
    union {
        dl_managed plain;
        dl_versioned versioned;
    } managed;
    PyObject *owner;
    int64_t dimensions[]; /* the shape, then the strides */
} exported;

static bool is_finalizing(void) {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
}

/* Consumers call this from any thread, with or without the GIL, and after the interpreter has ended. A thread that asks for
 * the GIL of an interpreter that is ending never gets it: then the owner is left, and the process takes its memory along. */
static void let_go(exported *self) {
    if (Py_IsInitialized() && (!is_finalizing() || PyGILState_Check())) {
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(self->owner);
        PyGILState_Release(state);
    }
    free(self);
}

static void delete_plain(dl_managed *managed) { let_go(managed->manager); }

static void delete_versioned(dl_versioned *managed) { let_go(managed->manager); }

/* A capsule that nobody took goes with its tensor; one that was taken has another name by now. */
static void capsule_destroyed(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, versioned_name)) {
        dl_versioned *managed = PyCapsule_GetPointer(capsule, versioned_name);
        managed->deleter(managed);
    } else if (PyCapsule_IsValid(capsule, plain_name)) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, plain_name);
        managed->deleter(managed);
    }
}

/* Fills in shape and the strides of a C-contiguous tensor. False with an exception set. */
static bool fill_dimensions(exported *self, PyObject *shape, Py_ssize_t ndim, bool *empty) {
    int64_t stride = 1;
    *empty = false;
    for (Py_ssize_t i = ndim; i-- > 0;) {
        long long dimension = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
        if (dimension == -1 && PyErr_Occurred()) return false;
        if (dimension < 0) {
            PyErr_Format(PyExc_ValueError, "dimension %zd is %lld; expected 0 or more", i, dimension);
            return false;
        }
        self->dimensions[i] = dimension;
        self->dimensions[ndim + i] = stride;
        *empty = *empty || dimension == 0;
        if (__builtin_mul_overflow(stride, dimension ? dimension : 1, &stride)) {
            PyErr_SetString(PyExc_OverflowError, "shape has more elements than 64 bits can count");
            return false;
        }
    }
    return true;
}

static PyObject *dlpack_capsule(PyObject *module, PyObject *args) {
    (void)module;
    unsigned long long address;
    int device_type, device_id, versioned;
    PyObject *shape, *owner;
    unsigned char code, bits;
    if (!PyArg_ParseTuple(args, "KiiO!bbOp:dlpack_capsule", &address, &device_type, &device_id, &PyTuple_Type, &shape, &code,
                          &bits, &owner, &versioned))
        return NULL;
    Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    if (ndim > MOST_DIMENSIONS)
        return PyErr_Format(PyExc_ValueError, "shape has %zd dimensions; expected at most %d", ndim, MOST_DIMENSIONS);
    exported *self = calloc(1, sizeof *self + 2 * (size_t)ndim * sizeof(int64_t));
    if (!self) return PyErr_NoMemory();
    bool empty;
    if (!fill_dimensions(self, shape, ndim, &empty)) {
        free(self);
        return NULL;
    }
    dl_tensor tensor = {
        .data = empty ? NULL : (void *)(uintptr_t)address, /* as DLPack asks for a tensor of size zero */
        .device_type = device_type,
        .device_id = device_id,
        .ndim = (int32_t)ndim,
        .code = code,
        .bits = bits,
        .lanes = 1,
        .shape = self->dimensions,
        .strides = self->dimensions + ndim, /* NULL is no longer allowed, and never was needed */
    };
    PyObject *capsule;
    self->owner = owner;
    if (versioned) {
        self->managed.versioned = (dl_versioned){DLPACK_MAJOR, DLPACK_MINOR, self, delete_versioned, 0, tensor};
        capsule = PyCapsule_New(&self->managed.versioned, versioned_name, capsule_destroyed);
    } else {
        self->managed.plain = (dl_managed){tensor, self, delete_plain};
        capsule = PyCapsule_New(&self->managed.plain, plain_name, capsule_destroyed);
    }
    if (capsule)
        Py_INCREF(owner);
    else
        free(self);
    return capsule;
}

/* ---- what we import ---- */

typedef struct {
    PyObject_HEAD
    dl_managed *plain; /* one of the two, until it is deleted */
    dl_versioned *versioned;
    unsigned long long address, flags;
    int device_type, device_id;
    unsigned char code, bits;
    unsigned short lanes;
    PyObject *shape, *strides;
} tensor_object;

static void delete_tensor(tensor_object *self) {
    dl_managed *plain = self->plain;
    dl_versioned *versioned = self->versioned;
    self->plain = NULL;
    self->versioned = NULL;
    if (plain && plain->deleter) plain->deleter(plain);
    if (versioned && versioned->deleter) versioned->deleter(versioned);
}

static void tensor_dealloc(tensor_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    /* A deleter may run Python code of the producer's, and this may happen while an exception is on its way. */
#if PY_VERSION_HEX >= 0x030C0000
    PyObject *error = PyErr_GetRaisedException();
    delete_tensor(self);
    PyErr_SetRaisedException(error);
#else
    PyObject *error_type, *error, *traceback;
    PyErr_Fetch(&error_type, &error, &traceback);
    delete_tensor(self);
    PyErr_Restore(error_type, error, traceback);
#endif
    Py_XDECREF(self->shape);
    Py_XDECREF(self->strides);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* Takes the tensor out of its capsule: from here on `self` answers for its deletion. Returns it, NULL with an exception. */
static const dl_tensor *take(tensor_object *self, PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, versioned_name)) {
        dl_versioned *managed = PyCapsule_GetPointer(capsule, versioned_name);
        if (PyCapsule_SetName(capsule, versioned_used) < 0) return NULL;
        self->versioned = managed;
        if (managed->major != DLPACK_MAJOR) { /* the deleter is where it always was; nothing behind it can be trusted */
            PyErr_Format(PyExc_BufferError, "the tensor follows DLPack %u.%u; expected version %d", managed->major,
                         managed->minor, DLPACK_MAJOR);
            return NULL;
        }
        self->flags = managed->flags;
        return &managed->tensor;
    }
    if (PyCapsule_IsValid(capsule, plain_name)) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, plain_name);
        if (PyCapsule_SetName(capsule, plain_used) < 0) return NULL;
        self->plain = managed;
        return &managed->tensor;
    }
    if (PyCapsule_IsValid(capsule, versioned_used) || PyCapsule_IsValid(capsule, plain_used))
        PyErr_SetString(PyExc_BufferError, "the DLPack capsule was consumed before; ask the producer for another one");
    else
        PyErr_Format(PyExc_TypeError, "got a %.100s; expected a capsule named dltensor or dltensor_versioned",
                     Py_TYPE(capsule)->tp_name);
    return NULL;
}

static PyObject *tuple_of(const int64_t *values, int32_t count) {
    PyObject *tuple = PyTuple_New(count);
    for (int32_t i = 0; tuple && i < count; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (value)
            PyTuple_SET_ITEM(tuple, i, value);
        else
            Py_CLEAR(tuple);
    }
    return tuple;
}

static bool describe(tensor_object *self, const dl_tensor *tensor) {
    if (tensor->ndim < 0 || tensor->ndim > MOST_DIMENSIONS || (tensor->ndim && !tensor->shape)) {
        PyErr_Format(PyExc_BufferError, "the DLPack tensor has %d dimensions%s; expected 0 to %d", (int)tensor->ndim,
                     tensor->shape ? "" : " and no shape", MOST_DIMENSIONS);
        return false;
    }
    self->address = (unsigned long long)(uintptr_t)tensor->data + tensor->byte_offset;
    self->device_type = tensor->device_type;
    self->device_id = tensor->device_id;
    self->code = tensor->code;
    self->bits = tensor->bits;
    self->lanes = tensor->lanes;
    self->shape = tuple_of(tensor->shape, tensor->ndim);
    self->strides = tensor->strides ? tuple_of(tensor->strides, tensor->ndim) : Py_NewRef(Py_None);
    return self->shape && self->strides;
}

static PyObject *tensor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"capsule", NULL};
    PyObject *capsule;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:DLPackTensor", names, &capsule)) return NULL;
    tensor_object *self = (tensor_object *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    const dl_tensor *tensor = take(self, capsule);
    if (!tensor || !describe(self, tensor)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyMemberDef tensor_members[] = {
    {"address", T_ULONGLONG, offsetof(tensor_object, address), READONLY, "Of the first element."},
    {"flags", T_ULONGLONG, offsetof(tensor_object, flags), READONLY, "1 read-only, 2 a copy, 4 padded; 0 if unversioned."},
    {"device_type", T_INT, offsetof(tensor_object, device_type), READONLY, "DLDeviceType: 1 host, 2 CUDA, 13 managed."},
    {"device_id", T_INT, offsetof(tensor_object, device_id), READONLY, "Ordinal of the device."},
    {"code", T_UBYTE, offsetof(tensor_object, code), READONLY, "DLDataTypeCode."},
    {"bits", T_UBYTE, offsetof(tensor_object, bits), READONLY, "Of one lane."},
    {"lanes", T_USHORT, offsetof(tensor_object, lanes), READONLY, "1 but for vector types."},
    {"shape", T_OBJECT_EX, offsetof(tensor_object, shape), READONLY, "Tuple of int."},
    {"strides", T_OBJECT_EX, offsetof(tensor_object, strides), READONLY, "In elements; None: C-contiguous."},
    {NULL, 0, 0, 0, NULL},
};

/* PyType_Slot holds functions as void pointers, which ISO C has no conversion for; every CPython platform does. */
static PyType_Slot tensor_slots[] = {
    {Py_tp_doc, "DLPackTensor(capsule): takes the tensor of a DLPack capsule over; its deletion is the tensor's."},
    {Py_tp_new, (void *)tensor_new},
    {Py_tp_dealloc, (void *)tensor_dealloc},
    {Py_tp_members, tensor_members},
    {0, NULL},
};

static PyType_Spec tensor_spec = {
    .name = "trtx_py._native.DLPackTensor",
    .basicsize = sizeof(tensor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = tensor_slots,
};

static PyMethodDef functions[] = {
    {"dlpack_capsule", dlpack_capsule, METH_VARARGS,
     "dlpack_capsule(address, device_type, device_id, shape, code, bits, owner, versioned): a capsule around C-contiguous "
     "memory that holds a reference to owner until its consumer has done with it."},
    {NULL, NULL, 0, NULL},
};

int trtx_dlpack_register(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
    if (!type) return -1;
    int failed = PyModule_AddObjectRef(module, "DLPackTensor", type);
    Py_DECREF(type);
    return failed ? -1 : PyModule_AddFunctions(module, functions);
}
