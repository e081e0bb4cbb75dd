/* A libpython 3.14 as its documentation describes it, around 3.13's: configuration by name, isolated to begin with. */
#include <Python.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct PyInitConfig {
    PyPreConfig before;
    PyConfig config;
    char error[200];
} PyInitConfig;

EXPORT const char *Py_GetVersion(void) {
    return "3.14.0 (stand-in)";
}

EXPORT PyInitConfig *PyInitConfig_Create(void) {
    PyInitConfig *config = calloc(1, sizeof *config);
    PyPreConfig_InitIsolatedConfig(&config->before);
    PyConfig_InitIsolatedConfig(&config->config);
    return config;
}

EXPORT void PyInitConfig_Free(PyInitConfig *config) {
    if (config) PyConfig_Clear(&config->config);
    free(config);
}

static int fail(PyInitConfig *config, const char *text, const char *what) {
    snprintf(config->error, sizeof config->error, "%s%s", text, what ? what : "");
    return -1;
}

EXPORT int PyInitConfig_GetError(PyInitConfig *config, const char **text) {
    *text = *config->error ? config->error : NULL;
    return *config->error != 0;
}

EXPORT int PyInitConfig_SetInt(PyInitConfig *config, const char *name, int64_t value) {
    if (strcmp(name, "utf8_mode") == 0) config->before.utf8_mode = (int)value;
    else if (strcmp(name, "configure_locale") == 0) config->before.configure_locale = (int)value;
    else if (strcmp(name, "install_signal_handlers") == 0) config->config.install_signal_handlers = (int)value;
    else return fail(config, "unknown config option name: ", name);
    return 0;
}

EXPORT int PyInitConfig_SetStr(PyInitConfig *config, const char *name, const char *value) {
    wchar_t **to = strcmp(name, "program_name") == 0 ? &config->config.program_name
                   : strcmp(name, "executable") == 0 ? &config->config.executable
                   : strcmp(name, "home") == 0       ? &config->config.home
                                                     : NULL;
    if (!to) return fail(config, "unknown config option name: ", name);
    size_t size = strlen(value) + 1; /* ASCII here; 3.14 does not preinitialize in this function */
    wchar_t *wide = PyMem_RawMalloc(size * sizeof(wchar_t));
    for (size_t i = 0; i < size; i++) wide[i] = value[i];
    *to = wide;
    return 0;
}

EXPORT int Py_InitializeFromInitConfig(PyInitConfig *config) {
    PyStatus status = Py_PreInitialize(&config->before);
    if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config->config);
    return PyStatus_Exception(status) ? fail(config, "", status.err_msg) : 0;
}
