/* DLPack, its unversioned struct: https://dmlc.github.io/dlpack/latest/c_api.html, declared here so that no header is needed. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum { CPU = 1, CUDA = 2, CUDA_HOST = 3 };
enum { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4, BOOL = 6 };

typedef struct device_of {
    int32_t type, id;
} device_of;

typedef struct type_of {
    uint8_t code, bits;
    uint16_t lanes;
} type_of;

struct DLTensor {
    void *data;
    device_of device;
    int32_t ndim;
    type_of dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLManagedTensor {
    struct DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
};

typedef struct known_type {
    trtxpy_dtype dtype;
    uint8_t code, bits;
} known_type;

static const known_type types[] = {
    {TRTXPY_FLOAT32, FLOAT, 32}, {TRTXPY_FLOAT16, FLOAT, 16}, {TRTXPY_INT32, INT, 32}, {TRTXPY_UINT32, UINT, 32},
    {TRTXPY_INT64, INT, 64},     {TRTXPY_UINT64, UINT, 64},   {TRTXPY_INT8, INT, 8},   {TRTXPY_UINT8, UINT, 8},
    {TRTXPY_BOOL, BOOL, 8},      {TRTXPY_BFLOAT16, BFLOAT, 16},
};
enum { TYPES = sizeof types / sizeof *types };

void trtxpy_dlpack_release(struct DLManagedTensor *managed) {
    if (managed->deleter) managed->deleter(managed);
}

static trtxpy_status understand(const trtxpy_context_object *context, const struct DLTensor *given, trtxpy_dtype *dtype,
                                trtxpy_location *location, trtxpy_shape *shape) {
    *dtype = -1;
    for (size_t i = 0; i < TYPES; i++)
        if (types[i].code == given->dtype.code && types[i].bits == given->dtype.bits && given->dtype.lanes == 1) *dtype = types[i].dtype;
    if (*dtype < 0)
        return trtxpy_fail(TRTXPY_UNSUPPORTED, "managed has DLPack type code %d with %d bits and %d lanes, which is no type of this library",
                           given->dtype.code, given->dtype.bits, given->dtype.lanes);
    if (given->device.type != CPU && given->device.type != CUDA_HOST && given->device.type != CUDA)
        return trtxpy_fail(TRTXPY_UNSUPPORTED, "managed lies on DLPack device type %d; expected the CPU, pinned memory or CUDA",
                           (int)given->device.type);
    *location = given->device.type == CUDA ? TRTXPY_FOREIGN_DEVICE : TRTXPY_FOREIGN_HOST;
    if (*location == TRTXPY_FOREIGN_DEVICE && given->device.id != context->info.device)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "managed lies on GPU %d, and the context is of GPU %d", (int)given->device.id,
                           (int)context->info.device);
    if (given->ndim < 0 || given->ndim > TRTXPY_MAX_RANK || (given->ndim && !given->shape))
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "managed has %d axes; expected 0 to %d", (int)given->ndim, TRTXPY_MAX_RANK);
    memset(shape, 0, sizeof *shape);
    shape->rank = given->ndim;
    if (given->ndim) memcpy(shape->dims, given->shape, (size_t)given->ndim * sizeof *given->shape);
    size_t elements;
    trtxpy_status status = trtxpy_shape_elements(shape, "managed", &elements);
    if (status != TRTXPY_OK) return status;
    if (elements && !given->data) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "managed has elements and no memory");
    size_t bytes;
    uint64_t end;
    if ((status = trtxpy_shape_bytes(*dtype, shape, "managed", &bytes)) != TRTXPY_OK) return status;
    if (elements && (__builtin_add_overflow((uintptr_t)given->data, given->byte_offset, &end) || __builtin_add_overflow(end, bytes, &end)))
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "managed has %zu bytes from byte %llu of %p on, beyond the end of the address space", bytes,
                           (unsigned long long)given->byte_offset, given->data);
    int64_t stride = 1;
    for (int32_t axis = given->ndim - 1; given->strides && elements > 1 && axis >= 0; axis--) {
        if (shape->dims[axis] != 1 && given->strides[axis] != stride)
            return trtxpy_fail(TRTXPY_UNSUPPORTED, "managed is not C-contiguous: axis %d has stride %lld; expected %lld", (int)axis,
                               (long long)given->strides[axis], (long long)stride);
        stride *= shape->dims[axis];
    }
    return TRTXPY_OK;
}

trtxpy_status trtxpy_tensor_from_dlpack(trtxpy_context handle, struct DLManagedTensor *managed, trtxpy_tensor *tensor_handle) {
    if (tensor_handle) *tensor_handle = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!managed || !tensor_handle)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is NULL", managed ? "tensor" : "managed");
    trtxpy_context_object *context = trtxpy_handle_acquire(handle, TRTXPY_KIND_CONTEXT, "context");
    if (!context) return TRTXPY_INVALID_HANDLE;
    trtxpy_dtype dtype;
    trtxpy_location location = TRTXPY_FOREIGN_HOST;
    trtxpy_shape shape;
    status = understand(context, &managed->dl_tensor, &dtype, &location, &shape);
    trtxpy_tensor_object *tensor = status == TRTXPY_OK ? trtxpy_tensor_new(context, dtype, location, &shape) : NULL;
    if (tensor) {
        tensor->data = tensor->bytes ? (char *)managed->dl_tensor.data + managed->dl_tensor.byte_offset : NULL;
        tensor->capacity = tensor->bytes;
        *tensor_handle = (trtxpy_tensor)trtxpy_handle_make(TRTXPY_KIND_TENSOR, &tensor->head);
        if (*tensor_handle) tensor->foreign = managed;
        else trtxpy_tensor_free(tensor);
    }
    status = trtxpy_last_status();
    trtxpy_handle_release(&context->head);
    return status;
}

typedef struct export {
    struct DLManagedTensor managed;
    trtxpy_tensor_object *tensor;
    int64_t shape[TRTXPY_MAX_RANK], strides[TRTXPY_MAX_RANK];
} export;

static void end_export(struct DLManagedTensor *managed) {
    export *given = managed->manager_ctx;
    atomic_fetch_sub(&given->tensor->head.children, 1);
    free(given);
}

/* With the tensor's mutex. */
static void fill_export(export *given, trtxpy_tensor_object *tensor, const known_type *type) {
    bool device = trtxpy_tensor_on_device(tensor);
    int64_t stride = 1;
    atomic_fetch_add(&tensor->head.children, 1);
    for (int32_t axis = tensor->shape.rank - 1; axis >= 0; axis--) {
        given->shape[axis] = tensor->shape.dims[axis];
        given->strides[axis] = stride;
        stride *= tensor->shape.dims[axis];
    }
    given->tensor = tensor;
    given->managed = (struct DLManagedTensor){
        .dl_tensor = {.data = tensor->bytes ? tensor->data : NULL,
                      .device = {device ? CUDA : tensor->location == TRTXPY_HOST ? CUDA_HOST : CPU,
                                 device ? tensor->context->info.device : 0},
                      .ndim = tensor->shape.rank,
                      .dtype = {type->code, type->bits, 1},
                      .shape = given->shape,
                      .strides = given->strides},
        .manager_ctx = given,
        .deleter = end_export};
}

