/* CPython by its C API, without its headers: what it is, and how it is started. */
#ifndef TRTXPY_PYTHON_START_H
#define TRTXPY_PYTHON_START_H

#include "host.h"

typedef struct trtxpy_python_version {
    int major, minor, micro;
    char text[32]; /* "3.11.7", "3.14.0rc1" */
} trtxpy_python_version;

/* handle: what dlopen gave, or RTLD_DEFAULT. False if there is no Python behind it. */
bool trtxpy_python_version_of(void *handle, trtxpy_python_version *version);

/* Look up what the library calls. Says which version is too old, or what is missing. */
trtxpy_status trtxpy_python_look_up(void *handle, trtxpy_python *python);

/* Could trtxpy_python_start start it? Changes nothing. */
trtxpy_status trtxpy_python_check(void *handle);

/* Start it in this thread, which then holds its lock: isolated from the environment, and leaving the process's signal
 * handlers, locale and standard streams alone. executable: the interpreter whose environment is used; home: a prefix; either
 * may be "". After a failure it cannot be tried again. */
trtxpy_status trtxpy_python_start(void *handle, const char *executable, const char *home);

/* Where the members that the start needs lie in CPython's PyPreConfig and PyConfig, for each version until 3.13. Made by
 * scripts/pyconfig-offsets. */
typedef struct trtxpy_python_layout {
    int minor;
    unsigned short preconfig_size, utf8_mode;
    unsigned short config_size, isolated, use_environment, install_signal_handlers, site_import;
    unsigned short program_name, home, executable;
} trtxpy_python_layout;

#endif
