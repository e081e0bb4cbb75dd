/* Handles and conversions: what needs no Python. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

#define CHECK_DETAIL trtxpy_last_error()
#include "../check.h"

typedef struct thing {
    trtxpy_head head;
    int value;
} thing;

static void handles_name_one_life(void) {
    thing *a = calloc(1, sizeof *a);
    uintptr_t first = trtxpy_handle_make(TRTXPY_KIND_TENSOR, &a->head);
    CHECK(first & 1);
    CHECK(trtxpy_handle_acquire((void *)first, TRTXPY_KIND_TENSOR, "t") == a);
    CHECK(trtxpy_handle_acquire((void *)first, TRTXPY_KIND_GRAPH, "g") == NULL); /* another kind */
    CHECK_EQ(trtxpy_last_status(), TRTXPY_INVALID_HANDLE);
    trtxpy_status status;
    CHECK(trtxpy_handle_retire((void *)first, TRTXPY_KIND_TENSOR, "t", &status) == NULL); /* in use */
    CHECK_EQ(status, TRTXPY_BORROWED);
    trtxpy_handle_release(&a->head);
    atomic_store(&a->head.children, 1);
    CHECK(trtxpy_handle_retire((void *)first, TRTXPY_KIND_TENSOR, "t", &status) == NULL);
    CHECK_EQ(status, TRTXPY_BORROWED);
    CHECK(strstr(trtxpy_last_error(), "1 open children") != NULL);
    atomic_store(&a->head.children, 0);
    CHECK(trtxpy_handle_retire((void *)first, TRTXPY_KIND_TENSOR, "t", &status) == a);
    CHECK(trtxpy_handle_acquire((void *)first, TRTXPY_KIND_TENSOR, "t") == NULL);
    CHECK(trtxpy_handle_retire((void *)first, TRTXPY_KIND_TENSOR, "t", &status) == NULL);
    CHECK_EQ(status, TRTXPY_INVALID_HANDLE);
    /* the generation in between, which nobody was ever given */
    CHECK(trtxpy_handle_acquire((void *)(first + ((uintptr_t)1 << 32)), TRTXPY_KIND_TENSOR, "t") == NULL);
    CHECK_EQ(trtxpy_last_status(), TRTXPY_INVALID_HANDLE);
    CHECK(trtxpy_handle_retire((void *)(first + ((uintptr_t)1 << 32)), TRTXPY_KIND_TENSOR, "t", &status) == NULL);
    CHECK_EQ(status, TRTXPY_INVALID_HANDLE);
    uintptr_t second = trtxpy_handle_make(TRTXPY_KIND_TENSOR, &a->head); /* the same entry, another life */
    CHECK(second != first);
    CHECK(trtxpy_handle_acquire((void *)first, TRTXPY_KIND_TENSOR, "t") == NULL);
    CHECK(trtxpy_handle_retire(NULL, TRTXPY_KIND_TENSOR, "t", &status) == NULL);
    CHECK_EQ(status, TRTXPY_OK);
    CHECK(trtxpy_handle_retire((void *)second, TRTXPY_KIND_TENSOR, "t", &status) == a);
    CHECK_EQ(trtxpy_handle_count(), 0);
    free(a);
}

static void numbers_that_are_no_handles_are_refused(void) {
    unsigned seed = 7;
    for (int i = 0; i < 200000; i++) {
        uintptr_t number = ((uintptr_t)rand_r(&seed) << 33) ^ ((uintptr_t)rand_r(&seed) << 8) ^ (uintptr_t)rand_r(&seed);
        trtxpy_status status;
        for (int kind = TRTXPY_KIND_CONTEXT; kind <= TRTXPY_KIND_RESULTS; kind++) {
            CHECK(trtxpy_handle_acquire((void *)number, (trtxpy_kind)kind, "x") == NULL);
            CHECK(trtxpy_handle_retire((void *)number, (trtxpy_kind)kind, "x", &status) == NULL);
        }
    }
}

static void many_handles_are_kept_apart(void) {
    enum { COUNT = 5000 };
    static thing things[COUNT];
    static uintptr_t handles[COUNT];
    trtxpy_status status;
    for (int i = 0; i < COUNT; i++) CHECK((handles[i] = trtxpy_handle_make(TRTXPY_KIND_QUEUE, &things[i].head)) != 0);
    CHECK_EQ(trtxpy_handle_count(), COUNT);
    for (int i = 0; i < COUNT; i++) {
        CHECK(trtxpy_handle_acquire((void *)handles[i], TRTXPY_KIND_QUEUE, "q") == &things[i]);
        trtxpy_handle_release(&things[i].head);
    }
    for (int i = 0; i < COUNT; i++) CHECK(trtxpy_handle_retire((void *)handles[i], TRTXPY_KIND_QUEUE, "q", &status) == &things[i]);
}

static uintptr_t shared;
static atomic_int winners, borrowed, invalid;

