// Puts the loops together for one instruction set. Included once by each unit, after its vectors.
#pragma once
#include "attention.h"
#include "encode.h"
#include "linear.h"
#include "rows.h"
#include "sampling.h"

namespace {

template <class V, class Int8, class Table4>
void multiply(const pw_linear_task *task, int64_t begin, int64_t end, void *scratch) {
    switch (task->weight->format) {
        case PW_INT8: return multiply_strips<V, Int8>(task, begin, end, scratch);
        case PW_TABLE4: return multiply_strips<V, Table4>(task, begin, end, scratch);
        default: return multiply_unquantized<V>(task, begin, end);
    }
}

template <class V>
size_t packed_bytes_of(const pw_linear_task *task) {
    return task->weight->format == PW_BF16 ? 0 : packed_bytes<V>(task);
}

template <class V>
int64_t pack_pieces_of(const pw_linear_task *task) {
    return task->weight->format == PW_BF16 ? 0 : pack_pieces<V>(task);
}

template <class V>
size_t scratch_bytes_of(const pw_linear_task *task) {
    return task->weight->format == PW_BF16 ? 0 : scratch_bytes<V>(task);
}

template <class V, class Int8, class Table4>
constexpr pw_kernels kernels_of(const char *name, const pw_kernels *floats = nullptr) {
    return {name,
            floats,
            packed_bytes_of<V>,
            pack_pieces_of<V>,
            pack<V>,
            scratch_bytes_of<V>,
            multiply<V, Int8, Table4>,
            read_words,
            encoding::encode_scratch_bytes,
            encoding::encode_strips,
            sampling::scratch_bytes,
            sampling::peak_row,
            sampling::draw_row,
            sampling::read_row,
            attention::scratch_bytes,
            attention::attend};
}

}  // namespace
