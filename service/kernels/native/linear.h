// Products with packed weights, for any set of vectors V (avx512.h, floats.h) and dequantizer D. All of it is in an
// anonymous namespace: each unit has its own, compiled for its instruction set.
//
// Two loops, both over strips of 16 outputs:
//   few rows   each half tile is decoded once in registers and multiplied with up to V::kFewRows rows of activations;
//              sums of a group are scaled in float32 when the group ends
//   panel      V::kPanelStrips strips are decoded to a panel that stays in the L2, which all rows then pass, in blocks of
//              V::kPanelRows; weights of groups are scaled on their way there
//
// V: X (type of activations and results), Weights (kVectors hold one decoded row: columns 2r and 2r+1 of 16 outputs),
// Sums (their accumulators), Pair (two activations, as `multiply_add` broadcasts them).
// D: `decode` turns a half tile, 16 columns, into 8 such rows.
#pragma once
#include "table.h"

namespace {

constexpr int64_t kStrip = 16;       // outputs
constexpr int64_t kTile = 32;        // columns
constexpr int64_t kHalf = 16;        // columns of half a tile
constexpr int kHalfPairs = 8;        // pairs of columns in it
constexpr int64_t kCacheBytes = 7 << 20;  // activations that pass one panel after another: a share of the L3

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t num_tiles(const pw_weight &w) { return divide_up(w.in_features, kTile); }
inline int64_t num_pairs(const pw_weight &w) { return num_tiles(w) * (kTile / 2); }
inline int64_t num_groups(const pw_weight &w) { return w.group_size ? divide_up(w.in_features, w.group_size) : 1; }

inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {  // of a finite number
    const uint32_t wide = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    value *= 0x1p112f;  // exponents of float32 are biased by 112 more; exact, of subnormals too
    uint32_t result;
    __builtin_memcpy(&result, &value, 4);
    result |= sign;
    __builtin_memcpy(&value, &result, 4);
    return value;
}

// Whether the sums of activations are needed: where more than a product with codes makes a weight.
inline bool needs_sums(const pw_weight &w) { return w.zero_points || w.has_offsets; }

// Where the scales of 16 outputs in group `group` of a strip begin, in elements; their offsets follow.
inline int64_t scales_at(const pw_weight &w, int64_t strip, int64_t group) {
    return (strip * num_groups(w) + group) * (w.has_offsets ? 2 * kStrip : kStrip);
}

// 16 elements of `scales`, as floats.
inline void load_values(const pw_weight &w, int64_t first, float *values) {
    if (w.scale_type == PW_SCALE_F32) {
        __builtin_memcpy(values, (const float *)w.scales + first, kStrip * sizeof(float));
        return;
    }
    const uint16_t *bits = (const uint16_t *)w.scales + first;
    if (w.scale_type == PW_SCALE_BF16)
        for (int n = 0; n < kStrip; ++n) values[n] = bf16_to_float(bits[n]);
    else
        for (int n = 0; n < kStrip; ++n) values[n] = f16_to_float(bits[n]);
}

inline void load_scales(const pw_weight &w, int64_t strip, int64_t group, float *scales) {
    load_values(w, scales_at(w, strip, group), scales);
}

inline void load_offsets(const pw_weight &w, int64_t strip, int64_t group, float *offsets) {
    load_values(w, scales_at(w, strip, group) + kStrip, offsets);
}

inline void load_zero_points(const pw_weight &w, int64_t strip, int64_t group, float *zero_points) {
    const uint8_t *nibbles = w.zero_points + (strip * num_groups(w) + group) * (kStrip / 2);
    for (int n = 0; n < kStrip / 2; ++n) {
        zero_points[2 * n] = (float)(nibbles[n] & 15);
        zero_points[2 * n + 1] = (float)(nibbles[n] >> 4);
    }
}

// Activations and results are bfloat16, held as their bits, or float32.
inline float to_float(uint16_t bits) { return bf16_to_float(bits); }
inline float to_float(float value) { return value; }
inline void from_float(float value, uint16_t *out) { *out = float_to_bf16(value); }
inline void from_float(float value, float *out) { *out = value; }

// Adds the bias to one sum and writes it.
template <class V>
inline void write_one(const pw_linear_task *task, int64_t row, int64_t output, float sum) {
    typedef typename V::X X;
    if (task->bias) sum += to_float(((const X *)task->bias)[output]);
    from_float(sum, (X *)task->y + row * task->y_stride + output);
}

// How the rows of a product are cut into blocks, and where their packed activations lie:
//   Pair pairs[block][pair of columns][row of the block], then, if there are zero points or offsets,
//   float group_sums[block][group][row of the block]
template <class V>
struct Rows {
    bool few, direct, sums;
    int64_t block;  // rows of every block but the last
    int64_t count, pairs, groups;