trtxpy_status trtxpy_tensor_to_dlpack(trtxpy_tensor handle, struct DLManagedTensor **managed) {
    if (managed) *managed = NULL;
    trtxpy_status status = trtxpy_enter();
    if (status != TRTXPY_OK) return status;
    if (!managed) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "managed is NULL; expected where to write the tensor");
    trtxpy_tensor_object *tensor = trtxpy_handle_acquire(handle, TRTXPY_KIND_TENSOR, "tensor");
    if (!tensor) return TRTXPY_INVALID_HANDLE;
    size_t type = 0;
    while (type < TYPES && types[type].dtype != tensor->dtype) type++;
    export *given = type < TYPES ? calloc(1, sizeof *given) : NULL;
    if (type == TYPES)
        status = trtxpy_fail(TRTXPY_UNSUPPORTED, "DLPack's unversioned struct has no %s", trtxpy_dtype_name(tensor->dtype));
    else if (!given)
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no memory for a DLPack tensor");
    else {
        pthread_mutex_lock(&tensor->mutex); /* whoever resizes it looks for children with this lock */
        if (trtxpy_tensor_written(tensor))
            status = trtxpy_fail(TRTXPY_BUSY, "trtxpy_tensor_to_dlpack: a request in flight writes this tensor; wait for it");
        else
            fill_export(given, tensor, &types[type]);
        pthread_mutex_unlock(&tensor->mutex);
        if (status == TRTXPY_OK) *managed = &given->managed;
        else free(given);
    }
    trtxpy_handle_release(&tensor->head);
    return status;
}
