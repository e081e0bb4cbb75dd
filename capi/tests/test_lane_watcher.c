/* The watcher: asleep when nobody waits, its three modes, its thread; and that requests allocate nothing. */
#define _GNU_SOURCE
#include "lane_internal.h"
#include "lane_test.h"

#include <dirent.h>
#include <signal.h>

/* ---- counting allocations: of this process where no sanitizer owns malloc ---- */

static _Atomic uint64_t allocations;

#if !SANITIZED && defined(__GLIBC__)
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
void *malloc(size_t bytes) {
    atomic_fetch_add_explicit(&allocations, 1, memory_order_relaxed);
    return __libc_malloc(bytes);
}
void *calloc(size_t count, size_t bytes) {
    atomic_fetch_add_explicit(&allocations, 1, memory_order_relaxed);
    return __libc_calloc(count, bytes);
}
void *realloc(void *pointer, size_t bytes) {
    atomic_fetch_add_explicit(&allocations, 1, memory_order_relaxed);
    return __libc_realloc(pointer, bytes);
}
#define COUNTS_ALLOCATIONS 1
#else
#define COUNTS_ALLOCATIONS 0
#endif

/* A driver that allocates nothing itself, so that what is counted is ours: an event is done at the third query. */
static _Atomic int stub_queries, stub_pushes;
static CUresult stub_launch(CUgraphExec exec, CUstream stream) { return exec && stream ? 0 : 1; }
static CUresult stub_record(CUevent event, CUstream stream) { return event && stream ? 0 : 1; }
static CUresult stub_query(CUevent event) {
    return event && atomic_fetch_add(&stub_queries, 1) % 3 == 2 ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
static CUresult stub_create(CUevent *event, unsigned flags) {
    CHECK_EQ(flags, CU_EVENT_DISABLE_TIMING);
    *event = (CUevent)(uintptr_t)64;
    return 0;
}
static CUresult stub_destroy(CUevent event) { return event ? 0 : 1; }
static CUresult stub_push(CUcontext context) {
    atomic_fetch_add(&stub_pushes, context ? 1 : 0);
    return 0;
}
static CUresult stub_pop(CUcontext *context) {
    *context = NULL;
    atomic_fetch_sub(&stub_pushes, 1);
    return 0;
}
static CUresult stub_current(CUcontext *context) {
    *context = NULL;
    return 0;
}
static CUresult stub_exchange(int *mode) {
    *mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    return 0;
}

static void requests_allocate_nothing(void) {
    trtx_cuda_api api = {0};
    api.cuGraphLaunch = stub_launch;
    api.cuEventRecord = stub_record;
    api.cuEventQuery = stub_query;
    api.cuEventCreate = stub_create;
    api.cuEventDestroy = stub_destroy;
    api.cuCtxPushCurrent = stub_push;
    api.cuCtxPopCurrent = stub_pop;
    api.cuCtxGetCurrent = stub_current;
    api.cuThreadExchangeStreamCaptureMode = stub_exchange;
    trtx_watcher *watcher;
    trtx_lane *lane;
    trtx_hub *hub;
    int fd;
    OK(trtx_watcher_create(&watcher));
    OK(trtx_hub_create(&hub, &fd));
    OK(trtx_lane_create(&lane, &api, (CUcontext)(uintptr_t)8, (CUstream)(uintptr_t)16, 8, watcher, TRTX_WAKE_LATENCY));
    uint64_t before = 0;
    for (uint64_t i = 0; i < 20000; i++) {
        if (i == 100) before = atomic_load(&allocations); /* by then the watcher's thread runs */
        size_t a, b, c;
        trtx_completion taken[4];
        OK(trtx_lane_acquire(lane, &a));
        OK(trtx_lane_acquire(lane, &b));
        OK(trtx_lane_acquire(lane, &c));
        OK(trtx_lane_submit(lane, a, (CUgraphExec)(uintptr_t)(i * 64 + 64), i, hub));
        OK(trtx_lane_submit(lane, b, (CUgraphExec)(uintptr_t)32, i, hub));
        OK(trtx_lane_mark(lane, c, i, NULL));
        if (i % 2) OK(trtx_lane_arm(lane, b));
        if (i % 5 == 0) OK(trtx_lane_release(lane, a));
        CHECK_EQ(trtx_lane_wait(lane, c, i % 3 ? 0 : 1000 * MS, PATIENCE, NULL), TRTX_SLOT_DONE);
        size_t expected = i % 5 ? 2 : 1;
        CHECK_EQ(trtx_hub_take(hub, taken, 4), expected);
        if (i % 5) OK(trtx_lane_release(lane, a));
        OK(trtx_lane_release(lane, b));
        OK(trtx_lane_release(lane, c));
    }
    if (COUNTS_ALLOCATIONS) CHECK(before > 0);
    CHECK_EQ(atomic_load(&allocations), before);
    OK(trtx_lane_destroy(lane));
    trtx_watcher_destroy(watcher);
    trtx_hub_release(hub);
    CHECK_EQ(atomic_load(&stub_pushes), 0); /* every context that was pushed was popped */
}

/* ---- the thread ---- */

/* The thread named so: its id, 0 if there is none. */
static long thread_named(const char *name) {
    DIR *directory = opendir("/proc/self/task");
    long found = 0;
    for (struct dirent *entry; directory && !found && (entry = readdir(directory));) {
        char path[300], text[64] = "";
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "r");
        if (!file) continue;
        if (fgets(text, sizeof text, file) && strncmp(text, name, strlen(name)) == 0) found = atol(entry->d_name);
        fclose(file);
    }
    if (directory) closedir(directory);
    return found;
}