    explicit Rows(const pw_linear_task *task) {
        const pw_weight &w = *task->weight;
        few = task->regime == PW_FEW || (task->regime == PW_AUTO && task->rows <= V::kFewRows);
        block = few ? V::kFewRows : V::kPanelRows;
        count = divide_up(task->rows, block);
        pairs = num_pairs(w);
        groups = num_groups(w);
        sums = few && needs_sums(w);
        direct = few && V::kReadsBf16 && task->rows <= 4 && w.in_features % kTile == 0 && task->x_stride % 2 == 0 &&
                 (uintptr_t)task->x % 4 == 0;
    }
    int64_t rows_in(const pw_linear_task *task, int64_t index) const { return min64(block, task->rows - index * block); }
    // Rows of a block with those that only fill it up to a size that there is a loop for.
    int64_t padded(int64_t rows) const { return few ? V::few_size(rows) : V::panel_size(rows); }
    int64_t pair_offset(int64_t index) const { return index * block * pairs; }
    int64_t sum_offset(int64_t index) const { return index * block * groups; }
    int64_t padded_rows(const pw_linear_task *task) const {
        return (count - 1) * block + padded(rows_in(task, count - 1));
    }
    size_t pair_bytes(const pw_linear_task *task) const {
        return direct ? 0 : (size_t)(padded_rows(task) * pairs) * sizeof(typename V::Pair);
    }
    size_t bytes(const pw_linear_task *task) const {
        return pair_bytes(task) + (sums ? (size_t)(padded_rows(task) * groups) * sizeof(float) : 0);
    }
};

template <class V>
void pack_block(const pw_linear_task *task, const Rows<V> &plan, int64_t index) {
    typedef typename V::Pair Pair;
    const pw_weight &w = *task->weight;
    const int64_t rows = plan.rows_in(task, index), padded = plan.padded(rows);
    const typename V::X *x = (const typename V::X *)task->x + index * plan.block * task->x_stride;
    if (!plan.direct) {
        Pair *pairs = (Pair *)task->packed_x + plan.pair_offset(index);
        V::pack_pairs(x, task->x_stride, rows, padded, w.in_features, plan.pairs, pairs);
    }
    if (!plan.sums) return;
    float *sums = (float *)((char *)task->packed_x + plan.pair_bytes(task)) + plan.sum_offset(index);
    for (int64_t g = 0; g < plan.groups; ++g) {
        const int64_t first = g * w.group_size, size = min64(w.in_features - first, w.group_size ? w.group_size : w.in_features);
        for (int64_t m = 0; m < padded; ++m)
            sums[g * padded + m] = m < rows ? V::sum(x + m * task->x_stride + first, size) : 0;
    }
}

template <class V>
int64_t pack_pieces(const pw_linear_task *task) {
    const Rows<V> plan(task);
    return plan.bytes(task) ? plan.count : 0;
}

template <class V>
size_t packed_bytes(const pw_linear_task *task) {
    return Rows<V>(task).bytes(task);
}

template <class V>
void pack(const pw_linear_task *task, int64_t begin, int64_t end) {
    const Rows<V> plan(task);
    for (int64_t index = begin; index < end; ++index) pack_block<V>(task, plan, index);
}

// Scales a strip's sums where that is still to be done, adds the bias and writes them: y[row][16 strip ..].
template <class V>
inline void write(const pw_linear_task *task, int64_t row, int64_t strip, const float *scales, const float *sums) {
    const int64_t first = strip * kStrip, size = min64(kStrip, task->weight->out_features - first);
    typename V::X *y = (typename V::X *)task->y + row * task->y_stride + first;
    const typename V::X *bias = task->bias ? (const typename V::X *)task->bias + first : nullptr;
    V::write(y, size, sums, scales, bias);
}

// The few-rows loop for MB rows of activations.
template <class V, class D, int MB, bool DIRECT>
__attribute__((noinline)) void few_block(const pw_linear_task *task, const Rows<V> &plan, int64_t index, int64_t begin, int64_t end) {
    typedef typename V::Pair Pair;
    constexpr int kChains = MB * V::kVectors >= 8 ? 1 : MB * V::kVectors >= 4 ? 2 : 4;  // multiplications in flight
    const pw_weight &w = *task->weight;
    const int64_t rows = plan.rows_in(task, index);
    const Pair *x = DIRECT ? (const Pair *)task->x : (const Pair *)task->packed_x + plan.pair_offset(index);
    const int64_t x_stride = task->x_stride / 2;
    const float *x_sums = (const float *)((const char *)task->packed_x + plan.pair_bytes(task)) + plan.sum_offset(index);
    const int64_t halves = num_tiles(w) * 2, per_group = w.group_size / kHalf;
    const D decoder(w);
    const uint8_t *codes = (const uint8_t *)w.qweight + begin * halves * D::kHalfBytes;
    for (int64_t strip = begin; strip < end; ++strip) {
        alignas(64) float total[MB][kStrip] = {};
        const Pair *pair = x;
        for (int64_t group = 0, half = 0; group < plan.groups; ++group) {
            typename V::Sums sums[kChains][MB][V::kVectors];
            for (int c = 0; c < kChains; ++c)
                for (int m = 0; m < MB; ++m)
                    for (int v = 0; v < V::kVectors; ++v) sums[c][m][v] = V::zero();
            const int64_t stop = group + 1 < plan.groups ? half + per_group : halves;  // the last one has the padding
            for (; half < stop; ++half) {
                typename V::Weights rows8[kHalfPairs][V::kVectors];
                for (int line = 0; line < D::kHalfBytes; line += 64) __builtin_prefetch(codes + V::kPrefetch + line);
                decoder.decode(codes, rows8);
                codes += D::kHalfBytes;
#pragma GCC unroll 8
                for (int r = 0; r < kHalfPairs; ++r)
#pragma GCC unroll 16
                    for (int m = 0; m < MB; ++m) {
                        const Pair *operand = DIRECT ? pair + m * x_stride + r : pair + r * MB + m;
#pragma GCC unroll 8
                        for (int v = 0; v < V::kVectors; ++v)
                            V::multiply_add(sums[r % kChains][m][v], rows8[r][v], operand);
                    }
                pair += DIRECT ? kHalfPairs : kHalfPairs * MB;
            }
            typename V::Scales scales(w, strip, group);
#pragma GCC unroll 16
            for (int m = 0; m < MB; ++m) {
                for (int c = 1; c < kChains; ++c)
                    for (int v = 0; v < V::kVectors; ++v) V::add(sums[0][m][v], sums[c][m][v]);
                scales.accumulate(total[m], sums[0][m], plan.sums ? x_sums + group * MB + m : nullptr);
            }
        }
        for (int m = 0; m < MB; ++m)
            if (m < rows) write<V>(task, index * plan.block + m, strip, nullptr, total[m]);
    }
}

template <class V, class D, int MB>
void few_rows(const pw_linear_task *task, const Rows<V> &plan, int64_t index, int64_t begin, int64_t end) {
    if (MB <= 4 && plan.direct)
        few_block<V, D, MB, V::kReadsBf16 && MB <= 4>(task, plan, index, begin, end);
    else
        few_block<V, D, MB, false>(task, plan, index, begin, end);
}

// Multiplies MB rows of packed activations with NV vectors of a panel.
template <class V, int MB, int NV>
inline void panel_block(const typename V::Pair *x, const typename V::Weights *panel, int64_t stride, int64_t pairs,
                        typename V::Sums sums[MB][NV]) {
    for (int m = 0; m < MB; ++m)
        for (int v = 0; v < NV; ++v) sums[m][v] = V::zero();
    for (int64_t p = 0; p < pairs; ++p) {
        typename V::Weights weights[NV];
        for (int v = 0; v < NV; ++v) weights[v] = panel[p * stride + v];
        __builtin_prefetch(x + (p + 24) * MB);  // activations that no cache holds: a tenth slower without, 2026-11-21
#pragma GCC unroll 16
        for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) V::multiply_add(sums[m][v], weights[v], x + p * MB + m);
    }
}

