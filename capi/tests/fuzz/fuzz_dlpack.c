/* DLManagedTensors with any fields: trtxpy_tensor_from_dlpack, and what the tensors that it makes can do;
 * trtxpy_tensor_to_dlpack of them and of the library's own.
 *
 * Shapes and strides have just `ndim` elements, the memory just the bytes that the fields describe: what is read beyond is seen.
 * Fields that describe more memory than there is are the caller's fault where the library cannot know; only then data is not
 * touched. */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct DLTensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
};

enum { MOST_BYTES = 1 << 16 };

static int deleted;

static void delete(struct DLManagedTensor *self) {
    MUST(self->manager_ctx == self);
    deleted++;
}

static int64_t extent(fuzz_input *input) {
    uint8_t kind = fuzz_byte(input);
    if (kind < 200) return kind % 7;
    if (kind < 220) return (int64_t)fuzz_number(input, 2);
    if (kind < 235) return (int64_t)fuzz_number(input, 8);
    static const int64_t edges[] = {-1, INT64_MAX, INT64_MIN, INT64_C(1) << 31, INT64_C(1) << 32, INT64_C(1) << 60, INT64_C(1) << 61};
    return edges[kind % 7];
}

static void fields(fuzz_input *input, struct DLManagedTensor *managed, int64_t **shape, int64_t **strides) {
    static const uint8_t codes[] = {0, 1, 2, 4, 6, 3, 5, 17}, bits[] = {8, 16, 32, 64, 1, 4, 0, 128};
    DLTensor *t = &managed->dl_tensor;
    uint8_t odd = fuzz_byte(input);
    t->dtype.code = codes[fuzz_byte(input) % 8];
    t->dtype.bits = bits[fuzz_byte(input) % 8];
    t->dtype.lanes = 1;
    t->device.type = 1 + 2 * (fuzz_byte(input) & 1);
    t->ndim = fuzz_byte(input) % 5;
    if (odd & 1) t->dtype.code = fuzz_byte(input);
    if (odd & 2) t->dtype.bits = fuzz_byte(input);
    if (odd & 4) t->dtype.lanes = (uint16_t)fuzz_number(input, 2);
    if (odd & 8) t->device.type = (int32_t)fuzz_number(input, fuzz_byte(input) & 1 ? 4 : 1);
    if (odd & 16) t->device.id = (int32_t)fuzz_number(input, 4);
    if (odd & 32) t->ndim = (int32_t)fuzz_number(input, fuzz_byte(input) & 1 ? 4 : 1);
    if (odd & 64) t->byte_offset = fuzz_number(input, fuzz_byte(input) & 1 ? 8 : 1);
    bool with_strides = fuzz_byte(input) & 1, right_strides = fuzz_byte(input) & 1;
    size_t axes = t->ndim > 0 && t->ndim <= 64 ? (size_t)t->ndim : 0;
    *shape = axes ? malloc(axes * sizeof **shape) : NULL;
    *strides = axes && with_strides ? malloc(axes * sizeof **strides) : NULL;
    for (size_t i = 0; i < axes; i++) (*shape)[i] = extent(input);
    uint64_t stride = 1;
    for (size_t i = axes; *strides && i-- > 0;) {
        (*strides)[i] = right_strides ? (int64_t)stride : extent(input);
        stride *= (uint64_t)(*shape)[i];
    }
    t->shape = odd & 128 && fuzz_byte(input) & 1 ? NULL : *shape;
    t->strides = *strides;
}

/* Bytes that the fields describe, as far as they are within what we give. */
static size_t described(const DLTensor *t) {
    uint64_t bytes = t->dtype.bits / 8;
    for (int32_t i = 0; i < t->ndim && i < 64 && t->shape; i++) {
        if (t->shape[i] < 0 || (t->shape[i] && bytes > MOST_BYTES / (uint64_t)t->shape[i])) return SIZE_MAX;
        bytes *= (uint64_t)t->shape[i];
    }
    return bytes + (t->byte_offset < MOST_BYTES ? t->byte_offset : 0);
}

static void export(trtxpy_tensor tensor, size_t bytes) {
    struct DLManagedTensor *first = NULL, *second = NULL;
    trtxpy_status status = DO(trtxpy_tensor_to_dlpack(tensor, &first));
    MUST((status == TRTXPY_OK) == (first != NULL));
    if (!first) return;
    MUST(DO(trtxpy_tensor_to_dlpack(tensor, &second)) == TRTXPY_OK);
    MUST(DO(trtxpy_tensor_destroy(tensor)) == TRTXPY_BORROWED);
    size_t elements = 1;
    for (int32_t i = 0; i < first->dl_tensor.ndim; i++) elements *= (size_t)first->dl_tensor.shape[i];
    MUST(elements * (first->dl_tensor.dtype.bits / 8u) == bytes);
    /* What was exported can be taken in; its deleter is the export's. */
    trtxpy_tensor again = NULL;
    if (DO(trtxpy_tensor_from_dlpack(fuzz_context, second, &again)) == TRTXPY_OK) {
        size_t there;
        MUST(DO(trtxpy_tensor_bytes(again, &there)) == TRTXPY_OK && there == bytes);
        MUST(DO(trtxpy_tensor_destroy(again)) == TRTXPY_OK);
    } else {
        second->deleter(second);
    }
    first->deleter(first);
}

