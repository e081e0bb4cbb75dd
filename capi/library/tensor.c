/* Tensors: memory that requests read and write. What is in use by a request is neither resized nor read meanwhile. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

bool trtxpy_tensor_begin_read(trtxpy_tensor_object *tensor) {
    int use = atomic_load_explicit(&tensor->use, memory_order_relaxed);
    while (use >= 0)
        if (atomic_compare_exchange_weak_explicit(&tensor->use, &use, use + 1, memory_order_acquire, memory_order_relaxed)) return true;
    return false;
}

bool trtxpy_tensor_begin_write(trtxpy_tensor_object *tensor) {
    int unused = 0;
    return atomic_compare_exchange_strong_explicit(&tensor->use, &unused, -1, memory_order_acquire, memory_order_relaxed);
}

void trtxpy_tensor_end_use(trtxpy_tensor_object *tensor, bool written) {
    if (written)
        atomic_store_explicit(&tensor->use, 0, memory_order_release);
    else
        atomic_fetch_sub_explicit(&tensor->use, 1, memory_order_release);
}

bool trtxpy_tensor_written(const trtxpy_tensor_object *tensor) {
    return atomic_load_explicit(&tensor->use, memory_order_acquire) < 0;
}

bool trtxpy_tensor_on_device(const trtxpy_tensor_object *tensor) {
    return tensor->location == TRTXPY_DEVICE || tensor->location == TRTXPY_FOREIGN_DEVICE;
}

static trtxpy_status busy(const char *what) {
    return trtxpy_fail(TRTXPY_BUSY, "%s: a request in flight or another call uses this tensor; wait for it", what);
}

trtxpy_status trtxpy_copy(trtxpy_context_object *context, void *to, bool to_device, const void *from, bool from_device,
                          size_t bytes) {
    if (bytes == 0) return TRTXPY_OK;
    if (!trtxpy_host_python()) return trtxpy_say_ended(); /* pinned memory went with it, too */
    if (!to_device && !from_device) {
        memcpy(to, from, bytes);
        return TRTXPY_OK;
    }
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return trtxpy_last_status();
    PyObject *result;
    trtxpy_status status = trtxpy_call(&scope, &result, "copy", "Opbpbu", context->py, to, to_device, from, from_device,
                                       (uint64_t)bytes);
    if (status == TRTXPY_OK) scope.py->Py_DecRef(result);
    trtxpy_scope_end(&scope);
    return status;
}

/* Memory for `bytes`: *buffer keeps it. */
static trtxpy_status allocate(trtxpy_context_object *context, trtxpy_location location, size_t bytes, PyObject **buffer,
                              void **data) {
    trtxpy_scope scope;
    if (!trtxpy_scope_begin(&scope)) return trtxpy_last_status();
    PyObject *result;
    trtxpy_status status = trtxpy_call(&scope, &result, "alloc", "Oui", context->py, (uint64_t)bytes, (int64_t)location);
    if (status == TRTXPY_OK) {
        trtxpy_reader reader = {scope.py, result, false};
        *buffer = trtxpy_read_object(&reader, 1);
        *data = (void *)(uintptr_t)trtxpy_read_unsigned(&reader, 2);
        if (reader.failed) status = trtxpy_fail(TRTXPY_INTERNAL, "alloc returned something else than was agreed on");
        else scope.py->Py_IncRef(*buffer);
        scope.py->Py_DecRef(result);
    }
    trtxpy_scope_end(&scope);
    return status;
}

trtxpy_status trtxpy_tensor_destroy(trtxpy_tensor handle) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_tensor_object *tensor = trtxpy_handle_retire(handle, TRTXPY_KIND_TENSOR, "tensor", &status);
    if (tensor) trtxpy_tensor_free(tensor);
    return status;
}

/* Keeps the thread's error as it was. */
static void give_memory_back(PyObject *buffer) {
    trtxpy_scope scope;
    if (!buffer || !trtxpy_host_python()) return;
    trtxpy_kept_error before = trtxpy_keep_error();
    if (trtxpy_scope_begin(&scope)) {
        PyObject *result;
        if (trtxpy_call(&scope, &result, "free", "O", buffer) == TRTXPY_OK) scope.py->Py_DecRef(result);
        scope.py->Py_DecRef(buffer);
        trtxpy_scope_end(&scope);
    }
    trtxpy_restore_error(&before);
}

/* With the tensor's mutex, or before anybody else knows the tensor. */
static void set_shape(trtxpy_tensor_object *tensor, const trtxpy_shape *shape, size_t elements, size_t bytes) {
    trtxpy_shape kept = {.rank = shape->rank};
    memcpy(kept.dims, shape->dims, (size_t)shape->rank * sizeof *shape->dims);
    tensor->shape = kept;
    tensor->elements = elements;
    tensor->bytes = bytes;
}

