/* The Python of this process: which it is, whose it is, and its end.
 *
 * An interpreter that the library starts belongs to a thread of the library, its main thread: it begins there, imports
 * trtx_py there, and ends there. The other threads come and go with PyGILState_Ensure. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "host_internal.h"

#ifndef TRTXPY_EXIT_PATIENCE_S
#define TRTXPY_EXIT_PATIENCE_S 10
#endif

enum {
    STACK_BYTES = 16 << 20, /* as the main thread of a program has, and more: imports go deep */
    MOST_EXIT_HANDLERS = 30,
    TEXT_BYTES = 4096
};

enum phase {
    IDLE, /* nothing started; what failed may be tried again */
    BARE, /* an interpreter of the library's runs, and could not import trtx_py yet */
    RUNNING,
    BROKEN, /* an interpreter could not be started; CPython cannot try that twice */
    ENDED
};

/* One at a time starts and stops. Never taken with Python's lock. */
static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int phase = IDLE; /* written with `starting` */
static atomic_bool own;          /* the interpreter is the library's, to be ended by it */
static _Atomic(const trtxpy_python *) python;
static _Atomic(PyObject *) control;
static atomic_bool forked;
static _Atomic(void (*)(void)) before_end;
static trtxpy_python functions;
static char broken_text[TEXT_BYTES];
static _Thread_local bool library_thread;

/* What goes between the threads that start or stop, and the interpreter's. */
static struct {
    pthread_once_t once;
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* by the monotonic clock */
    pthread_t thread;
    pid_t process;
    bool alive, joinable, import_wanted, end_wanted, call_before_end, abandoned;
    enum phase outcome; /* of the start or the import */
    bool answered;
    trtxpy_status status;
    char text[TEXT_BYTES];
    const char *hint; /* the caller's, until it is answered */
    void **present, *present_handle;
    trtxpy_environment environment;
} desk = {.once = PTHREAD_ONCE_INIT, .mutex = PTHREAD_MUTEX_INITIALIZER};

/* ---- fork ---- */

static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static pthread_mutex_t looking = PTHREAD_MUTEX_INITIALIZER;

/* No lock is taken before a fork, so that a fork never waits. */
static void in_child(void) {
    if (atomic_load(&phase) != IDLE) {
        atomic_store(&forked, true);
        atomic_store(&python, NULL);
        atomic_store(&control, NULL);
    } else { /* other threads may have held them */
        starting = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
        looking = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    }
}

static void watch_forks(void) {
    pthread_atfork(NULL, NULL, in_child);
}

bool trtxpy_host_forked(void) {
    return atomic_load_explicit(&forked, memory_order_relaxed);
}

/* ---- Python's lock ---- */

/* PyGILState_Check would do, did it not say yes to everything once a process has had a subinterpreter. */
typedef struct lock_functions {
    int minor;
    void *(*PyThreadState_GetUnchecked)(void);
    void *(*PyGILState_GetThisThreadState)(void);
    void *(*PyEval_SaveThread)(void);
    void (*PyEval_RestoreThread)(void *);
    int (*Py_IsInitialized)(void);
} lock_functions;

static _Atomic(const lock_functions *) lock;

/* With `looking`. */
static void learn_lock(void *handle) {
    static lock_functions found;
    trtxpy_python_version version;
    if (atomic_load(&lock) || !trtxpy_python_version_of(handle, &version) || version.major != 3) return;
    found.minor = version.minor;
    *(void **)&found.PyThreadState_GetUnchecked = dlsym(handle, "PyThreadState_GetUnchecked");
    if (!found.PyThreadState_GetUnchecked) /* its name before 3.13 */
        *(void **)&found.PyThreadState_GetUnchecked = dlsym(handle, "_PyThreadState_UncheckedGet");
    *(void **)&found.PyGILState_GetThisThreadState = dlsym(handle, "PyGILState_GetThisThreadState");
    *(void **)&found.PyEval_SaveThread = dlsym(handle, "PyEval_SaveThread");
    *(void **)&found.PyEval_RestoreThread = dlsym(handle, "PyEval_RestoreThread");
    *(void **)&found.Py_IsInitialized = dlsym(handle, "Py_IsInitialized");
    if (found.PyThreadState_GetUnchecked && found.PyGILState_GetThisThreadState && found.PyEval_SaveThread &&
        found.PyEval_RestoreThread && found.Py_IsInitialized)
        atomic_store_explicit(&lock, &found, memory_order_release);
}

