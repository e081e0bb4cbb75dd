/* Lanes under many threads: no completion is ever lost, whoever looks and whenever somebody arms. */
#define _GNU_SOURCE
#include "lane_test.h"

enum { HAMMER = SANITIZED ? 20000 : 50000 }; /* for each of the two tests */

/* One event loop: submits, looks a varying number of times, arms, sleeps on the fd. Arming meets completion at every stage;
 * one lost completion and the loop hangs. A second thread polls the same lane at its own pace. */
typedef struct hammer {
    rig *r;
    trtx_lane *lane;
    _Atomic bool stop;
} hammer;

static void *poll_in_thread(void *argument) {
    hammer *h = argument;
    for (unsigned i = 0; !atomic_load(&h->stop); i++) {
        trtx_lane_poll(h->lane);
        if (i % 64 == 0) nap_us(20);
    }
    return NULL;
}

static void arming_races(trtx_wake_mode mode, bool with_poller) {
    rig r;
    rig_open(&r, 1, 4, mode);
    hammer h = {.r = &r, .lane = r.lanes[0]};
    pthread_t poller;
    if (with_poller) CHECK_EQ(pthread_create(&poller, NULL, poll_in_thread, &h), 0);
    size_t slot;
    uint64_t spun = 0, slept = 0, lost = 0, wrong = 0;
    OK(trtx_lane_acquire(h.lane, &slot));
    for (uint64_t i = 0; i < HAMMER && !lost; i++) {
        if (trtx_lane_submit(h.lane, slot, r.instant, i, r.hub) != CUDA_SUCCESS) wrong++;
        for (uint64_t look = 0; look < i % 7; look++) trtx_lane_poll(h.lane);
        for (volatile uint64_t pause = 0; pause < (i * 37) % 500;) pause = pause + 1;
        trtx_completion completion = {.token = UINT64_MAX};
        if (i % 3 == 0 && trtx_hub_take(r.hub, &completion, 1) == 1) {
            spun++;
        } else {
            if (trtx_lane_arm(h.lane, slot) != CUDA_SUCCESS) wrong++;
            if (!readable(r.fd, 30000)) lost++;
            if (trtx_hub_take(r.hub, &completion, 1) != 1) wrong++;
            slept++;
        }
        if (completion.token != i || completion.status != 0) wrong++;
        if (readable(r.fd, 0)) wrong++;
    }
    CHECK_EQ(lost, 0);
    CHECK_EQ(wrong, 0);
    CHECK(slept > 0);
    atomic_store(&h.stop, true);
    if (with_poller) CHECK_EQ(pthread_join(poller, NULL), 0);
    trtx_lane_statistics statistics;
    trtx_lane_get_statistics(h.lane, &statistics);
    CHECK_EQ(statistics.completed, HAMMER);
    rig_close(&r);
}

static void arming_never_loses_a_completion_latency(void) { arming_races(TRTX_WAKE_LATENCY, false); }
static void arming_never_loses_a_completion_balanced(void) { arming_races(TRTX_WAKE_BALANCED, true); }

/* 8 threads on 4 lanes: each acquires, submits, waits in one of several ways, gives back; some give back in flight. */
typedef struct worker {
    rig *r;
    unsigned seed;
    uint64_t done, dropped, wrong;
} worker;

enum { ROUNDS = SANITIZED ? 1500 : 5000 };

static void *work(void *argument) {
    worker *w = argument;
    trtx_hub *hub;
    int fd;
    if (trtx_hub_create(&hub, &fd) != CUDA_SUCCESS) return NULL;
    for (uint64_t i = 0; i < ROUNDS; i++) {
        unsigned random = (unsigned)rand_r(&w->seed);
        trtx_lane *lane = w->r->lanes[random % 4];
        size_t slot;
        while (trtx_lane_acquire(lane, &slot) == CUDA_ERROR_NOT_READY) nap_us(10);
        if (trtx_lane_submit(lane, slot, w->r->instant, i, hub) != CUDA_SUCCESS) w->wrong++;
        trtx_completion completion = {0}, taken = {0};
        switch (random / 4 % 4) {
        case 0:
            if (trtx_lane_spin(lane, slot, PATIENCE, &completion) != TRTX_SLOT_DONE) w->wrong++;
            break;
        case 1:
            if (trtx_lane_wait(lane, slot, 5 * US, PATIENCE, &completion) != TRTX_SLOT_DONE) w->wrong++;
            break;
        case 2:
            if (trtx_lane_arm(lane, slot) != CUDA_SUCCESS || !readable(fd, 30000)) w->wrong++;
            if (trtx_hub_take(hub, &taken, 1) != 1 || taken.token != i) w->wrong++;
            if (trtx_lane_slot(lane, slot, &completion) != TRTX_SLOT_DONE) w->wrong++;
            break;
        default:
            if (random & 64 && trtx_lane_arm(lane, slot) != CUDA_SUCCESS) w->wrong++;
            if (trtx_lane_release(lane, slot) != CUDA_SUCCESS) w->wrong++;
            w->dropped++;
            continue;
        }
        if (completion.token != i || completion.status != 0) w->wrong++;
        if (trtx_lane_release(lane, slot) != CUDA_SUCCESS) w->wrong++;
        if (trtx_hub_take(hub, &taken, 1) != 0 || readable(fd, 0)) w->wrong++;
        w->done++;
    }
    trtx_hub_release(hub);
    return NULL;
}

