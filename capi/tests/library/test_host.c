/* The host in a C program. run-host.sh runs each case in a process of its own: test_host CASE [ARGUMENTS]. */
#define _GNU_SOURCE
#include "test_host.h"

#include <dlfcn.h>
#include <fenv.h>
#include <locale.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio_ext.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static char facts[4096];

static const char *fact(const char *line) {
    return strstr(facts, line) ? "" : line;
}

#define CHECK_FACT(line)                                                                \
    do {                                                                                \
        if (*fact(line)) {                                                              \
            fprintf(stderr, "%s:%d: no %s in:\n%s\n", __FILE__, __LINE__, line, facts); \
            _Exit(1);                                                                   \
        }                                                                               \
    } while (0)

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* ---- the process is as it was ---- */

typedef struct process_state {
    struct sigaction actions[65];
    sigset_t mask;
    char locale[512], cwd[4096], environment[16384];
    mode_t umask;
    int rounding, line_buffered;
    size_t buffer;
} process_state;

static void note_state(process_state *state) {
    memset(state, 0, sizeof *state);
    for (int i = 1; i < 65; i++)
        if (i != 32 && i != 33) { /* glibc's own; as is SA_RESTORER, which it adds */
            sigaction(i, NULL, &state->actions[i]);
            state->actions[i].sa_flags &= ~0x04000000;
        }
    pthread_sigmask(SIG_SETMASK, NULL, &state->mask);
    snprintf(state->locale, sizeof state->locale, "%s", setlocale(LC_ALL, NULL));
    CHECK(getcwd(state->cwd, sizeof state->cwd));
    for (char **entry = environ; *entry; entry++) {
        size_t used = strlen(state->environment);
        snprintf(state->environment + used, sizeof state->environment - used, "%s\n", *entry);
    }
    umask(state->umask = umask(022));
    state->rounding = fegetround();
    state->line_buffered = __flbf(stdout);
    state->buffer = __fbufsize(stdout);
}

static void run_own(int count, char **arguments) {
    static char buffer[777];
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
    fesetround(FE_UPWARD);
    setlocale(LC_ALL, count > 1 ? arguments[1] : "C");
    signal(SIGPIPE, SIG_DFL);
    static process_state before, after;
    note_state(&before);
    CHECK(!trtxpy_host_python() && !trtxpy_host_control() && !trtxpy_host_unlock());
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    note_state(&after);
    for (int i = 1; i < 65; i++)
        if (before.actions[i].sa_handler != after.actions[i].sa_handler ||
            before.actions[i].sa_flags != after.actions[i].sa_flags) {
            fprintf(stderr, "signal %d: handler %p flags %#x became %p %#x\n", i,
                    (void *)(size_t)before.actions[i].sa_handler, before.actions[i].sa_flags,
                    (void *)(size_t)after.actions[i].sa_handler, after.actions[i].sa_flags);
            _Exit(1);
        }
    CHECK(memcmp(&before.mask, &after.mask, sizeof before.mask) == 0);
    CHECK(strcmp(before.locale, after.locale) == 0 && strcmp(before.cwd, after.cwd) == 0);
    CHECK(strcmp(before.environment, after.environment) == 0);
    CHECK(before.umask == after.umask && before.rounding == after.rounding);
    CHECK(before.line_buffered == after.line_buffered && before.buffer == after.buffer);
    CHECK(!trtxpy_host_forked() && trtxpy_host_python() && trtxpy_host_control());
    CHECK(trtxpy_host_start("/nowhere") == TRTXPY_OK); /* it runs, whatever the hint */
    fesetround(FE_TONEAREST);
    call_control("interpreter", facts, sizeof facts);
    char line[4200];
    snprintf(line, sizeof line, "prefix=%s\n", arguments[0]);
    CHECK_FACT(line);
    CHECK_FACT("imports=1\n");
    CHECK_FACT("isolated=1\n");
    CHECK_FACT("environment=0\n");
    CHECK_FACT("user_site=0\n");
    CHECK_FACT("utf8=1\n");
    CHECK_FACT("encoding=utf-8\n");
    CHECK_FACT("sigint=True\n");
    CHECK_FACT("main=True\n");
    CHECK_FACT("name=trtxpy-python\n");
    CHECK_FACT("deep=900\n");
    CHECK_FACT("pythonpath=False\n");
    CHECK_FACT("masked=1");
    CHECK(!trtxpy_host_unlock()); /* this thread has not got it */
    const trtxpy_python *py = trtxpy_host_python();
    int held = py->PyGILState_Ensure();
    CHECK(py->PyGILState_Check());
    void *state = trtxpy_host_unlock();
    CHECK(state && !trtxpy_host_unlock() && call_control("count", NULL, 0) > 0);
    trtxpy_host_relock(state);
    CHECK(py->PyGILState_Check());
    CHECK(trtxpy_host_stop() == TRTXPY_BUSY); /* from inside */
    py->PyGILState_Release(held);
    trtxpy_host_relock(NULL);
}

