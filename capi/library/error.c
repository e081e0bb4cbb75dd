#define _GNU_SOURCE
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_BYTES = 4096 };

static _Thread_local trtxpy_status last_status;
static _Thread_local char last_text[TEXT_BYTES];

void trtxpy_begin(void) {
    last_status = TRTXPY_OK;
    last_text[0] = '\0';
}

/* UTF-8 is cut between characters. */
static void cut(char *text, size_t length) {
    if (length < TEXT_BYTES) return;
    size_t end = TEXT_BYTES - 1;
    while (end > 0 && ((unsigned char)text[end - 1] & 0xC0) == 0x80) end--;
    if (end > 0 && (unsigned char)text[end - 1] >= 0xC0) end--;
    text[end] = '\0';
}

trtxpy_status trtxpy_fail(trtxpy_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(last_text, TEXT_BYTES, format, arguments);
    va_end(arguments);
    cut(last_text, length < 0 ? 0 : (size_t)length);
    return last_status = status;
}

trtxpy_status trtxpy_fail_text(trtxpy_status status, const char *text) {
    if (!text || !*text) text = trtxpy_status_name(status);
    size_t length = strlen(text);
    if (text != last_text) memmove(last_text, text, length < TEXT_BYTES ? length + 1 : TEXT_BYTES);
    last_text[TEXT_BYTES - 1] = '\0';
    cut(last_text, length);
    return last_status = status;
}

trtxpy_kept_error trtxpy_keep_error(void) {
    return (trtxpy_kept_error){last_status, last_status == TRTXPY_OK ? NULL : strdup(last_text)};
}

void trtxpy_restore_error(trtxpy_kept_error *kept) {
    trtxpy_begin();
    if (kept->status != TRTXPY_OK) trtxpy_fail_text(kept->status, kept->text);
    free(kept->text);
    kept->text = NULL;
}

const char *trtxpy_last_error(void) {
    return last_text;
}

trtxpy_status trtxpy_last_status(void) {
    return last_status;
}

const char *trtxpy_status_name(trtxpy_status status) {
    static const char *const names[] = {
        "TRTXPY_OK",          "TRTXPY_INVALID_ARGUMENT", "TRTXPY_INVALID_HANDLE",   "TRTXPY_BORROWED",  "TRTXPY_NOT_FOUND",
        "TRTXPY_SHAPE",       "TRTXPY_DTYPE",            "TRTXPY_RANGE",            "TRTXPY_BUFFER_SIZE", "TRTXPY_OUT_OF_MEMORY",
        "TRTXPY_UNAVAILABLE", "TRTXPY_PYTHON",           "TRTXPY_PARSE",            "TRTXPY_BUILD",     "TRTXPY_PLAN",
        "TRTXPY_VERSION_MISMATCH", "TRTXPY_EXECUTION",   "TRTXPY_CUDA",             "TRTXPY_CANCELLED", "TRTXPY_TIMEOUT",
        "TRTXPY_BUSY",        "TRTXPY_CLOSED",           "TRTXPY_IN_CALLBACK",      "TRTXPY_FORKED",    "TRTXPY_NOT_READY",
        "TRTXPY_UNSUPPORTED", "TRTXPY_INTERNAL"};
    if (status < 0 || (size_t)status >= sizeof names / sizeof *names) return "TRTXPY_UNKNOWN";
    return names[status];
}
