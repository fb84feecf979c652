// Products of every unit, format, regime and odd size against float64 sums.
#include <initializer_list>
#include <iterator>
#include <vector>

#include "check.h"
#include "problem.h"
#include "tests.h"
#include "units.h"

namespace {

constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 17, 31, 33, 64, 65, 100};
constexpr int64_t kSizes[] = {1, 15, 16, 17, 33, 96, 100, 255, 576};
constexpr int64_t kGroups[] = {0, 16, 32, 64, 128, 1024};
constexpr Lie kLies[] = {{0, 0, 0, false}, {1, 3, 0, true}, {2, 1, 1, false}, {0, 16, 1, true}, {32, 0, 0, true}};
constexpr uint64_t kNumRows = std::size(kRows), kNumSizes = std::size(kSizes), kNumLies = std::size(kLies);

std::vector<Kind> all_kinds() {
    std::vector<Kind> kinds;
    for (int64_t group_size : kGroups)
        for (int32_t scale_type : {PW_SCALE_F32, PW_SCALE_BF16}) {
            kinds.push_back({PW_INT8, scale_type, false, group_size});
            kinds.push_back({PW_TABLE4, scale_type, false, group_size});
            if (group_size) kinds.push_back({PW_TABLE4, scale_type, true, group_size});
        }
    for (int i = 0; i < 4; ++i) kinds.push_back({PW_BF16, PW_SCALE_F32, false, 0});  // four times the sizes
    return kinds;
}

// A product by one unit, with memory of exact sizes where the library has buffers that only grow. It is done in pieces,
// the last first, because their order must not matter.
void multiply(const pw_kernels *kernels, const Problem &problem, int32_t regime, const Memory &y) {
    pw_linear_task task = problem.task(regime, y);
    const Memory packed(kernels->packed_bytes(&task), 64, 0xff);
    if (packed.size()) {
        task.packed_x = packed.as<void>();
        for (int64_t piece = kernels->pack_pieces(&task); piece-- > 0;) kernels->pack(&task, piece, piece + 1);
    }
    for (int64_t end = problem.strips, begin = end / 4 * 2; end > 0; end = begin, begin = 0) {  // at an even strip
        const Memory scratch(kernels->scratch_bytes(&task), 64, 0xff);
        kernels->multiply(&task, begin, end, scratch.as_or_null<void>());
    }
}

// Whether the library puts the same pieces together.
bool is_library_equal(const Problem &problem, int32_t regime, const Memory &y) {
    const Memory again = problem.make_y();
    return problem.run_library(regime, again) == PW_OK && memcmp(y.as<void>(), again.as<void>(), y.size()) == 0;
}

void check_regime(const Problem &problem, const Unit &unit, int32_t regime) {
    const Memory y = problem.make_y();
    multiply(problem.kernels_of(unit.kernels()), problem, regime, y);
    if (!problem.check_result(y, regime, unit.name) || !unit.is_in_library || regime != PW_AUTO) return;
    if (!is_library_equal(problem, regime, y))
        check(false, "%s: pw_linear is not what its pieces are: %s", unit.name, problem.describe().c_str());
}

void check_units(const Problem &problem, std::initializer_list<int32_t> regimes) {
    for (const Unit &unit : kUnits) {
        if (!can_run(unit) || !problem.kernels_of(unit.kernels())) continue;
        if (unit.is_in_library) check(pw_select(unit.name) == PW_OK, "%s is not selected", unit.name);
        for (int32_t regime : regimes) check_regime(problem, unit, regime);
    }
}

// Every fourth case has float32 activations too, for time; four kinds together meet each number of rows.
bool is_float_too(const Kind &kind, uint64_t seed) {
    return kind.format != PW_BF16 && (seed / kNumRows + seed) % 4 == 0;
}

void check_values(const Kind &kind, const Shape &shape, const Lie &lie, uint64_t seed) {
    for (Values values : {kExact, kRounded}) {
        if (values == kRounded && seed % 2) continue;  // for time
        check_units(Problem(kind, shape, lie, values, seed), {PW_AUTO, PW_FEW, PW_PANEL});
        if (is_float_too(kind, seed))
            check_units(Problem(kind, shape, lie, values, seed, PW_FLOAT32), {PW_AUTO, PW_FEW, PW_PANEL});
    }
}

// Larger products get fewer outputs, for time.
Shape shortened(int64_t rows, int64_t out, int64_t in) {
    constexpr int64_t most = 1 << 20;
    return {rows, rows * out * in > most ? most / (rows * in) : out, in};
}

}  // namespace

// Each kind meets each number of rows; a step that has no factor in common with the number of pairs of sizes brings all
// of these about equally often.
void test_linear() {
    uint64_t number = 0;
    for (const Kind &kind : all_kinds()) {
        for (int64_t rows : kRows) {
            const uint64_t pair = number * 37 % (kNumSizes * kNumSizes);
            const Shape shape = shortened(rows, kSizes[pair / kNumSizes], kSizes[pair % kNumSizes]);
            check_values(kind, shape, kLies[number % kNumLies], number);
            ++number;
        }
        check_values(kind, {(int64_t)(number / kNumRows % 7 + 1), 17, 4095}, kLies[number % kNumLies], number);
    }
    // More activations than share a cache with a panel.
    check_units(Problem({PW_INT8, PW_SCALE_F32, false, 0}, {560, 17, 4095}, kLies[0], kExact, 1), {PW_PANEL});
    check_units(Problem({PW_TABLE4, PW_SCALE_BF16, true, 64}, {560, 17, 4095}, kLies[1], kExact, 2), {PW_PANEL});
}