// One block of rows times one panel, and the results written.
template <class V, int MB>
__attribute__((noinline)) void panel_rows(const pw_linear_task *task, const Rows<V> &plan, int64_t index, int64_t strip, int64_t strips,
                const typename V::Weights *panel) {
    constexpr int NV = V::kPanelVectors;
    constexpr int kTotal = V::kPanelStrips * V::kVectors;
    const typename V::Pair *x = (const typename V::Pair *)task->packed_x + plan.pair_offset(index);
    const int64_t rows = plan.rows_in(task, index);
    alignas(64) float sums[MB][V::kPanelStrips * kStrip];
    for (int v = 0; v < kTotal; v += NV) {
        typename V::Sums block[MB][NV];
        panel_block<V, MB, NV>(x, panel + v, kTotal, plan.pairs, block);
        for (int m = 0; m < MB; ++m) V::fold(block[m], NV, sums[m] + v * kStrip / V::kVectors);
    }
    for (int64_t s = 0; s < strips; ++s) {
        alignas(64) float scales[kStrip];
        if (!task->weight->group_size) load_scales(*task->weight, strip + s, 0, scales);
        for (int m = 0; m < rows; ++m)
            write<V>(task, index * plan.block + m, strip + s, task->weight->group_size ? nullptr : scales, sums[m] + s * kStrip);
    }
}

