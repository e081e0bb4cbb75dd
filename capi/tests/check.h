/* Checks that count, for tests in C. CHECK_DETAIL: what to say beside a number that is wrong; may be defined before. */
#ifndef TRTX_CHECK_H
#define TRTX_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <time.h>

#ifndef CHECK_DETAIL
#define CHECK_DETAIL ""
#endif

static _Atomic int passed, failed_tests, failed_checks;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition);                    \
            failed_checks++;                                                                                           \
        }                                                                                                              \
    } while (0)
#define CHECK_EQ(found, expected)                                                                                      \
    do {                                                                                                               \
        long long found_ = (long long)(found), expected_ = (long long)(expected);                                      \
        if (found_ != expected_) {                                                                                     \
            fprintf(stderr, "%s:%d: %s: %s is %lld, expected %lld (%s)\n", __FILE__, __LINE__, __func__, #found,       \
                    found_, expected_, CHECK_DETAIL);                                                            \
            failed_checks++;                                                                                           \
        }                                                                                                              \
    } while (0)
#define OK(call) CHECK_EQ(call, CUDA_SUCCESS)
#define RUN(test)                                                                                                      \
    do {                                                                                                               \
        int before_ = failed_checks;                                                                                   \
        test();                                                                                                        \
        if (failed_checks == before_) {                                                                                \
            passed++;                                                                                                  \
        } else {                                                                                                       \
            failed_tests++;                                                                                            \
            fprintf(stderr, "FAILED %s\n", #test);                                                                     \
        }                                                                                                              \
    } while (0)

static inline int report(void) {
    printf("%d passed, %d failed\n", passed, failed_tests);
    return failed_tests != 0;
}

static inline uint64_t real_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
