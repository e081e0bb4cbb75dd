/* Find a Python: in the process, else by hints. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host_internal.h"

static const char *const install_hint = "Install it (Debian, Ubuntu: apt install libpython%d.%d; pyenv: "
                                        "PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install %s), or use "
                                        "a Python that has it, as those of uv and conda do";

/* ---- what the process has ---- */

typedef struct loaded_names {
    char *paths[4];
    size_t count;
} loaded_names;

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int note_libpython(struct dl_phdr_info *info, size_t size, void *argument) {
    (void)size;
    loaded_names *names = argument;
    if (names->count < sizeof names->paths / sizeof *names->paths && info->dlpi_name &&
        strstr(base_name(info->dlpi_name), "libpython3") && (names->paths[names->count] = strdup(info->dlpi_name)))
        names->count++;
    return 0;
}

static trtxpy_presence python_behind(void *handle) {
    int (*Py_IsInitialized)(void), (*Py_IsFinalizing)(void);
    if (!(*(void **)&Py_IsInitialized = dlsym(handle, "Py_IsInitialized")) || !dlsym(handle, "Py_GetVersion"))
        return TRTXPY_ABSENT;
    if (Py_IsInitialized()) return TRTXPY_RUNS;
    *(void **)&Py_IsFinalizing = dlsym(handle, "Py_IsFinalizing");
    if (!Py_IsFinalizing) *(void **)&Py_IsFinalizing = dlsym(handle, "_Py_IsFinalizing"); /* its name before 3.13 */
    /* stays set once it has ended */
    return Py_IsFinalizing && Py_IsFinalizing() ? TRTXPY_HAS_ENDED : TRTXPY_NOT_STARTED;
}

trtxpy_presence trtxpy_present_python(void **handle) {
    *handle = RTLD_DEFAULT;
    trtxpy_presence best = python_behind(RTLD_DEFAULT);
    if (best != TRTXPY_ABSENT) return best;
    /* A host may have loaded libpython for itself alone. Of several, one that runs. */
    loaded_names names = {.count = 0};
    dl_iterate_phdr(note_libpython, &names);
    const char *library = NULL;
    for (size_t i = 0; i < names.count; i++) {
        void *candidate = dlopen(names.paths[i], RTLD_NOLOAD | RTLD_LAZY);
        trtxpy_presence presence = candidate ? python_behind(candidate) : TRTXPY_ABSENT;
        bool better =
            presence != TRTXPY_ABSENT && (best == TRTXPY_ABSENT || (presence == TRTXPY_RUNS && best != TRTXPY_RUNS));
        void *other = better ? *handle : candidate;
        if (better) {
            *handle = candidate;
            library = names.paths[i];
            best = presence;
        }
        if (other) dlclose(other);
    }
    /* trtx_py's extension modules look for its symbols */
    if (library) dlopen(library, RTLD_NOLOAD | RTLD_NOW | RTLD_GLOBAL);
    for (size_t i = 0; i < names.count; i++) free(names.paths[i]);
    return best;
}

/* ---- a libpython ---- */

typedef struct search {
    trtxpy_environment *environment;
    void **present;                /* NULL: none in the process */
    trtxpy_python_version version; /* what libpython must be; 0.0.0 for any */
} search;

static bool is_file(const char *path) {
    struct stat about;
    return stat(path, &about) == 0 && S_ISREG(about.st_mode);
}

static bool is_folder(const char *path) {
    struct stat about;
    return stat(path, &about) == 0 && S_ISDIR(about.st_mode);
}

static bool is_program(const char *path) {
    return is_file(path) && access(path, X_OK) == 0;
}

/* False if it does not fit. */
__attribute__((format(printf, 2, 3))) static bool join(char path[PATH_MAX], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(path, PATH_MAX, format, arguments);
    va_end(arguments);
    return length >= 0 && length < PATH_MAX;
}

static bool same_version(const trtxpy_python_version *a, const trtxpy_python_version *b) {
    return a->major == b->major && a->minor == b->minor && a->micro == b->micro;
}

