#include "problem.h"

#include <math.h>

#include "check.h"

namespace {

// xorshift64*
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 2654435761u + 88172645463325252u) {}
    uint32_t next() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return (uint32_t)(state * 2685821657736338717u >> 32);
    }
    int below(int count) { return (int)(next() % (uint32_t)count); }
};

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

double bf16_value(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// The upper half of a float32; exact for numbers of 8 significant bits.
uint16_t bf16_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

double round_to_bf16(double value) {
    if (value == 0) return 0;
    const int exponent = ilogb(value);
    return ldexp(nearbyint(ldexp(value, 7 - exponent)), exponent - 7);
}

// Sign and significant bits, 8 or as many as float32 has, of magnitude 2^low .. 2^high.
float any_number(Random &random, int low, int high, bool all_bits = false) {
    const float fraction = all_bits ? (float)random.below(1 << 23) / (1 << 23) : (float)random.below(128) / 128;
    const float magnitude = ldexpf(1 + fraction, low + random.below(high - low));
    return random.below(2) ? magnitude : -magnitude;
}

float activation(Random &random, Values values, bool all_bits) {
    if (values == kExact) return (float)(random.below(7) - 3);
    if (random.below(40) == 0) return ldexpf((float)(1 + random.below(127)), -133);  // subnormal
    return random.below(12) == 0 ? 0 : any_number(random, -6, 3, all_bits);
}

float scale(Random &random, Values values) {
    if (values == kExact) return (random.below(2) ? 1 : -1) * ldexpf(1, random.below(3) - 1);
    return any_number(random, -9, -4);
}

float level(Random &random, Values values, bool all_bits) {
    return values == kExact ? (float)(random.below(255) - 127) : any_number(random, -6, 0, all_bits);
}

// Where a code lies in the tiles of a weight, as kernels.h draws it.
struct Place {
    int64_t tile;      // from the beginning
    int64_t row, lane;
    Place(int64_t tiles, int64_t n, int64_t k)
        : tile(n / 16 * tiles + k / 32), row(k % 32 / 2), lane(2 * (n % 16) + (k & 1)) {}
    int64_t byte8() const { return tile * 512 + 64 * (row / 2) + 16 * (lane / 8) + 8 * (row % 2) + lane % 8; }
    int64_t bit4() const { return (tile * 256 + 64 * (row / 4) + 2 * lane) * 8 + 4 * (row % 4); }
};

void set_bits4(const Memory &memory, int64_t bit, int value) {  // where zeros are
    memory.as<uint8_t>()[bit / 8] |= (uint8_t)(value << bit % 8);
}

int bits4(const Memory &memory, int64_t bit) { return memory.as<uint8_t>()[bit / 8] >> bit % 8 & 15; }

size_t qweight_bytes(const Kind &kind, const Shape &shape) {
    if (kind.format == PW_BF16) return (size_t)(shape.out * shape.in) * 2;
    return (size_t)(ceiling(shape.out, 16) * ceiling(shape.in, 32) * (kind.format == PW_INT8 ? 512 : 256));
}

int64_t num_groups(const Kind &kind, const Shape &shape) {
    return kind.group_size ? ceiling(shape.in, kind.group_size) : 1;
}

size_t scale_count(const Kind &kind, const Shape &shape) {
    return kind.format == PW_BF16 ? 0 : (size_t)(ceiling(shape.out, 16) * num_groups(kind, shape) * 16);
}

}  // namespace

Problem::Problem(const Kind &kind, const Shape &shape, const Lie &lie, Values values, uint64_t seed, int32_t dtype)
    : kind(kind), shape(shape), values(values), lie(lie), dtype(dtype), strips(ceiling(shape.out, 16)),
      tiles(ceiling(shape.in, 32)),
      groups(num_groups(kind, shape)), x_stride(shape.in + lie.x_gap), y_stride(shape.out + lie.y_gap),
      qweight(qweight_bytes(kind, shape), 2, 0),
      scales(scale_count(kind, shape) * (kind.scale_type == PW_SCALE_F32 ? 4 : 2), 4, 0),
      zero_points(kind.zero_points ? scale_count(kind, shape) / 2 : 0, 1, 0),
      levels(kind.format == PW_TABLE4 ? 64 : 0, 4, 0),
      x((size_t)((shape.rows - 1) * x_stride + shape.in) * width(), width(), 0xff, (size_t)lie.x_slack * width()),
      bias(lie.bias ? (size_t)shape.out * width() : 0, width(), 0) {
    weight = {qweight.as<void>(), scales.as_or_null<void>(), zero_points.as_or_null<uint8_t>(),
              levels.as_or_null<float>(), shape.out, shape.in, kind.group_size, kind.format, kind.scale_type};
    fill(seed);
    compute();
}

