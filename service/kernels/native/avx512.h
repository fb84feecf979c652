// AVX-512 with BF16 and VBMI: pairs of bfloat16 products are added to float32 sums, 16 outputs at a time.
#pragma once
#include <immintrin.h>

#include "linear.h"

namespace {

inline __m512 widen(__m256i bf16) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16); }

inline __m512 values16(const pw_weight &w, int64_t first) {
    if (w.scale_type == PW_SCALE_F32) return _mm512_loadu_ps((const float *)w.scales + first);
    const __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)w.scales + first));
    return w.scale_type == PW_SCALE_BF16 ? widen(bits) : _mm512_cvtph_ps(bits);
}

inline __m512 scales16(const pw_weight &w, int64_t strip, int64_t group) { return values16(w, scales_at(w, strip, group)); }

inline __m512 offsets16(const pw_weight &w, int64_t strip, int64_t group) {
    return values16(w, scales_at(w, strip, group) + kStrip);
}

inline __m512 zero_points16(const pw_weight &w, int64_t strip, int64_t group) {
    uint64_t nibbles;
    __builtin_memcpy(&nibbles, w.zero_points + (strip * num_groups(w) + group) * (kStrip / 2), 8);
    const __m128i bytes = _mm_cvtsi64_si128((long long)nibbles);
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
}

struct Avx512 {
    typedef uint16_t X;
    typedef uint32_t Pair;  // two bfloat16, the first one in the low half
    typedef __m512i Weights;
    typedef __m512 Sums;
    static constexpr int kVectors = 1;
    static constexpr bool kReadsBf16 = true;
    static constexpr int64_t kFewRows = 16, kPanelRows = 12, kPanelStrips = 2;
    static constexpr int kPanelVectors = 2;
    static constexpr int64_t kPrefetch = 2048;

