// The kernels for AVX2 with FMA: vectors of 8 floats.
#include "floats.h"
#include "unit.h"

const pw_kernels *pw_kernels_avx2(void) {
    static constexpr pw_kernels floats = kernels_of<FloatVectors<8, float>, Int8Floats<8>, Table4Floats<8>>("avx2");
    static constexpr pw_kernels kernels =
        kernels_of<FloatVectors<8>, Int8Floats<8>, Table4Floats<8>>("avx2", &floats);
    return &kernels;
}