std::string Problem::describe() const {
    static const char *const formats[] = {"int8", "table4", "bf16"};
    char text[200];
    snprintf(text, sizeof text,
             "%s activations, %s%s, %s scales, groups of %ld, [%ld, %ld] x [%ld, %ld], gaps %ld and %ld, slack %ld%s, "
             "%s",
             is_float() ? "f32" : "bf16", formats[kind.format], kind.zero_points ? " with zero points" : "",
             kind.scale_type ? "bf16" : "f32",
             (long)kind.group_size, (long)shape.rows, (long)shape.in, (long)shape.out, (long)shape.in, (long)lie.x_gap,
             (long)lie.y_gap, (long)lie.x_slack, lie.bias ? ", bias" : "", values == kExact ? "exact" : "rounded");
    return text;
}

void Problem::fill(uint64_t seed) {
    Random random(seed);
    const bool exact = values == kExact;
    for (int64_t m = 0; m < shape.rows; ++m) {  // what lies between the rows stays NaN
        for (int64_t k = 0; k < shape.in; ++k) set_number(x, m * x_stride + k, activation(random, values, is_float()));
    }
    for (int64_t n = 0; n < (lie.bias ? shape.out : 0); ++n)
        set_number(bias, n, exact ? (float)(random.below(129) - 64) : any_number(random, -3, 3, is_float()));
    for (size_t i = 0; i < levels.size() / 4; ++i) levels.as<float>()[i] = level(random, values, is_float());
    for (int64_t n = 0; n < shape.out; ++n)
        for (int64_t k = 0; k < shape.in; ++k) {
            const Place place(tiles, n, k);
            switch (kind.format) {
                case PW_INT8: qweight.as<int8_t>()[place.byte8()] = (int8_t)(random.below(255) - 127); break;
                case PW_TABLE4: set_bits4(qweight, place.bit4(), random.below(16)); break;
                default: qweight.as<uint16_t>()[n * shape.in + k] = bf16_bits(level(random, values, false)); break;
            }
        }
    for (size_t i = 0; i < scale_count(kind, shape); ++i) {
        const int64_t n = (int64_t)i / (16 * groups) * 16 + (int64_t)i % 16;
        const bool is_padding = n >= shape.out;
        const float s = is_padding ? 1 : scale(random, values);
        const float all_bits = exact || is_padding ? s : s * (1 + (float)random.below(1 << 23) / (1 << 23));
        if (kind.scale_type == PW_SCALE_BF16)
            scales.as<uint16_t>()[i] = bf16_bits(s);
        else
            scales.as<float>()[i] = all_bits;
        if (kind.zero_points && !is_padding) set_bits4(zero_points, (int64_t)i * 4, random.below(16));
    }
}

double Problem::number(const Memory &numbers, int64_t index) const {
    return is_float() ? numbers.as<float>()[index] : bf16_value(numbers.as<uint16_t>()[index]);
}

void Problem::set_number(const Memory &numbers, int64_t index, float value) const {
    if (is_float())
        numbers.as<float>()[index] = value;
    else
        numbers.as<uint16_t>()[index] = bf16_bits(value);
}

pw_linear_task Problem::task(int32_t regime, const Memory &y) const {
    pw_linear_task task{};
    task.weight = &weight;
    task.x = x.as<void>();
    task.rows = shape.rows;
    task.x_stride = x_stride;
    task.y = y.as<void>();
    task.y_stride = y_stride;
    task.bias = bias.as_or_null<void>();
    task.regime = regime;
    return task;
}

int Problem::run_library(int32_t regime, const Memory &y) const {
    return pw_linear(&weight, x.as<void>(), shape.rows, x_stride, y.as<void>(), y_stride, bias.as_or_null<void>(),
                     regime, dtype);
}

