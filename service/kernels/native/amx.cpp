// The kernels for AMX with bfloat16, beside AVX-512.
#include "amx.h"
#include "unit.h"

const pw_kernels *pw_kernels_amx(void) {
    static constexpr pw_kernels kernels = {"amx",
                                           nullptr,
                                           amx_packed_bytes,
                                           amx_pack_pieces,
                                           amx_pack,
                                           amx_scratch_bytes,
                                           amx_multiply,
                                           read_words,
                                           encoding::encode_scratch_bytes,
                                           encoding::encode_strips,
                                           sampling::scratch_bytes,
                                           sampling::peak_row,
                                           sampling::draw_row,
                                           sampling::read_row,
                                           attention::scratch_bytes,
                                           attention::attend};
    return &kernels;
}
