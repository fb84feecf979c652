// The same results for any number of threads and callers, with a pool of real threads.
#include <pthread.h>

#include <atomic>
#include <memory>
#include <vector>

#include "check.h"
#include "problem.h"
#include "tests.h"
#include "units.h"

namespace {

constexpr int64_t kMostThreads = 4;
std::atomic<uint32_t> pool_threads{1};
std::atomic<int64_t> most_at_once{0};
std::atomic<int> calls_to_refuse{0};

int32_t count_threads(uint32_t *count) {
    *count = pool_threads;
    return 0;
}

struct Range {
    int64_t begin, end;
    pw_body body;
    void *context;
    pthread_barrier_t *barrier;
};

void *run_range(void *argument) {
    const Range &range = *(const Range *)argument;
    pthread_barrier_wait(range.barrier);  // so that none does all the work before the others are there
    range.body(range.begin, range.end, range.context);
    return nullptr;
}

void start_thread(pthread_t *thread, void *(*run)(void *), void *argument) {
    if (pthread_create(thread, nullptr, run, argument)) {
        perror("a thread for a test");
        _Exit(1);
    }
}

// Runs equal ranges, one on the calling thread and each of the others on a new one, which then ends.
int32_t parallel_for(int64_t begin, int64_t end, int64_t grain_size, pw_body body, void *context) {
    if (calls_to_refuse > 0) return calls_to_refuse--;
    const int64_t ranges = (end - begin + grain_size - 1) / grain_size;
    const int64_t count = ranges < pool_threads ? ranges : (int64_t)pool_threads;
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, (unsigned)count);
    Range work[kMostThreads];
    pthread_t threads[kMostThreads];
    for (int64_t i = 0; i < count; ++i) {
        work[i] = {begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count, body, context, &barrier};
        if (i) start_thread(&threads[i], run_range, &work[i]);
    }
    run_range(&work[0]);
    for (int64_t i = 1; i < count; ++i) pthread_join(threads[i], nullptr);
    pthread_barrier_destroy(&barrier);
    if (count > most_at_once) most_at_once = count;
    return 0;
}

struct Result {
    int status;
    Memory y;
    Result(const Problem &problem, int32_t regime) : y(problem.make_y()) { status = problem.run_library(regime, y); }
    bool operator==(const Result &other) const {
        return status == other.status && memcmp(y.as<void>(), other.y.as<void>(), y.size()) == 0;
    }
};

typedef std::vector<std::unique_ptr<Problem>> Problems;

// Sizes that are shared by threads, the last two so that packing the activations is too.
Problems make_problems() {
    constexpr Kind kinds[] = {{PW_INT8, PW_SCALE_F32, false, 0},
                              {PW_INT8, PW_SCALE_BF16, false, 32},
                              {PW_TABLE4, PW_SCALE_BF16, true, 64},
                              {PW_TABLE4, PW_SCALE_F32, false, 64},
                              {PW_BF16, PW_SCALE_F32, false, 0}};
    Problems problems;
    const auto add = [&](const Kind &kind, const Shape &shape, int32_t dtype = PW_BFLOAT16) {
        problems.push_back(
            std::make_unique<Problem>(kind, shape, Lie{1, 1, 0, true}, kRounded, problems.size(), dtype));
    };
    for (const Kind &kind : kinds)
        for (int64_t rows : {1, 20}) add(kind, {rows, 395, 321});
    add(kinds[1], {20, 395, 321}, PW_FLOAT32);
    add(kinds[2], {70, 72, 513}, PW_FLOAT32);
    add(kinds[1], {70, 72, 513});
    add(kinds[2], {70, 72, 513});
    return problems;
}

// One caller beside another: computes all problems and compares with what one thread got.
struct Caller {
    const Problems *problems;
    const std::vector<std::unique_ptr<Result>> *alone;
    static void *run(void *argument) {
        const Caller &caller = *(const Caller *)argument;
        for (size_t i = 0; i < caller.problems->size(); ++i) {
            const Problem &problem = *(*caller.problems)[i];
            check(Result(problem, PW_AUTO) == *(*caller.alone)[i], "%s: beside another caller another result: %s",
                  pw_selected(), problem.describe().c_str());
        }
        return nullptr;
    }
};

void *call_first(void *argument) {
    const Problem &problem = *(const Problem *)argument;
    const Result result(problem, PW_AUTO);
    check(result.status == PW_OK, "the first call returns %d", result.status);
    problem.check_result(result.y, PW_AUTO, pw_selected());
    return nullptr;
}