/* NULL while no Python runs. Callers may hold its lock before the library knows of it. */
static const lock_functions *running_lock(void) {
    if (trtxpy_host_forked()) return NULL;
    const lock_functions *known = atomic_load_explicit(&lock, memory_order_acquire);
    if (!known) {
        void *handle;
        pthread_once(&fork_once, watch_forks);
        pthread_mutex_lock(&looking);
        if (trtxpy_present_python(&handle) == TRTXPY_RUNS) learn_lock(handle);
        pthread_mutex_unlock(&looking);
        known = atomic_load_explicit(&lock, memory_order_acquire);
    }
    return known && known->Py_IsInitialized() ? known : NULL;
}

void *trtxpy_host_unlock(void) {
    const lock_functions *known = running_lock();
    void *state = known ? known->PyThreadState_GetUnchecked() : NULL;
    /* until 3.11 that is the state of whichever thread has the lock */
    if (!state || (known->minor < 12 && state != known->PyGILState_GetThisThreadState())) return NULL;
    return known->PyEval_SaveThread();
}

void trtxpy_host_relock(void *state) {
    const lock_functions *known = state ? atomic_load_explicit(&lock, memory_order_acquire) : NULL;
    if (!known || trtxpy_host_forked()) return;
    /* Where Python ended meanwhile and is not ours, it is for Python to say what becomes of a thread that comes back. */
    if (!atomic_load(&own) || known->Py_IsInitialized()) known->PyEval_RestoreThread(state);
}

static _Thread_local bool state_is_ours;
static _Thread_local unsigned calls; /* into Python, in progress */

void trtxpy_host_keeps_state(bool keeps) {
    state_is_ours = keeps;
}

void trtxpy_host_call_begins(void) {
    calls++;
}

void trtxpy_host_call_ends(void) {
    calls--;
}

/* Is Python somewhere below in this thread's stack? A state that the library merely keeps for the thread does not mean it. */
static bool inside_python(void) {
    const lock_functions *known = running_lock();
    void *state = known ? known->PyGILState_GetThisThreadState() : NULL;
    return state && (!state_is_ours || calls || known->PyThreadState_GetUnchecked() == state);
}

/* ---- what the library asks ---- */

const trtxpy_python *trtxpy_host_python(void) {
    const trtxpy_python *running = atomic_load_explicit(&python, memory_order_acquire);
    return running && running->Py_IsInitialized() ? running : NULL;
}

PyObject *trtxpy_host_control(void) {
    return trtxpy_host_python() ? atomic_load_explicit(&control, memory_order_acquire) : NULL;
}

void trtxpy_host_mark_thread(void) {
    library_thread = true;
}

static void publish(PyObject *module) {
    atomic_store_explicit(&control, module, memory_order_release);
    atomic_store_explicit(&python, &functions, memory_order_release);
}

static void withdraw(void) {
    atomic_store(&python, NULL);
    atomic_store(&control, NULL);
}

/* ---- the interpreter's thread ---- */

static void prepare_desk(void) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&desk.changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* The text is this thread's last error. */
static void answer(enum phase outcome, trtxpy_status status) {
    pthread_mutex_lock(&desk.mutex);
    desk.outcome = outcome;
    desk.status = status;
    snprintf(desk.text, sizeof desk.text, "%s", status == TRTXPY_OK ? "" : trtxpy_last_error());
    desk.import_wanted = false;
    desk.answered = true;
    if (outcome == IDLE || outcome == BROKEN) desk.alive = false;
    pthread_cond_broadcast(&desk.changed);
    pthread_mutex_unlock(&desk.mutex);
}

