/* How a copy is shared. Pieces are taken by counting `left` down. Whoever has counted one down sees what the captain posted
 * before it set the counter (release, acquire; the others' counting down continues the release sequence), and holds it in
 * place: the captain posts nothing else before `pending` is 0. So a helper that comes late, or from an earlier copy, needs to
 * know nothing but the counter. Sleeping is by flags that both sides write before they read the other's (sequentially
 * consistent), so that nobody is left asleep. */
#define _GNU_SOURCE
#include "many_copy.h"

#include <string.h>

#include "lane_internal.h"

/* How long the captain polls for the helpers' last pieces before it sleeps: more than a piece takes, unless its thread has no
 * core, which it may then have the captain's. */
static const uint64_t patience_ns = 200000;

bool trtx_copy_init(trtx_copy *copy, size_t piece_bytes) {
    copy->piece_bytes = piece_bytes;
    if (pthread_mutex_init(&copy->mutex, NULL)) return false;
    if (!pthread_cond_init(&copy->posted, NULL)) {
        if (!pthread_cond_init(&copy->done, NULL)) return true;
        pthread_cond_destroy(&copy->posted);
    }
    pthread_mutex_destroy(&copy->mutex);
    return false;
}

void trtx_copy_destroy(trtx_copy *copy) {
    pthread_cond_destroy(&copy->done);
    pthread_cond_destroy(&copy->posted);
    pthread_mutex_destroy(&copy->mutex);
}

/* Bytes [from, to) of all parts. */
static void copy_range(const trtx_part *part, size_t from, size_t to) {
    for (size_t begin = 0; begin < to; begin += part->bytes, part++) {
        size_t first = from > begin ? from - begin : 0, last = to - begin < part->bytes ? to - begin : part->bytes;
        if (first < last) memcpy(part->target + first, part->source + first, last - first);
    }
}

/* Take one piece and copy it; false: there is none. */
static bool copy_piece(trtx_copy *copy) {
    size_t left = atomic_load_explicit(&copy->left, memory_order_relaxed);
    do {
        if (!left) return false;
    } while (!atomic_compare_exchange_weak_explicit(&copy->left, &left, left - 1, memory_order_acquire, memory_order_relaxed));
    size_t from = (copy->pieces - left) * copy->piece_bytes;
    copy_range(copy->parts, from, copy->bytes - from < copy->piece_bytes ? copy->bytes : from + copy->piece_bytes);
    if (atomic_fetch_sub(&copy->pending, 1) == 1 && atomic_load(&copy->waiting)) {
        pthread_mutex_lock(&copy->mutex);
        pthread_cond_signal(&copy->done);
        pthread_mutex_unlock(&copy->mutex);
    }
    return true;
}

/* Wait until the helpers have done what they took. */
static void await_pieces(trtx_copy *copy) {
    uint64_t until = 0;
    while (atomic_load_explicit(&copy->pending, memory_order_acquire)) {
        uint64_t now = trtx_now_ns();
        if (!until) until = now + patience_ns;
        if (now < until) {
            trtx_pause();
            continue;
        }
        pthread_mutex_lock(&copy->mutex);
        atomic_store(&copy->waiting, true);
        while (atomic_load(&copy->pending)) pthread_cond_wait(&copy->done, &copy->mutex);
        atomic_store(&copy->waiting, false);
        pthread_mutex_unlock(&copy->mutex);
    }
}

static void wake_helpers(trtx_copy *copy) {
    if (!atomic_load(&copy->sleepers)) return;
    pthread_mutex_lock(&copy->mutex);
    pthread_cond_broadcast(&copy->posted);
    pthread_mutex_unlock(&copy->mutex);
}

void trtx_copy_do(trtx_copy *copy, const trtx_part *parts, size_t count, size_t bytes) {
    if (bytes <= copy->piece_bytes) {
        for (size_t i = 0; i < count; i++) memcpy(parts[i].target, parts[i].source, parts[i].bytes);
        return;
    }
    copy->parts = parts;
    copy->bytes = bytes;
    copy->pieces = (bytes - 1) / copy->piece_bytes + 1;
    atomic_store_explicit(&copy->pending, copy->pieces, memory_order_relaxed);
    atomic_store(&copy->left, copy->pieces);
    wake_helpers(copy);
    while (copy_piece(copy)) {}
    await_pieces(copy);
}

void trtx_copy_open(trtx_copy *copy) { atomic_store(&copy->over, false); }

void trtx_copy_close(trtx_copy *copy) {
    atomic_store(&copy->over, true);
    wake_helpers(copy);
}

static bool stirs(trtx_copy *copy) { return atomic_load(&copy->left) || atomic_load(&copy->over); }

size_t trtx_copy_help(trtx_copy *copy, uint64_t spin_ns) {
    size_t copied = 0;
    uint64_t idle_since = 0;
    while (!atomic_load_explicit(&copy->over, memory_order_relaxed)) {
        if (copy_piece(copy)) {
            copied++;
            idle_since = 0;
            continue;
        }
        uint64_t now = trtx_now_ns();
        if (!idle_since) idle_since = now;
        if (now - idle_since < spin_ns) {
            trtx_pause();
            continue;
        }
        pthread_mutex_lock(&copy->mutex);
        atomic_fetch_add(&copy->sleepers, 1);
        while (!stirs(copy)) pthread_cond_wait(&copy->posted, &copy->mutex);
        atomic_fetch_sub(&copy->sleepers, 1);
        pthread_mutex_unlock(&copy->mutex);
        idle_since = 0;
    }
    return copied;
}