static void eight_threads_on_four_lanes(void) {
    rig r;
    rig_open(&r, 4, 3, TRTX_WAKE_BALANCED);
    pthread_t threads[8];
    worker workers[8];
    for (unsigned i = 0; i < 8; i++) {
        workers[i] = (worker){.r = &r, .seed = i + 1};
        CHECK_EQ(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    uint64_t finished = 0;
    for (unsigned i = 0; i < 8; i++) {
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
        CHECK_EQ(workers[i].wrong, 0);
        finished += workers[i].done + workers[i].dropped;
    }
    CHECK_EQ(finished, 8 * ROUNDS);
    uint64_t completed = 0;
    for (size_t i = 0; i < 4; i++) {
        uint64_t until = now_ns() + PATIENCE;
        while (trtx_lane_poll(r.lanes[i]) && now_ns() < until) nap_us(100);
        trtx_lane_statistics statistics;
        trtx_lane_get_statistics(r.lanes[i], &statistics);
        completed += statistics.completed;
        CHECK_EQ(statistics.held + statistics.in_flight, 0);
    }
    CHECK_EQ(completed, 8 * ROUNDS);
    rig_close(&r);
}

/* Lanes come and go while the watcher is busy with another. */
static void *keep_busy(void *argument) {
    hammer *h = argument;
    size_t slot;
    OK(trtx_lane_acquire(h->lane, &slot));
    while (!atomic_load(&h->stop)) {
        OK(trtx_lane_submit(h->lane, slot, h->r->instant, 1, NULL));
        CHECK_EQ(trtx_lane_wait(h->lane, slot, 0, PATIENCE, NULL), TRTX_SLOT_DONE);
    }
    return NULL;
}

static void lanes_come_and_go_under_a_busy_watcher(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_LATENCY);
    hammer h = {.r = &r, .lane = r.lanes[0]};
    pthread_t busy;
    CHECK_EQ(pthread_create(&busy, NULL, keep_busy, &h), 0);
    OK(r.api->cuCtxSetCurrent(r.context));
    CUstream stream;
    OK(r.api->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    for (int i = 0; i < 500; i++) {
        trtx_lane *lane;
        size_t slot;
        trtx_completion completion;
        OK(trtx_lane_create(&lane, r.api, r.context, stream, 1, r.watcher, (trtx_wake_mode)(i % 3)));
        OK(trtx_lane_acquire(lane, &slot));
        OK(trtx_lane_submit(lane, slot, r.instant, 5, r.hub));
        OK(trtx_lane_arm(lane, slot));
        if (i % 2) {
            CHECK(readable(r.fd, 30000));
            CHECK_EQ(trtx_hub_take(r.hub, &completion, 1), 1);
        } else {
            CHECK_EQ(trtx_lane_spin(lane, slot, PATIENCE, NULL), TRTX_SLOT_DONE);
        }
        OK(trtx_lane_destroy(lane));
        CHECK(!readable(r.fd, 0));
    }
    atomic_store(&h.stop, true);
    CHECK_EQ(pthread_join(busy, NULL), 0);
    OK(r.api->cuStreamDestroy(stream));
    OK(r.api->cuCtxSetCurrent(NULL));
    rig_close(&r);
}

int main(void) {
    TEST(arming_never_loses_a_completion_latency);
    TEST(arming_never_loses_a_completion_balanced);
    TEST(eight_threads_on_four_lanes);
    TEST(lanes_come_and_go_under_a_busy_watcher);
    return report();
}
