/* Lanes on a mock driver that fails: everybody waiting gets the cause, others go on. */
#define _GNU_SOURCE
#include "lane_test.h"

static void a_launch_that_fails_leaves_the_slot_held(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t slot;
    OK(trtx_lane_acquire(lane, &slot));
    trtx_mock_inject(r.mock, "cuGraphLaunch", 1, 1, CUDA_ERROR_OUT_OF_MEMORY, 0, 0);
    CHECK_EQ(trtx_lane_submit(lane, slot, r.instant, 1, r.hub), CUDA_ERROR_OUT_OF_MEMORY);
    CHECK_EQ(trtx_lane_slot(lane, slot, NULL), TRTX_SLOT_HELD);
    trtx_lane_statistics statistics;
    trtx_lane_get_statistics(lane, &statistics);
    CHECK_EQ(statistics.submitted + statistics.in_flight, 0);
    CHECK_EQ(statistics.dead, 0);
    CHECK_EQ(statistics.held, 1);
    trtx_completion completion;
    OK(trtx_lane_submit(lane, slot, r.instant, 2, r.hub));
    CHECK_EQ(trtx_lane_spin(lane, slot, PATIENCE, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.token, 2);
    CHECK_EQ(trtx_hub_take(r.hub, &completion, 1), 1);
    CHECK_EQ(trtx_hub_take(r.hub, &completion, 1), 0);
    rig_close(&r);
}

static CUresult set_flag(void *userdata) {
    nap_us(5000);
    atomic_store((_Atomic bool *)userdata, true);
    return CUDA_SUCCESS;
}

static void a_record_that_fails_waits_for_the_work(void) {
    rig r;
    rig_open(&r, 1, 1, TRTX_WAKE_BALANCED);
    _Atomic bool ran = false;
    CUgraphExec exec = make_graph(&r, 0, set_flag, (void *)&ran);
    size_t slot;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    trtx_mock_inject(r.mock, "cuEventRecord", 1, 1, CUDA_ERROR_OUT_OF_MEMORY, 0, 0);
    OK(trtx_lane_submit(r.lanes[0], slot, exec, 1, NULL));
    trtx_completion completion;
    CHECK_EQ(trtx_lane_wait(r.lanes[0], slot, 0, 0, &completion), TRTX_SLOT_DONE);
    CHECK(atomic_load(&ran)); /* the buffers are the caller's again only now */
    CHECK_EQ(completion.status, CUDA_ERROR_OUT_OF_MEMORY);
    free_graph(&r, exec);
    rig_close(&r);
}

static void a_query_that_fails_once_is_asked_again(void) {
    rig r;
    rig_open(&r, 1, 1, TRTX_WAKE_BALANCED);
    size_t slot;
    trtx_completion completion;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    OK(trtx_lane_submit(r.lanes[0], slot, r.gated, 1, NULL));
    trtx_mock_inject(r.mock, "cuEventQuery", 1, 1, CUDA_ERROR_OPERATING_SYSTEM, 0, 0);
    CHECK_EQ(trtx_lane_poll(r.lanes[0]), 1); /* the GPU works on it: nothing is known */
    CHECK_EQ(trtx_lane_slot(r.lanes[0], slot, NULL), TRTX_SLOT_IN_FLIGHT);
    atomic_store(&r.open, true);
    CHECK_EQ(trtx_lane_wait(r.lanes[0], slot, 0, 0, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.status, CUDA_SUCCESS);
    rig_close(&r);
}

static void a_lane_dies_at_launch_and_takes_its_slots_with_it(void) {
    rig r;
    rig_open(&r, 1, 4, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t a, b, c;
    OK(trtx_lane_acquire(lane, &a));
    OK(trtx_lane_acquire(lane, &b));
    OK(trtx_lane_acquire(lane, &c));
    OK(trtx_lane_submit(lane, a, r.gated, 1, r.hub));
    OK(trtx_lane_submit(lane, b, r.gated, 2, r.hub));
    OK(trtx_lane_arm(lane, a));
    trtx_mock_inject(r.mock, "cuGraphLaunch", 1, 0, CUDA_ERROR_ILLEGAL_ADDRESS, 0, 0);
    CHECK_EQ(trtx_lane_submit(lane, c, r.instant, 3, r.hub), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK_EQ(trtx_lane_slot(lane, c, NULL), TRTX_SLOT_HELD);
    CHECK(readable(r.fd, 30000));
    trtx_completion taken[4];
    CHECK_EQ(trtx_hub_take(r.hub, taken, 4), 2);
    CHECK_EQ(taken[0].status, CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK_EQ(taken[1].status, CUDA_ERROR_ILLEGAL_ADDRESS);
    trtx_mock_clear_faults(r.mock);
    uint64_t launches = trtx_mock_calls(r.mock, "cuGraphLaunch");
    CHECK_EQ(trtx_lane_submit(lane, a, r.instant, 4, r.hub), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK_EQ(trtx_lane_mark(lane, b, 5, r.hub), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK_EQ(trtx_mock_calls(r.mock, "cuGraphLaunch"), launches);
    trtx_lane_statistics statistics;
    trtx_lane_get_statistics(lane, &statistics);
    CHECK_EQ(statistics.dead, CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK_EQ(statistics.failed, 2);
    rig_close(&r);
}

/* 100 in flight on 4 lanes, of which some are armed, some waited for by threads, some given back, some polled for. */
typedef struct waiter {
    trtx_lane *lane;
    size_t slot;
    trtx_slot_state state;
    trtx_completion completion;
} waiter;

static void *wait_in_thread(void *argument) {
    waiter *w = argument;
    w->state = trtx_lane_wait(w->lane, w->slot, 0, PATIENCE, &w->completion);
    return NULL;
}

static CUresult fault(void *userdata) {
    wait_at_gate(userdata);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

static void device_lost(trtx_wake_mode mode) {
    rig r, other;
    rig_open(&other, 1, 2, mode);
    rig_open(&r, 4, 32, mode);
    CUgraphExec bad = make_graph(&r, 0, fault, &r);
    size_t slots[4][25];
    pthread_t threads[4];
    waiter waiters[4];
    for (size_t i = 0; i < 4; i++) {
        for (size_t j = 0; j < 25; j++) {
            OK(trtx_lane_acquire(r.lanes[i], &slots[i][j]));
            CUgraphExec exec = j > 0 ? r.instant : i == 2 ? bad : r.gated;
            OK(trtx_lane_submit(r.lanes[i], slots[i][j], exec, i * 25 + j, r.hub));
            if (i < 3 || j < 5) OK(trtx_lane_arm(r.lanes[i], slots[i][j]));
        }
        waiters[i] = (waiter){.lane = r.lanes[i], .slot = slots[i][20]};
        CHECK_EQ(pthread_create(&threads[i], NULL, wait_in_thread, &waiters[i]), 0);
        OK(trtx_lane_release(r.lanes[i], slots[i][10]));
    }
    /* Hold the other lanes until the fault has struck. */
    size_t mine;
    OK(trtx_lane_acquire(other.lanes[0], &mine));
    OK(trtx_lane_submit(other.lanes[0], mine, other.gated, 1, other.hub));
    OK(trtx_lane_arm(other.lanes[0], mine));
    atomic_store(&r.open, true);
    size_t told = 0, failed = 0;
    bool seen[100] = {false};
    uint64_t until = now_ns() + PATIENCE;
    while (told < 96 && now_ns() < until) {
        if (!readable(r.fd, 1)) trtx_lane_poll(r.lanes[3]); /* most of its slots are not armed: we look after them */
        trtx_completion taken[7];
        size_t count = trtx_hub_take(r.hub, taken, 7);
        for (size_t i = 0; i < count; i++) {
            CHECK(taken[i].token < 100 && !seen[taken[i].token]);
            seen[taken[i].token] = true;
            /* what ended before the fault was noticed is fine; lane 2 cannot be */
            CHECK(taken[i].status == CUDA_ERROR_ILLEGAL_ADDRESS || (taken[i].status == 0 && taken[i].token / 25 != 2));
            failed += taken[i].status != 0;
        }
        told += count;
    }
    CHECK_EQ(told, 96);
    CHECK(failed >= 24);
    for (size_t i = 0; i < 4; i++) {
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
        CHECK_EQ(waiters[i].state, TRTX_SLOT_DONE);
        CHECK_EQ(trtx_lane_poll(r.lanes[i]), 0);
        CHECK_EQ(trtx_lane_slot(r.lanes[i], slots[i][10], NULL), TRTX_SLOT_FREE);
        /* nothing can be started on a lost device, whether this lane knew it already or not */
        CHECK_EQ(trtx_lane_submit(r.lanes[i], slots[i][0], r.instant, 0, NULL), CUDA_ERROR_ILLEGAL_ADDRESS);
        trtx_lane_statistics statistics;
        trtx_lane_get_statistics(r.lanes[i], &statistics);
        CHECK_EQ(statistics.dead, CUDA_ERROR_ILLEGAL_ADDRESS);
        CHECK_EQ(statistics.dropped, 1);
        CHECK_EQ(statistics.completed, 25);
    }
    CHECK_EQ(waiters[2].completion.status, CUDA_ERROR_ILLEGAL_ADDRESS);
    /* the other device noticed nothing */
    CHECK(!readable(other.fd, 0));
    atomic_store(&other.open, true);
    trtx_completion completion;
    CHECK(readable(other.fd, 30000));
    CHECK_EQ(trtx_hub_take(other.hub, &completion, 1), 1);
    CHECK_EQ(completion.status, 0);
    for (int i = 0; i < 100; i++) {
        OK(trtx_lane_submit(other.lanes[0], mine, other.instant, 2, NULL));
        CHECK_EQ(trtx_lane_wait(other.lanes[0], mine, 0, PATIENCE, &completion), TRTX_SLOT_DONE);
        CHECK_EQ(completion.status, 0);
    }
    free_graph(&r, bad);
    rig_close(&r);
    rig_close(&other);
}

static void a_lost_device_is_told_to_everybody_latency(void) { device_lost(TRTX_WAKE_LATENCY); }
static void a_lost_device_is_told_to_everybody_balanced(void) { device_lost(TRTX_WAKE_BALANCED); }
static void a_lost_device_is_told_to_everybody_efficient(void) { device_lost(TRTX_WAKE_EFFICIENT); }

static void one_watcher_serves_two_devices_of_which_one_dies(void) {
    rig r, other;
    rig_open(&other, 1, 2, TRTX_WAKE_LATENCY);
    rig_open(&r, 1, 2, TRTX_WAKE_LATENCY);
    trtx_lane *lane;
    OK(trtx_lane_create(&lane, other.api, other.context, other.streams[0], 4, r.watcher, TRTX_WAKE_BALANCED));
    CUgraphExec bad = make_graph(&r, 0, fault, &r);
    size_t slot, theirs;
    trtx_completion completion;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    OK(trtx_lane_submit(r.lanes[0], slot, bad, 1, r.hub));
    OK(trtx_lane_arm(r.lanes[0], slot));
    OK(trtx_lane_acquire(lane, &theirs));
    OK(trtx_lane_submit(lane, theirs, other.gated, 2, other.hub));
    OK(trtx_lane_arm(lane, theirs));
    atomic_store(&r.open, true);
    CHECK(readable(r.fd, 30000));
    CHECK_EQ(trtx_hub_take(r.hub, &completion, 1), 1);
    CHECK_EQ(completion.status, CUDA_ERROR_ILLEGAL_ADDRESS);
    atomic_store(&other.open, true);
    CHECK(readable(other.fd, 30000));
    CHECK_EQ(trtx_hub_take(other.hub, &completion, 1), 1);
    CHECK_EQ(completion.status, CUDA_SUCCESS);
    OK(trtx_lane_destroy(lane));
    free_graph(&r, bad);
    rig_close(&r);
    rig_close(&other);
}

static void a_query_refused_by_a_capture_says_nothing(void) {
    rig r;
    rig_open(&r, 1, 1, TRTX_WAKE_BALANCED);
    size_t slot;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    OK(trtx_lane_submit(r.lanes[0], slot, r.gated, 1, NULL));
    trtx_mock_inject(r.mock, "cuEventQuery", 1, 3, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 0, 0);
    for (int i = 0; i < 3; i++) CHECK_EQ(trtx_lane_poll(r.lanes[0]), 1);
    atomic_store(&r.open, true);
    trtx_completion completion;
    CHECK_EQ(trtx_lane_spin(r.lanes[0], slot, PATIENCE, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.status, 0);
    rig_close(&r);
}

static void an_error_of_one_request_is_not_the_end_of_the_lane(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    size_t a, b;
    trtx_completion completion;
    OK(trtx_lane_acquire(r.lanes[0], &a));
    OK(trtx_lane_acquire(r.lanes[0], &b));
    OK(trtx_lane_submit(r.lanes[0], a, r.instant, 1, NULL));
    OK(trtx_lane_submit(r.lanes[0], b, r.instant, 2, NULL));
    /* Once is forgotten, since the event answers when it is asked again; twice is meant. */
    trtx_mock_inject(r.mock, "cuEventQuery", 1, 2, CUDA_ERROR_INVALID_VALUE, 0, 0);
    CHECK_EQ(trtx_lane_spin(r.lanes[0], a, PATIENCE, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.status, CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(trtx_lane_spin(r.lanes[0], b, PATIENCE, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.status, 0);
    OK(trtx_lane_submit(r.lanes[0], a, r.instant, 3, NULL));
    trtx_mock_inject(r.mock, "cuEventQuery", 1, 1, CUDA_ERROR_INVALID_HANDLE, 0, 0);
    CHECK_EQ(trtx_lane_spin(r.lanes[0], a, PATIENCE, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.status, 0);
    rig_close(&r);
}

/* The device is lost under eight threads that submit, wait, arm and give back: each gets an answer to everything. */
typedef struct user {
    rig *r;
    unsigned seed;
    uint64_t finished, failed, wrong;
} user;

static void *use_until_it_dies(void *argument) {
    user *u = argument;
    trtx_hub *hub;
    int fd;
    if (trtx_hub_create(&hub, &fd) != CUDA_SUCCESS) return NULL;
    for (bool alive = true; alive;) {
        trtx_lane *lane = u->r->lanes[rand_r(&u->seed) % 4];
        size_t slot;
        trtx_completion completion = {0};
        while (trtx_lane_acquire(lane, &slot) == CUDA_ERROR_NOT_READY) nap_us(10);
        CUresult status = trtx_lane_submit(lane, slot, u->r->instant, 1, hub);
        if (status != CUDA_SUCCESS) {
            alive = false;
            if (status != CUDA_ERROR_LAUNCH_FAILED || trtx_lane_slot(lane, slot, NULL) != TRTX_SLOT_HELD) u->wrong++;
        } else {
            switch (rand_r(&u->seed) % 3) {
            case 0:
                if (trtx_lane_wait(lane, slot, 0, PATIENCE, &completion) != TRTX_SLOT_DONE) u->wrong++;
                break;
            case 1:
                if (trtx_lane_arm(lane, slot) != CUDA_SUCCESS || !readable(fd, 30000)) u->wrong++;
                if (trtx_hub_take(hub, &completion, 1) != 1) u->wrong++;
                break;
            default: /* given back in flight, below */
                break;
            }
            u->failed += completion.status != 0;
            if (completion.status != 0 && completion.status != CUDA_ERROR_LAUNCH_FAILED) u->wrong++;
        }
        if (trtx_lane_release(lane, slot) != CUDA_SUCCESS) u->wrong++;
        u->finished++;
    }
    trtx_hub_release(hub);
    return NULL;
}

static void a_device_lost_under_eight_threads(void) {
    for (unsigned round = 0; round < 10; round++) {
        rig r;
        rig_open(&r, 4, 3, (trtx_wake_mode)(round % 3));
        trtx_mock_inject(r.mock, round % 2 ? "execute" : "cuGraphLaunch", 500 + round, 1, CUDA_ERROR_LAUNCH_FAILED, 0, 1);
        pthread_t threads[8];
        user users[8];
        for (unsigned i = 0; i < 8; i++) {
            users[i] = (user){.r = &r, .seed = round * 8 + i + 1};
            CHECK_EQ(pthread_create(&threads[i], NULL, use_until_it_dies, &users[i]), 0);
        }
        uint64_t finished = 0;
        for (unsigned i = 0; i < 8; i++) {
            CHECK_EQ(pthread_join(threads[i], NULL), 0);
            CHECK_EQ(users[i].wrong, 0);
            finished += users[i].finished;
        }
        CHECK(finished >= 500);
        for (size_t i = 0; i < 4; i++) {
            trtx_lane_poll(r.lanes[i]);
            trtx_lane_statistics statistics;
            trtx_lane_get_statistics(r.lanes[i], &statistics);
            CHECK_EQ(statistics.in_flight + statistics.held, 0);
            CHECK_EQ(statistics.submitted, statistics.completed);
        }
        rig_close(&r);
    }
}

typedef struct submitter {
    rig *r;
    trtx_lane *lane;
    size_t slot;
    CUresult status;
} submitter;

static void *submit_in_thread(void *argument) {
    submitter *s = argument;
    s->status = trtx_lane_submit(s->lane, s->slot, s->r->instant, 2, NULL);
    return NULL;
}

static CUresult query_of_a_lost_device(CUevent event) { return event ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS; }

static void a_launch_under_way_when_the_lane_dies_gets_the_cause(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    /* Only the query tells of the loss: the launch succeeds as one does that came just before. */
    trtx_cuda_api api = *driver_that_holds_launches();
    api.cuEventQuery = query_of_a_lost_device;
    trtx_lane *lane;
    OK(trtx_lane_create(&lane, &api, r.context, r.streams[0], 2, r.watcher, TRTX_WAKE_BALANCED));
    submitter s = {.r = &r, .lane = lane};
    size_t slot;
    pthread_t thread;
    trtx_completion completion;
    OK(trtx_lane_acquire(lane, &slot));
    OK(trtx_lane_acquire(lane, &s.slot));
    OK(trtx_lane_submit(lane, slot, r.gated, 1, NULL));
    atomic_store(&launches_held, true);
    CHECK_EQ(pthread_create(&thread, NULL, submit_in_thread, &s), 0);
    while (trtx_lane_slot(lane, s.slot, NULL) != TRTX_SLOT_IN_FLIGHT) nap_us(50);
    CHECK_EQ(trtx_lane_poll(lane), 0);
    CHECK_EQ(trtx_lane_slot(lane, slot, NULL), TRTX_SLOT_DONE);
    CHECK_EQ(trtx_lane_slot(lane, s.slot, NULL), TRTX_SLOT_IN_FLIGHT);
    atomic_store(&launches_held, false);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    OK(s.status);
    CHECK_EQ(trtx_lane_slot(lane, s.slot, &completion), TRTX_SLOT_DONE); /* nobody looked again */
    CHECK_EQ(completion.status, CUDA_ERROR_ILLEGAL_ADDRESS);
    OK(trtx_lane_destroy(lane));
    rig_close(&r);
}

int main(void) {
    TEST(a_launch_that_fails_leaves_the_slot_held);
    TEST(a_record_that_fails_waits_for_the_work);
    TEST(a_query_that_fails_once_is_asked_again);
    TEST(a_lane_dies_at_launch_and_takes_its_slots_with_it);
    TEST(a_lost_device_is_told_to_everybody_latency);
    TEST(a_lost_device_is_told_to_everybody_balanced);
    TEST(a_lost_device_is_told_to_everybody_efficient);
    TEST(a_launch_under_way_when_the_lane_dies_gets_the_cause);
    TEST(a_device_lost_under_eight_threads);
    TEST(one_watcher_serves_two_devices_of_which_one_dies);
    TEST(a_query_refused_by_a_capture_says_nothing);
    TEST(an_error_of_one_request_is_not_the_end_of_the_lane);
    return report();
}
