/* Plans: trtxpy_graph_from_plan, trtxpy_graph_from_file, and plans for trtxpy_run and trtxpy_run_zeroed.
 *
 * A plan is a container with a SHA-256 (trtx_py/_plan.py) around the mock's plan with another one (mock_backend/_plan.py). Blind
 * mutations would only ever find the checksums, so most mutations change the container's header, which is msgpack, and
 * seal it again. What is in the mock's plan stays: TensorRT's own plans are not ours to read. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

/* ---- SHA-256 ---- */

static uint32_t rotated(uint32_t x, unsigned n) {
    return x >> n | x << (32 - n);
}

static void digest_block(uint32_t state[8], const uint8_t *block) {
    static uint32_t k[64];
    if (!k[0]) /* the fractions of the cube roots of the primes */
        for (uint32_t prime = 2, n = 0; n < 64; prime++) {
            bool is_prime = true;
            for (uint32_t d = 2; d * d <= prime; d++) is_prime = is_prime && prime % d;
            if (!is_prime) continue;
            /* floor(cbrt(prime) * 2^32) by bisection in integers: c^3 <= prime * 2^96 */
            unsigned long long low = 0, high = 7ull << 32;
            while (high - low > 1) {
                unsigned long long mid = low + (high - low) / 2;
                __extension__ typedef unsigned __int128 wide;
                wide square = (wide)mid * mid; /* below 2^70: the cube in two parts */
                wide top = (square >> 32) * mid + (((square & 0xFFFFFFFFu) * mid) >> 32);
                if (top >= (wide)prime << 64) high = mid;
                else low = mid;
            }
            k[n++] = (uint32_t)low;
        }
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
               (rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t a = s[7] + (rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
        uint32_t b = (rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += a;
        s[0] = a + b;
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
}

/* Of `first` and then `second`. */
static void digest(const uint8_t *first, size_t first_size, const uint8_t *second, size_t second_size, uint8_t out[32]) {
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block[64];
    size_t filled = 0, total = first_size + second_size;
    for (size_t i = 0; i < total; i++) {
        block[filled++] = i < first_size ? first[i] : second[i - first_size];
        if (filled == 64) digest_block(state, block), filled = 0;
    }
    block[filled++] = 0x80;
    if (filled > 56) {
        memset(block + filled, 0, 64 - filled);
        digest_block(state, block);
        filled = 0;
    }
    memset(block + filled, 0, 56 - filled);
    for (int i = 0; i < 8; i++) block[56 + i] = (uint8_t)((uint64_t)total * 8 >> (56 - 8 * i));
    digest_block(state, block);
    for (int i = 0; i < 32; i++) out[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

/* ---- plans ---- */

enum { OUTER = 56, INNER = 64, MOST = 4096 };

static uint64_t read_little(const uint8_t *from, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++) value |= (uint64_t)from[i] << 8 * i;
    return value;
}

static void write_little(uint8_t *to, uint64_t value, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) to[i] = (uint8_t)(value >> 8 * i);
}

typedef struct parts {
    uint8_t outer[OUTER], inner[INNER], part[3][MOST]; /* the container's header, the mock's header, the model */
    size_t sizes[3];
    uint8_t control[FUZZ_CONTROL];
} parts;

static bool take_apart(const uint8_t *data, size_t size, parts *p) {
    if (size < OUTER + INNER + FUZZ_CONTROL || size > MOST || memcmp(data, "TRTXPLAN", 8) != 0) return false;
    memcpy(p->control, data + size - FUZZ_CONTROL, FUZZ_CONTROL);
    size -= FUZZ_CONTROL;
    size_t header = (size_t)read_little(data + 12, 4);
    if (header > size - OUTER - INNER) return false;
    const uint8_t *mock = data + OUTER + header;
    size_t rest = size - OUTER - header - INNER, text = (size_t)read_little(mock + 28, 4);
    if (memcmp(mock, "mtrt", 4) != 0 || text > rest) return false;
    memcpy(p->outer, data, OUTER);
    memcpy(p->inner, mock, INNER);
    memcpy(p->part[0], data + OUTER, p->sizes[0] = header);
    memcpy(p->part[1], mock + INNER, p->sizes[1] = text);
    memcpy(p->part[2], mock + INNER + text, p->sizes[2] = rest - text);
    return true;
}

static size_t put_together(parts *p, uint8_t *data, size_t most) {
    size_t body = p->sizes[1] + p->sizes[2], mock = INNER + body, total = OUTER + p->sizes[0] + mock + FUZZ_CONTROL;
    if (total > most) return 0;
    write_little(p->inner + 16, mock, 8);
    write_little(p->inner + 28, p->sizes[1], 4);
    digest(p->part[1], p->sizes[1], p->part[2], p->sizes[2], p->inner + 32);
    write_little(p->outer + 12, p->sizes[0], 4);
    write_little(p->outer + 16, mock, 8);
    uint8_t *at = data + OUTER;
    memcpy(at, p->part[0], p->sizes[0]);
    at += p->sizes[0];
    memcpy(at, p->inner, INNER);
    memcpy(at + INNER, p->part[1], p->sizes[1]);
    memcpy(at + INNER + p->sizes[1], p->part[2], p->sizes[2]);
    digest(p->outer, 24, data + OUTER, p->sizes[0] + mock, p->outer + 24);
    memcpy(data, p->outer, OUTER);
    memcpy(data + total - FUZZ_CONTROL, p->control, FUZZ_CONTROL);
    return total;
}

/* The end of the msgpack object at `at`, and where it and what it contains begin; `size` where it is none. */
static size_t walk(const uint8_t *text, size_t size, size_t at, size_t *starts, size_t room, size_t *count) {
    if (at >= size) return size;
    if (*count < room) starts[(*count)++] = at;
    uint8_t tag = text[at++];
    size_t inside = 0, bytes = 0;
    static const uint8_t fixed[] = {1, 2, 4, 8, 1, 2, 4, 8}; /* 0xCC to 0xD3: integers */
    if ((tag & 0xF0) == 0x80) inside = 2 * (tag & 15u);
    else if ((tag & 0xF0) == 0x90) inside = tag & 15u;
    else if ((tag & 0xE0) == 0xA0) bytes = tag & 31u;
    else if (tag == 0xCA || tag == 0xCB) bytes = tag == 0xCA ? 4 : 8;
    else if (tag >= 0xCC && tag <= 0xD3) bytes = fixed[tag - 0xCC];
    else if ((tag == 0xD9 || tag == 0xC4) && at < size) bytes = 1u + text[at];
    else if ((tag == 0xDA || tag == 0xC5) && at + 1 < size) bytes = 2u + (size_t)text[at] * 256 + text[at + 1];
    else if ((tag == 0xDC || tag == 0xDE) && at + 1 < size) {
        inside = ((size_t)text[at] * 256 + text[at + 1]) * (tag == 0xDE ? 2 : 1);
        bytes = 2;
    }
    at = bytes > size - at ? size : at + bytes;
    while (inside-- && at < size) at = walk(text, size, at, starts, room, count);
    return at;
}

/* Another value for one object of the container's header: a change of bytes seldom leaves msgpack. */
static void change_value(uint8_t *text, size_t *size, size_t most, unsigned *seed) {
#define VALUE(text) {text, sizeof text - 1}
    static const struct {
        const char *bytes;
        size_t size;
    } values[] = {VALUE("\xC0"), VALUE("\xC2"), VALUE("\xC3"), VALUE("\x00"), VALUE("\x01"), VALUE("\x10"), VALUE("\xFF"), VALUE("\x80"),
                  VALUE("\x90"), VALUE("\xA0"), VALUE("\xA1x"), VALUE("\xA1y"), VALUE("\xA3x\0y"), VALUE("\xA2\xC3\x28"),
                  VALUE("\xA3\xED\xA0\x80"), VALUE("\xA4mock"), VALUE("\xA5INT32"), VALUE("\xA5input"), VALUE("\xA6output"),
                  VALUE("\xA4" "host"), VALUE("\xA4int4"), VALUE("\xA4int8"), VALUE("\xA5int64"), VALUE("\xA5" "float"),
                  VALUE("\xCB\x7F\xF8\0\0\0\0\0\0"), VALUE("\xCB\x3F\xE0\0\0\0\0\0\0"), VALUE("\xD3\x80\0\0\0\0\0\0\0"),
                  VALUE("\xCF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF"), VALUE("\xCE\x7F\xFF\xFF\xFF"), VALUE("\xCE\x80\0\0\0"),
                  VALUE("\xCF\0\0\x01\0\0\0\0\0"), VALUE("\x99\1\1\1\1\1\1\1\1\1"), VALUE("\x92\xFF\x04"), VALUE("\x81\xA1x\x09"),
                  VALUE("\x81\xA1x\x03"), VALUE("\x93\x92\1\4\x92\1\4\x92\1\4"), VALUE("\xC4\1x"), VALUE("\xC7\1\1x"), VALUE("\xD4\xFF\0")};
#undef VALUE
    size_t starts[512], count = 0;
    walk(text, *size, 0, starts, 512, &count);
    if (!count) return;
    size_t start = starts[(size_t)rand_r(seed) % count], unused = 0, end = walk(text, *size, start, NULL, 0, &unused);
    const char *value = values[(size_t)rand_r(seed) % (sizeof values / sizeof *values)].bytes;
    size_t length = 0;
    static uint8_t other[MOST];
    if (rand_r(seed) % 3 == 0) { /* another object of the same header */
        size_t from = starts[(size_t)rand_r(seed) % count];
        length = walk(text, *size, from, NULL, 0, &unused) - from;
        if (length > sizeof other) return;
        memcpy(other, text + from, length);
        value = (const char *)other;
    } else {
        for (size_t i = 0; i < sizeof values / sizeof *values; i++)
            if (values[i].bytes == value) length = values[i].size;
    }
    if (*size - (end - start) + length > most) return;
    memmove(text + start + length, text + end, *size - end);
    memcpy(text + start, value, length);
    *size = *size - (end - start) + length;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static parts p;
    if (rand_r(&seed) % 16 == 0 || !take_apart(data, size, &p)) return LLVMFuzzerMutate(data, size, most);
    for (int changes = 1 + rand_r(&seed) % 2; changes > 0; changes--) {
        int which = rand_r(&seed) % 8;
        if (which < 5) change_value(p.part[0], &p.sizes[0], MOST / 2, &seed);
        else if (which == 5) p.sizes[0] = LLVMFuzzerMutate(p.part[0], p.sizes[0], MOST / 2);
        else LLVMFuzzerMutate(p.control, FUZZ_CONTROL, FUZZ_CONTROL);
    }
    if (rand_r(&seed) % 64 == 0) p.inner[4 + rand_r(&seed) % 28] ^= (uint8_t)(1 << rand_r(&seed) % 8);
    size_t made = put_together(&p, data, most);
    return made ? made : LLVMFuzzerMutate(data, size, most);
}

/* ---- seeds ---- */

static size_t read_file(const char *folder, const char *name, uint8_t *to, size_t room) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    size_t bytes = fread(to, 1, room, file);
    fclose(file);
    return bytes;
}

/* The plan of each model, in each way of using it; sealed again, it must be the same. */
static void write_seeds(const char *folder) {
    static const char *const names[] = {"double", "two", "scalar", "unsigned", "nonzero", "gemm", "reshape", "uint8", "if", "bool", "constant"};
    static uint8_t model[1 << 16], unit[1 << 16], again[1 << 16];
    static parts p;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char name[64], path[1024];
        snprintf(name, sizeof name, "%s.onnx", names[i]);
        size_t bytes = read_file(fuzz_folder, name, model, sizeof model), size = sizeof unit - FUZZ_CONTROL;
        trtxpy_graph graph;
        if (DO(trtxpy_graph_from_onnx(fuzz_context, model, bytes, NULL, 0, NULL, &graph)) != TRTXPY_OK) {
            fprintf(stderr, "no plan of %s: %s\n", name, trtxpy_last_error());
            continue;
        }
        MUST(DO(trtxpy_graph_get_plan(graph, unit, &size)) == TRTXPY_OK);
        MUST(DO(trtxpy_graph_destroy(graph)) == TRTXPY_OK);
        for (uint8_t mode = 0; mode < 4; mode++) {
            memset(unit + size, 0, FUZZ_CONTROL);
            memcpy(unit + size, (uint8_t[]){(uint8_t)(mode | (mode ? 0 : 64)), 0, 0, 3, 3, 9}, 6);
            MUST(take_apart(unit, size + FUZZ_CONTROL, &p));
            MUST(put_together(&p, again, sizeof again) == size + FUZZ_CONTROL && memcmp(unit, again, size + FUZZ_CONTROL) == 0);
            snprintf(path, sizeof path, "%s/%s_%d", folder, names[i], mode);
            FILE *file = fopen(path, "wb");
            MUST(file && fwrite(unit, 1, size + FUZZ_CONTROL, file) == size + FUZZ_CONTROL);
            fclose(file);
        }
        if (i) continue; /* one without the container */
        snprintf(path, sizeof path, "%s/raw", folder);
        FILE *file = fopen(path, "wb");
        size_t header = OUTER + (size_t)read_little(unit + 12, 4);
        MUST(file && fwrite(unit + header, 1, size + FUZZ_CONTROL - header, file) == size + FUZZ_CONTROL - header);
        fclose(file);
    }
}

int LLVMFuzzerInitialize(int *count, char ***arguments) {
    (void)count, (void)arguments;
    fuzz_start();
    const char *folder = getenv("TRTXPY_FUZZ_WRITE_PLANS");
    if (folder) {
        write_seeds(folder);
        exit(0);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_use_model(data, size, true);
    return 0;
}
