// Memory read in the order in which it lies: products with bfloat16 weights row by row, and the benchmark's yardstick.
// Compilers turn the loops over fixed arrays into vectors of the unit's instruction set.
#pragma once
#include "linear.h"

namespace {

constexpr int kReadStep = 256;  // bytes: four lines, each with a sum of its own

inline uint64_t read_words(const void *data, int64_t bytes) {
    typedef uint64_t Line __attribute__((vector_size(64), aligned(8)));
    const char *at = (const char *)data, *end = at + bytes / kReadStep * kReadStep;
    Line sums[4] = {};
    for (; at < end; at += kReadStep)
        for (int i = 0; i < 4; ++i) {
            __builtin_prefetch(at + 2048 + 64 * i);
            sums[i] += *(const Line *)(at + 64 * i);
        }
    const Line all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    uint64_t total = 0;
    for (int i = 0; i < 8; ++i) total += all[i];
    for (end = (const char *)data + bytes / 8 * 8; at < end; at += 8) {
        uint64_t word;
        __builtin_memcpy(&word, at, 8);
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