/* Load it for itself alone, and look at it. */
static trtxpy_status open_library(search *find, const char *library, void **handle) {
    *handle = dlopen(library, RTLD_LAZY | RTLD_LOCAL);
    if (!*handle) return trtxpy_fail(TRTXPY_PYTHON, "%s cannot be loaded: %s", library, dlerror());
    trtxpy_python_version version;
    trtxpy_status status = trtxpy_python_check(*handle);
    trtxpy_python_version_of(*handle, &version);
    if (status != TRTXPY_OK) {
        char why[1024];
        snprintf(why, sizeof why, "%s", trtxpy_last_error());
        trtxpy_fail(status, "%s cannot be used: %s", library, why);
    } else if (find->version.major && !same_version(&version, &find->version)) {
        status = trtxpy_fail(TRTXPY_PYTHON, "%s is Python %s, not %s", library, version.text, find->version.text);
    }
    if (status != TRTXPY_OK) {
        dlclose(*handle);
        return status;
    }
    strcpy(find->environment->version, version.text);
    return TRTXPY_OK;
}

/* Give its symbols to everybody: extension modules look for them. Takes the handle over. */
static trtxpy_status keep_library(search *find, const char *library, void *handle) {
    trtxpy_status status = TRTXPY_OK;
    find->environment->handle = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    if (!find->environment->handle) status = trtxpy_fail(TRTXPY_PYTHON, "%s cannot be loaded: %s", library, dlerror());
    dlclose(handle);
    return status;
}

static trtxpy_status load(search *find, const char *library) {
    void *handle;
    trtxpy_status status = open_library(find, library, &handle);
    return status == TRTXPY_OK ? keep_library(find, library, handle) : status;
}

/* The prefix of an installation from where its libpython lies: PREFIX/lib, PREFIX/lib/x86_64-linux-gnu. */
static bool prefix_above(const char *library, int minor, char prefix[PATH_MAX]) {
    if (!realpath(library, prefix)) return false;
    for (int level = 0; level < 4; level++) {
        char *slash = strrchr(prefix, '/');
        if (!slash || slash == prefix) return false;
        *slash = '\0';
        static const char *const folders[] = {"lib", "lib64"};
        for (int i = 0; i < 2; i++) {
            char landmark[PATH_MAX];
            if (join(landmark, "%s/%s/python3.%d/os.py", prefix, folders[i], minor) && is_file(landmark)) return true;
        }
    }
    return false;
}

/* The environment of a libpython that nobody named an interpreter for: that of the installation it lies in. */
static trtxpy_status settle_in_prefix(search *find, void *handle) {
    trtxpy_environment *environment = find->environment;
    trtxpy_python_version version;
    Dl_info about;
    char prefix[PATH_MAX];
    trtxpy_python_version_of(handle, &version);
    const char *library = dladdr(dlsym(handle, "Py_GetVersion"), &about) && about.dli_fname ? about.dli_fname : "";
    if (!prefix_above(library, version.minor, prefix))
        return trtxpy_fail(TRTXPY_PYTHON,
                           "there is no standard library (lib/python3.%d) in a folder above %s; name an interpreter "
                           "or a virtual environment of Python %s",
                           version.minor, library, version.text);
    char *executable = environment->executable;
    if ((join(executable, "%s/bin/python3.%d", prefix, version.minor) && is_program(executable)) ||
        (join(executable, "%s/bin/python3", prefix) && is_program(executable)))
        return TRTXPY_OK;
    *executable = '\0';
    strcpy(environment->home, prefix);
    return TRTXPY_OK;
}

static trtxpy_status from_library(search *find, const char *library) {
    if (find->present)
        return trtxpy_fail(TRTXPY_PYTHON, "this process has Python %s already, and cannot load %s", find->version.text,
                           library);
    void *handle;
    trtxpy_status status = open_library(find, library, &handle);
    if (status != TRTXPY_OK) return status;
    status = settle_in_prefix(find, handle);
    if (status == TRTXPY_OK) return keep_library(find, library, handle);
    dlclose(handle);
    return status;
}

/* ---- an interpreter ---- */

typedef struct facts {
    trtxpy_answers answers;
    char mapped[PATH_MAX], base[PATH_MAX], folders[8][PATH_MAX], names[4][256];
    char abiflags[16], platlib[32], multiarch[64], value[PATH_MAX];
    size_t folder_count, name_count;
} facts;

static void add_folder(facts *known, const char *folder) {
    if (!*folder) return;
    for (size_t i = 0; i < known->folder_count; i++)
        if (strcmp(known->folders[i], folder) == 0) return;
    strcpy(known->folders[known->folder_count++], folder);
}

