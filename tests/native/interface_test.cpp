// What the exported functions refuse, and what they say about instruction sets.
#include <string>

#include "check.h"
#include "problem.h"
#include "tests.h"
#include "units.h"

namespace {

// A call that works, to be changed in one thing.
struct Call {
    Problem problem;
    Memory y;
    pw_weight weight;
    pw_linear_call call;
    explicit Call(const Kind &kind)
        : problem(kind, {3, 33, 65}, {0, 0, 0, true}, kRounded, 1), y(problem.make_y()), weight(problem.weight),
          call{&weight, problem.x.as<void>(), 3, problem.x_stride, y.as<void>(), problem.y_stride,
               problem.bias.as<void>(), PW_AUTO, PW_BFLOAT16} {}
    int run() const { return pw_linear_packed(&call); }
};

template <class Change>
void check_refused(const Kind &kind, const char *what, Change change) {
    Call call(kind);
    check(call.run() == PW_OK, "a good call is refused");
    change(call);
    check(call.run() == PW_BAD_ARGUMENT, "a call with %s is not refused", what);
}

void check_arguments() {
    constexpr Kind int8{PW_INT8, PW_SCALE_F32, false, 16};
    constexpr Kind table4{PW_TABLE4, PW_SCALE_BF16, true, 64};
    constexpr Kind bf16{PW_BF16, PW_SCALE_F32, false, 0};
    check_refused(int8, "no weight", [](Call &c) { c.call.weight = nullptr; });
    check_refused(int8, "no codes", [](Call &c) { c.weight.qweight = nullptr; });
    check_refused(int8, "no scales", [](Call &c) { c.weight.scales = nullptr; });
    check_refused(int8, "levels it has no use for", [](Call &c) { c.weight.levels = (const float *)c.call.x; });
    check_refused(int8, "groups of 8", [](Call &c) { c.weight.group_size = 8; });
    check_refused(int8, "groups of -16", [](Call &c) { c.weight.group_size = -16; });
    check_refused(int8, "an unknown format", [](Call &c) { c.weight.format = 3; });
    check_refused(int8, "unknown scales", [](Call &c) { c.weight.scale_type = 3; });
    check_refused(int8, "no outputs", [](Call &c) { c.weight.out_features = 0; });
    check_refused(int8, "no columns", [](Call &c) { c.weight.in_features = 0; });
    check_refused(int8, "more columns than memory", [](Call &c) { c.weight.in_features = INT64_MAX; });
    check_refused(int8, "rows that overlap in x", [](Call &c) { --c.call.x_stride; });
    check_refused(int8, "rows that overlap in y", [](Call &c) { --c.call.y_stride; });
    check_refused(int8, "fewer than no rows", [](Call &c) { c.call.rows = -1; });
    check_refused(int8, "an unknown type", [](Call &c) { c.call.dtype = PW_FLOAT16; });
    check_refused(bf16, "activations of another type", [](Call &c) { c.call.dtype = PW_FLOAT32; });
    check_refused(int8, "no x", [](Call &c) { c.call.x = nullptr; });
    check_refused(int8, "no y", [](Call &c) { c.call.y = nullptr; });
    check_refused(int8, "an unknown regime", [](Call &c) { c.call.regime = 3; });
    check_refused(table4, "no levels", [](Call &c) { c.weight.levels = nullptr; });
    check_refused(table4, "zero points for whole rows", [](Call &c) { c.weight.group_size = 0; });
    check_refused(bf16, "scales it has no use for", [](Call &c) { c.weight.scales = c.call.x; });
    check_refused(bf16, "groups it has no use for", [](Call &c) { c.weight.group_size = 16; });
    Call none(int8);
    none.call.rows = 0;
    check(none.run() == PW_OK, "a product of no rows is refused");
}

void check_instruction_sets() {
    check(pw_version() == PW_VERSION, "the version is %d", pw_version());
    const std::string names = std::string(pw_isas()) + " ";
    size_t begin = 0;
    for (size_t end; (end = names.find(' ', begin)) != std::string::npos; begin = end + 1) {
        const std::string name = names.substr(begin, end - begin);
        const char *obstacle = pw_isa_obstacle(name.c_str());
        if (!check(obstacle != nullptr, "%s is listed, but not known", name.c_str())) continue;
        const std::string before = pw_selected();
        const int status = pw_select(name.c_str());
        check(status == (*obstacle ? PW_BAD_ARGUMENT : PW_OK), "selecting %s returns %d", name.c_str(), status);
        check(pw_selected() == (*obstacle ? before : name), "%s is selected, not %s", pw_selected(), name.c_str());
    }
    check(!*pw_isa_obstacle("baseline"), "the baseline cannot run");
    check(pw_isa_obstacle("mmx") == nullptr && pw_select("mmx") == PW_BAD_ARGUMENT, "an unknown set is known");
    check(pw_isa_obstacle(nullptr) == nullptr && pw_select(nullptr) == PW_BAD_ARGUMENT, "no name is a name");
}

void check_read() {
    for (int64_t bytes : {0, 8, 248, 256, 264, 1000, (1 << 20) + 8}) {
        const Memory data((size_t)bytes, 8, 0x81);
        uint64_t sum = 1;
        check(pw_read(data.as<void>(), bytes, &sum) == PW_OK && sum == (uint64_t)bytes / 8 * 0x8181818181818181u,
              "%s: the sum of %ld bytes is %#lx", pw_selected(), (long)bytes, (unsigned long)sum);
    }
    uint64_t word = 0, sum;
    check(pw_read(&word, 7, &sum) == PW_BAD_ARGUMENT, "7 bytes are read");
    check(pw_read(&word, -8, &sum) == PW_BAD_ARGUMENT, "-8 bytes are read");
    check(pw_read(nullptr, 8, &sum) == PW_BAD_ARGUMENT, "null is read");
    check(pw_read(&word, 8, nullptr) == PW_BAD_ARGUMENT, "a sum is written to null");
}

}  // namespace

void test_interface() {
    check_arguments();
    check_instruction_sets();
    for (const Unit &unit : kUnits)
        if (unit.is_in_library && pw_select(unit.name) == PW_OK) check_read();
}