/* Until Python runs and this thread holds its lock. */
static enum phase begin_python(trtxpy_status *status) {
    trtxpy_environment *environment = &desk.environment;
    *status = trtxpy_find_python(desk.hint, desk.present, environment);
    if (*status == TRTXPY_OK) *status = trtxpy_python_look_up(environment->handle, &functions);
    if (*status != TRTXPY_OK) return IDLE;
    struct sigaction interrupt;
    sigaction(SIGINT, NULL, &interrupt);
    *status = trtxpy_python_start(environment->handle, environment->executable, environment->home);
    if (*status != TRTXPY_OK) {
        char why[2048];
        snprintf(why, sizeof why, "%s", trtxpy_last_error());
        *status = trtxpy_fail(*status, "Python %s of %s (%s) did not start: %s. It cannot be tried again in this process",
                              environment->version, *environment->executable ? environment->executable : environment->home,
                              environment->source, why);
        return BROKEN;
    }
    pthread_mutex_lock(&looking);
    learn_lock(environment->handle);
    pthread_mutex_unlock(&looking);
    trtxpy_keep_sigint(&functions, &interrupt);
    return BARE;
}

/* With Python's lock. */
static void import_control(void) {
    PyObject *module;
    trtxpy_status status = trtxpy_import_control(&functions, &desk.environment, desk.environment.handle, &module);
    if (status == TRTXPY_OK) publish(module);
    answer(status == TRTXPY_OK ? RUNNING : BARE, status);
}

/* False: it is to end. */
static bool wait_for_work(bool *call_before_end) {
    pthread_mutex_lock(&desk.mutex);
    while (!desk.import_wanted && !desk.end_wanted) pthread_cond_wait(&desk.changed, &desk.mutex);
    bool import = desk.import_wanted;
    *call_before_end = desk.call_before_end;
    pthread_mutex_unlock(&desk.mutex);
    return import;
}

static void *interpreter(void *nothing) {
    (void)nothing;
    pthread_setname_np(pthread_self(), "trtxpy-python");
    library_thread = true;
    trtxpy_status status;
    enum phase begun = begin_python(&status);
    if (begun != BARE) {
        answer(begun, status);
        return NULL;
    }
    int (*Py_FinalizeEx)(void);
    *(void **)&Py_FinalizeEx = dlsym(desk.environment.handle, "Py_FinalizeEx");
    import_control();
    void *state = functions.PyEval_SaveThread();
    bool call_before_end;
    while (wait_for_work(&call_before_end)) {
        functions.PyEval_RestoreThread(state);
        import_control();
        state = functions.PyEval_SaveThread();
    }
    void (*notify)(void) = atomic_load(&before_end);
    if (call_before_end && notify && trtxpy_host_python()) notify();
    PyObject *module = atomic_load(&control);
    withdraw();
    if (functions.Py_IsInitialized()) { /* else the process has ended it, which it may where it brought libpython along */
        functions.PyEval_RestoreThread(state);
        if (module) functions.Py_DecRef(module);
        Py_FinalizeEx(); /* whose only failure is that sys.stdout could not be flushed */
    }
    pthread_mutex_lock(&desk.mutex);
    desk.alive = false;
    pthread_cond_broadcast(&desk.changed);
    pthread_mutex_unlock(&desk.mutex);
    return NULL;
}

/* Signals are for the program's own threads. */
static int start_thread(void) {
    pthread_attr_t attributes;
    sigset_t all, before;
    int error = pthread_attr_init(&attributes);
    if (error) return error;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&desk.thread, &attributes, interpreter, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

/* Once. */
static void join_thread(void) {
    pthread_mutex_lock(&desk.mutex);
    bool join = desk.joinable;
    desk.joinable = false;
    pthread_mutex_unlock(&desk.mutex);
    if (join) pthread_join(desk.thread, NULL);
}

/* ---- exit ---- */

/* Ask the interpreter's thread to end, and wait for it; for ever if patience_s is 0. The thread may be left behind. */
static void end_interpreter(bool call_before_end, time_t patience_s) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += patience_s;
    pthread_mutex_lock(&desk.mutex);
    desk.end_wanted = true;
    desk.call_before_end |= call_before_end;
    pthread_cond_broadcast(&desk.changed);
    int error = 0;
    while (desk.alive && !error)
        error = patience_s ? pthread_cond_timedwait(&desk.changed, &desk.mutex, &until)
                           : pthread_cond_wait(&desk.changed, &desk.mutex);
    bool ended = !desk.alive;
    pthread_mutex_unlock(&desk.mutex);
    if (ended) join_thread();
}

