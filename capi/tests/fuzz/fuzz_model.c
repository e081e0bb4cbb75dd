/* ONNX models: trtxpy_graph_from_onnx, trtxpy_graph_from_file, trtxpy_run, trtxpy_run_zeroed.
 * A unit is the model, its external weights and FUZZ_CONTROL bytes that choose. Most mutations change one field of the protobuf
 * and the lengths around it: what blind ones make seldom decodes. */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

enum { MOST = 8192, FIELDS = 1024, LENGTH_DELIMITED = 2 };

typedef struct field {
    size_t start, value, end; /* of the tag, of what it holds, and behind it */
    int wire, parent;
} field;

static field fields[FIELDS];
static int field_count;

static bool read_varint(const uint8_t *data, size_t end, size_t *at, uint64_t *value) {
    *value = 0;
    for (int shift = 0; shift < 64 && *at < end; shift += 7) {
        uint8_t byte = data[(*at)++];
        *value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) return true;
    }
    return false;
}

static size_t write_varint(uint8_t *to, uint64_t value) {
    size_t count = 0;
    for (; value > 127; value >>= 7) to[count++] = (uint8_t)(value | 128);
    to[count++] = (uint8_t)value;
    return count;
}

/* The fields between `at` and `end`, those inside of them too; false and none where that is no message. */
static bool walk(const uint8_t *data, size_t at, size_t end, int parent) {
    int before = field_count;
    while (at < end && field_count < FIELDS) {
        field *f = &fields[field_count++];
        uint64_t tag, length = 0;
        *f = (field){.start = at, .parent = parent};
        bool good = read_varint(data, end, &at, &tag) && tag >> 3 && tag >> 3 < 1024;
        f->wire = (int)(tag & 7);
        f->value = at;
        if (good && f->wire == 0) good = read_varint(data, end, &at, &length);
        else if (good && f->wire == LENGTH_DELIMITED) {
            good = read_varint(data, end, &at, &length) && length <= end - at;
            f->value = at;
            at += good ? (size_t)length : 0;
        } else if (good) {
            size_t bytes = f->wire == 1 ? 8 : f->wire == 5 ? 4 : SIZE_MAX;
            good = bytes <= end - at;
            at += good ? bytes : 0;
        }
        if (!good) {
            field_count = before;
            return false;
        }
        f->end = at;
        if (f->wire == LENGTH_DELIMITED && length) walk(data, f->value, at, (int)(f - fields));
    }
    return true;
}

static size_t changed_value(const uint8_t *data, const field *f, uint8_t *to, unsigned *seed) {
    static const uint64_t values[] = {0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 20, 21, 22, 23, 127, 255, 65536, INT32_MAX,
                                      UINT32_MAX, INT64_MAX, UINT64_MAX, UINT64_C(1) << 32, UINT64_C(1) << 63};
    size_t size = f->value - f->start;
    if (f->wire == 0) {
        memcpy(to, data + f->start, size);
        return size + write_varint(to + size, values[(size_t)rand_r(seed) % (sizeof values / sizeof *values)]);
    }
    static uint8_t content[512];
    size_t length = f->end - f->value;
    if (f->wire != LENGTH_DELIMITED || length > sizeof content) {
        memcpy(to, data + f->start, f->end - f->start);
        to[size] ^= (uint8_t)(1 << rand_r(seed) % 8);
        return f->end - f->start;
    }
    memcpy(content, data + f->value, length);
    length = LLVMFuzzerMutate(content, length, sizeof content);
    size_t tag = f->start;
    uint64_t ignored;
    read_varint(data, f->end, &tag, &ignored);
    size = tag - f->start;
    memcpy(to, data + f->start, size);
    size += write_varint(to + size, length);
    memcpy(to + size, content, length);
    return size + length;
}

/* One field changed, copied, left out or put in the place of another one; 0 if it becomes too large. */
static size_t change_field(const uint8_t *data, size_t size, uint8_t *out, size_t most, unsigned *seed) {
    static uint8_t made[2 * MOST], outer[2 * MOST];
    const field *f = &fields[rand_r(seed) % field_count], *other = &fields[rand_r(seed) % field_count];
    size_t length = f->end - f->start;
    switch (rand_r(seed) % 8) {
    case 0: length = 0; break;
    case 1:
        memcpy(made, data + f->start, length);
        memcpy(made + length, data + f->start, length);
        length *= 2;
        break;
    case 2:
        length = other->end - other->start;
        memcpy(made, data + other->start, length);
        break;
    default: length = changed_value(data, f, made, seed); break;
    }
    for (;;) { /* outwards: each message around it has another length now */
        const field *around = f->parent < 0 ? NULL : &fields[f->parent];
        size_t begin = around ? around->value : 0, end = around ? around->end : size, at = 0;
        if ((f->start - begin) + length + (end - f->end) + 32 > (around ? sizeof outer : most)) return 0;
        if (around) {
            uint64_t ignored;
            size_t tag = around->start;
            read_varint(data, around->end, &tag, &ignored);
            memcpy(outer, data + around->start, at = tag - around->start);
            at += write_varint(outer + at, (f->start - begin) + length + (end - f->end));
        }
        uint8_t *to = around ? outer : out;
        memcpy(to + at, data + begin, f->start - begin);
        memcpy(to + at + (f->start - begin), made, length);
        memcpy(to + at + (f->start - begin) + length, data + f->end, end - f->end);
        length = at + (f->start - begin) + length + (end - f->end);
        if (!around) return length;
        memcpy(made, outer, length);
        f = around;
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static uint8_t out[MOST];
    if (size < FUZZ_CONTROL || size > MOST / 2 || most > MOST || rand_r(&seed) % 16 == 0) return LLVMFuzzerMutate(data, size, most);
    uint8_t control[FUZZ_CONTROL];
    memcpy(control, data + size - FUZZ_CONTROL, FUZZ_CONTROL);
    if (rand_r(&seed) % 8 == 0) LLVMFuzzerMutate(control, FUZZ_CONTROL, FUZZ_CONTROL);
    size_t model = size - FUZZ_CONTROL, weights = control[1] <= model ? control[1] : 0;
    model -= weights;
    field_count = 0;
    if (!walk(data, 0, model, -1) || !field_count) return LLVMFuzzerMutate(data, size, most);
    size_t made = change_field(data, model, out, most - FUZZ_CONTROL - weights, &seed);
    if (!made && model) return LLVMFuzzerMutate(data, size, most);
    memcpy(out + made, data + model, weights);
    memcpy(out + made + weights, control, FUZZ_CONTROL);
    memcpy(data, out, made + weights + FUZZ_CONTROL);
    return made + weights + FUZZ_CONTROL;
}

int LLVMFuzzerInitialize(int *count, char ***arguments) {
    (void)count, (void)arguments;
    fuzz_start();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_use_model(data, size, false);
    return 0;
}
