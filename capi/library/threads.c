/* The library's own threads: one that completes requests, and up to four that do what takes Python's lock for those that were
 * submitted. They start with the library, or when they are needed, and block all signals. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core.h"

enum { WORKERS = 4, LOOK_MS = 2, BATCH = 32 };
#define END_PATIENCE_NS UINT64_C(10000000000) /* a GPU that hangs must not keep a process from its end */

static struct {
    pthread_mutex_t mutex;
    pthread_t thread;
    bool running;
    int hub_fd, wake_fd;
    trtx_hub *hub;
    trtxpy_job *first, *last; /* posted */
    atomic_bool look;      /* now and then, by itself */
    atomic_bool unwatched; /* of lanes as well: their watcher could not be started */
} completer = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake_fd = -1};

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t posted;
    pthread_t threads[WORKERS];
    size_t count, idle, waiting;
    bool stopping;
    trtxpy_job *first, *last;
} workers = {.mutex = PTHREAD_MUTEX_INITIALIZER, .posted = PTHREAD_COND_INITIALIZER};

static struct {
    pthread_mutex_t mutex;
    trtxpy_graph_object *first;
} graphs = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static atomic_bool ending;
static atomic_size_t requests; /* submitted, their completions not delivered; and calls that run one themselves */

/* ---- the end ---- */

trtxpy_status trtxpy_requests_enter(void) {
    atomic_fetch_add(&requests, 1); /* first: whoever ends the threads says so, and counts then */
    if (!atomic_load(&ending)) return TRTXPY_OK;
    trtxpy_requests_leave();
    return trtxpy_fail(TRTXPY_CLOSED, "the library ends, and takes no more requests");
}

void trtxpy_requests_leave(void) {
    atomic_fetch_sub(&requests, 1);
}

static trtxpy_status say_ended(void) {
    return trtxpy_fail(TRTXPY_CANCELLED, "the library ends, and the request had not begun");
}

/* ---- all graphs ---- */

void trtxpy_graphs_add(trtxpy_graph_object *graph) {
    pthread_mutex_lock(&graphs.mutex);
    graph->next = graphs.first;
    graph->previous = NULL;
    if (graph->next) graph->next->previous = graph;
    graphs.first = graph;
    pthread_mutex_unlock(&graphs.mutex);
}

void trtxpy_graphs_remove(trtxpy_graph_object *graph) {
    pthread_mutex_lock(&graphs.mutex);
    if (graph->previous) graph->previous->next = graph->next;
    else graphs.first = graph->next;
    if (graph->next) graph->next->previous = graph->previous;
    pthread_mutex_unlock(&graphs.mutex);
}

/* With the graph's mutex. What is done comes to the hub, armed or not. All shapes of a graph share its lanes: one that was
 * dropped meanwhile is looked at, too. */
static void poll_lanes(const trtxpy_graph_object *graph) {
    for (const trtxpy_entry *entry = graph->entries; entry; entry = entry->next)
        for (size_t i = 0; i < entry->lane_count; i++) {
            size_t none;
            trtxpy_lanes()->acquire_among(entry->lanes[i].lane, NULL, 0, true, &none); /* of no slots: it only looks */
        }
}

/* Slots that came free without a word, because Python had them; and results that nobody else waits for. */
static void look_at_graphs(void) {
    bool waiting = false, unwatched = false;
    atomic_store(&completer.look, false);
    bool poll_them = atomic_exchange(&completer.unwatched, false);
    pthread_mutex_lock(&graphs.mutex);
    for (trtxpy_graph_object *graph = graphs.first; graph; graph = graph->next) {
        trtxpy_graph_pump(graph);
        pthread_mutex_lock(&graph->mutex);
        if (graph->first) waiting = true;
        if (poll_them && atomic_load(&graph->counts.in_flight)) {
            poll_lanes(graph);
            unwatched = true;
        }
        pthread_mutex_unlock(&graph->mutex);
    }
    pthread_mutex_unlock(&graphs.mutex);
    if (unwatched) atomic_store(&completer.unwatched, true);
    if (waiting || unwatched) atomic_store(&completer.look, true);
}

