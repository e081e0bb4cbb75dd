/* Memory that notices misuse: device blocks behind fake addresses, and pinned blocks between guards.
 *
 * Device addresses only grow and are never used twice, so a stale pointer cannot hit a newer block; host memory stands
 * behind a block from the first touch on. Freed pinned blocks stay in a quarantine of bounded size, filled with a pattern.
 * One lock per instance guards all of it and is never held while bytes are copied: whoever copies holds a reference on the
 * block's backing instead. Any thread.
 */
#include "mock_memory.h"

#include <stdio.h>

enum { ALIGNMENT = 256, PAGE = 4096, REMEMBERED = 8192, QUARANTINE_BLOCKS = 512 };
enum { RED_BYTE = 0xA5, DEVICE_POISON = 0xCB, PINNED_POISON = 0xCD, FREED_BYTE = 0xDD };
#define BASE_ADDRESS ((uint64_t)1 << 45)
#define DEVICE_SPAN ((uint64_t)1 << 43)
#define QUARANTINE_BYTES ((size_t)64 << 20)

mock_memory *mock_memory_create(const trtx_mock_options *options, unsigned serial) {
    mock_memory *memory = calloc(1, sizeof *memory);
    mock_arena *arenas = calloc(options->devices > 0 ? (size_t)options->devices : 1, sizeof *arenas);
    if (!memory || !arenas) {
        free(memory);
        free(arenas);
        return NULL;
    }
    pthread_mutex_init(&memory->lock, NULL);
    memory->devices = options->devices;
    memory->arenas = arenas;
    /* the first instance has the addresses of the Python mock; later ones differ in bits that no host address has */
    memory->base = BASE_ADDRESS | (uint64_t)(serial & 0x7fff) << 48;
    for (int i = 0; i < options->devices; i++) {
        arenas[i].limit = options->memory_bytes;
        arenas[i].first = memory->base + (uint64_t)i * DEVICE_SPAN;
        arenas[i].next = arenas[i].first + ALIGNMENT;
    }
    return memory;
}

/* ---- backings ---- */

static mock_backing *backing_create(size_t bytes, size_t alignment, int poison) {
    size_t room = bytes + 2 * RED_ZONE + alignment;
    mock_backing *backing = room > bytes ? malloc(sizeof *backing) : NULL;
    uint8_t *raw = backing ? malloc(room) : NULL;
    if (!raw) {
        free(backing);
        return NULL;
    }
    backing->raw = raw;
    backing->users = 1;
    backing->bytes = bytes;
    backing->data = (uint8_t *)(((uintptr_t)raw + RED_ZONE + alignment - 1) / alignment * alignment);
    memset(backing->data - RED_ZONE, RED_BYTE, RED_ZONE);
    memset(backing->data, poison, bytes);
    memset(backing->data + bytes, RED_BYTE, RED_ZONE);
    return backing;
}

static void backing_release(mock_backing *backing) {
    if (backing && --backing->users == 0) {
        free(backing->raw);
        free(backing);
    }
}

static size_t strange(const uint8_t *bytes, size_t count, uint8_t expected) {
    size_t found = 0;
    for (size_t i = 0; i < count; i++)
        found += bytes[i] != expected;
    return found;
}

static void describe_block(const mock_chunk *block, char *text) {
    snprintf(text, MOCK_DETAIL / 2, "%s block 0x%llx of %zu bytes%s%s%s, allocated at %s",
             block->pinned ? "pinned" : "device", (unsigned long long)block->address, block->bytes,
             block->label[0] ? " (" : "", block->label, block->label[0] ? ")" : "", block->site);
}

static void check_zones(const mock_chunk *block, mock_text *damage) {
    if (!block->backing)
        return;
    char text[MOCK_DETAIL / 2];
    size_t before = strange(block->backing->data - RED_ZONE, RED_ZONE, RED_BYTE);
    size_t after = strange(block->backing->data + block->bytes, RED_ZONE, RED_BYTE);
    if (before || after) {
        describe_block(block, text);
        mock_text_add(damage, "%s: %zu bytes %s it were overwritten", text, before ? before : after,
                      before ? "before" : "after");
    }
}

