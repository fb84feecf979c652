// Memory read in the order in which it lies: products with bfloat16 weights row by row, and the benchmark's yardstick.
// Compilers turn the loops over fixed arrays into vectors of the unit's instruction set.
#pragma once
#include "linear.h"

namespace {

constexpr int kStreams = 4;  // read side by side: more than one keeps more lines on their way

inline uint64_t read_words(const void *data, int64_t bytes) {
    typedef uint64_t Line __attribute__((vector_size(64), aligned(8)));
    const int64_t stream = bytes / kStreams / 64 * 64;
    const char *at = (const char *)data;
    Line sums[kStreams] = {};
    for (int64_t offset = 0; offset < stream; offset += 64)
        for (int i = 0; i < kStreams; ++i) {
            __builtin_prefetch(at + i * stream + offset + 1024);
            sums[i] += *(const Line *)(at + i * stream + offset);
        }
    Line all = {};
    for (const Line &sum : sums) all += sum;
    uint64_t total = 0;
    for (int i = 0; i < 8; ++i) total += all[i];
    for (int64_t offset = kStreams * stream; offset < bytes; offset += 8) {
        uint64_t word;
        __builtin_memcpy(&word, at + offset, 8);
        total += word;
    }
    return total;
}

// Strips [begin, end) of a product with unquantized weights; each weight is read once per four rows of activations.
template <class V>
void multiply_unquantized(const pw_linear_task *task, int64_t begin, int64_t end) {
    const int64_t stop = min64(end * kStrip, task->weight->out_features);
    for (int64_t row = 0; row < task->rows; row += 4)
        for (int64_t output = begin * kStrip; output < stop; output += 4) {
            const int64_t outputs = min64(4, stop - output);
            switch (task->rows - row) {
                case 1: V::template unquantized<1>(task, row, output, outputs); break;
                case 2: V::template unquantized<2>(task, row, output, outputs); break;
                case 3: V::template unquantized<3>(task, row, output, outputs); break;
                default: V::template unquantized<4>(task, row, output, outputs); break;
            }
        }
}

}  // namespace
