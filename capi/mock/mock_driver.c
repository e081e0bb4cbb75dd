/* Instances: making and ending them, the end of a context, what they report, the table of functions.
 *
 * An instance owns everything below it. trtx_mock_destroy may be called once no other thread uses the instance; it lets
 * pending work finish, joins all stream threads and frees the rest, whatever was left open.
 */
#include "mock_internal.h"

#include <stdio.h>

trtx_mock *trtx_mock_create(const trtx_mock_options *options) {
    static _Atomic unsigned serials;
    trtx_mock *mock = calloc(1, sizeof *mock);
    if (!mock)
        return NULL;
    mock->options = (trtx_mock_options){sizeof mock->options, (size_t)4 << 30, 1, 8, 9, 0, 0};
    if (options)
        memcpy(&mock->options, options,
               options->struct_size < sizeof mock->options ? options->struct_size : sizeof mock->options);
    if (mock->options.devices < 0 || mock->options.devices > 8)
        mock->options.devices = mock->options.devices < 0 ? 0 : 8; /* the address range holds eight */
    mock->serial = atomic_fetch_add(&serials, 1);
    mock->device_count = mock->options.devices;
    mock->devices = calloc(mock->device_count ? (size_t)mock->device_count : 1, sizeof *mock->devices);
    mock->memory = mock_memory_create(&mock->options, mock->serial);
    mock->faults = mock_faults_create();
    mock->slot = mock_slot_take(mock, KIND_MOCK, mock);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
#ifdef __GLIBC__
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP); /* held for less time than a sleep takes */
#endif
    pthread_mutex_init(&mock->lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
    if (mock->options.virtual_time)
        mock->time = trtx_mock_time_create(0);
    bool whole = (mock->time || !mock->options.virtual_time) && mock->devices && mock->memory && mock->faults && mock->slot;
    for (int i = 0; whole && i < mock->device_count; i++) {
        mock_device *device = &mock->devices[i];
        device->mock = mock;
        device->ordinal = i;
        device->slot = mock_slot_take(mock, KIND_CONTEXT, device);
        whole = device->slot != NULL;
    }
    if (!whole) {
        mock_blocks_give_back(mock);
        mock_memory_destroy(mock->memory);
        mock_faults_destroy(mock->faults);
        trtx_mock_time_release(mock->time);
        pthread_mutex_destroy(&mock->lock);
        free(mock->devices);
        free(mock);
        return NULL;
    }
    return mock;
}

/* ---- what is open, by walking the slots ---- */

typedef struct open_object {
    const char *what, *site;
    mock_device *device;
} open_object;

/* What lives in a slot, if it is something that an owner must close. The NULL stream is nobody's. */
static bool open_in(const mock_slot *slot, open_object *found) {
    uint64_t tag = atomic_load(&slot->tag);
    void *object = atomic_load(&slot->object);
    switch (tag ? (int)(tag >> 52 & 15) : 0) {
    case KIND_STREAM:
        *found = (open_object){"stream", ((mock_queue *)object)->site, ((mock_queue *)object)->device};
        return !((mock_queue *)object)->null_stream;
    case KIND_EVENT:
        *found = (open_object){"event", ((mock_event *)object)->site, ((mock_event *)object)->device};
        return true;
    case KIND_GRAPH:
        *found = (open_object){"graph", ((mock_graph *)object)->site, ((mock_graph *)object)->device};
        return true;
    case KIND_EXEC:
        *found = (open_object){"executable graph", ((mock_exec *)object)->site, ((mock_exec *)object)->device};
        return true;
    default:
        return false;
    }
}

static void list_open(trtx_mock *mock, const mock_device *device, mock_text *text) {
    open_object found;
    for (mock_block *block = mock->blocks; block; block = block->next)
        for (int i = 0; i < MOCK_BLOCK_SLOTS; i++)
            if (open_in(&block->slots[i], &found) && found.device == device)
                mock_text_add(text, "%s %p on device %d, created at %s", found.what, mock_handle(&block->slots[i]),
                              device->ordinal, found.site);
}

