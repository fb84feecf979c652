// The vectors of the encoders: those of the compiler, as wide as the registers of the instruction set, and how weights
// of each type come to be vectors of float32.
#pragma once
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {
namespace encoding {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));
typedef double Doubles __attribute__((vector_size(4 * kLanes)));  // half as many

template <class T>
inline T load(const void *address) {
    T value;
    __builtin_memcpy(&value, address, sizeof value);
    return value;
}

template <class T>
inline void store(void *address, T value) {
    __builtin_memcpy(address, &value, sizeof value);
}

inline Floats all(float value) { return value - Floats{}; }

template <class V>
inline V larger(V a, V b) {
    return a > b ? a : b;
}
template <class V>
inline V smaller(V a, V b) {
    return a < b ? a : b;
}
#if defined(__AVX512F__)  // what the compiler does not make of the generic forms; with masks, as else it warns
template <>
inline Floats larger(Floats a, Floats b) {
    return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
template <>
inline Floats smaller(Floats a, Floats b) {
    return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
}
template <>
inline Shorts larger(Shorts a, Shorts b) {
    return (Shorts)_mm256_max_epi16((__m256i)a, (__m256i)b);
}
template <>
inline Halves larger(Halves a, Halves b) {
    return (Halves)_mm256_max_epu16((__m256i)a, (__m256i)b);
}
// a b + c, where one rounding or two make no difference.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Words widen(Halves values) { return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)values); }
inline Doubles widen(HalfFloats values) { return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)values); }
#else
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Words widen(Halves values) { return __builtin_convertvector(values, Words); }
inline Doubles widen(HalfFloats values) { return __builtin_convertvector(values, Doubles); }
#endif

inline uint32_t largest(Words values) {
    uint32_t lanes[kLanes];
    __builtin_memcpy(lanes, &values, sizeof lanes);
    for (int step = kLanes / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    return lanes[0];
}
#if defined(__AVX512F__)
inline uint16_t largest(Halves values) {
    const __m256i falling = (__m256i)~values;
    const __m128i halves = _mm_min_epu16(_mm256_castsi256_si128(falling), _mm256_extracti128_si256(falling, 1));
    return (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(halves));
}
#else
inline uint16_t largest(Halves values) {
    uint16_t found = values[0];
    for (int i = 1; i < kLanes; ++i) found = values[i] > found ? values[i] : found;
    return found;
}
#endif

// Source weights. The bits of all three are a sign and a magnitude: of those above zero, the largest is the largest as
// signed integer, of those below, the lowest is the largest as unsigned integer, and NaN is beyond all others.
struct Float32 {
    typedef uint32_t Element;
    typedef Words Bits;
    typedef Ints SignedBits;
    static Floats decode(Words bits) { return (Floats)bits; }
};

struct Bfloat16 {
    typedef uint16_t Element;
    typedef Halves Bits;
    typedef Shorts SignedBits;
    static Floats decode(Halves bits) { return (Floats)(widen(bits) << 16); }
};

struct Float16 {
    typedef uint16_t Element;
    typedef Halves Bits;
    typedef Shorts SignedBits;
    static Floats decode(Halves bits) {
        const Words wide = widen(bits);
        const Words magnitude = (wide & 0x7fff) << 13;  // of a float32 2^112 times smaller, exact if subnormal too
        const Words finite = (Words)((Floats)magnitude * 0x1p112f);
        return (Floats)((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | (wide & 0x8000) << 16);
    }
};

// Fewer than kLanes elements, then zeros.
template <class Source>
inline typename Source::Bits load_first(const typename Source::Element *source, int64_t size) {
    typename Source::Bits bits = {};
    for (int64_t i = 0; i < size; ++i) bits[i] = source[i];
    return bits;
}

}  // namespace encoding
}  // namespace
