// Work that is shared by threads of a pool, and memory that each of them keeps.
#pragma once
#include "kernels.h"

#include <atomic>
#include <pthread.h>
#include <stdlib.h>

namespace {

// The pool that pw_init handed over; without one the caller does all work.
struct Pool {
    std::atomic<pw_parallel_for> parallel_for{nullptr};
    std::atomic<pw_get_num_threads> get_num_threads{nullptr};

    int64_t num_threads() const {
        const pw_get_num_threads get = get_num_threads.load(std::memory_order_acquire);
        uint32_t count = 1;
        return get && get(&count) == 0 && count > 0 ? count : 1;
    }
    // Lets `workers` threads call `body`, which takes pieces until none is left: how many run at a time is the pool's
    // affair, and one that runs inside another's work gets one thread.
    int run(int64_t workers, void (*body)(int64_t, int64_t, void *), void *context) const {
        const pw_parallel_for parallel = parallel_for.load(std::memory_order_acquire);
        if (workers > 1 && parallel) return parallel(0, workers, 1, body, context) == 0 ? PW_OK : PW_NO_THREADS;
        body(0, workers, context);
        return PW_OK;
    }
};

// Pieces 0 .. count-1 of some work, each taken once.
struct Pieces {
    std::atomic<int64_t> next{0};
    int64_t count = 0;

    bool take(int64_t *piece) { return (*piece = next.fetch_add(1, std::memory_order_relaxed)) < count; }
    bool all_taken() const { return next.load(std::memory_order_relaxed) >= count; }
};

// Strips 0 .. count-1 of a product, in runs that get shorter towards the end: what is left is shared evenly by threads
// that are held up now and then, and those that are not seldom ask. Runs begin at even strips: panels hold two.
struct StripRuns {
    std::atomic<int64_t> next{0};
    int64_t count = 0, workers = 1, least = 2;  // least: of strips in a run, but the last; even

    bool take(int64_t *begin, int64_t *end) {
        *begin = next.load(std::memory_order_relaxed);
        do {
            if (*begin >= count) return false;
            const int64_t left = count - *begin, share = left / (2 * workers) / 2 * 2;
            *end = *begin + (share > least ? share : least);
            if (*end > count) *end = count;
        } while (!next.compare_exchange_weak(*begin, *end, std::memory_order_relaxed));
        return true;
    }
    bool all_taken() const { return next.load(std::memory_order_relaxed) >= count; }
};

// The buffers of one thread, which grow and are freed when it ends.
enum BufferUse { kPackedX, kScratch, kBufferUses };

struct Buffers {
    void *data[kBufferUses];
    size_t size[kBufferUses];
};

pthread_key_t buffers_key;
pthread_once_t buffers_once = PTHREAD_ONCE_INIT;
bool has_buffers_key = false;

void free_buffers(void *value) {
    for (void *data : ((Buffers *)value)->data) free(data);
    free(value);
}

void make_buffers_key() { has_buffers_key = pthread_key_create(&buffers_key, free_buffers) == 0; }

// At least `size` bytes, aligned to a cache line, of the calling thread; null if there is no memory.
void *thread_buffer(BufferUse use, size_t size) {
    pthread_once(&buffers_once, make_buffers_key);
    if (!has_buffers_key) return nullptr;
    Buffers *buffers = (Buffers *)pthread_getspecific(buffers_key);
    if (!buffers) {
        buffers = (Buffers *)calloc(1, sizeof(Buffers));
        if (!buffers || pthread_setspecific(buffers_key, buffers)) {
            free(buffers);
            return nullptr;
        }
    }
    if (size > buffers->size[use] || !buffers->data[use]) {
        const size_t rounded = (size + 4095) / 4096 * 4096;
        free(buffers->data[use]);
        buffers->data[use] = aligned_alloc(64, rounded);
        buffers->size[use] = buffers->data[use] ? rounded : 0;
    }
    return buffers->data[use];
}

// Frees a buffer of the calling thread that has grown beyond `kept` bytes.
void trim_buffer(BufferUse use, size_t kept) {
    Buffers *buffers = has_buffers_key ? (Buffers *)pthread_getspecific(buffers_key) : nullptr;
    if (!buffers || buffers->size[use] <= kept) return;
    free(buffers->data[use]);
    buffers->data[use] = nullptr;
    buffers->size[use] = 0;
}

}  // namespace
