// The kernels for any processor: vectors of 4 floats, which compilers know everywhere.
#include "floats.h"
#include "unit.h"

const pw_kernels *pw_kernels_baseline(void) {
    static constexpr pw_kernels floats = kernels_of<FloatVectors<4, float>, Int8Floats<4>, Table4Floats<4>>("baseline");
    static constexpr pw_kernels kernels =
        kernels_of<FloatVectors<4>, Int8Floats<4>, Table4Floats<4>>("baseline", &floats);
    return &kernels;
}
