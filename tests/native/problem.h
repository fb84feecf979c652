// A product with random values: the operands as pw_linear takes them, and what must come out, from float64 sums of
// weights read as kernels.h draws them. Shares no code with the kernels.
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

#include "memory.h"
#include "table.h"

// What a weight is made of.
struct Kind {
    int32_t format, scale_type;
    bool zero_points;
    int64_t group_size;
};

struct Shape {
    int64_t rows, out, in;
};

// kExact: small integers and powers of two, so that every sum in float32 is exact in any order, and so is every weight
// in bfloat16: all kernels give the same results, which are the float64 sums, rounded once.
// kRounded: numbers of all kinds, among them subnormal ones and zeros.
enum Values { kExact, kRounded };

// How operands lie: what is added to the strides, and elements between the end of x and forbidden memory.
struct Lie {
    int64_t x_gap, y_gap, x_slack;
    bool bias;
};

struct Problem {
    const Kind kind;
    const Shape shape;
    const Values values;
    const Lie lie;
    const int32_t dtype;  // of x, y and bias: PW_BFLOAT16 or PW_FLOAT32
    const int64_t strips, tiles, groups, x_stride, y_stride;
    Memory qweight, scales, zero_points, levels, x, bias;
    pw_weight weight;
    std::vector<double> expected;        // [rows][out]
    std::vector<double> products;        // [rows][out]: sums of |x w|
    std::vector<double> terms;           // [rows][out]: sums of |x| (|level| + |zero point|) |scale|, and the |bias|

    Problem(const Kind &kind, const Shape &shape, const Lie &lie, Values values, uint64_t seed,
            int32_t dtype = PW_BFLOAT16);
    std::string describe() const;

    // The kernels of a unit for this dtype, or null.
    const pw_kernels *kernels_of(const pw_kernels *unit) const { return is_float() ? unit->floats : unit; }
    pw_linear_task task(int32_t regime, const Memory &y) const;
    int run_library(int32_t regime, const Memory &y) const;

    // What a result of this problem looks like before it is computed: NaN where numbers belong and in the gaps.
    static constexpr uint8_t kUnwritten = 0xff;
    Memory make_y() const {
        return Memory((size_t)((shape.rows - 1) * y_stride + shape.out) * width(), width(), kUnwritten);
    }

    // Checks results [rows][y_stride], and that the gaps between rows are as they were.
    bool check_result(const Memory &y, int32_t regime, const char *who) const;

private:
    bool is_float() const { return dtype == PW_FLOAT32; }
    size_t width() const { return is_float() ? sizeof(float) : sizeof(uint16_t); }
    double number(const Memory &numbers, int64_t index) const;
    void set_number(const Memory &numbers, int64_t index, float value) const;
    void fill(uint64_t seed);
    void compute();
    double bound(int64_t index, bool weights_are_rounded) const;
};
