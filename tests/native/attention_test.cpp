// Attention against float64, in memory of the exact size, with slots that nobody may use filled with NaN.
#include <math.h>

#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "memory.h"
#include "tests.h"
#include "units.h"

namespace {

constexpr int64_t kBlockSize = 16, kBlocks = 24;
constexpr int64_t kLengths[] = {1, 16, 17, 75, 96, 130};
constexpr int64_t kCounts[] = {1, 1, 17, 1, 9, 70};  // of the last tokens, which attend
constexpr int64_t kStarts[] = {0, 1, 2, 4, 9, 15, 24};
constexpr int64_t kRows = 6, kQueries = 99;
constexpr int64_t kItemQueries = 7;  // that are attended at once

float to_float(uint16_t bf16) {
    const uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct Shape {
    int64_t kv_heads, repeats, key_size, value_size, window;
    double softcap;
    bool has_sinks;
};

constexpr Shape kShapes[] = {{1, 1, 1, 1, 0, 0, false},   {3, 3, 64, 64, 0, 0, false}, {2, 4, 128, 33, 20, 0, true},
                             {1, 9, 40, 7, 0, 2.5, false}, {2, 1, 17, 65, 1, 0.5, true}};

enum Stored { kFloat32, kBfloat16, kInt8 };

// Queries, keys and values with magnitudes up to 1, in the types of a task.
struct Problem {
    Shape shape;
    Stored stored;
    int64_t heads;
    std::vector<float> queries, keys, values, sinks;  // as they are read
    Memory query_memory, key_memory, value_memory, key_scales, value_scales, tables, starts, lengths, counts, out;
    uint64_t state = 1;

    size_t element() const { return stored == kFloat32 ? 4 : stored == kBfloat16 ? 2 : 1; }
    size_t slots(int64_t size) const { return (size_t)(kBlocks * kBlockSize * shape.kv_heads * size); }
    size_t scale_bytes() const { return stored == kInt8 ? 2 * slots(1) : 0; }
    size_t activation() const { return stored == kFloat32 ? 4 : 2; }

    Problem(const Shape &shape, Stored stored)
        : shape(shape),
          stored(stored),
          heads(shape.kv_heads * shape.repeats),
          query_memory((size_t)(kQueries * heads * shape.key_size) * activation(), 4, 0),
          key_memory(slots(shape.key_size) * element(), 4, 0xff),
          value_memory(slots(shape.value_size) * element(), 4, 0xff),
          key_scales(scale_bytes(), 4, 0xff),
          value_scales(scale_bytes(), 4, 0xff),
          tables(sizeof(int64_t) * kBlocks, 8, 0),
          starts(sizeof kStarts, 8, 0),
          lengths(sizeof kLengths, 8, 0),
          counts(sizeof kCounts, 8, 0),
          out((size_t)(kQueries * heads * shape.value_size) * activation(), 4, 0) {
        memcpy(starts.as<void>(), kStarts, sizeof kStarts);
        memcpy(lengths.as<void>(), kLengths, sizeof kLengths);
        memcpy(counts.as<void>(), kCounts, sizeof kCounts);
        for (int64_t i = 0; i < kQueries * heads * shape.key_size; ++i) queries.push_back(put(query_memory, i, activation()));
        keys.resize(slots(shape.key_size));
        values.resize(slots(shape.value_size));
        for (int64_t h = 0; h < heads && shape.has_sinks; ++h) sinks.push_back(draw());
        for (int64_t i = 0; i < kBlocks; ++i) tables.as<int64_t>()[i] = kBlocks - 1 - i;
        for (int64_t row = 0; row < kRows; ++row)
            for (int64_t place = 0; place < kLengths[row]; ++place) fill(slot(row, place));
    }

    int64_t slot(int64_t row, int64_t place) const {
        return tables.as<int64_t>()[kStarts[row] + place / kBlockSize] * kBlockSize + place % kBlockSize;
    }
    float draw() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (float)((double)(state >> 40) * 0x1p-23 - 1);
    }
    // Writes a number of `bytes` and returns what it is read as.
    float put(const Memory &memory, int64_t index, size_t bytes, float scale = 1) {
        const float value = draw();
        if (bytes == 4) return memory.as<float>()[index] = value;
        if (bytes == 1) return (float)(memory.as<int8_t>()[index] = (int8_t)(127 * value)) * scale;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        return to_float(memory.as<uint16_t>()[index] = (uint16_t)(bits >> 16));
    }
    void fill(int64_t slot) {
        for (int64_t head = slot * shape.kv_heads; head < (slot + 1) * shape.kv_heads; ++head) {
            constexpr uint16_t kScales[] = {0x3c00, 0x3bc0};  // 2^-7 and three quarters of it
            if (stored == kInt8) key_scales.as<uint16_t>()[head] = kScales[head % 2];
            if (stored == kInt8) value_scales.as<uint16_t>()[head] = kScales[(head + 1) % 2];
            for (int64_t i = head * shape.key_size; i < (head + 1) * shape.key_size; ++i)
                keys[i] = put(key_memory, i, element(), to_float(kScales[head % 2]));
            for (int64_t i = head * shape.value_size; i < (head + 1) * shape.value_size; ++i)
                values[i] = put(value_memory, i, element(), to_float(kScales[(head + 1) % 2]));
        }
    }

    pw_attention task() const {
        return {query_memory.as<void>(), key_memory.as<void>(), value_memory.as<void>(),
                key_scales.as_or_null<uint16_t>(), value_scales.as_or_null<uint16_t>(), tables.as<int64_t>(),
                starts.as<int64_t>(), lengths.as<int64_t>(), counts.as<int64_t>(),
                shape.has_sinks ? sinks.data() : nullptr, out.as<void>(), kRows, heads,
                shape.kv_heads, shape.key_size, shape.value_size, kBlockSize, shape.window,
                stored == kFloat32 ? PW_FLOAT32 : PW_BFLOAT16, 0.3, shape.softcap};
    }

    // In float64, what head `h` of a query gets, which is the last of `length` tokens of a row.
    std::vector<double> expected(int64_t row, int64_t length, int64_t query, int64_t h) const {
        std::vector<double> sums(shape.value_size);
        double total = shape.has_sinks ? exp((double)sinks[h]) : 0;
        for (int64_t place = shape.window && shape.window < length ? length - shape.window : 0; place < length; ++place) {
            const int64_t head = slot(row, place) * shape.kv_heads + h / shape.repeats;
            double score = 0;
            for (int64_t k = 0; k < shape.key_size; ++k)
                score += 0.3 * queries[(query * heads + h) * shape.key_size + k] * keys[head * shape.key_size + k];
            if (shape.softcap > 0) score = shape.softcap * tanh(score / shape.softcap);
            const double weight = exp(score);
            total += weight;
            for (int64_t i = 0; i < shape.value_size; ++i) sums[i] += weight * values[head * shape.value_size + i];
        }
        for (double &sum : sums) sum /= total;
        return sums;
    }
};

// Attends all of it, a few queries at a time.
void attend_items(const pw_kernels *kernels, const pw_attention &task) {
    const Memory scratch(kernels->attention_scratch_bytes(&task, kItemQueries), 64, 0xff);
    int64_t query = 0;
    for (int64_t row = 0; row < kRows; ++row)
        for (int64_t i = 0; i < kCounts[row]; i += kItemQueries, query += kItemQueries) {
            const int64_t count = kCounts[row] - i < kItemQueries ? kCounts[row] - i : kItemQueries;
            for (int64_t head = 0; head < task.kv_heads; ++head) {
                const pw_attended item{row, head, query, count, kLengths[row] - kCounts[row] + i};
                kernels->attend(&task, &item, scratch.as<void>());
            }
            if (count < kItemQueries) query += count - kItemQueries;
        }
}

void check_shape(const Unit &unit, const Shape &shape, Stored stored) {
    const Problem problem(shape, stored);
    attend_items(unit.kernels(), problem.task());
    double worst = 0;
    int64_t at = 0;  // in the results
    for (int64_t row = 0, query = 0; row < kRows; ++row)
        for (int64_t length = kLengths[row] - kCounts[row] + 1; length <= kLengths[row]; ++length, ++query)
            for (int64_t h = 0; h < problem.heads; ++h)
                for (const double expected : problem.expected(row, length, query, h)) {
                    const Memory &out = problem.out;
                    const float found = stored == kFloat32 ? out.as<float>()[at] : to_float(out.as<uint16_t>()[at]);
                    const double error = fabs(found - expected);
                    worst = error > worst || error != error ? error : worst;
                    ++at;
                }
    // In bfloat16, results below 1 are off by 2^-9, and weights may be by 2^-8 of themselves.
    check(worst < (stored == kFloat32 ? 1e-5 : 0x1.8p-8 + 1e-5), "%s: heads of %ld and %ld, stored %d, are off by %g",
          unit.name, (long)shape.key_size, (long)shape.value_size, stored, worst);
}

constexpr int64_t kShort[] = {0, 1, 2, 4, 9, 14, 24}, kMany[] = {1, 1, 17, 76, 9, 70}, kNone[] = {1, 1, 17, 0, 9, 70};

template <class Change>
void check_refused(const char *what, Change change) {
    const Problem problem(kShapes[1], kBfloat16);
    pw_attention task = problem.task();
    check(pw_attend(&task) == PW_OK, "a good task is refused");
    change(task);
    check(pw_attend(&task) == PW_BAD_ARGUMENT, "a task with %s is not refused", what);
}

void check_arguments() {
    check_refused("no queries", [](pw_attention &t) { t.queries = nullptr; });
    check_refused("no tables", [](pw_attention &t) { t.tables = nullptr; });
    check_refused("no ends of tables", [](pw_attention &t) { t.table_starts = nullptr; });
    check_refused("no counts", [](pw_attention &t) { t.counts = nullptr; });
    check_refused("no rows", [](pw_attention &t) { t.rows = 0; });
    check_refused("heads that share no keys evenly", [](pw_attention &t) { t.heads = 10; });
    check_refused("blocks of 8", [](pw_attention &t) { t.block_size = 8; });
    check_refused("a window below zero", [](pw_attention &t) { t.window = -1; });
    check_refused("scales for keys alone", [](pw_attention &t) { t.key_scales = (const uint16_t *)t.keys; });
    check_refused("an unknown type", [](pw_attention &t) { t.dtype = PW_FLOAT16; });
    check_refused("a length beyond its table", [](pw_attention &t) { t.table_starts = kShort; });
    check_refused("more queries than tokens", [](pw_attention &t) { t.counts = kMany; });
    check_refused("a row without queries", [](pw_attention &t) { t.counts = kNone; });
    check(pw_attend(nullptr) == PW_BAD_ARGUMENT, "no task is not refused");
}

int32_t count_threads(uint32_t *count) {
    *count = 3;
    return 0;
}

int32_t run_in_threads(int64_t begin, int64_t end, int64_t, pw_body body, void *context) {
    std::vector<std::thread> threads;
    for (int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
    for (std::thread &thread : threads) thread.join();
    return 0;
}

std::string result_of(const Problem &problem) {
    const pw_attention task = problem.task();
    check(pw_attend(&task) == PW_OK, "a good task is refused");
    return std::string(problem.out.as<char>(), problem.out.size());
}

void check_threads(Stored stored) {
    const Problem problem({6, 2, 128, 128, 0, 0, false}, stored);
    pw_init(nullptr, nullptr);
    const std::string alone = result_of(problem);
    pw_init(run_in_threads, count_threads);
    check(result_of(problem) == alone, "threads change what is attended");
    pw_init(nullptr, nullptr);
}

}  // namespace

void test_attention() {
    for (const Unit &unit : kUnits) {
        if (!can_run(unit)) continue;
        for (const Shape &shape : kShapes)
            for (Stored stored : {kFloat32, kBfloat16, kInt8}) check_shape(unit, shape, stored);
    }
    check_arguments();
    for (Stored stored : {kFloat32, kBfloat16}) check_threads(stored);
}
