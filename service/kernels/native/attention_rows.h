// Attention of single tokens to the keys and values of their own sequences, where these lie: tile by tile, without a
// copy, in float32. One pass: what was summed is scaled down whenever a larger score comes.
#pragma once
#include "attention_vectors.h"
#include "table.h"

namespace {
namespace attention {

constexpr int64_t kTile = kLanes;  // tokens whose scores make a vector

// Where the token at a place of a row's sequence lies.
inline int64_t slot_of(const pw_attention *task, int64_t row, int64_t place) {
    const int64_t block = task->tables[task->table_starts[row] + place / task->block_size];
    return block * task->block_size + place % task->block_size;
}

// The score that a query head begins with, and what its weights then sum up to. A sink is a token without a value.
inline float first_peak(const pw_attention *task, int64_t head) {
    return task->sinks ? task->sinks[head] : -__builtin_inff();
}
inline Floats first_total(const pw_attention *task, float peak) {
    Floats total = {};
    total[0] = !task->sinks ? 0 : peak < __builtin_inff() ? 1 : __builtin_nanf("");  // NaN too
    return total;
}

inline Floats cap(Floats scores, float limit) { return hyperbolic_tangent(scores / limit) * limit; }

// What one worker keeps of the queries that share a head of keys; floats in rows of whole vectors.
struct RowScratch {
    int64_t key_vectors, value_vectors, queries;
    float *query, *keys, *values, *sums, *totals, *peaks;

    RowScratch(const pw_attention *task, void *memory)
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
inline void see(const pw_attention *task, RowScratch &scratch, int64_t query, const Tile &tile, const Floats *scales) {
    const int64_t width = scratch.value_vectors * kLanes;
    float *sums = scratch.sums + query * width, *peak = scratch.peaks + query;
    Floats total = load<Floats>(scratch.totals + query * kLanes);
    const float *own = scratch.query + query * scratch.key_vectors * kLanes;
    Floats scores = scratch.key_vectors == 4   ? score<4>(own, scratch.keys, 4)
                    : scratch.key_vectors == 8 ? score<8>(own, scratch.keys, 8)
                                               : score<0>(own, scratch.keys, scratch.key_vectors);
    if (scales) scores *= scales[0];
    if (task->softcap > 0) scores = cap(scores, (float)task->softcap);
    scores = keep_lanes(scores, tile.begin, tile.end);
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

// The only query of a row, which sees all tokens up to its own.
template <class Activation, class Element>
inline void attend_row(const pw_attention *task, const pw_attended &item, void *memory) {
    RowScratch scratch(task, memory);
    const int64_t row = item.row, head = item.head, length = item.position + 1;
    const int64_t first_head = item.query * task->heads + head * scratch.queries;
    const int64_t width = scratch.value_vectors * kLanes;
    for (int64_t q = 0; q < scratch.queries; ++q) {
        float *query = scratch.query + q * scratch.key_vectors * kLanes;
        widen((const Activation *)task->queries + (first_head + q) * task->key_size, task->key_size, query);
        for (int64_t i = 0; i < scratch.key_vectors * kLanes; ++i) query[i] *= (float)task->scaling;
        scratch.peaks[q] = first_peak(task, head * scratch.queries + q);
        store(scratch.totals + q * kLanes, first_total(task, scratch.peaks[q]));
        for (int64_t i = 0; i < width; ++i) scratch.sums[q * width + i] = 0;
    }
    const int64_t first = task->window > 0 && task->window < length ? length - task->window : 0;
    for (int64_t place = first / kTile * kTile; place < length; place += kTile) {
        const Tile tile{slot_of(task, row, place), first > place ? first - place : 0,
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
        write_mean(scratch.sums + q * width, total, task->value_size, out);
    }
}

}  // namespace attention
}  // namespace
