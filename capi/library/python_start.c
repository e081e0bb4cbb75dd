/* CPython's configuration API without its headers. Until 3.13 it is a struct whose layout changes with the version, but not
 * within one: python_layout.h has what is needed. From 3.14 on options are set by name (PEP 741). */
#define _GNU_SOURCE
#include "python_start.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

/* Returned by value; the same from 3.10 to 3.13, which scripts/pyconfig-offsets checks. */
typedef struct python_status {
    int type; /* 0: OK, 1: error, 2: exit */
    const char *function, *message;
    int exit_code;
} python_status;

static const trtxpy_python_layout layouts[] = {
#include "python_layout.h"
};

enum { LAST_BY_LAYOUT = 13, CONFIG_ROOM = 1024 };

#define LOOK_UP(handle, api, function) (*(void **)&(api).function = dlsym(handle, #function))

bool trtxpy_python_version_of(void *handle, trtxpy_python_version *version) {
    const char *(*Py_GetVersion)(void);
    *version = (trtxpy_python_version){0};
    if (!(*(void **)&Py_GetVersion = dlsym(handle, "Py_GetVersion"))) return false;
    const char *text = Py_GetVersion();
    size_t length = strcspn(text, " ");
    if (length >= sizeof version->text) length = sizeof version->text - 1;
    memcpy(version->text, text, length);
    return sscanf(text, "%d.%d.%d", &version->major, &version->minor, &version->micro) == 3;
}

