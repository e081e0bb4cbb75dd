/* What rows.c and seat.c know of each other: the short way into a batch.
 *
 * RowGate: of one batcher and one shape of rows; open while a batch takes rows this way. Load: what came through the gate
 * into one batch. Seat: one request of it, which is awaited as an asyncio future is, and by one task. A seat's rows are
 * copied in when it is made, or its caller fills them: then the load waits for that.
 *
 * The GIL protects everything. A Load refers to its Seats without holding them, and a Seat holds its Load until it has ended:
 * a request that nobody waits for any more takes itself out, wherever it is dropped.
 */
#ifndef TRTX_ROWS_H
#define TRTX_ROWS_H

#include "hot.h"

typedef struct load_object load_object;

typedef enum seat_state { SEAT_WAITING, SEAT_DONE, SEAT_FAILED, SEAT_CANCELLED } seat_state;

typedef struct seat_object {
    PyObject_HEAD
    load_object *load; /* NULL once it has ended */
    PyObject *gate;
    size_t index;
    Py_ssize_t offset, rows;
    seat_state state;
    bool blocking; /* asyncio: this is what the task waits for now */
    PyObject *filler; /* not NULL: its caller writes the rows, and this is the caller's object */
    PyObject *outcome;
    PyObject *callback, *context; /* of the task that waits */
} seat_object;

typedef struct gate_object {
    PyObject_HEAD
    Py_ssize_t input_count, output_count;
    PyObject *input_names, *output_names;
    tensor_spec *rows; /* of one row of each input */
    Py_ssize_t *row_bytes, total_bytes;
    PyObject *loop, *call_soon, *cancelled;
    Py_ssize_t max_bytes;
    load_object *load; /* that takes rows; NULL: shut. borrowed: it shuts the gate when it goes */
} gate_object;

struct load_object {
    PyObject_HEAD
    gate_object *gate;
    PyObject *views; /* keeps the memory */
    char **data;     /* of each input, row 0 */
    Py_ssize_t start, stop, capacity, live;
    size_t count, wanted, room, filling;
    seat_object **seats; /* borrowed; NULL where one has ended */
    double *arrivals;
};

extern PyTypeObject trtx_seat_type;

/* A seat behind those that are there, for rows that are within the load's capacity; there is room. NULL: no memory. */
seat_object *trtx_seat_new(gate_object *gate, load_object *load, Py_ssize_t rows, double now);
/* It ends; its task is woken. Does nothing to one that has ended. */
void trtx_seat_end(seat_object *seat, seat_state state, PyObject *outcome);
/* Its rows, of each input's or output's array: a slice that is to be released. */
PyObject *trtx_seat_slice(const seat_object *seat);
int trtx_seat_register(void);

#endif