trtxpy_tensor_object *trtxpy_tensor_new(trtxpy_context_object *context, trtxpy_dtype dtype, trtxpy_location location,
                                        const trtxpy_shape *shape) {
    size_t elements, bytes;
    if (trtxpy_shape_bytes(dtype, shape, "the tensor", &bytes) != TRTXPY_OK) return NULL;
    if (trtxpy_shape_elements(shape, "the tensor", &elements) != TRTXPY_OK) return NULL;
    trtxpy_tensor_object *tensor = calloc(1, sizeof *tensor);
    if (!tensor) {
        trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for a tensor");
        return NULL;
    }
    tensor->context = context;
    tensor->dtype = dtype;
    tensor->location = location;
    pthread_mutex_init(&tensor->mutex, NULL);
    set_shape(tensor, shape, elements, bytes);
    atomic_fetch_add(&context->head.children, 1);
    atomic_fetch_add(&context->tensors, 1);
    return tensor;
}

void trtxpy_tensor_free(trtxpy_tensor_object *tensor) {
    trtxpy_context_object *context = tensor->context;
    if (tensor->foreign) trtxpy_dlpack_release(tensor->foreign);
    if (tensor->group) trtxpy_group_leave(tensor->group);
    give_memory_back(tensor->buffer);
    atomic_fetch_sub(&context->tensors, 1);
    atomic_fetch_sub(&context->head.children, 1);
    pthread_mutex_destroy(&tensor->mutex);
    free(tensor);
}

trtxpy_status trtxpy_tensor_create(trtxpy_context handle, const trtxpy_tensor_desc *given, trtxpy_tensor *tensor_handle) {
    if (tensor_handle) *tensor_handle = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!tensor_handle) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "tensor is NULL; expected where to write the handle");
    if (!given) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "desc is NULL; expected type, place and shape");
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    status = trtxpy_read_struct(&desc, sizeof desc, TRTXPY_SIZE_1_0(trtxpy_tensor_desc), given, "trtxpy_tensor_desc");
    if (status != TRTXPY_OK) return status;
    if (desc.location != TRTXPY_HOST && desc.location != TRTXPY_DEVICE)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "desc.location is %d; expected TRTXPY_HOST or TRTXPY_DEVICE", (int)desc.location);
    trtxpy_context_object *context = trtxpy_handle_acquire(handle, TRTXPY_KIND_CONTEXT, "context");
    if (!context) return TRTXPY_INVALID_HANDLE;
    trtxpy_tensor_object *tensor = trtxpy_tensor_new(context, desc.dtype, desc.location, &desc.shape);
    if (tensor) {
        status = allocate(context, desc.location, tensor->bytes, &tensor->buffer, &tensor->data);
        tensor->capacity = tensor->bytes;
        if (status == TRTXPY_OK && !(*tensor_handle = (trtxpy_tensor)trtxpy_handle_make(TRTXPY_KIND_TENSOR, &tensor->head)))
            status = trtxpy_last_status();
        if (status != TRTXPY_OK) trtxpy_tensor_free(tensor);
    } else {
        status = trtxpy_last_status();
    }
    trtxpy_handle_release(&context->head);
    return status;
}

trtxpy_status trtxpy_tensor_reshape(trtxpy_tensor_object *tensor, const trtxpy_shape *shape) {
    size_t elements, bytes;
    trtxpy_status status = trtxpy_shape_bytes(tensor->dtype, shape, "the new shape", &bytes);
    if (status == TRTXPY_OK) status = trtxpy_shape_elements(shape, "the new shape", &elements);
    if (status != TRTXPY_OK) return status;
    if (tensor->group || tensor->foreign)
        return trtxpy_fail(TRTXPY_UNSUPPORTED, "this tensor cannot be resized: its memory is %s",
                           tensor->group ? "a captured graph's" : "somebody else's");
    PyObject *surplus = NULL; /* what nobody needs afterwards */
    void *data = NULL;
    if (bytes > tensor->capacity) {
        status = allocate(tensor->context, tensor->location, bytes, &surplus, &data);
        if (status != TRTXPY_OK) return status;
    }
    pthread_mutex_lock(&tensor->mutex);
    if (atomic_load(&tensor->head.children)) {
        status = TRTXPY_BORROWED;
    } else {
        if (surplus) {
            PyObject *before = tensor->buffer;
            tensor->buffer = surplus;
            tensor->data = data;
            tensor->capacity = bytes;
            surplus = before;
        }
        set_shape(tensor, shape, elements, bytes);
    }
    pthread_mutex_unlock(&tensor->mutex);
    give_memory_back(surplus);
    if (status == TRTXPY_OK) return TRTXPY_OK;
    return trtxpy_fail(TRTXPY_BORROWED, "this tensor cannot be resized: a DLPack tensor that was exported from it is in use");
}