/* A program that ends should not have to know what it started. Does nothing where waiting could not help: in a child, in a
 * thread that Python or the library would wait for in its turn. */
static void at_exit(void) {
    if (trtxpy_host_forked() || getpid() != desk.process || library_thread || inside_python()) return;
    pthread_mutex_lock(&desk.mutex);
    bool wanted = desk.alive && !desk.abandoned;
    desk.abandoned = true; /* should it take too long, another handler does not wait again */
    pthread_mutex_unlock(&desk.mutex);
    if (wanted) end_interpreter(true, TRTXPY_EXIT_PATIENCE_S);
}

static void register_at_exit(void) {
    static atomic_int registered;
    if (atomic_fetch_add(&registered, 1) < MOST_EXIT_HANDLERS) atexit(at_exit);
}

void trtxpy_host_at_exit(void (*function)(void)) {
    atomic_store(&before_end, function);
    if (atomic_load(&own)) register_at_exit();
}

/* Python exits, whose process this is. With its lock, from its atexit. */
static void python_ends(void) {
    if (trtxpy_host_forked() || !trtxpy_host_python()) return;
    void *unlocked = trtxpy_host_unlock();
    /* A thread that starts the library at this moment gets done first; one that hangs is not waited for. */
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += TRTXPY_EXIT_PATIENCE_S;
    bool locked = pthread_mutex_timedlock(&starting, &until) == 0;
    void (*notify)(void) = atomic_load(&before_end);
    if (notify) notify();
    withdraw();
    atomic_store(&phase, ENDED);
    if (locked) pthread_mutex_unlock(&starting);
    trtxpy_host_relock(unlocked);
}

/* ---- start and stop ---- */

/* With `starting`: the answer of the interpreter's thread to what was asked before. */
static trtxpy_status await_answer(void) {
    pthread_mutex_lock(&desk.mutex);
    while (!desk.answered) pthread_cond_wait(&desk.changed, &desk.mutex);
    enum phase outcome = desk.outcome;
    trtxpy_status status = desk.status;
    pthread_mutex_unlock(&desk.mutex);
    atomic_store(&phase, outcome);
    if (outcome == IDLE || outcome == BROKEN) join_thread();
    if (outcome == BROKEN) snprintf(broken_text, sizeof broken_text, "%s", desk.text);
    return status == TRTXPY_OK ? TRTXPY_OK : trtxpy_fail_text(status, desk.text);
}

static trtxpy_status start_own(const char *hint, void **present) {
    pthread_once(&desk.once, prepare_desk);
    atomic_store(&own, true);
    atomic_store(&phase, BARE); /* a fork from here on makes a child that cannot use the library */
    desk.process = getpid();
    static bool registered;
    if (!registered) register_at_exit();
    registered = true;
    pthread_mutex_lock(&desk.mutex);
    desk.hint = hint;
    desk.present = present;
    desk.answered = false;
    desk.alive = true;
    int error = start_thread();
    if (error) desk.alive = false;
    desk.joinable = !error;
    pthread_mutex_unlock(&desk.mutex);
    trtxpy_status status;
    if (error) {
        atomic_store(&phase, IDLE);
        status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no thread for Python: %s", strerror(error));
    } else {
        status = await_answer();
    }
    if (atomic_load(&phase) == IDLE) atomic_store(&own, false);
    return status;
}

static trtxpy_status import_again(void) {
    pthread_mutex_lock(&desk.mutex);
    desk.answered = false;
    desk.import_wanted = true;
    bool ending = desk.end_wanted;
    pthread_cond_broadcast(&desk.changed);
    pthread_mutex_unlock(&desk.mutex);
    if (ending) return trtxpy_fail(TRTXPY_CLOSED, "the process exits");
    return await_answer();
}