static void add_name(facts *known, const char *name) {
    if (!strstr(name, ".so") || strlen(name) >= sizeof known->names[0]) return; /* a static interpreter names its .a */
    for (size_t i = 0; i < known->name_count; i++)
        if (strcmp(known->names[i], name) == 0) return;
    strcpy(known->names[known->name_count++], name);
}

static void gather(facts *known, int minor) {
    const trtxpy_answers *answers = &known->answers;
    char *value = known->value;
    trtxpy_answer(answers, "mapped", known->mapped, sizeof known->mapped);
    trtxpy_answer(answers, "base", known->base, sizeof known->base);
    trtxpy_answer(answers, "abiflags", known->abiflags, sizeof known->abiflags);
    trtxpy_answer(answers, "platlib", known->platlib, sizeof known->platlib);
    trtxpy_answer(answers, "MULTIARCH", known->multiarch, sizeof known->multiarch);
    trtxpy_answer(answers, "INSTSONAME", value, PATH_MAX);
    add_name(known, value);
    trtxpy_answer(answers, "LDLIBRARY", value, PATH_MAX);
    add_name(known, value);
    snprintf(value, PATH_MAX, "libpython3.%d%s.so.1.0", minor, known->abiflags);
    add_name(known, value);
    snprintf(value, PATH_MAX, "libpython3.%d%s.so", minor, known->abiflags);
    add_name(known, value);
    char libdir[PATH_MAX];
    trtxpy_answer(answers, "LIBDIR", libdir, sizeof libdir);
    add_folder(known, libdir);
    if (*known->base) { /* LIBDIR is where it was built for, which is not where it is if it was moved */
        if (join(value, "%s/lib", known->base)) add_folder(known, value);
        if (*known->platlib && join(value, "%s/%s", known->base, known->platlib)) add_folder(known, value);
        if (*known->multiarch && join(value, "%s/lib/%s", known->base, known->multiarch)) add_folder(known, value);
    }
    if (*known->multiarch && *libdir && join(value, "%s/%s", libdir, known->multiarch)) add_folder(known, value);
    trtxpy_answer(answers, "LIBPL", value, PATH_MAX);
    add_folder(known, value);
}

static void add_text(char *text, size_t room, const char *separator, const char *what) {
    size_t used = strlen(text);
    snprintf(text + used, room - used, "%s%s", used ? separator : "", what);
}

/* The libpython of exactly this interpreter: the standard library is made for that one. */
static trtxpy_status load_for(search *find, facts *known, const char *interpreter) {
    char path[PATH_MAX], failure[1024] = "";
    if (*known->mapped && load(find, known->mapped) == TRTXPY_OK) return TRTXPY_OK;
    for (size_t i = 0; i < known->folder_count; i++)
        for (size_t j = 0; j < known->name_count; j++) {
            if (!join(path, "%s/%s", known->folders[i], known->names[j]) || !is_file(path)) continue;
            if (load(find, path) == TRTXPY_OK) return TRTXPY_OK;
            snprintf(failure, sizeof failure, "; %s", trtxpy_last_error());
        }
    char names[512] = "", folders[1024] = "", install[512];
    for (size_t i = 0; i < known->name_count; i++) {
        if (load(find, known->names[i]) == TRTXPY_OK) return TRTXPY_OK; /* where the loader looks */
        add_text(names, sizeof names, " or ", known->names[i]);
    }
    for (size_t i = 0; i < known->folder_count; i++) add_text(folders, sizeof folders, ", ", known->folders[i]);
    snprintf(install, sizeof install, install_hint, find->version.major, find->version.minor, find->version.text);
    return trtxpy_fail(TRTXPY_PYTHON,
                       "%s (Python %s) comes without a shared libpython: there is no %s in %s, or where the loader "
                       "looks%s. %s",
                       interpreter, find->version.text, names, folders, failure, install);
}

