/* What the files of the host share: host.c keeps the state, host_find.c finds a Python, host_ask.c asks an interpreter,
 * host_import.c has what needs Python's lock, python_start.c starts it. */
#ifndef TRTXPY_HOST_INTERNAL_H
#define TRTXPY_HOST_INTERNAL_H

#include <limits.h>

#include "error.h"
#include "host.h"
#include "python_start.h"

/* The Python to use. */
typedef struct trtxpy_environment {
    void *handle;              /* of libpython; RTLD_DEFAULT where the process has it */
    const char *source;        /* which hint led to it, static */
    char version[32];          /* "3.11.7" */
    char executable[PATH_MAX]; /* the interpreter whose environment it is; "" */
    char home[PATH_MAX];       /* the prefix, if there is no interpreter; "" */
} trtxpy_environment;

/* Has this process a CPython? The handle to look it up with is kept for ever. */
typedef enum trtxpy_presence { TRTXPY_ABSENT, TRTXPY_NOT_STARTED, TRTXPY_RUNS, TRTXPY_HAS_ENDED } trtxpy_presence;
trtxpy_presence trtxpy_present_python(void **handle);

/* Follow the hints. present: the process has that Python, and only an environment for it is wanted; NULL: *environment gets
 * a libpython that was loaded. On failure nothing is loaded. */
trtxpy_status trtxpy_find_python(const char *hint, void **present, trtxpy_environment *environment);

/* The folder that holds the trtx_py package which this library is a part of; "" if it is none. */
void trtxpy_package_parent(char folder[PATH_MAX]);

/* ---- host_ask.c ---- */

typedef struct trtxpy_answers {
    char text[16384]; /* what the interpreter printed */
} trtxpy_answers;

/* Run an interpreter and ask it about itself. */
trtxpy_status trtxpy_ask_interpreter(const char *path, trtxpy_answers *answers);
/* "" if it did not say. */
void trtxpy_answer(const trtxpy_answers *answers, const char *key, char *value, size_t room);

/* ---- host_import.c: with Python's lock ---- */

/* A new reference. */
trtxpy_status trtxpy_import_control(const trtxpy_python *python, const trtxpy_environment *environment, void *handle,
                                    PyObject **control);
/* Python's signal module, which asyncio and others import, takes SIGINT from whoever left it at its default. Import it now,
 * and set SIGINT back to what it was before Python started. In Python's main thread. */
struct sigaction;
void trtxpy_keep_sigint(const trtxpy_python *python, const struct sigaction *before);
/* Have `function` called when Python exits, before it ends; it is called with Python's lock. */
trtxpy_status trtxpy_call_at_python_exit(const trtxpy_python *python, void *handle, void (*function)(void));

#endif
