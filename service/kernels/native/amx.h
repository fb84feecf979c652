// AMX: 16 rows of activations times 16 outputs by one instruction. Up to four rows go the way of AVX-512.
//
//   some rows  weights of a group are decoded as they are, sums of the group are scaled in float32
//   many rows  a panel as in linear.h passes all rows, 32 at a time
#pragma once
#include "avx512.h"
#include "rows.h"
#include "tiles.h"

namespace {

constexpr int64_t kBlock = 16;                  // rows of a tile of activations
constexpr int64_t kTileWords = kBlock * kTile;  // bfloat16 in it
constexpr int64_t kAvx512Rows = 4, kSomeRows = 64;
constexpr int64_t kChunk = 256;  // columns of a whole row that are decoded at a time, to stay in the L1
constexpr int64_t kPair = 2 * kStrip;  // outputs of two strips
constexpr int64_t kPanelTile = kTile / 2 * 2;  // lines of a panel that hold one tile of two strips

// Activations as tiles bf16[block][tile][16][32], then float group_sums[block][group][16] if there are zero points.
struct TileRows {
    int64_t blocks, tiles, groups;
    bool some, sums;
    explicit TileRows(const pw_linear_task *task) {
        const pw_weight &w = *task->weight;
        blocks = divide_up(task->rows, kBlock);
        tiles = num_tiles(w);
        groups = num_groups(w);
        some = w.group_size % kTile == 0 && (task->regime == PW_AUTO ? task->rows <= kSomeRows : task->regime == PW_FEW);
        sums = some && needs_sums(w);
    }
    size_t tile_bytes() const { return (size_t)(blocks * tiles * kTileWords) * sizeof(uint16_t); }
    size_t bytes() const { return tile_bytes() + (sums ? (size_t)(blocks * groups * kBlock) * sizeof(float) : 0); }
    const uint16_t *block(const pw_linear_task *task, int64_t index) const {
        return (const uint16_t *)task->packed_x + index * tiles * kTileWords;
    }
    float *group_sums(const pw_linear_task *task, int64_t index) const {
        return (float *)((char *)task->packed_x + tile_bytes()) + index * groups * kBlock;
    }
};

inline bool uses_tiles(const pw_linear_task *task) {
    if (task->regime == PW_FEW && task->weight->group_size % kTile) return false;  // a group ends inside of a tile
    return task->rows > kAvx512Rows || task->regime == PW_PANEL;
}

inline void pack_tiles(const pw_linear_task *task, const TileRows &plan, int64_t index) {
    const pw_weight &w = *task->weight;
    const int64_t rows = min64(kBlock, task->rows - index * kBlock);
    const uint16_t *x = (const uint16_t *)task->x + index * kBlock * task->x_stride;
    uint16_t *out = (uint16_t *)plan.block(task, index);
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        const int64_t left = w.in_features - tile * kTile;
        const __mmask32 mask = left >= kTile ? 0xffffffffu : (1u << left) - 1;
        for (int64_t m = 0; m < kBlock; ++m, out += kTile) {
            const __m512i line = m < rows ? _mm512_maskz_loadu_epi16(mask, x + m * task->x_stride + tile * kTile)
                                          : _mm512_setzero_si512();
            _mm512_store_si512(out, line);
        }
    }
    if (!plan.sums) return;
    float *sums = plan.group_sums(task, index);
    for (int64_t g = 0; g < plan.groups; ++g)
        for (int64_t m = 0; m < kBlock; ++m) {
            const int64_t first = g * w.group_size;
            const int64_t size = w.group_size ? min64(w.group_size, w.in_features - first) : w.in_features;
            sums[g * kBlock + m] = m < rows ? Avx512::sum(x + m * task->x_stride + first, size) : 0;
        }
}