static void check_quarantined(const mock_chunk *block, mock_text *damage) {
    if (strange(block->backing->data, block->bytes, FREED_BYTE)) {
        char text[MOCK_DETAIL / 2];
        describe_block(block, text);
        mock_text_add(damage, "%s: written to after it was freed at %s", text, block->freed_at);
    }
}

/* ---- sorted tables of blocks ---- */

/* Index of the last block at or below `address`, or -1. */
static long last_below(const mock_table *table, uint64_t address) {
    size_t low = 0, high = table->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table->blocks[middle]->address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return (long)low - 1;
}

static mock_chunk *holder_of(const mock_table *table, uint64_t address) {
    long index = last_below(table, address);
    if (index < 0)
        return NULL;
    mock_chunk *block = table->blocks[index];
    return address - block->address < block->bytes ? block : NULL;
}

static bool table_insert(mock_table *table, mock_chunk *block) {
    if (table->count == table->room) {
        size_t room = table->room ? table->room * 2 : 64;
        mock_chunk **blocks = realloc(table->blocks, room * sizeof *blocks);
        if (!blocks)
            return false;
        table->blocks = blocks;
        table->room = room;
    }
    size_t at = (size_t)(last_below(table, block->address) + 1);
    memmove(table->blocks + at + 1, table->blocks + at, (table->count - at) * sizeof *table->blocks);
    table->blocks[at] = block;
    table->count++;
    return true;
}

/* The block that starts at `address`, taken out of the table, or NULL. */
static mock_chunk *table_take(mock_table *table, uint64_t address) {
    long index = last_below(table, address);
    if (index < 0 || table->blocks[index]->address != address)
        return NULL;
    mock_chunk *block = table->blocks[index];
    memmove(table->blocks + index, table->blocks + index + 1, (table->count - (size_t)index - 1) * sizeof *table->blocks);
    table->count--;
    return block;
}

static void chunk_free(mock_chunk *block) {
    if (block) {
        backing_release(block->backing);
        free(block);
    }
}

static mock_chunk *chunk_create(size_t bytes, bool pinned) {
    mock_chunk *block = calloc(1, sizeof *block);
    if (block) {
        block->bytes = bytes;
        block->pinned = pinned;
        mock_copy_site(block->site);
    }
    return block;
}

/* ---- what was freed: the newest first ---- */

static mock_chunk *find_freed(const mock_list *list, uint64_t address) {
    for (mock_chunk *block = list->newest; block; block = block->older)
        if (address - block->address < block->bytes)
            return block;
    return NULL;
}

static void remember(mock_list *list, mock_chunk *block) {
    if (!block->retired) /* else it is known who freed it, and this is the stream */
        mock_copy_site(block->freed_at);
    block->older = list->newest;
    block->newer = NULL;
    if (list->newest)
        list->newest->newer = block;
    else
        list->oldest = block;
    list->newest = block;
    list->count++;
    list->bytes += block->bytes;
}

static mock_chunk *take_oldest(mock_list *list) {
    mock_chunk *block = list->oldest;
    list->oldest = block->newer;
    if (list->oldest)
        list->oldest->older = NULL;
    else
        list->newest = NULL;
    list->count--;
    list->bytes -= block->bytes;
    return block;
}

static void explain(const mock_table *live, const mock_list *freed, uint64_t address, bool freeing, char *why) {
    const char *verb = freeing ? "free" : "access";
    char text[MOCK_DETAIL / 2];
    const mock_chunk *block = holder_of(live, address);
    if (block) {
        describe_block(block, text);
        snprintf(why, MOCK_DETAIL, "%s of 0x%llx, which is %llu bytes inside %s; pass its start", verb,
                 (unsigned long long)address, (unsigned long long)(address - block->address), text);
    } else if ((block = find_freed(freed, address))) {
        describe_block(block, text);
        snprintf(why, MOCK_DETAIL, "%s: 0x%llx is in %s, freed at %s", freeing ? "double free" : "use after free",
                 (unsigned long long)address, text, block->freed_at);
    } else {
        snprintf(why, MOCK_DETAIL, "%s of 0x%llx, which no allocation holds", verb, (unsigned long long)address);
    }
}

