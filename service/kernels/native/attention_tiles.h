// Attention of queries that follow one another in a sequence: tiles of keys and values are rearranged once for all
// queries of an item, and multiplied with kRows query heads at a time. One pass, as for single tokens.
//
// Products are sums[row][column] += unit of the row * unit of the column over all units, which are floats, or pairs of
// bfloat16 where the processor multiplies these. Scores: rows are queries, columns the tokens of a tile, units go along
// the head. Means: rows are weights, columns the numbers of a value, units go along the tokens.
#pragma once
#include "attention_rows.h"

#include <type_traits>

namespace {
namespace attention {

constexpr int64_t kKeys = 64;                   // tokens of a tile
constexpr int64_t kRun = 16;                    // tokens of it that surely lie one behind the other
constexpr int kRows = 6;                        // query heads that are multiplied at a time
constexpr int kColumns = kLanes == 16 ? 4 : 2;  // vectors of results of each: as many as registers hold
constexpr int kVectors = kKeys / kLanes;        // of the scores of a row
constexpr double kLog2E = 1.4426950408889634;   // scores are logarithms to the base 2
constexpr float kMargin = 8;                    // by which one may exceed the peak that weights are relative to

struct Singles {
    static constexpr int64_t kNumbers = 1;  // in a unit
    // 2^r for |r| <= 1/2: of all polynomials of a degree the one whose largest relative error is least, here 8e-8.
    static constexpr float kTerms[] = {1.0f,          0.69314718246f,  0.24022646248f,  0.055503286421f,
                                       0.0096184890717f, 0.0013399930904f, 0.00015345812426f};

    // kLanes units of a row, and kLanes numbers in the low bits of units.
    template <class Element>
    static Words units(const Element *row) {
        return (Words)decode(row);
    }
    template <class Element>
    static Words numbers(const Element *row) {
        return (Words)decode(row);
    }
    static Words join(Words first, Words) { return first; }
    static Floats multiply_add(Words a, Words b, Floats c) { return fused((Floats)a, (Floats)b, c); }
    static void write(const Floats *weights, uint32_t *out) {
        for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, weights[v]);
    }
};

#if defined(__AVX512BF16__)
struct Pairs {
    static constexpr int64_t kNumbers = 2;
    static constexpr float kTerms[] = {0.99999928474f, 0.69312179089f, 0.24024744332f, 0.055917859077f,
                                       0.0095701022074f};  // 2.7e-6

    static Words round(Floats first, Floats last) {  // of the numbers in order, the last in the high half
        return (Words)_mm512_cvtne2ps_pbh((__m512)last, (__m512)first);
    }
    static Words units(const uint16_t *row) { return load<Words>(row); }
    static Words units(const int8_t *row) { return round(decode(row), decode(row + kLanes)); }
    static Words numbers(const uint16_t *row) { return encoding::widen(load<encoding::Halves>(row)); }
    static Words numbers(const int8_t *row) { return (Words)decode(row) >> 16; }  // exact
    static Words join(Words first, Words last) { return first | last << 16; }
    static Floats multiply_add(Words a, Words b, Floats c) {
        return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
    static void write(const Floats *weights, uint32_t *out) {
        for (int v = 0; v < kVectors / 2; ++v) store(out + v * kLanes, round(weights[2 * v], weights[2 * v + 1]));
    }
};
template <class Activation>
using UnitOf = std::conditional_t<std::is_same<Activation, uint16_t>::value, Pairs, Singles>;
#else
template <class Activation>
using UnitOf = Singles;
#endif

// What one worker keeps of the queries of an item. A block of kRows query heads lies unit by unit.
template <class Unit>
struct TileScratch {
    static constexpr int64_t kWeights = kKeys / Unit::kNumbers;  // units of the weights of a row

    int64_t repeats, heads, blocks, key_units, value_width;
    float factor;  // of the scores
    uint32_t *queries, *keys, *values, *weights;
    float *scores, *sums, *totals, *peaks, *key_factors, *value_factors;

