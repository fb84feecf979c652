// Tests of the kernel library that need no Python, for sanitizers. Arguments: the subjects to test, by default all.
#include <string.h>
#include <time.h>

#include "check.h"
#include "tests.h"
#include "units.h"

namespace {

struct Subject {
    const char *name;
    void (*test)();
};

// Threads come first: their test needs that no instruction set has been selected.
constexpr Subject kSubjects[] = {{"threads", test_threads},
                                 {"interface", test_interface},
                                 {"linear", test_linear},
                                 {"encode", test_encode},
                                 {"sampling", test_sampling},
                                 {"attention", test_attention}};

double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

bool is_wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; ++i)
        if (strcmp(argv[i], name) == 0) return true;
    return argc < 2;
}

}  // namespace

int main(int argc, char **argv) {
    for (const Unit &unit : kUnits) printf("%s: %s\n", unit.name, can_run(unit) ? "runs" : "cannot run here");
    for (const Subject &subject : kSubjects) {
        if (!is_wanted(subject.name, argc, argv)) continue;
        const double start = seconds();
        subject.test();
        printf("%s: %.1f s\n", subject.name, seconds() - start);
    }
    printf("%d failures\n", failures.load());
    return failures ? 1 : 0;
}
