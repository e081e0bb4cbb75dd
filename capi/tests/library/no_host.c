/* A process in which no Python is ever found: for tests of what needs none. */
#include "host.h"
#include "error.h"

trtxpy_status trtxpy_host_start(const char *hint) {
    (void)hint;
    return trtxpy_fail(TRTXPY_PYTHON, "this test has no Python");
}

const trtxpy_python *trtxpy_host_python(void) {
    return NULL;
}

PyObject *trtxpy_host_control(void) {
    return NULL;
}

bool trtxpy_host_forked(void) {
    return false;
}

trtxpy_status trtxpy_host_stop(void) {
    return TRTXPY_OK;
}

void trtxpy_host_at_exit(void (*before_end)(void)) {
    (void)before_end;
}

void trtxpy_host_mark_thread(void) {}

void trtxpy_host_keeps_state(bool keeps) {
    (void)keeps;
}

void trtxpy_host_call_begins(void) {}

void trtxpy_host_call_ends(void) {}

void *trtxpy_host_unlock(void) {
    return NULL;
}

void trtxpy_host_relock(void *state) {
    (void)state;
}