// Adds scaled sums of one group and two strips to totals[16][32], with what zero points or offsets make of sums of x.
inline void add_group(const Avx512::Scales *scales, const float *x_sums, const float *sums, float *totals) {
    for (int m = 0; m < kBlock; ++m)
        for (int s = 0; s < 2; ++s) {
            const __m512 line = _mm512_load_ps(sums + m * kPair + s * kStrip);
            scales[s].accumulate(totals + m * kPair + s * kStrip, &line, x_sums ? x_sums + m : nullptr);
        }
}

// Two strips times all rows, group by group; totals: float[rows padded to blocks][32].
template <class D>
void some_rows(const pw_linear_task *task, const TileRows &plan, int64_t strip, int64_t strips, __m512i *panel,
               float *totals) {
    const pw_weight &w = *task->weight;
    const D decoder(w);
    const Avx512::WeightScales unscaled(w, strip, -1);
    const int64_t step = w.group_size ? w.group_size / kTile : kChunk / kTile;  // tiles
    const int64_t last = strip + strips - 1;  // stands in for a second strip that is not there
    alignas(64) float sums[kBlock * kPair];
    __builtin_memset(totals, 0, (size_t)(plan.blocks * kBlock * kPair) * sizeof(float));
    for (int64_t tile = 0, part = 0; tile < plan.tiles; tile += step, ++part) {
        const int64_t stop = min64(tile + step, plan.tiles), group = w.group_size ? part : 0;
        const Avx512::Scales scales[2] = {{w, strip, group}, {w, last, group}};
        for (int s = 0; s < 2; ++s)
            decode_halves<Avx512, D>(decoder, w, s ? last : strip, 2 * tile, 2 * stop, unscaled, panel + s);
        for (int64_t index = 0; index < plan.blocks; ++index) {
            const uint16_t *x = plan.block(task, index) + tile * kTileWords;
            PW_TILE_ZERO(0);
            PW_TILE_ZERO(1);
            for (int64_t t = 0; t < stop - tile; ++t, x += kTileWords) {
                PW_TILE_LOAD(4, x, 64);
                PW_TILE_LOAD(6, panel + t * kPanelTile, 128);
                PW_TILE_LOAD(7, panel + t * kPanelTile + 1, 128);
                PW_TILE_MULTIPLY(0, 4, 6);
                PW_TILE_MULTIPLY(1, 4, 7);
            }
            PW_TILE_STORE(0, sums, kPair * sizeof(float));
            PW_TILE_STORE(1, sums + kStrip, kPair * sizeof(float));
            const float *x_sums = plan.sums && (w.group_size || part == 0) ? plan.group_sums(task, index) + group * kBlock : nullptr;
            add_group(scales, x_sums, sums, totals + index * kBlock * kPair);
        }
    }
}

// Two strips of a panel times blocks `index` and `index + 1` of rows; sums: float[32][32].
inline void many_rows(const pw_linear_task *task, const TileRows &plan, int64_t index, const __m512i *panel,
                      float *sums) {
    const uint16_t *x0 = plan.block(task, index), *x1 = plan.block(task, min64(index + 1, plan.blocks - 1));
    PW_TILE_ZERO(0);
    PW_TILE_ZERO(1);
    PW_TILE_ZERO(2);
    PW_TILE_ZERO(3);
    for (int64_t t = 0; t < plan.tiles; ++t) {
        PW_TILE_LOAD(4, x0 + t * kTileWords, 64);
        PW_TILE_LOAD(6, panel + t * kPanelTile, 128);
        PW_TILE_MULTIPLY(0, 4, 6);
        PW_TILE_LOAD(7, panel + t * kPanelTile + 1, 128);
        PW_TILE_MULTIPLY(1, 4, 7);
        PW_TILE_LOAD(5, x1 + t * kTileWords, 64);
        PW_TILE_MULTIPLY(2, 5, 6);
        PW_TILE_MULTIPLY(3, 5, 7);
    }
    PW_TILE_STORE(0, sums, kPair * sizeof(float));
    PW_TILE_STORE(1, sums + kStrip, kPair * sizeof(float));
    PW_TILE_STORE(2, sums + kBlock * kPair, kPair * sizeof(float));
    PW_TILE_STORE(3, sums + kBlock * kPair + kStrip, kPair * sizeof(float));
}

