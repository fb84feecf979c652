// Vectors of float32 for any processor: pairs of products are kept apart until a sum is complete, lane by lane.
// LANES floats make a vector, 4 for 16-byte registers, 8 for AVX2.
#pragma once
#include "linear.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

template <int LANES>
struct Lanes;
template <>
struct Lanes<4> {
    typedef float Floats __attribute__((vector_size(16)));
    typedef double Doubles __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
    typedef int8_t Bytes __attribute__((vector_size(4)));
    typedef uint16_t Words __attribute__((vector_size(8)));
};
template <>
struct Lanes<8> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef double Doubles __attribute__((vector_size(32)));
    typedef int32_t Ints __attribute__((vector_size(32)));
    typedef int8_t Bytes __attribute__((vector_size(8)));
    typedef uint16_t Words __attribute__((vector_size(16)));
};

template <int LANES, class ACTIVATION = uint16_t>
struct FloatVectors {
    typedef ACTIVATION X;
    typedef typename Lanes<LANES>::Floats Floats;
    struct Pair {
        float even, odd;
    };
    typedef Floats Weights;
    typedef Floats Sums;
    static constexpr int kVectors = 32 / LANES;
    static constexpr bool kReadsBf16 = false;
    static constexpr int64_t kFewRows = 2, kPanelRows = 6, kPanelStrips = 1;
    static constexpr int kPanelVectors = 2;
    static constexpr int64_t kPrefetch = 1024;

    static Floats zero() { return Floats{}; }
    static void add(Floats &sum, Floats other) { sum += other; }
    static void multiply_add(Floats &sum, Floats weights, const Pair *x) {
        double both;  // two floats, as one value that every pair of lanes gets
        __builtin_memcpy(&both, x, sizeof both);
        typename Lanes<LANES>::Doubles pairs;
        for (int i = 0; i < LANES / 2; ++i) pairs[i] = both;
        sum += weights * (Floats)pairs;
    }
    // Adds neighbours: LANES / 2 outputs of each vector.
    static void fold(const Floats *sums, int count, float *out) {
        for (int v = 0; v < count; ++v)
            for (int i = 0; i < LANES / 2; ++i) out[v * (LANES / 2) + i] = sums[v][2 * i] + sums[v][2 * i + 1];
    }

    static void write(X *y, int64_t size, const float *sums, const float *scales, const X *bias) {
        for (int64_t n = 0; n < size; ++n) {
            const float value = scales ? sums[n] * scales[n] : sums[n];
            from_float(bias ? value + to_float(bias[n]) : value, y + n);
        }
    }

    static float sum(const X *x, int64_t size) {
        float parts[8] = {};
        for (int64_t k = 0; k < size; ++k) parts[k % 8] += to_float(x[k]);
        return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    }

    static void pack_pairs(const X *x, int64_t stride, int64_t rows, int64_t padded, int64_t columns,
                           int64_t pairs, Pair *out) {
        for (int64_t m = 0; m < padded; ++m)
            for (int64_t p = 0; p < pairs; ++p) {
                const bool even = m < rows && 2 * p < columns, odd = m < rows && 2 * p + 1 < columns;
                out[p * padded + m] = {even ? to_float(x[m * stride + 2 * p]) : 0,
                                       odd ? to_float(x[m * stride + 2 * p + 1]) : 0};
            }
    }

    struct Scales {
        float scales[kStrip], zero_points[kStrip] = {}, offsets[kStrip] = {};
        Scales(const pw_weight &w, int64_t strip, int64_t group) {
            load_scales(w, strip, group, scales);
            if (w.zero_points) load_zero_points(w, strip, group, zero_points);
            if (w.has_offsets) load_offsets(w, strip, group, offsets);
        }
        void accumulate(float *total, const Floats *sums, const float *x_sum) const {
            float folded[kStrip];
            fold(sums, kVectors, folded);
            const float x = x_sum ? *x_sum : 0;
            for (int n = 0; n < kStrip; ++n) total[n] += (folded[n] - zero_points[n] * x) * scales[n] + offsets[n] * x;
        }
    };

    struct WeightScales {
        bool used;
        Floats scales[kVectors], zero_points[kVectors], offsets[kVectors];
        WeightScales(const pw_weight &w, int64_t strip, int64_t group) : used(group >= 0) {
            if (!used) return;
            float scale[kStrip], zero_point[kStrip] = {}, offset[kStrip] = {};
            load_scales(w, strip, group, scale);
            if (w.zero_points) load_zero_points(w, strip, group, zero_point);
            if (w.has_offsets) load_offsets(w, strip, group, offset);
            for (int lane = 0; lane < 32; ++lane) {
                scales[lane / LANES][lane % LANES] = scale[lane / 2];
                zero_points[lane / LANES][lane % LANES] = zero_point[lane / 2];
                offsets[lane / LANES][lane % LANES] = offset[lane / 2];
            }
        }
        Floats apply(Floats weights, int v) const {
            return used ? (weights - zero_points[v]) * scales[v] + offsets[v] : weights;
        }
    };

