/* The calling thread's last status and its text. */
#ifndef TRTXPY_ERROR_H
#define TRTXPY_ERROR_H

#include "trtxpy.h"

/* Every public function that returns a status begins with this: the thread's error is "" until something fails. */
void trtxpy_begin(void);

/* Record a failure and return `status`. The text says what was found, what was expected and what to do. Cut at 4 KB. */
__attribute__((format(printf, 2, 3))) trtxpy_status trtxpy_fail(trtxpy_status status, const char *format, ...);
/* The same with a text that is there already; NULL: the status's name. */
trtxpy_status trtxpy_fail_text(trtxpy_status status, const char *text);

/* The thread's error put aside, so that what is called meanwhile leaves it as it was. Every keep has its restore. */
typedef struct trtxpy_kept_error {
    trtxpy_status status;
    char *text; /* NULL after success */
} trtxpy_kept_error;

trtxpy_kept_error trtxpy_keep_error(void);
void trtxpy_restore_error(trtxpy_kept_error *kept);

#endif