/* ---- its end ---- */

static void run_stop(int count, char **arguments) {
    (void)count;
    (void)arguments;
    CHECK(trtxpy_host_stop() == TRTXPY_OK); /* there is nothing */
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    call_control("mark_exit", NULL, 0);
    CHECK(trtxpy_host_stop() == TRTXPY_OK);
    CHECK(write(1, "stopped\n", 8) == 8);
    CHECK(!trtxpy_host_python() && !trtxpy_host_control());
    CHECK(trtxpy_host_stop() == TRTXPY_OK);
    CHECK(trtxpy_host_start(NULL) == TRTXPY_CLOSED);
    CHECK_TEXT("ended");
    CHECK(!trtxpy_host_unlock());
}

static void before_end(void) {
    CHECK(call_control("count", NULL, 0) > 0); /* Python is still there */
    CHECK(write(1, "before the end\n", 15) == 15);
}

static void run_exit(int count, char **arguments) {
    (void)count;
    (void)arguments;
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    trtxpy_host_at_exit(before_end);
    trtxpy_host_at_exit(before_end); /* as after libraries were loaded; it runs once */
    call_control("mark_exit", NULL, 0);
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
}

static void *start_and_mark(void *nothing) {
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    trtxpy_host_at_exit(before_end);
    call_control("mark_exit", NULL, 0);
    return nothing;
}

/* Started by a thread that is gone at exit. */
static void run_exit_other(int count, char **arguments) {
    (void)count;
    (void)arguments;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, start_and_mark, NULL) == 0);
    pthread_join(thread, NULL);
}

static void *hang(void *nothing) {
    pause();
    return nothing;
}

static pthread_t callback_thread;
static void join_callback(void) {
    pthread_join(callback_thread, NULL);
}

static void *exit_in_callback(void *nothing) {
    trtxpy_host_mark_thread();
    exit(7);
    return nothing;
}

/* A callback that ends the program, while before_end would wait for callbacks. */
static void run_exit_callback(int count, char **arguments) {
    (void)count;
    (void)arguments;
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    trtxpy_host_at_exit(join_callback);
    CHECK(pthread_create(&callback_thread, NULL, exit_in_callback, NULL) == 0);
    pause();
}

static void run_exit_hang(int count, char **arguments) {
    (void)count;
    (void)arguments;
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    CHECK(pthread_create(&callback_thread, NULL, hang, NULL) == 0);
    trtxpy_host_at_exit(join_callback);
}

static void run_exit_python_thread(int count, char **arguments) {
    (void)count;
    (void)arguments;
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    call_control("non_daemon", NULL, 0);
}

/* Python code calls exit(). */
static void run_exit_inside(int count, char **arguments) {
    (void)count;
    (void)arguments;
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    trtxpy_host_at_exit(before_end);
    call_control("leave", NULL, 0);
}

/* ---- threads ---- */

static pthread_barrier_t gate;
static atomic_int started_well;

