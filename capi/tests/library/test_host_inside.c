/* For test_host_inside.py, in one library with the host: looks at the process after Python is gone. */
#include "test_host.h"

#include <pthread.h>
#include <unistd.h>

static void before_end(void) {
    CHECK(trtxpy_host_python() && call_control("count", NULL, 0) > 0);
    CHECK(write(1, "before the end\n", 15) == 15);
}

static void after_python(void) {
    if (trtxpy_host_forked()) return;
    CHECK(!trtxpy_host_python() && !trtxpy_host_control() && !trtxpy_host_unlock());
    CHECK(trtxpy_host_start(NULL) == TRTXPY_CLOSED);
    trtxpy_host_relock(NULL);
    CHECK(write(1, "python is gone\n", 15) == 15);
}

void inside_watch(void) {
    trtxpy_host_at_exit(before_end);
    atexit(after_python);
}

long long inside_count(void) {
    void *state = trtxpy_host_unlock();
    long long count = call_control("count", NULL, 0);
    trtxpy_host_relock(state);
    return count;
}

static void *start(void *hint) {
    CHECK(trtxpy_host_start(hint) == TRTXPY_OK);
    CHECK(call_control("count", NULL, 0) > 0);
    return NULL;
}

/* 64 threads that Python does not know. */
void inside_threads(void) {
    pthread_t threads[64];
    void *state = trtxpy_host_unlock();
    for (int i = 0; i < 64; i++) CHECK(pthread_create(&threads[i], NULL, start, NULL) == 0);
    for (int i = 0; i < 64; i++) pthread_join(threads[i], NULL);
    trtxpy_host_relock(state);
}

int inside_unlocks(void) {
    void *state = trtxpy_host_unlock();
    trtxpy_host_relock(state);
    return state != NULL;
}
