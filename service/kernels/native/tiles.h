// The eight tile registers of AMX, as macros because their numbers are part of the instruction. With PW_EMULATE_TILES
// they are memory, so that everything around them can be tested on a processor without AMX.
//
// Every access is a barrier to the compiler: gcc 12 does not tell it that tile instructions read and write memory
// (amxtileintrin.h), and drops stores that nothing else reads.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define PW_BARRIER() __asm__ volatile("" ::: "memory")

// All tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#ifndef PW_EMULATE_TILES

namespace {
constexpr TileConfig kTileConfig;
}
#define PW_TILES_BEGIN() do { PW_BARRIER(); _tile_loadconfig(&kTileConfig); } while (0)
#define PW_TILES_END() _tile_release()
#define PW_TILE_ZERO(tile) _tile_zero(tile)
#define PW_TILE_LOAD(tile, from, stride) do { PW_BARRIER(); _tile_loadd(tile, from, stride); } while (0)
#define PW_TILE_STORE(tile, to, stride) do { _tile_stored(tile, to, stride); PW_BARRIER(); } while (0)
#define PW_TILE_MULTIPLY(sums, x, weights) _tile_dpbf16ps(sums, x, weights)

#else

namespace {

thread_local __m512i emulated_tiles[8][16];

inline void tile_load(int tile, const void *from, int64_t stride) {
    for (int row = 0; row < 16; ++row)
        emulated_tiles[tile][row] = _mm512_loadu_si512((const char *)from + row * stride);
}

inline void tile_store(int tile, void *to, int64_t stride) {
    for (int row = 0; row < 16; ++row) _mm512_storeu_si512((char *)to + row * stride, emulated_tiles[tile][row]);
}

inline void tile_multiply(int sums, int x, int weights) {
    for (int m = 0; m < 16; ++m)
        for (int pair = 0; pair < 16; ++pair) {
            const int both = ((const int *)&emulated_tiles[x][m])[pair];
            emulated_tiles[sums][m] = (__m512i)_mm512_dpbf16_ps(
                (__m512)emulated_tiles[sums][m], (__m512bh)_mm512_set1_epi32(both), (__m512bh)emulated_tiles[weights][pair]);
        }
}

}  // namespace
#define PW_TILES_BEGIN() ((void)0)
#define PW_TILES_END() ((void)0)
#define PW_TILE_ZERO(tile) __builtin_memset(emulated_tiles[tile], 0, 1024)
#define PW_TILE_LOAD(tile, from, stride) tile_load(tile, from, stride)
#define PW_TILE_STORE(tile, to, stride) tile_store(tile, to, stride)
#define PW_TILE_MULTIPLY(sums, x, weights) tile_multiply(sums, x, weights)

#endif