/* A thread that was joined is listed for a moment longer: close a rig, and wait until its watcher is not. */
static void close_and_forget(rig *r) {
    rig_close(r);
    while (thread_named("trtx-watcher")) nap_us(100);
}

static uint64_t thread_cpu_ns(long id) {
    return cpu_ns((clockid_t)(((unsigned)~id << 3) | 6u)); /* CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED */
}

static unsigned long long blocked_signals(long id) {
    char path[64], line[256];
    unsigned long long mask = 0;
    snprintf(path, sizeof path, "/proc/self/task/%ld/status", id);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) sscanf(line, "SigBlk: %llx", &mask);
    if (file) fclose(file);
    return mask;
}

static void one_request(rig *r, CUgraphExec exec, size_t slot) {
    trtx_completion completion;
    OK(trtx_lane_submit(r->lanes[0], slot, exec, 1, r->hub));
    OK(trtx_lane_arm(r->lanes[0], slot));
    CHECK(readable(r->fd, 20000));
    CHECK_EQ(trtx_hub_take(r->hub, &completion, 1), 1);
}

static void the_thread_starts_late_takes_no_signals_and_sleeps(void) {
    for (int mode = 0; mode < 3; mode++) {
        rig r;
        rig_open(&r, 1, 4, (trtx_wake_mode)mode);
        size_t slot;
        OK(trtx_lane_acquire(r.lanes[0], &slot));
        OK(trtx_lane_submit(r.lanes[0], slot, r.instant, 1, NULL));
        CHECK_EQ(trtx_lane_spin(r.lanes[0], slot, PATIENCE, NULL), TRTX_SLOT_DONE);
        CHECK_EQ(thread_named("trtx-watcher"), 0); /* who spins needs no watcher */
        one_request(&r, r.instant, slot);
        long id = thread_named("trtx-watcher");
        CHECK(id != 0);
        unsigned long long blocked = blocked_signals(id);
        CHECK(blocked & 1ull << (SIGINT - 1) && blocked & 1ull << (SIGTERM - 1) && blocked & 1ull << (SIGUSR1 - 1));
        nap_us(20000);
        uint64_t before = thread_cpu_ns(id);
        nap_us(500000);
        uint64_t used = thread_cpu_ns(id) - before;
        CHECK(used < 1 * MS);
        /* in flight, but nobody asked: it sleeps on */
        OK(trtx_lane_submit(r.lanes[0], slot, r.gated, 1, r.hub));
        before = thread_cpu_ns(id);
        nap_us(200000);
        CHECK(thread_cpu_ns(id) - before < 1 * MS);
        close_and_forget(&r);
    }
}

