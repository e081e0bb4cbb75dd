/* Loading the driver: what is missing is named; a forked child gets no driver that its parent had loaded. */
#define _GNU_SOURCE
#include "lane_test.h"

#include "../src/lane_internal.h"

static void a_missing_library_is_named(void) {
    trtx_cuda_api table;
    char reason[256] = "";
    CHECK(!trtx_cuda_api_open("libno-such-driver.so.1", &table, reason, sizeof reason));
    CHECK(strstr(reason, "libno-such-driver.so.1"));
}

static void a_missing_symbol_is_named(void) {
    trtx_cuda_api table;
    char reason[256] = "";
    CHECK(!trtx_cuda_api_open("libc.so.6", &table, reason, sizeof reason));
    CHECK(strstr(reason, "libc.so.6") && strstr(reason, "cuInit"));
}

static void *load(void *result) {
    const char *reason = NULL;
    *(const trtx_cuda_api **)result = trtx_cuda_api_load(&reason);
    return NULL;
}

static void loading_gives_the_same_answer_to_all_threads(void) {
    pthread_t threads[8];
    const trtx_cuda_api *tables[8];
    for (int i = 0; i < 8; i++) CHECK_EQ(pthread_create(&threads[i], NULL, load, (void *)&tables[i]), 0);
    for (int i = 0; i < 8; i++) CHECK_EQ(pthread_join(threads[i], NULL), 0);
    for (int i = 1; i < 8; i++) CHECK(tables[i] == tables[0]);
    const char *reason = "unset";
    const trtx_cuda_api *table = trtx_cuda_api_load(&reason);
    CHECK(table == tables[0]);
    CHECK(table ? reason == NULL : strstr(reason, "libcuda.so.1") != NULL);
    trtx_cuda_api_load(NULL);
    printf("# %s\n", table ? "this machine has a driver" : reason);
}

int main(void) {
    TEST(a_missing_library_is_named);
    TEST(a_missing_symbol_is_named);
    TEST(loading_gives_the_same_answer_to_all_threads);
    return report();
}