static void *destroy(void *unused) {
    (void)unused;
    for (;;) {
        trtxpy_status status;
        thing *mine = trtxpy_handle_retire((void *)shared, TRTXPY_KIND_GRAPH, "g", &status);
        if (mine) {
            mine->value++;
            atomic_fetch_add(&winners, 1);
            return NULL;
        }
        if (status == TRTXPY_INVALID_HANDLE) {
            atomic_fetch_add(&invalid, 1);
            return NULL;
        }
        atomic_fetch_add(&borrowed, 1);
    }
}

static void *use(void *unused) {
    (void)unused;
    for (thing *mine; (mine = trtxpy_handle_acquire((void *)shared, TRTXPY_KIND_GRAPH, "g"));) {
        CHECK_EQ(mine->value, 0); /* not while somebody has it */
        trtxpy_handle_release(&mine->head);
    }
    return NULL;
}

static void sixty_four_threads_destroy_one_object(void) {
    for (int round = 0; round < 20; round++) {
        thing it = {.value = 0};
        pthread_t threads[64];
        atomic_store(&winners, 0);
        atomic_store(&invalid, 0);
        shared = trtxpy_handle_make(TRTXPY_KIND_GRAPH, &it.head);
        for (int i = 0; i < 64; i++) pthread_create(&threads[i], NULL, i % 8 ? destroy : use, NULL);
        for (int i = 0; i < 64; i++) pthread_join(threads[i], NULL);
        CHECK_EQ(atomic_load(&winners), 1);
        CHECK_EQ(atomic_load(&invalid), 55);
        CHECK_EQ(it.value, 1);
    }
}

static void sizes_are_checked(void) {
    size_t bytes = 77;
    trtxpy_shape shape = {2, 0, {3, 5}};
    CHECK_EQ(trtxpy_dtype_bytes(TRTXPY_FLOAT32, &shape, &bytes), TRTXPY_OK);
    CHECK_EQ(bytes, 60);
    CHECK_EQ(trtxpy_dtype_bytes(TRTXPY_UINT4, &shape, &bytes), TRTXPY_OK);
    CHECK_EQ(bytes, 8);
    shape = (trtxpy_shape){0};
    CHECK_EQ(trtxpy_dtype_bytes(TRTXPY_INT64, &shape, &bytes), TRTXPY_OK);
    CHECK_EQ(bytes, 8);
    bytes = 77;
    const trtxpy_shape bad[] = {{-1, 0, {0}},
                                {9, 0, {0}},
                                {1, 0, {-1}},
                                {2, 0, {INT64_MAX, 2}},
                                {3, 0, {1 << 30, 1 << 30, 16}},
                                {2, 0, {0, -5}}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) CHECK_EQ(trtxpy_dtype_bytes(TRTXPY_FLOAT32, &bad[i], &bytes), TRTXPY_INVALID_ARGUMENT);
    CHECK_EQ(trtxpy_dtype_bytes(10, &shape, &bytes), TRTXPY_INVALID_ARGUMENT);
    CHECK_EQ(trtxpy_dtype_bytes(-1, &shape, &bytes), TRTXPY_INVALID_ARGUMENT);
    CHECK_EQ(trtxpy_dtype_bytes(TRTXPY_INT8, NULL, &bytes), TRTXPY_INVALID_ARGUMENT);
    CHECK_EQ(trtxpy_dtype_bytes(TRTXPY_INT8, &shape, NULL), TRTXPY_INVALID_ARGUMENT);
    CHECK_EQ(bytes, 77);
    shape = (trtxpy_shape){3, 0, {INT64_MAX, 0, INT64_MAX}}; /* no elements: no bytes, whatever the rest says */
    CHECK(trtxpy_dtype_bytes(TRTXPY_FLOAT32, &shape, &bytes) != TRTXPY_OK || bytes == 0);
}

