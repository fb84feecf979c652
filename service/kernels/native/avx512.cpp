// The kernels for AVX-512 with BF16 and VBMI.
#include "avx512.h"
#include "unit.h"

const pw_kernels *pw_kernels_avx512(void) {
    static constexpr pw_kernels kernels = kernels_of<Avx512, Int8, Table4>("avx512");
    return &kernels;
}
