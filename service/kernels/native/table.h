// What each instruction set provides to library.cpp, and the task that workers share. Internal.
#pragma once
#include "kernels.h"

#include <stddef.h>

// A product in progress; any number of workers multiply strips of it.
struct pw_linear_task {
    const pw_weight *weight;
    const void *x;  // x, y and bias are of the type that the kernels are made for
    int64_t rows, x_stride;
    void *y;
    int64_t y_stride;
    const void *bias;
    int32_t regime;
    void *packed_x;  // filled by pack, read by multiply
};

// An encoding in progress: the squares of strip i and of its errors are summed in sums[i].
struct pw_encode_task {
    const pw_weight *weight;
    const pw_source *source;
    double (*sums)[2];
};

// Some queries of a row, and a head of keys that they attend to.
struct pw_attended {
    int64_t row, head;
    int64_t query, count;  // tokens [query, query + count) of all rows
    int64_t position;      // of the first of them in their sequence
};

struct pw_kernels {
    const char *name;
    const pw_kernels *floats;  // the same for float32 activations; null if another instruction set has to do it
    // Bytes that packing the activations takes, 0 if they are used where they lie.
    size_t (*packed_bytes)(const pw_linear_task *task);
    // Into how many pieces their packing falls, and the packing of pieces [begin, end).
    int64_t (*pack_pieces)(const pw_linear_task *task);
    void (*pack)(const pw_linear_task *task, int64_t begin, int64_t end);
    // Bytes of scratch that each worker needs for multiply.
    size_t (*scratch_bytes)(const pw_linear_task *task);
    // Multiplies strips [begin, end); `scratch` is 64-byte aligned and of one worker.
    void (*multiply)(const pw_linear_task *task, int64_t begin, int64_t end, void *scratch);
    // Sums 64-bit words at memory speed: the yardstick of the benchmark. bytes is a multiple of 8.
    uint64_t (*read)(const void *data, int64_t bytes);
    // Encodes strips [begin, end), with scratch of its own for each worker.
    size_t (*encode_scratch_bytes)(const pw_encode_task *task);
    void (*encode_strips)(const pw_encode_task *task, int64_t begin, int64_t end, void *scratch);
    // Chooses tokens for item `index` of a task, with scratch of its own for each worker.
    size_t (*sampling_scratch_bytes)(int64_t vocab);
    void (*find_peak)(const pw_peaks *task, int64_t index, void *scratch);
    void (*draw_token)(const pw_draws *task, int64_t index, void *scratch);
    void (*read_logprobs)(const pw_logprobs *task, int64_t index, void *scratch);
    // Attends an item of a task, with scratch of its own for each worker that suits items of up to `queries`. Whether a
    // row has more than one query decides how; into which items its queries fall changes no bit.
    size_t (*attention_scratch_bytes)(const pw_attention *task, int64_t queries);
    void (*attend)(const pw_attention *task, const pw_attended *item, void *scratch);
};

#ifdef __cplusplus
extern "C" {
#endif
const pw_kernels *pw_kernels_baseline(void);
const pw_kernels *pw_kernels_avx2(void);
const pw_kernels *pw_kernels_avx512(void);
const pw_kernels *pw_kernels_amx(void);
#ifdef __cplusplus
}
#endif