static void integers_are_converted_or_refused(void) {
    const uint32_t unsigned32[] = {0, 5, UINT32_MAX};
    int64_t wide[4];
    uint32_t back[3];
    CHECK_EQ(trtxpy_convert(wide, TRTXPY_INT64, unsigned32, TRTXPY_UINT32, 3, "x"), TRTXPY_OK);
    CHECK_EQ(wide[2], (int64_t)UINT32_MAX);
    CHECK_EQ(trtxpy_convert(back, TRTXPY_UINT32, wide, TRTXPY_INT64, 3, "x"), TRTXPY_OK);
    CHECK(memcmp(back, unsigned32, sizeof back) == 0);
    wide[1] = -1;
    CHECK_EQ(trtxpy_convert(back, TRTXPY_UINT32, wide, TRTXPY_INT64, 3, "scores"), TRTXPY_RANGE);
    CHECK(strstr(trtxpy_last_error(), "scores: element 1 is -1, which uint32 cannot hold") != NULL);
    const uint64_t unsigned64[] = {(uint64_t)INT64_MAX, (uint64_t)INT64_MAX + 1};
    CHECK_EQ(trtxpy_convert(wide, TRTXPY_INT64, unsigned64, TRTXPY_UINT64, 1, "x"), TRTXPY_OK);
    CHECK_EQ(trtxpy_convert(wide, TRTXPY_INT64, unsigned64, TRTXPY_UINT64, 2, "x"), TRTXPY_RANGE);
    CHECK(strstr(trtxpy_last_error(), "9223372036854775808") != NULL);
    for (int32_t value = -300; value <= 300; value++) {
        int32_t given = value, found = 0;
        unsigned char byte = 0;
        const struct {
            trtxpy_dtype dtype;
            int low, high;
        } rules[] = {{TRTXPY_INT8, -128, 127}, {TRTXPY_UINT8, 0, 255}, {TRTXPY_INT4, -8, 7}, {TRTXPY_UINT4, 0, 15}, {TRTXPY_BOOL, 0, 1}};
        for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
            bool fits = value >= rules[i].low && value <= rules[i].high;
            CHECK_EQ(trtxpy_convert(&byte, rules[i].dtype, &given, TRTXPY_INT32, 1, "x"), fits ? TRTXPY_OK : TRTXPY_RANGE);
            if (!fits) continue;
            CHECK_EQ(trtxpy_convert(&found, TRTXPY_INT32, &byte, rules[i].dtype, 1, "x"), TRTXPY_OK);
            CHECK_EQ(found, given);
        }
    }
    const int32_t nibbles[] = {-8, 7, -1};
    unsigned char packed[2] = {0xFF, 0xFF};
    CHECK_EQ(trtxpy_convert(packed, TRTXPY_INT4, nibbles, TRTXPY_INT32, 3, "x"), TRTXPY_OK);
    CHECK_EQ(packed[0], 0x78);
    CHECK_EQ(packed[1], 0x0F); /* the last high half is 0 */
    const float real = 1;
    CHECK_EQ(trtxpy_convert(wide, TRTXPY_INT64, &real, TRTXPY_FLOAT32, 1, "x"), TRTXPY_UNSUPPORTED);
}

static void structs_of_other_versions(void) {
    struct {
        trtxpy_dispatch_options known;
        uint64_t later;
    } newer = {TRTXPY_DISPATCH_OPTIONS_INIT, 0};
    newer.known.struct_size = sizeof newer;
    newer.known.timeout_ns = 5;
    trtxpy_dispatch_options read = TRTXPY_DISPATCH_OPTIONS_INIT;
    CHECK_EQ(trtxpy_read_struct(&read, sizeof read, sizeof read, &newer, "o"), TRTXPY_OK);
    CHECK_EQ(read.timeout_ns, 5);
    CHECK_EQ(read.struct_size, sizeof read);
    newer.later = 1;
    CHECK_EQ(trtxpy_read_struct(&read, sizeof read, sizeof read, &newer, "o"), TRTXPY_VERSION_MISMATCH);
    newer.known.struct_size = 0;
    CHECK_EQ(trtxpy_read_struct(&read, sizeof read, sizeof read, &newer, "o"), TRTXPY_VERSION_MISMATCH);
    CHECK_EQ(trtxpy_read_struct(&read, sizeof read, sizeof read, NULL, "o"), TRTXPY_OK);
}

static void errors_are_the_threads_own(void) {
    CHECK_EQ(trtxpy_fail(TRTXPY_SHAPE, "text %d", 5), TRTXPY_SHAPE);
    CHECK(strcmp(trtxpy_last_error(), "text 5") == 0);
    trtxpy_begin();
    CHECK(strcmp(trtxpy_last_error(), "") == 0);
    char *lengthy = malloc(10001);
    for (int i = 0; i < 5000; i++) memcpy(lengthy + 2 * i, "\xC3\xA4", 2);
    lengthy[10000] = '\0';
    for (int shift = 0; shift < 2; shift++) {
        trtxpy_fail_text(TRTXPY_SHAPE, lengthy + 2 * shift);
        trtxpy_fail(TRTXPY_SHAPE, shift ? "%s" : "x%s", lengthy);
        const char *text = trtxpy_last_error();
        size_t length = strlen(text);
        CHECK(length < 4096 && length > 4090);
        CHECK((unsigned char)text[length - 1] == 0xA4); /* whole characters */
    }
    free(lengthy);
    for (trtxpy_status status = -3; status < 40; status++) CHECK(trtxpy_status_name(status) != NULL);
    CHECK(strcmp(trtxpy_status_name(TRTXPY_INTERNAL), "TRTXPY_INTERNAL") == 0);
    CHECK(strcmp(trtxpy_status_name(27), "TRTXPY_UNKNOWN") == 0);
}

static void without_python(void) {
    trtxpy_context context = (trtxpy_context)1;
    CHECK_EQ(trtxpy_context_create(NULL, &context), TRTXPY_PYTHON);
    CHECK(context == NULL);
    CHECK_EQ(trtxpy_context_destroy(NULL), TRTXPY_OK);
    CHECK_EQ(trtxpy_shutdown(), TRTXPY_OK);
}

int main(void) {
    RUN(handles_name_one_life);
    RUN(numbers_that_are_no_handles_are_refused);
    RUN(many_handles_are_kept_apart);
    RUN(sixty_four_threads_destroy_one_object);
    RUN(sizes_are_checked);
    RUN(integers_are_converted_or_refused);
    RUN(structs_of_other_versions);
    RUN(errors_are_the_threads_own);
    RUN(without_python);
    return report();
}