    // Four outputs at a time, ROWS of activations: y = x W^T + bias with weights bf16[out][in].
    template <int ROWS>
    static void unquantized(const pw_linear_task *task, int64_t row, int64_t output, int64_t outputs) {
        const int64_t columns = task->weight->in_features;
        for (int64_t n = output; n < output + outputs; ++n) {
            const uint16_t *weights = (const uint16_t *)task->weight->qweight + n * columns;
            for (int m = 0; m < ROWS; ++m) {
                const X *x = (const X *)task->x + (row + m) * task->x_stride;
                Floats sums[4] = {};
                int64_t k = 0;
                for (; k + 4 * LANES <= columns; k += 4 * LANES)
                    for (int i = 0; i < 4; ++i) sums[i] += widen(weights + k + i * LANES) * widen(x + k + i * LANES);
                const Floats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                float total = 0;
                for (int i = 0; i < LANES; ++i) total += all[i];
                for (; k < columns; ++k) total += bf16_to_float(weights[k]) * to_float(x[k]);
                write_one<FloatVectors>(task, row + m, n, total);
            }
        }
    }

    static Floats widen(const uint16_t *bf16) {
        typename Lanes<LANES>::Words words;
        __builtin_memcpy(&words, bf16, sizeof words);
        return (Floats)(__builtin_convertvector(words, typename Lanes<LANES>::Ints) << 16);
    }

    static Floats widen(const float *values) {
        Floats floats;
        __builtin_memcpy(&floats, values, sizeof floats);
        return floats;
    }

    static int64_t few_size(int64_t rows) { return rows; }
    static int64_t panel_size(int64_t rows) { return (rows + 1) / 2 * 2; }

    template <class D>
    static void few(int64_t size, const pw_linear_task *task, const Rows<FloatVectors> &plan, int64_t index,
                    int64_t begin, int64_t end) {
        if (size == 1) return few_rows<FloatVectors, D, 1>(task, plan, index, begin, end);
        return few_rows<FloatVectors, D, 2>(task, plan, index, begin, end);
    }

    static void panel(int64_t size, const pw_linear_task *task, const Rows<FloatVectors> &plan, int64_t index,
                      int64_t strip, int64_t strips, const Weights *panel) {
        switch (size) {
            case 2: return panel_rows<FloatVectors, 2>(task, plan, index, strip, strips, panel);
            case 4: return panel_rows<FloatVectors, 4>(task, plan, index, strip, strips, panel);
            default: return panel_rows<FloatVectors, 6>(task, plan, index, strip, strips, panel);
        }
    }
};

template <int LANES>
struct Int8Floats {
    typedef FloatVectors<LANES> V;
    static constexpr int kHalfBytes = 256;
    explicit Int8Floats(const pw_weight &) {}
    void decode(const uint8_t *codes, typename V::Weights rows[kHalfPairs][V::kVectors]) const {
        for (int r = 0; r < kHalfPairs; ++r)
            for (int v = 0; v < V::kVectors; ++v) {
                const int lane = v * LANES;
                rows[r][v] = to_floats(codes + 64 * (r / 2) + 16 * (lane / 8) + 8 * (r % 2) + lane % 8);
            }
    }
    static typename V::Floats to_floats(const uint8_t *codes) {
#ifdef __AVX2__  // gcc 12 converts one by one
        return (typename V::Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
#else
        typename Lanes<LANES>::Bytes bytes;
        __builtin_memcpy(&bytes, codes, LANES);
        return __builtin_convertvector(__builtin_convertvector(bytes, typename Lanes<LANES>::Ints), typename V::Floats);
#endif
    }
};

template <int LANES>
struct Table4Floats {
    typedef FloatVectors<LANES> V;
    typedef typename Lanes<LANES>::Ints Ints;
    static constexpr int kHalfBytes = 128;
    float levels[16];
    explicit Table4Floats(const pw_weight &w) {
        for (int i = 0; i < 16; ++i) levels[i] = w.levels[i];
    }
    void decode(const uint8_t *codes, typename V::Weights rows[kHalfPairs][V::kVectors]) const {
        for (int z = 0; z < 2; ++z)
            for (int v = 0; v < V::kVectors; ++v) {
                Ints wide = to_ints(codes + 64 * z + 2 * v * LANES);
                for (int j = 0; j < 4; ++j, wide >>= 4) rows[4 * z + j][v] = look_up(wide & 15);
            }
    }
    static Ints to_ints(const uint8_t *words) {
#ifdef __AVX2__
        return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)words));
#else
        typename Lanes<LANES>::Words narrow;
        __builtin_memcpy(&narrow, words, sizeof narrow);
        return __builtin_convertvector(narrow, Ints);
#endif
    }
    typename V::Floats look_up(Ints index) const {
#ifdef __AVX2__
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), (__m256i)index);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), (__m256i)index);
        return (typename V::Floats)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32((__m256i)index, 28));
#else
        typename V::Floats values;
        for (int i = 0; i < LANES; ++i) values[i] = levels[index[i]];
        return values;
#endif
    }
};

}  // namespace