static void *start_together(void *hint) {
    pthread_barrier_wait(&gate);
    if (trtxpy_host_start(hint) == TRTXPY_OK) atomic_fetch_add(&started_well, 1);
    for (int i = 0; i < 50; i++) {
        CHECK(call_control("count", NULL, 0) > 0);
        CHECK(!trtxpy_host_unlock()); /* others have the lock at that moment, this thread has not */
    }
    return NULL;
}

static void run_threads(int count, char **arguments) {
    enum { THREADS = 64 };
    (void)count;
    (void)arguments;
    pthread_t threads[THREADS];
    pthread_attr_t small; /* the interpreter has a stack of its own */
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 128 << 10);
    pthread_barrier_init(&gate, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&threads[i], &small, start_together, NULL) == 0);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    CHECK(started_well == THREADS);
    CHECK(call_control("count", NULL, 0) == THREADS * 50 + 1);
    call_control("interpreter", facts, sizeof facts);
    CHECK_FACT("imports=1\n");
    CHECK(trtxpy_host_stop() == TRTXPY_OK);
}

static void *fail_together(void *hint) {
    pthread_barrier_wait(&gate);
    if (trtxpy_host_start(hint) == TRTXPY_PYTHON) atomic_fetch_add(&started_well, 1);
    CHECK_TEXT("/nowhere");
    return NULL;
}

/* Failures are for each caller, and can be tried again. */
static void run_retry(int count, char **arguments) {
    enum { THREADS = 16 };
    pthread_t threads[THREADS];
    pthread_barrier_init(&gate, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&threads[i], NULL, fail_together, "/nowhere/python") == 0);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    CHECK(started_well == THREADS && !trtxpy_host_python() && !trtxpy_host_forked());
    pid_t child = fork(); /* nothing was started: the child may */
    if (child == 0) {
        CHECK(trtxpy_host_start(count ? arguments[0] : NULL) == TRTXPY_OK);
        CHECK(call_control("count", NULL, 0) == 1);
        exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(trtxpy_host_start(count ? arguments[0] : NULL) == TRTXPY_OK);
}

/* ---- fork ---- */

static atomic_bool enough;
static void *keep_busy(void *nothing) {
    while (!enough) call_control("count", NULL, 0);
    return nothing;
}

static void *keep_starting(void *nothing) {
    while (!enough) CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    return nothing;
}

static void await_child(pid_t child, int expected) {
    int status = -1;
    for (int i = 0; i < 6000; i++) {
        pid_t got = waitpid(child, &status, WNOHANG);
        if (got == child) {
            CHECK(WIFEXITED(status) && WEXITSTATUS(status) == expected);
            return;
        }
        usleep(10000);
    }
    kill(child, SIGKILL);
    CHECK(!"the child hangs");
}

static void run_fork(int count, char **arguments) {
    (void)count;
    (void)arguments;
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    trtxpy_host_at_exit(before_end);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, i < 3 ? keep_busy : keep_starting, NULL) == 0);
    for (int i = 0; i < 60; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            if (i % 2) {
                execl("/bin/true", "true", (char *)NULL);
                _exit(9);
            }
            bool refused = trtxpy_host_forked() && !trtxpy_host_python() && !trtxpy_host_control() &&
                           !trtxpy_host_unlock() && trtxpy_host_start(NULL) == TRTXPY_FORKED &&
                           trtxpy_host_stop() == TRTXPY_FORKED;
            trtxpy_host_relock(NULL);
            exit(refused ? 5 : 6); /* with the handlers of exit */
        }
        await_child(child, i % 2 ? 0 : 5);
    }
    enough = true;
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    CHECK(!trtxpy_host_forked() && call_control("count", NULL, 0) > 0);
}

static void *start_once(void *nothing) {
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    return nothing;
}

/* Forks while the library starts. */
static void run_fork_start(int count, char **arguments) {
    (void)count;
    (void)arguments;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, start_once, NULL) == 0);
    while (!trtxpy_host_python()) {
        pid_t child = fork();
        if (child == 0) execl("/bin/true", "true", (char *)NULL);
        await_child(child, 0);
    }
    pthread_join(thread, NULL);
}