/* The live block that has all of the range, or NULL with the reason. */
static mock_chunk *find_range(const mock_table *live, const mock_list *freed, uint64_t address, size_t bytes, char *why) {
    mock_chunk *block = holder_of(live, address);
    if (!block) {
        explain(live, freed, address, false, why);
        return NULL;
    }
    size_t offset = (size_t)(address - block->address);
    if (bytes > block->bytes - offset) {
        char text[MOCK_DETAIL / 2];
        describe_block(block, text);
        snprintf(why, MOCK_DETAIL, "access to %zu bytes runs %zu bytes beyond %s", bytes, bytes - (block->bytes - offset),
                 text);
        return NULL;
    }
    return block;
}

/* ---- device memory ---- */

static mock_arena *arena_of(mock_memory *memory, CUdeviceptr pointer) {
    int device = mock_device_of(memory, pointer);
    return device < 0 ? NULL : &memory->arenas[device];
}

static size_t padded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

void mock_device_label(mock_memory *memory, CUdeviceptr pointer, const char *label) {
    pthread_mutex_lock(&memory->lock);
    mock_arena *arena = arena_of(memory, pointer);
    mock_chunk *block = arena ? holder_of(&arena->live, pointer) : NULL;
    if (block)
        snprintf(block->label, sizeof block->label, "%s", label);
    pthread_mutex_unlock(&memory->lock);
}

int mock_device_of(const mock_memory *memory, CUdeviceptr pointer) {
    if (pointer < memory->base || pointer - memory->base >= (uint64_t)memory->devices * DEVICE_SPAN)
        return -1;
    return (int)((pointer - memory->base) / DEVICE_SPAN);
}

CUresult mock_device_allocate(mock_memory *memory, int device, size_t bytes, CUdeviceptr *pointer, char *why) {
    if (bytes == 0) {
        snprintf(why, MOCK_DETAIL, "0 bytes were asked for; the smallest block is 1 byte");
        return CUDA_ERROR_INVALID_VALUE;
    }
    mock_chunk *block = chunk_create(bytes, false);
    mock_arena *arena = &memory->arenas[device];
    CUresult code = CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&memory->lock);
    if (!block || bytes > SIZE_MAX - ALIGNMENT || padded(bytes) > arena->limit - arena->used ||
        padded(bytes) + ALIGNMENT > arena->first + DEVICE_SPAN - arena->next) {
        snprintf(why, MOCK_DETAIL, "%zu bytes were asked for, %zu of %zu are free in %zu live blocks; free "
                 "some, or give the mock more memory", bytes,
                 arena->limit - arena->used, arena->limit, arena->live.count);
    } else {
        block->address = arena->next;
        if (table_insert(&arena->live, block)) {
            *pointer = block->address;
            /* the gap to the next block is what makes an overrun land nowhere instead of in a neighbour */
            arena->next += padded(bytes) + ALIGNMENT;
            arena->used += padded(bytes);
            block = NULL;
            code = CUDA_SUCCESS;
        }
    }
    pthread_mutex_unlock(&memory->lock);
    chunk_free(block);
    return code;
}

void mock_device_reserve(mock_memory *memory, CUdeviceptr pointer, bool reserved) {
    pthread_mutex_lock(&memory->lock);
    mock_arena *arena = arena_of(memory, pointer);
    mock_chunk *block = arena ? holder_of(&arena->live, pointer) : NULL;
    if (block) /* else the context ended meanwhile */
        block->reserved = reserved;
    pthread_mutex_unlock(&memory->lock);
}

/* The live block that begins there and whose free is not enqueued yet, or NULL with the reason. Under the lock. */
static mock_chunk *find_start(mock_memory *memory, CUdeviceptr pointer, char *why) {
    mock_arena *arena = arena_of(memory, pointer);
    mock_chunk *block = arena ? holder_of(&arena->live, pointer) : NULL;
    if (block && block->address == pointer && !block->retired)
        return block;
    if (block && block->retired) {
        char text[MOCK_DETAIL / 2];
        describe_block(block, text);
        snprintf(why, MOCK_DETAIL, "double free: 0x%llx is in %s, and a free of it is enqueued at %s",
                 (unsigned long long)pointer, text, block->freed_at);
    } else if (arena) {
        explain(&arena->live, &arena->freed, pointer, true, why);
    } else {
        snprintf(why, MOCK_DETAIL, "free of 0x%llx, which is not device memory", (unsigned long long)pointer);
    }
    return NULL;
}