static trtxpy_status from_answers(search *find, const char *interpreter, facts *known) {
    trtxpy_environment *environment = find->environment;
    char implementation[32], version[32], executable[PATH_MAX];
    trtxpy_answer(&known->answers, "implementation", implementation, sizeof implementation);
    trtxpy_answer(&known->answers, "version", version, sizeof version);
    trtxpy_answer(&known->answers, "executable", executable, sizeof executable);
    trtxpy_python_version wanted = {0};
    if (sscanf(version, "%d.%d.%d", &wanted.major, &wanted.minor, &wanted.micro) != 3)
        return trtxpy_fail(TRTXPY_PYTHON, "%s does not say what version it is", interpreter);
    if (*implementation && strcmp(implementation, "cpython") != 0)
        return trtxpy_fail(TRTXPY_PYTHON, "%s is %s %s; trtx_py needs CPython", interpreter, implementation, version);
    if (wanted.major != 3 || wanted.minor < 10)
        return trtxpy_fail(TRTXPY_PYTHON, "%s is Python %s; trtx_py needs CPython 3.10 or newer", interpreter, version);
    if (find->present && !same_version(&wanted, &find->version))
        return trtxpy_fail(TRTXPY_PYTHON, "%s is Python %s, and this process has Python %s", interpreter, version,
                           find->version.text);
    strcpy(environment->executable, *executable ? executable : interpreter);
    if (find->present) return TRTXPY_OK;
    strcpy(wanted.text, version);
    find->version = wanted;
    gather(known, wanted.minor);
    trtxpy_status status = load_for(find, known, environment->executable);
    find->version = (trtxpy_python_version){0};
    return status;
}

static trtxpy_status from_interpreter(search *find, const char *interpreter) {
    facts *known = calloc(1, sizeof *known);
    if (!known) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "out of memory");
    trtxpy_status status = trtxpy_ask_interpreter(interpreter, &known->answers);
    if (status == TRTXPY_OK) status = from_answers(find, interpreter, known);
    free(known);
    return status;
}

/* ---- hints ---- */

static bool on_path(const char *name, char path[PATH_MAX]) {
    const char *folders = getenv("PATH");
    if (!folders || !*folders) folders = "/usr/local/bin:/usr/bin:/bin";
    for (;;) {
        size_t length = strcspn(folders, ":");
        if (length && join(path, "%.*s/%s", (int)length, folders, name) && is_program(path)) return true;
        if (!folders[length]) return false;
        folders += length + 1;
    }
}

static bool interpreter_in(const char *folder, char path[PATH_MAX]) {
    static const char *const names[] = {"python3", "python"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (join(path, "%s/bin/%s", folder, names[i]) && is_program(path)) return true;
    return false;
}

/* Of an installation without an interpreter, as embedders ship it. */
static bool library_in(const char *folder, char path[PATH_MAX]) {
    static const char *const places[] = {"lib", "lib64", "."};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        char place[PATH_MAX];
        DIR *entries = join(place, "%s/%s", folder, places[i]) ? opendir(place) : NULL;
        if (!entries) continue;
        bool found = false;
        for (struct dirent *entry; !found && (entry = readdir(entries));)
            found = strncmp(entry->d_name, "libpython3.", 11) == 0 && strstr(entry->d_name + 11, ".so") &&
                    join(path, "%s/%s", place, entry->d_name);
        closedir(entries);
        if (found) return true;
    }
    return false;
}

static trtxpy_status from_place(search *find, const char *place) {
    char path[PATH_MAX];
    if (!strchr(place, '/') && access(place, F_OK) != 0) {
        if (!on_path(place, path))
            return trtxpy_fail(TRTXPY_PYTHON, "there is no file %s, and no program of that name on PATH", place);
        return from_interpreter(find, path);
    }
    if (is_folder(place)) {
        if (interpreter_in(place, path)) return from_interpreter(find, path);
        if (library_in(place, path)) return from_library(find, path);
        return trtxpy_fail(TRTXPY_PYTHON, "there is no Python in the folder %s: neither bin/python3 nor lib/libpython3.*.so",
                           place);
    }
    if (!is_file(place)) return trtxpy_fail(TRTXPY_PYTHON, "%s: %s", place, strerror(errno));
    if (strlen(place) >= sizeof path - 2) return trtxpy_fail(TRTXPY_PYTHON, "%s: %s", place, strerror(ENAMETOOLONG));
    snprintf(path, sizeof path, "%s%s", strchr(place, '/') ? "" : "./", place); /* else it would be looked for elsewhere */
    if (strstr(base_name(path), ".so")) return from_library(find, path);
    return from_interpreter(find, path);
}

