/* Ask an interpreter about itself, in a process of its own. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "host_internal.h"

extern char **environ;

#ifndef TRTXPY_ASK_TIMEOUT_S
#define TRTXPY_ASK_TIMEOUT_S 30 /* a file server that wakes up takes its time */
#endif

/* Works in every Python, so that an old one is named for what it is. Not -I, which Python 2 lacks: the working directory is
 * taken off the path instead. Lines have a mark, as a shim may print something too. */
static const char script[] =
    "import sys\n"
    "sys.path[:1] = [p for p in sys.path[:1] if p]\n"
    "import os, sysconfig\n"
    "encode = getattr(os, 'fsencode', str)\n"
    "stdout = getattr(sys.stdout, 'buffer', sys.stdout)\n"
    "get = sysconfig.get_config_var\n"
    "mapped = ''\n"
    "try:\n"
    "    with open('/proc/self/maps', 'rb') as maps:\n"
    "        for line in maps:\n"
    "            path = line.strip().split(None, 5)[5:]\n"
    "            if path and os.path.basename(path[0]).startswith(b'libpython3.') and not mapped:\n"
    "                mapped = getattr(os, 'fsdecode', str)(path[0])\n"
    "except Exception:\n"
    "    pass\n"
    "answers = [('version', sys.version.split()[0]),\n"
    "           ('implementation', sys.implementation.name if hasattr(sys, 'implementation') else ''),\n"
    "           ('executable', sys.executable), ('base', getattr(sys, 'base_prefix', sys.prefix)),\n"
    "           ('abiflags', getattr(sys, 'abiflags', '')), ('platlib', getattr(sys, 'platlibdir', 'lib')),\n"
    "           ('mapped', mapped)]\n"
    "answers += [(name, get(name)) for name in ('INSTSONAME', 'LDLIBRARY', 'LIBDIR', 'LIBPL', 'MULTIARCH')]\n"
    "for key, value in answers:\n"
    "    stdout.write(encode('trtxpy:%s=%s\\n' % (key, value or '')))\n"
    "stdout.write(encode('trtxpy:end=1\\n'))\n"
    "stdout.flush()\n";

void trtxpy_answer(const trtxpy_answers *answers, const char *key, char *value, size_t room) {
    size_t length = strlen(key);
    value[0] = '\0';
    for (const char *line = answers->text; line; line = strchr(line, '\n')) {
        if (*line == '\n') line++;
        if (strncmp(line, "trtxpy:", 7) != 0 || strncmp(line + 7, key, length) != 0 || line[7 + length] != '=') continue;
        const char *begin = line + 7 + length + 1;
        size_t size = strcspn(begin, "\n");
        if (size >= room) return; /* longer than a path can be */
        memcpy(value, begin, size);
        value[size] = '\0';
        return;
    }
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Above the standard streams: in a process that closed those, the child's file actions would get in each other's way. */
static bool make_pipe(int ends[2]) {
    int made[2];
    if (pipe2(made, O_CLOEXEC) != 0) return false;
    for (int i = 0; i < 2; i++) ends[i] = fcntl(made[i], F_DUPFD_CLOEXEC, 3);
    int error = errno;
    for (int i = 0; i < 2; i++) close(made[i]);
    if (ends[0] >= 0 && ends[1] >= 0) return true;
    for (int i = 0; i < 2; i++)
        if (ends[i] >= 0) close(ends[i]);
    errno = error;
    return false;
}

/* A process group of its own, so that what a shim starts can be ended with it. No signal is blocked. */
static int spawn(const char *path, int output, pid_t *child) {
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    int error = posix_spawn_file_actions_init(&actions);
    if (error) return error;
    error = posix_spawnattr_init(&attributes);
    if (error) {
        posix_spawn_file_actions_destroy(&actions);
        return error;
    }
    sigset_t none;
    sigemptyset(&none);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
    error = posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    if (!error) error = posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
    if (!error) error = posix_spawn_file_actions_adddup2(&actions, output, STDERR_FILENO);
    char *const arguments[] = {(char *)path, "-E", "-s", "-S", "-c", (char *)script, NULL};
    if (!error) error = posix_spawn(child, path, &actions, &attributes, arguments, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return error;
}

/* Until the end of the answers: a process that the interpreter left behind may keep the pipe open. */
static bool read_answers(int input, long long deadline, trtxpy_answers *answers) {
    size_t length = 0;
    for (;;) {
        long long left = deadline - now_ms();
        if (left <= 0) return false;
        struct pollfd ready = {.fd = input, .events = POLLIN};
        if (poll(&ready, 1, (int)left) <= 0) continue; /* interrupted, or the time is over */
        if (length == sizeof answers->text - 1) return true;
        ssize_t got = read(input, answers->text + length, sizeof answers->text - 1 - length);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return true;
        length += (size_t)got;
        answers->text[length] = '\0';
        if (strstr(answers->text, "trtxpy:end=1\n")) return true;
    }
}

/* How it ended; -1 if somebody else took that (a handler of SIGCHLD, or SIGCHLD is ignored). */
static int reap(pid_t child, long long deadline, bool *killed) {
    int status = -1;
    for (;;) {
        pid_t got = waitpid(child, &status, *killed ? 0 : WNOHANG);
        if (got == child) return status;
        if (got < 0 && errno != EINTR) return -1;
        if (!*killed && now_ms() >= deadline) {
            kill(-child, SIGKILL);
            *killed = true;
        } else if (got == 0) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        }
    }
}

/* The last line that says something: of a traceback, what went wrong. */
static const char *last_line(char *text) {
    size_t length = strlen(text);
    while (length && (text[length - 1] == '\n' || text[length - 1] == ' ')) text[--length] = '\0';
    char *line = strrchr(text, '\n');
    return line ? line + 1 : text;
}

trtxpy_status trtxpy_ask_interpreter(const char *path, trtxpy_answers *answers) {
    int ends[2];
    pid_t child;
    answers->text[0] = '\0';
    if (!make_pipe(ends)) return trtxpy_fail(TRTXPY_PYTHON, "cannot run %s: no pipe: %s", path, strerror(errno));
    int error = spawn(path, ends[1], &child);
    close(ends[1]);
    if (error) {
        close(ends[0]);
        return trtxpy_fail(TRTXPY_PYTHON, "cannot run %s: %s", path, strerror(error));
    }
    long long deadline = now_ms() + TRTXPY_ASK_TIMEOUT_S * 1000;
    bool killed = false, complete = read_answers(ends[0], deadline, answers);
    close(ends[0]);
    int status = reap(child, deadline, &killed);
    if (strstr(answers->text, "trtxpy:end=1\n")) return TRTXPY_OK;
    if (killed || !complete)
        return trtxpy_fail(TRTXPY_PYTHON, "%s did not say within %d s what Python it is", path, TRTXPY_ASK_TIMEOUT_S);
    char how[64] = "ended";
    if (status != -1 && WIFEXITED(status)) snprintf(how, sizeof how, "exited with %d", WEXITSTATUS(status));
    if (status != -1 && WIFSIGNALED(status)) snprintf(how, sizeof how, "was ended by signal %d", WTERMSIG(status));
    const char *said = last_line(answers->text);
    return trtxpy_fail(TRTXPY_PYTHON, "%s is no Python that can be asked about itself: it %s%s%s", path, how,
                       *said ? ": " : "", said);
}
