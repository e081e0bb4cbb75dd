/* What many.c and many_work.c know of each other: a ManyRows, and the places that its captain works with. */
#ifndef TRTX_MANY_H
#define TRTX_MANY_H

#include "hot.h"

#include "many_copy.h"

typedef enum told { TOLD_NOTHING, TOLD_TO_STOP, TOLD_TO_ABANDON } told;

typedef struct many_object {
    PyObject_HEAD
    /* from here on zeroed by tp_alloc; written by __init__ alone */
    Py_ssize_t input_count, output_count, held;
    Py_buffer *buffers; /* of the inputs, then of the outputs; `held` of them */
    size_t *row_bytes;
    size_t start, stop, batch, chunks;
    double *queue_s, *gpu_s; /* of each chunk; negative: not done */
    trtx_part *parts;        /* of the copy that is under way; as many as there are inputs, or outputs */
    trtx_copy copy;
    bool copying, made; /* copying: `copy` is there */
    /* the captain's, which others look at */
    _Atomic size_t next, done, batches, padding;
    _Atomic int told;
    /* the captain's; under the GIL while nobody is in run() */
    CUresult status; /* of the first error */
    const char *call;
    /* under the GIL */
    bool running;
    bucket_object *failed; /* whose port makes the exception */
} many_object;

typedef struct graph {
    size_t rows;
    CUgraphExec exec;
    bucket_object *bucket;
    size_t launches;
} graph;

/* A place, and what is in it. */
typedef struct station {
    place_object *place;
    trtx_lane *lane;
    size_t slot, graph_count;
    graph *graphs; /* ascending */
    char **data; /* of the inputs, then of the outputs */
    bool flying, launched;
    size_t row, count;
    uint64_t turn, taken_ns;
    size_t completed, refused, failed; /* refused: not even launched; failed counts these too */
} station;

typedef struct crew {
    many_object *job;
    size_t count;
    station *stations;   /* `count` of them are marked and counted */
    uint64_t turns;
    const station *culprit; /* of the job's first error, if that happened here */
    void *memory[3];
} crew;

/* Launch chunk after chunk until there are no more, or no more are wanted. Without the GIL. */
void trtx_many_work(crew *own, uint64_t spin_ns, uint64_t until_ns);

#endif
