// Encoders: weights are rounded and packed into tiles in one pass. One source for all instruction sets, in vectors of
// the compiler; included once per unit.
//
// A worker takes a strip: each row is widened to float32, its groups are measured and rounded to one byte per code,
// and the 16 rows of codes, still in the L2, are then laid into tiles. Codes, scales and zero points are bit for bit
// those of numerics/affine.py and numerics/codebook.py: the same operations in the same order, of which no two can be
// contracted to one. Only the sums of squares may differ in their last bits from one instruction set to another.
#pragma once
#include "encode_tiles.h"
#include "encode_vectors.h"
#include "linear.h"

namespace {
namespace encoding {

// Adding it to a number below 2^22 leaves the integer that is nearest, ties to even, in the low bits.
constexpr float kRounder = 12582912.0f;
constexpr uint32_t kRounderBits = 0x4b400000;

// Part of a row: whole groups, few enough to stay in the L1, or, if the row is one group, all of it.
constexpr int64_t kPartColumns = 2048;
constexpr int64_t kPartGroups = kPartColumns / 16;

template <class Source>
struct Part {
    typedef typename Source::Element Element;
    const Element *source;
    const Element *next;  // of the part after it, to prefetch; behind the last there is none, which does no harm
    int64_t columns, group_columns, groups;
    Element highs[kPartGroups], lows[kPartGroups];  // of groups: at least and at most 0
    float scales[kPartGroups], zero_points[kPartGroups], reciprocals[kPartGroups];

    int64_t group_begin(int64_t group) const { return group * group_columns; }
    int64_t group_end(int64_t group) const { return min64((group + 1) * group_columns, columns); }
};

template <class Source>
void measure_part(Part<Source> &part) {
    typedef typename Source::Bits Bits;
    typedef typename Source::SignedBits SignedBits;
    constexpr int kSign = 8 * sizeof(typename Source::Element) - 1;
    const Bits negative_zero = Bits{} + (typename Source::Element)((uint32_t)1 << kSign);
    __builtin_memset(part.highs, 0, sizeof part.highs);
    __builtin_memset(part.lows, 0, sizeof part.lows);
    for (int64_t group = 0; group < part.groups; ++group) {
        const int64_t end = part.group_end(group);
        int64_t k = part.group_begin(group);
        SignedBits high = {};
        Bits low = negative_zero;
        for (; k + kLanes <= end; k += kLanes) {
            const Bits bits = load<Bits>(part.source + k);
            high = larger((SignedBits)bits, high);
            low = larger(bits, low);
        }
        if (k < end) {
            const Bits bits = load_first<Source>(part.source + k, end - k);
            high = larger((SignedBits)bits, high);
            low = larger(bits, low);
        }
        part.highs[group] = largest((Bits)high);
        part.lows[group] = largest(low);
    }
}

inline Ints is_tiny(Floats values) { return (Ints)(((Words)values & 0x7fffffffu) < 0x00800000u); }

inline Floats stored_scales(Floats scales, int32_t scale_type) {
    Words bits = (Words)scales;
    if (scale_type == PW_SCALE_BF16) bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    return is_tiny((Floats)bits) ? all(1) : (Floats)bits;
}

// Scales and zero points from the ranges of the groups; gives the largest magnitude.
template <class Source>
float fit_part(const pw_encode_task &task, Part<Source> &part) {
    const pw_weight &w = *task.weight;
    const bool has_codebook = task.source->codebook, is_int8 = w.format == PW_INT8;
    Words magnitudes = {};
    for (int64_t group = 0; group < part.groups; group += kLanes) {
        const Floats high = Source::decode(load<typename Source::Bits>(part.highs + group));
        const Floats low = Source::decode(load<typename Source::Bits>(part.lows + group));
        const Floats magnitude = (Floats)larger((Words)high, (Words)low & 0x7fffffffu);
        magnitudes = larger(magnitudes, (Words)magnitude);
        Floats scales, zero_points = {};
        if (has_codebook) {
            scales = stored_scales(magnitude, w.scale_type);
            store(part.reciprocals + group, is_tiny(magnitude) ? Floats{} : 1 / magnitude);
        } else if (is_int8) {
            scales = stored_scales(magnitude / 127, w.scale_type);
        } else if (w.zero_points) {
            scales = stored_scales(high / 15 - low / 15, w.scale_type);
            zero_points = smaller(larger(kRounder - (low / scales + kRounder), Floats{}), all(15));
        } else {
            scales = stored_scales((high >= -low ? high : low) / -8, w.scale_type);
            zero_points = all(8);
        }
        store(part.scales + group, scales);
        store(part.zero_points + group, zero_points);
    }
    const uint32_t bits = largest(magnitudes);
    return load<float>(&bits);
}

// What is known of one group.
struct Fit {
    float scale, zero_point, reciprocal;
    const pw_codebook *codebook;
};

// Schemes turn weights into codes, and into levels: what codes stand for, in units of the scale.
// CLAMPED from above alone: to the lowest weight of a group the scale and the zero point give a code of 0 or more.
template <bool CLAMPED>
struct Affine {
    Floats scale, most;
    Words offset;

