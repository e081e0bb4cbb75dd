#define _GNU_SOURCE
#include "core.h"

#include <stdio.h>
#include <string.h>

typedef struct type_facts {
    const char *name;
    unsigned bits;
    bool integer, is_signed;
} type_facts;

static const type_facts *facts_of(trtxpy_dtype dtype) {
    static const type_facts webnn[] = {
        {"float32", 32, false, true}, {"float16", 16, false, true}, {"int32", 32, true, true}, {"uint32", 32, true, false},
        {"int64", 64, true, true},    {"uint64", 64, true, false},  {"int8", 8, true, true},   {"uint8", 8, true, false},
        {"int4", 4, true, true},      {"uint4", 4, true, false},
    };
    static const type_facts others[] = {{"bool", 8, true, false}, {"bfloat16", 16, false, true}, {"float8", 8, false, true}};
    if (dtype >= TRTXPY_FLOAT32 && dtype <= TRTXPY_UINT4) return &webnn[dtype];
    if (dtype >= TRTXPY_BOOL && dtype <= TRTXPY_FLOAT8) return &others[dtype - TRTXPY_BOOL];
    return NULL;
}

bool trtxpy_dtype_known(trtxpy_dtype dtype) {
    return facts_of(dtype) != NULL;
}

const char *trtxpy_dtype_name(trtxpy_dtype dtype) {
    const type_facts *facts = facts_of(dtype);
    return facts ? facts->name : NULL;
}

bool trtxpy_shape_equal(const trtxpy_shape *a, const trtxpy_shape *b) {
    if (a->rank != b->rank) return false;
    for (int32_t axis = 0; axis < a->rank; axis++)
        if (a->dims[axis] != b->dims[axis]) return false;
    return true;
}

char *trtxpy_shape_text(const trtxpy_shape *shape, char text[TRTXPY_SHAPE_TEXT]) {
    int end = snprintf(text, TRTXPY_SHAPE_TEXT, "(");
    for (int32_t axis = 0; axis < shape->rank && axis < TRTXPY_MAX_RANK && end < TRTXPY_SHAPE_TEXT - 30; axis++)
        end += snprintf(text + end, (size_t)(TRTXPY_SHAPE_TEXT - end), axis ? ", %lld" : "%lld", (long long)shape->dims[axis]);
    snprintf(text + end, (size_t)(TRTXPY_SHAPE_TEXT - end), ")");
    return text;
}

trtxpy_status trtxpy_shape_elements(const trtxpy_shape *shape, const char *what, size_t *elements) {
    char text[TRTXPY_SHAPE_TEXT];
    if (!shape) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is NULL; expected a shape", what);
    if (shape->rank < 0 || shape->rank > TRTXPY_MAX_RANK)
        return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s has rank %d; expected 0 to %d", what, (int)shape->rank, TRTXPY_MAX_RANK);
    size_t count = 1;
    bool empty = false;
    for (int32_t axis = 0; axis < shape->rank; axis++) {
        int64_t extent = shape->dims[axis];
        if (extent < 0)
            return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is %s; a tensor's axes are 0 or more", what,
                               trtxpy_shape_text(shape, text));
        if (extent == 0)
            empty = true;
        else if (__builtin_mul_overflow(count, (size_t)extent, &count) || count > (size_t)PTRDIFF_MAX / 8)
            return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s is %s, which is more than an address space holds", what,
                               trtxpy_shape_text(shape, text));
    }
    *elements = empty ? 0 : count;
    return TRTXPY_OK;
}

trtxpy_status trtxpy_shape_bytes(trtxpy_dtype dtype, const trtxpy_shape *shape, const char *what, size_t *bytes) {
    const type_facts *facts = facts_of(dtype);
    if (!facts) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "%s: there is no data type %d", what, (int)dtype);
    size_t elements;
    trtxpy_status status = trtxpy_shape_elements(shape, what, &elements);
    if (status == TRTXPY_OK) *bytes = facts->bits == 4 ? (elements + 1) / 2 : elements * (facts->bits / 8);
    return status;
}

