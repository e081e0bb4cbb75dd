/* The captain's loop of ManyRows: what it does without the GIL. */
#include "many.h"

/* A captain that sleeps looks up this often whether it shall abandon what is in flight. */
static const uint64_t nap_ns = 20000000;

/* Raise what the captain alone writes. */
static void add(_Atomic size_t *counter, size_t amount) {
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + amount, memory_order_relaxed);
}

static void fail(crew *own, station *at, CUresult status, const char *call) {
    many_object *job = own->job;
    at->failed++;
    if (job->status == CUDA_SUCCESS) {
        job->status = status;
        job->call = call;
        own->culprit = at;
    }
    int nothing = TOLD_NOTHING;
    atomic_compare_exchange_strong(&job->told, &nothing, TOLD_TO_STOP);
}

/* The next chunk's first row, or false: there is none, or no more are wanted. */
static bool take(many_object *job, uint64_t until_ns, size_t *row) {
    if (atomic_load_explicit(&job->told, memory_order_relaxed) != TOLD_NOTHING) return false;
    if (until_ns && trtx_now_ns() >= until_ns) return false;
    *row = atomic_load_explicit(&job->next, memory_order_relaxed);
    if (*row >= job->stop) return false;
    add(&job->next, job->stop - *row < job->batch ? job->stop - *row : job->batch);
    return true;
}

/* Copy the station's rows of `count` tensors, from the first of these on. */
static void copy_rows(many_object *job, const station *at, Py_ssize_t first, Py_ssize_t count, bool inward) {
    size_t bytes = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        size_t row_bytes = job->row_bytes[first + i];
        char *theirs = (char *)job->buffers[first + i].buf + at->row * row_bytes, *pinned = at->data[first + i];
        job->parts[i] = (trtx_part){inward ? pinned : theirs, inward ? theirs : pinned, at->count * row_bytes};
        bytes += at->count * row_bytes;
    }
    trtx_copy_do(&job->copy, job->parts, (size_t)count, bytes);
}

/* Fill the station with a chunk, and launch it. */
static void launch(crew *own, station *at, size_t row) {
    many_object *job = own->job;
    const char *call;
    at->taken_ns = trtx_now_ns();
    at->row = row;
    at->count = job->stop - row < job->batch ? job->stop - row : job->batch;
    copy_rows(job, at, 0, job->input_count, true);
    graph *with = at->graphs;
    while (with->rows < at->count) with++; /* the last has `batch` rows at least */
    CUresult status = trtx_lane_submit_call(at->lane, at->slot, with->exec, 0, NULL, &call);
    if (status != CUDA_SUCCESS) {
        at->refused++;
        fail(own, at, status, call);
        return;
    }
    with->launches++;
    at->flying = at->launched = true;
    at->turn = own->turns++;
    add(&job->batches, 1);
    add(&job->padding, with->rows - at->count);
}

/* The GPU is done with the station. */
static void collect(crew *own, station *at, trtx_slot_state state, const trtx_completion *completion) {
    many_object *job = own->job;
    at->flying = false;
    CUresult status = state == TRTX_SLOT_DONE ? completion->status : CUDA_ERROR_INVALID_HANDLE;
    if (status != CUDA_SUCCESS) {
        fail(own, at, status, "");
        return;
    }
    copy_rows(job, at, job->input_count, job->output_count, false);
    size_t chunk = (at->row - job->start) / job->batch;
    job->queue_s[chunk] = (double)(completion->launched_ns - at->taken_ns) * 1e-9;
    job->gpu_s[chunk] = (double)(completion->completed_ns - completion->launched_ns) * 1e-9;
    at->completed++;
    add(&job->done, at->count);
}

/* What is done, the one that was launched first; NULL: nothing is. *oldest: what is in flight longest. */
static station *find_done(const crew *own, station **oldest, trtx_slot_state *state, trtx_completion *completion) {
    station *found = NULL;
    *oldest = NULL;
    for (size_t i = 0; i < own->count; i++) {
        station *at = &own->stations[i];
        if (!at->flying) continue;
        if (!*oldest || at->turn < (*oldest)->turn) *oldest = at;
        if ((!found || at->turn < found->turn) && trtx_lane_slot(at->lane, at->slot, NULL) != TRTX_SLOT_IN_FLIGHT) found = at;
    }
    if (found) *state = trtx_lane_slot(found->lane, found->slot, completion);
    return found;
}

static void look(const crew *own) {
    for (size_t i = 0; i < own->count; i++) {
        bool seen = !own->stations[i].flying;
        for (size_t j = 0; j < i && !seen; j++) seen = own->stations[j].flying && own->stations[j].lane == own->stations[i].lane;
        if (!seen) trtx_lane_poll(own->stations[i].lane);
    }
}

/* Wait for the next station that is done: spins first, then sleeps. NULL: nothing is in flight, or it is to be abandoned. */
static station *next_done(const crew *own, uint64_t spin_ns, trtx_slot_state *state, trtx_completion *completion) {
    uint64_t begun = 0;
    station *oldest, *found;
    while (!(found = find_done(own, &oldest, state, completion)) && oldest) {
        look(own);
        if ((found = find_done(own, &oldest, state, completion))) break;
        if (atomic_load_explicit(&own->job->told, memory_order_relaxed) == TOLD_TO_ABANDON) return NULL;
        uint64_t now = trtx_now_ns();
        if (!begun) begun = now;
        if (now - begun < spin_ns)
            trtx_pause();
        else
            trtx_lane_wait(oldest->lane, oldest->slot, 0, nap_ns, NULL);
    }
    return found;
}

void trtx_many_work(crew *own, uint64_t spin_ns, uint64_t until_ns) {
    many_object *job = own->job;
    /* The context is current throughout, so that no call has to push it. Lanes of another one push their own. */
    trtx_scope scope = {0};
    trtx_scope_enter(&scope, own->stations[0].lane->api, own->stations[0].lane->context);
    size_t row;
    /* The first one whatever the time is: every call brings the job forward. */
    for (size_t i = 0; i < own->count && take(job, i ? until_ns : 0, &row); i++) launch(own, &own->stations[i], row);
    trtx_slot_state state = TRTX_SLOT_FREE;
    trtx_completion completion = {0};
    station *at;
    while ((at = next_done(own, spin_ns, &state, &completion))) {
        collect(own, at, state, &completion);
        if (take(job, until_ns, &row)) launch(own, at, row);
    }
    trtx_scope_leave(&scope);
}