static void close_open(trtx_mock *mock, mock_device *device, mock_trash *trash) {
    open_object found;
    for (mock_block *block = mock->blocks; block; block = block->next) {
        for (int i = 0; i < MOCK_BLOCK_SLOTS; i++) {
            mock_slot *slot = &block->slots[i];
            if (!open_in(slot, &found) || found.device != device)
                continue;
            void *object = atomic_load(&slot->object);
            switch ((int)(atomic_load(&slot->tag) >> 52 & 15)) {
            case KIND_STREAM:
                mock_capture_abandon(object, trash);
                mock_queue_close(object);
                mock->streams--;
                break;
            case KIND_EVENT:
                mock_event_drop(mock, object);
                break;
            case KIND_GRAPH:
                mock_graph_drop(mock, object, trash);
                break;
            default:
                mock_exec_drop(mock, object, trash);
                break;
            }
        }
    }
}

void mock_device_end(mock_device *device, mock_text *lost) {
    trtx_mock *mock = device->mock;
    mock_trash trash = {0};
    mock_text found = {0};
    mock_lock(mock);
    list_open(mock, device, &found);
    close_open(mock, device, &trash);
    if (device->null_stream)
        mock_queue_close(device->null_stream);
    device->null_stream = NULL;
    mock_queues_reap(device, true);
    mock_device_reset(mock->memory, device->ordinal, &found);
    /* a fault keeps its owner from closing anything, so nothing is held against it */
    if (lost && found.length && atomic_load(&device->fault) == CUDA_SUCCESS) {
        char *line = found.text;
        for (char *end; (end = strchr(line, '\n')); line = end + 1)
            mock_text_add(lost, "%.*s (still there when its context ended)", (int)(end - line), line);
    }
    mock_unlock(mock);
    mock_text_free(&found);
    mock_trash_empty(mock, &trash);
}

void trtx_mock_destroy(trtx_mock *mock) {
    if (!mock)
        return;
    for (int i = 0; i < mock->device_count; i++) {
        atomic_store(&mock->devices[i].retained, 0);
        mock_device_end(&mock->devices[i], NULL);
    }
    while (mock->free_operations) {
        mock_operation *operation = mock->free_operations;
        mock->free_operations = operation->next;
        free(operation);
    }
    mock_blocks_give_back(mock);
    mock_memory_destroy(mock->memory);
    mock_faults_destroy(mock->faults);
    mock_text_free(&mock->lost);
    mock_text_free(&mock->damage);
    trtx_mock_time_release(mock->time);
    pthread_mutex_destroy(&mock->lock);
    free(mock->devices);
    free(mock);
}

void trtx_mock_close(trtx_mock *mock) {
    mock_forget_contexts(mock);
    mock_lock(mock);
    for (int i = 0; i < mock->device_count; i++) {
        for (mock_queue *queue = mock->devices[i].queues; queue; queue = queue->next) {
            queue->stopping = true;
            pthread_cond_broadcast(&queue->work);
        }
    }
    mock_unlock(mock);
}

int trtx_mock_is_busy(trtx_mock *mock) {
    bool busy = false;
    mock_lock(mock);
    for (int i = 0; i < mock->device_count; i++)
        for (mock_queue *queue = mock->devices[i].queues; queue; queue = queue->next)
            busy = busy || !mock_queue_idle(queue);
    mock_unlock(mock);
    return busy;
}

/* ---- reports ---- */

void mock_text_add(mock_text *text, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int bytes = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    size_t needed = text->length + (size_t)bytes + 2;
    if (needed > text->room) {
        char *grown = realloc(text->text, needed * 2);
        if (!grown)
            return;
        text->text = grown;
        text->room = needed * 2;
    }
    va_start(arguments, format);
    vsnprintf(text->text + text->length, (size_t)bytes + 1, format, arguments);
    va_end(arguments);
    text->length += (size_t)bytes;
    text->text[text->length++] = '\n';
    text->text[text->length] = 0;
    text->lines++;
}

void mock_text_free(mock_text *text) {
    free(text->text);
    *text = (mock_text){0};
}

static void find_leaks(trtx_mock *mock, mock_text *found) {
    mock_lock(mock);
    if (mock->lost.length)
        mock_text_add(found, "%.*s", (int)mock->lost.length - 1, mock->lost.text);
    for (int i = 0; i < mock->device_count; i++) {
        if (atomic_load(&mock->devices[i].fault) == CUDA_SUCCESS) {
            list_open(mock, &mock->devices[i], found);
            mock_memory_leaks(mock->memory, i, found);
        }
    }
    mock_unlock(mock);
}