/* ---- hints ---- */

/* hint EXPECTED-PREFIX [HINT]: without one, what the environment says. */
static void run_hint(int count, char **arguments) {
    CHECK(trtxpy_host_start(count > 1 ? arguments[1] : NULL) == TRTXPY_OK);
    call_control("interpreter", facts, sizeof facts);
    char line[4200];
    snprintf(line, sizeof line, "prefix=%s\n", arguments[0]);
    CHECK_FACT(line);
    CHECK_FACT("imports=1\n");
}

/* refused HINT PART...: fails, and the text has the parts; twice the same. HINT "-": none. */
static void run_refused(int count, char **arguments) {
    const char *hint = strcmp(arguments[0], "-") == 0 ? NULL : arguments[0];
    char first[4096];
    double begin = now_s();
    CHECK(trtxpy_host_start(hint) == TRTXPY_PYTHON);
    CHECK(now_s() - begin < 40); /* a script that does not answer runs for 60 */
    snprintf(first, sizeof first, "%s", trtxpy_last_error());
    for (int i = 1; i < count; i++) CHECK_TEXT(arguments[i]);
    if (getenv("TRTXPY_SHOW")) puts(first);
    CHECK(!trtxpy_host_python() && !trtxpy_host_control());
    CHECK(trtxpy_host_start(hint) == TRTXPY_PYTHON && strcmp(first, trtxpy_last_error()) == 0);
}

/* broken HINT GOOD-HINT: CPython starts once only. */
static void run_broken(int count, char **arguments) {
    char first[4096];
    (void)count;
    CHECK(trtxpy_host_start(arguments[0]) == TRTXPY_PYTHON);
    CHECK_TEXT("did not start");
    snprintf(first, sizeof first, "%s", trtxpy_last_error());
    if (getenv("TRTXPY_SHOW")) puts(first);
    CHECK(trtxpy_host_start(arguments[1]) == TRTXPY_PYTHON && strcmp(first, trtxpy_last_error()) == 0);
    CHECK(trtxpy_host_stop() == TRTXPY_OK && !trtxpy_host_unlock());
}

/* install HINT COMMAND: trtx_py is missing, then it is installed. */
static void run_install(int count, char **arguments) {
    (void)count;
    CHECK(trtxpy_host_start(arguments[0]) == TRTXPY_PYTHON);
    CHECK_TEXT("ModuleNotFoundError: No module named 'trtx_py'");
    CHECK_TEXT("-m pip install trtx-py");
    if (getenv("TRTXPY_SHOW")) puts(trtxpy_last_error());
    CHECK(!trtxpy_host_python());
    CHECK(system(arguments[1]) == 0);
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK && call_control("count", NULL, 0) == 1);
    CHECK(trtxpy_host_stop() == TRTXPY_OK);
}

/* ---- a Python that the program brought along ---- */

/* linked LIBPYTHON PREFIX: has libpython, and has not started it. */
static void run_linked(int count, char **arguments) {
    (void)count;
    CHECK(dlopen(arguments[0], RTLD_NOW | RTLD_GLOBAL));
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK);
    call_control("interpreter", facts, sizeof facts);
    char line[4200];
    snprintf(line, sizeof line, "prefix=%s\n", arguments[1]);
    CHECK_FACT(line);
    call_control("mark_exit", NULL, 0);
}

