/* The data of mock_memory.c: blocks, the tables they live in, and what is remembered of freed ones. */
#ifndef TRTX_MOCK_MEMORY_H
#define TRTX_MOCK_MEMORY_H

#include "mock_internal.h"

enum { RED_ZONE = 256 };

/* Host memory behind a block, between two red zones; freed when the last user is done. */
typedef struct mock_backing {
    uint8_t *raw, *data;
    size_t bytes;
    unsigned users; /* under the memory lock */
} mock_backing;

typedef struct mock_chunk {
    uint64_t address;
    size_t bytes;
    bool pinned;
    int device; /* whose context it goes with */
    bool reserved, retired; /* stream-ordered: not allocated yet, to be freed */
    mock_backing *backing; /* device blocks: NULL until the first touch */
    struct mock_chunk *older, *newer;
    char site[MOCK_SITE], freed_at[MOCK_SITE], label[96];
} mock_chunk;

typedef struct mock_table {
    mock_chunk **blocks; /* by address */
    size_t count, room;
} mock_table;

typedef struct mock_list {
    mock_chunk *newest, *oldest;
    size_t count, bytes;
} mock_list;

typedef struct mock_arena {
    size_t limit, used;
    uint64_t first, next;
    mock_table live;
    mock_list freed;
} mock_arena;

struct mock_memory {
    pthread_mutex_t lock;
    uint64_t base;
    int devices;
    mock_arena *arenas;
    mock_table pinned;
    mock_list quarantine;
    size_t pinned_bytes;
    mock_text damage;
};

#endif