    TileScratch(const pw_attention *task, int64_t count, void *memory)
        : repeats(task->heads / task->kv_heads),
          heads(count * repeats),
          blocks((heads + kRows - 1) / kRows),
          key_units((task->key_size + Unit::kNumbers - 1) / Unit::kNumbers),
          value_width(vectors_of(task->value_size) * kLanes),
          factor((float)(task->softcap > 0 ? task->scaling : task->scaling * kLog2E)) {
        const int64_t rows = blocks * kRows;
        keys = (uint32_t *)memory;
        values = keys + key_units * kKeys;
        weights = values + kWeights * value_width;
        scores = (float *)(weights + kRows * kWeights);
        key_factors = scores + kRows * kKeys;
        value_factors = key_factors + kKeys;
        sums = value_factors + kKeys;
        totals = sums + rows * value_width;
        queries = (uint32_t *)(totals + rows * kLanes);
        peaks = (float *)(queries + rows * key_units);
    }
    static size_t bytes(const pw_attention *task, int64_t count) {
        const TileScratch sizes(task, count, (void *)kLanes);  // only its numbers are looked at
        const int64_t of_tile = sizes.key_units * kKeys + kWeights * sizes.value_width;
        const int64_t of_row = sizes.key_units + sizes.value_width + kLanes + 1;
        const int64_t of_rows = kRows * (kWeights + kKeys + sizes.blocks * of_row);
        return sizeof(float) * (size_t)(of_tile + 2 * kKeys + of_rows);
    }
};

// Which tokens query head i of an item sees: from the first to before the last. It is head i % repeats of the item's
// query i / repeats; those behind the last one, which fill its block, see the same.
struct Sight {
    int64_t position, heads, repeats, window;