// Decodes halves [begin, end) of a strip, multiplied by `scales`, to rows that lie kPanelStrips rows apart.
template <class V, class D>
inline void decode_halves(const D &decoder, const pw_weight &w, int64_t strip, int64_t begin, int64_t end,
                          const typename V::WeightScales &scales, typename V::Weights *out) {
    const uint8_t *codes = (const uint8_t *)w.qweight + (strip * num_tiles(w) * 2 + begin) * D::kHalfBytes;
    for (int64_t half = begin; half < end; ++half, codes += D::kHalfBytes) {
        typename V::Weights rows8[kHalfPairs][V::kVectors];
        for (int line = 0; line < D::kHalfBytes; line += 64) __builtin_prefetch(codes + V::kPrefetch + line);
        decoder.decode(codes, rows8);
        for (int r = 0; r < kHalfPairs; ++r, out += V::kPanelStrips * V::kVectors)
            for (int v = 0; v < V::kVectors; ++v) out[v] = scales.apply(rows8[r][v], v);
    }
}

// Decodes `strips` strips to Weights[pair][strip][vector]; weights of groups are scaled, those of whole rows are not.
template <class V, class D>
__attribute__((noinline)) void fill_panel(const pw_weight &w, int64_t strip, int64_t strips,
                                          typename V::Weights *panel) {
    const D decoder(w);
    const int64_t groups = num_groups(w), per_group = w.group_size / kHalf;
    for (int64_t s = 0; s < strips; ++s)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t half = group * per_group, stop = group + 1 < groups ? half + per_group : num_tiles(w) * 2;
            const typename V::WeightScales scales(w, strip + s, w.group_size ? group : -1);
            typename V::Weights *out = panel + (half * kHalfPairs * V::kPanelStrips + s) * V::kVectors;
            decode_halves<V, D>(decoder, w, strip + s, half, stop, scales, out);
        }
}

template <class V>
size_t scratch_bytes(const pw_linear_task *task) {
    const Rows<V> plan(task);
    if (plan.few) return 0;
    return (size_t)(plan.pairs * V::kPanelStrips * V::kVectors) * sizeof(typename V::Weights);
}

template <class V, class D>
void multiply_strips(const pw_linear_task *task, int64_t begin, int64_t end, void *scratch) {
    const Rows<V> plan(task);
    if (plan.few) {
        for (int64_t index = 0; index < plan.count; ++index)
            V::template few<D>(plan.padded(plan.rows_in(task, index)), task, plan, index, begin, end);
        return;
    }
    typename V::Weights *panel = (typename V::Weights *)scratch;
    const int64_t row_bytes = plan.pairs * (int64_t)sizeof(typename V::Pair);
    const int64_t together = 1 + kCacheBytes / (row_bytes * plan.block);  // blocks of rows that a panel meets in turn
    for (int64_t first = 0; first < plan.count; first += together)
        for (int64_t strip = begin; strip < end; strip += V::kPanelStrips) {
            const int64_t strips = min64(V::kPanelStrips, end - strip);
            fill_panel<V, D>(*task->weight, strip, strips, panel);
            for (int64_t index = first; index < min64(first + together, plan.count); ++index)
                V::panel(plan.padded(plan.rows_in(task, index)), task, plan, index, strip, strips, panel);
        }
}

}  // namespace
