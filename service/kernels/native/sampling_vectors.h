// What the choice of tokens adds to the vectors of the encoders: exponentials, masks, and the lanes of a block.
#pragma once
#include "encode_vectors.h"

#if defined(__FMA__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {
namespace sampling {

using encoding::all;
using encoding::Doubles;
using encoding::Floats;
using encoding::HalfFloats;
using encoding::Ints;
using encoding::kLanes;
using encoding::larger;
using encoding::load;
using encoding::store;
using encoding::widen;
using encoding::Words;

// A block of tokens is 64 times 16 lanes, whatever the registers hold, so that its sum is the same for all of them.
constexpr int64_t kBlock = 1024;
constexpr int kGroups = 16;                 // a group: the tokens of a block that share a lane
constexpr int kParts = kGroups / kLanes;    // vectors for 16 lanes

// a b + c: in one rounding, but for the baseline.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// exp of numbers up to 0, off by less than 1e-7 of itself; 1 for 0, and 0 below -87.3 and for NaN.
// x = n ln 2 + r, and exp(r) = 1 + r + r^2 q(r) for |r| <= ln 2 / 2: q is fitted so that the largest error is least,
// 3.1e-9. ln 2 is the sum of two numbers, the first of which has so few digits that its multiples by n are exact.
inline Floats exponential(Floats x) {
    constexpr float kRounder = 12582912.0f;  // adding it leaves the nearest integer in the low bits
    const Floats shifted = fused(x, all(1.4426950216293335f), all(kRounder));
    const Floats n = shifted - kRounder;
    const Floats r = fused(n, all(2.1219444170128554e-4f), fused(n, all(-0.693359375f), x));
    Floats q = fused(all(0.0013814539415761828f), r, all(0.00836874544620514f));
    q = fused(q, r, all(0.04166838899254799f));
    q = fused(q, r, all(0.1666652113199234f));
    q = fused(q, r, all(0.4999999403953552f));
    const Floats of_r = fused(r * r, q, r) + 1;
    const Words scaled = (Words)of_r + ((Words)shifted << 23);
    return (Floats)(scaled & (Words)(x >= -87.3f));
}

// Bit i tells whether lane i of a comparison holds.
inline uint32_t mask_of(Ints holds) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)holds);
#elif defined(__SSE2__)
    return (uint32_t)_mm_movemask_ps((__m128)holds);
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)(holds[i] & 1) << i;
    return mask;
#endif
}

// Sum of a block whose vectors are given by their place: four at a time in float32, then in float64.
template <class VectorAt>
inline double sum_block(VectorAt vector_at) {
    Doubles sums[kParts][2] = {};
    for (int64_t k = 0; k < kBlock; k += 4 * kGroups)
        for (int p = 0; p < kParts; ++p) {
            const int64_t at = k + p * kLanes;
            const Floats run = (vector_at(at) + vector_at(at + kGroups)) +
                               (vector_at(at + 2 * kGroups) + vector_at(at + 3 * kGroups));
            HalfFloats halves[2];
            __builtin_memcpy(halves, &run, sizeof run);
            for (int h = 0; h < 2; ++h) sums[p][h] += widen(halves[h]);
        }
    double lanes[kGroups];
    __builtin_memcpy(lanes, sums, sizeof lanes);
    for (int step = kGroups / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
}

}  // namespace sampling
}  // namespace
