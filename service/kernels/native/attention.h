// Attention of single tokens to the keys and values of their own sequences, where these lie: tile by tile, without a
// copy, in float32. One pass: what was summed is scaled down whenever a larger score comes.
#pragma once
#include "sampling_vectors.h"
#include "table.h"

#include <utility>

namespace {
namespace attention {

using encoding::all;
using encoding::Floats;
using encoding::Ints;
using encoding::kLanes;
using encoding::load;
using encoding::store;
using sampling::exponential;
using sampling::fused;
using sampling::mask_of;

constexpr int64_t kTile = kLanes;  // tokens whose scores make a vector

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

inline void encode_one(float value, float *out) { *out = value; }
inline void encode_one(float value, uint16_t *out) {  // to the nearest bfloat16, of two the even one
    const uint32_t bits = load<uint32_t>(&value);
    *out = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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

inline float sum_of(Floats values) {
    for (int step = kLanes / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) values[i] += values[i + step];
    return values[0];
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1), by the magnitude of x as exponential takes numbers up to 0.
inline Floats hyperbolic_tangent(Floats x) {
    const Floats magnitude = x < 0 ? -x : x;
    const Floats shrunk = exponential(-2 * magnitude);
    const Floats result = (1 - shrunk) / (1 + shrunk);
    return x < 0 ? -result : x == x ? result : x;
}

// What one worker keeps of the queries that share a head of keys; floats in rows of whole vectors.
struct Scratch {
    int64_t key_vectors, value_vectors, queries;
    float *query, *keys, *values, *sums, *totals, *peaks;

    Scratch(const pw_attention *task, void *memory)
        : key_vectors(vectors_of(task->key_size)),
          value_vectors(vectors_of(task->value_size)),
          queries(task->heads / task->kv_heads) {
        query = (float *)memory;
        keys = query + queries * key_vectors * kLanes;
        values = keys + kTile * key_vectors * kLanes;
        sums = values + kTile * value_vectors * kLanes;
        totals = sums + queries * value_vectors * kLanes;
        peaks = totals + queries * kLanes;
    }
    static size_t bytes(const pw_attention *task) {
        const int64_t queries = task->heads / task->kv_heads;
        const int64_t vectors = (queries + kTile) * (vectors_of(task->key_size) + vectors_of(task->value_size)) + queries;
        return (size_t)(vectors * kLanes + queries) * sizeof(float);
    }
};

// The visible tokens [begin, end) of a tile that begins in `slot`.
struct Tile {
    int64_t slot, begin, end;
};

// Scores of one query with the keys of a tile; lanes of tokens that are not visible mean nothing.
// VECTORS: how many each row has, or 0 for any number.
template <int VECTORS>
inline Floats score(const float *query, const float *keys, int64_t vectors) {
    const int64_t count = VECTORS ? VECTORS : vectors;
    Floats products[kTile] = {};
    for (int64_t v = 0; v < count; ++v) {
        const Floats part = load<Floats>(query + v * kLanes);
        for (int64_t t = 0; t < kTile; ++t)
            products[t] = fused(part, load<Floats>(keys + (t * count + v) * kLanes), products[t]);
    }
    return sum_lanes(products);
}

// Adds the values of a tile, each as often as its weight says: COUNT vectors of them at a time.
template <int COUNT>
inline void add_values(const float *weights, const float *values, int64_t vectors, const Tile &tile, float *sums) {
    Floats parts[COUNT];
    for (int v = 0; v < COUNT; ++v) parts[v] = load<Floats>(sums + v * kLanes);
    for (int64_t t = tile.begin; t < tile.end; ++t)
        for (int v = 0; v < COUNT; ++v)
            parts[v] = fused(all(weights[t]), load<Floats>(values + (t * vectors + v) * kLanes), parts[v]);
    for (int v = 0; v < COUNT; ++v) store(sums + v * kLanes, parts[v]);
}

// Scales of the visible tokens, and zeros.
inline Floats load_scales(const uint16_t *scales, const pw_attention *task, int64_t head, const Tile &tile) {
    float found[kLanes] = {};
    for (int64_t t = tile.begin; t < tile.end; ++t)
        found[t] = decode_one(scales[(tile.slot + t) * task->kv_heads + head]);
    return load<Floats>(found);
}

template <class Element>
inline void load_rows(const void *rows, const pw_attention *task, int64_t size, int64_t head, const Tile &tile, float *out) {
    const Element *first = (const Element *)rows + (tile.slot * task->kv_heads + head) * size;
    const int64_t width = vectors_of(size) * kLanes, stride = task->kv_heads * size;
    for (int64_t t = tile.begin; t < tile.end; ++t) widen(first + t * stride, size, out + t * width);
}

// Lets one query see a tile. `peak` is its largest score so far, `total` by lanes what its weights sum up to.
inline void see(const pw_attention *task, Scratch &scratch, int64_t query, const Tile &tile, const Floats *scales) {
    const int64_t width = scratch.value_vectors * kLanes;
    float *sums = scratch.sums + query * width, *peak = scratch.peaks + query;
    Floats total = load<Floats>(scratch.totals + query * kLanes);
    const float *own = scratch.query + query * scratch.key_vectors * kLanes;
    Floats scores = scratch.key_vectors == 4   ? score<4>(own, scratch.keys, 4)
                    : scratch.key_vectors == 8 ? score<8>(own, scratch.keys, 8)
                                               : score<0>(own, scratch.keys, scratch.key_vectors);
    if (scales) scores *= scales[0];
    if (task->softcap > 0) scores = hyperbolic_tangent(scores / (float)task->softcap) * (float)task->softcap;
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    scores = lanes >= (int)tile.begin && lanes < (int)tile.end ? scores : all(-__builtin_inff());
    if (mask_of((Ints)(scores != scores))) total = all(__builtin_nanf(""));
    if (mask_of((Ints)(scores > *peak))) {
        float largest = *peak;
        for (int i = 0; i < kLanes; ++i) largest = scores[i] > largest ? scores[i] : largest;
        const Floats shrink = exponential(all(*peak - largest));
        total *= shrink;
        for (int64_t v = 0; v < width; v += kLanes) store(sums + v, load<Floats>(sums + v) * shrink);
        *peak = largest;
    }
    Floats weights = exponential(scores - *peak);
    total += weights;
    store(scratch.totals + query * kLanes, total);
    if (scales) weights *= scales[1];
    float each[kLanes];
    store(each, weights);
    int64_t v = 0;
    for (; v + 4 <= scratch.value_vectors; v += 4)
        add_values<4>(each, scratch.values + v * kLanes, scratch.value_vectors, tile, sums + v * kLanes);
    for (; v < scratch.value_vectors; ++v)
        add_values<1>(each, scratch.values + v * kLanes, scratch.value_vectors, tile, sums + v * kLanes);
}

template <class Activation, class Element>
inline void attend_as(const pw_attention *task, int64_t index, void *memory) {
    const int64_t row = index / task->kv_heads, head = index % task->kv_heads;
    Scratch scratch(task, memory);
    const int64_t first_head = row * task->heads + head * scratch.queries, width = scratch.value_vectors * kLanes;
    for (int64_t q = 0; q < scratch.queries; ++q) {
        float *query = scratch.query + q * scratch.key_vectors * kLanes;
        widen((const Activation *)task->queries + (first_head + q) * task->key_size, task->key_size, query);
        for (int64_t i = 0; i < scratch.key_vectors * kLanes; ++i) query[i] *= (float)task->scaling;
        // A sink is the score of a token without a value.
        const float peak = task->sinks ? task->sinks[head * scratch.queries + q] : -__builtin_inff();
        scratch.peaks[q] = peak;
        Floats total = {};
        total[0] = !task->sinks ? 0 : peak < __builtin_inff() ? 1 : __builtin_nanf("");  // NaN too
        store(scratch.totals + q * kLanes, total);
        for (int64_t i = 0; i < width; ++i) scratch.sums[q * width + i] = 0;
    }
    const int64_t length = task->lengths[row];
    const int64_t first = task->window > 0 && task->window < length ? length - task->window : 0;
    for (int64_t place = first / kTile * kTile; place < length; place += kTile) {
        const int64_t block = task->tables[row * task->table_width + place / task->block_size];
        const Tile tile{block * task->block_size + place % task->block_size, first > place ? first - place : 0,
                        length - place < kTile ? length - place : kTile};
        load_rows<Element>(task->keys, task, task->key_size, head, tile, scratch.keys);
        load_rows<Element>(task->values, task, task->value_size, head, tile, scratch.values);
        Floats scales[2];
        if (task->key_scales) {
            scales[0] = load_scales(task->key_scales, task, head, tile);
            scales[1] = load_scales(task->value_scales, task, head, tile);
        }
        for (int64_t q = 0; q < scratch.queries; ++q) see(task, scratch, q, tile, task->key_scales ? scales : nullptr);
    }
    for (int64_t q = 0; q < scratch.queries; ++q) {
        const float total = sum_of(load<Floats>(scratch.totals + q * kLanes));
        Activation *out = (Activation *)task->out + (first_head + q) * task->value_size;
        for (int64_t i = 0; i < task->value_size; ++i) encode_one(scratch.sums[q * width + i] / total, out + i);
    }
}

// One row of a task and one head of keys: index = row * kv_heads + head.
inline void attend(const pw_attention *task, int64_t index, void *memory) {
    if (task->key_scales) {
        if (task->dtype == PW_BFLOAT16) return attend_as<uint16_t, int8_t>(task, index, memory);
        return attend_as<float, int8_t>(task, index, memory);
    }
    if (task->dtype == PW_BFLOAT16) return attend_as<uint16_t, uint16_t>(task, index, memory);
    return attend_as<float, float>(task, index, memory);
}

}  // namespace attention
}  // namespace
