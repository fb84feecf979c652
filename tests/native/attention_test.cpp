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

constexpr int64_t kBlockSize = 16, kBlocks = 24, kWidth = 6;
constexpr int64_t kLengths[] = {1, 16, 17, 75, 96};
constexpr int64_t kRows = 5;

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
    Memory query_memory, key_memory, value_memory, key_scales, value_scales, tables, lengths, out;
    uint64_t state = 1;

    size_t element() const { return stored == kFloat32 ? 4 : stored == kBfloat16 ? 2 : 1; }
    size_t slots(int64_t size) const { return (size_t)(kBlocks * kBlockSize * shape.kv_heads * size); }
    size_t scale_bytes() const { return stored == kInt8 ? 2 * slots(1) : 0; }
    size_t activation() const { return stored == kFloat32 ? 4 : 2; }

    Problem(const Shape &shape, Stored stored)
        : shape(shape),
          stored(stored),
          heads(shape.kv_heads * shape.repeats),
          query_memory((size_t)(kRows * heads * shape.key_size) * activation(), 4, 0),
          key_memory(slots(shape.key_size) * element(), 4, 0xff),
          value_memory(slots(shape.value_size) * element(), 4, 0xff),
          key_scales(scale_bytes(), 4, 0xff),
          value_scales(scale_bytes(), 4, 0xff),
          tables(sizeof(int64_t) * kRows * kWidth, 8, 0),
          lengths(sizeof kLengths, 8, 0),
          out((size_t)(kRows * heads * shape.value_size) * activation(), 4, 0) {
        memcpy(lengths.as<void>(), kLengths, sizeof kLengths);
        for (int64_t i = 0; i < kRows * heads * shape.key_size; ++i) queries.push_back(put(query_memory, i, activation()));
        keys.resize(slots(shape.key_size));
        values.resize(slots(shape.value_size));
        for (int64_t h = 0; h < heads && shape.has_sinks; ++h) sinks.push_back(draw());
        int64_t block = kBlocks;  // rows take blocks from the last one on; those behind a length are not read
        for (int64_t row = 0; row < kRows; ++row)
            for (int64_t place = 0; place < kLengths[row]; ++place) {
                if (place % kBlockSize == 0) tables.as<int64_t>()[row * kWidth + place / kBlockSize] = --block;
                fill(block * kBlockSize + place % kBlockSize);
            }
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
                lengths.as<int64_t>(), shape.has_sinks ? sinks.data() : nullptr, out.as<void>(), kRows, heads,
                shape.kv_heads, shape.key_size, shape.value_size, kBlockSize, kWidth, shape.window,
                stored == kFloat32 ? PW_FLOAT32 : PW_BFLOAT16, 0.3, shape.softcap};
    }

    // In float64, value `i` of head `h` of a row.
    double expected(int64_t row, int64_t h, int64_t i) const {
        const int64_t length = kLengths[row];
        double total = shape.has_sinks ? exp((double)sinks[h]) : 0, sum = 0;
        for (int64_t place = shape.window && shape.window < length ? length - shape.window : 0; place < length; ++place) {
            const int64_t block = tables.as<int64_t>()[row * kWidth + place / kBlockSize];
            const int64_t head = (block * kBlockSize + place % kBlockSize) * shape.kv_heads + h / shape.repeats;
            double score = 0;
            for (int64_t k = 0; k < shape.key_size; ++k)
                score += 0.3 * queries[(row * heads + h) * shape.key_size + k] * keys[head * shape.key_size + k];
            if (shape.softcap > 0) score = shape.softcap * tanh(score / shape.softcap);
            total += exp(score);
            sum += exp(score) * values[head * shape.value_size + i];
        }
        return sum / total;
    }
};

void check_shape(const Unit &unit, const Shape &shape, Stored stored) {
    const Problem problem(shape, stored);
    const pw_attention task = problem.task();
    const pw_kernels *kernels = unit.kernels();
    const Memory scratch(kernels->attention_scratch_bytes(&task), 64, 0xff);
    for (int64_t i = 0; i < kRows * shape.kv_heads; ++i) kernels->attend(&task, i, scratch.as<void>());
    double worst = 0;
    for (int64_t i = 0; i < kRows * problem.heads * shape.value_size; ++i) {
        const float found = stored == kFloat32 ? problem.out.as<float>()[i] : to_float(problem.out.as<uint16_t>()[i]);
        const int64_t head = i / shape.value_size;
        const double error = fabs(found - problem.expected(head / problem.heads, head % problem.heads, i % shape.value_size));
        worst = error > worst || error != error ? error : worst;
    }
    check(worst < (stored == kFloat32 ? 1e-5 : 0x1p-8), "%s: heads of %ld and %ld, stored %d, are off by %g", unit.name,
          (long)shape.key_size, (long)shape.value_size, stored, worst);
}

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
    check_refused("no rows", [](pw_attention &t) { t.rows = 0; });
    check_refused("heads that share no keys evenly", [](pw_attention &t) { t.heads = 10; });
    check_refused("blocks of 8", [](pw_attention &t) { t.block_size = 8; });
    check_refused("a window below zero", [](pw_attention &t) { t.window = -1; });
    check_refused("scales for keys alone", [](pw_attention &t) { t.key_scales = (const uint16_t *)t.keys; });
    check_refused("an unknown type", [](pw_attention &t) { t.dtype = PW_FLOAT16; });
    check_refused("a length beyond its table", [](pw_attention &t) { t.table_width = 5; });
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

void check_threads() {
    const Problem problem({6, 2, 128, 128, 0, 0, false}, kFloat32);
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
    check_threads();
}
