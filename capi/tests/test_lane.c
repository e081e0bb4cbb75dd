/* Lanes on the mock driver: slots, order, contexts, giving back in flight, forks. */
#define _GNU_SOURCE
#include "lane_test.h"

#include <sys/wait.h>

static void slots_are_taken_lowest_first_and_come_back(void) {
    rig r;
    rig_open(&r, 1, 70, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t slot;
    for (size_t i = 0; i < 70; i++) {
        OK(trtx_lane_acquire(lane, &slot));
        CHECK_EQ(slot, i);
        CHECK_EQ(trtx_lane_slot(lane, slot, NULL), TRTX_SLOT_HELD);
    }
    CHECK_EQ(trtx_lane_acquire(lane, &slot), CUDA_ERROR_NOT_READY);
    OK(trtx_lane_release(lane, 65));
    OK(trtx_lane_release(lane, 3));
    CHECK_EQ(trtx_lane_release(lane, 3), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_release(lane, 70), CUDA_ERROR_INVALID_VALUE);
    OK(trtx_lane_acquire(lane, &slot));
    CHECK_EQ(slot, 3);
    OK(trtx_lane_acquire(lane, &slot));
    CHECK_EQ(slot, 65);
    trtx_lane_statistics statistics;
    trtx_lane_get_statistics(lane, &statistics);
    CHECK_EQ(statistics.held, 70);
    CHECK_EQ(trtx_lane_spin(lane, 0, 0, NULL), TRTX_SLOT_HELD);
    CHECK_EQ(trtx_lane_wait(lane, 0, 0, 0, NULL), TRTX_SLOT_HELD);
    CHECK_EQ(trtx_lane_arm(lane, 0), CUDA_ERROR_INVALID_VALUE);
    OK(trtx_lane_release(lane, 0));
    CHECK_EQ(trtx_lane_submit(lane, 0, r.instant, 1, NULL), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_submit(lane, 1, NULL, 1, NULL), CUDA_ERROR_INVALID_VALUE);
    rig_close(&r);
}

static void arguments_are_checked(void) {
    rig r;
    rig_open(&r, 1, 1, TRTX_WAKE_BALANCED);
    trtx_lane *lane = NULL;
    CUstream stream = r.streams[0];
    CHECK_EQ(trtx_lane_create(&lane, r.api, r.context, stream, 0, r.watcher, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_create(&lane, r.api, r.context, stream, 1025, r.watcher, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_create(&lane, r.api, r.context, stream, 1, NULL, 0), CUDA_ERROR_INVALID_VALUE);
    OK(trtx_lane_create(&lane, r.api, r.context, stream, 1024, r.watcher, TRTX_WAKE_LATENCY));
    OK(trtx_lane_destroy(lane));
    OK(trtx_lane_destroy(NULL));
    trtx_watcher_destroy(NULL);
    trtx_mock_inject(r.mock, "cuEventCreate", 3, 1, CUDA_ERROR_OUT_OF_MEMORY, 0, 0);
    CHECK_EQ(trtx_lane_create(&lane, r.api, r.context, stream, 8, r.watcher, 0), CUDA_ERROR_OUT_OF_MEMORY);
    rig_close(&r);
}

static void work_completes_in_order(void) {
    rig r;
    rig_open(&r, 1, 16, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t slots[16];
    for (int round = 0; round < 20; round++) {
        uint64_t before = now_ns();
        for (uint64_t i = 0; i < 16; i++) {
            OK(trtx_lane_acquire(lane, &slots[i]));
            OK(trtx_lane_submit(lane, slots[i], i == 0 ? r.gated : r.instant, 100 + i, r.hub));
        }
        CHECK_EQ(trtx_lane_poll(lane), 16);
        CHECK_EQ(trtx_lane_slot(lane, slots[15], NULL), TRTX_SLOT_IN_FLIGHT);
        CHECK_EQ(trtx_lane_spin(lane, slots[0], 0, NULL), TRTX_SLOT_IN_FLIGHT);
        atomic_store(&r.open, true);
        trtx_completion completion;
        CHECK_EQ(trtx_lane_spin(lane, slots[15], PATIENCE, &completion), TRTX_SLOT_DONE);
        CHECK_EQ(completion.token, 115);
        CHECK_EQ(completion.status, 0);
        CHECK(completion.launched_ns >= before && completion.completed_ns > completion.launched_ns);
        CHECK_EQ(trtx_lane_poll(lane), 0);
        CHECK(!readable(r.fd, 0)); /* nobody was armed: no system call was paid for */
        trtx_completion taken[16];
        CHECK_EQ(trtx_hub_take(r.hub, taken, 10), 10);
        CHECK_EQ(trtx_hub_take(r.hub, taken + 10, 10), 6);
        CHECK_EQ(trtx_hub_take(r.hub, taken, 10), 0);
        for (uint64_t i = 0; i < 16; i++) {
            CHECK_EQ(taken[i].token, 100 + i);
            OK(trtx_lane_release(lane, slots[i]));
        }
        atomic_store(&r.open, false);
    }
    trtx_lane_statistics statistics;
    trtx_lane_get_statistics(lane, &statistics);
    CHECK_EQ(statistics.submitted, 320);
    CHECK_EQ(statistics.completed, 320);
    CHECK_EQ(statistics.failed + statistics.dropped + statistics.in_flight + statistics.held, 0);
    CHECK(statistics.expected_ns > 0 && statistics.launch_ns_total > 0 && statistics.polls > 0);
    rig_close(&r);
}

typedef struct submitter {
    rig *r;
    size_t slot;
    CUresult status;
} submitter;

static void *submit_in_thread(void *argument) {
    submitter *s = argument;
    s->status = trtx_lane_submit(s->r->lanes[0], s->slot, s->r->instant, 1, NULL);
    return NULL;
}

static void *let_go_soon(void *unused) {
    nap_us(20000); /* time for another thread to fall asleep; if it is later than that, the less is tested */
    atomic_store(&launches_held, false);
    return unused;
}

/* While one thread is inside the driver with a slot, another gives the slot back, or waits for it. */
static void a_slot_being_launched_counts_as_in_flight(void) {
    for (int fails = 0; fails < 2; fails++) {
        rig r;
        rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
        OK(trtx_lane_destroy(r.lanes[0]));
        OK(trtx_lane_create(&r.lanes[0], driver_that_holds_launches(), r.context, r.streams[0], 2, r.watcher,
                            TRTX_WAKE_BALANCED));
        trtx_lane *lane = r.lanes[0];
        submitter s = {.r = &r};
        pthread_t thread, other;
        CUresult error = fails ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
        OK(trtx_lane_acquire(lane, &s.slot));
        if (fails) trtx_mock_inject(r.mock, "cuGraphLaunch", 1, 2, error, 0, 0);
        atomic_store(&launches_held, true);
        CHECK_EQ(pthread_create(&thread, NULL, submit_in_thread, &s), 0);
        while (trtx_lane_slot(lane, s.slot, NULL) != TRTX_SLOT_IN_FLIGHT) nap_us(50);
        CHECK_EQ(trtx_lane_destroy(lane), CUDA_ERROR_NOT_READY);
        CHECK_EQ(pthread_create(&other, NULL, let_go_soon, NULL), 0);
        CHECK_EQ(trtx_lane_wait(lane, s.slot, 0, PATIENCE, NULL), fails ? TRTX_SLOT_HELD : TRTX_SLOT_DONE);
        CHECK_EQ(pthread_join(thread, NULL), 0);
        CHECK_EQ(pthread_join(other, NULL), 0);
        CHECK_EQ(s.status, error);
        atomic_store(&launches_held, true);
        CHECK_EQ(pthread_create(&thread, NULL, submit_in_thread, &s), 0);
        while (trtx_lane_slot(lane, s.slot, NULL) != TRTX_SLOT_IN_FLIGHT) nap_us(50);
        OK(trtx_lane_release(lane, s.slot));
        CHECK_EQ(trtx_lane_slot(lane, s.slot, NULL), TRTX_SLOT_IN_FLIGHT);
        atomic_store(&launches_held, false);
        CHECK_EQ(pthread_join(thread, NULL), 0);
        CHECK_EQ(s.status, error);
        uint64_t until = now_ns() + PATIENCE;
        while (trtx_lane_slot(lane, s.slot, NULL) != TRTX_SLOT_FREE && now_ns() < until) nap_us(50);
        CHECK_EQ(trtx_lane_slot(lane, s.slot, NULL), TRTX_SLOT_FREE);
        rig_close(&r);
    }
}

static void a_slot_given_back_in_flight_comes_back(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_EFFICIENT);
    trtx_lane *lane = r.lanes[0];
    size_t a, b, c;
    OK(trtx_lane_acquire(lane, &a));
    OK(trtx_lane_acquire(lane, &b));
    OK(trtx_lane_submit(lane, a, r.gated, 1, r.hub));
    OK(trtx_lane_submit(lane, b, r.instant, 2, r.hub));
    OK(trtx_lane_arm(lane, a));
    OK(trtx_lane_release(lane, a));
    CHECK_EQ(trtx_lane_release(lane, a), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_arm(lane, a), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_submit(lane, a, r.instant, 3, NULL), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_slot(lane, a, NULL), TRTX_SLOT_IN_FLIGHT);
    CHECK_EQ(trtx_lane_acquire(lane, &c), CUDA_ERROR_NOT_READY); /* its buffers are the GPU's */
    atomic_store(&r.open, true);
    uint64_t until = now_ns() + PATIENCE;
    while (trtx_lane_slot(lane, a, NULL) != TRTX_SLOT_FREE && now_ns() < until) nap_us(100); /* only the watcher polls */
    OK(trtx_lane_acquire(lane, &c));
    CHECK_EQ(c, a);
    CHECK_EQ(trtx_lane_wait(lane, b, 0, PATIENCE, NULL), TRTX_SLOT_DONE);
    trtx_completion taken[4];
    CHECK_EQ(trtx_hub_take(r.hub, taken, 4), 1);
    CHECK_EQ(taken[0].token, 2);
    CHECK(!readable(r.fd, 0));
    trtx_lane_statistics statistics;
    trtx_lane_get_statistics(lane, &statistics);
    CHECK_EQ(statistics.dropped, 1);
    CHECK_EQ(statistics.completed, 2);
    CHECK_EQ(statistics.held, 2);
    rig_close(&r);
}

static void a_lane_is_not_destroyed_in_flight(void) {
    rig r;
    rig_open(&r, 1, 4, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t a, b;
    OK(trtx_lane_acquire(lane, &a));
    OK(trtx_lane_acquire(lane, &b));
    OK(trtx_lane_submit(lane, a, r.gated, 1, r.hub));
    OK(trtx_lane_submit(lane, b, r.instant, 2, r.hub));
    OK(trtx_lane_arm(lane, b));
    OK(trtx_lane_release(lane, a));
    CHECK_EQ(trtx_lane_destroy(lane), CUDA_ERROR_NOT_READY);
    atomic_store(&r.open, true);
    CHECK_EQ(trtx_lane_wait(lane, b, 0, PATIENCE, NULL), TRTX_SLOT_DONE);
    rig_close(&r); /* destroys it, with its completion still in the hub */
}

static void the_current_context_is_left_alone(void) {
    rig r, other;
    rig_open(&other, 1, 1, TRTX_WAKE_BALANCED);
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    CUcontext contexts[] = {NULL, other.context, r.context};
    for (size_t i = 0; i < 3; i++) {
        OK(r.api->cuCtxSetCurrent(contexts[i]));
        uint64_t pushes = trtx_mock_calls(r.mock, "cuCtxPushCurrent");
        CUcontext current;
        size_t slot;
#define SAME() (r.api->cuCtxGetCurrent(&current) == 0 && current == contexts[i])
        CHECK(SAME());
        OK(trtx_lane_acquire(r.lanes[0], &slot));
        OK(trtx_lane_submit(r.lanes[0], slot, r.instant, 1, NULL));
        CHECK(SAME());
        CHECK_EQ(trtx_lane_spin(r.lanes[0], slot, PATIENCE, NULL), TRTX_SLOT_DONE);
        CHECK(SAME());
        OK(trtx_lane_submit(r.lanes[0], slot, r.instant, 1, NULL));
        CHECK_EQ(trtx_lane_wait(r.lanes[0], slot, 0, PATIENCE, NULL), TRTX_SLOT_DONE);
        CHECK(SAME());
        trtx_lane *lane;
        OK(trtx_lane_create(&lane, r.api, r.context, r.streams[0], 1, r.watcher, TRTX_WAKE_LATENCY));
        CHECK(SAME());
        trtx_mock_inject(r.mock, "cuGraphLaunch", 1, 1, CUDA_ERROR_OUT_OF_MEMORY, 0, 0);
        CHECK_EQ(trtx_lane_submit(r.lanes[0], slot, r.instant, 1, NULL), CUDA_ERROR_OUT_OF_MEMORY);
        CHECK(SAME());
        OK(trtx_lane_destroy(lane));
        CHECK(SAME());
        OK(trtx_lane_release(r.lanes[0], slot));
        if (i == 2) CHECK(trtx_mock_calls(r.mock, "cuCtxPushCurrent") - pushes <= 2); /* at most the watcher's */
    }
    OK(r.api->cuCtxSetCurrent(NULL));
    rig_close(&r);
    rig_close(&other);
}

static void a_forked_child_is_inert(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t a, b;
    OK(trtx_lane_acquire(lane, &a));
    OK(trtx_lane_acquire(lane, &b));
    OK(trtx_lane_submit(lane, a, r.gated, 1, r.hub));
    OK(trtx_lane_arm(lane, a));
    pid_t child = fork();
    if (child == 0) {
        trtx_completion taken[1];
        size_t slot;
        bool fine = trtx_lane_submit(lane, b, r.instant, 2, NULL) == CUDA_ERROR_NOT_INITIALIZED &&
                    trtx_lane_acquire(lane, &slot) == CUDA_ERROR_NOT_INITIALIZED &&
                    trtx_lane_release(lane, b) == CUDA_ERROR_NOT_INITIALIZED &&
                    trtx_lane_arm(lane, a) == CUDA_ERROR_NOT_INITIALIZED && trtx_lane_poll(lane) == 1 &&
                    trtx_lane_wait(lane, a, 0, 0, NULL) == TRTX_SLOT_IN_FLIGHT &&
                    trtx_lane_spin(lane, a, PATIENCE, NULL) == TRTX_SLOT_IN_FLIGHT &&
                    trtx_hub_take(r.hub, taken, 1) == 0 && trtx_lane_destroy(lane) == CUDA_SUCCESS;
        trtx_watcher_destroy(r.watcher);
        trtx_hub_release(r.hub);
        _exit(fine ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    atomic_store(&r.open, true);
    CHECK(readable(r.fd, 30000));
    rig_close(&r);
}

int main(void) {
    TEST(slots_are_taken_lowest_first_and_come_back);
    TEST(arguments_are_checked);
    TEST(work_completes_in_order);
    TEST(a_slot_being_launched_counts_as_in_flight);
    TEST(a_slot_given_back_in_flight_comes_back);
    TEST(a_lane_is_not_destroyed_in_flight);
    TEST(the_current_context_is_left_alone);
    TEST(a_forked_child_is_inert);
    return report();
}