void trtxpy_package_parent(char folder[PATH_MAX]) {
    static const char tail[] = "/trtx_py/capi";
    Dl_info about;
    char *slash;
    /* the address of something of this library's */
    if (dladdr((const void *)&install_hint, &about) && about.dli_fname && realpath(about.dli_fname, folder) &&
        (slash = strrchr(folder, '/'))) {
        *slash = '\0';
        size_t length = strlen(folder);
        if (length > sizeof tail - 1 && strcmp(folder + length - (sizeof tail - 1), tail) == 0) {
            folder[length - (sizeof tail - 1)] = '\0';
            return;
        }
    }
    folder[0] = '\0';
}

/* The environment that this library is installed in: PREFIX/lib/python3.11/site-packages/trtx_py/capi/libtrtxpy.so, or the
 * .venv of a checkout. */
static bool environment_around(char place[PATH_MAX]) {
    char parent[PATH_MAX];
    trtxpy_package_parent(parent);
    if (!*parent) return false;
    if (join(place, "%s/.venv", parent) && is_folder(place)) return true;
    char *name = strrchr(parent, '/');
    if (!name || (strcmp(name, "/site-packages") != 0 && strcmp(name, "/dist-packages") != 0)) return false;
    *name = '\0';
    for (int i = 0; i < 2; i++) { /* lib, python3.11 */
        if (!(name = strrchr(parent, '/')) || name == parent) return false;
        if (i == 0 && strncmp(name, "/python3", 8) != 0) return false;
        *name = '\0';
    }
    strcpy(place, parent);
    return interpreter_in(place, parent);
}

typedef struct reasons {
    char text[3000];
} reasons;

/* A hint that nobody gave on purpose is passed over if it leads nowhere. */
static bool try_hint(search *find, reasons *why, const char *source, const char *place) {
    find->environment->source = source;
    find->environment->executable[0] = find->environment->home[0] = '\0';
    if (from_place(find, place) == TRTXPY_OK) return true;
    size_t used = strlen(why->text);
    snprintf(why->text + used, sizeof why->text - used, "%s%s: %s", used ? "; " : "", source, trtxpy_last_error());
    return false;
}

static trtxpy_status follow_hints(search *find, const char *hint, reasons *why) {
    const char *source = "the argument `python`", *variable = getenv("TRTXPY_PYTHON");
    if (!hint || !*hint) {
        hint = variable;
        source = "TRTXPY_PYTHON";
    }
    if (hint && *hint) {
        if (try_hint(find, why, source, hint)) return TRTXPY_OK;
        return trtxpy_fail_text(TRTXPY_PYTHON, why->text);
    }
    char place[PATH_MAX];
    variable = getenv("VIRTUAL_ENV");
    if (variable && *variable && try_hint(find, why, "VIRTUAL_ENV", variable)) return TRTXPY_OK;
    if (environment_around(place) && try_hint(find, why, "the environment of libtrtxpy.so", place)) return TRTXPY_OK;
    if (try_hint(find, why, "python3 on PATH", "python3")) return TRTXPY_OK;
    return trtxpy_fail(TRTXPY_PYTHON,
                       "no Python was found that can be used. %s. Set TRTXPY_PYTHON to an interpreter, a virtual "
                       "environment or a libpython with trtx_py",
                       why->text);
}

trtxpy_status trtxpy_find_python(const char *hint, void **present, trtxpy_environment *environment) {
    reasons *why = calloc(1, sizeof *why);
    if (!why) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "out of memory");
    *environment = (trtxpy_environment){0};
    search find = {.environment = environment, .present = present};
    trtxpy_status status = TRTXPY_OK;
    if (present) {
        status = trtxpy_python_check(*present);
        trtxpy_python_version_of(*present, &find.version);
        environment->handle = *present;
        strcpy(environment->version, find.version.text);
    }
    if (status == TRTXPY_OK) status = follow_hints(&find, hint, why);
    bool asked_for = (hint && *hint) || (getenv("TRTXPY_PYTHON") && *getenv("TRTXPY_PYTHON"));
    if (present && status != TRTXPY_OK && !asked_for) { /* no environment of that version: its own installation is one */
        environment->source = "the libpython of this process";
        environment->executable[0] = environment->home[0] = '\0';
        status = settle_in_prefix(&find, *present);
    }
    free(why);
    return status;
}