    int64_t query(int64_t i) const { return (i < heads ? i : heads - 1) / repeats; }
    int64_t last(int64_t i) const { return position + query(i) + 1; }
    int64_t first(int64_t i) const { return last(i) > window ? last(i) - window : 0; }
};

// kLanes units of a row that has `left` more numbers, then zeros; and kLanes numbers.
template <class Unit, class Element>
inline Words read_units(const Element *row, int64_t left) {
    constexpr int64_t kCount = kLanes * Unit::kNumbers;
    if (left >= kCount) return Unit::units(row);
    Element rest[kCount] = {};
    for (int64_t i = 0; i < left; ++i) rest[i] = row[i];
    return Unit::units(rest);
}
template <class Unit, class Element>
inline Words read_numbers(const Element *row, int64_t left) {
    if (left >= kLanes) return Unit::numbers(row);
    Element rest[kLanes] = {};
    for (int64_t i = 0; i < left; ++i) rest[i] = row[i];
    return Unit::numbers(rest);
}

// Where query head `i` of an item lies among all heads of all queries.
inline int64_t head_at(const pw_attention *task, const pw_attended &item, int64_t i) {
    const int64_t repeats = task->heads / task->kv_heads;
    return (item.query + i / repeats) * task->heads + item.head * repeats + i % repeats;
}

// Zeros fill the last block.
template <class Unit, class Activation>
inline void pack_queries(const pw_attention *task, const pw_attended &item, const TileScratch<Unit> &scratch) {
    for (int64_t i = 0; i < scratch.blocks * kRows; ++i) {
        const Activation *queries = (const Activation *)task->queries;
        const int64_t first = head_at(task, item, i) * task->key_size;
        uint32_t *out = scratch.queries + i / kRows * scratch.key_units * kRows + i % kRows;
        for (int64_t u = 0; u < scratch.key_units; u += kLanes) {
            const int64_t left = task->key_size - u * Unit::kNumbers;
            uint32_t units[kLanes] = {};
            if (i < scratch.heads) store(units, read_units<Unit>(queries + first + u * Unit::kNumbers, left));
            for (int64_t j = 0; j < kLanes && u + j < scratch.key_units; ++j) out[(u + j) * kRows] = units[j];
        }
    }
}

// kLanes keys become columns.
template <class Unit, class Element>
inline void pack_keys(const Element *keys, int64_t stride, int64_t size, int64_t num_units, uint32_t *out) {
    for (int64_t u = 0; u < num_units; u += kLanes) {
        Floats vectors[kLanes];
        for (int t = 0; t < kLanes; ++t)
            vectors[t] = (Floats)read_units<Unit>(keys + t * stride + u * Unit::kNumbers, size - u * Unit::kNumbers);
        transpose(vectors);
        for (int64_t j = 0; j < kLanes && u + j < num_units; ++j) store(out + (u + j) * kKeys, vectors[j]);
    }
}

// Values of a run become rows of units; those of tokens outside [begin, end) zeros, as their weights are.
template <class Unit, class Element>
inline void pack_values(const Element *values, int64_t stride, int64_t size, const Tile &run, int64_t width,
                        uint32_t *out) {
    const auto is_seen = [&](int64_t token) { return token >= run.begin && token < run.end; };
    for (int64_t token = 0; token < kRun; token += Unit::kNumbers, out += width) {
        const Element *first = values + token * stride, *last = first + (Unit::kNumbers - 1) * stride;
        int64_t i = 0;
        if (is_seen(token) && is_seen(token + Unit::kNumbers - 1))
            for (; i + kLanes <= size; i += kLanes)
                store(out + i, Unit::join(Unit::numbers(first + i), Unit::numbers(last + i)));
        for (; i < width; i += kLanes) {
            const Words one = is_seen(token) ? read_numbers<Unit>(first + i, size - i) : Words{};
            const Words other = is_seen(token + Unit::kNumbers - 1) ? read_numbers<Unit>(last + i, size - i) : Words{};
            store(out + i, Unit::join(one, other));
        }
    }
}

// Asks for the rows of a run before they are needed.
template <class Element>
inline void prefetch(const Element *rows, int64_t stride, int64_t size) {
    for (int64_t t = 0; t < kRun; ++t)
        for (int64_t i = 0; i < size; i += 64 / (int64_t)sizeof(Element)) __builtin_prefetch(rows + t * stride + i);
}

// Loads the tile at `place` as far as it lies in [first, last).
template <class Unit, class Element>
inline void load_tile(const pw_attention *task, const pw_attended &item, int64_t place, int64_t first, int64_t last,
                      const TileScratch<Unit> &scratch) {
    const int64_t key_stride = task->kv_heads * task->key_size, value_stride = task->kv_heads * task->value_size;
    for (int64_t t = 0; t < kKeys; t += kRun) {
        const int64_t begin = first - place - t, end = last - place - t;
        if (end <= 0 || begin >= kRun) continue;
        const Tile run{slot_of(task, item.row, place + t), begin > 0 ? begin : 0, end < kRun ? end : kRun};
        if (place + t + kKeys < last) {
            const int64_t next = slot_of(task, item.row, place + t + kKeys) * task->kv_heads + item.head;
            prefetch((const Element *)task->keys + next * task->key_size, key_stride, task->key_size);
            prefetch((const Element *)task->values + next * task->value_size, value_stride, task->value_size);
        }
        const int64_t head = run.slot * task->kv_heads + item.head;
        const Element *keys = (const Element *)task->keys + head * task->key_size;
        for (int64_t i = 0; i < kRun; i += kLanes)
            pack_keys<Unit>(keys + i * key_stride, key_stride, task->key_size, scratch.key_units, scratch.keys + t + i);
        pack_values<Unit>((const Element *)task->values + head * task->value_size, value_stride, task->value_size, run,
                          scratch.value_width, scratch.values + t / Unit::kNumbers * scratch.value_width);
        for (int64_t i = 0; i < kRun && task->key_scales; ++i) {
            scratch.key_factors[t + i] = decode_one(task->key_scales[head + i * task->kv_heads]) * scratch.factor;
            const bool is_seen = i >= run.begin && i < run.end;
            scratch.value_factors[t + i] = is_seen ? decode_one(task->value_scales[head + i * task->kv_heads]) : 0;
        }
    }
}

// Adds what `depth` units of rows and columns give: unit k of row r is rows[r * ROW + k * STEP].
template <class Unit, int64_t ROW, int64_t STEP, int VECTORS>
inline void multiply(const uint32_t *rows, const uint32_t *columns, int64_t width, int64_t depth,
                     Floats (&sums)[kRows][VECTORS]) {
    for (int64_t k = 0; k < depth; ++k, columns += width, rows += STEP) {
        Words vectors[VECTORS];
        for (int v = 0; v < VECTORS; ++v) vectors[v] = load<Words>(columns + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Words unit = rows[r * ROW] + Words{};
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = Unit::multiply_add(unit, vectors[v], sums[r][v]);
        }
    }
}

// Scores of a block with the tokens of VECTORS vectors of the tile, from token `t` on.
template <class Unit, int VECTORS>
inline void score(const TileScratch<Unit> &scratch, int64_t block, int64_t t) {
    Floats sums[kRows][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Floats{};
    const uint32_t *queries = scratch.queries + block * kRows * scratch.key_units;
    multiply<Unit, 1, kRows>(queries, scratch.keys + t, kKeys, scratch.key_units, sums);
    float *scores = scratch.scores + t;
    const float *factors = scratch.key_factors + t;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
        const Floats factor = load<Floats>(factors + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) store(scores + r * kKeys + v * kLanes, sums[r][v] * factor);
    }
}

// Adds the values of tokens [begin, end) to the sums of a block, VECTORS vectors of each from `column` on.
template <class Unit, int VECTORS>
inline void add_values(const TileScratch<Unit> &scratch, int64_t block, int64_t begin, int64_t end, int64_t column) {
    constexpr int64_t kWeights = TileScratch<Unit>::kWeights;
    const int64_t width = scratch.value_width, first = begin / Unit::kNumbers;
    const int64_t depth = (end + Unit::kNumbers - 1) / Unit::kNumbers - first;
    float *out = scratch.sums + block * kRows * width + column;
    Floats sums[kRows][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = load<Floats>(out + r * width + v * kLanes);
    multiply<Unit, kWeights, 1>(scratch.weights + first, scratch.values + first * width + column, width, depth, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(out + r * width + v * kLanes, sums[r][v]);
}

// Whether a score is above a limit, or is none.
inline bool has_larger(const float *scores, float limit) {
#if defined(__AVX512F__)
    uint32_t found = 0;
    for (int v = 0; v < kVectors; ++v)
        found |= _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + v * kLanes), _mm512_set1_ps(limit), _CMP_NLE_UQ);
    return found;
#else
    Ints found = {};
    for (int v = 0; v < kVectors; ++v) found |= ~(load<Floats>(scores + v * kLanes) <= limit);
    return mask_of(found);
#endif
}

// Makes the largest score of a query head its peak, and scales what it has summed so far accordingly.
template <class Unit>
__attribute__((noinline)) void raise_peak(const TileScratch<Unit> &scratch, int64_t i) {
    const float *scores = scratch.scores + i % kRows * kKeys;
    Floats total = load<Floats>(scratch.totals + i * kLanes), larger = all(scratch.peaks[i]);
    for (int v = 0; v < kVectors; ++v) {
        const Floats some = load<Floats>(scores + v * kLanes);
        if (mask_of((Ints)(some != some))) total = all(__builtin_nanf(""));
        larger = encoding::larger(some, larger);
    }
    const float largest = largest_of(larger);
    const Floats shrink = power_of_two(all(scratch.peaks[i] - largest), Unit::kTerms);
    store(scratch.totals + i * kLanes, total * shrink);
    float *sums = scratch.sums + i * scratch.value_width;
    for (int64_t c = 0; c < scratch.value_width; c += kLanes) store(sums + c, load<Floats>(sums + c) * shrink);
    scratch.peaks[i] = largest;
}

// Caps the scores of a query head, and hides from it all tokens of the tile but [begin, end).
template <class Unit>
__attribute__((noinline)) void adjust(const TileScratch<Unit> &scratch, int64_t i, float limit, int64_t begin,
                                      int64_t end) {
    float *scores = scratch.scores + i % kRows * kKeys;
    for (int64_t t = 0; t < kKeys; t += kLanes) {
        Floats some = load<Floats>(scores + t);
        if (limit > 0) some = cap(some, limit) * (float)kLog2E;
        store(scores + t, keep_lanes(some, begin - t, end - t));
    }
}

// Makes the scores of a block weights. HAS_SCALES: of values, which weights are multiplied with.
template <bool HAS_SCALES, class Unit>
inline void weigh(const TileScratch<Unit> &scratch, int64_t block) {
    for (int r = 0; r < kRows; ++r) {
        const int64_t i = block * kRows + r;
        const float *scores = scratch.scores + r * kKeys;
        if (has_larger(scores, scratch.peaks[i] + kMargin)) raise_peak(scratch, i);
        const float peak = scratch.peaks[i];
        Floats total = load<Floats>(scratch.totals + i * kLanes), weights[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            weights[v] = power_of_two(load<Floats>(scores + v * kLanes) - peak, Unit::kTerms);
            total += weights[v];
            if (HAS_SCALES) weights[v] *= load<Floats>(scratch.value_factors + v * kLanes);
        }
        store(scratch.totals + i * kLanes, total);
        Unit::write(weights, scratch.weights + r * TileScratch<Unit>::kWeights);
    }
}

// Lets a block see the tile at `place`.
template <class Unit>
inline void attend_tile(const pw_attention *task, const TileScratch<Unit> &scratch, const Sight &sight, int64_t place,
                        int64_t block) {
    const auto within = [&](int64_t token) {  // its place in the tile
        return token < place ? 0 : token - place < kKeys ? token - place : kKeys;
    };
    const int64_t i = block * kRows, begin = within(sight.first(i)), end = within(sight.last(i + kRows - 1));
    if (begin >= end) return;
    constexpr int64_t kWidth = kColumns * kLanes;
    int64_t t = 0;
    for (; t + kWidth / 2 < end; t += kWidth) score<Unit, kColumns>(scratch, block, t);
    if (t < end) score<Unit, kColumns / 2>(scratch, block, t);
    if (task->softcap > 0 || within(sight.first(i + kRows - 1)) > 0 || within(sight.last(i)) < kKeys)
        for (int64_t j = i; j < i + kRows; ++j)
            adjust(scratch, j, (float)task->softcap, within(sight.first(j)), within(sight.last(j)));
    if (task->value_scales) weigh<true>(scratch, block);
    else weigh<false>(scratch, block);
    int64_t column = 0;
    for (; column + kWidth <= scratch.value_width; column += kWidth)
        add_values<Unit, kColumns>(scratch, block, begin, end, column);
    for (; column < scratch.value_width; column += kLanes) add_values<Unit, 1>(scratch, block, begin, end, column);
}

// Several queries of a row, each of which sees the tokens up to its own.
template <class Activation, class Element, class Unit>
inline void attend_tiles(const pw_attention *task, const pw_attended &item, const TileScratch<Unit> &scratch) {
    pack_queries<Unit, Activation>(task, item, scratch);
    for (int64_t t = 0; t < kKeys; ++t) scratch.key_factors[t] = scratch.factor;
    for (int64_t i = 0; i < scratch.blocks * kRows; ++i) {
        const float peak = first_peak(task, item.head * scratch.repeats + i % scratch.repeats);
        scratch.peaks[i] = peak * (float)kLog2E;
        store(scratch.totals + i * kLanes, first_total(task, peak));
        for (int64_t c = 0; c < scratch.value_width; c += kLanes)
            store(scratch.sums + i * scratch.value_width + c, Floats{});
    }
    const Sight sight{item.position, scratch.heads, scratch.repeats, task->window > 0 ? task->window : INT64_MAX};
    const int64_t first = sight.first(0), last = item.position + item.count;
    for (int64_t place = first / kKeys * kKeys; place < last; place += kKeys) {
        load_tile<Unit, Element>(task, item, place, first, last, scratch);
        for (int64_t block = 0; block < scratch.blocks; ++block) attend_tile(task, scratch, sight, place, block);
    }
    for (int64_t i = 0; i < scratch.heads; ++i) {
        const float total = sum_of(load<Floats>(scratch.totals + i * kLanes));
        write_mean(scratch.sums + i * scratch.value_width, total, task->value_size,
                   (Activation *)task->out + head_at(task, item, i) * task->value_size);
    }
}

}  // namespace attention
}  // namespace
