// Encoders: codes, scales and zero points of every format against plain scalar arithmetic, in memory of the exact size,
// and the same bytes and sums from several threads.
#include <math.h>

#include <thread>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "memory.h"
#include "tests.h"
#include "units.h"

namespace {

struct Scheme {
    const char *name;
    int32_t format, scale_type;
    bool zero_points, codebook;
    int64_t group_size;
};

constexpr Scheme kSchemes[] = {{"rows", PW_INT8, PW_SCALE_F32, false, false, 0},
                               {"int8", PW_INT8, PW_SCALE_BF16, false, false, 48},
                               {"asymmetric", PW_TABLE4, PW_SCALE_BF16, true, false, 64},
                               {"symmetric", PW_TABLE4, PW_SCALE_BF16, false, false, 16},
                               {"codebook", PW_TABLE4, PW_SCALE_F32, false, true, 64},
                               {"wide groups", PW_TABLE4, PW_SCALE_BF16, true, false, 4096}};

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

float round_to_bf16(float value) {
    const uint32_t bits = bits_of(value), half = bits & 0xffff, even = bits & 0xffff0000u;
    const bool up = half > 0x8000 || (half == 0x8000 && (bits & 0x10000));
    return float_of(even + (up ? 0x10000 : 0));
}

float half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent ? ldexpf((float)(1024 + fraction), exponent - 25) : ldexpf((float)fraction, -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

pw_codebook make_codebook() {
    pw_codebook book;
    for (int i = 0; i < 16; ++i) {
        book.levels[i] = ((float)i - 7) / 8 * (1 + (float)i / 32);
        book.codes[i] = (uint8_t)(i ^ 5);
    }
    for (int i = 0; i < 15; ++i) book.bounds[i] = (book.levels[i] + book.levels[i + 1]) / 2;
    return book;
}

const pw_codebook kBook = make_codebook();

struct Encoding {
    const Scheme scheme;
    const int64_t out, in, stride, groups, strips, tiles;
    const int32_t dtype;
    Memory source, qweight, scales, zero_points;
    double signal = -1, noise = -1;

    Encoding(const Scheme &scheme, int64_t out, int64_t in, int64_t gap, int32_t dtype)
        : scheme(scheme), out(out), in(in), stride(in + gap),
          groups(scheme.group_size ? ceiling(in, scheme.group_size) : 1), strips(ceiling(out, 16)),
          tiles(ceiling(in, 32)), dtype(dtype), source((size_t)((out - 1) * stride + in) * width(), width(), 0xff),
          qweight((size_t)(strips * tiles * (scheme.format == PW_INT8 ? 512 : 256)), 1, 0xee),
          scales((size_t)(strips * groups * 16 * (scheme.scale_type == PW_SCALE_F32 ? 4 : 2)), 4, 0xee),
          zero_points(scheme.zero_points ? (size_t)(strips * groups * 8) : 0, 1, 0xee) {
        uint32_t state = (uint32_t)(out * 31 + in);
        for (int64_t n = 0; n < out; ++n)
            for (int64_t k = 0; k < in; ++k) {
                state = state * 1664525u + 1013904223u;
                const int64_t index = n * stride + k;
                if (dtype == PW_FLOAT32) source.as<float>()[index] = ((float)(state >> 8) - 0x1p23f) * 0x1p-27f;
                // 4 octaves below 1/4, or subnormal ones of float16 in row 1
                if (dtype == PW_FLOAT16) source.as<uint16_t>()[index] = (uint16_t)(state >> 16 & (n == 1 ? 0x83ff : 0xb3ff));
                if (dtype == PW_BFLOAT16) source.as<uint16_t>()[index] = (uint16_t)((state >> 16 & 0x81ff) | 0x3c00);
            }
    }
    size_t width() const { return dtype == PW_FLOAT32 ? 4 : 2; }

    int run() {
        const pw_weight weight = {qweight.as<void>(), scales.as<void>(), zero_points.as_or_null<uint8_t>(), nullptr,
                                  out, in, scheme.group_size, scheme.format, scheme.scale_type};
        const pw_source from = {source.as<void>(), stride, scheme.codebook ? &kBook : nullptr, dtype};
        return pw_encode(&weight, &from, &signal, &noise);
    }
    float weight(int64_t n, int64_t k) const {
        const int64_t index = n * stride + k;
        if (dtype == PW_FLOAT32) return source.as<float>()[index];
        const uint16_t bits = source.as<uint16_t>()[index];
        return dtype == PW_FLOAT16 ? half_value(bits) : float_of((uint32_t)bits << 16);
    }
    int code(int64_t n, int64_t k) const {
        const int64_t tile = n / 16 * tiles + k / 32, row = k % 32 / 2, lane = 2 * (n % 16) + (k & 1);
        if (scheme.format == PW_INT8)
            return qweight.as<int8_t>()[tile * 512 + 64 * (row / 2) + 16 * (lane / 8) + 8 * (row % 2) + lane % 8];
        const uint8_t *word = qweight.as<uint8_t>() + tile * 256 + 64 * (row / 4) + 2 * lane;
        return (word[0] | word[1] << 8) >> 4 * (row % 4) & 15;
    }
    float scale(int64_t n, int64_t group) const {
        const int64_t index = (n / 16 * groups + group) * 16 + n % 16;
        if (scheme.scale_type == PW_SCALE_F32) return scales.as<float>()[index];
        return float_of((uint32_t)scales.as<uint16_t>()[index] << 16);
    }
    int zero_point(int64_t n, int64_t group) const {
        return zero_points.as<uint8_t>()[(n / 16 * groups + group) * 8 + n % 16 / 2] >> 4 * (n % 2) & 15;
    }
    bool operator==(const Encoding &other) const {
        return signal == other.signal && noise == other.noise && is_same(qweight, other.qweight) &&
               is_same(scales, other.scales) && is_same(zero_points, other.zero_points);
    }
    static bool is_same(const Memory &a, const Memory &b) {
        return a.size() == b.size() && memcmp(a.as<void>(), b.as<void>(), a.size()) == 0;
    }
};

// Checks one group, and adds up squares.
bool check_group(const Encoding &e, int64_t n, int64_t group, double *signal, double *noise) {
    const int64_t first = e.scheme.group_size * group;
    const int64_t end = e.scheme.group_size && first + e.scheme.group_size < e.in ? first + e.scheme.group_size : e.in;
    float high = 0, low = 0;
    for (int64_t k = first; k < end; ++k) {
        high = fmaxf(high, e.weight(n, k));
        low = fminf(low, e.weight(n, k));
    }
    const float largest = fmaxf(high, -low);
    float scale = e.scheme.codebook            ? largest
                  : e.scheme.format == PW_INT8 ? largest / 127
                  : e.scheme.zero_points       ? high / 15 - low / 15
                                               : (high >= -low ? high : low) / -8;
    if (e.scheme.scale_type == PW_SCALE_BF16) scale = round_to_bf16(scale);
    if (fabsf(scale) < 0x1p-126f) scale = 1;
    const int zero = e.scheme.zero_points ? (int)-nearbyintf(low / scale) : e.scheme.format == PW_TABLE4 ? 8 : 0;
    if (e.scale(n, group) != scale || (e.scheme.zero_points && e.zero_point(n, group) != zero)) return false;
    for (int64_t k = first; k < end; ++k) {
        const float w = e.weight(n, k);
        int expected;
        double level;
        if (e.scheme.codebook) {
            int i = 0;
            while (i < 15 && w * (1 / largest) > kBook.bounds[i]) ++i;
            expected = kBook.codes[i];
            level = kBook.levels[i];
        } else {
            expected = (int)nearbyintf(w / scale) + zero;
            if (e.scheme.format == PW_TABLE4) expected = expected < 0 ? 0 : expected > 15 ? 15 : expected;
            level = expected - zero;
        }
        if (e.code(n, k) != expected) return false;
        const double error = w - level * scale;
        *signal += (double)w * w;
        *noise += error * error;
    }
    return true;
}

void check_encoding(const Encoding &e, const char *isa) {
    double signal = 0, noise = 0;
    bool holds = true;
    for (int64_t n = 0; n < e.strips * 16 && holds; ++n) {
        for (int64_t group = 0; group < e.groups && holds; ++group)
            holds = n < e.out ? check_group(e, n, group, &signal, &noise)
                              : e.scale(n, group) == 1 && (!e.scheme.zero_points || e.zero_point(n, group) == 0);
        for (int64_t k = n < e.out ? e.in : 0; k < e.tiles * 32 && holds; ++k) holds = e.code(n, k) == 0;
        check(holds, "%s, %s, type %d, %ld x %ld: row %ld is wrong", isa, e.scheme.name, e.dtype, (long)e.out, (long)e.in,
              (long)n);
    }
    check(fabs(e.signal - signal) <= 1e-6 * signal && fabs(e.noise - noise) <= 2e-6 * noise + 1e-12 * signal,
          "%s, %s, type %d: squares %g and %g, not %g and %g", isa, e.scheme.name, e.dtype, e.signal, e.noise, signal, noise);
}

int32_t count_threads(uint32_t *count) {
    *count = 3;
    return 0;
}

int32_t parallel_for(int64_t begin, int64_t end, int64_t, pw_body body, void *context) {
    std::vector<std::thread> threads;
    for (int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
    for (std::thread &thread : threads) thread.join();
    return 0;
}

void check_threads(const Scheme &scheme, const char *isa) {
    Encoding alone(scheme, 421, 323, 2, PW_BFLOAT16), shared(scheme, 421, 323, 2, PW_BFLOAT16);
    check(alone.run() == PW_OK, "%s, %s: is not encoded", isa, scheme.name);
    pw_init(parallel_for, count_threads);
    check(shared.run() == PW_OK && shared == alone, "%s, %s: threads make a difference", isa, scheme.name);
    pw_init(nullptr, nullptr);
}

void check_not_finite(const Scheme &scheme, const char *isa) {
    for (float value : {NAN, INFINITY, -INFINITY}) {
        Encoding e(scheme, 17, 99, 0, PW_FLOAT32);
        e.source.as<float>()[17 * 99 - 1] = value;
        check(e.run() == PW_NOT_FINITE, "%s, %s: %g is encoded", isa, scheme.name, (double)value);
    }
}

}  // namespace

void test_encode() {
    constexpr int64_t sizes[][2] = {{1, 1}, {15, 17}, {16, 32}, {33, 100}, {3, 2115}, {2, 4127}};
    for (const Unit &unit : kUnits) {
        if (!unit.is_in_library || pw_select(unit.name) != PW_OK) continue;
        for (const Scheme &scheme : kSchemes) {
            for (int32_t dtype : {PW_FLOAT32, PW_BFLOAT16, PW_FLOAT16})
                for (const auto &size : sizes)
                    for (int64_t gap : {0, 3}) {
                        Encoding encoding(scheme, size[0], size[1], gap, dtype);
                        check(encoding.run() == PW_OK, "%s, %s: is not encoded", unit.name, scheme.name);
                        check_encoding(encoding, unit.name);
                    }
            check_threads(scheme, unit.name);
            check_not_finite(scheme, unit.name);
        }
    }
}