/* Wakes and what they cost: 200 requests of `duration`, armed and slept for. Prints; asserts only what cannot be noise. */
static void modes_trade_cpu_for_latency(void) {
    static const char *const names[] = {"latency", "balanced", "efficient"};
    static const uint64_t durations[] = {100 * US, 1000 * US};
    uint64_t used[3][2];
    for (int mode = 0; mode < 3; mode++) {
        for (int which = 0; which < 2; which++) {
            rig r;
            rig_open(&r, 1, 4, (trtx_wake_mode)mode);
            CUgraphExec exec = make_graph(&r, durations[which], NULL, NULL);
            size_t slot;
            OK(trtx_lane_acquire(r.lanes[0], &slot));
            one_request(&r, exec, slot);
            long id = thread_named("trtx-watcher");
            uint64_t cpu = thread_cpu_ns(id), begin = now_ns(), quickest = UINT64_MAX;
            for (int i = 0; i < 200; i++) {
                uint64_t before = now_ns();
                one_request(&r, exec, slot);
                uint64_t taken = now_ns() - before;
                if (taken < quickest) quickest = taken;
            }
            used[mode][which] = thread_cpu_ns(id) - cpu;
            uint64_t each = (now_ns() - begin) / 200;
            trtx_lane_statistics statistics;
            trtx_lane_get_statistics(r.lanes[0], &statistics);
            printf("# %-9s %5llu us of work: %5llu us a request, watcher busy %3llu%%, expected %llu us\n", names[mode],
                   (unsigned long long)(durations[which] / US), (unsigned long long)(each / US),
                   (unsigned long long)(used[mode][which] * 100 / (each * 200)),
                   (unsigned long long)(statistics.expected_ns / US));
            CHECK(statistics.expected_ns >= durations[which] / 2);
            CHECK(each >= durations[which]);
            /* Of 200: others may have had to wait for a core. */
            if (!SANITIZED) CHECK(quickest < durations[which] + 5 * MS);
            free_graph(&r, exec);
            close_and_forget(&r);
        }
    }
    CHECK(used[TRTX_WAKE_EFFICIENT][1] < used[TRTX_WAKE_LATENCY][1]);
    CHECK(used[TRTX_WAKE_BALANCED][1] < used[TRTX_WAKE_LATENCY][1]);
}

/* What the lane would have learned had the graph, which it knows, taken so long. */
static void teach(trtx_lane *lane, CUgraphExec exec, uint64_t expected_ns) {
    int taught = 0;
    pthread_mutex_lock(&lane->state);
    for (size_t i = 0; i < TRTX_PACES; i++) {
        if (lane->paces[i].exec != exec) continue;
        lane->paces[i].expected_ns = expected_ns;
        taught++;
    }
    atomic_store(&lane->expected_ns, expected_ns);
    pthread_mutex_unlock(&lane->state);
    CHECK_EQ(taught, 1);
}

/* A short graph must not be overslept because a long one ran before it on the same lane. */
static void each_graph_has_its_own_pace(void) {
    rig r;
    rig_open(&r, 1, 4, TRTX_WAKE_BALANCED);
    CUgraphExec slow = make_graph(&r, 2 * MS, NULL, NULL), quick = make_graph(&r, 2 * MS, NULL, NULL);
    size_t slot;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    one_request(&r, slow, slot);
    teach(r.lanes[0], slow, 4 * PATIENCE);
    uint64_t before = now_ns();
    one_request(&r, quick, slot);
    CHECK(now_ns() - before < PATIENCE);
    free_graph(&r, slow);
    free_graph(&r, quick);
    rig_close(&r);
}

/* The watcher sleeps towards a result that is due much later; it ends early and somebody spins for it; what is armed next
 * must wake the watcher. */
static void a_sleeping_watcher_is_woken_for_what_is_due_sooner(void) {
    rig r;
    rig_open(&r, 1, 4, TRTX_WAKE_BALANCED);
    CUgraphExec quick = make_graph(&r, 2 * MS, NULL, NULL);
    size_t slot;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    atomic_store(&r.open, true);
    OK(trtx_lane_submit(r.lanes[0], slot, r.gated, 1, NULL));
    CHECK_EQ(trtx_lane_spin(r.lanes[0], slot, PATIENCE, NULL), TRTX_SLOT_DONE);
    atomic_store(&r.open, false);
    teach(r.lanes[0], r.gated, 4 * PATIENCE);
    OK(trtx_lane_submit(r.lanes[0], slot, r.gated, 2, r.hub));
    OK(trtx_lane_arm(r.lanes[0], slot));
    nap_us(20000);
    atomic_store(&r.open, true);
    CHECK_EQ(trtx_lane_spin(r.lanes[0], slot, PATIENCE, NULL), TRTX_SLOT_DONE);
    uint64_t before = now_ns();
    one_request(&r, quick, slot);
    CHECK(now_ns() - before < PATIENCE);
    free_graph(&r, quick);
    rig_close(&r);
}

int main(void) {
    TEST(requests_allocate_nothing);
    TEST(the_thread_starts_late_takes_no_signals_and_sleeps);
    TEST(modes_trade_cpu_for_latency);
    TEST(each_graph_has_its_own_pace);
    TEST(a_sleeping_watcher_is_woken_for_what_is_due_sooner);
    return report();
}
