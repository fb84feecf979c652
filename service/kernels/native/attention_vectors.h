// What attention adds to the vectors of the choice of tokens: elements as floats and back, shuffles, a tangent.
#pragma once
#include "sampling_vectors.h"

#include <utility>

namespace {
namespace attention {

using encoding::all;
using encoding::Floats;
using encoding::Ints;
using encoding::kLanes;
using encoding::load;
using encoding::store;
using encoding::Words;
using sampling::exponential;
using sampling::fused;
using sampling::mask_of;

// kLanes elements of a row as floats, and one.
inline Floats decode(const float *row) { return load<Floats>(row); }
inline Floats decode(const uint16_t *row) { return encoding::Bfloat16::decode(load<encoding::Halves>(row)); }
inline Floats decode(const int8_t *row) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128((const __m128i *)row);
    return (Floats)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)  // gcc 12 converts one by one
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)row)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<encoding::Bytes>(row), Ints), Floats);
#endif
}
inline float decode_one(float element) { return element; }
inline float decode_one(int8_t element) { return element; }
inline float decode_one(uint16_t element) {
    const uint32_t bits = (uint32_t)element << 16;
    return load<float>(&bits);
}

inline void encode(Floats values, float *row) { store(row, values); }
inline void encode(Floats values, uint16_t *row) {  // to the nearest bfloat16, of two the even one
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store(row, __builtin_convertvector(values == values ? rounded : Words{} + 0x7fc0, encoding::Halves));
}

inline int64_t vectors_of(int64_t size) { return (size + kLanes - 1) / kLanes; }

// `size` elements as floats, then zeros up to whole vectors.
template <class Element>
inline void widen(const Element *row, int64_t size, float *out) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(out + i, decode(row + i));
    if (i == size) return;
    store(out + i, Floats{});
    for (; i < size; ++i) out[i] = decode_one(row[i]);
}

// A row of `size` sums, each divided by the same total; sums fill whole vectors.
template <class Element>
inline void write_mean(const float *sums, float total, int64_t size, Element *out) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) encode(load<Floats>(sums + i) / total, out + i);
    if (i == size) return;
    Element rest[kLanes];
    encode(load<Floats>(sums + i) / total, rest);
    for (int64_t j = 0; i + j < size; ++j) out[i + j] = rest[j];
}

// Lanes [begin, end) of scores; the others become those of tokens that are not seen.
inline Floats keep_lanes(Floats scores, int64_t begin, int64_t end) {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes >= (int)begin && lanes < (int)end ? scores : all(-__builtin_inff());
}

// Lanes of two vectors that hold runs of 2 H: the first or the last H of each run of a, then of b, in turns.
template <int H, bool LAST, int... LANE>
inline Floats halves(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (LANE / (2 * H) * 2 * H + LANE % H + LAST * H + (LANE / H % 2) * kLanes)...);
#else
    return __builtin_shuffle(a, b, Ints{(LANE / (2 * H) * 2 * H + LANE % H + LAST * H + (LANE / H % 2) * kLanes)...});
#endif
}

// Lane t becomes the sum of all lanes of sums[t].
template <int H = kLanes / 2>
inline Floats sum_lanes(Floats *sums) {
    if constexpr (H > 0) {
        constexpr std::make_integer_sequence<int, kLanes> lanes{};
        for (int t = 0; t < H; ++t)
            sums[t] = halves<H, false>(sums[t], sums[t + H], lanes) + halves<H, true>(sums[t], sums[t + H], lanes);
        return sum_lanes<H / 2>(sums);
    }
    return sums[0];
}

// Lane t of vector u and lane u of vector t change places.
template <int H = kLanes / 2>
inline void transpose(Floats *vectors) {
    if constexpr (H > 0) {
        constexpr std::make_integer_sequence<int, kLanes> lanes{};
        for (int t = 0; t < kLanes; ++t) {
            if (t & H) continue;
            const Floats first = halves<H, false>(vectors[t], vectors[t + H], lanes);
            vectors[t + H] = halves<H, true>(vectors[t], vectors[t + H], lanes);
            vectors[t] = first;
        }
        transpose<H / 2>(vectors);
    }
}

inline float sum_of(Floats values) {
    for (int step = kLanes / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) values[i] += values[i + step];
    return values[0];
}

inline float largest_of(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    float largest = values[0];
    for (int i = 1; i < kLanes; ++i) largest = values[i] > largest ? values[i] : largest;
    return largest;
#endif
}

// 2^x for x up to 100; 0 below -125 and for NaN. `terms` are those of a polynomial for 2^r, |r| <= 1/2.
template <int TERMS>
inline Floats power_of_two(Floats x, const float (&terms)[TERMS]) {
    constexpr float kRounder = 12582912.0f;  // adding it leaves the nearest integer in the low bits
    constexpr float kLeast = -125;
    const Floats shifted = x + kRounder;
    const Floats r = x - (shifted - kRounder);
    Floats of_r = all(terms[TERMS - 1]);
#pragma GCC unroll 8
    for (int i = TERMS - 2; i >= 0; --i) of_r = fused(of_r, r, all(terms[i]));
    const Words exponent = (Words)shifted << 23;
#if defined(__AVX512F__)
    const __mmask16 is_kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kLeast), _CMP_GE_OQ);
    return (Floats)_mm512_maskz_add_epi32(is_kept, (__m512i)of_r, (__m512i)exponent);
#else
    return (Floats)(((Words)of_r + exponent) & (Words)(x >= kLeast));
#endif
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1), by the magnitude of x as exponential takes numbers up to 0.
inline Floats hyperbolic_tangent(Floats x) {
    const Floats magnitude = x < 0 ? -x : x;
    const Floats shrunk = exponential(-2 * magnitude);
    const Floats result = (1 - shrunk) / (1 + shrunk);
    return x < 0 ? -result : x == x ? result : x;
}

}  // namespace attention
}  // namespace
