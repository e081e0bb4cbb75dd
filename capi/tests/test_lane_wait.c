/* Hubs and waiting: who is told, when, and that nobody is told for nothing. */
#define _GNU_SOURCE
#include "lane_internal.h"
#include "lane_test.h"

static void the_fd_is_readable_exactly_while_there_is_something_for_a_sleeper(void) {
    rig r;
    rig_open(&r, 1, 4, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    trtx_completion taken[4];
    size_t a, b, c;
    OK(trtx_lane_acquire(lane, &a));
    OK(trtx_lane_acquire(lane, &b));
    OK(trtx_lane_acquire(lane, &c));
    OK(trtx_lane_submit(lane, a, r.gated, 1, r.hub));
    OK(trtx_lane_submit(lane, b, r.instant, 2, r.hub));
    OK(trtx_lane_submit(lane, c, r.instant, 3, r.hub));
    OK(trtx_lane_arm(lane, a));
    OK(trtx_lane_arm(lane, b));
    CHECK(!readable(r.fd, 20));
    atomic_store(&r.open, true);
    CHECK(readable(r.fd, 30000));
    /* not spin: that sees it done a moment before the watcher, if it completes it, has put it into the hub's queue */
    CHECK_EQ(trtx_lane_wait(lane, c, PATIENCE, PATIENCE, NULL), TRTX_SLOT_DONE);
    CHECK_EQ(trtx_hub_take(r.hub, taken, 1), 1);
    CHECK_EQ(taken[0].token, 1);
    CHECK(readable(r.fd, 0));
    CHECK_EQ(trtx_hub_take(r.hub, taken, 4), 2);
    CHECK(!readable(r.fd, 0));
    CHECK_EQ(trtx_hub_take(r.hub, taken, 4), 0);
    /* armed when it is done already: told at once */
    OK(trtx_lane_submit(lane, a, r.instant, 4, r.hub));
    CHECK_EQ(trtx_lane_spin(lane, a, PATIENCE, NULL), TRTX_SLOT_DONE);
    CHECK(!readable(r.fd, 0));
    OK(trtx_lane_arm(lane, a));
    CHECK(readable(r.fd, 0));
    /* given back, or submitted again: not heard of any more */
    OK(trtx_lane_release(lane, a));
    CHECK(!readable(r.fd, 0));
    CHECK_EQ(trtx_hub_take(r.hub, taken, 4), 0);
    OK(trtx_lane_submit(lane, b, r.instant, 5, r.hub));
    OK(trtx_lane_arm(lane, b));
    CHECK(readable(r.fd, 30000));
    OK(trtx_lane_submit(lane, b, r.instant, 6, NULL));
    CHECK(!readable(r.fd, 0));
    CHECK_EQ(trtx_lane_spin(lane, b, PATIENCE, NULL), TRTX_SLOT_DONE);
    CHECK_EQ(trtx_hub_take(r.hub, taken, 4), 0);
    /* taken before it is armed: nothing left to tell */
    OK(trtx_lane_submit(lane, b, r.instant, 7, r.hub));
    CHECK_EQ(trtx_lane_wait(lane, b, PATIENCE, PATIENCE, NULL), TRTX_SLOT_DONE);
    CHECK_EQ(trtx_hub_take(r.hub, taken, 4), 1);
    OK(trtx_lane_arm(lane, b));
    CHECK(!readable(r.fd, 5));
    rig_close(&r);
}

static void a_hub_lives_as_long_as_a_slot_needs_it(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    trtx_hub *hub;
    int fd;
    OK(trtx_hub_create(&hub, &fd));
    size_t a, b;
    OK(trtx_lane_acquire(r.lanes[0], &a));
    OK(trtx_lane_acquire(r.lanes[0], &b));
    OK(trtx_lane_submit(r.lanes[0], a, r.gated, 1, hub));
    OK(trtx_lane_submit(r.lanes[0], b, r.gated, 2, hub));
    OK(trtx_lane_arm(r.lanes[0], a));
    trtx_hub_release(hub); /* as an event loop does that is closed with work in flight */
    OK(trtx_lane_release(r.lanes[0], a));
    atomic_store(&r.open, true);
    CHECK_EQ(trtx_lane_wait(r.lanes[0], b, 0, PATIENCE, NULL), TRTX_SLOT_DONE);
    rig_close(&r); /* with a done slot that was not given back */
}

static void one_look_may_tell_many_hubs(void) {
    rig r;
    rig_open(&r, 1, 20, TRTX_WAKE_EFFICIENT);
    trtx_hub *hubs[20];
    int fds[20];
    size_t slots[20];
    for (uint64_t i = 0; i < 20; i++) {
        OK(trtx_hub_create(&hubs[i], &fds[i]));
        OK(trtx_lane_acquire(r.lanes[0], &slots[i]));
        OK(trtx_lane_submit(r.lanes[0], slots[i], i ? r.instant : r.gated, i, hubs[i]));
        OK(trtx_lane_arm(r.lanes[0], slots[i]));
        trtx_hub_release(hubs[i]);
    }
    atomic_store(&r.open, true);
    for (size_t i = 0; i < 20; i++) {
        trtx_completion completion;
        CHECK(readable(fds[i], 30000));
        CHECK_EQ(trtx_hub_take(hubs[i], &completion, 1), 1);
        CHECK_EQ(completion.token, i);
        CHECK(!readable(fds[i], 0));
    }
    rig_close(&r);
}

typedef struct sleeper {
    rig *r;
    size_t slot;
    trtx_slot_state state;
    trtx_completion completion;
} sleeper;

static void *sleep_in_thread(void *argument) {
    sleeper *s = argument;
    s->completion.token = UINT64_MAX;
    s->state = trtx_lane_wait(s->r->lanes[0], s->slot, 0, 2 * PATIENCE, &s->completion);
    return NULL;
}

static void several_threads_may_wait_for_one_slot(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    size_t slot;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    OK(trtx_lane_submit(r.lanes[0], slot, r.gated, 1, NULL));
    pthread_t threads[4];
    sleeper sleepers[4];
    for (int i = 0; i < 4; i++) {
        sleepers[i] = (sleeper){.r = &r, .slot = slot};
        CHECK_EQ(pthread_create(&threads[i], NULL, sleep_in_thread, &sleepers[i]), 0);
    }
    nap_us(5000);
    atomic_store(&r.open, true);
    uint64_t before = now_ns();
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
        CHECK_EQ(sleepers[i].state, TRTX_SLOT_DONE);
    }
    CHECK(now_ns() - before < PATIENCE); /* all were woken, none by his own limit */
    rig_close(&r);
}