/* The end: what waits for a slot does not get one. A thread that waits itself does. */
static void cancel_rows(void) {
    pthread_mutex_lock(&graphs.mutex);
    for (trtxpy_graph_object *graph = graphs.first; graph; graph = graph->next) {
        pthread_mutex_lock(&graph->mutex);
        for (trtxpy_job *job = graph->first, *next; job; job = next) {
            next = job->next;
            if (job->here) continue;
            trtxpy_graph_dequeue(graph, job);
            job->phase = TRTXPY_LAUNCHED;
            trtxpy_job_end(job, say_ended());
        }
        pthread_mutex_unlock(&graph->mutex);
    }
    pthread_mutex_unlock(&graphs.mutex);
}

/* ---- the completer ---- */

trtx_hub *trtxpy_completer_hub(void) {
    return completer.hub;
}

static void wake(void) {
    uint64_t one = 1;
    ssize_t written;
    do written = write(completer.wake_fd, &one, sizeof one); /* full: it is readable anyway */
    while (written < 0 && errno == EINTR);
}

void trtxpy_completer_look(void) {
    if (!atomic_exchange(&completer.look, true)) wake();
}

void trtxpy_completer_watch(void) {
    atomic_store(&completer.unwatched, true);
    trtxpy_completer_look();
}

void trtxpy_completer_post(trtxpy_job *job) {
    pthread_mutex_lock(&completer.mutex);
    job->next = NULL;
    if (completer.last) completer.last->next = job;
    else completer.first = job;
    completer.last = job;
    pthread_mutex_unlock(&completer.mutex);
    wake();
}

/* The request is over: everything of it is given back before anybody hears of it. */
static void finish(trtxpy_job *job, trtxpy_status status) {
    trtxpy_graph_object *graph = job->graph;
    pthread_mutex_lock(&job->mutex);
    job->settled = true;
    pthread_mutex_unlock(&job->mutex);
    if (atomic_load(&job->cancelled)) {
        status = TRTXPY_CANCELLED;
        free(job->message);
        job->message = strdup("the request was cancelled");
    }
    job->status = status;
    job->result.completed_ns = trtxpy_now_ns();
    trtxpy_job_give_back(job);
    trtxpy_graph_pump(graph);
    trtxpy_job_unbind(job);
    trtxpy_graph_count_end(graph, status);
    atomic_fetch_sub_explicit(&graph->context->requests, 1, memory_order_relaxed);
    pthread_mutex_lock(&job->mutex);
    trtxpy_handle_release(&graph->head); /* from here on the graph may be gone */
    job->done = true;
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&job->mutex);
    if (job->queue) {
        trtxpy_queue_push(job->queue, job);
    } else if (job->callback) {
        trtxpy_in_callback = true;
        job->callback(status, status == TRTXPY_OK ? NULL : job->message ? job->message : trtxpy_status_name(status), &job->result,
                      job->userdata);
        trtxpy_in_callback = false;
    }
    trtxpy_job_unreference(job);
    trtxpy_requests_leave();
}

static void finish_launched(trtxpy_job *job, CUresult cuda) {
    trtxpy_begin();
    trtxpy_status status = TRTXPY_OK;
    if (!atomic_load(&job->cancelled) && (status = trtxpy_job_collect(job, cuda)) != TRTXPY_OK)
        job->message = strdup(trtxpy_last_error());
    finish(job, status);
}

static void finish_posted(void) {
    pthread_mutex_lock(&completer.mutex);
    trtxpy_job *job = completer.first;
    completer.first = completer.last = NULL;
    pthread_mutex_unlock(&completer.mutex);
    while (job) {
        trtxpy_job *next = job->next;
        job->next = NULL;
        finish(job, job->status);
        job = next;
    }
}

static void *complete(void *unused) {
    (void)unused;
    trtxpy_host_mark_thread();
    uint64_t give_up_ns = 0;
    while (!atomic_load(&ending) || atomic_load(&requests)) {
        if (atomic_load(&ending)) {
            if (!give_up_ns) give_up_ns = trtxpy_now_ns() + END_PATIENCE_NS;
            if (trtxpy_now_ns() >= give_up_ns) break;
            cancel_rows();
        }
        struct pollfd fds[] = {{.fd = completer.hub_fd, .events = POLLIN}, {.fd = completer.wake_fd, .events = POLLIN}};
        poll(fds, 2, atomic_load(&completer.look) || atomic_load(&ending) ? LOOK_MS : -1);
        uint64_t count;
        ssize_t got = read(completer.wake_fd, &count, sizeof count); /* not blocking; nothing to read is fine */
        (void)got;
        trtx_completion completions[BATCH];
        size_t taken;
        while ((taken = trtxpy_lanes()->hub_take(completer.hub, completions, BATCH)))
            for (size_t i = 0; i < taken; i++)
                finish_launched((trtxpy_job *)(uintptr_t)completions[i].token, completions[i].status);
        finish_posted();
        if (atomic_load(&completer.look)) look_at_graphs();
    }
    return NULL;
}