static void find_damage(trtx_mock *mock, mock_text *found) {
    mock_lock(mock);
    if (mock->damage.length) {
        mock_text_add(found, "%.*s", (int)mock->damage.length - 1, mock->damage.text);
        found->lines += mock->damage.lines - 1;
    }
    mock_unlock(mock);
    mock_memory_damage(mock->memory, found);
}

static size_t give_text(mock_text *found, char *text, size_t length) {
    size_t needed = found->length;
    if (text && length)
        snprintf(text, length, "%s", found->text ? found->text : "");
    mock_text_free(found);
    return needed;
}

size_t trtx_mock_leaks(trtx_mock *mock, char *text, size_t length) {
    mock_text found = {0};
    find_leaks(mock, &found);
    return give_text(&found, text, length);
}

size_t trtx_mock_damage(trtx_mock *mock, char *text, size_t length) {
    mock_text found = {0};
    find_damage(mock, &found);
    return give_text(&found, text, length);
}

size_t trtx_mock_describe(trtx_mock *mock, char *text, size_t length) {
    mock_text found = {0};
    find_leaks(mock, &found);
    find_damage(mock, &found);
    return give_text(&found, text, length);
}

void trtx_mock_blame(trtx_mock *mock, const char *text) {
    mock_lock(mock);
    mock_text_add(&mock->damage, "%s", text);
    mock_unlock(mock);
}

void trtx_mock_get_usage(trtx_mock *mock, trtx_mock_usage *usage) {
    mock_text damage = {0};
    *usage = (trtx_mock_usage){0};
    find_damage(mock, &damage);
    usage->damage = damage.lines;
    mock_text_free(&damage);
    mock_memory_usage(mock->memory, usage);
    mock_lock(mock);
    usage->streams = mock->streams;
    usage->events = mock->events;
    usage->graphs = mock->graphs;
    usage->execs = mock->execs;
    for (int i = 0; i < mock->device_count; i++)
        usage->retained_contexts += atomic_load(&mock->devices[i].retained) > 0;
    mock_unlock(mock);
}

/* ---- the table ---- */

const trtx_cuda_api *trtx_mock_api(void) {
    static const trtx_cuda_api table = {
#define MOCK_ENTRY(name, symbol, parameters) .name = mock_##name,
        TRTX_CUDA_FUNCTIONS(MOCK_ENTRY)
#undef MOCK_ENTRY
    };
    return &table;
}

static const struct {
    CUresult code;
    const char *name, *text;
} results[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "the device is busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {220, "CUDA_ERROR_NVLINK_UNCORRECTABLE", "uncorrectable NVLink error"},
    {226, "CUDA_ERROR_CONTAINED", "invalid access of peer GPU memory over nvlink or a hardware error"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {710, "CUDA_ERROR_ASSERT", "device-side assert triggered"},
    {714, "CUDA_ERROR_HARDWARE_STACK_ERROR", "hardware stack error"},
    {715, "CUDA_ERROR_ILLEGAL_INSTRUCTION", "an illegal instruction was encountered"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {717, "CUDA_ERROR_INVALID_ADDRESS_SPACE", "operation not supported on global/shared address space"},
    {718, "CUDA_ERROR_INVALID_PC", "invalid program counter"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {721, "CUDA_ERROR_TENSOR_MEMORY_LEAK", "tensor memory not completely freed"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {810, "CUDA_ERROR_MPS_CLIENT_TERMINATED", "the MPS client was terminated by the server"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {902, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
    {911, "CUDA_ERROR_EXTERNAL_DEVICE", "an async error occurred in a device outside of CUDA"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static CUresult look_up(CUresult code, const char **to, bool name) {
    if (!to)
        return CUDA_ERROR_INVALID_VALUE;
    *to = NULL;
    for (size_t i = 0; i < sizeof results / sizeof results[0]; i++)
        if (results[i].code == code)
            *to = name ? results[i].name : results[i].text;
    return *to ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult mock_cuGetErrorName(CUresult error, const char **name) { return look_up(error, name, true); }

CUresult mock_cuGetErrorString(CUresult error, const char **text) { return look_up(error, text, false); }