    static __m512 zero() { return _mm512_setzero_ps(); }
    static void add(__m512 &sum, __m512 other) { sum = _mm512_add_ps(sum, other); }
    static void multiply_add(__m512 &sum, __m512i weights, const Pair *x) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)*x));
    }
    static void fold(const __m512 *sums, int count, float *out) {
        for (int v = 0; v < count; ++v) _mm512_store_ps(out + v * kStrip, sums[v]);
    }

    static void write(uint16_t *y, int64_t size, const float *sums, const float *scales, const uint16_t *bias) {
        const __mmask16 mask = (__mmask16)((1u << size) - 1);
        __m512 value = _mm512_load_ps(sums);
        if (scales) value = _mm512_mul_ps(value, _mm512_load_ps(scales));
        if (bias) value = _mm512_add_ps(value, widen(_mm256_maskz_loadu_epi16(mask, bias)));
        _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }

    static float sum(const uint16_t *x, int64_t size) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t k = 0; k < size; k += 16) {
            const __mmask16 mask = size - k >= 16 ? 0xffff : (__mmask16)((1u << (size - k)) - 1);
            total = _mm512_add_ps(total, widen(_mm256_maskz_loadu_epi16(mask, x + k)));
        }
        return _mm512_reduce_add_ps(total);
    }

    // 16 rows of 16 pairs to 16 pairs of 16 rows.
    static void transpose(__m512i lines[16]) {
        __m512i t[16];
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; ++j) {
                lines[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
                lines[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
            }
        for (int j = 0; j < 4; ++j) {  // line i + j: pair j of every four, rows i .. i + 3
            t[j] = _mm512_shuffle_i32x4(lines[j], lines[4 + j], 0x88);
            t[4 + j] = _mm512_shuffle_i32x4(lines[j], lines[4 + j], 0xdd);
            t[8 + j] = _mm512_shuffle_i32x4(lines[8 + j], lines[12 + j], 0x88);
            t[12 + j] = _mm512_shuffle_i32x4(lines[8 + j], lines[12 + j], 0xdd);
        }
        for (int j = 0; j < 4; ++j) {
            lines[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
            lines[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
            lines[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
            lines[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
        }
    }

    static void pack_pairs(const uint16_t *x, int64_t stride, int64_t rows, int64_t padded, int64_t columns,
                           int64_t pairs, Pair *out) {
        const __mmask16 row_mask = (__mmask16)((1u << padded) - 1);
        for (int64_t p = 0; p < pairs; p += 16) {  // columns are padded to tiles of 16 pairs
            const int64_t left = columns - 2 * p;
            const __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
            __m512i lines[16];
            for (int m = 0; m < 16; ++m)
                lines[m] = m < rows ? _mm512_maskz_loadu_epi16(mask, x + m * stride + 2 * p) : _mm512_setzero_si512();
            transpose(lines);
            for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(out + (p + i) * padded, row_mask, lines[i]);
        }
    }

    // What the sums of a group are multiplied with, and what zero points take away, or offsets add.
    struct Scales {
        bool has_offsets;
        __m512 scales, shifts;
        Scales(const pw_weight &w, int64_t strip, int64_t group)
            : has_offsets(w.has_offsets), scales(scales16(w, strip, group)), shifts(_mm512_setzero_ps()) {
            if (needs_sums(w)) shifts = has_offsets ? offsets16(w, strip, group) : zero_points16(w, strip, group);
        }
        void accumulate(float *total, const __m512 *sums, const float *x_sum) const {
            __m512 value = sums[0], before = _mm512_load_ps(total);
            if (x_sum && has_offsets) before = _mm512_fmadd_ps(shifts, _mm512_set1_ps(*x_sum), before);
            if (x_sum && !has_offsets) value = _mm512_fnmadd_ps(shifts, _mm512_set1_ps(*x_sum), value);
            _mm512_store_ps(total, _mm512_fmadd_ps(value, scales, before));
        }
    };

    // Scales decoded weights of a group; group -1: leaves them as they are.
    struct WeightScales {
        bool used;
        __m512 scales, offsets;  // which are subtracted
        WeightScales(const pw_weight &w, int64_t strip, int64_t group) : used(group >= 0) {
            if (!used) return;
            scales = scales16(w, strip, group);
            offsets = w.zero_points ? _mm512_mul_ps(scales, zero_points16(w, strip, group)) : _mm512_setzero_ps();
            if (w.has_offsets) offsets = _mm512_sub_ps(offsets, offsets16(w, strip, group));
        }
        __m512i apply(__m512i row, int) const {
            if (!used) return row;
            const __m512 even = (__m512)_mm512_slli_epi32(row, 16);
            const __m512 odd = (__m512)_mm512_and_si512(row, _mm512_set1_epi32((int)0xffff0000));
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_fmsub_ps(odd, scales, offsets), _mm512_fmsub_ps(even, scales, offsets));
            const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            return _mm512_permutexvar_epi16(order, (__m512i)both);
        }
    };

    static int64_t few_size(int64_t rows) { return rows <= 4 ? rows : rows <= 8 ? (rows + 1) / 2 * 2 : (rows + 3) / 4 * 4; }
    static int64_t panel_size(int64_t rows) { return (rows + 1) / 2 * 2; }

    template <class D>
    static void few(int64_t size, const pw_linear_task *task, const Rows<Avx512> &plan, int64_t index, int64_t begin, int64_t end) {
        switch (size) {
            case 1: return few_rows<Avx512, D, 1>(task, plan, index, begin, end);
            case 2: return few_rows<Avx512, D, 2>(task, plan, index, begin, end);
            case 3: return few_rows<Avx512, D, 3>(task, plan, index, begin, end);
            case 4: return few_rows<Avx512, D, 4>(task, plan, index, begin, end);
            case 6: return few_rows<Avx512, D, 6>(task, plan, index, begin, end);
            case 8: return few_rows<Avx512, D, 8>(task, plan, index, begin, end);
            case 12: return few_rows<Avx512, D, 12>(task, plan, index, begin, end);
            default: return few_rows<Avx512, D, 16>(task, plan, index, begin, end);
        }
    }

    static void panel(int64_t size, const pw_linear_task *task, const Rows<Avx512> &plan, int64_t index, int64_t strip, int64_t strips, const Weights *panel) {
        switch (size) {
            case 2: return panel_rows<Avx512, 2>(task, plan, index, strip, strips, panel);
            case 4: return panel_rows<Avx512, 4>(task, plan, index, strip, strips, panel);
            case 6: return panel_rows<Avx512, 6>(task, plan, index, strip, strips, panel);
            case 8: return panel_rows<Avx512, 8>(task, plan, index, strip, strips, panel);
            case 10: return panel_rows<Avx512, 10>(task, plan, index, strip, strips, panel);
            default: return panel_rows<Avx512, 12>(task, plan, index, strip, strips, panel);
        }
    }

    // Four outputs at a time, ROWS of activations: y = x W^T + bias with weights bf16[out][in].
    template <int ROWS>
    static void unquantized(const pw_linear_task *task, int64_t row, int64_t output, int64_t outputs) {
        const int64_t columns = task->weight->in_features;
        const uint16_t *x = (const uint16_t *)task->x + row * task->x_stride, *weights[4];
        for (int n = 0; n < 4; ++n)
            weights[n] = (const uint16_t *)task->weight->qweight + (output + (n < outputs ? n : 0)) * columns;
        __m512 sums[4][ROWS];
        for (int n = 0; n < 4; ++n)
            for (int m = 0; m < ROWS; ++m) sums[n][m] = _mm512_setzero_ps();
        for (int64_t k = 0; k < columns; k += 32) {
            const __mmask32 mask = columns - k >= 32 ? 0xffffffffu : (1u << (columns - k)) - 1;
            __m512bh operand[ROWS];
            for (int m = 0; m < ROWS; ++m)
                operand[m] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + m * task->x_stride + k);
            for (int n = 0; n < 4; ++n) {
                __builtin_prefetch(weights[n] + k + kPrefetch / 2);
                const __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(mask, weights[n] + k);
                for (int m = 0; m < ROWS; ++m) sums[n][m] = _mm512_dpbf16_ps(sums[n][m], weight, operand[m]);
            }
        }
        for (int m = 0; m < ROWS; ++m)
            for (int n = 0; n < outputs; ++n) write_one<Avx512>(task, row + m, output + n, _mm512_reduce_add_ps(sums[n][m]));
    }
};

// bfloat16 of the integers 0..127, in two tables of bytes: an index reads its low seven bits only.
struct Int8Tables {
    alignas(64) uint8_t low[128], high[128];
    constexpr Int8Tables() : low{}, high{} {
        for (int i = 1; i < 128; ++i) {
            int exponent = 0;
            while (i >> (exponent + 1)) ++exponent;
            const int mantissa = (i << (7 - exponent)) & 127, bits = (127 + exponent) << 7 | mantissa;
            low[i] = (uint8_t)(bits & 255);
            high[i] = (uint8_t)(bits >> 8);
        }
    }
};
constexpr Int8Tables kInt8Tables;

// int8: the bytes of a bfloat16 are looked up by magnitude, the sign is put in front.
struct Int8 {
    static constexpr int kHalfBytes = 256;
    __m512i low0, low1, high0, high1;
    explicit Int8(const pw_weight &) {
        low0 = _mm512_load_si512(kInt8Tables.low);
        low1 = _mm512_load_si512(kInt8Tables.low + 64);
        high0 = _mm512_load_si512(kInt8Tables.high);
        high1 = _mm512_load_si512(kInt8Tables.high + 64);
    }
    void decode(const uint8_t *codes, __m512i rows[kHalfPairs][1]) const {
        const __m512i sign = _mm512_set1_epi8((char)0x80);
#pragma GCC unroll 4
        for (int z = 0; z < 4; ++z) {
            const __m512i code = _mm512_loadu_si512(codes + 64 * z), magnitude = _mm512_abs_epi8(code);
            const __m512i low = _mm512_permutex2var_epi8(low0, magnitude, low1);
            __m512i high = _mm512_permutex2var_epi8(high0, magnitude, high1);
            high = _mm512_ternarylogic_epi32(high, code, sign, 0xf8);  // high | (code & sign)
            rows[2 * z][0] = _mm512_unpacklo_epi8(low, high);
            rows[2 * z + 1][0] = _mm512_unpackhi_epi8(low, high);
        }
    }
};

// 4-bit codes through a table of 16 levels, held twice: an index reads its low five bits only, so nothing is masked.
struct Table4 {
    static constexpr int kHalfBytes = 128;
    __m512i levels;
    explicit Table4(const pw_weight &w) {
        alignas(64) uint16_t twice[32];
        for (int i = 0; i < 32; ++i) twice[i] = float_to_bf16(w.levels[i % 16]);
        levels = _mm512_load_si512(twice);
    }
    void decode(const uint8_t *codes, __m512i rows[kHalfPairs][1]) const {
#pragma GCC unroll 2
        for (int z = 0; z < 2; ++z) {
            const __m512i words = _mm512_loadu_si512(codes + 64 * z);
            rows[4 * z][0] = _mm512_permutexvar_epi16(words, levels);
            rows[4 * z + 1][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), levels);
            rows[4 * z + 2][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), levels);
            rows[4 * z + 3][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), levels);
        }
    }
};

}  // namespace