/* plugin LIBPYTHON PACKAGES: a plug-in's libpython that only it sees, started by it. */
static void run_plugin(int count, char **arguments) {
    (void)count;
    void *handle = dlopen(arguments[0], RTLD_NOW | RTLD_LOCAL);
    CHECK(handle);
    void (*Py_InitializeEx)(int), (*Py_Finalize)(void);
    void *(*PyEval_SaveThread)(void);
    void (*PyEval_RestoreThread)(void *);
    int (*PyRun_SimpleString)(const char *), (*PyGILState_Check)(void);
    *(void **)&Py_InitializeEx = dlsym(handle, "Py_InitializeEx");
    *(void **)&Py_Finalize = dlsym(handle, "Py_Finalize");
    *(void **)&PyEval_SaveThread = dlsym(handle, "PyEval_SaveThread");
    *(void **)&PyEval_RestoreThread = dlsym(handle, "PyEval_RestoreThread");
    *(void **)&PyRun_SimpleString = dlsym(handle, "PyRun_SimpleString");
    *(void **)&PyGILState_Check = dlsym(handle, "PyGILState_Check");
    setenv("PYTHONPATH", arguments[1], 1);
    Py_InitializeEx(0);
    CHECK(PyRun_SimpleString("raised = ValueError('kept')") == 0);
    CHECK(trtxpy_host_start("/nowhere") == TRTXPY_OK); /* with Python's lock; the hint is of no interest */
    CHECK(PyGILState_Check());
    void *state = trtxpy_host_unlock();
    CHECK(state && !PyGILState_Check());
    CHECK(call_control("count", NULL, 0) == 1);
    trtxpy_host_relock(state);
    CHECK(trtxpy_host_stop() == TRTXPY_OK && !trtxpy_host_python() && PyGILState_Check());
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK && call_control("count", NULL, 0) == 2); /* not ended, so it can */
    trtxpy_host_at_exit(before_end);
    state = PyEval_SaveThread();
    CHECK(trtxpy_host_start(NULL) == TRTXPY_OK && call_control("count", NULL, 0) == 3);
    /* a process with subinterpreters */
    PyEval_RestoreThread(state);
    void *(*Py_NewInterpreter)(void), (*Py_EndInterpreter)(void *);
    void *(*PyThreadState_Swap)(void *);
    *(void **)&Py_NewInterpreter = dlsym(handle, "Py_NewInterpreter");
    *(void **)&Py_EndInterpreter = dlsym(handle, "Py_EndInterpreter");
    *(void **)&PyThreadState_Swap = dlsym(handle, "PyThreadState_Swap");
    void *other = Py_NewInterpreter();
    CHECK(other);
    Py_EndInterpreter(other);
    PyThreadState_Swap(state);
    state = PyEval_SaveThread();
    CHECK(!trtxpy_host_unlock());
    PyEval_RestoreThread(state);
    Py_Finalize();
    CHECK(!trtxpy_host_python() && !trtxpy_host_control() && !trtxpy_host_unlock());
    CHECK(trtxpy_host_start(NULL) == TRTXPY_CLOSED);
    CHECK(trtxpy_host_stop() == TRTXPY_OK);
}

/* ended LIBPYTHON: it has been started and ended before the library came. */
static void run_ended(int count, char **arguments) {
    (void)count;
    void *handle = dlopen(arguments[0], RTLD_NOW | RTLD_GLOBAL);
    void (*Py_InitializeEx)(int), (*Py_Finalize)(void);
    CHECK(handle);
    *(void **)&Py_InitializeEx = dlsym(handle, "Py_InitializeEx");
    *(void **)&Py_Finalize = dlsym(handle, "Py_Finalize");
    Py_InitializeEx(0);
    Py_Finalize();
    CHECK(trtxpy_host_start(NULL) == TRTXPY_CLOSED && !trtxpy_host_python());
}

int main(int count, char **arguments) {
#define CASE(name) {#name, run_##name}
    static const struct {
        const char *name;
        void (*run)(int, char **);
    } cases[] = {CASE(own), CASE(stop), CASE(exit), CASE(exit_other), CASE(exit_callback), CASE(exit_hang),
                 CASE(exit_inside), CASE(exit_python_thread), CASE(threads), CASE(retry), CASE(fork), CASE(fork_start),
                 CASE(hint), CASE(refused), CASE(broken), CASE(install), CASE(linked), CASE(plugin), CASE(ended)};
    for (size_t i = 0; count > 1 && i < sizeof cases / sizeof *cases; i++)
        if (strcmp(arguments[1], cases[i].name) == 0) {
            cases[i].run(count - 2, arguments + 2);
            return 0;
        }
    fprintf(stderr, "no such case\n");
    return 2;
}