trtxpy_status trtxpy_python_look_up(void *handle, trtxpy_python *python) {
    trtxpy_python_version version;
    if (!trtxpy_python_version_of(handle, &version))
        return trtxpy_fail(TRTXPY_PYTHON, "it is no CPython: it has no Py_GetVersion");
    if (version.major != 3 || version.minor < 10)
        return trtxpy_fail(TRTXPY_PYTHON, "it is Python %s; trtx_py needs CPython 3.10 or newer", version.text);
    const char *missing = NULL;
#define LOOK_UP_MEMBER(type, name, parameters) \
    if (!(*(void **)&python->name = dlsym(handle, #name))) missing = #name;
    TRTXPY_PYTHON_FUNCTIONS(LOOK_UP_MEMBER)
#undef LOOK_UP_MEMBER
    *(void **)&python->PyGILState_Check = dlsym(handle, "PyGILState_Check");
    python->none = dlsym(handle, "_Py_NoneStruct");
    if (!python->none) missing = "_Py_NoneStruct";
    if (missing)
        return trtxpy_fail(TRTXPY_PYTHON, "its Python %s has no %s: it is no complete CPython", version.text, missing);
    return TRTXPY_OK;
}

/* ---- 3.10 to 3.13 ---- */

typedef struct by_layout {
    void (*PyPreConfig_InitIsolatedConfig)(void *);
    python_status (*Py_PreInitialize)(const void *);
    void (*PyConfig_InitIsolatedConfig)(void *);
    python_status (*PyConfig_SetBytesString)(void *, void **, const char *);
    python_status (*Py_InitializeFromConfig)(const void *);
    void (*PyConfig_Clear)(void *);
} by_layout;

typedef union config_bytes {
    unsigned char bytes[CONFIG_ROOM];
    void *aligned;
} config_bytes;

static int *int_at(config_bytes *config, size_t offset) {
    return (int *)(void *)(config->bytes + offset);
}

static void **pointer_at(config_bytes *config, size_t offset) {
    return (void **)(void *)(config->bytes + offset);
}

static bool look_up_by_layout(void *handle, by_layout *api) {
    return LOOK_UP(handle, *api, PyPreConfig_InitIsolatedConfig) && LOOK_UP(handle, *api, Py_PreInitialize) &&
           LOOK_UP(handle, *api, PyConfig_InitIsolatedConfig) && LOOK_UP(handle, *api, PyConfig_SetBytesString) &&
           LOOK_UP(handle, *api, Py_InitializeFromConfig) && LOOK_UP(handle, *api, PyConfig_Clear);
}

/* How much of a struct CPython writes; it writes the whole of it. Two values, as it may write one of them. */
static size_t written(void (*init)(void *)) {
    size_t size = 0;
    for (int value = 0x5A; value <= 0x5B; value++) {
        config_bytes config;
        memset(config.bytes, value, sizeof config.bytes);
        init(&config);
        for (size_t i = sizeof config.bytes; i > size; i--)
            if (config.bytes[i - 1] != value) {
                size = i;
                break;
            }
    }
    return size;
}

/* NULL if this Python's structs are not what the table says: a debug build, say, or a fork of CPython. */
static const trtxpy_python_layout *layout_of(const by_layout *api, int minor) {
    const trtxpy_python_layout *layout = NULL;
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        if (layouts[i].minor == minor) layout = &layouts[i];
    if (!layout || written(api->PyPreConfig_InitIsolatedConfig) != layout->preconfig_size ||
        written(api->PyConfig_InitIsolatedConfig) != layout->config_size)
        return NULL;
    config_bytes config;
    api->PyConfig_InitIsolatedConfig(&config);
    bool as_expected = *int_at(&config, layout->isolated) == 1 && *int_at(&config, layout->use_environment) == 0 &&
                       *int_at(&config, layout->install_signal_handlers) == 0 &&
                       *int_at(&config, layout->site_import) == 1 && !*pointer_at(&config, layout->program_name) &&
                       !*pointer_at(&config, layout->home) && !*pointer_at(&config, layout->executable);
    return as_expected ? layout : NULL;
}

static trtxpy_status report(python_status status, const char *function) {
    if (status.type == 0) return TRTXPY_OK;
    if (status.type == 2) return trtxpy_fail(TRTXPY_PYTHON, "%s asks for an exit with code %d", function, status.exit_code);
    return trtxpy_fail(TRTXPY_PYTHON, "%s: %s", status.function ? status.function : function,
                       status.message ? status.message : "it failed and does not say why");
}

static trtxpy_status start_by_layout(void *handle, int minor, const char *executable, const char *home) {
    by_layout api;
    const trtxpy_python_layout *layout = look_up_by_layout(handle, &api) ? layout_of(&api, minor) : NULL;
    if (!layout) return trtxpy_fail_text(TRTXPY_INTERNAL, "trtxpy_python_start without trtxpy_python_check");
    config_bytes config;
    api.PyPreConfig_InitIsolatedConfig(&config); /* configure_locale and coerce_c_locale are 0 there */
    *int_at(&config, layout->utf8_mode) = 1;     /* else it would want the locale's encoding, "C" mostly */
    trtxpy_status status = report(api.Py_PreInitialize(&config), "Py_PreInitialize");
    if (status != TRTXPY_OK) return status;

    api.PyConfig_InitIsolatedConfig(&config); /* no environment, no user's site-packages, no signal handlers, no arguments */
    const struct {
        size_t offset;
        const char *value;
    } strings[] = {{layout->program_name, executable}, {layout->executable, executable}, {layout->home, home}};
    for (size_t i = 0; status == TRTXPY_OK && i < sizeof strings / sizeof *strings; i++)
        if (*strings[i].value)
            status = report(api.PyConfig_SetBytesString(&config, pointer_at(&config, strings[i].offset), strings[i].value),
                            "PyConfig_SetBytesString");
    if (status == TRTXPY_OK) status = report(api.Py_InitializeFromConfig(&config), "Py_InitializeFromConfig");
    api.PyConfig_Clear(&config);
    return status;
}

/* ---- 3.14 and later ---- */

typedef struct by_name {
    void *(*PyInitConfig_Create)(void); /* isolated */
    void (*PyInitConfig_Free)(void *);
    int (*PyInitConfig_SetInt)(void *, const char *, int64_t);
    int (*PyInitConfig_SetStr)(void *, const char *, const char *);
    int (*PyInitConfig_GetError)(void *, const char **);
    int (*Py_InitializeFromInitConfig)(void *);
} by_name;

static bool look_up_by_name(void *handle, by_name *api) {
    return LOOK_UP(handle, *api, PyInitConfig_Create) && LOOK_UP(handle, *api, PyInitConfig_Free) &&
           LOOK_UP(handle, *api, PyInitConfig_SetInt) && LOOK_UP(handle, *api, PyInitConfig_SetStr) &&
           LOOK_UP(handle, *api, PyInitConfig_GetError) && LOOK_UP(handle, *api, Py_InitializeFromInitConfig);
}

static trtxpy_status start_by_name(void *handle, const char *executable, const char *home) {
    by_name api;
    if (!look_up_by_name(handle, &api))
        return trtxpy_fail_text(TRTXPY_INTERNAL, "trtxpy_python_start without trtxpy_python_check");
    void *config = api.PyInitConfig_Create();
    if (!config) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "PyInitConfig_Create: out of memory");
    bool good = api.PyInitConfig_SetInt(config, "configure_locale", 0) == 0 &&
                api.PyInitConfig_SetInt(config, "utf8_mode", 1) == 0 &&
                api.PyInitConfig_SetInt(config, "install_signal_handlers", 0) == 0;
    if (good && *executable)
        good = api.PyInitConfig_SetStr(config, "program_name", executable) == 0 &&
               api.PyInitConfig_SetStr(config, "executable", executable) == 0;
    if (good && *home) good = api.PyInitConfig_SetStr(config, "home", home) == 0;
    if (good) good = api.Py_InitializeFromInitConfig(config) == 0;
    trtxpy_status status = TRTXPY_OK;
    if (!good) {
        const char *message = NULL;
        api.PyInitConfig_GetError(config, &message); /* owned by config */
        status = trtxpy_fail(TRTXPY_PYTHON, "Py_InitializeFromInitConfig: %s",
                             message ? message : "it failed and does not say why");
    }
    api.PyInitConfig_Free(config);
    return status;
}

trtxpy_status trtxpy_python_check(void *handle) {
    trtxpy_python python;
    trtxpy_status status = trtxpy_python_look_up(handle, &python);
    if (status != TRTXPY_OK) return status;
    trtxpy_python_version version;
    trtxpy_python_version_of(handle, &version);
    if (version.minor > LAST_BY_LAYOUT) {
        by_name api;
        if (look_up_by_name(handle, &api)) return TRTXPY_OK;
        return trtxpy_fail(TRTXPY_PYTHON, "its Python %s has no PyInitConfig functions: it is no complete CPython",
                           version.text);
    }
    by_layout api;
    if (look_up_by_layout(handle, &api) && layout_of(&api, version.minor)) return TRTXPY_OK;
    return trtxpy_fail(TRTXPY_PYTHON,
                       "it is a special build of Python %s (a debug build?), which the library cannot start; use an "
                       "ordinary one",
                       version.text);
}

trtxpy_status trtxpy_python_start(void *handle, const char *executable, const char *home) {
    trtxpy_python_version version;
    trtxpy_python_version_of(handle, &version);
    return version.minor > LAST_BY_LAYOUT ? start_by_name(handle, executable, home)
                                          : start_by_layout(handle, version.minor, executable, home);
}
