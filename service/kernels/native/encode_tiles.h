// From 16 rows of codes, one byte each, to the tiles drawn in kernels.h.
#pragma once
#include "encode_vectors.h"
#include "linear.h"

#if defined(__clang__)
#define PW_SHUFFLE(V, a, b, ...) __builtin_shufflevector((V)(a), (V)(b), __VA_ARGS__)
#else  // which knows the other one only since version 12
#define PW_SHUFFLE(V, a, b, ...) __builtin_shuffle((V)(a), (V)(b), V{__VA_ARGS__})
#endif

namespace {
namespace encoding {

typedef uint16_t Pairs __attribute__((vector_size(16)));
typedef uint32_t Quads __attribute__((vector_size(16)));
typedef uint64_t Longs __attribute__((vector_size(16)));
typedef uint8_t Nibbles __attribute__((vector_size(16)));

// Four rows of 16 codes to four runs of 16 bytes: those of the four outputs in the vectors of an 8-bit tile.
inline void interleave(const int8_t *codes, int64_t stride, Quads runs[4]) {
    const Pairs a = load<Pairs>(codes), b = load<Pairs>(codes + stride);
    const Pairs c = load<Pairs>(codes + 2 * stride), d = load<Pairs>(codes + 3 * stride);
    const Pairs ab_low = PW_SHUFFLE(Pairs, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    const Pairs ab_high = PW_SHUFFLE(Pairs, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    const Pairs cd_low = PW_SHUFFLE(Pairs, c, d, 0, 8, 1, 9, 2, 10, 3, 11);
    const Pairs cd_high = PW_SHUFFLE(Pairs, c, d, 4, 12, 5, 13, 6, 14, 7, 15);
    runs[0] = PW_SHUFFLE(Quads, ab_low, cd_low, 0, 4, 1, 5);
    runs[1] = PW_SHUFFLE(Quads, ab_low, cd_low, 2, 6, 3, 7);
    runs[2] = PW_SHUFFLE(Quads, ab_high, cd_high, 0, 4, 1, 5);
    runs[3] = PW_SHUFFLE(Quads, ab_high, cd_high, 2, 6, 3, 7);
}

// Two runs of an 8-bit tile, rows r .. r+3, to the run of a 4-bit tile.
inline Nibbles join_nibbles(Quads first, Quads second) {
    const Longs even = PW_SHUFFLE(Longs, first, second, 0, 2);
    const Longs odd = PW_SHUFFLE(Longs, first, second, 1, 3);
    const Nibbles joined = (Nibbles)(even | odd << 4);
    return PW_SHUFFLE(Nibbles, joined, joined, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
}

// Writes past the caches, where tiles would only push out weights that are still to be read; `end_streams` comes after.
inline void stream_tile(const uint8_t *from, int64_t bytes, uint8_t *tile) {
#if defined(__AVX512F__)
    if ((uintptr_t)tile % 64 == 0) {
        for (int64_t i = 0; i < bytes; i += 64) _mm512_stream_si512((__m512i *)(tile + i), load<__m512i>(from + i));
        return;
    }
#endif
    __builtin_memcpy(tile, from, (size_t)bytes);
}

inline void end_streams() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

template <bool NIBBLES>
inline void pack_tile(const int8_t *codes, int64_t stride, uint8_t *to) {
    constexpr int64_t kBytes = kStrip * kTile / (NIBBLES ? 2 : 1);
    alignas(64) uint8_t tile[kBytes];
    for (int quad = 0; quad < 4; ++quad)
        for (int half = 0; half < 2; ++half) {
            Quads runs[4];
            interleave(codes + 4 * quad * stride + half * kHalf, stride, runs);
            if (NIBBLES)
                for (int z = 0; z < 2; ++z)
                    store(tile + (2 * half + z) * 64 + quad * 16, join_nibbles(runs[2 * z], runs[2 * z + 1]));
            else
                for (int z = 0; z < 4; ++z) store(tile + (4 * half + z) * 64 + quad * 16, runs[z]);
        }
    stream_tile(tile, kBytes, to);
}

}  // namespace encoding
}  // namespace