trtxpy_status trtxpy_dtype_bytes(trtxpy_dtype dtype, const trtxpy_shape *shape, size_t *bytes) {
    trtxpy_begin();
    if (!bytes) return trtxpy_fail(TRTXPY_INVALID_ARGUMENT, "bytes is NULL; expected where to write the size");
    return trtxpy_shape_bytes(dtype, shape, "shape", bytes);
}

/* Every integer type as a 128-bit number: wide enough for int64 and uint64 at once. */
__extension__ typedef __int128 wide_int;

/* Memory of somebody else's, through DLPack, may begin anywhere. */
#define LOAD(type) (__extension__({ \
    type value_; \
    memcpy(&value_, bytes + index * sizeof value_, sizeof value_); \
    value_; \
}))
#define STORE(type) \
    do { \
        type value_ = (type)value; \
        memcpy(bytes + index * sizeof value_, &value_, sizeof value_); \
    } while (0)

static wide_int load(const void *from, trtxpy_dtype dtype, size_t index) {
    const unsigned char *bytes = from;
    switch (dtype) {
    case TRTXPY_INT32: return LOAD(int32_t);
    case TRTXPY_UINT32: return LOAD(uint32_t);
    case TRTXPY_INT64: return LOAD(int64_t);
    case TRTXPY_UINT64: return LOAD(uint64_t);
    case TRTXPY_INT8: return ((const int8_t *)from)[index];
    case TRTXPY_INT4: {
        int half = bytes[index / 2] >> (index % 2 * 4) & 15;
        return half >= 8 ? half - 16 : half;
    }
    case TRTXPY_UINT4: return bytes[index / 2] >> (index % 2 * 4) & 15;
    case TRTXPY_BOOL: return bytes[index] != 0;
    default: return bytes[index];
    }
}

static void store(void *to, trtxpy_dtype dtype, size_t index, wide_int value) {
    unsigned char *bytes = to;
    switch (dtype) {
    case TRTXPY_INT32: STORE(int32_t); break;
    case TRTXPY_UINT32: STORE(uint32_t); break;
    case TRTXPY_INT64: STORE(int64_t); break;
    case TRTXPY_UINT64: STORE(uint64_t); break;
    case TRTXPY_INT8: ((int8_t *)to)[index] = (int8_t)value; break;
    case TRTXPY_INT4:
    case TRTXPY_UINT4:
        if (index % 2) bytes[index / 2] = (unsigned char)(bytes[index / 2] | (unsigned)((int)value & 15) << 4);
        else bytes[index / 2] = (unsigned char)((int)value & 15); /* the last high half stays 0 */
        break;
    default: bytes[index] = (unsigned char)value; break;
    }
}

trtxpy_status trtxpy_convert(void *to, trtxpy_dtype to_type, const void *from, trtxpy_dtype from_type, size_t elements,
                             const char *name) {
    const type_facts *wanted = facts_of(to_type), *found = facts_of(from_type);
    if (to_type == from_type) {
        if (elements) memcpy(to, from, wanted->bits == 4 ? (elements + 1) / 2 : elements * (wanted->bits / 8));
        return TRTXPY_OK;
    }
    if (!wanted->integer || !found->integer)
        return trtxpy_fail(TRTXPY_UNSUPPORTED, "%s: %s is not converted to %s", name, found->name, wanted->name);
    unsigned bits = to_type == TRTXPY_BOOL ? 1 : wanted->bits;
    wide_int low = wanted->is_signed ? -((wide_int)1 << (bits - 1)) : 0;
    wide_int high = ((wide_int)1 << (wanted->is_signed ? bits - 1 : bits)) - 1;
    for (size_t index = 0; index < elements; index++) {
        wide_int value = load(from, from_type, index);
        if (value < low || value > high) {
            bool huge = value > INT64_MAX;
            return trtxpy_fail(TRTXPY_RANGE, huge ? "%s: element %zu is %llu, which %s cannot hold" : "%s: element %zu is %lld, which %s cannot hold",
                               name, index, (long long)value, wanted->name);
        }
        store(to, to_type, index, value);
    }
    return TRTXPY_OK;
}