static void use(trtxpy_tensor tensor, fuzz_input *input, bool touch) {
    size_t bytes;
    MUST(DO(trtxpy_tensor_bytes(tensor, &bytes)) == TRTXPY_OK);
    void *data;
    MUST(DO(trtxpy_tensor_data(tensor, &data)) == TRTXPY_OK);
    MUST((data != NULL) >= (bytes != 0));
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    MUST(DO(trtxpy_tensor_describe(tensor, &desc)) == TRTXPY_OK);
    if (touch && bytes <= MOST_BYTES) {
        uint8_t *copy = malloc(bytes ? bytes : 1);
        MUST(DO(trtxpy_tensor_read(tensor, copy, bytes)) == TRTXPY_OK);
        MUST(DO(trtxpy_tensor_write(tensor, copy, bytes)) == TRTXPY_OK);
        MUST(DO(trtxpy_tensor_read(tensor, copy, bytes + 1)) == TRTXPY_BUFFER_SIZE);
        free(copy);
    }
    trtxpy_shape other = {.rank = 1, .dims = {fuzz_byte(input)}};
    MUST(DO(trtxpy_tensor_resize(tensor, &other)) != TRTXPY_OK);
    export(tensor, bytes);
}

static void own_tensor(fuzz_input *input) {
    trtxpy_tensor_desc desc = TRTXPY_TENSOR_DESC_INIT;
    desc.dtype = fuzz_byte(input) % 20;
    desc.location = fuzz_byte(input) & 1;
    desc.shape.rank = fuzz_byte(input) % 9;
    for (int i = 0; i < desc.shape.rank; i++) desc.shape.dims[i] = fuzz_byte(input) % 4;
    trtxpy_tensor tensor;
    if (DO(trtxpy_tensor_create(fuzz_context, &desc, &tensor)) != TRTXPY_OK) return;
    size_t bytes;
    MUST(DO(trtxpy_tensor_bytes(tensor, &bytes)) == TRTXPY_OK);
    export(tensor, bytes);
    MUST(DO(trtxpy_tensor_destroy(tensor)) == TRTXPY_OK);
}

int LLVMFuzzerInitialize(int *count, char ***arguments) {
    (void)count, (void)arguments;
    fuzz_start();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t before = fuzz_live();
    fuzz_input input = {data, size};
    for (int round = 0; round < 4 && input.size; round++) {
        int64_t *shape, *strides;
        struct DLManagedTensor *managed = calloc(1, sizeof *managed);
        fields(&input, managed, &shape, &strides);
        managed->manager_ctx = managed;
        uint8_t how = fuzz_byte(&input);
        managed->deleter = how & 1 && how & 2 ? NULL : delete;
        size_t bytes = described(&managed->dl_tensor);
        bool whole = bytes <= 2 * MOST_BYTES && managed->dl_tensor.byte_offset < MOST_BYTES;
        bool cpu = managed->dl_tensor.device.type != 2;
        void *memory = whole && cpu ? malloc(bytes ? bytes : 1) : NULL;
        if (memory) memset(memory, 7, bytes);
        /* no memory, or an address that nobody may touch */
        managed->dl_tensor.data = memory ? memory : how & 4 ? NULL : (void *)(uintptr_t)(how & 8 ? 64 : UINTPTR_MAX - 63);
        if (memory && how & 16 && how & 32) managed->dl_tensor.data = NULL;
        deleted = 0;
        trtxpy_tensor tensor = (trtxpy_tensor)managed;
        trtxpy_status status = DO(trtxpy_tensor_from_dlpack(fuzz_context, managed, &tensor));
        MUST((status == TRTXPY_OK) == (tensor != NULL));
        if (tensor) {
            use(tensor, &input, memory != NULL);
            MUST(!deleted);
            MUST(DO(trtxpy_tensor_destroy(tensor)) == TRTXPY_OK);
            MUST(deleted == (managed->deleter ? 1 : 0));
        } else {
            MUST(!deleted);
        }
        free(memory);
        free(shape);
        free(strides);
        free(managed);
        own_tensor(&input);
    }
    fuzz_nothing_left(before);
    return 0;
}