/* Python was there before the library. */
static trtxpy_status join_python(void *handle) {
    static bool registered;
    trtxpy_status status = trtxpy_python_look_up(handle, &functions);
    if (status != TRTXPY_OK) {
        char why[1024];
        snprintf(why, sizeof why, "%s", trtxpy_last_error());
        return trtxpy_fail(status, "the Python of this process cannot be used: %s", why);
    }
    PyObject *module = NULL, *error[3];
    int held = functions.PyGILState_Ensure();
    functions.PyErr_Fetch(&error[0], &error[1], &error[2]); /* the caller's */
    status = trtxpy_import_control(&functions, NULL, handle, &module);
    if (status == TRTXPY_OK && !registered) {
        status = trtxpy_call_at_python_exit(&functions, handle, python_ends);
        registered = status == TRTXPY_OK;
    }
    if (status == TRTXPY_OK) {
        publish(module);
        atomic_store(&phase, RUNNING);
    } else if (module) {
        functions.Py_DecRef(module);
    }
    functions.PyErr_Restore(error[0], error[1], error[2]);
    functions.PyGILState_Release(held);
    return status;
}

static trtxpy_status refuse_ended(void) {
    return trtxpy_fail(TRTXPY_CLOSED, "Python has ended in this process, and the library with it; start the program again");
}

static trtxpy_status start(const char *hint) {
    switch (atomic_load(&phase)) {
    case BROKEN:
        return trtxpy_fail_text(TRTXPY_PYTHON, broken_text);
    case RUNNING:
        if (trtxpy_host_python()) return TRTXPY_OK;
        withdraw(); /* somebody ended it */
        atomic_store(&phase, ENDED);
        /* fall through */
    case ENDED:
        return refuse_ended();
    case BARE:
        return import_again();
    }
    switch (trtxpy_present_python(&desk.present_handle)) {
    case TRTXPY_RUNS:
        return join_python(desk.present_handle);
    case TRTXPY_HAS_ENDED:
        return refuse_ended();
    case TRTXPY_NOT_STARTED: /* the process is linked with libpython */
        return start_own(hint, &desk.present_handle);
    case TRTXPY_ABSENT:
        break;
    }
    return start_own(hint, NULL);
}

trtxpy_status trtxpy_host_start(const char *hint) {
    if (trtxpy_host_forked())
        return trtxpy_fail(TRTXPY_FORKED, "this process was forked from the one that started the library");
    if (trtxpy_host_python()) return TRTXPY_OK;
    pthread_once(&fork_once, watch_forks);
    void *unlocked = trtxpy_host_unlock();
    pthread_mutex_lock(&starting);
    trtxpy_status status = start(hint);
    pthread_mutex_unlock(&starting);
    trtxpy_host_relock(unlocked);
    return status;
}

static trtxpy_status stop(void) {
    int current = atomic_load(&phase);
    if (current != RUNNING && current != BARE) return TRTXPY_OK;
    if (!atomic_load(&own)) {
        const trtxpy_python *running = trtxpy_host_python();
        PyObject *module = atomic_load(&control);
        withdraw();
        atomic_store(&phase, running ? IDLE : ENDED);
        if (!running) return TRTXPY_OK;
        int held = running->PyGILState_Ensure();
        running->Py_DecRef(module);
        running->PyGILState_Release(held);
        return TRTXPY_OK;
    }
    if (inside_python())
        return trtxpy_fail(TRTXPY_BUSY,
                           "this thread is called by Python code of the interpreter that would end; shut down from outside");
    withdraw();
    atomic_store(&phase, ENDED);
    end_interpreter(false, 0);
    return TRTXPY_OK;
}

trtxpy_status trtxpy_host_stop(void) {
    if (trtxpy_host_forked())
        return trtxpy_fail(TRTXPY_FORKED, "this process was forked from the one that started the library");
    void *unlocked = trtxpy_host_unlock();
    pthread_mutex_lock(&starting);
    trtxpy_status status = stop();
    pthread_mutex_unlock(&starting);
    trtxpy_host_relock(unlocked);
    return status;
}
