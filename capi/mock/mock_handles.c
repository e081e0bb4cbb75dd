/* The table of handles: all instances' handles, looked up by value and never dereferenced.
 *
 * A handle is 0x5E | kind | generation | index. That is no canonical address, so code that mistakes it for a pointer stops
 * at once. Blocks of slots belong to the process; an instance borrows whole blocks and gives them back when it ends, so a
 * slot has one owner, whose lock guards all writes. Looking up needs no lock and may happen on any thread.
 */
#include "mock_internal.h"

enum { INDEX_BITS = 20, GENERATION_BITS = 32 };

static _Atomic(mock_block *) directory[MOCK_BLOCKS];
static pthread_mutex_t handle_lock = PTHREAD_MUTEX_INITIALIZER;
static mock_block *free_blocks;
static unsigned blocks_made;

static uint64_t make_tag(mock_kind kind, const mock_slot *slot) {
    return (uint64_t)0x5E << 56 | (uint64_t)kind << 52 | (uint64_t)slot->generation << INDEX_BITS | slot->index;
}

static mock_block *borrow_block(void) {
    pthread_mutex_lock(&handle_lock);
    mock_block *block = free_blocks;
    if (block) {
        free_blocks = block->next;
    } else if (blocks_made < MOCK_BLOCKS && (block = calloc(1, sizeof *block))) {
        for (unsigned i = 0; i < MOCK_BLOCK_SLOTS; i++)
            block->slots[i].index = blocks_made * MOCK_BLOCK_SLOTS + i;
        atomic_store_explicit(&directory[blocks_made], block, memory_order_release);
        blocks_made++;
    }
    pthread_mutex_unlock(&handle_lock);
    return block;
}

mock_slot *mock_slot_take(trtx_mock *mock, mock_kind kind, void *object) {
    if (!mock->free_slots) {
        mock_block *block = borrow_block();
        if (!block)
            return NULL;
        block->next = mock->blocks;
        mock->blocks = block;
        for (unsigned i = MOCK_BLOCK_SLOTS; i-- > 0;) {
            atomic_store(&block->slots[i].mock, mock);
            block->slots[i].next_free = mock->free_slots;
            mock->free_slots = &block->slots[i];
        }
    }
    mock_slot *slot = mock->free_slots;
    mock->free_slots = slot->next_free;
    slot->generation++;
    atomic_store(&slot->object, object);
    atomic_store(&slot->state, 0);
    atomic_store(&slot->time_ns, 0);
    atomic_store(&slot->place, NULL);
    /* numbers only grow over a slot's life: a recording of a destroyed event may still arrive here, and must change nothing */
    atomic_store(&slot->done, atomic_load(&slot->latest));
    atomic_store(&slot->tag, make_tag(kind, slot));
    return slot;
}

void mock_slot_close(mock_slot *slot) { atomic_store(&slot->tag, 0); }

void mock_slot_recycle(trtx_mock *mock, mock_slot *slot) {
    slot->next_free = mock->free_slots;
    mock->free_slots = slot;
}

mock_slot *mock_slot_find(const void *handle, mock_kind kind) {
    uint64_t value = (uint64_t)(uintptr_t)handle;
    if (value >> 52 != ((uint64_t)0x5E << 4 | (uint64_t)kind))
        return NULL;
    unsigned index = (unsigned)(value & ((1u << INDEX_BITS) - 1));
    mock_block *block = atomic_load_explicit(&directory[index / MOCK_BLOCK_SLOTS], memory_order_acquire);
    if (!block)
        return NULL;
    mock_slot *slot = &block->slots[index % MOCK_BLOCK_SLOTS];
    return atomic_load_explicit(&slot->tag, memory_order_acquire) == value ? slot : NULL;
}

void mock_blocks_give_back(trtx_mock *mock) {
    pthread_mutex_lock(&handle_lock);
    while (mock->blocks) {
        mock_block *block = mock->blocks;
        mock->blocks = block->next;
        for (unsigned i = 0; i < MOCK_BLOCK_SLOTS; i++) {
            atomic_store(&block->slots[i].tag, 0);
            atomic_store(&block->slots[i].mock, NULL);
            atomic_store(&block->slots[i].object, NULL);
        }
        block->next = free_blocks;
        free_blocks = block;
    }
    mock->free_slots = NULL;
    pthread_mutex_unlock(&handle_lock);
}