void run_twice(void *(*run)(void *), void *argument) {
    pthread_t threads[2];
    for (pthread_t &thread : threads) start_thread(&thread, run, argument);
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
}

void check_thread_counts(const Problems &problems, const char *isa) {
    std::vector<std::unique_ptr<Result>> alone;
    for (const auto &problem : problems)
        for (int32_t regime : {PW_AUTO, PW_FEW, PW_PANEL}) {
            pool_threads = 1;
            auto expected = std::make_unique<Result>(*problem, regime);
            problem->check_result(expected->y, regime, isa);
            for (uint32_t count = 2; count <= kMostThreads; ++count) {
                pool_threads = count;
                check(Result(*problem, regime) == *expected, "%s, regime %d: another result with %u threads: %s", isa,
                      regime, count, problem->describe().c_str());
            }
            if (regime == PW_AUTO) alone.push_back(std::move(expected));
        }
    Caller caller{&problems, &alone};
    run_twice(Caller::run, &caller);
}

// What the library does with the kernels of a unit, for one that is not in it.
struct Pieces {
    const pw_kernels *kernels;
    pw_linear_task task;
    int64_t strips;
    static void pack(int64_t begin, int64_t end, void *context) {
        const Pieces &pieces = *(const Pieces *)context;
        pieces.kernels->pack(&pieces.task, begin, end);
    }
    static void multiply(int64_t begin, int64_t end, void *context) {  // pairs of strips, as panels hold them
        const Pieces &pieces = *(const Pieces *)context;
        const Memory scratch(pieces.kernels->scratch_bytes(&pieces.task), 64, 0xff);
        pieces.kernels->multiply(&pieces.task, 2 * begin, 2 * end < pieces.strips ? 2 * end : pieces.strips,
                                 scratch.as_or_null<void>());
    }
};

void check_pieces(const Problem &problem, const Unit &unit, int32_t regime) {
    const Memory y = problem.make_y();
    Pieces pieces{problem.kernels_of(unit.kernels()), problem.task(regime, y), problem.strips};
    if (!pieces.kernels) return;
    const Memory packed(pieces.kernels->packed_bytes(&pieces.task), 64, 0xff);
    pieces.task.packed_x = packed.as_or_null<void>();
    pool_threads = kMostThreads;
    if (packed.size()) parallel_for(0, pieces.kernels->pack_pieces(&pieces.task), 1, Pieces::pack, &pieces);
    parallel_for(0, (problem.strips + 1) / 2, 1, Pieces::multiply, &pieces);
    problem.check_result(y, regime, unit.name);
}

void check_refusal(const Problem &problem) {
    pool_threads = 2;
    calls_to_refuse = 1;
    check(Result(problem, PW_AUTO).status == PW_NO_THREADS, "a pool that refuses work goes unnoticed");
    check(Result(problem, PW_AUTO).status == PW_OK, "a pool that works again is not used");
}

void check_read() {
    const size_t bytes = (5 << 20) + 264;
    const Memory data(bytes, 8, 0);
    uint64_t expected = 0;
    for (size_t i = 0; i < bytes / 8; ++i) expected += data.as<uint64_t>()[i] = i * 0x9e3779b97f4a7c15u;
    for (uint32_t count = 1; count <= kMostThreads; ++count) {
        pool_threads = count;
        uint64_t sum = 0;
        check(pw_read(data.as<void>(), (int64_t)bytes, &sum) == PW_OK && sum == expected,
              "%s: another sum with %u threads", pw_selected(), count);
    }
}

}  // namespace

void test_threads() {
    const Problems problems = make_problems();
    pw_init(parallel_for, count_threads);
    pool_threads = kMostThreads;
    run_twice(call_first, problems.back().get());  // before anything has selected an instruction set
    for (const Unit &unit : kUnits) {
        if (!can_run(unit)) continue;
        if (!unit.is_in_library) {
            for (const auto &problem : problems)
                for (int32_t regime : {PW_AUTO, PW_FEW, PW_PANEL}) check_pieces(*problem, unit, regime);
            continue;
        }
        check(pw_select(unit.name) == PW_OK, "%s is not selected", unit.name);
        check_thread_counts(problems, unit.name);
        check_read();
    }
    check(most_at_once == kMostThreads, "at most %ld threads ran at once", (long)most_at_once);
    check_refusal(*problems.front());  // the product
    check_refusal(*problems.back());   // packing
    pw_init(nullptr, nullptr);
}