static void waiting_spins_sleeps_and_times_out(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t slot;
    OK(trtx_lane_acquire(lane, &slot));
    OK(trtx_lane_submit(lane, slot, r.gated, 7, NULL));
    uint64_t before = now_ns();
    CHECK_EQ(trtx_lane_spin(lane, slot, 5 * MS, NULL), TRTX_SLOT_IN_FLIGHT);
    CHECK(now_ns() - before >= 5 * MS);
    before = now_ns();
    CHECK_EQ(trtx_lane_wait(lane, slot, 1 * MS, 10 * MS, NULL), TRTX_SLOT_IN_FLIGHT);
    CHECK(now_ns() - before >= 10 * MS);
    before = now_ns();
    CHECK_EQ(trtx_lane_wait(lane, slot, 2 * PATIENCE, 10 * MS, NULL), TRTX_SLOT_IN_FLIGHT);
    CHECK(now_ns() - before < PATIENCE);
    atomic_store(&r.open, true);
    trtx_completion completion;
    CHECK_EQ(trtx_lane_wait(lane, slot, 0, 0, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.token, 7);
    CHECK_EQ(trtx_lane_wait(lane, slot, 0, 0, &completion), TRTX_SLOT_DONE);
    rig_close(&r);
}

static bool is_awaited(trtx_lane *lane, size_t slot) {
    pthread_mutex_lock(&lane->state);
    bool awaited = lane->slots[slot].waiters > 0;
    pthread_mutex_unlock(&lane->state);
    return awaited;
}

/* Between a completion and the waiter's waking up, another thread may submit the slot again: that one is not awaited. */
static void a_waiter_does_not_wait_for_the_next_submission(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_BALANCED);
    trtx_lane *lane = r.lanes[0];
    size_t slot;
    OK(trtx_lane_acquire(lane, &slot));
    for (uint64_t round = 0; round < 20 && atomic_load(&checks_failed) == 0; round++) {
        atomic_store(&r.open, false);
        OK(trtx_lane_submit(lane, slot, r.gated, 2 * round, NULL));
        pthread_t thread;
        sleeper s = {.r = &r, .slot = slot};
        CHECK_EQ(pthread_create(&thread, NULL, sleep_in_thread, &s), 0);
        while (!is_awaited(lane, slot)) nap_us(100);
        atomic_store(&r.open, true);
        while (trtx_lane_poll(lane)) /* sooner than the sleeper is on its feet */;
        atomic_store(&r.open, false);
        uint64_t before = now_ns();
        OK(trtx_lane_submit(lane, slot, r.gated, 2 * round + 1, NULL));
        CHECK_EQ(pthread_join(thread, NULL), 0);
        CHECK(now_ns() - before < PATIENCE);
        CHECK(s.state == TRTX_SLOT_IN_FLIGHT || s.state == TRTX_SLOT_DONE); /* done: it was quicker than we */
        CHECK(s.state == TRTX_SLOT_IN_FLIGHT || s.completion.token == 2 * round);
        CHECK(s.state == TRTX_SLOT_DONE || s.completion.token == UINT64_MAX); /* not the next one's */
        atomic_store(&r.open, true);
        trtx_completion completion;
        CHECK_EQ(trtx_lane_wait(lane, slot, 0, PATIENCE, &completion), TRTX_SLOT_DONE);
        CHECK_EQ(completion.token, 2 * round + 1);
    }
    rig_close(&r);
}

static void mark_follows_what_the_caller_enqueued(void) {
    rig r;
    rig_open(&r, 1, 2, TRTX_WAKE_LATENCY);
    size_t slot;
    OK(trtx_lane_acquire(r.lanes[0], &slot));
    OK(r.api->cuCtxSetCurrent(r.context));
    OK(trtx_mock_launch(r.streams[0], 0, wait_at_gate, &r, NULL));
    OK(r.api->cuCtxSetCurrent(NULL));
    OK(trtx_lane_mark(r.lanes[0], slot, 9, r.hub));
    OK(trtx_lane_arm(r.lanes[0], slot));
    CHECK(!readable(r.fd, 10));
    atomic_store(&r.open, true);
    CHECK(readable(r.fd, 30000));
    trtx_completion completion;
    CHECK_EQ(trtx_lane_slot(r.lanes[0], slot, &completion), TRTX_SLOT_DONE);
    CHECK_EQ(completion.token, 9);
    rig_close(&r);
}

int main(void) {
    TEST(the_fd_is_readable_exactly_while_there_is_something_for_a_sleeper);
    TEST(a_hub_lives_as_long_as_a_slot_needs_it);
    TEST(one_look_may_tell_many_hubs);
    TEST(several_threads_may_wait_for_one_slot);
    TEST(waiting_spins_sleeps_and_times_out);
    TEST(a_waiter_does_not_wait_for_the_next_submission);
    TEST(mark_follows_what_the_caller_enqueued);
    return report();
}
