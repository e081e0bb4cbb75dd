/* What the fuzz targets share. A finding is: a crash, what a sanitizer reports, TRTXPY_INTERNAL, a status that is none, an error
 * without a text, a handle that was written by a call that failed, or an object that is still open at the end of a unit.
 *
 * libFuzzer sees the coverage of the C sources. Python's is invisible to it; the texts of errors stand in for it: a text that
 * is new counts as new coverage (numbers and names in it do not). */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "trtxpy.h"

extern trtxpy_context fuzz_context; /* for all units: on the mock, with little memory */
extern const char *fuzz_folder;     /* TRTXPY_FUZZ_MODELS: where make_models.py wrote */

void fuzz_start(void);

/* Every status goes through here: checks it and what the thread's error says. */
trtxpy_status fuzz_checked(trtxpy_status status, const char *call);
#define DO(call) fuzz_checked(call, #call)
/* The same for a status that no last error belongs to: a completion's. */
trtxpy_status fuzz_checked_text(trtxpy_status status, const char *text, const char *what);
_Noreturn void fuzz_finding(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define MUST(condition)                                                                      \
    do {                                                                                     \
        if (!(condition)) fuzz_finding("%s:%d: not true: %s", __FILE__, __LINE__, #condition); \
    } while (0)
/* Nothing but what `before` counted is open. */
void fuzz_nothing_left(size_t before);
size_t fuzz_live(void);

/* Bytes of a unit, taken from the front; zeros when there are none left. */
typedef struct fuzz_input {
    const uint8_t *data;
    size_t size;
} fuzz_input;
uint8_t fuzz_byte(fuzz_input *input);
uint64_t fuzz_number(fuzz_input *input, size_t bytes);
/* 0 to below-1; below 0: 0 */
size_t fuzz_below(fuzz_input *input, size_t below);

/* The last bytes of a model's or plan's unit choose what is done with it. */
enum { FUZZ_CONTROL = 16 };
void fuzz_use_model(const uint8_t *data, size_t size, bool plan);
const char *fuzz_write_file(const uint8_t *data, size_t size); /* a file for this process; its path */

#endif
