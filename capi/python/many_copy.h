/* A copy that several threads share: one captain posts it, and copies with whoever helps until all of it is done.
 *
 * No Python here. Nothing is allocated for a copy; without helpers the captain does it all. */
#ifndef TRTX_MANY_COPY_H
#define TRTX_MANY_COPY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct trtx_part {
    char *target;
    const char *source;
    size_t bytes;
} trtx_part;

typedef struct trtx_copy {
    size_t piece_bytes; /* what a thread takes at a time */
    /* What is posted: written by the captain while no piece is taken, read by whoever has taken one. */
    const trtx_part *parts; /* copied as if they were one, end to end */
    size_t bytes, pieces;
    _Atomic size_t left;    /* pieces that nobody has taken */
    _Atomic size_t pending; /* pieces that are not done */
    _Atomic size_t sleepers;
    _Atomic bool waiting; /* the captain sleeps, or is about to */
    _Atomic bool over;    /* helpers go home */
    pthread_mutex_t mutex;
    pthread_cond_t posted, done;
} trtx_copy;

/* False: the system has no more of what a mutex needs. */
bool trtx_copy_init(trtx_copy *copy, size_t piece_bytes);

void trtx_copy_destroy(trtx_copy *copy);

/* Copy the parts, which have so many bytes together; returns when all is done. The captain's alone. */
void trtx_copy_do(trtx_copy *copy, const trtx_part *parts, size_t count, size_t bytes);

/* Helpers are welcome, or go home; those that come later, too. */
void trtx_copy_open(trtx_copy *copy);
void trtx_copy_close(trtx_copy *copy);

/* Copy pieces until it is closed; polls for so long before it sleeps. Returns how many pieces it copied. */
size_t trtx_copy_help(trtx_copy *copy, uint64_t spin_ns);

#endif
