#define _GNU_SOURCE
#include "fuzz.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

trtxpy_context fuzz_context;
const char *fuzz_folder;

__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t texts_seen[4096];

void fuzz_finding(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "FINDING: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    abort();
}

/* What an error says without the numbers and the names that it quotes: otherwise every unit would be new. */
static void note_text(trtxpy_status status, const char *text) {
    uint32_t hash = 2166136261u ^ (uint32_t)status;
    bool quoted = false;
    for (int kept = 0; *text && kept < 100; text++) {
        if (*text == '\'') quoted = !quoted;
        bool letter = (*text | 32) >= 'a' && (*text | 32) <= 'z';
        if (quoted || !letter) continue;
        hash = (hash ^ (uint8_t)*text) * 16777619u;
        kept++;
    }
    texts_seen[hash % sizeof texts_seen] = 1;
}

trtxpy_status fuzz_checked_text(trtxpy_status status, const char *text, const char *what) {
    if (status < TRTXPY_OK || status > TRTXPY_INTERNAL) fuzz_finding("%s: status %d", what, (int)status);
    if (status == TRTXPY_INTERNAL) fuzz_finding("%s: TRTXPY_INTERNAL: %s", what, text);
    if (status == TRTXPY_CLOSED || status == TRTXPY_FORKED) fuzz_finding("%s: %s: %s", what, trtxpy_status_name(status), text);
    if (status == TRTXPY_OK && text && *text) fuzz_finding("%s: succeeded, and the error says: %s", what, text);
    if (status != TRTXPY_OK && (!text || !*text)) fuzz_finding("%s: %s without a text", what, trtxpy_status_name(status));
    if (status != TRTXPY_OK) note_text(status, text);
    return status;
}

trtxpy_status fuzz_checked(trtxpy_status status, const char *call) {
    if (getenv("TRTXPY_FUZZ_TRACE")) fprintf(stderr, "%s: %s: %s\n", call, trtxpy_status_name(status), trtxpy_last_error());
    if (status != trtxpy_last_status()) fuzz_finding("%s: returned %d, and the last status is %d", call, (int)status, (int)trtxpy_last_status());
    return fuzz_checked_text(status, trtxpy_last_error(), call);
}

void fuzz_start(void) {
    if (fuzz_context) return;
    fuzz_folder = getenv("TRTXPY_FUZZ_MODELS");
    if (!fuzz_folder) fuzz_folder = ".";
    trtxpy_context_options options = TRTXPY_CONTEXT_OPTIONS_INIT;
    options.backend = "mock";
    options.max_device_bytes = 32 << 20;
    options.completion = TRTXPY_EFFICIENT;
    options.max_cached_models = 3;
    if (trtxpy_context_create(&options, &fuzz_context) != TRTXPY_OK) {
        fprintf(stderr, "no context: %s\n", trtxpy_last_error());
        exit(2);
    }
}

size_t fuzz_live(void) {
    size_t live = 0;
    DO(trtxpy_live_objects(&live));
    return live;
}

void fuzz_nothing_left(size_t before) {
    size_t live = fuzz_live();
    if (live != before) fuzz_finding("%zu objects are open; %zu were", live, before);
}

uint8_t fuzz_byte(fuzz_input *input) {
    if (!input->size) return 0;
    input->size--;
    return *input->data++;
}

uint64_t fuzz_number(fuzz_input *input, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++) value |= (uint64_t)fuzz_byte(input) << 8 * i;
    return value;
}

size_t fuzz_below(fuzz_input *input, size_t below) {
    return below ? fuzz_byte(input) % below : 0;
}

static char path[64];

static void remove_file(void) {
    unlink(path);
}

const char *fuzz_write_file(const uint8_t *data, size_t size) {
    if (!*path) {
        snprintf(path, sizeof path, "/tmp/trtxpy_fuzz_%ld", (long)getpid());
        atexit(remove_file);
    }
    FILE *file = fopen(path, "wb");
    MUST(file);
    MUST(fwrite(data, 1, size, file) == size);
    fclose(file);
    return path;
}