CUresult mock_device_retire(mock_memory *memory, CUdeviceptr pointer, char *why) {
    pthread_mutex_lock(&memory->lock);
    mock_chunk *block = find_start(memory, pointer, why);
    if (block) {
        block->retired = true;
        mock_copy_site(block->freed_at);
    }
    pthread_mutex_unlock(&memory->lock);
    return block ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static void free_block(mock_memory *memory, mock_chunk *block) {
    mock_arena *arena = arena_of(memory, block->address);
    table_take(&arena->live, block->address);
    check_zones(block, &memory->damage);
    arena->used -= padded(block->bytes);
    backing_release(block->backing); /* whoever copies right now keeps the bytes */
    block->backing = NULL;
    remember(&arena->freed, block);
    if (arena->freed.count > REMEMBERED)
        chunk_free(take_oldest(&arena->freed));
}

void mock_device_reap(mock_memory *memory, CUdeviceptr pointer) {
    pthread_mutex_lock(&memory->lock);
    mock_arena *arena = arena_of(memory, pointer);
    mock_chunk *block = arena ? holder_of(&arena->live, pointer) : NULL;
    if (block) /* else the context ended meanwhile */
        free_block(memory, block);
    pthread_mutex_unlock(&memory->lock);
}

CUresult mock_device_free(mock_memory *memory, CUdeviceptr pointer, char *why) {
    pthread_mutex_lock(&memory->lock);
    mock_chunk *block = find_start(memory, pointer, why);
    if (block)
        free_block(memory, block);
    pthread_mutex_unlock(&memory->lock);
    return block ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* Touched (by a stream) before the block is there, or named (by a call) after the call that frees it. */
static void out_of_order(const mock_chunk *block, bool touched, char *why) {
    char text[MOCK_DETAIL / 2];
    describe_block(block, text);
    if (touched)
        snprintf(why, MOCK_DETAIL, "access to %s before the stream that allocates it got there; wait for an event of it", text);
    else
        snprintf(why, MOCK_DETAIL, "use after free: %s, and a free of it is enqueued at %s", text, block->freed_at);
}

CUresult mock_device_bytes(mock_memory *memory, CUdeviceptr pointer, size_t bytes, mock_bytes *view, char *why) {
    CUresult code = CUDA_ERROR_ILLEGAL_ADDRESS;
    if (view)
        *view = (mock_bytes){0};
    pthread_mutex_lock(&memory->lock);
    mock_arena *arena = arena_of(memory, pointer);
    if (!arena) {
        snprintf(why, MOCK_DETAIL, "0x%llx is not a device pointer of this driver", (unsigned long long)pointer);
    } else {
        mock_chunk *block = find_range(&arena->live, &arena->freed, pointer, bytes, why);
        if (block && (view ? block->reserved : block->retired)) {
            out_of_order(block, view != NULL, why);
        } else if (block && view && !block->backing && !(block->backing = backing_create(block->bytes, 64, DEVICE_POISON))) {
            snprintf(why, MOCK_DETAIL, "the host has no %zu bytes to stand behind a device block", block->bytes);
        } else if (block) {
            if (view) {
                block->backing->users++;
                *view = (mock_bytes){block->backing->data + (pointer - block->address), block->backing};
            }
            code = CUDA_SUCCESS;
        }
    }
    pthread_mutex_unlock(&memory->lock);
    return code;
}

CUresult mock_device_check(mock_memory *memory, CUdeviceptr pointer, size_t bytes, char *why) {
    return bytes ? mock_device_bytes(memory, pointer, bytes, NULL, why) : CUDA_SUCCESS;
}

void mock_bytes_release(mock_memory *memory, mock_bytes *view) {
    if (!view->backing)
        return;
    pthread_mutex_lock(&memory->lock);
    backing_release(view->backing);
    pthread_mutex_unlock(&memory->lock);
    *view = (mock_bytes){0};
}

void mock_device_info(mock_memory *memory, int device, size_t *used, size_t *total) {
    pthread_mutex_lock(&memory->lock);
    *used = memory->arenas[device].used;
    *total = memory->arenas[device].limit;
    pthread_mutex_unlock(&memory->lock);
}

/* ---- pinned memory ---- */

CUresult mock_pinned_allocate(mock_memory *memory, int device, size_t bytes, void **pointer, char *why) {
    if (bytes == 0) {
        snprintf(why, MOCK_DETAIL, "0 bytes were asked for; the smallest block is 1 byte");
        return CUDA_ERROR_INVALID_VALUE;
    }
    bool sane = bytes < SIZE_MAX / 2;
    mock_chunk *block = sane ? chunk_create(bytes, true) : NULL;
    bool kept = false;
    if (block && (block->backing = backing_create(bytes, PAGE, PINNED_POISON))) {
        block->address = (uint64_t)(uintptr_t)block->backing->data;
        block->device = device;
        pthread_mutex_lock(&memory->lock);
        kept = table_insert(&memory->pinned, block);
        if (kept) {
            memory->pinned_bytes += bytes;
            *pointer = block->backing->data;
        }
        pthread_mutex_unlock(&memory->lock);
    }
    if (kept)
        return CUDA_SUCCESS;
    chunk_free(block);
    snprintf(why, MOCK_DETAIL, "%zu bytes of host memory were asked for", bytes);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

static void quarantine(mock_memory *memory, mock_chunk *block) {
    check_zones(block, &memory->damage);
    memset(block->backing->data, FREED_BYTE, block->bytes);
    memory->pinned_bytes -= block->bytes;
    remember(&memory->quarantine, block);
    while (memory->quarantine.count > QUARANTINE_BLOCKS || memory->quarantine.bytes > QUARANTINE_BYTES) {
        mock_chunk *old = take_oldest(&memory->quarantine);
        check_quarantined(old, &memory->damage);
        chunk_free(old);
    }
}

CUresult mock_pinned_free(mock_memory *memory, void *pointer, char *why) {
    uint64_t address = (uint64_t)(uintptr_t)pointer;
    CUresult code = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&memory->lock);
    mock_chunk *block = table_take(&memory->pinned, address);
    if (block) {
        quarantine(memory, block);
        code = CUDA_SUCCESS;
    } else {
        explain(&memory->pinned, &memory->quarantine, address, true, why);
    }
    pthread_mutex_unlock(&memory->lock);
    return code;
}

/* One rule for both: fails for ranges that leave their block or lie in a freed one. */
static CUresult pinned_range(mock_memory *memory, const void *pointer, size_t bytes, mock_chunk **found, char *why) {
    uint64_t address = (uint64_t)(uintptr_t)pointer;
    *found = holder_of(&memory->pinned, address);
    if (!*found && !find_freed(&memory->quarantine, address))
        return CUDA_SUCCESS;
    if (find_range(&memory->pinned, &memory->quarantine, address, bytes, why))
        return CUDA_SUCCESS;
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult mock_pinned_check(mock_memory *memory, const void *pointer, size_t bytes, bool *pinned, char *why) {
    mock_chunk *block;
    pthread_mutex_lock(&memory->lock);
    CUresult code = pinned_range(memory, pointer, bytes, &block, why);
    pthread_mutex_unlock(&memory->lock);
    *pinned = block != NULL;
    return code;
}

CUresult mock_pinned_bytes(mock_memory *memory, const void *pointer, size_t bytes, mock_bytes *view, char *why) {
    mock_chunk *block;
    *view = (mock_bytes){0};
    pthread_mutex_lock(&memory->lock);
    CUresult code = pinned_range(memory, pointer, bytes, &block, why);
    if (code == CUDA_SUCCESS && !block) {
        snprintf(why, MOCK_DETAIL, "the pinned memory at %p was freed before the copy ran", (const void *)pointer);
        code = CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    if (code == CUDA_SUCCESS) {
        block->backing->users++;
        *view = (mock_bytes){block->backing->data + ((uintptr_t)pointer - (uintptr_t)block->address), block->backing};
    }
    pthread_mutex_unlock(&memory->lock);
    return code;
}

/* ---- ends and reports ---- */

static void list_blocks(const mock_table *table, mock_text *text) {
    char line[MOCK_DETAIL / 2];
    for (size_t i = 0; text && i < table->count; i++) {
        describe_block(table->blocks[i], line);
        mock_text_add(text, "%s", line);
    }
}

static void list_pinned(const mock_memory *memory, int device, mock_text *text) {
    for (size_t i = 0; text && i < memory->pinned.count; i++)
        if (memory->pinned.blocks[i]->device == device)
            list_blocks(&(mock_table){.blocks = &memory->pinned.blocks[i], .count = 1}, text);
}

void mock_device_reset(mock_memory *memory, int device, mock_text *lost) {
    mock_arena *arena = &memory->arenas[device];
    pthread_mutex_lock(&memory->lock);
    list_blocks(&arena->live, lost);
    for (size_t i = 0; i < arena->live.count; i++) {
        check_zones(arena->live.blocks[i], &memory->damage);
        chunk_free(arena->live.blocks[i]);
    }
    arena->live.count = 0;
    arena->used = 0;
    list_pinned(memory, device, lost);
    size_t kept = 0;
    for (size_t i = 0; i < memory->pinned.count; i++) {
        mock_chunk *block = memory->pinned.blocks[i];
        if (block->device == device)
            quarantine(memory, block);
        else
            memory->pinned.blocks[kept++] = block;
    }
    memory->pinned.count = kept;
    pthread_mutex_unlock(&memory->lock);
}

void mock_memory_leaks(mock_memory *memory, int device, mock_text *leaks) {
    pthread_mutex_lock(&memory->lock);
    list_blocks(&memory->arenas[device].live, leaks);
    list_pinned(memory, device, leaks);
    pthread_mutex_unlock(&memory->lock);
}

void mock_memory_damage(mock_memory *memory, mock_text *damage) {
    pthread_mutex_lock(&memory->lock);
    if (memory->damage.length) {
        mock_text_add(damage, "%.*s", (int)memory->damage.length - 1, memory->damage.text);
        damage->lines += memory->damage.lines - 1;
    }
    for (int i = 0; i < memory->devices; i++)
        for (size_t j = 0; j < memory->arenas[i].live.count; j++)
            check_zones(memory->arenas[i].live.blocks[j], damage);
    for (size_t i = 0; i < memory->pinned.count; i++)
        check_zones(memory->pinned.blocks[i], damage);
    for (const mock_chunk *block = memory->quarantine.newest; block; block = block->older) {
        check_zones(block, damage);
        check_quarantined(block, damage);
    }
    pthread_mutex_unlock(&memory->lock);
}

void mock_memory_usage(mock_memory *memory, trtx_mock_usage *usage) {
    pthread_mutex_lock(&memory->lock);
    for (int i = 0; i < memory->devices; i++) {
        usage->device_bytes += memory->arenas[i].used;
        usage->device_blocks += memory->arenas[i].live.count;
    }
    usage->pinned_bytes = memory->pinned_bytes;
    usage->pinned_blocks = memory->pinned.count;
    pthread_mutex_unlock(&memory->lock);
}

static void free_table(mock_table *table) {
    for (size_t i = 0; i < table->count; i++)
        chunk_free(table->blocks[i]);
    free(table->blocks);
}

static void free_list(mock_list *list) {
    while (list->count)
        chunk_free(take_oldest(list));
}

void mock_memory_destroy(mock_memory *memory) {
    if (!memory)
        return;
    for (int i = 0; i < memory->devices; i++) {
        free_table(&memory->arenas[i].live);
        free_list(&memory->arenas[i].freed);
    }
    free_table(&memory->pinned);
    free_list(&memory->quarantine);
    mock_text_free(&memory->damage);
    pthread_mutex_destroy(&memory->lock);
    free(memory->arenas);
    free(memory);
}