static int start_thread(pthread_t *thread, void *(*body)(void *)) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int error = pthread_create(thread, NULL, body, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

trtxpy_status trtxpy_threads_start(void) {
    if (completer.running) return TRTXPY_OK;
    completer.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (completer.wake_fd < 0) return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no eventfd: %s", strerror(errno));
    completer.hub = NULL;
    int error = trtxpy_lanes()->hub_create(&completer.hub, &completer.hub_fd) == CUDA_SUCCESS ? 0 : ENOMEM;
    workers.stopping = false;
    atomic_store(&ending, false);
    if (!error) error = start_thread(&completer.thread, complete);
    if (error) {
        if (completer.hub) trtxpy_lanes()->hub_release(completer.hub);
        close(completer.wake_fd);
        return trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "the library's thread cannot be started: %s", strerror(error));
    }
    completer.running = true;
    return TRTXPY_OK;
}

/* ---- workers ---- */

static void *work(void *unused) {
    (void)unused;
    trtxpy_host_mark_thread();
    pthread_mutex_lock(&workers.mutex);
    for (;;) {
        while (!workers.first && !workers.stopping) {
            workers.idle++;
            pthread_cond_wait(&workers.posted, &workers.mutex);
            workers.idle--;
        }
        trtxpy_job *job = workers.first;
        if (!job) break;
        workers.first = job->next;
        if (!workers.first) workers.last = NULL;
        job->next = NULL;
        workers.waiting--;
        pthread_mutex_unlock(&workers.mutex);
        trtxpy_begin();
        trtxpy_job_end(job, atomic_load(&job->cancelled) ? TRTXPY_CANCELLED : trtxpy_job_run(job));
        pthread_mutex_lock(&workers.mutex);
    }
    pthread_mutex_unlock(&workers.mutex);
    return NULL;
}

trtxpy_status trtxpy_worker_post(trtxpy_job *job) {
    trtxpy_status status = TRTXPY_OK;
    pthread_mutex_lock(&workers.mutex);
    if (workers.stopping) {
        status = say_ended();
    } else if (workers.idle <= workers.waiting && workers.count < WORKERS) {
        int error = start_thread(&workers.threads[workers.count], work);
        if (!error) workers.count++;
        else if (workers.count == 0) status = trtxpy_fail(TRTXPY_OUT_OF_MEMORY, "no thread for the request: %s", strerror(error));
    }
    if (status == TRTXPY_OK) {
        if (workers.last) workers.last->next = job;
        else workers.first = job;
        workers.last = job;
        workers.waiting++;
        pthread_cond_signal(&workers.posted);
    }
    pthread_mutex_unlock(&workers.mutex);
    return status;
}

void trtxpy_threads_stop(void) {
    if (!completer.running) return;
    atomic_store(&ending, true);
    pthread_mutex_lock(&workers.mutex);
    workers.stopping = true;
    trtxpy_job *job = workers.first; /* not begun: a process that ends does not wait for them */
    workers.first = workers.last = NULL;
    workers.waiting = 0;
    pthread_cond_broadcast(&workers.posted);
    size_t count = workers.count;
    workers.count = 0;
    pthread_mutex_unlock(&workers.mutex);
    while (job) {
        trtxpy_job *next = job->next;
        job->next = NULL;
        trtxpy_job_end(job, say_ended());
        job = next;
    }
    wake();
    for (size_t i = 0; i < count; i++) pthread_join(workers.threads[i], NULL);
    pthread_join(completer.thread, NULL);
    completer.running = false;
    trtxpy_lanes()->hub_release(completer.hub);
    close(completer.wake_fd);
    completer.wake_fd = -1;
}