trtxpy_status trtxpy_tensor_resize(trtxpy_tensor handle, const trtxpy_shape *shape) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_tensor_object *tensor = trtxpy_handle_acquire(handle, TRTXPY_KIND_TENSOR, "tensor");
    if (!tensor) return TRTXPY_INVALID_HANDLE;
    if (trtxpy_tensor_begin_write(tensor)) {
        status = trtxpy_tensor_reshape(tensor, shape);
        trtxpy_tensor_end_use(tensor, true);
    } else {
        status = busy("trtxpy_tensor_resize");
    }
    trtxpy_handle_release(&tensor->head);
    return status;
}

trtxpy_status trtxpy_tensor_describe(trtxpy_tensor handle, trtxpy_tensor_desc *desc) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_tensor_object *tensor = trtxpy_handle_acquire(handle, TRTXPY_KIND_TENSOR, "tensor");
    if (!tensor) return TRTXPY_INVALID_HANDLE;
    trtxpy_tensor_desc found = {sizeof found, tensor->dtype, tensor->location, {0}};
    pthread_mutex_lock(&tensor->mutex); /* and no use of the tensor, which would keep a request from it */
    found.shape = tensor->shape;
    pthread_mutex_unlock(&tensor->mutex);
    status = trtxpy_write_struct(desc, &found, sizeof found, TRTXPY_SIZE_1_0(trtxpy_tensor_desc), "desc");
    trtxpy_handle_release(&tensor->head);
    return status;
}

trtxpy_status trtxpy_tensor_bytes(trtxpy_tensor handle, size_t *bytes) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!bytes) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "bytes is NULL; expected where to write the size");
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    if ((status = trtxpy_tensor_describe(handle, &desc)) != TRTXPY_OK) return status;
    return trtxpy_shape_bytes(desc.dtype, &desc.shape, "tensor", bytes);
}

static trtxpy_status check_buffer(const trtxpy_tensor_object *tensor, const void *data, size_t bytes, const char *function) {
    char text[TRTXPY_SHAPE_TEXT];
    if (bytes != tensor->bytes)
        return trtxpy_fail(TRTXPY_BUFFER_SIZE, "%s: the buffer has %zu bytes; a tensor of %s %s has %zu", function, bytes,
                           trtxpy_dtype_name(tensor->dtype), trtxpy_shape_text(&tensor->shape, text), tensor->bytes);
    if (!data && bytes) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s: data is NULL; expected %zu bytes", function, bytes);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_tensor_write(trtxpy_tensor handle, const void *data, size_t bytes) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_tensor_object *tensor = trtxpy_handle_acquire(handle, TRTXPY_KIND_TENSOR, "tensor");
    if (!tensor) return TRTXPY_INVALID_HANDLE;
    if (trtxpy_tensor_begin_write(tensor)) {
        status = check_buffer(tensor, data, bytes, "trtxpy_tensor_write");
        if (status == TRTXPY_OK)
            status = trtxpy_copy(tensor->context, tensor->data, trtxpy_tensor_on_device(tensor), data, false, bytes);
        trtxpy_tensor_end_use(tensor, true);
    } else {
        status = busy("trtxpy_tensor_write");
    }
    trtxpy_handle_release(&tensor->head);
    return status;
}

trtxpy_status trtxpy_tensor_read(trtxpy_tensor handle, void *data, size_t bytes) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    trtxpy_tensor_object *tensor = trtxpy_handle_acquire(handle, TRTXPY_KIND_TENSOR, "tensor");
    if (!tensor) return TRTXPY_INVALID_HANDLE;
    if (trtxpy_tensor_begin_read(tensor)) {
        status = check_buffer(tensor, data, bytes, "trtxpy_tensor_read");
        if (status == TRTXPY_OK)
            status = trtxpy_copy(tensor->context, data, false, tensor->data, trtxpy_tensor_on_device(tensor), bytes);
        trtxpy_tensor_end_use(tensor, false);
    } else {
        status = busy("trtxpy_tensor_read");
    }
    trtxpy_handle_release(&tensor->head);
    return status;
}

trtxpy_status trtxpy_tensor_data(trtxpy_tensor handle, void **data) {
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!data) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "data is NULL; expected where to write the address");
    trtxpy_tensor_object *tensor = trtxpy_handle_acquire(handle, TRTXPY_KIND_TENSOR, "tensor");
    if (!tensor) return TRTXPY_INVALID_HANDLE;
    pthread_mutex_lock(&tensor->mutex);
    void *found = tensor->bytes ? tensor->data : NULL;
    /* What is written may be resized, and its memory be another's then. */
    bool changes = trtxpy_tensor_written(tensor) && !tensor->group && !tensor->foreign;
    pthread_mutex_unlock(&tensor->mutex);
    if (changes) status = busy("trtxpy_tensor_data");
    else *data = found;
    trtxpy_handle_release(&tensor->head);
    return status;
}