void Problem::compute() {
    const int64_t size = shape.out * shape.in;
    std::vector<double> weights((size_t)size), parts((size_t)size);
    for (int64_t n = 0; n < shape.out; ++n)
        for (int64_t k = 0; k < shape.in; ++k) {
            const Place place(tiles, n, k);
            double value = 0, zero_point = 0, factor = 1;
            if (kind.format == PW_INT8) value = qweight.as<int8_t>()[place.byte8()];
            if (kind.format == PW_TABLE4)
                value = levels.as<float>()[bits4(qweight, place.bit4())];
            if (kind.format == PW_BF16) {
                value = bf16_value(qweight.as<uint16_t>()[n * shape.in + k]);
            } else {
                const int64_t index = (n / 16 * groups + (kind.group_size ? k / kind.group_size : 0)) * 16 + n % 16;
                const bool is_float = kind.scale_type == PW_SCALE_F32;
                factor = is_float ? scales.as<float>()[index] : bf16_value(scales.as<uint16_t>()[index]);
                if (kind.zero_points) zero_point = bits4(zero_points, index * 4);
            }
            weights[(size_t)(n * shape.in + k)] = (value - zero_point) * factor;
            parts[(size_t)(n * shape.in + k)] = (fabs(value) + zero_point) * fabs(factor);
        }
    std::vector<double> row((size_t)shape.in);
    for (int64_t m = 0; m < shape.rows; ++m) {
        for (int64_t k = 0; k < shape.in; ++k) row[(size_t)k] = number(x, m * x_stride + k);
        for (int64_t n = 0; n < shape.out; ++n) {
            const double *w = weights.data() + n * shape.in, *part = parts.data() + n * shape.in, *xs = row.data();
            const double b = lie.bias ? number(bias, n) : 0;
            double sum = b, product = 0, term = fabs(b);
            for (int64_t k = 0; k < shape.in; ++k) {
                sum += xs[k] * w[k];
                product += fabs(xs[k] * w[k]);
                term += fabs(xs[k]) * part[k];
            }
            expected.push_back(sum);
            products.push_back(product);
            terms.push_back(term);
        }
    }
}

// How far a result may be from the float64 sum:
//
// 1. Float32 has a unit roundoff of 2^-24. A term x * level or x * zero point is rounded when it is formed, in at most
//    `in` additions on its way to the total, however these are ordered (additions to 0 are exact), when the part of the
//    zero points is formed and taken away, when it is scaled and when the bias is added: steps = in + 5, of which each
//    changes a partial sum of terms by 2^-24 of it at most: terms * steps 2^-24 / (1 - steps 2^-24) altogether
//    (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1). Forming w = level * scale - zero * scale
//    takes no more of them than the sums it replaces.
// 2. A weight that is rounded to bfloat16, with its 8 significant bits, changes by 2^-8 of it at most: 2^-8 products.
// 3. AVX512-BF16 and AMX take subnormal numbers for 0, where they read them, in their sums and where they round to
//    bfloat16: less than 2^-126 for each x, weight and sum, times what they are multiplied with, which is below 2^8
//    here. That makes less than 2^-116 for each product.
// 4. The result is rounded to bfloat16: half a unit in its last place, which is 2^-7 of its power of two.
//
// With float32 activations 2 and 4 do not apply: weights and results have float32's 24 bits, and their rounding is
// among the steps of 1, as is that of a product, which then is no longer exact. Numbers below 2^-126 lose 2^-150 at
// most in each step, less than 3 allows for.
double Problem::bound(int64_t index, bool weights_are_rounded) const {
    const double steps = (double)(shape.in + 5) * 0x1p-24;
    double error = terms[(size_t)index] * steps / (1 - steps) + (double)(shape.in + 1) * 0x1p-116;
    if (weights_are_rounded) error += products[(size_t)index] * 0x1p-8;
    return is_float() ? error : error + ldexp(1, ilogb(fabs(expected[(size_t)index]) + error) - 8);
}

bool Problem::check_result(const Memory &y, int32_t regime, const char *who) const {
    const bool weights_are_rounded = !is_float() && kind.group_size && regime != PW_FEW;
    constexpr uint8_t gap[] = {kUnwritten, kUnwritten, kUnwritten, kUnwritten};
    for (int64_t m = 0; m < shape.rows; ++m)
        for (int64_t n = 0; n < (m + 1 < shape.rows ? y_stride : shape.out); ++n) {
            if (n >= shape.out) {
                if (memcmp(y.as<char>() + (size_t)(m * y_stride + n) * width(), gap, width()) != 0)
                    return check(false, "%s, regime %d: y[%ld, %ld], a gap, is written: %s", who, regime, (long)m,
                                 (long)n, describe().c_str());
                continue;
            }
            const int64_t index = m * shape.out + n;
            const double result = number(y, m * y_stride + n);
            const double sum = expected[(size_t)index];
            const double wanted = values == kExact && !is_float() ? round_to_bf16(sum) : sum;
            const double limit = values == kExact ? 0 : bound(index, weights_are_rounded);
            const double error = fabs(result - wanted);
            if (!(error <= limit))  // NaN is no error that is larger
                return check(false, "%s, regime %d: y[%ld, %ld] is %g, not %g; error %g, bound %g: %s", who, regime,
                             (long)m, (long)n, result, wanted, error, limit, describe().c_str());
        }
    return true;
}