inline void write_rows(const pw_linear_task *task, int64_t row, int64_t rows, int64_t strip, int64_t strips,
                       const float *sums, bool scale) {
    for (int64_t s = 0; s < strips; ++s) {
        alignas(64) float scales[kStrip];
        if (scale) load_scales(*task->weight, strip + s, 0, scales);
        for (int64_t m = 0; m < rows; ++m)
            write<Avx512>(task, row + m, strip + s, scale ? scales : nullptr, sums + m * kPair + s * kStrip);
    }
}

template <class D>
void multiply_tiles(const pw_linear_task *task, int64_t begin, int64_t end, void *scratch) {
    const TileRows plan(task);
    const bool whole_rows = !task->weight->group_size;
    __m512i *panel = (__m512i *)scratch;
    float *sums = (float *)(panel + plan.tiles * kPanelTile);
    const int64_t together = 2 * (1 + kCacheBytes / (2 * plan.tiles * kTileWords * (int64_t)sizeof(uint16_t)));
    PW_TILES_BEGIN();
    for (int64_t first = 0; first < plan.blocks; first += plan.some ? plan.blocks : together)
        for (int64_t strip = begin; strip < end; strip += 2) {
            const int64_t strips = min64(2, end - strip);
            if (plan.some) {
                some_rows<D>(task, plan, strip, strips, panel, sums);
                write_rows(task, 0, task->rows, strip, strips, sums, false);
                continue;
            }
            fill_panel<Avx512, D>(*task->weight, strip, strips, panel);
            for (int64_t index = first; index < min64(first + together, plan.blocks); index += 2) {
                many_rows(task, plan, index, panel, sums);
                const int64_t row = index * kBlock;
                write_rows(task, row, min64(2 * kBlock, task->rows - row), strip, strips, sums, whole_rows);
            }
        }
    PW_TILES_END();
}

size_t amx_packed_bytes(const pw_linear_task *task) {
    if (task->weight->format == PW_BF16) return 0;
    return uses_tiles(task) ? TileRows(task).bytes() : packed_bytes<Avx512>(task);
}

int64_t amx_pack_pieces(const pw_linear_task *task) {
    if (task->weight->format == PW_BF16) return 0;
    return uses_tiles(task) ? TileRows(task).blocks : pack_pieces<Avx512>(task);
}

void amx_pack(const pw_linear_task *task, int64_t begin, int64_t end) {
    if (!uses_tiles(task)) return pack<Avx512>(task, begin, end);
    const TileRows plan(task);
    for (int64_t index = begin; index < end; ++index) pack_tiles(task, plan, index);
}

size_t amx_scratch_bytes(const pw_linear_task *task) {
    if (task->weight->format == PW_BF16 || !uses_tiles(task)) return 0;
    const TileRows plan(task);
    const int64_t rows = plan.some ? plan.blocks * kBlock : 2 * kBlock;
    return (size_t)(plan.tiles * kPanelTile) * sizeof(__m512i) + (size_t)(rows * kPair) * sizeof(float);
}

void amx_multiply(const pw_linear_task *task, int64_t begin, int64_t end, void *scratch) {
    if (task->weight->format == PW_BF16) return multiply_unquantized<Avx512>(task, begin, end);
    if (task->weight->format == PW_INT8)
        return uses_tiles(task) ? multiply_tiles<Int8>(task, begin, end, scratch)
                                : multiply_strips<Avx512, Int8>(task, begin, end, scratch);
    return uses_tiles(task) ? multiply_tiles<Table4>(task, begin, end, scratch)
                            : multiply_strips<Avx512, Table4>(task, begin, end, scratch);
}

}  // namespace