    explicit Affine(const Fit &fit) {
        scale = all(fit.scale);
        most = all(15 - fit.zero_point);
        offset = Words{} + ((uint32_t)fit.zero_point - kRounderBits);
    }
    Words encode(Floats w, Floats &levels) const {
        Floats ratios = w / scale;
        if (CLAMPED) ratios = smaller(ratios, most);  // an integer: as if after rounding
        const Floats rounded = ratios + kRounder;
        levels = rounded - kRounder;
        return (Words)rounded + offset;
    }
};

struct Codebook {
    Floats reciprocal;
    const pw_codebook &book;

    explicit Codebook(const Fit &fit) : reciprocal(all(fit.reciprocal)), book(*fit.codebook) {}
    Words encode(Floats w, Floats &levels) const {
        const Floats ratios = w * reciprocal;
        Words codes = Words{} + book.codes[0];
        levels = all(book.levels[0]);
        for (int i = 1; i < 16; ++i) {
            const Ints above = ratios > book.bounds[i - 1];
            codes = above ? Words{} + book.codes[i] : codes;
            levels = above ? all(book.levels[i]) : levels;
        }
        return codes;
    }
};

// Sums of squares of weights and errors. Weights are multiplied with a power of two that brings them near 1, and the
// squares of kRun vectors are added up in float32. What codes stand for is not rounded to float32 here.
struct Squares {
    static constexpr int kRun = 16;
    float factor;
    double unit;  // of squares
    Doubles signal[2] = {}, noise[2] = {};

    // For weights of a largest magnitude in 2^e .. 2^(e+1): 2^-e, as far as it is a normal number.
    void set_factor(float magnitude) {
        const int32_t exponent = load<int32_t>(&magnitude) >> 23;
        const int32_t bits = (exponent > 253 ? 1 : 254 - exponent) << 23;
        factor = load<float>(&bits);
        unit = 1 / ((double)factor * factor);
    }
    void add(Doubles sums[2], Floats squares) const {
        HalfFloats halves[2];
        __builtin_memcpy(halves, &squares, sizeof squares);
        for (int i = 0; i < 2; ++i) sums[i] += widen(halves[i]) * unit;
    }
    static double total(const Doubles sums[2]) {
        const Doubles both = sums[0] + sums[1];
        double total = 0;
        for (int i = 0; i < kLanes / 2; ++i) total += both[i];
        return total;
    }
};

// Not inlined, for otherwise the compiler keeps nothing of it in registers.
template <class Source, class Scheme>
__attribute__((noinline)) void round_part(const Part<Source> &part, const pw_codebook *codebook,
                                          int8_t *__restrict codes, Squares &squares) {
    const Floats factor = all(squares.factor);
    Floats signal = {}, noise = {};
    int vectors = 0;
    for (int64_t group = 0; group < part.groups; ++group) {
        const Scheme scheme({part.scales[group], part.zero_points[group], part.reciprocals[group], codebook});
        const Floats scale = all(part.scales[group]) * factor;
        const int64_t end = part.group_end(group);
        for (int64_t k = part.group_begin(group); k < end; k += kLanes) {
            __builtin_prefetch(part.next + k);
            const Floats w = Source::decode(end - k >= kLanes ? load<typename Source::Bits>(part.source + k)
                                                              : load_first<Source>(part.source + k, end - k));
            Floats levels;
            store(codes + k, __builtin_convertvector(scheme.encode(w, levels), Bytes));
            const Floats value = w * factor, error = multiply_add(-levels, scale, value);
            signal = multiply_add(value, value, signal);
            noise = multiply_add(error, error, noise);
            if (++vectors % Squares::kRun) continue;
            squares.add(squares.signal, signal);
            squares.add(squares.noise, noise);
            signal = noise = Floats{};
        }
    }
    squares.add(squares.signal, signal);
    squares.add(squares.noise, noise);
}

// Writes scales and zero points of groups `first` and following of one row.
inline void write_groups(const pw_weight &w, int64_t row, int64_t first, int64_t groups, const float *scales,
                         const float *zero_points) {
    const int64_t at = (row / kStrip * num_groups(w) + first) * kStrip + row % kStrip;
    for (int64_t g = 0; g < groups; ++g) {
        if (w.scale_type == PW_SCALE_F32)
            ((float *)w.scales)[at + g * kStrip] = scales[g];
        else
            ((uint16_t *)w.scales)[at + g * kStrip] = (uint16_t)(load<uint32_t>(scales + g) >> 16);
    }
    if (!w.zero_points) return;
    uint8_t *pairs = (uint8_t *)w.zero_points + at / 2;
    for (int64_t g = 0; g < groups; ++g) {  // the lower output of a pair comes first
        uint8_t &pair = pairs[g * (kStrip / 2)];
        pair = (uint8_t)(row % 2 ? pair | (int)zero_points[g] << 4 : (int)zero_points[g]);
    }
}

inline int64_t padded_width(const pw_weight &w) { return num_tiles(w) * kTile; }

// The scratch of a worker: 16 rows of codes, which must not share sets of the L1.
inline int64_t codes_stride(const pw_weight &w) { return padded_width(w) + 64; }
inline size_t encode_scratch_bytes(const pw_encode_task *task) {
    return (size_t)(kStrip * codes_stride(*task->weight));
}

template <class Source, class Scheme>
void encode_row(const pw_encode_task &task, int64_t row, Part<Source> &part, int8_t *codes, Squares &squares) {
    typedef typename Source::Element Element;
    const pw_weight &w = *task.weight;
    const Element *source = (const Element *)task.source->weights + row * task.source->row_stride;
    const int64_t groups = num_groups(w);
    const int64_t step = w.group_size && w.group_size <= kPartColumns ? kPartColumns / w.group_size : 1;
    part.group_columns = w.group_size ? w.group_size : w.in_features;
    for (int64_t group = 0; group < groups; group += step) {
        const int64_t first = group * part.group_columns;
        part.source = source + first;
        part.groups = min64(step, groups - group);
        part.next = group + step < groups ? part.source + step * part.group_columns : source + task.source->row_stride;
        part.columns = min64(part.groups * part.group_columns, w.in_features - first);
        measure_part(part);
        squares.set_factor(fit_part(task, part));
        round_part<Source, Scheme>(part, task.source->codebook, codes + first, squares);
        write_groups(w, row, group, part.groups, part.scales, part.zero_points);
    }
    __builtin_memset(codes + w.in_features, 0, (size_t)(padded_width(w) - w.in_features));
}

inline void fill_row(const pw_weight &w, int64_t row, int8_t *codes) {
    __builtin_memset(codes, 0, (size_t)padded_width(w));
    const float scale = 1, zero_point = 0;
    for (int64_t group = 0; group < num_groups(w); ++group) write_groups(w, row, group, 1, &scale, &zero_point);
}

template <bool NIBBLES>
__attribute__((noinline)) void pack_strip(const pw_weight &w, const int8_t *codes, int64_t strip) {
    constexpr int64_t kTileBytes = kStrip * kTile / (NIBBLES ? 2 : 1);
    uint8_t *tiles = (uint8_t *)w.qweight + strip * num_tiles(w) * kTileBytes;
    for (int64_t tile = 0; tile < num_tiles(w); ++tile)
        pack_tile<NIBBLES>(codes + tile * kTile, codes_stride(w), tiles + tile * kTileBytes);
}

template <class Source, class Scheme>
void encode_strips_as(const pw_encode_task &task, int64_t begin, int64_t end, int8_t *codes) {
    const pw_weight &w = *task.weight;
    Part<Source> part{};
    for (int64_t strip = begin; strip < end; ++strip) {
        Squares squares;
        for (int64_t i = 0; i < kStrip; ++i) {
            const int64_t row = strip * kStrip + i;
            if (row < w.out_features)
                encode_row<Source, Scheme>(task, row, part, codes + i * codes_stride(w), squares);
            else
                fill_row(w, row, codes + i * codes_stride(w));
        }
        if (w.format == PW_INT8)
            pack_strip<false>(w, codes, strip);
        else
            pack_strip<true>(w, codes, strip);
        end_streams();
        task.sums[strip][0] = Squares::total(squares.signal);
        task.sums[strip][1] = Squares::total(squares.noise);
    }
}

template <class Source>
void encode_strips_of(const pw_encode_task &task, int64_t begin, int64_t end, int8_t *codes) {
    if (task.source->codebook) return encode_strips_as<Source, Codebook>(task, begin, end, codes);
    if (task.weight->format == PW_INT8) return encode_strips_as<Source, Affine<false>>(task, begin, end, codes);
    return encode_strips_as<Source, Affine<true>>(task, begin, end, codes);
}

inline void encode_strips(const pw_encode_task *task, int64_t begin, int64_t end, void *scratch) {
    int8_t *codes = (int8_t *)scratch;
    switch (task->source->dtype) {
        case PW_FLOAT32: return encode_strips_of<Float32>(*task, begin, end, codes);
        case PW_BFLOAT16: return encode_strips_of<Bfloat16>(*task, begin, end, codes);
        default: return encode_strips_of<Float16>(*task, begin, end, codes);
    }
}

}  // namespace encoding
}  // namespace
